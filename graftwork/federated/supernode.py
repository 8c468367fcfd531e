"""A site's SuperNode as a supervised child process: started, watched, restarted, and never left behind.

What Flower does, and what is done about it (observed with 1.41):

* A SuperNode that cannot connect says nothing and tries for ever: the server is probed by TLS before each start, and
  again while there is no connection, and the reason is told.
* After `kill -9` a SuperNode is refused for up to a minute, since the server still counts it as online: it is tried
  again, with delays that grow and are not the same everywhere.
* A key that the server does not know, or a wrong certificate, never comes right: after `HOPELESS` tries it ends.
* It starts `flower-superexec`, which starts a process per message. They are in a process group of their own, which is
  killed in the end; if this process is killed, the kernel tells the SuperNode, and the others see that it is gone.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import fcntl
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from graftwork.federated.compute import WORKSPACE
from graftwork.federated.errors import FederationError
from graftwork.federated.pinned import PATH_VARIABLE
from graftwork.federated.preflight import Keys, Reach, make_private, probe
from graftwork.merge.checkpoint import quoted
from graftwork.merge.errors import DependencyError

ENVIRONMENT: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
}

HOPELESS = 5
"""How often what cannot come right by itself is tried in a row."""

FIRST_DELAY, LONGEST_DELAY = 1.0, 30.0

STEADY_SECONDS = 60.0
"""After so long a connection, delays begin anew."""

PROBE_SECONDS = 20.0
"""How often a server is probed while there is no connection."""

WATCH_SECONDS = 60.0
"""How often it is probed later on: a SuperNode that has lost its server says nothing."""

GRACE_SECONDS = 12.0
"""What a SuperNode has to say goodbye, before it is killed."""

_PR_SET_PDEATHSIG = 1

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_LEVEL = re.compile(r"^(INFO|WARNING|WARN|ERROR|DEBUG|CRITICAL)\s*:\s*")
_CHATTER = re.compile(
    r"(Started server process|Waiting for application|FastAPI lifespan|Application (startup|shutdown)|Uvicorn running"
    r"|Shutting down|Finished server process|Starting Flower|Start `|Receiv|Sending:|Sent successfully|\[RUN \d+\]$"
    r"|For more information, visit|SuperNode ID|Exit Code: |Failed to initialize the connection|\[code: \d+\]"
    r"|The SuperNode could not establish|Connection attempt|SuperNode terminated)"
)
"""What Flower says when all is well, and what is told in other words; shown only on request."""
_CONNECTED = re.compile(r"SuperNode ID: (\d+)")
_EXIT_CODE = re.compile(r"Exit Code: (\d+)")
_API_CODE = re.compile(r"\[(?:code: )?(\d{4})\]")

_UNKNOWN_KEY = {"2001"}
_STILL_ONLINE = {"2004"}


class Tell(Protocol):
    """Is told what happens, in words."""

    def __call__(self, event: str, text: str, *, is_problem: bool = False) -> None:
        """Take note of an event.

        Args:
            event: Its name, in one word.
            text: What happened.
            is_problem: Whether somebody should look at it.
        """


@dataclass(frozen=True)
class Joining:
    """What a SuperNode is started with.

    Args:
        server: `host:port`.
        keys: The site's key folder.
        site_file: Its `site.toml`.
        state: The site's private state folder.
        deterministic: Whether operators have to give the same bits each time.
        verbose: Whether to tell everything that Flower says.
    """

    server: str
    keys: Keys
    site_file: Path
    state: Path
    deterministic: bool = False
    verbose: bool = False

    @property
    def private(self) -> Path:
        """Where algorithms keep what never leaves the site."""
        return self.state / "private"


class EndedError(FederationError):
    """The SuperNode cannot work here, and trying again would not help."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a SuperNode ended.

    Args:
        text: In words.
        is_hopeless: Whether it would end the same way the next time.
    """

    text: str
    is_hopeless: bool = False


def ending_of(lines: list[str], code: int | None) -> Ending:
    """Return why a SuperNode ended, by its last lines."""
    text = "\n".join(lines)
    exit_code = found[-1] if (found := _EXIT_CODE.findall(text)) else None
    api_codes = set(_API_CODE.findall(text))
    if exit_code == "305" and api_codes & _UNKNOWN_KEY:
        return Ending(
            "the server does not know this site's key; is the site in `sites` of federation.toml, and node.pub the "
            "same there?",
            is_hopeless=True,
        )
    if exit_code == "305" and api_codes & _STILL_ONLINE:
        return Ending(
            "the server counts this site as online still, for up to a minute after a crash; or the same key is in use "
            "on another machine"
        )
    if exit_code == "305":
        return Ending("no connection to the server could be made")
    if exit_code == "302":
        return Ending("Flower cannot use node.key", is_hopeless=True)
    if exit_code == "606":
        return Ending("the server's release of Flower does not go with this one; install the same", is_hopeless=True)
    if exit_code is not None:
        return Ending(
            f"Flower ended with its code {exit_code}", is_hopeless=exit_code in {"303", "304", "600", "603", "604"}
        )
    if code is not None and code < 0:
        return Ending(f"the SuperNode was ended by {signal.Signals(-code).name}")
    last = next((line for line in reversed(lines) if line.strip()), "")
    return Ending(f"the SuperNode ended with exit code {code}{': ' + last[:200] if last else ''}")


def delays(generator: random.Random | None = None) -> Iterator[float]:
    """Yield seconds to wait: 1, 2, 4 … 30, each times something between 0.5 and 1.5."""
    chance = generator if generator is not None else random.Random()
    seconds = FIRST_DELAY
    while True:
        yield seconds * chance.uniform(0.5, 1.5)
        seconds = min(2 * seconds, LONGEST_DELAY)


class SuperNode:
    """One SuperNode process with all that it starts.

    Args:
        joining: What it is started with.
        tell: Told what it says.
    """

    def __init__(self, joining: Joining, tell: Tell) -> None:
        self.joining = joining
        self.tell = tell
        self.connected_at: float | None = None
        self.lines: collections.deque[str] = collections.deque(maxlen=60)
        self._process = self._start()
        self._reader = threading.Thread(target=self._read, name="supernode", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def wait(self, seconds: float) -> int | None:
        """Return the exit code; None if it still runs after so many seconds."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join(5)
        return code

    def stop(self) -> None:
        """End it, first in kindness, and everything that it has started."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_SECONDS)
        kill_group(self._process.pid)
        self._process.wait()
        self._reader.join(5)

    def _start(self) -> subprocess.Popen[str]:
        joining = self.joining
        make_private(joining.state)
        make_private(joining.private)
        home = joining.state / "flower"
        make_private(home)
        programs = _make_programs(joining.state / "programs")
        environment = {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(home)}
        environment[PATH_VARIABLE] = os.environ.get("PATH", os.defpath)
        # Flower's processes find nothing but the two programs that they need, one of them ours.
        environment["PATH"] = str(programs)
        environment["PYTHONUNBUFFERED"] = "1"
        if joining.deterministic:
            environment.setdefault(*WORKSPACE)
        command = [
            *supernode_command(),
            "--superlink", joining.server,
            "--root-certificates", str(joining.keys.authority),
            "--auth-supernode-private-key", str(joining.keys.private),
            "--host", "127.0.0.1",
            "--port", str(free_port()),
            "--node-config", node_config(joining),
        ]  # fmt: skip
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_die_with_parent(os.getpid()),
        )

    def _read(self) -> None:
        stream: IO[str] | None = self._process.stdout
        assert stream is not None
        is_quiet = not self.joining.verbose
        in_traceback = False
        with stream:
            for raw in stream:
                line = _COLOURS.sub("", raw).rstrip()
                if is_quiet and line.startswith("Traceback (most recent call last)"):
                    in_traceback = True
                    continue
                if in_traceback and (not line or line[0].isspace()):
                    continue
                if in_traceback:  # what was raised, in its last line
                    in_traceback = False
                    self.lines.append(line)
                    self.tell("flower", line, is_problem=True)
                    continue
                level = _LEVEL.match(line)
                line = _LEVEL.sub("", line).strip()
                if not line:
                    continue
                self.lines.append(line)
                if _CONNECTED.search(line) and self.connected_at is None:
                    self.connected_at = time.monotonic()
                if is_quiet and _CHATTER.match(line):
                    continue
                self.tell("flower", line, is_problem=level is not None and level[1] in ("ERROR", "CRITICAL"))


def supervise(
    joining: Joining, tell: Tell, *, sleep: Callable[[float], None] = time.sleep, tries: int = HOPELESS
) -> None:
    """Keep a site's SuperNode running until interrupted.

    Args:
        joining: What it is started with.
        tell: Told what happens.
        sleep: How to wait.
        tries: How often in a row something may fail that will not come right by itself.

    Raises:
        EndedError: It cannot work here.
        KeyboardInterrupt: As it came; the SuperNode is stopped then.
    """
    failures, waits = 0, delays()
    with only_one(joining.state):
        while True:
            reach = probe(joining.server, joining.keys.authority)
            if not reach.is_fine:
                ending = Ending(reach.text, is_hopeless=not reach.may_change)
            else:
                node = SuperNode(joining, tell)
                try:
                    ending = _watch(node, joining, tell)
                finally:
                    node.stop()
                if node.connected_at is not None and time.monotonic() - node.connected_at > STEADY_SECONDS:
                    failures, waits = 0, delays()
            failures = failures + 1 if ending.is_hopeless else 0
            if failures >= tries:
                raise EndedError(f"{ending.text} (tried {failures} times)")
            seconds = next(waits)
            left = f", {tries - failures} more tries" if ending.is_hopeless else ""
            tell("waiting", f"{ending.text}; trying again in {seconds:.0f} s{left}", is_problem=True)
            sleep(seconds)


def _watch(node: SuperNode, joining: Joining, tell: Tell) -> Ending:
    """Wait until a SuperNode ends; say why there is no connection as long as there is none."""
    told_connection = False
    last: Reach | None = None
    started = next_probe = time.monotonic()
    next_probe += PROBE_SECONDS
    hopeless = 0
    while (code := node.wait(0.2)) is None:
        now = time.monotonic()
        if node.connected_at is not None and not told_connection:
            told_connection = True
            tell("connected", f"connected to {joining.server} after {now - started:.1f} s")
        if now < next_probe:
            continue
        reach = probe(joining.server, joining.keys.authority)
        next_probe = now + (WATCH_SECONDS if told_connection and reach.is_fine else PROBE_SECONDS)
        if not reach.is_fine and (last is None or reach.text != last.text):
            tell("no_connection", reach.text, is_problem=True)
        elif reach.is_fine and last is not None and not last.is_fine:
            tell("server_back", f"the server is back: {reach.text}")
        last = reach
        hopeless = hopeless + 1 if not reach.is_fine and not reach.may_change else 0
        if hopeless >= 2 and not told_connection:
            return Ending(reach.text, is_hopeless=True)
    return ending_of(list(node.lines), code)


def node_config(joining: Joining) -> str:
    """Return what `--node-config` takes.

    Raises:
        FederationError: A path has both kinds of quotation marks, which Flower cannot read.
    """
    values = {"site": joining.keys.site, "state": str(joining.private), "site-file": str(joining.site_file)}
    words = []
    for key, value in values.items():
        if "'" not in value:
            words.append(f"{key}='{value}'")
        elif '"' not in value and "\\" not in value:
            words.append(f'{key}="{value}"')
        else:
            raise FederationError(f"cannot use the path {quoted(value)}: Flower cannot read its quotation marks")
    return " ".join(words)


def supernode_command() -> list[str]:
    """Return what starts Flower's SuperNode."""
    return [sys.executable, "-P", "-m", "graftwork.federated.patience"]


