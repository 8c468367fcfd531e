"""How high the loss rises between models: curves along a segment, and the rise over a simplex of three or more.

The *barrier* between A and B is the largest excess of the loss over the straight line between the ends (Frankle et al.
2020, eq. 1; Ainsworth et al. 2023, definition 2.1):

    max over λ of L((1−λ)·A + λ·B) − ((1−λ)·L(A) + λ·L(B))

The code of Git Re-Basin subtracts the mean of the ends instead of the line; `Rise.above_mean` is that. The two agree
where the ends are equally good. A negative barrier cannot be: at the ends the excess is zero.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from graftwork.merge.alignment.renormalize import Renormalizer
from graftwork.merge.checkpoint import listed, quoted
from graftwork.merge.errors import DataError, MismatchError
from graftwork.merge.evaluation import Evaluation, Split, evaluate
from graftwork.merge.task import Task

if TYPE_CHECKING:
    from torch import Tensor

    Model = Mapping[str, Tensor]
    """A state dict."""

POINTS = 25

Renormalization = Literal["none", "bn", "repair"]
RENORMALIZATIONS: tuple[Renormalization, ...] = get_args(Renormalization)


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures


def interpolate(models: Sequence[Model], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return Σ weight · model, summed in float64 and rounded once to the first model's dtypes.

    Tensors of integers and truth values are the first model's: a mean of counters counts nothing.

    Raises:
        MismatchError: The models have different tensors, or there are not as many weights.
    """
    if len(models) != len(weights):
        raise MismatchError(f"cannot interpolate: there are {len(models)} models but {len(weights)} weights")
    check_alike(models)
    mixed: dict[str, Tensor] = {}
    for name, first in models[0].items():
        if not first.is_floating_point():
            mixed[name] = first
            continue
        total = weights[0] * first.double()
        for model, weight in zip(models[1:], weights[1:], strict=True):
            total += weight * model[name].double()
        mixed[name] = total.to(first.dtype)
    return mixed


def check_alike(models: Sequence[Model], labels: Sequence[str] | None = None) -> None:
    """Check that models have the same tensors with the same shapes.

    Raises:
        MismatchError: One line for each kind of difference.
    """
    named = labels or [f"model {number}" for number in range(1, len(models) + 1)]
    problems = []
    for label, model in list(zip(named, models, strict=True))[1:]:
        doing = f"cannot interpolate between {quoted(named[0])} and {quoted(label)}"
        for one, other, in_one, in_other in ((models[0], model, named[0], label), (model, models[0], label, named[0])):
            alone = [name for name in one if name not in other]
            if alone:
                problems.append(f"{doing}: only {quoted(in_one)} has {listed(alone)}; is {quoted(in_other)} another "
                                "architecture?")  # fmt: skip
        differing = [name for name in models[0] if name in model and model[name].shape != models[0][name].shape]
        if differing:
            first = differing[0]
            more = f" ({len(differing) - 1} others differ, too)" if len(differing) > 1 else ""
            problems.append(
                f"{doing}: {quoted(first)} has shape {list(models[0][first].shape)} in {quoted(named[0])} and "
                f"{list(model[first].shape)} in {quoted(label)}{more}; they need one architecture and width"
            )
    if problems:
        raise MismatchError(*problems)


def check_finite(models: Sequence[Model], labels: Sequence[str]) -> None:
    """Check that models hold neither NaN nor infinities.

    Raises:
        DataError: One line for each model that does.
    """
    problems = []
    for label, model in zip(labels, models, strict=True):
        bad = [
            name for name, tensor in model.items() if tensor.is_floating_point() and not tensor.isfinite().all().item()
        ]
        if bad:
            problems.append(f"cannot measure {quoted(label)}: it has values that are not finite in {listed(bad)}")
    if problems:
        raise DataError(*problems)


# ---------------------------------------------------------------------------------------------------------------------
# Along a segment


@dataclass(frozen=True, slots=True)
class Rise:
    """How far a curve rises above its ends.

    Args:
        height: The largest excess over the line between the ends: the barrier.
        position: λ at which it is reached; the first one of equals.
        above_mean: The largest value less the mean of the ends, as Git Re-Basin's code has it.
        midpoint: The value at λ = 1/2.
        midpoint_height: Its excess over the mean of the ends.
    """

    height: float
    position: float
    above_mean: float
    midpoint: float
    midpoint_height: float


