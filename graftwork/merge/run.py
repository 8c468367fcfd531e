"""Carries out recipes: plan → engine → writer."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import xxhash

from graftwork.merge import dtypes, lineage, lines
from graftwork.merge.card import model_card
from graftwork.merge.checkpoint import BLOCK, TASK_MASKS_NAME, Checkpoint, content_digest, tensor_digest
from graftwork.merge.engine import FUSE_ABOVE, Engine, Input, Sink, Stopped
from graftwork.merge.errors import CheckpointError, DependencyError, GraftworkError, OutputError
from graftwork.merge.hub import localised
from graftwork.merge.plan import Options, Plan, canonical_recipe, donor_files, make_plan
from graftwork.merge.preparation import prepare
from graftwork.merge.recipe import ModelReference, Recipe, RecipeFile, Slice, Source, load_recipe
from graftwork.merge.task_masks import place_of, write_task_masks
from graftwork.merge.writer import CheckpointWriter, check_output

if TYPE_CHECKING:
    from graftwork.merge.evaluation import Evaluation

RECIPE_NAME = "graftwork_recipe.yml"

_STEPS_MARK = ".graftwork-steps"
"""Marks a folder of intermediate outputs as made by a merge, which will remove it."""


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
        prepared: Where what a recipe needs first is kept: aligned models, statistics, masks; None for a folder beside
            the output.
    """

    threads: int | None = None
    device: str = "cpu"
    max_shard_bytes: int = 5_000_000_000
    force: bool = False
    restart: bool = False
    write_card: bool = True
    intermediate: Path | None = None
    reuse: bool = True
    prepared: Path | None = None

    def prepared_folder(self, target: Path, name: str | None = None) -> Path:
        """Return where what a document needs first is kept."""
        root = self.prepared or target.with_name(target.name + ".made")
        return root / name if name else root


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
        evaluations: How the output does on the tasks that the recipe names under `evaluate`.
    """

    out: Path
    plan: Plan
    digest: str
    seconds: float
    resumed: int
    notes: list[str] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)


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
    tell: Callable[[str], None] = lambda line: None,
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
        tell: Called with a line for people when something is made that the recipe needs first.

    Raises:
        GraftworkError: Something that the user can put right. Nothing is left behind, unless the same merge may succeed
            later: then what is finished stays to go on with.
        Interrupted: Ctrl-C; the unfinished output is kept and can be resumed.
    """
    file = recipe if isinstance(recipe, RecipeFile) else load_recipe(recipe)
    chosen = settings or Settings()
    chosen = replace(chosen, force=force or chosen.force, threads=threads or chosen.threads)
    target = Path(out)
    places = check_places(file, target, chosen)
    hub = (options or Options()).hub(tell)
    file = replace(file, recipes=tuple(localised(item, hub) for item in file.recipes))
    temporary = places[0].parent if places[-1] == target and len(places) > 1 and chosen.intermediate is None else None
    made: dict[str, Path] = {}
    with _steps_folder(temporary) as done:
        for item, place in zip(file.recipes, places, strict=True):
            last = place is places[-1]
            folder = chosen.prepared_folder(target, item.name if len(places) > 1 else None)
            ready = prepare(item, folder, options=options, steps=made, device=chosen.device, tell=tell)
            plan = make_plan(ready, options, steps=made)
            if ready.renormalize is not None:
                plan = _renormalized(plan, folder, file, chosen, progress, tell)
            try:
                if last:
                    result = _carry_out(plan, place, file, chosen, progress, force=chosen.force)
                    if _is_marked(temporary):
                        done.update(made.values())
                elif not (chosen.reuse and _is_done(plan, place)):
                    _carry_out(plan, place, file, chosen, progress, force=chosen.force or _is_own(place))
                    done.add(place)
            finally:
                plan.close()
            if last:
                result.evaluations = _evaluated(item, place, chosen, tell)
                return result
            made[str(item.name)] = place
    raise AssertionError("a recipe has at least one document")


