"""How far two checkpoints are apart: tensor by tensor, layer by layer, and altogether.

Sums are taken in float64 over blocks of 65,536 values and added without rounding, so the result does not depend on how
much is read at a time or by how many threads; memory does not grow with the checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftwork.merge.checkpoint import BLOCK, Checkpoint, TensorEntry, numpy_values
from graftwork.merge.dtypes import BITS, MERGEABLE
from graftwork.merge.layers import find_stacks, layer_of

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over values of A and B: A², B², (A - B)² and A·B."""

    a: float
    b: float
    difference: float
    product: float

    @property
    def norm_a(self) -> float:
        """Euclidean norm of A."""
        return math.sqrt(self.a)

    @property
    def norm_b(self) -> float:
        """Euclidean norm of B."""
        return math.sqrt(self.b)

    @property
    def norm_difference(self) -> float:
        """Euclidean norm of A - B."""
        return math.sqrt(self.difference)

    @property
    def relative(self) -> float:
        """‖A - B‖ / ‖A‖; infinite if only A is zero."""
        if self.a == 0:
            return math.inf if self.difference > 0 else self.difference
        return self.norm_difference / self.norm_a

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between A and B; None if one of them is zero."""
        if self.a == 0 or self.b == 0:
            return None
        cosine = self.product / (self.norm_a * self.norm_b)
        # Rounding may carry the cosine of parallel vectors beyond one; NaN stays NaN.
        return max(-1.0, min(1.0, cosine)) if cosine == cosine else cosine

    def record(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "norm_a": self.norm_a,
            "norm_b": self.norm_b,
            "norm_difference": self.norm_difference,
            "relative_change": self.relative,
            "cosine": self.cosine,
        }


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """How one tensor differs.

    Args:
        name: Its name.
        dtype_a: Its dtype in A.
        dtype_b: Its dtype in B.
        shape: Its shape in both.
        is_identical: Whether dtype and bytes are the same.
        differing: Number of entries whose values differ.
        sums: Sums over its values; None for integers and whatever else is not merged.
    """

    name: str
    dtype_a: str
    dtype_b: str
    shape: tuple[int, ...]
    is_identical: bool
    differing: int
    sums: Sums | None

    def record(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "name": self.name,
            "dtype_a": self.dtype_a,
            "dtype_b": self.dtype_b,
            "shape": list(self.shape),
            "is_identical": self.is_identical,
            "differing": self.differing,
            **(self.sums.record() if self.sums is not None else {}),
        }


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """How the tensors of one layer differ together; `layer` is empty for the tensors outside of layers."""

    layer: str
    tensors: int
    sums: Sums
    largest: str
    """The tensor with the largest relative change."""

    def record(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {"layer": self.layer, "tensors": self.tensors, **self.sums.record(), "largest": self.largest}


@dataclass(frozen=True, slots=True)
class Incomparable:
    """A tensor that both have, but not with the same shape or kind of value."""

    name: str
    dtype_a: str
    dtype_b: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]

    def record(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "name": self.name,
            "dtype_a": self.dtype_a,
            "dtype_b": self.dtype_b,
            "shape_a": list(self.shape_a),
            "shape_b": list(self.shape_b),
        }


@dataclass(frozen=True, slots=True)
class Difference:
    """How two checkpoints differ.

    Args:
        tensors: What both have, by name.
        incomparable: What both have in different shapes.
        only_a: Names that only A has.
        only_b: Names that only B has.
        layers: Summaries by layer, in order; the tensors outside of layers last.
        total: Sums over all compared floating-point tensors.
    """

    tensors: tuple[TensorDifference, ...]
    incomparable: tuple[Incomparable, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    layers: tuple[LayerDifference, ...]
    total: Sums

    @property
    def is_identical(self) -> bool:
        """Whether both hold the same tensors with the same bytes."""
        return not (self.incomparable or self.only_a or self.only_b) and all(item.is_identical for item in self.tensors)

    def by_change(self) -> list[TensorDifference]:
        """Return the tensors, the largest relative change first; what is not finite comes before all."""

        def place(item: TensorDifference) -> tuple[float, str]:
            if item.sums is None:
                return (0.0 if item.is_identical else -math.inf, item.name)
            relative = item.sums.relative
            return (-relative if relative == relative else -math.inf, item.name)

        return sorted(self.tensors, key=place)

    def record(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "is_identical": self.is_identical,
            "total": self.total.record(),
            "identical_tensors": sum(item.is_identical for item in self.tensors),
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "incomparable": [item.record() for item in self.incomparable],
            "layers": [layer.record() for layer in self.layers],
            "tensors": [item.record() for item in self.tensors],
        }


def compare(
    a: Checkpoint, b: Checkpoint, *, threads: int = 1, progress: Callable[[int], None] | None = None
) -> Difference:
    """Return how two checkpoints differ.

    Args:
        a: The first; relative changes are relative to it.
        b: The second.
        threads: How many tensors are compared at a time.
        progress: Called with the number of bytes read since the last call.

    Raises:
        CheckpointError: A file cannot be read any more.
    """
    shared = [name for name in a.tensors if name in b.tensors]
    pairs = [(a.tensors[name], b.tensors[name]) for name in shared]
    comparable = [pair for pair in pairs if _is_comparable(*pair)]
    count = progress or (lambda size: None)
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="compare") as pool:
        tensors = tuple(pool.map(lambda pair: _compare_tensor((a, b), pair, count), comparable))
    return Difference(
        tensors=tensors,
        incomparable=tuple(
            Incomparable(left.name, left.dtype, right.dtype, left.shape, right.shape)
            for left, right in pairs
            if not _is_comparable(left, right)
        ),
        only_a=tuple(name for name in a.tensors if name not in b.tensors),
        only_b=tuple(name for name in b.tensors if name not in a.tensors),
        layers=_by_layer(tensors, a.tensors),
        total=_added(item.sums for item in tensors if item.sums is not None),
    )


def compared_bytes(a: Checkpoint, b: Checkpoint) -> int:
    """Return how many bytes a comparison reads."""
    return sum(
        entry.size + b.tensors[name].size
        for name, entry in a.tensors.items()
        if name in b.tensors and _is_comparable(entry, b.tensors[name])
    )


def _is_comparable(left: TensorEntry, right: TensorEntry) -> bool:
    both_float = left.dtype in MERGEABLE and right.dtype in MERGEABLE
    return left.shape == right.shape and (both_float or left.dtype == right.dtype)


def _compare_tensor(
    checkpoints: tuple[Checkpoint, Checkpoint], pair: tuple[TensorEntry, TensorEntry], progress: Callable[[int], None]
) -> TensorDifference:
    left, right = pair
    is_float = left.dtype in MERGEABLE
    blocks: list[Sums] = []
    differing = 0
    is_identical = left.dtype == right.dtype
    widths = [BLOCK * BITS[entry.dtype] // 8 for entry in pair]
    buffers = [bytearray(min(width, entry.size)) for width, entry in zip(widths, pair, strict=True)]
    for number in range(math.ceil(left.size / widths[0]) if left.size else 0):
        parts = []
        for checkpoint, entry, width, buffer in zip(checkpoints, pair, widths, buffers, strict=True):
            part = memoryview(buffer)[: min(width, entry.size - number * width)]
            checkpoint.read_into(entry, number * width, part)
            progress(len(part))
            parts.append(part)
        is_same = left.dtype == right.dtype and np.array_equal(
            np.frombuffer(parts[0], "u1"), np.frombuffer(parts[1], "u1")
        )
        is_identical &= is_same
        if is_float:
            first = _widened(left.dtype, parts[0])
            second = first if is_same else _widened(right.dtype, parts[1])
            differing += 0 if is_same else int(np.count_nonzero(first != second))
            blocks.append(_block_sums(first, second))
        elif not is_same:
            words = f"<u{max(1, BITS[left.dtype] // 8)}"
            differing += int(np.count_nonzero(np.frombuffer(parts[0], words) != np.frombuffer(parts[1], words)))
    sums = _added(blocks)
    return TensorDifference(
        left.name, left.dtype, right.dtype, left.shape, is_identical, differing, sums if is_float else None
    )


def _widened(dtype: str, data: memoryview) -> Array:
    values = numpy_values(dtype, data)
    assert values is not None, "numpy has a dtype for everything that is merged"
    return values.astype(np.float64)


def _block_sums(a: Array, b: Array) -> Sums:
    # Not a dot product: that of a BLAS library may depend on its number of threads.
    with np.errstate(all="ignore"):
        square = float(np.sum(a * a))
        if a is b:
            return Sums(square, square, 0.0 if math.isfinite(square) else math.nan, square)
        difference = a - b
        return Sums(square, float(np.sum(b * b)), float(np.sum(difference * difference)), float(np.sum(a * b)))


def _added(sums: Iterable[Sums]) -> Sums:
    every = list(sums)
    return Sums(
        _sum(item.a for item in every),
        _sum(item.b for item in every),
        _sum(item.difference for item in every),
        _sum(item.product for item in every),
    )


def _sum(values: Iterable[float]) -> float:
    every = list(values)
    try:
        return math.fsum(every)
    except (OverflowError, ValueError):  # beyond float64, or infinities of both signs
        return sum(every)


def _by_layer(tensors: Sequence[TensorDifference], names: Mapping[str, TensorEntry]) -> tuple[LayerDifference, ...]:
    stacks = find_stacks(names)
    groups: dict[tuple[int, int], list[TensorDifference]] = {}
    titles: dict[tuple[int, int], str] = {}
    places = {prefix: number for number, prefix in enumerate(stacks)}
    for item in tensors:
        if item.sums is None:
            continue
        found = layer_of(item.name, stacks)
        key = (len(stacks), 0) if found is None else (places[found[0].prefix], found[1])
        titles[key] = "" if found is None else found[0].tensor(found[1], "")
        groups.setdefault(key, []).append(item)
    layers = []
    for key in sorted(groups):
        members = groups[key]
        largest = max(members, key=lambda item: item.sums.relative if item.sums is not None else 0.0)
        sums = _added(item.sums for item in members if item.sums is not None)
        layers.append(LayerDifference(titles[key], len(members), sums, largest.name))
    return tuple(layers)
