"""How well one merged model does the work of four or eight: merge methods on the suites of `suites.py`.

    python benchmarks/multitask.py WORK [--suites mlp4 mlp8 vit8] [--seeds 0 1 2] [--rows NAME …] [--table]

Every cell of the table (suite, row, seed) is computed once and kept as `WORK/multitask/SUITE/ROW-SEED.json`, so that an
interrupted run goes on where it stopped; `--table` only prints what there is. Models are merged by the engine, as
`graftwork merge` does it, from files. Learned rows use unlabelled *training* inputs; all are judged on test inputs.
Everything runs on one thread; seconds are CPU seconds of the measuring or learning and of the merge.

At the end come the bars: what a change must not break. Exit code 1 if one of them does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from suites import DESIGNS, Suite, load_suite

from graftwork.merge import Settings, evaluate, load_recipe, merge
from graftwork.merge.errors import GraftworkError
from graftwork.merge.methods import registry


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table.

    Args:
        title: Its name in the table.
        method: The merge method; empty for models as they are.
        parameters: Its parameters.
        weight: Parameters that each model has.
        learning: Settings of `learn_merge`, if something is learned first.
        measured: Whether something is measured on the tasks' data first.
        seeds: How many seeds are worth their time.
    """

    title: str
    method: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    weight: Mapping[str, Any] = field(default_factory=dict)
    learning: Mapping[str, Any] | None = None
    measured: bool = False
    seeds: int = 1


def _learned(
    title: str, parametrisation: str, seeds: int = 3, use: Mapping[str, Any] | None = None, **more: Any
) -> Row:
    from graftwork.merge.subspace import METHODS

    learning = {"parametrisation": parametrisation, **more}
    return Row(title, METHODS[parametrisation], use or {}, learning=learning, seeds=seeds)


ROWS: Mapping[str, Row] = {
    "base": Row("base"),
    "average": Row("average", "linear", {}, {"weight": 1.0}),
    "task_arithmetic": Row("task arithmetic 0.3", "task_arithmetic", {"lambda": 0.3}, {"weight": 1.0}),
    "ties": Row(
        "TIES 0.3", "ties", {"lambda": 0.3, "density": 0.2, "normalize": False, "scope": "model"}, {"weight": 1.0}
    ),
    "tsv_m": Row("TSV-M", "tsv_m"),
    "iso_c": Row("Iso-C", "iso_c"),
    "fisher": Row("Fisher", "fisher", measured=True),
    "regmean": Row("RegMean", "regmean", measured=True),
    "task_wise": _learned("AdaMerging, task-wise", "task_wise", 1),
    "layer_wise": _learned("AdaMerging, layer-wise", "layer_wise"),
    "mask": _learned("Concrete task arithmetic", "mask"),
    "bilevel": _learned("Concrete AdaMerging, two levels", "mask+layer_wise", 1, schedule="bilevel", steps=500),
    "mask+layer_wise": _learned("Concrete AdaMerging, one loop", "mask+layer_wise"),
    "layer_wise_entropy": _learned("AdaMerging, layer-wise, entropy", "layer_wise", 1, loss="entropy"),
    "mask_entropy": _learned("Concrete task arithmetic, entropy", "mask", 1, loss="entropy"),
    "mask_decided": _learned("Concrete task arithmetic, rate 0.1", "mask", 1, learning_rate=0.1),
    "mask_binary": _learned(
        "Concrete task arithmetic, rate 0.1, binary", "mask", 1, {"mask_kind": "threshold"}, learning_rate=0.1
    ),
    "mask_im": _learned("Concrete task arithmetic, im", "mask", 1, loss="im"),
    "fine-tuned": Row("fine-tuned"),
}

BARS = (
    ("mask over task arithmetic", "mask", "task_arithmetic", {"mlp4": 4, "mlp8": 12, "vit8": 14}),
    ("mask + layer-wise over task arithmetic", "mask+layer_wise", "task_arithmetic",
     {"mlp4": 5, "mlp8": 15, "vit8": 18}),
    ("mask + layer-wise against fine-tuned", "mask+layer_wise", "fine-tuned", dict.fromkeys(DESIGNS, -5)),
    ("mask against layer-wise", "mask", "layer_wise", {"mlp4": -0.5, "mlp8": 5, "vit8": -0.5}),
    ("binary mask against expected, both at rate 0.1", "mask_binary", "mask_decided", dict.fromkeys(DESIGNS, -3)),
    ("mask + layer-wise against mask", "mask+layer_wise", "mask", dict.fromkeys(DESIGNS, -0.5)),
)  # fmt: skip
"""Name, row, compared with row, points that the first has to be above the second (mean of seeds)."""


def cell_path(work: Path, suite: str, row: str, seed: int) -> Path:
    """Return where a cell's result is kept."""
    return work / "multitask" / suite / f"{row}-{seed}.json"


