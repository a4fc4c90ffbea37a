"""What users' models do that once took the loop, or far more time, without need."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from compare import truth_of, worst_error
from torch import nn
from torch.utils.data import TensorDataset

from mas_fast import estimate_importance
from mas_fast.capture.forward import Forward
from mas_fast.chunks import Chunks


def exact_by_rule(model, batches):
    """Return the pass in float64, which must be right and without a loop."""
    model = model.double()
    found = estimate_importance(model, batches, dtype=torch.float64, unsupported="raise")
    truths = [(truth_of(model, batch), len(batch)) for batch in batches]
    count = sum(rows for _, rows in truths)
    truth = {name: sum(own[name] * rows for own, rows in truths) / count for name in truths[0][0]}
    assert worst_error(found, truth) <= 1e-11
    return found


class Plain(nn.Module):
    """A model of one parameter and a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.a = nn.Parameter(torch.rand(4, 4) + 0.5)

    def forward(self, x):
        return self.function(x, self.a)


CAST = {
    "to(x)": lambda x, a: x @ (torch.eye(4).to(x) + a).exp(),
    "to(a)": lambda x, a: x @ (torch.eye(4).to(a) + a).exp(),
    "type_as": lambda x, a: x * (a + torch.full((4, 4), -9.0).triu(1).type_as(x)).softmax(-1).sum(0),
    "linspace": lambda x, a: x * (torch.linspace(0, 1, 4).to(x) * a[0]).sin(),
}


@pytest.mark.parametrize("name", CAST)
def test_a_constant_that_is_cast_like_data_is_a_constant(name):
    torch.manual_seed(0)
    exact_by_rule(Plain(CAST[name]), [torch.randn(5, 4).double()])


class Adapter(nn.Module):
    """A weight-decomposed low-rank adapter (DoRA): its norm is a constant for the backward."""

    def __init__(self, without_gradients):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5), requires_grad=False)
        self.down, self.up = nn.Linear(5, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.magnitude = nn.Parameter(torch.rand(6) + 0.5)
        self.without_gradients = without_gradients

    def norm(self, x):
        update = self.up(self.down(torch.eye(5, dtype=x.dtype))).T
        return torch.linalg.norm(self.weight + update, dim=1)

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.without_gradients):
            norm = self.norm(x)
        return self.magnitude / norm.detach() * (F.linear(x, self.weight) + self.up(self.down(x)))


@pytest.mark.parametrize("without_gradients", [False, True])
def test_a_detached_function_of_parameters_is_a_constant(without_gradients):
    torch.manual_seed(0)
    exact_by_rule(Adapter(without_gradients), [torch.randn(7, 5).double()])


@pytest.mark.parametrize("write", ["setitem", "add_"])
def test_what_data_was_written_into_is_no_constant_when_it_is_detached(write):
    torch.manual_seed(0)

    def function(x, a):
        table = torch.zeros_like(x) + a.sum()
        if write == "setitem":
            table[:] = x @ a
        else:
            table.add_(x @ a)
        return x * table.detach().exp().clamp(max=3) @ a

    model = Plain(function).double()
    batches = [torch.randn(5, 4).double()]
    found = estimate_importance(model, batches, dtype=torch.float64)
    assert worst_error(found, truth_of(model, batches[0])) <= 1e-11


class PositionBias(nn.Module):
    """Swin V2's biases: a small network over a table of coordinates."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2, 8), nn.ReLU(inplace=True), nn.Linear(8, 1, bias=False))
        self.register_buffer("table", torch.randn(4, 4, 2))

    def forward(self, x):
        return (x[:, :, None] * x[:, None] + self.mlp(self.table)[..., 0].sigmoid()).softmax(-1)


def test_what_is_derived_may_go_through_a_relu_in_place():
    torch.manual_seed(0)
    exact_by_rule(PositionBias(), [torch.randn(5, 4).double()])


class Experts(nn.Module):
    """Tokens go to the expert that scores highest."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        tokens = x.reshape(-1, 4)
        scores = self.router(tokens)
        chosen = scores.argmax(1)
        out = tokens
        for number, expert in enumerate(self.experts):
            rows = torch.where(chosen == number)[0]
            out = out.index_add(0, rows, expert(tokens[rows]) * scores[rows, number, None])
        return out.view_as(x)


def test_an_expert_with_the_tokens_of_one_sample_or_of_none_does_not_change_what_follows(monkeypatch):
    torch.manual_seed(0)
    model = Experts().double()
    with torch.no_grad():
        model.router.weight.copy_(torch.eye(3, 4))
    small = torch.randn(2, 2, 4).double()
    small[..., :3] = torch.eye(3)[torch.tensor([[0, 1], [0, 0]])]  # the second expert gets one token, the third none
    large = [torch.randn(8, 6, 4).double() for _ in range(3)]
    runs = []
    run = Forward.run
    monkeypatch.setattr(Forward, "run", lambda self, objectives: runs.append(1) or run(self, objectives))
    exact_by_rule(model, [small, *large])
    assert len(runs) == 8  # two for each batch, whose routes are proved anew


def test_joining_takes_no_longer_for_many_small_batches(monkeypatch):
    chunks = Chunks(nn.Linear(2, 2), "auto", is_default=True)
    monkeypatch.setattr(Chunks, "_most_joined", lambda self, x: 1 << 30)
    asked = []
    length = torch.Tensor.__len__
    monkeypatch.setattr(torch.Tensor, "__len__", lambda self: asked.append(1) or length(self))
    batches = [torch.zeros(2, 2) for _ in range(500)]
    walked = list(chunks.join(batches, batches))
    assert [list(numbers) for numbers, _, _ in walked] == [[0], list(range(1, 500))]
    assert len(asked) < 10 * len(batches)


class Caching(nn.Module):
    """Keeps what it made of a parameter, as LeViT does in eval mode."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.biases = nn.Parameter(torch.randn(3))
        self.cache = {}
        self.last = None

    def forward(self, x):
        if self.training:
            bias = self.biases[torch.tensor([0, 1, 2, 0])]
        else:
            if "cpu" not in self.cache:
                self.cache["cpu"] = self.biases[torch.tensor([0, 1, 2, 0])]
            bias = self.cache["cpu"]
        self.last = self.linear(x) + bias
        return self.last


@pytest.mark.parametrize("training", [False, True])
def test_what_a_model_keeps_of_its_forwards_goes(training):
    torch.manual_seed(0)
    model = Caching().train(training)
    x = torch.randn(5, 4)
    estimate_importance(model, [x, x])
    assert not model.cache
    assert model.last is None
    copy.deepcopy(model)


def test_a_dataset_gives_no_batches():
    data = TensorDataset(torch.randn(6, 3, 4), torch.arange(6))
    with pytest.raises(TypeError, match="DataLoader"):
        estimate_importance(nn.Linear(4, 2), data)
