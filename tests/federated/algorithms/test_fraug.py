"""FRAug: prototypes, losses, what each step changes, and what stays at a site."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graftwork.federated.algorithms import create
from graftwork.federated.algorithms.base import Client, Server, prefixed
from graftwork.federated.algorithms.fraug import (
    FRAug,
    Generator,
    Residual,
    _Site,
    balanced_labels,
    distance,
    mean_entropy,
    nonsaturating,
    synthetic_share,
    update_prototypes,
)
from graftwork.federated.discrepancy import mk_mmd
from graftwork.federated.errors import FederationError
from graftwork.merge.task import Task

CLASSES = 3

# ---------------------------------------------------------------------------------------------------------------------
# Prototypes and parts of losses


def test_a_prototype_starts_with_the_first_mean_and_then_moves() -> None:
    prototypes, seen = torch.zeros(3, 2), torch.zeros(3, dtype=torch.bool)
    first = torch.tensor([[1.0, 2.0], [3.0, 4.0], [10.0, 0.0]])
    prototypes, seen = update_prototypes(prototypes, seen, first, torch.tensor([0, 0, 1]), 0.3)
    assert prototypes.tolist() == [[2, 3], [10, 0], [0, 0]]
    assert seen.tolist() == [True, True, False]
    prototypes, seen = update_prototypes(prototypes, seen, torch.tensor([[4.0, 3.0]]), torch.tensor([0]), 0.3)
    torch.testing.assert_close(prototypes, torch.tensor([[2.6, 3.0], [10.0, 0.0], [0.0, 0.0]]))
    assert seen.tolist() == [True, True, False]


def test_the_published_prototype_starts_from_zero() -> None:
    prototypes, _ = update_prototypes(
        torch.zeros(2, 1), torch.zeros(2, dtype=torch.bool), torch.tensor([[10.0]]), torch.tensor([1]), 0.3, "zero"
    )
    torch.testing.assert_close(prototypes, torch.tensor([[0.0], [3.0]]))


def test_the_schedule_is_as_published() -> None:
    # 300 rounds: γ = 0.002 gives one half in every round, γ = 0.01 grows from 0.05 and is cut at round 231.
    assert synthetic_share(0, 300, 0.5, 0.002) == 0.5
    assert synthetic_share(0, 300, 0.5, 0.01) == pytest.approx(math.exp(-3))
    assert synthetic_share(230, 300, 0.5, 0.01) < 0.5 == synthetic_share(231, 300, 0.5, 0.01)
    assert synthetic_share(3, 40, 0.4, 0.0) == 0.4


def test_entropy_and_its_alternative_are_their_definitions() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0])
    p = np.exp(logits.numpy())
    p /= p.sum(1, keepdims=True)
    assert float(mean_entropy(logits)) == pytest.approx(float(-(p * np.log(p)).sum(1).mean()))
    assert float(mean_entropy(torch.zeros(2, 4))) == pytest.approx(math.log(4))
    assert float(nonsaturating(logits, labels)) == pytest.approx(float(np.log(1 - p[range(5), labels]).mean()))
    assert math.isfinite(float(nonsaturating(torch.tensor([[100.0, -100.0]]), torch.tensor([0]))))


def test_distances_are_mk_mmd_and_the_mean_square() -> None:
    first, second = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.equal(distance("mmd", first, second), mk_mmd(first, second))
    assert float(distance("l2", first, second)) == pytest.approx(float(((first - second) ** 2).mean()))


def test_balanced_labels_go_through_the_classes_in_turn() -> None:
    assert balanced_labels(torch.tensor([1, 4, 5]), 7, 2).tolist() == [5, 1, 4, 5, 1, 4, 5]


def test_networks_have_the_published_sizes() -> None:
    generator, residual = Generator(512, 10, 256), Residual(512, 10, 256, 0.1)
    assert sum(parameter.numel() for parameter in generator.parameters()) == 401_408
    assert sum(parameter.numel() for parameter in residual.parameters()) == 267_008


def test_first_residuals_are_as_small_as_the_last_layer_says() -> None:
    norms = []
    for start in (0.1, 1.0):
        torch.manual_seed(0)
        residual = Residual(64, CLASSES, 32, start)
        residual.train()
        made = residual(torch.randn(200, 64), torch.arange(200) % CLASSES)
        norms.append(float(made.detach().norm(dim=1).mean()))
    assert norms[1] == pytest.approx(8, rel=0.1)
    assert norms[0] == pytest.approx(0.1 * norms[1], rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# At a site


class Network(nn.Module):
    """Four inputs to an embedding of eight, with batch normalisation by another name, to three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(inputs))
        return found


