"""SGD with the penalty inside the step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mas_fast.kernels.steps import Held, sgd_step_
from mas_fast.mas import MAS
from mas_fast.optim.penalty_step import Batch, PenaltyStep, keep_state, new_state, number
from mas_fast.sharding import locals_of


class SGD(PenaltyStep, torch.optim.SGD):
    """torch.optim.SGD on loss + λ Σ Ω (θ − θ*)², with the penalty inside the step.

    Param groups, schedulers, hooks and gradient scaling work as in torch, and states can be exchanged with
    torch.optim.SGD. What `mas` holds now is what counts: it may be consolidated between steps. Parameters without an Ω
    are free; those without a `.grad` are left alone, penalty and all, as in torch.

    Attributes:
        mas: Ω, θ* and λ.
        implicit: Whether the penalty is applied as a proximal step.
        penalty: λ Σ Ω (θ − θ*)² before the last step, over the parameters that it changed: a 0-dim float64 tensor on
            their device, without waiting for it; None before the first step. Under fully_shard it is the sum over the
            ranks.
    """

    _counts_steps = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
        *,
        mas: MAS,
        implicit: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        """Take the options of torch.optim.SGD, in its order.

        Args:
            params: Parameters, groups of them, or pairs with their names.
            lr: η. A tensor is read in every step, which waits for its device.
            momentum: Of the buffers.
            dampening: Of the momentum.
            weight_decay: Its gradient joins that of the loss.
            nesterov: Nesterov momentum.
            mas: The penalty.
            implicit: Take the step of the loss alone, and then the proximal one of the penalty,
                θ ← (θ + 2ηλΩθ*) / (1 + 2ηλΩ): it is stable for any λΩ, where the gradient of the penalty overshoots
                from ηλΩ > 1/2 and diverges from 1 on.
            maximize: Follow the gradients of the loss upwards; the penalty is minimised all the same.
            foreach: None or False; as all options below, only there to be refused.
            differentiable: False.
            fused: None or False.

        Raises:
            TypeError: `mas` is no MAS.
            ValueError: An option is out of its range, or a parameter is complex or not dense.
        """
        self._attach(mas, implicit)
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )

    def _needs(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        return {
            "lr": number(group["lr"]),
            "momentum": number(group["momentum"]),
            "dampening": number(group["dampening"]),
            "weight_decay": number(group["weight_decay"]),
            "nesterov": group["nesterov"],
            "maximize": group["maximize"],
        }

    def _advance(self, batch: Batch, grads: Sequence[Tensor], held: Held, options: dict[str, Any]) -> Tensor:
        group = batch.group
        kept = new_state(batch, self._needs(group), torch.empty_like) if batch.fresh else batch.kept
        values = sgd_step_(
            locals_of(batch.parameters),
            grads,
            locals_of(kept.get("momentum_buffer", [])),
            held,
            **options,
            first=batch.fresh,
            implicit=self.implicit,
        )
        if batch.fresh:
            # Only now that something stands in them.
            keep_state(batch, self, kept)
        return values
