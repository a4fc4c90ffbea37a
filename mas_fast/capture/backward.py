"""The backwards over one watched forward: prove where the samples are, then add to Ω.

Up to three sweeps go from the objectives to the taps and no further, so that no parameter's gradient is ever formed:
WEIGH, with every sample weighted by its own power of two, for the proof (layout.py); PROVE, where a parameter with
several calls has to be added for all of them or for none; and ADD, which proves what is left to prove, and adds.
"""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from mas_fast.capture.binding import Delta
from mas_fast.capture.forward import Forward
from mas_fast.capture.joint import Use, add_joint, components
from mas_fast.capture.layout import Fingerprint, Layout, prove, sample_weights
from mas_fast.capture.tap import Tap
from mas_fast.errors import CaptureError
from mas_fast.reference import magnitude, without_gradients

if TYPE_CHECKING:
    from mas_fast.capture.session import Capture


class _Phase(Enum):
    IDLE = auto()  # also the backwards of single samples
    WEIGH = auto()  # Σ w_n objective_n: fingerprints only
    PROVE = auto()  # Σ objective_n: compare fingerprints only
    ADD = auto()  # Σ objective_n: prove and accumulate


class Weighed(NamedTuple):
    """The fingerprints of the weighted δ that one forward leaves for the next of the same batch."""

    program: Hashable
    fingerprints: list[Fingerprint | None]  # by tap


