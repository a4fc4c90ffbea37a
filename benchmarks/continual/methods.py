"""The methods: each learns the tasks with the same network, batches and optimizer, and differs in a few lines.

All penalties are quadratic, λ Σ Ω (θ − θ*)², and are applied by the same proximal step of `mas_fast.optim.SGD`, which
is stable for any λ: so the methods differ in their Ω alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import mas_fast
from benchmarks.continual.network import Network
from benchmarks.continual.problem import Problem
from mas_fast import MAS, Importance

# Images in a batch of an estimate; the exact Ω does not depend on it.
OMEGA_BATCH = 256
SI_DAMPING = 0.1

OmegaImages = Callable[[int], Tensor]
"""Task -> the unlabelled images [N, C, H, W] that its Ω is estimated on."""


class DivergenceError(RuntimeError):
    """The training left the finite numbers."""


class FineTuning:
    """Nothing holds the earlier tasks; what all methods share."""

    strengths: tuple[float, ...] = ()

    def __init__(
        self, problem: Problem, seed: int, strength: float = 0.0, omega_images: OmegaImages | None = None
    ) -> None:
        """Begin with a new network.

        Args:
            problem: The tasks.
            seed: Of weights and batches: the same for all methods.
            strength: λ, or what the method has in its place.
            omega_images: The training images if left out.
        """
        self.problem = problem
        self.strength = strength
        self.network = problem.network(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.omega_images = omega_images or (lambda index: problem.tasks[index].train)

    @property
    def deployed(self) -> Network:
        """The network that is used after the last task learned."""
        return self.network

    def learn(self, index: int) -> None:
        """Learn a task.

        Raises:
            DivergenceError: The loss is no finite number any more.
        """
        self.before(index)
        self._train([index])
        self.after(index)

    def accuracies(self, indices: Iterable[int]) -> list[float]:
        """Return the accuracy on the test images of each task."""
        tasks = self.problem.tasks
        return [self.accuracy(index, tasks[index].test, tasks[index].test_targets) for index in indices]

    @torch.no_grad()
    def accuracy(self, index: int, images: Tensor, targets: Tensor) -> float:
        """Return the accuracy on images, told to be of a task."""
        return self.problem.accuracy(self.deployed(images, self.problem.head(index)), targets)

    def before(self, index: int) -> None:
        """Prepare for a task."""

    def optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer of a task."""
        training = self.problem.training
        return torch.optim.SGD(self.network.parameters(), lr=training.lr, momentum=training.momentum)

    def extra_loss(self, features: Tensor, rows: Tensor) -> Tensor | float:
        """Return what is added to the loss of a batch: features [N, 64] of these rows of the training images."""
        return 0.0

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take a step; gradients are those of the loss."""
        optimizer.step()

    def after(self, index: int) -> None:
        """Conclude a task."""

    def _train(self, indices: Sequence[int]) -> None:
        """Train on tasks together: each step takes a batch of every one, and a share of its loss."""
        problem, training = self.problem, self.problem.training
        tasks = [problem.tasks[index] for index in indices]
        optimizer, batch_size = self.optimizer(), problem.batch_size(len(tasks))
        for _ in range(training.epochs):
            orders = [torch.randperm(len(task.train), generator=self.generator) for task in tasks]
            for start in range(0, min(map(len, orders)), batch_size):
                rows = [order[start : start + batch_size] for order in orders]
                images = torch.cat([task.train[own] for task, own in zip(tasks, rows, strict=True)])
                features = self.network.features(images)
                loss = self.extra_loss(features, rows[0]) + problem.share(len(tasks)) * sum(
                    problem.loss(self.network.heads[problem.head(index)](own), task.train_targets[row])
                    for index, task, row, own in zip(
                        indices, tasks, rows, features.split([len(row) for row in rows]), strict=True
                    )
                )
                assert isinstance(loss, Tensor)
                if not math.isfinite(loss.item()):
                    raise DivergenceError(f"the loss must stay finite, got {loss.item()} with λ = {self.strength}")
                optimizer.zero_grad()
                loss.backward()
                self.step(optimizer)


class Joint(FineTuning):
    """All tasks so far at once, from the beginning: the ceiling."""

    def learn(self, index: int) -> None:
        """Train again from the first weights; only after the last task, as that is what is compared."""
        if index == len(self.problem.tasks) - 1:
            self._train(range(index + 1))


class LwF(FineTuning):
    """Learning without Forgetting: on the new images, the old outputs shall stay what they were.

    Source: Li & Hoiem, ECCV 2016. With its weight as `strength`, and the same learning rate for all layers.
    """

    strengths = tuple(10.0**exponent for exponent in range(-2, 3))

    def before(self, index: int) -> None:
        """Record what the old heads say of the new images."""
        heads = sorted({self.problem.head(earlier) for earlier in range(index)})
        with torch.no_grad():
            features = self.network.features(self.problem.tasks[index].train)
            self._recorded = {head: self.network.heads[head](features) for head in heads}

    def extra_loss(self, features: Tensor, rows: Tensor) -> Tensor | float:
        """Return the distillation of all old heads."""
        return self.strength * sum(
            self.problem.distillation(self.network.heads[head](features), recorded[rows])
            for head, recorded in self._recorded.items()
        )


class Quadratic(FineTuning):
    """A penalty λ Σ Ω (θ − θ*)², Ω summed over the tasks, θ* the last; subclasses say what Ω is."""

    strengths = tuple(10.0**exponent for exponent in range(-3, 4))
    merge = "sum"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Begin without an Ω."""
        super().__init__(*arguments, **options)
        self.mas = MAS(self.network, lam=self.strength, merge=self.merge)

    def optimizer(self) -> torch.optim.Optimizer:
        """Return an optimizer with the penalty in its step, from the second task on."""
        if not self.mas.omega:
            return super().optimizer()
        training = self.problem.training
        return mas_fast.optim.SGD(
            self.network.parameters(), training.lr, training.momentum, mas=self.mas, implicit=True
        )

    def after(self, index: int) -> None:
        """Consolidate."""
        self.mas.consolidate(self.importance(index))

    def importance(self, index: int) -> Importance:
        """Return Ω of a task just learned."""
        raise NotImplementedError

    def used(self, index: int) -> list[str]:
        """Return the names of the parameters that a task uses: those of the trunk and of its own head."""
        own = f"heads.{self.problem.head(index)}."
        return [n for n, _ in self.network.named_parameters() if not n.startswith("heads.") or n.startswith(own)]

    def estimate(self, index: int, stride: int = 1, **options: Any) -> Importance:
        """Return what `estimate_importance` gives for a task, of every image or every stride-th."""
        head = self.problem.head(index)
        return mas_fast.estimate_importance(
            self.network,
            self.omega_images(index)[::stride].split(OMEGA_BATCH),
            forward=lambda network, images: network(images, head),
            parameters=self.used(index),
            unsupported="raise",
            **options,
        )

    def fisher(self, index: int) -> Importance:
        """Return the exact diagonal Fisher information, E_x E_y (∂log p(y|x)/∂θ)²."""
        scores, stride = self.problem.fisher_scores(index), self.problem.fisher_stride
        total = self.estimate(index, stride, objective=scores[0], statistic="square")
        for score in scores[1:]:
            total = total.merge(self.estimate(index, stride, objective=score, statistic="square"))
        return total