CENTRES = torch.tensor([[2.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0]])


def data(count: int, seed: int, classes: int = CLASSES, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    return CENTRES[labels] + 0.6 * torch.randn(count, 4, generator=generator) + shift, labels


def task(inputs: Tensor, labels: Tensor) -> Task:
    return Task("site", Network, batches=lambda: [(inputs, labels)], test=lambda: [(inputs, labels)], head="head")


def fraug(preset: str = "fraug", **given: Any) -> FRAug:
    made = create(preset, {"batch_size": 12, "local_steps": 4, **given})
    assert isinstance(made, FRAug)
    return made


def server_of(algorithm: FRAug, given: Task) -> Server:
    torch.manual_seed(0)
    state = Network().state_dict()
    local = algorithm.local_names(Network(), "head")
    shared = prefixed("model", {name: value for name, value in state.items() if name not in local})

    def none(*_: Any, **__: Any) -> Any:
        raise AssertionError("FRAug asks nothing")

    server = Server(
        algorithm, given, False, ("a",), 4, 0, dict(shared), {}, {}, dict(state), lambda _: True, none, none
    )
    algorithm.start(server)
    return server


def client_of(
    algorithm: FRAug,
    server: Server,
    given: Task,
    round: int = 1,
    private: dict[str, Tensor] | None = None,
    last: int = -1,
) -> Client:
    return Client("a", given, algorithm, round, 4, dict(server.shared), {}, dict(private or {}), last)


SITE = task(*data(48, 1))


def site_of(algorithm: FRAug, given: Task = SITE, **options: Any) -> _Site:
    server = server_of(algorithm, given)
    return _Site(algorithm, client_of(algorithm, server, given, **options))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}


def test_only_batch_normalisation_stays_at_the_site_and_only_the_generator_joins_the_model() -> None:
    algorithm = fraug()
    server = server_of(algorithm, SITE)
    assert {name for name in server.shared if name.startswith("model/")} == {
        "model/body.0.weight", "model/body.0.bias", "model/head.weight", "model/head.bias",
    }  # fmt: skip
    update = algorithm.train(client_of(algorithm, server, SITE))
    assert set(update.tensors) == set(algorithm.expected(server, server.shared))
    groups = {name.partition("/")[0] for name in update.private or {}}
    assert groups == {"model", "residual", "prototypes", "seen"}
    assert "model/body.1.running_mean" in (update.private or {})
    local = fraug(generator_norm="local")
    server = server_of(local, SITE)
    assert "generator/layers.1.weight" not in server.shared
    update = local.train(client_of(local, server, SITE))
    assert "generator/layers.1.running_mean" in (update.private or {})
    again = _Site(local, client_of(local, server, SITE, 2, dict(update.private or {}), 1))
    assert torch.equal(
        again.generator.state_dict()["layers.1.running_mean"], (update.private or {})["generator/layers.1.running_mean"]
    )


def test_the_synthetic_part_of_the_loss_has_no_gradient_below_the_head() -> None:
    gradients = []
    for weight in (0.0, 0.5):
        site = site_of(fraug(synthetic_weight=weight, clip=0.0, learning_rate=0.0))
        batch = site.client.examples.take(slice(0, 12))
        site._classifier_step(batch, True)
        gradients.append({name: p.grad.clone() for name, p in site.module.named_parameters() if p.grad is not None})
    assert torch.equal(gradients[0]["body.0.weight"], gradients[1]["body.0.weight"])
    assert not torch.equal(gradients[0]["head.weight"], gradients[1]["head.weight"])


