"""Tests of differential privacy: what is clipped, what the noise is, what is refused, and what it adds up to."""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from graftwork.federated.aggregation.operator import Round
from graftwork.federated.algorithms import create
from graftwork.federated.algorithms.base import Update, select
from graftwork.federated.errors import FederationError
from graftwork.federated.grid import local_grid
from graftwork.federated.messages import raw_of
from graftwork.federated.privacy import ClippedMean, epsilon, gaussian, operator_for
from graftwork.federated.server import simulate
from graftwork.federated.strategy import Strategy
from graftwork.merge.errors import DependencyError
from tests.federated.toys import FaultyGrid, experiment, toy_federation

pytestmark = pytest.mark.flower

HAS_ACCOUNTANT = importlib.util.find_spec("dp_accounting") is not None
needs_accountant = pytest.mark.skipif(not HAS_ACCOUNTANT, reason="needs dp-accounting, in graftwork[privacy]")


def entropy(seed: int) -> Callable[[int], bytes]:
    return random.Random(seed).randbytes


def private(algorithm: str = "fedbn", **more: Any) -> Any:
    chosen = {"clip_norm": 0.1, "noise_multiplier": 1.0, "rounds": 1, **more}
    return experiment(algorithm, **chosen)


def merged(run: Any, base: dict[str, torch.Tensor], replies: list[dict[str, torch.Tensor]], seed: int = 0) -> Any:
    """Return what the operator makes of replies of as many sites."""
    strategy = Strategy(experiment("fedbn"), create("fedbn"), toy_federation(len(replies)))
    operator = operator_for(run, entropy(seed))
    assert isinstance(operator, ClippedMean)
    raws = [{name: raw_of(value) for name, value in reply.items()} for reply in replies]
    sites = [f"s{i}" for i in range(len(replies))]
    return operator.merge(
        Round(
            strategy.server, sites, raws, list(base), {name: raw_of(value) for name, value in base.items()},
            [1.0] * len(replies), lambda name: False,
        )
    )  # fmt: skip


