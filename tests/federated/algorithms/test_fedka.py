"""FedKA: discrepancy, reversed gradients, votes, the server's half, and what sites are shown of the target."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graftwork.federated.adversary import Disentangler, domain_loss, ramp, reverse_gradient
from graftwork.federated.algorithms import create
from graftwork.federated.algorithms.base import Client, Reply, Server, Update, prefixed, select
from graftwork.federated.algorithms.fedka import FedKA, group_effect
from graftwork.federated.discrepancy import mk_mmd
from graftwork.federated.embedding import embed, features_of, linear_sizes, with_features
from graftwork.federated.errors import FederationError
from graftwork.federated.voting import count_votes
from graftwork.merge.task import Task

# ---------------------------------------------------------------------------------------------------------------------
# MK-MMD


def mk_mmd_by_double_sum(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    """Return the published estimate, pair by pair in float64, generalised to sets of different sizes."""
    points = np.concatenate([first, second]).astype(np.float64)
    n = len(points)
    distances = np.array([[float(((a - b) ** 2).sum()) for b in points] for a in points])
    base = distances.sum() / (n * n - n) / 2.0 ** (5 // 2)

    def kernel(i: int, j: int) -> float:
        return sum(math.exp(-distances[i, j] / (base * 2.0**u)) for u in range(5))

    sources, targets = range(len(first)), range(len(first), n)

    def mean(left: range, right: range) -> float:
        return sum(kernel(i, j) for i in left for j in right) / (len(left) * len(right))

    return mean(sources, sources) + mean(targets, targets) - mean(sources, targets) - mean(targets, sources)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("m", "n"), [(8, 8), (5, 11), (1, 3), (1, 1)])
def test_mk_mmd_is_the_double_sum(m: int, n: int) -> None:
    first, second = normal(m, 6), normal(n, 6, seed=1) * 1.5 + 0.5
    assert float(mk_mmd(first, second)) == pytest.approx(mk_mmd_by_double_sum(first.numpy(), second.numpy()), abs=1e-12)
    single = mk_mmd(first.float() + 100, second.float() + 100)
    assert float(single) == pytest.approx(mk_mmd_by_double_sum(first.numpy(), second.numpy()), abs=2e-4)


def test_mk_mmd_is_zero_for_equal_sets_symmetric_and_at_most_ten() -> None:
    first, second = normal(7, 4), normal(9, 4, seed=1)
    assert float(mk_mmd(first, first.clone())) == pytest.approx(0, abs=1e-12)
    assert float(mk_mmd(first, second)) == pytest.approx(float(mk_mmd(second, first)), abs=1e-12)
    assert float(mk_mmd(first, second)) >= 0
    # Two points: their distance is the bandwidth, however far they are.
    far = mk_mmd(torch.zeros(400, 2), torch.full((400, 2), 1e6))
    assert 0 < float(far) <= 10
    assert float(mk_mmd(first + 3, second + 3)) == pytest.approx(float(mk_mmd(first, second)), abs=1e-10)


def test_mk_mmd_of_constant_features_is_zero_with_a_finite_gradient() -> None:
    features = torch.ones(4, 3, requires_grad=True)
    value = mk_mmd(features, torch.ones(5, 3))
    value.backward()
    assert float(value.detach()) == 0
    assert features.grad is not None
    assert not bool(features.grad.any())


def test_the_bandwidth_counts_as_a_constant_in_the_gradient() -> None:
    first, second = normal(4, 3).requires_grad_(), normal(5, 3, seed=1)
    mk_mmd(first, second).backward()
    points = torch.cat([first.detach(), second])
    squares = torch.cdist(points, points) ** 2
    bandwidth = squares.sum() / (81 - 9) / 4

    def held(moved: Tensor) -> Tensor:
        every = torch.cat([moved, second])
        squares = ((every[:, None] - every[None]) ** 2).sum(2)
        total = sum((torch.exp(-squares / (bandwidth * 2.0**u)) for u in range(5)), torch.zeros(9, 9))
        return total[:4, :4].mean() + total[4:, 4:].mean() - 2 * total[:4, 4:].mean()

    step = 1e-6
    for i, j in ((0, 0), (3, 2)):
        up, down = first.detach().clone(), first.detach().clone()
        up[i, j] += step
        down[i, j] -= step
        assert first.grad is not None
        assert float(first.grad[i, j]) == pytest.approx(float(held(up) - held(down)) / (2 * step), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Reversal


def test_the_reversed_gradient_is_minus_alpha_times_the_gradient() -> None:
    features = normal(3, 4).requires_grad_()
    given = normal(3, 4, seed=1)
    result = reverse_gradient(features, 0.7)
    assert torch.equal(result, features)
    result.backward(given)
    assert features.grad is not None
    torch.testing.assert_close(features.grad, -0.7 * given)


def test_the_strength_grows_from_zero_as_written() -> None:
    assert ramp(0) == 0
    assert ramp(1) == pytest.approx(2 / (1 + math.exp(-5)) - 1) == pytest.approx(0.98661, abs=1e-5)
    assert ramp(0.5, 10) == pytest.approx(ramp(1, 5))


def test_the_extractor_climbs_and_the_discriminator_descends() -> None:
    torch.manual_seed(0)
    disentangler = Disentangler(4, 8).double()
    source, target = normal(6, 4).requires_grad_(), normal(5, 4, seed=1) + 1
    loss, recognised = domain_loss(disentangler, source, target, 0.3)
    assert 0 <= float(recognised) <= 1
    loss.backward()
    plain = source.detach().clone().requires_grad_()
    again = Disentangler(4, 8).double()
    again.load_state_dict(disentangler.state_dict())
    of_source, of_target = again(plain), again(target)
    reference = nn.functional.cross_entropy(of_source, torch.zeros(6, dtype=torch.int64)) + nn.functional.cross_entropy(
        of_target, torch.ones(5, dtype=torch.int64)
    )
    assert float(loss.detach()) == pytest.approx(float(reference.detach()))
    reference.backward()
    assert source.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(source.grad, -0.3 * plain.grad)
    for own, other in zip(disentangler.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)


# ---------------------------------------------------------------------------------------------------------------------
# Votes


def test_the_most_votes_win() -> None:
    probabilities = torch.tensor([[[0.9, 0.1, 0.0]], [[0.2, 0.8, 0.0]], [[0.4, 0.6, 0.0]]])
    ballot = count_votes(probabilities)
    assert ballot.labels.tolist() == [1]
    assert ballot.agreement.tolist() == [2 / 3]


def test_ties_go_to_the_larger_mean_probability_and_then_to_the_smaller_class() -> None:
    # One vote each for 0 and 2; class 2 has the larger mean. The most probable class on average, 1, has no vote.
    tie = torch.tensor([[[0.5, 0.45, 0.05]], [[0.0, 0.45, 0.55]]])
    assert count_votes(tie).labels.tolist() == [2]
    exact = torch.tensor([[[0.25, 0.5, 0.25]], [[0.25, 0.25, 0.5]]])
    assert count_votes(exact).labels.tolist() == [1]
    assert count_votes(exact.flip(0)).labels.tolist() == [1]
    assert count_votes(torch.full((2, 1, 4), 0.25)).labels.tolist() == [0]


@pytest.mark.parametrize(
    ("voters", "agree", "threshold", "accepted"),
    [(4, 3, 0.75, True), (4, 2, 0.75, False), (3, 2, 0.75, False), (3, 2, 2 / 3, True), (2, 2, 0.75, True),
     (5, 1, 0.0, True), (10, 7, 0.7, True), (5, 3, 0.6, True)],
)  # fmt: skip
def test_the_threshold_is_a_share_of_the_voters_present(
    voters: int, agree: int, threshold: float, accepted: bool
) -> None:
    probabilities = torch.zeros(voters, 1, 8)
    for voter in range(voters):
        probabilities[voter, 0, 0 if voter < agree else 1 + voter % 7] = 1
    if voters == 5 and agree == 1:
        probabilities = torch.eye(5)[:, None, :]
    assert count_votes(probabilities, threshold).accepted.tolist() == [accepted]


def test_the_group_effect_is_the_gain_by_averaging() -> None:
    found = group_effect((0.5, 0.6), [(0.4, 0.5), (0.5, 0.9)])
    assert found["group_effect"] == pytest.approx(0.05)
    assert found["group_effect_adapted"] == pytest.approx(-0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a model


class Network(nn.Module):
    """Two inputs to two features to two classes, with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.head(self.encoder(inputs))
        return found


