"""What a MAS knows of the tasks learned so far, as one value: merged with a new task, moved, adapted, loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from mas_fast.checks import bullets, list_mismatches, list_unusable, unusable_reason
from mas_fast.distributed import Ranks
from mas_fast.encoded import Decoded, Keeping, Kept, scales_shape
from mas_fast.importance import Importance
from mas_fast.merge import list_meaning_differences, merge_tensors
from mas_fast.names import parameter_name
from mas_fast.sharding import full, is_sharded, local, placed_like

ENTRIES = ("meaning", "num_samples", "omega", "anchor")
TENSOR_ENTRIES = ("omega", "scales", "anchor")

Parameters = Mapping[str, nn.Parameter]


@dataclasses.dataclass(frozen=True)
class State:
    """Ω, θ* and what they mean, replaced as a whole so that a failure changes nothing. No tensor is written to.

    Attributes:
        omega: Ω by parameter name.
        anchor: θ*, of the same names.
        num_samples: How many samples each Ω is of.
        meaning: As in `Importance.meaning`; empty before the first task.
    """

    omega: dict[str, Kept] = dataclasses.field(default_factory=dict)
    anchor: dict[str, Kept] = dataclasses.field(default_factory=dict)
    num_samples: dict[str, int] = dataclasses.field(default_factory=dict)
    meaning: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of Ω and θ*; of what is spread over ranks, this rank's."""
        return sum(kept.nbytes for kept in (*self.omega.values(), *self.anchor.values()))

    def check_fits(self, parameters: Parameters) -> None:
        """Raise unless every Ω has its parameter.

        Raises:
            ValueError: A parameter is missing or has another shape; all are listed.
        """
        problems = list_mismatches(self.omega, parameters, where="the model")
        if problems:
            raise ValueError(
                "model must have every parameter that has an omega (MAS.adapt follows a changed model), got mismatches:"
                f"{bullets(problems)}"
            )

    def placed(self, parameters: Parameters, keeping: Keeping) -> State:
        """Return this with everything where its parameter now is: on which device, and spread over ranks how."""
        if all(
            keeping.is_placed(kept, parameters[name])
            for entries in (self.omega, self.anchor)
            for name, kept in entries.items()
        ):
            return self

        def moved(kept: Mapping[str, Kept], again: Callable[[Tensor], Kept]) -> dict[str, Kept]:
            return {name: again(placed_like(one.tensor(), parameters[name])) for name, one in kept.items()}

        return dataclasses.replace(
            self, omega=moved(self.omega, keeping.omega), anchor=moved(self.anchor, keeping.anchor)
        )

    def entries(self) -> dict[str, Any]:
        """Return this as nested plain dicts of tensors and numbers.

        Ω in 8 bits is uint8, with its scales in an entry of their own; but of sharded parameters it is decoded, so that
        it can be gathered, and sharded anew.
        """
        coded = {name for name, kept in self.omega.items() if kept.is_coded and kept.spread is None}
        return {
            "meaning": dict(self.meaning),
            "num_samples": dict(self.num_samples),
            "omega": {name: kept.values if name in coded else kept.tensor() for name, kept in self.omega.items()},
            "scales": {name: self.omega[name].scales for name in self.omega if name in coded},
            "anchor": dict(Decoded(self.anchor)),
        }


