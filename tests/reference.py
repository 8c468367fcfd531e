"""Every merge method once more: plain, slow, float64 numpy, written from the formulas alone.

The engine is judged by its distance to these functions, so they share no code with it. Inputs are float64 arrays that
hold exactly the stored values. `reference` merges one tensor; `reference_model` merges dictionaries of tensors and is
where `scope: model` makes a difference. A `Result` carries the exact value, the magnitude `A` of the acceptance bar
`½ ulp + 2⁻²²·A`, and in `details` what the method decided on the way (masks, cuts, coefficients, condition).

Below, `b` is the base, `x` the models, `d` their differences `x - b`; flat indices are in C order and count from 0.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import scipy.linalg

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """What a method makes of one tensor.

    `details`, where the method has them, each list with one entry per model:

    - `masks`: the entries kept (bool arrays); sce has one mask for all models.
    - `cuts`: `(score, last)`: an entry is kept if its score is above `score`, or equal to it at flat index ≤ `last`;
      None if nothing was cut. breadcrumbs has a pair of cuts: entries up to the first one are dropped as too large.
    - `draws`: the 32-bit random words.
    - `scales`: what the kept differences were multiplied by (numbers, or arrays for `rescale: inverse`).
    - `election`: the sum whose sign is the consensus, and `election_magnitude`: the sum of its terms' magnitudes. Where
      the first is within rounding of 0, two right programs may elect differently.
    - `coefficients`: of b and d for slerp, else of the combined vectors (`x - b`; `x` where there is no base;
      `x - x[0]` for geometric_median without base). Shape (models,), or (models, rows) for methods by rows.
    - `condition`: the factor of the coefficients' bar, 2⁻⁴⁰ · condition · max|coefficient|.
    - `score`, `threshold`: of arcee_fusion. `factors`: of ramplus_tl.
    """

    value: Array
    magnitude: Array
    details: dict[str, Any] = field(default_factory=dict)


# --- Number formats -------------------------------------------------------------------------------------------------

_FORMATS = {
    # name: (significant bits, exponent of the smallest normal number, largest finite value, what overflow becomes)
    "F64": (53, -1022, float(np.finfo(np.float64).max), math.inf),
    "F32": (24, -126, float(np.finfo(np.float32).max), math.inf),
    "F16": (11, -14, 65504.0, math.inf),
    "BF16": (8, -126, (2 - 2.0**-7) * 2.0**127, math.inf),
    "F8_E4M3": (4, -6, 448.0, math.nan),
    "F8_E5M2": (3, -14, 57344.0, math.inf),
}


def ulp(value: Any, dtype: str) -> Array:
    """Return the distance between neighbours of `dtype` at `value`, at least its smallest subnormal."""
    significant, smallest, largest, _ = _FORMATS[dtype]
    magnitude = np.minimum(np.abs(np.asarray(value, dtype=np.float64)), largest)
    exponent = np.frexp(magnitude)[1] - 1  # magnitude = mantissa · 2^exponent, mantissa in [1, 2)
    exponent = np.where(magnitude > 0, np.maximum(exponent, smallest), smallest)
    return np.ldexp(1.0, exponent - significant + 1)


def rounded(values: Any, dtype: str) -> Array:
    """Return float64 `values` rounded once to `dtype` (to nearest, ties to even), still as float64."""
    values = np.asarray(values, dtype=np.float64)
    if dtype == "F64":
        return values.copy()
    _, _, largest, overflow = _FORMATS[dtype]
    step = ulp(values, dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        nearest = np.rint(values / step) * step  # dividing by a power of two is exact
    nearest = np.where(np.isfinite(values), nearest, values)
    return np.where(np.abs(nearest) > largest, np.copysign(overflow, values), nearest)


def allowed(result: Result, output: Any, dtype: str) -> Array:
    """Return how far each entry of `output` may be from the result: ½ ulp + 2⁻²²·A."""
    largest = np.maximum(np.abs(np.asarray(output, dtype=np.float64)), np.abs(result.value))
    return 0.5 * ulp(largest, dtype) + 2.0**-22 * result.magnitude


def excess(result: Result, output: Any, dtype: str) -> float:
    """Return the largest error of `output` in units of what is allowed: the bar is met where this is at most 1."""
    output = np.asarray(output, dtype=np.float64)
    if output.size == 0:
        return 0.0
    error = np.abs(output - result.value)
    if not np.all(np.isfinite(error)):
        return math.inf
    return float(np.max(error / allowed(result, output, dtype)))


# --- Random masks: SplitMix64 ---------------------------------------------------------------------------------------

_WORD = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def mix(word: int) -> int:
    """Return the finaliser of SplitMix64 applied to a 64-bit word."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def name_hash(name: str) -> int:
    """Return the first 8 bytes, little-endian, of the SHA-256 of a tensor's name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "little")


def stream_key(seed: int, name: str, stream: int) -> int:
    """Return the key of the random sequence of one tensor of one model."""

    def step(word: int) -> int:
        return mix((word + _GAMMA) & _WORD)

    return step(step(step(seed & _WORD) ^ name_hash(name)) ^ (stream & _WORD))


def draw(key: int, position: int) -> int:
    """Return the 64-bit draw at `position` of the sequence of `key`."""
    return mix((key + (position + 1) * _GAMMA) & _WORD)


def random_word(key: int, element: int) -> int:
    """Return the 32-bit word of one element: the low half of a draw for an even index, the high half for an odd one."""
    word = draw(key, element >> 1)
    return word >> 32 if element & 1 else word & 0xFFFFFFFF


def random_words(key: int, count: int) -> Array:
    """Return the 32-bit words of elements 0 to `count - 1` as uint64."""
    with np.errstate(over="ignore"):
        word = np.uint64(key) + (np.arange((count + 1) // 2, dtype=np.uint64) + np.uint64(1)) * np.uint64(_GAMMA)
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        word = word ^ (word >> np.uint64(31))
    words = np.empty((word.size, 2), dtype=np.uint64)
    words[:, 0] = word & np.uint64(0xFFFFFFFF)
    words[:, 1] = word >> np.uint64(32)
    return words.reshape(-1)[:count]


def keep_threshold(probability: Any) -> Array:
    """Return the number that a 32-bit word must be below for the entry to be kept."""
    probability = np.asarray(probability, dtype=np.float64)
    return np.floor(np.clip(probability, 0.0, 1.0) * 2.0**32 + 0.5).astype(np.uint64)


# --- Selection ------------------------------------------------------------------------------------------------------


def score_dtype(arrays: Sequence[Array]) -> Any:
    """Return float32, or float64 if some value is not a float32 number (so that the tensor must be float64)."""
    with np.errstate(over="ignore"):
        narrow = all(np.array_equal(array.astype(np.float32).astype(np.float64), array) for array in arrays)
    return np.float32 if narrow else np.float64


def magnitudes_of_difference(model: Array, base: Array, dtype: Any) -> Array:
    """Return the selection scores |x - b|, rounded once from the exact difference."""
    with np.errstate(over="ignore"):
        return np.abs(model.astype(dtype) - base.astype(dtype))


def order_by_score(score: Array) -> Array:
    """Return flat indices by falling score; of equal scores the lower index comes first."""
    return np.argsort(-score.reshape(-1), kind="stable")


def top(score: Array, count: int) -> tuple[Array, tuple[float, int] | None]:
    """Return the mask of the `count` largest scores, and the cut `(score, last index)` that describes it."""
    mask = np.zeros(score.size, dtype=bool)
    if count <= 0:
        return mask.reshape(score.shape), None
    chosen = order_by_score(score)[:count]
    mask[chosen] = True
    return mask.reshape(score.shape), (float(score.reshape(-1)[chosen[-1]]), int(chosen[-1]))


def floor_product(fraction: float, count: int) -> int:
    """Return ⌊fraction · count⌋ of the float64 product."""
    return math.floor(float(fraction) * float(count))


def exact_sum(array: Array) -> float:
    """Return the sum of all entries, accumulated wider than float64."""
    return float(np.sum(array, dtype=np.longdouble))


def gram(vectors: Sequence[Array]) -> Array:
    """Return all inner products of the vectors."""
    count = len(vectors)
    products = np.zeros((count, count))
    for i in range(count):
        for j in range(i, count):
            products[i, j] = products[j, i] = exact_sum(vectors[i] * vectors[j])
    return products


def _each(value: Any, count: int) -> list[Any]:
    """Return one value per model from one value, or from a list of them."""
    if isinstance(value, (list, tuple, np.ndarray)):
        if len(value) != count:
            raise ValueError(f"{len(value)} values for {count} models")
        return list(value)
    return [value] * count


def _cancels(weights: Sequence[float]) -> bool:
    return abs(sum(weights)) <= 1e-8 * sum(abs(weight) for weight in weights)


def _total(weights: Sequence[float]) -> float:
    """Return the sum of the weights, which must not cancel."""
    if _cancels(weights):
        raise ValueError(f"the weights cancel: {weights}")
    return float(sum(weights))


# --- The task-arithmetic family -------------------------------------------------------------------------------------
#
# delta_i = s_i · m_i ∘ d_i;  v_i = w_i · delta_i;  S = Σ v_i
# without consensus: N = S,                                              D = Σ w_i   (weights that cancel: 1)
# with consensus:    g = +1 if S ≥ 0 else -1;  c_i = [sign v_i = g];     N = Σ c_i v_i;  D = Σ c_i w_i  (0: 1)
# out = b + lambda · N / D if normalize, else b + lambda · N


def _combine(
    bases: list[Array],
    models: list[list[Array]],
    masks: list[list[Array]],
    scales: list[list[Any]],
    details: list[dict[str, Any]],
    *,
    weight: Any,
    lambda_: float,
    normalize: bool,
    consensus: bool,
) -> list[Result]:
    results = []
    for tensor, base in enumerate(bases):
        count = len(models[tensor])
        weights = [float(value) for value in _each(weight, count)]
        terms, sizes = [], []
        for i, model in enumerate(models[tensor]):
            factor = weights[i] * np.asarray(scales[tensor][i], dtype=np.float64) * masks[tensor][i]
            terms.append(factor * (model - base))
            sizes.append(np.abs(factor) * (np.abs(model) + np.abs(base)))
        total = np.zeros(base.shape)
        for term in terms:
            total = total + term
        if consensus:
            elected = np.where(total >= 0, 1.0, -1.0)
            agrees = [np.sign(term) == elected for term in terms]
            details[tensor]["election"] = total
            details[tensor]["election_magnitude"] = np.sum([np.zeros(base.shape)] + [np.abs(v) for v in terms], axis=0)
            details[tensor]["agrees"] = agrees
        else:
            agrees = [np.ones(base.shape, dtype=bool) for _ in terms]
        numerator, size, divisor = np.zeros(base.shape), np.zeros(base.shape), np.zeros(base.shape)
        for i in range(count):
            numerator = numerator + agrees[i] * terms[i]
            size = size + agrees[i] * sizes[i]
            divisor = divisor + agrees[i] * weights[i]
        if not normalize:
            divisor = np.ones(base.shape)
        elif consensus:
            divisor = np.where(divisor == 0, 1.0, divisor)
        elif _cancels(weights):
            divisor = np.ones(base.shape)
        value = base + lambda_ * numerator / divisor
        magnitude = np.abs(base) + abs(lambda_) * size / np.abs(divisor)
        details[tensor]["masks"] = masks[tensor]
        details[tensor]["scales"] = scales[tensor]
        results.append(Result(value, magnitude, details[tensor]))
    return results


def _scale_by_norm(differences: Sequence[Array], masks: Sequence[Array]) -> float:
    """Return Σ|d| / Σ|m∘d| over the given tensors of one model; 1 if nothing is left."""
    everything = sum(exact_sum(np.abs(difference)) for difference in differences)
    kept = sum(exact_sum(np.abs(difference) * mask) for difference, mask in zip(differences, masks, strict=True))
    return everything / kept if kept > 0 else 1.0


def _family(
    mask_maker: Callable[..., list[Array]],
    bases: list[Array],
    models: list[list[Array]],
    names: list[str],
    *,
    weight: Any,
    density: Any,
    rescale: bool | str,
    lambda_: float,
    normalize: bool,
    consensus: bool,
    scope: str,
    **options: Any,
) -> list[Result]:
    """Merge tensors whose masks and scales are found per tensor, or over all of them together."""
    everything = range(len(bases))
    groups = [list(everything)] if scope == "model" else [[tensor] for tensor in everything]
    details: list[dict[str, Any]] = [{} for _ in everything]
    masks: list[list[Array]] = [[] for _ in everything]
    scales: list[list[Any]] = [[] for _ in everything]
    for group in groups:
        count = len(models[group[0]])
        densities = _each(density, count)
        for i in range(count):
            made, probabilities = [np.ones(bases[tensor].shape, dtype=bool) for tensor in group], None
            if densities[i] < 1:
                made, probabilities = mask_maker(
                    i, densities[i], [bases[t] for t in group], [models[t] for t in group], [names[t] for t in group],
                    [details[t] for t in group], **options,
                )  # fmt: skip
            found: list[Any] = [1.0] * len(group)
            if densities[i] >= 1 or rescale is False:
                pass
            elif rescale is True:
                differences = [models[tensor][i] - bases[tensor] for tensor in group]
                found = [_scale_by_norm(differences, made)] * len(group)
            elif rescale == "density":
                found = [1.0 / densities[i] if densities[i] > 0 else 1.0] * len(group)
            elif rescale == "inverse":
                found = [1.0 / np.where(probability > 0, probability, 1.0) for probability in probabilities or []]
            else:
                raise ValueError(f"rescale: {rescale!r}")
            for place, tensor in enumerate(group):
                masks[tensor].append(made[place])
                scales[tensor].append(found[place])
    return _combine(
        bases, models, masks, scales, details,
        weight=weight, lambda_=lambda_, normalize=normalize, consensus=consensus,
    )  # fmt: skip


def _note(details: dict[str, Any], key: str, model: int, value: Any) -> None:
    entries = details.setdefault(key, [])
    entries.extend([None] * (model + 1 - len(entries)))
    entries[model] = value


def _top_masks(
    model: int, density: float, bases: list[Array], models: list[list[Array]], names: list[str],
    details: list[dict[str, Any]], *, scores: Any,
) -> tuple[list[Array], None]:  # fmt: skip
    """Keep the k = max(1, ⌊density·n⌋) largest |d| of all given tensors together; none at density 0."""
    pieces = [
        magnitudes_of_difference(x[model], b, scores or score_dtype([b, *x]))
        for b, x in zip(bases, models, strict=True)
    ]
    flat = np.concatenate([piece.reshape(-1) for piece in pieces]) if pieces else np.zeros(0)
    count = max(1, floor_product(density, flat.size)) if density > 0 and flat.size else 0
    mask, cut = top(flat, count)
    for entry in details:
        _note(entry, "cuts", model, cut)
    ends = np.cumsum([piece.size for piece in pieces])[:-1]
    return [part.reshape(piece.shape) for part, piece in zip(np.split(mask, ends), pieces, strict=True)], None


def _breadcrumb_masks(
    model: int, density: float, bases: list[Array], models: list[list[Array]], names: list[str],
    details: list[dict[str, Any]], *, scores: Any, gamma: Any,
) -> tuple[list[Array], None]:  # fmt: skip
    """Keep ranks h to h+a-1 by falling |d|; a = ⌊density·n⌋, h = min(⌊gamma·n⌋, n - a)."""
    (base,), (x,) = bases, models
    score = magnitudes_of_difference(x[model], base, scores or score_dtype([base, *x]))
    kept = floor_product(density, score.size)
    outliers = min(floor_product(_each(gamma, len(x))[model], score.size), score.size - kept)
    dropped, upper = top(score, outliers)
    reached, lower = top(score, outliers + kept)
    _note(details[0], "cuts", model, (upper, lower))
    return [reached & ~dropped], None


def _bernoulli_masks(
    model: int, density: float, bases: list[Array], models: list[list[Array]], names: list[str],
    details: list[dict[str, Any]], *, seed: int, streams: Sequence[int],
) -> tuple[list[Array], None]:  # fmt: skip
    """Keep each entry with probability `density`."""
    masks = []
    for base, name, entry in zip(bases, names, details, strict=True):
        words = random_words(stream_key(seed, name, streams[model]), base.size)
        _note(entry, "draws", model, words)
        masks.append((words < keep_threshold(density)).reshape(base.shape))
    return masks, None


def rows_of(array: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Return a tensor as rows along axis 1 (the whole tensor if it has one axis), and the way back."""
    if array.ndim < 2:
        return array.reshape(1, -1), lambda rows: rows.reshape(array.shape)
    moved = np.moveaxis(array, 1, -1)
    return moved.reshape(-1, array.shape[1]), lambda rows: np.moveaxis(rows.reshape(moved.shape), -1, 1)


