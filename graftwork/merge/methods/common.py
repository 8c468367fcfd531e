"""What several methods share: parameters, checks and the formulas of linear combinations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graftwork.merge.methods.registry import Parameter
from graftwork.merge.passes import Gram, Group
from graftwork.merge.vocabulary import Value, zeros_like

WEIGHT = Parameter("weight", "weight of the model", per_model=True)
OPTIONAL_WEIGHT = Parameter("weight", "weight of the model", default=1.0, per_model=True, extension=True)
LAMBDA = Parameter("lambda", "factor on the merged task vector", default=1.0)
EXTRA_LAMBDA = Parameter("lambda", "factor on the merged task vector", default=1.0, extension=True)
SEED = Parameter("seed", "seed of the random masks", type=int, default=0, minimum=0, extension=True)
INT8_MASK = Parameter("int8_mask", "mergekit's storage type for masks", type=bool, default=False, has_effect=False)

_FLOAT32 = np.finfo(np.float32)


def normalize(default: bool) -> Parameter:
    """Return the parameter `normalize` with this default."""
    return Parameter("normalize", "divide by the sum of the weights", type=bool, default=default)


def cancels(weight: Sequence[float]) -> bool:
    """Return whether weights sum to zero, to within 1e-8 of their absolute sum."""
    return abs(sum(weight)) <= 1e-8 * sum(abs(value) for value in weight)


def unfit_weights(*, weight: Sequence[float], normalize: bool, **_: Any) -> str | None:
    """Return the problem with weights that are not divided by their sum and that float32 cannot hold."""
    if normalize and not cancels(weight):
        return None
    for value in weight:
        if value and not float(_FLOAT32.tiny) <= abs(value) <= float(_FLOAT32.max):
            return f"the weight {value:g} is beyond what float32 holds; change it or set `normalize: true`"
    return None


def cancelling_weights(*, weight: Sequence[float], normalize: bool = True, **_: Any) -> str | None:
    """Return the problem with weights that sum to zero where they are divided by their sum, or that are unfit."""
    if normalize and cancels(weight):
        listed = ", ".join(f"{value:g}" for value in weight)
        return f"the weights ({listed}) sum to zero and cannot be normalised; change them or set `normalize: false`"
    return unfit_weights(weight=weight, normalize=normalize)


def combined_values(models: Sequence[Value], base: Value, index: Value, *, coefficient: Sequence[float]) -> Value:
    """Return Σ cᵢ xᵢ."""
    total = zeros_like(base)
    for model, factor in zip(models, coefficient):  # noqa: B905 - numba knows no strict=
        total = total + factor * model
    return total


def combined_deltas(models: Sequence[Value], base: Value, index: Value, *, coefficient: Sequence[float]) -> Value:
    """Return b + Σ cᵢ (xᵢ - b)."""
    total = zeros_like(base)
    for model, factor in zip(models, coefficient):  # noqa: B905
        total = total + factor * (model - base)
    return base + total


def value_vector(model: Value, models: Sequence[Value], base: Value, index: Value) -> tuple[Value]:
    """Return a model's value, as a vector of a Gram matrix."""
    return (model,)


def delta_vector(model: Value, models: Sequence[Value], base: Value, index: Value) -> tuple[Value]:
    """Return a model's task vector, as a vector of a Gram matrix."""
    return (model - base,)


def vectors(group: Group, *, deltas: bool) -> Gram:
    """Ask for the Gram matrix of the models, or of their task vectors."""
    return Gram(delta_vector if deltas else value_vector, group.models, each=True)
