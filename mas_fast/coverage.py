"""Coverage: which rule computed the importance of each parameter, and why some went through the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from mas_fast.tables import format_table


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How the importance of one parameter was computed.

    Attributes:
        name: The parameter.
        rule: What computed it, such as "linear" or "loop".
        uses: How often one forward pass uses it.
        fallback: None, or the reason why it went through the per-sample loop.
    """

    name: str
    rule: str
    uses: int
    fallback: str | None = None


class CoverageTable(tuple[Coverage, ...]):
    """One `Coverage` row per parameter. Printed, an aligned table and a line that counts."""

    __slots__ = ()

    @property
    def summary(self) -> str:
        """How many parameters went by rule and how many through the loop, in one line."""
        looped = sum(row.fallback is not None for row in self)
        return f"{len(self)} parameters: {len(self) - looped} by rule, {looped} through the loop"

    def __str__(self) -> str:
        rows = [(row.name, row.rule, row.uses, row.fallback or "") for row in self]
        return f"{format_table(('parameter', 'rule', 'uses', 'fallback'), rows)}\n{self.summary}"

    def __repr__(self) -> str:
        return f"<CoverageTable of {self.summary}>"


def merge_coverage(first: Iterable[Coverage], second: Iterable[Coverage]) -> CoverageTable:
    """Return one row per parameter that says all that the rows of both say, each thing once."""
    rows = {row.name: row for row in first}
    for row in second:
        before = rows.get(row.name, row)
        rows[row.name] = Coverage(
            row.name,
            _join(before.rule, row.rule) or row.rule,
            max(before.uses, row.uses),
            _join(before.fallback, row.fallback),
        )
    return CoverageTable(rows.values())


def _join(first: str | None, second: str | None) -> str | None:
    # Each part once, so that a merge of many tasks stays readable.
    parts = [part for text in (first, second) if text for part in text.split("; ")]
    return "; ".join(dict.fromkeys(parts)) or None
