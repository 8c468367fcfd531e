"""`graftwork barrier A B --task SPEC` and `graftwork lmc A B`."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftwork.cli.match import matching_lines
from graftwork.cli.output import duration, print_json, print_table
from graftwork.cli.problems import readable_errors, tell, usage_error

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.merge.alignment.analysis import Analysis, Calibrated
    from graftwork.merge.alignment.apply import Permutation
    from graftwork.merge.alignment.barrier import Curve
    from graftwork.merge.alignment.spec import PermutationSpec
    from graftwork.merge.checkpoint import Checkpoint
    from graftwork.merge.task import Task


class Split(StrEnum):
    """Data to judge on. An enumeration, because typer takes no list of literals."""

    TEST = "test"
    VALIDATION = "validation"
    TRAIN = "train"


class Statistics(StrEnum):
    """Whose statistics a mixture gets."""

    BN = "bn"
    REPAIR = "repair"


_QUIET_SECONDS = 2.0
_LINE_SECONDS = 10.0
_TICKS: Mapping[float, str] = {0: "A", 0.25: "¼", 0.5: "½", 0.75: "¾", 1: "B"}
_SUFFIXES: Mapping[str, str] = {"none": "", "bn": " + BatchNorm", "repair": " + REPAIR"}
_MOST_TENSORS = 20

TaskOption = Annotated[
    str | None, typer.Option("--task", "-t", metavar="SPEC", help="file.py:name or package.module:name.")
]
SplitOption = Annotated[
    list[Split] | None,
    typer.Option("--split", help="Data to judge on; the next one if a task lacks it. Repeatable. [default: test]"),
]
PointsOption = Annotated[int, typer.Option("--points", metavar="N", help="Points from A to B, an odd number.")]
RenormalizeOption = Annotated[
    list[Statistics] | None,
    typer.Option("--renormalize", help="Also with these statistics. Repeatable. [default: both if there is BatchNorm]"),
]
PermutationOption = Annotated[
    Path | None, typer.Option("--permutation", help="Align by this file of `graftwork match`, not by a search.")
]
SpecOption = Annotated[
    Path | None, typer.Option("--spec", help="JSON file that says what may be re-ordered. [default: by names]")
]
ModuleOption = Annotated[
    str | None, typer.Option("--module", metavar="SPEC", help="file.py:make, giving (module, inputs) to trace.")
]
FamilyOption = Annotated[str | None, typer.Option("--family", help="Family of the network. [default: by names]")]
ResidualOption = Annotated[bool, typer.Option("--residual", help="Re-order the residual stream of a transformer, too.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of the search.")]
PictureOption = Annotated[Path | None, typer.Option("--picture", help="Draw into this PNG.")]
DeviceOption = Annotated[str, typer.Option("--device", help="Where models run, as torch names it.")]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", "-j", min=1, help="CPU threads of torch. [default: torch's own]")
]
PickleOption = Annotated[
    bool, typer.Option("--allow-pickle", help="Read .pt, .pth, .bin and .ckpt files, as data only.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, with all points.")]


def barrier(
    a: Annotated[Path, typer.Argument(help="A checkpoint of the task's model.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    task: TaskOption = None,
    aligned: Annotated[bool, typer.Option("--aligned", help="Also with B's units re-ordered to match A's.")] = False,
    points: PointsOption = 25,
    split: SplitOption = None,
    renormalize: RenormalizeOption = None,
    permutation: PermutationOption = None,
    spec: SpecOption = None,
    module: ModuleOption = None,
    family: FamilyOption = None,
    residual: ResidualOption = False,
    seed: SeedOption = 0,
    picture: PictureOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    allow_pickle: PickleOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how far the loss rises between two checkpoints.

    The barrier is the largest excess of the loss of (1−λ)·A + λ·B over the straight line between the ends.
    """
    if task is None:
        raise usage_error("--task is missing: file.py:name or package.module:name")
    chosen = _Chosen(permutation, spec, module, family, residual, seed, quiet)
    with readable_errors():
        from graftwork.merge.reference import local_path
        from graftwork.merge.task import load_task

        loaded = load_task(task, checkpoint=local_path(a))
        _prepare_torch(device, threads)
        pair = _read(a, b, allow_pickle, loaded, chosen if aligned or permutation is not None else None)
        curves = _measure(loaded, pair, points, split or [Split.TEST], renormalize, device, quiet)
        if picture is not None:
            _draw_curves(curves, picture, loaded.name, a, b)
        if as_json:
            print_json({"a": str(a), "b": str(b), "task": loaded.name, "curves": [curve.record() for curve in curves]})
            return
        _print_ends(curves, a, b)
        print()
        _print_curves(curves)


