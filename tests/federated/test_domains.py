"""Tests of domains, partitions and networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from graftwork.federated.domains import FederationSpec, Partition, build
from graftwork.federated.errors import FederationError
from graftwork.federated.examples import collect
from graftwork.federated.models import fedka, fraug, small

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def parameters(module: torch.nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def test_networks_have_the_papers_sizes() -> None:
    """38.5 thousand; FedKA's extractor 85,142 and head 81,310; FRAug's 18.15 million."""
    assert parameters(small((1, 16, 16), 10)) == 38_506
    assert parameters(fedka((3, 28, 28), 10)) == 85_142 + 81_310
    assert parameters(fraug((3, 32, 32), 10)) == 18_151_370
    assert fedka((3, 28, 28), 10).eval()(torch.zeros(2, 3, 28, 28)).shape == (2, 10)
    assert fraug((1, 28, 28), 10).eval()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_domains_have_training_images_of_their_own_and_the_same_test_images() -> None:
    federation = build(FederationSpec("digits", seed=1))
    assert list(federation.sites) == ["clean", "rotate", "texture", "noiseblur", "scale"]
    sizes = [item["examples"] for item in federation.record["sites"].values()]
    assert sum(sizes) == 1078
    tests = [collect(task.test, "") for task in federation.sites.values() if task.test is not None]
    assert all(len(test) == 719 for test in tests)
    assert all(torch.equal(test.labels, tests[0].labels) for test in tests)  # type: ignore[arg-type]


def test_the_target_has_no_site_and_shows_no_training_labels() -> None:
    federation = build(FederationSpec("digits", seed=1, target="scale"))
    assert "scale" not in federation.sites
    assert federation.server is not None
    assert federation.server.unlabelled is not None
    assert all(labels is None for _, labels in federation.server.batches())


@pytest.mark.parametrize("kind", ["dirichlet", "quantity", "domain+dirichlet", "domain+quantity"])
def test_partitions_give_every_example_to_one_site(kind: str) -> None:
    federation = build(FederationSpec("digits", seed=1, partition=f"{kind}:alpha=0.5,sites=8"))
    record = federation.record["sites"]
    assert len(record) == 8
    assert sum(item["examples"] for item in record.values()) == 1078
    assert min(item["examples"] for item in record.values()) >= 4
    assert len({item["domain"] for item in record.values()}) == (5 if kind.startswith("domain") else 1)
    assert federation.server is not None


def test_label_skew_is_stronger_for_smaller_alpha_and_quantity_skew_keeps_the_classes() -> None:
    def spread(partition: str) -> float:
        record = build(FederationSpec("digits", seed=1, partition=partition)).record["sites"]
        shares = np.array([np.array(item["classes"]) / item["examples"] for item in record.values()])
        return float(shares.std(0).mean())

    skewed, mild = spread("dirichlet:alpha=0.1,sites=6"), spread("dirichlet:alpha=10,sites=6")
    assert skewed > 3 * mild
    assert spread("quantity:alpha=1,sites=4") < 0.5 * skewed


def test_wrong_names_are_refused_with_the_nearest_one() -> None:
    with pytest.raises(FederationError, match='did you mean "digits"'):
        build(FederationSpec("digit"))
    with pytest.raises(FederationError, match='did you mean "scale"'):
        build(FederationSpec("digits", target="scal"))
    with pytest.raises(FederationError, match='did you mean "suite"'):
        build(FederationSpec("digits", options={"suit": "hard"}))
    with pytest.raises(FederationError, match="alpha above 0"):
        Partition.parse("dirichlet:alpha=0")
    with pytest.raises(FederationError, match="--data"):
        build(FederationSpec("office"))


@pytest.mark.skipif(not (DATA / "office_caltech10").is_dir(), reason="the real domains are not on this machine")
def test_real_domains_are_read() -> None:
    office = build(FederationSpec("office", data=str(DATA), target="dslr"))
    assert office.record["shape"] == [800]
    assert {name: item["examples"] for name, item in office.record["sites"].items()} == {
        "amazon": 575, "caltech": 674, "webcam": 177,
    }  # fmt: skip
    digits = build(
        FederationSpec("digits", data=str(DATA), options={"domains": "usps", "examples": "50", "size": "16"})
    )
    inputs = collect(digits.sites["usps"].batches, "").inputs
    assert inputs.shape == (50, 3, 16, 16)
    assert 0 <= float(inputs.min()) < 0.1 < 0.9 < float(inputs.max()) <= 1
