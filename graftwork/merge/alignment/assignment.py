"""Linear assignment: the order of columns with the largest sum of scores.

Our own solver is exact and made for what matching weights asks of it: matrices in which a few outer products of norm
gains outweigh everything else, and the same problem again and again with small changes. It is a forward auction whose
increment shrinks in stages, which finds prices close to the best ones in a few passes over the matrix, followed by
shortest augmenting paths, which make the result exact. With the prices of an earlier, similar problem the auction is
left out, and where those prices certify the present order, one pass is all.

Sources: D. P. Bertsekas, "The auction algorithm: a distributed relaxation method for the assignment problem", 1988
(increments in stages); R. Jonker and A. Volgenant, "A shortest augmenting path algorithm for dense and sparse linear
assignment problems", 1987 (row reduction and augmentation). Theirs minimise, ours maximises.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numba import njit
from numpy.typing import NDArray

from graftwork.merge.errors import DataError, DependencyError
from graftwork.merge.kernels import cached

Solver = Literal["auto", "own", "lapx", "scipy"]

TOLERANCE = 1e-9
"""A gain counts if it is larger than this times the number of rows that change times the largest score."""

_LANES = 64
_LARGEST_STEP = 0.5
_SMALLEST_STEP = 5e-4
"""The auction's first and last increment, in standard deviations of the scores without their row and column means."""
_STEP_FACTOR = 8.0
_BIDS = 20
"""How many bids per row a stage of the auction has; some matrices would have it go on for ever."""
_SMALL = 24
"""Up to this size scipy is as fast."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """A solved problem.

    Args:
        columns: The column of each row, int64 (n,).
        value: Sum of the chosen scores, in float64.
        gain: What it is more than the sum of the order that was given as current; 0.0 where that was kept.
        largest: The largest absolute value of a score.
        duals: Prices of the columns, float64 (n,), a start for a similar problem; None if another solver was used.
    """

    columns: NDArray[np.int64]
    value: float
    gain: float
    largest: float
    duals: NDArray[np.float64] | None


def solve_assignment(
    score: NDArray[Any],
    *,
    current: NDArray[np.int64] | None = None,
    duals: NDArray[np.float64] | None = None,
    solver: Solver = "auto",
) -> Assignment:
    """Return the permutation of columns that maximises the sum over rows i of score[i, columns[i]].

    Rows whose column could change without gain keep the column that they have in `current`: the difference to the
    optimum falls apart into cycles, and each one is taken only if it gains more than `TOLERANCE` · length · largest
    score. Sums are formed in float64.

    Args:
        score: float32 or float64 (n, n), finite.
        current: The order so far, int64 (n,); the identity by default.
        duals: Prices that an earlier call returned for a similar score.
        solver: "own"; "lapx", which needs the extra `alignment`; "scipy"; "auto" takes our own, and scipy for small
            problems. All are exact.

    Raises:
        ValueError: The score is not a square matrix of floats.
        DataError: It holds NaN or infinity.
        DependencyError: lapx was asked for and is not installed.
    """
    if score.ndim != 2 or score.shape[0] != score.shape[1] or score.dtype not in (np.float32, np.float64):
        raise ValueError(f"a score is a square float matrix, not {score.dtype} of shape {score.shape}")
    size = len(score)
    if current is None:
        current = np.arange(size, dtype=np.int64)
    if size == 0:
        return Assignment(current, 0.0, 0.0, 0.0, duals)
    largest = max(float(score.max()), -float(score.min()))
    if not np.isfinite(largest):
        raise DataError("cannot solve an assignment: its scores hold NaN or infinity")
    if solver == "auto":
        solver = "scipy" if size <= _SMALL else "own"
    prices: NDArray[np.float64] | None = None
    if solver == "own":
        found, prices = _solve_own(np.ascontiguousarray(score), current, duals, largest)
    else:
        found = _lapx(score) if solver == "lapx" else _scipy(score)
    columns, gain = _without_idle_cycles(score, current, found, TOLERANCE * largest)
    value = float(score[np.arange(size), columns].sum(dtype=np.float64))
    return Assignment(columns, value, gain, largest, prices)


def _scipy(score: NDArray[Any]) -> NDArray[np.int64]:
    from scipy.optimize import linear_sum_assignment

    return np.asarray(linear_sum_assignment(score, maximize=True)[1], dtype=np.int64)


def _lapx(score: NDArray[Any]) -> NDArray[np.int64]:
    return np.asarray(_lapx_module().lapjvh(-score, return_cost=False)[1], dtype=np.int64)


@functools.cache
def _lapx_module() -> Any:
    try:
        module = importlib.import_module("lap")
    except ImportError as error:
        raise DependencyError(
            'cannot use lapx: it is not installed; `pip install "graftwork[alignment]"`, or take another solver'
        ) from error
    if not hasattr(module, "lapjvh"):
        raise DependencyError(
            'cannot use lapx: the installed module "lap" is another package; `pip install "lapx>=0.9"` in its place'
        )
    return module


def _without_idle_cycles(
    score: NDArray[Any], current: NDArray[np.int64], found: NDArray[np.int64], tolerance: float
) -> tuple[NDArray[np.int64], float]:
    """Return `found` with every cycle that does not gain undone, and the gain of the rest."""
    if (found == current).all():
        return current, 0.0
    columns = current.copy()
    return columns, float(_take_cycles(score, current, found, tolerance, columns))


@cached
def _take_cycles(score: Any, current: Any, found: Any, tolerance: float, columns: Any) -> float:
    """Put every cycle of `found` that gains into `columns`; return the sum of their gains."""
    size = len(current)
    holder = np.empty(size, np.int64)
    for row in range(size):
        holder[current[row]] = row
    seen = np.zeros(size, np.bool_)
    total = 0.0
    for start in range(size):
        if seen[start] or found[start] == current[start]:
            continue
        gain = 0.0
        length = 0
        row = start
        while not seen[row]:
            seen[row] = True
            gain += np.float64(score[row, found[row]]) - np.float64(score[row, current[row]])
            length += 1
            row = holder[found[row]]  # the row that has to give its column away
        if gain > tolerance * length:
            total += gain
            while seen[row]:
                seen[row] = False
                columns[row] = found[row]
                row = holder[found[row]]
            row = start
            while not seen[row]:
                seen[row] = True
                row = holder[found[row]]
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Our own solver

# Minima and maxima become vector instructions only where the compiler need not care for NaN and the sign of zero.
_elementwise = njit(nogil=True, error_model="numpy", fastmath={"nnan", "nsz"})


def _solve_own(
    score: NDArray[Any], current: NDArray[np.int64], duals: NDArray[np.float64] | None, largest: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the optimal columns and prices."""
    size = len(score)
    columns = current.copy()
    if duals is None:
        # A mean is the price of a column whose scores differ by a constant only; what is left is what must be decided.
        prices = score.mean(axis=0, dtype=np.float64)
        rows = score.mean(axis=1, dtype=np.float64)
        variance = np.einsum("ij,ij->", score, score, dtype=np.float64) / size**2 + prices.mean() ** 2
        deviation = max(variance - np.square(prices).mean() - np.square(rows).mean(), 0.0) ** 0.5
        step, last = _LARGEST_STEP * deviation, _SMALLEST_STEP * deviation
        if deviation > 1e-12 * largest:
            while step > last * 0.999:
                _auction(score, prices, np.full(size, -1, dtype=np.int64), step, _BIDS * size)
                step /= _STEP_FACTOR
    else:
        prices = duals.copy()
    rounding = 1e-14 * (largest + float(np.abs(prices).max()))
    _augment(score, prices, columns, rounding)
    return columns, prices


