"""Recurrent layers in pieces: outputs and gradients equal torch's own, and weights are used where they can be seen."""

import copy
import math
import warnings
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from compare import assert_as_accurate, relative_error
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.overrides import TorchFunctionMode

from mas_fast import reference_recurrent
from mas_fast.capture.recurrent import RECURRENT, unread_linear
from mas_fast.kernels import ops

I, H, P = 4, 5, 3  # noqa: E741
LAYERS = {
    "lstm": (nn.LSTM, {}),
    "lstm_projected": (nn.LSTM, {"proj_size": P}),
    "gru": (nn.GRU, {}),
    "rnn_tanh": (nn.RNN, {}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
}
CELLS = {
    "lstm_cell": (nn.LSTMCell, {}),
    "gru_cell": (nn.GRUCell, {}),
    "rnn_tanh_cell": (nn.RNNCell, {}),
    "rnn_relu_cell": (nn.RNNCell, {"nonlinearity": "relu"}),
}


class InPieces(TorchFunctionMode):
    """Does what the pass does with these calls, and keeps (function, arguments) of every call it sees."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args))
        if func in RECURRENT:
            with self:
                return RECURRENT[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def build(name, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer, own = (LAYERS | CELLS)[name]
    return layer(I, H, **own, **options).to(dtype)


def data(form, samples=3, steps=6, dtype=torch.float64):
    """Return leaves to differentiate by, and the input that is made of them."""
    torch.manual_seed(1)
    lengths = [steps, max(steps - 2, 1), 1][:samples]
    if form == "packed":
        leaf = torch.randn(sum(lengths), I, dtype=dtype, requires_grad=True)
        sizes = [sum(length > t for length in lengths) for t in range(steps)]
        return leaf, PackedSequence(leaf, torch.tensor(sizes))
    shape = (samples, steps) if form in ("batch_first", "unsorted") else (steps, samples)
    leaf = torch.randn(*shape, I, dtype=dtype, requires_grad=True)
    if form == "unsorted":
        return leaf, pack_padded_sequence(leaf, lengths[::-1], batch_first=True, enforce_sorted=False)
    return leaf, leaf


def initial(module, samples=3, layers=1, directions=1):
    """Return given initial states that require grad, in the form that the module takes."""
    torch.manual_seed(2)
    width = getattr(module, "proj_size", 0) or H
    shape = (samples,) if hasattr(module, "weight_ih") else (layers * directions, samples)
    states = [torch.randn(*shape, size, dtype=torch.float64, requires_grad=True) for size in (width, H)]
    return tuple(states) if isinstance(module, (nn.LSTM, nn.LSTMCell)) else states[0]


def tensors(value):
    if isinstance(value, Tensor):
        return [value]
    return [value.data] if isinstance(value, PackedSequence) else [t for item in value for t in tensors(item)]


def outputs_and_gradients(module, x, hx, leaves):
    """Return all outputs, and the gradients of a random weighting of them all."""
    torch.manual_seed(3)
    outputs = tensors(module(x) if hx is None else module(x, hx))
    objective = sum((output * torch.randn_like(output)).sum() for output in outputs)
    gradients = torch.autograd.grad(objective, [*leaves, *module.parameters()], retain_graph=True)
    return [*(output.detach() for output in outputs), *gradients]


def assert_equals_torch(module, leaf, x, hx=None):
    leaves = [leaf, *([] if hx is None else tensors(hx))]
    expected = outputs_and_gradients(module, x, hx, leaves)
    with InPieces() as seen:
        actual = outputs_and_gradients(module, x, hx, leaves)
    assert any(func in RECURRENT for func, _ in seen.calls)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert relative_error(a, e) <= 1e-12


@pytest.mark.parametrize("given", [False, True], ids=["zero_states", "given_states"])
@pytest.mark.parametrize("form", ["time_first", "batch_first", "packed", "unsorted"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "both_ways"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_equal_torch(name, layers, bidirectional, bias, form, given):
    options = {"num_layers": layers, "bidirectional": bidirectional, "bias": bias}
    module = build(name, batch_first=form in ("batch_first", "unsorted"), **options)
    leaf, x = data(form)
    hx = initial(module, layers=layers, directions=1 + bidirectional) if given else None
    assert_equals_torch(module, leaf, x, hx)


@pytest.mark.parametrize("form", ["time_first", "packed"])
@pytest.mark.parametrize(("samples", "steps"), [(1, 6), (3, 1), (1, 1), (2, 3)])
@pytest.mark.parametrize("name", LAYERS)
def test_sizes_equal_torch(name, samples, steps, form):
    module = build(name, num_layers=3, bidirectional=True)
    leaf, x = data(form, samples, steps)
    assert_equals_torch(module, leaf, x, initial(module, samples, layers=3, directions=2))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", ["time_first", "batch_first", "packed"])
@pytest.mark.parametrize("name", LAYERS)
def test_dropout_between_layers_draws_as_torch_does(name, form, training):
    module = build(name, num_layers=3, bidirectional=True, dropout=0.4, batch_first=form == "batch_first")
    leaf, x = data(form)
    assert_equals_torch(module.train(training), leaf, x)


@pytest.mark.parametrize("given", [False, True], ids=["zero_states", "given_states"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("name", CELLS)
def test_cells_equal_torch(name, bias, given):
    module = build(name, bias=bias)
    leaf = torch.randn(3, I, dtype=torch.float64, requires_grad=True)
    assert_equals_torch(module, leaf, leaf, initial(module) if given else None)


@pytest.mark.parametrize("name", LAYERS)
def test_only_the_final_states_used(name):
    module = build(name, bidirectional=True)
    for form in ("time_first", "packed"):
        _, x = data(form)
        results = []
        for mode in (torch.overrides.BaseTorchFunctionMode(), InPieces()):
            with mode:
                final = tensors(module(x)[1])[-1]
            results.append(torch.autograd.grad(final.square().sum(), list(module.parameters())[:3]))
        assert all(relative_error(a, e) <= 1e-12 for e, a in zip(*results, strict=True))


def test_hand_computed_gradient():
    # h_1 = 2·1 = 2 and h_2 = 2·1 + 3·h_1 = 8, so ∂h_2/∂w_ih = 1 + 3·1 and ∂h_2/∂w_hh = h_1 + 3·∂h_1/∂w_hh = 2.
    w_ih, w_hh = (torch.tensor([[w]], requires_grad=True) for w in (2.0, 3.0))
    states, final = RECURRENT[torch.rnn_relu](
        torch.ones(2, 1, 1), torch.zeros(1, 1, 1), [w_ih, w_hh], False, 1, 0.0, True, False, False
    )
    assert states.flatten().tolist() == [2, 8]
    assert final.item() == 8
    assert [g.item() for g in torch.autograd.grad(final.sum(), [w_ih, w_hh])] == [4, 2]


@pytest.mark.parametrize("form", ["time_first", "packed"])
@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_used_in_linear_calls_of_all_steps(name, form):
    module = build(name, num_layers=2, bidirectional=True)
    weights = {id(p) for p in module.parameters()}
    counts = []
    for steps in (3, 6):
        _, x = data(form, steps=steps)
        with InPieces() as seen:
            module(x)
        pieces = [(f, args) for f, args in seen.calls if f not in RECURRENT and f.__name__ != "__get__"]
        users = [(func, args) for func, args in pieces if any(id(a) in weights for a in args)]
        assert {func for func, _ in users} <= {F.linear, unread_linear}
        used = [id(a) for _, args in users for a in args if id(a) in weights]
        assert sorted(used) == sorted(weights)
        # The samples keep an axis of their own, also where the batch is packed.
        assert all(args[0].shape[:2] == (steps, 3) for _, args in users)
        # What the mode knows of the input, such as that it was made from no data, must not be said of what is fed in.
        assert all(args[0] is not tensors(x)[0] for _, args in users)
        counts.append(len(pieces))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", LAYERS)
def test_past_the_end_of_a_sequence_nothing_arrives(name):
    module = build(name, num_layers=2, bidirectional=True)
    leaf, x = data("packed")
    present = torch.arange(3) < x.batch_sizes.unsqueeze(1)
    deltas = []

    class Tapped(InPieces):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = super().__torch_function__(func, types, args, kwargs)
            if func in (F.linear, unread_linear):
                result.register_hook(deltas.append)
            return result

    with Tapped():
        y, h = module(x, initial(module, layers=2, directions=2))
    (y.data.square().sum() + sum(t.square().sum() for t in tensors(h))).backward()
    assert len(deltas) == (12 if name == "lstm_projected" else 8)
    assert all(delta[present].ne(0).any() and delta[~present].eq(0).all() for delta in deltas)


def test_the_table_holds_what_torch_calls():
    seen = set()

    class Seeing(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.add(func)
            return func(*args, **(kwargs or {}))

    with Seeing():
        for name in LAYERS:
            build(name)(data("time_first")[1])
            build(name)(data("packed")[1])
        for name in CELLS:
            build(name)(torch.randn(3, I, dtype=torch.float64))
    assert {func for func in seen if func.__name__.split("_")[0] in ("lstm", "gru", "rnn")} == set(RECURRENT)


def test_keyword_arguments():
    module, (_, x), (_, packed) = build("lstm"), data("time_first"), data("packed")
    states = {"hx": initial(module), "params": module._flat_weights, "has_biases": True, "num_layers": 1}
    options = {"dropout": 0.0, "train": False, "bidirectional": False}
    for own in (
        {"input": x, "batch_first": False},
        {"data": packed.data, "batch_sizes": packed.batch_sizes},
    ):
        expected = torch.lstm(**own, **states, **options)
        actual = RECURRENT[torch.lstm](**own, **states, **options)
        assert all(relative_error(a.detach(), e.detach()) <= 1e-12 for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_may_be_changed_in_place(name):
    module = build(name)
    leaf, x = data("time_first")
    expected = torch.autograd.grad((module(x)[0] * 2).square().sum(), [leaf, *module.parameters()])
    with InPieces():
        y = module(x)[0].mul_(2)
    actual = torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()])
    assert all(relative_error(a.detach(), e.detach()) <= 1e-12 for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_that_arrive_are_left_as_they_are(name):
    module = build(name)
    with InPieces():
        outputs = tensors(module(data("time_first")[1]))
    arriving = [torch.ones_like(output) for output in outputs]
    torch.autograd.grad(outputs, list(module.parameters()), arriving)
    assert all(gradient.eq(1).all() for gradient in arriving)


def test_a_weight_changed_before_the_backward_is_an_error():
    module = build("gru")
    with InPieces():
        y, _ = module(data("time_first")[1].detach())
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_derivatives_are_refused():
    leaf, x = data("time_first")
    with InPieces():
        y, _ = build("lstm")(x)
    with pytest.raises(RuntimeError, match="create_graph must be False"):
        torch.autograd.grad(y.sum(), leaf, create_graph=True)


@pytest.mark.parametrize("trained", ["weight_hh_l0", "bias_ih_l0", None])
def test_frozen_parts_stay_out(trained):
    module = build("lstm", num_layers=2)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == trained)
    x, (h, c) = data("time_first")[0].detach(), initial(module, layers=2)
    wanted = [c] if trained is None else [c, module.get_parameter(trained)]
    expected = torch.autograd.grad(module(x, (h, c))[0].square().sum(), wanted)
    with InPieces():
        y = module(x, (h, c))[0]
    actual = torch.autograd.grad(y.square().sum(), wanted)
    assert all(relative_error(a.detach(), e.detach()) <= 1e-12 for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("form", ["time_first", "packed"])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float16, False), (torch.float32, True)],
    ids=["float32", "bfloat16", "float16", "autocast"],
)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
def test_as_accurate_as_torch(name, dtype, autocast, form):
    def gradients(module, x, autocast=autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = tensors(module(x)[0])[0]
        return torch.autograd.grad(y.double().square().sum(), list(module.parameters()))

    module = build(name, num_layers=2, bidirectional=True)
    _, x = data(form)
    truth = gradients(module, x, autocast=False)
    module, x = copy.deepcopy(module).to(dtype), x.to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
        # oneDNN has no LSTM in bfloat16 for processors without AVX-512.
        with torch.backends.mkldnn.flags(enabled=not autocast):
            baseline = gradients(module, x)
        with InPieces():
            actual = gradients(module, x)
    # Both round at every step, though not in the same order.
    slack = 4 * torch.finfo(torch.bfloat16 if autocast else dtype).eps
    for a, b, t in zip(actual, baseline, truth, strict=True):
        assert_as_accurate(a, t, b, slack)


def test_nothing_is_read_before_it_is_written():
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        for name in LAYERS:
            for form in ("time_first", "packed"):
                module = build(name, num_layers=2, bidirectional=True)
                leaf, x = data(form)
                assert_equals_torch(module, leaf, x, initial(module, layers=2, directions=2))
    finally:
        torch.use_deterministic_algorithms(False)


def lstm_back_problem(t, n, h, p, dtype=torch.float64):
    """Draw what goes into a walk back through an LSTM."""
    draw = partial(torch.randn, dtype=dtype)
    return {
        "delta": torch.zeros(t, n, 4, h, dtype=dtype),
        "of_h": draw(t + 1, n, p or h),
        "of_c": draw(n, h),
        "w_hh": draw(4 * h, p or h) / h,
        "w_hr": draw(p, h) if p else None,
        "to_gates": draw(t, n, 4, h),
        "to_c": draw(t, n, h),
        "kept": torch.rand(t, n, h, dtype=dtype),
    }


def lstm_ahead_problem(t, n, h, p, dtype=torch.float64):
    """Draw what goes into a walk ahead through an LSTM; gates so large that some are shut."""
    draw = partial(torch.randn, dtype=dtype)
    return {
        "gates": 5 * draw(t, n, 4, h),
        "states": draw(t + 1, n, p or h),
        "cells": draw(t + 1, n, h),
        "to_c": torch.zeros(t, n, h, dtype=dtype),
        "kept": torch.zeros(t, n, h, dtype=dtype),
        "unprojected": torch.zeros(t, n, h, dtype=dtype) if p else None,
        "w_hh": draw(4 * h, p or h) / h,
        "b_hh": draw(4 * h) if n != 7 else None,
        "w_hr": draw(p, h) / h if p else None,
    }


# op -> what goes into it, what comes out
LSTM_OPS = {
    "lstm_ahead_": (lstm_ahead_problem, ("gates", "states", "cells", "to_c", "kept", "unprojected")),
    "lstm_back_": (lstm_back_problem, ("delta", "of_h", "of_c")),
}


def copies(given, dtype=None):
    return {name: t if t is None else t.to(dtype or t.dtype, copy=True) for name, t in given.items()}


@contextmanager
def on_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


LSTM_SHAPES = {  # T, N, H, P
    "even": (6, 8, 32, 0),
    "ragged": (5, 7, 37, 0),
    "one_cell": (4, 3, 1, 0),
    "one_sample": (9, 1, 20, 0),
    "one_step": (1, 5, 16, 0),
    "many_samples": (3, 150, 48, 0),
    "projected": (5, 9, 21, 13),
    "projected_to_more": (3, 7, 2, 45),
    "no_samples": (4, 0, 8, 0),
    "no_steps": (0, 4, 8, 0),
}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("reverse", [False, True], ids=["ahead", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", LSTM_SHAPES)
@pytest.mark.parametrize("op", LSTM_OPS)
def test_steps_of_an_lstm_equal_the_reference(op, shape, dtype, reverse, packed, threads):
    torch.manual_seed(0)
    t, n, h, p = LSTM_SHAPES[shape]
    sizes = sorted(torch.randint(n + 1, (t,)).tolist(), reverse=True) if packed else []
    problem, outputs = LSTM_OPS[op]
    given = problem(t, n, h, p)
    truth, own = copies(given), copies(given, dtype)
    getattr(reference_recurrent, op)(**truth, sizes=sizes, reverse=reverse)
    with on_threads(threads):
        getattr(ops, op)(**own, sizes=sizes, reverse=reverse)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for name in outputs:
        if truth[name] is not None:
            difference = (own[name].double() - truth[name]).norm()
            assert difference <= tolerance * truth[name].norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gates_of_an_lstm_are_accurate_entry_by_entry(dtype):
    # From shut to open, and near 0, where tanh z = z; every entry to a few units in its last place.
    small = torch.logspace(-30, 0, 500)
    z = torch.cat([torch.linspace(-80, 80, 4119), small, -small, torch.zeros(1)]).to(dtype).view(1, -1, 64)
    n, h = z.shape[1:]
    w_hh, opened = torch.zeros(4 * h, h, dtype=dtype), torch.full_like(z, 80)  # σ(80) = 1
    for gates, cell in (((opened, z, z, opened), 0.0), ((z, z, -opened, z), 0.5)):
        own = {"gates": torch.stack(gates, 2), "states": torch.zeros(2, n, h), "cells": torch.full((2, n, h), cell)}
        own |= {
            "to_c": torch.zeros(1, n, h),
            "kept": torch.zeros(1, n, h),
            "unprojected": None,
            "b_hh": None,
            "w_hr": None,
        }
        own, truth = copies(own, dtype), copies(own, torch.float64)
        ops.lstm_ahead_(**own, w_hh=w_hh, sizes=[])
        reference_recurrent.lstm_ahead_(**truth, w_hh=w_hh.double(), sizes=[])
        for name in ("cells", "states", "kept"):
            error = (own[name].double() - truth[name]).abs()
            assert bool((error <= 8 * torch.finfo(dtype).eps * truth[name].abs() + torch.finfo(dtype).tiny).all()), name


def test_an_lstm_keeps_what_is_not_a_number():
    given = lstm_ahead_problem(1, 3, 20, 0)
    for place, value in enumerate((math.nan, math.inf, -math.inf)):
        given["gates"][0, place] = value
    truth, own = copies(given), copies(given)
    reference_recurrent.lstm_ahead_(**truth, sizes=[])
    ops.lstm_ahead_(**own, sizes=[])
    assert own["states"][1, 0].isnan().all() and own["states"][1, 1:].isfinite().all()
    torch.testing.assert_close(own["states"], truth["states"], equal_nan=True)


@pytest.mark.skipif(ops.cpu_capability() is None, reason="torch's own sums depend on the number of threads")
@pytest.mark.parametrize("op", LSTM_OPS)
def test_steps_of_an_lstm_have_the_same_bits_for_every_number_of_threads(op):
    torch.manual_seed(0)
    problem, outputs = LSTM_OPS[op]
    given = problem(5, 150, 37, 0, torch.float32)
    results = []
    for count in (1, 2, 3):
        own = copies(given)
        with on_threads(count):
            getattr(ops, op)(**own, sizes=[])
        results.append([own[name] for name in outputs if own[name] is not None])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(ops.cpu_capability() is None, reason="needs the compiled kernels")
@pytest.mark.parametrize(
    ("op", "change", "text"),
    [
        ("lstm_back_", {"delta": torch.zeros(5, 3, 4, 7)}, "delta must fit"),
        ("lstm_back_", {"of_h": torch.zeros(4, 3, 8)}, "of_h must fit"),
        ("lstm_back_", {"of_c": torch.zeros(3, 8, dtype=torch.float64)}, "of_c must be contiguous"),
        ("lstm_back_", {"w_hh": torch.zeros(8, 32).T}, "w_hh must be contiguous"),
        ("lstm_back_", {"w_hr": torch.zeros(8, 7)}, "w_hr must fit"),
        ("lstm_back_", {"sizes": [3, 3]}, "sizes must be empty or a number of samples for each step"),
        ("lstm_back_", {"sizes": [3, 3, 3, 3, 4]}, "sizes must be empty or a number of samples for each step"),
        ("lstm_ahead_", {"gates": torch.zeros(5, 3, 4, 7)}, "gates must fit"),
        ("lstm_ahead_", {"states": torch.zeros(5, 3, 8)}, "states must fit"),
        ("lstm_ahead_", {"cells": torch.zeros(6, 3, 8, dtype=torch.float64)}, "cells must be contiguous"),
        ("lstm_ahead_", {"w_hh": torch.zeros(8, 32).T}, "w_hh must be contiguous"),
        ("lstm_ahead_", {"b_hh": torch.zeros(31)}, "b_hh must fit"),
        ("lstm_ahead_", {"w_hr": torch.zeros(8, 8)}, "w_hr and unprojected must be tensors"),
        ("lstm_ahead_", {"unprojected": torch.zeros(5, 3, 8)}, "w_hr and unprojected must be tensors"),
        ("lstm_ahead_", {"sizes": [3, 3, 3, 3, -1]}, "sizes must be empty or a number of samples for each step"),
    ],
)
def test_the_compiled_op_refuses_what_does_not_fit(op, change, text):
    given = {**LSTM_OPS[op][0](5, 3, 8, 0, torch.float32), "sizes": [], **change}
    with pytest.raises(RuntimeError, match=text):
        getattr(torch.ops.mas_fast, op)(**given)


@pytest.mark.parametrize("op", LSTM_OPS)
def test_half_precision_lstms_take_the_reference(op):
    torch.manual_seed(0)
    problem, outputs = LSTM_OPS[op]
    given = problem(3, 2, 8, 0)
    own, truth = copies(given, torch.bfloat16), copies(given)
    getattr(ops, op)(**own, sizes=[])
    getattr(reference_recurrent, op)(**truth, sizes=[])
    for name in outputs:
        if truth[name] is not None:
            assert (own[name].double() - truth[name]).norm() < 0.05 * truth[name].norm()
