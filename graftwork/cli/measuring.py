"""What `graftwork fisher` and `graftwork gram` have in common: options, the run, and what is printed of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from graftwork.cli.output import print_json, print_table
from graftwork.cli.problems import readable_errors, tell, usage_error
from graftwork.cli.progress import ByteProgress

if TYPE_CHECKING:
    from graftwork.merge.checkpoint import Checkpoint
    from graftwork.merge.statistics import Measured
    from graftwork.merge.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """The options that both commands have. A field is an option: its annotation and its default."""

    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of the task's model.")]
    task: Annotated[
        str | None,
        typer.Option("--task", "-t", metavar="SPEC", help="file.py:name, package.module:name or hf:KIND,data=…."),
    ] = None
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write, NAME.safetensors.")] = None
    examples: Annotated[
        int | None,
        typer.Option("--examples", "-n", help="Examples, drawn at random. [default: 256, or all if there are fewer]"),
    ] = None
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the draw and of everything random.")] = 0
    compute_dtype: Annotated[
        Literal["module", "float32", "float64"], typer.Option("--compute-dtype", help="dtype in which the model runs.")
    ] = "module"
    device: Annotated[str, typer.Option("--device", help="Where the model runs, as torch names it.")] = "cpu"
    threads: Annotated[
        int | None, typer.Option("--threads", "-j", min=1, help="CPU threads of torch. [default: torch's own]")
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .pt, .pth, .bin and .ckpt files, as data only.")
    ] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False

    def run(self, measure: Callable[..., Measured], **settings: Any) -> Measured:
        """Open what a measurement needs, run it with progress, and return what it wrote."""
        if not self.task:
            raise usage_error("--task is missing: file.py:name or package.module:name")
        if self.out is None:
            raise usage_error("--out is missing: the file to write, NAME.safetensors")
        with readable_errors():
            from graftwork.cli.evaluate import _prepare_torch
            from graftwork.merge.checkpoint import Checkpoint
            from graftwork.merge.task import load_task

            with Checkpoint.open(self.checkpoint, allow_pickle=self.allow_pickle) as source:
                task = load_task(self.task, checkpoint=self.checkpoint)
                _prepare_torch(self.device, self.threads)
                with ExampleProgress(0, shown=not self.quiet, what="measuring") as progress:
                    return self._measured(measure, source, task, progress, settings)
        raise AssertionError("unreachable")

    def _measured(
        self,
        measure: Callable[..., Measured],
        source: Checkpoint,
        task: Task,
        progress: ExampleProgress,
        settings: dict[str, Any],
    ) -> Measured:
        return measure(
            source, task, self.out, examples=self.examples, seed=self.seed, compute_dtype=self.compute_dtype,
            device=self.device, force=self.force, progress=progress.at, **settings,
        )  # fmt: skip


def with_common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that takes the common options, and hands them over as its first argument, a `Common`."""
    [_, *own] = inspect.signature(command, eval_str=True).parameters.values()
    common = inspect.signature(Common, eval_str=True).parameters.values()
    ordered = [*list(common)[:_FIRST], *own, *list(common)[_FIRST:]]
    names = {field.name for field in fields(Common)}

    def run(**given: Any) -> None:
        shared = Common(**{name: given.pop(name) for name in names})
        command(shared, **given)

    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in ordered]
    run.__signature__ = inspect.Signature(keyword)  # type: ignore[attr-defined]
    hints = {**get_type_hints(Common, include_extras=True), **get_type_hints(command, include_extras=True)}
    run.__annotations__ = {parameter.name: hints[parameter.name] for parameter in keyword}
    return run


_FIRST = 5
"""Common options that `--help` has before those of the command itself."""


class ExampleProgress(ByteProgress):
    """Counts examples instead of bytes."""

    def line(self) -> str:
        """Return the state as text: share, examples."""
        return f"{int(100 * self.done / self.total) if self.total else 0} %, {self.done} of {self.total} examples"

    def at(self, done: int, total: int) -> None:
        """Take note of how many of how many are done."""
        self.done, self.total = done, total


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