def _rank_masks(
    model: int, density: float, bases: list[Array], models: list[list[Array]], names: list[str],
    details: list[dict[str, Any]], *, seed: int, streams: Sequence[int], epsilon: Any, scores: Any,
) -> tuple[list[Array], list[Array]]:  # fmt: skip
    """Keep each entry with probability density - epsilon + 2·epsilon·r/(c-1), r its rank among its row's c |d|."""
    (base,), (x,), (name,) = bases, models, names
    spread = float(_each(epsilon, len(x))[model])
    if density > 0 and (density - spread <= 0 or density + spread >= 1):
        raise ValueError(f"density {density} ± epsilon {spread} leaves (0, 1)")
    score, back = rows_of(magnitudes_of_difference(x[model], base, scores or score_dtype([base, *x])))
    if score.shape[1] <= 1:
        ranks = np.zeros(score.shape, dtype=np.int64)
        probability = np.full(score.shape, float(density))
    else:
        ranks = np.argsort(np.argsort(score, axis=1, kind="stable"), axis=1, kind="stable")
        probability = density - spread + 2 * spread * ranks / (score.shape[1] - 1)
    if density <= 0:
        probability = np.zeros(score.shape)
    words = random_words(stream_key(seed, name, streams[model]), base.size)
    _note(details[0], "draws", model, words)
    _note(details[0], "ranks", model, back(ranks))
    probability = back(probability)
    return [words.reshape(base.shape) < keep_threshold(probability)], [probability]


