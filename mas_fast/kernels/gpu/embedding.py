"""Ω of an embedding: Σ_n |Σ_{t: ids_nt = v} δ_nt| for every row v, without atomic additions.

Positions are sorted by (id, sample). A first kernel sums the positions of each pair and writes the magnitude; a second
one adds up the pairs of each id. Both add in the sorted order, so the bits are the same on every run. Bytes: δ is read
once, what the pairs sum to is written and read once in float32 (of a slice of the columns at a time, if it is large),
and touched rows of Ω are read and written once; beside it, a sort of the ids.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mas_fast.kernels.gpu.common import INTERPRET, WORKSPACE, add_magnitude

ROWS = 16 if INTERPRET else 32


@triton.jit(do_not_specialize=["positions", "padding_idx"])
def pairs_kernel(
    delta,
    keys,
    order,
    ends,
    ranks,
    sums,
    samples,
    positions,
    columns,
    first_column,
    padding_idx,
    delta_n,
    delta_t,
    delta_d,
    SQUARE: tl.constexpr,
    INTERPRET: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Write |Σ δ| of each pair of an id and a sample to sums[rank of the pair]; one program for each position."""
    place = tl.program_id(0).to(tl.int64)
    key = tl.load(keys + place)
    before = tl.load(keys + place - 1, mask=place > 0, other=-1)
    if (key != before) & (key // samples != padding_idx):
        end = tl.load(ends + place)
        d = tl.program_id(1) * BD + tl.arange(0, BD)
        total = tl.zeros((BD,), tl.float32)
        for start in range(place, end, BR):
            row = start + tl.arange(0, BR)
            at = tl.load(order + row, mask=row < end, other=0)
            offsets = (at // positions) * delta_n + (at % positions) * delta_t
            values = tl.load(
                delta + offsets[:, None] + (first_column + d).to(tl.int64)[None, :] * delta_d,
                mask=(row < end)[:, None] & (d < columns)[None, :],
                other=0.0,
            )
            total += tl.sum(values.to(tl.float32), 0)
        rank = tl.load(ranks + place)
        result = add_magnitude(tl.zeros((BD,), tl.float32), total, SQUARE, INTERPRET)
        tl.store(sums + rank * columns + d, result, mask=d < columns)


@triton.jit(do_not_specialize=["padding_idx"])
def rows_kernel(
    omega,
    keys,
    ends,
    ranks,
    sums,
    samples,
    columns,
    width,
    first_column,
    padding_idx,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Add the sums of each id's pairs to its row of Ω; one program for each position."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(keys + place) // samples
    before = tl.load(keys + place - 1, mask=place > 0, other=-1) // samples
    first = (place == 0) | (row != before)
    if first & (row != padding_idx):
        start = tl.load(ranks + place)
        end = tl.load(ranks + tl.load(ends + place) - 1) + 1
        d = tl.program_id(1) * BD + tl.arange(0, BD)
        target = omega + row * width + first_column + d
        total = tl.load(target, mask=d < columns, other=0.0)
        for begin in range(start, end, BR):
            pair = begin + tl.arange(0, BR)
            values = tl.load(
                sums + pair[:, None] * columns + d[None, :],
                mask=(pair < end)[:, None] & (d < columns)[None, :],
                other=0.0,
            )
            total += tl.sum(values, 0)
        tl.store(target, total, mask=d < columns)


def accumulate_embedding_(
    omega: Tensor, grad_output: Tensor, ids: Tensor, padding_idx: int = -1, square: bool = False
) -> None:
    """See `reference.accumulate_embedding_`; Ω is float32 and contiguous."""
    samples, positions, width = grad_output.shape
    places = samples * positions
    if places == 0 or width == 0:
        return
    sample = torch.arange(samples, device=ids.device)[:, None]
    keys, order = torch.sort((ids.long() * samples + sample).flatten(), stable=True)
    ranks = torch.cat([keys.new_zeros(1), (keys[1:] != keys[:-1]).long().cumsum(0)])
    ends_of_pairs = torch.searchsorted(keys, keys, right=True)
    ends_of_rows = torch.searchsorted(keys, (keys // samples + 1) * samples)
    block = 64 if INTERPRET else min(128, triton.next_power_of_2(width))
    # As many columns at a time as the workspace has room for.
    slice_width = min(width, max(block, WORKSPACE // (4 * places)))
    sums = omega.new_empty(places, slice_width)
    for first in range(0, width, slice_width):
        columns = min(slice_width, width - first)
        grid = places, triton.cdiv(columns, block)
        options = {"BR": ROWS, "BD": block, "num_warps": 4}
        magnitudes = {"SQUARE": square, "INTERPRET": INTERPRET}
        shared = (samples, positions, columns, first, padding_idx)
        pairs_kernel[grid](
            grad_output,
            keys,
            order,
            ends_of_pairs,
            ranks,
            sums,
            *shared,
            *grad_output.stride(),
            **magnitudes,
            **options,
        )
        rows_kernel[grid](
            omega, keys, ends_of_rows, ranks, sums, samples, columns, width, first, padding_idx, **options
        )
