"""The penalty over the fused ops: every memory layout and dtype, what goes before and after it, and torch.compile."""

import copy
import time
import warnings

import pytest
import torch
from compare import relative_error
from torch import nn

import mas_fast
from mas_fast.importance import Importance
from mas_fast.kernels import steps
from mas_fast.mas import MAS
from mas_fast.reference_steps import of_each

# How far a gradient may be from float64, relative in norm: its own rounding, and a little for the arithmetic.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
LAM = 0.7


class Bag(nn.Module):
    """Parameters w0, w1, ... of given tensors, as they lie in memory."""

    def __init__(self, values):
        super().__init__()
        for index, value in enumerate(values):
            self.register_parameter(f"w{index}", nn.Parameter(value))


def draw(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def moved(values, lam=LAM, **state):
    """Return a MAS over parameters of these values that have moved away from θ*, and Ω and θ* in float64."""
    model = Bag(values)
    mas = MAS(model, lam=lam, **state)
    omegas = {f"w{i}": noise.square() for i, noise in enumerate(draw([v.shape for v in values], seed=1))}
    mas.consolidate(Importance({name: omega.float() for name, omega in omegas.items()}, 1))
    held = {name: (mas.omega[name].double(), mas.anchor[name].double()) for name in omegas}
    with torch.no_grad():
        for parameter, noise in zip(model.parameters(), draw([v.shape for v in values], seed=2), strict=True):
            # New memory, laid out as it was, and not shared if it was.
            parameter.data = (parameter + noise.to(parameter.dtype)) if 0 not in parameter.stride() else parameter + 1
    return mas, held


def formula(mas, held, lam=LAM):
    """Return the value and the gradients in float64."""
    value, gradients = 0.0, {}
    for name, parameter in mas.model.named_parameters():
        omega, anchor = held[name]
        difference = parameter.detach().double() - anchor
        value += lam * float((omega * difference.square()).sum())
        gradients[name] = 2 * lam * omega * difference
    return value, gradients


def assert_gradients(mas, gradients, times=1.0, existing=0.0):
    """Demand gradients, of which some were there before: a sum may cancel what was rounded before."""
    for name, parameter in mas.model.named_parameters():
        assert parameter.grad.dtype == parameter.dtype
        error = (parameter.grad.double() - existing - times * gradients[name]).norm()
        size = (times * gradients[name].abs() + existing).norm()
        assert error <= ROUNDING[parameter.dtype] * size, name


def by_dtype(dtype):
    return [value.to(dtype) for value in draw([(16, 8), (3, 5, 7), (), (0, 4), (1,), (129, 17)])]


def expanded():
    return torch.tensor([[1.0], [2.0]]).expand(2, 5)


VALUES = {
    "one": lambda: [torch.randn(33, 7)],
    "700 small": lambda: [value.float() for value in draw([(1 + i % 7, 1 + i % 5) for i in range(700)])],
    "channels last": lambda: [torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last), torch.randn(4)],
    "transposed": lambda: [torch.randn(6, 9).t(), torch.randn(2, 3, 4).permute(2, 0, 1)],
    "sliced": lambda: [torch.randn(8, 8)[::2, 1:5]],
    "several dtypes": lambda: [value.to(dtype) for value, dtype in zip(draw([(40, 3)] * 4), ROUNDING, strict=True)],
    **{str(dtype).removeprefix("torch."): (lambda dtype=dtype: by_dtype(dtype)) for dtype in ROUNDING},
}


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("how", ["differentiated", "in place", "in place, gradients there"])
def test_against_the_formula_in_float64(make, how):
    torch.manual_seed(0)
    mas, held = moved(make())
    value, gradients = formula(mas, held)
    if how == "differentiated":
        actual = mas.penalty()
        actual.backward()
    else:
        if how == "in place, gradients there":
            for parameter in mas.model.parameters():
                # As autograd lays them out, and otherwise.
                parameter.grad = torch.ones_like(parameter, memory_format=torch.contiguous_format)
        actual = mas.add_penalty_grad_()
    dtypes = {parameter.dtype for parameter in mas.model.parameters()}
    assert actual.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32) and actual.shape == ()
    tolerance = 1e-12 if dtypes == {torch.float64} else 1e-6
    assert abs(float(actual.detach()) - value) <= tolerance * value
    assert_gradients(mas, gradients, existing=float(how == "in place, gradients there"))
    assert sum(mas.penalty_by_parameter().values()) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("how", ["differentiated", "in place"])