def test_each_step_changes_its_own_network_alone() -> None:
    site = site_of(fraug())
    batch = site.client.examples.take(slice(0, 12))
    networks = {"model": site.module, "generator": site.generator, "residual": site.residual}
    before = {name: snapshot(module) for name, module in networks.items()}
    site._classifier_step(batch, True)
    assert changed(before["model"], site.module)
    assert not changed(before["generator"], site.generator)
    assert not changed(before["residual"], site.residual)
    site.module.eval()
    embeddings = site.module.body(batch.inputs).detach()
    before = {name: snapshot(module) for name, module in networks.items()}
    site._generator_step(embeddings, batch.labels)
    assert changed(before["generator"], site.generator)
    assert not changed(before["model"], site.module)
    assert not changed(before["residual"], site.residual)
    before = {name: snapshot(module) for name, module in networks.items()}
    site._residual_step(embeddings, batch.labels, batch.labels)
    assert changed(before["residual"], site.residual)
    assert not changed(before["model"], site.module)
    assert not changed(before["generator"], site.generator)


def test_convex_weights_take_from_the_real_loss_and_sums_do_not() -> None:
    found = {}
    for combine in ("sum", "convex"):
        site = site_of(fraug(combine=combine, clip=0.0, learning_rate=0.0))
        site._classifier_step(site.client.examples.take(slice(0, 12)), True)
        found[combine] = site.module.body[0].weight.grad.clone()  # type: ignore[index, union-attr, operator]
    torch.testing.assert_close(found["convex"], 0.5 * found["sum"])


def test_classes_never_seen_are_not_sampled() -> None:
    given = task(*data(48, 2, classes=2))
    site = site_of(fraug(), given)
    assert site._labels(10) is None
    site._step(site.client.examples.take(slice(0, 12)))
    assert set(site._labels(10).tolist()) == {0, 1}  # type: ignore[union-attr]
    assert site.prototypes[2].abs().sum() == 0
    published = site_of(fraug("fraug-paper"), given)
    assert set(published._labels(10).tolist()) == {0, 1, 2}  # type: ignore[union-attr]


def test_synthetic_embeddings_stay_above_zero_only_where_real_ones_do() -> None:
    site = site_of(fraug(residual_start=5.0))
    real = torch.rand(12, 8)
    assert all(bool((made >= 0).all()) for made, _ in site._synthetic(real, torch.arange(12) % 3))
    assert any(bool((made < 0).any()) for made, _ in site._synthetic(real - 0.5, torch.arange(12) % 3))
    free = site_of(fraug(residual_start=5.0, clamp=False))
    assert any(bool((made < 0).any()) for made, _ in free._synthetic(real, torch.arange(12) % 3))


@pytest.mark.parametrize(
    "switches",
    [{"use_residual": False}, {"use_batch": False}, {"use_prototypes": False}, {"train_generator": False},
     {"use_batch": False, "use_prototypes": False}, {"residual_objective": "nonsaturating"}, {"interpolate": True},
     {"generator_distance": "l2", "residual_distance": "l2"}, {"latent_distribution": "uniform", "latent": 3},
     {"warm_up": 1}, {"optimiser": "adam", "learning_rate": 0.01}],
)  # fmt: skip
def test_every_switch_trains(switches: dict[str, Any]) -> None:
    algorithm = fraug(**switches)
    server = server_of(algorithm, SITE)
    update = algorithm.train(client_of(algorithm, server, SITE))
    assert all(bool(torch.isfinite(value).all()) for value in update.tensors.values())
    moved = not torch.equal(update.tensors["generator/layers.0.weight"], server.shared["generator/layers.0.weight"])
    assert moved == ("train_generator" not in switches and "warm_up" not in switches)


def test_gradients_are_clipped() -> None:
    site = site_of(fraug(clip=0.001, learning_rate=1.0, momentum=0.0))
    before = snapshot(site.module)
    site._classifier_step(site.client.examples.take(slice(0, 12)), True)
    names = dict(site.module.named_parameters())
    moved = math.sqrt(sum(float(((before[name] - value.detach()) ** 2).sum()) for name, value in names.items()))
    assert moved == pytest.approx(0.001, rel=1e-3)


