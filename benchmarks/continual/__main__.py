"""Continual learning on real data: `python -m benchmarks.continual EXPERIMENT --out DIR`; `all` runs every one.

pairs            two tasks of object recognition in four pairings, each method (the paper's table 1 in shape)
omega_data       Ω from training images, unlabelled test images, and both (table 2)
facts            facts as vectors: two halves (table 3)
fact_subsets     Ω of a part of the first task, and what it protects (table 4)
fact_sequence    four disjoint tasks of facts in a row (table 5)
fact_adaptation  a subset that survives because its unlabelled images feed Ω (figure 4)
sequence         eight tasks of object recognition in a row
batch_size       |mean of a batch| against the exact Ω: scale, ranks, and the best λ, by batch size
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.continual import batch_size, fact_learning, recognition
from benchmarks.continual.data import DataError
from benchmarks.continual.recognition import Source
from benchmarks.continual.seeds import ResultError, Workplace, write_json
from benchmarks.continual.summary import Json
from benchmarks.provenance import describe_run
from mas_fast.demo.files import OutputError, prepare_folder
from mas_fast.demo.train import single_thread

RECOGNITION: dict[str, Callable[[Workplace, Source], Json]] = {
    "pairs": recognition.pairs,
    "omega_data": recognition.omega_data,
    "sequence": recognition.sequence,
}
FACTS: dict[str, Callable[[Workplace], Json]] = {
    "facts": fact_learning.facts,
    "fact_subsets": fact_learning.fact_subsets,
    "fact_sequence": fact_learning.fact_sequence,
    "fact_adaptation": fact_learning.fact_adaptation,
}
# The longest first, so that two at a time end together.
ALL = ("sequence", "facts", "pairs", "fact_sequence", "batch_size", "omega_data", "fact_adaptation", "fact_subsets")
SEEDS = tuple(range(200, 210))
# Strengths are chosen with seeds that no result is from.
CHOICE_SEEDS = (100, 101)
SMALL_SEEDS, SMALL_CHOICE_SEEDS = SEEDS[:3], CHOICE_SEEDS[:1]


def main(argv: list[str] | None = None) -> int:
    """Run what the arguments name; return 2 if data is missing, 1 if an experiment of `all` failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.continual", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=[*RECOGNITION, *FACTS, "batch_size", "all"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; seeds found there are kept")
    parser.add_argument("--small", action="store_true", help="fewer seeds, strengths and images")
    parser.add_argument("--seeds", type=int, nargs="+", help=f"{SEEDS[0]} to {SEEDS[-1]} if left out")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--mnist", type=Path, metavar="DIR", help="recognition on the MNIST test images of a folder")
    data.add_argument(
        "--folders", type=Path, nargs="+", default=[], metavar="DIR", help="a task each: DIR/<class>/<image>"
    )
    arguments = parser.parse_args(argv)
    name = arguments.experiment
    if (arguments.mnist or arguments.folders) and name not in (*RECOGNITION, "all"):
        parser.error(f"{name} is on scikit-learn's digits: leave --mnist and --folders out")
    # Of course: the heads of the tasks to come.
    warnings.filterwarnings("ignore", message="no omega holds these parameters")
    try:
        prepare_folder(arguments.out, ())
        if name == "all":
            return run_all(arguments)
        if name == "batch_size":
            return batch_size.main(["--out", str(arguments.out), *shared_options(arguments)])
        with single_thread():
            run_one(arguments)
    except (DataError, OutputError, ResultError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: seeds that are done are kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def shared_options(arguments: argparse.Namespace) -> list[str]:
    """Return the options that every experiment takes, as they were given."""
    seeds = ["--seeds", *map(str, arguments.seeds)] if arguments.seeds else []
    return [*seeds, *["--small"] * arguments.small]


def run_one(arguments: argparse.Namespace) -> None:
    """Run an experiment and write its summary.

    Raises:
        DataError: The images are not there.
    """
    name, small = arguments.experiment, arguments.small
    training = (recognition if name in RECOGNITION else fact_learning).TRAINING
    source = Source(arguments.mnist, arguments.folders) if name in RECOGNITION else None
    seeds = tuple(arguments.seeds or (SMALL_SEEDS if small else SEEDS))
    settings = {"training": dataclasses.asdict(training), "data": source.name if source else "digits"}
    choice_seeds = SMALL_CHOICE_SEEDS if small else CHOICE_SEEDS
    place = Workplace(arguments.out, name, seeds, choice_seeds, small, settings)
    found = RECOGNITION[name](place, source) if source else FACTS[name](place)
    summary = {"experiment": name, **found, "seeds": list(seeds), "choice_seeds": list(choice_seeds)}
    summary |= {"settings": settings, "small": small, **describe_run(1)}
    write_json(arguments.out / f"{name}.json", summary)
    print_summary(summary)


def print_summary(summary: Json) -> None:
    """Print the tables and what became of the claims."""
    print(f"\n{summary['title']}; {len(summary['seeds'])} seeds, mean ± standard error, in %")
    for table in summary["tables"]:
        width = 2 + max(map(len, (*table["columns"], "100.0 ± 0.0")))
        first = 2 + max(len(row["name"]) for row in table["rows"])
        print(f"\n{table['title']}\n{'':{first}}" + "".join(f"{column:>{width}}" for column in table["columns"]))
        for row in table["rows"]:
            print(f"{row['name']:{first}}" + "".join(f"{format_cell(cell):>{width}}" for cell in row["cells"]))
    print()
    for found in summary["claims"]:
        bounds = found["interval_95_points"]
        interval = "one seed" if bounds is None else f"95 % interval {bounds[0]:.1f} to {bounds[1]:.1f}"
        print(f"{found['verdict']:>15}: {found['claim']} ({found['difference_points']:+.1f} points, {interval})")


def format_cell(cell: Json | None) -> str:
    """Return a mean and its standard error as text."""
    if cell is None:
        return "–"
    error = cell["standard_error"]
    return f"{cell['mean']:.1f}" + ("" if error is None else f" ± {error:.1f}")


def run_all(arguments: argparse.Namespace) -> int:
    """Run every experiment in a process of its own, as many at a time as there are cores; logs stand beside results."""
    folder, start = arguments.out, time.perf_counter()
    data = ["--mnist", str(arguments.mnist)] if arguments.mnist else []
    data += ["--folders", *map(str, arguments.folders)] if arguments.folders else []

    def run(name: str) -> int:
        options = ["--out", str(folder), *shared_options(arguments), *(data if name in RECOGNITION else [])]
        with (folder / f"{name}.log").open("w") as log:
            command = [sys.executable, "-m", "benchmarks.continual", name, *options]
            status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        print(f"{name}: exit {status} after {(time.perf_counter() - start) / 60:.1f} min", flush=True)
        return status

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return int(any(list(pool.map(run, ALL))))


if __name__ == "__main__":
    sys.exit(main())
