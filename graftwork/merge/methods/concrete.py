"""Methods that use what `graftwork masks` has learned: coefficients, a mask over task vectors, or both.

With task vectors dₖ = xₖ - b and, per tensor, coefficients λₖ and mask m:

    out = b + m / mean(m) ∘ Σ λₖ dₖ,     m = 1 for adamerging

Where mean(m) is at most 1e-6 the tensor stays the base's. A tensor of which the file says nothing (BatchNorm's
statistics, heads, what no model has changed) becomes the mean of the models.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from graftwork.merge.errors import MismatchError
from graftwork.merge.methods.common import SEED, combined_deltas
from graftwork.merge.methods.registry import Available, Parameter, register
from graftwork.merge.passes import Apply, Companion, Group, Measured, Streams, Sums
from graftwork.merge.random import stream_key
from graftwork.merge.vocabulary import Value, log, number, sigmoid, where, wide, zeros_like

_EMPTY = 1e-6

_MASK_KIND = Parameter(
    "mask_kind", "how the mask is used; file: as it was learned for",
    type=("file", "expected", "threshold", "sample", "bernoulli"), default="file", extension=True,
)  # fmt: skip
_LAMBDA = Parameter("lambda", "coefficient of every task vector, in place of the file's", default=None, extension=True)


# ---------------------------------------------------------------- formulas; all are evaluated in float64


def steady_mask(logit: Value, threshold: bool) -> Value:
    """Return the expected mask, or the one whose logits are positive."""
    if threshold:
        return number(logit > zeros_like(logit), logit)
    return sigmoid(logit)


def drawn_mask(logit: Value, draw: Value, temperature: float, soft: bool) -> Value:
    """Return a sample of the Concrete distribution, or of the binary one, from a 32-bit random word."""
    uniform = (wide(draw) + 0.5) * 2.0**-32
    if soft:
        return sigmoid((logit + log(uniform) - log(1.0 - uniform)) / temperature)
    return number(uniform < sigmoid(logit), logit)


def steady_term(
    models: Sequence[Value], base: Value, index: Value, *, logit: Sequence[Value], threshold: bool
) -> tuple[Value]:
    """Return the mask, to be added up."""
    return (steady_mask(logit[0], threshold),)


def drawn_term(
    models: Sequence[Value], base: Value, index: Value, *, logit: Sequence[Value], draw: Sequence[Value],
    temperature: float, soft: bool,
) -> tuple[Value]:  # fmt: skip
    """Return the drawn mask, to be added up."""
    return (drawn_mask(logit[0], draw[0], temperature, soft),)


def change(
    models: Sequence[Value], base: Value, coefficient: Sequence[float], least: Sequence[float], trimmed: bool
) -> Value:
    """Return Σ λₖ dₖ; if trimmed, over entries of at least a size that agree with the sign of their sum."""
    total = zeros_like(base)
    if trimmed:
        election = zeros_like(base)
        for x, size in zip(models, least):  # noqa: B905 - numba knows no strict=
            election = election + where(abs(x - base) >= size, x - base, zeros_like(base))
        for x, size, factor in zip(models, least, coefficient):  # noqa: B905
            kept = (abs(x - base) >= size) & ((x - base) * election > zeros_like(base))
            total = total + where(kept, factor * (x - base), zeros_like(base))
    else:
        for x, factor in zip(models, coefficient):  # noqa: B905
            total = total + factor * (x - base)
    return total


def unmasked(
    models: Sequence[Value], base: Value, index: Value, *, coefficient: Sequence[float], least: Sequence[float],
    trimmed: bool,
) -> Value:  # fmt: skip
    """Return b + Σ λₖ dₖ."""
    return base + change(models, base, coefficient, least, trimmed)


def under_steady_mask(
    models: Sequence[Value], base: Value, index: Value, *, logit: Sequence[Value], coefficient: Sequence[float],
    least: Sequence[float], scale: float, threshold: bool, trimmed: bool,
) -> Value:  # fmt: skip
    """Return b + scale · m ∘ Σ λₖ dₖ."""
    return base + scale * steady_mask(logit[0], threshold) * change(models, base, coefficient, least, trimmed)


def under_drawn_mask(
    models: Sequence[Value], base: Value, index: Value, *, logit: Sequence[Value], draw: Sequence[Value],
    coefficient: Sequence[float], least: Sequence[float], scale: float, temperature: float, soft: bool, trimmed: bool,
) -> Value:  # fmt: skip
    """Return b + scale · m ∘ Σ λₖ dₖ with a drawn mask."""
    mask = drawn_mask(logit[0], draw[0], temperature, soft)
    return base + scale * mask * change(models, base, coefficient, least, trimmed)


# ---------------------------------------------------------------- programs


@lru_cache(maxsize=4)
def _columns(layers: str) -> dict[str, int]:
    """Return the column of every tensor in a file's coefficients."""
    return {name: column for column, name in enumerate(json.loads(layers))}


