"""The optimizers with the penalty inside, against torch's own with the penalty in the loss."""

import copy
import functools
import pickle
import traceback
import warnings

import pytest
import torch
import torch.distributed as dist
from compare import relative_error
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial

import mas_fast
from mas_fast import MAS, Importance

OURS = {"SGD": mas_fast.optim.SGD, "AdamW": mas_fast.optim.AdamW}
TORCHS = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}
EVERY = pytest.mark.parametrize("kind", ["SGD", "AdamW"])
LAM = 0.7
# How far the nearest number may be, relative and absolute.
ROUNDING = {torch.bfloat16: (2**-8, 2**-134), torch.float16: (2**-11, 2**-25)}

# Ragged, even, 0-dim, empty, and longer than the blocks of the kernels.
MIXED = [(7, 5), (16, 8), (), (0, 3), (1,), (3, 2, 3, 3), (4099,)]
SIZES = {"one": [(33,)], "many": [(1 + i % 7, 1 + i % 5) for i in range(700)], "large": [(257, 129)] * 5}

SGD_MOMENTUM = {"lr": 0.05, "momentum": 0.9}
OPTIONS = {
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd-weight_decay": ("SGD", {"lr": 0.1, "weight_decay": 0.1}),
    "sgd-momentum": ("SGD", SGD_MOMENTUM),
    "sgd-dampening": ("SGD", SGD_MOMENTUM | {"dampening": 0.3}),
    "sgd-nesterov": ("SGD", SGD_MOMENTUM | {"nesterov": True, "weight_decay": 0.02}),
    "sgd-maximize": ("SGD", SGD_MOMENTUM | {"maximize": True, "weight_decay": 0.1}),
    "sgd-tensor": ("SGD", {"lr": torch.tensor(0.1).double(), "weight_decay": torch.tensor(0.25)}),
    "adamw": ("AdamW", {"lr": 0.02}),
    "adamw-weight_decay": ("AdamW", {"lr": 0.02, "weight_decay": 0.3}),
    "adamw-betas": ("AdamW", {"lr": 0.02, "betas": (0.5, 0.75), "eps": 1e-3}),
    "adamw-amsgrad": ("AdamW", {"lr": 0.02, "amsgrad": True, "betas": (0.8, 0.9)}),
    "adamw-maximize": ("AdamW", {"lr": 0.02, "maximize": True}),
    "adamw-tensor": ("AdamW", {"lr": torch.tensor(0.02).double()}),
}
ALL_OPTIONS = pytest.mark.parametrize(("kind", "options"), OPTIONS.values(), ids=OPTIONS)
IMPLICIT = pytest.mark.parametrize("implicit", [False, True], ids=["explicit", "implicit"])


class Bag(nn.Module):
    """Parameters w0, w1, ... of given values."""

    def __init__(self, values):
        super().__init__()
        for index, value in enumerate(values):
            self.register_parameter(f"w{index}", nn.Parameter(value.clone()))


