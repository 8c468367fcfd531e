"""Tests of the loop that learns to merge: what it may touch, what it repeats, and what a user may get wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from graftwork.merge.artifact import load_artifact
from graftwork.merge.checkpoint import Checkpoint
from graftwork.merge.errors import CheckpointError, DataError, GraftworkError, RecipeError
from graftwork.merge.subspace import LOSSES, LearnedMerge, Progress, learn_merge
from graftwork.merge.subspace import learning as module_under_test
from graftwork.merge.subspace.inputs import collect
from graftwork.merge.subspace.network import Model, connect
from graftwork.merge.task import Task
from tests.merge.subspace.problems import CLASSES, WIDTH, Headed, Normed, Plain, Problem, batches_of, inputs_of, problem
from tests.merge.subspace.problems import with_heads as problem_with_heads

PARAMETRISATIONS = ("task_wise", "layer_wise", "mask", "mask+layer_wise")


def learn(given: Problem, **settings: Any) -> LearnedMerge:
    return learn_merge(given.base, given.experts, given.tasks, **{"steps": 20, **settings})


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
def test_the_loss_falls(parametrisation: str) -> None:
    learned = learn(problem_with_heads(), parametrisation=parametrisation, steps=200, coefficient_rate=0.02)
    assert mean(learned.report.last_loss) < mean(learned.report.first_loss) - 0.02


def test_what_is_given_is_not_touched() -> None:
    given = problem(Normed)
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in (given.base, *given.experts)]
    learn(given)
    for state, kept in zip((given.base, *given.experts), before, strict=True):
        assert all(torch.equal(state[name], kept[name]) for name in kept)


def test_frozen_parameters_buffers_and_tied_weights() -> None:
    given = problem(Normed)
    learned = learn(given)
    assert set(learned.logits) == {"first.weight", "first.bias", "norm.weight", "norm.bias", "last.weight", "last.bias"}
    assert np.abs(learned.logits["first.weight"]).max() > 0


def test_a_tied_weight_that_files_hold_twice_has_one_mask_under_both_names() -> None:
    given = problem(Normed)
    for state in (given.base, *given.experts):
        state["again.weight"] = state["first.weight"].clone()
    learned = learn(given)
    assert np.array_equal(learned.logits["first.weight"], learned.logits["again.weight"])
    columns = [learned.layers.index(name) for name in ("first.weight", "again.weight")]
    assert np.array_equal(learned.coefficients[:, columns[0]], learned.coefficients[:, columns[1]])


def test_running_statistics_are_the_mean_of_the_experts() -> None:
    seen: list[Tensor] = []

    def logits(module: nn.Module, inputs: Tensor) -> Tensor:
        assert not module.training
        seen.append(module.get_buffer("norm.running_mean").clone())
        result: Tensor = module(inputs)
        return result

    given = problem(Normed, logits=logits)
    learn(given, steps=1)
    expected = torch.stack([expert["norm.running_mean"] for expert in given.experts]).mean(0)
    assert torch.allclose(seen[-1], expected, atol=1e-6)


def test_heads_that_are_excluded_stay_those_of_the_experts() -> None:
    torch.manual_seed(0)
    base = Headed(5).state_dict()
    experts, tasks, seen = [], [], []

    def logits(module: nn.Module, inputs: Tensor) -> Tensor:
        seen.append(module.get_parameter("head.weight").clone())
        result: Tensor = module(inputs)
        return result

    for number in range(3):
        own = Headed(number + 2).state_dict()
        moved = {name: base[name] + 0.3 * torch.rand(base[name].shape) for name in base if "encoder" in name}
        experts.append({**own, **moved})
        model = partial(Headed, number + 2)
        tasks.append(Task(f"t{number}", model, batches_of(inputs_of(number)), logits=logits))
    learned = learn_merge(base, experts, tasks, steps=30, exclude=("head.*",))
    assert set(learned.logits) == {"encoder.weight", "encoder.bias"}
    assert not learned.report.together
    for found, expert in zip(seen[-3:], experts, strict=True):
        assert torch.equal(found, expert["head.weight"])
    with pytest.raises(GraftworkError) as caught:
        learn_merge(base, experts, tasks, steps=30)
    assert any(
        'cannot merge "head.bias": the base has [5], "expert 0" [2]' in line and 'exclude: ["head.bias"]' in line
        for line in caught.value.problems
    )


def test_one_forward_pass_for_all_tasks_gives_the_gradients_of_one_for_each() -> None:
    given = problem_with_heads()
    models = [Model("model", state) for state in (given.base, *given.experts)]
    inputs = [collect(task, batch=16, seed=0, examples=None) for task in given.tasks]
    network = connect(models[0], models[1:], given.tasks, inputs, ())
    indices = [rows.indices(0, 1, 16) for rows in inputs]
    network.choose_path(indices)
    assert network.together
    losses, gradients = [], []
    for together in (True, False):
        network.together = together
        losses.append(network.backward(indices, LOSSES["kl"])[0])
        gradients.append({name: parameter.grad for name, parameter in network.parameters.items()})
        for parameter in network.parameters.values():
            parameter.grad = None
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, one in gradients[0].items():
        other = gradients[1][name]
        assert one is not None
        assert other is not None
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_inputs_of_different_shapes_go_through_the_network_one_task_at_a_time() -> None:
    given = problem(lambda: nn.Sequential(nn.Flatten(), nn.Linear(WIDTH, CLASSES)))
    square = inputs_of(1).reshape(-1, 2, 3)
    tasks = [given.tasks[0], Task("t1", given.tasks[1].model, batches_of(square)), given.tasks[2]]
    assert not learn(Problem(given.base, given.experts, tasks)).report.together


def test_inputs_may_be_mappings() -> None:
    def logits(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        result: Tensor = module(inputs["x"] * inputs["mask"])
        return result

    given = problem(Plain)
    tasks = []
    for number in range(3):
        rows = inputs_of(number)
        data = [({"x": part, "mask": torch.ones_like(part)}, None) for part in rows.split(64)]
        tasks.append(Task(f"t{number}", Plain, lambda data=data: data, logits=logits))  # type: ignore[misc]
    learned = learn(Problem(given.base, given.experts, tasks))
    plain = learn(given)
    assert np.allclose(learned.logits["first.weight"], plain.logits["first.weight"], atol=1e-3)


def test_positions_of_a_sequence_are_learned_together() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, CLASSES)

        def forward(self, inputs: Tensor) -> Tensor:
            result: Tensor = self.layer(inputs).transpose(1, 2)
            return result

    given = problem(Sequence)
    rows = torch.randn(40, 5, WIDTH)
    tasks = [Task(task.name, Sequence, batches_of(rows)) for task in given.tasks]
    learned = learn(Problem(given.base, given.experts, tasks), loss="im")
    assert learned.logits["layer.weight"].shape == (CLASSES, WIDTH)


@pytest.mark.parametrize("loss", ["kl", "im", "entropy"])
@pytest.mark.parametrize("parametrisation", ["mask+layer_wise", "layer_wise"])
def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, loss: str, parametrisation: str) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        learn(problem(), loss=loss, parametrisation=parametrisation, seed=seed).save(tmp_path / f"{name}.safetensors")
    one, two, three = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("one", "two", "three"))
    assert one == two
    assert one != three


def test_a_run_that_stopped_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    given, state = problem(), tmp_path / "state.safetensors"
    learn(given, steps=30).save(tmp_path / "whole.safetensors")

    def stop(progress: Progress) -> None:
        if progress.step == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_merge(given.base, given.experts, given.tasks, steps=30, state=state, progress=stop)
    resumed = learn(given, steps=30, state=state)
    assert resumed.report.resumed == 13
    resumed.save(tmp_path / "resumed.safetensors")
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "resumed.safetensors").read_bytes()


KILLED = textwrap.dedent("""
    import os, signal, sys
    from graftwork.merge.subspace import learn_merge
    from tests.merge.subspace.problems import problem
    import torch
    torch.set_num_threads(1)
    given = problem()
    last = int(sys.argv[1])

    def die(progress):
        if progress.step == last:
            os.kill(os.getpid(), signal.SIGKILL)

    learned = learn_merge(
        given.base, given.experts, given.tasks, steps=40, state="state.safetensors", save_every=3, progress=die
    )
    learned.save("out.safetensors")
