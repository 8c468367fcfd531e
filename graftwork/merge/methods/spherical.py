"""Interpolations along great circles. All need only the Gram matrix of the vectors and return a linear combination."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from graftwork.merge.methods.common import (
    OPTIONAL_WEIGHT,
    WEIGHT,
    cancelling_weights,
    combined_deltas,
    combined_values,
    vectors,
)
from graftwork.merge.methods.registry import Parameter, register
from graftwork.merge.passes import Apply, ApplyMatrix, ApplyRows, Gram, Group
from graftwork.merge.vocabulary import Value

Matrix = np.ndarray[Any, np.dtype[np.float64]]


def arc(aa: Any, ad: Any, dd: Any, t: float, *, threshold: float | None = None) -> tuple[Any, Any]:
    """Return (alpha, beta) such that alpha·a + beta·d lies at `t` on the great circle from a to a + d.

    Works on scalars or arrays of the inner products ⟨a,a⟩, ⟨a,d⟩, ⟨d,d⟩. The angle comes from an arctangent, and the
    sum sin((1-t)θ) + sin(tθ) is written as a product, so that nothing cancels near θ = 0. Linear where a direction is
    missing, where sin θ < 1e-8, and above `threshold` of |cos θ|.
    """
    sine = np.sqrt(np.maximum(0.0, aa * dd - ad * ad))
    cosine = aa + ad
    angle = np.arctan2(sine, cosine)
    other = aa + 2 * ad + dd
    straight = (aa <= 0) | (other <= 0) | (np.sin(angle) < 1e-8)
    if threshold is not None:
        straight = straight | (np.abs(np.cos(angle)) > threshold)
    with np.errstate(divide="ignore", invalid="ignore"):
        alpha = np.where(straight, 1.0, np.cos((0.5 - t) * angle) / np.cos(angle / 2))
        beta = np.where(straight, t, np.sin(t * angle) / np.sin(angle))
    return alpha, beta


def base_and_delta(models: Sequence[Value], base: Value, index: Value) -> tuple[Value, Value]:
    """Return (b, x - b)."""
    return base, models[0] - base


def along_base(models: Sequence[Value], base: Value, index: Value, *, alpha: float, beta: float) -> Value:
    """Return alpha·b + beta·(x - b)."""
    return alpha * base + beta * (models[0] - base)


@register(
    "slerp",
    title="SLERP",
    kind="combination",
    base="required",
    formula="sin((1-t)θ)/sin θ · b + sin(tθ)/sin θ · x,  θ the angle between b and x",
    reference="https://doi.org/10.1145/325165.325242",
    parameters=(
        Parameter("t", "position on the arc: 0 is the base, 1 the model"),
        Parameter("dot_threshold", "linear above this |cos θ|; 1 for the pure formula", default=0.9995, extension=True),
    ),
    models=(1, 1),
)
def slerp(group: Group, *, t: float, dot_threshold: float) -> Generator[Gram, Matrix, Apply]:
    """Spherical interpolation between the base and one model."""
    gram = yield Gram(base_and_delta, 2)
    alpha, beta = arc(gram[0, 0], gram[0, 1], gram[1, 1], t, threshold=dot_threshold)
    return Apply(along_base, {"alpha": float(alpha), "beta": float(beta)})


def pair_of_values(models: Sequence[Value], base: Value, index: Value) -> tuple[Value, Value]:
    """Return (x₁, x₂ - x₁)."""
    return models[0], models[1] - models[0]


def pair_of_deltas(models: Sequence[Value], base: Value, index: Value) -> tuple[Value, Value]:
    """Return (x₁ - b, x₂ - x₁)."""
    return models[0] - base, models[1] - models[0]


def along_pair(models: Sequence[Value], base: Value, index: Value, *, alpha: float, beta: float) -> Value:
    """Return alpha·x₁ + beta·(x₂ - x₁)."""
    return alpha * models[0] + beta * (models[1] - models[0])


def along_pair_of_deltas(models: Sequence[Value], base: Value, index: Value, *, alpha: float, beta: float) -> Value:
    """Return b + alpha·(x₁ - b) + beta·(x₂ - x₁)."""
    return base + (alpha * (models[0] - base) + beta * (models[1] - models[0]))


def arcs_of_rows(models: Matrix, base: Matrix | None, first: int, *, t: float, axis: int) -> Matrix:
    """Return the arcs between the vectors of two tensors that run along `axis`."""
    start = models[0] if base is None else models[0] - base
    step = models[1] - models[0]
    axis = axis if start.ndim else 0
    start, step = np.atleast_1d(start), np.atleast_1d(step)
    alpha, beta = arc(
        (start * start).sum(axis, keepdims=True),
        (start * step).sum(axis, keepdims=True),
        (step * step).sum(axis, keepdims=True),
        t,
    )
    result: Matrix = (alpha * start + beta * step).reshape(models[0].shape)
    return result if base is None else base + result


@register(
    "nuslerp",
    title="NuSLERP",
    kind="combination",
    base="optional",
    formula="[b +] slerp(v₁, v₂, w₂/(w₁+w₂)),  v the models or their task vectors",
    reference="https://github.com/arcee-ai/mergekit",
    parameters=(
        WEIGHT,
        Parameter("nuslerp_flatten", "one angle per tensor instead of one per row", type=bool, default=True),
        Parameter(
            "nuslerp_row_wise",
            "with nuslerp_flatten false: vectors along the first axis instead of the last (named so by mergekit)",
            type=bool,
            default=False,
        ),
    ),
    models=(2, 2),
)
def nuslerp(
    group: Group, *, weight: Sequence[float], nuslerp_flatten: bool, nuslerp_row_wise: bool
) -> Generator[Gram, Matrix, Apply | ApplyRows | ApplyMatrix]:
    """Spherical interpolation between two models, or between their task vectors where there is a base."""
    total = weight[0] + weight[1]
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total
    if not nuslerp_flatten and nuslerp_row_wise:
        return ApplyMatrix(arcs_of_rows, {"t": t, "axis": 0})
    if not nuslerp_flatten:
        return ApplyRows(arcs_of_rows, {"t": t, "axis": -1})
    gram = yield Gram(pair_of_deltas if group.has_base else pair_of_values, 2)
    alpha, beta = arc(gram[0, 0], gram[0, 1], gram[1, 1], t)
    formula = along_pair_of_deltas if group.has_base else along_pair
    return Apply(formula, {"alpha": float(alpha), "beta": float(beta)})


@register(
    "multislerp",
    title="Multi-SLERP",
    kind="combination",
    base="optional",
    formula="[b +] (Σ wₖ|vₖ|) · u/|u|,  u = Σ wᵢ vᵢ/|vᵢ|",
    reference="https://github.com/arcee-ai/mergekit",
    parameters=(
        WEIGHT,
        Parameter("normalize_weights", "divide the weights by their sum", type=bool, default=True),
        Parameter("eps", "mergekit's guard; nothing here needs it", default=1e-8, has_effect=False),
    ),
    check=lambda *, weight, normalize_weights, **_: cancelling_weights(weight=weight, normalize=normalize_weights),
)
def multislerp(group: Group, *, weight: Sequence[float], normalize_weights: bool) -> Generator[Gram, Matrix, Apply]:
    """Barycentre on the sphere of the models' directions, with the average of their norms."""
    formula = combined_deltas if group.has_base else combined_values
    if group.models == 1:
        return Apply(formula, {"coefficient": (1.0,)})
    gram = yield vectors(group, deltas=group.has_base)
    norms = np.sqrt(np.diag(gram))
    total = sum(weight) if normalize_weights else 1.0
    w = np.array(weight) / total
    known = norms > 0
    share = np.where(known, w / np.where(known, norms, 1.0), 0.0)
    squared = float(share @ gram @ share)
    if squared <= 1e-12 * float(np.abs(w).sum()) ** 2:
        if known.any():
            group.notes.append("the directions cancel; their weighted sum is used instead of a barycentre")
        coefficient = w
    else:
        coefficient = float(w @ norms) * share / math.sqrt(squared)
    return Apply(formula, {"coefficient": tuple(coefficient.tolist())})


