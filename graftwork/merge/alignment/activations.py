"""Matching activations: units go together that respond alike to the same inputs.

Each group is solved once, by itself (Ainsworth, Hayase, Srinivasa, "Git Re-Basin", ICLR 2023, section 3.1; the score is
the correlation of Li et al., "Convergent Learning", 2015, which REPAIR uses, too). Moments are summed in float64 while
inputs stream through both models, so that no activations are kept and batches may have any size.

A group's activations are taken where a module reads them: after the activation function, and for the stream of a stage
of a residual network behind its last block. Groups that no module reads are taken where one writes them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from graftwork.merge.alignment.apply import identity
from graftwork.merge.alignment.assignment import Solver, solve_assignment
from graftwork.merge.alignment.matching import Matching, MatchingProgress, NestedGroups, matching_of
from graftwork.merge.alignment.spec import Axis, PermutationSpec, shapes_of
from graftwork.merge.checkpoint import Checkpoint, quoted
from graftwork.merge.errors import DataError, TaskError
from graftwork.merge.evaluation import logits_of, moved, own_random_state
from graftwork.merge.task import Task, fit, raise_user_failure

if TYPE_CHECKING:
    from torch import Tensor, nn

    Source = Checkpoint | Mapping[str, Tensor]

Score = Literal["correlation", "product"]

_UNSEEN = "no module shows its activations"
_CONSTANT = 1e-6
"""A unit whose standard deviation is below this share of its mean, or of the largest one, varies by rounding only."""

_CHUNK = 1 << 16
"""Examples and positions that are summed at a time."""


def match_activations(
    spec: PermutationSpec,
    a: Source,
    b: Source,
    task: Task,
    *,
    score: Score = "correlation",
    device: str = "cpu",
    solver: Solver = "auto",
    progress: Callable[[MatchingProgress], None] | None = None,
) -> Matching:
    """Return the order of B's units for which they respond most like A's.

    Measured on the task's `unlabelled` inputs, else on its training data; labels are not used. The models are in
    evaluation mode, and see the same random numbers if they draw any. A unit that never changes correlates with
    nothing. Groups whose activations no module shows keep their order and are listed as pinned.

    Args:
        spec: Of both models; the names of its tensors are those of the task's model.
        a: The model that stays.
        b: The model whose units are re-ordered.
        task: The network and its inputs.
        score: "correlation", or "product", the mean of the product of activations, which Git Re-Basin uses.
        device: Where the models run.
        solver: For assignments.
        progress: Called after each group.

    Returns:
        As from `match_weights`; objective and distances are of the weights, gains are in the score.

    Raises:
        TaskError: The task fails, has no inputs, or does not fit a checkpoint.
        DataError: Activations are not finite.
        MismatchError: A checkpoint does not fit the spec.
    """
    from graftwork.merge.alignment.scores import nodes_of

    began = time.perf_counter()
    for source, what in ((a, "the first model"), (b, "the second model")):
        spec = spec.verified(shapes_of(source.tensors if isinstance(source, Checkpoint) else source), what=what)
    moments = _measured(spec, a, b, task, device)
    seconds = {"activations": time.perf_counter() - began}
    nodes = nodes_of(spec)
    orders = identity(spec)
    gains: dict[str, float] = {}
    unseen: dict[str, str] = {}
    solves = 0
    for node, inner in nodes.items():
        scores = {groups: found.score(score) for groups, found in moments.items() if groups[0] == node}
        if not scores:
            unseen |= dict.fromkeys((node, *inner), _UNSEEN)
            continue
        if inner:
            seen = tuple(name for name in inner if any(name in groups for groups in scores))
            unseen |= {name: _UNSEEN for name in inner if name not in seen}
            nested = NestedGroups(spec, node, seen, scores)
            natural = {name: orders[name] for name in (node, *seen)}
            found = nested.solve(natural)
            gains[node] = nested.value(found) - nested.value(natural)
            orders.update(found)
        else:
            solved = solve_assignment(scores[(node,)], solver=solver)
            gains[node] = solved.gain
            orders[node] = solved.columns
        solves += 1
        if progress is not None:
            progress(MatchingProgress(0, 1, solves))
    seconds["total"] = time.perf_counter() - began
    result = matching_of(
        spec, a, b, orders, gains=gains, sweeps=1, solves=solves, seconds=seconds, device=device
    )  # fmt: skip
    return replace(result, pinned={**unseen, **result.pinned})


# ---------------------------------------------------------------------------------------------------------------------
# Where activations are


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module reads or writes the units of a node.

    Args:
        module: Its name.
        reads: Whether the units are on its input.
        channel: The axis of the input or output that counts them.
        start: Where their segment begins.
        shape: The lengths of the factors of the segment.
        groups: The node and the groups within it that the segment has.
        keep: Positions of these groups in `shape`, in their order.
    """

    module: str
    reads: bool
    channel: int
    start: int
    shape: tuple[int, ...]
    groups: tuple[str, ...]
    keep: tuple[int, ...]

    def rows(self, values: Tensor) -> Tensor:
        """Return activations as (units, examples and positions); what lies beside the units in a segment counts on."""
        stop = self.start + math.prod(self.shape)
        part = values.movedim(self.channel, 0)[self.start : stop]
        part = part.reshape(*self.shape, -1)
        rest = [axis for axis in range(part.ndim) if axis not in self.keep]
        units = math.prod(self.shape[axis] for axis in self.keep)
        return part.permute(*self.keep, *rest).reshape(units, -1)


