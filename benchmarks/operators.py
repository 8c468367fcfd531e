"""Aggregation by merge methods that need more than the replies: accuracy, seconds and bytes, in one table.

    python benchmarks/operators.py [--quick] [--part one-shot|rounds|norm|cost] [--seeds 0 1] [--json FILE]

One-shot: sites of scikit-learn's digits train alone from different starts (MLP 64-512-512-10, 40 epochs of Adam at
1e-3, batches of 64), and their models are merged once. Everything runs through `graftwork.federated.server.simulate`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from graftwork.federated.domains import Federation, FederationSpec
from graftwork.federated.runs import Experiment
from graftwork.federated.server import simulate
from graftwork.merge.task import Task

TRAIN = 1437
UNLABELLED = 200
"""Training images that the server keeps, without labels, where a method needs some."""


def mlp(width: int) -> Callable[[], nn.Module]:
    """Return what makes a network of two hidden layers."""
    return lambda: nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scikit-learn's digits: training images (n, 64) and labels, test images and labels."""
    found = load_digits()
    inputs = torch.tensor(found.data / 16.0, dtype=torch.float32)
    labels = torch.tensor(found.target)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    train, test = order[:TRAIN], order[TRAIN:]
    return inputs[train], labels[train], inputs[test], labels[test]


def shares(labels: Tensor, sites: int, alpha: float | None, seed: int) -> list[list[int]]:
    """Return each site's examples: equal random parts, or each class by a draw from Dir(alpha)."""
    random = np.random.default_rng(seed)
    if alpha is None:
        return [part.tolist() for part in np.array_split(random.permutation(len(labels)), sites)]
    parts: list[list[int]] = [[] for _ in range(sites)]
    for label in range(10):
        members = random.permutation(np.flatnonzero(labels.numpy() == label))
        cuts = (np.cumsum(random.dirichlet([alpha] * sites))[:-1] * len(members)).astype(int)
        for part, more in zip(parts, np.split(members, cuts), strict=True):
            part.extend(more.tolist())
    return parts


def batches(inputs: Tensor, labels: Tensor | None) -> Callable[[], Iterator[tuple[Tensor, Tensor | None]]]:
    """Return a function that gives everything as one batch."""
    return lambda: iter([(inputs, labels)])


def federation(
    sites: int, alpha: float | None, seed: int, *, model: Callable[[], nn.Module], unlabelled: int = 0
) -> Federation:
    """Return digits shared out among sites; the server has the test images, and perhaps some without labels."""
    inputs, labels, test_inputs, test_labels = digits()
    kept = inputs[TRAIN - unlabelled :] if unlabelled else None
    inputs, labels = inputs[: TRAIN - unlabelled], labels[: TRAIN - unlabelled]
    test = batches(test_inputs, test_labels)
    tasks = {
        f"site-{number:02}": Task(
            f"site-{number:02}", model=model, batches=batches(inputs[part], labels[part]), test=test
        )
        for number, part in enumerate(shares(labels, sites, alpha, seed))
    }
    server = Task(
        "server",
        model=model,
        batches=batches(inputs[:0], labels[:0]),
        unlabelled=None if kept is None else batches(kept, None),
        test=test,
    )
    return Federation("digits", tasks, server, sites_are_judged=False)


def run(
    made: Federation, aggregate: str, seed: int, *, algorithm: str = "one-shot", rounds: int = 1, **settings: Any
) -> dict[str, float]:
    """Return accuracy of the merged model and of the sites' alone (per cent), seconds and bytes of a round."""
    experiment = Experiment(
        FederationSpec("digits", seed),
        algorithm=algorithm,
        settings=settings,
        rounds=rounds,
        aggregate=aggregate,
        evaluate_every=rounds,
        outlier=0,
    )
    began = time.perf_counter()
    outcome = simulate(experiment, federation=made)
    last = outcome.lines[-1]
    return {
        "accuracy": 100 * outcome.summary["accuracy"],
        "alone": 100 * last["algorithm"].get("accuracy_alone", float("nan")),
        "seconds": (time.perf_counter() - began) / rounds,
        "bytes": outcome.summary["bytes"] / rounds,
    }


ADAM = {"optimiser": "adam", "learning_rate": 1e-3, "batch_size": 64, "local_epochs": 40, "weights": "equal"}
