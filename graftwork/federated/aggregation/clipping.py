"""Changes of replies against what they started from: how long they are, and their sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from graftwork.federated.aggregation.mean import CHUNK
from graftwork.federated.messages import float_values, tensor_of

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.federated.messages import Raw, Values


def change_norms(replies: Sequence[Mapping[str, Raw]], base: Mapping[str, Raw], names: Sequence[str]) -> list[float]:
    """Return the Euclidean norm of what each reply changes, over all names together, in float64."""
    totals = [0.0] * len(replies)
    for name in names:
        before = float_values(base[name]).reshape(-1)
        for number, reply in enumerate(replies):
            after = float_values(reply[name]).reshape(-1)
            for start in range(0, before.size, CHUNK):
                change = after[start : start + CHUNK].astype(np.float64) - before[start : start + CHUNK]
                totals[number] += float(change @ change)
    return [math.sqrt(total) for total in totals]


def scales_of(norms: Sequence[float], bound: float) -> list[float]:
    """Return by what changes are multiplied so that none is longer than `bound`."""
    return [min(1.0, bound / norm) if norm > 0 else 1.0 for norm in norms]


def moved(
    base: Raw, replies: Sequence[Raw], shares: Sequence[float], noise: Callable[[int], Values] | None = None
) -> Tensor:
    """Return base + Σ shareᵢ · (replyᵢ − base) + noise, in float64 in the order given, rounded once to base's dtype.

    Args:
        base: What the replies started from.
        replies: They.
        shares: One per reply; they need not add up to 1.
        noise: Gives that many values to add.
    """
    import torch

    before = float_values(base).reshape(-1)
    after = [float_values(reply).reshape(-1) for reply in replies]
    result = np.empty(before.size)
    for start in range(0, before.size, CHUNK):
        span = slice(start, start + CHUNK)
        origin = before[span].astype(np.float64)
        place = origin.copy()
        for values, share in zip(after, shares, strict=True):
            place += share * (values[span] - origin)
        if noise is not None:
            place += noise(origin.size)
        result[span] = place
    return torch.from_numpy(result.reshape(base[1].shape)).to(tensor_of((base[0], base[1].reshape(-1)[:1])).dtype)
