"""Small federations for tests, and a grid whose sites misbehave."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor, nn

from graftwork.federated.asking import PROCESS_ENDED
from graftwork.federated.client import Worker, client_app
from graftwork.federated.domains import Federation, FederationSpec
from graftwork.federated.grid import FAILED, InProcessGrid, failure
from graftwork.federated.runs import Experiment
from graftwork.merge.task import Task

CLASSES = 3
WIDTH = 6


class Net(nn.Module):
    """Encoder, neck and head, each with batch normalisation but the head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.neck = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(self.encoder(x)))


CENTRES = np.random.default_rng(0).normal(size=(CLASSES, WIDTH)) * 2


def examples(seed: int, count: int, shift: float) -> tuple[Tensor, Tensor]:
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    inputs = CENTRES[labels] + generator.normal(size=(count, WIDTH)) + shift
    return torch.tensor(inputs, dtype=torch.float32), torch.tensor(labels)


def batches(inputs: Tensor, labels: Tensor | None) -> Callable[[], Iterator[tuple[Tensor, Tensor | None]]]:
    return lambda: iter([(inputs, labels)])


def toy_task(name: str, seed: int, *, count: int = 30, shift: float = 0.0, blind: bool = False) -> Task:
    inputs, labels = examples(seed, count, shift)
    test = examples(1000 + seed, 60, shift)
    return Task(
        name,
        model=Net,
        batches=batches(inputs, None if blind else labels),
        unlabelled=batches(inputs, None) if blind else None,
        test=batches(*test),
        head="head",
    )


def toy_federation(sites: int = 4, *, count: int = 30) -> Federation:
    tasks = {f"s{i}": toy_task(f"s{i}", i, count=count + 3 * i, shift=0.3 * i) for i in range(sites)}
    return Federation("toy", tasks, toy_task("target", 99, shift=-0.5, blind=True))


FAST: Mapping[str, Mapping[str, Any]] = {
    "fedavg": {},
    "fedprox": {"mu": 0.1},
    "fedbn": {},
    "scaffold": {},
    "local": {},
    "fedadam": {},
    "fedyogi": {},
    "fedadagrad": {},
    "fedavgm": {},
    "fedka": {},
    "fraug": {"local_steps": 2},
    "ggeur": {"target_per_class": 20, "min_count": 1},
}
"""Every algorithm with settings for short tests."""


def experiment(
    algorithm: str = "fedavg", *, rounds: int = 2, settings: Mapping[str, Any] | None = None, **more: Any
) -> Experiment:
    chosen = {"batch_size": 16, **FAST.get(algorithm, {}), **(settings or {})}
    return Experiment(FederationSpec("toy"), algorithm=algorithm, settings=chosen, rounds=rounds, **more)


def tree(folder: Path, *, without: Iterable[str] = ("timing.jsonl", "report.html")) -> dict[str, bytes]:
    """Return all files of a run folder that equal runs have in common."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in without
    }


# --- misbehaviour -----------------------------------------------------------------------------------------------------


def _spoiled(reply: Message, change: Callable[[dict[str, Array], dict[str, Any]], None]) -> None:
    content = reply.content
    arrays, metrics = dict(content["arrays"].items()), dict(content["metrics"].items())
    change(arrays, metrics)
    reply.content = RecordDict(
        {"arrays": ArrayRecord(arrays), "metrics": MetricRecord(metrics), "graftwork": content["graftwork"]}
    )


def _not_a_number(arrays: dict[str, Array], metrics: dict[str, Any]) -> None:
    metrics["loss"] = float("nan")
    for name in list(arrays)[:1]:
        values = arrays[name].numpy().copy()
        if values.dtype.kind == "f":
            values.reshape(-1)[0] = np.nan
        arrays[name] = Array(values)


def _other_shape(arrays: dict[str, Array], metrics: dict[str, Any]) -> None:
    for name in list(arrays)[:1]:
        arrays[name] = Array(arrays[name].numpy().reshape(-1, 1, 1))
    if not arrays:
        arrays["model/surprise"] = Array(np.zeros(3, np.float32))


def _negative_weight(arrays: dict[str, Array], metrics: dict[str, Any]) -> None:
    metrics["num-examples"] = -5.0


FAULTS = ("crash", "late", "nan", "shape", "negative", "twice", "nothing")
"""What a site may do; besides, it may be `gone` (its process ends each time it is asked) or `away` (the first time)."""


class FaultyGrid(Grid):
    """Runs clients in this process; some of them misbehave in all messages but the roll call."""

    def __init__(self, run: Experiment, private: Path, federation: Federation, faults: Mapping[str, str]) -> None:
        self.sites = list(federation.sites)
        self.inner = InProcessGrid(client_app(Worker(run, private, federation)), self.sites)
        self.faults = dict(faults)
        self.kinds: dict[str, str] = {}
        self.held: list[tuple[float, Message]] = []
        self.asked: Counter[tuple[str, str, str]] = Counter()

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *arguments: Any, **more: Any) -> Message:
        return self.inner.create_message(*arguments, **more)

    def get_node_ids(self) -> list[int]:
        return self.inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        held = list(messages)
        identifiers = self.inner.push_messages(held)
        for identifier, message in zip(identifiers, held, strict=True):
            site, own = self.sites[message.metadata.dst_node_id - 1], message.content["graftwork"]
            fault = self.faults.get(site)
            if own["question"] == "roll-call":
                continue
            key = (site, message.metadata.message_type, str(own["round"]))
            self.asked[key] += 1
            if fault and (fault != "away" or self.asked[key] == 1):
                self.kinds[identifier] = fault
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        now = time.monotonic()
        wanted = [each for each in message_ids if each not in {m.metadata.reply_to_message_id for _, m in self.held}]
        for identifier in reversed(wanted):  # replies come in another order than they were asked for
            fault = self.kinds.get(identifier)
            if fault == "nothing":
                continue
            if fault == "crash" and identifier in self.inner._waiting:
                return [failure(self.inner._waiting.pop(identifier), FAILED, "ValueError: boom")]
            if fault in ("gone", "away") and identifier in self.inner._waiting:
                message = self.inner._waiting[identifier]
                if fault == "away":  # the work was done, and its result is on the site's disk; the answer is lost
                    self.inner.pull_messages([identifier])
                self.inner._waiting.pop(identifier, None)
                return [failure(message, PROCESS_ENDED, "its process ended with exit code -9")]
            found = self.inner.pull_messages([identifier])
            if not found:
                continue
            if found[0].has_error():
                return found
            if fault == "late":
                self.held.append((now + 3600, found[0]))
                continue
            if fault == "twice":
                return found * 2
            for name, change in (("nan", _not_a_number), ("shape", _other_shape), ("negative", _negative_weight)):
                if fault == name:
                    _spoiled(found[0], change)
            return found
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        raise NotImplementedError