class Backward:
    """The sweeps over one forward.

    Attributes:
        left: Parameters that must be done again, in another way.
    """

    def __init__(self, capture: "Capture", forward: Forward, values: Tensor, pending: set[str]) -> None:
        self.capture = capture
        self.forward = forward
        self.values = values
        self.pending = pending
        self.left: set[str] = set()
        self._samples = len(values)
        self._phase = _Phase.IDLE
        self._weights = torch.empty(0)
        self._weighed_elsewhere = False  # the weighted δ comes from another forward
        self._failed: list[tuple[Tap, str]] = []  # in this sweep: where the samples are could not be proved, and why
        self._infinite: set[str] = set()  # parameters whose δ holds inf or nan
        self._made = len(forward.taps)  # before the first sweep
        self._weighed: list[Fingerprint | None] = []  # by tap, once there was a weighted sweep
        self._uses: list[Use] = []  # of parameters whose gradients are summed before |·|
        for tap in forward.taps:
            self._prepare(tap, None)
        for tap in forward.unreached:
            tap.receive = self._receive_hidden

    def run(self) -> None:
        """Prove and add; what cannot be added yet is in `left`."""
        capture, taps = self.capture, self.forward.taps
        looped = [name for name in capture.fallback if name in self.pending]
        if not self.values.requires_grad:
            if taps or looped:
                raise CaptureError("objective must depend on the parameters, got a tensor without a graph")
            return
        self._check_finite()
        unproven = [tap for tap in taps if not self._proven(tap)]
        # The taps that only a backward makes are known after a first one.
        unseen = self.forward.reentrant and self.forward.program not in capture.explored
        if unproven or unseen:
            if not self._weigh():
                self.left = self.pending
                return
            every = {name for tap in unproven for name in tap.names}
            if unseen or any(capture.uses[name] > 1 and name not in capture.joint for name in every):
                # What is added at once must be added for all calls of a parameter, or for none.
                self._sweep(_Phase.PROVE)
                if self.left:
                    self.left = self.pending
                    return
        if self.forward.reentrant:
            capture.explored.add(self.forward.program)
        capture.broken = True  # until the whole batch is added
        if looped and capture.unsupported == "loop":
            capture.announce_loop(self._samples)
            self._loop(looped)
        self._sweep(_Phase.ADD, keep=False)
        self._add_joint()
        if self.forward.reentrant:
            self.forward.find_reuse()
        for fold in {id(s.fold): s.fold for tap in taps for s in tap.roles.values() if s.fold}.values():
            fold()
        self._note_rules()

    def end(self) -> None:
        """Let the graph go: it holds the taps, which report here, and the garbage collector cannot see through it."""
        self.values = self.values.detach()
        self._uses.clear()
        self._failed.clear()

    def _check_finite(self) -> None:
        values = self.values.detach()
        if not math.isfinite(float(values.sum())) and not bool(values.isfinite().all()):
            row = int((~values.isfinite()).nonzero()[0])
            sample = self.capture.first_sample + row
            raise FloatingPointError(f"objective must be finite, got {float(values[row])} for sample {sample}")

    def _proven(self, tap: Tap) -> bool:
        return self._samples == 1 or tap.layout is not None

    def _weigh(self) -> bool:
        """Get the fingerprints of the weighted δ to the taps; return False if that takes another forward.

        The weighted backward usually has a forward of its own: on one graph for both, all of it would stay in memory
        during the first. A model that does not run the same way twice gets both on one graph.
        """
        capture, program, taps = self.capture, self.forward.program, self.forward.taps
        weighed, capture.weighed = capture.weighed, None
        self._weights = sample_weights(self._samples, self.values, self.forward.half)
        if weighed is not None and weighed.program == program:
            self._weighed_elsewhere = True
            self._weighed = weighed.fingerprints
            for tap, fingerprint in zip(taps, self._weighed, strict=False):
                tap.weighted = fingerprint
            return True
        keep = capture.one_graph or weighed is not None
        self._sweep(_Phase.WEIGH, keep=keep)
        self._weighed = [tap.weighted for tap in taps]
        if capture.hidden_graphs and self.forward.unreached:
            return False
        if self.forward.reentrant:
            self.forward.find_reuse()
            keep &= not self.forward.again
        if not keep:
            capture.weighed = Weighed(program, self._weighed)
        return keep

    def _sweep(self, phase: _Phase, keep: bool = True) -> None:
        """Run a backward to the taps and no further: no parameter's gradient is formed."""
        objective = self.values * self._weights if phase is _Phase.WEIGH else self.values
        del self.forward.taps[self._made :]
        self._phase = phase
        try:
            # Without grad_outputs, for which torch imports 480 modules of its symbolic shapes.
            total = objective.sum()
            if self.forward.reentrant:
                # A reentrant checkpoint allows nothing else, though it forms gradients that nobody wants.
                with _no_gradients_left(self.capture.model, self.capture.parameters), self._watched():
                    torch.autograd.backward(total, retain_graph=keep)
            else:
                with self._watched():
                    torch.autograd.grad(total, self.forward.token, retain_graph=keep, allow_unused=True)
        finally:
            self._phase = _Phase.IDLE
        self._turn_failed()
        if self._infinite:
            raise FloatingPointError(not_finite([name for name in self.capture.parameters if name in self._infinite]))

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Watch calls that are made again in the backward, as activation checkpoints do."""
        if not self.forward.recomputes:
            yield
            return
        self.forward.begin_sweep(self._found)
        try:
            with self.forward:
                yield
        finally:
            self.forward.in_sweep = None

    def _prepare(self, tap: Tap, weighted: Fingerprint | None) -> None:
        tap.layout = tap.site.layouts.get(self.forward.program)
        tap.receive = self._receive
        tap.weighted = weighted

    def _found(self, tap: Tap) -> None:
        """Take up a tap that a backward makes."""
        place = len(self.forward.taps)
        self._prepare(tap, self._weighed[place] if place < len(self._weighed) else None)

    def _receive(self, tap: Tap, delta: Tensor, saved: tuple[Tensor, ...]) -> None:
        """Take a tap's δ, in whichever sweep this is."""
        if self._phase is _Phase.IDLE:
            return
        # What happens here is not the model's, and must not be watched.
        with torch._C.DisableTorchFunction() if self.forward.recomputes else nullcontext():
            self._take(tap, delta, saved)

    def _receive_hidden(self, tap: Tap, delta: Tensor, saved: tuple[Tensor, ...]) -> None:
        """Take a δ that came by way of a backward inside of a backward, as reversible layers have them."""
        if self._phase in (_Phase.PROVE, _Phase.ADD):
            raise CaptureError(
                f"δ of {tap.site.call} came by way of a graph inside of another, which an earlier sweep did not show; "
                "run the pass on batches of more than one sample"
            )
        self.capture.hidden_graphs |= self._phase is _Phase.WEIGH

    def _take(self, tap: Tap, delta: Tensor, saved: tuple[Tensor, ...]) -> None:
        if not self._proven(tap):
            fingerprint = Fingerprint.of(delta, tap.axes, scaled=self._phase is not _Phase.WEIGH)
            if self._phase is _Phase.WEIGH:
                tap.weighted = fingerprint
                return
            if fingerprint.vanishes(delta):
                return
            if not all(bool(scale.isfinite().all()) for scale in fingerprint.scales.values()):
                if bool(delta.isfinite().all()):
                    # By its norm the proof judges what it finds.
                    self._fail(
                        tap, f"the norm of the gradient of the output {list(tap.shape)} of {tap.site.call} overflows"
                    )
                else:
                    self._infinite.update(tap.names)
                return
            if tap.weighted is not None:
                # What was float16 on its way here has its small numbers rounded differently in the two backwards.
                coarsest = torch.float16 if self.forward.half and delta.dtype != torch.bfloat16 else delta.dtype
                proved = prove(fingerprint, tap.weighted, self._weights, torch.finfo(coarsest).eps)
                tap.layout = proved[0] if proved else None
                if len(proved) == 1 and self._holds_again(proved[0], tap.shape):
                    tap.site.remember(self.forward.program, proved[0])
            if tap.layout is None:
                unproved = (
                    f"no axis of the output {list(tap.shape)} of {tap.site.call} can be proved to hold the samples"
                )
                self._fail(tap, unproved)
                return
        if self._phase is _Phase.ADD:
            self._add(tap, Delta(delta, None if self._samples == 1 else tap.layout, self._samples), saved)

    def _holds_again(self, layout: Layout, shape: torch.Size) -> bool:
        """Return whether a layout holds for every forward of the same program.

        It does where each sample has one entry, for then any order is as good. Several entries of a sample may be
        grouped by data in ways that no trace shows, such as masks; not so where the rows of the batch are the samples,
        for then a regrouping would mix them.
        """
        if self.forward.trace.reads or layout.rows is not None:
            return False
        return shape[layout.axis] == self._samples or self.capture.batch_rows == self._samples

    def _add(self, tap: Tap, delta: Delta, saved: tuple[Tensor, ...]) -> None:
        omega: dict[str, Tensor] = {}
        for role, source in tap.roles.items():
            if not self.pending.issuperset(source.names):
                continue
            if source.derived or source.names[0] in self.capture.joint:
                self._uses.append(Use(tap, role, source, delta, saved))
            else:
                assert source.omega is not None
                omega[role] = source.omega
        if omega:
            assert tap.accumulate is not None
            tap.accumulate(omega, delta, saved, self.capture.square)

    def _fail(self, tap: Tap, reason: str) -> None:
        """Have a tap's parameters done again, in another way."""
        self._failed.append((tap, reason))
        self.left |= tap.names & self.pending

    def _turn_failed(self) -> None:
        """Turn what failed in a sweep to other ways: not during it, for a checkpoint must repeat what it did."""
        for tap, reason in self._failed:
            if self._weighed_elsewhere:
                # Perhaps the two forwards differed: ask again on one graph.
                self.capture.one_graph = True
            elif not tap.site.next_way():
                for source in tap.roles.values():
                    self.forward.give_up(source, reason)
        self._failed.clear()

    def _add_joint(self) -> None:
        """Add what is summed over several uses first, unless one of the uses has to be done again."""
        capture = self.capture
        capture.pulls_back |= any(use.source.derived for use in self._uses)
        for names, uses in components(self._uses):
            if names & self.left:
                self.left |= names & self.pending
            else:
                sums = {name: capture.sums[name] for name in names}
                options = capture.square, capture.memory_budget, self._watched
                add_joint(uses, sums, capture.parameters, self._samples, *options)
        self._uses.clear()

    def _note_rules(self) -> None:
        rules: dict[str, list[str]] = {}
        for tap in self.forward.taps:
            for source in tap.roles.values():
                for name in source.names:
                    if name not in self.left:
                        rules.setdefault(name, []).append(tap.rule + source.how)
        for name, said in rules.items():
            self.capture.rules[name] = " + ".join(dict.fromkeys(said))

    def _loop(self, names: Sequence[str]) -> None:
        capture = self.capture
        parameters = [capture.parameters[name] for name in names]
        if self.forward.reentrant:
            raise CaptureError(
                f"{', '.join(names)} need one backward per sample, which a reentrant activation checkpoint does not "
                "allow; pass use_reentrant=False to torch.utils.checkpoint"
            )
        # Hooks on parameters, such as those that mask gradients, are for training: no rule sees them either.
        hooks = [parameter._backward_hooks for parameter in parameters]
        try:
            for parameter in parameters:
                parameter._backward_hooks = None
            for sample in range(self._samples):
                with self._watched():
                    gradients = torch.autograd.grad(
                        self.values[sample], parameters, retain_graph=True, allow_unused=True
                    )
                for name, gradient in zip(names, gradients, strict=True):
                    if gradient is not None:
                        total = capture.sums[name]
                        total += magnitude(gradient.to(total.dtype), capture.square)
                capture.tell_loop(sample + 1, self._samples)
        finally:
            for parameter, own in zip(parameters, hooks, strict=True):
                parameter._backward_hooks = own


@contextmanager
def _no_gradients_left(model: nn.Module | None, watched: Mapping[str, Tensor]) -> Iterator[None]:
    """Give every parameter back the .grad that it has.

    Raises:
        CaptureError: A watched one got a gradient: some use of it was behind no tap.
    """
    with without_gradients(model.parameters() if model is not None else ()):
        yield
        unseen = [name for name, parameter in watched.items() if parameter.grad is not None]
        if unseen:
            raise CaptureError(
                f"{', '.join(unseen)} are used in a reentrant activation checkpoint in a way that no rule sees, and "
                "need one backward per sample, which it does not allow; pass use_reentrant=False to "
                "torch.utils.checkpoint"
            )


def not_finite(names: Sequence[str]) -> str:
    """Return the message for gradients that are not finite."""
    return f"gradient must be finite, got inf or nan in {', '.join(names)}"
