"""Merging tensors that are in memory with the same engine that merges files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from graftwork.merge import dtypes
from graftwork.merge.checkpoint import TensorEntry
from graftwork.merge.companions import Beside, companions_of
from graftwork.merge.engine import SPAN, Engine, Input, Step
from graftwork.merge.errors import RecipeError, did_you_mean
from graftwork.merge.methods.registry import REQUIRED, Method, get

Array = np.ndarray[Any, Any]


class MemoryCheckpoint:
    """Tensors in memory, readable like a file: raw words (see `dtypes.RAW`) with their dtype's code by name."""

    def __init__(self, tensors: Mapping[str, tuple[str, Array]]) -> None:
        self._bytes = {
            name: np.ascontiguousarray(words).reshape(-1).view(np.uint8).data for name, (_, words) in tensors.items()
        }
        self.tensors = {
            name: TensorEntry(name, dtype, words.shape, Path(), 0, words.nbytes)
            for name, (dtype, words) in tensors.items()
        }

    def read_into(self, entry: TensorEntry, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of the tensor on."""
        buffer[:] = self._bytes[entry.name][offset : offset + len(buffer)]


class MemorySink:
    """Collects the output's raw words, digests and the digests of what it was made from."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.words = {step.name: np.empty(step.shape, dtypes.RAW[step.dtype]) for step in steps}
        self._bytes = {name: words.reshape(-1).view(np.uint8).data for name, words in self.words.items()}
        self.digests: dict[str, bytes] = {}
        self.input_digests: dict[tuple[int, str], bytes] = {}

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write `data` at byte `offset` of the tensor."""
        self._bytes[name][offset : offset + len(data)] = data

    def read_back(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with what was written."""
        buffer[:] = self._bytes[name][offset : offset + len(buffer)]

    def finish(self, name: str, digest: bytes, inputs: Mapping[tuple[int, str], bytes]) -> None:
        """Take note that the tensor is complete."""
        self.digests[name] = digest
        self.input_digests.update(inputs)


def program_of(method: Method, models: int, parameters: Mapping[str, Any]) -> Any:
    """Return the method's program with its parameters bound, defaults filled in.

    Args:
        method: A registered method.
        models: Number of models.
        parameters: Values by YAML name; a per-model one is a sequence, or one value for all.

    Raises:
        RecipeError: A parameter is unknown, missing, or does not go with the others.
    """
    problems = [
        f'{method.name} has no parameter "{name}"{did_you_mean(name, method.parameters)}'
        for name in parameters
        if name not in method.parameters
    ]
    values: dict[str, Any] = {}
    for parameter in method.parameters.values():
        if not parameter.has_effect:
            continue
        value = parameters.get(parameter.name, parameter.default)
        if value is REQUIRED:
            problems.append(f'{method.name} needs the parameter "{parameter.name}"')
        elif parameter.per_model:
            value = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * models
            value = tuple(float(item) if parameter.type is float and item is not None else item for item in value)
        elif parameter.type is float and value is not None:
            value = float(value)
        values[parameter.keyword] = value
    if problems:
        raise RecipeError(problems)
    problem = method.problem(**values)
    if problem:
        raise RecipeError(f"{method.name}: {problem}")
    return partial(method.program, **values)


def merge_arrays(
    method: str,
    models: Sequence[Mapping[str, tuple[str, Array]]],
    base: Mapping[str, tuple[str, Array]] | None = None,
    *,
    dtype: str | None = None,
    threads: int = 1,
    fuse: bool = False,
    span: int = SPAN,
    streams: Sequence[int] | None = None,
    parameters: Mapping[str, Any] | None = None,
    device: str = "cpu",
    statistics: Mapping[str, Sequence[Mapping[str, tuple[str, Array]] | None]] | None = None,
    shared: Mapping[str, Mapping[str, tuple[str, Array]]] | None = None,
    metadata: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, Array]:
    """Merge mappings from tensor names to (dtype code, raw words) and return the merged raw words.

    `device` is a torch device; "torch:cpu" runs the formulas on CPU tensors instead of compiling them.

    What methods read beside the models is given in the same form: `statistics` by kind for each model, `shared` by kind
    for all; `metadata` is what the file of a kind would have in its header, without the prefix.

    Raises:
        GraftworkError: The method or its parameters are wrong, or the values cannot be merged.
    """
    chosen = get(method)
    given = dict(parameters or {})
    bound = program_of(chosen, len(models), given)
    scope = given.get("scope", chosen.parameters["scope"].default if "scope" in chosen.parameters else "tensor")
    readers = [MemoryCheckpoint(model) for model in models]
    if base is not None:
        readers.append(MemoryCheckpoint(base))
    labels = [f"model {number}" for number in range(len(models))] + ["the base"] * (base is not None)
    holders = list(readers)
    files: dict[str, tuple[Beside | None, ...]] = {}
    for kind, mappings in [*(statistics or {}).items(), *((kind, [one]) for kind, one in (shared or {}).items())]:
        found: list[Beside | None] = []
        for mapping in mappings:
            holder = None if mapping is None else MemoryCheckpoint(mapping)
            label = f"the {kind} file" + (f" of model {len(found)}" if len(mappings) > 1 else "")
            known = dict((metadata or {}).get(kind, {}))
            found.append(None if holder is None else Beside(len(readers), holder, known, label))
            if holder is not None:
                readers.append(holder)
                labels.append(label)
        files[kind] = tuple(found)
    steps = []
    for name, (first, words) in models[0].items():
        inputs = tuple(Input(number, reader.tensors[name]) for number, reader in enumerate(holders))
        beside = companions_of(chosen, name, words.shape, inputs[: len(models)], holders, files, bound.keywords)
        steps.append(
            Step(
                name=name,
                dtype=dtype or dtypes.promoted([item.entry.dtype for item in inputs]) or first,
                shape=words.shape,
                models=inputs[: len(models)],
                base=inputs[-1] if base is not None else None,
                program=bound,
                kind=chosen.kind,
                streams=tuple(streams) if streams is not None else tuple(range(len(models))),
                group="all" if scope == "model" else "",
                companions=beside,
                measured={kind: tuple(item for item in every if item) for kind, every in files.items()},
            )
        )
    sink = MemorySink(steps)
    if device == "cpu":
        Engine(readers, sink, labels, threads=threads, fuse=fuse, span=span).run(steps)
    else:
        from graftwork.merge.device import DeviceEngine

        DeviceEngine(readers, sink, labels, device=device.removeprefix("torch:"), threads=threads).run(steps)
    return sink.words
