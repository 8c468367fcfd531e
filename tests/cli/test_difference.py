"""Tests of `graftwork diff`: its numbers against closed forms, and against numpy."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file as save_torch

from graftwork.merge.artifact import save_artifact
from graftwork.merge.checkpoint import BLOCK, Checkpoint
from graftwork.merge.difference import compare
from tests.cli.conftest import Command, save, tensors


def _difference(command: Command, a: str = "a.safetensors", b: str = "b.safetensors") -> dict:
    outcome = command("diff", a, b, "--json")
    assert outcome.code == 0, outcome
    return json.loads(outcome.out)


def test_numbers_agree_with_numpy(command: Command, models: Path) -> None:
    found = {item["name"]: item for item in _difference(command)["tensors"]}
    for name, value in tensors(1).items():
        if value.dtype.kind != "f":
            continue
        a, b = value.astype(np.float64).ravel(), tensors(2)[name].astype(np.float64).ravel()
        assert found[name]["norm_a"] == pytest.approx(np.linalg.norm(a), rel=1e-14)
        assert found[name]["norm_b"] == pytest.approx(np.linalg.norm(b), rel=1e-14)
        assert found[name]["norm_difference"] == pytest.approx(np.linalg.norm(a - b), rel=1e-14)
        assert found[name]["relative_change"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-14)
        assert found[name]["cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-14)
        assert found[name]["differing"] == np.count_nonzero(a != b)


def test_a_checkpoint_does_not_differ_from_itself(command: Command, models: Path) -> None:
    record = _difference(command, "a.safetensors", "a.safetensors")
    assert record["is_identical"]
    assert record["total"]["relative_change"] == 0
    assert record["total"]["cosine"] == 1
    outcome = command("diff", "a.safetensors", "a.safetensors")
    assert "identical  yes" in outcome.out


def test_integers_are_counted_not_measured(command: Command, models: Path) -> None:
    save(models / "b.safetensors", tensors(1) | {"steps": np.array([0, 1, 9, 9])})
    record = _difference(command)
    (item,) = [item for item in record["tensors"] if item["name"] == "steps"]
    assert item["differing"] == 2
    assert "cosine" not in item
    assert record["identical_tensors"] == 5


def test_names_and_shapes_that_one_side_lacks_are_listed(command: Command, models: Path) -> None:
    values = tensors(2) | {"embed.weight": np.zeros((3, 8), np.float32), "new": np.zeros(2, np.float32)}
    del values["layers.0.up.weight"]
    save(models / "b.safetensors", values)
    record = _difference(command)
    assert record["only_a"] == ["layers.0.up.weight"]
    assert record["only_b"] == ["new"]
    assert [(item["name"], item["shape_a"], item["shape_b"]) for item in record["incomparable"]] == [
        ("embed.weight", [24, 8], [3, 8])
    ]
    lines = [" ".join(line.split()) for line in command("diff", "a.safetensors", "b.safetensors").out.splitlines()]
    assert "only in A layers.0.up.weight" in lines
    assert "only in B new" in lines
    assert "not alike embed.weight: F32 [24, 8], F32 [3, 8]" in lines


def test_dtypes_are_compared_by_value(command: Command, models: Path) -> None:
    values = {"w": torch.arange(64, dtype=torch.float32)}
    save_torch(values, models / "wide.safetensors")
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16), ("f64", torch.float64)):
        save_torch({"w": values["w"].to(dtype)}, models / f"{name}.safetensors")
        (item,) = _difference(command, "wide.safetensors", f"{name}.safetensors")["tensors"]
        assert (item["differing"], item["norm_difference"], item["is_identical"]) == (0, 0, False)


def test_layers_add_up_to_the_whole(command: Command, models: Path) -> None:
    record = _difference(command)
    assert [layer["layer"] for layer in record["layers"]] == ["layers.0", "layers.1", ""]
    parts = math.fsum(layer["norm_difference"] ** 2 for layer in record["layers"])
    assert math.sqrt(parts) == pytest.approx(record["total"]["norm_difference"], rel=1e-14)


def test_zeros_and_infinities_are_valid_json(command: Command, models: Path) -> None:
    save(models / "zero.safetensors", {"w": np.zeros(4, np.float32)})
    save(models / "odd.safetensors", {"w": np.array([1, np.inf, np.nan, 0], np.float32)})
    (item,) = _difference(command, "zero.safetensors", "zero.safetensors")["tensors"]
    assert (item["relative_change"], item["cosine"]) == (0, None)
    (item,) = _difference(command, "zero.safetensors", "odd.safetensors")["tensors"]
    assert item["norm_b"] == "nan"


def test_threads_do_not_change_a_bit(models: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("x", "y"):
        save(models / f"{name}.safetensors", {f"w{i}": rng.normal(size=2 * BLOCK + 77 * i) for i in range(3)})
    with Checkpoint.open(models / "x.safetensors") as x, Checkpoint.open(models / "y.safetensors") as y:
        assert compare(x, y, threads=1) == compare(x, y, threads=3)


def test_the_table_shows_what_changed_most_first(command: Command, models: Path) -> None:
    values = tensors(1)
    values["layers.1.up.weight"] = values["layers.1.up.weight"] * 2
    values["layers.0.up.weight"] = values["layers.0.up.weight"] * 1.5
    save(models / "b.safetensors", values)
    outcome = command("diff", "a.safetensors", "b.safetensors", "--top", "1")
    listed = outcome.out[outcome.out.index("tensor  ") :].splitlines()[1:]
    assert len(listed) == 1
    assert listed[0].split()[0] == "layers.1.up.weight"
    assert "100 %" in listed[0]
    assert "1 more changed" in outcome.err


def test_a_picture_is_drawn(command: Command, models: Path) -> None:
    outcome = command("diff", "a.safetensors", "b.safetensors", "--picture", "change.png")
    assert outcome.code == 0
    assert (models / "change.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_side_is_one_line(command: Command, models: Path) -> None:
    outcome = command("diff", "a.safetensors", "nowhere.safetensors")
    assert outcome.code == 1
    assert "nowhere.safetensors" in outcome.errors[0]


def _artifacts(folder: Path, kind: str, *contents: dict[str, np.ndarray]) -> None:
    for name, values in zip(("a", "b"), contents, strict=True):
        save_artifact(folder / f"{name}.safetensors", values, kind=kind, method="test", settings={}, force=True)


def test_masks_are_compared_by_what_they_choose(command: Command, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(2, 50)).astype("f4") for _ in range(2))
    _artifacts(tmp_path, "mask", {"w.logit": a, "v.logit": a, "lambda": a}, {"w.logit": b, "v.logit": a, "lambda": b})
    rows = {row["tensor"]: row for row in _difference(command)["comparison"]}
    assert set(rows) == {"v", "w", "all"}
    p, q = (1 / (1 + np.exp(-value.astype(np.float64).ravel())) for value in (a, b))
    assert rows["w"]["agreement"] == np.mean((p > 0.5) == (q > 0.5))
    assert rows["w"]["correlation"] == pytest.approx(np.corrcoef(p, q)[0, 1], abs=1e-12)
    assert (rows["w"]["density_of_A"], rows["w"]["density_of_B"]) == (pytest.approx(p.mean()), pytest.approx(q.mean()))
    assert (rows["v"]["agreement"], rows["v"]["correlation"]) == (1.0, pytest.approx(1.0))
    out = command("diff", "a.safetensors", "b.safetensors").out
    assert "agreement" in out
    assert "entries that differ" not in out


def test_fishers_are_compared_by_correlation_and_overlap(command: Command, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.random(60).astype("f4") for _ in range(2))
    apart = np.array([1, 0, 0, 0], "f4"), np.array([0, 0, 2, 0], "f4")
    _artifacts(
        tmp_path, "fisher", {"w": a, "apart": apart[0], "same": a, "flat": np.ones(3, "f4")},
        {"w": b, "apart": apart[1], "same": 3 * a, "flat": np.ones(3, "f4")},
    )  # fmt: skip
    rows = {row["tensor"]: row for row in _difference(command)["comparison"]}
    x, y = a.astype(np.float64), b.astype(np.float64)
    assert rows["w"]["correlation"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    scaled = x / x.sum(), y / y.sum()
    distance = 0.5 * np.sum((np.sqrt(scaled[0]) - np.sqrt(scaled[1])) ** 2)
    assert rows["w"]["overlap"] == pytest.approx(1 - distance, rel=1e-12)
    assert rows["apart"]["overlap"] == 0
    assert rows["same"]["overlap"] == pytest.approx(1, rel=1e-6)
    assert rows["flat"]["correlation"] is None


def test_files_of_different_kinds_are_compared_as_tensors(command: Command, tmp_path: Path) -> None:
    values = {"w": np.ones(4, np.float32)}
    _artifacts(tmp_path, "fisher", values, values)
    save_artifact(tmp_path / "b.safetensors", values, kind="model", method="test", settings={}, force=True)
    record = _difference(command)
    assert "comparison" not in record
    assert record["is_identical"]
