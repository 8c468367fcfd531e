"""Accuracy under clients that mean harm, for each way to aggregate.

    python benchmarks/robustness.py [--clients 10] [--rounds 10] [--share 0.2 --share 0.4] [--seed 0]

scikit-learn's digits, dealt out evenly; a network 64 → 32 → 10; FedAvg with two local passes. Of the clients, a share

* `sign`     sends its change with the opposite sign,
* `label`    trains on labels turned round (9 − label),
* `scaled`   does so and multiplies its change by ten.

Printed is the accuracy in percent on images that no client has. `mean, rejecting` is the mean with what every run does
unless told otherwise: changes ten times as long as the median are left out; in all other rows that is off. Krum and
trimmed mean are told the share of bad clients, which nobody knows in earnest.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graftwork.federated.algorithms.base import Client, Update
from graftwork.federated.algorithms.fedavg import FedAvg
from graftwork.federated.client import Worker, client_app
from graftwork.federated.domains import Federation, FederationSpec
from graftwork.federated.examples import Examples
from graftwork.federated.grid import InProcessGrid
from graftwork.federated.runs import Experiment
from graftwork.federated.strategy import Strategy
from graftwork.merge.task import Task

ATTACKS = ("sign", "label", "scaled")


class Attacked(FedAvg):
    """FedAvg, some clients of which mean harm."""

    bad: frozenset[str] = frozenset()
    attack = "sign"

    def train(self, client: Client) -> Update:
        if client.site not in self.bad:
            return super().train(client)
        if self.attack != "sign":
            labels = client.examples.labels
            assert labels is not None
            client = client.with_examples(Examples(client.examples.inputs, 9 - labels))
        update = super().train(client)
        factor = {"sign": -1.0, "label": 1.0, "scaled": 10.0}[self.attack]
        changed = {
            name: client.received[name] + factor * (value - client.received[name])
            for name, value in update.tensors.items()
        }
        return dataclasses.replace(update, tensors=changed)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def federation(clients: int, seed: int) -> Federation:
    """Return the digits, 400 of them for the server's test, the others dealt out."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))

    def task(name: str, chosen: torch.Tensor) -> Task:
        batch = (inputs[chosen], targets[chosen])
        return Task(name, model=network, batches=lambda: [batch], test=lambda: [batch])

    parts = {f"c{i:02}": part for i, part in enumerate(order[400:].tensor_split(clients))}
    server = dataclasses.replace(task("server", order[:400]), unlabelled=None)
    return Federation(
        "digits", {name: task(name, part) for name, part in parts.items()}, server, sites_are_judged=False
    )


def accuracy(aggregate: str, attack: str, bad: int, sites: Federation, rounds: int, seed: int, outlier: float) -> float:
    """Return the accuracy after the last round."""
    run = Experiment(
        FederationSpec("digits", seed), rounds=rounds, aggregate=aggregate, outlier=outlier, evaluate_every=rounds,
        settings={"local_epochs": 2, "learning_rate": 0.2, "batch_size": 16},
    )  # fmt: skip
    algorithm = Attacked(FedAvg.settings_type(**run.settings))
    # Spread over the names, so that it is not the first or the last who are bad.
    names = list(sites.sites)
    algorithm.bad = frozenset(names[math.floor(i * len(names) / bad)] for i in range(bad))
    algorithm.attack = attack
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(run, Path(folder), sites)
        worker._algorithm = algorithm
        outcome = Strategy(run, algorithm, sites).run(InProcessGrid(client_app(worker), names))
    found: Any = outcome.lines[-1]["server"]["accuracy"]
    return 100 * float(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--share", type=float, action="append")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sites = federation(arguments.clients, arguments.seed)
    shares = arguments.share or [0.2, 0.4]
    columns = [("sign", 0.0), *((attack, share) for attack in ATTACKS for share in shares)]
    heads = ["nobody", *(f"{attack} {100 * share:.0f} %" for attack, share in columns[1:])]
    print(f"| aggregation | {' | '.join(heads)} |")
    print("|" + "---|" * (len(heads) + 1), flush=True)
    begun = time.process_time()
    for name in ("mean", "mean, rejecting", "norm_clipping", "median", "trimmed_mean", "krum"):
        cells = []
        for attack, share in columns:
            bad = round(share * arguments.clients)
            known = {
                "mean, rejecting": "mean",
                "trimmed_mean": f"trimmed_mean:cut={min(0.49, max(0.1, share))}",
                "krum": f"krum:faulty={bad},select={max(1, arguments.clients - 2 * bad)}",
            }
            outlier = 10.0 if name == "mean, rejecting" else 0.0
            found = accuracy(known.get(name, name), attack, bad, sites, arguments.rounds, arguments.seed, outlier)
            cells.append(f"{found:.1f}")
        print(f"| `{name}` | {' | '.join(cells)} |", flush=True)
    print(
        f"\n{arguments.clients} clients, {arguments.rounds} rounds, seed {arguments.seed}; "
        f"{time.process_time() - begun:.0f} s of processor time"
    )


if __name__ == "__main__":
    main()
