"""Aligned text tables, for everything that the package prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def format_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return header and rows as lines of aligned columns: numbers to the right, everything else to the left.

    Args:
        header: One title per column.
        rows: One sequence of cells per line; int cells are shown with thousands separators, float cells with 4 digits.
    """
    rows = [list(row) for row in rows]
    shown = [[_text(cell) for cell in row] for row in rows]
    lines = [""] * (len(rows) + 1)
    for column, title in enumerate(header):
        cells = [title, *(row[column] for row in shown)]
        width = max(len(cell) for cell in cells)
        is_number = bool(rows) and all(isinstance(row[column], (int, float)) for row in rows)
        cells = [cell.rjust(width) if is_number else cell.ljust(width) for cell in cells]
        lines = [f"{line}  {cell}" if column else cell for line, cell in zip(lines, cells, strict=True)]
    return "\n".join(line.rstrip() for line in lines)


def _text(cell: object) -> str:
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return str(cell)
