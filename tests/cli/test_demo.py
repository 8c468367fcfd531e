"""Tests of the demo: what it claims about merging is measured here, on the whole run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from graftwork.cli.demo import LEFT_OUT, SETTINGS, SPECIALISTS, TASKS, DemoResult, Row, run_demo, table, write_recipes
from graftwork.merge.errors import DependencyError, OutputError
from graftwork.merge.evaluation import evaluate
from graftwork.merge.methods import get, names
from graftwork.merge.recipe import load_recipe
from graftwork.merge.task import load_task
from graftwork.simulations import digits


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, list[str]]:
    told: list[str] = []
    return run_demo(tmp_path_factory.mktemp("demo") / "out", progress=told.append), told


def row_of(result: DemoResult, name: str) -> Row:
    (row,) = [row for row in result.rows if row.name == name]
    return row


# --- recipes --------------------------------------------------------------------------------------------------------


def test_every_method_is_in_the_demo_with_parameters_that_it_has() -> None:
    assert set(SETTINGS) | set(LEFT_OUT) == set(names())
    assert not set(SETTINGS) & set(LEFT_OUT)
    for method, settings in SETTINGS.items():
        assert set(settings) <= set(get(method).parameters)


@pytest.mark.parametrize("is_absolute", [True, False])
def test_every_recipe_is_accepted_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_absolute: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "demo" if is_absolute else Path("demo")
    (out / "recipes").mkdir(parents=True)
    for name in ("base", *SPECIALISTS):
        save_file({"weight": torch.zeros(2, 2)}, out / f"{name}.safetensors")
    for method, recipe in write_recipes(out).items():
        (read,) = load_recipe(recipe).recipes
        assert read.method == method
        assert not read.warnings


# --- folders and what may be missing --------------------------------------------------------------------------------


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="it holds other files; choose another with --out"):
        run_demo(tmp_path, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_earlier_demo_is_replaced_only_on_request(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    with pytest.raises(OutputError, match="it holds an earlier one; replace it with --force"):
        run_demo(tmp_path)


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("mine")
    with pytest.raises(OutputError, match="cannot write the demo into"):
        run_demo(tmp_path / "demo")


@pytest.mark.parametrize("package", ["sklearn", "matplotlib"])
def test_a_missing_package_is_named_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    digits.digits.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DependencyError, match=r'pip install "graftwork\[demo\]"'):
        run_demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


# --- the digits -----------------------------------------------------------------------------------------------------


def test_no_image_is_in_two_splits() -> None:
    images, _ = digits.digits()
    held = [index for part in digits.SPLITS.values() for index in range(len(images))[part]]
    assert sorted(held) == list(range(1797))


def test_a_guise_moves_pixels_and_keeps_labels() -> None:
    clean, labels = digits.split("clean", "test")
    for guise in TASKS:
        images, same = digits.split(guise, "test")
        assert torch.equal(labels, same)
        values = (1 - images if guise == "negative" else images).flatten(1).sort(dim=1).values
        assert torch.equal(values, clean.flatten(1).sort(dim=1).values)
        assert (guise == "clean") == torch.equal(images, clean)


def test_tasks_can_be_named_on_the_command_line() -> None:
    for name in TASKS:
        task = load_task(f"graftwork.simulations.digits:{name}")
        assert task.name == name
        assert task.test is not None
        assert sum(len(labels) for _, labels in task.test()) == 500


def test_training_depends_on_the_seed_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (digits.train_base(seed, steps=3) for seed in (0, 0, 1))
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert torch.equal(torch.get_rng_state(), before)


# --- the whole run --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_specialists_know_their_own_guise_and_not_the_others(demo: tuple[DemoResult, list[str]]) -> None:
    for name in SPECIALISTS:
        accuracy = row_of(demo[0], name).accuracy
        assert accuracy[name] > 0.92
        assert max(accuracy[other] for other in SPECIALISTS if other != name) < 0.75
        assert row_of(demo[0], "base").accuracy[name] < 0.75


@pytest.mark.slow
def test_an_average_is_better_than_any_specialist_and_task_arithmetic_much_better(
    demo: tuple[DemoResult, list[str]],
) -> None:
    means = {row.name: row.mean for row in demo[0].rows}
    specialist = max(means[name] for name in SPECIALISTS)
    assert means["linear"] > specialist
    for method in ("task_arithmetic", "dare_linear", "dare_ties", "della", "breadcrumbs", "multislerp", "ties"):
        assert means[method] > means["linear"] + 0.04
        assert means[method] > specialist + 0.06
        assert min(row_of(demo[0], method).accuracy.values()) > 0.75


@pytest.mark.slow
def test_every_method_keeps_what_the_base_knew(demo: tuple[DemoResult, list[str]]) -> None:
    merged = [row for row in demo[0].rows if row.kind in {"merged", "looking"}]
    assert {row.name for row in merged} == set(SETTINGS)
    assert min(row.accuracy["clean"] for row in merged) > 0.9
    assert min(row.mean for row in merged) > row_of(demo[0], "base").mean - 0.01


@pytest.mark.slow
def test_passing_a_model_through_changes_nothing(demo: tuple[DemoResult, list[str]]) -> None:
    assert row_of(demo[0], "passthrough").accuracy == row_of(demo[0], "scrambled").accuracy


@pytest.mark.slow
def test_results_can_be_had_again_from_the_files(demo: tuple[DemoResult, list[str]]) -> None:
    out = demo[0].out
    recorded = {model["name"]: model for model in json.loads((out / "results.json").read_text())["models"]}
    (again,) = evaluate([out / "ties" / "model.safetensors"], [load_task("graftwork.simulations.digits:turned")])
    assert again.accuracy == recorded["ties"]["accuracy"]["turned"] == row_of(demo[0], "ties").accuracy["turned"]
    assert str(out) not in (out / "results.json").read_text()


@pytest.mark.slow
def test_the_table_has_a_row_for_every_model_and_the_best_merge_first(demo: tuple[DemoResult, list[str]]) -> None:
    result, told = demo
    console = Console(width=100, no_color=True)
    with console.capture() as captured:
        console.print(table(result))
    lines = [line.split() for line in captured.get().splitlines() if line.strip()]
    assert [line[0] for line in lines if len(line) == 6][1:] == [row.name for row in result.rows]
    merged = [row.mean for row in result.rows if row.kind == "merged"]
    assert merged == sorted(merged, reverse=True)
    assert sum(line.startswith("merging with") for line in told) == len(SETTINGS)


@pytest.mark.slow
def test_the_picture_is_written(demo: tuple[DemoResult, list[str]]) -> None:
    assert demo[0].picture == demo[0].out / "accuracy.png"
    assert demo[0].picture.read_bytes().startswith(b"\x89PNG")
