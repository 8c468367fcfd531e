"""Ranks within rows: by sorting words that hold value and place, or by a stable radix sort of wider values."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from graftwork.merge.kernels import _bits_of_float32, cached

Array = np.ndarray[Any, np.dtype[Any]]


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


@cached
def _pack(left: Any, right: Any, keys: Any) -> None:
    """Write |left - right| and the place in the row into one word each, so that sorting words sorts by both."""
    rows, length = left.shape
    for row in range(rows):
        for position in range(length):
            size = abs(left[row, position] - right[row, position])
            keys[row, position] = (types.uint64(_bits_of_float32(size)) << types.uint64(32)) | types.uint64(position)


@cached
def _spread(keys: Any, table: Any, values: Any) -> None:
    rows, length = keys.shape
    for row in range(rows):
        for position in range(length):
            values[row, keys[row, position] & types.uint64(0xFFFFFFFF)] = table[position]


@cached
def _looked_up(ranks: Any, table: Any, values: Any) -> None:
    rows, length = ranks.shape
    for row in range(rows):
        for position in range(length):
            values[row, position] = table[ranks[row, position]]


def by_rank(left: Array, right: Array, table: Array) -> Array:
    """Return `table[r]` for each entry, r the rank of |left - right| in its row.

    Ranks ascend from 0; among equals the lower index comes first. What both arrays hold is finite.

    Args:
        left: Values (rows, length), float32 or float64.
        right: Values of the same shape and dtype.
        table: One entry per rank (length,).
    """
    values = np.empty(left.shape, table.dtype)
    if left.dtype == np.float32:
        keys = np.empty(left.shape, np.uint64)
        _pack(left, right, keys)
        keys.sort(axis=-1)  # numpy's is vectorised
        _spread(keys, table, values)
        return values
    keys = np.abs(left - right).view(np.int64)
    ranks = np.empty(keys.shape, np.int32)
    _radix_ranks(keys, 8, 8, ranks)
    _looked_up(ranks, table, values)
    return values
