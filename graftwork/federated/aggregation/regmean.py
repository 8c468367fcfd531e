"""RegMean: sites send, beside the model, the Gram matrices of what enters its linear layers and convolutions.

Jin et al. 2022, arXiv 2212.09849. The server solves for the weights whose outputs are nearest to those of each site's
model on that site's inputs. A matrix of a layer has the square of its inputs, so wide layers cost more than the model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from graftwork.federated.aggregation.choice import Aggregation
from graftwork.federated.aggregation.engine import problems
from graftwork.federated.aggregation.operator import Operator, Round, trained_module
from graftwork.federated.aggregation.options import Option
from graftwork.federated.algorithms.base import Client, Form, Reply, Server, Update, select
from graftwork.merge.artifact import parent_of, save_artifact
from graftwork.merge.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor, nn

    from graftwork.merge.statistics.gram import Layer

GROUP = "gram"


class RegMeanOperator(Operator):
    """Merges every linear layer and convolution by regression on the sites' Gram matrices, the rest by the mean."""

    groups = (GROUP,)
    options: ClassVar[Mapping[str, Option]] = {"examples": Option(None, int, 1)}

    @classmethod
    def problems_of(cls, aggregation: Aggregation) -> list[str]:
        """Return what the engine has against the other parameters."""
        return list(problems(aggregation.method, aggregation.without(cls.options).parameters))

    def expected(self, server: Server, sent: Mapping[str, Tensor]) -> dict[str, Form]:
        """Return a form for the matrix of each layer that travels, with its bias if it has one."""
        known = {name: value for name, value in sent.items() if name in server.shared}
        return {f"{GROUP}/{layer.name}": Form("float32", layer.shape) for layer in _layers(server.module(), known)}

    def after_training(self, client: Client, update: Update) -> Update:
        """Return the update with the Gram matrices of the model that it holds."""
        import torch

        from graftwork.merge.statistics.gram import estimate_grams

        module = trained_module(client, update)
        layers = _layers(module, update.tensors)
        values = {layer.name: torch.zeros(layer.shape) for layer in layers}
        wanted = self.aggregation.values(self.options)["examples"]
        if len(client.examples):
            count = None if wanted is None else min(wanted, len(client.examples))
            found = estimate_grams(client.task, module, examples=count, seed=client.seed(GROUP))
            for name, array in found.tensors.items():
                if name in values:
                    values[name] = torch.from_numpy(array).float()
        return dataclasses.replace(
            update, tensors={**update.tensors, **{f"{GROUP}/{name}": value for name, value in values.items()}}
        )

    def merge(self, round: Round) -> dict[str, Tensor]:
        """Return the regression, and the mean of what is no linear layer."""
        merged = dict.fromkeys(round.names)
        layers = _layers(round.server.module(), merged)
        statistics = [
            {f"model/{layer.name}": reply[f"{GROUP}/{layer.name}"] for layer in layers} for reply in round.replies
        ]
        facts = {f"model/{layer.name}": layer.facts() for layer in layers}
        return self.aggregation.without(self.options).merge(
            round.named(), round.base, round.weights, averaged=round.averaged,
            statistics={GROUP: statistics}, metadata={GROUP: {"layers": json.dumps(facts)}},
        )  # fmt: skip

    def keep(self, server: Server, reply: Reply, model: Path) -> None:
        """Write what the site measured, as `graftwork gram` would have written it."""
        tensors = select(reply.tensors, GROUP)
        with Checkpoint.open(model) as checkpoint:
            parents = [parent_of(checkpoint)]
        facts = {layer.name: layer.facts() for layer in _layers(server.module(), server.shared)}
        save_artifact(
            model.with_name(f"{reply.site}.gram.safetensors"),
            tensors,
            kind="gram",
            method="gram",
            settings=self.aggregation.values(self.options),
            parents=parents,
            site=reply.site,
            task=reply.site,
            bias="true",
            layers=json.dumps(facts, sort_keys=True, separators=(",", ":")),
        )


def _layers(module: nn.Module, tensors: Mapping[str, Any]) -> list[Layer]:
    """Return the layers that can be measured and that are among `tensors` with all that belongs to them."""
    from graftwork.merge.statistics.gram import layers_of

    return [
        layer
        for layer in layers_of(module)[0]
        if f"model/{layer.name}" in tensors
        and (not layer.bias or f"model/{layer.name.removesuffix('weight')}bias" in tensors)
    ]
