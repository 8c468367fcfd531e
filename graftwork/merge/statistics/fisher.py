"""Diagonals of the Fisher information: how strongly a model's own predictions depend on each of its parameters.

Matena & Raffel 2021, arXiv 2111.09832: F = E_x E_{y~p(y|x)} [(∂ log p(y|x) / ∂θ)²], entry by entry, with labels from
the *model*. We deviate in the estimators, which are exact with C - 1 instead of C backward passes, or unbiased with one
(`graftwork.merge.statistics.factors`), and in drawing the examples at random.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from graftwork.merge.artifact import Artifact, load_artifact, parent_of, save_artifact
from graftwork.merge.checkpoint import Checkpoint, quoted
from graftwork.merge.errors import DataError, MismatchError, TaskError
from graftwork.merge.lineage import text_digest
from graftwork.merge.statistics.factors import Estimator, Outputs, chosen_estimator, column_count, columns
from graftwork.merge.statistics.sample import Batch, Sample, draw, mask_of
from graftwork.merge.statistics.state import Unfinished, interrupts_between_batches, stopped
from graftwork.merge.task import Task, fit, raise_user_failure
from graftwork.merge.writer import check_output

if TYPE_CHECKING:
    from torch import Tensor, nn

    from graftwork.merge.statistics.engines import Gradients
    from graftwork.merge.statistics.totals import Total

ComputeDtype = Literal["module", "float32", "float64"]

MEMORY_BYTES = 256 << 20
"""What a micro-batch may take, by default."""

_LARGEST_BATCH = 64
_SIGNED_BATCH = 8
_WATCHED_EVERY_PASS = 2
_MANY_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Fisher:
    """An estimate of the Fisher diagonal.

    Args:
        tensors: One tensor per parameter, of its shape, under its first name in the module: float32, or float64 for
            tensors that were summed so.
        estimator: The estimator that was used.
        columns: Backward passes per example.
        examples: Examples that were seen.
        rows: Rows (positions) that were counted.
        classes: Classes, or numbers of a regression.
        micro_batch: Examples that were passed at once.
        tied: Further names of a parameter, by its first one.
        unused: Parameters that the logits do not depend on.
        engines: Number of parameters by how they were differentiated.
    """

    tensors: dict[str, Tensor]
    estimator: Estimator
    columns: int
    examples: int
    rows: int
    classes: int
    micro_batch: int
    tied: Mapping[str, tuple[str, ...]]
    unused: tuple[str, ...]
    engines: Mapping[str, int]


def estimate_fisher(
    task: Task,
    module: nn.Module | None = None,
    *,
    examples: int | None = None,
    estimator: Estimator | Literal["auto"] = "auto",
    seed: int = 0,
    outputs: Outputs = "classes",
    micro_batch: int | None = None,
    memory_bytes: int = MEMORY_BYTES,
    compute_dtype: ComputeDtype = "module",
    device: str = "cpu",
    state: Unfinished | None = None,
    progress: Callable[[int, int], None] | None = None,
    command: str = "graftwork fisher",
) -> Fisher:
    """Estimate the Fisher diagonal of a model on a task's training data; labels are not needed.

    The model runs in evaluation mode. Which random signs or labels an example gets depends on seed, task and example
    alone, so the size of the micro-batch changes rounding only (except for `signed_batch`, which it defines).

    Args:
        task: Whose data, logits and, by default, model.
        module: The model with its values; `task.model()` if None. It is moved to the device and comes back with its
            modes restored.
        examples: Number of examples, drawn at random; None for 256, or fewer if there are fewer.
        estimator: `exact`; `signed`: one backward pass per example, unbiased; `signed_batch`: one per micro-batch,
            unbiased and noisier; `sampled`: one label from the model; `empirical`: the true label. `auto` is exact if
            that takes at most four backward passes, else signed.
        seed: Seed of the draw and of signs and labels.
        outputs: `classes`: softmax over axis 1 of the logits, as in torch's cross-entropy, further axes are positions;
            `multi_label`: sigmoids; `regression`: numbers of unit variance.
        micro_batch: Examples at once; by default what `memory_bytes` allows, up to 64 (8 for `signed_batch`).
        memory_bytes: What a micro-batch may take, roughly.
        compute_dtype: dtype of the passes; squares are summed in float32 at least.
        device: Where the model runs.
        state: Where unfinished sums are kept; None for nowhere.
        progress: Called with (examples done, examples in all).
        command: What a message says to run again.

    Raises:
        TaskError: There are too few examples, the model does not work as it has to, or its logits are not finite.
        Interrupted: Ctrl-C came.
    """
    import torch

    sample = draw(task, examples, seed, labels=estimator == "empirical")
    try:
        model = task.model() if module is None else module
    except BaseException as error:
        raise_user_failure(error, f"cannot make the model of task {quoted(task.name)}")
    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices), held_for_measuring(task, model, device, compute_dtype):
        run = _Run(task, model, sample, estimator, seed, outputs, micro_batch, memory_bytes, device)
        run.prepare()
        return run.result(state, progress, command)


class _Run:
    """One estimate on its way."""

    def __init__(
        self,
        task: Task,
        module: nn.Module,
        sample: Sample,
        estimator: Estimator | Literal["auto"],
        seed: int,
        outputs: Outputs,
        micro_batch: int | None,
        memory_bytes: int,
        device: str,
    ) -> None:
        from graftwork.merge.statistics.engines import Gradients

        self.task, self.module, self.sample, self.seed, self.device = task, module, sample, seed, device
        self.outputs: Outputs = outputs
        self.gradients: Gradients = Gradients(task, module, outputs, memory_bytes)
        self.asked: Estimator | Literal["auto"] = estimator
        self.estimator: Estimator = "signed"
        self.micro_batch, self.memory_bytes = micro_batch, memory_bytes
        self.rows = self.columns = self.classes = 0
        self.doing = f"cannot measure the Fisher information on task {quoted(task.name)}"

    def prepare(self) -> None:
        """Look at two examples: shapes, estimator, engines, size of the micro-batch."""
        import torch

        probe = self.sample.batch(self.sample.batches(2)[0], self.device)
        with torch.no_grad():
            logits = self._logits(probe, 0)
        _, rows, self.classes = logits.shape
        self.estimator = chosen_estimator(rows, self.classes, self.outputs) if self.asked == "auto" else self.asked
        self.columns = column_count(self.estimator, rows, self.classes, self.outputs)
        if self.estimator == "signed_batch":
            self.micro_batch = self.micro_batch or _SIGNED_BATCH
            return
        self.gradients.make_plan(probe)
        if self.micro_batch is None:
            each = max(1, _WATCHED_EVERY_PASS * self.gradients.plan.bytes_per_example)
            self.micro_batch = max(1, min(_LARGEST_BATCH, self.memory_bytes // each))

    def result(self, state: Unfinished | None, progress: Callable[[int, int], None] | None, command: str) -> Fisher:
        """Sum over all micro-batches and return the mean."""
        from graftwork.merge.statistics.engines import new_totals

        assert self.micro_batch is not None
        totals = new_totals(self.gradients)
        ranges = self.sample.batches(self.micro_batch)
        first = self._restored(totals, state)
        count = len(self.sample.examples)
        with interrupts_between_batches() as interrupted:
            for number in range(first, len(ranges)):
                if progress is not None:
                    progress(ranges[number].start, count)
                self._add(number, self.sample.batch(ranges[number], self.device), totals)
                is_last = number + 1 == len(ranges)
                if state is not None and not is_last and (state.is_due or interrupted()):
                    self._keep(totals, state, number + 1)
                if interrupted() and not is_last:
                    raise stopped(ranges[number].stop, count, command, state)
        if progress is not None:
            progress(count, count)
        plan = self.gradients.plan
        slow = {"vmap": len(plan.vmapped), "single": len(plan.single), "expand": len(plan.expanded)}
        tied = _tied(self.module)
        return Fisher(
            tensors={name: totals.pop(name).mean(count) for name in list(totals)},
            estimator=self.estimator,
            columns=self.columns,
            examples=count,
            rows=self.rows,
            classes=self.classes,
            micro_batch=self.micro_batch,
            tied={name: tied[name] for name in sorted(tied)},
            unused=tuple(plan.unused),
            engines={name: number for name, number in slow.items() if number},
        )

    # -- one micro-batch

    def _add(self, number: int, batch: Batch, totals: dict[str, Total]) -> None:
        import torch

        if self.estimator == "signed_batch":
            self._add_gradient_of_all(number, batch, totals)
            return
        from graftwork.merge.statistics.engines import UnlikeExamplesError, Use, squares

        def sink(name: str, uses: list[Use], examples: int) -> None:
            total = totals[name]
            for where, values in squares(uses, total.shape, examples):
                total.add(where, values)

        while True:
            try:
                with self.gradients.watched(len(batch), sink) as watch, torch.enable_grad():
                    logits = self._logits(batch, number)
                    break
            except UnlikeExamplesError as unlike:
                self.gradients.give_up(unlike.names)
        vectors = self._vectors(logits, batch)
        following = next(vectors, None)
        while following is not None:
            vector, following = following, next(vectors, None)
            watch.backward((logits * vector).sum(), last=following is None)
            if self.gradients.plan.slow:
                try:
                    self.gradients.add_slow(batch, vector, sink)
                except Exception as error:
                    raise_user_failure(error, f"{self.doing}: batch {number}")

    def _add_gradient_of_all(self, number: int, batch: Batch, totals: dict[str, Total]) -> None:
        """Add the square of the whole micro-batch's gradient; independent signs keep that unbiased."""
        import torch

        from graftwork.merge.statistics.engines import widened
        from graftwork.merge.statistics.totals import matrix_size

        parameters = self.gradients.parameters

        def take(name: str) -> Callable[[Tensor], None]:
            def hook(parameter: Tensor) -> None:
                gradient = parameter.grad
                assert gradient is not None
                # Taken as soon as it is there, so that gradients of all parameters never exist together.
                parameter.grad = None
                values = widened(gradient).reshape(matrix_size(tuple(parameter.shape)))
                rows: slice | Tensor = slice(0, len(values))
                if len(values) >= _MANY_ROWS:
                    # Of an embedding, few rows are used by one batch.
                    used = values.any(1).nonzero()[:, 0]
                    if 4 * len(used) < len(values):
                        rows, values = used, values[used]
                totals[name].add(rows, values.square_())

            return hook

        handles = []
        try:
            for name, parameter in parameters.items():
                parameter.requires_grad_(True)
                add_hook: Any = parameter.register_post_accumulate_grad_hook
                handles.append(add_hook(take(name)))
            with torch.enable_grad():
                logits = self._logits(batch, number)
                for vector in self._vectors(logits, batch):
                    (logits * vector).sum().backward()  # type: ignore[no-untyped-call]
        finally:
            for handle in handles:
                handle.remove()
            for parameter in parameters.values():
                parameter.requires_grad_(False)

    def _vectors(self, logits: Tensor, batch: Batch) -> Iterator[Tensor]:
        kept = _counted(logits, batch)
        self.rows += logits.shape[0] * logits.shape[1] if kept is None else int(kept.sum())
        return columns(
            self.estimator,
            logits.detach(),
            outputs=self.outputs,
            indices=batch.indices,
            seed=self.seed,
            task=self.task.name,
            labels=batch.labels,
            kept=kept,
        )

    def _logits(self, batch: Batch, number: int) -> Tensor:
        """Return logits (examples, rows, classes) after a look at their shape and values."""
        import torch

        from graftwork.merge.statistics.engines import UnlikeExamplesError

        # A model that draws random numbers even in evaluation mode draws the same ones in every run.
        torch.manual_seed(batch.indices[0])
        try:
            from graftwork.merge.evaluation import logits_of
            from graftwork.merge.statistics.factors import by_rows

            logits = logits_of(self.task, self.module, batch.inputs)
        except UnlikeExamplesError:
            raise
        except BaseException as error:
            raise_user_failure(error, f"{self.doing}: batch {number}")
        problem = _shape_problem(logits, len(batch), self.outputs)
        if problem:
            raise TaskError(f"{self.doing}: {problem}")
        if not bool(torch.isfinite(logits).all()):
            logits = logits.detach()
            bad = ~torch.isfinite(logits.reshape(len(logits), -1)).all(1)
            indices = [index for index, is_bad in zip(batch.indices, bad.tolist(), strict=True) if is_bad]
            raise TaskError(
                f"{self.doing}: the logits of batch {number} are not finite (from {float(logits.min()):g} to "
                f"{float(logits.max()):g}) for examples {', '.join(map(str, indices[:6]))}; "
                "check the checkpoint and these inputs"
            )
        return by_rows(logits, self.outputs)

    # -- going on later

    def _keep(self, totals: Mapping[str, Total], state: Unfinished, done: int) -> None:
        tensors = {f"{name}.{part}": value for name, total in totals.items() for part, value in total.state().items()}
        state.save(tensors, {"batches": done, "rows": self.rows, "single": self.gradients.plan.single})

    def _restored(self, totals: Mapping[str, Total], state: Unfinished | None) -> int:
        import torch

        found = None if state is None else state.load()
        if found is None:
            return 0
        tensors, counters = found
        for name, total in totals.items():
            total.restore({part: torch.from_numpy(tensors[f"{name}.{part}"]) for part in total.state()})
        self.rows = int(counters["rows"])
        self.gradients.give_up([name for name in counters["single"] if name not in self.gradients.plan.single])
        return int(counters["batches"])


