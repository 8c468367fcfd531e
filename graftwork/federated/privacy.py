"""Differential privacy of sites: changes that are clipped, noise on their sum, and what that adds up to.

This is DP-FedAvg (McMahan, Ramage, Talwar, Zhang, ICLR 2018, arXiv 1710.06963, algorithm 1) with a trusted server: with
x what was sent, C `clip_norm`, z `noise_multiplier`, and m the number of sites that a round asks,

    Δᵢ ← (xᵢ − x) · min(1, C / ‖xᵢ − x‖)        x ← x + (Σ Δᵢ + N(0, z² C² I)) / m

The norm is over all weights together. m does not depend on who answers, and sites weigh the same, so that one site
more or less moves the sum by at most C. What is hidden is whether a *site* takes part, from whoever sees the models;
not from the server, and not in the numbers that sites report besides (`docs/privacy.md`).

A site clips what it sends, and the server clips again what came: the first limits what leaves a site, and the
guarantee rests on the second. Flower's `fixedclipping_mod` does the same to the arrays of a message. It is not used,
because in our messages bfloat16 travels as integers that it would clip as numbers, because running statistics and an
algorithm's own groups would count as weights, because it pairs arrays by position, and because it divides by the norm
of an update that may be zero. The accountant is Flower's.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from graftwork.federated.aggregation import Aggregation
from graftwork.federated.aggregation.clipping import change_norms, moved, scales_of
from graftwork.federated.aggregation.operator import Operator, Round, operator_of
from graftwork.federated.algorithms.base import Algorithm, Client, Server, Update
from graftwork.federated.normalisation import batch_norm_names
from graftwork.merge.checkpoint import listed
from graftwork.merge.errors import DependencyError

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.federated.messages import Values
    from graftwork.federated.runs import Experiment

Entropy = Callable[[int], bytes]
"""Gives that many random bytes."""


def operator_for(experiment: Experiment, entropy: Entropy = os.urandom) -> Operator:
    """Return how an experiment's replies are aggregated: as `aggregate` says, or the mean of clipped changes.

    Args:
        experiment: The experiment.
        entropy: Where noise comes from. Noise that can be repeated is no privacy: give another one in tests only.
    """
    aggregation = Aggregation.parse(experiment.aggregate)
    if experiment.clip_norm == 0:
        return operator_of(aggregation)
    return ClippedMean(aggregation, experiment, entropy)


class ClippedMean(Operator):
    """The mean of clipped changes, with noise if there is to be any.

    Without noise, sites weigh as usual; running statistics of batch normalisation and what is no model are averaged as
    they are.
    """

    def __init__(self, aggregation: Aggregation, experiment: Experiment, entropy: Entropy = os.urandom) -> None:
        super().__init__(aggregation)
        self.experiment = experiment
        self.entropy = entropy

    @property
    def is_noisy(self) -> bool:
        """Whether there is noise."""
        return self.experiment.noise_multiplier > 0

    def check(self, server: Server, experiment: Experiment) -> list[str]:
        """Return what cannot be clipped, or be private."""
        algorithm = server.algorithm
        found = []
        if self.aggregation != Aggregation():
            found.append("clip_norm goes with the mean; leave out --aggregate")
        if not any(name.startswith("model/") for name in server.shared):
            found.append(f"with {algorithm.name} no site sends a model; leave out clip_norm")
        elif not algorithm.merges_models:
            found.append(f"{algorithm.name} has its own way to aggregate, which clip_norm does not reach; use fedavg")
        elif not algorithm.has_common_start:
            found.append("sites start apart, and what they change cannot be clipped; add --set starts=common")
        if self.is_noisy:
            found += [f"noise_multiplier: {each}" for each in _leaks(server, experiment)]
            if not found:
                need_accountant()
        return found

    def after_training(self, client: Client, update: Update) -> Update:
        """Return the update with its change clipped."""
        statistics = batch_norm_names(client.module(), statistics_only=True)
        names = [
            name
            for name, value in update.tensors.items()
            if name.startswith("model/")
            and name.removeprefix("model/") not in statistics
            and name in client.received
            and value.is_floating_point()
        ]
        changes = {name: update.tensors[name].double() - client.received[name].double() for name in names}
        norm = math.sqrt(math.fsum(float(change.square().sum()) for change in changes.values()))
        if norm <= self.experiment.clip_norm:
            return update
        scale = self.experiment.clip_norm / norm
        clipped = {
            name: (client.received[name].double() + scale * change).to(update.tensors[name].dtype)
            for name, change in changes.items()
        }
        return Update({**update.tensors, **clipped}, update.examples, update.metrics, update.private)

    def merge(self, round: Round) -> dict[str, Tensor]:
        """Return the model moved by the mean of the clipped changes, and noise."""
        assert round.base is not None
        weights = [name for name in round.names if not round.averaged(name)]
        rest = [name for name in round.names if round.averaged(name)]
        merged = Aggregation().merge(round.named(rest), None, round.weights) if rest else {}
        bound = self.experiment.clip_norm
        scales = scales_of(change_norms(round.replies, round.base, weights), bound)
        if self.is_noisy:
            asked = asked_in_a_round(self.experiment, len(round.server.sites))
            shares = [scale / asked for scale in scales]
            deviation = self.experiment.noise_multiplier * bound / asked
        else:
            total, deviation = math.fsum(round.weights), 0.0
            shares = [scale * weight / total for scale, weight in zip(scales, round.weights, strict=True)]

        def noise(count: int) -> Values:
            return deviation * gaussian(count, self.entropy)

        for name in weights:
            replies = [reply[name] for reply in round.replies]
            merged[name] = moved(round.base[name], replies, shares, noise if self.is_noisy else None)
        return merged


def gaussian(count: int, entropy: Entropy = os.urandom) -> Values:
    """Return standard normal numbers, float64, each from 53 random bits by the inverse of the distribution function.

    By default these are the operating system's: there is no seed that somebody could guess or learn, and nothing can be
    computed from numbers that were seen. Their floating-point rounding is not hidden (Mironov 2012); what is published
    is rounded once more, to the model's dtype.
    """
    from scipy.special import ndtri

    bits = np.frombuffer(entropy(8 * count), np.uint64) >> np.uint64(11)
    found: Values = ndtri((bits.astype(np.float64) + 0.5) / 2.0**53)
    return found


def asked_in_a_round(experiment: Experiment, sites: int) -> int:
    """Return how many of the sites a round asks."""
    return min(sites, max(1, round(experiment.participation * sites)))


def _leaks(server: Server, experiment: Experiment) -> list[str]:
    """Return what would leave the sites, or be published, without noise."""
    algorithm, found = server.algorithm, []
    kind = type(algorithm)
    if kind.start is not Algorithm.start:
        found.append(f"{algorithm.name} averages more than the model, without noise; use fedavg")
    parts = ("before_rounds", "expected", "aggregate", "after_round", "answer")
    own = [name for name in parts if getattr(kind, name) is not getattr(Algorithm, name)]
    if own and algorithm.merges_models:
        found.append(f"{algorithm.name} learns from single sites ({listed(own)}), past the noise; use fedavg")
    statistics = sorted(
        name
        for name in batch_norm_names(server.module(), statistics_only=True)
        if f"model/{name}" in server.shared and server.shared[f"model/{name}"].is_floating_point()
    )
    if statistics:
        found.append(
            f"running statistics of batch normalisation ({listed(statistics, 2)}) would be averaged without noise; use "
            "fedbn, which keeps them at the sites, or leave them out with --exchange"
        )
    if experiment.settings.get("weights") == "examples":
        found.append("sites have to weigh the same, and weights=examples was given; leave it out")
    if experiment.keep_sites:
        found.append("--keep-sites would keep what the noise is to hide")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What it adds up to


def need_accountant() -> None:
    """Raise if the package that Flower's accountant computes with is not there."""
    if importlib.util.find_spec("dp_accounting") is None:
        raise DependencyError(
            'cannot account for privacy: dp-accounting is not installed; get it with pip install "graftwork[privacy]"'
        )


