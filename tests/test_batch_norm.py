"""Batches of one through batch norm, of which torch's own backward is wrong for some strides."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from compare import relative_error, truth_of, worst_error
from torch import nn
from torch.utils.checkpoint import checkpoint

from mas_fast import batch_norm, estimate_importance, verify

# Of [1, 8, 4, 4]: contiguous, channels-last, and the latter with a stride of the batch that means nothing.
STRIDES = {"contiguous": (128, 16, 4, 1), "channels last": (128, 1, 32, 8), "meaningless": (8, 1, 32, 8)}


def strided(t, strides):
    return torch.empty_strided(t.shape, strides, dtype=t.dtype).copy_(t)


class Restride(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, delta):
        return strided(delta, STRIDES["meaningless"]) if len(delta) == 1 else delta


class Tokens(nn.Module):
    """An image, normalised, becomes tokens."""

    def __init__(self, affine=True, restrides=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4, bias=False)
        self.norm = nn.BatchNorm2d(8, affine=affine)
        self.head = nn.Linear(8, 3)
        self.restrides = restrides
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        y = self.norm(self.conv(x))
        y = Restride.apply(y) if self.restrides else y
        return self.head(y.flatten(2).transpose(1, 2).square()).mean(1)


@pytest.mark.parametrize("of_delta", STRIDES)
@pytest.mark.parametrize("of_x", STRIDES)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_backward_is_right_for_all_strides(training, affine, of_x, of_delta):
    torch.manual_seed(0)
    x, delta = torch.randn(2, 1, 8, 4, 4, dtype=torch.float64)
    mean, variance, weight, bias = torch.rand(4, 8, dtype=torch.float64) + 0.5
    own = (weight, bias) if affine else (None, None)

    def gradients(x, delta, run):
        leaves = [t.detach().requires_grad_() for t in (x, *own) if t is not None]
        args = (leaves[0], mean.clone(), variance.clone(), *(leaves[1:] or own), training)
        return torch.autograd.grad(run(F.batch_norm, args, {}), leaves, delta)

    found = gradients(strided(x, STRIDES[of_x]), strided(delta, STRIDES[of_delta]), batch_norm.run)
    truth = gradients(x, delta, lambda function, args, kwargs: function(*args, **kwargs))
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize("restrides", [False, True])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_batches_of_one_give_the_omega_of_one_batch(affine, restrides):
    torch.manual_seed(0)
    model = Tokens(affine, restrides).double()
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    twice = copy.deepcopy(model).eval()
    truth = {name: torch.zeros_like(p) for name, p in twice.named_parameters()}
    for image in images:
        # A batch of two equal ones, whose strides mean something.
        gradients = torch.autograd.grad(twice(image.expand(2, -1, -1, -1)).square().sum() / 2, list(twice.parameters()))
        for total, gradient in zip(truth.values(), gradients, strict=True):
            total += gradient.abs() / len(images)
    found = {
        "one batch": estimate_importance(model, [images], dtype=torch.float64),
        "batches of one": estimate_importance(model, list(images.split(1)), dtype=torch.float64),
        "loop": truth_of(model, images),
    }
    errors = {name: worst_error(omega, truth) for name, omega in found.items()}
    assert max(errors.values()) < 1e-12, errors
    verify(model, images, show=False).raise_if_wrong()


class Checkpointed(Tokens):
    """Runs its first layers again in the backward."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = checkpoint(lambda h: self.norm(self.conv(h)), self.first(x), use_reentrant=True)
        return self.head(Restride.apply(y).flatten(2).transpose(1, 2).square()).mean(1)


def test_what_a_checkpoint_runs_again_is_right_too():
    torch.manual_seed(0)
    model = Checkpointed().double()
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    whole = estimate_importance(model, [images], dtype=torch.float64)
    alone = estimate_importance(model, list(images.split(1)), dtype=torch.float64)
    assert worst_error(alone, whole) < 1e-12
    verify(model, images, show=False).raise_if_wrong()
