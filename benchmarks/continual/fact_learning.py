"""Facts as vectors, one output for all tasks: experiments c (facts), d, e and f."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.continual.compare import choose, contenders, forgetting_claims, run, summarise
from benchmarks.continual.data import SPLIT_SEED, Task, digits
from benchmarks.continual.facts import FACTS, RELATIONS, fact_task, vectors
from benchmarks.continual.methods import METHODS, ExactMAS, FineTuning, Joint
from benchmarks.continual.problem import Retrieval, Training
from benchmarks.continual.seeds import Workplace
from benchmarks.continual.summary import Json, claim, curves, table

TRAINING = Training(lr=0.05, epochs=5, batch_size=32)
# With 8 images of a fact instead of 20, as many steps.
SMALL_TRAINING = Training(lr=0.05, epochs=12, batch_size=32)
QUARTERS = (3, 3, 2, 2)  # left digits of the four tasks
KEPT_RELATION = 1  # of the subset that shall survive


def _left_digits() -> list[int]:
    return torch.randperm(10, generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()


def _of_left(lefts: Sequence[int]) -> list[int]:
    return [index for index, fact in enumerate(FACTS) if fact.left in lefts]


def _of_relation(relation: str) -> list[int]:
    return [index for index, fact in enumerate(FACTS) if list(RELATIONS)[fact.relation] == relation]


def _name(lefts: Sequence[int]) -> str:
    return "facts of " + ", ".join(map(str, sorted(lefts)))


def _tasks(parts: dict[str, list[int]], place: Workplace, *, validation: bool) -> list[Task]:
    images, per_fact = digits(), 8 if place.small else 20
    return [fact_task(name, images, part, per_fact=per_fact, validation=validation) for name, part in parts.items()]


def _training(place: Workplace) -> Training:
    return SMALL_TRAINING if place.small else TRAINING


def halves(place: Workplace, *, validation: bool) -> dict[str, Retrieval]:
    """Return two tasks each: halves of the left digits, and halves of the facts themselves."""
    order = _left_digits()
    facts = torch.randperm(len(FACTS), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    middle = len(FACTS) // 2
    parts = {
        "halves by left digit": {_name(order[:5]): _of_left(order[:5]), _name(order[5:]): _of_left(order[5:])},
        "halves of all facts": {"one half": sorted(facts[:middle]), "the other": sorted(facts[middle:])},
    }
    training = _training(place)
    return {
        name: Retrieval(_tasks(own, place, validation=validation), training, vectors()) for name, own in parts.items()
    }


def quarters(place: Workplace, *, validation: bool) -> Retrieval:
    """Return four tasks of disjoint facts, by their left digit."""
    order, parts = _left_digits(), {}
    for count in QUARTERS:
        own, order = order[:count], order[count:]
        parts[_name(own)] = _of_left(own)
    return Retrieval(_tasks(parts, place, validation=validation), _training(place), vectors())


def facts(place: Workplace) -> Json:
    """Learn two halves of the facts, at random: the paper's table 3 in shape."""
    names = list(METHODS)
    chosen = choose(place, {"halves": halves(place, validation=True)["halves by left digit"]}, names)
    problems = halves(place, validation=False)
    matrices = run(place, problems, contenders(chosen, names), {"chosen": chosen})
    return {
        "title": "Facts <left digit, relation, right digit> as vectors: two halves",
        "chosen": chosen,
        **summarise(problems, matrices),
        "claims": forgetting_claims({name: of for name, of in matrices.items() if name == "halves by left digit"}),
        "notes": [
            "Halves of all facts share every digit and relation, so what is learned on one half serves the other: "
            "there fine-tuning has nothing to forget. Halves by left digit are what is forgotten."
        ],
    }


def fact_sequence(place: Workplace) -> Json:
    """Learn four disjoint tasks in a row: the paper's table 5 in shape."""
    names = list(METHODS)
    chosen = choose(place, {"four": quarters(place, validation=True)}, names)
    problems = {"four disjoint tasks": quarters(place, validation=False)}
    matrices = run(place, problems, contenders(chosen, names), {"chosen": chosen})
    return {
        "title": "Four disjoint tasks of facts in a row",
        "chosen": chosen,
        **summarise(problems, matrices),
        "claims": forgetting_claims(matrices),
    }


