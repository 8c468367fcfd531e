"""Tests of `graftwork simulate`: what it prints, what it leaves behind, and its exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.cli.federation import FEDERATION

pytest.importorskip("flwr")
from graftwork.federated.ray import ENVIRONMENT

pytestmark = pytest.mark.flower

GOLDEN = Path(__file__).parents[1] / "golden" / "federated.json"

# Not Adam: a bias before batch normalisation has no gradient but rounding, which Adam would make a step of.
COMMON = ["-r", "3", "--set", "learning_rate=0.03", "--set", "momentum=0.9"]
CASES = {"fedavg": COMMON, "fedbn": COMMON, "fedka": ["--target", "rotate", *COMMON]}
"""Runs whose numbers are kept in a golden file."""


@pytest.fixture
def site_file(tmp_path: Path) -> Path:
    path = tmp_path / "sites.py"
    path.write_text(FEDERATION)
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "timing.jsonl"
    }


@pytest.mark.parametrize("algorithm", list(CASES))
def test_runs_give_the_numbers_of_the_golden_file_and_learn(algorithm: str, command: Command) -> None:
    """Accuracy within one sample, losses within 1e-4; and far above chance, or the golden file proves nothing."""
    outcome = command("simulate", "digits", "-a", algorithm, *CASES[algorithm], "--json")
    assert outcome.code == 0, outcome.err
    lines = json.loads(outcome.out)["lines"]
    golden = json.loads(GOLDEN.read_text())[algorithm]
    assert len(lines) == len(golden)
    for line, kept in zip(lines, golden, strict=True):
        assert line["answered"] == kept["answered"]
        assert line["bytes"] == kept["bytes"]
        assert line["train_loss"] == pytest.approx(kept["train_loss"], abs=1e-4)
        assert line["accuracy"] == pytest.approx(kept["accuracy"], abs=1 / 719 + 1e-9)
        for site, numbers in kept["sites"].items():
            assert line["sites"][site]["accuracy"] == pytest.approx(numbers["accuracy"], abs=1 / 719 + 1e-9)
    assert lines[-1]["train_loss"] < 0.7 * lines[0]["train_loss"]
    assert lines[-1]["accuracy"] > 0.4


def test_one_line_per_round_and_a_run_folder(command: Command, site_file: Path, tmp_path: Path) -> None:
    outcome = command("simulate", f"{site_file}:federation", "-r", "2", "--out", "run", "--keep-sites")
    assert outcome.code == 0, outcome.err
    lines = [line for line in outcome.err.splitlines() if line.startswith("round ")]
    form = r"round \d/2  4/4 sites  loss \d\.\d{4}  accuracy \d+\.\d\d %  \d+\.\d s  [\d.]+ [kKM]?B"
    assert len(lines) == 2
    assert all(re.fullmatch(form, line) for line in lines), lines
    names = set(files(tmp_path / "run"))
    assert {"config.json", "metrics.jsonl", "summary.json", "report.html", "model.safetensors"} <= names
    assert "checkpoints/round-0002/global.safetensors" in names
    assert "checkpoints/round-0002/sites/s3.safetensors" in names
    report = (tmp_path / "run" / "report.html").read_text()
    assert "<svg" in report
    assert not re.search(r"(src|href)=|https?://|@import|url\(", report)


def test_the_global_model_is_a_checkpoint_like_any_other(command: Command, site_file: Path) -> None:
    command("simulate", f"{site_file}:federation", "-r", "1", "--out", "run")
    assert command("verify", "run/model.safetensors").code == 0
    started = command("simulate", f"{site_file}:federation", "-r", "1", "--init", "run/model.safetensors", "--json")
    again = command("simulate", f"{site_file}:federation", "-r", "1", "--json")
    first, second = (json.loads(each.out)["lines"][0]["train_loss"] for each in (started, again))
    assert first < second


def test_a_missed_quorum_ends_with_exit_code_3_and_can_be_resumed(
    command: Command, site_file: Path, tmp_path: Path
) -> None:
    for name in ("s0", "s1", "s2"):
        (tmp_path / f"break-{name}").touch()
    outcome = command("simulate", f"{site_file}:federation", "-r", "2", "--out", "run")
    assert outcome.code == 3
    assert outcome.errors[0] == "error: round 1: 1 of 4 sites gave a usable answer (train), and 2 have to"
    assert [line.split(": ")[1] for line in outcome.errors[1:]] == ['site "s0"', 'site "s1"', 'site "s2"']
    assert "the disk is gone" in outcome.errors[1]
    for name in ("s0", "s1", "s2"):
        (tmp_path / f"break-{name}").unlink()
    assert command("simulate", "--resume", "run").code == 0


def test_wrong_input_is_one_line(command: Command, site_file: Path) -> None:
    for arguments, text in (
        (["digits", "-a", "fedpox"], 'did you mean "fedprox"'),
        (["digits", "-a", "fedavg", "--set", "learning_rat=1"], 'did you mean "learning_rate"'),
        (["digitz"], 'did you mean "digits"'),
        (["digits", "-a", "fedka"], "name one with --target"),
        (["digits", "--aggregate", "tiess"], 'did you mean "ties"'),
        (["digits", "--participation", "0"], "participation is 0"),
        ([f"{site_file}:federation", "--exchange", "haed.*"], "no tensor has such a name"),
        (["--resume", "nowhere"], "there is no run"),
    ):
        outcome = command("simulate", *arguments)
        assert outcome.code == 1, arguments
        assert len(outcome.errors) == 1
        assert text in outcome.errors[0]
    assert command("simulate").code == 2
    assert command("simulate", "digits", "--set", "mu").code == 2


def test_a_run_is_not_overwritten(command: Command, site_file: Path) -> None:
    assert command("simulate", f"{site_file}:federation", "-r", "1", "--out", "run").code == 0
    outcome = command("simulate", f"{site_file}:federation", "-r", "1", "--out", "run")
    assert outcome.code == 1
    assert "go on with --resume, or replace it with --force" in outcome.errors[0]
    assert command("simulate", f"{site_file}:federation", "-r", "1", "--out", "run", "--force").code == 0


@pytest.mark.slow
def test_workers_do_not_change_a_byte(command: Command, site_file: Path, tmp_path: Path) -> None:
    for workers in (0, 1, 4):
        out = f"run{workers}"
        outcome = command("simulate", f"{site_file}:federation", "-a", "fedbn", "-r", "2", "-w", workers, "-o", out)
        assert outcome.code == 0, outcome.err
    first = files(tmp_path / "run0")
    assert files(tmp_path / "run1") == first
    assert files(tmp_path / "run4") == first


@pytest.mark.slow
def test_a_process_killed_after_round_2_goes_on_to_the_same_bytes(
    command: Command, site_file: Path, tmp_path: Path
) -> None:
    arguments = ["simulate", f"{site_file}:federation", "-a", "fedbn", "-r", "400", "--keep-rounds", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-m", "graftwork.cli", *arguments, "-o", "killed"],
        cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    metrics = tmp_path / "killed" / "metrics.jsonl"
    limit = time.monotonic() + 120
    while time.monotonic() < limit and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len([line for line in metrics.read_text().splitlines() if line])
    assert 3 <= done < 400
    total = str(done + 3)
    assert command("simulate", "--resume", "killed", "-r", total).code == 0
    config = json.loads((tmp_path / "killed" / "config.json").read_text())
    assert config["experiment"]["rounds"] == 400
    arguments[arguments.index("400")] = total
    assert command(*arguments, "-o", "whole").code == 0
    whole, killed = files(tmp_path / "whole"), files(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    # Both say how many rounds were planned at first.
    assert {name for name in whole if whole[name] != killed[name]} == {"config.json", "report.html"}


@pytest.mark.slow
def test_workers_that_die_or_hang_cost_their_client_only(command: Command, site_file: Path, tmp_path: Path) -> None:
    text = site_file.read_text().replace(
        'raise RuntimeError("the disk is gone")',
        "import os, time\n            os._exit(7) if name == 's0' else time.sleep(300)",
    )
    site_file.write_text(text)
    for name in ("s0", "s1"):
        (tmp_path / f"break-{name}").touch()
    outcome = command("simulate", f"{site_file}:federation", "-r", "1", "-w", "2", "--deadline", "20", "--json")
    assert outcome.code == 0, outcome.err
    line = json.loads(outcome.out)["lines"][0]
    assert line["answered"] == 2
    assert "exit code 7" in line["failed"]["s0"]
    assert "no answer within 20 s" in line["failed"]["s1"]


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in held]
    finally:
        for one in held:
            one.close()


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_flowers_own_simulation_gives_the_same_model(command: Command, site_file: Path, tmp_path: Path) -> None:
    """By the `flwr run` line that `--backend ray` prints."""
    pytest.importorskip("ray")
    arguments = ["simulate", f"{site_file}:two", "-r", "1", "-o", "own"]
    assert command(*arguments).code == 0
    refused = command(*arguments, "--backend", "ray")  # after the line is printed, because there is a run already
    assert refused.code == 1
    line = next(line for line in refused.err.splitlines() if " flwr run " in line).split(": ", 1)[1]
    (tmp_path / "flower").mkdir()
    (tmp_path / "flower" / "config.json").write_bytes((tmp_path / "own" / "config.json").read_bytes())
    ports = free_ports(2)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(ports[0]),
        "FLWR_LOCAL_CONTROL_API_PORT": str(ports[1]),
        "FLWR_HOME": str(tmp_path / "home"),
        **ENVIRONMENT,
    }
    # Flower would start it itself, but leave it behind.
    superlink = subprocess.Popen(
        ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess", "--host", "127.0.0.1",
         "--port", str(ports[0]), "--control-api-address", f"127.0.0.1:{ports[1]}"],
        env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(ports[0])
        done = subprocess.run(
            line.replace(str(tmp_path / "own"), str(tmp_path / "flower")), shell=True, cwd=tmp_path, env=environment,
            capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
    finally:
        stop(superlink)
    name = "model.safetensors"
    assert (tmp_path / "flower" / name).exists(), (done.stdout + done.stderr)[-3000:]
    assert (tmp_path / "flower" / name).read_bytes() == (tmp_path / "own" / name).read_bytes()


def wait_for(port: int) -> None:
    limit = time.monotonic() + 120
    while time.monotonic() < limit:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    raise AssertionError("the SuperLink did not start")
