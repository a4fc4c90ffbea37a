"""The three ways to learn the tasks: fine-tuning and MAS one task after the other, joint training all at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import mas_fast
from mas_fast.demo.data import Task
from mas_fast.demo.network import DigitNet, make_network
from mas_fast.demo.settings import Settings

# One batch holds all images of a task.
IMPORTANCE_BATCH_SIZE = 256

Advance = Callable[[int], object]
"""Is called with the number of tasks just trained on, for a progress bar."""


class DivergenceError(RuntimeError):
    """The training left the finite numbers."""


@dataclass
class Run:
    """What one method did with one seed.

    Attributes:
        network: The network after the last task.
        accuracy: Row i holds the test accuracies on tasks 0 to i after task i, as fractions.
        importance: Ω of each task alone, by parameter name; empty without MAS.
        omega: Their sum after the last task; empty without MAS.
    """

    network: DigitNet
    accuracy: list[list[float]] = field(default_factory=list)
    importance: list[Mapping[str, Tensor]] = field(default_factory=list)
    omega: Mapping[str, Tensor] = field(default_factory=dict)


def run_fine_tuning(tasks: Sequence[Task], settings: Settings, seed: int, advance: Advance) -> Run:
    """Train on one task after the other with nothing to hold the earlier ones."""
    run, generator = _start(tasks, seed)
    for index in range(len(tasks)):
        _train(run.network, tasks, [index], settings, generator)
        run.accuracy.append(_accuracies(run.network, tasks[: index + 1]))
        advance(1)
    return run


def run_mas(
    tasks: Sequence[Task],
    settings: Settings,
    seed: int,
    advance: Advance,
    *,
    batch_size: int = IMPORTANCE_BATCH_SIZE,
    per: str = "sample",
    implicit: bool = False,
    **state: Any,
) -> Run:
    """Train as fine-tuning does, from the same weights and on the same batches, with the penalty in each step.

    Args:
        tasks: In the order in which they are learned.
        settings: Of the training.
        seed: Of weights and batches.
        advance: Is told of every task that has been trained.
        batch_size: Of the estimate of Ω.
        per: As in `estimate_importance`.
        implicit: Apply the penalty as a proximal step, which is stable for any λ.
        **state: How Ω and θ* are kept: `omega_dtype` and `anchor_dtype` of `MAS`.
    """
    run, generator = _start(tasks, seed)
    mas = mas_fast.MAS(run.network, lam=settings.lam, merge="sum", **state)
    for index, task in enumerate(tasks):
        _train(run.network, tasks, [index], settings, generator, mas if index else None, implicit)
        unlabelled = task.train_images.split(batch_size)
        run.importance.append(mas.consolidate(unlabelled, per=per, **estimate_options(index)))
        run.accuracy.append(_accuracies(run.network, tasks[: index + 1]))
        advance(1)
    run.omega = dict(mas.omega)
    return run


def run_joint(tasks: Sequence[Task], settings: Settings, seed: int, advance: Advance) -> Run:
    """Train a fresh network on all tasks so far, again at every point of the sequence: the ceiling."""
    run, generator = _start(tasks, seed)
    for index in range(len(tasks)):
        run.network = make_network(len(tasks), seed)
        _train(run.network, tasks, range(index + 1), settings, generator)
        run.accuracy.append(_accuracies(run.network, tasks[: index + 1]))
        advance(index + 1)
    return run


METHODS: dict[str, Callable[[Sequence[Task], Settings, int, Advance], Run]] = {
    "fine-tuning": run_fine_tuning,
    "MAS": run_mas,
    "joint": run_joint,
}


@contextmanager
def single_thread() -> Iterator[None]:
    """Run torch on one thread for a while: for so small a network a second one costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def trainings_per_seed(num_tasks: int) -> int:
    """Return how far one seed of all methods advances the progress bar."""
    return num_tasks + num_tasks + sum(range(1, num_tasks + 1))


def estimate_options(task: int) -> dict[str, Any]:
    """Return what `estimate_importance` must be told: the head to run, and to leave the other tasks' heads out.

    So a head's Ω belongs to its own task, and a head that has not been trained yet has none.
    """
    return {"forward": partial(_forward_task, task=task), "parameters": partial(_is_used_by, task=task)}


def _forward_task(network: DigitNet, images: Tensor, task: int) -> Tensor:
    return network(images, task)


def _is_used_by(name: str, parameter: Tensor, task: int) -> bool:
    return not name.startswith("heads.") or name.startswith(f"heads.{task}.")


def _start(tasks: Sequence[Task], seed: int) -> tuple[Run, torch.Generator]:
    return Run(make_network(len(tasks), seed)), torch.Generator().manual_seed(seed)


def _train(
    network: DigitNet,
    tasks: Sequence[Task],
    indices: Sequence[int],
    settings: Settings,
    generator: torch.Generator,
    mas: mas_fast.MAS | None = None,
    implicit: bool = False,
) -> None:
    """Train on the tasks named by ``indices`` together: each step takes a batch of every one and sums their losses."""
    optimizer: torch.optim.Optimizer
    if mas is not None and implicit:
        optimizer = mas_fast.optim.SGD(network.parameters(), lr=settings.lr, mas=mas, implicit=True)
    else:
        optimizer = torch.optim.SGD(network.parameters(), lr=settings.lr)
    shortest = min(len(tasks[index].train_images) for index in indices)
    for _ in range(settings.epochs):
        orders = [torch.randperm(len(tasks[index].train_images), generator=generator) for index in indices]
        for start in range(0, shortest, settings.batch_size):
            batches = [order[start : start + settings.batch_size] for order in orders]
            images = [tasks[index].train_images[batch] for index, batch in zip(indices, batches, strict=True)]
            # One pass through the trunk for all tasks, as a head costs next to nothing.
            features = network.features(torch.cat(images)).split([len(batch) for batch in batches])
            loss = torch.zeros(())
            for index, batch, feature in zip(indices, batches, features, strict=True):
                loss = loss + F.cross_entropy(network.heads[index](feature), tasks[index].train_labels[batch])
            if not math.isfinite(loss.item()):
                raise DivergenceError(f"the loss must stay finite, got {loss.item()} with {settings}")
            optimizer.zero_grad()
            loss.backward()
            if mas is not None and not implicit:
                mas.add_penalty_grad_()
            optimizer.step()


@torch.no_grad()
def _accuracies(network: DigitNet, tasks: Sequence[Task]) -> list[float]:
    return [
        (network(task.test_images, index).argmax(1) == task.test_labels).double().mean().item()
        for index, task in enumerate(tasks)
    ]
