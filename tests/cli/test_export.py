"""Tests of `graftwork export`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Command

pytest.importorskip("flwr")
pytestmark = pytest.mark.flower


def accuracies(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["round"]: line["accuracy"] for line in lines if line["round"]}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_best_round_is_kept_and_exported(command: Command, finished_runs: Path, tmp_path: Path) -> None:
    """`plain` keeps one round only, besides the best one."""
    run = finished_runs / "plain"
    held = accuracies(run)
    best = min(number for number, value in held.items() if value == max(held.values()))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        f"round-{number:04}" for number in sorted({best, 6})
    ]
    record = json.loads(command("export", run, "best", "--round", "best", "--json").out)
    assert (record["round"], record["accuracy"]) == (best, max(held.values()))
    kept = load_file(run / "checkpoints" / f"round-{best:04}" / "global.safetensors")
    assert same(load_file(tmp_path / "best" / "model.safetensors"), kept)


def test_the_last_model_is_the_one_at_the_end(command: Command, finished_runs: Path, tmp_path: Path) -> None:
    assert command("export", finished_runs / "plain", "last").code == 0
    assert same(load_file(tmp_path / "last/model.safetensors"), load_file(finished_runs / "plain/model.safetensors"))
    card = (tmp_path / "last" / "README.md").read_text()
    for text in ("[FedAvg](", "| run | plain |", "| round | 6 of 6 |", "last  (fedavg)\n└─ plain/final  (fedavg)"):
        assert text in card
    assert f"{100 * accuracies(finished_runs / 'plain')[6]:.2f} %" in card


def test_other_commands_and_programs_load_it(command: Command, finished_runs: Path, tmp_path: Path) -> None:
    """`evaluate` finds the accuracy that the run says its last round has on that site; `merge` merges it."""
    assert command("export", finished_runs / "plain", "last").code == 0
    task = f"{finished_runs / 'sites.py'}:s1"
    found = json.loads(command("evaluate", "last", "--task", task, "--json").out)["evaluations"][0]["accuracy"]
    line = json.loads((finished_runs / "plain" / "metrics.jsonl").read_text().splitlines()[-1])
    assert found == line["sites"]["s1"]["accuracy"]
    assert command("verify", "last").code == 0
    assert command("export", finished_runs / "prox", "prox").code == 0
    recipe = "merge_method: linear\nmodels: [{model: ./last}, {model: ./prox}]\nparameters: {weight: 1.0}\n"
    (tmp_path / "r.yml").write_text(recipe)
    assert command("merge", "r.yml", "merged.safetensors").code == 0
    first, second = (load_file(tmp_path / name / "model.safetensors")["head.weight"] for name in ("last", "prox"))
    assert torch.allclose(load_file(tmp_path / "merged.safetensors")["head.weight"], (first + second) / 2)


def test_rounds_that_are_not_kept_are_refused_with_those_that_are(command: Command, finished_runs: Path) -> None:
    run = finished_runs / "plain"
    kept = sorted(int(path.name[-4:]) for path in (run / "checkpoints").iterdir())
    gone = next(number for number in range(1, 6) if number not in kept)
    for number in (gone, 7):
        outcome = command("export", run, "out", "--round", number)
        assert outcome.code == 1
        said = ", ".join(map(str, kept)) + (" is" if len(kept) == 1 else " are")
        assert f"round {number} is not kept; {said} (a run keeps its best round" in outcome.errors[0]
    outcome = command("export", run, "out", "--round", "bets")
    assert 'write best, last, or a number; did you mean "best"?' in outcome.errors[0]


def test_a_site_of_fedbn_has_the_shared_model_with_its_own_batch_norm(
    command: Command, finished_runs: Path, tmp_path: Path
) -> None:
    run = finished_runs / "own"
    refused = command("export", run, "out")
    assert refused.code == 1
    assert refused.errors[0].endswith('name a site with --site: "s0", "s1", "s2", "s3"')
    record = json.loads(command("export", run, "s1", "--site", "s1", "--json").out)
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["accuracy"] == line["sites"]["s1"]["accuracy"]
    found = load_file(tmp_path / "s1" / "model.safetensors")
    private = load_file(run / "private" / "s1" / "round-0004.safetensors")
    shared = load_file(run / "checkpoints" / "round-0004" / "global.safetensors")
    for name, value in found.items():
        assert torch.equal(value, private.get(f"model/{name}", shared[name]))
    assert not torch.equal(found["neck.1.running_mean"], shared["neck.1.running_mean"])
    task = f"{finished_runs / 'sites.py'}:s1"
    judged = json.loads(command("evaluate", "s1", "--task", task, "--json").out)["evaluations"][0]["accuracy"]
    assert judged == record["accuracy"]


def test_private_rounds_that_are_gone_are_named(command: Command, finished_runs: Path) -> None:
    outcome = command("export", finished_runs / "own", "out", "--site", "s1", "--round", "2")
    assert outcome.code == 1
    assert "its private entries are kept of rounds 3, 4 only" in outcome.errors[0]


def test_what_a_site_sent_is_exported_where_it_was_kept(command: Command, finished_runs: Path, tmp_path: Path) -> None:
    run = finished_runs / "prox"
    assert command("export", run, "sent", "--site", "s2").code == 0
    kept = load_file(run / "checkpoints" / "round-0003" / "sites" / "s2.safetensors")
    assert same(load_file(tmp_path / "sent" / "model.safetensors"), kept)
    assert 'there is no such site; did you mean "s2"?' in command("export", run, "x", "--site", "s22").errors[0]
    refused = command("export", finished_runs / "plain", "x", "--site", "s2").errors[0]
    assert "all sites share one model; leave out --site" in refused


def test_a_model_folder_to_start_from_gives_config_and_lineage(
    command: Command, finished_runs: Path, tmp_path: Path
) -> None:
    (tmp_path / "start").mkdir()
    save_file(load_file(finished_runs / "plain/model.safetensors"), tmp_path / "start/model.safetensors")
    (tmp_path / "start/config.json").write_text('{"model_type": "toy", "torch_dtype": "bfloat16"}')
    (tmp_path / "start/tokenizer.json").write_text("{}")
    sites = f"{finished_runs / 'sites.py'}:two"
    assert command("simulate", sites, "-r", "1", "--init", "start", "-o", "run").code == 0
    assert "└─ start  " in command("inspect", "run/model.safetensors").out
    assert command("export", "run", "out").code == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model_type"], config["torch_dtype"]) == ("toy", "float32")
    assert (tmp_path / "out/tokenizer.json").exists()
    tree = command("inspect", "out").out
    assert "└─ run/final  (fedavg)" in tree
    assert "   └─ start" in tree
    shutil.rmtree(tmp_path / "start")
    outcome = command("export", "run", "again")
    assert outcome.code == 0
    assert "the start model start is not there any more" in outcome.out


def test_equal_exports_are_equal_files_and_one_file_is_enough(
    command: Command, finished_runs: Path, tmp_path: Path
) -> None:
    for out in ("first", "second", "alone.safetensors"):
        assert command("export", finished_runs / "plain", out).code == 0
    first = (tmp_path / "first/model.safetensors").read_bytes()
    assert (tmp_path / "second/model.safetensors").read_bytes() == first
    assert (tmp_path / "alone.safetensors").read_bytes() == first


def test_nothing_is_overwritten_and_nothing_is_left_behind(
    command: Command, finished_runs: Path, tmp_path: Path
) -> None:
    run = finished_runs / "plain"
    assert command("export", run, "out").code == 0
    assert "replace it with --force" in command("export", run, "out").errors[0]
    assert command("export", run, "out", "--force").code == 0
    assert "lies within the input" in command("export", run, run / "model").errors[0]
    assert "is the input" in command("export", run, run, "--force").errors[0]
    assert 'there is no run in "nowhere"' in command("export", "nowhere", "x").errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
