"""MAS: the penalty against its formula in float64, and a state that is never half changed."""

import os
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from mas_fast import importance as importance_module
from mas_fast import mas as mas_module
from mas_fast import storage
from mas_fast.importance import Importance
from mas_fast.mas import MAS

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
PRECISION = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 1e-6, torch.float64: 1e-14}


class Bag(nn.Module):
    """Parameters w0, w1, ... of given values."""

    def __init__(self, *values):
        super().__init__()
        for index, value in enumerate(values):
            self.register_parameter(f"w{index}", nn.Parameter(value.clone()))


def bag(*values, dtype=torch.float32):
    return Bag(*(torch.tensor(value, dtype=dtype) for value in values))


def importance_of(*values, num_samples=1, **meaning):
    return Importance({f"w{i}": torch.tensor(v) for i, v in enumerate(values)}, num_samples, **meaning)


def compiled(model):
    return torch.compile(model, backend="eager")


def snapshot(mas):
    state = {"omega": mas._state.omega, "anchor": mas._state.anchor}
    return {kind: {name: (k, k.values.clone()) for name, k in kept.items()} for kind, kept in state.items()}


def assert_unchanged(mas, before):
    for kind, tensors in before.items():
        now = getattr(mas._state, kind)
        assert list(now) == list(tensors) == list(getattr(mas, kind))
        for name, (kept, value) in tensors.items():
            assert now[name].values is kept.values and torch.equal(kept.values, value)
            assert torch.equal(getattr(mas, kind)[name].to(value), value)


