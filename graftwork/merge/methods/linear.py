"""Weighted averages and plain copies."""

from __future__ import annotations

from collections.abc import Sequence

from graftwork.merge.methods.common import WEIGHT, cancelling_weights, combined_values, normalize
from graftwork.merge.methods.registry import Parameter, register
from graftwork.merge.passes import Apply, Group


@register(
    "linear",
    title="Linear (model soup)",
    kind="elementwise",
    base="ignored",
    formula="Σ wᵢ xᵢ / Σ wᵢ",
    reference="https://arxiv.org/abs/2203.05482",
    parameters=(WEIGHT, normalize(True)),
    check=cancelling_weights,
)
def linear(group: Group, *, weight: Sequence[float], normalize: bool) -> Apply:
    """Weighted average of the models."""
    total = sum(weight) if normalize else 1.0
    return Apply(combined_values, {"coefficient": tuple(value / total for value in weight)})


@register(
    "passthrough",
    title="Passthrough",
    kind="elementwise",
    base="ignored",
    formula="scale · x",
    reference="https://github.com/arcee-ai/mergekit",
    parameters=(
        Parameter("scale", "factor on the values; without it the bytes are copied", default=None, per_model=True),
    ),
    models=(1, 1),
)
def passthrough(group: Group, *, scale: Sequence[float | None]) -> Apply:
    """One model's tensors, scaled or copied byte for byte; what frankenmerges are made of."""
    return Apply(combined_values, {"coefficient": (1.0 if scale[0] is None else scale[0],)})
