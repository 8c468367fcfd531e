"""`graftwork masks RECIPE --task SPEC… -o FILE`."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from graftwork.cli.output import aligned, duration, plural, print_json
from graftwork.cli.problems import readable_errors, tell, usage_error
from graftwork.cli.progress import ByteProgress

if TYPE_CHECKING:
    from graftwork.merge.checkpoint import Checkpoint
    from graftwork.merge.recipe import Recipe
    from graftwork.merge.subspace import LearnedMerge, Progress

_Parametrisation = Literal["task_wise", "layer_wise", "mask", "mask+layer_wise"]
_PARAMETRISATIONS = {
    "adamerging": "layer_wise",
    "concrete_task_arithmetic": "mask",
    "concrete_adamerging": "mask+layer_wise",
}


def masks(
    recipe: Annotated[
        Path, typer.Argument(help="Recipe with base_model and models; its method decides what is learned.")
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task", "-t", metavar="SPEC", help="file.py:name of each model's task, in order. [default: the recipe's]"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="FILE.safetensors. [default: the recipe's `mask`]")
    ] = None,
    parametrisation: Annotated[
        _Parametrisation | None,
        typer.Option(help="What is learned. [default: what the recipe's method uses, else mask+layer_wise]"),
    ] = None,
    loss: Annotated[
        Literal["kl", "im", "entropy"], typer.Option(help="kl: stay close to the experts. entropy: as published.")
    ] = "kl",
    steps: Annotated[int, typer.Option(min=1, help="Steps, each on a batch of every task.")] = 1000,
    learning_rate: Annotated[
        float, typer.Option(help="Step size of the mask; 0.1 where a binary mask is wanted.")
    ] = 3e-2,
    coefficient_rate: Annotated[float, typer.Option(help="Step size of the coefficients.")] = 5e-3,
    batch: Annotated[int, typer.Option(min=1, help="Inputs per task and step.")] = 16,
    examples: Annotated[int | None, typer.Option(min=1, help="Inputs per task, at random. [default: all]")] = None,
    coefficient: Annotated[
        float | None, typer.Option(help="Coefficients at the start. [default: 0.3, 1/K above eight models]")
    ] = None,
    mask_kind: Annotated[
        Literal["expected", "threshold", "sample", "bernoulli"], typer.Option(help="How merges use the mask.")
    ] = "expected",
    temperature: Annotated[float, typer.Option(help="Of the Concrete distribution.")] = 0.5,
    trim: Annotated[float | None, typer.Option(help="AdaMerging++: share of each task vector that is kept.")] = None,
    clamp: Annotated[bool, typer.Option("--clamp", help="Keep coefficients in [0, 1], as published.")] = False,
    hard: Annotated[bool, typer.Option("--hard", help="Learn with binary masks (straight-through).")] = False,
    schedule: Annotated[Literal["joint", "bilevel"], typer.Option(help="bilevel: as published.")] = "joint",
    seed: Annotated[int, typer.Option(min=0, help="Of batches and noise.")] = 0,
    threads: Annotated[
        int | None, typer.Option("--threads", "-j", min=1, help="CPU threads of torch. [default: torch's own]")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="A collapse onto one class is an error.")] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace a file that exists.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Do not go on with an unfinished run.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .pt, .pth, .bin and .ckpt files, as data only.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Learn on unlabelled inputs how to merge: a mask over the task vectors, coefficients per layer, or both.

    A run that was stopped goes on when the same command is given again.
    """
    with readable_errors(), contextlib.ExitStack() as stack:
        from graftwork.merge.errors import OutputError, RecipeError
        from graftwork.merge.hub import Hub, localised
        from graftwork.merge.recipe import load_recipe
        from graftwork.merge.subspace import Learning, learn_merge
        from graftwork.merge.task import load_task
        from graftwork.merge.writer import check_output

        read = load_recipe(recipe).recipes
        if len(read) > 1:
            raise RecipeError(f"{recipe.name}: holds {len(read)} recipes; give the last one a file of its own")
        [only] = read
        target = out or only.shared.get("mask")
        if target is None:
            raise usage_error("--out is missing: FILE.safetensors")
        if target.suffix != ".safetensors":
            raise OutputError(f"cannot write {target}: the name of a mask file ends in .safetensors")
        settings = Learning(
            parametrisation=parametrisation or _PARAMETRISATIONS.get(only.method, "mask+layer_wise"),  # type: ignore[arg-type]
            loss=loss, steps=steps, learning_rate=learning_rate, coefficient_rate=coefficient_rate, batch=batch,
            seed=seed, coefficient=coefficient, temperature=temperature, clamp=clamp, hard=hard, schedule=schedule,
            trim=trim, mask_kind=mask_kind, examples=examples, exclude=only.exclude, strict=strict,
        )  # fmt: skip
        only = localised(only, Hub(allow_pickle=allow_pickle, tell=tell))
        base, experts = _models(only, stack, allow_pickle)
        specs = list(task or []) or [source.task for source in only.slices[0].models if source.task]
        if len(specs) != len(experts):
            raise RecipeError(
                f"{recipe.name}: names {plural(len(experts), 'model')}, and there are {plural(len(specs), 'task')}; "
                "give one --task for each model, in their order"
            )
        check_output(target, force=force, inputs=[model.path for model in (base, *experts)])
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        state = target.with_name(f"{target.stem}.partial.safetensors")
        if restart:
            state.unlink(missing_ok=True)
        tasks = [load_task(spec, checkpoint=own.path) for spec, own in zip(specs, experts, strict=True)]
        started = time.monotonic()
        with _Steps(settings.total_steps, shown=not quiet, what="learning") as bar:
            learned = learn_merge(base, experts, tasks, settings=settings, state=state, progress=bar.see)
        for warning in learned.report.warnings:
            if warning not in bar.told:
                tell(f"warning: {warning}")
        digest = learned.save(target, force=force)
        state.unlink(missing_ok=True)
        _report(learned, target, digest, time.monotonic() - started, as_json=as_json)


