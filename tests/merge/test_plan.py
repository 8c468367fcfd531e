"""From a recipe and headers to a plan: which value every tensor gets, and what becomes of tensors that do not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from graftwork.merge.checkpoint import Checkpoint, load_torch
from graftwork.merge.engine import HOLD_BYTES, SPAN, WINDOW_BITS
from graftwork.merge.errors import CheckpointError, GraftworkError, MismatchError, RecipeError
from graftwork.merge.plan import Options, make_plan
from graftwork.merge.recipe import parse_recipe
from graftwork.merge.run import merge

LAYERS, HIDDEN, INNER, ROWS = 6, 16, 32, 57
LAYER = {
    "input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,),
    "self_attn.q_proj.weight": (HIDDEN, HIDDEN), "self_attn.k_proj.weight": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN), "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "mlp.gate_proj.weight": (INNER, HIDDEN), "mlp.up_proj.weight": (INNER, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, INNER),
}  # fmt: skip
AROUND = {"model.embed_tokens.weight": (ROWS, HIDDEN), "model.norm.weight": (HIDDEN,), "lm_head.weight": (ROWS, HIDDEN)}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": LAYERS, "vocab_size": ROWS,
    "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip


def shapes(layers=LAYERS):
    inside = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in LAYER.items()}
    return {"model.embed_tokens.weight": AROUND["model.embed_tokens.weight"], **inside, **AROUND}


def write(path, tensors, config=CONFIG):
    path.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def filled(value):
    return {name: torch.full(shape, float(value)) for name, shape in shapes().items()}


def drawn(seed, near=None):
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes().items()}
    return made if near is None else {name: near[name] + value / 10 for name, value in made.items()}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Z all 0, O all 1, A, B, C random relatives of each other, T with its head tied to the embedding."""
    folder = tmp_path_factory.mktemp("zoo")
    ancestor = drawn(0)
    models = {"Z": filled(0), "O": filled(1)} | {name: drawn(seed, ancestor) for seed, name in enumerate("ABC", 1)}
    for name, tensors in models.items():
        write(folder / name, tensors)
    tied = {name: value for name, value in drawn(4, ancestor).items() if name != "lm_head.weight"}
    write(folder / "T", tied, {**CONFIG, "tie_word_embeddings": True})
    return folder


@pytest.fixture
def here(zoo, tmp_path, monkeypatch):
    """A working directory in which the models of the zoo can be named, and others added."""
    for path in zoo.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(text):
    return parse_recipe(textwrap.dedent(text))


def merged(text, *, out="out", options=None):
    """Return the output's tensors and the plan's warnings."""
    result = merge(recipe(text), out, threads=1, options=options)
    with Checkpoint.open(out) as checkpoint:
        return load_torch(checkpoint), result.plan.warnings


def planned(text, options=None):
    file = recipe(text)
    plan = make_plan(file.recipes[-1], options)
    plan.close()
    return plan


def refused(text, error=MismatchError, options=None):
    with pytest.raises(error) as caught:
        planned(text, options)
    assert all("\n" not in line for line in caught.value.problems)
    return "\n".join(caught.value.problems)


def values_by_layer(tensors):
    """Return the one value that all tensors of each layer have."""
    found = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        key = int(parts[2]) if parts[1] == "layers" else name
        found.setdefault(key, set()).update(tensor.unique().tolist())
    return {key: values.pop() for key, values in found.items() if len(values) == 1}


def assert_values(tensors, layers, **around):
    found = values_by_layer(tensors)
    assert [found[number] for number in range(len(layers))] == pytest.approx(layers, abs=1e-4)
    assert len(layers) not in found
    names = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
    for key, value in around.items():
        assert found[names[key]] == pytest.approx(value, abs=1e-6)


# ---------------------------------------------------------------- values by layer, slices


def test_a_gradient_runs_over_the_layers_and_begins_outside_them(here):
    tensors, _ = merged(
        "{merge_method: task_arithmetic, base_model: Z, models: [{model: O, parameters: {weight: [.25, .5, 1]}}]}"
    )
    assert_values(tensors, [0.25, 0.35, 0.45, 0.6, 0.8, 1], embed=0.25, norm=0.25, head=0.25)


