"""The task-arithmetic family: eight methods, one formula.

With task vectors dᵢ = xᵢ - b, masks mᵢ and scales sᵢ, vᵢ = wᵢ sᵢ mᵢ dᵢ:

    plain:      out = b + λ Σ vᵢ / D,                D = Σ wᵢ  (1 if not normalised, or if the weights cancel)
    consensus:  out = b + λ Σ cᵢ vᵢ / Σ cᵢ wᵢ,       cᵢ = [sign vᵢ = g],  g = +1 if Σ vᵢ ≥ 0 else -1
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from graftwork.merge.methods.common import INT8_MASK, LAMBDA, SEED, WEIGHT, cancels, combined_deltas, normalize
from graftwork.merge.methods.registry import Parameter, register
from graftwork.merge.passes import EVERYTHING, NOTHING, Apply, Group, PerElement, Select, Sums
from graftwork.merge.random import keep_threshold
from graftwork.merge.vocabulary import Value, admitted, distance_key, drawn, number, where, zeros_like

Array = np.ndarray[Any, np.dtype[np.float64]]

DENSITY = Parameter("density", "share of each task vector that is kept", default=1.0, per_model=True, minimum=0, maximum=1)
GAMMA = Parameter("gamma", "share of the largest entries that is dropped", default=0.01, per_model=True, minimum=0, maximum=1)
EPSILON = Parameter("epsilon", "half the spread of the keep probability over ranks", default=0.15, per_model=True, minimum=0)
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


def selected(
    models: Sequence[Value], base: Value, index: Value, *, weight: Sequence[float], scale: Sequence[float],
    lower_key: Sequence[int], lower_index: Sequence[int], upper_key: Sequence[int], upper_index: Sequence[int],
    factor: float, wide: bool, consensus: bool, normalize: bool,
) -> Value:  # fmt: skip
    """Return the family's formula over the entries admitted by the lower cut and not by the upper one."""
    total = zeros_like(base)
    for x, w, s, lk, li, uk, ui in zip(models, weight, scale, lower_key, lower_index, upper_key, upper_index):  # noqa: B905
        key = distance_key(x, base, wide)
        kept = admitted(key, index, lk, li) != admitted(key, index, uk, ui)
        total = total + where(kept, w * (s * (x - base)), zeros_like(base))
    if not consensus:
        return base + factor * total
    positive = total >= 0
    agreeing = zeros_like(base)
    divisor = zeros_like(base)
    for x, w, s, lk, li, uk, ui in zip(models, weight, scale, lower_key, lower_index, upper_key, upper_index):  # noqa: B905
        key = distance_key(x, base, wide)
        kept = admitted(key, index, lk, li) != admitted(key, index, uk, ui)
        vote = where(kept, w * (s * (x - base)), zeros_like(base))
        counted = where(positive, number(vote > 0, base), number(vote < 0, base))
        agreeing = agreeing + counted * vote
        divisor = divisor + counted * w
    if normalize:
        agreeing = where(divisor == 0, agreeing, agreeing / divisor)
    return base + factor * agreeing


def sampled(
    models: Sequence[Value], base: Value, index: Value, *, weight: Sequence[float], scale: Sequence[float],
    key: Sequence[int], threshold: Sequence[int], factor: float, consensus: bool, normalize: bool,
) -> Value:  # fmt: skip
    """Return the family's formula over randomly drawn entries."""
    total = zeros_like(base)
    for x, w, s, k, t in zip(models, weight, scale, key, threshold):  # noqa: B905
        total = total + where(drawn(k, index, t), w * (s * (x - base)), zeros_like(base))
    if not consensus:
        return base + factor * total
    positive = total >= 0
    agreeing = zeros_like(base)
    divisor = zeros_like(base)
    for x, w, s, k, t in zip(models, weight, scale, key, threshold):  # noqa: B905
        vote = where(drawn(k, index, t), w * (s * (x - base)), zeros_like(base))
        counted = where(positive, number(vote > 0, base), number(vote < 0, base))
        agreeing = agreeing + counted * vote
        divisor = divisor + counted * w
    if normalize:
        agreeing = where(divisor == 0, agreeing, agreeing / divisor)
    return base + factor * agreeing


