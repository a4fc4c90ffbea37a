"""What is learned: tasks in their order, the loss, the measure of success, and what Fisher information needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.continual.data import Task
from benchmarks.continual.network import Network, make_network

# A per-sample function of the output, [N, outputs] -> [N], whose gradient counts in the Fisher information.
Score = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Training:
    """How every method trains.

    Attributes:
        lr: Learning rate of SGD, whose momentum is 0.9.
        epochs: Passes over the images of each task.
        batch_size: Images of a task in a step.
    """

    lr: float
    epochs: int
    batch_size: int
    momentum: float = 0.9


class Recognition:
    """Classes to tell apart, with a head of its own for each task."""

    fisher_stride = 1

    def __init__(self, tasks: Sequence[Task], training: Training) -> None:
        """Take the tasks in the order in which they are learned."""
        self.tasks = list(tasks)
        self.training = training

    def network(self, seed: int) -> Network:
        """Return a new network."""
        return make_network(self.tasks[0].train.shape[1:], [task.outputs for task in self.tasks], seed)

    def head(self, index: int) -> int:
        """Return the head of a task."""
        return index

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of logits [N, C] and labels [N]."""
        return F.cross_entropy(outputs, targets)

    def batch_size(self, count: int) -> int:
        """Return how many images of each of so many tasks a step takes: each task has a head of its own to train."""
        return self.training.batch_size

    def share(self, count: int) -> float:
        """Return by how much the loss of each of so many tasks counts in a step."""
        return 1.0

    def distillation(self, outputs: Tensor, recorded: Tensor) -> Tensor:
        """Return what LwF adds: T²·KL of recorded and present logits at temperature T = 2.

        Source: Li & Hoiem, Learning without Forgetting, ECCV 2016; Hinton et al., 2015, for T².
        """
        log_old, log_new = (F.log_softmax(logits / 2, 1) for logits in (recorded, outputs))
        return 4 * F.kl_div(log_new, log_old, log_target=True, reduction="batchmean")

    def fisher_scores(self, index: int) -> list[Score]:
        """Return √p_c·∇log p_c of each class: the sum of their squares is the exact diagonal Fisher information."""

        def of_class(label: int) -> Score:
            def score(logits: Tensor) -> Tensor:
                log_p = F.log_softmax(logits, 1)[:, label]
                return log_p * (log_p / 2).exp().detach()

            return score

        return [of_class(label) for label in range(self.tasks[index].outputs)]

    def accuracy(self, outputs: Tensor, targets: Tensor) -> float:
        """Return which fraction of the labels is right."""
        return (outputs.argmax(1) == targets).double().mean().item()


class Retrieval:
    """Images to map onto vectors, one output for all tasks; right is what is nearest to its own of all vectors."""

    # Fisher information takes a pass for each entry of the vectors: over every fifth image.
    fisher_stride = 5

    def __init__(self, tasks: Sequence[Task], training: Training, vectors: Tensor) -> None:
        """Take the tasks, and all vectors that may be retrieved, [M, D]; targets of tasks are rows of these."""
        self.tasks = list(tasks)
        self.training = training
        self.vectors = vectors

    def network(self, seed: int) -> Network:
        """Return a new network."""
        return make_network(self.tasks[0].train.shape[1:], [self.vectors.shape[1]], seed)

    def head(self, index: int) -> int:
        """Return the only head."""
        return 0

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean of ½‖F − v‖²: -log of a normal density of variance 1, but for a constant."""
        return (outputs - self.vectors[targets]).square().sum(1).mean() / 2

    def batch_size(self, count: int) -> int:
        """Return how many images of each of so many tasks a step takes: together a batch."""
        return max(1, self.training.batch_size // count)

    def share(self, count: int) -> float:
        """Return by how much the loss of each of so many tasks counts in a step."""
        return 1 / count

    def distillation(self, outputs: Tensor, recorded: Tensor) -> Tensor:
        """Return the mean of ½‖F − F_old‖²."""
        return (outputs - recorded).square().sum(1).mean() / 2

    def fisher_scores(self, index: int) -> list[Score]:
        """Return each entry of the output: for a normal density the sum of their squares is the exact Fisher."""

        def of_entry(entry: int) -> Score:
            return lambda outputs: outputs[:, entry]

        return [of_entry(entry) for entry in range(self.vectors.shape[1])]

    def accuracy(self, outputs: Tensor, targets: Tensor) -> float:
        """Return for which fraction the nearest vector is the right one."""
        return (torch.cdist(outputs, self.vectors).argmin(1) == targets).double().mean().item()


Problem = Recognition | Retrieval