def lmc(
    a: Annotated[Path, typer.Argument(help="A checkpoint; B is aligned to it.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    task: TaskOption = None,
    points: PointsOption = 25,
    split: SplitOption = None,
    renormalize: RenormalizeOption = None,
    permutation: PermutationOption = None,
    spec: SpecOption = None,
    module: ModuleOption = None,
    family: FamilyOption = None,
    residual: ResidualOption = False,
    seed: SeedOption = 0,
    picture: PictureOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    allow_pickle: PickleOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what alignment does to a pair of checkpoints: distances, singular values and directions, barriers.

    R(γ) is how far the singular directions above γ times the largest agree: 1 for equal ones, 0 for unrelated ones.
    """
    chosen = _Chosen(permutation, spec, module, family, residual, seed, quiet)
    with readable_errors():
        from graftwork.merge.alignment.analysis import analyse
        from graftwork.merge.reference import local_path
        from graftwork.merge.task import load_task

        loaded = None if task is None else load_task(task, checkpoint=local_path(a))
        _prepare_torch(device, threads)
        pair = _read(a, b, allow_pickle, loaded, chosen)
        assert pair.spec is not None
        assert pair.permutation is not None
        progress = _Progress("tensors", shown=not quiet)
        analysis = analyse(pair.spec, pair.a, pair.b, pair.permutation, progress=progress.tell)
        curves: list[Curve] = []
        calibrated: list[Calibrated] = []
        deviations: dict[str, dict[str, float]] = {}
        if loaded is not None:
            curves = _measure(loaded, pair, points, split or [Split.TEST], renormalize, device, quiet)
            calibrated = _calibrate(loaded, pair, (split or [Split.TEST])[0], device)
            deviations = _deviations(loaded, pair, device)
        if picture is not None:
            _draw_analysis(analysis, curves, picture, a, b)
        if as_json:
            record = {"a": str(a), "b": str(b), "spec": pair.spec.source, **analysis.record()}
            if loaded is not None:
                record["task"] = loaded.name
                record["curves"] = [curve.record() for curve in curves]
                record["deviation_ratios"] = deviations
                record["calibrated"] = [
                    {name: getattr(item, name) for name in type(item).__slots__} for item in calibrated
                ]
            print_json(record)
            return
        _print_analysis(analysis, a, b)
        if curves:
            print()
            _print_curves(curves)
        if deviations:
            print()
            _print_deviations(deviations)
        if calibrated:
            print()
            _print_calibrated(calibrated)


# ---------------------------------------------------------------------------------------------------------------------
# Reading and aligning


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What was asked for about alignment."""

    permutation: Path | None
    spec: Path | None
    module: str | None
    family: str | None
    residual: bool
    seed: int
    quiet: bool

    def __post_init__(self) -> None:
        given = [
            name
            for name, value in (("--spec", self.spec), ("--module", self.module), ("--family", self.family))
            if value
        ]
        if len(given) > 1:
            raise usage_error("--spec, --module and --family exclude each other")
        if self.permutation is not None and (given or self.residual):
            raise usage_error(f"{(*given, '--residual')[0]} goes with a search; --permutation has a spec of its own")


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two checkpoints in memory; with an alignment, what may be re-ordered, the order, and B in that order."""

    a: dict[str, Tensor]
    b: dict[str, Tensor]
    spec: PermutationSpec | None = None
    permutation: Permutation | None = None
    aligned: dict[str, Tensor] | None = None

    @property
    def others(self) -> dict[str, Mapping[str, Tensor]]:
        """B as it is, and B aligned."""
        return {"naive": self.b} if self.aligned is None else {"naive": self.b, "aligned": self.aligned}


def _read(a: Path, b: Path, allow_pickle: bool, task: Task | None, chosen: _Chosen | None) -> _Pair:
    """Read both checkpoints; align B to A if something was chosen."""
    from graftwork.merge.alignment.barrier import check_alike, check_finite
    from graftwork.merge.checkpoint import load_torch
    from graftwork.merge.reference import open_model

    with contextlib.ExitStack() as stack:
        first, second = (
            stack.enter_context(open_model(path, allow_pickle=allow_pickle, what=name))
            for path, name in ((a, "A"), (b, "B"))
        )
        models = (load_torch(first), load_torch(second))
        check_alike(models, (str(a), str(b)))
        check_finite(models, (str(a), str(b)))
        if chosen is None:
            return _Pair(*models)
        from graftwork.merge.alignment.apply import apply_permutation

        spec, order = _from_file(first, second, chosen.permutation) or _found(first, task, models, chosen)
        return _Pair(*models, spec, order, apply_permutation(spec, order, models[1]))


def _found(
    first: Checkpoint, task: Task | None, models: tuple[Mapping[str, Tensor], Mapping[str, Tensor]], chosen: _Chosen
) -> tuple[PermutationSpec, Permutation]:
    from graftwork.merge.alignment.match import find_spec
    from graftwork.merge.alignment.matching import match_weights

    spec = find_spec(
        first,
        file=chosen.spec,
        module=chosen.module,
        family=chosen.family,
        task=task,
        residual=chosen.residual,
    )
    progress = None if chosen.quiet else matching_lines(1)
    return spec, match_weights(spec, *models, seed=chosen.seed, progress=progress).permutation


def _from_file(first: Checkpoint, second: Checkpoint, path: Path | None) -> tuple[PermutationSpec, Permutation] | None:
    if path is None:
        return None
    from graftwork.merge.alignment.apply import load_permutation
    from graftwork.merge.errors import MismatchError

    found = load_permutation(path)
    for digest, checkpoint in ((found.digest_a, first), (found.digest_b, second)):
        actual = checkpoint.content_digest()
        if digest != actual:
            raise MismatchError(
                f'cannot align by "{path}": it was made for a model with the digest {digest[:12]}, '
                f'"{checkpoint.path}" has {actual[:12]}; make it again with graftwork match'
            )
    return found.spec, found.permutation


def _prepare_torch(device: str, threads: int | None) -> None:
    import torch

    from graftwork.merge.errors import DependencyError

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise DependencyError(f'cannot compute on "{device}": {reason}') from None
    if threads is not None:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def _measure(
    task: Task,
    pair: _Pair,
    points: int,
    splits: Sequence[Split],
    renormalize: Sequence[Statistics] | None,
    device: str,
    quiet: bool,
) -> list[Curve]:
    from graftwork.merge.alignment.barrier import Renormalization, measure_barrier
    from graftwork.merge.alignment.renormalize import has_batch_norm

    if renormalize is None:
        renormalize = list(Statistics) if has_batch_norm(task) else []
    ways: list[Renormalization] = ["none", *(way.value for way in dict.fromkeys(renormalize))]
    progress = _Progress("points", shown=not quiet)
    total = len(pair.others) * len(ways) * points
    done = itertools.count(1)
    curves = [
        curve
        for label, other in pair.others.items()
        for way in ways
        for curve in measure_barrier(
            task,
            pair.a,
            other,
            points=points,
            splits=[split.value for split in dict.fromkeys(splits)],
            renormalization=way,
            label=label + _SUFFIXES[way],
            device=device,
            progress=lambda _: progress.tell(next(done), total),
        )
    ]
    # Two splits that a task lacks may both be replaced by a third.
    curves = list({(curve.label, curve.split): curve for curve in curves}.values())
    used = {curve.split for curve in curves}
    for split in splits:
        if split not in used:
            tell(f"warning: task {task.name} has no {split} split; its {' and '.join(sorted(used))} split was used")
    return curves


class _Progress:
    """Says every ten seconds how much is measured."""

    def __init__(self, what: str, *, shown: bool) -> None:
        self.what = what
        self.shown = shown
        self.start = time.monotonic()
        self.told = self.start - _LINE_SECONDS + _QUIET_SECONDS

    def tell(self, done: int, total: int) -> None:
        """Take note of how many of how many are done."""
        now = time.monotonic()
        left = (now - self.start) / done * (total - done)
        if self.shown and left >= 1 and now - self.told >= _LINE_SECONDS:
            self.told = now
            tell(f"measuring: {done} of {total} {self.what}, {duration(left)} left")


def _deviations(task: Task, pair: _Pair, device: str) -> dict[str, dict[str, float]]:
    """Return label → layer → how far the activations of the plain mean vary, relative to the parents'."""
    from graftwork.merge.alignment.barrier import interpolate
    from graftwork.merge.alignment.renormalize import Renormalizer
    from graftwork.merge.errors import TaskError

    try:
        return {
            label: Renormalizer(task, [pair.a, other], device=device).deviation_ratios(
                interpolate([pair.a, other], [0.5, 0.5])
            )
            for label, other in pair.others.items()
        }
    except TaskError as error:
        tell(f"note: {error}")
        return {}


def _calibrate(task: Task, pair: _Pair, split: Split, device: str) -> list[Calibrated]:
    from graftwork.merge.alignment.analysis import calibrate
    from graftwork.merge.alignment.barrier import interpolate
    from graftwork.merge.errors import TaskError

    models: dict[str, Mapping[str, Tensor]] = {"A": pair.a, "B": pair.b}
    models |= {f"{label}, λ = ½": interpolate([pair.a, other], [0.5, 0.5]) for label, other in pair.others.items()}
    try:
        return calibrate(task, models, split=split.value, device=device)
    except TaskError as error:
        tell(f"note: {error}")
        return []


# ---------------------------------------------------------------------------------------------------------------------
# Showing


def _print_ends(curves: Sequence[Curve], a: Path, b: Path) -> None:
    plain = [curve for curve in curves if curve.label == "naive"]
    rows = [
        (letter, path, curve.split, _number(curve.losses[end]), _percent(curve.accuracies[end] if curve.accuracies else
                                                                       None))
        for end, letter, path in ((0, "A", a), (-1, "B", b))
        for curve in plain
    ]  # fmt: skip
    print_table(rows, head=("", "checkpoint", "split", "loss", "accuracy"), right=(3, 4))


def _print_curves(curves: Sequence[Curve]) -> None:
    print_table(
        [
            (
                curve.label,
                curve.split,
                _number(curve.loss.height),
                f"{curve.loss.position:.3g}",
                _number(curve.loss.above_mean),
                _number(curve.loss.midpoint),
                _percent(curve.accuracy.midpoint if curve.accuracy else None),
                _percent(curve.accuracy.height if curve.accuracy else None),
            )
            for curve in curves
        ],
        head=("from A to B", "split", "barrier", "at λ", "above mean", "loss at ½", "accuracy at ½", "falls by"),
        right=(2, 3, 4, 5, 6, 7),
    )


def _print_analysis(analysis: Analysis, a: Path, b: Path) -> None:
    rows: list[tuple[object, ...]] = [
        ("A", a),
        ("B", b),
        ("distance", f"{analysis.before:.6g} before, {analysis.after:.6g} after: {_change(analysis.ratio)}"),
        ("singular values", f"changed by {analysis.singular_value_change:.1e} of the largest, which is rounding"),
    ]
    if not all(tensor.is_whole for tensor in analysis.tensors):
        rows.append(("directions", "only the largest 256 of matrices whose shorter side is above 4,096"))
    print_table(rows)
    print()
    pairs = [
        ("A and B", analysis.agreement_before),
        ("A and aligned B", analysis.agreement_after),
        ("their mean and A", analysis.merged_with_a),
        ("their mean and aligned B", analysis.merged_with_b),
    ]
    gammas = list(analysis.agreement_before.directions)
    print_table(
        [(name, f"{pair.rho:.4f}", *(f"{pair.directions[gamma]:.4f}" for gamma in gammas)) for name, pair in pairs],
        head=("directions of", "ρ", *(f"R({gamma:g})" for gamma in gammas)),
        right=range(1, len(gammas) + 2),
    )
    print()
    shown = sorted(analysis.tensors, key=lambda tensor: -tensor.before)[:_MOST_TENSORS]
    print_table(
        [
            (
                tensor.name,
                f"{tensor.norm:.4g}",
                f"{tensor.before:.4g}",
                f"{tensor.after:.4g}",
                f"{tensor.ratio:.4f}",
                "-" if tensor.spectrum is None else f"{tensor.spectrum:.4f}",
            )
            for tensor in shown
        ],
        head=("tensor", "|A|", "|A - B|", "aligned", "ratio", "singular values differ"),
        right=(1, 2, 3, 4, 5),
    )
    if len(shown) < len(analysis.tensors):
        tell(f"{len(analysis.tensors) - len(shown)} tensors that are nearer are not shown; --json has all")


def _print_deviations(deviations: Mapping[str, Mapping[str, float]]) -> None:
    layers = next(iter(deviations.values()))
    rows = [(layer, *(f"{ratios[layer]:.3f}" for ratios in deviations.values())) for layer in layers]
    print_table(
        rows[:_MOST_TENSORS], head=("variation of the mean's activations", *deviations), right=range(1, len(rows[0]))
    )
    if len(rows) > _MOST_TENSORS:
        tell(f"{len(rows) - _MOST_TENSORS} deeper layers are not shown; --json has all")


def _print_calibrated(calibrated: Sequence[Calibrated]) -> None:
    print_table(
        [
            (item.model, item.split, _number(item.loss), f"{item.temperature:.4g}", _number(item.calibrated))
            for item in calibrated
        ],
        head=("model", "split", "loss", "temperature", "loss with it"),
        right=(2, 3, 4),
    )


def _draw_curves(curves: Sequence[Curve], path: Path, task: str, a: Path, b: Path) -> None:
    from graftwork.merge.pictures import line_picture

    splits = list(dict.fromkeys(curve.split for curve in curves))
    line_picture(
        _panels(curves, with_accuracy=True),
        path,
        title=f"Between {_stem(a)} and {_stem(b)}",
        subtitle=f"{task}, {' and '.join(splits)} split; (1−λ)·A + λ·B",
    )
    tell(f"picture: {path}")


def _panels(curves: Sequence[Curve], *, with_accuracy: bool) -> list[Any]:
    """Return panels of loss and, where labels are classes, of accuracy."""
    from graftwork.merge.pictures import Line, Panel

    several = len({curve.split for curve in curves}) > 1
    labels = [f"{curve.label}, {curve.split}" if several else curve.label for curve in curves]

    panels = [
        Panel(
            [
                Line(label, list(zip(curve.positions, curve.losses, strict=True)))
                for label, curve in zip(labels, curves, strict=True)
            ],
            across="λ",
            up="loss",
            ticks=_TICKS,
            at_zero=True,
        )
    ]
    judged = [(label, curve) for label, curve in zip(labels, curves, strict=True) if curve.accuracies is not None]
    if with_accuracy and judged:
        panels.append(
            Panel(
                [
                    Line(label, list(zip(curve.positions, curve.accuracies or (), strict=True)))
                    for label, curve in judged
                ],
                across="λ",
                up="accuracy",
                ticks=_TICKS,
                is_share=True,
            )
        )
    return panels


def _draw_analysis(analysis: Analysis, curves: Sequence[Curve], path: Path, a: Path, b: Path) -> None:
    from graftwork.merge.pictures import Line, Panel, line_picture

    directions = Panel(
        [
            Line("naive", list(analysis.agreement_before.directions.items())),
            Line("aligned", list(analysis.agreement_after.directions.items())),
        ],
        across="γ: directions with singular values above γ × the largest",
        up="agreement of directions R(γ)",
        ticks={gamma: f"{gamma:g}" for gamma in analysis.agreement_before.directions},
        at_zero=True,
    )
    plain = [curve for curve in curves if curve.split == curves[0].split]
    heights = {curve.label: curve.loss.height for curve in plain}
    barrier = f"; barrier {heights['naive']:.3g} → {heights['aligned']:.3g}" if plain else ""
    line_picture(
        [directions, *(_panels(plain, with_accuracy=False) if plain else [])],
        path,
        title=f"{_stem(b)} aligned to {_stem(a)}",
        subtitle=f"‖A − B‖ changes by {_change(analysis.ratio)}, singular values do not change" + barrier,
    )
    tell(f"picture: {path}")


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _change(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %".replace("-", "−")


def _stem(path: Path) -> str:
    name = path.resolve().name
    return name.removesuffix(".safetensors") or name
