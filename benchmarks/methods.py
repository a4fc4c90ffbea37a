"""The contenders, one row each: what an importance estimate, or one ordinary batched backward, costs.

A method walks over the whole workload and returns Ω, or None if it computes none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import mas_fast
from benchmarks import peers
from benchmarks.cases import Workload
from mas_fast.reference import OBJECTIVES

Omega = Mapping[str, Tensor]


def batched_backward(workload: Workload) -> None:
    """Run one forward and one backward of the summed objective per batch, as a training step does: the unit of cost."""
    objective = OBJECTIVES[workload.objective]
    for batch in workload.batches:
        workload.model.zero_grad(set_to_none=True)
        objective(workload.model(batch)).sum().backward()
    workload.model.zero_grad(set_to_none=True)


def mas_fast_pass(workload: Workload) -> Omega:
    """Run `mas_fast.estimate_importance` once over all batches: a call as users make it, its overheads included."""
    dtype = next(workload.model.parameters()).dtype
    return mas_fast.estimate_importance(workload.model, workload.batches, objective=workload.objective, dtype=dtype)


def loop(workload: Workload) -> Omega:
    """Run one forward and one backward per sample and add |gradient|: batch size 1, what is exact without a library."""
    objective = OBJECTIVES[workload.objective]
    parameters = dict(workload.model.named_parameters())
    omega = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    num_samples = 0
    for batch in workload.batches:
        for sample in batch.split(1):
            gradients = torch.autograd.grad(objective(workload.model(sample)).sum(), list(parameters.values()))
            for total, gradient in zip(omega.values(), gradients, strict=True):
                total += gradient.abs_()
        num_samples += len(batch)
    return {name: total.div_(num_samples) for name, total in omega.items()}


def vmap(workload: Workload, chunk: int) -> Omega:
    """Form the gradients of `chunk` samples at a time with `torch.func.vmap(grad)` and reduce them: exact."""
    objective = OBJECTIVES[workload.objective]
    parameters = {name: parameter.detach() for name, parameter in workload.model.named_parameters()}
    omega = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}

    def sample_objective(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        output = torch.func.functional_call(workload.model, parameters, (sample.unsqueeze(0),))
        return objective(output).sum()

    chunk_gradients = torch.func.vmap(torch.func.grad(sample_objective), in_dims=(None, 0))
    num_samples = 0
    for batch in workload.batches:
        for samples in batch.split(chunk):
            for name, gradients in chunk_gradients(parameters, samples).items():  # [chunk, *parameter.shape]
                omega[name] += gradients.abs_().sum(0)
        num_samples += len(batch)
    return {name: total.div_(num_samples) for name, total in omega.items()}


def vmap_whole(workload: Workload) -> Omega:
    """Do the same for all samples of a batch at once, as one writes it first."""
    return vmap(workload, workload.batch_size)


@dataclass(frozen=True)
class Method:
    """One row of the table of contenders.

    Attributes:
        run: Takes a workload and one of `options`; returns Ω, or None if it computes none.
        options: Keyword arguments to choose from; the fastest beside the unit is the one that is timed.
        sample_limit: Time this many samples at most, of one batch or of several whole ones; None times every batch.
        batch_limit: The same in batches.
        is_exact: Whether an error above the tolerance is a failure; else it is shown, and the time too.
        environment: Variables of the process that it needs; it is then measured in one of its own, with the unit.
        is_default: Whether it is measured when no methods are named.
        is_ours: Whether an exception of `run` is a failure of the benchmark, and not a peer that cannot run the case.
    """

    run: Callable[..., Omega | None]
    options: tuple[dict[str, int], ...] = ({},)
    sample_limit: int | None = None
    batch_limit: int | None = None
    is_exact: bool = True
    is_ours: bool = False
    is_default: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)

    def timed_workload(self, workload: Workload) -> Workload:
        """Cut the workload to what this method is timed on."""
        if self.sample_limit is not None:
            if workload.batch_size >= self.sample_limit:
                return workload.head(self.sample_limit)
            return replace(workload, batches=workload.batches[: self.sample_limit // workload.batch_size])
        return replace(workload, batches=workload.batches[: self.batch_limit])


CHUNKS = tuple({"chunk": chunk} for chunk in (4, 8, 16, 32, 64))
UNIT = "batched_backward"
OURS = "mas_fast"
METHODS: dict[str, Method] = {
    UNIT: Method(batched_backward, is_ours=True),
    OURS: Method(mas_fast_pass, is_ours=True),
    "mas_fast_python": Method(
        mas_fast_pass, batch_limit=4, is_ours=True, environment={"MAS_FAST_KERNELS": "reference"}
    ),
    "loop": Method(loop, sample_limit=32),
    "authors": Method(peers.authors, sample_limit=32),
    "vmap": Method(vmap, options=CHUNKS, sample_limit=64),
    "vmap_whole": Method(vmap_whole, is_default=False),
    "opacus": Method(peers.opacus, options=CHUNKS, sample_limit=64),
    "backpack": Method(peers.backpack, options=CHUNKS, sample_limit=64),
    "batch_mode": Method(peers.batch_mode, is_exact=False),
}