def compute(suite: Suite, name: str, seed: int, work: Path) -> dict[str, Any]:
    """Return accuracy per task and CPU seconds of one cell."""
    row = ROWS[name]
    if not row.method:
        if name == "base":
            found = evaluate([suite.base], suite.tasks)
        else:
            found = [evaluate([suite.experts[task.name]], [task])[0] for task in suite.tasks]
        return {"accuracy": {item.task: item.accuracy for item in found}, "seconds": 0.0}
    folder = work / "multitask" / suite.name
    recipe: dict[str, Any] = {"merge_method": row.method}
    if registry.get(row.method).base == "required":
        recipe["base_model"] = str(suite.base)
    entries: list[dict[str, Any]] = []
    for task, expert in suite.experts.items():
        entry: dict[str, Any] = {"model": str(expert)}
        if row.weight:
            entry["parameters"] = dict(row.weight)
        if row.measured:
            entry["task"] = f"{suite.folder / 'tasks.py'}:{task}"
        entries.append(entry)
    recipe["models"] = entries
    if row.parameters:
        recipe["parameters"] = dict(row.parameters)
    result: dict[str, Any] = {}
    began = time.process_time()
    if row.learning is not None:
        from graftwork.merge.subspace import learn_merge

        learned = learn_merge(
            suite.base, list(suite.experts.values()), suite.tasks, seed=seed, **row.learning,
            state=folder / f"{name}-{seed}.partial.safetensors",
        )  # fmt: skip
        mask = folder / f"{name}-{seed}.safetensors"
        learned.save(mask, force=True)
        (folder / f"{name}-{seed}.partial.safetensors").unlink(missing_ok=True)
        recipe["mask"] = str(mask)
        below, above = learned.shares()
        result |= {"below": below, "above": above, "warnings": learned.report.warnings}
        result["steps"] = learned.settings.total_steps
    learning_seconds = time.process_time() - began
    text = folder / f"{name}-{seed}.yml"
    text.write_text(json.dumps(recipe, indent=1))
    out = folder / f"{name}-{seed}.merged.safetensors"
    merge(load_recipe(text), out, settings=Settings(threads=1, force=True))
    seconds = time.process_time() - began
    found = evaluate([out], suite.tasks)
    result |= {"accuracy": {item.task: item.accuracy for item in found}}
    return {**result, "seconds": seconds, "learning_seconds": learning_seconds}


def table(work: Path, suites: Sequence[str], seeds: Sequence[int]) -> tuple[list[str], list[str], bool]:
    """Return the table as lines of Markdown, the bars as lines, and whether they hold."""
    means: dict[tuple[str, str], list[float]] = {}
    seconds: dict[tuple[str, str], float] = {}
    for suite in suites:
        for name in ROWS:
            for seed in seeds:
                path = cell_path(work, suite, name, seed)
                if path.exists():
                    cell = json.loads(path.read_text())
                    means.setdefault((suite, name), []).append(100 * float(np.mean(list(cell["accuracy"].values()))))
                    seconds[suite, name] = cell["seconds"]
    lines = [
        "| | " + " | ".join(suites) + " | CPU s (" + " / ".join(suites) + ") |", "|---|" + "---|" * (len(suites) + 1)
    ]  # fmt: skip
    for name, row in ROWS.items():
        cells = []
        for suite in suites:
            values = means.get((suite, name))
            spread = f" ± {np.std(values, ddof=1):.1f}" if values and len(values) > 1 else ""
            cells.append(f"{np.mean(values):.1f}{spread}" if values else "-")
        times = [f"{seconds[suite, name]:.0f}" if (suite, name) in seconds else "-" for suite in suites]
        lines.append(f"| {row.title} | " + " | ".join(cells) + " | " + " / ".join(times) + " |")
    bars, all_hold = [], True
    for title, one, other, least in BARS:
        for suite in suites:
            if (suite, one) not in means or (suite, other) not in means:
                bars.append(f"not measured  {title}, {suite}")
                continue
            difference = float(np.mean(means[suite, one]) - np.mean(means[suite, other]))
            holds = difference >= least[suite]
            all_hold &= holds
            count = len(means[suite, one])
            bars.append(
                f"{'holds' if holds else 'FAILS':12s}  {title}, {suite}: {difference:+.1f} (at least "
                f"{least[suite]:+g}), seeds: {count}"
            )
    return lines, bars, all_hold


def main(arguments: Sequence[str]) -> int:
    """Compute what is missing, print the table and the bars."""
    parser = argparse.ArgumentParser(description="Merge methods on suites of small tasks.")
    parser.add_argument("work", type=Path, help="where suites and results are kept")
    parser.add_argument("--suites", nargs="+", default=list(DESIGNS), choices=list(DESIGNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--table", action="store_true", help="only print what was computed before")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    skipped: list[str] = []
    wanted = [
        (suite, name, seed)
        for number, seed in enumerate(given.seeds)
        for suite in given.suites
        for name in given.rows
        if number < ROWS[name].seeds
    ]
    for suite, name, seed in [] if given.table else wanted:
        path = cell_path(given.work, suite, name, seed)
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        row = ROWS[name]
        if row.method and row.method not in registry.names():
            skipped.append(f"{row.title}: there is no method {row.method}")
            continue
        try:
            result = compute(load_suite(suite, given.work), name, seed, given.work)
        except GraftworkError as error:
            skipped.append(f"{row.title}, {suite}: {error}")
            continue
        path.with_suffix(".tmp").write_text(json.dumps(result, indent=1))
        os.replace(path.with_suffix(".tmp"), path)
        accuracy = 100 * float(np.mean(list(result["accuracy"].values())))
        print(f"{suite} {name} seed {seed}: {accuracy:.2f} %, {result['seconds']:.1f} CPU s", file=sys.stderr)
    lines, bars, hold = table(given.work, given.suites, given.seeds)
    print("\n".join(lines))
    print()
    print("\n".join(bars))
    for line in dict.fromkeys(skipped):
        print(f"skipped  {line}")
    return 0 if hold else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
