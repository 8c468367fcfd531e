"""Do FedKA, FRAug and GGEUR help? The digit domains, three seeds, equal steps, equal tuning.

    python benchmarks/federated.py --out results/federated
    python benchmarks/federated.py --out results/federated --seeds 0 --grids fedka fraug
    python benchmarks/federated.py --out results/federated --grids real --data ../shared/data
    python benchmarks/federated.py --out results/federated --show

Every cell (grid, algorithm, setting, seed) is a run of its own with one thread, and a JSON file in OUT/cells; those
that are there are not run again. What counts is the mean over the last rounds on held-out examples, never the best
round.
Exits with 1 if a bar is missed or a cell took more than 60 processor seconds.

- **fedka**: each of the five domains in turn is the unlabelled target, the other four are sites. 25 rounds of one
  epoch, Adam 0.002, batches of 32; last five rounds; accuracy on the target's test split, as the model is (`accuracy`)
  and with BatchNorm statistics of the target's unlabelled *training* split (`adapted`, AdaBN).
- **fraug**: the five domains are sites with n examples each, judged on their own kind. 40 rounds of 8 steps, SGD 0.05
  with momentum 0.5, batches of 32; last three rounds.
- **ggeur**: ten sites share 64 features of the digits by a Dirichlet draw per class. 50 rounds of 20 steps, SGD with
  the better of 0.2 and 0.8 for every row, batches of 32; last five rounds. `multi` has four domains.
- **real** (only where asked for; needs --data): five sets of digits, Office-Caltech10's SURF features and the Amazon
  reviews' bags of words. Each domain in turn is the unlabelled target, as in fedka; and all domains are sites judged
  on their own kind, as in fraug, or share a linear classifier of the features, as in ggeur. It has no bars.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

for _library in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_library}_NUM_THREADS"] = "1"

SECONDS = 60.0
TARGETS = ("clean", "rotate", "texture", "noiseblur", "scale")
DIGIT_SETTINGS = {"optimiser": "adam", "learning_rate": 0.002, "batch_size": 32, "local_epochs": 1, "weights": "equal"}
OWN_SETTINGS = {"learning_rate": 0.05, "momentum": 0.5, "batch_size": 32, "local_steps": 8}
FEATURE_SETTINGS = {"batch_size": 32, "local_steps": 20}
RATES = (0.2, 0.8)


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        grid: `fedka`, `fraug` or `ggeur`.
        setting: What varies within the grid besides algorithm and seed.
        row: What the row of the table is called.
        algorithm: Name or preset.
        settings: Its settings.
        data: Arguments of the federation.
        rounds: How many.
        tail: How many of the last rounds count.
        seed: Of the run.
        participation: Share of the sites in a round.
    """

    grid: str
    setting: str
    row: str
    algorithm: str
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    rounds: int
    tail: int
    seed: int
    participation: float = 1.0
    rate: float = 0.0

    @property
    def file(self) -> str:
        rate = f"-{self.rate:g}" if self.rate else ""
        setting = self.setting.replace(" ", "_").replace("->", "-to-")
        return f"{self.grid}-{setting}-{self.row.replace(' ', '_')}{rate}-{self.seed}.json"


def fedka_cells(seed: int) -> Iterator[Cell]:
    for target in TARGETS:
        for algorithm in ("fedavg", "fedka", "fedka-paper"):
            yield Cell(
                "fedka", target, algorithm, algorithm, DIGIT_SETTINGS, {"target": target}, rounds=25, tail=5, seed=seed
            )


def fraug_cells(seed: int) -> Iterator[Cell]:
    for count in (50, 20, 200):
        for algorithm in ("fedavg", "fedbn", "fraug", "fraug-paper"):
            data = {"options": {"examples": str(count)}}
            yield Cell("fraug", f"n{count}", algorithm, algorithm, OWN_SETTINGS, data, rounds=40, tail=3, seed=seed)


GGEUR_SETTINGS: Mapping[str, tuple[str, Mapping[str, str], float, Mapping[str, Any]]] = {
    "alpha0.1": ("dirichlet:alpha=0.1,sites=10", {"domains": "clean"}, 1.0, {}),
    "alpha0.1-30%": ("dirichlet:alpha=0.1,sites=10", {"domains": "clean"}, 0.3, {}),
    "multi0.5": (
        "domain+dirichlet:alpha=0.5,sites=10", {"suite": "mixed"}, 1.0,
        {"mode": "multi", "target_per_class": 50, "per_prototype": 20},
    ),
    "alpha0.3": ("dirichlet:alpha=0.3,sites=10", {"domains": "clean"}, 1.0, {}),
}  # fmt: skip


