"""`graftwork gram CHECKPOINT --task SPEC -o OUT`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftwork.cli.fisher import (
    AllowPickle,
    AsJson,
    CheckpointPath,
    ComputeDtype,
    Device,
    Examples,
    Force,
    Out,
    Quiet,
    Seed,
    Spec,
    Threads,
    run_measurement,
    show_measured,
)
from graftwork.cli.problems import tell

if TYPE_CHECKING:
    from graftwork.merge.checkpoint import Checkpoint
    from graftwork.merge.statistics import Measured
    from graftwork.merge.task import Task


def gram(
    checkpoint: CheckpointPath,
    task: Spec = None,
    out: Out = None,
    examples: Examples = None,
    seed: Seed = 0,
    bias: Annotated[
        bool, typer.Option("--bias/--no-bias", help="Solve for biases with the weights; else they are averaged.")
    ] = True,
    micro_batch: Annotated[int, typer.Option("--micro-batch", min=1, help="Examples at once.")] = 32,
    memory: Annotated[int, typer.Option("--memory", min=1, help="What the sums of one pass may take, in MB.")] = 1000,
    compute_dtype: ComputeDtype = "module",
    device: Device = "cpu",
    threads: Threads = None,
    force: Force = False,
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure the Gram matrices of what enters each layer, for `merge_method: regmean`."""

    def measure(source: Checkpoint, chosen: Task, target: Path, progress: Callable[[int, int], None]) -> Measured:
        from graftwork.merge.statistics import measure_gram

        return measure_gram(
            source,
            chosen,
            target,
            examples=examples,
            seed=seed,
            bias=bias,
            micro_batch=micro_batch,
            memory_bytes=memory * 1_000_000,
            compute_dtype=compute_dtype,
            device=device,
            force=force,
            progress=progress,
        )

    measured = run_measurement(measure, checkpoint, task, out, device, threads, allow_pickle, quiet)
    layers = measured.facts["layers"]
    thin = [name for name, facts in layers.items() if facts["rows"] < facts["columns"]]
    if thin:
        tell(
            f"warning: {len(thin)} of {len(layers)} layers saw fewer rows than they have inputs, first {thin[0]}: "
            f"{layers[thin[0]]['rows']} for {layers[thin[0]]['columns']}; more examples make a better merge"
        )
    if as_json:
        show_measured(measured, (), as_json)
        return
    show_measured(measured, ("task", "examples", "seed"), as_json)
