"""Exactness of the pass on whole models: against the float64 loop, for every batching and every order."""

import gc

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cases import DIRECT, JOINED, LOOPED, build
from compare import truth_of, worst_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mas_fast
from mas_fast import CaptureError, estimate_importance

# torch says of even kernels with padding="same" that they may be slow.
EXACT = DIRECT | JOINED

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@pytest.mark.parametrize("name", EXACT)
def test_rules_are_exact_in_float64(name):
    model, batch = build(EXACT[name])
    importance = estimate_importance(model, [batch], dtype=torch.float64)
    assert worst_error(importance, truth_of(model, batch)) <= 1e-11
    assert [row for row in importance.coverage if row.fallback] == []
    assert all(row.uses >= 1 for row in importance.coverage)


@pytest.mark.parametrize("name", EXACT)
def test_squares_are_exact_in_float64(name):
    model, batch = build(EXACT[name])
    importance = estimate_importance(model, [batch], dtype=torch.float64, statistic="square")
    assert worst_error(importance, truth_of(model, batch, statistic="square")) <= 1e-11


@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet", "norms", "transformer", "token", "packed_projection"])
def test_float32_is_within_rounding(name):
    model, batch = build(DIRECT[name])
    truth = truth_of(model, batch)
    model, batch = model.float(), batch.float() if batch.is_floating_point() else batch
    assert worst_error(estimate_importance(model, [batch]), truth) <= 1e-5


@pytest.mark.parametrize("name", EXACT)
def test_batching_and_order_do_not_matter(name):
    model, batch = build(EXACT[name])
    whole = estimate_importance(model, [batch], dtype=torch.float64)
    shuffled = batch[torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))]
    for data in (batch.split(1), batch.split(3), [shuffled], [batch, batch]):
        other = estimate_importance(model, data, dtype=torch.float64)
        assert worst_error(other, dict(whole)) <= 1e-11


@pytest.mark.parametrize("name", LOOPED)
def test_what_no_rule_covers_takes_the_loop_and_is_exact(name):
    model, batch, looped = build(LOOPED[name])
    for data in ([batch], batch.split(3)):
        importance = estimate_importance(model, data, dtype=torch.float64)
        assert worst_error(importance, truth_of(model, batch)) <= 1e-11
    assert {row.name for row in importance.coverage if row.rule == "loop"} == looped
    assert all(row.fallback for row in importance.coverage if row.rule == "loop")


def test_the_loop_is_announced_once_before_it_starts():
    model, batch, _ = build(LOOPED["custom_function"])
    with pytest.warns(
        mas_fast.errors.LoopWarning, match="1 of 3 parameters take one backward per sample, 6 more"
    ) as said:
        estimate_importance(model, [batch, batch])
    assert len(said) == 1


def test_the_loop_shows_in_the_progress_bar(capfd):
    model, batch, _ = build(LOOPED["custom_function"])
    with pytest.warns(mas_fast.errors.LoopWarning):
        estimate_importance(model, [batch], progress=True)
    assert "loop: sample 6 of 6" in capfd.readouterr().err
    estimate_importance(*build(DIRECT["mlp"])[:1], [build(DIRECT["mlp"])[1]], progress=True)
    assert "loop" not in capfd.readouterr().err


def test_unsupported_raise_says_where_and_what_to_do():
    model, batch, _ = build(LOOPED["custom_function"])
    with pytest.raises(CaptureError) as error:
        estimate_importance(nn.Sequential(model), [batch], unsupported="raise")
    assert "0.w [5]: used by DoubledBackward of the graph, behind no call" in str(error.value)
    assert "write these calls with torch functions" in str(error.value)


@pytest.mark.parametrize("name", LOOPED)
def test_unsupported_raise_lists_every_parameter(name):
    model, batch, looped = build(LOOPED[name])
    with pytest.raises(CaptureError) as error:
        estimate_importance(model, [batch], unsupported="raise")
    assert all(parameter in str(error.value) for parameter in looped)


@pytest.fixture
def stays():
    """What is left of the batches of a test. The collector skips what was there before: a walk over it takes long."""

    def names():
        gc.collect()
        ours = [type(o).__name__ for o in gc.get_objects() if type(o).__module__.startswith("mas_fast")]
        return [name for name in ours if name in ("Tap", "Forward", "Backward")]

    gc.freeze()
    yield names
    gc.unfreeze()


