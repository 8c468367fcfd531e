"""Tests of merges that are stopped by a signal, and of readers that go away: real processes, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import recipe, save

_TENSORS = 32
_COMMAND = [sys.executable, "-m", "graftwork.cli"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of some seconds: DELLA ranks every row."""
    folder = tmp_path_factory.mktemp("long")
    common = np.random.default_rng(0)
    shared = [common.normal(size=(256, 512)).astype(np.float32) for _ in range(_TENSORS)]
    for seed, name in enumerate(("base", "a", "b")):
        own = np.random.default_rng(seed)
        save(
            folder / f"{name}.safetensors",
            {
                f"layers.{i}.w": value + own.normal(size=value.shape).astype(np.float32)
                for i, value in enumerate(shared)
            },
        )
    parameters = {"density": 0.5, "epsilon": 0.1}
    recipe(folder / "r.yml", "della", base_model="./base.safetensors", parameters=parameters)
    finished = _run(folder, "whole")
    assert finished.returncode == 0, finished.stderr
    return folder


def _run(folder: Path, out: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*_COMMAND, "merge", "r.yml", out, "-j", "1"], cwd=folder, capture_output=True, text=True)


def _stopped(folder: Path, out: str, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Run the merge, send a signal after its first tensors, and return what came of it."""
    arguments = [*_COMMAND, "merge", "r.yml", out, "-j", "1"]
    journal = folder / f"{out}.partial" / ".graftwork-journal.jsonl"
    with subprocess.Popen(arguments, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") >= 3:
                process.send_signal(number)
                break
            time.sleep(0.001)
        out_text, err_text = process.communicate(timeout=60)
    return subprocess.CompletedProcess(arguments, process.returncode, out_text, err_text)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_merge_goes_on_and_gives_the_same_bytes(models: Path, number: signal.Signals, code: int) -> None:
    out = f"stopped{code}"
    stopped = _stopped(models, out, number)
    assert stopped.returncode == code, stopped.stderr
    assert stopped.stdout == ""
    assert "Traceback" not in stopped.stderr
    (line,) = [line for line in stopped.stderr.splitlines() if line.startswith("stopped; ")]
    assert f"of {_TENSORS} tensors are finished" in line
    assert "run the same command again" in line
    assert not (models / out).exists()

    finished = _run(models, out)
    assert finished.returncode == 0, finished.stderr
    done = int(finished.stderr.split("resuming: ")[1].split()[0])
    assert 2 <= done < _TENSORS
    assert f"{done} of them by an earlier run" in finished.stdout
    for file in (models / "whole").iterdir():
        if file.name != "README.md":
            assert (models / out / file.name).read_bytes() == file.read_bytes(), file.name
    assert not (models / f"{out}.partial").exists()


def test_verify_names_an_unfinished_merge(models: Path) -> None:
    assert _stopped(models, "half", signal.SIGINT).returncode == 130
    found = subprocess.run([*_COMMAND, "verify", "half"], cwd=models, capture_output=True, text=True)
    assert found.returncode == 1
    assert "half.partial" in found.stderr
    assert "unfinished" in found.stderr
    assert found.stderr.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error_message(tmp_path: Path) -> None:
    read, write = os.pipe()
    with subprocess.Popen(
        [*_COMMAND, "methods", "--json"], cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(write)
        os.close(read)
        _, err = process.communicate(timeout=60)
    assert err == ""
    assert process.returncode == 1