class TestPenalty:
    # Ω = [[1, 2], [0, 4]], θ − θ* = [[1, −1], [5, 0.5]], λ = 3: Σ Ωd² = 1 + 2 + 0 + 1 = 4; 2λΩd = 6·[[1, −2], [0, 2]].
    OMEGA, ANCHOR, THETA = [[1.0, 2.0], [0.0, 4.0]], [[0.5, 1.0], [2.0, 3.0]], [[1.5, 0.0], [7.0, 3.5]]
    VALUE, GRADIENT = 12.0, [[6.0, -12.0], [0.0, 12.0]]

    def moved(self, dtype):
        model = bag(self.ANCHOR, dtype=dtype)
        mas = MAS(model, lam=3.0)
        mas.consolidate(importance_of(self.OMEGA))
        with torch.no_grad():
            model.w0.copy_(torch.tensor(self.THETA))
        return model, mas

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_by_hand(self, dtype):
        model, mas = self.moved(dtype)
        value = mas.penalty()
        value.backward()
        assert value.item() == self.VALUE and value.shape == ()
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(model.w0.grad, torch.tensor(self.GRADIENT, dtype=dtype))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_in_place_by_hand(self, dtype):
        model, mas = self.moved(dtype)
        value = mas.add_penalty_grad_()
        assert value.item() == self.VALUE and value.shape == () and not value.requires_grad
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(model.w0.grad, torch.tensor(self.GRADIENT, dtype=dtype))
        assert model.w0.grad.dtype == dtype
        grad = model.w0.grad
        mas.add_penalty_grad_()
        assert model.w0.grad is grad
        assert torch.equal(grad, 2 * torch.tensor(self.GRADIENT, dtype=dtype))

    @pytest.mark.parametrize("theta_dtype", DTYPES)
    @pytest.mark.parametrize("omega_dtype", DTYPES)
    def test_against_the_formula_in_float64(self, theta_dtype, omega_dtype):
        generator = torch.Generator().manual_seed(0)

        def random(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        # Even and ragged, strided and without entries; w3 is frozen and w5 has no Ω.
        shapes = [(16, 8), (3, 5, 7), (), (9,), (0, 4), (11,), (129, 17)]
        model = Bag(*(random(*shape).to(theta_dtype) for shape in shapes))
        model.w1.data = model.w1.data.transpose(0, 2).contiguous().transpose(0, 2)
        omegas = {f"w{i}": random(*shape).abs().to(omega_dtype) for i, shape in enumerate(shapes) if i != 5}
        mas = MAS(model, lam=0.7)
        mas.consolidate(Importance(omegas, 1))
        anchors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        model.w3.requires_grad_(False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(random(*parameter.shape).to(theta_dtype))
        model.w0.grad = random(*shapes[0]).to(theta_dtype)

        value, gradients = 0.0, {}
        for name, parameter in model.named_parameters():
            if name in omegas and parameter.requires_grad:
                difference = parameter.detach().double() - anchors[name].double()
                value += 0.7 * float((omegas[name].double() * difference**2).sum())
                gradients[name] = 2 * 0.7 * omegas[name].double() * difference
        existing = model.w0.grad.clone()
        wide = torch.float64 if torch.float64 in (theta_dtype, omega_dtype) else torch.float32

        penalty = mas.penalty()
        actual = torch.autograd.grad(penalty, [getattr(model, name) for name in gradients])
        for name, gradient in zip(gradients, actual, strict=True):
            assert (gradient.double() - gradients[name]).norm() <= PRECISION[theta_dtype] * gradients[name].norm()
        in_place = mas.add_penalty_grad_()
        for result in (penalty, in_place):
            assert result.dtype == wide
            assert abs(result.item() - value) <= PRECISION[wide] * value
        gradients["w0"] += existing.double()
        for name, gradient in gradients.items():
            error = (getattr(model, name).grad.double() - gradient).norm()
            assert error <= PRECISION[theta_dtype] * gradient.norm()
        assert model.w3.grad is None and model.w5.grad is None

    def test_is_differentiable_twice_over_in_one_loss(self):
        model, mas = self.moved(torch.float64)
        (8 * (model.w0.sum() + mas.penalty() + mas.penalty())).backward()
        assert torch.equal(model.w0.grad, 8 * (1 + 2 * torch.tensor(self.GRADIENT, dtype=torch.float64)))

    def test_is_the_same_under_autocast(self):
        model, mas = self.moved(torch.float32)
        with torch.no_grad():
            model.w0.add_(torch.tensor([[1 / 3, 1 / 7], [1 / 11, 1 / 13]]))
        expected = [mas.penalty().item(), mas.add_penalty_grad_().item()]
        with torch.autocast("cpu", torch.bfloat16):
            assert [mas.penalty().item(), mas.add_penalty_grad_().item()] == expected

    @pytest.mark.parametrize("method", ["penalty", "add_penalty_grad_"])
    def test_is_zero_before_consolidate_and_warns_once(self, method):
        model = bag([1.0, 2.0])
        mas = MAS(model)
        with pytest.warns(UserWarning, match="before consolidate.*exactly 0") as caught:
            value = getattr(mas, method)()
        assert [warning.filename for warning in caught] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert getattr(mas, method)().item() == 0.0
        assert value.item() == 0.0 and value.shape == () and value.dtype == torch.float32
        if method == "penalty":
            value.backward()
            (model.w0.sum() + mas.penalty()).backward()
            assert torch.equal(model.w0.grad, torch.ones(2))
        else:
            assert model.w0.grad is None

    @pytest.mark.filterwarnings("error")
    def test_is_zero_when_everything_is_frozen(self):
        model, mas = self.moved(torch.float32)
        model.requires_grad_(False)
        mas.penalty().backward()
        assert mas.penalty().item() == 0.0 and mas.add_penalty_grad_().item() == 0.0
        assert model.w0.grad is None

    def test_zero_lam_leaves_the_gradient(self):
        model, mas = self.moved(torch.float32)
        mas.lam = 0
        model.w0.grad = torch.ones(2, 2)
        assert mas.add_penalty_grad_().item() == 0.0 and mas.penalty().item() == 0.0
        assert torch.equal(model.w0.grad, torch.ones(2, 2))

    def test_refuses_sparse_gradients_and_changes_none(self):
        model = nn.ModuleDict({"fc": nn.Linear(2, 2), "tokens": nn.Embedding(4, 2, sparse=True)})
        mas = MAS(model)
        mas.consolidate(Importance({name: torch.ones_like(p) for name, p in model.named_parameters()}, 1))
        model["tokens"](torch.tensor([1])).sum().backward()
        with pytest.raises(ValueError, match=r"\.grad must be dense .* got sparse ones for 'tokens.weight'"):
            mas.add_penalty_grad_()
        assert model["fc"].weight.grad is None

    def test_state_follows_the_parameter_to_another_device(self):
        model, mas = self.moved(torch.float32)
        model.to("meta")
        assert mas.penalty().device.type == "meta"
        assert mas.add_penalty_grad_().device.type == "meta"
        assert mas.omega["w0"].device.type == "meta" and mas.anchor["w0"].device.type == "meta"


class TestConsolidate:
    def test_copies_omega_and_anchor(self):
        model = bag([1.0, 2.0])
        importance = importance_of([3.0, 4.0], num_samples=5)
        mas = MAS(model)
        assert dict(mas.omega) == {} and dict(mas.anchor) == {}
        assert mas.consolidate(importance) is importance
        with torch.no_grad():
            model.w0.zero_()
            importance["w0"].zero_()
        assert torch.equal(mas.omega["w0"], torch.tensor([3.0, 4.0]))
        assert torch.equal(mas.anchor["w0"], torch.tensor([1.0, 2.0]))
        with pytest.raises(TypeError):
            mas.omega["w0"] = torch.ones(2)

    def test_anchor_is_of_the_parameters_dtype_and_omega_keeps_its_own(self):
        mas = MAS(bag([1.0, 2.0], dtype=torch.bfloat16))
        mas.consolidate(importance_of([3.0, 4.0]).to(torch.float64))
        assert mas.anchor["w0"].dtype == torch.bfloat16 and mas.omega["w0"].dtype == torch.float64

    # N = 1 for Ω = [1, 2], then N = 3 for Ω = [5, 0].
    @pytest.mark.parametrize(
        ("merge", "expected"), [("sum", [6.0, 2.0]), ("mean", [4.0, 0.5]), ("ema", [4.2, 0.4]), ("max", [5.0, 2.0])]
    )
    def test_merges_and_moves_the_anchor(self, merge, expected):
        model = bag([1.0, 2.0])
        mas = MAS(model, merge=merge, alpha=0.8)
        mas.consolidate(importance_of([1.0, 2.0], num_samples=1))
        with torch.no_grad():
            model.w0.add_(1.0)
        mas.consolidate(importance_of([5.0, 0.0], num_samples=3))
        torch.testing.assert_close(mas.omega["w0"], torch.tensor(expected), rtol=1e-6, atol=0)
        assert torch.equal(mas.anchor["w0"], torch.tensor([2.0, 3.0]))

    def test_every_parameter_counts_its_own_samples(self):
        # w1 appears with the second task: its mean is over those 3 and the last 1 samples, not over all 6.
        mas = MAS(bag([0.0], [0.0]), merge="mean")
        mas.consolidate(Importance({"w0": torch.tensor([6.0])}, 2))
        mas.consolidate(Importance({"w0": torch.tensor([0.0]), "w1": torch.tensor([4.0])}, 3))
        mas.consolidate(Importance({"w0": torch.tensor([6.0]), "w1": torch.tensor([8.0])}, 1))
        torch.testing.assert_close(mas.omega["w0"], torch.tensor([3.0]))
        torch.testing.assert_close(mas.omega["w1"], torch.tensor([5.0]))

    @pytest.mark.parametrize("merge", ["sum", "mean", "ema", "max"])
    def test_a_heads_omega_belongs_to_its_task(self, merge):
        mas = MAS(bag([0.0], [0.0], [0.0]), merge=merge)
        mas.consolidate(Importance({"w0": torch.tensor([2.0]), "w1": torch.tensor([3.0])}, 2))
        mas.consolidate(Importance({"w0": torch.tensor([2.0]), "w2": torch.tensor([5.0])}, 2))
        assert mas.omega["w1"].item() == 3.0 and mas.omega["w2"].item() == 5.0
        assert set(mas.anchor) == {"w0", "w1", "w2"}

    def test_lists_everything_that_does_not_fit_and_changes_nothing(self):
        model = bag([1.0, 2.0], [3.0])
        mas = MAS(model)
        mas.consolidate(importance_of([1.0, 1.0], [1.0]))
        before = snapshot(mas)
        model.w1 = nn.Parameter(torch.full((1,), float("nan")))
        model.w0 = nn.Parameter(torch.ones(5))
        mapping = {"w1": torch.ones(1), "w0": torch.ones(4), "absent": torch.ones(1)}
        with pytest.raises(ValueError) as caught:
            mas.consolidate(Importance(mapping, 1, statistic="square"))
        assert str(caught.value).splitlines() == [
            "importance must fit the model and the earlier tasks, and the model be finite, got:",
            "  - 'w0' has shape [2], the model has [5]",
            "  - 'w0' has shape [4], the model has [5]",
            "  - 'absent' of shape [1] is missing from the model",
            "  - statistic is 'square' and was 'abs'",
            "  - the model's 'w1' has 1 of 1 entries wrong, the first is nan at [0]",
        ]
        assert_unchanged(mas, before)

    @pytest.mark.parametrize("method", ["penalty", "add_penalty_grad_"])
    def test_the_penalty_lists_what_no_longer_fits(self, method):
        model = bag([1.0, 2.0], [3.0], [4.0])
        mas = MAS(model)
        mas.consolidate(importance_of([1.0, 1.0], [1.0], [1.0]))
        model.w1 = nn.Parameter(torch.ones(2))
        del model.w2
        with pytest.raises(ValueError) as caught:
            getattr(mas, method)()
        assert str(caught.value).splitlines() == [
            "model must have every parameter that has an omega (MAS.adapt follows a changed model), got mismatches:",
            "  - 'w1' has shape [1], the model has [2]",
            "  - 'w2' of shape [1] is missing from the model",
        ]
        assert model.w0.grad is None

    def test_refuses_an_overflow_and_changes_nothing(self):
        mas = MAS(bag([1.0]))
        importance = Importance({"w0": torch.tensor([6e4], dtype=torch.float16)}, 1)
        mas.consolidate(importance)
        before = snapshot(mas)
        with pytest.raises(
            ValueError, match=r"(?s)omega must stay finite, got an overflow.*the merged 'w0' has 1 of 1"
        ):
            mas.consolidate(importance)
        assert_unchanged(mas, before)

    def test_refuses_options_with_an_importance(self):
        with pytest.raises(TypeError, match=r"options must be left out when data is an Importance, got \['dtype'\]"):
            MAS(bag([1.0])).consolidate(importance_of([1.0]), dtype=torch.float64)

    def test_warns_when_nothing_is_important(self):
        with pytest.warns(UserWarning, match="the importance is 0 for every parameter"):
            MAS(bag([1.0], [1.0])).consolidate(importance_of([0.0], [0.0]))

    @pytest.mark.filterwarnings("error")
    def test_does_not_warn_when_something_is(self):
        MAS(bag([1.0], [1.0])).consolidate(importance_of([0.0], [1.0]))

    def test_hands_anything_else_to_the_estimate(self, monkeypatch):
        model, data, calls = bag([1.0]), object(), []

        def estimate_importance(*args, **kwargs):
            calls.append((args, kwargs))
            return importance_of([2.0])

        fake = types.SimpleNamespace(estimate_importance=estimate_importance)
        monkeypatch.setitem(sys.modules, "mas_fast.estimate", fake)
        mas = MAS(model)
        result = mas.consolidate(data, objective="l1")
        assert calls == [((model, data), {"objective": "l1"})]
        assert result["w0"].item() == 2.0 and mas.omega["w0"].item() == 2.0

    def test_a_failed_estimate_changes_nothing(self, monkeypatch):
        model = bag([1.0])
        mas = MAS(model)
        mas.consolidate(importance_of([2.0]))
        before = snapshot(mas)

        def estimate_importance(*args, **kwargs):
            raise FloatingPointError("batch 3")

        fake = types.SimpleNamespace(estimate_importance=estimate_importance)
        monkeypatch.setitem(sys.modules, "mas_fast.estimate", fake)
        with torch.no_grad():
            model.w0.add_(1.0)
        with pytest.raises(FloatingPointError):
            mas.consolidate([torch.ones(1)])
        assert_unchanged(mas, before)
        # A model that no longer fits is found before the pass over the data, not after it.
        model.w0 = nn.Parameter(torch.ones(7))
        with pytest.raises(ValueError, match="model must have every parameter"):
            mas.consolidate([torch.ones(1)])

    def test_estimates_on_data(self):
        # ‖Wx‖² for W = [[1, 2], [3, 4]]: the gradient is 2(Wx)xᵀ. Its mean absolute value over x = (1, 0) and
        # (1, −1) is (|2·[[1, 0], [3, 0]]| + |2·[[−1, 1], [−1, 1]]|) / 2 = [[2, 1], [4, 1]].
        model = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        mas = MAS(model)
        importance = mas.consolidate([torch.tensor([[1.0, 0.0], [1.0, -1.0]])])
        assert importance.num_samples == 2
        torch.testing.assert_close(mas.omega["weight"], torch.tensor([[2.0, 1.0], [4.0, 1.0]]))
        assert mas.penalty().item() == 0.0

    @pytest.mark.parametrize("wrap", [compiled, nn.DataParallel])
    @pytest.mark.parametrize("keys", ["plain", "wrapped"])
    def test_fits_a_wrapped_model(self, wrap, keys):
        plain = nn.Sequential(nn.Linear(2, 2))
        nn.init.zeros_(plain[0].bias)
        wrapped = wrap(plain)
        names = [name for name, _ in (plain if keys == "plain" else wrapped).named_parameters()]
        mas = MAS(wrapped, lam=1.0)
        mas.consolidate(Importance({n: torch.ones_like(p) for n, p in zip(names, plain.parameters(), strict=True)}, 1))
        assert list(mas.omega) == ["0.weight", "0.bias"] == list(mas.anchor)
        with torch.no_grad():
            plain[0].bias.fill_(1.0)
        assert mas.add_penalty_grad_().item() == 2.0
        assert torch.equal(plain[0].bias.grad, torch.full((2,), 2.0))

    def test_a_layer_called_module_is_not_taken_for_a_wrapper(self):
        inner = nn.ModuleDict({"module": nn.Linear(1, 1, bias=False)})
        mas = MAS(nn.DataParallel(inner))
        mas.consolidate(Importance({"module.weight": torch.ones(1, 1)}, 1))
        assert list(mas.omega) == ["module.weight"]


class TestArguments:
    @pytest.mark.parametrize("lam", [-1.0, -1e-300, float("nan"), float("inf")])
    def test_lam_must_be_finite_and_not_negative(self, lam):
        message = re.escape(f"lam must be finite and at least 0, got {lam}")
        with pytest.raises(ValueError, match=message):
            MAS(bag([1.0]), lam=lam)
        mas = MAS(bag([1.0]), lam=2)
        with pytest.raises(ValueError, match=message):
            mas.lam = lam
        assert mas.lam == 2.0

    @pytest.mark.parametrize("lam", ["1", None, True, torch.tensor(1.0)])
    def test_lam_must_be_a_number(self, lam):
        with pytest.raises(TypeError, match="lam must be a real number, got"):
            MAS(bag([1.0]), lam=lam)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"model": [1.0]}, TypeError, "model must be a torch.nn.Module, got list"),
            ({"merge": "add"}, ValueError, "merge must be one of 'sum', 'mean', 'ema', 'max', got 'add'"),
            ({"alpha": 2.0}, ValueError, "alpha must be from 0 to 1, got 2.0"),
        ],
    )
    def test_refuses(self, arguments, error, message):
        with pytest.raises(error, match=re.escape(message)):
            MAS(**({"model": bag([1.0])} | arguments))

    def test_repr(self):
        mas = MAS(bag([1.0]), lam=0.5)
        mas.consolidate(importance_of([1.0], num_samples=1200))
        assert repr(mas) == "<MAS of 1 parameters, lam=0.5, merge='sum', num_samples=1,200>"


