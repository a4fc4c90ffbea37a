"""verify: it agrees where Ω is right, says so where it is not, on evidence that it names, and leaves no trace."""

import dataclasses
import math
import sys
import threading
import time
import warnings
from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cases import DIRECT, JOINED, Doubled, Lambda, TransformerLM, build
from compare import relative_error, truth_of
from test_estimate import Busy, assert_same, batch, mlp, state_of
from torch import nn
from torch.overrides import _get_current_function_mode_stack

import mas_fast
from mas_fast import CaptureError, Importance, doctor, estimate_importance, verify
from mas_fast.capture.forward import Forward
from mas_fast.kernels import ops
from mas_fast.verify import ONE_GRAPH, SINGLES, VerifyReport, VerifyRow

X = batch().float()


def quiet(model, data, **options):
    return verify(model, data, show=False, **options)


def single():
    """Return a model and a batch in float32, the usual case."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), X


# Where the pass is right


@pytest.mark.parametrize("statistic", ["abs", "square"])
@pytest.mark.parametrize("name", ["mlp", "resnet", "transformer", "frames", "tied", "weight_norm"])
def test_right_by_each_way(name, statistic):
    model, data = build({**DIRECT, **JOINED}[name])
    report = quiet(model, data, statistic=statistic)
    assert report.passed and report.max_error <= 1e-11 and report.evidence == SINGLES
    assert (report.dtype, report.loop_dtype) == (torch.float64, torch.float64)
    report.raise_if_wrong()


def test_rows_say_what_coverage_says():
    model = Lambda(lambda m, x: F.linear(Doubled.apply(x, m.layer.weight[0]), m.layer.weight), layer=nn.Linear(5, 5))
    with warnings.catch_warnings():
        # Not even a warning that it loops: the report says it.
        warnings.simplefilter("error")
        report = quiet(model, X)
    coverage = {row.name: row for row in report.rows}
    assert list(coverage) == ["layer.weight", "layer.bias"]
    assert coverage["layer.weight"].rule == "loop" and coverage["layer.weight"].fallback
    assert coverage["layer.bias"].rule == "unused" and coverage["layer.bias"].error == 0
    assert coverage["layer.weight"].shape == (5, 5)


# A pass in a narrower dtype is as far from float64 as its arithmetic is, and no further.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "convnet", "transformer"])
def test_dtypes(name, dtype):
    model, data = build(DIRECT[name])
    report = quiet(model.float(), data.float() if data.is_floating_point() else data, dtype=dtype)
    assert (report.dtype, report.loop_dtype) == (dtype, torch.float64)
    assert report.passed and report.max_error > torch.finfo(dtype).eps / 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_the_pass_on_what_both_were_given(dtype):
    model, data = single()
    report = quiet(model, data, dtype=dtype)
    model, data = model.to(dtype), data.to(dtype)
    importance = estimate_importance(model, [data], dtype=torch.promote_types(dtype, torch.float32))
    truth = truth_of(model, data)
    for row in report.rows:
        assert row.error == pytest.approx(relative_error(importance[row.name], truth[row.name]), rel=1e-3, abs=1e-15)


def test_objective_forward_and_parameters_reach_both():
    model, data = single()
    options = {"objective": lambda y: y[:, 0].exp(), "forward": lambda m, b: m(b["image"] * 2)}
    wanted = model[2].weight
    for parameters in (["2.weight"], (name for name in ["2.weight"]), lambda name, p: p is wanted):
        report = quiet(model, {"image": data, "text": "not a tensor"}, parameters=parameters, **options)
        assert [row.name for row in report.rows] == ["2.weight"] and report.passed and report.evidence == SINGLES
    with pytest.raises(AssertionError):
        # The two sides do differ if they are not given the same.
        changing = iter([2.0, 2.0, 2.0] + [3.0] * 20)
        quiet(model, data, forward=lambda m, b: m(b) * next(changing)).raise_if_wrong()


def test_buffers_that_are_complex_stay_so():
    model = Lambda(lambda m, x: (m.layer(x) * m.turn).abs(), layer=nn.Linear(5, 4))
    model.register_buffer("turn", torch.randn(4, dtype=torch.complex64))
    assert quiet(model, X).passed


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients(context):
    model, _ = single()
    with context():
        report = quiet(model, torch.randn(4, 5))
    assert report.passed and report.num_samples == 4


def test_compiled_models_are_not_compiled_again():
    def backend(graph, inputs):
        raise AssertionError("compiled")

    model, data = single()
    assert quiet(torch.compile(model, backend=backend), data).rows[0].name == "0.weight"
    model[0] = torch.compile(model[0], backend=backend)
    assert quiet(model, data).passed


def keys_that_change_nothing():
    """Attention whose keys have a bias: it moves all scores of a query alike, so that its gradient is zero."""
    torch.manual_seed(0)
    return Lambda(
        lambda m, x: (x @ (m.layer(x) + m.keys).mT).softmax(-1) @ x, keys=torch.ones(5), layer=nn.Linear(5, 5)
    )


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_gradients_that_are_only_rounding_are_no_error(dtype):
    model, data = keys_that_change_nothing(), X.unflatten(0, (2, 3))
    truth = truth_of(model, data)
    assert 0 < truth["keys"].norm() < 1e-12 * truth["layer.weight"].norm()
    assert quiet(model, data, dtype=dtype).passed


# Where it is wrong


def wrong_linear(omega, grad_output, input, square=False):
    """Sum over the samples before the absolute value, as batch-mode implementations do."""
    omega += torch.einsum("nto,nti->oi", grad_output, input).abs()


def slightly_wrong_linear(omega, grad_output, input, square=False):
    start = omega.clone()
    CORRECT(omega, grad_output, input, square)
    omega[0, 0] += 1e-6 * (omega - start).norm()


CORRECT = ops.accumulate_linear_


@pytest.mark.parametrize(("wrong", "least"), [(wrong_linear, 0.1), (slightly_wrong_linear, 0.9e-6)])
def test_a_wrong_op_is_caught(monkeypatch, wrong, least):
    monkeypatch.setattr(ops, "accumulate_linear_", wrong)
    model, data = single()
    report = quiet(model, data)
    assert not report.passed and report.max_error >= least
    assert {row.name for row in report.rows if row.error > report.tolerance} == {"0.weight", "2.weight"}
    assert report.worst == max(report.rows, key=lambda row: row.error)
    with pytest.raises(AssertionError) as caught:
        report.raise_if_wrong()
    for text in (report.worst.name, str(list(report.worst.shape)), "'linear'", f"{report.max_error:.3g}", "2 of 4"):
        assert text in str(caught.value)
    assert "WRONG" in str(report) and "WRONG" in repr(report) and "report it with the model" in str(report)
    assert ("casts to float32" in str(report)) == (least < 1e-4)
    report.raise_if_wrong(tolerance=10)


def test_a_wrong_op_is_caught_in_a_narrow_dtype(monkeypatch):
    monkeypatch.setattr(ops, "accumulate_linear_", wrong_linear)
    for dtype in (torch.float32, torch.bfloat16):
        assert not quiet(*single(), dtype=dtype).passed


def add_to_all(monkeypatch, amount):
    """Make the pass wrong by a number."""

    def wrong(*args, **options):
        right = estimate_importance(*args, **options)
        moved = {name: omega + amount for name, omega in right.items()}
        return Importance(moved, right.num_samples, coverage=right.coverage)

    monkeypatch.setattr(sys.modules["mas_fast.verify"], "estimate_importance", wrong)


def test_omega_where_all_must_be_zero_is_caught(monkeypatch):
    add_to_all(monkeypatch, 0.5)
    report = quiet(Lambda(lambda m, x: m.layer(x) * 0, layer=nn.Linear(5, 4)), X)
    # There is no scale to be relative to: the error is absolute.
    assert [row.error for row in report.rows] == pytest.approx([0.5 * 20**0.5, 0.5 * 4**0.5])


def test_omega_where_one_must_be_zero_is_caught(monkeypatch):
    add_to_all(monkeypatch, 0.5)
    model = keys_that_change_nothing()
    report = quiet(model, X.unflatten(0, (2, 3)))
    largest = max(omega.norm() for omega in truth_of(model, X.unflatten(0, (2, 3))).values())
    # Relative to the largest, not to what is only rounding.
    assert report.rows[0].name == "keys" and report.rows[0].error == pytest.approx(0.5 * 5**0.5 / float(largest))


def test_a_loop_that_is_not_finite_is_no_agreement():
    report = quiet(*single(), forward=lambda m, x: m(x) * (math.nan if len(x) == 1 else 1))
    assert not report.passed and report.max_error == math.inf


def test_samples_that_influence_each_other_are_caught_though_forward_hides_them():
    model = Lambda(lambda m, x: m.layer(x - x.mean(0)), layer=nn.Linear(5, 4))
    report = quiet(model, X, forward=lambda m, x: m(x))
    assert not report.passed and report.evidence == SINGLES
    with pytest.raises(AssertionError, match="no sample influences another"):
        report.raise_if_wrong()


# The evidence


class TimeFirst(nn.Module):
    """[T, N, C] in, [N, O] out."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 4)

    def forward(self, x):
        return torch.tanh(self.layer(x)).sum(0)


