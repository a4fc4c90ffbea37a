"""The data: scikit-learn's bundled digits as five two-class tasks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

# Fixed, so that every seed and every method sees the same images.
SPLIT_SEED = 0
TEST_FRACTION = 0.3
VALIDATION_FRACTION = 0.25
PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))


@dataclass(frozen=True)
class Task:
    """Two digits to tell apart.

    Attributes:
        name: The two digits, for example ``"0/1"``.
        train_images: [N, 1, 8, 8] float32 in [0, 1].
        train_labels: [N] int64, 0 for the first digit and 1 for the second.
        test_images: [M, 1, 8, 8] float32 in [0, 1], never trained on.
        test_labels: [M] int64.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_tasks(*, validation: bool = False) -> list[Task]:
    """Return the five tasks in the order in which they are learned.

    Args:
        validation: Hold out a quarter of the training images in place of the test images, which are then not
            returned at all. Settings are chosen this way.

    Source: the UCI optical recognition of handwritten digits data, 1,797 images of 8×8 pixels in 17 grey levels.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, digits = load_digits(return_X_y=True)
    split = partial(train_test_split, random_state=SPLIT_SEED)
    train, test = split(range(len(digits)), test_size=TEST_FRACTION, stratify=digits)
    if validation:
        train, test = split(train, test_size=VALIDATION_FRACTION, stratify=digits[train])

    images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    labels = torch.tensor(digits)
    tasks = []
    for first, second in PAIRS:
        mine = (labels == first) | (labels == second)
        train_rows, test_rows = (torch.tensor([row for row in rows if mine[row]]) for rows in (train, test))
        target = (labels == second).long()
        tasks.append(
            Task(f"{first}/{second}", images[train_rows], target[train_rows], images[test_rows], target[test_rows])
        )
    return tasks
