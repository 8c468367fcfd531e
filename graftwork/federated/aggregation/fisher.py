"""Fisher-weighted averaging: sites send, beside the model, how much its predictions depend on each of its entries.

Matena & Raffel 2021, arXiv 2111.09832. The diagonal of the Fisher information is measured after local training, on
examples that the site has trained on, without their labels; it travels in bfloat16, half the bytes of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from graftwork.federated.aggregation.choice import Aggregation
from graftwork.federated.aggregation.engine import problems
from graftwork.federated.aggregation.operator import Operator, Round, exchanged_parameters, trained_module
from graftwork.federated.aggregation.options import Option
from graftwork.federated.algorithms.base import Client, Form, Reply, Server, Update, select
from graftwork.federated.messages import float_values
from graftwork.merge.artifact import parent_of, save_artifact
from graftwork.merge.checkpoint import Checkpoint, quoted

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.federated.messages import Raw

GROUP = "fisher"


class FisherOperator(Operator):
    """Weights every entry by its information: Σ n F̂ x / Σ n F̂, with F̂ as the engine's `fisher` scales it."""

    groups = (GROUP,)
    options: ClassVar[Mapping[str, Option]] = {
        "examples": Option(None, int, 1),
        "estimator": Option("auto", ("auto", "exact", "signed", "signed_batch", "sampled", "empirical")),
        "outputs": Option("classes", ("classes", "multi_label", "regression")),
    }

    @classmethod
    def problems_of(cls, aggregation: Aggregation) -> list[str]:
        """Return what the engine has against the other parameters."""
        return list(problems(aggregation.method, aggregation.without(cls.options).parameters))

    def expected(self, server: Server, sent: Mapping[str, Tensor]) -> dict[str, Form]:
        """Return a form for the information of each parameter that travels."""
        known = {name: value for name, value in sent.items() if name in server.shared}
        return {
            f"{GROUP}/{name}": Form("bfloat16", tuple(parameter.shape))
            for name, parameter in exchanged_parameters(server.module(), known).items()
        }

    def after_training(self, client: Client, update: Update) -> Update:
        """Return the update with the Fisher diagonal of the model that it holds."""
        import torch

        from graftwork.merge.statistics.fisher import estimate_fisher

        module = trained_module(client, update)
        parameters = exchanged_parameters(module, update.tensors)
        values = {name: torch.zeros(parameter.shape) for name, parameter in parameters.items()}
        options = self.aggregation.values(self.options)
        if len(client.examples):
            wanted = options["examples"]
            found = estimate_fisher(
                client.task,
                module,
                examples=None if wanted is None else min(wanted, len(client.examples)),
                estimator=options["estimator"],
                outputs=options["outputs"],
                seed=client.seed("fisher"),
            )
            for first, value in found.tensors.items():
                values |= {name: value for name in (first, *found.tied.get(first, ())) if name in values}
        measured = {f"{GROUP}/{name}": value.to(torch.bfloat16) for name, value in values.items()}
        return dataclasses.replace(update, tensors={**update.tensors, **measured})

    def problem(self, tensors: Mapping[str, Raw]) -> str | None:
        """Refuse information below zero."""
        for name, raw in tensors.items():
            if name.startswith(f"{GROUP}/"):
                values = float_values(raw)
                if values.size and float(values.min()) < 0:
                    return f"{quoted(name)} is below zero, which no Fisher information can be"
        return None

    def merge(self, round: Round) -> dict[str, Tensor]:
        """Return the average that is weighted by information, and the mean of what has none."""
        prefix = f"{GROUP}/"
        names = {name: "model/" + name.removeprefix(prefix) for name in round.replies[0] if name.startswith(prefix)}
        merged = set(round.names)
        statistics = [{name: reply[own] for own, name in names.items() if name in merged} for reply in round.replies]
        return self.aggregation.without(self.options).merge(
            round.named(), round.base, round.weights, averaged=round.averaged, statistics={GROUP: statistics}
        )

    def keep(self, server: Server, reply: Reply, model: Path) -> None:
        """Write what the site measured, as `graftwork fisher` would have written it."""
        tensors = select(reply.tensors, GROUP)
        with Checkpoint.open(model) as checkpoint:
            parents = [parent_of(checkpoint)]
        save_artifact(
            model.with_name(f"{reply.site}.fisher.safetensors"),
            tensors,
            kind="fisher",
            method="fisher",
            settings=self.aggregation.values(self.options),
            parents=parents,
            site=reply.site,
            task=reply.site,
        )
