"""What `graftwork merge --dry-run` prints: what would be done, and everything odd about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.cli.output import aligned, plural, print_json, size
from graftwork.cli.problems import tell

if TYPE_CHECKING:
    from graftwork.merge.engine import Step
    from graftwork.merge.plan import Options, Plan
    from graftwork.merge.recipe import Recipe, RecipeFile
    from graftwork.merge.run import Settings

_SHOWN_NAMES = 4

Record = dict[str, Any]


def print_plans(
    file: RecipeFile, out: Path | None, options: Options, settings: Settings, *, as_json: bool, everything: bool
) -> None:
    """Print the plan of every document whose inputs exist.

    Args:
        file: The recipe.
        out: Where the output would go; it is checked as for a merge.
        options: As for a merge.
        settings: As for a merge.
        as_json: Print JSON.
        everything: Name every tensor.
    """
    from graftwork.merge.hub import localised
    from graftwork.merge.plan import make_plan
    from graftwork.merge.preparation import stages
    from graftwork.merge.run import check_places

    if out is not None:
        check_places(file, out, settings)
    records: list[Record] = []
    for written in file.recipes:
        recipe = localised(written, options.hub(tell))
        needed = [reference.step for reference in recipe.inputs if reference.step]
        if needed:
            records.append(_later(recipe, needed))
            continue
        plan = make_plan(recipe, options)
        try:
            record = plan_record(plan, settings.threads)
        finally:
            plan.close()
        if out is not None:
            folder = settings.prepared_folder(out, recipe.name if len(file.recipes) > 1 else None)
            record["first"] = [
                {"what": stage.what, "path": str(stage.path), "made": stage.is_made}
                for stage in stages(recipe, folder, options=options)
            ]
        records.append(record)
    if as_json:
        print_json({"out": str(out) if out else None, "plans": records})
        return
    for number, record in enumerate(records):
        if number:
            print()
        for line in plan_lines(record, everything=everything):
            print(line)


def _later(recipe: Recipe, needed: list[str]) -> Record:
    return {
        "name": recipe.name,
        "method": recipe.method,
        "needs": needed,
        "inputs": [{"model": reference.text} for reference in recipe.inputs],
        "warnings": list(recipe.warnings),
    }


def plan_record(plan: Plan, threads: int | None) -> Record:
    """Return a plan for JSON. It has to be asked for before the plan is carried out."""
    from graftwork.merge.run import usable_cores

    # A step has notes before the run only if it takes over one model's tensor.
    copied = [step for step in plan.steps if step.program is None or step.notes]
    merged = [step for step in plan.steps if not (step.program is None or step.notes)]
    base = plan.recipe.base
    return {
        "name": plan.recipe.name,
        "method": plan.recipe.method,
        "title": plan.method.title,
        "inputs": [
            {
                "model": label,
                "path": str(checkpoint.path),
                "is_base": base is not None and reference == base,
                "is_donor": number == plan.donor,
                "tensors": len(checkpoint.tensors),
                "bytes": sum(entry.size for entry in checkpoint.tensors.values()),
                **origin,
            }
            # Files of what was measured or learned come after the models, and have no reference.
            for number, (label, checkpoint, reference, origin) in enumerate(
                zip(plan.labels, plan.checkpoints, _references(plan), plan.origins(), strict=False)
            )
        ],
        "tensors": {"merged": len(merged), "copied": len(copied), "dropped": len(plan.dropped)},
        "parameters": plan.elements,
        "dtypes": dict(Counter(step.dtype for step in plan.steps)),
        "merged": [_entry(step) for step in merged],
        "copied": [
            {**_entry(step), "from": plan.labels[step.inputs[0].model], "reason": "; ".join(step.notes) or "as it is"}
            for step in copied
        ],
        "dropped": [
            {"name": item.entry.name, "from": plan.labels[item.model], "reason": item.reason} for item in plan.dropped
        ],
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "peak_memory": plan.peak_memory(threads or usable_cores()),
        "warnings": list(plan.warnings),
    }


def _references(plan: Plan) -> list[Any]:
    inputs = list(plan.recipe.inputs)
    return inputs if plan.recipe.donor in inputs else [*inputs, plan.recipe.donor]


def _entry(step: Step) -> Record:
    return {"name": step.name, "dtype": step.dtype, "shape": list(step.shape)}


def plan_lines(record: Record, *, everything: bool = False) -> list[str]:
    """Return a plan as text.

    Args:
        record: What `plan_record` returned.
        everything: Name every tensor, not only the first few of each kind.
    """
    if "needs" in record:
        rows = [
            *([["name", record["name"]]] if record["name"] else []),
            ["method", record["method"]],
            ["needs", f"{', '.join(record['needs'])}, which does not exist yet: planned when it does"],
        ]
        return [*aligned(rows), *(f"warning: {warning}" for warning in record["warnings"])]
    tensors = record["tensors"]
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in sorted(record["dtypes"].items()))
    rows = [
        *([["name", record["name"]]] if record["name"] else []),
        ["method", f"{record['method']} ({record['title']})"],
        *(
            [
                "input",
                f"{item['model']}{_origin(item)}: {plural(item['tensors'], 'tensor')}, {size(item['bytes'])}"
                f"{_roles(item)}",
            ]
            for item in record["inputs"]
        ),
        *(
            ["first", f"{item['what']}: {item['path']}{' is up to date' if item['made'] else ' will be made'}"]
            for item in record.get("first", ())
        ),
        [
            "output",
            f"{plural(sum(record['dtypes'].values()), 'tensor')} ({dtypes}), {record['parameters']:,} parameters",
        ],
        ["merged", plural(tensors["merged"], "tensor")],
    ]
    if everything:
        rows += [["", f"{item['name']} {item['dtype']} {item['shape']}"] for item in record["merged"]]
    for kind in ("copied", "dropped"):
        rows.append([kind, plural(tensors[kind], "tensor")])
        rows += [["", line] for line in _reasons(record[kind], everything)]
    rows += [
        ["reads", size(record["bytes_read"])],
        ["writes", size(record["bytes_written"])],
        ["memory", f"about {size(record['peak_memory'])} of buffers"],
    ]
    return [*aligned(rows), *(f"warning: {warning}" for warning in record["warnings"])]


def _origin(item: Record) -> str:
    """Return the commit of an input that is a repository of the hub."""
    return f" ({item['repository']} at {item['commit'][:12]})" if "repository" in item else ""


def _roles(item: Record) -> str:
    roles = [
        *(["the base"] if item["is_base"] else []),
        *(["gives configuration and side files"] if item["is_donor"] else []),
    ]
    return f"; {', '.join(roles)}" if roles else ""


def _reasons(items: Iterable[Record], everything: bool) -> list[str]:
    """Return one line per reason and model, with the names it is about."""
    names: dict[tuple[str, str], list[str]] = {}
    for item in items:
        names.setdefault((item["from"], item["reason"]), []).append(item["name"])
    lines = []
    for (model, reason), found in names.items():
        shown = found if everything else found[:_SHOWN_NAMES]
        more = f" and {len(found) - len(shown)} more" if len(found) > len(shown) else ""
        lines.append(f"from {model}, {reason}: {', '.join(shown)}{more}")
    return lines
