"""Recipes as mergekit's users have them: the shapes of its examples, and what each gives tensor by tensor."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from graftwork.merge import load_recipe, make_plan, merge
from graftwork.merge.checkpoint import Checkpoint, load_numpy

Model = dict[str, np.ndarray]

LAYERS, WIDTH, ROWS = 6, 8, 12
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{n}.{part}.weight" for n in range(LAYERS) for part in ("self_attn.q_proj", "mlp.up_proj")),
    "model.norm.weight",
    "lm_head.weight",
]


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Model]:
    """Four relatives in float32: Z, the base, and A, B, C."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    base = {name: random.normal(0, 0.02, (ROWS, WIDTH)).astype(np.float32) for name in NAMES}
    made = {"Z": base}
    for letter in "ABC":
        made[letter] = {
            name: (tensor + random.normal(0, 0.002, tensor.shape)).astype(np.float32) for name, tensor in base.items()
        }
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": LAYERS}
    for letter, tensors in made.items():
        Path(letter).mkdir()
        save_file(tensors, Path(letter, "model.safetensors"), metadata={"format": "pt"})
        Path(letter, "config.json").write_text(json.dumps(config))
    return {letter: {name: t.astype(np.float64) for name, t in own.items()} for letter, own in made.items()}


def blended(values: list[float], name: str) -> float:
    """Return the value of a gradient for a tensor: outside of the layers the first, between them in proportion."""
    if ".layers." not in name:
        return values[0]
    place = int(name.split(".")[2]) / (LAYERS - 1) * (len(values) - 1)
    return float(np.interp(place, range(len(values)), values))


