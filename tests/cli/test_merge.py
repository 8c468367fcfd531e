"""Tests of `graftwork merge`: what it says, what it accepts, and what it refuses with one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from graftwork.merge.plan import make_plan
from graftwork.merge.recipe import load_recipe
from tests.cli.conftest import Command, recipe, save, tensors


def refused(command: Command, *arguments: object) -> str:
    """Return the only error line of a command that has to be refused."""
    outcome = command(*arguments)
    assert outcome.code == 1, outcome
    assert outcome.out == ""
    assert len(outcome.errors) == 1, outcome.err
    return outcome.errors[0]


# --- what works -----------------------------------------------------------------------------------------------------


def test_a_merge_writes_the_average_and_says_so(command: Command, models: Path) -> None:
    outcome = command("merge", recipe(models / "r.yml"), "out")
    assert outcome.code == 0, outcome
    merged = load_file(models / "out" / "model.safetensors")
    wanted = (tensors(1)["embed.weight"] + tensors(2)["embed.weight"]) / 2
    np.testing.assert_allclose(merged["embed.weight"], wanted, rtol=1e-6)
    rows = dict(line.split(maxsplit=1) for line in outcome.out.splitlines())
    assert rows["method"] == "linear"
    assert rows["tensors"] == "5 merged, 1 copied"
    assert rows.keys() == {"output", "method", "tensors", "parameters", "digest", "time"}


def test_the_summary_is_the_same_as_json(command: Command, models: Path) -> None:
    outcome = command("merge", recipe(models / "r.yml"), "out", "--json")
    record = json.loads(outcome.out)
    assert record["out"] == "out"
    assert record["tensors"] == {"merged": 5, "copied": 1, "resumed": 0}
    assert record["parameters"] == sum(value.size for value in tensors(1).values())
    assert len(record["digest"]) == 32


def test_a_recipe_can_come_from_stdin(command: Command, models: Path) -> None:
    text = recipe(models / "r.yml").read_text()
    from_stdin = json.loads(command("merge", "-", "one", "--json", stdin=text).out)
    from_file = json.loads(command("merge", "r.yml", "two", "--json").out)
    assert from_stdin["digest"] == from_file["digest"]


def test_a_broken_recipe_from_stdin_is_called_so(command: Command, models: Path) -> None:
    outcome = command("merge", "-", "out", stdin="merge_method: [")
    assert outcome.code == 1
    assert "stdin" in outcome.errors[0]


def test_a_dry_run_prints_the_plan_and_writes_nothing(command: Command, models: Path) -> None:
    before = sorted(models.iterdir())
    path = recipe(models / "r.yml", "ties", base_model="./base.safetensors", dtype="bfloat16")
    outcome = command("merge", path, "out", "--dry-run")
    assert outcome.code == 0, outcome
    assert sorted(models.iterdir()) == sorted([*before, path])
    for words in (
        "ties (TIES)",
        "a.safetensors: 6 tensors",
        "base.safetensors: 6 tensors",
        "the base",
        "merged",
        "from base.safetensors, not a floating-point tensor: steps",
        "reads",
        "writes",
        "buffers",
    ):
        assert words in outcome.out


def test_a_dry_run_as_json_names_every_tensor(command: Command, models: Path) -> None:
    outcome = command("merge", recipe(models / "r.yml"), "--dry-run", "--json")
    (plan,) = json.loads(outcome.out)["plans"]
    assert {item["name"] for item in [*plan["merged"], *plan["copied"]]} == set(tensors(0))
    assert plan["tensors"] == {"merged": 5, "copied": 1, "dropped": 1}
    assert plan["copied"][0]["reason"] == "not a floating-point tensor"
    assert plan["peak_memory"] > 0


def test_a_dry_run_and_the_run_count_the_same_tensors(command: Command, models: Path) -> None:
    path = recipe(models / "r.yml", exclude=["layers.0.*"], dtype="bfloat16")
    (plan,) = json.loads(command("merge", path, "--dry-run", "--json").out)["plans"]
    done = json.loads(command("merge", path, "out", "--json").out)
    assert (plan["tensors"]["merged"], plan["tensors"]["copied"]) == (3, 3)
    assert done["tensors"] == {"merged": 3, "copied": 3, "resumed": 0}


def test_a_dry_run_refuses_what_the_run_would_refuse(command: Command, models: Path) -> None:
    (models / "out").mkdir()
    assert "it exists" in refused(command, "merge", recipe(models / "r.yml"), "out", "--dry-run")


def test_documents_run_in_the_order_of_their_needs(command: Command, models: Path) -> None:
    first = {"name": "first", **yaml.safe_load(recipe(models / "x.yml").read_text())}
    last = {
        "merge_method": "linear",
        "models": [
            {"model": "first", "parameters": {"weight": 1.0}},
            {"model": "./base.safetensors", "parameters": {"weight": 1.0}},
        ],
    }
    (models / "r.yml").write_text(yaml.safe_dump_all([last, first]))
    planned = command("merge", "r.yml", "out", "--dry-run")
    assert "needs" in planned.out
    outcome = command("merge", "r.yml", "out", "-I", "steps")
    assert outcome.code == 0, outcome
    merged = load_file(models / "out" / "model.safetensors")["embed.weight"]
    half = (tensors(1)["embed.weight"] + tensors(2)["embed.weight"]) / 2
    np.testing.assert_allclose(merged, (half + tensors(0)["embed.weight"]) / 2, rtol=1e-5)
    assert (models / "steps" / "first" / "model.safetensors").exists()


def test_without_an_intermediate_folder_nothing_stays_beside_the_output(command: Command, models: Path) -> None:
    first = {"name": "first", **yaml.safe_load(recipe(models / "x.yml").read_text())}
    last = {"merge_method": "passthrough", "models": [{"model": "first"}]}
    (models / "r.yml").write_text(yaml.safe_dump_all([first, last]))
    before = set(models.iterdir())
    assert command("merge", "r.yml", "out").code == 0
    assert set(models.iterdir()) - before == {models / "out"}


def test_force_replaces_an_output_and_nothing_else_does(command: Command, models: Path) -> None:
    path = recipe(models / "r.yml")
    assert command("merge", path, "out").code == 0
    assert "--force" in refused(command, "merge", path, "out")
    assert command("merge", path, "out", "--force").code == 0


def test_quiet_says_nothing(command: Command, models: Path) -> None:
    outcome = command("merge", recipe(models / "r.yml"), "out", "--quiet")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")


def test_verbose_shows_the_plan_on_stderr(command: Command, models: Path) -> None:
    outcome = command("merge", recipe(models / "r.yml"), "out", "-v")
    assert "layers.1.down.weight F32 [8, 8]" in outcome.err


def test_the_output_can_be_sharded(command: Command, models: Path) -> None:
    outcome = command("merge", recipe(models / "r.yml"), "out", "--out-shard-size", "1K")
    assert outcome.code == 0, outcome
    assert len(list((models / "out").glob("model-*-of-*.safetensors"))) > 1
    assert (models / "out" / "model.safetensors.index.json").exists()


def test_the_seed_decides_random_masks(command: Command, models: Path) -> None:
    path = recipe(models / "r.yml", "dare_linear", base_model="./base.safetensors", parameters={"density": 0.5})
    digests = [
        json.loads(command("merge", path, f"out{number}", "--json", "--seed", seed).out)["digest"]
        for number, seed in enumerate((1, 1, 2))
    ]
    assert digests[0] == digests[1] != digests[2]


# --- mergekit's flags -----------------------------------------------------------------------------------------------

_FLAGS_WITHOUT_EFFECT = [
    ["--read-to-gpu"], ["--low-cpu-memory"], ["--multi-gpu"], ["--gpu-rich"], ["--lazy-unpickle"], ["--async-write"],
    ["--clone-tensors"], ["--trust-remote-code"], ["--write-threads", "3"], ["--lora-merge-cache", "x"],
    ["--lora-merge-dtype", "float16"], ["--safe-serialization"],
    ["--no-lazy-unpickle"], ["--no-read-to-gpu"], ["--no-unsafe-truncate-embeddings"],
]  # fmt: skip


def test_flags_of_mergekit_without_effect_say_so_in_one_line_each(command: Command, models: Path) -> None:
    path = recipe(models / "r.yml")
    outcome = command("merge", path, "--dry-run", *(word for flag in _FLAGS_WITHOUT_EFFECT[:-3] for word in flag))
    assert outcome.code == 0, outcome
    lines = outcome.err.splitlines()
    assert sorted(line.split()[0] for line in lines) == sorted(flag[0] for flag in _FLAGS_WITHOUT_EFFECT[:-3])
    assert all("has no effect here: " in line for line in lines)


@pytest.mark.parametrize("flag", _FLAGS_WITHOUT_EFFECT, ids=lambda flag: flag[0])
def test_each_of_them_is_accepted_alone(command: Command, models: Path, flag: list[str]) -> None:
    outcome = command("merge", recipe(models / "r.yml"), "--dry-run", *flag)
    assert outcome.code == 0
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith(flag[0])


def test_flags_of_mergekit_with_effect_have_it(command: Command, models: Path) -> None:
    arguments = ["-j", "1", "--num-threads", "2", "--random-seed", "3", "--no-copy-tokenizer", "--no-write-model-card",
                 "--allow-crimes", "--no-cuda", "--device", "cpu", "--no-lazy", "--out-path", "out"]  # fmt: skip
    outcome = command("merge", recipe(models / "r.yml"), *arguments)
    assert outcome.code == 0, outcome
    assert not (models / "out" / "README.md").exists()


@pytest.mark.parametrize(
    ("flag", "advice"),
    [("--unsafe-truncate-embeddings", "tokenizer: {source: base}"), ("--no-safe-serialization", "always safetensors")],
)
def test_flags_that_would_do_harm_are_refused(command: Command, models: Path, flag: str, advice: str) -> None:
    outcome = command("merge", recipe(models / "r.yml"), "out", flag)
    assert outcome.code == 2
    assert len(outcome.errors) == 1
    assert advice in outcome.errors[0]
    assert not (models / "out").exists()


def test_an_unknown_flag_is_a_usage_error_with_the_nearest_one(command: Command, models: Path) -> None:
    outcome = command("merge", recipe(models / "r.yml"), "out", "--drry-run")
    assert outcome.code == 2
    assert "--drry-run" in outcome.err
    assert "--dry-run" in outcome.err.replace("--drry-run", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cuda", "--device", "cuda"],
        ["--device", "gpu"],
        ["--threads", "0"],
        ["--on-mismatch", "ignore"],
        ["--out-path", "other"],
    ],
)
def test_wrong_usage_exits_with_two(command: Command, models: Path, arguments: list[str]) -> None:
    assert command("merge", recipe(models / "r.yml"), "out", *arguments).code == 2


def test_a_missing_output_is_wrong_usage(command: Command, models: Path) -> None:
    outcome = command("merge", recipe(models / "r.yml"))
    assert outcome.code == 2
    assert "OUT is missing" in outcome.err


def test_a_missing_gpu_is_one_line(command: Command, models: Path) -> None:
    assert "cuda" in refused(command, "merge", recipe(models / "r.yml"), "out", "--device", "cuda:99")


def test_device_auto_works_without_a_gpu(command: Command, models: Path) -> None:
    assert command("merge", recipe(models / "r.yml"), "out", "--device", "auto").code == 0


# --- what is refused ------------------------------------------------------------------------------------------------


def test_an_unknown_method_names_the_nearest_one(command: Command, models: Path) -> None:
    line = refused(command, "merge", recipe(models / "r.yml", "linaer"), "out")
    assert "linaer" in line
    assert '"linear"' in line


def test_a_missing_recipe_is_named(command: Command, models: Path) -> None:
    assert "nowhere.yml" in refused(command, "merge", "nowhere.yml", "out")


def test_a_missing_model_is_named_with_its_key(command: Command, models: Path) -> None:
    line = refused(command, "merge", recipe(models / "r.yml", names=("a", "nobody")), "out")
    assert "models[1]" in line
    assert "nobody.safetensors" in line


def test_every_problem_of_a_recipe_has_its_line(command: Command, models: Path) -> None:
    content = yaml.safe_load(recipe(models / "r.yml", names=("a", "nobody")).read_text())
    content["dtpye"] = "float16"
    (models / "r.yml").write_text(yaml.safe_dump(content))
    outcome = command("merge", "r.yml", "out")
    assert outcome.code == 1
    assert len(outcome.errors) == 2
    assert any("dtype" in line for line in outcome.errors)


def test_not_a_number_names_tensor_and_model(command: Command, models: Path) -> None:
    values = tensors(2)
    values["layers.1.up.weight"][2, 3] = np.nan
    save(models / "b.safetensors", values)
    line = refused(command, "merge", recipe(models / "r.yml"), "out")
    assert "layers.1.up.weight" in line
    assert "b.safetensors" in line
    assert not (models / "out").exists()
    assert not (models / "out.partial").exists()


def test_allow_nonfinite_passes_it_on(command: Command, models: Path) -> None:
    values = tensors(2)
    values["layers.1.up.weight"][2, 3] = np.nan
    save(models / "b.safetensors", values)
    assert command("merge", recipe(models / "r.yml"), "out", "--allow-nonfinite").code == 0
    merged = load_file(models / "out" / "model.safetensors")["layers.1.up.weight"]
    assert np.isnan(merged[2, 3])
    assert np.isnan(merged).sum() == 1


def test_two_shapes_are_named_with_the_way_out(command: Command, models: Path) -> None:
    save(models / "b.safetensors", tensors(2) | {"embed.weight": np.zeros((25, 8), np.float32)})
    line = refused(command, "merge", recipe(models / "r.yml"), "out")
    for words in ("embed.weight", "[24, 8]", "[25, 8]", "a.safetensors", "b.safetensors", 'exclude: ["embed.weight"]'):
        assert words in line


@pytest.mark.parametrize("choice", ["base", "skip"])
def test_two_shapes_can_be_left_alone(command: Command, models: Path, choice: str) -> None:
    save(models / "b.safetensors", tensors(2) | {"embed.weight": np.zeros((25, 8), np.float32)})
    outcome = command("merge", recipe(models / "r.yml"), "out", "--on-mismatch", choice)
    assert outcome.code == 0, outcome
    assert ("embed.weight" in load_file(models / "out" / "model.safetensors")) == (choice == "base")


def test_a_missing_tensor_is_named_and_can_be_taken_over(command: Command, models: Path) -> None:
    save(models / "b.safetensors", {name: value for name, value in tensors(2).items() if name != "embed.weight"})
    path = recipe(models / "r.yml")
    line = refused(command, "merge", path, "out")
    assert "embed.weight" in line
    assert "--on-missing base" in line
    assert command("merge", path, "out", "--on-missing", "base").code == 0
    merged = load_file(models / "out" / "model.safetensors")
    np.testing.assert_array_equal(merged["embed.weight"], tensors(1)["embed.weight"])


def test_a_method_that_needs_a_base_says_so_before_a_byte_is_read(command: Command, models: Path) -> None:
    for name in ("a", "b"):
        (models / f"{name}.safetensors").write_bytes(b"not a checkpoint")
    line = refused(command, "merge", recipe(models / "r.yml", "ties"), "out")
    assert "base_model" in line


def test_weights_that_cancel_are_one_line_however_many_tensors(command: Command, models: Path) -> None:
    content = yaml.safe_load(recipe(models / "r.yml").read_text())
    content["models"][1]["parameters"]["weight"] = -1.0
    (models / "r.yml").write_text(yaml.safe_dump(content))
    line = refused(command, "merge", "r.yml", "out")
    assert "sum to zero" in line
    assert "and 4 more" in line


def test_an_output_inside_an_input_is_refused(command: Command, models: Path) -> None:
    save(models / "folder" / "model.safetensors", tensors(1))
    content = yaml.safe_load(recipe(models / "r.yml").read_text())
    content["models"][0]["model"] = "./folder"
    (models / "r.yml").write_text(yaml.safe_dump(content))
    assert "lies within" in refused(command, "merge", "r.yml", "folder/out")


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_an_output_without_a_name_is_refused(command: Command, models: Path, out: str) -> None:
    assert command("merge", recipe(models / "r.yml"), out).errors


@pytest.mark.parametrize("text", ["a", "=b", "", "a:b"])
def test_a_renaming_without_two_names_is_wrong_usage(command: Command, models: Path, text: str) -> None:
    done = command("merge", recipe(models / "r.yml"), "out", "--rename", text)
    assert done.code == 2
    assert f'--rename "{text}" is not OLD=NEW' in done.err


def test_a_bad_size_is_one_line(command: Command, models: Path) -> None:
    assert "5 parsecs" in refused(command, "merge", recipe(models / "r.yml"), "out", "--max-shard-size", "5 parsecs")


def test_strict_turns_warnings_about_the_recipe_into_errors(command: Command, models: Path) -> None:
    path = recipe(models / "r.yml", colour="blue")
    lenient = command("merge", path, "out")
    assert lenient.code == 0
    assert "warning: " in lenient.err
    assert "colour" in lenient.err
    assert "colour" in refused(command, "merge", path, "other", "--strict")


def test_a_pickle_needs_permission(command: Command, models: Path) -> None:
    import torch

    torch.save({name: torch.from_numpy(value) for name, value in tensors(1).items()}, models / "a.pt")
    content = yaml.safe_load(recipe(models / "r.yml").read_text())
    content["models"][0]["model"] = "./a.pt"
    (models / "r.yml").write_text(yaml.safe_dump(content))
    assert "--allow-pickle" in refused(command, "merge", "r.yml", "out")
    assert command("merge", "r.yml", "out", "--allow-pickle").code == 0


def test_a_file_can_be_the_output(command: Command, models: Path) -> None:
    assert command("merge", recipe(models / "r.yml"), "merged.safetensors").code == 0
    assert load_file(models / "merged.safetensors").keys() == tensors(0).keys()
    assert not (models / "merged.safetensors.partial").exists()


def test_an_unfinished_merge_of_another_size_of_shards_leaves_no_trace(command: Command, models: Path) -> None:
    path = recipe(models / "r.yml")
    plan = make_plan(load_recipe(path).recipes[0])
    digest = plan.digest()
    plan.close()
    # As a process leaves it that dies: a journal of this very plan, and a shard that the next run will not have.
    partial = models / "next.partial"
    partial.mkdir()
    (partial / ".graftwork-journal.jsonl").write_text(json.dumps({"plan": digest}) + "\n")
    (partial / "model-00001-of-00009.safetensors").write_bytes(b"old")
    assert command("merge", path, "next").code == 0
    assert sorted(file.name for file in (models / "next").iterdir()) == [
        "README.md",
        "graftwork_recipe.yml",
        "model.safetensors",
    ]


def test_repositories_of_the_hub_are_looked_for_in_the_cache_that_is_named(command: Command, models: Path) -> None:
    path = recipe(models / "r.yml", models=[{"model": "org/one", "parameters": {"weight": 1}}])
    outcome = command("merge", path, "out", "--offline", "--transformers-cache", "cache")
    assert outcome.code == 1
    assert outcome.errors == [
        'error: models[0].model: "org/one" is no folder or file here, and it is not in the hub\'s cache at "cache", '
        "and --offline is given"
    ]


def test_the_plan_names_the_commit_of_a_repository(command: Command, models: Path) -> None:
    commit = "c0ffee" + 34 * "1"
    snapshot = models / "cache" / "models--org--one" / "snapshots" / commit
    save(snapshot / "model.safetensors", tensors(1))
    path = recipe(models / "r.yml", models=[{"model": f"org/one@{commit}", "parameters": {"weight": 1}}])
    arguments = ("merge", path, "--dry-run", "--offline", "--transformers-cache", "cache")
    assert f"(org/one at {commit[:12]}): 6 tensors" in command(*arguments).out
    (entry,) = json.loads(command(*arguments, "--json").out)["plans"][0]["inputs"]
    assert (entry["repository"], entry["commit"]) == ("org/one", commit)