def ggeur_cells(seed: int) -> Iterator[Cell]:
    for setting, (partition, options, participation, own) in GGEUR_SETTINGS.items():
        data = {"partition": partition, "options": {"features": "half64", "test_share": "0.3", **options}}
        rows: list[tuple[str, str, dict[str, Any]]] = [
            ("fedavg", "fedavg", {}),
            ("scaffold", "scaffold", {}),
            ("ggeur", "ggeur", {"weights": "equal", **own}),
            ("ggeur no fill", "ggeur", {"weights": "equal", "fill": "none", **own}),
            ("ggeur from lda", "ggeur", {"weights": "equal", "start": "lda", **own}),
        ]
        for rate in RATES:
            for row, algorithm, settings in rows:
                given = {**FEATURE_SETTINGS, **settings, "learning_rate": rate}
                yield Cell(
                    "ggeur", setting, row, algorithm, given, data, rounds=50, tail=5, seed=seed,
                    participation=participation, rate=rate,
                )  # fmt: skip
        given = {**FEATURE_SETTINGS, "start": "lda", "learning_rate": 0.0, **own}
        yield Cell("ggeur", setting, "lda alone", "ggeur", given, data, rounds=1, tail=1, seed=seed)


REAL_DOMAINS: Mapping[str, tuple[str, ...]] = {
    "digits": ("mnist", "usps", "mnist_m", "svhn_gray", "char74k_fnt"),
    "office": ("amazon", "caltech", "dslr", "webcam"),
    "amazon": ("books", "dvd", "electronics", "kitchen"),
}
REAL_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "digits": {"examples": "600"},
    "office": {},
    "amazon": {"examples": "600"},
}
"""All domains of digits, and of reviews, have as many training examples; Office-Caltech10 is taken whole."""


def real_cells(seed: int) -> Iterator[Cell]:
    for name, targets in REAL_DOMAINS.items():
        options = REAL_OPTIONS[name]
        for target in targets:
            for algorithm in ("fedavg", "fedka", "fedka-paper"):
                data = {"name": name, "target": target, "options": options}
                setting = f"{name}->{target}"
                yield Cell("real", setting, algorithm, algorithm, DIGIT_SETTINGS, data, rounds=15, tail=5, seed=seed)
        own = {**OWN_SETTINGS, "learning_rate": 0.02} if name == "digits" else OWN_SETTINGS
        few = {"digits": "100", "office": "80", "amazon": "200"}[name]
        for algorithm in ("local", "fedavg", "fedbn", "fraug"):
            if algorithm == "fedbn" and name != "digits":
                continue  # the network of features has no batch normalisation
            data = {"name": name, "options": {**options, "examples": few}}
            yield Cell("real", f"{name}, own kind", algorithm, algorithm, own, data, rounds=30, tail=3, seed=seed)
    geometry = {"mode": "multi", "weights": "equal", "target_per_class": 50, "per_prototype": 20}
    data = {"name": "office", "partition": "domain+dirichlet:alpha=0.3,sites=8", "options": {"network": "linear"}}
    for rate in (0.02, 0.1):
        for row, algorithm, settings in (("fedavg", "fedavg", {}), ("ggeur", "ggeur", geometry)):
            given = {**FEATURE_SETTINGS, **settings, "learning_rate": rate}
            yield Cell(
                "real", "office, skewed", row, algorithm, given, data, rounds=30, tail=5, seed=seed, rate=rate
            )  # fmt: skip


GRIDS = {"fedka": fedka_cells, "fraug": fraug_cells, "ggeur": ggeur_cells, "real": real_cells}
USUAL = ("fedka", "fraug", "ggeur")


# ---------------------------------------------------------------------------------------------------------------------
# One run


