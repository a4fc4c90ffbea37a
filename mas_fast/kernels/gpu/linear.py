"""Ω[o, i] += Σ_n |Σ_t δ[n, t, o] x[n, t, i]|: one matrix product per sample that stays in registers.

A tile of Ω walks through all samples: the product over a sample's positions is formed on tensor cores, its magnitude is
added to the tile, and only the tile is ever written. FLOPs 2 N T O I (T rounded up to a multiple of 16) and an addition
for each of N O I; bytes N T (O + I) elements and 8 O I, times the tiles that share them, which L2 takes up.
"""

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mas_fast.kernels.gpu import tuning
from mas_fast.kernels.gpu.common import INTERPRET, add_magnitude, product, shared_memory, splits_of

# Samples of one position each that are summed as positions of one.
POOL = 64 if INTERPRET else 512


class Tile(NamedTuple):
    """A configuration: the tile of Ω, positions in a step, warps, and steps whose loads are under way."""

    outputs: int
    inputs: int
    positions: int
    warps: int
    stages: int


# Two accumulators of 64 + 64 registers a thread are what fits without spilling.
NARROW = Tile(64, 128, 64, 4, 4)
WIDE = Tile(128, 128, 64, 8, 4)


# What else could be faster, by 64 positions: more columns for each row of δ, and fewer steps under way with more tiles.
OTHERS = (Tile(64, 256, 64, 8, 4), Tile(64, 128, 64, 4, 3), Tile(128, 128, 32, 8, 4))


