"""The settings of the demo and how they were chosen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How every method trains; only MAS reads ``lam``.

    ``lr`` and ``lam`` are what ``python -m mas_fast.demo.choose`` chose. It holds out a quarter of the training images,
    uses ten seeds that the demo does not (100 to 109) and never sees a test image. ``lr`` is the one of 0.03, 0.1 and 0.3
    at which joint training was most accurate, so that neither fine-tuning nor MAS had a say in it; ``lam`` is then the
    one at which MAS was most accurate after the last task.

    Attributes:
        lam: λ.
        lr: Learning rate of plain SGD.
        epochs: Passes over the images of each task.
        batch_size: Images of one task in a step.
    """

    lam: float = 0.1
    lr: float = 0.1
    epochs: int = 20
    batch_size: int = 16
