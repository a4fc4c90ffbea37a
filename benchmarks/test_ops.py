"""Time each accumulate op against its plain-torch reference and against the plain weight gradient of the same shapes.

Those of an LSTM's steps have only the reference beside them, the product of a linear layer torch's own; those of the
training step are in `benchmarks.steps`.

Letters: N samples, T positions, R rows of both, O and I channels out and in, V vocabulary, D width, K entries of a
vector parameter, H cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from mas_fast import reference, reference_recurrent
from mas_fast.kernels import ops

aten = torch.ops.aten

NUM_THREADS = 2
TOLERANCE = 1e-5  # relative in norm, float32 against float64

Tensors = dict[str, Tensor]


class OpCase(NamedTuple):
    """One op on one shape.

    Attributes:
        op: Name of the op in `ops` and in `reference`.
        shape: What is particular about the shape.
        draw: Draws grad_output, input and whatever else holds data, every axis 0 of which is N or 1.
        omega_shape: Shape of Ω.
        accumulate: Calls the op it is given: (op, omega, data).
        plain: Returns the ordinary weight gradient, summed over samples: (omega, data).
    """

    op: str
    shape: str
    draw: Callable[[], Tensors]
    omega_shape: tuple[int, ...]
    accumulate: Callable[[Callable[..., None], Tensor, Tensors], None]
    plain: Callable[[Tensor, Tensors], Tensor]


def linear(shape: str, n: int, t: int, o: int, i: int) -> OpCase:
    """Return a case of y [N, T, O] = x [N, T, I] Wᵀ."""
    return OpCase(
        "accumulate_linear_",
        f"{shape}: N {n} T {t} O {o} I {i}",
        lambda: {"grad_output": torch.randn(n, t, o), "input": torch.randn(n, t, i)},
        (o, i),
        lambda op, omega, data: op(omega, data["grad_output"], data["input"]),
        lambda omega, data: data["grad_output"].flatten(0, 1).T @ data["input"].flatten(0, 1),
    )


def conv(shape: str, n: int, i: int, o: int, size: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> OpCase:
    """Return a case of a square convolution of x [N, I, size, size] with half padding."""
    size_out = (size - 1) // stride + 1
    geometry = ([stride] * 2, [kernel // 2] * 2, [1] * 2)

    def plain(omega: Tensor, data: Tensors) -> Tensor:
        return aten.convolution_backward(
            data["grad_output"], data["input"], omega, None, *geometry, False, [0, 0], groups, [False, True, False]
        )[1]

    return OpCase(
        "accumulate_conv_",
        f"{shape}: N {n} {i}→{o} on {size}×{size}, kernel {kernel}, stride {stride}, groups {groups}",
        lambda: {"grad_output": torch.randn(n, o, size_out, size_out), "input": torch.randn(n, i, size, size)},
        (o, i // groups, kernel, kernel),
        lambda op, omega, data: op(omega, data["grad_output"], data["input"], *geometry, groups),
        plain,
    )


def embedding(shape: str, n: int, t: int, v: int, d: int) -> OpCase:
    """Return a case of T rows of width D per sample, looked up among V."""
    return OpCase(
        "accumulate_embedding_",
        f"{shape}: N {n} T {t} V {v} D {d}",
        lambda: {"grad_output": torch.randn(n, t, d), "ids": torch.randint(v, (n, t))},
        (v, d),
        lambda op, omega, data: op(omega, data["grad_output"], data["ids"]),
        lambda omega, data: aten.embedding_dense_backward(data["grad_output"], data["ids"], v, -1, False),
    )


def layer_norm(shape: str, n: int, t: int, k: int) -> OpCase:
    """Return a case of weight and bias of a layer norm over the last axis of [N, T, K]; Ω is [2, K]."""

    def draw() -> Tensors:
        x = torch.randn(n, t, k)
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return {"grad_output": torch.randn(n, t, k), "input": x, "mean": mean, "rstd": (variance + 1e-5).rsqrt()}

    def accumulate(op: Callable[..., None], omega: Tensor, data: Tensors) -> None:
        delta, x, mean, rstd = (data[name].unsqueeze(-1) for name in ("grad_output", "input", "mean", "rstd"))
        op(omega[0], omega[1], delta, x, mean, rstd)  # [N, R = T, K, S = 1]

    def plain(omega: Tensor, data: Tensors) -> Tensor:
        delta, x, mean, rstd = (data[name] for name in ("grad_output", "input", "mean", "rstd"))
        _, weight, bias = aten.native_layer_norm_backward(
            delta, x, [k], mean, rstd, omega[0], omega[1], [False, True, True]
        )
        return torch.stack([weight, bias])

    return OpCase("accumulate_affine_", f"layer norm {shape}: N {n} T {t} K {k}", draw, (2, k), accumulate, plain)


def batch_norm(shape: str, n: int, k: int, size: int) -> OpCase:
    """Return a case of weight and bias of a batch norm in eval mode on [N, K, size, size]; Ω is [2, K]."""

    def draw() -> Tensors:
        return {
            "grad_output": torch.randn(n, k, size, size),
            "input": torch.randn(n, k, size, size),
            "mean": torch.randn(1, k),
            "variance": torch.rand(1, k) + 0.5,
        }

    def accumulate(op: Callable[..., None], omega: Tensor, data: Tensors) -> None:
        delta, x = (data[name].view(-1, 1, k, size * size) for name in ("grad_output", "input"))
        rstd = (data["variance"] + 1e-5).rsqrt()
        op(omega[0], omega[1], delta, x, data["mean"].view(1, 1, k, 1), rstd.view(1, 1, k, 1))

    def plain(omega: Tensor, data: Tensors) -> Tensor:
        delta, x, mean, variance = (data[name] for name in ("grad_output", "input", "mean", "variance"))
        _, weight, bias = aten.native_batch_norm_backward(
            delta, x, omega[0], mean[0], variance[0], None, None, False, 1e-5, [False, True, True]
        )
        return torch.stack([weight, bias])

    return OpCase(
        "accumulate_affine_", f"batch norm {shape}: N {n} K {k} on {size}×{size}", draw, (2, k), accumulate, plain
    )


def bias(shape: str, n: int, t: int, k: int) -> OpCase:
    """Return a case of the bias of a linear layer with outputs [N, T, K]."""
    return OpCase(
        "accumulate_affine_",
        f"bias {shape}: N {n} T {t} K {k}",
        lambda: {"grad_output": torch.randn(n, t, k)},
        (k,),
        lambda op, omega, data: op(None, omega, data["grad_output"].unsqueeze(-1)),
        lambda omega, data: data["grad_output"].sum((0, 1)),
    )


# The layers of benchmarks.cases, and what is hard for a kernel that adds |·| per sample: few positions for a large Ω,
# few multiplications per entry, ragged sizes.
OP_CASES = [
    linear("one position", 256, 1, 400, 784),
    linear("one position, ragged", 33, 1, 10, 401),
    linear("few positions", 16, 8, 384, 384),
    linear("many positions", 16, 64, 1536, 384),
    linear("long", 4, 512, 384, 384),
    conv("first layer", 32, 3, 64, 32),
    conv("large image", 32, 64, 64, 32),
    conv("middle", 32, 128, 128, 16),
    conv("small image", 32, 256, 256, 4),
    conv("narrow", 32, 16, 16, 32),
    conv("strided", 32, 64, 128, 16, stride=2),
    conv("projection", 32, 16, 32, 32, kernel=1, stride=2),
    conv("grouped", 32, 128, 128, 16, groups=4),
    conv("depthwise", 32, 128, 128, 16, groups=128),
    embedding("small vocabulary", 16, 64, 256, 384),
    embedding("large vocabulary", 16, 64, 30_000, 128),
    layer_norm("transformer", 16, 64, 384),
    batch_norm("first stage", 32, 16, 32),
    batch_norm("last stage", 32, 64, 8),
    bias("one position", 256, 1, 400),
    bias("many positions", 16, 64, 1536),
]


@pytest.fixture(autouse=True)
def fixed_threads() -> Iterator[None]:
    """Run with `NUM_THREADS` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    yield
    torch.set_num_threads(before)


