"""GGEUR: statistics that merge to those of all embeddings, the geometry they have, and samples of that shape."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graftwork.federated.algorithms import create
from graftwork.federated.algorithms.base import Client, Form, Outgoing, Reply, Server, Update, prefixed, select
from graftwork.federated.algorithms.ggeur import GGEUR
from graftwork.federated.errors import FederationError, QuorumError
from graftwork.federated.geometry import Geometry, compose, geometry_of
from graftwork.federated.moments import (
    Moments,
    class_moments,
    discriminant,
    from_tensors,
    merge_moments,
    pooled_covariance,
    privacy_of_noise,
    spectrum,
    to_tensors,
)
from graftwork.federated.training import measure
from graftwork.federated.training import test_examples as examples_of_test
from graftwork.merge.task import Task

CLASSES, FEATURES = 4, 12


def clients(sizes: tuple[int, ...] = (60, 40, 1, 2, 0, 25), seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Return embeddings (with an offset, so that cancellation would show) and labels of several sites."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(FEATURES, FEATURES))
    made = []
    for size in sizes:
        labels = random.integers(0, CLASSES, size)
        points = random.normal(size=(size, FEATURES)) @ mixing + 3 * labels[:, None] + random.normal(size=FEATURES) + 10
        made.append((torch.from_numpy(points), torch.from_numpy(labels)))
    return made


def pooled_reference(points: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the covariance of all rows by a double loop over outer products, in float64."""
    mean = sum(points) / len(points)
    total = np.zeros((points.shape[1], points.shape[1]))
    for point in points:
        total += np.outer(point - mean, point - mean)
    return total / len(points)


def merged_of(parts: list[tuple[Tensor, Tensor]], form: str, **options: Any) -> Moments:
    sites = [class_moments(x, y, CLASSES, form=form, min_count=1, rank=0, **options) for x, y in parts]
    return merge_moments([over_the_wire(site, form) for site in sites])


def over_the_wire(site: Moments, form: Any) -> Moments:
    return from_tensors(to_tensors(site, form, torch.float64), form, CLASSES, FEATURES)


@pytest.mark.parametrize("form", ["tri", "factor", "lowrank"])
def test_the_merged_covariance_is_that_of_all_embeddings_together(form: str) -> None:
    parts = clients()
    merged = merged_of(parts, form)
    points, labels = (torch.cat(pieces).numpy() for pieces in zip(*parts, strict=True))
    for label in range(CLASSES):
        own = points[labels == label]
        reference = pooled_reference(own)
        found = merged.covariance(label).numpy()
        assert int(merged.counts[label]) == len(own)
        np.testing.assert_allclose(merged.means[label], own.mean(0), rtol=1e-13)
        assert np.abs(found - reference).max() < 1e-10 * np.abs(reference).max()


@pytest.mark.parametrize("form", ["tri", "factor", "lowrank", "pooled"])
def test_merging_does_not_depend_on_how_sites_are_grouped_or_ordered(form: str) -> None:
    sites = [class_moments(x, y, CLASSES, form=form, min_count=1, rank=0) for x, y in clients()]
    whole = merge_moments(sites)
    grouped = merge_moments(
        [merge_moments([sites[4], sites[1]]), merge_moments([sites[0], sites[5], sites[3]]), sites[2]]
    )
    for left, right in ((whole.covariances(), grouped.covariances()), (whole.means, grouped.means)):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_the_pooled_covariance_is_that_within_classes() -> None:
    parts = clients()
    points, labels = (torch.cat(pieces).numpy() for pieces in zip(*parts, strict=True))
    centred = points.copy()
    for label in range(CLASSES):
        centred[labels == label] -= points[labels == label].mean(0)
    reference = centred.T @ centred / len(centred)
    for form in ("pooled", "tri", "factor"):
        np.testing.assert_allclose(pooled_covariance(merged_of(parts, form)), reference, rtol=1e-10, atol=1e-10)


