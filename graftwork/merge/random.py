"""Stateless random masks: the keys of their streams.

SplitMix64 (public domain, S. Vigna; finaliser by D. Stafford). A stream is addressed by (seed, tensor name, model); an
element of it by its flat index. Nothing is drawn in sequence, so masks depend on nothing else.
"""

from __future__ import annotations

import hashlib

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _mix(word: int) -> int:
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ word >> 27) * 0x94D049BB133111EB) & _MASK
    return word ^ word >> 31


def _step(word: int) -> int:
    return _mix((word + _GAMMA) & _MASK)


def stream_key(seed: int, name: str, stream: int) -> int:
    """Return the 64-bit key of the stream of model number `stream` on the tensor called `name`."""
    hashed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return _step(_step(_step(seed) ^ hashed) ^ stream)


def draw_limit(probability: float) -> int:
    """Return the largest 32-bit draw that keeps an element with this probability (to 2⁻³²); -1 if none does."""
    if probability >= 1:
        return (1 << 32) - 1
    if probability <= 0:
        return -1
    return int(probability * 4294967296.0 + 0.5) - 1
