"""Recipes with several documents: where the outputs go, what they may replace, and how they are gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from graftwork.merge import lineage
from graftwork.merge.checkpoint import Checkpoint, load_torch
from graftwork.merge.errors import CheckpointError, DataError, OutputError
from graftwork.merge.recipe import parse_recipe
from graftwork.merge.run import Interrupted, Settings, merge

FIRST = "{name: one, merge_method: linear, models: [{model: L}, {model: R}], parameters: {weight: 1}}"
LAST = "{merge_method: linear, models: [{model: one}, {model: R}], parameters: {weight: 1}}"
TWO = f"{FIRST}\n---\n{LAST}"
NAMED = f"{FIRST}\n---\n{LAST.replace('{merge', '{name: two, merge', 1)}"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A working directory with two models."""
    monkeypatch.chdir(tmp_path)
    for value, name in enumerate("LR"):
        save(name, {"a": torch.full((4, 4), float(value)), "b": torch.full((3,), float(value))})
    return tmp_path


def save(name, values, metadata=None):
    Path(name).mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(values, f"{name}/model.safetensors", metadata or {"format": "pt"})


def run(text=TWO, out="out", progress=None, options=None, **settings):
    return merge(
        parse_recipe(text), out, threads=1, progress=progress, options=options, settings=Settings(**settings)
    )  # fmt: skip


def tree(folder="."):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def names():
    return {path.name for path in Path().iterdir()} - {"L", "R"}


def value(place):
    with Checkpoint.open(place) as found:
        return load_torch(found)["a"][0, 0].item()


def stop_in(document):
    """Return an observer that interrupts the work on the n-th document."""
    seen = []

    def observer(start):
        seen.append(start)

        def count(size):
            if len(seen) == document:
                raise KeyboardInterrupt

        return count

    return observer


# ---------------------------------------------------------------- places


def test_intermediate_outputs_are_removed_and_kept_as_asked_for(here):
    run()
    assert names() == {"out"}
    run(out="again", intermediate=Path("steps"))
    assert names() == {"out", "again", "steps"}
    assert value("steps/one") == 0.5
    assert value("again") == value("out") == 0.75


def test_a_model_is_not_replaced_by_an_intermediate_output(here):
    save("models/one", {"w": torch.zeros(8)})
    before = tree()
    with pytest.raises(OutputError, match="--force"):
        run(intermediate=Path("models"))
    assert tree() == before
    run(intermediate=Path("models"), force=True)
    assert value("models/one") == 0.5


def test_an_intermediate_output_of_another_merge_is_replaced(here):
    run(intermediate=Path("steps"))
    run(TWO.replace("{model: L}", "{model: L, parameters: {weight: 3}}"), out="other", intermediate=Path("steps"))
    assert value("steps/one") == 0.25


@pytest.mark.parametrize("force", [False, True])
def test_an_input_is_not_replaced_by_an_intermediate_output(here, force):
    before = tree()
    text = (
        TWO.replace("name: one", "name: L")
        .replace("model: one", "model: L")
        .replace("model: L}, {model: R", "model: ./L}, {model: R", 1)
    )
    with pytest.raises(OutputError, match="the input"):
        run(text, intermediate=Path("."), force=force)
    assert tree() == before


def test_an_output_and_an_intermediate_output_have_places_of_their_own(here):
    before = tree()
    for out, steps in (("one", "."), ("one/deep", "."), ("steps", "steps")):
        with pytest.raises(OutputError, match="within each other"):
            run(out=out, intermediate=Path(steps))
    assert tree() == before


@pytest.mark.parametrize("stops", [False, True])
def test_what_a_user_has_in_the_folder_for_intermediate_outputs_stays(here, stops):
    Path("out.steps").mkdir()
    Path("out.steps/mine.txt").write_text("x")
    if stops:
        with pytest.raises(Interrupted):
            run(progress=stop_in(2))
    run()
    assert value("out") == 0.75
    assert Path("out.steps/mine.txt").read_text() == "x"
    assert Path("out.steps/one").exists() == stops


