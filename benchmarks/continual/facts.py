"""Facts <left digit, relation, right digit> stated by images of two real digits, and retrieved as the nearest vector.

A canvas of 16 × 16 pixels shows two digits of 8 × 8, the right one level with the left one, below or above it: that is
the relation. The vector of a fact is its left digit's, its relation's and its right digit's side by side, each drawn
once at random on the unit sphere. Digits to train on and to test on are different images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.continual.data import SPLIT_SEED, Images, Task, split_rows

RELATIONS = {"level with": (4, 4), "above": (0, 8), "below": (8, 0)}  # the rows at which left and right begin
PART = 8  # entries of the vector of a digit or a relation


class Fact(NamedTuple):
    """What an image states: the left digit is level with, above or below the right one."""

    left: int
    relation: int
    right: int


FACTS = [Fact(left, relation, right) for left in range(10) for relation in range(len(RELATIONS)) for right in range(10)]


def vectors() -> Tensor:
    """Return the vector of each of `FACTS`, [300, 24]."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    digits, relations = (
        torch.nn.functional.normalize(torch.randn(count, PART, generator=generator), dim=1) for count in (10, 3)
    )
    rows = [torch.cat((digits[fact.left], relations[fact.relation], digits[fact.right])) for fact in FACTS]
    return torch.stack(rows)


def compose(digits: Images, rows: Tensor, facts: Sequence[int], per_fact: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images that state facts, [len(facts)·per_fact, 1, 16, 16], and which of `FACTS` each states.

    Args:
        digits: Images of digits, [N, 1, 8, 8].
        rows: Which of them may be used.
        facts: Indices into `FACTS`.
        per_fact: Images of each fact.
        seed: Of the choice of digits.
    """
    generator = torch.Generator().manual_seed(seed)
    of_digit = [rows[digits.labels[rows] == digit] for digit in range(10)]
    images = torch.zeros(len(facts) * per_fact, 1, 16, 16)
    for position, index in enumerate(facts):
        fact = FACTS[index]
        own = images[position * per_fact : (position + 1) * per_fact]
        for column, digit, row in zip((0, 8), (fact.left, fact.right), _rows(fact), strict=True):
            chosen = of_digit[digit][torch.randint(len(of_digit[digit]), (per_fact,), generator=generator)]
            own[:, :, row : row + 8, column : column + 8] = digits.pixels[chosen]
    return images, torch.tensor(list(facts)).repeat_interleave(per_fact)


def fact_task(name: str, digits: Images, facts: Sequence[int], *, per_fact: int = 20, validation: bool = False) -> Task:
    """Return a task of facts; a quarter as many images to test on as to train on."""
    train, test = split_rows(digits.labels, validation=validation)
    images, targets = compose(digits, train, facts, per_fact, SPLIT_SEED)
    test_images, test_targets = compose(digits, test, facts, max(1, per_fact // 4), SPLIT_SEED + 1)
    return Task(name, images, targets, test_images, test_targets, 0)


def _rows(fact: Fact) -> tuple[int, int]:
    return list(RELATIONS.values())[fact.relation]
