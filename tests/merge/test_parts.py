"""Models that consist of several: diffusers pipelines, and sentence-transformers with weights in modules."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from graftwork.merge import load_recipe, make_plan, merge
from graftwork.merge.checkpoint import Checkpoint
from graftwork.merge.errors import CheckpointError, MismatchError, OutputError
from graftwork.merge.plan import Options
from graftwork.merge.run import Settings
from graftwork.merge.verify import verify


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def weights(path: str, value: float, *names: str, dtype: type = np.float32) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.full((4, 4), value, dtype) for name in names}, path, metadata={"format": "pt"})


def text(path: str, content: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content))


def pipeline(name: str, value: float, *, checker: bool = False, **unet: Any) -> str:
    components: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIM"]}
    components |= {part: ["x", "X"] for part in ("unet", "text_encoder", "tokenizer")}
    if checker:
        components["safety_checker"] = ["x", "X"]
        weights(f"{name}/safety_checker/model.safetensors", value, "check.weight")
        text(f"{name}/safety_checker/config.json", {"architectures": ["Checker"]})
    text(f"{name}/model_index.json", components)
    text(f"{name}/scheduler/scheduler_config.json", {"steps": value})
    text(f"{name}/tokenizer/vocab.json", {"a": 0})
    Path(name, "tokenizer/merges.txt").write_text("a b")
    text(f"{name}/unet/config.json", {"_class_name": "UNet2DConditionModel", "act_fn": "silu", **unet})
    text(f"{name}/text_encoder/config.json", {"architectures": ["CLIPTextModel"], "torch_dtype": "float16"})
    for stem in ("diffusion_pytorch_model", "diffusion_pytorch_model.fp16"):
        weights(f"{name}/unet/{stem}.safetensors", value, "conv_in.weight", "up.0.weight", "up.1.weight")
    weights(f"{name}/text_encoder/model.safetensors", 10 * value, "up.0.weight")
    weights(f"{name}/single-file.safetensors", value, "everything")
    Path(name, "LICENSE").write_text("free")
    Path(name, "README.md").write_text("theirs")
    return name


def recipe(*models: str, **parameters: Any) -> Path:
    content = {"merge_method": "linear", "models": [{"model": name} for name in models]}
    Path("r.yml").write_text(json.dumps({**content, "parameters": {"weight": 1, **parameters}}))
    return Path("r.yml")


def everything(path: str) -> set[str]:
    return {file.relative_to(path).as_posix() for file in Path(path).rglob("*") if file.is_file()}


def value(path: str, name: str) -> float:
    return float(np.unique(load_file(path)[name])[0])


def test_every_component_of_a_pipeline_is_merged_into_its_own_folder() -> None:
    merge(recipe(pipeline("A", 1.0), pipeline("B", 3.0)), "out")
    assert everything("out") == {
        "model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "text_encoder/config.json",
        "text_encoder/model.safetensors", "LICENSE", "README.md", "graftwork_recipe.yml",
    }  # fmt: skip
    unet = load_file("out/unet/diffusion_pytorch_model.safetensors")
    assert set(unet) == {"conv_in.weight", "up.0.weight", "up.1.weight"}
    assert {float(found) for item in unet.values() for found in np.unique(item)} == {2.0}
    assert value("out/text_encoder/model.safetensors", "up.0.weight") == 20
    assert Path("out/unet/config.json").read_bytes() == Path("A/unet/config.json").read_bytes()
    assert json.loads(Path("out/text_encoder/config.json").read_text())["torch_dtype"] == "float32"
    assert json.loads(Path("out/scheduler/scheduler_config.json").read_text()) == {"steps": 1.0}


def test_filters_tell_components_apart() -> None:
    weight = [{"filter": "unet/up.0", "value": 3}, {"value": 1}]
    path = recipe(pipeline("A", 1.0), pipeline("B", 3.0))
    content = json.loads(path.read_text())
    content["models"][1]["parameters"] = {"weight": weight}
    path.write_text(json.dumps({**content, "exclude": ["text_encoder/*"]}))
    merge(path, "out")
    unet = load_file("out/unet/diffusion_pytorch_model.safetensors")
    assert {name: float(item[0, 0]) for name, item in unet.items()} == {
        "conv_in.weight": 2, "up.0.weight": 2.5, "up.1.weight": 2,
    }  # fmt: skip
    assert value("out/text_encoder/model.safetensors", "up.0.weight") == 10


@pytest.mark.parametrize("donor_has_it", [True, False])
def test_a_component_that_not_all_have_is_the_donor_s(donor_has_it: bool) -> None:
    models = [pipeline("A", 1.0, checker=donor_has_it), pipeline("B", 3.0, checker=not donor_has_it)]
    result = merge(recipe(*models), "out")
    if donor_has_it:
        assert value("out/safety_checker/model.safetensors", "check.weight") == 1
        assert [step.notes for step in result.plan.copied] == [["not all models have it"]]
    else:
        assert not Path("out/safety_checker").exists()
        (dropped,) = result.plan.dropped
        assert (dropped.entry.name, dropped.reason) == (
            "safety_checker/check.weight", "the donor has no such part",
        )  # fmt: skip


def test_the_output_is_read_back_as_a_whole_and_in_parts() -> None:
    result = merge(recipe(pipeline("A", 1.0), pipeline("B", 3.0)), "out")
    with Checkpoint.open("out") as checkpoint:
        found = verify(checkpoint)
        assert found.problems == ()
        assert found.digest == found.expected == result.digest
    with Checkpoint.open("out/unet") as checkpoint:
        found = verify(checkpoint)
        assert found.problems == ()
        assert any("part of a larger output" in note for note in found.notes)
    merge(recipe("out", "A"), "again")
    assert value("again/unet/diffusion_pytorch_model.safetensors", "conv_in.weight") == 1.5


def test_shards_and_indexes_are_those_of_each_component() -> None:
    merge(recipe(pipeline("A", 1.0), pipeline("B", 3.0)), "out", settings=Settings(max_shard_bytes=100))
    index = json.loads(Path("out/unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"]["up.1.weight"] == "diffusion_pytorch_model-00003-of-00003.safetensors"
    assert index["metadata"]["total_size"] == 3 * 64
    assert not Path("out/text_encoder/model.safetensors.index.json").exists()
    with Checkpoint.open("out") as checkpoint:
        assert verify(checkpoint).problems == ()
        assert len(checkpoint.tensors) == 4
    merge(recipe("out", "A"), "again")
    assert value("again/unet/diffusion_pytorch_model.safetensors", "up.1.weight") == 1.5


def test_components_are_compared_by_their_configurations() -> None:
    models = pipeline("A", 1.0), pipeline("B", 3.0, _class_name="UNet3DConditionModel")
    with pytest.raises(MismatchError, match='unet: config key "architectures" differs'):
        make_plan(load_recipe(recipe(*models)).recipes[0])
    plan = make_plan(load_recipe("r.yml").recipes[0], Options(allow_architectures=True))
    assert any(line.startswith("unet: ") for line in plan.warnings)
    plan.close()


def test_a_quantised_component_is_refused_by_name() -> None:
    pipeline("A", 1.0, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(CheckpointError, match=r"A/unet.* is quantised with bitsandbytes"):
        Checkpoint.open("A")


def test_a_pipeline_is_not_written_into_one_file() -> None:
    with pytest.raises(OutputError, match="parts in folders of their own; name a folder"):
        merge(recipe(pipeline("A", 1.0), pipeline("B", 3.0)), "out.safetensors")
    assert not Path("out.safetensors").exists()
    assert not Path("out.safetensors.partial").exists()


def test_an_interrupted_merge_of_pipelines_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(pipeline("A", 1.0), pipeline("B", 3.0))
    from graftwork.merge import writer

    real = writer.CheckpointWriter.finish
    done: list[str] = []

    def stop(self: Any, name: str, *rest: Any) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        real(self, name, *rest)
        done.append(name)

    from graftwork.merge.run import Interrupted

    monkeypatch.setattr(writer.CheckpointWriter, "finish", stop)
    with pytest.raises(Interrupted):
        merge(path, "out", threads=1)
    monkeypatch.setattr(writer.CheckpointWriter, "finish", real)
    assert merge(path, "out", threads=1).resumed == 2
    merge(path, "whole")
    for name in everything("whole") - {"README.md"}:
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes(), name


def sentences(name: str, value: float, *, pooling: str = "mean") -> str:
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    text(f"{name}/modules.json", modules)
    text(f"{name}/config.json", {"model_type": "bert", "torch_dtype": "float32"})
    text(f"{name}/1_Pooling/config.json", {"mode": pooling})
    text(f"{name}/2_Dense/config.json", {"in_features": 4})
    weights(f"{name}/model.safetensors", value, "encoder.layer.0.w", "encoder.layer.1.w")
    weights(f"{name}/2_Dense/model.safetensors", 10 * value, "linear.weight")
    return name


def test_the_modules_of_sentence_transformers_are_merged_alike() -> None:
    merge(recipe(sentences("A", 1.0), sentences("B", 3.0)), "out")
    assert everything("out") == {
        "modules.json", "config.json", "1_Pooling/config.json", "2_Dense/config.json", "model.safetensors",
        "2_Dense/model.safetensors", "README.md", "graftwork_recipe.yml",
    }  # fmt: skip
    assert value("out/model.safetensors", "encoder.layer.1.w") == 2
    assert value("out/2_Dense/model.safetensors", "linear.weight") == 20
    with Checkpoint.open("out") as checkpoint:
        assert verify(checkpoint).problems == ()


def test_another_pooling_is_warned_of() -> None:
    plan = make_plan(load_recipe(recipe(sentences("A", 1.0), sentences("B", 3.0, pooling="cls"))).recipes[0])
    assert "B pools its tokens in another way than A does" in plan.warnings
    plan.close()
    shutil.rmtree("B")
    plan = make_plan(load_recipe(recipe("A", sentences("B", 3.0))).recipes[0])
    assert not any("pools" in line for line in plan.warnings)
    plan.close()


def test_a_transformer_in_a_folder_of_its_own_is_a_part() -> None:
    for name, number in (("A", 1.0), ("B", 3.0)):
        text(f"{name}/modules.json", [{"path": "0_Transformer"}, {"path": "1_Pooling"}])
        text(f"{name}/0_Transformer/config.json", {"model_type": "bert", "torch_dtype": "float16"})
        weights(f"{name}/0_Transformer/model.safetensors", number, "w")
    merge(recipe("A", "B"), "out")
    assert value("out/0_Transformer/model.safetensors", "w") == 2
    assert "model.safetensors" not in os.listdir("out")
    assert json.loads(Path("out/0_Transformer/config.json").read_text())["torch_dtype"] == "float32"
