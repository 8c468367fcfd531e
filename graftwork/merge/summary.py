"""What the values of a mask, a Fisher or a permutation file say, layer by layer; and how two such files compare.

Values are taken tensor by tensor, in spans, and summed in float64, so memory is that of the largest tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftwork.merge import lineage
from graftwork.merge.checkpoint import Checkpoint, numpy_values
from graftwork.merge.layers import find_stacks, layer_of

Array = np.ndarray[Any, np.dtype[Any]]

DECIDED = (0.1, 0.9)
"""A value of an expected mask below the first or above the second is decided."""

_SPAN = 1 << 20
_LOGIT = ".logit"
_DELTA, _MASK = "graftwork.delta.", "graftwork.mask."
_ALL = "all"


@dataclass(frozen=True, slots=True)
class Summary:
    """A table.

    Args:
        kind: Of what: mask, task_masks, fisher, permutation.
        columns: Names of the columns; the first one names rows.
        rows: The last row is of everything together.
    """

    kind: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def record(self) -> list[dict[str, Any]]:
        """Return the rows for JSON."""
        names = [column.replace(" ", "_") for column in self.columns]
        return [dict(zip(names, row, strict=True)) for row in self.rows]


def kind_of(checkpoint: Checkpoint) -> str:
    """Return what graftwork's metadata say that a file is."""
    return checkpoint.metadata.get(lineage.PREFIX + "kind", "model")


def summarise(checkpoint: Checkpoint) -> Summary | None:
    """Return the summary of a mask, Fisher or permutation file by layer; None for anything else.

    * mask: `density`, the mean of the expected mask (the sigmoid of its logits); `decided`, the share of it below 0.1
      or above 0.9.
    * task masks: `density` per task, the share of ones.
    * fisher: `mean`, `largest`, and `zeros`, the share of entries that are exactly 0.
    * permutation: by group, `moved`, the share of units that are in another place.
    """
    kind = kind_of(checkpoint)
    makers: dict[str, Callable[[Checkpoint], Summary]] = {
        "mask": _mask, "task_masks": _task_masks, "fisher": _fisher, "permutation": _permutation,
    }  # fmt: skip
    return makers[kind](checkpoint) if kind in makers else None


def compare_files(a: Checkpoint, b: Checkpoint) -> Summary | None:
    """Return how two masks, or two Fisher files, compare tensor by tensor; None for anything else.

    * mask: the `density` of both; `agreement`, the share of values on the same side of one half; the Pearson
      `correlation` of the expected masks.
    * task masks: likewise without a correlation, for the tasks that both have.
    * fisher: the `mean` of both; the Pearson `correlation`; the `overlap` Σ √(ab) / √(Σa · Σb), which is 1 for
      information in the same places and 0 for none in common (Kirkpatrick et al. 2017, arXiv 1612.00796, appendix:
      the Fisher overlap 1 − d² of matrices scaled to trace 1).
    """
    kind = kind_of(a)
    if kind != kind_of(b):
        return None
    if kind == "mask":
        return _compare_masks(a, b)
    if kind == "task_masks":
        return _compare_task_masks(a, b)
    return _compare_fishers(a, b) if kind == "fisher" else None


# ---------------------------------------------------------------------------------------------------------------------
# Summaries


def _mask(checkpoint: Checkpoint) -> Summary:
    names = [name for name in checkpoint.tensors if name.endswith(_LOGIT)]
    sums: dict[str, Array] = {}
    for name, layer in _layers(names):
        for values in _spans(checkpoint, name):
            share = _sigmoid(values)
            decided = int(np.count_nonzero((share < DECIDED[0]) | (share > DECIDED[1])))
            _add(sums, layer, values.size, float(share.sum()), decided)
    rows = [(layer, int(n), _ratio(total, n), _ratio(decided, n)) for layer, (n, total, decided) in _whole(sums)]
    return Summary("mask", ("layer", "values", "density", "decided"), tuple(rows))


