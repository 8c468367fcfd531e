"""What alignment is for, on trained networks: each bar fails where nothing is aligned or nothing is renormalized."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from graftwork.merge.alignment.analysis import Analysis, analyse, calibrate
from graftwork.merge.alignment.apply import apply_permutation
from graftwork.merge.alignment.barrier import Curve, interpolate, measure_barrier, measure_simplex
from graftwork.merge.alignment.families import family_spec
from graftwork.merge.alignment.matching import match_weights
from graftwork.merge.alignment.renormalize import Method, renormalize
from graftwork.merge.alignment.spec import PermutationSpec, shapes_of
from graftwork.merge.evaluation import evaluate
from graftwork.merge.task import Task
from tests.merge.alignment.networks import LeNet, Model, Perceptron, Residual, digits_task, perceptron, residual

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


class Pair(NamedTuple):
    task: Task
    spec: PermutationSpec
    a: Model
    b: Model
    aligned: Model
    ratio: float
    analysis: Analysis | None = None


def pair(task: Task, a: Model, b: Model, *, analysed: bool = False) -> Pair:
    spec = family_spec(shapes_of(a))
    matching = match_weights(spec, a, b)
    analysis = analyse(spec, a, b, matching.permutation) if analysed else None
    aligned = apply_permutation(spec, matching.permutation, b)
    return Pair(task, spec, a, b, aligned, matching.distance_ratio, analysis)


def curve(pair: Pair, other: Model) -> Curve:
    return measure_barrier(pair.task, pair.a, other, splits=("train",), points=11)[0]


def midpoint(pair: Pair, other: Model, method: Method | None = None) -> float:
    """Return the accuracy of the mean of A and another model."""
    mean = interpolate([pair.a, other], [0.5, 0.5])
    if method is not None:
        mean = renormalize(pair.task, mean, [pair.a, other], method=method)
    accuracy = evaluate({"mean": mean}, [pair.task])[0].accuracy
    assert accuracy is not None
    return accuracy


# --- perceptrons ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def perceptrons() -> Pair:
    return pair(digits_task(partial(Perceptron, 128)), perceptron(128, 0), perceptron(128, 1), analysed=True)


def test_the_barrier_vanishes_though_models_come_hardly_nearer(perceptrons: Pair) -> None:
    assert perceptrons.analysis is not None
    assert perceptrons.analysis.ratio == pytest.approx(perceptrons.ratio, abs=1e-6)
    assert 0.7 < perceptrons.ratio < 0.8
    naive, aligned = curve(perceptrons, perceptrons.b).loss, curve(perceptrons, perceptrons.aligned).loss
    assert naive.height > 1
    assert aligned.height < 0.09
    assert naive.position == 0.5


def test_large_singular_directions_are_aligned_and_no_singular_value_changes(perceptrons: Pair) -> None:
    assert perceptrons.analysis is not None
    before, after = perceptrons.analysis.agreement_before, perceptrons.analysis.agreement_after
    assert perceptrons.analysis.singular_value_change < 1e-12
    assert abs(before.rho) < 0.05
    assert after.rho > 0.35
    for gamma in (0.5, 0.7, 0.9):
        assert abs(before.directions[gamma]) < 0.15
        assert after.directions[gamma] > 0.45
    assert after.directions[0.0] < 0.2
    # The singular values of two runs are nearly equal to begin with.
    spectra = [tensor.spectrum for tensor in perceptrons.analysis.tensors if tensor.spectrum is not None]
    assert max(spectra) < 0.1


def test_the_mean_has_the_large_directions_of_its_parents(perceptrons: Pair) -> None:
    assert perceptrons.analysis is not None
    assert perceptrons.analysis.merged_with_a.directions[0.9] > 0.7
    assert perceptrons.analysis.merged_with_b.directions[0.9] > 0.7


def test_repair_helps_the_naive_mean_and_matching_more(perceptrons: Pair) -> None:
    naive, repaired = midpoint(perceptrons, perceptrons.b), midpoint(perceptrons, perceptrons.b, "repair")
    assert naive < 0.6
    assert 0.85 < repaired < midpoint(perceptrons, perceptrons.aligned)


def test_calibration_takes_off_what_is_only_a_matter_of_scale(perceptrons: Pair) -> None:
    mean = interpolate([perceptrons.a, perceptrons.b], [0.5, 0.5])
    (found,) = calibrate(perceptrons.task, {"mean": mean})
    assert found.temperature < 0.8  # a mean of strangers has small logits
    assert found.calibrated < found.loss


def test_three_models_are_connected_after_two_were_matched_to_the_first(perceptrons: Pair) -> None:
    third = pair(perceptrons.task, perceptrons.a, perceptron(128, 2))
    (naive,), (aligned,) = (
        measure_simplex(perceptrons.task, [perceptrons.a, *others], steps=3, splits=("train",))
        for others in ((perceptrons.b, third.b), (perceptrons.aligned, third.aligned))
    )
    assert naive.height > 1
    assert aligned.height < 0.25


@pytest.mark.slow
def test_at_width_512_the_barrier_is_almost_nothing() -> None:
    wide = pair(digits_task(partial(Perceptron, 512)), perceptron(512, 0), perceptron(512, 1), analysed=True)
    assert wide.analysis is not None
    assert 0.8 <= wide.ratio <= 0.836
    assert wide.analysis.agreement_before.directions[0.9] < 0.1
    assert wide.analysis.agreement_after.directions[0.9] >= 0.5
    (train, test), (train_naive, test_naive) = (
        measure_barrier(wide.task, wide.a, other, splits=("train", "test")) for other in (wide.aligned, wide.b)
    )
    assert train.loss.height <= 0.014
    assert test.loss.height <= 0.01
    assert train_naive.loss.height > 0.7
    assert test_naive.loss.height > 0.6


# --- BatchNorm --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_batch_norm_needs_both_matching_and_new_statistics() -> None:
    wide = pair(digits_task(partial(Residual, 32)), residual(32, 0, 7), residual(32, 1, 7))
    assert midpoint(wide, wide.aligned) < 0.45
    assert midpoint(wide, wide.b, "bn") <= 0.5
    assert midpoint(wide, wide.aligned, "bn") >= 0.93
    assert midpoint(wide, wide.aligned, "repair") >= 0.93
    # The re-ordered model itself is as good as before: running statistics moved with their channels.
    accuracies = [found.accuracy for found in evaluate({"b": wide.b, "aligned": wide.aligned}, [wide.task])]
    assert accuracies[0] == accuracies[1]


# --- networks of others -----------------------------------------------------------------------------------------------


def lenets(name: str, files: str, examples: int) -> Pair:
    with np.load(DATA / "digits" / f"{name}.npz") as file:
        arrays = {key: file[key][:examples] for key in file.files}

    def prepared(split: str) -> tuple[Tensor, Tensor]:
        x = torch.from_numpy(arrays[f"x_{split}"]).float()[:, None] / 127.5 - 1
        x = x if x.shape[-1] == 32 else nn.functional.interpolate(x, size=32, mode="bilinear")
        return x.expand(-1, 3, -1, -1), torch.from_numpy(arrays[f"y_{split}"])

    train, test = prepared("train"), prepared("test")
    task = Task(name, LeNet, lambda: [train], test=lambda: list(zip(*(part.split(250) for part in test), strict=True)))
    a, b = (load_file(DATA / "checkpoints" / "digits_lenet" / f"{files}_{letter}.safetensors") for letter in "ab")
    return pair(task, a, b)


needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real networks and digits are not in ../shared/data")


@needs_data
@pytest.mark.parametrize(
    ("name", "files", "highest_naive", "matched", "repaired"),
    [("mnist", "mnist", 0.7, 0.985, 0.985), ("svhn_gray", "svhn", 0.4, 0.89, 0.91)],
)
def test_the_mean_of_two_strangers_networks_works_after_matching(
    name: str, files: str, highest_naive: float, matched: float, repaired: float
) -> None:
    strangers = lenets(name, files, 1000)
    assert strangers.ratio <= 0.875
    assert midpoint(strangers, strangers.b) < highest_naive
    assert midpoint(strangers, strangers.aligned) >= matched
    assert midpoint(strangers, strangers.aligned, "repair") >= repaired
