"""EMR merging: elect a unified task vector; mask and rescale it for each task."""

from __future__ import annotations

from collections.abc import Sequence

from graftwork.merge.methods.registry import Parameter, register
from graftwork.merge.passes import Apply, Group, Sums, TaskMasks
from graftwork.merge.vocabulary import Value, maximum, where, zeros_like

RESCALE_BY = Parameter(
    "rescale_by", "rescalers from sums over all entries, or from the sum of each tensor's mean, as the authors' code",
    type=("entry", "tensor"), default="entry", extension=True,
)  # fmt: skip


def is_positive(models: Sequence[Value], base: Value) -> Value:
    """Return whether the elected sign is plus; zero counts as minus."""
    total = zeros_like(base)
    for x in models:
        total = total + (x - base)
    return total > 0


def unified(models: Sequence[Value], base: Value) -> Value:
    """Return the largest change of the elected sign, with that sign (eq. 2)."""
    positive = is_positive(models, base)
    largest = zeros_like(base)
    for x in models:
        delta = x - base
        largest = maximum(largest, where(positive, delta, -delta))
    return where(positive, largest, -largest)


def on_base(models: Sequence[Value], base: Value, index: Value) -> Value:
    """Return the base plus the unified task vector."""
    return base + unified(models, base)


def alone(models: Sequence[Value], base: Value, index: Value) -> Value:
    """Return the unified task vector."""
    return unified(models, base)


def mask_bits(models: Sequence[Value], base: Value, index: Value, *, worth: Sequence[float]) -> Value:
    """Return the sum of the powers of two that stand for the tasks whose change has the elected sign (eq. 3)."""
    positive = is_positive(models, base)
    found = zeros_like(base)
    for x, value in zip(models, worth):  # noqa: B905 - numba knows no strict=
        delta = x - base
        found = found + where((delta != 0) & ((delta > 0) == positive), value, zeros_like(base))
    return found


def norms(model: Value, models: Sequence[Value], base: Value, index: Value) -> tuple[Value, Value]:
    """Return |d| and |m∘τ| of one task (eq. 4)."""
    positive = is_positive(models, base)
    delta = model - base
    masked = where((delta != 0) & ((delta > 0) == positive), abs(unified(models, base)), zeros_like(base))
    return abs(delta), masked


def side_outputs(group: Group, *, rescale_by: str) -> TaskMasks:
    """Return the passes that make the unified task vector, the masks and what the rescalers are made from."""
    return TaskMasks(
        Apply(alone, precision="float64"),
        Apply(mask_bits, precision="float64"),
        Sums(norms, 2 * group.models, each=True),
        by_tensor=rescale_by == "tensor",
    )


@register(
    "emr",
    title="EMR merging",
    kind="elementwise",
    base="required",
    formula="b + τ,  τ = g·maxᵢ(g·dᵢ, 0), g = sign Σ dᵢ; beside it τ, the masks mᵢ = [g·dᵢ > 0] and rescalers rᵢ",
    reference="https://arxiv.org/abs/2405.17461",
    parameters=(RESCALE_BY,),
    task_masks=side_outputs,
)
def emr(group: Group, *, rescale_by: str) -> Apply:
    """Take the largest change of the elected sign, and write masks and rescalers that give each task's model back."""
    return Apply(on_base, precision="float64")
