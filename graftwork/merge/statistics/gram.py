"""Gram matrices of what enters linear layers and convolutions: the statistic of RegMean.

Jin et al. 2022, arXiv 2212.09849: G = (1/m) Σ aᵀa over all m rows that enter a layer. Rows are examples, positions of a
sequence, or patches of an image. Where a layer has a bias, a constant 1 is one more column, so that the bias can be
solved for together with the weight (our extension). Padding (`attention_mask` of the inputs) is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graftwork.merge.artifact import parent_of, save_artifact
from graftwork.merge.checkpoint import Checkpoint, quoted
from graftwork.merge.errors import TaskError
from graftwork.merge.lineage import text_digest
from graftwork.merge.statistics.fisher import ComputeDtype, Measured, held_for_measuring, texts
from graftwork.merge.statistics.sample import Sample, draw, mask_of
from graftwork.merge.statistics.state import Unfinished, interrupts_between_batches, stopped
from graftwork.merge.task import Task, fit, raise_user_failure
from graftwork.merge.writer import check_output

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Array = np.ndarray[Any, np.dtype[Any]]

MEMORY_BYTES = 1 << 30
"""What the sums of one pass over the data may take, by default."""

_MICRO_BATCH = 32


@dataclass(slots=True)
class Layer:
    """One layer whose inputs are measured.

    Args:
        name: Name of its weight.
        module: The layer.
        width: Columns of a Gram matrix, the constant one included.
        bias: Whether there is a constant column.
        groups: Groups of a convolution; each has a matrix of its own.
        transposed: Whether the weight is (in, out).
        rows: Rows seen so far.
    """

    name: str
    module: nn.Module
    width: int
    bias: bool
    groups: int = 1
    transposed: bool = False
    rows: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is measured."""
        return (self.width, self.width) if self.groups == 1 else (self.groups, self.width, self.width)

    @property
    def bytes(self) -> int:
        """What its sums take."""
        return 8 * self.groups * self.width**2

    def facts(self) -> dict[str, Any]:
        """Return what a merge needs to know of it."""
        return {
            "rows": self.rows,
            "columns": self.width,
            "bias": self.bias,
            "groups": self.groups,
            "transposed": self.transposed,
        }


@dataclass(frozen=True, slots=True)
class Grams:
    """Measured Gram matrices.

    Args:
        tensors: By the name of the layer's weight: (d, d), or (groups, d, d); float64.
        layers: Facts by the same names: rows, columns, bias, groups, transposed.
        examples: Examples that were seen.
        skipped: Layers without a matrix, and why.
    """

    tensors: dict[str, Array]
    layers: dict[str, dict[str, Any]]
    examples: int
    skipped: dict[str, str] = field(default_factory=dict)


def layers_of(module: nn.Module, *, bias: bool = True) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers of a module that can be measured, and the names of those that cannot, with the reason."""
    from torch import nn

    from graftwork.merge.statistics.engines import is_transposed_linear

    users: dict[int, int] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    layers: list[Layer] = []
    skipped: dict[str, str] = {}
    for path, part in module.named_modules():
        transposed = is_transposed_linear(part)
        convolution = isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if not (transposed or convolution or isinstance(part, nn.Linear)):
            continue
        name = f"{path}.weight" if path else "weight"
        weight = part._parameters.get("weight")
        if weight is None:
            skipped[name] = "reparametrised"
            continue
        if users[id(weight)] > 1:
            # An embedding that is also the head: regression would suit one of the two only.
            skipped[name] = "tied"
            continue
        with_bias = bias and part._parameters.get("bias") is not None
        groups = int(part.groups) if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 1
        inputs = weight.shape[0] if transposed else weight[0].numel()
        layers.append(Layer(name, part, inputs + with_bias, with_bias, groups, transposed))
    return layers, skipped


def grouped(layers: Sequence[Layer], memory_bytes: int) -> list[list[Layer]]:
    """Return layers in groups whose sums fit into the memory; each group takes one pass over the examples."""
    groups: list[list[Layer]] = []
    room = 0
    for layer in layers:
        if not groups or layer.bytes > room:
            groups.append([])
            room = memory_bytes
        groups[-1].append(layer)
        room -= layer.bytes
    return groups


def rows_of(layer: Layer, inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Return what enters a layer as (groups, rows, columns), float32 at least, without padding."""
    import torch
    from torch import nn

    from graftwork.merge.statistics.engines import unfolded, widened

    inputs = widened(inputs.detach())
    if isinstance(layer.module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        patches = unfolded(layer.module, inputs)
        rows = patches.reshape(-1, layer.groups, patches.shape[-1] // layer.groups).transpose(0, 1)
    elif mask is not None and inputs.ndim == 3 and inputs.shape[:2] == mask.shape:
        rows = inputs[mask][None]
    else:
        rows = inputs.reshape(1, -1, inputs.shape[-1])
    if layer.bias:
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], -1)
    return rows


