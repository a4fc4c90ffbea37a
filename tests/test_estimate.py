"""estimate_importance and capture: what they accept, what they refuse and how, and that they leave no trace."""

import copy
import math
import os
import subprocess
import sys
import warnings
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cases import DIRECT, Doubled, Lambda, build
from compare import relative_error, truth_of, worst_error
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import mas_fast
from mas_fast import CaptureError, Importance, estimate_importance
from mas_fast.capture.backward import Backward
from mas_fast.capture.layout import Fingerprint, prove, sample_weights
from mas_fast.errors import LoopWarning
from mas_fast.reference import importance_loop


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batch(n=6, *shape, seed=2):
    return torch.randn(n, *(shape or (5,)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean_of_loops(model, batches, **options):
    """Return the loop's Ω over several batches, each a forward of its own."""
    rows = [(importance_loop(model, b, **options), len(b)) for b in batches]
    count = sum(n for _, n in rows)
    return {name: sum(row[name] * n for row, n in rows) / count for name in rows[0][0]}


# The kinds of batch, output, objective and parameters that are accepted


class Outputs(nn.Module):
    """Returns its output in the wrapping asked for, and takes keywords as Hugging Face models do."""

    def __init__(self, wrap):
        super().__init__()
        self.net = mlp()
        self.wrap = wrap

    def forward(self, x, scale=None):
        return self.wrap(self.net(x if scale is None else x * scale))


X, SCALE, LABELS = batch(), batch(6, 5, seed=3), torch.arange(6)

BATCHES = {
    "tensor": (X, None),
    "tuple_with_labels": ((X, LABELS), None),
    "list_with_labels": ([X, LABELS], None),
    "mapping": ({"x": X, "scale": SCALE}, SCALE),
    "mapping_with_labels": ({"x": X, "scale": SCALE, "labels": LABELS, "label_ids": LABELS, "label": LABELS}, SCALE),
    "ordered_mapping": (OrderedDict(x=X), None),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches(name):
    data, scale = BATCHES[name]
    model = Outputs(lambda y: y)
    importance = estimate_importance(model, [data], dtype=torch.float64)
    truth = truth_of(model, X if scale is None else X * scale)
    assert importance.num_samples == 6 and worst_error(importance, truth) <= 1e-11


OUTPUTS = {
    "tensor": lambda y: y,
    "logits": lambda y: SimpleNamespace(logits=y, last_hidden_state=torch.zeros(2)),
    "last_hidden_state": lambda y: SimpleNamespace(logits=None, last_hidden_state=y),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(name):
    model = Outputs(OUTPUTS[name])
    truth = truth_of(model.net, X)
    importance = estimate_importance(model, [X], dtype=torch.float64)
    assert worst_error({k.removeprefix("net."): v for k, v in importance.items()}, truth) <= 1e-11


OBJECTIVES = ["l2_squared", "l2", "l1", lambda y: y[:, 0].exp() + y[:, 1], lambda y: F.log_softmax(y, 1)[:, 2]]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o if isinstance(o, str) else "callable")
def test_objectives(objective):
    model = mlp()
    importance = estimate_importance(model, [X], objective=objective, dtype=torch.float64)
    assert worst_error(importance, truth_of(model, X, objective=objective)) <= 1e-11


def test_objective_by_name_flattens_what_follows_the_samples():
    model, data = nn.Linear(5, 3).double(), batch(4, 2, 5)
    importance = estimate_importance(model, [data], objective="l2", dtype=torch.float64)
    assert worst_error(importance, truth_of(model, data, objective="l2")) <= 1e-11


def test_forward_gets_the_batch_as_it_is():
    model, data = mlp(), {"image": X, "meta": "text"}
    importance = estimate_importance(model, [data], forward=lambda m, b: m(b["image"]), dtype=torch.float64)
    assert worst_error(importance, truth_of(model, X)) <= 1e-11


SELECTIONS = {
    "names": (["2.weight", "0.bias"], {"2.weight", "0.bias"}),
    "one_name": ("2.weight", {"2.weight"}),
    "one_shot_names": ((name for name in ["0.weight"]), {"0.weight"}),
    "predicate": (lambda name, p: p.dim() == 1, {"0.bias", "2.bias"}),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_selected_parameters(name):
    parameters, expected = SELECTIONS[name]
    model = mlp()
    importance = estimate_importance(model, [X], parameters=parameters, dtype=torch.float64)
    truth = truth_of(model, X)
    assert worst_error(importance, {key: truth[key] for key in expected}) <= 1e-11


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_of_omega(dtype):
    model = mlp()
    importance = estimate_importance(model, [X], dtype=dtype)
    assert {omega.dtype for omega in importance.values()} == {dtype}
    assert worst_error(importance, truth_of(model, X)) <= torch.finfo(dtype).eps


# Sums are of rounded gradients, so no closer than the model's own dtype: a few roundings for each of three products.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "convnet", "norms", "transformer", "token"])
def test_narrow_models(name, dtype):
    model, data = build(DIRECT[name])
    truth = truth_of(model, data)
    model, data = model.to(dtype), data.to(dtype) if data.is_floating_point() else data
    importance = estimate_importance(model, [data])
    baseline = importance_loop(model, data, dtype=None)
    for key in truth:
        slack = 2 * torch.finfo(dtype).eps
        assert relative_error(importance[key], truth[key]) <= 2 * relative_error(baseline[key], truth[key]) + slack
    assert all(omega.dtype == torch.float32 for omega in importance.values())


def test_autocast_around_the_pass():
    model, data = build(DIRECT["transformer"])
    truth = truth_of(model, data)
    with torch.autocast("cpu", torch.bfloat16):
        importance = estimate_importance(model.float(), [data])
    assert worst_error(importance, truth) <= 10 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients(context):
    model = mlp()
    with context():
        data = batch()
        importance = estimate_importance(model, [data], dtype=torch.float64)
    assert worst_error(importance, truth_of(model, X)) <= 1e-11


def test_one_shot_iterator_is_read_once():
    drawn = []

    def draw():
        for chunk in X.split(2):
            drawn.append(chunk)
            yield chunk

    importance = estimate_importance(mlp(), draw(), dtype=torch.float64)
    assert len(drawn) == 3 and importance.num_samples == 6
    assert worst_error(importance, truth_of(mlp(), X)) <= 1e-11


def test_data_loader_with_labels():
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=4, shuffle=True)
    importance = estimate_importance(mlp(), loader, dtype=torch.float64)
    assert worst_error(importance, truth_of(mlp(), X)) <= 1e-11


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


def test_a_leak_between_samples_is_no_layout_in_bfloat16():
    # In wide rows: a leak from a sample with a smaller weight must not look like rounding.
    torch.manual_seed(0)
    model = Lambda(
        lambda m, x: m.outer(m.inner(x).index_add(0, torch.tensor([2]), m.inner(x)[4:5])),
        inner=nn.Linear(8, 1024),
        outer=nn.Linear(1024, 3),
    ).bfloat16()
    with pytest.warns(LoopWarning):
        estimate_importance(model, [torch.randn(8, 8).bfloat16()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_leak_between_two_samples_is_missed(dtype):
    # Rounding hides much of δ in bfloat16, and one projection by chance nearly all that a sample adds to another.
    generator = torch.Generator().manual_seed(0)
    weights = sample_weights(8, torch.zeros((), dtype=dtype))
    for draw in range(300):
        delta, leak = torch.randn(2, 8, 16, generator=generator).to(dtype)
        source, target = torch.randperm(8, generator=generator)[:2]
        scaled = weights[:, None] * delta
        delta[target], scaled[target] = delta[target] + leak[source], scaled[target] + weights[source] * leak[source]
        plain, weighted = (Fingerprint.of(own, [0]) for own in (delta, scaled))
        assert not prove(plain, weighted, weights, torch.finfo(dtype).eps), draw


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e33])
def test_no_leak_is_proved_away_by_overflow(scale):
    weights = torch.exp2(torch.tensor([0.0, 1, 2, 3, 40]))
    delta = torch.full((5, 1), scale)
    scaled = weights[:, None] * delta
    # The gradient of the sample with the largest weight is another's, and one number wide: its norm is finite.
    scaled[weights.argmax()] = weights.min() * scale
    eps = torch.finfo(torch.float32).eps
    proved = prove(Fingerprint.of(delta, [0]), Fingerprint.of(scaled, [0]), weights, eps)
    assert all(layout.order == "rows" for layout in proved)  # where that sample has none
    for layout in proved:
        assert layout.rows.tolist() == [[0, 4], [1, -1], [2, -1], [3, -1], [-1, -1]]


@pytest.mark.parametrize("scale", [1e-18, 1e-23, 1e-30, 1e18, 1e23, 1e30])
def test_gradients_whose_squares_vanish_or_overflow_count(scale):
    torch.manual_seed(0)
    model, batch = nn.Linear(4, 3), torch.randn(6, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoopWarning)  # the smallest and the largest cannot be proved
        importance = estimate_importance(
            model, [batch], forward=lambda m, x: m(x) * scale, objective=lambda output: output.sum(1)
        )
    expected = torch.full((3,), scale)
    torch.testing.assert_close(importance["bias"], expected, rtol=1e-5, atol=0)
    overflows = [row.fallback for row in importance.coverage if "overflows" in (row.fallback or "")]
    assert len(overflows) == (2 if scale > 1e18 else 0)


@pytest.mark.parametrize("leaking", [0, 1])
def test_a_leak_that_cancels_along_positions_and_features_is_found(leaking):
    # One sample adds u_t v_d - v_t u_d to the δ of another: nothing is left of it by the same numbers along both axes.
    torch.manual_seed(0)
    u, v = torch.randn(2, 7, dtype=torch.float64)
    leak = torch.outer(u, v) - torch.outer(v, u)

    def run(model, batch):
        hidden = model(batch)
        leaked = torch.zeros(2, 1, dtype=torch.float64)
        leaked[1 - leaking] = (hidden[leaking] * leak).sum()
        return torch.cat([hidden.flatten(1), leaked], 1)

    model, batch = nn.Linear(2, 7).double(), torch.randn(2, 7, 2, dtype=torch.float64)
    with pytest.raises(CaptureError, match="no axis"):
        estimate_importance(model, [batch], forward=run, unsupported="raise")


def test_a_buffer_that_a_forward_wrote_parameters_into_is_left_as_found():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 5))
            self.register_buffer("kept", torch.zeros(3, 5))

        def forward(self, x):
            self.kept[:] = self.w
            return x @ self.kept.t()

    model = Kept()
    estimate_importance(model, [X.float()])
    assert not model.kept.requires_grad and not model.kept.any()
    copy.deepcopy(model)


class Picked(nn.Module):
    def __init__(self, gru):
        super().__init__()
        self.gru = gru

    def forward(self, x):
        return self.gru(x)[0].float()


@pytest.mark.parametrize("inside", [False, True])
def test_rounding_of_autocast_is_not_taken_for_samples_that_mix(inside):
    # A recurrent layer returns float32 of what it computed in bfloat16, other sums of which give other roundings.
    torch.manual_seed(0)
    gru = nn.GRU(4, 5, batch_first=True)

    def states(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gru(x)[0].float()

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = gru

        def forward(self, x):
            return states(x)

    model, x = Wrapped() if inside else Picked(gru), torch.randn(64, 9, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
        importance = estimate_importance(model, [x])
    assert importance.num_samples == 64


@pytest.mark.parametrize(
    "data", [[X, X], DataLoader(Stream(), batch_size=3), iter([X])], ids=["list", "stream", "iterator"]
)
def test_progress_bar_is_shown_only_on_request(data, capfd):
    estimate_importance(mlp(), data, progress=True)
    assert "importance" in capfd.readouterr().err
    estimate_importance(mlp(), [X])
    assert capfd.readouterr().err == ""


def test_compiled_model():
    model = mlp()
    truth = truth_of(model, X)
    compiled = torch.compile(model, backend="eager")
    importance = estimate_importance(compiled, [X], dtype=torch.float64)
    assert worst_error(importance, truth) <= 1e-11
    compiled(X)
    assert worst_error(estimate_importance(compiled, [X], dtype=torch.float64), truth) <= 1e-11


def test_compiled_submodule():
    model = mlp()
    truth = truth_of(model, X)
    model[0] = torch.compile(model[0], backend="eager")
    assert worst_error(estimate_importance(model, [X], dtype=torch.float64), truth) <= 1e-11


def test_record_of_the_pass():
    importance = estimate_importance(mlp(), X.split(2), statistic="square", objective="l1")
    assert (importance.objective, importance.statistic, importance.scope) == ("l1", "square", "global")
    assert importance.num_samples == 6
    assert [(row.name, row.rule, row.uses, row.fallback) for row in importance.coverage] == [
        (name, "linear", 1, None) for name, _ in mlp().named_parameters()
    ]


# Bad input


def without_running_statistics():
    return nn.Sequential(OrderedDict(conv=nn.Linear(5, 4), bn=nn.BatchNorm1d(4, track_running_stats=False)))


def lazy():
    return nn.Sequential(nn.LazyLinear(3))


def frozen(model):
    return model.requires_grad_(False)


def with_complex():
    return Lambda(lambda m, x: (x * m.w).abs(), w=torch.randn(5, dtype=torch.complex64))


def nan_at(*index):
    x = batch()
    x[index] = math.nan
    return x


# name -> (model, data, options, error, every text that the message must hold)
BAD = {
    "empty": (mlp, [], {}, ValueError, ["data must hold at least one batch", "one-shot iterator"]),
    "empty_batch": (mlp, [X[:0]], {}, ValueError, ["batch 0", "at least one sample"]),
    "no_tensors": (
        mlp,
        [["a", 3]],
        {},
        TypeError,
        ["batch 0: batch must be a tensor", "list of ['str', 'int']", "forward="],
    ),
    "no_tensors_in_mapping": (mlp, [{"x": "a"}], {}, TypeError, ["dict with keys ['x']", "forward="]),
    "second_batch": (mlp, [X, None], {}, TypeError, ["batch 1: ", "NoneType"]),
    "output_tuple": (
        lambda: Outputs(lambda y: (y, y)),
        [X],
        {},
        TypeError,
        ["output must be a tensor or have .logits", "tuple of ['Tensor', 'Tensor']", "forward="],
    ),
    "output_mapping": (lambda: Outputs(lambda y: {"out": y}), [X], {}, TypeError, ["dict with keys ['out']"]),
    "output_scalar": (lambda: Outputs(lambda y: y.sum()), [X], {}, ValueError, ["samples on its first axis", "scalar"]),
    "objective_matrix": (
        mlp,
        [X],
        {"objective": lambda y: y},
        ValueError,
        ["one scalar per sample", "got shape [6, 3]"],
    ),
    "objective_scalar": (
        mlp,
        [X],
        {"objective": lambda y: y.sum()},
        ValueError,
        ["one scalar per sample", "got shape []"],
    ),
    "objective_no_tensor": (
        mlp,
        [X],
        {"objective": lambda y: 1.0},
        TypeError,
        ["objective must return a tensor", "float"],
    ),
    "objective_integer": (mlp, [X], {"objective": lambda y: y.argmax(1)}, TypeError, ["real floating-point", "int64"]),
    "objective_name": (mlp, [], {"objective": "l3"}, ValueError, ["['l1', 'l2', 'l2_squared'] or a callable", "'l3'"]),
    "objective_kind": (mlp, [X], {"objective": None}, ValueError, ["objective must be one of", "None"]),
    "objective_detached": (
        mlp,
        [X],
        {"objective": lambda y: y.detach().sum(1)},
        CaptureError,
        ["must depend on the parameters"],
    ),
    "forward_without_graph": (
        mlp,
        [X],
        {"forward": torch.no_grad()(lambda m, x: m(x))},
        CaptureError,
        ["none that took part in any forward", "torch.no_grad"],
    ),
    "nan_input": (
        mlp,
        [X, nan_at(4, 0)],
        {},
        FloatingPointError,
        ["batch 1: ", "objective must be finite, got nan for sample 4"],
    ),
    "nan_input_first": (mlp, [nan_at(0, 0)], {}, FloatingPointError, ["batch 0: ", "sample 0"]),
    "inf_gradient": (
        mlp,
        [X],
        {"objective": lambda y: (y[:, 0] - y[:, 0]).sqrt()},
        FloatingPointError,
        ["batch 0: gradient must be finite", "0.weight", "2.bias"],
    ),
    "inf_gradient_or_raise": (
        mlp,
        [X],
        {"objective": lambda y: (y[:, 0] - y[:, 0]).sqrt(), "unsupported": "raise"},
        FloatingPointError,
        ["gradient must be finite"],
    ),
    "inf_gradient_in_one_layer": (
        lambda: Lambda(
            lambda m, x: x @ m.w + (m.root * (x[:, :1] * 0)).sqrt(), w=torch.randn(5, 3), root=torch.ones(())
        ),
        [X.float()],
        {},
        FloatingPointError,
        ["gradient must be finite, got inf or nan in root"],
    ),
    "mixing_behind_an_output_without_axes": (
        lambda: Lambda(lambda m, x: m.l(x - x.mean(0))[:, 0].squeeze(), l=nn.Linear(5, 2)),
        [X.float()],
        {},
        CaptureError,
        ["batch 0: samples must not influence each other"],
    ),
    "batch_statistics": (
        without_running_statistics,
        [X.float()],
        {},
        CaptureError,
        ["batch norm 'bn'", "track_running_stats"],
    ),
    "batch_statistics_not_selected": (
        without_running_statistics,
        [X.float()],
        {"parameters": ["conv.weight"], "forward": lambda m, x: m(x)},
        CaptureError,
        ["batch norm 'bn'"],
    ),
    "mixing": (
        lambda: Lambda(lambda m, x: (x - x.mean(0)) @ m.w, w=torch.randn(5, 3)),
        [X.float()],
        {},
        CaptureError,
        ["batch 0: samples must not influence each other", "sample 0", "alone"],
    ),
    "mixing_forwards": (
        lambda: Lambda(lambda m, x: x.cumsum(0) @ m.w, w=torch.randn(5, 3)),
        [X.float()],
        {},
        CaptureError,
        ["sample 5"],
    ),
    "mixing_backwards": (
        lambda: Lambda(lambda m, x: x.flip(0).cumsum(0).flip(0) @ m.w, w=torch.randn(5, 3)),
        [X[:1].float(), X[:2].float()],
        {},
        CaptureError,
        ["batch 1: samples must not influence each other", "sample 0"],
    ),
    "random": (
        lambda: Lambda(lambda m, x: F.dropout(x) @ m.w, w=torch.randn(5, 3)),
        [X.float()],
        {},
        CaptureError,
        ["is random"],
    ),
    "unknown_name": (
        mlp,
        [X],
        {"parameters": ["0.weight", "9.weight"]},
        ValueError,
        ["names of the model's parameters", "['9.weight']"],
    ),
    "no_names": (mlp, [X], {"parameters": []}, ValueError, ["got none"]),
    "predicate_selects_nothing": (mlp, [X], {"parameters": lambda n, p: False}, ValueError, ["select at least one"]),
    "nothing_trainable": (
        lambda: frozen(mlp()),
        [X],
        {},
        ValueError,
        ["requires a gradient, got none", "requires_grad_"],
    ),
    "no_parameters": (nn.Identity, [X], {}, ValueError, ["requires a gradient, got none"]),
    "selected_is_frozen": (
        lambda: frozen(mlp()),
        [X],
        {"parameters": ["0.bias"]},
        ValueError,
        ["0.bias does not require a gradient"],
    ),
    "meta": (
        lambda: mlp().to("meta"),
        [X],
        {},
        ValueError,
        ["0.weight is on the meta device", "2.bias is on the meta device"],
    ),
    "complex": (with_complex, [X.float()], {}, ValueError, ["w is complex"]),
    "lazy": (lazy, [X.float()], {}, ValueError, ["0.weight is not initialised yet", "run one batch"]),
    "scope": (mlp, [X], {"scope": "layer"}, ValueError, ["scope must be 'global' or 'local', got 'layer'"]),
    "statistic": (mlp, [X], {"statistic": "mean"}, ValueError, ["statistic must be 'abs' or 'square', got 'mean'"]),
    "unsupported": (
        mlp,
        [X],
        {"unsupported": "skip"},
        ValueError,
        ["unsupported must be 'loop' or 'raise', got 'skip'"],
    ),
    "dtype": (mlp, [X], {"dtype": torch.int32}, ValueError, ["dtype must be one of torch.float16", "got torch.int32"]),
    "dtype_string": (mlp, [X], {"dtype": "float32"}, ValueError, ["dtype must be one of", "got float32"]),
    "model": (lambda: len, [X], {}, TypeError, ["model must be a torch.nn.Module, got builtin"]),
    "max_norm": (
        lambda: Lambda(lambda m, x: m.tokens(x).flatten(1), tokens=nn.Embedding(4, 3, max_norm=0.1)),
        [torch.tensor([[0, 1], [2, 3]])],
        {},
        CaptureError,
        ["max_norm changes its weight", "max_norm=None"],
    ),
    "max_norm_not_selected": (
        lambda: nn.Sequential(nn.Embedding(4, 3, max_norm=0.1).requires_grad_(False), nn.Linear(3, 2)),
        [torch.tensor([0, 1, 2])],
        {"forward": lambda m, x: m(x)},
        CaptureError,
        ["max_norm changes its weight"],
    ),
    "batch_changed_in_place": (
        lambda: Lambda(lambda m, x: x.mul_(2) @ m.w, w=torch.randn(5, 3)),
        [X.float()],
        {},
        CaptureError,
        ["must not change the batch in place", "clone"],
    ),
    "parameter_changed_in_place": (
        lambda: Lambda(lambda m, x: (m.w.detach().mul_(1), x @ m.w)[1], w=torch.randn(5, 3)),
        [X.float()],
        {},
        CaptureError,
        ["parameters must not change during the forward", "w;"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    build_model, data, options, error, texts = BAD[name]
    model = build_model()
    data = [b.clone() if isinstance(b, torch.Tensor) else b for b in data]
    with pytest.raises(error) as caught:
        estimate_importance(model, data, **options)
    assert type(caught.value) is error
    for text in texts:
        assert text in str(caught.value)


def test_nothing_is_lost_when_a_batch_is_not_finite():
    model = mlp()
    earlier = estimate_importance(model, [X])
    kept = {name: omega.clone() for name, omega in earlier.items()}
    with pytest.raises(FloatingPointError):
        estimate_importance(model, [X, nan_at(0, 0)])
    again = estimate_importance(model, [X])
    for name in kept:
        assert torch.equal(earlier[name], kept[name]) and torch.equal(again[name], kept[name])


def test_train_mode_batch_norm_runs_in_eval_mode():
    model, data = build(DIRECT["resnet"])
    truth = truth_of(model, data)
    model.train()
    model[3].eval()
    modes = [module.training for module in model.modules()]
    assert worst_error(estimate_importance(model, [data], dtype=torch.float64), truth) <= 1e-11
    assert [module.training for module in model.modules()] == modes


# The model is left as it was found


class Busy(nn.Module):
    """Touches everything that a forward may touch."""

    def __init__(self, fail=None):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("through_data", torch.zeros(2))
        self.fail = fail
        self.runs = 0

    def forward(self, x):
        self.calls += 1
        self.replaced = self.replaced + 1
        self.through_data.data.add_(1)
        torch.rand(3)
        self.runs += 1
        y = self.inner(x)
        if self.fail is not None and self.runs > 3:
            raise self.fail
        return y


def state_of(model):
    parameters = list(model.parameters())
    return {
        "values": [p.detach().clone() for p in parameters],
        "identity": [id(p) for p in parameters],
        "versions": [p._version for p in parameters],
        "requires_grad": [p.requires_grad for p in parameters],
        "grads": [None if p.grad is None else (id(p.grad), p.grad._version, p.grad.clone()) for p in parameters],
        "hooks": [dict(p._backward_hooks or {}) for p in parameters],
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "buffer_identity": {name: id(b) for name, b in model.named_buffers()},
        "modes": [m.training for m in model.modules()],
        "module_hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()
        ],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "random": torch.get_rng_state(),
        "grad_mode": torch.is_grad_enabled(),
    }


def same(a, b):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same(found, expected):
    assert [key for key in expected if not same(found[key], expected[key])] == []


@pytest.mark.parametrize("fail", [None, ValueError("from the model"), KeyboardInterrupt(), MemoryError()], ids=repr)
def test_model_is_left_as_found(fail):
    model = Busy(fail)
    model.inner[0](batch().float()).sum().backward()
    model.inner[0].weight.register_hook(lambda g: g)
    model.inner[3].weight.requires_grad_(False)
    model.inner[2].eval()
    before = state_of(model)
    data = list(batch(12).float().split(3))
    if fail is None:
        estimate_importance(model, data)
    else:
        with pytest.raises(type(fail)):
            estimate_importance(model, data)
    assert_same(state_of(model), before)


def test_model_is_left_as_found_by_a_refusal():
    model = nn.Sequential(nn.Embedding(4, 3, max_norm=0.1), nn.Linear(3, 2))
    before = state_of(model)
    with pytest.raises(CaptureError):
        estimate_importance(model, [torch.tensor([0, 1, 2])])
    assert_same(state_of(model), before)


def test_model_is_left_as_found_when_the_data_fails():
    def draw():
        yield X
        torch.rand(3)
        raise OSError("disk")

    model = mlp().train()
    before = state_of(model)
    with pytest.raises(OSError, match="^disk$"):
        estimate_importance(model, draw())
    assert_same(state_of(model), before)


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (lambda m, x: m.layer(x), "linear"),
        (lambda m, x: m.layer(m.layer(x).tanh()), "linear"),
        (lambda m, x: F.linear(x, m.layer.weight.exp()), "linear of a derived tensor"),
        (lambda m, x: F.linear(Doubled.apply(x, m.layer.weight[0]), m.layer.weight), "loop"),
    ],
)
def test_hooks_on_parameters_do_not_enter(function, rule):
    model = Lambda(function, layer=nn.Linear(5, 5)).double()
    truth = truth_of(model, X)
    model.layer.weight.register_hook(lambda g: g * 0)
    importance = estimate_importance(model, [X], dtype=torch.float64)
    assert importance.coverage[0].rule == rule
    assert worst_error(importance, truth) <= 1e-11
    model(X).sum().backward()
    assert not model.layer.weight.grad.any()


def test_forward_hooks_of_the_user_run():
    model = mlp()
    model[0].register_forward_hook(lambda module, args, output: output * 3)
    assert worst_error(estimate_importance(model, [X], dtype=torch.float64), truth_of(model, X)) <= 1e-11


# capture, for people who own their loop


def test_session_equals_the_pass():
    model = mlp().train()
    with mas_fast.capture(model, dtype=torch.float64) as session:
        assert not session.model.training
        for chunk in X.split(4):
            assert session.accumulate(lambda chunk=chunk: model(chunk).square().sum(1)) == len(chunk)
    importance = session.importance("mine")
    assert isinstance(importance, Importance) and importance.objective == "mine" and importance.num_samples == 6
    assert worst_error(importance, truth_of(model, X)) <= 1e-11
    assert model.training


def test_session_without_samples():
    with mas_fast.capture(mlp()) as session, pytest.raises(ValueError, match="at least one sample, got none"):
        session.importance()


def test_session_goes_on_after_an_error_before_anything_was_added():
    model = mlp()
    with mas_fast.capture(model, dtype=torch.float64) as session:
        session.accumulate(lambda: model(X[:2]).square().sum(1))
        with pytest.raises(FloatingPointError):
            session.accumulate(lambda: model(nan_at(0, 0)).square().sum(1))
        session.accumulate(lambda: model(X[2:]).square().sum(1))
    assert worst_error(session.importance(), truth_of(model, X)) <= 1e-11


def test_session_refuses_to_go_on_with_half_a_batch(monkeypatch):
    model = mlp()
    receive = Backward._receive
    with mas_fast.capture(model) as session:
        session.accumulate(lambda: model(X).square().sum(1))
        calls = []

        def interrupt(*args):
            calls.append(args)
            if len(calls) > 1:
                raise KeyboardInterrupt
            receive(*args)

        monkeypatch.setattr(Backward, "_receive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.accumulate(lambda: model(X).square().sum(1))
        monkeypatch.undo()
        with pytest.raises(CaptureError, match="in the middle of a batch"):
            session.accumulate(lambda: model(X).square().sum(1))
        with pytest.raises(CaptureError, match="in the middle of a batch"):
            session.importance()


# Attempts to get a wrong Ω without an error. Each is (model, batches): later batches do otherwise than the first.


def routed(m, x):
    """Experts, as in a mixture: tokens go where their values say."""
    out, mask = x.clone(), x[..., 0] > 0
    out[mask] = torch.tanh(m.expert(x[mask]))
    return out.flatten(1)


def packed_by_length(m, x):
    lengths = (x[..., 0] > 0).sum(1).tolist()
    rows = torch.tanh(m.expert(torch.cat([x[i, :length] for i, length in enumerate(lengths)])))
    return torch.stack([part.sum(0) for part in rows.split(lengths)])


def pooled(m, x):
    """A batch of graphs: nodes in one row, added up by the graph they are of."""
    graph = x[..., 0].flatten().gt(0).logical_not().long()
    rows = torch.tanh(m.expert(x.flatten(0, 1)))
    return torch.zeros(2, 5, dtype=x.dtype).index_add(0, graph, rows)


def flowing(m, x):
    if x[0, 0, 0] > 0:
        return torch.tanh(m.expert(x)).flatten(1)
    return torch.tanh(m.expert(x.transpose(0, 1))).transpose(0, 1).flatten(1)


def last_valid(m, x):
    h = torch.tanh(m.expert(x.transpose(0, 1)))
    return h[x[..., 0].abs().argmax(1), torch.arange(len(x))]


def last_valid_by_mask(m, x):
    """As last_valid, with no index in sight: most of δ is zero, and which part depends on the values."""
    h = torch.tanh(m.expert(x.transpose(0, 1)))
    return (h * (x[..., :1] > 0).transpose(0, 1)).sum(0)


def inner_folded(m, x):
    rows = torch.tanh(m.expert(x.transpose(0, 1).flatten(0, 1)))
    return rows.unflatten(0, (-1, len(x))).transpose(0, 1).flatten(1).sum(1)


def sliced(m, x):
    start = int(x[0, 0, 0] > 0)
    return (F.linear(x, m.w[:2]) + F.linear(x, m.w[2 - start : 4 - start])).flatten(1)


def signs(*rows):
    x = batch(len(rows), len(rows[0]), 5)
    x[..., 0] = torch.tensor(rows, dtype=torch.float64)
    return x


def expert():
    return nn.Linear(5, 5)


HALF, UNEVEN = signs([1, 1, -1, -1], [1, 1, -1, -1]), signs([1, 1, 1, -1], [1, -1, -1, -1])

DECEPTIONS = {
    "experts": (lambda: Lambda(routed, expert=expert()), [HALF, UNEVEN]),
    "packing": (lambda: Lambda(packed_by_length, expert=expert()), [HALF, UNEVEN]),
    "graphs": (lambda: Lambda(pooled, expert=expert()), [signs([1, 1], [-1, -1]), signs([1, 1], [1, -1])]),
    "control_flow": (lambda: Lambda(flowing, expert=expert()), [signs([1, 1], [1, 1]), signs([-1, 1], [1, 1])]),
    "last_valid": (lambda: Lambda(last_valid, expert=expert()), [signs([9, 0], [0, 9]), signs([0, 9], [0, 9])]),
    "last_valid_by_mask": (
        lambda: Lambda(last_valid_by_mask, expert=expert()),
        [signs([1, -1], [-1, 1]), signs([1, 1], [1, 1])],
    ),
    "one_position_first": (lambda: Lambda(inner_folded, expert=expert()), [batch(4, 1, 5), batch(4, 3, 5)]),
    "one_sample_first": (
        lambda: Lambda(inner_folded, expert=expert()),
        [batch(1, 3, 5), batch(4, 3, 5), batch(1, 3, 5)],
    ),
    "disjoint_first": (lambda: Lambda(sliced, w=torch.randn(4, 5)), [signs([-1], [1]), signs([1], [1])]),
}


@pytest.mark.parametrize("name", DECEPTIONS)
def test_what_held_for_the_first_batch_is_not_taken_for_granted(name):
    torch.manual_seed(5)
    build_model, batches = DECEPTIONS[name]
    model = build_model().double()
    for data in (batches, batches[::-1], batches * 2):
        # With forward=, no sample is run alone to see whether samples influence each other; some of these do.
        importance = estimate_importance(model, data, forward=lambda m, x: m(x), dtype=torch.float64)
        assert worst_error(importance, mean_of_loops(model, data)) <= 1e-11


def overwritten(m, x):
    w = m.w.clone()
    w[0] = w[1]
    return F.linear(x, w)


def masked(m, x):
    w = m.w.clone()
    w.masked_fill_(m.w.detach() > 0, 0)
    return F.linear(x, w) + 1


def unknown_then_known(m, x):
    return torch.einsum("ni,oi->no", x, m.w).tanh() * F.linear(x, m.w) + torch.linalg.vector_norm(m.v) * (x @ m.v)


def half_without_gradient(m, x):
    with torch.no_grad():
        gate = m.layer(x).sigmoid()
    return m.layer(x) * gate


def in_place_on_views(m, x):
    h = m.layer(x)
    h[:, 0] += m.shift
    h[:, 1:3].mul_(m.scale)
    return h.tanh()


def in_lists(m, x):
    return x @ torch.cat([m.a, torch.stack([m.b, m.b])])


def deep(width, depth):
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(width, 2))


def dead():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    model[0].bias.data[:7] = -100
    return model


# name -> builder of (model, batch): one batch is enough
CORNERS = {
    "overwritten_clone": lambda: (Lambda(overwritten, w=torch.randn(4, 5)), X),
    "masked_clone": lambda: (Lambda(masked, w=torch.randn(4, 5)), X),
    "torch_embedding": lambda: (
        Lambda(lambda m, x: torch.embedding(m.w, x, -1).flatten(1), w=torch.randn(6, 3)),
        LABELS[:, None],
    ),
    "torch_embedding_keywords": lambda: (
        Lambda(lambda m, x: torch.embedding(m.w, x, padding_idx=5, sparse=True).flatten(1), w=torch.randn(6, 3)),
        LABELS.view(2, 3),
    ),
    "negative_padding": lambda: (
        Lambda(lambda m, x: F.embedding(x, m.w, padding_idx=-1).flatten(1), w=torch.randn(6, 3)),
        LABELS.view(2, 3),
    ),
    "mm_keyword": lambda: (Lambda(lambda m, x: torch.mm(x, mat2=m.w), w=torch.randn(5, 3)), X),
    "expand_keyword": lambda: (Lambda(lambda m, x: x + torch.broadcast_to(m.w, size=x.shape), w=torch.randn(5)), X),
    "integers_times": lambda: (Lambda(lambda m, x: x.round().long() * m.w, w=torch.randn(5)), X * 3),
    "mask_times": lambda: (Lambda(lambda m, x: x * ((x > 0) * m.w), w=torch.randn(5)), X),
    "over_integers": lambda: (Lambda(lambda m, x: m.w / (x.abs() * 9 + 1).long(), w=torch.randn(5)), X),
    "over_narrower": lambda: (Lambda(lambda m, x: m.w / (x.abs() + 1).float(), w=torch.randn(5)), X),
    "times_complex": lambda: (
        Lambda(lambda m, x: torch.view_as_real(torch.fft.fft(x) * m.w).flatten(1), w=torch.randn(5)),
        X,
    ),
    "cast_to_complex": lambda: (
        Lambda(lambda m, x: (torch.fft.fft(x) @ m.w.to(torch.complex128)).abs(), w=torch.randn(5, 3)),
        X,
    ),
    "channels_last_weight": lambda: (
        Lambda(
            lambda m, x: F.linear(x.flatten(1), m.w.permute(0, 2, 3, 1).view(4, -1)),
            w=torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        ),
        batch(6, 12),
    ),
    "channels_last_model": lambda: (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).to(memory_format=torch.channels_last),
        batch(4, 3, 5, 5),
    ),
    "transposed_parameter": lambda: (Lambda(lambda m, x: F.linear(x, m.w), w=torch.randn(5, 3).T), X),
    "also_without_gradient": lambda: (Lambda(half_without_gradient, layer=nn.Linear(5, 5)), X),
    "in_place_on_views": lambda: (
        Lambda(in_place_on_views, layer=nn.Linear(5, 5), shift=torch.randn(()), scale=torch.randn(2)),
        X,
    ),
    "unknown_then_known": lambda: (Lambda(unknown_then_known, w=torch.randn(3, 5), v=torch.randn(5, 3)), X),
    "in_lists": lambda: (Lambda(in_lists, a=torch.randn(3, 4), b=torch.randn(4)), X),
    "rows_by_iteration": lambda: (
        Lambda(lambda m, x: sum(x[:, i : i + 1] * w for i, w in enumerate(m.w)), w=torch.randn(5, 3)),
        X,
    ),
    "tied_sparse": lambda: (
        Lambda(lambda m, x: (m.t(x) * m.t(x.flip(1))).flatten(1), t=nn.Embedding(6, 3, sparse=True)),
        torch.tensor([[1, 1], [2, 1], [5, 5]]),
    ),
    "torch_batch_norm": lambda: (
        Lambda(
            lambda m, x: torch.batch_norm(
                x, m.w, m.b, torch.zeros(5).double(), torch.ones(5).double(), False, 0.1, 1e-5, False
            ),
            w=torch.randn(5),
            b=torch.randn(5),
        ),
        X,
    ),
    "two_samples": lambda: (nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)), batch(2, 2, 5)),
    "more_samples_than_weights": lambda: (nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)), batch(100)),
    "square_everywhere": lambda: (nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)), batch(5, 5, 5)),
    "dead_units": lambda: (dead(), X),
    "one_living_sample": lambda: (
        nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)),
        X * torch.eye(6)[:, :1].double(),
    ),
    "no_living_sample": lambda: (Lambda(lambda m, x: torch.relu(-x.abs()) @ m.w, w=torch.randn(5, 3)), X),
    "deep": lambda: (deep(6, 30), batch(6, 6)),
    "empty_layer": lambda: (
        Lambda(lambda m, x: x @ m.w + (x[:, :0] @ m.none), w=torch.randn(5, 3), none=torch.randn(0, 3)),
        X,
    ),
    "works_on_whole_batches_only": lambda: (
        Lambda(lambda m, x: m.layer(x[:, None]).squeeze(), layer=nn.Linear(5, 5)),
        X,
    ),
    "parametrized": lambda: (
        nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)),
            nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)),
        ),
        X,
    ),
    "multiplied_to_death": lambda: (
        Lambda(lambda m, x: (x * m.gate) @ m.w, gate=torch.zeros(5), w=torch.randn(5, 3)),
        X,
    ),
}