def places_of(spec: PermutationSpec, module: nn.Module) -> list[Place]:
    """Return where a network's modules read and write the units of a spec's free groups."""
    from torch import nn

    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = []
    for name, part in module.named_modules():
        weight = f"{name}.weight" if name else "weight"
        tensor = spec.tensors.get(weight)
        if tensor is None:
            continue
        axes = tensor.axes
        sides: list[tuple[Axis, bool, int]] = []
        if isinstance(part, nn.Linear):
            sides = [(axes[1], True, -1), (axes[0], False, -1)]
        elif isinstance(part, convolutions):
            sides = [(axes[0], False, 1)]
            if part.groups == 1:
                sides.append((axes[1], True, 1))
        elif isinstance(part, nn.Embedding):
            sides = [(axes[1], False, -1)]
        elif isinstance(part, nn.modules.batchnorm._BatchNorm | nn.GroupNorm):
            sides = [(axes[0], False, 1)]
        elif len(axes) == 2 and hasattr(part, "nf"):  # the transposed linear layer of GPT-2
            sides = [(axes[0], True, -1), (axes[1], False, -1)]
        elif len(axes) == 1:  # norms over the last axis
            sides = [(axes[0], False, -1)]
        for axis, reads, channel in sides:
            found += _segments(spec, axis, name, reads, channel)
    return found


def _segments(spec: PermutationSpec, axis: Axis, module: str, reads: bool, channel: int) -> list[Place]:
    from graftwork.merge.alignment.scores import nodes_of

    places = []
    for node, inner in nodes_of(spec).items():
        for number, segment in enumerate(axis or ()):
            groups = tuple(name for name in (node, *inner) if name in segment)
            if groups and groups[0] == node:
                keep = tuple(segment.index(name) for name in groups)
                start, shape = spec.segment_start(axis, number), spec.segment_shape(segment)
                places.append(Place(module, reads, channel, start, shape, groups, keep))
    return places


# ---------------------------------------------------------------------------------------------------------------------
# Moments


@dataclass(slots=True)
class Moments:
    """Sums over examples and positions, in float64; values are taken relative to the first ones, against cancellation.

    Args:
        count: How many there were.
        shifts: What was subtracted from both models' values, (units,) each.
        sums: Of both models' values.
        squares: Of their squares.
        products: Of each unit of A with each of B, (units, units).
    """

    count: int = 0
    shifts: list[Tensor] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)
    products: Tensor | None = None

    def add(self, one: Tensor, other: Tensor) -> None:
        """Take in both models' activations, (units, examples and positions)."""
        import torch

        for start in range(0, one.shape[1], _CHUNK):
            parts = [values[:, start : start + _CHUNK].double() for values in (one, other)]
            if self.products is None:
                self.shifts = [part.mean(1) for part in parts]
                self.sums = [torch.zeros_like(shift) for shift in self.shifts]
                self.squares = [torch.zeros_like(shift) for shift in self.shifts]
                self.products = torch.zeros(len(one), len(other), dtype=torch.float64, device=one.device)
            parts = [part - shift[:, None] for part, shift in zip(parts, self.shifts, strict=True)]
            self.count += parts[0].shape[1]
            for number, part in enumerate(parts):
                self.sums[number] += part.sum(1)
                self.squares[number] += part.square().sum(1)
            self.products.addmm_(parts[0], parts[1].T)

    def score(self, kind: Score) -> NDArray[np.float64]:
        """Return the score of each pair of units, float64 (units, units)."""
        import torch

        assert self.products is not None
        means = [total / self.count for total in self.sums]
        covariance = self.products / self.count - means[0][:, None] * means[1]
        result: NDArray[np.float64]
        if kind == "product":
            full = [mean + shift for mean, shift in zip(means, self.shifts, strict=True)]
            result = (covariance + full[0][:, None] * full[1]).cpu().numpy()
            return result
        deviations = [
            (square / self.count - mean.square()).clamp(min=0).sqrt()
            for square, mean in zip(self.squares, means, strict=True)
        ]
        constant = [
            deviation <= _CONSTANT * torch.maximum(deviation.max(), (mean + shift).abs())
            for deviation, mean, shift in zip(deviations, means, self.shifts, strict=True)
        ]
        scale = deviations[0][:, None] * deviations[1]
        unknown = constant[0][:, None] | constant[1]
        result = (covariance / scale.where(~unknown, 1.0)).where(~unknown, 0.0).cpu().numpy()
        return result