class Problem:
    """A smooth loss Σ ½ c (θ − b(t))², an Ω of a wide range, θ* and a start, all in float64 and fit for float16."""

    def __init__(self, shapes, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(make, *args):
            return [make(shape, *args, generator=generator).half().double() for shape in shapes]

        self.start, self.anchor, self.target = draw(torch.randn), draw(torch.randn), draw(torch.randn)
        self.curve = [0.5 + value for value in draw(torch.rand)]
        # Zeros, too: entries that nothing holds.
        self.omega = [4 * torch.relu(value - 0.2).half().double() for value in draw(torch.rand)]

    def loss(self, parameters, time):
        total = 0.0
        for theta, curve, target in zip(parameters, self.curve, self.target, strict=True):
            now = (target + 0.3 * torch.cos(target + time)).to(theta.dtype)
            total = total + (0.5 * curve.to(theta.dtype) * (theta - now) ** 2).sum()
        return total

    def penalty(self, parameters):
        rows = zip(parameters, self.omega, self.anchor, strict=True)
        return LAM * sum((o.to(p.dtype) * (p - a.to(p.dtype)) ** 2).sum() for p, o, a in rows)

    @torch.no_grad()
    def proximal_(self, parameters, lr):
        for theta, omega, anchor in zip(parameters, self.omega, self.anchor, strict=True):
            rate = 2 * lr * LAM * omega.to(theta.dtype)
            theta.copy_((theta + rate * anchor.to(theta.dtype)) / (1 + rate))

    def mas(self, dtype=torch.float32, **kept):
        """Return a MAS whose model stands at the start, of a dtype; Ω is kept in float64 unless it is said how."""
        model = Bag([anchor.to(dtype) for anchor in self.anchor])
        mas = MAS(model, lam=LAM, **kept)
        mas.consolidate(Importance({f"w{i}": omega for i, omega in enumerate(self.omega)}, 1))
        with torch.no_grad():
            for parameter, start in zip(model.parameters(), self.start, strict=True):
                parameter.copy_(start)
        return mas

    def parameters(self, dtype=torch.float64):
        return [nn.Parameter(start.to(dtype, copy=True)) for start in self.start]


def settings(options):
    """Return options with tensors of their own, since schedulers and states write into them."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in options.items()}


def train_torchs(problem, kind, options, steps, dtype=torch.float64, implicit=False, first=0):
    parameters = problem.parameters(dtype)
    optimizer = TORCHS[kind](parameters, **settings(options), foreach=False)
    sign = -1 if options.get("maximize") else 1
    for time in range(first, first + steps):
        optimizer.zero_grad()
        loss = problem.loss(parameters, time)
        (sign * (loss if implicit else loss + problem.penalty(parameters))).backward()
        optimizer.step()
        if implicit:
            problem.proximal_(parameters, float(options["lr"]))
    return parameters, optimizer


def train_ours(problem, kind, options, steps, dtype=torch.float64, implicit=False, first=0):
    mas = problem.mas(dtype)
    optimizer = OURS[kind](mas.model.parameters(), **settings(options), mas=mas, implicit=implicit)
    sign = -1 if options.get("maximize") else 1
    run(problem, optimizer, range(first, first + steps), sign)
    return list(mas.model.parameters()), optimizer


def run(problem, optimizer, times, sign=1):
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for time in times:
        optimizer.zero_grad()
        (sign * problem.loss(parameters, time)).backward()
        optimizer.step()


def joined(tensors):
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def states_of(optimizer, name):
    return joined([state[name] for state in optimizer.state.values()])


def assert_same(actual, truth, tolerance=1e-12):
    assert relative_error(joined(actual), joined(truth)) <= tolerance


class TestAgainstTorch:
    @ALL_OPTIONS
    @IMPLICIT
    def test_hundred_steps_in_float64(self, kind, options, implicit):
        problem = Problem(MIXED)
        truth, theirs = train_torchs(problem, kind, options, 100, implicit=implicit)
        actual, ours = train_ours(problem, kind, options, 100, implicit=implicit)
        assert relative_error(joined(actual), joined(problem.start)) > 0.1
        assert_same(actual, truth)
        for name in next(iter(theirs.state.values()), {}):
            assert relative_error(states_of(ours, name), states_of(theirs, name)) <= 1e-11, name

    @ALL_OPTIONS
    @IMPLICIT
    def test_hundred_steps_in_float32(self, kind, options, implicit):
        problem = Problem(MIXED)
        truth, _ = train_torchs(problem, kind, options, 100, implicit=implicit)
        actual, _ = train_ours(problem, kind, options, 100, torch.float32, implicit=implicit)
        assert_same(actual, truth, 1e-6)

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("options", ["sgd", "sgd-nesterov", "adamw", "adamw-amsgrad"])
    def test_sizes(self, size, options):
        kind, options = OPTIONS[options]
        problem = Problem(SIZES[size])
        truth, _ = train_torchs(problem, kind, options, 8)
        actual, _ = train_ours(problem, kind, options, 8)
        assert_same(actual, truth)
        actual, _ = train_ours(problem, kind, options, 8, torch.float32)
        assert_same(actual, truth, 1e-6)

    @pytest.mark.parametrize("dtype", ROUNDING)
    @pytest.mark.parametrize("options", ["sgd", "sgd-nesterov", "adamw", "adamw-amsgrad"])
    @IMPLICIT
    def test_half_precision_rounds_once_a_step(self, dtype, options, implicit):
        kind, options = OPTIONS[options]
        problem = Problem(MIXED)
        mas = problem.mas(dtype)
        parameters = list(mas.model.parameters())
        ours = OURS[kind](parameters, **settings(options), mas=mas, implicit=implicit)
        problem.anchor = [anchor.to(dtype).double() for anchor in problem.anchor]
        for time in range(3):
            # The truth starts from the rounded values and state, and takes the rounded gradient of the loss.
            truth = [nn.Parameter(parameter.detach().double()) for parameter in parameters]
            theirs = TORCHS[kind](truth, **settings(options))
            if time:
                theirs.load_state_dict(through_a_file(ours.state_dict()))
            run(problem, ours, [time])
            if not implicit:
                problem.penalty(truth).backward()
            for theta, parameter in zip(truth, parameters, strict=True):
                grad = parameter.grad.double()
                theta.grad = grad if theta.grad is None else theta.grad + grad
            theirs.step()
            if implicit:
                problem.proximal_(truth, float(options["lr"]))
            names = [name for name in next(iter(theirs.state.values()), {}) if name != "step"]
            pairs = [(states_of(ours, name), states_of(theirs, name)) for name in names]
            relative, least = ROUNDING[dtype]
            for value, exact in [(joined(parameters), joined(truth)), *pairs]:
                # A little more for the arithmetic in float32.
                assert ((value - exact).abs() <= 1.001 * relative * exact.abs() + least + 1e-6 * relative).all()

    @EVERY
    def test_param_groups_with_options_of_their_own(self, kind):
        problem = Problem([(5, 3), (4,), (6,), (2, 2)])
        own = {"SGD": {"momentum": 0.5, "nesterov": True}, "AdamW": {"betas": (0.7, 0.8), "amsgrad": True}}[kind]

        def groups(parameters):
            return [
                {"params": parameters[:2], "lr": 0.03, "weight_decay": 0.2},
                {"params": parameters[2:3], **own},
                {"params": parameters[3:]},
            ]

        mas = problem.mas(torch.float64)
        actual, truth = list(mas.model.parameters()), problem.parameters()
        ours = OURS[kind](groups(actual)[:2], lr=0.01, mas=mas)
        theirs = TORCHS[kind](groups(truth)[:2], lr=0.01)
        for optimizer, parameters in ((ours, actual), (theirs, truth)):
            optimizer.add_param_group(groups(parameters)[2])
        run(problem, ours, range(10))
        for time in range(10):
            theirs.zero_grad()
            (problem.loss(truth, time) + problem.penalty(truth)).backward()
            theirs.step()
        assert_same(actual, truth)

    @EVERY
    def test_dtypes_can_be_mixed(self, kind):
        dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float64]
        problem = Problem([(40,)] * 4)
        model = Bag([anchor.to(dtype) for anchor, dtype in zip(problem.anchor, dtypes, strict=True)])
        mas = MAS(model, lam=LAM)
        mas.consolidate(Importance({f"w{i}": omega for i, omega in enumerate(problem.omega)}, 1))
        with torch.no_grad():
            for parameter, start in zip(model.parameters(), problem.start, strict=True):
                parameter.copy_(start)
        optimizer = OURS[kind](model.parameters(), lr=0.05, mas=mas)
        parameters = list(model.parameters())
        for time in range(3):
            optimizer.zero_grad()
            for index, parameter in enumerate(parameters):
                one = Problem([])
                one.curve, one.target = [problem.curve[index]], [problem.target[index]]
                one.loss([parameter], time).backward()
            optimizer.step()
        truth, _ = train_torchs(problem, kind, {"lr": 0.05}, 3)
        for parameter, expected, dtype in zip(parameters, truth, dtypes, strict=True):
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
            assert parameter.dtype == dtype
            assert relative_error(parameter.detach(), expected.detach()) <= tolerance


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_a_frozen_parameter_with_an_old_gradient_is_not_held(kind):
    # As in mas.penalty(): torch's optimizers step it by its gradient all the same.
    problem = Problem([(4,), (3,)])
    mas = problem.mas(torch.float64)
    optimizer = OURS[kind](mas.model.parameters(), lr=0.1, mas=mas)
    parameters = list(mas.model.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter += 1
            parameter.grad = torch.zeros_like(parameter)
    parameters[0].requires_grad_(False)
    expected = mas.penalty().item()
    optimizer.step()
    assert optimizer.penalty.item() == pytest.approx(expected)


class TestImplicit:
    @EVERY
    def test_is_stable_where_the_gradient_diverges(self, kind):
        # 2ηλΩ = 200: the explicit step of SGD multiplies θ − θ* by −199.
        def distance(implicit):
            model = Bag([torch.zeros(50)])
            mas = MAS(model, lam=1e3)
            mas.consolidate(Importance({"w0": torch.ones(50)}, 1))
            with torch.no_grad():
                model.w0.fill_(1.0)
            options = {"lr": 0.1, **({"weight_decay": 0.0} if kind == "AdamW" else {})}
            optimizer = OURS[kind](model.parameters(), **options, mas=mas, implicit=implicit)
            for _ in range(60):
                model.w0.grad = torch.zeros(50)
                optimizer.step()
            return model.w0.detach().abs().max().item()

        assert distance(implicit=True) == 0.0
        # Adam divides by the size of the gradient: it cannot diverge, but neither does it arrive.
        assert not distance(implicit=False) < (torch.inf if kind == "SGD" else 1e-3)

    @EVERY
    def test_what_nothing_holds_is_not_rounded(self, kind):
        # Ω = 0: whatever θ* is, the step is that of the loss.
        def stepped(implicit):
            model = Bag([torch.full((200,), 1000.0)])
            mas = MAS(model)
            mas.consolidate(Importance({"w0": torch.tensor([0.0] * 199 + [1.0])}, 1))
            with torch.no_grad():
                model.w0.copy_(torch.linspace(1e-6, 1e-3, 200))
            model.w0.grad = torch.linspace(-1.0, 1.0, 200)
            OURS[kind](model.parameters(), lr=1e-4, mas=mas, implicit=implicit).step()
            return model.w0.detach()[:199]

        assert torch.equal(stepped(implicit=True), stepped(implicit=False))

    @EVERY
    def test_goes_to_the_anchor_of_any_omega(self, kind):
        model = Bag([torch.tensor([3.0, -2.0])])
        mas = MAS(model, lam=1e30)
        mas.consolidate(Importance({"w0": torch.tensor([1e7, 1e9])}, 1))
        with torch.no_grad():
            model.w0.copy_(torch.tensor([-1.0, 5.0]))
        model.w0.grad = torch.ones(2)
        OURS[kind](model.parameters(), lr=1.0, mas=mas, implicit=True).step()
        assert model.w0.tolist() == [3.0, -2.0]

    @EVERY
    @pytest.mark.parametrize("implicit", [False, True])
    def test_the_largest_lam_moves_nothing_from_its_anchor_and_frees_what_is_free(self, kind, implicit):
        model = Bag([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])])
        mas = MAS(model, lam=3.4e38)
        mas.consolidate(Importance({"w0": torch.tensor([5.0, 0.0]), "w1": torch.zeros(2)}, 1))
        optimizer = OURS[kind](model.parameters(), lr=10.0, mas=mas, implicit=implicit, weight_decay=0)
        for parameter in model.parameters():
            parameter.grad = torch.zeros(2)
        optimizer.step()
        assert model.w0.tolist() == [1.0, 2.0] and model.w1.tolist() == [3.0, 4.0]
        assert optimizer.penalty == 0

    @EVERY
    def test_state_may_be_exchanged_between_steps(self, kind):
        problem = Problem(MIXED)
        options = {"lr": 0.05, **({"momentum": 0.9} if kind == "SGD" else {})}
        ours, torchs = ([], [])
        for results, make in ((ours, OURS), (torchs, TORCHS)):
            model = Bag(problem.parameters())
            extra = {"mas": MAS(model)} if make is OURS else {}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer = make[kind](model.parameters(), **options, **extra)
                for time in range(8):
                    for index, parameter in enumerate(model.parameters()):
                        # Now and then some have none.
                        parameter.grad = None if (time + index) % 4 == 3 else torch.full_like(parameter, 1.0 + index)
                    if time == 3:
                        optimizer.state[model.w0] = {}
                    if time == 4:
                        optimizer.state[model.w1].clear()
                    if time == 5:
                        optimizer.state = copy.deepcopy(optimizer.state)
                    if time == 6:
                        for state in optimizer.state.values():
                            state |= {name: kept.clone() for name, kept in state.items()}
                    optimizer.step()
            results += [p.detach() for p in model.parameters()]
        assert_same(ours, torchs)


class TestPenalty:
    @EVERY
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @IMPLICIT
    def test_is_the_value_before_the_step(self, kind, dtype, implicit):
        problem = Problem(MIXED)
        mas = problem.mas(dtype)
        first, *rest = mas.model.parameters()
        optimizer = OURS[kind]([{"params": [first]}, {"params": rest}], lr=0.01, mas=mas, implicit=implicit)
        assert optimizer.penalty is None
        for time in range(3):
            before = float(problem.penalty([parameter.detach().double() for parameter in mas.model.parameters()]))
            if dtype == torch.bfloat16:
                anchors = [anchor.bfloat16().double() for anchor in problem.anchor]
                rows = zip(mas.model.parameters(), problem.omega, anchors, strict=True)
                before = LAM * sum(float((o * (p.detach().double() - a) ** 2).sum()) for p, o, a in rows)
            run(problem, optimizer, [time])
            assert optimizer.penalty.shape == () and not optimizer.penalty.requires_grad
            assert abs(optimizer.penalty.item() - before) <= (1e-13 if dtype == torch.float64 else 1e-6) * before

    @EVERY
    @IMPLICIT
    @pytest.mark.parametrize(
        "kept",
        [
            {"omega_dtype": torch.float32},
            {"omega_dtype": torch.bfloat16},
            {"omega_dtype": torch.uint8},
            {"omega_dtype": torch.uint8, "anchor_dtype": torch.bfloat16},
        ],
    )
    def test_of_what_is_kept_in_fewer_bits(self, kind, implicit, kept):
        problem = Problem(MIXED)
        mas = problem.mas(**kept)
        run(problem, OURS[kind](mas.model.parameters(), lr=0.05, mas=mas, implicit=implicit), range(10))
        problem.omega = [omega.double() for omega in mas.omega.values()]
        problem.anchor = [anchor.double() for anchor in mas.anchor.values()]
        truth, _ = train_torchs(problem, kind, {"lr": 0.05}, 10, implicit=implicit)
        assert_same(mas.model.parameters(), truth, 1e-6)

    @EVERY
    def test_follows_lam_and_a_new_consolidation(self, kind):
        problem, later = Problem([(6, 2), (3,)]), Problem([(6, 2), (3,)], seed=1)
        mas, truth = problem.mas(torch.float64), problem.parameters()
        parameters = list(mas.model.parameters())
        ours, theirs = OURS[kind](parameters, lr=0.05, mas=mas), TORCHS[kind](truth, lr=0.05)
        for time in range(9):
            factor = 1.0
            if time >= 3:
                mas.lam, factor = 3 * LAM, 3.0
            if time == 6:
                # "sum": the old Ω and the new.
                mas.consolidate(Importance({f"w{i}": omega for i, omega in enumerate(later.omega)}, 1))
                problem.omega = [a + b for a, b in zip(problem.omega, later.omega, strict=True)]
                problem.anchor = [theta.detach().clone() for theta in truth]
            run(problem, ours, [time])
            theirs.zero_grad()
            (problem.loss(truth, time) + factor * problem.penalty(truth)).backward()
            theirs.step()
            assert_same(parameters, truth)

    @EVERY
    def test_is_zero_before_consolidate_and_said_so_once(self, kind):
        problem = Problem([(6, 2), (3,)])
        model = Bag(problem.start)
        optimizer = OURS[kind](model.parameters(), lr=0.05, mas=MAS(model))
        with pytest.warns(UserWarning, match="before consolidate") as record:
            run(problem, optimizer, range(4))
        assert len(record) == 1
        assert optimizer.penalty.item() == 0.0
        problem.omega = [torch.zeros_like(omega) for omega in problem.omega]
        assert_same(model.parameters(), train_torchs(problem, kind, {"lr": 0.05}, 4)[0])


class TestWhichParameters:
    @EVERY
    @IMPLICIT
    def test_new_heads_are_free_and_listed_once(self, kind, implicit):
        problem = Problem([(6, 2), (3,), (5,), (4,)])
        model = Bag(problem.anchor[:3])
        mas = MAS(model, lam=LAM)
        mas.consolidate(Importance({"w0": problem.omega[0], "w1": problem.omega[1]}, 1))
        foreign = nn.Parameter(problem.start[3].clone())
        with torch.no_grad():
            for parameter, start in zip(model.parameters(), problem.start, strict=False):
                parameter.copy_(start)
        named = [*model.named_parameters(), ("other", foreign)]
        optimizer = OURS[kind](named, lr=0.05, mas=mas, implicit=implicit)
        with pytest.warns(UserWarning, match=r"no omega holds .*: 'w2', 'other'$") as record:
            run(problem, optimizer, range(5))
        assert len(record) == 1
        problem.omega[2:] = [torch.zeros_like(omega) for omega in problem.omega[2:]]
        truth, _ = train_torchs(problem, kind, {"lr": 0.05}, 5, implicit=implicit)
        assert_same([*model.parameters(), foreign], truth)

    def test_many_free_parameters_make_a_short_warning(self):
        model = Bag([torch.ones(1, 7)] * 300)
        mas = MAS(model)
        mas.consolidate(Importance({"w0": torch.ones(1, 7)}, 1))
        for parameter in model.parameters():
            parameter.grad = torch.ones(1, 7)
        with pytest.warns(UserWarning, match=r"\[1, 7\] and 294 more$") as record:
            OURS["SGD"](model.parameters(), mas=mas).step()
        assert len(str(record[0].message)) < 150

    @EVERY
    def test_without_grad_nothing_moves(self, kind):
        problem = Problem([(6, 2), (3,)])
        mas = problem.mas(torch.float64)
        optimizer = OURS[kind](mas.model.parameters(), lr=0.05, mas=mas)
        optimizer.step()
        assert optimizer.penalty.item() == 0.0 and not optimizer.state
        mas.model.w0.grad = torch.zeros(6, 2, dtype=torch.float64)
        optimizer.step()
        assert torch.equal(mas.model.w1, problem.start[1]) and mas.model.w1 not in optimizer.state
        assert not torch.equal(mas.model.w0, problem.start[0])
        w0 = LAM * (problem.omega[0] * (problem.start[0] - problem.anchor[0]) ** 2).sum()
        assert torch.allclose(optimizer.penalty, w0, rtol=1e-13)

    @EVERY
    def test_frozen_parameters_stay(self, kind):
        problem = Problem([(6, 2), (3,)])
        mas = problem.mas(torch.float64)
        mas.model.w1.requires_grad_(False)
        run(problem, OURS[kind](mas.model.parameters(), lr=0.05, mas=mas), range(3))
        assert torch.equal(mas.model.w1, problem.start[1])
        assert not torch.equal(mas.model.w0, problem.start[0])

    @EVERY
    def test_parameters_that_join_late_start_their_own_state(self, kind):
        # With dampening, a first step is another one than a later step from zeros.
        options = {"SGD": {"momentum": 0.9, "dampening": 0.5}, "AdamW": {"amsgrad": True}}[kind]
        problem = Problem([(6, 2), (3,)])
        mas, truth = problem.mas(torch.float64), problem.parameters()
        actual = list(mas.model.parameters())
        ours, theirs = OURS[kind](actual, lr=0.05, mas=mas, **options), TORCHS[kind](truth, lr=0.05, **options)
        for time in range(6):
            for optimizer, parameters, penalty in ((ours, actual, 0), (theirs, truth, problem.penalty(truth))):
                optimizer.zero_grad()
                (problem.loss(parameters, time) + penalty).backward()
                if time < 3:
                    parameters[1].grad = None
                optimizer.step()
        assert_same(actual, truth)

    @EVERY
    @IMPLICIT
    def test_any_memory_layout(self, kind, implicit):
        problem = Problem([(8, 3, 5, 5), (6, 4)])
        mas = problem.mas(torch.float64)
        mas.model.w0.data = mas.model.w0.data.to(memory_format=torch.channels_last)
        mas.model.w1.data = mas.model.w1.data.t().contiguous().t()
        options = {"lr": 0.05, **({"momentum": 0.9} if kind == "SGD" else {"amsgrad": True})}
        optimizer = OURS[kind](mas.model.parameters(), **options, mas=mas, implicit=implicit)
        run(problem, optimizer, range(2))
        assert all(value.is_contiguous() for state in optimizer.state.values() for value in state.values())
        # As torch leaves it: in the layout of the parameters.
        state = optimizer.state_dict()
        for entry in state["state"].values():
            for name, value in entry.items():
                if value.dim() == 4:
                    entry[name] = value.to(memory_format=torch.channels_last)
        optimizer.load_state_dict(state)
        run(problem, optimizer, range(2, 5))
        assert mas.model.w0.is_contiguous(memory_format=torch.channels_last) and not mas.model.w1.is_contiguous()
        assert_same(mas.model.parameters(), train_torchs(problem, kind, options, 5, implicit=implicit)[0])


class TestAsUsersKnowIt:
    @EVERY
    @pytest.mark.parametrize("tensor", [False, True])
    def test_schedulers(self, kind, tensor):
        problem = Problem([(6, 2), (3,)])
        mas, truth = problem.mas(torch.float64), problem.parameters()
        actual = list(mas.model.parameters())

        def lr():
            return torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1

        ours, theirs = OURS[kind](actual, lr=lr(), mas=mas), TORCHS[kind](truth, lr=lr())
        for optimizer, parameters in ((ours, actual), (theirs, truth)):
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            for time in range(6):
                optimizer.zero_grad()
                loss = problem.loss(parameters, time)
                (loss + problem.penalty(parameters) if optimizer is theirs else loss).backward()
                optimizer.step()
                scheduler.step()
            assert abs(float(optimizer.param_groups[0]["lr"]) - 0.1 * 0.5**6) < 1e-12
        assert_same(actual, truth)

    @EVERY
    def test_closures(self, kind):
        problem = Problem([(6, 2), (3,)])
        mas = problem.mas(torch.float64)
        optimizer = OURS[kind](mas.model.parameters(), lr=0.05, mas=mas)
        for time in range(4):

            def closure(time=time):
                optimizer.zero_grad()
                loss = problem.loss(list(mas.model.parameters()), time)
                loss.backward()
                return loss

            expected = problem.loss(list(mas.model.parameters()), time).item()
            assert optimizer.step(closure).item() == expected
        assert_same(mas.model.parameters(), train_torchs(problem, kind, {"lr": 0.05}, 4)[0])

    @EVERY
    def test_grad_scaler(self, kind):
        problem = Problem([(6, 2), (3,)])
        mas = problem.mas(torch.float32)
        parameters = list(mas.model.parameters())
        optimizer = OURS[kind](parameters, lr=0.05, mas=mas)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        for time in range(5):
            optimizer.zero_grad()
            scaler.scale(problem.loss(parameters, time)).backward()
            if time == 2:
                # Skipped, and nothing of it is left behind.
                before = [parameter.detach().clone() for parameter in parameters]
                parameters[1].grad[0] = torch.inf
                scaler.step(optimizer)
                assert all(map(torch.equal, parameters, before))
                scaler.update()
                optimizer.zero_grad()
                scaler.scale(problem.loss(parameters, time)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**9
        assert_same(parameters, train_torchs(problem, kind, {"lr": 0.05}, 5)[0], 1e-6)

    @pytest.mark.parametrize("options", OPTIONS)
    def test_a_state_goes_both_ways(self, options):
        kind, options = OPTIONS[options]
        sign = -1 if options.get("maximize") else 1
        problem = Problem(MIXED)
        truth, reference = train_torchs(problem, kind, options, 8)
        halfway, theirs = train_torchs(problem, kind, options, 4)
        mine, ours = train_ours(problem, kind, options, 4)
        assert_state_dicts_alike(ours.state_dict(), theirs.state_dict())

        mas = problem.mas(torch.float64)
        continued = OURS[kind](mas.model.parameters(), lr=1.0, mas=mas)
        continued.load_state_dict(through_a_file(theirs.state_dict()))
        with torch.no_grad():
            for parameter, value in zip(mas.model.parameters(), halfway, strict=True):
                parameter.copy_(value)
        run(problem, continued, range(4, 8), sign)
        assert_same(mas.model.parameters(), truth)

        back = [nn.Parameter(parameter.detach().clone()) for parameter in mine]
        optimizer = TORCHS[kind](back, lr=1.0)
        optimizer.load_state_dict(through_a_file(ours.state_dict()))
        for time in range(4, 8):
            optimizer.zero_grad()
            (sign * (problem.loss(back, time) + problem.penalty(back))).backward()
            optimizer.step()
        assert_same(back, truth)
        assert_state_dicts_alike(continued.state_dict(), reference.state_dict())

    @EVERY
    @pytest.mark.parametrize("choice", [{"fused": True}, {"foreach": True}, {"differentiable": True}])
    def test_a_state_of_any_implementation_loads(self, kind, choice):
        problem = Problem([(6, 2), (3,)])
        theirs = TORCHS[kind](problem.parameters(torch.float32), lr=0.05, **choice)
        for parameter in theirs.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        if "differentiable" not in choice:
            theirs.step()
        mas = problem.mas(torch.float32)
        ours = OURS[kind](mas.model.parameters(), lr=0.05, mas=mas)
        ours.load_state_dict(theirs.state_dict())
        run(problem, ours, range(2))
        (group,) = ours.state_dict()["param_groups"]
        assert not any(group.get(name) for name in ("fused", "foreach", "capturable", "differentiable"))

    @EVERY
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
    def test_copies_go_on_alike(self, kind, copied):
        problem = Problem([(6, 2), (3,)])
        mas = problem.mas(torch.float64)
        optimizer = OURS[kind](mas.model.parameters(), lr=0.05, mas=mas, implicit=True)
        run(problem, optimizer, range(2))
        other = copied(optimizer)
        run(problem, optimizer, range(2, 4))
        run(problem, other, range(2, 4))
        assert other.implicit and torch.equal(other.penalty, optimizer.penalty)
        pairs = zip(other.param_groups[0]["params"], mas.model.parameters(), strict=True)
        assert all(a is not b and torch.equal(a, b) for a, b in pairs)

    @EVERY
    def test_hooks_run(self, kind):
        problem = Problem([(3,)])
        mas = problem.mas(torch.float64)
        optimizer, calls = OURS[kind](mas.model.parameters(), mas=mas), []
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        run(problem, optimizer, range(2))
        assert calls == ["before", "after"] * 2

    @EVERY
    def test_autograd_sees_the_change(self, kind):
        mas = Problem([(3,)]).mas(torch.float64)
        optimizer = OURS[kind](mas.model.parameters(), mas=mas)
        loss = mas.model.w0.square().square().sum()
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @EVERY
    def test_in_a_compiled_function(self, kind):
        problem = Problem([(6, 2), (3,)])
        mas = problem.mas(torch.float64)
        optimizer = OURS[kind](mas.model.parameters(), lr=0.05, mas=mas)
        values = []

        def train(time):
            optimizer.zero_grad()
            problem.loss(list(mas.model.parameters()), time).backward()
            optimizer.step()

        compiled = torch.compile(train, backend="eager")
        for time in range(4):
            compiled(time)
            values.append(optimizer.penalty.item())
        assert len(set(values)) == 4
        assert_same(mas.model.parameters(), train_torchs(problem, kind, {"lr": 0.05}, 4)[0])

    @EVERY
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_defaults_of_torch_change_no_more_than_in_torch(self, kind, dtype):
        problem = Problem([(6, 2), (3,)])
        mas = problem.mas(torch.float64)
        ours = OURS[kind](mas.model.parameters(), lr=0.05, mas=mas)
        theirs = TORCHS[kind](problem.parameters(), lr=0.05)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                for optimizer in (ours, theirs):
                    for parameter in optimizer.param_groups[0]["params"]:
                        parameter.grad = torch.ones_like(parameter)
                    optimizer.step()
                ours.step()
        finally:
            torch.set_default_dtype(before)
        assert_state_dicts_alike(ours.state_dict(), theirs.state_dict())
        for state in ours.state.values():
            assert all(value.device.type == "cpu" for value in state.values())
            assert state.get("step", 2) == 2

    @EVERY
    def test_gradients_are_left_as_they_are(self, kind):
        problem = Problem([(6, 2), (3,)])
        mas = problem.mas(torch.float64)
        optimizer = OURS[kind](mas.model.parameters(), lr=0.05, mas=mas)
        problem.loss(list(mas.model.parameters()), 0).backward()
        before = [parameter.grad.clone() for parameter in mas.model.parameters()]
        optimizer.step()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(mas.model.parameters(), before, strict=True))


class TestErrors:
    @EVERY
    @pytest.mark.parametrize("name", ["foreach", "fused", "differentiable", "capturable"])
    @pytest.mark.parametrize("where", ["option", "group"])
    def test_what_cannot_be_honoured(self, kind, name, where):
        if kind == "SGD" and name == "capturable":
            return
        mas = Problem([(3,)]).mas()
        group = {"params": list(mas.model.parameters())} | ({name: True} if where == "group" else {})
        with pytest.raises(ValueError, match=rf"^{name} must be (None|False), got True"):
            OURS[kind]([group], mas=mas, **({name: True} if where == "option" else {}))
        OURS[kind](mas.model.parameters(), mas=mas, **{name: False})

    @EVERY
    def test_mas_must_be_one(self, kind):
        with pytest.raises(TypeError, match="mas must be a mas_fast.MAS, got Linear"):
            OURS[kind](nn.Linear(2, 2).parameters(), mas=nn.Linear(2, 2))

    @EVERY
    @pytest.mark.parametrize("name", ["mas", "implicit"])
    def test_groups_share_the_penalty(self, kind, name):
        mas = Problem([(3,)]).mas()
        with pytest.raises(ValueError, match=f"leave mas and implicit to the optimizer, got .*{name}"):
            OURS[kind]([{"params": list(mas.model.parameters()), name: True}], mas=mas)

    @EVERY
    def test_complex_parameters_are_named_and_not_added(self, kind):
        mas = Problem([(3,)]).mas()
        optimizer = OURS[kind](mas.model.parameters(), mas=mas)
        wrong = [nn.Parameter(torch.ones(2, 5, dtype=torch.complex64)), nn.Parameter(torch.ones(4))]
        with pytest.raises(ValueError, match=r"must be dense and float32.*got torch.complex64 \[2, 5\]:"):
            optimizer.add_param_group({"params": wrong})
        assert len(optimizer.param_groups) == 1

    @EVERY
    def test_sparse_gradients_are_named_and_change_nothing(self, kind):
        problem = Problem([(3,), (7, 2)])
        mas = problem.mas(torch.float64)
        groups = [{"params": [parameter]} for parameter in mas.model.parameters()]
        optimizer = OURS[kind](groups, mas=mas, **({"momentum": 0.9} if kind == "SGD" else {}))
        mas.model.w0.grad = torch.ones(3, dtype=torch.float64)
        mas.model.w1.grad = torch.ones(7, 2, dtype=torch.float64).to_sparse()
        with pytest.raises(ValueError, match=r"\.grad must be dense, got sparse ones .* shape \[7, 2\]:"):
            optimizer.step()
        assert all(map(torch.equal, mas.model.parameters(), problem.start))
        assert not optimizer.state

    @EVERY
    @pytest.mark.parametrize("how", ["group", "cleared"])
    def test_options_of_groups_that_were_exchanged_count(self, kind, how):
        model = Bag([torch.ones(3)])
        optimizer = OURS[kind](model.parameters(), lr=0.1, mas=MAS(model))
        model.w0.grad = torch.ones(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(3):
                optimizer.step()
        before = model.w0.detach().clone()
        if how == "group":
            optimizer.param_groups[0] = dict(optimizer.param_groups[0], lr=0.0)
        else:
            optimizer.param_groups.clear()
            optimizer.add_param_group({"params": [model.w0], "lr": 0.0})
        optimizer.step()
        assert torch.equal(model.w0, before)

    @EVERY
    @pytest.mark.parametrize("change", ["transposed", "larger", "expanded", "state", "lr"])
    def test_what_changes_after_the_first_steps_is_refused_before_anything_steps(self, kind, change):
        # The second group is free: nothing else looks at it.
        model = Bag([torch.ones(3, 2), torch.ones(2, 3)])
        mas = MAS(model)
        mas.consolidate(Importance({"w0": torch.ones(3, 2)}, 1))
        groups = [{"params": [model.w0]}, {"params": [model.w1]}]
        optimizer = OURS[kind](groups, lr=0.1, mas=mas, **({"momentum": 0.9} if kind == "SGD" else {}))
        model.w0.grad, model.w1.grad = torch.ones(3, 2), torch.ones(2, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(3):
                optimizer.step()
        before = model.w0.detach().clone()
        if change == "state":
            optimizer.state[model.w1]["momentum_buffer" if kind == "SGD" else "exp_avg"].resize_(2)
        elif change == "lr":
            optimizer.param_groups[1]["lr"] = torch.tensor([0.1, 0.2])
        else:
            sizes = {"transposed": torch.ones(3, 2), "larger": torch.ones(4, 3), "expanded": torch.ones(1).expand(2, 3)}
            model.w1.data = sizes[change]
        with pytest.raises(ValueError, match="shape"):
            optimizer.step()
        assert torch.equal(model.w0, before)

    def test_a_pickled_state_grows_with_the_parameters(self):
        def size(count):
            model = Bag([torch.ones(2)] * count)
            optimizer = mas_fast.optim.AdamW(model.parameters(), mas=MAS(model))
            for parameter in model.parameters():
                parameter.grad = torch.ones(2)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for _ in range(3):
                    optimizer.step()
            assert len(pickle.dumps(optimizer)) < 10_000 + 4000 * count
            return len(pickle.dumps(optimizer.state_dict()))

        assert size(400) < 2.2 * size(200)

    @EVERY
    @pytest.mark.parametrize("how", ["expanded", "shape", "dtype", "missing", "sparse", "whole"])
    def test_what_does_not_fit_is_named_and_nothing_steps(self, kind, how):
        model = Bag([torch.ones(3, 2), torch.ones(4, 2)])
        mas = MAS(model)
        mas.consolidate(Importance({"w0": torch.ones(3, 2), "w1": torch.ones(4, 2)}, 1))
        groups = [{"params": [("w0", model.w0)]}, {"params": [("w1", model.w1)]}]
        optimizer = OURS[kind](groups, lr=0.1, mas=mas, **({"momentum": 0.9} if kind == "SGD" else {}))
        model.w0.grad, model.w1.grad = torch.ones(3, 2), torch.ones(4, 2)
        optimizer.step()
        before = copy.deepcopy(optimizer.state_dict()["state"]), [p.detach().clone() for p in model.parameters()]
        state = optimizer.state[model.w1]
        name = "momentum_buffer" if kind == "SGD" else "exp_avg_sq"
        if how == "expanded":
            model.w1.data = torch.ones(1).expand(4, 2)
        else:
            state[name] = {
                "shape": torch.ones(2, 4),
                "dtype": torch.ones(4, 2).to(torch.complex64),
                "missing": None,
                "sparse": torch.ones(4, 2).to_sparse(),
                "whole": "a text",
            }[how]
        if (how, kind) == ("missing", "SGD"):
            optimizer.step()  # as in torch, a buffer that is None is yet to be made
            return
        with pytest.raises(ValueError, match=r"'w1' (is expanded|has)"):
            optimizer.step()
        assert torch.equal(model.w0, before[1][0])
        kept = optimizer.state[model.w0]
        assert all(torch.equal(kept[name], old) for name, old in before[0][0].items())

    @EVERY
    def test_ranges_are_torchs(self, kind):
        mas = Problem([(3,)]).mas()
        with pytest.raises(ValueError, match="Invalid learning rate"):
            OURS[kind](mas.model.parameters(), lr=-1.0, mas=mas)


def through_a_file(state):
    """Return a state as a checkpoint gives it back."""
    return pickle.loads(pickle.dumps(state))


def assert_state_dicts_alike(actual, expected):
    assert len(actual["param_groups"]) == len(expected["param_groups"])
    for ours, theirs in zip(actual["param_groups"], expected["param_groups"], strict=True):
        assert set(ours) == set(theirs)
    assert set(actual["state"]) == set(expected["state"])
    for index, theirs in expected["state"].items():
        ours = actual["state"][index]
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            assert (ours[name].shape, ours[name].dtype) == (value.shape, value.dtype), name


# Under fully_shard

RANKS = 2


def train_sharded(rank, store, answers):
    """Train a sharded model and an ordinary one on every rank, and answer with what differs."""
    try:
        answers.put(sharded_differences(rank, store))
    except BaseException:
        answers.put([f"rank {rank}:\n{traceback.format_exc()}"])
        raise


def sharded_differences(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    mesh = DeviceMesh("cpu", list(range(RANKS)))
    problems = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind, options in (("SGD", {"momentum": 0.9}), ("AdamW", {"amsgrad": True})):
            whole, value = train_linears(kind, options, None)
            parts, spread = train_linears(kind, options, mesh)
            if abs(value - spread) > 1e-12 * value or value == 0:
                problems.append(f"{kind} on rank {rank}: penalty {spread} instead of {value}")
            for a, b in zip(whole, parts, strict=True):
                if relative_error(b, a) > 1e-12:
                    problems.append(f"{kind} on rank {rank}: a parameter is {relative_error(b, a):.2g} off")
    dist.barrier()
    dist.destroy_process_group()
    return problems


def train_linears(kind, options, mesh):
    torch.manual_seed(0)
    # A bias of 1 entry: the second rank has no part of it.
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    if mesh is not None:
        for module in (model[0], model):
            fully_shard(module, mesh=mesh)
    mas = MAS(model, lam=LAM)
    generator = torch.Generator().manual_seed(1)
    omegas = {name: torch.rand(p.shape, generator=generator) for name, p in model.named_parameters()}
    mas.consolidate(Importance(omegas, 1))
    optimizer = OURS[kind](model.parameters(), lr=0.05, mas=mas, **options)
    for _ in range(5):
        optimizer.zero_grad()
        # The same on all ranks, which average their gradients.
        model(torch.rand(4, 5, generator=generator, dtype=torch.float64)).square().sum().backward()
        if mesh is not None:
            # A sum that the ranks have yet to form.
            part = model[0].bias.grad.full_tensor() / RANKS
            model[0].bias.grad = DTensor.from_local(part, mesh, [Partial()])
        optimizer.step()
    parameters = [p.full_tensor() if mesh is not None else p for p in model.parameters()]
    return [parameter.detach() for parameter in parameters], float(optimizer.penalty)


@functools.cache
def context():
    made = torch.multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["torch.distributed.fsdp", "mas_fast"])
    return made


def test_each_rank_steps_its_part(tmp_path):
    answers = context().Queue()
    processes = [
        context().Process(target=train_sharded, args=(rank, str(tmp_path / "store"), answers), daemon=True)
        for rank in range(RANKS)
    ]
    try:
        for process in processes:
            process.start()
        assert answers.get(timeout=60) + answers.get(timeout=60) == []
        for process in processes:
            process.join(60)
    finally:
        for process in processes:
            process.kill()
