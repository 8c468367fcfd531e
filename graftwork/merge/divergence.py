"""The divergence of two rows' softmax distributions, in one compiled loop.

Exponentials are polynomials, so that loops over them become vector instructions; sums run over fixed lanes. Both make a
result the same on every processor.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, types

from graftwork.merge.kernels import LANES, _bits_of_float64, _dot, _float64_of_bits, _total, cached

Array = np.ndarray[Any, np.dtype[Any]]

_FAR = 30.0
"""A difference above which its exponential might overflow in a product."""

_SMALL = 1e-2
"""A relative change of a probability up to which the series below is exact."""

_PER_LN2 = 1 / math.log(2)
_LN2_HIGH = 0.693147180369123816490  # 32 bits, so that its product with an exponent is exact
_LN2_LOW = 1.90821492927058770002e-10
_WHOLE = 1.5 * 2.0**52  # adding it rounds to a whole number, which then stands in the lowest bits
_LOWEST = -700.0
_FACTORIALS = tuple(1 / math.factorial(power) for power in range(14))


@njit(error_model="numpy")
def _parts(value: float) -> Any:
    """Return (2ᵏ, exp(r) - 1) with value = k·ln 2 + r and |r| ≤ ln 2 / 2; for -700 ≤ value ≤ 700."""
    shifted = value * _PER_LN2 + _WHOLE
    exponent = shifted - _WHOLE
    rest = (value - exponent * _LN2_HIGH) - exponent * _LN2_LOW
    series = _FACTORIALS[13]
    series = series * rest + _FACTORIALS[12]
    series = series * rest + _FACTORIALS[11]
    series = series * rest + _FACTORIALS[10]
    series = series * rest + _FACTORIALS[9]
    series = series * rest + _FACTORIALS[8]
    series = series * rest + _FACTORIALS[7]
    series = series * rest + _FACTORIALS[6]
    series = series * rest + _FACTORIALS[5]
    series = series * rest + _FACTORIALS[4]
    series = series * rest + _FACTORIALS[3]
    series = series * rest + _FACTORIALS[2]
    power = _float64_of_bits((_bits_of_float64(shifted) + types.uint64(1023)) << types.uint64(52))
    return power, rest + rest * rest * series


@njit(error_model="numpy")
def _exponential(value: float) -> Any:
    power, more = _parts(value if value > _LOWEST else _LOWEST)
    return power + power * more


@njit(error_model="numpy")
def _exponential_less_one(value: float) -> Any:
    power, more = _parts(value if value > _LOWEST else _LOWEST)
    return power * more + (power - 1.0)


@njit(error_model="numpy")
def _sum(values: Any, lane: Any) -> float:
    lane[:] = 0.0
    _total(values, values.size, lane)
    total: float = lane.sum()
    return total


@njit(error_model="numpy")
def _inner(left: Any, right: Any, lane: Any) -> float:
    lane[:] = 0.0
    _dot(left, right, left.size, lane)
    total: float = lane.sum()
    return total


@njit(error_model="numpy")
def _largest(values: Any) -> float:
    """Return the largest magnitude; magnitudes are ordered as their bits are, and integers make a vector loop."""
    found = types.uint64(0)
    for position in range(values.size):
        found = max(found, _bits_of_float64(abs(values[position])))
    largest: float = _float64_of_bits(found)
    return largest


@njit(error_model="numpy")
def _change_far(base: Any, top: float, q: Any, delta: Any, change: Any, lane: Any) -> None:
    """Write P - Q where some difference is large."""
    highest = -np.inf
    for position in range(q.size):
        change[position] = (types.float64(base[position]) - top) + delta[position]
        highest = max(highest, change[position])
    for position in range(q.size):
        change[position] = _exponential(change[position] - highest)
    total = _sum(change, lane)
    for position in range(q.size):
        change[position] = change[position] / total - q[position]


@njit(error_model="numpy")
def _change_near(q: Any, delta: Any, change: Any, lane: Any) -> None:
    """Write P - Q = Q·(exp(d - c) - 1), c = log Σ Q·exp(d), where all differences d are moderate."""
    for position in range(q.size):
        change[position] = _exponential_less_one(delta[position])
    growth = _inner(q, change, lane)
    for position in range(q.size):
        change[position] = q[position] * ((change[position] - growth) / (1.0 + growth))


@cached
def rows_divergence(models: Any, base: Any, tops: Any, result: Any) -> None:
    """Write the divergence of each row of `models` (rows, columns) from that of `base`, whose largest is in `tops`."""
    rows, columns = base.shape
    q = np.empty(columns)
    delta = np.empty(columns)
    change = np.empty(columns)
    lane = np.empty(LANES)
    for row in range(rows):
        mine = models[row]
        other = base[row]
        top = types.float64(tops[row])
        for position in range(columns):
            value = types.float64(other[position])
            q[position] = _exponential(value - top)
            delta[position] = types.float64(mine[position]) - value
        total = _sum(q, lane)
        mean = _inner(q, delta, lane) / total
        for position in range(columns):
            q[position] = q[position] / total
            delta[position] = delta[position] - mean
        if _largest(delta) > _FAR:
            _change_far(other, top, q, delta, change, lane)
        else:
            _change_near(q, delta, change, lane)
        for position in range(columns):
            raised = q[position] + 1e-8
            ratio = change[position] / raised
            change[position] = ratio
            # (1 + ρ)·log(1 + ρ) - ρ = Σ (-ρ)ᵏ/(k·(k - 1)), k = 2, 3, …
            series = 1 / 90
            series = 1 / 72 - series * ratio
            series = 1 / 56 - series * ratio
            series = 1 / 42 - series * ratio
            series = 1 / 30 - series * ratio
            series = 1 / 20 - series * ratio
            series = 1 / 12 - series * ratio
            series = 1 / 6 - series * ratio
            series = 1 / 2 - series * ratio
            q[position] = raised
            delta[position] = ratio * ratio * series
        if _largest(change) >= _SMALL:
            for position in range(columns):
                ratio = change[position]
                if abs(ratio) >= _SMALL:
                    delta[position] = (1 + ratio) * math.log1p(ratio) - ratio
        result[row] = max(_inner(q, delta, lane), 0.0)


def divergence(models: Array, base: Array) -> Array:
    """Return KL(softmax(x) ‖ softmax(b)) of each row, both distributions P, Q raised by 1e-8.

    A number added to a whole row of x or b changes nothing: d loses its mean under Q first. Then P - Q is formed from
    exp(d) - 1, and with ρ = (P - Q)/(Q + 1e-8) every term (Q + 1e-8)·((1 + ρ)·log(1 + ρ) - ρ) is non-negative: nothing
    cancels. Where some d is so large that its exponential might overflow, P - Q is not small and is simply subtracted.

    Args:
        models: Finite values (1, rows, columns), float32 or float64.
        base: Values (rows, columns) of the same dtype.

    Returns:
        float64 (rows,).
    """
    result = np.empty(base.shape[0])
    rows_divergence(models[0], base, base.max(-1), result)
    return result
