"""Recipes by module: every tower of a model is merged in its own way, or copied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from graftwork.merge import load_recipe, make_plan, merge
from graftwork.merge.checkpoint import Checkpoint, load_numpy
from graftwork.merge.errors import MismatchError, RecipeError
from graftwork.merge.layers import find_stacks
from graftwork.merge.modules import owner_of

TEXT, VISION = 4, 3
OUTSIDE = (
    "model.language_model.embed_tokens.weight", "model.language_model.norm.weight", "model.visual.patch_embed.weight",
    "model.visual.merger.mlp.0.weight", "lm_head.weight", "model.extra.weight",
)  # fmt: skip


@pytest.fixture(autouse=True)
def towers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models with a text and a vision tower: A holds its layers' numbers from 1 on, B ten times these."""
    monkeypatch.chdir(tmp_path)
    for name, scale in (("A", 1.0), ("B", 10.0)):
        tensors = {key: np.full((2, 2), scale, np.float32) for key in OUTSIDE}
        for prefix, count in (("model.language_model.layers", TEXT), ("model.visual.blocks", VISION)):
            for layer in range(count):
                tensors[f"{prefix}.{layer}.w.weight"] = np.full((2, 2), scale * (layer + 1), np.float32)
        config = {
            "model_type": "qwen2_vl", "text_config": {"num_hidden_layers": TEXT, "layer_types": list("abcd")},
            "vision_config": {"depth": VISION},
        }  # fmt: skip
        write(Path(name), tensors, config)


