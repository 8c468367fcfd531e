"""Embeddings and heads with their rows in the order of an output's vocabulary, read row by row.

A view of one model's tensor: its own row where it has the token; else what the recipe says, the base's row, the only
row there is, or the mean of those that other models have. Nothing is copied: a view is a list of row numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graftwork.merge import dtypes
from graftwork.merge.checkpoint import Checkpoint, CheckpointView, TensorEntry, numpy_values

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Numbers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

_OWN, _MEAN, _ZERO, _PADDING = -1, -2, -3, -4
"""What `RowPlan.owner` says where it is not the position of the model whose row is taken."""


@dataclass(frozen=True, slots=True)
class RowRule:
    """What a recipe says of the row of one token.

    Args:
        model: Position of the model whose row it is, or None for zeros.
        row: That model's row.
        force: Whether models that have the token get this row as well.
    """

    model: int | None
    row: int = 0
    force: bool = False


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Where every row of the output comes from, for all models of a group.

    Args:
        rows: Row of every token in every model, (models, tokens); -1 where a model lacks it.
        base: Position of the base among the models, or None.
        rules: What the recipe says, by output row.
        size: Rows of the output; those behind the tokens are padding.
    """

    rows: Numbers
    base: int | None
    rules: Mapping[int, RowRule] = field(default_factory=dict)
    size: int = 0

    def owners(self, model: int) -> tuple[Numbers, Numbers]:
        """Return, for each output row of a model's view: whose row it is (or what else), and which."""
        tokens = self.rows.shape[1]
        owner = np.full(self.size, _PADDING, np.int64)
        row = np.zeros(self.size, np.int64)
        has = self.rows >= 0
        count = has.sum(0)
        lone = np.argmax(has, 0)
        owner[:tokens] = np.where(count == 0, _ZERO, np.where(count == 1, lone, _MEAN))
        if self.base is not None:
            owner[:tokens] = np.where(has[self.base], self.base, owner[:tokens])
        for place, rule in self.rules.items():
            owner[place] = _ZERO if rule.model is None else rule.model
        forced = np.zeros(tokens, bool)
        forced[[place for place, rule in self.rules.items() if rule.force]] = True
        owner[:tokens] = np.where(has[model] & ~forced, model, owner[:tokens])
        known = owner[:tokens] >= 0
        row[:tokens][known] = self.rows[owner[:tokens][known], np.flatnonzero(known)]
        for place, rule in self.rules.items():
            if rule.model is not None and (rule.force or not has[model, place]):
                row[place] = rule.row
        return owner, row


class RowView:
    """Reads a vocabulary tensor of one model in the output's order, widened to float32 (float64 if a model has that).

    Args:
        plan: Where rows come from.
        model: Position of the model among those of the group.
        sources: Every model's checkpoint and tensor.
    """

    def __init__(self, plan: RowPlan, model: int, sources: Sequence[tuple[Checkpoint, TensorEntry]]) -> None:
        self.plan, self.sources = plan, sources
        self.owner, self.row = plan.owners(model)
        shape = sources[model][1].shape
        self.width = int(np.prod(shape[1:], dtype=np.int64))
        self.shape = (plan.size, *shape[1:])
        wide = any(entry.dtype == "F64" for _, entry in sources)
        self.code = "F64" if wide else "F32"
        self.made: np.dtype[Any] = np.dtype(np.float64 if wide else np.float32)
        self._padding: Array | None = None
        self._lock = threading.Lock()

    def entry(self, like: TensorEntry) -> TensorEntry:
        """Return what the view looks like."""
        size = self.plan.size * self.width * self.made.itemsize
        return TensorEntry(like.name, self.code, self.shape, like.file, 0, size)

    def __call__(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` on."""
        stride = self.width * self.made.itemsize
        first, last = offset // stride, -(-(offset + buffer.nbytes) // stride)
        data = self._rows(first, last).astype(self.made).reshape(-1).view(np.uint8)
        start = offset - first * stride
        buffer[:] = data.data[start : start + buffer.nbytes]

    def _rows(self, first: int, last: int) -> Array:
        values = np.zeros((last - first, self.width))
        place = first
        while place < last:
            owner = int(self.owner[place])
            if owner >= 0:
                stop = place + 1
                while stop < last and self.owner[stop] == owner and self.row[stop] == self.row[place] + stop - place:
                    stop += 1
                values[place - first : stop - first] = self._read(owner, int(self.row[place]), stop - place)
                place = stop
                continue
            if owner == _MEAN:
                having = np.flatnonzero(self.plan.rows[:, place] >= 0)
                for model in having:
                    values[place - first] += self._read(int(model), int(self.plan.rows[model, place]), 1)[0] / len(
                        having
                    )
            elif owner == _PADDING:
                values[place - first] = self._mean()
            place += 1
        return values

    def _read(self, model: int, row: int, count: int) -> Array:
        checkpoint, entry = self.sources[model]
        width = dtypes.BITS[entry.dtype] // 8 * self.width
        data = bytearray(count * width)
        checkpoint.read_into(entry, row * width, memoryview(data))
        values = numpy_values(entry.dtype, data)
        assert values is not None
        return values.astype(np.float64).reshape(count, self.width)

    def _mean(self) -> Array:
        """Return the mean of the real rows, which is what padding gets."""
        with self._lock:
            if self._padding is None:
                tokens = self.plan.rows.shape[1]
                total = np.zeros(self.width)
                for start in range(0, tokens, 4096):
                    total += self._rows(start, min(tokens, start + 4096)).sum(0)
                self._padding = total / tokens
        return self._padding


def viewed(checkpoint: Checkpoint, views: Mapping[str, RowView]) -> Checkpoint:
    """Return a checkpoint in which some tensors are views; closing it closes the original."""
    entries = checkpoint.tensors
    return CheckpointView(
        checkpoint,
        {name: (view.entry(entries[name]), view) for name, view in views.items()},
        stored={name: entries[name].dtype for name in views},
    )
