"""The dtypes of safetensors: their sizes, and which of them are numbers that can be merged."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

BITS = MappingProxyType(
    {
        "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
        "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
        "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
        "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    }
)  # fmt: skip
"""Bits per element of every dtype that a safetensors header may name."""

MERGEABLE = ("F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64")
"""Dtypes whose values are merged; all others are copied byte for byte."""

RAW: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {"F8_E4M3": np.dtype(np.uint8), "F8_E5M2": np.dtype(np.int8), "BF16": np.dtype(np.uint16),
     "F16": np.dtype(np.int16), "F32": np.dtype(np.float32), "F64": np.dtype(np.float64)}
)  # fmt: skip
"""The numpy dtype under which the raw words of a mergeable dtype travel: a distinct one for each, so that compiled
kernels specialise on it."""

_ORDER = {"F8_E4M3": 0, "F8_E5M2": 0, "F16": 1, "BF16": 1, "F32": 2, "F64": 3}

NAMES = MappingProxyType(
    {"bfloat16": "BF16", "bf16": "BF16", "float16": "F16", "fp16": "F16", "half": "F16", "float32": "F32",
     "fp32": "F32", "float": "F32", "float64": "F64", "fp64": "F64", "double": "F64"}
)  # fmt: skip
"""Names of output dtypes as recipes write them."""

TORCH_NAMES = MappingProxyType(
    {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64",
     "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
)  # fmt: skip
"""The word that `config.json` and torch use for a mergeable dtype."""


def promoted(dtypes: list[str]) -> str:
    """Return the smallest mergeable dtype that holds every value of `dtypes` (bf16 with f16 gives f32)."""
    kinds = sorted(set(dtypes))
    if len(kinds) == 1:
        return kinds[0]
    level = max(_ORDER[kind] for kind in kinds)
    top = [kind for kind in kinds if _ORDER[kind] == level]
    if len(top) == 1:
        return top[0]
    return "F32" if level == 1 else "F16"
