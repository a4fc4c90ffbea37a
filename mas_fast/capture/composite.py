"""Calls that are made of other calls: run in pieces, so that the pieces are watched.

A function of torch.nn.functional hides what it calls, because it hands itself over to whoever watches. Its own code is
run with that handing over left out.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F  # noqa: N812

from mas_fast.capture.recurrent import RECURRENT
from mas_fast.recompute import opened

# function -> the same, in pieces
COMPOSITES: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: opened(F.multi_head_attention_forward),
    **RECURRENT,
}
