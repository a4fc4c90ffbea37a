"""The penalty λ Σ_ij Ω_ij (θ_ij − θ*_ij)² over lists of tensors: differentiable, or its gradient added in place.

Of DTensors each rank works on its own part, and only the parts' values are summed over the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from mas_fast.sharding import local, splitting_groups

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Term(NamedTuple):
    """One parameter's part of the penalty: θ, Ω and θ*, of one shape and in one place, each of its own dtype."""

    theta: Tensor
    omega: Tensor
    anchor: Tensor


def penalty_value(terms: Sequence[Term], lam: float) -> Tensor:
    """Return λ Σ Ω(θ − θ*)² as a 0-dim tensor, differentiable in θ; float64 if anything is, float32 otherwise.

    Args:
        terms: At least one.
        lam: λ.
    """
    values = []
    for term in terms:
        wide = _wide_dtype(*term)
        theta, omega, anchor = (local(tensor).to(wide) for tensor in term)
        values.append((omega * (theta - anchor).square()).sum())
    return lam * _sum_of(values, terms)


@torch.no_grad()
def add_penalty_grad_(terms: Sequence[Term], lam: float) -> Tensor:
    """Add 2λΩ(θ − θ*) to the `.grad` of every θ, creating it where it is missing, and return what `penalty_value` does.

    Args:
        terms: At least one; no `.grad` may be sparse.
        lam: λ.
    """
    groups: dict[tuple[object, ...], tuple[list[Term], list[Tensor]]] = {}
    for term in terms:
        if term.theta.grad is None:
            term.theta.grad = torch.zeros_like(term.theta)
        key = (term.theta.device, *(tensor.dtype for tensor in term), term.theta.grad.dtype)
        group_terms, group_grads = groups.setdefault(key, ([], []))
        group_terms.append(term)
        group_grads.append(local(term.theta.grad))
    values, ordered = [], []
    for group_terms, group_grads in groups.values():
        values += _add_group(group_terms, group_grads, lam)
        ordered += group_terms
    return lam * _sum_of(values, ordered)


def _add_group(terms: list[Term], grads: list[Tensor], lam: float) -> list[Tensor]:
    # Multi-tensor ops are fast when all tensors are of one device and dtype, which the caller sees to.
    wide = _wide_dtype(*terms[0])
    thetas, omegas, anchors = ([local(tensor).to(wide) for tensor in tensors] for tensors in zip(*terms, strict=True))
    differences = torch._foreach_sub(thetas, anchors)
    weighted = torch._foreach_mul(differences, omegas)
    # A half-precision gradient is added to in `wide` and rounded once.
    torch._foreach_add_(grads, weighted, alpha=2 * lam)
    return [torch.dot(w.flatten(), d.flatten()) for w, d in zip(weighted, differences, strict=True)]


def _wide_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _sum_of(values: Sequence[Tensor], terms: Iterable[Term]) -> Tensor:
    """Return the sum of the terms' values; those of DTensors are this rank's, and summed over the ranks first."""
    wide = _wide_dtype(*values)
    spread: dict[tuple[ProcessGroup, ...], list[Tensor]] = {}
    for value, term in zip(values, terms, strict=True):
        spread.setdefault(splitting_groups(term.theta), []).append(value.to(values[0].device, wide))
    sums = [_SumOverRanks.apply(torch.stack(parts).sum(), groups) for groups, parts in spread.items()]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


class _SumOverRanks(torch.autograd.Function):
    """Sum of a value over ranks, each of which differentiates its own part alone."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, groups: tuple[ProcessGroup, ...]) -> Tensor:
        total = value.clone()
        for group in groups:
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
