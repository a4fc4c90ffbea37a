"""What every experiment writes as JSON: tables, accuracy matrices, curves and claims, with errors over the seeds.

`python -m mas_fast report` draws them all in the same way.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mas_fast.demo.metrics import Matrix, forgetting, interval_95, mean_and_error

Json = dict[str, Any]


def table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[Sequence[float] | None]]) -> Json:
    """Return a table in percent.

    Args:
        title: Of the table.
        columns: Names.
        rows: Name -> for each column the values of the seeds, as fractions; None where there is none.
    """
    cells = {
        name: [None if own is None else mean_and_error([100 * value for value in own]) for own in values]
        for name, values in rows.items()
    }
    return {"title": title, "columns": list(columns), "rows": [{"name": n, "cells": c} for n, c in cells.items()]}


def matrix(title: str, tasks: Sequence[str], seeds: Sequence[Matrix]) -> Json:
    """Return an accuracy matrix, the accuracy on task j after task i in row i, averaged over the seeds."""
    mean = [
        [statistics.fmean(own[i][j] for own in seeds) for j in range(len(seeds[0][i]))] for i in range(len(seeds[0]))
    ]
    return {"title": title, "tasks": list(tasks), "mean": mean}


def curves(title: str, x_label: str, y_label: str, x: Sequence[Any], series: Mapping[str, Sequence[Any]]) -> Json:
    """Return curves: name -> for each x the values of the seeds, as fractions, drawn in percent."""
    lines = {
        name: [mean_and_error([100 * value for value in own]) for own in values] for name, values in series.items()
    }
    return {"title": title, "x_label": x_label, "y_label": y_label, "x": list(x), "series": lines}


def heatmap(title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]) -> Json:
    """Return a table that is drawn as colours."""
    return {"title": title, "rows": list(rows), "columns": list(columns), "values": [list(row) for row in values]}


def claim(text: str, differences: Sequence[float], *, ties: bool = False, margin: float = 0.0) -> Json:
    """Return a claim with what the seeds say of it.

    Args:
        text: What is claimed, to be read with a verdict behind it.
        differences: For each seed how far the claim is exceeded, as fractions: it holds if their mean is above 0.
        ties: Whether it also holds if 0 lies within the interval.
        margin: It holds if the whole interval lies above −margin: equivalence within what the margin allows.

    Returns:
        With `verdict` "holds", "ties", "does not hold" or "cannot be told", by the 95 % interval of the mean.
    """
    bounds = interval_95(differences)
    low, high = (float("-inf"), float("inf")) if bounds is None else bounds
    if margin:
        verdict = "holds" if low > -margin else "does not hold" if high < -margin else "cannot be told"
    elif low > 0:
        verdict = "holds"
    elif high < 0:
        verdict = "does not hold"
    else:
        verdict = "ties" if ties and bounds is not None else "cannot be told"
    return {
        "claim": text,
        "verdict": verdict,
        "difference_points": 100 * statistics.fmean(differences),
        "interval_95_points": None if bounds is None else [100 * low, 100 * high],
        "margin_points": 100 * margin,
    }


def dropped(accuracy: Matrix) -> float:
    """Return the average forgetting of a matrix; of joint training, which has one row, 0."""
    return forgetting(accuracy) if len(accuracy) > 1 else 0.0


def over_problems(per_problem: Sequence[Sequence[float]]) -> list[float]:
    """Return for each seed the mean over the problems: they share their seeds, so they are no further samples."""
    return [statistics.fmean(values) for values in zip(*per_problem, strict=True)]
