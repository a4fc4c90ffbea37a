"""What the optimizers share: which parameters step together, the checks before a step, and the penalty's value."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from operator import attrgetter, is_, methodcaller
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from mas_fast.checks import DTYPES, bullets
from mas_fast.kernels.steps import Held
from mas_fast.mas import MAS
from mas_fast.sharding import is_sharded, locals_of, placed_like, same_place, splitting_groups, sum_over_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_grad_of = attrgetter("grad")
_layout_of = attrgetter("layout")
_shape_of = attrgetter("shape")


def _get(name: str) -> Callable[[dict[str, Any]], Any]:
    return methodcaller("get", name)


# Options of torch that choose between its implementations, and what they must be here.
INERT = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}
# Parameters that a message lists.
LISTED = 5


class Batch(NamedTuple):
    """Parameters that step in one call: of one group, on one device, and spread over ranks in one way.

    Attributes:
        group: Their group.
        parameters: θ.
        states: The dicts of their state; none where they have no state.
        shapes: Of the parameters, their gradients and their state.
        sizes: Their numbers of entries.
        kept: What the dicts hold, a list by name; none where it is still to be made.
        fresh: Whether it is still to be made.
        counts: Of AdamW, the steps taken, float [n] on the host; every `step` of the state is an entry of it.
        ranks: The process groups in which ranks hold different parts.
    """

    group: dict[str, Any]
    parameters: list[Tensor]
    states: list[dict[str, Any]]
    shapes: list[torch.Size]
    sizes: list[int]
    kept: dict[str, list[Any]]
    fresh: bool
    counts: Tensor | None
    ranks: tuple[ProcessGroup, ...]

    def is_current(self) -> bool:
        """Return whether parameters and state are still what was looked at."""
        return (
            not self.fresh
            and [*map(_shape_of, self.parameters)] == self.shapes
            # Of state that is still the same tensors, how large it is says enough, and costs a third.
            and all(
                all(map(is_, map(_get(name), self.states), tensors))
                and (name == "step" or [*map(Tensor.numel, tensors)] == self.sizes)
                for name, tensors in self.kept.items()
            )
        )


class Prepared(NamedTuple):
    """The batches of a step, and what they were made of.

    Attributes:
        groups: The groups.
        members: The parameters that have a gradient, by group.
        needs: The names of the state that each group needs.
        states: All dicts of the optimizer's state.
        batches: The batches.
    """

    groups: list[dict[str, Any]]
    members: list[list[Tensor]]
    needs: list[tuple[str, ...]]
    states: list[dict[str, Any]]
    batches: list[Batch]

    def holds_for(
        self,
        groups: list[dict[str, Any]],
        members: list[list[Tensor]],
        needs: list[tuple[str, ...]],
        states: list[dict[str, Any]],
    ) -> bool:
        """Return whether the batches of a step would be these: found out without making them."""
        return (
            needs == self.needs
            and all(map(is_, groups, self.groups))
            and [*map(len, members)] == [*map(len, self.members)]
            and all(all(map(is_, now, then)) for now, then in zip(members, self.members, strict=True))
            and len(states) == len(self.states)
            and all(map(is_, states, self.states))
            and all(batch.is_current() for batch in self.batches)
        )


class PenaltyStep(Optimizer):
    """What both optimizers share: which parameters step together, the value of the penalty, and the checks."""

    mas: MAS
    implicit: bool
    penalty: Tensor | None
    _listed_free: bool
    _prepared: Prepared | None
    _counts_steps: ClassVar[bool]

    def _attach(self, mas: MAS, implicit: bool) -> None:
        if not isinstance(mas, MAS):
            raise TypeError(f"mas must be a mas_fast.MAS, got {type(mas).__name__}")
        self.mas = mas
        self.implicit = bool(implicit)
        self.penalty = None
        self._listed_free = False
        self._prepared = None

    # The base class pickles and copies its own attributes alone.
    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("mas", "implicit", "penalty", "_listed_free")}
        state: defaultdict[Any, Any] = defaultdict(dict)
        state.update({parameter: _apart(kept) for parameter, kept in self.state.items()})
        return super().__getstate__() | own | {"state": state}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's optimizers do; the counts of steps are copies."""
        found = super().state_dict()
        return found | {"state": {index: _apart(kept) for index, kept in found["state"].items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what `load_state_dict` read, also of torch's fused or capturable optimizers."""
        super().__setstate__(state)
        self._prepared = None
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
        self._listed_free = False

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
            grads = [_dense_grads(batch) for batch in batches]
            options = [self._options(batch.group) for batch in batches]
            for batch in batches:
                _check_writable(batch)
            holds = [self.mas._held(batch.parameters) for batch in batches]
            if not self._listed_free and self.mas.omega:
                self._list_free()
            total = self._zero() if not batches else None
            for batch, own, held, numbers in zip(batches, grads, holds, options, strict=True):
                value = sum_over_ranks(self._advance(batch, own, held, numbers)[:, 0].sum(), batch.ranks)
                # Kernels write past autograd, which must still refuse a backward through a graph made before.
                torch.autograd.graph.increment_version(batch.parameters)
                total = value if total is None else total + value.to(total.device, non_blocking=True)
            self.penalty = total
        return loss

    def _batches(self) -> list[Batch]:
        """Return the batches of this step, prepared anew only where something has changed since the last one."""
        members = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        needs = [self._needs(group) for group in self.param_groups]
        states = list(self.state.values())
        if self._prepared is None or not self._prepared.holds_for(self.param_groups, members, needs, states):
            self._prepared = None
            batches = self._prepare(members, needs)
            self._prepared = Prepared(list(self.param_groups), members, needs, list(self.state.values()), batches)
        return self._prepared.batches

    def _prepare(self, members: list[list[Tensor]], needs: list[tuple[str, ...]]) -> list[Batch]:
        problems = []
        found: list[Batch] = []
        for group, parameters, names in zip(self.param_groups, members, needs, strict=True):
            batches: dict[tuple[object, ...], Batch] = {}
            for parameter in parameters:
                state = self.state.get(parameter, {}) if names else {}
                fresh = bool(names) and all(state.get(name) is None for name in names)
                reasons = [
                    _unwritable(parameter),
                    _misshapen_grad(parameter),
                    *(_misfit(state, name, parameter) for name in names if not fresh),
                ]
                if self._counts_steps and not fresh and not _is_number(state.get("step")):
                    reasons.append("has no number 'step' in its state")
                problems += [f"{self._label(group, parameter)} {reason}" for reason in reasons if reason]
                ranks = splitting_groups(parameter)
                key = parameter.device, fresh, is_sharded(parameter), ranks
                batch = batches.setdefault(key, Batch(group, [], [], [], [], {}, fresh, None, ranks))
                batch.parameters.append(parameter)
                batch.states.append(state)
                batch.shapes.append(parameter.shape)
                batch.sizes.append(parameter.numel())
            found += batches.values()
        if problems:
            raise ValueError(f"parameters and their state must fit each other, got:{bullets(problems)}")
        return [self._completed(batch, self._needs(batch.group)) for batch in found]

    def _completed(self, batch: Batch, names: tuple[str, ...]) -> Batch:
        """Return a batch with its state, in memory that the kernels can walk through."""
        if batch.fresh:
            return batch
        counts = None
        if self._counts_steps:
            # In one tensor they are read and counted up at once; each stays an entry of the state, as in torch.
            counts = new_counts(len(batch.states))
            counts.copy_(torch.tensor([float(state["step"]) for state in batch.states], device="cpu"))
            for state, count in zip(batch.states, counts.unbind(), strict=True):
                state["step"] = count
        for state in batch.states:
            state.update({name: state[name].contiguous() for name in names})
        kept = {name: [state[name] for state in batch.states] for name in (*names, *["step"] * self._counts_steps)}
        return batch._replace(kept=kept, counts=counts)

    def _label(self, group: dict[str, Any], parameter: Tensor) -> str:
        index = next(index for index, own in enumerate(group["params"]) if own is parameter)
        names = group.get("param_names")
        return repr(names[index]) if names else f"the parameter of shape {list(parameter.shape)}"

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

    def _needs(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the state that a group needs, all of the parameters' shapes."""
        raise NotImplementedError

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return the options of a group as the op takes them."""
        raise NotImplementedError

    def _advance(self, batch: Batch, grads: Sequence[Tensor], held: Held, options: dict[str, Any]) -> Tensor:
        """Step a batch, and return the op's values, float64 [n, 2]."""
        raise NotImplementedError


def new_state(batch: Batch, names: Sequence[str], make: Callable[..., Tensor]) -> dict[str, list[Tensor]]:
    """Make the state of a fresh batch: contiguous as the kernels want it, whatever the layout of the parameters."""
    return {name: [make(p, memory_format=torch.contiguous_format) for p in batch.parameters] for name in names}


def new_counts(count: int) -> Tensor:
    """Return as many zeros, in which steps are counted as torch does it: on the host, where reading costs nothing."""
    wide = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return torch.zeros(count, dtype=wide, device="cpu")


def keep_state(batch: Batch, optimizer: Optimizer, state: dict[str, list[Any]]) -> None:
    """Write what was made for a fresh batch into the state of its optimizer."""
    for name, tensors in state.items():
        for parameter, tensor in zip(batch.parameters, tensors, strict=True):
            optimizer.state[parameter][name] = tensor


def number(value: float | Tensor) -> float:
    """Return an option of a group, which schedulers may keep in a tensor.

    Raises:
        ValueError: The tensor holds more than one number.
    """
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"options of a group must be one number each, got a tensor of shape {list(value.shape)}")
    return float(value.item() if isinstance(value, Tensor) else value)


def _check_writable(batch: Batch) -> None:
    if all(map(Tensor.is_contiguous, batch.parameters)):
        return
    for parameter in batch.parameters:
        reason = _unwritable(parameter)
        if reason:
            raise ValueError(f"a parameter of shape {list(parameter.shape)} {reason}")


def _dense_grads(batch: Batch) -> Sequence[Tensor]:
    """Return this rank's parts of the gradients.

    Raises:
        ValueError: A gradient is sparse.
    """
    grads = [*map(_grad_of, batch.parameters)]
    if {*map(_layout_of, grads)} - {torch.strided}:
        sparse = [str(list(grad.shape)) for grad in grads if grad.layout is not torch.strided]
        raise ValueError(
            f".grad must be dense, got sparse ones for parameters of shape {_shortened(sparse)}: build "
            "nn.Embedding with sparse=False, or give it to an optimizer of torch"
        )
    if is_sharded(batch.parameters[0]):
        # A gradient may be a sum that the ranks have yet to form.
        grads = [placed_like(grad, theta) for grad, theta in zip(grads, batch.parameters, strict=True)]
    return locals_of(grads)


def _apart(kept: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a parameter with a count of steps of its own: pickle writes all that a view belongs to."""
    step = kept.get("step")
    return kept | {"step": step.clone()} if isinstance(step, Tensor) else dict(kept)


def _is_number(value: object) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, (float, int))


def _unwritable(parameter: Tensor) -> str | None:
    if any(stride == 0 and size > 1 for stride, size in zip(parameter.stride(), parameter.shape, strict=True)):
        return "is expanded, and its entries share memory: clone() it"
    return None


def _misshapen_grad(parameter: Tensor) -> str | None:
    # Nobody can set such a .grad: it was there when the parameter got another shape. So this is asked once for a shape.
    grad = parameter.grad
    if grad is None or grad.shape == parameter.shape:
        return None
    return f"has shape {list(parameter.shape)} and a .grad of shape {list(grad.shape)}, which must be the same"


def _misfit(state: dict[str, Any], name: str, parameter: Tensor) -> str | None:
    kept = state.get(name)
    if not isinstance(kept, Tensor):
        return f"has no tensor {name!r} in its state"
    if kept.shape != parameter.shape or kept.dtype not in DTYPES or kept.layout is not torch.strided:
        got = f"{kept.layout} {kept.dtype} {list(kept.shape)}"
        return f"has a {name!r} that must be dense, floating-point and of shape {list(parameter.shape)}, got {got}"
    if not same_place(kept, parameter):
        return f"is on {parameter.device}, and its {name!r} on {kept.device}, or spread over ranks differently"
    return None


def _shortened(entries: list[str]) -> str:
    more = len(entries) - LISTED
    return ", ".join(entries[:LISTED]) + (f" and {more} more" if more > 0 else "")