def squeezing(m, x):
    """Cannot take a single sample."""
    return m.layer(x.squeeze(0).unflatten(0, (2, -1)).flatten(0, 1))


def leaving_out(m, x):
    return torch.cat([m.layer(row) if row[0, 0] > 0 else row[:, :4] for row in x.split(1)])


EVIDENCE = {
    "rows": (single, SINGLES),
    "rows_with_labels": (lambda: (single()[0], (X, torch.arange(6))), SINGLES),
    "labels_of_other_length": (lambda: (single()[0], (X, torch.arange(9))), ONE_GRAPH),
    "rows_in_a_mapping_unknown_to_torch": (
        lambda: (Keywords(), UserDict(x=X.double(), labels=torch.arange(6))),
        SINGLES,
    ),
    "one_sample": (lambda: (single()[0], X[:1]), SINGLES),
    "time_first": (lambda: (TimeFirst(), torch.randn(3, 4, 5)), ONE_GRAPH),
    "time_first_t_equals_n": (lambda: (TimeFirst(), torch.randn(4, 4, 5)), ONE_GRAPH),
    "time_first_of_one_sample": (lambda: (TimeFirst(), torch.randn(4, 1, 5)), ONE_GRAPH),
    "samples_past_all_parameters": (lambda: (Lambda(leaving_out, layer=nn.Linear(5, 4)), X), SINGLES),
    "single_samples_refused": (lambda: (Lambda(squeezing, layer=nn.Linear(5, 4)), X), ONE_GRAPH),
    "other_axes": (lambda: (Keywords(), {"x": X, "table": torch.randn(1, 5)}), ONE_GRAPH),
    "scalar": (lambda: (Keywords(), {"x": X, "table": torch.tensor(2.0)}), ONE_GRAPH),
}


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 4)

    def forward(self, x, table=0):
        return self.layer(x + table)


