"""A run's numbers as TensorBoard event files, for those who watch their runs there."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from graftwork.merge.errors import DependencyError

FOLDER = "tensorboard"
"""Below the run folder."""


class Scalars(Protocol):
    """What takes numbers."""

    def __call__(self, line: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Add a round's line of `metrics.jsonl`, and its seconds."""


@contextlib.contextmanager
def event_files(folder: Path, first_round: int) -> Iterator[Scalars]:
    """Give what writes rounds into event files in a folder.

    Args:
        folder: Where they go.
        first_round: The round that comes next; what an earlier process wrote from there on does not count.

    Raises:
        DependencyError: tensorboard is missing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise DependencyError(
            '--tensorboard needs tensorboard, which is missing; install it with pip install "graftwork[tensorboard]"'
        ) from None
    with SummaryWriter(str(folder), purge_step=first_round if first_round > 1 else None) as writer:

        def add(line: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
            for name, value in scalars(line, timing).items():
                writer.add_scalar(name, value, int(line["round"]))
            writer.flush()

        yield add


def scalars(line: Mapping[str, Any], timing: Mapping[str, Any]) -> dict[str, float]:
    """Return a round's numbers by their names in TensorBoard; what comes before the slash is a group there."""
    found: dict[str, Any] = {
        "accuracy/judged": line.get("accuracy"),
        "loss/judged": line.get("loss"),
        "loss/training": line.get("train_loss"),
        "sites/answered": line.get("answered"),
        "sites/failed": len(line.get("failed", {})),
        "cost/bytes": line.get("bytes"),
        "cost/seconds": timing.get("seconds"),
    }
    found |= {f"server/{name}": value for name, value in line.get("server", {}).items()}
    found |= {f"algorithm/{name}": value for name, value in line.get("algorithm", {}).items()}
    for site, numbers in line.get("sites", {}).items():
        found |= {f"{name} by site/{site}": value for name, value in numbers.items() if name in ("accuracy", "loss")}
    return {
        name: float(value) for name, value in found.items() if isinstance(value, int | float) and math.isfinite(value)
    }