def rise_of(positions: Sequence[float], values: Sequence[float]) -> Rise:
    """Return the rise of a curve of an odd number of points, λ from 0 to 1.

    A value between the ends that is no number counts as infinite; above such an end there is no height.
    """
    finite = [value if math.isfinite(value) else math.inf for value in values]
    first, last = finite[0], finite[-1]
    if math.inf in (first, last):
        return Rise(math.nan, math.nan, math.nan, values[len(values) // 2], math.nan)
    heights = [
        value - ((1 - at) * first + at * last) if value < math.inf else math.inf
        for at, value in zip(positions, finite, strict=True)
    ]
    # The ends lie on the line whatever rounding says.
    heights[0] = heights[-1] = 0.0
    highest = max(range(len(heights)), key=lambda number: (heights[number], -number))
    middle = len(values) // 2
    mean = (first + last) / 2
    return Rise(heights[highest], positions[highest], max(finite) - mean, values[middle], finite[middle] - mean)


@dataclass(frozen=True, slots=True)
class Curve:
    """Loss and accuracy on the segment from A (λ = 0) to B (λ = 1).

    Args:
        label: What was mixed, for tables and pictures.
        renormalization: What was done to the statistics at each point.
        split: The data on which it was judged.
        positions: λ.
        losses: The loss at each λ.
        accuracies: The accuracy at each λ; None where labels are not classes.
    """

    label: str
    renormalization: Renormalization
    split: Split
    positions: tuple[float, ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...] | None

    @property
    def loss(self) -> Rise:
        """The loss barrier."""
        return rise_of(self.positions, self.losses)

    @property
    def accuracy(self) -> Rise | None:
        """The accuracy barrier: how far it *falls* below the line; `midpoint` is the accuracy there."""
        if self.accuracies is None:
            return None
        fall = rise_of(self.positions, [-value for value in self.accuracies])
        return Rise(fall.height, fall.position, fall.above_mean, -fall.midpoint, fall.midpoint_height)

    def record(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "label": self.label,
            "renormalization": self.renormalization,
            "split": self.split,
            "positions": list(self.positions),
            "losses": list(self.losses),
            "accuracies": None if self.accuracies is None else list(self.accuracies),
            "loss_barrier": _rise_record(self.loss),
            "accuracy_barrier": None if self.accuracy is None else _rise_record(self.accuracy),
        }


def _rise_record(rise: Rise) -> dict[str, float]:
    return {name: getattr(rise, name) for name in Rise.__slots__}


def measure_barrier(
    task: Task,
    a: Model,
    b: Model,
    *,
    points: int = POINTS,
    splits: Sequence[Split] = ("test",),
    renormalization: Renormalization = "none",
    label: str = "",
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> list[Curve]:
    """Return loss and accuracy on the segment between two models, one curve per split.

    With `renormalization`, the statistics are estimated again at every λ, the ends included.

    Args:
        task: The network and its data.
        a: The state dict at λ = 0.
        b: The state dict at λ = 1, aligned if it shall be.
        points: How many λ, equally spaced; odd, so that the midpoint is one.
        splits: The data on which to judge; a task without one is judged on the next, as by `evaluate`.
        renormalization: `none`, `bn` or `repair` (see `graftwork.merge.alignment.renormalize`).
        label: The curves' label.
        device: Where models run.
        progress: Called with λ after each point.

    Raises:
        MismatchError: The models differ in architecture, or there are too few points.
        DataError: A model holds values that are not finite.
        TaskError: The task fails or does not fit the models.
    """
    if points < 3 or points % 2 == 0:
        raise MismatchError(f"cannot measure a barrier on {points} points; use an odd number, 3 or more: 25")
    check_alike([a, b], ["A", "B"])
    check_finite([a, b], ["A", "B"])
    positions = [number / (points - 1) for number in range(points)]
    evaluator = _Evaluator(task, [a, b], splits, renormalization, device)
    rows = []
    for at in positions:
        rows.append(evaluator([1 - at, at]))
        if progress is not None:
            progress(at)
    return [
        Curve(
            label,
            renormalization,
            column[0].split,
            tuple(positions),
            tuple(item.loss for item in column),
            None if any(item.accuracy is None for item in column) else tuple(item.accuracy or 0.0 for item in column),
        )
        for column in zip(*rows, strict=True)
    ]


class _Evaluator:
    """Evaluates mixtures of some models on some splits."""

    def __init__(
        self,
        task: Task,
        models: Sequence[Model],
        splits: Sequence[Split],
        renormalization: Renormalization,
        device: str,
    ) -> None:
        if renormalization not in RENORMALIZATIONS:
            known = " or ".join(RENORMALIZATIONS)
            raise MismatchError(f"cannot renormalize by {quoted(str(renormalization))}; use {known}")
        self.task = task
        self.models = models
        self.splits = splits
        self.device = device
        self.renormalize = (
            None if renormalization == "none" else Renormalizer(task, models, method=renormalization, device=device)
        )

    def __call__(self, weights: Sequence[float]) -> list[Evaluation]:
        mixed = interpolate(self.models, weights)
        if self.renormalize is not None:
            mixed = self.renormalize(mixed, weights)
        return [
            evaluate({"the mixture": mixed}, [self.task], split=split, device=self.device)[0] for split in self.splits
        ]


# ---------------------------------------------------------------------------------------------------------------------
# Over a simplex


@dataclass(frozen=True, slots=True)
class Simplex:
    """Loss over the mixtures of several models.

    Args:
        split: The data on which it was judged.
        weights: The mixtures of a grid, each with one weight per model.
        losses: The loss of each.
        centre_loss: The loss of the mean of all models.
        centre_accuracy: Its accuracy; None where labels are not classes.
        height: The largest excess of the loss over the mean of the models' losses with the same weights.
        position: Where that is.
    """

    split: Split
    weights: tuple[tuple[float, ...], ...]
    losses: tuple[float, ...]
    centre_loss: float
    centre_accuracy: float | None
    height: float
    position: tuple[float, ...]


def measure_simplex(
    task: Task,
    models: Sequence[Model],
    *,
    steps: int = 10,
    splits: Sequence[Split] = ("test",),
    renormalization: Renormalization = "none",
    device: str = "cpu",
    progress: Callable[[Sequence[float]], None] | None = None,
) -> list[Simplex]:
    """Return the loss over all mixtures of models with weights that are multiples of 1 / steps, one per split.

    With two models it is the barrier of `measure_barrier` on `steps + 1` points. The number of mixtures grows quickly:
    66 for three models, 286 for four at ten steps.

    Raises:
        MismatchError: There are fewer than two models or one step, or architectures differ.
        DataError: A model holds values that are not finite.
        TaskError: The task fails or does not fit the models.
    """
    if len(models) < 2 or steps < 1:
        raise MismatchError(f"cannot measure a simplex of {len(models)} models in {steps} steps; use 2 or more, and 1")
    labels = [f"model {number}" for number in range(1, len(models) + 1)]
    check_alike(models, labels)
    check_finite(models, labels)
    evaluator = _Evaluator(task, models, splits, renormalization, device)
    grid = [tuple(part / steps for part in parts) for parts in _compositions(steps, len(models))]
    rows = []
    for weights in grid:
        rows.append(evaluator(weights))
        if progress is not None:
            progress(weights)
    centre = evaluator([1 / len(models)] * len(models))
    return [_simplex(grid, column, middle) for column, middle in zip(zip(*rows, strict=True), centre, strict=True)]


def _simplex(grid: Sequence[tuple[float, ...]], column: Sequence[Evaluation], centre: Evaluation) -> Simplex:
    count = len(grid[0])
    loss_at = {weights: item.loss if item.is_finite else math.inf for weights, item in zip(grid, column, strict=True)}
    corners = [loss_at[tuple(float(place == number) for place in range(count))] for number in range(count)]
    loss_at.setdefault((1 / count,) * count, centre.loss if centre.is_finite else math.inf)
    heights = [
        (loss - math.fsum(w * c for w, c in zip(weights, corners, strict=True)), weights)
        for weights, loss in loss_at.items()
        if max(weights) < 1
    ]
    height, position = max([(0.0, grid[0]), *heights], key=lambda item: item[0])
    if math.inf in corners:
        height = math.nan
    return Simplex(
        centre.split, tuple(grid), tuple(item.loss for item in column), centre.loss, centre.accuracy, height, position
    )


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yield every way to write a number as an ordered sum of so many numbers from zero on."""
    for bars in itertools.combinations(range(total + parts - 1), parts - 1):
        edges = (-1, *bars, total + parts - 1)
        yield tuple(after - before - 1 for before, after in itertools.pairwise(edges))