@pytest.mark.parametrize("name", EVIDENCE)
def test_evidence(name):
    make, expected = EVIDENCE[name]
    model, data = make()
    report = quiet(model, data)
    assert report.evidence == expected and report.passed
    assert expected in str(report)


def test_the_loop_is_no_part_of_the_pass(monkeypatch):
    """The last forwards are the loop's, and nobody watches them."""
    watched = []

    def forward(m, x):
        watched.append((len(x), any(isinstance(mode, Forward) for mode in _get_current_function_mode_stack())))
        return m(x)

    quiet(*single(), forward=forward)
    assert watched[-6:] == [(1, False)] * 6 and (6, True) in watched


@pytest.mark.parametrize(("max_samples", "expected"), [(1, 1), (4, 4), (6, 6), (9, 6)])
def test_max_samples_cuts_rows(max_samples, expected):
    model, _ = single()
    seen = set()

    def forward(m, b):
        seen.add(len(b[0]))
        return m(b[0])

    report = quiet(model, [X, torch.arange(6)], forward=forward, max_samples=max_samples)
    assert report.num_samples == expected and report.passed and max(seen) == expected


def test_max_samples_leaves_what_are_no_rows():
    report = quiet(Keywords(), {"x": X, "table": torch.randn(1, 5)}, max_samples=2)
    assert report.num_samples == 6 and report.passed


# Models that cannot be copied, or do not run in float64


