"""The penalty λ Σ_ij Ω_ij (θ_ij − θ*_ij)² over lists of tensors: differentiable, or its gradient added in place."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Term(NamedTuple):
    """One parameter's part of the penalty: θ, Ω and θ*, of one shape and on one device, each of its own dtype."""

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
    for theta, omega, anchor in terms:
        wide = _wide_dtype(theta, omega, anchor)
        values.append((omega.to(wide) * (theta.to(wide) - anchor.to(wide)).square()).sum())
    return lam * _sum_of(values)


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
        group_grads.append(term.theta.grad)
    return lam * _sum_of(itertools.chain.from_iterable(_add_group(*group, lam) for group in groups.values()))


def _add_group(terms: list[Term], grads: list[Tensor], lam: float) -> list[Tensor]:
    # Multi-tensor ops are fast when all tensors are of one device and dtype, which the caller sees to.
    wide = _wide_dtype(*terms[0])
    thetas, omegas, anchors = ([tensor.to(wide) for tensor in tensors] for tensors in zip(*terms, strict=True))
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


def _sum_of(values: Iterable[Tensor]) -> Tensor:
    values = list(values)
    wide = _wide_dtype(*values)
    return torch.stack([value.to(values[0].device, wide) for value in values]).sum()
