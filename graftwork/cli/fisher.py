"""`graftwork fisher CHECKPOINT --task SPEC -o OUT`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from graftwork.cli.output import print_json, print_table
from graftwork.cli.problems import readable_errors, tell, usage_error
from graftwork.cli.progress import ByteProgress

if TYPE_CHECKING:
    from graftwork.merge.checkpoint import Checkpoint
    from graftwork.merge.statistics import Measured
    from graftwork.merge.task import Task

CheckpointPath = Annotated[Path, typer.Argument(help="Checkpoint of the task's model.")]
Spec = Annotated[str | None, typer.Option("--task", "-t", metavar="SPEC", help="file.py:name or package.module:name.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="File to write, NAME.safetensors.")]
Examples = Annotated[
    int | None,
    typer.Option("--examples", "-n", help="Examples, drawn at random. [default: 256, or all if there are fewer]"),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the draw and of everything random.")]
Device = Annotated[str, typer.Option("--device", help="Where the model runs, as torch names it.")]
Threads = Annotated[
    int | None, typer.Option("--threads", "-j", min=1, help="CPU threads of torch. [default: torch's own]")
]
ComputeDtype = Annotated[
    Literal["module", "float32", "float64"], typer.Option("--compute-dtype", help="dtype in which the model runs.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read .pt, .pth, .bin and .ckpt files, as data only.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class ExampleProgress(ByteProgress):
    """Counts examples instead of bytes."""

    def line(self) -> str:
        """Return the state as text: share, examples."""
        return f"{int(100 * self.done / self.total) if self.total else 0} %, {self.done} of {self.total} examples"

    def at(self, done: int, total: int) -> None:
        """Take note of how many of how many are done."""
        self.done, self.total = done, total


def fisher(
    checkpoint: CheckpointPath,
    task: Spec = None,
    out: Out = None,
    examples: Examples = None,
    estimator: Annotated[
        Literal["auto", "exact", "signed", "signed_batch", "sampled", "empirical"],
        typer.Option("--estimator", help="How it is estimated; auto is exact for up to 5 classes, else signed."),
    ] = "auto",
    seed: Seed = 0,
    outputs: Annotated[
        Literal["classes", "regression", "multi_label"], typer.Option("--outputs", help="What the model's outputs are.")
    ] = "classes",
    micro_batch: Annotated[
        int | None, typer.Option("--micro-batch", min=1, help="Examples at once. [default: what --memory allows]")
    ] = None,
    memory: Annotated[int, typer.Option("--memory", min=1, help="What a micro-batch may take, in MB.")] = 256,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option("--dtype", help="How values are stored.")
    ] = "float32",
    compute_dtype: ComputeDtype = "module",
    device: Device = "cpu",
    threads: Threads = None,
    force: Force = False,
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure how much a model's predictions depend on each parameter, for `merge_method: fisher`."""

    def measure(source: Checkpoint, chosen: Task, target: Path, progress: Callable[[int, int], None]) -> Measured:
        from graftwork.merge.statistics import measure_fisher

        return measure_fisher(
            source,
            chosen,
            target,
            examples=examples,
            estimator=estimator,
            seed=seed,
            outputs=outputs,
            micro_batch=micro_batch,
            memory_bytes=memory * 1_000_000,
            compute_dtype=compute_dtype,
            device=device,
            dtype=dtype,
            force=force,
            progress=progress,
        )

    measured = run_measurement(measure, checkpoint, task, out, device, threads, allow_pickle, quiet)
    show_measured(measured, ("task", "estimator", "examples", "columns", "rows", "classes", "rms"), as_json)


def run_measurement(
    measure: Callable[..., Measured],
    checkpoint: Path,
    task: str | None,
    out: Path | None,
    device: str,
    threads: int | None,
    allow_pickle: bool,
    quiet: bool,
) -> Measured:
    """Open what a measurement needs, run it with progress, and return what it wrote."""
    if not task:
        raise usage_error("--task is missing: file.py:name or package.module:name")
    if out is None:
        raise usage_error("--out is missing: the file to write, NAME.safetensors")
    with readable_errors():
        from graftwork.cli.evaluate import _prepare_torch
        from graftwork.merge.reference import open_model
        from graftwork.merge.task import load_task

        with open_model(checkpoint, allow_pickle=allow_pickle) as source:
            chosen = load_task(task, checkpoint=source.path)
            _prepare_torch(device, threads)
            with ExampleProgress(0, shown=not quiet, what="measuring") as progress:
                return measure(source, chosen, out, progress.at)
    raise AssertionError("unreachable")


def show_measured(measured: Measured, shown: tuple[str, ...], as_json: bool) -> None:
    """Print what was written; say on stderr which tensors are left out, and why."""
    facts = dict(measured.facts)
    reasons: dict[str, list[str]] = {}
    for name, reason in facts["skipped"].items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        if reason != "buffer":
            tell(f"warning: {', '.join(names[:6])}{' …' if len(names) > 6 else ''}: {_REASONS[reason]}")
    if as_json:
        print_json({"path": str(measured.path), "digest": measured.digest, **facts})
        return
    rows: list[tuple[str, Any]] = [("file", measured.path)]
    rows += [(name, f"{facts[name]:.6g}" if isinstance(facts[name], float) else facts[name]) for name in shown]
    print_table([*rows, ("digest", measured.digest)])


_REASONS = {
    "unused": "the outputs do not depend on it; its information is zero",
    "tied": "used by several layers, so it has no Gram matrix; a merge takes the mean",
    "not called": "the layer was not called, so it has no Gram matrix; a merge takes the mean",
    "reparametrised": "its weight is computed from others, so it has no Gram matrix; a merge takes the mean",
    "not in the checkpoint": "the checkpoint has no such tensor, so there is no Gram matrix",
}
