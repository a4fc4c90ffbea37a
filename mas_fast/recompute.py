"""What torch's activation checkpoints do with the calls at hand."""

import types
from collections.abc import Callable
from typing import Any

import torch


def checkpoint_hook() -> str:
    """Return what torch's activation checkpoint is doing with saved tensors, as the name of its hooks; else ""."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks[0].__qualname__ if hooks and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint" else ""


def is_first(hook: str) -> bool:
    """Return whether calls run for the first time, to be made again in the backward."""
    return hook.startswith("_checkpoint_hook")


def is_repeat(hook: str) -> bool:
    """Return whether calls are those of the backward."""
    return hook.startswith("_recomputation_hook")


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
