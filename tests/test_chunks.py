"""Batches cut along their samples inside a pass: the same Ω, fewer samples at a time, and what must not be cut."""

import warnings
import weakref
from collections import UserDict

import pytest
import torch
from cases import DIRECT, JOINED, LOOPED, Lambda, build
from compare import truth_of, worst_error
from torch import nn

from mas_fast import CaptureError, chunks, estimate_importance, verify
from mas_fast.errors import LoopWarning

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

CASES = {**DIRECT, **JOINED, **LOOPED}
N = 11


@pytest.fixture
def pairs(monkeypatch):
    """Have "auto" cut everything that it may into pairs."""
    for name in ("_BYTES_A_TENSOR", "_BYTES_A_TENSOR_OF_STEPS", "_TIMES_THE_WEIGHTS"):
        monkeypatch.setattr(chunks, name, 0)


class Seen(nn.Module):
    """Notes how many samples each forward with a gradient that is not for measuring sees."""

    def __init__(self, net=None):
        super().__init__()
        torch.manual_seed(1)
        self.net = net or nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        self.rows = []

    def forward(self, x, scale=None, **others):
        self.rows.append(len(x))
        return self.net(x if scale is None else x * scale)


def batch(n=N, *shape, seed=2):
    return torch.randn(n, *(shape or (5,)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(model, data, truth, **options):
    importance = estimate_importance(model, data, dtype=torch.float64, **options)
    return worst_error(importance, truth) <= 1e-11 and importance.num_samples


# The same Ω


@pytest.mark.parametrize("chunk_size", [*range(1, N + 2), 10**9, "auto", None, torch.tensor(3)], ids=str)
def test_omega_is_that_of_the_loop_for_every_size(chunk_size):
    model = Seen()
    truth = truth_of(model, batch())
    assert exact(model, [batch()], truth, chunk_size=chunk_size) == N


@pytest.mark.parametrize("name", CASES)
def test_every_case_cut_into_pairs(name, pairs):
    model, data, *_ = build(CASES[name])
    truth = truth_of(model, data)
    # Twice, so that all cases are long enough to be cut.
    assert exact(model, [torch.cat([data, data])], truth) == 2 * len(data)


@pytest.mark.parametrize("name", CASES)
def test_every_case_in_chunks_of_three(name):
    model, data, *_ = build(CASES[name])
    assert exact(model, [data], truth_of(model, data), chunk_size=3) == len(data)


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("statistic", ["abs", "square"])
def test_options_hold_for_every_chunk(scope, statistic, pairs):
    model = Seen()
    whole = estimate_importance(model, [batch()], scope=scope, statistic=statistic, chunk_size=None)
    model.rows.clear()
    cut = estimate_importance(model, [batch()], scope=scope, statistic=statistic)
    assert worst_error(cut, whole) <= 1e-6 and max(model.rows) == 3


def test_callables_and_own_forwards_are_cut_by_a_number():
    model = Seen()
    truth = truth_of(model, batch(), objective=lambda y: y[:, 0].exp())
    options = {"objective": lambda y: y[:, 0].exp(), "forward": lambda m, b: m(b["x"]), "chunk_size": 4}
    assert exact(model, [{"x": batch(), "text": "a"}] * 2, truth, **options) == 2 * N
    assert model.rows[-3:] == [4, 4, 3]


def test_looped_parameters_loop_over_the_samples_of_a_chunk():
    model, data, names = build(LOOPED["custom_function"])
    with pytest.warns(LoopWarning, match="2 more for these 2 samples"):
        importance = estimate_importance(model, [data], chunk_size=2)
    assert {row.name for row in importance.coverage if row.rule == "loop"} == names


# How many samples run at a time


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(3, [3]), (4, [2, 2]), (5, [2, 3]), (6, [2, 2, 2]), (7, [2, 2, 3])],
    ids=str,
)
def test_auto_never_leaves_a_sample_by_itself(rows, expected, pairs):
    model = Seen()
    estimate_importance(model, [batch(), batch(rows)])
    assert model.rows[-len(expected) :] == expected


