"""Object recognition with a head for each task: experiments a (pairs), b (omega_data) and g (sequence)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import torch
from torch import Tensor

import mas_fast
from benchmarks.continual.compare import Begin, Matrices, choose, contenders, forgetting_claims, overall, run, summarise
from benchmarks.continual.data import DataError, Images, Task, class_folders, digits, mnist, task_of
from benchmarks.continual.methods import METHODS, OMEGA_BATCH, RECOMPUTED
from benchmarks.continual.problem import Problem, Recognition, Training
from benchmarks.continual.seeds import Workplace
from benchmarks.continual.summary import Json, claim, heatmap, over_problems
from mas_fast.demo.metrics import average_accuracy

TRAINING = Training(lr=0.05, epochs=20, batch_size=32)
HALVES = {"0–4": (0, 1, 2, 3, 4), "5–9": (5, 6, 7, 8, 9), "odd": (1, 3, 5, 7, 9), "even": (0, 2, 4, 6, 8)}
PAIRINGS = (("0–4", "5–9"), ("5–9", "0–4"), ("odd", "even"), ("even", "odd"))
DIGIT_PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
TURNED = 3  # pairs that come once more, turned by 90°
SAME = 0.01  # accuracies within one point count as equally good
LAYERS = ("conv1", "conv2", "conv3", "linear")


class Source:
    """Where images come from: scikit-learn's digits, a folder of MNIST, or a folder of classes for each task."""

    def __init__(self, mnist_folder: Path | None = None, folders: Sequence[Path] = ()) -> None:
        """Load the images; the digits without arguments.

        Raises:
            DataError: A folder does not hold what it must.
        """
        if folders and len({folder.name for folder in folders}) < len(folders) or len(folders) == 1:
            raise DataError(f"--folders must name two or more tasks, each once, got {[f.name for f in folders]}")
        self.name = ", ".join(f.name for f in folders) or ("MNIST" if mnist_folder else "digits")
        self._of_folder = {folder.name: class_folders(folder) for folder in folders}
        self._digits = None if folders else mnist(mnist_folder) if mnist_folder else digits()

    def pairings(self, *, validation: bool) -> dict[str, Recognition]:
        """Return two tasks each: halves of the digits, or all ordered pairs of folders."""
        if self._digits is None:
            tasks = {name: task_of(name, images, validation=validation) for name, images in self._of_folder.items()}
            pairs = list(permutations(tasks, 2))
        else:
            halves = {name: self._digits.of(labels) for name, labels in HALVES.items()}
            tasks = {name: task_of(name, images, validation=validation) for name, images in halves.items()}
            pairs = list(PAIRINGS)
        return {f"{a} → {b}": Recognition([tasks[a], tasks[b]], TRAINING) for a, b in pairs}

    def sequence(self, *, validation: bool) -> Recognition:
        """Return all tasks in a row: five pairs of digits, then three of them turned by 90°; or the folders."""
        if self._digits is None:
            return Recognition([task_of(n, own, validation=validation) for n, own in self._of_folder.items()], TRAINING)
        tasks = []
        for turn in (0, 1):
            for pair in DIGIT_PAIRS[: TURNED if turn else None]:
                own = self._digits.of(pair)
                turned = Images(torch.rot90(own.pixels, turn, (2, 3)), own.labels, own.classes)
                name = f"{pair[0]}/{pair[1]}" + (" turned" if turn else "")
                tasks.append(task_of(name, turned, validation=validation))
        return Recognition(tasks, TRAINING)


def _few(pairings: dict[str, Recognition], place: Workplace) -> dict[str, Recognition]:
    return dict(list(pairings.items())[:2]) if place.small else pairings


def _with_means(problems: dict[str, Recognition], matrices: Matrices) -> Json:
    found = summarise(problems, matrices)
    return {**found, "tables": [overall(matrices), *found["tables"]]}


