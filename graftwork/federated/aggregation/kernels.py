"""The sum of replies, compiled: one pass where numpy needs three."""

from __future__ import annotations

from typing import Any

from graftwork.merge.kernels import cached


@cached
def add_scaled(place: Any, values: Any, share: float, product: Any) -> None:
    """Add `share` times some values to float64 sums, rounding as numpy does: product and sum each for itself."""
    for index in range(values.size):
        place[index] += share * values[index]
