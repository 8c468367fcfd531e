"""Tests of `graftwork runs`, of a run's status, of its report and of its event files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.cli.federation import FEDERATION

pytest.importorskip("flwr")
pytestmark = pytest.mark.flower

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def listed(command: Command, *places: object) -> dict[str, dict]:
    outcome = command("runs", *places, "--json")
    assert outcome.code == 0, outcome.err
    return {Path(item["path"]).name: item for item in json.loads(outcome.out)}


def test_runs_below_a_folder_are_listed(command: Command, finished_runs: Path) -> None:
    found = listed(command, finished_runs)
    assert list(found) == ["own", "plain", "prox"]
    lines = [json.loads(line) for line in (finished_runs / "plain" / "metrics.jsonl").read_text().splitlines()]
    accuracies = {line["round"]: line["accuracy"] for line in lines if line["round"]}
    plain = found["plain"]
    assert (plain["algorithm"], plain["aggregate"], plain["status"]) == ("fedavg", "mean", "finished")
    assert (plain["rounds"], plain["planned"]) == (6, 6)
    assert plain["best"] == max(accuracies.values())
    assert plain["best_round"] == min(number for number, value in accuracies.items() if value == plain["best"])
    assert plain["last"] == accuracies[6]
    assert plain["bytes"] == sum(line["bytes"] for line in lines)
    table = command("runs", finished_runs).out.splitlines()
    assert " ".join(table[0].split()) == "run data algorithm aggregate seed rounds status best last traffic"
    assert any("fedprox" in line and "3/3" in line and "finished" in line for line in table)


def test_a_run_itself_may_be_named_and_a_model_folder_is_none(
    command: Command, finished_runs: Path, tmp_path: Path
) -> None:
    assert list(listed(command, finished_runs / "own")) == ["own"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    outcome = command("runs")
    assert (outcome.code, outcome.out) == (0, "")
    assert "there are no runs" in outcome.err


def test_a_missing_folder_is_one_line(command: Command, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    outcome = command("runs", "resuls")
    assert outcome.code == 1
    assert outcome.errors == ['error: there is no folder "resuls"; did you mean "results"?']


def test_a_damaged_run_does_not_hide_the_others(command: Command, finished_runs: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_runs / "own", tmp_path / "own")
    shutil.copytree(finished_runs / "own", tmp_path / "torn")
    (tmp_path / "torn" / "config.json").write_text('{"experiment": {"algorithm": 3}}')
    outcome = command("runs", "--json")
    assert outcome.code == 0
    assert [item["path"] for item in json.loads(outcome.out)] == ["own"]
    assert "warning: cannot read" in outcome.err


def test_a_failed_run_says_so_and_why(command: Command, tmp_path: Path) -> None:
    (tmp_path / "sites.py").write_text(FEDERATION)
    for number in range(4):
        (tmp_path / f"break-s{number}").touch()
    assert command("simulate", "sites.py:federation", "-r", "2", "-o", "run").code == 3
    assert listed(command)["run"]["status"] == "failed"
    report = (tmp_path / "run" / "report.html").read_text()
    assert "The run stopped after round 0: round 1: 0 of 4 sites gave a usable answer" in report
    for number in range(4):
        (tmp_path / f"break-s{number}").unlink()
    assert command("simulate", "--resume", "run").code == 0
    assert listed(command)["run"]["status"] == "finished"
    assert not (tmp_path / "run" / "failure.json").exists()


@pytest.mark.slow
def test_a_run_is_running_then_interrupted_then_finished(command: Command, tmp_path: Path) -> None:
    """And its report is there all the while; a second process is kept out."""
    (tmp_path / "sites.py").write_text(FEDERATION)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-m", "graftwork.cli", "simulate", "sites.py:federation", "-r", "100000", "-o", "run"],
        cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        report = tmp_path / "run" / "report.html"
        limit = time.monotonic() + 120
        while time.monotonic() < limit and not (report.exists() and "of 100000 is done" in report.read_text()):
            time.sleep(0.05)
        assert "http-equiv='refresh'" in report.read_text()
        state = listed(command)["run"]
        assert (state["status"], state["planned"]) == ("running", 100000)
        for more in (["--resume", "run"], ["sites.py:federation", "-o", "run", "--force"]):
            refused = command("simulate", *more)
            assert refused.code == 1
            assert "a process is working on it" in refused.errors[0]
    finally:
        process.kill()
        process.wait()
    done = listed(command)["run"]
    assert done["status"] == "interrupted"
    assert command("simulate", "--resume", "run", "-r", str(done["rounds"] + 1)).code == 0
    done = listed(command)["run"]
    assert (done["status"], done["planned"]) == ("finished", done["rounds"])
    assert "http-equiv" not in report.read_text()


def test_the_report_says_what_was_run_and_how_it_came_out(finished_runs: Path) -> None:
    report = (finished_runs / "plain" / "report.html").read_text()
    summary = json.loads((finished_runs / "plain" / "summary.json").read_text())
    accuracy = 100 * summary["mean_of_last"]["accuracy"]
    assert f"The shared model gets {accuracy:.1f} % of the test examples right" in report
    assert "All sites answered in all rounds." in report
    assert "<h1>FedAvg on sites.py:federation</h1>" in report
    for site in ("s0", "s1", "s2", "s3"):
        assert f"<title>{site}, round 6: " in report
    assert "How alike the sites look to the model" in report
    assert report.count("<circle") > 4 * 4 * 40  # four pictures with every site's 40 test examples


def test_features_of_sites_are_placed_by_their_two_main_directions() -> None:
    """Against numpy's principal components; nearest neighbours against a case that is known."""
    import numpy as np
    import torch

    from graftwork.federated.features import flattened, told_apart

    points = np.random.default_rng(0).normal(size=(30, 5)) * [5, 1, 3, 0.5, 0.1]
    centred = points - points.mean(0)
    left, values, _ = np.linalg.svd(centred)
    expected = left[:, :2] * values[:2]
    found = flattened(torch.from_numpy(points)).numpy()
    for column in range(2):
        ratio = found[:, column] / expected[:, column]
        assert np.allclose(ratio, ratio[0])
        assert found[np.abs(found[:, column]).argmax(), column] > 0
    assert np.abs(found).max() == pytest.approx(1)
    line = torch.tensor([[0.0], [1.0], [10.0], [11.0], [11.5]])
    assert told_apart(line, torch.tensor([0, 0, 1, 1, 0])) == pytest.approx(3 / 5)