@_elementwise
def _best_two(row: Any, prices: Any, firsts: Any, seconds: Any) -> Any:
    """Return the largest of row - prices, its column, and the second largest.

    Column j goes to lane j % 64, because compilers turn that into vector instructions and a plain maximum not.
    """
    size = row.size
    firsts[:] = -np.inf
    seconds[:] = -np.inf
    whole = size - size % _LANES
    for start in range(0, whole, _LANES):
        scores = row[start : start + _LANES]
        costs = prices[start : start + _LANES]
        for lane in range(_LANES):
            value = scores[lane] - costs[lane]
            seconds[lane] = max(seconds[lane], min(firsts[lane], value))
            firsts[lane] = max(firsts[lane], value)
    best = -np.inf
    second = -np.inf
    column = 0
    for lane in range(_LANES):
        if firsts[lane] > best:
            second = max(best, seconds[lane])
            best = firsts[lane]
            column = lane
        else:
            second = max(second, firsts[lane])
    for position in range(whole, size):
        value = row[position] - prices[position]
        if value > best:
            second = best
            best = value
            column = position
        elif value > second:
            second = value
    if column < whole:
        while row[column] - prices[column] != best:
            column += _LANES
    return best, column, second


@_elementwise
def _relax(row: Any, prices: Any, distances: Any, offset: Any, lanes: Any) -> Any:
    """Lower each distance to offset + price - score where that is less; return the smallest and its column."""
    size = row.size
    lanes[:] = np.inf
    whole = size - size % _LANES
    for start in range(0, whole, _LANES):
        scores = row[start : start + _LANES]
        costs = prices[start : start + _LANES]
        part = distances[start : start + _LANES]
        for lane in range(_LANES):
            value = min(part[lane], offset + (costs[lane] - scores[lane]))
            part[lane] = value
            lanes[lane] = min(lanes[lane], value)
    best = np.inf
    column = 0
    for lane in range(_LANES):
        if lanes[lane] < best:
            best = lanes[lane]
            column = lane
    for position in range(whole, size):
        value = min(distances[position], offset + (prices[position] - row[position]))
        distances[position] = value
        if value < best:
            best = value
            column = position
    if column < whole:
        while distances[column] != best:
            column += _LANES
    return best, column


