"""Carries out recipes: plan → engine → writer."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import xxhash

from graftwork.merge import dtypes, lineage
from graftwork.merge.card import model_card
from graftwork.merge.checkpoint import BLOCK, Checkpoint, content_digest, tensor_digest
from graftwork.merge.engine import FUSE_ABOVE, Engine, Stopped
from graftwork.merge.errors import CheckpointError, DependencyError, GraftworkError, OutputError
from graftwork.merge.plan import Options, Plan, canonical_recipe, donor_files, make_plan
from graftwork.merge.recipe import RecipeFile, load_recipe
from graftwork.merge.writer import CheckpointWriter, check_output

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
        GraftworkError: Something that the user can put right. Nothing is left behind, unless the same merge may succeed
            later: then what is finished stays to go on with.
        Interrupted: Ctrl-C; the unfinished output is kept and can be resumed.
    """
    file = recipe if isinstance(recipe, RecipeFile) else load_recipe(recipe)
    chosen = settings or Settings()
    chosen = replace(chosen, force=force or chosen.force, threads=threads or chosen.threads)
    target = Path(out)
    places = check_places(file, target, chosen)
    temporary = places[0].parent if places[-1] == target and len(places) > 1 and chosen.intermediate is None else None
    made: dict[str, Path] = {}
    with _steps_folder(temporary) as done:
        for item, place in zip(file.recipes, places, strict=True):
            last = place is places[-1]
            plan = make_plan(item, options, steps=made)
            try:
                if last:
                    result = _carry_out(plan, place, file, chosen, progress, force=chosen.force)
                    if _is_marked(temporary):
                        done.update(made.values())
                    return result
                if not (chosen.reuse and _is_done(plan, place)):
                    _carry_out(plan, place, file, chosen, progress, force=chosen.force or _is_own(place))
                    done.add(place)
            finally:
                plan.close()
            made[str(item.name)] = place
    raise AssertionError("a recipe has at least one document")


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
        )
    except KeyboardInterrupt:
        raise Interrupted(f"stopped before the work on {out} began: run the same command again to go on") from None
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
    notes = [f"{step.name}: {note}" for step in plan.merged for note in step.notes]
    return MergeResult(out, plan, output, time.monotonic() - start, len(writer.resumed), notes)


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
    files[RECIPE_NAME] = file.text.encode(errors="replace")
    if settings.write_card:
        files["README.md"] = model_card(plan, out.name, file.text, metadata).encode(errors="replace")
    return files
