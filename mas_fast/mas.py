"""MAS: what training on the next task needs: Ω, the anchor θ*, and the penalty that holds θ where Ω is large."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mas_fast import storage
from mas_fast.checks import one_of
from mas_fast.distributed import Ranks, reshard, trained_parameters
from mas_fast.encoded import Decoded, Keeping
from mas_fast.importance import Importance
from mas_fast.kernels.steps import Held
from mas_fast.lam import Lam, checked_lam, lams_of
from mas_fast.merge import check_merge
from mas_fast.packing import packed, unpacked
from mas_fast.penalty import add_penalty_grad_, penalty_by_parameter, penalty_value, traced_penalty_value
from mas_fast.plan import Plan, nothing_holds
from mas_fast.sharding import placed_like
from mas_fast.state import ENTRIES, TENSOR_ENTRIES, State, adapted, from_entries, merged

KIND = "mas_fast.mas"
STATE_ENTRIES = ("lam", "merge", "alpha", *ENTRIES)


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
        state_device: str | None = None,
    ) -> None:
        """Start without Ω: until `consolidate` the penalty is exactly 0.

        Args:
            model: The model to protect.
            lam: λ; or a mapping of patterns such as "encoder.*" to λ, of which the first that fits a name counts.
            merge: "sum" (the paper), "mean", "ema" or "max".
            alpha: The weight of the new Ω in "ema", from 0 to 1.
            omega_dtype: What Ω is kept in: a floating dtype, or torch.uint8 for 8 bits a weight, of which the relative
                error in L2 is some 0.3 % for real importances (zeros stay zeros); it is encoded anew with every task,
                and over dozens of tasks errors add up. None keeps what the importance or a loaded state has.
            anchor_dtype: What θ* is kept in, such as torch.bfloat16, which rounds it. None is the parameter's own, or
                what a loaded state has.
            state_device: "cpu" keeps Ω and θ* of CUDA parameters in pinned host memory, from where each step reads
                them. None keeps them beside their parameters.

        Raises:
            TypeError: `model` is no module or `lam` no number.
            ValueError: `lam` is negative or not finite, or another argument is none of its values.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        check_merge(merge, alpha, argument="merge")
        self.model = model
        self.merge = merge
        self.alpha = alpha
        self._keeping = Keeping(omega_dtype, anchor_dtype, state_device).checked()
        self._packed = packed(State())
        self._plan: Plan | None = None
        self._warned = False
        self.lam = lam

    @property
    def _state(self) -> State:
        return self._packed.state

    @property
    def lam(self) -> Lam:
        """λ, the weight of the penalty, or λ by pattern, of which the first that matches a name counts.

        Raises:
            TypeError: λ is no number, or a pattern no string.
            ValueError: λ is negative or not finite, or no pattern matches a parameter with an Ω; all are listed.
        """
        return MappingProxyType(self._lam) if isinstance(self._lam, dict) else self._lam

    @lam.setter
    def lam(self, value: Lam) -> None:
        lam = checked_lam(value)
        lams = lams_of(lam, self._state.omega)
        self._lam = lam
        if self._plan is not None:
            self._plan.set_lams(lams)

    @property
    def omega_dtype(self) -> torch.dtype | None:
        """What Ω is kept in; None for what the importance has."""
        return self._keeping.omega_dtype

    @property
    def anchor_dtype(self) -> torch.dtype | None:
        """What θ* is kept in; None for the parameter's own."""
        return self._keeping.anchor_dtype

    @property
    def state_device(self) -> str | None:
        """Where Ω and θ* of CUDA parameters are kept; None for beside their parameters."""
        return self._keeping.state_device

    @property
    def omega(self) -> Mapping[str, Tensor]:
        """Ω by parameter name, decoded if it is kept in 8 bits; empty before `consolidate`. Not to be modified."""
        return Decoded(self._state.omega)

    @property
    def anchor(self) -> Mapping[str, Tensor]:
        """θ* by parameter name; empty before `consolidate`. Not to be modified."""
        return Decoded(self._state.anchor)

    @property
    def state_bytes(self) -> int:
        """Bytes that Ω and θ* take; of what is spread over ranks, on this rank."""
        return self._state.num_bytes

    def __getstate__(self) -> dict[str, Any]:
        # Of a copy, other tensors are the parameters: what was found for them is found again. And pickle would write
        # memory that is shared once for each tensor in it.
        return vars(self) | {"_plan": None, "_packed": unpacked(self._state)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"_packed": packed(state["_packed"])})

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
        state = merged(self._state, self.model, parameters, importance, self._keeping, how=self.merge, alpha=self.alpha)
        lams = lams_of(self._lam, state.omega)
        holds = any(bool(kept.checkable.any()) for kept in state.omega.values())
        if not any(Ranks.holding(parameters[name] for name in state.omega).gather(holds)):
            warnings.warn("the importance is 0 for every parameter: the penalty holds nothing", stacklevel=2)
        self._replace(state, parameters, lams)
        return importance

    def observe(self, batch: Any, how: str = "mean", *, alpha: float = 0.01, **estimate_kwargs: Any) -> Importance:
        """Update Ω with a batch of unlabelled data that the model meets where it is deployed: what is used, stays.

        θ* stays as it is for parameters that have one; the others get θ* = θ now. On any error Ω and θ* stay.

        Args:
            batch: One batch, as `estimate_importance` takes them.
            how: "mean": Ω becomes the mean over all samples so far, those of the tasks included. "ema": Ω is
                (1 − alpha) Ω + alpha Ω of the batch, so that what is used no longer is forgotten.
            alpha: The weight of the batch in "ema", from 0 to 1.
            **estimate_kwargs: Options of `estimate_importance`; those of the first Ω, or they do not merge.

        Returns:
            The importance of the batch.

        Raises:
            ValueError: `how` is another one, or Ω is kept in less than float32, which would round small changes away;
                else as `consolidate`.
            CaptureError: From the estimate.

        Source:
            Aljundi et al., Memory Aware Synapses, ECCV 2018, where Ω needs no labels so that it can follow the use of
            the model.
        """
        one_of("how", how, ("mean", "ema"))
        check_merge(how, alpha)
        wide = {torch.float32, torch.float64, None}
        narrow = sorted(map(str, {self.omega_dtype, *(k.values.dtype for k in self._state.omega.values())} - wide))
        if narrow:
            raise ValueError(
                f"Ω must be kept in float32 to be updated batch by batch, got {', '.join(narrow)}, which would round "
                "small changes away; observe with a MAS of its own and consolidate what it found"
            )
        self._fitting_parameters()
        from mas_fast.estimate import estimate_importance

        importance = estimate_importance(self.model, [batch], **estimate_kwargs)
        parameters = trained_parameters(self.model)
        state = merged(self._state, self.model, parameters, importance, self._keeping, how=how, alpha=alpha)
        for name, kept in self._state.anchor.items():
            like = parameters[name]
            own = (
                kept if self._keeping.is_placed(kept, like) else self._keeping.anchor(placed_like(kept.tensor(), like))
            )
            state.anchor[name] = own
        self._replace(state, parameters, lams_of(self._lam, state.omega))
        return importance

    def penalty(self) -> Tensor:
        """Return λ Σ_ij Ω_ij (θ_ij − θ*_ij)² as a differentiable 0-dim tensor, to be added to the loss.

        The sum is over the parameters that require grad, in float32, or float64 where θ or Ω is. Before `consolidate`
        it is exactly 0, which is warned of once.

        Raises:
            ValueError: A parameter with an Ω is missing from the model or has another shape; all are listed.
            NotImplementedError: Inside of a torch.func transform.
        """
        if torch.compiler.is_compiling():
            return self._traced_penalty()
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                "penalty() must be called outside of torch.func: it is that of the model's own parameters, whose "
                "gradient add_penalty_grad_ gives"
            )
        plan = self._current_plan()
        if plan is None or not plan.groups:
            return self._zero().requires_grad_(torch.is_grad_enabled())
        return penalty_value(plan.groups, plan.dtype)

    def penalty_by_parameter(self) -> dict[str, float]:
        """Return λ Σ_ij Ω_ij (θ_ij − θ*_ij)² of each parameter that requires grad, as numbers for logging.

        Their sum is that of `penalty`. Reading them waits for the device.

        Raises:
            ValueError: As `penalty`.
        """
        plan = self._current_plan()
        values = {} if plan is None else penalty_by_parameter(plan.groups)
        return {name: values[name] for name in self._state.omega if name in values}

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
            FloatingPointError: Entries of float16 gradients overflowed, which are listed; the gradients are spoilt.
        """
        if torch.compiler.is_compiling():
            return self._untraced("add_penalty_grad_")
        plan = self._current_plan()
        if plan is None or not plan.groups:
            return self._zero()
        return add_penalty_grad_(plan.groups, plan.dtype)

    def adapt(
        self, *, rename: Mapping[str, str] | None = None, drop: Iterable[str] = (), grow: Iterable[str] = ()
    ) -> None:
        """Have Ω and θ* follow a model that has changed since `consolidate`.

        A new parameter needs nothing of this: it has no Ω and is free. What follows is done all or not at all.

        Args:
            rename: Old name -> new name.
            drop: Names whose Ω is forgotten, or patterns such as "head.*".
            grow: Names, after renaming, or patterns, of parameters that are larger now: Ω and θ* stay with the leading
                corner, the old rows and columns; the new entries have Ω = 0, and θ* = θ now.

        Raises:
            ValueError: A name fits nothing, Ω does not fit the model even so, or no pattern of λ matches a new name;
                all is listed.
        """
        parameters = trained_parameters(self.model)
        state = adapted(self._state, parameters, self._keeping, rename=rename or {}, drop=drop, grow=grow)
        self._replace(state, parameters, lams_of(self._lam, state.omega))

    def state_dict(self) -> dict[str, Any]:
        """Return λ, merge, alpha, the meaning of Ω, the samples per parameter, Ω and θ* as nested plain dicts.

        Ω in 8 bits is there as codes, in the shape of the parameter, and "scales"; of a DTensor, decoded. The tensors
        are this object's own, which it never writes to.
        """
        lam = dict(self._lam) if isinstance(self._lam, dict) else self._lam
        return {"lam": lam, "merge": self.merge, "alpha": self.alpha, **unpacked(self._state).entries()}

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
        lam = checked_lam(state["lam"])
        check_merge(state["merge"], state["alpha"], argument="merge")
        parameters = trained_parameters(self.model)
        loaded = from_entries(state, parameters, self._keeping)
        lams = lams_of(lam, loaded.omega)
        self._replace(loaded, parameters, lams)
        self._lam, self.merge, self.alpha = lam, state["merge"], state["alpha"]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to `path` as safetensors, atomically: an interrupted save leaves the old file as it was.

        Raises:
            FileNotFoundError: The folder of `path` does not exist.
        """
        state = self.state_dict()
        tensors = {f"{kind}.{name}": tensor for kind in TENSOR_ENTRIES for name, tensor in state.pop(kind).items()}
        storage.write(path, KIND, tensors, {"state": json.dumps(state)})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read what `save` wrote, as `load_state_dict` does.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is truncated, is no state of a MAS, or does not fit the model (every mismatch is
                listed); nothing is changed.
        """
        tensors, header = storage.read(path, KIND)
        state: dict[str, Any] = {kind: {} for kind in TENSOR_ENTRIES}
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
        self._state.check_fits(parameters)
        return parameters

    def _replace(self, state: State, parameters: Mapping[str, nn.Parameter], lams: Mapping[str, float]) -> None:
        state = state.placed(parameters, self._keeping)
        new = self._packed if state is self._state else packed(state)
        # Now, because torch.compile cannot trace how it is made.
        plan = Plan(self.model, parameters, new, lams) if state.omega else None
        self._packed, self._plan = new, plan

    def _current_plan(self) -> Plan | None:
        """Return what the penalty is computed from; None, which is warned of once, without any Ω."""
        if not self._state.omega:
            if not self._warned:
                self._warned = True
                # stacklevel 3 is the user's line that called penalty() or add_penalty_grad_().
                warnings.warn("there is no importance before consolidate(): the penalty is exactly 0", stacklevel=3)
            return None
        if self._plan is not None and self._plan.holds(self.model, self._state):
            return self._plan
        reshard(self.model)
        if self._plan is None or not self._plan.holds(self.model, self._state):
            self._replace(self._state, self._fitting_parameters(), lams_of(self._lam, self._state.omega))
        return self._plan

    def _traced_penalty(self) -> Tensor:
        """Return the penalty without what torch.compile cannot trace; parameters are looked up in the model anew."""
        if not self._state.omega:
            return self._zero()
        plan = self._plan
        parameters = None if plan is None else plan.parameters_in(self.model)
        if plan is None or parameters is None:
            return self._untraced("penalty")
        return traced_penalty_value(plan.groups, parameters) if plan.groups else self._zero()

    # The public decorator imports the compiler.
    @torch._disable_dynamo
    def _untraced(self, method: str) -> Tensor:
        return getattr(self, method)()

    def _held(self, parameters: Sequence[Tensor]) -> Held:
        """Return what holds parameters of the model, for the optimizers; see `Plan.held_for`."""
        plan = self._current_plan()
        return nothing_holds(parameters) if plan is None else plan.held_for(parameters)

    def _unknown(self, parameters: Sequence[Tensor]) -> list[int]:
        """Return the indices of those parameters that are none of the model's, or have no Ω."""
        plan = self._current_plan()
        return list(range(len(parameters))) if plan is None else plan.unknown(parameters)

    def _zero(self) -> Tensor:
        first = next(self.model.parameters(), torch.empty(()))
        return torch.zeros((), device=first.device, dtype=torch.promote_types(first.dtype, torch.float32))
