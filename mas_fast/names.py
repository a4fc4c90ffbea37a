"""Which name belongs to which parameter, whatever the model is wrapped in."""

from __future__ import annotations

import sys

from torch import nn

_WRAPPER_CHILDREN = ("_orig_mod", "module", "_checkpoint_wrapped_module")


def _is_wrapper_child(module: nn.Module, child: str) -> bool:
    if child == "_orig_mod":
        # Importing torch._dynamo takes seconds; while nobody has, no compiled module can exist.
        dynamo = sys.modules.get("torch._dynamo.eval_frame")
        return dynamo is not None and isinstance(module, dynamo.OptimizedModule)
    if child == "module":
        return isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    if child == "_checkpoint_wrapped_module":
        wrapper = sys.modules.get("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
        return wrapper is not None and isinstance(module, wrapper.ActivationWrapper)
    return False


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside of torch.compile, DataParallel and DistributedDataParallel, in any order."""
    for child in ("_orig_mod", "module"):
        if _is_wrapper_child(model, child):
            return unwrapped(getattr(model, child))
    return model


def parameter_name(model: nn.Module, name: str) -> str:
    """Return `name` as the plain model would spell it.

    `_orig_mod.` of torch.compile, `module.` of DataParallel and DistributedDataParallel, and the prefix of wrappers for
    activation checkpoints are dropped, at any depth, where the module that carries them is such a wrapper. A layer that
    merely happens to be called `module` keeps its name.

    Args:
        model: The model that `name` was taken from.
        name: A name as `model.named_parameters()` gives it.
    """
    kept = []
    module: object = model
    for part in name.split("."):
        if not (isinstance(module, nn.Module) and _is_wrapper_child(module, part)):
            kept.append(part)
        module = getattr(module, part, None)
    return ".".join(kept)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter of `model` once, keyed by its name in the plain model, in the model's order."""
    if not any(_is_wrapper_child(module, child) for module in model.modules() for child in _WRAPPER_CHILDREN):
        return dict(model.named_parameters())
    return {parameter_name(model, name): parameter for name, parameter in model.named_parameters()}
