"""Data-parallel models: the ranks that share the samples, and a pass during which no rank waits for another.

Ranks may run different numbers of batches, also none, so that no collective may run from the first forward of a pass to
its last backward. Wrappers are bypassed for that time, and what fully_shard has sharded is gathered before it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.utils import _apply_to_tensors
from torch.nn.parallel import DataParallel, DistributedDataParallel

from mas_fast.errors import CaptureError
from mas_fast.names import named_parameters
from mas_fast.sharding import holding_groups, is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")
PreHook = Callable[[nn.Module, Any, Any], tuple[Any, Any]]


class Ranks:
    """The processes that work on one model or hold one set of tensors. One that works alone never communicates.

    A rank that fails says so in the next exchange, so that no other waits for it in vain: all fail together.

    Attributes:
        groups: Process groups, one for each axis of the mesh of ranks; together they reach all of them.
        device: Of the tensors that are communicated.
        error: What the other ranks raise when one failed.
        apart: A rank has failed: there are no exchanges any more.
    """

    def __init__(
        self,
        groups: Iterable[ProcessGroup] = (),
        device: torch.device | None = None,
        error: type[Exception] = CaptureError,
    ) -> None:
        self.groups = tuple(groups)
        self.device = device or torch.device("cpu")
        self.error = error
        self.apart = False

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """Return the ranks that a model's samples are spread over: those of DistributedDataParallel or fully_shard.

        Args:
            model: Its FSDP modules must be sharded.

        Raises:
            CaptureError: The model is distributed in a way for which no exact Ω can be had.
        """
        spreads: dict[Hashable, tuple[ProcessGroup, ...]] = {}
        fsdp = sys.modules.get("torch.distributed.fsdp")
        for module in model.modules():
            if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
                raise CaptureError(
                    "model must not hold FullyShardedDataParallel modules, whose flat parameters have no names of "
                    "their own; use torch.distributed.fsdp.fully_shard"
                )
            if isinstance(module, DistributedDataParallel):
                spreads[module.process_group] = (module.process_group,)
        parameters = list(model.parameters())
        for parameter in parameters:
            if is_sharded(parameter):
                spreads.setdefault(parameter.device_mesh, holding_groups([parameter]))
        if len(spreads) > 1:
            raise CaptureError(
                f"model must be spread over one group of ranks by data parallelism alone, got {len(spreads)} groups: "
                f"{', '.join(map(str, spreads))}; tensor, expert and pipeline parallelism are not supported"
            )
        groups = next(iter(spreads.values()), ())
        return cls(groups, parameters[0].device if parameters else None)

    @classmethod
    def holding(cls, tensors: Iterable[Tensor], error: type[Exception] = RuntimeError) -> Ranks:
        """Return the ranks that hold parts of tensors; one that works alone if none is a DTensor."""
        tensors = list(tensors)
        return cls(holding_groups(tensors), tensors[0].device if tensors else None, error)

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints for all."""
        return all(dist.get_rank(group) == 0 for group in self.groups)

    @property
    def name(self) -> str:
        """What errors call this rank."""
        return f"rank {dist.get_rank()}" if self.groups else "this process"

    def gather(self, value: T) -> list[T]:
        """Return what every rank passed, in the same order on all of them. All ranks must call this.

        Raises:
            Exception: Of the type `error`: another rank failed.
        """
        return self._exchange(value, None)

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Run what may fail on one rank alone. The others learn of it in their next `gather`, and fail too."""
        try:
            yield
        except GeneratorExit:
            # A generator that nobody closed: at that time the others are anywhere.
            raise
        except BaseException as error:
            if not self.apart:
                # When the others cannot be reached, the error itself is of more use.
                with suppress(RuntimeError):
                    self._exchange(None, f"{type(error).__name__}: {error}".removesuffix(": "))
            raise

    def mean(self, total: Tensor, count: int, like: Tensor, *, reuse: bool) -> Tensor:
        """Return the sum over ranks, divided by a count. All ranks must call this.

        Args:
            total: This rank's sum, whole.
            count: What to divide by, over all ranks.
            like: If it is a DTensor, the result is placed like it.
            reuse: Write to `total`.
        """
        if is_sharded(like):
            from torch.distributed.tensor import DTensor, Partial

            mesh = like.device_mesh
            parts = DTensor.from_local(total, mesh, [Partial()] * mesh.ndim, run_check=False)
            return parts.redistribute(placements=like.placements) / count
        total = total if reuse else total.clone()
        for group in self.groups:
            dist.all_reduce(total, group=group)
        return total.div_(count)

    def _exchange(self, value: T, failure: str | None) -> list[T]:
        if not self.groups:
            return [value]
        if self.apart:
            raise self.error("ranks must be in step, got a call after one of them failed; start anew on all ranks")
        entries: list[tuple[str, str | None, T]] = [(self.name, failure, value)]
        # Some backends send objects through the current device.
        with torch.cuda.device(self.device.index if self.device.type == "cuda" else -1):
            for group in self.groups:
                parts: list[Any] = [None] * dist.get_world_size(group)
                try:
                    dist.all_gather_object(parts, entries, group=group)
                except RuntimeError:
                    # A process has died; to ask again would be to wait for it.
                    self.apart = True
                    raise
                entries = [entry for part in parts for entry in part]
        failures = [f"{name} failed: {reason}" for name, reason, _ in entries if reason is not None]
        if failures:
            self.apart = True
            if failure is None:
                raise self.error("; ".join(failures))
        return [value for _, _, value in entries]


def agree(ranks: Ranks, parameters: Mapping[str, Tensor], **options: object) -> None:
    """Check that all ranks measure the same parameters in the same way.

    Args:
        ranks: The ranks.
        parameters: Name -> parameter.
        **options: What else must be the same.

    Raises:
        CaptureError: They differ: names the first difference.
    """
    lines = [f"{key}={value}" for key, value in options.items()]
    lines += [f"{name} {list(p.shape)} {p.dtype}" for name, p in parameters.items()]
    (first, expected), *others = ranks.gather((ranks.name, lines))
    for name, found in others:
        for theirs, ours in zip_longest(found, expected, fillvalue="no further parameter"):
            if theirs != ours:
                raise CaptureError(
                    f"ranks must agree about the parameters, got {theirs} on {name} and {ours} on {first}"
                )


def reshard(model: nn.Module) -> list[Any]:
    """Have a model's parameters be those that its optimizer knows: reshard its FSDP modules.

    Returns:
        Those that were unsharded.
    """
    unsharded = []
    for module in _fsdp_modules(model):
        before = list(module.parameters())
        module.reshard()
        if any(now is not then for now, then in zip(module.parameters(), before, strict=True)):
            unsharded.append(module)
    return unsharded


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's parameters as its optimizer knows them, by name: those of FSDP modules sharded."""
    reshard(model)
    return named_parameters(model)


