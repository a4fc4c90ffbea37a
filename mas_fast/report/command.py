"""The command ``python -m mas_fast report``: its options, what it reads and what it writes."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE_NAME = "report.html"
# The order of the page; what is not listed comes behind, by name.
ORDER = (
    "pairs",
    "omega_data",
    "sequence",
    "facts",
    "fact_subsets",
    "fact_sequence",
    "fact_adaptation",
    "batch_size",
)


class ReportError(ValueError):
    """There is nothing that a report can be made of."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the report to a parser."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of result files of benchmarks.continual")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"folder to write {PAGE_NAME} and its PNGs to (default: the same)"
    )


def main(args: argparse.Namespace) -> int:
    """Write the report and return the exit status: 0, 1 without matplotlib, 2 if there are no results."""
    if importlib.util.find_spec("matplotlib") is None:
        return _fail('the report needs matplotlib, which cannot be found: pip install "mas_fast[demo]"', 1)
    # Only now: these need matplotlib, or are shared with the demo, which needs it.
    from mas_fast.demo.files import OutputError, prepare_folder, write_together
    from mas_fast.report.figures import figures_of
    from mas_fast.report.page import format_page

    folder = args.out or args.folder
    try:
        results = load_results(args.folder)
        figures = {result["experiment"]: figures_of(result) for result in results}
        images = {name: png for own in figures.values() for name, png in own.items()}
        page = format_page(results, figures)
        prepare_folder(folder, (PAGE_NAME, *images))
        writers = {name: (lambda path, png=png: path.write_bytes(png)) for name, png in images.items()}
        write_together(folder, {**writers, PAGE_NAME: lambda path: path.write_text(page, encoding="utf-8")})
    except (OutputError, ReportError) as error:
        return _fail(str(error), 2)
    print(f"{folder / PAGE_NAME}: {len(results)} experiments, {len(images)} figures")
    return 0


def load_results(folder: Path) -> list[Mapping[str, Any]]:
    """Return the results of a folder, in the order of the page.

    Raises:
        ReportError: There is no such folder, none of its files is a result, or one is no JSON.
    """
    if not folder.is_dir():
        raise ReportError(f"DIR must be a folder of result files, got {str(folder)!r}, which is none")
    results = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ReportError(f"{path} must be JSON, got: {error}") from error
        # Seeds stand beside the results, and other files may.
        if isinstance(content, dict) and "experiment" in content:
            missing = [key for key in ("title", "seeds", "claims") if key not in content]
            if missing:
                raise ReportError(f"{path} must be a result of benchmarks.continual, it lacks {', '.join(missing)}")
            results.append(content)
    if not results:
        raise ReportError(
            f"{str(folder)!r} must hold a result, got none in {len(list(folder.glob('*.json')))} JSON files: "
            "run python -m benchmarks.continual all --out DIR"
        )
    place = {name: index for index, name in enumerate(ORDER)}
    return sorted(results, key=lambda result: (place.get(result["experiment"], len(place)), result["experiment"]))


def _fail(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status
