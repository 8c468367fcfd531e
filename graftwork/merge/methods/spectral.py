"""Merging by singular vectors: Iso-C, Iso-CTS and TSV-M.

Each works on the task vectors of a matrix, dᵢ = xᵢ - b, in float64. What is no matrix gets the mean of the task
vectors. polar(X) is the orthogonal factor U·Vᵗ of X = U·S·Vᵗ.

Singular vectors whose singular value is zero to within rounding are left out everywhere, because which ones a routine
returns is arbitrary; the authors' programs keep them, so that their result depends on the routine wherever a matrix
lacks rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from graftwork.merge.errors import DataError
from graftwork.merge.methods.common import OPTIONAL_WEIGHT, combined_deltas
from graftwork.merge.methods.registry import Parameter, register
from graftwork.merge.passes import Apply, ApplyMatrix, Group

Array = np.ndarray[Any, np.dtype[np.float64]]

_SMALL = 2.0**-52
"""A singular value up to this times the longer side of the matrix times the largest one counts as zero."""

_SMALL_FLOAT32 = 2.0**-23
"""The same for what a matrix of float32 numbers tells about its rank, in remarks."""

SCALE = Parameter("scale", "factor on the merged task vector", default=1.0, extension=True)
DECOMPOSE = Parameter(
    "decompose", "false: the mean of the task vectors instead; give it with a filter", type=bool, default=True,
    extension=True,
)  # fmt: skip
RESHAPE = Parameter(
    "matrix_reshape", "treat tensors of more than two axes as matrices (first axis, all others)", type=bool,
    default=False, extension=True,
)  # fmt: skip
_SHARED = (SCALE, DECOMPOSE, RESHAPE)


def triplets(matrix: Array, floor: float = 0.0) -> tuple[Array, Array, Array]:
    """Return U (rows, k), the k singular values that are not zero, falling, and V (columns, k).

    Args:
        matrix: The matrix (rows, columns).
        floor: Singular values up to the longer side times 2⁻⁵² times this count as zero, too.
    """
    try:
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
    except np.linalg.LinAlgError:  # the divide-and-conquer routine did not converge; the older one is slower but does
        import scipy.linalg

        left, values, right = scipy.linalg.svd(matrix, full_matrices=False, lapack_driver="gesvd")
    largest = max(float(values[0]) if values.size else 0.0, floor)
    kept = int(np.count_nonzero(values > max(matrix.shape) * _SMALL * largest))
    return left[:, :kept], values[:kept], right[:kept].T


def _leading(found: tuple[Array, Array, Array], count: int) -> tuple[Array, Array, Array]:
    """Return the first triplets, without holding on to the others."""
    left, values, right = found
    return left[:, :count].copy(), values[:count], right[:, :count].copy()


def polar(matrix: Array) -> Array:
    """Return the orthogonal factor of a matrix, on the directions that it has."""
    left, _, right = triplets(matrix)
    product: Array = left @ right.T
    return product


def _isotropic(deltas: Array, common_fraction: float) -> tuple[Array, Array]:
    """Return the merged task vector without its scale (algorithm 1, and 2 if something is left for single tasks)."""
    count, rank = len(deltas), min(deltas.shape[1:])
    total = deltas.sum(0)
    left, values, right = triplets(total)
    spectrum = values
    # Fewer than the models' share of what is not common, or all of it: then there is nothing for single tasks.
    own = min(round((rank - int(rank * common_fraction)) / count), rank // count)
    if own == 0:
        return values.sum() / rank * (left @ right.T), spectrum
    shared = rank - count * own
    common, values, right = left[:, :shared], values[:shared], right[:, :shared]
    lefts, energies, rights = [], 0.0, []
    for delta in deltas:
        # What lies in the common space leaves only rounding, measured by the whole task vector.
        rest = triplets(delta - common @ (common.T @ delta), float(np.linalg.norm(delta)))
        first, energy, second = _leading(rest, own)
        lefts.append(first)
        energies += float(energy.sum())
        rights.append(second)
    energies += float(values.sum())
    merged: Array = energies / rank * (polar(np.hstack([*lefts, common])) @ polar(np.hstack([*rights, right])).T)
    return merged, spectrum


def _singular(deltas: Array, weight: Sequence[float]) -> tuple[Array, Array]:
    """Return the merged task vector without its scale (eq. 8)."""
    count, rank = len(deltas), min(deltas.shape[1:])
    share = max(1, rank // count)
    parts = [_leading(triplets(factor * delta), share) for delta, factor in zip(deltas, weight, strict=True)]
    lefts, values, rights = (np.concatenate(part, axis=-1) for part in zip(*parts, strict=True))
    merged: Array = (polar(lefts) * values) @ polar(rights).T
    return merged, values


def on_matrix(
    models: Array, base: Array, first: int, *, merge: Callable[..., tuple[Array, Array]], scale: float, name: str,
    notes: list[str] | None, **settings: Any,
) -> Array:  # fmt: skip
    """Return b + scale · merge(task vectors) for a whole tensor, seen as a matrix (first axis, all others)."""
    with np.errstate(over="ignore"):
        np.subtract(models, base, out=models)  # they are nobody else's
        deltas = models.reshape(len(models), base.shape[0], -1)
        is_finite = np.isfinite(np.linalg.norm(deltas))
    if not is_finite:
        raise DataError(
            f'cannot merge "{name}": its values are so large that sums of their products overflow; leave it out with '
            "`exclude`, or use an element-wise method"
        )
    if not deltas.any():
        return base
    merged, spectrum = merge(deltas, **settings)
    if notes is not None:
        limit = max(deltas.shape[1:]) * _SMALL_FLOAT32 * float(spectrum[0] if spectrum.size else 0.0)
        rank, full = int(np.count_nonzero(spectrum > limit)), min(deltas.shape[1:])
        if rank < full:
            notes.append(
                f"the sum of the task vectors has rank {rank} of {full} to float32; what lies beyond is rounding, "
                "which this method enlarges as far as float64 can tell it from zero"
            )
    result: Array = base + (scale * merged).reshape(base.shape)
    return result


def _program(
    group: Group, merge: Callable[..., tuple[Array, Array]], *, scale: float, decompose: bool, matrix_reshape: bool,
    remark: bool, coefficient: Sequence[float], **settings: Any,
) -> Apply | ApplyMatrix:  # fmt: skip
    """Return the pass for a matrix, or the mean's for what is none."""
    is_matrix = len(group.shape) == 2 or (matrix_reshape and len(group.shape) > 2)
    if not is_matrix or not decompose:
        return Apply(combined_deltas, {"coefficient": tuple(scale * value / group.models for value in coefficient)})
    given = {"merge": merge, "scale": scale, "name": group.name, "notes": group.notes if remark else None}
    return ApplyMatrix(on_matrix, {**given, **settings})


