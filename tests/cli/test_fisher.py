"""Measuring on the command line, and merging with what was measured: a network with BatchNorm, from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from safetensors.torch import save_file

TASK = """
import os, signal
import torch
from torch import nn
from graftwork.merge import Task

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x[:, None]))).mean(2))

X = torch.arange(40 * 8.0).reshape(40, 8).sin()
CALLS = []
KILL = int(os.environ.get("KILL_AT", "0"))

def logits(module, inputs):
    CALLS.append(1)
    if os.environ.get("INTERRUPT_AT") == str(len(CALLS)):
        os.kill(os.getpid(), signal.SIGINT)
    if len(CALLS) == KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    return module(inputs)

waves = Task("waves", model=Network, batches=lambda: [(X, None)], logits=logits)
bad = Task("bad", model=Network, batches=lambda: [(X * float("nan"), None)])
other = Task("other", model=lambda: nn.Linear(3, 2), batches=lambda: [(X, None)])
empty = Task("empty", model=Network, batches=lambda: [])
few = Task("few", model=Network, batches=lambda: [(X[:7], None)])
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    namespace = {}
    exec(compile(TASK, "task.py", "exec"), namespace)
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        module = namespace["Network"]()
        module(torch.randn(32, 8))  # running statistics and their count
        save_file(module.state_dict(), tmp_path / f"{name}.safetensors")
    return tmp_path


def recipe(path: Path, method: str, **parameters: object) -> Path:
    models = [{"model": f"./{name}.safetensors", "statistics": {method: f"./{name}.{method}"}} for name in ("a", "b")]
    kind = {"fisher": "fisher", "regmean": "gram"}[method]
    for name, model in zip(("a", "b"), models, strict=True):
        model["statistics"] = {kind: f"./{name}.{kind}.safetensors"}
    path.write_text(yaml.safe_dump({"merge_method": method, "models": models, "parameters": parameters}))
    return path


def test_a_network_with_batch_norm_is_measured_and_merged(command, place):
    for name in ("a", "b"):
        for kind in ("fisher", "gram"):
            done = command(kind, f"{name}.safetensors", "--task", "task.py:waves", "-o", f"{name}.{kind}.safetensors")
            assert done.code == 0, done.err
    assert "exact" in command("inspect", "a.fisher.safetensors").out
    models = [load_file(place / f"{name}.safetensors") for name in ("a", "b")]
    for method in ("fisher", "regmean"):
        done = command("merge", recipe(place / f"{method}.yml", method), method)
        assert done.code == 0, done.err
        merged = load_file(place / method / "model.safetensors")
        assert merged["norm.num_batches_tracked"].dtype == np.int64
        assert np.allclose(
            merged["norm.running_mean"], (models[0]["norm.running_mean"] + models[1]["norm.running_mean"]) / 2
        )
        mean = (models[0]["head.weight"] + models[1]["head.weight"]) / 2
        assert np.abs(merged["head.weight"] - mean).max() > 1e-3
    information = [load_file(place / f"{name}.fisher.safetensors") for name in ("a", "b")]
    total = divisor = 0.0
    for model, one in zip(models, information, strict=True):
        everything = np.concatenate([values.reshape(-1) for values in one.values()]).astype(np.float64)
        share = np.maximum(one["head.weight"] / np.sqrt(np.mean(everything**2)), 1e-4)
        total, divisor = total + share * model["head.weight"].astype(np.float64), divisor + share
    merged = load_file(place / "fisher" / "model.safetensors")
    assert np.allclose(merged["head.weight"], total / divisor, rtol=1e-6, atol=1e-7)


def test_what_was_measured_is_told_as_json(command, place):
    done = command("fisher", "a.safetensors", "-t", "task.py:waves", "-o", "f.safetensors", "-n", "20", "--json")
    told = json.loads(done.out)
    assert told["examples"] == 20
    assert told["estimator"] == "exact"
    assert told["skipped"]["norm.running_mean"] == "buffer"
    done = command("gram", "a.safetensors", "-t", "task.py:few", "-o", "g.safetensors", "--json")
    assert json.loads(done.out)["layers"]["conv.weight"]["rows"] == 42
    done = command("gram", "a.safetensors", "-t", "task.py:few", "-o", "h.safetensors", "-n", "3")
    assert "warning: 1 of 2 layers saw fewer rows than they have inputs, first head.weight: 3 for 5" in done.err


WRONG = [
    ("task.py:empty", (), 'cannot measure on task "empty": it has no examples'),
    ("task.py:few", ("-n", "256"), 'cannot measure on task "few": it has 7 examples, 256 are asked for'),
    ("task.py:bad", (), "not finite"),
    ("task.py:other", (), "missing from the checkpoint"),
    ("task.py:nothing", (), 'has no "nothing"'),
]


