"""NearSwap."""

from __future__ import annotations

from collections.abc import Sequence

from graftwork.merge.methods.registry import Parameter, register
from graftwork.merge.passes import Apply, Group
from graftwork.merge.vocabulary import Value, maximum, minimum


def limited(models: Sequence[Value], base: Value, index: Value, *, limit: float) -> Value:
    """Return the base moved towards the model by at most `limit`."""
    return base + maximum(minimum(models[0] - base, limit), -limit)


@register(
    "nearswap",
    title="NearSwap",
    kind="elementwise",
    base="required",
    formula="b + clip(x - b, -t, t)",
    reference="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    parameters=(Parameter("t", "farthest a value may move"),),
    models=(1, 1),
)
def nearswap(group: Group, *, t: float) -> Apply:
    """Take the model where it is near the base, and move towards it elsewhere."""
    return Apply(limited, {"limit": max(t, 0.0)})
