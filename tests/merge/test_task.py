"""Tests of loading a user's task, and of putting a checkpoint's values into its model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from graftwork.merge import task as task_module
from graftwork.merge.checkpoint import Checkpoint
from graftwork.merge.errors import GraftworkError, TaskError
from graftwork.merge.task import Task, fit, load_federation, load_object, load_task

HEADER = """
from graftwork.merge.task import Task
def make(name):
    return Task(name, model=lambda: None, batches=lambda: [])
"""


@pytest.fixture(autouse=True)
def restored_search_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(task_module, "_USER_FOLDERS", [])
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if name.startswith(("graftwork_user_", "sibling", "random_walk", "graftwork_test")):
            del sys.modules[name]


def write(folder: Path, text: str, name: str = "mine.py") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(HEADER + dedent(text), encoding="utf-8")
    return str(folder / name)


def problem(spec: str) -> str:
    with pytest.raises(TaskError) as caught:
        load_task(spec)
    message = str(caught.value)
    assert "\n" not in message
    return message


def module(bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=bias))


def task_of(make: object, name: str = "mine") -> Task:
    return Task(name, model=make, batches=list)  # type: ignore[arg-type]


# --- loading --------------------------------------------------------------------------------------------------------


def test_a_task_in_a_file_is_loaded(tmp_path: Path) -> None:
    assert load_task(write(tmp_path, "mine = make('a')") + ":mine").name == "a"


def test_a_function_that_returns_a_task_is_called(tmp_path: Path) -> None:
    assert load_task(write(tmp_path, "def mine(fold=1): return make(f'fold {fold}')") + ":mine").name == "fold 1"


ARGUMENTS = """
from pathlib import Path
def mine(name, size: int = 2, rate=0.5, deep: bool = False, place: Path | None = None, checkpoint: str = 'none'):
    return make(f'{name} {size!r} {rate!r} {deep!r} {place} {checkpoint}')