def test_expanded_parameters_and_gradients(how):
    mas, held = moved([expanded(), torch.randn(3)])
    mas.model.w0.data = expanded() + 0.5
    mas.model.w0.data = mas.model.w0.data[:, :1].expand(2, 5)
    mas.model.w1.grad = torch.ones(1).expand(3)
    value, gradients = formula(mas, held)
    gradients["w1"] += 1
    if how == "differentiated":
        mas.model.w1.grad = mas.model.w1.grad.clone()
        actual = mas.penalty()
        actual.backward()
    else:
        actual = mas.add_penalty_grad_()
    assert float(actual.detach()) == pytest.approx(value, rel=1e-6)
    assert_gradients(mas, gradients)


def test_values_by_parameter():
    # λ Ω (θ − θ*)²: 2 · 3 · 1 and 2 · 5 · 4; w2 is frozen, and w3 has no Ω.
    model = Bag([torch.zeros(1) for _ in range(4)])
    mas = MAS(model, lam=2.0)
    mas.consolidate(Importance({f"w{i}": torch.tensor([value]) for i, value in enumerate([3.0, 5.0, 7.0])}, 1))
    model.w2.requires_grad_(False)
    with torch.no_grad():
        model.w0.fill_(1.0)
        model.w1.fill_(-2.0)
    assert mas.penalty_by_parameter() == {"w0": 6.0, "w1": 40.0}
    assert mas.penalty().item() == 46.0