@pytest.mark.parametrize("statistic", ["abs", "square"])
@pytest.mark.parametrize("name", CORNERS)
def test_corners_are_exact(name, statistic):
    model, data = build(CORNERS[name])
    importance = estimate_importance(model, [data], dtype=torch.float64, statistic=statistic)
    truth = importance_loop(model, data, statistic=statistic)
    assert worst_error(importance, truth) <= 1e-11


def test_deep_float32():
    model, data = build(CORNERS["deep"])
    truth = truth_of(model, data)
    importance = estimate_importance(model.float(), [data.float()])
    baseline = importance_loop(model, data.float(), dtype=None)
    assert [row for row in importance.coverage if row.fallback] == []
    for name in truth:
        assert relative_error(importance[name], truth[name]) <= 2 * relative_error(baseline[name], truth[name]) + 1e-6


def test_one_proof_serves_all_batches_of_a_kind(monkeypatch):
    sweeps = []
    sweep = Backward._sweep

    def recorded(self, phase, *args, **kwargs):
        sweeps.append(phase.name)
        return sweep(self, phase, *args, **kwargs)

    monkeypatch.setattr(Backward, "_sweep", recorded)
    for name in ("mlp", "convnet", "resnet", "transformer", "packed_projection"):
        model, data = build(DIRECT[name])
        sweeps.clear()
        estimate_importance(model, [data] * 4)
        assert sweeps.count("ADD") == 4 and sweeps.index("ADD") == len(sweeps) - 4, f"{name}: {sweeps}"


