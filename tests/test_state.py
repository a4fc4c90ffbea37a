"""How Ω and θ* are kept: in few bytes, merged, saved and loaded in any dtype, and adapted to a model that changes."""

import json
import math
import re

import pytest
import torch
from compare import relative_error
from torch import nn

from mas_fast import mas as mas_module
from mas_fast import storage
from mas_fast.importance import Importance
from mas_fast.kernels.steps import decode_omega, encode_omega
from mas_fast.mas import MAS

FORMS = {
    "default": {},
    "float32": {"omega_dtype": torch.float32},
    "float64": {"omega_dtype": torch.float64, "anchor_dtype": torch.float64},
    "bfloat16": {"omega_dtype": torch.bfloat16, "anchor_dtype": torch.bfloat16},
    "float16": {"omega_dtype": torch.float16},
    "8 bits": {"omega_dtype": torch.uint8, "anchor_dtype": torch.bfloat16},
}
EVERY_FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
SHAPES = {"fc.weight": (9, 31), "fc.bias": (9,), "head.weight": (4, 9), "head.bias": (4,)}


def net(features=9, classes=4, seed=0):
    torch.manual_seed(seed)
    return nn.ModuleDict({"fc": nn.Linear(31, features), "head": nn.Linear(features, classes)})


def importance(seed=1, num_samples=3, shapes=SHAPES, zero=7):
    """Return a heavy-tailed Ω with exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    omegas = {}
    for name, shape in shapes.items():
        omega = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator)
        omega.view(-1)[::zero] = 0
        omegas[name] = omega.abs()
    return Importance(omegas, num_samples)


def learned(model=None, **arguments):
    mas = MAS(net() if model is None else model, lam=0.3, **arguments)
    mas.consolidate(importance())
    return mas


def coded(omega):
    return decode_omega(*encode_omega(omega)).view(omega.shape)


def as_kept(omega, form):
    dtype = form.get("omega_dtype")
    return omega if dtype is None else coded(omega) if dtype == torch.uint8 else omega.to(dtype)


def snapshot(mas):
    return mas._state, mas._plan, mas.lam, {name: omega.clone() for name, omega in mas.omega.items()}


def assert_unchanged(mas, before):
    state, plan, lam, omegas = before
    assert mas._state is state and mas._plan is plan and mas.lam == lam
    assert all(torch.equal(mas.omega[name], omega) for name, omega in omegas.items())


def assert_same_numbers(actual, expected):
    for kind in ("omega", "anchor"):
        ours, theirs = getattr(actual, kind), getattr(expected, kind)
        assert list(ours) == list(theirs)
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), (kind, name)


class TestForms:
    @EVERY_FORM
    def test_what_is_kept(self, form):
        mas, given = learned(**form), importance()
        for name, parameter in mas.model.named_parameters():
            omega, anchor = mas.omega[name], mas.anchor[name]
            assert torch.equal(omega, as_kept(given[name], form)) and omega.shape == parameter.shape
            assert bool((omega[given[name] == 0] == 0).all())
            assert anchor.dtype == form.get("anchor_dtype", torch.float32)
            assert torch.equal(anchor, parameter.detach().to(anchor.dtype))

    @pytest.mark.parametrize(
        ("form", "expected"), [({}, 8.0), (FORMS["bfloat16"], 4.0), (FORMS["8 bits"], 3.1)], ids=["8", "4", "3.1"]
    )
    def test_bytes_per_parameter(self, form, expected):
        model = nn.Linear(512, 300)
        model.weight.data = model.weight.data.t().contiguous().t()
        mas = MAS(model, **form)
        mas.consolidate(Importance({name: torch.rand_like(p) for name, p in model.named_parameters()}, 1))
        size = sum(parameter.numel() for parameter in model.parameters())
        # The memory that there really is, of all that a step reads.
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensors in (mas._plan.groups[0].held[:3])
            for tensor in tensors
        }
        assert mas.state_bytes == sum(storages.values())
        assert expected - 0.1 < mas.state_bytes / size <= expected

    def test_nothing_is_kept_before_a_task(self):
        assert MAS(net()).state_bytes == 0

    @pytest.mark.parametrize("merge", ["sum", "mean", "ema", "max"])
    @EVERY_FORM
    def test_tasks_are_added_in_float32_and_rounded_once(self, form, merge):
        mas, plain = learned(merge=merge, **form), learned(merge=merge)
        decoded = {n: o if o.dtype == torch.float64 else o.float() for n, o in mas.omega.items()}
        plain.load_state_dict(plain.state_dict() | {"omega": decoded})
        for one in (mas, plain):
            one.consolidate(importance(seed=2, num_samples=5))
        for name, omega in mas.omega.items():
            assert torch.equal(omega, as_kept(plain.omega[name], form)), name

    @EVERY_FORM
    def test_the_step_uses_what_is_kept(self, form):
        mas = learned(**form)
        with torch.no_grad():
            for parameter in mas.model.parameters():
                parameter += torch.randn_like(parameter)
        value = 0.0
        for name, parameter in mas.model.named_parameters():
            value += 0.3 * float(
                (mas.omega[name].double() * (parameter.detach() - mas.anchor[name].double()).square()).sum()
            )
        mas.penalty().backward()
        for name, parameter in mas.model.named_parameters():
            expected = 0.6 * mas.omega[name].double() * (parameter.detach().double() - mas.anchor[name].double())
            assert relative_error(parameter.grad, expected) <= 1e-6
        assert float(mas.add_penalty_grad_()) == pytest.approx(value, rel=1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
    def test_error_on_the_importance_of_a_network(self, dtype):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10),
        )  # fmt: skip
        mas, exact = MAS(model, omega_dtype=dtype), MAS(model)
        exact.consolidate(mas.consolidate([torch.randn(16, 3, 16, 16) for _ in range(2)]))
        lost = math.fsum(float((mas.omega[n] - exact.omega[n]).double().square().sum()) for n in exact.omega)
        size = math.fsum(float(omega.double().square().sum()) for omega in exact.omega.values())
        assert 0 < math.sqrt(lost / size) <= 0.005
        for name, omega in exact.omega.items():
            assert bool((mas.omega[name][omega == 0] == 0).all())

    @pytest.mark.parametrize(
        ("form", "message"),
        [
            ({"omega_dtype": torch.int8}, "omega_dtype must be None or one of torch.float16, torch.bfloat16"),
            ({"omega_dtype": "uint8"}, "omega_dtype must be None or one of"),
            ({"anchor_dtype": torch.uint8}, "anchor_dtype must be None or one of"),
            ({"state_device": "cuda"}, "state_device must be None or one of cpu, got cuda"),
        ],
    )
    def test_refuses(self, form, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            MAS(net(), **form)

    def test_an_anchor_that_overflows_is_refused(self):
        model = net()
        with torch.no_grad():
            model["fc"].bias[3] = 1e6
        mas = MAS(model, anchor_dtype=torch.float16)
        with pytest.raises(ValueError, match=r"the anchor of 'fc.bias' has 1 of 9 entries wrong.*at \[3\]"):
            mas.consolidate(importance())
        assert mas.state_bytes == 0 and dict(mas.anchor) == {}

    @EVERY_FORM
    def test_on_the_host(self, form):
        # Of a model on the CPU, it is there already.
        mas, plain = learned(state_device="cpu", **form), learned(**form)
        assert mas.state_device == "cpu"
        assert_same_numbers(mas, plain)
        assert torch.equal(mas.penalty(), plain.penalty())

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @EVERY_FORM
    def test_of_a_gpu_on_the_host(self, form):
        mas, plain = learned(net().cuda(), state_device="cpu", **form), learned(net().cuda(), **form)
        held = mas._plan.groups[0].held
        assert all(tensor.is_pinned() for tensors in held[:2] for tensor in tensors if tensor.numel())
        with torch.no_grad():
            for ours, theirs in zip(mas.model.parameters(), plain.model.parameters(), strict=True):
                ours += 1.0
                theirs += 1.0
        assert torch.equal(mas.add_penalty_grad_(), plain.add_penalty_grad_())
        for ours, theirs in zip(mas.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)

    @EVERY_FORM
    def test_follows_the_model_to_another_device(self, form):
        mas = learned(**form)
        mas.model.to("meta")
        assert mas.add_penalty_grad_().device.type == "meta"
        assert {tensor.device.type for tensor in (*mas.omega.values(), *mas.anchor.values())} == {"meta"}

    def test_looking_at_the_mappings(self):
        mas = learned(**FORMS["8 bits"])
        assert len(mas.omega) == 4 and "fc.bias" in mas.omega and "x" not in mas.omega
        assert mas.omega != mas.omega
        assert "fc.weight" in repr(mas.omega)
        with pytest.raises(TypeError):
            mas.omega["fc.bias"] = torch.ones(9)


class TestSavedAndLoaded:
    @EVERY_FORM
    @pytest.mark.parametrize("through", ["dict", "torch.save", "file"])
    def test_round_trip(self, form, through, tmp_path):
        mas, loaded = learned(merge="mean", **form), MAS(net(seed=5), **form)
        state = mas.state_dict()
        if through == "file":
            mas.save(tmp_path / "mas")
            loaded.load(tmp_path / "mas")
        else:
            if through == "torch.save":
                torch.save(state, tmp_path / "state")
                state = torch.load(tmp_path / "state", weights_only=True)
            loaded.load_state_dict(state)
        assert_same_numbers(loaded, mas)
        assert loaded.lam == mas.lam and loaded.merge == "mean" and loaded.state_bytes == mas.state_bytes
        for one in (mas, loaded):
            one.model.load_state_dict(net(seed=6).state_dict())
            one.consolidate(importance(seed=2))
        assert_same_numbers(loaded, mas)

    def test_the_file_is_small_and_plain(self, tmp_path):
        mas = learned(**FORMS["8 bits"])
        mas.save(tmp_path / "mas")
        tensors, _ = storage.read(tmp_path / "mas", mas_module.KIND)
        assert {str(t.dtype) for n, t in tensors.items() if n.startswith("omega.")} == {"torch.uint8"}
        assert tensors["omega.fc.weight"].shape == (9, 31) and tensors["scales.fc.weight"].shape == (3,)
        assert sum(tensor.nbytes for tensor in tensors.values()) == mas.state_bytes

    @pytest.mark.parametrize("into", FORMS.values(), ids=FORMS)
    @EVERY_FORM
    def test_is_converted_to_the_form_of_the_one_who_loads(self, form, into, tmp_path):
        mas, loaded = learned(**form), MAS(net(), **into)
        mas.save(tmp_path / "mas")
        loaded.load(tmp_path / "mas")
        for name, omega in mas.omega.items():
            assert torch.equal(loaded.omega[name], as_kept(omega, into)), name
            dtype = into.get("anchor_dtype", mas.anchor[name].dtype)
            assert torch.equal(loaded.anchor[name], mas.anchor[name].to(dtype))

    def test_files_of_older_versions(self, tmp_path):
        mas, loaded = learned(), MAS(net(seed=5))
        state = mas.state_dict()
        del state["scales"]
        tensors = {f"{kind}.{name}": t for kind in ("omega", "anchor") for name, t in state.pop(kind).items()}
        storage.write(tmp_path / "old", mas_module.KIND, tensors, {"state": json.dumps(state)})
        loaded.load(tmp_path / "old")
        assert_same_numbers(loaded, mas)
        assert loaded.lam == 0.3

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"scales": {}}, "the omega of 'head.bias' is uint8 and has no float32 scales of shape [1]"),
            ({"scales": {"fc.weight": torch.ones(2)}}, "the omega of 'fc.weight' is uint8 and has no float32 scales"),
            ({"scales": {"fc.weight": torch.full((3,), torch.nan)}}, "the scales of the omega of 'fc.weight' has 3 of"),
            ({"scales": {"x": torch.ones(1)}}, "'x' has scales of an omega and no uint8 omega"),
            ({"lam": {"fc.*": 1.0}}, "lam must have a pattern for every parameter with an omega"),
            ({"lam": {"*": -1.0}}, "lam['*'] must be finite and at least 0, got -1.0"),
        ],
    )
    def test_refuses_a_damaged_state_and_changes_nothing(self, change, message):
        mas = learned(**FORMS["8 bits"])
        before, state = snapshot(mas), mas.state_dict()
        if change.get("scales"):
            change = {"scales": state["scales"] | change["scales"]}
        with pytest.raises(ValueError, match=re.escape(message)):
            mas.load_state_dict(state | change)
        assert_unchanged(mas, before)


class TestLamByPattern:
    LAM = {"head.*": 0.0, "*.bias": 2.0, "*": 0.5}
    EXPECTED = {"fc.weight": 0.5, "fc.bias": 2.0, "head.weight": 0.0, "head.bias": 0.0}

    def moved(self, lam):
        mas = learned()
        mas.lam = lam
        with torch.no_grad():
            for parameter in mas.model.parameters():
                parameter += 1.0
        return mas

    def test_the_first_match_wins(self):
        mas = self.moved(self.LAM)
        assert dict(mas.lam) == self.LAM
        values = mas.penalty_by_parameter()
        for name, lam in self.EXPECTED.items():
            omega, anchor = mas.omega[name].double(), mas.anchor[name].double()
            difference = mas.model.get_parameter(name).detach().double() - anchor
            assert values[name] == pytest.approx(lam * float((omega * difference.square()).sum()), rel=1e-6)
        mas.add_penalty_grad_()
        assert not mas.model["head"].weight.grad.any()
        expected = 4.0 * mas.omega["fc.bias"] * (mas.model["fc"].bias - mas.anchor["fc.bias"])
        torch.testing.assert_close(mas.model["fc"].bias.grad, expected.detach())

    def test_may_be_set_anew_and_be_a_number_again(self):
        mas = self.moved(self.LAM)
        one = mas.penalty().item()
        mas.lam = {pattern: 2 * lam for pattern, lam in self.LAM.items()}
        assert mas.penalty().item() == pytest.approx(2 * one, rel=1e-6)
        mas.lam = 0.5
        assert mas.penalty().item() == pytest.approx(self.moved({"*": 0.5}).penalty().item(), rel=1e-6)

    def test_is_saved_in_order(self, tmp_path):
        mas, loaded = self.moved(self.LAM), MAS(net())
        mas.save(tmp_path / "mas")
        loaded.load(tmp_path / "mas")
        assert list(loaded.lam.items()) == list(self.LAM.items())
        assert loaded.state_dict()["lam"] == self.LAM
        with pytest.raises(TypeError):
            loaded.lam["*"] = 3.0

    def test_parameters_without_a_pattern_are_listed(self):
        mas = learned()
        before = snapshot(mas)
        message = "(?s)lam must have a pattern for every parameter with an omega.*'fc.weight'.*'head.weight'"
        with pytest.raises(ValueError, match=message):
            mas.lam = {"*.bias": 1.0}
        assert_unchanged(mas, before)
        # As soon as there is an Ω: before, there is nothing to match.
        fresh = MAS(net(), lam={"*.bias": 1.0})
        with pytest.raises(ValueError, match=message):
            fresh.consolidate(importance())
        assert dict(fresh.omega) == {}

    @pytest.mark.parametrize(
        ("lam", "error", "message"),
        [
            ({"*": -1.0}, ValueError, "lam['*'] must be finite and at least 0, got -1.0"),
            ({"*": "1"}, TypeError, "lam['*'] must be a real number, got '1'"),
            ({1: 1.0}, TypeError, "lam must have patterns of type str, got [1]"),
        ],
    )
    def test_refuses(self, lam, error, message):
        with pytest.raises(error, match=re.escape(message)):
            MAS(net(), lam=lam)


class TestAdapt:
    @EVERY_FORM
    def test_a_head_that_grows(self, form):
        mas = learned(**form)
        omega, anchor = mas.omega["head.weight"].clone(), mas.anchor["head.weight"].clone()
        bias = mas.omega["head.bias"].clone()
        mas.model["head"] = nn.Linear(9, 6)
        mas.adapt(grow=["head.*"])
        head = mas.model["head"].weight.detach()
        assert torch.equal(mas.omega["head.weight"], as_kept(nn.functional.pad(omega, (0, 0, 0, 2)), form))
        assert torch.equal(mas.anchor["head.weight"][:4], anchor)
        assert torch.equal(mas.anchor["head.weight"][4:], head[4:].to(anchor.dtype))
        assert relative_error(mas.omega["head.bias"][:4], bias) <= 5e-3 and not mas.omega["head.bias"][4:].any()
        mas.add_penalty_grad_()
        assert not mas.model["head"].weight.grad[4:].any() and mas.model["head"].weight.grad[:4].any()

    def test_grows_along_several_axes(self):
        mas = learned()
        omega = mas.omega["fc.weight"].clone()
        mas.model["fc"] = nn.Linear(33, 11)
        mas.adapt(grow="fc.*")
        assert torch.equal(mas.omega["fc.weight"][:9, :31], omega)
        assert mas.omega["fc.weight"].count_nonzero() == omega.count_nonzero()
        assert mas.penalty_by_parameter()["head.weight"] == 0.0

    def test_renames_and_drops(self):
        mas = learned(merge="mean")
        body = mas.omega["fc.weight"]
        mas.model = nn.ModuleDict({"body": mas.model["fc"], "new": nn.Linear(9, 2)})
        mas.adapt(rename={"fc.weight": "body.weight", "fc.bias": "body.bias"}, drop="head.*")
        assert list(mas.omega) == ["body.weight", "body.bias"] == list(mas.anchor)
        assert torch.equal(mas.omega["body.weight"], body)
        # The samples came along: (3 Ω + 1 · 0) / 4.
        mas.consolidate(Importance({"body.weight": torch.zeros(9, 31)}, 1))
        torch.testing.assert_close(mas.omega["body.weight"], body * 0.75)

    def test_names_may_be_exchanged(self):
        mas = learned(nn.ModuleDict({"fc": nn.Linear(31, 9), "head": nn.Linear(9, 4)}))
        mas.adapt(drop=["*.bias", "head.weight"])
        mas.consolidate(Importance({"head.weight": torch.ones(4, 9)}, 1))
        before = mas.omega["fc.weight"], mas.omega["head.weight"]
        mas.model = nn.ModuleDict({"head": mas.model["fc"], "fc": mas.model["head"]})
        mas.adapt(rename={"fc.weight": "head.weight", "head.weight": "fc.weight"})
        assert torch.equal(mas.omega["head.weight"], before[0]) and torch.equal(mas.omega["fc.weight"], before[1])

    @pytest.mark.filterwarnings("ignore:there is no importance")
    def test_drops_everything(self):
        mas = learned()
        mas.adapt(drop=["*"])
        assert dict(mas.omega) == {} and mas.penalty().item() == 0.0 and mas.state_bytes == 0
        # Nothing is left that a new importance would have to mean the same as.
        mas.consolidate(Importance({"fc.bias": torch.ones(9)}, 1, statistic="square"))

    def test_a_new_parameter_needs_nothing(self):
        mas = learned()
        mas.model["other"] = nn.Linear(9, 3)
        mas.add_penalty_grad_()
        assert mas.model["other"].weight.grad is None

    def test_lists_everything_and_changes_nothing(self):
        mas = learned()
        mas.model = nn.ModuleDict({"fc": nn.Linear(31, 8), "head": nn.Linear(9, 5)})
        before = snapshot(mas)
        with pytest.raises(ValueError) as caught:
            mas.adapt(
                rename={"x": "y", "head.bias": "head.weight"},
                drop=["tail.*"],
                grow=["fc.weight", "none", "head.weight"],
            )
        assert str(caught.value).splitlines() == [
            "adapt must make omega fit the model, got:",
            "  - drop has 'tail.*', which matches no omega",
            "  - rename has 'x', which has no omega",
            "  - rename makes 'head.weight' of more than one omega",
            "  - grow has 'none', which matches no omega",
            "  - grow has 'fc.weight', which must not be smaller along any axis, and had [9, 31] and has [8, 31]",
            "  - grow has 'head.weight', which must not be smaller along any axis, and had [4] and has [5, 9]",
            "  - 'fc.bias' has shape [9], the model has [8]",
        ]
        assert_unchanged(mas, before)

    @pytest.mark.parametrize("arguments", [{}, {"grow": ["head.weight"]}, {"drop": ["head.bias"]}], ids=str)
    def test_an_adaptation_that_is_not_enough_changes_nothing(self, arguments):
        mas = learned()
        mas.model["head"] = nn.Linear(9, 6)
        before = snapshot(mas)
        with pytest.raises(ValueError, match="adapt must make omega fit the model, got:"):
            mas.adapt(**arguments)
        assert_unchanged(mas, before)

    def test_a_pattern_of_lam_must_match_the_new_names(self):
        mas = learned()
        mas.lam = {"fc.*": 1.0, "head.*": 2.0}
        mas.model = nn.ModuleDict({"body": mas.model["fc"], "head": mas.model["head"]})
        before = snapshot(mas)
        with pytest.raises(ValueError, match="lam must have a pattern.*\n.*'body.weight'"):
            mas.adapt(rename={"fc.weight": "body.weight", "fc.bias": "body.bias"})
        assert_unchanged(mas, before)

    @pytest.mark.parametrize("method", ["penalty", "add_penalty_grad_", "penalty_by_parameter"])
    def test_without_it_a_changed_model_is_an_error_that_names_it(self, method):
        mas = learned()
        mas.model["head"] = nn.Linear(9, 6)
        with pytest.raises(ValueError) as caught:
            getattr(mas, method)()
        assert str(caught.value).splitlines() == [
            "model must have every parameter that has an omega (MAS.adapt follows a changed model), got mismatches:",
            "  - 'head.weight' has shape [4, 9], the model has [6, 9]",
            "  - 'head.bias' has shape [4], the model has [6]",
        ]