def _no_masks(*arguments: Any) -> tuple[list[Array], None]:
    return [np.ones(base.shape, dtype=bool) for base in arguments[2]], None


def _task_arithmetic(bases, models, names, streams, scores, *, weight, normalize=False, lambda_=1.0):  # type: ignore[no-untyped-def]
    return _family(
        _no_masks, bases, models, names, weight=weight, density=1.0, rescale=False, lambda_=lambda_,
        normalize=normalize, consensus=False, scope="tensor",
    )  # fmt: skip


def _ties(  # type: ignore[no-untyped-def]
    bases, models, names, streams, scores,
    *, weight, density=1.0, lambda_=1.0, normalize=True, rescale=False, scope="tensor",
):  # fmt: skip
    return _family(
        _top_masks, bases, models, names, weight=weight, density=density, rescale=rescale, lambda_=lambda_,
        normalize=normalize, consensus=True, scope=scope, scores=scores,
    )  # fmt: skip


def _breadcrumbs(consensus: bool):  # type: ignore[no-untyped-def]
    def merge(  # type: ignore[no-untyped-def]
        bases, models, names, streams, scores,
        *, weight, density=1.0, gamma=0.01, lambda_=1.0, normalize=False, rescale=False,
    ):  # fmt: skip
        return _family(
            _breadcrumb_masks, bases, models, names, weight=weight, density=density, rescale=rescale, lambda_=lambda_,
            normalize=normalize, consensus=consensus, scope="tensor", scores=scores, gamma=gamma,
        )  # fmt: skip

    return merge


