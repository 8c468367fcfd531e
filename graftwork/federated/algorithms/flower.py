"""Flower's own strategies as server halves: FedAvgM, FedAdam, FedYogi, FedAdagrad, or any other by `Wrapped`.

A wrapped strategy only aggregates. Sampling, quorum, validation, checkpoints and resuming are those of all algorithms;
arrays that the strategy keeps between rounds (moments) are saved with each round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from graftwork.federated.algorithms.base import Reply, Server, Settings, setting
from graftwork.federated.algorithms.fedavg import FedAvg
from graftwork.federated.errors import FederationError
from graftwork.federated.normalisation import batch_norm_names

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

_STATE = "flower"
_SENT = "current_arrays"
"""Where Flower's adaptive strategies note what was sent; it is given anew in each round."""


class Wrapped(FedAvg):
    """FedAvg's clients with a Flower strategy as aggregator.

    Running statistics of batch normalisation and integers do not go through the strategy: an adaptive step could make
    a variance negative. Values are widened to float32 before, because Flower's records have no bfloat16.

    Args:
        settings: Settings of the clients.
        make: Returns a fresh strategy; subclasses override `make` instead.
    """

    name = "flower"
    title = "A Flower strategy"
    merges_models = False

    def __init__(self, settings: Settings | None = None, make: Callable[[], Strategy] | None = None) -> None:
        super().__init__(settings)
        self._make = make

    def make(self) -> Strategy:
        """Return a fresh strategy."""
        if self._make is None:
            raise FederationError("cannot aggregate: no Flower strategy was given")
        return self._make()

    def aggregate(self, server: Server, replies: Sequence[Reply]) -> None:
        """Let the strategy aggregate the replies, in the order of the sites."""
        import logging

        import torch
        from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

        from graftwork.federated.grid import InProcessGrid

        logging.getLogger("flwr").setLevel(logging.ERROR)
        statistics = {f"model/{name}" for name in batch_norm_names(server.module(), statistics_only=True)}
        # Sorted, because some strategies pair what they keep with what they get by position, and files sort by name.
        floating = sorted(name for name, value in server.shared.items() if value.is_floating_point())
        names = [name for name in floating if name not in statistics]
        averaged = server.merge(replies, [name for name in floating if name in statistics], mean=True)

        def record(tensors: Any) -> ArrayRecord:
            return ArrayRecord({name: Array(tensors[name].float().numpy()) for name in names})

        strategy = self.make()
        # Strategies note what they send when they configure a round; the messages themselves are not used.
        nodes = InProcessGrid(lambda message, context: message, ["a", "b"])
        list(strategy.configure_train(server.round, record(server.shared), ConfigRecord(), nodes))
        _restore(strategy, server)
        messages = []
        for reply, weight in zip(replies, server.weights(replies), strict=True):
            content = RecordDict({"arrays": record(reply.tensors), "metrics": MetricRecord({"num-examples": weight})})
            messages.append(Message(content, dst_node_id=1, message_type="train"))
        arrays, _ = strategy.aggregate_train(server.round, messages)
        if arrays is None or set(arrays) != set(names):
            raise FederationError(f"cannot aggregate: Flower's {type(strategy).__name__} returned no model")
        server.shared.update(averaged)
        for name, array in arrays.items():
            value = torch.from_numpy(np.array(array.numpy()))
            server.shared[name] = value.to(server.shared[name].dtype)
        _keep(strategy, server)


def _keep(strategy: Strategy, server: Server) -> None:
    """Save the arrays that a strategy holds: mappings and lists of arrays, by attribute."""
    import torch

    for name in [name for name in server.kept if name.startswith(f"{_STATE}/")]:
        del server.kept[name]
    kinds: dict[str, str] = {}
    for attribute, value in vars(strategy).items():
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        held = [(str(key), item) for key, item in items if isinstance(item, np.ndarray | np.generic)]
        if attribute == _SENT or not held or len(held) != len(value):
            continue
        kinds[attribute] = type(value).__name__
        for key, item in held:
            server.kept[f"{_STATE}/{attribute}/{key}"] = torch.from_numpy(np.array(item))
    server.record[_STATE] = kinds


def _restore(strategy: Strategy, server: Server) -> None:
    for attribute, kind in server.record.get(_STATE, {}).items():
        prefix = f"{_STATE}/{attribute}/"
        held = {name[len(prefix) :]: value.numpy() for name, value in server.kept.items() if name.startswith(prefix)}
        in_order: Any = dict(held) if kind == "dict" else [held[str(number)] for number in range(len(held))]
        setattr(strategy, attribute, in_order)


@dataclass(frozen=True, kw_only=True)
class AdaptiveSettings(Settings):
    """Settings of the adaptive strategies (Reddi et al. 2021)."""

    server_learning_rate: float = setting(0.1, "Step of the server.", minimum=0)
    beta_1: float = setting(0.9, "Decay of the first moment.", minimum=0, maximum=1)
    beta_2: float = setting(0.99, "Decay of the second moment.", minimum=0, maximum=1)
    tau: float = setting(1e-3, "Degree of adaptivity.", minimum=0)


class _Adaptive(Wrapped):
    reference = "https://arxiv.org/abs/2003.00295"
    settings_type = AdaptiveSettings
    has_betas: ClassVar[bool] = True

    def make(self) -> Strategy:
        """Return Flower's strategy of the same name."""
        import flwr.serverapp.strategy as strategies

        given = self.settings
        more = {"beta_1": given.beta_1, "beta_2": given.beta_2} if self.has_betas else {}
        found: Strategy = getattr(strategies, self.title)(eta=given.server_learning_rate, tau=given.tau, **more)
        return found


class FedAdam(_Adaptive):
    """FedAvg with Adam on the server."""

    name = "fedadam"
    title = "FedAdam"


class FedYogi(_Adaptive):
    """FedAvg with Yogi on the server."""

    name = "fedyogi"
    title = "FedYogi"


class FedAdagrad(_Adaptive):
    """FedAvg with Adagrad on the server; it has no decays."""

    name = "fedadagrad"
    title = "FedAdagrad"
    has_betas = False


@dataclass(frozen=True, kw_only=True)
class MomentumSettings(Settings):
    """Settings of FedAvgM."""

    server_learning_rate: float = setting(1.0, "Step of the server.", minimum=0)
    server_momentum: float = setting(0.9, "Momentum of the server.", minimum=0, maximum=1)


class FedAvgM(Wrapped):
    """FedAvg with momentum on the server."""

    name = "fedavgm"
    title = "FedAvgM"
    reference = "https://arxiv.org/abs/1909.06335"
    settings_type = MomentumSettings

    def make(self) -> Strategy:
        """Return Flower's FedAvgM."""
        from flwr.serverapp.strategy import FedAvgM as Flowers

        given = self.settings
        return Flowers(server_learning_rate=given.server_learning_rate, server_momentum=given.server_momentum)