def model(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model/a": (30, 7), "model/b": (5,)}
    return {name: (scale * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}


def length(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in tensors.values()))


def test_changes_are_clipped_over_all_weights_together_and_short_ones_are_not() -> None:
    base, changes = model(0), [model(1), model(2, 1e-3), model(3, 0.0)]
    replies = [{name: base[name] + change[name] for name in base} for change in changes]
    found = merged(private(clip_norm=0.5, noise_multiplier=0.0), base, replies)
    lengths = [length({n: reply[n].double() - base[n].double() for n in base}) for reply in replies]
    assert lengths[0] > 0.5 > lengths[1]
    for name in base:
        origin = base[name].double()
        expected = origin + sum(
            min(1.0, 0.5 / long if long else 1.0) * (reply[name].double() - origin) / 3
            for long, reply in zip(lengths, replies, strict=True)
        )
        torch.testing.assert_close(found[name], expected.float(), rtol=1e-6, atol=1e-7)


def test_one_site_more_moves_the_noisy_sum_by_no_more_than_the_clipping_norm() -> None:
    """With the same noise, whatever the site sends, and though the number of answers changes."""
    base = model(0)
    honest = [{name: base[name] + model(i, 0.01)[name] for name in base} for i in (1, 2, 3)]
    run = private(clip_norm=0.2)
    for odd in (model(9, 1e6), model(9, 1e-9), base):
        with_it = merged(run, base, [*honest, odd], seed=7)
        absent = merged(run, base, [*honest, base], seed=7)  # an absent site adds nothing to the sum of four
        assert length({n: 4 * (with_it[n].double() - absent[n].double()) for n in base}) <= 0.2 * (1 + 1e-4)


def test_noise_has_the_deviation_that_is_accounted_for_and_another_value_each_time() -> None:
    base = {"model/a": torch.zeros(300, 300)}
    run = private(clip_norm=0.5, noise_multiplier=2.0)
    found = merged(run, base, [base] * 4)["model/a"].double().reshape(-1)
    assert found.std().item() == pytest.approx(2.0 * 0.5 / 4, rel=0.02)
    assert abs(found.mean().item()) < 4 * 0.25 / 300
    operator = operator_for(run)
    assert isinstance(operator, ClippedMean)
    first, second = gaussian(100, operator.entropy), gaussian(100, operator.entropy)
    assert not np.array_equal(first, second)


def test_a_quantile_of_the_noise_is_that_of_the_normal_distribution() -> None:
    drawn = np.sort(gaussian(200_000, entropy(1)))
    for share in (0.001, 0.05, 0.5, 0.95, 0.999):
        error = 5 * math.sqrt(share * (1 - share) / drawn.size) / norm.pdf(norm.ppf(share))
        assert drawn[int(share * drawn.size)] == pytest.approx(norm.ppf(share), abs=error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_site_sends_no_more_than_the_clipping_norm(dtype: torch.dtype, tmp_path: Path) -> None:
    federation, run = toy_federation(3), experiment("fedbn", rounds=1, clip_norm=0.05)
    seen: dict[str, float] = {}
    strategy = Strategy(run, create(run.algorithm, run.settings), federation)
    original, before = strategy.algorithm.aggregate, {n: v.clone() for n, v in strategy.server.shared.items()}

    def watch(server: Any, replies: Any) -> None:
        for reply in replies:
            seen[reply.site] = length({n: v.double() - before[n].double() for n, v in reply.tensors.items()})
        original(server, replies)

    strategy.algorithm.aggregate = watch  # type: ignore[method-assign]
    with local_grid(run, tmp_path, federation) as grid:
        strategy.run(grid)
    assert len(seen) == 3
    assert all(0.04 < long < 0.05 * (1 + 1e-5) for long in seen.values())
    # Half precision is clipped as the numbers it stands for, and within its own rounding.
    update = Update({"model/neck.0.weight": torch.full((4, 8), 3.0, dtype=dtype)}, 1.0)
    client: Any = type("Client", (), {})()
    client.received = {"model/neck.0.weight": torch.ones(4, 8, dtype=dtype)}
    client.module = federation.sites["s0"].model
    operator = operator_for(run)
    clipped = operator.after_training(client, update).tensors["model/neck.0.weight"]
    assert clipped.dtype == dtype
    assert clipped.float().mean().item() == pytest.approx(1 + 0.05 / math.sqrt(32), abs=2**-7)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (private("fedavg"), "running statistics of batch normalisation"),
        (private("scaffold"), "averages more than the model"),
        (private("fraug"), "averages more than the model"),
        (private("fedka"), "learns from single sites"),
        (private("ggeur"), "learns from single sites"),
        (private("fedadam"), "has its own way to aggregate"),
        (private("local"), "no site sends a model"),
        (private(aggregate="median"), "goes with the mean"),
        (private(settings={"weights": "examples"}), "have to weigh the same"),
        (private(keep_sites=True), "--keep-sites would keep what the noise is to hide"),
    ],
    ids=lambda value: "" if isinstance(value, str) else f"{value.algorithm} {value.aggregate}",
)
def test_what_cannot_be_private_is_refused_before_anything_is_sent(run: Any, reason: str, tmp_path: Path) -> None:
    federation = toy_federation()
    strategy = Strategy(run, create(run.algorithm, run.settings), federation)
    with local_grid(run, tmp_path, federation) as grid, pytest.raises(FederationError) as caught:
        strategy.run(grid)
    assert any(reason in problem for problem in caught.value.problems)
    assert not list(tmp_path.iterdir())


def test_noise_needs_a_clipping_norm() -> None:
    with pytest.raises(FederationError, match="noise_multiplier needs clip_norm"):
        experiment(noise_multiplier=1.0)


def test_without_the_accountant_a_run_with_noise_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "dp_accounting" else find(name)
    )
    with pytest.raises(DependencyError, match=r'pip install "graftwork\[privacy\]"'):
        simulate(private(), tmp_path / "run", federation=toy_federation())


