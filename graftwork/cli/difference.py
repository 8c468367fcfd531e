"""`graftwork diff A B`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftwork.cli.inspect import print_summary
from graftwork.cli.output import plural, print_json, print_table
from graftwork.cli.problems import readable_errors, tell

if TYPE_CHECKING:
    from graftwork.merge.difference import Difference, Sums, TensorDifference
    from graftwork.merge.summary import Summary


def diff(
    a: Annotated[Path, typer.Argument(help="A checkpoint; changes are relative to it.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    top: Annotated[int, typer.Option("--top", min=0, metavar="N", help="List the N tensors that changed most.")] = 20,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Draw the relative change by depth into this PNG.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", "-j", min=1, help="CPU threads. [default: all cores]")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .pt, .pth, .bin and .ckpt files, as data only.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all tensors.")] = False,
) -> None:
    """Compare two checkpoints, tensor by tensor and layer by layer.

    The relative change is |A - B| / |A| (Euclidean norms), the cosine that of the angle between A and B. Two masks are
    compared by the values on which they agree, two Fisher files by correlation and overlap.
    """
    with readable_errors():
        from graftwork.cli.progress import ByteProgress
        from graftwork.merge.difference import compare, compared_bytes
        from graftwork.merge.reference import open_model
        from graftwork.merge.run import usable_cores
        from graftwork.merge.summary import compare_files

        with (
            open_model(a, allow_pickle=allow_pickle, allow_quantised=True) as left,
            open_model(b, allow_pickle=allow_pickle, allow_quantised=True) as right,
        ):
            total = compared_bytes(left, right)
            with ByteProgress(total, shown=not quiet, what="comparing") as progress:
                difference = compare(left, right, threads=threads or usable_cores(), progress=progress.advance)
            comparison = compare_files(left, right)
        if picture is not None:
            from graftwork.merge.pictures import depth_picture

            changes = {item.name: item.sums.relative for item in difference.tensors if item.sums is not None}
            depth_picture(
                changes, picture, title=f"From {_name(a)} to {_name(b)}", subtitle="‖A − B‖ / ‖A‖ of each tensor"
            )
            tell(f"picture: {picture}")
        if as_json:
            more = {} if comparison is None else {"kind": comparison.kind, "comparison": comparison.record()}
            print_json({"a": str(a), "b": str(b), **difference.record(), **more})
            return
        _print(difference, a, b, top, comparison)


def _name(path: Path) -> str:
    return path.resolve().name


def _print(difference: Difference, a: Path, b: Path, top: int, comparison: Summary | None) -> None:
    same = sum(item.is_identical for item in difference.tensors)
    print_table(
        [
            ("A", a),
            ("B", b),
            ("identical", "yes" if difference.is_identical else "no"),
            ("in both", f"{plural(len(difference.tensors), 'tensor')}, {same:,} identical"),
            *([("change", f"{_change(difference.total)} in all, cosine {_cosine(difference.total)}")] if same < len(
                difference.tensors) else []),
            *(("only in A", name) for name in difference.only_a),
            *(("only in B", name) for name in difference.only_b),
            *(
                ("not alike", f"{item.name}: {item.dtype_a} {list(item.shape_a)}, {item.dtype_b} {list(item.shape_b)}")
                for item in difference.incomparable
            ),
        ]
    )  # fmt: skip
    if comparison is not None:
        print()
        print_summary(comparison)
        return
    changed = [item for item in difference.by_change() if not item.is_identical]
    if not changed:
        return
    print()
    print_table(
        [
            (layer.layer or "outside", layer.tensors, _change(layer.sums), _cosine(layer.sums), layer.largest)
            for layer in difference.layers
        ],
        head=("layer", "tensors", "change", "cosine", "changed most"),
        right=(1, 2, 3),
    )
    if top:
        print()
        print_table(
            [_row(item) for item in changed[:top]],
            head=("tensor", "dtype", "|A|", "|B|", "|A - B|", "change", "cosine", "entries that differ"),
            right=(2, 3, 4, 5, 6, 7),
        )
    if top < len(changed):
        tell(f"{len(changed) - top} more changed; --top {len(changed)} lists all")


def _row(item: TensorDifference) -> tuple[object, ...]:
    dtype = item.dtype_a if item.dtype_a == item.dtype_b else f"{item.dtype_a}/{item.dtype_b}"
    sums = item.sums
    if sums is None:
        return (item.name, dtype, "-", "-", "-", "-", "-", f"{item.differing:,}")
    norms = (f"{value:.6g}" for value in (sums.norm_a, sums.norm_b, sums.norm_difference))
    return (item.name, dtype, *norms, _change(sums), _cosine(sums), f"{item.differing:,}")


def _change(sums: Sums) -> str:
    return f"{100 * sums.relative:.4g} %"


def _cosine(sums: Sums) -> str:
    return "-" if sums.cosine is None else f"{sums.cosine:.6f}"
