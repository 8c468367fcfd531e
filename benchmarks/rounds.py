"""What a round costs besides the clients' own work: our runtime, Flower's stock simulation, and the floor.

    python benchmarks/rounds.py [--case 10x0.1 --case 1000x0.1 --case 10x10] [--without-ray]
    python benchmarks/rounds.py --memory [--algorithm scaffold]

A case is CLIENTSxMILLIONS of parameters. The client's step is the same on both sides: it copies the model and adds a
constant. Figures are CPU seconds of the whole process tree per round: the difference between a run of many and of few
rounds, so that starting does not count, less the client's steps. The floor copies, checks and sums the same bytes with
numpy in one thread.

With `--memory`, 100 clients train in this process for 50 rounds, and the resident memory after each is printed: it must
not grow.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

FEW, MANY = 1, 4


def cpu() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def shapes(millions: float) -> list[tuple[int, ...]]:
    """Ten tensors that make up the model."""
    return [(int(millions * 1e5) // 100, 100)] * 10


def ours(clients: int, millions: float, rounds: int) -> tuple[float, float]:
    """Return CPU seconds of the rounds after the first with our runtime, and of the clients' steps in them."""
    import torch
    from torch import nn

    from graftwork.federated.algorithms.base import Algorithm, Client, Update
    from graftwork.federated.client import Worker, client_app
    from graftwork.federated.domains import Federation, FederationSpec
    from graftwork.federated.grid import InProcessGrid
    from graftwork.federated.runs import Experiment
    from graftwork.federated.strategy import Strategy
    from graftwork.merge.task import Task

    torch.set_num_threads(1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes(millions))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs

    spent = [0.0]

    class Echo(Algorithm):
        name = "echo"

        def train(self, client: Client) -> Update:
            before = time.process_time()
            found = {name: value + 1e-3 for name, value in client.received.items()}
            spent[0] += time.process_time() - before
            return Update(found, 1.0, {"loss": 0.0})

        def evaluate(self, client: Client) -> Update:
            return Update({}, 1.0)

    task = Task("echo", model=Net, batches=lambda: [])
    federation = Federation("echo", {f"s{i:04}": task for i in range(clients)}, None)
    # One round more than is measured: the last one is always evaluated, which the stock side does not do.
    run = Experiment(FederationSpec("echo"), rounds=rounds + 1, evaluate_every=rounds + 2, outlier=10.0)
    algorithm = Echo()
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(run, Path(folder), federation)
        worker._algorithm = algorithm
        marks: list[tuple[float, float]] = []
        Strategy(
            run, algorithm, federation, observer=lambda line, timing: marks.append((time.process_time(), spent[0]))
        ).run(InProcessGrid(client_app(worker), list(federation.sites)))
    return marks[-2][0] - marks[0][0], marks[-2][1] - marks[0][1]


def stock(clients: int, millions: float, rounds: int) -> tuple[float, float]:
    """Return CPU seconds of a run with Flower's FedAvg on Ray, and an estimate of the clients' steps in it."""
    import logging

    import numpy as np
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg

    warnings.simplefilter("ignore")
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    app, server = ClientApp(), ServerApp()

    @app.train()
    def train(message, context):
        arrays = {name: Array(array.numpy() + np.float32(1e-3)) for name, array in message.content["arrays"].items()}
        content = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1, "loss": 0.0})}
        return Message(RecordDict(content), reply_to=message)

    @server.main()
    def main(grid, context):
        model = {f"w{i}": Array(np.zeros(shape, np.float32)) for i, shape in enumerate(shapes(millions))}
        FedAvg(fraction_evaluate=0.0, min_evaluate_nodes=0).start(grid, ArrayRecord(model), num_rounds=rounds)

    run_simulation(server, app, num_supernodes=clients, backend_config={"client_resources": {"num_cpus": 1}})
    import ray

    ray.shutdown()
    values = [np.zeros(shape, np.float32) for shape in shapes(millions)]
    before = time.process_time()
    for value in values:
        _ = value + np.float32(1e-3)
    return cpu(), (time.process_time() - before) * clients * rounds


