"""Arcee Fusion: take over only the changes that matter."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from graftwork.merge.methods.registry import register
from graftwork.merge.passes import Apply, Group, RowTable, Select
from graftwork.merge.vocabulary import Value, row_value, where, wide

Array = np.ndarray[Any, np.dtype[np.float64]]

_FAR = 30.0
_SMALL = 1e-2


def divergence(models: Array, base: Array) -> Array:
    """Return KL(softmax(x) ‖ softmax(b)) of each row, both distributions P, Q raised by 1e-8.

    A number added to a whole row of x or b changes nothing: d loses its mean under Q first. Then u = log P/Q, and with
    ρ = (P - Q)/(Q + 1e-8) every term (Q + 1e-8)·((1 + ρ)·log(1 + ρ) - ρ) is non-negative: nothing cancels. Where some
    d is so large that its exponential might overflow, P - Q is not small and is simply subtracted.
    """
    centred = base - base.max(-1, keepdims=True)
    log_q = centred - np.log(np.exp(centred).sum(-1, keepdims=True))
    q = np.exp(log_q)
    delta = models[0] - base
    delta = delta - (q * delta).sum(-1, keepdims=True)
    far = np.abs(delta).max(-1, keepdims=True) > _FAR
    near = np.where(far, 0.0, delta) if far.any() else delta
    u = near - np.log1p((q * np.expm1(near)).sum(-1, keepdims=True))
    raised = q + 1e-8
    change = q * np.expm1(u)
    if far.any():
        log_p = log_q + delta
        p = np.exp(log_p - log_p.max(-1, keepdims=True))
        change = np.where(far, p / p.sum(-1, keepdims=True) - q, change)
    ratio = change / raised
    small = np.abs(ratio) < _SMALL
    inner = ratio if small.all() else np.where(small, ratio, 0.0)
    series = np.zeros_like(ratio)
    for power in range(10, 1, -1):  # (1 + ρ)·log(1 + ρ) - ρ = Σ (-ρ)ᵏ/(k·(k - 1)), k = 2, 3, …
        np.multiply(series, inner, out=series)
        np.subtract(1.0 / (power * (power - 1)), series, out=series)
    terms: Array = inner * inner * series
    if not small.all():
        outer = np.where(small, 0.0, ratio)
        terms = np.where(small, terms, (1 + outer) * np.log1p(outer) - outer)
    terms = raised * terms
    result: Array = np.maximum(terms.sum(-1), 0.0)
    return result


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
    size = group.size
    columns = group.shape[-1] if group.shape else 1
    table = yield RowTable(divergence)
    settings = {"table": table, "columns": columns}
    positions = [int(share * (size - 1)) for share in (0.25, 0.5, 0.75)]
    (cuts,) = yield Select(importance, (tuple(size - position for position in positions),), settings, wide=True)
    first, median, third = (cut.score for cut in cuts)
    return Apply(taken, {**settings, "threshold": median + 1.5 * (third - first)}, precision="float64")