def _renormalized(
    plan: Plan,
    folder: Path,
    file: RecipeFile,
    settings: Settings,
    progress: Observer | None,
    tell: Callable[[str], None],
) -> Plan:
    """Carry out a plan into a folder, set the result's activations right, and return the plan that writes that."""
    recipe = plan.recipe
    assert recipe.renormalize is not None
    merged, corrected = folder / "merged.safetensors", folder / "renormalized.safetensors"
    try:
        if not _is_done(plan, merged):
            _carry_out(plan, merged, file, settings, progress, force=True)
        method = recipe.renormalize.get("method", "repair")
        task = recipe.renormalize.get("task") or next(item.task for item in recipe.slices[0].sources if item.task)
        tell(f"setting activations right ({method}) on {task}")
        _renormalize(plan, merged, corrected, method, task, settings.device)
        donor = plan.checkpoints[plan.donor].path
    finally:
        plan.close()
    return _replacing_plan(plan, merged, corrected, donor, f"{recipe.method}, {method}")


def _renormalize(plan: Plan, merged: Path, out: Path, method: str, task: str, device: str) -> None:
    """Write those tensors of a merged model that change when its activations are set right."""
    import torch

    from graftwork.merge.alignment.renormalize import renormalize
    from graftwork.merge.artifact import parent_of, save_artifact
    from graftwork.merge.checkpoint import load_torch
    from graftwork.merge.task import load_task

    count = len(plan.recipe.slices[0].models)
    places = [plan.recipe.inputs.index(source.model) for source in plan.recipe.slices[0].models]
    weights = [1.0] * count
    for step in plan.merged:
        found = getattr(step.program, "keywords", {}).get("weight")
        if isinstance(found, tuple) and len(found) == count and all(value >= 0 for value in found) and sum(found):
            weights = [float(value) for value in found]
            break
    with Checkpoint.open(merged) as checkpoint:
        before = load_torch(checkpoint)
        parents = [plan.checkpoints[place] for place in places]
        own = load_task(task, checkpoint=plan.checkpoints[plan.donor].path)
        after = renormalize(own, before, parents, weights, method=cast(Any, method), device=device)
        changed = {name: value for name, value in after.items() if not torch.equal(value, before[name])}
        settings = {"method": method, "weights": weights}
        record = parent_of(checkpoint)
        save_artifact(out, changed, kind="model", method=method, settings=settings, parents=[record], force=True)


def _replacing_plan(plan: Plan, merged: Path, corrected: Path, donor: Path, method: str) -> Plan:
    """Return the plan that copies a merged model, with some tensors from another file, and the donor's side files."""
    references = [ModelReference(str(path), path=path.resolve()) for path in (merged, donor)]
    source = Source(references[0], None, {}, "models[0]")
    group = Slice((source,), None, {}, "models")
    recipe = replace(
        plan.recipe, method="passthrough", slices=(group,), base=None, donor=references[1], parameters={}, dtype=None,
        inputs=tuple(dict.fromkeys(references)), warnings=(), shared={}, lines=None, align=None, renormalize=None,
    )  # fmt: skip
    copying = make_plan(recipe, plan.options)
    changed = Checkpoint.open(corrected)
    copying.checkpoints.append(changed)
    copying.labels.append(corrected.name)
    for step in copying.steps:
        if step.name in changed.tensors:
            step.models = (Input(len(copying.checkpoints) - 1, changed.tensors[step.name]),)
    copying.config, copying.warnings, copying.method = plan.config, plan.warnings, plan.method
    copying.origin = (method, canonical_recipe(plan.recipe, plan.labels_by_text()))
    return copying


