"""The client's side: load private state → let the algorithm work → check → save private state last → reply."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from graftwork.federated import messages
from graftwork.federated.aggregation.operator import QUESTION, Operator
from graftwork.federated.algorithms import create
from graftwork.federated.algorithms.base import Algorithm, Client, Update
from graftwork.federated.compute import CPU
from graftwork.federated.domains import Federation, build
from graftwork.federated.errors import FederationError
from graftwork.federated.examples import Examples
from graftwork.federated.privacy import operator_for
from graftwork.federated.runs import Experiment
from graftwork.federated.seeds import seed_of, torch_seed
from graftwork.merge.artifact import load_artifact, save_artifact
from graftwork.merge.checkpoint import Checkpoint, load_torch, quoted

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.federated.site import Site
    from graftwork.merge.task import Task

VERSIONS = 2
"""How many versions of its private state a site keeps."""

_VERSION = re.compile(r"round-(\d{4,})\.safetensors")


class PrivateState:
    """A site's private tensors on its own disk, stamped with run and round.

    A message for round r gets the newest state of an earlier round, so a round that is replayed gives the same again.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.folder = folder
        self.run = run

    def load(self, before: int) -> tuple[dict[str, Tensor], int]:
        """Return the newest state with a stamp below `before` and its stamp; nothing and −1 if there is none."""
        for number in sorted(self._versions(), reverse=True):
            if number >= before:
                continue
            path = self._path(number)
            found = load_artifact(path, kind="state", what="a site's private state")
            if found.metadata.get("run") != self.run:
                continue
            with Checkpoint.open(path) as checkpoint:
                return load_torch(checkpoint), number
        return {}, -1

    def save(self, tensors: Mapping[str, Tensor], number: int, site: str) -> None:
        """Save the state of a round; the newest `VERSIONS` that a replay could need stay."""
        save_artifact(
            self._path(number),
            tensors,
            kind="state",
            method="private",
            settings={},
            force=True,
            round=str(number),
            site=site,
            run=self.run,
        )
        older = sorted(version for version in self._versions() if version < number)
        for version in older[: -(VERSIONS - 1)]:
            self._path(version).unlink(missing_ok=True)
        for version in self._versions():
            if version > number:  # of a later round that is being replayed
                self._path(version).unlink(missing_ok=True)

    def rounds(self) -> list[int]:
        """Return the rounds of which a state is kept, in order."""
        return sorted(self._versions())

    def _versions(self) -> list[int]:
        try:
            names = os.listdir(self.folder)
        except OSError:
            return []
        return [int(match[1]) for match in map(_VERSION.fullmatch, names) if match]

    def _path(self, number: int) -> Path:
        return self.folder / f"round-{number:04}.safetensors"


