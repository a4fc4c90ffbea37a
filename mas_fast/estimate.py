"""estimate_importance: the pass over a data set, and `capture`, the same for people who own their loop."""

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset, IterableDataset

from mas_fast.batch_norm import RightBatchNorm
from mas_fast.capture.backward import not_finite
from mas_fast.capture.call import tensors_in
from mas_fast.capture.refuse import Refusing
from mas_fast.capture.session import MEMORY_BUDGET, Capture, uncompiled
from mas_fast.checks import DTYPES, one_of
from mas_fast.chunks import UNFIT, Chunks, ChunkSize, checked_chunk_size, count_rows, kind_of, tensors_of
from mas_fast.coverage import Coverage, merge_coverage
from mas_fast.distributed import Ranks, agree, reshard, uncoupled
from mas_fast.errors import CaptureError
from mas_fast.importance import Importance
from mas_fast.names import named_parameters, unwrapped
from mas_fast.reference import default_forward, sample_objective

Objective = str | Callable[[Any], Tensor]
Parameters = Iterable[str] | Callable[[str, nn.Parameter], bool] | None


def estimate_importance(
    model: nn.Module,
    data: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    objective: Objective = "l2_squared",
    statistic: str = "abs",
    scope: str = "global",
    per: str = "sample",
    parameters: Parameters = None,
    dtype: torch.dtype = torch.float32,
    unsupported: str = "loop",
    progress: bool = False,
    memory_budget: int = MEMORY_BUDGET,
    chunk_size: ChunkSize = "auto",
) -> Importance:
    """Compute Ω = (1/N) Σ_n |∂objective(F(x_n; θ))/∂θ|, exactly, in one pass over unlabelled data.

    The result does not depend on how the samples are batched. The model runs in eval mode and is left as it was found,
    also after an error: parameters, buffers, gradients, mode, random state, and caches of what it made of parameters.

    A model in DistributedDataParallel or under fully_shard gives the Ω of the samples of all its ranks. All must call
    this, each with its own batches, of which one rank may have more than another, or none. They wait for each other at
    the beginning and at the end only, where a failure of one fails all; the timeout of their process group must allow
    for the difference. Under fully_shard each rank holds the whole model and a whole Ω in float32 during the pass, and
    the result is sharded like the parameters.

    Args:
        model: Any module. Parameters that require no gradient get no Ω.
        data: Any iterable of batches; it is iterated once.
        forward: Callable (model, batch) -> output; the model is the one inside of wrappers. By default a tensor gives
            model(b), a tuple or list model(b[0]), a mapping model(**b) without its labels; the output is a tensor, or
            has .logits or .last_hidden_state.
        objective: "l2_squared" (the paper's ‖F‖²), "l2", "l1", or a callable output -> [N], one scalar per sample. The
            number of samples is read from its result. By name, the first axis of the output is the sample axis.
        statistic: "abs" for Ω of MAS; "square" for Σ g²/N, the exact diagonal empirical Fisher of the objective.
        scope: "global": of the model's output. "local" (l-MAS, without a backward through the model): of each layer's
            own output, ‖F_l(y)‖², where a layer ends at the next call with parameters; for ReLU layers 2·y_i·y_j. Skip
            connections are cut there, too. Layers must have the samples first, which those around nn.MultiheadAttention
            have not, and no call may hide where one begins: else a CaptureError says so.
        per: "sample", the paper's formula. "batch" takes |·| of the mean gradient of each batch, and the mean over
            batches, each of equal weight: what most public code computes. It is another quantity, smaller and dependent
            on the batches, and is here to be compared with; the name of the objective says so, and the two do not
            merge. The authors' batch mode and Avalanche's plugin take objective="l2_squared", FACIL "l2"; the last two
            leave the model in training mode, which this never does.
        parameters: Names, or a predicate (name, parameter) -> bool; by default all that require a gradient.
        dtype: Floating dtype of Ω. Sums are never narrower than float32.
        unsupported: What no rule is exact for takes one backward per sample ("loop", reported in `.coverage`), or
            is an error that lists it all ("raise").
        progress: Show a progress bar; in batches that take the loop, also which sample it is at.
        memory_budget: Bytes that the gradients of single samples may take, for parameters whose gradients must be
            summed over several uses, or pulled back through a function such as weight norm, before |·| is taken. One
            sample's are formed at least.
        chunk_size: Samples of a batch that run at a time; Ω is the same for all, time and memory are not. A number cuts
            every tensor of a batch along its first axis, which must be that of the samples; None runs whole batches.
            "auto" cuts large batches on the CPU, without a `forward` of your own, so that what the forward keeps fits
            the caches. After the first it joins small ones, of a list, tuple or DataLoader of 16 or more, as long as
            they and all that the forward makes of them take no more than 5 MiB, no sample takes a backward of its own,
            and the objective is given by name; a model that does not take more rows than its batches have gets these
            one by one again. It measures what a forward makes of one and of two samples of each kind of batch.

    Returns:
        Importance: name -> Ω, with .num_samples and .coverage.

    Raises:
        ValueError: Empty data, nothing trainable, an unknown name, an objective that is not one scalar per sample.
        TypeError: A batch or an output is of a kind that needs `forward`.
        CaptureError: No exact answer exists: samples influence each other, or the forward changes parameters. Or
            another rank failed, or measures other parameters.
        FloatingPointError: An output or gradient is not finite; names the batch, and the parameters.

    Source:
        Aljundi et al., Memory Aware Synapses: Learning what (not) to forget, ECCV 2018, Sec. 4.1.
    """
    run = forward or default_forward
    one_of("per", per, ("sample", "batch"))
    chunk_size = checked_chunk_size(chunk_size)
    if per == "batch":
        if isinstance(chunk_size, int):
            raise ValueError(
                f"chunk_size must be 'auto' or None where per='batch' takes whole batches, got {chunk_size}"
            )
        if scope != "global":
            raise ValueError(f"scope must be 'global' where per='batch', got {scope!r}")
        return _of_batches(model, data, run, objective, statistic, parameters, dtype, progress)
    with capture(
        model,
        statistic=statistic,
        scope=scope,
        parameters=parameters,
        dtype=dtype,
        unsupported=unsupported,
        memory_budget=memory_budget,
    ) as session:
        _check_data(data)
        name = _objective_name(objective)
        # An unknown name should not wait for the first batch.
        if isinstance(objective, str):
            sample_objective(objective, torch.zeros(1, 1))
        chunks = Chunks(session.model, chunk_size, is_default=forward is None)
        checked: set[Hashable] = set()
        # An objective of the user's own may know which batch it is called for.
        source = data if isinstance(objective, str) else None
        if progress and session.ranks.first:
            data = _with_progress(data, session)

        def add(batch: Any, joined: bool = False) -> None:
            batch = tree_map_only(Tensor, _normal, _known(batch) if forward is None else batch)
            parts, alone = chunks.cut(batch), None
            # What is joined has more rows, which a model may treat otherwise.
            kind = kind_of(batch), joined
            if forward is None and kind not in checked and not session.local:
                alone = _objectives_alone(session.model, parts[0], objective)
                if alone is not None:
                    checked.add(kind)
                elif chunks.is_auto:
                    parts = [batch]
            session.first_sample = 0
            for part in parts:
                session.batch_rows = count_rows(part)
                samples = session.batch_rows if len(parts) > 1 or joined else None
                objectives = partial(_objectives, session.model, part, run, objective, samples)
                if alone is None:
                    session.first_sample += session.accumulate(objectives)
                else:
                    seen: list[Tensor] = []
                    session.first_sample += session.accumulate(partial(_remembered, objectives, seen))
                    # Not during the forward, so that this batch runs the same program as all others.
                    _compare(seen[-1], *alone)
                    alone = None
                if session.local and kind not in checked:
                    _check_layers(session, part, run, objective)
                    checked.add(kind)

        for numbers, rows, batch in chunks.join(source, data):
            batches = [batch]
            if rows:
                done = session.num_samples
                try:
                    with _located(f"batches {numbers[0]} to {numbers[-1]}, joined"):
                        add(batch, joined=True)
                    batches = []
                except (*UNFIT, FloatingPointError):
                    if session.broken or session.num_samples > done:
                        raise
                    # Nothing was added: perhaps the model does not take so many rows, or one of the batches is bad.
                    chunks.joins = False
                    batches = list(batch.split(rows))
            del batch  # what was joined goes before the next is
            for number in numbers[: len(batches)]:
                with _located(f"batch {number}"):
                    add(batches.pop(0))
            chunks.joins &= not session.runs_alone
        return session.importance(objective=name, _final=True)