def _logits(name: str, available: Available, parameters: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Say that a tensor's mask is read with it, if the file has one."""
    return {"logit": ("mask", f"{name}.logit")} if f"{name}.logit" in available["mask"][0] else {}


def _file(group: Group, method: str) -> Measured:
    """Return what was learned, if it is meant for this method and these models."""
    [file] = group.measured["mask"]
    made_for = file.metadata.get("method", "")
    if made_for != method:
        raise MismatchError(
            f"cannot merge with {method}: the mask file was learned for {made_for or 'another method'}; "
            f"write `merge_method: {made_for}`, or learn another one"
        )
    rows = file.values("lambda").shape[0]
    if rows != group.models:
        raise MismatchError(
            f'cannot merge "{group.name}": the mask file has coefficients of {rows} models, the recipe names '
            f"{group.models}; name the models with which it was learned"
        )
    return file


def _coefficients(group: Group, file: Measured) -> tuple[float, ...] | None:
    """Return the coefficients of the models for a tensor, or None if the file says nothing of it."""
    column = _columns(file.metadata["layers"]).get(group.name)
    if column is None:
        return None
    values = file.values("lambda")
    return tuple(float(value) for value in values[:, column if values.shape[1] > 1 else 0])


def _trimming(group: Group, file: Measured) -> dict[str, Any]:
    trimmed = file.metadata.get("trimmed") == "true"
    least = tuple(float(value) for value in file.values("trim")) if trimmed else (0.0,) * group.models
    return {"least": least, "trimmed": trimmed}


def _mean(group: Group) -> Apply:
    return Apply(combined_deltas, {"coefficient": (1 / group.models,) * group.models}, precision="float64")


def _masked(
    group: Group, method: str, mask_kind: str, seed: int, coefficient: float | None
) -> Generator[Any, Any, Apply]:
    file = _file(group, method)
    found = _coefficients(group, file)
    if found is None:
        return _mean(group)
    coefficients = found if coefficient is None else (coefficient,) * group.models
    trimming = _trimming(group, file)
    if "logit" not in group.companions:
        raise MismatchError(f'cannot merge "{group.name}": the mask file has no "{group.name}.logit"; make it again')
    kind = file.metadata.get("mask_kind", "expected") if mask_kind == "file" else mask_kind
    mask: dict[str, Any] = {"logit": Companion("logit")}
    drawn = kind in ("sample", "bernoulli")
    if drawn:
        # One mask for all models: they all get the same stream.
        mask["draw"] = Streams((stream_key(seed, group.name, 0),) * group.models)
        mask |= {"temperature": float(json.loads(file.metadata["temperature"])), "soft": kind == "sample"}
    else:
        mask["threshold"] = kind == "threshold"
    [total] = yield Sums(drawn_term if drawn else steady_term, 1, mask)
    density = float(total) / max(group.size, 1)
    scale = 1 / density if density > _EMPTY else 0.0
    formula = under_drawn_mask if drawn else under_steady_mask
    return Apply(formula, {**mask, **trimming, "coefficient": coefficients, "scale": scale}, precision="float64")


_PAPER = "https://arxiv.org/abs/2312.06173"


@register(
    "concrete_task_arithmetic", title="Concrete task arithmetic", kind="elementwise", base="required", models=(2, None),
    formula="b + λ m / mean(m) ∘ Σ (xₖ - b)", reference=_PAPER, parameters=(_LAMBDA, _MASK_KIND, SEED),
    shared=("mask",), companions=_logits,
    summary="Task arithmetic under a mask that was learned on unlabelled inputs.",
)  # fmt: skip
def concrete_task_arithmetic(
    group: Group, *, lambda_: float | None, mask_kind: str, seed: int
) -> Generator[Any, Any, Apply]:
    """Task arithmetic under a mask that was learned on unlabelled inputs."""
    return (yield from _masked(group, "concrete_task_arithmetic", mask_kind, seed, lambda_))


@register(
    "concrete_adamerging", title="Concrete AdaMerging", kind="elementwise", base="required", models=(2, None),
    formula="b + m / mean(m) ∘ Σ λₖ (xₖ - b), λₖ and m learned", reference=_PAPER, parameters=(_MASK_KIND, SEED),
    shared=("mask",), companions=_logits,
    summary="Task vectors with learned coefficients per layer, under a learned mask.",
)  # fmt: skip
def concrete_adamerging(group: Group, *, mask_kind: str, seed: int) -> Generator[Any, Any, Apply]:
    """Task vectors with learned coefficients per layer, under a learned mask."""
    return (yield from _masked(group, "concrete_adamerging", mask_kind, seed, None))


@register(
    "adamerging", title="AdaMerging", kind="elementwise", base="required", models=(2, None),
    formula="b + Σ λₖ (xₖ - b), λₖ learned", reference="https://arxiv.org/abs/2310.02575", shared=("mask",),
    companions=lambda name, available, parameters: {},
    summary="Task arithmetic with coefficients per task or layer that were learned on unlabelled inputs.",
)  # fmt: skip
def adamerging(group: Group) -> Apply:
    """Task arithmetic with coefficients per task or layer that were learned on unlabelled inputs."""
    file = _file(group, "adamerging")
    coefficients = _coefficients(group, file)
    if coefficients is None:
        return _mean(group)
    return Apply(unmasked, {**_trimming(group, file), "coefficient": coefficients}, precision="float64")
