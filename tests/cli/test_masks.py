"""Tests of `graftwork masks`: one recipe for learning and merging, and what a user may get wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftwork.merge.artifact import load_artifact
from tests.cli.conftest import Command, Outcome
from tests.merge.subspace.problems import problem

TASKS = """
import os, time
from pathlib import Path
from graftwork.merge import Task
from tests.merge.subspace.problems import Plain, batches_of, inputs_of

first, second = (Task(name, Plain, batches_of(inputs_of(number))) for number, name in enumerate(("first", "second")))
empty = Task("empty", Plain, list)
calls = []


def slow_logits(module, inputs):
    calls.append(1)
    if len(calls) > 50 and "SLOW" in os.environ:
        Path("reached").touch()
        time.sleep(0.05)
    return module(inputs)


slow = Task("first", Plain, batches_of(inputs_of(0)), logits=slow_logits)
"""


def write_recipe(path: Path, method: str = "concrete_adamerging", **changes: Any) -> Path:
    content = {
        "merge_method": method, "base_model": "./base.safetensors", "mask": "masks.safetensors",
        "models": [{"model": "./a.safetensors", "task": "tasks.py:first"},
                   {"model": "./b.safetensors", "task": "tasks.py:second"}],
        **changes,
    }  # fmt: skip
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


@pytest.fixture
def folder(command: Command, tmp_path: Path) -> Path:
    given = problem(experts=2)
    for name, state in zip(("base", "a", "b"), (given.base, *given.experts), strict=True):
        save_file(state, tmp_path / f"{name}.safetensors")
    (tmp_path / "tasks.py").write_text(TASKS)
    write_recipe(tmp_path / "r.yml")
    return tmp_path


def test_one_recipe_serves_learning_and_merging(command: Command, folder: Path) -> None:
    learned = command("masks", "r.yml", "--steps", 20, "-q")
    assert learned.code == 0, learned.err
    assert "merge_method: concrete_adamerging, mask: masks.safetensors" in learned.out
    assert "undecided" in learned.out
    assert load_artifact(folder / "masks.safetensors", kind="mask").tensors["lambda"].shape == (2, 4)
    merged = command("merge", "r.yml", "out.safetensors", "-q")
    assert merged.code == 0, merged.err
    tree = command("inspect", "out.safetensors").out
    assert "masks.safetensors" in tree
    assert not list(folder.glob("*.partial*"))


@pytest.mark.parametrize(
    ("method", "shape"), [("adamerging", (2, 4)), ("concrete_task_arithmetic", (2, 1)), ("task_arithmetic", (2, 4))]
)
def test_the_method_decides_what_is_learned(command: Command, folder: Path, method: str, shape: Any) -> None:
    changes = {"mask": None, "parameters": {"weight": 1}} if method == "task_arithmetic" else {}
    write_recipe(folder / "r.yml", method, **changes)
    outcome = command("masks", "r.yml", "--steps", 3, "-q", "-o", "m.safetensors", "--json")
    assert outcome.code == 0, outcome.err
    record = json.loads(outcome.out)
    found = load_artifact(folder / "m.safetensors", kind="mask")
    assert found.tensors["lambda"].shape == shape
    assert (record["mask"] is None) == (method == "adamerging")
    assert record["digest"] == found.digest
    assert set(record["last_loss"]) == {"first", "second"}


def test_a_merge_learns_what_is_missing_and_leaves_out_what_is_excluded(command: Command, folder: Path) -> None:
    write_recipe(folder / "r.yml", mask=None, learn={"steps": 3}, exclude=["second.*"])
    outcome = command("merge", "r.yml", "out.safetensors", "-q", "--prepared", "prepared")
    assert outcome.code == 0, outcome.err
    [made] = (folder / "prepared").rglob("*mask.safetensors")
    assert {name for name in load_artifact(made, kind="mask").tensors if "." in name} == {
        "first.weight.logit", "first.bias.logit",
    }  # fmt: skip
    base, merged = (load_file(folder / f"{name}.safetensors") for name in ("base", "out"))
    assert torch.equal(base["second.weight"], merged["second.weight"])
    assert not torch.equal(base["first.weight"], merged["first.weight"])


def test_tasks_of_the_command_line_replace_those_of_the_recipe(command: Command, folder: Path) -> None:
    arguments = ("masks", "r.yml", "--steps", 3, "-q", "--json")
    first = json.loads(command(*arguments).out)
    swapped = command(*arguments, "-f", "--task", "tasks.py:second", "--task", "tasks.py:first")
    assert [item["name"] for item in json.loads(swapped.out)["inputs"]] == ["second", "first"]
    assert first["digest"] != json.loads(swapped.out)["digest"]


def failed(outcome: Outcome, text: str, code: int = 1) -> None:
    assert outcome.code == code
    assert outcome.out == ""
    assert len(outcome.errors) == 1
    assert text in outcome.errors[0]


def test_mistakes_are_one_line_and_leave_nothing(command: Command, folder: Path) -> None:
    def run(*more: object) -> Outcome:
        return command("masks", "r.yml", "--steps", 3, "-q", *more)

    failed(run("--task", "tasks.py:first"), "names 2 models, and there are 1 task; give one --task for each model")
    failed(run("--task", "tasks.py:first", "--task", "tasks.py:empty"), 'task "empty": it has 0 train inputs')
    failed(run("--batch", 500), "it has 200 train inputs, a batch takes 500")
    failed(run("--temperature", 0), "temperature: is 0.0, has to be a positive number")
    failed(run("-o", "masks.bin"), "ends in .safetensors")
    failed(run("--hard", "--parametrisation", "layer_wise"), "has no mask")
    write_recipe(folder / "r.yml", models=[{"model": "./a.safetensors", "task": "tasks.py:first"}])
    failed(run(), "models")
    write_recipe(folder / "r.yml", "task_arithmetic", mask=None, parameters={"weight": 1})
    failed(run(), "--out is missing", code=2)
    assert not [path for path in folder.iterdir() if "mask" in path.name or "partial" in path.name]


def test_a_file_that_exists_stays(command: Command, folder: Path) -> None:
    (folder / "masks.safetensors").write_bytes(b"precious")
    outcome = command("masks", "r.yml", "--steps", 3, "-q")
    failed(outcome, "masks.safetensors")
    assert (folder / "masks.safetensors").read_bytes() == b"precious"


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_learned_and_the_same_command_goes_on(command: Command, folder: Path) -> None:
    arguments = ["masks", "r.yml", "--steps", "200", "-j", "1", "--task", "tasks.py:slow", "--task", "tasks.py:second"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "SLOW": "1"}
    with subprocess.Popen([sys.executable, "-m", "graftwork.cli", *arguments], cwd=folder, env=environment) as process:
        while not (folder / "reached").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert (folder / "masks.partial.safetensors").exists()
    assert not (folder / "masks.safetensors").exists()
    resumed = command(*arguments)
    assert resumed.code == 0, resumed.err
    assert "resuming: " in resumed.err
    assert "by an earlier run" in resumed.out
    one = (folder / "masks.safetensors").read_bytes()
    assert command(*arguments, "-f", "-q").code == 0
    assert (folder / "masks.safetensors").read_bytes() == one
