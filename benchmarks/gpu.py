"""Check and measure everything on one NVIDIA GPU: `python -m benchmarks.gpu --out DIR`, in under ten minutes.

First the tests of the GPU kernels, on the GPU, in several processes. Then speeds, every one beside its error: kernels
against cuBLAS and cuDNN doing the plain weight gradient of the same shapes, those that memory bounds against a copy of
the same bytes, the training step, whole passes against an ordinary backward, and the largest Llama shape that fits.
Results go to files row by row, so that an interrupted run leaves what it had; what there was no time for is named.
`--dry-run` rehearses the whole command on the CPU with tiny shapes, in Triton's interpreter: its times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
from torch import Tensor, nn

import mas_fast
from benchmarks.gpu_models import LARGE_LAYERS, SHAPES, build_large, draw_ids
from benchmarks.provenance import describe_implementations, describe_run
from benchmarks.run import Row, percentiles, write_rows
from mas_fast import MAS, Importance, objectives, reference
from mas_fast.kernels import ops
from mas_fast.reference import OBJECTIVES

ROOT = Path(__file__).resolve().parent.parent
TEST_PROCESSES = 8
BATCHES = 4  # of a whole pass
NARROW = torch.bfloat16
# Relative to float64, of kernels on data in a dtype; sums are in float32, products of float32 as of three TF32.
ERROR_BARS = {torch.bfloat16: 1e-5, torch.float16: 1e-5, torch.float32: 2e-5}


class Run:
    """One run of the command: where it measures, how long it may, and what it has found."""

    def __init__(self, out: Path, minutes: float, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.end = time.monotonic() + 60 * minutes
        self.name = "rehearsal" if dry else torch.cuda.get_device_name()
        slug = "".join(c if c.isalnum() else "-" for c in self.name.lower())
        self.path = out / f"gpu-{slug}.json"
        self.shared = {
            **describe_run(torch.get_num_threads()),
            "device": self.name,
            "implementations": describe_implementations("cuda"),
        }
        self.rows: list[Row] = []
        self.faults: list[str] = []

    def has_time(self, what: str, seconds: float) -> bool:
        """Return whether something can still be measured; that it could not is a row of its own."""
        if time.monotonic() + seconds < self.end:
            return True
        self.add(what, "not run", failure="out of time")
        return False

    def add(self, case: str, method: str, **columns: Any) -> None:
        """Keep a row, write all, and print it."""
        row = {"case": case, "method": method, "dtype": None, "num_batches": None, **columns, **self.shared}
        self.rows.append(row)
        write_rows(self.path, self.rows)
        if columns.get("failure") not in (None, "out of time"):
            self.faults.append(f"{case}, {method}: {columns['failure']}")
        # Of a rehearsal, times mean nothing.
        names = ["error"] if self.dry else ["ratio_p50", "time_ms_p50", "error", "peak_mib", "tokens_per_second"]
        shown = [f"{name} {columns[name]:.3g}" for name in names if columns.get(name) is not None]
        print(f"{case:44} {method:28} {'  '.join(shown)}  {columns.get('failure') or ''}", flush=True)

    def times_ms(self, calls: dict[str, Callable[[], Any]], rounds: int = 9) -> dict[str, list[float]]:
        """Return milliseconds of every call, in turn, each after one call that compiles."""
        rounds = 2 if self.dry else rounds
        repeats = {name: self._repeats(call) for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(self._time_ms(call, repeats[name]))
        return times

    def _repeats(self, call: Callable[[], Any]) -> int:
        call()
        return 1 if self.dry else max(1, min(50, math.ceil(20 / max(1e-3, self._time_ms(call, 1)))))

    def _time_ms(self, call: Callable[[], Any], repeats: int) -> float:
        if self.dry:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / repeats

    def compare(
        self,
        case: str,
        dtype: torch.dtype,
        calls: dict[str, Callable[[], Any]],
        errors: dict[str, tuple[float, float]],
        bars: dict[str, float],
        **columns: Any,
    ) -> None:
        """Time calls, of which the first is the unit, and keep a row for each; a wrong one gets no time."""
        unit = next(iter(calls))
        wrong = {
            name: f"error {error:.1e} is above {bar:.0e}" for name, (error, bar) in errors.items() if not error <= bar
        }
        times = self.times_ms({name: call for name, call in calls.items() if name not in wrong})
        for name in calls:
            own = times.get(name, [])
            ratios = [mine / units for mine, units in zip(own, times[unit], strict=False)]
            error, bar = errors.get(name, (None, None))
            self.add(
                case,
                name,
                dtype=str(dtype).removeprefix("torch."),
                unit=unit,
                error=error,
                error_bar=bar,
                ratio_bar=bars.get(name),
                failure=wrong.get(name),
                **percentiles("ratio", ratios),
                **percentiles("time_ms", own),
                **columns,
            )


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Return ‖actual − truth‖ / ‖truth‖."""
    return float((actual.double() - truth).norm() / truth.norm())