def test_clipping_alone_changes_nothing_that_is_below_it(tmp_path: Path) -> None:
    """Nor does it go round running statistics, which are averaged as they are."""
    federation = toy_federation(3)
    plain = simulate(experiment(rounds=2), federation=federation)
    clipped = simulate(experiment(rounds=2, clip_norm=1e3), federation=federation)
    for name, value in plain.model.items():
        torch.testing.assert_close(clipped.model[name], value, rtol=1e-5, atol=1e-6)
    assert clipped.summary["privacy"] == {"clip_norm": 1e3}


def exact_epsilon(noise: float, delta: float, releases: int) -> float:
    """Return the tight ε of composed Gaussian mechanisms (Balle and Wang 2018, theorem 8), for sensitivity 1."""
    deviation = noise / math.sqrt(releases)

    def excess(value: float) -> float:
        a, b = 0.5 / deviation, value * deviation
        return float(norm.cdf(a - b) - math.exp(value) * norm.cdf(-a - b)) - delta

    return float(brentq(excess, 0.0, 200.0))


@needs_accountant
@pytest.mark.parametrize(("noise", "releases"), [(1.0, 1), (1.0, 10), (4.0, 100), (0.8, 3)])
def test_epsilon_lies_above_the_tight_one_and_below_the_textbook_bound(noise: float, releases: int) -> None:
    found = epsilon(noise, 1e-5, releases)
    rho = releases / (2 * noise**2)
    assert exact_epsilon(noise, 1e-5, releases) <= found <= rho + 2 * math.sqrt(rho * math.log(1e5))


@needs_accountant
def test_a_private_run_says_what_was_spent_and_what_a_resumed_one_spends_besides(tmp_path: Path) -> None:
    federation = toy_federation(4)
    run = private(rounds=2, clip_norm=0.5, noise_multiplier=2.0)
    outcome = simulate(run, tmp_path / "run", federation=federation)
    assert [line["epsilon"] for line in outcome.lines] == [epsilon(2.0, 1e-5, 1), epsilon(2.0, 1e-5, 2)]
    assert outcome.summary["privacy"] == {
        "epsilon": epsilon(2.0, 1e-5, 2), "delta": 1e-5, "unit": "site", "releases": 2, "clip_norm": 0.5,
        "noise_multiplier": 2.0, "sites_per_round": 4,
    }  # fmt: skip
    other = simulate(run, federation=federation)
    names = select(outcome.shared, "model")
    assert all(not torch.equal(outcome.shared[f"model/{n}"], other.shared[f"model/{n}"]) for n in names)
    longer = private(rounds=3, clip_norm=0.5, noise_multiplier=2.0)
    resumed = simulate(longer, tmp_path / "run", federation=federation, resume=True)
    assert resumed.summary["privacy"]["releases"] == 3


@needs_accountant
def test_a_site_that_fails_leaves_the_noise_as_it_was(tmp_path: Path) -> None:
    """The sum is divided by the number of those that were asked, not by that of those that answered."""
    federation = toy_federation(4)
    run = private(clip_norm=1e-9, noise_multiplier=1.0)
    strategy = Strategy(run, create(run.algorithm, run.settings), federation)
    assert isinstance(strategy.operator, ClippedMean)
    drawn: list[int] = []
    strategy.operator.entropy = lambda count: drawn.append(count) or entropy(0)(count)  # type: ignore[func-returns-value]
    before = {name: value.clone() for name, value in strategy.server.shared.items()}
    outcome = strategy.run(FaultyGrid(run, tmp_path, federation, {"s1": "crash"}))
    assert outcome.lines[0]["answered"] == 3
    assert drawn
    moved = torch.cat([(outcome.shared[n] - before[n]).reshape(-1) for n in before if "head" in n])
    assert moved.abs().max() < 1e-8


def test_noisy_statistics_of_ggeur_say_what_they_cost() -> None:
    settings = {"statistics": "noisy", "noise_multiplier": 4.0, "clip_embeddings": 2.0}
    outcome = simulate(experiment("ggeur", rounds=1, settings=settings), federation=toy_federation())
    found = outcome.summary["privacy"]["statistics"]
    rho = 3 / (2 * 4.0**2)
    assert found["epsilon"] == pytest.approx(rho + 2 * math.sqrt(rho * math.log(1e5)))
    assert found["unit"] == "example"
