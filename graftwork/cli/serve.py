"""`graftwork serve --config federation.toml` and `graftwork keys DIR`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftwork.cli.output import print_json, print_table
from graftwork.cli.problems import readable_errors, tell, usage_error
from graftwork.cli.simulate import _live, _need_flower

if TYPE_CHECKING:
    from graftwork.federated.runs import RunFolder

RUN_FAILED = 3


def serve(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="federation.toml: sites, model, algorithm, where the server is.")
    ] = Path("federation.toml"),
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The run folder, instead of the file's `out`.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the run in it.")] = False,
    resume: Annotated[Path | None, typer.Option("--resume", help="Go on with this run from its newest round.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No lines per round.")] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="What happens, as one JSON object per line on stderr.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a federation of real sites: a Flower SuperLink with TLS and a key per site.

    Makes what keys are missing, waits for the sites (see `graftwork join`), runs all rounds, and ends. Exit code 3: too
    few sites came or answered, or the run failed; go on with --resume.
    """
    if resume is not None and (out is not None or force):
        raise usage_error("--resume RUN goes on in RUN; leave out --out and --force")
    with readable_errors():
        _need_flower()
        from graftwork.federated import log
        from graftwork.federated.configuration import read_federation
        from graftwork.federated.deployment import Deployment, open_run

        said = read_federation(config)
        folder = open_run(said, resume=resume, out=out, force=force)
        again = f"graftwork serve --config {config} --resume {folder.path}"

        def show(line: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
            if log_json:
                log.tell_round(line, timing)
            elif not quiet:
                tell(_live(line, timing, said.experiment))

        def note(line: str) -> None:
            if log_json:
                log.tell("note", text=line)
            elif not quiet:
                tell(line)

        try:
            with log.json_lines() if log_json else nullcontext(), Deployment(said, folder, note) as deployment:
                how = "TLS and a key per site" if deployment.keys is not None else "neither TLS nor keys"
                place = said.server
                note(f"SuperLink on {place.host}, port {place.port}, with {how}; run {folder.path}")
                deployment.submit()
                end = deployment.follow(show)
                if end.is_complete:
                    deployment.close()
                    deployment.clean()
        except KeyboardInterrupt:
            tell(f"go on with {again}")
            raise
        if not end.is_complete:
            for problem in end.problems:
                tell(f"error: {problem}")
            tell(f"go on with {again}")
            raise typer.Exit(RUN_FAILED)
        if as_json:
            print_json({**(folder.summary() or {}), "out": str(folder.path), "lines": folder.metrics()})
            return
        _print(folder)


def keys(
    folder: Annotated[Path, typer.Argument(help="The key folder; what is missing in it is made.")],
    sites: Annotated[str, typer.Option("--sites", help="Names of the sites, with commas between.")],
    hosts: Annotated[
        list[str] | None,
        typer.Option("--host", help="A name or address by which sites call the server. Repeatable."),
    ] = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="The server's port.")] = 9092,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make the keys of a federation: a small authority, the server's certificate, a folder for each site."""
    with readable_errors():
        from graftwork.federated.authority import make_keys

        names = [name.strip() for name in sites.split(",") if name.strip()]
        if not names:
            raise usage_error("--sites names no site; write --sites amsterdam,berlin")
        found = make_keys(folder, names, hosts or [], port=port)
        if as_json:
            record = dataclasses.asdict(found)
            print_json({"folder": str(folder), "made": list(found.made), "sites": sorted(record["sites"])})
            return
        for made in found.made:
            tell(f"made {made}")
        print_table([(site, str(public.parent)) for site, public in found.sites.items()], head=("site", "its folder"))
        tell("give each site its folder, and no other, over a channel that you trust")


def _print(folder: RunFolder) -> None:
    summary = folder.summary() or {}
    rows: list[tuple[str, str]] = [("algorithm", summary["algorithm"]), ("rounds", str(summary["rounds"]))]
    rows.append(("sites", str(len(summary["sites"]))))
    if "accuracy" in summary:
        rows += [("judged on", summary["judged_on"]), ("accuracy", f"{100 * summary['accuracy']:.2f} %")]
    rows += [
        ("model", str(folder.path / "model.safetensors")),
        ("run", str(folder.path)),
        ("report", str(folder.path / "report.html")),
    ]
    print_table(rows)
