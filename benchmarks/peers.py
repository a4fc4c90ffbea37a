"""What other libraries and other code do for the same importance; each on a copy of the model, as it needs it.

Libraries form the gradients of each sample, of `chunk` samples at a time, which are then reduced to Ω. They are
installed by `pip install --no-deps -r benchmarks/peers.txt`; where one is missing, its rows say so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.cases import Workload
from mas_fast.reference import OBJECTIVES

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


def opacus(workload: Workload, chunk: int) -> dict[str, Tensor]:
    """Reduce what Opacus' GradSampleModule forms."""
    from opacus.grad_sample import GradSampleModule
    from opacus.layers import DPLSTM

    def as_its_own(lstm: nn.LSTM) -> nn.Module:
        own = DPLSTM(lstm.input_size, lstm.hidden_size, lstm.num_layers, lstm.bias, lstm.batch_first)
        own.load_state_dict(lstm.state_dict())
        return own

    model = _prepared(workload.model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.LSTM):
                setattr(module, name, as_its_own(child))
    # It hooks modules in training mode only; no case here has dropout.
    module = GradSampleModule(model.train(), batch_first=True, loss_reduction="sum")
    # Parameters of its LSTM have other names than its state has.
    names = {tensor.data_ptr(): name for name, tensor in model.state_dict().items()}

    def gradients(samples: Tensor) -> dict[str, Tensor]:
        OBJECTIVES[workload.objective](module(samples)).sum().backward()
        found = {names[parameter.data_ptr()]: parameter.grad_sample for parameter in model.parameters()}
        module.zero_grad()
        return found

    return _reduced(workload, chunk, gradients)


def backpack(workload: Workload, chunk: int) -> dict[str, Tensor]:
    """Reduce what BackPACK's BatchGrad forms."""
    import backpack as library
    from backpack.extensions import BatchGrad

    model = library.extend(_prepared(workload.model))

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


def _prepared(model: nn.Module) -> nn.Module:
    """Return a copy without in-place activations, which their hooks do not allow."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return model


def _reduced(workload: Workload, chunk: int, gradients: PerSample) -> dict[str, Tensor]:
    omega: dict[str, Tensor] = {}
    num_samples = 0
    for batch in workload.batches:
        for samples in batch.split(chunk):
            for name, own in gradients(samples).items():
                total = own.abs_().sum(0)
                omega[name] = omega[name].add_(total) if name in omega else total
        num_samples += len(batch)
    return {name: total / num_samples for name, total in omega.items()}