class Casting(nn.Module):
    """Has its input in one dtype, whatever the model is in."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.layer = nn.Linear(5, 4)
        self.dtype = dtype

    def forward(self, x):
        return self.layer(x.to(self.dtype))


class Uncopyable(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.layer = nn.Linear(5, 4, dtype=dtype)
        self.lock = threading.Lock()

    def forward(self, x):
        return self.layer(x)


def test_a_model_that_does_not_run_in_float64():
    with pytest.raises(ValueError, match="model must run in float64, got RuntimeError: .*pass dtype=torch.float32"):
        quiet(Casting(), X)
    report = quiet(Casting(), X, dtype=torch.float32)
    assert report.passed and (report.dtype, report.loop_dtype) == (torch.float32, torch.float32)
    assert "loop in float32" in str(report)


def test_sums_of_a_narrow_loop_do_not_stall():
    # In bfloat16 a sum of equal terms grows no more from 256 on.
    report = quiet(Casting(torch.bfloat16), torch.ones(600, 5), dtype=torch.bfloat16)
    assert report.loop_dtype == torch.bfloat16 and report.max_error < 0.01


def test_errors_of_a_model_in_float64_are_its_own():
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught:
        quiet(mlp(), X[:, :3])
    assert type(caught.value) is RuntimeError


def test_a_cast_inside_a_model_is_reported_as_the_error_that_it_is():
    class Rounding(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 4)

        def forward(self, x):
            # In a batch of several, what float32 makes of it differs from what it makes of a single sample.
            return self.layer(x) * (1 if len(x) == 1 else 1 + 1e-6)

    report = quiet(Rounding(), X, forward=lambda m, x: m(x))
    assert report.max_error == pytest.approx(2e-6, rel=0.01) and not report.passed
    assert "see that no sample influences another and that no code in the model casts to float32" in str(report)
    report.raise_if_wrong(1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_that_cannot_be_copied(dtype):
    model = Uncopyable(dtype).train()
    with pytest.raises(ValueError, match=f"model must be copyable to float64, got TypeError: .*pass dtype={dtype}"):
        quiet(model, X)
    before = state_of(model)
    report = quiet(model, X, dtype=dtype)
    assert report.passed and (report.dtype, report.loop_dtype) == (dtype, dtype)
    assert_same(state_of(model), before)
    other = torch.float32 if dtype == torch.float64 else torch.float64
    with pytest.raises(ValueError, match=f"pass dtype={dtype}"):
        quiet(model, X, dtype=other)


# Bad input

BAD = {
    "model": (lambda: len, X, {}, TypeError, "model must be a torch.nn.Module, got builtin"),
    "batch": (mlp, None, {}, TypeError, "batch must be a tensor, .*got NoneType"),
    "empty_batch": (mlp, X[:0], {}, ValueError, "at least one sample"),
    "dtype": (mlp, X, {"dtype": torch.int32}, ValueError, "dtype must be None or one of torch.float16, .*torch.int32"),
    "dtype_string": (mlp, X, {"dtype": "float32"}, ValueError, "dtype must be None or one of .*got float32"),
    "max_samples": (mlp, X, {"max_samples": 0}, ValueError, "max_samples must be at least 1, got 0"),
    "max_samples_kind": (mlp, X, {"max_samples": 2.5}, TypeError, "max_samples must be an int or None, got 2.5"),
    "max_samples_bool": (mlp, X, {"max_samples": True}, TypeError, "max_samples must be an int or None, got True"),
    "max_samples_of_positions": (
        TimeFirst,
        torch.randn(9, 4, 5),
        {"max_samples": 2},
        ValueError,
        "whose rows are not its samples, got 4 samples in 2 rows",
    ),
    "statistic": (mlp, X, {"statistic": "mean"}, ValueError, "statistic must be 'abs' or 'square'"),
    "objective": (mlp, X, {"objective": "l3"}, ValueError, "objective must be one of"),
    "unknown_name": (mlp, X, {"parameters": ["9.weight"]}, ValueError, r"\['9.weight'\]"),
    "predicate": (mlp, X, {"parameters": lambda name, p: False}, ValueError, "select at least one"),
    "meta": (lambda: mlp().to("meta"), X, {}, ValueError, "0.weight is on the meta device"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), X, {}, ValueError, "not initialised yet"),
    "mixing": (
        lambda: Lambda(lambda m, x: m.layer(x - x.mean(0)), layer=nn.Linear(5, 4)),
        X,
        {},
        CaptureError,
        "samples must not influence each other",
    ),
    "not_finite": (mlp, X * float("nan"), {}, FloatingPointError, "must be finite"),
    "past_the_copy": (
        lambda: OTHER,
        X.double(),
        {"forward": lambda m, x: OTHER(x)},
        CaptureError,
        "on other parameters than those selected",
    ),
}
OTHER = mlp()


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    make, data, options, error, message = BAD[name]
    with pytest.raises(error, match=message) as caught:
        quiet(make(), data, **options)
    assert type(caught.value) is error


@pytest.mark.parametrize("tolerance", [-1.0, float("nan")])
def test_bad_tolerance(tolerance):
    with pytest.raises(ValueError, match="tolerance must be at least 0"):
        quiet(*single()).raise_if_wrong(tolerance)


# No trace


@pytest.mark.parametrize("fail", [None, ValueError("from the model"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_found(fail, training):
    model = Busy(fail).train(training)
    model.inner[0](X).sum().backward()
    model.inner[0].weight.register_hook(lambda g: g)
    model.inner[3].weight.requires_grad_(False)
    model.inner[2].train(not training)
    before = state_of(model)
    if fail is None:
        assert quiet(model, X).passed
    else:
        with pytest.raises(type(fail)):
            quiet(model, X)
    assert_same(state_of(model), before)
    # The forwards were those of a copy.
    assert model.runs == 0


def test_model_is_left_as_found_where_forward_reaches_it_past_its_argument():
    model = Busy()
    before = state_of(model)
    with pytest.raises(CaptureError):
        quiet(model, X, forward=lambda m, x: model(x.float()))
    assert model.runs > 0
    assert_same(state_of(model), before)


def test_batch_is_left_as_found():
    model, data = mlp(), X.double()

    def forward(m, x):
        return m(x.mul_(2))

    with pytest.raises(CaptureError, match="must not change the batch in place"):
        quiet(model, data, forward=forward)
    assert torch.equal(data, X.double())


# The report


def test_report_is_printed_on_request(capsys):
    report = verify(*single())
    assert capsys.readouterr().out == f"{report}\n"
    quiet(*single())
    assert capsys.readouterr().out == ""


def make_report(errors, **changes):
    rows = [VerifyRow(f"p{index}", (3, 4), "linear", 1, None, error) for index, error in enumerate(errors)]
    facts = dict(pass_seconds=0.5, loop_seconds=6.0, num_samples=8, dtype=torch.float64, loop_dtype=torch.float64)
    return VerifyReport(tuple(rows), **{**facts, "evidence": SINGLES, **changes})


def test_report_shows_the_worst_first_and_counts_the_rest():
    report = make_report([1e-12, 3e-12, 2e-10, 0.0, 5e-12, 4e-12, 2e-12])
    lines = str(report).splitlines()
    assert lines[0].split() == ["parameter", "shape", "rule", "uses", "error", "fallback"]
    assert [line.split()[0] for line in lines[1:6]] == ["p2", "p4", "p5", "p1", "p6"]
    assert lines[6] == "and 2 more, with errors up to 1e-12"
    assert lines[8] == (
        "right: largest error 2e-10 for p2, allowed 1e-09; pass in float64, loop in float64 on batches of one sample, "
        "N = 8"
    )
    assert lines[9] == "pass 0.5 s, loop 6 s, loop / pass 12" and len(lines) == 10
    assert report.worst == report.rows[2] and report.max_error == 2e-10
    assert "more" not in str(make_report([1e-12] * 5))
    assert repr(report) == f"<VerifyReport: {lines[8]}>"


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.05)],
)
def test_tolerance_is_the_dtypes(dtype, tolerance):
    right, wrong = (make_report([0.0, error], dtype=dtype) for error in (tolerance, 1.01 * tolerance))
    assert right.tolerance == tolerance and right.passed and not wrong.passed
    right.raise_if_wrong()
    with pytest.raises(AssertionError, match="p1"):
        wrong.raise_if_wrong()
    with pytest.raises(AssertionError):
        right.raise_if_wrong(0.5 * tolerance)


def test_report_cannot_be_changed():
    report = quiet(*single())
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.num_samples = 1


def test_times_are_those_of_the_two_sides():
    delays = SimpleNamespace(batch=0.05, single=0.02)

    def forward(m, x):
        time.sleep(delays.single if len(x) == 1 else delays.batch)
        return m(x)

    report = quiet(*single(), forward=forward)
    assert report.pass_seconds >= delays.batch and 6 * delays.single <= report.loop_seconds < 0.5


def test_doctor_points_to_both():
    lines = doctor.report().splitlines()[-2:]
    assert "mas_fast.verify(model, batch)" in lines[0] and "Importance.coverage" in lines[1]
    assert callable(mas_fast.verify) and hasattr(estimate_importance(mlp(), [X.double()]), "coverage")


def test_a_transformer_is_verified_as_its_users_have_it():
    """Token ids, dropout and layer norm in train mode, float32: nothing to prepare."""
    torch.manual_seed(0)
    report = quiet(nn.Sequential(TransformerLM(), nn.Dropout(0.5)).train(), torch.randint(0, 29, (7, 9)), max_samples=3)
    assert report.passed and report.num_samples == 3
