"""Tests of barriers: curves that can be worked out by hand, laws, and what a user may get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftwork.merge.alignment.barrier import interpolate, measure_barrier, measure_simplex, rise_of
from graftwork.merge.errors import DataError, MismatchError, TaskError
from graftwork.merge.task import Task

ONE = torch.ones(4, 1)


class Point(nn.Module):
    """A model that is a point: its output is its only weight, whatever the input."""

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x), -1)


def landscape(height: Callable[[Tensor], Tensor], size: int = 1, **more: Any) -> Task:
    """Return the task whose loss is a function of the weight."""
    return Task(
        "hill",
        lambda: Point(size),
        batches=lambda: [(ONE, ONE)],
        loss=lambda logits, _: height(logits[0].double()),
        **more,
    )


def double_well(w: Tensor) -> Tensor:
    return (w.square() - 1).square().sum()


def point(*values: float) -> dict[str, Tensor]:
    return {"w": torch.tensor(values)}


def test_the_barrier_between_two_equal_wells_is_the_hill_between_them() -> None:
    (curve,) = measure_barrier(landscape(double_well), point(-1.0), point(1.0), label="naive")
    assert len(curve.positions) == 25
    assert curve.losses[12] == 1
    assert (curve.loss.height, curve.loss.position) == (1, 0.5)
    assert (curve.loss.above_mean, curve.loss.midpoint, curve.loss.midpoint_height) == (1, 1, 1)
    assert (curve.label, curve.split, curve.accuracies, curve.accuracy) == ("naive", "train", None, None)


def test_between_unequal_ends_the_line_and_their_mean_differ() -> None:
    (curve,) = measure_barrier(landscape(double_well), point(-1.0), point(1.5), points=11)
    losses = [((-1 + 2.5 * t / 10) ** 2 - 1) ** 2 for t in range(11)]
    assert curve.losses == pytest.approx(losses)
    excess = [loss - t / 10 * losses[-1] for t, loss in enumerate(losses)]
    assert curve.loss.height == pytest.approx(max(excess))
    assert curve.loss.position == excess.index(max(excess)) / 10 == 0.3
    assert curve.loss.above_mean == pytest.approx(max(losses) - losses[-1] / 2)
    assert curve.loss.midpoint == pytest.approx(losses[5])
    assert curve.loss.midpoint_height == pytest.approx(losses[5] - losses[-1] / 2)


def test_a_valley_has_no_barrier() -> None:
    (curve,) = measure_barrier(landscape(lambda w: w.square().sum()), point(-1.0), point(1.0))
    assert (curve.loss.height, curve.loss.position) == (0, 0)
    assert curve.loss.midpoint_height == -1


def test_the_accuracy_barrier_is_how_far_it_falls_below_the_line() -> None:
    # The weights are logits; the second class is right for three of four examples.
    task = Task("classes", lambda: Point(2), batches=lambda: [(ONE, torch.tensor([1, 1, 1, 0]))])
    (curve,) = measure_barrier(task, point(1.0, 0.0), point(0.0, 1.0), points=5)
    assert curve.accuracies == (0.25, 0.25, 0.25, 0.75, 0.75)
    assert curve.accuracy is not None
    assert (curve.accuracy.height, curve.accuracy.position, curve.accuracy.midpoint) == (0.25, 0.5, 0.25)
    assert curve.accuracy.midpoint_height == 0.25
    assert curve.record()["accuracy_barrier"]["height"] == 0.25


def test_a_loss_that_is_no_number_is_an_infinite_barrier_and_above_such_an_end_there_is_none() -> None:
    assert rise_of([0, 0.5, 1], [1.0, math.nan, 2.0]).height == math.inf
    assert math.isnan(rise_of([0, 0.5, 1], [math.nan, 1.0, 2.0]).height)


def test_each_split_has_its_curve() -> None:
    task = landscape(double_well, test=lambda: [(ONE, ONE)])
    assert [curve.split for curve in measure_barrier(task, point(-1.0), point(1.0), splits=("train", "test"))] == [
        "train",
        "test",
    ]


def test_progress_names_every_point() -> None:
    told: list[float] = []
    measure_barrier(landscape(double_well), point(-1.0), point(1.0), points=3, progress=told.append)
    assert told == [0, 0.5, 1]


def test_mixtures_are_summed_in_double_precision_and_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    models = [{"w": torch.randn(1000, generator=generator)} for _ in range(3)]
    weights = [0.2, 0.3, 0.5]
    exact = sum(weight * model["w"].double() for weight, model in zip(weights, models, strict=True))
    assert torch.equal(interpolate(models, weights)["w"], torch.as_tensor(exact).float())
    halves = [{"w": model["w"].bfloat16()} for model in models]
    exact = sum(weight * model["w"].double() for weight, model in zip(weights, halves, strict=True))
    assert torch.equal(interpolate(halves, weights)["w"], torch.as_tensor(exact).bfloat16())


def test_ends_are_the_models_bit_by_bit_and_counters_are_the_first_one_s() -> None:
    a = {"w": torch.randn(50), "steps": torch.tensor(7)}
    b = {"w": torch.randn(50), "steps": torch.tensor(9)}
    assert torch.equal(interpolate([a, b], [1, 0])["w"], a["w"])
    assert torch.equal(interpolate([a, b], [0, 1])["w"], b["w"])
    assert torch.equal(interpolate([a, b], [0.5, 0.5])["steps"], a["steps"])


def norm_task(**more: Any) -> Task:
    inputs = torch.randn(32, 6, generator=torch.Generator().manual_seed(3))
    return Task(
        "normed",
        lambda: nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)),
        batches=lambda: [(inputs, inputs[:, :3].argmax(1))],
        **more,
    )


def trained(seed: int) -> dict[str, Tensor]:
    """Return a network that has learned `norm_task`."""
    task = norm_task()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = task.model()
        optimizer = torch.optim.Adam(module.parameters(), lr=0.03)
        for _ in range(40):
            for inputs, labels in task.batches():
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(inputs), labels).backward()
                optimizer.step()
    return module.state_dict()


def test_statistics_are_estimated_again_at_every_point() -> None:
    a, b = trained(1), trained(2)
    b = {**b, "1.running_var": b["1.running_var"] * 100}  # as of other data
    plain, reset, repaired = (
        measure_barrier(norm_task(), a, b, points=5, renormalization=how)[0] for how in ("none", "bn", "repair")
    )
    # The ends, too: what was wrong with B's statistics is put right by bn, and is what repair restores.
    assert plain.losses[-1] > 3 * reset.losses[-1]
    assert repaired.losses[-1] == pytest.approx(plain.losses[-1], rel=1e-3)
    assert reset.losses[2] < plain.losses[2]
    assert reset.renormalization == "bn"


def test_with_two_models_the_simplex_is_the_segment() -> None:
    task = landscape(double_well)
    (simplex,) = measure_simplex(task, [point(-1.0), point(1.5)], steps=10)
    (curve,) = measure_barrier(task, point(-1.0), point(1.5), points=11)
    assert simplex.height == pytest.approx(curve.loss.height)
    assert simplex.position == (0.7, 0.3)
    assert simplex.centre_loss == pytest.approx(curve.losses[5])


def test_three_corners_of_a_pyramid() -> None:
    corners = [point(1.0, 0.0, 0.0), point(0.0, 1.0, 0.0), point(0.0, 0.0, 1.0)]
    (simplex,) = measure_simplex(landscape(lambda w: 1 - w.square().sum(), 3), corners, steps=4)
    assert len(simplex.weights) == len(set(simplex.weights)) == 15
    assert all(sum(weights) == pytest.approx(1) for weights in simplex.weights)
    assert simplex.height == pytest.approx(2 / 3)
    assert simplex.position == (1 / 3, 1 / 3, 1 / 3)
    assert (simplex.centre_loss, simplex.centre_accuracy) == (pytest.approx(2 / 3), None)


WELL = landscape(double_well)


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (lambda: measure_barrier(WELL, point(0.0), point(1.0), points=24), MismatchError, "24 points; use an odd"),
        (lambda: measure_barrier(WELL, point(0.0), point(1.0), points=1), MismatchError, "1 points; use an odd"),
        (
            lambda: measure_barrier(WELL, point(0.0), point(1.0, 2.0)),
            MismatchError,
            r'"w" has shape \[1\] in "A" and \[2\] in "B"',
        ),
        (lambda: measure_barrier(WELL, point(0.0), {}), MismatchError, 'only "A" has "w"'),
        (lambda: measure_barrier(WELL, point(0.0), point(math.nan)), DataError, 'measure "B": .* not finite in "w"'),
        (lambda: measure_barrier(WELL, {"v": ONE}, {"v": ONE}), TaskError, "missing"),
        (
            lambda: measure_barrier(WELL, point(0.0), point(1.0), renormalization="reset"),  # type: ignore[arg-type]
            MismatchError,
            'renormalize by "reset"; use none or bn or repair',
        ),
        (
            lambda: measure_barrier(WELL, point(0.0), point(1.0), renormalization="bn"),
            TaskError,
            "its network has no BatchNorm layer",
        ),
        (lambda: measure_simplex(WELL, [point(0.0)]), MismatchError, "a simplex of 1 models"),
        (lambda: interpolate([point(0.0)], [0.5, 0.5]), MismatchError, "1 models but 2 weights"),
    ],
)
def test_what_is_wrong_is_said(action: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        action()
    assert "\n" not in str(caught.value) or error is TaskError
