"""SCE: select by variance, calculate weights, erase minority signs."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from graftwork.merge.methods.common import EXTRA_LAMBDA, INT8_MASK
from graftwork.merge.methods.registry import Parameter, register
from graftwork.merge.passes import Apply, Group, Select, Sums, everything
from graftwork.merge.vocabulary import Value, narrow, number, where, zeros_like


def variance(models: Sequence[Value], base: Value, models_count: float) -> Value:
    """Return the variance of the task vectors' entries over the models: exactly zero where these are equal.

    Hence the division: thirds of three equal numbers need not sum to that number, a third of their sum is it.
    """
    mean = zeros_like(base)
    for x in models:
        mean = mean + (x - base)
    mean = mean / models_count
    total = zeros_like(base)
    for x in models:
        deviation = (x - base) - mean
        total = total + deviation * deviation
    return total / models_count


def varies(models: Sequence[Value], base: Value, index: Value, *, models_count: float) -> tuple[Value]:
    """Return one where the float32 variance is not zero."""
    return (number(narrow(variance(models, base, models_count)) > 0, base),)


def score(models: Sequence[Value], base: Value, index: Value, *, models_count: float) -> tuple[Value]:
    """Return the score by which entries are ranked."""
    return (narrow(variance(models, base, models_count)),)


def energy(
    model: Value, models: Sequence[Value], base: Value, index: Value, *, models_count: float, cut: float
) -> tuple[Value]:
    """Return the squared selected entry of a model's task vector."""
    kept = narrow(variance(models, base, models_count)) >= cut
    delta = model - base
    return (where(kept, delta * delta, zeros_like(base)),)


def erased(
    models: Sequence[Value], base: Value, index: Value, *, weight: Sequence[float], models_count: float, cut: float,
    factor: float, mask_entries: bool,
) -> Value:  # fmt: skip
    """Return the base plus the weighted mean of the entries that have the majority sign."""
    kept = narrow(variance(models, base, models_count)) >= cut
    if not mask_entries:
        kept = base == base
    total = zeros_like(base)
    for x in models:
        total = total + (x - base)
    positive = total >= 0
    merged = zeros_like(base)
    divisor = zeros_like(base)
    for x, w in zip(models, weight):  # noqa: B905
        delta = x - base
        counted = where(positive, number(delta > 0, base), number(delta < 0, base))
        merged = merged + counted * (w * delta)
        divisor = divisor + counted * w
    mean = where(kept & (divisor != 0), merged / where(divisor != 0, divisor, divisor + 1), zeros_like(base))
    return base + factor * mean


@register(
    "sce",
    title="SCE",
    kind="selection",
    base="required",
    formula="b + λ Σ wᵢ cᵢ d̂ᵢ / Σ wᵢ cᵢ,  d̂ on the entries of largest variance, wᵢ ∝ Σ d̂ᵢ²",
    reference="https://arxiv.org/abs/2408.07990",
    parameters=(
        Parameter("select_topk", "share of the varying entries that is kept", default=1.0, minimum=0, maximum=1),
        Parameter(
            "select", "entries: merge the selected entries; weights: select for the weights only, as the authors' code",
            type=("entries", "weights"), default="entries", extension=True,
        ),
        EXTRA_LAMBDA,
        INT8_MASK,
    ),
    models=(0, None),
)  # fmt: skip
def sce(group: Group, *, select_topk: float, select: str, lambda_: float) -> Generator[Any, Any, Apply]:
    """Keep the entries whose task vectors vary most, weight models by their energy there, erase minority signs.

    Unlike mergekit, weights are never replaced by uniform ones because task vectors are small.
    """
    count = group.models
    settings = {"models_count": float(count)}
    cut = everything(wide=False)
    if select_topk < 1:
        varying = yield Sums(varies, 1, settings)
        rank = int(select_topk * float(varying[0]))
        ((cut,),) = yield Select(score, ((rank,),), settings)
    chosen = {**settings, "cut": cut}
    energies = yield Sums(energy, count, chosen, each=True)
    total = float(energies.sum())
    if total == 0:
        uniform = select == "weights" and cut.score == cut.score
        weight = (1.0 / count if uniform else 0.0,) * count
    else:
        weight = tuple((energies / total).tolist())
    final = {**chosen, "weight": weight, "factor": lambda_, "mask_entries": select == "entries"}
    return Apply(erased, final, precision="float64")
