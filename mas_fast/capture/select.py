"""Calls that only pick and move entries of a parameter: views, slices, chunks, casts, rows by shared ids.

Such a call commutes with |·|, so its result is tracked in the parameter's place. The Ω of the result is a view of the
parameter's Ω where the call itself gives a view. Elsewhere it is a buffer of its own, and the numbers of the picked
entries, found by running the same call on a tensor of numbers, say where the buffer is added back.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mas_fast.capture.site import Site

_METHODS = (
    "view reshape view_as reshape_as transpose t permute swapaxes swapdims movedim moveaxis unsqueeze squeeze flatten "
    "unflatten ravel narrow select index_select __getitem__ chunk split tensor_split unbind contiguous clone flip roll "
    "diagonal unsafe_chunk unsafe_split"
).split()
_CASTS = "to type type_as float double half bfloat16 cpu cuda".split()

CASTS: frozenset[Any] = frozenset(getattr(torch.Tensor, name) for name in _CASTS)
# Calls that take another tensor for its dtype, device or shape alone.
LENDING: frozenset[Any] = frozenset(
    getattr(torch.Tensor, name) for name in "to type type_as view_as reshape_as expand_as".split()
)
SELECTIONS: frozenset[Any] = CASTS | {
    *(getattr(owner, name) for owner in (torch, torch.Tensor) for name in _METHODS if hasattr(owner, name)),
    torch.Tensor.T.__get__,  # type: ignore[attr-defined]
    torch.Tensor.mT.__get__,  # type: ignore[attr-defined]
    F.embedding,
}


@dataclass(slots=True)
class Tracked:
    """A parameter, what was picked from it with the Ω of that, or what was derived from it in any other way."""

    tensor: Tensor  # held, so that its id stays its own
    names: tuple[str, ...]  # of the parameters that it comes from
    omega: Tensor | None  # in the shape of the tensor; None if derived
    root: Tensor | None  # Ω of the whole parameter; None if derived
    numbers: Callable[[], Tensor]  # which entries of the parameter the tensor holds, in its shape
    fold: Callable[[], None] | None = None  # adds a buffer of its own back to `root` and empties it
    origin: Site | None = None  # the call that picked, if there is another way to understand it
    whole: bool = True  # the parameter itself
    derived: bool = False  # by its own graph, and not by moving entries
    version: int = 0  # of the tensor when it was picked: whoever changes it in place ends its being a pick

    @classmethod
    def derived_from(cls, names: tuple[str, ...], tensor: Tensor, origin: Site) -> "Tracked":
        """Track what was computed from parameters and no data; its graph is kept."""
        return cls(
            tensor, names, None, None, _unnumbered, None, origin, whole=False, derived=True, version=tensor._version
        )

    @property
    def how(self) -> str:
        """How it comes from its parameters, in words that follow the name of a rule."""
        return " of a derived tensor" if self.derived else "" if self.whole else " of a selection"

    @property
    def changed(self) -> bool:
        """Whether the tensor has been changed in place since."""
        return self.tensor._version != self.version


def _unnumbered() -> Tensor:
    raise AssertionError("entries of a derived tensor are no entries of a parameter")


def track(name: str, parameter: Tensor, omega: Tensor) -> Tracked:
    """Track a parameter itself."""
    return Tracked(
        parameter,
        (name,),
        omega,
        omega,
        lambda: torch.arange(omega.numel(), device=omega.device).view(omega.shape),
        version=parameter._version,
    )


def looks_shared(ids: Tensor) -> bool:
    """Guess whether all samples share an embedding's ids, as they do positions. A wrong guess costs time only."""
    if ids.dim() >= 2:
        return ids.shape[0] == 1
    return ids.dim() == 1 and bool((ids[1:] - ids[:-1] == 1).all())


def select(
    function: Any,
    source: Tracked,
    site: Site,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    results: Sequence[Tensor],
) -> list[Tracked] | None:
    """Track what a selecting call returned.

    Args:
        function: A member of SELECTIONS.
        source: The tracked argument.
        site: The call's site.
        args: Arguments of the call.
        kwargs: Keyword arguments of the call.
        results: What the call returned.

    Returns:
        The results, tracked; None if an entry was picked twice, so that its uses would have to be summed before |·|, or
        if the call does not work on Ω, whose memory may be laid out otherwise than the parameter's.
    """
    assert source.omega is not None and source.root is not None

    def tracked(
        result: Tensor, omega: Tensor, numbers: Callable[[], Tensor], fold: Callable[[], None] | None
    ) -> Tracked:
        return Tracked(
            result, source.names, omega, source.root, numbers, fold, site, whole=False, version=result._version
        )

    if function in CASTS:
        return [tracked(results[0], source.omega, source.numbers, source.fold)]

    def pick(stand_in: Tensor) -> list[Tensor]:
        swap = lambda a: stand_in if a is source.tensor else a  # noqa: E731
        picked = function(*map(swap, args), **{key: swap(a) for key, a in kwargs.items()})
        return list(picked) if isinstance(picked, (tuple, list)) else [picked]

    if function is not F.embedding:
        try:
            parts = pick(source.omega)
        except RuntimeError:
            return None
        storage = source.omega.untyped_storage().data_ptr()
        if all(part.untyped_storage().data_ptr() == storage for part in parts):
            return [
                tracked(result, part, lambda i=i: pick(source.numbers())[i], source.fold)  # type: ignore[misc]
                for i, (result, part) in enumerate(zip(results, parts, strict=True))
            ]
    numbered = pick(source.numbers())
    if any(numbers.unique().numel() != numbers.numel() for numbers in numbered):
        return None
    picks = []
    for result, numbers in zip(results, numbered, strict=True):
        buffer = torch.zeros(numbers.shape, dtype=source.root.dtype, device=source.root.device)
        picks.append(tracked(result, buffer, lambda numbers=numbers: numbers, _fold(source.root, numbers, buffer)))  # type: ignore[misc]
    return picks


def _fold(root: Tensor, numbers: Tensor, buffer: Tensor) -> Callable[[], None]:
    def fold() -> None:
        root.view(-1).index_add_(0, numbers.reshape(-1), buffer.view(-1))
        buffer.zero_()

    return fold
