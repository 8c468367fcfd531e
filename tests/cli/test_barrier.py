"""Tests of `graftwork barrier` and `graftwork lmc` on a network and its shuffled copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftwork.merge.alignment.apply import apply_permutation, identity, inverse, random_permutation, save_permutation
from graftwork.merge.alignment.families import family_spec
from graftwork.merge.alignment.spec import shapes_of
from graftwork.merge.artifact import parent_of
from graftwork.merge.checkpoint import Checkpoint
from tests.cli.conftest import Command, Outcome, save

TASKS = """
import torch
from torch import nn

from graftwork.merge import Task


def model():
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))


def normed():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


x = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
with torch.random.fork_rng():
    torch.manual_seed(5)
    teacher = model()
    with torch.no_grad():
        for part in teacher.parameters():
            part.mul_(3)
    y = teacher(x).argmax(1).detach()

mine = Task("mine", model, lambda: [(x[:30], y[:30])], validation=lambda: [(x[30:60], y[30:60])],
            test=lambda: [(x[60:], y[60:])])
blind = Task("blind", model, lambda: [(x, None)])
untested = Task("untested", model, lambda: [(x, y)])
normed_task = Task("normed", normed, lambda: [(x, y)])
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with tasks.py, a.safetensors, a shuffled copy b.safetensors, and the permutation that undoes it."""
    namespace: dict[str, Any] = {}
    exec(TASKS, namespace)
    (tmp_path / "tasks.py").write_text(TASKS)
    a = {name: tensor.numpy() for name, tensor in namespace["teacher"].state_dict().items()}
    spec = family_spec(shapes_of(a))
    shuffle = random_permutation(spec, 1)
    save(tmp_path / "a.safetensors", a)
    save(tmp_path / "b.safetensors", apply_permutation(spec, shuffle, a))
    save(tmp_path / "nan.safetensors", {**a, "0.bias": np.full(24, np.nan, np.float32)})
    save(tmp_path / "narrow.safetensors", {**a, "0.bias": a["0.bias"][:20]})
    save(tmp_path / "named.safetensors", {f"strange_{name}": values for name, values in a.items()})
    normed = {name: tensor.numpy() for name, tensor in namespace["normed"]().state_dict().items()}
    save(tmp_path / "normed.safetensors", normed)
    with Checkpoint.open(tmp_path / "a.safetensors") as one, Checkpoint.open(tmp_path / "b.safetensors") as two:
        save_permutation(
            tmp_path / "order.safetensors", spec, inverse(spec, shuffle),
            a=parent_of(one, "a"), b=parent_of(two, "b"), method="weights", settings={},
        )  # fmt: skip
        save_permutation(
            tmp_path / "other.safetensors", spec, identity(spec),
            a=parent_of(one, "a"), b=parent_of(one, "a"), method="weights", settings={},
        )  # fmt: skip
    return tmp_path


def curves(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome
    return {curve["label"]: curve for curve in json.loads(outcome.out)["curves"]}


BARRIER = ("barrier", "a.safetensors", "b.safetensors", "--task", "tasks.py:mine")


def test_without_alignment_there_is_one_curve_of_25_points(command: Command, here: Path) -> None:
    found = curves(command(*BARRIER, "--json"))
    assert list(found) == ["naive"]
    assert len(found["naive"]["losses"]) == 25
    assert found["naive"]["split"] == "test"
    assert found["naive"]["loss_barrier"]["height"] > 0.1


def test_a_shuffled_copy_has_no_barrier_once_it_is_aligned(command: Command, here: Path) -> None:
    found = curves(command(*BARRIER, "--aligned", "--points", 5, "--json"))
    assert list(found) == ["naive", "aligned"]
    losses = found["aligned"]["losses"]
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-5)
    assert found["aligned"]["loss_barrier"]["height"] == pytest.approx(0, abs=1e-6)
    assert found["naive"]["losses"][0] == losses[0]


@pytest.mark.parametrize("how", [("--permutation", "order.safetensors"), ("--spec", "spec.json", "--aligned")])
def test_the_order_or_the_spec_may_come_from_a_file(command: Command, here: Path, how: tuple[str, ...]) -> None:
    with Checkpoint.open(here / "a.safetensors") as checkpoint:
        (here / "spec.json").write_text(family_spec(shapes_of(checkpoint.tensors)).to_json())
    found = curves(command(*BARRIER, *how, "--points", 3, "--json"))
    assert found["aligned"]["loss_barrier"]["height"] == pytest.approx(0, abs=1e-6)


def test_a_network_of_unknown_names_is_traced_from_the_task(command: Command, here: Path) -> None:
    source = TASKS.replace("def model():", "class Wrapped(nn.Module):\n    def __init__(self, inner):\n"
                           "        super().__init__()\n        self.strange = inner\n\n"
                           "    def forward(self, x):\n        return self.strange(x)\n\n\ndef model():")  # fmt: skip
    source += '\nstrange = Task("strange", lambda: Wrapped(model()), lambda: [(x, y)])\n'
    (here / "strange.py").write_text(source)
    for name in "ab":
        with Checkpoint.open(here / f"{name}.safetensors") as checkpoint:
            values = {f"strange.{key}": np.frombuffer(checkpoint.read(key), np.float32).reshape(entry.shape)
                      for key, entry in checkpoint.tensors.items()}  # fmt: skip
        save(here / "wrapped" / f"{name}.safetensors", values)
    pair = ("wrapped/a.safetensors", "wrapped/b.safetensors")
    found = curves(command("barrier", *pair, "-t", "strange.py:strange", "--aligned", "--points", 3, "--json"))
    assert found["aligned"]["loss_barrier"]["height"] == pytest.approx(0, abs=1e-6)


def test_the_table_has_a_row_per_curve_and_split(command: Command, here: Path) -> None:
    outcome = command(*BARRIER, "--aligned", "--points", 3, "--split", "test", "--split", "train")
    assert outcome.code == 0
    rows = [line.split() for line in outcome.out.splitlines() if line.startswith(("naive", "aligned"))]
    assert [row[:2] for row in rows] == [
        ["naive", "test"], ["naive", "train"], ["aligned", "test"], ["aligned", "train"],
    ]  # fmt: skip
    assert rows[2][-2:] == ["0.00", "%"]


def test_where_there_is_batch_norm_it_is_renormalized_by_default(command: Command, here: Path) -> None:
    pair = ("normed.safetensors", "normed.safetensors", "--task", "tasks.py:normed_task", "--points", 3, "--json")
    assert list(curves(command("barrier", *pair))) == ["naive", "naive + BatchNorm", "naive + REPAIR"]
    assert list(curves(command("barrier", *pair, "--renormalize", "repair"))) == ["naive", "naive + REPAIR"]
    found = curves(command(*BARRIER, "--renormalize", "repair", "--points", 3, "--json"))
    assert list(found) == ["naive", "naive + REPAIR"]


def test_a_picture_is_drawn(command: Command, here: Path) -> None:
    for name, arguments in (("barrier.png", BARRIER), ("lmc.png", ("lmc", *BARRIER[1:]))):
        outcome = command(*arguments, "--points", 3, "--picture", name)
        assert outcome.code == 0
        assert f"picture: {name}" in outcome.err
        assert (here / name).read_bytes().startswith(b"\x89PNG")


def test_a_split_that_is_missing_is_replaced_and_that_is_said(command: Command, here: Path) -> None:
    outcome = command("barrier", "a.safetensors", "b.safetensors", "-t", "tasks.py:untested", "--points", 3)
    assert "warning: task untested has no test split; its train split was used" in outcome.err


def test_lmc_tells_what_alignment_does(command: Command, here: Path) -> None:
    outcome = command("lmc", "a.safetensors", "b.safetensors", "--json")
    assert outcome.code == 0
    record = json.loads(outcome.out)
    assert record["l2_ratio"] == 0
    assert record["reduction"] == 1
    assert record["singular_value_change"] < 1e-12
    assert record["rho"]["a_aligned"] == pytest.approx(1)
    assert record["directions"]["a_aligned"]["0.5"] == pytest.approx(1)
    assert record["directions"]["a_b"]["0.5"] < 0.7
    assert "curves" not in record
    table = command("lmc", "a.safetensors", "b.safetensors").out
    assert "−100.0 %" in table
    assert "A and aligned B" in table


def test_lmc_with_a_task_has_curves_and_temperatures(command: Command, here: Path) -> None:
    outcome = command("lmc", *BARRIER[1:], "--points", 3, "--json")
    record = json.loads(outcome.out)
    assert [curve["label"] for curve in record["curves"]] == ["naive", "aligned"]
    calibrated = {item["model"]: item for item in record["calibrated"]}
    assert list(calibrated) == ["A", "B", "naive, λ = ½", "aligned, λ = ½"]
    assert calibrated["A"]["calibrated"] == pytest.approx(calibrated["aligned, λ = ½"]["calibrated"], rel=1e-3)
    assert record["deviation_ratios"]["aligned"] == pytest.approx({"0": 1, "2": 1}, rel=1e-4)
    assert max(record["deviation_ratios"]["naive"].values()) < 0.9
    assert "temperature" in command("lmc", *BARRIER[1:], "--points", 3).out
    without = command("lmc", "a.safetensors", "b.safetensors", "-t", "tasks.py:untested", "--points", 3)
    assert without.code == 0
    assert "note: cannot calibrate" in without.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("barrier", "a.safetensors", "b.safetensors"), "--task is missing"),
        ((*BARRIER, "--points", 4), "on 4 points; use an odd number"),
        ((*BARRIER, "--aligned", "--spec", "x.json", "--family", "mlp"), "exclude each other"),
        ((*BARRIER, "--permutation", "order.safetensors", "--family", "mlp"), "--family goes with a search"),
        ((*BARRIER, "--permutation", "other.safetensors"), "it was made for a model with the digest"),
        ((*BARRIER, "--permutation", "a.safetensors"), "a.safetensors"),
        ((*BARRIER, "--aligned", "--family", "mlpp"), 'the family "mlpp"'),
        ((*BARRIER, "--aligned", "--spec", "none.json"), "none.json"),
        ((*BARRIER, "--device", "cuda:99"), "cuda:99"),
        (("barrier", "a.safetensors", "none.safetensors", "-t", "tasks.py:mine"), "none.safetensors"),
        (("barrier", "a.safetensors", "nan.safetensors", "-t", "tasks.py:mine"), 'not finite in "0.bias"'),
        (("barrier", "a.safetensors", "narrow.safetensors", "-t", "tasks.py:mine"), "[24] in"),
        (("barrier", "a.safetensors", "normed.safetensors", "-t", "tasks.py:mine"), "another architecture?"),
        (("barrier", "normed.safetensors", "normed.safetensors", "-t", "tasks.py:mine"), "missing"),
        (("barrier", "a.safetensors", "b.safetensors", "-t", "tasks.py:mien"), 'did you mean "mine"'),
        (("barrier", "a.safetensors", "b.safetensors", "-t", "tasks.py:blind"), "has no labels"),
        ((*BARRIER, "--renormalize", "bn"), "has no BatchNorm layer"),
        (("lmc", "named.safetensors", "named.safetensors"), "--spec FILE"),
        (("lmc", "a.safetensors", "nan.safetensors"), 'not finite in "0.bias"'),
    ],
)
def test_what_is_wrong_is_said_in_one_line_each(
    command: Command, here: Path, arguments: tuple[str, ...], message: str
) -> None:
    outcome = command(*arguments)
    assert outcome.code in (1, 2)
    assert outcome.errors
    assert any(message in line for line in outcome.errors), outcome.errors
    assert outcome.out == ""
    assert outcome.err.count("\n") == len(outcome.errors)


def test_an_unknown_split_is_refused(command: Command, here: Path) -> None:
    outcome = command(*BARRIER, "--split", "tset")
    assert outcome.code == 2
    assert "tset" in outcome.err
