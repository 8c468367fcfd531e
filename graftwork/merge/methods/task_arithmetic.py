"""The task-arithmetic family: eight methods, one formula.

With task vectors dᵢ = xᵢ - b, masks mᵢ and scales sᵢ, vᵢ = wᵢ sᵢ mᵢ dᵢ:

    plain:      out = b + λ Σ vᵢ / D,                D = Σ wᵢ  (1 if not normalised, or if the weights cancel)
    consensus:  out = b + λ Σ cᵢ vᵢ / Σ cᵢ wᵢ,       cᵢ = [sign vᵢ = g],  g = +1 if Σ vᵢ ≥ 0 else -1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np

from graftwork.merge.methods.common import (
    INT8_MASK,
    LAMBDA,
    SEED,
    WEIGHT,
    cancels,
    combined_deltas,
    normalize,
    unfit_weights,
)
from graftwork.merge.methods.registry import Parameter, register
from graftwork.merge.passes import Apply, Formula, Group, PerElement, Select, Sums, everything, nothing
from graftwork.merge.random import draw_limit
from graftwork.merge.vocabulary import Value, distance, number, where, wide, zeros_like

Array = np.ndarray[Any, np.dtype[np.float64]]

DENSITY = Parameter(
    "density", "share of each task vector that is kept", default=1.0, per_model=True, minimum=0, maximum=1
)
GAMMA = Parameter(
    "gamma", "share of the largest entries that is dropped", default=0.01, per_model=True, minimum=0, maximum=1
)
EPSILON = Parameter(
    "epsilon", "half the spread of the keep probability over ranks", default=0.15, per_model=True, minimum=0
)
SCOPE = Parameter(
    "scope", "rank within each tensor, or over the whole model as published", type=("tensor", "model"),
    default="tensor", extension=True,
)  # fmt: skip


def rescale(default: bool, *more: str) -> Parameter:
    """Return the parameter `rescale` with this default and these words beside true and false."""
    return Parameter(
        "rescale", "true: restore each task vector's L1 norm" + "".join(f"; {word}" for word in more),
        type=(True, False, *(word.partition(":")[0] for word in more)), default=default,
    )  # fmt: skip


# ---------------------------------------------------------------- formulas
#
# A selection is a band of magnitudes: at least `lower`, less than `upper`. An election is held in float64, so that
# which sign wins does not hang on rounding; the rest is float32.


def selected_sum(
    models: Sequence[Value], base: Value, index: Value, *, weight: Sequence[float], lower: Sequence[float],
    upper: Sequence[float], factor: float,
) -> Value:  # fmt: skip
    """Return b + factor · Σ wᵢ mᵢ∘dᵢ over selected entries."""
    total = zeros_like(base)
    for x, w, low, high in zip(models, weight, lower, upper):  # noqa: B905
        size = distance(x, base, low)
        total = total + where((size >= low) != (size >= high), w * (x - base), zeros_like(base))
    return base + factor * total


def selected_consensus(
    models: Sequence[Value], base: Value, index: Value, *, weight: Sequence[float], scale: Sequence[float],
    election: Sequence[float], election_scale: Sequence[float], lower: Sequence[float], upper: Sequence[float],
    factor: float, normalize: bool,
) -> Value:  # fmt: skip
    """Return the consensus formula over selected entries."""
    total = zeros_like(wide(base))
    for x, w, s, low, high in zip(models, election, election_scale, lower, upper):  # noqa: B905
        size = distance(x, base, low)
        vote = w * (s * (wide(x) - wide(base)))
        total = total + where((size >= low) != (size >= high), vote, zeros_like(vote))
    positive = total >= 0
    agreeing = zeros_like(base)
    divisor = zeros_like(base)
    for x, w, s, low, high in zip(models, weight, scale, lower, upper):  # noqa: B905
        size = distance(x, base, low)
        delta = x - base
        kept = ((size >= low) != (size >= high)) & (delta != 0) & (((delta > 0) == (w > 0)) == positive)
        agreeing = agreeing + where(kept, w * (s * delta), zeros_like(base))
        divisor = divisor + where(kept, w, zeros_like(base))
    if normalize:
        agreeing = agreeing / where(divisor != 0, divisor, number(divisor == 0, base))
    return base + factor * agreeing


def sampled_sum(
    models: Sequence[Value], base: Value, index: Value, *, weight: Sequence[float], scale: Sequence[float],
    draw: Sequence[int], limit: Sequence[int], factor: float,
) -> Value:  # fmt: skip
    """Return b + factor · Σ wᵢ sᵢ mᵢ∘dᵢ over randomly drawn entries."""
    total = zeros_like(base)
    for x, w, s, word, bound in zip(models, weight, scale, draw, limit):  # noqa: B905
        total = total + where(word <= bound, w * (s * (x - base)), zeros_like(base))
    return base + factor * total


def sampled_consensus(
    models: Sequence[Value], base: Value, index: Value, *, weight: Sequence[float], scale: Sequence[float],
    election: Sequence[float], election_scale: Sequence[float], draw: Sequence[int], limit: Sequence[int],
    factor: float, normalize: bool,
) -> Value:  # fmt: skip
    """Return the consensus formula over randomly drawn entries."""
    total = zeros_like(wide(base))
    for x, w, s, word, bound in zip(models, election, election_scale, draw, limit):  # noqa: B905
        vote = w * (s * (wide(x) - wide(base)))
        total = total + where(word <= bound, vote, zeros_like(vote))
    positive = total >= 0
    agreeing = zeros_like(base)
    divisor = zeros_like(base)
    for x, w, s, word, bound in zip(models, weight, scale, draw, limit):  # noqa: B905
        delta = x - base
        kept = (word <= bound) & (delta != 0) & (((delta > 0) == (w > 0)) == positive)
        agreeing = agreeing + where(kept, w * (s * delta), zeros_like(base))
        divisor = divisor + where(kept, w, zeros_like(base))
    if normalize:
        agreeing = agreeing / where(divisor != 0, divisor, number(divisor == 0, base))
    return base + factor * agreeing


def magnitude(model: Value, models: Sequence[Value], base: Value, index: Value, *, like: float) -> tuple[Value]:
    """Return the score by which entries of a task vector are ranked."""
    return (distance(model, base, like),)


def selected_norms(
    model: Value, models: Sequence[Value], base: Value, index: Value, *, lower: float, upper: float
) -> tuple[Value, Value]:
    """Return |d| and |m∘d| for a selection."""
    size = abs(model - base)
    score = distance(model, base, lower)
    return size, where((score >= lower) != (score >= upper), size, zeros_like(size))


def sampled_norms(
    model: Value, models: Sequence[Value], base: Value, index: Value, *, draw: int, limit: int
) -> tuple[Value, Value]:
    """Return |d| and |m∘d| for a random mask."""
    size = abs(model - base)
    return size, where(draw <= limit, size, zeros_like(size))


# ---------------------------------------------------------------- programs


def _scales(sums: Array, density: Sequence[float]) -> tuple[float, ...]:
    """Return Σ|d| / Σ|m∘d| for each model; one where nothing was dropped or nothing is left."""
    pairs = zip(sums[0::2].tolist(), sums[1::2].tolist(), density, strict=True)
    return tuple(1.0 if share >= 1 or kept == 0 else every / kept for every, kept, share in pairs)


def _consensus(
    weight: Sequence[float], scale: Any, lambda_: float, normalize: bool, mask: Mapping[str, Any], formula: Formula
) -> Apply:
    """Return the pass of a consensus formula."""
    if normalize and any(weight):  # only ratios count, so that no weight is too large or too small for float32
        exponent = math.frexp(max(abs(value) for value in weight))[1]
        weight = tuple(math.ldexp(value, -exponent) for value in weight)
    exact = tuple(np.float64(value) for value in weight)
    exact_scale = scale if isinstance(scale, PerElement) else tuple(np.float64(value) for value in scale)
    settings = {"weight": tuple(weight), "scale": scale, "election": exact, "election_scale": exact_scale}
    return Apply(formula, {**settings, "factor": lambda_, "normalize": normalize, **mask})


def _shares(weight: Sequence[float], normalize: bool) -> tuple[float, ...]:
    """Return the weights, divided by their sum if that is asked for and possible."""
    divisor = sum(weight) if normalize and not cancels(weight) else 1.0
    return tuple(value / divisor for value in weight)


Passes = Generator[Select | Sums, Any, Apply]


def _selecting(
    group: Group, *, weight: Sequence[float], density: Sequence[float], lambda_: float, normalize: bool, rescale: bool,
    consensus: bool, gamma: Sequence[float] | None = None,
) -> Passes:  # fmt: skip
    """Keep the entries of largest magnitude (after the very largest, with `gamma`)."""
    size = group.size
    wanted: list[tuple[int, int]] = []
    for model, share in enumerate(density):
        if share >= 1:
            wanted.append((0, size))
        elif share <= 0:
            wanted.append((0, 0))
        elif gamma is None:
            wanted.append((0, max(1, int(share * size))))
        else:
            kept = int(share * size)
            skipped = min(int(gamma[model] * size), size - kept)
            wanted.append((skipped, skipped + kept))
            if kept == 0:
                group.notes.append(f"density {share:g} keeps none of its {size} entries")
    if all(pair in ((0, 0), (0, size)) for pair in wanted):
        none, all_ = nothing(group.wide), everything(group.wide)
        cuts = tuple((none, all_ if pair[1] else none) for pair in wanted)
    else:
        like = (np.float64(0) if group.wide else np.float32(0),) * group.models
        cuts = yield Select(magnitude, tuple(wanted), {"like": like}, each=True, wide=group.wide)
    mask = {"lower": tuple(lower for _, lower in cuts), "upper": tuple(upper for upper, _ in cuts)}
    scale = (1.0,) * group.models
    if rescale and min(density) < 1:
        sums = yield Sums(selected_norms, 2 * group.models, mask, each=True)
        scale = _scales(sums, density)
    if consensus:
        return _consensus(weight, scale, lambda_, normalize, mask, selected_consensus)
    coefficient = tuple(w * s for w, s in zip(_shares(weight, normalize), scale, strict=True))
    return Apply(selected_sum, {"weight": coefficient, "factor": lambda_, **mask})


def _sampling(
    group: Group, *, weight: Sequence[float], density: Sequence[float], lambda_: float, normalize: bool,
    rescale: bool | str, seed: int, consensus: bool, epsilon: Sequence[float] | None = None,
) -> Passes:  # fmt: skip
    """Keep entries at random; with `epsilon` those of larger magnitude within their row more often."""
    weight = weight if consensus else _shares(weight, normalize)
    limits = tuple(draw_limit(share) for share in density)
    weight = tuple(0.0 if bound < 0 else value for value, bound in zip(weight, limits, strict=True))
    scale: Any = (1.0,) * group.models
    streams = group.random_streams(seed)
    mask: dict[str, Any] = {"draw": streams, "limit": tuple(np.uint32(max(bound, 0)) for bound in limits)}
    if epsilon is not None and any(0 < share < 1 for share in density):
        ranks = {"density": tuple(density), "epsilon": tuple(epsilon)}
        drawn = PerElement(dropped, {**ranks, "keys": streams.keys})
        mask = {"draw": drawn, "limit": (np.uint8(0),) * group.models}
        if rescale == "inverse":
            scale = PerElement(inverse_probabilities, ranks)
    if rescale == "density":
        scale = tuple(1.0 / share if share > 0 else 1.0 for share in density)
    elif rescale is True and min(density) < 1:
        sums = yield Sums(sampled_norms, 2 * group.models, mask, each=True, narrow=True)
        scale = _scales(sums, density)
    if consensus:
        return _consensus(weight, scale, lambda_, normalize, mask, sampled_consensus)
    return Apply(sampled_sum, {"weight": weight, "scale": scale, "factor": lambda_, **mask})


def _by_rank(
    models: Array, base: Array, density: Sequence[float], epsilon: Sequence[float], of: Callable[..., Any]
) -> list[Array]:
    """Return `of(number of the model, rows of the model, rows of the base, p)` for each model, in the tensor's layout.

    p = density - ε + 2ε·r/(c-1) by rank r of |d| in its row of length c, ascending; where there is no choice it is one
    number, and so is what `of` returns. Rows run along the second axis, or along the only one. All rows share p.
    """

    def rows(values: Array) -> Array:
        moved = values if base.ndim <= 2 else np.moveaxis(values, 1, -1)
        return np.ascontiguousarray(moved).reshape(-1, moved.shape[-1])

    length = base.shape[min(1, base.ndim - 1)]
    flat = rows(base)
    made = []
    for which, (model, share, spread) in enumerate(zip(models, density, epsilon, strict=True)):
        if not 0 < share < 1:
            made.append(np.full(base.shape, of(which, None, None, np.array(min(max(share, 0.0), 1.0)))))
            continue
        slope = 2 * spread / (length - 1) if length > 1 else 0.0
        shares = (share - spread if length > 1 else share) + slope * np.arange(length)
        values = of(which, rows(model), flat, shares)
        if base.ndim > 2:
            moved = (base.shape[0], *base.shape[2:], base.shape[1])
            values = np.moveaxis(values.reshape(moved), -1, 1)
        made.append(values.reshape(base.shape))
    return made


def dropped(
    models: Array, base: Array, first: int, *, density: Sequence[float], epsilon: Sequence[float], keys: Sequence[int]
) -> Any:
    """Return 0 for each entry that is kept at random with its probability, and 1 for the others."""
    from graftwork.merge.ranks import draws_of, dropped_by_rank

    def of(which: int, model: Array | None, other: Array | None, shares: Array) -> Any:
        if model is None or other is None:
            return np.uint8(shares == 0)
        limits = np.maximum(np.floor(shares * 4294967296.0 + 0.5) - 1, 0).astype(np.uint32)
        draws = draws_of(keys[which], first, base.size)
        if base.ndim > 2:
            draws = np.moveaxis(draws.reshape(base.shape), 1, -1)
        return dropped_by_rank(model, other, limits, np.ascontiguousarray(draws).reshape(model.shape))

    return _by_rank(models, base, density, epsilon, of)


def inverse_probabilities(
    models: Array, base: Array, first: int, *, density: Sequence[float], epsilon: Sequence[float]
) -> Any:
    """Return 1/p for each entry."""
    from graftwork.merge.ranks import by_rank

    def of(which: int, model: Array | None, other: Array | None, shares: Array) -> Any:
        inverse = 1.0 / np.where(shares > 0, shares, 1.0)
        return inverse if model is None or other is None else by_rank(model, other, inverse)

    return _by_rank(models, base, density, epsilon, of)


def _della_problem(*, density: Sequence[float], epsilon: Sequence[float], **other: Any) -> str | None:
    for share, spread in zip(density, epsilon, strict=True):
        if 0 < share < 1 and not (spread < share and share + spread < 1):
            return (
                f"density {share:g} and epsilon {spread:g} give keep probabilities from {share - spread:g} to "
                f"{share + spread:g}; choose epsilon below {min(share, 1 - share):g}"
            )
    return unfit_weights(**other)


@register(
    "task_arithmetic",
    title="Task arithmetic",
    kind="elementwise",
    base="required",
    formula="b + λ Σ wᵢ dᵢ",
    reference="https://arxiv.org/abs/2212.04089",
    parameters=(
        WEIGHT, LAMBDA, normalize(False),
        Parameter("density", "mergekit accepts it here", default=1.0, per_model=True, has_effect=False),
        Parameter("rescale", "mergekit accepts it here", type=bool, default=False, has_effect=False), INT8_MASK,
    ),
    models=(0, None), check=unfit_weights,
)  # fmt: skip
def task_arithmetic(group: Group, *, weight: Sequence[float], lambda_: float, normalize: bool) -> Apply:
    """Add the weighted sum of the task vectors to the base."""
    return Apply(combined_deltas, {"coefficient": tuple(lambda_ * value for value in _shares(weight, normalize))})


@register(
    "ties",
    title="TIES",
    kind="selection",
    base="required",
    formula="b + λ Σ cᵢ wᵢ m(dᵢ) / Σ cᵢ wᵢ,  m keeps the largest entries, cᵢ those with the elected sign",
    reference="https://arxiv.org/abs/2306.01708",
    parameters=(WEIGHT, DENSITY, LAMBDA, normalize(True), rescale(False), SCOPE, INT8_MASK),
    models=(0, None),
    check=unfit_weights,
)
def ties(
    group: Group, *, weight: Sequence[float], density: Sequence[float], lambda_: float, normalize: bool, rescale: bool,
    scope: str,
) -> Passes:  # fmt: skip
    """Trim each task vector to its largest entries, elect a sign per entry, average those that agree."""
    return _selecting(
        group, weight=weight, density=density, lambda_=lambda_, normalize=normalize, rescale=rescale, consensus=True
    )


@register(
    "breadcrumbs",
    title="Model breadcrumbs",
    kind="selection",
    base="required",
    formula="b + λ Σ wᵢ m(dᵢ),  m drops the very largest and the small entries",
    reference="https://arxiv.org/abs/2312.06795",
    parameters=(WEIGHT, DENSITY, GAMMA, LAMBDA, normalize(False), rescale(False), INT8_MASK),
    models=(0, None),
    check=unfit_weights,
)
def breadcrumbs(
    group: Group, *, weight: Sequence[float], density: Sequence[float], gamma: Sequence[float], lambda_: float,
    normalize: bool, rescale: bool,
) -> Passes:  # fmt: skip
    """Drop both outliers and small entries of each task vector, then add."""
    return _selecting(
        group, weight=weight, density=density, gamma=gamma, lambda_=lambda_, normalize=normalize, rescale=rescale,
        consensus=False,
    )  # fmt: skip


@register(
    "breadcrumbs_ties",
    title="Model breadcrumbs with TIES consensus",
    kind="selection",
    base="required",
    formula="b + λ Σ cᵢ wᵢ m(dᵢ),  m as breadcrumbs, c as TIES",
    reference="https://arxiv.org/abs/2312.06795",
    parameters=(WEIGHT, DENSITY, GAMMA, LAMBDA, normalize(False), rescale(False), INT8_MASK),
    models=(0, None),
    check=unfit_weights,
)
def breadcrumbs_ties(
    group: Group, *, weight: Sequence[float], density: Sequence[float], gamma: Sequence[float], lambda_: float,
    normalize: bool, rescale: bool,
) -> Passes:  # fmt: skip
    """Breadcrumbs' masks with TIES' election of signs."""
    return _selecting(
        group, weight=weight, density=density, gamma=gamma, lambda_=lambda_, normalize=normalize, rescale=rescale,
        consensus=True,
    )  # fmt: skip


@register(
    "dare_linear",
    title="DARE",
    kind="elementwise",
    base="required",
    formula="b + λ Σ wᵢ sᵢ mᵢ∘dᵢ,  mᵢ ~ Bernoulli(density)",
    reference="https://arxiv.org/abs/2311.03099",
    parameters=(
        WEIGHT, DENSITY, LAMBDA, normalize(False), rescale(True, "density: the published 1/density"), SEED, INT8_MASK,
    ),
    models=(0, None), check=unfit_weights,
)  # fmt: skip
def dare_linear(
    group: Group, *, weight: Sequence[float], density: Sequence[float], lambda_: float, normalize: bool,
    rescale: bool | str, seed: int,
) -> Passes:  # fmt: skip
    """Drop entries of the task vectors at random, rescale the rest, then add."""
    return _sampling(
        group, weight=weight, density=density, lambda_=lambda_, normalize=normalize, rescale=rescale, seed=seed,
        consensus=False,
    )  # fmt: skip


@register(
    "dare_ties",
    title="DARE with TIES consensus",
    kind="elementwise",
    base="required",
    formula="b + λ Σ cᵢ wᵢ sᵢ mᵢ∘dᵢ,  mᵢ ~ Bernoulli(density), c as TIES",
    reference="https://arxiv.org/abs/2311.03099",
    parameters=(
        WEIGHT, DENSITY, LAMBDA, normalize(False), rescale(True, "density: the published 1/density"), SEED, INT8_MASK,
    ),
    models=(0, None), check=unfit_weights,
)  # fmt: skip
def dare_ties(
    group: Group, *, weight: Sequence[float], density: Sequence[float], lambda_: float, normalize: bool,
    rescale: bool | str, seed: int,
) -> Passes:  # fmt: skip
    """DARE's random masks with TIES' election of signs."""
    return _sampling(
        group, weight=weight, density=density, lambda_=lambda_, normalize=normalize, rescale=rescale, seed=seed,
        consensus=True,
    )  # fmt: skip


_DELLA = (rescale(True, "inverse: the published 1/p per entry"), SEED, INT8_MASK)


@register(
    "della",
    title="DELLA",
    kind="rows",
    base="required",
    formula="as dare_ties, normalised; keep probability rises with the rank of |d| within its row",
    reference="https://arxiv.org/abs/2406.11617",
    parameters=(WEIGHT, DENSITY, EPSILON, LAMBDA, normalize(True), *_DELLA),
    models=(0, None),
    check=_della_problem,
)
def della(
    group: Group, *, weight: Sequence[float], density: Sequence[float], epsilon: Sequence[float], lambda_: float,
    normalize: bool, rescale: bool | str, seed: int,
) -> Passes:  # fmt: skip
    """Drop entries at random, the smaller of a row more often; elect signs; average those that agree."""
    return _sampling(
        group, weight=weight, density=density, epsilon=epsilon, lambda_=lambda_, normalize=normalize, rescale=rescale,
        seed=seed, consensus=True,
    )  # fmt: skip


@register(
    "della_linear",
    title="DELLA without consensus",
    kind="rows",
    base="required",
    formula="as dare_linear; keep probability rises with the rank of |d| within its row",
    reference="https://arxiv.org/abs/2406.11617",
    parameters=(WEIGHT, DENSITY, EPSILON, LAMBDA, normalize(False), *_DELLA),
    models=(0, None),
    check=_della_problem,
)
def della_linear(
    group: Group, *, weight: Sequence[float], density: Sequence[float], epsilon: Sequence[float], lambda_: float,
    normalize: bool, rescale: bool | str, seed: int,
) -> Passes:  # fmt: skip
    """DELLA's random masks, then a plain sum."""
    return _sampling(
        group, weight=weight, density=density, epsilon=epsilon, lambda_=lambda_, normalize=normalize, rescale=rescale,
        seed=seed, consensus=False,
    )  # fmt: skip
