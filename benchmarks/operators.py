"""Aggregation by merge methods that need more than the replies: accuracy, CPU seconds and bytes, in one table.

    python benchmarks/operators.py [--quick] [--part one-shot|rounds|norm] [--seeds 0 1] [--json FILE]

One-shot: sites of scikit-learn's digits train alone from different starts (MLP 64-512-512-10, 40 epochs of Adam at
1e-3, batches of 64), and their models are merged once. Everything runs through `graftwork.federated.server.simulate`;
sites of one-shot runs that are equal train once, so CPU seconds are those of the first row, of the merge in the others.
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

from graftwork.federated.algorithms.base import Client, Update
from graftwork.federated.algorithms.local import OneShot
from graftwork.federated.domains import Federation, FederationSpec
from graftwork.federated.models import small
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
    """Return accuracy of the merged model and of the sites' alone (per cent), CPU seconds and bytes of a round."""
    experiment = Experiment(
        FederationSpec("digits", seed),
        algorithm=algorithm,
        settings=settings,
        rounds=rounds,
        aggregate=aggregate,
        evaluate_every=rounds,
        outlier=0,
    )
    began = time.process_time()
    outcome = simulate(experiment, federation=made)
    last = outcome.lines[-1]
    return {
        "accuracy": 100 * outcome.summary["accuracy"],
        "alone": 100 * last["algorithm"].get("accuracy_alone", float("nan")),
        "seconds": (time.process_time() - began) / rounds,
        "bytes": outcome.summary["bytes"] / rounds,
    }


def remember_training() -> None:
    """Let equal sites of one-shot runs train once: what is compared is how their models are merged."""
    known: dict[tuple[Any, ...], Update] = {}
    train = OneShot.train

    def remembered(self: OneShot, client: Client) -> Update:
        inputs = client.examples.inputs
        key = (client.base_seed, client.site, self.settings, inputs.shape, float(inputs.double().sum()))
        size = tuple(value.shape for value in client.received.values())
        if (key, size) not in known:
            known[key, size] = train(self, client)
        return known[key, size]

    OneShot.train = remembered  # type: ignore[method-assign]


ADAM = {"optimiser": "adam", "learning_rate": 1e-3, "batch_size": 64, "local_epochs": 40, "weights": "equal"}


def one_shot(seeds: Sequence[int], quick: bool) -> Iterator[dict[str, Any]]:
    """Yield rows: mean and permutation after local training alone."""
    cells: list[tuple[int, float | None]] = [(4, None), (4, 1.0), (8, None), (2, None), (4, 0.3), (2, 0.3), (8, 1.0)]
    for sites, alpha in cells[:2] if quick else cells:
        for aggregate in ("mean", "permutation"):
            found = [
                run(federation(sites, alpha, seed, model=mlp(128 if quick else 512)), aggregate, seed, **ADAM)
                for seed in seeds
            ]
            yield row(f"one-shot, {sites} sites, {partition(alpha)}", aggregate, found)


def rounds(seeds: Sequence[int], quick: bool) -> Iterator[dict[str, Any]]:
    """Yield rows: methods for models with a common start, under label skew; 200 images of the server without labels."""
    settings = {**ADAM, "local_epochs": 10, "weights": "examples"}
    methods = ["mean", "ties", "fisher", "regmean", "permutation", "concrete:where=server,learning_rate=0.1"]
    methods += ["concrete_adamerging:where=server,learning_rate=0.1", "concrete:where=clients,learning_rate=0.1"]
    for alpha in (0.3,) if quick else (0.3, 0.1):
        for name, more, count in (
            ("one-shot from a common start", {"algorithm": "one-shot", "starts": "common"}, 1),
            ("fedavg, 5 rounds", {"algorithm": "fedavg"}, 5),
        ):
            for aggregate in methods:
                found = [
                    run(
                        federation(5, alpha, seed, model=mlp(128), unlabelled=UNLABELLED), aggregate, seed,
                        rounds=count, **{**settings, **more},
                    )
                    for seed in seeds
                ]  # fmt: skip
                yield row(f"{name}, 5 sites, {partition(alpha)}", aggregate, found)


def norm(seeds: Sequence[int], quick: bool) -> Iterator[dict[str, Any]]:
    """Yield rows: a convolutional network with batch normalisation, whose statistics are estimated again."""
    settings = {**ADAM, "local_epochs": 10 if quick else 40, "batch_size": 32}

    def model() -> nn.Module:
        return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), small((1, 8, 8), 10))

    for sites, alpha in ((4, None), (4, 1.0)):
        for aggregate in ("mean", "mean:recalibrate=8", "permutation:recalibrate=0", "permutation"):
            found = [run(federation(sites, alpha, seed, model=model), aggregate, seed, **settings) for seed in seeds]
            yield row(f"one-shot, batch norm, {sites} sites, {partition(alpha)}", aggregate, found)


def partition(alpha: float | None) -> str:
    """Return a partition in words."""
    return "IID" if alpha is None else f"Dirichlet {alpha:g}"


def row(what: str, aggregate: str, found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return a row of the table: means over seeds."""
    mean = {key: statistics.fmean(each[key] for each in found) for key in found[0]}
    return {"what": what, "aggregate": aggregate, **mean, "each": [round(each["accuracy"], 1) for each in found]}


PARTS = {"one-shot": one_shot, "rounds": rounds, "norm": norm}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller networks, fewer rows")
    parser.add_argument("--part", choices=list(PARTS), action="append", help="only this part; repeatable")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--json", type=Path, help="write rows there, too")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    remember_training()
    rows = []
    print("| what | aggregate | accuracy | each | sites alone | CPU s/round | MB/round |")
    print("|---|---|---|---|---|---|---|")
    for part in chosen.part or PARTS:
        for found in PARTS[part](chosen.seeds, chosen.quick):
            rows.append(found)
            each = " ".join(f"{value:.1f}" for value in found["each"])
            print(
                f"| {found['what']} | `{found['aggregate']}` | {found['accuracy']:.1f} | {each} | {found['alone']:.1f} "
                f"| {found['seconds']:.1f} | {found['bytes'] / 1e6:.2f} |",
                flush=True,
            )
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
