"""SCAFFOLD: control variates correct each local step for the drift of its client.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, ICML 2020, arXiv 1910.06378, algorithm 1 with option II.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graftwork.federated.algorithms.base import Client, Reply, Server, Settings, Update, prefixed, select, setting
from graftwork.federated.algorithms.fedavg import FedAvg
from graftwork.federated.training import train_locally

if TYPE_CHECKING:
    from torch import nn

CONTROL = "control"


@dataclass(frozen=True, kw_only=True)
class ScaffoldSettings(Settings):
    """Settings of SCAFFOLD."""

    server_learning_rate: float = setting(1.0, "Step of the server towards the clients' mean.", minimum=0)

    def problems(self) -> Iterator[str]:
        """Refuse optimisers for which the control variates are not gradients."""
        if self.optimiser != "sgd" or self.momentum:
            yield "SCAFFOLD's control variates are mean gradients of plain sgd; use optimiser=sgd and momentum=0"
        if self.clip:
            yield "SCAFFOLD does not go with clip: the control variates would be clipped with the gradients"


class Scaffold(FedAvg):
    """Correct each local step by what the site's gradients are known to lack.

    With x the received model, y the client's, K steps of size η, N all sites and S those that answered:

        y ← y − η (g − cᵢ + c)        cᵢ⁺ = cᵢ − c + (x − y)/(K η)        c ← c + (1/N) Σ_S (cᵢ⁺ − cᵢ)

    `control/…` are the server's c, sent with the model; cᵢ is private. Only trainable parameters have control variates;
    running statistics are averaged. The sum is taken in the order of the sites, in float64.
    """

    name = "scaffold"
    title = "SCAFFOLD"
    reference = "https://arxiv.org/abs/1910.06378"
    settings_type = ScaffoldSettings
    has_private_state = True

    def start(self, server: Server) -> None:
        """Begin with control variates of zero."""
        trainable = {name for name, value in server.module().named_parameters() if value.requires_grad}
        model = select(server.shared, "model")
        server.shared.update(
            prefixed(
                CONTROL, {name: value.new_zeros(value.shape) for name, value in model.items() if name in trainable}
            )
        )

    def aggregate(self, server: Server, replies: Sequence[Reply]) -> None:
        """Move the model towards the clients' mean, and the control variate by the mean change over all sites."""
        names = [name for name in server.shared if name.startswith("model/")]
        merged = server.merge(replies, [name for name in names if server.shared[name].is_floating_point()])
        rate = self.settings.server_learning_rate
        if rate != 1:
            merged = {
                name: server.shared[name] + rate * (value - server.shared[name]) for name, value in merged.items()
            }
        totals = {name: value.double() for name, value in server.shared.items() if name.startswith(f"{CONTROL}/")}
        for reply in replies:
            changes = reply.tensors
            for name in totals:
                totals[name] = totals[name] + changes[name].double() / len(server.sites)
        server.shared.update(merged)
        server.shared.update({name: value.to(server.shared[name].dtype) for name, value in totals.items()})

    def train(self, client: Client) -> Update:
        """Return the trained model and the change of the site's control variate."""
        import torch

        module = client.module()
        common = select(client.received, CONTROL)
        own = {name: value.new_zeros(value.shape) for name, value in common.items()}
        own.update({name: value for name, value in select(client.private, CONTROL).items() if name in own})
        parameters = {name: value for name, value in module.named_parameters() if name in common}
        before = {name: value.detach().clone() for name, value in parameters.items()}

        def correct(_: nn.Module) -> None:
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    parameter.grad.add_(common[name] - own[name])

        loss, steps = train_locally(client, module, correct=correct)
        length = steps * self.settings.learning_rate
        with torch.no_grad():
            after = {
                name: own[name] - common[name] + (before[name] - parameters[name]) / length if length > 0 else own[name]
                for name in common
            }
        update = client.update(module, loss=loss, steps=steps)
        return Update(
            {**update.tensors, **prefixed(CONTROL, {name: after[name] - own[name] for name in common})},
            update.examples,
            update.metrics,
            {**(update.private or {}), **prefixed(CONTROL, after)},
        )
