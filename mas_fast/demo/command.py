"""The command ``python -m mas_fast demo``: its options, and the order of the work."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mas_fast.demo.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mas_fast.demo.data import Task
    from mas_fast.demo.train import Run

JSON_NAME = "demo.json"
PLOT_NAME = "demo.png"
SEEDS = 5
REPEATS = 9
QUICK_SEEDS = 2
QUICK_EPOCHS = 5
QUICK_REPEATS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the demo to a parser."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("mas_fast_demo"),
        metavar="DIR",
        help=f"folder to write {JSON_NAME} and {PLOT_NAME} to (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=_count, metavar="K", help=f"run the seeds 0 to K-1 (default: {SEEDS})")
    parser.add_argument(
        "--lam", type=_weight, metavar="LAM", help=f"weight of the MAS penalty (default: {Settings.lam})"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_SEEDS} seeds and {QUICK_EPOCHS} epochs: shows that everything runs, not what MAS does",
    )


def main(args: argparse.Namespace) -> int:
    """Run the demo and return the exit status: 0, 1 for a failed run, 2 for a bad option, 130 when interrupted."""
    missing = [package for package in ("sklearn", "matplotlib") if importlib.util.find_spec(package) is None]
    if missing:
        needed = " and ".join(missing).replace("sklearn", "scikit-learn")
        return _fail(f'the demo needs {needed}, which cannot be found: pip install "mas_fast[demo]"', 1)

    # A terminal without λ or ± should show a question mark there and not stop the run.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    # Only now: these need the packages that were just looked for.
    from mas_fast.demo.files import OutputError, prepare_folder
    from mas_fast.demo.train import DivergenceError, single_thread

    try:
        prepare_folder(args.out, (JSON_NAME, PLOT_NAME))
        with single_thread():
            _run(args)
    except OutputError as error:
        return _fail(str(error), 2)
    except DivergenceError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted: the results were not written", 130)
    return 0


def _run(args: argparse.Namespace) -> None:
    from mas_fast.demo import plot, report, result, timing
    from mas_fast.demo.data import load_tasks
    from mas_fast.demo.files import write_together

    start = time.perf_counter()
    changes: dict[str, Any] = {"epochs": QUICK_EPOCHS} if args.quick else {}
    if args.lam is not None:
        changes["lam"] = args.lam
    settings = Settings(**changes)
    seeds = range(args.seeds or (QUICK_SEEDS if args.quick else SEEDS))
    tasks = load_tasks()
    print(report.format_opening(tasks, settings, seeds), flush=True)

    runs = _train_all(tasks, settings, seeds)
    repeats = QUICK_REPEATS if args.quick else REPEATS
    print(f"timing the importance pass, {repeats} repeats", flush=True)
    images = [task.train_images for task in tasks]
    cost = timing.measure_cost(runs["MAS"][0].network, images, len(tasks) - 1, repeats=repeats)

    outcome = result.build_result(tasks, settings, seeds, runs, cost)
    outcome["conclusion"] = report.conclude(outcome)
    outcome["seconds"] = time.perf_counter() - start
    # Printed first: whatever happens to the files, the numbers are not lost.
    print(f"\n{report.format_tables(outcome)}\n", flush=True)
    text = json.dumps(outcome, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_together(
        args.out,
        {
            JSON_NAME: lambda path: path.write_text(text, encoding="utf-8"),
            PLOT_NAME: lambda path: plot.draw(outcome, path),
        },
    )
    seconds = time.perf_counter() - start
    print(f"{args.out / JSON_NAME} and {args.out / PLOT_NAME} written after {seconds:.0f} s\n")
    print(outcome["conclusion"])


def _train_all(tasks: Sequence[Task], settings: Settings, seeds: Sequence[int]) -> dict[str, list[Run]]:
    from tqdm import tqdm

    from mas_fast.demo import metrics
    from mas_fast.demo.train import METHODS, trainings_per_seed

    runs: dict[str, list[Run]] = {name: [] for name in METHODS}
    total = trainings_per_seed(len(tasks)) * len(seeds)
    # disable=None: no bar where it would fill a log file; the line per seed is printed in any case.
    with tqdm(total=total, unit="task", disable=None, leave=False, dynamic_ncols=True) as bar:
        for seed in seeds:
            for name, run_method in METHODS.items():
                bar.set_description(f"seed {seed}, {name}")
                runs[name].append(run_method(tasks, settings, seed, bar.update))
            accuracies = (f"{name} {100 * metrics.average_accuracy(runs[name][-1].accuracy):.1f}" for name in METHODS)
            bar.write(f"seed {seed}: average accuracy in % after the last task: {', '.join(accuracies)}")
            sys.stdout.flush()
    return runs


def _count(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def _weight(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be a finite number of at least 0, got {text!r}")
    return value


def _fail(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status
