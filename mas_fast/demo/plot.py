"""The picture of a result: accuracy along the sequence, and importance per layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

# Okabe and Ito's colours can be told apart by colour-blind readers; markers and dashes tell the lines apart in grey.
STYLES: dict[str, dict[str, Any]] = {
    "joint": {"color": "#4D4D4D", "marker": "s", "linestyle": (0, (4, 2))},
    "MAS": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "fine-tuning": {"color": "#D55E00", "marker": "^", "linestyle": "-"},
}
LABELS = {"joint": "joint training", "MAS": "MAS", "fine-tuning": "fine-tuning"}
BOX = {"color": "#0072B2", "linewidth": 1.2}
SMALL = 9.5


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw a result of `build_result` and write it as PNG.

    Args:
        result: The result.
        path: Where to, ending in ``.png``.
    """
    seeds = len(result["seeds"])
    figure = Figure(figsize=(12.5, 5.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.05))
    _draw_accuracy(left, result)
    _draw_importance(right, result)
    for axes in (left, right):
        axes.grid(axis="y", color="#E2E2E2", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Digits as five tasks learned one after the other: {seeds} seed{'s' if seeds > 1 else ''}, "
        f"λ = {result['settings']['lam']:g}",
        fontsize=13,
        fontweight="bold",
    )
    figure.savefig(path)


def _draw_accuracy(axes: Axes, result: Mapping[str, Any]) -> None:
    """Draw the average accuracy over the tasks seen so far, with the standard error over the seeds as a band."""
    names = [task["name"] for task in result["tasks"]]
    positions = range(1, len(names) + 1)
    final = {}
    for method, style in STYLES.items():
        steps = result["methods"][method]["accuracy_along_sequence"]
        means = [step["mean"] for step in steps]
        errors = [step["standard_error"] or 0.0 for step in steps]
        low = [mean - error for mean, error in zip(means, errors, strict=True)]
        high = [mean + error for mean, error in zip(means, errors, strict=True)]
        axes.fill_between(positions, low, high, color=style["color"], alpha=0.16, linewidth=0)
        axes.plot(positions, means, **style, linewidth=2.2, markersize=6.5)
        final[method] = means[-1]
    _label_ends(axes, final, len(names))
    band = " (band: ± standard error)" if len(result["seeds"]) > 1 else ""
    axes.set_title(f"Test accuracy, averaged over the tasks seen so far{band}", fontsize=11, loc="left")
    axes.set_xticks(positions, [f"{position}\n{name}" for position, name in zip(positions, names, strict=True)])
    axes.set_xlim(0.85, len(names) + 1.15)
    axes.set_xlabel("tasks seen; digits of the newest one")
    axes.set_ylabel("average accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _label_ends(axes: Axes, final: Mapping[str, float], last: int) -> None:
    """Write each method's name and final accuracy beside the end of its line, far enough apart to be read."""
    low, high = axes.get_ylim()
    gap = 0.095 * (high - low)
    height = -float("inf")
    for method in sorted(final, key=lambda method: final[method]):
        height = max(final[method], height + gap)
        axes.annotate(
            f"{LABELS[method]}\n{final[method]:.1%}",
            xy=(last, final[method]),
            xytext=(last + 0.12, height),
            color=STYLES[method]["color"],
            fontweight="bold",
            fontsize=10,
            va="center",
        )


def _draw_importance(axes: Axes, result: Mapping[str, Any]) -> None:
    """Draw the spread of Ω within each layer after the last task, and the mean of each task's own Ω beside it."""
    layers = result["importance"]
    names = [task["name"] for task in result["tasks"]]
    boxes = []
    for layer in layers.values():
        p5, p25, p50, p75, p95 = layer["quantiles_of_nonzero"].values()
        boxes.append({"whislo": p5, "q1": p25, "med": p50, "q3": p75, "whishi": p95})
    axes.bxp(
        boxes,
        positions=range(len(layers)),
        widths=0.3,
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": "#DCEAF4", "edgecolor": BOX["color"], "linewidth": BOX["linewidth"]},
        medianprops=BOX | {"linewidth": 2.2},
        whiskerprops=BOX,
        capprops=BOX,
    )
    for task, name in enumerate(names):
        axes.scatter(
            [position + 0.25 + 0.085 * task for position in range(len(layers))],
            [layer["mean_of_each_task"][task] for layer in layers.values()],
            s=34,
            color=[colormaps["cividis"](task / max(1, len(names) - 1))],
            edgecolors="#333333",
            linewidths=0.6,
            label=name,
            zorder=3,
        )
    axes.set_yscale("log")
    axes.set_title("Importance Ω of the weights and biases of each layer under MAS", fontsize=11, loc="left")
    ticks = [
        f"{name}\n{layer['entries_per_seed']:,} entries\n{layer['zero_fraction']:.0%} are 0"
        for name, layer in layers.items()
    ]
    axes.set_xticks(range(len(layers)), ticks, fontsize=SMALL)
    axes.set_xlim(-0.4, len(layers) - 0.25)
    axes.set_xlabel("layer")
    axes.set_ylabel("Ω")
    legend = axes.legend(
        title="box: sum over the tasks (quartiles; whiskers 5–95 % of what is not 0)\ndots: mean of each task alone",
        loc="lower center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=len(names),
        fontsize=SMALL,
        title_fontsize=SMALL,
        columnspacing=1.0,
        handletextpad=0.1,
        facecolor="white",
        edgecolor="none",
        framealpha=1,
    )
    legend.get_title().set_multialignment("center")
    # Room for the legend below the lowest whisker: a third of the axis, which is logarithmic.
    low = min(box["whislo"] for box in boxes if box["whislo"] > 0)
    top = max(box["whishi"] for box in boxes)
    axes.set_ylim(low * (low / top) ** 0.32, top * (top / low) ** 0.06)
