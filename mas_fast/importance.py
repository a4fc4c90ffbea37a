"""Importance: Ω by parameter name, with what it means and how it was computed; merged, moved, saved and loaded."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from mas_fast import storage
from mas_fast.checks import DTYPES, bullets, list_mismatches, list_unusable, one_of
from mas_fast.coverage import Coverage, CoverageTable, merge_coverage
from mas_fast.distributed import trained_parameters
from mas_fast.merge import check_merge, list_meaning_differences, merge_tensors
from mas_fast.names import named_parameters
from mas_fast.sharding import full, is_sharded, placed_like
from mas_fast.tables import format_table

KIND = "mas_fast.importance"
STATISTICS = ("abs", "square")
SCOPES = ("global", "local")


class Importance(Mapping[str, Tensor]):
    """Ω_ij = (1/N) Σ_k |g_ij(x_k)| by parameter name, for N samples: a mapping whose tensors are its own.

    Iteration and lookup are a dict's. The tensors are contiguous, finite and non-negative; they are not to be modified.
    Those of a model under fully_shard are DTensors, sharded like its parameters; whatever looks at their values, such
    as `summary`, `merge` and `save`, is then to be called on all ranks.

    Attributes:
        num_samples: N. After a merge, the samples that went into it in total.
        coverage: How each parameter's Ω was computed, one row each; empty for an importance built by hand.
        objective: What was differentiated: "l2_squared", "l2" or "l1" of the output, or a callable's qualified name.
        statistic: "abs" for the Ω of MAS, "square" for the exact diagonal empirical Fisher.
        scope: "global" for gradients of the model's output, "local" for those of each layer's own.
    """

    # A Mapping would compare by ==, which for tensors has no single truth value.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(
        self,
        mapping: Mapping[str, Tensor],
        num_samples: int,
        *,
        coverage: Iterable[Coverage] = (),
        objective: str | Callable[..., object] = "l2_squared",
        statistic: str = "abs",
        scope: str = "global",
        _own: bool = False,
    ) -> None:
        """Copy `mapping`; nothing of it is kept, unless the package itself gives its tensors away (`_own`).

        Args:
            mapping: Ω by parameter name, means over `num_samples`; float16, bfloat16, float32 or float64.
            num_samples: The number of samples N, at least 1.
            coverage: Rows of how each Ω was computed.
            objective: Its name, or the callable, of which the qualified name is recorded.
            statistic: "abs" or "square".
            scope: "global" or "local".

        Raises:
            TypeError: A name is no string, a value no tensor, or num_samples no integer.
            ValueError: A tensor is complex, integer, sparse, on the meta device, not finite or negative (all such are
                listed), there is none at all, or another argument is none of its values.
        """
        _check_tensors(mapping)
        self._tensors = {
            name: tensor.detach() if _own else tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in mapping.items()
        }
        self.num_samples = _checked_count(num_samples)
        self.objective = objective_name(objective)
        self.statistic = one_of("statistic", statistic, STATISTICS)
        self.scope = one_of("scope", scope, SCOPES)
        self.coverage = CoverageTable(coverage)
        unknown = [row.name for row in self.coverage if row.name not in self._tensors]
        if unknown:
            raise ValueError(f"coverage must have rows of parameters in mapping, got {unknown}")

    @property
    def meaning(self) -> dict[str, str]:
        """What the numbers are: objective, statistic and scope. Only importances of the same meaning can be merged."""
        return {"objective": self.objective, "statistic": self.statistic, "scope": self.scope}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        entries = sum(tensor.numel() for tensor in self.values())
        # One rank alone may print, so that nothing may be gathered here.
        ranks = {tensor.device_mesh.size() for tensor in self.values() if is_sharded(tensor)}
        total = f"{math.fsum(_total(tensor) for tensor in self.values()):.4g}" if not ranks else "sharded"
        dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in self.values()}))
        return (
            f"<Importance of {len(self)} tensors, {entries:,} entries ({dtypes}), num_samples={self.num_samples:,}, "
            f"total={total}, statistic={self.statistic!r}, "
            f"objective={self.objective!r}, scope={self.scope!r}>"
        )

    def summary(self) -> str:
        """Return a table of each parameter's shape, mean and largest Ω, and the percentage of entries that are zero."""
        rows = []
        for name, own in self.items():
            tensor = full(own)
            # A parameter without entries has neither mean nor maximum.
            size = max(tensor.numel(), 1)
            largest = float(tensor.max()) if tensor.numel() else 0.0
            zeros = 100.0 * (tensor.numel() - int(tensor.count_nonzero())) / size
            rows.append((name, list(tensor.shape), _total(tensor) / size, largest, zeros))
        return format_table(("parameter", "shape", "mean", "max", "zeros_%"), rows)

    def merge(self, other: Importance, how: str = "sum", *, alpha: float = 0.5) -> Importance:
        """Return a new importance of both, where Ω1 over N1 samples is this one and Ω2 over N2 samples is `other`.

        The arithmetic is in float32 or wider, the result in the wider of the two dtypes, placed like this one.
        Its num_samples is N1 + N2, the samples seen in total, whatever `how` is.

        Args:
            other: The later importance: same names, shapes, objective, statistic and scope.
            how: "sum": Ω1 + Ω2, the paper's way to go through tasks.
                "mean": (N1·Ω1 + N2·Ω2) / (N1 + N2), what one pass over the samples of both gives.
                "ema": (1 − alpha)·Ω1 + alpha·Ω2, a moving average; the larger alpha, the sooner the past fades.
                "max": the larger of the two, entry by entry.
            alpha: The weight of `other` in "ema", from 0 to 1.

        Raises:
            TypeError: `other` is no Importance.
            ValueError: The two do not fit (every difference is listed), `how` or `alpha` is none of its values, or the
                result overflows its dtype.
        """
        if not isinstance(other, Importance):
            raise TypeError(
                f"other must be an Importance, got {type(other).__name__}: build one with Importance(mapping, N)"
            )
        check_merge(how, alpha)
        problems = list_meaning_differences(self.meaning, other.meaning)
        problems += list_mismatches(self, other, where="other")
        problems += [f"{name!r} of other is missing from this importance" for name in other if name not in self]
        if problems:
            raise ValueError(f"other must fit this importance, got differences:{bullets(problems)}")
        counts = (self.num_samples, other.num_samples)
        merged = {name: merge_tensors(self[name], other[name], counts, how, alpha=alpha) for name in self}
        result = self._with_tensors(merged, f"merge(how={how!r})")
        result.num_samples = sum(counts)
        result.coverage = merge_coverage(self.coverage, other.coverage)
        return result

    def to(
        self, device: torch.device | str | int | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> Importance:
        """Return a copy on another device, in another dtype, or both; a dtype may come first, as in `Tensor.to`.

        Raises:
            ValueError: A value overflows `dtype`, or `dtype` is not one that an importance can have.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
        moved = {name: tensor.to(device=device, dtype=dtype, copy=True) for name, tensor in self.items()}
        return self._with_tensors(moved, f"to({dtype})")

    def to_sharding(self, model: nn.Module) -> Importance:
        """Return a copy placed like a model's parameters of the same names: on their devices, and sharded as they are.

        So a file that was loaded comes back to a model under fully_shard; with a plain model, DTensors become whole.

        Raises:
            ValueError: A tensor has no parameter in the model, or one of another shape; all are listed.
        """
        parameters = trained_parameters(model)
        problems = list_mismatches(self, parameters, where="the model")
        if problems:
            raise ValueError(f"importance must fit the model, got mismatches:{bullets(problems)}")
        placed = {name: placed_like(tensor, parameters[name]).clone() for name, tensor in self.items()}
        return self._with_tensors(placed, "to_sharding")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to `path` as safetensors, atomically: an interrupted save leaves the old file as it was.

        The header records objective, statistic, scope, num_samples, coverage, the versions of mas_fast and torch, and
        the date. Sharded tensors are gathered one after the other to the first rank, which writes them whole: all ranks
        must call this.

        Raises:
            FileNotFoundError: The folder of `path` does not exist.
        """
        header = self.meaning | {
            "num_samples": str(self.num_samples),
            "coverage": json.dumps([dataclasses.astuple(row) for row in self.coverage]),
        }
        storage.write(path, KIND, self, header)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, expected: Mapping[str, Tensor] | nn.Module | None = None
    ) -> Importance:
        """Read what `save` wrote, to the CPU, as plain tensors: `to_sharding` brings them to where a model has its own.

        Args:
            path: The file.
            expected: What the file must fit in names and shapes. A mapping must have the same names; of a module, every
                tensor of the file must be a parameter, while parameters that the file lacks are free.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is truncated, is no importance, or does not fit `expected` (every mismatch is listed).
        """
        tensors, header = storage.read(path, KIND)
        if expected is not None:
            problems = _list_unexpected(tensors, expected)
            if problems:
                raise ValueError(f"{os.fspath(path)!r} must fit what is expected, got mismatches:{bullets(problems)}")
        entries = {
            key: storage.header_entry(header, key, path)
            for key in ("num_samples", "coverage", "objective", "statistic", "scope")
        }
        try:
            count = int(entries.pop("num_samples"))
            coverage = [Coverage(*row) for row in json.loads(entries.pop("coverage"))]
            return cls(
                tensors,
                count,
                coverage=coverage,
                objective=entries["objective"],
                statistic=entries["statistic"],
                scope=entries["scope"],
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)!r} must hold a valid importance, got: {error}") from error

    def _with_tensors(self, tensors: dict[str, Tensor], action: str) -> Importance:
        # The tensors are new already: the constructor's copy would double the memory for nothing.
        problems = list_unusable(tensors, non_negative=True)
        if problems:
            raise ValueError(f"{action} must stay finite, got an overflow: use a wider dtype{bullets(problems)}")
        result = copy.copy(self)
        result._tensors = tensors
        return result


