"""Merging the importances of two sets of samples: the arithmetic of one tensor, and what may be merged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mas_fast.checks import one_of
from mas_fast.sharding import placed_like

MERGES = ("sum", "mean", "ema", "max")


def check_merge(how: str, alpha: float, *, argument: str = "how") -> None:
    """Check the two arguments that say how importances are merged.

    Args:
        how: One of `MERGES`.
        alpha: A number from 0 to 1.
        argument: What the caller's argument for `how` is called.

    Raises:
        ValueError: `how` is unknown or `alpha` outside [0, 1].
    """
    one_of(argument, how, MERGES)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")


def merge_tensors(first: Tensor, second: Tensor, counts: tuple[int, int], how: str, *, alpha: float) -> Tensor:
    """Merge two Ω of one parameter as `Importance.merge` says.

    Args:
        first: Ω1.
        second: Ω2, of the same shape.
        counts: N1 and N2.
        how: "sum", "mean", "ema" or "max".
        alpha: The weight of Ω2 in "ema".

    Returns:
        A new tensor placed like `first`, in the wider of the two dtypes.
    """
    dtype = torch.promote_types(first.dtype, second.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    first, second = first.to(wide), placed_like(second, first).to(wide)
    if how == "max":
        return torch.maximum(first, second).to(dtype)
    total = sum(counts)
    weight_1, weight_2 = {
        "sum": (1.0, 1.0),
        "mean": (counts[0] / total, counts[1] / total),
        "ema": (1.0 - alpha, float(alpha)),
    }[how]
    return (first * weight_1).add_(second, alpha=weight_2).to(dtype)


def list_meaning_differences(first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    """Return one line for each of objective, statistic and scope in which two importances differ."""
    return [f"{key} is {second[key]!r} and was {first[key]!r}" for key in first if first[key] != second[key]]
