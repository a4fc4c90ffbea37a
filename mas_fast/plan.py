"""What a training step needs to know of the model and of Ω, looked up once and then only checked to hold still."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mas_fast.kernels.steps import Held, check_held
from mas_fast.names import unwrapped
from mas_fast.packing import Packed
from mas_fast.sharding import is_sharded, local, splitting_groups
from mas_fast.state import State

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Lists of parameters whose Held is kept ready: optimizers step the same ones time after time.
READY = 16
# The place of what holds nothing.
NOWHERE = -1, 0, 0

_facts_of = attrgetter("shape", "dtype", "device", "requires_grad")


class Group(NamedTuple):
    """Parameters that one call of an op takes: they are on one device, and spread over ranks in one way.

    Attributes:
        names: Their names.
        parameters: θ.
        held: What holds them.
        lams: λ of each, float64 [n] on their device.
        indices: Of them in what `Plan.parameters_in` returns.
        is_sharded: Whether they are DTensors.
        ranks: The process groups in which ranks hold different parts.
    """

    names: list[str]
    parameters: list[nn.Parameter]
    held: Held
    lams: Tensor
    indices: list[int]
    is_sharded: bool
    ranks: tuple[ProcessGroup, ...]


class Traced(NamedTuple):
    """Where torch.compile finds a parameter, and what it must be.

    Attributes:
        root: The module to start from; None for the model.
        path: The keys of the modules from there, then the parameter's own.
    """

    root: nn.Module | None
    path: tuple[str, ...]
    shape: torch.Size
    device: torch.device
    requires_grad: bool


class Links(NamedTuple):
    """Entries of the tables of modules, as three lists: so they are compared fastest."""

    holders: list[dict[str, Any]]
    names: list[str]
    values: list[object]


class Plan:
    """The parameters that have an Ω, with what holds them, as lists that the ops take.

    It holds for as long as the model has the same parameters in the same places; `holds` finds out in a fraction of the
    time that it takes to walk through the model.

    Attributes:
        state: The state that this is made of.
        groups: The parameters that require grad.
        dtype: Of the penalty's value.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], packed: Packed, lams: Mapping[str, float]
    ) -> None:
        """Look everything up.

        Args:
            model: The model.
            parameters: Its parameters by name; Ω must fit them, and be where they are.
            packed: The state, not empty.
            lams: λ of each parameter with an Ω.
        """
        self.state = packed.state
        self._packed = packed
        self._model = model
        self._names = list(packed.state.omega)
        self._parameters = [parameters[name] for name in self._names]
        self._facts = [_facts_of(parameter) for parameter in self._parameters]
        self._index = {id(parameter): index for index, parameter in enumerate(self._parameters)}
        paths = _paths(model, self._parameters)
        self._links = _links(model, paths, self._parameters)
        self._traced = [
            Traced(*_traced_path(model, path), parameter.shape, parameter.device, parameter.requires_grad)
            for path, parameter in zip(paths, self._parameters, strict=True)
        ]
        self._lams: list[float] = []
        self.groups: list[Group] = []
        self._ready: dict[tuple[int, ...], tuple[list[Tensor], Held]] = {}
        self.set_lams(lams)
        check_held([*map(local, self._parameters)], self._held_of(range(len(self._names))))
        active = [tensor for group in self.groups for tensor in (*group.parameters, *group.held.omegas)]
        self.dtype = torch.float64 if any(t.dtype == torch.float64 for t in active) else torch.float32

    def set_lams(self, lams: Mapping[str, float]) -> None:
        """Change λ, given by name, and nothing else."""
        self._lams = [lams[name] for name in self._names]
        self._ready.clear()
        self.groups = self._grouped()

    def holds(self, model: nn.Module, state: State) -> bool:
        """Return whether a model still has the same parameters where they were, of the same kind, and the same Ω."""
        if model is not self._model or state is not self.state or self._links is None:
            return False
        if not all(map(is_, map(dict.get, self._links.holders, self._links.names), self._links.values)):
            return False
        return [*map(_facts_of, self._parameters)] == self._facts

    def held_for(self, parameters: Sequence[Tensor]) -> Held:
        """Return what holds given parameters: nothing, with λ = 0, those without an Ω."""
        key = tuple(map(id, parameters))
        found = self._ready.get(key)
        if found is None:
            if len(self._ready) >= READY:
                self._ready.clear()
            # The parameters are kept along, so that their ids stay theirs.
            # Nothing holds those that require no grad, as in the penalty itself.
            indices = [self._index.get(id(p)) if p.requires_grad else None for p in parameters]
            found = self._ready[key] = list(parameters), self._held_of(indices)
        return found[1]

    def unknown(self, parameters: Sequence[Tensor]) -> list[int]:
        """Return the indices of those parameters that have no Ω."""
        return [index for index, parameter in enumerate(parameters) if id(parameter) not in self._index]

    def _held_of(self, indices: Iterable[int | None]) -> Held:
        """Return what holds parameters given by their indices, None for those that nothing holds."""
        entries: dict[int, int] = {}
        lams: list[float] = []
        places: list[int] = []
        for index in indices:
            if index is None:
                lams.append(0.0)
                places += NOWHERE
            else:
                entry, first, block = self._packed.places[self._names[index]]
                lams.append(self._lams[index])
                places += entries.setdefault(entry, len(entries)), first, block
        _, *lists, _ = self._packed
        omegas, scales, anchors = ([tensors[entry] for entry in entries] for tensors in lists)
        return Held(omegas, scales, anchors, lams, places)

    def _grouped(self) -> list[Group]:
        members: dict[tuple[torch.device, bool, tuple[ProcessGroup, ...]], list[int]] = {}
        for index, parameter in enumerate(self._parameters):
            if parameter.requires_grad:
                key = parameter.device, is_sharded(parameter), splitting_groups(parameter)
                members.setdefault(key, []).append(index)
        groups = []
        for (device, sharded, ranks), indices in members.items():
            held = self._held_of(indices)
            groups.append(
                Group(
                    [self._names[index] for index in indices],
                    [self._parameters[index] for index in indices],
                    held,
                    torch.tensor(held.lams, dtype=torch.float64, device=device),
                    indices,
                    sharded,
                    ranks,
                )
            )
        return groups

    def parameters_in(self, model: nn.Module) -> list[Tensor] | None:
        """Return all parameters with an Ω, looked up anew in a way that torch.compile can trace.

        None if they are not as they were, or cannot be traced: DTensors, and what is in no table of a module.
        """
        if self._links is None or any(group.is_sharded for group in self.groups):
            return None
        found = []
        for traced in self._traced:
            module: Any = model if traced.root is None else traced.root
            for key in traced.path[:-1]:
                module = module._modules[key]
            theta = module._parameters[traced.path[-1]]
            if (theta.shape, theta.device, theta.requires_grad) != traced[2:]:
                return None
            found.append(theta)
        return found