def test_event_files_for_tensorboard_hold_the_rounds(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "sites.py").write_text(FEDERATION)
    arguments = ["simulate", "sites.py:two", "-r", "2", "--tensorboard"]
    assert command(*arguments).code == 2
    assert command(*arguments, "-o", "run").code == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    for name, key in (("accuracy/judged", "accuracy"), ("loss/training", "train_loss"), ("cost/bytes", "bytes")):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(line["round"], pytest.approx(line[key], rel=1e-6)) for line in lines]
    assert "accuracy by site/s1" in events.Tags()["scalars"]


def test_without_tensorboard_one_line_says_what_to_install(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    (tmp_path / "sites.py").write_text(FEDERATION)
    outcome = command("simulate", "sites.py:two", "-r", "1", "-o", "run", "--tensorboard")
    assert outcome.code == 1
    assert outcome.errors == [
        'error: --tensorboard needs tensorboard, which is missing; install it with pip install "graftwork[tensorboard]"'
    ]


def test_the_report_needs_nothing_from_elsewhere_and_renders(finished_runs: Path, tmp_path: Path) -> None:
    page = finished_runs / "plain" / "report.html"
    text = page.read_text()
    assert not re.search(r"""(?:src|href)\s*=|https?://|@import|url\(|<script|<link""", text)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser to look with: none of {', '.join(BROWSERS)} is on the PATH")
    picture = tmp_path / "report.png"
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,2600",
         f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", page.as_uri()],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert picture.exists(), done.stderr[-2000:]
    pixels = read_picture(picture)
    assert pixels.shape[:2] == (2600, 1000)
    inked = (pixels[..., :3].astype(int).sum(-1) < 3 * 200).mean(1)
    # Something is drawn in each fifth of the page, and the lines' blue is there.
    assert all(part.max() > 0.01 for part in inked.reshape(5, -1))
    blue = (abs(pixels[..., :3].astype(int) - [0x2F, 0x6F, 0xAB]) < 8).all(-1)
    assert blue.sum() > 500


def read_picture(path: Path) -> object:
    """Return a PNG as an array (rows, columns, channels) of bytes."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
