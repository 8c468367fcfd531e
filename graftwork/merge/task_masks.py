"""What EMR merging and TALL masks write beside the merged model, so that each task's own model comes back from it.

The file is an artifact of the kind `task_masks`. For every merged tensor it holds `graftwork.delta.NAME` (τ, in the
output's dtype) and, for every task, `graftwork.mask.TASK.NAME`: one bit per element, element e being bit e mod 8 of
byte e div 8. `graftwork.rescale` (tasks,) holds a factor for each task. The model of a task is

    b + rescale · mask ∘ delta

and b itself for tensors that were not merged. The first parent is the base, the others are the tasks' models; the
metadata key `tasks` lists their names.

The file is made after the merge, by passes of the engine over the same inputs: it streams, and equals on every machine
what the merge has decided. It becomes visible together with the merged model. An interrupted merge that goes on makes
it anew.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from graftwork.merge import dtypes, lineage
from graftwork.merge.artifact import Artifact, load_artifact
from graftwork.merge.checkpoint import TASK_MASKS_NAME, Checkpoint
from graftwork.merge.engine import Sink, Step
from graftwork.merge.errors import MismatchError, OutputError, did_you_mean
from graftwork.merge.methods.task_model import DELTA, MASK, RESCALE
from graftwork.merge.passes import Group, TaskMasks
from graftwork.merge.plan import Plan, canonical_recipe
from graftwork.merge.writer import OutputTensor, header_bytes

Array = np.ndarray[Any, np.dtype[Any]]

KIND = "task_masks"

_AT_ONCE = 48
"""Tasks whose masks are made by one pass; so many bits are exact in a float64."""


class Runs(Protocol):
    """What carries out steps."""

    def run(self, steps: Sequence[Step]) -> None:
        """Make the tensors of all steps."""


def place_of(out: Path) -> Path:
    """Return where the file of an output lies: in its folder, or beside the only file, named after it."""
    return out.with_name(f"{out.stem}.{TASK_MASKS_NAME}") if out.suffix == ".safetensors" else out / TASK_MASKS_NAME


def write_task_masks(
    plan: Plan, path: Path, parents: Sequence[Mapping[str, Any]], engine: Callable[[Sink], Runs]
) -> None:
    """Write the file for a plan whose method has task masks.

    Args:
        plan: The plan.
        path: The file; what is there is replaced.
        parents: Records of the base and the models, in this order.
        engine: Returns an engine that reads the plan's inputs and writes to a sink.

    Raises:
        OutputError: It cannot be written.
        DataError: An input holds a NaN or an infinity.
    """
    steps = [step for step in plan.merged if step.base is not None]
    models = list(dict.fromkeys(item.model for step in steps for item in step.models))
    labels = [plan.labels[model] for model in models]
    short = [label.removesuffix(".safetensors") for label in labels]
    tasks = short if len(set(short)) == len(short) else labels
    outputs: list[OutputTensor] = []
    for step in steps:
        size = step.elements * dtypes.BITS[step.dtype] // 8
        packed = -(-step.elements // 8)
        outputs.append(OutputTensor(DELTA + step.name, step.dtype, step.shape, size))
        outputs.extend(OutputTensor(mask_name(task, step.name), "U8", (packed,), packed) for task in tasks)
    outputs.append(OutputTensor(RESCALE, "F32", (len(tasks),), 4 * len(tasks)))
    recipe = canonical_recipe(plan.recipe, plan.labels_by_text())
    metadata = lineage.metadata(
        KIND, method=plan.method.name, recipe=recipe, parents=parents, digest=lineage.EMPTY_DIGEST,
        tasks=json.dumps(tasks, ensure_ascii=False),
    )  # fmt: skip
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            places = _lay_out(descriptor, outputs, metadata)
            rescale = _fill(plan, steps, tasks, engine, descriptor, places)
            os.pwrite(descriptor, rescale.astype("<f4").tobytes(), places[RESCALE])
            with Checkpoint.open(path) as written:
                digest = written.content_digest()
            os.pwrite(descriptor, header_bytes(outputs, {**metadata, lineage.PREFIX + "digest": digest}), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; check the path and its permissions"
        ) from None


def _lay_out(descriptor: int, outputs: Sequence[OutputTensor], metadata: Mapping[str, str]) -> dict[str, int]:
    """Write the header, claim the room, and return where each tensor goes."""
    header = header_bytes(outputs, metadata)
    places: dict[str, int] = {}
    end = len(header)
    for tensor in outputs:
        places[tensor.name] = end
        end += tensor.size
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, end)
    os.pwrite(descriptor, header, 0)
    return places


def _fill(
    plan: Plan, steps: Sequence[Step], tasks: Sequence[str], engine: Callable[[Sink], Runs], descriptor: int,
    places: Mapping[str, int],
) -> Array:  # fmt: skip
    """Write the merged task vectors and the masks; return the tasks' rescalers."""
    second = plan.method.task_masks
    assert second is not None
    norms: dict[str, Array] = {}

    def found(step: Step, group: Group) -> Generator[Any, Any, TaskMasks]:
        bound = step.program
        assert isinstance(bound, partial)
        answer = second(group, **bound.keywords)
        made: TaskMasks = (yield from answer) if hasattr(answer, "send") else answer
        return made

    def delta(step: Step, group: Group) -> Generator[Any, Any, Any]:
        return (yield from found(step, group)).delta

    def bits(step: Step, first: int, group: Group) -> Generator[Any, Any, Any]:
        made = yield from found(step, group)
        if made.norms is not None and not first:
            norms[group.name] = (yield made.norms) / (group.size if made.by_tensor else 1)
        worth = tuple(2.0 ** (task - first) if 0 <= task - first < _AT_ONCE else 0.0 for task in range(group.models))
        return replace(made.masks, parameters={**made.masks.parameters, "worth": worth})

    engine(_Deltas(descriptor, places)).run([replace(step, program=partial(delta, step), notes=[]) for step in steps])
    for first in range(0, len(tasks), _AT_ONCE):
        masks = [replace(step, program=partial(bits, step, first), dtype="F64", notes=[]) for step in steps]
        engine(_Masks(descriptor, places, tasks[first : first + _AT_ONCE])).run(masks)
    if not norms:
        return np.ones(len(tasks))
    # Tensors one after another in the order of their names, so that threads make no difference.
    whole, masked = np.sum([norms[name] for name in sorted(norms)], axis=0).reshape(-1, 2).T
    return np.where(masked > 0, whole / np.where(masked > 0, masked, 1.0), 1.0)


