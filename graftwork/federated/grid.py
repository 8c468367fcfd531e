"""A Flower grid without a network: clients run in this process, or in worker processes.

`flwr.serverapp.Grid` is a public interface and a `ClientApp` is callable, so everything that runs here runs on a real
SuperLink as well. Two things are not public: `Message` reads `TaskIdentity`, and whoever transports a message sets its
identifier. Both are kept in this file.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import queue
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from graftwork.federated.asking import PROCESS_ENDED
from graftwork.federated.client import Worker, client_app, node_config
from graftwork.federated.runs import Experiment

if TYPE_CHECKING:
    from graftwork.federated.domains import Federation

FAILED = 2
"""Flower's code of a client that raised."""
TOO_LATE = 1000
"""Our code of a client that took longer than the deadline."""

App = Callable[[Message, Context], Message]


class InProcessGrid(Grid):
    """Runs clients in this process, one at a time, when their replies are pulled; so at most one reply is in memory.

    Args:
        app: Flower's client application, or anything that is called alike.
        sites: Names of the sites; each is a node.
    """

    is_local = True
    """Whether clients run in this process, so that tensors need not be serialised."""

    def __init__(self, app: App, sites: Sequence[str]) -> None:
        _identify()
        self._app = app
        self._sites = list(sites)
        self._numbers = itertools.count(1)
        self._waiting: dict[str, Message] = {}
        self.deadline: float | None = None

    def set_run(self, run: Any) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> Any:
        """Nothing: there is no SuperLink that knows of a run."""
        return None

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the nodes' numbers, from 1."""
        return list(range(1, len(self._sites) + 1))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages; return their identifiers."""
        found = []
        for message in messages:
            identifier = f"message-{next(self._numbers)}"
            message.metadata.__dict__["_message_id"] = identifier
            self._waiting[identifier] = message
            found.append(identifier)
        return found

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the reply to the first of these messages that has not been answered; empty if all have been."""
        for identifier in message_ids:
            message = self._waiting.pop(identifier, None)
            if message is not None:
                return [self._call(message)]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Return the replies to messages, as Flower's own strategies ask for them."""
        replies = []
        for identifier in self.push_messages(messages):
            replies += self.pull_messages([identifier])
        return replies

    def _call(self, message: Message) -> Message:
        number = message.metadata.dst_node_id
        started = time.monotonic()
        try:
            reply = self._app(message, _context(number, self._sites))
        except Exception as error:
            return failure(message, FAILED, reason_of(error))
        seconds = time.monotonic() - started
        if self.deadline is not None and seconds > self.deadline:
            return failure(message, TOO_LATE, f"no answer within {self.deadline:g} s")
        return reply

    def close(self) -> None:
        """Let go of what is waiting."""
        self._waiting.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def local_grid(experiment: Experiment, private: Path, federation: Federation) -> InProcessGrid:
    """Return a grid whose clients run in this process."""
    return InProcessGrid(client_app(Worker(experiment, private, federation)), list(federation.sites))