def fitted(tile: Tile, element_bytes: int, available: int) -> Tile:
    """Return the tile with as many steps under way as shared memory has room for."""
    step_bytes = (tile.outputs + tile.inputs) * tile.positions * element_bytes
    return tile._replace(stages=max(1, min(tile.stages, available // step_bytes)))


def candidates_for(outputs: int, inputs: int, positions: int, dtype: torch.dtype) -> list[Tile]:
    """Return the tiles that autotuning compares, the one that is chosen without it first."""
    chosen = tile_for(outputs, inputs, positions, dtype)
    if dtype == torch.float32:
        return [chosen, chosen._replace(stages=2), Tile(32, 64, chosen.positions, 4, 3)]
    others = (tile._replace(positions=min(tile.positions, chosen.positions)) for tile in (NARROW, WIDE, *OTHERS))
    return list(dict.fromkeys((chosen, *others)))


def tile_for(outputs: int, inputs: int, positions: int, dtype: torch.dtype) -> Tile:
    """Return the tile for a shape."""
    if INTERPRET:
        return Tile(16, 32, 16, 4, 1)
    # With short samples most of the time goes into adding magnitudes: two programs on a multiprocessor take turns.
    tile = WIDE if positions > 256 and min(outputs, inputs) > 64 else NARROW
    step = max(16, min(64, triton.next_power_of_2(positions)))
    if dtype == torch.float32:
        # As many bytes. Three products of TF32 need registers of their own.
        tile, step = Tile(64, 64, 64, 4, 3), min(step, 32)
    return tile._replace(positions=step)


@triton.jit(do_not_specialize=["samples", "positions", "per_split"])
def linear_kernel(
    delta,
    x,
    out,
    samples,
    positions,
    outputs,
    inputs,
    delta_n,
    delta_t,
    x_n,
    x_t,
    out_split,
    per_split,
    SQUARE: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write the sum over a split's samples to out[split], or add it there with ADD."""
    # Tiles in groups of GROUP rows, so that those that run together share their columns of x in L2.
    row_tiles, column_tiles = tl.cdiv(outputs, BO), tl.cdiv(inputs, BI)
    tile = tl.program_id(0)
    group = tile // (GROUP * column_tiles)
    rest = tile - group * GROUP * column_tiles
    height = min(row_tiles - group * GROUP, GROUP)
    o = (group * GROUP + rest % height) * BO + tl.arange(0, BO)
    i = (rest // height) * BI + tl.arange(0, BI)
    t = tl.arange(0, BT)

    split = tl.program_id(1)
    first = split * per_split
    delta_tile = delta + t[:, None].to(tl.int64) * delta_t + o[None, :]
    x_tile = x + t[:, None].to(tl.int64) * x_t + i[None, :]
    steps = tl.cdiv(positions, BT)
    total = tl.zeros((BO, BI), tl.float32)
    acc = tl.zeros((BO, BI), tl.float32)
    for it in range(0, max(0, min(per_split, samples - first)) * steps):
        # From the loop's own index: with what is counted inside of the branch below, no load would be issued early.
        n = it // steps
        step = it - n * steps
        here = (t + step * BT < positions)[:, None]
        start = (first + n).to(tl.int64)
        a = tl.load(
            delta_tile + (start * delta_n + step.to(tl.int64) * BT * delta_t),
            mask=here & (o < outputs)[None, :],
            other=0.0,
        )
        b = tl.load(x_tile + (start * x_n + step.to(tl.int64) * BT * x_t), mask=here & (i < inputs)[None, :], other=0.0)
        acc = product(tl.trans(a), b, acc, PRECISION, INTERPRET)
        if step == steps - 1:
            total = add_magnitude(total, acc, SQUARE, INTERPRET)
            acc = tl.zeros((BO, BI), tl.float32)

    target = out + split.to(tl.int64) * out_split + o[:, None].to(tl.int64) * inputs + i[None, :]
    inside = (o < outputs)[:, None] & (i < inputs)[None, :]
    if ADD:
        total += tl.load(target, mask=inside, other=0.0)
    tl.store(target, total, mask=inside)


def precision_of(dtype: torch.dtype) -> str:
    """Return how tensor cores multiply: float32 in full unless torch's own switch allows TF32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def arguments_of(omega: Tensor, delta: Tensor, x: Tensor, square: bool, tile: Tile) -> tuple[Any, ...]:
    """Return tiles, splits and the options of a launch."""
    samples, _, outputs = delta.shape
    inputs = x.shape[2]
    tile = fitted(tile, delta.element_size(), shared_memory(omega.device))
    tiles = triton.cdiv(outputs, tile.outputs) * triton.cdiv(inputs, tile.inputs)
    splits = splits_of(tiles, samples, 4 * outputs * inputs, omega.device)
    options = {
        "SQUARE": square,
        "ADD": splits == 1,
        "PRECISION": precision_of(delta.dtype),
        "INTERPRET": INTERPRET,
        "BO": tile.outputs,
        "BI": tile.inputs,
        "BT": tile.positions,
        "GROUP": 8,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    return tiles, splits, options


def accumulate_linear_(omega: Tensor, grad_output: Tensor, input: Tensor, square: bool = False) -> None:
    """See `reference.accumulate_linear_`; Ω is float32 and contiguous."""
    delta, x = grad_output, input
    if 0 in (*delta.shape, *x.shape):
        return
    if delta.shape[1] == 1:
        # |δ xᵀ| = |δ| |x|ᵀ: all samples are positions of one, whose sum has no sign to lose.
        delta, x = ((t.float().square() if square else t.abs()).squeeze(1) for t in (delta, x))
        square = False
        # Parts of as many as make a program worth its start, so that few tiles do not mean few programs.
        whole = len(delta) // POOL * POOL
        if 0 < whole < len(delta):
            _accumulate(omega, delta[whole:].unsqueeze(0), x[whole:].unsqueeze(0), square)
            delta, x = delta[:whole], x[:whole]
        delta, x = (t.unflatten(0, (-1, min(POOL, len(t)))) for t in (delta, x))
    _accumulate(omega, delta, x, square)


def _accumulate(omega: Tensor, delta: Tensor, x: Tensor, square: bool) -> None:
    if os.environ.get("MAS_FAST_HOPPER") == "1" and not INTERPRET:
        from mas_fast.kernels.gpu import hopper  # Gluon is experimental: who does not ask for it does not need it

        if hopper.suits(delta, x):
            hopper.accumulate(omega, delta, x, square)
            return
    outputs, inputs = omega.shape
    positions, dtype = delta.shape[1], delta.dtype
    tile = tile_for(outputs, inputs, positions, dtype)
    if tuning.is_wanted() and not INTERPRET:
        name = str(dtype).removeprefix("torch.")
        tile = tuning.fastest(
            f"linear {name} {precision_of(dtype)} {tuning.bucket(outputs, inputs, positions, len(delta))}",
            candidates_for(outputs, inputs, positions, dtype),
            lambda candidate: _launch(torch.empty_like(omega), delta, x, square, candidate),
            tuning.cache_file(omega.device),
        )
    _launch(omega, delta, x, square, tile)


def _launch(omega: Tensor, delta: Tensor, x: Tensor, square: bool, tile: Tile) -> None:
    # Rows in one piece: loads in any other order take so many registers that some are spilled.
    delta, x = (t if t.stride(2) == 1 else t.contiguous() for t in (delta, x))
    samples, positions, outputs = delta.shape
    inputs = x.shape[2]
    tiles, splits, options = arguments_of(omega, delta, x, square, tile)
    out = omega if splits == 1 else omega.new_empty(splits, outputs, inputs)
    linear_kernel[(tiles, splits)](
        delta,
        x,
        out,
        samples,
        positions,
        outputs,
        inputs,
        *delta.stride()[:2],
        *x.stride()[:2],
        outputs * inputs,
        triton.cdiv(samples, splits),
        **options,
    )
    if splits > 1:
        omega += out.sum(0)
