"""Set one run beside another: `python -m benchmarks.compare BEFORE AFTER`, each a folder of results.

Ratios to the ordinary batched backward (or to the unit that a row names) are compared: they hold from machine to
machine and day to day, where milliseconds do not. Exits with 1 if one of mas_fast grew by more than `--tolerance`,
or has none any more.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.run import Row, key_of, read_rows

TOLERANCE = 0.15


def read_folder(folder: Path) -> list[Row]:
    """Return the rows of every results file of a folder.

    Raises:
        ValueError: There is no such folder, a file holds something else, two are of the same kind (of two machines,
            whose rows have the same keys), or none has a row with a ratio.
    """
    rows: list[Row] = []
    kinds: dict[str, Path] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} must hold JSON, got {error}") from error
        if not isinstance(content, list):
            continue
        found = [row for row in content if isinstance(row, dict) and "ratio_p50" in row]
        if found:
            read_rows(path)
            other = kinds.setdefault(path.name.partition("-")[0], path)
            if other != path:
                raise ValueError(f"{folder} must hold one file of a kind, got {other.name} and {path.name}")
        rows += found
    if not rows:
        raise ValueError(f"{folder} must hold results of benchmarks, got none")
    return rows


def changes(before: Sequence[Row], after: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Return the rows that both have, side by side."""
    known = {key_of(row): row for row in before}
    return [(known[key_of(row)], row) for row in after if key_of(row) in known]


def is_unit(row: Row) -> bool:
    """Return whether a row is what ratios are to."""
    return row["ratio_p20"] == row["ratio_p80"] == 1.0


def is_ours(row: Row) -> bool:
    """Return whether a row is of mas_fast."""
    return "mas_fast" in row["method"]


def is_worse(before: Row, after: Row, tolerance: float) -> bool:
    """Return whether a row of mas_fast grew by more than `tolerance`, or has no time any more."""
    if not is_ours(after) or before["ratio_p50"] is None:
        return False
    return after["ratio_p50"] is None or after["ratio_p50"] / before["ratio_p50"] - 1 > tolerance


def print_changes(pairs: Sequence[tuple[Row, Row]], tolerance: float) -> bool:
    """Print a line for each pair; return whether a row of mas_fast became worse."""
    for before, after in pairs:
        if is_unit(after):
            continue
        ratios = [before["ratio_p50"], after["ratio_p50"]]
        shown = " → ".join(f"{'–' if ratio is None else format(ratio, '.2f'):>8}" for ratio in ratios)
        spread, change = "", None
        if None not in ratios:
            spread = f"({after['ratio_p20']:.2f}–{after['ratio_p80']:.2f})"
            change = ratios[1] / ratios[0] - 1
        if is_worse(before, after, tolerance):
            mark = "GREW" if change is not None else after["failure"]
        elif change is None:
            mark = after["failure"] or before["failure"] or ""
        else:
            mark = "differs" if abs(change) > tolerance else ""
        percent = "" if change is None else f"{100 * change:+.0f} %"
        batches = f"{after['num_batches']} batches"
        print(
            f"{after['case']:26} {batches:>11}  {after['method']:44} {shown} {spread:16} {percent:>8}  {mark}".rstrip()
        )
    return any(is_worse(before, after, tolerance) for before, after in pairs)


def main(argv: list[str] | None = None) -> int:
    """Compare two folders."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="as a part of one; default: %(default)s")
    arguments = parser.parse_args(argv)
    if not arguments.tolerance >= 0:
        parser.error(f"--tolerance must not be negative, got {arguments.tolerance}")
    try:
        pairs = changes(read_folder(arguments.before), read_folder(arguments.after))
    except ValueError as error:
        parser.error(str(error))
    if not pairs:
        parser.error(f"{arguments.before} and {arguments.after} must have a row in common, got none")
    worse = print_changes(pairs, arguments.tolerance)
    ours = [(b["ratio_p50"], a["ratio_p50"]) for b, a in pairs if is_ours(a) and b["ratio_p50"] is not None]
    near = sum(now is not None and abs(now / then - 1) <= arguments.tolerance for then, now in ours)
    print(f"\n{near} of {len(ours)} ratios of mas_fast are within {100 * arguments.tolerance:.0f} %")
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
