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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from safetensors.torch import load_file
from suites import DESIGNS, Suite, load_suite

from graftwork.merge import Settings, evaluate, load_recipe, merge
from graftwork.merge.alignment.renormalize import renormalize
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


@dataclass(frozen=True, slots=True)
class Bar:
    """What a change must not break.

    Args:
        title: What it is called.
        row: The row that has to be good.
        others: The rows of which the best is compared.
        least: Points by which the row has to be above that, in all suites or by suite (mean of seeds).
    """

    title: str
    row: str
    others: tuple[str, ...]
    least: float | Mapping[str, float]

    def least_in(self, suite: str) -> float:
        """Return the points for a suite."""
        return self.least if isinstance(self.least, int | float) else self.least[suite]


BARS = (
    Bar("mask over task arithmetic", "mask", ("task_arithmetic",), {"mlp4": 4, "mlp8": 12, "vit8": 14}),
    Bar("mask + layer-wise over task arithmetic", "mask+layer_wise", ("task_arithmetic",),
        {"mlp4": 5, "mlp8": 15, "vit8": 18}),
    Bar("mask + layer-wise against fine-tuned", "mask+layer_wise", ("fine-tuned",), -5),
    Bar("mask against layer-wise", "mask", ("layer_wise",), {"mlp4": -0.5, "mlp8": 5, "vit8": -0.5}),
    Bar("binary mask against expected, both at rate 0.1", "mask_binary", ("mask_decided",), -3),
    Bar("mask + layer-wise against mask", "mask+layer_wise", ("mask",), -0.5),
)  # fmt: skip


def cell_path(work: Path, suite: str, row: str, seed: int) -> Path:
    """Return where a cell's result is kept."""
    return work / "multitask" / suite / f"{row}-{seed}.json"


def cells(work: Path, suite: str, row: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return the results of a row that there are."""
    paths = [cell_path(work, suite, row, seed) for seed in seeds]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def compute(suite: Suite, name: str, row: Row, seed: int, work: Path) -> dict[str, Any]:
    """Return accuracy per task and CPU seconds of one cell.

    Where the suite has a mixture, also the accuracy with BatchNorm statistics that are measured anew on its inputs.
    """
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
    if suite.mixture is not None:
        measured = renormalize(suite.mixture, load_file(out), method="bn")
        found = evaluate({"merged": measured}, suite.tasks)
        result |= {"accuracy_measured": {item.task: item.accuracy for item in found}}
    return {**result, "seconds": seconds, "learning_seconds": learning_seconds}


def fill(
    work: Path,
    suites: Mapping[str, Callable[[], Suite]],
    rows: Mapping[str, Row],
    seeds: Sequence[int],
) -> list[str]:
    """Compute the cells that there are not yet, seed by seed; return what could not be, one line each."""
    skipped: dict[str, None] = {}
    loaded: dict[str, Suite] = {}
    for number, seed in enumerate(seeds):
        for suite, load in suites.items():
            for name, row in rows.items():
                path = cell_path(work, suite, name, seed)
                if number >= row.seeds or path.exists():
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                if suite not in loaded:
                    loaded[suite] = load()
                try:
                    result = compute(loaded[suite], name, row, seed, work)
                except GraftworkError as error:
                    skipped[f"{row.title}, {suite}: {error}"] = None
                    continue
                path.with_suffix(".tmp").write_text(json.dumps(result, indent=1))
                os.replace(path.with_suffix(".tmp"), path)
                accuracy = 100 * float(np.mean(list(result["accuracy"].values())))
                print(
                    f"{suite} {name} seed {seed}: {accuracy:.2f} %, {result['seconds']:.1f} CPU s",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
    return list(skipped)


def table(
    work: Path, suites: Sequence[str], seeds: Sequence[int], rows: Mapping[str, Row], bars: Sequence[Bar]
) -> tuple[list[str], list[str], bool]:
    """Return the table as lines of Markdown, the bars as lines, and whether they hold."""
    found = {(suite, name): cells(work, suite, name, seeds) for suite in suites for name in rows}
    heads: list[tuple[str, str, str]] = []
    for suite in suites:
        heads.append((suite, suite, "accuracy"))
        if any("accuracy_measured" in cell for name in rows for cell in found[suite, name]):
            heads.append((suite, f"{suite}, statistics measured", "accuracy_measured"))

    def means(suite: str, name: str, key: str = "accuracy") -> list[float]:
        return [100 * float(np.mean(list(cell[key].values()))) for cell in found.get((suite, name), ()) if key in cell]

    lines = [
        f"| | {' | '.join(head for _, head, _ in heads)} | CPU s ({' / '.join(suites)}) |",
        "|---|" + "---|" * (len(heads) + 1),
    ]
    for name, row in rows.items():
        shown = []
        for suite, _, key in heads:
            values = means(suite, name, key)
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            shown.append(f"{np.mean(values):.1f}{spread}" if values else "-")
        times = [f"{found[suite, name][-1]['seconds']:.0f}" if found[suite, name] else "-" for suite in suites]
        lines.append(f"| {row.title} | {' | '.join(shown)} | {' / '.join(times)} |")
    said, all_hold = [], True
    for bar in bars:
        for suite in suites:
            own, others = means(suite, bar.row), [means(suite, other) for other in bar.others]
            if not own or not all(others):
                said.append(f"not measured  {bar.title}, {suite}")
                continue
            difference = float(np.mean(own) - max(np.mean(values) for values in others))
            holds = difference >= bar.least_in(suite)
            all_hold &= holds
            said.append(
                f"{'holds' if holds else 'FAILS':12s}  {bar.title}, {suite}: {difference:+.1f} (at least "
                f"{bar.least_in(suite):+g}), seeds: {len(own)}"
            )
    return lines, said, all_hold


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
    rows = {name: ROWS[name] for name in given.rows}
    suites = {name: partial(load_suite, name, given.work) for name in given.suites}
    skipped = [] if given.table else fill(given.work, suites, rows, given.seeds)
    lines, bars, hold = table(given.work, given.suites, given.seeds, ROWS, BARS)
    print("\n".join([*lines, "", *bars, *(f"skipped  {line}" for line in skipped)]))
    return 0 if hold else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
