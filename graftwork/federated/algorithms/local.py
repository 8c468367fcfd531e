"""Local training alone: every site for itself. What a federation has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftwork.federated.algorithms.fedavg import FedAvg

if TYPE_CHECKING:
    from torch import nn


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
