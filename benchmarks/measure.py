"""Measure one child process: processor time, wall time, peak memory; and the floor that reading and writing sets.

Linux only: memory is read from /proc every 20 ms, for the child and its descendants.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.02
READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run of a child cost."""

    processor_seconds: float
    user_seconds: float
    system_seconds: float
    wall_seconds: float
    peak_anonymous_bytes: int
    peak_resident_bytes: int
    output_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the figures as plain numbers."""
        return asdict(self)


class ChildFailed(RuntimeError):  # noqa: N818
    """A measured program ended with an error; carries the end of what it said."""


def _descendants(process: int) -> list[int]:
    found, waiting = [], [process]
    while waiting:
        one = waiting.pop()
        found.append(one)
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                waiting.extend(int(child) for child in children.read_text().split())
            except OSError:
                continue
    return found


def _memory(process: int) -> tuple[int, int]:
    """Return (anonymous, resident) bytes of a process and its descendants."""
    anonymous = resident = 0
    for one in _descendants(process):
        try:
            status = Path(f"/proc/{one}/status").read_text()
        except OSError:
            continue
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                anonymous += int(line.split()[1]) * 1024
            elif line.startswith("VmRSS:"):
                resident += int(line.split()[1]) * 1024
    return anonymous, resident


def folder_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def run(
    command: Sequence[str], *, environment: Mapping[str, str], log: Path, nice: int = 0, output: Path | None = None
) -> Figures:
    """Run a command to its end and return what it cost.

    Args:
        command: The program and its arguments.
        environment: Its whole environment.
        log: File that its output is written to.
        nice: How much to lower its priority.
        output: What it writes, to be counted.

    Raises:
        ChildFailed: It did not exit with 0.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    anonymous = resident = 0
    with log.open("wb") as sink:
        start = time.perf_counter()
        child = subprocess.Popen(
            ["nice", "-n", str(nice), *command] if nice else list(command),
            stdout=sink, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=dict(environment),
        )  # fmt: skip
        while True:
            now = _memory(child.pid)
            anonymous, resident = max(anonymous, now[0]), max(resident, now[1])
            done, status, usage = os.wait4(child.pid, os.WNOHANG)
            if done:
                break
            time.sleep(POLL_SECONDS)
        wall = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        said = log.read_text(errors="replace")[-2000:]
        raise ChildFailed(f"{' '.join(command)} ended with {child.returncode}:\n{said}")
    return Figures(
        processor_seconds=usage.ru_utime + usage.ru_stime,
        user_seconds=usage.ru_utime,
        system_seconds=usage.ru_stime,
        wall_seconds=wall,
        peak_anonymous_bytes=anonymous,
        peak_resident_bytes=resident,
        output_bytes=folder_bytes(output) if output is not None else 0,
    )


def read_all(paths: Sequence[Path]) -> int:
    """Read every byte of the files into one small buffer, and return how many there were."""
    buffer = bytearray(READ_BYTES)
    total = 0
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        while count := os.readv(descriptor, [buffer]):
            total += count
        os.close(descriptor)
    return total


def write_synced(path: Path, count: int) -> None:
    """Write `count` bytes from one small buffer and wait until the file system has them."""
    buffer = os.urandom(READ_BYTES)
    with path.open("wb", buffering=0) as file:
        for start in range(0, count, READ_BYTES):
            file.write(buffer[: min(READ_BYTES, count - start)])
        os.fsync(file.fileno())


def floor(inputs: Sequence[Path], output: Path, output_bytes: int) -> dict[str, float]:
    """Return seconds to read every input byte and to write and sync every output byte, in a process of its own."""
    command = [sys.executable, __file__, str(output), str(output_bytes), *map(str, inputs)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint."""
    return sorted(folder.glob("*.safetensors"))


def main() -> None:
    """Measure the floor and print it as JSON: `measure.py OUTPUT BYTES INPUT…`."""
    output, count, *inputs = sys.argv[1:]
    read_all([Path(path) for path in inputs])  # so that the cache is warm
    wall, used = time.perf_counter(), time.process_time()
    read_all([Path(path) for path in inputs])
    read_wall, read_used = time.perf_counter() - wall, time.process_time() - used
    write_synced(Path(output), int(count))
    figures = {
        "processor_seconds": time.process_time() - used,
        "wall_seconds": time.perf_counter() - wall,
        "read_processor_seconds": read_used,
        "read_wall_seconds": read_wall,
    }
    Path(output).unlink()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
