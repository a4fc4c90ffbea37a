"""The methods of the experiments: each one's formula, written out, on a problem small enough to do so."""

import statistics
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

# Last, so that mas_fast is the installed one.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.continual import compare, methods  # noqa: E402
from benchmarks.continual.data import Task  # noqa: E402
from benchmarks.continual.problem import Recognition, Retrieval, Training  # noqa: E402
from benchmarks.continual.seeds import Workplace  # noqa: E402
from benchmarks.continual.summary import claim, matrix, table  # noqa: E402
from mas_fast.demo.metrics import mean_and_error  # noqa: E402

TRAINING = Training(lr=0.05, epochs=2, batch_size=4)
CLASSES = 3

pytestmark = pytest.mark.filterwarnings("ignore:no omega holds these parameters")


def tasks(outputs=CLASSES, count=2):
    generator = torch.Generator().manual_seed(0)

    def images(number):
        return torch.rand(number, 1, 8, 8, generator=generator)

    def labels(number):
        return torch.randint(CLASSES, (number,), generator=generator)

    return [Task(f"task {i}", images(13), labels(13), images(7), labels(7), outputs) for i in range(count)]


def recognition(count=2):
    return Recognition(tasks(count=count), TRAINING)


def retrieval():
    vectors = torch.randn(CLASSES, 4, generator=torch.Generator().manual_seed(1))
    return Retrieval(tasks(outputs=0), TRAINING, vectors)


def per_sample_gradients(learner, index, value_of):
    """Yield the gradient of `value_of` the output, by name, for each training image, in float64."""
    network = learner.network.double()
    names = learner.used(index)
    parameters = [dict(network.named_parameters())[name] for name in names]
    for image in learner.problem.tasks[index].train.double():
        output = network(image[None], learner.problem.head(index))[0]
        for value in value_of(output):
            yield dict(zip(names, torch.autograd.grad(value, parameters, retain_graph=True), strict=True))
    learner.network.float()


def mean_over_samples(gradients, of, count):
    total = {}
    for gradient in gradients:
        for name, own in gradient.items():
            total[name] = total.get(name, 0) + of(own) / count
    return total


def assert_omega(omega, truth):
    assert set(omega) == set(truth)
    for name, own in omega.items():
        torch.testing.assert_close(own.double(), truth[name], rtol=1e-4, atol=1e-6 * float(truth[name].max()))


def test_fisher_of_classes_is_over_samples_and_outcomes():
    learner = methods.EWC(recognition(), 0, 1.0)

    def weighted(output):
        log_p = F.log_softmax(output, 0)
        return [log_p[c] * log_p[c].detach().exp().sqrt() for c in range(CLASSES)]

    truth = mean_over_samples(per_sample_gradients(learner, 0, weighted), torch.square, 13)
    assert_omega(learner.importance(0), truth)


def test_fisher_of_vectors_is_over_samples_and_entries(monkeypatch):
    monkeypatch.setattr(Retrieval, "fisher_stride", 1)
    learner = methods.EWC(retrieval(), 0, 1.0)
    truth = mean_over_samples(per_sample_gradients(learner, 0, list), torch.square, 13)
    assert_omega(learner.importance(0), truth)


def test_omega_of_mas_and_the_images_it_is_from():
    learner = methods.ExactMAS(recognition(), 0, 1.0)
    truth = mean_over_samples(per_sample_gradients(learner, 0, lambda out: [out.square().sum()]), torch.abs, 13)
    assert_omega(learner.importance(0), truth)
    other = methods.ExactMAS(recognition(), 0, 1.0, lambda index: recognition().tasks[index].test)
    assert other.importance(0).num_samples == 7


