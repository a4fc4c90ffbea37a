"""The pass over one batch: run the model with its parameters watched, prove where the samples are, add to Ω.

Three ways lead to Ω, chosen per parameter: a rule for the call that the parameter meets data in, a selection that only
moves entries, and, for all else, one backward per sample for that parameter alone. Nothing is skipped in silence:
after every forward the graph is searched for uses that no rule saw.
"""

import math
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import Enum, auto
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from mas_fast.capture import broadcast, conv, embedding, linear, norm  # noqa: F401  (each registers its rules)
from mas_fast.capture.binding import RULES, Binding, Delta, bind
from mas_fast.capture.layout import Fingerprint, prove, sample_weights
from mas_fast.capture.refuse import refuse
from mas_fast.capture.select import SELECTIONS, Tracked, looks_shared, select, track
from mas_fast.capture.site import Site, SiteKey
from mas_fast.capture.tap import Tap, TapFunction
from mas_fast.capture.trace import Trace
from mas_fast.errors import CaptureError
from mas_fast.reference import magnitude

# Ω of matrices is read for inf and nan once in so many batches: for a small model, reading it is felt.
_CHECKED_EVERY = 8


class _Phase(Enum):
    IDLE = auto()  # forward
    WEIGH = auto()  # backward of Σ w_n objective_n: fingerprints only
    PROVE = auto()  # backward of Σ objective_n: compare fingerprints only
    LOOP = auto()  # backward of single samples
    ADD = auto()  # backward of Σ objective_n: prove and accumulate


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
        model: Where errors look for the names of layers.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        square: bool = False,
        dtype: torch.dtype = torch.float32,
        unsupported: str = "loop",
        model: nn.Module | None = None,
    ) -> None:
        if unsupported not in ("loop", "raise"):
            raise ValueError(f"unsupported must be 'loop' or 'raise', got {unsupported!r}")
        self.parameters = dict(parameters)
        self.square = square
        self.dtype = dtype
        self.unsupported = unsupported
        self.model = model
        self.num_samples = 0
        self.sums: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            wide = torch.promote_types(dtype, torch.float64 if parameter.dtype == torch.float64 else torch.float32)
            self.sums[name] = torch.zeros(parameter.shape, dtype=wide, device=parameter.device)
        self.whole = {name: track(name, p, self.sums[name]) for name, p in self.parameters.items()}
        self.fallback: dict[str, str] = {}  # name -> why it goes through the loop
        self.rules: dict[str, str] = {}  # name -> rules that served it
        self.uses: dict[str, int] = dict.fromkeys(self.parameters, 0)
        self._sites: dict[SiteKey, Site] = {}
        self._disjoint: set[tuple[Hashable, str]] = set()  # (trace, name) of uses that share no entry
        self._batches = 0
        self._broken = False  # an error came after some of a batch had been added
        self._weighed: _Weighed | None = None  # left by a forward for the next one of the same batch
        self._one_graph = False  # prove on one graph: the forwards of this batch differ

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
        self._weighed, self._one_graph = None, False
        with torch.inference_mode(False), torch.enable_grad(), uncompiled():
            while pending:
                forward = _Forward(self, pending)
                try:
                    samples = forward.run(objectives)
                finally:
                    # Taps and forward refer to each other; only the garbage collector would find them.
                    forward.taps.clear()
                pending = forward.left
        if self.fallback and self.unsupported == "raise":
            raise CaptureError(self._list_fallback())
        self._batches += 1
        self.check_finite(thoroughly=self._batches % _CHECKED_EVERY == 0)
        self._broken = False
        self.num_samples += samples
        return samples

    def check_whole(self) -> None:
        """Raise if an earlier error left a batch added in part.

        Raises:
            CaptureError: It did.
        """
        if self._broken:
            raise CaptureError(
                "capture must not go on after an error in the middle of a batch, got partial sums; start another"
            )

    def _list_fallback(self) -> str:
        lines = [
            f"  - {name} {list(self.parameters[name].shape)}: {reason}"
            for name, reason in sorted(self.fallback.items())
        ]
        return (
            f"no rule is exact for {len(lines)} of {len(self.parameters)} parameters:\n"
            + "\n".join(lines)
            + "\npass unsupported='loop' for one backward per sample for these, or leave them out with parameters="
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
        sums: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for total in self.sums.values():
            if thoroughly or total.dim() < 2:
                sums.setdefault((total.dtype, total.device), []).append(total.sum())
        if not all(math.isfinite(float(torch.stack(group).sum())) for group in sums.values()):
            bad = [name for name, total in self.sums.items() if not bool(total.isfinite().all())]
            if bad:
                raise FloatingPointError(_not_finite(bad))


class _Weighed(NamedTuple):
    """The fingerprints of the weighted δ that a forward left behind."""

    program: Hashable
    fingerprints: list[Fingerprint | None]  # by tap


class _Forward(TorchFunctionMode):
    """One forward of one batch, watched, and the backwards over its graph."""

    def __init__(self, capture: Capture, pending: set[str]) -> None:
        super().__init__()
        self.capture = capture
        self.pending = pending  # parameters still to be accumulated for this batch
        self.left: set[str] = set()  # what must be done again, in another way
        self.tracked: dict[int, Tracked] = {}
        self.taps: list[Tap] = []
        self.counts: dict[tuple[str, tuple[str, ...]], int] = {}
        self.infinite: set[str] = set()  # parameters whose δ holds inf or nan
        self.again = False  # a call turned out to be understood wrongly
        self.weighed_elsewhere = False  # the weighted δ comes from another forward
        self.phase = _Phase.IDLE
        self.samples = 0
        self.weights = torch.empty(0)
        self.token = torch.zeros((), requires_grad=True)
        self.trace = Trace()
        self.program: Hashable = None  # (trace, N), once the forward is through
        for name, source in capture.whole.items():
            if name not in capture.fallback:
                source.version = source.tensor._version
                self.tracked[id(source.tensor)] = source

    # The forward

    def run(self, objectives: Callable[[], Tensor]) -> int:
        """Run forward and backwards; what is left to do in another forward is in `left`."""
        versions = {name: p._version for name, p in self.capture.parameters.items()}
        with self:
            values = objectives()
        self._check(values, versions)
        self.samples = len(values)
        if not self.again:
            self._find_unseen(values)
            self._find_reuse()
        if self.again:
            self.left = self.pending
            return self.samples
        self._backward(values)
        return self.samples

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a call; where it uses a tracked parameter, have its δ seen, or send the parameter to the loop."""
        kwargs = kwargs or {}
        refuse(self.capture.model, func, args, kwargs)
        self.trace.add(func, args, kwargs)
        used = self._used(args, kwargs)
        if not used or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        site = self._site(func, used, args, kwargs)
        while site.ways and not any(source.changed for source in used.values()):
            if site.ways[site.way] == "select":
                result = func(*args, **kwargs)
                if self._select(func, used, site, args, kwargs, result):
                    return result
            elif (binding := bind(func, args, kwargs)) is not None and self._fits(binding, used):
                return self._tap(func, args, kwargs, binding, used, site)
            if not site.next_way():
                break
        result = func(*args, **kwargs)
        if any(t.requires_grad for t in _tensors(result)):
            for source in used.values():
                self._give_up(source, f"used by {site.call}, which no rule covers in this form")
        return result

    def _used(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[int, Tracked]:
        used = {}
        for a in (*args, *kwargs.values()):
            for t in a if isinstance(a, (tuple, list)) else (a,):
                source = self.tracked.get(id(t))
                # What an earlier call of this forward gave up must stay in the graph for the loop.
                if source is not None and source.name not in self.capture.fallback:
                    used[id(t)] = source
        return used

    def _site(self, func: Any, used: Mapping[int, Tracked], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Site:
        call = _call_name(func)
        names = tuple(source.name for source in used.values())
        count = self.counts[call, names] = self.counts.get((call, names), 0) + 1
        site = self.capture._sites.get((call, names, count))
        if site is None:
            ways = tuple(way for way, table in (("rule", RULES), ("select", SELECTIONS)) if func in table)
            if func is F.embedding and looks_shared(_argument(args, kwargs, 0, "input")):
                ways = ("select", "rule")
            site = self.capture._sites[call, names, count] = Site(call, ways)
        return site

    def _select(
        self,
        func: Any,
        used: Mapping[int, Tracked],
        site: Site,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any,
    ) -> bool:
        results = _tensors(result)
        if not any(t.requires_grad for t in results):
            return True
        if len(used) != 1 or (func is F.embedding and _argument(args, kwargs, 2, "padding_idx") is not None):
            return False
        (source,) = used.values()
        picked_from = (
            _argument(args, kwargs, 1, "weight") if func is F.embedding else _argument(args, kwargs, 0, "input")
        )
        if picked_from is not source.tensor:
            # As in h.to(parameter): the parameter only lends its dtype, shape or device.
            return False
        picks = select(func, source, site, args, kwargs, results)
        if picks is None:
            return False
        for pick in picks:
            self.tracked.setdefault(id(pick.tensor), pick)
        return True

    def _fits(self, binding: Binding, used: Mapping[int, Tracked]) -> bool:
        roles = [id(t) for t in binding.roles.values() if id(t) in used]
        # A tensor in two roles would have to be summed before |·|; one that is only data is no business of the rule.
        unique = len(roles) == len(set(roles)) == len(used)
        mutated = binding.inplace and id(next(iter(binding.roles.values()))) in used
        if any(isinstance(t, Tensor) and t.is_complex() for t in (*binding.roles.values(), *binding.saved)):
            return False
        return unique and not mutated and not (binding.single and len(used) > 1)

    def _tap(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        binding: Binding,
        used: Mapping[int, Tracked],
        site: Site,
    ) -> Tensor:
        def detached(a: Any) -> Any:
            return a.detach() if id(a) in used else a

        _refuse_checkpoint()
        output = func(*map(detached, args), **{key: detached(a) for key, a in kwargs.items()})
        roles = {role: used[id(t)] for role, t in binding.roles.items() if id(t) in used}
        candidates = {axis for source in roles.values() for axis in binding.axes(output.shape, source.tensor.shape)}
        tap = Tap(site, binding.rule, roles, binding.accumulate, output.shape, tuple(sorted(candidates)), self._receive)
        self.taps.append(tap)
        # Bias alone needs nothing of the forward.
        saved = [] if roles.keys() == {"bias"} else [t.detach() for t in binding.saved]
        return TapFunction.apply(output, self.token, tap, saved, binding.inplace, binding.view)

    def _give_up(self, source: Tracked, reason: str) -> None:
        """Understand the parameter otherwise from the next forward on: pick it differently, or loop over samples."""
        if source.origin is not None and source.origin.next_way():
            self.again = True
        elif source.name not in self.capture.fallback:
            self.capture.fallback[source.name] = reason
            # Its calls so far were detached from the graph that the loop needs.
            self.again |= any(source.name == s.name for tap in self.taps for s in tap.roles.values())

    # What the graph says

    def _check(self, values: Tensor, versions: Mapping[str, int]) -> None:
        changed = [name for name, p in self.capture.parameters.items() if p._version != versions[name]]
        if changed:
            raise CaptureError(
                f"parameters must not change during the forward, got in-place changes of {', '.join(changed)}; "
                "move the change out of forward()"
            )
        if not math.isfinite(float(values.detach().sum())) and not bool(values.isfinite().all()):
            row = int((~values.detach().isfinite()).nonzero()[0])
            raise FloatingPointError(f"objective must be finite, got {float(values[row].detach())} for sample {row}")

    def _find_unseen(self, values: Tensor) -> None:
        """Give up on parameters that the graph reaches past every tap: used where no torch function shows them."""
        by_id = {id(p): name for name, p in self.capture.parameters.items()}
        for leaf in _leaves(values):
            name = by_id.get(id(leaf))
            if name is not None and name not in self.capture.fallback:
                source = self.tracked[id(leaf)]
                self._give_up(
                    source, "used in a way that torch functions do not show, such as a custom autograd.Function"
                )

    def _find_reuse(self) -> None:
        """Give up on parameters with entries that are used twice: their gradients must be summed before |·|."""
        uses: dict[str, list[Tracked]] = {}
        for tap in self.taps:
            for source in tap.roles.values():
                uses.setdefault(source.name, []).append(source)
        for name, sources in uses.items():
            self.capture.uses[name] = len(sources)
            key = (self.trace.key, name)
            if len(sources) == 1 or key in self.capture._disjoint:
                continue
            if not any(source.whole for source in sources):
                numbers = torch.cat([source.numbers().flatten() for source in sources])
                if numbers.unique().numel() == numbers.numel():
                    # Views are the same for every forward of this trace; copies may be by ids that differ.
                    if all(source.fold is None for source in sources):
                        self.capture._disjoint.add(key)
                    continue
            self._give_up(sources[0], f"used {len(sources)} times in one forward")

    # The backwards

    def _backward(self, values: Tensor) -> None:
        capture = self.capture
        looped = [name for name in capture.fallback if name in self.pending]
        if not values.requires_grad:
            if self.taps or looped:
                raise CaptureError("objective must depend on the parameters, got a tensor without a graph")
            return
        self.program = (self.trace.key, self.samples)
        for tap in self.taps:
            tap.layout = tap.site.layouts.get(self.program)
        unproven = [tap for tap in self.taps if not self._proven(tap)]
        if unproven:
            if not self._weigh(values):
                self.left = self.pending
                return
            if any(capture.uses[source.name] > 1 for tap in unproven for source in tap.roles.values()):
                # A parameter with several calls is added for all of them or for none.
                self._sweep(values, _Phase.PROVE, torch.ones_like(values))
                if self.left:
                    self.left = self.pending
                    return
        capture._broken = True  # until the whole batch is added
        if looped and capture.unsupported == "loop":
            self._loop(values, looped)
        self._sweep(values, _Phase.ADD, torch.ones_like(values), keep=False)
        for fold in {id(s.fold): s.fold for tap in self.taps for s in tap.roles.values() if s.fold}.values():
            fold()
        for tap in self.taps:
            for source in tap.roles.values():
                if source.name not in self.left:
                    capture.rules[source.name] = tap.rule if source.whole else f"{tap.rule} of a selection"

    def _weigh(self, values: Tensor) -> bool:
        """Get the fingerprints of the weighted δ to the taps; return False if that takes another forward.

        The weighted backward usually has a forward of its own: on one graph for both, all of it would stay in memory
        during the first. A model that does not run the same way twice gets both on one graph.
        """
        capture = self.capture
        weighed, capture._weighed = capture._weighed, None
        self.weights = sample_weights(self.samples, values)
        if weighed is not None and weighed.program == self.program:
            self.weighed_elsewhere = True
            for tap, fingerprint in zip(self.taps, weighed.fingerprints, strict=True):
                tap.weighted = fingerprint
            return True
        keep = capture._one_graph or weighed is not None
        self._sweep(values, _Phase.WEIGH, self.weights, keep=keep)
        if not keep:
            capture._weighed = _Weighed(self.program, [tap.weighted for tap in self.taps])
        return keep

    def _sweep(self, values: Tensor, phase: _Phase, seed: Tensor, keep: bool = True) -> None:
        """Run a backward to the taps and no further: no parameter's gradient is formed."""
        self.phase = phase
        try:
            # Without grad_outputs, for which torch imports 480 modules of its symbolic shapes.
            torch.autograd.grad((values * seed).sum(), self.token, retain_graph=keep, allow_unused=True)
        finally:
            self.phase = _Phase.IDLE
        if self.infinite:
            raise FloatingPointError(_not_finite([name for name in self.capture.parameters if name in self.infinite]))

    def _loop(self, values: Tensor, names: Sequence[str]) -> None:
        capture = self.capture
        parameters = [capture.parameters[name] for name in names]
        # Hooks on parameters, such as those that mask gradients, are for training: no rule sees them either.
        hooks = [parameter._backward_hooks for parameter in parameters]
        self.phase = _Phase.LOOP
        try:
            for parameter in parameters:
                parameter._backward_hooks = None
            for sample in range(self.samples):
                gradients = torch.autograd.grad(values[sample], parameters, retain_graph=True, allow_unused=True)
                for name, gradient in zip(names, gradients, strict=True):
                    if gradient is not None:
                        total = capture.sums[name]
                        total += magnitude(gradient.to(total.dtype), capture.square)
        finally:
            self.phase = _Phase.IDLE
            for parameter, own in zip(parameters, hooks, strict=True):
                parameter._backward_hooks = own

    def _proven(self, tap: Tap) -> bool:
        return self.samples == 1 or tap.layout is not None

    def _receive(self, tap: Tap, delta: Tensor, saved: tuple[Tensor, ...]) -> None:
        """Take a tap's δ, in whichever backward this is."""
        if self.phase is _Phase.IDLE and torch.is_grad_enabled():
            raise CaptureError(
                f"a gradient taken inside the forward (create_graph=True) went through {tap.site.call}, with "
                f"{', '.join(s.name for s in tap.roles.values())}; second derivatives are not supported"
            )
        if self.phase in (_Phase.IDLE, _Phase.LOOP):
            return
        if not self._proven(tap):
            fingerprint = Fingerprint.of(delta, tap.axes, self.samples, scaled=self.phase is not _Phase.WEIGH)
            if self.phase is _Phase.WEIGH:
                tap.weighted = fingerprint
                return
            if fingerprint.vanishes():
                return
            if not all(bool(scale.isfinite().all()) for scale in fingerprint.scales.values()):
                self.infinite.update(source.name for source in tap.roles.values())
                return
            if tap.weighted is not None:
                proved = prove(fingerprint, tap.weighted, self.weights, torch.finfo(delta.dtype).eps)
                tap.layout = proved[0] if proved else None
                # Rows of several samples on one axis may be regrouped from batch to batch in ways that no trace shows.
                folded = tap.layout is not None and tap.shape[tap.layout.axis] != self.samples
                if len(proved) == 1 and not folded and not self.trace.reads:
                    tap.site.remember(self.program, proved[0])
            if tap.layout is None:
                self._fail(tap)
                return
        if self.phase is _Phase.ADD:
            omega = {role: source.omega for role, source in tap.roles.items() if source.name in self.pending}
            layout = None if self.samples == 1 else tap.layout
            if omega:
                tap.accumulate(omega, Delta(delta, layout, self.samples), saved, self.capture.square)

    def _fail(self, tap: Tap) -> None:
        """Do a tap's parameters again, in another way."""
        if self.weighed_elsewhere:
            # Perhaps the two forwards differed: ask again on one graph.
            self.capture._one_graph = True
        elif not tap.site.next_way():
            reason = f"no axis of the output {list(tap.shape)} of {tap.site.call} can be proved to hold the samples"
            for source in tap.roles.values():
                self._give_up(source, reason)
        self.left |= {source.name for source in tap.roles.values()} & self.pending


def _refuse_checkpoint() -> None:
    """Raise inside an activation checkpoint: its second forward, in the backward, runs where no call is watched."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint":
        raise CaptureError(
            "activation checkpointing is not supported yet: its recomputation would go unseen; switch it off for the "
            "pass, as with model.gradient_checkpointing_disable()"
        )


def _not_finite(names: Sequence[str]) -> str:
    return f"gradient must be finite, got inf or nan in {', '.join(names)}"


@cache
def _call_name(func: Any) -> str:
    return resolve_name(func) or getattr(func, "__name__", repr(func))


def _tensors(result: Any) -> list[Tensor]:
    items: Iterable[Any] = result if isinstance(result, (tuple, list)) else (result,)
    return [item for item in items if isinstance(item, Tensor)]


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


def _leaves(values: Tensor) -> list[Tensor]:
    """Return the leaf tensors that a graph reaches."""
    leaves, seen, stack = [], set(), [values.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        stack.extend(function for function, _ in node.next_functions)
    return leaves
