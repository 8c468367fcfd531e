"""The words in which element-wise formulas are written: one name, two meanings.

A formula is a branch-free Python function over the values of one element (numba compiles it into a fused pass) or over
whole tensors (a GPU, and the reference in tests). Besides the operators it may use these words, `abs`, `zip` over its
tuples, and `if` on settings that are the same for every element. It must not use number literals in arithmetic: they
would widen float32 to float64 in compiled code; `zeros_like` and `number` stand in for them.

The functions below are the meaning on torch tensors; `graftwork.merge.kernels` gives the compiled meaning.
"""

from __future__ import annotations

from typing import Any

Value = Any
"""A float32 or float64 scalar in compiled code; a tensor of the same dtype elsewhere."""


def zeros_like(value: Value) -> Value:
    """Return zero in the type and shape of `value`."""
    return value * 0


def where(condition: Value, value: Value, other: Value) -> Value:
    """Return `value` where the condition holds, else `other`, in the type of `value`."""
    import torch

    like = next(item for item in (value, other) if isinstance(item, torch.Tensor))
    return torch.where(condition, torch.as_tensor(value, dtype=like.dtype, device=like.device), other)


def number(condition: Value, like: Value) -> Value:
    """Return one where the condition holds, else zero, in the type of `like`."""
    return condition.to(like.dtype)


def minimum(value: Value, bound: Value) -> Value:
    """Return the smaller of the two."""
    import torch

    return torch.minimum(value, torch.as_tensor(bound, dtype=value.dtype, device=value.device))


def maximum(value: Value, bound: Value) -> Value:
    """Return the larger of the two."""
    import torch

    return torch.maximum(value, torch.as_tensor(bound, dtype=value.dtype, device=value.device))


def drawn(key: int, index: Value, threshold: int) -> Value:
    """Return whether element `index` of a random stream is kept: its 32-bit draw is below `threshold`.

    The draw is half of a SplitMix64 output: `mix(key + (index // 2 + 1) * gamma)`, low half for even elements. It needs
    no state, so it is the same for any chunking, thread count and device.
    """
    half = index >> 1
    word = _mix((half + 1) * _signed(0x9E3779B97F4A7C15) + _signed(key))
    word = _shift(word, 32) * (index & 1) + (word & 0xFFFFFFFF) * (1 - (index & 1))
    return word < threshold


def distance_key(value: Value, base: Value, wide: bool) -> Value:
    """Return the key of |value - base|: its bits as an integer, which orders non-negative floats.

    The distance is a float32 rounded once from the exact value; a float64 if `wide` (some input is float64).
    """
    if wide:
        return key64((value - base).abs())
    return key32((value.float() - base.float()).abs())


def key32(score: Value) -> Value:
    """Return the order-preserving integer key of a non-negative score, rounded to float32."""
    import torch

    return score.float().view(torch.int32).to(torch.int64)


def key64(score: Value) -> Value:
    """Return the order-preserving integer key of a non-negative float64 score."""
    import torch

    return score.double().view(torch.int64)


def admitted(key: Value, index: Value, cut_key: int, cut_index: int) -> Value:
    """Return whether an element is selected: its key is above the cut, or equal to it and not after `cut_index`."""
    return (key > cut_key) | ((key == cut_key) & (index <= cut_index))


def row_value(table: Value, index: Value, columns: int) -> Value:
    """Return the entry of `table` that belongs to the row of element `index`, rows being `columns` long."""
    return table[index // columns]


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def _shift(word: Value, count: int) -> Value:
    return (word >> count) & ((1 << (64 - count)) - 1)


def _mix(word: Value) -> Value:
    word = (word ^ _shift(word, 30)) * _signed(0xBF58476D1CE4E5B9)
    word = (word ^ _shift(word, 27)) * _signed(0x94D049BB133111EB)
    return word ^ _shift(word, 31)