class Worker:
    """Answers messages for any site of a federation.

    Args:
        experiment: What is run.
        private: The folder below which sites keep their state, each in one of its own.
        federation: The sites' tasks; by default what the experiment describes, built at the first message.
        site: What the site says of itself, where there is one: its device, and what may leave it.
    """

    def __init__(
        self, experiment: Experiment, private: Path, federation: Federation | None = None, site: Site | None = None
    ) -> None:
        if site is not None:
            site.refuse_algorithm(experiment.algorithm)
        self.experiment = experiment
        self._identity = experiment.identity
        self.private = private
        self.site = site
        self._federation = federation
        self._algorithm: Algorithm | None = None
        self._operator: Operator | None = None
        self._start: dict[str, Tensor] | None = None
        self._examples: dict[str, Examples] = {}

    @property
    def federation(self) -> Federation:
        """The sites' tasks."""
        if self._federation is None:
            self._federation = build(self.experiment.federation)
        return self._federation

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm, with its settings."""
        if self._algorithm is None:
            self._algorithm = create(self.experiment.algorithm, self.experiment.settings)
        return self._algorithm

    @property
    def operator(self) -> Operator:
        """What the aggregation needs of sites besides their models."""
        if self._operator is None:
            self._operator = operator_for(self.experiment)
        return self._operator

    def prepare(self) -> None:
        """Load what any message needs, so that a site's deadline does not count it."""
        _ = self.federation, self.algorithm

    def site_of(self, context: Context) -> str:
        """Return the site of the node that works here: named by the node's configuration, or by its number."""
        named = context.node_config.get("site")
        sites = list(self.federation.sites)
        if isinstance(named, str):
            if named not in sites:
                raise FederationError(
                    f"this node's configuration says site {quoted(named)}, which is not in the federation"
                )
            return named
        number = context.node_config.get("partition-id")
        if not isinstance(number, int) or not 0 <= number < len(sites):
            raise FederationError(f"this node has the number {number!r}, and the federation {len(sites)} sites")
        return sites[number]

    def handle(self, message: Message, context: Context) -> Message:
        """Return the reply to a message."""
        request = messages.read_request(message)
        site = self.site_of(context)
        if request.question == messages.ROLL_CALL:
            return Message(messages.reply_content(site, {}, 0, {}), reply_to=message)
        task = self.federation.sites[site]
        store = PrivateState(self.private / site, self._identity)
        # A question or an evaluation may see what the round itself has left; training never does.
        private, stamp = store.load(request.round if request.kind == "train" else request.round + 1)
        compute = CPU if self.site is None else self.site.compute
        client = Client(
            site=site,
            task=task,
            algorithm=self.algorithm,
            round=request.round,
            rounds=request.rounds,
            received=compute.place({name: messages.tensor_of(raw) for name, raw in request.tensors.items()}),
            config=dict(request.config),
            private=compute.place(private),
            private_round=stamp,
            question=request.question,
            base_seed=self.experiment.seed,
            loaded=self._examples.get(site),
            compute=compute,
        )
        client.initial = compute.place(self._initial(task, client))
        purpose = f"{request.kind} {request.question}".strip()
        with torch_seed(client.seed(purpose)), compute.session(client.seed(purpose)):
            if request.kind == "train":
                update = self.operator.after_training(client, self.algorithm.train(client))
            elif request.kind == "evaluate":
                update = self.algorithm.evaluate(client)
            elif request.question.startswith(QUESTION):
                update = self.operator.answer(client)
            else:
                update = self.algorithm.answer(client)
        if client.loaded is not None and len(self._examples) < 256:
            self._examples[site] = client.loaded
        if compute.device != "cpu":
            update = _on_cpu(update)
        _check(update, site)
        if self.site is not None:
            self.site.refuse_tensors(update.tensors)
        content = messages.reply_content(
            site, update.tensors, update.examples, update.metrics, is_local=request.is_local
        )
        if update.private is not None and request.kind != "evaluate":
            store.save(update.private, request.round, site)
        return Message(content, reply_to=message)

    def _initial(self, task: Task, client: Client) -> dict[str, Tensor]:
        """Return start values of the model's entries that the server did not send."""
        if self._start is None:
            self._start = start_values(task, self.experiment)
        return {name: value for name, value in self._start.items() if f"model/{name}" not in client.received}


def start_values(task: Task, experiment: Experiment) -> dict[str, Tensor]:
    """Return the whole start model by plain name: the checkpoint of `init`, or what the seed gives. All agree."""
    from graftwork.merge.task import fit

    with torch_seed(seed_of(experiment.seed, "model")):
        if experiment.init is None:
            module = task.model()
        else:
            with Checkpoint.open(experiment.init) as checkpoint:
                module = fit(task, checkpoint)
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _on_cpu(update: Update) -> Update:
    """Return an update whose tensors are where they can be sent and saved from."""
    tensors = {name: value.cpu() for name, value in update.tensors.items()}
    private = None if update.private is None else {name: value.cpu() for name, value in update.private.items()}
    return dataclasses.replace(update, tensors=tensors, private=private)


def _check(update: Update, site: str) -> None:
    """Raise if an update is of no use, before anything private is written."""
    import torch

    for what, tensors in (("update", update.tensors), ("private state", update.private or {})):
        for name, value in tensors.items():
            if not value.is_floating_point():
                continue
            # A sum is finite only if every value is; it may overflow, which is then looked into.
            if not math.isfinite(float(value.float().sum())) and not bool(torch.isfinite(value).all()):
                raise FederationError(
                    f"the {what} of site {quoted(site)} is not finite: {quoted(name)}; its state is kept"
                )


def client_app(worker: Worker) -> ClientApp:
    """Return Flower's client application around a worker."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return worker.handle(message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return worker.handle(message, context)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return worker.handle(message, context)

    return app


def forget(folder: Path) -> None:
    """Remove all private state below a folder."""
    shutil.rmtree(folder, ignore_errors=True)


def node_config(site: str, number: int, count: int) -> dict[str, Any]:
    """Return a node's configuration in a simulation."""
    return {"site": site, "partition-id": number, "num-partitions": count}