class _Deltas:
    """Takes the merged task vectors."""

    def __init__(self, descriptor: int, places: Mapping[str, int]) -> None:
        self.descriptor = descriptor
        self.places = places

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write `data` at byte `offset` of the tensor."""
        _write_all(self.descriptor, data, self.places[DELTA + name] + offset)

    def finish(self, name: str, digest: bytes, inputs: Mapping[tuple[int, str], bytes]) -> None:
        """Nothing remains to be done."""


class _Masks:
    """Takes float64 numbers whose bits are the masks of some tasks."""

    def __init__(self, descriptor: int, places: Mapping[str, int], tasks: Sequence[str]) -> None:
        self.descriptor = descriptor
        self.places = places
        self.tasks = tasks

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write the masks of the elements that `data` stands for; `offset` is that of a whole byte of masks."""
        words = np.frombuffer(data, np.float64).astype(np.uint64)
        for bit, task in enumerate(self.tasks):
            packed = np.packbits((words >> np.uint64(bit) & np.uint64(1)).astype(np.uint8), bitorder="little")
            _write_all(self.descriptor, packed.data, self.places[mask_name(task, name)] + offset // 64)

    def finish(self, name: str, digest: bytes, inputs: Mapping[tuple[int, str], bytes]) -> None:
        """Nothing remains to be done."""


def _write_all(descriptor: int, data: memoryview, place: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, place)
        data, place = data[written:], place + written


def mask_name(task: str, name: str) -> str:
    """Return the name of a task's mask of a tensor."""
    return f"{MASK}{task}.{name}"


def task_tensors(
    base: Mapping[str, Array], masks: Artifact | Path | str, task: str
) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """Return the model of one task: the base's tensors, changed where the file says so, in their own dtypes.

    Args:
        base: The base's tensors.
        masks: The file, or what `load_artifact` makes of it.
        task: The name of the task's model in the merge.

    Raises:
        CheckpointError: It is no such file.
        MismatchError: It has no such task, or a tensor of another shape.
    """
    file = masks if isinstance(masks, Artifact) else load_artifact(masks, kind=KIND)
    tasks = json.loads(file.metadata["tasks"])
    if task not in tasks:
        known = ", ".join(f'"{name}"' for name in tasks)
        hint = did_you_mean(task, tasks) or f"; it has {known}"
        raise MismatchError(f'cannot make the model of "{task}": {file.path} has no such task{hint}')
    factor = float(file.tensors[RESCALE][tasks.index(task)])
    result: dict[str, Array] = {}
    for name, values in base.items():
        delta = file.tensors.get(DELTA + name)
        if delta is None:
            result[name] = values.copy()
            continue
        if delta.shape != values.shape:
            raise MismatchError(
                f'cannot make the model of "{task}": "{name}" has the shape {list(values.shape)}, and '
                f"{list(delta.shape)} in {file.path}; give the base that was merged"
            )
        bits = np.unpackbits(file.tensors[mask_name(task, name)], count=values.size, bitorder="little")
        change = factor * delta.astype(np.float64) * bits.reshape(values.shape)
        result[name] = (values.astype(np.float64) + change).astype(values.dtype)
    return result
