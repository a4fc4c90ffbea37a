"""MAS: what training on the next task needs: Ω, the anchor θ*, and the penalty that holds θ where Ω is large."""

from __future__ import annotations

import fnmatch
import json
import math
import numbers
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mas_fast import storage
from mas_fast.checks import bullets, list_mismatches, list_unusable
from mas_fast.distributed import Ranks, trained_parameters
from mas_fast.encoded import OMEGA_DTYPES, Decoded, Encoded, decode
from mas_fast.importance import Importance
from mas_fast.kernels.steps import Held
from mas_fast.merge import check_merge
from mas_fast.penalty import Plan
from mas_fast.sharding import local, placed_like
from mas_fast.state import Keeping, State, adapt, merge_into

KIND = "mas_fast.mas"
STATE_ENTRIES = ("lam", "merge", "alpha", "meaning", "num_samples", "omega", "anchor")

Lam = float | Mapping[str, float]


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
        lam: λ, finite and at least 0, or λ by pattern of parameter names; may be set anew at any time.
        merge: How a new Ω joins the old: "sum", "mean", "ema" or "max", as in `Importance.merge`.
        alpha: The weight of the new Ω in "ema".
    """

    def __init__(
        self,
        model: nn.Module,
        lam: Lam = 1.0,
        merge: str = "sum",
        *,
        alpha: float = 0.5,
        omega_dtype: torch.dtype | None = None,
        anchor_dtype: torch.dtype | None = None,
    ) -> None:
        """Start without Ω: until `consolidate` the penalty is exactly 0.

        Args:
            model: The model to protect.
            lam: λ; or a mapping of patterns such as "encoder.*" to λ, of which the first that fits a name counts.
            merge: "sum" (the paper), "mean", "ema" or "max".
            alpha: The weight of the new Ω in "ema", from 0 to 1.
            omega_dtype: What Ω is kept in: a floating dtype, or torch.uint8 for 8 bits a weight, of which the relative
                error in L2 is below 0.5 % (zeros stay zeros). None keeps what the importance or a loaded state has.
            anchor_dtype: What θ* is kept in, such as torch.bfloat16, which rounds it. None is the parameter's own, or
                what a loaded state has.

        Raises:
            TypeError: `model` is no module or `lam` no number.
            ValueError: `lam` is negative or not finite, or another argument is none of its values.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        check_merge(merge, alpha, argument="merge")
        for argument, dtype, allowed in (
            ("omega_dtype", omega_dtype, OMEGA_DTYPES),
            ("anchor_dtype", anchor_dtype, OMEGA_DTYPES[:-1]),
        ):
            if dtype is not None and dtype not in allowed:
                raise ValueError(f"{argument} must be one of {', '.join(map(str, allowed))}, got {dtype}")
        self.model = model
        self.lam = lam
        self.merge = merge
        self.alpha = alpha
        self._keeping = Keeping(omega_dtype, anchor_dtype)
        self._state = State()
        self._plan: Plan | None = None
        self._warned = False

    @property
    def lam(self) -> Lam:
        """λ, the weight of the penalty, or λ by pattern."""
        return MappingProxyType(self._lam) if isinstance(self._lam, dict) else self._lam

    @lam.setter
    def lam(self, value: Lam) -> None:
        self._lam = _checked_lam(value)
        self._lams: dict[str, float] = {}  # by name, made when it is needed

    @property
    def omega_dtype(self) -> torch.dtype | None:
        """What Ω is kept in; None for what the importance has."""
        return self._keeping.omega_dtype

    @property
    def anchor_dtype(self) -> torch.dtype | None:
        """What θ* is kept in; None for the parameter's own."""
        return self._keeping.anchor_dtype

    @property
    def omega(self) -> Mapping[str, Tensor]:
        """Ω by parameter name, decoded if it is kept in 8 bits; empty before `consolidate`. Not to be modified."""
        return Decoded(self._state.omega)

    @property
    def anchor(self) -> Mapping[str, Tensor]:
        """θ* by parameter name; empty before `consolidate`. Not to be modified."""
        return MappingProxyType(self._state.anchor)

    @property
    def state_bytes(self) -> int:
        """Bytes that Ω and θ* take; of what is spread over ranks, on this rank."""
        return self._state.num_bytes

    def __getstate__(self) -> dict[str, Any]:
        # Of a copy, other tensors are the parameters: what was found for them is found again.
        return vars(self) | {"_plan": None}

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
        parameters = trained_parameters(self.model)
        state = merge_into(self._state, importance, self.model, parameters, self.merge, self.alpha, self._keeping)
        self._lams_of(state)  # an error if λ leaves one out
        kept = state.omega.values()
        holds = any(bool((k.codes if isinstance(k, Encoded) else local(k)).any()) for k in kept)
        if not any(Ranks.holding(state.anchor.values()).gather(holds)):
            warnings.warn("the importance is 0 for every parameter: the penalty holds nothing", stacklevel=2)
        self._set_state(state)
        # Now, so that torch.compile finds it.
        self._current_plan()
        return importance

    def penalty(self) -> Tensor:
        """Return λ Σ_ij Ω_ij (θ_ij − θ*_ij)² as a differentiable 0-dim tensor, to be added to the loss.

        The sum is over the parameters that require grad, in float32, or float64 where θ or Ω is. Before `consolidate`
        it is exactly 0, which is warned of once.

        Raises:
            ValueError: A parameter with an Ω is missing from the model or has another shape; all are listed.
        """
        plan = self._current_plan()
        if plan is None or not plan.groups:
            return self._zero().requires_grad_(torch.is_grad_enabled())
        return plan.value()

    def penalty_by_parameter(self) -> dict[str, float]:
        """Return λ Σ_ij Ω_ij (θ_ij − θ*_ij)² of each parameter that requires grad, as numbers for logging.

        Raises:
            ValueError: As `penalty`.
        """
        plan = self._current_plan()
        return {} if plan is None else plan.values()

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
            FloatingPointError: A gradient in float16 overflowed.
        """
        plan = self._current_plan()
        if plan is None or not plan.groups:
            return self._zero()
        grads = [(n, t.grad) for group in plan.groups for n, t in zip(group.names, group.thetas, strict=True)]
        sparse = [name for name, grad in grads if grad is not None and grad.layout is not torch.strided]
        if sparse:
            raise ValueError(
                f".grad must be dense to take a dense penalty, got sparse ones for {', '.join(map(repr, sparse))}: "
                "build nn.Embedding with sparse=False, or leave it out of the importance"
            )
        return plan.add_grad()

    def adapt(
        self, *, rename: Mapping[str, str] | None = None, drop: Iterable[str] = (), grow: Iterable[str] = ()
    ) -> None:
        """Have Ω and θ* follow a model that has changed since `consolidate`.

        A new parameter needs nothing of this: it has no Ω and is free. What follows is done all or not at all.

        Args:
            rename: Old name -> new name.
            drop: Names whose Ω is forgotten, or patterns such as "head.*".
            grow: Names, after renaming, or patterns, of parameters that are larger now: Ω and θ* stay with the leading
                corner, the old rows and columns; the new entries have Ω = 0.

        Raises:
            ValueError: A name fits nothing, or Ω does not fit the model even so; all is listed.
        """
        parameters = trained_parameters(self.model)
        state = adapt(self._state, parameters, self._keeping, rename or {}, list(drop), list(grow))
        self._lams_of(state)
        self._set_state(state.placed(parameters))

    def state_dict(self) -> dict[str, Any]:
        """Return λ, merge, alpha, the meaning of Ω, the samples per parameter, Ω and θ* as nested plain dicts.

        Ω in 8 bits is there as codes, in the shape of the parameter, and "scales"; of a DTensor, decoded. The tensors
        are this object's own, which it never writes to.
        """
        state = self._state
        small = {n: k for n, k in state.omega.items() if isinstance(k, Encoded) and k.spread is None}
        whole = {n: decode(k) for n, k in state.omega.items() if n not in small}
        return {
            "lam": dict(self.lam) if isinstance(self.lam, Mapping) else self.lam,
            "merge": self.merge,
            "alpha": self.alpha,
            "omega": {n: small[n].codes.view(small[n].shape) if n in small else whole[n] for n in state.omega},
            "scales": {name: kept.scales for name, kept in small.items()},
            "anchor": dict(state.anchor),
            "num_samples": dict(state.num_samples),
            "meaning": dict(state.meaning),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; its tensors are copied. λ, merge and alpha are the state's.

        Ω and θ* are kept in this object's own dtypes, whatever they were saved in.

        Raises:
            ValueError: An entry is missing or invalid, or Ω and θ* do not fit the model or each other; every mismatch
                is listed and nothing is changed.
        """
        missing = [entry for entry in STATE_ENTRIES if entry not in state]
        if missing:
            raise ValueError(f"state must have the entries {', '.join(STATE_ENTRIES)}, it lacks {', '.join(missing)}")
        lam = _checked_lam(state["lam"])
        check_merge(state["merge"], state["alpha"], argument="merge")
        try:
            omega = _decoded(state["omega"], state.get("scales", {}))
        except (KeyError, ValueError) as error:
            raise ValueError(f"state must have scales that fit its codes of omega, got: {error}") from error
        anchor, num_samples = state["anchor"], state["num_samples"]
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
        loaded = State(
            {n: self._keeping.omega(placed_like(omega[n].detach(), parameters[n]).clone()) for n in omega},
            {n: self._keeping.anchor(placed_like(anchor[n].detach(), parameters[n])) for n in omega},
            {name: int(num_samples[name]) for name in omega},
            dict(state["meaning"]),
        )
        lams = _lams_by_name(lam, loaded.omega)
        self.lam, self.merge, self.alpha = lam, state["merge"], state["alpha"]
        self._set_state(loaded)
        self._lams = lams

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to `path` as safetensors, atomically: an interrupted save leaves the old file as it was.

        Raises:
            FileNotFoundError: The folder of `path` does not exist.
        """
        state = self.state_dict()
        kinds = ("omega", "scales", "anchor")
        tensors = {f"{kind}.{name}": tensor for kind in kinds for name, tensor in state.pop(kind).items()}
        storage.write(path, KIND, tensors, {"state": json.dumps(state)})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read what `save` wrote, as `load_state_dict` does.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is truncated, is no state of a MAS, or does not fit the model (every mismatch is
                listed); nothing is changed.
        """
        tensors, header = storage.read(path, KIND)
        state: dict[str, Any] = {"omega": {}, "scales": {}, "anchor": {}}
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
        problems = self._state.mismatches(parameters)
        if problems:
            raise ValueError(
                "model must have every parameter that has an omega (MAS.adapt follows a changed model), got mismatches:"
                f"{bullets(problems)}"
            )
        return parameters

    def _set_state(self, state: State) -> None:
        self._state = state
        self._plan = None
        self._lams = {}

    def _lams_of(self, state: State) -> dict[str, float]:
        return _lams_by_name(self._lam, state.omega)

    def _current_plan(self) -> Plan | None:
        """Return what the penalty is computed from; None, which is warned of once, without any Ω."""
        if not self._state.omega:
            if not self._warned:
                self._warned = True
                # stacklevel 3 is the user's line that called penalty() or add_penalty_grad_().
                warnings.warn("there is no importance before consolidate(): the penalty is exactly 0", stacklevel=3)
            return None
        plan = self._plan
        if plan is None or not (torch.compiler.is_compiling() or plan.holds(self.model, self._state)):
            parameters = self._fitting_parameters()
            self._state = self._state.placed(parameters)
            plan = self._plan = Plan(self.model, self._state, parameters)
        if not self._lams:
            self._lams = self._lams_of(self._state)
        plan.set_lams(self._lams)
        return plan

    def _held(self, parameters: Sequence[Tensor]) -> Held:
        """Return what holds parameters of the model, for the optimizers; see `Plan.held`."""
        plan = self._current_plan()
        if plan is None:
            none = [torch.empty(0)] * len(parameters)
            return Held(none, none, none, [0.0] * len(parameters))
        return plan.held(parameters, self._lams)

    def _unknown(self, parameters: Sequence[Tensor]) -> list[int]:
        """Return the indices of those parameters that are none of the model's, or have no Ω."""
        plan = self._current_plan()
        return list(range(len(parameters))) if plan is None else plan.unknown(parameters)

    def _zero(self) -> Tensor:
        first = next(self.model.parameters(), torch.empty(()))
        return torch.zeros((), device=first.device, dtype=torch.promote_types(first.dtype, torch.float32))


