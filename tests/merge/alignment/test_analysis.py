"""Tests of the analysis of an alignment: closed forms, and what no permutation can change."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graftwork.merge.alignment import analysis as home
from graftwork.merge.alignment.analysis import (
    Analysis,
    agreement,
    analyse,
    calibrate,
    check_singular_values,
    counted_tensors,
    cross_entropy,
    decompose,
    decompose_all,
    fit_temperature,
)
from graftwork.merge.alignment.apply import apply_permutation, inverse, random_permutation
from graftwork.merge.alignment.spec import PermutationSpec
from graftwork.merge.errors import DataError, MismatchError, TaskError
from graftwork.merge.task import Task

SPEC = PermutationSpec.from_json(
    """{"groups": {"hidden": {"size": 12}},
        "tensors": {"0.weight": ["hidden", null], "0.bias": ["hidden"], "1.running_mean": ["hidden"],
                    "2.weight": [null, "hidden"], "2.bias": [null]},
        "uncounted": ["1.running_mean"]}"""
)


def network(seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (12, 7), "0.bias": (12,), "1.running_mean": (12,), "2.weight": (3, 12), "2.bias": (3,)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def rotation(size: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64))[0]


def with_values(left: Tensor, values: list[float], right: Tensor) -> dict[str, Tensor]:
    return {"w": left[:, : len(values)] @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right[: len(values)]}


def compared(a: dict[str, Tensor], b: dict[str, Tensor], *gammas: float) -> Any:
    return agreement(decompose_all(a, a), decompose_all(b, b), gammas or home.GAMMAS)


def test_a_copy_whose_units_are_shuffled_is_aligned_completely() -> None:
    a = network(1)
    shuffle = random_permutation(SPEC, 3)
    result = analyse(SPEC, a, apply_permutation(SPEC, shuffle, a), inverse(SPEC, shuffle))
    assert result.after == 0
    assert result.ratio == 0
    assert result.agreement_after.rho == pytest.approx(1, abs=1e-12)
    assert result.agreement_before.rho < 0.5
    assert all(value == pytest.approx(1, abs=1e-12) for value in result.agreement_after.directions.values())
    assert result.singular_value_change < 1e-12


def test_without_a_permutation_nothing_changes() -> None:
    result = analyse(SPEC, network(1), network(2), {})
    assert result.before == result.after > 0
    assert result.ratio == 1
    assert result.agreement_before == result.agreement_after


def test_distances_are_those_of_float64_over_the_counted_tensors() -> None:
    a, b = network(1), network(2)
    permutation = random_permutation(SPEC, 5)
    aligned = apply_permutation(SPEC, permutation, b)
    result = analyse(SPEC, a, b, permutation)
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert [tensor.name for tensor in result.tensors] == names == counted_tensors(SPEC, a)
    for tensor in result.tensors:
        difference = (a[tensor.name].double() - aligned[tensor.name].double()).flatten()
        assert tensor.after == pytest.approx(float(difference.norm()), rel=1e-14)
        assert tensor.norm == pytest.approx(float(a[tensor.name].double().norm()), rel=1e-14)
    whole = torch.cat([(a[name].double() - b[name].double()).flatten() for name in names])
    assert result.before == pytest.approx(float(whole.norm()), rel=1e-14)
    assert result.record()["reduction"] == 1 - result.ratio
    by_name = {tensor.name: tensor for tensor in result.tensors}
    assert by_name["0.bias"].spectrum is None
    values = [torch.linalg.svdvals(model["0.weight"].double()) for model in (a, b)]
    assert by_name["0.weight"].spectrum == pytest.approx(float((values[0] - values[1]).norm() / values[0].norm()))


def test_equal_directions_agree_whatever_the_singular_values() -> None:
    u, v = rotation(6, 1), rotation(8, 2)
    a, b = with_values(u, [4.0, 2.0, 1.0], v), with_values(u, [9.0, 5.0, 0.5], v)
    found = compared(a, b, 0.0, 0.1, 0.3)
    assert found.rho == pytest.approx(1)
    assert found.directions[0.0] == pytest.approx(1)
    # Above 0.1 are three of a and two of b, both of which have a partner: 2 / min(3, 2).
    assert found.directions[0.1] == pytest.approx(1)
    assert found.directions[0.3] == pytest.approx(1)


def test_large_directions_may_agree_while_small_ones_do_not() -> None:
    u, v = rotation(6, 1), rotation(8, 2)
    turned = u.clone()
    turned[:, 1], turned[:, 2] = u[:, 2], -u[:, 1]  # the second and third left vectors are others' now
    a, b = with_values(u, [4.0, 2.0, 1.0], v), with_values(turned, [4.0, 2.0, 1.0], v)
    found = compared(a, b, 0.0, 0.3, 0.9)
    assert found.directions[0.9] == pytest.approx(1)
    assert found.directions[0.0] == pytest.approx(1 / 3)
    assert found.directions[0.3] == pytest.approx(1 / 2)
    assert found.rho == pytest.approx(16 / (16 + 4 + 1))


def test_opposite_models_disagree_and_orthogonal_ones_do_neither() -> None:
    u, v = rotation(6, 1), rotation(8, 2)
    a = with_values(u, [4.0, 2.0], v)
    opposite, orthogonal = {"w": -a["w"]}, with_values(u[:, 3:], [4.0, 2.0], v[3:])
    assert compared(a, opposite).rho == pytest.approx(-1)
    assert compared(a, opposite, 0.0).directions[0.0] == pytest.approx(-1)
    assert compared(a, orthogonal).rho == pytest.approx(0, abs=1e-12)
    assert compared(a, orthogonal, 0.0).directions[0.0] == pytest.approx(0, abs=1e-12)


def test_sums_run_over_all_tensors() -> None:
    u, v = rotation(6, 1), rotation(8, 2)
    same, other = with_values(u, [4.0, 2.0], v)["w"], with_values(u[:, 3:], [4.0, 2.0], v[3:])["w"]
    found = compared({"x": same, "y": same}, {"x": same, "y": other}, 0.0)
    assert found.directions[0.0] == pytest.approx(2 / 4)
    assert found.rho == pytest.approx(1 / 2)


def test_rho_is_the_inner_product_by_the_bound_of_von_neumann() -> None:
    a, b = network(1), network(2)
    names = ["0.weight", "2.weight"]
    inner = sum(float((a[name].double() * b[name].double()).sum()) for name in names)
    values = [[torch.linalg.svdvals(model[name].double()) for name in names] for model in (a, b)]
    bound = sum(float(one @ two) for one, two in zip(*values, strict=True))
    assert compared(a, b).rho == pytest.approx(inner / bound, rel=1e-12)


def test_directions_that_are_zero_but_for_rounding_do_not_count() -> None:
    matrix = with_values(rotation(6, 1), [3.0, 1.0], rotation(8, 2))["w"]
    assert decompose(matrix).rank(0.0) == 2
    assert decompose(torch.zeros(4, 5)).rank(0.0) == 0


def test_a_convolution_is_the_matrix_of_its_first_axis_and_all_others() -> None:
    kernel = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    wanted = torch.linalg.svdvals(kernel.double().flatten(1))
    assert np.allclose(decompose(kernel).values, wanted.numpy(), rtol=1e-13)


def test_of_large_matrices_the_largest_directions_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(60, 90, generator=torch.Generator().manual_seed(0))
    whole = decompose(matrix)
    monkeypatch.setattr(home, "LARGEST", 50)
    monkeypatch.setattr(home, "DIRECTIONS", 8)
    part, again = decompose(matrix), decompose(matrix)
    assert not part.is_whole
    assert np.allclose(part.values, whole.values[:8], rtol=1e-10)
    assert np.allclose(np.abs((part.left * whole.left[:, :8]).sum(0)), 1, atol=1e-8)
    assert np.allclose(np.abs((part.right * whole.right[:8]).sum(1)), 1, atol=1e-8)
    assert np.array_equal(part.left, again.left)
    result = agreement({"w": part}, {"w": part})
    assert result.rho == pytest.approx(1)
    assert list(result.directions.values()) == pytest.approx([1] * 6)


def test_what_is_no_permutation_is_found_out_by_its_singular_values() -> None:
    weight = network(1)["0.weight"]
    wrong = weight.clone()
    wrong[0] = wrong[1]
    with pytest.raises(MismatchError, match=r'changed singular values of "0\.weight" by .* look at its spec'):
        check_singular_values("0.weight", decompose(weight), decompose(wrong))
    assert 0 < check_singular_values("0.weight", decompose(weight), decompose(weight * (1 + 1e-7))) < 1e-6


def test_every_tensor_is_told_of() -> None:
    told: list[tuple[int, int]] = []
    analyse(SPEC, network(1), network(2), {}, progress=lambda done, of: told.append((done, of)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_tied_names_count_once() -> None:
    spec = PermutationSpec.from_json('{"tensors": {"a": [null, "r"], "b": [null, "r"]}, "tied": {"b": "a"}}',
                                     shapes={"a": (3, 4), "b": (3, 4)})  # fmt: skip
    values = torch.ones(3, 4)
    assert counted_tensors(spec, {"a": values, "b": values}) == ["a"]


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (
            network(1),
            {**network(2), "0.weight": torch.ones(13, 7)},
            MismatchError,
            r'\[12, 7\] in "A" and \[13, 7\] in "B"',
        ),
        (network(1), {**network(2), "extra": torch.ones(3)}, MismatchError, 'only "B" has "extra"'),
        (network(1), {**network(2), "2.bias": torch.full((3,), math.nan)}, DataError, 'measure "B": .* "2.bias"'),
        ({"x": torch.ones(2)}, {"x": torch.ones(2)}, MismatchError, "counts none of their tensors"),
    ],
)
def test_what_cannot_be_analysed_is_one_line(
    a: dict[str, Tensor], b: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        analyse(SPEC, a, b, {})
    assert "\n" not in str(caught.value)


def test_the_record_holds_plain_numbers() -> None:
    result = analyse(SPEC, network(1), network(2), {})
    assert isinstance(result, Analysis)
    record = result.record()
    assert set(record["directions"]["a_aligned"]) == {"0", "0.1", "0.3", "0.5", "0.7", "0.9"}
    assert set(record["rho"]) == {"a_b", "a_aligned", "merged_a", "merged_aligned"}


# --- temperature ------------------------------------------------------------------------------------------------------


def test_the_temperature_of_two_classes_is_the_closed_form() -> None:
    # Seven of ten are right by a margin of 2: σ(2/T) = 0.7.
    logits = np.tile([[2.0, 0.0]], (10, 1))
    labels = np.array([0] * 7 + [1] * 3)
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(2 / math.log(0.7 / 0.3), rel=1e-10)
    wanted = -(0.7 * math.log(0.7) + 0.3 * math.log(0.3))
    assert cross_entropy(logits / temperature, labels) == pytest.approx(wanted, rel=1e-10)


def test_scaling_logits_scales_the_temperature() -> None:
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(200, 5)), random.integers(0, 5, 200)
    logits[np.arange(200), labels] += 1
    assert fit_temperature(7 * logits, labels) == pytest.approx(7 * fit_temperature(logits, labels), rel=1e-9)


def test_a_temperature_has_bounds() -> None:
    right = np.array([[5.0, 0.0], [0.0, 5.0]])
    assert fit_temperature(right, np.array([0, 1])) == home.COLDEST
    assert fit_temperature(right, np.array([1, 0])) == home.HOTTEST
    assert math.isnan(fit_temperature(right * math.nan, np.array([1, 0])))


class Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_calibration_is_fitted_on_validation_and_judged_on_test() -> None:
    values = torch.tensor([[2.0, 0.0]])
    held, judged = torch.tensor([0] * 7 + [1] * 3), torch.tensor([0] * 8 + [1] * 2)
    task = Task(
        "coins",
        Logits,
        batches=list,
        validation=lambda: [(values.expand(5, -1), part) for part in held.split(5)],
        test=lambda: [(values.expand(10, -1), judged)],
    )
    models = {"a": {"scale": torch.tensor([1.0])}, "half": {"scale": torch.tensor([0.5])}}
    first, second = calibrate(task, models)
    temperature = 2 / math.log(0.7 / 0.3)
    assert (first.model, first.split) == ("a", "test")
    assert first.temperature == pytest.approx(temperature)
    assert first.loss == pytest.approx(math.log(math.e**2 + 1) - 0.8 * 2)
    assert first.calibrated == pytest.approx(-0.8 * math.log(0.7) - 0.2 * math.log(0.3))
    # Logits of half the size have another loss, and the same one after calibration.
    assert second.temperature == pytest.approx(temperature / 2)
    assert second.calibrated == pytest.approx(first.calibrated)


def test_tokens_are_examples_and_ignored_labels_are_not() -> None:
    logits = torch.tensor([[2.0] * 12, [0.0] * 12])[None]  # (1, classes, tokens)
    labels = torch.tensor([[0] * 7 + [1] * 3 + [-100] * 2])
    task = Task("text", Logits, batches=list, validation=lambda: [(logits, labels)])
    (found,) = calibrate(task, {"a": Logits().state_dict()})
    assert found.temperature == pytest.approx(2 / math.log(0.7 / 0.3))
    assert found.split == "validation"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": lambda logits, labels: logits.mean()}, "it has a loss of its own"),
        (
            {"validation": lambda: [(torch.ones(2, 2), torch.ones(2, 2))]},
            "labels of its validation split are not classes",
        ),
        ({"validation": lambda: [(torch.ones(2, 2), None)]}, "labels of its validation split are not classes"),
        ({"validation": lambda: [(torch.ones(2, 2), torch.tensor([0, 5]))]}, "IndexError"),
        ({"validation": list}, "its validation split is empty"),
        ({}, "it has no validation data"),
    ],
)
def test_what_cannot_be_calibrated_is_one_line(changes: dict[str, Any], message: str) -> None:
    task = Task(**{"name": "coins", "model": Logits, "batches": list, **changes})
    with pytest.raises(TaskError, match=message) as caught:
        calibrate(task, {"a": Logits().state_dict()})
    assert "\n" not in str(caught.value)
