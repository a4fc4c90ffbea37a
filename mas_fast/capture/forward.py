"""One forward of one batch, watched: every use of a parameter is tapped, tracked further, or given up.

A call that uses a tracked tensor is understood in one of several ways, tried in this order and remembered by site:

    open     a composite call, such as multi-head attention, is run again in pieces that are watched themselves
    lend     the parameter only lends its dtype or shape
    rule     the call meets data and its family has a rule
    select   it only moves entries of the parameter
    call     it meets data, in whatever way: its own backward gives each sample's gradient
    hook     a gradient hook on what was picked: that is derived from the next forward on
    edit     no data is involved, and it writes into what was derived, or into a constant: that is derived from now on
    derive   no data is involved: what it returns is tracked, with its graph, in the parameters' place
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from mas_fast import batch_norm
from mas_fast.capture.binding import RULES, Binding, bind
from mas_fast.capture.broadcast import EXPANSIONS
from mas_fast.capture.call import call, changes_its_arguments, replaced, tensors_in
from mas_fast.capture.composite import COMPOSITES
from mas_fast.capture.refuse import refuse
from mas_fast.capture.select import LENDING, SELECTIONS, Tracked, looks_shared, select
from mas_fast.capture.site import Site
from mas_fast.capture.tap import Tap, TapFunction
from mas_fast.capture.trace import Trace
from mas_fast.errors import CaptureError
from mas_fast.kernels import products
from mas_fast.recompute import BACKWARDS, checkpoint_hook, is_first, is_repeat
from mas_fast.reference import graph_nodes

if TYPE_CHECKING:
    from mas_fast.capture.session import Capture

# Calls that take a tensor for its shape, dtype and device alone.
_MAKERS = frozenset(
    [
        *(getattr(torch.Tensor, f"new_{kind}") for kind in ("tensor", "zeros", "ones", "full", "empty")),
        *(getattr(torch, f"{kind}_like") for kind in ("zeros", "ones", "full", "empty", "rand", "randn")),
    ]
)

_HOOKS = frozenset([torch.Tensor.register_hook])

# Calls that only tell what kind of tensor one is: nothing flows through them.
_QUESTIONS = frozenset(
    [
        *(getattr(torch, name) for name in "is_floating_point is_complex numel".split()),
        *(
            getattr(torch.Tensor, name)
            for name in "dim ndimension size stride numel nelement element_size is_floating_point is_complex "
            "is_contiguous get_device __len__".split()
        ),
        *(getattr(torch.Tensor, name).__get__ for name in "shape ndim dtype device layout is_cuda _version".split()),
    ]
)

_PLAIN = (int, float, bool, str, torch.Size, type(None))

# What a way that does not fit returns, for None is a result.
_UNFIT = object()


class Forward(TorchFunctionMode):
    """Watches one forward.

    Attributes:
        taps: Where δ will be seen, in the order of the calls.
        unreached: Where it will not, because the graph of the objectives does not lead there.
        again: A call turned out to be understood wrongly: the batch must be run again.
        program: (trace, N), once the forward is through; what was proved for one holds for another like it.
        reentrant: Some calls were made out of sight of autograd, by a reentrant checkpoint, and come in the backward.
        recomputes: Calls are made again in the backward.
        half: Some of the calls that use parameters return float16.
        in_sweep: While a backward runs, told of every tap that it makes; else None.
    """

    def __init__(self, capture: "Capture") -> None:
        super().__init__()
        self.capture = capture
        self.taps: list[Tap] = []
        self.unreached: list[Tap] = []
        self.again = False
        self.program: Hashable = None
        self.trace = Trace()
        self.reentrant = False
        self.recomputes = False
        self.half = False
        self.in_sweep: Callable[[Tap], None] | None = None
        self._checkpoint = ""  # what an activation checkpoint was doing at the last call that used a parameter
        self.token = torch.zeros((), requires_grad=True)
        self._tracked: dict[int, Tracked] = {}
        self._constants: dict[int, Tensor] = {}  # made in this forward from no data
        self._free: dict[int, Tensor] = {}  # the same, with a graph: constants once detached
        self._wanted = {id(p) for p in capture.parameters.values()}
        self._cuts: dict[int, tuple[Tensor, Tensor]] = {}  # of a local scope: what a layer returned, and it detached
        self._layer_norms: list[Tensor] = []  # of the same, ‖·‖² by entry of its first axis
        self._turned: set[int] = set()  # sites that another way is to be tried for in the next forward
        self._counts: dict[tuple[str, tuple[str, ...]], int] = {}
        for name, source in capture.whole.items():
            if name not in capture.fallback:
                source.version = source.tensor._version
                self._tracked[id(source.tensor)] = source

    def end(self) -> None:
        """Let the graph go: it holds the taps."""
        self.taps.clear()
        self.unreached.clear()
        self._tracked.clear()
        self._constants.clear()
        self._free.clear()
        self._cuts.clear()
        self._layer_norms.clear()

    def run(self, objectives: Callable[[], Tensor]) -> Tensor:
        """Run the model; returns the objectives [N]."""
        versions = {name: p._version for name, p in self.capture.parameters.items()}
        with self:
            values = objectives()
        if self.capture.local:
            values = self._with_layers(values)
        self._check_unchanged(versions)
        self.program = (self.trace.key, len(values))
        if not self.again:
            self._find_unseen(values)
            self.find_reuse()
        return values

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a call; where it uses a tracked tensor, in the way that fits."""
        kwargs = kwargs or {}
        if func in _QUESTIONS:
            if self.in_sweep is None:
                self.trace.add(func, args, kwargs)  # what is asked may decide what is called on which tensor
            return func(*args, **kwargs)
        if self._cuts:
            args, kwargs = replaced(list(args), self._beyond_cut), replaced(dict(kwargs), self._beyond_cut)
        refuse(self.capture.model, func, args, kwargs)
        if self.in_sweep is None:
            self.trace.add(func, args, kwargs)
        elif func in BACKWARDS:
            with self:
                return BACKWARDS[func](*args, **kwargs)
        used = self._used(args, kwargs)
        if self.capture.local and not used and any(isinstance(t, nn.Parameter) for t in tensors_in([*args, kwargs])):
            # Of a layer that is not measured: those before it end here all the same.
            args, kwargs = replaced(list(args), self._cut), replaced(dict(kwargs), self._cut)
        if not used or not torch.is_grad_enabled():
            result = _run(func, args, kwargs)
            self._note_constant(func, args, kwargs, result)
            return result
        site = self._site(func, used, args, kwargs)
        while site.ways and not any(source.changed for source in used.values()):
            result = _WAYS[site.ways[site.way]](self, func, args, kwargs, used, site)
            if result is not _UNFIT:
                return result
            if not site.next_way():
                break
        changed = " after it was changed in place" if any(source.changed for source in used.values()) else ""
        result = func(*args, **kwargs)
        if any(t.requires_grad for t in tensors_in(result)):
            for source in used.values():
                self.give_up(source, f"used by {site.call}{changed}, which no rule covers in this form")
        return result

    def begin_sweep(self, found: Callable[[Tap], None]) -> None:
        """Watch a backward; `found` is told of every tap that is made in it."""
        self.in_sweep = found
        # In its own count, so that every backward of a batch finds the same sites.
        self._counts = dict.fromkeys(self._counts, 0)

    def give_up(self, source: Tracked, reason: str, seen: bool = True) -> None:
        """Understand the parameter otherwise from the next forward on: pick it differently, or loop over samples.

        Args:
            source: What a call met of it.
            reason: Why it loops, if it does.
            seen: The call is a torch function, which showed it among its arguments.
        """
        if source.origin is not None and (id(source.origin) in self._turned or source.origin.next_way()):
            self._turned.add(id(source.origin))
            self.again = True
            return
        for name in source.names:
            if name not in self.capture.fallback:
                self.capture.fallback[name] = reason
                if not source.whole or not seen:
                    # Of a local scope: calls that do not show the parameter itself cannot be told to begin a layer.
                    self.capture.hidden.add(name)
                # Its calls so far were detached from the graph that the loop needs.
                self.again |= any(name in s.names for tap in self.taps for s in tap.roles.values())

    # What a call uses, and how it is understood

    def _used(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[int, Tracked]:
        used = {}
        for a in (*args, *kwargs.values()):
            for t in a if isinstance(a, (tuple, list)) else (a,):
                source = self._tracked.get(id(t))
                # What an earlier call of this forward gave up must stay in the graph for the loop.
                if source is not None and not any(name in self.capture.fallback for name in source.names):
                    used[id(t)] = source
        return used

    def _site(self, func: Any, used: Mapping[int, Tracked], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Site:
        call_name = _call_name(func)
        names = tuple([name for source in used.values() for name in source.names])
        self._checkpoint = checkpoint_hook()
        if is_repeat(self._checkpoint):
            # It has to do what the first run did, and that was the same for all calls of its kind.
            alike = self.capture.alike.get(_kind(call_name, names, used, args, kwargs))
            if alike is not None:
                return alike
        count = self._counts[call_name, names] = self._counts.get((call_name, names), 0) + 1
        count = -count if self.in_sweep else count  # calls of the backward are other sites
        site = self.capture.sites.get((call_name, names, count))
        if site is None:
            ways = self._ways(func, used, args, kwargs)
            site = self.capture.sites[call_name, names, count] = Site(call_name, ways)
        if is_first(self._checkpoint):
            self.capture.alike.setdefault(_kind(call_name, names, used, args, kwargs), site)
        return site

    def _ways(
        self, func: Any, used: Mapping[int, Tracked], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[str, ...]:
        if func in COMPOSITES:
            return ("open", "call")
        if func in LENDING and id(args[0]) not in used:
            return ("lend",)
        if func in _HOOKS:
            return ("hook",)
        others = [t for t in tensors_in([*args, *kwargs.values()]) if id(t) not in used]
        meets_data = not all(self._is_constant(t) for t in others)
        if not meets_data and changes_its_arguments(func, kwargs):
            return ("edit",)
        known = [way for way, table in (("rule", RULES), ("select", SELECTIONS)) if func in table]
        if func is F.embedding and looks_shared(_argument(args, kwargs, 0, "input")):
            known = ["select", "rule"]
        if meets_data:
            return (*known, "call")
        # Without data a rule may still be it where a parameter is repeated for every sample.
        most = max(source.tensor.numel() for source in used.values())
        if func not in EXPANSIONS and not any(t.numel() > most for t in others):
            known = [way for way in known if way == "select" or func is F.embedding]
        return (*known, "derive")

    def _is_constant(self, t: Tensor) -> bool:
        """Return whether a tensor was made from no data, and nothing that depends on a parameter is in it now.

        A parameter that is wanted but not tracked takes the loop, whose graph must not be cut. Data without a gradient
        may have been written into it: that is as good as a constant here.
        """
        if id(t) not in self._constants and id(t) not in self.capture.constants:
            return False
        return not t.requires_grad or (t.is_leaf and id(t) not in self._wanted)

    def _note_constant(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Remember what was made from no data. An error here costs time only: what is derived is exact anyway."""
        if func not in _MAKERS:
            # What only lends its dtype leaves no data.
            given = args[:1] if func in LENDING else args if not kwargs else [*args, *kwargs.values()]
            for t in tensors_in(given):
                if not (self._is_constant(t) or id(t) in self._free or id(t) in self._tracked):
                    if self._free and changes_its_arguments(func, kwargs):
                        self._free.pop(id(args[0]) if args else 0, None)
                    return
        for t in tensors_in(result):
            (self._free if t.requires_grad and not t.is_leaf else self._constants)[id(t)] = t

    # The ways

    def _open(self, func: Any, args: Any, kwargs: Any, used: Mapping[int, Tracked], site: Site) -> Any:
        with self:
            return COMPOSITES[func](*args, **kwargs)

    def _lend(self, func: Any, args: Any, kwargs: Any, used: Mapping[int, Tracked], site: Site) -> Any:
        detached, named = _detached(args, kwargs, used)
        result = func(*detached, **named)
        self._note_constant(func, args, kwargs, result)
        return result

    def _by_rule(self, func: Any, args: Any, kwargs: Any, used: Mapping[int, Tracked], site: Site) -> Any:
        binding = bind(func, args, kwargs)
        if binding is None or not _fits(binding, used):
            return _UNFIT
        return self._tap(func, args, kwargs, binding, used, site)

    def _by_call(self, func: Any, args: Any, kwargs: Any, used: Mapping[int, Tracked], site: Site) -> Any:
        binding = call(func, args, kwargs, {key: source.tensor for key, source in used.items()})
        if binding is None:
            return _UNFIT
        if not site.differentiable:
            # Questions such as `h > w` or w.dtype: nothing flows back from the answer.
            result = func(*args, **kwargs)
            if not any(t.requires_grad for t in tensors_in(result)):
                return result
            site.differentiable = True
        return self._tap(func, args, kwargs, binding, used, site)

    def _select(self, func: Any, args: Any, kwargs: Any, used: Mapping[int, Tracked], site: Site) -> Any:
        if any(source.derived or source.names[0] in self.capture.joint for source in used.values()):
            return self._derive(func, args, kwargs, used, site)
        result = func(*args, **kwargs)
        results = list(tensors_in(result))
        if not any(t.requires_grad for t in results):
            return result
        if len(used) != 1 or (func is F.embedding and _argument(args, kwargs, 2, "padding_idx") is not None):
            return _UNFIT
        (source,) = used.values()
        name = "weight" if func is F.embedding else "input"
        if _argument(args, kwargs, 1 if func is F.embedding else 0, name) is not source.tensor:
            return _UNFIT
        picks = select(func, source, site, args, kwargs, results)
        if picks is None:
            return _UNFIT
        for pick in picks:
            self._tracked.setdefault(id(pick.tensor), pick)
        return result

    def _derive(self, func: Any, args: Any, kwargs: Any, used: Mapping[int, Tracked], site: Site) -> Any:
        if changes_its_arguments(func, kwargs):
            return _UNFIT
        result = func(*args, **kwargs)
        derived = [t for t in tensors_in(result) if t.requires_grad]
        if not derived:
            self._constants.update((id(t), t) for t in tensors_in(result))
            return result
        names = tuple(dict.fromkeys(name for source in used.values() for name in source.names))
        self._join(names)
        for t in derived:
            self._tracked.setdefault(id(t), Tracked.derived_from(names, t, site))
        return result

    def _hook(self, func: Any, args: Any, kwargs: Any, used: Mapping[int, Tracked], site: Site) -> Any:
        # A hook on a pick may change its gradient, which only a graph of its own shows. Those on parameters are left.
        for source in used.values():
            if not source.whole and not source.derived:
                self._join(source.names)
        return func(*args, **kwargs)

    def _edit(self, func: Any, args: Any, kwargs: Any, used: Mapping[int, Tracked], site: Site) -> Any:
        target = args[0] if args else None
        # Where others see the same memory, or a call has seen it before, one graph cannot stand for all that was seen.
        if not isinstance(target, Tensor) or kwargs.get("out") is not None or target.is_leaf and target.requires_grad:
            return _UNFIT
        seen = [source.tensor for tap in self.taps for source in tap.roles.values()]
        others = [source.tensor for source in self._tracked.values() if source.tensor is not target]
        base = target._base  # that of a call which returns a view of what only it has seen is nobody else's
        shared = base is not None and any(t is base or t._base is base for t in (*others, *self._constants.values()))
        if shared or any(t is target for t in seen) or any(t._base is target for t in others):
            return _UNFIT
        edited = used.get(id(target))
        names = tuple(dict.fromkeys(name for source in used.values() for name in source.names))
        if edited is not None and not edited.derived and self.capture.joint.issuperset(names):
            return _UNFIT
        result = func(*args, **kwargs)
        if target.requires_grad:
            self._join(names)  # from the next forward on, what was picked is derived
            self._tracked[id(target)] = Tracked.derived_from(names, target, site)
        elif self._tracked.pop(id(target), None) is not None:
            self._constants[id(target)] = target  # such as by detach_()
        return result

    def _join(self, names: Sequence[str]) -> None:
        """Have all gradients of these parameters summed before |·| is taken, from the next forward on."""
        self.again |= not self.capture.joint.issuperset(names)
        self.capture.joint.update(names)

    def _tap(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        binding: Binding,
        used: Mapping[int, Tracked],
        site: Site,
    ) -> Any:
        if torch._C._functorch.maybe_current_level() is not None:
            raise CaptureError(
                f"parameters must not be used inside of torch.vmap, got {', '.join(sorted(site_names(used)))} in "
                f"{site.call}; call the function on the whole batch"
            )
        given = args, kwargs
        args, kwargs = _detached(args, kwargs, used)
        if self.capture.local:
            args, kwargs = replaced(args, self._cut), replaced(kwargs, self._cut)
        output, *computed = binding.run(*args, **kwargs) if binding.run else [_run(func, args, kwargs)]
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return _UNFIT
        self.half |= output.dtype == torch.float16
        roles = {role: used[id(t)] for role, t in binding.roles.items() if id(t) in used}
        if binding.accumulate is None:
            for source in roles.values():
                self._join(source.names)
        tap = Tap(
            site,
            binding.rule,
            roles,
            binding.accumulate,
            binding.gradients,
            binding.join,
            output.shape,
            binding.axes,
        )
        self.recomputes |= is_first(self._checkpoint)
        # What a checkpoint repeats only gives back the tensors that the first run would have saved.
        if not is_repeat(self._checkpoint):
            if self.in_sweep is not None:
                self.in_sweep(tap)
            self.taps.append(tap)
        # Bias alone needs nothing of the forward.
        saved = [] if roles.keys() == {"bias"} else [t.detach() for t in (*binding.saved, *computed)]
        result = TapFunction.apply(output, self.token, tap, saved, binding.inplace, binding.view)
        self._note_constant(func, *given, result)
        return result

    # Layers of a local scope: each ends where the next call with parameters begins

    def _cut(self, t: Tensor) -> Tensor:
        """Return a tensor that a layer takes, without the graph of the layers before it, whose output it is."""
        if not t.requires_grad or not t.is_floating_point() or isinstance(t, nn.Parameter):
            return t
        if id(t) not in self._cuts:
            if t.dim() == 0:
                raise CaptureError("layers must return one row for each sample in scope='local', got a scalar")
            wide = t.to(torch.promote_types(t.dtype, torch.float32))
            self._layer_norms.append(wide.square().flatten(1).sum(1) if t.dim() > 1 else wide.square())
            self._cuts[id(t)] = (t, t.detach())
        return self._cuts[id(t)][1]

    def _beyond_cut(self, t: Tensor) -> Tensor:
        """Return what other calls see of a layer's output, such as those of a skip connection."""
        cut = self._cuts.get(id(t))
        return t if cut is None else cut[1]

    def _with_layers(self, values: Tensor) -> Tensor:
        """Return objectives + Σ over layers ‖output‖², by sample [N]."""
        if self.recomputes:
            raise CaptureError("activation checkpoints must be off in scope='local', got one; layers are cut there")
        for norms in self._layer_norms:
            if len(norms) % len(values):
                raise CaptureError(
                    "layers must have the samples first in scope='local', got an output whose first axis has "
                    f"{len(norms)} entries for {len(values)} samples"
                )
            values = values + norms.unflatten(0, (len(values), -1)).sum(1)
        self.capture.local_values = values.detach()
        return values

    # What the graph says

    def _check_unchanged(self, versions: Mapping[str, int]) -> None:
        changed = [name for name, p in self.capture.parameters.items() if p._version != versions[name]]
        if changed:
            raise CaptureError(
                f"parameters must not change during the forward, got in-place changes of {', '.join(changed)}; "
                "move the change out of forward()"
            )

    def _find_unseen(self, values: Tensor) -> None:
        """Give up on parameters that the graph reaches past every tap: used where no torch function shows them."""
        leaves, nodes, taps = _reached(values)
        own = {id(tap) for tap in self.taps}
        stale = [tap for key, tap in taps.items() if key not in own]
        if stale:
            raise CaptureError(
                f"what an earlier forward computed from {', '.join(sorted(stale[0].names))} was used again, as from a "
                "cache on the module; clear it in every forward"
            )
        # CopySlices hides a call that changes a view in place; other graphs inside of nodes are found by their δ.
        if not self.capture.hidden_graphs and not any("CopySlices" in node for node in nodes):
            # Calls that the objective does not depend on are no uses, and no δ will ever come by.
            self.unreached = [tap for tap in self.taps if id(tap) not in taps]
            self.taps = [tap for tap in self.taps if id(tap) in taps]
        self.reentrant = "CheckpointFunctionBackward" in nodes
        self.recomputes |= self.reentrant
        by_id = {id(p): name for name, p in self.capture.parameters.items() if name not in self.capture.fallback}
        unseen = {by_id[id(leaf)]: node for leaf, node in leaves if id(leaf) in by_id}
        if any([self._turn_selections(name) for name in unseen]):
            self.again = True
            return
        for name, node in unseen.items():
            if node == "CopySlices":
                reason = "written in place into a tensor that holds data"
            else:
                reason = f"used by {node} of the graph, behind no call that could be followed there"
            self.give_up(self.capture.whole[name], reason, seen=False)

    def _turn_selections(self, name: str) -> bool:
        """Take what was picked from a parameter for data instead: ids may have looked as if all samples shared them."""
        touched = [source for source in self._tracked.values() if name in source.names]
        origins = {id(s.origin): s.origin for s in touched if s.origin is not None}
        picks = [o for o in origins.values() if o.ways[o.way] == "select" and "rule" in o.ways[o.way :]]
        turned = [origin for origin in picks if origin.next_way()]
        if turned:
            # What followed from the pick was no reuse.
            self.capture.joint.difference_update(*(source.names for source in touched))
        return bool(turned)

    def find_reuse(self) -> None:
        """Join parameters with entries that are used twice: their gradients must be summed before |·|."""
        capture = self.capture
        uses: dict[str, list[Tracked]] = {}
        for tap in self.taps:
            for source in tap.roles.values():
                for name in source.names:
                    uses.setdefault(name, []).append(source)
        for name, sources in uses.items():
            capture.uses[name] = len(sources)
            key = (self.trace.key, name)
            if len(sources) == 1 or name in capture.joint or key in capture.disjoint:
                continue
            if not any(source.whole for source in sources):
                numbers = torch.cat([source.numbers().flatten() for source in sources])
                if numbers.unique().numel() == numbers.numel():
                    # Views are the same for every forward of this trace; copies may be by ids that differ.
                    if all(source.fold is None for source in sources):
                        capture.disjoint.add(key)
                    continue
            self._join((name,))


_WAYS: dict[str, Callable[..., Any]] = {
    "open": Forward._open,
    "lend": Forward._lend,
    "rule": Forward._by_rule,
    "select": Forward._select,
    "call": Forward._by_call,
    "edit": Forward._edit,
    "hook": Forward._hook,
    "derive": Forward._derive,
}


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return (batch_norm if func in batch_norm.FUNCTIONS else products).run(func, args, kwargs)


def site_names(used: Mapping[int, Tracked]) -> set[str]:
    """Return the names of all parameters that a call's arguments come from."""
    return {name for source in used.values() for name in source.names}


def _fits(binding: Binding, used: Mapping[int, Tracked]) -> bool:
    roles = [id(t) for t in binding.roles.values() if id(t) in used]
    # A tensor in two roles would have to be summed before |·|; one that is only data is no business of the rule.
    unique = len(roles) == len(set(roles)) == len(used)
    mutated = binding.inplace and id(next(iter(binding.roles.values()))) in used
    if any(isinstance(t, Tensor) and t.is_complex() for t in (*binding.roles.values(), *binding.saved)):
        return False
    return unique and not mutated and not (binding.single and len(used) > 1)


def _detached(args: Any, kwargs: Any, used: Mapping[int, Tracked]) -> tuple[Any, Any]:
    # No function that refers to itself is made here: only the garbage collector could take it away, and it would run
    # again and again just to do so.
    def detached(t: Tensor) -> Tensor:
        return t.detach() if id(t) in used else t

    # Most arguments are tensors or numbers, which need no walk.
    return (
        [detached(a) if isinstance(a, Tensor) else a if type(a) in _PLAIN else replaced(a, detached) for a in args],
        {key: replaced(a, detached) for key, a in kwargs.items()} if kwargs else {},
    )


def _kind(
    call_name: str, names: tuple[str, ...], used: Mapping[int, Tracked], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Hashable:
    """Return what calls have in common that the repeat of a checkpoint takes for one another."""

    def form(a: Any) -> Any:
        if isinstance(a, Tensor):
            return "used" if id(a) in used else "data", a.shape
        return tuple(form(item) for item in a) if isinstance(a, (tuple, list)) else type(a)

    return call_name, names, form(tuple(args)), tuple((key, form(a)) for key, a in kwargs.items())


@cache
def _call_name(func: Any) -> str:
    return resolve_name(func) or getattr(func, "__name__", repr(func))


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


def _reached(values: Tensor) -> tuple[list[tuple[Tensor, str]], set[str], dict[int, Tap]]:
    """Return the leaves that a graph reaches, each with the name of a node that uses it, all names, and taps by id."""
    leaves, names, taps = [], set(), {}
    for node, name, user in graph_nodes(values):
        names.add(name)
        if hasattr(node, "variable"):
            leaves.append((node.variable, user))
        elif hasattr(node, "tap"):
            taps[id(node.tap)] = node.tap
    return leaves, names, taps
