"""`graftwork match A B -o OUT`."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from graftwork.cli.output import plural, print_json, print_table
from graftwork.cli.problems import readable_errors, tell, usage_error
from graftwork.cli.progress import ByteProgress

if TYPE_CHECKING:
    from graftwork.merge.alignment.match import AlignmentResult
    from graftwork.merge.alignment.matching import MatchingProgress

Method = Literal["weights", "activations", "ste"]

_QUIET_SECONDS = 2.0
_LINE_SECONDS = 10.0
_SHOWN_AXES = 12


def match(
    a: Annotated[Path, typer.Argument(help="The model that stays.")],
    b: Annotated[Path, typer.Argument(help="The model whose units are re-ordered.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The re-ordered model: a folder, or FILE.safetensors.")
    ] = None,
    method: Annotated[
        Method, typer.Option("--method", "-m", help="What is matched; all but weights need a task.")
    ] = "weights",
    task: Annotated[
        str | None, typer.Option("--task", "-t", metavar="SPEC", help="file.py:name or package.module:name.")
    ] = None,
    spec: Annotated[
        Path | None, typer.Option("--spec", metavar="FILE", help="What may be re-ordered, as JSON. [default: by names]")
    ] = None,
    module: Annotated[
        str | None,
        typer.Option("--module", metavar="SPEC", help="file.py:make, returning (module, example inputs) to trace."),
    ] = None,
    family: Annotated[str | None, typer.Option("--family", help="Family of the network. [default: by names]")] = None,
    residual: Annotated[
        bool, typer.Option("--residual", help="Re-order the residual stream of a transformer, too.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the order in which groups are visited.")] = 0,
    restarts: Annotated[int, typer.Option("--restarts", min=1, metavar="N", help="Searches; the best counts.")] = 1,
    permutation: Annotated[
        Path | None,
        typer.Option("--permutation", metavar="FILE", help="Where the permutation goes. [default: beside OUT]"),
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", metavar="FILE", help="Write the report as JSON.")] = None,
    device: Annotated[str, typer.Option("--device", help="Where scores are formed, as torch names it.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option("--threads", "-j", min=1, help="CPU threads of torch. [default: torch's own]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace outputs that exist.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Do not go on with an unfinished output.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .pt, .pth, .bin and .ckpt files, as data only.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Re-order the units of B so that they match those of A; B computes the same as before."""
    if out is None:
        raise usage_error("--out is missing: a folder, or FILE.safetensors")
    if sum(item is not None for item in (spec, module, family)) > 1:
        raise usage_error("--spec, --module and --family exclude each other")
    if method != "weights" and task is None:
        raise usage_error(f"--method {method} needs --task: file.py:name or package.module:name")
    if method != "weights" and restarts > 1:
        raise usage_error(f"--restarts is for --method weights, not {method}")
    with readable_errors(), contextlib.ExitStack() as stack:
        from graftwork.merge.alignment.match import align_checkpoints, find_spec, total_bytes
        from graftwork.merge.reference import open_model
        from graftwork.merge.task import load_task

        first, second = (
            stack.enter_context(open_model(path, allow_pickle=allow_pickle, what=name))
            for path, name in ((a, "A"), (b, "B"))
        )
        loaded = load_task(task, checkpoint=first.path) if task is not None else None
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        found = find_spec(first, file=spec, module=module, family=family, task=loaded, residual=residual)
        if report is not None:
            _check_report(report, force=force)
        writing = ByteProgress(total_bytes(second), shown=not quiet, what="writing")

        def written(count: int) -> None:
            if writing.done == 0:  # the search before it has lines of its own
                stack.enter_context(writing)
            writing.advance(count)

        result = align_checkpoints(
            first,
            second,
            out,
            found,
            method=method,
            task=loaded,
            permutation_file=permutation,
            seed=seed,
            restarts=restarts,
            device=device,
            force=force,
            restart=restart,
            progress=None if quiet else matching_lines(restarts),
            written=written,
        )
        if report is not None:
            report.write_text(json.dumps(result.record(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if as_json:
            print_json(result.record())
        else:
            _print(result)


def matching_lines(restarts: int) -> Callable[[MatchingProgress], None]:
    """Return what says every ten seconds how far the search is."""
    started = last = time.monotonic()

    def show(state: MatchingProgress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - started < _QUIET_SECONDS or (last > started and now - last < _LINE_SECONDS):
            return
        last = now
        of = f"search {state.restart + 1} of {restarts}, " if restarts > 1 else ""
        tell(f"matching: {of}sweep {state.sweep}, {plural(state.solves, 'assignment')}")

    return show


def _check_report(path: Path, *, force: bool) -> None:
    """Refuse a place for the report before any work is done."""
    from graftwork.merge.errors import OutputError

    if path.exists() and (not force or not path.is_file()):
        raise OutputError(f"cannot write {path}: it exists; choose another place, or replace it with --force")
    path.parent.mkdir(parents=True, exist_ok=True)


def _print(result: AlignmentResult) -> None:
    matching = result.matching
    print(f"aligned      {result.out}")
    print(f"permutation  {result.permutation_file}")
    print(f"spec         {result.spec.source or 'given'}, {plural(len(result.groups), 'group')}")
    print(
        f"distance     {matching.distance_before:.6g} before, {matching.distance_after:.6g} after "
        f"({matching.distance_ratio:.4f})"
    )
    print()
    print_table(
        [
            (
                group.name,
                f"{group.blocks} × {group.size}" if group.blocks > 1 else group.size,
                "-" if group.gain is None or group.pinned else f"{group.gain:.4g}",
                "pinned" if group.pinned else f"{100 * group.moved:.1f} %",
            )
            for group in result.groups
        ],
        head=("group", "units", "gain", "moved"),
        right=(1, 2, 3),
    )
    pinned = [(group.name, group.pinned) for group in result.groups if group.pinned]
    reasons: dict[str, list[str]] = {}
    for (tensor, axis), why in result.spec.pinned.items():
        reasons.setdefault(why, []).append(f"{tensor} axis {axis}")
    if pinned or reasons:
        print()
    for name, why in pinned:
        print(f"pinned: {name}: {why}")
    for why, places in reasons.items():
        more = f" and {len(places) - _SHOWN_AXES} more" if len(places) > _SHOWN_AXES else ""
        print(f"fixed: {', '.join(places[:_SHOWN_AXES])}{more}: {why}")
