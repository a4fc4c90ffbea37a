"""Set one run beside another: `python -m benchmarks.compare BEFORE AFTER`, each a folder of results.

Ratios to the ordinary batched backward (or to the unit that a row names) are compared: on one machine they hold from
day to day, where milliseconds do not. Exits with 1 if one of mas_fast grew by more than `--tolerance`, or has none any
more. From one machine, or number of threads, to another they may double, as processors multiply and read memory at
different rates: there only a ratio that is lost counts.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from benchmarks.run import Row, key_of, read_rows

TOLERANCE = 0.15


def read_folder(folder: Path, machines: Collection[str] = ()) -> dict[str, list[Row]]:
    """Return the rows of a folder by results file: of each kind one file, for rows of two machines have the same keys.

    Args:
        folder: Where the files are.
        machines: Names of files of the machines to take where there are several; else the latest is taken.

    Raises:
        ValueError: There is no such folder, a file holds something else, or none has a row with a ratio.
    """
    files: dict[str, list[Row]] = {}
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
            files[path.name] = found
    if not files:
        raise ValueError(f"{folder} must hold results of benchmarks, got none")

    def preference(name: str) -> tuple[bool, str]:
        return name in machines, max(row.get("date", "") for row in files[name])

    kinds = {kind_of(name) for name in files}
    chosen = [max((n for n in files if kind_of(n) == kind), key=preference) for kind in sorted(kinds)]
    return {name: files[name] for name in chosen}


def kind_of(name: str) -> str:
    """Return which kind of rows a results file holds: what its name begins with."""
    return name.partition("-")[0]


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


def is_worse(before: Row, after: Row, may_grow: float) -> bool:
    """Return whether a row of mas_fast grew by more than it may, or has no time any more."""
    if not is_ours(after) or before["ratio_p50"] is None:
        return False
    return after["ratio_p50"] is None or after["ratio_p50"] / before["ratio_p50"] - 1 > may_grow


def print_changes(pairs: Sequence[tuple[Row, Row]], tolerance: float, may_grow: float) -> bool:
    """Print a line for each pair; return whether a row of mas_fast became worse.

    Args:
        pairs: Rows before and after.
        tolerance: From which change on a line says that it differs.
        may_grow: By how much a row of mas_fast may grow.
    """
    for before, after in pairs:
        if is_unit(after):
            continue
        ratios = [before["ratio_p50"], after["ratio_p50"]]
        shown = " → ".join(f"{'–' if ratio is None else format(ratio, '.2f'):>8}" for ratio in ratios)
        spread, change = "", None
        if None not in ratios:
            spread = f"({after['ratio_p20']:.2f}–{after['ratio_p80']:.2f})"
            change = ratios[1] / ratios[0] - 1
        if change is None:
            mark = after["failure"] or before["failure"] or ""
        elif is_worse(before, after, may_grow):
            mark = "GREW"
        else:
            mark = "differs" if abs(change) > tolerance else ""
        percent = "" if change is None else f"{100 * change:+.0f} %"
        batches = f"{after['num_batches']} batches"
        print(
            f"{after['case']:26} {batches:>11}  {after['method']:44} {shown} {spread:16} {percent:>8}  {mark}".rstrip()
        )
    return any(is_worse(before, after, may_grow) for before, after in pairs)


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
        after = read_folder(arguments.after)
        before = read_folder(arguments.before, machines=after)
    except ValueError as error:
        parser.error(str(error))
    kinds = [
        (name, now, pairs)
        for name in before
        for now in after
        if kind_of(name) == kind_of(now) and (pairs := changes(before[name], after[now]))
    ]
    if not kinds:
        parser.error(f"{arguments.before} and {arguments.after} must have a row in common, got none")
    failed = False
    judged: list[tuple[Row, Row]] = []
    for name, now, pairs in kinds:
        same = name == now
        print(f"{name}\n→ {now}{'' if same else ': another machine or setting, whose ratios may differ'}\n")
        failed |= print_changes(pairs, arguments.tolerance, may_grow=arguments.tolerance if same else math.inf)
        print()
        judged += [(b, a) for b, a in pairs if same and is_ours(a) and b["ratio_p50"] is not None]
    near = sum(
        a["ratio_p50"] is not None and abs(a["ratio_p50"] / b["ratio_p50"] - 1) <= arguments.tolerance
        for b, a in judged
    )
    if judged:
        percent = f"{100 * arguments.tolerance:.0f} %"
        print(f"{near} of {len(judged)} ratios of mas_fast on the same machine are within {percent}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