class TestState:
    def learned(self, dtype=torch.float32):
        model = bag([1.0, 2.0], [[3.0]], dtype=dtype)
        mas = MAS(model, lam=0.1 + 0.2, merge="mean", alpha=0.3)
        mas.consolidate(importance_of([0.1, 0.2], num_samples=3, objective="l1"))
        mas.consolidate(importance_of([0.3, 0.7], [[0.6]], num_samples=4, objective="l1"))
        return mas

    def assert_same(self, actual, expected):
        assert (actual.lam, actual.merge, actual.alpha) == (expected.lam, expected.merge, expected.alpha)
        for kind in ("omega", "anchor"):
            tensors, truth = getattr(actual, kind), getattr(expected, kind)
            assert list(tensors) == list(truth)
            for name in truth:
                assert tensors[name].dtype == truth[name].dtype and torch.equal(tensors[name], truth[name])
                assert tensors[name].data_ptr() != truth[name].data_ptr()
        # The counts of samples came along if the next mean is the same, and the meaning if another one is refused.
        importance = importance_of([1.0, 1.0], [[1.0]], num_samples=2, objective="l1")
        with pytest.raises(ValueError, match="objective is 'l2_squared' and was 'l1'"):
            actual.consolidate(importance_of([1.0, 1.0]))
        actual.consolidate(importance)
        expected.consolidate(importance)
        assert all(torch.equal(actual.omega[name], expected.omega[name]) for name in expected.omega)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_file_round_trip(self, dtype, tmp_path):
        mas = self.learned(dtype)
        mas.save(tmp_path / "mas.safetensors")
        loaded = MAS(bag([0.0, 0.0], [[0.0]], dtype=dtype))
        loaded.load(tmp_path / "mas.safetensors")
        self.assert_same(loaded, mas)

    @pytest.mark.parametrize("through", ["dict", "torch.save"])
    def test_state_dict_round_trip(self, through, tmp_path):
        mas = self.learned()
        state = mas.state_dict()
        if through == "torch.save":
            torch.save(state, tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt", weights_only=True)
        loaded = MAS(bag([0.0, 0.0], [[0.0]]))
        loaded.load_state_dict(state)
        self.assert_same(loaded, mas)

    @pytest.mark.filterwarnings("ignore:there is no importance")
    def test_round_trip_before_consolidate(self, tmp_path):
        MAS(bag([1.0]), lam=4.0).save(tmp_path / "mas")
        mas = MAS(bag([1.0]))
        mas.load(tmp_path / "mas")
        assert mas.lam == 4.0 and dict(mas.omega) == {} and mas.penalty().item() == 0.0

    def test_a_new_head_is_free(self, tmp_path):
        self.learned().save(tmp_path / "mas")
        model = bag([0.0, 0.0], [[0.0]], [5.0])
        mas = MAS(model)
        mas.load(tmp_path / "mas")
        mas.add_penalty_grad_()
        assert model.w2.grad is None and model.w0.grad is not None

    def test_a_wrapped_model_takes_the_plain_models_state(self, tmp_path):
        mas = self.learned()
        mas.save(tmp_path / "mas")
        loaded = MAS(nn.DataParallel(bag([0.0, 0.0], [[0.0]])))
        loaded.load(tmp_path / "mas")
        self.assert_same(loaded, mas)

    @pytest.mark.parametrize("through", ["state_dict", "file"])
    def test_lists_every_mismatch_and_changes_nothing(self, through, tmp_path):
        path = tmp_path / "mas"
        saved = self.learned()
        saved.save(path)
        mas = MAS(bag([0.0, 0.0, 0.0]), lam=7.0)
        mas.consolidate(importance_of([1.0, 1.0, 1.0]))
        before = snapshot(mas)
        with pytest.raises(ValueError) as caught:
            if through == "file":
                mas.load(path)
            else:
                mas.load_state_dict(saved.state_dict())
        start = "state must fit the model, got mismatches:"
        assert str(caught.value).splitlines() == [
            f"{str(path)!r} must hold a state that fits, got: {start}" if through == "file" else start,
            "  - 'w0' has shape [2], the model has [3]",
            "  - 'w1' of shape [1, 1] is missing from the model",
            "  - the anchor of 'w0' has shape [2], the model has [3]",
            "  - the anchor of 'w1' of shape [1, 1] is missing from the model",
        ]
        assert_unchanged(mas, before)
        assert mas.lam == 7.0 and mas.merge == "sum"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"omega": {}}, "'w0' has an anchor and no omega"),
            ({"anchor": {}}, "'w1' has an omega and no anchor"),
            ({"num_samples": {"w0": 1}}, "'w1' has an omega and no num_samples"),
            ({"meaning": {}}, "its meaning must state objective, scope and statistic, got {}"),
            ({"lam": -1.0}, "lam must be finite and at least 0, got -1.0"),
            ({"merge": "add"}, "merge must be one of 'sum', 'mean', 'ema', 'max', got 'add'"),
            ({"omega": {"w0": -torch.ones(2), "w1": torch.ones(1, 1)}}, "the omega of 'w0' has 2 of 2 entries wrong"),
            ({"anchor": {"w0": torch.ones(2), "w1": torch.full((1, 1), torch.nan)}}, "the anchor of 'w1' has 1 of 1"),
        ],
    )
    def test_refuses_a_damaged_state_and_changes_nothing(self, change, message):
        mas = self.learned()
        before = snapshot(mas)
        with pytest.raises(ValueError, match=re.escape(message)):
            mas.load_state_dict(mas.state_dict() | {"lam": 9.0} | change)
        assert_unchanged(mas, before)
        assert mas.lam == 0.1 + 0.2

    def test_names_missing_entries(self):
        with pytest.raises(ValueError, match="state must have the entries lam, .*, it lacks merge, omega"):
            state = MAS(bag([1.0])).state_dict()
            MAS(bag([1.0])).load_state_dict({k: v for k, v in state.items() if k not in ("merge", "omega")})

    @pytest.mark.parametrize("keep", [0, 8, 100, -1])
    def test_load_refuses_a_truncated_file(self, keep, tmp_path):
        mas = self.learned()
        before = snapshot(mas)
        mas.save(tmp_path / "mas")
        (tmp_path / "mas").write_bytes((tmp_path / "mas").read_bytes()[:keep])
        with pytest.raises(ValueError, match="mas' must be a complete safetensors file, got .*truncated"):
            mas.load(tmp_path / "mas")
        assert_unchanged(mas, before)

    def test_load_refuses_other_files(self, tmp_path):
        importance_of([1.0]).save(tmp_path / "omega")
        with pytest.raises(ValueError, match="omega' must hold mas_fast.mas, got mas_fast.importance"):
            MAS(bag([1.0])).load(tmp_path / "omega")
        for name, tensors, header in [
            ("text", {}, {"state": "{"}),
            ("prefix", {"x.w0": torch.ones(1)}, {"state": "{}"}),
        ]:
            storage.write(tmp_path / name, mas_module.KIND, tensors, header)
            with pytest.raises(ValueError, match=f"{name}' must hold a state that fits, got: "):
                MAS(bag([1.0])).load(tmp_path / name)

    @pytest.mark.parametrize(
        "change",
        [
            {"omega": None},
            {"omega": {"w0": [1.0]}},
            {"anchor": {"w0": "text"}},
            {"anchor": torch.ones(1)},
            {"num_samples": {"w0": "3"}},
            {"num_samples": [3]},
            {"scales": 3},
            {"meaning": {"objective": 3}},
            {"meaning": "text"},
        ],
        ids=str,
    )
    def test_entries_of_a_wrong_kind_are_named(self, change):
        mas = self.learned()
        before, state = snapshot(mas), mas.state_dict()
        with pytest.raises(ValueError, match=f"state must map names.*(?s:.)*its {next(iter(change))} "):
            mas.load_state_dict(state | change)
        assert_unchanged(mas, before)

    def test_failed_save_leaves_the_old_file(self, tmp_path, monkeypatch):
        mas = self.learned()
        mas.save(tmp_path / "mas")
        content = (tmp_path / "mas").read_bytes()

        def fail(tensors, path, metadata):
            Path(path).write_bytes(b"half of the fi")
            raise OSError("disk full")

        monkeypatch.setattr("mas_fast.storage.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            mas.save(tmp_path / "mas")
        assert [entry.name for entry in tmp_path.iterdir()] == ["mas"]
        assert (tmp_path / "mas").read_bytes() == content


def build_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    return model, optimizer, MAS(model, lam=0.3, merge="ema", alpha=0.25)


def train(model, optimizer, mas, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs, targets = torch.randn(5, 6, generator=generator), torch.randn(5, 3, generator=generator)
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        mas.add_penalty_grad_()
        optimizer.step()
        if step in (3, 11):
            omegas = {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}
            mas.consolidate(Importance(omegas, 10 + step))


def finish_training(folder):
    model, optimizer, mas = build_training()
    model.load_state_dict(torch.load(folder / "model.pt"))
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))
    mas.load(folder / "mas.safetensors")
    train(model, optimizer, mas, range(8, 16))
    torch.save(model.state_dict(), folder / "finished.pt")


@pytest.mark.filterwarnings("ignore:there is no importance")
def test_resumed_training_equals_uninterrupted_training_to_the_last_bit(tmp_path):
    model, optimizer, mas = build_training()
    train(model, optimizer, mas, range(8))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    mas.save(tmp_path / "mas.safetensors")
    train(model, optimizer, mas, range(8, 16))

    root = str(Path(importance_module.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root}
    subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment, check=True)
    finished = torch.load(tmp_path / "finished.pt")
    assert all(torch.equal(finished[name], tensor) for name, tensor in model.state_dict().items())


if __name__ == "__main__":
    finish_training(Path(sys.argv[1]))
