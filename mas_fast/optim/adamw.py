"""AdamW with the penalty inside the step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mas_fast.kernels.steps import Held, adamw_step_
from mas_fast.mas import MAS
from mas_fast.optim.penalty_step import Batch, PenaltyStep, keep_state, new_counts, new_state, number
from mas_fast.sharding import locals_of


class AdamW(PenaltyStep, torch.optim.AdamW):
    """torch.optim.AdamW on loss + λ Σ Ω (θ − θ*)², with the penalty inside the step.

    All else as in `SGD`; states can be exchanged with torch.optim.AdamW. As with the penalty in the loss, the moments
    are those of both gradients together: only the size of λ relative to the loss counts. With `implicit` they are
    those of the loss alone, and λ counts by itself.

    Attributes:
        mas: Ω, θ* and λ.
        implicit: Whether the penalty is applied as a proximal step.
        penalty: As in `SGD`.
    """

    _counts_steps = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        mas: MAS,
        implicit: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        """Take the options of torch.optim.AdamW, in its order.

        Args:
            params: Parameters, groups of them, or pairs with their names.
            lr: η. A tensor is read in every step, which waits for its device.
            betas: Of the first and the second moments.
            eps: Added to the root of the second moment.
            weight_decay: Decoupled: θ ← (1 − η·weight_decay) θ first.
            amsgrad: Divide by the largest second moment so far.
            mas: The penalty.
            implicit: As in `SGD`, with this η: the penalty does not enter the moments then.
            maximize: Follow the gradients of the loss upwards; the penalty is minimised all the same.
            foreach: None or False; as all options below, only there to be refused.
            capturable: False.
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
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )

    def _needs(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        return {
            "lr": number(group["lr"]),
            "beta1": number(group["betas"][0]),
            "beta2": number(group["betas"][1]),
            "eps": number(group["eps"]),
            "weight_decay": number(group["weight_decay"]),
            "amsgrad": group["amsgrad"],
            "maximize": group["maximize"],
        }

    def _advance(self, batch: Batch, grads: Sequence[Tensor], held: Held, options: dict[str, Any]) -> Tensor:
        group, kept, counts = batch.group, batch.kept, batch.counts
        if counts is None:
            kept = new_state(batch, self._needs(group), torch.zeros_like)
            counts = new_counts(len(batch.parameters))
            keep_state(batch, self, {**kept, "step": list(counts.unbind())})
        values = adamw_step_(
            locals_of(batch.parameters),
            grads,
            locals_of(kept["exp_avg"]),
            locals_of(kept["exp_avg_sq"]),
            locals_of(kept["max_exp_avg_sq"]) if group["amsgrad"] else [],
            held,
            steps=counts.add(1).tolist(),
            **options,
            implicit=self.implicit,
        )
        counts.add_(1)
        return values
