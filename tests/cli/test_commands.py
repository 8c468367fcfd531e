"""Tests of `methods`, `schema`, `evaluate`, and of what all commands share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from graftwork import __version__
from graftwork.cli.output import aligned, duration, size
from graftwork.cli.progress import ByteProgress
from graftwork.merge.methods import get, names
from tests.cli.conftest import Command

COMMANDS = ("merge", "inspect", "diff", "methods", "evaluate", "match", "verify", "doctor", "schema", "demo")

_TASK = """
import torch
from graftwork.merge.task import Task

class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 2))

    def forward(self, inputs):
        return inputs @ self.weight

def batches():
    yield torch.eye(2), torch.tensor([0, 1])

line = Task("line", model=Line, batches=batches, test=batches)
only_training = Task("training", model=Line, batches=batches)
"""


# --- methods and schema ---------------------------------------------------------------------------------------------


def test_methods_lists_each_with_its_summary(command: Command) -> None:
    lines = command("methods").out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(names())
    assert all(get(line.split()[0]).summary in line for line in lines[1:])


def test_a_method_shows_its_formula_and_parameters(command: Command) -> None:
    text = command("methods", "ties").out
    method = get("ties")
    assert method.formula in text
    assert method.reference in text
    for name, parameter in method.parameters.items():
        assert any(line.split()[:1] == [name] and parameter.help in line for line in text.splitlines())
    assert "0 to 1" in text
    assert "not in mergekit" in text


@pytest.mark.parametrize("name", names())
def test_every_method_can_be_shown(command: Command, name: str) -> None:
    assert command("methods", name).code == 0
    assert json.loads(command("methods", name, "--json").out)["name"] == name


def test_methods_as_json(command: Command) -> None:
    assert [record["name"] for record in json.loads(command("methods", "--json").out)] == list(names())


def test_an_unknown_method_names_the_nearest(command: Command) -> None:
    outcome = command("methods", "tiess")
    assert outcome.code == 1
    assert outcome.errors == ['error: there is no method "tiess"; did you mean "ties"?']


def test_help_is_plain_text(command: Command) -> None:
    shown = command("inspect", "--help").out + command("fisher", "--help").out
    assert "[default: float32]" in shown
    assert "\\[" not in shown


def test_the_schema_is_one(command: Command) -> None:
    schema = json.loads(command("schema").out)
    assert "merge_method" in schema["properties"]


# --- evaluate -------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    (tmp_path / "tasks.py").write_text(_TASK)
    save_file({"weight": torch.eye(2)}, tmp_path / "right.safetensors")
    save_file({"weight": -torch.eye(2)}, tmp_path / "wrong.safetensors")
    return tmp_path


def test_every_checkpoint_is_judged_on_every_task(command: Command, lines: Path) -> None:
    arguments = ("evaluate", "right.safetensors", "wrong.safetensors", "-t", "tasks.py:line")
    outcome = command(*arguments)
    assert outcome.code == 0, outcome
    rows = [line.split() for line in outcome.out.splitlines()]
    assert rows[0] == ["checkpoint", "task", "loss", "accuracy", "examples", "seconds"]
    assert [(row[0], row[1], row[3]) for row in rows[1:]] == [
        ("right.safetensors", "line", "100.00"),
        ("wrong.safetensors", "line", "0.00"),
    ]
    record = json.loads(command(*arguments, "--json").out)
    assert [item["accuracy"] for item in record["evaluations"]] == [1.0, 0.0]


def test_another_split_is_said(command: Command, lines: Path) -> None:
    outcome = command("evaluate", "right.safetensors", "-t", "tasks.py:only_training")
    assert outcome.code == 0
    assert outcome.err == "warning: task training has no test split; its train split was used\n"


def test_accuracies_are_drawn(command: Command, lines: Path) -> None:
    outcome = command("evaluate", "right.safetensors", "-t", "tasks.py:line", "--picture", "p.png")
    assert outcome.code == 0, outcome
    assert (lines / "p.png").read_bytes().startswith(b"\x89PNG")


def test_what_evaluate_cannot_do_is_one_line(command: Command, lines: Path) -> None:
    for arguments, word in (
        (("nowhere.safetensors", "-t", "tasks.py:line"), "nowhere"),
        (("right.safetensors", "-t", "tasks.py:lien"), "lien"),
        (("right.safetensors", "-t", "nothing.py:line"), "nothing.py"),
        (("right.safetensors", "-t", "tasks.py:line", "--device", "cuda:99"), "cuda"),
        (("right.safetensors", "-t", "tasks.py:line", "--device", "abacus"), "abacus"),
    ):
        outcome = command("evaluate", *arguments)
        assert outcome.code == 1
        assert len(outcome.errors) == 1
        assert outcome.err.count("\n") == 1
        assert word in outcome.errors[0]


def test_evaluate_needs_a_task(command: Command, lines: Path) -> None:
    assert command("evaluate", "right.safetensors").code == 2


# --- all commands ---------------------------------------------------------------------------------------------------


def test_version_and_help(command: Command) -> None:
    assert command("--version").out == f"graftwork {__version__}\n"
    listed = command("--help").out
    for name in COMMANDS:
        assert f"\n  {name} " in listed
        assert command(name, "--help").code == 0


def test_an_unknown_command_names_the_nearest(command: Command) -> None:
    outcome = command("mergee")
    assert outcome.code == 2
    assert "merge" in outcome.err.replace("mergee", "")


def test_help_is_instant_because_it_imports_nothing_heavy() -> None:
    # typer itself may import pydantic and rich.
    heavy = {"torch", "numba", "numpy", "scipy", "flwr", "yaml", "safetensors", "matplotlib", "sklearn"}
    heavy |= {"huggingface_hub", "transformers", "peft"}
    script = (
        "import sys\n"
        "from graftwork.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        f"print(sorted({heavy!r} & set(sys.modules)), file=sys.stderr)"
    )
    for arguments in (["--help"], ["merge", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
        assert done.stderr.strip() == "[]"
        assert done.stdout


def test_text_is_not_cut_to_the_width_of_a_terminal(tmp_path: Path) -> None:
    environment = {**os.environ, "COLUMNS": "20", "FORCE_COLOR": "1"}
    command = [sys.executable, "-m", "graftwork.cli", "methods", "ties"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
    assert "\x1b" not in done.stdout
    assert get("ties").formula in done.stdout


# --- what is printed ------------------------------------------------------------------------------------------------


def test_sizes_and_times_are_written_as_people_do() -> None:
    assert [size(n) for n in (0, 999, 1000, 1_234_567, 99_950, 999_600, 5 * 10**9)] == [
        "0 B", "999 B", "1 KB", "1.23 MB", "100 KB", "1 MB", "5 GB",
    ]  # fmt: skip
    assert [duration(s) for s in (0.04, 59.9, 60, 245, 4800)] == [
        "0.0 s",
        "59.9 s",
        "1 min 00 s",
        "4 min 05 s",
        "1 h 20 min",
    ]


def test_columns_are_aligned_and_end_without_blanks() -> None:
    assert aligned([["a", "1"], ["long", "22"]], right=[1]) == ["a      1", "long  22"]
    assert aligned([["a", ""], ["b", "x"]]) == ["a", "b  x"]


def test_progress_counts_what_an_earlier_run_did_but_not_as_speed() -> None:
    with ByteProgress(1000, shown=False) as progress:
        progress.skip(500)
        line = progress.line()
    assert line == "50 %, 500 B, 0 B/s"


def test_progress_corrects_a_total_that_was_too_small() -> None:
    with ByteProgress(1000, shown=False, share=lambda: 0.5) as progress:
        progress.advance(1000)
        assert progress.line().startswith("50 %, 1 KB, ")
