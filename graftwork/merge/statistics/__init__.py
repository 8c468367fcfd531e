"""What data-driven merge methods need to know of a model: Fisher information and Gram matrices, measured on a task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftwork.merge.checkpoint import Checkpoint
    from graftwork.merge.statistics.fisher import Fisher, Measured, estimate_fisher, load_fisher, measure_fisher
    from graftwork.merge.statistics.gram import Grams, estimate_grams, measure_gram
    from graftwork.merge.task import Task

_HOMES = {
    "Fisher": "fisher", "Grams": "gram", "Measured": "fisher", "estimate_fisher": "fisher", "estimate_grams": "gram",
    "load_fisher": "fisher", "measure_fisher": "fisher", "measure_gram": "gram",
}  # fmt: skip

__all__ = [
    "Fisher", "Grams", "Measured", "estimate_fisher", "estimate_grams", "load_fisher", "measure_fisher",
    "measure_gram", "measure_to_file",
]  # fmt: skip


def measure_to_file(kind: str, source: Checkpoint, task: Task, out: Path, **settings: Any) -> Measured:
    """Measure a statistic of a checkpoint on a task and write its file.

    Args:
        kind: `fisher` or `gram`.
        source: The checkpoint.
        task: Its model and data.
        out: The file to write.
        settings: Keyword arguments of `measure_fisher` or `measure_gram`.

    Raises:
        TaskError: There is no such kind, or what the measurement raises.
    """
    from graftwork.merge.errors import TaskError
    from graftwork.merge.statistics.fisher import measure_fisher
    from graftwork.merge.statistics.gram import measure_gram

    measures: dict[str, Callable[..., Measured]] = {"fisher": measure_fisher, "gram": measure_gram}
    if kind not in measures:
        raise TaskError(f'cannot measure "{kind}": it is neither fisher nor gram; give a file that holds it')
    return measures[kind](source, task, out, **settings)


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
