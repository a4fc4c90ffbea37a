"""What |mean of a batch| does to Ω and to the best λ: `python -m benchmarks.continual.batch_size --out DIR`.

Public implementations take the magnitude of a batch's mean gradient, the paper that of each sample's. Both are had here
for batches of 1 to 256 samples, on the demo's five tasks of real digits, with the demo's network and training but the
proximal step, which is stable for any λ:

    scale   Σ Ω of batches / Σ exact Ω, and their Spearman rank correlation, by layer, after the first task
    sweep   average accuracy and forgetting after the last task, for each λ of a grid; on validation images

The best λ is that of the highest mean accuracy over the seeds. For the exact Ω it must not depend on the batch size.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr

import mas_fast
from benchmarks.continual.seeds import Result, run_seeds, write_json
from benchmarks.provenance import describe_run
from mas_fast.demo import metrics
from mas_fast.demo.data import load_tasks
from mas_fast.demo.metrics import mean_and_error
from mas_fast.demo.settings import Settings
from mas_fast.demo.train import estimate_options, run_fine_tuning, run_mas, single_thread

NAME = "batch_size"
KINDS = {"sample": "exact", "batch": "|mean of a batch|"}
# Seeds that neither the demo nor the choice of its settings has seen.
SEEDS = range(200, 205)
SIZES = (1, 4, 16, 64, 256)
# Half decades.
LAMS = tuple(10 ** (exponent / 2) for exponent in range(-4, 4))
SMALL = {"seeds": range(200, 202), "sizes": (1, 256), "lams": (0.01, 0.1, 1.0, 10.0)}


def scales(seed: int, sizes: list[int]) -> list[dict[str, Any]]:
    """Return for each layer and batch size how Ω of batches compares with the exact Ω, after the first task."""
    tasks = load_tasks(validation=True)
    network = run_fine_tuning(tasks[:1], Settings(), seed, lambda done: None).network
    images = tasks[0].train_images[
        torch.randperm(len(tasks[0].train_images), generator=torch.Generator().manual_seed(seed))
    ]
    exact = mas_fast.estimate_importance(network, [images], **estimate_options(0))
    rows = []
    for size in sizes:
        batched = mas_fast.estimate_importance(network, images.split(size), per="batch", **estimate_options(0))
        for name, omega in exact.items():
            if name.endswith("weight"):
                other = batched[name]
                rows.append(
                    {
                        "layer": name.removesuffix(".weight"),
                        "size": size,
                        "ratio": float(other.sum() / omega.sum()),
                        "correlation": float(spearmanr(other.flatten(), omega.flatten()).statistic),
                    }
                )
    return rows


def sweep(seed: int, sizes: list[int], lams: list[float]) -> list[dict[str, Any]]:
    """Return accuracy and forgetting on validation images for each kind of Ω, batch size and λ."""
    tasks = load_tasks(validation=True)
    rows = []
    for per in KINDS:
        for size in sizes:
            for lam in lams:
                settings = dataclasses.replace(Settings(), lam=lam)
                run = run_mas(tasks, settings, seed, lambda done: None, batch_size=size, per=per, implicit=True)
                rows.append(
                    {
                        "per": per,
                        "size": size,
                        "lam": lam,
                        "accuracy": metrics.average_accuracy(run.accuracy),
                        "forgetting": metrics.forgetting(run.accuracy),
                    }
                )
    return rows


def summarise(results: list[Result]) -> dict[str, Any]:
    """Return means over the seeds, and the best λ of each kind of Ω and batch size."""
    settings = results[0]["settings"]
    curves = []
    for per in KINDS:
        for size in settings["sizes"]:
            points = []
            for lam in settings["lams"]:
                own = [
                    row
                    for result in results
                    for row in result["sweep"]
                    if (row["per"], row["size"], row["lam"]) == (per, size, lam)
                ]
                points.append(
                    {"lam": lam}
                    | {
                        key: mean_and_error(values)
                        for key in ("accuracy", "forgetting")
                        for values in [[row[key] for row in own]]
                    }
                )
            best = max(points, key=lambda point: point["accuracy"]["mean"])
            curves.append({"per": per, "size": size, "best_lam": best["lam"], "points": points})
    layers: dict[str, dict[str, dict[str, float]]] = {}
    for layer in dict.fromkeys(row["layer"] for row in results[0]["scales"]):
        for size in settings["sizes"]:
            own = [r for result in results for r in result["scales"] if (r["layer"], r["size"]) == (layer, size)]
            layers.setdefault(layer, {})[str(size)] = {
                key: statistics.fmean(row[key] for row in own) for key in ("ratio", "correlation")
            }
    seeds = [result["seed"] for result in results]
    return {"seeds": seeds, "settings": settings, "layers": layers, "sweep": curves}


def best_lams(summary: dict[str, Any], per: str) -> list[float]:
    """Return the best λ of a kind of Ω, by batch size."""
    return [curve["best_lam"] for curve in summary["sweep"] if curve["per"] == per]


def for_report(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the curves and the claim that `python -m mas_fast report` shows."""
    sizes, lams = summary["settings"]["sizes"], summary["settings"]["lams"]
    alone = {"standard_error": None}
    of_layers = [
        {
            "title": title,
            "x_label": "batch size",
            "y_label": key,
            "x": sizes,
            "log_x": True,
            "series": {
                layer: [{"mean": found[str(size)][key], **alone} for size in sizes]
                for layer, found in summary["layers"].items()
            },
        }
        for key, title in (
            ("ratio", "Σ Ω of |mean of a batch| / Σ exact Ω"),
            ("correlation", "rank correlation of |mean of a batch| and the exact Ω"),
        )
    ]
    sweeps = [
        {
            "title": f"{what} Ω: average accuracy after five tasks",
            "x_label": "λ",
            "y_label": "average accuracy, %",
            "x": lams,
            "log_x": True,
            "series": {
                f"batches of {curve['size']}, best λ = {curve['best_lam']:.3g}": [
                    {key: None if v is None else 100 * v for key, v in point["accuracy"].items()}
                    for point in curve["points"]
                ]
                for curve in summary["sweep"]
                if curve["per"] == per
            },
        }
        for per, what in KINDS.items()
    ]
    exact, batched = (best_lams(summary, per) for per in KINDS)
    step = largest_step(lams)
    constant, moved = max(exact) / min(exact) <= step, max(batched) / min(batched)
    moves = "holds" if moved > step else "cannot be told" if moved > 1 else "does not hold"
    return {
        "experiment": NAME,
        "title": "|Mean of a batch| against the exact Ω, by batch size",
        "curves": [*of_layers, *sweeps],
        "claims": [
            {
                "claim": "The best λ of the exact Ω is the same for every batch size, within a step of the sweep",
                "verdict": "holds" if constant else "does not hold",
                "measured": f"best λ moves by a factor of {max(exact) / min(exact):.3g}",
            },
            {
                "claim": "The best λ of |mean of a batch| moves with the batch size by more than a step of the sweep",
                "verdict": moves,
                "measured": f"best λ moves by a factor of {moved:.3g}",
            },
        ],
    }