def _dare(consensus: bool):  # type: ignore[no-untyped-def]
    def merge(  # type: ignore[no-untyped-def]
        bases, models, names, streams, scores,
        *, weight, density=1.0, lambda_=1.0, normalize=False, rescale=True, seed=0,
    ):  # fmt: skip
        return _family(
            _bernoulli_masks, bases, models, names, weight=weight, density=density, rescale=rescale, lambda_=lambda_,
            normalize=normalize, consensus=consensus, scope="tensor", seed=seed, streams=streams,
        )  # fmt: skip

    return merge


def _della(consensus: bool):  # type: ignore[no-untyped-def]
    def merge(  # type: ignore[no-untyped-def]
        bases, models, names, streams, scores,
        *, weight, density=1.0, epsilon=0.15, lambda_=1.0, normalize=consensus, rescale=True, seed=0,
    ):  # fmt: skip
        return _family(
            _rank_masks, bases, models, names, weight=weight, density=density, rescale=rescale, lambda_=lambda_,
            normalize=normalize, consensus=consensus, scope="tensor", seed=seed, streams=streams, epsilon=epsilon,
            scores=scores,
        )  # fmt: skip

    return merge


# --- Averages and interpolations ------------------------------------------------------------------------------------


def _one_by_one(merge_tensor):  # type: ignore[no-untyped-def]
    """Turn a function of one tensor into one of many."""

    def merge(bases, models, names, streams, scores, **parameters):  # type: ignore[no-untyped-def]
        return [
            merge_tensor(base, x, scores=scores, **parameters) for base, x in zip(bases, models, strict=True)
        ]  # fmt: skip

    return merge


def _linear(base, x, *, scores, weight, normalize=True):  # type: ignore[no-untyped-def]
    """Σ w x / Σ w."""
    weights = [float(value) for value in _each(weight, len(x))]
    divisor = _total(weights) if normalize else 1.0
    value, magnitude = np.zeros(x[0].shape), np.zeros(x[0].shape)
    for factor, model in zip(weights, x, strict=True):
        value = value + factor * model
        magnitude = magnitude + np.abs(factor * model)
    return Result(value / divisor, magnitude / abs(divisor), {"coefficients": np.array(weights) / divisor})


def spherical(a: Array, d: Array, t: float, dot_threshold: float | None = None) -> tuple[float, float, float]:
    """Return the coefficients of a and d on the great circle from a to a + d, and their condition.

    θ = atan2(√(Gaa·Gdd - Gad²), Gaa + Gad); the coefficient of a is cos((½ - t)θ)/cos(θ/2), that of d sin(tθ)/sin θ.
    It is the straight line (1, t) if an end is zero, if sin θ < 1e-8, or if |cos θ| > dot_threshold.
    """
    if not a.any() or not (a + d).any():
        return 1.0, t, 1.0
    aa, ad, dd = exact_sum(a * a), exact_sum(a * d), exact_sum(d * d)
    angle = math.atan2(math.sqrt(max(0.0, aa * dd - ad * ad)), aa + ad)
    if math.sin(angle) < 1e-8 or (dot_threshold is not None and abs(math.cos(angle)) > dot_threshold):
        return 1.0, t, 1.0
    condition = 1.0 / math.sin(angle) ** 2 if angle > math.pi / 2 else 1.0
    return math.cos((0.5 - t) * angle) / math.cos(angle / 2), math.sin(t * angle) / math.sin(angle), condition


def _slerp(base, x, *, scores, t, dot_threshold=0.9995):  # type: ignore[no-untyped-def]
    """Interpolate from the base to the model along the great circle."""
    (model,) = x
    alpha, beta, condition = spherical(base, model - base, float(t), dot_threshold)
    value = alpha * base + beta * (model - base)
    magnitude = np.abs(alpha * base) + np.abs(beta) * (np.abs(model) + np.abs(base))
    return Result(value, magnitude, {"coefficients": np.array([alpha, beta]), "condition": condition})


def _from_coefficients(base, x, coefficients, condition):  # type: ignore[no-untyped-def]
    """b + Σ c d, or Σ c x without a base; the coefficients broadcast against the tensors."""
    value = np.zeros(x[0].shape) if base is None else base.copy()
    magnitude = np.abs(value)
    for c, model in zip(coefficients, x, strict=True):
        vector, size = (model, np.abs(model)) if base is None else (model - base, np.abs(model) + np.abs(base))
        value = value + c * vector
        magnitude = magnitude + np.abs(c) * size
    return Result(value, magnitude, {"coefficients": np.array(coefficients), "condition": condition})


def _nuslerp(base, x, *, scores, weight, nuslerp_flatten=True, nuslerp_row_wise=False):  # type: ignore[no-untyped-def]
    """Interpolate between two models (or their differences from the base) along the great circle."""
    first, second = (float(value) for value in _each(weight, 2))
    t = second / (first + second) if abs(first + second) >= 1e-6 else 0.5
    v1, v2 = x if base is None else (x[0] - base, x[1] - base)
    if nuslerp_flatten:
        alpha, beta, condition = spherical(v1, v2 - v1, t)
        return _from_coefficients(base, x, [alpha - beta, beta], condition)
    # By rows along the last axis; `row_wise: true`, despite its name, works along axis 0.
    shape = v1.shape
    v1, v2 = np.atleast_1d(v1), np.atleast_1d(v2)
    axis = 0 if nuslerp_row_wise else v1.ndim - 1
    rows1, rows2 = np.moveaxis(v1, axis, -1), np.moveaxis(v2, axis, -1)
    found = [
        spherical(rows1[row], rows2[row] - rows1[row], t) if rows1.shape[-1] else (1.0, t, 1.0)
        for row in np.ndindex(rows1.shape[:-1])
    ]
    alpha, beta, condition = (np.array([entry[i] for entry in found], dtype=np.float64) for i in range(3))
    spread = [
        np.moveaxis(np.broadcast_to(c.reshape(rows1.shape[:-1])[..., None], rows1.shape), -1, axis).reshape(shape)
        for c in (alpha - beta, beta)
    ]
    result = _from_coefficients(base, x, spread, condition)
    result.details["coefficients"] = np.stack([alpha - beta, beta])
    return result


def _multislerp(base, x, *, scores, weight, normalize_weights=True, eps=None):  # type: ignore[no-untyped-def]
    """The weighted mean direction at the weighted mean norm: c_i = (Σ w n)·(w_i/n_i)/√q, q = |Σ w u|²."""
    weights = np.array([float(value) for value in _each(weight, len(x))])
    if normalize_weights:
        weights = weights / _total(list(weights))
    if len(x) == 1:
        return _from_coefficients(base, x, [1.0], 1.0)
    products = gram([model if base is None else model - base for model in x])
    norms = np.sqrt(np.diag(products))
    per_norm = np.divide(weights, norms, out=np.zeros(len(x)), where=norms > 0)
    q = float(per_norm @ products @ per_norm)
    if q <= 1e-12 * np.sum(np.abs(weights)) ** 2:
        return _from_coefficients(base, x, list(weights), 1.0)
    coefficients = np.sum(weights * norms) * per_norm / math.sqrt(q)
    return _from_coefficients(base, x, list(coefficients), float(np.sum(np.abs(weights)) ** 2 / q))