def slerp(t: float, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    cosine = float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def ties(base: np.ndarray, tasks: list[tuple[float, float, np.ndarray]], *, normalize: bool = True) -> np.ndarray:
    """Return TIES of (weight, density, model): trim each tensor, elect signs, add what agrees."""
    changes = []
    for weight, density, model in tasks:
        change = model - base
        kept = int(density * change.size)
        order = np.argsort(-np.abs(change), axis=None, kind="stable")
        mask = np.zeros(change.size, bool)
        mask[order[:kept]] = True
        changes.append((weight, np.where(mask.reshape(change.shape), change, 0)))
    total = sum(weight * change for weight, change in changes)
    sign = np.where(total >= 0, 1.0, -1.0)
    added = np.zeros_like(base)
    weights = np.zeros_like(base)
    for weight, change in changes:
        agrees = np.sign(change) == sign
        added += np.where(agrees, weight * change, 0)
        weights += np.where(agrees, weight, 0)
    return base + (added / np.where(weights == 0, 1, weights) if normalize else added)


def linear_example(m: dict[str, Model], name: str) -> np.ndarray:
    return (1.0 * m["A"][name] + 0.3 * m["B"][name] + 0.5 * m["C"][name]) / 1.8


LINEAR = """
    models:
      - model: A
        parameters:
          weight: 1.0
      - model: B
        parameters:
          weight: 0.3
      - model: C
        parameters:
          weight: 0.5
    merge_method: linear
    dtype: float32
"""


def gradient_slerp_example(m: dict[str, Model], name: str) -> np.ndarray:
    t = 0.5
    if "self_attn" in name:
        t = blended([0, 0.5, 0.3, 0.7, 1], name)
    elif "mlp" in name:
        t = blended([1, 0.5, 0.7, 0.3, 0], name)
    return slerp(t, m["A"][name], m["B"][name])


GRADIENT_SLERP = """
    slices:
      - sources:
          - model: A
            layer_range: [0, 6]
          - model: B
            layer_range: [0, 6]
    # another way to write the same:
    # models: [{model: A}, {model: B}]
    merge_method: slerp
    base_model: A
    parameters:
      t:
        - filter: self_attn
          value: [0, 0.5, 0.3, 0.7, 1]
        - filter: mlp
          value: [1, 0.5, 0.7, 0.3, 0]
        - value: 0.5 # all that is neither
    dtype: float32
"""


def stacked_example(m: dict[str, Model], name: str) -> np.ndarray:
    if ".layers." not in name:
        return m["A" if "embed" in name else "B"][name]
    parts = name.split(".")
    layer = int(parts[2])
    parts[2] = str(layer if layer < 4 else layer - 2)
    return m["A" if layer < 4 else "B"][".".join(parts)]


STACKED = """
    slices:
    - sources:
      - model: A
        layer_range: [0, 4]
    - sources:
      - model: B
        layer_range: [2, 6]
    merge_method: passthrough
    dtype: float32
"""


def ties_example(m: dict[str, Model], name: str) -> np.ndarray:
    base = m["Z"][name]
    one = (1.0, blended([1, 0.7, 0.1], name), m["A"][name])
    two = (blended([0, 0.3, 0.7, 1], name), 0.5, m["B"][name])
    three = (0.5 if "mlp" in name else 0.0, 0.33, m["C"][name])
    return ties(base, [one, two, three])


TIES = """
    models:
      - model: A
        parameters:
          density: [1, 0.7, 0.1]
          weight: 1.0
      - model: B
        parameters:
          density: 0.5
          weight: [0, 0.3, 0.7, 1]
      - model: C
        parameters:
          density: 0.33
          weight:
            - filter: mlp
              value: 0.5
            - value: 0
    merge_method: ties
    base_model: Z
    parameters:
      normalize: true
      int8_mask: true
    dtype: float32
"""


def unnormalized_example(m: dict[str, Model], name: str) -> np.ndarray:
    return ties(
        m["Z"][name], [(0.5, 0.5, m["A"][name]), (0.6, 0.53, m["B"][name]), (0.4, 0.4, m["C"][name])], normalize=False
    )


UNNORMALIZED = """
    models:
      - model: Z
        # no parameters necessary for base model
      - model: A
        parameters: {density: 0.5, weight: 0.5}
      - model: B
        parameters: {density: 0.53, weight: 0.6}
      - model: C
        parameters: {density: 0.4, weight: 0.4}
    merge_method: ties
    base_model: Z
    parameters:
      normalize: false
      int8_mask: true
    dtype: float32
"""

FUSION = """
    merge_method: arcee_fusion
    base_model: Z
    models:
      - model: Z
      - model: A
    dtype: float32
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LINEAR, linear_example),
        (GRADIENT_SLERP, gradient_slerp_example),
        (STACKED, stacked_example),
        (TIES, ties_example),
        (UNNORMALIZED, unnormalized_example),
    ],
    ids=["linear", "gradient-slerp", "stacked", "ties", "unnormalized"],
)
def test_the_examples_give_what_their_formulas_say(
    models: dict[str, Model], text: str, expected: Callable[[dict[str, Model], str], np.ndarray]
) -> None:
    found = merged(text)
    count = 1 + max(int(name.split(".")[2]) for name in found if ".layers." in name)
    assert count == (8 if text is STACKED else LAYERS)
    largest = max(float(np.abs(tensor).max()) for tensor in models["Z"].values())
    for name, tensor in found.items():
        assert tensor.dtype == np.float32
        assert np.abs(tensor - expected(models, name)).max() <= 1e-6 * largest, name
    assert len(found) == 3 + 2 * count


def test_an_example_without_any_parameter_chooses_entries_of_its_two_models(models: dict[str, Model]) -> None:
    found = merged(FUSION)
    share = []
    for name, tensor in found.items():
        base, tuned = (models[letter][name].astype(np.float32) for letter in "ZA")
        assert np.all((tensor == base) | (tensor == tuned))
        share.append(float((tensor == tuned).mean()))
    assert 0 < np.mean(share) < 0.5  # what matters is what stands out


@pytest.mark.parametrize("text", [LINEAR, GRADIENT_SLERP, STACKED, TIES, UNNORMALIZED, FUSION])
def test_no_example_has_a_key_that_is_not_known(text: str) -> None:
    for dtype in ("float16", "bfloat16"):
        Path("recipe.yml").write_text(textwrap.dedent(text).replace("float32", dtype))
        (recipe,) = load_recipe("recipe.yml").recipes
        plan = make_plan(recipe)
        plan.close()
        assert not [line for line in plan.warnings if "known key" in line or "did you mean" in line]
        assert {step.dtype for step in plan.steps} == {"F16" if dtype == "float16" else "BF16"}


def test_three_documents_of_which_one_merges_a_model_with_an_earlier_output(models: dict[str, Model]) -> None:
    found = merged(
        """
        name: first
        merge_method: linear
        models:
          - {model: A, parameters: {weight: 0.5}}
          - {model: B, parameters: {weight: 0.5}}
        ---
        name: second
        merge_method: slerp
        base_model: first
        models:
          - model: C
        parameters: {t: 0.3}
        ---
        merge_method: linear
        dtype: float32
        models:
          - {model: second, parameters: {weight: 1}}
          - {model: Z, parameters: {weight: 3}}
        """
    )
    for name, tensor in found.items():
        first = (models["A"][name] + models["B"][name]) / 2
        wanted = (slerp(0.3, first, models["C"][name]) + 3 * models["Z"][name]) / 4
        assert np.abs(tensor - wanted).max() <= 1e-7


def merged(text: str) -> Model:
    Path("recipe.yml").write_text(textwrap.dedent(text))
    merge("recipe.yml", "out", threads=1)
    with Checkpoint.open("out") as checkpoint:
        return load_numpy(checkpoint)
