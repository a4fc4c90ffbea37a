"""The CUDA kernels without a GPU: their walk through rows, chunks and groups, and their arithmetic, run on the host."""

import ctypes
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from mas_fast import reference_steps as reference

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("theta", "grad", "omega", "anchor", "state0", "state1", "state2")
STORAGES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8]
BLOCK = reference.BLOCK
# Less than a group, ragged ones, a chunk, more than a chunk, and nothing; entry 2 has no Ω.
SIZES = (1, 7, 130, 0, 8192, 8195, 20_001, 0)
# (θ, Ω, θ*, gradient, state)
DTYPES = {
    "fp32": (torch.float32,) * 5,
    "small": (torch.float32, torch.uint8, torch.bfloat16, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16, torch.float32),
    "bf16_small": (torch.bfloat16, torch.uint8, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16,) * 5,
    "fp64": (torch.float64,) * 5,
    "fp64_small": (torch.float64, torch.uint8, torch.bfloat16, torch.float64, torch.float64),
    "fp64_omega": (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float32),
}


class Row(ctypes.Structure):
    """Row of csrc/cuda/rows.h."""

    _fields_ = [
        ("data", ctypes.c_void_p * len(PLACES)),
        ("scales", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("first_chunk", ctypes.c_int64),
        ("storage", ctypes.c_uint8 * len(PLACES)),
        ("flags", ctypes.c_uint8 * 9),
    ]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The kernels' code, compiled for the host."""
    library = tmp_path_factory.mktemp("cuda_rows") / "cuda_rows.so"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}"]
    command = [*compiler, *flags]
    try:
        done = subprocess.run(
            [*command, ROOT / "tests/cuda_rows.cpp", "-o", library], capture_output=True, text=True, check=False
        )
    except OSError as error:
        pytest.skip(f"compiles: {error}")
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))
    assert loaded.row_bytes() == ctypes.sizeof(Row)
    assert loaded.chunk_entries() in SIZES
    return loaded


def placed(tensor, offset):
    """Copy a tensor to `offset` entries after an aligned address, with numbers around it that must stay."""
    memory = torch.full((offset + tensor.numel() + 16,), 77, dtype=tensor.dtype)
    return memory[offset : offset + tensor.numel()].copy_(tensor)


def draw(dtypes, offset):
    """Draw θ, gradients, Ω, scales, θ* and three states; one entry has no Ω."""
    torch.manual_seed(0)
    of_theta, of_omega, of_anchor, of_grad, of_state = dtypes
    thetas = [placed(torch.randn(size).to(of_theta), offset) for size in SIZES]
    grads = [placed(torch.randn(size).to(of_grad), offset) for size in SIZES]
    anchors = [placed(torch.randn(size).to(of_anchor), offset) for size in SIZES]
    omegas, scales = [torch.randn(size).square() for size in SIZES], [torch.empty(0)] * len(SIZES)
    if of_omega == torch.uint8:
        omegas, scales = map(list, zip(*map(reference.encode_omega, omegas), strict=True))
    omegas = [placed(omega.to(of_omega), offset) for omega in omegas]
    omegas[2], scales[2], anchors[2] = omegas[2][:0], torch.empty(0), anchors[2][:0]
    states = [[placed(torch.rand(size).to(of_state), offset) for size in SIZES] for _ in range(3)]
    return thetas, grads, omegas, scales, anchors, states


def copies(tensors, offset):
    return [placed(tensor, offset) for tensor in tensors]


def pointer(tensor):
    return tensor.data_ptr() if tensor.numel() else None


def rows_of(scales, **lists):
    """Return an array of Row; a list that is not given is not there."""
    rows = (Row * len(SIZES))()
    for i, row in enumerate(rows):
        row.count = len(lists["theta"][i])
        row.scales = pointer(scales[i])
        for place, name in enumerate(PLACES):
            if name in lists:
                row.data[place] = pointer(lists[name][i])
                row.storage[place] = STORAGES.index(lists[name][i].dtype)
    return rows


def call(function, rows, lams, *options, corrections=None):
    """Run a function of the library; return float64 [rows, 2]."""
    numbers = torch.zeros(len(lams), 3, dtype=torch.float64)
    numbers[:, 0] = torch.tensor(lams, dtype=torch.float64)
    if corrections is not None:
        numbers[:, 1:] = corrections
    result = torch.zeros(len(lams), 2, dtype=torch.float64)
    words = [ctypes.c_double(option) if isinstance(option, float) else option for option in options]
    function(
        rows, ctypes.c_void_p(numbers.data_ptr()), ctypes.c_int64(len(lams)), *words, ctypes.c_void_p(result.data_ptr())
    )
    return result


def assert_same(actual, expected):
    """Compare lists of tensors: a last bit of the arithmetic, or of what memory keeps, may differ."""
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        around = one._base.clone()
        around[one.storage_offset() : one.storage_offset() + len(one)] = 77
        assert (around == 77).all()
        wide = one.dtype if one.dtype == torch.float64 else torch.float32
        eps = torch.finfo(one.dtype).eps
        torch.testing.assert_close(one.to(wide), other.to(wide), rtol=2 * eps + 1e-6 * (eps > 1e-9), atol=8 * eps)


LAMS = [0.3 + 0.1 * i for i in range(len(SIZES))]
cases = pytest.mark.parametrize(
    ("dtypes", "offset"),
    # Off by one entry, nothing is aligned for groups; by eight, everything is.
    [pytest.param(DTYPES[name], offset, id=f"{name}-{offset}") for name in DTYPES for offset in (0, 1, 8)],
)


