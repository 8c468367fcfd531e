"""Task masks: what EMR merging and TALL masks write beside their output, and the models that come back from it."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from graftwork.merge import load_recipe, make_plan, merge, task_masks
from graftwork.merge.artifact import load_artifact
from graftwork.merge.checkpoint import Checkpoint, load_numpy
from graftwork.merge.device import DeviceEngine
from graftwork.merge.engine import Engine
from graftwork.merge.errors import DataError, GraftworkError, MismatchError, OutputError, RecipeError
from graftwork.merge.memory import merge_arrays
from graftwork.merge.run import Settings
from graftwork.merge.task_masks import KIND, place_of, task_tensors
from tests.contract.table import values_of, words_of
from tests.reference import reference_model

SHAPES = {"layers.0.weight": (33, 20), "layers.1.weight": (7, 9), "bias": (5,), "scale": (), "empty": (0, 3)}
TASKS = ("sums", "code", "chat")


def written(folder, dtype="F32", seed=3, count=3, names=TASKS):
    """Write a base and models, one tensor of the last frozen; return them as float64."""
    generator = np.random.default_rng(seed)
    models = {}
    base = {name: generator.normal(size=shape) for name, shape in SHAPES.items()}
    for number, name in enumerate(("base", *names[:count])):
        values = {
            key: value + (generator.normal(size=value.shape) * 0.1 * number if number and key != "bias" else 0.0)
            for key, value in base.items()
        }
        if number == count:
            values["bias"] = base["bias"] + 0.5
        stored = {key: words_of(value, dtype) for key, value in values.items()}
        if dtype == "BF16":
            import torch
            from safetensors.torch import save_file as save_torch

            torches = {
                key: torch.from_numpy(word.view(np.int16).copy()).view(torch.bfloat16) for key, word in stored.items()
            }
            torches["steps"] = torch.tensor([7])
            save_torch(torches, folder / f"{name}.safetensors")
        else:
            save_file({**stored, "steps": np.array([7])}, folder / f"{name}.safetensors")
        models[name] = {key: values_of(word, dtype) for key, word in stored.items()}
    return models


def recipe(folder, method, names=TASKS, **more):
    path = folder / f"{method}.yml"
    content = {"merge_method": method, "base_model": str(folder / "base.safetensors"), **more}
    content["models"] = [{"model": str(folder / f"{name}.safetensors")} for name in names]
    path.write_text(json.dumps(content))
    return path


def back(folder, masks, task, base="base", **more):
    path = folder / "back.yml"
    content = {"merge_method": "task_model", "models": [{"model": str(folder / f"{base}.safetensors")}], **more}
    path.write_text(json.dumps({**content, "task_masks": str(masks), "parameters": {"task": task}}))
    return path


def unpacked(file, task, name, shape):
    size = int(np.prod(shape))
    return np.unpackbits(file.tensors[f"graftwork.mask.{task}.{name}"], count=size, bitorder="little").reshape(shape)


METHODS = (
    ("emr", {}),
    ("emr", {"rescale_by": "tensor"}),
    ("tall_masks", {"mask_lambda": 0.5}),
    ("tall_masks", {"from": "ties", "density": 0.5}),
    ("tall_masks", {"from": "ties", "density": 0.5, "scope": "tensor"}),
)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize(("method", "parameters"), METHODS, ids=[f"{m}-{'-'.join(p)}" for m, p in METHODS])
def test_masks_deltas_and_rescalers_are_the_references(tmp_path, method, parameters, dtype):
    models = written(tmp_path, dtype)
    merge(recipe(tmp_path, method, parameters=parameters), tmp_path / "out")
    file = load_artifact(tmp_path / "out" / "task_masks.safetensors", kind=KIND)
    assert json.loads(file.metadata["tasks"]) == list(TASKS)
    tasks = json.loads(file.metadata["tasks"])
    expected = reference_model(method, models["base"], [models[task] for task in TASKS], scores="float32", **parameters)
    bits = 2.0**-23 if dtype == "F32" else 2.0**-8
    for name, shape in SHAPES.items():
        details = expected[name].details
        delta = file.tensors[f"graftwork.delta.{name}"].astype(np.float64)
        np.testing.assert_allclose(delta, details["delta"], rtol=bits, atol=1e-30)
        for number, task in enumerate(tasks):
            mask = unpacked(file, task, name, shape)
            assert np.array_equal(mask, details["masks" if method == "emr" else "kept"][number])
    rescale = expected["bias"].details.get("rescale", np.ones(3))
    np.testing.assert_allclose(file.tensors["graftwork.rescale"], rescale, rtol=2.0**-23)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("method", ["emr", "tall_masks"])
def test_a_recipe_and_a_call_give_a_tasks_model_back(tmp_path, method, dtype):
    models = written(tmp_path, dtype)
    merge(recipe(tmp_path, method), tmp_path / "out")
    masks = tmp_path / "out" / "task_masks.safetensors"
    file = load_artifact(masks, kind=KIND)
    details = {
        name: result.details
        for name, result in reference_model(method, models["base"], [models[task] for task in TASKS]).items()
    }
    for number, task in enumerate(json.loads(file.metadata["tasks"])):
        merge(back(tmp_path, masks, task), tmp_path / "task.safetensors", force=True)
        found = load_numpy(Checkpoint.open(tmp_path / "task.safetensors"))
        base = load_numpy(Checkpoint.open(tmp_path / "base.safetensors"))
        called = task_tensors(base, masks, task)
        factor = details["bias"].get("rescale", np.ones(3))[number]
        for name in SHAPES:
            mask = details[name]["masks" if method == "emr" else "kept"][number]
            expected = models["base"][name] + factor * mask * details[name]["delta"]
            ulp = 2.0**-23 if dtype == "F32" else 2.0**-8
            np.testing.assert_allclose(found[name], expected, rtol=ulp, atol=2 * ulp * 0.3)
            np.testing.assert_allclose(called[name], found[name], rtol=ulp)
        assert np.array_equal(found["steps"], [7])


def test_emr_keeps_the_size_of_every_tasks_change(tmp_path):
    models = written(tmp_path)
    merge(recipe(tmp_path, "emr"), tmp_path / "out")
    masks = load_artifact(tmp_path / "out" / "task_masks.safetensors", kind=KIND)
    assert np.all(masks.tensors["graftwork.rescale"] <= 1)
    for number, task in enumerate(json.loads(masks.metadata["tasks"])):
        restored = task_tensors(models["base"], masks, task)
        size = sum(np.abs(restored[name] - models["base"][name]).sum() for name in SHAPES)
        own = sum(np.abs(models[TASKS[number]][name] - models["base"][name]).sum() for name in SHAPES)
        assert np.isclose(size, own, rtol=1e-6)


def test_one_task_comes_back_as_it_was(tmp_path):
    models = written(tmp_path, count=1)
    merge(recipe(tmp_path, "emr", TASKS[:1]), tmp_path / "out")
    masks = load_artifact(tmp_path / "out" / "task_masks.safetensors", kind=KIND)
    (task,) = json.loads(masks.metadata["tasks"])
    restored = task_tensors(models["base"], masks, task)
    for name in SHAPES:
        np.testing.assert_allclose(restored[name], models[TASKS[0]][name], atol=1e-6)


def test_tasks_are_masked_in_several_passes_if_they_are_many(tmp_path, monkeypatch):
    written(tmp_path)
    merge(recipe(tmp_path, "emr"), tmp_path / "one")
    monkeypatch.setattr(task_masks, "_AT_ONCE", 2)
    merge(recipe(tmp_path, "emr"), tmp_path / "two")
    one, two = ((tmp_path / name / "task_masks.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_threads_and_executors_write_the_same_masks(tmp_path):
    generator = np.random.default_rng(4)
    for name in ("base", *TASKS):  # more than one span, and not a whole number of bytes
        save_file({"a": generator.normal(size=(700, 401)).astype(np.float32)}, tmp_path / f"{name}.safetensors")
    digests = set()
    for number, settings in enumerate((Settings(threads=1), Settings(threads=3))):
        out = tmp_path / f"out{number}"
        merge(recipe(tmp_path, "emr"), out, settings=settings)
        digests.add((out / "task_masks.safetensors").read_bytes())
    assert len(digests) == 1


@pytest.mark.parametrize(("method", "parameters"), METHODS[:1] + METHODS[3:4], ids=["emr", "tall_masks"])
def test_the_engine_for_devices_writes_the_same_file(tmp_path, method, parameters):
    written(tmp_path)
    plan = make_plan(load_recipe(recipe(tmp_path, method, parameters=parameters)).recipes[0])
    for name, engine in (("compiled", Engine), ("tensors", partial(DeviceEngine, device="cpu"))):
        path = tmp_path / f"{name}.safetensors"
        task_masks.write_task_masks(plan, path, [], lambda sink, make=engine: make(plan.checkpoints, sink, plan.labels))
    plan.close()
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("compiled", "tensors"))
    for name, values in one.items():
        np.testing.assert_allclose(other[name], values, rtol=2.0**-23)


def test_both_executors_give_the_same_model_back():
    generator = np.random.default_rng(2)
    shape = (300, 301)  # more than one span of a mask, and bits over
    base = {"w": ("F32", generator.normal(size=shape).astype(np.float32))}
    bits = np.packbits(generator.integers(0, 2, shape).reshape(-1), bitorder="little")
    masks = {
        "graftwork.delta.w": ("F32", generator.normal(size=shape).astype(np.float32)),
        "graftwork.mask.x.w": ("U8", bits), "graftwork.rescale": ("F32", np.array([0.7], np.float32)),
    }  # fmt: skip
    for device in ("cpu", "torch:cpu"):
        found = merge_arrays(
            "task_model", [base], parameters={"task": "x"}, shared={"task_masks": masks}, device=device,
            metadata={"task_masks": {"tasks": '["x"]'}}, span=65_536, threads=2,
        )["w"]  # fmt: skip
        kept = np.unpackbits(bits, count=300 * 301, bitorder="little").reshape(shape)
        wanted = base["w"][1] + np.float64(np.float32(0.7)) * kept * masks["graftwork.delta.w"][1].astype(np.float64)
        np.testing.assert_array_equal(found, wanted.astype(np.float32))


def test_a_single_file_has_its_masks_beside_it(tmp_path):
    written(tmp_path)
    out = tmp_path / "unified.safetensors"
    result = merge(recipe(tmp_path, "emr"), out)
    assert place_of(out) == tmp_path / "unified.task_masks.safetensors"
    assert load_artifact(place_of(out), kind=KIND).parents[0]["quick"]
    assert any("task_model" in note for note in result.notes)
    assert not (tmp_path / "unified.safetensors.partial").exists()
    out.unlink()
    with pytest.raises(OutputError, match=r"task_masks\.safetensors: it exists"):
        merge(recipe(tmp_path, "emr"), out)
    merge(recipe(tmp_path, "emr"), out, force=True)


def test_a_folder_with_masks_is_the_merged_model(tmp_path):
    written(tmp_path)
    merge(recipe(tmp_path, "emr"), tmp_path / "out")
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert set(checkpoint.tensors) == {*SHAPES, "steps"}
        assert not checkpoint.notes


def test_the_file_names_its_own_digest_and_its_parents(tmp_path):
    written(tmp_path)
    merge(recipe(tmp_path, "emr"), tmp_path / "out")
    with Checkpoint.open(tmp_path / "out" / "task_masks.safetensors") as file:
        assert file.metadata["graftwork.digest"] == file.content_digest()
    file = load_artifact(tmp_path / "out" / "task_masks.safetensors", kind=KIND)
    with Checkpoint.open(tmp_path / "base.safetensors") as base:
        assert file.parents[0]["digest"] == base.content_digest()
    assert len(file.parents) == 4
    assert load_file(tmp_path / "out" / "task_masks.safetensors")  # plain safetensors


def test_an_interrupted_merge_makes_its_masks_anew(tmp_path, monkeypatch):
    written(tmp_path)
    merge(recipe(tmp_path, "emr"), tmp_path / "whole")

    def fails(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(task_masks, "_write_all", fails)
    with pytest.raises(OutputError, match="No space left"):
        merge(recipe(tmp_path, "emr"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists()
    monkeypatch.undo()
    merge(recipe(tmp_path, "emr"), tmp_path / "out")
    names = ("task_masks.safetensors", "model.safetensors")
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def refused(error, match, path, out):
    with pytest.raises(error, match=match) as caught:
        merge(path, out)
    assert len(caught.value.problems) == 1
    assert not out.exists()


def test_what_cannot_be_given_back_is_refused_in_one_line(tmp_path):
    written(tmp_path)
    merge(recipe(tmp_path, "emr"), tmp_path / "out")
    masks = tmp_path / "out" / "task_masks.safetensors"
    out = tmp_path / "task.safetensors"
    refused(MismatchError, 'no task "codes"; did you mean', back(tmp_path, masks, "codes"), out)
    refused(MismatchError, 'no task "x"; it has "', back(tmp_path, masks, "x"), out)
    refused(GraftworkError, "it was made from base", back(tmp_path, masks, "code", base="chat"), out)
    path = back(tmp_path, masks, "code")
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "task_masks"}))
    refused(RecipeError, "task_masks: is missing", path, out)
    path.write_text(json.dumps({**json.loads(recipe(tmp_path, "linear").read_text()), "task_masks": str(masks),
                                "parameters": {"weight": 1.0}}))  # fmt: skip
    refused(RecipeError, '"linear" uses no task_masks', path, out)
    with pytest.raises(MismatchError, match='no such task; did you mean "'):
        task_tensors({}, masks, "codes")


def test_slices_have_no_masks(tmp_path):
    written(tmp_path)
    path = tmp_path / "sliced.yml"
    models = [{"model": str(tmp_path / f"{name}.safetensors"), "layer_range": [0, 2]} for name in ("base", "code")]
    base = {"base_model": str(tmp_path / "base.safetensors")}
    path.write_text(json.dumps({"merge_method": "emr", **base, "slices": [{"sources": models}]}))
    refused(RecipeError, "whole models", path, tmp_path / "out")


def test_a_model_that_is_not_finite_leaves_nothing(tmp_path):
    models = written(tmp_path)
    broken = {key: value.astype(np.float32) for key, value in models["code"].items()}
    broken["layers.0.weight"][1, 2] = np.inf
    save_file({**broken, "steps": np.array([7])}, tmp_path / "code.safetensors")
    refused(DataError, 'cannot merge "layers.0.weight": code', recipe(tmp_path, "emr"), tmp_path / "out")


def test_recipes_of_task_models_are_readable(tmp_path):
    written(tmp_path)
    merge(recipe(tmp_path, "emr"), tmp_path / "out")
    file = load_recipe(back(tmp_path, tmp_path / "out" / "task_masks.safetensors", "code"))
    assert '"task_masks":"task_masks.safetensors"' in file.recipes[0].canonical()
