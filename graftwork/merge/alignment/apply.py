"""What a permutation does to tensors; permutations by themselves, and their files."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from graftwork.merge.alignment.spec import Axis, PermutationSpec, Segment, Use
from graftwork.merge.artifact import load_artifact, save_artifact
from graftwork.merge.checkpoint import quoted
from graftwork.merge.errors import CheckpointError, MismatchError

if TYPE_CHECKING:
    from torch import Tensor

Permutation = Mapping[str, NDArray[np.int64]]
"""One int64 vector per group, out[i] = in[permutation[i]]; a group that is missing keeps its order.

A group within another has a vector of length blocks · size: the orders inside the units of the output, one after the
other.
"""

Array = np.ndarray[Any, np.dtype[Any]]
Values = TypeVar("Values", "Array", "Tensor")

KIND = "permutation"

# ---------------------------------------------------------------------------------------------------------------------
# Permutations by themselves


def identity(spec: PermutationSpec) -> dict[str, NDArray[np.int64]]:
    """Return the permutation that changes nothing, with a vector for each group."""
    return {
        name: np.tile(np.arange(group.size, dtype=np.int64), spec.blocks(name)) for name, group in spec.groups.items()
    }


def random_permutation(spec: PermutationSpec, seed: int) -> dict[str, NDArray[np.int64]]:
    """Return a random order of every group that is not pinned; equal for equal seeds."""
    result = identity(spec)
    random = np.random.Generator(np.random.PCG64(seed))
    for name in spec.free_groups:
        size = spec.groups[name].size
        result[name] = np.concatenate([random.permutation(size) for _ in range(spec.blocks(name))]).astype(np.int64)
    return result


def compose(spec: PermutationSpec, first: Permutation, then: Permutation) -> dict[str, NDArray[np.int64]]:
    """Return the permutation that does what `first` and after it `then` do."""
    start = identity(spec)
    result = {}
    for name, group in spec.groups.items():
        one = first.get(name, start[name]).reshape(-1, group.size)
        two = then.get(name, start[name]).reshape(-1, group.size)
        if group.within is not None:
            one = one[then.get(group.within, start[group.within])]
        result[name] = np.take_along_axis(one, two, axis=1).reshape(-1)
    return result


def inverse(spec: PermutationSpec, permutation: Permutation) -> dict[str, NDArray[np.int64]]:
    """Return the permutation that undoes another."""
    start = identity(spec)
    result = {}
    for name, group in spec.groups.items():
        one = permutation.get(name, start[name]).reshape(-1, group.size)
        if group.within is not None:
            one = one[np.argsort(permutation.get(group.within, start[group.within]))]
        result[name] = np.argsort(one, axis=1).astype(np.int64).reshape(-1)
    return result


def check_permutation(spec: PermutationSpec, permutation: Permutation, *, what: str = "this permutation") -> None:
    """Check that every vector is a permutation of its group.

    Raises:
        MismatchError: One line for each group that is wrong.
    """
    problems = []
    for name, vector in permutation.items():
        if name not in spec.groups:
            problems.append(f"cannot use {what}: it has the group {quoted(name)}, which the model's spec lacks")
            continue
        size, blocks = spec.groups[name].size, spec.blocks(name)
        if vector.dtype != np.int64 or vector.shape != (blocks * size,):
            problems.append(
                f"cannot use {what}: group {quoted(name)} has {vector.dtype} of shape {list(vector.shape)}, "
                f"not {blocks * size} numbers of int64"
            )
        elif not (np.sort(vector.reshape(blocks, size), axis=1) == np.arange(size)).all():
            problems.append(f"cannot use {what}: group {quoted(name)} does not have each of its {size} units once")
        elif spec.groups[name].pinned and not (vector.reshape(blocks, size) == np.arange(size)).all():
            problems.append(
                f"cannot use {what}: it re-orders {quoted(name)}, which is pinned ({spec.groups[name].pinned})"
            )
    if problems:
        raise MismatchError(*problems)


def moved_share(spec: PermutationSpec, permutation: Permutation, group: str) -> float:
    """Return which share of a group's units are not at their old place; units of all blocks are counted."""
    vector = permutation.get(group)
    if vector is None:
        return 0.0
    return float(np.mean(vector.reshape(-1, spec.groups[group].size) != np.arange(spec.groups[group].size)))


# ---------------------------------------------------------------------------------------------------------------------
# Acting on tensors