def _checked_lam(value: object) -> Lam:
    if isinstance(value, Mapping):
        return {str(pattern): _checked_number(number) for pattern, number in value.items()}
    return _checked_number(value)


def _checked_number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"lam must be a real number, got {value!r}")
    lam = float(value)
    if not (math.isfinite(lam) and lam >= 0):
        raise ValueError(f"lam must be finite and at least 0, got {lam}")
    return lam


def _lams_by_name(lam: Lam, names: Iterable[str]) -> dict[str, float]:
    """Return λ of each parameter.

    Raises:
        ValueError: No pattern fits some of them, which are listed.
    """
    if not isinstance(lam, Mapping):
        return dict.fromkeys(names, lam)
    found = {n: next((v for p, v in lam.items() if fnmatch.fnmatchcase(n, p)), None) for n in names}
    missing = [repr(name) for name, value in found.items() if value is None]
    if missing:
        raise ValueError(
            f"lam must have a pattern for every parameter with an omega, got none for {', '.join(missing)}"
        )
    return {name: value for name, value in found.items() if value is not None}


def _decoded(omega: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from mas_fast.kernels.steps import decode_omega

    return {
        name: decode_omega(tensor.flatten(), scales[name]).view(tensor.shape) if tensor.dtype == torch.uint8 else tensor
        for name, tensor in omega.items()
    }