@contextmanager
def uncoupled(model: nn.Module, unsharded: Container[nn.Module] = ()) -> Iterator[None]:
    """Have no forward or backward of a model communicate, and all its parameters be whole on every rank.

    Modules of DistributedDataParallel and DataParallel only call what is inside; FSDP modules are unsharded, and only
    convert inputs and outputs. All ranks must enter this; they may leave it at any time.

    Args:
        model: Its FSDP modules must be sharded.
        unsharded: FSDP modules that stay unsharded at the end.

    Raises:
        CaptureError: Parameters are DTensors even so: the computation for one sample is split over ranks.
    """
    with ExitStack() as stack:
        modules = _fsdp_modules(model)
        nested = {inner for module in modules for inner in module.modules() if inner is not module}
        for module in modules:
            if module not in unsharded:
                stack.callback(module.reshard)
            module.unshard()
        split = [name for name, parameter in named_parameters(model).items() if is_sharded(parameter)]
        if split:
            raise CaptureError(
                "parameters must be whole on every rank during the pass, got DTensors that fully_shard does not "
                f"gather: {', '.join(split)}; tensor parallelism splits one sample's gradients over ranks, so load the "
                "weights into a model without it"
            )
        for module in modules:
            _bypass_fsdp(stack, module, moves=module not in nested)
        for module in model.modules():
            if isinstance(module, (DataParallel, DistributedDataParallel)):
                _bypass_wrapper(stack, module)
        yield


def _fsdp_modules(model: nn.Module) -> list[Any]:
    # Any, because FSDPModule is declared as no nn.Module.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def _bypass_wrapper(stack: ExitStack, wrapper: DataParallel | DistributedDataParallel) -> None:
    """Until the stack is closed, have a wrapper call the module inside and nothing else."""
    inner = wrapper.module
    _swap(stack, vars(wrapper), "forward", lambda *args, **kwargs: inner(*args, **kwargs))
    if wrapper.device_ids:
        # Given devices, a wrapper moves its inputs there.
        hook = _converting(next(inner.parameters()).device, None)
        stack.callback(inner.register_forward_pre_hook(hook, prepend=True, with_kwargs=True).remove)


def _bypass_fsdp(stack: ExitStack, module: Any, moves: bool) -> None:
    """Until the stack is closed, have an FSDP module's hooks only convert its inputs and outputs.

    That they keep to themselves has no public switch: even with every kind of communication turned off, they keep
    track of forwards and backwards, which an error in the middle of one would leave wrong.
    """
    state = module._get_fsdp_state()
    policy = state._mp_policy
    before = _converting(
        state._device if moves and state._device.type != "cpu" else None,
        policy.param_dtype if policy.cast_forward_inputs else None,
    )

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return _converted(output, None, policy.output_dtype)

    # Modules that were sharded together have a handle of several handles.
    handles = (state._pre_forward_hook_handle, state._post_forward_hook_handle)
    keys = {single.id for handle in handles for single in getattr(handle, "handles", (handle,))}
    hooks: tuple[tuple[MutableMapping[int, Any], Any], ...] = (
        (module._forward_pre_hooks, before),
        (module._forward_hooks, after),
    )
    for table, hook in hooks:
        for key in keys & table.keys():
            _swap(stack, table, key, hook)
    # What register_fsdp_forward_method has registered looks them up by name.
    _swap(stack, vars(state), "_pre_forward", before)
    _swap(stack, vars(state), "_post_forward", after)


def _swap(stack: ExitStack, entries: MutableMapping[Any, Any], key: Any, value: Any) -> None:
    """Set an entry of a mapping until the stack is closed."""
    if key in entries:
        stack.callback(entries.__setitem__, key, entries[key])
    else:
        stack.callback(entries.pop, key)
    entries[key] = value


def _converting(device: torch.device | None, dtype: torch.dtype | None) -> PreHook:
    """Return a hook that converts a module's inputs as `_converted` does."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return _converted(args, device, dtype), _converted(kwargs, device, dtype)

    return hook


def _converted(values: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    """Return values with all tensors moved to a device, and those of floating point in a dtype."""
    if device is None and dtype is None:
        return values
    # The function that FSDP itself uses: what is converted is the same in training and here.
    return _apply_to_tensors(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None), values)
