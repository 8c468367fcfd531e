"""`graftwork plot RUN…`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from graftwork.cli.output import print_json, print_table, size
from graftwork.cli.problems import readable_errors, tell, usage_error
from graftwork.cli.runs import percent

if TYPE_CHECKING:
    from graftwork.federated.overview import Overview
    from graftwork.federated.runs import RunFolder


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Draw the curves into this PNG.")] = None,
    metric: Annotated[
        Literal["accuracy", "loss", "bytes"],
        typer.Option("--metric", help="bytes: traffic so far, and accuracy against it."),
    ] = "accuracy",
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace the picture if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all points.")] = False,
) -> None:
    """Compare federated runs: a table, and with --out a picture with a curve per run.

    Runs are called by what differs between their configurations.
    """
    if out is not None and out.suffix.lower() != ".png":
        raise usage_error(f"--out {out}: the picture is a PNG; let its name end in .png")
    with readable_errors():
        from graftwork.federated.errors import FederationError
        from graftwork.federated.overview import Overview, differences, labels, points
        from graftwork.federated.runs import RunFolder, find_runs
        from graftwork.merge.errors import OutputError

        if out is not None and out.exists() and not force:
            raise OutputError(f"cannot write {out}: it exists; choose another place, or replace it with --force")
        for path in runs:
            inside = find_runs([path]) if path.is_dir() else []
            if inside and inside != [path]:
                raise FederationError(
                    f"{path} is no run but a folder of runs; give these: {' '.join(map(str, inside[:8]))}"
                    + (" …" if len(inside) > 8 else "")
                )
        folders = [RunFolder.open(path) for path in dict.fromkeys(runs)]
        overviews = [Overview.of(folder) for folder in folders]
        differing = differences(folders)
        names = labels(folders, differing)
        curves = [points(folder.metrics(), metric) for folder in folders]
        for name, values in zip(names, curves, strict=True):
            if not values:
                tell(f"warning: {name}: no round has {'an ' if metric == 'accuracy' else 'a '}{_WORDS[metric]}")
        if out is not None:
            _draw(out, metric, folders, names, curves)
        if as_json:
            print_json(
                {
                    "metric": metric,
                    "picture": None if out is None else str(out),
                    "runs": [
                        {"label": name, "differs": held, **item.record(), "points": values}
                        for name, held, item, values in zip(names, differing, overviews, curves, strict=True)
                    ],
                }
            )
            return
        _print(overviews, differing)


_WORDS = {"accuracy": "accuracy", "loss": "loss", "bytes": "traffic"}


def _draw(
    out: Path,
    metric: Literal["accuracy", "loss", "bytes"],
    folders: Sequence[RunFolder],
    names: Sequence[str],
    curves: Sequence[Sequence[tuple[int, float]]],
) -> None:
    from graftwork.federated.errors import FederationError
    from graftwork.federated.overview import curve
    from graftwork.merge.pictures import Line, Panel, line_picture

    if not any(curves):
        raise FederationError(f"cannot draw {out}: no run has a round with {_WORDS[metric]}")
    drawn = [
        Line(name, [(x, y / 1e6 if metric == "bytes" else y) for x, y in values])
        for name, values in zip(names, curves, strict=True)
    ]
    up = {"accuracy": "accuracy", "loss": "loss", "bytes": "MB sent and received"}[metric]
    panels = [Panel(drawn, "round", up, is_share=metric == "accuracy", at_zero=metric != "accuracy")]
    if metric == "bytes":
        against = []
        for folder, line in zip(folders, drawn, strict=True):
            traffic: dict[float, float] = dict(line.points)
            held = [(traffic[number], value) for number, value in curve(folder.metrics(), "accuracy")]
            against.append(Line(line.label, held))
        panels.append(Panel(against, "MB sent and received", "accuracy", is_share=True))
    targets = {folder.experiment().federation.target for folder in folders}
    on = f"on the test data of {targets.pop()}" if len(targets) == 1 and None not in targets else "on test data"
    title = {"accuracy": "Accuracy after each round", "loss": "Loss after each round", "bytes": "Traffic"}[metric]
    line_picture(panels, out, title=title, subtitle="" if metric == "bytes" else on[:1].upper() + on[1:])
    tell(f"picture: {out}")


def _print(overviews: Sequence[Overview], differing: Sequence[Mapping[str, str]]) -> None:
    keys = sorted({key for held in differing for key in held}, key=lambda key: (key != "algorithm", key))
    rows: list[tuple[Any, ...]] = [
        (
            item.path,
            *(held.get(key, "") for key in keys),
            f"{item.rounds}/{item.planned}",
            item.status,
            "-" if item.best is None else f"{percent(item.best)} in {item.best_round}",
            percent(item.last),
            percent(item.mean_of_last),
            "-" if item.loss is None else f"{item.loss:.4f}",
            size(item.bytes),
        )
        for item, held in zip(overviews, differing, strict=True)
    ]
    head = ("run", *keys, "rounds", "status", "best", "last", "mean of last 5", "training loss", "traffic")
    first = 1 + len(keys)
    print_table(rows, head=head, right=(first, *range(first + 2, first + 7)))
