"""What holds for any call that meets data: the gradient of one sample is the call's own backward of that sample's δ.

For calls without a rule of their own. Nothing of the call needs to be known; it costs one backward of this call for
every sample, where the per-sample loop costs one of the whole model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mas_fast.capture.binding import Binding, Delta


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Walk over the tensors of a call's arguments, in order, in lists and tuples too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def replaced(value: Any, swap: Callable[[Tensor], Tensor]) -> Any:
    """Return arguments with every tensor replaced."""
    if isinstance(value, Tensor):
        return swap(value)
    if type(value) in (tuple, list):
        return type(value)(replaced(item, swap) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(replaced(item, swap) for item in value))
    if type(value) is dict:
        return {key: replaced(item, swap) for key, item in value.items()}
    return value


def changes_its_arguments(function: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call writes into one of its arguments."""
    name = getattr(function, "__name__", "")
    written = name.endswith("_") and not name.endswith("__")
    inplace = name.startswith("__i") and name.endswith("__") and name not in ("__invert__", "__index__", "__int__")
    asked = kwargs.get("out") is not None or bool(kwargs.get("inplace"))
    return asked or written or inplace or name in ("__setitem__", "__set__")


def call(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], parameters: Mapping[int, Tensor]
) -> Binding | None:
    """Bind any call that returns one new tensor; None if it changes its arguments instead.

    Args:
        function: The torch function.
        args: Its arguments.
        kwargs: Its keyword arguments.
        parameters: id -> tensor, those of the arguments whose gradients are wanted.
    """
    if changes_its_arguments(function, kwargs):
        return None
    everything = list(tensors_in([list(args), dict(kwargs)]))
    kept = [t for t in everything if id(t) not in parameters]
    # Where each tensor of the arguments is to be had from in the backward: a role, or a place among the kept.
    places: list[str | int] = []
    for t in everything:
        places.append(f"argument {id(t)}" if id(t) in parameters else sum(isinstance(p, int) for p in places))
    roles = {f"argument {id(t)}": t for t in everything if id(t) in parameters}
    # Only the form of the arguments is remembered: their tensors are kept by autograd.
    form = replaced([list(args), dict(kwargs)], lambda t: _HOLE)
    return Binding(
        rule=getattr(function, "__name__", str(function)).strip("_"),
        roles=roles,
        saved=tuple(kept),
        accumulate=None,
        gradients=partial(_gradients, function=function, form=form, places=places, parameters=dict(roles)),
        axes=lambda output, _: range(len(output)),
    )


_HOLE = torch.empty(0)


def _gradients(
    role: str,
    target: Tensor,
    delta: Delta,
    saved: tuple[Any, ...],
    function: Any,
    form: Any,
    places: Sequence[str | int],
    parameters: Mapping[str, Tensor],
) -> Tensor:
    leaf = parameters[role].detach().requires_grad_()
    sources = iter(places)

    def fill(_: Tensor) -> Tensor:
        place = next(sources)
        if isinstance(place, int):
            return saved[place].detach()
        return leaf if place == role else parameters[place].detach()

    args, kwargs = replaced(form, fill)
    with torch.enable_grad():
        output = function(*args, **kwargs)
        rows = []
        for sample in range(delta.samples)[delta.part]:
            # A sum and no grad_outputs, for which torch imports 480 modules of its symbolic shapes.
            total = (output * delta.alone(sample).to(output.dtype)).sum()
            rows.append(torch.autograd.grad(total, leaf, retain_graph=True)[0])
    return torch.stack(rows)