@pytest.mark.parametrize("name", EXACT)
def test_nothing_of_a_batch_stays(name, stays):
    # A cycle through autograd's graph is out of the garbage collector's sight.
    model, batch = build(EXACT[name])
    estimate_importance(model, [batch])
    assert stays() == []


@pytest.mark.parametrize("name", LOOPED)
def test_nothing_of_a_looped_batch_stays(name, stays):
    model, batch, _ = build(LOOPED[name])
    estimate_importance(model, [batch])
    assert stays() == []


def test_nothing_of_a_batch_with_an_error_stays(stays):
    model, batch = build(DIRECT["mlp"])
    bad = batch.clone()
    bad[0, 0] = float("nan")
    with pytest.raises(FloatingPointError):
        estimate_importance(model, [bad])
    assert stays() == []


def test_hand_computed():
    # y = W x, ‖y‖² has the gradient 2 y xᵀ: for x = (1, 0), y = (1, 3); for x = (-1, 1), y = (1, 1).
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    importance = estimate_importance(model, [torch.tensor([[1.0, 0.0], [-1.0, 1.0]])])
    # (2·[[1, 0], [3, 0]] + 2·[[1, 1], [1, 1]]) / 2; a batch gradient would have cancelled the first column.
    assert importance["weight"].tolist() == [[2.0, 1.0], [4.0, 1.0]]
    assert importance.num_samples == 2


def test_batch_gradient_is_something_else():
    # |Σ_n g_n| can only be smaller than Σ_n |g_n|, and is where signs differ between samples.
    model, batch = build(DIRECT["mlp"])
    model(batch).square().sum().backward()
    importance = estimate_importance(model, [batch], dtype=torch.float64)
    for name, parameter in model.named_parameters():
        batch_mode = parameter.grad.abs() / len(batch)
        assert bool((batch_mode <= importance[name] * (1 + 1e-12)).all())
    assert float(importance["0.weight"].sum()) > 1.2 * float(model[0].weight.grad.abs().sum() / len(batch))


def loop_of(model, batch):
    """Return the mean of |gradient| of every sample alone, in the arithmetic that the caller has set."""
    rows = []
    for sample in batch.split(1):
        value = model(sample).float().square().sum()
        gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
        rows.append(
            [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), gradients, strict=True)]
        )
    means = [torch.stack(column).double().abs().mean(0) for column in zip(*rows, strict=True)]
    return {name: mean for (name, _), mean in zip(model.named_parameters(), means, strict=True)}


NARROW = "mlp convnet resnet norms transformer token packed_projection gru tied shared attention_module".split()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_narrow_dtypes_are_as_accurate_as_their_own_loop(name, dtype, autocast):
    model, batch = build(EXACT[name])
    truth = truth_of(model, batch)
    model = model.float() if autocast else model.to(dtype)
    if batch.is_floating_point():
        batch = batch.to(torch.float32 if autocast else dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        importance = estimate_importance(model, [batch])
        looped = loop_of(model, batch)
    assert all(omega.dtype == torch.float32 for omega in importance.values())
    assert [row for row in importance.coverage if row.fallback] == []
    # The rounding is the model's own; sums in another order make other roundings of the same size.
    assert worst_error(importance, looped) <= 2 * torch.finfo(dtype).eps
    assert worst_error(importance, truth) <= worst_error(looped, truth) + torch.finfo(dtype).eps


def test_bfloat16_model_accumulates_in_float32():
    model, batch = build(DIRECT["mlp"])
    truth = truth_of(model, batch)
    importance = estimate_importance(model.bfloat16(), [batch.bfloat16()] * 300)
    assert importance["0.weight"].dtype == torch.float32
    # 300 equal batches: sums that were rounded to bfloat16 would have stopped growing.
    assert worst_error(importance, truth) <= 0.05


def test_partly_frozen_model():
    model, batch = build(DIRECT["convnet"])
    truth = truth_of(model, batch)
    frozen = ("0.weight", "4.weight", "4.bias", "10.bias")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    importance = estimate_importance(model, [batch], dtype=torch.float64)
    assert worst_error(importance, {name: t for name, t in truth.items() if name not in frozen}) <= 1e-11


def test_unused_parameter_is_zero_and_said_to_be_unused():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    importance = estimate_importance(model, [torch.randn(4, 3)], forward=lambda m, x: m["used"](x))
    assert not importance["idle.weight"].any() and importance["used.weight"].any()
    assert {row.name for row in importance.coverage if row.rule == "unused"} == {"idle.weight", "idle.bias"}


def test_layer_called_by_some_batches_only():
    # What a later batch brings up for the first time is proved then.
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}).double()
    batches = [torch.randn(4, 3).double() for _ in range(4)]

    def forward(m, x):
        h = m["a"](x)
        return m["b"](h.tanh()) if x is not batches[0] else h

    importance = estimate_importance(model, batches, forward=forward, dtype=torch.float64)
    truth = [mas_fast.reference.importance_loop(model, x, forward=lambda m, y, x=x: forward(m, x)) for x in batches]
    mean = {name: torch.stack([row[name] for row in truth]).mean(0) for name in truth[0]}
    assert worst_error(importance, mean) <= 1e-11