@pytest.mark.parametrize("lend", ["to", "type_as"])
@pytest.mark.parametrize("samples", [1, 7])
def test_a_parameter_that_only_lends_its_dtype_is_not_what_it_casts(lend, samples):
    def function(m, x):
        h = getattr(m.a(x), lend)(m.dummy)
        return m.b(h * x.mean(1, keepdim=True))

    torch.manual_seed(0)
    model = Lambda(function, a=nn.Linear(5, 6), b=nn.Linear(6, 3), dummy=torch.zeros(1)).double()
    batches = [torch.randn(samples, 5).double() for _ in range(2)]
    importance = estimate_importance(model, batches, dtype=torch.float64)
    assert worst_error(importance, mean_of_loops(model, batches)) <= 1e-11
    assert not importance["dummy"].any()


def test_shared_ids_that_overlap_in_a_later_batch_only():
    def forward(m, batch):
        x, first, second = batch
        return m.h(torch.tanh(x + m.e(first)) - torch.tanh(2 * x + m.e(second))).sum(1)

    torch.manual_seed(0)
    model = Lambda(None, e=nn.Embedding(10, 4), h=nn.Linear(4, 3)).double()
    x, ids = torch.randn(5, 3, 4).double(), torch.arange(3)
    batches = [(x, ids, ids + 3), (x, ids, ids + 1)]
    importance = estimate_importance(model, batches, forward=forward, dtype=torch.float64)
    assert worst_error(importance, mean_of_loops(model, batches, forward=forward)) <= 1e-11


