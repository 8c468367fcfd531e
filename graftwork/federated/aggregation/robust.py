"""What stock federations use against faulty clients: clipped changes, median, trimmed mean, Krum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from graftwork.federated.aggregation.clipping import change_norms, moved, scales_of
from graftwork.federated.aggregation.mean import CHUNK, means
from graftwork.federated.messages import float_values, tensor_of

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.federated.messages import Raw, Values

PARAMETERS: Mapping[str, Mapping[str, float]] = {
    "norm_clipping": {"bound": 0.0},
    "median": {},
    "trimmed_mean": {"cut": 0.2},
    "krum": {"faulty": 0, "select": 1},
}
"""The methods' parameters, all of them numbers of at least 0, with their defaults."""

JOINT = frozenset({"norm_clipping", "krum"})
"""Methods that look at all tensors of a reply together."""


def problem(method: str, values: Mapping[str, float]) -> str | None:
    """Return what is wrong with the values of a method's parameters; None if nothing is."""
    if values.get("cut", 0) >= 0.5:
        return f"cut is {values['cut']}; it has to be below 0.5"
    return None


def merge(
    method: str,
    values: Mapping[str, float],
    replies: Sequence[Mapping[str, Raw]],
    names: Sequence[str],
    weights: Sequence[float],
    base: Mapping[str, Raw] | None = None,
) -> dict[str, Tensor]:
    """Return what one of `PARAMETERS` makes of replies in the order of the sites.

    Args:
        method: The method.
        values: All its parameters.
        replies: Raw words by name.
        names: What is merged.
        weights: One per reply, above 0; used by norm clipping, and by Krum for the mean of those that it selects.
        base: What the replies started from, for norm clipping.
    """
    if method == "norm_clipping":
        assert base is not None
        return norm_clipping(replies, base, names, weights, values["bound"])
    if method == "median":
        return {name: by_value([reply[name] for reply in replies], median) for name in names}
    if method == "trimmed_mean":
        cut = values["cut"]
        return {
            name: by_value([reply[name] for reply in replies], lambda columns: trimmed_mean(columns, cut))
            for name in names
        }
    chosen = sorted(krum_order(replies, names, int(values["faulty"]))[: max(1, int(values["select"]))])
    return means([replies[index] for index in chosen], names, [weights[index] for index in chosen])


def norm_clipping(
    replies: Sequence[Mapping[str, Raw]],
    base: Mapping[str, Raw],
    names: Sequence[str],
    weights: Sequence[float],
    bound: float = 0.0,
) -> dict[str, Tensor]:
    """Return the weighted mean of replies whose change is scaled down to at most `bound` (Sun et al. 2019).

    Args:
        replies: Raw words by name.
        base: What they started from.
        names: What is merged; the norm is over all of it.
        weights: One per reply, above 0.
        bound: The largest norm; 0 for the median of the replies' norms.
    """
    norms = change_norms(replies, base, names)
    scales = scales_of(norms, bound if bound > 0 else float(np.median(norms)))
    total = math.fsum(weights)
    shares = [scale * weight / total for scale, weight in zip(scales, weights, strict=True)]
    return {name: moved(base[name], [reply[name] for reply in replies], shares) for name in names}


def by_value(models: Sequence[Raw], reduce: Callable[[Values], Values]) -> Tensor:
    """Return what `reduce` makes of each value's column (clients, values), chunk by chunk, in the clients' dtype."""
    import torch

    code, words = models[0]
    result = np.empty(words.size, np.float64 if code == "F64" else np.float32)
    flat = [float_values(model).reshape(-1) for model in models]
    for start in range(0, words.size, CHUNK):
        result[start : start + CHUNK] = reduce(np.stack([values[start : start + CHUNK] for values in flat]))
    tensor = torch.from_numpy(result.reshape(words.shape))
    return tensor.to(tensor_of((code, words.reshape(-1)[:1])).dtype)


def median(values: Values) -> Values:
    """Return the median of each column."""
    result: Values = np.median(values, axis=0)
    return result


def trimmed_mean(values: Values, cut: float) -> Values:
    """Return the mean without the `⌊cut·n⌋` smallest and as many largest values (Yin et al. 2018)."""
    count = len(values)
    lowest = int(cut * count)
    result: Values = np.sort(values, axis=0)[lowest : count - lowest].mean(axis=0, dtype=np.float64)
    return result


def krum_order(replies: Sequence[Mapping[str, Raw]], names: Sequence[str], faulty: int) -> list[int]:
    """Return the replies' numbers from the best Krum score to the worst (Blanchard et al. 2017).

    The score is the sum of the squared distances to the n − faulty − 2 nearest others (at least one); ties go to the
    earlier site. Distances are summed in float64.
    """
    count = len(replies)
    squared = np.zeros((count, count))
    for name in names:
        flat = [float_values(reply[name]).reshape(-1) for reply in replies]
        for i in range(count):
            for j in range(i):
                distance = (flat[i] - flat[j]).astype(np.float64)
                squared[i, j] = squared[j, i] = squared[i, j] + float(distance @ distance)
    nearest = max(1, count - faulty - 2)
    scores = [float(np.sort(np.delete(squared[i], i))[:nearest].sum()) for i in range(count)]
    return sorted(range(count), key=lambda i: (scores[i], i))
