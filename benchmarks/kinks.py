"""Which samples have a gradient that does not hang on the last digit of the forward pass.

A ReLU or a maximum takes one branch or the other. Where float32 and float64 take different ones, Ω differs by about
1e-4 in norm, whatever computed it: an error of the sample, not of the method that is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# In standard deviations of the activations; the rounding of a float32 forward is 1e-7 to 2e-6 of them in these cases.
MARGIN = 6e-6


class _SmallestMargin(TorchFunctionMode):
    """While active, keep for every sample its smallest distance to a branch of a ReLU or of a 2×2 maximum."""

    def __init__(self, num_samples: int) -> None:
        super().__init__()
        self.margin = torch.full((num_samples,), torch.inf)

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.relu:
            self._see(args[0].abs(), args[0].std())
        elif func is F.max_pool2d:
            windows = args[0].unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)  # [N, C, H/2, W/2, 4]
            first, second = windows.topk(2).values.unbind(-1)
            # A window of zeros lies behind closed ReLUs and passes no gradient, whichever of them is chosen.
            self._see((first - second).where(first > 0, torch.inf), args[0].std())
        return func(*args, **(kwargs or {}))

    def _see(self, distance: Tensor, scale: Tensor) -> None:
        self.margin = torch.minimum(self.margin, (distance / scale).flatten(1).amin(1).float())


def decided_samples(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the samples of a batch [M, …] whose branches are decided by more than `MARGIN`, as [≤ M, …]."""
    with torch.no_grad(), _SmallestMargin(len(batch)) as seen:
        model(batch)
    return batch[seen.margin > MARGIN]