def run_tests(run: Run) -> None:
    """Run the tests of the GPU kernels in several processes: most of their time is compilation."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # The rehearsal shows that the command works; the interpreter's tests are the test suite's.
    tests = str(ROOT / "tests" / "test_gpu.py")
    chosen = ["-k", "ragged and linear and float32"] if run.dry else []
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, *chosen],
            env=environment | {"MAS_FAST_TEST_SHARD": f"{shard}/{TEST_PROCESSES}"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for shard in range(TEST_PROCESSES)
    ]
    for shard, process in enumerate(processes):
        try:
            output, _ = process.communicate(timeout=max(1, min(240, run.end - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            output += "\nkilled: out of time"
        summary = output.strip().splitlines()[-1] if output.strip() else "no output"
        # 5: no test is in this part.
        failure = None if process.returncode in (0, 5) else output[-2000:]
        run.add("tests of the GPU kernels", f"part {shard + 1} of {TEST_PROCESSES}", summary=summary, failure=failure)


def measure_linear(run: Run) -> None:
    """Measure Ω of a linear layer against the plain weight gradient by cuBLAS."""
    bars = {64: 1 / 0.60, 256: 1 / 0.75, 512: 1 / 0.85, 2048: 1 / 0.85}
    shapes = [(64, 1), (64, 16), (64, 64), (32, 256), (16, 512), (16, 2048)]
    if run.dry:
        shapes = [(2, 1), (2, 5)]
    size = 32 if run.dry else 4096
    for dtype in (NARROW, torch.float32):
        for samples, positions in shapes if dtype == NARROW or run.dry else shapes[1:5:2]:
            case = f"linear {size}x{size}, N = {samples}, T = {positions}"
            if not run.has_time(case, 15):
                continue
            torch.manual_seed(0)
            delta, x = (torch.randn(samples, positions, size, device=run.device, dtype=dtype) for _ in range(2))
            omega = torch.zeros(size, size, device=run.device)
            # The truth of some rows: all of them would take longer than everything else here.
            height = min(64, size)
            truth = torch.zeros(height, size, device=run.device, dtype=torch.float64)
            for d, h in zip(delta[..., :height].double(), x.double(), strict=True):
                truth += (d.T @ h).abs()
            ops.accumulate_linear_(omega, delta, x)
            error = relative_error(omega[:height], truth)
            calls = {"mas_fast": lambda o=omega, d=delta, h=x: ops.accumulate_linear_(o, d, h)}
            if not run.dry:
                calls["mas_fast, autotuned"] = partial(autotuned, calls["mas_fast"])
            flat_delta, flat_x = delta.view(-1, size), x.view(-1, size)
            run.compare(
                case,
                dtype,
                {
                    "cuBLAS, plain weight gradient": lambda d=flat_delta, h=flat_x: d.T @ h,
                    **calls,
                },
                dict.fromkeys(calls, (error, ERROR_BARS[dtype])),
                {"mas_fast": bars[positions]} if positions in bars and dtype == NARROW else {},
                flops=2.0 * samples * positions * size * size,
            )


def autotuned(call: Callable[[], None]) -> None:
    """Make a call with the tile that was measured to be the fastest."""
    os.environ["MAS_FAST_AUTOTUNE"] = "1"
    try:
        call()
    finally:
        del os.environ["MAS_FAST_AUTOTUNE"]


def measure_hopper(run: Run) -> None:
    """Test and measure the Gluon kernel in a process of its own: it is new, and could wait for ever."""
    what = "linear, Gluon"
    if run.dry or torch.cuda.get_device_capability() != (9, 0):
        return run.add(what, "not run", summary="needs sm_90; Triton's interpreter cannot run Gluon")
    if not run.has_time(what, 120):
        return None
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MAS_FAST_HOPPER": "1"}
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "hopper", "tests/test_gpu.py"]
    folder = run.path.parent / "gluon"
    measure = [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder), "--minutes", "1", "--only"]
    for command in (tests, [*measure, "measure_linear"]):
        try:
            done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=90)
        except subprocess.TimeoutExpired:
            return run.add(what, command[2], failure="did not end within 90 seconds")
        if done.returncode:
            return run.add(what, command[2], failure=(done.stdout + done.stderr)[-2000:])
    for row in json.loads((folder / run.path.name).read_text()):
        if row["method"] == "mas_fast":
            run.add(**{**row, "method": "mas_fast, Gluon"})
    return None


def weight_gradient(delta: Tensor, x: Tensor, weight: Tensor, geometry: Any) -> Tensor:
    """Return the gradient of a convolution's weight, summed over the batch as in training."""
    *sizes, groups = geometry
    mask = [False, True, False]
    return torch.ops.aten.convolution_backward(delta, x, weight, None, *sizes, False, [0, 0], groups, mask)[1]


