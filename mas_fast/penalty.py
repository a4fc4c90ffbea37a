"""The penalty λ Σ_ij Ω_ij (θ_ij − θ*_ij)² over groups of parameters: differentiable, or its gradient added in place.

Of DTensors each rank works on its own part, and only the parts' values are summed over the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mas_fast.checks import bullets
from mas_fast.kernels import steps
from mas_fast.kernels.steps import Held, contiguous, penalty
from mas_fast.plan import Group
from mas_fast.sharding import locals_of, placed_like, same_place, sum_over_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_grad_of = attrgetter("grad")
_dtype_of = attrgetter("dtype")


def _layout_of(grad: Tensor | None) -> torch.layout | None:
    return None if grad is None else grad.layout


def penalty_value(groups: Sequence[Group], dtype: torch.dtype) -> Tensor:
    """Return λ Σ Ω(θ − θ*)² as a 0-dim tensor, differentiable in θ.

    Args:
        groups: At least one.
        dtype: Of the result.
    """
    values = []
    for group in groups:
        thetas = [t if t.is_contiguous() else t.contiguous() for t in locals_of(group.parameters)]
        value = _Penalty.apply(group.held, *thetas).sum()
        values.append(_SumOverRanks.apply(value, group.ranks) if group.ranks else value)
    return _total(values, dtype)


def traced_penalty_value(groups: Sequence[Group], parameters: Sequence[Tensor]) -> Tensor:
    """Return what `penalty_value` does, by what torch.compile can trace, and without λ as constants of the graph.

    Args:
        groups: At least one, none of them spread over ranks.
        parameters: What `Plan.parameters_in` found.
    """
    values = []
    dtype = torch.float32
    for group in groups:
        thetas = [parameters[index] for index in group.indices]
        held = group.held._replace(lams=[1.0] * len(thetas))
        values.append((penalty(thetas, held) * group.lams).sum())
        if any(tensor.dtype == torch.float64 for tensor in (*thetas, *held.omegas)):
            dtype = torch.float64
    return _total(values, dtype)


@torch.no_grad()
def penalty_by_parameter(groups: Sequence[Group]) -> dict[str, float]:
    """Return λ Σ Ω(θ − θ*)² of each parameter by its name."""
    found: dict[str, float] = {}
    for group in groups:
        with contiguous(locals_of(group.parameters)) as thetas:
            values = steps.values(thetas, group.held)
        found |= zip(group.names, sum_over_ranks(values, group.ranks).tolist(), strict=True)
    return found


@torch.no_grad()
def add_penalty_grad_(groups: Sequence[Group], dtype: torch.dtype) -> Tensor:
    """Add 2λΩ(θ − θ*) to the `.grad` of every θ, creating it where it is missing, and return what `penalty_value` does.

    Args:
        groups: At least one.
        dtype: Of the result.

    Raises:
        ValueError: A `.grad` is sparse; nothing is changed.
        FloatingPointError: Entries of float16 gradients overflowed.
    """
    given = [_dense_grads(group) for group in groups]
    values = []
    for group, own in zip(groups, given, strict=True):
        grads = _writable(group, own)
        sums = steps.add_penalty_grad_(locals_of(grads), locals_of(group.parameters), group.held)
        # Kernels write past autograd, which must still refuse a backward through a graph that needs the old gradient.
        torch.autograd.graph.increment_version(grads)
        total = sum_over_ranks(sums.sum(0), group.ranks)
        # To look at it is to wait for the device, which only the dtype that overflows in practice is worth; on the host
        # it costs less than to look at the dtypes.
        if not (sums.is_cpu and total[1] == 0) and torch.float16 in map(_dtype_of, grads) and total[1] > 0:
            _refuse_overflow(group, grads, sums[:, 1].tolist())
        values.append(total[0])
    return _total(values, dtype)


def _total(values: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value.to(total.device, non_blocking=True)
    return total.to(dtype)


def _dense_grads(group: Group) -> list[Tensor | None]:
    grads = [*map(_grad_of, group.parameters)]
    if {*map(_layout_of, grads)} - {torch.strided, None}:
        rows = zip(group.names, grads, strict=True)
        sparse = [name for name, grad in rows if _layout_of(grad) not in (torch.strided, None)]
        raise ValueError(
            f".grad must be dense to take a dense penalty, got sparse ones for {', '.join(map(repr, sparse))}: "
            "build nn.Embedding with sparse=False, or leave it out of the importance"
        )
    return grads


def _writable(group: Group, grads: list[Tensor | None]) -> list[Tensor]:
    """Return gradients that can be written to, after making those that are missing."""
    present = cast("list[Tensor]", grads)
    if not group.is_sharded and None not in {*map(_layout_of, grads)} and all(map(Tensor.is_contiguous, present)):
        return present
    for index, (parameter, grad) in enumerate(zip(group.parameters, grads, strict=True)):
        if grad is None:
            dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype
            grads[index] = parameter.grad = torch.zeros_like(parameter, dtype=dtype)
        elif not grad.is_contiguous() and 0 in grad.stride():
            # Expanded: its entries share memory.
            grads[index] = parameter.grad = grad.clone(memory_format=torch.contiguous_format)
        elif group.is_sharded and not same_place(grad, parameter):
            # A sum that the ranks have yet to form.
            grads[index] = parameter.grad = placed_like(grad, parameter)
    return present


def _refuse_overflow(group: Group, grads: Sequence[Tensor], lost: Sequence[float]) -> None:
    rows = zip(group.names, grads, lost, strict=True)
    lines = [f"{name!r} has {count:.0f} of {grad.numel()} in {grad.dtype}" for name, grad, count in rows if count]
    raise FloatingPointError(
        "2 lam Omega (theta - theta*) must fit into the gradients, got entries that overflowed:"
        f"{bullets(lines or ['those of other ranks'])}\n"
        "the gradients are spoilt: zero them and lower lam, or keep the parameters in float32, with autocast, or in "
        "bfloat16"
    )


class _SumOverRanks(torch.autograd.Function):
    """Sum of a value over ranks, each of which differentiates its own part alone."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, groups: tuple[ProcessGroup, ...]) -> Tensor:
        return sum_over_ranks(value.clone(), groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Penalty(torch.autograd.Function):
    """The op `penalty` for eager mode: PyTorch's own way to differentiate an op of lists takes ten times as long."""

    @staticmethod
    def forward(ctx: Any, held: Held, *thetas: Tensor) -> Tensor:
        ctx.held = held
        ctx.save_for_backward(*thetas)
        return steps.values(thetas, held)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, *torch.ops.mas_fast.penalty_grad(gradient, list(ctx.saved_tensors), *ctx.held)