def _karcher(base, x, *, scores, max_iter=10, tol=1e-5, weight=1.0):  # type: ignore[no-untyped-def]
    """The mean direction on the sphere, found by steps in the tangent space, at the mean norm."""
    weights = np.array([float(value) for value in _each(weight, len(x))])
    weights = weights / _total(list(weights))
    products = gram(x)
    norms = np.sqrt(np.diag(products))
    coefficients = np.zeros(len(x))
    active = norms > 1e-12 * np.max(norms)
    if not active.any():
        return _from_coefficients(None, x, list(coefficients), 1.0)
    u = products[np.ix_(active, active)] / np.outer(norms[active], norms[active])
    np.fill_diagonal(u, 1.0)
    if np.sum(weights[active]) == 0:
        return _from_coefficients(None, x, list(coefficients), 1.0)
    a = weights[active] / np.sum(weights[active])
    if a @ u @ a < tol**2:
        c = np.zeros(len(a))
        c[0] = 1.0
    else:
        c = a / math.sqrt(a @ u @ a)
    for _ in range(max_iter):
        p = np.clip(u @ c, -1.0, 1.0)
        angle = np.arccos(p)
        sine = np.sqrt(1.0 - p * p)
        g = np.zeros(len(a))
        for i in range(len(a)):
            if angle[i] >= tol and not (sine[i] < 1e-6 and p[i] < 0):
                g[i] = a[i] * angle[i] / sine[i]
        tangent = g - (g @ p) * c
        length = math.sqrt(max(0.0, tangent @ u @ tangent))
        if length < tol:
            break
        c = math.cos(length) * c + math.sin(length) / length * tangent
        c = c / math.sqrt(c @ u @ c)
    closest = float(np.min(1.0 + np.clip(u @ c, -1.0, 1.0)))
    coefficients[active] = np.sum(weights * norms) * c / norms[active]
    return _from_coefficients(None, x, list(coefficients), 1.0 / closest if closest > 0 else math.inf)


def stock_ratio(differences: Sequence[Array]) -> tuple[float, float]:
    """Return t = K·cos/(1 + (K-1)·cos), clipped to [0, 1], for the mean cosine of all pairs, and its condition."""
    count = len(differences)
    products = gram(differences)
    norms = np.sqrt(np.diag(products))
    cosines = []
    for i in range(count):
        for j in range(i + 1, count):
            size = norms[i] * norms[j]
            cosines.append(min(1.0, max(-1.0, products[i, j] / size)) if size > 0 else 0.0)
    cosine = float(np.mean(cosines))
    divisor = 1.0 + (count - 1) * cosine
    if divisor <= 0:
        return 0.0, math.inf
    return min(1.0, max(0.0, count * cosine / divisor)), 1.0 / divisor**2


def _model_stock(base, x, *, scores, filter_wise=False):  # type: ignore[no-untyped-def]
    """Go from the base towards the mean of the models, by the ratio that their angles give."""
    count = len(x)
    if not filter_wise:
        t, condition = stock_ratio([model - base for model in x])
        result = _from_coefficients(base, x, [t / count] * count, condition)
        result.details["t"] = t
        return result
    shape = np.atleast_1d(base).shape
    rows = [np.atleast_1d(model - base).reshape(math.prod(shape[:-1]), shape[-1]) for model in x]
    found = [stock_ratio([row[i] for row in rows]) for i in range(rows[0].shape[0])]
    t = np.array([ratio for ratio, _ in found]).reshape(*shape[:-1], 1)
    spread = np.broadcast_to(t, shape).reshape(base.shape)
    result = _from_coefficients(base, x, [spread / count] * count, np.array([condition for _, condition in found]))
    result.details["coefficients"] = np.stack([t.reshape(-1) / count] * count)
    result.details["t"] = t.reshape(-1)
    return result


def _geometric_median(  # type: ignore[no-untyped-def]
    bases, models, names, streams, scores, *, weight=1.0, nu=1e-6, max_iter=100, scope="model"
):
    """The point with the smallest weighted sum of distances, by Weiszfeld's iteration on coefficients."""
    everything = list(range(len(models)))
    results: dict[int, Result] = {}
    for group in [everything] if scope == "model" else [[tensor] for tensor in everything]:
        count = len(models[group[0]])
        weights = np.array([float(value) for value in _each(weight, count)])
        weights = weights / _total(list(weights))
        products = np.zeros((count, count))
        for tensor in group:
            origin = models[tensor][0] if bases[tensor] is None else bases[tensor]
            products = products + gram([model - origin for model in models[tensor]])
        squares = np.diag(products)[:, None] + np.diag(products)[None, :] - 2.0 * products
        np.fill_diagonal(squares, 0.0)
        squares = np.maximum(squares, 0.0)
        floor = nu * math.sqrt(float(np.max(squares)))
        c = weights.copy()
        for _ in range(max_iter if floor > 0 else 0):
            distance = np.sqrt(np.maximum(0.0, squares @ c - 0.5 * (c @ squares @ c)))
            following = weights / np.maximum(distance, floor)
            following = following / np.sum(following)
            change = float(np.max(np.abs(following - c)))
            c = following
            if change < 1e-10:
                break
        for tensor in group:
            if bases[tensor] is None:
                origin = models[tensor][0]
                result = _from_coefficients(origin, models[tensor][1:], list(c[1:]), 1e4)
                result.details["coefficients"] = c
            else:
                result = _from_coefficients(bases[tensor], models[tensor], list(c), 1e4)
            results[tensor] = result
    return [results[tensor] for tensor in everything]


# --- The others -----------------------------------------------------------------------------------------------------


