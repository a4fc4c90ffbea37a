"""Ω of a convolution: the product of `linear.py` over output positions, with x read through the windows in place.

No window is ever copied: a tile of Ω stands for outputs × (taps, channels), and the address of what a tap sees at a
position follows from both. Depthwise convolutions have no matrix product in them; they are a sum for each tap.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mas_fast.kernels.gpu.common import INTERPRET, add_magnitude, product, splits_of
from mas_fast.kernels.gpu.linear import Tile, precision_of

# What changes from layer to layer and saves nothing by being known: every value would be another compilation.
VARIABLE = (
    *("samples", "per_split", "out_split", "depth", "height", "width", "positions", "out_h", "out_w"),
    *("pad_d", "pad_h", "pad_w", "dilation_d", "dilation_h", "dilation_w"),
)


def tile_for(outputs: int, columns: int, positions: int, dtype: torch.dtype) -> Tile:
    """Return the tile for a group of a shape."""
    if INTERPRET:
        return Tile(16, 32, 32, 4, 1)
    # Each entry of x has an address and a mask of its own: they, not the products, are what registers are needed for.
    step = max(16, min(16 if dtype == torch.float32 else 32, triton.next_power_of_2(positions)))
    wide = dtype != torch.float32 and columns > 64
    return Tile(64, 128 if wide else 64, step, 8 if wide or dtype == torch.float32 else 4, 3)


@triton.jit
def _corners(q, out_h, out_w, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w):
    """Return where the windows of output positions begin, by axis."""
    d = (q // (out_w * out_h)) * stride_d - pad_d
    h = (q // out_w % out_h) * stride_h - pad_h
    w = (q % out_w) * stride_w - pad_w
    return d, h, w


@triton.jit
def _steps(tap, kernel_h, kernel_w, dilation_d, dilation_h, dilation_w):
    """Return how far into their windows taps look, by axis."""
    d = (tap // (kernel_w * kernel_h)) * dilation_d
    h = (tap // kernel_w % kernel_h) * dilation_h
    w = (tap % kernel_w) * dilation_w
    return d, h, w


@triton.jit
def _within(corner, step, size):
    """Return whether corner + step lies in [0, size), by one comparison: negative numbers become very large."""
    return (corner + step).to(tl.uint32) < size.to(tl.uint32)


@triton.jit(do_not_specialize=VARIABLE)
def conv_kernel(
    delta,
    x,
    out,
    samples,
    per_split,
    out_split,
    outputs,  # of a group
    channels,  # of a group
    taps,
    depth,
    height,
    width,
    positions,
    out_h,
    out_w,
    kernel_h,
    kernel_w,
    stride_d,
    stride_h,
    stride_w,
    pad_d,
    pad_h,
    pad_w,
    dilation_d,
    dilation_h,
    dilation_w,
    delta_n,
    delta_o,
    delta_d,
    delta_h,
    delta_w,
    x_n,
    x_c,
    x_d,
    x_h,
    x_w,
    SQUARE: tl.constexpr,
    ADD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VOLUME: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    INDEX: tl.constexpr,
    BO: tl.constexpr,
    BJ: tl.constexpr,
    BT: tl.constexpr,
):
    """Write the sum over a split's samples for one group to out[split], or add it there with ADD."""
    columns = channels * taps
    column_tiles = tl.cdiv(columns, BJ)
    tile, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o = (tile // column_tiles) * BO + tl.arange(0, BO)
    j = (tile % column_tiles) * BJ + tl.arange(0, BJ)
    # Neighbours in memory are neighbours in the tile.
    if CHANNELS_LAST:
        c, tap = j % channels, j // channels
    else:
        c, tap = j // taps, j % taps
    first = split * per_split
    steps = tl.cdiv(positions, BT)
    delta_columns = delta + (group * outputs + o).to(INDEX)[None, :] * delta_o
    # The address of an entry is that of its window's corner, and from there a step that depends on the column alone.
    tap_d, tap_h, tap_w = _steps(tap, kernel_h, kernel_w, dilation_d, dilation_h, dilation_w)
    x_columns = (group * channels + c).to(INDEX) * x_c
    x_columns += tap_h.to(INDEX) * x_h + tap_w.to(INDEX) * x_w
    if VOLUME:
        x_columns += tap_d.to(INDEX) * x_d
    total = tl.zeros((BO, BJ), tl.float32)
    acc = tl.zeros((BO, BJ), tl.float32)
    for it in range(0, max(0, min(per_split, samples - first)) * steps):
        n = it // steps
        step = it - n * steps
        start = (first + n).to(tl.int64)
        q = step * BT + tl.arange(0, BT)
        rows = (
            (q // (out_w * out_h)).to(INDEX) * delta_d
            + (q // out_w % out_h).to(INDEX) * delta_h
            + (q % out_w).to(INDEX) * delta_w
        )
        a = tl.load(
            delta_columns + start * delta_n + rows[:, None],
            mask=(q < positions)[:, None] & (o < outputs)[None, :],
            other=0.0,
        )
        d, h, w = _corners(q, out_h, out_w, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w)
        inside = (q < positions)[:, None] & (j < columns)[None, :]
        inside &= _within(h[:, None], tap_h[None, :], height) & _within(w[:, None], tap_w[None, :], width)
        seen = h.to(INDEX) * x_h + w.to(INDEX) * x_w
        if VOLUME:
            inside &= _within(d[:, None], tap_d[None, :], depth)
            seen += d.to(INDEX) * x_d
        b = tl.load(x + start * x_n + (seen[:, None] + x_columns[None, :]), mask=inside, other=0.0)
        acc = product(tl.trans(a), b, acc, PRECISION, INTERPRET)
        if step == steps - 1:
            total = add_magnitude(total, acc, SQUARE, INTERPRET)
            acc = tl.zeros((BO, BJ), tl.float32)

    row = (group * outputs + o).to(tl.int64)
    target = out + split.to(tl.int64) * out_split + row[:, None] * columns + (c * taps + tap)[None, :]
    inside = (o < outputs)[:, None] & (j < columns)[None, :]
    if ADD:
        total += tl.load(target, mask=inside, other=0.0)
    tl.store(target, total, mask=inside)


@triton.jit(do_not_specialize=VARIABLE)
def depthwise_kernel(
    delta,
    x,
    out,
    samples,
    per_split,
    out_split,
    outputs,  # of all groups
    multiplier,
    taps,
    depth,
    height,
    width,
    positions,
    out_h,
    out_w,
    kernel_h,
    kernel_w,
    stride_d,
    stride_h,
    stride_w,
    pad_d,
    pad_h,
    pad_w,
    dilation_d,
    dilation_h,
    dilation_w,
    delta_n,
    delta_o,
    delta_d,
    delta_h,
    delta_w,
    x_n,
    x_c,
    x_d,
    x_h,
    x_w,
    SQUARE: tl.constexpr,
    ADD: tl.constexpr,
    INTERPRET: tl.constexpr,
    INDEX: tl.constexpr,
    BO: tl.constexpr,
    BT: tl.constexpr,
):
    """Write the sum over a split's samples for one tap to out[split], or add it there with ADD."""
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    tap, split = tl.program_id(1), tl.program_id(2)
    first = split * per_split
    tap_d, tap_h, tap_w = _steps(tap, kernel_h, kernel_w, dilation_d, dilation_h, dilation_w)
    delta_columns = delta + o.to(INDEX)[None, :] * delta_o
    x_columns = x + (o // multiplier).to(INDEX)[None, :] * x_c
    total = tl.zeros((BO,), tl.float32)
    for n in range(0, max(0, min(per_split, samples - first))):
        start = (first + n).to(tl.int64)
        acc = tl.zeros((BO,), tl.float32)
        for begin in range(0, positions, BT):
            q = begin + tl.arange(0, BT)
            d, h, w = _corners(q, out_h, out_w, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w)
            inside = (q < positions) & _within(d, tap_d, depth) & _within(h, tap_h, height) & _within(w, tap_w, width)
            rows = (
                (q // (out_w * out_h)).to(INDEX) * delta_d
                + (q // out_w % out_h).to(INDEX) * delta_h
                + (q % out_w).to(INDEX) * delta_w
            )
            seen = (d + tap_d).to(INDEX) * x_d + (h + tap_h).to(INDEX) * x_h + (w + tap_w).to(INDEX) * x_w
            mask = inside[:, None] & (o < outputs)[None, :]
            a = tl.load(delta_columns + start * delta_n + rows[:, None], mask=mask, other=0.0).to(tl.float32)
            b = tl.load(x_columns + start * x_n + seen[:, None], mask=mask, other=0.0).to(tl.float32)
            acc += tl.sum(a * b, 0)
        total = add_magnitude(total, acc, SQUARE, INTERPRET)
    target = out + split.to(tl.int64) * out_split + o.to(tl.int64) * taps + tap
    if ADD:
        total += tl.load(target, mask=o < outputs, other=0.0)
    tl.store(target, total, mask=o < outputs)


def accumulate_conv_(
    omega: Tensor,
    grad_output: Tensor,
    input: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    square: bool = False,
) -> None:
    """See `reference.accumulate_conv_`; Ω is float32 and contiguous."""
    if 0 in (*grad_output.shape, *input.shape, *omega.shape):
        return
    # One or two axes are three of which the first are 1 long.
    missing = 5 - omega.dim()
    delta, x = (t.reshape(*t.shape[:2], *[1] * missing, *t.shape[2:]) for t in (grad_output, input))
    kernel = [*[1] * missing, *omega.shape[2:]]
    geometry = [*[1] * missing, *stride, *[0] * missing, *padding, *[1] * missing, *dilation]
    samples, outputs, *out = delta.shape
    channels, taps, positions = omega.shape[1], math.prod(kernel), math.prod(out)
    # The furthest entry of a sample from its first one.
    reach = max(
        sum((size - 1) * abs(step) for size, step in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in (delta, x)
    )
    options: dict[str, Any] = {
        "SQUARE": square,
        "INTERPRET": INTERPRET,
        "INDEX": tl.int64 if reach >= 2**31 else tl.int32,
    }
    sizes = (taps, *x.shape[2:], positions, *out[1:], *kernel[1:], *geometry, *delta.stride(), *x.stride())
    if channels == 1:
        # Of many positions few at a time for many channels: those are neighbours in channels_last.
        last = x.stride(1) == 1 and outputs > 1
        block_o, block_t = (64, 16) if last else (4, 256)
        if INTERPRET:
            block_o, block_t = 32, 64
        grid = triton.cdiv(outputs, block_o), taps
        splits = splits_of(math.prod(grid), samples, 4 * omega.numel(), omega.device)
        out_sum = omega if splits == 1 else omega.new_empty(splits, *omega.shape)
        options |= {"ADD": splits == 1, "BO": block_o, "BT": block_t, "num_warps": 4}
        head = (samples, triton.cdiv(samples, splits), omega.numel(), outputs, outputs // groups)
        depthwise_kernel[(*grid, splits)](delta, x, out_sum, *head, *sizes, **options)
    else:
        tile = tile_for(outputs // groups, channels * taps, positions, delta.dtype)
        tiles = triton.cdiv(outputs // groups, tile.outputs) * triton.cdiv(channels * taps, tile.inputs)
        splits = splits_of(tiles * groups, samples, 4 * omega.numel(), omega.device)
        out_sum = omega if splits == 1 else omega.new_empty(splits, *omega.shape)
        options |= {
            "ADD": splits == 1,
            "CHANNELS_LAST": x.stride(1) == 1,
            "VOLUME": missing == 0,
            "PRECISION": precision_of(delta.dtype),
            "BO": tile.outputs,
            "BJ": tile.inputs,
            "BT": tile.positions,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }
        head = (samples, triton.cdiv(samples, splits), omega.numel(), outputs // groups, channels)
        conv_kernel[(tiles, groups, splits)](delta, x, out_sum, *head, *sizes, **options)
    if splits > 1:
        omega += out_sum.sum(0)