@register(
    "karcher",
    title="Karcher mean",
    kind="combination",
    base="ignored",
    formula="(Σ aₖ|xₖ|) · Riemannian mean of xᵢ/|xᵢ| on the unit sphere",
    reference="https://doi.org/10.1002/cpa.3160300502",
    parameters=(
        OPTIONAL_WEIGHT,
        Parameter("max_iter", "most iterations", type=int, default=10, minimum=0),
        Parameter("tol", "stop when a step is shorter than this", default=1e-5, minimum=0),
    ),
    check=cancelling_weights,
)
def karcher(group: Group, *, weight: Sequence[float], max_iter: int, tol: float) -> Generator[Gram, Matrix, Apply]:
    """Riemannian mean of the models' directions, with the average of their norms."""
    gram = yield vectors(group, deltas=False)
    norms = np.sqrt(np.diag(gram))
    share = np.array(weight) / sum(weight)
    known = norms > 1e-12 * norms.max()
    coefficient = np.zeros(len(norms))
    total = float(share[known].sum())
    if norms.max() > 0 and total != 0:
        inner = gram[np.ix_(known, known)] / np.outer(norms[known], norms[known])
        np.fill_diagonal(inner, 1.0)
        part = share[known] / total
        coefficient[known] = float(share @ norms) * _mean_direction(inner, part, max_iter, tol) / norms[known]
    return Apply(combined_values, {"coefficient": tuple(coefficient.tolist())})


def _mean_direction(inner: Matrix, share: Matrix, max_iter: int, tol: float) -> Matrix:
    """Return coefficients of unit vectors, given their inner products, whose combination is their Karcher mean."""
    length = float(share @ inner @ share)
    if length < tol * tol:
        point = np.zeros(len(share))
        point[0] = 1.0
    else:
        point = share / math.sqrt(length)
    for _ in range(max_iter):
        cosine = np.clip(inner @ point, -1.0, 1.0)
        angle = np.arccos(cosine)
        sine = np.sqrt(1.0 - cosine * cosine)
        usable = (angle >= tol) & ~((sine < 1e-6) & (cosine < 0))
        gradient = np.where(usable, share * angle / np.where(sine > 0, sine, 1.0), 0.0)
        tangent = gradient - float(gradient @ cosine) * point
        length = math.sqrt(max(0.0, float(tangent @ inner @ tangent)))
        if length < tol:
            break
        point = math.cos(length) * point + math.sin(length) / length * tangent
        point = point / math.sqrt(float(point @ inner @ point))
    return point
