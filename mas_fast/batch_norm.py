"""Batch norm of a batch of one, whose backward on the CPU is wrong in torch where its strides mean nothing.

The stride of an axis of length 1 may be anything. Torch 2.13 reads from it whether memory is channels-last, takes
x and δ to be alike, and where they are not mixes up their entries: gradients are off by more than their norm, of
x, weight and bias, in training and in eval mode. Ordinary models meet it: flattened and turned around, as tokens of an
image are, x or δ comes with such strides.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mas_fast.recompute import BACKWARDS

FUNCTIONS = frozenset((F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm))


def run(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what one of FUNCTIONS returns; of one sample so that its backward is right.

    Args:
        function: The torch function.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """
    x: Any = args[0] if args else kwargs.get("input")
    of_one = type(x) is Tensor and x.is_cpu and x.dim() > 2 and x.shape[0] == 1
    if not of_one or torch._C._functorch.maybe_current_level() is not None:
        return function(*args, **kwargs)
    own = _with_own_strides(x)
    result = function(own, *args[1:], **kwargs) if args else function(**{**kwargs, "input": own})
    if result.requires_grad:
        result.register_hook(_with_own_strides)
    return result


def _with_own_strides(t: Tensor) -> Tensor:
    """Return a tensor whose axes of length 1 have the strides of contiguous memory; itself where they have."""
    # In a backward that is watched, too: nothing of this is a call of the model's.
    with torch._C.DisableTorchFunction():
        own = t.stride() == tuple(math.prod(t.shape[axis + 1 :]) for axis in range(t.dim()))
        return t if own else t.clone(memory_format=torch.contiguous_format)


class RightBatchNorm(TorchFunctionMode):
    """Runs what is inside, also what backwards make again, so that no batch norm of one sample has a wrong backward."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a call."""
        kwargs = kwargs or {}
        if func in BACKWARDS:
            with self:
                return BACKWARDS[func](*args, **kwargs)
        return run(func, args, kwargs) if func in FUNCTIONS else func(*args, **kwargs)
