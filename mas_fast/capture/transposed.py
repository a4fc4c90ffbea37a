"""Rules for transposed convolutions over one, two and three axes.

    ⟨δ, conv_transpose(x, W)⟩ = ⟨conv(δ, W), x⟩

So the weight's gradient is that of the convolution that takes δ for its input and x for the gradient of its output.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mas_fast.capture import conv
from mas_fast.capture.binding import Binding, Delta, rule


def _exchanged(delta: Delta, saved: tuple[Any, ...], overhang: list[int]) -> tuple[Delta, tuple[Tensor, ...]]:
    """Return x in the place of δ, and δ in the place of x.

    An output_padding of a stride or more gives the convolution positions that x has not: x is zero there.
    """
    x = saved[0]
    if any(overhang):
        x = F.pad(x, [side for more in reversed(overhang) for side in (0, more)])
    dtype = torch.promote_types(x.dtype, delta.value.dtype)
    if len(overhang) == 3:
        # Several volumes of one sample are summed by torch, in the dtype that it is given.
        dtype = torch.promote_types(dtype, torch.float32)
    return delta._replace(value=x.to(dtype)), (delta.value.to(dtype),)


def _accumulate(
    omega: Mapping[str, Tensor],
    delta: Delta,
    saved: tuple[Any, ...],
    square: bool,
    overhang: list[int],
    geometry: Mapping[str, Any],
) -> None:
    if "weight" in omega:
        exchanged, kept = _exchanged(delta, saved, overhang)
        conv.accumulate({"weight": omega["weight"]}, exchanged, kept, square, **geometry)
    if "bias" in omega:
        conv.accumulate({"bias": omega["bias"]}, delta, (), square, **geometry)


def _gradients(
    role: str,
    target: Tensor,
    delta: Delta,
    saved: tuple[Any, ...],
    overhang: list[int],
    geometry: Mapping[str, Any],
) -> Tensor:
    delta = delta._replace(value=delta.value.to(torch.promote_types(delta.value.dtype, torch.float32)))
    if role == "weight":
        delta, saved = _exchanged(delta, saved, overhang)
    return conv.gradients(role, target, delta, saved, **geometry)


def _bind(
    axes: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Binding | None:
    stride, output_padding = conv.sizes(stride, axes), conv.sizes(output_padding, axes)
    overhang = [p // s for p, s in zip(output_padding, stride, strict=True)]
    geometry = {
        "stride": stride,
        "padding": conv.sizes(padding, axes),
        "dilation": conv.sizes(dilation, axes),
        "groups": groups,
    }
    leading = 1 if input.dim() == axes + 2 else 0  # without a batch axis there is one sample
    return Binding(
        rule=f"conv_transpose{axes}d",
        roles={"weight": weight, "bias": bias},
        saved=(input,),
        accumulate=partial(_accumulate, overhang=overhang, geometry=geometry),
        gradients=partial(_gradients, overhang=overhang, geometry=geometry),
        axes=lambda *_: range(leading),
    )


def _rule_for(axes: int) -> Callable[..., Binding | None]:
    def conv_transpose(*args: Any, **kwargs: Any) -> Binding | None:
        return _bind(axes, *args, **kwargs)

    conv_transpose.__doc__ = f"F.conv_transpose{axes}d."
    return conv_transpose


conv_transpose1d = rule(F.conv_transpose1d)(_rule_for(1))
conv_transpose2d = rule(F.conv_transpose2d)(_rule_for(2))
conv_transpose3d = rule(F.conv_transpose3d)(_rule_for(3))