def test_what_is_left_over_is_shared_out(monkeypatch):
    monkeypatch.setattr(chunks, "_TIMES_THE_WEIGHTS", 0)
    # The tanh of each sample: 32 bytes in one tensor, which is to hold 256 in a chunk.
    monkeypatch.setattr(chunks, "_BYTES_A_TENSOR", 256)
    model = Seen()
    for rows, expected in ((16, [8, 8]), (20, [10, 10]), (23, [7, 8, 8]), (26, [8, 9, 9]), (13, [6, 7]), (11, [11])):
        # The first of its size may run twice.
        estimate_importance(model, [batch(rows), batch(rows)])
        assert model.rows[-len(expected) :] == expected


@pytest.mark.parametrize(
    ("rows", "size", "expected"),
    [
        (64, 39, 2),
        (64, 43, 1),
        (256, 28, 8),
        (32, 12, 2),
        (64, 12, 4),
        (256, 12, 21),
        (128, 42, 4),
        (48, 40, 1),
        (7, 2, 3),
        (11, 2, 5),
        (4, 2, 2),
        (10**6 + 3, 2, 500001),
        (4, 10**9, 0),
    ],
)
def test_parts_are_near_the_size_and_of_one_length_where_they_can_be(rows, size, expected):
    assert chunks._count_parts(rows, size) == expected


def test_small_batches_run_whole():
    model = Seen()
    estimate_importance(model, [batch(64), batch(64)])
    assert model.rows[-1] == 64


def test_a_large_batch_of_images_is_cut():
    model = Seen(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 1024, 2)))
    estimate_importance(model, [torch.randn(256, 3, 32, 32)])
    assert max(model.rows) <= 64


def test_weights_and_masks_do_not_count():
    """What a forward keeps whatever the number of samples, however large, makes no chunk smaller."""
    torch.manual_seed(0)
    mask, w = torch.rand(700, 700), torch.randn(700, 700)
    large = Lambda(lambda m, x: m.head(x) + (mask * m.w.exp()).mean() * x[:, :2], w=w, head=nn.Linear(5, 2))
    cutter = chunks.Chunks(large, "auto", is_default=True)
    assert len(cutter.cut(torch.randn(4096, 5))) == 1


def test_large_weights_make_large_chunks():
    """Each chunk reads and writes all of Ω: the activations of one must outweigh the weights."""
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024))
    parts = chunks.Chunks(model, "auto", is_default=True).cut(torch.zeros(32768, 1024))
    # The ReLU's outputs are all that grows.
    wanted = chunks._TIMES_THE_WEIGHTS * sum(p.nbytes for p in model.parameters())
    assert len(parts) > 1 and all(0.75 * wanted <= 1024 * 4 * len(part) <= 1.25 * wanted for part in parts)


def test_measuring_lets_go_of_what_the_forward_kept():
    # A call that saves its own output, as tanh and attention do, must not come to hold itself.
    made = []

    class Model(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            made.append(weakref.ref(y))
            return y.square()

    estimate_importance(Model(nn.Linear(5, 4), nn.Tanh()).double(), [batch()])
    assert len(made) > 3
    assert not any(output() is not None for output in made)


def test_lengths_of_a_sequence_are_not_measured_one_by_one(pairs, monkeypatch):
    measured = []
    run = chunks.Chunks._run
    monkeypatch.setattr(chunks.Chunks, "_run", lambda self, b: measured.append(b.shape) or run(self, b))
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)).double()
    data = [torch.randint(0, 9, (4, length)) for length in range(8, 34)]
    estimate_importance(model, data)
    assert measured == [(rows, length) for length in (8, 16, 32) for rows in (1, 2)]


# What "auto" leaves whole


def own(m, x):
    return m(x)


def time_first(m, x):
    return m.head(torch.tanh(x)).transpose(0, 1)