def run(cell: Cell, folder: Path | None) -> list[dict[str, float]]:
    """Run a cell, with real data from `folder`; return the numbers of its last rounds, in percent."""
    import torch

    from graftwork.federated.domains import FederationSpec
    from graftwork.federated.runs import Experiment
    from graftwork.federated.server import simulate

    torch.set_num_threads(1)
    real = {"data": str(folder)} if cell.grid == "real" else {}
    federation = FederationSpec(**{"name": "digits", "seed": cell.seed, **cell.data, **real})
    experiment = Experiment(
        federation, cell.algorithm, cell.settings, rounds=cell.rounds, participation=cell.participation
    )
    lines = simulate(experiment).lines[-cell.tail :]
    rows = []
    for line in lines:
        row = {"accuracy": line["accuracy"]}
        if "accuracy_adapted" in line.get("server", {}):
            row["adapted"] = line["server"]["accuracy_adapted"]
        row |= {
            name: line["algorithm"][name] for name in ("group_effect", "vote_coverage") if name in line["algorithm"]
        }
        rows.append({name: 100 * value for name, value in row.items()})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Results


@dataclass
class Results:
    """Means over the last rounds, by grid, setting, row and seed; in percent."""

    values: dict[tuple[str, str, str, int], dict[str, float]] = field(default_factory=dict)

    def add(self, cell: Cell, found: Mapping[str, float]) -> None:
        key = (cell.grid, cell.setting, cell.row, cell.seed)
        best = self.values.get(key)
        if best is None or found["accuracy"] > best["accuracy"]:
            self.values[key] = dict(found)

    def seeds(self, grid: str, settings: Sequence[str], row: str) -> list[int]:
        """Return the seeds for which every setting is there."""
        present = [{s for g, t, r, s in self.values if (g, t, r) == (grid, setting, row)} for setting in settings]
        return sorted(set.intersection(*present)) if present else []

    def mean(self, grid: str, settings: Sequence[str], row: str, seed: int, name: str = "accuracy") -> float:
        return statistics.fmean(self.values[grid, setting, row, seed][name] for setting in settings)

    def gains(
        self, grid: str, settings: Sequence[str], row: str, baseline: str, name: str = "accuracy"
    ) -> dict[int, float]:
        both = set(self.seeds(grid, settings, row)) & set(self.seeds(grid, settings, baseline))
        return {
            seed: self.mean(grid, settings, row, seed, name) - self.mean(grid, settings, baseline, seed, name)
            for seed in sorted(both)
        }


@dataclass(frozen=True)
class Bar:
    """What a gain has to be."""

    text: str
    grid: str
    settings: tuple[str, ...]
    row: str
    baseline: str
    least: float | None
    name: str = "accuracy"


BARS = (
    Bar("FedKA − FedAvg", "fedka", TARGETS, "fedka", "fedavg", 8.0),
    Bar("FedKA as published − FedAvg", "fedka", TARGETS, "fedka-paper", "fedavg", 5.0),
    Bar("FedKA − FedAvg, both AdaBN", "fedka", TARGETS, "fedka", "fedavg", None, "adapted"),
    Bar("FedKA as published − FedAvg, both AdaBN", "fedka", TARGETS, "fedka-paper", "fedavg", None, "adapted"),
    *(
        bar
        for n in ("n20", "n50", "n200")
        for bar in (
            Bar(f"FedBN − FedAvg, {n}", "fraug", (n,), "fedbn", "fedavg", 4.0),
            Bar(f"FRAug − FedAvg, {n}", "fraug", (n,), "fraug", "fedavg", 4.0),
            Bar(f"FRAug − FedBN, {n}", "fraug", (n,), "fraug", "fedbn", -1.0),
            Bar(f"FRAug as published − FedBN, {n}", "fraug", (n,), "fraug-paper", "fedbn", None),
        )
    ),
    Bar("GGEUR − FedAvg, alpha 0.1", "ggeur", ("alpha0.1",), "ggeur", "fedavg", 3.0),
    Bar("GGEUR − FedAvg, alpha 0.1, 30 %", "ggeur", ("alpha0.1-30%",), "ggeur", "fedavg", 8.0),
    Bar("GGEUR − FedAvg, four domains, alpha 0.5", "ggeur", ("multi0.5",), "ggeur", "fedavg", 4.0),
    Bar("GGEUR − FedAvg, alpha 0.3", "ggeur", ("alpha0.3",), "ggeur", "fedavg", None),
)