def _measured(spec: PermutationSpec, a: Source, b: Source, task: Task, device: str) -> dict[tuple[str, ...], Moments]:
    """Return the moments of each node by the groups that they tell apart."""
    import torch

    doing = f"cannot match activations on task {quoted(task.name)}"
    with own_random_state(device):
        modules = [fit(task, source).to(device).eval() for source in (a, b)]
    places = places_of(spec, modules[0])
    taps = [_Tap(module, places) for module in modules]
    chosen: dict[tuple[str, ...], Place] | None = None
    moments: dict[tuple[str, ...], Moments] = {}
    batches = task.unlabelled or task.batches
    seen = False
    try:
        with torch.no_grad(), own_random_state(device):
            try:
                for number, batch in enumerate(batches()):
                    if not isinstance(batch, tuple | list) or len(batch) != 2:
                        raise TaskError(
                            f"{doing}: batch {number} is {type(batch).__name__}, not a pair (inputs, labels)"
                        )
                    inputs = moved(batch[0], device)
                    for module, tap in zip(modules, taps, strict=True):
                        tap.values.clear()
                        torch.manual_seed(number)  # both models draw the same numbers
                        logits_of(task, module, inputs)
                    seen = True
                    if chosen is None:
                        chosen = _latest(taps[0])
                    for groups, place in chosen.items():
                        rows = [place.rows(tap.values[place]) for tap in taps]
                        if not all(bool(torch.isfinite(values.sum())) for values in rows):
                            raise DataError(
                                f"{doing}: what {quoted(place.module)} {'reads' if place.reads else 'writes'} on batch "
                                f"{number} is not finite; one of the models diverged, or its inputs are not finite"
                            )
                        moments.setdefault(groups, Moments()).add(*rows)
            except BaseException as error:
                raise_user_failure(error, doing)
    finally:
        for tap in taps:
            tap.remove()
    if not seen:
        raise TaskError(f"{doing}: there are no batches of unlabelled or training data")
    return moments


class _Tap:
    """Holds what modules of a network read and write in the pass at hand, in the order of running."""

    def __init__(self, module: nn.Module, places: list[Place]) -> None:
        self.values: dict[Place, Tensor] = {}
        self.handles = []
        parts = dict(module.named_modules())
        for place in places:
            part = parts[place.module]
            if place.reads:
                self.handles.append(part.register_forward_pre_hook(self._reader(place)))
            else:
                self.handles.append(part.register_forward_hook(self._writer(place)))

    def _reader(self, place: Place) -> Callable[..., None]:
        def read(part: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._keep(place, inputs[0])

        return read

    def _writer(self, place: Place) -> Callable[..., None]:
        def write(part: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self._keep(place, output)

        return write

    def _keep(self, place: Place, values: Tensor) -> None:
        self.values.pop(place, None)
        self.values[place] = values.detach()

    def remove(self) -> None:
        """Take the hooks out again."""
        for handle in self.handles:
            handle.remove()


def _latest(tap: _Tap) -> dict[tuple[str, ...], Place]:
    """Return the place of each kind that runs last, those where a module reads before those where one writes."""
    chosen: dict[tuple[str, ...], Place] = {}
    for place in tap.values:
        before = chosen.get(place.groups)
        if before is None or place.reads >= before.reads:
            chosen[place.groups] = place
    return chosen