def fact_subsets(place: Workplace) -> Json:
    """Learn Ω on either of two subsets of the first task: what each protects; the paper's table 4 in shape."""
    lefts = _left_digits()
    # What tells the subsets apart: where the digits stand, or which digit is on the left.
    partitions = {
        "by relation": {"above": _of_relation("above"), "below": _of_relation("below")},
        "by left digit": {_name(part): _of_left(part) for part in (lefts[:2], lefts[2:4])},
    }
    strength = choose(place, {"halves": halves(place, validation=True)["halves by left digit"]}, ["MAS"])
    lam = strength["MAS"]["strength"]
    problem = halves(place, validation=False)["halves by left digit"]
    first, second = problem.tasks

    def after_both(learner: FineTuning, subsets: Mapping[str, list[int]]) -> list[float]:
        learner.learn(0)
        learner.learn(1)
        rows = [torch.isin(first.test_targets, torch.tensor(own)) for own in subsets.values()]
        return [*(_accuracy_on(learner, 0, first, own) for own in rows), *learner.accuracies([1])]

    def begin(subset: list[int], seed: int) -> FineTuning:
        images = first.train[torch.isin(first.train_targets, torch.tensor(subset))]
        return ExactMAS(problem, seed, lam, lambda index: images)

    def one(seed: int) -> Json:
        return {
            name: {f"Ω of {subset}": after_both(begin(own, seed), subsets) for subset, own in subsets.items()}
            | {
                "Ω of the whole task": after_both(ExactMAS(problem, seed, lam), subsets),
                "fine-tuning": after_both(FineTuning(problem, seed), subsets),
            }
            for name, subsets in partitions.items()
        }

    results = place.run("", place.seeds, one, {"chosen": strength, "partitions": partitions})
    tables, claims = [], []
    for name, subsets in partitions.items():
        methods = results[0][name]
        values = {
            method: [list(own) for own in zip(*(r[name][method] for r in results), strict=True)] for method in methods
        }
        columns = [*(f"{subset} at the end" for subset in subsets), f"{second.name} at the end"]
        tables.append(table(f"subsets {name}", columns, values))
        a, b = subsets
        for column, (own, other) in enumerate(((a, b), (b, a))):
            kept = values[f"Ω of {own}"][column]
            for against in (f"Ω of {other}", "fine-tuning"):
                differences = [x - y for x, y in zip(kept, values[against][column], strict=True)]
                claims.append(claim(f"{name}: Ω of “{own}” keeps it better than {against}", differences))
    return {
        "title": "Ω of a part of the first task: what it keeps",
        "chosen": strength,
        "tables": tables,
        "claims": claims,
    }


def fact_adaptation(place: Workplace) -> Json:
    """Keep the facts of one relation over four tasks by Ω of their unlabelled images: the paper's figure 4 in shape."""
    strength = choose(place, {"four": quarters(place, validation=True)}, ["MAS"])
    problem = quarters(place, validation=False)
    lam = strength["MAS"]["strength"]
    relations = torch.tensor([fact.relation for fact in FACTS])

    def chosen_rows(targets: Tensor) -> Tensor:
        return relations[targets] == KEPT_RELATION

    # Unlabelled, and not of the images that accuracy is measured on: of the training images of the subset.
    def subset(index: int) -> Tensor:
        task = problem.tasks[index]
        return task.train[chosen_rows(task.train_targets)]

    methods: dict[str, Callable[[int], FineTuning]] = {
        "fine-tuning": lambda seed: FineTuning(problem, seed),
        "MAS": lambda seed: ExactMAS(problem, seed, lam),
        "MAS, Ω of the subset": lambda seed: ExactMAS(problem, seed, lam, subset),
    }

    def on_subset(learner: FineTuning, index: int) -> float:
        task = problem.tasks[index]
        return _accuracy_on(learner, index, task, chosen_rows(task.test_targets))

    def one(seed: int) -> Json:
        found: Json = {}
        for name, begin in methods.items():
            learner, along = begin(seed), []
            for index in range(len(problem.tasks)):
                learner.learn(index)
                along.append([on_subset(learner, earlier) for earlier in range(index + 1)])
            rest = [_accuracy_on(learner, i, t, ~chosen_rows(t.test_targets)) for i, t in enumerate(problem.tasks)]
            found[name] = {"along": along, "rest": rest}
        joint = Joint(problem, seed)
        joint.learn(len(problem.tasks) - 1)
        found["joint"] = [on_subset(joint, index) for index in range(len(problem.tasks))]
        return found

    results = place.run("", place.seeds, one, {"chosen": strength})
    names = [task.name for task in problem.tasks]
    last: dict[str, Any] = {
        name: [[r[name]["along"][-1][index] for r in results] for index in range(len(names))] for name in methods
    } | {"joint": [[r["joint"][index] for r in results] for index in range(len(names))]}
    mean = {name: [sum(own) / len(own) for own in zip(*values, strict=True)] for name, values in last.items()}
    rest = {name: [[sum(r[name]["rest"]) / len(names) for r in results]] for name in methods}
    along = {
        name: [[sum(r[name]["along"][i]) / (i + 1) for r in results] for i in range(len(names))] for name in methods
    }
    difference = [a - b for a, b in zip(mean["MAS, Ω of the subset"], mean["MAS"], strict=True)]
    label = f"facts of “{list(RELATIONS)[KEPT_RELATION]}”"
    return {
        "title": f"How {label} survive four tasks when their unlabelled images feed Ω",
        "chosen": strength,
        "tables": [
            table(f"Accuracy on {label} after the last task", names, last),
            table("Accuracy on all other facts after the last task", ["mean over tasks"], rest),
        ],
        "curves": [
            curves(f"Accuracy on {label} of the tasks so far", "tasks learned", "accuracy, %", range(1, 5), along)
        ],
        "claims": [claim("Ω of the subset keeps the subset better than Ω of all images", difference)],
    }


def _accuracy_on(learner: FineTuning, index: int, task: Task, rows: Tensor) -> float:
    return learner.accuracy(index, task.test[rows], task.test_targets[rows])