def route_by_numpy(h, order):
    return h[order.numpy()], lambda y: y[order.argsort().numpy()]


def route_by_rows(h, order):
    rows = h.unbind(0)
    back = order.argsort().tolist()
    return torch.stack([rows[i] for i in order.tolist()]), lambda y: torch.stack([y.unbind(0)[i] for i in back])


def route_by_one_hot(h, order):
    permutation = torch.nn.functional.one_hot(order).to(h)
    return permutation @ h, lambda y: permutation.T @ y


@pytest.mark.parametrize("route", [route_by_numpy, route_by_rows, route_by_one_hot])
def test_rows_that_data_route_are_proved_in_every_batch(route):
    def function(m, x):
        n, t, d = x.shape
        h = x.reshape(n * t, d)
        routed, back = route(h, torch.argsort(h[:, 0].detach()))
        return m.g(torch.tanh(back(m.f(routed))).view(n, t, d)).sum(1)

    torch.manual_seed(0)
    model = Lambda(function, f=nn.Linear(5, 5), g=nn.Linear(5, 3)).double()
    in_order = torch.randn(6, 4, 5).double()
    in_order.view(24, 5)[:, 0] = torch.arange(24)
    batches = [in_order, torch.randn(6, 4, 5).double()]
    importance = estimate_importance(model, batches, dtype=torch.float64)
    assert worst_error(importance, mean_of_loops(model, batches)) <= 1e-11