def _evaluated(recipe: Recipe, out: Path, settings: Settings, tell: Callable[[str], None]) -> list[Evaluation]:
    """Return how an output does on the tasks that its recipe names."""
    if not recipe.evaluate:
        return []
    from graftwork.merge.evaluation import evaluate
    from graftwork.merge.task import load_task

    tell(f"evaluating on {len(recipe.evaluate)} task{'s' if len(recipe.evaluate) > 1 else ''}")
    tasks = [load_task(spec, checkpoint=out) for spec in recipe.evaluate]
    return evaluate({out.name: out}, tasks, device=settings.device)


def check_places(file: RecipeFile, target: Path, settings: Settings) -> list[Path]:
    """Return where the output of each document goes, checked against the inputs and what is there already.

    Raises:
        OutputError: A place is not free, and is nothing that may be replaced.
    """
    named = [reference for item in file.recipes for reference in item.inputs]
    named += [reference.adapter for reference in named if reference.adapter is not None]
    inputs = [reference.path for reference in named if reference.path is not None]
    if len(file.recipes) == 1:
        check_output(target, force=settings.force, inputs=inputs)
        return [target]
    names = [str(item.name) for item in file.recipes]
    if file.recipes[-1].name is not None:
        _check_root(target, names, force=settings.force)
        places = [target / name for name in names]
    else:
        check_output(target, force=settings.force, inputs=inputs)
        root = settings.intermediate or target.with_name(target.name + ".steps")
        places = [*(root / name for name in names[:-1]), target]
        for place in places[:-1]:
            _check_apart(place, target)
    for place in places[:-1]:
        check_output(place, force=settings.force or _is_own(place), inputs=inputs)
    if places[-1] != target:
        check_output(places[-1], force=settings.force, inputs=inputs)
    return places


def _check_root(root: Path, names: Sequence[str], *, force: bool) -> None:
    """Check a folder for the outputs of all documents; one that an earlier run has begun may be gone on with."""
    if root.name in {"", ".."}:
        raise OutputError(f"cannot write {root}: a merge makes a folder of its own; give it a name")
    if not os.path.lexists(root):
        return
    if not root.is_dir():
        raise OutputError(f"cannot write {root}: it is not a folder; choose another place")
    known = {name + end for name in names for end in ("", ".partial", ".replaced")}
    if not force and not {path.name for path in root.iterdir()} <= known:
        raise OutputError(f"cannot write {root}: it exists; choose another place, or write into it with --force")


def _check_apart(place: Path, target: Path) -> None:
    """Make sure that an intermediate output and the output do not lie within each other."""
    one, other = place.resolve(), target.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise OutputError(
            f"cannot write {target}: it and the intermediate output {place} would lie within each other; "
            "choose another place"
        )


@contextlib.contextmanager
def _steps_folder(folder: Path | None) -> Iterator[set[Path]]:
    """Yield a set; outputs added to it are removed from the folder of intermediate outputs after a run without errors.

    A folder that was not there before is removed with them, unless something else has come into it.
    """
    done: set[Path] = set()
    if folder is not None and not os.path.lexists(folder):
        try:
            folder.mkdir(parents=True)
            (folder / _STEPS_MARK).touch()
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror}; check the path and its permissions") from None
    succeeded = False
    try:
        yield done
        succeeded = True
    finally:
        if folder is not None:
            for place in done if succeeded else ():
                shutil.rmtree(place, ignore_errors=True)
            if _is_marked(folder) and {path.name for path in folder.iterdir()} == {_STEPS_MARK}:
                with contextlib.suppress(OSError):
                    (folder / _STEPS_MARK).unlink()
                    folder.rmdir()


def _is_marked(folder: Path | None) -> bool:
    return folder is not None and (folder / _STEPS_MARK).is_file()


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_done(plan: Plan, place: Path) -> bool:
    """Return whether an intermediate output was made by this very plan."""
    return _plan_of(place) == plan.digest()


def _is_own(place: Path) -> bool:
    """Return whether a merge has made what lies there."""
    return _plan_of(place) is not None


def _plan_of(place: Path) -> str | None:
    try:
        with Checkpoint.open(place) as found:
            return found.metadata.get(lineage.PREFIX + "plan")
    except GraftworkError:
        return None


