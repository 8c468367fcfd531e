"""What commands print: aligned tables, JSON, sizes. Plain text of any width, for people and for grep."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_UNITS = ("B", "KB", "MB", "GB", "TB", "PB")


def print_json(value: Any) -> None:
    """Print JSON; a number that JSON lacks (NaN, infinity) becomes a text."""
    print(json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value


def print_table(rows: Iterable[Sequence[object]], *, head: Sequence[str] = (), right: Iterable[int] = ()) -> None:
    """Print rows in aligned columns, two blanks apart, never cut.

    Args:
        rows: One sequence of cells per row.
        head: Names of the columns.
        right: Columns that are aligned to the right.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    if head:
        cells.insert(0, list(head))
    for line in aligned(cells, right):
        print(line)


def aligned(cells: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Return rows of cells as lines with aligned columns."""
    to_the_right = set(right)
    columns = max((len(row) for row in cells), default=0)
    widths = [max((len(row[column]) for row in cells if column < len(row)), default=0) for column in range(columns)]
    lines = []
    for row in cells:
        parts = [
            cell.rjust(widths[number]) if number in to_the_right else cell.ljust(widths[number])
            for number, cell in enumerate(row)
        ]
        lines.append("  ".join(parts).rstrip())
    return lines


def size(count: float) -> str:
    """Return a number of bytes in decimal units: 1.2 GB."""
    value = float(count)
    for unit in _UNITS:
        if value < 999.5 or unit == _UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float) -> str:
    """Return a time as a person says it: 3.2 s, 4 min 05 s, 1 h 20 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def plural(count: int, word: str) -> str:
    """Return `1 tensor`, `2 tensors`."""
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def is_terminal() -> bool:
    """Return whether stderr, where progress is shown, is a terminal."""
    return sys.stderr.isatty()
