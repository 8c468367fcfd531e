"""Carries out recipes: plan → engine → writer."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from graftwork.merge import lineage
from graftwork.merge.card import model_card
from graftwork.merge.checkpoint import content_digest
from graftwork.merge.engine import FUSE_ABOVE, Engine, Stopped
from graftwork.merge.errors import GraftworkError, RecipeError
from graftwork.merge.plan import Options, Plan, canonical_recipe, donor_files, make_plan
from graftwork.merge.recipe import RecipeFile, load_recipe
from graftwork.merge.writer import CheckpointWriter, check_output

RECIPE_NAME = "graftwork_recipe.yml"


class Interrupted(Exception):  # noqa: N818 - nothing has gone wrong
    """The user stopped the run; what is finished stays for a later run to go on with."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a merge is carried out, as far as it does not decide the result.

    Args:
        threads: CPU threads; all cores if None.
        device: "cpu", "cuda", "cuda:N" or "auto".
        max_shard_bytes: Largest shard of the output.
        force: Replace an output that exists.
        restart: Do not go on with an unfinished output.
        write_card: Write a model card.
        intermediate: Where the outputs of named documents are kept; None to delete them.
        reuse: Take over intermediate outputs that are already there.
    """

    threads: int | None = None
    device: str = "cpu"
    max_shard_bytes: int = 5_000_000_000
    force: bool = False
    restart: bool = False
    write_card: bool = True
    intermediate: Path | None = None
    reuse: bool = True


@dataclass(slots=True)
class MergeResult:
    """What a merge did.

    Args:
        out: Where the output is.
        plan: What was planned.
        digest: Content digest of the output.
        seconds: Wall time.
        resumed: Number of tensors that an earlier, interrupted run had finished.
        notes: Lines for the report: what methods remarked on single tensors.
    """

    out: Path
    plan: Plan
    digest: str
    seconds: float
    resumed: int
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Start:
    """What is about to be done.

    Args:
        plan: The plan.
        size: Bytes that will pass, reading and writing.
        size_done: Those of tensors that an earlier, interrupted run has finished.
        tensors_done: Number of these tensors.
        share: Returns the share of the output that is complete. Methods that read more than once pass more bytes than
            `size`, so bytes alone would promise too much.
    """

    plan: Plan
    size: int
    size_done: int
    tensors_done: int
    share: Callable[[], float]


Observer = Callable[[Start], Callable[[int], None]]
"""Called before the work on a plan begins; returns what counts bytes."""


def merge(
    recipe: Path | str | RecipeFile,
    out: Path | str,
    *,
    force: bool = False,
    threads: int | None = None,
    options: Options | None = None,
    settings: Settings | None = None,
    progress: Observer | None = None,
) -> MergeResult:
    """Merge checkpoints as a recipe says and write the output.

    Args:
        recipe: The recipe, or the file that holds it.
        out: A folder, or a file whose name ends in `.safetensors`.
        force: Replace an output that exists.
        threads: CPU threads; all cores if None.
        options: What decides the result besides the recipe.
        settings: What does not; `force` and `threads` above are taken into it.
        progress: Tells a progress bar how far the work is.

    Raises:
        GraftworkError: Something that the user can put right; nothing is left behind.
        Interrupted: Ctrl-C; the unfinished output is kept and can be resumed.
    """
    file = recipe if isinstance(recipe, RecipeFile) else load_recipe(recipe)
    chosen = settings or Settings()
    chosen = replace(chosen, force=force or chosen.force, threads=threads or chosen.threads)
    target = Path(out)
    every = [reference.path for item in file.recipes for reference in item.inputs if reference.path is not None]
    check_output(target, force=chosen.force, inputs=every)
    named = {item.name: item for item in file.recipes[:-1] if item.name}
    all_named = len(file.recipes) > 1 and file.recipes[-1].name is not None
    root = target if all_named else chosen.intermediate or target.with_name(target.name + ".steps")
    made: dict[str, Path] = {}
    result: MergeResult | None = None
    for item in file.recipes:
        last = item is file.recipes[-1]
        place = target if last and not all_named else root / str(item.name)
        plan = make_plan(item, options, steps=made)
        try:
            if place != target and chosen.reuse and _is_done(plan, place):
                made[str(item.name)] = place
                continue
            result = _carry_out(plan, place, file, chosen, progress, force=chosen.force or place != target)
        finally:
            plan.close()
        if item.name:
            made[item.name] = place
    if named and chosen.intermediate is None and not all_named:
        shutil.rmtree(root, ignore_errors=True)
    if result is None:
        raise RecipeError(f"cannot merge: every output is already in {root}; recompute them with --no-lazy")
    return result


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_done(plan: Plan, place: Path) -> bool:
    """Return whether an intermediate output was made by this very plan."""
    from graftwork.merge.checkpoint import Checkpoint

    try:
        with Checkpoint.open(place) as found:
            return found.metadata.get(lineage.PREFIX + "plan") == plan.digest()
    except GraftworkError:
        return False


def _carry_out(
    plan: Plan, out: Path, file: RecipeFile, settings: Settings, progress: Observer | None, *, force: bool
) -> MergeResult:
    start = time.monotonic()
    device = _device(settings.device)
    threads = settings.threads or usable_cores()
    digest = plan.digest()
    writer = CheckpointWriter(
        out,
        plan.outputs,
        _metadata(plan, digest, {}, lineage.EMPTY_DIGEST),
        plan_digest=digest,
        max_shard_bytes=settings.max_shard_bytes,
        force=force,
        restart=settings.restart,
    )
    try:
        steps = [step for step in plan.steps if step.name not in writer.resumed]
        count = progress(_start(plan, writer)) if progress else (lambda size: None)
        engine = _engine(plan, writer, threads, device, count)
        engine.run(steps)
        inputs = {**writer.input_digests, **engine.digest_only(plan.unread)}
        output = content_digest(
            (tensor.name, tensor.dtype, tensor.shape, writer.digests[tensor.name]) for tensor in plan.outputs
        )
        metadata = _metadata(plan, digest, inputs, output)
        writer.publish(metadata, _files(plan, out, file, metadata, settings) if not writer.single_file else {})
    except (KeyboardInterrupt, Stopped):
        writer.close()
        raise Interrupted(
            f"stopped; {len(writer.digests)} of {len(plan.steps)} tensors are finished in {writer.partial}: "
            "run the same command again to go on"
        ) from None
    except GraftworkError:
        writer.abandon()
        raise
    except BaseException:
        writer.close()
        raise
    notes = [f"{step.name}: {note}" for step in plan.merged for note in step.notes]
    return MergeResult(out, plan, output, time.monotonic() - start, len(writer.resumed), notes)


def _start(plan: Plan, writer: CheckpointWriter) -> Start:
    sizes = {tensor.name: tensor.size for tensor in plan.outputs}
    total = sum(sizes.values())
    finished = [step for step in plan.steps if step.name in writer.resumed]
    done = sum(item.entry.size for step in finished for item in step.inputs) + sum(sizes[s.name] for s in finished)

    def share() -> float:
        return sum(sizes[name] for name in list(writer.digests)) / total if total else 1.0

    return Start(plan, plan.bytes_read + plan.bytes_written, done, len(finished), share)


def _device(name: str) -> str:
    if name == "cpu":
        return name
    from graftwork.merge.device import chosen_device

    return chosen_device(name)


def _engine(plan: Plan, writer: CheckpointWriter, threads: int, device: str, progress: Callable[[int], None]) -> Engine:
    nonfinite = plan.options.allow_nonfinite
    if device == "cpu":
        return Engine(
            plan.checkpoints, writer, plan.labels, threads=threads, fuse=plan.elements >= FUSE_ABOVE,
            allow_nonfinite=nonfinite, progress=progress,
        )  # fmt: skip
    from graftwork.merge.device import DeviceEngine

    return DeviceEngine(
        plan.checkpoints,
        writer,
        plan.labels,
        device=device,
        threads=threads,
        allow_nonfinite=nonfinite,
        progress=progress,
    )


def _metadata(plan: Plan, digest: str, inputs: Mapping[tuple[int, str], bytes], output: str) -> dict[str, str]:
    parents = []
    for number, (label, checkpoint) in enumerate(zip(plan.labels, plan.checkpoints, strict=True)):
        whole = lineage.EMPTY_DIGEST
        if inputs:
            whole = content_digest(
                (entry.name, entry.dtype, entry.shape, inputs[number, entry.name])
                for entry in checkpoint.tensors.values()
            )
        parents.append(lineage.parent_record(label, whole, checkpoint.metadata))
    recipe = canonical_recipe(plan.recipe, plan.labels_by_text())
    return lineage.metadata(
        "model", method=plan.recipe.method, recipe=recipe, parents=parents, digest=output, plan=digest
    )


def _files(
    plan: Plan, out: Path, file: RecipeFile, metadata: Mapping[str, str], settings: Settings
) -> dict[str, bytes | Path]:
    files: dict[str, bytes | Path] = dict(donor_files(plan))
    if plan.config is not None:
        files["config.json"] = plan.config.encode()
    files[RECIPE_NAME] = file.text.encode()
    if settings.write_card:
        files["README.md"] = model_card(plan, out.name, file.text, metadata).encode()
    return files
