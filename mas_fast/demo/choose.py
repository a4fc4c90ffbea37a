"""Choose the learning rate and λ on validation images: ``python -m mas_fast.demo.choose``. Takes about ten minutes."""

from __future__ import annotations

import math
import statistics

from mas_fast.demo import metrics
from mas_fast.demo.data import load_tasks
from mas_fast.demo.settings import Settings
from mas_fast.demo.train import METHODS, DivergenceError, single_thread

SEEDS = range(100, 110)
LEARNING_RATES = (0.02, 0.05, 0.1)
# Accuracies this close are a tie: their standard error over the seeds is 0.6 points.
TIE = 0.005
LAMS = (0.01, 0.03, 0.1, 0.3, 1.0)


def main() -> None:
    """Print the validation accuracy of MAS for every pair, and what the other methods make of the learning rates."""
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

    candidates = [Settings(lr=lr, lam=lam) for lr in LEARNING_RATES for lam in LAMS]
    scores = {settings: score("MAS", settings) for settings in candidates}
    for lr in LEARNING_RATES:
        for method in ("fine-tuning", "joint"):
            score(method, Settings(lr=lr, lam=0.0))
    # The first: the smallest learning rate, then the smallest λ.
    chosen = next(settings for settings in candidates if scores[settings] >= max(scores.values()) - TIE)
    print(f"chosen: lr {chosen.lr}, lam {chosen.lam}")


if __name__ == "__main__":
    with single_thread():
        main()
