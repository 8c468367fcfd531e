"""`graftwork extract-lora MODEL OUT --base BASE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftwork.cli.output import plural, print_json, print_table, size
from graftwork.cli.problems import readable_errors, tell


def extract_lora(
    model: Annotated[Path, typer.Argument(help="The fine-tuned model: a file or a folder.")],
    out: Annotated[Path, typer.Argument(help="The adapter's folder, in PEFT's form.")],
    base: Annotated[Path, typer.Option("--base", help="What the model was fine-tuned from.")],
    rank: Annotated[int, typer.Option("--rank", "--max-rank", min=1, help="Largest rank of a matrix.")] = 128,
    energy: Annotated[
        float | None, typer.Option("--energy", help="Keep the least rank with this share of the squared change.")
    ] = None,
    error: Annotated[
        float | None, typer.Option("--error", help="Keep the least rank with at most this relative error.")
    ] = None,
    epsilon: Annotated[
        float, typer.Option("--sv-epsilon", help="Leave out singular values that are not larger.")
    ] = 0.0,
    embed_lora: Annotated[
        bool, typer.Option("--embed-lora/--no-embed-lora", help="Decompose embeddings instead of storing them whole.")
    ] = False,
    include: Annotated[
        list[str] | None, typer.Option("--include-regex", "-i", metavar="REGEX", help="Modules to decompose.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude-regex", "-e", metavar="REGEX", help="Modules to leave alone.")
    ] = None,
    save_module: Annotated[
        list[str] | None, typer.Option("--save-module", metavar="NAME", help="Modules to store whole.")
    ] = None,
    skip: Annotated[
        bool, typer.Option("--skip-undecomposable", help="Leave out what cannot be put into an adapter.")
    ] = False,
    distribute_scale: Annotated[bool, typer.Option("--distribute-scale/--no-distribute-scale", hidden=True)] = True,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an adapter that exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Extract the LoRA adapter that turns a base into a fine-tuned model, and say how much each rank keeps."""
    with readable_errors():
        from graftwork.merge.extraction import ExtractionSettings, extract_adapter
        from graftwork.merge.reference import open_model

        if not distribute_scale:
            tell("--no-distribute-scale has no effect here: both factors get the root of each singular value")
        settings = ExtractionSettings(
            rank, energy, error, epsilon, embed_lora, tuple(include or ()), tuple(exclude or ()),
            tuple(save_module or ()), skip,
        )  # fmt: skip
        with open_model(model, what="the model") as tuned, open_model(base, what="the base") as plain:
            result = extract_adapter(tuned, plain, out, settings, base_name=str(base), force=force)
        if as_json:
            print_json(
                {
                    "out": str(result.out),
                    "bytes": result.size,
                    "unchanged": result.unchanged,
                    "left_out": result.left_out,
                    "modules": [
                        {"module": item.module, "rank": item.rank, "energy": item.energy, "error": item.error}
                        for item in result.modules
                    ],
                }
            )
            return
        for name in result.left_out:
            tell(f"warning: {name} changed and is not in the adapter")
        print_table(
            [
                (item.module, item.rank or "whole", f"{100 * item.energy:.2f} %", f"{item.error:.2e}")
                for item in result.modules
            ],
            head=("module", "rank", "energy", "error"),
            right=(1, 2, 3),
        )
        print(f"{result.out}: {size(result.size)}; {plural(result.unchanged, 'tensor')} unchanged")
