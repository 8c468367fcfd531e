"""`graftwork gram CHECKPOINT --task SPEC -o OUT`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftwork.cli.measuring import Common, show_measured, with_common_options
from graftwork.cli.problems import tell

if TYPE_CHECKING:
    from graftwork.merge.statistics import Measured


@with_common_options
def gram(
    common: Common,
    bias: Annotated[
        bool, typer.Option("--bias/--no-bias", help="Solve for biases with the weights; else they are averaged.")
    ] = True,
    micro_batch: Annotated[int, typer.Option("--micro-batch", min=1, help="Examples at once.")] = 32,
    memory: Annotated[int, typer.Option("--memory", min=1, help="What the sums of one pass may take, in MB.")] = 1000,
) -> None:
    """Measure the Gram matrices of what enters each layer, for `merge_method: regmean`."""

    def measure(*arguments: Any, **settings: Any) -> Measured:
        from graftwork.merge.statistics import measure_gram

        return measure_gram(*arguments, **settings)

    measured = common.run(measure, bias=bias, micro_batch=micro_batch, memory_bytes=memory * 1_000_000)
    layers = measured.facts["layers"]
    thin = [name for name, facts in layers.items() if facts["rows"] < facts["columns"]]
    if thin:
        tell(
            f"warning: {len(thin)} of {len(layers)} layers saw fewer rows than they have inputs, first {thin[0]}: "
            f"{layers[thin[0]]['rows']} for {layers[thin[0]]['columns']}; more examples make a better merge"
        )
    show_measured(measured, () if common.as_json else ("task", "examples", "seed"), common.as_json)
