"""Ω and θ* of small parameters one behind the other: a list is handed to an op tensor by tensor, which takes time."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from mas_fast.encoded import Kept
from mas_fast.state import State

# Parameters of fewer entries are packed: to step a larger one takes long beside handing it over.
SMALL = 65536
# Entries that each begins at a multiple of, so that what was aligned stays so.
ALIGNMENT = 16


class Packed(NamedTuple):
    """A state, and the tensors that its Ω and θ* are parts of.

    Attributes:
        state: The state, in which those of small parameters share memory.
        omegas: Ω, one-dimensional.
        scales: Of Ω in 8 bits; without elements for floating numbers.
        anchors: θ*, of the same lengths as Ω.
        places: By name: the entry of the lists, the first number there, and the first scale.
    """

    state: State
    omegas: list[Tensor]
    scales: list[Tensor]
    anchors: list[Tensor]
    places: dict[str, tuple[int, int, int]]


def packed(state: State) -> Packed:
    """Return a state with Ω and θ* of small parameters of a kind together, in new memory; the others are left."""
    found = Packed(dataclasses.replace(state, omega=dict(state.omega), anchor=dict(state.anchor)), [], [], [], {})
    kinds: dict[object, list[str]] = {}
    for name, omega in state.omega.items():
        kind: object = name
        if 0 < omega.values.numel() < SMALL:
            tensors = omega.values, state.anchor[name].values
            kind = tuple((tensor.dtype, tensor.device, tensor.is_pinned()) for tensor in tensors)
        kinds.setdefault(kind, []).append(name)
    for names in kinds.values():
        if len(names) == 1:
            _keep_alone(found, names[0])
        else:
            _keep_together(found, names)
    return found


def unpacked(state: State) -> State:
    """Return a state in which every tensor has memory of its own: who saves one of them saves no other."""

    def apart(kept: dict[str, Kept]) -> dict[str, Kept]:
        return {name: one.alone() for name, one in kept.items()}

    return dataclasses.replace(state, omega=apart(state.omega), anchor=apart(state.anchor))


def _keep_alone(found: Packed, name: str) -> None:
    # Of an earlier state, other parameters may have shared its memory.
    omega = found.state.omega[name] = found.state.omega[name].alone()
    anchor = found.state.anchor[name] = found.state.anchor[name].alone()
    found.places[name] = len(found.omegas), 0, 0
    found.omegas.append(omega.values.view(-1))
    found.scales.append(omega.scales)
    found.anchors.append(anchor.values.view(-1))


def _keep_together(found: Packed, names: list[str]) -> None:
    omegas, anchors = ([kept[name] for name in names] for kept in (found.state.omega, found.state.anchor))
    firsts, blocks, entries, scales = [], [], 0, 0
    for omega in omegas:
        firsts.append(entries)
        blocks.append(scales)
        entries += -(-omega.values.numel() // ALIGNMENT) * ALIGNMENT
        scales += omega.scales.numel()
    of_omega = _new(omegas[0].values, entries)
    of_scales = _new(omegas[0].scales, scales)
    of_anchor = _new(anchors[0].values, entries)
    for index, name in enumerate(names):
        found.places[name] = len(found.omegas), firsts[index], blocks[index]
        omega = omegas[index]._replace(
            values=_moved(omegas[index].values, of_omega, firsts[index]),
            scales=_moved(omegas[index].scales, of_scales, blocks[index]),
        )
        found.state.omega[name] = omega
        values = _moved(anchors[index].values, of_anchor, firsts[index])
        found.state.anchor[name] = anchors[index]._replace(values=values)
    found.omegas.append(of_omega)
    found.scales.append(of_scales)
    found.anchors.append(of_anchor)


def _new(like: Tensor, count: int) -> Tensor:
    pinned = like.is_pinned()
    return torch.zeros(count, dtype=like.dtype, device=like.device, pin_memory=pinned)


def _moved(tensor: Tensor, to: Tensor, first: int) -> Tensor:
    """Copy a tensor into a longer one, and return it there."""
    return to[first : first + tensor.numel()].view(tensor.shape).copy_(tensor)