def write(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def recipe(modules: dict[str, Any], method: str = "linear", **more: Any) -> Path:
    Path("r.yml").write_text(json.dumps({"merge_method": method, "modules": modules, **more}))
    return Path("r.yml")


def models(a: float, b: float, **parameters: Any) -> dict[str, Any]:
    entries = [{"model": name, "parameters": {"weight": weight}} for name, weight in (("A", a), ("B", b))]
    return {"models": entries, **({"parameters": parameters} if parameters else {})}


def slices(*parts: tuple[str, int, int]) -> dict[str, Any]:
    return {"slices": [{"sources": [{"model": m, "layer_range": [first, last]}]} for m, first, last in parts]}


def values(path: str = "out") -> dict[str, float]:
    with Checkpoint.open(path) as checkpoint:
        return {name: float(np.unique(tensor)[0]) for name, tensor in load_numpy(checkpoint).items()}


def test_each_module_is_merged_in_its_own_way_and_the_rest_is_copied() -> None:
    path = recipe({"text_decoder": models(1, 1), "vision_tower": models(1, 3)})
    result = merge(path, "out")
    out = values()
    assert len(out) == len(OUTSIDE) + TEXT + VISION
    assert [out[f"model.language_model.layers.{n}.w.weight"] for n in range(TEXT)] == [5.5, 11, 16.5, 22]
    assert [out[f"model.visual.blocks.{n}.w.weight"] for n in range(VISION)] == [7.75, 15.5, 23.25]
    assert [out[name] for name in OUTSIDE] == [5.5, 5.5, 7.75, 1, 5.5, 1]
    copied = {step.name: step.notes for step in result.plan.copied}
    assert copied == {
        "model.visual.merger.mlp.0.weight": ["its module is not named"],
        "model.extra.weight": ["its module is not named"],
    }


def test_settings_of_a_module_stand_between_the_models_and_the_root() -> None:
    plain = {"models": [{"model": "A"}, {"model": "B", "parameters": {"weight": 3}}], "parameters": {"weight": 1}}
    merge(recipe({"text_decoder": plain, "vision_tower": {"models": plain["models"]}}, parameters={"weight": 9}), "out")
    out = values()
    assert out["model.language_model.layers.0.w.weight"] == pytest.approx((1 + 30) / 4)
    assert out["model.visual.blocks.0.w.weight"] == pytest.approx((9 + 30) / 12)


def test_a_module_s_own_settings_are_enough() -> None:
    plain = {"models": [{"model": "A"}, {"model": "B"}], "parameters": {"weight": 1}}
    merge(recipe({"text_decoder": plain}), "out")
    assert values()["model.language_model.layers.0.w.weight"] == 5.5


def test_gradients_run_over_the_layers_of_each_module() -> None:
    b = {"model": "B", "parameters": {"weight": [0, 1]}}
    both = {"models": [{"model": "A", "parameters": {"weight": [1, 0]}}, b]}
    merge(recipe({"text_decoder": both, "vision_tower": both}), "out")
    out = values()
    assert out["model.language_model.layers.0.w.weight"] == 1
    assert out["model.language_model.layers.3.w.weight"] == 40
    assert out["model.visual.blocks.2.w.weight"] == 30


def test_layers_of_one_module_are_sliced_and_the_configuration_follows() -> None:
    path = recipe(
        {"text_decoder": slices(("A", 0, 3), ("B", 1, 4)), "vision_tower": slices(("B", 0, 2))}, "passthrough"
    )
    merge(path, "out")
    out = values()
    assert [out[f"model.language_model.layers.{n}.w.weight"] for n in range(6)] == [1, 2, 3, 20, 30, 40]
    assert [out[f"model.visual.blocks.{n}.w.weight"] for n in range(2)] == [10, 20]
    assert "model.visual.blocks.2.w.weight" not in out
    assert [out[name] for name in OUTSIDE] == [1, 10, 10, 1, 10, 1]
    config = json.loads(Path("out/config.json").read_text())
    assert config["text_config"] == {"num_hidden_layers": 6, "layer_types": list("abcbcd"), **torch_dtype(config)}
    assert config["vision_config"]["depth"] == 2


def torch_dtype(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config["text_config"].items() if key in {"torch_dtype", "dtype"}}


def test_the_default_module_is_the_whole_model() -> None:
    tensors = {f"model.layers.{n}.w.weight": np.full((2, 2), n, np.float32) for n in range(4)}
    write(Path("L"), {**tensors, "model.embed_tokens.weight": np.ones((2, 2), np.float32)}, {"num_hidden_layers": 4})
    merge(recipe({"default": slices(("L", 0, 2), ("L", 1, 4))}, "passthrough"), "out")
    merge_method = {"merge_method": "passthrough", **slices(("L", 0, 2), ("L", 1, 4))}
    Path("s.yml").write_text(json.dumps(merge_method))
    merge("s.yml", "plain")
    assert values("out") == values("plain")
    assert Path("out/config.json").read_text() == Path("plain/config.json").read_text()


def test_a_module_may_be_named_by_the_prefix_of_its_layers() -> None:
    merge(recipe({"model.visual.blocks": models(0, 1)}), "out")
    out = values()
    assert out["model.visual.blocks.1.w.weight"] == 20
    assert {out[name] for name in OUTSIDE} == {1.0}


def test_the_base_joins_the_models_of_every_module() -> None:
    entry = {"models": [{"model": "B", "parameters": {"weight": 0.5}}]}
    merge(recipe({"text_decoder": entry, "vision_tower": entry}, "task_arithmetic", base_model="A"), "out")
    assert values()["model.visual.blocks.0.w.weight"] == 5.5
    assert values()["model.extra.weight"] == 1


def test_the_recipe_in_the_output_holds_the_modules() -> None:
    (item,) = load_recipe(recipe({"text_decoder": models(1, 2, weight=1), "vision_tower": models(1, 1)})).recipes
    content = json.loads(item.canonical())
    assert list(content["modules"]) == ["text_decoder", "vision_tower"]
    assert content["modules"]["text_decoder"]["models"][1] == {"model": "B", "parameters": {"weight": 2.0}}


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        (
            {"audio_tower": models(1, 1)},
            'the models have no module "audio_tower"; there are model.language_model.layers',
        ),
        ({"encoder": models(1, 1)}, 'the models have no module "encoder"'),
        ({"vision_tower": slices(("A", 0, 9))}, "[0, 9] is not within the 3 layers"),
        ({"multi_modal_projector": slices(("A", 0, 1))}, "exactly one stack of layers in common, found none"),
    ],
)
def test_modules_that_are_not_there_are_named(modules: dict[str, Any], said: str) -> None:
    with pytest.raises(MismatchError) as caught:
        make_plan(load_recipe(recipe(modules, parameters={"weight": 1})).recipes[0])
    assert any(said in problem for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"align": {"to": "first"}}, "align: goes with whole models only"),
    ],
)
def test_what_modules_cannot_have_is_said(more: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe({"text_decoder": models(1, 1)}, **more))
    assert any(problem.startswith(said) for problem in caught.value.problems), caught.value.problems


