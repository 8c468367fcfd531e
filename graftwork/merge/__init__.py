"""The merge engine: recipe → plan → engine → writer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftwork.merge.checkpoint import Checkpoint
    from graftwork.merge.errors import GraftworkError
    from graftwork.merge.evaluation import evaluate
    from graftwork.merge.memory import merge_arrays
    from graftwork.merge.plan import Options, Plan, make_plan
    from graftwork.merge.recipe import load_recipe, parse_recipe
    from graftwork.merge.run import Interrupted, MergeResult, Settings, merge
    from graftwork.merge.task import Task, load_task

_HOMES = {
    "Checkpoint": "checkpoint", "GraftworkError": "errors", "Interrupted": "run", "MergeResult": "run",
    "Options": "plan", "Plan": "plan", "Settings": "run", "Task": "task", "evaluate": "evaluation",
    "load_recipe": "recipe", "load_task": "task", "make_plan": "plan", "merge": "run", "merge_arrays": "memory",
    "parse_recipe": "recipe",
}  # fmt: skip

__all__ = [
    "Checkpoint", "GraftworkError", "Interrupted", "MergeResult", "Options", "Plan", "Settings", "Task", "evaluate",
    "load_recipe", "load_task", "make_plan", "merge", "merge_arrays", "parse_recipe",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: a recipe can be checked without numba, a checkpoint opened without torch."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
