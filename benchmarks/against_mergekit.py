"""Merge the same checkpoints with graftwork and with mergekit: time, memory, and distance to the exact result.

    python benchmarks/against_mergekit.py --work DIRECTORY --size 160m
    python benchmarks/against_mergekit.py --work DIRECTORY --size 160m --skip-mergekit --methods linear ties
    python benchmarks/against_mergekit.py --work DIRECTORY --size 20m --distance
    python benchmarks/against_mergekit.py --work DIRECTORY --size 160m --memory-table
    python benchmarks/against_mergekit.py --work DIRECTORY --tiny

mergekit gets a virtual environment of its own below DIRECTORY (torch first, then mergekit). Checkpoints are made there
too (see `models.py`). Every merge runs in a fresh process with one thread; processor time is user plus system time of
that process and its children. Each tool's start-up, the cost of merging a checkpoint of twelve small tensors, is
measured right before every merge, so that both meet the same load of the machine, and subtracted. The floor is the
cost of reading every input byte and writing and syncing every output byte. All inputs are read once before each run,
so that the cache is warm, and graftwork has merged the small checkpoint with the same method, so that it is compiled.

What mergekit cost is kept in DIRECTORY/mergekit_SIZE.json, what graftwork cost in DIRECTORY/graftwork_SIZE.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))

import measure
import models

TORCH, MERGEKIT = "torch==2.13.0", "mergekit==0.1.5"
WEIGHTS = (0.5, 0.3, 0.2, 0.4, 0.1, 0.25, 0.15, 0.35)
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
SMALLEST = "1l"


def recipe(method: str, base: Path, tuned: list[Path]) -> dict[str, Any]:
    """Return the recipe of a method, which both tools read."""

    def each(**parameters: Any) -> list[dict[str, Any]]:
        return [
            {"model": str(model), "parameters": {key: value[i] if isinstance(value, (list, tuple)) else value
                                                 for key, value in parameters.items()}}
            for i, model in enumerate(tuned)
        ]  # fmt: skip

    plain = [{"model": str(model)} for model in tuned]
    with_base = {"merge_method": method, "base_model": str(base)}
    weighted = each(weight=WEIGHTS)
    half = each(weight=WEIGHTS, density=0.5)
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "linear": lambda: {"merge_method": method, "models": weighted},
        "slerp": lambda: {**with_base, "models": [{"model": str(base)}, plain[0]], "parameters": {"t": 0.4}},
        "nuslerp": lambda: {"merge_method": method, "models": each(weight=[0.6, 0.4] + [0] * len(tuned))[:2]},
        "multislerp": lambda: {"merge_method": method, "models": weighted},
        "karcher": lambda: {"merge_method": method, "models": plain, "parameters": {"max_iter": 10, "tol": 1e-5}},
        "task_arithmetic": lambda: {**with_base, "models": weighted},
        "ties": lambda: {**with_base, "models": half},
        "dare_ties": lambda: {**with_base, "models": half},
        "dare_linear": lambda: {**with_base, "models": half},
        "breadcrumbs": lambda: {**with_base, "models": each(weight=WEIGHTS, density=0.5, gamma=0.01)},
        "breadcrumbs_ties": lambda: {**with_base, "models": each(weight=WEIGHTS, density=0.5, gamma=0.01)},
        "della": lambda: {**with_base, "models": each(weight=WEIGHTS, density=0.5, epsilon=0.15)},
        "della_linear": lambda: {**with_base, "models": each(weight=WEIGHTS, density=0.5, epsilon=0.15)},
        "model_stock": lambda: {**with_base, "models": plain},
        "sce": lambda: {**with_base, "models": plain, "parameters": {"select_topk": 0.5}},
        "ram": lambda: {**with_base, "models": plain},
        "ramplus_tl": lambda: {**with_base, "models": plain},
        "nearswap": lambda: {**with_base, "models": plain[:1], "parameters": {"t": 0.001}},
        "arcee_fusion": lambda: {**with_base, "models": plain[:1]},
        "passthrough": lambda: {"merge_method": method, "models": plain[:1]},
    }
    return found[method]()


METHODS = (
    "linear", "task_arithmetic", "slerp", "nuslerp", "dare_linear", "dare_ties", "ties", "passthrough", "multislerp",
    "karcher", "model_stock", "nearswap", "ram", "ramplus_tl", "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "sce",
    "della_linear", "della",
)  # fmt: skip
"""The methods that both tools have."""


def inputs_of(configuration: dict[str, Any]) -> list[Path]:
    """Return the checkpoints that a recipe reads, each once."""
    named = [entry["model"] for entry in configuration["models"]]
    if "base_model" in configuration:
        named.append(configuration["base_model"])
    return [Path(name) for name in dict.fromkeys(named)]


# --- The two tools --------------------------------------------------------------------------------------------------


class Tool:
    """A merging program: how it is called, and in which environment."""

    compiles = False

    def __init__(self, name: str, nice: int, work: Path) -> None:
        self.name, self.nice, self.work = name, nice, work
        self.environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip

    def command(self, recipe_file: Path, output: Path, seed: int | None) -> list[str]:
        """Return the command that merges `recipe_file` into `output`."""
        raise NotImplementedError

    def versions(self) -> dict[str, str]:
        """Return the versions of the program and of what it computes with."""
        raise NotImplementedError

    def merge(
        self, configuration: dict[str, Any], label: str, *, keep: bool = False, seed: int | None = None
    ) -> measure.Figures:
        """Merge once into a new folder, and return what it cost; the folder stays only if `keep`."""
        recipe_file = self.work / "recipes" / f"{self.name}-{label}.yml"
        recipe_file.parent.mkdir(parents=True, exist_ok=True)
        recipe_file.write_text(yaml.safe_dump(configuration, sort_keys=False))
        output = self.output(label)
        shutil.rmtree(output, ignore_errors=True)
        for folder in inputs_of(configuration):
            measure.read_all(measure.weight_files(folder))
        try:
            return measure.run(
                self.command(recipe_file, output, seed), environment=self.environment, nice=self.nice,
                log=self.work / "logs" / f"{self.name}-{label}.log", output=output,
            )  # fmt: skip
        finally:
            if not keep:
                shutil.rmtree(output, ignore_errors=True)

    def output(self, label: str) -> Path:
        """Return the folder that a merge writes."""
        return self.work / "merged" / f"{self.name}-{label}"


class Graftwork(Tool):
    """The installed graftwork of this environment."""

    compiles = True

    def __init__(self, nice: int, work: Path, threads: int) -> None:
        super().__init__("graftwork", nice, work)
        self.threads = threads
        self.environment["OMP_NUM_THREADS"] = str(threads)

    def command(self, recipe_file: Path, output: Path, seed: int | None) -> list[str]:
        """Return the command that merges `recipe_file` into `output`."""
        start = "from graftwork.cli import main; main()"
        options = ["--force", "--threads", str(self.threads)]
        return [sys.executable, "-c", start, "merge", str(recipe_file), str(output), *options]

    def versions(self) -> dict[str, str]:
        """Return the versions of graftwork and of what it computes with."""
        packages = ("graftwork", "torch", "numpy", "numba")
        return {name: importlib.metadata.version(name) for name in packages if _installed(name)}


class Mergekit(Tool):
    """mergekit in a virtual environment of its own."""

    def __init__(self, nice: int, work: Path, environment: Path) -> None:
        super().__init__("mergekit", nice, work)
        self.folder = environment

    def install(self) -> None:
        """Create the environment unless it is there."""
        if (self.folder / "bin" / "mergekit-yaml").exists():
            return
        python = self.folder / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", str(self.folder)], check=True)
        for package in (TORCH, MERGEKIT):  # torch first: mergekit alone might bring another build of it
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", package], check=True)

    def command(self, recipe_file: Path, output: Path, seed: int | None) -> list[str]:
        """Return the command that merges `recipe_file` into `output`."""
        options = ["-j", "1", "--no-copy-tokenizer", "--quiet"]
        if seed is not None:
            options += ["--random-seed", str(seed)]
        return [str(self.folder / "bin" / "mergekit-yaml"), str(recipe_file), str(output), *options]

    def versions(self) -> dict[str, str]:
        """Return the versions of mergekit and of what it computes with."""
        packages = ("mergekit", "torch", "transformers", "safetensors", "numpy")
        script = (
            "import importlib.metadata, json, sys; "
            "print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))"
        )
        run = subprocess.run(
            [str(self.folder / "bin" / "python"), "-c", script, *packages], check=True, capture_output=True, text=True
        )
        return json.loads(run.stdout)


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def machine() -> dict[str, Any]:
    """Return what the figures were taken on."""
    processor = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "python": platform.python_version(),
    }


# --- Cost -----------------------------------------------------------------------------------------------------------


class Store:
    """Figures in one JSON file, written anew after every run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def save(self, **entries: Any) -> None:
        """Set entries and write the file."""
        self.content.update(entries)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=2) + "\n")
        partial.replace(self.path)

    def section(self, name: str) -> dict[str, Any]:
        """Return one part of the content, empty if it is not there."""
        return self.content.setdefault(name, {})


