"""Measure the training step: `python -m benchmarks.steps --out DIR`; README.md here says what a row means."""

from __future__ import annotations

import argparse
import gc
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mas_fast
from benchmarks.provenance import describe_run
from benchmarks.run import Row, percentiles, results_path, verdict, writable, write_rows
from benchmarks.side_by_side import fresh_process
from mas_fast import MAS, Importance

LAM = 0.5
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
SHORTEST_TIMING_S = 0.1
TOLERANCE = 1e-6  # of a float32 state; relative in norm against float64
TOLERANCE_NARROW = 5e-3  # what 8 bits for Ω and bfloat16 for θ* may cost

# Shapes of parameters: five matrices as of a large layer, and as many small ones as adapters of a deep model have.
CASES: dict[str, list[tuple[int, ...]]] = {
    "5 large": [(2048, 2048)] * 5,
    "700 small": [(8, 768)] * 700,
}
# Case -> processes that its rounds are shared out to. Where small tensors come to lie differs from one process to the
# next, and a step through them by up to 1.6 times, of each method by itself.
PROCESSES = {"5 large": 1, "700 small": 3}


class Problem(nn.Module):
    """Parameters with a gradient each, and the Ω and θ* that hold them."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], **state: Any) -> None:
        """Draw everything from one seed; `state` says how a MAS is to keep Ω and θ*."""
        super().__init__()
        torch.manual_seed(0)
        self.thetas = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])
        # Products of normal numbers: the heavy tail of real importances.
        self.omegas = [(torch.randn(shape) * torch.randn(shape)).abs() for shape in shapes]
        self.mas = MAS(self, LAM, **state)
        self.mas.consolidate(Importance({f"thetas.{i}": omega for i, omega in enumerate(self.omegas)}, 1))
        self.anchors = [theta.detach().clone() for theta in self.thetas]
        with torch.no_grad():
            for theta in self.thetas:
                theta += 0.1 * torch.randn(theta.shape)
                theta.grad = torch.randn(theta.shape)

    def true_gradient(self) -> list[Tensor]:
        """Return gradient + penalty's gradient in float64."""
        rows = zip(self.thetas, self.omegas, self.anchors, strict=True)
        return [t.grad.double() + 2 * LAM * o.double() * (t.detach().double() - a.double()) for t, o, a in rows]


# What is timed, and what tells after one call of it what it computed and what it should have; None if nothing can.
Prepared = tuple[Callable[[], Any], Callable[[], tuple[list[Tensor], list[Tensor]]] | None]


class Method(NamedTuple):
    """One way to do an operation.

    Attributes:
        prepare: Builds a problem of its own and returns what is timed and checked.
        bar: The most its time may be, in units of the operation's first method.
        tolerance: Of its error.
    """

    prepare: Callable[
        [list[tuple[int, ...]]], tuple[Callable[[], Any], Callable[[], tuple[list[Tensor], list[Tensor]]]]
    ]
    bar: float | None = None
    tolerance: float | None = TOLERANCE