def test_a_tensor_is_no_iterable_of_batches():
    with pytest.raises(TypeError, match=r"data must be an iterable of batches, got a tensor.*pass \[data\]"):
        estimate_importance(nn.Linear(3, 2), torch.randn(4, 3))


def test_a_model_made_in_inference_mode_is_named():
    with torch.inference_mode():
        model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="weight was made in inference mode"):
        estimate_importance(model, [torch.randn(4, 3)])


PEAK = """
import resource, sys, torch, mas_fast
from torch import nn
torch.set_num_threads(1)

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20_000, 64)
    def forward(self, ids):
        return nn.functional.linear(self.table(ids), self.table.weight)

torch.manual_seed(0)
models = {"tied": (Tied(), torch.randint(0, 20_000, (32, 2))),
          "derived": (nn.utils.parametrizations.weight_norm(nn.Linear(1000, 1280)), torch.randn(32, 1000))}
model, batch = models[sys.argv[1]]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for _ in range(2):
    model(batch).square().sum().backward()
mas_fast.estimate_importance(nn.Linear(3, 2), [torch.randn(4, 3)] * 2)
before = peak()
mas_fast.estimate_importance(model, [batch] * 2, memory_budget=int(sys.argv[2]) << 20)
print(peak() - before)
"""


@pytest.mark.parametrize("name", ["tied", "derived"])
def test_joined_gradients_stay_within_the_memory_budget(name):
    # 32 samples' gradients are 156 MiB; one's are 5 MiB, and Ω and the parameter as large.
    command = [sys.executable, "-c", PEAK, name, "32"]
    # Blocks of their own for large tensors, so that what is measured is memory in use and not what malloc keeps.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    assert grown <= 32 + 4 * 5