def _shape_problem(logits: Any, examples: int, outputs: Outputs) -> str:
    """Return what is wrong with the shape of logits, or an empty text."""
    import torch

    if not isinstance(logits, torch.Tensor):
        return (
            f"the model gives {type(logits).__name__}, not a tensor of logits; "
            "give the task `logits=lambda module, inputs: …`"
        )
    shape = tuple(logits.shape)
    if not shape or shape[0] != examples:
        return f"the logits have the shape {shape} for {examples} examples; their first axis has to be the examples"
    if outputs == "regression":
        return ""
    if len(shape) < 2:
        return (
            f"the logits have the shape {shape}, not (examples, classes); if they are numbers, say --outputs regression"
        )
    if shape[1] == 1 and outputs == "classes":
        return (
            f"the logits have the shape {shape}, so there is one class only; "
            "if it is a number, say --outputs regression, if it is yes or no, --outputs multi_label"
        )
    return ""


def _counted(logits: Tensor, batch: Batch) -> Tensor | None:
    """Return which rows (examples, rows) count: no padding, no ignored label; None for all."""
    import torch

    kept = None
    mask = mask_of(batch.inputs)
    if mask is not None and logits.shape[1] > 1 and mask.shape == logits.shape[:2]:
        kept = mask.to(logits.device)
    labels = batch.labels
    is_classes = isinstance(labels, torch.Tensor) and not labels.is_floating_point()
    if is_classes and logits.shape[1] > 1 and labels.numel() == logits.shape[0] * logits.shape[1]:
        counted = labels.reshape(logits.shape[:2]) != -100
        kept = counted if kept is None else kept & counted
    return kept