def to_float64(data: Tensors) -> Tensors:
    """Return the data with every floating tensor in float64."""
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in data.items()}


def samples_of(data: Tensors) -> Iterator[Tensors]:
    """Yield the data of one sample after the other; what all samples share has one row."""
    for n in range(len(data["grad_output"])):
        yield {name: tensor if len(tensor) == 1 else tensor[n : n + 1] for name, tensor in data.items()}


def assert_close(actual: Tensor, truth: Tensor) -> None:
    """Assert that ‖actual − truth‖ ≤ `TOLERANCE` ‖truth‖."""
    error = ((actual.double() - truth).norm() / truth.norm()).item()
    assert error <= TOLERANCE, f"relative error must be at most {TOLERANCE:.0e}, got {error:.1e}"


@pytest.mark.parametrize("contender", ["mas_fast", "reference", "weight_gradient"])
@pytest.mark.parametrize("case", OP_CASES, ids=lambda case: f"{case.op}-{case.shape}")
def test_op(benchmark: BenchmarkFixture, case: OpCase, contender: str) -> None:
    """Check one contender on one case against float64, then time it."""
    torch.manual_seed(0)
    data = case.draw()
    exact_data = to_float64(data)
    omega = torch.zeros(case.omega_shape)
    exact_omega = omega.double()

    if contender == "weight_gradient":

        def run() -> Tensor:
            return case.plain(omega, data)

        assert_close(run(), case.plain(exact_omega, exact_data))
    else:
        op: Callable[..., Any] = getattr({"mas_fast": ops, "reference": reference}[contender], case.op)

        def run() -> Tensor:
            case.accumulate(op, omega, data)
            return omega

        for sample in samples_of(exact_data):
            exact_omega += case.plain(exact_omega, sample).abs()
        assert_close(run(), exact_omega)

    benchmark.group = f"{case.op} {case.shape}"
    benchmark.extra_info["implementation"] = implementation_of(case.op) if contender == "mas_fast" else "torch"
    benchmark(run)


