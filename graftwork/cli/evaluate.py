"""`graftwork evaluate CHECKPOINT… --task SPEC…`."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from graftwork.cli.output import print_json, print_table
from graftwork.cli.problems import readable_errors, tell, usage_error

if TYPE_CHECKING:
    from graftwork.merge.checkpoint import Checkpoint
    from graftwork.merge.evaluation import Evaluation

Split = Literal["test", "validation", "train"]

_QUIET_SECONDS = 2.0


def evaluate(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(help="Checkpoints of the tasks' model: files, folders, ORG/NAME, or any of them+ADAPTER."),
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task", "-t", metavar="SPEC", help="file.py:name, package.module:name or hf:KIND,data=…; repeatable."
        ),
    ] = None,
    split: Annotated[
        Split, typer.Option("--split", help="Data to judge on; the next one if a task lacks it.")
    ] = "test",
    device: Annotated[str, typer.Option("--device", help="Where models run, as torch names it.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option("--threads", "-j", min=1, help="CPU threads of torch. [default: torch's own]")
    ] = None,
    picture: Annotated[Path | None, typer.Option("--picture", help="Draw the accuracies into this PNG.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .pt, .pth, .bin and .ckpt files, as data only.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure loss and accuracy of checkpoints on tasks."""
    if not task:
        raise usage_error("--task is missing: file.py:name or package.module:name")
    with readable_errors(), contextlib.ExitStack() as stack:
        from graftwork.merge.evaluation import evaluate as run_evaluate
        from graftwork.merge.reference import open_model
        from graftwork.merge.task import load_task

        opened: dict[str, Checkpoint] = {
            str(path): stack.enter_context(open_model(path, allow_pickle=allow_pickle)) for path in checkpoints
        }
        tasks = [load_task(spec, checkpoint=opened[str(checkpoints[0])].path) for spec in task]
        _prepare_torch(device, threads)
        started = time.monotonic()

        def show(evaluation: Evaluation) -> None:
            if not quiet and time.monotonic() - started > _QUIET_SECONDS:
                tell(
                    f"{evaluation.checkpoint} on {evaluation.task}: {_accuracy(evaluation)}, loss {evaluation.loss:.4g}"
                )

        evaluations = run_evaluate(opened, tasks, split=split, device=device, progress=show)
        for name in dict.fromkeys(item.task for item in evaluations if item.split != split):
            used = next(item.split for item in evaluations if item.task == name)
            tell(f"warning: task {name} has no {split} split; its {used} split was used")
        if picture is not None:
            _draw(evaluations, picture)
        if as_json:
            print_json({"split": split, "evaluations": [item.record() for item in evaluations]})
            return
        print_table(
            [
                (item.checkpoint, item.task, f"{item.loss:.6g}", _accuracy(item), item.examples, f"{item.seconds:.2f}")
                for item in evaluations
            ],
            head=("checkpoint", "task", "loss", "accuracy", "examples", "seconds"),
            right=(2, 3, 4, 5),
        )


def _prepare_torch(device: str, threads: int | None) -> None:
    import torch

    from graftwork.merge.errors import DependencyError

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise DependencyError(f'cannot compute on "{device}": {reason}') from None
    if threads is not None:
        torch.set_num_threads(threads)


def _accuracy(evaluation: Evaluation) -> str:
    return "-" if evaluation.accuracy is None else f"{100 * evaluation.accuracy:.2f} %"


def _draw(evaluations: Sequence[Evaluation], path: Path) -> None:
    from graftwork.merge.errors import TaskError
    from graftwork.merge.pictures import bar_picture

    rows: dict[str, dict[str, float]] = {}
    for item in evaluations:
        if item.accuracy is not None and math.isfinite(item.accuracy):
            rows.setdefault(item.checkpoint, {})[item.task] = item.accuracy
    if not rows:
        raise TaskError("cannot draw a picture: no task has an accuracy, because labels are not classes")
    splits = ", ".join(dict.fromkeys(item.split for item in evaluations))
    named: Mapping[str, dict[str, float]] = {Path(name).name or name: values for name, values in rows.items()}
    bar_picture(named if len(named) == len(rows) else rows, path, title="Accuracy", subtitle=f"On the {splits} split")
    tell(f"picture: {path}")
