"""What torch's activation checkpoints do with the calls at hand."""

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
