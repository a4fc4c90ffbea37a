"""A pass over batches: run the model with its parameters watched, prove where the samples are, add to Ω.

Several ways lead to Ω, chosen per parameter: a rule for the call that the parameter meets data in; the gradients of a
few samples at a time where several uses must be summed first; and, for all else, one backward per sample for that
parameter alone. Nothing is skipped in silence: after every forward the graph is searched for uses that nothing saw.
"""

import math
import sys
import warnings
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mas_fast.capture import (  # noqa: F401  (each registers its rules)
    activation,
    attention,
    bag,
    bilinear,
    broadcast,
    conv,
    embedding,
    linear,
    norm,
    output_norm,
    product,
    transposed,
)
from mas_fast.capture.backward import Backward, Weighed, not_finite
from mas_fast.capture.call import tensors_in
from mas_fast.capture.forward import Forward
from mas_fast.capture.select import track
from mas_fast.capture.site import Site, SiteKey
from mas_fast.errors import CaptureError, LoopWarning

# Ω of matrices is read for inf and nan once in so many batches: for a small model, reading it is felt.
_CHECKED_EVERY = 8

MEMORY_BUDGET = 256 << 20


def uncompiled() -> AbstractContextManager[Any]:
    """Run compiled functions as they are written: compiled code hides the calls that the rules know."""
    # Importing torch._dynamo takes seconds; while nobody has, nothing is compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class Capture:
    """Accumulates Σ_n |∂objective_n/∂θ| over batches; the exact sums and how each parameter's was had.

    Args:
        parameters: Name -> parameter; those that require no gradient must not be among them.
        square: Accumulate squares instead of absolute values.
        dtype: Least dtype of the sums; never less than float32, nor than a float64 parameter's own.
        unsupported: "loop" takes one backward per sample for what no rule covers; "raise" lists it in a CaptureError.
        model: Where errors look for the names of layers, and the search for data for what is none.
        memory_budget: Bytes that gradients of single samples may take where they have to be formed.
        local: Each layer's gradient is that of ‖its own output‖², cut off from all others; where no call shows where a
            layer begins that is an error.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        square: bool = False,
        dtype: torch.dtype = torch.float32,
        unsupported: str = "loop",
        model: nn.Module | None = None,
        memory_budget: int = MEMORY_BUDGET,
        local: bool = False,
    ) -> None:
        if unsupported not in ("loop", "raise"):
            raise ValueError(f"unsupported must be 'loop' or 'raise', got {unsupported!r}")
        self.parameters = dict(parameters)
        self.square = square
        self.dtype = dtype
        self.unsupported = unsupported
        self.local = local
        self.local_values = torch.empty(0)  # objective + layers' of the last forward of a local scope, [N]
        self.model = model
        self.memory_budget = memory_budget
        self.num_samples = 0
        self.sums: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            wide = torch.promote_types(dtype, torch.float64 if parameter.dtype == torch.float64 else torch.float32)
            self.sums[name] = torch.zeros(parameter.shape, dtype=wide, device=parameter.device)
        self.whole = {name: track(name, p, self.sums[name]) for name, p in self.parameters.items()}
        self.fallback: dict[str, str] = {}  # name -> why it goes through the loop
        self.hidden: set[str] = set()  # of these, names whose calls show other tensors than the parameter itself
        self.rules: dict[str, str] = {}  # name -> rules that served it
        self.uses: dict[str, int] = dict.fromkeys(self.parameters, 0)
        self.joint: set[str] = set()  # names whose gradients are summed over several uses before |·|
        self.pulls_back = False  # gradients of single samples went from derived tensors to parameters
        self.sites: dict[SiteKey, Site] = {}
        self.alike: dict[Hashable, Site] = {}  # of calls in activation checkpoints, by what their repeats show
        self.disjoint: set[tuple[Hashable, str]] = set()  # (trace, name) of uses that share no entry
        self.explored: set[Hashable] = set()  # programs of which all taps are known, also those made in backwards
        self.batch_rows: int | None = None  # the first axis of all tensors of the batch, where that is known
        self.first_sample = 0  # where the samples start that run, in the batch that they are of
        self.hidden_graphs = False  # δ came where the graph of the objectives does not show a way
        self.constants = _constants(model)
        self.broken = False  # an error came after some of a batch had been added
        self.weighed: Weighed | None = None  # left by a forward for the next one of the same batch
        self.one_graph = False  # prove on one graph: the forwards of this batch differ
        self.tell_loop: Callable[[int, int], None] = lambda done, samples: None  # called in every loop over samples
        self._batches = 0
        self._alike: dict[bool, list[list[str]]] = {}  # names by dtype and device of their sums: of vectors, and of all
        for thoroughly in (False, True):
            groups: dict[tuple[torch.dtype, torch.device], list[str]] = {}
            for name, total in self.sums.items():
                if thoroughly or total.dim() < 2:
                    groups.setdefault((total.dtype, total.device), []).append(name)
            self._alike[thoroughly] = list(groups.values())
        self._announced = 0  # of how many parameters it has been said that they loop

    def accumulate(self, objectives: Callable[[], Tensor]) -> int:
        """Run a batch and add its samples' magnitudes to the sums.

        Args:
            objectives: Runs the model and returns one scalar per sample, [N]. It is called again for the proof of the
                layout, and if a run shows that a parameter has to be treated otherwise.

        Returns:
            N.

        Raises:
            CaptureError: Exactness cannot be had: see the message.
            FloatingPointError: An objective or a gradient is not finite. Of the gradient of a matrix without a bias
                this may be said some batches later.
        """
        self.check_whole()
        pending = set(self.parameters)
        samples = 0
        self.weighed, self.one_graph = None, False
        with torch.inference_mode(False), torch.enable_grad(), uncompiled():
            while pending:
                samples, pending = self._run(objectives, pending)
        if self.fallback and (self.unsupported == "raise" or (self.local and self.hidden)):
            raise CaptureError(self._list_fallback())
        self._batches += 1
        self.check_finite(thoroughly=self._batches % _CHECKED_EVERY == 0)
        self.broken = False
        self.num_samples += samples
        return samples

    @property
    def runs_alone(self) -> bool:
        """Whether a backward was run for every sample: through all that samples beside it went through, too."""
        return bool(self.fallback) or self.pulls_back

    def values_of(self, objectives: Callable[[], Tensor]) -> Tensor:
        """Return the objectives [N] of a batch, of a local scope with those of all layers, and add nothing."""
        with torch.inference_mode(False), torch.enable_grad(), uncompiled():
            forward = Forward(self)
            try:
                return forward.run(objectives).detach()
            finally:
                forward.end()

    def _run(self, objectives: Callable[[], Tensor], pending: set[str]) -> tuple[int, set[str]]:
        """Run forward and backward once; return N and what is still to be added. The graph is gone when it returns."""
        forward = Forward(self)
        try:
            values = forward.run(objectives)
            if forward.again:
                return len(values), pending
            backward = Backward(self, forward, values, pending)
            try:
                backward.run()
            finally:
                backward.end()
            return len(values), backward.left
        finally:
            forward.end()

    def check_whole(self) -> None:
        """Raise if an earlier error left a batch added in part.

        Raises:
            CaptureError: It did.
        """
        if self.broken:
            raise CaptureError(
                "capture must not go on after an error in the middle of a batch, got partial sums; start another"
            )

    def announce_loop(self, samples: int) -> None:
        """Warn of what the loop will cost, before it starts and again if more parameters come to need it."""
        if self._announced >= len(self.fallback):
            return
        self._announced = len(self.fallback)
        names = sorted(self.fallback)
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        warnings.warn(
            f"{len(names)} of {len(self.parameters)} parameters take one backward per sample, {samples} more for these "
            f"{samples} samples: {listed}; .coverage says why, unsupported='raise' makes it an error",
            LoopWarning,
            stacklevel=2,
        )

    def _list_fallback(self) -> str:
        lines = [
            f"  - {name} {list(self.parameters[name].shape)}: {reason}"
            for name, reason in sorted(self.fallback.items())
        ]
        return (
            f"no rule is exact for {len(lines)} of {len(self.parameters)} parameters:\n"
            + "\n".join(lines)
            + "\nwrite these calls with torch functions that return new tensors, pass unsupported='loop' for one "
            "backward per sample for these parameters, or leave them out with parameters="
        )

    def check_finite(self, thoroughly: bool = True) -> None:
        """Raise if a sum is not finite.

        Args:
            thoroughly: Look at all sums, and not only at those of vectors, which cost next to nothing: what is wrong
                with a layer's δ shows in its bias.

        Raises:
            FloatingPointError: One is not; names the parameters.
        """
        # A sum reads Ω once and takes no memory. Those that overflow by themselves are looked at again.
        groups = [[self.sums[name].sum() for name in names] for names in self._alike[thoroughly]]
        if not all(math.isfinite(float(torch.stack(sums).sum())) for sums in groups):
            bad = [name for name, total in self.sums.items() if not bool(total.isfinite().all())]
            if bad:
                raise FloatingPointError(not_finite(bad))


def _constants(model: nn.Module | None) -> dict[int, Tensor]:
    """Return what a model holds, by id: no data of a batch."""
    held: dict[int, Tensor] = {}
    for module in model.modules() if model is not None else ():
        # In lists and dicts of the module, too.
        for own in (module._parameters, module._buffers, module.__dict__):
            held.update((id(t), t) for value in own.values() for t in tensors_in(value))
    return held
