"""Peaks of memory, and the models on which they are looked at: perceptrons of six layers, a base and eight experts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

LAYERS, EXPERTS = 6, 8
"""Of the models whose memory is looked at; their width is 2048: 25 million parameters."""


def perceptron(width: int) -> nn.Module:
    """Return a perceptron whose values are not set yet."""
    parts: list[nn.Module] = []
    with torch.device("meta"):
        for _ in range(LAYERS):
            parts += [nn.Linear(width, width, bias=False), nn.GELU()]
        return nn.Sequential(*parts[:-1]).to_empty(device="cpu")


def write_perceptrons(folder: Path, width: int) -> list[Path]:
    """Write a base and its experts, unless they are there; return their paths, the base first."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{width}-{number}.safetensors" for number in range(EXPERTS + 1)]
    if not all(path.exists() for path in paths):
        generator = torch.Generator().manual_seed(0)
        base = {f"{2 * n}.weight": torch.randn(width, width, generator=generator) / width**0.5 for n in range(LAYERS)}
        for number, path in enumerate(paths):
            save_file({name: tensor * (1 + 0.01 * number) for name, tensor in base.items()}, path)
    return paths


def status(key: str) -> int:
    """Return a line of the process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def print_peak(run: Callable[[int], object], width: int) -> None:
    """Print by how many bytes the process grows when `run` gets the width, after a warm run with a small one."""
    run(64)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.process_time()
    run(width)
    print(json.dumps({"peak": status("VmHWM") - before, "seconds": time.process_time() - start}))
