"""`graftwork demo`: trains a base and three specialists on real digits, merges them with every method, and compares.

Everything that it makes stays in one folder: the checkpoints, a recipe for each method, the merged models, a table and
a picture. Nothing is downloaded.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from graftwork import __version__
from graftwork.merge.errors import OutputError

if TYPE_CHECKING:
    from rich.table import Table

    from graftwork.merge.evaluation import Evaluation

TASKS = ("clean", "turned", "negative", "scrambled")
"""Functions in `graftwork.simulations.digits`; the base was trained on the first, a specialist on each other."""
SPECIALISTS = TASKS[1:]
PAIR = ("turned", "scrambled")
"""What methods of two models merge."""

Parameters = Mapping[str, float | str]

_ALL = {"weight": 1.0}
_SUM = {"weight": 0.65}

SETTINGS: Mapping[str, Parameters] = MappingProxyType(
    {
        "adamerging": {},
        "arcee_fusion": {},
        "breadcrumbs": {**_SUM, "density": 0.7, "gamma": 0.01},
        "breadcrumbs_ties": {**_SUM, "density": 0.7, "gamma": 0.01},
        "concrete_adamerging": {},
        "concrete_task_arithmetic": {},
        "consensus_ta": {"scale": 0.65},
        "consensus_ties": {"scale": 0.65},
        "dare_linear": {**_SUM, "density": 0.5, "seed": 0},
        "dare_ties": {**_SUM, "density": 0.5, "seed": 0},
        "della": {**_ALL, "density": 0.7, "epsilon": 0.1, "lambda": 1.2, "seed": 0},
        "della_linear": {**_SUM, "density": 0.5, "epsilon": 0.1, "seed": 0},
        "emr": {},
        "fisher": {},
        "geometric_median": {},
        "iso_c": {},
        "iso_cts": {},
        "karcher": {},
        "linear": _ALL,
        "model_stock": {},
        "multislerp": _ALL,
        "nearswap": {"t": 0.003},
        "nuslerp": {"weight": 0.5},
        "passthrough": {},
        "pcb": {},
        "ram": {"epsilon": 0.003},
        "ramplus_tl": {"epsilon": 0.003},
        "regmean": {},
        "sce": {"select_topk": 1.0},
        "slerp": {"t": 0.5},
        "task_arithmetic": _SUM,
        "tsv_m": {},
        "ties": {**_ALL, "density": 0.3, "lambda": 1.5},
    }
)
"""Parameters of each method: round values near the best of a coarse grid on the validation split, not tuned further.

