"""Linear layers merged by regression: outputs as near as can be to those of each model on its own inputs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from graftwork.merge.errors import DataError, MismatchError
from graftwork.merge.methods.common import OPTIONAL_WEIGHT
from graftwork.merge.methods.fisher import mean_of, shares, unfit
from graftwork.merge.methods.registry import Available, Parameter, register
from graftwork.merge.passes import Apply, ApplyMatrix, Companion, Group

Matrix = np.ndarray[Any, np.dtype[np.float64]]

_LARGEST_RIDGE = 1e-2
_RIDGE_STEP = 100.0


def factorised(total: Matrix, ridge: float, what: str) -> Any:
    """Return the Cholesky factor of a Gram matrix plus a ridge, relative to its mean diagonal; more of it if need be.

    Raises:
        DataError: It cannot be factorised with the largest ridge either.
    """
    from scipy.linalg import LinAlgError, cho_factor

    unit = float(np.trace(total)) / len(total)
    relative = ridge
    while True:
        try:
            return cho_factor(total + relative * unit * np.eye(len(total)), lower=True)
        except (LinAlgError, ValueError):
            if relative >= _LARGEST_RIDGE:
                rank = int(np.linalg.matrix_rank(total, hermitian=True)) if np.isfinite(total).all() else 0
                raise DataError(
                    f"cannot solve for {what}: its Gram matrix of {len(total)} columns has a rank of about {rank} "
                    f"and cannot be factorised; measure more examples, or set `alpha` below 1"
                ) from None
            relative = min(_LARGEST_RIDGE, max(relative, 1e-8) * _RIDGE_STEP)


def solved(
    weights: Sequence[Matrix], grams: Sequence[Matrix], share: Sequence[float], *, alpha: float, ridge: float, what: str
) -> Matrix:
    """Return the regression (eq. 9) of weights (out, columns), as its difference from the mean plus the mean.

    Directions that no input excites keep the mean, where the published form (ΣG)⁻¹ΣGW has anything or fails.
    """
    from scipy.linalg import cho_solve

    mean = sum(factor * weight for factor, weight in zip(share, weights, strict=True))
    width = grams[0].shape[-1]
    total = np.zeros((width, width))
    right = np.zeros((width, weights[0].shape[0]))
    for factor, gram, weight in zip(share, grams, weights, strict=True):
        shrunk = alpha * gram + (1 - alpha) * np.diag(np.diagonal(gram)) if alpha < 1 else gram
        total += factor * shrunk
        right += factor * (shrunk @ (weight - mean).T)
    if not total.any():
        return np.asarray(mean)
    return np.asarray(mean + cho_solve(factorised(total, ridge, what), right).T)


def merged_layer(
    weights: Sequence[Matrix],
    biases: Sequence[Matrix] | None,
    grams: Sequence[Matrix],
    share: Sequence[float],
    *,
    transposed: bool,
    groups: int,
    alpha: float,
    ridge: float,
    what: str,
) -> tuple[Matrix, Matrix | None]:
    """Return weight and bias of one layer; the bias is None where none takes part."""
    flat = [(weight.T if transposed else weight).reshape(groups, -1, _width(weight, transposed)) for weight in weights]
    columns = grams[0].shape[-1]
    joint = columns == flat[0].shape[-1] + 1
    if joint != (biases is not None) or columns - joint != flat[0].shape[-1]:
        raise MismatchError(
            f"cannot solve for {what}: its Gram matrix has {columns} columns, the weight {flat[0].shape[-1]} and "
            f"{'a' if biases is not None else 'no'} bias; measure it on these models again"
        )
    if biases is not None:
        flat = [
            np.concatenate([weight, bias.reshape(groups, -1, 1)], -1) for weight, bias in zip(flat, biases, strict=True)
        ]
    stacked = [gram.reshape(groups, columns, columns) for gram in grams]
    parts = [
        solved(
            [weight[place] for weight in flat],
            [gram[place] for gram in stacked],
            share,
            alpha=alpha,
            ridge=ridge,
            what=what,
        )
        for place in range(groups)
    ]
    together = np.concatenate(parts)
    weight = together[:, : columns - joint]
    bias = together[:, -1] if joint else None
    return (weight.T if transposed else weight).reshape(weights[0].shape), bias


def _width(weight: Matrix, transposed: bool) -> int:
    return weight.shape[0] if transposed else int(np.prod(weight.shape[1:]))


def regression_weight(
    models: Matrix,
    base: Matrix | None,
    first: int,
    *,
    gram: list[Matrix],
    bias: list[Matrix] | None = None,
    **more: Any,
) -> Matrix:
    """Return the merged weight of a layer."""
    joint = gram[0].shape[-1] == _width(models[0], more["transposed"]) + 1
    return merged_layer(list(models), bias if joint else None, gram, **more)[0]


def regression_bias(
    models: Matrix, base: Matrix | None, first: int, *, gram: list[Matrix], weight: list[Matrix], **more: Any
) -> Matrix:
    """Return the merged bias of a layer: solved with the weight, or the mean if Gram matrices leave it out."""
    if gram[0].shape[-1] == _width(weight[0], more["transposed"]):
        return np.asarray(sum(factor * model for factor, model in zip(more["share"], models, strict=True)))
    bias = merged_layer(weight, list(models), gram, **more)[1]
    assert bias is not None
    return bias


def _partner(name: str, own: str, other: str) -> str | None:
    """Return the name of the other tensor of the same layer: `fc.weight` for `fc.bias`."""
    stem, dot, leaf = name.rpartition(".")
    return stem + dot + other if leaf == own else None


def _statistics(name: str, available: Available, parameters: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Say which Gram matrix goes with a weight or bias, and which tensor of the same layer."""
    weight = _partner(name, "bias", "weight") or name
    having = [weight in tensors for tensors in available.get("gram", ())]
    if not any(having):
        return {}
    if not all(having):
        lacking = ", ".join(f"model {place}" for place, has in enumerate(having) if not has)
        if parameters.get("missing", "error") == "mean":
            return {}
        raise MismatchError(
            f'cannot merge "{name}": the Gram file of {lacking} has no "{weight}"; measure it again, '
            "or take the plain mean there with `missing: mean`"
        )
    partner, key = (weight, "weight") if weight != name else (_partner(name, "weight", "bias"), "bias")
    found = {"gram": ("gram", weight)}
    if partner is not None and all(partner in tensors for tensors in available["model"]):
        found[key] = ("model", partner)
    return found