def _add_batches(
    task: Task,
    module: nn.Module,
    sample: Sample,
    layers: Sequence[Layer],
    sums: dict[str, torch.Tensor],
    ranges: Sequence[range],
    device: str,
    after: Callable[[int], None],
) -> None:
    """Add the Gram matrices of batches to the sums; `after` is called with the number of each."""
    import torch

    from graftwork.merge.evaluation import logits_of
    from graftwork.merge.statistics.engines import plain_encoder

    doing = f"cannot measure Gram matrices on task {quoted(task.name)}"
    mask: Tensor | None = None

    def watching(layer: Layer) -> Callable[..., None]:
        def hook(part: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            rows = rows_of(layer, arguments[0] if arguments else keywords["input"], mask)
            product = rows.transpose(1, 2) @ rows
            sums[layer.name].add_(product.reshape(layer.shape))
            layer.rows += rows.shape[1]

        return hook

    handles = [layer.module.register_forward_pre_hook(watching(layer), with_kwargs=True) for layer in layers]
    try:
        with plain_encoder(), torch.no_grad():
            for number, positions in enumerate(ranges):
                batch = sample.batch(positions, device)
                mask = mask_of(batch.inputs)
                torch.manual_seed(batch.indices[0])
                try:
                    logits_of(task, module, batch.inputs)
                except BaseException as error:
                    raise_user_failure(error, f"{doing}: batch {number}")
                for layer in layers:
                    if not bool(torch.isfinite(sums[layer.name]).all()):
                        raise TaskError(
                            f"{doing}: what enters {quoted(layer.name)} is not finite in batch {number}, examples "
                            f"{', '.join(map(str, batch.indices[:6]))}; check the checkpoint and these inputs"
                        )
                after(number)
    finally:
        for handle in handles:
            handle.remove()


def estimate_grams(
    task: Task,
    module: nn.Module | None = None,
    *,
    examples: int | None = None,
    seed: int = 0,
    bias: bool = True,
    micro_batch: int = _MICRO_BATCH,
    memory_bytes: int = MEMORY_BYTES,
    compute_dtype: ComputeDtype = "module",
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Grams:
    """Measure Gram matrices of the inputs of every Linear, Conv1d, Conv2d, Conv3d and transformers' Conv1D.

    Products of a batch are float32, their sums float64. All matrices are held in memory; `measure_gram` writes them
    group by group.

    Args:
        task: Whose training data are used; labels are not.
        module: The model with its values; `task.model()` if None.
        examples: Number of examples, drawn at random; None for 256, or fewer if there are fewer.
        seed: Seed of the draw.
        bias: Add a constant column for layers that have a bias.
        micro_batch: Examples at once.
        memory_bytes: What the sums of one pass may take.
        compute_dtype: dtype of the passes.
        device: Where the model runs.
        progress: Called with (examples done, examples in all), passes counted one after the other.

    Raises:
        TaskError: There are too few examples, the task fails, or inputs are not finite.
    """
    import torch

    sample = draw(task, examples, seed)
    try:
        model = task.model() if module is None else module
    except BaseException as error:
        raise_user_failure(error, f"cannot make the model of task {quoted(task.name)}")
    layers, skipped = layers_of(model, bias=bias)
    groups = grouped(layers, memory_bytes)
    ranges = sample.batches(micro_batch)
    count = len(sample.examples)
    tensors: dict[str, Array] = {}
    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices), held_for_measuring(task, model, device, compute_dtype):
        for number, group in enumerate(groups):
            sums = _zeros(group, device)

            def after(batch: int, number: int = number) -> None:
                if progress is not None:
                    progress(number * count + ranges[batch].stop, len(groups) * count)

            _add_batches(task, model, sample, group, sums, ranges, device, after)
            tensors |= _means(group, sums, skipped)
    return Grams(tensors, {layer.name: layer.facts() for layer in layers if layer.rows}, count, skipped)


def _zeros(group: Sequence[Layer], device: str) -> dict[str, torch.Tensor]:
    import torch

    return {layer.name: torch.zeros(layer.shape, dtype=torch.float64, device=device) for layer in group}


def _means(group: Sequence[Layer], sums: dict[str, torch.Tensor], skipped: dict[str, str]) -> dict[str, Array]:
    """Return means over rows, exactly symmetric; layers that were never called are skipped."""
    found: dict[str, Array] = {}
    for layer in group:
        mean = sums.pop(layer.name)
        if layer.rows:
            mean.div_(layer.rows)
            found[layer.name] = ((mean + mean.mT) / 2).cpu().numpy()
        else:
            skipped[layer.name] = "not called"
    return found


def measure_gram(
    source: Checkpoint,
    task: Task,
    out: Path | str,
    *,
    examples: int | None = None,
    seed: int = 0,
    bias: bool = True,
    micro_batch: int = _MICRO_BATCH,
    memory_bytes: int = MEMORY_BYTES,
    compute_dtype: ComputeDtype = "module",
    device: str = "cpu",
    force: bool = False,
    state_seconds: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Measure Gram matrices of a checkpoint and write them, in float32, as a file of the kind `gram`.

    A layer's matrix has the name of its weight. Layers are measured in groups whose sums fit into `memory_bytes`, one
    pass over the examples each; finished groups and unfinished sums wait in files beside the output, so that the same
    call goes on after an interruption and writes the same bytes.

    Args:
        source: The checkpoint.
        task: Its model and data.
        out: The file to write.
        examples: As in `estimate_grams`, as what follows unless it is here.
        seed: …
        bias: …
        micro_batch: …
        memory_bytes: …
        compute_dtype: …
        device: …
        force: Replace a file that exists.
        state_seconds: Time between two states.
        progress: …

    Raises:
        GraftworkError: The checkpoint does not fit the task's model, or what `estimate_grams` raises.
        Interrupted: Ctrl-C came.
    """
    import torch

    target = Path(out)
    if target.suffix == ".safetensors":
        check_output(target, force=force, inputs=[source.path])
    sample = draw(task, examples, seed)
    model = fit(task, source)
    parent = parent_of(source)
    settings = {
        "task": task.name,
        "examples": examples,
        "seed": seed,
        "bias": bias,
        "micro_batch": micro_batch,
        "memory_bytes": memory_bytes,
        "compute_dtype": compute_dtype,
    }
    identity = {
        **settings,
        "parent": parent["digest"],
        "drawn": text_digest(sample.digest_text),
        "torch": torch.__version__,
    }
    layers, skipped = layers_of(model, bias=bias)
    # Only the checkpoint's own names can be merged.
    skipped |= {layer.name: "not in the checkpoint" for layer in layers if layer.name not in source.tensors}
    layers = [layer for layer in layers if layer.name in source.tensors]
    groups = grouped(layers, memory_bytes)
    ranges = sample.batches(micro_batch)
    count = len(sample.examples)
    finished: list[Unfinished] = []
    with (
        interrupts_between_batches() as interrupted,
        torch.random.fork_rng(devices=[]),
        held_for_measuring(task, model, device, compute_dtype),
    ):
        for number, group in enumerate(groups):
            part = Unfinished(target, {**identity, "group": number}, name=f"{number}.partial")
            if state_seconds is not None:
                part.seconds = state_seconds
            finished.append(part)
            sums = _zeros(group, device)
            found = part.load()
            first = 0
            if found is not None:
                tensors, counters = found
                for layer in group:
                    layer.rows = counters["rows"][layer.name]
                skipped |= counters["skipped"]
                first = counters["batches"]
                if first < len(ranges):
                    sums = {name: torch.from_numpy(tensors[name]).to(device) for name in sums}

            def after(
                batch: int,
                number: int = number,
                group: Sequence[Layer] = group,
                first: int = first,
                part: Unfinished = part,
                sums: dict[str, torch.Tensor] = sums,
                skipped: dict[str, str] = skipped,
            ) -> None:
                done = first + batch + 1
                if progress is not None:
                    progress(number * count + ranges[done - 1].stop, len(groups) * count)
                if done < len(ranges) and (part.is_due or interrupted()):
                    rows = {layer.name: layer.rows for layer in group}
                    part.save(sums, {"batches": done, "rows": rows, "skipped": skipped})
                if interrupted():
                    total = len(groups) * count
                    raise stopped(number * count + ranges[done - 1].stop, total, "graftwork gram", part)

            if first < len(ranges):
                _add_batches(task, model, sample, group, sums, ranges[first:], device, after)
                means = {name: values.astype(np.float32) for name, values in _means(group, sums, skipped).items()}
                rows = {layer.name: layer.rows for layer in group}
                part.save(means, {"batches": len(ranges), "rows": rows, "skipped": skipped})
                del means
    known = [layer for layer in layers if layer.rows]
    facts: dict[str, Any] = {
        "task": task.name,
        "examples": count,
        "seed": seed,
        "bias": "true" if bias else "false",
        "layers": {layer.name: layer.facts() for layer in known},
        "skipped": skipped,
    }
    written: dict[str, Array] = {}
    for part in finished:
        with Checkpoint.open(part.path) as file:
            for name, entry in file.tensors.items():
                written[name] = np.memmap(entry.file, "<f4", "r", entry.start, entry.shape)
    digest = save_artifact(
        target,
        written,
        kind="gram",
        method="gram",
        settings=settings,
        parents=[parent],
        force=force,
        inputs=[source.path],
        **texts(facts),
    )
    written.clear()
    for part in finished:
        part.remove()
    return Measured(target, digest, facts)
