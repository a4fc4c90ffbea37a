"""Measure how cost grows with samples, positions and parameters: `python -m benchmarks.growth --out DIR`.

At every point each method is timed in a fresh process, beside the ordinary backward, and its peak measured in another.
A process may take `--memory-limit` GiB more than it starts with: what needs more is out of memory, and the row says so.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CURVES
from benchmarks.memory import OutOfMemoryError, peak_mib
from benchmarks.methods import METHODS, OURS, UNIT
from benchmarks.provenance import describe_run
from benchmarks.run import Row, describe, percentiles, results_path, writable, write_rows
from benchmarks.side_by_side import Setting, measure_side_by_side

# What is compared; "vmap_whole" is vmap(grad) as most would write it first, all samples of a batch at once.
COMPARED = (UNIT, OURS, "loop", "vmap", "vmap_whole", "opacus", "backpack")
FLAT_FROM = {"N": 16, "T": 8, "parameters": 10**4}
MAY_GROW = 1.15  # of the ratio to the ordinary backward, from FLAT_FROM to the end
FLAT_AXES = ("N", "T")


def measure_point(curve: str, value: int, methods: Sequence[str], arguments: argparse.Namespace) -> list[Row]:
    """Measure one point of a curve: times and peaks, each in fresh processes."""
    case = f"{curve}={value}"
    num_batches = CURVES[curve].case(value).num_batches
    setting = Setting(
        case, num_batches, threads=arguments.threads, rounds=arguments.rounds, limit_gib=arguments.memory_limit
    )
    rows: list[Row] = []
    for method, lane in measure_side_by_side(setting, methods).items():
        row = {
            "case": case,
            "curve": curve,
            "axis": CURVES[curve].axis,
            "value": value,
            "device": "cpu",
            "dtype": "float32",
            "num_batches": num_batches,
            "error_bar": setting.tolerance,
            "memory_limit_gib": arguments.memory_limit,
            **describe(method, lane),
            "peak_mib": None,
        }
        if row["failure"] is None:
            try:
                row["peak_mib"] = peak_mib(
                    case,
                    method,
                    num_batches,
                    "float32",
                    arguments.threads,
                    row["options"],
                    runs=1,
                    limit_gib=arguments.memory_limit,
                )
            except OutOfMemoryError as failure:
                row |= {"failure": str(failure), **percentiles("time_ms", []), **percentiles("ratio", [])}
        rows.append(row)
    return rows


def growth_of(rows: Sequence[Row]) -> float | None:
    """Return the largest ratio to the ordinary backward from `FLAT_FROM` on, over that at it; None if unknown."""
    start = next((row for row in rows if row["value"] >= FLAT_FROM[row["axis"]]), None)
    ratios = [row["ratio_p50"] for row in rows if start is not None and row["value"] >= start["value"]]
    return None if start is None or None in ratios else max(ratios) / ratios[0]


def slope_of(rows: Sequence[Row], column: str) -> float | None:
    """Return a in column ~ value^a, by least squares of logarithms, from `FLAT_FROM` on; None of fewer than two."""
    points = [
        (math.log(row["value"]), math.log(row[column]))
        for row in rows
        if row["value"] >= FLAT_FROM[row["axis"]] and row[column]
    ]
    if len(points) < 2:
        return None
    x, y = (torch.tensor(values, dtype=torch.float64) for values in zip(*points, strict=True))
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())


def line_of(rows: Sequence[Row], curve: str, method: str) -> list[Row]:
    """Return a method's rows of a curve, in order."""
    return sorted((r for r in rows if (r["curve"], r["method"]) == (curve, method)), key=lambda row: row["value"])


def print_table(rows: Sequence[Row]) -> None:
    """Print a line for each point and method, and how each line grows."""
    for curve in dict.fromkeys(row["curve"] for row in rows):
        print(f"\n{CURVES[curve].title}")
        for method in dict.fromkeys(row["method"] for row in rows if row["curve"] == curve):
            line = line_of(rows, curve, method)
            for row in line:
                shown = row["failure"] or (
                    f"{row['time_ms_p50']:.2f} ms a batch, ratio {row['ratio_p50']:.2f}, {row['peak_mib']:.0f} MiB"
                )
                print(f"  {method:16} {row['axis']} = {row['value']:<10} {shown}")
            slopes = [slope_of(line, column) for column in ("time_ms_p50", "peak_mib")]
            said = ", ".join(
                f"{what} ~ {row['axis']}^{slope:.2f}"
                for what, slope in zip(("time", "memory"), slopes, strict=True)
                if slope is not None
            )
            grown = growth_of(line)
            print(f"  {method:16} {said}" + ("" if grown is None else f"; ratio grows by {100 * (grown - 1):.0f} %"))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file")
    parser.add_argument("--curves", nargs="+", choices=CURVES, default=list(CURVES))
    parser.add_argument("--values", nargs="+", type=int, help="points of every curve; by default its own")
    parser.add_argument("--methods", nargs="+", choices=COMPARED, default=list(COMPARED))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-limit", type=float, default=6.0, metavar="GIB", help="of a process; default: 6")
    arguments = parser.parse_args(argv)
    if min(*(arguments.values or [1]), arguments.rounds, arguments.threads) < 1 or arguments.memory_limit <= 0:
        parser.error("--values, --rounds and --threads must be at least 1, --memory-limit must be positive")
    arguments.methods = [name for name in COMPARED if name == UNIT or name in arguments.methods]
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure, write, print; return 1 if an error bar is broken."""
    arguments = parse_arguments(argv)
    run: dict[str, Any] = describe_run(arguments.threads)
    path = writable(results_path(arguments.out, run, "growth"))
    rows: list[Row] = []
    for curve in arguments.curves:
        for value in arguments.values or CURVES[curve].values:
            print(f"{curve}={value} …", file=sys.stderr, flush=True)
            measured = [{**run, **row} for row in measure_point(curve, value, arguments.methods, arguments)]
            rows += measured
            write_rows(path, measured)
    print_table(rows)
    return int(any(row["failure"] for row in rows if METHODS[row["method"]].is_ours))


if __name__ == "__main__":
    sys.exit(main())