def objective_name(objective: str | Callable[..., object]) -> str:
    """Return the name under which an objective is recorded: a callable's is `module.qualified_name`.

    Raises:
        TypeError: It is neither a string nor callable.
    """
    if isinstance(objective, str):
        return objective
    if not callable(objective):
        raise TypeError(f"objective must be a name or a callable, got {type(objective).__name__}")
    # A partial or another callable object has no name of its own; its type's is recorded.
    named = objective if hasattr(objective, "__qualname__") else type(objective)
    return f"{named.__module__}.{named.__qualname__}"


def _check_tensors(mapping: Mapping[str, Tensor]) -> None:
    if not isinstance(mapping, Mapping):
        raise TypeError(f"mapping must be a mapping of names to tensors, got {type(mapping).__name__}")
    if not mapping:
        raise ValueError("mapping must have at least one tensor, got none")
    for name, tensor in mapping.items():
        if not isinstance(name, str):
            raise TypeError(f"mapping must have names of type str, got {name!r}")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"mapping must have tensors as values, got {type(tensor).__name__} for {name!r}")
    problems = list_unusable(mapping, non_negative=True)
    if problems:
        raise ValueError(f"mapping must have dense real tensors, finite and non-negative, got:{bullets(problems)}")


def _checked_count(num_samples: int) -> int:
    if isinstance(num_samples, bool):
        raise TypeError(f"num_samples must be an int, got {num_samples}")
    try:
        count = operator.index(num_samples)
    except TypeError:
        raise TypeError(f"num_samples must be an int, got {num_samples!r}") from None
    if count < 1:
        raise ValueError(f"num_samples must be at least 1, got {count}")
    return count


def _total(tensor: Tensor) -> float:
    return float(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)))


def _list_unexpected(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor] | nn.Module) -> list[str]:
    if isinstance(expected, nn.Module):
        return list_mismatches(tensors, named_parameters(expected), where="the model")
    problems = list_mismatches(tensors, expected, where="expected")
    return problems + [f"{name!r} is expected and missing from the file" for name in expected if name not in tensors]