class ProcessGrid(InProcessGrid):
    """Runs clients in worker processes, each working on one client at a time with one thread.

    A worker that dies or takes longer than the deadline is replaced; its client has failed.

    Args:
        experiment: What is run; workers build the federation themselves.
        private: Where sites keep their state.
        sites: Names of the sites.
        workers: How many processes.
    """

    is_local = False

    def __init__(self, experiment: Experiment, private: Path, sites: Sequence[str], workers: int) -> None:
        super().__init__(_unused, sites)
        self._order = json.dumps({"experiment": experiment.record(), "private": str(private.absolute())})
        self._jobs: deque[Message] = deque()
        self._done: queue.Queue[tuple[_Process, Message, Message | None, int, str]] = queue.Queue()
        self._ready: dict[str, Message] = {}
        self._processes = [_Process(self._order, self._done) for _ in range(max(1, min(workers, len(sites))))]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages and start work on them."""
        held = list(messages)
        found = super().push_messages(held)
        self._jobs.extend(held)
        self._assign()
        return found

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that have come, after waiting for a moment for the first."""
        wanted = [identifier for identifier in message_ids if identifier in self._waiting]
        self._collect(0.05 if not any(identifier in self._ready for identifier in wanted) else 0)
        found = []
        for identifier in wanted:
            reply = self._ready.pop(identifier, None)
            if reply is not None:
                del self._waiting[identifier]
                found.append(reply)
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Return the replies to messages, in the order of the messages."""
        identifiers = self.push_messages(messages)
        found: dict[str, Message] = {}
        while len(found) < len(identifiers):
            for reply in self.pull_messages(identifiers):
                found[reply.metadata.reply_to_message_id] = reply
        return [found[identifier] for identifier in identifiers]

    def _assign(self) -> None:
        for place, process in enumerate(self._processes):
            if not self._jobs:
                return
            if process.is_dead and process.job is None:
                process.kill()
                self._processes[place] = process = _Process(self._order, self._done)
            if process.job is None:
                process.give(self._jobs.popleft(), self._sites)

    def _collect(self, patience: float) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                process, message, reply, code, reason = (
                    self._done.get(timeout=patience) if patience else self._done.get_nowait()
                )
                patience = 0
                if process.job is not message:
                    continue  # given up already
                process.job = None
                self._ready[message.metadata.message_id] = reply or failure(message, code, reason)
        for place, process in enumerate(self._processes):
            late = self.deadline is not None and process.job is not None
            if late and self.deadline is not None and process.seconds > self.deadline and process.job is not None:
                message = process.job
                process.job = None
                process.kill()
                self._processes[place] = _Process(self._order, self._done)
                self._ready[message.metadata.message_id] = failure(
                    message, TOO_LATE, f"no answer within {self.deadline:g} s"
                )
        self._assign()

    def close(self) -> None:
        """End the worker processes."""
        super().close()
        for process in self._processes:
            process.kill()


def _unused(message: Message, context: Context) -> Message:
    raise AssertionError("workers answer")


class _Process:
    """One worker process and the thread that talks with it."""

    def __init__(self, order: str, done: queue.Queue[Any]) -> None:
        import graftwork

        root = str(Path(graftwork.__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "graftwork.federated.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **threads, "PYTHONPATH": path},
            start_new_session=True,
        )
        self.job: Message | None = None
        self._since = 0.0
        self._is_up = False
        self._inbox: queue.SimpleQueue[tuple[Message, bytes] | None] = queue.SimpleQueue()
        self._done = done
        self.is_dead = False
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._pipes = (self._process.stdin, self._process.stdout)
        self._thread = threading.Thread(target=self._talk, args=(order.encode(),), daemon=True)
        self._thread.start()

    def give(self, message: Message, sites: Sequence[str]) -> None:
        """Let the process work on a message."""
        self.job = message
        self._since = time.monotonic()
        number = message.metadata.dst_node_id
        content = pickle.dumps((message, number, list(sites)), protocol=pickle.HIGHEST_PROTOCOL)
        self._inbox.put((message, content))

    @property
    def seconds(self) -> float:
        """How long it has worked on its message, its start not counted."""
        return time.monotonic() - self._since if self._is_up else 0.0

    def kill(self) -> None:
        """End the process."""
        self.is_dead = True
        self._inbox.put(None)
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.wait()
        self._thread.join(timeout=5)
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.close()

    def _talk(self, order: bytes) -> None:
        to_worker, from_worker = self._pipes
        message: Message | None = None
        try:
            send(to_worker, order)
            receive(from_worker)
            while True:
                item = self._inbox.get()
                if item is None:
                    return
                message, content = item
                if not self._is_up:
                    self._since, self._is_up = time.monotonic(), True
                send(to_worker, content)
                del content, item
                kind, payload = pickle.loads(receive(from_worker))
                reply = payload if kind == "reply" else None
                self._done.put((self, message, reply, FAILED, "" if kind == "reply" else payload))
                message = None
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):
            self.is_dead = True
            if message is None:
                with contextlib.suppress(queue.Empty):
                    item = self._inbox.get_nowait()
                    message = item[0] if item is not None else None
            code = self._process.wait()
            if message is not None:
                self._done.put((self, message, None, PROCESS_ENDED, f"its process ended with exit code {code}"))


# ---------------------------------------------------------------------------------------------------------------------
# What both sides of a pipe use


def send(pipe: IO[bytes], data: bytes) -> None:
    """Write bytes with their length in front."""
    pipe.write(struct.pack("<Q", len(data)))
    pipe.write(data)
    pipe.flush()


def receive(pipe: IO[bytes]) -> bytes:
    """Return bytes that were sent with their length in front."""
    size = struct.unpack("<Q", _exactly(pipe, 8))[0]
    return _exactly(pipe, size)


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data


def reason_of(error: BaseException) -> str:
    """Return one line on an exception of a client."""
    from graftwork.merge.errors import GraftworkError
    from graftwork.merge.task import user_failure

    text = error.problems[0] if isinstance(error, GraftworkError) and error.problems else user_failure(error)
    return " ".join(text.split())


def failure(message: Message, code: int, reason: str) -> Message:
    """Return an error reply."""
    return Message(Error(code=code, reason=reason), reply_to=message)


def _context(number: int, sites: Sequence[str]) -> Context:
    return Context(
        run_id=1,
        node_id=number,
        node_config=node_config(sites[number - 1], number - 1, len(sites)),
        state=RecordDict(),
        run_config={},
    )


def context_of(number: int, sites: Sequence[str]) -> Context:
    """Return the context of a node, in a worker process."""
    _identify()
    return _context(number, sites)


def _identify() -> None:
    """Fill in what `Message` wants to know, unless a real Flower process has done so."""
    for name in ("task_id", "run_id", "node_id"):
        if getattr(TaskIdentity, f"_{name}", None) is None:
            setattr(TaskIdentity, name, 1)
