"""TALL masks, consensus, EMR and PCB merging: their authors' programs in plain numpy, identities, and edges."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from graftwork.merge import load_recipe, make_plan, merge
from graftwork.merge.errors import RecipeError
from graftwork.merge.memory import merge_arrays
from tests.contract.table import merged

GENERATOR = np.random.default_rng(21)
BASE = GENERATOR.normal(size=(30, 20))
CHANGES = GENERATOR.normal(size=(3, 30, 20)) * 0.1
MODELS = [BASE + change for change in CHANGES]


def change(method, changes=CHANGES, **parameters):
    return merged(method, np.zeros(changes[0].shape), list(changes), parameters)


def test_threshold_zero_is_the_sum_and_one_beyond_all_tasks_the_base():
    np.testing.assert_allclose(change("consensus_ta", threshold=0, scale=0.3), 0.3 * CHANGES.sum(0), rtol=1e-14)
    assert not change("consensus_ta", threshold=5).any()


def test_masks_compare_task_vectors_and_not_weights():
    """A published program forgets to subtract the base: its masks depend on what is merely in the base."""
    total = CHANGES.sum(0)
    masks = [np.abs(own) > 0.5 * np.abs(total - own) for own in CHANGES]
    expected = BASE + 0.3 * np.where(np.sum(masks, axis=0) >= 2, total, 0)
    found = merged("consensus_ta", BASE, MODELS, {"mask_lambda": 0.5})
    np.testing.assert_allclose(found, expected, atol=1e-14)


def test_masks_are_strict():
    """Two equal changes: each is exactly as large as the others' sum."""
    changes = np.array([[[0.5, 0.25]], [[0.5, 0.25]], [[0.0, 0.0]]])
    assert not change("consensus_ta", changes, mask_lambda=1.0, threshold=1).any()
    assert change("consensus_ta", changes, mask_lambda=0.99, threshold=2).all()


def test_consensus_ties_needs_what_the_trimmed_sum_shows():
    found = change("consensus_ties", density=0.3, scope="tensor", scale=1.0, threshold=0)
    summed = change("ties", weight=1.0, density=0.3, normalize=False)
    np.testing.assert_allclose(found, summed, rtol=1e-13)
    some = change("consensus_ties", density=0.3, scope="tensor", scale=1.0, threshold=2)
    masks = [np.abs(own) > 0.4 * np.abs(summed - own) for own in CHANGES]
    np.testing.assert_allclose(some, np.where(np.sum(masks, axis=0) >= 2, summed, 0), atol=1e-15)


def test_tall_masks_of_ties_adds_what_ties_adds():
    found = change("tall_masks", **{"from": "ties", "density": 0.3, "scope": "tensor", "scale": 0.5})
    np.testing.assert_allclose(found, 0.5 * change("ties", weight=1.0, density=0.3, normalize=False), rtol=1e-13)


def published_emr(changes):
    """The authors' election: the sign of the sum, and the largest entry that has it."""
    sign = np.where(changes.sum(0) > 0, 1.0, -1.0)
    agreeing = np.where(changes * sign > 0, np.abs(changes), 0)
    return agreeing.max(0) * sign


def test_emr_is_the_published_program():
    np.testing.assert_array_equal(change("emr"), published_emr(CHANGES))


def test_emr_of_changes_that_cancel_elects_minus():
    changes = np.array([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(change("emr", changes), [-1.0, -1.0, 0.0])


def published_pcb(changes, ratio):
    """The authors' program over one flat vector per task, in float64."""
    flat = changes.reshape(len(changes), -1)
    length = flat.shape[1]
    clipped = np.empty_like(flat)
    for own, target in zip(flat, clipped, strict=True):
        ordered = np.sort(np.abs(own))
        low, high = ordered[int(0.0001 * length)], ordered[int((1 - 0.0001) * length - 1)]
        target[:] = np.sign(own) * np.clip(np.abs(own), low, high)
    size = np.abs(clipped)
    low, high = size.min(1, keepdims=True), size.max(1, keepdims=True)
    score = np.exp(len(flat) * ((size - low) / (high - low)) ** 2) * np.tanh(flat * flat.sum(0))
    cut = np.sort(score, axis=1)[:, int((1 - ratio) * length)][:, None]
    weight = np.maximum(0, (score - cut) / (score.max(1, keepdims=True) - cut))
    return ((weight * clipped).sum(0) / np.maximum(weight.sum(0), 1e-12)).reshape(changes.shape[1:])


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.7, 1.0])
def test_pcb_is_the_published_program(ratio):
    """To the rounding of scores to float32, which counts where all weights of an entry are tiny."""
    found, wanted = change("pcb", ratio=ratio), published_pcb(CHANGES, ratio)
    assert np.count_nonzero(np.abs(found - wanted) > 1e-6) <= 2
    assert np.array_equal(found != 0, wanted != 0)