def epsilon(noise_multiplier: float, delta: float, releases: int, sites: int = 1) -> float:
    """Return ε of the (ε, δ)-differential privacy of a site, after so many releases with noise.

    Flower's accountant, in Rényi differential privacy, for one site added or removed. Who is asked in a round follows
    from the run's seed, which is no secret, so that participation below 1 is not counted in anybody's favour.
    """
    if releases == 0:
        return 0.0
    need_accountant()
    from flwr.serverapp import (
        GaussianPrivacyEvent,
        NeighboringRelation,
        PrivacyConfig,
        RdpAccountant,
        SamplingMethod,
    )

    accountant = RdpAccountant(
        PrivacyConfig(delta, sites, NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION)
    )
    accountant.compose(GaussianPrivacyEvent(noise_multiplier, sites, sites), releases)
    return float(accountant.get_epsilon(delta))


def statement(experiment: Experiment, server: Server, releases: int) -> dict[str, Any] | None:
    """Return what a run may say about privacy, for `summary.json`; None if nothing was protected.

    Args:
        experiment: The experiment.
        server: Its server.
        releases: How many models with noise were made.
    """
    found: dict[str, Any] = {}
    if experiment.noise_multiplier > 0:
        sites = len(server.sites)
        found = {
            "epsilon": epsilon(experiment.noise_multiplier, experiment.delta, releases, sites),
            "delta": experiment.delta,
            "unit": "site",
            "releases": releases,
            "clip_norm": experiment.clip_norm,
            "noise_multiplier": experiment.noise_multiplier,
            "sites_per_round": asked_in_a_round(experiment, sites),
        }
    elif experiment.clip_norm > 0:
        found = {"clip_norm": experiment.clip_norm}
    settings: Mapping[str, Any] = server.settings.record()
    if settings.get("statistics") == "noisy":
        from graftwork.federated.moments import privacy_of_noise

        found["statistics"] = {
            "epsilon": privacy_of_noise(settings["noise_multiplier"], experiment.delta),
            "delta": experiment.delta,
            "unit": "example",
            "covers": "the statistics, once per site; not what is trained afterwards",
        }
    return found or None