def flower_program(name: str) -> str:
    """Return the path of one of Flower's programs: beside this Python, or on the search path.

    Raises:
        DependencyError: There is none.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise DependencyError(f'there is no program {name}; install it with pip install "graftwork[federated]"')
    return found


def _make_programs(folder: Path) -> Path:
    """Make the folder with the programs that Flower may start: its executor, and our own client."""
    make_private(folder)
    python = shlex.quote(sys.executable)
    scripts = {
        "flower-superexec": f'exec {shlex.quote(flower_program("flower-superexec"))} "$@"',
        "flwr-clientapp": f'exec {python} -P -m graftwork.federated.pinned "$@"',
    }
    for entry in folder.iterdir():
        if entry.name not in scripts:
            entry.unlink()
    for name, line in scripts.items():
        partial = folder / f".{name}.partial"
        partial.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
        partial.chmod(0o700)
        os.replace(partial, folder / name)
    return folder


def free_port() -> int:
    """Return a port that nobody uses now."""
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        return int(probe_socket.getsockname()[1])


def _die_with_parent(parent: int) -> Callable[[], None]:
    """Return what a child calls before it begins, so that it is told to stop when its parent dies."""
    if not sys.platform.startswith("linux"):
        return lambda: None
    control = ctypes.CDLL(None, use_errno=True).prctl

    def arrange() -> None:
        control(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:  # it died before it could be arranged
            os._exit(1)

    return arrange


def kill_group(group: int) -> None:
    """Kill all processes of a group, if there are any."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


@contextlib.contextmanager
def only_one(state: Path) -> Iterator[None]:
    """Hold a site's state folder, so that no second process works in it.

    Raises:
        FederationError: Another one does.
    """
    make_private(state)
    path = state / "join.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                other = json.loads(os.read(descriptor, 100) or b"{}").get("process", "?")
                raise FederationError(
                    f"another graftwork join (process {other}) works with {quoted(state)}; stop it, or give another "
                    "--state"
                ) from None
            raise FederationError(f"another graftwork join works with {quoted(state)}") from None
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"process": os.getpid()}).encode(), 0)
        yield
    finally:
        os.close(descriptor)
