"""Tests of `graftwork plot`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Command

pytest.importorskip("flwr")
pytestmark = pytest.mark.flower


def test_runs_are_called_by_what_differs_between_them(command: Command, finished_runs: Path) -> None:
    outcome = command("plot", finished_runs / "plain", finished_runs / "prox", finished_runs / "own", "--json")
    assert outcome.code == 0, outcome.err
    runs = json.loads(outcome.out)["runs"]
    assert [run["label"] for run in runs] == ["fedavg", "fedprox, mu=0.5", "fedbn"]
    assert [run["differs"] for run in runs] == [
        {"algorithm": "fedavg"}, {"algorithm": "fedprox", "mu": "0.5"}, {"algorithm": "fedbn"}
    ]  # fmt: skip


def test_points_are_those_of_the_rounds(command: Command, finished_runs: Path) -> None:
    run = finished_runs / "plain"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for metric in ("accuracy", "loss"):
        record = json.loads(command("plot", run, "--metric", metric, "--json").out)
        assert record["runs"][0]["points"] == [[line["round"], line[metric]] for line in lines if line["round"]]
    record = json.loads(command("plot", run, "--metric", "bytes", "--json").out)
    assert record["runs"][0]["points"][-1] == [6, sum(line["bytes"] for line in lines)]


def test_a_picture_and_a_table(command: Command, finished_runs: Path, tmp_path: Path) -> None:
    runs = [finished_runs / "plain", finished_runs / "own"]
    for metric in ("accuracy", "loss", "bytes"):
        outcome = command("plot", *runs, "-o", f"{metric}.png", "--metric", metric)
        assert outcome.code == 0, outcome.err
        assert (tmp_path / f"{metric}.png").read_bytes().startswith(b"\x89PNG")
    head, *rows = outcome.out.splitlines()
    assert head.split()[:4] == ["run", "algorithm", "rounds", "status"]
    assert [row.split()[1] for row in rows] == ["fedavg", "fedbn"]


def test_equal_configurations_are_called_by_their_folders(
    command: Command, finished_runs: Path, tmp_path: Path
) -> None:
    import shutil

    for name in ("first", "second"):
        shutil.copytree(finished_runs / "own", tmp_path / name)
    runs = json.loads(command("plot", "first", "second", "--json").out)["runs"]
    assert [run["label"] for run in runs] == ["first", "second"]


def test_wrong_input_is_one_line(command: Command, finished_runs: Path, tmp_path: Path) -> None:
    for arguments, code, text in (
        ([finished_runs / "plian"], 1, "there is no run in"),
        ([finished_runs], 1, "is no run but a folder of runs"),
        ([finished_runs / "own", "-o", "curves.pdf"], 2, "let its name end in .png"),
    ):
        outcome = command("plot", *arguments)
        assert outcome.code == code
        assert len(outcome.errors) == 1
        assert text in outcome.errors[0]
    (tmp_path / "taken.png").touch()
    assert "replace it with --force" in command("plot", finished_runs / "own", "-o", "taken.png").errors[0]