def merged(
    state: State, model: nn.Module, parameters: Parameters, importance: Importance, keeping: Keeping, **merge: Any
) -> State:
    """Return a state with one more task: its Ω merged into that of the earlier tasks, and θ* = θ now.

    Args:
        state: Of the earlier tasks.
        model: The model.
        parameters: Its parameters by name.
        importance: Of the new task.
        keeping: How the new Ω and θ* are kept.
        **merge: `how` and `alpha` of `merge_tensors`.

    Raises:
        ValueError: Something does not fit, overflows, or is not finite; all such are listed.
    """
    old = state.omega
    # A name that fits is a plain one already, whatever else it could be the wrapped name of.
    new = {name if name in parameters else parameter_name(model, name): omega for name, omega in importance.items()}
    names = [name for name in parameters if name in old or name in new]
    problems = [line for omegas in (old, new) for line in list_mismatches(omegas, parameters, where="the model")]
    problems += list_meaning_differences(state.meaning, importance.meaning)
    problems += list_unusable({name: parameters[name] for name in names}, what="the model's ")
    if problems:
        raise ValueError(
            "importance must fit the model and the earlier tasks, and the model be finite, got:"
            f"{bullets(dict.fromkeys(problems))}"
        )

    # One parameter after the other, so that no more than one Ω is decoded at a time.
    omegas: dict[str, Kept] = {}
    num_samples: dict[str, int] = {}
    overflows: list[str] = []
    ranks = Ranks.holding(parameters[name] for name in names)
    part_of_rank = f" of the part of {ranks.name}"
    for name in names:
        like = parameters[name]
        counts = (state.num_samples.get(name, 0), importance.num_samples if name in new else 0)
        num_samples[name] = sum(counts)
        if name not in new and keeping.is_placed(old[name], like):
            omegas[name] = old[name]
            continue
        if name in old and name in new:
            omega = merge_tensors(placed_like(old[name].tensor(), like), new[name], counts, **merge)
        else:
            omega = placed_like(new[name], like).clone() if name in new else placed_like(old[name].tensor(), like)
        omegas[name] = keeping.omega(omega)
        reason = unusable_reason(local(omega), non_negative=True) or unusable_reason(omegas[name].checkable)
        if reason:
            overflows.append(f"the merged {name!r} {reason}{part_of_rank * is_sharded(like)}")
    anchors = {name: keeping.anchor(parameters[name].detach().clone()) for name in names}
    for name, kept in anchors.items():
        reason = unusable_reason(kept.values)
        if reason:
            overflows.append(f"the anchor of {name!r} {reason}{part_of_rank * is_sharded(parameters[name])}")
    overflows = [line for part in ranks.gather(overflows) for line in part]
    if overflows:
        raise ValueError(
            "omega must stay finite, got an overflow: use float32 importances, and wider dtypes for the state"
            f"{bullets(dict.fromkeys(overflows))}"
        )
    return State(omegas, anchors, num_samples, importance.meaning)


def from_entries(entries: Mapping[str, Any], parameters: Parameters, keeping: Keeping) -> State:
    """Return the state that `State.entries` describes, converted to how it is to be kept; its tensors are copied.

    Raises:
        ValueError: Ω and θ* do not fit the model or each other, or are invalid; everything is listed.
    """
    _check_kinds(entries)
    omega, anchor, num_samples = entries["omega"], entries["anchor"], entries["num_samples"]
    scales = entries.get("scales", {})
    coded = {name: codes for name, codes in omega.items() if codes.dtype == torch.uint8}
    problems = list_mismatches(omega, parameters, where="the model")
    problems += [f"the anchor of {line}" for line in list_mismatches(anchor, parameters, where="the model")]
    problems += [f"{name!r} has an omega and no anchor" for name in omega if name not in anchor]
    problems += [f"{name!r} has an anchor and no omega" for name in anchor if name not in omega]
    problems += [f"{name!r} has an omega and no num_samples" for name in omega if name not in num_samples]
    problems += [
        f"the omega of {name!r} is uint8 and has no float32 scales of shape {scales_shape(codes)}"
        for name, codes in coded.items()
        if name not in scales
        or scales[name].dtype != torch.float32
        or list(scales[name].shape) != scales_shape(codes)
        or is_sharded(codes)
    ]
    problems += [f"{name!r} has scales of an omega and no uint8 omega" for name in scales if name not in coded]
    floating = {name: tensor for name, tensor in omega.items() if name not in coded}
    problems += list_unusable(floating, what="the omega of ", non_negative=True)
    problems += list_unusable(scales, what="the scales of the omega of ", non_negative=True)
    problems += list_unusable(anchor, what="the anchor of ")
    if omega and sorted(entries["meaning"]) != ["objective", "scope", "statistic"]:
        problems.append(f"its meaning must state objective, scope and statistic, got {dict(entries['meaning'])}")
    if problems:
        raise ValueError(f"state must fit the model, got mismatches:{bullets(problems)}")

    omegas = {}
    # In the model's order, whatever that of a file is: sums are the same to the last bit.
    names = [name for name in parameters if name in omega]
    for name in names:
        tensor, like = omega[name], parameters[name]
        if name in coded and keeping.omega_dtype in (None, torch.uint8) and not is_sharded(like):
            omegas[name] = keeping.codes(tensor, scales[name], like.device)
        else:
            if name in coded:
                tensor = Kept(tensor.detach().contiguous(), scales[name].contiguous()).tensor()
            omegas[name] = keeping.omega(placed_like(tensor.detach(), like).clone())
    anchors = {name: keeping.anchor(placed_like(anchor[name].detach(), parameters[name]).clone()) for name in names}
    _refuse_overflow(omegas, anchors, parameters)
    return State(omegas, anchors, {name: int(num_samples[name]) for name in names}, dict(entries["meaning"]))