class TestInALoss:
    @pytest.mark.parametrize("scale", [2.0**-10, 1.0, 2.0**16])
    def test_scaled_loss(self, scale):
        mas, held = moved(by_dtype(torch.float32))
        _, gradients = formula(mas, held)
        (scale * mas.penalty()).backward()
        for parameter in mas.model.parameters():
            parameter.grad /= scale
        assert_gradients(mas, gradients)

    def test_grad_scaler(self):
        mas, held = moved(by_dtype(torch.float32))
        value, gradients = formula(mas, held)
        optimizer = torch.optim.SGD(mas.model.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        scaler.scale(mas.penalty()).backward()
        scaler.unscale_(optimizer)
        assert_gradients(mas, gradients)
        assert float(mas.add_penalty_grad_()) == pytest.approx(value, rel=1e-6)
        assert_gradients(mas, gradients, times=2)

    def test_gradient_accumulation(self):
        # Twice in one graph, and a third time in a second backward.
        mas, held = moved(by_dtype(torch.float32))
        _, gradients = formula(mas, held)
        (0.5 * mas.penalty() + 0.25 * mas.penalty()).backward()
        (0.25 * mas.penalty()).backward()
        assert_gradients(mas, gradients)

    def test_one_value_used_twice(self):
        mas, held = moved(by_dtype(torch.float64))
        value, gradients = formula(mas, held)
        penalty = mas.penalty()
        (3 * penalty + penalty.square()).backward()
        assert_gradients(mas, gradients, times=3 + 2 * value)

    def test_second_derivatives(self):
        mas, held = moved([value.double() for value in draw([(3, 2), (5,)])])
        first = torch.autograd.grad(mas.penalty(), list(mas.model.parameters()), create_graph=True)
        sum(gradient.square().sum() for gradient in first).backward()
        for name, parameter in mas.model.named_parameters():
            omega, anchor = held[name]
            expected = 2 * (2 * LAM * omega) ** 2 * (parameter.detach() - anchor)
            assert relative_error(parameter.grad, expected) <= 1e-12

    def test_backward_is_refused_after_a_step_in_between(self):
        mas, _ = moved([torch.randn(5)])
        penalty = mas.penalty()
        with torch.no_grad():
            mas.model.w0 += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            penalty.backward()

    def test_gradients_that_a_graph_needs_are_known_to_have_changed(self):
        mas, _ = moved([torch.randn(5)])
        (gradient,) = torch.autograd.grad(mas.model.w0.sin().sum(), mas.model.w0, create_graph=True)
        mas.model.w0.grad = gradient
        again = mas.model.w0.grad.square().sum()
        mas.add_penalty_grad_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            again.backward()


def test_overflow_of_float16_is_an_error_that_says_where():
    model = Bag([torch.zeros(3, dtype=torch.float16), torch.zeros(2, dtype=torch.float16), torch.zeros(2)])
    mas = MAS(model, lam=1.0)
    mas.consolidate(
        Importance({f"w{i}": torch.full_like(p, 1e5, dtype=torch.float32) for i, p in enumerate(model.parameters())}, 1)
    )
    with torch.no_grad():
        model.w0[1:] += 1.0
        model.w2 += 1.0
    with pytest.raises(FloatingPointError, match="(?s)'w0' has 2 of 3 in torch.float16.*lower lam") as caught:
        mas.add_penalty_grad_()
    assert "w1" not in str(caught.value) and "w2" not in str(caught.value)
    # What was inf before is not of this making: GradScaler will skip the step.
    model.zero_grad()
    mas.lam = 1e-3
    model.w0.grad = torch.full((3,), float("inf"), dtype=torch.float16)
    mas.add_penalty_grad_()


class TestPlan:
    """What is looked up once must be looked up again when the model has changed."""

    def net(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 2, bias=False)))
        mas = MAS(model)
        mas.consolidate(Importance({n: torch.ones_like(p) for n, p in model.named_parameters()}, 1))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1.0
        return model, mas

    def test_another_parameter_in_the_same_place(self):
        model, mas = self.net()
        assert mas.penalty().item() == 24.0
        model[0].bias = nn.Parameter(mas.anchor["0.bias"].clone())
        assert mas.penalty().item() == 20.0
        mas.add_penalty_grad_()
        assert torch.equal(model[0].bias.grad, torch.zeros(4))

    def test_another_module_in_the_same_place(self):
        model, mas = self.net()
        old = model[1][0]
        model[1] = nn.Sequential(nn.Linear(4, 2, bias=False))
        with torch.no_grad():
            model[1][0].weight.copy_(mas.anchor["1.0.weight"] + 2.0)
        assert mas.penalty().item() == pytest.approx(16.0 + 32.0, rel=1e-6)
        mas.add_penalty_grad_()
        assert old.weight.grad is None and model[1][0].weight.grad is not None

    def test_another_model(self):
        model, mas = self.net()
        mas.model = copy.deepcopy(model)
        mas.add_penalty_grad_()
        assert model[0].weight.grad is None and mas.model[0].weight.grad is not None

    def test_frozen_and_unfrozen(self):
        model, mas = self.net()
        model[0].requires_grad_(False)
        assert mas.penalty().item() == 8.0
        model[0].requires_grad_(True)
        assert mas.penalty().item() == 24.0

    def test_another_dtype(self):
        model, mas = self.net()
        model.double()
        assert mas.penalty().dtype == torch.float64 and mas.penalty().item() == pytest.approx(24.0, rel=1e-6)

    def test_another_shape_of_the_same_parameter(self):
        model, mas = self.net()
        model[0].bias.data = torch.zeros(5)
        with pytest.raises(ValueError, match=r"MAS.adapt(?s:.*)'0.bias' has shape \[4\], the model has \[5\]"):
            mas.add_penalty_grad_()

    def test_copies_are_independent(self):
        _, mas = self.net()
        other = copy.deepcopy(mas)
        with torch.no_grad():
            other.model[0].weight += 1.0
        assert mas.penalty().item() == 24.0 and other.penalty().item() == 24.0 + 12 * 3.0

    def test_parameters_without_a_table_entry(self):
        class Odd(nn.Module):
            """Names a parameter that its tables do not have."""

            def __init__(self):
                super().__init__()
                object.__setattr__(self, "hidden", nn.Parameter(torch.zeros(2)))

            def named_parameters(self, *args, **kwargs):
                yield "hidden", self.hidden

        model = Odd()
        mas = MAS(model)
        mas.consolidate(Importance({"hidden": torch.ones(2)}, 1))
        object.__setattr__(model, "hidden", nn.Parameter(torch.ones(2)))
        assert mas.add_penalty_grad_().item() == 2.0
        assert torch.equal(model.hidden.grad, torch.full((2,), 2.0))

    def test_held_and_unknown(self):
        model, mas = self.net()
        foreign, (weight, bias, last) = nn.Parameter(torch.ones(7)), model.parameters()
        asked = [last, foreign, bias]
        mas.lam = {"1.*": 3.0, "*": 0.5}
        for _ in range(2):
            held = mas._held(asked)
            omegas, _, anchors = of_each(asked, *held[:3], held.places)
            assert [omega.numel() for omega in omegas] == [anchor.numel() for anchor in anchors] == [8, 0, 4]
            assert held.lams == [3.0, 0.0, 0.5]
            steps.check_held(asked, held)
        assert torch.equal(anchors[2], mas.anchor["0.bias"])
        assert mas._held(asked) is held
        mas.lam = 1.0
        assert mas._held(asked).lams == [1.0, 0.0, 1.0]
        assert mas._unknown([foreign, weight, bias, nn.Parameter(torch.ones(1))]) == [0, 3]

    def test_a_step_costs_little_beside_the_op(self, monkeypatch):
        # 700 parameters of one entry each: all but the op is Python. Half a millisecond is usual.
        model = Bag([torch.zeros(1) for _ in range(700)])
        mas = MAS(model)
        mas.consolidate(Importance({name: torch.ones(1) for name, _ in model.named_parameters()}, 1))
        mas.add_penalty_grad_()
        group = mas._plan.groups[0]
        grads, thetas = [p.grad for p in group.parameters], [p.detach() for p in group.parameters]

        def time_of(call):
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        # Without the op itself: in plain torch it takes 45 ms, whose noise is as large as what is measured.
        sums = steps.add_penalty_grad_(grads, thetas, group.held)
        monkeypatch.setattr(steps, "add_penalty_grad_", lambda *given: sums)
        assert min(time_of(mas.add_penalty_grad_) for _ in range(100)) <= 2e-3


