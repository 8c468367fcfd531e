"""Shows how far a long run is: a bar where stderr is a terminal, a plain line every ten seconds where it is not."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from graftwork.cli.output import duration, is_terminal, size
from graftwork.cli.problems import tell

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_QUIET_SECONDS = 2.0
"""A run that is over sooner shows nothing."""
_LINE_SECONDS = 10.0
_BAR_SECONDS = 0.2
_TRUSTED_SHARE = 0.05


class ByteProgress:
    """Counts bytes from any thread, and shows them from a thread of its own, so that counting costs nothing.

    Args:
        total: Bytes that will pass.
        shown: False to count silently.
        what: What is being done, in one word.
        share: Returns how much of the result is complete, which corrects a total that was too small.
    """

    def __init__(
        self, total: int, *, shown: bool = True, what: str = "merging", share: Callable[[], float] | None = None
    ) -> None:
        self.total = total
        self.shown = shown
        self.what = what
        self.share = share
        self.done = 0
        self._first = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._start = 0.0

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        if self.shown:
            self._thread = threading.Thread(target=self._show, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def advance(self, count: int) -> None:
        """Take note of `count` more bytes."""
        with self._lock:
            self.done += count

    def skip(self, count: int) -> None:
        """Take note of bytes that an earlier run has done: they say nothing about the speed of this one."""
        with self._lock:
            self.done += count
            self._first += count

    def _show(self) -> None:
        if self._over.wait(_QUIET_SECONDS):
            return
        if is_terminal():
            self._show_bar()
        else:
            self._show_lines()

    def _show_lines(self) -> None:
        while True:
            tell(f"{self.what}: {self.line()}")
            if self._over.wait(_LINE_SECONDS):
                return

    def line(self) -> str:
        """Return the state as text: share, bytes, speed, time left."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        done, total = self.done, self._expected()
        speed = (done - self._first) / seconds
        left = f", {duration((total - done) / speed)} left" if speed > 0 else ""
        return f"{int(100 * done / total) if total else 100} %, {size(done)}, {size(speed)}/s{left}"

    def _expected(self) -> int:
        """Return how many bytes will have passed in the end, as far as can be told now."""
        share = self.share() if self.share is not None else 0.0
        # Before that, what is under way weighs too much beside what is complete.
        total = max(self.total, int(self.done / share)) if share > _TRUSTED_SHARE else self.total
        return max(total, self.done)

    def _show_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        progress = Progress(
            TextColumn(self.what),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            console=Console(stderr=True),
            transient=True,
            auto_refresh=False,
        )
        with contextlib.suppress(OSError), progress:
            bar = progress.add_task("", total=1.0, completed=0, state="")
            while not self._over.wait(_BAR_SECONDS):
                self._update(progress, bar)

    def _update(self, progress: Progress, bar: TaskID) -> None:
        progress.update(bar, completed=self.done / max(self._expected(), 1), state=self.line(), refresh=True)
