"""Measure whole passes: `python -m benchmarks.run --out DIR`; README.md here says what a row means."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES, find_case
from benchmarks.measure import Contender, prepare, time_interleaved, true_importance
from benchmarks.memory import MIB, peak_mib
from benchmarks.methods import METHODS, OURS, UNIT
from benchmarks.provenance import describe_implementations, describe_run

Row = dict[str, Any]

TOLERANCES = {"float32": 1e-5, "float64": 1e-11}
# A pass that takes longer is not measured, and the row says so.
SLOWEST_S = 60.0
KEY = ("case", "method", "device", "dtype", "num_batches")


def measure_case(case: str, num_batches: int, arguments: argparse.Namespace) -> list[Row]:
    """Measure every method on one case and return one row each."""
    here = [name for name in arguments.methods if not METHODS[name].environment]
    rows = measure_methods(case, num_batches, here, arguments)
    for name in arguments.methods:
        if METHODS[name].environment:
            with in_environment(METHODS[name].environment), fresh_process(arguments.threads) as process:
                elsewhere = process.submit(measure_methods, case, num_batches, [UNIT, name], arguments).result()
            rows.append(elsewhere[1])
    return sorted(rows, key=lambda row: list(METHODS).index(row["method"]))


def measure_methods(case: str, num_batches: int, methods: list[str], arguments: argparse.Namespace) -> list[Row]:
    """Measure methods side by side in this process; the unit is among them."""
    build = find_case(case)
    workload = build.build(num_batches, getattr(torch, arguments.dtype))
    tolerance = TOLERANCES[arguments.dtype if build.decided else "float64"]
    truth = true_importance(workload)
    contenders = [prepare(name, workload, truth, tolerance, SLOWEST_S) for name in methods]
    time_interleaved(contenders, arguments.rounds, workload.batch_size)

    unit = contenders[methods.index(UNIT)]
    shared = {
        "case": case,
        "device": "cpu",
        "dtype": arguments.dtype,
        "num_batches": num_batches,
        "batch_size": workload.batch_size,
        "omega_mib": sum(omega.numel() for omega in truth.values()) * getattr(torch, arguments.dtype).itemsize / MIB,
        "error_dtype": arguments.dtype if build.decided else "float64",
        "implementations": describe_implementations("cpu"),
    }
    rows = [{**shared, **describe_contender(contender, unit)} for contender in contenders]
    for row, contender in zip(rows, contenders, strict=True):
        # The bar is set for a pass over a data set; a single batch also bears what is paid once.
        row["ratio_bar"] = build.ratio_bar if contender.method == OURS and num_batches > 1 else None
        judged = contender.error is not None and METHODS[contender.method].is_exact
        row["error_bar"] = tolerance if judged else None
        row["peak_mib"] = row["peak_bar_mib"] = None
        if arguments.memory and num_batches > 1 and contender.failure is None:
            options = contender.options
            row["peak_mib"] = peak_mib(case, contender.method, num_batches, arguments.dtype, arguments.threads, options)
    unit_peak_mib = rows[methods.index(UNIT)]["peak_mib"]
    for row in rows:
        if row["method"] == OURS and unit_peak_mib is not None:
            row["peak_bar_mib"] = unit_peak_mib + row["omega_mib"] + build.joined_mib
    return rows


@contextmanager
def in_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def fresh_process(threads: int) -> ProcessPoolExecutor:
    """Return an executor of one new process."""
    return ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (threads,))


def describe_contender(contender: Contender, unit: Contender) -> Row:
    """Return the columns that `measure.py` filled."""
    return {
        "method": contender.method,
        "options": contender.options,
        "samples_timed": contender.samples_timed,
        "rounds": len(contender.times_ms),
        **percentiles("time_ms", contender.times_ms),
        **percentiles("ratio", ratios_to(unit, contender)),
        "error": contender.error,
        "fallbacks": contender.fallbacks,
        "failure": contender.failure,
    }


def ratios_to(unit: Contender, contender: Contender) -> list[float]:
    """Return the contender's time over the unit's, round by round."""
    return [time / unit_time for time, unit_time in zip(contender.times_ms, unit.times_ms, strict=False)]


def percentiles(name: str, values: list[float]) -> dict[str, float | None]:
    """Return the columns `name`_p20, _p50 and _p80; None without values."""
    if not values:
        return {f"{name}_p{percent}": None for percent in (20, 50, 80)}
    ordered = torch.tensor(values, dtype=torch.float64)
    return {f"{name}_p{percent}": ordered.quantile(percent / 100).item() for percent in (20, 50, 80)}


def results_path(folder: Path, run: Row, kind: str = "passes") -> Path:
    """Return the file of this machine: one per kind of rows, processor and number of threads."""
    slug = re.sub(r"[^a-z0-9]+", "-", run["machine"]["cpu"].lower()).strip("-")
    return folder / f"{kind}-{slug}-{run['machine']['threads']}-threads.json"


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write the rows, one a line, over those of the same key in the file; atomically: a file is whole or untouched."""
    merged = {key_of(row): row for row in (json.loads(path.read_text()) if path.exists() else [])}
    merged.update({key_of(row): row for row in rows})
    lines = [json.dumps(finite(row), allow_nan=False) for row in merged.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        file.write("[\n" + ",\n".join(lines) + "\n]\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def key_of(row: Row) -> tuple[Any, ...]:
    """Return what tells a row from the others of a file."""
    return tuple(row[column] for column in KEY)


def finite(row: Row) -> Row:
    """Return the row with None for infinity, which JSON lacks; `failure` tells it from a method without an error."""
    return {column: None if value == math.inf else value for column, value in row.items()}


def verdict(value: float | None, bar: float | None) -> str:
    """Say whether a value keeps its bar; an empty string where there is no bar."""
    if value is None or bar is None:
        return ""
    return "pass" if value <= bar else "MISS"


def print_table(rows: list[Row]) -> None:
    """Print one line per row: time per batch, ratio to the unit, error and peak memory, each beside its bar."""

    def shown(value: float | None, digits: str) -> str:
        return "–" if value is None else format(value, digits)

    def with_bar(value: float | None, bar: float | None, digits: str) -> str:
        return shown(value, digits) if bar is None else f"{shown(value, digits)} ≤ {bar:{digits}} {verdict(value, bar)}"

    header = ("case", "batches", "method", "ms p20", "p50", "p80", "ratio", "p20–p80", "error", "peak MiB", "note")
    lines = [header]
    for row in rows:
        notes = [f"{name} {value}" for name, value in row["options"].items()]
        if row["samples_timed"] < row["batch_size"]:
            notes.append(f"timed on {row['samples_timed']} samples, scaled to {row['batch_size']}")
        if row["fallbacks"]:
            notes.append(f"{len(row['fallbacks'])} parameters through the loop")
        if not METHODS[row["method"]].is_exact:
            notes.append("not exact")
        if row["failure"] is not None:
            notes.append(row["failure"])
        spread = "–" if row["ratio_p20"] is None else f"{row['ratio_p20']:.2f}–{row['ratio_p80']:.2f}"
        lines.append(
            (
                row["case"],
                str(row["num_batches"]),
                row["method"],
                *(shown(row[f"time_ms_p{percent}"], ".2f") for percent in (20, 50, 80)),
                with_bar(row["ratio_p50"], row["ratio_bar"], ".2f"),
                spread,
                with_bar(row["error"], row["error_bar"], ".0e"),
                with_bar(row["peak_mib"], row["peak_bar_mib"], ".1f"),
                ", ".join(notes),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments; the unit is always among the methods."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=[name for name, method in METHODS.items() if method.is_default]
    )
    parser.add_argument(
        "--batches",
        nargs="+",
        type=int,
        default=[0, 1],
        help="batches of a pass, 0 for the case's own number; default: 0 1",
    )
    parser.add_argument("--rounds", type=int, default=15, help="timings of each method")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure peak memory")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a bar of cost or memory is missed, too")
    arguments = parser.parse_args(argv)
    if min(*arguments.batches, arguments.rounds - 1, arguments.threads - 1) < 0:
        parser.error("--rounds and --threads must be at least 1, --batches not negative")
    arguments.methods = [name for name in METHODS if name == UNIT or name in arguments.methods]
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure, write, print; return 1 if an error bar is broken, or with --strict any bar."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    run = describe_run(arguments.threads)
    path = results_path(arguments.out, run)
    rows: list[Row] = []
    for case in arguments.cases:
        for num_batches in (batches or CASES[case].num_batches for batches in arguments.batches):
            print(f"{case}, {num_batches} batches …", file=sys.stderr, flush=True)
            measured = [{**run, **row} for row in measure_case(case, num_batches, arguments)]
            rows += measured
            write_rows(path, measured)
    print_table(rows)
    machine = run["machine"]
    print(f"\n{machine['cpu']} ({machine['capability']}), {machine['threads']} of {machine['cores']} cores → {path}")

    bars = [("error", "error_bar")]
    if arguments.strict:
        bars += [("ratio_p50", "ratio_bar"), ("peak_mib", "peak_bar_mib")]
    # That a peer is wrong, its row says.
    own = [row for row in rows if METHODS[row["method"]].is_ours]
    return int(any(verdict(row[value], row[bar]) == "MISS" for row in own for value, bar in bars))


if __name__ == "__main__":
    sys.exit(main())
