"""`graftwork inspect CHECKPOINT`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftwork.cli.output import aligned, plural, print_json, print_table, size
from graftwork.cli.problems import readable_errors

if TYPE_CHECKING:
    from graftwork.merge.inspect import Amount, Description
    from graftwork.merge.summary import Summary

_LONGEST_VALUE = 160
_SHOWN_FILES = 12


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A .safetensors file or a model folder.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .pt, .pth, .bin and .ckpt files, as data only.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a checkpoint is: its tensors, layers, metadata, and what it was made from.

    Only headers are read; of masks, Fisher and permutation files the values too, to sum them up by layer.
    """
    with readable_errors():
        from graftwork.merge.inspect import describe
        from graftwork.merge.reference import open_model
        from graftwork.merge.summary import summarise

        with open_model(checkpoint, allow_pickle=allow_pickle, allow_quantised=True) as opened:
            description = describe(opened)
            summary = summarise(opened)
            entries = list(opened.tensors.values())
        if as_json:
            record: dict[str, Any] = description.record()
            if summary is not None:
                record["summary"] = summary.record()
            if tensors:
                record["tensor_list"] = [
                    {"name": entry.name, "dtype": entry.dtype, "shape": list(entry.shape), "bytes": entry.size,
                     "file": entry.file.name}
                    for entry in entries
                ]  # fmt: skip
            print_json(record)
            return
        for line in _lines(description):
            print(line)
        if summary is not None:
            print()
            print_summary(summary)
        if tensors:
            print()
            rows = [(entry.name, entry.dtype, _shape(entry.shape), size(entry.size)) for entry in entries]
            print_table(rows, head=("tensor", "dtype", "shape", "size"), right=(3,))


def print_summary(summary: Summary) -> None:
    """Print what values say; shares as percent."""
    texts = [index for index, cell in enumerate(summary.rows[0]) if isinstance(cell, str)] if summary.rows else []
    print_table(
        [[_cell(column, cell) for column, cell in zip(summary.columns, row, strict=True)] for row in summary.rows],
        head=summary.columns,
        right=[index for index in range(len(summary.columns)) if index not in texts],
    )


_SHARES = ("density", "decided", "zeros", "moved", "agreement")


def _cell(column: str, cell: Any) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{100 * cell:.2f} %" if column.startswith(_SHARES) else f"{cell:.4g}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _lines(description: Description) -> list[str]:
    total = description.total
    rows = [
        ["path", description.path],
        ["kind", description.kind],
        ["format", description.form],
        ["tensors", f"{total.tensors:,}"],
        ["parameters", f"{total.parameters:,}"],
        ["size", size(total.bytes)],
    ]
    rows += [["dtype", f"{name}: {_amount(amount)}"] for name, amount in description.dtypes.items()]
    if len(description.files) > 1:
        files = list(description.files.items())
        rows += [["file", f"{name}: {_amount(amount)}"] for name, amount in files[:_SHOWN_FILES]]
        if len(files) > _SHOWN_FILES:
            rows.append(["file", f"and {len(files) - _SHOWN_FILES} more"])
    for stack in description.stacks:
        alike = "" if stack.uniform else ", not all alike"
        rows.append(["layers", f"{stack.count} under {stack.prefix or 'no prefix'}{alike}"])
    rows += [["config", f"{key} = {_short(value)}"] for key, value in description.architecture.items()]
    if description.method is not None:
        rows.append(["method", description.method])
    if description.recipe_digest is not None:
        rows.append(["recipe", f"{_short(_recipe_text(description.recipe))} (digest {description.recipe_digest})"])
    if description.digest is not None:
        rows.append(["digest", f"{description.digest} (as written; graftwork verify computes it)"])
    rows += [
        ["metadata", f"{key} = {_short(value)}"]
        for key, value in description.metadata.items()
        if not key.startswith("graftwork.")
    ]
    rows += [["note", note] for note in description.notes]
    lines = aligned(rows)
    if description.tree:
        lines += ["", "made from", *(f"  {line}" for line in description.tree)]
    return lines


def _recipe_text(recipe: Any) -> str:
    import json

    return recipe if isinstance(recipe, str) else json.dumps(recipe, ensure_ascii=False)


def _amount(amount: Amount) -> str:
    return f"{plural(amount.tensors, 'tensor')}, {plural(amount.parameters, 'parameter')}, {size(amount.bytes)}"


def _short(value: Any) -> str:
    """Return a value on one line, cut where it is long; --json has all of it."""
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"