def tokens(folder: str, words: list[str]) -> None:
    """Give a model a tokenizer, and an embedding and a head whose row n is n + 1, or ten times that of B."""
    model = {"type": "WordLevel", "vocab": {word: number for number, word in enumerate(words)}}
    Path(folder, "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": model}))
    with Checkpoint.open(folder) as checkpoint:
        tensors = load_numpy(checkpoint)
        config = dict(checkpoint.config or {})
    scale = 1.0 if folder == "A" else 10.0
    rows = np.repeat(scale * np.arange(1.0, len(words) + 1, dtype=np.float32)[:, None], 2, axis=1)
    tensors |= {"model.language_model.embed_tokens.weight": rows, "lm_head.weight": rows}
    save_file(tensors, Path(folder, "model.safetensors"), metadata={"format": "pt"})
    config["text_config"] = {**config["text_config"], "vocab_size": len(words)}
    Path(folder, "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("text_is_merged", [True, False])
def test_tokenizers_of_towers_are_united(text_is_merged: bool) -> None:
    tokens("A", ["a", "b", "c"])
    tokens("B", ["c", "d"])
    vision = {"vision_tower": models(1, 3)}
    merge(recipe({"text_decoder": models(1, 1), **vision} if text_is_merged else vision, tokenizer={}), "out")
    with Checkpoint.open("out") as checkpoint:
        found = load_numpy(checkpoint)
    # The word that both have is the mean, or the donor's where the text tower is copied; the others have one owner.
    wanted = [1, 2, 6.5, 20] if text_is_merged else [1, 2, 3, 0]
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        assert found[name][:, 0].tolist() == wanted
    assert found["model.visual.blocks.0.w.weight"][0, 0] == 7.75
    config = json.loads(Path("out/config.json").read_text())
    assert config["text_config"]["vocab_size"] == 4
    assert "vocab_size" not in config


def test_encoders_and_decoders_own_what_is_theirs() -> None:
    t5 = ["shared.weight", "lm_head.weight", "encoder.final_layer_norm.weight"]
    t5 += [f"{side}.block.{n}.layer.0.q.weight" for side in ("encoder", "decoder") for n in range(2)]
    bart = [f"model.{side}.layers.{n}.q.weight" for side in ("encoder", "decoder") for n in range(2)]
    for names in (t5, bart):
        stacks = find_stacks(names)
        owners = {name: owner_of(name, ("encoder", "decoder", "shared"), stacks) for name in names}
        assert all(side in name.split(".") or name == "lm_head.weight" for name, side in owners.items() if side)
        assert None not in owners.values()
    assert owner_of("lm_head.weight", ("encoder", "decoder"), find_stacks(t5)) == "decoder"
    assert owner_of("shared.weight", ("encoder", "decoder"), find_stacks(t5)) is None


def test_a_sliced_encoder_changes_its_own_number_of_layers() -> None:
    tensors = {f"{side}.block.{n}.q.weight": np.full((2, 2), n, np.float32) for side in ("encoder", "decoder")
               for n in range(3)}  # fmt: skip
    write(
        Path("T"), {**tensors, "shared.weight": np.ones((2, 2), np.float32)}, {"num_layers": 3, "num_decoder_layers": 3}
    )
    merge(recipe({"encoder": slices(("T", 0, 2))}, "passthrough"), "out")
    config = json.loads(Path("out/config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"]) == (2, 3)
    assert sorted(values()) == [
        "decoder.block.0.q.weight", "decoder.block.1.q.weight", "decoder.block.2.q.weight",
        "encoder.block.0.q.weight", "encoder.block.1.q.weight", "shared.weight",
    ]  # fmt: skip
