"""The one strategy that all algorithms run on.

It sends what an algorithm's server half wants sent, waits until everybody has answered or the deadline is over, judges
every reply, and lets the algorithm aggregate those that are sound, in the order of the sites' names. It writes each
round before it begins the next one, and goes on from the newest round that was written.

A reply is refused, and its site named, if it is an error, unreadable, from another site than the node's, the second one
of its site (then both are), has other tensors, shapes or dtypes than expected, a value that is not finite, a weight
that is negative or not finite, or changes the model far more than the others do.
"""

from __future__ import annotations

import fnmatch
import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from graftwork.federated import messages
from graftwork.federated.aggregation import Aggregation
from graftwork.federated.aggregation.operator import Round
from graftwork.federated.algorithms.base import Algorithm, Form, Outgoing, Reply, Server
from graftwork.federated.asking import LOST, NODE_UNAVAILABLE, PATIENCE_SECONDS, Losses
from graftwork.federated.client import start_values
from graftwork.federated.domains import Federation
from graftwork.federated.errors import FederationError, QuorumError
from graftwork.federated.log import tell, tell_round, warn
from graftwork.federated.messages import bytes_of
from graftwork.federated.normalisation import batch_norm_names
from graftwork.federated.privacy import epsilon, operator_for, statement
from graftwork.federated.runs import Experiment, RunFolder, Saved
from graftwork.federated.seeds import generator_of, seed_of, torch_seed
from graftwork.merge.artifact import save_artifact
from graftwork.merge.checkpoint import Checkpoint, listed, load_torch, quoted

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.federated.messages import Raw

SPOOL_ABOVE = 512_000_000
"""Bytes of replies in one round above which they go to disk as they come."""

_POLL_SECONDS = 0.2
_ROLL_CALL_SECONDS = 60.0
"""How long a node that came up in the middle of a run has to say which site it is."""