class Pairs:
    """Runs of one merge, each next to a run of the tool's start-up at the same load of the machine."""

    def __init__(self) -> None:
        self.runs: list[tuple[measure.Figures, measure.Figures, float]] = []

    def add(self, start: measure.Figures, figures: measure.Figures) -> None:
        """Add a start-up and the merge that followed it."""
        self.runs.append((start, figures, os.getloadavg()[0]))

    def as_json(self) -> dict[str, Any]:
        """Return the cheapest run, and the median of what the merges cost beyond their start-up."""
        best = min((figures for _, figures, _ in self.runs), key=lambda figures: figures.processor_seconds)
        found = best.as_json()
        for key in ("processor_seconds", "wall_seconds"):
            found[f"net_{key}"] = statistics.median(getattr(f, key) - getattr(start, key) for start, f, _ in self.runs)
        found["peak_anonymous_bytes"] = max(figures.peak_anonymous_bytes for _, figures, _ in self.runs)
        found["runs"] = [
            {
                "startup_processor_seconds": round(start.processor_seconds, 3),
                "processor_seconds": round(figures.processor_seconds, 3),
                "startup_wall_seconds": round(start.wall_seconds, 3),
                "wall_seconds": round(figures.wall_seconds, 3),
                "load": round(load, 2),
            }
            for start, figures, load in self.runs
        ]
        return found


