"""Calls for which no exact Ω exists. They are refused before they run, so that they cannot change anything either."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mas_fast.errors import CaptureError

# function -> position of `weight`; `training` is the sixth argument of both.
_BATCH_NORMS = {F.batch_norm: 3, torch.batch_norm: 1}
_MAX_NORMS = (F.embedding, F.embedding_bag)


def refuse(model: nn.Module | None, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise if a call mixes samples or changes parameters by its nature.

    Args:
        model: Where to look for the layer's name.
        function: The torch function.
        args: Arguments of the call.
        kwargs: Keyword arguments of the call.

    Raises:
        CaptureError: It does.
    """

    def argument(position: int, name: str) -> Any:
        return args[position] if len(args) > position else kwargs.get(name)

    if function in _BATCH_NORMS:
        if argument(5, "training") and argument(0, "input").shape[0] > 1:
            name = _batch_norm_name(model, argument(_BATCH_NORMS[function], "weight"))
            raise CaptureError(
                f"{name} normalises with the statistics of the batch, so its samples influence each other and no "
                "per-sample gradient exists; use running statistics (track_running_stats=True) or batches of one sample"
            )
    elif function in _MAX_NORMS and argument(3, "max_norm") is not None:
        raise CaptureError(
            "an embedding with max_norm changes its weight in every forward, so there is no fixed θ to measure; "
            "renormalise the weight once yourself and set max_norm=None"
        )


def _batch_norm_name(model: nn.Module | None, weight: Tensor | None) -> str:
    names = [
        repr(name)
        for name, module in (model.named_modules() if model is not None else ())
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.weight is weight
        and (module.training or module.running_mean is None)
    ]
    return f"batch norm {' or '.join(names)}" if names else "a batch norm"


class Refusing(TorchFunctionMode):
    """While active, refuses what `refuse` refuses.

    Attributes:
        eps: Of the coarsest floating-point numbers that a call returned, or may have used inside under autocast.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eps = 0.0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a call unless it is refused."""
        refuse(self.model, func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple) else (result,):
            if isinstance(t, Tensor) and t.is_floating_point():
                auto = torch.is_autocast_enabled(t.device.type)
                used = (t.dtype, torch.get_autocast_dtype(t.device.type)) if auto else (t.dtype,)
                self.eps = max(self.eps, *(torch.finfo(dtype).eps for dtype in used))
        return result
