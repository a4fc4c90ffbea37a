"""What other libraries and other code do for the same importance; each on a copy of the model, as it needs it.

Libraries form the gradients of each sample, of `chunk` samples at a time, which are then reduced to Ω. They are the
extra `bench`, which `make bench` puts into .venv/peers; where one is missing, its rows say so. A model is prepared for
them once.
"""

from __future__ import annotations

import copy
import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from benchmarks.cases import Workload
from mas_fast.reference import OBJECTIVES

# Last, so that nothing there hides what is installed.
sys.path.append(str(Path(__file__).parents[1] / ".venv" / "peers"))

# Names the per-sample gradients of a sum, [chunk, *shape], which it forms by a backward of this scalar.
PerSample = Callable[[Tensor], dict[str, Tensor]]


def batch_mode(workload: Workload) -> dict[str, Tensor]:
    """Take |∂ mean of a batch| and the mean over batches: the authors' batch mode, Avalanche's plugin; not exact.

    Source: their formulas; in eval mode here, where Avalanche leaves the model in training mode.
    """
    objective = OBJECTIVES[workload.objective]
    names, parameters = zip(*workload.model.named_parameters(), strict=True)
    omega = [torch.zeros_like(parameter) for parameter in parameters]
    for batch in workload.batches:
        gradients = torch.autograd.grad(objective(workload.model(batch)).mean(), parameters)
        for total, gradient in zip(omega, gradients, strict=True):
            total += gradient.abs_() / len(workload.batches)
    return dict(zip(names, omega, strict=True))


def authors(workload: Workload) -> dict[str, Tensor]:
    """Take |∂| of every sample in a batch of its own into a running mean: the authors' code with its batch size of 1.

    Source: the formulas of rahafaljundi/MAS-Memory-Aware-Synapses. Its demo leaves that flag out, see `batch_mode`.
    """
    objective = OBJECTIVES[workload.objective]
    parameters = dict(workload.model.named_parameters())
    omega = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    seen = 0
    for batch in workload.batches:
        for sample in batch.split(1):
            workload.model.zero_grad()
            objective(workload.model(sample)).sum().backward()
            for name, parameter in parameters.items():
                omega[name].mul_(seen).add_(parameter.grad.abs()).div_(seen + 1)
            seen += 1
    workload.model.zero_grad()
    return omega


def opacus(workload: Workload, chunk: int) -> dict[str, Tensor]:
    """Reduce what Opacus' GradSampleModule forms."""
    from opacus.grad_sample import GradSampleModule
    from opacus.layers import DPLSTM

    def as_its_own(lstm: nn.LSTM) -> nn.Module:
        own = DPLSTM(lstm.input_size, lstm.hidden_size, lstm.num_layers, lstm.bias, lstm.batch_first)
        own.load_state_dict(lstm.state_dict())
        return own

    def prepare(model: nn.Module) -> nn.Module:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.LSTM):
                    setattr(module, name, as_its_own(child))
        # It hooks modules in training mode only; no case here has dropout.
        return GradSampleModule(model.train(), batch_first=True, loss_reduction="sum")

    module = _prepared("opacus", workload.model, prepare)
    model = module._module

    def gradients(samples: Tensor) -> dict[str, Tensor]:
        OBJECTIVES[workload.objective](module(samples)).sum().backward()
        found = {name: parameter.grad_sample for name, parameter in model.named_parameters()}
        module.zero_grad()
        return found

    return _reduced(workload, chunk, gradients)


def backpack(workload: Workload, chunk: int) -> dict[str, Tensor]:
    """Reduce what BackPACK's BatchGrad forms."""
    import backpack as library
    from backpack.extensions import BatchGrad

    model = _prepared("backpack", workload.model, library.extend)

    def gradients(samples: Tensor) -> dict[str, Tensor]:
        objective = OBJECTIVES[workload.objective](model(samples)).sum()
        with library.backpack(BatchGrad()):
            objective.backward()
        found = {name: parameter.grad_batch for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            del parameter.grad_batch
            parameter.grad = None
        return found

    return _reduced(workload, chunk, gradients)


_PREPARED: dict[str, WeakKeyDictionary[nn.Module, nn.Module]] = {
    "opacus": WeakKeyDictionary(),
    "backpack": WeakKeyDictionary(),
}


def _prepared(peer: str, model: nn.Module, prepare: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Return what a peer makes of a copy without in-place activations, which their hooks do not allow."""
    known = _PREPARED[peer]
    if model not in known:
        own = copy.deepcopy(model)
        for module in own.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
        known[model] = prepare(own)
    return known[model]


def _reduced(workload: Workload, chunk: int, gradients: PerSample) -> dict[str, Tensor]:
    omega: dict[str, Tensor] = {}
    num_samples = 0
    for batch in workload.batches:
        for samples in batch.split(chunk):
            for name, own in gradients(samples).items():
                total = own.abs_().sum(0)
                omega[name] = omega[name].add_(total) if name in omega else total
        num_samples += len(batch)
    return {name: total.div_(num_samples) for name, total in omega.items()}


def requirements() -> list[str]:
    """Return the extra `bench` of the installed package: the libraries, pinned."""
    rows = importlib.metadata.requires("mas_fast") or []
    return [row.split(";")[0].strip() for row in rows if row.replace("'", '"').endswith('extra == "bench"')]


def versions() -> dict[str, str]:
    """Return the versions of the libraries that are installed."""
    found = {}
    for name in ("backpack-for-pytorch", "opacus"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    print(*requirements())
