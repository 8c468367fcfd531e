"""How good checkpoints are: loss and accuracy of each on the held-out data of each task."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from graftwork.merge.checkpoint import Checkpoint, quoted
from graftwork.merge.errors import TaskError
from graftwork.merge.task import Task, fit, raise_user_failure

if TYPE_CHECKING:
    from torch import Tensor, nn

    Source = Checkpoint | Path | str | Mapping[str, Tensor]
    """An open checkpoint, the path of one, or a state dict."""

Split = Literal["test", "validation", "train"]

_FALLBACK: Mapping[Split, tuple[Split, ...]] = {
    "test": ("test", "validation", "train"),
    "validation": ("validation", "train"),
    "train": ("train",),
}
_IGNORED_LABEL = -100
"""Torch's cross-entropy leaves these labels out."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How one checkpoint does on one task.

    Args:
        checkpoint: The checkpoint's name.
        task: The task's name.
        split: The data that was used, which is not what was asked for if the task lacks that.
        loss: Mean over the examples; NaN or infinite if the model's outputs are.
        accuracy: Share of labels that are the largest logit; None where labels are not classes.
        examples: How many there were.
        seconds: How long it took.
    """

    checkpoint: str
    task: str
    split: Split
    loss: float
    accuracy: float | None
    examples: int
    seconds: float

    @property
    def is_finite(self) -> bool:
        """Whether the loss is a number."""
        return math.isfinite(self.loss)

    def record(self) -> dict[str, Any]:
        """Return it for JSON, which has no NaN: a loss that is not finite is the text `"nan"` or `"inf"`."""
        return {
            "checkpoint": self.checkpoint,
            "task": self.task,
            "split": self.split,
            "loss": self.loss if self.is_finite else str(self.loss),
            "accuracy": self.accuracy,
            "examples": self.examples,
            "seconds": round(self.seconds, 3),
        }


def evaluate(
    checkpoints: Mapping[str, Source] | Sequence[Checkpoint | Path | str],
    tasks: Sequence[Task],
    *,
    split: Split = "test",
    device: str = "cpu",
    progress: Callable[[Evaluation], None] | None = None,
) -> list[Evaluation]:
    """Return the evaluation of every checkpoint on every task, checkpoint by checkpoint, in the order given.

    Models run in evaluation mode without gradients; torch's random state is the same for each pair and is left
    untouched. A task that lacks the split is judged on the next one of test, validation, train.

    Args:
        checkpoints: By name; or open checkpoints and paths, which are named by their path.
        tasks: The tasks, with different names.
        split: The data to use.
        device: Where models run.
        progress: Called with each result.

    Raises:
        TaskError: A checkpoint does not fit a task's model, a split is empty or has no labels, or the task fails.
    """
    repeated = sorted({task.name for task in tasks if [other.name for other in tasks].count(task.name) > 1})
    if repeated:
        raise TaskError(f"cannot evaluate: two tasks are called {quoted(repeated[0])}; give them different names")
    named = checkpoints if isinstance(checkpoints, Mapping) else {_path(source): source for source in checkpoints}
    evaluations: list[Evaluation] = []
    with own_random_state(device):
        for name, source in named.items():
            for task, module in zip(tasks, _modules(name, source, tasks), strict=True):
                evaluations.append(_evaluate_one(name, task, module, split, device))
                if progress is not None:
                    progress(evaluations[-1])
    return evaluations


def chosen_split(task: Task, split: Split = "test") -> tuple[Split, Callable[[], Iterable[tuple[Any, Any]]]]:
    """Return the split that the task has nearest to what is asked for, and its batches."""
    held: dict[Split, Callable[[], Iterable[tuple[Any, Any]]] | None] = {
        "test": task.test,
        "validation": task.validation,
        "train": task.batches,
    }
    for candidate in _FALLBACK[split]:
        batches = held[candidate]
        if batches is not None:
            return candidate, batches
    raise TaskError(f"task {quoted(task.name)} has no data")


def logits_of(task: Task, module: nn.Module, inputs: Any) -> Tensor:
    """Return the module's logits, as the task defines them."""
    return module(inputs) if task.logits is None else task.logits(module, inputs)


