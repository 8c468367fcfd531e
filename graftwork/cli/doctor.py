"""`graftwork doctor OUT`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from graftwork.cli.output import aligned, print_json, print_table
from graftwork.cli.problems import USER_ERROR, readable_errors, tell


def doctor(
    out: Annotated[Path, typer.Argument(help="A model: what a merge wrote, or any other checkpoint.")],
    against: Annotated[
        list[Path] | None,
        typer.Option(
            "--against", metavar="MODEL", help="A model that it was made from, to compare norms with. Repeatable."
        ),
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .pt, .pth, .bin and .ckpt files of --against, as data only.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option("--threads", "-j", min=1, help="CPU threads. [default: all cores]")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say in words what looks wrong with a model; exit 1 if anything is.

    Everything that `verify` checks, and besides: norms by layer against the parents', rows of embedding and head
    against the tokenizer, biases against config.json.
    """
    with readable_errors():
        from graftwork.cli.progress import ByteProgress
        from graftwork.merge.doctor import bytes_to_read, diagnose, part_rows
        from graftwork.merge.reference import open_model
        from graftwork.merge.run import usable_cores
        from graftwork.merge.verify import open_output

        with contextlib.ExitStack() as stack:
            checkpoint = stack.enter_context(open_output(out))
            parents = {}
            for path in against or ():
                opened = stack.enter_context(open_model(path, allow_pickle=allow_pickle, what="--against"))
                parents[str(path)] = opened
            with ByteProgress(bytes_to_read(checkpoint, parents), shown=not quiet, what="examining") as progress:
                found = diagnose(checkpoint, parents, threads=threads or usable_cores(), progress=progress.advance)
        for note in found.notes:
            tell(f"note: {note}")
        if as_json:
            print_json(found.record())
        else:
            for problem in found.problems:
                print(f"wrong: {problem}")
            for oddity in found.oddities:
                print(f"odd: {oddity}")
            head = [
                "part",
                "norm",
                *(["ratio"] if parents else []),
                *(f"cosine to {name}" for name in _short(list(parents))),
            ]
            print_table(part_rows(found), head=head, right=range(1, len(head)))
            print()
            verdict = f"{len(found.problems)} wrong" if found.problems else "nothing wrong"
            odd = f", {len(found.oddities)} odd" if found.oddities else ""
            rows = [
                ["checkpoint", found.verification.path],
                ["tensors", f"{found.verification.tensors:,}"],
                ["parameters", f"{found.verification.values:,}"],
                ["result", f"{verdict}{odd}"],
            ]
            for line in aligned(rows):
                print(line)
        if not found.is_well:
            raise typer.Exit(USER_ERROR)


def _short(paths: list[str]) -> list[str]:
    """Return the last parts of paths, as many as tell them apart."""
    parts = [Path(path).parts for path in paths]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return paths
