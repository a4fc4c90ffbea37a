"""Every method in a process of its own, beside the unit, and all of them asked in turn.

What one method leaves behind in memory is then no other's cost, and what the machine does meanwhile meets all alike.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Workload, find_case
from benchmarks.measure import Contender, describe_failure, prepare, true_importance, unit_workload
from benchmarks.memory import MIB, OUT_OF_MEMORY, limit_memory, out_of_memory
from benchmarks.methods import METHODS, UNIT
from benchmarks.provenance import describe_implementations

TOLERANCES = {"float32": 1e-5, "float64": 1e-11}
# A pass that takes longer is not measured, and the row says so.
SLOWEST_S = 60.0


@dataclass(frozen=True)
class Setting:
    """What is measured, and how.

    Attributes:
        case: Name of the workload.
        num_batches: Batches of a pass.
        dtype: Name of the model's dtype.
        threads: Threads that torch uses.
        rounds: Timings of each method.
        limit_gib: What a process may take beyond model, data and the true Ω; None without a limit.
    """

    case: str
    num_batches: int
    dtype: str = "float32"
    threads: int = 2
    rounds: int = 15
    limit_gib: float | None = None

    def build(self, batches: list[Tensor] | None = None) -> Workload:
        """Build the workload, of given batches if they have been drawn."""
        return find_case(self.case).build(self.num_batches, getattr(torch, self.dtype), batches)

    @property
    def tolerance(self) -> float:
        """Largest error of an exact method."""
        return TOLERANCES[self.dtype if find_case(self.case).decided else "float64"]


@dataclass
class Lane:
    """A method, its process, and what came out of it.

    Attributes:
        columns: Of its row: what it was prepared to.
        times_ms: Milliseconds per batch, one entry a round.
        unit_times_ms: The same of the unit beside it.
    """

    process: ProcessPoolExecutor
    columns: dict[str, Any] = field(default_factory=dict)
    times_ms: list[float] = field(default_factory=list)
    unit_times_ms: list[float] = field(default_factory=list)


def measure_side_by_side(setting: Setting, methods: Sequence[str]) -> dict[str, Lane]:
    """Check, prepare and time methods on one workload; what fails has no times."""
    with ExitStack() as stack:
        truth = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "truth.pt"
        with fresh_process(setting.threads) as process:
            process.submit(_write_truth, setting, truth).result()
        lanes = {name: Lane(stack.enter_context(fresh_process(setting.threads))) for name in methods}
        for name, lane in lanes.items():
            with in_environment(METHODS[name].environment):
                lane.columns = _ask(lane, name, _prepare_here, setting, name, truth)
        order = random.Random(0)
        for _ in range(setting.rounds):
            timed = [name for name, lane in lanes.items() if lane.columns["failure"] is None]
            for name in order.sample(timed, len(timed)):
                lane = lanes[name]
                answer = _ask(lane, name, _time_here, order.random() < 0.5)
                if "failure" in answer:
                    lane.columns |= answer
                    lane.times_ms, lane.unit_times_ms = [], []
                else:
                    lane.times_ms.append(answer["own"])
                    lane.unit_times_ms.append(answer["unit"])
    return lanes


def _ask(lane: Lane, name: str, what: Any, *arguments: Any) -> dict[str, Any]:
    """Have a lane's process do something; a peer's process that the system ends is that peer's failure."""
    try:
        return lane.process.submit(what, *arguments).result()
    except BrokenProcessPool:
        if METHODS[name].is_ours:
            raise
        return {"failure": "its process was ended by the system"}


def _write_truth(setting: Setting, path: Path) -> None:
    workload = setting.build()
    torch.save((dict(true_importance(workload)), workload.batches), path)


# Of a lane's process: what it times, and the unit.
_OWN: list[Contender] = []


def _prepare_here(setting: Setting, name: str, truth_path: Path) -> dict[str, Any]:
    truth, batches = torch.load(truth_path)
    workload = setting.build(batches)
    if setting.limit_gib is not None:
        limit_memory(setting.limit_gib)
    contender = prepare(name, workload, truth, setting.tolerance, SLOWEST_S)
    unit = prepare(UNIT, unit_workload(contender, workload), truth, setting.tolerance)
    _OWN[:] = [contender, unit]
    parameters = sum(omega.numel() for omega in truth.values())
    failure = contender.failure
    if failure is not None and OUT_OF_MEMORY in failure:
        failure = out_of_memory(setting.limit_gib)
    return {
        "batch_size": workload.batch_size,
        "parameters": parameters,
        "omega_mib": parameters * getattr(torch, setting.dtype).itemsize / MIB,
        "options": contender.options,
        "samples_timed": contender.samples_timed,
        "error": contender.error,
        "error_as_timed": contender.error_as_timed,
        "fallbacks": contender.fallbacks,
        "implementations": describe_implementations("cpu"),
        "failure": failure,
    }


def _time_here(unit_first: bool) -> dict[str, Any]:
    contender, unit = _OWN
    batch_size = unit.workload.batch_size
    try:
        if contender.method == UNIT:
            own = beside = contender.time_batch_ms(batch_size)
        elif unit_first:
            beside, own = unit.time_batch_ms(batch_size), contender.time_batch_ms(batch_size)
        else:
            own, beside = contender.time_batch_ms(batch_size), unit.time_batch_ms(batch_size)
    except Exception as failure:
        return {"failure": describe_failure(contender.method, failure)}
    return {"own": own, "unit": beside}


@contextmanager
def in_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def fresh_process(threads: int) -> ProcessPoolExecutor:
    """Return an executor of one new process."""
    return ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (threads,))
