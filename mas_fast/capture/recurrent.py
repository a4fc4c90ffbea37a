"""Recurrent layers, in calls that can be watched: torch.lstm and its like are one opaque call for all layers and steps.

A step needs the state that the step before left, so a weight meets the data of all steps at once only if the states are
known. They are: torch's own layer is run first, without a graph; an LSTM by an op that also keeps what its way back
needs. Then each weight is used in one ordinary call, with the states h₋ before each step as plain data,

    a = x W_ihᵀ + b_ih,    b = h₋ W_hhᵀ + b_hh,    for an LSTM with projection also p = (o ⊙ tanh c) W_hrᵀ

and one autograd function leads from (a, b, h₀, c₀, p) to the states. Its values are those already known:

    RNN     h = tanh(a + b), or ReLU
    GRU     r, z = σ(a + b), n = tanh(a + r ⊙ b), h = (1 − z) ⊙ n + z ⊙ h₋        each with its third of a and b
    LSTM    i, f, o = σ(a + b), g = tanh(a + b), c = f ⊙ c₋ + i ⊙ g, h = o ⊙ tanh c or p        with its quarter

Its backward goes back through time. It is linear in what arrives, with factors that the forward forms for all steps at
once; for an RNN, with D_t all that arrives at h_t,

    δ_t = D_t ⊙ (1 − h_t²),    D_{t−1} += δ_t W_hh

So δ, the gradient of b, holds what flows through later steps too, and δᵀ h₋ is the whole gradient of W_hh.

Letters: T steps, N samples, I inputs, H hidden, G gates, P outputs, which are H unless projected. A packed batch is
spread over [T, N, ·], with zeros past the end of a sequence.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from mas_fast.capture.binding import rule
from mas_fast.capture.linear import linear
from mas_fast.kernels import ops
from mas_fast.reference_recurrent import steps

_PADDED = "input hx params has_biases num_layers dropout train bidirectional batch_first".split()
_PACKED = "data batch_sizes hx params has_biases num_layers dropout train bidirectional".split()

# (δ, y) -> δ ⊙ y (1 − y) and δ ⊙ (1 − y²)
_sigmoid_backward = torch.ops.aten.sigmoid_backward
_tanh_backward = torch.ops.aten.tanh_backward


def lstm(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Do what torch.lstm does, with its arguments, padded or packed."""
    return _recurrent(_LSTM, args, kwargs)


