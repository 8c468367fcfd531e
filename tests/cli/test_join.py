"""`graftwork join`: what is checked, what is shown, and what is said when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Command

pytest.importorskip("flwr", reason="Flower is not installed")
pytest.importorskip("cryptography")

TASK = """
import torch
from torch import nn
from graftwork.merge import Task

def make(broken=False):
    labels = torch.arange(20) % 2
    inputs = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)) + labels[:, None]

    def batches():
        if broken:
            raise OSError("the disk of the scanner is not mounted")
        yield inputs, labels

    network = lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    return Task("scans", model=network, batches=batches, head="3")
"""

SITE = 'task = "task.py:make"\ndevice = "cpu"\nexchange = ["3.*"]\nalgorithms = ["fedavg", "fedbn"]\n'


@pytest.fixture
def place(command: Command, tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "site.toml").write_text(SITE)
    made = command("keys", "keys", "--sites", "oslo", "--host", "127.0.0.1", "--port", 1)
    assert made.code == 0
    return tmp_path


ARGUMENTS = ("join", "--keys", "keys/sites/oslo", "--data", "site.toml")


def test_check_shows_everything_on_one_screen_and_says_what_is_wrong(command: Command, place: Path) -> None:
    found = command(*ARGUMENTS, "--state", "state", "--check")
    assert found.code == 1
    lines = found.out.splitlines()
    assert len(lines) <= 24
    wrong = [line for line in lines if line.startswith("wrong")]
    assert len(wrong) == 1
    assert "127.0.0.1:1 refuses the connection" in wrong[0]
    assert "not ready: 1 wrong" in found.out
    assert "first batch (20, 4) → (20, 2)" in found.out
    assert not list((place / "state").rglob("*.safetensors"))


def test_check_finds_several_things_at_once(command: Command, place: Path) -> None:
    (place / "keys" / "sites" / "oslo" / "node.key").chmod(0o644)
    (place / "site.toml").write_text(SITE + "[arguments]\nbroken = true\n")
    found = command(*ARGUMENTS, "--check", "--json", "--state", "state")
    assert found.code == 1
    said = json.loads(found.out)
    wrong = {each["check"]: each["text"] for each in said["checks"] if each["found"] == "wrong"}
    assert set(wrong) == {"key", "data", "server"}
    assert "chmod 600" in wrong["key"]
    assert "the disk of the scanner is not mounted" in wrong["data"]
    assert said["ready"] is False


def test_a_site_whose_data_are_wrong_does_not_start(command: Command, place: Path) -> None:
    (place / "site.toml").write_text('task = "task.py:mkae"\n')
    found = command(*ARGUMENTS, "--state", "state")
    assert found.code == 1
    assert 'has no "mkae"; did you mean "make"?' in found.out


def test_explain_lists_each_tensor_and_marks_what_the_site_does_not_allow(command: Command, place: Path) -> None:
    found = command(*ARGUMENTS, "--explain", "--algorithm", "fedbn")
    assert found.code == 0
    leaves, stays = found.out.split("stays on the site:")
    rows = {line.split()[0]: line for line in leaves.splitlines() if line.startswith("  model/")}
    assert set(rows) == {"model/0.weight", "model/0.bias", "model/3.weight", "model/3.bias"}
    assert rows["model/3.weight"].split() == ["model/3.weight", "2×6", "float32", "48", "B"]
    assert rows["model/0.weight"].endswith("NOT ALLOWED")
    assert "model/1.running_mean" in stays
    assert "2 tensors would be refused" in stays


def test_explain_shows_by_default_every_algorithm_that_the_site_allows(command: Command, place: Path) -> None:
    found = command(*ARGUMENTS, "--explain", "--json")
    assert found.code == 0
    said = json.loads(found.out)
    assert [each["algorithm"] for each in said] == ["fedavg", "fedbn"]
    departures = {each["when"]: each for each in said[0]["departures"]}
    assert {"the roll call", "train", "evaluate"} <= set(departures)
    assert {each["name"] for each in departures["train"]["tensors"]} >= {"model/3.bias", "model/1.running_var"}
    assert departures["evaluate"]["tensors"] == []


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("--check", "--explain"), 2, "--check or --explain, not both"),
        (("--algorithm", "fedavg"), 2, "belong to --explain"),
        (("--json",), 2, "--log-json"),
        (("--explain", "--set", "x"), 2, "write it as KEY=VALUE"),
        (("--explain", "--algorithm", "fedavgg"), 1, 'did you mean "fedavg"?'),
        (("--explain", "--algorithm", "fedka"), 1, 'takes part in "fedavg", "fedbn" only'),
        (("--explain", "--set", "learning_rat=1"), 1, 'did you mean "learning_rate"?'),
        (("--explain", "--keys", "nowhere"), 1, '"nowhere" does not exist'),
        (("--explain", "--data", "sit.toml"), 1, 'did you mean "site.toml"?'),
    ],
)
def test_mistakes_are_told_in_one_line(
    command: Command, place: Path, arguments: tuple[str, ...], code: int, part: str
) -> None:
    found = command(*ARGUMENTS, *arguments)
    assert found.code == code
    assert part in found.err
    assert len(found.errors) == 1


def test_an_address_that_is_none_is_told(command: Command, place: Path) -> None:
    found = command(*ARGUMENTS, "--server", "localhost", "--check", "--state", "state")
    assert found.code == 1
    assert "write host:port, such as fl.example.org:9092" in found.out


def test_log_lines_are_plain_or_json_and_name_the_site(capsys: pytest.CaptureFixture[str]) -> None:
    from graftwork.cli.join import _teller

    _teller("oslo", log_json=False)("waiting", "no server\nthere", is_problem=True)
    _teller("oslo", log_json=True)("waiting", "no server there", is_problem=True)
    plain, structured = capsys.readouterr().err.splitlines()
    assert plain.endswith("Z oslo: problem: no server there")
    said = json.loads(structured)
    assert (said["site"], said["level"], said["event"], said["text"]) == (
        "oslo",
        "warning",
        "waiting",
        "no server there",
    )
