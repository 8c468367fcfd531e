"""What a merge reads beside the models: files of what was measured on each of them, or learned for all.

A method names the kinds of file that it needs (`statistics`, one file per model; `shared`, one for all) and says which
of their tensors go with an output tensor (`companions`); see `graftwork.merge.methods.registry`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from graftwork.merge import dtypes, lineage
from graftwork.merge.checkpoint import Checkpoint, TensorEntry, numpy_values
from graftwork.merge.engine import Input
from graftwork.merge.errors import CheckpointError, MismatchError
from graftwork.merge.methods.registry import Method


class Holder(Protocol):
    """Anything that tensors can be read from: a checkpoint, or tensors in memory."""

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Its tensors by name."""

    def read_into(self, entry: TensorEntry, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of the tensor on."""


@dataclass(frozen=True, slots=True)
class Beside:
    """One file that is read beside the models.

    Args:
        place: Position of its reader among the engine's.
        holder: What it is read from.
        metadata: Its metadata, without the prefix `graftwork.`.
        label: What messages call it.
    """

    place: int
    holder: Holder
    metadata: dict[str, str]
    label: str

    def values(self, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return a small tensor of the file, as float64.

        Raises:
            CheckpointError: It has no such tensor.
        """
        entry = self.holder.tensors.get(name)
        if entry is None:
            raise CheckpointError(f'cannot use {self.label}: it has no tensor "{name}"; make it again')
        data = bytearray(entry.size)
        self.holder.read_into(entry, 0, memoryview(data))
        found = numpy_values(entry.dtype, data)
        assert found is not None
        return found.astype(np.float64).reshape(entry.shape)


Files = Mapping[str, tuple[Beside | None, ...]]
"""Files by kind: one per model (None where a model has none), or a single one for all models."""


def opened(place: int, path: Any, kind: str, what: str) -> tuple[Checkpoint, Beside]:
    """Open a file of a kind.

    Raises:
        CheckpointError: It cannot be read, or is of another kind.
    """
    checkpoint = Checkpoint.open(path, what=what)
    found = checkpoint.metadata.get(lineage.PREFIX + "kind")
    if found != kind:
        checkpoint.close()
        raise CheckpointError(
            f"cannot use {checkpoint.path} as {what}: "
            + (f'it is of the kind "{found}"' if found else "it is a checkpoint without graftwork's metadata")
            + f', not "{kind}"; give a file that `graftwork` made for this'
        )
    own = {
        key.removeprefix(lineage.PREFIX): value
        for key, value in checkpoint.metadata.items()
        if key.startswith(lineage.PREFIX)
    }
    return checkpoint, Beside(place, checkpoint, own, what)


def check_parent(beside: Checkpoint, number: int, model: Checkpoint, what: str, label: str) -> None:
    """Make sure that a file was made from a model.

    Args:
        beside: The file.
        number: Which of the file's parents the model has to be.
        model: The model.
        what: What the file is called.
        label: What the model is called.

    Raises:
        MismatchError: It was made from another one.
    """
    parents = lineage.own_parents(beside.metadata)
    record = parents[number] if number < len(parents) else {}
    if record.get("quick") == model.quick_digest():
        return
    digest = model.content_digest()
    if record.get("digest") == digest:
        return
    made = f"{record.get('name', '?')} ({str(record.get('digest', 'unknown'))[:12]})"
    raise MismatchError(
        f"cannot use {beside.path} as {what}: it was made from {made}, but {label} holds {digest[:12]}; "
        f"make it again from {label}"
    )


def companions_of(
    method: Method,
    name: str,
    shape: tuple[int, ...],
    models: Sequence[Input],
    holders: Sequence[Holder],
    files: Files,
    parameters: Mapping[str, Any],
) -> dict[str, tuple[Input, ...]]:
    """Return what is read beside the models for one output tensor.

    Args:
        method: The merge method.
        name: The tensor's name, in the output and in all models.
        shape: Its shape.
        models: Where the models have it.
        holders: The engine's readers of the models, by position.
        files: The files.
        parameters: The method's parameters for this tensor.

    Raises:
        MismatchError: Something that the method needs is missing or of another shape.
    """
    if method.companions is None:
        return {}
    available: dict[str, list[Collection[str]]] = {"model": [holders[item.model].tensors for item in models]}
    for kind, found in files.items():
        available[kind] = [() if beside is None else beside.holder.tensors for beside in found]
    result: dict[str, tuple[Input, ...]] = {}
    for key, (kind, tensor) in method.companions(name, available, parameters).items():
        if kind == "model":
            inputs = [Input(item.model, holders[item.model].tensors[tensor]) for item in models]
        else:
            sources = files[kind]
            inputs = [Input(beside.place, beside.holder.tensors[tensor]) for beside in sources if beside is not None]
            if kind in method.shared:
                inputs = inputs * len(models)
        for item in inputs:
            if item.entry.dtype == "U8" and item.entry.shape == (-(-math.prod(shape) // 8),):
                continue  # a mask of one bit per element
            wrong = item.entry.shape != shape and method.kind != "matrix"
            if wrong or item.entry.dtype not in dtypes.MERGEABLE:
                raise MismatchError(
                    f'cannot merge "{name}": it has the shape {list(shape)}, but "{tensor}" of the {kind} file is '
                    f"{item.entry.dtype} of the shape {list(item.entry.shape)}; make that file again"
                )
        result[key] = tuple(inputs)
    return result