def gru(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Do what torch.gru does, with its arguments, padded or packed."""
    return _recurrent(_GRU, args, kwargs)


def rnn_tanh(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Do what torch.rnn_tanh does, with its arguments, padded or packed."""
    return _recurrent(_RNN_TANH, args, kwargs)


def rnn_relu(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Do what torch.rnn_relu does, with its arguments, padded or packed."""
    return _recurrent(_RNN_RELU, args, kwargs)


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Do what torch.lstm_cell does."""
    h, c = hx
    i, f, g, o = (F.linear(input, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """Do what torch.gru_cell does."""
    x_r, x_z, x_n = F.linear(input, w_ih, b_ih).chunk(3, -1)
    h_r, h_z, h_n = F.linear(hx, w_hh, b_hh).chunk(3, -1)
    n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
    return n + (x_z + h_z).sigmoid() * (hx - n)


def rnn_tanh_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """Do what torch.rnn_tanh_cell does."""
    return (F.linear(input, w_ih, b_ih) + F.linear(hx, w_hh, b_hh)).tanh()


def rnn_relu_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """Do what torch.rnn_relu_cell does."""
    return (F.linear(input, w_ih, b_ih) + F.linear(hx, w_hh, b_hh)).relu()


# function -> the same, in pieces
RECURRENT: dict[Any, Callable[..., Any]] = {
    torch.lstm: lstm,
    torch.gru: gru,
    torch.rnn_tanh: rnn_tanh,
    torch.rnn_relu: rnn_relu,
    torch.lstm_cell: lstm_cell,
    torch.gru_cell: gru_cell,
    torch.rnn_tanh_cell: rnn_tanh_cell,
    torch.rnn_relu_cell: rnn_relu_cell,
}


@contextmanager
def _unwatched() -> Iterator[None]:
    """Record no graph, and leave out torch function modes, for which a call takes several times as long."""
    with torch.no_grad(), torch._C.DisableTorchFunction():
        yield


@contextmanager
def _native(device: torch.device) -> Iterator[None]:
    """Leave out cuDNN, which warns of weights that do not make up one piece of memory: those of one layer never do."""
    enabled = torch.backends.cudnn.enabled
    if device.type != "cuda" or not enabled:
        yield
        return
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = True


class _Packing:
    """Where the rows of a packed batch belong in [T, N, ·]; its samples are in order of falling length."""

    def __init__(self, batch_sizes: Tensor, device: torch.device) -> None:
        self.batch_sizes = batch_sizes
        self.sizes: list[int] = batch_sizes.tolist()  # the first b_t samples have a step t
        present = torch.arange(self.sizes[0]) < batch_sizes.unsqueeze(1)  # [T, N]
        t, n = present.nonzero(as_tuple=True)
        self.rows = (t.to(device), n.to(device))
        self.ends = (present.sum(0).to(device), torch.arange(self.sizes[0], device=device))

    def pad(self, rows: Tensor) -> Tensor:
        padded = rows.new_zeros(len(self.sizes), self.sizes[0], *rows.shape[1:])
        return padded.index_put(self.rows, rows)

    def unpad(self, padded: Tensor) -> Tensor:
        return padded[self.rows]


class _Walk(NamedTuple):
    """The steps in the order of one direction.

    States are kept in [T + 1, N, ·]: step t leads from t to t + 1 or, reversed, from t + 1 to t. Of a sample with l
    steps, the states from 0 to l count.
    """

    packing: _Packing | None
    reverse: bool

    @property
    def initial(self) -> Any:
        """Index of every sample's initial state."""
        return self._end if self.reverse else 0

    @property
    def final(self) -> Any:
        """Index of every sample's final state."""
        return 0 if self.reverse else self._end

    @property
    def _end(self) -> Any:
        return -1 if self.packing is None else self.packing.ends

    def before(self, states: Tensor) -> Tensor:
        """Return a view of the states before each step, [T, N, ·]."""
        return states[1:] if self.reverse else states[:-1]

    def after(self, states: Tensor) -> Tensor:
        """Return a view of the states after each step, [T, N, ·]."""
        return states[:-1] if self.reverse else states[1:]

    @property
    def sizes(self) -> list[int]:
        """Samples of each step, or nothing where all have all."""
        return [] if self.packing is None else self.packing.sizes

    def back(self, *buffers: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Iterate over views of each [T, N, ·] by step, from the last one on, with the samples that have it."""
        return steps(buffers, self.sizes, backward=not self.reverse)

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        """Return a buffer to be filled by steps, with zeros where a sample has none."""
        return like.new_empty(shape) if self.packing is None else like.new_zeros(shape)

    def states(self, initial: Tensor, like: Tensor, after: Tensor | None = None) -> Tensor:
        """Return [T + 1, N, ·] with the initial states, and those after each step if known; `like` is [T, N, ·]."""
        states = self.empty(like, like.shape[0] + 1, *initial.shape)
        if after is not None:
            self.after(states).copy_(after)
        states[self.initial] = initial.to(states.dtype)
        return states

    def gradients(self, of_steps: Tensor | None, of_final: Tensor | None, like: Tensor) -> Tensor:
        """Return [T + 1, N, ·] with what arrives at each state from outside; `like` is [T, N, ·]."""
        gradients = like.new_zeros(like.shape[0] + 1, *like.shape[1:])
        if of_steps is not None:
            self.after(gradients).copy_(of_steps)
        if of_final is not None:
            gradients[self.final] += of_final
        return gradients

    def take_initial(self, gradients: Tensor) -> Tensor:
        """Return what arrived at the initial states, and leave zeros: there may be steps that others have."""
        initial = gradients[self.initial].clone()
        gradients[self.initial] = 0
        return initial


class _Kind(NamedTuple):
    """What tells one sort of layer from the others.

    Attributes:
        function: torch's own, for all layers and steps; None for an LSTM, which has an op.
        factors: (a, b, walk, states h [T + 1, N, P]) -> what `back` needs of the forward; None for an LSTM.
        back: (walk, W_hh, W_hr, factors, gradients of all results) -> gradients of a, b, h₀(, c₀(, p)).
    """

    function: Callable[..., Any] | None
    factors: Callable[..., list[Tensor]] | None
    back: Callable[..., tuple[Tensor, ...]]


class _ThroughTime(torch.autograd.Function):
    """States that are known, as a function of what they follow from."""

    @staticmethod
    def forward(
        ctx: Any, kind: _Kind, walk: _Walk, known: tuple[Tensor, ...], saved: Sequence[Tensor | None], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the known states: those after each step [T, N, P] and the final ones [N, ·]."""
        ctx.kind, ctx.walk = kind, walk
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        # `.data` is no view to autograd: the model may go on to change the output in place.
        return tuple(states.data for states in known)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Go back through time."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph must be False for a gradient through a recurrent layer, got True; second derivatives are "
                "not supported"
            )
        w_hh, w_hr, *factors = ctx.saved_tensors
        # Under autocast the weights are wider than what was computed with them.
        w_hh, w_hr = (None if w is None else w.to(factors[0].dtype) for w in (w_hh, w_hr))
        return None, None, None, None, *ctx.kind.back(ctx.walk, w_hh, w_hr, factors, gradients)


class _Unread(torch.autograd.Function):
    """F.linear in the graph, without its values."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return zeros, one number of memory, in the shape of the output."""
        ctx.save_for_backward(input, weight)
        return input.new_zeros(()).expand(*input.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of those that want one."""
        input, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad
        return (
            delta @ weight.to(delta.dtype) if of_input else None,
            delta.flatten(0, -2).mT @ input.flatten(0, -2) if of_weight else None,
            delta.flatten(0, -2).sum(0) if of_bias else None,
        )


def unread_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Stand for F.linear where its values are in other results already, for those who watch calls and go back."""
    if has_torch_function((input, weight)):
        return handle_torch_function(unread_linear, (input, weight), input, weight, bias)
    return _Unread.apply(input, weight, bias)


rule(unread_linear)(linear)


class _Weights(NamedTuple):
    """What one layer has for one direction."""

    ih: Tensor  # [G·H, I]
    hh: Tensor  # [G·H, P]
    ih_bias: Tensor | None
    hh_bias: Tensor | None
    hr: Tensor | None  # [P, H]

    @classmethod
    def of(cls, params: Sequence[Tensor], biased: bool) -> "_Weights":
        """Name weights that are in torch's order."""
        ih, hh, *rest = params
        ih_bias, hh_bias = rest[:2] if biased else (None, None)
        return cls(ih, hh, ih_bias, hh_bias, rest[-1] if len(rest) % 2 else None)


def _recurrent(kind: _Kind, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Run all layers; returns the states after each step, and the final ones of all layers and directions."""
    packed = "batch_sizes" in kwargs or (len(args) > 3 and not isinstance(args[3], bool))
    given = {**dict(zip(_PACKED if packed else _PADDED, args, strict=False)), **kwargs}
    params, biased, hx = given["params"], given["has_biases"], given["hx"]
    batch_first, directions = given.get("batch_first", False), 2 if given["bidirectional"] else 1
    dropout = given["dropout"] if given["train"] else 0.0
    with torch._C.DisableTorchFunction():
        # Views that nobody has seen: inputs made from no data, such as the zeros of a decoder, are taken for data.
        x = given["data" if packed else "input"]
        x = x.transpose(0, 1) if batch_first else x.view_as(x)
        packing = _Packing(given["batch_sizes"], x.device) if packed else None
        initial = list(zip(*[h.unbind(0) for h in ([hx] if isinstance(hx, Tensor) else hx)], strict=True))
    count = len(params) // len(initial)
    finals: list[Sequence[Tensor]] = []
    for first in range(0, len(initial), directions):
        if first and dropout:
            x = F.dropout(x, dropout)
        own = slice(first, first + directions)
        known: Sequence[tuple[Tensor, ...] | None] = [None] * directions
        if kind.function is not None:
            with _unwatched(), _native(x.device):
                known = _known(
                    kind.function, x, packing, initial[own], params[first * count : own.stop * count], biased
                )
        spread = x if packing is None else packing.pad(x)
        outputs = []
        for d in range(directions):
            weights = _Weights.of(params[(first + d) * count : (first + d + 1) * count], biased)
            y, *final = _direction(kind, _Walk(packing, d == 1), spread, initial[first + d], known[d], weights)
            outputs.append(y)
            finals.append(final)
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        x = x if packing is None else packing.unpad(x)
    return (x.transpose(0, 1) if batch_first else x, *[torch.stack(states) for states in zip(*finals, strict=True)])


def _known(
    function: Callable[..., Any],
    x: Tensor,
    packing: _Packing | None,
    initial: Sequence[tuple[Tensor, ...]],
    params: Sequence[Tensor],
    biased: bool,
) -> list[tuple[Tensor, ...]]:
    """Run one layer as torch does; returns for each direction the states after each step and the final ones."""
    directions = len(initial)
    hx: Any = [torch.stack(states) for states in zip(*initial, strict=True)]
    options = (hx if len(hx) > 1 else hx[0], params, biased, 1, 0.0, False, directions == 2)
    if packing is None:
        y, *finals = function(x, *options, False)
    else:
        y, *finals = function(x, packing.batch_sizes, *options)
        y = packing.pad(y)
    return list(zip(y.chunk(directions, -1), *finals, strict=True))


def _direction(
    kind: _Kind,
    walk: _Walk,
    x: Tensor,
    initial: tuple[Tensor, ...],
    known: tuple[Tensor, ...] | None,
    weights: _Weights,
) -> tuple[Tensor, ...]:
    """Build the graph of one layer in one direction up to its states; `known` unless an op forms them."""
    x_gates = F.linear(x, weights.ih, weights.ih_bias)  # [T, N, G·H]
    factors: list[Tensor] = []
    unprojected = None
    with _unwatched():
        if known is None:
            known, states, factors, unprojected = _lstm_ahead(walk, x_gates, initial, weights)
        else:
            states = walk.states(initial[0], known[0], after=known[0])
        before = walk.before(states)
    h_linear = unread_linear if kind.factors is None else F.linear
    h_gates = h_linear(before, weights.hh, weights.hh_bias)  # [T, N, G·H]
    inputs = [x_gates, h_gates, *initial]
    with _unwatched():
        if kind.factors is not None:
            factors = kind.factors(x_gates, h_gates, walk, states)
        saved = [None if w is None else w.detach() for w in (weights.hh, weights.hr)]
    if unprojected is not None and weights.hr is not None:
        inputs.append(F.linear(unprojected, weights.hr))
    return _ThroughTime.apply(kind, walk, known, (*saved, *factors), *inputs)


def _rnn_tanh_factors(x_gates: Tensor, h_gates: Tensor, walk: _Walk, states: Tensor) -> list[Tensor]:
    h = walk.after(states)
    return [_tanh_backward(torch.ones_like(h), h)]


def _rnn_relu_factors(x_gates: Tensor, h_gates: Tensor, walk: _Walk, states: Tensor) -> list[Tensor]:
    h = walk.after(states)
    return [(h > 0).to(h.dtype)]


def _rnn_back(
    walk: _Walk, w_hh: Tensor, w_hr: None, factors: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    (to_gate,) = factors
    of_y, of_h_n = gradients
    of_h = walk.gradients(of_y, of_h_n, to_gate)
    delta = walk.empty(to_gate, *to_gate.shape)
    for arrived, before, factor, out in walk.back(walk.after(of_h), walk.before(of_h), to_gate, delta):
        torch.mul(arrived, factor, out=out)
        before.addmm_(out, w_hh)
    return delta, delta, walk.take_initial(of_h)


def _gru_factors(x_gates: Tensor, h_gates: Tensor, walk: _Walk, states: Tensor) -> list[Tensor]:
    x_r, x_z, x_n = x_gates.chunk(3, -1)
    h_r, h_z, h_n = h_gates.chunk(3, -1)
    r = (x_r + h_r).sigmoid_()
    z = (x_z + h_z).sigmoid_()
    n = torch.addcmul(x_n, r, h_n).tanh_()
    to_gates = r.new_empty(*r.shape[:2], 3, r.shape[2])  # [T, N, 3, H]
    to_n = _tanh_backward(1 - z, n)
    _sigmoid_backward(to_n * h_n, r, grad_input=to_gates[:, :, 0])
    _sigmoid_backward(walk.before(states) - n, z, grad_input=to_gates[:, :, 1])
    torch.mul(to_n, r, out=to_gates[:, :, 2])
    return [to_gates, to_n, z]


def _gru_back(
    walk: _Walk, w_hh: Tensor, w_hr: None, factors: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    to_gates, to_n, z = factors
    of_y, of_h_n = gradients
    of_h = walk.gradients(of_y, of_h_n, z)
    h_delta = walk.empty(to_gates, *to_gates.shape)
    h_rows = h_delta.flatten(2)
    arrived = walk.after(of_h)
    buffers = (arrived, arrived.unsqueeze(2), walk.before(of_h), to_gates, z, h_delta, h_rows)
    for d, d_each, before, factor, kept, out, rows in walk.back(*buffers):
        torch.mul(d_each, factor, out=out)
        before.addmm_(rows, w_hh).addcmul_(d, kept)
    of_h_0 = walk.take_initial(of_h)
    x_delta = h_delta.clone()
    torch.mul(arrived, to_n, out=x_delta[:, :, 2])
    return x_delta.flatten(2), h_rows, of_h_0


def _lstm_ahead(
    walk: _Walk, x_gates: Tensor, initial: Sequence[Tensor], weights: _Weights
) -> tuple[tuple[Tensor, ...], Tensor, list[Tensor], Tensor | None]:
    """Form the states; returns the results, h [T + 1, N, P], what the way back needs, and o ⊙ tanh c if projected."""
    hidden = weights.hh.shape[0] // 4
    # Overwrites a, whose values nobody else needs: to touch fresh memory costs more than the arithmetic. With `.data`,
    # for autograd would take the views that F.linear returns for changed.
    gates = x_gates.data.contiguous().unflatten(-1, (4, hidden))  # [T, N, 4, H]
    states, cells = (walk.states(state, gates) for state in initial)
    shape = (*gates.shape[:2], hidden)
    to_c, kept = walk.empty(gates, *shape), walk.empty(gates, *shape)
    unprojected = None if weights.hr is None else walk.empty(gates, *shape)
    # Under autocast the weights are wider than what is computed with them.
    bias, projection = (None if w is None else w.to(gates.dtype) for w in (weights.hh_bias, weights.hr))
    own = (weights.hh.to(gates.dtype), bias, projection)
    ops.lstm_ahead_(gates, states, cells, to_c, kept, unprojected, *own, walk.sizes, walk.reverse)
    # The model may go on to change its output, but not what W_hh met.
    results = (walk.after(states).clone(), states[walk.final].clone(), cells[walk.final].clone())
    return results, states, [gates, to_c, kept], unprojected


def _lstm_back(
    walk: _Walk, w_hh: Tensor, w_hr: Tensor | None, factors: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    to_gates, to_c, kept = factors
    of_y, of_h_n, of_c_n = gradients
    of_h = walk.gradients(of_y, of_h_n, kept if w_hr is None else kept[..., : w_hr.shape[0]])
    of_c = torch.zeros_like(kept[0]) if of_c_n is None else of_c_n.to(kept.dtype, copy=True)
    delta = walk.empty(to_gates, *to_gates.shape)
    ops.lstm_back_(delta, of_h, of_c, w_hh, w_hr, to_gates, to_c, kept, walk.sizes, walk.reverse)
    rows, arrived = delta.flatten(2), walk.after(of_h)
    return rows, rows, walk.take_initial(of_h), of_c, *((arrived,) if w_hr is not None else ())


_LSTM = _Kind(None, None, _lstm_back)
_GRU = _Kind(torch.gru, _gru_factors, _gru_back)
_RNN_TANH = _Kind(torch.rnn_tanh, _rnn_tanh_factors, _rnn_back)
_RNN_RELU = _Kind(torch.rnn_relu, _rnn_relu_factors, _rnn_back)