def _sce(base, x, *, scores, select_topk=1.0, select="entries", lambda_=1.0):  # type: ignore[no-untyped-def]
    """Select the entries that vary most between models, weigh models by their energy there, erase the minority sign."""
    count = len(x)
    differences = [model - base for model in x]
    details: dict[str, Any] = {}
    if select_topk >= 1:
        mask = np.ones(base.shape, dtype=bool)
    else:
        mean = np.zeros(base.shape)
        for difference in differences:
            mean = mean + difference
        mean = mean / count
        variance = np.zeros(base.shape)
        for difference in differences:
            variance = variance + (difference - mean) ** 2
        score = (variance / count).astype(scores or score_dtype([base, *x]))
        mask, details["cut"] = top(score, floor_product(select_topk, int(np.count_nonzero(score))))
        details["scores"] = score
    details["masks"] = mask
    energies = np.array([exact_sum((difference * mask) ** 2) for difference in differences])
    total = float(np.sum(energies))
    if select == "weights":
        weights = energies / total if total > 0 else np.full(count, 1.0 / count if mask.any() else 0.0)
        mask = np.ones(base.shape, dtype=bool)
    else:
        weights = energies / total if total > 0 else np.zeros(count)
    details["weights"] = weights
    details["energies"] = energies
    kept = [difference * mask for difference in differences]
    election = np.zeros(base.shape)
    for difference in kept:
        election = election + difference
    elected = np.where(election >= 0, 1.0, -1.0)
    details["election"] = election
    details["election_magnitude"] = np.sum([np.abs(difference) for difference in kept], axis=0)
    numerator, size, divisor = np.zeros(base.shape), np.zeros(base.shape), np.zeros(base.shape)
    for i, difference in enumerate(kept):
        agrees = np.sign(difference) == elected
        numerator = numerator + weights[i] * agrees * difference
        size = size + weights[i] * agrees * (np.abs(x[i]) + np.abs(base))
        divisor = divisor + weights[i] * agrees
    safe = np.where(divisor == 0, 1.0, divisor)
    return Result(base + lambda_ * numerator / safe, np.abs(base) + abs(lambda_) * size / safe, details)


def _nearswap(base, x, *, scores, t):  # type: ignore[no-untyped-def]
    """b + clip(d, -t, t); a negative t gives b."""
    (model,) = x
    limit = max(0.0, float(t))
    difference = model - base
    inside = np.abs(difference) <= limit
    size = np.where(inside, np.abs(model) + np.abs(base), limit)
    return Result(base + np.clip(difference, -limit, limit), np.abs(base) + size, {"masks": inside})


def _changes(base, x, epsilon):  # type: ignore[no-untyped-def]
    changed = [np.abs(model - base) > epsilon for model in x]
    return changed, np.sum(changed, axis=0)


def _ram(base, x, *, scores, epsilon=1e-5, lambda_=1.0):  # type: ignore[no-untyped-def]
    """Where one model changed the entry take its change, where several did take their mean."""
    return _ramplus_tl(base, x, scores=scores, epsilon=epsilon, r=0.0, alpha=0.0, lambda_=lambda_)


def _ramplus_tl(base, x, *, scores, epsilon=1e-5, r=0.1, alpha=0.2, lambda_=1.0):  # type: ignore[no-untyped-def]
    """As ram, and a model's lone changes are enlarged by its ratio of shared to lone changes."""
    changed, holders = _changes(base, x, epsilon)
    divisor = np.maximum(holders, 1)
    value, magnitude, factors = base.copy(), np.abs(base), []
    for model, mask in zip(x, changed, strict=True):
        lone, shared = mask & (holders == 1), mask & (holders > 1)
        lone_count, shared_count = int(np.count_nonzero(lone)), int(np.count_nonzero(shared))
        if lone_count:
            ratio = min(max(shared_count / lone_count, 0.0), alpha)
        else:
            ratio = alpha if shared_count else 0.0
        factors.append(1.0 + r * ratio)
        factor = lambda_ * np.where(lone, factors[-1], np.where(shared, 1.0 / divisor, 0.0))
        value = value + factor * (model - base)
        magnitude = magnitude + np.abs(factor) * (np.abs(model) + np.abs(base))
    return Result(value, magnitude, {"masks": changed, "factors": np.array(factors)})


def divergence_of_rows(x: Array, b: Array) -> Array:
    """Return Σ P log(P/Q) per row, P = softmax(x) + 1e-8 and Q = softmax(b) + 1e-8, without cancellation."""
    d = x - b
    shifted = np.exp(b - np.max(b, axis=-1, keepdims=True))
    q = shifted / np.sum(shifted, axis=-1, keepdims=True)
    if d.size and np.max(np.abs(d)) > 30:  # far apart: nothing to cancel, but expm1 would overflow
        shifted = np.exp(x - np.max(x, axis=-1, keepdims=True))
        p = shifted / np.sum(shifted, axis=-1, keepdims=True)
        return np.sum((p + 1e-8) * np.log((p + 1e-8) / (q + 1e-8)), axis=-1)
    u = d - np.log1p(np.sum(q * np.expm1(d), axis=-1, keepdims=True))  # log(softmax(x) / softmax(b))
    rho = q * np.expm1(u) / (q + 1e-8)
    small = np.abs(rho) < 1e-2
    safe = np.where(small, rho, 0.0)
    series = np.zeros(rho.shape)
    for power in range(12, 1, -1):  # (1+ρ)·log(1+ρ) - ρ = Σ (-ρ)^k / (k·(k-1))
        series = series + (-safe) ** power / (power * (power - 1))
    term = np.where(small, series, (1.0 + rho) * np.log1p(np.where(small, 0.0, rho)) - rho)
    return np.sum((q + 1e-8) * term, axis=-1)


def _arcee_fusion(base, x, *, scores):  # type: ignore[no-untyped-def]
    """Take the model's value where |d| times its row's divergence is an outlier, else the base's."""
    (model,) = x
    if model.size == 0:
        return Result(base.copy(), np.abs(base), {"masks": np.zeros(base.shape, dtype=bool)})
    matrix, other = np.atleast_1d(model), np.atleast_1d(base)
    score = (np.abs(matrix - other) * divergence_of_rows(matrix, other)[..., None]).reshape(base.shape)
    ordered = np.sort(score, axis=None)
    first, middle, third = (ordered[math.floor(q * (ordered.size - 1))] for q in (0.25, 0.5, 0.75))
    threshold = float(middle + 1.5 * (third - first))
    mask = score >= threshold
    value = np.where(mask, model, base)
    return Result(value, np.abs(value), {"masks": mask, "score": score, "threshold": threshold})


def _passthrough(base, x, *, scores, scale=None):  # type: ignore[no-untyped-def]
    """The model times a number."""
    (model,) = x
    value = model.copy() if scale is None else float(_each(scale, 1)[0]) * model
    return Result(value, np.abs(value))


# --- Singular vectors -----------------------------------------------------------------------------------------------


def nonzero_triplets(matrix: Array, size: float = 0.0) -> tuple[Array, Array, Array]:
    """Return U, s, V without the triplets whose s is rounding: at most max(shape)·2⁻⁵² of the largest, or of `size`."""
    u, s, vt = scipy.linalg.svd(matrix, full_matrices=False, lapack_driver="gesvd")
    keep = s > max(matrix.shape) * 2.0**-52 * max(float(np.max(s, initial=0.0)), size)
    return u[:, keep], s[keep], vt[keep].T


def polar_factor(matrix: Array) -> Array:
    """Return U·Vᵗ."""
    u, _, v = nonzero_triplets(matrix)
    return u @ v.T