def test_parameter_that_turns_out_to_be_reused_in_a_later_batch():
    model = nn.Linear(3, 3).double()
    batches = [torch.randn(4, 3).double() for _ in range(3)]

    def forward(m, x):
        return m(x) if x is batches[0] else m(m(x).tanh())

    importance = estimate_importance(model, batches, forward=forward, dtype=torch.float64)
    truth = [mas_fast.reference.importance_loop(model, x, forward=lambda m, y, x=x: forward(m, x)) for x in batches]
    mean = {name: torch.stack([row[name] for row in truth]).mean(0) for name in truth[0]}
    assert worst_error(importance, mean) <= 1e-11
    assert {(row.rule, row.uses, row.fallback) for row in importance.coverage} == {("linear", 2, None)}


def test_layer_called_as_often_as_the_data_say():
    def forward(m, x):
        for _ in range(1 + int(x.sum() > 0) * 2):
            x = torch.tanh(m(x))
        return x

    model = nn.Linear(3, 3).double()
    batches = [torch.randn(4, 3).double().abs() * sign for sign in (1, -1, 1, -1)]
    importance = estimate_importance(model, batches, forward=forward, dtype=torch.float64)
    truth = [mas_fast.reference.importance_loop(model, x, forward=forward) for x in batches]
    mean = {name: torch.stack([row[name] for row in truth]).mean(0) for name in truth[0]}
    assert worst_error(importance, mean) <= 1e-11


def test_a_tensor_changed_after_its_use_is_an_error():
    def forward(m, x):
        h = m[0](x)
        y = m[1](h)
        h.zero_()
        return y

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        estimate_importance(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), [torch.randn(4, 3)], forward=forward)


def test_second_derivative_is_refused():
    def forward(m, x):
        x = x.requires_grad_()
        (g,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
        return g

    with pytest.raises(CaptureError, match="second derivatives"):
        estimate_importance(
            nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)), [torch.randn(4, 3)], forward=forward
        )


class Reversible(torch.autograd.Function):
    """Keeps a graph of its own and runs it backwards inside its backward."""

    @staticmethod
    def forward(ctx, x, layer):
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y = layer(ctx.x).tanh()
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, g):
        (gradient,) = torch.autograd.grad(ctx.y, ctx.x, g, retain_graph=True)
        return gradient, None


def test_a_graph_inside_of_a_node_is_not_missed():
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "inner": nn.Linear(4, 4), "b": nn.Linear(4, 2)}).double()
    plain = lambda m, x: m["b"](m["inner"](m["a"](x)).tanh())  # noqa: E731
    hidden = lambda m, x: m["b"](Reversible.apply(m["a"](x), m["inner"]))  # noqa: E731
    batches = [torch.randn(5, 3).double() for _ in range(3)]
    truth = estimate_importance(model, batches, forward=plain, dtype=torch.float64)
    assert worst_error(estimate_importance(model, batches, forward=hidden, dtype=torch.float64), truth) <= 1e-11


class Pooled(nn.Module):
    """Packed rows of several samples, pooled by what the data say belongs together."""

    def __init__(self, pool):
        super().__init__()
        self.pool, self.net = pool, nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x, owner):
        own = torch.arange(3)[:, None] == owner
        return self.pool(self.net(x), own, owner)


def pooled_by_list(h, own, owner):
    sums = list(torch.zeros(3, 2, dtype=h.dtype).unbind(0))
    for row, sample in zip(h.unbind(0), owner.tolist(), strict=True):
        sums[sample] = sums[sample] + row
    return torch.stack(sums)


def pooled_by_slices(h, own, owner):
    starts = [(owner == sample).nonzero().min() for sample in range(3)]
    return torch.stack([h[start : start + 1].sum(0) for start in starts])