def _of_batches(
    model: nn.Module,
    data: Iterable[Any],
    run: Callable[[nn.Module, Any], Any],
    objective: Objective,
    statistic: str,
    parameters: Parameters,
    dtype: torch.dtype,
    progress: bool,
) -> Importance:
    """Return Ω = (1/B) Σ_b |∂ mean_n objective_bn/∂θ|: one ordinary backward for each of B batches."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _check_options(model, statistic, "global", dtype)
    _check_data(data)
    if Ranks.of(model).groups:
        raise ValueError("per='batch' must be of a model in one process, got one spread over ranks: pass model.module")
    selected = _select_parameters(model, parameters)
    inner = unwrapped(model)
    sums = {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in selected.items()
    }
    met: set[str] = set()
    samples = batches = 0
    if progress:
        data = _progress_bar(data)
    with _left_as_found(inner), torch.inference_mode(False), torch.enable_grad(), RightBatchNorm():
        for batch in data:
            values = _objectives(inner, tree_map_only(Tensor, _normal, batch), run, objective)
            gradients = torch.autograd.grad(values.mean(), list(selected.values()), allow_unused=True)
            for (name, total), gradient in zip(sums.items(), gradients, strict=True):
                if gradient is not None:
                    met.add(name)
                    total += gradient.to(total.dtype).square() if statistic == "square" else gradient.abs()
            samples, batches = samples + len(values), batches + 1
    if not batches:
        raise ValueError("data must hold at least one batch, got none; a one-shot iterator may be used up")
    bad = [name for name, total in sums.items() if not bool(total.isfinite().all())]
    if bad:
        raise FloatingPointError(not_finite(bad))
    return Importance(
        {name: (total / batches).to(dtype) for name, total in sums.items()},
        samples,
        coverage=[Coverage(name, "batch" if name in met else "unused", int(name in met)) for name in sums],
        objective=f"{_objective_name(objective)}, mean of each batch",
        statistic=statistic,
        _own=True,
    )


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Have the errors of this package say which batch they are of."""
    own = (ValueError, TypeError, CaptureError, FloatingPointError)
    try:
        yield
    except own as error:
        if type(error) not in own:
            raise
        raise type(error)(f"{where}: {error}") from error


