"""Tests of evaluation: figures that can be worked out by hand, and what a user may get wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from graftwork.merge.checkpoint import Checkpoint
from graftwork.merge.errors import TaskError
from graftwork.merge.evaluation import Evaluation, evaluate
from graftwork.merge.task import Task

IDENTITY = {"weight": torch.eye(3)}
INPUTS = torch.eye(3).repeat(2, 1)
LABELS = torch.tensor([0, 1, 2, 0, 1, 1])


def model() -> nn.Module:
    return nn.Linear(3, 3, bias=False)


def batches_of(*sizes: int) -> Any:
    return lambda: list(zip(INPUTS.split(list(sizes)), LABELS.split(list(sizes)), strict=True))


def task(**changes: Any) -> Task:
    return Task(**{"name": "mine", "model": model, "batches": batches_of(6), **changes})


def only(evaluations: list[Evaluation]) -> Evaluation:
    (evaluation,) = evaluations
    return evaluation


def test_loss_and_accuracy_are_those_worked_out_by_hand() -> None:
    right, wrong = math.log(math.e + 2) - 1, math.log(math.e + 2)
    evaluation = only(evaluate({"a": IDENTITY}, [task()]))
    assert evaluation.accuracy == 5 / 6
    assert evaluation.loss == pytest.approx((5 * right + wrong) / 6, abs=1e-12)
    assert evaluation.examples == 6


def test_the_loss_does_not_depend_on_how_examples_are_batched() -> None:
    losses = [
        only(evaluate({"a": IDENTITY}, [task(batches=batches_of(*sizes))])).loss for sizes in ((6,), (5, 1), (1, 2, 3))
    ]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-12)


def test_a_loss_of_the_user_is_weighted_by_batch_size() -> None:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.argmax(1) != labels).double().mean()

    assert only(evaluate({"a": IDENTITY}, [task(loss=loss, batches=batches_of(5, 1))])).loss == pytest.approx(1 / 6)


def test_the_user_s_logits_are_used() -> None:
    evaluation = only(evaluate({"a": IDENTITY}, [task(logits=lambda module, inputs: -module(inputs))]))
    assert evaluation.accuracy == 0


def test_labels_that_cross_entropy_ignores_are_not_judged() -> None:
    labels = torch.tensor([0, 1, -100, -100, -100, 0])
    evaluation = only(evaluate({"a": IDENTITY}, [task(batches=lambda: [(INPUTS, labels)])]))
    assert evaluation.accuracy == 2 / 3


def test_labels_that_are_no_classes_give_a_loss_alone() -> None:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return ((logits - targets) ** 2).mean()

    evaluation = only(evaluate({"a": IDENTITY}, [task(loss=loss, batches=lambda: [(INPUTS, INPUTS)])]))
    assert (evaluation.loss, evaluation.accuracy) == (0, None)


def test_test_is_preferred_to_validation_and_validation_to_training_data() -> None:
    full = task(validation=batches_of(6), test=batches_of(6))
    assert [
        only(evaluate({"a": IDENTITY}, [each])).split for each in (full, task(validation=batches_of(6)), task())
    ] == [
        "test",
        "validation",
        "train",
    ]
    assert only(evaluate({"a": IDENTITY}, [full], split="validation")).split == "validation"
    assert only(evaluate({"a": IDENTITY}, [full], split="train")).split == "train"


def test_models_run_in_evaluation_mode_and_without_gradients() -> None:
    seen: list[tuple[bool, bool]] = []

    def logits(module: nn.Module, inputs: Tensor) -> Tensor:
        seen.append((module.training, torch.is_inference_mode_enabled()))
        result: Tensor = module(inputs)
        return result

    evaluate({"a": IDENTITY}, [task(logits=logits)])
    assert seen == [(False, True)]


def test_random_models_are_judged_the_same_way_each_time_and_leave_no_trace() -> None:
    def noisy(module: nn.Module, inputs: Tensor) -> Tensor:
        result: Tensor = module(inputs) + torch.randn(len(inputs), 3)
        return result

    before = torch.get_rng_state()
    losses = [only(evaluate({"a": IDENTITY}, [task(logits=noisy)])).loss for _ in range(2)]
    assert losses[0] == losses[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_that_is_not_finite_is_reported_as_such() -> None:
    evaluation = only(evaluate({"a": {"weight": torch.full((3, 3), math.nan)}}, [task()]))
    assert not evaluation.is_finite
    assert evaluation.record()["loss"] == "nan"


def test_files_and_open_checkpoints_are_named_by_their_path(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(IDENTITY, path)
    with Checkpoint.open(path) as checkpoint:
        evaluations = evaluate([checkpoint], [task()])
    assert [evaluation.checkpoint for evaluation in evaluations] == [str(path)]
    assert only(evaluate([path], [task()])).accuracy == 5 / 6


def test_every_checkpoint_is_judged_on_every_task_in_order() -> None:
    told: list[Evaluation] = []
    evaluations = evaluate(
        {"b": IDENTITY, "a": {"weight": -torch.eye(3)}}, [task(), task(name="other")], progress=told.append
    )
    assert [(e.checkpoint, e.task) for e in evaluations] == [
        ("b", "mine"),
        ("b", "other"),
        ("a", "mine"),
        ("a", "other"),
    ]
    assert told == evaluations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": lambda: [(INPUTS, None)]}, "batch 0 of the train split has no labels"),
        ({"batches": list}, "its train split is empty"),
        ({"batches": lambda: [INPUTS]}, "is Tensor, not a pair"),
        ({"batches": lambda: [(torch.zeros(2, 7), LABELS[:2])]}, "RuntimeError: mat1 and mat2"),
        ({"batches": lambda: [(INPUTS, LABELS + 7)]}, "IndexError"),
    ],
)
def test_what_a_task_gets_wrong_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message) as caught:
        evaluate({"runs/a": IDENTITY}, [task(**changes)])
    assert str(caught.value).startswith('cannot evaluate "runs/a" on task "mine": ')
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_runs() -> None:
    def never() -> Any:
        raise AssertionError("ran")

    with pytest.raises(TaskError, match="another shape"):
        evaluate({"a": {"weight": torch.eye(4)}}, [task(batches=never)])


def test_two_tasks_of_one_name_are_refused() -> None:
    with pytest.raises(TaskError, match='two tasks are called "mine"'):
        evaluate({"a": IDENTITY}, [task(), task()])