def blobs(count: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return two classes on either side of a line, moved and stretched."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    points = torch.randn(count, 2, generator=generator) * 0.4
    points[:, 0] += 2.0 * labels - 1
    return points * scale + shift, labels


def task(name: str, inputs: Tensor, labels: Tensor, unlabelled: bool = False) -> Task:
    return Task(
        name,
        Network,
        batches=lambda: [(inputs, labels)],
        test=lambda: [(inputs, labels)],
        unlabelled=(lambda: [(inputs, None)]) if unlabelled else None,
        head="head",
    )


def test_features_are_the_input_of_the_head_and_nothing_above_is_run() -> None:
    module, given = Network(), task("a", *blobs(6, 0))
    inputs = blobs(6, 0)[0]
    features, logits = with_features(given, module, inputs, "head")
    torch.testing.assert_close(logits, module.head(features))
    module.head.register_forward_hook(lambda *_: pytest.fail("the head was run"))
    torch.testing.assert_close(features_of(given, module, inputs, "head"), features)
    assert embed(given, module, inputs, "head", batch_size=4).shape == (6, 8)
    assert linear_sizes(module, "head") == (8, 2)
    with pytest.raises(FederationError, match='no part "heat"; did you mean "head"'):
        linear_sizes(module, "heat")
    with pytest.raises(FederationError, match="no linear layer"):
        linear_sizes(module, "encoder.1")


# ---------------------------------------------------------------------------------------------------------------------
# Both halves


def settings(algorithm: str = "fedka", **given: Any) -> FedKA:
    made = create(algorithm, {"learning_rate": 0.02, "batch_size": 16, **given})
    assert isinstance(made, FedKA)
    return made


def server_of(algorithm: FedKA, target: Task, round: int = 1, rounds: int = 4) -> Server:
    torch.manual_seed(0)
    state = Network().state_dict()

    def none(*_: Any, **__: Any) -> Any:
        raise AssertionError("FedKA asks nothing, and leaves aggregation to the runtime")

    return Server(
        algorithm, target, True, ("a", "b"), rounds, 0, dict(prefixed("model", state)), {}, {}, dict(state),
        lambda name: True, none, none, round,
    )  # fmt: skip


def client_of(algorithm: FedKA, site: str, given: Task, server: Server) -> Client:
    sent = algorithm.outgoing(server, site)
    return Client(site, given, algorithm, server.round, server.rounds, dict(sent.tensors), dict(sent.config), {})


def reply_of(site: str, update: Update) -> Reply:
    return Reply(site, update.examples, update.metrics, lambda: dict(update.tensors))


def trained(algorithm: FedKA, server: Server, sites: dict[str, Task]) -> list[Reply]:
    return [reply_of(name, algorithm.train(client_of(algorithm, name, given, server))) for name, given in sites.items()]


SITES = {"a": task("a", *blobs(64, 1)), "b": task("b", *blobs(64, 2, shift=0.3))}
TARGET = task("target", *blobs(96, 3, shift=2.6, scale=2.0), unlabelled=True)


def taught(round: int = 1, **given: Any) -> tuple[FedKA, Server, list[Reply]]:
    """Return a server whose model is the first site's, after well trained sites have answered."""
    algorithm = settings(**{"local_epochs": 6, "learning_rate": 0.04, **given})
    server = server_of(algorithm, TARGET, round)
    algorithm.start(server)
    replies = trained(algorithm, server, SITES)
    server.shared.update(replies[0].tensors)
    return algorithm, server, replies


def test_fine_tuning_on_votes_teaches_the_target() -> None:
    algorithm, server, replies = taught(round=3)
    before = algorithm.evaluate_server(server)
    metrics = algorithm.after_round(server, replies)
    assert metrics["voters"] == 2
    assert metrics["vote_coverage"] > 0.8
    for _ in range(4):
        algorithm.after_round(server, replies)
    after = algorithm.evaluate_server(server)
    assert before["accuracy"] < 0.85
    assert after["accuracy"] > before["accuracy"] + 0.1
    assert metrics["group_effect"] == pytest.approx(metrics["accuracy_of_mean"] - metrics["accuracy_of_sites"])


def test_no_vote_is_taken_before_its_time_with_one_voter_or_without_voting() -> None:
    for change in ("time", "voters", "empty", "switch"):
        options: dict[str, Any] = {"voting": False} if change == "switch" else {"vote_start": 0.5}
        algorithm, server, replies = taught(round=2 if change == "time" else 3, group_effect=False, **options)
        if change == "voters":
            replies = replies[:1]
        if change == "empty":
            replies = [replies[0], Reply("b", 0.0, {}, lambda: pytest.fail("it has no say"))]
        before = {name: value.clone() for name, value in server.shared.items()}
        metrics = algorithm.after_round(server, replies)
        assert metrics == ({"voters": 1.0} if change in ("voters", "empty") else {})
        assert all(torch.equal(value, server.shared[name]) for name, value in before.items())


def test_nothing_accepted_means_no_fine_tuning() -> None:
    algorithm, server, replies = taught(round=3, group_effect=False, vote_threshold=1.0)
    flipped = {name: -value if "head" in name else value for name, value in replies[0].tensors.items()}
    before = server.shared["model/head.weight"].clone()
    metrics = algorithm.after_round(server, [replies[0], Reply("b", 1.0, {}, lambda: flipped)])
    assert metrics["vote_coverage"] == 0
    assert torch.equal(before, server.shared["model/head.weight"])


def test_votes_are_taken_with_statistics_of_the_target() -> None:
    coverage = {}
    for statistics in ("target", "running"):
        algorithm, server, replies = taught(round=3, group_effect=False, vote_statistics=statistics)
        module = server.module(replies[0].tensors)
        inputs = server.inputs()
        found = algorithm._probabilities(server, module, inputs, torch.arange(len(inputs))).argmax(1)
        coverage[statistics] = float((found == blobs(96, 3)[1]).double().mean())
    assert coverage["target"] > coverage["running"] + 0.1


def test_the_finetuned_model_can_be_kept_from_the_sites() -> None:
    algorithm, server, replies = taught(round=3, broadcast_finetuned=False, recalibrate=False, group_effect=False)
    before = {name: value.clone() for name, value in server.shared.items()}
    algorithm.after_round(server, replies)
    assert all(torch.equal(value, server.shared[name]) for name, value in before.items())
    tuned = select(server.kept, "finetuned")
    assert not torch.equal(tuned["head.weight"], before["model/head.weight"])
    judged = algorithm.evaluate_server(server)
    algorithm.finish(server)
    assert torch.equal(server.shared["model/head.weight"], tuned["head.weight"])
    assert algorithm.evaluate_server(server)["accuracy"] == judged["accuracy"]


def test_the_final_model_has_statistics_of_the_target() -> None:
    algorithm, server, _ = taught(round=4, group_effect=False)
    algorithm.finish(server)
    inputs = server.inputs()
    module = server.module()
    torch.testing.assert_close(module.encoder[1].running_mean, module.encoder[0](inputs).mean(0).detach())  # type: ignore[index, operator]


def test_only_part_of_the_target_may_be_voted_on() -> None:
    algorithm, server, replies = taught(round=3, vote_samples=10, vote_threshold=0.0, group_effect=False)
    seen: list[int] = []
    plain = algorithm._learn_from
    algorithm._learn_from = lambda server, votes, inputs: (seen.append(len(inputs)), plain(server, votes, inputs))[1]  # type: ignore[method-assign]
    algorithm.after_round(server, replies)
    assert seen == [10]


def test_by_default_nothing_of_the_target_reaches_a_site() -> None:
    algorithm = settings()
    server = server_of(algorithm, TARGET)
    algorithm.start(server)
    assert set(algorithm.outgoing(server, "a").tensors) == set(server.shared)
    assert all(name.startswith("model/") for name in server.shared)
    with pytest.raises(FederationError, match="workspace=bank"):
        settings(discrepancy=0.1)


@pytest.mark.parametrize("workspace", ["bank", "images"])
def test_alignment_brings_features_of_site_and_target_together(workspace: str) -> None:
    distances = {}
    for weight in (0.0, 1.0):
        algorithm = settings(discrepancy=max(weight, 1e-9), workspace=workspace, voting=False, local_epochs=8)
        server = server_of(algorithm, TARGET, round=4)
        algorithm.start(server)
        sent = set(algorithm.outgoing(server, "a").tensors) - set(server.shared)
        assert sent == ({"bank"} if workspace == "bank" else {"target"})
        client = client_of(algorithm, "a", SITES["a"], server)
        update = algorithm.train(client)
        assert set(update.tensors) == {name for name, value in server.shared.items() if value.is_floating_point()}
        # Of features as they are in training: normalised by the batch, as the target's are by the target.
        distances[weight] = update.metrics["discrepancy"]
    assert distances[1.0] < 0.6 * distances[0.0]


@pytest.mark.parametrize("workspace", ["bank", "images"])
def test_the_discriminator_travels_and_learns(workspace: str) -> None:
    algorithm = settings("fedka-paper", workspace=workspace, disentangler_width=8)
    server = server_of(algorithm, TARGET, round=2)
    algorithm.start(server)
    update = algorithm.train(client_of(algorithm, "a", SITES["a"], server))
    expected = algorithm.expected(server, algorithm.outgoing(server, "a").tensors)
    assert set(update.tensors) == set(expected)
    assert not torch.equal(
        update.tensors["disentangler/layers.0.weight"], server.shared["disentangler/layers.0.weight"]
    )
    assert update.metrics["domain_loss"] > 0
    assert update.metrics["discrepancy"] > 0
    assert 0 <= update.metrics["domain_accuracy"] <= 1


def test_a_site_without_examples_hands_the_discriminator_back() -> None:
    algorithm = settings("fedka-paper")
    server = server_of(algorithm, TARGET, round=2)
    algorithm.start(server)
    alone = Task(
        "alone", Network, batches=lambda: [(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))], head="head"
    )
    update = algorithm.train(client_of(algorithm, "a", alone, server))
    assert set(update.tensors) == set(algorithm.expected(server, server.shared))
    assert update.examples == 0


