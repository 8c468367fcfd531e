"""Alignment of independently trained networks, measured: barriers by width, BatchNorm, LeNets, three models.

    OMP_NUM_THREADS=1 python benchmarks/alignment.py WORK [widths batchnorm lenets many]
        [--widths 128 256 512 1024 2048] [--pairs 5] [--data FOLDER]

Networks are trained on scikit-learn's handwritten digits (1,437 to train, 360 to test; no downloads) with one thread
and kept in `WORK/models`; what was measured is kept in `WORK/results.jsonl`, one line per case. A run that was stopped
goes on where it was; a case that is there is not measured again. Tables go to stdout, pictures to `WORK`.

`widths`     multilayer perceptrons 64-w-w-w-10: barriers, distances and singular directions, with and without weight
             matching; five pairs per width.
`batchnorm`  a residual network with BatchNorm, 32 channels, two pairs: what BatchNorm re-estimation and REPAIR do.
`lenets`     two pairs of LeNets that others trained on MNIST and SVHN, if `--data FOLDER` has them.
`many`       three perceptrons, widths 128 and 512: loss over the simplex after weight matching to the first, after the
             straight-through estimator, and in a common order of all three.

All of it takes about an hour on one core; width 2048 is more than half of that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate as resize
from torch.optim import Adam

from graftwork.merge.task import Task

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.merge.alignment.networks import LeNet, Model, Perceptron, Residual, digits, residual
from tests.merge.alignment.networks import trained as train

SECTIONS = ("widths", "batchnorm", "lenets", "many")
WIDTHS = (128, 256, 512, 1024, 2048)
MANY_WIDTHS = (128, 512)
STEPS = 10
STRAIGHT_THROUGH_STEPS = 200
"""More than the default, at which the order of weight matching is not left on these networks."""

# ---------------------------------------------------------------------------------------------------------------------
# Networks and data


def batches(images: Tensor, labels: Tensor, size: int = 256) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(size), labels.split(size), strict=True))


def digits_task(model: Callable[[], nn.Module]) -> Task:
    images, labels, test_images, test_labels = digits()
    return Task("digits", model, partial(batches, images, labels), test=partial(batches, test_images, test_labels))


def trained(folder: Path, kind: str, width: int, seed: int) -> Model:
    """Return a network trained on the digits: the one in the folder, or a new one, which is put there."""
    path = folder / "models" / f"{kind}-{width}-{seed}.safetensors"
    if not path.exists():
        started = time.process_time()
        train = {"perceptron": train_perceptron, "residual": train_residual}[kind]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(".partial")
        save_file(train(width, seed), partial_path)
        partial_path.rename(path)
        print(f"trained {path.name} in {time.process_time() - started:.0f} s of CPU", flush=True)
    return load_file(path)


def train_perceptron(width: int, seed: int, epochs: int = 60) -> Model:
    return train(lambda: Perceptron(width), seed, epochs, lambda module: Adam(module.parameters(), lr=1e-3))


def train_residual(width: int, seed: int, epochs: int = 25) -> Model:
    return residual(width, seed, epochs)


def lenet_task(data: Path, name: str, calibration: int = 2000) -> Task:
    """Return a data set of digits as the LeNets want it; REPAIR measures on the first images of its training data."""
    with np.load(data / "digits" / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}

    def prepared(images: Any) -> Tensor:
        x = torch.from_numpy(images).float()[:, None] / 127.5 - 1
        return (x if x.shape[-1] == 32 else resize(x, size=32, mode="bilinear")).expand(-1, 3, -1, -1)

    train = prepared(arrays["x_train"][:calibration]), torch.from_numpy(arrays["y_train"][:calibration])
    test = prepared(arrays["x_test"]), torch.from_numpy(arrays["y_test"])
    return Task(name, LeNet, partial(batches, *train, 250), test=partial(batches, *test, 250))


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


class Results:
    """Lines of a file, one per case, found again by their key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.found = {record["key"]: record for record in map(json.loads, lines)}

    def get(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what is known of a case, or measure it and keep it."""
        if key not in self.found:
            started = time.process_time()
            record = {"key": key, **measure(), "cpu_seconds": round(time.process_time() - started, 2)}
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            self.found[key] = json.loads(json.dumps(record))
            print(f"measured {key} in {record['cpu_seconds']:.0f} s of CPU", flush=True)
        return self.found[key]


def matched(a: Model, b: Model) -> tuple[Any, Any, Model, float]:
    """Return spec, matching, re-ordered B, and the CPU seconds that matching took."""
    from graftwork.merge.alignment.apply import apply_permutation
    from graftwork.merge.alignment.families import family_spec
    from graftwork.merge.alignment.matching import match_weights

    spec = family_spec({name: tuple(tensor.shape) for name, tensor in a.items()})
    started = time.process_time()
    matching = match_weights(spec, a, b)
    seconds = time.process_time() - started
    return spec, matching, apply_permutation(spec, matching.permutation, b), seconds


def curves(task: Task, a: Model, b: Model, ways: Sequence[str], **more: Any) -> dict[str, Any]:
    """Return way → split → curve, as plain numbers."""
    from graftwork.merge.alignment.barrier import measure_barrier

    return {
        way: {curve.split: curve.record() for curve in measure_barrier(task, a, b, renormalization=way, **more)}  # type: ignore[arg-type]
        for way in ways
    }


def measure_pair(folder: Path, width: int, pair: int) -> dict[str, Any]:
    from graftwork.merge.alignment.analysis import analyse

    a, b = (trained(folder, "perceptron", width, 10 * pair + seed) for seed in (0, 1))
    task = digits_task(partial(Perceptron, width))
    spec, matching, aligned, seconds = matched(a, b)
    both = ("train", "test")
    return {
        "width": width,
        "analysis": analyse(spec, a, b, matching.permutation).record(),
        "matching_cpu_seconds": seconds,
        "sweeps": matching.sweeps,
        "naive": curves(task, a, b, ["none"], splits=both)["none"],
        "matched": curves(task, a, aligned, ["none"], splits=both)["none"],
        "repaired": {
            name: curves(task, a, other, ["repair"], splits=("test",), points=3)["repair"]
            for name, other in (("naive", b), ("matched", aligned))
        },
    }


def measure_batchnorm(folder: Path, pair: int) -> dict[str, Any]:
    a, b = (trained(folder, "residual", 32, 2 * pair + seed) for seed in (0, 1))
    task = digits_task(partial(Residual, 32))
    _, matching, aligned, _ = matched(a, b)
    ways = ("none", "bn", "repair")
    return {
        "l2_ratio": matching.distance_ratio,
        "naive": curves(task, a, b, ways),
        "matched": curves(task, a, aligned, ways),
    }


def measure_lenets(data: Path, name: str, files: str) -> dict[str, Any]:
    a, b = (load_file(data / "checkpoints" / "digits_lenet" / f"{files}_{letter}.safetensors") for letter in "ab")
    task = lenet_task(data, name)
    _, matching, aligned, _ = matched(a, b)
    return {
        "l2_ratio": matching.distance_ratio,
        **{
            label: {**curves(task, a, other, ["none"]), **curves(task, a, other, ["repair"], points=3)}
            for label, other in (("naive", b), ("matched", aligned))
        },
    }


def measure_many(folder: Path, width: int, method: str) -> dict[str, Any]:
    """Return the rise over the simplex of three models, and between the two that were not matched to each other."""
    from graftwork.merge.alignment.apply import apply_permutation
    from graftwork.merge.alignment.barrier import measure_barrier, measure_simplex

    a, b, c = (trained(folder, "perceptron", width, seed) for seed in range(3))
    task = digits_task(partial(Perceptron, width))
    started = time.process_time()
    if method == "weights":
        b, c = (matched(a, other)[2] for other in (b, c))
    elif method == "straight-through":
        from graftwork.merge.alignment.straight_through import match_straight_through

        spec = matched(a, b)[0]
        b, c = (
            apply_permutation(
                spec, match_straight_through(spec, a, other, task, steps=STRAIGHT_THROUGH_STEPS).permutation, other
            )
            for other in (b, c)
        )
    elif method in ("merge many", "universe"):
        from graftwork.merge.alignment.many import match_universe, merge_many

        spec = matched(a, b)[0]
        common = (merge_many if method == "merge many" else match_universe)(spec, [a, b, c])
        a, b, c = (
            apply_permutation(spec, order, model) for order, model in zip(common.permutations, (a, b, c), strict=True)
        )
    seconds = time.process_time() - started
    found: dict[str, Any] = {"width": width, "method": method, "matching_cpu_seconds": seconds}
    both: Any = ("train", "test")
    between = measure_barrier(task, b, c, splits=both)
    for simplex, curve in zip(measure_simplex(task, [a, b, c], steps=STEPS, splits=both), between, strict=True):
        found[simplex.split] = {
            "simplex": simplex.height,
            "centre_loss": simplex.centre_loss,
            "centre_accuracy": simplex.centre_accuracy,
            "between_b_and_c": curve.loss.height,
        }
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Tables and pictures


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print(flush=True)


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Return a mean with the least and the largest value."""
    return f"{statistics.fmean(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def show_widths(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    from graftwork.merge.pictures import Line, Panel, line_picture

    widths = sorted({record["width"] for record in records})
    of = {width: [record for record in records if record["width"] == width] for width in widths}

    def barriers(width: int, label: str, split: str) -> list[float]:
        return [record[label][split]["loss_barrier"]["height"] for record in of[width]]

    print("Perceptrons 64-w-w-w-10, mean (least–largest) over pairs: loss barriers on 25 points, distance")
    table(
        ["width", "pairs", "train, naive", "train, matched", "test, naive", "test, matched", "‖A−π(B)‖/‖A−B‖"],
        [
            [
                str(width),
                str(len(of[width])),
                *(
                    spread(barriers(width, label, split), ".4f")
                    for split in ("train", "test")
                    for label in ("naive", "matched")
                ),
                spread([record["analysis"]["l2_ratio"] for record in of[width]], ".4f"),
            ]
            for width in widths
        ],
    )
    print("Test accuracy at the midpoint, and of REPAIR of it")
    table(
        ["width", "naive", "matched", "naive + REPAIR", "matched + REPAIR"],
        [
            [
                str(width),
                *(
                    spread([record[label]["test"]["accuracy_barrier"]["midpoint"] for record in of[width]])
                    for label in ("naive", "matched")
                ),
                *(
                    spread([record["repaired"][label]["test"]["accuracy_barrier"]["midpoint"] for record in of[width]])
                    for label in ("naive", "matched")
                ),
            ]
            for width in widths
        ],
    )
    gammas = list(records[0]["analysis"]["directions"]["a_b"])
    print("Agreement R(γ) of singular directions, mean over pairs; R's normaliser is our definition")
    table(
        ["width", "", "ρ", *(f"R({gamma})" for gamma in gammas), "singular values change by"],
        [
            [
                str(width),
                label,
                f"{statistics.fmean(record['analysis']['rho'][name] for record in of[width]):.3f}",
                *(
                    f"{statistics.fmean(record['analysis']['directions'][name][gamma] for record in of[width]):.3f}"
                    for gamma in gammas
                ),
                f"{max(record['analysis']['singular_value_change'] for record in of[width]):.0e}",
            ]
            for width in widths
            for name, label in (
                ("a_b", "A and B"),
                ("a_aligned", "A and π(B)"),
                ("merged_a", "mean and A"),
            )
        ],
    )

    def by_width(label: str, values: Callable[[int], list[float]]) -> Line:
        return Line(
            label,
            [(width, statistics.fmean(values(width))) for width in widths],
            [(width, value) for width in widths for value in values(width)],
        )

    ticks = {float(width): str(width) for width in widths}
    counts = sorted({len(of[width]) for width in widths})
    pairs = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    line_picture(
        [
            Panel(
                [by_width(label, partial(barriers, label=label, split="train")) for label in ("naive", "matched")],
                across="width",
                up="loss barrier on training data",
                ticks=ticks,
                logarithmic="xy",
            ),
            Panel(
                [
                    by_width("naive", lambda width: [1.0] * len(of[width])),
                    by_width("matched", lambda width: [record["analysis"]["l2_ratio"] for record in of[width]]),
                ],
                across="width",
                up="distance ‖A − π(B)‖ / ‖A − B‖",
                ticks=ticks,
                logarithmic="x",
                at_zero=True,
                is_share=True,
            ),
        ],
        folder / "barrier-by-width.png",
        title="The barrier falls, the distance hardly does",
        subtitle=f"Perceptrons 64-w-w-w-10 on digits; means of {pairs} pairs, single pairs behind",
    )
    shown = 512 if 512 in of else widths[-1]

    def directions(label: str, name: str) -> Line:
        values = [record["analysis"]["directions"][name] for record in of[shown]]
        return Line(
            label,
            [(float(gamma), statistics.fmean(value[gamma] for value in values)) for gamma in gammas],
            [(float(gamma), value[gamma]) for value in values for gamma in gammas],
        )

    first = next(record for record in of[shown])
    line_picture(
        [
            Panel(
                [directions("naive", "a_b"), directions("matched", "a_aligned")],
                across="γ: directions with singular values above γ × the largest",
                up="agreement of directions R(γ)",
                ticks={float(gamma): gamma for gamma in gammas},
                at_zero=True,
            ),
            Panel(
                [
                    Line(
                        label, list(zip(first[label]["test"]["positions"], first[label]["test"]["losses"], strict=True))
                    )
                    for label in ("naive", "matched")
                ],
                across="λ",
                up="test loss",
                ticks={0: "A", 0.25: "¼", 0.5: "½", 0.75: "¾", 1: "B"},
                at_zero=True,
            ),
        ],
        folder / "directions.png",
        title="Matching aligns the large singular directions",
        subtitle=f"Perceptrons of width {shown} on digits; left: mean of {len(of[shown])} pairs; right: one pair",
    )


def show_batchnorm(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    from graftwork.merge.pictures import Line, Panel, line_picture

    names = {"none": "", "bn": " + BatchNorm", "repair": " + REPAIR"}
    cases = [(label, way) for label in ("naive", "matched") for way in names]
    print("Residual network with BatchNorm: test accuracy (loss) at the midpoint")
    table(
        ["", *(f"pair {number}" for number in range(len(records)))],
        [
            ["‖A−π(B)‖/‖A−B‖", *(f"{record['l2_ratio']:.4f}" for record in records)],
            *(
                [
                    label + names[way],
                    *(
                        f"{record[label][way]['test']['accuracy_barrier']['midpoint']:.3f} "
                        f"({record[label][way]['test']['loss_barrier']['midpoint']:.3f})"
                        for record in records
                    ),
                ]
                for label, way in cases
            ),
        ],
    )
    panels = [
        Panel(
            [
                Line(
                    label + names[way],
                    list(zip(curve["positions"], curve["accuracies"], strict=True)),
                )
                for label, way in cases
                for curve in [record[label][way]["test"]]
            ],
            across="λ",
            up="test accuracy" if number == 0 else "",
            ticks={0: "A", 0.25: "¼", 0.5: "½", 0.75: "¾", 1: "B"},
            is_share=True,
        )
        for number, record in enumerate(records)
    ]
    line_picture(
        panels,
        folder / "batchnorm.png",
        title="BatchNorm needs matching and new statistics",
        subtitle="Residual network on digits, 32 channels; one panel per pair",
    )


def show_lenets(records: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    print("LeNets of others: test accuracy at the midpoint")
    table(
        ["", "A, B", "naive", "naive + REPAIR", "matched", "matched + REPAIR", "‖A−π(B)‖/‖A−B‖"],
        [
            [
                name,
                "{:.3f}, {:.3f}".format(*(record["naive"]["none"]["test"]["accuracies"][end] for end in (0, -1))),
                *(
                    f"{record[label][way]['test']['accuracy_barrier']['midpoint']:.4f}"
                    for label in ("naive", "matched")
                    for way in ("none", "repair")
                ),
                f"{record['l2_ratio']:.4f}",
            ]
            for name, record in zip(names, records, strict=True)
        ],
    )


def show_many(records: Sequence[dict[str, Any]]) -> None:
    print("Three perceptrons, B and C matched to A; loss over the simplex of mixtures with weights of tenths")
    table(
        ["width", "method", "train barrier", "test barrier", "centre accuracy", "B–C train", "B–C test", "CPU seconds"],
        [
            [
                str(record["width"]),
                record["method"],
                f"{record['train']['simplex']:.4f}",
                f"{record['test']['simplex']:.4f}",
                f"{record['test']['centre_accuracy']:.3f}",
                f"{record['train']['between_b_and_c']:.4f}",
                f"{record['test']['between_b_and_c']:.4f}",
                f"{record['matching_cpu_seconds']:.1f}",
            ]
            for record in records
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="where networks, results and pictures are kept")
    parser.add_argument("sections", nargs="*", help=f"any of {' '.join(SECTIONS)}; by default all")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--data", type=Path, help="folder with digits/ and checkpoints/digits_lenet/")
    options = parser.parse_args()
    unknown = [section for section in options.sections if section not in SECTIONS]
    if unknown:
        parser.error(f"there is no section {unknown[0]}; known are {' '.join(SECTIONS)}")
    sections = options.sections or SECTIONS
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    results = Results(options.work / "results.jsonl")
    folder: Path = options.work
    print(f"torch {torch.__version__}, one thread; CPU seconds are of this process\n")
    if "widths" in sections:
        cases = [(width, pair) for width in options.widths for pair in range(options.pairs)]
        measured = [results.get(f"width {w}, pair {p}", partial(measure_pair, folder, w, p)) for w, p in cases]
        show_widths(folder, measured)
    if "batchnorm" in sections:
        pairs = range(2)
        measured = [results.get(f"batchnorm, pair {pair}", partial(measure_batchnorm, folder, pair)) for pair in pairs]
        show_batchnorm(folder, measured)
    if "lenets" in sections:
        if options.data is None:
            print("lenets are left out; --data FOLDER says where they are\n")
        else:
            named = {"MNIST": ("mnist", "mnist"), "SVHN, grey": ("svhn_gray", "svhn")}
            measured = [
                results.get(f"lenets, {name}", partial(measure_lenets, options.data, *files))
                for name, files in named.items()
            ]
            show_lenets(measured, list(named))
    if "many" in sections:
        measured = [
            results.get(f"three of width {width}, {method}", partial(measure_many, folder, width, method))
            for width in MANY_WIDTHS
            for method in ("naive", "weights", "straight-through", "merge many", "universe")
        ]
        show_many(measured)


if __name__ == "__main__":
    main()
