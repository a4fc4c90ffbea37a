"""What the importance pass costs against an ordinary batched forward+backward and against the per-sample loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mas_fast
from mas_fast.demo.network import DigitNet
from mas_fast.demo.train import estimate_options
from mas_fast.reference import importance_loop

WARM_UPS = 2
# A pass is over a data set: several batches bear together what is paid once, the proof of where the samples are.
BATCH_SIZE = 64


def measure_cost(network: DigitNet, task_images: Sequence[Tensor], task: int, *, repeats: int) -> dict[str, Any]:
    """Time the pass, the ordinary forward+backward and the loop in turn on all images, and compare Ω with float64.

    All three take the squared length of the same outputs in float32. The ordinary one uses the same batches as the
    pass and forms the gradients of its sum; the loop is the way to the exact Ω without this package, one image a time.

    Returns:
        The three times in ms with quartiles, the two ratios of medians, and the largest relative error of a parameter.
    """
    images = torch.cat(list(task_images))
    methods: dict[str, Callable[[], object]] = {
        "ordinary": partial(_ordinary, network, images, task),
        "pass": partial(_pass, network, images, task),
        "loop": partial(_loop, network, images, task),
    }
    times_ms: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(WARM_UPS + repeats):
        for name, method in methods.items():
            network.zero_grad()
            start = time.perf_counter()
            method()
            elapsed_ms = 1e3 * (time.perf_counter() - start)
            if repeat >= WARM_UPS:
                times_ms[name].append(elapsed_ms)
    network.zero_grad()
    median_ms = {name: statistics.median(times) for name, times in times_ms.items()}
    return {
        "num_samples": len(images),
        "batch_size": BATCH_SIZE,
        "repeats": repeats,
        "time_ms": {name: _quartiles(times) for name, times in times_ms.items()},
        "pass_over_ordinary": median_ms["pass"] / median_ms["ordinary"],
        "loop_over_pass": median_ms["loop"] / median_ms["pass"],
        "max_relative_error": _max_relative_error(network, images, task),
    }


def _ordinary(network: DigitNet, images: Tensor, task: int) -> None:
    for batch in images.split(BATCH_SIZE):
        network(batch, task).square().sum().backward()


def _pass(network: DigitNet, images: Tensor, task: int) -> mas_fast.Importance:
    return mas_fast.estimate_importance(network, images.split(BATCH_SIZE), **estimate_options(task))


def _loop(network: DigitNet, images: Tensor, task: int) -> list[Tensor]:
    is_used = estimate_options(task)["parameters"]
    parameters = [p for name, p in network.named_parameters() if is_used(name, p)]
    omega = [torch.zeros_like(p) for p in parameters]
    for image in images.split(1):
        gradients = torch.autograd.grad(network(image, task).square().sum(), parameters)
        torch._foreach_add_(omega, torch._foreach_abs(gradients))
    torch._foreach_div_(omega, len(images))
    return omega


def _max_relative_error(network: DigitNet, images: Tensor, task: int) -> float:
    """Return max over parameters of ‖Ω − Ω64‖ / ‖Ω64‖, where Ω64 is the loop in float64."""
    omega = _pass(network, images, task)
    forward = estimate_options(task)["forward"]
    # One image a call: every sample's backward goes through the whole batch that it is called with.
    truths = [importance_loop(network, image, forward=forward) for image in images.split(1)]
    errors = []
    for name in omega:
        truth = torch.stack([each[name] for each in truths]).mean(0)
        errors.append(((omega[name].double() - truth).norm() / truth.norm()).item())
    return max(errors)


def _quartiles(times_ms: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times_ms, n=4, method="inclusive")
    return {"p25": low, "p50": median, "p75": high}
