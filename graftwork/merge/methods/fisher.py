"""Averaging in which every model has its say where its predictions depend on the entry."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np

from graftwork.merge.errors import DataError, MismatchError
from graftwork.merge.methods.common import OPTIONAL_WEIGHT
from graftwork.merge.methods.registry import Available, Parameter, register
from graftwork.merge.passes import Apply, Companion, Group, Sums
from graftwork.merge.vocabulary import Value, maximum, number, zeros_like


def information_terms(
    model: Value, models: Sequence[Value], base: Value, index: Value, *, fisher: Value
) -> tuple[Value, Value, Value]:
    """Return, of one model's entry: its information squared, 1, and 1 if it is negative."""
    zero = zeros_like(fisher)
    return (fisher * fisher, number(fisher == fisher, fisher), number(fisher < zero, fisher))


def weighted_by_information(
    models: Sequence[Value], base: Value, index: Value, *, fisher: Sequence[Value], coefficient: Sequence[float],
    scale: Sequence[float], floor: Sequence[float],
) -> Value:  # fmt: skip
    """Return Σ λ F̂ x / Σ λ F̂ with F̂ = max(F · scale, floor)."""
    total = zeros_like(base)
    divisor = zeros_like(base)
    for x, value, factor, unit, least in zip(models, fisher, coefficient, scale, floor):  # noqa: B905
        share = factor * maximum(value * unit, least)
        total = total + share * x
        divisor = divisor + share
    return total / divisor


def mean_of(models: Sequence[Value], base: Value, index: Value, *, coefficient: Sequence[float]) -> Value:
    """Return Σ λ x, λ summing to one."""
    total = zeros_like(base)
    for x, factor in zip(models, coefficient):  # noqa: B905
        total = total + factor * x
    return total


def shares(weight: Sequence[float]) -> tuple[float, ...]:
    """Return weights divided by their sum."""
    return tuple(value / sum(weight) for value in weight)


def unfit(*, weight: Sequence[float], floor: float = 1.0, **_: Any) -> str | None:
    """Return what is wrong with weights or floor, or None."""
    if floor <= 0:
        return f"the floor is {floor:g}; it has to be above zero, or entries that nobody uses divide by zero"
    if any(value < 0 for value in weight) or sum(weight) <= 0:
        listed = ", ".join(f"{value:g}" for value in weight)
        return f"the weights are {listed}; they must not be negative, and one has to be above zero"
    return None


def _statistics(name: str, available: Available, parameters: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Say that a tensor's information is read with it, if there is some."""
    having = [name in tensors for tensors in available.get("fisher", ())]
    if all(having) and having:
        return {"fisher": ("fisher", name)}
    if any(having) and parameters.get("missing", "error") == "error":
        lacking = ", ".join(f"model {place}" for place, has in enumerate(having) if not has)
        raise MismatchError(
            f'cannot merge "{name}": the Fisher file of {lacking} has no such tensor; measure it again, '
            "or take the plain mean there with `missing: mean`"
        )
    return {}


@register(
    "fisher",
    title="Fisher-weighted averaging",
    kind="elementwise",
    base="ignored",
    formula="Σ λᵢ F̂ᵢ xᵢ / Σ λᵢ F̂ᵢ,  F̂ᵢ = max(Fᵢ / sᵢ, floor)",
    reference="https://arxiv.org/abs/2111.09832",
    parameters=(
        OPTIONAL_WEIGHT,
        Parameter("floor", "least information of an entry, relative to sᵢ", default=1e-4, minimum=0, extension=True),
        Parameter(
            "scope",
            "sᵢ over the whole model, over each tensor, or 1",
            type=("model", "tensor", "none"),
            default="model",
            extension=True,
        ),
        Parameter(
            "missing",
            "a tensor that one model has no information of: an error, or the mean of all",
            type=("error", "mean"),
            default="error",
            extension=True,
        ),
    ),
    statistics=("fisher",),
    companions=_statistics,
    check=unfit,
)
def fisher(
    group: Group, *, weight: Sequence[float], floor: float, scope: str, missing: str
) -> Generator[Sums, np.ndarray[Any, Any], Apply]:
    """Weight every entry of a model by how much its predictions depend on it (diagonal Fisher information).

    sᵢ is the root mean square of a model's information over all that is merged. Unlike the published code, the floor is
    applied after scaling, and to all models alike, so neither the scale of a model's information nor the order of the
    models matters.
    """
    coefficient = shares(weight)
    if "fisher" not in group.companions:
        return Apply(mean_of, {"coefficient": coefficient}, precision="float64")
    sums = yield Sums(information_terms, 3 * group.models, {"fisher": Companion("fisher")}, each=True)
    scales = []
    for place in range(group.models):
        squares, count, negative = (float(value) for value in sums[3 * place : 3 * place + 3])
        if negative:
            _refuse_negative(group, place)
        size = (squares / count) ** 0.5
        if size == 0 and scope != "none":
            group.notes.append(f"the information of model {place} is zero everywhere; it has the floor's weight")
        scales.append(1.0 if scope == "none" else 1 / size if size > 0 else 0.0)
    parameters = {
        "fisher": Companion("fisher"),
        "coefficient": coefficient,
        "scale": tuple(scales),
        "floor": (floor,) * group.models,
    }
    return Apply(weighted_by_information, parameters, precision="float64")


def _refuse_negative(group: Group, place: int) -> None:
    """Raise an error if it is this tensor in which a model's information is negative."""
    values = group.measured["fisher"][place].values(group.name).reshape(-1)
    bad = np.flatnonzero(values < 0)
    if len(bad):
        raise DataError(
            f'cannot merge "{group.name}": the Fisher information of model {place} is {values[bad[0]]:g} at flat index '
            f"{bad[0]}, which no information can be; measure it again"
        )