def test_slices_have_gradients_and_filters_of_their_own(here):
    tensors, _ = merged("""
        merge_method: task_arithmetic
        base_model: Z
        slices:
        - sources:
          - {model: Z, layer_range: [0, 3]}
          - {model: O, layer_range: [0, 3], parameters: {weight: [.25, .75]}}
        - sources:
          - {model: Z, layer_range: [2, 6]}
          - model: O
            layer_range: [2, 6]
            parameters:
              weight: [{filter: layers.2., value: .1}, {filter: layers.4., value: .4}, {value: [.5, .9]}]
          parameters: {lambda: [{filter: layers.4., value: 2}, {value: 1}]}
    """)
    assert_values(tensors, [0.25, 0.5, 0.75, 0.1, 1.2667, 0.4, 0.9], embed=0.25, norm=0.5, head=0.5)


def test_linear_counts_an_unlisted_base_as_a_model_and_says_so(here):
    tensors, warnings = merged("{merge_method: linear, base_model: Z, models: [{model: O}], parameters: {weight: 1}}")
    assert_values(tensors, [0.5] * 6, embed=0.5, norm=0.5, head=0.5)
    assert any("base" in line for line in warnings)


def test_a_base_that_counts_as_a_model_needs_a_weight(here):
    text = "{merge_method: linear, base_model: Z, models: [{model: O, parameters: {weight: 1}}]}"
    message = refused(text, RecipeError)
    assert "weight" in message
    assert "base_model" in message or "Z" in message


def test_a_filter_leaves_what_it_does_not_match_to_the_next_scope(here):
    tensors, _ = merged("""
        {merge_method: task_arithmetic, base_model: Z, parameters: {weight: .125},
         models: [{model: O, parameters: {weight: [{filter: mlp, value: .5}]}}]}
    """)
    for name, tensor in tensors.items():
        assert tensor.unique().tolist() == [0.5 if "mlp" in name else 0.125]


def test_the_last_slice_makes_norm_and_head(here):
    tensors, _ = merged("""
        merge_method: linear
        parameters: {weight: 1}
        slices:
        - sources: [{model: Z, layer_range: [0, 3]}]
        - sources: [{model: Z, layer_range: [3, 6]}, {model: O, layer_range: [3, 6]}]
    """)
    assert_values(tensors, [0, 0, 0, 0.5, 0.5, 0.5], embed=0, norm=0.5, head=0.5)


def test_a_slice_may_have_a_base_of_its_own_and_residual_weight_does_nothing(here):
    text = """
        merge_method: task_arithmetic
        base_model: Z
        slices:
        - sources:
          - {model: Z, layer_range: [0, 6], parameters: {weight: .25}}
          - {model: O, layer_range: [0, 6]}
          base_model: O
    """
    tensors, warnings = merged(text)
    assert_values(tensors, [0.75] * 6, embed=0.75, norm=0.75, head=0.75)
    assert not any("residual_weight" in line for line in warnings)
    again, warnings = merged(text.replace("base_model: O", "base_model: O\n          residual_weight: .5"), out="again")
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert any("residual_weight" in line for line in warnings)


def test_layers_of_two_models_can_be_stacked(here):
    tensors, _ = merged("""
        merge_method: passthrough
        slices:
        - sources: [{model: A, layer_range: [0, 4]}]
        - sources: [{model: C, layer_range: [2, 6]}]
    """)
    first, second = (load_torch(Checkpoint.open(name)) for name in "AC")
    assert set(tensors) == set(shapes(8))
    for number in range(8):
        source, layer = (first, number) if number < 4 else (second, number - 2)
        for name in LAYER:
            assert torch.equal(tensors[f"model.layers.{number}.{name}"], source[f"model.layers.{layer}.{name}"])
    assert torch.equal(tensors["model.embed_tokens.weight"], first["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.norm.weight"], second["model.norm.weight"])
    assert torch.equal(tensors["lm_head.weight"], second["lm_head.weight"])
    assert json.loads(Path("out/config.json").read_text())["num_hidden_layers"] == 8


