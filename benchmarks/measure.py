"""Error and time of the methods on one workload."""

from __future__ import annotations

import copy
import gc
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from benchmarks.cases import Workload
from benchmarks.methods import METHODS, UNIT, Omega, loop
from mas_fast import Importance

# A pass shorter than this is repeated within a round, so that one interruption or the clock does not decide it.
SHORTEST_TIMING_S = 0.1
# Two batches: what the first one establishes, the second one uses.
NUM_ERROR_BATCHES = 2
MOST_CHECKED = 1024  # samples, unless one batch has more
# In float32 against float64, where float32 decides branches: that moves Ω by less, and what is not exact by far more.
BRANCHES_TOLERANCE = 0.02
# Choices that took at most so many times as long as the fastest at warm-up are timed again, in so many rounds.
NEARLY_FASTEST = 3.0
CHOOSING_ROUNDS = 3
LONGEST_FAILURE = 200  # characters


@dataclass
class Contender:
    """A method on its way through one workload.

    Attributes:
        method: Its name.
        workload: What it is timed on.
        options: The keyword arguments that it runs with.
        error: Largest relative error; None if it computes no Ω.
        error_as_timed: The same of what is timed, where `error` is of a workload in float64; else None.
        fallbacks: Name -> reason, of the parameters that mas_fast puts through its loop.
        failure: Why it is not timed; None if it is.
        passes: Passes that one timing repeats.
    """

    method: str
    workload: Workload
    options: dict[str, int] = field(default_factory=dict)
    error: float | None = None
    error_as_timed: float | None = None
    fallbacks: dict[str, str] = field(default_factory=dict)
    failure: str | None = None
    passes: int = 1

    @property
    def samples_timed(self) -> int:
        """Samples in one pass."""
        return self.workload.batch_size * len(self.workload.batches)

    def time_pass_s(self) -> float:
        """Return the mean seconds of `passes` passes."""
        run = METHODS[self.method].run
        gc.collect()
        start = time.perf_counter()
        for _ in range(self.passes):
            run(self.workload, **self.options)
        return (time.perf_counter() - start) / self.passes

    def time_batch_ms(self, batch_size: int) -> float:
        """Return the milliseconds of `batch_size` samples."""
        return 1e3 * self.time_pass_s() / self.samples_timed * batch_size


