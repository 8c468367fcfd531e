"""Running sums of squares, as exact as their memory allows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SMALL = 1 << 20
"""Tensors of fewer entries are summed in float64."""

_PIECE = 1 << 18


class Total:
    """The running sum of one parameter's squared gradients.

    Small tensors, and those of float64 models, are summed in float64. A larger one is a float32 sum and, in bfloat16,
    what rounding has left over (Kahan): 2⁻³² relative per addition, in six bytes an entry instead of eight.

    Args:
        shape: The parameter's shape.
        dtype: The dtype in which it is used.
        device: Where it is.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        import torch

        self.shape = shape
        size = matrix_size(shape)
        exact = math.prod(shape) < SMALL or dtype == torch.float64
        self.sum = torch.zeros(size, dtype=torch.float64 if exact else torch.float32, device=device)
        self.rest = None if exact else torch.zeros(size, dtype=torch.bfloat16, device=device)

    def add(self, where: slice | Tensor, values: Tensor) -> None:
        """Add to rows of the parameter, seen as a matrix (first axis, all others); `values` may be overwritten."""
        if self.rest is None:
            if isinstance(where, slice):
                self.sum[where].add_(values)
            else:
                self.sum.index_add_(0, where, values.to(self.sum.dtype))
            return
        for first in range(0, len(values), step := max(1, _PIECE // max(1, values.shape[1]))):
            # In pieces, because what is in between is as large as what is added.
            part = values[first : first + step]
            if isinstance(where, slice):
                rows: slice | Tensor = slice(where.start + first, where.start + first + len(part))
            else:
                rows = where[first : first + step]
            part.add_(self.rest[rows])
            before = self.sum[rows]
            after = before + part
            self.rest[rows] = part.sub_(after.sub(before)).to(self.rest.dtype)
            self.sum[rows] = after

    def mean(self, count: int) -> Tensor:
        """Return the sum divided by `count`, in the parameter's shape; the sum is spent."""
        if self.rest is not None:
            for first in range(0, len(self.sum), step := max(1, _PIECE // max(1, self.sum.shape[1]))):
                self.sum[first : first + step].add_(self.rest[first : first + step])
            self.rest = None
        return self.sum.div_(count).reshape(self.shape)

    def state(self) -> dict[str, Tensor]:
        """Return what has to be kept to go on later."""
        import torch

        return {"sum": self.sum} | ({} if self.rest is None else {"rest": self.rest.view(torch.int16)})

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` has returned."""
        import torch

        self.sum.copy_(state["sum"])
        if self.rest is not None:
            self.rest.copy_(state["rest"].view(torch.bfloat16))


def matrix_size(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (first axis, product of the others); a number is (1, 1)."""
    return (1, 1) if not shape else (shape[0], math.prod(shape[1:]))