def test_lists_that_speak_of_every_layer_follow_the_layers(here):
    kinds = ["full_attention" if number % 3 else "sliding_attention" for number in range(LAYERS)]
    write(here / "Q", drawn(5), {**CONFIG, "layer_types": kinds})
    merged("""
        merge_method: passthrough
        slices:
        - sources: [{model: Q, layer_range: [0, 4]}]
        - sources: [{model: Q, layer_range: [2, 6]}]
    """)
    assert json.loads(Path("out/config.json").read_text())["layer_types"] == kinds[0:4] + kinds[2:6]


@pytest.mark.parametrize("bounds", [[0, 9], [4, 2], [-2, 0], [3, 3]], ids=str)
def test_layer_ranges_that_do_not_exist_are_refused_before_anything_is_read(here, bounds):
    text = f"{{merge_method: passthrough, slices: [{{sources: [{{model: A, layer_range: {bounds}}}]}}]}}"
    with pytest.raises(GraftworkError, match="layer_range"):
        planned(text)


def test_layer_ranges_of_unequal_length_are_refused(here):
    with pytest.raises(GraftworkError, match=r"layer_range|layers"):
        planned("""
            merge_method: linear
            parameters: {weight: 1}
            slices: [{sources: [{model: A, layer_range: [0, 3]}, {model: C, layer_range: [0, 2]}]}]
        """)


def test_slices_of_other_models_do_not_share_statistics(here):
    """An outlier in the second slice must not move the median of the first."""
    text = """
        merge_method: geometric_median
        slices:
        - sources: [{model: A, layer_range: [0, 3]}, {model: B, layer_range: [0, 3]}, {model: C, layer_range: [0, 3]}]
        - sources: [{model: A, layer_range: [3, 6]}, {model: B, layer_range: [3, 6]}, {model: %s, layer_range: [3, 6]}]
    """
    first, _ = merged(text % "O")
    second, _ = merged(text % "Z", out="again")
    for name in first:
        assert torch.equal(first[name], second[name]) == (
            name == "model.embed_tokens.weight" or any(f".{layer}." in name for layer in range(3))
        )
    same = planned(text % "C").steps
    assert len({step.group for step in same}) == 1


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ("weight: 1, density: [.2, .8]", "density"),
        ("weight: 1, density: [{filter: mlp, value: 1}, {value: .5}]", "density"),
        ("weight: 1, density: .5, rescale: [{filter: mlp, value: true}, {value: false}]", "rescale"),
    ],
)
def test_ranks_over_the_whole_model_need_one_density(here, settings, key):
    text = "{merge_method: ties, base_model: Z, models: [{model: A}], parameters: {scope: %s, %s}}"
    message = refused(text % ("model", settings), RecipeError)
    assert message.startswith(f"with `scope: model` {key} must be the same")
    planned(text % ("tensor", settings))


# ---------------------------------------------------------------- every tensor is accounted for

LINEAR = "{merge_method: linear, models: [{model: %s}, {model: %s}], parameters: {weight: 1}}"
TASK = "{merge_method: task_arithmetic, base_model: %s, models: [{model: %s}], parameters: {weight: .5}}"


def assert_accounted_for(plan):
    """Every tensor of every input is read by a step or named as dropped."""
    read = {(item.model, item.entry.name) for step in plan.steps for item in step.inputs}
    dropped = {(item.model, item.entry.name) for item in plan.dropped}
    held = {(number, name) for number, found in enumerate(plan.checkpoints) for name in found.tensors}
    assert read | dropped == held
    assert all(item.reason for item in plan.dropped)


@pytest.mark.parametrize("text", [
    LINEAR % ("A", "C"), TASK % ("Z", "O"), LINEAR % ("T", "A"),
    "{merge_method: passthrough, slices: [{sources: [{model: A, layer_range: [1, 3]}]}]}",
    "{merge_method: linear, models: [{model: A}, {model: C}], parameters: {weight: 1}, exclude: ['*mlp*']}",
])  # fmt: skip
def test_every_tensor_is_used_or_named(here, text):
    assert_accounted_for(planned(text))