def pairs(place: Workplace, source: Source) -> Json:
    """Learn a second task with each method, in four pairings: the paper's table 1 in shape."""
    names = list(METHODS)
    chosen = choose(place, _few(source.pairings(validation=True), place), names)
    problems = _few(source.pairings(validation=False), place)
    matrices = run(place, problems, contenders(chosen, names), {"chosen": chosen})
    return {
        "title": f"Two tasks of object recognition ({source.name})",
        "chosen": chosen,
        **_with_means(problems, matrices),
        "heatmaps": omega_by_class(next(iter(problems.values())), place.seeds[0]),
        "claims": forgetting_claims(matrices),
    }


def omega_by_class(problem: Recognition, seed: int) -> list[Json]:
    """Return how Ω after the first task spreads over layers and classes, and how alike the classes' Ω are."""
    learner = METHODS["fine-tuning"](problem, seed)
    learner.learn(0)
    task: Task = problem.tasks[0]
    parameters = [f"{layer}.weight" for layer in LAYERS]
    omegas = []
    for label in range(task.outputs):
        images = task.train[task.train_targets == label].split(OMEGA_BATCH)
        omegas.append(mas_fast.estimate_importance(learner.network, images, parameters=parameters))
    names = [f"class {label}" for label in range(task.outputs)]
    means = [[float(omega[name].mean()) for name in parameters] for omega in omegas]
    flat = torch.stack([torch.cat([omega[name].flatten() for name in parameters]) for omega in omegas])
    ranks = torch.corrcoef(flat.argsort(1).argsort(1).double())
    return [
        heatmap(f"Mean Ω of the weights by class of data, task {task.name}", names, list(LAYERS), means),
        heatmap(f"Rank correlation of Ω between classes, task {task.name}", names, names, ranks.tolist()),
    ]


def omega_data(place: Workplace, source: Source) -> Json:
    """Estimate Ω on training images, on unlabelled test images, and on both: the paper's table 2 in shape."""
    names = ["MAS"] if place.small else ["MAS", "l-MAS"]
    chosen = choose(place, _few(source.pairings(validation=True), place), names)
    problems = _few(source.pairings(validation=False), place)

    def seen(problem: Problem, kind: str, index: int) -> Tensor:
        task = problem.tasks[index]
        return {"training": task.train, "test": task.test, "all": torch.cat((task.train, task.test))}[kind]

    def begin(method: str, kind: str) -> Begin:
        strength = chosen[method]["strength"]
        return lambda problem, seed: METHODS[method](problem, seed, strength, lambda index: seen(problem, kind, index))

    def label(method: str, kind: str) -> str:
        return f"{method}, Ω from {kind} images"

    kinds = {label(method, kind): begin(method, kind) for method in names for kind in ("training", "test", "all")}
    matrices = run(place, problems, kinds, {"chosen": chosen})
    accuracy = {
        kind: over_problems([[average_accuracy(own) for own in of[kind]] for of in matrices.values()]) for kind in kinds
    }

    def gain(method: str, kind: str) -> list[float]:
        pairs = zip(accuracy[label(method, kind)], accuracy[label(method, "training")], strict=True)
        return [other - own for other, own in pairs]

    return {
        "title": f"Ω from training images, from unlabelled test images, and from all ({source.name})",
        "chosen": chosen,
        **_with_means(problems, matrices),
        "claims": [
            claim(f"{method}: Ω from {what} is as good as from training images", gain(method, kind), margin=SAME)
            for method in names
            for kind, what in (("test", "unlabelled test images"), ("all", "all images"))
        ],
    }


def sequence(place: Workplace, source: Source) -> Json:
    """Learn eight tasks in a row; MAS also with Ω computed again through every old head after each task."""
    names = [*METHODS, RECOMPUTED]
    chosen = choose(place, {"sequence": source.sequence(validation=True)}, names)
    problem = source.sequence(validation=False)
    problems = {f"{len(problem.tasks)} tasks in a row": problem}
    matrices = run(place, problems, contenders(chosen, names), {"chosen": chosen})
    return {
        "title": f"A sequence of {len(problem.tasks)} tasks ({source.name})",
        "chosen": chosen,
        **summarise(problems, matrices),
        "claims": forgetting_claims(matrices),
    }
