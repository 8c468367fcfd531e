"""`graftwork verify OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftwork.cli.output import aligned, print_json
from graftwork.cli.problems import USER_ERROR, readable_errors, tell


def verify(
    out: Annotated[Path, typer.Argument(help="What a merge wrote, or any other safetensors checkpoint.")],
    sha256: Annotated[bool, typer.Option("--sha256", help="Print the SHA-256 of every file too.")] = False,
    threads: Annotated[
        int | None, typer.Option("--threads", "-j", min=1, help="CPU threads. [default: all cores]")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read a checkpoint and say what is wrong with it; exit 1 if anything is.

    Its content is compared with the digest that was written into it, all values have to be finite, and index,
    config.json and tensors have to agree.
    """
    with readable_errors():
        from graftwork.cli.progress import ByteProgress
        from graftwork.merge.run import usable_cores
        from graftwork.merge.verify import open_output, sha256_bytes, sha256_sums
        from graftwork.merge.verify import verify as run_verify

        with open_output(out) as checkpoint:
            total = sum(entry.size for entry in checkpoint.tensors.values()) + (sha256_bytes(out) if sha256 else 0)
            with ByteProgress(total, shown=not quiet, what="verifying") as progress:
                found = run_verify(checkpoint, threads=threads or usable_cores(), progress=progress.advance)
                sums = sha256_sums(out, progress.advance) if sha256 else {}
        for note in found.notes:
            tell(f"note: {note}")
        if as_json:
            print_json({**found.record(), **({"sha256": sums} if sha256 else {})})
        else:
            for problem in found.problems:
                print(f"problem: {problem}")
            compared = "as its metadata say" if found.expected == found.digest else "computed now"
            rows = [
                ["checkpoint", found.path],
                ["tensors", f"{found.tensors:,}"],
                ["parameters", f"{found.values:,}"],
                ["digest", f"{found.digest} ({compared})"],
                ["result", "sound" if found.is_sound else f"{len(found.problems)} wrong"],
            ]
            for line in aligned(rows):
                print(line)
            for name, value in sums.items():
                print(f"{value}  {name}")
        if not found.is_sound:
            raise typer.Exit(USER_ERROR)