def odd_models(here):
    """Two relatives that differ in a shape, in a missing tensor and in an integer buffer."""
    left = {"a.weight": torch.full((4, 3), 1.0), "b.weight": torch.full((5,), 2.0), "only": torch.full((2,), 3.0),
            "steps": torch.tensor(7), "same": torch.arange(3)}  # fmt: skip
    right = {"a.weight": torch.full((4, 3), 3.0), "b.weight": torch.full((6,), 4.0), "steps": torch.tensor(9),
             "same": torch.arange(3)}  # fmt: skip
    write(here / "L", left, None)
    write(here / "R", right, None)
    return left, right


def test_every_tensor_that_does_not_fit_is_listed_at_once(here):
    odd_models(here)
    message = refused(LINEAR % ("L", "R"))
    assert len(message.splitlines()) == 2
    assert '"b.weight": L has [5], R has [6]' in message
    assert "exclude" in message
    assert '"only": R lacks it, L has it' in message
    assert "--on-missing" in message


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_what_does_not_fit_can_be_taken_from_the_base_or_left_out(here, method):
    left, _ = odd_models(here)
    text = LINEAR % ("L", "R") if method == "linear" else TASK % ("L", "R")
    tensors, _ = merged(text, options=Options(on_mismatch="base", on_missing="base"))
    assert set(tensors) == set(left)
    for name in ("b.weight", "only", "steps", "same"):
        assert torch.equal(tensors[name], left[name])
    assert tensors["a.weight"].unique().tolist() == [2.0]
    tensors, warnings = merged(text, out="fewer", options=Options(on_mismatch="skip", on_missing="skip"))
    assert set(tensors) == {"a.weight", "steps", "same"}
    assert {line.split('"')[1] for line in warnings if "left out" in line} == {"b.weight", "only"}
    plan = planned(text, Options(on_mismatch="skip", on_missing="skip"))
    assert_accounted_for(plan)


def test_integers_are_taken_from_the_base_and_that_is_said_where_they_differ(here):
    odd_models(here)
    options = Options(on_mismatch="skip", on_missing="skip")
    for text, wanted in ((TASK % ("R", "L"), 9), (TASK % ("L", "R"), 7), (LINEAR % ("R", "L"), 9)):
        tensors, warnings = merged(text, out=f"out{wanted}{text[15]}", options=options)
        assert tensors["steps"].dtype == torch.int64
        assert tensors["steps"].item() == wanted
        assert [line for line in warnings if '"steps"' in line and "not averaged" in line]
        assert not any('"same"' in line for line in warnings)


def test_excluded_tensors_come_from_the_base(here):
    tensors, _ = merged(
        "{merge_method: task_arithmetic, base_model: Z, models: [{model: O}], parameters: {weight: 1}, "
        "exclude: ['*.mlp.*', lm_head.weight]}"
    )
    for name, tensor in tensors.items():
        assert tensor.unique().tolist() == [0.0 if ".mlp." in name or name == "lm_head.weight" else 1.0]


def test_models_with_hardly_a_name_in_common_are_in_different_layouts(here):
    write(here / "L", {f"block{n}.w": torch.ones(3) for n in range(9)}, None)
    write(here / "R", {f"stage.{n}.weight": torch.ones(3) for n in range(9)}, None)
    message = refused(LINEAR % ("L", "R"))
    assert "layout" in message
    assert "graftwork inspect" in message


def test_different_architectures_are_refused_unless_allowed(here):
    write(here / "M", drawn(1), {**CONFIG, "architectures": ["MistralForCausalLM"], "model_type": "mistral"})
    assert "rchitecture" in refused(LINEAR % ("A", "M"))
    planned(LINEAR % ("A", "M"), Options(allow_architectures=True))


# ---------------------------------------------------------------- heads


