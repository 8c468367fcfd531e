"""A task's unlabelled inputs: collected once, then drawn in batches that depend on seed and step alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from graftwork.merge.checkpoint import quoted
from graftwork.merge.errors import TaskError
from graftwork.merge.random import stream_key
from graftwork.merge.task import Task, raise_user_failure

_ORDER, _CHOICE = 1, 2
"""Random streams of a task."""


@dataclass(slots=True)
class Inputs:
    """The inputs of one task.

    Args:
        task: The task's name.
        split: Where they come from: `unlabelled`, or `train`.
        rows: A tensor (n, …), or tensors in mappings, lists and tuples.
        count: n.
        digest: Of their values.
        transductive: Whether some of them are test inputs.
    """

    task: str
    split: str
    rows: Any
    count: int
    digest: str
    transductive: bool
    _order: tuple[int, np.ndarray[Any, np.dtype[np.int64]]] = field(default=(-1, np.empty(0, np.int64)), repr=False)

    def record(self) -> dict[str, Any]:
        """Return what a file says of them."""
        return {"name": self.task, "split": self.split, "inputs": self.count, "digest": self.digest}

    def indices(self, seed: int, step: int, batch: int) -> Tensor:
        """Return the rows of step number `step` (from 1): a new order when all whole batches have had their turn."""
        rounds = self.count // batch
        epoch, place = divmod(step - 1, rounds)
        if self._order[0] != epoch:
            key = np.array([stream_key(seed, self.task, _ORDER), epoch], np.uint64)
            self._order = (epoch, np.random.Generator(np.random.Philox(key=key)).permutation(self.count))
        return torch.from_numpy(self._order[1][place * batch : (place + 1) * batch])

    def take(self, indices: Tensor | slice) -> Any:
        """Return some rows."""
        return _map(self.rows, lambda leaf: leaf[indices])


def collect(task: Task, *, batch: int, seed: int, examples: int | None) -> Inputs:
    """Return the task's unlabelled inputs, or its training inputs without their labels if it names no others.

    Args:
        task: The task.
        batch: Rows of a batch; there has to be one at least.
        seed: Seed of the choice.
        examples: How many to keep, drawn at random; None for all.

    Raises:
        TaskError: There are too few, or they are no tensors.
    """
    split, source = ("unlabelled", task.unlabelled) if task.unlabelled is not None else ("train", task.batches)
    doing = f"cannot learn on task {quoted(task.name)}"
    parts = list(_batches(source, doing, bare=split == "unlabelled"))
    try:
        rows = _joined(parts) if parts else None
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise TaskError(
            f"{doing}: its {split} inputs cannot be put together ({reason}); pad them to one shape"
        ) from None
    counts = {len(leaf) for leaf in _leaves(rows)} if parts else {0}
    if len(counts) != 1:
        raise TaskError(
            f"{doing}: its {split} inputs have parts of {sorted(counts)} rows; each needs one row per input"
        )
    count = counts.pop()
    if count < batch:
        raise TaskError(
            f"{doing}: it has {count} {split} inputs, a batch takes {batch}; give it more, or make batches smaller"
        )
    if examples is not None and examples < count:
        if examples < batch:
            raise TaskError(f"{doing}: {examples} inputs are to be used, a batch takes {batch}; use more of them")
        key = np.array([stream_key(seed, task.name, _CHOICE), 0], np.uint64)
        chosen = np.sort(np.random.Generator(np.random.Philox(key=key)).permutation(count)[:examples])
        rows, count = _map(rows, lambda leaf: leaf[torch.from_numpy(chosen)]), examples
    digests = _row_digests(rows, count)
    known = set(digests)
    transductive = False
    if task.test is not None:
        with contextlib.suppress(TypeError):
            for batch_inputs in _batches(task.test, doing, bare=False):
                part = _map(batch_inputs, _plain)
                size = min((len(leaf) for leaf in _leaves(part)), default=0)
                if not known.isdisjoint(_row_digests(part, size)):
                    transductive = True
                    break
    return Inputs(task.name, split, rows, count, xxhash.xxh3_128_hexdigest(b"".join(digests)), transductive)


def _batches(source: Callable[[], Any], doing: str, *, bare: bool) -> Iterator[Any]:
    try:
        for batch in source():
            if isinstance(batch, tuple | list) and len(batch) == 2:
                yield batch[0]
            elif bare:
                yield batch
            else:
                raise TaskError(f"{doing}: a batch is {type(batch).__name__}, not a pair (inputs, labels)")
    except BaseException as error:
        if isinstance(error, GeneratorExit):
            raise
        raise_user_failure(error, doing)


def _map(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return the same structure with the function's value in place of each tensor."""
    if isinstance(tree, Mapping):
        return {key: _map(value, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return _like(tree, [_map(value, function) for value in tree])
    if not isinstance(tree, Tensor):
        raise TypeError(f"{type(tree).__name__} is not a tensor")
    return function(tree)


def _like(tree: Any, values: list[Any]) -> Any:
    """Return values in a list, tuple or named tuple as `tree` is."""
    return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)


def _leaves(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(leaf: Tensor) -> Tensor:
        found.append(leaf)
        return leaf

    _map(tree, note)
    return found


def _joined(parts: list[Any]) -> Any:
    """Return the batches as one: tensors joined along their first axis."""
    first = parts[0]
    if isinstance(first, Mapping):
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, list | tuple):
        return _like(first, [_joined([part[place] for part in parts]) for place in range(len(first))])
    if not isinstance(first, Tensor):
        raise TypeError(f"{type(first).__name__} is not a tensor")
    return torch.cat([_plain(part) for part in parts])


def _plain(leaf: Tensor) -> Tensor:
    """Return inputs as they go through a float32 network."""
    return leaf.detach().float() if leaf.is_floating_point() else leaf.detach()


def _row_digests(rows: Any, count: int) -> list[bytes]:
    """Return a digest of each row's values."""
    leaves = [leaf.contiguous().reshape(len(leaf), -1).cpu() for leaf in _leaves(rows)]
    arrays = [leaf.view(torch.uint8).numpy() if leaf.numel() else np.empty((count, 0), np.uint8) for leaf in leaves]
    digests = []
    for row in range(count):
        state = xxhash.xxh3_128()
        for array in arrays:
            state.update(np.ascontiguousarray(array[row]).data)
        digests.append(state.digest())
    return digests