def show_table(results: Results, title: str, grid: str, settings: Sequence[str]) -> None:
    """Print rows × settings of a grid; where it was measured also with adapted BatchNorm statistics."""
    keys = [key for key in results.values if key[0] == grid and key[1] in settings]
    width = max(16, *(len(setting) + 2 for setting in settings))
    print(f"\n{title}: accuracy in percent, mean over seeds ± standard deviation")
    print(f"{'':28s}" + "".join(f"{setting:>{width}s}" for setting in settings) + f"{'mean':>10s}{'seeds':>8s}")
    for row in dict.fromkeys(key[2] for key in keys):
        for name in ("accuracy", "adapted"):
            cells, means = [], []
            for setting in settings:
                found = [results.values[key][name] for key in keys if key[1:3] == (setting, row)
                         and name in results.values[key]]  # fmt: skip
                spread = statistics.stdev(found) if len(found) > 1 else 0.0
                cells.append(f"{statistics.fmean(found):9.1f} ± {spread:3.1f} " if found else "–")
                means += [statistics.fmean(found)] if found else []
            if means:
                label = f"{row} + AdaBN" if name == "adapted" else row
                seeds = len({key[3] for key in keys if key[2] == row})
                line = "".join(f"{cell:>{width}s}" for cell in cells)
                print(f"{label:28s}{line}{statistics.fmean(means):10.1f}{seeds:8d}")


def show(results: Results) -> bool:
    """Print tables and bars; return whether all bars that could be judged were met."""
    for grid in GRIDS:
        tables: dict[str, list[str]] = {}
        for setting in dict.fromkeys(key[1] for key in results.values if key[0] == grid):
            transfer = setting.partition("->")[0] + ", one domain without labels" if "->" in setting else setting
            tables.setdefault(f"real: {transfer}" if grid == "real" else grid, []).append(setting)
        for title, settings in tables.items():
            show_table(results, title, grid, settings)
    print("\ngains (points, mean over seeds; each seed)")
    met = True
    for bar in BARS:
        gains = results.gains(bar.grid, bar.settings, bar.row, bar.baseline, bar.name)
        if not gains:
            continue
        gain = statistics.fmean(gains.values())
        verdict = ""
        if bar.least is not None:
            is_met = gain >= bar.least
            met &= is_met
            verdict = f"bar {bar.least:+.1f}: {'met' if is_met else 'MISSED'}"
        each = ", ".join(f"{value:+.1f}" for value in gains.values())
        print(f"  {bar.text:44s} {gain:+6.1f}   ({each})   {verdict}")
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the cells")
    parser.add_argument("--grids", nargs="+", choices=list(GRIDS), default=list(USUAL))
    parser.add_argument("--data", type=Path, help="folder of real domains, for the grid real")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", help="only these settings, such as rotate or n50")
    parser.add_argument("--rows", nargs="+", help="only these rows, such as fedavg or fedka")
    parser.add_argument("--show", action="store_true", help="run nothing, show what is there")
    arguments = parser.parse_args()
    if "real" in arguments.grids and arguments.data is None and not arguments.show:
        parser.error("the grid real needs --data, a folder of real domains")
    folder = arguments.out / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    results, slow = Results(), []
    for seed in arguments.seeds:
        for grid in arguments.grids:
            for cell in GRIDS[grid](seed):
                if arguments.settings and cell.setting not in arguments.settings:
                    continue
                if arguments.rows and cell.row not in arguments.rows:
                    continue
                path = folder / cell.file
                wanted = json.loads(json.dumps(asdict(cell)))
                kept = json.loads(path.read_text()) if path.exists() else None
                if kept is None or kept["cell"] != wanted:
                    if arguments.show:
                        continue
                    begin = time.process_time()
                    rounds = run(cell, arguments.data)
                    kept = {"cell": wanted, "seconds": time.process_time() - begin, "rounds": rounds}
                    partial = path.with_suffix(".partial")
                    partial.write_text(json.dumps(kept, indent=1) + "\n")
                    partial.replace(path)
                means = {name: statistics.fmean(row[name] for row in kept["rounds"]) for name in kept["rounds"][0]}
                results.add(cell, means)
                slow += [cell.file] if kept["seconds"] > SECONDS else []
                text = " ".join(f"{name} {value:.1f}" for name, value in means.items())
                print(f"{cell.file[:-5]:44s} {kept['seconds']:6.1f} s  {text}", flush=True)
    met = show(results)
    for file in slow:
        print(f"{file} took more than {SECONDS:g} processor seconds")
    return 0 if met and not slow else 1


if __name__ == "__main__":
    raise SystemExit(main())
