"""What the optimizers share: which parameters step together, the checks before a step, and the penalty's value."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from mas_fast.checks import DTYPES
from mas_fast.kernels.steps import Held
from mas_fast.mas import MAS
from mas_fast.sharding import is_sharded, locals_of, placed_like, splitting_groups, sum_over_ranks

# Options of torch that choose between its implementations, and what they must be here.
INERT = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}
# Parameters that a message lists.
LISTED = 5


class Batch(NamedTuple):
    """Parameters that step in one call: of one group, on one device, and spread over ranks in one way."""

    group: dict[str, Any]
    parameters: list[Tensor]
    grads: list[Tensor]
    fresh: bool  # their state is still to be made


class PenaltyStep(Optimizer):
    """What both optimizers share: which parameters step together, the value of the penalty, and the checks."""

    mas: MAS
    implicit: bool
    penalty: Tensor | None
    _listed_free: bool

    def _attach(self, mas: MAS, implicit: bool) -> None:
        if not isinstance(mas, MAS):
            raise TypeError(f"mas must be a mas_fast.MAS, got {type(mas).__name__}")
        self.mas = mas
        self.implicit = bool(implicit)
        self.penalty = None
        self._listed_free = False

    # The base class pickles and copies its own attributes alone.
    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("mas", "implicit", "penalty", "_listed_free")}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what `load_state_dict` read, also of torch's fused or capturable optimizers."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.update({name: value for name, value in INERT.items() if name in group})
            for parameter in group["params"]:
                step = self.state.get(parameter, {}).get("step")
                if step is not None and step.device.type != "cpu":
                    # Read in every step, which must not wait for the device.
                    self.state[parameter]["step"] = step.cpu()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as torch's optimizers do.

        Raises:
            ValueError: A parameter is complex, not floating-point or not dense, or an option cannot be honoured;
                nothing is added.
        """
        super().add_param_group(param_group)
        group = self.param_groups.pop()
        for name, value in INERT.items():
            if group.get(name, value):
                raise ValueError(
                    f"{name} must be {value}, got {group[name]}: the step is one pass over all tensors by itself"
                    if name in ("foreach", "fused")
                    else f"{name} must be False, got {group[name]}: use torch.optim with mas.penalty() in the loss"
                )
        if "implicit" in group or "mas" in group:
            raise ValueError(
                "param groups must leave mas and implicit to the optimizer, got "
                f"{sorted({'implicit', 'mas'} & set(group))}: make an optimizer for each"
            )
        unusable = [
            f"{parameter.dtype} {list(parameter.shape)}"
            for parameter in group["params"]
            if parameter.dtype not in DTYPES or parameter.layout != torch.strided
        ]
        if unusable:
            raise ValueError(
                f"parameters must be dense and float32, float64, bfloat16 or float16, got {_shortened(unusable)}: "
                "give them to an optimizer of torch"
            )
        self.param_groups.append(group)

    # torch.compile would trace it, and lose what it writes to this object. The public decorator imports the compiler.
    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step on loss + penalty.

        The penalty is that of the parameters that have a `.grad`: the others are left alone, as in torch.

        Args:
            closure: Computes the gradients of the loss, without the penalty, and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            ValueError: A gradient is sparse, or Ω no longer fits the model; no parameter is changed.
        """
        with torch.no_grad():
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            # All is checked before anything is changed.
            batches = self._batches()
            holds = [self.mas._held(batch.parameters) for batch in batches]
            if not self._listed_free and self.mas.omega:
                self._list_free()
            total = self._zero() if not batches else None
            for batch, held in zip(batches, holds, strict=True):
                value = sum_over_ranks(self._advance(batch, held)[:, 0].sum(), splitting_groups(batch.parameters[0]))
                # Kernels write past autograd, which must still refuse a backward through a graph made before.
                torch.autograd.graph.increment_version(batch.parameters)
                total = value if total is None else total + value.to(total.device, non_blocking=True)
            self.penalty = total
        return loss

    def _batches(self) -> list[Batch]:
        found: list[Batch] = []
        sparse = []
        for group in self.param_groups:
            batches: dict[tuple[object, ...], Batch] = {}
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is None:
                    continue
                if grad.layout is not torch.strided:
                    sparse.append(f"{list(parameter.shape)}")
                fresh = self._is_fresh(group, parameter)
                key = parameter.device, fresh, splitting_groups(parameter) if is_sharded(parameter) else None
                batch = batches.get(key)
                if batch is None:
                    batch = batches[key] = Batch(group, [], [], fresh)
                batch.parameters.append(parameter)
                batch.grads.append(grad)
            found += batches.values()
        if sparse:
            raise ValueError(
                f".grad must be dense, got sparse ones for parameters of shape {_shortened(sparse)}: build "
                "nn.Embedding with sparse=False, or give it to an optimizer of torch"
            )
        return found

    def _list_free(self) -> None:
        self._listed_free = True
        parameters, names = [], []
        for group in self.param_groups:
            given = group.get("param_names") or [None] * len(group["params"])
            for name, parameter in zip(given, group["params"], strict=True):
                if parameter.requires_grad:
                    parameters.append(parameter)
                    names.append(str(list(parameter.shape)) if name is None else repr(name))
        free = [names[index] for index in self.mas._unknown(parameters)]
        if free:
            # From here to the user's line: step, and three functions that torch puts around it.
            warnings.warn(f"no omega holds these parameters, they are free: {_shortened(free)}", stacklevel=6)

    def _zero(self) -> Tensor:
        first = next((p for group in self.param_groups for p in group["params"]), torch.empty(()))
        return torch.zeros((), dtype=torch.float64, device=first.device)

    def _is_fresh(self, group: dict[str, Any], parameter: Tensor) -> bool:
        raise NotImplementedError

    def _advance(self, batch: Batch, held: Held) -> Tensor:
        """Step a batch, and return the op's values, float64 [n, 2]."""
        raise NotImplementedError


def state_like(make: Callable[..., Tensor], parameter: Tensor) -> Tensor:
    """Make a tensor of a parameter's state: contiguous as the kernels want it, whatever the layout of the parameter."""
    return make(parameter, memory_format=torch.contiguous_format)


def local_thetas_and_grads(batch: Batch) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return what the kernels see of a batch."""
    grads = batch.grads
    if is_sharded(batch.parameters[0]):
        # A gradient may be a sum that the ranks have yet to form.
        grads = [placed_like(grad, theta) for grad, theta in zip(grads, batch.parameters, strict=True)]
    return locals_of(batch.parameters), locals_of(grads)


def number(value: float | Tensor) -> float:
    """Return an option of a group, which schedulers may keep in a tensor."""
    return float(value.item() if isinstance(value, Tensor) else value)


def _shortened(entries: list[str]) -> str:
    more = len(entries) - LISTED
    return ", ".join(entries[:LISTED]) + (f" and {more} more" if more > 0 else "")