def _objective_name(objective: Objective) -> str:
    return objective if isinstance(objective, str) else getattr(objective, "__qualname__", repr(objective))


def _check_data(data: Any) -> None:
    if isinstance(data, Tensor):
        raise TypeError("data must be an iterable of batches, got a tensor, whose rows are no batches; pass [data]")
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TypeError(
            f"data must be an iterable of batches, got {type(data).__name__}, which gives single samples; pass "
            "DataLoader(data, batch_size=64), or batch_size=None if its items are batches"
        )


class Session(Capture):
    """A running capture of a model: feed it batches with `accumulate`, read `importance()` at any time.

    Attributes:
        model: The model, in eval mode while the session runs; of a wrapped one, such as by `torch.compile` or
            DistributedDataParallel, the module inside.
        num_samples: N so far, of this rank.
        ranks: The processes that the samples are spread over.
    """

    def __init__(
        self, model: nn.Module, ranks: Ranks, scope: str, selected: Mapping[str, nn.Parameter], **options: Any
    ) -> None:
        parameters = named_parameters(model)
        owned = {name: parameters[name] for name in selected}
        super().__init__(owned, model=model, local=scope == "local", **options)
        self.model: nn.Module = model
        self.ranks = ranks
        self._scope = scope
        self._selected = selected

    def importance(self, objective: str = "custom", *, _final: bool = False) -> Importance:
        """Return Ω of the samples so far, of all ranks: the sums divided by their number. All ranks must call this.

        Args:
            objective: What to record as the objective's name.

        Raises:
            ValueError: No sample has been accumulated.
            CaptureError: An error ended the capture in the middle of a batch, no parameter ever took part, or another
                rank failed.
            FloatingPointError: A sum is not finite.
        """
        with self.ranks.reporting():
            self.check_whole()
            self.check_finite()
        took_part = bool(self.fallback) or any(self.uses.values())
        parts = self.ranks.gather((self.num_samples, took_part, self._coverage()))
        num_samples = sum(count for count, _, _ in parts)
        if num_samples == 0:
            raise ValueError(
                "data must hold at least one batch, got none; a one-shot iterator may be used up"
                if _final
                else "importance must be of at least one sample, got none; call accumulate first"
            )
        if not any(used for _, used, _ in parts):
            raise CaptureError(
                "objective must depend on the parameters, got none that took part in any forward; see that it does not "
                "run under torch.no_grad or on other parameters than those selected"
            )
        # Where no more batches come, Ω takes the memory of the sums.
        omega = {
            name: self.ranks.mean(total, num_samples, self._selected[name], reuse=_final).to(self.dtype)
            for name, total in self.sums.items()
        }
        # A rank may not have met what another has.
        rows = [row for _, _, rows in parts for row in rows if row.rule != "unused"]
        met = {row.name: row for row in merge_coverage((), rows)}
        return Importance(
            omega,
            num_samples,
            coverage=[met.get(row.name, row) for row in self._coverage()],
            objective=objective,
            statistic="square" if self.square else "abs",
            scope=self._scope,
            _own=True,
        )

    def _coverage(self) -> list[Coverage]:
        return [
            Coverage(
                name,
                "loop" if name in self.fallback else self.rules.get(name, "unused"),
                self.uses[name],
                self.fallback.get(name),
            )
            for name in self.sums
        ]


