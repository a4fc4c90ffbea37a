"""Every op that accumulates Ω against its reference in float64."""

import math
import os
import random
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from compare import assert_as_accurate
from torch.library import opcheck

from mas_fast import reference
from mas_fast.kernels import ops

ACCUMULATE = [name for name in ops.OPS if name.startswith("accumulate_")]  # the others: test_steps.py
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
compiled = pytest.mark.skipif(ops.cpu_capability() is None, reason="needs the compiled kernels")


@pytest.fixture(autouse=True)
def threads(request):
    """Run on one thread, which is fast for small shapes, or on two if a test asks for `parallel`."""
    before = torch.get_num_threads()
    torch.set_num_threads(2 if "parallel" in request.fixturenames else 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def parallel():
    """Ask for two threads."""


def data(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def omega_of(*shape, dtype=torch.float32):
    """Return an Ω that something has been added to already."""
    return torch.rand(*shape, dtype=torch.float64).to(torch.float64 if dtype == torch.float64 else torch.float32)


def slack(dtype, samples, positions):
    """Return the rounding of one order of summation against another.

    A running sum of T numbers of random sign errs by about eps·√T of itself, one of N positive ones by at most eps·√N.
    """
    eps = torch.finfo(dtype).eps
    return 2 * eps * (1 + math.sqrt(max(1, positions)) + math.sqrt(max(1, samples)))


def check(name, omegas, args, kwargs, positions, samples, device="cpu"):
    """Run the op on a device, the reference in float64 and the reference in the dtype of Ω, and compare."""

    def wide(a):
        return a.double().clone() if isinstance(a, torch.Tensor) and a.is_floating_point() else a

    truth = [None if omega is None else omega.double().clone() for omega in omegas]
    baseline = [None if omega is None else omega.clone() for omega in omegas]
    # Moved as they are: a device keeps the strides.
    actual = [None if omega is None else omega.detach().to(device) for omega in omegas]
    getattr(reference, name)(*truth, *map(wide, args), **kwargs)
    getattr(reference, name)(*baseline, *args, **kwargs)
    moved = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    assert getattr(ops, name)(*actual, *moved, **kwargs) is None
    for found, true, base in zip((a if a is None else a.cpu() for a in actual), truth, baseline, strict=True):
        if found is not None:
            assert bool(found.isfinite().all())
            assert_as_accurate(found, true, base, slack(found.dtype, samples, positions))


# Memory layouts of data that a model may hand in; each keeps the values.
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda t: torch.stack([t, torch.full_like(t, math.nan)], -1)[..., 0],
    "offset": lambda t: torch.cat([torch.full_like(t[:1], math.nan), t])[1:] if len(t) else t,
    "stride_of_axes_of_one": lambda t: t.as_strided(
        t.shape, [step if size != 1 else 10_007 for size, step in zip(t.shape, t.stride(), strict=True)]
    ),
}
OMEGA_LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "strided": lambda t: torch.stack([t, torch.full_like(t, math.nan)], -1)[..., 0],
}


# name -> N, T, O, I
LINEAR = {
    "even": (8, 16, 64, 32),
    "ragged": (3, 7, 33, 70),
    "wide": (2, 3, 5, 300),
    "tall": (2, 3, 300, 5),
    "ones": (1, 1, 1, 1),
    "one_position": (33, 1, 37, 65),
    "one_position_many_samples": (5000, 1, 9, 17),
    "one_sample": (1, 50, 20, 30),
    "one_output": (5, 6, 1, 40),
    "one_input": (5, 6, 40, 1),
    "many_samples": (3000, 2, 9, 17),
    "long": (2, 2048, 10, 33),
    "longer_than_a_block": (3, 2049, 17, 9),
    "several_blocks": (2, 5000, 6, 40),
    "several_blocks_of_a_packed_panel": (3, 300, 40, 35),
    "several_samples_in_a_block": (23, 50, 20, 35),
    "outputs_for_each_thread": (9, 20, 150, 35),
    "outputs_for_each_thread_one_position": (300, 1, 150, 35),
    "no_samples": (0, 4, 5, 6),
    "no_positions": (4, 0, 5, 6),
    "no_outputs": (4, 3, 0, 6),
    "no_inputs": (4, 3, 5, 0),
}


