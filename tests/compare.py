"""How results are compared with the truth, the per-sample loop in float64."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from mas_fast.reference import importance_loop


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Return ‖actual − truth‖ / ‖truth‖, in float64; the error itself where the truth is zero."""
    difference = (actual.double() - truth.double()).norm()
    return float(difference / truth.double().norm()) if truth.count_nonzero() else float(difference)


def assert_as_accurate(actual: Tensor, truth: Tensor, baseline: Tensor, slack: float) -> None:
    """Demand that actual is no further from the truth than torch's own result in the same dtype, plus a slack."""
    error, allowed = relative_error(actual, truth), relative_error(baseline, truth) + slack
    assert error <= allowed, f"relative error {error:.3g} must be at most {allowed:.3g}"


def single_samples(batch):
    """Split a batch whose tensors all have the samples first into batches of one sample."""
    count = len(tree_leaves(batch)[0])
    return [tree_map_only(Tensor, lambda t, i=i: t[i : i + 1], batch) for i in range(count)]


def truth_of(model, batch, **options) -> dict[str, Tensor]:
    """Return the mean of the float64 loop over batches of one sample: nothing of the batch can enter."""
    rows = [importance_loop(model, sample, **options) for sample in single_samples(batch)]
    return {name: torch.stack([row[name] for row in rows]).mean(0) for name in rows[0]}


def worst_error(importance, truth) -> float:
    """Return the largest relative error of any parameter."""
    assert set(importance) == set(truth)
    return max(relative_error(importance[name], truth[name]) for name in truth)