def measure_methods(tool: Tool, store: Store, arguments: argparse.Namespace, size: str) -> None:
    """Measure every method that is asked for, and store the figures as they come."""
    work = arguments.work
    base, *tuned = models.generate(work / "models", size)
    smallest_base, *smallest = models.generate(work / "models", SMALLEST)
    start_up = recipe("linear", smallest_base, smallest)
    tool.merge(start_up, "startup")  # compiles, and warms the cache of the file system
    store.save(machine=machine(), versions=tool.versions(), size=size, parameters=models.count_parameters(size))
    for method in arguments.methods:
        configuration = recipe(method, base, tuned)
        pairs = Pairs()
        try:
            if tool.compiles:
                tool.merge(recipe(method, smallest_base, smallest), "warm")
            for _ in range(arguments.repeat):
                start = tool.merge(start_up, "startup")
                pairs.add(start, tool.merge(configuration, f"{size}-{method}"))
        except measure.ChildFailed as error:
            store.section("methods")[method] = {"failed": str(error)[-400:]}
            print(f"{tool.name} {method}: failed\n{error}", file=sys.stderr, flush=True)
        else:
            store.section("methods")[method] = entry = pairs.as_json()
            print(
                f"{tool.name} {size} {method}: {entry['processor_seconds']:.2f} s of processor time, "
                f"{entry['net_processor_seconds']:.2f} s beyond start-up",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        store.save()


def floors(arguments: argparse.Namespace, size: str) -> dict[str, dict[str, float]]:
    """Return the floor for each number of inputs that the methods have, the best of three."""
    base, *tuned = models.generate(arguments.work / "models", size)
    found = {}
    for count in sorted({len(inputs_of(recipe(method, base, tuned))) for method in arguments.methods}):
        files = [file for folder in [*tuned, base][:count] for file in measure.weight_files(folder)]
        count_bytes = sum(file.stat().st_size for file in measure.weight_files(base))
        runs = [measure.floor(files, arguments.work / "floor", count_bytes) for _ in range(max(3, arguments.repeat))]
        found[str(count)] = min(runs, key=lambda run: run["processor_seconds"])
    return found


def compare_cost(arguments: argparse.Namespace, size: str) -> dict[str, Any]:
    """Measure both tools and the floor, print the table, and return everything."""
    theirs = Store(arguments.work / f"mergekit_{size}.json")
    ours = Store(arguments.work / f"graftwork_{size}.json")
    if not arguments.skip_mergekit:
        tool = Mergekit(arguments.nice, arguments.work, arguments.mergekit)
        tool.install()
        measure_methods(tool, theirs, arguments, size)
    if not arguments.skip_graftwork:
        measure_methods(Graftwork(arguments.nice, arguments.work, arguments.threads), ours, arguments, size)
    lowest = floors(arguments, size)
    rows = cost_rows(arguments, size, ours.content, theirs.content, lowest)
    print_table(rows)
    return {"size": size, "mergekit": theirs.content, "graftwork": ours.content, "floor": lowest, "rows": rows}


def net(content: dict[str, Any], method: str, key: str) -> float | None:
    """Return a figure of a method less the tool's start-up; None if it was not measured or is lost in the noise."""
    value = content.get("methods", {}).get(method, {}).get(f"net_{key}")
    return value if value and value > 0 else None


def cost_rows(
    arguments: argparse.Namespace, size: str, ours: dict[str, Any], theirs: dict[str, Any], lowest: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return one row per method: seconds, megabytes, and the ratios between them."""
    base, *tuned = models.generate(arguments.work / "models", size)
    rows = []
    for method in arguments.methods:
        bottom = lowest[str(len(inputs_of(recipe(method, base, tuned))))]
        row: dict[str, Any] = {"method": method}
        for word, key in (("processor", "processor_seconds"), ("wall", "wall_seconds")):
            mine, other = net(ours, method, key), net(theirs, method, key)
            row[f"mergekit_{word}"], row[f"graftwork_{word}"], row[f"floor_{word}"] = other, mine, bottom[key]
            row[f"ratio_{word}"] = other / mine if mine and other else None
            row[f"over_floor_{word}"] = mine / bottom[key] if mine else None
        for name, content in (("mergekit", theirs), ("graftwork", ours)):
            peak = content.get("methods", {}).get(method, {}).get("peak_anonymous_bytes")
            row[f"{name}_megabytes"] = peak / 1e6 if peak else None
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows as a table, numbers to three digits."""
    if not rows:
        return
    columns = list(rows[0])

    def text(value: Any) -> str:
        if value is None:
            return "–"
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
        return str(value)

    cells = [columns, *([text(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in
                        enumerate(zip(line, widths, strict=True))))  # fmt: skip


def memory_table(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the peak anonymous memory of 2, 4 and 8 models; models beyond the third are hard links."""
    tools: list[Tool] = (
        [] if arguments.skip_graftwork else [Graftwork(arguments.nice, arguments.work, arguments.threads)]
    )
    if not arguments.skip_mergekit:
        tool = Mergekit(arguments.nice, arguments.work, arguments.mergekit)
        tool.install()
        tools.append(tool)
    rows = []
    for size in arguments.memory_sizes:
        base, *tuned = models.generate(arguments.work / "models", size)
        links = [models.link(tuned[i % len(tuned)], base.parent / f"link{i + 1}") for i in range(8)]
        for method in arguments.methods:
            if len(recipe(method, base, links[:2])["models"]) == len(recipe(method, base, links[:8])["models"]):
                continue  # it takes a fixed number of models
            for count in (2, 4, 8):
                row: dict[str, Any] = {"size": size, "method": method, "models": count}
                for tool in tools:
                    figures = tool.merge(recipe(method, base, links[:count]), f"{size}-{method}-{count}")
                    row[f"{tool.name}_megabytes"] = figures.peak_anonymous_bytes / 1e6
                    row[f"{tool.name}_processor"] = figures.processor_seconds
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    print_table(rows)
    return {"memory": rows}


# --- Distance to the exact result -----------------------------------------------------------------------------------


class Checkpoint:
    """A folder of safetensors files, read tensor by tensor as float64."""

    def __init__(self, folder: Path) -> None:
        self.where: dict[str, tuple[Path, str, tuple[int, ...], int, int]] = {}
        for file in measure.weight_files(folder):
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                entries = json.loads(stream.read(length))
            for name, entry in entries.items():
                if name != "__metadata__":
                    first, last = entry["data_offsets"]
                    self.where[name] = (file, entry["dtype"], tuple(entry["shape"]), 8 + length + first, last - first)

    def dtype(self, name: str) -> str:
        """Return the stored dtype of a tensor."""
        return self.where[name][1]

    def read(self, name: str) -> np.ndarray:
        """Return the exact values of a tensor."""
        file, dtype, shape, start, count = self.where[name]
        with file.open("rb") as stream:
            stream.seek(start)
            data = stream.read(count)
        if dtype == "BF16":
            values = models.from_words(np.frombuffer(data, np.uint16))
        else:
            values = np.frombuffer(data, {"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype])
        return values.astype(np.float64).reshape(shape)


def reference_arguments(method: str, configuration: dict[str, Any]) -> tuple[Path | None, list[Path], dict[str, Any]]:
    """Return base, models and parameters of a recipe, as the reference takes them."""
    base = Path(configuration["base_model"]) if "base_model" in configuration else None
    entries = [entry for entry in configuration["models"] if base is None or Path(entry["model"]) != base]
    parameters = dict(configuration.get("parameters", {}))
    for key in {key for entry in entries for key in entry.get("parameters", {})}:
        parameters[key] = [entry["parameters"][key] for entry in entries]
    return base, [Path(entry["model"]) for entry in entries], parameters


def near_a_cut(details: dict[str, Any], base: np.ndarray, x: list[np.ndarray], band: float) -> np.ndarray:
    """Return the entries whose score is within `band` (relative) of a threshold, or equal to it.

    mergekit rounds differences to bfloat16 before it ranks them, and takes any of equal ones: there both are right.
    """
    near = np.zeros(base.shape, dtype=bool)
    for model, cut in zip(x, details.get("cuts", []), strict=False):
        for one in cut if isinstance(cut, tuple) and isinstance(cut[0], (tuple, type(None))) else (cut,):
            if one is not None:
                near |= np.abs(np.abs(model - base) - one[0]) <= band * one[0]
    if details.get("cut"):
        score = details["scores"].astype(np.float64)
        near |= np.abs(score - details["cut"][0]) <= 2 * band * details["cut"][0]
    if "threshold" in details:
        near |= np.abs(details["score"] - details["threshold"]) <= 0.25 * details["threshold"]  # theirs is a sample
    if "election" in details:
        near |= np.abs(details["election"]) <= band * details["election_magnitude"]
    return near


def distances(method: str, configuration: dict[str, Any], ours: Path, theirs: Path, band: float) -> dict[str, Any]:
    """Return how far two merged checkpoints are from each other and from the exact result, tensor by tensor.

    Entries within `band` (relative) of a threshold are counted but not compared; the bar on ours holds for all.
    """
    from tests import reference

    base_folder, folders, parameters = reference_arguments(method, configuration)
    base = None if base_folder is None else Checkpoint(base_folder)
    inputs = [Checkpoint(folder) for folder in folders]
    mine, other = Checkpoint(ours), Checkpoint(theirs)
    total: dict[str, Any] = {
        "entries": 0, "excluded": 0, "largest_difference": 0.0, "our_largest_error": 0.0, "their_largest_error": 0.0,
        "our_square": 0.0, "their_square": 0.0, "our_worst_share_of_the_bar": 0.0, "tensors_where_ours_is_farther": 0,
        "entries_where_ours_is_farther": 0, "tensors": 0,
    }  # fmt: skip
    for name in inputs[0].where:
        b = None if base is None else base.read(name)
        x = [checkpoint.read(name) for checkpoint in inputs]
        result = reference.reference(method, b, x, name=name, **parameters)
        left, right = mine.read(name), other.read(name)
        total["our_worst_share_of_the_bar"] = max(
            total["our_worst_share_of_the_bar"], reference.excess(result, left, mine.dtype(name))
        )
        used = np.ones(left.shape, bool) if b is None else ~near_a_cut(result.details, b, x, band)
        our_error, their_error = (np.abs(value - result.value)[used] for value in (left, right))
        total["tensors"] += 1
        total["entries"] += int(left.size)
        total["excluded"] += int(left.size - np.count_nonzero(used))
        if not our_error.size:
            continue
        total["largest_difference"] = max(total["largest_difference"], float(np.max(np.abs(left - right)[used])))
        total["our_largest_error"] = max(total["our_largest_error"], float(np.max(our_error)))
        total["their_largest_error"] = max(total["their_largest_error"], float(np.max(their_error)))
        total["our_square"] += float(np.sum(our_error**2))
        total["their_square"] += float(np.sum(their_error**2))
        total["tensors_where_ours_is_farther"] += int(
            np.max(our_error) > np.max(their_error) or np.sum(our_error**2) > np.sum(their_error**2) * (1 + 1e-12)
        )
        total["entries_where_ours_is_farther"] += int(np.count_nonzero(our_error > their_error))
    count = max(1, total["entries"] - total["excluded"])
    total["our_mean_square_root"] = (total.pop("our_square") / count) ** 0.5
    total["their_mean_square_root"] = (total.pop("their_square") / count) ** 0.5
    return total


def random_statistics(arguments: argparse.Namespace, method: str, tools: list[Tool], seeds: int) -> dict[str, Any]:
    """Return kept fraction, rescale factor and mean over seeds of a random method, for each tool.

    One float32 fine-tune with weight 1 and density 0.5, so that the mask can be read off the result. `kept` is the
    fraction of changed entries that stay, `factor_error` the largest relative distance of their factor from
    Σ|d| / Σ|m∘d|, `mean` the mean over seeds of the part of the change that lies along d.
    """
    base_folder, tuned, *_ = models.generate(arguments.work / "models", SMALLEST, models=1, dtype="F32")
    base, model = Checkpoint(base_folder), Checkpoint(tuned)
    found: dict[str, Any] = {}
    for tool in tools:
        kept, changed, along, factor_error = 0, 0, [], 0.0
        for seed in range(seeds):
            parameters: dict[str, Any] = {"weight": 1.0, "density": 0.5}
            if method.startswith("della"):
                parameters["epsilon"] = 0.15
            configuration: dict[str, Any] = {
                "merge_method": method, "base_model": str(base_folder),
                "models": [{"model": str(tuned), "parameters": parameters}],
            }  # fmt: skip
            if tool.name == "graftwork":
                configuration["parameters"] = {"seed": seed}
            label = f"random-{method}"
            tool.merge(configuration, label, keep=True, seed=seed)
            merged = Checkpoint(tool.output(label))
            inner = square = 0.0
            for name in model.where:
                d = model.read(name) - base.read(name)
                out = merged.read(name) - base.read(name)
                mask = (out != 0) & (d != 0)
                kept += int(np.count_nonzero(mask))
                changed += int(np.count_nonzero(d))
                inner += float(np.sum(out * d))
                square += float(np.sum(d * d))
                large = mask & (np.abs(d) > 1e-4)  # below, the rounding of the output hides the factor
                if large.any() and d.size > 1000:
                    expected = np.sum(np.abs(d)) / np.sum(np.abs(d) * mask)
                    factor_error = max(factor_error, abs(float(np.median(out[large] / d[large])) / expected - 1))
            along.append(inner / square)
            shutil.rmtree(tool.output(label))
        found[tool.name] = {
            "kept": kept / changed, "factor_error": factor_error, "mean": float(np.mean(along)),
            "standard_error": float(np.std(along) / max(1, seeds - 1) ** 0.5),
        }  # fmt: skip
    return found


def compare_distance(arguments: argparse.Namespace, size: str) -> dict[str, Any]:
    """Merge with both tools and compare the results with the exact one."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    mergekit = Mergekit(arguments.nice, arguments.work, arguments.mergekit)
    mergekit.install()
    tools: list[Tool] = [Graftwork(arguments.nice, arguments.work, 1), mergekit]
    base, *tuned = models.generate(arguments.work / "models", size)
    rows, chance = [], {}
    for method in arguments.methods:
        if method in RANDOM:
            chance[method] = random_statistics(arguments, method, tools, arguments.seeds)
            print(json.dumps({method: chance[method]}), file=sys.stderr, flush=True)
            continue
        configuration = recipe(method, base, tuned)
        label = f"{size}-{method}-distance"
        for tool in tools:
            extra = {}
            if tool is mergekit and arguments.mergekit_dtype:
                extra = {"dtype": arguments.mergekit_dtype, "out_dtype": "bfloat16"}
            tool.merge({**configuration, **extra}, label, keep=True)
        band = 2.0**-20 if arguments.mergekit_dtype == "float32" else 2.0**-8
        found = distances(method, configuration, *(tool.output(label) for tool in tools), band)
        rows.append({"method": method, **found})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        for tool in tools:
            shutil.rmtree(tool.output(label))
    print_table(rows)
    for method, entry in chance.items():
        print(method, json.dumps(entry))
    return {"distance": rows, "random": chance}


# --- Command line ---------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description="Compare graftwork with mergekit: time, memory, distance to exact.")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for everything that is made; the disk measured"
    )
    parser.add_argument("--size", choices=models.SIZES, default="160m")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--threads", type=int, default=1, help="threads of graftwork")
    parser.add_argument("--repeat", type=int, default=1, help="runs per method; the median beyond start-up counts")
    parser.add_argument("--nice", type=int, default=0, help="how much to lower the priority of the measured programs")
    parser.add_argument("--mergekit", type=Path, help="its virtual environment; by default one below the work folder")
    parser.add_argument("--skip-mergekit", action="store_true", help="use the figures stored by an earlier run")
    parser.add_argument("--skip-graftwork", action="store_true", help="use the figures stored by an earlier run")
    parser.add_argument("--tiny", action="store_true", help="measure checkpoints of 8,000 tiny tensors")
    parser.add_argument("--memory-table", action="store_true", help="measure the memory of 2, 4 and 8 models")
    parser.add_argument("--memory-sizes", nargs="+", choices=models.SIZES, default=["160m", "1b"], metavar="SIZE")
    parser.add_argument("--distance", action="store_true", help="compare results with the exact ones")
    parser.add_argument("--mergekit-dtype", help="let mergekit compute in this dtype when distances are compared")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the random methods when distances are compared")
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    arguments.mergekit = (arguments.mergekit or arguments.work / "mergekit").absolute()
    return arguments


def reports(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Make the reports that are asked for, each with the name of its file."""
    if arguments.memory_table:
        yield "memory", memory_table(arguments)
    elif arguments.distance:
        yield f"distance_{arguments.size}", compare_distance(arguments, arguments.size)
    else:
        size = "tiny" if arguments.tiny else arguments.size
        yield f"cost_{size}", compare_cost(arguments, size)


def main() -> None:
    """Measure, print a table, and leave the JSON in the work folder."""
    arguments = parse()
    arguments.work.mkdir(parents=True, exist_ok=True)
    for name, report in reports(arguments):
        file = arguments.work / f"{name}.json"
        file.write_text(json.dumps(report, indent=2) + "\n")
        print(f"\n{file}")


if __name__ == "__main__":
    main()
