"""Tests of `graftwork verify`: whatever is changed after a merge is found."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.cli.conftest import Command, Outcome, recipe, save, tensors


@pytest.fixture
def merged(command: Command, models: Path) -> Path:
    outcome = command("merge", recipe(models / "r.yml"), "out", "--quiet")
    assert outcome.code == 0, outcome
    return models / "out"


def _rewrite(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Change tensors and keep the metadata."""
    with safe_open(path, "np") as opened:
        metadata = opened.metadata()
    values = load_file(path)
    change(values)
    save_file(values, path, metadata=metadata)


def _problems(outcome: Outcome) -> list[str]:
    assert outcome.code == 1
    return [line for line in outcome.out.splitlines() if line.startswith("problem: ")]


def test_what_a_merge_writes_is_sound(command: Command, merged: Path) -> None:
    outcome = command("verify", "out")
    assert outcome.code == 0
    assert "as its metadata say" in outcome.out
    assert "sound" in outcome.out
    record = json.loads(command("verify", "out", "--json").out)
    assert record["is_sound"]
    assert record["digest"] == record["expected_digest"]


def test_one_changed_bit_is_found(command: Command, merged: Path) -> None:
    path = merged / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    (problem,) = _problems(command("verify", "out"))
    assert "it was changed" in problem


def test_values_that_are_not_finite_are_counted_and_placed(command: Command, merged: Path) -> None:
    def change(values: dict[str, np.ndarray]) -> None:
        values["embed.weight"].flat[[17, 40]] = [np.nan, -np.inf]

    _rewrite(merged / "model.safetensors", change)
    problems = _problems(command("verify", "out"))
    assert len(problems) == 2
    assert '"embed.weight" holds 2 of 192 values that are not finite, the first at index 17' in problems[1]


def test_a_checkpoint_of_others_has_no_digest_to_compare(command: Command, models: Path) -> None:
    outcome = command("verify", "a.safetensors")
    assert outcome.code == 0
    assert "computed now" in outcome.out
    assert "note: " in outcome.err


def test_an_index_that_does_not_agree_is_found(command: Command, models: Path) -> None:
    assert command("merge", recipe(models / "r.yml"), "out", "--max-shard-size", "1K").code == 0
    index = models / "out" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["metadata"]["total_size"] += 1
    files = list(content["weight_map"].values())
    # A tensor that shares its shard with another one: the shard is opened all the same.
    name = next(name for name, file in content["weight_map"].items() if files.count(file) > 1)
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    problems = _problems(command("verify", "out"))
    assert len(problems) == 2
    assert name in problems[0]
    assert "bytes" in problems[1]
    del content["metadata"]
    index.write_text(json.dumps(content))
    assert any('no "metadata"' in problem for problem in _problems(command("verify", "out")))


def _language_model(folder: Path, config: dict[str, object], values: dict[str, np.ndarray]) -> None:
    save(folder / "model.safetensors", values)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **config}))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_hidden_layers": 3}, ["num_hidden_layers = 3", '2 under "model.layers"']),
        ({"vocab_size": 25}, ["24 rows", "vocab_size = 25"]),
        ({"tie_word_embeddings": True}, ["ties the head", "lm_head.weight"]),
    ],
)
def test_a_config_that_does_not_agree_is_found(
    command: Command, models: Path, config: dict[str, object], words: list[str]
) -> None:
    values = {f"model.{name}".replace("embed.", "embed_tokens."): value for name, value in tensors(0).items()}
    values["lm_head.weight"] = values["model.embed_tokens.weight"] + 1
    right = {"num_hidden_layers": 2, "vocab_size": 24, "tie_word_embeddings": False}
    _language_model(models / "right", right, values)
    assert command("verify", "right").code == 0
    _language_model(models / "wrong", right | config, values)
    problems = _problems(command("verify", "wrong"))
    assert problems
    assert all(word in problems[0] for word in words)


def test_a_head_that_loaders_would_make_up_is_found(command: Command, models: Path) -> None:
    values = {f"model.{name}".replace("embed.", "embed_tokens."): value for name, value in tensors(0).items()}
    _language_model(models / "headless", {"tie_word_embeddings": False}, values)
    (problem,) = _problems(command("verify", "headless"))
    assert "make one up" in problem


def test_sha256_is_that_of_the_files(command: Command, merged: Path) -> None:
    record = json.loads(command("verify", "out", "--sha256", "--json").out)
    for file in merged.iterdir():
        assert record["sha256"][file.name] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert f"{record['sha256']['README.md']}  README.md" in command("verify", "out", "--sha256").out


def test_a_truncated_file_is_one_line(command: Command, merged: Path) -> None:
    path = merged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    outcome = command("verify", "out")
    assert outcome.code == 1
    assert len(outcome.errors) == 1


def test_a_missing_output_is_one_line(command: Command, merged: Path) -> None:
    shutil.rmtree(merged)
    outcome = command("verify", "out")
    assert (outcome.code, len(outcome.errors)) == (1, 1)
