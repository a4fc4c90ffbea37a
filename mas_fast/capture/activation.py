"""Rules for calls that take a parameter and data entry by entry: prelu, where, lerp, addcmul.

The gradient is δ times a factor that data decide, summed over where the parameter repeats, as for w·x.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mas_fast.capture import broadcast
from mas_fast.capture.binding import Binding, Delta, flattened, rule

# (role of the parameter, *kept tensors) -> what δ is multiplied with
Factor = Callable[..., Tensor]


def _accumulate(
    omega: Mapping[str, Tensor],
    delta: Delta,
    saved: tuple[Any, ...],
    square: bool,
    factor: Factor,
    shape: torch.Size | None,
) -> None:
    ((role, target),) = omega.items()
    with flattened(target) as entries:
        against = entries.view(target.shape if shape is None else shape)
        broadcast.accumulate({role: against}, delta, _wide(saved), square, factor)


def _gradients(
    role: str,
    target: Tensor,
    delta: Delta,
    saved: tuple[Any, ...],
    factor: Factor,
    shape: torch.Size | None,
) -> Tensor:
    delta = delta._replace(value=delta.value.to(torch.promote_types(delta.value.dtype, torch.float32)))
    against = target.new_empty(target.shape if shape is None else shape)
    return broadcast.gradients(role, against, delta, _wide(saved), factor).reshape(-1, *target.shape)


def _wide(saved: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Form factors in no less than float32: differences and products of bfloat16 have more digits."""
    return tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in saved)


def _bind(
    name: str,
    roles: Mapping[str, Any],
    saved: tuple[Tensor, ...],
    factor: Factor,
    shape: torch.Size | None = None,
) -> Binding:
    """Bind a call; `shape` is what the parameter is viewed as to broadcast against the output, if not its own."""
    return Binding(
        rule=name,
        roles={role: t for role, t in roles.items() if isinstance(t, Tensor)},
        saved=saved,
        accumulate=partial(_accumulate, factor=factor, shape=shape),
        gradients=partial(_gradients, factor=factor, shape=shape),
        axes=lambda output, target: broadcast.repeated_axes(target if shape is None else shape, output),
        single=True,
    )


@rule(F.prelu, torch.prelu, torch.Tensor.prelu)
def prelu(input: Tensor, weight: Tensor) -> Binding:
    """F.prelu: max(0, x) + w min(0, x), with one w, or one for each channel of axis 1."""
    shape = torch.Size([weight.numel(), *[1] * (input.dim() - 2)] if weight.numel() > 1 else [])
    return _bind("prelu", {"weight": weight}, (input,), lambda role, x: x.clamp(max=0), shape)


def _bind_where(condition: Tensor, input: Any, other: Any) -> Binding:
    def factor(role: str, taken: Tensor) -> Tensor:
        return taken if role == "input" else 1 - taken

    return _bind("where", {"input": input, "other": other}, (condition,), factor)


@rule(torch.where)
def where(condition: Tensor, input: Any, other: Any) -> Binding | None:
    """torch.where(condition, w, x), w on either side: δ where it was taken."""
    return _bind_where(condition, input, other)


@rule(torch.Tensor.where)
def tensor_where(self: Tensor, condition: Tensor, other: Any) -> Binding:
    """w.where(condition, x)."""
    return _bind_where(condition, self, other)


@rule(torch.lerp, torch.Tensor.lerp)
def lerp(input: Tensor, end: Tensor, weight: Any) -> Binding:
    """torch.lerp: x + w (e − x), where any of the three may be the parameter."""
    tensors = (input, end, weight) if isinstance(weight, Tensor) else (input, end)

    def factor(role: str, start: Tensor, end: Tensor, share: Any = weight) -> Tensor:
        if role == "weight":
            return end - start
        return torch.as_tensor(share if role == "end" else 1 - share, dtype=start.dtype, device=start.device)

    return _bind("lerp", {"input": input, "end": end, "weight": weight}, tensors, factor)


@rule(torch.addcmul, torch.Tensor.addcmul)
def addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Binding:
    """torch.addcmul: x + value·a·b, where any of the three may be the parameter."""

    def factor(role: str, left: Tensor, right: Tensor) -> Tensor:
        if role == "input":
            return torch.ones((), dtype=left.dtype, device=left.device)
        return value * (right if role == "tensor1" else left)

    return _bind("addcmul", {"input": input, "tensor1": tensor1, "tensor2": tensor2}, (tensor1, tensor2), factor)