fixed = make('fixed')
"""


def test_arguments_follow_the_name_and_become_what_the_function_wants(tmp_path: Path) -> None:
    spec = write(tmp_path, ARGUMENTS) + ":mine,name=a,b,size=3,rate=2,deep=yes,place=x:y"
    assert load_task(spec).name == "a,b 3 2.0 True x:y none"
    assert load_task(spec, checkpoint="model").name == "a,b 3 2.0 True x:y model"
    assert load_task(f"{spec},checkpoint=other", checkpoint="model").name == "a,b 3 2.0 True x:y other"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("mine,name=a,sice=3", 'there is no argument "sice"; did you mean "size"?'),
        ("mine,name=a,size=three", 'size is "three", not a whole number'),
        ("mine,name=a,deep=maybe", 'deep is "maybe", not true or false'),
        ("mine,name=a,name=b", "name is given twice"),
        ("mine,size=3", "it needs arguments (name); give them defaults, or values after its name, as in "),
        ("fixed,size=3", "is a Task and takes no arguments"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tmp_path: Path, arguments: str, message: str) -> None:
    assert message in problem(f"{write(tmp_path, ARGUMENTS)}:{arguments}")


def test_an_attribute_of_an_object_in_a_file_is_found(tmp_path: Path) -> None:
    assert load_task(write(tmp_path, "class All:\n    mine = make('a')") + ":All.mine").name == "a"


def test_a_task_in_a_module_is_loaded() -> None:
    assert load_task("graftwork.simulations.digits:turned").name == "turned"


def test_a_module_in_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "graftwork_test_package", "mine = make('a')", "tasks.py")
    monkeypatch.chdir(tmp_path)
    assert load_task("graftwork_test_package.tasks:mine").name == "a"


def test_a_file_imports_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "name = 'from a sibling'", "sibling_names.py")
    assert load_task(write(tmp_path, "import sibling_names\nmine = make(sibling_names.name)") + ":mine").name.endswith(
        "sibling"
    )


def test_two_files_with_neighbours_of_one_name_each_get_their_own(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write(tmp_path / folder, f"name = {folder!r}", "sibling_names.py")
        write(tmp_path / folder, "import sibling_names\nmine = make(sibling_names.name)")
    assert [load_task(f"{tmp_path / folder}/mine.py:mine").name for folder in ("one", "two")] == ["one", "two"]


def test_a_neighbour_hides_no_installed_package(tmp_path: Path) -> None:
    write(tmp_path, "raise RuntimeError('hidden')", "yaml.py")
    write(tmp_path, "raise RuntimeError('hidden')", "colorsys.py")
    sys.modules.pop("colorsys", None)
    assert load_task(write(tmp_path, "import yaml, colorsys\nmine = make(yaml.__name__)") + ":mine").name == "yaml"


def test_a_file_named_twice_runs_once_and_an_edited_file_again(tmp_path: Path) -> None:
    spec = write(tmp_path, "marker = object()") + ":marker"
    first = load_object(spec)
    assert load_object(spec) is first
    write(tmp_path, "marker = object()  # edited")
    assert load_object(spec) is not first


def test_classes_of_a_user_file_can_be_pickled(tmp_path: Path) -> None:
    import pickle

    found = load_object(write(tmp_path, "class Net:\n    pass") + ":Net")
    assert type(pickle.loads(pickle.dumps(found()))) is found


@pytest.mark.parametrize("spec", ["mine.py", ":mine", "mine.py:", ""])
def test_a_text_that_is_no_address_is_explained(spec: str) -> None:
    assert "write file.py:name or package.module:name" in problem(spec)


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path, "", "tasks.py")
    assert problem(f"{tmp_path}/task.py:mine").endswith('did you mean "tasks.py"?')
    assert "is a folder" in problem(f"{tmp_path}/:mine")


def test_a_missing_name_names_the_nearest_one(tmp_path: Path) -> None:
    message = problem(write(tmp_path, "digits = make('a')") + ":digit")
    assert 'has no "digit"; did you mean "digits"?' in message


def test_a_missing_module_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 'there is no module "nowhere"' in problem("nowhere.at.all:mine")
    write(tmp_path, "", "sibling_file.py")
    monkeypatch.chdir(tmp_path)
    assert problem("sibling_file.py.more:mine")


def test_an_import_that_fails_in_a_file_is_one_line_with_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, "import not_there_at_all")
    assert f"{path}:5: ModuleNotFoundError: No module named 'not_there_at_all'" in problem(f"{path}:mine")


def test_the_place_is_the_neighbour_in_which_it_failed(tmp_path: Path) -> None:
    write(tmp_path, "1 / 0", "sibling_broken.py")
    message = problem(write(tmp_path, "import sibling_broken") + ":mine")
    assert "sibling_broken.py:5: ZeroDivisionError: division by zero" in message


def test_a_syntax_error_is_one_line_with_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, "def mine(:")
    assert f"{path}:5: SyntaxError" in problem(f"{path}:mine")


def test_a_file_that_exits_is_an_error(tmp_path: Path) -> None:
    assert "SystemExit" in problem(write(tmp_path, "raise SystemExit(3)") + ":mine")


def test_a_function_that_fails_is_one_line_with_its_place_and_its_cause(tmp_path: Path) -> None:
    path = write(tmp_path, "def mine():\n    raise ValueError('no data\\nmore')")
    with pytest.raises(TaskError, match=r"mine\.py:6: ValueError: no data$") as caught:
        load_task(f"{path}:mine")
    assert isinstance(caught.value.__cause__, ValueError)


def test_our_own_errors_in_a_user_file_pass_unchanged(tmp_path: Path) -> None:
    path = write(tmp_path, "from graftwork.merge.errors import DependencyError\nraise DependencyError('install it')")
    with pytest.raises(GraftworkError, match=r"^install it$"):
        load_task(f"{path}:mine")


def test_an_interrupt_passes(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        load_task(write(tmp_path, "raise KeyboardInterrupt") + ":mine")


def test_a_function_that_needs_arguments_is_refused(tmp_path: Path) -> None:
    message = problem(write(tmp_path, "def mine(root, fold=1, *, seed): pass") + ":mine")
    assert "it needs arguments (root, seed); give them defaults" in message


@pytest.mark.parametrize(("text", "kind"), [("mine = 3", "an int"), ("def mine(): return {}", "a dict")])
def test_what_is_no_task_is_refused(tmp_path: Path, text: str, kind: str) -> None:
    assert f"it is {kind}, not a Task" in problem(write(tmp_path, text) + ":mine")


# --- federations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["sites = {'oslo': make('a')}", "def sites(): return {'oslo': make('a')}", "def sites(site): return make('a')"],
)
def test_the_tasks_of_all_sites_are_loaded(tmp_path: Path, text: str) -> None:
    sites = load_federation(write(tmp_path, text) + ":sites")
    assert (sites("oslo") if callable(sites) else sites["oslo"]).name == "a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sites = {}", "there are none"),
        ("sites = {'oslo': 3}", 'site "oslo" is an int'),
        ("sites = {1: make('a')}", "names a site, not a text"),
        ("sites = make('a')", "it is a Task, not a mapping"),
        ("def sites(a, b): pass", "it is a function, not a mapping"),
    ],
)
def test_what_is_no_federation_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        load_federation(write(tmp_path, text) + ":sites")


# --- the task itself ------------------------------------------------------------------------------------------------


def test_a_task_with_data_instead_of_a_function_is_refused_at_once() -> None:
    with pytest.raises(TaskError, match='cannot make task "a": batches is a list, not a function; wrap it'):
        Task("a", model=module, batches=[])  # type: ignore[arg-type]
    with pytest.raises(TaskError, match="test is a list"):
        Task("a", model=module, batches=list, test=[1])  # type: ignore[arg-type]


def test_tasks_are_importable_without_torch() -> None:
    code = "import sys, graftwork.merge.task, graftwork.merge.evaluation, graftwork.merge.pictures; "
    code += "import graftwork.cli.demo; "
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib', 'sklearn')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


# --- fitting --------------------------------------------------------------------------------------------------------


def test_a_module_gets_the_checkpoint_s_values(tmp_path: Path) -> None:
    source = module()
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    with Checkpoint.open(tmp_path / "a.safetensors") as checkpoint:
        fitted = fit(task_of(module), checkpoint)
    for name, tensor in source.state_dict().items():
        assert torch.equal(fitted.state_dict()[name], tensor)


def test_half_precision_is_cast_to_the_module_s_dtype() -> None:
    half = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in module().state_dict().items()
    }
    fitted = fit(task_of(module), half)
    assert fitted.state_dict()["0.weight"].dtype == torch.float32
    assert torch.equal(fitted.state_dict()["0.weight"], half["0.weight"].float())


def test_tied_tensors_may_be_stored_once() -> None:
    def tied() -> nn.Module:
        made = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        made[1].weight = made[0].weight
        return made

    fitted = fit(task_of(tied), {"0.weight": torch.eye(3)})
    assert torch.equal(fitted.state_dict()["1.weight"], torch.eye(3))


def test_what_does_not_fit_is_listed_with_both_shapes() -> None:
    tensors = dict(module().state_dict())
    del tensors["2.bias"]
    tensors["2.weight"] = torch.zeros(5, 4)
    tensors |= {f"extra.{number}": torch.zeros(1) for number in range(8)}
    with pytest.raises(TaskError) as caught:
        fit(task_of(module), tensors, name="runs/a")
    missing, unexpected, shape, hint = caught.value.problems
    assert missing == (
        'cannot load "runs/a" into the model of task "mine": 1 tensor is missing from the checkpoint: "2.bias"'
    )
    assert '8 tensors are not in the model: "extra.0", "extra.1"' in unexpected
    assert unexpected.endswith('"extra.4" and 3 more')
    assert shape.endswith('1 tensor has another shape: "2.weight" (5, 4) in the checkpoint, (2, 4) in the model')
    assert hint == "see its tensors: graftwork inspect runs/a"


def test_a_common_prefix_is_recognised_on_either_side() -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in module().state_dict().items()}
    with pytest.raises(TaskError, match=r'the names in the checkpoint have "module\." in front'):
        fit(task_of(module), wrapped)
    with pytest.raises(TaskError, match=r'the names in the model have "0\." in front'):
        fit(task_of(lambda: nn.Sequential(module())), module().state_dict())


def test_a_fraction_for_a_count_is_refused_not_truncated() -> None:
    tensors = {**module().state_dict(), "1.num_batches_tracked": torch.tensor(2.5)}
    with pytest.raises(TaskError, match=r'"1.num_batches_tracked" is torch.float32 in the checkpoint, torch.int64'):
        fit(task_of(module), tensors)


def test_a_model_that_is_no_module_is_refused() -> None:
    with pytest.raises(TaskError, match=r"returns a dict, not a torch\.nn\.Module"):
        fit(task_of(dict), {})


def test_a_model_that_fails_is_one_line() -> None:
    with pytest.raises(TaskError, match=r'cannot make the model of task "mine": .*ZeroDivisionError'):
        fit(task_of(lambda: 1 / 0), {})
