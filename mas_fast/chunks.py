"""How many samples run at a time: enough to keep every call busy, and few enough for the caches.

A pass over one large batch writes all its activations to memory and reads them back, page by page. Cut along its
samples it gives the same Ω, and what a call leaves is still at hand when its backward comes. Small batches of a small
model spend their time between the calls: joined they give the same Ω, too.
"""

import math
import operator
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only
from torch.utils.data import DataLoader

from mas_fast.capture.refuse import Refusing
from mas_fast.capture.session import uncompiled
from mas_fast.errors import CaptureError
from mas_fast.reference import default_forward, output_tensor

# What a forward keeps for its backward is so large, on average, in a chunk: the fixed cost of a call is lost in it.
_BYTES_A_TENSOR = 3 << 19
# The same where a recurrent layer is, whose steps are calls of their own.
_BYTES_A_TENSOR_OF_STEPS = 4 << 20
# What joined batches and all that a forward makes of them may take; the whole pass takes some times as much.
_JOINED_BYTES = 5 << 20
# From how many batches on joining them is felt.
_MANY_BATCHES = 16
# Weights and Ω are read and written once for each chunk: activations of so many times the weights outweigh that.
_TIMES_THE_WEIGHTS = 4
# What a model raises for a batch that it cannot take.
UNFIT = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)

ChunkSize = int | str | None


