"""The products of linear layers themselves, y = x Wᵀ + b and δ W, where `linear_` is faster than torch's own.

On x86-64 torch takes MKL, which runs its AVX-512 code on Intel's processors only. On an AMD EPYC with AVX-512 (Zen 5,
two cores, peak 528 GFLOP/s in float32) MKL reaches 205 to 225 GFLOP/s on the shapes of a transformer, `linear_` 440 to
500. Such products are most of what the pass over one costs besides Ω.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd import forward_ad

from mas_fast.kernels import ops
from mas_fast.machine import cpuinfo
from mas_fast.recompute import checkpoint_hook

# Below so many multiplications the way to the kernel takes what it saves.
LEAST_WORK = 1 << 21
# From this width on the kernel is the faster one for any number of rows; from the least on, for many of them.
FULL_WIDTH = 32
LEAST_WIDTH = 8
MANY_ROWS = 64

_MMS = frozenset((torch.mm, torch.Tensor.mm))
_MATMULS = _MMS | {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}
_ADDMMS = frozenset((torch.addmm, torch.Tensor.addmm))
_FUNCTIONS = _MATMULS | _ADDMMS | {F.linear}


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b of a W and b that get no gradients."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return y [*, O]."""
        ctx.save_for_backward(weight)
        return _product(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        """Return δ W [*, I]."""
        (weight,) = ctx.saved_tensors
        # Under create_graph=True the gradient is differentiated in turn.
        if torch.is_grad_enabled() or _is_transformed(delta):
            return delta @ weight, None, None
        # Not before the eyes of a watched backward, which would keep what it sees being made.
        with torch._C.DisableTorchFunction():
            return _product(delta, weight.mT, None), None, None


def run(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what a call returns, by `linear_` where it is a product that this is faster for.

    Args:
        function: The torch function.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """
    if function in _FUNCTIONS and torch_is_slow() and args and not kwargs:
        # What has no bias may say so.
        operands = args[:2] if function is F.linear and len(args) == 3 and args[2] is None else args
        layer = _as_linear(function, *operands) if all(map(_is_plain, operands)) else None
        if layer is not None and _fits(*layer):
            return _Linear.apply(*layer)
    return function(*args, **kwargs)


@cache
def torch_is_slow() -> bool:
    """Return whether torch multiplies by MKL and leaves half of this processor unused."""
    wide = ops.cpu_capability() == torch.backends.cpu.get_cpu_capability().lower() == "avx512"
    return wide and torch.backends.mkl.is_available() and cpuinfo("vendor_id") not in (None, "GenuineIntel")


def _is_plain(a: Any) -> bool:
    """Return whether the kernel may see an argument as it is."""
    plain = type(a) in (Tensor, nn.Parameter) and a.is_cpu and a.layout == torch.strided
    return plain and a.dtype in (torch.float32, torch.float64) and not a.is_neg()


def _as_linear(function: Any, *args: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return x [*, I], W [O, I] and b [O] of a call; None for one that is no linear layer, or an error."""
    bias: Tensor | None = None
    if function is F.linear and 2 <= len(args) <= 3:
        input, weight = args[:2]
        bias = args[2] if len(args) == 3 else None
    elif function in _MATMULS and len(args) == 2 and args[1].dim() == 2:
        input, weight = args[0], args[1].mT
    elif function in _ADDMMS and len(args) == 3 and args[2].dim() == 2 == args[1].dim():
        bias, input, weight = args[0], args[1], args[2].mT
    else:
        return None
    if function in _MMS and input.dim() != 2:
        return None
    if weight.dim() != 2 or input.dim() < 2 or input.shape[-1] != weight.shape[1] or input.dtype != weight.dtype:
        return None
    fits = bias is None or (bias.shape == weight.shape[:1] and bias.dtype == weight.dtype)
    return (input, weight, bias) if fits else None


def _fits(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether a product is worth it, and nothing but the gradient of x may be asked for."""
    rows = input.shape[:-1].numel()
    if rows * weight.numel() < LEAST_WORK or min(weight.shape) < (LEAST_WIDTH if rows >= MANY_ROWS else FULL_WIDTH):
        return False
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    # What is made again in the backward must save what was saved first, and may be made by torch's own product.
    return not (_is_transformed(input) or torch.is_autocast_enabled("cpu") or checkpoint_hook())


def _is_transformed(t: Tensor) -> bool:
    """Return whether a tensor is under torch.func, or has a tangent or a batch: a Function knows nothing of them."""
    level = torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0
    return level or torch._C._functorch.is_legacy_batchedtensor(t)


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output = input.new_empty((*input.shape[:-1], weight.shape[0]))
    ops.linear_(output.flatten(0, -2), input.flatten(0, -2), weight, bias)
    return output
