"""Ω while a model is deployed, batch by batch; and Ω as other implementations compute it, from means of batches."""

import pytest
import torch
from torch import nn

import mas_fast
from mas_fast import MAS


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def relative_error(actual, truth):
    return float((actual.double() - truth.double()).norm() / truth.double().norm())


class TestObserve:
    def test_mean_is_that_of_all_samples(self):
        model, x = network(), torch.randn(23, 5)
        mas = MAS(model)
        mas.consolidate(x[:10].split(4))
        for batch in x[10:].split(5):
            mas.observe(batch)
        truth = mas_fast.estimate_importance(model, [x])
        assert all(relative_error(mas.omega[name], truth[name]) <= 1e-6 for name in truth)
        assert set(mas._state.num_samples.values()) == {23}

    def test_ema_forgets_what_is_no_longer_used(self):
        model, x = network(), torch.randn(12, 5)
        mas = MAS(model)
        mas.consolidate([x])
        first = dict(mas.omega)
        importance = mas.observe(x[:3], "ema", alpha=0.25)
        for name, omega in mas.omega.items():
            assert relative_error(omega, 0.75 * first[name] + 0.25 * importance[name]) <= 1e-6

    def test_anchor_stays(self):
        model, x = network(), torch.randn(12, 5)
        mas = MAS(model)
        mas.consolidate([x])
        before = {name: anchor.clone() for name, anchor in mas.anchor.items()}
        with torch.no_grad():
            model[0].weight += 1
        mas.observe(x)
        assert all(torch.equal(mas.anchor[name], anchor) for name, anchor in before.items())
        expected = float((mas.omega["0.weight"] * 1.0).sum())
        assert float(mas.penalty().detach()) == pytest.approx(expected, rel=1e-5)

    def test_first_batch_is_the_first_task(self):
        model, x = network(), torch.randn(4, 5)
        mas = MAS(model)
        mas.observe(x)
        assert set(mas.omega) == set(dict(model.named_parameters()))
        assert torch.equal(mas.anchor["0.bias"], model[0].bias)

    def test_parameters_that_were_not_observed_before_get_an_anchor(self):
        model, x = network(), torch.randn(4, 5)
        mas = MAS(model)
        mas.consolidate([x], parameters=["0.weight"])
        mas.observe(x)
        assert set(mas.anchor) == set(dict(model.named_parameters()))

    @pytest.mark.parametrize("omega_dtype", [torch.uint8, torch.bfloat16, torch.float16])
    def test_narrow_state_is_refused(self, omega_dtype):
        mas = MAS(network(), omega_dtype=omega_dtype)
        with pytest.raises(ValueError, match=r"Ω must be kept in float32 .* got torch\."):
            mas.observe(torch.randn(4, 5))

    @pytest.mark.parametrize("options", [{"how": "sum"}, {"how": "ema", "alpha": 2.0}])
    def test_bad_options(self, options):
        with pytest.raises(ValueError, match="must be"):
            MAS(network()).observe(torch.randn(4, 5), **options)

    def test_nothing_changes_on_an_error(self):
        model, x = network(), torch.randn(4, 5)
        mas = MAS(model)
        mas.consolidate([x])
        before = dict(mas.omega)
        with pytest.raises(FloatingPointError):
            mas.observe(torch.full((4, 5), float("nan")))
        with pytest.raises(ValueError, match="objective"):
            mas.observe(x, objective="l1")
        assert all(torch.equal(mas.omega[name], omega) for name, omega in before.items())


def authors_batch_mode(model, batches):
    """The authors' update of Ω: a running mean over batches, each divided by its own size."""
    omega = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for index, batch in enumerate(batches):
        model.zero_grad()
        output = model(batch)
        (output**2).sum().backward()
        for name, p in model.named_parameters():
            omega[name] = (omega[name] * index + p.grad.abs() / len(batch)) / (index + 1)
    model.zero_grad()
    return omega


def avalanche(model, batches):
    """Avalanche's: |gradient of the batch's mean of squared norms|, divided by the number of batches."""
    omega = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        torch.norm(model(batch), p="fro", dim=1).pow(2).mean().backward()
        for name, p in model.named_parameters():
            omega[name] += p.grad.abs()
    model.zero_grad()
    return {name: total / len(batches) for name, total in omega.items()}


def facil(model, batches):
    """FACIL's: the norm is not squared."""
    omega = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        torch.norm(model(batch), p=2, dim=1).mean().backward()
        for name, p in model.named_parameters():
            omega[name] += p.grad.abs() / len(batches)
    model.zero_grad()
    return omega


class TestPerBatch:
    @pytest.mark.parametrize(
        ("implementation", "objective"), [(authors_batch_mode, "l2_squared"), (avalanche, "l2_squared"), (facil, "l2")]
    )
    def test_other_implementations(self, implementation, objective):
        model = network().double()
        batches = torch.randn(22, 5).double().split(6)  # the last one is smaller
        importance = mas_fast.estimate_importance(model, batches, objective=objective, per="batch", dtype=torch.float64)
        for name, truth in implementation(model, batches).items():
            assert relative_error(importance[name], truth) <= 1e-14
        assert importance.num_samples == 22

    def test_batches_of_one_are_exact_and_larger_ones_are_smaller(self):
        model, x = network(), torch.randn(32, 5)
        exact = mas_fast.estimate_importance(model, [x])
        for size in (1, 4, 32):
            found = mas_fast.estimate_importance(model, x.split(size), per="batch")
            ratio = sum(float(o.sum()) for o in found.values()) / sum(float(o.sum()) for o in exact.values())
            assert ratio == pytest.approx(1, abs=1e-5) if size == 1 else ratio < 1
        squares = mas_fast.estimate_importance(model, [x], per="batch", statistic="square")
        assert relative_error(squares["0.bias"], found["0.bias"].square()) <= 1e-5

    def test_it_says_what_it_is_and_does_not_merge_with_the_exact_one(self):
        model, x = network(), torch.randn(8, 5)
        found = mas_fast.estimate_importance(model, [x], per="batch")
        assert found.objective == "l2_squared, mean of each batch"
        assert {row.rule for row in found.coverage} == {"batch"}
        with pytest.raises(ValueError, match="mean of each batch"):
            found.merge(mas_fast.estimate_importance(model, [x]))

    def test_model_is_left_as_it_was(self):
        model, x = network().train(), torch.randn(8, 5)
        model[0].weight.grad = torch.ones(6, 5)
        mas_fast.estimate_importance(model, [x], per="batch", parameters=["2.weight"])
        assert model.training and torch.equal(model[0].weight.grad, torch.ones(6, 5))
        assert model[2].weight.grad is None

    @pytest.mark.parametrize(
        ("data", "options", "error", "message"),
        [
            ([], {}, ValueError, "at least one batch"),
            (torch.randn(4, 5), {}, TypeError, "iterable of batches"),
            ([torch.full((4, 5), float("inf"))], {}, FloatingPointError, "finite"),
            ([torch.randn(4, 5)], {"scope": "local"}, ValueError, "scope must be 'global'"),
            ([torch.randn(4, 5)], {"per": "epoch"}, ValueError, "per must be one of 'sample', 'batch'"),
        ],
    )
    def test_bad_input(self, data, options, error, message):
        with pytest.raises(error, match=message):
            mas_fast.estimate_importance(network(), data, **{"per": "batch", **options})
