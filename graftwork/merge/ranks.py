"""Ranks within rows, by a stable radix sort."""

from __future__ import annotations

from typing import Any

import numpy as np

from graftwork.merge.kernels import cached


@cached
def _radix_ranks(keys: Any, bits: int, digits: int, ranks: Any) -> None:
    rows, length = keys.shape
    order = np.empty(length, np.int32)
    other = np.empty(length, np.int32)
    size = 1 << bits
    mask = size - 1
    counts = np.empty((digits, size + 1), np.int32)
    for row in range(rows):
        values = keys[row]
        counts[:] = 0
        for position in range(length):
            value = values[position]
            order[position] = position
            for digit in range(digits):
                counts[digit, ((value >> (bits * digit)) & mask) + 1] += 1
        for digit in range(digits):
            count = counts[digit]
            if count.max() == length:  # every key has the same digit here
                continue
            for bin_ in range(size):
                count[bin_ + 1] += count[bin_]
            shift = bits * digit
            for position in range(length):
                element = order[position]
                bin_ = (values[element] >> shift) & mask
                other[count[bin_]] = element
                count[bin_] += 1
            order, other = other, order
        for position in range(length):
            ranks[row, order[position]] = position


def row_ranks(magnitudes: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Return the rank of each non-negative value in its row, ascending from 0; among equals the lower index first."""
    keys = magnitudes.view(np.int32 if magnitudes.dtype == np.float32 else np.int64)
    ranks = np.empty(keys.shape, np.int32)
    bits = 11 if keys.shape[-1] > 4096 else 8  # counting 2,048 digits costs more than a short row's further pass
    _radix_ranks(keys, bits, -(-(8 * keys.itemsize - 1) // bits), ranks)
    return ranks
