"""TALL masks and consensus: what of the sum of task vectors each task needs, and what several of them need.

With τ the merged task vector (the sum, or TIES') and dᵢ those of the models, task i needs the entries where
|dᵢ| > λᵢ·|τ - dᵢ|. The masks are decided in float64, so that they do not hang on rounding.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from graftwork.merge.methods.registry import Parameter, register
from graftwork.merge.methods.task_arithmetic import magnitude
from graftwork.merge.passes import Apply, Group, Select, TaskMasks, everything, nothing
from graftwork.merge.vocabulary import Value, distance, where, zeros_like

MASK_LAMBDA = Parameter(
    "mask_lambda", "how far a task's own change must stand out; larger values keep less", default=0.4, per_model=True,
    minimum=0, extension=True,
)  # fmt: skip
DENSITY = Parameter(
    "density", "share of each task vector that TIES keeps", default=0.2, per_model=True, minimum=0, maximum=1,
    extension=True,
)  # fmt: skip
SCOPE = Parameter(
    "scope", "TIES ranks over the whole model as published, or within each tensor", type=("model", "tensor"),
    default="model", extension=True,
)  # fmt: skip
THRESHOLD = Parameter(
    "threshold", "number of tasks that must need an entry", type=int, default=2, minimum=0, extension=True
)


# ---------------------------------------------------------------- formulas


def summed(models: Sequence[Value], base: Value) -> Value:
    """Return Σ dᵢ."""
    total = zeros_like(base)
    for x in models:
        total = total + (x - base)
    return total


def elected(models: Sequence[Value], base: Value, cut: Sequence[float]) -> Value:
    """Return the sum of the trimmed task vectors' entries of the elected sign: TIES with weights 1, not normalised."""
    total = zeros_like(base)
    for x, low in zip(models, cut):  # noqa: B905 - numba knows no strict=
        total = total + where(distance(x, base, low) >= low, x - base, zeros_like(base))
    positive = total >= 0
    agreeing = zeros_like(base)
    for x, low in zip(models, cut):  # noqa: B905
        delta = x - base
        kept = (distance(x, base, low) >= low) & (delta != 0) & ((delta > 0) == positive)
        agreeing = agreeing + where(kept, delta, zeros_like(base))
    return agreeing


def merged_change(models: Sequence[Value], base: Value, cut: Sequence[float], trim: bool) -> Value:
    """Return τ."""
    return elected(models, base, cut) if trim else summed(models, base)


def needed_by(
    models: Sequence[Value], base: Value, total: Value, mask_lambda: Sequence[float], worth: Sequence[float]
) -> Value:
    """Return the sum of `worth` over the tasks that need the entry."""
    found = zeros_like(base)
    for x, strength, value in zip(models, mask_lambda, worth):  # noqa: B905
        delta = x - base
        found = found + where(abs(delta) > strength * abs(total - delta), value, zeros_like(base))
    return found


def agreed(
    models: Sequence[Value], base: Value, index: Value, *, mask_lambda: Sequence[float], worth: Sequence[float],
    cut: Sequence[float], threshold: float, scale: float, trim: bool,
) -> Value:  # fmt: skip
    """Return the base plus the merged task vector where enough tasks need it."""
    total = merged_change(models, base, cut, trim)
    enough = needed_by(models, base, total, mask_lambda, worth) >= threshold
    return base + where(enough, scale * total, zeros_like(base))


def whole_change(models: Sequence[Value], base: Value, index: Value, *, cut: Sequence[float], trim: bool) -> Value:
    """Return τ alone."""
    return merged_change(models, base, cut, trim)


def mask_bits(
    models: Sequence[Value], base: Value, index: Value, *, mask_lambda: Sequence[float], worth: Sequence[float],
    cut: Sequence[float], trim: bool,
) -> Value:  # fmt: skip
    """Return the sum of the powers of two that stand for the tasks that need the entry."""
    return needed_by(models, base, merged_change(models, base, cut, trim), mask_lambda, worth)


# ---------------------------------------------------------------- programs


def scale_parameter(default: float) -> Parameter:
    """Return the parameter `scale` with this default."""
    return Parameter("scale", "factor on the merged task vector", default=default, extension=True)


