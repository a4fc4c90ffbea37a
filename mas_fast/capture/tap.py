"""The point where a call's δ is seen: an identity in the graph, behind the call's ordinary output."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mas_fast.capture.binding import Accumulate, Gradients, Join
from mas_fast.capture.layout import Fingerprint, Layout
from mas_fast.capture.select import Tracked
from mas_fast.capture.site import Site
from mas_fast.errors import CaptureError


def _too_early(tap: "Tap", delta: Tensor, saved: tuple[Any, ...]) -> None:
    """Take a δ before the forward is through: only a gradient that is itself differentiated would be missed."""
    if torch.is_grad_enabled():
        raise CaptureError(
            f"a gradient taken inside the forward (create_graph=True) went through {tap.site.call}, with "
            f"{', '.join(sorted(tap.names))}; second derivatives are not supported"
        )


# (tap, δ, kept tensors)
Receive = Callable[["Tap", Tensor, tuple[Any, ...]], None]


@dataclass(slots=True)
class Tap:
    """One call of one forward whose δ adds to Ω."""

    site: Site
    rule: str
    roles: Mapping[str, Tracked]
    accumulate: Accumulate | None
    gradients: Gradients
    join: Join | None
    shape: torch.Size  # of the output
    candidates: Callable[[torch.Size, torch.Size], Iterable[int]]  # see `Binding.axes`
    receive: Receive = _too_early
    layout: Layout | None = field(default=None)  # where the samples of this forward are, once that is known
    weighted: Fingerprint | None = field(default=None)

    @property
    def axes(self) -> list[int]:
        """The axes of the output that may hold the samples."""
        shapes = [source.tensor.shape for source in self.roles.values()]
        return sorted({axis for shape in shapes for axis in self.candidates(self.shape, shape)})

    @property
    def names(self) -> set[str]:
        """The parameters that it serves."""
        return {name for source in self.roles.values() for name in source.names}


class TapFunction(torch.autograd.Function):
    """Identity whose backward hands δ to a Tap.

    The parameter is detached in the call itself, so its gradient is never formed. `token` is a leaf that makes autograd
    come by even where nothing else requires a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, token: Tensor, tap: Tap, saved: list[Tensor], inplace: bool, view: bool
    ) -> Tensor:
        """Return the output, as the call itself would have given it: new, changed in place, or a view."""
        ctx.tap = tap
        # Through autograd, so that a kept tensor that the model changes later is an error and not a wrong Ω.
        ctx.save_for_backward(*saved)
        if inplace:
            ctx.mark_dirty(output)
            return output
        # `.data` is no view to autograd: the model may go on to change the output in place, as with ReLU(inplace=True).
        return output.view_as(output) if view else output.data

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        """Hand δ to the tap and pass it on."""
        ctx.tap.receive(ctx.tap, delta, ctx.saved_tensors)
        return delta, None, None, None, None, None
