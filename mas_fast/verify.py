"""verify: is Ω of this model right? The pass against the plain per-sample loop, on one batch."""

from __future__ import annotations

import copy
import operator
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mas_fast.batch_norm import RightBatchNorm
from mas_fast.capture.session import uncompiled
from mas_fast.checks import DTYPES
from mas_fast.chunks import count_rows, rows_of
from mas_fast.errors import CaptureError, LoopWarning
from mas_fast.estimate import Objective, Parameters, capture, estimate_importance
from mas_fast.importance import Importance
from mas_fast.names import named_parameters
from mas_fast.reference import default_forward, magnitude, sample_gradients, sample_objective
from mas_fast.tables import format_table

# Largest relative error that counts as agreement, by dtype of the pass.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}

SINGLES, ONE_GRAPH = "batches of one sample", "one graph"

# Of the worst parameters, so many are printed.
_SHOWN = 5

Run = Callable[[nn.Module, Any], Any]


class Truth(NamedTuple):
    """What the loop says, how long it took, in which dtype it ran, and on which evidence."""

    omega: dict[str, Tensor]
    seconds: float
    dtype: torch.dtype
    evidence: str


@dataclass(frozen=True)
class VerifyRow:
    """How far Ω of one parameter is from the loop's.

    Attributes:
        name: The parameter.
        shape: Its shape.
        rule: What computed it in the pass, as in `Importance.coverage`.
        uses: How often one forward uses it.
        fallback: None, or the reason why the pass took the per-sample loop for it.
        error: ‖Ω − truth‖ / ‖truth‖. Where the truth is nothing but rounding, which is zero to the last digits of the
            largest, the difference is divided by the largest ‖truth‖ of all parameters instead.
    """

    name: str
    shape: tuple[int, ...]
    rule: str
    uses: int
    fallback: str | None
    error: float


