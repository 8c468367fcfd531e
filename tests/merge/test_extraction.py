"""Adapters extracted from fine-tuned models, and read back over their base."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from graftwork.merge.adapter import open_adapted
from graftwork.merge.checkpoint import Checkpoint, load_numpy
from graftwork.merge.errors import DataError, MismatchError, OutputError, RecipeError
from graftwork.merge.extraction import Extraction, ExtractionSettings, extract_adapter

SHAPES = {
    "model.embed_tokens.weight": (30, 24),
    "model.layers.0.mlp.up.weight": (40, 24),
    "model.layers.0.mlp.up.bias": (40,),
    "model.layers.0.mlp.down.weight": (24, 40),
    "model.layers.0.norm.weight": (24,),
    "model.conv.weight": (6, 5, 3, 3),
    "lm_head.weight": (30, 24),
}


def models(folder: Path, *, rank: int = 3, noise: float = 0.0, **config: object) -> tuple[Path, Path]:
    """Write a base and a model whose matrices differ from it by matrices of a low rank."""
    random = np.random.default_rng(0)
    base = {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    tuned = {}
    for name, values in base.items():
        change = random.standard_normal(values.shape)
        if values.ndim >= 2 and "head" not in name and "embed" not in name:
            rows = values.shape[0]
            change = random.standard_normal((rows, rank)) @ random.standard_normal((rank, values.size // rows))
            change = change.reshape(values.shape) + noise * random.standard_normal(values.shape)
        tuned[name] = (values + 0.1 * change).astype(np.float32)
    for name, tensors in (("base", base), ("tuned", tuned)):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder / "tuned", folder / "base"


def extract(tuned: Path, base: Path, out: Path, **settings: object) -> Extraction:
    with Checkpoint.open(tuned) as model, Checkpoint.open(base) as plain:
        return extract_adapter(model, plain, out, ExtractionSettings(**settings))


def values(path: Path, adapter: Path | None = None) -> dict[str, np.ndarray]:
    opened = Checkpoint.open(path)
    with open_adapted(opened, adapter) if adapter else opened as checkpoint:
        return load_numpy(checkpoint)


def test_a_change_of_low_rank_is_found_and_restores_every_tensor(tmp_path: Path) -> None:
    tuned, base = models(tmp_path)
    result = extract(tuned, base, tmp_path / "out", energy=0.999999)
    ranks = {item.module: item.rank for item in result.modules}
    assert ranks == {
        "model.layers.0.mlp.up": 3, "model.layers.0.mlp.down": 3, "model.conv": 3, "model.embed_tokens": 0,
        "model.layers.0.norm": 0, "lm_head": 0,
    }  # fmt: skip
    found, wanted = values(base, tmp_path / "out"), values(tuned)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert np.abs(found[name] - wanted[name]).max() < 2e-6, name
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["bias"] == "all"
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"
        assert "base_model.model.model.layers.0.mlp.up.base_layer.bias" in file.keys()  # noqa: SIM118 - not a mapping


@pytest.mark.parametrize("rank", [1, 2, 5, 100])
def test_the_error_is_the_tail_of_the_singular_values(tmp_path: Path, rank: int) -> None:
    tuned, base = models(tmp_path, noise=0.3)
    result = extract(tuned, base, tmp_path / "out", rank=rank)
    [item] = [item for item in result.modules if item.module == "model.layers.0.mlp.up"]
    name = "model.layers.0.mlp.up.weight"
    delta = values(tuned)[name].astype(np.float64) - values(base)[name]
    sizes = np.linalg.svd(delta, compute_uv=False)
    tail = np.sqrt((sizes[rank:] ** 2).sum())
    assert item.error == pytest.approx(tail / np.linalg.norm(delta), abs=1e-12)
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "np") as file:
        a, b = (file.get_tensor(f"base_model.model.model.layers.0.mlp.up.lora_{part}.weight") for part in "AB")
    assert np.linalg.norm(delta - b.astype(np.float64) @ a) == pytest.approx(tail, abs=1e-6)
    assert item.rank == min(rank, 24)


def test_energy_and_error_choose_the_least_rank(tmp_path: Path) -> None:
    tuned, base = models(tmp_path, rank=8, noise=0.01)
    by_energy = extract(tuned, base, tmp_path / "one", energy=0.99)
    name = "model.layers.0.mlp.up"
    squares = (
        np.linalg.svd(values(tuned)[f"{name}.weight"].astype(float) - values(base)[f"{name}.weight"], compute_uv=False)
        ** 2
    )
    wanted = 1 + int(np.argmax(np.cumsum(squares) >= 0.99 * squares.sum()))
    assert {item.rank for item in by_energy.modules if item.module == name} == {wanted}
    by_error = extract(tuned, base, tmp_path / "two", error=0.1)
    assert {item.rank for item in by_error.modules if item.module == name} == {wanted}


def test_embeddings_are_decomposed_on_request(tmp_path: Path) -> None:
    tuned, base = models(tmp_path)
    extract(tuned, base, tmp_path / "out", rank=24, embeddings=True)
    found, wanted = values(base, tmp_path / "out"), values(tuned)
    assert np.abs(found["model.embed_tokens.weight"] - wanted["model.embed_tokens.weight"]).max() < 2e-6


def test_modules_can_be_chosen(tmp_path: Path) -> None:
    tuned, base = models(tmp_path)
    result = extract(tuned, base, tmp_path / "out", include=("up$",), exclude=("conv", "norm"), whole=("down",))
    assert {item.module: item.rank for item in result.modules} == {
        "model.layers.0.mlp.up": 24, "model.layers.0.mlp.down": 0, "model.embed_tokens": 0, "lm_head": 0,
    }  # fmt: skip


def test_transposed_layers_of_gpt2(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number, name in enumerate(("base", "tuned")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "gpt2"}')
        weight = random.standard_normal((8, 24)).astype(np.float32) * (1 + number)
        save_file({"h.0.attn.c_attn.weight": weight}, tmp_path / name / "model.safetensors")
    extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=8)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    found, wanted = values(tmp_path / "base", tmp_path / "out"), values(tmp_path / "tuned")
    assert np.abs(found["h.0.attn.c_attn.weight"] - wanted["h.0.attn.c_attn.weight"]).max() < 2e-6


def test_what_cannot_be_extracted_leaves_nothing_behind(tmp_path: Path) -> None:
    tuned, base = models(tmp_path)
    with pytest.raises(MismatchError, match="are equal"):
        extract(base, base, tmp_path / "out")
    with pytest.raises(RecipeError, match="energy: is 2"):
        ExtractionSettings(energy=2.0)
    with pytest.raises(RecipeError, match="no regular expression"):
        ExtractionSettings(include=("(",))
    with pytest.raises(OutputError, match="it is the input"):
        extract(tuned, base, base)
    tensors = values(tuned)
    save_file({**tensors, "extra.weight": np.ones((2, 2), np.float32)}, tuned / "model.safetensors")
    with pytest.raises(MismatchError, match=r'the base lacks "extra\.weight"'):
        extract(tuned, base, tmp_path / "out")
    tensors["model.conv.weight"][0, 0, 0, 0] = np.nan
    save_file(tensors, tuned / "model.safetensors")
    with pytest.raises(DataError, match=r"model\.conv\.weight.* NaN"):
        extract(tuned, base, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned"}
