"""Networks that other people trained, merged and evaluated on handwritten digits."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graftwork.cli.application import app

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the real data are not in ../shared/data")

TASKS = """
from pathlib import Path

import numpy as np
import torch
from torch import nn

from graftwork.merge import Task


class Federated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(1, 32, 5), nn.ReLU(), nn.MaxPool2d(2))
        self.conv2 = nn.Sequential(nn.Conv2d(32, 64, 5), nn.ReLU(), nn.MaxPool2d(2))
        self.fc1 = nn.Sequential(nn.Linear(1024, 512), nn.ReLU())
        self.fc = nn.Linear(512, 10)

    def forward(self, x):
        return self.fc(self.fc1(self.conv2(self.conv1(x)).flatten(1)))


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(1250, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, x):
        x = torch.relu(torch.max_pool2d(self.conv1(x), 2))
        x = torch.relu(torch.max_pool2d(self.conv2(x), 2))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def digits(size, channels):
    with np.load(Path(r"DATA") / "digits" / "mnist.npz") as file:
        images, labels = file["x_test"], file["y_test"]
    x = torch.from_numpy(images).float()[:, None] / 127.5 - 1
    if size != 28:
        x = nn.functional.interpolate(x, size=size, mode="bilinear")
    x = x.expand(-1, channels, -1, -1)
    return lambda: [(x[i : i + 256], torch.from_numpy(labels[i : i + 256])) for i in range(0, len(x), 256)]


def federated():
    return Task("mnist", Federated, digits(28, 1))


def lenet():
    return Task("mnist", LeNet, digits(32, 3))
"""


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def accuracies(folder, task, *checkpoints):
    (folder / "tasks.py").write_text(TASKS.replace("DATA", str(DATA)))
    rows = json.loads(run("evaluate", *checkpoints, "--task", f"{folder / 'tasks.py'}:{task}", "--json").stdout)
    rows = rows if isinstance(rows, list) else rows["evaluations"]
    return [row["accuracy"] for row in rows]


def recipe(folder, *models):
    path = folder / "recipe.yml"
    lines = "".join(f"  - {{model: {model}, parameters: {{weight: 1}}}}\n" for model in models)
    path.write_text(f"merge_method: linear\nmodels:\n{lines}")
    return path


def test_the_mean_of_two_relatives_still_recognises_digits(tmp_path):
    parents = [DATA / "checkpoints" / "mnist_fl_cnn" / f"{name}_server.safetensors" for name in ("fedavg", "feddyn")]
    run("merge", recipe(tmp_path, *parents), tmp_path / "mean")
    fedavg, feddyn, mean = accuracies(tmp_path, "federated", *parents, tmp_path / "mean")
    assert fedavg == pytest.approx(0.832, abs=0.01)
    assert feddyn == pytest.approx(0.928, abs=0.01)
    assert mean == pytest.approx(0.669, abs=0.01)  # between two training runs of one initialisation lies a hill


def test_the_mean_of_two_networks_from_different_starts_is_warned_of_and_poor(tmp_path):
    parents = [DATA / "checkpoints" / "digits_lenet" / f"mnist_{name}.safetensors" for name in "ab"]
    result = run("merge", recipe(tmp_path, *parents), tmp_path / "mean")
    assert "do not look like relatives" in result.stderr
    first, second, mean = accuracies(tmp_path, "lenet", *parents, tmp_path / "mean")
    assert min(first, second) > 0.98
    assert mean < min(first, second) - 0.1
