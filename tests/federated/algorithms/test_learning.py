"""On the digit domains the algorithms do what they are for: short forms of `benchmarks/federated.py`, one seed each."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import pytest

pytest.importorskip("flwr")
pytest.importorskip("sklearn")

from graftwork.federated.domains import FederationSpec
from graftwork.federated.runs import Experiment
from graftwork.federated.server import simulate

pytestmark = [pytest.mark.flower, pytest.mark.slow]


def accuracy(algorithm: str, settings: Mapping[str, Any], spec: FederationSpec, **options: Any) -> float:
    """Return the mean accuracy of the last three rounds that were evaluated, in percent."""
    lines = simulate(Experiment(spec, algorithm, settings, evaluate_every=2, **options)).lines
    return 100 * statistics.fmean([line["accuracy"] for line in lines if "accuracy" in line][-3:])


def test_votes_help_on_a_domain_without_labels() -> None:
    """The full run gained 20.6 points here; nothing learned from the votes is a gain of about 0."""
    settings = {"optimiser": "adam", "learning_rate": 0.002, "weights": "equal"}
    spec = FederationSpec("digits", 0, target="scale")
    gain = accuracy("fedka", {**settings, "group_effect": False}, spec, rounds=16) - accuracy(
        "fedavg", settings, spec, rounds=16
    )
    assert gain >= 8


def test_geometry_helps_sites_that_lack_classes() -> None:
    """With three of ten sites in each round, the full run gained 22.9 points."""
    settings = {"local_steps": 20, "learning_rate": 0.2}
    options = {"features": "half64", "test_share": "0.3", "domains": "clean"}
    spec = FederationSpec("digits", 0, partition="dirichlet:alpha=0.1,sites=10", options=options)
    found = {name: accuracy(name, settings, spec, rounds=20, participation=0.3) for name in ("fedavg", "ggeur")}
    assert found["ggeur"] - found["fedavg"] >= 8


def test_personal_models_beat_the_common_one_on_their_own_domains() -> None:
    """After 40 rounds FRAug is 8 points above FedAvg, and as good as FedBN."""
    settings = {"learning_rate": 0.05, "momentum": 0.5, "local_steps": 8}
    spec = FederationSpec("digits", 0, options={"examples": "50"})
    found = {name: accuracy(name, settings, spec, rounds=15) for name in ("fedavg", "fedbn", "fraug")}
    assert found["fraug"] - found["fedavg"] >= 4
    assert found["fraug"] - found["fedbn"] >= -2