def lstm_ahead(t: int, n: int, h: int) -> tuple[Tensors, dict[str, Any], tuple[str, ...]]:
    """Return what goes into all steps of an LSTM, what else it takes, and the names of what comes out."""
    data = {
        "gates": torch.randn(t, n, 4, h),
        "states": torch.randn(t + 1, n, h),
        "cells": torch.randn(t + 1, n, h),
        "to_c": torch.zeros(t, n, h),
        "kept": torch.zeros(t, n, h),
        "w_hh": torch.randn(4 * h, h) / h**0.5,
        "b_hh": torch.randn(4 * h),
    }
    options = {"unprojected": None, "w_hr": None, "sizes": []}
    return data, options, ("gates", "states", "cells", "to_c", "kept")


def lstm_back(t: int, n: int, h: int) -> tuple[Tensors, dict[str, Any], tuple[str, ...]]:
    """Return the same of the way back."""
    data = {
        "delta": torch.zeros(t, n, 4, h),
        "of_h": torch.randn(t + 1, n, h),
        "of_c": torch.randn(n, h),
        "w_hh": torch.randn(4 * h, h) / h**0.5,
        "to_gates": torch.randn(t, n, 4, h) / 4,
        "to_c": torch.rand(t, n, h),
        "kept": torch.rand(t, n, h),
    }
    return data, {"w_hr": None, "sizes": []}, ("delta", "of_h", "of_c")


@pytest.mark.parametrize("contender", ["mas_fast", "reference"])
@pytest.mark.parametrize("shape", [(64, 32, 128), (64, 4, 512)], ids=lambda shape: "T {} N {} H {}".format(*shape))
@pytest.mark.parametrize("draw", [lstm_ahead, lstm_back], ids=lambda draw: f"{draw.__name__}_")
def test_lstm(
    benchmark: BenchmarkFixture,
    draw: Callable[..., tuple[Tensors, dict[str, Any], tuple[str, ...]]],
    shape: tuple[int, int, int],
    contender: str,
) -> None:
    """Check one contender on all steps of an LSTM against float64, then time it; it always starts from the same."""
    torch.manual_seed(0)
    name = f"{draw.__name__}_"
    data, options, outputs = draw(*shape)
    op = getattr({"mas_fast": ops, "reference": reference_recurrent}[contender], name)

    def fresh() -> tuple[tuple[()], dict[str, Any]]:
        return (), {**{key: tensor.clone() for key, tensor in data.items()}, **options}

    _, given = fresh()
    op(**given)
    exact = to_float64(data)
    getattr(reference_recurrent, name)(**exact, **options)
    for key in outputs:
        assert_close(given[key], exact[key])

    benchmark.group = "{} T {} N {} H {}".format(name, *shape)
    benchmark.extra_info["implementation"] = implementation_of(name) if contender == "mas_fast" else "torch"
    benchmark.pedantic(op, setup=fresh, rounds=50)


@pytest.mark.parametrize("contender", ["mas_fast", "torch"])
@pytest.mark.parametrize(
    "shape", [(1024, 384, 1536), (1024, 1536, 384), (256, 784, 400)], ids=lambda shape: "R {} I {} O {}".format(*shape)
)
@pytest.mark.parametrize("layout", ["y", "gradient"])
def test_linear(benchmark: BenchmarkFixture, layout: str, shape: tuple[int, int, int], contender: str) -> None:
    """Check y = x Wᵀ + b, or the gradient δ W of x, against float64, then time it; torch's is whatever it runs here."""
    torch.manual_seed(0)
    rows, inputs, outputs = shape
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    bias = torch.randn(outputs) if layout == "y" else None
    weight = weight if layout == "y" else torch.randn(inputs, outputs).T
    output = torch.empty(rows, outputs)

    def run() -> Tensor:
        if contender == "torch":
            return torch.nn.functional.linear(x, weight, bias)
        ops.linear_(output, x, weight, bias)
        return output

    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_close(run(), exact)
    benchmark.group = "linear_ {}: R {} I {} O {}".format(layout, *shape)
    benchmark.extra_info["implementation"] = implementation_of("linear_") if contender == "mas_fast" else "torch"
    benchmark(run)


def implementation_of(op: str) -> str:
    """Return what runs an op on the CPU of this machine."""
    return next(row.implementation for row in ops.implementations() if row.op == op and row.device == "cpu")