""")


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}

    def run(last: int) -> int:
        arguments = [sys.executable, "-c", KILLED, str(last)]
        return subprocess.run(arguments, cwd=tmp_path, env=environment, timeout=120, check=False).returncode

    assert run(-1) == 0
    whole = (tmp_path / "out.safetensors").read_bytes()
    for name in ("out", "state"):
        (tmp_path / f"{name}.safetensors").unlink(missing_ok=True)
    for last in (4, 20, 36):
        assert run(last) == -signal.SIGKILL
        assert not (tmp_path / "out.safetensors").exists()
    assert run(-1) == 0
    assert (tmp_path / "out.safetensors").read_bytes() == whole


def test_a_step_is_complete_before_ctrl_c_is_heard() -> None:
    done = []

    def step() -> None:
        with module_under_test._uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        step()
    assert done == [1]


def test_the_file_says_where_it_comes_from(tmp_path: Path) -> None:
    given = problem()
    paths = []
    for name, state in zip(("base", "a", "b", "c"), (given.base, *given.experts), strict=True):
        save_file(state, tmp_path / f"{name}.safetensors")
        paths.append(tmp_path / f"{name}.safetensors")
    learned = learn_merge(paths[0], paths[1:], given.tasks, steps=3, loss="im", seed=5)
    learned.save(tmp_path / "masks.safetensors")
    found = load_artifact(tmp_path / "masks.safetensors", kind="mask")
    with Checkpoint.open(paths[2]) as expert:
        assert found.parents[2]["digest"] == expert.content_digest()
    assert [parent["name"] for parent in found.parents] == [path.name for path in paths]
    assert found.metadata["method"] == "concrete_adamerging"
    assert (found.metadata["loss"], found.metadata["steps"], found.metadata["seed"]) == ("im", "3", "5")
    assert found.metadata["transductive"] == "false"
    assert found.tensors["lambda"].shape == (3, 4)
    assert found.tensors["first.weight.logit"].shape == (16, WIDTH)
    assert str(tmp_path) not in str(found.metadata)


def test_inputs_that_are_test_inputs_are_reported() -> None:
    rows = inputs_of(0)
    seen = Task("t", Plain, batches_of(rows[:100]), test=batches_of(rows[90:]))
    unseen = Task("t", Plain, batches_of(rows[:100]), test=batches_of(rows[100:]))
    assert collect(seen, batch=16, seed=0, examples=None).transductive
    assert not collect(unseen, batch=16, seed=0, examples=None).transductive


def test_every_input_has_its_turn_before_one_comes_again() -> None:
    inputs = collect(problem().tasks[0], batch=16, seed=0, examples=64)
    first = torch.cat([inputs.indices(0, step, 16) for step in range(1, 5)])
    second = torch.cat([inputs.indices(0, step, 16) for step in range(5, 9)])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(64))
    assert first.tolist() != second.tolist()
    assert inputs.indices(0, 2, 16).tolist() == first[16:32].tolist()


def test_trimmed_task_vectors_keep_their_largest_entries_of_the_elected_sign() -> None:
    vectors = torch.tensor([[3.0, -1.0, 0.1, 2.0], [-2.0, -4.0, 0.2, 1.0]])
    kept = module_under_test._trimmed(vectors, torch.tensor([1.0, 1.5]))
    assert kept.tolist() == [[3.0, -1.0, 0.0, 2.0], [0.0, -4.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    "settings", [{"schedule": "bilevel"}, {"hard": True}, {"clamp": True}, {"trim": 0.2}, {"coefficient": 0.5}]
)
def test_options_change_the_result_and_learn(settings: dict[str, Any]) -> None:
    given = problem_with_heads()
    learned = learn(given, steps=60, coefficient_rate=0.02, **settings)
    assert mean(learned.report.last_loss) < mean(learned.report.first_loss)
    assert not np.array_equal(learned.coefficients, learn(given, steps=60, coefficient_rate=0.02).coefficients)


def test_task_vectors_in_bfloat16_learn_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = learn(problem(), parametrisation="layer_wise")
    monkeypatch.setattr(module_under_test, "_RESIDENT", 0)
    assert learn(problem(), parametrisation="layer_wise").coefficients == pytest.approx(exact.coefficients, abs=2e-3)


# ---------------------------------------------------------------------------------------------------------------------
# What may go wrong: one line each


def changed(**changes: Any) -> Problem:
    return problem(**changes)


def of_unequal_classes() -> Problem:
    given = problem()

    def logits(module: nn.Module, inputs: Tensor, calls: list[int] = []) -> Tensor:  # noqa: B006
        calls.append(1)
        outputs: Tensor = module(inputs)
        return outputs[:, :2] if len(calls) == 1 else outputs

    rows = batches_of(inputs_of(0))
    return Problem(given.base, given.experts, [Task("odd", Plain, rows, logits=logits), *given.tasks[1:]])


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        (changed(batches=list), {}, 'task "t0": it has 0 train inputs, a batch takes 16'),
        (changed(batches=batches_of(inputs_of(0, 7))), {}, "it has 7 train inputs, a batch takes 16"),
        (changed(batches=lambda: [("words", None)]), {}, "cannot be put together.*str"),
        (changed(batches=lambda: [3]), {}, "a batch is int, not a pair"),
        (changed(logits=lambda module, inputs: module(inputs).sum(1)), {}, r"are \[200\], not \[200, classes"),
        (of_unequal_classes(), {}, r"the merged model's logits have the shape \[16, 4\], the expert's \[16, 2\]"),
        (problem(experts=1), {}, 'one expert \\("expert 0"\\), so there is nothing to learn'),
        (problem(), {"temperature": 0.0}, "temperature: is 0.0"),
        (problem(), {"coefficient": float("nan")}, "coefficient: is nan"),
        (problem(), {"steps": 0}, "steps: is 0"),
        (problem(), {"loss": "kll"}, 'loss: there is no "kll"; did you mean "kl"'),
        (problem(), {"looss": "kl"}, 'looss: there is no such setting; did you mean "loss"'),
        (problem(), {"hard": True, "parametrisation": "layer_wise"}, "has no mask"),
        (problem(), {"schedule": "bilevel", "parametrisation": "mask"}, "bilevel needs"),
    ],
)
def test_a_mistake_is_one_line(given: Problem, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(GraftworkError, match=message) as caught:
        learn(given, **settings)
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)


def test_an_expert_that_is_the_base_is_named() -> None:
    given = problem()
    with pytest.raises(GraftworkError, match='"expert 1" is equal to the base "the base"'):
        learn(Problem(given.base, [given.experts[0], given.base, given.experts[2]], given.tasks))


def test_a_number_of_tasks_that_is_not_that_of_the_experts_is_refused() -> None:
    given = problem()
    with pytest.raises(GraftworkError, match="3 experts and 2 tasks"):
        learn(Problem(given.base, given.experts, given.tasks[:2]))
    with pytest.raises(GraftworkError, match='two tasks are called "t0"'):
        learn(Problem(given.base, given.experts, [given.tasks[0]] * 3))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    given, state = problem(), tmp_path / "state.safetensors"
    calls: list[int] = []

    def logits(module: nn.Module, inputs: Tensor) -> Tensor:
        outputs: Tensor = module(inputs)
        calls.append(1)
        return outputs * float("nan") if len(calls) > 12 else outputs

    rows = batches_of(inputs_of(0))
    broken = Problem(given.base, given.experts, [Task("odd", Plain, rows, logits=logits), *given.tasks[1:]])
    with pytest.raises(DataError, match=r'task "odd": the loss of step \d+ is nan, on its inputs \d+.* is kept in'):
        learn(broken, steps=30, state=state)
    kept = load_artifact(state, kind="state")
    assert int(kept.metadata["step"]) > 3
    assert all(np.isfinite(values).all() for values in kept.tensors.values())


@pytest.mark.parametrize(
    ("settings", "key"), [({"seed": 1}, "seed"), ({"steps": 31}, "steps"), ({"examples": 100}, "examples")]
)
def test_a_state_of_other_settings_is_refused(tmp_path: Path, settings: dict[str, Any], key: str) -> None:
    state = tmp_path / "state.safetensors"

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    given = problem()
    with pytest.raises(KeyboardInterrupt):
        learn_merge(given.base, given.experts, given.tasks, steps=30, state=state, progress=stop)
    with pytest.raises(CheckpointError, match=f"learned with {key} = "):
        learn(given, **{"steps": 30, "state": state, **settings})
    other = [Task(task.name, Plain, batches_of(inputs_of(9))) for task in given.tasks]
    with pytest.raises(CheckpointError, match="learned with inputs = "):
        learn(Problem(given.base, given.experts, other), steps=30, state=state)
    with pytest.raises(CheckpointError, match="learned with models = "):
        learn(Problem(given.base, given.experts[::-1], given.tasks), steps=30, state=state)


def test_entropy_that_collapses_is_noticed() -> None:
    """Experts that tell four classes apart, and a merge that at once gives all inputs the same one."""
    torch.manual_seed(0)
    base = {"weight": torch.zeros(CLASSES, CLASSES), "bias": torch.zeros(CLASSES)}
    experts = [
        {"weight": torch.eye(CLASSES), "bias": torch.zeros(CLASSES)},
        {"weight": torch.eye(CLASSES) * 0.9, "bias": torch.tensor([40.0, 0, 0, 0])},
    ]
    rows = torch.eye(CLASSES).repeat(16, 1) * 5

    def model() -> nn.Module:
        return nn.Linear(CLASSES, CLASSES)

    tasks = [Task(name, model, batches_of(rows)) for name in ("healthy", "biased")]
    settings = {"loss": "entropy", "steps": 60, "parametrisation": "layer_wise", "coefficient": 1.0}
    report = learn_merge(base, experts, tasks, **settings).report
    assert len(report.warnings) == 1
    assert 'task "healthy" collapses at step' in report.warnings[0]
    assert "use the loss kl or im" in report.warnings[0]
    with pytest.raises(GraftworkError, match="collapses"):
        learn_merge(base, experts, tasks, **settings, strict=True)
    assert not learn_merge(base, experts, tasks, **{**settings, "loss": "kl"}).report.warnings


def test_a_threshold_of_an_undecided_mask_is_warned_of() -> None:
    assert "is decided" in learn(problem(), mask_kind="threshold").report.warnings[0]


def test_settings_are_checked_all_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        learn(problem(), steps=0, batch=0, temperature=-1.0)
    assert len(caught.value.problems) == 3