def distance(model: Value, models: Sequence[Value], base: Value, index: Value, *, wide: bool) -> tuple[Value]:
    """Return the key by which entries of a task vector are ranked."""
    return (distance_key(model, base, wide),)


def selected_norms(
    model: Value, models: Sequence[Value], base: Value, index: Value, *, lower_key: int, lower_index: int, upper_key: int, upper_index: int,
    wide: bool,
) -> tuple[Value, Value]:  # fmt: skip
    """Return |d| and |m∘d| for a selection."""
    size = abs(model - base)
    key = distance_key(model, base, wide)
    kept = admitted(key, index, lower_key, lower_index) != admitted(key, index, upper_key, upper_index)
    return size, where(kept, size, zeros_like(size))


def sampled_norms(
    model: Value, models: Sequence[Value], base: Value, index: Value, *, key: int, threshold: int
) -> tuple[Value, Value]:  # fmt: skip
    """Return |d| and |m∘d| for a random mask."""
    size = abs(model - base)
    return size, where(drawn(key, index, threshold), size, zeros_like(size))


# ---------------------------------------------------------------- programs


def _scales(sums: Array, density: Sequence[float]) -> tuple[float, ...]:
    """Return Σ|d| / Σ|m∘d| for each model; one where nothing was dropped or nothing is left."""
    pairs = zip(sums[0::2].tolist(), sums[1::2].tolist(), density, strict=True)
    return tuple(1.0 if share >= 1 or kept == 0 else every / kept for every, kept, share in pairs)


def _apply(
    group: Group, formula: Any, *, weight: Sequence[float], lambda_: float, normalize: bool, consensus: bool, scale: Any,
    **mask: Any,
) -> Apply:  # fmt: skip
    """Return the family's last pass. An election must not hang on rounding, so it is evaluated in float64."""
    factor = lambda_
    if normalize and not consensus and not cancels(weight):
        factor = lambda_ / sum(weight)
    if not consensus and isinstance(scale, tuple):
        weight, scale = tuple(w * s for w, s in zip(weight, scale, strict=True)), (1.0,) * group.models
    settings = {"weight": tuple(weight), "scale": scale, "factor": factor, "consensus": consensus}
    return Apply(
        formula,
        {**settings, "normalize": normalize and consensus, **mask},
        precision="float64" if consensus else "float32",
    )


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
        cuts = tuple((NOTHING, EVERYTHING if pair[1] else NOTHING) for pair in wanted)
    else:
        cuts = yield Select(distance, tuple(wanted), {"wide": group.wide}, each=True)
    mask = {
        "lower_key": tuple(lower.key for _, lower in cuts),
        "lower_index": tuple(lower.index for _, lower in cuts),
        "upper_key": tuple(upper.key for upper, _ in cuts),
        "upper_index": tuple(upper.index for upper, _ in cuts),
        "wide": group.wide,
    }
    scale = (1.0,) * group.models
    if rescale and min(density) < 1:
        sums = yield Sums(selected_norms, 2 * group.models, mask, each=True)
        scale = _scales(sums, density)
    return _apply(
        group, selected, weight=weight, lambda_=lambda_, normalize=normalize, consensus=consensus, scale=scale, **mask
    )