@dataclass(frozen=True, repr=False)
class VerifyReport:
    """What `verify` found. Printed, a table of the worst parameters, the verdict, and both times.

    Attributes:
        rows: One row per parameter, in the model's order.
        pass_seconds: Time of the pass over this batch alone, which bears what a pass over many batches pays once.
        loop_seconds: Time of the loop over the same samples.
        num_samples: N.
        dtype: What the pass ran in.
        loop_dtype: What the loop ran in: float64, or `dtype` where the model does not run in float64.
        evidence: "batches of one sample" if the loop ran each sample in a batch of its own, so that nothing of the
            batch can enter; "one graph" if it differentiated every sample's objective on the whole batch's graph.
    """

    rows: tuple[VerifyRow, ...]
    pass_seconds: float
    loop_seconds: float
    num_samples: int
    dtype: torch.dtype
    loop_dtype: torch.dtype
    evidence: str

    @property
    def worst(self) -> VerifyRow:
        """The row with the largest error."""
        return max(self.rows, key=lambda row: row.error)

    @property
    def max_error(self) -> float:
        """The largest error."""
        return self.worst.error

    @property
    def tolerance(self) -> float:
        """The error that `passed` allows: 1e-9 in float64, 1e-4 in float32, 0.05 in bfloat16 and float16."""
        return TOLERANCES[self.dtype]

    @property
    def passed(self) -> bool:
        """Whether no error is above `tolerance`; for a bound of your own, compare `max_error`."""
        return self.max_error <= self.tolerance

    def raise_if_wrong(self, tolerance: float | None = None) -> None:
        """Raise unless every parameter's error is at most a tolerance.

        Args:
            tolerance: Relative error; by default `.tolerance`.

        Raises:
            AssertionError: One is above it; names the worst parameter, its rule and its error.
            ValueError: The tolerance is no number of at least 0.
        """
        allowed = self.tolerance if tolerance is None else tolerance
        if not allowed >= 0:
            raise ValueError(f"tolerance must be at least 0, got {tolerance}")
        wrong = sum(row.error > allowed for row in self.rows)
        if not wrong:
            return
        worst = self.worst
        raise AssertionError(
            f"Ω must agree with the loop to a relative error of {allowed:g}, got {worst.error:.3g} for {worst.name} "
            f"{list(worst.shape)} by rule {worst.rule!r}, and more than allowed for {wrong} of {len(self.rows)} "
            f"parameters; {self._advice}"
        )

    def __str__(self) -> str:
        rows = sorted(self.rows, key=lambda row: -row.error)
        table = [
            (row.name, list(row.shape), row.rule, row.uses, float(f"{row.error:.2g}"), row.fallback or "")
            for row in rows[:_SHOWN]
        ]
        lines = [format_table(("parameter", "shape", "rule", "uses", "error", "fallback"), table)]
        if len(rows) > _SHOWN:
            lines.append(f"and {len(rows) - _SHOWN} more, with errors up to {rows[_SHOWN].error:.2g}")
        ratio = self.loop_seconds / self.pass_seconds
        lines += [
            "",
            self._verdict,
            *([] if self.passed else [self._advice]),
            f"pass {self.pass_seconds:.3g} s, loop {self.loop_seconds:.3g} s, loop / pass {ratio:.3g}",
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<VerifyReport: {self._verdict}>"

    @property
    def _advice(self) -> str:
        # What else than a wrong rule may be the reason.
        others = ["no sample influences another"] if self.evidence == SINGLES else []
        if self.dtype == torch.float64 and self.max_error <= TOLERANCES[torch.float32]:
            others.append("no code in the model casts to float32")
        first = f"see that {' and that '.join(others)}, then " if others else ""
        return f"{first}report it with the model, or leave such parameters out with parameters="

    @property
    def _verdict(self) -> str:
        return (
            f"{'right' if self.passed else 'WRONG'}: largest error {self.max_error:.2g} for {self.worst.name}, allowed "
            f"{self.tolerance:g}; pass in {_word(self.dtype)}, loop in {_word(self.loop_dtype)} on {self.evidence}, "
            f"N = {self.num_samples}"
        )


def verify(
    model: nn.Module,
    batch: Any,
    *,
    forward: Run | None = None,
    objective: Objective = "l2_squared",
    statistic: str = "abs",
    parameters: Parameters = None,
    dtype: torch.dtype | None = None,
    max_samples: int | None = None,
    show: bool = True,
) -> VerifyReport:
    """Compare Ω of the pass with Ω of the plain per-sample loop on one batch, in float64.

    Both run on a copy of the model in eval mode; the model itself is left as it was found, also after an error. Where
    every tensor of the batch has the samples on its first axis, the loop runs each sample in a batch of its own, and
    shares nothing with the pass; otherwise it differentiates each sample's objective on the whole batch's graph.

    Args:
        model: Any module. Code in it that casts to float32 keeps doing so in the copy: the error is then that of
            float32, which may be above what float64 is allowed.
        batch: One batch, as for `estimate_importance`.
        forward: Callable (model, batch) -> output; it must use the model that it is given, which is a copy.
        objective: See `estimate_importance`, as for the next two.
        statistic: "abs" or "square".
        parameters: Names, or a predicate (name, parameter) -> bool.
        dtype: What the pass runs in; None is float64. With a dtype, both sides get θ and x rounded to it, the loop runs
            in float64 where the model does and else in dtype too, and a model that cannot be copied runs as it is.
        max_samples: Use only so many rows of a batch whose tensors all have the same first axis; any other is taken
            whole.
        show: Print the report.

    Returns:
        VerifyReport: with .passed, .max_error, .worst, .rows, both times, and .raise_if_wrong() for tests.

    Raises:
        ValueError: The model cannot be copied or run in float64, max_samples cuts what are no samples, or as
            `estimate_importance`.
        TypeError: The model is none, max_samples is no integer, or as `estimate_importance`.
        CaptureError: As `estimate_importance`.
        FloatingPointError: As `estimate_importance`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be None or one of {', '.join(map(str, DTYPES))}, got {dtype}")
    limit = _checked_limit(max_samples)
    # Refuses what the pass refuses, and leaves the model as found even where `forward` reaches it past its argument.
    with (
        capture(model, statistic=statistic, parameters=parameters) as session,
        torch.enable_grad(),
        uncompiled(),
        warnings.catch_warnings(),
    ):
        # The report says it.
        warnings.simplefilter("ignore", LoopWarning)
        if forward is None and isinstance(batch, Mapping):
            # Of a mapping that torch does not know, the tensors could be neither converted nor cut.
            batch = dict(batch)
        count = count_rows(batch)
        cut = limit is not None and count is not None and limit < count
        if cut:
            batch = rows_of(batch, 0, limit)
        chosen = dtype or torch.float64
        names = list(session.parameters)
        twin = _converted_model(session.model, chosen, or_itself=dtype is not None)
        batch = _converted_batch(batch, chosen)
        run_pass = partial(
            estimate_importance,
            twin,
            [batch],
            forward=forward,
            objective=objective,
            statistic=statistic,
            parameters=names,
            dtype=torch.promote_types(chosen, torch.float32),
        )
        with _blaming_conversion(session.model) if dtype is None else nullcontext():
            importance, pass_seconds = _timed(run_pass)
        if cut and importance.num_samples != limit:
            raise ValueError(
                f"max_samples must be None for a batch whose rows are not its samples, got {importance.num_samples} "
                f"samples in {limit} rows; cut the batch yourself"
            )
        run, square = forward or default_forward, statistic == "square"
        loop = partial(_differentiate, run=run, objective=objective, square=square, names=names)
        truth = _truth(twin, batch, chosen, importance.num_samples, loop)
    report = VerifyReport(
        rows=_compare(importance, truth),
        pass_seconds=pass_seconds,
        loop_seconds=truth.seconds,
        num_samples=importance.num_samples,
        dtype=chosen,
        loop_dtype=truth.dtype,
        evidence=truth.evidence,
    )
    if show:
        print(report)
    return report


def _truth(model: nn.Module, batch: Any, dtype: torch.dtype, samples: int, loop: Callable[..., Any]) -> Truth:
    """Run the loop, in the widest dtype and on the best evidence that the model allows.

    Args:
        model: The pass's.
        batch: The pass's.
        dtype: The pass's.
        samples: N, from the pass.
        loop: `_differentiate` for a model, batches, and how many samples each must have.
    """
    if dtype != torch.float64:
        # Not with hard-coded casts, on a device without float64, or of a model that cannot be copied.
        with suppress(RuntimeError, TypeError, ValueError):
            wide = _converted_model(model, torch.float64), _converted_batch(batch, torch.float64)
            return _truth(*wide, torch.float64, samples, loop)
    if count_rows(batch) == samples:
        singles = [rows_of(batch, n, n + 1) for n in range(samples)]
        # Not if the model cannot take a single sample, or has the samples elsewhere than in the rows.
        with suppress(RuntimeError, TypeError, ValueError, IndexError):
            return Truth(*_timed(lambda: loop(model, singles, each=1)), dtype, SINGLES)
    return Truth(*_timed(lambda: loop(model, [batch], each=samples)), dtype, ONE_GRAPH)


def _differentiate(
    model: nn.Module,
    batches: Sequence[Any],
    each: int,
    *,
    run: Run,
    objective: Objective,
    square: bool,
    names: Sequence[str],
) -> dict[str, Tensor]:
    """Return Ω by one backward per sample, as `reference.importance_loop`, whose copies would count in the time."""
    every = named_parameters(model)
    parameters = [every[name] for name in names]
    sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    with RightBatchNorm():
        for batch in batches:
            values = sample_objective(objective, run(model, batch))
            if len(values) != each:
                raise ValueError(f"batch must hold {each} samples, got {len(values)}")
            # A sample that goes past all parameters has no graph.
            for gradients in sample_gradients(values, parameters, model) if values.requires_grad else ():
                for total, gradient in zip(sums, gradients, strict=True):
                    if gradient is not None:
                        total += magnitude(gradient.to(total.dtype), square)
    return {name: total / (each * len(batches)) for name, total in zip(names, sums, strict=True)}


def _compare(importance: Importance, truth: Truth) -> tuple[VerifyRow, ...]:
    norms = {name: float(torch.linalg.vector_norm(omega)) for name, omega in truth.omega.items()}
    largest = max(norms.values())
    # As of the biases of attention's keys, which change nothing: their gradients are zero but for rounding.
    rounding = torch.finfo(truth.dtype).eps ** 0.75 * largest
    rows = []
    for row in importance.coverage:
        expected = truth.omega[row.name]
        difference = float(torch.linalg.vector_norm(importance[row.name] - expected))
        scale = norms[row.name] if norms[row.name] > rounding else largest
        error = difference / scale if scale else difference
        # NaN would compare as smaller than any error.
        error = error if error < float("inf") else float("inf")
        rows.append(VerifyRow(row.name, tuple(expected.shape), row.rule, row.uses, row.fallback, error))
    return tuple(rows)


def _converted_model(model: nn.Module, dtype: torch.dtype, *, or_itself: bool = False) -> nn.Module:
    """Return a copy in a dtype, or the model itself if that may be, it cannot be copied, and it has the dtype."""
    try:
        # Not .to(dtype), which would take complex buffers their imaginary part.
        return copy.deepcopy(model)._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)
    # Whatever hangs on a model has errors of its own for being copied.
    except Exception as error:
        own = _own_dtype(model)
        if or_itself and own == dtype:
            return model
        raise ValueError(
            f"model must be copyable to {_word(dtype)}, got {type(error).__name__}: {error}; "
            f"pass dtype={own} to verify it as it is"
        ) from error


@contextmanager
def _blaming_conversion(model: nn.Module) -> Iterator[None]:
    """Say of errors of torch that they may come of a copy in float64 of a model that is in another dtype."""
    try:
        yield
    except RuntimeError as error:
        own = _own_dtype(model)
        if isinstance(error, CaptureError) or own == torch.float64:
            raise
        raise ValueError(
            f"model must run in float64, got {type(error).__name__}: {error}; if that is for its dtype, pass "
            f"dtype={own} to verify it in the one that it has"
        ) from error


def _own_dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _converted_batch(batch: Any, dtype: torch.dtype) -> Any:
    def convert(tensor: Tensor) -> Tensor:
        wanted = dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(wanted, copy=True).requires_grad_(tensor.requires_grad)

    return tree_map_only(Tensor, convert, batch)


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    _wait()
    start = time.perf_counter()
    result = function()
    _wait()
    return result, time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _checked_limit(max_samples: int | None) -> int | None:
    if max_samples is None:
        return None
    if isinstance(max_samples, bool) or not hasattr(max_samples, "__index__"):
        raise TypeError(f"max_samples must be an int or None, got {max_samples!r}")
    limit = operator.index(max_samples)
    if limit < 1:
        raise ValueError(f"max_samples must be at least 1, got {limit}")
    return limit


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
