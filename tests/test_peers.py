"""The benchmark's contenders: what is not exact is marked, what cannot run says why."""

import sys
from pathlib import Path

import pytest
import torch

import mas_fast

# Last, so that mas_fast is the installed one.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import measure  # noqa: E402
from benchmarks.cases import Workload  # noqa: E402
from benchmarks.methods import METHODS  # noqa: E402


@pytest.fixture
def workload():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(inplace=True), torch.nn.Linear(4, 3))
    return Workload(model.eval(), [torch.randn(6, 5) for _ in range(2)])


def test_batch_mode_is_that_of_the_package(workload):
    expected = mas_fast.estimate_importance(workload.model, workload.batches, per="batch")
    for name, omega in METHODS["batch_mode"].run(workload).items():
        torch.testing.assert_close(omega, expected[name])


@pytest.mark.parametrize("name", ["loop", "vmap", "mas_fast", "batch_mode"])
def test_errors_are_judged_where_a_method_claims_to_be_exact(workload, name):
    contender = measure.prepare(name, workload, measure.true_importance(workload), 1e-5)
    assert contender.failure is None
    assert (contender.error < 1e-5) == METHODS[name].is_exact


@pytest.mark.parametrize("name", ["opacus", "backpack"])
def test_a_peer_that_is_not_there_says_so(workload, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    contender = measure.prepare(name, workload, measure.true_importance(workload), 1e-5)
    assert contender.failure.startswith("ModuleNotFoundError") and name in contender.failure


def test_a_wrong_peer_has_no_time(workload, monkeypatch):
    wrong = METHODS["vmap"].__class__(lambda workload: {n: 2 * p for n, p in workload.model.named_parameters()})
    monkeypatch.setitem(METHODS, "wrong", wrong)
    contender = measure.prepare("wrong", workload, measure.true_importance(workload), 1e-5)
    assert "is above 1e-05" in contender.failure