@pytest.mark.parametrize("square", [False, True], ids=["abs", "square"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_linear(name, dtype, square):
    torch.manual_seed(0)
    n, t, o, i = LINEAR[name]
    args = data(n, t, o, dtype=dtype), data(n, t, i, dtype=dtype)
    check("accumulate_linear_", [omega_of(o, i, dtype=dtype)], args, {"square": square}, t, n)


@pytest.mark.parametrize("omega_layout", OMEGA_LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ragged", "one_position", "one_output", "one_input", "longer_than_a_block"])
def test_linear_memory(name, dtype, layout, omega_layout):
    torch.manual_seed(0)
    n, t, o, i = LINEAR[name]
    delta, x = LAYOUTS[layout](data(n, t, o, dtype=dtype)), LAYOUTS[layout](data(n, t, i, dtype=dtype))
    check("accumulate_linear_", [OMEGA_LAYOUTS[omega_layout](omega_of(o, i))], (delta, x), {}, t, n)


def test_linear_expanded_data():
    delta, x = data(1, 6, 5).expand(4, 6, 5), data(4, 1, 7).expand(4, 6, 7)
    check("accumulate_linear_", [omega_of(5, 7, dtype=torch.float64)], (delta, x), {}, 6, 4)


# name -> N, groups, O/groups, I/groups, in, kernel, stride, padding, dilation; small enough for Triton's interpreter
CONV_SMALL = {
    "1d": (3, 1, 5, 4, [17], [3], [1], [1], [1]),
    "1d_strided": (3, 2, 3, 5, [17], [4], [3], [2], [2]),
    "2d_even": (4, 1, 16, 32, [8, 8], [3, 3], [1, 1], [1, 1], [1, 1]),
    "2d_ragged": (3, 1, 9, 37, [7, 10], [3, 2], [2, 1], [0, 2], [1, 3]),
    "2d_pointwise": (3, 1, 9, 33, [5, 6], [1, 1], [1, 1], [0, 0], [1, 1]),
    "2d_pointwise_strided": (3, 1, 9, 7, [5, 6], [1, 1], [2, 3], [1, 0], [1, 1]),
    "2d_one_position": (5, 1, 9, 7, [3, 3], [3, 3], [1, 1], [0, 0], [1, 1]),
    "2d_one_column": (3, 1, 9, 7, [6, 1], [3, 1], [1, 1], [1, 0], [1, 1]),
    "2d_one_row": (3, 1, 9, 16, [1, 6], [1, 3], [1, 1], [0, 1], [1, 1]),
    "2d_grouped": (2, 3, 5, 4, [6, 7], [3, 3], [1, 2], [1, 1], [2, 1]),
    "2d_in_place_several_samples": (5, 1, 16, 32, [20, 20], [3, 3], [1, 1], [1, 1], [1, 1]),
    "2d_in_place_longer_than_a_chunk": (2, 1, 4, 16, [66, 66], [2, 2], [1, 1], [0, 0], [1, 1]),
    "2d_outputs_for_each_thread": (3, 1, 136, 16, [9, 9], [3, 3], [1, 1], [1, 1], [1, 1]),
    "3d": (2, 1, 5, 4, [4, 5, 6], [3, 2, 3], [1, 2, 1], [1, 0, 2], [1, 1, 2]),
    "3d_grouped": (2, 2, 3, 5, [4, 5, 6], [2, 2, 2], [2, 1, 1], [0, 1, 0], [1, 2, 1]),
    "depthwise_1d": (3, 7, 1, 1, [20], [5], [2], [2], [1]),
    "depthwise_2d": (3, 37, 1, 1, [9, 8], [3, 3], [1, 1], [1, 1], [1, 1]),
    "depthwise_2d_strided": (3, 16, 1, 1, [9, 8], [3, 2], [2, 3], [1, 0], [2, 1]),
    "depthwise_3d": (2, 5, 1, 1, [4, 5, 6], [2, 3, 2], [1, 1, 2], [1, 1, 0], [1, 1, 1]),
    "depthwise_multiplier": (3, 5, 3, 1, [7, 8], [3, 3], [1, 1], [1, 1], [1, 1]),
    "one_channel": (3, 1, 1, 1, [6, 6], [3, 3], [1, 1], [1, 1], [1, 1]),
    "no_samples": (0, 1, 4, 3, [6, 6], [3, 3], [1, 1], [1, 1], [1, 1]),
    "unused_border": (2, 1, 4, 3, [8, 9], [2, 2], [3, 4], [0, 0], [1, 1]),
}
# 3x3: large enough for Winograd's sums on every instruction set.
CONV = CONV_SMALL | {
    "2d_many_positions": (2, 1, 4, 3, [50, 50], [3, 3], [1, 1], [1, 1], [1, 1]),
    "3x3": (3, 1, 67, 93, [17, 12], [3, 3], [1, 1], [1, 1], [1, 1]),
    "3x3_even": (7, 1, 64, 64, [14, 14], [3, 3], [1, 1], [1, 1], [1, 1]),
    "3x3_odd_width": (2, 1, 96, 64, [12, 17], [3, 3], [1, 1], [1, 1], [1, 1]),
    "3x3_padding": (2, 1, 70, 93, [16, 17], [3, 3], [1, 1], [0, 3], [1, 1]),
    "3x3_grouped": (2, 3, 62, 61, [16, 16], [3, 3], [1, 1], [1, 1], [1, 1]),
    "3x3_images": (2, 1, 64, 96, [3, 10, 11], [1, 3, 3], [1, 1, 1], [0, 1, 1], [1, 1, 1]),
    "3x3_bands": (2, 1, 70, 64, [70, 66], [3, 3], [1, 1], [1, 1], [1, 1]),
    "3x3_grouped_bands": (2, 2, 62, 61, [40, 40], [3, 3], [1, 1], [1, 1], [1, 1]),
    "3x3_bands_of_some_outputs": (2, 1, 140, 1030, [26, 24], [3, 3], [1, 1], [1, 1], [1, 1]),
    "3x3_long_rows": (2, 1, 64, 64, [9, 600], [3, 3], [1, 1], [1, 1], [1, 1]),
}


def conv_case(name, dtype):
    n, groups, o, i, size, kernel, stride, padding, dilation = CONV[name]
    geometry = zip(size, kernel, stride, padding, dilation, strict=True)
    out = [(s + 2 * p - d * (k - 1) - 1) // step + 1 for s, k, step, p, d in geometry]
    delta, x = data(n, groups * o, *out, dtype=dtype), data(n, groups * i, *size, dtype=dtype)
    return (
        omega_of(groups * o, i, *kernel, dtype=dtype),
        delta,
        x,
        (stride, padding, dilation, groups),
        math.prod(out),
        n,
    )


@pytest.mark.parametrize("square", [False, True], ids=["abs", "square"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONV)
def test_conv(name, dtype, square):
    torch.manual_seed(0)
    omega, delta, x, geometry, positions, n = conv_case(name, dtype)
    check("accumulate_conv_", [omega], (delta, x, *geometry), {"square": square}, positions, n)


CONV_LAYOUTS = {
    **LAYOUTS,
    "channels_last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "positions_transposed": lambda t: t.mT.contiguous().mT,
    "samples_last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
}


@pytest.mark.parametrize("which", ["grad_output", "input", "both"])
@pytest.mark.parametrize("layout", CONV_LAYOUTS)
@pytest.mark.parametrize(
    "name",
    [
        "1d",
        "2d_ragged",
        "2d_pointwise",
        "2d_one_column",
        "2d_one_row",
        "2d_grouped",
        "3x3_odd_width",
        "3x3_images",
        "3d",
        "depthwise_2d",
        "depthwise_3d",
    ],
)
def test_conv_memory(name, layout, which):
    torch.manual_seed(0)
    omega, delta, x, geometry, positions, n = conv_case(name, torch.float32)
    delta = CONV_LAYOUTS[layout](delta) if which != "input" else delta
    x = CONV_LAYOUTS[layout](x) if which != "grad_output" else x
    check("accumulate_conv_", [omega], (delta, x, *geometry), {}, positions, n)


@pytest.mark.parametrize("name", ["2d_ragged", "depthwise_2d"])
@pytest.mark.parametrize("layout", ["channels_last", "strided", "positions_transposed"])
def test_conv_memory_of_omega(name, layout):
    torch.manual_seed(0)
    omega, delta, x, geometry, positions, n = conv_case(name, torch.float32)
    check("accumulate_conv_", [CONV_LAYOUTS[layout](omega)], (delta, x, *geometry), {}, positions, n)


# name -> N, T, V, D
EMBEDDING = {
    "even": (4, 16, 32, 64),
    "ragged": (3, 9, 7, 37),
    "wide": (2, 5, 3, 300),
    "ones": (1, 1, 1, 1),
    "one_position": (20, 1, 6, 16),
    "one_row": (3, 8, 1, 5),
    "long": (2, 3000, 11, 9),
    "no_samples": (0, 4, 5, 6),
    "no_positions": (4, 0, 5, 6),
    "no_width": (4, 3, 5, 0),
}


@pytest.mark.parametrize("square", [False, True], ids=["abs", "square"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EMBEDDING)
def test_embedding(name, dtype, square):
    torch.manual_seed(0)
    n, t, v, d = EMBEDDING[name]
    ids = torch.randint(0, v, (n, t))
    for padding_idx in (-1, v - 1):
        args = data(n, t, d, dtype=dtype), ids, padding_idx
        check("accumulate_embedding_", [omega_of(v, d, dtype=dtype)], args, {"square": square}, t, n)


@pytest.mark.parametrize("omega_layout", OMEGA_LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_embedding_memory(ids_dtype, layout, omega_layout):
    torch.manual_seed(0)
    n, t, v, d = EMBEDDING["ragged"]
    ids = torch.randint(0, v, (n, t), dtype=ids_dtype)
    for layout_of_ids in (ids, ids.mT.contiguous().mT, ids[:1].expand(n, t), torch.stack([ids, ids + 99], -1)[..., 0]):
        args = LAYOUTS[layout](data(n, t, d, dtype=torch.float32)), layout_of_ids
        # The reference multiplies ids by the size of the vocabulary, which int32 need not hold.
        check_ids = (args[0], layout_of_ids)
        check("accumulate_embedding_", [OMEGA_LAYOUTS[omega_layout](omega_of(v, d))], check_ids, {}, t, n)


# name -> N, R, K, S
AFFINE = {
    "bias_of_linear": (8, 1, 64, 1),
    "bias_with_positions": (5, 7, 33, 1),
    "channels": (4, 1, 16, 64),
    "ragged": (3, 2, 5, 7),
    "wide": (2, 3, 131, 1),
    "ones": (1, 1, 1, 1),
    "long": (2, 3000, 3, 1),
    "long_inner": (2, 1, 3, 3000),
    "many_samples": (3000, 1, 17, 1),
    "no_samples": (0, 2, 5, 3),
    "no_positions": (4, 2, 5, 0),
    "no_entries": (4, 2, 0, 3),
}
# Shapes of mean and rstd that norms hand in.
STATISTICS = {
    "none": lambda n, r, k, s: (None, None),
    "rows": lambda n, r, k, s: (data(n, r, 1, 1), data(n, r, 1, 1).abs()),
    "entries": lambda n, r, k, s: (data(k, 1), data(k, 1).abs()),
    "full": lambda n, r, k, s: (data(n, r, k, s), data(n, r, k, s).abs()),
    "rstd_only": lambda n, r, k, s: (None, data(n, r, 1, 1).abs()),
}


@pytest.mark.parametrize("square", [False, True], ids=["abs", "square"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", AFFINE)
def test_affine(name, dtype, square):
    torch.manual_seed(0)
    n, r, k, s = AFFINE[name]
    delta, x = data(n, r, k, s, dtype=dtype), data(n, r, k, s, dtype=dtype)
    for statistics in STATISTICS.values():
        mean, rstd = (None if t is None else t.to(omega_of(0, dtype=dtype)) for t in statistics(n, r, k, s))
        weight, bias = omega_of(k, dtype=dtype), omega_of(k, dtype=dtype)
        check("accumulate_affine_", [weight, bias], (delta, x, mean, rstd), {"square": square}, r * s, n)
    check("accumulate_affine_", [omega_of(k, dtype=dtype), None], (delta, x), {"square": square}, r * s, n)
    check("accumulate_affine_", [None, omega_of(k, dtype=dtype)], (delta,), {"square": square}, r * s, n)


@pytest.mark.parametrize("omega_layout", OMEGA_LAYOUTS)
@pytest.mark.parametrize("layout", CONV_LAYOUTS)
@pytest.mark.parametrize("name", ["ragged", "channels", "wide"])
def test_affine_memory(name, layout, omega_layout):
    torch.manual_seed(0)
    n, r, k, s = AFFINE[name]
    delta, x = (CONV_LAYOUTS[layout](data(n, r, k, s, dtype=torch.float32)) for _ in range(2))
    omegas = [OMEGA_LAYOUTS[omega_layout](omega_of(k)) for _ in range(2)]
    check("accumulate_affine_", omegas, (delta, x, data(n, r, 1, 1).float(), data(k, 1).float()), {}, r * s, n)


def test_mixed_dtypes():
    torch.manual_seed(0)
    for omega, dtypes in (
        (torch.float32, (torch.bfloat16, torch.float32)),
        (torch.float64, (torch.float32, torch.bfloat16)),
    ):
        delta, x = data(3, 4, 5, dtype=dtypes[0]), data(3, 4, 6, dtype=dtypes[1])
        check("accumulate_linear_", [omega_of(5, 6, dtype=omega)], (delta, x), {}, 4, 3)


def test_samples_are_not_lost_beside_a_large_sum():
    """Those of a chunk are summed first: at 3e7, float32 knows only even numbers, and a sample adds about 1."""
    torch.manual_seed(0)
    delta, x = torch.randn(500, 2, 16), torch.randn(500, 2, 64)
    omega = torch.full((16, 64), 3e7)
    ops.accumulate_linear_(omega, delta, x)
    truth = torch.einsum("nto,nti->noi", delta, x).abs().sum(0)
    assert (omega - 3e7 - truth).abs().max() <= 2


def test_hand_computed_linear():
    omega = torch.tensor([[10.0, 0.0], [0.0, 0.0]])
    delta = torch.tensor([[[1.0, 2.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]])
    x = torch.tensor([[[1.0, -1.0], [-3.0, 1.0]], [[2.0, -5.0], [7.0, 7.0]]])
    # Sample 0: [[1 - 3, -1 + 1], [2, -2]]; sample 1: [[0, 0], [2, -5]].
    ops.accumulate_linear_(omega, delta, x)
    assert omega.tolist() == [[12.0, 0.0], [4.0, 7.0]]
    ops.accumulate_linear_(omega.zero_(), delta, x, square=True)
    assert omega.tolist() == [[4.0, 0.0], [8.0, 29.0]]
    ops.accumulate_linear_(omega.zero_(), delta[:, :1], x[:, :1])
    assert omega.tolist() == [[1.0, 1.0], [4.0, 7.0]]


def test_hand_computed_conv():
    omega = torch.zeros(1, 1, 2, 2)
    x = torch.tensor([[[[1.0, 2.0, 0.0], [3.0, 4.0, -1.0]]], [[[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]]])
    delta = torch.tensor([[[[1.0, -1.0]]], [[[-2.0, 0.0]]]])
    # Sample 0: x at the first place minus x at the second; sample 1: -2 times x at the first.
    ops.accumulate_conv_(omega, delta, x, [1, 1], [0, 0], [1, 1])
    assert omega.tolist() == [[[[1.0, 4.0], [1.0, 5.0]]]]


def test_hand_computed_embedding():
    omega = torch.zeros(2, 2)
    delta = torch.tensor([[[1.0, 2.0], [-1.0, 3.0]], [[5.0, -6.0], [1.0, 1.0]]])
    ops.accumulate_embedding_(omega, delta, torch.tensor([[1, 1], [1, 0]]))
    # Row 1: |1 - 1|, |2 + 3| of sample 0, and |5|, |-6| of sample 1.
    assert omega.tolist() == [[1.0, 1.0], [5.0, 11.0]]
    ops.accumulate_embedding_(omega.zero_(), delta, torch.tensor([[1, 1], [1, 0]]), padding_idx=1)
    assert omega.tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_hand_computed_affine():
    weight, bias = torch.zeros(2), torch.zeros(2)
    delta = torch.tensor([[1.0, 2.0], [-1.0, 1.0]]).view(1, 2, 2, 1)
    x = torch.tensor([[3.0, 4.0], [5.0, 6.0]]).view(1, 2, 2, 1)
    ops.accumulate_affine_(weight, bias, delta, x, torch.tensor([[3.0], [4.0]]), torch.tensor(2.0))
    # x̂ = [[0, 0], [4, 4]]: |0 - 4|, |0 + 4|; biases |1 - 1|, |2 + 1|.
    assert weight.tolist() == [4.0, 4.0] and bias.tolist() == [0.0, 3.0]


def raw_calls():
    """Return op -> (arguments that the raw op takes as they are)."""
    torch.manual_seed(0)
    f = torch.float32
    return {
        "accumulate_linear_": (torch.zeros(3, 4), data(2, 5, 3, dtype=f), data(2, 5, 4, dtype=f), True),
        "accumulate_conv_": (
            torch.zeros(3, 4, 2, 2),
            data(2, 3, 4, 4, dtype=f),
            data(2, 4, 5, 5, dtype=f),
            [1, 1],
            [0, 0],
            [1, 1],
            1,
        ),
        "accumulate_embedding_": (torch.zeros(3, 4), data(2, 5, 4, dtype=f), torch.randint(0, 3, (2, 5)), 1),
        "accumulate_affine_": (
            torch.zeros(3),
            torch.zeros(3),
            data(2, 4, 3, 5, dtype=f),
            data(2, 4, 3, 5, dtype=f),
            data(2, 4, 3, 5, dtype=f),
            None,
        ),
    }


@pytest.mark.parametrize("name", ACCUMULATE)
def test_opcheck(name):
    # Autograd is not of this kind of op: it is called on detached data, inside backwards.
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(getattr(torch.ops.mas_fast, name).default, raw_calls()[name], test_utils=tests)


@pytest.mark.parametrize("name", ACCUMULATE)
def test_same_bits_for_every_number_of_threads_and_every_run(name):
    torch.manual_seed(0)
    big = {
        "accumulate_linear_": lambda: ([omega_of(200, 90)], (data(40, 9, 200).float(), data(40, 9, 90).float())),
        "accumulate_conv_": lambda: (
            [omega_of(200, 16, 3, 3)],
            (data(6, 200, 9, 9).float(), data(6, 16, 9, 9).float(), [1, 1], [1, 1], [1, 1]),
        ),
        "accumulate_embedding_": lambda: (
            [omega_of(50, 100)],
            (data(70, 30, 100).float(), torch.randint(0, 50, (70, 30))),
        ),
        "accumulate_affine_": lambda: (
            [omega_of(130), omega_of(130)],
            (data(40, 6, 130, 5).float(), data(40, 6, 130, 5).float()),
        ),
    }
    omegas, args = big[name]()
    results = []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        results.append([omega.clone() for omega in omegas])
        getattr(ops, name)(*results[-1], *args)
    if ops.cpu_capability() is None:
        # Torch's own sums depend on the number of threads; its repeated runs do not.
        results = [results[1], results[3]]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("seed", range(40))
def test_random_geometry(seed, parallel):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype, square = draw.choice(DTYPES), draw.random() < 0.3
    n, t, o, i = (
        draw.choice(sizes)
        for sizes in ([0, 1, 2, 5, 33], [1, 1, 2, 7, 64, 300], [1, 3, 10, 33, 70], [1, 5, 16, 33, 100])
    )
    args = (
        LAYOUTS[draw.choice([*LAYOUTS])](data(n, t, o, dtype=dtype)),
        LAYOUTS[draw.choice([*LAYOUTS])](data(n, t, i, dtype=dtype)),
    )
    check("accumulate_linear_", [omega_of(o, i, dtype=dtype)], args, {"square": square}, t, n)

    axes, groups, i, o = (
        draw.choice([1, 2, 3]),
        draw.choice([1, 1, 2, 3]),
        draw.choice([1, 2, 5, 17, 32]),
        draw.choice([1, 2, 9]),
    )
    if draw.random() < 0.3:
        i, o, groups = 1, 1, draw.choice([1, 5, 16, 37])
    pick = lambda values: [draw.choice(values) for _ in range(axes)]  # noqa: E731
    size, kernel, stride, padding, dilation = (
        pick([5, 6, 8]),
        pick([1, 2, 3]),
        pick([1, 2]),
        pick([0, 1, 2]),
        pick([1, 2]),
    )
    geometry = zip(size, kernel, stride, padding, dilation, strict=True)
    out = [(s + 2 * p - d * (k - 1) - 1) // step + 1 for s, k, step, p, d in geometry]
    n = draw.choice([0, 1, 3, 5])
    delta = CONV_LAYOUTS[draw.choice([*CONV_LAYOUTS])](data(n, groups * o, *out, dtype=dtype))
    x = CONV_LAYOUTS[draw.choice([*CONV_LAYOUTS])](data(n, groups * i, *size, dtype=dtype))
    omega = omega_of(groups * o, i, *kernel, dtype=dtype)
    check(
        "accumulate_conv_",
        [omega],
        (delta, x, stride, padding, dilation, groups),
        {"square": square},
        math.prod(out),
        n,
    )


# Errors of the wrappers: op -> [(arguments that differ from a good call, text)]


def good_call(name):
    args = raw_calls()[name]
    names = {
        "accumulate_linear_": ["omega", "grad_output", "input", "square"],
        "accumulate_conv_": ["omega", "grad_output", "input", "stride", "padding", "dilation", "groups"],
        "accumulate_embedding_": ["omega", "grad_output", "ids", "padding_idx"],
        "accumulate_affine_": ["omega_weight", "omega_bias", "grad_output", "input", "mean", "rstd"],
    }[name]
    return dict(zip(names, args, strict=True))


WRONG = {
    "accumulate_linear_": [
        ({"omega": torch.zeros(3, 4).half()}, "omega must be float32 or float64, got torch.float16; Ω is never"),
        ({"omega": torch.zeros(12)}, "omega must have 2 axes, got shape [12]"),
        ({"omega": torch.zeros(3, 4, requires_grad=True)}, "omega must not require a gradient: it is changed in place"),
        ({"grad_output": torch.zeros(2, 3)}, "grad_output must have 3 axes, got shape [2, 3]"),
        ({"grad_output": torch.zeros(2, 5, 7)}, "grad_output must have shape [2, 5, 3], got [2, 5, 7]"),
        (
            {"grad_output": torch.zeros(2, 5, 3).long()},
            "grad_output must be floating-point on cpu, got torch.int64 on cpu",
        ),
        ({"input": torch.zeros(2, 6, 4)}, "input must have shape [2, 5, 4], got [2, 6, 4]"),
        (
            {"input": torch.zeros(2, 5, 4, device="meta")},
            "input must be floating-point on cpu, got torch.float32 on meta",
        ),
    ],
    "accumulate_conv_": [
        ({"omega": torch.zeros(3, 4)}, "omega must have 1, 2 or 3 kernel axes, got shape [3, 4]"),
        ({"stride": [1]}, "stride must be 2 numbers of at least 1, got [1]"),
        ({"stride": [0, 1]}, "stride must be 2 numbers of at least 1, got [0, 1]"),
        ({"padding": [0, -1]}, "padding must be 2 numbers of at least 0, got [0, -1]"),
        ({"dilation": [1, 1, 1]}, "dilation must be 2 numbers of at least 1, got [1, 1, 1]"),
        ({"groups": 2}, "groups must divide the 3 output channels, got 2"),
        ({"groups": 0}, "groups must divide the 3 output channels, got 0"),
        ({"groups": 3}, "input must have shape [2, 12, 5, 5], got [2, 4, 5, 5]"),
        ({"padding": [1, 0]}, "grad_output must have shape [2, 3, 6, 4], got [2, 3, 4, 4]"),
        ({"input": torch.zeros(3, 4, 5, 5)}, "grad_output must have shape [3, 3, 4, 4], got [2, 3, 4, 4]"),
        ({"input": torch.zeros(4, 5, 5)}, "input must have 4 axes, got shape [4, 5, 5]"),
    ],
    "accumulate_embedding_": [
        ({"grad_output": torch.zeros(2, 5, 3)}, "grad_output must have shape [2, 5, 4], got [2, 5, 3]"),
        ({"ids": torch.zeros(2, 6).long()}, "ids must have shape [2, 5], got [2, 6]"),
        ({"ids": torch.zeros(2, 5)}, "ids must be int32 or int64 on cpu, got torch.float32 on cpu"),
        ({"ids": torch.full((2, 5), 3)}, "ids must lie in [0, 3), got 3 to 3"),
        ({"ids": torch.full((2, 5), -1)}, "ids must lie in [0, 3), got -1 to -1"),
    ],
    "accumulate_affine_": [
        ({"omega_weight": None, "omega_bias": None}, "omega_weight or omega_bias must be a tensor, got None for both"),
        ({"omega_bias": torch.zeros(4)}, "omega_weight and omega_bias must agree, got"),
        ({"omega_bias": torch.zeros(3).double()}, "omega_weight and omega_bias must agree, got"),
        ({"input": None}, "input must be a tensor where omega_weight is given, got None"),
        ({"input": torch.zeros(2, 4, 3, 6)}, "input must have shape [2, 4, 3, 5], got [2, 4, 3, 6]"),
        ({"grad_output": torch.zeros(2, 4, 6, 5)}, "grad_output must have shape [2, 4, 3, 5], got [2, 4, 6, 5]"),
    ],
}


@pytest.mark.parametrize(
    ("name", "changed", "text"),
    [(name, changed, text) for name, rows in WRONG.items() for changed, text in rows],
    ids=lambda value: re.sub(r"\W+", "_", value)[:60] if isinstance(value, str) else "",
)
def test_wrappers_refuse(name, changed, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        getattr(ops, name)(**{**good_call(name), **changed})


# What would read or write outside its memory must be stopped by the compiled op itself, for whoever calls it directly.
UNSAFE = {
    "accumulate_linear_": [
        {"omega": torch.zeros(3, 5)},
        {"omega": torch.zeros(4, 3).mT},
        {"omega": torch.zeros(3, 4).int()},
        {"omega": torch.zeros(3, 4).double()},
        {"omega": torch.zeros(12)},
        {"grad_output": torch.zeros(2, 5)},
        {"grad_output": torch.zeros(2, 6, 3)},
        {"input": torch.zeros(3, 5, 4)},
        {"input": torch.zeros(2, 5, 4).bfloat16()},
        {"input": torch.zeros(2, 5, 4).long()},
    ],
    "accumulate_conv_": [
        {"omega": torch.zeros(3, 4)},
        {"omega": torch.zeros(3, 4, 2, 3)},
        {"omega": torch.zeros(3, 4, 2, 2).contiguous(memory_format=torch.channels_last)},
        {"input": torch.zeros(2, 4, 4, 5)},
        {"input": torch.zeros(1, 4, 5, 5)},
        {"grad_output": torch.zeros(2, 3, 4, 5)},
        {"grad_output": torch.zeros(2, 3, 16)},
        {"stride": [0, 1]},
        {"stride": [1]},
        {"padding": [-1, 0]},
        {"dilation": [0, 1]},
        {"dilation": [9, 9]},
        {"groups": 0},
        {"groups": 2},
    ],
    "accumulate_embedding_": [
        {"omega": torch.zeros(3, 5)},
        {"ids": torch.full((2, 5), 3)},
        {"ids": torch.full((2, 5), -1)},
        {"ids": torch.zeros(2, 6).long()},
        {"ids": torch.zeros(2, 5).int()},
        {"ids": torch.zeros(10).long()},
        {"grad_output": torch.zeros(3, 5, 4)},
    ],
    "accumulate_affine_": [
        {"omega_weight": None, "omega_bias": None},
        {"omega_bias": torch.zeros(2)},
        {"omega_bias": torch.zeros(3).double()},
        {"omega_weight": torch.zeros(6)[::2]},
        {"input": None},
        {"input": torch.zeros(2, 4, 3, 4)},
        {"grad_output": torch.zeros(2, 4, 5)},
        {"mean": torch.zeros(3, 1)},
        {"mean": torch.zeros(2, 4, 3, 5).double()},
        {"rstd": torch.zeros(2, 4, 3, 4)},
    ],
}


@compiled
@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in UNSAFE.items() for row in range(len(rows))])
def test_compiled_ops_refuse(name, row):
    call = {**good_call(name), **UNSAFE[name][row]}
    with pytest.raises((RuntimeError, ValueError)):
        getattr(torch.ops.mas_fast, name)(*call.values())


SHORT_SET = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import test_ops
    from mas_fast.kernels import ops
    import torch
    torch.set_num_threads(2)
    print(ops.cpu_capability())
    for dtype in test_ops.DTYPES:
        for square in (False, True):
            for name in ("ragged", "one_position", "longer_than_a_block", "ones"):
                test_ops.test_linear(name, dtype, square)
            for name in ("1d_strided", "2d_ragged", "2d_pointwise", "2d_grouped", "3x3", "3d", "depthwise_2d"):
                test_ops.test_conv(name, dtype, square)
            for name in ("ragged", "wide"):
                test_ops.test_embedding(name, dtype, square)
            for name in ("ragged", "wide", "channels"):
                test_ops.test_affine(name, dtype, square)
    test_ops.test_hand_computed_linear()
"""


def run_python(script, *args, **environment):
    folder = os.path.dirname(__file__)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), folder, *args],
        # Threads that wait must not keep others from the cores.
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@compiled
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets(isa):
    ran = run_python(SHORT_SET, MAS_FAST_CPU_ISA=isa)[0]
    if isa != "baseline" and ran != isa:
        pytest.skip(f"{isa} is not in this build, or this machine does not run it: {ran} ran")
    assert isa in (ran, "baseline")


PEAK = """
    import resource
    import sys
    import torch
    from mas_fast.kernels import ops
    torch.set_num_threads(2)
    samples, size = int(sys.argv[2]), 1024  # Ω of 1 Mi entries
    def rows(n, *shape):
        return torch.zeros(1, *shape).expand(n, *shape)
    def run(n):
        ops.accumulate_linear_(omega, rows(n, 4, size), rows(n, 4, size))
        ops.accumulate_linear_(omega, rows(n, 1, size), rows(n, 1, size))
        ops.accumulate_conv_(omega.view(512, 512, 2, 2), rows(n, 512, 1, 1), rows(n, 512, 2, 2), [1, 1], [0, 0], [1, 1])
        ops.accumulate_embedding_(omega, rows(n, 4, size), rows(n, 4).long())
        ops.accumulate_affine_(omega[0], omega[1], rows(n, 4, size, 1), rows(n, 4, size, 1))
    omega = torch.zeros(size, size)
    run(2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(samples)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs getrusage")
def test_memory_does_not_grow_with_samples_times_parameters():
    unit = 1 if sys.platform == "darwin" else 1024
    growth = {samples: int(run_python(PEAK, str(samples))[0]) * unit for samples in (8, 512)}
    product = 512 * 2**20 * 4  # N × |θ| in bytes: 2 GiB
    # 512 samples of 4 × 1024 entries, converted or packed, are 8 MiB; the reference holds a chunk of 64 MiB at once,
    # twice for its magnitude, and once more for the product on its way.
    assert growth[512] - growth[8] < (product / 64 if ops.cpu_capability() else product / 8)
