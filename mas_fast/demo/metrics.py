"""Accuracy and forgetting of a sequence of tasks, and their spread over seeds.

R[i][j] is the accuracy on task j after training on task i, j ≤ i, with T tasks in all.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]


def average_accuracy(matrix: Matrix) -> float:
    """Return the mean of the last row: Σ_j R[T−1][j] / T."""
    return statistics.fmean(matrix[-1])


def accuracy_along_sequence(matrix: Matrix) -> list[float]:
    """Return the mean of each row: the average accuracy over the tasks seen so far."""
    return [statistics.fmean(row) for row in matrix]


def new_task_accuracy(matrix: Matrix) -> float:
    """Return the mean of the diagonal, the accuracy on each task when it has just been learned: Σ_i R[i][i] / T."""
    return statistics.fmean(row[-1] for row in matrix)


def forgetting(matrix: Matrix) -> float:
    """Return Σ_{j<T−1} (max_{j≤i<T−1} R[i][j] − R[T−1][j]) / (T−1).

    It is negative where a task got better after it had been learned.

    Source: Chaudhry et al., Riemannian Walk for Incremental Learning, ECCV 2018.
    """
    if len(matrix) < 2:
        raise ValueError(f"matrix must have at least 2 tasks, got {len(matrix)}")
    last = matrix[-1]
    return statistics.fmean(max(row[task] for row in matrix[task:-1]) - last[task] for task in range(len(matrix) - 1))


def mean_and_error(values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean and its standard error s/√K over K seeds; one seed has no standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error}


def interval_95(values: Sequence[float]) -> list[float] | None:
    """Return the 95 % confidence interval of the mean by Student's t, or None for one value."""
    from scipy.stats import t  # type: ignore[import-untyped]

    summary = mean_and_error(values)
    mean, error = summary["mean"], summary["standard_error"]
    if mean is None or error is None:
        return None
    reach = float(t.ppf(0.975, len(values) - 1)) * error
    return [mean - reach, mean + reach]