class ExactMAS(Quadratic):
    """Memory Aware Synapses: Ω = mean of |∂‖F‖²/∂θ| over samples."""

    strengths = tuple(10.0**exponent for exponent in range(-2, 6))

    def importance(self, index: int) -> Importance:
        """Return the exact Ω."""
        return self.estimate(index)


class LocalMAS(Quadratic):
    """l-MAS: Ω of each layer from its own output."""

    strengths = ExactMAS.strengths

    def importance(self, index: int) -> Importance:
        """Return the local Ω."""
        return self.estimate(index, scope="local")


class RecomputedMAS(ExactMAS):
    """The sequence variant: after each task Ω of all so far is computed anew, on their data, through their heads."""

    def after(self, index: int) -> None:
        """Begin with a new Ω."""
        self.mas = MAS(self.network, lam=self.strength)
        for earlier in range(index + 1):
            self.mas.consolidate(self.importance(earlier))


class EWC(Quadratic):
    """Elastic Weight Consolidation with the exact diagonal of the Fisher information, over samples and outcomes.

    Source: Kirkpatrick et al., PNAS 2017; Huszár, PNAS 2018, for one θ* and a sum over the tasks.
    """

    strengths = tuple(10.0**exponent for exponent in range(7))

    def importance(self, index: int) -> Importance:
        """Return the Fisher information."""
        return self.fisher(index)


