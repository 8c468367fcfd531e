"""A worker process of a simulation: reads messages from stdin, writes replies to stdout."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sys
import threading
import time
from pathlib import Path

_WATCH_SECONDS = 0.2


def end_with_parent() -> None:
    """End this process soon after the one that started it.

    A run that was killed may go on at once. What a worker of the killed one is still busy with must not reach the
    sites' private state when the new one is rounds ahead.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Work until stdin ends, or the process that wrote to it."""
    end_with_parent()
    inbox = os.fdopen(os.dup(0), "rb")
    outbox = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a user's code prints must not get between the replies
    import torch

    from graftwork.federated.client import Worker, client_app
    from graftwork.federated.grid import context_of, reason_of, receive, send
    from graftwork.federated.runs import Experiment

    torch.set_num_threads(1)
    order = json.loads(receive(inbox))
    worker = Worker(Experiment.from_record(order["experiment"]), Path(order["private"]))
    app = client_app(worker)
    with contextlib.suppress(Exception):  # who asks first is told what is wrong
        worker.prepare()
    send(outbox, b"ready")
    while True:
        try:
            data = receive(inbox)
        except EOFError:
            return
        message, number, sites = pickle.loads(data)
        try:
            answer: tuple[str, object] = ("reply", app(message, context_of(number, sites)))
        except Exception as error:
            answer = ("failed", reason_of(error))
        send(outbox, pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL))


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(1)
