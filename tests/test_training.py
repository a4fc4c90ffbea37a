"""A MAS inside of training steps of many kinds, against the formula in float64; details: test_penalty, test_state."""

import pytest
import torch
from compare import relative_error
from torch import nn

import mas_fast
from mas_fast import MAS, Importance
from mas_fast.kernels import ops, steps

LAM = 0.3
STATES = {
    "float32": {},
    "bfloat16": {"omega_dtype": torch.bfloat16, "anchor_dtype": torch.bfloat16},
    "float16": {"omega_dtype": torch.float16},
    "8-bit": {"omega_dtype": torch.uint8, "anchor_dtype": torch.bfloat16},
    "8-bit, own θ*": {"omega_dtype": torch.uint8},
}


class Bag(nn.Module):
    """Parameters without a forward."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))


def problem(shapes=((40, 30), (7,), (300,)), dtype=torch.float32, **state):
    """Return a model off its anchor, its MAS, and Ω and θ* as they were handed in."""
    torch.manual_seed(0)
    model = Bag({f"p{i}": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)})
    omegas = {name: (torch.randn(p.shape) * torch.randn(p.shape)).abs() for name, p in model.named_parameters()}
    mas = MAS(model, LAM, **state)
    mas.consolidate(Importance(omegas, 3))
    anchors = {name: p.detach().clone() for name, p in model.named_parameters()}
    move(model)
    return model, mas, omegas, anchors


def move(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape).to(parameter)


def formula(model, omegas, anchors, lam=LAM):
    """Return the value and the gradients of the penalty in float64."""
    value, gradients = 0.0, {}
    for name, p in model.named_parameters():
        d = p.detach().double() - anchors[name].double()
        value += lam * float((omegas[name].double() * d * d).sum())
        gradients[name] = 2 * lam * omegas[name].double() * d
    return value, gradients


def assert_gradients(model, expected, tolerance):
    for name, p in model.named_parameters():
        assert relative_error(p.grad, expected[name]) <= tolerance, name


@pytest.mark.parametrize("shapes", [((3, 4),), ((8, 96),) * 700, ((500, 300),) * 5], ids=["one", "many", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_value_and_gradients_are_the_formula(shapes, dtype):
    model, mas, omegas, anchors = problem(shapes, dtype)
    value, gradients = formula(model, omegas, anchors)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert float(mas.add_penalty_grad_()) == pytest.approx(value, rel=tolerance)
    assert_gradients(model, gradients, tolerance)
    model.zero_grad()
    penalty = mas.penalty()
    penalty.backward()
    assert penalty.item() == pytest.approx(value, rel=tolerance) and penalty.dtype == dtype
    assert_gradients(model, gradients, tolerance)
    assert sum(mas.penalty_by_parameter().values()) == pytest.approx(value, rel=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_parameters(dtype):
    model, mas, omegas, anchors = problem(dtype=dtype)
    value, gradients = formula(model, omegas, anchors)
    assert float(mas.add_penalty_grad_()) == pytest.approx(value, rel=1e-6)
    assert_gradients(model, gradients, torch.finfo(dtype).eps)


def test_dtypes_may_be_mixed_in_one_model():
    torch.manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    model = Bag({f"p{i}": torch.randn(50).to(dtype) for i, dtype in enumerate(dtypes)})
    omegas = {name: torch.rand(50) for name, _ in model.named_parameters()}
    mas = MAS(model, LAM)
    mas.consolidate(Importance(omegas, 1))
    anchors = {name: p.detach().clone() for name, p in model.named_parameters()}
    move(model)
    value, gradients = formula(model, omegas, anchors)
    result = mas.add_penalty_grad_()
    assert result.dtype == torch.float64 and float(result) == pytest.approx(value, rel=1e-6)
    for (name, p), dtype in zip(model.named_parameters(), dtypes, strict=True):
        assert relative_error(p.grad, gradients[name]) <= max(1e-7, torch.finfo(dtype).eps)


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_small_states(state):
    model, mas, omegas, _ = problem(((60, 70), (1000,), (5,)), **state)
    for name, omega in omegas.items():
        assert relative_error(mas.omega[name], omega) <= 0.005
    # What is kept is what is applied, to rounding.
    value, gradients = formula(model, mas.omega, mas.anchor)
    assert float(mas.add_penalty_grad_()) == pytest.approx(value, rel=1e-6)
    assert_gradients(model, gradients, 1e-6)


def test_bytes_of_the_states():
    entries = 256 * 200
    sizes = {name: problem(((256, 200),), **state)[1].state_bytes / entries for name, state in STATES.items()}
    expected = {"float32": 8, "bfloat16": 4, "float16": 6, "8-bit": 3 + 1 / 32, "8-bit, own θ*": 5 + 1 / 32}
    assert sizes == expected


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_tasks_add_up_in_float32(state):
    model, mas, omegas, _ = problem(**state)
    more = {name: torch.rand(omega.shape) * 3 for name, omega in omegas.items()}
    before = {name: mas.omega[name].float() for name in omegas}
    mas.consolidate(Importance(more, 2))
    for name in omegas:
        # One rounding of the sum of what was kept and what is new.
        assert relative_error(mas.omega[name], before[name] + more[name]) <= 0.005
        assert torch.equal(
            mas.anchor[name].float(), dict(model.named_parameters())[name].detach().to(mas.anchor[name]).float()
        )


@pytest.mark.parametrize("kept", STATES.values(), ids=STATES)
@pytest.mark.parametrize("loaded", STATES.values(), ids=STATES)
def test_saved_states_load_into_any_other(kept, loaded, tmp_path):
    model, mas, omegas, _ = problem(**kept)
    mas.save(tmp_path / "state")
    other = MAS(model, **loaded)
    other.load(tmp_path / "state")
    for name in omegas:
        assert relative_error(other.omega[name], mas.omega[name]) <= (0.0 if kept == loaded else 0.005)
        assert relative_error(other.anchor[name], mas.anchor[name]) <= (0.0 if kept == loaded else 0.004)
    # What is not said is kept as it was saved.
    dtypes = {"omega_dtype": torch.float32, "anchor_dtype": torch.float32} | kept
    assert other.state_bytes == bytes_of(model, dtypes | loaded)
    again = MAS(model, **kept)
    again.load_state_dict(mas.state_dict())
    assert again.penalty().item() == mas.penalty().item()


def bytes_of(model, state):
    mas = MAS(model, **state)
    mas.consolidate(Importance({name: torch.rand(p.shape) for name, p in model.named_parameters()}, 1))
    return mas.state_bytes


def test_eight_bits_on_the_importance_of_a_network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10)
    )
    importance = mas_fast.estimate_importance(model, [torch.randn(32, 1, 8, 8)])
    for omega in importance.values():
        assert relative_error(steps.decode_omega(*steps.encode_omega(omega)).view(omega.shape), omega) <= 0.005


# Inside of training steps


def test_loss_scaling_accumulation_and_double_use():
    model, mas, omegas, anchors = problem()
    _, gradients = formula(model, omegas, anchors)
    (1024 * mas.penalty()).backward()
    assert_gradients(model, {name: 1024 * g for name, g in gradients.items()}, 1e-6)
    model.zero_grad()
    for _ in range(4):
        (mas.penalty() / 4).backward()
    assert_gradients(model, gradients, 1e-6)
    model.zero_grad()
    penalty = mas.penalty()
    (penalty + 2 * penalty.square() / penalty.item() + mas.penalty()).backward()
    assert_gradients(model, {name: 6 * g for name, g in gradients.items()}, 1e-6)


def test_the_penalty_can_be_differentiated_twice():
    model, mas, omegas, _ = problem(((4, 3),), torch.float64)
    (theta,) = model.parameters()
    (gradient,) = torch.autograd.grad(mas.penalty(), theta, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), theta)
    torch.testing.assert_close(second, 2 * LAM * omegas["p0"].double())


@pytest.mark.parametrize("state", [STATES["float32"], STATES["8-bit"]], ids=["float32", "8-bit"])
def test_a_compiled_step_has_no_graph_break(state):
    model, mas, _, _ = problem(**state)

    def loss(scale):
        return scale * sum(p.square().sum() for p in model.parameters()) + mas.penalty()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    scale = torch.tensor(0.5)
    for change in (lambda: None, lambda: setattr(mas, "lam", 2.0), lambda: move(model)):
        change()
        model.zero_grad()
        value = compiled(scale)
        value.backward()
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        expected = loss(scale)
        expected.backward()
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(found, [p.grad for p in model.parameters()])


def test_memory_layouts():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    model.bias = nn.Parameter(torch.randn(1).expand(4))
    omegas = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
    mas = MAS(model, LAM)
    mas.consolidate(Importance(omegas, 1))
    anchors = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.weight += 1
    model.weight.grad = torch.zeros_like(model.weight)
    assert not model.weight.grad.is_contiguous()
    value, gradients = formula(model, omegas, anchors)
    assert float(mas.add_penalty_grad_()) == pytest.approx(value, rel=1e-6)
    assert_gradients(model, gradients, 1e-6)


# λ, and models that change


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "p1", nn.Parameter(m.p1.detach() + 1)),
        lambda m: m.p1.requires_grad_(False),
        lambda m: m.double(),
        lambda m: setattr(m.p1, "data", m.p1.data + 2),
        lambda m: setattr(m, "head", nn.Linear(2, 2)),
        lambda m: m.requires_grad_(False),
    ],
    ids=["replaced", "frozen", "converted", "data", "new_head", "all_frozen"],
)
def test_a_step_sees_what_changed_in_the_model(change):
    model, mas, omegas, anchors = problem()
    mas.penalty()
    change(model)
    held = Bag({n: p.detach() for n, p in model.named_parameters() if n in omegas and p.requires_grad})
    value, _ = formula(held, omegas, anchors)
    assert mas.penalty().item() == pytest.approx(value, rel=1e-6, abs=1e-12)
    assert float(mas.add_penalty_grad_()) == pytest.approx(value, rel=1e-6, abs=1e-12)


def test_a_step_sees_that_the_first_owner_of_a_shared_parameter_has_changed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    mas = MAS(model, LAM)
    omegas = {"0.weight": torch.rand(3, 3)}
    mas.consolidate(Importance(omegas, 1))
    anchors = {"0.weight": model[0].weight.detach().clone()}
    mas.penalty()
    model[0] = nn.Linear(3, 3, bias=False)
    difference = model[0].weight.detach() - anchors["0.weight"]
    value = LAM * float((omegas["0.weight"] * difference.square()).sum())
    assert mas.penalty().item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("state", [STATES["float32"], STATES["8-bit, own θ*"]], ids=["float32", "8-bit"])
def test_adapt_to_a_model_that_changed(state):
    model, mas, _, anchors = problem(((4, 3), (6,), (5,)), **state)
    kept = dict(mas.omega)
    new = Bag({"head": torch.randn(6, 3), "p1": model.p1.detach()})
    mas.model = new
    with pytest.raises(ValueError, match=r"MAS.adapt follows a changed model\), got mismatches:\n.*'p0'"):
        mas.penalty()
    for wrong in (
        {"rename": {"p0": "head"}},
        {"rename": {"p0": "head"}, "drop": ["p2"]},
        {"rename": {"p0": "p1"}, "drop": ["p2"]},
        {"rename": {"q": "head"}},
        {"drop": ["x*"]},
        {"grow": ["x*"]},
    ):
        with pytest.raises(ValueError, match="must make omega fit the model"):
            mas.adapt(**wrong)
        assert list(mas.omega) == ["p0", "p1", "p2"]
    mas.adapt(rename={"p0": "head"}, drop=["p2"], grow=["head"])
    assert list(mas.omega) == ["head", "p1"]
    assert torch.equal(mas.omega["head"][:4], kept["p0"]) and not mas.omega["head"][4:].any()
    difference = new.head.detach()[:4] - anchors["p0"]
    expected = (
        LAM * (kept["p0"] * difference.square()).sum()
        + LAM * (kept["p1"] * (model.p1.detach() - anchors["p1"]).square()).sum()
    )
    torch.testing.assert_close(mas.penalty().detach(), expected)
    mas.consolidate(Importance({"head": torch.ones(6, 3)}, 1))
    torch.testing.assert_close(mas.omega["head"][4:], torch.ones(2, 3), rtol=0.005, atol=0)


def test_the_kernels_that_ran_are_the_compiled_ones():
    rows = {row.op: row.implementation for row in mas_fast.implementations() if row.device == "cpu"}
    if ops.cpu_capability() is not None:
        assert all(rows[op].startswith("C++") for op in ("penalty_grad_", "sgd_step_", "adamw_step_", "encode_omega"))


def test_a_compiled_step_does_not_take_another_shape_for_the_same():
    model, mas, _, _ = problem(((3, 4),))
    compiled = torch.compile(lambda: mas.penalty(), backend="aot_eager", fullgraph=True)
    compiled()
    model.p0 = nn.Parameter(model.p0.detach().t().contiguous())
    with pytest.raises((ValueError, torch._dynamo.exc.Unsupported)):
        compiled()


@pytest.mark.parametrize("narrow", [{"anchor_dtype": torch.float16}, {"omega_dtype": torch.float16}], ids=["θ*", "Ω"])
def test_a_state_that_overflows_when_it_is_loaded_is_refused(narrow):
    model, mas, omegas, _ = problem(((3, 4),))
    with torch.no_grad():
        model.p0 += 1e6
    mas.consolidate(Importance({"p0": omegas["p0"] * 1e6}, 1))
    other = MAS(model, **narrow)
    with pytest.raises(ValueError, match="must stay finite, got an overflow"):
        other.load_state_dict(mas.state_dict())
    assert not other.omega
