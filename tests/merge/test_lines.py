"""LiNeS: a factor on the merged task vector that grows with the depth of the layer."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from graftwork.merge import lines, load_recipe, make_plan, merge
from graftwork.merge.errors import RecipeError
from graftwork.merge.methods import registry
from graftwork.merge.recipe_schema import json_schema
from graftwork.merge.run import Settings
from tests.reference import reference_model

LAYERS = 4
SHAPES = {
    "embed.weight": (9, 6),
    **{f"blocks.{layer}.{part}": (6, 5) for layer in range(LAYERS) for part in ("up", "down")},
    "head.bias": (5,),
}
DEPTH = {name: int(name.split(".")[1]) / (LAYERS - 1) if name.startswith("blocks") else 0.0 for name in SHAPES}
NAMES = ("base", "a", "b", "c")
MANY = (
    ("task_arithmetic", {"weight": 0.4}),
    ("ties", {"weight": 1.0, "density": 0.4}),
    ("ties", {"weight": 1.0, "density": 0.4, "scope": "model", "normalize": False}),
    ("dare_linear", {"weight": 1.0, "density": 0.5}),
    ("della", {"weight": 1.0, "density": 0.5}),
    ("breadcrumbs", {"weight": 1.0, "density": 0.5}),
    ("sce", {"select_topk": 0.5}),
    ("ram", {}),
    ("consensus_ta", {}),
    ("consensus_ties", {}),
    ("pcb", {}),
    ("tsv_m", {}),
    ("iso_c", {}),
)
LABELS = [f"{method}{number}" for number, (method, _) in enumerate(MANY)]


@pytest.fixture
def models(tmp_path):
    generator = np.random.default_rng(6)
    base = {name: generator.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    found = {"base": base}
    for name in NAMES[1:]:
        found[name] = {
            key: value + generator.normal(size=value.shape).astype(np.float32) * np.float32(0.1)
            for key, value in base.items()
        }
    for name, tensors in found.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    return {name: {key: value.astype(np.float64) for key, value in tensors.items()} for name, tensors in found.items()}


def recipe(folder, method, count=3, base=True, **more):
    path = folder / "recipe.yml"
    content = {"merge_method": method, "dtype": "float64"}
    content["models"] = [{"model": str(folder / f"{name}.safetensors")} for name in NAMES[1 : count + 1]]
    if base:
        content["base_model"] = str(folder / "base.safetensors")
    path.write_text(json.dumps({**content, **more}))
    return path


def merged(folder, method, *, settings=None, name="out", **more):
    out = folder / f"{name}.safetensors"
    result = merge(recipe(folder, method, **more), out, force=True, settings=settings)
    return load_file(out), result


@pytest.mark.parametrize(("method", "parameters"), MANY, ids=LABELS)
def test_every_layer_has_its_own_factor(tmp_path, models, method, parameters):
    plain, _ = merged(tmp_path, method, parameters=parameters)
    scaled, _ = merged(tmp_path, method, parameters=parameters, lines={"alpha": 0.3, "beta": 0.6})
    for name in SHAPES:
        factor = 0.3 + 0.6 * DEPTH[name]
        change = plain[name] - models["base"][name]
        np.testing.assert_allclose(scaled[name], models["base"][name] + factor * change, rtol=0, atol=1e-13)


def test_it_is_a_gradient_of_lambda(tmp_path, models):
    parameters = {"weight": 1.0, "density": 0.4}
    one, _ = merged(tmp_path, "ties", parameters=parameters, lines={"alpha": 0.25, "beta": 0.5})
    other, _ = merged(tmp_path, "ties", parameters={**parameters, "lambda": [0.25, 0.75]})
    for name in SHAPES:
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=1e-15)


def test_without_beta_everything_is_scaled_by_alpha(tmp_path, models):
    one, _ = merged(tmp_path, "task_arithmetic", parameters={"weight": 1.0}, lines={"alpha": 0.3, "beta": 0})
    other, _ = merged(tmp_path, "task_arithmetic", parameters={"weight": 1.0, "lambda": 0.3})
    assert all(np.array_equal(one[name], other[name]) for name in SHAPES)


def test_for_one_model_the_last_layer_is_its_own(tmp_path, models):
    found, _ = merged(tmp_path, "task_arithmetic", count=1, parameters={"weight": 1.0}, lines={"alpha": 0.2})
    np.testing.assert_allclose(found["blocks.3.up"], models["a"]["blocks.3.up"], atol=1e-15)
    change = models["a"]["head.bias"] - models["base"]["head.bias"]
    np.testing.assert_allclose(found["head.bias"], models["base"]["head.bias"] + 0.2 * change, atol=1e-15)


def published_alpha(models, method, parameters):
    """Return ‖Σ d‖₁ / ‖τ‖₁ / K by the reference program."""
    others = [models[name] for name in NAMES[1:]]
    results = reference_model(method, models["base"], others, scores="float32", **parameters)
    total = sum(np.abs(sum(other[name] - models["base"][name] for other in others)).sum() for name in SHAPES)
    return total / sum(np.abs(results[name].value - models["base"][name]).sum() for name in SHAPES) / len(others)


@pytest.mark.parametrize(("method", "parameters"), MANY, ids=LABELS)
def test_alpha_makes_the_first_layer_as_large_as_the_mean(tmp_path, models, method, parameters):
    alpha = published_alpha(models, method, parameters)
    plain, _ = merged(tmp_path, method, parameters=parameters)
    scaled, result = merged(tmp_path, method, parameters=parameters, lines={"alpha": "auto", "beta": 0.3})
    assert result.notes[0] == f"lines: alpha is {alpha:.6g}"
    for name in ("embed.weight", "blocks.0.up", "blocks.2.down"):
        change = (alpha + 0.3 * DEPTH[name]) * (plain[name] - models["base"][name])
        np.testing.assert_allclose(scaled[name], models["base"][name] + change, rtol=0, atol=1e-8)


def test_alpha_of_a_plain_sum_is_known_beforehand(tmp_path, models):
    plan = make_plan(
        load_recipe(recipe(tmp_path, "task_arithmetic", parameters={"weight": 1}, lines={"beta": 0.5})).recipes[0]
    )
    assert not lines.needs_measuring(plan)
    factors = {step.name: step.program.keywords["lambda_"] for step in plan.merged}
    plan.close()
    assert factors == {name: 1 / 3 + 0.5 * DEPTH[name] for name in SHAPES}


def test_models_without_layers_are_warned_of(tmp_path, models):
    for name in NAMES:
        save_file({"0.weight": np.ones((2, 2)), "2.weight": np.ones((2, 2))}, tmp_path / f"{name}.safetensors")
    with_lines = recipe(tmp_path, "task_arithmetic", parameters={"weight": 1}, lines={"alpha": 0.2, "beta": 0.5})
    plan = make_plan(load_recipe(with_lines).recipes[0])
    plan.close()
    assert [warning for warning in plan.warnings if "no layers are numbered" in warning]
    assert {step.program.keywords["lambda_"] for step in plan.merged} == {0.2}


def test_models_without_a_change_have_an_alpha(tmp_path, models):
    for name in NAMES[1:]:
        save_file(
            {key: value.astype(np.float32) for key, value in models["base"].items()}, tmp_path / f"{name}.safetensors"
        )
    found, result = merged(tmp_path, "ties", parameters={"weight": 1.0}, lines={"beta": 0.5})
    assert result.notes[0] == "lines: alpha is 0.333333"
    assert all(np.array_equal(found[name], models["base"][name]) for name in SHAPES)


@pytest.mark.parametrize("method", ["ties", "tsv_m"])
def test_threads_and_repetition_change_nothing(tmp_path, models, method):
    parameters = {"weight": 1.0, "density": 0.5} if method == "ties" else {}
    results = [
        merged(tmp_path, method, parameters=parameters, lines={"beta": 0.5}, settings=Settings(threads=threads))[0]
        for threads in (1, 4, 1)
    ]
    for other in results[1:]:
        assert all(np.array_equal(results[0][name], other[name]) for name in SHAPES)


@pytest.mark.parametrize(
    ("method", "entry", "message"),
    [
        ("linear", {"alpha": 0.1, "beta": 1.0}, 'lines: "linear" has no factor on a merged task vector'),
        ("model_stock", {"alpha": 0.1, "beta": 1.0}, 'lines: "model_stock" has no factor'),
        ("ties", {"alpha": 0.1}, "lines.beta: is missing"),
        ("ties", {"alpha": "much", "beta": 1.0}, 'lines.alpha: .*"much"'),
        ("ties", {"alpha": 0.1, "beta": "x"}, 'lines.beta: .*"x"'),
        ("ties", {"alpha": float("inf"), "beta": 1.0}, "lines.alpha: must be a finite number"),
        ("ties", {"alpha": 0.1, "betta": 1.0, "beta": 1.0}, 'betta.* did you mean "beta"'),
        ("ties", 0.5, "lines: "),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_in_one_line(tmp_path, models, method, entry, message):
    path = recipe(
        tmp_path,
        method,
        base=method != "linear",
        parameters={"weight": 1.0} if method != "model_stock" else {},
        lines=entry,
    )
    path.write_text(path.read_text().replace("Infinity", ".inf"))
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert len(caught.value.problems) == 1


def test_recipes_remember_it_and_the_schema_knows_it(tmp_path, models):
    file = load_recipe(recipe(tmp_path, "ties", parameters={"weight": 1.0}, lines={"alpha": "auto", "beta": 0.5}))
    assert '"lines":{"alpha":null,"beta":0.5}' in file.recipes[0].canonical()
    assert (
        json_schema()["properties"]["lines"]["$ref"] == "#/$defs/LinesEntry" or "lines" in json_schema()["properties"]
    )


def test_every_method_with_a_base_and_a_factor_takes_it():
    methods = {name for name in registry.names() if lines.scaling(registry.get(name)) is not None}
    family = {"ties", "task_arithmetic", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs"}
    assert family | {"breadcrumbs_ties", "sce", "ram", "pcb", "tsv_m", "iso_c", "iso_cts", "consensus_ta"} <= methods
    assert not {"linear", "slerp", "passthrough", "emr", "task_model"} & methods
