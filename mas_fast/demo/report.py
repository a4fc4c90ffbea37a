"""The result as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mas_fast.demo.data import Task
from mas_fast.demo.settings import Settings
from mas_fast.demo.train import METHODS


def format_opening(tasks: Sequence[Task], settings: Settings, seeds: Sequence[int]) -> str:
    """Return what is about to be run."""
    train, test = sum(len(task.train_images) for task in tasks), sum(len(task.test_images) for task in tasks)
    return (
        f"{len(tasks)} tasks of two digits: {', '.join(task.name for task in tasks)}; {train:,} images to train on, "
        f"{test} to test\n"
        f"{len(METHODS)} methods, seeds {', '.join(map(str, seeds))}; {settings.epochs} epochs of SGD, "
        f"batch size {settings.batch_size}, learning rate {settings.lr:g}; MAS with λ = {settings.lam:g}"
    )


def format_tables(result: Mapping[str, Any]) -> str:
    """Return the accuracy matrices and the summary of the methods, in percent, and the cost."""
    blocks = [_format_matrix(name, result) for name in result["methods"]]
    return "\n\n".join([*blocks, _format_summary(result), _format_cost(result)])


def conclude(result: Mapping[str, Any]) -> str:
    """Say in one sentence whether MAS forgot less than fine-tuning over the seeds.

    With more than one seed, "less" is said only if the 95 % interval of the difference on the same seed excludes 0.
    """
    seeds = len(result["seeds"])
    forgot = {name: _points(method["forgetting"]) for name, method in result["methods"].items()}
    avoided = result["forgetting_avoided"]
    sentence = (
        f"over {seeds} seed{'s' if seeds > 1 else ''}: {forgot['MAS']} points against {forgot['fine-tuning']} "
        f"(joint training: {forgot['joint']})"
    )
    if seeds > 1:
        low, high = (100 * bound for bound in avoided["interval_95"])
        fewer = sum(difference > 0 for difference in avoided["per_seed"])
        sentence += (
            f"; the difference is {100 * avoided['mean']:.1f} points, 95 % interval {low:.1f} to {high:.1f}, "
            f"and MAS forgot less on {fewer} of {seeds} seeds"
        )
    if avoided["mean"] <= 0:
        verdict = "did not forget less than fine-tuning"
    elif seeds > 1 and avoided["interval_95"][0] <= 0:
        verdict = "was not shown to forget less than fine-tuning"
    else:
        verdict = "forgot less than fine-tuning"
    return f"MAS (λ = {result['settings']['lam']:g}) {verdict} {sentence}."


def _format_matrix(name: str, result: Mapping[str, Any]) -> str:
    accuracy = result["methods"][name]["accuracy"]
    names = [task["name"] for task in result["tasks"]]
    trained = "all tasks up to the row's" if name == "joint" else "the row's task"
    lines = [f"{name}: accuracy in % on each column's task after training on {trained}"]
    lines.append(" " * 7 + "".join(f"{task:>13}" for task in names))
    for task, means, errors in zip(names, accuracy["mean"], accuracy["standard_error"], strict=True):
        cells = (_points({"mean": m, "standard_error": e}) for m, e in zip(means, errors, strict=True))
        lines.append(f"{task:>7}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


def _format_summary(result: Mapping[str, Any]) -> str:
    seeds = len(result["seeds"])
    spread = f"mean ± standard error over {seeds} seeds" if seeds > 1 else "one seed"
    lines = [
        f"Summary in % ({spread})",
        f"{'':12}{'average accuracy':>18}{'forgetting':>14}{'just learned':>16}",
    ]
    for name, method in result["methods"].items():
        cells = [_points(method[key]) for key in ("average_accuracy", "forgetting", "new_task_accuracy")]
        lines.append(f"{name:12}{cells[0]:>18}{cells[1]:>14}{cells[2]:>16}")
    lines += [
        "average accuracy: over the five tasks after the last; forgetting: best earlier accuracy minus the last,",
        "over the first four tasks; just learned: accuracy on each task right after training on it",
    ]
    return "\n".join(lines)


def _format_cost(result: Mapping[str, Any]) -> str:
    cost, threads = result["cost"], result["machine"]["threads"]
    on_threads = f"{threads} thread{'s' if threads > 1 else ''}"
    ordinary, importance, loop = (f"{cost['time_ms'][name]['p50']:9.2f} ms" for name in ("ordinary", "pass", "loop"))
    return "\n".join(
        [
            f"Cost of one pass over the {cost['num_samples']} training images, in batches of {cost['batch_size']} "
            f"(medians of {cost['repeats']} interleaved repeats, float32, {on_threads})",
            f"  ordinary forward+backward of each batch {ordinary}",
            f"  importance pass, proof included        {importance}  = {cost['pass_over_ordinary']:.2f} × the ordinary",
            f"  loop, one image at a time              {loop}  = {cost['loop_over_pass']:.1f} × the pass",
            f"  largest relative error of Ω against the float64 loop: {cost['max_relative_error']:.1e}",
        ]
    )


def _points(value: Mapping[str, Any]) -> str:
    mean, error = value["mean"], value["standard_error"]
    return f"{100 * mean:.1f}" if error is None else f"{100 * mean:.1f} ± {100 * error:.1f}"
