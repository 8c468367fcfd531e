"""Tests of `graftwork inspect`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from graftwork.merge.checkpoint import Checkpoint
from tests.cli.conftest import Command, recipe, save, tensors


def _rows(text: str) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in text.splitlines() if len(line.split(maxsplit=1)) == 2)


def test_a_file_is_described_by_its_header(command: Command, models: Path) -> None:
    outcome = command("inspect", "a.safetensors")
    assert outcome.code == 0
    rows = _rows(outcome.out)
    assert rows["kind"] == "model"
    assert rows["format"] == "safetensors file"
    assert rows["tensors"] == "6"
    assert rows["parameters"] == f"{sum(value.size for value in tensors(1).values()):,}"
    assert rows["layers"] == "2 under layers"
    assert "dtype       F32: 5 tensors, 448 parameters, 1.79 KB" in outcome.out


def test_json_lists_every_tensor_on_request(command: Command, models: Path) -> None:
    record = json.loads(command("inspect", "a.safetensors", "--json", "--tensors").out)
    assert {item["name"]: item["shape"] for item in record["tensor_list"]} == {
        name: list(value.shape) for name, value in tensors(1).items()
    }
    assert record["stacks"] == [{"prefix": "layers", "layers": 2, "is_uniform": True}]
    assert "tensor_list" not in json.loads(command("inspect", "a.safetensors", "--json").out)


def test_tensors_are_listed_with_shape_and_dtype(command: Command, models: Path) -> None:
    lines = command("inspect", "a.safetensors", "--tensors").out.splitlines()
    assert any(line.split() == ["embed.weight", "F32", "[24,", "8]", "768", "B"] for line in lines)


def test_a_merged_model_tells_its_family_tree(command: Command, models: Path) -> None:
    assert command("merge", recipe(models / "first.yml"), "first.safetensors").code == 0
    second = recipe(models / "second.yml", "ties", names=("first",), base_model="./base.safetensors")
    assert command("merge", second, "second").code == 0
    text = command("inspect", "second").out
    lines = text[text.index("made from") :].splitlines()[1:]
    tree = [re.sub(r"  (\(|[0-9a-f]{12}).*", "", line.removeprefix("  ")) for line in lines]
    assert tree == [
        "second", "├─ first.safetensors", "│  ├─ a.safetensors", "│  └─ b.safetensors", "└─ base.safetensors"
    ]  # fmt: skip
    record = json.loads(command("inspect", "second", "--json").out)
    assert record["method"] == "ties"
    assert record["recipe"]["merge_method"] == "ties"
    with Checkpoint.open(models / "second") as opened:
        assert record["digest"] == opened.content_digest()


def test_shards_are_counted(command: Command, models: Path) -> None:
    assert command("merge", recipe(models / "r.yml"), "out", "--max-shard-size", "1K").code == 0
    record = json.loads(command("inspect", "out", "--json").out)
    assert record["form"] == f"folder, safetensors in {len(record['files'])} shards"
    assert sum(file["tensors"] for file in record["files"].values()) == 6


def test_quantised_weights_can_be_looked_at(command: Command, models: Path) -> None:
    save(models / "packed.safetensors", {"layer.qweight": np.zeros((4, 4), np.int32)})
    assert command("inspect", "packed.safetensors").code == 0


def test_what_cannot_be_opened_is_one_line(command: Command, models: Path) -> None:
    (models / "broken.safetensors").write_bytes(b"\0" * 100)
    for name in ("broken.safetensors", "nowhere", "model.gguf"):
        outcome = command("inspect", name)
        assert outcome.code == 1
        assert outcome.err.count("\n") == 1
        assert name in outcome.errors[0]
