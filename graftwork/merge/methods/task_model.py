"""The model of one task, from the base and what EMR merging or TALL masks have written beside the merged model."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from graftwork.merge.errors import MismatchError, did_you_mean
from graftwork.merge.methods.registry import Available, Parameter, register
from graftwork.merge.passes import Apply, Companion, Group
from graftwork.merge.vocabulary import Value, where, zeros_like

DELTA, MASK, RESCALE = "graftwork.delta.", "graftwork.mask.", "graftwork.rescale"
"""How the tensors of a task_masks file are called: `DELTA + name`, `MASK + task + "." + name`, and `RESCALE`."""


def tensor_names(name: str, available: Available, parameters: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return what is read for a tensor: nothing for one that was not merged.

    Raises:
        MismatchError: There is no such task.
    """
    (held,) = available["task_masks"]
    mask = f"{MASK}{parameters['task']}.{name}"
    if mask in held:
        return {"delta": ("task_masks", DELTA + name), "mask": ("task_masks", mask)}
    tasks = tasks_of(held)
    if parameters["task"] not in tasks:
        known = ", ".join(f'"{task}"' for task in tasks)
        wrong = f'parameters.task: the task_masks file has no task "{parameters["task"]}"'
        raise MismatchError(f"{wrong}{did_you_mean(parameters['task'], tasks) or f'; it has {known}'}")
    return {}


def tasks_of(held: Collection[str]) -> list[str]:
    """Return the tasks that have a mask for every merged tensor among these names."""
    merged = [name.removeprefix(DELTA) for name in held if name.startswith(DELTA)]
    end = "." + merged[0] if merged else ""
    found = [name.removeprefix(MASK).removesuffix(end) for name in held if name.startswith(MASK) and name.endswith(end)]
    return [task for task in found if all(f"{MASK}{task}.{name}" in held for name in merged)]


def unmasked(
    models: Sequence[Value], base: Value, index: Value, *, delta: Sequence[Value], mask: Sequence[Value], factor: float
) -> Value:
    """Return x + r·m∘τ."""
    total = zeros_like(base)
    for x, change, kept in zip(models, delta, mask):  # noqa: B905 - numba knows no strict=
        total = total + (x + where(kept != 0, factor * change, zeros_like(base)))
    return total


def unchanged(models: Sequence[Value], base: Value, index: Value) -> Value:
    """Return the model's value."""
    return base


@register(
    "task_model",
    title="Model of one task",
    kind="elementwise",
    base="ignored",
    formula="b + rᵢ mᵢ∘τ,  the only model being b; τ, mᵢ and rᵢ from the file that `emr` or `tall_masks` has written",
    reference="https://arxiv.org/abs/2405.17461",
    parameters=(Parameter("task", "name of the task's model in the merge", type=str, extension=True),),
    models=(1, 1),
    shared=("task_masks",),
    companions=tensor_names,
)
def task_model(group: Group, *, task: str) -> Apply:
    """Give one task's model back from the base, the merged task vector and the task's mask and rescaler."""
    if not group.companions:
        return Apply(unchanged)
    (file,) = group.measured["task_masks"]
    place = json.loads(file.metadata["tasks"]).index(task)
    factor = float(file.values(RESCALE)[place])
    return Apply(unmasked, {"delta": Companion("delta"), "mask": Companion("mask"), "factor": factor}, "float64")
