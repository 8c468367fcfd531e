"""`graftwork runs [FOLDER…]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftwork.cli.output import print_json, print_table, size
from graftwork.cli.problems import readable_errors, tell


def runs(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[FOLDER]...", help="Where to look. [default: here]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List federated runs below a folder: what was run, how far it is, how accurate the model is.

    A run is running, finished, failed (an error ended it), or interrupted (it can be resumed).
    """
    with readable_errors():
        from graftwork.federated.errors import FederationError
        from graftwork.federated.overview import Overview
        from graftwork.federated.runs import RunFolder, find_runs

        places = folders or [Path()]
        found: list[Overview] = []
        for path in find_runs(places):
            try:
                found.append(Overview.of(RunFolder(path)))
            except FederationError as error:
                tell(f"warning: {error}")
        if as_json:
            print_json([item.record() for item in found])
            return
        if not found:
            tell(f"there are no runs below {', '.join(map(str, places))}; graftwork simulate … --out RUN makes one")
            return
        print_table(
            [
                (
                    item.path,
                    item.simulation,
                    item.algorithm,
                    item.aggregate,
                    item.seed,
                    f"{item.rounds}/{item.planned}",
                    item.status,
                    "-" if item.best is None else f"{percent(item.best)} in {item.best_round}",
                    percent(item.last),
                    size(item.bytes),
                )
                for item in found
            ],
            head=("run", "data", "algorithm", "aggregate", "seed", "rounds", "status", "best", "last", "traffic"),
            right=(4, 5, 7, 8, 9),
        )


def percent(value: float | None) -> str:
    """Return a share as percent; a dash where there is none."""
    return "-" if value is None else f"{100 * value:.2f} %"
