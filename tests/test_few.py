"""Layouts that are proved on a few samples and hold for more: exact for every model, where programs are alike."""

import pytest
import torch
from cases import DIRECT, JOINED, Lambda, build
from compare import truth_of, worst_error
from torch import nn

import mas_fast
from mas_fast import estimate_importance
from mas_fast.capture.backward import Backward
from mas_fast.capture.trace import differ_in_samples

FEW = 5


def more_of(batch, rows):
    """Return a batch of as many rows, no two alike unless they are whole numbers."""
    many = torch.cat([batch] * (rows // len(batch) + 1))[:rows]
    if not many.is_floating_point():
        return many
    scale = torch.linspace(0.6, 1.4, rows, dtype=many.dtype)
    return many * scale.view(-1, *[1] * (many.dim() - 1))


@pytest.fixture
def sweeps(monkeypatch):
    """The backwards that run, as (phase, samples)."""
    seen = []
    sweep = Backward._sweep

    def recorded(self, phase, *args, **kwargs):
        seen.append((phase.name, self._samples))
        return sweep(self, phase, *args, **kwargs)

    monkeypatch.setattr(Backward, "_sweep", recorded)
    return seen


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", DIRECT | JOINED)
def test_exact_for_batches_of_other_sizes(name):
    model, batch = build((DIRECT | JOINED)[name])
    data = more_of(batch, 28)
    importance = estimate_importance(model, data.split([16, 12]), dtype=torch.float64)
    assert worst_error(importance, truth_of(model, data)) <= 1e-11


@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet", "transformer", "time_first", "frames"])
def test_a_proof_on_a_few_serves_batches_of_any_size(name, sweeps):
    model, batch = build(DIRECT[name])
    data = more_of(batch, 40)
    estimate_importance(model, data.split([16, 13, 11]), dtype=torch.float64)
    assert [samples for phase, samples in sweeps if phase == "ADD"] == [16, 13, 11]
    assert {samples for phase, samples in sweeps if phase != "ADD"} == {FEW}


def test_what_a_few_do_not_show_is_proved_on_all(sweeps):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    data = torch.randn(16, 3, dtype=torch.float64)
    with torch.no_grad():
        model[0].bias.fill_(-50)
        data[:FEW] *= 1e-3
        data[FEW:] *= 1e3
    importance = estimate_importance(model, [data], dtype=torch.float64)
    assert worst_error(importance, truth_of(model, data)) <= 1e-11
    assert ("WEIGH", 16) in sweeps


def without_value(x):
    """Return zeros through which a gradient flows."""
    return x - x.detach()


MEETING_FAR_OFF = {
    "rolled_by_five": lambda x: x + without_value(x.roll(5, 0)),
    "rolled_by_ten": lambda x: x + without_value(x.roll(10, 0)),
    "rolled_by_half": lambda x: x + without_value(x.roll(len(x) // 2, 0)),
    "rolled_by_seven": lambda x: x + without_value(x.roll(7, 0)),
    "the_sixth_for_all": lambda x: x + without_value(x[5:6].sum(0)),
    "groups_of_four": lambda x: x + without_value(x.view(-1, 4, 3).flip(1).view(-1, 3)) if len(x) % 4 == 0 else x,
    "groups_of_five": lambda x: x + without_value(x.view(-1, 5, 3).flip(0).view(-1, 3)) if len(x) % 5 == 0 else x,
    "every_fifth": lambda x: x + without_value(x[::5].sum(0)),
    "last_for_all": lambda x: x + without_value(x[-1:]),
    "the_rest_of_five": lambda x: x + without_value(x[5:].sum(0)),
}


@pytest.mark.filterwarnings("ignore::mas_fast.errors.LoopWarning")
@pytest.mark.parametrize("rows", [15, 20])
@pytest.mark.parametrize("name", MEETING_FAR_OFF)
def test_samples_that_meet_beyond_the_few_are_found(name, rows):
    meet = MEETING_FAR_OFF[name]
    torch.manual_seed(0)
    model = Lambda(lambda m, x: m.b(torch.tanh(meet(m.a(x)))), a=nn.Linear(4, 3), b=nn.Linear(3, 2)).double()
    data = torch.randn(rows, 4, dtype=torch.float64)
    with mas_fast.capture(model, dtype=torch.float64) as session:  # proves on all
        session.accumulate(lambda: model(data).square().sum(1))
    expected = session.importance()
    importance = estimate_importance(model, [data], dtype=torch.float64)
    assert worst_error(importance, dict(expected)) <= 1e-11
    assert [row.fallback for row in importance.coverage] == [row.fallback for row in expected.coverage]


@pytest.mark.parametrize(
    ("few", "more", "alike"),
    [
        (torch.Size([5, 3]), torch.Size([16, 3]), True),
        (torch.Size([20, 5]), torch.Size([64, 5]), True),
        (torch.Size([5, 5]), torch.Size([16, 16]), True),
        (torch.Size([1, 5]), torch.Size([4, 5]), False),  # groups
        (torch.Size([7, 3]), torch.Size([18, 3]), False),  # two more rows than samples
        (torch.Size([0, 3]), torch.Size([11, 3]), False),
        ((5, -1), (16, -1), True),
        ((5, 2), (5, 2), False),  # of five rows, five may be none
        ((-10,), (-10,), False),
        ((0, 1, None), (0, 1, None), True),
        ((True,), (1,), False),
        ((torch.float32, "sum"), (torch.float32, "sum"), True),
        ((torch.float32,), (torch.float64,), False),
        ((b"ids",), (b"other",), False),
        ([(len, (1, 2), ())], [(len, (1, 2), ())], True),
        ([(len,), (len,)], [(len,)], False),
    ],
)
def test_programs_that_differ_in_the_number_of_samples(few, more, alike):
    assert differ_in_samples(few, more, (FEW, 16)) is alike