def nothing_holds(parameters: Sequence[Tensor]) -> Held:
    """Return what holds parameters without an Ω."""
    return Held([], [], [], [0.0] * len(parameters), [*NOWHERE] * len(parameters))


def _paths(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[tuple[str, ...]]:
    """Return the keys on the way from a model to its parameters; none for one that is in no table of a module."""
    found: dict[int, tuple[str, ...]] = {}
    seen = set()
    waiting: list[tuple[nn.Module, tuple[str, ...]]] = [(model, ())]
    while waiting:
        module, path = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (*path, key))
        children = [(child, (*path, key)) for key, child in module._modules.items() if child is not None]
        waiting += reversed(children)  # in the order of names, of which that of a shared parameter is its first
    return [found.get(id(parameter), ()) for parameter in parameters]


def _traced_path(model: nn.Module, path: tuple[str, ...]) -> tuple[nn.Module | None, tuple[str, ...]]:
    """Return the last compiled module on a path and the rest of it: torch.compile cannot look into one on its own."""
    root, rest = None, path
    module: Any = model
    for index, key in enumerate(path[:-1]):
        child = module._modules[key]
        if unwrapped(module) is not module:
            root, rest = child, path[index + 1 :]
        module = child
    return root, rest


def _links(model: nn.Module, paths: Sequence[tuple[str, ...]], parameters: Sequence[nn.Parameter]) -> Links | None:
    """Return the entries of tables that lead from a model to its parameters, each once; None if one has no path."""
    links: dict[tuple[int, str], tuple[dict[str, Any], str, object]] = {}
    for path, parameter in zip(paths, parameters, strict=True):
        if not path:
            return None
        module: Any = model
        for key in path[:-1]:
            child = module._modules[key]
            links[id(module), key] = module._modules, key, child
            module = child
        # A module and a parameter of it cannot have the same key.
        links[id(module), path[-1]] = module._parameters, path[-1], parameter
    found = Links(*map(list, zip(*links.values(), strict=True)))
    return found if all(isinstance(holder, dict) for holder in found.holders) else None
