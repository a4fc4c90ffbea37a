"""MAS: what training on the next task needs: Ω, the anchor θ*, and the penalty that holds θ where Ω is large."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import os
import warnings
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mas_fast import storage
from mas_fast.checks import bullets, list_mismatches, list_unusable
from mas_fast.distributed import Ranks, trained_parameters
from mas_fast.importance import Importance
from mas_fast.merge import check_merge, list_meaning_differences, merge_tensors
from mas_fast.names import parameter_name
from mas_fast.penalty import Term, add_penalty_grad_, penalty_value
from mas_fast.sharding import local, placed_like, same_place

KIND = "mas_fast.mas"
STATE_ENTRIES = ("lam", "merge", "alpha", "meaning", "num_samples", "omega", "anchor")


@dataclasses.dataclass(frozen=True)
class _State:
    """All that consolidate changes, replaced as a whole so that a failure changes nothing. No tensor is written to."""

    omega: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    anchor: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    num_samples: dict[str, int] = dataclasses.field(default_factory=dict)
    meaning: dict[str, str] = dataclasses.field(default_factory=dict)


class MAS:
    """The penalty λ Σ_ij Ω_ij (θ_ij − θ*_ij)² on a model, and the Ω and θ* of the tasks learned so far.

    ```python
    mas = MAS(model, lam=1.0)
    mas.consolidate(loader)                # after a task: estimate Ω, θ* = θ now
    loss.backward()                        # on the next task, once per optimizer step
    value = mas.add_penalty_grad_()
    ```

    Ω and θ* are keyed by parameter name, without the prefixes of torch.compile and (Distributed)DataParallel.
    Parameters of the model without an Ω, such as a new head, are free; so are those that do not require grad. Ω and θ*
    follow their parameter to another device, and are sharded as it is under fully_shard. Then every method but
    `state_dict` is to be called on all ranks; nothing but the value of the penalty is communicated in a step.

    Attributes:
        model: The model, possibly wrapped.
        lam: λ, finite and at least 0; may be changed at any time.
        merge: How a new Ω joins the old: "sum", "mean", "ema" or "max", as in `Importance.merge`.
        alpha: The weight of the new Ω in "ema".
    """

    def __init__(self, model: nn.Module, lam: float = 1.0, merge: str = "sum", *, alpha: float = 0.5) -> None:
        """Start without Ω: until `consolidate` the penalty is exactly 0.

        Args:
            model: The model to protect.
            lam: λ.
            merge: "sum" (the paper), "mean", "ema" or "max".
            alpha: The weight of the new Ω in "ema", from 0 to 1.

        Raises:
            TypeError: `model` is no module or `lam` no number.
            ValueError: `lam` is negative or not finite, or `merge` or `alpha` none of its values.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        check_merge(merge, alpha, argument="merge")
        self.model = model
        self.lam = lam
        self.merge = merge
        self.alpha = alpha
        self._state = _State()
        self._warned = False

    @property
    def lam(self) -> float:
        """λ, the weight of the penalty."""
        return self._lam

    @lam.setter
    def lam(self, value: float) -> None:
        self._lam = _checked_lam(value)

    @property
    def omega(self) -> Mapping[str, Tensor]:
        """Ω by parameter name; empty before `consolidate`. Not to be modified."""
        return MappingProxyType(self._state.omega)

    @property
    def anchor(self) -> Mapping[str, Tensor]:
        """θ* by parameter name; empty before `consolidate`. Not to be modified."""
        return MappingProxyType(self._state.anchor)

    def __repr__(self) -> str:
        size, seen = len(self._state.omega), max(self._state.num_samples.values(), default=0)
        return f"<MAS of {size} parameters, lam={self.lam}, merge={self.merge!r}, num_samples={seen:,}>"

    def consolidate(self, data: Importance | Iterable[Any], **estimate_kwargs: Any) -> Importance:
        """Estimate the importance on `data`, merge it into Ω, and set θ* = θ now.

        A parameter that only the old or only the new importance has keeps that Ω, so a head's Ω belongs to its task. θ*
        is set anew for every parameter with an Ω. On any error Ω and θ* stay as they were.

        Args:
            data: Batches for `estimate_importance`, or an `Importance`, which is copied to the parameters' devices.
            **estimate_kwargs: Options of `estimate_importance`.

        Returns:
            The importance that was merged.

        Raises:
            TypeError: Options were given together with an Importance.
            ValueError: Ω does not fit the model, differs in objective, statistic or scope, would overflow, or a
                parameter is not finite; all such are listed.
            CaptureError: From the estimate.
        """
        check_merge(self.merge, self.alpha, argument="merge")
        if isinstance(data, Importance):
            if estimate_kwargs:
                raise TypeError(f"options must be left out when data is an Importance, got {sorted(estimate_kwargs)}")
            importance = data
        else:
            # Here, so that a model that no longer fits is not found out after a long pass over the data.
            self._fitting_parameters()
            from mas_fast.estimate import estimate_importance

            importance = estimate_importance(self.model, data, **estimate_kwargs)
        state = self._merged(importance)
        holds = any(bool(local(omega).any()) for omega in state.omega.values())
        if not any(Ranks.holding(state.omega.values()).gather(holds)):
            warnings.warn("the importance is 0 for every parameter: the penalty holds nothing", stacklevel=2)
        self._state = state
        return importance

    def penalty(self) -> Tensor:
        """Return λ Σ_ij Ω_ij (θ_ij − θ*_ij)² as a differentiable 0-dim tensor, to be added to the loss.

        The sum is over the parameters that require grad, in float32, or float64 where θ or Ω is. Before `consolidate`
        it is exactly 0, which is warned of once.

        Raises:
            ValueError: A parameter with an Ω is missing from the model or has another shape; all are listed.
        """
        terms = self._terms()
        if not terms:
            return self._zero().requires_grad_(torch.is_grad_enabled())
        return penalty_value(list(terms.values()), self.lam)

    def add_penalty_grad_(self) -> Tensor:
        """Add the penalty's gradient 2λΩ(θ − θ*) to `.grad` of each parameter in place, and return the penalty's value.

        Call it once per optimizer step, when the gradients are complete: after the last backward of an accumulation
        and after `GradScaler.unscale_`. A missing `.grad` is created; parameters that do not require grad are left
        alone and not counted.

        Returns:
            λ Σ_ij Ω_ij (θ_ij − θ*_ij)² as `penalty()` gives it, 0-dim, without a graph.

        Raises:
            ValueError: A parameter with an Ω is missing from the model or has another shape, or a `.grad` is sparse;
                all are listed, and no `.grad` is changed.
        """
        terms = self._terms()
        if not terms:
            return self._zero()
        grads = {name: term.theta.grad for name, term in terms.items()}
        sparse = [name for name, grad in grads.items() if grad is not None and grad.layout != torch.strided]
        if sparse:
            raise ValueError(
                f".grad must be dense to take a dense penalty, got sparse ones for {', '.join(map(repr, sparse))}: "
                "build nn.Embedding with sparse=False, or leave it out of the importance"
            )
        return add_penalty_grad_(list(terms.values()), self.lam)

    def state_dict(self) -> dict[str, Any]:
        """Return λ, merge, alpha, the meaning of Ω, the samples per parameter, Ω and θ* as nested plain dicts.

        The tensors are this object's own, which it never writes to.
        """
        return {
            "lam": self.lam,
            "merge": self.merge,
            "alpha": self.alpha,
            **{key: dict(value) for key, value in vars(self._state).items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; its tensors are copied. λ, merge and alpha are the state's.

        Raises:
            ValueError: An entry is missing or invalid, or Ω and θ* do not fit the model or each other; every mismatch
                is listed and nothing is changed.
        """
        missing = [entry for entry in STATE_ENTRIES if entry not in state]
        if missing:
            raise ValueError(f"state must have the entries {', '.join(STATE_ENTRIES)}, it lacks {', '.join(missing)}")
        lam = _checked_lam(state["lam"])
        check_merge(state["merge"], state["alpha"], argument="merge")
        omega, anchor, num_samples = state["omega"], state["anchor"], state["num_samples"]
        parameters = trained_parameters(self.model)
        problems = list_mismatches(omega, parameters, where="the model")
        problems += [f"the anchor of {line}" for line in list_mismatches(anchor, parameters, where="the model")]
        problems += [f"{name!r} has an omega and no anchor" for name in omega if name not in anchor]
        problems += [f"{name!r} has an anchor and no omega" for name in anchor if name not in omega]
        problems += [f"{name!r} has an omega and no num_samples" for name in omega if name not in num_samples]
        problems += list_unusable(omega, what="the omega of ", non_negative=True)
        problems += list_unusable(anchor, what="the anchor of ")
        if omega and sorted(state["meaning"]) != ["objective", "scope", "statistic"]:
            problems.append(f"its meaning must state objective, scope and statistic, got {dict(state['meaning'])}")
        if problems:
            raise ValueError(f"state must fit the model, got mismatches:{bullets(problems)}")
        self._state = _State(
            {name: placed_like(tensor.detach(), parameters[name]).clone() for name, tensor in omega.items()},
            {name: placed_like(anchor[name].detach(), parameters[name]).clone() for name in omega},
            {name: int(num_samples[name]) for name in omega},
            dict(state["meaning"]),
        )
        self.lam, self.merge, self.alpha = lam, state["merge"], state["alpha"]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to `path` as safetensors, atomically: an interrupted save leaves the old file as it was.

        Raises:
            FileNotFoundError: The folder of `path` does not exist.
        """
        state = self.state_dict()
        tensors = {f"{kind}.{name}": tensor for kind in ("omega", "anchor") for name, tensor in state.pop(kind).items()}
        storage.write(path, KIND, tensors, {"state": json.dumps(state)})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read what `save` wrote, as `load_state_dict` does.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is truncated, is no state of a MAS, or does not fit the model (every mismatch is
                listed); nothing is changed.
        """
        tensors, header = storage.read(path, KIND)
        state: dict[str, Any] = {"omega": {}, "anchor": {}}
        try:
            state |= json.loads(storage.header_entry(header, "state", path))
            for key, tensor in tensors.items():
                kind, _, name = key.partition(".")
                state[kind][name] = tensor
            self.load_state_dict(state)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)!r} must hold a state that fits, got: {error}") from error

    def _fitting_parameters(self) -> dict[str, nn.Parameter]:
        parameters = trained_parameters(self.model)
        problems = list_mismatches(self._state.omega, parameters, where="the model")
        if problems:
            raise ValueError(f"model must have every parameter that has an omega, got mismatches:{bullets(problems)}")
        return parameters

    def _merged(self, importance: Importance) -> _State:
        parameters = trained_parameters(self.model)
        old = self._state.omega
        # A name that fits is a plain one already, whatever else it could be the wrapped name of.
        new = {n if n in parameters else parameter_name(self.model, n): omega for n, omega in importance.items()}
        problems = [line for omegas in (old, new) for line in list_mismatches(omegas, parameters, where="the model")]
        problems += list_meaning_differences(self._state.meaning, importance.meaning)
        problems += list_unusable({n: parameters[n] for n in old | new if n in parameters}, what="the model's ")
        if problems:
            raise ValueError(
                "importance must fit the model and the earlier tasks, and the model be finite, got:"
                f"{bullets(dict.fromkeys(problems))}"
            )

        omegas, num_samples = {}, {}
        for name in old | new:
            like = parameters[name]
            counts = (self._state.num_samples.get(name, 0), importance.num_samples if name in new else 0)
            if name in old and name in new:
                before = placed_like(old[name], like)
                omegas[name] = merge_tensors(before, new[name], counts, self.merge, alpha=self.alpha)
            else:
                omegas[name] = placed_like(new[name], like).clone() if name in new else placed_like(old[name], like)
            num_samples[name] = sum(counts)
        problems = list_unusable(omegas, what="the merged ", non_negative=True)
        if problems:
            raise ValueError(f"omega must stay finite, got an overflow: use float32 importances{bullets(problems)}")
        anchors = {name: parameters[name].detach().clone() for name in omegas}
        return _State(omegas, anchors, num_samples, importance.meaning)

    def _terms(self) -> dict[str, Term]:
        if not self._state.omega:
            if not self._warned:
                self._warned = True
                # stacklevel 3 is the user's line that called penalty() or add_penalty_grad_().
                warnings.warn("there is no importance before consolidate(): the penalty is exactly 0", stacklevel=3)
            return {}
        parameters = self._fitting_parameters()
        if not all(same_place(omega, parameters[name]) for name, omega in self._state.omega.items()):
            omegas, anchors = (
                {name: placed_like(tensor, parameters[name]) for name, tensor in tensors.items()}
                for tensors in (self._state.omega, self._state.anchor)
            )
            self._state = dataclasses.replace(self._state, omega=omegas, anchor=anchors)
        return {
            name: Term(parameters[name], omega, self._state.anchor[name])
            for name, omega in self._state.omega.items()
            if parameters[name].requires_grad
        }

    def _zero(self) -> Tensor:
        first = next(self.model.parameters(), torch.empty(()))
        return torch.zeros((), device=first.device, dtype=torch.promote_types(first.dtype, torch.float32))


def _checked_lam(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"lam must be a real number, got {value!r}")
    lam = float(value)
    if not (math.isfinite(lam) and lam >= 0):
        raise ValueError(f"lam must be finite and at least 0, got {lam}")
    return lam
