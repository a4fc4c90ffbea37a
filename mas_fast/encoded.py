"""How Ω and θ* are kept: in which dtype, 8 bits a weight among them, on which device, and spread over ranks how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mas_fast.checks import DTYPES
from mas_fast.reference_steps import BLOCK
from mas_fast.sharding import is_sharded, local

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

OMEGA_DTYPES = (*DTYPES, torch.uint8)
STATE_DEVICES = ("cpu",)


class Keeping(NamedTuple):
    """How Ω and θ* are to be kept: the arguments of the same names of `MAS`; None for as they come."""

    omega_dtype: torch.dtype | None = None
    anchor_dtype: torch.dtype | None = None
    state_device: str | None = None

    def checked(self) -> Keeping:
        """Return this.

        Raises:
            ValueError: A value is none of the allowed.
        """
        for argument, value, allowed in (
            ("omega_dtype", self.omega_dtype, OMEGA_DTYPES),
            ("anchor_dtype", self.anchor_dtype, DTYPES),
            ("state_device", self.state_device, STATE_DEVICES),
        ):
            if value is not None and value not in allowed:
                raise ValueError(f"{argument} must be None or one of {', '.join(map(str, allowed))}, got {value}")
        return self

    def omega(self, tensor: Tensor) -> Kept:
        """Return Ω as it is kept, in its own memory where nothing has to be converted."""
        return _kept(tensor, self.omega_dtype, self.state_device)

    def anchor(self, tensor: Tensor) -> Kept:
        """Return θ* as it is kept, in its own memory where nothing has to be converted."""
        return _kept(tensor, self.anchor_dtype, self.state_device)

    def codes(self, codes: Tensor, scales: Tensor, device: torch.device) -> Kept:
        """Return Ω of a plain parameter on a device that was encoded before, as copies.

        Args:
            codes: uint8, in the shape of the parameter.
            scales: float32 [⌈numel / 128⌉].
            device: The parameter's.
        """
        copies = (t.detach().to(device, copy=True).contiguous() for t in (codes, scales))
        values, numbers = (_at_rest(tensor, self.state_device) for tensor in copies)
        return Kept(values, numbers)

    def is_placed(self, kept: Kept, parameter: Tensor) -> bool:
        """Return whether something is kept where its parameter wants it: on which device, and spread over ranks how."""
        device = torch.device("cpu") if _rests_on_host(parameter, self.state_device) else parameter.device
        if kept.values.device != device:
            return False
        ours, theirs = kept.spread, _spread_of(parameter)
        return (ours and ours[:2]) == (theirs and theirs[:2])


class Spread(NamedTuple):
    """How the ranks' parts make a whole: what a DTensor says beyond its own part."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]


class Kept(NamedTuple):
    """Ω or θ* of one parameter, or this rank's part of it. Nothing is written to the tensors.

    Attributes:
        values: Floating numbers or, of Ω in 8 bits, uint8 codes; in the shape of the part, contiguous.
        scales: float32 [⌈numel / 128⌉] for codes, without elements for floating numbers.
        spread: None for a tensor that is whole.
    """

    values: Tensor
    scales: Tensor
    spread: Spread | None = None

    @property
    def is_coded(self) -> bool:
        """Whether these are codes."""
        return self.values.dtype == torch.uint8

    @property
    def shape(self) -> torch.Size:
        """The shape of the parameter."""
        return self.values.shape if self.spread is None else self.spread.shape

    @property
    def nbytes(self) -> int:
        """Bytes of memory on this rank."""
        return self.values.nbytes + self.scales.nbytes

    @property
    def checkable(self) -> Tensor:
        """What is finite if all numbers are: of codes, the scales."""
        return self.scales if self.is_coded else self.values

    def alone(self) -> Kept:
        """Return this in memory that nothing else is in."""
        return self._replace(values=_alone(self.values), scales=_alone(self.scales))

    def tensor(self) -> Tensor:
        """Return the numbers: a DTensor if they are spread, in float32 if they were coded."""
        values = self.values
        if self.is_coded:
            values = torch.ops.mas_fast.decode_omega(values.flatten(), self.scales).view(values.shape)
        if self.spread is None:
            return values
        from torch.distributed.tensor import DTensor

        mesh, placements, shape, stride = self.spread
        values = values.to(mesh.device_type)
        return DTensor.from_local(values, mesh, placements, run_check=False, shape=shape, stride=stride)


class Decoded(Mapping[str, Tensor]):
    """What is kept, by parameter name, as tensors of the parameters' shapes; codes are decoded on each access."""

    # A Mapping would compare by ==, which for tensors has no single truth value.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(self, kept: Mapping[str, Kept]) -> None:
        """Look at `kept`."""
        self._kept = kept

    def __getitem__(self, name: str) -> Tensor:
        return self._kept[name].alone().tensor()

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        return f"<{len(self)} tensors: {', '.join(self)}>"


def _alone(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def scales_shape(codes: Tensor) -> list[int]:
    """Return the shape that the scales of codes have."""
    return [-(-codes.numel() // BLOCK)]


def _rests_on_host(tensor: Tensor, state_device: str | None) -> bool:
    return state_device == "cpu" and tensor.device.type == "cuda"


def _at_rest(tensor: Tensor, state_device: str | None) -> Tensor:
    if not _rests_on_host(tensor, state_device):
        return tensor
    # Pinned, so that kernels can read it from where it is.
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)


def _kept(tensor: Tensor, dtype: torch.dtype | None, state_device: str | None) -> Kept:
    part = local(tensor.detach()).detach()
    scales = part.new_empty(0, dtype=torch.float32)
    if dtype == torch.uint8:
        # The op itself, without its checks: errors that one rank alone meets are the caller's to report.
        codes, scales = torch.ops.mas_fast.encode_omega(part.float().contiguous())
        values = codes.view(part.shape)
    else:
        values = part.to(dtype or part.dtype).contiguous()
    return Kept(_at_rest(values, state_device), _at_rest(scales, state_device), _spread_of(tensor))


def _spread_of(tensor: Tensor) -> Spread | None:
    if not is_sharded(tensor):
        return None
    return Spread(tensor.device_mesh, tuple(tensor.placements), tensor.shape, tensor.stride())
