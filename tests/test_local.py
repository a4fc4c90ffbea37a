"""l-MAS: every layer's importance is that of its own output, cut off from the layers before and after it."""

import pytest
import torch
from torch import nn

import mas_fast
from mas_fast import CaptureError


def layerwise(layers, batch, square=False):
    """Return Ω of functions in a row, by one backward for each sample and layer in float64: the definition."""
    totals = {}
    for x in batch.split(1):
        y = x
        for layer in layers:
            parameters = dict(layer.named_parameters()) if isinstance(layer, nn.Module) else {}
            y = layer(y.detach())
            if parameters:
                for name, g in zip(parameters, torch.autograd.grad(y.square().sum(), parameters.values()), strict=True):
                    key = id(layer), name
                    totals[key] = totals.get(key, 0) + (g.square() if square else g.abs()) / len(batch)
    return totals


class Row(nn.Sequential):
    """Layers, each with what follows until the next one."""


def layer(module, *rest):
    return Row(module, *rest)


def relative_error(actual, truth):
    return float((actual.double() - truth).norm() / truth.norm().clamp_min(1e-300))


def check(layers, batch, tolerance=1e-11, **options):
    model = nn.Sequential(*layers).double()
    batch = batch.double()
    importance = mas_fast.estimate_importance(model, batch.split(4), scope="local", dtype=torch.float64, **options)
    truth = layerwise(layers, batch, options.get("statistic") == "square")
    names = {id(p): name for name, p in model.named_parameters()}
    found = 0
    for own in layers:
        for name, parameter in own.named_parameters():
            assert relative_error(importance[names[id(parameter)]], truth[id(own), name]) <= tolerance
            found += 1
    assert found == len(importance)
    assert importance.scope == "local"


@pytest.mark.parametrize("statistic", ["abs", "square"])
def test_mlp_is_the_hebbian_rule(statistic):
    torch.manual_seed(0)
    sizes = [7, 11, 5, 3]
    layers = [layer(nn.Linear(i, o), nn.ReLU()) for i, o in zip(sizes, sizes[1:], strict=False)]
    x = torch.randn(10, 7)
    check(layers, x, statistic=statistic)
    if statistic == "abs":
        # The paper's closed form: 2 y_i y_j, without a backward.
        model = nn.Sequential(*layers).double()
        importance = mas_fast.estimate_importance(model, [x.double()], scope="local", dtype=torch.float64)
        y = x.double()
        for index, own in enumerate(layers):
            after = own(y).detach()
            expected = 2 * torch.einsum("nj,ni->ji", after, y.abs()) / len(x)
            assert relative_error(importance[f"{index}.0.weight"], expected) <= 1e-11
            y = after


def test_convolutions_norms_and_pooling():
    torch.manual_seed(0)
    layers = [
        layer(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)),
        layer(nn.GroupNorm(2, 4), nn.ReLU()),
        layer(nn.Conv2d(4, 3, 3, stride=2), nn.ReLU(), nn.Flatten()),
        layer(nn.Linear(3 * 1 * 1, 5)),
    ]
    check(layers, torch.randn(9, 2, 8, 8))


def test_rows_of_several_positions():
    torch.manual_seed(0)
    layers = [layer(nn.Linear(6, 8), nn.GELU()), layer(nn.LayerNorm(8)), layer(nn.Linear(8, 4), nn.Flatten())]
    check(layers, torch.randn(7, 5, 6))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.first(x).relu()
        return self.last(h + self.second(h).tanh())


def test_skip_connections_are_cut():
    torch.manual_seed(0)
    model, x = Residual().double(), torch.randn(6, 4).double()
    importance = mas_fast.estimate_importance(model, [x], scope="local", dtype=torch.float64)
    parameters = dict(model.named_parameters())
    expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in x.split(1):
        h = model.first(row).relu()
        joined = h.detach() + model.second(h.detach()).tanh()
        total = h.square().sum() + joined.square().sum() + model.last(joined.detach()).square().sum()
        for name, g in zip(expected, torch.autograd.grad(total, parameters.values()), strict=True):
            expected[name] += g.abs() / len(x)
    for name, truth in expected.items():
        assert relative_error(importance[name], truth) <= 1e-11


def test_layers_that_are_not_measured_end_those_before_them():
    torch.manual_seed(0)
    layers = [layer(nn.Linear(5, 6), nn.ReLU()), layer(nn.Linear(6, 4), nn.ReLU()), layer(nn.Linear(4, 3))]
    model, x = nn.Sequential(*layers).double(), torch.randn(8, 5).double()
    importance = mas_fast.estimate_importance(model, [x], scope="local", parameters=["0.0.weight"])
    assert relative_error(importance["0.0.weight"], layerwise(layers, x)[id(layers[0]), "0.weight"]) <= 1e-6


def test_batches_do_not_matter():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)).double(), torch.randn(13, 5).double()
    whole, split = (mas_fast.estimate_importance(model, x.split(n), scope="local") for n in (13, 1))
    assert all(relative_error(whole[name], split[name].double()) <= 1e-6 for name in whole)
    with mas_fast.capture(model, scope="local") as session:
        session.accumulate(lambda: model(x).square().sum(1))
    assert all(relative_error(session.importance()[name], whole[name].double()) <= 1e-6 for name in whole)


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.first(x.transpose(0, 1)).relu()).transpose(0, 1)


@pytest.mark.parametrize("positions", [5, 6])
def test_samples_on_another_axis_are_refused(positions):
    # With as many positions as samples only the samples alone show it.
    with pytest.raises(CaptureError, match=r"samples first in scope='local'"):
        mas_fast.estimate_importance(TimeFirst(), [torch.randn(6, positions, 3)], scope="local")


def test_attention_of_torch_is_refused_and_measured_one_sample_at_a_time():
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(6, 5, 8)
    with pytest.raises(CaptureError, match="nn.MultiheadAttention"):
        mas_fast.estimate_importance(model, [x], scope="local")
    alone = mas_fast.estimate_importance(model, x.split(1), scope="local")
    mean = {name: torch.zeros_like(omega) for name, omega in alone.items()}
    for row in x.split(1):
        for name, omega in mas_fast.estimate_importance(model, [row], scope="local").items():
            mean[name] += omega / len(x)
    assert all(relative_error(alone[name], mean[name].double()) <= 1e-5 for name in mean)


def test_what_no_rule_covers_is_an_error():
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return g @ w.T, x.T @ g

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.w = nn.Linear(3, 3), nn.Parameter(torch.randn(3, 2))

        def forward(self, x):
            return Own.apply(self.first(x), self.w)

    with pytest.raises(CaptureError, match="no rule is exact for"):
        mas_fast.estimate_importance(Model(), [torch.randn(4, 3)], scope="local")