def test_a_tied_and_an_untied_model_make_an_untied_one(here):
    tensors, warnings = merged(LINEAR % ("T", "A"))
    tied, untied = (load_torch(Checkpoint.open(name)) for name in "TA")
    expected = (tied["model.embed_tokens.weight"].double() + untied["lm_head.weight"].double()) / 2
    assert torch.allclose(tensors["lm_head.weight"].double(), expected, rtol=0, atol=1e-8)
    assert json.loads(Path("out/config.json").read_text())["tie_word_embeddings"] is False
    assert any("head" in line for line in warnings)


def test_two_tied_models_make_a_tied_one(here):
    write(here / "U", {name: t for name, t in drawn(8).items() if name != "lm_head.weight"},
          {**CONFIG, "tie_word_embeddings": True})  # fmt: skip
    tensors, _ = merged(LINEAR % ("T", "U"))
    assert "lm_head.weight" not in tensors
    assert json.loads(Path("out/config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize(("first", "last"), ["AT", "TA", "TU", "AC", "UT"])
def test_slices_of_tied_and_untied_models_say_whether_the_head_is_stored(here, first, last):
    """The head is that of the last slice: its own, or the embedding that it is tied to."""
    write(here / "U", {name: t for name, t in drawn(8).items() if name != "lm_head.weight"},
          {**CONFIG, "tie_word_embeddings": True})  # fmt: skip
    tensors, _ = merged(
        f"{{merge_method: passthrough, slices: [{{sources: [{{model: {first}, layer_range: [0, 3]}}]}}, "
        f"{{sources: [{{model: {last}, layer_range: [3, 6]}}]}}]}}",
        options=Options(allow_config=("tie_word_embeddings",)),
    )
    tied = {first, last} <= set("TU")
    assert ("lm_head.weight" in tensors) is not tied
    assert json.loads(Path("out/config.json").read_text())["tie_word_embeddings"] is tied
    if not tied:
        source = load_torch(Checkpoint.open(last))
        name = "lm_head.weight" if last in "AC" else "model.embed_tokens.weight"
        assert torch.equal(tensors["lm_head.weight"], source[name])


@pytest.mark.parametrize("same", [True, False])
def test_a_head_that_is_stored_counts_unless_it_is_the_embedding(here, same):
    for number, name in enumerate("LR"):
        tensors = drawn(number)
        if same:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        write(here / name, tensors, {**CONFIG, "tie_word_embeddings": True})
    tensors, _ = merged(LINEAR % ("L", "R"))
    assert json.loads(Path("out/config.json").read_text())["tie_word_embeddings"] is same
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]) is same


def test_the_configuration_of_an_untied_donor_follows_tied_slices(here):
    merged(
        "{merge_method: passthrough, base_model: A, slices: [{sources: [{model: T, layer_range: [0, 6]}]}]}",
        options=Options(allow_config=("tie_word_embeddings",)),
    )
    assert json.loads(Path("out/config.json").read_text())["tie_word_embeddings"] is True


# ---------------------------------------------------------------- several stacks


def test_a_head_that_is_neither_stored_nor_tied_is_an_error_unless_the_embedding_is_meant(here):
    bare = {name: tensor for name, tensor in drawn(7).items() if name != "lm_head.weight"}
    write(here / "H", bare)  # its config.json says that it has a head of its own
    text = "{merge_method: linear, parameters: {weight: 1}, models: [{model: H}, {model: %s}]}"
    assert "stores no head; fetch it whole, or take the embedding for its head with --tie" in refused(text % "A")
    tensors, _ = merged(text % "A", options=Options(tie=True))
    other = load_of(here / "A")["lm_head.weight"]
    torch.testing.assert_close(tensors["lm_head.weight"], (bare["model.embed_tokens.weight"] + other) / 2)
    tensors, _ = merged(text % "T", out="tied", options=Options(tie=True))
    assert "lm_head.weight" not in tensors
    assert json.loads(Path("tied/config.json").read_text())["tie_word_embeddings"] is True
    encoder = {name: tensor for name, tensor in bare.items() if "head" not in name}
    write(here / "E", encoder, {**CONFIG, "architectures": ["LlamaModel"]})
    planned("{merge_method: passthrough, models: [{model: E}]}")


def load_of(folder):
    with Checkpoint.open(folder) as checkpoint:
        return load_torch(checkpoint)


