"""PCB merging: balance parameters by how large they are in their task and how well they go with the other tasks."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from graftwork.merge.methods.consensus import scale_parameter, summed
from graftwork.merge.methods.registry import Parameter, register
from graftwork.merge.methods.task_arithmetic import magnitude
from graftwork.merge.passes import Apply, Cut, Group, Select
from graftwork.merge.vocabulary import Value, exp, maximum, minimum, narrow, tanh, where, wide, zeros_like

_OUTLIERS = 1e-4
"""Share of the smallest and of the largest changes of a task that are clipped to the next ones."""

_LEAST = 1e-12
"""The sum of a parameter's scores is taken to be no smaller."""

_MOST_MODELS = 80
"""e to the power of the number of models has to fit into a float32."""

RATIO = Parameter("ratio", "share of each task's parameters that take part", default=0.1, minimum=0, maximum=1,
                  extension=True)  # fmt: skip
SCOPE = Parameter(
    "scope", "rank over the whole model as published, or within each tensor", type=("model", "tensor"),
    default="model", extension=True,
)  # fmt: skip


def clipped(delta: Value, low: float, span: float) -> Value:
    """Return |d| between `low` and `low + span`."""
    return minimum(maximum(abs(delta), low), low + span)


def balance(delta: Value, total: Value, low: float, span: float, divisor: float, tasks: float) -> Value:
    """Return the score of a parameter in one task, as a float32 number: intra-balancing times inter-balancing."""
    share = (clipped(delta, low, span) - low) / divisor
    return narrow(exp(tasks * (share * share)) * tanh(delta * total))


def above_zero(
    model: Value, models: Sequence[Value], base: Value, index: Value, *, low: float, span: float, divisor: float,
    tasks: float,
) -> tuple[Value]:  # fmt: skip
    """Return the score where it is positive, else zero."""
    score = balance(model - base, summed(models, base), low, span, divisor, tasks)
    return (where(score > 0, score, zeros_like(score)),)


def below_zero(
    model: Value, models: Sequence[Value], base: Value, index: Value, *, low: float, span: float, divisor: float,
    tasks: float,
) -> tuple[Value]:  # fmt: skip
    """Return minus the score where it is negative, else zero."""
    score = balance(model - base, summed(models, base), low, span, divisor, tasks)
    return (where(score < 0, -score, zeros_like(score)),)


def balanced(
    models: Sequence[Value], base: Value, index: Value, *, low: Sequence[float], span: Sequence[float],
    divisor: Sequence[float], cut: Sequence[float], reach: Sequence[float], tasks: float, least: float, scale: float,
) -> Value:  # fmt: skip
    """Return the base plus the mean of the clipped changes, weighted by how far their scores lie above the cut."""
    total = summed(models, base)
    merged = zeros_like(base)
    weights = zeros_like(base)
    for x, lower, width, part, threshold, whole in zip(models, low, span, divisor, cut, reach):  # noqa: B905
        delta = x - base
        score = wide(balance(delta, total, lower, width, part, tasks))
        weight = where(score > threshold, (score - threshold) / whole, zeros_like(base))
        size = clipped(delta, lower, width)
        merged = merged + weight * where(delta > 0, size, where(delta < 0, -size, zeros_like(base)))
        weights = weights + weight
    return base + scale * (merged / maximum(weights, least))


def _score(above: Cut, below: Cut | None) -> float:
    """Return a score of some rank from those of its positive and its negative part."""
    return above.score if below is None or above.score > 0 else -below.score


@register(
    "pcb",
    title="PCB merging",
    kind="selection",
    base="required",
    formula="b + scale · Σ sᵢ d̂ᵢ / Σ sᵢ,  sᵢ from exp(K·norm(|dᵢ|)²)·tanh(dᵢ·Σ dⱼ), zero below its largest `ratio`",
    reference="https://arxiv.org/abs/2410.02396",
    parameters=(RATIO, scale_parameter(1.0), SCOPE),
    models=(1, _MOST_MODELS),
)
def pcb(group: Group, *, ratio: float, scale: float, scope: str) -> Generator[Select, Any, Apply]:
    """Weigh each task's parameters by their size and by their agreement with all tasks, and drop the rest."""
    count, size = group.models, group.size
    # Ranks count from the largest, the published indices from the smallest.
    smallest = size - int(_OUTLIERS * size)
    largest = size - max(0, int((1 - _OUTLIERS) * size - 1))
    like = (np.float64(0) if group.wide else np.float32(0),) * count
    bounds = yield Select(magnitude, ((smallest, largest),) * count, {"like": like}, each=True, wide=group.wide)
    low = tuple(np.float64(pair[0].score) for pair in bounds)
    span = tuple(np.float64(pair[1].score) - start for pair, start in zip(bounds, low, strict=True))
    settings = {"low": low, "span": span, "divisor": tuple(width or np.float64(1) for width in span)}
    scored = {**settings, "tasks": float(count)}
    rank = max(1, size - int((1 - ratio) * size))
    above = yield Select(above_zero, ((rank, 1),) * count, scored, each=True)
    below: Any = ((None, None),) * count
    if any(cut.score <= 0 for cuts in above for cut in cuts):
        below = yield Select(below_zero, ((size - rank + 1, size),) * count, scored, each=True)
    pairs = [tuple(map(_score, *parts)) for parts in zip(above, below, strict=True)]
    cut = tuple(np.float64(threshold) for threshold, _ in pairs)
    reach = tuple(np.float64(most - threshold or 1.0) for threshold, most in pairs)
    return Apply(
        balanced,
        {**settings, "cut": cut, "reach": reach, "tasks": float(count), "least": _LEAST, "scale": scale},
        precision="float64",
    )
