"""Calls that are made of other calls: run in pieces, so that the pieces are watched.

A function of torch.nn.functional hides what it calls, because it hands itself over to whoever watches. Its own code is
run with that handing over left out.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from mas_fast.capture.recurrent import RECURRENT


def opened(function: Any) -> Callable[..., Any]:
    """Return a function of torch's that runs its code at once, whoever watches."""
    seen_by_nobody = {"has_torch_function": lambda *_: False, "has_torch_function_variadic": lambda *_: False}
    inner = types.FunctionType(
        function.__code__, {**function.__globals__, **seen_by_nobody}, function.__name__, function.__defaults__
    )
    inner.__kwdefaults__ = function.__kwdefaults__
    return inner


# Backwards, in which activation checkpoints make calls again.
BACKWARDS: dict[Any, Callable[..., Any]] = {
    torch.autograd.grad: opened(torch.autograd.grad),
    torch.autograd.backward: opened(torch.autograd.backward),
}

# function -> the same, in pieces
COMPOSITES: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: opened(F.multi_head_attention_forward),
    **RECURRENT,
}
