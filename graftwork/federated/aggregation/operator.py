"""What a merge method may need besides replies, as hooks of the runtime.

An operator has a half on the server and one on the sites, like an algorithm, and goes with any algorithm that averages:

    server  check(server)                  problems that are known before anything is trained
    server  expected(server, sent)         what each reply holds besides what the algorithm asks for
    client  after_training(client, update) measures it
    server  problem(tensors)               what is wrong with a reply, besides names, shapes, and values not finite
    server  merge(round)                   replies → one model; may ask the sites
    server  after_aggregate(server, …)     may ask the sites, too
    client  answer(client)                 the answer to such a question

What is merged goes through `Aggregation.merge`, that is, through the engine of `graftwork.merge`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from graftwork.federated.aggregation.choice import Aggregation
from graftwork.federated.algorithms.base import Client, Form, Reply, Server, Update
from graftwork.federated.errors import FederationError
from graftwork.merge.checkpoint import quoted

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.federated.messages import Raw
    from graftwork.federated.runs import Experiment

QUESTION = "operator-"
"""Questions that begin so are an operator's, not an algorithm's."""


@dataclass(frozen=True, slots=True)
class Round:
    """What is to be merged.

    Args:
        server: The server's half.
        sites: Names of the sites whose replies these are, in order.
        replies: All that they sent, raw words by flat name.
        names: What of it is to be merged.
        base: What the sites were sent, by the same names.
        weights: One per reply, above 0.
        averaged: Names for which the mean is taken whatever the method.
    """

    server: Server
    sites: Sequence[str]
    replies: Sequence[Mapping[str, Raw]]
    names: Sequence[str]
    base: Mapping[str, Raw]
    weights: Sequence[float]
    averaged: Callable[[str], bool]

    def named(self, names: Iterable[str] | None = None) -> list[dict[str, Raw]]:
        """Return the replies with these names alone; by default with those that are to be merged."""
        wanted = list(self.names if names is None else names)
        return [{name: reply[name] for name in wanted} for reply in self.replies]


class Operator:
    """The operator of a method that needs nothing but replies; the others derive from it.

    Attributes:
        aggregation: Method and parameters.
        groups: Groups of tensors (`fisher` of `fisher/conv.weight`) that replies hold for the operator alone.
    """

    groups: ClassVar[tuple[str, ...]] = ()

    def __init__(self, aggregation: Aggregation) -> None:
        self.aggregation = aggregation

    @property
    def is_plain(self) -> bool:
        """Whether replies are merged name by name, with nothing beside them."""
        return type(self).merge is Operator.merge

    def owns(self, name: str) -> bool:
        """Return whether a tensor of a reply is the operator's."""
        return name.partition("/")[0] in self.groups

    # --- server half

    def check(self, server: Server, experiment: Experiment) -> list[str]:
        """Return problems that are known before anything is trained."""
        return []

    def expected(self, server: Server, sent: Mapping[str, Tensor]) -> dict[str, Form]:
        """Return what a reply has to hold for the operator."""
        return {}

    def problem(self, tensors: Mapping[str, Raw]) -> str | None:
        """Return what is wrong with a reply whose names, shapes and dtypes are right and whose values are finite."""
        return None

    def merge(self, round: Round) -> dict[str, Tensor]:
        """Return the aggregate by flat name."""
        return self.aggregation.merge(round.named(), round.base, round.weights, averaged=round.averaged)

    def after_aggregate(self, server: Server, replies: Sequence[Reply]) -> dict[str, float]:
        """Do what comes after the aggregation; return numbers for the record."""
        return {}

    def keep(self, server: Server, reply: Reply, model: Path) -> None:
        """Write what a site sent for the operator beside the model that it sent."""

    # --- client half

    def after_training(self, client: Client, update: Update) -> Update:
        """Return the update with what the operator needs besides."""
        return update

    def answer(self, client: Client) -> Update:
        """Return the answer to a question of the operator."""
        raise FederationError(f"cannot answer {quoted(client.question)}: {self.aggregation.method} does not ask that")


def operator_of(aggregation: Aggregation) -> Operator:
    """Return the operator of an aggregation."""
    return Operator(aggregation)
