"""All commands under one name. Nothing here imports more than typer: `--help` has to be instant."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
import typer.core

from graftwork.cli.barrier import barrier, lmc
from graftwork.cli.demonstration import demo
from graftwork.cli.difference import diff
from graftwork.cli.doctor import doctor
from graftwork.cli.evaluate import evaluate
from graftwork.cli.export import export
from graftwork.cli.extract_lora import extract_lora
from graftwork.cli.fisher import fisher
from graftwork.cli.gram import gram
from graftwork.cli.inspect import inspect
from graftwork.cli.join import join
from graftwork.cli.masks import masks
from graftwork.cli.match import match
from graftwork.cli.merge import merge
from graftwork.cli.methods import methods, schema
from graftwork.cli.plot import plot
from graftwork.cli.runs import runs
from graftwork.cli.serve import keys, serve
from graftwork.cli.simulate import simulate
from graftwork.cli.verify import verify

# Help is plain text here, but where rich is installed typer escapes the brackets of defaults for it: `\[default: 0]`.
typer.core.HAS_RICH = False

app = typer.Typer(
    name="graftwork",
    # Plain help: it can be searched with grep, is as wide as the terminal, and costs no import of rich.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Merge trained checkpoints into one model.",
    epilog="Data goes to stdout, all else to stderr. Exit codes: 0 done, 1 something to put right, 2 wrong usage.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        from graftwork import __version__

        print(f"graftwork {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for command in (
    merge,
    inspect,
    diff,
    methods,
    evaluate,
    match,
    barrier,
    lmc,
    masks,
    fisher,
    gram,
    extract_lora,
    verify,
    doctor,
    schema,
    simulate,
    runs,
    plot,
    export,
    serve,
    keys,
    join,
    demo,
):
    app.command()(command)


def run() -> None:
    """Run the command line with the arguments of this process."""
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks is shown as an escape; it must not end the program.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="graftwork")
