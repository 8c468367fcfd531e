"""Equations of FedProx, SCAFFOLD and FedBN against closed forms and float64 references."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftwork.federated.algorithms import create
from graftwork.federated.algorithms.base import Client, select
from graftwork.federated.domains import Federation, FederationSpec
from graftwork.federated.errors import FederationError
from graftwork.federated.grid import local_grid
from graftwork.federated.normalisation import batch_norm_names, recalibrate, recalibrated
from graftwork.federated.runs import Experiment
from graftwork.federated.strategy import Strategy
from graftwork.merge.task import Task

pytestmark = pytest.mark.flower


class Point(nn.Module):
    """A point w; its loss on an example (a, b) is a/2 · |w − b|²."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs[:, :1] / 2 * (self.w - inputs[:, 1:]).square()


def quadratic(curvature: float, centre: tuple[float, float]) -> Task:
    inputs = torch.tensor([[curvature, *centre]] * 4, dtype=torch.float64)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield inputs, torch.zeros(4, dtype=torch.int64)

    return Task(
        "quadratic", model=Point, batches=batches, test=batches, loss=lambda logits, labels: logits.sum(1).mean()
    )


def client(
    algorithm: str, task: Task, received: dict[str, Tensor], private: dict[str, Tensor], **settings: Any
) -> Client:
    return Client(
        site="a", task=task, algorithm=create(algorithm, settings), round=1, rounds=1, received=received, config={},
        private=private,
    )  # fmt: skip


