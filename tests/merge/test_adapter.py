"""LoRA adapters over their base, against float64 arithmetic on whole matrices."""

from __future__ import annotations

import json
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from graftwork.merge import load_recipe, make_plan, merge
from graftwork.merge.adapter import open_adapted
from graftwork.merge.checkpoint import Checkpoint, load_numpy
from graftwork.merge.errors import CheckpointError, RecipeError
from graftwork.merge.plan import Options

RANK = 3
SHAPES = {
    "model.embed_tokens.weight": (11, 8),
    "model.layers.0.q_proj.weight": (8, 8),
    "model.layers.0.up.weight": (16, 8),
    "model.layers.0.up.bias": (16,),
    "model.layers.1.q_proj.weight": (8, 8),
    "model.conv.weight": (6, 4, 3, 3),
    "model.norm.weight": (8,),
    "lm_head.weight": (11, 8),
}


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model folder in bfloat16."""
    folder = tmp_path / "base"
    folder.mkdir()
    tensors = {name: random(number, *shape).bfloat16() for number, (name, shape) in enumerate(SHAPES.items())}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    return folder


def adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "base_model_name_or_path": "org/base", **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    prefixed = {f"base_model.model.{name}": value.contiguous() for name, value in tensors.items()}
    save_file(prefixed, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def factors(module: str, rows: int, columns: int, *, rank: int = RANK, seed: int = 50) -> dict[str, torch.Tensor]:
    return {
        f"{module}.lora_A.weight": random(seed, rank, columns),
        f"{module}.lora_B.weight": random(seed + 1, rows, rank),
    }


def effective(base: Path, folder: Path) -> dict[str, np.ndarray]:
    with open_adapted(Checkpoint.open(base), folder) as checkpoint:
        return load_numpy(checkpoint)


def plain(base: Path) -> dict[str, np.ndarray]:
    with Checkpoint.open(base) as checkpoint:
        return {name: values.astype(np.float64) for name, values in load_numpy(checkpoint).items()}


def near(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Say whether values are the float64 ones rounded once to float32."""
    return found.dtype == np.float32 and np.array_equal(found, wanted.astype(np.float32))