def checked_part(workload: Workload) -> Workload:
    """Return the batches on which errors are measured: as large as those that are timed."""
    count = max(1, min(NUM_ERROR_BATCHES, MOST_CHECKED // workload.batch_size))
    return replace(workload, batches=workload.batches[:count])


def in_float64(workload: Workload) -> Workload:
    """Return the same workload in float64, with a model of its own."""
    batches = [batch.double() if batch.is_floating_point() else batch for batch in workload.batches]
    return replace(workload, model=copy.deepcopy(workload.model).double(), batches=batches)


def true_importance(workload: Workload) -> Mapping[str, Tensor]:
    """Return Ω of the checked part of the workload by the per-sample loop in float64."""
    return loop(in_float64(checked_part(workload)))


def max_relative_error(omega: Omega, truth: Mapping[str, Tensor]) -> float:
    """Return the largest ‖Ω − truth‖₂ / ‖truth‖₂ of any parameter.

    Infinity if one is missing, spare, of another shape or not finite.
    """
    if set(omega) != set(truth) or any(omega[name].shape != truth[name].shape for name in truth):
        return math.inf
    largest = 0.0
    for name, expected in truth.items():
        difference = (omega[name].double() - expected).norm().item()
        scale = expected.norm().item()
        error = difference / scale if scale > 0 else (0.0 if difference == 0 else math.inf)
        largest = max(largest, error if math.isfinite(error) else math.inf)
    return largest


def prepare(
    name: str, workload: Workload, truth: Mapping[str, Tensor], tolerance: float, slowest_s: float = math.inf
) -> Contender:
    """Check a method's error, warm it up and choose its options; what fails is noted and will not be timed.

    Args:
        name: Name of the method.
        workload: The whole workload.
        truth: Ω of its first `NUM_ERROR_BATCHES` batches.
        tolerance: Largest relative error of a method that is timed.
        slowest_s: Most seconds that a pass of a method that is timed may take.

    Returns:
        The contender, ready to be timed.
    """
    method = METHODS[name]
    contender = Contender(name, method.timed_workload(workload))
    choices = [options for options in method.options if options.get("chunk", 0) <= contender.workload.batch_size]
    choices = choices or list(method.options[:1])
    seconds: dict[int, float] = {}  # by place among the choices: one that fails leaves the others
    for place, options in enumerate(choices):
        contender.options = options
        try:
            part = checked_part(workload)
            omega = method.run(part, **options)
            if omega is not None and not workload.decided:
                contender.error_as_timed = max(contender.error_as_timed or 0.0, max_relative_error(omega, truth))
                omega = method.run(in_float64(part), **options)
            if omega is not None:
                contender.error = max(contender.error or 0.0, max_relative_error(omega, truth))
            if isinstance(omega, Importance):
                contender.fallbacks = {row.name: row.fallback for row in omega.coverage if row.fallback is not None}
            seconds[place] = contender.time_pass_s()
            if seconds[place] > slowest_s:
                contender.failure = f"slower than {slowest_s:.0f} s a pass"
                del seconds[place]
            elif len(choices) > 1:
                seconds[place] = contender.time_pass_s()  # of several, none is left out for what a first pass pays
        except Exception as failure:
            contender.failure = describe_failure(name, failure)
    if not seconds:
        return contender
    contender.failure = None
    contender.passes = max(1, math.ceil(SHORTEST_TIMING_S / min(seconds.values())))
    near = [choices[place] for place, own in seconds.items() if own <= NEARLY_FASTEST * min(seconds.values())]
    contender.options = near[0]
    if len(near) > 1:
        _choose(contender, near, unit_workload(contender, workload))
        if contender.failure is not None:
            return contender
    errors = ((contender.error, tolerance), (contender.error_as_timed, BRANCHES_TOLERANCE))
    for error, most in errors if method.is_exact else ():
        if error is not None and error > most:
            contender.failure = f"error {error:.1e} is above {most:.0e}"
    return contender


def unit_workload(contender: Contender, workload: Workload) -> Workload:
    """Return what the unit runs on beside a contender: the same samples, in whole batches."""
    count = -(-contender.samples_timed // workload.batch_size)
    return replace(workload, batches=workload.batches[:count])


def _choose(contender: Contender, choices: Sequence[dict[str, int]], beside: Workload) -> None:
    """Give a contender the options that are fastest as it will be timed: after the unit, and not only once.

    What the unit has freed, the next pass may have to ask the system for again: some chunks take half as long alone.

    Args:
        contender: Who has to choose; where every choice fails, that is its failure.
        choices: Its options.
        beside: What the unit runs on.
    """
    times: dict[int, list[float]] = {place: [] for place in range(len(choices))}
    for _ in range(CHOOSING_ROUNDS):
        for place in list(times):
            METHODS[UNIT].run(beside)
            contender.options = choices[place]
            try:
                times[place].append(contender.time_pass_s())
            except Exception as failure:
                contender.failure = describe_failure(contender.method, failure)
                del times[place]
    if times:
        contender.failure = None
        contender.options = choices[min(times, key=lambda place: statistics.median(times[place]))]


def describe_failure(method: str, failure: Exception) -> str:
    """Return an exception of a peer as one line, of which its row tells: peers fail in many ways.

    Raises:
        Exception: The failure itself, if the method is ours.
    """
    if METHODS[method].is_ours:
        raise failure
    lines = str(failure).splitlines()
    return f"{type(failure).__name__}: {lines[0] if lines else ''}"[:LONGEST_FAILURE]
