"""`graftwork fisher CHECKPOINT --task SPEC -o OUT`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from graftwork.cli.measuring import Common, show_measured, with_common_options

if TYPE_CHECKING:
    from graftwork.merge.statistics import Measured


@with_common_options
def fisher(
    common: Common,
    estimator: Annotated[
        Literal["auto", "exact", "signed", "signed_batch", "sampled", "empirical"],
        typer.Option("--estimator", help="How it is estimated; auto is exact for up to 5 classes, else signed."),
    ] = "auto",
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
) -> None:
    """Measure how much a model's predictions depend on each parameter, for `merge_method: fisher`."""

    def measure(*arguments: Any, **settings: Any) -> Measured:
        from graftwork.merge.statistics import measure_fisher

        return measure_fisher(*arguments, **settings)

    measured = common.run(
        measure, estimator=estimator, outputs=outputs, micro_batch=micro_batch, memory_bytes=memory * 1_000_000,
        dtype=dtype,
    )  # fmt: skip
    show_measured(measured, ("task", "estimator", "examples", "columns", "rows", "classes", "rms"), common.as_json)
