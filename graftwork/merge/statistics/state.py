"""Measurements that outlive their process: unfinished sums beside the output, and interrupts between two batches."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np

from graftwork.merge.artifact import load_artifact, save_artifact
from graftwork.merge.errors import GraftworkError

if TYPE_CHECKING:
    from torch import Tensor

SAVED_EVERY_SECONDS = 60.0
"""The least time between two states of a long measurement."""

Array = np.ndarray[Any, np.dtype[Any]]


class Unfinished:
    """The file in which unfinished sums wait for a run that goes on.

    Args:
        out: The output; the file is `NAME.partial.safetensors` beside it.
        settings: Everything that decides the result; a state of other settings is not taken up.
        seconds: Least time between two states.
        name: What stands in the file's name in place of `partial`.
    """

    def __init__(
        self, out: Path, settings: Mapping[str, Any], seconds: float = SAVED_EVERY_SECONDS, name: str = "partial"
    ) -> None:
        self.path = out.with_name(f"{out.stem}.{name}.safetensors")
        self.settings = json.loads(json.dumps(dict(settings)))
        self.seconds = seconds
        self._saved = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the last state is old enough."""
        return time.monotonic() - self._saved >= self.seconds

    def load(self) -> tuple[dict[str, Array], dict[str, Any]] | None:
        """Return tensors and counters of a state of the same settings, or None."""
        if not self.path.exists():
            return None
        try:
            found = load_artifact(self.path, kind="state")
        except GraftworkError:
            return None
        if found.settings != self.settings:
            return None
        return found.tensors, json.loads(found.metadata["counters"])

    def save(self, tensors: Mapping[str, Array | Tensor], counters: Mapping[str, Any]) -> None:
        """Write a state in place of the last one."""
        save_artifact(
            self.path,
            tensors,
            kind="state",
            method="unfinished measurement",
            settings=self.settings,
            force=True,
            counters=json.dumps(dict(counters), sort_keys=True),
        )
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Delete the state: the measurement is complete."""
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def interrupts_between_batches() -> Iterator[Callable[[], bool]]:
    """Note the first Ctrl-C or SIGTERM instead of stopping amid a batch; the function yielded says whether one came.

    A second one stops at once. In a thread other than the main one, signals are left alone.
    """
    came: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)
        if number == signal.SIGTERM and callable(before[number]):
            # Whoever listens for it learns of it; to stop is for us.
            with contextlib.suppress(KeyboardInterrupt):
                before[number](number, frame)

    with contextlib.suppress(ValueError):  # not the main thread
        for listened in (signal.SIGINT, signal.SIGTERM):
            before[listened] = signal.getsignal(listened)
            signal.signal(listened, note)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            with contextlib.suppress(ValueError, TypeError):
                signal.signal(number, handler)


def stopped(done: int, total: int, command: str, state: Unfinished | None) -> Exception:
    """Return the exception that ends an interrupted measurement and says what is left of it."""
    from graftwork.merge.run import Interrupted

    if state is None:
        return Interrupted(f"stopped after {done} of {total} examples; nothing was kept")
    return Interrupted(
        f"stopped after {done} of {total} examples, which are kept in {state.path}; "
        f"run the same `{command}` command again to go on"
    )
