"""Rules for convolutions over one, two and three axes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mas_fast.capture.binding import Binding, Delta, rule
from mas_fast.kernels import ops


def _accumulate(
    omega: Mapping[str, Tensor],
    delta: Delta,
    saved: tuple[Any, ...],
    square: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> None:
    axes = len(stride)
    grad_output = delta.split(delta.value)  # [N, O, *out], or [N, m, O, *out] with m images of one sample
    if "weight" in omega:
        weight, x = omega["weight"], delta.split(saved[0])
        if grad_output.dim() == axes + 3:
            # The images of one sample become one more axis of length m, over which the kernel has length 1.
            weight, x, images = weight.unsqueeze(2), x.transpose(1, 2), grad_output.transpose(1, 2)
            stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
            ops.accumulate_conv_(weight, images, x, stride, padding, dilation, groups, square)
        else:
            ops.accumulate_conv_(weight, grad_output, x, stride, padding, dilation, groups, square)
    if "bias" in omega:
        rows = grad_output.flatten(-axes)  # [N, O, S] or [N, m, O, S]
        ops.accumulate_affine_(None, omega["bias"], rows if rows.dim() == 4 else rows.unsqueeze(1), square=square)


def _sizes(value: int | Sequence[int], axes: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


def _bind(
    axes: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Binding | None:
    stride, dilation = _sizes(stride, axes), _sizes(dilation, axes)
    if padding == "valid":
        padding = 0
    x = input
    if padding == "same":
        totals = [d * (kernel - 1) for d, kernel in zip(dilation, weight.shape[2:], strict=True)]
        if any(total % 2 for total in totals):
            # An odd total pads one zero more at the end, which no symmetric padding says.
            x = F.pad(input.detach(), [side for t in reversed(totals) for side in (t // 2, t - t // 2)])
            padding = 0
        else:
            padding = [total // 2 for total in totals]
    batched = input.dim() == axes + 2
    # Several images of one sample take one more axis, and the op has no fourth. Without a batch there is one sample.
    leading = 1 if batched else 0
    return Binding(
        rule=f"conv{axes}d",
        roles={"weight": weight, "bias": bias},
        saved=(x,),
        accumulate=partial(
            _accumulate, stride=stride, padding=_sizes(padding, axes), dilation=dilation, groups=groups
        ),
        axes=lambda *_: range(leading),
    )


def _rule_for(axes: int) -> Callable[..., Binding | None]:
    def conv(*args: Any, **kwargs: Any) -> Binding | None:
        return _bind(axes, *args, **kwargs)

    conv.__doc__ = f"F.conv{axes}d."
    return conv


conv1d = rule(F.conv1d)(_rule_for(1))
conv2d = rule(F.conv2d)(_rule_for(2))
conv3d = rule(F.conv3d)(_rule_for(3))