def floor(clients: int, millions: float) -> float:
    """Return CPU seconds of copying, checking and summing what one round brings."""
    import numpy as np

    model = [np.ones(shape, np.float32) for shape in shapes(millions)]
    total = [np.zeros_like(value) for value in model]
    before = time.process_time()
    for _ in range(clients):
        for value, place in zip(model, total, strict=True):
            copied = value.copy()
            assert np.isfinite(copied).all()
            place += copied
    return time.process_time() - before


def memory(algorithm: str, clients: int = 100, rounds: int = 50) -> None:
    """Print the resident memory after each round of a run whose clients train a small network."""
    from dataclasses import replace

    import torch
    from torch import nn

    from graftwork.federated.domains import Federation, FederationSpec
    from graftwork.federated.runs import Experiment
    from graftwork.federated.server import simulate
    from graftwork.merge.task import Task

    torch.set_num_threads(1)

    def task(name: str, seed: int) -> Task:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(40) % 10
        batch = (torch.randn(40, 64, generator=generator) + labels[:, None] / 3, labels)
        return Task(name, network, lambda: [batch], head="3")

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 10))

    sites = {f"s{i:03}": task(f"s{i:03}", i) for i in range(clients)}
    judge = replace(task("judge", clients), test=sites["s000"].batches)
    federation = Federation("memory", sites, judge, sites_are_judged=False)
    run = Experiment(FederationSpec("memory"), algorithm=algorithm, rounds=rounds, keep_rounds=1)
    page = os.sysconf("SC_PAGE_SIZE")
    held: list[float] = []

    def note(line, timing):
        held.append(int(Path("/proc/self/statm").read_text().split()[1]) * page / 1e6)
        print(f"round {line['round']:>3}  {held[-1]:8.1f} MB", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        simulate(run, Path(folder) / "run", federation=federation, observer=note)
    settled = held[4:]
    print(
        f"{algorithm}: after round 5 {settled[0]:.1f} MB, most {max(settled):.1f} MB, in the end {settled[-1]:.1f} MB"
    )


def measured(side: str, clients: int, millions: float) -> float:
    """Return CPU seconds per round without the clients' steps."""
    found = {FEW: 0.0}
    for rounds in (FEW, MANY) if side == "stock" else (MANY,):  # ours leaves out its first round itself
        command = [sys.executable, __file__, "--child", side, str(clients), str(millions), str(rounds)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        line = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not line:
            raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
        whole, steps = map(float, line[-1].split()[1:])
        found[rounds] = whole - steps
    return (found[MANY] - found[FEW]) / (MANY - FEW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", metavar="CLIENTSxMILLIONS")
    parser.add_argument("--without-ray", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--algorithm", default="scaffold", help="of --memory")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        side, clients, millions, rounds = arguments.child
        whole, steps = {"ours": ours, "stock": stock}[side](int(clients), float(millions), int(rounds))
        print(f"RESULT {whole} {steps}", flush=True)
        return
    if arguments.memory:
        memory(arguments.algorithm)
        return
    print(f"{'case':>12}  {'ours':>8}  {'Ray':>8}  {'floor':>8}  ours/Ray  ours/floor   (CPU seconds per round)")
    for case in arguments.case or ["10x0.1", "100x0.1", "1000x0.1", "10x1", "10x10"]:
        clients, millions = int(case.split("x")[0]), float(case.split("x")[1])
        mine, least = measured("ours", clients, millions), floor(clients, millions)
        theirs = float("nan") if arguments.without_ray else measured("stock", clients, millions)
        print(
            f"{case:>12}  {mine:8.3f}  {theirs:8.3f}  {least:8.3f}  {mine / theirs:8.2f}  {mine / least:10.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