def test_state_comes_back_and_its_loss_is_a_cold_start() -> None:
    algorithm = fraug()
    server = server_of(algorithm, SITE)
    private = dict(algorithm.train(client_of(algorithm, server, SITE)).private or {})
    warm = _Site(algorithm, client_of(algorithm, server, SITE, 2, private, 1))
    assert torch.equal(warm.prototypes, private["prototypes"])
    assert torch.equal(warm.module.state_dict()["body.1.running_mean"], private["model/body.1.running_mean"])
    assert torch.equal(warm.residual.state_dict()["layers.0.weight"], private["residual/layers.0.weight"])
    cold = algorithm.train(client_of(algorithm, server, SITE, 3))
    assert all(bool(torch.isfinite(value).all()) for value in cold.tensors.values())


def test_after_missed_rounds_prototypes_are_measured_anew() -> None:
    algorithm = fraug(learning_rate=0.0, prototype_momentum=0.0)
    server = server_of(algorithm, SITE)
    private = dict(algorithm.train(client_of(algorithm, server, SITE)).private or {})
    private["prototypes"] = torch.full_like(private["prototypes"], 99)
    private["model/body.1.running_mean"] = torch.full_like(private["model/body.1.running_mean"], 99)
    next_round = _Site(algorithm, client_of(algorithm, server, SITE, 2, private, 1))
    next_round._wake()
    assert float(next_round.prototypes.max()) == 99
    later = _Site(algorithm, client_of(algorithm, server, SITE, 4, private, 1))
    later._wake()
    assert float(later.prototypes.max()) < 10
    examples = later.client.examples
    embeddings = later.module.body(examples.inputs).detach()
    torch.testing.assert_close(later.prototypes[1], embeddings[examples.labels == 1].mean(0))


def test_a_diverged_update_is_an_error_before_anything_is_kept() -> None:
    algorithm = fraug(learning_rate=1e30, clip=0.0)
    server = server_of(algorithm, SITE)
    with pytest.raises(FederationError, match=r'site "a" diverged: .* lower learning_rate'):
        algorithm.train(client_of(algorithm, server, SITE))


def test_one_example_is_too_few_to_learn_from() -> None:
    algorithm = fraug()
    alone = task(*data(1, 0))
    server = server_of(algorithm, alone)
    update = algorithm.train(client_of(algorithm, server, alone))
    assert all(torch.equal(value, server.shared[name]) for name, value in update.tensors.items())


def test_a_learning_rate_of_zero_returns_what_was_sent() -> None:
    algorithm = fraug(learning_rate=0.0, generator_rate=0.0, residual_rate=0.0)
    server = server_of(algorithm, SITE)
    update = algorithm.train(client_of(algorithm, server, SITE))
    for name, value in update.tensors.items():
        if "running" not in name:
            assert torch.equal(value, server.shared[name]), name


def test_equal_seeds_give_equal_updates() -> None:
    one, other = (
        algorithm.train(client_of(algorithm, server_of(algorithm, SITE), SITE)) for algorithm in (fraug(), fraug())
    )
    assert all(torch.equal(value, other.tensors[name]) for name, value in one.tensors.items())
    assert all(torch.equal(value, (other.private or {})[name]) for name, value in (one.private or {}).items())


def test_a_site_learns_and_is_judged_with_its_own_batch_normalisation() -> None:
    algorithm = fraug(local_steps=15)
    given = task(*data(60, 5, shift=3.0))
    server = server_of(algorithm, given)
    private: dict[str, Tensor] = {}
    for round in range(1, 4):
        update = algorithm.train(client_of(algorithm, server, given, round, private, round - 1))
        private = dict(update.private or {})
        server.shared.update(update.tensors)
    judged = algorithm.evaluate(client_of(algorithm, server, given, 3, private, 3))
    assert judged.metrics["accuracy"] > 0.9
    without = {name: value for name, value in private.items() if not name.startswith("model/")}
    foreign = algorithm.evaluate(client_of(algorithm, server, given, 3, without, 3))
    assert foreign.metrics["accuracy"] < judged.metrics["accuracy"]


def test_a_task_without_a_head_is_refused() -> None:
    headless = Task("site", Network, batches=lambda: [])
    algorithm = fraug()
    server = Server(
        algorithm, headless, False, (), 1, 0, {}, {}, {}, Network().state_dict(), lambda _: True, None, None  # type: ignore[arg-type]
    )  # fmt: skip
    assert "names no head" in algorithm.check(server)[0]