def axis_index(spec: PermutationSpec, permutation: Permutation, tensor: str, axis: int) -> NDArray[np.int64] | None:
    """Return the index of an axis: out = in taken at it. None if the axis keeps its order."""
    return _axis_index(spec, permutation, spec.tensors[tensor].axes[axis])


def _axis_index(spec: PermutationSpec, permutation: Permutation, axis: Axis) -> NDArray[np.int64] | None:
    if axis is None or not any(isinstance(item, str) and item in permutation for part in axis for item in part):
        return None
    pieces, start = [], 0
    for segment in axis:
        shape = spec.segment_shape(segment)
        pieces.append(start + segment_index(spec, permutation, segment, shape))
        start += math.prod(shape)
    return np.concatenate(pieces)


def segment_index(
    spec: PermutationSpec, permutation: Permutation, segment: Segment, shape: tuple[int, ...]
) -> NDArray[np.int64]:
    """Return the flat index of one segment from the orders of its factors."""
    index = np.zeros(shape, dtype=np.int64)
    stride = math.prod(shape)
    source: NDArray[np.int64]
    for place, (factor, length) in enumerate(zip(segment, shape, strict=True)):
        stride //= length
        layout = [1] * len(shape)
        layout[place] = length
        source = np.arange(length, dtype=np.int64)
        if isinstance(factor, str) and factor in permutation:
            source = permutation[factor]
            within = spec.groups[factor].within
            if within is not None:
                above = segment.index(within)
                layout[above] = shape[above]
                source = source.reshape(shape[above], length)
                if above > place:
                    source = source.T
        index += stride * source.reshape(layout)
    return index.reshape(-1)


def apply_permutation(
    spec: PermutationSpec, permutation: Permutation, tensors: Mapping[str, Values]
) -> dict[str, Values]:
    """Return the model with its units re-ordered; values are copied bit by bit, whatever their dtype.

    Args:
        spec: Of the model; tensors that it does not name are returned as they are.
        permutation: The orders.
        tensors: numpy arrays (also raw words) or torch tensors.
    """
    return {name: permute_tensor(spec, permutation, name, values) for name, values in tensors.items()}


def permute_tensor(spec: PermutationSpec, permutation: Permutation, name: str, values: Values) -> Values:
    """Return one tensor of a model with its units re-ordered."""
    if name not in spec.tensors:
        return values
    return _taken(values, [_axis_index(spec, permutation, axis) for axis in spec.tensors[name].axes])


def _taken(values: Values, indices: Sequence[NDArray[np.int64] | None]) -> Values:
    result: Any = values
    for axis, index in enumerate(indices):
        if index is None:
            continue
        if isinstance(result, np.ndarray):
            result = np.take(result, index, axis=axis)
        else:
            result = _torch_taken(result, index, axis)
    return cast("Values", result)


def _torch_taken(values: Tensor, index: NDArray[np.int64], axis: int) -> Tensor:
    import torch

    where = torch.from_numpy(index).to(values.device)
    if values.dtype.is_floating_point and values.element_size() == 1:  # torch does not index 8-bit floats
        return values.view(torch.uint8).index_select(axis, where).view(values.dtype)
    return values.index_select(axis, where)


def unfold(
    spec: PermutationSpec,
    permutation: Permutation | None,
    use: Use,
    values: Values,
    *,
    free: Collection[str] = (),
) -> Values:
    """Return a tensor as a matcher of one group wants it: (blocks, units of the group, everything else).

    All other groups are applied as `permutation` says, on this axis and on the others; the group itself is left in the
    order of `values`. So `unfold(spec, None, use, a)` and `unfold(spec, permutation, use, b)` have equal shapes, and
    the sum over the last axis of `a[k, i] * b[k, j]` is what unit i of block k gains by taking unit j.

    For a plain group there is one block. For a group within another, block k is what lies in unit k of the output,
    that is in unit `permutation[parent][k]` of `values`.

    Args:
        spec: Of the model.
        permutation: Orders of the other groups; None leaves everything in place.
        use: The place, one of `spec.uses(group)`.
        values: The tensor `use.tensor`.
        free: Other groups that are to be left in place, too. Groups within the group are always left in place, because
            their orders belong to units of the output that are not known yet; a matcher of both works on
            `unfold_product`.
    """
    folded, segment = _folded(spec, permutation, use, values, free)
    shape = spec.segment_shape(segment)
    group = str(segment[use.factor])
    within = spec.groups[group].within
    above = None if within is None else segment.index(within)
    order = [] if above is None else [above]
    order += [use.factor]
    order += [place for place in range(len(shape) + 1) if place not in order]
    moved: Any = np.transpose(folded, order) if isinstance(folded, np.ndarray) else folded.permute(order)
    return cast("Values", moved.reshape(1 if above is None else shape[above], shape[use.factor], -1))


