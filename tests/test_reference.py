"""The reference itself, against formulations that share nothing with it."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from compare import relative_error
from torch import nn
from torch.func import functional_call, grad, vmap

from mas_fast import reference
from mas_fast.reference import default_forward, importance_loop, output_tensor, sample_objective


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def magnitude(gradients, square):
    return (gradients.square() if square else gradients.abs()).sum(0)


def sum_of_samples(function, parameter, *batches, square):
    """Return Σ_n |∂function_n/∂parameter| by one backward per sample."""
    rows = []
    for sample in zip(*batches, strict=True):
        leaf = parameter.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf, *sample), leaf)
        rows.append(gradient)
    return magnitude(torch.stack(rows), square) if rows else torch.zeros_like(parameter)


def agree(actual, start, expected):
    assert relative_error(actual, start + expected) <= 1e-13


@pytest.mark.parametrize("square", [False, True], ids=["abs", "square"])
@pytest.mark.parametrize(("n", "t", "o", "i"), [(4, 1, 6, 8), (3, 5, 7, 2), (1, 1, 1, 1), (0, 3, 2, 2), (9, 4, 300, 7)])
def test_accumulate_linear(n, t, o, i, square, monkeypatch):
    torch.manual_seed(0)
    # Several chunks also for small shapes.
    monkeypatch.setattr(reference, "CHUNK_ENTRIES", 5000)
    delta, x, start = data(n, t, o), data(n, t, i), torch.rand(o, i, dtype=torch.float64)
    omega = start.clone()
    reference.accumulate_linear_(omega, delta, x, square)
    expected = sum_of_samples(lambda w, d, z: (F.linear(z, w) * d).sum(), start, delta, x, square=square)
    agree(omega, start, expected)


CONV = {
    "1d": (F.conv1d, [9], [3], dict(stride=[2], padding=[1], dilation=[2]), 1),
    "2d": (F.conv2d, [6, 7], [2, 3], dict(stride=[1, 2], padding=[1, 0], dilation=[2, 1]), 1),
    "2d_grouped": (F.conv2d, [5, 5], [3, 3], dict(stride=[1, 1], padding=[1, 1], dilation=[1, 1]), 2),
    "3d": (F.conv3d, [4, 3, 5], [2, 2, 3], dict(stride=[1, 1, 2], padding=[0, 1, 1], dilation=[1, 2, 1]), 1),
}


@pytest.mark.parametrize("square", [False, True], ids=["abs", "square"])
@pytest.mark.parametrize("name", CONV)
def test_accumulate_conv(name, square):
    torch.manual_seed(0)
    conv, size, kernel, geometry, groups = CONV[name]
    x, start = data(3, 4, *size), torch.rand(6, 4 // groups, *kernel, dtype=torch.float64)
    run = lambda w, z: conv(z[None], w, groups=groups, **geometry)  # noqa: E731
    delta = data(3, *run(start, x[0]).shape[1:])
    omega = start.clone()
    reference.accumulate_conv_(omega, delta, x, *geometry.values(), groups, square)
    expected = sum_of_samples(lambda w, d, z: (run(w, z) * d).sum(), start, delta, x, square=square)
    agree(omega, start, expected)


@pytest.mark.parametrize("square", [False, True], ids=["abs", "square"])
@pytest.mark.parametrize("padding_idx", [-1, 0, 4])
def test_accumulate_embedding(padding_idx, square):
    torch.manual_seed(0)
    delta, ids, start = data(4, 7, 3), torch.randint(0, 5, (4, 7)), torch.rand(5, 3, dtype=torch.float64)
    omega = start.clone()
    reference.accumulate_embedding_(omega, delta, ids, padding_idx, square)
    padding = padding_idx if padding_idx >= 0 else None
    run = lambda w, d, z: (F.embedding(z, w, padding_idx=padding) * d).sum()  # noqa: E731
    agree(omega, start, sum_of_samples(run, start, delta, ids, square=square))


@pytest.mark.parametrize("square", [False, True], ids=["abs", "square"])
@pytest.mark.parametrize("statistics", ["none", "mean", "rstd", "both"])
def test_accumulate_affine(statistics, square):
    torch.manual_seed(0)
    delta, x, start = data(4, 3, 5, 2), data(4, 3, 5, 2), torch.rand(5, dtype=torch.float64)
    mean = data(4, 3, 1, 1) if statistics in ("mean", "both") else None
    rstd = data(5, 1).expand(4, 3, 5, 1) if statistics in ("rstd", "both") else None
    weight, bias = start.clone(), start.clone()
    reference.accumulate_affine_(weight, bias, delta, x, mean, rstd, square)
    hat = (x - (0 if mean is None else mean)) * (1 if rstd is None else rstd)
    scaled = lambda w, d, z: (w[:, None] * z * d).sum()  # noqa: E731
    shifted = lambda b, d: ((b[:, None] + 0 * d) * d).sum()  # noqa: E731
    agree(weight, start, sum_of_samples(scaled, start, delta, hat, square=square))
    agree(bias, start, sum_of_samples(shifted, start, delta, square=square))


def model_of():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Dropout(0.5), nn.Linear(7, 3))


VALUES = {
    "l2_squared": lambda y: (y * y).sum(),
    "l2": lambda y: (y * y).sum().sqrt(),
    "l1": lambda y: y.relu().sum() + (-y).relu().sum(),
}


@pytest.mark.parametrize("square", [False, True], ids=["abs", "square"])
@pytest.mark.parametrize("objective", [*VALUES, "callable"])
def test_loop_against_vmap_of_grad(objective, square):
    model, x = model_of(), data(6, 5)
    value = VALUES.get(objective, lambda y: y[1].exp())
    wide = copy.deepcopy(model).double().eval()
    parameters = dict(wide.named_parameters())
    one = lambda p, z: value(functional_call(wide, p, (z[None],))[0])  # noqa: E731
    gradients = vmap(grad(one), in_dims=(None, 0))(parameters, x)
    truth = {name: magnitude(g.detach(), square) / 6 for name, g in gradients.items()}
    omega = importance_loop(
        model,
        x.float(),
        objective=objective if objective in VALUES else lambda y: y[:, 1].exp(),
        statistic="square" if square else "abs",
        dtype=torch.float64,
    )
    assert omega.keys() == truth.keys()
    # The batch was rounded to float32 on its way in.
    assert max(relative_error(omega[name], truth[name]) for name in truth) <= 1e-5
    exact = importance_loop(
        model,
        x,
        objective=objective if objective in VALUES else lambda y: y[:, 1].exp(),
        statistic="square" if square else "abs",
    )
    assert max(relative_error(exact[name], truth[name]) for name in truth) <= 1e-12


def test_loop_leaves_the_model_alone_and_needs_no_gradient_mode():
    model = model_of().train()
    model[0].weight.requires_grad_(False)
    before = {name: (id(p), p._version, p.clone(), p.dtype) for name, p in model.named_parameters()}
    with torch.inference_mode():
        omega = importance_loop(model, torch.ones(2, 5))
    assert "0.weight" not in omega and "0.bias" in omega and omega["0.bias"].dtype == torch.float64
    for name, p in model.named_parameters():
        identity, version, value, dtype = before[name]
        assert (id(p), p._version, p.dtype, p.grad) == (identity, version, dtype, None) and torch.equal(p, value)
    assert all(module.training for module in model.modules())


def test_loop_keeps_dtypes_on_request_and_counts_unused_parameters_as_zero():
    model = nn.ModuleDict({"used": nn.Linear(5, 2), "idle": nn.Linear(5, 2)})
    omega = importance_loop(model, {"x": torch.ones(3, 5)}, forward=lambda m, b: m["used"](b["x"]), dtype=None)
    assert omega["used.weight"].dtype == torch.float32 and omega["used.weight"].all()
    assert not omega["idle.weight"].any()


def test_objectives_by_hand():
    y = torch.tensor([[[3.0], [-4.0]], [[0.0], [2.0]]])
    assert sample_objective("l2_squared", y).tolist() == [25.0, 4.0]
    assert sample_objective("l2", y).tolist() == [5.0, 2.0]
    assert sample_objective("l1", y).tolist() == [7.0, 2.0]
    scalars = torch.tensor([3.0, -4.0])
    assert sample_objective("l2_squared", scalars).tolist() == [9.0, 16.0]
    assert sample_objective("l2", scalars).tolist() == sample_objective("l1", scalars).tolist() == [3.0, 4.0]
    assert sample_objective(lambda out: out["y"][:, 0, 0], {"y": y}).tolist() == [3.0, 0.0]


def echo(*args, **kwargs):
    return args, kwargs


def test_default_forward():
    x, y = torch.ones(2), torch.zeros(2)
    assert default_forward(echo, x) == ((x,), {})
    assert default_forward(echo, (x, y)) == ((x,), {})
    assert default_forward(echo, [x]) == ((x,), {})
    args, kwargs = default_forward(echo, {"a": x, "labels": y, "label": y, "label_ids": y, "flag": True})
    assert args == () and kwargs == {"a": x, "flag": True}


@pytest.mark.parametrize(
    "batch", [None, 3, "text", (), [], ("a", torch.ones(1)), {}, {"a": 1}, [[torch.ones(1)]]], ids=repr
)
def test_default_forward_asks_for_forward(batch):
    with pytest.raises(TypeError, match=r"batch must be a tensor.*pass forward=lambda model, batch"):
        default_forward(echo, batch)


def test_output_tensor():
    x, y = torch.ones(2, 3), torch.zeros(2, 3)
    assert output_tensor(x) is x
    assert output_tensor(SimpleNamespace(logits=x, last_hidden_state=y)) is x
    assert output_tensor(SimpleNamespace(logits=None, last_hidden_state=y)) is y
    with pytest.raises(TypeError, match=r"output must be a tensor or have .logits or .last_hidden_state, got tuple"):
        output_tensor((x, y))
    with pytest.raises(ValueError, match=r"got a scalar"):
        output_tensor(x.sum())
