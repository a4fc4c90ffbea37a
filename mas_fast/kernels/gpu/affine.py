"""Ω of biases, norms and scales: Σ_n |Σ_rs δ x̂| and Σ_n |Σ_rs δ|, with x̂ = (x − mean) rstd.

A first kernel sums each sample, in one pass over δ and x for weight and bias together; what it writes is [N, K], a
little beside them. The magnitudes of that are added up by torch. Bytes: δ and x once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mas_fast.kernels.gpu.common import INTERPRET, num_sms


@triton.jit(do_not_specialize=["rows", "count", "per_split", "entries"])
def sums_kernel(
    delta,
    x,
    mean,
    rstd,
    weight_sums,
    bias_sums,
    rows,  # R S of a sample
    count,  # S
    entries,  # K
    splits,
    per_split,
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
    BQ: tl.constexpr,
    BK: tl.constexpr,
):
    """Write the sums over a split of a sample's rows to [N, splits, K]."""
    part = tl.program_id(0)
    n, split = (part // splits).to(tl.int64), part % splits
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    column = k.to(tl.int64)[None, :]
    of_weight = tl.zeros((BK,), tl.float32)
    of_bias = tl.zeros((BK,), tl.float32)
    first = split * per_split
    last = min(rows, first + per_split)
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
            of_bias += tl.sum(values, 0)
        if WEIGHT:
            seen = tl.load(x + n * x_n + r * x_r + column * x_k + s * x_s, mask=mask, other=0.0).to(tl.float32)
            if MEAN:
                seen -= tl.load(mean + n * mean_n + r * mean_r + column * mean_k + s * mean_s, mask=mask, other=0.0)
            if RSTD:
                seen *= tl.load(rstd + n * rstd_n + r * rstd_r + column * rstd_k + s * rstd_s, mask=mask, other=0.0)
            of_weight += tl.sum(values * seen, 0)
    target = (n * splits + split) * entries + k
    if WEIGHT:
        tl.store(weight_sums + target, of_weight, mask=k < entries)
    if BIAS:
        tl.store(bias_sums + target, of_bias, mask=k < entries)


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
    # Neighbours in memory are neighbours in a block.
    along_entries = grad_output.stride(2) == 1 and entries > 1
    block_q, block_k = (16, 128) if along_entries else (256, 4)
    if INTERPRET:
        block_q, block_k = 256, 32
    column_blocks = triton.cdiv(entries, block_k)
    splits = max(1, min(triton.cdiv(rows, block_q), -(-2 * num_sms(grad_output.device) // (samples * column_blocks))))
    sums = [
        None if omega is None else grad_output.new_empty(samples, splits, entries, dtype=torch.float32)
        for omega in (omega_weight, omega_bias)
    ]
    strides = [
        stride
        for tensor in (grad_output, input, mean, rstd)
        for stride in ([0] * 4 if tensor is None else tensor.expand(grad_output.shape).stride())
    ]
    sums_kernel[(samples * splits, column_blocks)](
        grad_output,
        *(grad_output if tensor is None else tensor for tensor in (input, mean, rstd)),
        *(grad_output if tensor is None else tensor for tensor in sums),
        rows,
        inner,
        entries,
        splits,
        triton.cdiv(rows, splits),
        *strides,
        WEIGHT=omega_weight is not None,
        BIAS=omega_bias is not None,
        MEAN=mean is not None,
        RSTD=rstd is not None,
        INNER="r" if inner == 1 else "s" if outer == 1 else "both",
        BQ=block_q,
        BK=block_k,
        num_warps=4,
    )
    for omega, parts in zip((omega_weight, omega_bias), sums, strict=True):
        if omega is not None and parts is not None:
            whole = parts.sum(1) if splits > 1 else parts.squeeze(1)  # [N, splits, K] -> [N, K]
            omega += (whole.square() if square else whole.abs()).sum(0)