def test_omega_of_si_is_what_the_way_took_from_the_loss():
    problem = recognition()
    learner, losses = methods.SI(problem, 0, 1.0), []
    start = {name: parameter.detach().clone() for name, parameter in learner.network.named_parameters()}
    gains = {name: torch.zeros_like(parameter) for name, parameter in start.items()}
    plain = learner.step

    def step(optimizer):
        before = {name: parameter.detach().clone() for name, parameter in learner.network.named_parameters()}
        plain(optimizer)
        for name, parameter in learner.network.named_parameters():
            if parameter.grad is not None:
                gains[name] -= parameter.grad * (parameter.detach() - before[name])
        losses.append(sum(float(gain.sum()) for gain in gains.values()))

    learner.step = step
    learner.learn(0)
    assert len(losses) == 2 * 4 and losses[-1] > 0  # two epochs of four batches; the loss went down
    for name, omega in learner.mas.omega.items():
        way = learner.mas.anchor[name] - start[name]
        torch.testing.assert_close(omega, (gains[name] / (way**2 + 0.1)).clamp_min(0))
    assert not any(name.startswith("heads.1") for name in learner.mas.omega)


def test_imm_deploys_the_mode_of_both_tasks():
    learner = methods.IMM(recognition(), 0, 0.1)
    modes, fishers = [], []
    for index in range(2):
        learner.learn(index)
        modes.append({name: p.detach().clone() for name, p in learner.network.named_parameters()})
        fishers.append(learner.fisher(index))
    merged = dict(learner.deployed.named_parameters())
    for name in ("conv1.weight", "linear.bias"):
        weight = fishers[0][name] + fishers[1][name]
        mode = (fishers[0][name] * modes[0][name] + fishers[1][name] * modes[1][name]) / weight
        torch.testing.assert_close(merged[name], torch.where(weight > 0, mode, modes[1][name]))
    torch.testing.assert_close(merged["heads.0.weight"], modes[0]["heads.0.weight"])
    assert all(bool((omega == 1).all()) for omega in learner.mas.omega.values())


@pytest.mark.parametrize("problem", [recognition, retrieval])
def test_lwf_pulls_old_outputs_back(problem):
    own = problem()
    learner = methods.LwF(own, 0, 3.0)
    learner.learn(0)
    learner.before(1)
    rows = torch.arange(5)
    images = own.tasks[1].train
    with torch.no_grad():
        unmoved = learner.extra_loss(learner.network.features(images[rows]), rows)
    assert float(unmoved) == pytest.approx(0, abs=1e-6)
    old = learner.network(images[rows], 0).detach()
    with torch.no_grad():
        learner.network.heads[0].bias += torch.tensor([0.5, -0.2, 0.1, 0.3][: old.shape[1]])
    new = learner.network(images[rows], 0)
    if problem is recognition:
        p, q = F.softmax(old / 2, 1), F.softmax(new / 2, 1)
        expected = 3 * 4 * (p * (p / q).log()).sum(1).mean()
    else:
        expected = 3 * ((new - old) ** 2).sum(1).mean() / 2
    torch.testing.assert_close(learner.extra_loss(learner.network.features(images[rows]), rows), expected)


def test_all_methods_begin_alike_and_learn_the_first_task_alike():
    found = {}
    for name, method in methods.EVERY.items():
        if name != "joint":
            learner = method(recognition(), 5, 1.0)
            learner.learn(0)
            found[name] = learner.network.conv2.weight.detach()
    for name, weight in found.items():
        assert torch.equal(weight, found["fine-tuning"]), name


@pytest.mark.parametrize("name", ["EWC", "SI", "MAS", "l-MAS", methods.RECOMPUTED])
def test_a_huge_strength_keeps_what_has_an_importance(name):
    learner = methods.EVERY[name](recognition(), 0, 1e12)
    learner.learn(0)
    kept = {n: p.detach().clone() for n, p in learner.network.named_parameters()}
    held = {n: omega > 1e-6 * omega.max() for n, omega in learner.mas.omega.items()}
    learner.learn(1)
    for n, parameter in learner.network.named_parameters():
        if n in held:
            torch.testing.assert_close(parameter[held[n]], kept[n][held[n]], rtol=1e-3, atol=1e-4)


def test_recomputed_omega_is_that_of_all_tasks_on_the_network_of_today():
    learner = methods.RecomputedMAS(recognition(), 0, 0.1)
    learner.learn(0)
    learner.learn(1)
    both = [learner.importance(index) for index in range(2)]
    torch.testing.assert_close(learner.mas.omega["conv1.weight"], both[0]["conv1.weight"] + both[1]["conv1.weight"])
    torch.testing.assert_close(learner.mas.omega["heads.0.bias"], both[0]["heads.0.bias"])


