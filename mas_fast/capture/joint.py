"""Parameters whose gradients must be summed before |·| is taken: used more than once, or by way of other tensors.

    g_n = Σ_uses J_useᵀ g_n^use,    Ω += Σ_n |g_n|

Where all uses are products of one kind, such as a layer that is called again and again, they are one product over more
positions, and one kernel does it. Everything else has the gradients of some samples at a time formed in memory: as many
as the budget allows, one at least.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mas_fast.capture.binding import Delta
from mas_fast.capture.select import Tracked
from mas_fast.capture.tap import Tap
from mas_fast.kernels import ops

# A CPU is slower with more than its caches hold: new pages, and the same numbers fetched again at every step.
_CACHED_BYTES = 8 << 20


class Use(NamedTuple):
    """One role of one tap, with all that its gradients follow from."""

    tap: Tap
    role: str
    source: Tracked
    delta: Delta
    saved: tuple[Tensor, ...]


def components(uses: Sequence[Use]) -> list[tuple[set[str], list[Use]]]:
    """Group uses by the parameters that they have in common."""
    groups: list[tuple[set[str], list[Use]]] = []
    for use in uses:
        names, members = set(use.source.names), [use]
        rest = []
        for group in groups:
            if group[0] & names:
                names, members = names | group[0], group[1] + members
            else:
                rest.append(group)
        groups = [*rest, (names, members)]
    return groups


def add_joint(
    uses: Sequence[Use],
    sums: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    samples: int,
    square: bool,
    budget: int,
    watched: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Add Σ_n |Σ_uses g_n| of parameters that are joined by their uses.

    Args:
        uses: All uses of all of them in this batch.
        sums: Name -> Ω, added to.
        parameters: Name -> parameter, also of others.
        samples: N.
        square: Σ_n (·)² instead of Σ_n |·|.
        budget: Bytes that the gradients of the samples at hand may take.
        watched: Around backwards, in which activation checkpoints may run again.
    """
    first = uses[0]
    join = first.tap.join
    if join is not None and all(u.source.whole and u.tap.join is join and u.role == first.role for u in uses):
        (omega,) = sums.values()
        join(omega, first.role, [(use.delta, use.saved) for use in uses], square)
        return
    derived = {id(use.source.tensor): use.source.tensor for use in uses if use.source.derived}
    roots = {name: parameters[name] for name in sums}
    # What is being formed, what it is added to, and one more for what the sums go through.
    sample_bytes = sum(sums[name].element_size() * sums[name].numel() for name in sums) * 3
    sample_bytes += sum(4 * 3 * tensor.numel() for tensor in derived.values())
    if uses[0].delta.value.device.type == "cpu":
        budget = min(budget, _CACHED_BYTES)
    at_once = max(1, min(samples, budget // max(1, sample_bytes)))
    for begin in range(0, samples, at_once):
        part = slice(begin, min(begin + at_once, samples))
        gradients = _gradients(uses, derived, roots, part, watched)
        for name, gradient in gradients.items():
            rows = gradient.reshape(len(gradient), 1, -1, 1)
            ops.accumulate_affine_(None, sums[name].view(-1), rows, square=square)


def _gradients(
    uses: Sequence[Use],
    derived: Mapping[int, Tensor],
    roots: Mapping[str, Tensor],
    part: slice,
    watched: Callable[[], AbstractContextManager[None]],
) -> dict[str, Tensor]:
    """Return name -> [n, *shape] of the samples in part."""
    of_roots: dict[str, Tensor] = {}
    of_derived: dict[int, Tensor] = {}
    for use in uses:
        gradient = use.tap.gradients(use.role, use.source.tensor, use.delta.widened(part), use.saved)
        if gradient.untyped_storage().data_ptr() == use.delta.value.untyped_storage().data_ptr():
            gradient = gradient.clone()  # sums are formed in place, and δ may be another call's too
        if use.source.derived:
            _put(of_derived, id(use.source.tensor), gradient)
        else:
            _put(of_roots, use.source.names[0], gradient)
    if of_derived:
        tensors = [derived[key] for key in of_derived]
        for name, pulled in zip(roots, _pulled_back(tensors, list(of_derived.values()), roots, watched), strict=True):
            if pulled is not None:
                _put(of_roots, name, pulled)
    return of_roots


def _put(into: dict[Any, Tensor], key: object, gradient: Tensor) -> None:
    if key in into:
        into[key] += gradient
    else:
        into[key] = gradient


def _pulled_back(
    tensors: Sequence[Tensor],
    gradients: Sequence[Tensor],
    roots: Mapping[str, Tensor],
    watched: Callable[[], AbstractContextManager[None]],
) -> list[Tensor | None]:
    """Return Jᵀg of every sample: from gradients of derived tensors to those of the parameters they come from."""
    hooks = {name: root._backward_hooks for name, root in roots.items()}
    rows = []
    try:
        # Hooks on parameters are for training, as in the loop.
        for root in roots.values():
            root._backward_hooks = None
        for sample in range(len(gradients[0])):
            # A sum and no grad_outputs, for which torch imports 480 modules of its symbolic shapes.
            # Of complex tensors, the real product in which torch's gradients are meant.
            products = [(t * g[sample].to(t.dtype).conj()).sum().real for g, t in zip(gradients, tensors, strict=True)]
            total = torch.stack(products).sum()
            with watched():
                rows.append(torch.autograd.grad(total, list(roots.values()), retain_graph=True, allow_unused=True))
    finally:
        for name, root in roots.items():
            root._backward_hooks = hooks[name]
    return [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]
