"""The penalty λ Σ_ij Ω_ij (θ_ij − θ*_ij)² on a model, laid out for the kernels: differentiable, or added to `.grad`.

Of DTensors each rank works on its own part, and only the parts' values are summed over the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist

from mas_fast.encoded import parts_of
from mas_fast.kernels import steps
from mas_fast.kernels.steps import Held, check_held
from mas_fast.sharding import is_sharded, local, splitting_groups
from mas_fast.state import State

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Group(NamedTuple):
    """Parameters on one device, spread over the same ranks: one call of an op."""

    names: list[str]
    thetas: list[nn.Parameter]
    held: Held
    sharded: bool
    groups: tuple[ProcessGroup, ...]  # in which ranks hold different parts


class Plan:
    """All that a step needs of a model and a state, found once and checked cheaply at every step.

    Attributes:
        state: What it was made of.
        groups: The parameters that have an Ω and require grad.
        dtype: Of the value: float64 if anything is, float32 otherwise.
    """

    def __init__(self, model: nn.Module, state: State, parameters: Mapping[str, nn.Parameter]) -> None:
        """Lay out the parameters that have an Ω.

        Args:
            model: What the parameters are in.
            state: Ω and θ*, placed as the parameters are.
            parameters: By name; every Ω has one of its shape.
        """
        self.state = state
        thetas = [parameters[name] for name in state.omega]
        found: dict[tuple[object, ...], Group] = {}
        self._rows: dict[int, tuple[Tensor, Tensor, Tensor, str]] = {}
        wide = False
        for (name, kept), theta in zip(state.omega.items(), thetas, strict=True):
            omega, scale = parts_of(kept)
            anchor = local(state.anchor[name]).contiguous()
            self._rows[id(theta)] = omega, scale, anchor, name
            if not theta.requires_grad:
                continue
            wide |= torch.float64 in (theta.dtype, omega.dtype, anchor.dtype)
            spread = splitting_groups(theta)
            group = found.setdefault(
                (theta.device, is_sharded(theta), spread),
                Group([], [], Held([], [], [], []), is_sharded(theta), spread),
            )
            group.names.append(name)
            group.thetas.append(theta)
            group.held.omegas.append(omega)
            group.held.scales.append(scale)
            group.held.anchors.append(anchor)
            group.held.lams.append(0.0)
        self.groups = list(found.values())
        for group in self.groups:
            check_held([local(theta) for theta in group.thetas], group.held)
        self.dtype = torch.float64 if wide else torch.float32
        self._model = model
        self._thetas = thetas
        self._features = _features(thetas)
        # Where each parameter hangs: whoever exchanges a module or a parameter breaks a link.
        self._links = [
            (holder, key, value)
            for module in model.modules()
            for holder in (module._modules, module._parameters)
            for key, value in holder.items()
            if value is not None
        ]
        self._lams: dict[str, float] = {}

    def holds(self, model: nn.Module, state: State) -> bool:
        """Return whether the model and the state are as they were."""
        return (
            self._model is model
            and self.state is state
            and all(holder.get(key) is value for holder, key, value in self._links)
            and _features(self._thetas) == self._features
        )

    def set_lams(self, lams: Mapping[str, float]) -> None:
        """Put λ of every parameter in its place."""
        if lams is self._lams:
            return
        self._lams = dict(lams)
        for group in self.groups:
            group.held.lams[:] = [lams[name] for name in group.names]

    def held(self, parameters: Sequence[Tensor], lams: Mapping[str, float]) -> Held:
        """Return what holds parameters of the model; entries without elements and λ = 0 where nothing does.

        Nothing holds those that require no grad, as in `value`.
        """
        none = torch.empty(0)
        free = (none, none, none, "")
        rows = [self._rows.get(id(p), free) if p.requires_grad else free for p in parameters]
        return Held(
            [row[0] for row in rows],
            [row[1] for row in rows],
            [row[2] for row in rows],
            [lams[row[3]] if row[3] else 0.0 for row in rows],
        )

    def unknown(self, parameters: Sequence[Tensor]) -> list[int]:
        """Return the indices of those that have no Ω."""
        return [index for index, parameter in enumerate(parameters) if id(parameter) not in self._rows]

    def values(self) -> dict[str, float]:
        """Return the penalty of each parameter; of DTensors all ranks must call this."""
        found: dict[str, float] = {}
        for group in self.groups:
            own = steps.penalty([local(theta.detach()) for theta in group.thetas], group.held)
            found |= zip(group.names, _SumOverRanks.apply(own, group.groups).tolist(), strict=True)
        return {name: found[name] for name in self.state.omega if name in found}

    def value(self) -> Tensor:
        """Return λ Σ Ω(θ − θ*)² as a 0-dim tensor, differentiable in θ."""
        return self._total([steps.penalty(_parts(group.thetas, group), group.held).sum() for group in self.groups])

    @torch.no_grad()
    def add_grad(self) -> Tensor:
        """Add 2λΩ(θ − θ*) to the `.grad` of every θ, creating it where it is missing, and return what `value` does.

        Raises:
            FloatingPointError: A float16 gradient overflowed; all such are listed. They hold inf.
        """
        totals = []
        for group in self.groups:
            for theta in group.thetas:
                if theta.grad is None:
                    theta.grad = torch.zeros_like(theta)
            grads: list[Tensor] = [theta.grad for theta in group.thetas]  # type: ignore[misc]
            sums = steps.add_penalty_grad_(_parts(grads, group), _parts(group.thetas, group), group.held)
            if any(grad.dtype == torch.float16 for grad in grads):
                _check_overflow(group.names, grads, sums[:, 1])
            totals.append(sums[:, 0].sum())
        return self._total(totals)

    def _total(self, values: list[Tensor]) -> Tensor:
        """Return the sum of the groups' values; those of DTensors are this rank's, and summed over the ranks first."""
        sums = [_SumOverRanks.apply(v, g.groups) if g.groups else v for v, g in zip(values, self.groups, strict=True)]
        total = sums[0] if len(sums) == 1 else torch.stack([value.to(sums[0].device) for value in sums]).sum()
        return total.to(self.dtype)


def _features(thetas: Iterable[Tensor]) -> list[tuple[object, ...]]:
    return [(theta.shape, theta.dtype, theta.device, theta.requires_grad) for theta in thetas]


def _parts(tensors: Sequence[Tensor], group: Group) -> list[Tensor]:
    return [local(tensor) for tensor in tensors] if group.sharded else list(tensors)


def _check_overflow(names: Sequence[str], grads: Sequence[Tensor], lost: Tensor) -> None:
    counts = zip(names, grads, lost.tolist(), strict=True)
    over = [f"{name!r} ({int(count)})" for name, grad, count in counts if count and grad.dtype == torch.float16]
    if over:
        raise FloatingPointError(
            f"the penalty's gradient 2λΩ(θ − θ*) must fit float16, got inf in the .grad of {', '.join(over)}: lower "
            "lam, train in bfloat16 or float32, or use mas_fast.optim, which adds it in float32"
        )


class _SumOverRanks(torch.autograd.Function):
    """Sum of values over ranks, each of which differentiates its own part alone."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, groups: tuple[ProcessGroup, ...]) -> Tensor:
        total = value.clone()
        for group in groups:
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