def test_the_key_of_the_number_of_layers_can_be_named(here):
    text = "{merge_method: passthrough, slices: [{sources: [{model: K, layer_range: [0, 2]}]}]}"
    config = {key: value for key, value in CONFIG.items() if key != "num_hidden_layers"}
    write(here / "K", filled(1), {**config, "blocks": LAYERS})
    assert "name it with --layers-key" in refused(text, CheckpointError)
    assert '"width" is nothing' in refused(text, CheckpointError, Options(layers_key="width")).replace(
        "null", "nothing"
    )
    merged(text, options=Options(layers_key="blocks"))
    assert json.loads(Path("out/config.json").read_text())["blocks"] == 2


def test_slices_of_a_text_stack_leave_the_other_stacks_to_the_donor(here):
    names = [
        "visual.patch_embed.weight", *(f"visual.blocks.{n}.norm.weight" for n in range(3)), "visual.norm.weight",
        "model.embed_tokens.weight", *(f"model.language_model.layers.{n}.w" for n in range(4)), "model.norm.weight",
    ]  # fmt: skip
    for name, value in (("V1", 1.0), ("V2", 2.0)):
        write(here / name, {key: torch.full((4,), value) for key in names}, None)
    text = """
        merge_method: linear
        parameters: {weight: 1}
        base_model: %s
        slices:
        - sources: [{model: V1, layer_range: [0, 3]}, {model: V2, layer_range: [0, 3]}]
        - sources: [{model: V1, layer_range: [2, 4]}, {model: V2, layer_range: [2, 4]}]
    """
    for donor in ("V1", "V2"):
        plan = planned(text % donor)
        assert_accounted_for(plan)
        tensors, _ = merged(text % donor, out=f"out{donor}")
        found = {name: tensor[0].item() for name, tensor in tensors.items()}
        expected = {name: float(donor[1]) for name in names if name.startswith("visual")}
        expected |= {f"model.language_model.layers.{n}.w": 1.5 for n in range(5)}
        assert found == expected | {"model.embed_tokens.weight": 1.5, "model.norm.weight": 1.5}


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        (torch.bfloat16, torch.bfloat16, "BF16"), (torch.bfloat16, torch.float16, "F32"),
        (torch.float16, torch.float32, "F32"), (torch.float32, torch.float64, "F64"),
    ],
)  # fmt: skip
def test_the_output_has_the_smallest_dtype_that_holds_the_inputs(here, first, second, wanted):
    write(here / "L", {"w": torch.ones(3, dtype=first)}, None)
    write(here / "R", {"w": torch.ones(3, dtype=second)}, None)
    assert [step.dtype for step in planned(LINEAR % ("L", "R")).steps] == [wanted]


@pytest.mark.parametrize(("word", "wanted"), [("bfloat16", "BF16"), ("float16", "F16"), ("float64", "F64")])
def test_a_recipe_can_ask_for_a_dtype_also_of_what_is_copied(here, word, wanted):
    write(here / "L", {"w": torch.ones(3), "x": torch.full((2,), 0.1), "n": torch.tensor(3)}, None)
    write(here / "R", {"w": torch.ones(3), "x": torch.ones(2), "n": torch.tensor(3)}, None)
    text = (LINEAR % ("L", "R"))[:-1] + f", dtype: {word}, exclude: [x]}}"
    plan = planned(text)
    assert {step.name: step.dtype for step in plan.steps} == {"w": wanted, "x": wanted, "n": "I64"}
    tensors, _ = merged(text)
    assert torch.equal(tensors["x"], torch.full((2,), 0.1).to(getattr(torch, word)))


# ---------------------------------------------------------------- warnings, problems


def test_warnings_say_what_is_probably_not_meant(here):
    plan = planned(
        "{merge_method: linear, models: [{model: A, parameters: {weight: [{filter: mpl, value: 2}, {value: 1}]}}, "
        "{model: C}], parameters: {weight: 1}}"
    )
    (line,) = [line for line in plan.warnings if "mpl" in line]
    assert 'did you mean "mlp"' in line