@register(
    "iso_c",
    title="Iso-C",
    kind="matrix",
    base="required",
    formula="b + scale · mean(S) · U·Vᵗ,  U·S·Vᵗ = Σ dᵢ",
    reference="https://arxiv.org/abs/2502.04959",
    parameters=_SHARED,
)
def iso_c(group: Group, *, scale: float, decompose: bool, matrix_reshape: bool) -> Apply | ApplyMatrix:
    """Add the task vectors, then make all singular values of the sum equal to their mean."""
    return _program(
        group, _isotropic, scale=scale, decompose=decompose, matrix_reshape=matrix_reshape, remark=True,
        coefficient=(1.0,) * group.models, common_fraction=1.0,
    )  # fmt: skip


@register(
    "iso_cts",
    title="Iso-CTS",
    kind="matrix",
    base="required",
    formula="as iso_c; the last singular vectors make room for the first of what the others leave of each dᵢ",
    reference="https://arxiv.org/abs/2502.04959",
    parameters=(
        Parameter(
            "common_fraction", "share of the singular vectors that are those of the sum", default=0.8, minimum=0,
            maximum=1, extension=True,
        ),
        *_SHARED,
    ),
)  # fmt: skip
def iso_cts(
    group: Group, *, common_fraction: float, scale: float, decompose: bool, matrix_reshape: bool
) -> Apply | ApplyMatrix:
    """Equal singular values for directions that the tasks have in common and for each task's own."""
    return _program(
        group, _isotropic, scale=scale, decompose=decompose, matrix_reshape=matrix_reshape, remark=True,
        coefficient=(1.0,) * group.models, common_fraction=common_fraction,
    )  # fmt: skip


@register(
    "tsv_m",
    title="TSV-M",
    kind="matrix",
    base="required",
    formula="b + scale · polar([U₁ … U_K])·S·polar([V₁ … V_K])ᵗ,  the first ⌊rank/K⌋ singular triplets of each wᵢ dᵢ",
    reference="https://arxiv.org/abs/2412.00081",
    parameters=(OPTIONAL_WEIGHT, *_SHARED),
)
def tsv_m(
    group: Group, *, weight: Sequence[float], scale: float, decompose: bool, matrix_reshape: bool
) -> Apply | ApplyMatrix:
    """Keep each task's leading singular vectors and make those of different tasks orthogonal to each other."""
    return _program(
        group, _singular, scale=scale, decompose=decompose, matrix_reshape=matrix_reshape, remark=False,
        coefficient=weight, weight=weight,
    )  # fmt: skip
