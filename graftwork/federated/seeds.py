"""Random numbers that depend on what they are for, and on nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator

import numpy as np


def seed_of(seed: int, *parts: str | int) -> int:
    """Return a seed below 2⁶³ for one purpose, such as `seed_of(0, site, round, "shuffle")`.

    Equal arguments give equal seeds in every process; any difference gives an unrelated one.
    """
    text = json.dumps([seed, *parts], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator_of(seed: int, *parts: str | int) -> np.random.Generator:
    """Return a numpy generator for one purpose."""
    return np.random.default_rng(seed_of(seed, *parts))


@contextlib.contextmanager
def torch_seed(seed: int) -> Iterator[None]:
    """Let torch draw from `seed` inside, with one thread; afterwards both are as before."""
    import torch

    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    if threads != 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if threads != 1:
            torch.set_num_threads(threads)
