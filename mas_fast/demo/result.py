"""The result: everything that was run and measured, as one plain dict that is valid JSON."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

import mas_fast
from mas_fast.demo import metrics
from mas_fast.demo.data import Task
from mas_fast.demo.network import LAYERS
from mas_fast.demo.settings import Settings
from mas_fast.demo.train import Run
from mas_fast.machine import cpuinfo

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def build_result(
    tasks: Sequence[Task],
    settings: Settings,
    seeds: Sequence[int],
    runs: Mapping[str, Sequence[Run]],
    cost: Mapping[str, Any],
) -> dict[str, Any]:
    """Put the runs of all methods, one per seed, together with their aggregates.

    Accuracies and forgetting are fractions. ``mean`` and ``standard_error`` are over the seeds; a standard error is
    None with one seed.
    """
    methods = {name: _summarize([run.accuracy for run in method_runs]) for name, method_runs in runs.items()}
    fine_tuning, mas = (methods[name]["forgetting"]["per_seed"] for name in ("fine-tuning", "MAS"))
    avoided = [without - with_mas for without, with_mas in zip(fine_tuning, mas, strict=True)]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": _versions(),
        "machine": _machine(),
        "settings": asdict(settings),
        "seeds": list(seeds),
        "tasks": [
            {"name": task.name, "train": len(task.train_images), "test": len(task.test_images)} for task in tasks
        ],
        "methods": methods,
        "forgetting_avoided": _over_seeds(avoided) | {"interval_95": metrics.interval_95(avoided)},
        "importance": _summarize_importance(runs["MAS"]),
        "cost": dict(cost),
    }


def _summarize(matrices: Sequence[metrics.Matrix]) -> dict[str, Any]:
    cells = [
        [metrics.mean_and_error([matrix[i][j] for matrix in matrices]) for j in range(i + 1)]
        for i in range(len(matrices[0]))
    ]
    along = [metrics.accuracy_along_sequence(matrix) for matrix in matrices]
    return {
        "accuracy": {
            "per_seed": [[list(row) for row in matrix] for matrix in matrices],
            "mean": [[cell["mean"] for cell in row] for row in cells],
            "standard_error": [[cell["standard_error"] for cell in row] for row in cells],
        },
        "accuracy_along_sequence": [_over_seeds(list(values)) for values in zip(*along, strict=True)],
        "average_accuracy": _over_seeds([metrics.average_accuracy(matrix) for matrix in matrices]),
        "new_task_accuracy": _over_seeds([metrics.new_task_accuracy(matrix) for matrix in matrices]),
        "forgetting": _over_seeds([metrics.forgetting(matrix) for matrix in matrices]),
    }


def _over_seeds(values: list[float]) -> dict[str, Any]:
    return {"per_seed": values, **metrics.mean_and_error(values)}


def _summarize_importance(runs: Sequence[Run]) -> dict[str, Any]:
    """Describe the entries of Ω (weights and biases) of each layer, those of all seeds taken together."""
    summary = {}
    for layer in LAYERS:
        total = torch.cat([_entries(run.omega, layer) for run in runs])
        used = total[total > 0]
        summary[layer] = {
            "entries_per_seed": len(total) // len(runs),
            "mean": total.mean().item(),
            "zero_fraction": (total == 0).double().mean().item(),
            "quantiles_of_nonzero": {
                f"p{round(100 * q)}": used.quantile(q).item() if len(used) else 0.0 for q in QUANTILES
            },
            "mean_of_each_task": [
                torch.cat([_entries(run.importance[task], layer) for run in runs]).mean().item()
                for task in range(len(runs[0].importance))
            ],
        }
    return summary


def _entries(omega: Mapping[str, Tensor], layer: str) -> Tensor:
    return torch.cat([tensor.flatten().double() for name, tensor in omega.items() if name.split(".")[0] == layer])


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "numpy", "scikit-learn", "matplotlib")}
    return {"mas_fast": mas_fast.__version__, "python": platform.python_version(), **packages}


def _machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "processor": cpuinfo("model name") or platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