def test_divergence_is_an_error():
    learner = methods.LwF(Recognition(tasks(), Training(lr=1e6, epochs=5, batch_size=4)), 0, 1e30)
    with pytest.raises(methods.DivergenceError, match="must stay finite"):
        for index in range(2):
            learner.learn(index)


def test_retrieval_is_of_the_nearest_vector():
    problem = retrieval()
    outputs = problem.vectors[torch.tensor([0, 1, 2, 2])] + 0.01
    assert problem.accuracy(outputs, torch.tensor([0, 1, 2, 0])) == 0.75
    assert float(problem.loss(problem.vectors, torch.arange(3))) == 0


def test_strengths_are_chosen_by_the_highest_mean(tmp_path, monkeypatch):
    scores = {0.01: 0.5, 0.1: 0.9, 1.0: 0.7, 10.0: None}
    monkeypatch.setattr(methods.ExactMAS, "strengths", tuple(scores))
    monkeypatch.setattr(
        compare, "_score", lambda problems, method, seed, strength: scores[strength] and scores[strength] - seed / 100
    )
    place = Workplace(tmp_path, "any", (1,), (0, 2), False, {})
    chosen = compare.choose(place, {"p": recognition()}, ["fine-tuning", "MAS"])
    assert list(chosen) == ["MAS"]
    assert chosen["MAS"]["strength"] == 0.1 and not chosen["MAS"]["edge"]
    assert chosen["MAS"]["scores"] == {"0.01": 0.49, "0.1": 0.89, "1.0": 0.69, "10.0": None}


@pytest.mark.parametrize(
    ("differences", "options", "verdict"),
    [
        ([0.03, 0.04, 0.05], {}, "holds"),
        ([-0.03, -0.04, -0.05], {}, "does not hold"),
        ([-0.03, -0.04, -0.05], {"ties": True}, "does not hold"),
        ([0.03, -0.04, 0.02], {}, "cannot be told"),
        ([0.03, -0.04, 0.02], {"ties": True}, "ties"),
        ([0.03], {}, "cannot be told"),
        ([0.03], {"ties": True}, "cannot be told"),
        ([-0.004, -0.005, -0.006], {"margin": 0.01}, "holds"),
        ([-0.04, -0.05, -0.06], {"margin": 0.01}, "does not hold"),
        ([-0.04, 0.05, 0.0], {"margin": 0.01}, "cannot be told"),
    ],
)
def test_verdicts(differences, options, verdict):
    found = claim("it is so", differences, **options)
    assert found["verdict"] == verdict
    assert found["difference_points"] == pytest.approx(100 * statistics.fmean(differences))


def test_forgetting_claims_pair_the_seeds():
    def seeds(*drops):
        return [[[1.0], [1.0 - drop, 0.9]] for drop in drops]

    noise = (0.0, 0.2, 0.4)
    runs = {
        "fine-tuning": seeds(*(0.3 + n for n in noise)),
        "MAS": seeds(*(0.1 + n for n in noise)),
        "l-MAS": seeds(0.2, 0.4 + 1e-3, 0.6),
        "EWC": seeds(0.05, 0.25 + 1e-3, 0.45),
        "joint": [[[0.9, 0.9]]] * 3,
        compare.UNIT: seeds(0.1, 0.1, 0.1),
    }
    verdicts = {found["claim"]: found["verdict"] for found in compare.forgetting_claims({"p": runs})}
    assert verdicts == {
        "MAS forgets less than fine-tuning, or as much": "holds",  # 0.2 on each seed, though seeds differ by 0.4
        "MAS forgets less than l-MAS, or as much": "holds",
        "MAS forgets less than EWC, or as much": "does not hold",
        "l-MAS forgets less than fine-tuning": "holds",
        "l-MAS forgets more than MAS, or as much": "holds",
    }


def test_tables_are_in_percent():
    found = table("t", ["a", "b"], {"m": [[0.5, 0.7], None]})
    assert found["rows"] == [{"name": "m", "cells": [mean_and_error([50.0, 70.0]), None]}]
    assert matrix("t", ["x", "y"], [[[1.0], [0.5, 1.0]], [[0.5], [0.25, 1.0]]])["mean"] == [[0.75], [0.375, 1.0]]
