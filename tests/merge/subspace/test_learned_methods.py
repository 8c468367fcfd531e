"""Tests of the methods that use a learned mask: against the formula in float64, on both executors, and from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.special import expit

from graftwork.merge import load_recipe, merge
from graftwork.merge.checkpoint import Checkpoint
from graftwork.merge.errors import GraftworkError
from graftwork.merge.memory import merge_arrays
from graftwork.merge.subspace import LearnedMerge, learn_merge
from graftwork.merge.task import fit
from tests.merge.subspace.problems import Normed, Problem, problem

GENERATOR = np.random.default_rng(3)
SHAPE = (301, 257)
BASE = GENERATOR.normal(size=SHAPE)
MODELS = [BASE + GENERATOR.normal(size=SHAPE) * size for size in (0.3, 0.2, 0.4)]
LOGITS = GENERATOR.normal(size=SHAPE) * 3
LAMBDA = np.array([[0.3, 0.1], [0.2, 0.4], [0.5, -0.1]])
CONCRETE = ("concrete_task_arithmetic", "concrete_adamerging")


def merged(method: str, device: str = "cpu", *, logits: Any = LOGITS, dtype: str = "F64", base: Any = BASE,
           models: Any = None, parameters: Any = None, **metadata: str) -> Any:  # fmt: skip
    kinds = {"F64": np.float64, "F32": np.float32}
    stored = [{"w": (dtype, model.astype(kinds[dtype]))} for model in (MODELS if models is None else models)]
    mask = {"lambda": ("F64", LAMBDA)}
    if method in CONCRETE:
        mask["w.logit"] = ("F32", np.asarray(logits, np.float32))
    if metadata.get("trimmed") == "true":
        mask["trim"] = ("F32", np.array([0.2, 0.3, 0.25], np.float32))
    known = {
        "method": metadata.pop("made_for", method),
        "layers": '["other","w"]',
        "temperature": "0.5",
        "mask_kind": "expected",
        **metadata,
    }
    below = {"w": (dtype, base.astype(kinds[dtype]))}
    return merge_arrays(method, stored, below, shared={"mask": mask}, metadata={"mask": known}, device=device,
                        parameters=parameters)["w"]  # fmt: skip


def formula(mask: Any, coefficients: Any = LAMBDA[:, 1], models: Any = None) -> Any:
    vectors = [model - BASE for model in (MODELS if models is None else models)]
    change = sum(factor * vector for factor, vector in zip(coefficients, vectors, strict=True))
    return BASE + mask / mask.mean() * change


@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
@pytest.mark.parametrize("method", CONCRETE)
def test_the_expected_mask_is_applied_as_the_formula_says(method: str, device: str) -> None:
    expected = formula(expit(LOGITS.astype(np.float32).astype(np.float64)))
    assert np.abs(merged(method, device) - expected).max() < 1e-12
    assert np.abs(merged(method, device, dtype="F32") - expected).max() < 2e-6


@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
def test_the_thresholded_mask_keeps_positive_logits(device: str) -> None:
    found = merged("concrete_adamerging", device, parameters={"mask_kind": "threshold"})
    assert np.abs(found - formula((LOGITS > 0).astype(float))).max() < 1e-12
    assert np.array_equal(found, merged("concrete_adamerging", device, mask_kind="threshold"))


@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
def test_drawn_masks_have_the_right_mean_and_depend_on_the_seed(device: str) -> None:
    ones = [BASE + 1, BASE + 1, BASE + 1]
    for kind in ("bernoulli", "sample"):
        for logit in (-1.0, 0.5):

            def draw(seed: int) -> Any:
                return merged("concrete_adamerging", device, models=ones, logits=np.full(SHAPE, logit),  # noqa: B023
                              parameters={"mask_kind": kind, "seed": seed}) - BASE  # fmt: skip  # noqa: B023

            change = draw(0)
            # m / mean(m) times the sum of the coefficients: the share of entries above half the largest mask is known.
            assert change.mean() == pytest.approx(LAMBDA[:, 1].sum(), abs=1e-9)
            if kind == "bernoulli":
                assert (change > 1e-9).mean() == pytest.approx(expit(logit), abs=0.005)
            else:
                assert np.unique(change).size > 0.9 * change.size
            assert np.array_equal(change, draw(0))
            assert not np.array_equal(change, draw(1))


@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
def test_executors_draw_the_same_mask(device: str) -> None:
    settings = {"mask_kind": "sample", "seed": 4}
    one, other = (merged("concrete_adamerging", where, parameters=settings) for where in ("cpu", device))
    assert np.abs(one - other).max() < 1e-12


@pytest.mark.parametrize("logit", [30.0, 0.0, -10.0])
def test_equal_logits_are_task_arithmetic(logit: float) -> None:
    found = merged("concrete_adamerging", logits=np.full(SHAPE, logit))
    assert np.abs(found - formula(np.ones(SHAPE))).max() < 1e-6


@pytest.mark.parametrize("method", CONCRETE)
def test_an_empty_mask_gives_the_base(method: str) -> None:
    assert np.array_equal(merged(method, logits=np.full(SHAPE, -40.0)), BASE)
    assert np.array_equal(merged(method, logits=np.full(SHAPE, -1.0), mask_kind="threshold"), BASE)


@pytest.mark.parametrize("method", [*CONCRETE, "adamerging"])
def test_models_that_are_the_base_give_the_base(method: str) -> None:
    assert np.array_equal(merged(method, models=[BASE] * 3), BASE)


def test_lambda_of_the_recipe_replaces_that_of_the_file() -> None:
    found = merged("concrete_task_arithmetic", parameters={"lambda": 0.7})
    expected = formula(expit(LOGITS.astype(np.float32).astype(np.float64)), (0.7, 0.7, 0.7))
    assert np.abs(found - expected).max() < 1e-12


@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
def test_coefficients_alone_and_trimmed(device: str) -> None:
    assert np.abs(merged("adamerging", device) - formula(np.ones(SHAPE))).max() < 1e-12
    vectors = np.stack([model - BASE for model in MODELS])
    kept = np.where(np.abs(vectors) >= np.float32([0.2, 0.3, 0.25])[:, None, None], vectors, 0)
    kept = np.where(kept * kept.sum(0) > 0, kept, 0)
    expected = BASE + np.tensordot(LAMBDA[:, 1], kept, 1)
    assert np.abs(merged("adamerging", device, trimmed="true") - expected).max() < 1e-12


def test_a_tensor_that_the_file_does_not_know_is_the_mean() -> None:
    found = merged("adamerging", layers='["other","another"]')
    assert np.abs(found - np.mean(MODELS, 0)).max() < 1e-12


def test_a_file_for_another_method_or_number_of_models_is_refused() -> None:
    with pytest.raises(GraftworkError, match="learned for adamerging; write `merge_method: adamerging`"):
        merged("concrete_adamerging", made_for="adamerging")
    with pytest.raises(GraftworkError, match="coefficients of 3 models, the recipe names 2"):
        merged("adamerging", models=MODELS[:2])


# ---------------------------------------------------------------------------------------------------------------------
# From files


def learned_in(folder: Path, given: Problem, **settings: Any) -> LearnedMerge:
    names = ["base", *(f"e{number}" for number in range(len(given.experts)))]
    for name, state in zip(names, (given.base, *given.experts), strict=True):
        save_file(state, folder / f"{name}.safetensors")
    paths = [folder / f"{name}.safetensors" for name in names]
    learned = learn_merge(paths[0], paths[1:], given.tasks, steps=30, **settings)
    learned.save(folder / "masks.safetensors")
    recipe = {
        "merge_method": learned.method, "base_model": str(paths[0]), "mask": str(folder / "masks.safetensors"),
        "models": [{"model": str(path)} for path in paths[1:]],
    }  # fmt: skip
    (folder / "recipe.yml").write_text(json.dumps(recipe))
    return learned


@pytest.mark.parametrize(
    "settings",
    [
        {"parametrisation": "task_wise"},
        {"parametrisation": "layer_wise", "trim": 0.3},
        {"parametrisation": "mask"},
        {"parametrisation": "mask", "trim": 0.3},
        {"parametrisation": "mask+layer_wise"},
    ],
)
def test_a_merge_is_what_was_learned(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Network with BatchNorm, a frozen parameter and a tied weight: the merged file against the formula."""
    given = problem(Normed)
    learned = learned_in(tmp_path, given, **settings)
    merge(load_recipe(tmp_path / "recipe.yml"), tmp_path / "out.safetensors")
    output = load_file(tmp_path / "out.safetensors")
    for name, base in given.base.items():
        vectors = torch.stack([expert[name] - base for expert in given.experts]).double()
        if name not in learned.layers:
            if base.is_floating_point():
                assert torch.allclose(output[name].double(), base + vectors.mean(0), atol=1e-6)
            else:
                assert torch.equal(output[name], base)
            continue
        if learned.trim is not None:
            least = torch.from_numpy(learned.trim).view(-1, *[1] * base.ndim)
            vectors = torch.where(vectors.abs() >= least, vectors, torch.zeros(()).double())
            vectors = torch.where(vectors * vectors.sum(0) > 0, vectors, torch.zeros(()).double())
        column = learned.layers.index(name) if learned.coefficients.shape[1] > 1 else 0
        factors = torch.from_numpy(learned.coefficients[:, column]).double()
        change = torch.tensordot(factors, vectors, 1)
        if learned.logits:
            mask = torch.from_numpy(learned.logits[name]).double().sigmoid()
            change = mask / mask.mean() * change
        assert torch.allclose(output[name].double(), base + change, atol=1e-6)
    with Checkpoint.open(tmp_path / "out.safetensors") as opened:
        fit(given.tasks[0], opened)
        parents = [parent["name"] for parent in json.loads(opened.metadata["graftwork.parents"])]
    assert "masks.safetensors" in parents


def test_a_mask_for_other_models_is_refused_with_both_digests(tmp_path: Path) -> None:
    given = problem()
    learned_in(tmp_path, given)
    text = (tmp_path / "recipe.yml").read_text()
    (tmp_path / "swapped.yml").write_text(text.replace("e0", "x").replace("e1", "e0").replace("x.", "e1."))
    other = {name: tensor + 1 for name, tensor in given.base.items()}
    save_file(other, tmp_path / "other.safetensors")
    (tmp_path / "based.yml").write_text(text.replace("base.safetensors", "other.safetensors"))
    for name, label in (("swapped", "e1"), ("based", "other")):
        with Checkpoint.open(tmp_path / f"{label}.safetensors") as opened:
            digest = opened.content_digest()[:12]
        with pytest.raises(GraftworkError, match=rf"it was made from \S+ \([0-9a-f]{{12}}\), but \S+ holds {digest}"):
            merge(load_recipe(tmp_path / f"{name}.yml"), tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("out*"))


def test_a_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GraftworkError, match=r'cannot merge "w".*\[301, 257\].*\[3, 3\]'):
        merged("concrete_adamerging", logits=np.zeros((3, 3)))