def tensors_of(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch."""
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]


def count_rows(batch: Any) -> int | None:
    """Return the length of the first axis if all tensors of a batch have the same, else None."""
    counts = {tensor.shape[0] if tensor.dim() else None for tensor in tensors_of(batch)}
    return counts.pop() if len(counts) == 1 else None


def kind_of(batch: Any) -> Hashable:
    """Return what batches that are made alike have in common: their structure, and the axes of their tensors."""
    leaves, structure = tree_flatten(batch)
    return structure, tuple(leaf.dim() if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves)


def rows_of(batch: Any, start: int, stop: int | None) -> Any:
    """Return some rows of all tensors of a batch."""
    return tree_map_only(Tensor, lambda tensor: tensor[start:stop], batch)


def checked_chunk_size(chunk_size: ChunkSize) -> ChunkSize:
    """Return what may be given as `chunk_size`: "auto", a number, or None.

    Raises:
        TypeError: It is none of them.
        ValueError: The number is below 1.
    """
    if chunk_size is None or chunk_size == "auto":
        return chunk_size
    try:
        size = None if isinstance(chunk_size, bool) else operator.index(chunk_size)  # type: ignore[arg-type]
    except TypeError:
        size = None
    if size is None:
        raise TypeError(f"chunk_size must be 'auto', an int or None, got {chunk_size!r}")
    if size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {size}")
    return size


class _Held(NamedTuple):
    """What a forward makes."""

    kept: list[int]  # bytes of each tensor that is kept for the backward
    made: int  # bytes of all that its calls return or keep
    rows: int  # of the output


class _Growth(NamedTuple):
    """What a sample adds: neither masks nor what is made of weights alone, only what grows with the samples."""

    kept: list[int]  # bytes, of each tensor that is kept for the backward and is no part of the batch
    made: int  # bytes, of all that is made of it


class _Watching(Refusing):
    """Holds the memory of all that calls return."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a call unless it is refused."""
        result = super().__torch_function__(func, types, args, kwargs)
        for tensor in tensors_of(result):
            # Those of torch.vmap and of some subclasses have no memory of their own.
            if type(tensor) in (Tensor, nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                _hold(tensor, self.storages)
        return result


class Chunks:
    """Cuts batches along their samples.

    Args:
        model: What runs.
        chunk_size: "auto", samples at a time, or None for whole batches.
        is_default: Whether the model is called by `default_forward`. With "auto" nothing else is cut, nor what is not
            on the CPU: a GPU wants large batches.

    Attributes:
        joins: Whether the batches that come now may be joined.
    """

    def __init__(self, model: nn.Module, chunk_size: ChunkSize, is_default: bool) -> None:
        self._model = model
        self._chunk_size = chunk_size
        own = list(model.parameters())
        self.is_auto = chunk_size == "auto" and is_default and all(p.device.type == "cpu" for p in own)
        self._weights = sum(p.numel() * p.element_size() for p in own)
        recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        self._bytes_a_tensor = _BYTES_A_TENSOR_OF_STEPS if recurrent else _BYTES_A_TENSOR
        self._growths: dict[Hashable, _Growth | None] = {}
        self.joins = True

    def cut(self, batch: Any) -> list[Any]:
        """Return the chunks of a batch, in its order; the batch itself where it is not cut.

        Raises:
            ValueError: A number was given, and the tensors of the batch do not have the samples on their first axis.
        """
        if self.is_auto:
            return self._cut_well(batch)
        if not isinstance(self._chunk_size, int):
            return [batch]
        rows = count_rows(batch)
        if rows is None:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors_of(batch))
            raise ValueError(
                "chunk_size must be 'auto' or None unless all tensors of a batch have the samples on their first axis, "
                f"got {self._chunk_size} with tensors of shapes {shapes or 'none'}"
            )
        starts = range(0, max(rows, 1), self._chunk_size)
        return [rows_of(batch, start, start + self._chunk_size) for start in starts] if len(starts) > 1 else [batch]

    def join(self, data: Any, batches: Iterable[Any]) -> Iterator[tuple[range, list[int], Any]]:
        """Walk over batches, small ones joined; yield which they are, the rows of each if there are several, the batch.

        Only lists, tuples and data loaders are joined: a generator may change the model from batch to batch, as to
        another head, and must not run ahead. Batches of one sample are not: they may be what keeps samples apart. Nor
        is the first, which shows whether `joins` has to be unset.

        Args:
            data: Where the batches come from; None if none may be joined.
            batches: The same, perhaps behind a progress bar.
        """
        loader = isinstance(data, DataLoader)
        many = self.is_auto and (loader or type(data) in (list, tuple)) and _length(data) >= _MANY_BATCHES
        waiting: list[Tensor] = []
        held = 0  # rows that wait
        most = 0  # rows that may wait for each other
        index = -1
        for index, batch in enumerate(batches):
            x = _only_input(batch) if many else None
            goes_on = x is not None and waiting and _alike(x, waiting[0]) and held + len(x) <= most
            if waiting and not goes_on:
                yield range(index - len(waiting), index), *_joined(waiting)
                held = 0
            if x is not None and not goes_on:
                most = self._most_joined(x) if index and self.joins else 0
            if x is None or (not waiting and 2 * len(x) > most):
                yield range(index, index + 1), [], batch
            else:
                # A loader may fill the same memory again.
                waiting.append(x.clone() if loader else x)
                held += len(x)
        if waiting:
            yield range(index + 1 - len(waiting), index + 1), *_joined(waiting)

    def _most_joined(self, x: Tensor) -> int:
        """Return how many samples batches may be joined to."""
        try:
            growth = self._growth_of(x)
        except CaptureError:
            return 0  # what is refused is refused where the batch runs, which is named there
        if not growth:
            return 0
        return _JOINED_BYTES // max(x[0].nbytes + growth.made, 1)

    def _cut_well(self, batch: Any) -> list[Any]:
        rows = count_rows(batch) or 0
        # The smallest chunk is a pair, for some models drop the axis of one.
        if rows < 4 or not _is_plain(batch):
            return [batch]
        growth = self._growth_of(batch)
        if not growth or not growth.kept:
            return [batch]
        wanted = max(self._bytes_a_tensor * len(growth.kept), _TIMES_THE_WEIGHTS * self._weights)
        count = _count_parts(rows, max(2, round(wanted / sum(growth.kept))))
        if count < 2:
            return [batch]
        return [rows_of(batch, i * rows // count, (i + 1) * rows // count) for i in range(count)]

    def _growth_of(self, batch: Any) -> _Growth | None:
        """Return what a sample adds to a forward.

        None if rows cannot run one by one, or are no samples, as those of one bag, or positions that come first.
        """
        # Not for every length of a sequence anew: samples within a factor of two of each other count as of one kind.
        kind = kind_of(batch), tuple(tensor[0].numel().bit_length() for tensor in tensors_of(batch))
        if kind not in self._growths:
            self._growths[kind] = None
            one, two = (self._run(rows_of(batch, 0, rows)) for rows in (1, 2))
            if one and two and len(one.kept) == len(two.kept) and (one.rows, two.rows) == (1, 2):
                growth = (after - before for before, after in zip(one.kept, two.kept, strict=True))
                self._growths[kind] = _Growth([size for size in growth if size > 0], two.made - one.made)
        return self._growths[kind]

    def _run(self, batch: Any) -> _Held | None:
        """Run a forward; None if the model refuses the batch, or only an objective of its own can read the output."""
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor) -> Tensor:
            _hold(tensor, kept)
            # Without its graph: a call that saves its own output would hold itself, for good.
            return tensor.detach()

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.enable_grad(), uncompiled(), _Watching(self._model) as watching, hooks:
            try:
                rows = len(output_tensor(default_forward(self._model, batch)))
            except UNFIT as error:
                if isinstance(error, CaptureError):
                    raise
                return None
        made = sum(storage.nbytes() for storage in {**kept, **watching.storages}.values())
        return _Held([storage.nbytes() for storage in kept.values()], made, rows)


def _hold(tensor: Tensor, storages: dict[int, torch.UntypedStorage]) -> None:
    """Hold the memory of a tensor, so that its address stays its own."""
    if tensor.layout == torch.strided:
        storage = tensor.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage)


def _count_parts(rows: int, size: int) -> int:
    """Return into how many parts to cut `rows`: of about `size` each, at least two, and even but for one row.

    The layout is proven for each length of a part anew, which takes about as long as a part. So a number that divides
    the rows is taken if it is near: the nearer, the more parts there are, among which another proof is lost.
    """
    about = min(round(rows / size), rows // 2)
    fewer, more = (3 * rows / (4 * size), 4 * rows / (3 * size)) if about < 8 else (0.8 * about, 1.25 * about)
    near = range(math.ceil(fewer), min(math.floor(more), rows // 2) + 1)
    return min((count for count in near if rows % count == 0), key=lambda count: abs(count - about), default=about)


def _is_plain(batch: Any) -> bool:
    """Return whether nothing but the rows of tensors can tell samples apart, and all are on the CPU."""
    values = batch.values() if isinstance(batch, dict) else batch[:1] if isinstance(batch, (tuple, list)) else [batch]
    return all(
        value is None or isinstance(value, (bool, int, float, str, Tensor)) and _on_cpu(value) for value in values
    )


def _on_cpu(value: Any) -> bool:
    return not isinstance(value, Tensor) or (
        value.device.type == "cpu" and value.layout == torch.strided and not value.is_nested
    )


def _length(data: Any) -> int:
    try:
        return len(data)
    except TypeError:
        return 0  # a loader of data that have none


def _only_input(batch: Any) -> Tensor | None:
    """Return the tensor that the model is called with, if that is all it takes of a batch and it has two rows."""
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    fits = isinstance(x, Tensor) and _on_cpu(x) and x.dim() and len(x) > 1 and not x.requires_grad
    return x if fits else None


def _joined(batches: list[Tensor]) -> tuple[list[int], Tensor]:
    """Return the rows of several batches and them as one; empty the list, so that a loader's copies do not stay."""
    rows = [len(batch) for batch in batches] if len(batches) > 1 else []
    joined = torch.cat(batches) if rows else batches[0]
    batches.clear()
    return rows, joined


def _alike(x: Tensor, other: Tensor) -> bool:
    return x.shape[1:] == other.shape[1:] and x.dtype == other.dtype