WHOLE = {
    "own_forward": (lambda: Seen(), batch(8), {"forward": own}),
    "none": (lambda: Seen(), batch(8), {"chunk_size": None}),
    "per_batch": (lambda: Seen(), batch(8), {"per": "batch"}),
    "rows_of_their_own": (
        lambda: Seen(Lambda(lambda m, x: m.l(x).reshape(4, 2, 3), l=nn.Linear(5, 3).double())),
        batch(8),
        {},
    ),
    "lists": (lambda: Seen(), {"x": batch(8), "names": ["a"] * 8}, {}),
    "uneven": (lambda: Seen(), {"x": batch(8), "scale": torch.ones(1, 5)}, {}),
    "scalar": (lambda: Seen(), {"x": batch(8), "scale": torch.tensor(2.0)}, {}),
    "sparse": (
        lambda: Seen(Lambda(lambda m, x: torch.sparse.mm(x, m.w), w=torch.randn(5, 3, dtype=torch.float64))),
        batch(8).to_sparse(),
        {},
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_runs_whole(name, pairs):
    build_model, data, options = WHOLE[name]
    model = build_model()
    estimate_importance(model, [data, data], **options)
    assert model.rows[-1] == 8


@pytest.mark.parametrize("length", [8, 6], ids=["t_equals_n", "t_differs"])
def test_positions_first_run_whole(length, pairs):
    """A (T, N, C) batch: its rows are positions, of which none can be run alone with the rest's result."""
    model = Seen(Lambda(time_first, head=nn.Linear(5, 3).double()))
    data = batch(length, 8, 5)
    truth = truth_of(nn.Sequential(model.net.head), data.transpose(0, 1).tanh())
    importance = estimate_importance(model, [data], dtype=torch.float64)
    assert importance.num_samples == 8 and model.rows[-1] == length
    found = {name.removeprefix("net.head."): omega for name, omega in importance.items()}
    assert worst_error(found, {name.removeprefix("0."): omega for name, omega in truth.items()}) <= 1e-11


def test_nothing_is_cut_on_the_meta_device_or_a_gpu():
    model = nn.Linear(5, 3, device="meta")
    assert not chunks.Chunks(model, "auto", is_default=True).is_auto


# What is cut all the same


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "mapping", "plain_values"])
def test_wrapped_batches_are_cut(kind, pairs):
    x, scale = batch(8), batch(8, seed=3)
    data = {
        "tuple": (x, torch.arange(8)),
        "list": [x, ["label"] * 8],
        "dict": {"x": x, "scale": scale, "labels": torch.arange(8)},
        "mapping": UserDict(x=x, scale=scale),
        "plain_values": {"x": x, "scale": scale, "use_cache": False, "other": None},
    }[kind]
    model = Seen()
    truth = truth_of(model, x if kind in ("tuple", "list") else x * scale)
    model.rows.clear()
    assert exact(model, [data], truth) == 8
    assert max(model.rows) == 2


def test_samples_that_mix_are_found_in_a_chunk(pairs):
    model = Lambda(lambda m, x: (x - x.mean(0)) @ m.w, w=torch.randn(5, 3))
    with pytest.raises(CaptureError, match="samples must not influence each other"):
        estimate_importance(model, [batch(8).float()])


def test_samples_that_mix_in_a_later_structure_are_found():
    """Whether samples mix is asked for every kind of batch, not for the first only."""

    def sometimes(m, x):
        return (x if x.dim() == 2 else x - x.mean(0)) @ m.w

    model = Lambda(sometimes, w=torch.randn(5, 3).double())
    estimate_importance(model, [batch(8), batch(8)])
    with pytest.raises(CaptureError, match="batch 1: samples must not influence each other"):
        estimate_importance(model, [batch(8), batch(8, 2, 5)])


def test_samples_of_a_mapping_that_mix_are_found():
    model = Lambda(lambda m, x: (x - x.mean(0)) @ m.w, w=torch.randn(5, 3).double())
    with pytest.raises(CaptureError, match="samples must not influence each other"):
        estimate_importance(model, [UserDict(x=batch(8))])


# Errors


@pytest.mark.parametrize("chunk_size", [0, -1, torch.tensor(0)], ids=str)
def test_no_size_below_one(chunk_size):
    with pytest.raises(ValueError, match=r"chunk_size must be at least 1, got (0|-1)"):
        estimate_importance(Seen(), [batch()], chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [2.0, "8", True, [4], torch.tensor([1, 2]), torch.tensor(2.0)], ids=str)
def test_no_size_but_a_number(chunk_size):
    with pytest.raises(TypeError, match="chunk_size must be 'auto', an int or None, got"):
        estimate_importance(Seen(), [batch()], chunk_size=chunk_size)


def test_no_number_where_whole_batches_are_meant():
    with pytest.raises(ValueError, match="chunk_size must be 'auto' or None where per='batch'"):
        estimate_importance(Seen(), [batch()], chunk_size=4, per="batch")


