"""The server half as a Flower app: what app folders name as `serverapp`.

Under `graftwork serve` the environment names the run folder, and `deployment/server.json` in it says what to run, for
which sites, and which node belongs to which site by its key. In Flower's simulation the run configuration says
`experiment`, the path of a run's `config.json`. The run is written into its folder, and goes on from its newest round.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import httpx
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from graftwork.federated import messages
from graftwork.federated.algorithms import create
from graftwork.federated.configuration import server_federation
from graftwork.federated.domains import build
from graftwork.federated.errors import FederationError, QuorumError
from graftwork.federated.log import warn
from graftwork.federated.order import PLACE, PRESENT, RUN_VARIABLE, Order
from graftwork.federated.report import followed
from graftwork.federated.runs import RunFolder, json_line, write_text
from graftwork.federated.strategy import Strategy
from graftwork.merge.checkpoint import listed, quoted

_POLL_SECONDS = 0.5
_PULL_SECONDS = 1.0
"""How often the SuperLink is asked for replies: each question writes into its state, and no site answers faster."""
_AT_ONCE = 4
"""How many replies are fetched together."""
_RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)

T = TypeVar("T")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds."""
    run = os.environ.get(RUN_VARIABLE, "")
    if run:
        serve(grid, Path(run))
        return
    path = str(context.run_config.get("experiment", ""))
    if not path:
        raise FederationError("the run configuration lacks experiment, the path of a run's config.json")
    folder = RunFolder.open(Path(path).parent)
    experiment = folder.experiment()
    algorithm, federation = create(experiment.algorithm, experiment.settings), build(experiment.federation)
    with followed(folder, experiment.rounds) as observer:
        Strategy(experiment, algorithm, federation, folder, observer).run(grid, resume=True)


def serve(grid: Grid, run: Path) -> None:
    """Run all rounds of a deployment."""
    folder, order = RunFolder.open(run), Order.load(run)
    experiment = order.experiment
    with followed(folder, experiment.rounds) as observer:
        federation = server_federation(order.sites, experiment.federation, order.task, order.server_task)
        algorithm = create(experiment.algorithm, experiment.settings)
        if order.nodes:
            strategy: Strategy = KeyedStrategy(experiment, algorithm, federation, folder, observer, nodes=order.nodes)
        else:
            strategy = Strategy(experiment, algorithm, federation, folder, observer)
        sites = SitesGrid(grid, order.nodes)
        wait_for_sites(sites, order, run / PLACE / PRESENT)
        strategy.run(sites, resume=True)


class KeyedStrategy(Strategy):
    """The strategy where keys say which node is which site, whether it is there or not.

    So nobody has to be asked for a name, and a site that comes late, or comes back, takes part from the next message
    on that it is sent: its number is that of its key.

    Args:
        arguments: Those of `Strategy`.
        nodes: The site of each node by its number.
        more: Those of `Strategy` that have a name.
    """

    def __init__(self, *arguments: Any, nodes: Mapping[int, str], **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._keyed = dict(sorted((site, node) for node, site in nodes.items()))

    def _roll_call(self) -> None:
        self._nodes = dict(self._keyed)
        self.server.sites = tuple(self._nodes)


def wait_for_sites(grid: Grid, order: Order, note: Path) -> None:
    """Return once all sites are there, or the time is over and the quorum is there; say in a file who is.

    Raises:
        QuorumError: The time is over, and too few are there.
    """
    limit = time.monotonic() + order.wait
    said: list[str] | None = None
    while True:
        nodes = list(grid.get_node_ids())
        here = sorted(order.nodes[node] for node in nodes if node in order.nodes)
        count = len(here) if order.nodes else len(nodes)
        is_over = count >= len(order.sites) or time.monotonic() > limit
        missing = [site for site in order.sites if site not in here] if order.nodes else []
        if here != said or is_over:
            said = here
            write_text(note, json_line({"count": count, "missing": missing, "over": is_over}) + "\n")
        if is_over:
            break
        time.sleep(_POLL_SECONDS)
    needed = max(1, math.ceil(order.experiment.quorum * len(order.sites) - 1e-9))
    if count < needed:
        who = f"; missing: {listed(missing, 20)}" if missing else ""
        raise QuorumError(
            f"cannot start: {count} of {len(order.sites)} sites came within {order.wait:g} s, and {needed} have to{who}"
        )


class SitesGrid(Grid):
    """A SuperLink's grid on which every node speaks for the site of its key, and for no other.

    A SuperLink that answers with an error (500 while its state is locked, say) is asked again: what is asked here may
    be asked twice, since messages are named by their content.

    Args:
        inner: Flower's grid.
        nodes: The site of each node by its number; empty to take every node's word.
        sleep: How to wait.
    """

    def __init__(self, inner: Grid, nodes: Mapping[int, str], sleep: Callable[[float], None] = time.sleep) -> None:
        self._inner = inner
        self._sites = nodes
        self._sleep = sleep
        self._pulled = 0.0

    def set_run(self, run: Any) -> None:
        """Set the run."""
        self._inner.set_run(run)

    @property
    def run(self) -> Any:
        """The run, as Flower knows it."""
        return self._inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are there and whose key is a site's."""
        nodes = self._tried(lambda: list(self._inner.get_node_ids()))
        return [node for node in nodes if not self._sites or node in self._sites]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their identifiers."""
        held = list(messages)
        return self._tried(lambda: list(self._inner.push_messages(held)))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return some of the replies that have come; not at once, if there were none a moment ago.

        Never more than a few, since all that are returned are in memory together.
        """
        wanted = list(message_ids)
        left = self._pulled + _PULL_SECONDS - time.monotonic()
        if left > 0:
            self._sleep(left)
        found: list[Message] = []
        for start in range(0, len(wanted), _AT_ONCE):
            some = wanted[start : start + _AT_ONCE]
            found = self._tried(lambda some=some: list(self._inner.pull_messages(some)))  # type: ignore[misc]
            if found:
                break
        self._pulled = 0.0 if found else time.monotonic()
        return [self._judged(message) for message in found]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Return the replies to messages, as Flower's own strategies ask for them."""
        return [self._judged(message) for message in self._inner.send_and_receive(messages, timeout=timeout)]

    def _tried(self, ask: Callable[[], list[T]]) -> list[T]:
        for seconds in _RETRY_SECONDS:
            try:
                return ask()
            except httpx.HTTPError as error:
                warn("server_error", reason=f"{type(error).__name__}: {error}".partition("\n")[0])
            self._sleep(seconds)
        return ask()

    def _judged(self, message: Message) -> Message:
        """Return a reply; one that speaks for another site is changed so that no site's name fits."""
        if not self._sites or message.has_error():
            return message
        own = message.content.get(messages.OWN)
        if isinstance(own, ConfigRecord):
            claimed, true = str(own.get("site", "")), self._sites.get(message.metadata.src_node_id, "")
            if claimed != true:
                own["site"] = f"{claimed} (with the key of {quoted(true)})"
        return message
