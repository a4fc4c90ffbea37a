"""Figures of a result: dots for tables, heatmaps for matrices, lines with bands for curves."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

Json = Mapping[str, Any]

# Okabe and Ito's colours can be told apart by colour-blind readers; the same method has the same one in all figures.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D", "#A6761D", "#7F3C8D", "#000000")
KNOWN = ("MAS", "fine-tuning", "LwF", "EWC", "SI", "l-MAS", "joint", "IMM")
MARKERS = "o^sDvP*X<>"
# Largest over smallest value from which colours are logarithmic.
WIDE = 30


def figures_of(result: Json) -> dict[str, bytes]:
    """Return the figures of a result, PNG by file name."""
    name = result["experiment"]
    found: dict[str, Figure] = {}
    if result.get("tables"):
        found["tables"] = _draw_tables(result["tables"])
    if result.get("curves"):
        found["curves"] = _draw_curves(result["curves"])
    if result.get("matrices"):
        found["matrices"] = _draw_matrices(result["matrices"])
    if result.get("heatmaps"):
        found["heatmaps"] = _draw_heatmaps(result["heatmaps"])
    return {f"{name}-{kind}.png": _png(figure) for kind, figure in found.items()}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    styles = {name: {"color": COLOURS[i], "marker": MARKERS[i]} for i, name in enumerate(KNOWN) if name in names}
    # Other names get the colours that no known one has, or, among themselves, all in order.
    others = cycle([*range(len(KNOWN), len(COLOURS)), *range(len(KNOWN))] if styles else range(len(COLOURS)))
    for name in names:
        if name not in styles:
            index = next(others)
            styles[name] = {"color": COLOURS[index], "marker": MARKERS[index]}
    return styles


def _draw_tables(tables: Sequence[Json]) -> Figure:
    """Draw each table as a row of panels, one for each column: a dot with its standard error for each method."""
    columns = max(len(table["columns"]) for table in tables)
    rows = [len(table["rows"]) for table in tables]
    size = (min(2.6 * columns + 2.2, 16), 0.27 * sum(rows) + 0.95 * len(tables))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(tables), columns, squeeze=False, gridspec_kw={"height_ratios": [n + 2 for n in rows]})
    for line, table in zip(grid, tables, strict=True):
        names = [row["name"] for row in table["rows"]]
        styles = _styles(names)
        for index, axes in enumerate(line):
            if index >= len(table["columns"]):
                axes.set_visible(False)
                continue
            for position, row in enumerate(table["rows"]):
                cell = row["cells"][index]
                if cell is not None:
                    error = cell["standard_error"] or 0
                    axes.errorbar(cell["mean"], -position, xerr=error, capsize=3, **styles[row["name"]])
            axes.set_yticks([-i for i in range(len(names))], names if index == 0 else [""] * len(names), fontsize=9)
            axes.set_ylim(-len(names) + 0.4, 0.6)
            axes.set_title(table["columns"][index], fontsize=9)
            axes.tick_params(axis="x", labelsize=8)
            _plain(axes)
        line[0].set_ylabel(table["title"], fontsize=9, fontweight="bold")
    return figure


def _draw_curves(curves: Sequence[Json]) -> Figure:
    """Draw curves with their standard error as a band."""
    columns = min(2, len(curves))
    lines = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(7.4 * columns, 4.3 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, curve in zip(grid.flat, curves, strict=False):
        x = curve["x"]
        for name, style in _styles(list(curve["series"])).items():
            points = curve["series"][name]
            means = [point["mean"] for point in points]
            errors = [point["standard_error"] or 0 for point in points]
            axes.plot(x[: len(means)], means, **style, label=name, linewidth=1.8)
            low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
            axes.fill_between(x[: len(means)], low, high, color=style["color"], alpha=0.15, linewidth=0)
        if curve.get("log_x"):
            axes.set_xscale("log")
        axes.set_xticks(x, [f"{value:.3g}" for value in x], minor=False)
        axes.minorticks_off()
        axes.set(xlabel=curve["x_label"], ylabel=curve["y_label"])
        axes.set_title(curve["title"], fontsize=10)
        axes.legend(frameon=False, fontsize=8)
        _plain(axes)
    for axes in list(grid.flat)[len(curves) :]:
        axes.set_visible(False)
    return figure


def _draw_matrices(matrices: Sequence[Json]) -> Figure:
    """Draw accuracy matrices on one scale: the task learned last downwards, the task tested on to the right."""
    columns = min(5, len(matrices))
    lines = math.ceil(len(matrices) / columns)
    count = max(len(matrix["tasks"]) for matrix in matrices)
    side = 2.4 if count < 5 else 3.1
    figure = Figure(figsize=(side * columns, (side + 0.5) * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    lowest = 100 * min(value for matrix in matrices for row in matrix["mean"] for value in row)
    for axes, matrix in zip(grid.flat, matrices, strict=False):
        size = len(matrix["tasks"])
        values = [[100 * v for v in row] + [math.nan] * (size - len(row)) for row in matrix["mean"]]
        _colours(axes, values, Normalize(min(lowest, 90), 100), "{:.0f}", small=size > 5)
        axes.set_xticks(range(size), [str(i + 1) for i in range(size)], fontsize=8)
        axes.set_yticks(range(len(values)), [f"after {i + 1}" for i in range(len(values))], fontsize=8)
        axes.set_title(matrix["title"], fontsize=8)
    for axes in list(grid.flat)[len(matrices) :]:
        axes.set_visible(False)
    return figure


def _draw_heatmaps(heatmaps: Sequence[Json]) -> Figure:
    """Draw tables as colours."""
    figure = Figure(figsize=(7 * len(heatmaps), 4.2), layout="constrained")
    for axes, heatmap in zip(figure.subplots(1, len(heatmaps), squeeze=False)[0], heatmaps, strict=True):
        flat = [value for row in heatmap["values"] for value in row]
        low, high = min(flat), max(flat)
        wide = low > 0 and high > WIDE * low
        _colours(axes, heatmap["values"], LogNorm(low, high) if wide else Normalize(low, high), "{:.3g}", small=False)
        axes.set_xticks(range(len(heatmap["columns"])), heatmap["columns"], fontsize=9)
        axes.set_yticks(range(len(heatmap["rows"])), heatmap["rows"], fontsize=9)
        axes.set_title(heatmap["title"], fontsize=10)
    return figure


def _colours(axes: Axes, values: Sequence[Sequence[float]], norm: Normalize, text: str, *, small: bool) -> None:
    axes.imshow(values, cmap="cividis", norm=norm, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if not math.isnan(value):
                colour = "black" if norm(value) > 0.6 else "white"
                axes.text(j, i, text.format(value), ha="center", va="center", color=colour, fontsize=6 if small else 8)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _plain(axes: Axes) -> None:
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