@pytest.mark.parametrize(
    ("data", "shapes"),
    [
        ({"x": batch(), "scale": torch.ones(1, 5)}, r"\[11, 5\], \[1, 5\]"),
        ({"x": batch(), "scale": torch.tensor(1.0)}, r"\[11, 5\], \[\]"),
        ("text", "none"),
    ],
    ids=["uneven", "scalar", "no_tensors"],
)
def test_no_number_for_tensors_without_a_common_axis(data, shapes):
    with pytest.raises(ValueError, match=f"batch 0: chunk_size must be 'auto' or None unless .* of shapes {shapes}"):
        estimate_importance(Seen(), [data], chunk_size=4, forward=lambda m, b: m(b["x"] * b["scale"]))


def test_no_number_where_rows_are_not_samples():
    model = Lambda(time_first, head=nn.Linear(5, 3).double())
    with pytest.raises(ValueError, match="one scalar for each row of the batch, got 7 for 2 of its rows; pass chunk"):
        estimate_importance(model, [batch(6, 7, 5)], chunk_size=2, forward=own)


@pytest.mark.parametrize("row", [0, 1, 5, 10])
def test_errors_count_samples_from_the_start_of_the_batch(row):
    data = batch()
    data[row, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=f"batch 1: objective must be finite, got nan for sample {row}$"):
        estimate_importance(Seen(), [batch(), data], chunk_size=2)


def test_an_empty_batch_is_refused_as_ever():
    with pytest.raises(ValueError, match="batch 0: .*at least one sample"):
        estimate_importance(Seen(), [batch(0)], chunk_size=2)


def test_a_pass_that_cuts_leaves_no_warning_and_verify_agrees(pairs):
    model = Seen()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = verify(model, [batch()])
    assert report.passed


# Small batches, joined


class Loader(torch.utils.data.DataLoader):
    """Fills the same memory for every batch."""

    def __iter__(self):
        memory = torch.empty(self.batch_size, 5, dtype=torch.float64)
        for x, y in super().__iter__():
            memory[: len(x)] = x
            yield memory[: len(x)], y


def loader(data, size, kind=torch.utils.data.DataLoader):
    return kind(torch.utils.data.TensorDataset(data, torch.zeros(len(data))), batch_size=size)


GATHERED = {
    "list": lambda data: list(data.split(3)),
    "tuple": lambda data: data.split(2),
    "with_labels": lambda data: [(x, torch.zeros(len(x))) for x in data.split(3)],
    "ragged": lambda data: list(data.split([2, 7, 2, 5, 2, 3, 4, 6, 9, 2, 8, 3, 2, 2, 2, 1])),
    "loader": lambda data: loader(data, 3),
    "loader_of_one_memory": lambda data: loader(data, 3, Loader),
}


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("form", GATHERED)
def test_small_batches_are_joined(form, scope):
    model, data = Seen(), batch(60)
    truth = truth_of(model, data) if scope == "global" else estimate_importance(model, [data], scope=scope)
    model.rows.clear()
    importance = estimate_importance(model, GATHERED[form](data), scope=scope, dtype=torch.float64)
    assert worst_error(importance, dict(truth)) <= (1e-11 if scope == "global" else 1e-6)
    assert importance.num_samples == 60
    # The first shows how the model is treated; a batch of one sample runs by itself.
    assert max(model.rows) == (58 if form == "tuple" else 57)


@pytest.mark.parametrize("name", {**DIRECT, **JOINED})
def test_every_case_joined(name):
    model, data = build(CASES[name])
    assert exact(model, [data] * 16, truth_of(model, data)) == 16 * len(data)


def test_joined_batches_stay_within_their_memory(monkeypatch):
    model, data = Seen(), batch(60)
    cutter = chunks.Chunks(model, "auto", is_default=True)
    # In float64, 5 inputs, and what the layers return: twice 4, and 3.
    monkeypatch.setattr(chunks, "_JOINED_BYTES", 7 * 8 * (5 + 2 * 4 + 3))
    batches = data.split([2, 3, 3, 3, 4, 3, 1, 5, 2, 6, 5, 7, 2, 2, 2, 3, 7])
    joined = list(cutter.join(batches, batches))
    # Of up to seven rows; the first, and what has more than half of them when its turn comes, or one, runs as it is.
    assert [len(x) for *_, x in joined] == [2, 6, 7, 3, 1, 5, 2, 6, 5, 7, 6, 3, 7]
    assert [rows for _, rows, _ in joined if rows] == [[3, 3], [3, 4], [2, 2, 2]]
    assert [index for numbers, *_ in joined for index in numbers] == list(range(17))
    assert torch.equal(torch.cat([x for *_, x in joined]), data)
    assert exact(model, batches, truth_of(model, data)) == 60


