"""Ω of biases, norms and scales: Σ_n |Σ_rs δ x̂| and Σ_n |Σ_rs δ|, with x̂ = (x − mean) rstd.

A program takes some entries and walks through samples, in one pass over δ and x for weight and bias together, and adds
the magnitude of each sample's sum to what it holds. Where samples and entries are too few to keep a GPU busy, the
positions of a sample are divided as well, and torch adds up the parts before it takes magnitudes. Bytes: δ and x once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mas_fast.kernels.gpu.common import INTERPRET, add_magnitude, num_sms


@triton.jit(do_not_specialize=["samples", "rows", "count", "sample_parts", "row_parts", "per_part", "per_row_part"])
def sums_kernel(
    delta,
    x,
    mean,
    rstd,
    of_weight,
    of_bias,
    samples,
    rows,  # R S of a sample
    count,  # S
    entries,  # K
    sample_parts,
    row_parts,
    per_part,  # samples of a part
    per_row_part,  # rows of a part
    delta_n,
    delta_r,
    delta_k,
    delta_s,
    x_n,
    x_r,
    x_k,
    x_s,
    mean_n,
    mean_r,
    mean_k,
    mean_s,
    rstd_n,
    rstd_r,
    rstd_k,
    rstd_s,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    MEAN: tl.constexpr,
    RSTD: tl.constexpr,
    INNER: tl.constexpr,  # "r" if S is 1, "s" if R is 1
    MAGNITUDES: tl.constexpr,  # the sum of magnitudes over a part's samples; else the sum of its only sample
    SQUARE: tl.constexpr,
    INTERPRET: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
):
    """Write what the rows and samples of a part sum to, to [sample_parts, row_parts, K]."""
    # One axis of programs: the others of a grid are short.
    blocks = tl.cdiv(entries, BK)
    program = tl.program_id(0)
    part = program // blocks
    k = (program % blocks) * BK + tl.arange(0, BK)
    column = k.to(tl.int64)[None, :]
    first_n = (part // row_parts) * per_part
    first = (part % row_parts) * per_row_part
    last = min(rows, first + per_row_part)
    weight_total = tl.zeros((BK,), tl.float32)
    bias_total = tl.zeros((BK,), tl.float32)
    for step in range(0, max(0, min(per_part, samples - first_n))):
        n = (first_n + step).to(tl.int64)
        weight_sum = tl.zeros((BK,), tl.float32)
        bias_sum = tl.zeros((BK,), tl.float32)
        for begin in range(first, last, BQ):
            q = begin + tl.arange(0, BQ)
            mask = (q < last)[:, None] & (k < entries)[None, :]
            if INNER == "r":
                r, s = q.to(tl.int64)[:, None], 0
            elif INNER == "s":
                r, s = 0, q.to(tl.int64)[:, None]
            else:
                r, s = (q // count).to(tl.int64)[:, None], (q % count).to(tl.int64)[:, None]
            values = tl.load(delta + n * delta_n + r * delta_r + column * delta_k + s * delta_s, mask=mask, other=0.0)
            values = values.to(tl.float32)
            if BIAS:
                bias_sum += tl.sum(values, 0)
            if WEIGHT:
                seen = tl.load(x + n * x_n + r * x_r + column * x_k + s * x_s, mask=mask, other=0.0).to(tl.float32)
                if MEAN:
                    seen -= tl.load(mean + n * mean_n + r * mean_r + column * mean_k + s * mean_s, mask=mask, other=0.0)
                if RSTD:
                    seen *= tl.load(rstd + n * rstd_n + r * rstd_r + column * rstd_k + s * rstd_s, mask=mask, other=0.0)
                weight_sum += tl.sum(values * seen, 0)
        if MAGNITUDES:
            weight_total = add_magnitude(weight_total, weight_sum, SQUARE, INTERPRET)
            bias_total = add_magnitude(bias_total, bias_sum, SQUARE, INTERPRET)
        else:
            weight_total += weight_sum
            bias_total += bias_sum
    target = part.to(tl.int64) * entries + k
    if WEIGHT:
        tl.store(of_weight + target, weight_total, mask=k < entries)
    if BIAS:
        tl.store(of_bias + target, bias_total, mask=k < entries)


def blocks_for(rows: int, along_entries: bool) -> tuple[int, int]:
    """Return the rows and the entries of a block: neighbours in memory are neighbours in it."""
    if INTERPRET:
        return min(256, triton.next_power_of_2(rows)), 32
    if along_entries:
        block_q = min(16, triton.next_power_of_2(rows))
        return block_q, 128 if block_q == 16 else 1024 // block_q
    return min(256, max(32, triton.next_power_of_2(rows))), 4


def accumulate_affine_(
    omega_weight: Tensor | None,
    omega_bias: Tensor | None,
    grad_output: Tensor,
    input: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    square: bool = False,
) -> None:
    """See `reference.accumulate_affine_`; Ω is float32 and contiguous."""
    samples, outer, entries, inner = grad_output.shape
    rows = outer * inner
    if 0 in grad_output.shape:
        return
    block_q, block_k = blocks_for(rows, grad_output.stride(2) == 1 and entries > 1)
    blocks, wanted = triton.cdiv(entries, block_k), 2 * num_sms(grad_output.device)
    sample_parts = max(1, min(samples, -(-wanted // blocks)))
    row_parts = max(1, min(triton.cdiv(rows, block_q), wanted // (samples * blocks)))
    if row_parts > 1:
        sample_parts = samples
    parts = [
        None if omega is None else grad_output.new_empty(sample_parts, row_parts, entries, dtype=torch.float32)
        for omega in (omega_weight, omega_bias)
    ]
    strides = [
        stride
        for tensor in (grad_output, input, mean, rstd)
        for stride in ([0] * 4 if tensor is None else tensor.expand(grad_output.shape).stride())
    ]
    sums_kernel[(sample_parts * row_parts * blocks,)](
        grad_output,
        *(grad_output if tensor is None else tensor for tensor in (input, mean, rstd)),
        *(grad_output if tensor is None else tensor for tensor in parts),
        samples,
        rows,
        inner,
        entries,
        sample_parts,
        row_parts,
        triton.cdiv(samples, sample_parts),
        triton.cdiv(rows, row_parts),
        *strides,
        WEIGHT=omega_weight is not None,
        BIAS=omega_bias is not None,
        MEAN=mean is not None,
        RSTD=rstd is not None,
        INNER="r" if inner == 1 else "s" if outer == 1 else "both",
        MAGNITUDES=row_parts == 1,
        SQUARE=square,
        INTERPRET=INTERPRET,
        BQ=block_q,
        BK=block_k,
        num_warps=4,
    )
    for omega, part in zip((omega_weight, omega_bias), parts, strict=True):
        if omega is not None and part is not None:
            if row_parts > 1:
                whole = part.sum(1)  # [N, row_parts, K] -> [N, K]
                part = whole.square() if square else whole.abs()
            omega += part.view(-1, entries).sum(0)