def _path(source: Checkpoint | Path | str) -> str:
    return str(source.path) if isinstance(source, Checkpoint) else str(source)


def _modules(name: str, source: Source, tasks: Sequence[Task]) -> list[nn.Module]:
    """Return each task's model with the values of one checkpoint, which is open no longer than this takes."""
    if isinstance(source, str | Path):
        with Checkpoint.open(source) as opened:
            return [fit(task, opened, name=name) for task in tasks]
    return [fit(task, source, name=name) for task in tasks]


@contextlib.contextmanager
def own_random_state(device: str) -> Iterator[None]:
    """Leave torch's random state, on the CPU and the device, as it was before."""
    import torch

    with torch.random.fork_rng(devices=[torch.device(device)] if device.startswith("cuda") else []):
        yield


def _evaluate_one(name: str, task: Task, module: nn.Module, split: Split, device: str) -> Evaluation:
    import torch

    used, batches = chosen_split(task, split)
    doing = f"cannot evaluate {quoted(name)} on task {quoted(task.name)}"
    totals = _Totals()
    started = time.perf_counter()
    # A model that draws random numbers even in evaluation mode draws the same ones each time.
    torch.manual_seed(0)
    with torch.inference_mode():
        module.to(device).eval()
        try:
            for number, batch in enumerate(batches()):
                _add_batch(totals, task, module, batch, device, f"{doing}: batch {number} of the {used} split")
        except BaseException as error:
            raise_user_failure(error, doing)
    if totals.examples == 0:
        raise TaskError(f"{doing}: its {used} split is empty")
    return Evaluation(
        checkpoint=name,
        task=task.name,
        split=used,
        loss=totals.loss / totals.weight if totals.weight else math.nan,
        accuracy=totals.correct / totals.judged if totals.judged and totals.has_classes else None,
        examples=totals.examples,
        seconds=time.perf_counter() - started,
    )


@dataclass(slots=True)
class _Totals:
    """Sums over the batches of a split, in double precision and whole numbers."""

    loss: float = 0.0
    weight: float = 0.0
    correct: int = 0
    judged: int = 0
    examples: int = 0
    has_classes: bool = True


def _add_batch(totals: _Totals, task: Task, module: nn.Module, batch: Any, device: str, where: str) -> None:
    import torch
    from torch.nn.functional import cross_entropy

    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise TaskError(f"{where} is {type(batch).__name__}, not a pair (inputs, labels)")
    inputs, labels = (moved(part, device) for part in batch)
    if labels is None:
        raise TaskError(f"{where} has no labels; evaluation needs them")
    logits = logits_of(task, module, inputs)
    size = len(labels)
    totals.examples += size
    is_classes = isinstance(labels, torch.Tensor) and not labels.is_floating_point() and not labels.is_complex()
    if task.loss is None:
        if not is_classes:
            totals.loss += float(cross_entropy(logits.double(), labels)) * size
            totals.weight += size
        else:
            totals.loss += float(cross_entropy(logits.double(), labels, reduction="sum", ignore_index=_IGNORED_LABEL))
            totals.weight += int((labels != _IGNORED_LABEL).sum())
    else:
        totals.loss += float(task.loss(logits, labels)) * size
        totals.weight += size
    if is_classes and logits.ndim == labels.ndim + 1 and logits.shape[:1] + logits.shape[2:] == labels.shape:
        counted = labels != _IGNORED_LABEL
        totals.correct += int(((logits.argmax(dim=1) == labels) & counted).sum())
        totals.judged += int(counted.sum())
    else:
        totals.has_classes = False


def moved(part: Any, device: str) -> Any:
    """Return inputs or labels on the device: a tensor, or tensors in a mapping, list or tuple."""
    if isinstance(part, Mapping):
        return {key: moved(value, device) for key, value in part.items()}
    if isinstance(part, list | tuple) and not hasattr(part, "_fields"):
        return type(part)(moved(value, device) for value in part)
    return part.to(device) if hasattr(part, "to") else part
