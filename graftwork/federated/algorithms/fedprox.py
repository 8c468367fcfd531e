"""FedProx: local training that is held back from leaving the global model.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, MLSys 2020, arXiv 1812.06127, eq. 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from graftwork.federated.algorithms.base import Client, Settings, Update, select, setting
from graftwork.federated.algorithms.fedavg import FedAvg
from graftwork.federated.training import train_locally

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class FedProxSettings(Settings):
    """Settings of FedProx."""

    mu: float = setting(0.01, "Weight of the proximal term.", minimum=0)


class FedProx(FedAvg):
    """FedAvg whose local loss has mu/2 · |w − w_received|² in addition, over the trainable parameters that are sent."""

    name = "fedprox"
    title = "FedProx"
    reference = "https://arxiv.org/abs/1812.06127"
    settings_type = FedProxSettings

    def train(self, client: Client) -> Update:
        """Return the model after training with the proximal term."""
        module = client.module()
        anchors = select(client.received, "model")
        pairs = [
            (parameter, anchors[name].to(parameter.dtype))
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and name in anchors
        ]
        half = self.settings.mu / 2

        def distance(_: nn.Module) -> Tensor:
            import torch

            terms = [(parameter - anchor).square().sum() for parameter, anchor in pairs]
            return half * torch.stack(terms).sum() if terms else torch.zeros(())

        loss, steps = train_locally(client, module, penalty=distance if half > 0 else None)
        return client.update(module, loss=loss, steps=steps)