POOLS = {
    "mask": lambda h, own, owner: (own[:, :, None] * h).sum(1),
    "where": lambda h, own, owner: torch.where(own[:, :, None], h[None], 0.0).sum(1),
    "softmax": lambda h, own, owner: h[:, 0].expand(3, -1).masked_fill(~own, -torch.inf).softmax(-1) @ h,
    "attention": lambda h, own, owner: F.scaled_dot_product_attention(torch.ones_like(h[:3]), h, h, attn_mask=own),
    "weighted": lambda h, own, owner: (own * torch.arange(1.0, 7, dtype=h.dtype)) @ h,
    "sparse": lambda h, own, owner: torch.sparse.mm(own.to(h.dtype).to_sparse(), h),
    "sparse_operator": lambda h, own, owner: own.to(h.dtype).to_sparse() @ h,
    "list": pooled_by_list,
    "slices": pooled_by_slices,
}


@pytest.mark.parametrize("pool", POOLS)
def test_rows_that_data_regroup_are_proved_again(pool):
    torch.manual_seed(0)
    model = Pooled(POOLS[pool]).double()
    owners = ([0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 2], [0, 1, 2, 2, 2, 2])
    batches = [(torch.randn(6, 3).double(), torch.tensor(owner)) for owner in owners]
    run = lambda m, batch: m(*batch)  # noqa: E731
    truth = [mas_fast.reference.importance_loop(model, batch, forward=run) for batch in batches]
    mean = {name: torch.stack([row[name] for row in truth]).mean(0) for name in truth[0]}
    importance = estimate_importance(model, batches, forward=run, dtype=torch.float64)
    assert worst_error(importance, mean) <= 1e-11


@pytest.mark.parametrize("window", [lambda p, a: p[a : a + 2], lambda p, a: p.narrow(0, a, 2)])
def test_windows_that_come_to_overlap(window):
    torch.manual_seed(0)
    model = nn.ParameterDict({"p": torch.randn(8, 3), "w": torch.randn(2, 3)}).double()

    def run(m, batch):
        x, (a, b) = batch
        first, second = window(m["p"], a), window(m["p"], b)
        return F.linear((x[:, None] + first).tanh().sum(1) + (x[:, None] * second).sum(1), m["w"]).tanh()

    batches = [(torch.randn(4, 3).double(), torch.tensor(starts)) for starts in ([0, 2], [0, 1], [3, 3])]
    truth = [mas_fast.reference.importance_loop(model, batch, forward=run) for batch in batches]
    mean = {name: torch.stack([row[name] for row in truth]).mean(0) for name in truth[0]}
    assert worst_error(estimate_importance(model, batches, forward=run, dtype=torch.float64), mean) <= 1e-11


def test_parametrized_weights_that_are_cached():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).double()
    batches = [torch.randn(5, 3).double() for _ in range(2)]
    truth = estimate_importance(model, batches, dtype=torch.float64)
    with nn.utils.parametrize.cached():
        cached = estimate_importance(model, batches, dtype=torch.float64)
    assert worst_error(cached, truth) <= 1e-11


def test_what_an_earlier_forward_left_on_the_module_is_refused():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.classes, self.layer, self.kept = nn.Linear(3, 4), nn.Linear(3, 4), None
            self.register_buffer("prompts", torch.randn(50, 3))

        def forward(self, x):
            if self.kept is None:
                self.kept = self.classes(self.prompts * x.mean()).tanh()
            return self.layer(x) @ self.kept.T

    with pytest.raises(CaptureError, match="cache on the module"):
        estimate_importance(Cached(), [torch.randn(5, 3)] * 2, forward=lambda m, x: m(x))


def test_parameters_inside_of_vmap_are_refused():
    model = nn.Linear(3, 2)
    with pytest.raises(CaptureError, match="inside of torch.vmap"):
        estimate_importance(model, [torch.randn(4, 3)], forward=lambda m, x: torch.vmap(m)(x))


def test_a_layer_norm_computes_its_statistics_once():
    class Count(TorchDispatchMode):
        norms = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.norms += func is torch.ops.aten.native_layer_norm.default
            return func(*args, **(kwargs or {}))

    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6))
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    with Count() as count:
        estimate_importance(model, [torch.randn(4, 5) for _ in range(3)])
    assert count.norms == len(forwards) >= 3