class TestCompile:
    def training(self, **state):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        mas = MAS(model, lam=LAM, **state)
        mas.consolidate([torch.randn(5, 6)])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        return model, mas

    def gradients(self, model, step, data):
        model.zero_grad()
        loss = step(data)
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in model.parameters())]

    def assert_same(self, model, compiled, step, data):
        for actual, expected in zip(
            self.gradients(model, compiled, data), self.gradients(model, step, data), strict=True
        ):
            # One rounding apart: λ is multiplied last where it must be no constant of the graph.
            assert actual.dtype == expected.dtype and relative_error(actual, expected) <= 3e-7

    @pytest.mark.parametrize("state", [{}, {"omega_dtype": torch.uint8, "anchor_dtype": torch.bfloat16}], ids=str)
    @pytest.mark.parametrize("wrapped", [False, True])
    def test_one_graph_and_the_same_numbers(self, state, wrapped):
        torch._dynamo.reset()
        model, mas = self.training(**state)
        if wrapped:
            mas = MAS(torch.compile(model, backend="eager"), lam=LAM, **state)
            mas.consolidate(Importance({n: torch.ones_like(p) for n, p in model.named_parameters()}, 1))
            with torch.no_grad():
                model[0].weight += 1.0

        def step(data):
            return model(data).square().mean() + mas.penalty()

        graphs = []

        def counted(graph, inputs):
            graphs.append(graph)
            return graph

        data = torch.randn(4, 6)
        self.assert_same(model, torch.compile(step, backend="aot_eager", fullgraph=True), step, data)
        torch._dynamo.reset()
        compiled = torch.compile(step, backend=counted, fullgraph=True)
        self.assert_same(model, compiled, step, data)
        # λ, θ and another task change: no other graph.
        mas.lam = 3.0
        self.assert_same(model, compiled, step, data)
        with torch.no_grad():
            model[0].weight += 1.0
        self.assert_same(model, compiled, step, data)
        mas.consolidate(Importance({n: torch.ones_like(p) for n, p in model.named_parameters()}, 1))
        with torch.no_grad():
            model[0].weight += 1.0
        self.assert_same(model, compiled, step, data)
        assert len(graphs) == 1

    def test_the_model_changes(self):
        torch._dynamo.reset()
        model, mas = self.training()

        def step(data):
            return model(data).square().mean() + mas.penalty()

        compiled, data = torch.compile(step, backend="eager", fullgraph=True), torch.randn(4, 6)
        self.assert_same(model, compiled, step, data)
        # Another module in the place of one, which the same plan fits.
        model[2] = nn.Linear(8, 3)
        self.assert_same(model, compiled, step, data)

    # torch's own, when it goes on after a break with a tensor that has a graph.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    @pytest.mark.parametrize("first", [True, False])
    @pytest.mark.parametrize(
        "change",
        [
            lambda model, again: model[0].requires_grad_(again),
            lambda model, again: model.to(torch.float32 if again else torch.float64),
        ],
        ids=["frozen", "dtype"],
    )
    def test_a_model_that_is_not_as_it_was(self, change, first):
        # The first step of a graph may break it, to look the model over again.
        torch._dynamo.reset()
        model, mas = self.training()
        change(model, first)
        mas.penalty()

        def step(data):
            return model(data).square().mean() + mas.penalty()

        compiled = torch.compile(step, backend="eager")
        for again in (first, not first, first):
            change(model, again)
            data = torch.randn(4, 6, dtype=model[0].weight.dtype)
            actual, expected = compiled(data), step(data)
            assert actual.dtype == expected.dtype and relative_error(actual.detach(), expected.detach()) <= 3e-7

    def test_before_consolidate(self):
        torch._dynamo.reset()
        model = nn.Linear(3, 2)
        mas = MAS(model)

        def step(data):
            return model(data).square().mean() + mas.penalty()

        data = torch.randn(4, 3)
        compiled = torch.compile(step, backend="eager", fullgraph=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            first = compiled(data)
        assert torch.equal(first, model(data).square().mean())
        mas.consolidate([data])
        with torch.no_grad():
            model.weight += 1.0
        self.assert_same(model, compiled, step, data)

    def test_add_penalty_grad_in_a_compiled_step(self):
        torch._dynamo.reset()
        model, mas = self.training()
        other = copy.deepcopy(mas)

        def step(data):
            loss = model(data).square().mean()
            loss.backward()
            return mas.add_penalty_grad_()

        data = torch.randn(4, 6)
        value = torch.compile(step, backend="eager")(data)
        other.model(data).square().mean().backward()
        assert torch.equal(value, other.add_penalty_grad_())
        for actual, expected in zip(model.parameters(), other.model.parameters(), strict=True):
            assert relative_error(actual.grad, expected.grad) <= 1e-6


def test_transforms_of_functions_are_refused():
    mas, _ = moved([torch.randn(5, 3)])
    with pytest.raises(NotImplementedError, match="outside of torch.func"):
        torch.func.grad(lambda x: mas.penalty() * x)(torch.ones(()))


def test_opcheck_of_what_a_plan_holds():
    mas, _ = moved([torch.randn(5, 3), torch.randn(130)], omega_dtype=torch.uint8, anchor_dtype=torch.bfloat16)
    group = mas._plan.groups[0]
    thetas = [parameter.detach() for parameter in group.parameters]
    ops, places = torch.ops.mas_fast, {"places": group.held.places}
    torch.library.opcheck(ops.penalty, ([theta.requires_grad_() for theta in thetas], *group.held))
    thetas = [theta.detach() for theta in thetas]
    torch.library.opcheck(ops.penalty_grad, (torch.ones(2, dtype=torch.float64), thetas, *group.held))
    torch.library.opcheck(
        ops.penalty_grad_, ([torch.randn_like(theta) for theta in thetas], thetas, *group.held[:4]), places
    )


def test_the_step_of_the_optimizer_and_of_the_loss_agree():
    mas, held = moved([torch.randn(5, 3), torch.randn(4)])
    _, gradients = formula(mas, held)
    before = {name: parameter.detach().clone() for name, parameter in mas.model.named_parameters()}
    for parameter in mas.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    mas_fast.optim.SGD(mas.model.parameters(), lr=0.1, mas=mas).step()
    for name, parameter in mas.model.named_parameters():
        assert relative_error(parameter.detach(), before[name].double() - 0.1 * gradients[name]) <= 1e-6