def test_a_linear_layer_is_w_plus_scaled_b_a(base: Path, tmp_path: Path) -> None:
    tensors = factors("model.layers.0.up", 16, 8)
    found = effective(base, adapter(tmp_path / "a", tensors))
    a, b = (value.double().numpy() for value in tensors.values())
    wanted = plain(base)["model.layers.0.up.weight"] + 2.0 * (b @ a)
    assert np.abs(found["model.layers.0.up.weight"] - wanted).max() <= np.abs(wanted).max() * 2.0**-24
    untouched = set(SHAPES) - {"model.layers.0.up.weight"}
    assert all(np.array_equal(found[name], plain(base)[name]) for name in untouched)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 6 / 3**0.5),
        ({"alpha_pattern": {"up": 9}}, 3.0),
        ({"alpha_pattern": {"q_proj": 9, r"layers\.\d\.up": 12, "up": 1}}, 4.0),
    ],
)
def test_the_scale_follows_the_configuration(base: Path, tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    tensors = factors("model.layers.0.up", 16, 8)
    found = effective(base, adapter(tmp_path / "a", tensors, **config))["model.layers.0.up.weight"]
    a, b = (value.double().numpy() for value in tensors.values())
    wanted = plain(base)["model.layers.0.up.weight"] + scale * (b @ a)
    assert np.abs(found - wanted).max() < 1e-6


def test_modules_may_have_ranks_of_their_own(base: Path, tmp_path: Path) -> None:
    tensors = {**factors("model.layers.0.up", 16, 8, rank=2), **factors("model.layers.1.q_proj", 8, 8, seed=60)}
    found = effective(base, adapter(tmp_path / "a", tensors, rank_pattern={"up": 2}))
    a, b = (value.double().numpy() for value in list(tensors.values())[:2])
    wanted = plain(base)["model.layers.0.up.weight"] + 3.0 * (b @ a)
    assert np.abs(found["model.layers.0.up.weight"] - wanted).max() < 1e-6


@pytest.mark.parametrize("flag", [True, False])
def test_transposed_layers(tmp_path: Path, flag: bool) -> None:
    save_file({"c_fc.weight": random(0, 8, 16)}, tmp_path / "base.safetensors")
    tensors = factors("c_fc", 16, 8)
    found = effective(tmp_path / "base.safetensors", adapter(tmp_path / "a", tensors, fan_in_fan_out=flag))
    a, b = (value.double().numpy() for value in tensors.values())
    wanted = random(0, 8, 16).double().numpy() + 2.0 * (b @ a).T
    assert np.abs(found["c_fc.weight"] - wanted).max() < 1e-6


def test_embeddings_convolutions_biases_and_saved_modules(base: Path, tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.lora_embedding_A": random(1, RANK, 11),
        "model.embed_tokens.lora_embedding_B": random(2, 8, RANK),
        "model.conv.lora_A.weight": random(3, RANK, 4, 3, 3),
        "model.conv.lora_B.weight": random(4, 6, RANK, 1, 1),
        "model.layers.0.up.lora_B.bias": random(5, 16),
        "model.norm.weight": random(6, 8),
        "lm_head.modules_to_save.default.weight": random(7, 11, 8),
        **factors("model.layers.0.up", 16, 8),
    }
    found = effective(base, adapter(tmp_path / "a", tensors))
    old = plain(base)
    wide = {name: value.double().numpy() for name, value in tensors.items()}
    embedding = wide["model.embed_tokens.lora_embedding_B"] @ wide["model.embed_tokens.lora_embedding_A"]
    conv = wide["model.conv.lora_B.weight"].reshape(6, -1) @ wide["model.conv.lora_A.weight"].reshape(RANK, -1)
    assert np.abs(found["model.embed_tokens.weight"] - old["model.embed_tokens.weight"] - 2 * embedding.T).max() < 1e-6
    assert np.abs(found["model.conv.weight"] - old["model.conv.weight"] - 2 * conv.reshape(6, 4, 3, 3)).max() < 2e-6
    bias = old["model.layers.0.up.bias"] + 2 * wide["model.layers.0.up.lora_B.bias"]
    assert np.abs(found["model.layers.0.up.bias"] - bias).max() < 1e-6
    assert near(found["model.norm.weight"], wide["model.norm.weight"])
    assert near(found["lm_head.weight"], wide["lm_head.modules_to_save.default.weight"])


def test_any_range_has_the_same_bytes(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", factors("model.layers.0.up", 16, 8))
    with open_adapted(Checkpoint.open(base), folder) as checkpoint:
        name = "model.layers.0.up.weight"
        entry, whole = checkpoint.tensors[name], bytes(checkpoint.read(name))
        for offset, size in [(0, 4), (4, 60), (30, 3), (100, 300), (511, 1), (1, 511)]:
            part = bytearray(size)
            checkpoint.read_into(entry, offset, memoryview(part))
            assert bytes(part) == whole[offset : offset + size]


def test_several_adapters_of_one_base_are_merged_without_writing_them(base: Path, tmp_path: Path) -> None:
    tensors = [factors("model.layers.0.up", 16, 8, seed=seed) for seed in (50, 60)]
    for name, one in zip("ab", tensors, strict=True):
        adapter(tmp_path / name, one)
    (tmp_path / "recipe.yml").write_text(
        "merge_method: linear\ndtype: float32\nparameters: {weight: 0.5}\n"
        f"models: [{{model: {base}+{tmp_path}/a}}, {{model: {base}+{tmp_path}/b}}]\n"
    )
    result = merge(tmp_path / "recipe.yml", tmp_path / "out", threads=2)
    assert result.plan.labels == ["base+a", "base+b"]
    with Checkpoint.open(tmp_path / "out") as out:
        found = load_numpy(out)["model.layers.0.up.weight"]
    deltas = [b.double().numpy() @ a.double().numpy() for a, b in (one.values() for one in tensors)]
    assert np.abs(found - plain(base)["model.layers.0.up.weight"] - sum(deltas)).max() < 1e-6
    assert {path.name for path in tmp_path.iterdir()} == {"base", "a", "b", "recipe.yml", "out"}


def test_without_a_dtype_the_output_has_the_bases(base: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "a", factors("model.layers.0.up", 16, 8))
    (tmp_path / "recipe.yml").write_text(f"merge_method: passthrough\nmodels: [{{model: {base}+{tmp_path}/a}}]")
    merge(tmp_path / "recipe.yml", tmp_path / "out")
    with Checkpoint.open(tmp_path / "out") as out:
        assert {entry.dtype for entry in out.tensors.values()} == {"BF16"}
        found = load_numpy(out)["model.layers.0.up.weight"]
    wanted = effective(base, tmp_path / "a")["model.layers.0.up.weight"]
    assert np.array_equal(found, torch.from_numpy(wanted).bfloat16().float().numpy())


def test_an_adapter_on_one_of_two_tied_tensors_unties_them(base: Path, tmp_path: Path) -> None:
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))
    tensors = {
        name: random(n, *shape).bfloat16() for n, (name, shape) in enumerate(SHAPES.items()) if "head" not in name
    }
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    on_head = factors("lm_head", 11, 8)
    adapter(tmp_path / "a", on_head)
    (tmp_path / "recipe.yml").write_text(
        f"merge_method: passthrough\ndtype: float32\nmodels: [{{model: {base}+{tmp_path}/a}}]"
    )
    result = merge(tmp_path / "recipe.yml", tmp_path / "out")
    assert any("changes only the head, which the base ties" in warning for warning in result.plan.warnings)
    with Checkpoint.open(tmp_path / "out") as out:
        found = load_numpy(out)
        assert out.config is not None
        assert out.config["tie_word_embeddings"] is False
    old = tensors["model.embed_tokens.weight"].double().numpy()
    a, b = (value.double().numpy() for value in on_head.values())
    assert np.array_equal(found["model.embed_tokens.weight"], old)
    assert np.abs(found["lm_head.weight"] - old - 2 * (b @ a)).max() < 1e-6


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_on_request_a_change_of_one_of_two_tied_tensors_is_a_change_of_both(
    base: Path, tmp_path: Path, module: str
) -> None:
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))
    tensors = {
        name: random(n, *shape).bfloat16() for n, (name, shape) in enumerate(SHAPES.items()) if "head" not in name
    }
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    change = factors(module, 11, 8)
    adapter(tmp_path / "a", change)
    (tmp_path / "recipe.yml").write_text(
        f"merge_method: passthrough\ndtype: float32\nmodels: [{{model: {base}+{tmp_path}/a}}]"
    )
    merge(tmp_path / "recipe.yml", tmp_path / "out", options=Options(keep_tied=True))
    with Checkpoint.open(tmp_path / "out") as out:
        found = load_numpy(out)
        assert out.config is not None
        assert out.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in found
    a, b = (value.double().numpy() for value in change.values())
    old = tensors["model.embed_tokens.weight"].double().numpy()
    assert np.abs(found["model.embed_tokens.weight"] - old - 2 * (b @ a)).max() < 1e-6