def _task_masks(checkpoint: Checkpoint) -> Summary:
    sums: dict[str, dict[str, Array]] = {}
    tensors = [name.removeprefix(_DELTA) for name in checkpoint.tensors if name.startswith(_DELTA)]
    layers = dict(_layers(tensors))
    for task, name, stored in _task_tensors(checkpoint):
        count = checkpoint.tensors[_DELTA + name].elements
        ones = int(_bits(checkpoint, stored, count).sum())
        _add(sums.setdefault(task, {}), layers[name], count, ones)
    rows = [
        (f"{layer}", task, int(count), _ratio(ones, count))
        for task, held in sums.items()
        for layer, (count, ones) in _whole(held)
    ]
    return Summary("task_masks", ("layer", "task", "values", "density"), tuple(rows))


def _fisher(checkpoint: Checkpoint) -> Summary:
    sums: dict[str, Array] = {}
    largest: dict[str, float] = {}
    for name, layer in _layers(list(checkpoint.tensors)):
        for values in _spans(checkpoint, name):
            _add(sums, layer, values.size, float(values.sum()), int(np.count_nonzero(values == 0)))
            for key in (layer, _ALL):
                largest[key] = max(largest.get(key, -math.inf), float(values.max()))
    rows = [
        (layer, int(count), _ratio(total, count), largest[layer], _ratio(zeros, count))
        for layer, (count, total, zeros) in _whole(sums)
    ]
    return Summary("fisher", ("layer", "values", "mean", "largest", "zeros"), tuple(rows))


def _permutation(checkpoint: Checkpoint) -> Summary:
    rows = []
    units = moved = 0
    for name in checkpoint.tensors:
        order = _values(checkpoint, name).reshape(-1)
        away = int(np.count_nonzero(order != np.arange(order.size)))
        rows.append((name, order.size, away / order.size if order.size else 0.0))
        units, moved = units + order.size, moved + away
    rows.append((_ALL, units, moved / units if units else 0.0))
    return Summary("permutation", ("group", "units", "moved"), tuple(rows))


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons


def _compare_masks(a: Checkpoint, b: Checkpoint) -> Summary:
    rows: list[tuple[Any, ...]] = []
    whole = np.zeros(7)
    for name in _common(a, b, _LOGIT):
        sums = np.zeros(7)
        for left, right in zip(_spans(a, name), _spans(b, name), strict=True):
            same = float(np.count_nonzero((left > 0) == (right > 0)))
            sums += [same, *_moments(_sigmoid(left), _sigmoid(right))]
        whole += sums
        rows.append((name.removesuffix(_LOGIT), *_mask_row(sums)))
    rows.append((_ALL, *_mask_row(whole)))
    columns = ("tensor", "values", "density of A", "density of B", "agreement", "correlation")
    return Summary("mask", columns, tuple(rows))


def _mask_row(sums: Array) -> tuple[Any, ...]:
    same, count, a, b = sums[0], sums[1], sums[2], sums[3]
    return int(count), _ratio(a, count), _ratio(b, count), _ratio(same, count), _correlation(sums[1:])


def _compare_task_masks(a: Checkpoint, b: Checkpoint) -> Summary:
    rows: list[tuple[Any, ...]] = []
    totals: dict[str, Array] = {}
    others = {(task, name): stored for task, name, stored in _task_tensors(b)}
    for task, name, stored in _task_tensors(a):
        count = a.tensors[_DELTA + name].elements
        other = others.get((task, name))
        if other is None or b.tensors[_DELTA + name].elements != count:
            continue
        left, right = _bits(a, stored, count), _bits(b, other, count)
        sums = np.array([count, left.sum(), right.sum(), np.count_nonzero(left == right)], np.float64)
        totals[task] = totals.get(task, np.zeros(4)) + sums
        rows.append((name, task, *_bit_row(sums)))
    rows += [(_ALL, task, *_bit_row(sums)) for task, sums in totals.items()]
    return Summary("task_masks", ("tensor", "task", "values", "density of A", "density of B", "agreement"), tuple(rows))


def _bit_row(sums: Array) -> tuple[Any, ...]:
    count, left, right, same = sums
    return int(count), _ratio(left, count), _ratio(right, count), _ratio(same, count)


