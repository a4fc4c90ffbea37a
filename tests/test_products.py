"""Products of linear layers by the kernel of our own: the op against its reference, and the pass that runs them."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cases import DIRECT, JOINED, LOOPED, Lambda, build
from compare import assert_as_accurate, truth_of, worst_error
from torch import nn
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mas_fast import estimate_importance, machine, reference, verify
from mas_fast.capture.forward import Forward
from mas_fast.kernels import ops, products

# torch says of even kernels with padding="same" that they may be slow.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
compiled = pytest.mark.skipif(ops.cpu_capability() is None, reason="needs the compiled kernels")

SHAPES = {  # R, I, O
    "one": (1, 1, 1),
    "edges": (7, 13, 5),
    "full_panels": (64, 192, 64),
    "over_panels": (65, 193, 67),
    "several_pieces": (600, 40, 33),
    "several_slabs": (19, 1700, 70),
    "several_groups": (9, 800, 400),
    "rows_for_each_of_2_threads": (600, 40, 150),
    "rows_for_each_of_3_threads": (800, 900, 70),
    "no_rows": (0, 3, 4),
    "no_inputs": (5, 0, 4),
    "no_outputs": (5, 3, 0),
}


@pytest.fixture(params=[1, 2, 3], ids=lambda count: f"{count}_threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch):
    """Have every product that may be one run by the kernel; shapes of W are listed in the order of the calls."""
    seen = []
    kernel = ops.linear_

    def counted(output, input, weight, bias=None):
        seen.append(tuple(weight.shape))
        kernel(output, input, weight, bias)

    monkeypatch.setattr(products, "torch_is_slow", lambda: True)
    monkeypatch.setattr(products, "LEAST_WORK", 0)
    monkeypatch.setattr(products, "FULL_WIDTH", 0)
    monkeypatch.setattr(products, "LEAST_WIDTH", 0)
    monkeypatch.setattr(ops, "linear_", counted)
    return seen


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def weight_of(layout, outputs, inputs, dtype):
    if layout == "transposed":
        return draw(inputs, outputs, dtype=dtype).T
    if layout == "strided":
        return draw(outputs, 2, inputs, 2, dtype=dtype)[:, 0, :, 0]
    if layout == "columns":
        return draw(outputs, inputs + 3, dtype=dtype)[:, 1 : inputs + 1]
    return draw(outputs, inputs, dtype=dtype)


# The op


@pytest.mark.parametrize("layout", ["plain", "transposed", "columns", "strided"])
@pytest.mark.parametrize("biased", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_op_equals_its_reference(shape, dtype, biased, layout, threads):
    torch.manual_seed(0)
    rows, inputs, outputs = SHAPES[shape]
    x, w = draw(rows, inputs, dtype=dtype), weight_of(layout, outputs, inputs, dtype)
    b = draw(outputs, 2, dtype=dtype)[:, 0] if biased else None
    y, plain = torch.full((2, rows, outputs), math.nan, dtype=dtype).unbind()
    ops.linear_(y, x, w, b)
    reference.linear_(plain, x, w, b)
    truth = F.linear(x.double(), w.double(), None if b is None else b.double())
    # A running sum of numbers of random sign errs by about eps times the root of their number.
    assert_as_accurate(y, truth, plain, torch.finfo(dtype).eps * max(4, inputs**0.5))


@compiled
@pytest.mark.parametrize("shape", [(300, 900, 130), (800, 900, 150)], ids=str)
def test_the_op_has_the_same_bits_for_every_number_of_threads(shape):
    torch.manual_seed(0)
    rows, inputs, outputs = shape
    x, w = draw(rows, inputs, dtype=torch.float32), draw(outputs, inputs, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(x.new_empty(rows, outputs))
        ops.linear_(results[-1], x, w)
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@compiled
def test_rows_scaled_by_powers_of_two_are_scaled_exactly():
    # The proof of the layout weighs the samples so, and compares.
    torch.manual_seed(0)
    x, w = draw(300, 900, dtype=torch.float32), draw(130, 900, dtype=torch.float32)
    weights = 2.0 ** torch.randint(-20, 20, (300, 1))
    y, scaled = x.new_empty(300, 130), x.new_empty(300, 130)
    ops.linear_(y, x, w)
    ops.linear_(scaled, x * weights, w)
    assert torch.equal(scaled, y * weights)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_row(value):
    x, w = torch.ones(9, 40), torch.ones(33, 40)
    x[4, 7] = value
    y = x.new_empty(9, 33)
    ops.linear_(y, x, w)
    torch.testing.assert_close(y, x @ w.T, equal_nan=True)
    assert y[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all() and not y[4].isfinite().any()


def test_the_op_is_declared_well():
    x, w = draw(5, 7), draw(3, 7)
    opcheck(torch.ops.mas_fast.linear_, (draw(5, 3), x, w, draw(3)))
    opcheck(torch.ops.mas_fast.linear_, (draw(5, 3), x, w))


@compiled
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"output": torch.zeros(5, 4)}, "output must"),
        ({"input": torch.zeros(5, 6)}, "weight must"),
        ({"input": torch.zeros(5)}, "2 axes"),
        ({"input": torch.zeros(7, 5).T}, "contiguous"),
        ({"weight": torch.zeros(3, 7, dtype=torch.float64)}, "weight must be on the CPU and of the dtype"),
        ({"weight": torch.zeros(6, 14)[::2, ::2]}, "stride of 1"),
        ({"bias": torch.zeros(4)}, "bias must"),
        ({"bias": torch.zeros(6)[::2]}, "contiguous"),
        ({"output": torch.zeros(5, 3, dtype=torch.bfloat16)}, "float32 or float64"),
    ],
)
def test_the_compiled_op_refuses_what_does_not_fit(change, text):
    given = {"output": torch.zeros(5, 3), "input": torch.zeros(5, 7), "weight": torch.zeros(3, 7), "bias": None}
    with pytest.raises(RuntimeError, match=text):
        torch.ops.mas_fast.linear_(**(given | change))


# Which calls it runs


X, W, B = draw(5, 7), draw(3, 7), draw(3)
CALLS = {
    "linear": (F.linear, lambda x: (x, W, B)),
    "linear_without_bias": (F.linear, lambda x: (x, W)),
    "linear_with_none": (F.linear, lambda x: (x, W, None)),
    "linear_of_sequences": (F.linear, lambda x: (x.view(5, 1, 7).expand(5, 2, 7), W, B)),
    "matmul": (torch.matmul, lambda x: (x, W.T)),
    "mm": (torch.mm, lambda x: (x, W.T)),
    "operator": (torch.Tensor.__matmul__, lambda x: (x, W.T)),
    "method": (torch.Tensor.matmul, lambda x: (x, W.T.contiguous())),
    "addmm": (torch.addmm, lambda x: (B, x, W.T)),
    "addmm_method": (torch.Tensor.addmm, lambda x: (B, x, W.T)),
    "parameter_left": (torch.matmul, lambda x: (W, x.T.detach())),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_products_with_their_gradients(calls, name):
    function, arguments = CALLS[name]
    ours, theirs = X.clone().requires_grad_(), X.clone().requires_grad_()
    y, truth = products.run(function, arguments(ours), {}), function(*arguments(theirs))
    torch.testing.assert_close(y, truth, rtol=1e-13, atol=1e-13)
    assert y.shape == truth.shape and len(calls) == 1
    if truth.requires_grad:
        delta = torch.randn_like(truth)
        (gradient,) = torch.autograd.grad(y, ours, delta)
        torch.testing.assert_close(gradient, *torch.autograd.grad(truth, theirs, delta), rtol=1e-13, atol=1e-13)
        assert len(calls) == 2


class Subclass(torch.Tensor):
    pass


LEFT = {
    "gradient_of_w": (F.linear, lambda: (X, W.clone().requires_grad_(), B), {}),
    "gradient_of_b": (F.linear, lambda: (X, W, B.clone().requires_grad_()), {}),
    "half": (F.linear, lambda: (X.bfloat16(), W.bfloat16()), {}),
    "vector": (F.linear, lambda: (X[0], W, B), {}),
    "column_of_w": (F.linear, lambda: (X, W[0]), {}),
    "bias_of_one": (F.linear, lambda: (X, W, B[:1]), {}),
    "keyword": (torch.mm, lambda: (X,), {"mat2": W.T}),
    "out": (torch.mm, lambda: (X, W.T), {"out": torch.zeros(5, 3, dtype=torch.float64)}),
    "beta": (torch.addmm, lambda: (B, X, W.T), {"beta": 2.0}),
    "matrix_bias": (torch.addmm, lambda: (draw(5, 3), X, W.T), {}),
    "bmm": (torch.matmul, lambda: (draw(2, 5, 7), draw(2, 7, 3)), {}),
    "dot": (torch.matmul, lambda: (X[0], W[0]), {}),
    "negative_view": (torch.mm, lambda: (draw(5, 7).to(torch.complex128).conj().imag, W.T), {}),
    "complex": (torch.mm, lambda: (X.to(torch.complex128), W.T.to(torch.complex128)), {}),
    "sparse": (torch.mm, lambda: (X.to_sparse(), W.T), {}),
    "subclass": (F.linear, lambda: (X.as_subclass(Subclass), W), {}),
    "whole_numbers": (torch.mm, lambda: (torch.ones(2, 3).long(), torch.ones(3, 2).long()), {}),
    "another_function": (torch.bmm, lambda: (draw(2, 5, 7), draw(2, 7, 3)), {}),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_calls_are_left_to_torch(calls, name):
    function, arguments, options = LEFT[name]
    torch.manual_seed(0)
    y = products.run(function, arguments(), options)
    torch.manual_seed(0)
    truth = function(*arguments(), **options)
    assert type(y) is type(truth) and y.dtype == truth.dtype and y.requires_grad == truth.requires_grad
    torch.testing.assert_close(y, truth)
    assert calls == []


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (F.linear, (X, draw(3, 6))),
        (torch.mm, (X, draw(6, 3))),
        (F.linear, (X, None)),
        (F.linear, (X, W.float())),
        (torch.mm, (X.expand(2, 5, 7), W.T)),
        (torch.Tensor.mm, (X.expand(2, 5, 7), W.T)),
        (torch.matmul, (X, W.T, None)),
        (torch.addmm, (B, X, W.T, None)),
        (F.linear, (X, W, B, None)),
    ],
)
def test_errors_are_those_of_torch(calls, function, arguments):
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        function(*arguments)
    with pytest.raises(theirs.type) as ours:
        products.run(function, arguments, {})
    assert str(ours.value) == str(theirs.value)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_autocast_and_transforms_are_left_to_torch(calls):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert products.run(F.linear, (X.float(), W.float()), {}).dtype == torch.bfloat16
    mapped = torch.func.vmap(lambda row: products.run(F.linear, (row[None], W), {}))(X)
    torch.testing.assert_close(mapped[:, 0], F.linear(X, W))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
        tangent = torch.autograd.forward_ad.unpack_dual(products.run(F.linear, (dual, W), {})).tangent
    torch.testing.assert_close(tangent, F.linear(torch.ones_like(X), W))
    assert calls == []


def test_a_weight_changed_before_the_backward_is_an_error(calls):
    x, w = X.clone().requires_grad_(), W.clone()
    y = products.run(F.linear, (x, w), {})
    w.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_can_be_differentiated(calls):
    def of(function):
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(F.linear, (x, W), {}).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.pow(2).sum(), x)[0]

    torch.testing.assert_close(of(products.run), of(lambda function, args, _: function(*args)), rtol=1e-12, atol=0)
    assert len(calls) == 2  # the first forward, and once on the way back to x


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_a_backward_may_be_transformed(calls):
    # Of forward-mode gradients and torch.func, a Function knows nothing in its backward either.
    def of(function, transform):
        x = X.clone().requires_grad_()
        y = function(F.linear, (x, W, B), {})
        return transform(lambda delta, **options: torch.autograd.grad(y, x, delta, retain_graph=True, **options)[0])

    rows, tangent = draw(4, 5, 3), draw(5, 3)

    def dual(gradient):
        with torch.autograd.forward_ad.dual_level():
            made = gradient(torch.autograd.forward_ad.make_dual(rows[0], tangent))
            return torch.autograd.forward_ad.unpack_dual(made).tangent

    for transform in (
        dual,
        lambda gradient: torch.func.jvp(gradient, (rows[0],), (tangent,))[1],
        lambda gradient: torch.func.vmap(gradient)(rows),
        lambda gradient: gradient(rows, is_grads_batched=True),
    ):
        truth = of(lambda function, args, _: function(*args), transform)
        torch.testing.assert_close(of(products.run, transform), truth, rtol=1e-12, atol=1e-12)


def test_small_products_are_left_to_torch(calls, monkeypatch):
    monkeypatch.setattr(products, "LEAST_WORK", 5 * 7 * 3 + 1)
    products.run(F.linear, (X, W), {})
    monkeypatch.setattr(products, "LEAST_WORK", 5 * 7 * 3)
    monkeypatch.setattr(products, "FULL_WIDTH", 4)
    products.run(F.linear, (X, W), {})
    assert calls == []
    monkeypatch.setattr(products, "FULL_WIDTH", 3)
    products.run(F.linear, (X, W), {})
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "ours"),
    [
        (768, 400, 10, True),
        (768, 10, 400, True),
        (64, 4096, 8, True),
        (63, 8192, 8, False),
        (512, 784, 7, False),
        (2, 65536, 32, True),
        (2, 131072, 31, False),
        (255, 256, 32, False),
        (256, 256, 32, True),
    ],
)
def test_which_products_are_worth_it(rows, inputs, outputs, ours):
    assert products._fits(torch.empty(rows, inputs), torch.empty(outputs, inputs), None) is ours


@pytest.mark.parametrize(
    ("vendor", "kernels", "torchs", "mkl", "slow"),
    [
        ("AuthenticAMD", "avx512", "AVX512", True, True),
        ("GenuineIntel", "avx512", "AVX512", True, False),
        (None, "avx512", "AVX512", True, False),
        ("AuthenticAMD", "avx2", "AVX512", True, False),
        ("AuthenticAMD", "avx2", "AVX2", True, False),
        ("AuthenticAMD", None, "AVX512", True, False),
        ("AuthenticAMD", "avx512", "AVX512", False, False),
    ],
)
def test_where_torch_is_slow(monkeypatch, vendor, kernels, torchs, mkl, slow):
    monkeypatch.setattr(products, "cpuinfo", {"vendor_id": vendor}.get)
    monkeypatch.setattr(ops, "cpu_capability", lambda: kernels)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: torchs)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    products.torch_is_slow.cache_clear()
    try:
        assert products.torch_is_slow() is slow
    finally:
        products.torch_is_slow.cache_clear()


def test_the_processor_is_asked_by_field(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nvendor_id\t: A: B\n\nprocessor\t: 1\n")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert (machine.cpuinfo("processor"), machine.cpuinfo("vendor_id")) == ("0", "A: B")
    assert machine.cpuinfo("vendor") is None
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "none")
    assert machine.cpuinfo("processor") is None


# The pass that runs them

MODELS = ["mlp", "norms", "transformer", "token", "packed_projection"]


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("name", MODELS)
def test_scopes_are_as_with_torchs_products(calls, monkeypatch, name, scope):
    model, batch = build(DIRECT[name])
    ours = estimate_importance(model, [batch], dtype=torch.float64, scope=scope)
    assert calls
    monkeypatch.setattr(products, "torch_is_slow", lambda: False)
    plain = estimate_importance(model, [batch], dtype=torch.float64, scope=scope)
    assert worst_error(ours, dict(plain)) <= 1e-11


@pytest.mark.parametrize("name", [*DIRECT, *JOINED])
def test_omega_is_that_of_the_loop(calls, name):
    model, batch = build((DIRECT | JOINED)[name])
    assert worst_error(estimate_importance(model, [batch], dtype=torch.float64), truth_of(model, batch)) <= 1e-11


@pytest.mark.filterwarnings("ignore::mas_fast.errors.LoopWarning")
@pytest.mark.parametrize("name", LOOPED)
def test_what_loops_is_exact(calls, name):
    model, batch, _ = build(LOOPED[name])
    assert worst_error(estimate_importance(model, [batch], dtype=torch.float64), truth_of(model, batch)) <= 1e-11


def test_float32_is_as_accurate_as_with_torchs_products(calls, monkeypatch):
    model, batch = build(DIRECT["transformer"])
    truth = truth_of(model, batch)
    model = model.float()
    ours = worst_error(estimate_importance(model, [batch]), truth)
    assert calls
    monkeypatch.setattr(products, "torch_is_slow", lambda: False)
    assert ours <= 1.5 * worst_error(estimate_importance(model, [batch]), truth) + 1e-7


class Prompted(nn.Module):
    """A trained prompt before blocks that are frozen, each behind a checkpoint."""

    def __init__(self, width, **options):
        super().__init__()
        self.options = options
        self.prompt = nn.Parameter(draw(2, 6))
        blocks = [nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 6)) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks).double().requires_grad_(False)

    def forward(self, x):
        x = torch.cat([self.prompt.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = x + checkpoint(block, x, **self.options)
        return x


def save_products():
    """Return the contexts of a selective checkpoint that keeps the results of products."""
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default, torch.ops.aten.addmm.default])


@pytest.mark.parametrize("width", [6, 9], ids=["square", "wide"])
@pytest.mark.parametrize(
    "options",
    [{"use_reentrant": False}, {"use_reentrant": True}, {"use_reentrant": False, "context_fn": save_products}],
    ids=["plain", "reentrant", "selective"],
)
@pytest.mark.parametrize("frozen", [True, False])
def test_checkpoints_of_frozen_layers(calls, width, options, frozen):
    # What a checkpoint saves is made again in the backward, perhaps by torch's own product, which saves W otherwise.
    torch.manual_seed(0)
    model, batch = Prompted(width, **options), draw(5, 3, 6)
    model.blocks.requires_grad_(not frozen)
    importance = estimate_importance(model, [batch], dtype=torch.float64)
    model.options = {"use_reentrant": False}  # the loop asks for gradients in a way that others refuse
    assert worst_error(importance, truth_of(model, batch)) <= 1e-11


@pytest.mark.parametrize("depth", [2, 6])
def test_gradients_of_products_are_not_kept(calls, monkeypatch, depth):
    # A checkpoint of one trained layer has the backward watched, with the gradients of all products.
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6).double() for _ in range(depth)]
    model = Lambda(
        lambda m, x: m.layers(checkpoint(m.first, x, use_reentrant=False)),
        first=nn.Linear(6, 6).double(),
        layers=nn.Sequential(*layers),
    )
    kept = []
    end = Forward.end
    monkeypatch.setattr(Forward, "end", lambda self: (kept.append(len(self._constants)), end(self)))
    estimate_importance(model, [draw(5, 3, 6)], dtype=torch.float64)
    assert calls and max(kept) < depth


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(calls, reentrant):
    torch.manual_seed(0)
    plain = Lambda(
        lambda m, x: m.second(m.first(x).tanh()), first=nn.Linear(6, 9).double(), second=nn.Linear(9, 4).double()
    )
    model = Lambda(
        lambda m, x: checkpoint(m.plain, x.clone().requires_grad_(), use_reentrant=reentrant),
        plain=plain,
    )
    batch = draw(5, 3, 6)
    importance = estimate_importance(model, [batch], dtype=torch.float64)
    truth = {f"plain.{name}": omega for name, omega in truth_of(plain, batch).items()}
    assert worst_error(importance, truth) <= 1e-11
    # What a checkpoint saves must be what the repeat saves, wherever that runs.
    assert (len(calls) >= 6) == reentrant


def test_frozen_layers_run_by_it_too(calls):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model[2].requires_grad_(False)
    batch = draw(5, 6)
    importance = estimate_importance(model, [batch], dtype=torch.float64)
    assert {(4, 9), (9, 4)} <= set(calls)
    assert worst_error(importance, truth_of(model, batch)) <= 1e-11


def test_verify_sees_the_loop_of_plain_torch(calls):
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)), torch.randn(5, 6)
    report = verify(model, batch)
    assert report.passed and report.loop_dtype == torch.float64 and calls
