"""One recipe that aligns, measures, learns, merges, sets activations right and evaluates; a second run makes no more
than what has changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftwork.merge import load_recipe, merge
from graftwork.merge.checkpoint import Checkpoint
from graftwork.merge.errors import GraftworkError
from graftwork.merge.preparation import stages

TASKS = """
import torch
from graftwork.merge import Task

SIZES = (6, 24, 24, 3)


def network():
    layers = []
    for rows, columns in zip(SIZES[1:], SIZES):
        layers += [torch.nn.Linear(columns, rows), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def examples(seed):
    inputs = torch.randn(120, SIZES[0], generator=torch.Generator().manual_seed(seed))
    return [(inputs, (inputs[:, :3] * SHIFT).argmax(1))]


SHIFT = torch.tensor([1.0, 1.0, 1.0])
one = Task("one", network, lambda: examples(0), test=lambda: examples(1))
two = Task("two", network, lambda: examples(2), test=lambda: examples(3))
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, a copy of it in another order, and two fine-tuned models, with a file of tasks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks.py").write_text(TASKS)
    from graftwork.merge.task import load_task

    torch.manual_seed(0)
    base = load_task("tasks.py:one").model()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    save_file(state, "base.safetensors")
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    other = {**state, "0.weight": state["0.weight"][order], "0.bias": state["0.bias"][order]}
    other["2.weight"] = state["2.weight"][:, order]
    save_file({name: value.contiguous() for name, value in other.items()}, "shuffled.safetensors")
    for number, name in enumerate(("one", "two")):
        tuned = {key: value + 0.05 * torch.randn(value.shape) for key, value in state.items()}
        save_file(tuned, f"{name}.safetensors")
        assert number < 2
    return tmp_path


def write(text: str) -> Path:
    Path("recipe.yml").write_text(text)
    return Path("recipe.yml")


ALIGNED = """
merge_method: linear
parameters: {weight: 0.5}
align: {to: first, family: mlp}
models:
- {model: base.safetensors, task: "tasks.py:one"}
- {model: shuffled.safetensors}
evaluate: true
"""


def test_a_shuffled_copy_is_put_in_order_before_the_merge(workplace: Path) -> None:
    told: list[str] = []
    result = merge(write(ALIGNED), "out.safetensors", tell=told.append)
    merged, base = load_file("out.safetensors"), load_file("base.safetensors")
    assert all(torch.equal(merged[name], base[name]) for name in base)
    assert any(line.startswith("shuffled.safetensors re-ordered to match base.safetensors: making") for line in told)
    [evaluation] = result.evaluations
    assert (evaluation.checkpoint, evaluation.task) == ("out.safetensors", "one")
    with Checkpoint.open("out.safetensors") as out:
        parents = json.loads(out.metadata["graftwork.parents"])
    assert [parent["name"] for parent in parents] == ["base.safetensors", "shuffled.aligned.safetensors"]
    assert parents[1]["parents"][0]["name"] == "shuffled.safetensors"


def test_without_the_alignment_the_merge_is_another(workplace: Path) -> None:
    merge(write(ALIGNED.replace("align: {to: first, family: mlp}\n", "")), "out.safetensors")
    assert not torch.allclose(load_file("out.safetensors")["0.weight"], load_file("base.safetensors")["0.weight"])


def test_a_second_run_makes_only_what_has_changed(workplace: Path) -> None:
    merge(write(ALIGNED), "out.safetensors")
    made = workplace / "out.safetensors.made" / "shuffled.aligned.safetensors"
    stamp = made.stat().st_mtime_ns
    told: list[str] = []
    merge("recipe.yml", "out.safetensors", force=True, tell=told.append)
    assert made.stat().st_mtime_ns == stamp
    assert any("is up to date" in line for line in told)
    [stage] = stages(load_recipe("recipe.yml").recipes[0], workplace / "out.safetensors.made")
    assert stage.is_made
    changed = load_file("shuffled.safetensors")
    changed["0.bias"] = changed["0.bias"] + 1
    save_file(changed, "shuffled.safetensors")
    [stage] = stages(load_recipe("recipe.yml").recipes[0], workplace / "out.safetensors.made")
    assert not stage.is_made
    merge("recipe.yml", "out.safetensors", force=True)
    assert made.stat().st_mtime_ns != stamp


def test_a_damaged_file_is_made_again_after_a_run_that_was_stopped_in_it(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftwork.merge.alignment import match

    def stop(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    merge(write(ALIGNED), "out.safetensors")
    write(ALIGNED.replace("family: mlp", "family: mlp, seed: 5"))
    monkeypatch.setattr(match, "write_reordered", stop)
    with pytest.raises(KeyboardInterrupt):
        merge("recipe.yml", "out.safetensors", force=True)
    [stage] = stages(load_recipe(write(ALIGNED)).recipes[0], workplace / "out.safetensors.made")
    assert not stage.is_made


LEARNED = """
merge_method: {method}
base_model: base.safetensors
learn: {{steps: 8, batch: 8{more}}}
models:
- {{model: one.safetensors, task: "tasks.py:one"}}
- {{model: two.safetensors, task: "tasks.py:two"}}
"""


@pytest.mark.parametrize("method", ["adamerging", "concrete_task_arithmetic", "concrete_adamerging"])
def test_a_mask_that_is_missing_is_learned(workplace: Path, method: str) -> None:
    merge(write(LEARNED.format(method=method, more="")), "out.safetensors")
    mask = workplace / "out.safetensors.made" / f"{method}.mask.safetensors"
    stamp = mask.stat().st_mtime_ns
    first = Path("out.safetensors").read_bytes()
    merge("recipe.yml", "out.safetensors", force=True)
    assert mask.stat().st_mtime_ns == stamp
    assert Path("out.safetensors").read_bytes() == first
    merge(write(LEARNED.format(method=method, more=", seed: 3")), "out.safetensors", force=True)
    assert Path("out.safetensors").read_bytes() != first


MEASURED = """
merge_method: {method}
measure: {{examples: {examples}}}
models:
- {{model: one.safetensors, task: "tasks.py:one"}}
- {{model: two.safetensors, task: "tasks.py:two"}}
"""


@pytest.mark.parametrize(("method", "kind"), [("fisher", "fisher"), ("regmean", "gram")])
def test_statistics_that_are_missing_are_measured_once(workplace: Path, method: str, kind: str) -> None:
    merge(write(MEASURED.format(method=method, examples=40)), "out.safetensors")
    places = [workplace / "out.safetensors.made" / f"{name}.{kind}.safetensors" for name in ("one", "two")]
    stamps = [place.stat().st_mtime_ns for place in places]
    first = load_file("out.safetensors")
    merge(write(MEASURED.format(method="linear", examples=40) + "parameters: {weight: 1}"), "mean.safetensors")
    assert not torch.equal(first["0.weight"], load_file("mean.safetensors")["0.weight"])
    changed = {name: value + 0.01 for name, value in load_file("two.safetensors").items()}
    save_file(changed, "two.safetensors")
    merge(write(MEASURED.format(method=method, examples=40)), "out.safetensors", force=True)
    assert places[0].stat().st_mtime_ns == stamps[0]
    assert places[1].stat().st_mtime_ns != stamps[1]
    merge(write(MEASURED.format(method=method, examples=60)), "out.safetensors", force=True)
    assert places[0].stat().st_mtime_ns != stamps[0]


def test_one_file_aligns_measures_merges_and_evaluates(workplace: Path) -> None:
    text = ALIGNED.replace("linear\nparameters: {weight: 0.5}", "fisher\nmeasure: {examples: 50}")
    text = text.replace("{model: shuffled.safetensors}", '{model: shuffled.safetensors, task: "tasks.py:two"}')
    result = merge(write(text), "out.safetensors")
    merged, base = load_file("out.safetensors"), load_file("base.safetensors")
    assert all(torch.allclose(merged[name], base[name], atol=1e-6) for name in base)
    assert [item.task for item in result.evaluations] == ["one", "two"]
    made = {path.name for path in (workplace / "out.safetensors.made").iterdir()}
    assert {"base.fisher.safetensors", "shuffled.fisher.safetensors", "shuffled.aligned.safetensors"} <= made


def test_learning_for_another_method_is_refused(workplace: Path) -> None:
    write(LEARNED.format(method="adamerging", more=", parametrisation: mask"))
    with pytest.raises(GraftworkError, match=r'learn.parametrisation: "adamerging" uses'):
        merge("recipe.yml", "out.safetensors")
    assert not Path("out.safetensors").exists()


def test_activations_are_set_right_after_the_merge(workplace: Path) -> None:
    text = ALIGNED.replace("evaluate: true", "renormalize: repair").replace("align: {to: first, family: mlp}\n", "")
    merge(write(text), "out.safetensors")
    merge(write(text.replace("renormalize: repair\n", "")), "plain.safetensors")
    one, plain = load_file("out.safetensors"), load_file("plain.safetensors")
    assert one.keys() == plain.keys()
    assert not torch.equal(one["0.weight"], plain["0.weight"])
    with Checkpoint.open("out.safetensors") as out:
        assert out.metadata["graftwork.method"] == "linear, repair"
        parents = json.loads(out.metadata["graftwork.parents"])
    assert [item["name"] for item in parents[0]["parents"]] == ["base.safetensors", "shuffled.safetensors"]


def test_models_may_be_brought_into_an_order_of_all_of_them(workplace: Path) -> None:
    merge(write(ALIGNED.replace("to: first", "to: universe").replace("evaluate: true\n", "")), "out.safetensors")
    merged, base = load_file("out.safetensors"), load_file("base.safetensors")
    order = torch.cdist(base["0.weight"], merged["0.weight"]).argmin(0)
    assert torch.equal(merged["0.weight"], base["0.weight"][order])
