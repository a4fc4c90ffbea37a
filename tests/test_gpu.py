"""The Triton kernels behind the ops: on a GPU if there is one, else in Triton's interpreter on the CPU."""

import itertools
import math
import os

import pytest
import torch
from compare import assert_as_accurate, truth_of
from test_ops import (
    AFFINE,
    CONV,
    CONV_LAYOUTS,
    CONV_SMALL,
    EMBEDDING,
    LAYOUTS,
    LINEAR,
    OMEGA_LAYOUTS,
    STATISTICS,
    check,
    conv_case,
    data,
    omega_of,
)
from torch import nn

import mas_fast

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("MAS_FAST_TEST_BUILD") == "python",
    reason="Triton kernels are the same in every build: tested with the compiled one",
)

from mas_fast.kernels import gpu, ops  # noqa: E402
from mas_fast.kernels.gpu import common, embedding, hopper, linear, tuning  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SQUARE = pytest.mark.parametrize("square", [False, True], ids=["abs", "square"])
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# The interpreter takes some milliseconds for each program and step.
LONG = {
    "many_samples": (200, 2, 9, 17),
    "one_position_many_samples": (600, 1, 9, 17),
    "several_blocks": (2, 900, 6, 40),
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Have the ops run the Triton kernels on CPU tensors too, as the dispatcher does for CUDA tensors."""
    if DEVICE == "cpu":
        for name in gpu.__all__:
            monkeypatch.setattr(torch.ops.mas_fast, name, getattr(gpu, name))


@SQUARE
@DTYPE
@pytest.mark.parametrize("name", LINEAR)
def test_linear(name, dtype, square):
    torch.manual_seed(0)
    n, t, o, i = LONG.get(name, LINEAR[name])
    args = data(n, t, o, dtype=dtype), data(n, t, i, dtype=dtype)
    check("accumulate_linear_", [omega_of(o, i)], args, {"square": square}, t, n, DEVICE)


# In a process of its own, asked for by MAS_FAST_HOPPER=1: what has not run yet could wait for ever.
needs_hopper = pytest.mark.skipif(
    DEVICE == "cpu" or torch.cuda.get_device_capability() != (9, 0) or os.environ.get("MAS_FAST_HOPPER") != "1",
    reason="Gluon needs sm_90, is not interpreted, and runs where MAS_FAST_HOPPER=1 asks for it",
)


@needs_hopper
@SQUARE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(3, 5, 8, 8), (2, 16, 64, 128), (7, 33, 72, 136), (1, 1, 200, 24), (600, 1, 40, 16), (64, 64, 512, 384),
     (5, 300, 200, 264), (300, 17, 8, 16), (2, 2048, 128, 128)],
    ids=str,
)  # fmt: skip
def test_hopper(shape, dtype, square):
    torch.manual_seed(0)
    n, t, o, i = shape
    delta, x = data(n, t, o, dtype=dtype), data(n, t, i, dtype=dtype)
    assert hopper.suits(delta.to(DEVICE), x.to(DEVICE))
    check("accumulate_linear_", [omega_of(o, i)], (delta, x), {"square": square}, t, n, DEVICE)


@pytest.mark.parametrize(
    ("strides", "fits"),
    [((640, 64, 1), True), ((64, 128, 1), True), ((640, 1, 10), False), ((0, 64, 1), False), ((640, 60, 1), False)],
)
def test_copy_engine_takes_rows_in_one_piece_on_multiples_of_16_bytes(strides, fits):
    storage = torch.zeros(4096, dtype=torch.bfloat16)
    data = storage.as_strided((3, 10, 64), strides)
    assert hopper.is_boxed(data) == fits
    assert not hopper.is_boxed(storage[1:].as_strided((3, 10, 64), strides))
    assert not hopper.suits(data, data)  # not on Hopper


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_boxes_cover_all_positions_and_the_tile(dtype):
    for positions, step in ((1, 16), (16, 16), (17, 32), (4096, 64)):
        assert hopper.step_for(positions) == step
        box = hopper.describe(torch.zeros(2, positions, 64, dtype=dtype), 64, step)
        assert (list(box.shape), list(box.block_shape)) == ([2, positions, 64], [1, step, 64])
    assert [hopper.groups_for(outputs) for outputs in (1, 128, 129, 4096)] == [2, 2, 3, 3]


@pytest.mark.parametrize("omega_layout", OMEGA_LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["ragged", "one_position"])
def test_linear_memory(name, layout, omega_layout):
    torch.manual_seed(0)
    n, t, o, i = LINEAR[name]
    delta, x = LAYOUTS[layout](data(n, t, o).float()), LAYOUTS[layout](data(n, t, i).float())
    check("accumulate_linear_", [OMEGA_LAYOUTS[omega_layout](omega_of(o, i))], (delta, x), {}, t, n, DEVICE)


def test_linear_expanded_data():
    delta, x = data(1, 6, 5).float().expand(4, 6, 5), data(4, 1, 7).float().expand(4, 6, 7)
    check("accumulate_linear_", [omega_of(5, 7)], (delta, x), {}, 6, 4, DEVICE)


@SQUARE
@DTYPE
@pytest.mark.parametrize("name", CONV_SMALL if DEVICE == "cpu" else CONV)
def test_conv(name, dtype, square):
    torch.manual_seed(0)
    omega, delta, x, geometry, positions, n = conv_case(name, dtype)
    check("accumulate_conv_", [omega], (delta, x, *geometry), {"square": square}, positions, n, DEVICE)


@pytest.mark.parametrize("layout", CONV_LAYOUTS)
@pytest.mark.parametrize("name", ["1d", "2d_ragged", "2d_grouped", "3d", "depthwise_2d", "depthwise_multiplier"])
def test_conv_memory(name, layout):
    torch.manual_seed(0)
    omega, delta, x, geometry, positions, n = conv_case(name, torch.float32)
    for args in ((CONV_LAYOUTS[layout](delta), x), (delta, CONV_LAYOUTS[layout](x))):
        check("accumulate_conv_", [omega.clone()], (*args, *geometry), {}, positions, n, DEVICE)


@SQUARE
@DTYPE
@pytest.mark.parametrize("name", EMBEDDING)
def test_embedding(name, dtype, square):
    torch.manual_seed(0)
    n, t, v, d = EMBEDDING[name] if name != "long" else (2, 300, 11, 9)
    ids = torch.randint(0, v, (n, t))
    for padding_idx in (-1, v - 1):
        args = data(n, t, d, dtype=dtype), ids, padding_idx
        check("accumulate_embedding_", [omega_of(v, d)], args, {"square": square}, t, n, DEVICE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("omega_layout", OMEGA_LAYOUTS)
def test_embedding_memory(layout, omega_layout):
    torch.manual_seed(0)
    n, t, v, d = EMBEDDING["ragged"]
    ids = torch.randint(0, v, (n, t), dtype=torch.int32)
    for layout_of_ids in (ids, ids.mT.contiguous().mT, ids[:1].expand(n, t)):
        args = LAYOUTS[layout](data(n, t, d).float()), layout_of_ids
        check("accumulate_embedding_", [OMEGA_LAYOUTS[omega_layout](omega_of(v, d))], args, {}, t, n, DEVICE)


def test_embedding_in_slices_of_its_columns(monkeypatch):
    monkeypatch.setattr(embedding, "WORKSPACE", 4 * 27 * 33)
    torch.manual_seed(0)
    args = data(3, 9, 70).float(), torch.randint(0, 5, (3, 9))
    check("accumulate_embedding_", [omega_of(5, 70)], args, {}, 9, 3, DEVICE)


@SQUARE
@DTYPE
@pytest.mark.parametrize("name", AFFINE)
def test_affine(name, dtype, square):
    torch.manual_seed(0)
    n, r, k, s = AFFINE[name] if name != "many_samples" else (20, 1, 17, 1)
    delta, x = data(n, r, k, s, dtype=dtype), data(n, r, k, s, dtype=dtype)
    for statistics in STATISTICS.values():
        mean, rstd = (None if t is None else t.float() for t in statistics(n, r, k, s))
        omegas = [omega_of(k), omega_of(k)]
        check("accumulate_affine_", omegas, (delta, x, mean, rstd), {"square": square}, r * s, n, DEVICE)
    check("accumulate_affine_", [omega_of(k), None], (delta, x), {"square": square}, r * s, n, DEVICE)
    check("accumulate_affine_", [None, omega_of(k)], (delta,), {"square": square}, r * s, n, DEVICE)


@pytest.mark.parametrize("layout", CONV_LAYOUTS)
@pytest.mark.parametrize("name", ["ragged", "channels", "wide"])
def test_affine_memory(name, layout):
    torch.manual_seed(0)
    n, r, k, s = AFFINE[name]
    delta, x = (CONV_LAYOUTS[layout](data(n, r, k, s).float()) for _ in range(2))
    args = delta, x, data(n, r, 1, 1).float(), data(k, 1).float()
    check("accumulate_affine_", [omega_of(k), omega_of(k)], args, {}, r * s, n, DEVICE)


def test_float16_does_not_overflow_in_between():
    # Each product is 6e8, far above what float16 holds.
    delta, x = torch.full((2, 5, 3), 3e4, dtype=torch.float16), torch.full((2, 5, 4), 2e4, dtype=torch.float16)
    for t in (5, 1):
        check("accumulate_linear_", [torch.zeros(3, 4)], (delta[:, :t], x[:, :t]), {}, t, 2, DEVICE)


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
@pytest.mark.parametrize("sms", [1, 3, 64])
def test_any_split_of_the_samples(monkeypatch, samples, sms):
    monkeypatch.setattr(common, "num_sms", lambda device: sms)
    torch.manual_seed(0)
    args = data(samples, 3, 5).float(), data(samples, 3, 6).float()
    check("accumulate_linear_", [omega_of(5, 6)], args, {}, 3, samples, DEVICE)
    omega, delta, x, geometry, positions, n = conv_case("2d_grouped", torch.float32)
    check("accumulate_conv_", [omega], (delta, x, *geometry), {}, positions, n, DEVICE)


def test_the_same_bits_on_every_run():
    torch.manual_seed(0)
    delta, x = data(9, 17, 20).float().to(DEVICE), data(9, 17, 30).float().to(DEVICE)
    ids = torch.randint(0, 4, (9, 17)).to(DEVICE)
    runs = []
    for _ in range(2):
        weight, table, bias = (torch.zeros(*s, device=DEVICE) for s in ((20, 30), (4, 20), (20,)))
        ops.accumulate_linear_(weight, delta, x)
        ops.accumulate_embedding_(table, delta, ids)
        ops.accumulate_affine_(None, bias, delta.unsqueeze(-1))
        runs.append((weight, table, bias))
    assert all(map(torch.equal, *runs))


def test_offsets_beyond_32_bits():
    # Rows so far apart that an entry of the last one needs 64 bits to be found; nothing of it is memory of its own.
    far = 2**30 + 1
    memory = torch.empty(3 * far if DEVICE == "cuda" else 1, dtype=torch.float16, device=DEVICE)
    if DEVICE == "cpu":
        pytest.skip("needs 6 GiB of a GPU")
    delta = memory.as_strided((1, 3, 4), (3, far, 1)).normal_()
    x = torch.randn(1, 3, 5, device=DEVICE, dtype=torch.float16)
    omega = torch.zeros(4, 5, device=DEVICE)
    ops.accumulate_linear_(omega, delta, x)
    truth = (delta.double().mT @ x.double()).abs().sum(0)
    assert_as_accurate(omega, truth, truth.float(), 1e-6)


def test_tiles_of_every_shape_are_powers_of_two_that_fit_the_registers():
    for o, i, t, dtype in itertools.product((1, 64, 4096), (1, 64, 4096), (2, 16, 17, 4096), DTYPES):
        tile = linear.tile_for(o, i, t, dtype)
        assert all(math.log2(n).is_integer() for n in tile[:3])
        assert tile.outputs * tile.inputs / (32 * tile.warps) <= 64


def test_stages_fit_the_shared_memory():
    assert linear.fitted(linear.WIDE, 2, 232448) == linear.WIDE
    assert linear.fitted(linear.WIDE, 2, 101376).stages == 3  # as on compute capability 8.6
    assert linear.fitted(linear.WIDE, 2, 1).stages == 1


def test_autotuning_measures_once_for_shapes_of_a_kind(tmp_path, monkeypatch):
    file = tmp_path / "new" / "tiles.json"
    measured = []

    def time_ms(call):
        call()
        return {linear.NARROW: 2.0, linear.WIDE: 1.0}[measured[-1]]

    def fastest(*sizes):
        key = tuning.bucket(*sizes)
        return tuning.fastest(key, [linear.NARROW, linear.WIDE], measured.append, file, time_ms)

    assert fastest(4096, 100) == linear.WIDE
    assert measured == [linear.NARROW, linear.WIDE]
    assert fastest(3000, 128) == linear.WIDE
    monkeypatch.setattr(tuning, "_chosen", {})  # as another process
    assert fastest(4096, 100) == linear.WIDE
    assert len(measured) == 2
    fastest(4096, 129)
    assert len(measured) == 4
    assert [path.name for path in file.parent.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize("content", ['{"half', "[1, 2]", '{"any": "fast"}', '{"any": -1}', '{"any": 2}'])
def test_autotuning_names_a_file_that_it_cannot_read(tmp_path, monkeypatch, content):
    monkeypatch.setattr(tuning, "_chosen", {})
    file = tmp_path / "tiles.json"
    file.write_text(content.replace("any", "any of [1, 2]"))
    with pytest.raises(RuntimeError, match=r"tiles\.json cannot be read .* delete it"):
        tuning.fastest("any", [1, 2], print, file, lambda call: 0.0)


def test_autotuning_names_a_folder_that_it_cannot_write_to(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "_chosen", {})
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match=r"tiles\.json cannot be written .* MAS_FAST_CACHE"):
        tuning.fastest("any", [1, 2], print, tmp_path / "file" / "tiles.json", lambda call: 0.0)


def test_autotuning_compares_what_is_chosen_without_it_first():
    for dtype, positions in itertools.product(DTYPES, (2, 17, 512)):
        candidates = linear.candidates_for(4096, 4096, positions, dtype)
        assert candidates[0] == linear.tile_for(4096, 4096, positions, dtype)
        assert len(set(candidates)) == len(candidates) <= 6


class Net(nn.Module):
    """A parameter of every op: embedding, attention's linear layers, norms, convolutions, depthwise and dense."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.depthwise = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.conv = nn.Conv1d(8, 6, 3, stride=2)
        self.norm = nn.GroupNorm(2, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids):
        hidden = self.layer(self.embedding(ids)).mT
        return self.head(self.norm(self.conv(self.depthwise(hidden)).relu()).mean(-1))


@SQUARE
def test_a_whole_model(square):
    torch.manual_seed(0)
    model, ids = Net(), torch.randint(0, 11, (5, 7))
    statistic = "square" if square else "abs"
    truth = truth_of(model, ids, statistic=statistic)
    baseline = truth_of(model, ids, statistic=statistic, dtype=None)
    importance = mas_fast.estimate_importance(model.to(DEVICE), [ids.to(DEVICE)], statistic=statistic)
    for name, omega in importance.items():
        assert_as_accurate(omega.cpu(), truth[name], baseline[name], 1e-5)
