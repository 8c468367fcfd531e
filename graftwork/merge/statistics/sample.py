"""Which examples a statistic is measured on, and how they are put into batches again.

Examples are drawn by a counter-based hash of (seed, task, position), so the draw is uniform, needs one pass over data
of unknown length, holds no more than it keeps, and does not depend on how the task cuts its data into batches.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from graftwork.merge.checkpoint import quoted
from graftwork.merge.errors import TaskError
from graftwork.merge.random import stream_key
from graftwork.merge.task import Task, raise_user_failure

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = 256
"""How many are drawn where nobody says how many; fewer if there are no more."""

_GAMMA, _FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def random_words(
    key: int | np.ndarray[Any, np.dtype[np.uint64]], positions: np.ndarray[Any, Any]
) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Return the 64-bit words of a stream, or of several that broadcast, at these positions (SplitMix64)."""
    word = np.asarray(key, np.uint64) + (positions.astype(np.uint64) + np.uint64(1)) * _GAMMA
    word = (word ^ (word >> np.uint64(30))) * _FIRST
    word = (word ^ (word >> np.uint64(27))) * _SECOND
    mixed: np.ndarray[Any, np.dtype[np.uint64]] = word ^ (word >> np.uint64(31))
    return mixed


@dataclass(frozen=True, slots=True)
class Example:
    """One example: its position in the task's data, inputs with a leading axis of 1, and label (or None)."""

    index: int
    inputs: Any
    label: Any


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples of one shape, put together.

    Args:
        indices: Their positions in the task's data.
        inputs: What the model is called with.
        labels: Labels, or None.
    """

    indices: tuple[int, ...]
    inputs: Any
    labels: Any

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True, slots=True)
class Sample:
    """Drawn examples in a random order, those of one shape side by side; `found` is how many the task has."""

    examples: tuple[Example, ...]
    found: int

    @property
    def digest_text(self) -> str:
        """What tells this draw from another one."""
        return ",".join(str(example.index) for example in self.examples)

    def batches(self, size: int) -> list[range]:
        """Return ranges of at most `size` examples of one shape."""
        ranges: list[range] = []
        start = 0
        for stop in range(1, len(self.examples) + 1):
            ended = stop == len(self.examples) or _signature(self.examples[stop]) != _signature(self.examples[start])
            if ended or stop - start == size:
                ranges.append(range(start, stop))
                start = stop
        return ranges

    def batch(self, positions: Iterable[int], device: str = "cpu") -> Batch:
        """Return the examples at these places as a batch."""
        chosen = [self.examples[position] for position in positions]
        inputs = _joined([example.inputs for example in chosen], device)
        labels = None if chosen[0].label is None else _joined([example.label for example in chosen], device)
        return Batch(tuple(example.index for example in chosen), inputs, labels)


def draw(task: Task, examples: int | None, seed: int, *, labels: bool = False) -> Sample:
    """Draw examples of a task's training data, without replacement.

    Args:
        task: Whose `batches` are read once.
        examples: How many; None for `EXAMPLES`, or all if there are fewer.
        seed: Seed of the draw.
        labels: Whether each has to have a label.

    Raises:
        TaskError: There are none or fewer than asked for, they lack labels, or the task fails.
    """
    doing = f"cannot measure on task {quoted(task.name)}"
    wanted = EXAMPLES if examples is None else examples
    if wanted < 1:
        raise TaskError(f"{doing}: {wanted} examples are asked for; ask for at least one")
    key = stream_key(seed, f"examples of {task.name}", 0)
    kept: list[tuple[int, int, Example]] = []  # a heap whose first item has the largest key
    found = 0
    try:
        for number, batch in enumerate(task.batches()):
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise TaskError(f"{doing}: batch {number} is {type(batch).__name__}, not a pair (inputs, labels)")
            inputs, targets = batch
            size = size_of(inputs)
            if size is None:
                raise TaskError(f"{doing}: the inputs of batch {number} hold no tensor with an axis of examples")
            if targets is None and labels:
                raise TaskError(
                    f"{doing}: the task gives no labels, which the empirical estimator needs; use the estimator signed"
                )
            keys = random_words(key, np.arange(found, found + size))
            for place in range(size):
                rank = -int(keys[place])
                if len(kept) == wanted and rank <= kept[0][0]:
                    continue
                label = None if targets is None else _sliced(targets, place, size)
                item = (rank, found + place, Example(found + place, _sliced(inputs, place, size), label))
                if len(kept) == wanted:
                    heapq.heapreplace(kept, item)
                else:
                    heapq.heappush(kept, item)
            found += size
    except BaseException as error:
        raise_user_failure(error, doing)
    if found == 0:
        raise TaskError(f"{doing}: it has no examples")
    if examples is not None and found < examples:
        raise TaskError(f"{doing}: it has {found} examples, {examples} are asked for; ask for {found} or fewer")
    ordered = [example for _, _, example in sorted(kept, reverse=True)]
    first: dict[Any, int] = {}
    for number, example in enumerate(ordered):
        first.setdefault(_signature(example), number)
    ordered.sort(key=lambda example: first[_signature(example)])
    return Sample(tuple(ordered), found)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs are tensors, or tensors in mappings, lists and tuples. A tensor is per example if its first axis is.


def mapped(part: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return the same structure with the function applied to each tensor."""
    import torch

    if isinstance(part, torch.Tensor):
        return function(part)
    if isinstance(part, Mapping):
        return {key: mapped(value, function) for key, value in part.items()}
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*(mapped(value, function) for value in part))
    if isinstance(part, list | tuple):
        return type(part)(mapped(value, function) for value in part)
    return part


def tensors_of(part: Any) -> list[Tensor]:
    """Return the tensors of a structure, in order."""
    found: list[Tensor] = []
    mapped(part, found.append)
    return found


def size_of(part: Any) -> int | None:
    """Return the number of examples: the length of the first tensor that has an axis."""
    import torch

    if isinstance(part, torch.Tensor):
        return part.shape[0] if part.ndim else None
    return next((tensor.shape[0] for tensor in tensors_of(part) if tensor.ndim), None)


def mask_of(inputs: Any) -> Tensor | None:
    """Return which positions are no padding, (examples, positions) bool: the entry `attention_mask` of a mapping."""
    import torch

    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask != 0 if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


def _sliced(part: Any, place: int, size: int) -> Any:
    def one(tensor: Tensor) -> Tensor:
        if tensor.ndim and tensor.shape[0] == size:
            return tensor.detach()[place : place + 1].to("cpu", copy=True)
        return tensor.detach().to("cpu")

    return mapped(part, one)


def _signature(example: Example) -> tuple[Any, ...]:
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors_of((example.inputs, example.label)))


def _joined(parts: Sequence[Any], device: str) -> Any:
    import torch

    columns = zip(*(tensors_of(part) for part in parts), strict=True)
    joined = iter(
        [
            (torch.cat(column) if column[0].ndim and column[0].shape[0] == 1 else column[0]).to(device)
            for column in columns
        ]
    )
    return mapped(parts[0], lambda tensor: next(joined))