def test_a_file_that_comes_into_our_folder_for_intermediate_outputs_stays(here):
    def observer(*_):
        Path("out.steps/mine.txt").write_text("x")
        return lambda size: None

    run(progress=observer)
    assert Path("out.steps/mine.txt").exists()
    assert not Path("out.steps/one").exists()


def test_a_run_that_was_stopped_uses_its_intermediate_outputs_and_removes_them(here):
    with pytest.raises(Interrupted):
        run(progress=stop_in(2))
    assert value("out.steps/one") == 0.5
    run(progress=stop_in(2))  # there is no second document to be worked on
    assert names() == {"out"}


def test_an_error_in_the_first_document_leaves_nothing(here):
    save("L", {"a": torch.full((4, 4), float("nan")), "b": torch.zeros(3)})
    with pytest.raises(DataError):
        run()
    assert names() == set()


# ---------------------------------------------------------------- all documents are named


@pytest.mark.parametrize("document", [1, 2])
def test_outputs_in_one_folder_are_gone_on_with(here, document):
    with pytest.raises(Interrupted, match="the same command again"):
        run(NAMED, progress=stop_in(document))
    run(NAMED)
    assert {path.name for path in Path("out").iterdir()} == {"one", "two"}
    assert value("out/two") == 0.75
    with pytest.raises(OutputError, match="--force"):
        run(NAMED)
    run(NAMED, force=True)
    assert value("out/two") == 0.75


def test_a_folder_with_other_things_is_no_place_for_outputs(here):
    Path("out").mkdir()
    Path("out/mine.txt").write_text("x")
    with pytest.raises(OutputError, match="it exists"):
        run(NAMED)
    assert tree("out") == {"mine.txt": b"x"}
    run(NAMED, force=True)
    assert Path("out/mine.txt").exists()
    for out in (".", "L/.."):
        with pytest.raises(OutputError, match="name"):
            run(NAMED, out, force=True)


def test_a_dry_run_changes_nothing_and_refuses_what_a_run_would(here):
    for name in ("out", "out.partial", "out.replaced"):
        Path(name).mkdir()
        Path(name, "journal.jsonl").write_text("mine")
    Path("r.yml").write_text(FIRST)
    before = tree()
    command = [sys.executable, "-m", "graftwork.cli", "merge", "r.yml", "out", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "it exists" in done.stderr
    assert tree() == before


# ---------------------------------------------------------------- lineage and text


def header(path):
    with Checkpoint.open(path) as found:
        return dict(found.metadata)


def raw(path, entries):
    text = json.dumps(entries).encode()
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def test_half_a_surrogate_pair_in_a_parent_is_replaced(here):
    raw("s.safetensors", {"__metadata__": {"graftwork.method": "m\ud800"}, "a": ENTRY})
    run("{merge_method: passthrough, models: [{model: s.safetensors}]}")
    (parent,) = json.loads(header("out")["graftwork.parents"])
    assert parent["method"] == "m?"


def test_half_a_surrogate_pair_in_the_name_of_a_tensor_is_an_error(here):
    raw("s.safetensors", {"a\ud800": ENTRY})
    with pytest.raises(CheckpointError, match="Unicode"):
        run("{merge_method: passthrough, models: [{model: s.safetensors}]}")
    assert names() == {"s.safetensors"}


def test_an_output_may_have_a_name_that_is_no_text(here):
    out = os.fsdecode(b"o\xff")
    run(FIRST, out)
    assert value(out) == 0.5
    run(FIRST, out + ".safetensors")
    assert value(out + ".safetensors") == 0.5


def test_lineages_do_not_grow_without_end(here):
    lines, parents = [], []
    for _ in range(7):
        parents = [lineage.parent_record(f"m{n}", f"{n:032x}", {}) | {"parents": parents} for n in range(6)]
        entries = lineage.metadata("model", method="linear", recipe="{}", parents=parents, digest="0" * 32)
        lines.append(len(entries["graftwork.parents"]))
        parents = lineage.own_parents(entries)
        assert [parent["name"] for parent in parents] == [f"m{n}" for n in range(6)]
    assert max(lines) <= lineage.LARGEST
    assert lines[-1] > 1000
