"""What a rule says about one call: which arguments are parameters, what to keep, and how Ω grows from δ."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mas_fast.capture.layout import Layout, split_samples
from mas_fast.kernels import ops

_ALL = slice(None)


class Delta(NamedTuple):
    """The gradient of a call's output, with the sample axis known."""

    value: Tensor  # δ, in the shape of the output
    layout: Layout | None  # None: the batch is one sample
    samples: int
    part: slice = _ALL  # of the samples, to look at only some of them

    def split(self, tensor: Tensor) -> Tensor:
        """Give a tensor that shares the output's leading axes a first axis of N samples."""
        rows = split_samples(tensor, self.layout, self.samples)
        return rows if self.part == _ALL else rows[self.part]

    def widened(self, part: slice) -> "Delta":
        """Return δ in no less than float32, of some of the samples: for gradients that are summed."""
        return self._replace(value=self.value.to(torch.promote_types(self.value.dtype, torch.float32)), part=part)

    def alone(self, sample: int) -> Tensor:
        """Return δ of one sample: that of all others is zero."""
        return self.value if self.layout is None else self.layout.alone(self.value, sample, self.samples)

    def positions(self, tensor: Tensor, features: int = 1) -> Tensor:
        """Bring a tensor to [N, T, *features]: all axes between the samples and the last `features` are positions."""
        rows = self.split(tensor)
        if rows.dim() == 1 + features:
            return rows.unsqueeze(1)
        return rows.flatten(1, rows.dim() - 1 - features)


# (Ω of each tracked role, δ, kept tensors, square) -> None
Accumulate = Callable[[Mapping[str, Tensor], Delta, tuple[Any, ...], bool], None]

# (Ω, role, δ and kept tensors of several calls, square) -> None: Σ_n |sum over the calls|, in one kernel
Join = Callable[[Tensor, str, Sequence[tuple[Delta, tuple[Any, ...]]], bool], None]

# (role, the tensor in that role, δ, kept tensors) -> its gradient for every sample of δ's part, [n, *shape]
Gradients = Callable[[str, Tensor, Delta, tuple[Any, ...]], Tensor]


class Binding(NamedTuple):
    """One call, understood by a rule."""

    rule: str
    roles: Mapping[str, Tensor | None]  # arguments that may be parameters
    saved: tuple[
        Any, ...
    ]  # what `accumulate` needs of the forward; tensors among it are guarded against in-place changes
    accumulate: Accumulate | None  # None: only by way of `gradients`
    gradients: Gradients
    # (shape of the output, shape of the parameter) -> the axes of the output that may hold the samples
    axes: Callable[[torch.Size, torch.Size], Iterable[int]]
    join: Join | None = None
    inplace: bool = False  # the call changes its first argument and returns it
    view: bool = False  # the output shares the parameter's memory
    single: bool = False  # only one of the roles may be a parameter
    # In the place of the function: its output, and what belongs to `saved` besides, which it has computed anyway.
    run: Callable[..., tuple[Tensor, ...]] | None = None


Rule = Callable[..., Binding | None]
RULES: dict[Any, Rule] = {}


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Register a rule: it takes the arguments of a call and returns a Binding, or None if it does not apply."""

    def register(bind: Rule) -> Rule:
        for function in functions:
            RULES[function] = bind
        return bind

    return register


def bind(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Binding | None:
    """Understand a call by its rule; None if there is no rule, or none for a call with these arguments."""
    found = RULES.get(function)
    if found is None:
        return None
    # Spelled in a way that the rule does not know, such as mat2= for torch.mm.
    return found(*args, **kwargs) if _takes(found, len(args), tuple(kwargs)) else None


@cache
def _takes(found: Rule, positional: int, keywords: tuple[str, ...]) -> bool:
    try:
        inspect.signature(found).bind(*[None] * positional, **dict.fromkeys(keywords))
    except TypeError:
        return False
    return True


@contextmanager
def flattened(omega: Tensor) -> Iterator[Tensor]:
    """Give Ω as a vector to add to, also where it is a strided view of a parameter's Ω."""
    with ops.contiguous(omega) as buffer:
        yield buffer.view(-1)
