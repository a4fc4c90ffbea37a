"""Draw the committed results: `python -m benchmarks.plot` writes two figures to benchmarks/figures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cases import CURVES
from benchmarks.growth import line_of, slope_of
from benchmarks.methods import OURS, UNIT
from benchmarks.readme import RESULTS, ROOT, SHORT_TITLES, read_results
from benchmarks.run import Row

FIGURES = ROOT / "benchmarks" / "figures"
# Okabe and Ito's colours; the same method has the same one in every panel.
STYLES: dict[str, dict[str, Any]] = {
    UNIT: {"label": "ordinary backward", "color": "#000000", "marker": "|"},
    OURS: {"label": "mas_fast", "color": "#0072B2", "marker": "o", "linewidth": 2.2, "zorder": 3},
    "mas_fast_python": {"label": "mas_fast, Python only", "color": "#56B4E9", "marker": "o"},
    "loop": {"label": "batch-size-1 loop", "color": "#D55E00", "marker": "^"},
    "authors": {"label": "authors' code, batch size 1", "color": "#E69F00", "marker": "v"},
    "vmap": {"label": "vmap(grad), best chunk", "color": "#009E73", "marker": "s"},
    "vmap_whole": {"label": "vmap(grad), whole batch", "color": "#009E73", "marker": "s", "linestyle": "--"},
    "opacus": {"label": "Opacus", "color": "#CC79A7", "marker": "D"},
    "backpack": {"label": "BackPACK", "color": "#7F3C8D", "marker": "P"},
}
AXES = {"N": "samples in a batch, N", "T": "positions, T", "parameters": "parameters"}


def draw_cases(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw every method's cost on every case, in ordinary batched backwards."""
    cases = [case for case in SHORT_TITLES if any(row["case"] == case for row in rows)]
    for method, style in STYLES.items():
        points = [
            (row["ratio_p50"], cases.index(row["case"]))
            for row in rows
            if row["method"] == method and row["case"] in cases and row["num_batches"] > 1 and row["ratio_p50"]
        ]
        if points and method != UNIT:
            marks = {**style, "linestyle": "none", "markersize": 8 if method == OURS else 6}
            axes.plot(*zip(*points, strict=True), **marks)
    axes.axvline(1, color="#000000", linewidth=0.8)
    axes.set(xscale="log", xlabel="time, in ordinary batched backwards", yticks=range(len(cases)))
    axes.set_yticklabels([SHORT_TITLES[case] for case in cases])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="center right")
    axes.set_title("Exact importance: what it costs")


def draw_curve(axes: Axes, rows: Sequence[Row], curve: str, column: str, slopes: bool = False) -> None:
    """Draw a column of every method along a curve, and say what could not be measured."""
    for method, style in STYLES.items():
        line = line_of(rows, curve, method)
        points = [(row["value"], row[column]) for row in line if row["failure"] is None and row[column]]
        if not points:
            continue
        slope = slope_of(line, column)
        said = f" ({AXES_SHORT[line[0]['axis']]}$^{{{slope:.2f}}}$)" if slopes and slope is not None else ""
        axes.plot(*zip(*points, strict=True), **{**style, "label": style["label"] + said, "markersize": 5})
        ended = [row for row in line if row["failure"] is not None]
        if ended and len(points) < len(line):
            axes.annotate("✕", points[-1], color=style["color"], xytext=(6, -4), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel=AXES[CURVES[curve].axis])
    axes.grid(alpha=0.3)


AXES_SHORT = {"N": "N", "T": "T", "parameters": "P"}


def draw_ratios(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw how the cost of mas_fast beside an ordinary backward changes with N and T."""
    for curve, colour in zip([c for c in CURVES if CURVES[c].axis != "parameters"], COLOURS, strict=False):
        line = [row for row in line_of(rows, curve, OURS) if row["ratio_p50"]]
        if not line:
            continue
        style = "-" if CURVES[curve].axis == "N" else "--"
        values, ratios = zip(*((row["value"], row["ratio_p50"]) for row in line), strict=True)
        label = f"{CURVES[curve].title}, by {CURVES[curve].axis}"
        axes.plot(values, ratios, style, color=colour, marker="o", markersize=4, label=label)
    axes.axhline(1, color="#000000", linewidth=0.8)
    axes.set(xscale="log", xlabel="N or T", ylabel="ordinary backwards", ylim=(0, None))
    axes.set_title("mas_fast: cost as batches and sequences grow")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def draw_performance(passes: Sequence[Row], growth: Sequence[Row]) -> Figure:
    """Draw the README's figure: cost by case, cost by size, memory by size."""
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    draw_cases(left.subplots(), passes)
    top, bottom = right.subplots(2, 1)
    draw_ratios(top, growth)
    draw_curve(bottom, growth, "mlp-N", "peak_mib")
    bottom.set(ylabel="peak MiB beyond model and data")
    bottom.set_title(f"Memory: {CURVES['mlp-N'].title}")
    bottom.legend(fontsize=7)
    return figure


def draw_growth(growth: Sequence[Row]) -> Figure:
    """Draw time and memory of every curve; legends give the exponents."""
    curves = [curve for curve in CURVES if line_of(growth, curve, OURS)]
    figure = Figure(figsize=(5.2 * len(curves), 9), layout="constrained")
    panels = figure.subplots(2, len(curves), squeeze=False)
    for column, curve in enumerate(curves):
        for row, (value, label) in enumerate((("time_ms_p50", "ms a batch"), ("peak_mib", "peak MiB"))):
            axes = panels[row][column]
            draw_curve(axes, growth, curve, value, slopes=True)
            axes.set(ylabel=label)
            axes.legend(fontsize=7)
        panels[0][column].set_title(CURVES[curve].title)
    return figure


def main(argv: list[str] | None = None) -> int:
    """Draw both figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=FIGURES)
    arguments = parser.parse_args(argv)
    try:
        passes, growth = (read_results(arguments.results, kind) for kind in ("passes", "growth"))
    except (ValueError, json.JSONDecodeError) as error:
        parser.error(str(error))
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw_performance(passes, growth).savefig(arguments.out / "performance.png", dpi=110)
    draw_growth(growth).savefig(arguments.out / "growth.png", dpi=80)
    return 0


if __name__ == "__main__":
    sys.exit(main())