def measure_convolutions(run: Run) -> None:
    """Measure Ω of convolutions against the plain weight gradient by cuDNN."""
    # N, channels in and out, size, kernel, stride, groups
    shapes = [
        (32, 64, 64, 56, 3, 1, 1),
        (32, 256, 256, 14, 3, 1, 1),
        (32, 3, 64, 224, 7, 2, 1),
        (32, 96, 96, 56, 7, 1, 96),
    ]
    if run.dry:
        shapes = [(2, 4, 8, 6, 3, 1, 1), (2, 4, 4, 6, 3, 1, 4)]
    for (n, inputs, outputs, size, kernel, stride, groups), last in itertools.product(shapes, (False, True)):
        case = f"conv {inputs}→{outputs}, {size}², {kernel}×{kernel}, stride {stride}{', channels_last' * last}"
        if not run.has_time(case, 15):
            continue
        torch.manual_seed(0)
        layout = torch.channels_last if last else torch.contiguous_format
        padding, out = kernel // 2, (size + 2 * (kernel // 2) - kernel) // stride + 1
        delta = torch.randn(n, outputs, out, out, device=run.device, dtype=NARROW).to(memory_format=layout)
        x = torch.randn(n, inputs, size, size, device=run.device, dtype=NARROW).to(memory_format=layout)
        omega = torch.zeros(outputs, inputs // groups, kernel, kernel, device=run.device)
        geometry = ([stride] * 2, [padding] * 2, [1, 1], groups)
        truth = omega.double()
        reference.accumulate_conv_(truth, delta[:2].double(), x[:2].double(), *geometry)
        ops.accumulate_conv_(omega, delta[:2], x[:2], *geometry)
        error = relative_error(omega, truth)
        weight = torch.randn_like(omega, dtype=NARROW)
        run.compare(
            case,
            NARROW,
            {
                "cuDNN, plain weight gradient": partial(weight_gradient, delta, x, weight, geometry),
                "mas_fast": lambda o=omega, d=delta, h=x, g=geometry: ops.accumulate_conv_(o, d, h, *g),
            },
            {"mas_fast": (error, ERROR_BARS[NARROW])},
            {},
        )


def copy_of(run: Run, count: float) -> Callable[[], Any]:
    """Return a copy that moves as many bytes: half of them read, half written."""
    source = torch.empty(max(1, int(count) // 2), dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def measure_reductions(run: Run) -> None:
    """Measure what memory bounds, embeddings, norms and biases, against a copy of the same bytes."""
    n, t, d, v = (2, 6, 8, 11) if run.dry else (16, 1024, 4096, 128_256)
    if run.has_time("embedding", 15):
        torch.manual_seed(0)
        delta, ids = torch.randn(n, t, d, device=run.device, dtype=NARROW), draw_ids(v, n, t).to(run.device)
        omega, truth = torch.zeros(v, d, device=run.device), torch.zeros(v, d, device=run.device, dtype=torch.float64)
        ops.accumulate_embedding_(omega, delta[:2], ids[:2])
        reference.accumulate_embedding_(truth, delta[:2].double(), ids[:2])
        moved = delta.nbytes + 8.0 * d * min(v, n * t)
        run.compare(
            f"embedding {v}x{d}, N = {n}, T = {t}",
            NARROW,
            {
                "copy of the same bytes": copy_of(run, moved),
                "mas_fast": lambda: ops.accumulate_embedding_(omega, delta, ids),
            },
            {"mas_fast": (relative_error(omega, truth), ERROR_BARS[NARROW])},
            {},
            bytes=moved,
        )
    if run.has_time("norm", 15):
        delta, x = (torch.randn(n, t, d, 1, device=run.device, dtype=NARROW) for _ in range(2))
        mean, rstd = (torch.randn(n, t, 1, 1, device=run.device).abs() for _ in range(2))
        weight, bias = (torch.zeros(d, device=run.device) for _ in range(2))
        truths = [torch.zeros(d, device=run.device, dtype=torch.float64) for _ in range(2)]
        ops.accumulate_affine_(weight, bias, delta[:2], x[:2], mean[:2], rstd[:2])
        wide = (s[:2].double() for s in (delta, x, mean, rstd))
        reference.accumulate_affine_(*truths, *wide)
        errors = max(relative_error(*pair) for pair in zip((weight, bias), truths, strict=True))
        run.compare(
            f"layer norm {d}, N = {n}, T = {t}",
            NARROW,
            {
                "copy of the same bytes": copy_of(run, delta.nbytes + x.nbytes),
                "mas_fast": lambda: ops.accumulate_affine_(weight, bias, delta, x, mean, rstd),
            },
            {"mas_fast": (errors, ERROR_BARS[NARROW])},
            {},
            bytes=float(delta.nbytes + x.nbytes),
        )


def measure_steps(run: Run) -> None:
    """Measure the training step on a few large and many small parameters."""
    sizes = {"5 large": [(33, 7)] * 2, "700 small": [(3, 5)] * 4}
    if not run.dry:
        sizes = {"5 large": [(8192, 8192)] * 5, "700 small": [(8, 768)] * 700}
    for name, shapes in sizes.items():
        if run.has_time(f"training step, {name}", 30):
            measure_step(run, name, shapes)
            collect()


def foreach_penalty(thetas: list[Tensor], anchors: list[Tensor], omegas: list[Tensor], grads: list[Tensor]) -> Tensor:
    """Add the penalty's gradient by torch's multi-tensor ops, λ = 1/2, and return its value."""
    differences = torch._foreach_sub(thetas, anchors)
    weighted = torch._foreach_mul(differences, omegas)
    torch._foreach_add_(grads, weighted)
    torch._foreach_mul_(weighted, differences)
    return 0.5 * torch.stack([w.sum() for w in weighted]).sum()


def usual_penalty(model: nn.ParameterList, anchors: list[Tensor], omegas: list[Tensor]) -> None:
    """Run the loop over parameters that everybody writes, and its backward."""
    rows = zip(model, omegas, anchors, strict=True)
    (0.5 * sum((o * (p - a) ** 2).sum() for p, o, a in rows)).backward()


def measure_step(run: Run, name: str, shapes: list[tuple[int, int]]) -> None:
    """Measure the penalty and AdamW with it."""
    torch.manual_seed(0)
    model = nn.ParameterList([nn.Parameter(torch.randn(shape, device=run.device)) for shape in shapes])
    anchors = [parameter.detach().clone() for parameter in model]
    omegas = [(torch.randn_like(a) * torch.randn_like(a)).abs() for a in anchors]
    importance = Importance({f"{i}": omega for i, omega in enumerate(omegas)}, 1)
    mas, small = MAS(model, 0.5), MAS(model, 0.5, omega_dtype=torch.uint8, anchor_dtype=torch.bfloat16)
    mas.consolidate(importance)
    small.consolidate(importance)
    with torch.no_grad():
        for parameter in model:
            parameter += 0.1 * torch.randn_like(parameter)
            parameter.grad = torch.zeros_like(parameter)
    mas.add_penalty_grad_()
    exact = [o.double() * (p.detach().double() - a) for o, p, a in zip(omegas, model, anchors, strict=True)]
    error = max(relative_error(p.grad, e) for p, e in zip(model, exact, strict=True))
    del exact
    lists = [p.detach() for p in model], anchors, omegas, [p.grad for p in model]
    moved = 20.0 * sum(p.numel() for p in model)
    calls: dict[str, Callable[[], Any]] = {
        "copy of the same bytes": copy_of(run, moved),
        "mas_fast": mas.add_penalty_grad_,
        "mas_fast, 8-bit Ω, bf16 θ*": small.add_penalty_grad_,
        "foreach": partial(foreach_penalty, *lists),
        "autograd": partial(usual_penalty, model, anchors, omegas),
    }
    if not run.dry and name == "5 large":
        calls["foreach, compiled"] = partial(torch.compile(foreach_penalty), *lists)
    bars = {"mas_fast": 1 / 0.85}
    run.compare(f"penalty, {name}", torch.float32, calls, {"mas_fast": (error, 1e-6)}, bars, bytes=moved)
    options = {"lr": 1e-6, "weight_decay": 0.01}
    optimizers = {
        "torch, fused, no penalty": torch.optim.AdamW(model, **options, fused=True),
        "mas_fast": mas_fast.optim.AdamW(model, **options, mas=mas),
        "mas_fast, 8-bit Ω, bf16 θ*": mas_fast.optim.AdamW(model, **options, mas=small),
    }
    run.compare(
        f"AdamW, {name}",
        torch.float32,
        {method: optimizer.step for method, optimizer in optimizers.items()},
        {},
        {"mas_fast": 1.6, "mas_fast, 8-bit Ω, bf16 θ*": 1.35},
    )


def collect() -> None:
    """Let memory go."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_mib(run: Run, call: Callable[[], Any]) -> float | None:
    """Return the most memory that a call needs beyond what was there."""
    if run.dry:
        call()
        return None
    collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure_models(run: Run) -> None:
    """Measure whole passes against an ordinary backward."""
    for name, shape in SHAPES.items():
        for dtype in (NARROW, torch.float32):
            case = f"{name}, {str(dtype).removeprefix('torch.')}"
            if not run.has_time(case, 45):
                continue
            torch.manual_seed(0)
            model = shape.build(run.dry).eval().to(run.device, dtype)
            batch = shape.batch(run.dry).to(run.device)
            batch = batch.to(dtype) if batch.is_floating_point() else batch
            norm = OBJECTIVES[shape.objective] if isinstance(shape.objective, str) else shape.objective

            def backward(model: nn.Module = model, batch: Tensor = batch, norm: Any = norm) -> None:
                for _ in range(BATCHES):
                    model.zero_grad(set_to_none=True)
                    norm(model(batch)).sum().backward()
                model.zero_grad(set_to_none=True)

            def estimate(
                model: nn.Module = model, batches: Sequence[Tensor] = (batch,) * BATCHES, shape: Any = shape
            ) -> Importance:
                return mas_fast.estimate_importance(model, batches, objective=shape.objective)

            def loop(model: nn.Module = model, batch: Tensor = batch, norm: Any = norm) -> None:
                # One sample, of as many: a loop over all takes that many times as long.
                parameters = list(model.parameters())
                torch.autograd.grad(norm(model(batch[:1])).sum(), parameters)

            # Of two samples, against the loop in the same dtype: bfloat16 is as far from the truth itself.
            error = error_of(model, batch[:2], shape.objective, norm)
            calls = {"batched backward": backward, "mas_fast": estimate, "loop, one sample": loop}
            peaks = {method: peak_mib(run, call) for method, call in list(calls.items())[:2]}
            run.compare(
                case,
                dtype,
                calls,
                {"mas_fast": (error, 5e-2 if dtype == NARROW else 2e-4)},
                {"mas_fast": 1.3},
                num_batches=BATCHES,
                samples=float(len(batch)),
                peak_mib=peaks["mas_fast"],
                unit_peak_mib=peaks["batched backward"],
                omega_mib=sum(p.numel() for p in model.parameters()) * 4 / 2**20,
            )
            del model, batch, backward, estimate, loop, calls
            collect()


def error_of(model: nn.Module, batch: Tensor, objective: Any, norm: Callable[[Tensor], Tensor]) -> float:
    """Return the error of Ω of a few samples against the loop over them, in the model's own dtype."""
    importance = mas_fast.estimate_importance(model, [batch], objective=objective)
    parameters = dict(model.named_parameters())
    totals = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    for sample in batch.split(1):
        gradients = torch.autograd.grad(norm(model(sample)).sum(), list(parameters.values()))
        for total, gradient in zip(totals.values(), gradients, strict=True):
            total += gradient.float().abs() / len(batch)
    difference = sum(float((importance[name] - total).double().square().sum()) for name, total in totals.items())
    return math.sqrt(difference / sum(float(total.double().square().sum()) for total in totals.values()))


def measure_largest(run: Run) -> None:
    """Measure the largest Llama shape whose Ω fits, in tokens a second."""
    positions = 6 if run.dry else 2048
    for layers in LARGE_LAYERS:
        if not run.has_time(f"Llama of {layers} layers of width 4096", 60):
            return
        collect()
        try:
            model = build_large(layers, run.dry, run.device).eval()
            ids = draw_ids(31 if run.dry else 128_256, 1, positions).to(run.device)

            def estimate(model: nn.Module = model, ids: Tensor = ids) -> Importance:
                return mas_fast.estimate_importance(model, [ids] * 2, objective=objectives.summed)

            (times,) = run.times_ms({"mas_fast": estimate}, rounds=1).values()
        except torch.OutOfMemoryError as error:
            run.add(f"Llama of {layers} layers of width 4096", "mas_fast", summary=f"does not fit: {error}"[:200])
            model = None
            continue
        count = sum(p.numel() for p in model.parameters())
        run.add(
            f"Llama of {count / 1e9:.1f} billion parameters",
            "mas_fast",
            dtype="bfloat16",
            tokens_per_second=2e3 * positions / times[0],
            peak_mib=peak_mib(run, estimate),
            parameters=float(count),
        )
        return


def sections() -> Iterator[Callable[[Run], None]]:
    """Return what is measured, in the order of what is wanted most."""
    yield from (run_tests, measure_linear, measure_hopper, measure_models, measure_steps, measure_convolutions)
    yield from (measure_reductions, measure_largest)


def main(argv: list[str] | None = None) -> int:
    """Measure everything; return 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file")
    parser.add_argument("--minutes", type=float, default=9.0, help="what is not begun by then is left out")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, in Triton's interpreter")
    parser.add_argument("--only", nargs="+", help="names of sections, such as measure_linear")
    arguments = parser.parse_args(argv)
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("there is no NVIDIA GPU that this torch can use; --dry-run rehearses without one")
    run = Run(arguments.out, arguments.minutes, arguments.dry_run)
    if run.dry:
        from mas_fast.kernels import gpu

        for name in gpu.__all__:
            setattr(torch.ops.mas_fast, name, getattr(gpu, name))
    for section in sections():
        if not arguments.only or section.__name__ in arguments.only:
            section(run)
    print(f"\n{run.name}: {len(run.rows)} rows in {run.path}")
    missed = [r for r in run.rows if r.get("ratio_bar") and r.get("ratio_p50") and r["ratio_p50"] > r["ratio_bar"]]
    for row in missed if not run.dry else []:
        print(f"over its bar: {row['case']}, {row['method']}: {row['ratio_p50']:.2f} > {row['ratio_bar']:.2f}")
    for fault in run.faults:
        print(f"WRONG: {fault}")
    return 1 if run.faults else 0


if __name__ == "__main__":
    sys.exit(main())
