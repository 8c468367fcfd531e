"""Local training alone: every site for itself. What a federation has to beat.

Besides, one-shot federation: the sites train alone, and what they have learned is merged once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from graftwork.federated.algorithms.base import Client, Reply, Server, Settings, Update, setting
from graftwork.federated.algorithms.fedavg import FedAvg
from graftwork.federated.seeds import torch_seed
from graftwork.federated.training import measure, test_examples, train_locally

if TYPE_CHECKING:
    from torch import nn

_ALONE = "accuracy_alone"


class Local(FedAvg):
    """Nothing is sent but metrics; each site goes on with its own model, from the common start."""

    name = "local"
    title = "Local training"
    reference = ""
    is_personal = True
    has_private_state = True

    def local_names(self, module: nn.Module, head: str | None = None) -> frozenset[str]:
        """Return everything."""
        return frozenset(module.state_dict())


@dataclass(frozen=True, kw_only=True)
class OneShotSettings(Settings):
    """Settings of a one-shot federation."""

    local_epochs: int = setting(20, "Passes over the site's examples before the merge.", minimum=0)
    starts: Literal["different", "common"] = setting("different", "Whether each site draws its own start values.")


class OneShot(FedAvg):
    """Each site trains alone, by default from a start of its own; then their models are merged, once.

    The record has the mean accuracy of the sites' models before the merge: what it is to be compared with.
    """

    name = "one-shot"
    title = "One-shot federation"
    reference = ""
    settings_type = OneShotSettings

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        self.has_common_start = self.settings.starts == "common"

    def check(self, server: Server) -> Iterator[str]:
        """Refuse more than one round."""
        yield from super().check(server)
        if server.rounds != 1:
            yield f"it has one round, not {server.rounds}; leave out --rounds, or use fedavg"

    def train(self, client: Client) -> Update:
        """Return the model of a site that has trained alone, and how good it is on the site's own test data."""
        module = client.module()
        if not self.has_common_start:
            with torch_seed(client.seed("start")):
                own = client.task.model()
            module.load_state_dict(
                {name: value for name, value in own.state_dict().items() if f"model/{name}" in client.received},
                strict=False,
            )
        loss, steps = train_locally(client, module)
        examples = test_examples(client.task)
        found = {_ALONE: measure(client.task, module, examples)[1]} if len(examples) else {}
        return client.update(module, loss=loss, steps=steps, **found)

    def after_round(self, server: Server, replies: Sequence[Reply]) -> Mapping[str, float]:
        """Return the mean accuracy of the sites' models: on the server's test data, or else on their own."""
        if server.has_data and server.task.test is not None:
            examples = test_examples(server.task)
            alone = [measure(server.task, server.module(reply.tensors), examples)[1] for reply in replies]
        else:
            alone = [reply.metrics[_ALONE] for reply in replies if _ALONE in reply.metrics]
        return {_ALONE: sum(alone) / len(alone), "accuracy_of_best_alone": max(alone)} if alone else {}