The table shows the test split. The guises and the training recipe were settled while looking at both, so it shows
what merging does to these models; it does not rank the methods in general.
"""

LEFT_OUT: Mapping[str, str] = MappingProxyType(
    {"tall_masks": "merges as task_arithmetic does, and writes masks beside it", "task_model": "undoes a merge"}
)
"""Methods that the demo does not show, and why."""

_LEARN = {"steps": 150, "seed": 0}
"""How the methods learn that use a mask file: unlabelled training digits, a few seconds each."""

Kind = Literal["base", "specialist", "merged", "looking"]


@dataclass(frozen=True, slots=True)
class Row:
    """What one model of the demo gets right.

    Args:
        name: Of the base, a specialist, or the method.
        kind: Which of these it is; `looking` for methods that look at unlabelled digits.
        model: Its checkpoint, relative to the demo's folder.
        accuracy: Task → share of the test digits that it names correctly.
        loss: Task → mean cross-entropy.
    """

    name: str
    kind: Kind
    model: str
    accuracy: Mapping[str, float]
    loss: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Mean accuracy over the tasks."""
        return math.fsum(self.accuracy.values()) / len(self.accuracy)


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What a demo made.

    Args:
        out: Its folder.
        seed: From which everything random came.
        examples: Test digits per task.
        rows: The base, the specialists, the models merged without data, best first, and with data, best first.
        picture: The picture.
    """

    out: Path
    seed: int
    examples: int
    rows: tuple[Row, ...]
    picture: Path


def run_demo(
    out: Path | str = "demo", *, seed: int = 0, force: bool = False, progress: Callable[[str], None] | None = None
) -> DemoResult:
    """Train, merge with every method, evaluate; write checkpoints, recipes, `results.json` and `accuracy.png`.

    Args:
        out: A new or empty folder, or with `force` one that an earlier demo made.
        seed: Equal seeds give equal files.
        force: Replace an earlier demo.
        progress: Called with a line on what is done next.

    Raises:
        OutputError: The folder holds something else.
        DependencyError: scikit-learn or matplotlib is missing.
    """
    from graftwork.merge.pictures import bar_picture, house_style
    from graftwork.simulations import digits

    tell = progress or (lambda line: None)
    out = Path(out)
    # What is missing is missed now, not after half a minute of training.
    digits.digits()
    with house_style():
        pass
    _prepare(out, force)
    train_models(out, seed, tell)
    recipes = write_recipes(out)
    for number, (method, recipe) in enumerate(recipes.items(), start=1):
        tell(f"merging with {method} ({number} of {len(recipes)})")
        with digits.one_thread():
            merge_models(recipe, out / method, out / "prepared", force=force)
    tell("evaluating")
    rows, examples = evaluate_models(out, tuple(recipes))
    picture = bar_picture(
        {row.name: row.accuracy for row in rows},
        out / "accuracy.png",
        title="One base, three specialists, and what each method makes of them",
        subtitle=f"Share of {examples} unseen digits named correctly, in four guises",
        groups={row.name: _HEADINGS[row.kind] for row in rows},
    )
    result = DemoResult(out=out, seed=seed, examples=examples, rows=rows, picture=picture)
    _write(out / "results.json", json.dumps(record(result), indent=2) + "\n")
    return result


def train_models(out: Path, seed: int, tell: Callable[[str], None]) -> None:
    """Train the base and the specialists, and save them in `out`."""
    from safetensors.torch import save_file

    from graftwork.simulations import digits

    tell("training the base on clean digits")
    base = digits.train_base(seed)
    save_file(base.state_dict(), out / "base.safetensors", metadata={"format": "pt"})
    for number, guise in enumerate(SPECIALISTS, start=1):
        tell(f"fine-tuning a specialist on {guise} digits ({number} of {len(SPECIALISTS)})")
        specialist = digits.train_specialist(base, guise, seed)
        save_file(specialist.state_dict(), out / f"{guise}.safetensors", metadata={"format": "pt"})


def write_recipes(out: Path) -> dict[str, Path]:
    """Write a recipe for every method; return them by method."""
    from graftwork.merge.methods import names

    recipes = {}
    for method in names():
        if method in SETTINGS:
            recipes[method] = out / "recipes" / f"{method}.yaml"
            _write(recipes[method], recipe_text(method, out))
    return recipes


def recipe_text(method: str, out: Path) -> str:
    """Return the recipe of one method for the models in `out`."""
    import yaml

    from graftwork.merge.methods import get

    chosen = get(method)
    base: str | None = "base"
    models: tuple[str, ...] = SPECIALISTS if chosen.maximum_models is None else PAIR[-chosen.maximum_models :]
    if chosen.base == "ignored":
        base = None
    elif chosen.maximum_models == 1:
        # These merge one model into another, for which the base would be a waste.
        base = PAIR[0]
    per_model = {key: value for key, value in SETTINGS[method].items() if chosen.parameters[key].per_model}
    shared = {key: value for key, value in SETTINGS[method].items() if key not in per_model}
    recipe: dict[str, Any] = {"merge_method": method}
    if base is not None:
        recipe["base_model"] = _model_path(out, base)
    looks = bool(chosen.statistics or chosen.shared)
    recipe["models"] = [
        {"model": _model_path(out, model)}
        | ({"parameters": dict(per_model)} if per_model else {})
        | ({"task": f"graftwork.simulations.digits:{model}"} if looks else {})
        for model in models
    ]
    if chosen.statistics:
        recipe["measure"] = {"examples": 256, "seed": 0}
    if chosen.shared:
        recipe["learn"] = dict(_LEARN)
    if shared:
        recipe["parameters"] = shared
    recipe["dtype"] = "float32"
    return f"# {chosen.title}: {chosen.formula}\n" + yaml.safe_dump(recipe, sort_keys=False)


def merge_models(recipe: Path, out: Path, prepared: Path, *, force: bool) -> None:
    """Merge as the recipe says: the one place where the demo meets the engine."""
    from graftwork.merge import Settings, merge

    merge(recipe, out, settings=Settings(force=force, prepared=prepared))


def evaluate_models(out: Path, methods: Sequence[str]) -> tuple[tuple[Row, ...], int]:
    """Return a row for every model, merged ones best first, and the number of test digits per task."""
    from graftwork.merge.evaluation import evaluate
    from graftwork.merge.task import load_task
    from graftwork.simulations import digits

    kinds: dict[str, Kind] = {
        "base": "base",
        **dict.fromkeys(SPECIALISTS, "specialist"),
        **{method: _kind(method) for method in methods},
    }
    files = {name: name if name in methods else f"{name}.safetensors" for name in kinds}
    tasks = [load_task(f"graftwork.simulations.digits:{name}") for name in TASKS]
    with digits.one_thread():
        evaluations = evaluate({name: out / file for name, file in files.items()}, tasks)
    rows = [_row(name, kinds[name], files[name], [e for e in evaluations if e.checkpoint == name]) for name in kinds]
    order = list(_HEADINGS)
    merged = {"merged", "looking"}
    rows.sort(key=lambda row: (order.index(row.kind), (-row.mean, row.name) if row.kind in merged else ()))
    return tuple(rows), evaluations[0].examples


def _kind(method: str) -> Kind:
    from graftwork.merge.methods import get

    chosen = get(method)
    return "looking" if chosen.statistics or chosen.shared else "merged"


def table(result: DemoResult) -> Table:
    """Return the results as a table: model × task, in per cent, the best merged model's mean in bold."""
    from rich.table import Table

    shown = Table(title=f"Accuracy on {result.examples} unseen digits, per cent", box=None, pad_edge=False)
    shown.add_column("model")
    for task in TASKS:
        shown.add_column(task, justify="right")
    shown.add_column("mean", justify="right")
    best = max((row.mean for row in result.rows if row.name in SETTINGS), default=math.nan)
    previous: Kind | None = None
    for row in result.rows:
        if row.kind != previous:
            shown.add_section()
            shown.add_row(f"[dim]{_HEADINGS[row.kind]}[/dim]")
        previous = row.kind
        mean = f"{100 * row.mean:.1f}"
        values = [f"{100 * row.accuracy[task]:.1f}" for task in TASKS]
        shown.add_row(row.name, *values, f"[bold]{mean}[/bold]" if row.mean == best else mean)
    return shown


