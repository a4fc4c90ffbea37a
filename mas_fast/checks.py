"""Checks of what is handed in, and errors that list everything that is wrong at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from mas_fast.distributed import Ranks
from mas_fast.sharding import is_sharded, local

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def one_of(argument: str, value: str, allowed: tuple[str, ...]) -> str:
    """Return `value`.

    Raises:
        ValueError: It is not among the allowed.
    """
    if value not in allowed:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


class Shaped(Protocol):
    """What has a shape: a tensor, or what stands for one."""

    @property
    def shape(self) -> torch.Size:
        """The sizes of its axes."""


def list_mismatches(found: Mapping[str, Shaped], expected: Mapping[str, Tensor], *, where: str) -> list[str]:
    """Return one line for each tensor of `found` that `expected` lacks or has in another shape.

    Args:
        found: The tensors to check.
        expected: The tensors they must fit.
        where: What `expected` is, for the messages, such as "the model".
    """
    lines = []
    for name, tensor in found.items():
        if name not in expected:
            lines.append(f"{name!r} of shape {list(tensor.shape)} is missing from {where}")
        elif tensor.shape != expected[name].shape:
            lines.append(f"{name!r} has shape {list(tensor.shape)}, {where} has {list(expected[name].shape)}")
    return lines


def bullets(lines: Iterable[str]) -> str:
    """Return the lines as an indented list that follows an error's first line."""
    return "".join(f"\n  - {line}" for line in lines)


def unusable_reason(tensor: Tensor, *, non_negative: bool = False) -> str | None:
    """Return None for a dense real tensor whose entries are all finite, otherwise what is wrong with it.

    Args:
        tensor: The tensor to check. On an accelerator this waits for its values.
        non_negative: Whether negative entries are wrong too.
    """
    if tensor.dtype not in DTYPES:
        return f"is of {tensor.dtype}: convert it to one of {', '.join(map(str, DTYPES))}"
    if tensor.layout != torch.strided:
        return f"is of layout {tensor.layout}: convert it with .to_dense()"
    if tensor.is_meta:
        return "is on the meta device: it has no values"
    if tensor.numel() == 0:
        return None
    # One pass and no temporary: a NaN anywhere is both the minimum and the maximum.
    tensor = tensor.detach()
    low, high = (float(value) for value in torch.aminmax(tensor))
    if math.isfinite(low) and math.isfinite(high) and not (non_negative and low < 0):
        return None
    wrong = ~tensor.isfinite() | (tensor < 0 if non_negative else False)
    index = wrong.nonzero()[0].tolist()
    value = float(tensor[tuple(index)])
    return f"has {int(wrong.sum())} of {tensor.numel()} entries wrong, the first is {value} at {index}"


def list_unusable(tensors: Mapping[str, Tensor], *, what: str = "", non_negative: bool = False) -> list[str]:
    """Return one line for each tensor that `unusable_reason` finds fault with; `what` goes before its name.

    Of DTensors each rank looks at its own part; all ranks that hold parts must call this, and get the lines of all.
    """
    ranks = Ranks.holding(tensors.values())
    lines = []
    for name, tensor in tensors.items():
        reason = unusable_reason(local(tensor), non_negative=non_negative)
        if reason:
            lines.append(f"{what}{name!r} {reason}{f' of the part of {ranks.name}' if is_sharded(tensor) else ''}")
    return list(dict.fromkeys(line for part in ranks.gather(lines) for line in part))