def _check_kinds(entries: Mapping[str, Any]) -> None:
    """Raise unless entries are mappings of names to what they must hold."""
    kinds = {"meaning": str, "num_samples": int, "omega": Tensor, "scales": Tensor, "anchor": Tensor}
    lines = []
    for entry, kind in kinds.items():
        own = entries.get(entry, {})
        if not isinstance(own, Mapping):
            lines.append(f"its {entry} is {type(own).__name__} and no mapping")
            continue
        lines += [
            f"its {entry} has {name!r}: {type(value).__name__}"
            for name, value in own.items()
            if not isinstance(name, str) or not isinstance(value, kind)
        ]
    if lines:
        raise ValueError(
            "state must map names to tensors (omega, scales, anchor), whole numbers (num_samples) and text (meaning), "
            f"got:{bullets(lines)}"
        )


def adapted(
    state: State,
    parameters: Parameters,
    keeping: Keeping,
    *,
    rename: Mapping[str, str],
    drop: Iterable[str],
    grow: Iterable[str],
) -> State:
    """Return a state that fits a changed model: some Ω forgotten, then some renamed, then some grown; see `MAS.adapt`.

    Raises:
        ValueError: A name or pattern matches nothing, names collide, a parameter did not just grow, or Ω still does not
            fit the model; everything is listed.
    """
    dropped, problems = _matches(drop, state.omega, "drop")
    kept_names = [name for name in state.omega if name not in dropped]
    problems += [f"rename has {name!r}, which has no omega" for name in rename if name not in kept_names]
    new_names = {name: rename.get(name, name) for name in kept_names}
    doubled = {new for new in new_names.values() if list(new_names.values()).count(new) > 1}
    problems += [f"rename makes {name!r} of more than one omega" for name in sorted(doubled)]
    grown, unmatched = _matches(grow, new_names.values(), "grow")
    problems += unmatched
    omega = {new: state.omega[name] for name, new in new_names.items()}
    anchor = {new: state.anchor[name] for name, new in new_names.items()}
    for name in grown:
        if name in parameters and not _is_corner(omega[name].shape, parameters[name].shape):
            shapes = f"{list(omega[name].shape)} and has {list(parameters[name].shape)}"
            problems.append(f"grow has {name!r}, which must not be smaller along any axis, and had {shapes}")
    growing = [name for name in grown if name in parameters and omega[name].shape != parameters[name].shape]
    rest = {name: kept for name, kept in omega.items() if name not in growing}
    problems += list_mismatches(rest, parameters, where="the model")
    problems += list_unusable({n: parameters[n] for n in growing}, what="the model's ")
    if problems:
        raise ValueError(f"adapt must make omega fit the model, got:{bullets(dict.fromkeys(problems))}")
    for name in growing:
        like = parameters[name]
        whole = full(like.detach()).clone(memory_format=torch.contiguous_format)
        old = full(omega[name].tensor()).to(whole.device)
        zeros = torch.zeros_like(whole, dtype=old.dtype)
        omega[name] = keeping.omega(placed_like(_with_corner(zeros, old), like))
        old = full(anchor[name].tensor()).to(whole.device)
        anchor[name] = keeping.anchor(placed_like(_with_corner(whole, old), like))
    _refuse_overflow(omega, anchor, parameters)
    num_samples = {new: state.num_samples[name] for name, new in new_names.items()}
    return State(omega, anchor, num_samples, state.meaning if omega else {})


def _refuse_overflow(omega: Mapping[str, Kept], anchor: Mapping[str, Kept], parameters: Parameters) -> None:
    """Raise if what is kept is not finite though what came in was: its dtype is too narrow."""
    ranks = Ranks.holding(parameters[name] for name in omega)
    lines = []
    for what, kept in (("omega", omega), ("anchor", anchor)):
        reasons = {name: unusable_reason(own.checkable) for name, own in kept.items()}
        lines += [f"the {what} of {name!r} {reason}" for name, reason in reasons.items() if reason]
    lines = [line for part in ranks.gather(lines) for line in part]
    if lines:
        raise ValueError(
            f"omega and anchor must stay finite, got an overflow: keep them in wider dtypes{bullets(lines)}"
        )


def _matches(patterns: Iterable[str], names: Iterable[str], argument: str) -> tuple[list[str], list[str]]:
    """Return the names that a pattern matches, and a line for each pattern that matches none."""
    names, patterns = list(names), [patterns] if isinstance(patterns, str) else list(patterns)
    found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    unmatched = [p for p in patterns if not any(fnmatchcase(name, p) for name in names)]
    return found, [f"{argument} has {pattern!r}, which matches no omega" for pattern in unmatched]


def _is_corner(small: torch.Size, large: torch.Size) -> bool:
    return len(small) == len(large) and all(a <= b for a, b in zip(small, large, strict=True))


def _with_corner(tensor: Tensor, corner: Tensor) -> Tensor:
    tensor[tuple(slice(size) for size in corner.shape)] = corner
    return tensor
