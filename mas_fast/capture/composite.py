"""Calls that are made of other calls: run in pieces, so that the pieces are watched.

A function of torch.nn.functional hides what it calls, because it hands itself over to whoever watches. Its own code is
run with that handing over left out.
"""

import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F  # noqa: N812


def _opened(function: Any) -> Callable[..., Any]:
    """Return a function of torch's that runs its code at once, whoever watches."""
    seen_by_nobody = {"has_torch_function": lambda *_: False, "has_torch_function_variadic": lambda *_: False}
    opened = types.FunctionType(
        function.__code__, {**function.__globals__, **seen_by_nobody}, function.__name__, function.__defaults__
    )
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


# function -> the same, in pieces
COMPOSITES: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: _opened(F.multi_head_attention_forward),
}
