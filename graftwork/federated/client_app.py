"""The client half as a Flower app: what app folders name as `clientapp`.

The run configuration says `experiment`, the path of a run's `config.json`, and `private`, the folder for what sites
keep.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from graftwork.federated.client import Worker
from graftwork.federated.errors import FederationError
from graftwork.federated.runs import RunFolder

app = ClientApp()


@lru_cache(maxsize=4)
def worker(experiment: str, private: str) -> Worker:
    """Return the worker of an experiment, one per process."""
    return Worker(RunFolder.open(Path(experiment).parent).experiment(), Path(private))


def handle(message: Message, context: Context) -> Message:
    """Return the reply to a message."""
    path = str(context.run_config.get("experiment", ""))
    if not path:
        raise FederationError("the run configuration lacks experiment, the path of a run's config.json")
    private = str(context.run_config.get("private") or Path(path).parent / "private")
    return worker(path, private).handle(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train."""
    return handle(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate."""
    return handle(message, context)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer a question."""
    return handle(message, context)
