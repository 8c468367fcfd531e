"""A site's examples in memory, and how a local update goes through them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from graftwork.merge.checkpoint import quoted
from graftwork.merge.errors import TaskError
from graftwork.merge.task import raise_user_failure

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Examples:
    """Inputs with their labels.

    Args:
        inputs: A tensor whose first dimension counts examples, or a mapping of such tensors.
        labels: Likewise; None for examples without labels.
        device: Where `take` brings what it takes; all examples together stay where they are.
    """

    inputs: Any
    labels: Tensor | None
    device: str = "cpu"

    def __len__(self) -> int:
        if self.labels is not None:
            return len(self.labels)
        return len(next(iter(self.inputs.values())) if isinstance(self.inputs, Mapping) else self.inputs)

    def take(self, index: Any) -> Examples:
        """Return the examples that an index tensor, an integer array or a slice chooses."""
        import torch

        if isinstance(index, np.ndarray):
            index = torch.from_numpy(np.ascontiguousarray(index))
        inputs = self.inputs
        chosen = {key: value[index] for key, value in inputs.items()} if isinstance(inputs, Mapping) else inputs[index]
        labels = None if self.labels is None else self.labels[index]
        if self.device != "cpu":
            chosen = moved(chosen, self.device)
            labels = None if labels is None else labels.to(self.device)
        return Examples(chosen, labels)

    def on(self, device: object) -> Examples:
        """Return the same examples, which `take` brings to a device."""
        name = str(device)
        return self if name == self.device else dataclasses.replace(self, device=name)


def moved(inputs: Any, device: str) -> Any:
    """Return a tensor, or a mapping of tensors, on a device."""
    if isinstance(inputs, Mapping):
        return {key: value.to(device) for key, value in inputs.items()}
    return inputs.to(device)


def collect(batches: Callable[[], Iterable[tuple[Any, Any]]], where: str) -> Examples:
    """Return all that a task's batches hold, in their order.

    Raises:
        TaskError: There is nothing, or batches are no pairs of tensors that can be strung together.
    """
    import torch

    inputs: list[Any] = []
    labels: list[Any] = []
    try:
        for number, batch in enumerate(batches()):
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise TaskError(f"{where}: batch {number} is {type(batch).__name__}, not a pair (inputs, labels)")
            inputs.append(batch[0])
            labels.append(batch[1])
    except BaseException as error:
        raise_user_failure(error, where)
    if not inputs:
        return Examples(torch.empty(0), torch.empty(0, dtype=torch.int64))
    has_labels = all(label is not None for label in labels)
    try:
        if isinstance(inputs[0], Mapping):
            joined: Any = {key: torch.cat([part[key] for part in inputs]) for key in inputs[0]}
        else:
            joined = torch.cat([torch.as_tensor(part) for part in inputs])
        return Examples(joined, torch.cat([torch.as_tensor(part) for part in labels]) if has_labels else None)
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise TaskError(
            f"{where}: batches cannot be strung together ({quoted(reason)}); let inputs be tensors, or mappings of "
            "tensors, whose first dimension counts examples"
        ) from None


def minibatches(count: int, size: int, generator: np.random.Generator, *, smallest: int = 2) -> Iterator[Any]:
    """Yield the shuffled numbers 0 … count − 1 in arrays of `size`: one pass.

    A last one below `smallest` is left out, because batch normalisation cannot learn from one example; unless it is
    all there is.
    """
    order = generator.permutation(count)
    for start in range(0, count, size):
        part = order[start : start + size]
        if len(part) >= smallest or count < smallest:
            yield part


def endless_minibatches(count: int, size: int, generator: np.random.Generator) -> Iterator[Any]:
    """Yield arrays of `min(size, count)` numbers for ever, shuffled anew after each pass; nothing left over is used."""
    size = min(size, count)
    while True:
        order = generator.permutation(count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]