def _carry_out(
    plan: Plan, out: Path, file: RecipeFile, settings: Settings, progress: Observer | None, *, force: bool
) -> MergeResult:
    start = time.monotonic()
    device = _device(settings.device)
    threads = settings.threads or usable_cores()
    digest = plan.digest()
    stamps = _stamps(plan)
    _check_beside(plan, out, force=force)
    try:
        writer = CheckpointWriter(
            out,
            plan.outputs,
            _metadata(plan, digest, {}, lineage.EMPTY_DIGEST),
            plan_digest=digest,
            max_shard_bytes=settings.max_shard_bytes,
            force=force,
            restart=settings.restart,
            stamps=stamps,
            input_digest=lambda model, name: _digest(plan.checkpoints[model], name),
            parts={name: part.stem for name, part in plan.parts.items()},
        )
    except KeyboardInterrupt:
        raise Interrupted(f"stopped before the work on {out} began: run the same command again to go on") from None
    try:
        count = progress(_start(plan, writer)) if progress else (lambda size: None)
        found = []
        if lines.needs_measuring(plan):
            alpha = lines.measure(plan, lambda sink: _engine(plan, sink, threads, device, count))
            found.append(f"lines: alpha is {alpha:.6g}")
            lines.apply(plan, alpha)
        engine = _engine(plan, writer, threads, device, count)
        engine.run([step for step in plan.steps if step.name not in writer.resumed])
        inputs = {**writer.input_digests, **engine.digest_only(plan.unread)}
        output = content_digest(
            (tensor.name, tensor.dtype, tensor.shape, writer.digests[tensor.name]) for tensor in plan.outputs
        )
        metadata = _metadata(plan, digest, inputs, output)
        beside = _write_beside(plan, writer, inputs, lambda sink: _engine(plan, sink, threads, device, count))
        writer.publish(metadata, _files(plan, out, file, metadata, settings) if not writer.single_file else {})
    except (KeyboardInterrupt, Stopped):
        writer.close()
        if writer.published:
            raise Interrupted(f"stopped; {out} is complete") from None
        raise Interrupted(f"stopped; {_finished(plan, writer)}") from None
    except (CheckpointError, DependencyError, OutputError) as error:
        # The same merge may succeed later, unless its inputs are not what they were.
        if isinstance(error, CheckpointError) and _stamps(plan) != stamps:
            writer.abandon()
            raise
        if not writer.leave():
            raise
        *others, problem = error.problems
        raise type(error)(*others, f"{problem}; {_finished(plan, writer)}") from None
    except GraftworkError:
        writer.abandon()
        raise
    except BaseException:
        writer.leave()
        raise
    notes = found + [f"{step.name}: {note}" for step in plan.merged for note in step.notes]
    if beside is not None:
        notes.insert(0, f"{beside} gives the model of each task back, with merge_method: task_model")
    return MergeResult(out, plan, output, time.monotonic() - start, len(writer.resumed), notes)


def _check_beside(plan: Plan, out: Path, *, force: bool) -> None:
    """Check the place of what is written beside an output that is a single file; an unfinished merge may have it."""
    beside = place_of(out)
    if plan.method.task_masks is None or beside.parent == out or force:
        return
    if os.path.lexists(beside) and not os.path.lexists(out.with_name(out.name + ".partial")):
        raise OutputError(f"cannot write {beside}: it exists; choose another output, or replace it with --force")


def _write_beside(
    plan: Plan, writer: CheckpointWriter, inputs: Mapping[tuple[int, str], bytes], engine: Callable[[Sink], Engine]
) -> Path | None:
    """Write the task masks of a method that has them, so that they become visible with the output."""
    steps = [step for step in plan.merged if step.base is not None]
    if plan.method.task_masks is None or not steps:
        return None
    parents = []
    for item in (steps[0].base, *steps[0].models):
        assert item is not None
        checkpoint = plan.checkpoints[item.model]
        record = _parent(plan, item.model, inputs)
        parents.append({**record, "quick": checkpoint.quick_digest()})
    path = writer.partial / TASK_MASKS_NAME
    write_task_masks(plan, path, parents, engine)
    if writer.single_file:
        os.replace(path, place_of(writer.out))
    return place_of(writer.out)


