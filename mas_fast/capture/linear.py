"""Rules for y = W x + b: linear, addmm, matmul, mm. Letters as in reference.py."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mas_fast.capture import product
from mas_fast.capture.binding import Binding, Delta, rule
from mas_fast.kernels import ops


def _accumulate(
    omega: Mapping[str, Tensor], delta: Delta, saved: tuple[Any, ...], square: bool, transposed: bool
) -> None:
    grad_output = delta.positions(delta.value)  # [N, T, O]
    if "weight" in omega:
        x = delta.positions(saved[0])  # [N, T, I]
        ops.accumulate_linear_(omega["weight"].mT if transposed else omega["weight"], grad_output, x, square)
    if "bias" in omega:
        ops.accumulate_affine_(None, omega["bias"], grad_output.unsqueeze(3), square=square)


def _join(
    omega: Tensor, role: str, calls: Sequence[tuple[Delta, tuple[Any, ...]]], square: bool, transposed: bool
) -> None:
    """Sum over calls as over positions: they stand side by side along T."""
    grad_output = torch.cat([delta.positions(delta.value) for delta, _ in calls], 1)
    if role == "bias":
        ops.accumulate_affine_(None, omega, grad_output.unsqueeze(3), square=square)
    else:
        x = torch.cat([delta.positions(saved[0]) for delta, saved in calls], 1)
        ops.accumulate_linear_(omega.mT if transposed else omega, grad_output, x, square)


def _gradients(role: str, target: Tensor, delta: Delta, saved: tuple[Any, ...], transposed: bool) -> Tensor:
    grad_output = delta.positions(delta.value)
    if role == "bias":
        return grad_output.sum(1)
    x = delta.positions(saved[0]).to(grad_output.dtype)
    return x.mT @ grad_output if transposed else grad_output.mT @ x


# One object each, so that calls that can be joined are known by it.
_JOINS = {transposed: partial(_join, transposed=transposed) for transposed in (False, True)}


def _bind(input: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Binding | None:
    # A bias that is not one number per output is added elementwise: no rule here.
    if weight.dim() != 2 or (bias is not None and bias.shape != (weight.shape[1 if transposed else 0],)):
        return None
    return Binding(
        rule="linear",
        roles={"weight": weight, "bias": bias},
        saved=(input,),
        accumulate=partial(_accumulate, transposed=transposed),
        gradients=partial(_gradients, transposed=transposed),
        join=_JOINS[transposed],
        axes=lambda output, _: range(len(output) - 1),
    )


@rule(F.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Binding | None:
    """F.linear: y = x Wᵀ + b, W [O, I]."""
    return _bind(input, weight, bias, transposed=False)


@rule(torch.matmul, torch.mm, torch.linalg.matmul, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)
def matmul(input: Tensor, other: Tensor) -> Binding | None:
    """Bind x @ W, with W [I, O] on the right; where the parameter may be on the left, or has more axes, see product."""
    if other.dim() != 2 or isinstance(input, nn.Parameter):
        return product.matmul(input, other)
    if input.dim() == 2 and input.requires_grad and not isinstance(other, nn.Parameter):
        # Either of the two may have been picked from a parameter.
        return product.matmul(input, other)
    return _bind(input, other, None, transposed=True)


@rule(torch.Tensor.__rmatmul__)
def rmatmul(self: Tensor, other: Tensor) -> Binding | None:
    """W.__rmatmul__(x) is x @ W."""
    return matmul(other, self)


@rule(torch.addmm, torch.Tensor.addmm)
def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None
) -> Binding | None:
    """torch.addmm(b, x, W): b + x @ W with W [I, O]."""
    return None if beta != 1 or alpha != 1 or out is not None else _bind(mat1, mat2, input, transposed=True)
