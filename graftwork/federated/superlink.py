"""Flower's programs as children of ours: `python -m graftwork.federated.superlink PROGRAM ARGUMENTS…`.

PROGRAM is one of Flower's commands (`flower-superlink`, `flower-superexec`). They are started through this module for
three reasons.

**They end with us.** The child's standard input is a pipe whose other end its parent holds. When the parent is gone,
killed or not, the pipe ends, and the child ends its whole process group: Flower's own children included.

**The port is closed to strangers.** Flower's SuperLink serves three interfaces on one port: Fleet, for the sites, which
node authentication protects; Control, by which code is submitted that then runs on all sites; and Runtime, from which
a program can fetch work. The last two are open to whoever reaches the port (flwr 1.41). Here they are answered to the
server's own machine only. SuperNodes are told to come again (503) until the sites' keys are registered: Flower would
tell them that they are unknown, and they would end. The hook is not public: if a version of Flower lacks it, the
SuperLink does not start.

**They are this environment's.** The command is looked up among the installed entry points, not on the path.

With `each flwr`, lists of arguments are read from standard input, one JSON list per line; each is run in a fork, and
its exit code and what it printed are written as a line of JSON. Flower's command line takes two seconds of a processor
to be imported, and a deployment asks it something every few seconds.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from importlib.metadata import entry_points
from typing import Any

FLEET = "/v1/fleet/"
"""What the routes for SuperNodes begin with."""
HEALTH = "/health"

OPEN_VARIABLE = "GRAFTWORK_OPEN_FILE"
"""The variable of the environment that names a file: once it exists, SuperNodes are let in."""

_ARMED = "GRAFTWORK_ENDS_WITH_STDIN"
_GRACE_SECONDS = 5.0

Scope = MutableMapping[str, Any]
Application = Callable[[Scope, Any, Any], Awaitable[None]]


def main() -> None:
    """Run one of Flower's programs with the arguments of this process."""
    several = sys.argv[1:2] == ["each"]
    if len(sys.argv) < 2 + several:
        sys.exit("usage: python -m graftwork.federated.superlink [each] PROGRAM ARGUMENTS…")
    program = sys.argv[1 + several]
    found = [point for point in entry_points(group="console_scripts") if point.name == program]
    if not found:
        sys.exit(f"this environment has no program {program}; install Flower with pip install 'graftwork[federated]'")
    if os.environ.pop(_ARMED, "") == "1":
        end_with_parent()
    if program == "flower-superlink":
        close_to_strangers()
        # Several calls per second are answered as they should be; those that are not are worth a line.
        logging.getLogger("uvicorn.access").addFilter(is_worth_a_line)
    command = found[0].load()
    if several:
        run_each(program, command)
        return
    sys.argv = [program, *sys.argv[2:]]
    sys.exit(command())


def run_each(program: str, command: Callable[[], object]) -> None:
    """Run a command for each list of arguments that comes on standard input."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(nothing, 0)
                os.dup2(writing, 1)
                os.dup2(writing, 2)
                sys.argv = [program, *json.loads(line)]
                code = _code_of(command)
                sys.stdout.flush()
            finally:
                os._exit(code)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"code": code, "output": said.decode(errors="replace")}), file=answers, flush=True)


def _code_of(command: Callable[[], object]) -> int:
    """Run a command; return its exit code."""
    try:
        command()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code)
            return 1
        return end.code or 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}")
        return 1
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Ending with the parent


def armed(environment: MutableMapping[str, str]) -> None:
    """Ask a child, by its environment, to end when its standard input does."""
    environment[_ARMED] = "1"


def end_with_parent() -> None:
    """End this process group as soon as standard input ends; this process has to lead the group."""
    pipe = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def watch() -> None:
        while os.read(pipe, 1):
            pass
        end_group()

    threading.Thread(target=watch, name="parent", daemon=True).start()


def end_group() -> None:
    """Ask all of this process group to end, and kill what is left after a while."""
    own = os.getpid()
    if os.getpgid(0) != own:  # somebody else's group: only this process is ours to end
        os.kill(own, signal.SIGTERM)
        threading.Event().wait(_GRACE_SECONDS)
        os._exit(1)
    os.killpg(own, signal.SIGTERM)
    threading.Event().wait(_GRACE_SECONDS)
    os.killpg(own, signal.SIGKILL)


def is_worth_a_line(record: logging.LogRecord) -> bool:
    """Return whether an answered call is one that was not answered well."""
    status = record.args[-1] if isinstance(record.args, tuple) and record.args else None
    return not isinstance(status, int) or status >= 400


# ---------------------------------------------------------------------------------------------------------------------
# Who may call what


class Gate:
    """Answers 403 to calls from other machines, save for what SuperNodes call, and 503 to those for the time being.

    Args:
        app: The application behind.
        open_file: SuperNodes are let in once it exists; None: at once.
    """

    def __init__(self, app: Application, open_file: str | None = None) -> None:
        self.app = app
        self._open_file = open_file

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass a call on, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif not is_allowed(scope):
            await _answer(send, 403, "Only the server's own machine may call this.")
        elif str(scope.get("path", "")).startswith(FLEET) and not self._is_open():
            await _answer(send, 503, "The server is not ready yet; come again.")
        else:
            await self.app(scope, receive, send)

    def _is_open(self) -> bool:
        if self._open_file is not None and os.path.exists(self._open_file):
            self._open_file = None
        return self._open_file is None


async def _answer(send: Any, status: int, text: str) -> None:
    body = f"{text}\n".encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def is_allowed(scope: Scope) -> bool:
    """Return whether a call may pass: SuperNodes' calls, and those from this machine."""
    path = str(scope.get("path", ""))
    if scope["type"] == "http" and (path.startswith(FLEET) or path == HEALTH):
        return True
    client, server = scope.get("client"), scope.get("server")
    if not client:
        return False
    try:
        address = ipaddress.ip_address(client[0])
        own = ipaddress.ip_address(server[0]) if server else None
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback or address == own)


def close_to_strangers() -> None:
    """Put the `Gate` before everything in the SuperLink that this process is going to run."""
    from flwr.superlink import extensions
    from starlette.middleware import Middleware

    # Both names are looked up when the application is made; see flwr/superlink/main.py.
    before = getattr(extensions, "get_middleware", None)
    if before is None:
        sys.exit("this version of Flower cannot be closed to strangers; install flwr>=1.41,<1.43")

    open_file = os.environ.get(OPEN_VARIABLE)

    def get_middleware() -> tuple[Middleware, ...]:
        return (Middleware(Gate, open_file=open_file), *before())

    extensions.get_middleware = get_middleware


if __name__ == "__main__":
    main()
