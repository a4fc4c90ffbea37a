"""AdamW with the penalty inside the step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mas_fast.kernels.steps import Held, adamw_step_
from mas_fast.mas import MAS
from mas_fast.optim.penalty_step import Batch, PenaltyStep, local_thetas_and_grads, number, state_like
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

    def _is_fresh(self, group: dict[str, Any], parameter: Tensor) -> bool:
        return not self.state.get(parameter)

    def _advance(self, batch: Batch, held: Held) -> Tensor:
        group, states = batch.group, [self.state[parameter] for parameter in batch.parameters]
        moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")
        if batch.fresh:
            # As torch makes it: on the host, where reading it costs nothing.
            wide = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
            for parameter, state in zip(batch.parameters, states, strict=True):
                state["step"] = torch.zeros((), dtype=wide, device="cpu")
                state |= {name: state_like(torch.zeros_like, parameter) for name in moments}
        counts = [state["step"] for state in states]
        means, squares, *largest = (locals_of([state[name] for state in states]) for name in moments)
        values = adamw_step_(
            *local_thetas_and_grads(batch),
            means,
            squares,
            largest[0] if largest else [],
            held,
            steps=[count.item() + 1 for count in counts],
            lr=number(group["lr"]),
            beta1=number(group["betas"][0]),
            beta2=number(group["betas"][1]),
            eps=number(group["eps"]),
            weight_decay=number(group["weight_decay"]),
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            implicit=self.implicit,
        )
        # A number would be made into a tensor for every count.
        torch._foreach_add_(counts, torch.ones((), device="cpu"), alpha=1.0)
        return values