WIDE = {
    "inputs": (lambda m, x: m.b(torch.tanh(m.a(x))), 1 << 20, 5, 3),
    "outputs": (lambda m, x: m.b(torch.tanh(m.a(x))), 5, 5, 1 << 20),
    # What no backward needs takes memory as well.
    "between": (lambda m, x: m.b(m.a(x).unflatten(1, (4, -1)).sum(2)), 5, 1 << 20, 3),
}


@pytest.mark.parametrize("form", ["list", "loader"])
@pytest.mark.parametrize("name", WIDE)
def test_all_that_a_forward_makes_is_counted(name, form):
    function, inputs, between, outputs = WIDE[name]
    model = Lambda(function, a=nn.Linear(inputs, between), b=nn.Linear(4 if name == "between" else between, outputs))
    data, seen = torch.ones(1, inputs).expand(32, -1), []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    estimate_importance(model, list(data.split(2)) if form == "list" else loader(data, 2), parameters=["a.bias"])
    assert max(seen) == 2


def test_batches_of_a_single_layer_are_joined():
    # Its forward keeps nothing but the batch.
    model, data = Seen(nn.Linear(5, 3).double()), batch(60)
    assert exact(model, data.split(3), truth_of(model, data)) == 60
    assert max(model.rows) == 57


