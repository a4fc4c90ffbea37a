"""What consolidate changes: Ω and θ* of the tasks learned so far, and how they follow a model that changes."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mas_fast.checks import bullets, list_mismatches, list_unusable
from mas_fast.encoded import Encoded, Kept, decode, encode, is_kept_like, kept_like
from mas_fast.importance import Importance
from mas_fast.merge import list_meaning_differences, merge_tensors
from mas_fast.names import parameter_name
from mas_fast.sharding import is_sharded, placed_like, same_place


@dataclasses.dataclass(frozen=True)
class State:
    """All that consolidate changes, replaced as a whole so that a failure changes nothing. No tensor is written to."""

    omega: dict[str, Kept] = dataclasses.field(default_factory=dict)
    anchor: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    num_samples: dict[str, int] = dataclasses.field(default_factory=dict)
    meaning: dict[str, str] = dataclasses.field(default_factory=dict)

    def mismatches(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """Return one line for each Ω that the model has no parameter of that name and shape for."""
        return list_mismatches(self.omega, parameters, where="the model")

    @property
    def num_bytes(self) -> int:
        """Bytes of Ω and θ*; of what is spread over ranks, this rank's."""
        tensors = list(self.anchor.values())
        for kept in self.omega.values():
            tensors += [kept.codes, kept.scales] if isinstance(kept, Encoded) else [kept]
        return sum(t.to_local().nbytes if is_sharded(t) else t.nbytes for t in tensors)

    def placed(self, parameters: Mapping[str, Tensor]) -> State:
        """Return the state where its parameters are; itself if it is there already."""
        omega, anchor = self.omega.items(), self.anchor.items()
        if all(is_kept_like(kept, parameters[name]) for name, kept in omega):
            if all(same_place(tensor, parameters[name]) for name, tensor in anchor):
                return self
        return dataclasses.replace(
            self,
            omega={name: kept_like(kept, parameters[name]) for name, kept in omega},
            anchor={name: placed_like(tensor, parameters[name]) for name, tensor in anchor},
        )


@dataclasses.dataclass(frozen=True)
class Keeping:
    """How a MAS keeps Ω and θ*: their dtypes, None for what they come in."""

    omega_dtype: torch.dtype | None = None
    anchor_dtype: torch.dtype | None = None

    def omega(self, tensor: Tensor) -> Kept:
        """Return Ω as it is kept."""
        return encode(tensor, self.omega_dtype)

    def anchor(self, tensor: Tensor) -> Tensor:
        """Return θ* as it is kept: new memory."""
        tensor = tensor.detach()
        return tensor.clone() if self.anchor_dtype in (None, tensor.dtype) else tensor.to(self.anchor_dtype)


def merge_into(
    state: State,
    importance: Importance,
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    how: str,
    alpha: float,
    keeping: Keeping,
) -> State:
    """Return the state after a task: Ω merged with its importance, θ* = θ now.

    Accumulated Ω is decoded, added to in float32, and encoded once.

    Raises:
        ValueError: They do not fit the model or each other, or the result overflows; all is listed.
    """
    old = state.omega
    # A name that fits is a plain one already, whatever else it could be the wrapped name of.
    new = {n if n in parameters else parameter_name(model, n): omega for n, omega in importance.items()}
    problems = state.mismatches(parameters) + list_mismatches(new, parameters, where="the model")
    problems += list_meaning_differences(state.meaning, importance.meaning)
    problems += list_unusable({n: parameters[n] for n in {**old, **new} if n in parameters}, what="the model's ")
    if problems:
        raise ValueError(
            f"importance must fit the model and the earlier tasks, and the model be finite, got:"
            f"{bullets(dict.fromkeys(problems))}"
        )
    omegas: dict[str, Kept] = {}
    num_samples = {}
    for name in {**old, **new}:
        like = parameters[name]
        counts = (state.num_samples.get(name, 0), importance.num_samples if name in new else 0)
        num_samples[name] = sum(counts)
        if name not in new:
            omegas[name] = kept_like(old[name], like)
        elif name not in old:
            omegas[name] = keeping.omega(placed_like(new[name], like).clone())
        else:
            before = decode(kept_like(old[name], like))
            omegas[name] = keeping.omega(merge_tensors(before, new[name], counts, how, alpha=alpha))
    unusable = list_unusable(
        {n: o for n, o in omegas.items() if isinstance(o, Tensor)}, what="the merged ", non_negative=True
    )
    if unusable:
        raise ValueError(f"omega must stay finite, got an overflow: use float32 importances{bullets(unusable)}")
    anchors = {name: keeping.anchor(parameters[name]) for name in omegas}
    return State(omegas, anchors, num_samples, importance.meaning)


def adapt(
    state: State,
    parameters: Mapping[str, Tensor],
    keeping: Keeping,
    rename: Mapping[str, str],
    drop: Sequence[str],
    grow: Sequence[str],
) -> State:
    """Return the state for a model that has changed; see `MAS.adapt`.

    Raises:
        ValueError: Something does not fit; all is listed.
    """
    problems = [f"rename: {name!r} has no omega" for name in rename if name not in state.omega]
    problems += [f"drop: {pattern!r} fits no omega" for pattern in drop if not fnmatch.filter(state.omega, pattern)]
    dropped = {name for pattern in drop for name in fnmatch.filter(state.omega, pattern)}
    names = {name: rename.get(name, name) for name in state.omega if name not in dropped}
    twice = sorted({new for new in names.values() if list(names.values()).count(new) > 1})
    problems += [f"{name!r} would be the name of two" for name in twice]
    growing = {new for pattern in grow for new in fnmatch.filter(names.values(), pattern)}
    problems += [f"grow: {pattern!r} fits no omega" for pattern in grow if not fnmatch.filter(names.values(), pattern)]
    omegas: dict[str, Kept] = {}
    anchors: dict[str, Tensor] = {}
    for old, new in names.items():
        kept, anchor = state.omega[old], state.anchor[old]
        like = parameters.get(new)
        if new not in growing or like is None or kept.shape == like.shape:
            omegas[new], anchors[new] = kept, anchor
        elif is_sharded(like) or not _fits_into(kept.shape, like.shape):
            problems.append(f"grow: {new!r} has shape {list(kept.shape)}, the model has {list(like.shape)}")
        else:
            corner = tuple(slice(0, size) for size in kept.shape)
            omega = torch.zeros(like.shape, dtype=decode(kept).dtype, device=kept.device)
            omega[corner] = decode(kept)
            # Where nothing holds a new entry, its θ* is of no consequence.
            grown = like.detach().to(anchor.device, anchor.dtype, copy=True)
            grown[corner] = anchor
            omegas[new], anchors[new] = keeping.omega(omega), grown
    problems += list_mismatches(omegas, parameters, where="the model")
    if problems:
        raise ValueError(f"rename, drop and grow must make omega fit the model, got:{bullets(problems)}")
    counts = {new: state.num_samples[old] for old, new in names.items()}
    return State(omegas, anchors, counts, state.meaning if omegas else {})


def _fits_into(small: Iterable[int], large: Iterable[int]) -> bool:
    small, large = list(small), list(large)
    return len(small) == len(large) and all(s <= size for s, size in zip(small, large, strict=True))