def test_low_rank_keeps_the_trace_and_the_strongest_directions() -> None:
    parts = clients((80, 50))
    exact = merged_of(parts, "tri")
    site = [class_moments(x, y, CLASSES, form="lowrank", rank=3, min_count=1) for x, y in parts]
    assert all(len(rows) <= 3 for moments in site for rows in moments.rows)
    merged = merge_moments([over_the_wire(moments, "lowrank") for moments in site])
    for label in range(CLASSES):
        torch.testing.assert_close(
            merged.covariance(label).trace(), exact.covariance(label).trace(), rtol=1e-12, atol=0
        )
    own = class_moments(*parts[0], CLASSES, form="tri", min_count=1).covariance(0)
    values, vectors = np.linalg.eigh(own.numpy())
    found = site[0].covariance(0).numpy()
    for place in (-1, -2, -3):
        np.testing.assert_allclose(found @ vectors[:, place], values[place] * vectors[:, place], atol=1e-9)
    rest = values[:-3].mean()
    np.testing.assert_allclose(vectors[:, 0] @ found @ vectors[:, 0], rest, rtol=1e-9)


def test_classes_with_few_embeddings_are_not_reported() -> None:
    labels = torch.tensor([0] * 4 + [1] * 5)
    points = torch.randn(9, FEATURES, generator=torch.Generator().manual_seed(0))
    for form in ("tri", "factor", "lowrank", "pooled"):
        found = class_moments(points, labels, CLASSES, form=form, min_count=5)
        assert found.counts.tolist() == [0, 5, 0, 0]
        assert not bool(found.means[0].any())
        sent = to_tensors(found, form)
        if form == "factor":
            assert sent["row_counts"].tolist() == [0, 5, 0, 0]