def _compare_fishers(a: Checkpoint, b: Checkpoint) -> Summary:
    rows: list[tuple[Any, ...]] = []
    whole = np.zeros(7)
    for name in _common(a, b, ""):
        sums = np.zeros(7)
        for left, right in zip(_spans(a, name), _spans(b, name), strict=True):
            with np.errstate(invalid="ignore"):
                sums += [float(np.sqrt(left * right).sum()), *_moments(left, right)]
        whole += sums
        rows.append((name, *_fisher_row(sums)))
    rows.append((_ALL, *_fisher_row(whole)))
    return Summary("fisher", ("tensor", "values", "mean of A", "mean of B", "correlation", "overlap"), tuple(rows))


def _fisher_row(sums: Array) -> tuple[Any, ...]:
    common, count, a, b = sums[0], sums[1], sums[2], sums[3]
    overlap = float(common / math.sqrt(a * b)) if a > 0 and b > 0 else None
    return int(count), _ratio(a, count), _ratio(b, count), _correlation(sums[1:]), overlap


def _moments(a: Array, b: Array) -> tuple[float, ...]:
    """Return n, Σa, Σb, Σa², Σb², Σab."""
    return (a.size, float(a.sum()), float(b.sum()), float((a * a).sum()), float((b * b).sum()), float((a * b).sum()))


def _correlation(sums: Array) -> float | None:
    """Return Pearson's correlation of `_moments`; None where one side is constant."""
    count, a, b, aa, bb, ab = (float(value) for value in sums)
    if not count:
        return None
    first, second = count * aa - a * a, count * bb - b * b
    # What rounding leaves of a constant is no variance.
    if first <= 1e-12 * count * aa or second <= 1e-12 * count * bb:
        return None
    return max(-1.0, min(1.0, (count * ab - a * b) / math.sqrt(first * second)))


# ---------------------------------------------------------------------------------------------------------------------


def _common(a: Checkpoint, b: Checkpoint, suffix: str) -> list[str]:
    return [
        name
        for name, entry in a.tensors.items()
        if name.endswith(suffix) and name in b.tensors and b.tensors[name].shape == entry.shape
    ]


def _layers(names: list[str]) -> Iterator[tuple[str, str]]:
    """Yield each tensor with its layer, in the order of layers; what is in no layer stands for itself."""
    stacks = find_stacks(names)
    for name in names:
        found = layer_of(name, stacks)
        yield name, name.removesuffix(_LOGIT) if found is None else found[0].tensor(found[1], "")


def _spans(checkpoint: Checkpoint, name: str) -> Iterator[Array]:
    values = _values(checkpoint, name).reshape(-1)
    for start in range(0, values.size, _SPAN):
        yield values[start : start + _SPAN].astype(np.float64)


def _values(checkpoint: Checkpoint, name: str) -> Array:
    entry = checkpoint.tensors[name]
    values = numpy_values(entry.dtype, checkpoint.read(name))
    assert values is not None, "artifacts hold dtypes that numpy knows or that are widened"
    return values


def _task_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, str, str]]:
    """Yield task, tensor and the name under which its bits are stored."""
    tensors = [name.removeprefix(_DELTA) for name in checkpoint.tensors if name.startswith(_DELTA)]
    for stored in checkpoint.tensors:
        if stored.startswith(_MASK):
            # Tasks may have dots in their names: what follows has to be a tensor, the longest that fits.
            rest = stored.removeprefix(_MASK)
            name = max((name for name in tensors if rest.endswith("." + name)), key=len, default=None)
            if name is not None:
                yield rest.removesuffix("." + name), name, stored


def _bits(checkpoint: Checkpoint, stored: str, count: int) -> Array:
    words = np.frombuffer(checkpoint.read(stored), np.uint8)
    return np.unpackbits(words, bitorder="little")[:count]


def _sigmoid(values: Array) -> Array:
    shares: Array = 0.5 * (1 + np.tanh(0.5 * values))
    return shares


def _add(sums: dict[str, Array], key: str, *numbers: float) -> None:
    sums[key] = sums.get(key, np.zeros(len(numbers))) + np.array(numbers, np.float64)


def _whole(sums: dict[str, Array]) -> list[tuple[str, Array]]:
    """Return the sums, and behind them those of everything."""
    return [*sums.items(), (_ALL, np.sum(list(sums.values()), axis=0))] if sums else []


def _ratio(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else 0.0
