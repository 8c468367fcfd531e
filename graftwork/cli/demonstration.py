"""`graftwork demo`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from graftwork.cli.output import print_json
from graftwork.cli.problems import readable_errors, tell

_UNLIMITED = 10_000
"""Columns where output is no terminal: a table must not be cut there."""


def demo(
    out: Annotated[Path, typer.Option("--out", help="The folder for everything that it makes.")] = Path("demo"),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Equal seeds give equal files.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier demo.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train a base and three specialists on digits, merge them with every method, and compare.

    Takes about a minute and downloads nothing.
    """
    with readable_errors():
        from graftwork.cli.demo import record, run_demo, table

        result = run_demo(out, seed=seed, force=force, progress=None if quiet else tell)
        if as_json:
            print_json(record(result))
            return
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else _UNLIMITED, highlight=False).print(table(result))
        tell(f"picture: {result.picture}")
