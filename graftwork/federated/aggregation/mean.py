"""The mean of replies, in memory or on disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


def means(replies: Sequence[Mapping[str, Raw]], names: Sequence[str], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the mean of replies tensor by tensor."""
    return {name: mean((reply[name] for reply in replies), weights) for name in names}


def mean(values: Iterable[Raw], weights: Sequence[float]) -> Tensor:
    """Return Σ wᵢ xᵢ / Σ wᵢ, summed in float64 in the order given and rounded once to the dtype of the values.

    The engine's `linear` gives the same up to the last bit. It compiles a kernel per number of models, which pays for a
    merge of large models, and would not for rounds in which another number of a thousand clients answers each time.
    """
    import torch

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
            place = product[: part.size]
            np.multiply(part, weight / total, out=place)
            sum_[start : start + CHUNK] += place
    assert sum_ is not None
    result = torch.from_numpy(sum_.reshape(shape))
    return result.to(tensor_of((code, np.zeros(1, dtypes.RAW[code]))).dtype)


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