@pytest.mark.parametrize("preset", ["fedka", "fedka-paper"])
def test_a_learning_rate_of_zero_returns_the_model_sent(preset: str) -> None:
    algorithm = settings(preset, learning_rate=0.0)
    server = server_of(algorithm, TARGET)
    algorithm.start(server)
    update = algorithm.train(client_of(algorithm, "a", SITES["a"], server))
    for name, value in update.tensors.items():
        if "running" not in name:
            assert torch.equal(value, server.shared[name])


def test_equal_seeds_give_equal_rounds() -> None:
    found = []
    for _ in range(2):
        algorithm, server, replies = taught(
            round=3, disentangler=0.1, discrepancy=0.1, workspace="bank", local_epochs=1
        )
        algorithm.after_round(server, replies)
        found.append({**server.shared, **server.kept})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_problems_are_named_before_the_run() -> None:
    algorithm = settings(discrepancy=0.1, workspace="bank")
    headless = dataclasses.replace(TARGET, head=None)
    assert "names no head" in algorithm.check(server_of(algorithm, headless))[0]
    mapping = dataclasses.replace(TARGET, unlabelled=lambda: [({"x": torch.zeros(2, 2)}, None)])
    images = settings(discrepancy=0.1, workspace="images")
    assert "workspace=bank" in images.check(server_of(images, mapping))[0]
    without = dataclasses.replace(TARGET, unlabelled=None)
    assert "--target" in algorithm.check(server_of(algorithm, without))[0]
    assert algorithm.check(server_of(algorithm, TARGET)) == []


def test_presets_are_as_documented() -> None:
    paper, own = settings("fedka-paper").settings, settings().settings
    assert (paper.disentangler, paper.discrepancy, paper.vote_threshold, paper.vote_start) == (1, 1, 0, 0)
    assert (own.disentangler, own.discrepancy, own.vote_threshold, own.vote_start) == (0, 0, 0.75, 0.25)
    assert paper.broadcast_finetuned
    assert paper.ramp_slope == own.ramp_slope == 5
