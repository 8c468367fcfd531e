"""What leaves a site: found out by letting it answer every message of a short run, with nothing sent anywhere.

The site's own client half runs on its own task and data against a server half in this process. What is shown is read
from the replies themselves, in the form in which they would cross the wire, so it cannot differ from what is sent; a
local update takes one step instead of all, which changes values but no names, shapes or dtypes.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.federated import messages
from graftwork.federated.algorithms.base import Form
from graftwork.federated.errors import FederationError

if TYPE_CHECKING:
    from flwr.app import Context, Message

    from graftwork.federated.site import Site
    from graftwork.federated.strategy import Strategy

ROLL_CALL = "the roll call"


@dataclass(frozen=True, slots=True)
class Shape:
    """A tensor without its values.

    Args:
        name: By its flat name, such as `model/head.weight`.
        shape: Its shape.
        dtype: Its dtype, as torch calls it.
        bytes: What it takes.
        may_leave: Whether the site's own file allows it to leave.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    may_leave: bool = True


@dataclass(frozen=True)
class Departure:
    """What one kind of message makes leave the site.

    Args:
        when: `train`, `evaluate`, a question such as `moments`, or the roll call.
        tensors: Every tensor of the reply.
        numbers: Names of the numbers beside them, the count of examples among them.
    """

    when: str
    tensors: tuple[Shape, ...]
    numbers: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """All tensors together."""
        return sum(tensor.bytes for tensor in self.tensors)


@dataclass(frozen=True)
class Explanation:
    """What leaves a site, and what it keeps.

    Args:
        site: The site's name.
        algorithm: For which algorithm.
        departures: What leaves, in the order in which it is asked for.
        stays: What the site keeps of the model and writes into its private state; never sent.
    """

    site: str
    algorithm: str
    departures: tuple[Departure, ...]
    stays: tuple[Shape, ...]

    @property
    def refused(self) -> tuple[str, ...]:
        """Names that the algorithm would send and the site's own file does not allow."""
        names = {each.name for departure in self.departures for each in departure.tensors if not each.may_leave}
        return tuple(sorted(names))


def explain(
    site: Site, algorithm: str, settings: Mapping[str, Any] | None = None, *, aggregate: str = "mean"
) -> Explanation:
    """Return what would leave a site if it took part in an algorithm.

    Args:
        site: The site, with its task.
        algorithm: An algorithm or a preset.
        settings: Its settings, as the server would have them.
        aggregate: How the server aggregates; some ways ask the sites for statistics.

    Raises:
        GraftworkError: The site takes no part in it, or cannot.
    """
    from graftwork.federated.algorithms import create
    from graftwork.federated.client import Worker
    from graftwork.federated.domains import Federation, FederationSpec
    from graftwork.federated.grid import InProcessGrid
    from graftwork.federated.runs import Experiment
    from graftwork.federated.strategy import Strategy

    chosen = {"local_steps": 1, **(settings or {})}
    create(algorithm, chosen)  # a name that does not exist is told as such
    site.refuse_algorithm(algorithm)
    experiment = Experiment(
        FederationSpec("explain"),
        algorithm=algorithm,
        settings=chosen,
        rounds=1,
        aggregate=aggregate,
        init=site.init,
        outlier=0.0,
    )
    federation = Federation("explain", {site.site: site.task}, _server_task(site, algorithm))
    seen: list[tuple[str, Message]] = []
    # What is refused is shown, not raised.
    open_site = dataclasses.replace(site, exchange=None, algorithms=())
    with tempfile.TemporaryDirectory(prefix="graftwork-explain-") as private:
        worker = Worker(experiment, Path(private), federation, site=open_site)

        def answer(message: Message, context: Context) -> Message:
            request = messages.read_request(message)
            reply = worker.handle(message, context)
            asked = request.question or request.kind
            seen.append((ROLL_CALL if asked == messages.ROLL_CALL else asked, reply))
            return reply

        strategy = Strategy(experiment, create(algorithm, chosen), federation)
        with InProcessGrid(answer, [site.site]) as grid:
            try:
                strategy.run(grid)
            except FederationError as error:
                raise FederationError(
                    *(f"cannot explain {algorithm}: {problem}" for problem in error.problems)
                ) from None
        departures: dict[str, Departure] = {}
        for when, reply in seen:
            departures[when] = _departure(site, when, reply)
        stays = _stays(site, strategy, Path(private))
    return Explanation(site.site, algorithm, tuple(departures.values()), stays)


def _server_task(site: Site, algorithm: str) -> Any:
    """Return a stand-in for the server's data where the algorithm needs some: the site's own."""
    from graftwork.federated.algorithms import create

    if not create(algorithm).needs_server_data:
        return None
    return dataclasses.replace(site.task, unlabelled=site.task.unlabelled or site.task.batches, test=None)


def _departure(site: Site, when: str, reply: Message) -> Departure:
    answer = messages.read_answer(reply)
    shapes = []
    for name, raw in sorted(answer.tensors.items()):
        form = messages.form_of(raw)
        shapes.append(Shape(name, form.shape, form.dtype, raw[1].nbytes, site.may_leave(name)))
    return Departure(when, tuple(shapes), (messages.EXAMPLES, *sorted(answer.metrics)))


def _stays(site: Site, strategy: Strategy, private: Path) -> tuple[Shape, ...]:
    """Return what the site has of the model and is never asked for, and what else is in its private state."""
    from graftwork.federated.client import PrivateState

    server = strategy.server
    kept = {f"model/{name}": value for name, value in server.initial.items() if f"model/{name}" not in server.shared}
    kept |= PrivateState(private / site.site, strategy.experiment.identity).load(before=strategy.experiment.rounds + 1)[
        0
    ]
    return tuple(
        Shape(name, tuple(value.shape), Form.of(value).dtype, value.numel() * value.element_size())
        for name, value in sorted(kept.items())
    )