def unfold_product(
    spec: PermutationSpec,
    permutation: Permutation | None,
    use: Use,
    values: Values,
    *,
    free: Collection[str] = (),
) -> Values:
    """Return a tensor as (factor 1, …, factor k, everything else) for the factors of one segment of an axis.

    As `unfold`, but with the factors of the segment apart: ("G", "Q", "D") gives 4 axes. The group of `use`, groups
    within it and those in `free` are left in place; all others are applied.
    """
    return cast("Values", _folded(spec, permutation, use, values, free)[0])


def _folded(
    spec: PermutationSpec, permutation: Permutation | None, use: Use, values: Any, free: Collection[str]
) -> tuple[Any, Segment]:
    axes = spec.tensors[use.tensor].axes
    axis = axes[use.axis]
    assert axis is not None
    segment = axis[use.segment]
    shape = spec.segment_shape(segment)
    start = spec.segment_start(axis, use.segment)
    group = str(segment[use.factor])
    left = {group, *spec.inner_groups(group), *free}
    part: Any = values
    if len(axis) > 1:
        part = part[(slice(None),) * use.axis + (slice(start, start + math.prod(shape)),)]
    if permutation is not None:
        # On other axes the group itself acts, too: that is what its present order is for.
        on_others = {name: vector for name, vector in permutation.items() if name not in free}
        here = {name: vector for name, vector in permutation.items() if name not in left}
        indices = [_axis_index(spec, on_others, other) for other in axes]
        own = any(factor in here for factor in segment)
        indices[use.axis] = segment_index(spec, here, segment, shape) if own else None
        part = _taken(part, indices)
    part = np.moveaxis(part, use.axis, 0) if isinstance(part, np.ndarray) else part.movedim(use.axis, 0)
    return part.reshape(*shape, -1), segment


# ---------------------------------------------------------------------------------------------------------------------
# Files


@dataclass(frozen=True, slots=True)
class PermutationFile:
    """A permutation as it was found in a file.

    Args:
        path: The file.
        spec: Of the models for which it was made.
        permutation: The orders.
        digest_a: Content digest of the model that is aligned to.
        digest_b: Content digest of the model whose units are re-ordered.
        settings: How it was found.
    """

    path: Path
    spec: PermutationSpec
    permutation: Permutation
    digest_a: str
    digest_b: str
    settings: Mapping[str, Any]


def save_permutation(
    path: Path | str,
    spec: PermutationSpec,
    permutation: Permutation,
    *,
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    method: str,
    settings: Mapping[str, Any],
    force: bool = False,
    inputs: Sequence[Path] = (),
) -> str:
    """Write a permutation that takes B to the order of A, and return the file's content digest.

    Args:
        path: A file whose name ends in `.safetensors`.
        spec: Of both models.
        permutation: The orders.
        a: Record of the model that is aligned to (`graftwork.merge.artifact.parent_of`).
        b: Record of the model whose units are re-ordered.
        method: What found it: weights, activations, ste.
        settings: With which settings.
        force: Replace a file that exists.
        inputs: Files that must not be overwritten.
    """
    check_permutation(spec, permutation)
    vectors = {**identity(spec), **permutation}
    return save_artifact(
        path,
        vectors,
        kind=KIND,
        method=method,
        settings=settings,
        parents=[a, b],
        force=force,
        inputs=inputs,
        spec=spec.to_json(),
        convention="out[i] = in[permutation[i]]",
        digest_a=str(a["digest"]),
        digest_b=str(b["digest"]),
    )


def load_permutation(path: Path | str) -> PermutationFile:
    """Read a permutation.

    Raises:
        CheckpointError: It is not there, is damaged, or is no permutation.
    """
    artifact = load_artifact(path, kind=KIND)
    what = quoted(artifact.path)
    missing = [key for key in ("spec", "digest_a", "digest_b") if not artifact.metadata.get(key)]
    if missing:
        raise CheckpointError(
            f"cannot use {what} as a permutation: its metadata lack {', '.join(missing)}; make it again"
        )
    spec = PermutationSpec.from_json(artifact.metadata["spec"], what=f"the spec in {what}")
    check_permutation(spec, artifact.tensors, what=what)
    return PermutationFile(
        artifact.path,
        spec,
        artifact.tensors,
        artifact.metadata["digest_a"],
        artifact.metadata["digest_b"],
        artifact.settings,
    )