def test_module_names_of_another_library_version_are_renamed(base: Path, tmp_path: Path) -> None:
    tensors = factors("net.blocks.0.fc1", 16, 8)
    folder = adapter(tmp_path / "a", tensors, alpha_pattern={"fc1": 9})
    with Checkpoint.open(base) as model, pytest.raises(CheckpointError, match="--rename OLD=NEW"):
        open_adapted(model, folder)
    renames = [("net.blocks", "model.layers"), ("fc1", "up")]
    with open_adapted(Checkpoint.open(base), folder, rename=renames) as checkpoint:
        found = load_numpy(checkpoint)["model.layers.0.up.weight"]
    a, b = (value.double().numpy() for value in tensors.values())
    wanted = plain(base)["model.layers.0.up.weight"] + 3.0 * (b @ a)  # patterns speak of the adapter's own names
    assert np.abs(found - wanted).max() < 1e-6


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_with_more_tokens_brings_its_rows_its_tokenizer_and_their_number(
    base: Path, tmp_path: Path, tied: bool
) -> None:
    config = {"model_type": "llama", "tie_word_embeddings": tied, "vocab_size": 11}
    (base / "config.json").write_text(json.dumps(config))
    if tied:
        tensors = {n: random(i, *s).bfloat16() for i, (n, s) in enumerate(SHAPES.items()) if "head" not in n}
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
    words = {f"t{number}": number for number in range(13)}
    for folder, count in ((base, 11), (tmp_path / "a", 13)):
        folder.mkdir(exist_ok=True)
        vocabulary = {"type": "WordLevel", "vocab": dict(list(words.items())[:count])}
        (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": vocabulary}))
    (base / "special_tokens_map.json").write_text("{}")
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    larger = {"model.embed_tokens.weight": random(70, 13, 8), "lm_head.weight": random(71, 13, 8)}
    if tied:
        del larger["lm_head.weight"]
    adapter(tmp_path / "a", larger | factors("model.layers.0.up", 16, 8))
    (tmp_path / "recipe.yml").write_text(f"merge_method: passthrough\nmodels: [{{model: {base}+{tmp_path}/a}}]")
    merge(tmp_path / "recipe.yml", tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "a" / "tokenizer.json").read_bytes()
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (out / "special_tokens_map.json").exists()  # it was the base's
    written = json.loads((out / "config.json").read_text())
    assert (written["vocab_size"], written["tie_word_embeddings"]) == (13, tied)
    with Checkpoint.open(out) as checkpoint:
        shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    assert shapes["model.embed_tokens.weight"] == (13, 8)
    assert shapes.get("lm_head.weight") == (None if tied else (13, 8))


REFUSED = [
    ({"peft_type": "IA3"}, {}, 'peft_type is "IA3"'),
    ({"use_dora": True}, {}, "use_dora"),
    ({}, {"model.layers.0.up.lora_magnitude_vector": torch.ones(16)}, "DoRA"),
    ({"init_lora_weights": "pissa_niter_4"}, {}, "init_lora_weights"),
    ({"layer_replication": [[0, 2]]}, {}, "layer_replication"),
    ({"trainable_token_indices": [3]}, {}, "trainable_token_indices"),
    ({"r": 5}, {}, "rank 5"),
    ({"r": "x"}, {}, "r of .* must be a positive number"),
    ({}, {"model.layers.0.down.lora_A.weight": torch.ones(RANK, 8)}, "the base has no such tensor"),
    ({}, {"model.layers.1.q_proj.lora_A.weight": torch.ones(RANK, 8)}, "only one of the two factors"),
    ({}, {"model.layers.0.up.lora_C.weight": torch.ones(2)}, "it is not known what"),
    ({}, {"model.norm.weight": torch.ones(9)}, r"shape \[9\]"),
    ({}, factors("model.layers.1.q_proj", 7, 8), r"\[7, 8\].* base is \[8, 8\]"),
    ({}, {"model.layers.0.up.lora_B.bias": torch.full((16,), torch.nan)}, "NaN or infinities"),
]


@pytest.mark.parametrize(("config", "more", "message"), REFUSED)
def test_what_is_no_sum_of_matrices_is_refused(
    base: Path, tmp_path: Path, config: dict[str, Any], more: dict[str, torch.Tensor], message: str
) -> None:
    folder = adapter(tmp_path / "a", {**factors("model.layers.0.up", 16, 8), **more}, **config)
    with pytest.raises(CheckpointError, match=message) as caught, Checkpoint.open(base) as model:
        open_adapted(model, folder)
    assert "\n" not in str(caught.value)


def test_a_chain_of_adapters_is_declined_with_what_to_do(base: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(f"merge_method: passthrough\nmodels: [{{model: {base}+a+b}}]")
    with pytest.raises(RecipeError, match="as two models"):
        load_recipe(tmp_path / "recipe.yml")


def test_another_base_than_the_adapter_names_is_a_warning(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", factors("model.layers.0.up", 16, 8), base_model_name_or_path="org/other-7b")
    (tmp_path / "recipe.yml").write_text(f"merge_method: passthrough\nmodels: [{{model: {base}+{folder}}}]")
    plan = make_plan(load_recipe(tmp_path / "recipe.yml").recipes[0])
    plan.close()
    assert any('says that its base is "other-7b", not "base"' in warning for warning in plan.warnings)


def test_memory_grows_by_the_two_factors_only(tmp_path: Path) -> None:
    rows, columns, rank = 4096, 1024, 4
    save_file({"fc.weight": random(0, rows, columns).bfloat16()}, tmp_path / "base.safetensors")
    folder = adapter(tmp_path / "a", factors("fc", rows, columns, rank=rank), r=rank)
    with open_adapted(Checkpoint.open(tmp_path / "base.safetensors"), folder) as checkpoint:
        entry, part = checkpoint.tensors["fc.weight"], memoryview(bytearray(1 << 16))
        checkpoint.read_into(entry, 0, part)  # what is compiled is not counted
    tracemalloc.start()
    try:
        with open_adapted(Checkpoint.open(tmp_path / "base.safetensors"), folder) as checkpoint:
            entry = checkpoint.tensors["fc.weight"]
            for offset in range(0, entry.size, len(part)):
                checkpoint.read_into(entry, offset, part)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    factor_bytes = (rows + columns) * rank * 8
    assert peak < 4 * factor_bytes + 8 * len(part)  # widened once, scaled once; a whole matrix would be 16 MiB
    assert peak < entry.size / 8


def test_threads_may_read_at_once(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", factors("model.layers.0.up", 16, 8))
    with open_adapted(Checkpoint.open(base), folder) as checkpoint:
        wanted = bytes(checkpoint.read("model.layers.0.up.weight"))
        found: list[bytes] = []
        threads = [
            threading.Thread(target=lambda: found.append(bytes(checkpoint.read("model.layers.0.up.weight"))))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [wanted] * 8


GOLDEN = Path(__file__).parents[1] / "golden" / "peft.safetensors"


def golden_cases() -> list[str]:
    with safe_open(GOLDEN, "pt") as file:
        return sorted(json.loads(file.metadata()["configs"]))


@pytest.mark.parametrize("case", golden_cases())
def test_effective_weights_are_those_that_peft_merges(tmp_path: Path, case: str) -> None:
    with safe_open(GOLDEN, "pt") as file:
        parts: dict[str, dict[str, torch.Tensor]] = {"base": {}, "adapter": {}, "merged": {}}
        for key in file.keys():  # noqa: SIM118 - not a mapping
            label, part, name = key.split(".", 2)
            if label == case:
                parts[part][name] = file.get_tensor(key)
        config = json.loads(file.metadata()["configs"])[case]
    save_file(parts["base"], tmp_path / "base.safetensors")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(config)
    save_file(parts["adapter"], tmp_path / "a" / "adapter_model.safetensors")
    found = effective(tmp_path / "base.safetensors", tmp_path / "a")
    assert found.keys() == parts["merged"].keys()
    changed = 0
    for name, values in found.items():
        merged = parts["merged"][name].numpy()
        assert np.all(np.abs(values - merged) <= 1.2e-7 * np.maximum(1, np.abs(merged)))
        changed += not np.array_equal(values, parts["base"][name].numpy())
    assert changed
