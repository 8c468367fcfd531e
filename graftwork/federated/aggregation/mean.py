"""The mean of replies, in memory or on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graftwork.federated.messages import float_values, tensor_of
from graftwork.merge import dtypes
from graftwork.merge.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.federated.messages import Raw, Values

CHUNK = 1 << 16
"""Values that are widened at a time."""


COMPILED_ABOVE = 1 << 22
"""Values, of all replies together, above which the sum is worth loading a compiled kernel. The result is the same."""


def means(replies: Sequence[Mapping[str, Raw]], names: Sequence[str], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the mean of replies in memory tensor by tensor; see `mean`."""
    is_large = sum(replies[0][name][1].size for name in names) * len(replies) > COMPILED_ABOVE if replies else False
    return {name: _mean_at_hand([reply[name] for reply in replies], weights, is_large) for name in names}


def mean(values: Iterable[Raw], weights: Sequence[float]) -> Tensor:
    """Return Σ wᵢ xᵢ / Σ wᵢ, computed in float64 in the order given and rounded once to the dtype of the values.

    The engine's `linear` gives the same up to the last bit. It compiles a kernel per number of models, which pays for a
    merge of large models, and would not for rounds in which another number of a thousand clients answers each time.
    """
    total = math.fsum(weights)
    sum_: Values | None = None
    product = np.empty(CHUNK)
    code, shape = "F32", (0,)
    for raw, weight in zip(values, weights, strict=True):
        flat = raw[1].reshape(-1)
        if sum_ is None:
            code, shape, sum_ = raw[0], raw[1].shape, np.zeros(flat.size)
        for start in range(0, flat.size, CHUNK):
            part = float_values((code, flat[start : start + CHUNK]))
            _add(sum_[start : start + CHUNK], part, weight / total, product)
    assert sum_ is not None
    return _rounded(sum_, code, shape)


def _mean_at_hand(values: Sequence[Raw], weights: Sequence[float], is_large: bool) -> Tensor:
    """Return the same for values that are all in memory: span by span, so that sums never leave the cache."""
    code, words = values[0]
    total = math.fsum(weights)
    shares = [weight / total for weight in weights]
    flat = [raw[1].reshape(-1) for raw in values]
    add: Callable[[Values, Values, float, Values], None] = _add
    if code == "F32" and is_large:
        from graftwork.federated.aggregation.kernels import add_scaled as add
    result = np.empty(words.size, np.float32 if code == "F32" else np.float64)
    sums, product = np.empty(CHUNK), np.empty(CHUNK)
    for start in range(0, words.size, CHUNK):
        place = sums[: min(CHUNK, words.size - start)]
        place.fill(0)
        for reply, share in zip(flat, shares, strict=True):
            add(place, float_values((code, reply[start : start + CHUNK])), share, product)
        result[start : start + CHUNK] = place
    return _rounded(result, code, words.shape)


def _add(place: Values, values: Values, share: float, product: Values) -> None:
    """Add `share` times some values to float64 sums; `product` is room for as many."""
    room = product[: values.size]
    np.multiply(values, share, out=room, dtype=np.float64)
    place += room


def _rounded(values: Values, code: str, shape: tuple[int, ...]) -> Tensor:
    import torch

    return torch.from_numpy(values.reshape(shape)).to(tensor_of((code, np.zeros(1, dtypes.RAW[code]))).dtype)


def file_mean(files: Sequence[Path], weights: Sequence[float], names: Sequence[str]) -> dict[str, Tensor]:
    """Return the mean of files, one of which is open at a time, tensor by tensor."""

    def values(name: str) -> Iterator[Raw]:
        for file in files:
            with Checkpoint.open(file) as checkpoint:
                yield read_raw(checkpoint, name)

    return {name: mean(values(name), weights) for name in names}


def read_raw(checkpoint: Checkpoint, name: str) -> Raw:
    """Return the raw words of a tensor of a file."""
    entry = checkpoint.tensors[name]
    return entry.dtype, np.frombuffer(checkpoint.read(name), dtypes.RAW[entry.dtype]).reshape(entry.shape)