def test_patterns_that_match_nothing_are_warned_of(here):
    text = (LINEAR % ("A", "C"))[:-1] + ", exclude: ['*.mpl.*', lm_haed.weight, model.norm.weight]}"
    lines = [line for line in planned(text).warnings if line.startswith("exclude")]
    assert lines == [
        'exclude: the pattern "*.mpl.*" matches no tensor; did you mean "mlp"?',
        'exclude: the pattern "lm_haed.weight" matches no tensor; did you mean "lm_head.weight"?',
    ]


@pytest.mark.parametrize("more", ["exclude: [nothing]", "parameters: {weight: [{filter: mpl, value: 2}, {value: 1}]}"])
def test_strict_refuses_what_matches_no_tensor(here, more):
    weight = "" if "weight" in more else "parameters: {weight: 1}, "
    text = f"{{merge_method: linear, models: [{{model: A}}, {{model: C}}], {weight}{more}}}"
    planned(text)
    assert "matches no tensor" in refused(text, RecipeError, Options(strict=True))


def test_large_integers_are_not_read_to_plan(here, monkeypatch):
    for name, count in (("L", 200_000), ("R", 200_000), ("S", 3)):
        write(here / name, {"w": torch.ones(3), "ids": torch.arange(count)}, None)
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    for text in (LINEAR % ("L", "R"), LINEAR % ("S", "L")):
        assert any('"ids"' in line and "not averaged" in line for line in planned(text).warnings)


DARE = (
    "{merge_method: dare_linear, base_model: Z, models: [{model: A, parameters: {weight: 1, density: .5}}], "
    "parameters: {%s}}"
)


def test_the_seed_of_the_command_line_yields_to_the_recipe_and_is_kept_in_the_lineage(here):
    def result(text, out, seed=None):
        tensors, _ = merged(text, out=out, options=Options(seed=seed))
        with Checkpoint.open(out) as found:
            return tensors["lm_head.weight"], json.loads(found.metadata["graftwork.recipe"])

    chosen, lineage = result(DARE % "", "given", 5)
    written, same = result(DARE % "seed: 5", "written")
    assert torch.equal(chosen, written)
    assert lineage == same
    zero, lineage = result(DARE % "seed: 0", "zero", 5)
    assert torch.equal(zero, result(DARE % "", "default")[0])
    assert lineage["parameters"]["seed"] == 0
    assert not torch.equal(zero, chosen)
    mixed, _ = result(DARE % "seed: [{filter: mlp, value: 7}]", "mixed", 5)
    assert torch.equal(mixed, chosen)
    assert "seed" not in planned(LINEAR % ("A", "C"), Options(seed=5)).recipe.parameters


def test_models_that_are_no_relatives_are_warned_of(here):
    write(here / "X", drawn(91))
    write(here / "Y", drawn(92))
    assert any("do not look like relatives" in line for line in planned(LINEAR % ("X", "Y")).warnings)
    assert not any("relatives" in line for line in planned(LINEAR % ("A", "C")).warnings)


def test_a_model_that_is_not_there_is_named_with_its_place_in_the_recipe(here):
    with pytest.raises(GraftworkError, match=r"models\[1\]|gone"):
        planned(LINEAR % ("A", "./gone"))


def test_a_broken_input_is_named(here):
    (here / "broken").mkdir()
    (here / "broken" / "model.safetensors").write_bytes(b"\x00" * 20)
    message = refused(LINEAR % ("A", "broken"), CheckpointError)
    assert "broken" in message


# ---------------------------------------------------------------- size, order


