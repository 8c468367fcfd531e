"""Arcee Fusion: take over only the changes that matter."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from graftwork.merge.methods.registry import register
from graftwork.merge.passes import Apply, Group, RowTable, Select
from graftwork.merge.vocabulary import Value, row_value, where, wide


def importance(models: Sequence[Value], base: Value, index: Value, *, table: Any, columns: int) -> tuple[Value]:
    """Return the score: |d| times the divergence of the entry's row."""
    return (wide(abs(models[0] - base) * row_value(table, index, columns)),)


def taken(models: Sequence[Value], base: Value, index: Value, *, table: Any, columns: int, threshold: float) -> Value:
    """Return the model's value where it matters, else the base's."""
    return where(abs(models[0] - base) * row_value(table, index, columns) >= threshold, models[0], base)


@register(
    "arcee_fusion",
    title="Arcee Fusion",
    kind="rows",
    base="required",
    formula="x where |d|·KL(row) ≥ median + 1.5·(q₃ - q₁) of that score, else b",
    reference="https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-multi-gpu-acceleration",
    models=(1, 1),
)
def arcee_fusion(group: Group) -> Generator[Any, Any, Apply]:
    """Take a model's value only where it changed much in a row whose distribution changed much.

    Quantiles are exact; mergekit draws a random sample above a million entries.
    """
    from graftwork.merge.divergence import divergence

    size = group.size
    columns = group.shape[-1] if group.shape else 1
    table = yield RowTable(divergence)
    settings = {"table": table, "columns": columns}
    positions = [int(share * (size - 1)) for share in (0.25, 0.5, 0.75)]
    (cuts,) = yield Select(importance, (tuple(size - position for position in positions),), settings, wide=True)
    first, median, third = (cut.score for cut in cuts)
    return Apply(taken, {**settings, "threshold": median + 1.5 * (third - first)}, precision="float64")
