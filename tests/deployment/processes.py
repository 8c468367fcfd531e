"""Programs that tests start, watch and end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}
GRAFTWORK = (sys.executable, "-m", "graftwork.cli")


class Program:
    """A program in a session of its own, with what it says in a file."""

    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                arguments,
                env={**os.environ, **ENVIRONMENT, "PATH": path, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def code(self) -> int | None:
        return self.process.poll()

    def says(self, text: str, seconds: float) -> None:
        """Wait until it has said something."""
        wait(lambda: text in self.said or self.code is not None, seconds, lambda: f"{text!r} is not in: {self.said}")
        assert text in self.said, self.said

    def ends(self, seconds: float) -> int:
        """Wait until it has ended; return its exit code."""
        wait(lambda: self.code is not None, seconds, lambda: self.said)
        return int(self.process.returncode)

    def end(self) -> None:
        """End it, and whatever it has started in its session."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def wait(is_so: Callable[[], object], seconds: float, what: Callable[[], str] = lambda: "") -> None:
    limit = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < limit, f"it did not come about in {seconds:g} s: {what()}"
        time.sleep(0.1)


def lives(number: int) -> bool:
    """Return whether a process lives; one that is dead and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def processes_of(text: str) -> list[str]:
    """Return the command lines of the living processes that have a text in them or in their environment."""
    found = []
    for place in Path("/proc").iterdir():
        if not place.name.isdigit() or int(place.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            command = (place / "cmdline").read_bytes()
            if text.encode() in command + (place / "environ").read_bytes() and lives(int(place.name)):
                found.append(command.replace(b"\0", b" ").decode(errors="replace"))
    return found
