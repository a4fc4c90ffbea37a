"""How a MAS keeps Ω: as a floating-point tensor, or in 8 bits per weight; either in the place of its parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mas_fast.kernels.steps import decode_omega, encode_omega
from mas_fast.sharding import is_sharded, local, placed_like, same_place

if TYPE_CHECKING:
    from torch.distributed.tensor import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

OMEGA_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8)


class Encoded(NamedTuple):
    """Ω in 8 bits (`reference_steps.encode_omega`); of a DTensor, this rank's part.

    Attributes:
        codes: uint8, flat.
        scales: float32, one for each block of codes.
        shape: Of the whole parameter.
        local_shape: Of this rank's part.
        spread: How it is spread over ranks; None if it is not.
    """

    codes: Tensor
    scales: Tensor
    shape: torch.Size
    local_shape: torch.Size
    spread: tuple[DeviceMesh, tuple[Placement, ...]] | None

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device


Kept = Tensor | Encoded


def encode(omega: Tensor, dtype: torch.dtype | None) -> Kept:
    """Return Ω as it is kept.

    Args:
        omega: Finite and non-negative.
        dtype: torch.uint8 for 8 bits, or a floating dtype; None leaves it as it is.
    """
    if dtype != torch.uint8:
        return omega if dtype is None else omega.to(dtype)
    part = local(omega)
    codes, scales = encode_omega(part)
    spread = (omega.device_mesh, omega.placements) if is_sharded(omega) else None
    return Encoded(codes, scales, omega.shape, part.shape, spread)


def decode(kept: Kept) -> Tensor:
    """Return Ω as a tensor: of the parameter's shape, spread over ranks as the parameter is."""
    if isinstance(kept, Tensor):
        return kept
    part = decode_omega(kept.codes, kept.scales).view(kept.local_shape)
    if kept.spread is None:
        return part
    from torch.distributed.tensor import DTensor

    stride = torch.empty(kept.shape, device="meta").stride()
    return DTensor.from_local(part, *kept.spread, run_check=False, shape=kept.shape, stride=stride)


def kept_like(kept: Kept, like: Tensor) -> Kept:
    """Return what is kept on the device of a parameter and spread as that is; itself if it is already."""
    if isinstance(kept, Tensor):
        return placed_like(kept, like)
    if is_kept_like(kept, like):
        return kept
    spread = (like.device_mesh, like.placements) if is_sharded(like) else None
    if spread == kept.spread:
        return kept._replace(codes=kept.codes.to(like.device), scales=kept.scales.to(like.device))
    return encode(placed_like(decode(kept), like), torch.uint8)


def is_kept_like(kept: Kept, like: Tensor) -> bool:
    """Return whether what is kept is on the device of a parameter and spread as that is."""
    if isinstance(kept, Tensor):
        return same_place(kept, like)
    spread = (like.device_mesh, like.placements) if is_sharded(like) else None
    return kept.device == like.device and kept.spread == spread


def parts_of(kept: Kept) -> tuple[Tensor, Tensor]:
    """Return what the kernels read: Ω or its codes, and its scales; of this rank, contiguous."""
    if isinstance(kept, Encoded):
        return kept.codes, kept.scales
    part = local(kept).contiguous()
    return part, part.new_empty(0, dtype=torch.float32)


class Decoded(Mapping[str, Tensor]):
    """Ω by name, decoded when it is looked at."""

    def __init__(self, kept: Mapping[str, Kept], decode: Callable[[Kept], Tensor] = decode) -> None:
        """Wrap what is kept."""
        self._kept = kept
        self._decode = decode

    def __getitem__(self, name: str) -> Tensor:
        return self._decode(self._kept[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        return f"<Ω of {', '.join(self._kept)}>"