@contextmanager
def held_for_measuring(task: Task, module: nn.Module, device: str, compute_dtype: ComputeDtype) -> Iterator[None]:
    """Hold a module in evaluation mode, without gradients, on a device; modes and flags are put back."""
    import torch
    from torch.nn.modules import batchnorm

    training = {part: part.training for part in module.modules()}
    needing = {parameter: parameter.requires_grad for parameter in module.parameters()}
    module.to(device)
    if compute_dtype != "module":
        module.to(torch.float64 if compute_dtype == "float64" else torch.float32)
    module.eval()
    module.requires_grad_(False)
    doing = f"cannot measure on task {quoted(task.name)}"
    try:
        for name, part in module.named_modules():
            where = f"submodule {quoted(name)}" if name else "the model"
            if part.training:
                raise TaskError(f"{doing}: {where} is still in training mode after eval(); let its train() obey")
            if isinstance(part, batchnorm._BatchNorm) and part.running_mean is None:
                raise TaskError(
                    f"{doing}: {where} normalises by its batch, so examples are not independent; "
                    "track running statistics"
                )
        yield
    finally:
        for part, was in training.items():
            part.training = was
        for parameter, was in needing.items():
            parameter.requires_grad_(was)


def _tied(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the further names of parameters that have several, by the first one."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {first: tuple(others) for first, *others in names.values() if others}


# ---------------------------------------------------------------------------------------------------------------------
# Files


@dataclass(frozen=True, slots=True)
class Measured:
    """A file that was written: where, what for, and its own facts by name."""

    path: Path
    digest: str
    facts: Mapping[str, Any]


def measure_fisher(
    source: Checkpoint,
    task: Task,
    out: Path | str,
    *,
    examples: int | None = None,
    estimator: Estimator | Literal["auto"] = "auto",
    seed: int = 0,
    outputs: Outputs = "classes",
    micro_batch: int | None = None,
    memory_bytes: int = MEMORY_BYTES,
    compute_dtype: ComputeDtype = "module",
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    force: bool = False,
    state_seconds: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Estimate the Fisher diagonal of a checkpoint and write it as a file of the kind `fisher`.

    Tensors have the checkpoint's names; buffers have none. Unfinished sums are kept beside the output at most once a
    minute, and on Ctrl-C; the same call goes on with them and writes the same bytes.

    Args:
        source: The checkpoint.
        task: Its model and data.
        out: The file to write.
        examples: As in `estimate_fisher`, as what follows unless it is here.
        estimator: …
        seed: …
        outputs: …
        micro_batch: …
        memory_bytes: …
        compute_dtype: …
        device: …
        dtype: How values are stored.
        force: Replace a file that exists.
        state_seconds: Time between two states.
        progress: …

    Raises:
        GraftworkError: The checkpoint does not fit the task's model, or what `estimate_fisher` raises.
    """
    import torch

    target = Path(out)
    if target.suffix == ".safetensors":
        check_output(target, force=force, inputs=[source.path])
    module = fit(task, source)
    parent = parent_of(source)
    settings = {
        "task": task.name,
        "examples": examples,
        "estimator": estimator,
        "seed": seed,
        "outputs": outputs,
        "micro_batch": micro_batch,
        "memory_bytes": memory_bytes,
        "compute_dtype": compute_dtype,
        "dtype": dtype,
    }
    drawn = text_digest(draw(task, examples, seed).digest_text)
    state = Unfinished(target, {**settings, "parent": parent["digest"], "drawn": drawn, "torch": torch.__version__})
    if state_seconds is not None:
        state.seconds = state_seconds
    found = estimate_fisher(
        task,
        module,
        examples=examples,
        estimator=estimator,
        seed=seed,
        outputs=outputs,
        micro_batch=micro_batch,
        memory_bytes=memory_bytes,
        compute_dtype=compute_dtype,
        device=device,
        state=state,
        progress=progress,
    )
    stored = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    tensors: dict[str, Tensor] = {}
    tied: dict[str, list[str]] = {}
    for first in list(found.tensors):
        values = found.tensors.pop(first).to(stored)
        names = [first, *found.tied.get(first, ())]
        own = [name for name in names if name in source.tensors]
        tensors |= dict.fromkeys(own, values)
        if len(names) > 1 and own:
            tied[own[0]] = [name for name in names if name != own[0]]
    skipped = {name: "buffer" for name in source.tensors if name not in tensors}
    skipped |= {name: "unused" for name in found.unused if name in tensors}
    facts: dict[str, Any] = {
        "task": task.name,
        "examples": found.examples,
        "estimator": found.estimator,
        "outputs": outputs,
        "columns": found.columns,
        "micro_batch": found.micro_batch,
        "seed": seed,
        "rms": root_mean_square(tensors.values()),
        "classes": found.classes,
        "rows": found.rows,
        "tied": tied,
        "skipped": skipped,
    }
    digest = save_artifact(
        target,
        tensors,
        kind="fisher",
        method=f"fisher {found.estimator}",
        settings={**settings, "estimator": found.estimator, "micro_batch": found.micro_batch},
        parents=[parent],
        force=force,
        inputs=[source.path],
        **texts(facts),
    )
    state.remove()
    return Measured(target, digest, facts)


def texts(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return facts as metadata hold them: texts as they are, numbers in decimal, the rest as JSON."""
    return {
        name: value if isinstance(value, str) else repr(value) if isinstance(value, float) else
        json.dumps(value, sort_keys=True, separators=(",", ":"))
        for name, value in facts.items()
    }  # fmt: skip


def root_mean_square(tensors: Any) -> float:
    """Return the root of the mean square over all entries, summed in float64."""
    total, count = 0.0, 0
    for tensor in tensors:
        for piece in tensor.reshape(-1).split(1 << 20):
            total += float(piece.double().square().sum())
        count += tensor.numel()
    return math.sqrt(total / count) if count else 0.0


def load_fisher(path: Path | str, checkpoint: Checkpoint | None = None) -> Artifact:
    """Read a Fisher file, and make sure that it is sound and was measured on a checkpoint.

    Raises:
        CheckpointError: It cannot be read, or is no Fisher file.
        MismatchError: It was measured on another checkpoint, or tensors have other shapes.
        DataError: It holds a negative value or NaN.
    """
    found = load_artifact(path, kind="fisher", what="the Fisher information")
    check_fisher(found, checkpoint)
    return found


def check_fisher(found: Artifact, checkpoint: Checkpoint | None = None) -> None:
    """Raise what `load_fisher` raises for what was read."""
    if checkpoint is not None:
        measured = str(found.parents[0].get("digest", "")) if found.parents else ""
        own = checkpoint.content_digest()
        if measured != own:
            raise MismatchError(
                f"cannot use {found.path} for {checkpoint.path}: it was measured on a checkpoint with the digest "
                f"{measured or '(none)'}, this one has {own}; measure this one"
            )
        for name, values in found.tensors.items():
            if name not in checkpoint.tensors or checkpoint.tensors[name].shape != values.shape:
                there = checkpoint.tensors[name].shape if name in checkpoint.tensors else "not there"
                raise MismatchError(
                    f"cannot use {found.path} for {checkpoint.path}: {quoted(name)} is {values.shape} in the Fisher "
                    f"file and {there} in the checkpoint; measure it again"
                )
    for name, values in found.tensors.items():
        bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)).reshape(-1))
        if len(bad):
            value = values.reshape(-1)[bad[0]]
            raise DataError(
                f"cannot use {found.path}: {quoted(name)} has {value} at flat index {bad[0]}, "
                "which no Fisher information can be; measure it again"
            )
