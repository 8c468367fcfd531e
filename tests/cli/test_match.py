"""Tests of `graftwork match`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from graftwork.merge.alignment.apply import apply_permutation, load_permutation, random_permutation
from graftwork.merge.alignment.families import family_spec
from graftwork.merge.alignment.spec import shapes_of
from tests.cli.conftest import Command, save

NETWORK = """
import torch
from torch import nn

from graftwork.merge import Task


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.start, self.end = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.end(torch.relu(self.start(x)).sort(-1).values)


def make():
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 3)), torch.randn(2, 6)


def branch():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    return Branch(), torch.randn(2, 6)


x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
task = Task("own", lambda: make()[0], lambda: [(x, x[:, :3].argmax(1))])
other = Task("other", Own, lambda: [(x, None)])
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a.safetensors, a shuffled copy of it with noise, b.safetensors, and net.py."""
    random = np.random.default_rng(0)
    widths = ((0, 24, 6), (2, 12, 24), (4, 3, 12))
    a: dict[str, np.ndarray] = {}
    for number, out, into in widths:
        a[f"{number}.weight"] = random.normal(size=(out, into)).astype(np.float32)
        a[f"{number}.bias"] = random.normal(size=out).astype(np.float32)
    spec = family_spec(shapes_of(a))
    save(tmp_path / "a.safetensors", a)
    near = {name: values + 0.01 * random.normal(size=values.shape).astype(np.float32) for name, values in a.items()}
    save(tmp_path / "b.safetensors", apply_permutation(spec, random_permutation(spec, 1), near))
    (tmp_path / "net.py").write_text(NETWORK)
    return tmp_path


def test_a_shuffled_relative_is_aligned_and_each_group_is_shown(command: Command, here: Path) -> None:
    outcome = command("match", "a.safetensors", "b.safetensors", "-o", "aligned.safetensors")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0] == "aligned      aligned.safetensors"
    assert lines[1] == "permutation  aligned.permutation.safetensors"
    assert lines[2] == "spec         mlp, 2 groups"
    assert lines[5].split() == ["group", "units", "gain", "moved"]
    rows = [line.split() for line in lines[6:]]
    assert [row[:2] for row in rows] == [["0", "24"], ["2", "12"]]
    assert all(float(row[2]) > 0 and float(row[3]) > 50 and row[4] == "%" for row in rows)
    a, found = load_file(here / "a.safetensors"), load_file(here / "aligned.safetensors")
    assert all(np.abs(found[name] - a[name]).max() < 0.1 for name in a)


def test_json_and_the_report_say_the_same(command: Command, here: Path) -> None:
    outcome = command(
        "match", "a.safetensors", "b.safetensors", "-o", "x.safetensors", "--json", "--report", "r.json",
        "--permutation", "p.safetensors", "--seed", 3, "--restarts", 2,
    )  # fmt: skip
    report = json.loads(outcome.out)
    assert json.loads((here / "r.json").read_text()) == report
    assert report["permutation"] == "p.safetensors"
    assert report["distance_after"] < 0.1 * report["distance_before"]
    assert report["objective_after"] > report["objective_before"]
    assert [(group["name"], group["size"], group["pinned"]) for group in report["groups"]] == [
        ("0", 24, ""),
        ("2", 12, ""),
    ]
    gained = sum(group["gain"] for group in report["groups"])
    assert gained > 0
    assert load_permutation(here / "p.safetensors").settings == {"method": "weights", "restarts": 2, "seed": 3}


def test_tracing_and_spec_files_give_what_the_names_give(command: Command, here: Path) -> None:
    command("match", "a.safetensors", "b.safetensors", "-o", "names.safetensors")
    wanted = load_file(here / "names.safetensors")
    (here / "spec.json").write_text(load_permutation(here / "names.permutation.safetensors").spec.to_json())
    for name, option in (("traced", ("--module", "net.py:make")), ("file", ("--spec", "spec.json"))):
        outcome = command("match", "a.safetensors", "b.safetensors", "-o", f"{name}.safetensors", *option)
        assert outcome.code == 0
        found = load_file(here / f"{name}.safetensors")
        assert all((found[key] == wanted[key]).all() for key in wanted)


@pytest.mark.parametrize("method", ["activations", "ste"])
def test_matching_by_data(command: Command, here: Path, method: str) -> None:
    arguments = ("match", "a.safetensors", "b.safetensors", "-o", "x.safetensors", "--method", method)
    refused = command(*arguments)
    assert refused.code == 2
    assert refused.errors == [f"error: --method {method} needs --task: file.py:name or package.module:name"]
    outcome = command(*arguments, "--task", "net.py:task")
    assert outcome.code == 0
    b, found = load_file(here / "b.safetensors"), load_file(here / "x.safetensors")
    order = load_permutation(here / "x.permutation.safetensors")
    again = apply_permutation(order.spec, order.permutation, b)
    assert all((found[name] == again[name]).all() for name in b)
    assert not all((found[name] == b[name]).all() for name in b)
    if method == "activations":  # the other one looks for a low loss, which is not where the copy came from
        a = load_file(here / "a.safetensors")
        assert all(np.abs(found[name] - a[name]).max() < 0.1 for name in a)


def test_what_is_fixed_is_said_with_the_reason(command: Command, here: Path) -> None:
    random = np.random.default_rng(0)
    shapes = {"start.weight": (12, 6), "start.bias": (12,), "end.weight": (3, 12), "end.bias": (3,)}
    for name in ("c", "d"):
        save(here / f"{name}.safetensors", {key: random.normal(size=shape) for key, shape in shapes.items()})
    unknown = command("match", "c.safetensors", "d.safetensors", "-o", "x.safetensors")
    assert unknown.code == 1
    assert len(unknown.errors) == 1
    assert "--module file.py:make" in unknown.errors[0]
    outcome = command("match", "c.safetensors", "d.safetensors", "-o", "x.safetensors", "--task", "net.py:other")
    assert outcome.code == 0
    last = outcome.out.splitlines()[-1]
    assert last.startswith("fixed: start.weight axis 0, start.bias axis 0, end.weight axis 1: the operation sort")


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("a.safetensors", "b.safetensors"), 2, "--out is missing"),
        (("a.safetensors", "b.safetensors", "-o", "x.safetensors", "--spec", "s", "--family", "mlp"), 2, "exclude"),
        (("a.safetensors", "b.safetensors", "-o", "x.safetensors", "--family", "mpl"), 1, 'did you mean "mlp"?'),
        (
            ("a.safetensors", "b.safetensors", "-o", "x.safetensors", "--family", "bert"),
            1,
            "named as in the family bert",
        ),
        (("a.safetensors", "none.safetensors", "-o", "x.safetensors"), 1, "none.safetensors"),
        (("a.safetensors", "b.safetensors", "-o", "b.safetensors", "--force"), 1, "b.safetensors"),
        (("a.safetensors", "b.safetensors", "-o", "x.safetensors", "--spec", "none.json"), 1, "none.json"),
        (("a.safetensors", "b.safetensors", "-o", "x.safetensors", "--module", "net.py:branch"), 1, "cannot trace"),
        (("a.safetensors", "b.safetensors", "-o", "x.safetensors", "--report", "net.py"), 1, "cannot write net.py"),
        (
            (
                "a.safetensors",
                "b.safetensors",
                "-o",
                "x.safetensors",
                "-m",
                "ste",
                "-t",
                "net.py:task",
                "--restarts",
                2,
            ),
            2,
            "--restarts is for --method weights",
        ),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    command: Command, here: Path, arguments: tuple[str, ...], code: int, expected: str
) -> None:
    before = {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()}
    outcome = command("match", *arguments)
    assert outcome.code == code
    assert len(outcome.errors) == 1
    assert expected in outcome.errors[0]
    assert outcome.out == ""
    assert {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()} == before