@cached
def _auction(score: Any, prices: Any, owners: Any, step: float, bids: int) -> None:
    """Raise prices by bids of the rows that own nothing, until all do or no bids are left."""
    size = score.shape[0]
    firsts = np.empty(_LANES)
    seconds = np.empty(_LANES)
    owning = np.zeros(size, np.bool_)
    for column in range(size):
        if owners[column] >= 0:
            owning[owners[column]] = True
    waiting = np.empty(size, np.int64)
    count = 0
    for row in range(size - 1, -1, -1):
        if not owning[row]:
            waiting[count] = row
            count += 1
    while count > 0 and bids > 0:
        bids -= 1
        count -= 1
        row = waiting[count]
        best, column, second = _best_two(score[row], prices, firsts, seconds)
        prices[column] += best - second + step
        owner = owners[column]
        owners[column] = row
        if owner >= 0:
            waiting[count] = owner
            count += 1


@cached
def _augment(score: Any, prices: Any, columns: Any, rounding: float) -> None:
    """Make `columns`, an order to start with, the best one, and `prices` duals that prove it.

    Rows keep the column they have where it is a best one at the given prices. The others first try to take their best
    column at once; what is left goes by shortest augmenting paths over reduced scores.
    """
    size = score.shape[0]
    firsts = np.empty(_LANES)
    seconds = np.empty(_LANES)
    rows = np.full(size, -1, np.int64)
    taken = np.full(size, -1, np.int64)
    free = np.empty(size, np.int64)
    count = 0
    for row in range(size):
        best, column, second = _best_two(score[row], prices, firsts, seconds)
        column = columns[row]
        if score[row, column] - prices[column] >= best - rounding:
            taken[row] = column
            rows[column] = row
        else:
            free[count] = row
            count += 1

    for _ in range(2):
        waiting = count
        count = 0
        place = 0
        budget = 4 * waiting
        while place < waiting:
            row = free[place]
            place += 1
            budget -= 1
            best, column, second = _best_two(score[row], prices, firsts, seconds)
            owner = rows[column]
            if best <= second and owner >= 0:
                free[count] = row
                count += 1
                continue
            if size > 1:
                prices[column] += best - second
            rows[column] = row
            taken[row] = column
            if owner >= 0:
                taken[owner] = -1
                if best > second and budget > 0:
                    place -= 1
                    free[place] = owner
                else:
                    free[count] = owner
                    count += 1

    distances = np.empty(size)
    remaining = np.empty(size)
    scanned = np.empty(size, np.int64)
    lengths = np.empty(size)
    offsets = np.empty(size + 1)
    path = np.empty(size + 1, np.int64)
    for index in range(count):
        distances[:] = np.inf
        remaining[:] = prices
        row = free[index]
        length = 0.0
        steps = 0
        best, column, second = _best_two(score[row], prices, firsts, seconds)
        offset = best
        while True:
            path[steps] = row
            offsets[steps] = length + offset
            length, column = _relax(score[row], remaining, distances, offsets[steps], firsts)
            if rows[column] < 0:
                break
            scanned[steps] = column
            lengths[steps] = length
            steps += 1
            distances[column] = np.inf
            remaining[column] = np.inf
            row = rows[column]
            offset = score[row, column] - prices[column]
        # Which row gave a column its distance is not noted down in the loop over all columns, but found here again.
        wanted = length
        target = column
        last = steps
        while True:
            nearest = np.inf
            step = 0
            for candidate in range(last + 1):
                value = offsets[candidate] + (prices[target] - score[path[candidate], target])
                if abs(value - wanted) < nearest:
                    nearest = abs(value - wanted)
                    step = candidate
                    if nearest == 0.0:
                        break
            row = path[step]
            rows[target] = row
            following = taken[row]
            taken[row] = target
            if step == 0:
                break
            target = following
            last = step - 1
            wanted = lengths[last]
        for step in range(steps):
            prices[scanned[step]] += length - lengths[step]
    columns[:] = taken
