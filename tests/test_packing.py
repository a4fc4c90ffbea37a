"""Ω and θ* of small parameters share memory, and nobody notices."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from mas_fast import MAS, Importance
from mas_fast.packing import SMALL

KINDS = {"float32": {}, "bfloat16": {"omega_dtype": torch.bfloat16}, "codes": {"omega_dtype": torch.uint8}}


def learned(**state):
    torch.manual_seed(0)
    sizes = [3, SMALL, 1, 700, 0, SMALL - 1, 129]
    model = nn.ParameterList([nn.Parameter(torch.randn(size)) for size in sizes])
    model.append(nn.Parameter(torch.randn(5, 4).double()))
    mas = MAS(model, **state)
    mas.consolidate(Importance({name: torch.rand(p.shape).to(p) for name, p in model.named_parameters()}, 1))
    with torch.no_grad():
        for parameter in model:
            parameter += 1
    return mas


def memory_of(mas):
    kept = [*mas._state.omega.values(), *mas._state.anchor.values()]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for k in kept for t in (k.values, k.scales)}


@pytest.mark.parametrize("state", KINDS.values(), ids=KINDS)
def test_shared_memory_is_as_large_as_what_is_in_it(state):
    mas = learned(**state)
    held = mas._plan.groups[0].held
    assert len(held.omegas) == len(held.anchors) == 4  # of SMALL entries, of none, of float64, and the others
    padding = 8 * 16 * 8
    assert mas._state.num_bytes <= sum(memory_of(mas).values()) <= mas._state.num_bytes + padding
    # Learning again leaves nothing of the old memory behind.
    before = set(memory_of(mas)) - {0}
    importance = Importance({"0": torch.ones(3)}, 1)
    mas.consolidate(importance)
    assert sum(memory_of(mas).values()) <= mas._state.num_bytes + padding
    assert len(before & set(memory_of(mas))) <= 4  # the large parameter and that of float64


@pytest.mark.parametrize("state", KINDS.values(), ids=KINDS)
def test_the_penalty_is_that_of_the_state(state):
    mas = learned(**state)
    expected = sum(
        (mas.omega[n].double() * (p - mas.anchor[n]).double() ** 2).sum() for n, p in mas.model.named_parameters()
    )
    assert mas.penalty().item() == pytest.approx(expected.item(), rel=1e-6)


def test_what_is_saved_alone_brings_no_other_along():
    mas = learned()
    state = mas.state_dict()
    assert len(pickle.dumps(state["omega"]["0"])) < 2000 > len(pickle.dumps(state["anchor"]["2"]))
    size = len(pickle.dumps(mas))
    assert size < 2 * len(pickle.dumps(mas.model)) + mas._state.num_bytes + 20_000
    again = pickle.loads(pickle.dumps(mas))
    assert sum(memory_of(again).values()) == sum(memory_of(mas).values())
    assert again.penalty().item() == mas.penalty().item()


def test_what_is_left_alone_lets_the_others_go():
    mas = learned()
    mas.adapt(drop=["0", "2", "4", "5", "6"])
    assert sum(memory_of(mas).values()) == mas._state.num_bytes


def test_a_copy_and_a_state_dict_are_on_their_own():
    mas = learned()
    saved = io.BytesIO()
    torch.save(mas.state_dict(), saved)
    saved.seek(0)
    other = copy.deepcopy(mas)
    assert not set(memory_of(mas)) & set(memory_of(other)) - {0}
    other.consolidate(Importance({"0": torch.ones(3)}, 1))
    again = MAS(mas.model)
    again.load_state_dict(torch.load(saved))
    assert again.penalty().item() == mas.penalty().item() > other.penalty().item() == 0