@pytest.mark.parametrize("kind", ["fisher", "gram"])
@pytest.mark.parametrize(("spec", "options", "message"), WRONG)
def test_what_is_wrong_is_said_and_nothing_is_written(command, place, kind, spec, options, message):
    before = sorted(place.iterdir())
    done = command(kind, "a.safetensors", "--task", spec, "-o", "f.safetensors", *options)
    assert done.code == 1
    assert message in done.errors[0]
    assert [path for path in sorted(place.iterdir()) if path not in before and path.name != "__pycache__"] == []


def test_labels_are_asked_for_only_where_they_are_needed(command, place):
    done = command("fisher", "a.safetensors", "-t", "task.py:waves", "-o", "f.safetensors", "--estimator", "empirical")
    assert done.code == 1
    assert "the task gives no labels" in done.errors[0]
    assert command("fisher", "a.safetensors", "-o", "f.safetensors").code == 2
    assert command("gram", "a.safetensors", "-t", "task.py:waves").code == 2


def test_files_of_another_checkpoint_are_refused(command, place):
    for name in ("a", "b"):
        command("fisher", "a.safetensors", "-t", "task.py:waves", "-o", f"{name}.fisher.safetensors")
    done = command("merge", recipe(place / "fisher.yml", "fisher"), "merged")
    assert done.code == 1
    assert "b.fisher.safetensors" in done.errors[0]
    assert not (place / "merged").exists()


def test_an_interrupted_measurement_says_how_to_go_on(command, place, monkeypatch):
    arguments = ("a.safetensors", "-t", "task.py:waves", "--micro-batch", "4")
    for kind in ("fisher", "gram"):
        monkeypatch.delenv("INTERRUPT_AT", raising=False)
        assert command(kind, *arguments, "-o", f"whole-{kind}.safetensors").code == 0
        module = [module for name, module in sys.modules.items() if name.startswith("graftwork_user_task")][-1]
        module.CALLS.clear()
        monkeypatch.setenv("INTERRUPT_AT", "12" if kind == "fisher" else "3")
        done = command(kind, *arguments, "-o", f"{kind}.safetensors")
        assert done.code == 130
        assert "examples, which are kept in" in done.err
        assert f"run the same `graftwork {kind}` command again" in done.err
        assert not (place / f"{kind}.safetensors").exists()
        assert command(kind, *arguments, "-o", f"{kind}.safetensors").code == 0
        assert (place / f"{kind}.safetensors").read_bytes() == (place / f"whole-{kind}.safetensors").read_bytes()


BEFORE = {"fisher": 6, "gram": 0}
"""Calls of the model before the first micro-batch: Fisher information looks at two examples first."""
CALLS = {"fisher": 10, "gram": 20}
"""Micro-batches of four in all; Gram matrices are measured in two groups of layers, one after the other."""
SETTINGS = {"fisher": {"estimator": "signed"}, "gram": {"memory_bytes": 1}}

KILLED = """
import json, os, sys
from graftwork.merge import Checkpoint, load_task
from graftwork.merge.statistics import measure_to_file
import torch
kind, settings, calls = json.loads(sys.argv[1])
for call in calls:
    # A new process for each, without the time that it would take to import torch again.
    process = os.fork()
    if process == 0:
        os.environ["KILL_AT"] = str(call)
        with Checkpoint.open("a.safetensors") as source:
            task = load_task("task.py:waves")
            measure_to_file(kind, source, task, f"{call}.safetensors", micro_batch=4, state_seconds=0.0, **settings)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_a_killed_measurement_goes_on_to_the_same_bytes(place, monkeypatch, kind):
    from graftwork.merge import Checkpoint, load_task
    from graftwork.merge.statistics import measure_to_file

    done = [round(CALLS[kind] * share) for share in (0.1, 0.5, 0.9)]
    calls = [BEFORE[kind] + count + 1 for count in done]
    run = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps([kind, SETTINGS[kind], calls])], cwd=place, capture_output=True
    )
    assert run.stdout.decode().split() == ["-9"] * 3, run.stderr.decode()
    monkeypatch.chdir(place)
    with Checkpoint.open("a.safetensors") as source:
        seen = []
        for name in ("whole", *calls):
            assert not (place / f"{name}.safetensors").exists()
            told: list[int] = []
            measure_to_file(
                kind, source, load_task("task.py:waves"), f"{name}.safetensors", micro_batch=4,
                progress=lambda done, total, told=told: told.append(done), **SETTINGS[kind],
            )  # fmt: skip
            seen.append(told[0])
    # Fisher information tells of a micro-batch before it, Gram matrices after it.
    assert seen == [4 * (count + (kind == "gram")) for count in (0, *done)]
    whole = (place / "whole.safetensors").read_bytes()
    assert [(place / f"{call}.safetensors").read_bytes() == whole for call in calls] == [True] * 3
    assert not list(place.glob("*partial*"))