class SI(Quadratic):
    """Synaptic Intelligence: how much each parameter's way took from the loss, over the square of its length.

    Source: Zenke et al., ICML 2017, with ξ = 0.1; parts that are negative count as 0.
    """

    strengths = tuple(10.0**exponent for exponent in range(-2, 5))

    def before(self, index: int) -> None:
        """Begin a path."""
        self._start = [parameter.detach().clone() for parameter in self.network.parameters()]
        self._gains = [torch.zeros_like(parameter) for parameter in self._start]

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take a step and note −∂L/∂θ·Δθ, of the loss alone."""
        parameters = list(self.network.parameters())
        before = [parameter.detach().clone() for parameter in parameters]
        super().step(optimizer)
        for parameter, old, gain in zip(parameters, before, self._gains, strict=True):
            if parameter.grad is not None:
                gain.sub_(parameter.grad * (parameter.detach() - old))

    def importance(self, index: int) -> Importance:
        """Return the gains over the squares of the ways."""
        used, named = set(self.used(index)), self.network.named_parameters()
        omega = {
            name: (gain / ((parameter.detach() - start).square() + SI_DAMPING)).clamp_min(0)
            for (name, parameter), start, gain in zip(named, self._start, self._gains, strict=True)
            if name in used
        }
        return Importance(omega, len(self.problem.tasks[index].train), objective="path integral")


class IMM(Quadratic):
    """Incremental Moment Matching, by the mode, with L2-transfer: the networks after each task are averaged.

    Source: Lee et al., NeurIPS 2017; equal weights of the tasks, `strength` is that of the L2-transfer.
    """

    merge = "max"  # of ones

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Begin without tasks."""
        super().__init__(*arguments, **options)
        self._weighted: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    @property
    def deployed(self) -> Network:
        """Σ F_k θ_k / Σ F_k over the tasks, F_k the exact diagonal Fisher information."""
        merged = copy.deepcopy(self.network)
        with torch.no_grad():
            for name, parameter in merged.named_parameters():
                if name in self._weights:
                    weight = self._weights[name]
                    parameter.copy_(torch.where(weight > 0, self._weighted[name] / weight, parameter))
        return merged

    def after(self, index: int) -> None:
        """Add the task's mode, and hold on to its parameters all alike."""
        parameters = dict(self.network.named_parameters())
        for name, fisher in self.fisher(index).items():
            self._weights[name] = self._weights.get(name, 0) + fisher
            self._weighted[name] = self._weighted.get(name, 0) + fisher * parameters[name].detach()
        super().after(index)

    def importance(self, index: int) -> Importance:
        """Return ones."""
        parameters: dict[str, nn.Parameter] = dict(self.network.named_parameters())
        return Importance({name: torch.ones_like(parameters[name]) for name in self.used(index)}, 1, objective="ones")


# Methods that every comparison has, and one for sequences.
RECOMPUTED = "MAS, Ω of all tasks anew"
METHODS: dict[str, type[FineTuning]] = {
    "fine-tuning": FineTuning,
    "LwF": LwF,
    "EWC": EWC,
    "SI": SI,
    "IMM": IMM,
    "MAS": ExactMAS,
    "l-MAS": LocalMAS,
    "joint": Joint,
}


EVERY = {**METHODS, RECOMPUTED: RecomputedMAS}


def run_sequence(learner: FineTuning) -> list[list[float]]:
    """Learn all tasks; return after each one the accuracies on those so far, of joint training the last row alone."""
    matrix = []
    for index in range(len(learner.problem.tasks)):
        learner.learn(index)
        if not isinstance(learner, Joint) or index == len(learner.problem.tasks) - 1:
            matrix.append(learner.accuracies(range(index + 1)))
    return matrix