def _cuts(group: Group, density: Sequence[float]) -> Generator[Select, Any, tuple[Any, ...]]:
    """Return, for each model, the cut that keeps the largest share of its task vector, as `ties` does."""
    if all(share in (0, 1) for share in density):
        return tuple(everything(group.wide) if share else nothing(group.wide) for share in density)
    ranks = tuple((max(1, int(share * group.size)) if share > 0 else 0,) for share in density)
    like = (np.float64(0) if group.wide else np.float32(0),) * group.models
    found = yield Select(magnitude, ranks, {"like": like}, each=True, wide=group.wide)
    return tuple(cut for (cut,) in found)


def _untrimmed(group: Group) -> tuple[float, ...]:
    """Return what stands for the cuts where the task vectors are summed as they are."""
    return (0.0,) * group.models


def _agreed(group: Group, *, threshold: int, mask_lambda: Sequence[float], scale: float, cut: Any, trim: bool) -> Apply:
    settings = {"mask_lambda": tuple(mask_lambda), "worth": (1.0,) * group.models, "cut": cut, "trim": trim}
    if threshold > group.models:
        group.notes.append(f"threshold {threshold} is above the number of models: the base's values stay")
    return Apply(agreed, {**settings, "threshold": float(threshold), "scale": scale}, precision="float64")


@register(
    "consensus_ta",
    title="Consensus task arithmetic",
    kind="elementwise",
    base="required",
    formula="b + scale · τ where Σᵢ mᵢ ≥ threshold,  τ = Σ dᵢ, mᵢ = [|dᵢ| > mask_lambdaᵢ·|τ - dᵢ|]",
    reference="https://arxiv.org/abs/2405.07813",
    parameters=(THRESHOLD, MASK_LAMBDA, scale_parameter(0.3)),
)
def consensus_ta(group: Group, *, threshold: int, mask_lambda: Sequence[float], scale: float) -> Apply:
    """Add the task vectors and keep the entries that several tasks need."""
    cut = _untrimmed(group)
    return _agreed(group, threshold=threshold, mask_lambda=mask_lambda, scale=scale, cut=cut, trim=False)


@register(
    "consensus_ties",
    title="Consensus TIES",
    kind="selection",
    base="required",
    formula="as consensus_ta,  τ = Σᵢ cᵢ m(dᵢ), c and m as TIES",
    reference="https://arxiv.org/abs/2405.07813",
    parameters=(THRESHOLD, MASK_LAMBDA, scale_parameter(0.3), DENSITY, SCOPE),
)
def consensus_ties(
    group: Group, *, threshold: int, mask_lambda: Sequence[float], scale: float, density: Sequence[float], scope: str
) -> Generator[Select, Any, Apply]:
    """Merge by TIES and keep the entries that several tasks need."""
    cut = yield from _cuts(group, density)
    return _agreed(group, threshold=threshold, mask_lambda=mask_lambda, scale=scale, cut=cut, trim=True)


def tall_side_outputs(
    group: Group, *, mask_lambda: Sequence[float], scale: float, from_: str, density: Sequence[float], scope: str
) -> Generator[Select, Any, TaskMasks]:
    """Return the passes that make τ and the tasks' masks."""
    trim = from_ == "ties"
    cut = (yield from _cuts(group, density)) if trim else _untrimmed(group)
    settings = {"cut": cut, "trim": trim}
    return TaskMasks(
        Apply(whole_change, settings, precision="float64"),
        Apply(mask_bits, {**settings, "mask_lambda": tuple(mask_lambda)}, precision="float64"),
    )


@register(
    "tall_masks",
    title="TALL masks",
    kind="selection",
    base="required",
    formula="b + scale · τ; beside it τ and the masks mᵢ = [|dᵢ| > mask_lambdaᵢ·|τ - dᵢ|]",
    reference="https://arxiv.org/abs/2405.07813",
    parameters=(
        Parameter("from", "τ is the sum of the task vectors, or their merge by TIES", type=("sum", "ties"),
                  default="sum", extension=True),
        MASK_LAMBDA, scale_parameter(1.0), DENSITY, SCOPE,
    ),
    task_masks=tall_side_outputs,
)  # fmt: skip
def tall_masks(
    group: Group, *, mask_lambda: Sequence[float], scale: float, from_: str, density: Sequence[float], scope: str
) -> Generator[Select, Any, Apply]:
    """Merge, and write for each task which entries of the merged task vector it needs."""
    trim = from_ == "ties"
    cut = (yield from _cuts(group, density)) if trim else _untrimmed(group)
    return _agreed(group, threshold=0, mask_lambda=mask_lambda, scale=scale, cut=cut, trim=trim)
