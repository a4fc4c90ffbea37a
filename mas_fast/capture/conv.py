"""Rules for convolutions over one, two and three axes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mas_fast.capture.binding import Binding, Delta, rule
from mas_fast.kernels import ops
from mas_fast.reference import magnitude


def accumulate(
    omega: Mapping[str, Tensor],
    delta: Delta,
    saved: tuple[Any, ...],
    square: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> None:
    """Add Σ_n |∂⟨δ_n, conv(x_n, W)⟩/∂W| to Ω of the weight, and Σ_n |Σ δ| to that of the bias."""
    axes = len(stride)

    def images(t: Tensor) -> Tensor:
        """Bring a tensor to [N, m, channels, *positions], with m images of one sample."""
        split = delta.split(t)
        return split.unsqueeze(1) if split.dim() == axes + 2 else split

    grad_output = images(delta.value)
    if "weight" in omega:
        weight, x = omega["weight"], images(saved[0])
        if grad_output.shape[1] == 1:
            grad_output_, x = grad_output.squeeze(1), x.squeeze(1)
            ops.accumulate_conv_(weight, grad_output_, x, stride, padding, dilation, groups, square)
        elif axes < 3:
            # The images of one sample become one more axis of length m, over which the kernel has length 1.
            ops.accumulate_conv_(
                weight.unsqueeze(2),
                grad_output.transpose(1, 2),
                x.transpose(1, 2),
                [1, *stride],
                [0, *padding],
                [1, *dilation],
                groups,
                square,
            )
        else:
            # There is no fourth axis: the ordinary weight gradient, one sample at a time.
            for sample in range(delta.samples):
                one = delta.widened(slice(sample, sample + 1))
                gradient = gradients("weight", weight, one, saved, stride, padding, dilation, groups)[0]
                weight += magnitude(gradient.to(weight.dtype), square)
    if "bias" in omega:
        ops.accumulate_affine_(None, omega["bias"], grad_output.flatten(3), square=square)


def gradients(
    role: str,
    target: Tensor,
    delta: Delta,
    saved: tuple[Any, ...],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Return the gradient of the weight or the bias for every sample of δ's part, [n, *shape]."""
    axes = len(stride)

    def images(t: Tensor) -> Tensor:
        split = delta.split(t)
        return split.unsqueeze(1) if split.dim() == axes + 2 else split

    grad_output = images(delta.value)
    if role == "bias":
        return grad_output.sum([1, *range(3, grad_output.dim())])
    options = (None, stride, padding, dilation, False, [0] * axes, groups, [False, True, False])
    pairs = zip(grad_output, images(saved[0]).to(grad_output.dtype), strict=True)
    like = target.detach().to(grad_output.dtype)
    return torch.stack([torch.ops.aten.convolution_backward(d, x, like, *options)[1] for d, x in pairs])


def sizes(value: int | Sequence[int], axes: int) -> list[int]:
    """Return one number per axis."""
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
    stride, dilation = sizes(stride, axes), sizes(dilation, axes)
    x = input
    if padding == "same":
        totals = [d * (kernel - 1) for d, kernel in zip(dilation, weight.shape[2:], strict=True)]
        sides = [total // 2 for total in totals]
        if any(total % 2 for total in totals):
            # An odd total pads one zero more at the end, which no symmetric padding says.
            x = F.pad(input.detach(), [side for t in reversed(totals) for side in (t // 2, t - t // 2)])
            sides = [0] * axes
    else:
        sides = [0] * axes if isinstance(padding, str) else sizes(padding, axes)
    leading = 1 if input.dim() == axes + 2 else 0  # without a batch axis there is one sample
    return Binding(
        rule=f"conv{axes}d",
        roles={"weight": weight, "bias": bias},
        saved=(x,),
        accumulate=partial(accumulate, stride=stride, padding=sides, dilation=dilation, groups=groups),
        gradients=partial(gradients, stride=stride, padding=sides, dilation=dilation, groups=groups),
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