@contextmanager
def capture(
    model: nn.Module,
    *,
    statistic: str = "abs",
    scope: str = "global",
    parameters: Parameters = None,
    dtype: torch.dtype = torch.float32,
    unsupported: str = "loop",
    memory_budget: int = MEMORY_BUDGET,
) -> Iterator[Session]:
    """Run a model under capture, for people who own their loop.

    ```python
    with mas_fast.capture(model) as session:
        for batch in loader:
            session.accumulate(lambda: model(batch).square().sum(1))  # [N], one scalar per sample
    importance = session.importance()
    ```

    `accumulate` calls the function once, or again if a first run shows that a parameter has to be treated otherwise.
    On leaving, mode, buffers and random state of the model are as they were.

    A model in DistributedDataParallel or under fully_shard is treated as `estimate_importance` says: all ranks must
    enter and leave this, and all must call `importance()`. How often each calls `accumulate` is its own affair: until
    the end no forward and no backward communicates.

    Args:
        model: See `estimate_importance`, as for all other arguments.
        statistic: "abs" or "square".
        scope: "global" or "local"; "local" adds ‖·‖² of every layer's output to the objectives.
        parameters: Names, or a predicate (name, parameter) -> bool.
        dtype: Floating dtype of Ω.
        unsupported: "loop" or "raise".
        memory_budget: Bytes; see `estimate_importance`.

    Yields:
        Session: with .accumulate(objectives), .importance(), .num_samples.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    unsharded = reshard(model)
    ranks = Ranks.of(model)
    with ranks.reporting():
        _check_options(model, statistic, scope, dtype)
        selected = _select_parameters(model, parameters)
    agree(ranks, selected, statistic=statistic, dtype=dtype)
    inner = unwrapped(model)
    # What is made in inference mode can neither be summed into nor be saved for a backward.
    normal = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
    with ranks.reporting(), normal, uncoupled(model, unsharded), _left_as_found(inner):
        options = {"dtype": dtype, "unsupported": unsupported, "memory_budget": memory_budget}
        yield Session(inner, ranks, scope, selected, square=statistic == "square", **options)
        ranks.gather(None)


def _check_options(model: nn.Module, statistic: str, scope: str, dtype: torch.dtype) -> None:
    if statistic not in ("abs", "square"):
        raise ValueError(f"statistic must be 'abs' or 'square', got {statistic!r}")
    if scope not in ("global", "local"):
        raise ValueError(f"scope must be 'global' or 'local', got {scope!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TypeError(
            "model must run in Python, got TorchScript, whose calls cannot be seen; pass the original module"
        )


def _select_parameters(model: nn.Module, wanted: Parameters) -> dict[str, nn.Parameter]:
    every = named_parameters(model)
    if wanted is None:
        names = [name for name, p in every.items() if p.requires_grad]
        if not names:
            raise ValueError(
                "model must have a parameter that requires a gradient, got none; call requires_grad_(True)"
            )
    elif callable(wanted):
        names = [name for name, p in every.items() if wanted(name, p)]
        if not names:
            raise ValueError("parameters must select at least one parameter, got none")
    else:
        names = [wanted] if isinstance(wanted, str) else list(dict.fromkeys(wanted))
        unknown = [name for name in names if name not in every]
        if unknown or not names:
            raise ValueError(f"parameters must be names of the model's parameters, got {unknown or 'none'}")
    problems = []
    for name in names:
        p = every[name]
        if isinstance(p, nn.parameter.UninitializedParameter):
            problems.append(f"{name} is not initialised yet: run one batch through the lazy module first")
        elif p.is_meta:
            problems.append(f"{name} is on the meta device: materialise it first")
        elif p.is_inference():
            problems.append(f"{name} was made in inference mode: make the model outside of torch.inference_mode()")
        elif p.is_complex():
            problems.append(f"{name} is complex: |·| of its gradient is not defined here")
        elif not p.is_floating_point():
            problems.append(f"{name} is {p.dtype}, not floating-point")
        elif not p.requires_grad:
            problems.append(f"{name} does not require a gradient: call requires_grad_(True)")
    if problems:
        raise ValueError("parameters must be real, materialised and trainable, got:\n  - " + "\n  - ".join(problems))
    return {name: every[name] for name in names}


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    slots = {module: dict(module._buffers) for module in model.modules()}
    buffers = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    kept = {module: _kept(module) for module in model.modules()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            for module, attributes in kept.items():
                _put_back(module, attributes)
            with torch.no_grad():
                for module, own in slots.items():
                    module._buffers.clear()
                    module._buffers.update(own)
                for buffer, value in buffers.items():
                    if buffer.requires_grad and not buffer.is_leaf:
                        buffer.detach_()  # a forward wrote into it what depends on a parameter
                    # Not by version, which changes through .data do not raise.
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


# Of every module: parameters, buffers, hooks and the like.
_OF_MODULES = frozenset(vars(nn.Module()))


def _kept(module: nn.Module) -> dict[str, Any]:
    """Return a module's own attributes, and what is in those that are lists or dicts."""
    own = {key: value for key, value in vars(module).items() if key not in _OF_MODULES}
    return {key: copy.copy(value) if type(value) in (list, dict) else value for key, value in own.items()}