def test_batches_of_other_shapes_and_dtypes_stay_apart():
    class Summing(Seen):
        def forward(self, x):
            self.rows.append(len(x))
            return self.net(x.double().sum(1))

    model = Summing()
    shapes = [(2, 3, 5), (3, 3, 5), (2, 4, 5), (1, 4, 5), (2, 3, 5)] * 4
    data = [batch(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    data = [x.float() if seed % 3 == 0 else x for seed, x in enumerate(data)]
    plain = estimate_importance(model, data, dtype=torch.float64, chunk_size=None)
    joined = estimate_importance(model, data, dtype=torch.float64)
    assert worst_error(joined, dict(plain)) <= 1e-11
    assert joined.num_samples == plain.num_samples == sum(map(len, data))


def test_a_generator_may_change_the_model_between_batches():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.trunk = nn.Linear(5, 4).double()
            self.heads = nn.ModuleList(nn.Linear(4, 2).double() for _ in range(2))
            self.task = 0

        def forward(self, x):
            return self.heads[self.task](torch.tanh(self.trunk(x)))

    def batches():
        for task in range(2):
            model.task = task
            yield from data.split(2)

    model, data = Heads(), batch(20)
    importance = estimate_importance(model, batches(), dtype=torch.float64)
    truths = []
    for model.task in range(2):
        own = [name for name, _ in model.named_parameters() if "heads" not in name or f".{model.task}." in name]
        truths.append(dict(estimate_importance(model, [data], dtype=torch.float64, parameters=own)))
    for name in importance:
        assert torch.allclose(importance[name], sum(t[name] for t in truths if name in t) / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "options", [{"chunk_size": None}, {"objective": lambda y: y.square().sum(1)}, {"forward": lambda m, x: m(x)}]
)
def test_what_is_not_joined(options):
    model = Seen()
    estimate_importance(model, [batch(3)] * 16, **options)
    assert max(model.rows) == 3
    estimate_importance(model, [batch(3)] * 15)
    assert max(model.rows) == 3


ROWS_ARE_NO_SAMPLES = {
    # One bag a batch, whose rows are its instances.
    "bags": (lambda m, x: m.b((torch.softmax(m.a(x), 0) * x).sum(0, keepdim=True)), (6, 5), 1),
    "positions_first": (lambda m, x: m.b(torch.tanh(m.a(x)).mean(0) * x[-1]), (7, 4, 5), 4),
    "as_many_positions_as_samples": (lambda m, x: m.b(torch.tanh(m.a(x)).mean(0) * x[-1]), (4, 4, 5), 4),
    "pairs": (lambda m, x: m.b(m.a(x[::2]) * x[1::2]), (6, 5), 3),
    "one_sample_that_mixes_with_others": (lambda m, x: m.b(m.a(x) - m.a(x).mean(0) + x), (1, 5), 1),
    "one_sample_without_its_axis": (lambda m, x: m.b(m.a(x) * x).squeeze(), (1, 5), 2),
}


@pytest.mark.parametrize("name", ROWS_ARE_NO_SAMPLES)
def test_batches_whose_rows_are_no_samples_stay_apart(name):
    function, shape, samples = ROWS_ARE_NO_SAMPLES[name]
    torch.manual_seed(0)
    model = Lambda(function, a=nn.Linear(5, 5), b=nn.Linear(5, 2)).double()
    data = [batch(*shape, seed=seed) for seed in range(20)]
    if samples == 1 or shape[0] == 1:
        parts = [estimate_importance(model, [x], dtype=torch.float64, chunk_size=None) for x in data]
        truth = {name: sum(part[name] for part in parts) / 20 for name in parts[0]}
    else:
        truth = dict(estimate_importance(model, data, dtype=torch.float64, chunk_size=None))
    assert exact(model, data, truth) == 20 * samples


def few(x):
    assert len(x) <= 4
    return x


TAKES_FEW_ROWS = {
    "asserts": lambda m, x: m.a(few(x)),
    "has_a_buffer_of_that_length": lambda m, x: m.a(x) + torch.ones(4, 1, dtype=x.dtype)[: len(x)],
    "returns_some": lambda m, x: m.a(x[:4]),
}


@pytest.mark.parametrize("name", TAKES_FEW_ROWS)
def test_a_model_that_takes_few_rows_gets_its_batches(name):
    torch.manual_seed(0)
    model, data = Lambda(TAKES_FEW_ROWS[name], a=nn.Linear(5, 3)).double(), batch(60)
    assert exact(model, data.split(3), truth_of(model, data)) == 60


def test_a_model_that_mixes_many_rows_is_refused():
    model = Lambda(lambda m, x: m.a(x - x.mean(0) if len(x) > 4 else x), a=nn.Linear(5, 3)).double()
    with pytest.raises(CaptureError, match="batches 1 to 19, joined: samples must not influence each other"):
        estimate_importance(model, batch(60).split(3))


SAMPLES_BY_THEMSELVES = {
    "loop": lambda m, x: torch.stack([m.w * 1.0] * len(x)),
    "derived": lambda m, x: x + torch.stack([m.w * 1.0] * len(x)),
}


@pytest.mark.filterwarnings("ignore::mas_fast.errors.LoopWarning")
@pytest.mark.parametrize("name", SAMPLES_BY_THEMSELVES)
def test_what_takes_a_backward_for_each_sample_is_not_joined(name):
    """Each would go through all samples beside it."""
    seen = []
    model = Lambda(lambda m, x: seen.append(len(x)) or SAMPLES_BY_THEMSELVES[name](m, x), w=nn.Parameter(torch.ones(5)))
    assert exact(model.double(), batch(60).split(3), truth_of(model, batch(60))) == 60
    assert max(seen) == 3


def test_an_output_that_is_not_strided_can_be_measured():
    model, data = Lambda(lambda m, x: m.a(x).to_sparse(), a=nn.Linear(5, 3)).double(), [batch(8)] * 16
    importance = estimate_importance(model, data, objective=lambda y: y.to_dense().square().sum(1), dtype=torch.float64)
    dense = Lambda(lambda m, x: m.a(x), a=model.a)
    assert worst_error(importance, truth_of(dense, data[0])) <= 1e-11


def test_errors_name_the_batch_of_those_that_were_joined():
    data = [batch(3) for _ in range(20)]
    data[7][1, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="batch 7: objective must be finite.* sample 1$"):
        estimate_importance(Seen(), data)
    mixing = Lambda(lambda m, x: m.a(x) - m.a(x).mean(0), a=nn.Linear(5, 3)).double()
    with pytest.raises(CaptureError, match="batch 0: samples must not influence each other"):
        estimate_importance(mixing, [batch(3)] * 20)
    with pytest.raises(CaptureError, match="batch 0: batch norm"):
        estimate_importance(Seen(nn.BatchNorm1d(5, track_running_stats=False).double()), [batch(3)] * 20)


@pytest.mark.parametrize("name", ["bags", "positions_first", "pairs"])
def test_a_batch_whose_rows_are_no_samples_is_not_cut(name, pairs):
    function, shape, samples = ROWS_ARE_NO_SAMPLES[name]
    torch.manual_seed(0)
    model = Lambda(function, a=nn.Linear(5, 5), b=nn.Linear(5, 2)).double()
    data = [batch(2 * shape[0], *shape[1:])]
    truth = estimate_importance(model, data, dtype=torch.float64, chunk_size=None)
    assert exact(model, data, dict(truth)) == truth.num_samples
