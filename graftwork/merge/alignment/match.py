"""Aligning one checkpoint to another: find the spec, find the order, write the re-ordered model and the permutation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash

from graftwork.merge import dtypes, lineage
from graftwork.merge.alignment.apply import Permutation, moved_share, permute_tensor, save_permutation
from graftwork.merge.alignment.families import RESIDUAL, family_spec
from graftwork.merge.alignment.spec import PermutationSpec, shapes_of
from graftwork.merge.artifact import parent_of
from graftwork.merge.checkpoint import BLOCK, Checkpoint, content_digest, quoted, tensor_digest
from graftwork.merge.errors import CheckpointError, DataError, GraftworkError, MismatchError, OutputError, TaskError
from graftwork.merge.folder import side_files, weights_order
from graftwork.merge.task import Task, load_object, raise_user_failure
from graftwork.merge.writer import CheckpointWriter, OutputTensor, check_output

if TYPE_CHECKING:
    from graftwork.merge.alignment.matching import Matching, MatchingProgress

Method = Literal["weights", "activations", "ste"]

_KEPT = "the stream that all blocks of a transformer add to; --residual frees it"

_WORDS: Mapping[int, np.dtype[Any]] = {8: np.dtype("u1"), 16: np.dtype("<u2"), 32: np.dtype("<u4"), 64: np.dtype("<u8")}


# ---------------------------------------------------------------------------------------------------------------------
# Finding the spec


def find_spec(
    checkpoint: Checkpoint,
    *,
    file: Path | None = None,
    module: str | None = None,
    family: str | None = None,
    task: Task | None = None,
    residual: bool = False,
) -> PermutationSpec:
    """Return which units of a checkpoint may be re-ordered.

    A spec file is used if there is one, else a module that is traced, else the family that is named, else the family
    that the names of the tensors tell; if they tell none, the model of a task is traced on its first batch.

    Args:
        checkpoint: Whose units.
        file: A spec as JSON.
        module: `file.py:make`, a function that returns (module, example inputs).
        family: One of `graftwork.merge.alignment.families.FAMILIES`.
        task: Its model is traced if nothing else is known.
        residual: Whether the residual stream of a transformer whose family is known may be re-ordered, too.

    Raises:
        GraftworkError: There is no spec, or it does not fit the checkpoint.
    """
    what, shapes = quoted(checkpoint.path), shapes_of(checkpoint.tensors)
    if file is not None:
        try:
            text = file.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"cannot read the permutation spec {quoted(file)}: {error.strerror or error}"
            ) from None
        return PermutationSpec.from_json(text, shapes=shapes, what=quoted(file)).verified(shapes, what=what)
    if module is not None:
        return _traced(checkpoint, *_made(module), what=f"the module of {quoted(module)}")
    try:
        spec = family_spec(shapes, family=family, config=checkpoint.config, what=what)
    except MismatchError:
        if task is None or family is not None:
            raise
        return _traced(checkpoint, *_first_batch(task), what=f"the model of task {quoted(task.name)}")
    return spec if residual or RESIDUAL not in spec.groups else spec.pin({RESIDUAL: _KEPT})


def _traced(checkpoint: Checkpoint, module: Any, inputs: Any, *, what: str) -> PermutationSpec:
    from graftwork.merge.alignment.derive import derive_spec

    spec = derive_spec(module, inputs, names=checkpoint.tensors.keys(), what=what)
    return spec.verified(shapes_of(checkpoint.tensors), what=quoted(checkpoint.path))


def _made(place: str) -> tuple[Any, Any]:
    """Return the module and example inputs that `file.py:make` makes."""
    from torch import nn

    make = load_object(place)
    doing = f"cannot trace {quoted(place)}"
    if not callable(make) or isinstance(make, nn.Module):
        raise TaskError(f"{doing}: it is no function; give one that returns (module, example inputs)")
    try:
        made = make()
    except BaseException as error:
        raise_user_failure(error, doing)
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
        raise TaskError(
            f"{doing}: it returns {type(made).__name__}, not (module, example inputs); inputs are a tensor, a tuple of "
            "arguments or a dictionary"
        )
    return made


def _first_batch(task: Task) -> tuple[Any, Any]:
    doing = f"cannot trace the model of task {quoted(task.name)}"
    try:
        module = task.model()
        inputs, _ = next(iter(task.batches()))
    except BaseException as error:
        raise_user_failure(error, doing)
    return module, inputs


# ---------------------------------------------------------------------------------------------------------------------
# Finding the order, and writing


@dataclass(frozen=True, slots=True)
class GroupReport:
    """What became of one group.

    Args:
        name: Its name.
        size: Its units.
        blocks: How many orders it has: one, or one in each unit of the group that it is within.
        gain: What its order adds to the inner product of both models; None where nothing was measured.
        moved: Which share of its units are not at their old place.
        pinned: Why it keeps its order; empty if it is free.
    """

    name: str
    size: int
    blocks: int
    gain: float | None
    moved: float
    pinned: str


@dataclass(frozen=True, slots=True)
class AlignmentResult:
    """What `align_checkpoints` did.

    Args:
        out: The re-ordered model.
        permutation_file: The permutation.
        digest: Content digest of the re-ordered model.
        spec: What could be re-ordered.
        matching: The order and how it was found.
        groups: One report per group.
    """

    out: Path
    permutation_file: Path
    digest: str
    spec: PermutationSpec
    matching: Matching
    groups: tuple[GroupReport, ...]

    def record(self) -> dict[str, Any]:
        """Return the report as JSON holds it."""
        return {
            "out": str(self.out),
            "permutation": str(self.permutation_file),
            "digest": self.digest,
            "spec": self.spec.source,
            "objective_before": self.matching.objective_before,
            "objective_after": self.matching.objective_after,
            "distance_before": self.matching.distance_before,
            "distance_after": self.matching.distance_after,
            "distance_ratio": self.matching.distance_ratio,
            "sweeps": self.matching.sweeps,
            "groups": [
                {
                    "name": group.name,
                    "size": group.size,
                    "blocks": group.blocks,
                    "gain": group.gain,
                    "moved": group.moved,
                    "pinned": group.pinned,
                }
                for group in self.groups
            ],
            "pinned_axes": [
                {"tensor": tensor, "axis": axis, "reason": why} for (tensor, axis), why in self.spec.pinned.items()
            ],
        }


def permutation_place(out: Path) -> Path:
    """Return where the permutation of an output is written by default: beside it."""
    return out.with_name(out.name.removesuffix(".safetensors") + ".permutation.safetensors")


def align_checkpoints(
    a: Checkpoint,
    b: Checkpoint,
    out: Path,
    spec: PermutationSpec,
    *,
    method: Method = "weights",
    task: Task | None = None,
    permutation_file: Path | None = None,
    seed: int = 0,
    restarts: int = 1,
    device: str = "cpu",
    force: bool = False,
    restart: bool = False,
    progress: Callable[[MatchingProgress], None] | None = None,
    written: Callable[[int], None] | None = None,
) -> AlignmentResult:
    """Re-order the units of B so that they match those of A, and write the result and the permutation.

    Values are moved bit by bit, whatever their dtype, tensor by tensor; metadata names B and A as parents.

    Args:
        a: The model that stays.
        b: The model whose units are re-ordered.
        out: A folder, or a file whose name ends in `.safetensors`.
        spec: Of A; it has to fit B as well.
        method: How to match: weights, activations on the task's data, or weights refined by the straight-through
            estimator on it.
        task: For the latter two.
        permutation_file: Where the permutation goes; beside the output if None.
        seed: Of the order in which groups are visited.
        restarts: How many descents, of which the best counts; for weights.
        device: Where scores are formed.
        force: Replace outputs that exist.
        restart: Do not go on with an unfinished output.
        progress: Called while the order is searched for.
        written: Gets numbers of bytes while the output is written.

    Raises:
        GraftworkError: Something that the user can put right; nothing is left behind.
    """
    place = permutation_file or permutation_place(out)
    inputs = [a.path, b.path]
    if place.resolve() == out.resolve():
        raise OutputError(f"cannot write {out}: it is also the place of the permutation; choose another")
    if place.suffix != ".safetensors":
        raise OutputError(f"cannot write {place}: the name of a permutation file ends in .safetensors")
    for target in (out, place):
        check_output(target, force=force, inputs=inputs)
    spec = spec.verified(shapes_of(a.tensors), what=quoted(a.path)).verified(shapes_of(b.tensors), what=quoted(b.path))
    matching = _matched(spec, a, b, method, task, seed, restarts, device, progress)
    records = {"a": parent_of(a, _label(a, b)), "b": parent_of(b, _label(b, a))}
    settings: dict[str, Any] = {"method": method}
    if method != "activations":
        settings["seed"] = seed
    if method == "weights":
        settings["restarts"] = restarts
    digest = write_reordered(
        b,
        out,
        spec,
        matching.permutation,
        parents=[records["b"], records["a"]],
        settings=settings,
        force=force,
        restart=restart,
        written=written,
    )
    save_permutation(
        place,
        spec,
        matching.permutation,
        a=records["a"],
        b=records["b"],
        method=f"match_{method}",
        settings=settings,
        force=force,
        inputs=[*inputs, out],
    )
    groups = tuple(
        GroupReport(
            name,
            group.size,
            spec.blocks(name),
            matching.gains.get(name),
            moved_share(spec, matching.permutation, name),
            group.pinned or matching.pinned.get(name, ""),
        )
        for name, group in spec.groups.items()
    )
    return AlignmentResult(out, place, digest, spec, matching, groups)


def _label(checkpoint: Checkpoint, other: Checkpoint) -> str:
    """Return what lineage calls a parent: the last part of its path, or two where both have the same."""
    path = checkpoint.path
    return path.name if path.name != other.path.name else "/".join(path.absolute().parts[-2:])


def _matched(
    spec: PermutationSpec,
    a: Checkpoint,
    b: Checkpoint,
    method: Method,
    task: Task | None,
    seed: int,
    restarts: int,
    device: str,
    progress: Callable[[MatchingProgress], None] | None,
) -> Matching:
    if method == "weights":
        from graftwork.merge.alignment.matching import match_weights

        return match_weights(spec, a, b, seed=seed, restarts=restarts, device=device, progress=progress)
    if task is None:
        raise TaskError(f"cannot match by {method}: that needs data; give --task file.py:name")
    if method == "activations":
        from graftwork.merge.alignment.activations import match_activations

        return match_activations(spec, a, b, task, device=device, progress=progress)
    from graftwork.merge.alignment.straight_through import match_straight_through

    return match_straight_through(spec, a, b, task, seed=seed, device=device, progress=progress)


def write_reordered(
    checkpoint: Checkpoint,
    out: Path,
    spec: PermutationSpec,
    permutation: Permutation,
    *,
    parents: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    force: bool = False,
    restart: bool = False,
    written: Callable[[int], None] | None = None,
) -> str:
    """Write a checkpoint with its units re-ordered, bit by bit, and return the content digest of the output.

    One tensor is in memory at a time. A folder gets the side files and `config.json` of the checkpoint's folder.

    Raises:
        OutputError: The place is taken or cannot be written.
        DataError: A tensor that is to be re-ordered has a dtype of less than a byte.
    """
    outputs = []
    for name in weights_order(checkpoint.tensors):
        entry = checkpoint.tensors[name]
        outputs.append(OutputTensor(name, entry.dtype, entry.shape, entry.size))
    recipe = json.dumps(dict(settings), sort_keys=True, separators=(",", ":"))
    orders = {name: xxhash.xxh3_128_hexdigest(vector.tobytes()) for name, vector in sorted(permutation.items())}
    plan = lineage.text_digest(json.dumps([recipe, [parent["digest"] for parent in parents], spec.to_json(), orders]))

    def metadata(digest: str) -> dict[str, str]:
        return lineage.metadata("model", method="match", recipe=recipe, parents=parents, digest=digest, plan=plan)

    empty = metadata(lineage.EMPTY_DIGEST)
    writer = CheckpointWriter(out, outputs, empty, plan_digest=plan, force=force, restart=restart)
    try:
        for tensor in outputs:
            if tensor.name not in writer.resumed:
                data = _reordered_bytes(checkpoint, tensor, spec, permutation)
                writer.write(tensor.name, 0, data)
                writer.finish(tensor.name, _digest(data, tensor.dtype), {})
            if written is not None:
                written(tensor.size)
        digest = content_digest((item.name, item.dtype, item.shape, writer.digests[item.name]) for item in outputs)
        writer.publish(metadata(digest), {} if writer.single_file else _side_files(checkpoint))
    except GraftworkError:
        writer.abandon()
        raise
    except BaseException:
        writer.leave()
        raise
    return digest


def _reordered_bytes(
    checkpoint: Checkpoint, tensor: OutputTensor, spec: PermutationSpec, permutation: Permutation
) -> memoryview:
    data = checkpoint.read(tensor.name)
    known = spec.tensors.get(tensor.name)
    if known is None or not any(group in permutation for group in known.groups) or not data:
        return memoryview(data)
    bits = dtypes.BITS[tensor.dtype]
    if bits not in _WORDS:
        raise DataError(
            f"cannot re-order {quoted(tensor.name)}: its dtype {tensor.dtype} packs several values into a byte; "
            "unpack it first"
        )
    words = np.frombuffer(data, _WORDS[bits]).reshape(tensor.shape)
    moved = np.ascontiguousarray(permute_tensor(spec, permutation, tensor.name, words))
    return moved.reshape(-1).view(np.uint8).data.cast("B")


def _digest(data: memoryview, dtype: str) -> bytes:
    block = max(1, BLOCK * dtypes.BITS[dtype] // 8)
    digests = [xxhash.xxh3_128_digest(data[start : start + block]) for start in range(0, len(data), block)]
    return tensor_digest(digests or [b""])


def _side_files(checkpoint: Checkpoint) -> dict[str, bytes | Path]:
    folder = checkpoint.folder
    if folder is None:
        return {}
    files: dict[str, bytes | Path] = {str(path): folder / path for path in side_files(folder)}
    if (folder / "config.json").is_file():
        files["config.json"] = folder / "config.json"
    return files


def total_bytes(checkpoint: Checkpoint) -> int:
    """Return how many bytes the tensors of a checkpoint have."""
    return sum(math.prod(entry.shape) * dtypes.BITS[entry.dtype] // 8 for entry in checkpoint.tensors.values())
