"""Activation checkpoints: their second forward happens in the backward, and is watched there."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import torch.utils.checkpoint
from compare import truth_of, worst_error
from torch import nn

from mas_fast import CaptureError, estimate_importance, verify
from mas_fast.reference import importance_loop

# Asked of single samples under no_grad, a reentrant checkpoint says so.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


class Model(nn.Module):
    """Runs a function with checkpoints, or, for the truth, without."""

    def __init__(self, function, reentrant):
        super().__init__()
        self.function, self.reentrant, self.on = function, reentrant, True
        self.first, self.head = nn.Linear(5, 6), nn.LazyLinear(2)
        self.block = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6), nn.LayerNorm(6))
        self.other = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True))

    def checkpoint(self, function, *args):
        if not self.on:
            return function(*args)
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=self.reentrant)

    def forward(self, x):
        return self.head(self.function(self, self.first(x)))


CASES = {
    "once": lambda m, h: m.checkpoint(m.block, h),
    "two_blocks": lambda m, h: m.checkpoint(m.other, m.checkpoint(m.block, h)),
    "same_block_twice": lambda m, h: m.checkpoint(m.block, m.checkpoint(m.block, h).tanh()),
    "inside_and_outside": lambda m, h: m.block(m.checkpoint(m.block, h).tanh()),
    "twice_inside": lambda m, h: m.checkpoint(lambda t: m.block(m.block(t)), h),
    "nested": lambda m, h: m.checkpoint(lambda t: m.checkpoint(m.block, m.other(t)), h),
    "derived": lambda m, h: m.checkpoint(lambda t: F.linear(t, m.block[0].weight.exp()), h),
    "derived_product": lambda m, h: m.checkpoint(lambda t: t @ m.block[0].weight.exp().t(), h),
    "derived_twice": lambda m, h: m.checkpoint(lambda t: (t + m.block[2].bias) * (1 + m.block[2].bias), h),
    "normalized": lambda m, h: m.checkpoint(lambda t: F.linear(t, F.normalize(m.block[0].weight)), h),
    "selection": lambda m, h: m.checkpoint(lambda t: F.linear(t, m.block[0].weight[:3]), h),
    "time_first": lambda m, h: m.checkpoint(lambda t: m.block(t.expand(3, *t.shape)).sum(0), h),
}


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_checkpoints_are_exact(name, reentrant, samples):
    torch.manual_seed(0)
    model = Model(CASES[name], reentrant)
    model(torch.randn(2, 5))
    model.double().eval()
    model.first.weight.grad = torch.ones_like(model.first.weight)
    batches = [torch.randn(samples, 5).double() for _ in range(3)]
    importance = estimate_importance(model, batches, dtype=torch.float64)
    model.on = False
    assert worst_error(importance, truth_of(model, torch.cat(batches))) <= 1e-11
    assert all(row.fallback is None for row in importance.coverage)
    assert model.first.weight.grad.eq(1).all() and model.block[0].weight.grad is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_uses_are_counted_wherever_they_are(reentrant):
    torch.manual_seed(0)
    model = Model(CASES["inside_and_outside"], reentrant)
    model(torch.randn(2, 5))
    importance = estimate_importance(model, [torch.randn(4, 5)] * 2)
    assert {row.uses for row in importance.coverage if row.name.startswith("block")} == {2}


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)


def test_the_loop_goes_through_checkpoints_that_allow_it():
    torch.manual_seed(0)

    def function(m, h):
        return m.checkpoint(m.block, Opaque.apply(h, m.other[0].bias))

    model = Model(function, reentrant=False)
    model(torch.randn(2, 5))
    model.double().eval()
    batch = torch.randn(4, 5).double()
    importance = estimate_importance(model, [batch], dtype=torch.float64)
    assert [row.name for row in importance.coverage if row.fallback] == ["other.0.bias"]
    model.reentrant = True
    with pytest.raises(CaptureError, match="use_reentrant=False"):
        estimate_importance(model, [batch])
    model.on = False
    assert worst_error(importance, truth_of(model, batch)) <= 1e-11


def written(model, h):
    def block(t):
        t = t.clone()
        t[:, 0] = model.block[2].bias[0]
        return F.linear(t, model.block[0].weight).tanh()

    return model.checkpoint(block, h)


def test_what_a_reentrant_checkpoint_hides_is_an_error():
    torch.manual_seed(0)
    model = Model(written, reentrant=True)
    model(torch.randn(2, 5))
    with pytest.raises(CaptureError, match=r"block.2.bias are used in a reentrant .* pass use_reentrant=False"):
        estimate_importance(model, [torch.randn(4, 5)])
    assert all(parameter.grad is None for parameter in model.parameters())


class Whole(Model):
    """A model whose layers are all in one checkpoint."""

    def forward(self, x):
        return self.checkpoint(lambda t: self.head(self.block(self.first(t))), x).tanh()


@pytest.mark.parametrize("kind", [Model, Whole])
def test_the_loop_sees_what_a_reentrant_checkpoint_hides(kind):
    """`torch.autograd.grad` finds no gradient in one, and raises no error where no parameter comes before it."""
    torch.manual_seed(0)
    model = kind(CASES["once"], reentrant=True)
    x = torch.randn(4, 5, requires_grad=True)
    model(x)
    x.grad = torch.ones_like(x)
    omega = importance_loop(model, x)
    report = verify(model, x, show=False)
    assert report.passed, report
    assert x.grad.eq(1).all() and all(p.grad is None for p in model.parameters())
    model.on = False
    assert worst_error(omega, importance_loop(model, x)) <= 1e-12


def test_a_model_that_cannot_be_copied_is_left_as_it_was():
    """Also what only the checkpoint shows, and what would step in the backward."""

    class Fixed(Whole):
        def __deepcopy__(self, memo):
            raise TypeError("not to be copied")

    torch.manual_seed(0)
    model, x = Fixed(CASES["once"], reentrant=True), torch.randn(4, 5, requires_grad=True)
    model(x)
    weight = model.block[0].weight
    weight.grad, before = torch.ones_like(weight), weight.detach().clone()
    stepped = []
    weight.register_post_accumulate_grad_hook(stepped.append)
    names = ["first.weight", "head.weight"]
    estimate_importance(model, [x], parameters=names)
    assert not stepped
    assert verify(model, x, dtype=torch.float32, parameters=names, show=False).passed
    assert weight.grad.eq(1).all() and model.block[0].bias.grad is None
    assert weight.equal(before) and not stepped
    model(x).sum().backward()
    assert len(stepped) == 1