def _put_back(module: nn.Module, kept: Mapping[str, Any]) -> None:
    """Take from a module what a forward has kept of its graph, as in a cache: it is of no use, and cannot be copied."""
    for key, value in _kept(module).items():
        before = kept.get(key)
        known = {id(t) for t in tensors_in(before)}
        if not any(t.grad_fn is not None and id(t) not in known for t in tensors_in(value)):
            continue
        own = vars(module)
        if key not in kept:
            del own[key]
        elif type(value) is type(before) is dict:
            own[key].clear()
            own[key].update(before)
        elif type(value) is type(before) is list:
            own[key][:] = before
        else:
            own[key] = before


def _normal(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd can save: those made in inference mode cannot be."""
    return tensor.clone() if tensor.is_inference() else tensor


def _known(batch: Any) -> Any:
    """Return a batch whose tensors torch finds: of a mapping that it does not know, as of tokenizers, they are not."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def _objectives(
    model: nn.Module,
    batch: Any,
    run: Callable[[nn.Module, Any], Any],
    objective: Objective,
    samples: int | None = None,
) -> Tensor:
    """Run the model on a batch; refuse one that changes its batch, for it may have to be run again.

    Args:
        model: The model.
        batch: The batch.
        run: Calls the model.
        objective: Name or callable.
        samples: How many there must be; None if any number may.
    """
    tensors = tensors_of(batch)
    versions = [tensor._version for tensor in tensors]
    values = sample_objective(objective, run(model, batch))
    if versions != [tensor._version for tensor in tensors]:
        raise CaptureError(
            "forward must not change the batch in place, because it may run several times; "
            "pass forward=lambda model, batch: ... that works on a clone"
        )
    if samples not in (None, len(values)):
        raise ValueError(
            f"objective must have one scalar for each row of the batch, got {len(values)} for {samples} of its rows; "
            "pass chunk_size=None for a batch whose rows are not its samples"
        )
    return values