def test_a_factor_tells_no_more_than_the_covariance() -> None:
    points = torch.randn(7, FEATURES, generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(7, dtype=torch.int64)
    rotated = points[torch.randperm(7, generator=torch.Generator().manual_seed(2))]
    one = class_moments(points, labels, 1, form="factor").rows[0]
    other = class_moments(rotated, labels, 1, form="factor").rows[0]
    torch.testing.assert_close(one.abs(), other.abs(), rtol=1e-6, atol=1e-6)
    assert bool((torch.tril(one[:, :7], -1) == 0).all())


@pytest.mark.parametrize("size", [3, 6, 11, 12, 40])
def test_the_gram_route_gives_the_spectrum_of_the_covariance(size: int) -> None:
    rows = torch.randn(size, FEATURES, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    values, directions = spectrum(rows)
    np.testing.assert_allclose((directions.T * values) @ directions, rows.T @ rows, atol=1e-11)
    np.testing.assert_allclose(directions @ directions.T, np.eye(len(values)), atol=1e-10)
    assert bool((values.diff() <= 1e-12).all())


def test_directions_that_are_zero_up_to_rounding_are_left_out() -> None:
    rows = torch.randn(5, FEATURES, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    values, _ = spectrum(torch.cat([rows, rows]))
    assert len(values) == 5
    values, directions = spectrum(torch.zeros(3, FEATURES, dtype=torch.float64))
    assert len(values) == len(directions) == 0


def test_the_geometry_is_the_covariance_whatever_the_route() -> None:
    parts = clients((6, 5, 7))
    by_factor, by_triangle = merged_of(parts, "factor"), merged_of(parts, "tri")
    assert by_factor.dense is None
    for rank in (0, 3):
        one, other = geometry_of(by_factor, rank=rank), geometry_of(by_triangle, rank=rank)
        for label in range(CLASSES):
            torch.testing.assert_close(one.covariance(label), other.covariance(label), rtol=1e-9, atol=1e-9)
            if rank == 0:
                torch.testing.assert_close(one.covariance(label), by_triangle.covariance(label), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(one.covariance(label).trace(), by_triangle.covariance(label).trace())


def test_eigen_power_one_squares_the_covariance() -> None:
    merged = merged_of(clients(), "tri")
    geometry = geometry_of(merged, rank=0, eigen_power=1.0)
    torch.testing.assert_close(
        geometry.covariance(1), merged.covariance(1) @ merged.covariance(1), rtol=1e-9, atol=1e-8
    )
    torch.testing.assert_close(
        geometry_of(merged, rank=0, noise_scale=0.5).covariance(1), 0.25 * merged.covariance(1), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(("form", "rank"), [("tri", 0), ("factor", 0), ("lowrank", 3), ("pooled", 0)])
def test_samples_have_the_covariance_that_the_geometry_says(form: str, rank: int) -> None:
    parts = clients((5, 4))  # fewer embeddings than features: the covariance is singular
    sites = [class_moments(x, y, CLASSES, form=form, rank=rank, min_count=1) for x, y in parts]
    geometry = geometry_of(merge_moments(sites), rank=rank)
    present = int(torch.nonzero(geometry.counts > 1)[0])
    anchors = torch.zeros(1, FEATURES, dtype=torch.float64)
    every = compose(
        anchors, torch.tensor([present]), geometry, torch.Generator(), target_per_class=100_001, fill="none"
    )
    samples, labels = every.draw(torch.arange(1, 100_001), geometry, 7)
    assert bool(torch.isfinite(samples).all())
    assert set(labels.tolist()) == {present}
    found, wanted = samples.T @ samples / len(samples), geometry.covariance(present)
    assert float((found - wanted).norm() / wanted.norm()) < 0.05
    assert float(samples.mean(0).norm()) < 0.05 * float(wanted.trace().sqrt())


def simple_geometry(**changes: Any) -> Geometry:
    """Return a geometry of three classes in two dimensions; nobody has class 2."""
    values: dict[str, Any] = {
        "counts": torch.tensor([10.0, 10.0, 0.0]),
        "means": torch.tensor([[0.0, 0.0], [5.0, 5.0], [0.0, 0.0]]),
        "directions": torch.eye(2)[None].repeat(3, 1, 1) * 0.1,
        "deviations": torch.zeros(3),
        "prototypes": torch.tensor([[[1.0, 0], [6, 5], [0, 0]], [[-1.0, 0], [4, 5], [0, 0]]]),
        "prototype_counts": torch.tensor([[5.0, 5, 0], [5, 5, 0]]),
        **changes,
    }
    return Geometry(**values)


def test_the_augmented_set_keeps_all_real_embeddings_and_spreads_samples_evenly() -> None:
    points = torch.tensor([[0.0, 0], [1, 1], [2, 2], [9, 9]])
    labels = torch.tensor([0, 0, 0, 2])
    every = compose(points, labels, simple_geometry(), torch.Generator(), target_per_class=10, fill="none")
    samples, found = every.draw_all(simple_geometry(), 1)
    assert found.tolist().count(0) == 10
    assert found.tolist().count(1) == 0  # absent at the site
    assert found.tolist().count(2) == 1  # measured by nobody: only its real embedding
    torch.testing.assert_close(samples[:4], points)
    uses = torch.bincount(every.anchors[4:])[:3]
    assert int(uses.max() - uses.min()) <= 1
    torch.testing.assert_close(samples[4:], points[every.anchors[4:]], atol=0.6, rtol=0)
    assert float((samples[4:] - points[every.anchors[4:]]).abs().min()) > 0
    rich = compose(points, labels, simple_geometry(), torch.Generator(), target_per_class=2, fill="none")
    assert len(rich) == 4


def test_missing_classes_are_filled_from_the_mean_or_from_other_sites() -> None:
    points, labels = torch.zeros(2, 2), torch.tensor([0, 0])
    geometry = simple_geometry()
    single = compose(points, labels, geometry, torch.Generator(), target_per_class=20)
    samples, found = single.draw_all(geometry, 0)
    torch.testing.assert_close(samples[found == 1].mean(0), torch.tensor([5.0, 5.0]), atol=0.15, rtol=0)
    own = geometry.prototype_counts.clone()
    own[0] = 0
    geometry = simple_geometry(prototype_counts=own)
    multi = compose(points, labels, geometry, torch.Generator(), mode="multi", target_per_class=20, per_prototype=7)
    samples, found = multi.draw_all(geometry, 0)
    assert found.tolist().count(0) == 20 + 7
    assert found.tolist().count(1) == 20 + 7
    torch.testing.assert_close(samples[found == 1].mean(0), torch.tensor([4.0, 5.0]), atol=0.15, rtol=0)
    none = compose(points, labels, geometry, torch.Generator(), mode="multi", fill="none", per_prototype=7)
    assert set(none.labels.tolist()) == {0}


def test_equal_seeds_give_equal_samples_and_other_seeds_others() -> None:
    geometry = simple_geometry()
    every = compose(torch.zeros(1, 2), torch.tensor([0]), geometry, torch.Generator())
    one, again, other = (every.draw_all(geometry, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    # The noise of a class does not depend on which other classes are drawn.
    of_class = torch.nonzero(every.labels == 1).squeeze(1)
    assert torch.equal(every.draw(of_class, geometry, 1)[0], one[of_class])


def test_samples_of_unit_embeddings_can_be_brought_to_length_one() -> None:
    geometry = simple_geometry()
    every = compose(torch.tensor([[1.0, 0]]), torch.tensor([0]), geometry, torch.Generator(), fill="none")
    samples, _ = every.draw_all(geometry, 0, unit=True)
    torch.testing.assert_close(samples.norm(dim=1), torch.ones(len(samples)))


def test_the_discriminant_is_the_closed_form() -> None:
    parts = clients((200, 100))
    points, labels = (torch.cat(pieces).numpy() for pieces in zip(*parts, strict=True))
    merged = merged_of(parts, "tri")
    weights, biases = discriminant(merged)
    centred = points - np.stack([points[labels == label].mean(0) for label in range(CLASSES)])[labels]
    sigma = centred.T @ centred / len(points)
    sigma += 0.01 * np.diag(sigma).mean() * np.eye(FEATURES)
    for label in range(CLASSES):
        mean = points[labels == label].mean(0)
        np.testing.assert_allclose(weights[label], np.linalg.inv(sigma) @ mean, rtol=1e-8)
        np.testing.assert_allclose(biases[label], -0.5 * mean @ np.linalg.inv(sigma) @ mean, rtol=1e-8)


def test_the_discriminant_never_chooses_a_class_that_nobody_has() -> None:
    points, labels = clients((200,))[0]
    labels = torch.where(labels == 2, 1, labels)
    merged = class_moments(points, labels, CLASSES, form="tri")
    weights, biases = discriminant(merged)
    assert not bool(weights[2].any())
    assert 2 not in (points @ weights.T + biases).argmax(1).tolist()


def test_noise_hides_one_embedding_and_averages_out() -> None:
    points, labels = clients((4000,))[0]
    points = torch.nn.functional.normalize(points - points.mean(0))
    exact = class_moments(points, labels, CLASSES, form="pooled")

    def noisy(noise: float, seed: int) -> Moments:
        return class_moments(
            points, labels, CLASSES, form="noisy", noise=noise, generator=torch.Generator().manual_seed(seed)
        )

    near = noisy(1e-9, 0)
    torch.testing.assert_close(near.covariances(), exact.covariances(), atol=1e-8, rtol=0)
    torch.testing.assert_close(near.means, exact.means, atol=1e-8, rtol=0)
    spread = torch.stack([noisy(2.0, seed).counts - exact.counts for seed in range(200)])
    assert 1.8 < float(spread.std()) < 2.2
    one = noisy(2.0, 0)
    assert float(torch.linalg.eigvalsh(one.covariance(0))[0]) > -1e-12
    long = class_moments(
        points * 100, labels, CLASSES, form="noisy", noise=1e-9, generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(long.means, exact.means, atol=1e-8, rtol=0)
    first, second = (class_moments(points, labels, CLASSES, form="noisy") for _ in range(2))
    assert not torch.equal(first.means, second.means)


def test_the_price_of_noise_is_that_of_three_gaussian_sums() -> None:
    rho = 3 / (2 * 4.0**2)
    assert privacy_of_noise(4.0, 1e-5) == pytest.approx(rho + 2 * np.sqrt(rho * np.log(1e5)))
    assert privacy_of_noise(8.0, 1e-5) < privacy_of_noise(4.0, 1e-5)


def spoil(form: str, name: str, change: Any) -> dict[str, Tensor]:
    tensors = to_tensors(class_moments(*clients((50,))[0], CLASSES, form=form, min_count=1), form)
    tensors[name] = change(tensors[name].clone())
    return tensors


def negative_definite(tensor: Tensor) -> Tensor:
    return -tensor


@pytest.mark.parametrize(
    ("form", "name", "change", "words"),
    [
        ("tri", "triangles", lambda t: t.fill_(float("nan")), "not finite"),
        ("tri", "triangles", negative_definite, "negative eigenvalues"),
        ("tri", "triangles", lambda t: t[:, :-1], "same encoder"),
        ("lowrank", "residuals", lambda t: t - 100, "below zero"),
        ("lowrank", "means", lambda t: t[:, :-1], "this federation needs"),
        ("factor", "row_counts", lambda t: t + 1, "this federation needs"),
        ("pooled", "counts", lambda t: t - 1000, "embeddings of a class"),
    ],
)
def test_statistics_that_cannot_be_are_refused(form: Any, name: str, change: Any, words: str) -> None:
    with pytest.raises(FederationError, match=words):
        from_tensors(spoil(form, name, change), form, CLASSES, FEATURES)


def test_sites_without_data_and_absent_classes_add_nothing() -> None:
    points, labels = clients((50,))[0]
    alone = class_moments(points, labels, CLASSES, form="tri", min_count=1)
    empty = class_moments(points[:0], labels[:0], CLASSES, form="tri", min_count=1)
    merged = merge_moments([empty, alone, empty])
    torch.testing.assert_close(merged.covariances(), alone.covariances())
    nobody = merge_moments([empty, empty])
    assert bool(torch.isfinite(nobody.covariances()).all())
    assert bool(torch.isfinite(geometry_of(nobody).directions).all())


def test_many_samples_take_seconds() -> None:
    generator = torch.Generator().manual_seed(0)
    geometry = Geometry(
        counts=torch.full((10,), 500.0),
        means=torch.randn(10, 512, generator=generator),
        directions=torch.randn(10, 32, 512, generator=generator),
        deviations=torch.zeros(10),
        prototypes=torch.zeros(0, 10, 512),
        prototype_counts=torch.zeros(0, 10),
    )
    points = torch.randn(100, 512, generator=generator)
    labels = torch.arange(100) % 10
    begin = time.process_time()
    every = compose(points, labels, geometry, generator, target_per_class=4500)
    samples, _ = every.draw_all(geometry, 0)
    assert len(samples) == 45_000
    # A tenth of CIFAR-10's augmentation; the whole is to take less than ten seconds.
    assert time.process_time() - begin < 4


# ---------------------------------------------------------------------------------------------------------------------
# Both halves, with a server that asks its sites directly


class Head(nn.Module):
    """A fixed encoder of four numbers into four, and a linear head for three classes that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.head(self.encoder(inputs))
        return found


CENTRES = torch.tensor([[3.0, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 0]])


def owner(classes: list[int], count: int, seed: int) -> Task:
    """Return a site that has some classes alone."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes)[torch.arange(count) % len(classes)] if count else torch.zeros(0, dtype=torch.int64)
    inputs = CENTRES[labels] + torch.randn(count, 4, generator=generator)
    return Task("site", Head, batches=lambda: [(inputs, labels)], test=lambda: [(inputs, labels)], head="head")


class Federation:
    """Sites and a server half, called one after the other as the runtime does."""

    def __init__(self, algorithm: GGEUR, sites: dict[str, Task], absent: tuple[str, ...] = ()) -> None:
        self.algorithm, self.sites, self.absent = algorithm, sites, set(absent)
        self.private: dict[str, dict[str, Tensor]] = {site: {} for site in sites}
        torch.manual_seed(0)
        state = Head().state_dict()
        self.local = algorithm.local_names(Head(), "head")
        shared = prefixed("model", {name: value for name, value in state.items() if name not in self.local})
        test = owner([0, 1, 2], 300, 99)
        self.server = Server(
            algorithm, test, True, tuple(sorted(sites)), 10, 0, dict(shared), {}, {}, dict(state),
            lambda _: True, self.ask, self.merge,
        )  # fmt: skip
        assert algorithm.check(self.server) == []
        algorithm.start(self.server)
        algorithm.before_rounds(self.server)

    def client(self, site: str, sent: Outgoing, question: str = "") -> Client:
        server = self.server
        initial = {name: value for name, value in server.initial.items() if name in self.local}
        return Client(
            site, self.sites[site], self.algorithm, server.round, server.rounds, dict(sent.tensors), dict(sent.config),
            dict(self.private[site]), server.round - 1, question, 0, initial,
        )  # fmt: skip

    def ask(self, question: str, outgoing: Any, *, expect: Any = None, sites: Any = None, quorum: Any = None) -> Any:
        replies = []
        for site in sorted(self.sites if sites is None else sites):
            if site in self.absent:
                continue
            sent = outgoing(site) if callable(outgoing) else outgoing
            update = self.algorithm.answer(self.client(site, sent, question))
            if expect is not None:
                assert set(update.tensors) == set(expect)
                for name, form in expect.items():
                    found = Form.of(update.tensors[name])
                    assert found.dtype == form.dtype
                    assert len(found.shape) == len(form.shape)
                    assert all(want in (-1, size) for want, size in zip(form.shape, found.shape, strict=True))
            replies.append(Reply(site, update.examples, update.metrics, lambda update=update: dict(update.tensors)))
        return replies

    def merge(self, replies: Any, names: Any = None, weights: Any = None, *, mean: bool = False) -> dict[str, Tensor]:
        weights = self.server.weights(replies) if weights is None else weights
        total = sum(weights)
        tensors = [reply.tensors for reply in replies]
        return {
            name: sum((w / total * found[name] for w, found in zip(weights, tensors, strict=True)), torch.zeros(()))
            for name in tensors[0]
        }

    def round(self, *, absent: tuple[str, ...] = ()) -> tuple[dict[str, Update], dict[str, Outgoing], dict[str, float]]:
        self.server.round += 1
        updates, sent, replies = {}, {}, []
        for site in sorted(set(self.sites) - set(absent)):
            sent[site] = self.algorithm.outgoing(self.server, site)
            update = updates[site] = self.algorithm.train(self.client(site, sent[site]))
            assert set(update.tensors) == set(self.algorithm.expected(self.server, sent[site].tensors))
            if update.private is not None:
                self.private[site] = dict(update.private)
            replies.append(Reply(site, update.examples, update.metrics, lambda update=update: dict(update.tensors)))
        self.algorithm.aggregate(self.server, replies)
        return updates, sent, dict(self.algorithm.after_round(self.server, replies))

    def accuracy(self) -> float:
        return self.algorithm.evaluate_server(self.server)["accuracy"]


def ggeur(name: str = "ggeur", **given: Any) -> GGEUR:
    made = create(name, {"local_steps": 5, "batch_size": 16, "learning_rate": 0.1, **given})
    assert isinstance(made, GGEUR)
    return made


def three_owners() -> dict[str, Task]:
    return {"a": owner([0], 40, 1), "b": owner([1], 40, 2), "c": owner([2], 40, 3)}


def test_only_the_head_travels_and_geometry_is_sent_once() -> None:
    federation = Federation(ggeur(), three_owners())
    assert set(federation.server.shared) == {"model/head.weight", "model/head.bias"}
    _, first, _ = federation.round()
    assert any(name.startswith("geometry/") for name in first["a"].tensors)
    updates, second, _ = federation.round()
    assert not any(name.startswith("geometry/") for name in second["a"].tensors)
    assert updates["a"].metrics["geometry_version"] == 1
    assert updates["a"].metrics["augmented_examples"] == 5 * 16
    assert updates["a"].examples == 40
    assert not any(name.startswith("model/") for name in federation.private["a"])


def test_a_site_that_lost_the_geometry_gets_it_again() -> None:
    federation = Federation(ggeur(), three_owners())
    federation.round()
    federation.private["b"] = {}
    updates, _, _ = federation.round()
    assert updates["b"].metrics["geometry_version"] == 0
    assert updates["b"].metrics["augmented_examples"] == 40
    updates, sent, _ = federation.round()
    assert "geometry/means" in sent["b"].tensors
    assert "geometry/means" not in sent["a"].tensors
    assert updates["b"].metrics["geometry_version"] == 1


def test_samples_of_missing_classes_are_what_makes_the_difference() -> None:
    """Each site owns one class: after few rounds the published form knows as little as FedAvg, `fill` knows all."""
    found = {}
    for name, algorithm in (
        ("fill", ggeur(local_steps=25)),
        ("none", ggeur(local_steps=25, fill="none")),
        ("paper", ggeur("ggeur-paper", local_steps=25)),
        ("materialised", ggeur(local_steps=25, sampling="materialised")),
        ("multi", ggeur(local_steps=25, mode="multi", per_prototype=20, target_per_class=50)),
    ):
        federation = Federation(algorithm, three_owners())
        updates, _, _ = federation.round()
        # What one site alone has learned of all classes.
        module = federation.server.module(updates["a"].tensors)
        found[name] = measure(federation.server.task, module, examples_of_test(federation.server.task))[1]
    assert found["none"] < 0.5
    assert found["paper"] < 0.5
    for name in ("fill", "materialised", "multi"):
        assert found[name] > 0.75, name


@pytest.mark.parametrize("statistics", ["lowrank", "tri", "factor", "pooled"])
def test_every_form_of_statistics_trains(statistics: str) -> None:
    federation = Federation(ggeur(statistics=statistics), three_owners())
    for _ in range(3):
        federation.round()
    assert federation.accuracy() > 0.8


def test_noisy_statistics_train_when_there_are_many_embeddings() -> None:
    sites = {name: owner([label], 3000, label) for label, name in enumerate("abc")}
    federation = Federation(ggeur(statistics="noisy", clip_embeddings=10.0, noise_multiplier=1.0), sites)
    for _ in range(3):
        federation.round()
    assert federation.accuracy() > 0.75
    with pytest.raises(FederationError, match="meant to hide"):
        ggeur(statistics="noisy", mode="multi")


def test_the_discriminant_start_is_right_before_any_training() -> None:
    federation = Federation(ggeur(start="lda"), three_owners())
    assert federation.accuracy() > 0.9
    assert federation.server.record["started_from_discriminant"]
    better = Federation(ggeur(start="auto"), three_owners())
    assert better.server.record["started_from_discriminant"]
    plain = Federation(ggeur(), three_owners())
    assert plain.accuracy() == pytest.approx(1 / 3, abs=0.05)


def test_an_automatic_start_keeps_a_model_that_is_better() -> None:
    federation = Federation(ggeur(start="auto"), three_owners())
    server = federation.server
    head = {name: value.clone() * 3 for name, value in server.shared.items()}
    server.shared.update(head)
    server.record.pop("started_from_discriminant")
    federation.algorithm._start_from_discriminant(server)
    # Three times the discriminant decides the same, so there is no gain in replacing it.
    assert "started_from_discriminant" not in server.record
    assert torch.equal(server.shared["model/head.bias"], head["model/head.bias"])


def test_a_late_site_is_taken_in_and_everybody_gets_the_new_geometry() -> None:
    algorithm = ggeur(rank=0, statistics="tri", precision="float64", mode="multi")
    late = Federation(algorithm, three_owners(), absent=("c",))
    assert late.server.record["missing"] == ["c"]
    assert late.server.record["absent_classes"] == [2]
    late.round(absent=("c",))
    late.absent.clear()
    _, _, metrics = late.round()
    assert metrics["geometry_version"] == 2
    assert late.server.record["missing"] == late.server.record["holders"] == []
    _, sent, _ = late.round()
    assert all(sent[site].config["geometry_version"] == 2 for site in "abc")
    prompt = Federation(algorithm, three_owners())
    for name in ("counts", "means", "prototypes", "prototype_counts"):
        torch.testing.assert_close(late.server.kept[f"geometry/{name}"], prompt.server.kept[f"geometry/{name}"])
    for label in range(3):
        one, other = (
            Geometry.from_tensors(select(known.server.kept, "geometry")).covariance(label) for known in (late, prompt)
        )
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not any(name.startswith("merged/") for name in late.server.kept)


def test_too_few_statistics_end_the_run() -> None:
    with pytest.raises(QuorumError, match="1 of 3 sites sent usable ones"):
        Federation(ggeur(), three_owners(), absent=("b", "c"))


def test_a_site_whose_statistics_cannot_be_is_left_out_and_named() -> None:
    class Liar(GGEUR):
        def _statistics(self, client: Client, real: Any) -> Update:
            update = super()._statistics(client, real)
            if client.site == "b":
                update.tensors["counts"].neg_()  # type: ignore[attr-defined]
            return update

    federation = Federation(Liar(ggeur().settings), three_owners())
    assert "embeddings of a class" in federation.server.record["rejected_statistics"]["b"]
    assert federation.server.record["missing"] == ["b"]


def test_an_inflated_covariance_is_cut_to_the_limit() -> None:
    sites = {name: owner([0, 1, 2], 60, seed) for seed, name in enumerate("abc")}
    inputs, labels = next(iter(sites["b"].batches()))
    inflated = CENTRES[labels] + 100 * (inputs - CENTRES[labels])
    sites["b"] = dataclasses.replace(sites["b"], batches=lambda: [(inflated, labels)])
    traces = {}
    for limit in (0.0, 2.0):
        federation = Federation(ggeur(trace_limit=limit, sigma="within", statistics="tri", rank=0), sites)
        geometry = Geometry.from_tensors(select(federation.server.kept, "geometry"))
        traces[limit] = float(geometry.covariance(0).trace())
    assert traces[2.0] < 0.01 * traces[0.0]


def test_a_site_without_data_weighs_nothing() -> None:
    federation = Federation(ggeur(), {**three_owners(), "d": owner([0], 0, 4)})
    updates, _, _ = federation.round()
    assert updates["d"].examples == 0
    assert torch.equal(updates["d"].tensors["model/head.weight"], torch.zeros(3, 4))
    assert bool(torch.isfinite(federation.server.shared["model/head.weight"]).all())


def test_steps_are_those_of_the_base_algorithm() -> None:
    algorithm = ggeur(local_steps=0, local_epochs=2)
    assert [algorithm._steps(count) for count in (0, 1, 16, 17, 18, 40)] == [0, 2, 2, 2, 4, 6]
    for sampling in ("on_the_fly", "materialised"):
        federation = Federation(ggeur(local_steps=0, local_epochs=2, sampling=sampling), three_owners())
        updates, _, _ = federation.round()
        assert updates["a"].metrics["steps"] == 6


@pytest.mark.parametrize("sampling", ["on_the_fly", "materialised"])
def test_a_learning_rate_of_zero_returns_the_head_sent(sampling: str) -> None:
    federation = Federation(ggeur(learning_rate=0.0, sampling=sampling, start="lda"), three_owners())
    updates, sent, _ = federation.round()
    for site, update in updates.items():
        assert all(torch.equal(value, sent[site].tensors[name]) for name, value in update.tensors.items())


def test_equal_seeds_give_equal_runs_and_sites_draw_different_noise() -> None:
    runs = []
    for _ in range(2):
        federation = Federation(ggeur(), {"a": owner([0], 40, 1), "b": owner([0], 40, 1)})
        updates, _, _ = federation.round()
        runs.append(updates)
    assert torch.equal(runs[0]["a"].tensors["model/head.weight"], runs[1]["a"].tensors["model/head.weight"])
    assert not torch.equal(runs[0]["a"].tensors["model/head.weight"], runs[0]["b"].tensors["model/head.weight"])


def test_problems_are_named_before_the_run() -> None:
    algorithm = ggeur(start="lda")
    federation = Federation(ggeur(), three_owners())
    server = dataclasses.replace(federation.server, task=dataclasses.replace(federation.server.task, head=None))
    assert "names no head" in algorithm.check(server)[0]

    class Deep(Head):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))  # type: ignore[assignment]

    deep = dataclasses.replace(federation.server.task, model=Deep)
    state = Deep().state_dict()
    server = dataclasses.replace(federation.server, task=deep, initial=state, shared={})
    assert "more than a linear layer" in algorithm.check(server)[0]
    assert ggeur().check(server) == []


@pytest.mark.parametrize("base", ["fedavg", "fedprox", "scaffold"])
@pytest.mark.parametrize("sampling", ["on_the_fly", "materialised"])
def test_it_composes_with_every_base_algorithm(base: str, sampling: str) -> None:
    federation = Federation(ggeur(base=base, sampling=sampling, mu=0.1), three_owners())
    for _ in range(3):
        updates, _, _ = federation.round()
    assert federation.accuracy() > 0.8
    assert updates["a"].metrics["steps"] == 5
    # Geometry is written once; what the base algorithm keeps, in every round.
    assert (updates["a"].private is None) == (base != "scaffold")
    groups = {name.partition("/")[0] for name in federation.private["a"]}
    assert groups == ({"geometry", "control"} if base == "scaffold" else {"geometry"})


def test_encoders_are_computed_once_and_never_stored() -> None:
    calls = []

    class Counting(Head):
        def forward(self, inputs: Tensor) -> Tensor:
            calls.append(len(inputs))
            return super().forward(inputs)

    sites = {name: dataclasses.replace(site, model=Counting) for name, site in three_owners().items()}
    federation = Federation(ggeur(), sites)
    first = len(calls)
    for _ in range(3):
        federation.round()
    assert first == len(calls) == 3