class FadingNet(nn.Module):
    """Samples that matter by ever smaller factors: what log-likelihoods of a converged classifier look like."""

    def __init__(self, axis):
        super().__init__()
        self.axis = axis
        self.conv = nn.Conv1d(2, 5, 3)
        self.head = nn.Linear(5 * 6, 4)

    def forward(self, x):
        x = torch.relu(self.conv(x)).flatten(1)
        return self.head(x.unsqueeze(self.axis)).squeeze(self.axis)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("smallest", [1e-15, 1e-25, 1e-37])
def test_samples_whose_gradients_all_but_vanish(axis, smallest):
    torch.manual_seed(0)
    # So many that each comes with many of the powers of two.
    model, x = FadingNet(axis), torch.randn(99, 2, 8)
    factors = torch.logspace(0, math.log10(smallest), 99)

    def of(rows):
        return lambda output: (output.square().sum(1) * factors[rows].to(output)).contiguous()

    omega = estimate_importance(model, [x], objective=of(slice(None)), unsupported="raise")
    for name, total in omega.items():
        truth = 0
        for row in range(99):
            alone = copy.deepcopy(model).double()
            of(slice(row, row + 1))(alone(x[row : row + 1].double())).sum().backward()
            truth = truth + dict(alone.named_parameters())[name].grad.abs() / 99
        torch.testing.assert_close(total.double(), truth, rtol=1e-5, atol=1e-7 * float(truth.max()))


def test_a_leak_into_a_sample_that_all_but_vanishes_is_found():
    class Leak(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = nn.Linear(3, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            hidden = torch.tanh(self.hidden(x))
            return self.head(hidden + 1e-3 * hidden.roll(1, 0))

    torch.manual_seed(0)
    factors = torch.logspace(0, -25, 99)
    with pytest.raises(CaptureError):
        estimate_importance(
            Leak(),
            [torch.randn(99, 3)],
            forward=lambda model, batch: model(batch),
            objective=lambda output: output.square().sum(1) * factors,
            unsupported="raise",
        )
