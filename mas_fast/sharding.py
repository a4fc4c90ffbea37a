"""Tensors that are spread over ranks (DTensors): one rank's part, the whole, and one placed as another is."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor
from torch import distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Return whether a tensor is a DTensor, of which each rank holds a part."""
    # While nobody has imported it, there is none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, sharing its memory and its graph; a plain tensor is its own part."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def locals_of(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return this rank's parts of tensors, which are all spread over ranks or none is."""
    return [local(tensor) for tensor in tensors] if tensors and is_sharded(tensors[0]) else tensors


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor as a plain one; all ranks that hold parts of it must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def same_place(tensor: Tensor, like: Tensor) -> bool:
    """Return whether two tensors are on the same device, and spread over ranks in the same way if they are."""
    if tensor.device != like.device or is_sharded(tensor) != is_sharded(like):
        return False
    if is_sharded(tensor) and is_sharded(like):
        return tensor.device_mesh == like.device_mesh and tensor.placements == like.placements
    return True


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor on the device of another and spread over ranks as that is; the tensor itself if it is already.

    Args:
        tensor: A plain tensor must be the same on all ranks: each takes its part of it, without communication. Of a
            DTensor, all ranks that hold parts must call this.
        like: A tensor of the same shape.
    """
    if same_place(tensor, like):
        return tensor
    if not is_sharded(like):
        return full(tensor).to(like.device)
    if is_sharded(tensor) and tensor.device_mesh == like.device_mesh:
        return tensor.redistribute(placements=like.placements).to(like.device)
    from torch.distributed.tensor import distribute_tensor

    whole = full(tensor).detach().to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def holding_groups(tensors: Iterable[Tensor]) -> tuple[ProcessGroup, ...]:
    """Return the process groups of all ranks that hold parts of tensors, one for each axis of each mesh."""
    meshes = dict.fromkeys(tensor.device_mesh for tensor in tensors if is_sharded(tensor))
    return tuple(group for mesh in meshes for group in mesh.get_all_groups())


def splitting_groups(tensor: Tensor) -> tuple[ProcessGroup, ...]:
    """Return the process groups in which ranks hold different parts of a tensor, and not the same one."""
    if not is_sharded(tensor):
        return ()
    placements = enumerate(tensor.placements)
    return tuple(tensor.device_mesh.get_group(axis) for axis, placement in placements if placement.is_shard())


def sum_over_ranks(value: Tensor, groups: Iterable[ProcessGroup]) -> Tensor:
    """Sum a value over the ranks of every group, in place, and return it."""
    for group in groups:
        dist.all_reduce(value, group=group)
    return value