def record(result: DemoResult) -> dict[str, Any]:
    """Return the results for JSON; equal runs give equal records."""
    return {
        "graftwork": __version__,
        "seed": result.seed,
        "split": "test",
        "examples": result.examples,
        "tasks": list(TASKS),
        "models": [
            {
                "name": row.name,
                "kind": row.kind,
                "model": row.model,
                "parameters": dict(SETTINGS[row.name]) if row.name in SETTINGS else None,
                "accuracy": {**row.accuracy, "mean": round(row.mean, 6)},
                "loss": {task: round(loss, 6) if math.isfinite(loss) else str(loss) for task, loss in row.loss.items()},
            }
            for row in result.rows
        ],
    }


_HEADINGS: Mapping[Kind, str] = {
    "base": "pre-trained",
    "specialist": "fine-tuned",
    "merged": "merged",
    "looking": "with unlabelled digits",
}


def _row(name: str, kind: Kind, model: str, evaluations: Sequence[Evaluation]) -> Row:
    return Row(
        name=name,
        kind=kind,
        model=model,
        accuracy={evaluation.task: evaluation.accuracy or 0.0 for evaluation in evaluations},
        loss={evaluation.task: evaluation.loss for evaluation in evaluations},
    )


def _model_path(out: Path, name: str) -> str:
    # As the user wrote it: recipes resolve paths from the working directory.
    path = out / f"{name}.safetensors"
    return str(path) if path.is_absolute() else f".{os.sep}{path}"


def _prepare(out: Path, force: bool) -> None:
    """Make the folder, or accept one that is empty or an earlier demo's."""
    try:
        held = {entry.name for entry in out.iterdir()} if out.exists() else set()
        if held and "recipes" not in held:
            raise OutputError(f'cannot write the demo into "{out}": it holds other files; choose another with --out')
        if held and not force:
            raise OutputError(f'cannot write the demo into "{out}": it holds an earlier one; replace it with --force')
        # First of all, so that a demo that was interrupted is known as one.
        (out / "recipes").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f'cannot write the demo into "{out}": {error.strerror or error}') from None


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f'cannot write "{path}": {error.strerror or error}') from None
