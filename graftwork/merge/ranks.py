"""Ranks within rows: by sorting words that hold value and place, or by a stable radix sort of wider values.

Where ranks only decide what random draws keep, most draws decide by themselves, and the rest need the magnitudes in
order, which are half the size of words that hold places too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types

from graftwork.merge.kernels import _bits_of_float32, cached, fill_draws

Array = np.ndarray[Any, np.dtype[Any]]

_TOGETHER = 16_384
"""Entries whose magnitudes are sorted in one call, at least a row; few enough to stay in the cache."""


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


@cached
def _fill(key: int, start: int, pairs: Any) -> None:
    fill_draws(key, start, pairs)


@njit(nogil=True, error_model="numpy")
def _first_equal(ordered: Any, rank: int) -> int:
    """Return the first place of the key at `rank` in ascending keys."""
    key = ordered[rank]
    for steps in range(64):
        if rank - steps == 0 or ordered[rank - steps - 1] != key:
            return rank - steps
    place: int = np.searchsorted(ordered, key)
    return place


@cached
def _mark(keys: Any, ordered: Any, draws: Any, table: Any, dropped: Any) -> None:
    """Write 0 into `dropped` where the draw is at most the table's entry for the rank of the key in its row, else 1.

    A draw asks for a rank, and so for the key that has it: a larger key passes, a smaller one does not, and of equal
    keys those that come late enough.
    """
    rows, length = keys.shape
    lowest = table[0]
    highest = table[length - 1]
    per_draw = (length - 1) / (types.float64(highest) - types.float64(lowest) + 1.0)
    places = np.empty(length, np.int64)
    counted = np.empty(length, np.int64)
    reached = np.empty(length, np.int64)
    for row in range(rows):
        mine = keys[row]
        inside = ordered[row]
        drawn = draws[row]
        marks = dropped[row]
        for position in range(length):
            marks[position] = types.uint8(drawn[position] > lowest)
        count = 0
        for position in range(length):
            places[count] = position
            count += (drawn[position] > lowest) & (drawn[position] <= highest)
        counted[:] = 0
        reached[:] = 0
        for number in range(count):
            position = places[number]
            draw = drawn[position]
            rank = types.int64((types.float64(draw) - types.float64(lowest)) * per_draw)
            rank += types.int64(table[rank] < draw)  # nearly always enough, and without a branch to guess
            while table[rank] < draw:
                rank += 1
            while rank > 0 and table[rank - 1] >= draw:
                rank -= 1
            key = mine[position]
            marks[position] = types.uint8(key < inside[rank])
            if key == inside[rank]:
                first = _first_equal(inside, rank)
                passed = mine[reached[first] : position]
                equal = types.uint32(0)
                for other in range(passed.size):
                    equal += types.uint32(passed[other] == key)
                counted[first] += equal
                reached[first] = position
                marks[position] = types.uint8(first + counted[first] < rank)


def dropped_by_rank(left: Array, right: Array, table: Array, draws: Array) -> Array:
    """Return 0 for each entry whose draw is at most `table[r]`, r the rank of |left - right| in its row, and else 1.

    Ranks ascend from 0; among equals the lower index comes first. What both arrays hold is finite.

    Args:
        left: Values (rows, length), float32 or float64.
        right: Values of the same shape and dtype.
        table: Ascending, one uint32 per rank (length,).
        draws: uint32 (rows, length).
    """
    rows, length = left.shape
    dropped = np.empty(left.shape, np.uint8)
    few = max(1, _TOGETHER // length)
    for row in range(0, rows, few):
        part = slice(row, min(rows, row + few))
        sizes = left[part] - right[part]
        np.abs(sizes, out=sizes)
        keys = sizes.view(np.uint32 if sizes.dtype == np.float32 else np.uint64)
        _mark(keys, np.sort(keys, axis=-1), draws[part], table, dropped[part])
    return dropped


def draws_of(key: int, first: int, count: int) -> Array:
    """Return the 32-bit draws of `count` elements from `first` on of a random stream, as uint32."""
    odd = first % 2
    pairs = np.empty((count + odd + 1) // 2, np.uint64)
    _fill(np.uint64(key), first - odd, pairs)
    return pairs.view(np.uint32)[odd : odd + count]
