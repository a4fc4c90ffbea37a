"""Choose the learning rate and λ on validation images: ``python -m mas_fast.demo.choose``. Takes some minutes."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

from mas_fast.demo import metrics
from mas_fast.demo.data import load_tasks
from mas_fast.demo.settings import Settings
from mas_fast.demo.train import METHODS, DivergenceError, single_thread

SEEDS = range(100, 110)
LEARNING_RATES = (0.03, 0.1, 0.3)
LAMS = (0.003, 0.01, 0.03, 0.1, 0.3)


def main() -> None:
    """Print the validation accuracy of every candidate, and the two that are chosen."""
    tasks = load_tasks(validation=True)

    def score(method: str, settings: Settings) -> float:
        try:
            runs = [METHODS[method](tasks, settings, seed, lambda trained: None) for seed in SEEDS]
        except DivergenceError:
            print(f"{method:12} lr {settings.lr:<5} lam {settings.lam:<6} diverged", flush=True)
            return -math.inf
        average, forgot = (
            statistics.fmean(metric(run.accuracy) for run in runs)
            for metric in (metrics.average_accuracy, metrics.forgetting)
        )
        print(
            f"{method:12} lr {settings.lr:<5} lam {settings.lam:<6} average accuracy {average:.4f}  "
            f"forgetting {forgot:.4f}",
            flush=True,
        )
        return average

    settings = Settings(lam=0.0)
    settings = max((replace(settings, lr=lr) for lr in LEARNING_RATES), key=lambda s: score("joint", s))
    score("fine-tuning", settings)
    settings = max((replace(settings, lam=lam) for lam in LAMS), key=lambda s: score("MAS", s))
    print(f"chosen: lr {settings.lr}, lam {settings.lam}")


if __name__ == "__main__":
    with single_thread():
        main()
