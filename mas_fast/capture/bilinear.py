"""Rule for bilinear layers, y = x₁ᵀ W x₂ + b: linear layers whose input is the outer product of the two."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mas_fast.capture.binding import Binding, Delta, flattened, rule
from mas_fast.kernels import ops
from mas_fast.reference import CHUNK_ENTRIES


def _accumulate(omega: Mapping[str, Tensor], delta: Delta, saved: tuple[Any, ...], square: bool) -> None:
    grad_output = delta.positions(delta.value)  # [N, T, O]
    if "weight" in omega:
        left, right = (delta.positions(t) for t in saved)  # [N, T, I], [N, T, J]
        at_once = max(1, CHUNK_ENTRIES // max(1, left[0].numel() * right.shape[2]))
        parts = zip(*(t.split(at_once) for t in (grad_output, left, right)), strict=True)
        with flattened(omega["weight"]) as entries:
            matrix = entries.view(grad_output.shape[2], -1)  # [O, I·J]
            for delta_, x, y in parts:
                ops.accumulate_linear_(matrix, delta_, _outer(x, y), square)
    if "bias" in omega:
        ops.accumulate_affine_(None, omega["bias"], grad_output.unsqueeze(3), square=square)


def _gradients(role: str, target: Tensor, delta: Delta, saved: tuple[Any, ...]) -> Tensor:
    grad_output = delta.positions(delta.value)
    grad_output = grad_output.to(torch.promote_types(grad_output.dtype, torch.float32))
    if role == "bias":
        return grad_output.sum(1)
    pairs = _outer(*(delta.positions(t) for t in saved)).to(grad_output.dtype)
    return (grad_output.mT @ pairs).view(-1, *target.shape)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Return x₁ x₂ᵀ of every position, [N, T, I·J], in no less than float32: products of bfloat16 have more digits."""
    wide = torch.promote_types(left.dtype, torch.float32)
    return (left.to(wide).unsqueeze(3) * right.to(wide).unsqueeze(2)).flatten(2)


@rule(F.bilinear, torch.bilinear)
def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Binding:
    """F.bilinear, W [O, I, J]."""
    return Binding(
        rule="bilinear",
        roles={"weight": weight, "bias": bias},
        saved=(input1, input2),
        accumulate=_accumulate,
        gradients=_gradients,
        axes=lambda output, _: range(len(output) - 1),
    )
