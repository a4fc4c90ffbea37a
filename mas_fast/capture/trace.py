"""The program that one forward ran, as far as it decides where the samples are.

Which rows belong to which sample follows from the calls, their shapes, and the Python numbers and index tensors that
say where rows go. A layout that was proved for one forward holds for another with the same trace. Anything else, such
as tokens that are routed by their values or packed by their lengths, gives another trace and is proved afresh.
"""

from collections.abc import Mapping, Sequence
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


# Products of data with data: a matrix of zeros and ones among them moves rows.
_PRODUCTS = frozenset(
    "matmul __matmul__ __rmatmul__ mm bmm einsum addmm baddbmm addbmm linear tensordot _sparse_mm spmm".split()
)


class Trace:
    """A running hash of the calls of one forward.

    Attributes:
        key: The hash.
    """

    def __init__(self) -> None:
        self.key = 0
        self._reads = False
        self._choices: list[Tensor] = []  # whether an operand of a product of data looks like a choice of rows

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
        self.key = hash((self.key, function, *[_form(a) for a in args], named, routed))

    def _note_choices(self, operands: Sequence[Any]) -> None:
        tensors = [t for t in operands if isinstance(t, Tensor) and t.dim() >= 2]
        self._reads |= any(t.layout is not torch.strided for t in tensors)
        if self._reads or _batched():
            return
        data = [t for t in tensors if not isinstance(t, nn.Parameter) and not t.is_complex()]
        if len(data) >= 2:
            self._choices += [_chooses(t.detach()[..., -1, :]) for t in data if t.shape[-2] and t.shape[-1]]


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


def _values(routed: Any) -> Any:
    if isinstance(routed, Tensor):
        numbers = not (_batched() or routed.is_floating_point() or routed.is_complex())
        return routed.cpu().numpy().tobytes() if numbers else None
    return tuple(map(_values, routed)) if isinstance(routed, (tuple, list)) else None
