"""Ranks within rows, by a stable radix sort."""

from __future__ import annotations

from typing import Any

import numpy as np

from graftwork.merge.kernels import cached


@cached
def _radix_ranks(keys: Any, digits: int, ranks: Any) -> None:
    rows, length = keys.shape
    order = np.empty(length, np.int32)
    other = np.empty(length, np.int32)
    counts = np.empty((digits, 2049), np.int32)
    for row in range(rows):
        values = keys[row]
        counts[:] = 0
        for position in range(length):
            value = values[position]
            order[position] = position
            for digit in range(digits):
                counts[digit, ((value >> (11 * digit)) & 2047) + 1] += 1
        for digit in range(digits):
            count = counts[digit]
            if count.max() == length:  # every key has the same digit here
                continue
            for bin_ in range(2048):
                count[bin_ + 1] += count[bin_]
            shift = 11 * digit
            for position in range(length):
                element = order[position]
                bin_ = (values[element] >> shift) & 2047
                other[count[bin_]] = element
                count[bin_] += 1
            order, other = other, order
        for position in range(length):
            ranks[row, order[position]] = position


def row_ranks(magnitudes: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Return the rank of each non-negative value in its row, ascending from 0; among equals the lower index first."""
    keys = magnitudes.view(np.int32 if magnitudes.dtype == np.float32 else np.int64)
    ranks = np.empty(keys.shape, np.int32)
    _radix_ranks(keys, 3 if keys.dtype == np.int32 else 6, ranks)
    return ranks
