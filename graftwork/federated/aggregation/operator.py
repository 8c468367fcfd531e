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

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from graftwork.federated.aggregation import recalibration
from graftwork.federated.aggregation.choice import OWN_METHODS, Aggregation, plain_problems
from graftwork.federated.aggregation.options import Option
from graftwork.federated.algorithms.base import Client, Form, Reply, Server, Update, select
from graftwork.federated.errors import FederationError
from graftwork.merge.checkpoint import quoted
from graftwork.merge.methods import registry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from graftwork.federated.messages import Raw
    from graftwork.federated.runs import Experiment

QUESTION = "operator-"
"""Questions that begin so are an operator's, not an algorithm's."""
RECALIBRATE = QUESTION + "recalibrate"

_HOMES = {
    "fisher": "fisher.FisherOperator",
    "regmean": "regmean.RegMeanOperator",
    "permutation": "permutation.PermutationOperator",
    "concrete_task_arithmetic": "concrete.ConcreteOperator",
    "concrete_adamerging": "concrete.ConcreteOperator",
    "adamerging": "concrete.ConcreteOperator",
}
"""Method → file and class."""


@dataclass(frozen=True, slots=True)
class Round:
    """What is to be merged.

    Args:
        server: The server's half.
        sites: Names of the sites whose replies these are, in order.
        replies: All that they sent, raw words by flat name.
        names: What of it is to be merged.
        base: What the sites were sent, by the same names; None if they had no common start.
        weights: One per reply, above 0.
        averaged: Names for which the mean is taken whatever the method.
    """

    server: Server
    sites: Sequence[str]
    replies: Sequence[Mapping[str, Raw]]
    names: Sequence[str]
    base: Mapping[str, Raw] | None
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
        options: Parameters that are the operator's own.
        passes: How often statistics of batch normalisation are measured again, if nothing else is said.
    """

    groups: tuple[str, ...] = ()
    options: ClassVar[Mapping[str, Option]] = {}
    passes: ClassVar[int] = 0

    def __init__(self, aggregation: Aggregation) -> None:
        self.aggregation = aggregation

    @classmethod
    def problems_of(cls, aggregation: Aggregation) -> list[str]:
        """Return what is wrong with the method, or with parameters that are none of the options."""
        return plain_problems(aggregation.method, aggregation.without(cls.options).parameters)

    @property
    def needs_common_start(self) -> bool:
        """Whether the method looks at what sites have changed."""
        method = self.aggregation.method
        return method == "norm_clipping" or (method not in OWN_METHODS and registry.get(method).base == "required")

    @property
    def recalibrations(self) -> int:
        """The most passes in which statistics of batch normalisation are measured again after a round."""
        given = self.aggregation.parameters.get("recalibrate")
        return self.passes if given is None else int(given)

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
        algorithm = server.algorithm
        if self.aggregation == Aggregation():
            return []
        found = []
        if not any(name.startswith("model/") for name in server.shared):
            hint = "; add --one-shot to merge what the sites have learned alone" if algorithm.name == "local" else ""
            found.append(f"with {algorithm.name} no site sends a model{hint}")
        if not algorithm.merges_models:
            found.append(f"{algorithm.name} has its own way to aggregate; leave out --aggregate, or use fedavg")
        if self.needs_common_start and not algorithm.has_common_start:
            found.append("it looks at what sites have changed, and they start apart; add --set starts=common")
        return found

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
        if not self.recalibrations:
            return {}
        return recalibration.recalibrate(
            server, RECALIBRATE, [reply.site for reply in replies if reply.examples > 0], self.recalibrations
        )

    def keep(self, server: Server, reply: Reply, model: Path) -> None:
        """Write what a site sent for the operator beside the model that it sent."""

    # --- client half

    def after_training(self, client: Client, update: Update) -> Update:
        """Return the update with what the operator needs besides."""
        return update

    def answer(self, client: Client) -> Update:
        """Return the answer to a question of the operator."""
        if client.question == RECALIBRATE:
            return recalibration.measured(client)
        raise FederationError(f"cannot answer {quoted(client.question)}: {self.aggregation.method} does not ask that")


def names() -> tuple[str, ...]:
    """Return the methods that need more than replies."""
    return tuple(_HOMES)


def operator_class(method: str) -> type[Operator]:
    """Return the operator of a method."""
    if method not in _HOMES:
        return Operator
    module, _, cls = _HOMES[method].partition(".")
    found: type[Operator] = getattr(importlib.import_module(f"graftwork.federated.aggregation.{module}"), cls)
    return found


def operator_of(aggregation: Aggregation) -> Operator:
    """Return the operator of an aggregation."""
    return operator_class(aggregation.method)(aggregation)


def trained_module(client: Client, update: Update) -> nn.Module:
    """Return a module, on the CPU, with all values that a local update has left, private ones included."""
    module = client.module()
    state = {**select(update.private or {}, "model"), **select(update.tensors, "model")}
    module.load_state_dict(state, strict=False)
    return module.cpu().eval()


def exchanged_parameters(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Return the parameters whose values are among `tensors`, under all the names that they have there."""
    return {
        name: parameter
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if f"model/{name}" in tensors and parameter.is_floating_point()
    }
