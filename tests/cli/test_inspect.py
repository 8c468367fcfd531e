"""Tests of `graftwork inspect`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from graftwork.merge.artifact import save_artifact
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


def artifact(path: Path, kind: str, values: dict[str, np.ndarray], **more: str) -> Path:
    save_artifact(path, values, kind=kind, method="test", settings={}, force=True, **more)
    return path


def test_a_mask_is_summed_up_by_layer(command: Command, tmp_path: Path) -> None:
    """Logits of which the expected mask is known: log(p / (1 − p)) gives p."""
    shares = {"layers.0.up": [0.05, 0.95, 0.5, 0.5], "layers.1.up": [0.99] * 2, "head": [0.25] * 4}
    values = {f"{name}.logit": np.log(np.array(p) / (1 - np.array(p))).astype("f4") for name, p in shares.items()}
    artifact(tmp_path / "m.safetensors", "mask", {**values, "lambda": np.ones((2, 1), np.float32)})
    rows = json.loads(command("inspect", "m.safetensors", "--json").out)["summary"]
    found = {row["layer"]: (row["values"], row["density"], row["decided"]) for row in rows}
    assert found == {
        "layers.0": (4, pytest.approx(0.5), 0.5),
        "layers.1": (2, pytest.approx(0.99), 1.0),
        "head": (4, pytest.approx(0.25), 0.0),
        "all": (10, pytest.approx((2 + 1.98 + 1) / 10), 0.4),
    }
    assert "layers.1       2  99.00 %  100.00 %" in command("inspect", "m.safetensors").out


def test_a_fisher_is_summed_up_by_layer(command: Command, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = {f"h.{i}.{kind}": rng.random((5, 7)).astype("f4") for i in range(2) for kind in ("up", "down")}
    values["h.0.up"][0] = 0
    artifact(tmp_path / "f.safetensors", "fisher", values)
    rows = {row["layer"]: row for row in json.loads(command("inspect", "f.safetensors", "--json").out)["summary"]}
    both = np.concatenate([values["h.0.up"].ravel(), values["h.0.down"].ravel()]).astype(np.float64)
    assert rows["h.0"]["mean"] == pytest.approx(both.mean(), rel=1e-12)
    assert rows["h.0"]["largest"] == both.max()
    assert rows["h.0"]["zeros"] == 7 / 70
    assert rows["all"]["values"] == 140
    assert "10.00 %" in command("inspect", "f.safetensors").out


def test_a_permutation_tells_how_many_units_moved(command: Command, tmp_path: Path) -> None:
    values = {"first": np.array([1, 0, 2, 3], np.int32), "second": np.arange(6, dtype=np.int32)}
    artifact(tmp_path / "p.safetensors", "permutation", values)
    rows = json.loads(command("inspect", "p.safetensors", "--json").out)["summary"]
    assert [(row["group"], row["units"], row["moved"]) for row in rows] == [
        ("first", 4, 0.5), ("second", 6, 0.0), ("all", 10, 0.2)
    ]  # fmt: skip


def test_the_masks_of_tasks_are_summed_up_by_task(command: Command, tmp_path: Path) -> None:
    bits = np.array([1, 0, 0, 1, 1, 1, 0, 0, 1, 1], np.uint8)
    values = {
        "graftwork.delta.head.w": np.zeros(10, np.float32),
        "graftwork.mask.v1.0.head.w": np.packbits(bits, bitorder="little"),
        "graftwork.mask.plain.head.w": np.packbits(np.ones(10, np.uint8), bitorder="little"),
        "graftwork.rescale": np.ones(2, np.float32),
    }
    artifact(tmp_path / "t.safetensors", "task_masks", values)
    rows = json.loads(command("inspect", "t.safetensors", "--json").out)["summary"]
    assert {row["task"]: row["density"] for row in rows if row["layer"] == "all"} == {"plain": 1.0, "v1.0": 0.6}


def test_a_model_has_no_summary_of_values(command: Command, models: Path) -> None:
    assert "summary" not in json.loads(command("inspect", "a.safetensors", "--json").out)