START = torch.tensor([0.5, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_fedprox_descends_the_loss_with_the_proximal_term(mu: float) -> None:
    """On a quadratic K steps have a closed form: towards (a·b + mu·w₀)/(a + mu) by the factor (1 − η(a + mu))ᴷ."""
    curvature, centre, rate, steps = 2.0, torch.tensor([1.0, -1.0], dtype=torch.float64), 0.1, 5
    task = quadratic(curvature, (1.0, -1.0))
    given = client("fedprox", task, {"model/w": START}, {}, mu=mu, learning_rate=rate, local_steps=steps)
    found = given.algorithm.train(given).tensors["model/w"]
    goal = (curvature * centre + mu * START) / (curvature + mu)
    expected = goal + (1 - rate * (curvature + mu)) ** steps * (START - goal)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_scaffold_follows_its_equations() -> None:
    curvature, centre, rate, steps = 2.0, torch.tensor([1.0, -1.0], dtype=torch.float64), 0.1, 3
    common, own = torch.tensor([0.3, 0.1], dtype=torch.float64), torch.tensor([-0.2, 0.4], dtype=torch.float64)
    given = client(
        "scaffold", quadratic(curvature, (1.0, -1.0)), {"model/w": START, "control/w": common}, {"control/w": own},
        learning_rate=rate, local_steps=steps,
    )  # fmt: skip
    update = given.algorithm.train(given)
    y = START.clone()
    for _ in range(steps):
        y = y - rate * (curvature * (y - centre) - own + common)
    after = own - common + (START - y) / (steps * rate)
    assert update.private is not None
    torch.testing.assert_close(update.tensors["model/w"], y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(update.private["control/w"], after, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(update.tensors["control/w"], after - own, rtol=1e-12, atol=1e-12)


def run_quadratics(algorithm: str, private: Path, rounds: int, participation: float = 1.0, **settings: Any) -> Strategy:
    tasks = {"a": quadratic(4.0, (1.0, 0.0)), "b": quadratic(1.0, (-3.0, 2.0)), "c": quadratic(0.5, (5.0, 5.0))}
    run = Experiment(
        FederationSpec("quadratics"), algorithm=algorithm, rounds=rounds, settings=settings,
        participation=participation, evaluate_every=rounds, outlier=0,
    )  # fmt: skip
    strategy = Strategy(run, create(algorithm, settings), Federation("quadratics", tasks, None))
    strategy.run(local_grid(run, private, strategy.federation))
    return strategy


def test_scaffold_reaches_the_minimum_that_fedavg_misses(tmp_path: Path) -> None:
    """Of clients with different curvatures; with several local steps FedAvg's fixed point is elsewhere."""
    curvatures = torch.tensor([4.0, 1.0, 0.5], dtype=torch.float64)
    centres = torch.tensor([[1.0, 0.0], [-3.0, 2.0], [5.0, 5.0]], dtype=torch.float64)
    best = (curvatures[:, None] * centres).sum(0) / curvatures.sum()
    settings = {"learning_rate": 0.1, "local_steps": 5}
    scaffold = run_quadratics("scaffold", tmp_path / "a", 60, **settings).server
    fedavg = run_quadratics("fedavg", tmp_path / "b", 60, **settings).server
    assert float((scaffold.shared["model/w"] - best).norm()) < 1e-4
    assert float((fedavg.shared["model/w"] - best).norm()) > 0.1


def test_scaffolds_server_variate_is_the_mean_of_all_sites(tmp_path: Path) -> None:
    """Also of those that were not asked in the last round: c = (1/N) Σ cᵢ holds from the first round on."""
    from graftwork.federated.client import PrivateState

    strategy = run_quadratics("scaffold", tmp_path, 4, participation=0.67, learning_rate=0.05, local_steps=2)
    total = torch.zeros(2, dtype=torch.float64)
    for site in "abc":
        held, _ = PrivateState(tmp_path / site, strategy.experiment.identity).load(before=99)
        total += select(held, "control").get("w", torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(strategy.server.shared["control/w"], total / 3, rtol=1e-10, atol=1e-12)


def test_scaffold_refuses_optimisers_whose_steps_are_no_gradients() -> None:
    with pytest.raises(FederationError, match="plain sgd"):
        create("scaffold", {"optimiser": "adam"})


def test_a_wrapped_strategy_follows_flowers_own_equations(tmp_path: Path) -> None:
    """FedAvgM over two rounds: v ← βv + (x − mean), x ← x − v, in which the velocity has to survive the round."""
    settings = {"learning_rate": 0.1, "server_momentum": 0.5}
    models: list[Tensor] = []
    for rounds in (1, 2, 3):
        strategy = run_quadratics("fedavgm", tmp_path / str(rounds), rounds, **settings)
        models.append(strategy.server.shared["model/w"])
    curvatures, centres = (4.0, 1.0, 0.5), torch.tensor([[1.0, 0.0], [-3.0, 2.0], [5.0, 5.0]], dtype=torch.float64)
    x, velocity = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for found in models:
        mean = sum(x - 0.1 * a * (x - centre) for a, centre in zip(curvatures, centres, strict=True)) / 3
        velocity = 0.5 * velocity + (x - mean)
        x = x - velocity
        torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


class Block(nn.Module):
    """A residual block whose shortcut has a batch normalisation called `downsample.1`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.downsample = nn.Sequential(nn.Conv2d(1, 4, 1, stride=2), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.bn1(self.conv(x)) + self.downsample(x)).mean((2, 3)))


def image_task(name: str, seed: int) -> Task:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(20, 1, 6, 6, generator=generator) + seed
    labels = (inputs.mean((1, 2, 3)) > seed).long()
    return Task(name, model=Block, batches=lambda: iter([(inputs, labels)]), head="head")


def test_fedbn_keeps_batch_normalisation_inside_downsample_local(tmp_path: Path) -> None:
    names = batch_norm_names(Block())
    assert "downsample.1.running_mean" in names
    assert "downsample.0.weight" not in names
    run = Experiment(FederationSpec("images"), algorithm="fedbn", rounds=2)
    federation = Federation("images", {f"s{i}": image_task(f"s{i}", i) for i in range(3)}, None)
    strategy = Strategy(run, create("fedbn"), federation)
    strategy.run(local_grid(run, tmp_path, federation))
    assert not {name for name in strategy.server.shared if name.removeprefix("model/") in names}
    from graftwork.federated.client import PrivateState

    means = [
        PrivateState(tmp_path / site, run.identity).load(before=9)[0]["model/downsample.1.running_mean"]
        for site in federation.sites
    ]
    assert not torch.equal(means[0], means[1])


def test_fedbn_goes_on_from_the_batch_normalisation_of_the_round_before(tmp_path: Path) -> None:
    """The counter tells: it grows over rounds only if the state of the round before was loaded."""
    from graftwork.federated.client import PrivateState

    federation = Federation("images", {f"s{i}": image_task(f"s{i}", i) for i in range(2)}, None)
    run = Experiment(FederationSpec("images"), algorithm="fedbn", rounds=3, settings={"local_steps": 4})
    Strategy(run, create("fedbn", run.settings), federation).run(local_grid(run, tmp_path, federation))
    held, _ = PrivateState(tmp_path / "s0", run.identity).load(before=9)
    assert held["model/bn1.num_batches_tracked"].item() == 12


def test_recalibration_takes_the_statistics_of_the_inputs() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.BatchNorm1d(3))
    inputs = torch.randn(100, 3) * 4 + 2
    recalibrate(module, inputs)
    torch.testing.assert_close(module[0].running_mean, inputs.mean(0))
    torch.testing.assert_close(module[0].running_var, inputs.var(0))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with recalibrated(module, inputs - 7):
        assert not torch.equal(module[0].running_mean, before["0.running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_settings_report_every_problem_at_once() -> None:
    with pytest.raises(FederationError) as caught:
        create("fedprox", {"mu": "much", "learning_rat": 1, "optimiser": "lion"})
    assert len(caught.value.problems) == 3
    assert 'did you mean "learning_rate"?' in str(caught.value)
    with pytest.raises(FederationError, match="mu is -1"):
        create("fedprox", {"mu": "-1"})
    with pytest.raises(FederationError, match='did you mean "fedprox"'):
        create("fedpox")
