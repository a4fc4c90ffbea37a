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
    "joint": {"color": "#595959", "marker": "s", "linestyle": (0, (4, 2))},
    "MAS": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "fine-tuning": {"color": "#D55E00", "marker": "^", "linestyle": "-"},
}
LABELS = {"joint": "joint training (ceiling)", "MAS": "MAS", "fine-tuning": "fine-tuning"}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw a result of `build_result` and write it as PNG.

    Args:
        result: The result.
        path: Where to, ending in ``.png``.
    """
    figure = Figure(figsize=(12, 5.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_accuracy(left, result)
    _draw_importance(right, result)
    seeds = len(result["seeds"])
    figure.suptitle(
        f"Five tasks of two digits learned one after the other, {seeds} seed{'s' if seeds > 1 else ''}, "
        f"λ = {result['settings']['lam']:g}",
        fontsize=13,
        fontweight="bold",
    )
    figure.savefig(path)


def _draw_accuracy(axes: Axes, result: Mapping[str, Any]) -> None:
    names = [task["name"] for task in result["tasks"]]
    positions = range(1, len(names) + 1)
    for method, style in STYLES.items():
        steps = result["methods"][method]["accuracy_along_sequence"]
        means = [step["mean"] for step in steps]
        errors = [step["standard_error"] or 0.0 for step in steps]
        low, high = zip(*((mean - error, mean + error) for mean, error in zip(means, errors, strict=True)), strict=True)
        axes.fill_between(positions, low, high, color=style["color"], alpha=0.18, linewidth=0)
        axes.plot(positions, means, **style, linewidth=2, markersize=6, label=f"{LABELS[method]}: {means[-1]:.1%}")
    axes.set_title("Average test accuracy over the tasks seen so far", fontsize=11)
    axes.set_xticks(positions, [f"{position}\n{name}" for position, name in zip(positions, names, strict=True)])
    axes.set_xlabel("tasks seen, and the digits of the newest")
    axes.set_ylabel("average accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    band = "; band: ± standard error" if len(result["seeds"]) > 1 else ""
    axes.legend(title=f"after the last task{band}", loc="lower left", frameon=False, alignment="left")
    _clean(axes)


def _draw_importance(axes: Axes, result: Mapping[str, Any]) -> None:
    layers = result["importance"]
    names = [task["name"] for task in result["tasks"]]
    boxes = [
        {
            "whislo": layer["quantiles_of_nonzero"]["p5"],
            "q1": layer["quantiles_of_nonzero"]["p25"],
            "med": layer["quantiles_of_nonzero"]["p50"],
            "q3": layer["quantiles_of_nonzero"]["p75"],
            "whishi": layer["quantiles_of_nonzero"]["p95"],
        }
        for layer in layers.values()
    ]
    axes.bxp(
        boxes,
        positions=range(len(layers)),
        widths=0.3,
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": "#E3EEF6", "edgecolor": "#0072B2"},
        medianprops={"color": "#0072B2", "linewidth": 2},
        whiskerprops={"color": "#0072B2"},
        capprops={"color": "#0072B2"},
    )
    for task, name in enumerate(names):
        color = colormaps["cividis"](task / max(1, len(names) - 1))
        means = [layer["mean_of_each_task"][task] for layer in layers.values()]
        at = [position + 0.26 + 0.07 * task for position in range(len(layers))]
        axes.plot(
            at, means, "o", color=color, markersize=5.5, markeredgecolor="#333333", markeredgewidth=0.5, label=name
        )
    axes.set_yscale("log")
    axes.set_title("Importance Ω after the last task", fontsize=11)
    axes.set_xticks(
        range(len(layers)),
        [
            f"{name}\n{layer['entries_per_seed']:,} entries\n{layer['zero_fraction']:.0%} zero"
            for name, layer in layers.items()
        ],
    )
    axes.set_xlim(-0.5, len(layers) - 0.2)
    axes.set_xlabel("layer")
    axes.set_ylabel("Ω of a weight or bias")
    axes.legend(title="mean Ω of each task", frameon=False, ncols=len(names), columnspacing=0.9, handletextpad=0.1)
    _clean(axes)


def _clean(axes: Axes) -> None:
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
