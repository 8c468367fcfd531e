"""FedBN: everything is averaged but batch normalisation, which stays on the site.

Li, Jiang, Zhang, Kamp, Dou, ICLR 2021, arXiv 2102.07623. Its entries are found by the layers' type, where the published
code looks for "bn" in names and so averages `downsample.1` of a ResNet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from graftwork.federated.algorithms.base import Client, Settings, Update, setting
from graftwork.federated.algorithms.fedavg import FedAvg
from graftwork.federated.normalisation import batch_norm_names, recalibrate
from graftwork.federated.training import evaluate_client, train_locally
from graftwork.merge.evaluation import logits_of

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class FedBNSettings(Settings):
    """Settings of FedBN."""

    weights: Literal["examples", "equal"] = setting("equal", "What a client weighs in the mean.")


class FedBN(FedAvg):
    """Weights, biases, statistics and counters of batch normalisation are private; clients weigh the same.

    A site that has none yet, or that has missed a round, first takes the statistics of its own inputs.
    """

    name = "fedbn"
    title = "FedBN"
    reference = "https://arxiv.org/abs/2102.07623"
    settings_type = FedBNSettings
    is_personal = True
    has_private_state = True

    def local_names(self, module: nn.Module, head: str | None = None) -> frozenset[str]:
        """Return what belongs to batch normalisation."""
        return batch_norm_names(module)

    def train(self, client: Client) -> Update:
        """Return the locally trained model without its batch normalisation."""
        module = own_module(client)
        loss, steps = train_locally(client, module)
        return client.update(module, loss=loss, steps=steps)

    def evaluate(self, client: Client) -> Update:
        """Return loss and accuracy of the global model with the site's batch normalisation."""
        return evaluate_client(client, own_module(client))


def own_module(client: Client) -> nn.Module:
    """Return the received model with the site's batch normalisation, with fresh statistics if these are out of date."""
    module = client.module()
    if client.private_round < client.round - 1 and len(client.examples) > 1:

        def forward(network: nn.Module, inputs: Any) -> Any:
            return logits_of(client.task, network, inputs)

        recalibrate(module, client.examples.inputs, forward=forward)
    return module