def _objectives_alone(model: nn.Module, batch: Any, objective: Objective) -> tuple[dict[int, Tensor], float] | None:
    """Return the objectives of the first and the last sample, each in a batch of its own, and the eps of the run.

    None if they cannot be had.

    Both, because what runs along the batch as if it were time, forwards or backwards, leaves one end alone.
    """
    tensors = tensors_of(batch)
    samples = tensors[0].shape[0] if tensors and tensors[0].dim() else 0
    if samples < 2 or any(t.dim() == 0 or t.shape[0] != samples for t in tensors):
        # Not evidently one row per sample.
        return None
    alone = {}
    # With gradients, as in the pass: a model may keep what it computes from its parameters for the next forward.
    with torch.enable_grad(), uncompiled(), Refusing(model) as run:
        for sample in (0, samples - 1):
            # Twice, if a model cannot take a single sample, or drops the axis of one.
            for rows in ([sample], [sample, sample]):
                values = _objectives_of_rows(model, batch, rows, objective)
                if values is not None and values.shape == (len(rows),):
                    alone[sample] = values[0].detach()
                    break
            else:
                # A model that takes neither cannot be asked.
                return None
    return alone, run.eps


def _objectives_of_rows(model: nn.Module, batch: Any, rows: list[int], objective: Objective) -> Tensor | None:
    try:
        # Of sparse tensors, too.
        part = tree_map_only(Tensor, lambda t: t.index_select(0, torch.tensor(rows, device=t.device)), batch)
        return sample_objective(objective, default_forward(model, part))
    except UNFIT as error:
        if isinstance(error, CaptureError):
            raise
        return None


def _remembered(objectives: Callable[[], Tensor], seen: list[Tensor]) -> Tensor:
    values = objectives()
    # Without the graph, which would outlive the run; unwatched, so that this batch runs the same program as all others.
    with torch._C.DisableTorchFunction():
        seen[:] = [values.detach()]
    return values


def _check_layers(session: Session, batch: Any, run: Callable[[nn.Module, Any], Any], objective: Objective) -> None:
    """Compare the sum of what all layers return for the first and the last sample with what they return for it alone.

    Where a layer has its samples on another axis than the first, nothing else would show it.

    Raises:
        CaptureError: They differ, or no sample can be run alone.
    """
    together = session.local_values
    if len(together) == 1:
        return
    tensors = tensors_of(batch)
    if any(t.dim() == 0 or t.shape[0] != len(together) for t in tensors) or not tensors:
        raise CaptureError(
            "batches must have one row for each sample in scope='local', which is checked on samples alone"
        )
    alone = {}
    with Refusing(session.model) as watched:
        for sample in (0, len(together) - 1):
            # Twice, for models that drop the axis of one.
            part = tree_map_only(Tensor, lambda t, sample=sample: t[[sample, sample]], batch)  # type: ignore[misc]
            alone[sample] = session.values_of(partial(_objectives, session.model, part, run, objective))[0]
    try:
        _compare(together, alone, watched.eps)
    except CaptureError as error:
        raise CaptureError(
            "layers must have the samples first in scope='local', and no two samples influence each other, got what "
            "differs for a sample alone, as with positions first or in nn.MultiheadAttention; use batches of one sample"
        ) from error


def _compare(together: Tensor, alone: Mapping[int, Tensor], eps: float) -> None:
    """Compare the objectives of a batch with those alone, where whoever mixes samples shows.

    Args:
        together: Objectives of the batch.
        alone: Sample -> its objective in a batch of its own.
        eps: Of the coarsest numbers that the model computes with, which may not be those that it returns.

    Raises:
        CaptureError: They differ.
    """
    if len(together) != max(alone) + 1:
        return
    for sample, value in alone.items():
        # Relative to the batch: an objective near zero is all rounding.
        scale = torch.maximum(together.abs().mean(), value.abs())
        if not bool((together[sample] - value).abs() <= max(eps, torch.finfo(together.dtype).eps) ** 0.5 * scale):
            raise CaptureError(
                f"samples must not influence each other, got objective {float(together[sample]):.6g} for sample "
                f"{sample} in its batch and {float(value):.6g} alone; find what mixes samples or is random in eval "
                "mode, or use batches of one sample"
            )


def _progress_bar(data: Iterable[Any]) -> Any:
    from tqdm.auto import tqdm

    return tqdm(data, desc="importance", unit="batch")


def _with_progress(data: Iterable[Any], session: Session) -> Iterable[Any]:
    bar = _progress_bar(data)
    session.tell_loop = lambda done, samples: bar.set_postfix_str(f"loop: sample {done} of {samples}")
    return bar
