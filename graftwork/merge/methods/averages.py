"""Averages whose weights come from the geometry of the models."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from graftwork.merge.methods.common import OPTIONAL_WEIGHT, cancelling_weights, combined_deltas, vectors
from graftwork.merge.methods.registry import Parameter, register
from graftwork.merge.passes import Apply, ApplyRows, Gram, Group

Matrix = np.ndarray[Any, np.dtype[np.float64]]


def stock_ratio(gram: Matrix) -> Matrix:
    """Return t = K·c/(1 + (K-1)·c) in [0, 1] from Gram matrices (…, K, K), c the mean cosine over pairs (eq. 8)."""
    count = gram.shape[-1]
    norms = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    scale = norms[..., :, None] * norms[..., None, :]
    cosine = np.where(scale > 0, np.clip(gram / np.where(scale > 0, scale, 1.0), -1.0, 1.0), 0.0)
    upper = np.triu_indices(count, 1)
    mean = cosine[..., upper[0], upper[1]].mean(-1)
    below = 1.0 + (count - 1) * mean
    ratio: Matrix = np.where(below > 0, count * mean / np.where(below > 0, below, 1.0), 0.0)
    return np.minimum(np.maximum(ratio, 0.0), 1.0)


def stock_rows(models: Matrix, base: Matrix, first: int) -> Matrix:
    """Return the model stock of every row along the last axis on its own."""
    delta = np.atleast_1d(models - base) if models.ndim > 1 else (models - base)[:, None]
    gram = np.einsum("k...c,l...c->...kl", delta, delta)
    ratio = stock_ratio(gram)[..., None]
    merged: Matrix = base + (ratio * delta.mean(0)).reshape(base.shape)
    return merged


@register(
    "model_stock",
    title="Model Stock",
    kind="combination",
    base="required",
    formula="b + t · mean(xᵢ - b),  t = K·cos θ/(1 + (K-1)·cos θ)",
    reference="https://arxiv.org/abs/2403.19522",
    parameters=(Parameter("filter_wise", "one ratio per row instead of one per tensor", type=bool, default=False),),
    models=(2, None),
)
def model_stock(group: Group, *, filter_wise: bool) -> Generator[Gram, Matrix, Apply | ApplyRows]:
    """Move from the base towards the models' mean, as far as they agree on the direction.

    The mean cosine over all pairs stands for the paper's single angle. Unlike mergekit, t is kept within [0, 1] and
    small task vectors are not treated as zero.
    """
    if filter_wise:
        return ApplyRows(stock_rows)
    gram = yield vectors(group, deltas=True)
    ratio = float(stock_ratio(gram))
    return Apply(combined_deltas, {"coefficient": (ratio / group.models,) * group.models})


@register(
    "geometric_median",
    title="Geometric median",
    kind="combination",
    base="optional",
    formula="argmin_y Σ aᵢ |y - xᵢ|",
    reference="https://arxiv.org/abs/1912.13445",
    parameters=(
        OPTIONAL_WEIGHT,
        Parameter(
            "nu",
            "smallest distance, relative to the largest between two models",
            default=1e-6,
            minimum=0,
            extension=True,
        ),
        Parameter("max_iter", "most iterations", type=int, default=100, minimum=0, extension=True),
        Parameter(
            "scope",
            "distances over the whole model or tensor by tensor",
            type=("model", "tensor"),
            default="model",
            extension=True,
        ),
    ),
    check=cancelling_weights,
)
def geometric_median(
    group: Group, *, weight: Sequence[float], nu: float, max_iter: int, scope: str
) -> Generator[Gram, Matrix, Apply]:
    """The point with the least sum of distances to the models (Weiszfeld's iteration): outliers hardly move it."""
    gram = yield vectors(group, deltas=True)
    diagonal = np.diag(gram)
    squared = np.maximum(0.0, diagonal[:, None] + diagonal[None, :] - 2 * gram)
    share = np.array(weight) / sum(weight)
    point = share
    smallest = nu * float(np.sqrt(squared.max()))
    for _ in range(max_iter if squared.max() > 0 else 0):
        distance = np.sqrt(np.maximum(0.0, squared @ point - point @ squared @ point / 2))
        following = share / np.maximum(distance, max(smallest, np.finfo(float).tiny))
        following = following / following.sum()
        change = float(np.abs(following - point).max())
        point = following
        if change < 1e-10:
            break
    return Apply(combined_deltas, {"coefficient": tuple(point.tolist())})