@lru_cache(maxsize=16)
def _layers(text: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(text)
    return found


@register(
    "regmean",
    title="RegMean",
    kind="matrix",
    base="ignored",
    formula="M + (Σ λᵢ Gᵢ + ρ)⁻¹ Σ λᵢ Gᵢ (Wᵢ - M),  M = Σ λᵢ Wᵢ",
    reference="https://arxiv.org/abs/2212.09849",
    parameters=(
        OPTIONAL_WEIGHT,
        Parameter("alpha", "factor on what is not on the diagonal of Gᵢ", default=1.0, minimum=0, maximum=1),
        Parameter("ridge", "ρ, relative to the mean of the diagonal", default=1e-6, minimum=0, extension=True),
        Parameter(
            "missing",
            "a layer that one model has no Gram matrix of: an error, or the mean of all",
            type=("error", "mean"),
            default="error",
            extension=True,
        ),
    ),
    statistics=("gram",),
    companions=_statistics,
    check=unfit,
)
def regmean(group: Group, *, weight: Sequence[float], alpha: float, ridge: float, missing: str) -> Apply | ApplyMatrix:
    """Merge every linear layer so that its outputs stay near those of each model on that model's own inputs.

    Gᵢ are the Gram matrices of a layer's inputs. Where a layer has a bias it is one more column of the weight. What is
    no linear layer or convolution is the weighted mean.
    """
    share = shares(weight)
    if "gram" not in group.companions:
        return Apply(mean_of, {"coefficient": share}, precision="float64")
    is_bias = "weight" in group.companions
    own = _partner(group.name, "bias", "weight") if is_bias else group.name
    assert own is not None
    facts = _layers(group.measured["gram"][0].metadata.get("layers", "{}")).get(own, {})
    parameters: dict[str, Any] = {
        name: Companion(name) for name in ("gram", "weight", "bias") if name in group.companions
    }
    settings = {
        "share": share,
        "transposed": bool(facts.get("transposed", False)),
        "groups": int(facts.get("groups", 1)),
        "alpha": alpha,
        "ridge": ridge,
        "what": f'"{own}"',
    }
    return ApplyMatrix(regression_bias if is_bias else regression_weight, {**parameters, **settings})
