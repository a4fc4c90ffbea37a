"""Set one run beside another: `python -m benchmarks.compare BEFORE AFTER`, each a folder of results.

Ratios to the ordinary batched backward (or to the unit that a row names) are compared: they hold from machine to
machine and day to day, where milliseconds do not. Exits with 1 if one of mas_fast grew by more than `--tolerance`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.run import Row, key_of

TOLERANCE = 0.15


def read_rows(folder: Path) -> list[Row]:
    """Return the rows of every result file of a folder.

    Raises:
        ValueError: There is no such folder, a file holds something else, or none has a row with a ratio.
    """
    rows: list[Row] = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} must hold JSON, got {error}") from error
        if isinstance(content, list):
            rows += [row for row in content if isinstance(row, dict) and "ratio_p50" in row]
    if not rows:
        raise ValueError(f"{folder} must hold results of benchmarks, got none")
    return rows


def changes(before: Sequence[Row], after: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Return the rows that both have a ratio for, side by side."""
    known = {key_of(row): row for row in before if row["ratio_p50"] is not None}
    return [
        (known[key_of(row)], row)
        for row in after
        if row["ratio_p50"] is not None and known.get(key_of(row)) is not None
    ]


def is_unit(row: Row) -> bool:
    """Return whether a row is what ratios are to."""
    return row["ratio_p20"] == row["ratio_p80"] == 1.0


def is_ours(row: Row) -> bool:
    """Return whether a row is of mas_fast."""
    return "mas_fast" in row["method"]


def print_changes(pairs: Sequence[tuple[Row, Row]], tolerance: float) -> bool:
    """Print a line for each pair; return whether a ratio of mas_fast grew by more than `tolerance`."""
    worse = False
    for before, after in pairs:
        if is_unit(after):
            continue
        change = after["ratio_p50"] / before["ratio_p50"] - 1
        grew = is_ours(after) and change > tolerance
        worse |= grew
        spread = f"({after['ratio_p20']:.2f}–{after['ratio_p80']:.2f})"
        mark = "GREW" if grew else "differs" if abs(change) > tolerance else ""
        batches = f"{after['num_batches']} batches"
        print(
            f"{after['case']:26} {batches:>11}  {after['method']:44} {before['ratio_p50']:8.2f} → "
            f"{after['ratio_p50']:8.2f} {spread:16} {100 * change:+6.0f} %  {mark}".rstrip()
        )
    return worse


def main(argv: list[str] | None = None) -> int:
    """Compare two folders."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="as a part of one; default: %(default)s")
    arguments = parser.parse_args(argv)
    try:
        pairs = changes(read_rows(arguments.before), read_rows(arguments.after))
    except ValueError as error:
        parser.error(str(error))
    if not pairs:
        parser.error(f"{arguments.before} and {arguments.after} must have a row in common, got none")
    worse = print_changes(pairs, arguments.tolerance)
    ours = [(b, a) for b, a in pairs if is_ours(a)]
    near = sum(abs(a["ratio_p50"] / b["ratio_p50"] - 1) <= arguments.tolerance for b, a in ours)
    print(f"\n{near} of {len(ours)} ratios of mas_fast are within {100 * arguments.tolerance:.0f} %")
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