@cases
@pytest.mark.parametrize("mode", ["add", "overwrite", "value"])
def test_penalty(host, dtypes, offset, mode):
    thetas, grads, omegas, scales, anchors, _ = draw(dtypes, offset)
    expected, add = [] if mode == "value" else [grad.clone() for grad in grads], mode == "add"
    factors = torch.rand(len(SIZES), dtype=torch.float64)
    values = reference.penalty_grad_(expected, thetas, omegas, scales, anchors, LAMS, factors, add)
    lists = {} if mode == "value" else {"grad": copies(grads, offset)}
    rows = rows_of(scales, theta=thetas, omega=omegas, anchor=anchors, **lists)
    for row in rows:
        # As csrc/cuda/penalty.cu does.
        if not row.data[PLACES.index("omega")] and mode != "overwrite":
            row.count = 0
    actual = call(host.penalty_grad, rows, LAMS, ctypes.c_void_p(factors.data_ptr()), add)
    torch.testing.assert_close(actual, values, rtol=2e-6, atol=0)
    assert_same(lists.get("grad", []), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lost_entries_are_counted(host, dtype):
    largest = torch.finfo(dtype).max
    thetas = [torch.full((size,), 3.0) for size in SIZES]
    omegas, anchors = [torch.ones(size) for size in SIZES], [torch.zeros(size) for size in SIZES]
    grads = [torch.zeros(size, dtype=dtype) for size in SIZES]
    # Lost, lost already, nan before, and finite after all.
    grads[5][:4] = torch.tensor([largest, float("inf"), float("nan"), 1.0])
    lams, scales = [largest / 8.0] * len(SIZES), [torch.empty(0)] * len(SIZES)
    expected = [grad.clone() for grad in grads]
    values = reference.penalty_grad_(expected, thetas, omegas, scales, anchors, lams)
    rows = rows_of(scales, theta=thetas, omega=omegas, anchor=anchors, grad=grads)
    actual = call(host.penalty_grad, rows, lams, None, True)
    assert values[5, 1] == 1
    assert torch.equal(actual[:, 1], values[:, 1])


SGD = {
    "plain": (0.0, 0.0, 0.0, False, False, False, False),
    "first": (0.9, 0.5, 0.1, True, False, True, False),
    "nesterov": (0.9, 0.0, 0.0, True, True, False, False),
    "implicit": (0.9, 0.1, 0.01, False, False, False, True),
}


@cases
@pytest.mark.parametrize("options", SGD.values(), ids=SGD)
def test_sgd(host, dtypes, offset, options):
    thetas, grads, omegas, scales, anchors, (momenta, *_) = draw(dtypes, offset)
    expected, buffers = [t.clone() for t in thetas], [t.clone() for t in momenta]
    own = omegas, scales, anchors, LAMS
    values = reference.sgd_step_(expected, grads, buffers if options[0] else [], *own, 0.1, *options)
    theta, state = copies(thetas, offset), copies(momenta, offset)
    lists = {"state0": state} if options[0] else {}
    rows = rows_of(scales, theta=theta, grad=grads, omega=omegas, anchor=anchors, **lists)
    actual = call(host.sgd_step, rows, LAMS, 0.1, *options)
    torch.testing.assert_close(actual, values, rtol=2e-6, atol=0)
    assert_same([*theta, *state], [*expected, *buffers])


ADAMW = {
    "plain": (0.0, False, False, False),
    "amsgrad": (0.1, True, True, False),
    "implicit": (0.01, True, False, True),
}


@cases
@pytest.mark.parametrize("options", ADAMW.values(), ids=ADAMW)
def test_adamw(host, dtypes, offset, options):
    thetas, grads, omegas, scales, anchors, states = draw(dtypes, offset)
    lr, beta1, beta2, eps = 0.01, 0.9, 0.99, 1e-3
    steps = [1.0 + i for i in range(len(SIZES))]
    corrections = [[lr / (1 - beta1**t), 1 / (1 - beta2**t) ** 0.5] for t in steps]
    expected, kept = [t.clone() for t in thetas], [[t.clone() for t in state] for state in states]
    own = omegas, scales, anchors, LAMS
    values = reference.adamw_step_(expected, grads, *kept, *own, steps, lr, beta1, beta2, eps, *options)
    theta, state = copies(thetas, offset), [copies(state, offset) for state in states]
    lists = {f"state{i}": state[i] for i in range(3 if options[1] else 2)}
    rows = rows_of(scales, theta=theta, grad=grads, omega=omegas, anchor=anchors, **lists)
    corrections = torch.tensor(corrections, dtype=torch.float64)
    actual = call(host.adamw_step, rows, LAMS, lr, beta1, beta2, eps, *options, corrections=corrections)
    torch.testing.assert_close(actual, values, rtol=2e-6, atol=0)
    assert_same(theta + sum(state, []), expected + sum(kept, []))


@pytest.mark.parametrize("scale", [1.0, 3e-39, 1e-45, 3e38, 0.0])
def test_codes(host, scale):
    values = torch.rand(BLOCK) * scale
    values[5] = scale
    expected, scales = reference.encode_omega(values)
    codes = torch.empty_like(expected)
    largest = ctypes.c_float(float(scales[0]))
    host.encode(ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(BLOCK), largest, ctypes.c_void_p(codes.data_ptr()))
    assert torch.equal(codes, expected)
