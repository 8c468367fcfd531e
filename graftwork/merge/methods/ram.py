"""RAM and RAM+: merge what several models changed and what only one changed in different ways."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from graftwork.merge.methods.common import EXTRA_LAMBDA
from graftwork.merge.methods.registry import Parameter, register
from graftwork.merge.passes import Apply, Group, Sums
from graftwork.merge.vocabulary import Value, number, where, zeros_like

EPSILON = Parameter("epsilon", "changes up to this size count as none", default=1e-5, minimum=0)


def changes(models: Sequence[Value], base: Value, epsilon: float) -> Value:
    """Return how many models changed the entry."""
    count = zeros_like(base)
    for x in models:
        count = count + number(abs(x - base) > epsilon, base)
    return count


def shared_and_unique(
    model: Value, models: Sequence[Value], base: Value, index: Value, *, epsilon: float
) -> tuple[Value, Value]:
    """Return one where this model and others changed the entry, and one where it alone did."""
    changed = abs(model - base) > epsilon
    count = changes(models, base, epsilon)
    return number(changed & (count > 1), base), number(changed & (count == 1), base)


def reinforced(
    models: Sequence[Value], base: Value, index: Value, *, factor: Sequence[float], epsilon: float, scale: float
) -> Value:
    """Return the base plus the mean of shared changes, or the only change times its model's factor."""
    count = changes(models, base, epsilon)
    total = zeros_like(base)
    for x, f in zip(models, factor):  # noqa: B905
        delta = x - base
        part = where(count > 1, delta / where(count > 1, count, count + 1), f * delta)
        total = total + where(abs(delta) > epsilon, part, zeros_like(base))
    return base + scale * total


def _report(group: Group, counts: np.ndarray[Any, Any]) -> None:
    if counts.sum() == 0:
        group.notes.append("no model changed it by more than epsilon: the base's values stay")


@register(
    "ram",
    title="RAM",
    kind="elementwise",
    base="required",
    formula="b + λ Σ nᵢ dᵢ / max(1, Σ nᵢ),  nᵢ = [|dᵢ| > epsilon]",
    reference="https://arxiv.org/abs/2601.13572",
    parameters=(EPSILON, EXTRA_LAMBDA),
)
def ram(group: Group, *, epsilon: float, lambda_: float) -> Apply:
    """Average what several models changed, keep what one changed."""
    settings = {"factor": (1.0,) * group.models, "epsilon": epsilon, "scale": lambda_}
    return Apply(reinforced, settings, precision="float64")


@register(
    "ramplus_tl",
    title="RAM+",
    kind="selection",
    base="required",
    formula="as ram; what only model i changed times 1 + r·clip(sharedᵢ/uniqueᵢ, 0, alpha)",
    reference="https://arxiv.org/abs/2601.13572",
    parameters=(
        EPSILON,
        Parameter("r", "strength of the reinforcement", default=0.1),
        Parameter("alpha", "largest ratio of shared to unique changes", default=0.2, minimum=0),
        EXTRA_LAMBDA,
    ),
)
def ramplus_tl(group: Group, *, epsilon: float, r: float, alpha: float, lambda_: float) -> Generator[Any, Any, Apply]:
    """RAM with what only one model changed reinforced by how much it shares with the others."""
    counts = yield Sums(shared_and_unique, 2 * group.models, {"epsilon": epsilon}, each=True)
    _report(group, counts)
    factor = []
    for shared, unique in zip(counts[0::2].tolist(), counts[1::2].tolist(), strict=True):
        ratio = shared / unique if unique else (alpha if shared else 0.0)
        factor.append(1.0 + r * min(max(ratio, 0.0), alpha))
    settings = {"factor": tuple(factor), "epsilon": epsilon, "scale": lambda_}
    return Apply(reinforced, settings, precision="float64")
