"""The words in which element-wise formulas are written: one name, two meanings.

A formula is a branch-free Python function over the values of one element (numba compiles it into a fused pass) or over
whole tensors (a GPU, and the reference in tests). Besides the operators it may use these words, `abs`, `zip` over its
tuples, and `if` on settings that are the same for every element. It must not use number literals in arithmetic: they
would widen float32 to float64 in compiled code; `zeros_like` and `number` stand in for them.

The functions below are the meaning on torch tensors; `graftwork.merge.kernels` gives the compiled meaning.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Value = Any
"""A float32 or float64 scalar in compiled code; a tensor of the same dtype elsewhere."""


def zeros_like(value: Value) -> Value:
    """Return zero in the type and shape of `value`."""
    import torch

    return torch.zeros_like(value)


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


def narrow(value: Value) -> Value:
    """Return the value rounded to float32."""
    return value.float()


def wide(value: Value) -> Value:
    """Return the value as a float64."""
    return value.double()


def log(value: Value) -> Value:
    """Return the natural logarithm."""
    return value.log()


def exp(value: Value) -> Value:
    """Return e to the power of the value."""
    return value.exp()


def tanh(value: Value) -> Value:
    """Return the hyperbolic tangent."""
    return value.tanh()


def sigmoid(value: Value) -> Value:
    """Return 1 / (1 + exp(-value))."""
    return value.sigmoid()


def distance(value: Value, base: Value, like: Value) -> Value:
    """Return |value - base| as a float32 or float64, whichever `like` is, rounded once."""
    import torch

    kind = torch.float64 if isinstance(like, np.float64) else torch.float32
    return (value.to(kind) - base.to(kind)).abs()


def row_value(table: Value, index: Value, columns: int) -> Value:
    """Return the entry of `table` that belongs to the row of element `index`, rows being `columns` long."""
    return table[index // columns]
