"""A server and a worker die by SIGKILL; the run ends in the same bytes. `benchmarks/kills.py` has more such cases."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from graftwork.cli.application import app
from graftwork.federated.grid import ProcessGrid
from graftwork.federated.strategy import Strategy

pytest.importorskip("sklearn")
pytestmark = pytest.mark.flower

SOURCE = Path(__file__).parents[2] / "benchmarks" / "kills.py"
ROUNDS = 3


@pytest.fixture(scope="module")
def kills() -> ModuleType:
    if not SOURCE.exists():
        pytest.skip("needs the checkout's benchmarks")
    spec = importlib.util.spec_from_file_location("kills", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_here(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def whole(kills: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody touches."""
    out = tmp_path_factory.mktemp("kills") / "whole"
    run_here(kills.command("fedbn", ROUNDS, out, 0))
    return out


def test_a_server_that_is_killed_goes_on_to_the_same_bytes(kills: ModuleType, whole: Path, tmp_path: Path) -> None:
    run, case = tmp_path / "killed", "server-publishing"
    number, reply = kills.moment_of(case, 0, ROUNDS)
    assert kills.started(kills.command("fedbn", ROUNDS, run, 0), (case, number, reply)) == -9
    before = kills.finished(run)
    assert f"checkpoints/round-{number:04}/global.safetensors" in before
    assert not (run / "summary.json").exists()
    run_here(["simulate", "--resume", str(run), "--quiet"])
    assert kills.differences(whole, run) == []
    after = kills.finished(run)
    assert {name: after[name] for name in before if name in after} == {n: c for n, c in before.items() if n in after}


def test_a_worker_that_is_killed_is_replaced_and_its_client_asked_again(
    kills: ModuleType, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, case = tmp_path / "killed", "worker-once"
    number, reply = kills.moment_of(case, 0, ROUNDS)
    for owner, name in ((Strategy, "_take"), (ProcessGrid, "push_messages")):  # put back afterwards
        monkeypatch.setattr(owner, name, getattr(owner, name))
    kills.strike_in(case, number, reply)
    run_here(kills.command("fedbn", ROUNDS, run, 1))
    times = [line for line in (run / "timing.jsonl").read_text().splitlines() if "asked_again" in line]
    assert [f'"round":{number},' in line for line in times] == [True]
    assert kills.differences(whole, run) == []


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """Even while they work: what they do for a run that was killed must not reach one that goes on."""
    script = """
import os, subprocess, sys
from graftwork.federated import worker
if len(sys.argv) > 1:
    worker.end_with_parent()
    print("up", flush=True)
    while True:
        pass
child = subprocess.Popen([sys.executable, __file__, "child"], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    path = tmp_path / "parent.py"
    path.write_text(script)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}
    done = subprocess.run(
        [sys.executable, path], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    child = int(done.stdout)
    for _ in range(300):
        if not is_running(child):
            return
        time.sleep(0.1)
    os.kill(child, 9)
    pytest.fail("the worker outlived its parent by half a minute")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