def test_pcb_without_a_share_gives_the_base():
    assert not change("pcb", ratio=0.0).any()


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3,)])
def test_pcb_of_very_few_entries_is_finite(shape):
    changes = GENERATOR.normal(size=(3, *shape))
    for ratio in (0.0, 0.1, 0.5, 1.0):
        found = change("pcb", changes, ratio=ratio)
        assert found.shape == shape
        assert np.isfinite(found).all()


def test_pcb_of_equal_scores_gives_the_base():
    assert not change("pcb", np.full((3, 8), 0.5)).any()


def test_pcb_ranks_over_the_whole_model_unless_asked_otherwise():
    names = ("first", "second")
    sizes = {"first": 0.01, "second": 1.0}
    base = {name: ("F64", np.zeros(500)) for name in names}
    models = [{name: ("F64", GENERATOR.normal(size=500) * sizes[name]) for name in names} for _ in range(3)]
    whole = merge_arrays("pcb", models, base, parameters={"ratio": 0.1})
    apart = merge_arrays("pcb", models, base, parameters={"ratio": 0.1, "scope": "tensor"})
    assert np.count_nonzero(whole["first"]) < 20 < np.count_nonzero(apart["first"])


def recipe(folder, method, **more):
    for name, values in (("base", BASE), *((f"model{number}", model) for number, model in enumerate(MODELS))):
        tensors = {f"layers.{layer}.weight": values.astype(np.float32) for layer in range(3)}
        save_file(tensors, folder / f"{name}.safetensors")
    content = {"merge_method": method, "base_model": str(folder / "base.safetensors")}
    content["models"] = [{"model": str(folder / f"model{number}.safetensors")} for number in range(3)]
    path = folder / "recipe.yml"
    path.write_text(json.dumps({**content, **more}))
    return path


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("pcb", {"ratio": 1.5}, r"parameters\.ratio: must be from 0 to 1"),
        ("consensus_ta", {"threshold": -1}, r"parameters\.threshold: must be at least 0"),
        ("consensus_ta", {"threshold": 1.5}, r"parameters\.threshold: must be a whole number"),
        ("consensus_ties", {"density": 2}, r"parameters\.density: must be from 0 to 1"),
        ("tall_masks", {"from": "sums"}, r'parameters\.from: .* did you mean "sum"'),
        ("tall_masks", {"mask_lambda": -0.1}, r"parameters\.mask_lambda: must be at least 0"),
        ("emr", {"rescale_by": "entries"}, r'parameters\.rescale_by: .* did you mean "entry"'),
        ("iso_cts", {"common_fraction": 2}, r"parameters\.common_fraction: must be from 0 to 1"),
        ("tsv_m", {"scale": "big"}, r"parameters\.scale: must be a number"),
    ],
)
def test_wrong_parameters_are_refused_in_one_line(tmp_path, method, parameters, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(recipe(tmp_path, method, parameters=parameters))
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(("method", "name"), [("pcb", "ratio"), ("consensus_ties", "density")])
def test_shares_of_a_whole_model_are_one_number(tmp_path, method, name):
    file = load_recipe(recipe(tmp_path, method, parameters={name: [0.1, 0.5]}))
    with pytest.raises(RecipeError, match=f"`scope: model` {name} must be the same"):
        make_plan(file.recipes[0])


def test_a_threshold_that_no_entry_can_reach_is_remarked_on(tmp_path):
    result = merge(recipe(tmp_path, "consensus_ta", parameters={"threshold": 5}), tmp_path / "out.safetensors")
    assert "above the number of models" in result.notes[0]


def test_models_with_masks_are_not_renormalised(tmp_path):
    with pytest.raises(RecipeError, match='renormalize: does not go with "emr"'):
        load_recipe(recipe(tmp_path, "emr", renormalize={"method": "bn", "task": "x.py:y"}))