def _finished(plan: Plan, writer: CheckpointWriter) -> str:
    return (
        f"{len(writer.digests)} of {len(plan.steps)} tensors are finished in {writer.partial}: "
        "run the same command again to go on"
    )


def _stamps(plan: Plan) -> list[list[int]]:
    """Return size and time of every file that an input consists of."""
    stamps = []
    for checkpoint in plan.checkpoints:
        for path in sorted({entry.file for entry in checkpoint.tensors.values()}):
            try:
                status = os.stat(path)
            except OSError:
                stamps.append([-1, -1])
            else:
                stamps.append([status.st_size, status.st_mtime_ns])
    return stamps


def _digest(checkpoint: Checkpoint, name: str) -> bytes:
    """Return the digest of a tensor of an input as the engine computes it."""
    entry = checkpoint.tensors[name]
    block = max(1, BLOCK * dtypes.BITS[entry.dtype] // 8)
    buffer = memoryview(bytearray(min(block, entry.size)))
    digests = []
    for offset in range(0, entry.size, block):
        part = buffer[: min(block, entry.size - offset)]
        checkpoint.read_into(entry, offset, part)
        digests.append(xxhash.xxh3_128_digest(part))
    return tensor_digest(digests or [b""])


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


def _engine(plan: Plan, sink: Sink, threads: int, device: str, progress: Callable[[int], None]) -> Engine:
    nonfinite = plan.options.allow_nonfinite
    if device == "cpu":
        return Engine(
            plan.checkpoints, sink, plan.labels, threads=threads, fuse=plan.elements >= FUSE_ABOVE,
            allow_nonfinite=nonfinite, progress=progress,
        )  # fmt: skip
    from graftwork.merge.device import DeviceEngine

    return DeviceEngine(
        plan.checkpoints,
        sink,
        plan.labels,
        device=device,
        threads=threads,
        allow_nonfinite=nonfinite,
        progress=progress,
    )


def _parent(plan: Plan, number: int, inputs: Mapping[tuple[int, str], bytes]) -> dict[str, Any]:
    """Return the record of one input; without the digests of its tensors, one of the same length."""
    checkpoint = plan.checkpoints[number]
    whole = lineage.EMPTY_DIGEST
    if inputs:
        whole = content_digest(
            (entry.name, entry.dtype, entry.shape, inputs[number, entry.name]) for entry in checkpoint.tensors.values()
        )
    return lineage.parent_record(plan.labels[number], whole, checkpoint.metadata, **plan.origins()[number])


def _metadata(plan: Plan, digest: str, inputs: Mapping[tuple[int, str], bytes], output: str) -> dict[str, str]:
    parents = [_parent(plan, number, inputs) for number in range(len(plan.checkpoints))]
    recipe = plan.origin[1] if plan.origin else canonical_recipe(plan.recipe, plan.labels_by_text())
    more = {"parts": " ".join(plan.parts)} if plan.parts else {}
    return lineage.metadata(
        "model", method=plan.method_name, recipe=recipe, parents=parents, digest=output, plan=digest, **more
    )


def _files(
    plan: Plan, out: Path, file: RecipeFile, metadata: Mapping[str, str], settings: Settings
) -> dict[str, bytes | Path]:
    files = dict(donor_files(plan))
    if plan.config is not None:
        files["config.json"] = plan.config.encode()
    files[RECIPE_NAME] = file.text.encode(errors="replace")
    if settings.write_card:
        files["README.md"] = model_card(plan, out.name, file.text, metadata).encode(errors="replace")
    return files
