"""Rules for normalisation layers, y = w x̂ + b: layer, group, instance and RMS norm, and batch norm in eval mode."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mas_fast.capture.binding import Binding, Delta, flattened, rule
from mas_fast.kernels import ops

# x [N, ...] -> mean and 1/σ, both broadcasting to the [N, R, K, S] form of x
Statistics = Callable[[Tensor], tuple[Tensor | None, Tensor]]


def _accumulate(
    omega: Mapping[str, Tensor],
    delta: Delta,
    saved: tuple[Any, ...],
    square: bool,
    rows: Callable[[Tensor], Tensor],
    statistics: Statistics,
    computed: bool = False,  # the statistics are, by the forward, and kept
) -> None:
    grad_output = rows(delta.split(delta.value))  # [N, R, K, S]
    with ExitStack() as stack:
        weight, bias = (
            stack.enter_context(flattened(omega[role])) if role in omega else None for role in ("weight", "bias")
        )
        if weight is None:
            ops.accumulate_affine_(None, bias, grad_output, square=square)
            return
        x, *kept = [rows(delta.split(t)) for t in (saved if computed else saved[:1])]
        mean, rstd = kept or statistics(x.float() if x.dtype in (torch.bfloat16, torch.float16) else x)
        ops.accumulate_affine_(weight, bias, grad_output, x, mean, rstd, square)


def _gradients(
    role: str,
    target: Tensor,
    delta: Delta,
    saved: tuple[Any, ...],
    rows: Callable[[Tensor], Tensor],
    statistics: Statistics,
) -> Tensor:
    grad_output = rows(delta.split(delta.value))  # [n, R, K, S]
    if role == "weight":
        x = rows(delta.split(saved[0])).to(grad_output.dtype)
        mean, rstd = statistics(x)
        grad_output = grad_output * (x if mean is None else x - mean) * rstd
    return grad_output.sum((1, 3)).view(-1, *target.shape)


def _mean_rstd(x: Tensor, axes: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and 1/σ over the last axes, kept with length 1. torch's norm is faster at it than its var_mean."""
    _, mean, rstd = torch.native_layer_norm(x, x.shape[x.dim() - axes :], None, None, eps)
    return mean, rstd


def _last(count: int) -> Callable[[Tensor], Tensor]:
    """Bring [N, ..., *last] to [N, R, K, 1]: the parameter spans the last `count` axes."""

    def rows(t: Tensor) -> Tensor:
        t = t.flatten(t.dim() - count)
        return (t.unsqueeze(1) if t.dim() == 2 else t.flatten(1, -2)).unsqueeze(3)

    return rows


def _channels(spatial: int) -> Callable[[Tensor], Tensor]:
    """Bring [N, K, *spatial] or [N, m, K, *spatial] to [N, m, K, S]: the parameter has one entry per channel."""

    def rows(t: Tensor) -> Tensor:
        t = t.flatten(t.dim() - spatial) if spatial else t.unsqueeze(-1)
        return t.unsqueeze(1) if t.dim() == 3 else t

    return rows


@rule(F.layer_norm, torch.layer_norm)
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: bool,
) -> Binding:
    """F.layer_norm: statistics of each row of [..., *normalized_shape]."""

    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        return _mean_rstd(x, 2, eps)  # x [N, R, K, 1]

    count = len(normalized_shape)
    given = [t for t in (input, weight, bias) if t is not None]
    # Not of numbers that are narrow, or that autocast may make so: those statistics could be as narrow.
    computed = (
        input.dtype in (torch.float32, torch.float64)
        and all(type(t) in (Tensor, nn.Parameter) and t.dtype == input.dtype for t in given)
        and not torch.is_autocast_enabled(input.device.type)
    )
    return Binding(
        rule="layer_norm",
        roles={"weight": weight, "bias": bias},
        saved=(input,),
        accumulate=partial(_accumulate, rows=_last(count), statistics=statistics, computed=computed),
        gradients=partial(_gradients, rows=_last(count), statistics=statistics),
        axes=lambda output, _: range(len(output) - count),
        run=_layer_norm_and_statistics if computed else None,
    )


def _layer_norm_and_statistics(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.native_layer_norm(input, normalized_shape, weight, bias, eps)


@rule(F.rms_norm, torch.rms_norm)
def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Binding:
    """F.rms_norm: no mean, no bias; eps defaults to the machine epsilon of the input's dtype."""
    floor = torch.finfo(input.dtype).eps if eps is None else eps

    def statistics(x: Tensor) -> tuple[None, Tensor]:
        return None, (x.square().mean(2, keepdim=True) + floor).rsqrt()

    count = len(normalized_shape)
    return Binding(
        rule="rms_norm",
        roles={"weight": weight},
        saved=(input,),
        accumulate=partial(_accumulate, rows=_last(count), statistics=statistics),
        gradients=partial(_gradients, rows=_last(count), statistics=statistics),
        axes=lambda output, _: range(len(output) - count),
    )


@rule(F.group_norm, torch.group_norm)
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: bool,
) -> Binding:
    """F.group_norm: statistics of each group of channels of each image."""

    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        grouped = x.unflatten(2, (num_groups, -1)).flatten(3)  # [N, m, G, K/G·S]
        repeats = x.shape[2] // num_groups
        mean, rstd = (s.repeat_interleave(repeats, 2) for s in _mean_rstd(grouped, 1, eps))
        return mean, rstd

    return _channel_norm("group_norm", input, weight, bias, statistics)


@rule(F.instance_norm)
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Binding | None:
    """F.instance_norm: statistics of each channel of each image, or the running ones."""
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)

    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        return _mean_rstd(x, 1, eps)  # x [N, m, K, S]

    return _channel_norm("instance_norm", input, weight, bias, statistics)


@rule(F.batch_norm, torch.batch_norm)
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: bool,
) -> Binding | None:
    """F.batch_norm with running statistics; with those of the batch, samples would influence each other: no rule."""
    if training or running_mean is None or running_var is None:
        return None
    mean, variance = running_mean, running_var

    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        return mean.to(x.dtype)[:, None], (variance.to(x.dtype) + eps).rsqrt()[:, None]

    return _channel_norm("batch_norm", input, weight, bias, statistics, (running_mean, running_var))


def _channel_norm(
    name: str,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Statistics,
    guarded: tuple[Tensor, ...] = (),
) -> Binding:
    return Binding(
        rule=name,
        roles={"weight": weight, "bias": bias},
        saved=(input, *guarded),
        accumulate=partial(_accumulate, rows=_channels(max(0, input.dim() - 2)), statistics=statistics),
        gradients=partial(_gradients, rows=_channels(max(0, input.dim() - 2)), statistics=statistics),
        axes=lambda *_: range(1),
    )
