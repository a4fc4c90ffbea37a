"""Batch norm of a batch of one, whose backward on the CPU is wrong in torch where its strides mean nothing.

The stride of an axis of length 1 may be anything. Torch 2.13 reads from it whether memory is channels-last, takes
x and δ to be alike, and where they are not mixes up their entries: gradients are off by more than their norm, of
x, weight and bias, in training and in eval mode. Ordinary models meet it: flattened and turned around, as tokens of an
image are, x or δ comes with such strides.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FUNCTIONS = frozenset((F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm))


def is_of_one(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call is a batch norm of one sample."""
    if function not in _FUNCTIONS:
        return False
    x = args[0] if args else kwargs.get("input")
    plain = type(x) is Tensor and x.is_cpu and x.dim() > 2 and x.shape[0] == 1
    return plain and torch._C._functorch.maybe_current_level() is None


def run(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run a batch norm of one sample so that its backward is right.

    Args:
        function: The torch function.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """
    if args:
        args = [_with_own_strides(args[0]), *args[1:]]
    else:
        kwargs = {**kwargs, "input": _with_own_strides(kwargs["input"])}
    result = function(*args, **kwargs)
    if result.requires_grad:
        result.register_hook(_with_own_strides)
    return result


def _with_own_strides(t: Tensor) -> Tensor:
    """Return a tensor whose axes of length 1 have the strides of contiguous memory; itself where they have."""
    # In a backward that is watched, too: nothing of this is a call of the model's.
    with torch._C.DisableTorchFunction():
        strides, step = [], 1
        for size in reversed(t.shape):
            strides.append(step)
            step *= size
        own = t.stride() == tuple(reversed(strides))
        return t if own else t.clone(memory_format=torch.contiguous_format)


class RightBatchNorm(TorchFunctionMode):
    """Runs what is inside so that no batch norm of one sample has a wrong backward."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a call."""
        kwargs = kwargs or {}
        return run(func, args, kwargs) if is_of_one(func, args, kwargs) else func(*args, **kwargs)