def largest_step(lams: list[float]) -> float:
    """Return the factor between neighbours of the sweep, and a little more for rounding."""
    return 1.001 * max((b / a for a, b in zip(lams, lams[1:], strict=False)), default=1.0)


def draw(summary: dict[str, Any], path: Path) -> None:
    """Draw scale and rank correlation by layer, and the sweep of λ for both kinds of Ω."""
    figure = Figure(figsize=(13, 6.8), dpi=130, layout="constrained")
    (scale, exact), (rank, batched) = figure.subplots(2, 2)
    sizes = summary["settings"]["sizes"]
    for axes, key, title in (
        (scale, "ratio", "Σ Ω of |mean of a batch| / Σ exact Ω"),
        (rank, "correlation", "their rank correlation"),
    ):
        for layer, found in summary["layers"].items():
            axes.plot(sizes, [found[str(size)][key] for size in sizes], marker="o", label=layer)
        axes.set(xscale="log", xticks=sizes, xticklabels=sizes, xlabel="batch size", title=title, ylim=(0, 1.05))
    scale.legend(frameon=False)
    for axes, per in ((exact, "sample"), (batched, "batch")):
        for shade, curve in enumerate(c for c in summary["sweep"] if c["per"] == per):
            points = curve["points"]
            axes.errorbar(
                [point["lam"] for point in points],
                [100 * point["accuracy"]["mean"] for point in points],
                yerr=[100 * (point["accuracy"]["standard_error"] or 0) for point in points],
                color=str(0.75 * (1 - shade / max(1, len(sizes) - 1))),
                marker=".",
                capsize=2,
                label=f"batches of {curve['size']}, best λ = {curve['best_lam']:.3g}",
            )
        axes.set(xscale="log", xlabel="λ", title=f"average accuracy after five tasks, %: {KINDS[per]} Ω")
        axes.legend(frameon=False, fontsize=8)
    low = min(axes.get_ylim()[0] for axes in (exact, batched))
    high = max(axes.get_ylim()[1] for axes in (exact, batched))
    for axes in (exact, batched):
        axes.set_ylim(low, high)
    for axes in (scale, rank, exact, batched):
        axes.grid(color="#E2E2E2", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    """Run all seeds, write the summary and the figure; return 1 if the exact Ω's best λ moves by more than a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; seeds found there are kept")
    parser.add_argument("--seeds", type=int, nargs="+", help=f"{SEEDS[0]} to {SEEDS[-1]} if left out")
    parser.add_argument("--small", action="store_true", help="two seeds, two batch sizes, four λ: some two minutes")
    arguments = parser.parse_args(argv)
    chosen = SMALL if arguments.small else {"seeds": SEEDS, "sizes": SIZES, "lams": LAMS}
    sizes, lams = list(chosen["sizes"]), list(chosen["lams"])
    settings = {"sizes": sizes, "lams": lams, "training": dataclasses.asdict(Settings())}
    # Of course: the heads of the tasks to come.
    warnings.filterwarnings("ignore", message="no omega holds these parameters")
    with single_thread():
        results = run_seeds(
            arguments.out,
            NAME,
            settings,
            arguments.seeds or chosen["seeds"],
            lambda seed: {"scales": scales(seed, sizes), "sweep": sweep(seed, sizes, lams)},
        )
    summary = summarise(results)
    summary = {**for_report(summary), **summary, "small": arguments.small, **describe_run(1)}
    write_json(arguments.out / f"{NAME}.json", summary)
    draw(summary, arguments.out / f"{NAME}.png")
    for layer, found in summary["layers"].items():
        ratios = "  ".join(f"{size}: {found[str(size)]['ratio']:.3f}" for size in sizes)
        ranks = "  ".join(f"{size}: {found[str(size)]['correlation']:.3f}" for size in sizes)
        print(f"{layer:10} scale {ratios}   rank correlation {ranks}")
    for per, what in KINDS.items():
        best = best_lams(summary, per)
        shown = "  ".join(f"{lam:.3g}" for lam in best)
        print(f"{what:18} best λ by batch size: {shown}   factor {max(best) / min(best):.3g}")
    exact = best_lams(summary, "sample")
    return int(max(exact) / min(exact) > largest_step(lams))


if __name__ == "__main__":
    sys.exit(main())