def _sampling(
    group: Group, *, weight: Sequence[float], density: Sequence[float], lambda_: float, normalize: bool,
    rescale: bool | str, seed: int, consensus: bool, epsilon: Sequence[float] | None = None,
) -> Passes:  # fmt: skip
    """Keep entries at random; with `epsilon` those of larger magnitude within their row more often."""
    threshold: Any = tuple(keep_threshold(share) for share in density)
    scale: Any = (1.0,) * group.models
    partial = any(0 < share < 1 for share in density)
    if epsilon is not None and partial:
        ranks = {"density": tuple(density), "epsilon": tuple(epsilon)}
        threshold = PerElement(rank_thresholds, ranks)
        if rescale == "inverse":
            scale = PerElement(inverse_probabilities, ranks)
    mask = {"key": group.random_keys(seed), "threshold": threshold}
    if rescale == "density":
        scale = tuple(1.0 / share if share > 0 else 1.0 for share in density)
    elif rescale is True and min(density) < 1:
        sums = yield Sums(sampled_norms, 2 * group.models, mask, each=True)
        scale = _scales(sums, density)
    return _apply(
        group, sampled, weight=weight, lambda_=lambda_, normalize=normalize, consensus=consensus, scale=scale, **mask
    )


def keep_probabilities(models: Array, base: Array, *, density: Sequence[float], epsilon: Sequence[float]) -> Array:
    """Return p = density - ε + 2ε·r/(c-1), r the rank of |d| within its row of length c, ascending."""
    from graftwork.merge.ranks import row_ranks

    probability = np.empty(models.shape)
    for model, (share, spread) in enumerate(zip(density, epsilon, strict=True)):
        target = probability[model]
        if not 0 < share < 1:
            target[...] = min(max(share, 0.0), 1.0)
            continue
        delta = np.abs(models[model] - base).astype(np.float32 if models.dtype != np.float64 else np.float64)
        rows = np.atleast_1d(delta)
        rows = rows if rows.ndim <= 2 else np.moveaxis(rows, 1, -1)
        length = rows.shape[-1]
        ranks = row_ranks(np.ascontiguousarray(rows).reshape(-1, length)).reshape(rows.shape)
        ranks = ranks if rows.ndim <= 2 else np.moveaxis(ranks, -1, 1)
        slope = 2 * spread / (length - 1) if length > 1 else 0.0
        target[...] = ((share - spread if length > 1 else share) + slope * ranks).reshape(target.shape)
    return probability


def rank_thresholds(models: Array, base: Array, *, density: Sequence[float], epsilon: Sequence[float]) -> Array:
    """Return the thresholds of the random draws that keep each entry with its probability."""
    probability = keep_probabilities(models, base, density=density, epsilon=epsilon)
    return np.floor(probability * 4294967296.0 + 0.5).astype(np.int64)


def inverse_probabilities(models: Array, base: Array, *, density: Sequence[float], epsilon: Sequence[float]) -> Array:
    """Return 1/p for each entry."""
    probability = keep_probabilities(models, base, density=density, epsilon=epsilon)
    return 1.0 / np.where(probability > 0, probability, 1.0)


def _epsilon_problem(*, density: Sequence[float], epsilon: Sequence[float], **_: Any) -> str | None:
    for share, spread in zip(density, epsilon, strict=True):
        if 0 < share < 1 and not (0 < share - spread and share + spread < 1):
            return (
                f"density {share:g} and epsilon {spread:g} give keep probabilities from {share - spread:g} to "
                f"{share + spread:g}; choose epsilon below {min(share, 1 - share):g}"
            )
    return None


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
    models=(0, None),
)  # fmt: skip
def task_arithmetic(group: Group, *, weight: Sequence[float], lambda_: float, normalize: bool) -> Apply:
    """Add the weighted sum of the task vectors to the base."""
    divisor = sum(weight) if normalize and not cancels(weight) else 1.0
    return Apply(combined_deltas, {"coefficient": tuple(lambda_ * value / divisor for value in weight)})


@register(
    "ties",
    title="TIES",
    kind="selection",
    base="required",
    formula="b + λ Σ cᵢ wᵢ m(dᵢ) / Σ cᵢ wᵢ,  m keeps the largest entries, cᵢ those with the elected sign",
    reference="https://arxiv.org/abs/2306.01708",
    parameters=(WEIGHT, DENSITY, LAMBDA, normalize(True), rescale(False), SCOPE, INT8_MASK),
    models=(0, None),
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
    models=(0, None),
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
    models=(0, None),
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
    check=_epsilon_problem,
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
    check=_epsilon_problem,
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
