"""`graftwork export RUN OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftwork.cli.output import print_json, print_table
from graftwork.cli.problems import readable_errors
from graftwork.cli.runs import percent


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The model folder to write, or FILE.safetensors.")],
    round_: Annotated[
        str, typer.Option("--round", metavar="ROUND", help="last, best, or the number of a round that is kept.")
    ] = "last",
    site: Annotated[
        str | None, typer.Option("--site", metavar="NAME", help="The model of this site, with what it keeps to itself.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace a model in OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write the model of a federated run as a folder that merge, evaluate and other programs load."""
    with readable_errors():
        from graftwork.federated.export import export_model
        from graftwork.federated.runs import RunFolder

        done = export_model(RunFolder.open(run), out, round=round_, site=site, force=force)
        if as_json:
            print_json(done.record())
            return
        rows = [("output", str(done.path)), ("round", str(done.round))]
        if done.site is not None:
            rows.append(("site", done.site))
        rows += [("accuracy", f"{percent(done.accuracy)} ({done.judged_on})"), ("digest", done.digest)]
        print_table([*rows, *(("note", note) for note in done.notes)])
