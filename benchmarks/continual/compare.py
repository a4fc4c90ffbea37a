"""Methods against each other: their strengths chosen on validation images by one procedure, then run seed by seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.continual.methods import EVERY, DivergenceError, FineTuning, run_sequence
from benchmarks.continual.problem import Problem
from benchmarks.continual.seeds import Workplace
from benchmarks.continual.summary import Json, claim, curves, dropped, matrix, over_problems, table
from mas_fast.demo.metrics import accuracy_along_sequence, average_accuracy

Begin = Callable[[Problem, int], FineTuning]
Contenders = Mapping[str, Begin]  # by name: how to begin on a problem with a seed
Problems = Mapping[str, Problem]
Matrices = Mapping[str, Mapping[str, list[list[list[float]]]]]  # by problem and method: of each seed
UNIT = "MAS, λ = 1"


def choose(place: Workplace, problems: Problems, names: Sequence[str]) -> dict[str, Json]:
    """Return each method's strength: that of the highest average accuracy after the last task, on validation images.

    Args:
        place: Seeds and folder.
        problems: With validation images for test images.
        names: Of `EVERY`.

    Returns:
        Method -> `strength`, the `scores` by strength, None where training diverged, and whether the best is at an
        `edge` of the grid; for methods without a strength nothing.
    """

    def grid(name: str) -> tuple[float, ...]:
        every = EVERY[name].strengths
        return every[1::2] if place.small else every

    def scores(seed: int) -> Json:
        return {
            name: [_score(problems.values(), EVERY[name], seed, strength) for strength in grid(name)]
            for name in names
            if grid(name)
        }

    grids = {name: grid(name) for name in names}
    seeds = place.run("choice", place.choice_seeds, scores, {"strengths": grids, "problems": list(problems)})
    chosen = {}
    for name in names:
        if grid(name):
            per_strength = list(zip(*(result[name] for result in seeds), strict=True))
            means = [None if None in own else statistics.fmean(own) for own in per_strength]
            best = max(range(len(means)), key=lambda i: -1.0 if means[i] is None else means[i])  # type: ignore[return-value, arg-type]
            chosen[name] = {
                "strength": grid(name)[best],
                "scores": dict(zip(map(str, grid(name)), means, strict=True)),
                "edge": best in (0, len(means) - 1),
            }
    return chosen


def contenders(chosen: Mapping[str, Json], names: Sequence[str]) -> Contenders:
    """Return methods with their strengths, and MAS with λ = 1 beside that chosen, as in the paper."""

    def begin(name: str, strength: float) -> Begin:
        return lambda problem, seed: EVERY[name](problem, seed, strength)

    found = {name: begin(name, chosen[name]["strength"] if name in chosen else 0.0) for name in names}
    return found | ({UNIT: begin("MAS", 1.0)} if "MAS" in names else {})


def run(
    place: Workplace, problems: Problems, methods: Contenders, settings: Mapping[str, Any]
) -> dict[str, dict[str, list[list[list[float]]]]]:
    """Return problem -> method -> for each seed its accuracy matrix."""

    def one(seed: int) -> Json:
        return {
            name: {method: run_sequence(begin(problem, seed)) for method, begin in methods.items()}
            for name, problem in problems.items()
        }

    results = place.run("", place.seeds, one, {"methods": list(methods), "problems": list(problems), **settings})
    return {
        problem: {method: [result[problem][method] for result in results] for method in methods} for problem in problems
    }


def summarise(problems: Problems, matrices: Matrices) -> Json:
    """Return tables, matrices and curves of the runs."""
    tables, shown, lines = [], [], []
    for name, problem in problems.items():
        tasks = [task.name for task in problem.tasks]
        rows: dict[str, list[list[float] | None]] = {}
        for method, seeds in matrices[name].items():
            sequential = len(seeds[0]) > 1
            rows[method] = [
                [average_accuracy(own) for own in seeds],
                [dropped(own) for own in seeds] if sequential else None,
                *([own[-1][j] for own in seeds] for j in range(len(tasks))),
            ]
            if sequential and len(tasks) > 2:
                shown.append(matrix(f"{name}: {method}", tasks, seeds))
        tables.append(table(name, ["average accuracy", "forgetting", *(f"{t} at the end" for t in tasks)], rows))
        if len(tasks) > 2:
            along = {
                method: list(zip(*map(accuracy_along_sequence, seeds), strict=True))
                for method, seeds in matrices[name].items()
                if len(seeds[0]) > 1
            }
            first = {
                method: [[own[i][0] for own in seeds] for i in range(len(tasks))]
                for method, seeds in matrices[name].items()
                if len(seeds[0]) > 1
            }
            count = range(1, len(tasks) + 1)
            lines.append(curves(f"{name}: tasks seen so far", "tasks learned", "average accuracy, %", count, along))
            lines.append(curves(f"{name}: the first task", "tasks learned", "accuracy, %", count, first))
    return {"tables": tables, "matrices": shown, "curves": lines}


def overall(matrices: Matrices) -> Json:
    """Return a table of the means over all problems, for problems of one kind."""
    rows: dict[str, list[list[float] | None]] = {}
    for method, own in next(iter(matrices.values())).items():
        accuracy = [[average_accuracy(seed) for seed in of[method]] for of in matrices.values()]
        lost = [[dropped(seed) for seed in of[method]] for of in matrices.values()]
        rows[method] = [over_problems(accuracy), over_problems(lost) if len(own[0]) > 1 else None]
    return table("mean over all", ["average accuracy", "forgetting"], rows)


def forgetting_claims(matrices: Matrices) -> list[Json]:
    """Return what the paper claims of forgetting, tested over the seeds; the mean over problems counts for a seed."""
    methods = [m for m in next(iter(matrices.values())) if m not in ("joint", UNIT)]
    lost = {m: over_problems([[dropped(own) for own in of[m]] for of in matrices.values()]) for m in methods}
    claims = [
        claim(
            f"MAS forgets less than {other}, or as much",
            [theirs - ours for theirs, ours in zip(lost[other], lost["MAS"], strict=True)],
            ties=True,
        )
        for other in methods
        if other != "MAS"
    ]
    for text, more, less in (
        ("l-MAS forgets less than fine-tuning", "fine-tuning", "l-MAS"),
        ("l-MAS forgets more than MAS, or as much", "l-MAS", "MAS"),
    ):
        if {more, less} <= set(methods):
            differences = [a - b for a, b in zip(lost[more], lost[less], strict=True)]
            claims.append(claim(text, differences, ties=more == "l-MAS"))
    return claims


def _score(problems: Any, method: type[FineTuning], seed: int, strength: float) -> float | None:
    """Return the average accuracy after the last task, averaged over problems; None if training diverged."""
    try:
        return statistics.fmean(average_accuracy(run_sequence(method(p, seed, strength))) for p in problems)
    except DivergenceError:
        return None
