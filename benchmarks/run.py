"""Measure whole passes: `python -m benchmarks.run --out DIR`; README.md here says what a row means."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES, find_case
from benchmarks.memory import peak_mib
from benchmarks.methods import METHODS, OURS, UNIT
from benchmarks.provenance import describe_run
from benchmarks.side_by_side import TOLERANCES, Lane, Setting, measure_side_by_side

Row = dict[str, Any]

KEY = ("case", "method", "device", "dtype", "num_batches")


def measure_case(case: str, num_batches: int, methods: list[str], arguments: argparse.Namespace) -> list[Row]:
    """Measure methods, the unit first, on one case and return one row each."""
    build = find_case(case)
    setting = Setting(case, num_batches, arguments.dtype, arguments.threads, arguments.rounds)
    lanes = measure_side_by_side(setting, methods)
    rows = [
        {"case": case, "device": "cpu", "dtype": arguments.dtype, "num_batches": num_batches, **describe(method, lane)}
        for method, lane in lanes.items()
    ]
    for row in rows:
        row["error_dtype"] = arguments.dtype if build.decided else "float64"
        # The bar is set for a pass over a data set; a single batch also bears what is paid once.
        row["ratio_bar"] = build.ratio_bar if row["method"] == OURS and num_batches > 1 else None
        judged = row["error"] is not None and METHODS[row["method"]].is_exact
        row["error_bar"] = setting.tolerance if judged else None
        row["peak_mib"] = row["peak_bar_mib"] = None
        if arguments.memory and num_batches > 1 and row["failure"] is None:
            options = row["options"]
            row["peak_mib"] = peak_mib(case, row["method"], num_batches, arguments.dtype, arguments.threads, options)
    unit_peak_mib = rows[0]["peak_mib"]
    for row in rows:
        if row["method"] == OURS and unit_peak_mib is not None:
            row["peak_bar_mib"] = unit_peak_mib + row["omega_mib"] + build.joined_mib
    return rows


def describe(method: str, lane: Lane) -> Row:
    """Return the columns that `side_by_side.py` filled."""
    return {
        "method": method,
        **lane.columns,
        "rounds": len(lane.times_ms),
        **percentiles("time_ms", lane.times_ms),
        **percentiles("ratio", [own / unit for own, unit in zip(lane.times_ms, lane.unit_times_ms, strict=True)]),
    }


def percentiles(name: str, values: list[float]) -> dict[str, float | None]:
    """Return the columns `name`_p20, _p50 and _p80; None without values."""
    if not values:
        return {f"{name}_p{percent}": None for percent in (20, 50, 80)}
    ordered = torch.tensor(values, dtype=torch.float64)
    return {f"{name}_p{percent}": ordered.quantile(percent / 100).item() for percent in (20, 50, 80)}


def results_path(folder: Path, run: Row, kind: str = "passes") -> Path:
    """Return the file of this machine: one per kind of rows, processor, its instructions, and number of threads."""
    machine = run["machine"]
    # Virtual machines hide which processor of a family they run on, but not what it can do.
    slug = re.sub(r"[^a-z0-9]+", "-", f"{machine['cpu']} {machine['capability']}".lower()).strip("-")
    return folder / f"{kind}-{slug}-{machine['threads']}-threads.json"


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a results file; none where there is no file.

    Raises:
        ValueError: It holds something else.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON, got {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and set(KEY) <= set(row) for row in rows):
        raise ValueError(f"{path} must hold a list of rows, each with {', '.join(KEY)}")
    return rows


def writable(path: Path) -> Path:
    """Return a results file's path, once it is known that rows can be written there: before they are measured.

    Raises:
        ValueError: It holds something else.
        OSError: Its folder cannot be made or written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        read_rows(path)
    return path


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write the rows, one a line, over those of the same key in the file; atomically: a file is whole or untouched."""
    merged = {key_of(row): row for row in [*read_rows(path), *rows]}
    lines = [json.dumps(finite(row), allow_nan=False) for row in merged.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
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
        if row["samples_timed"] < row["batch_size"] * row["num_batches"]:
            notes.append(f"timed on {row['samples_timed']} samples")
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
    """Measure, write, print; return 1 if a row of ours has no time, or with --strict misses a bar."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    run = describe_run(arguments.threads)
    path = writable(results_path(arguments.out, run))
    rows: list[Row] = []
    for case in arguments.cases:
        counts = dict.fromkeys(batches or CASES[case].num_batches for batches in arguments.batches)
        most = max(counts)
        for num_batches in counts:
            print(f"{case}, {num_batches} batches …", file=sys.stderr, flush=True)
            # What a peer costs does not depend on how many batches there are.
            methods = [name for name in arguments.methods if num_batches == most or METHODS[name].is_ours]
            measured = [{**run, **row} for row in measure_case(case, num_batches, methods, arguments)]
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
    missed = any(verdict(row[value], row[bar]) == "MISS" for row in own for value, bar in bars)
    return int(missed or any(row["failure"] for row in own))


if __name__ == "__main__":
    sys.exit(main())
