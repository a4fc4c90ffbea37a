"""The program that one forward ran, as far as it decides where the samples are.

Which rows belong to which sample follows from the calls, their shapes, and the Python numbers and index tensors that
say where rows go. A layout that was proved for one forward holds for another with the same trace, and for one of more
samples whose trace differs in nothing but their number. Anything else, such as tokens that are routed by their values
or packed by their lengths, gives another trace and is proved afresh.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Calls that move rows to where the values of an integer or boolean tensor say.
_ROUTES = frozenset(
    "__getitem__ __setitem__ index_select masked_select gather take take_along_dim index_add index_add_ index_copy "
    "index_copy_ index_put index_put_ index_reduce index_reduce_ scatter scatter_ scatter_add scatter_add_ "
    "scatter_reduce scatter_reduce_ masked_scatter masked_scatter_ repeat_interleave segment_reduce "
    "_pack_padded_sequence _pad_packed_sequence".split()
)

# Calls that let the values of data decide, in Python or in one-hot matrices, where rows go: no hash can follow those.
_READS = frozenset(
    "numpy tolist item __array__ __index__ __int__ __float__ argsort sort msort topk kthvalue nonzero argwhere "
    "unique unique_consecutive one_hot multinomial bernoulli searchsorted bucketize".split()
)


# Calls whose numbers are lengths of what they return.
_SHAPING = frozenset("view reshape unflatten expand".split())

# Products of data with data: a matrix of zeros and ones among them moves rows.
_PRODUCTS = frozenset(
    "matmul __matmul__ __rmatmul__ mm bmm einsum addmm baddbmm addbmm linear tensordot _sparse_mm spmm".split()
)


class Trace:
    """The calls of one forward.

    Attributes:
        calls: Of each the function, and what of its arguments decides where rows go.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Hashable, ...]] = []
        self._hashed = 0, 0  # how many calls, and their hash
        self._reads = False
        self._choices: list[Tensor] = []  # whether an operand of a product of data looks like a choice of rows

    @property
    def key(self) -> int:
        """A hash of the calls."""
        if self._hashed[0] != len(self.calls):
            self._hashed = len(self.calls), hash(tuple(self.calls))
        return self._hashed[1]

    @property
    def reads(self) -> bool:
        """Whether the forward read values of data in a way that may route rows; then no other forward is like it."""
        if self._choices:
            self._reads |= bool(torch.stack([flag.cpu() for flag in self._choices]).any())
            self._choices.clear()
        return self._reads

    def add(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Add a call."""
        name = getattr(function, "__name__", "")
        self._reads |= name in _READS
        routed: Any = ()
        if name in _ROUTES:
            routed = _values([*args[1:], *kwargs.values()])
            self._reads |= _batched()
        elif name in _PRODUCTS:
            self._note_choices([t for a in args for t in (a if isinstance(a, (tuple, list)) else (a,))])
        elif name in ("embedding", "embedding_bag"):
            # Rows of data are routed by the ids; rows of a parameter are the same for all samples.
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            routed = () if any(isinstance(t, nn.Parameter) for t in tensors) else _values(tensors)
        named = tuple((key, _form(value)) for key, value in kwargs.items()) if kwargs else ()
        forms = [_form(a) for a in args]
        self.calls.append((function, *(map(_lengths, forms) if name in _SHAPING else forms), named, routed))

    def _note_choices(self, operands: Sequence[Any]) -> None:
        tensors = [t for t in operands if isinstance(t, Tensor) and t.dim() >= 2]
        self._reads |= any(t.layout is not torch.strided for t in tensors)
        if self._reads or _batched():
            return
        data = [t for t in tensors if not isinstance(t, nn.Parameter) and not t.is_complex()]
        if len(data) >= 2:
            self._choices += [_chooses(t.detach()[..., -1, :]) for t in data if t.shape[-2] and t.shape[-1]]


def differ_in_samples(few: Any, more: Any, samples: tuple[int, int]) -> bool:
    """Return whether two traces, or parts of them, differ in nothing but the number of samples.

    Every length is the same in both, or as many times the number of samples: so no call forms groups of samples, for of
    five and of sixteen there are not as many times as many. A number that a call is given and that is a multiple of the
    few is told from none: to roll five rows by five is to leave them.

    Args:
        few: Calls of the one, or a part.
        more: Calls of the other.
        samples: How many samples either is of, the few a prime.
    """
    if isinstance(few, (tuple, list)) and isinstance(more, (tuple, list)):
        alike = _same_length if isinstance(few, torch.Size) else differ_in_samples
        return len(few) == len(more) and all(map(alike, few, more, [samples] * len(few)))
    if type(few) is int and type(more) is int:
        constant = few == more and few % samples[0] != 0
        return constant or few == more == 0 or (few != more and _same_length(few, more, samples))
    return type(few) is type(more) and bool(few == more)


def _same_length(few: int, more: int, samples: tuple[int, int]) -> bool:
    times, rest = divmod(few, samples[0])
    return few == more or (rest == 0 and more == times * samples[1])


def _chooses(rows: Tensor) -> Tensor:
    """Return whether a row holds zeros and one other number only, as rows of a one-hot matrix do.

    Rows of attention do not, but for the first of a causal mask, which is why the last one is asked.
    """
    zeros = rows == 0
    return (zeros.any(-1) & (zeros | (rows == rows.amax(-1, keepdim=True))).all(-1)).any()


def _batched() -> bool:
    """Return whether torch.vmap runs: its tensors have no values that could be read."""
    return torch._C._functorch.maybe_current_level() is not None


def _form(value: Any) -> Any:
    """Return what of an argument decides where rows go, apart from an index tensor's values. Fractions do not."""
    if isinstance(value, Tensor):
        number = value.dim() == 0 and not value.is_floating_point() and not value.is_complex()
        # One that stands for a Python number, as the start of a slice.
        return int(value) if number and not _batched() else value.shape
    if isinstance(value, (tuple, list)):
        return tuple([_form(item) for item in value])
    if isinstance(value, slice):
        return _form((value.start, value.stop, value.step))
    return value if isinstance(value, (int, str, torch.dtype, type(None))) else type(value)


def _lengths(form: Any) -> Any:
    """Return whole numbers as lengths, which `differ_in_samples` compares as such."""
    numbers = form if type(form) is tuple else (form,)
    return torch.Size(numbers) if all(type(number) is int for number in numbers) else form


def _values(routed: Any) -> Any:
    if isinstance(routed, Tensor):
        numbers = not (_batched() or routed.is_floating_point() or routed.is_complex())
        return routed.cpu().numpy().tobytes() if numbers else None
    return tuple(map(_values, routed)) if isinstance(routed, (tuple, list)) else None