def copy_of_bytes(shapes: list[tuple[int, ...]]) -> Prepared:
    """Copy as many bytes as the penalty moves: 20 an entry, half of them read and half written."""
    sources = [torch.randn(math.prod(shape) * 5 // 2) for shape in shapes]
    targets = [torch.empty_like(source) for source in sources]
    return lambda: torch._foreach_copy_(targets, sources), None


def checked_gradient(problem: Problem) -> Callable[[], tuple[list[Tensor], list[Tensor]]]:
    """Return a check of the gradients, for after one call."""
    truth = problem.true_gradient()
    return lambda: ([theta.grad for theta in problem.thetas], truth)


def usual_autograd(shapes: list[tuple[int, ...]]) -> Prepared:
    """Run the loop over parameters that everybody writes, and its backward."""
    problem = Problem(shapes)

    def run() -> Tensor:
        rows = zip(problem.thetas, problem.omegas, problem.anchors, strict=True)
        value = LAM * sum((omega * (theta - anchor) ** 2).sum() for theta, omega, anchor in rows)
        value.backward()
        return value

    return run, checked_gradient(problem)


def foreach(shapes: list[tuple[int, ...]], compiled: bool = False) -> Prepared:
    """Use torch's multi-tensor ops, for the gradient and the value."""
    problem = Problem(shapes)
    thetas = [theta.detach() for theta in problem.thetas]
    grads = [theta.grad for theta in problem.thetas]

    def run(thetas: list[Tensor], anchors: list[Tensor], omegas: list[Tensor], grads: list[Tensor]) -> Tensor:
        differences = torch._foreach_sub(thetas, anchors)
        weighted = torch._foreach_mul(differences, omegas)
        torch._foreach_add_(grads, weighted, alpha=2 * LAM)
        torch._foreach_mul_(weighted, differences)
        return LAM * torch.stack([w.sum() for w in weighted]).sum()

    call = torch.compile(run) if compiled else run
    return lambda: call(thetas, problem.anchors, problem.omegas, grads), checked_gradient(problem)


def fused_penalty(shapes: list[tuple[int, ...]], **state: Any) -> Prepared:
    """Call `MAS.add_penalty_grad_`."""
    problem = Problem(shapes, **state)
    return problem.mas.add_penalty_grad_, checked_gradient(problem)


def differentiable_penalty(shapes: list[tuple[int, ...]]) -> Prepared:
    """Call `MAS.penalty()` and its backward."""
    problem = Problem(shapes)
    return lambda: problem.mas.penalty().backward(), checked_gradient(problem)


def stepped_in_float64(problem: Problem) -> list[Tensor]:
    """Return θ after one step of torch's AdamW on loss + penalty."""
    thetas = [nn.Parameter(theta.detach().double()) for theta in problem.thetas]
    for theta, gradient in zip(thetas, problem.true_gradient(), strict=True):
        theta.grad = gradient
    torch.optim.AdamW(thetas, **ADAMW, foreach=False).step()
    return thetas


def plain_adamw(shapes: list[tuple[int, ...]]) -> Prepared:
    """Step torch's own fused AdamW, without a penalty."""
    return torch.optim.AdamW(Problem(shapes).thetas, **ADAMW, fused=True).step, None


def fused_adamw(shapes: list[tuple[int, ...]], **state: Any) -> Prepared:
    """Step `mas_fast.optim.AdamW`."""
    problem = Problem(shapes, **state)
    truth = stepped_in_float64(problem)
    optimizer = mas_fast.optim.AdamW(problem.thetas, **ADAMW, mas=problem.mas)
    return optimizer.step, lambda: ([theta.detach() for theta in problem.thetas], truth)


def separate_adamw(shapes: list[tuple[int, ...]]) -> Prepared:
    """Add the penalty's gradient by `MAS.add_penalty_grad_`, then step torch's fused AdamW."""
    problem = Problem(shapes)
    truth = stepped_in_float64(problem)
    optimizer = torch.optim.AdamW(problem.thetas, **ADAMW, fused=True)

    def run() -> None:
        problem.mas.add_penalty_grad_()
        optimizer.step()

    return run, lambda: ([theta.detach() for theta in problem.thetas], truth)


SMALL_STATE = {"omega_dtype": torch.uint8, "anchor_dtype": torch.bfloat16}

# operation -> method -> how; the first method is the unit.
OPERATIONS: dict[str, dict[str, Method]] = {
    "penalty": {
        "copy of the same bytes": Method(copy_of_bytes),
        "mas_fast": Method(fused_penalty, bar=1.3),
        "mas_fast, 8-bit Ω, bf16 θ*": Method(lambda s: fused_penalty(s, **SMALL_STATE), tolerance=TOLERANCE_NARROW),
        "mas_fast, penalty().backward()": Method(differentiable_penalty),
        "foreach": Method(foreach),
        "autograd": Method(usual_autograd),
        "foreach, compiled": Method(lambda s: foreach(s, compiled=True)),
    },
    "AdamW": {
        "torch, fused, no penalty": Method(plain_adamw),
        "mas_fast": Method(fused_adamw, bar=1.6),
        "mas_fast, 8-bit Ω, bf16 θ*": Method(
            lambda s: fused_adamw(s, **SMALL_STATE), bar=1.35, tolerance=TOLERANCE_NARROW
        ),
        "torch, fused, after add_penalty_grad_": Method(separate_adamw),
    },
}


def relative_error(actual: list[Tensor], truth: list[Tensor]) -> float:
    """Return ‖actual − truth‖ / ‖truth‖ over all tensors; infinity if it is no number."""
    difference = math.fsum(float((a.detach().double() - t).square().sum()) for a, t in zip(actual, truth, strict=True))
    error = math.sqrt(difference / math.fsum(float(t.double().square().sum()) for t in truth))
    return error if math.isfinite(error) else math.inf


class Timed(NamedTuple):
    """What one process found of a method.

    Attributes:
        error: Against float64; None if nothing can tell.
        times_ms: One entry a round.
    """

    error: float | None
    times_ms: list[float]


def measure(operation: str, case: str, methods: Sequence[str], rounds: int, threads: int) -> list[Row]:
    """Measure an operation on a case and return a row for each method; the unit is always measured.

    In new processes, as many as `PROCESSES` says, of at least one round each. Where others were measured before, their
    freed memory leaves gaps, and hundreds of small tensors that are allocated into them take longer to step, of
    whichever method. A training run allocates its own at its start.
    """
    every = OPERATIONS[operation]
    unit = next(iter(every))
    names = [name for name in every if name == unit or name in methods]
    count = min(PROCESSES[case], rounds)
    parts: list[dict[str, Timed]] = []
    for index in range(count):
        share = (index + 1) * rounds // count - index * rounds // count
        with fresh_process(threads) as fresh:
            parts.append(fresh.submit(time_methods, operation, case, names, share, index).result())
    shared = {"case": case, "device": "cpu", "dtype": "float32", "num_batches": 1, "operation": operation}
    shared |= {"entries": sum(math.prod(shape) for shape in CASES[case]), "unit": unit, "processes": count}
    times = {name: [ms for part in parts for ms in part[name].times_ms] for name in names}
    rows = []
    for name in names:
        errors = [part[name].error for part in parts if part[name].error is not None]
        error = max(errors, default=None)
        bar = None if error is None else every[name].tolerance
        failure = None if error is None or error <= bar else f"error {error:.1e} is above {bar:.0e}"
        own = [] if failure else times[name]
        ratios = [ms / unit_ms for ms, unit_ms in zip(own, times[unit], strict=False)]
        row = {"error": error, "error_bar": bar, "failure": failure, "ratio_bar": every[name].bar}
        row |= {**shared, "method": f"{operation}: {name}", "rounds": len(ratios)}
        row |= {**percentiles("time_ms", own), **percentiles("ratio", ratios)}
        rows.append(row)
    return rows


def time_methods(operation: str, case: str, names: Sequence[str], rounds: int, seed: int) -> dict[str, Timed]:
    """Check and time methods in this process, all of them in each round, in an order drawn anew."""
    every = OPERATIONS[operation]
    runs: dict[str, Callable[[], Any]] = {}
    timed: dict[str, Timed] = {}
    for name in names:
        runs[name], check = every[name].prepare(CASES[case])
        runs[name]()
        timed[name] = Timed(None if check is None else relative_error(*check()), [])
    # What is here now stays: to look through it, compiled code above all, would take a second before each timing.
    gc.freeze()
    repeats = {name: repeats_of(runs[name]) for name in names}
    order = random.Random(seed)
    for _ in range(rounds):
        for name in order.sample(list(names), len(names)):
            timed[name].times_ms.append(time_ms(runs[name], repeats[name]))
    gc.unfreeze()  # or libraries would report as leaks what is left when the process ends
    return timed


def repeats_of(run: Callable[[], Any]) -> int:
    """Return how often a timing repeats a call, so that one interruption or the clock does not decide it."""
    run()
    start = time.perf_counter()
    run()
    return max(1, math.ceil(SHORTEST_TIMING_S / (time.perf_counter() - start)))


def time_ms(run: Callable[[], Any], repeats: int) -> float:
    """Return the mean milliseconds of a call, after one that fills the caches, which collections of garbage empty."""
    gc.collect()
    run()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return 1e3 * (time.perf_counter() - start) / repeats


def print_table(rows: list[Row]) -> None:
    """Print one line per row."""
    for row in rows:
        ratio = "–" if row["ratio_p50"] is None else f"{row['ratio_p50']:.2f}"
        bar = f" ≤ {row['ratio_bar']} {verdict(row['ratio_p50'], row['ratio_bar'])}" if row["ratio_bar"] else ""
        spread = "" if row["ratio_p20"] is None else f"({row['ratio_p20']:.2f}–{row['ratio_p80']:.2f})"
        ms = "–" if row["time_ms_p50"] is None else f"{row['time_ms_p50']:.2f} ms"
        error = "–" if row["error"] is None else f"{row['error']:.0e}"
        print(f"{row['case']:10}  {row['method']:46}  {ms:>10}  {ratio:>6}{bar} {spread}  error {error}", end="")
        print(f"  {row['failure']}" if row["failure"] else "")


def main(argv: list[str] | None = None) -> int:
    """Measure, write, print; return 1 if an error is above its bar, or with --strict a time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--methods", nargs="+", help="all if left out")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a bar of time is missed, too")
    arguments = parser.parse_args(argv)
    if min(arguments.rounds, arguments.threads) < 1:
        parser.error("--rounds and --threads must be at least 1")
    run = describe_run(arguments.threads)
    path = writable(results_path(arguments.out, run, "steps"))
    rows: list[Row] = []
    for operation in arguments.operations:
        for case in arguments.cases:
            methods = arguments.methods or list(OPERATIONS[operation])
            measured = measure(operation, case, methods, arguments.rounds, arguments.threads)
            measured = [{**row, **run} for row in measured]
            rows += measured
            write_rows(path, measured)
    print_table(rows)
    missed = any(verdict(row["ratio_p50"], row["ratio_bar"]) == "MISS" for row in rows)
    return int(any(row["failure"] for row in rows) or (arguments.strict and missed))


if __name__ == "__main__":
    sys.exit(main())