class Observer(Protocol):
    """Is told how a run goes."""

    def __call__(self, line: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Take note of a round: its line of `metrics.jsonl`, and seconds and bytes."""


def silent(line: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
    """Take no note."""


class Received(Reply):
    """A reply with its raw words: in memory, or in a file."""

    def __init__(
        self,
        site: str,
        examples: float,
        metrics: Mapping[str, float],
        raws: Mapping[str, Raw] | None,
        file: Path | None = None,
    ) -> None:
        # A method of its own would tie the reply to itself: rounds of replies would wait for the garbage collector.
        super().__init__(site, examples, metrics, lambda: _tensors_of(raws, file))
        self.raws = raws
        self.file = file


def _tensors_of(raws: Mapping[str, Raw] | None, file: Path | None) -> dict[str, Tensor]:
    if raws is not None:
        return {name: messages.tensor_of(raw) for name, raw in raws.items()}
    assert file is not None
    with Checkpoint.open(file) as checkpoint:
        return load_torch(checkpoint)


@dataclass(slots=True)
class Exchange:
    """What came of asking several sites the same thing."""

    replies: list[Received] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    asked: tuple[str, ...] = ()
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended.

    Args:
        summary: What `summary.json` holds.
        model: The whole global model by plain name.
        lines: The rounds' metrics.
        shared: All that is shared, by flat name.
    """

    summary: dict[str, Any]
    model: dict[str, Tensor]
    lines: list[dict[str, Any]]
    shared: dict[str, Tensor]


class Strategy:
    """Runs an algorithm over a grid.

    Args:
        experiment: What is run.
        algorithm: With its settings.
        federation: The sites' names and the server's data; of the sites' tasks only the model is used.
        folder: Where rounds are written; None to write nothing.
        observer: Told of each round.
        spool_above: Bytes of replies in a round above which they go to disk.
    """

    def __init__(
        self,
        experiment: Experiment,
        algorithm: Algorithm,
        federation: Federation,
        folder: RunFolder | None = None,
        observer: Observer = silent,
        *,
        spool_above: int = SPOOL_ABOVE,
    ) -> None:
        self.experiment = experiment
        self.algorithm = algorithm
        self.federation = federation
        self.folder = folder
        self.observer = observer
        self.spool_above = spool_above
        self.aggregation = Aggregation.parse(experiment.aggregate)
        self.operator = operator_for(experiment)
        self._nodes: dict[str, int] = {}
        self._partial: Path | None = None
        self._spool: tempfile.TemporaryDirectory[str] | None = None
        self._bytes = 0
        self._notes: dict[str, str] = {}
        self._asked_again: dict[str, int] = {}
        self._strangers: set[int] = set()
        self.server = self._new_server()

    # --- the run ----------------------------------------------------------------------------------------------------

    def run(self, grid: Grid, *, resume: bool = False) -> Outcome:
        """Run all rounds; with `resume` from the newest round that was written.

        Raises:
            QuorumError: Too few sites gave a usable answer.
            GraftworkError: The algorithm cannot be used here.
        """
        self._grid = grid
        problems = list(self.algorithm.check(self.server))
        if problems:
            raise FederationError(*(f"cannot run {self.algorithm.name}: {problem}" for problem in problems))
        problems = self.operator.check(self.server, self.experiment)
        if problems:
            method = quoted(self.aggregation.method)
            raise FederationError(*(f"cannot aggregate by {method}: {problem}" for problem in problems))
        self._roll_call()
        saved = self.folder.repair() if resume and self.folder is not None else None
        progress: dict[str, Any] = {"best": None, "best_round": 0, "stale": 0, "skipped": 0}
        lines: list[dict[str, Any]] = []
        server = self.server
        if saved is None:
            with torch_seed(server.seed("start")):
                self.algorithm.start(server)
            line = self._before_rounds()
            self._save(line, progress)
        else:
            server.shared, server.kept = dict(saved.shared), dict(saved.kept)
            server.record = saved.record
            progress = saved.progress
            server.round = saved.number
            assert self.folder is not None
            self.folder.prune(self._rounds_to_keep(progress))
            lines = [line for line in self.folder.metrics() if line.get("round")]
        tell(
            "run_started",
            algorithm=self.algorithm.name,
            rounds=self.experiment.rounds,
            sites=list(server.sites),
            resumed_after=server.round if saved is not None else None,
        )
        while server.round < self.experiment.rounds and not self._is_over(progress):
            server.round += 1
            lines.append(self._round(progress))
        with torch_seed(server.seed("finish")):
            self.algorithm.finish(server)
        summary = self._summary(lines, progress)
        if self.folder is not None:
            save_artifact(
                self.folder.path / "model.safetensors",
                server.model_state(),
                kind="model",
                method=self.algorithm.name,
                settings=self.algorithm.settings.record(),
                parents=self.folder.parents(),
                force=True,
                round=str(server.round),
            )
            self.folder.write_summary(summary)
        tell("run_finished", rounds=summary["rounds"], accuracy=summary.get("accuracy"))
        return Outcome(summary, server.model_state(), lines, dict(server.shared))

    def _is_over(self, progress: Mapping[str, Any]) -> bool:
        return 0 < self.experiment.patience <= int(progress["stale"])

    def _before_rounds(self) -> dict[str, Any]:
        line: dict[str, Any] = {"round": 0}
        self._bytes, self._notes = 0, {}
        try:
            with torch_seed(self.server.seed("before_rounds")):
                self.algorithm.before_rounds(self.server)
        except QuorumError as error:
            if self.experiment.on_quorum == "stop":
                raise
            line["skipped"] = error.problems[0]
        if self._notes:
            line["failed"] = dict(sorted(self._notes.items()))
        line["bytes"] = self._bytes
        return line

    def _round(self, progress: dict[str, Any]) -> dict[str, Any]:
        """Run one round; return its line."""
        server, experiment = self.server, self.experiment
        started = time.monotonic()
        self._bytes, self._notes, self._asked_again = 0, {}, {}
        self._find_moved()
        if self.folder is not None:
            self._partial = self.folder.partial(server.round)
        asked = self._sampled()
        line: dict[str, Any] = {"round": server.round, "asked": len(asked)}
        last = server.round == experiment.rounds
        try:
            replies = self._train(asked)
        except QuorumError as error:
            if experiment.on_quorum == "stop":
                raise
            progress["skipped"] += 1
            line |= {"answered": 0, "skipped": error.problems[0], "failed": dict(sorted(self._notes.items()))}
            line["bytes"] = self._bytes
            self._save(line, progress)
            self._report(line, started)
            return line
        sites: dict[str, dict[str, float]] = {
            reply.site: {"examples": reply.examples, **_prefixed("train_", reply.metrics)} for reply in replies
        }
        line["answered"] = len(replies)
        if experiment.noise_multiplier > 0:
            progress["releases"] = progress.get("releases", 0) + 1
            line["epsilon"] = epsilon(experiment.noise_multiplier, experiment.delta, progress["releases"])
        line["train_loss"] = _mean([(reply.examples, reply.metrics.get("loss")) for reply in replies])
        line["algorithm"] = self._after_round(replies)
        for name, value in server.shared.items():
            if value.is_floating_point() and not _is_finite(messages.raw_of(value)):
                raise FederationError(f"round {server.round}: {quoted(name)} is not finite after the aggregation")
        if last or server.round % experiment.evaluate_every == 0:
            self._evaluate(line, sites)
            self._judge(line, progress)
        line["sites"] = dict(sorted(sites.items()))
        if self._notes:
            line["failed"] = dict(sorted(self._notes.items()))
        line["bytes"] = self._bytes
        if experiment.keep_sites and self._partial is not None:
            self._keep_sites(replies, self._partial)
        self._save(line, progress)
        if self._spool is not None:
            self._spool.cleanup()
            self._spool = None
        self._report(line, started)
        return line

    def _report(self, line: Mapping[str, Any], started: float) -> None:
        """Tell of a round that is over; what differs between equal runs is no part of its line."""
        seconds = time.monotonic() - started
        again = {"asked_again": dict(sorted(self._asked_again.items()))} if self._asked_again else {}
        if self.folder is not None:
            self.folder.add_timing({"round": self.server.round, "seconds": round(seconds, 3), **again})
        tell_round(line, {"seconds": seconds, **again})
        self.observer(line, {"seconds": seconds, "bytes": self._bytes, **again})

    def _sampled(self) -> list[str]:
        """Return the sites that take part in this round."""
        sites = list(self.server.sites)
        count = max(1, round(self.experiment.participation * len(sites)))
        if count >= len(sites):
            return sites
        chosen = generator_of(self.experiment.seed, "", self.server.round, "participation").permutation(len(sites))
        return sorted(sites[number] for number in chosen[:count])

    def _train(self, asked: Sequence[str]) -> list[Received]:
        """Send, wait, judge and aggregate."""
        server = self.server
        sent: dict[str, Outgoing] = {site: self.algorithm.outgoing(server, site) for site in asked}
        by_parcel: dict[int, dict[str, Form]] = {}
        forms: dict[str, dict[str, Form]] = {}
        for site in asked:  # most are sent the same tensors, and so have to answer alike
            tensors = sent[site].tensors
            if id(tensors) not in by_parcel:
                expected = self.algorithm.expected(server, tensors)
                by_parcel[id(tensors)] = {**expected, **self.operator.expected(server, tensors)}
            forms[site] = by_parcel[id(tensors)]
        exchange = self._exchange("train", asked, sent.__getitem__, forms.__getitem__, quorum=self.experiment.quorum)
        self._reject_outliers(exchange)
        self._need("train", exchange, self.experiment.quorum)
        if sum(server.weights(exchange.replies)) <= 0:
            raise QuorumError(f"round {server.round}: no site that answered has any examples")
        with torch_seed(server.seed("aggregate")):
            self.algorithm.aggregate(server, exchange.replies)
        return exchange.replies

    def _after_round(self, replies: Sequence[Received]) -> dict[str, float]:
        server = self.server
        try:
            with torch_seed(server.seed("operator")):
                numbers = self.operator.after_aggregate(server, replies)
            with torch_seed(server.seed("after_round")):
                return {**numbers, **self.algorithm.after_round(server, replies)}
        except QuorumError as error:
            if self.experiment.on_quorum == "stop":
                raise
            self._notes[""] = error.problems[0]
            return {}

    # --- evaluation -------------------------------------------------------------------------------------------------

    def _evaluate(self, line: dict[str, Any], sites: dict[str, dict[str, float]]) -> None:
        """Add losses and accuracies on the server's and on the sites' test data."""
        server = self.server
        with torch_seed(server.seed("evaluate")):
            found = dict(self.algorithm.evaluate_server(server))
        if found:
            line["server"] = found
        if self.federation.sites_are_judged or self.algorithm.is_personal or not found:
            exchange = self._exchange(
                "evaluate",
                server.sites,
                lambda site: self.algorithm.outgoing(server, site),
                lambda site: {},
                quorum=self.experiment.quorum,
            )
            for reply in exchange.replies:
                if reply.metrics:
                    sites.setdefault(reply.site, {}).update(reply.metrics)
            for key in ("loss", "accuracy"):
                values = [(1.0, reply.metrics[key]) for reply in exchange.replies if key in reply.metrics]
                if values:
                    line[f"sites_{key}"] = _mean(values)
        use_sites = self.algorithm.is_personal or "accuracy" not in found
        for key in ("loss", "accuracy"):
            value = line.get(f"sites_{key}") if use_sites else found.get(key)
            if value is not None:
                line[key] = value

    def _judge(self, line: Mapping[str, Any], progress: dict[str, Any]) -> None:
        """Remember the best accuracy so far."""
        value = line.get("accuracy")
        if value is None or not math.isfinite(value):
            return
        if progress["best"] is None or value > progress["best"]:
            progress |= {"best": value, "best_round": self.server.round, "stale": 0}
        else:
            progress["stale"] += 1

    def _summary(self, lines: Sequence[Mapping[str, Any]], progress: Mapping[str, Any]) -> dict[str, Any]:
        judged = [line for line in lines if isinstance(line.get("accuracy"), int | float)]
        tail = judged[-5:]
        summary: dict[str, Any] = {
            "algorithm": self.algorithm.name,
            "rounds": len(lines),
            "stopped_early": self._is_over(progress),
            "skipped_rounds": progress["skipped"],
            "sites": list(self.server.sites),
            "parameters": sum(value.numel() for value in self.server.model_state().values()),
            "bytes": sum(int(line.get("bytes", 0)) for line in lines),
            "judged_on": "the sites' test data"
            if self.algorithm.is_personal or not (lines and "accuracy" in lines[-1].get("server", {}))
            else "the server's test data",
        }
        if judged:
            summary["accuracy"] = judged[-1]["accuracy"]
            summary["mean_of_last"] = {
                "rounds": len(tail),
                "accuracy": _mean([(1.0, line["accuracy"]) for line in tail]),
            }
            adapted = [
                line["server"]["accuracy_adapted"] for line in tail if "accuracy_adapted" in line.get("server", {})
            ]
            if adapted:
                summary["mean_of_last"]["accuracy_adapted"] = _mean([(1.0, value) for value in adapted])
            summary["best"] = {"accuracy": progress["best"], "round": progress["best_round"]}
        with torch_seed(self.server.seed("evaluate")):
            final = dict(self.algorithm.evaluate_server(self.server))
        if final:
            summary["final"] = final
        private = statement(self.experiment, self.server, progress.get("releases", 0))
        if private is not None:
            summary["privacy"] = private
        return summary

    # --- saving -----------------------------------------------------------------------------------------------------

    def _save(self, line: dict[str, Any], progress: Mapping[str, Any]) -> None:
        if self.folder is None:
            return
        server = self.server
        saved = Saved(
            server.round, server.model_state(), server.shared, server.kept, server.record, dict(progress), line
        )
        partial = self._partial if server.round > 0 else None
        if partial is not None:
            shutil.rmtree(partial / "spool", ignore_errors=True)
        self.folder.save_round(
            saved,
            method=self.algorithm.name,
            settings=self.algorithm.settings.record(),
            keep=self._rounds_to_keep(progress),
            partial=partial,
        )
        self._partial = None

    def _rounds_to_keep(self, progress: Mapping[str, Any]) -> list[int]:
        """Return the numbers of the rounds that stay: the newest, and the best."""
        assert self.folder is not None
        newest = [number for number in self.folder.rounds() if number < self.server.round]
        return sorted({self.server.round, progress["best_round"], *newest[::-1][: self.experiment.keep_rounds - 1]})

    def _keep_sites(self, replies: Sequence[Received], partial: Path) -> None:
        """Write the model that each site sent, whole, so that `graftwork merge` can merge them in another way."""
        for reply in replies:
            model = {name.removeprefix("model/"): value for name, value in reply.tensors.items() if "model/" in name}
            path = partial / "sites" / f"{reply.site}.safetensors"
            save_artifact(
                path,
                {**self.server.model_state(), **model},
                kind="client",
                method=self.algorithm.name,
                settings=self.algorithm.settings.record(),
                round=str(self.server.round),
                site=reply.site,
                examples=f"{reply.examples:g}",
            )
            self.operator.keep(self.server, reply, path)

    # --- talking to sites -------------------------------------------------------------------------------------------

    def _roll_call(self) -> None:
        """Find out which node is which site."""
        wanted = list(self.federation.sites)
        limit = time.monotonic() + (self.experiment.deadline or 120.0)
        nodes: list[int] = []
        while True:
            nodes = sorted(self._grid.get_node_ids())
            if len(nodes) >= len(wanted) or time.monotonic() > limit:
                break
            time.sleep(_POLL_SECONDS)
        numbers = {str(node): node for node in nodes}
        named: dict[str, int] = {}
        exchange = self._exchange(
            "query",
            list(numbers),
            lambda node: Outgoing({}),
            lambda node: {},
            messages.ROLL_CALL,
            quorum=self.experiment.quorum,
            naming=named,
            nodes=numbers,
        )
        self._nodes = dict(sorted(named.items()))
        self.server.sites = tuple(self._nodes)
        missing = [site for site in wanted if site not in named]
        if len(named) < max(1, math.ceil(self.experiment.quorum * len(wanted))):
            raise QuorumError(
                f"cannot start: {len(named)} of {len(wanted)} sites answered the roll call, and "
                f"{self.experiment.quorum:g} of them have to; missing: {listed(missing)}",
                *(f"node {node}: {reason}" for node, reason in sorted(exchange.failures.items())),
            )

    def _exchange(
        self,
        kind: str,
        sites: Sequence[str],
        outgoing: Callable[[str], Outgoing],
        forms: Callable[[str], Mapping[str, Form] | None],
        question: str = "",
        *,
        quorum: float = 0.0,
        naming: dict[str, int] | None = None,
        nodes: Mapping[str, int] | None = None,
        patience: float | None = None,
    ) -> Exchange:
        """Send every site its message, and return the sound replies in the order of the sites' names.

        Args:
            kind: Type of the messages.
            sites: Whom to send to.
            outgoing: What each is sent; called again for a site that is asked again.
            forms: What each answer has to look like.
            question: What a query asks.
            quorum: The share of sound answers below which lost sites are asked again.
            naming: Filled with the sites' nodes, in a roll call, whose `sites` are nodes.
            nodes: Under which number each is reached; by default where the sites were last.
            patience: Seconds to wait; by default the run's deadline.
        """
        grid: Any = self._grid
        found = Exchange(asked=tuple(sites))
        request = messages.Request(kind, self.server.round, self.experiment.rounds, question)
        deadline = self.experiment.deadline if patience is None else patience
        times_itself = hasattr(grid, "deadline")
        begun = time.monotonic()
        limit = math.inf if deadline is None or times_itself else begun + deadline
        until = limit if limit < math.inf else begun + PATIENCE_SECONDS
        losses = Losses(self.experiment.ask_again, _least(quorum, len(sites)), until)
        expected_bytes = sum(bytes_of(form) for site in sites for form in (forms(site) or {}).values())
        spool = self._spool_folder(kind) if expected_bytes > self.spool_above else None
        pending: dict[str, str] = {}
        numbers = self._nodes if nodes is None else nodes

        def send(chosen: Sequence[str]) -> int:
            """Send; return the bytes of all that was sent."""
            encoder, outbox, size = messages.Encoder(is_local=getattr(grid, "is_local", False)), [], 0
            for site in chosen:
                parcel = outgoing(site)
                content, of_parcel = messages.request_content(request, parcel.config, encoder, parcel.tensors)
                size += of_parcel
                ttl = None if deadline is None else 2 * deadline + 60
                outbox.append(Message(content, numbers[site], kind, ttl=ttl, group_id=str(self.server.round)))
            pushed = list(grid.push_messages(outbox))
            if len(pushed) != len(chosen):
                raise FederationError(
                    f"cannot send {size} bytes to {len(chosen)} sites: Flower's server takes no messages of this size"
                )
            for identifier, site in zip(pushed, chosen, strict=True):
                if identifier is None:  # Flower's sign that this message was refused
                    losses.take(site, NODE_UNAVAILABLE, "its node cannot be reached", time.monotonic())
                else:
                    pending[identifier] = site
            return size

        found.bytes += send(sites)
        counts: Counter[tuple[str, str]] = Counter()
        while True:
            if times_itself:
                grid.deadline = deadline  # a roll call in between has one of its own
            came = list(grid.pull_messages(list(pending))) if pending else []
            for message in came:
                identifier = message.metadata.reply_to_message_id
                sender = pending.get(identifier)
                if sender is None:
                    continue
                counts[identifier, sender] += 1
                if counts[identifier, sender] > 1:
                    continue
                code = message.error.code if message.has_error() else None
                if code in LOST:
                    losses.take(sender, code, _reason(message), time.monotonic())
                    warn("site_lost", round=self.server.round, site=sender, reason=losses.reasons[sender])
                else:
                    self._take(message, sender, forms(sender), found, spool, naming)
            for message in came:
                pending.pop(message.metadata.reply_to_message_id, None)
            sound = len(found.replies) if naming is None else len(naming)
            now = time.monotonic()
            again = losses.due(sound, len(pending), now)
            if again:
                if naming is None:
                    self._find_moved()
                send(again)
                for site in again:
                    warn("site_asked_again", round=self.server.round, site=site, attempt=losses.asked[site] + 1)
                    self._asked_again[site] = self._asked_again.get(site, 0) + 1
            elif not pending and not losses.are_worth_waiting(sound, now):
                break
            elif not came:
                if now > limit:
                    break
                time.sleep(0 if times_itself and pending else _POLL_SECONDS)
        found.failures |= losses.final()
        found.failures |= {site: f"answered {count} times" for (_, site), count in counts.items() if count > 1}
        for site in pending.values():
            found.failures[site] = f"no answer within {deadline:g} s" if deadline is not None else "no answer"
        found.replies = sorted(
            (reply for reply in found.replies if reply.site not in found.failures), key=lambda reply: reply.site
        )
        self._bytes += found.bytes
        if naming is None:
            prefix = "" if kind == "train" else f"{question or kind}: "
            for site, reason in found.failures.items():
                self._notes[site] = "; ".join(filter(None, [self._notes.get(site, ""), prefix + reason]))
                warn("site_failed", round=self.server.round, site=site, reason=prefix + reason)
        return found

    def _find_moved(self) -> None:
        """Note where sites are now whose node came back under another number.

        Only a site whose old node is gone is looked for: nobody can take the place of a site that is there.
        """
        online = set(self._grid.get_node_ids())
        gone = {site for site, node in self._nodes.items() if node not in online}
        strangers = {str(node): node for node in sorted(online - set(self._nodes.values()) - self._strangers)}
        if not gone or not strangers:
            return
        named: dict[str, int] = {}
        self._exchange(
            "query",
            list(strangers),
            lambda node: Outgoing({}),
            lambda node: {},
            messages.ROLL_CALL,
            naming=named,
            nodes=strangers,
            patience=_ROLL_CALL_SECONDS,
        )
        for site, node in named.items():
            if site in gone:
                self._nodes[site] = node
                tell("site_moved", round=self.server.round, site=site)
            else:
                self._strangers.add(node)

    def _take(
        self,
        message: Message,
        site: str,
        forms: Mapping[str, Form] | None,
        found: Exchange,
        spool: Path | None,
        naming: dict[str, int] | None,
    ) -> None:
        """Judge one reply; keep it, or note what is wrong with it."""
        if message.has_error():
            found.failures[site] = _reason(message)
            return
        try:
            answer = messages.read_answer(message, forms)
            claimed = quoted(messages.readable(answer.site))
            if naming is not None:
                if answer.site in naming:
                    raise ValueError(f"claims to be site {claimed}, as another node does")
                if answer.site not in self.federation.sites:
                    raise ValueError(f"claims to be site {claimed}, which is not in the federation")
                naming[answer.site] = int(site)
                return
            if answer.site != site:
                raise ValueError(f"answered as site {claimed}")
            problem = misfit(answer, forms) or self.operator.problem(answer.tensors)
            if problem:
                raise ValueError(problem)
        except ValueError as error:
            found.failures[site] = str(error)
            return
        found.bytes += sum(words.nbytes for _, words in answer.tensors.values())
        if spool is None:
            found.replies.append(Received(site, answer.examples, answer.metrics, answer.tensors))
            return
        file = spool / f"{site}.safetensors"
        tensors = {name: messages.tensor_of(raw) for name, raw in answer.tensors.items()}
        save_artifact(file, tensors, kind="client", method=self.algorithm.name, settings={}, force=True)
        found.replies.append(Received(site, answer.examples, answer.metrics, None, file))

    def _spool_folder(self, kind: str) -> Path:
        if self._partial is not None:
            folder = self._partial / "spool" / kind
        else:
            if self._spool is None:
                self._spool = tempfile.TemporaryDirectory(prefix="graftwork-round-")
            folder = Path(self._spool.name) / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _reject_outliers(self, exchange: Exchange) -> None:
        """Reject replies whose change of the model is far larger than the median change.

        With clipping nobody is rejected: it limits changes anyway, and whether one site's change counts must not depend
        on the others if there is noise to hide it.
        """
        if self.experiment.outlier <= 0 or self.experiment.clip_norm > 0 or len(exchange.replies) < 3:
            return
        base = {
            name: messages.float_values(messages.raw_of(value)).reshape(-1)
            for name, value in self.server.shared.items()
            if name.startswith("model/") and value.is_floating_point()
        }
        norms = {reply.site: _change(reply, base) for reply in exchange.replies}
        middle = float(np.median(list(norms.values())))
        for site, norm in norms.items():
            if middle > 0 and norm > self.experiment.outlier * middle:
                reason = f"its change has the norm {norm:.3g}, {norm / middle:.3g} times the median of {middle:.3g}"
                exchange.failures[site] = self._notes[site] = reason
        exchange.replies = [reply for reply in exchange.replies if reply.site not in exchange.failures]

    def _need(self, doing: str, exchange: Exchange, quorum: float) -> None:
        """Raise if too few sites gave a sound answer."""
        needed = _least(quorum, len(exchange.asked))
        if len(exchange.replies) >= needed:
            return
        raise QuorumError(
            f"round {self.server.round}: {len(exchange.replies)} of {len(exchange.asked)} sites gave a usable answer "
            f"({doing}), and {needed} have to",
            *(f"site {quoted(site)}: {reason}" for site, reason in sorted(exchange.failures.items())),
        )

    # --- what the server's half may call ----------------------------------------------------------------------------

    def ask(
        self,
        question: str,
        outgoing: Outgoing | Callable[[str], Outgoing],
        *,
        expect: Mapping[str, Form] | None = None,
        sites: Iterable[str] | None = None,
        quorum: float | None = None,
    ) -> list[Reply]:
        """Ask sites a question; see `base.Ask`."""
        asked = sorted(sites) if sites is not None else list(self.server.sites)
        send = outgoing if callable(outgoing) else lambda site: outgoing
        least = self.experiment.quorum if quorum is None else quorum
        # An algorithm may do with fewer answers than the run wants; lost sites are asked again as far as that wants.
        wanted = max(least, self.experiment.quorum)
        exchange = self._exchange("query", asked, send, lambda site: expect, question, quorum=wanted)
        self._need(question, exchange, least)
        return list(exchange.replies)

    def merge(
        self,
        replies: Sequence[Reply],
        names: Iterable[str] | None = None,
        weights: Sequence[float] | None = None,
        *,
        mean: bool = False,
    ) -> dict[str, Tensor]:
        """Aggregate replies; see `base.Merge`."""
        if weights is None:
            weights = self.server.weights(replies)
        ordered = sorted(zip(replies, weights, strict=True), key=lambda pair: pair[0].site)
        replies, weights = [reply for reply, _ in ordered], [weight for _, weight in ordered]
        if not replies:
            raise FederationError("cannot aggregate: there is no reply")
        aggregation = Aggregation() if mean else self.aggregation
        files = [reply.file for reply in replies if isinstance(reply, Received) and reply.file is not None]
        if len(files) == len(replies):
            with Checkpoint.open(files[0]) as checkpoint:
                held = list(checkpoint.tensors)
            wanted = [name for name in held if not self.operator.owns(name)] if names is None else list(names)
            if sorted(wanted) == sorted(held) and (mean or self.operator.is_plain):
                return aggregation.merge_files(files, self._sent(wanted), weights, wanted, averaged=self._is_averaged)
        raws = [_raws(reply) for reply in replies]
        wanted = sorted(name for name in raws[0] if not self.operator.owns(name)) if names is None else list(names)
        wanted = [name for name in wanted if messages.is_float(raws[0][name][0])]
        if not wanted:
            return {}
        base = self._sent(wanted)
        if not mean and not self.operator.is_plain:
            used = [number for number, weight in enumerate(weights) if weight > 0]
            if not used:
                raise FederationError("cannot aggregate: no client has any examples")
            return self.operator.merge(
                Round(
                    self.server,
                    [replies[number].site for number in used],
                    [raws[number] for number in used],
                    wanted,
                    base,
                    [weights[number] for number in used],
                    self._is_averaged,
                )
            )
        return aggregation.merge(
            [{name: raw[name] for name in wanted} for raw in raws], base, weights, averaged=self._is_averaged
        )

    def _sent(self, names: Iterable[str]) -> dict[str, Raw] | None:
        """Return what the sites started from; None if each had a start of its own."""
        if not self.algorithm.has_common_start:
            return None
        return {name: messages.raw_of(self.server.shared[name]) for name in names if name in self.server.shared}

    def _is_averaged(self, name: str) -> bool:
        """Return whether a tensor is averaged whatever the aggregation: statistics, and what is no model."""
        group, _, plain = name.partition("/")
        return group != "model" or plain in self._statistics

    def _new_server(self) -> Server:
        experiment, federation = self.experiment, self.federation
        task = federation.server if federation.server is not None else next(iter(federation.sites.values()))
        initial = start_values(task, experiment)
        with torch_seed(seed_of(experiment.seed, "model")):
            module = task.model()
        self._statistics = batch_norm_names(module, statistics_only=True)
        local = self.algorithm.local_names(module, task.head)
        patterns = experiment.exchange
        unmatched = [pattern for pattern in patterns if not fnmatch.filter(initial, pattern)]
        if unmatched:
            raise FederationError(
                f"cannot exchange {quoted(unmatched[0])}: no tensor has such a name; the model has {listed(initial)}"
            )

        def exchange(name: str) -> bool:
            return name not in local and (not patterns or any(fnmatch.fnmatchcase(name, each) for each in patterns))

        shared = {f"model/{name}": value for name, value in initial.items() if exchange(name)}
        return Server(
            algorithm=self.algorithm,
            task=task,
            has_data=federation.server is not None,
            sites=tuple(sorted(federation.sites)),
            rounds=experiment.rounds,
            seed_base=experiment.seed,
            shared=shared,
            kept={},
            record={},
            initial=initial,
            exchange=exchange,
            ask=self.ask,
            merge=self.merge,
        )


def misfit(answer: messages.Answer, forms: Mapping[str, Form] | None) -> str | None:
    """Return what is wrong with an answer; None if nothing is."""
    if not 0 <= answer.examples <= messages.MOST_EXAMPLES:
        return f"it says that {answer.examples:g} examples stand behind its answer"
    # An accuracy is no number where labels are not classes.
    odd = [k for k, value in answer.metrics.items() if not math.isfinite(value) and not k.startswith("accuracy")]
    if forms is not None:
        missing = [name for name in forms if name not in answer.tensors]
        if missing:
            return f"its answer lacks {listed(missing, 3)}"
        unknown = [name for name in answer.tensors if name not in forms]
        if unknown:
            return f"its answer has {listed([messages.readable(name) for name in unknown[:3]])}, which nobody asked for"
        for name, form in forms.items():
            got = messages.form_of(answer.tensors[name])
            if got.dtype != form.dtype:
                return f"{quoted(name)} is {got.dtype}, not {form.dtype}"
            same = len(got.shape) == len(form.shape) and all(
                want in (-1, have) for have, want in zip(got.shape, form.shape, strict=True)
            )
            if not same:
                return f"{quoted(name)} has shape {got.shape}, not {form.shape}"
    for name, raw in answer.tensors.items():
        if not answer.is_local and messages.is_float(raw[0]) and not _is_finite(raw):
            return f"{quoted(name)} has values that are not finite"
    return f"its {messages.readable(odd[0])} is {answer.metrics[odd[0]]}" if odd else None


_CHUNK = 1 << 16
_AT_HAND = 1 << 15


def _is_finite(raw: Raw) -> bool:
    code, words = raw
    flat = words.reshape(-1)
    if code in ("F32", "F64"):
        # A sum is finite only if every value is; it may overflow, which is then looked into.
        with np.errstate(over="ignore", invalid="ignore"):
            if math.isfinite(float(flat.sum())):
                return True
    for start in range(0, flat.size, _CHUNK):
        if not bool(np.isfinite(messages.float_values((code, flat[start : start + _CHUNK]))).all()):
            return False
    return True


def _change(reply: Received, base: Mapping[str, Any]) -> float:
    """Return the norm of what a reply changes in the model, summed in float64."""
    total = 0.0
    raws = _raws(reply)
    rooms: dict[Any, Any] = {}
    for name, before in base.items():
        if name not in raws:
            continue
        after = messages.float_values(raws[name]).reshape(-1)
        wider = np.result_type(after, before)
        # What the processor keeps at hand is written over and over, instead of new memory.
        if wider not in rooms:
            rooms[wider] = np.empty(_AT_HAND, wider)
        room = rooms[wider]
        for start in range(0, before.size, _AT_HAND):
            part = room[: min(_AT_HAND, before.size - start)]
            np.subtract(after[start : start + _AT_HAND], before[start : start + _AT_HAND], out=part)
            total += float(np.dot(part, part))
    return math.sqrt(total) if math.isfinite(total) else math.inf


def _raws(reply: Reply) -> Mapping[str, Raw]:
    if isinstance(reply, Received) and reply.raws is not None:
        return reply.raws
    return {name: messages.raw_of(value) for name, value in reply.tensors.items()}


def _least(quorum: float, asked: int) -> int:
    """Return how many of the asked a quorum needs."""
    return max(1, math.ceil(quorum * asked - 1e-9)) if quorum > 0 else 0


def _reason(message: Message) -> str:
    """Return what an error reply says, or its code."""
    return messages.readable(message.error.reason or "") or f"failed with code {message.error.code}"


def _mean(pairs: Sequence[tuple[float, float | None]]) -> float | None:
    """Return the weighted mean of the values that there are, summed in the order given."""
    held = [(weight, value) for weight, value in pairs if value is not None]
    total = math.fsum(weight for weight, _ in held)
    return math.fsum(weight * value for weight, value in held) / total if total > 0 else None


def _prefixed(prefix: str, numbers: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}{key}": value for key, value in numbers.items()}