def _isotropic_sum(differences: Sequence[Array], common_fraction: float) -> Array:
    rows, columns = differences[0].shape
    count, r = len(differences), min(rows, columns)
    left = r - math.floor(r * common_fraction)
    per = min(int(np.rint(left / count)), r // count)
    s = r - count * per
    u, sigma, v = nonzero_triplets(sum(differences, np.zeros((rows, columns))))
    u, sigma, v = u[:, :s], sigma[:s], v[:, :s]
    if per == 0:
        return np.sum(sigma) / r * u @ v.T
    us, vs, energy = [], [], float(np.sum(sigma))
    for difference in differences:
        own = nonzero_triplets(difference - u @ u.T @ difference, float(np.linalg.norm(difference)))
        us.append(own[0][:, :per])
        energy += float(np.sum(own[1][:per]))
        vs.append(own[2][:, :per])
    return energy / r * polar_factor(np.hstack([*us, u])) @ polar_factor(np.hstack([*vs, v])).T


def _task_singular_sum(differences: Sequence[Array], common_fraction: float) -> Array:
    k = max(1, min(differences[0].shape) // len(differences))
    found = [nonzero_triplets(difference) for difference in differences]
    u, v = (polar_factor(np.hstack([triplet[place][:, :k] for triplet in found])) for place in (0, 2))
    return u @ np.diag(np.concatenate([triplet[1][:k] for triplet in found])) @ v.T


def _spectral(merge: Callable[[Sequence[Array], float], Array]):  # type: ignore[no-untyped-def]
    def merged(  # type: ignore[no-untyped-def]
        base, x, *, scores, weight=1.0, scale=1.0, common_fraction=1.0, decompose=True, matrix_reshape=False
    ):
        weights = [float(value) for value in _each(weight, len(x))]
        if not (decompose and (base.ndim == 2 or (matrix_reshape and base.ndim > 2))):
            return _from_coefficients(base, x, [scale * value / len(x) for value in weights], 1.0)
        shape = (base.shape[0], base.size // base.shape[0] if base.size else 0)
        differences = [value * (model - base).reshape(shape) for value, model in zip(weights, x, strict=True)]
        change = scale * merge(differences, common_fraction).reshape(base.shape) if base.size else np.zeros(base.shape)
        # The bar of an entry is ½ ulp + 2⁻³⁴ · root mean square of the change + 2⁻²² |b|.
        spread = math.sqrt(float(np.mean(change**2))) if base.size else 0.0
        return Result(base + change, np.abs(base) + 2.0**-12 * spread, {"change": change})

    return merged


# --- Masks and balances of tasks ------------------------------------------------------------------------------------


def _size(base: Array, x: Sequence[Array]) -> Array:
    return np.sum([np.abs(model) + np.abs(base) for model in x], axis=0)


def _tall(bases, models, scores, *, density, scope, trim):  # type: ignore[no-untyped-def]
    """Return, for each tensor, τ with its magnitude and its details: Σ d, or TIES' sum."""
    if trim:
        results = _ties(
            bases, models, [""] * len(bases), [], scores, weight=1.0, density=density, normalize=False, scope=scope
        )
        found = []
        for base, x, result in zip(bases, models, results, strict=True):
            kept = [
                agrees & mask for agrees, mask in zip(result.details["agrees"], result.details["masks"], strict=True)
            ]
            change = np.zeros(base.shape)
            for model, mask in zip(x, kept, strict=True):
                change = change + mask * (model - base)
            found.append((change, _size(base, x), result.details))
        return found
    return [
        (np.sum([model - base for model in x], axis=0), _size(base, x), {})
        for base, x in zip(bases, models, strict=True)
    ]


def _needed(total, base, x, mask_lambda):  # type: ignore[no-untyped-def]
    strengths = _each(mask_lambda, len(x))
    return [
        np.abs(model - base) > strength * np.abs(total - (model - base))
        for model, strength in zip(x, strengths, strict=True)
    ]


def _consensus(trim: bool):  # type: ignore[no-untyped-def]
    def merge(  # type: ignore[no-untyped-def]
        bases, models, names, streams, scores, *, threshold=2, mask_lambda=0.4, scale=0.3, density=0.2, scope="model"
    ):
        results = []
        found = _tall(bases, models, scores, density=density, scope=scope, trim=trim)
        for base, x, (total, size, details) in zip(bases, models, found, strict=True):
            masks = _needed(total, base, x, mask_lambda)
            kept = np.sum(masks, axis=0) >= threshold
            details = {key: value for key, value in details.items() if key.startswith("election")}
            results.append(
                Result(base + scale * total * kept, np.abs(base) + abs(scale) * size * kept, {**details, "kept": masks})
            )
        return results

    return merge


def _tall_masks(  # type: ignore[no-untyped-def]
    bases,
    models,
    names,
    streams,
    scores,
    *,
    from_="sum",
    mask_lambda=0.4,
    scale=1.0,
    density=0.2,
    scope="model",
    **other,
):
    results = []
    trim = other.get("from", from_) == "ties"
    found = _tall(bases, models, scores, density=density, scope=scope, trim=trim)
    for base, x, (total, size, details) in zip(bases, models, found, strict=True):
        details = {key: value for key, value in details.items() if key.startswith("election")}
        details |= {"delta": total, "kept": _needed(total, base, x, mask_lambda)}
        results.append(Result(base + scale * total, np.abs(base) + abs(scale) * size, details))
    return results


def _emr(bases, models, names, streams, scores, *, rescale_by="entry"):  # type: ignore[no-untyped-def]
    """b + g·max(g·d, 0); the masks and rescalers are in the details."""
    results, sums = [], []
    for base, x in zip(bases, models, strict=True):
        differences = [model - base for model in x]
        election = np.sum(differences, axis=0)
        sign = np.where(election > 0, 1.0, -1.0)
        masks = [sign * difference > 0 for difference in differences]
        change = sign * np.max(
            [mask * np.abs(difference) for mask, difference in zip(masks, differences, strict=True)], axis=0
        )
        part = base.size if rescale_by == "tensor" and base.size else 1
        sums.append([
            (exact_sum(np.abs(difference)) / part, exact_sum(np.abs(mask * change)) / part)
            for mask, difference in zip(masks, differences, strict=True)
        ])  # fmt: skip
        details = {
            "masks": masks, "delta": change, "election": election,
            "election_magnitude": np.sum(np.abs(differences), axis=0),
        }  # fmt: skip
        results.append(
            Result(base + change, np.abs(base) + np.max([np.abs(m) for m in x], axis=0) + np.abs(base), details)
        )
    totals = np.sum(sums, axis=0)
    rescale = np.where(totals[:, 1] > 0, totals[:, 0] / np.where(totals[:, 1] > 0, totals[:, 1], 1.0), 1.0)
    for result in results:
        result.details["rescale"] = rescale
    return results


def _pcb(bases, models, names, streams, scores, *, ratio=0.1, scale=1.0, scope="model"):  # type: ignore[no-untyped-def]
    everything = range(len(bases))
    results: dict[int, Result] = {}
    for group in [list(everything)] if scope == "model" else [[tensor] for tensor in everything]:
        count = len(models[group[0]])
        dtype = scores or score_dtype([array for t in group for array in (bases[t], *models[t])])
        changes = [
            np.concatenate([(models[t][i] - bases[t]).reshape(-1) for t in group]) for i in range(count)
        ]  # fmt: skip
        sizes = [
            np.concatenate([magnitudes_of_difference(models[t][i], bases[t], dtype).reshape(-1) for t in group])
            for i in range(count)
        ]  # fmt: skip
        length = changes[0].size
        total = np.zeros(length)
        for change in changes:
            total = total + change
        merged, weights, spread = np.zeros(length), np.zeros(length), np.zeros(length)
        for change, size in zip(changes, sizes, strict=True) if length else ():
            ordered = np.sort(size).astype(np.float64)
            low = ordered[math.floor(1e-4 * length)]
            high = ordered[max(0, math.floor((1 - 1e-4) * length - 1))]
            clipped = np.clip(np.abs(change), low, high) if high > low else np.full(length, low)
            share = (clipped - low) / (high - low) if high > low else np.zeros(length)
            score = (np.exp(count * share**2) * np.tanh(change * total)).astype(np.float32).astype(np.float64)
            cut = np.sort(score)[min(length - 1, math.floor((1 - ratio) * length))]
            top_score = np.max(score)
            weight = np.maximum(0.0, (score - cut) / (top_score - cut)) if top_score > cut else np.zeros(length)
            merged = merged + weight * np.sign(change) * clipped
            weights = weights + weight
            spread = spread + weight * clipped
        divisor = np.maximum(weights, 1e-12)
        value, size = merged / divisor, spread / divisor
        start = 0
        for t in group:
            part = slice(start, start + bases[t].size)
            start += bases[t].size
            shaped = value[part].reshape(bases[t].shape)
            size_of = size[part].reshape(bases[t].shape)
            inputs = np.max([np.abs(m) for m in models[t]], axis=0)
            results[t] = Result(
                bases[t] + scale * shaped, 2 * np.abs(bases[t]) + inputs + abs(scale) * size_of, {"scores": weights}
            )
    return [results[t] for t in everything]


METHODS: Mapping[str, Callable[..., list[Result]]] = {
    "arcee_fusion": _one_by_one(_arcee_fusion),
    "breadcrumbs": _breadcrumbs(consensus=False),
    "breadcrumbs_ties": _breadcrumbs(consensus=True),
    "consensus_ta": _consensus(trim=False),
    "consensus_ties": _consensus(trim=True),
    "dare_linear": _dare(consensus=False),
    "dare_ties": _dare(consensus=True),
    "della": _della(consensus=True),
    "della_linear": _della(consensus=False),
    "emr": _emr,
    "geometric_median": _geometric_median,
    "iso_c": _one_by_one(_spectral(_isotropic_sum)),
    "iso_cts": _one_by_one(_spectral(_isotropic_sum)),
    "karcher": _one_by_one(_karcher),
    "linear": _one_by_one(_linear),
    "model_stock": _one_by_one(_model_stock),
    "multislerp": _one_by_one(_multislerp),
    "nearswap": _one_by_one(_nearswap),
    "nuslerp": _one_by_one(_nuslerp),
    "passthrough": _one_by_one(_passthrough),
    "pcb": _pcb,
    "ram": _one_by_one(_ram),
    "ramplus_tl": _one_by_one(_ramplus_tl),
    "sce": _one_by_one(_sce),
    "slerp": _one_by_one(_slerp),
    "tall_masks": _tall_masks,
    "task_arithmetic": _task_arithmetic,
    "ties": _ties,
    "tsv_m": _one_by_one(_spectral(_task_singular_sum)),
}
"""Every method: `(bases, models, names, streams, scores, **parameters)`, lists over tensors, to one result each."""

_IGNORED = ("int8_mask",)
_NO_EFFECT = {"task_arithmetic": ("density", "rescale"), "sce": ("density",)}


def _merge(
    method: str,
    names: list[str],
    bases: list[Array | None],
    models: list[list[Array]],
    streams: Sequence[int] | None,
    scores: Literal["float32", "float64"] | None,
    parameters: dict[str, Any],
) -> list[Result]:
    known = {("lambda_" if key == "lambda" else key): value for key, value in parameters.items()}
    for key in (*_IGNORED, *_NO_EFFECT.get(method, ())):
        known.pop(key, None)
    streams = list(range(len(models[0]))) if streams is None else list(streams)
    dtype = None if scores is None else np.dtype(scores).type
    return METHODS[method](bases, models, names, streams, dtype, **known)


def reference(
    method: str,
    base: Array | None,
    models: Sequence[Array],
    *,
    name: str = "tensor",
    streams: Sequence[int] | None = None,
    scores: Literal["float32", "float64"] | None = None,
    **parameters: Any,
) -> Result:
    """Return what `method` makes of one tensor.

    Parameters have their YAML names (`lambda` also as `lambda_`); one with a value per model is a list, or one number
    for all. Methods that ignore a base (linear, karcher, passthrough) look at `models` only.

    Args:
        method: The method's name.
        base: The base tensor, or None.
        models: The other tensors, in recipe order.
        name: The output tensor's name, which random masks depend on.
        streams: The random stream of each model; its position by default.
        scores: Precision of the selection scores: float64 for float64 tensors. Found from the values by default.
        parameters: The method's parameters.
    """
    base = None if base is None else np.asarray(base, dtype=np.float64)
    stack = [np.asarray(model, dtype=np.float64) for model in models]
    return _merge(method, [name], [base], [stack], streams, scores, parameters)[0]


def reference_model(
    method: str,
    base: Mapping[str, Array] | None,
    models: Sequence[Mapping[str, Array]],
    *,
    streams: Sequence[int] | None = None,
    scores: Literal["float32", "float64"] | None = None,
    **parameters: Any,
) -> dict[str, Result]:
    """Return what `method` makes of dictionaries of tensors; `scope: model` counts over the names in sorted order."""
    names = sorted(models[0])
    bases = [None if base is None else np.asarray(base[name], dtype=np.float64) for name in names]
    stacks = [[np.asarray(model[name], dtype=np.float64) for model in models] for name in names]
    return dict(zip(names, _merge(method, names, bases, stacks, streams, scores, parameters), strict=True))