def _models(recipe: Recipe, stack: contextlib.ExitStack, allow_pickle: bool) -> tuple[Checkpoint, list[Checkpoint]]:
    """Open the recipe's base and models."""
    from graftwork.merge.adapter import open_adapted
    from graftwork.merge.checkpoint import Checkpoint
    from graftwork.merge.errors import CheckpointError, RecipeError

    group = recipe.slices[0]
    if recipe.sliced:
        raise RecipeError("slices: masks are learned for whole models; write `models:`")
    if group.base is None:
        raise RecipeError("base_model: is missing; masks lie over the differences from it")
    opened, problems = [], []
    for reference, key in [(group.base, "base_model"), *((item.model, item.key_path) for item in group.models)]:
        if reference.path is None:
            problems.append(f"{key}: {reference.text} is no local checkpoint; merge or fetch it first")
            continue
        try:
            what = f"the input {key}"
            checkpoint = Checkpoint.open(reference.path, allow_pickle=allow_pickle, what=what)
            if reference.adapter is not None and reference.adapter.path is not None:
                checkpoint = open_adapted(checkpoint, reference.adapter.path, what=what, allow_pickle=allow_pickle)
            opened.append(stack.enter_context(checkpoint))
        except CheckpointError as error:
            problems.extend(error.problems)
    if problems:
        raise CheckpointError(*problems)
    return opened[0], opened[1:]


class _Steps(ByteProgress):
    """Shows how many steps are done."""

    _loss = 0.0
    told: tuple[str, ...] = ()

    def see(self, progress: Progress) -> None:
        """Take note of a step."""
        if self.done == 0 and progress.step > 1:
            if self.shown:
                tell(f"resuming: {progress.step - 1} of {progress.total} steps are done")
            self.skip(progress.step - 1)
        self.advance(1)
        self._loss = progress.loss
        if progress.warning:
            tell(f"warning: {progress.warning}")
            self.told += (progress.warning,)

    def line(self) -> str:
        """Return the state as text."""
        done = self.done - self._first
        seconds = time.monotonic() - self._start
        left = f", {duration(seconds * (self.total - self.done) / done)} left" if done else ""
        return f"step {self.done} of {self.total}, loss {self._loss:.4g}{left}"


def _report(learned: LearnedMerge, target: Path, digest: str, seconds: float, *, as_json: bool) -> None:
    report, settings = learned.report, learned.settings
    below, above = learned.shares()
    coefficients = learned.coefficients
    if as_json:
        record: dict[str, Any] = {
            "out": str(target),
            "method": learned.method,
            "parametrisation": settings.parametrisation,
            "loss": settings.loss,
            "steps": settings.total_steps,
            "resumed": report.resumed,
            "first_loss": report.first_loss,
            "last_loss": report.last_loss,
            "predicted": report.predicted,
            "mask": {"below": below, "above": above, "density": learned.density()} if learned.logits else None,
            "coefficients": {"mean": coefficients.mean(1).tolist(), "smallest": coefficients.min(1).tolist(),
                             "largest": coefficients.max(1).tolist()},
            "inputs": learned.inputs,
            "transductive": learned.transductive,
            "together": report.together,
            "digest": digest,
            "seconds": round(seconds, 3),
            "warnings": report.warnings,
        }  # fmt: skip
        print_json(record)
        return
    rows = [["output", str(target)], ["use", f"merge_method: {learned.method}, mask: {target}"]]
    for number, (name, inputs) in enumerate(zip(report.last_loss, learned.inputs, strict=True)):
        values = coefficients[number]
        spread = f"{values[0]:.3f}" if values.size == 1 else f"{values.min():.3f} to {values.max():.3f}"
        before, after = report.first_loss[name], report.last_loss[name]
        rows.append(
            [
                name,
                f"loss {before:.4f} to {after:.4f}, coefficients {spread}, {inputs['inputs']} {inputs['split']} inputs",
            ]
        )
    if learned.logits:
        rows.append(["mask", f"{100 * below:.0f} % below 0.1, {100 * above:.0f} % above 0.9, the rest undecided"])
    if learned.transductive:
        rows.append(["note", "test inputs are among those it was learned on: say so where you report test figures"])
    resumed = f", {report.resumed} of them by an earlier run" if report.resumed else ""
    rows += [["steps", f"{settings.total_steps}{resumed}"], ["digest", digest], ["time", duration(seconds)]]
    for line in aligned(rows):
        print(line)