def big_headers(folder, layers, side):
    """Write a model of zeros, as a file with holes."""
    header, position = {}, 0
    for number in range(layers):
        size = side * side * 2
        header[f"layers.{number}.w"] = {
            "dtype": "BF16",
            "shape": [side, side],
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return folder


@pytest.mark.parametrize("method", ["linear", "karcher", "ties", "della"])
def test_memory_does_not_grow_with_the_model(here, method):
    sizes = {"small": (2, 1024), "deep": (24, 1024), "large": (2, 4096)}
    for label, (layers, side) in sizes.items():
        for which in "LRB":
            big_headers(here / f"{label}{which}", layers, side)

    def peak(label, threads=2):
        extra = ", density: .5" if method in ("ties", "della") else ""
        base = f"base_model: {label}B, " if extra else ""
        weight = f"{{weight: 1{extra}}}" if method != "karcher" else "{}"
        models = f"models: [{{model: {label}L}}, {{model: {label}R}}]"
        return planned(f"{{merge_method: {method}, {base}{models}, parameters: {weight}}}").peak_memory(threads)

    assert peak("deep") == peak("small")
    held = HOLD_BYTES if method != "linear" else 0  # by methods that read a tensor more than once
    assert peak("large") <= 1.1 * peak("small") + held
    assert peak("small", 4) <= 2.2 * peak("small")


def test_memory_counts_histograms_and_what_is_held_between_passes(here):
    for which in "LRB":
        big_headers(here / f"small{which}", 2, 1024)
        big_headers(here / f"large{which}", 2, 8192)

    def peak(method, threads, label="small"):
        density = "" if method == "task_arithmetic" else ", density: .5"
        return planned(
            f"{{merge_method: {method}, base_model: {label}B, models: [{{model: {label}L}}, {{model: {label}R}}], "
            f"parameters: {{weight: 1{density}}}}}"
        ).peak_memory(threads)

    for threads in (1, 4):
        once, ties, crumbs = (peak(method, threads) for method in ("task_arithmetic", "ties", "breadcrumbs"))
        histograms = (1 << WINDOW_BITS) * (4 * threads + 8)  # together, however many models there are
        kept = 2 * (threads * SPAN // 2 + 1024 * 1024 // 16)
        assert crumbs - ties == kept
        assert ties - once == histograms + kept + 2 * 3 * 1024 * 1024 * 2
        more = 2 * (8192**2 - 1024**2) // 16
        large = peak("ties", threads, "large") - peak("task_arithmetic", threads, "large")
        assert large == ties - once - 12 * 1024**2 + more


ORDER = """
import sys
from graftwork.merge.plan import make_plan
from graftwork.merge.recipe import parse_recipe
plan = make_plan(parse_recipe(sys.argv[1]).recipes[-1])
print(plan.labels, plan.labels[plan.donor], plan.digest(), [step.name for step in plan.steps], plan.warnings)
"""


def test_a_plan_does_not_depend_on_the_hashing_of_strings(here):
    write(here / "L", {**drawn(1), "z.extra": torch.ones(2)}, {**CONFIG, "rope_theta": 10000.0})
    write(here / "R", {**drawn(2), "z.extra": torch.ones(2)}, {**CONFIG, "rope_theta": 10000.0})
    text = "{merge_method: linear, models: [{model: R}, {model: L}], parameters: {weight: 1}}"
    seen = set()
    for seed in ("0", "1", "77"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", ORDER, text], env=environment, capture_output=True, text=True, check=True
        )
        seen.add(done.stdout)
    assert len(seen) == 1
    assert seen.pop().startswith("['R', 'L'] R ")


def test_the_order_of_the_output_is_that_of_the_layers(here):
    names = [step.name for step in planned(LINEAR % ("A", "C")).steps]
    assert sorted(names) == sorted(shapes())
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)


def test_the_result_does_not_depend_on_the_order_of_files(here):
    """The same tensors in one file, or in shards with an index, in whatever order."""
    tensors = load_torch(Checkpoint.open("A"))
    (here / "S").mkdir()
    names = sorted(tensors, reverse=True)
    weight_map = {}
    for part, chosen in enumerate((names[:20], names[20:])):
        file = f"model-{part + 1:05}-of-00002.safetensors"
        safetensors.torch.save_file({name: tensors[name] for name in chosen}, here / "S" / file, {"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    (here / "S" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (here / "S" / "config.json").write_text(json.dumps(CONFIG))
    first, _ = merged(LINEAR % ("A", "C"))
    second, _ = merged(LINEAR % ("S", "C"), out="again")
    assert all(np.array_equal(first[name].numpy(), second[name].numpy()) for name in first)
