"""Time, memory and accuracy of data-driven merging beside FusionBench, on the same models and inputs.

    python benchmarks/against_fusionbench.py WORK [--suites mlp8 vit8] [--width 2048] [--only time memory accuracy]

FusionBench gets a virtual environment of its own in WORK, with the release below from the package index, and runs in
processes of its own. Its classes are used as they are; what belongs to CLIP alone is replaced: heads, loaders of inputs
and loggers. `--python` names an environment that is there already.

- **time**: CPU seconds per step of Concrete task arithmetic, layer-wise AdaMerging and Concrete AdaMerging (of its
  first phase), each as the difference of two runs of different length, so that what happens once does not count.
  Batches of 16 per task and the entropy as loss on both sides. For Fisher, CPU seconds of measuring 256 examples of
  every model and of merging.
- **memory**: the peak over the process's base, in units of one model in float32 (P), for eight perceptrons of six
  layers of 2048 (25 million parameters): the whole of FusionBench's algorithms with their models in memory; ours with
  the models on disk. On both sides freed memory goes back to the system at once (`MALLOC_MMAP_THRESHOLD_`), or what is
  counted is mostly the allocator's. Linux only.
- **accuracy**: of the merges, mean over tasks on test inputs. Concrete task arithmetic after 200 steps of each tool's
  with the published loss and rate, on unlabelled training inputs; Fisher with three seeds of ours.

One thread each. Run it on an idle machine. The last lines say which bars hold; exit code 1 if one does not.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from peaks import EXPERTS, LAYERS, perceptron, print_peak, write_perceptrons
from safetensors.torch import load_file, save_file
from suites import Suite, load_suite
from torch import Tensor, nn

RELEASE = "fusion-bench==0.2.33"
STEPS = (10, 60)
"""Lengths of the two runs of which the difference is taken."""
ACCURACY_STEPS = 200
BATCH, EXAMPLES = 16, 256

LEARNED: Mapping[str, str] = {
    "mask": "Concrete task arithmetic",
    "layer_wise": "AdaMerging, layer-wise",
    "mask+layer_wise": "Concrete AdaMerging",
}


# ---------------------------------------------------------------------------------------------------------------------
# In FusionBench's environment


def classes() -> Mapping[str, Any]:
    """Return FusionBench's classes, with nothing of CLIP left in them."""
    from fusion_bench.method.adamerging.clip_layer_wise_adamerging import CLIPLayerWiseAdaMergingAlgorithm
    from fusion_bench.method.concrete_subspace.clip_concrete_adamerging import ConcreteLayerWiseAdaMergingForCLIP
    from fusion_bench.method.concrete_subspace.clip_concrete_task_arithmetic import (
        ConcreteTaskArithmeticAlgorithmForCLIP,
    )
    from fusion_bench.method.fisher_merging.clip_fisher_merging import FisherMergingForCLIPVisionModel

    class Plain:
        """What stands in for CLIP: tasks' own heads, unlabelled training inputs, no logger."""

        tasks: Mapping[str, Any]
        clip_processor = None
        log_dir = None

        def setup_zero_shot_classification_head(self, *_: Any, **__: Any) -> None:
            pass

        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            pass

        def log_dict(self, *_: Any, **__: Any) -> None:
            pass

        def get_shuffled_test_loader_iter(self, task: str, **_: Any) -> Iterator[tuple[Tensor, None]]:
            if task not in self.iterators:
                self.iterators[task] = shuffled(self.tasks[task])
            return self.iterators[task]

        def compute_logits(self, module: nn.Module, images: Any, task: str, **_: Any) -> Tensor:
            images = images[0] if isinstance(images, tuple | list) else images
            own = self.tasks[task]
            return module(images) if own.logits is None else own.logits(module, images)

    class Silent:
        """A progress bar that shows nothing, and so costs nothing."""

        def __init__(self, items: Any, *_: Any, **__: Any) -> None:
            self.items = items

        def __iter__(self) -> Iterator[Any]:
            return iter(self.items)

        def set_postfix(self, *_: Any, **__: Any) -> None:
            pass

    found = {
        "mask": ConcreteTaskArithmeticAlgorithmForCLIP,
        "layer_wise": CLIPLayerWiseAdaMergingAlgorithm,
        "mask+layer_wise": ConcreteLayerWiseAdaMergingForCLIP,
        "fisher": FisherMergingForCLIPVisionModel,
    }
    for kind in found.values():
        for part in kind.__mro__:
            if hasattr(sys.modules[part.__module__], "tqdm"):
                sys.modules[part.__module__].tqdm = Silent
    return {name: type(kind.__name__, (Plain, kind), {}) for name, kind in found.items()}


def shuffled(task: Any) -> Iterator[tuple[Tensor, None]]:
    """Yield batches of a task's unlabelled inputs for ever, in a new order each time."""
    rows = torch.cat([inputs for inputs, _ in (task.unlabelled or task.batches)()])
    generator = torch.Generator().manual_seed(sum(task.name.encode()))
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for start in range(0, len(rows) - BATCH + 1, BATCH):
            yield rows[order[start : start + BATCH]], None


def pool_of(networks: Any, names: Sequence[str], tasks: Mapping[str, Any]) -> Any:
    """Return a pool that gives a fresh copy of a model each time."""
    from fusion_bench.modelpool import BaseModelPool

    class Pool(BaseModelPool):
        def load_model(self, name: str, *_: Any, **__: Any) -> nn.Module:
            return networks(name)

        def load_train_dataset(self, name: str, *_: Any, **__: Any) -> Any:
            batches = list(tasks[name].batches())
            rows = torch.cat([inputs for inputs, _ in batches])
            labels = [0] * len(rows) if batches[0][1] is None else torch.cat([own for _, own in batches]).tolist()
            # Shuffled, as it takes the first ones, and ours draws.
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
            return [(rows[place], labels[place]) for place in order]

    return Pool({name: nn.Identity() for name in ("_pretrained_", *names)})


def settings_of(method: str, steps: int, batch: int) -> dict[str, Any]:
    """Return FusionBench's own settings of a method, but for the number of steps."""
    from fusion_bench_config import __path__ as places
    from omegaconf import OmegaConf

    files = {
        "mask": "concrete_subspace/clip_concrete_task_arithmetic.yaml",
        "layer_wise": "adamerging/clip.yaml",
        "mask+layer_wise": "concrete_subspace/clip_concrete_layer_wise_adamerging.yaml",
        "fisher": "fisher_merging/clip_fisher_merging.yaml",
    }
    read = OmegaConf.load(Path(next(iter(places))) / "method" / files[method])
    found = {key: read[key] for key in read if key not in ("fast_dev_run", "_target_")}
    if method == "fisher":
        return {**found, "dataloader_kwargs": {"batch_size": batch, "num_workers": 0}}
    changes = {"max_steps": steps, "max_adamerging_steps": 1, "save_interval": 10**9, "num_workers": 0}
    changes["save_merging_weights"] = False
    return {**found, **{key: value for key, value in changes.items() if key in found}}


def theirs(method: str, pool: Any, tasks: Mapping[str, Any], steps: int = 0, batch: int = 32) -> nn.Module:
    """Run one of FusionBench's algorithms and return the merged model."""
    import lightning
    from omegaconf import DictConfig

    torch.manual_seed(0)
    settings = settings_of(method, steps, batch)
    kind = classes()[method]
    algorithm = kind(**settings) if method == "fisher" else kind(DictConfig(settings))
    algorithm.tasks, algorithm.iterators = tasks, {}
    algorithm._fabric_instance = lightning.Fabric(devices=1, accelerator="cpu")
    merged: nn.Module = algorithm.run(pool)
    return merged


def peer(job: Mapping[str, Any]) -> Mapping[str, Any]:
    """Do one job in FusionBench's environment and return what was found."""
    torch.set_num_threads(1)
    if job["what"] == "memory":
        method = job["method"]

        def run(width: int) -> None:
            from graftwork.merge.task import Task

            rows = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
            names = [f"task{number}" for number in range(EXPERTS)]
            tasks = {
                name: Task(name, lambda: perceptron(width), lambda: [(rows, None)], logits=lambda m, x: m(x)[:, :10])
                for name in names
            }
            paths = write_perceptrons(Path(job["folder"]), width)
            places = dict(zip(("_pretrained_", *names), paths, strict=True))

            def networks(name: str) -> nn.Module:
                module = perceptron(width)
                module.load_state_dict(load_file(places[name]))
                return module

            theirs(method, pool_of(networks, names, tasks), tasks, steps=3)

        print_peak(run, job["width"])
        return {}
    suite = load_suite(job["suite"], Path(job["folder"]))
    tasks = {task.name: task for task in suite.tasks}
    states = {name: load_file(path) for name, path in {"_pretrained_": suite.base, **suite.experts}.items()}
    fresh = suite.tasks[0].model()

    def networks(name: str) -> nn.Module:
        module = copy.deepcopy(fresh)
        module.load_state_dict(states[name])
        return module

    pool = pool_of(networks, list(suite.experts), tasks)
    found = []
    for run in job["runs"]:
        start = time.process_time()
        merged = theirs(run["method"], pool, tasks, run.get("steps", 0), run.get("batch", 32))
        found.append(time.process_time() - start)
        if run.get("out"):
            save_file({name: tensor.contiguous() for name, tensor in merged.state_dict().items()}, run["out"])
    return {"seconds": found}


# ---------------------------------------------------------------------------------------------------------------------
# In ours


class Peer:
    """FusionBench in its own environment."""

    def __init__(self, work: Path, python: Path | None) -> None:
        self.python = python or work / "fusionbench" / "bin" / "python"
        if not self.python.exists():
            print(f"installing {RELEASE} into {work / 'fusionbench'}", file=sys.stderr)
            venv.create(work / "fusionbench", with_pip=True)
            install = [self.python, "-m", "pip", "install", "--quiet", f"torch=={torch.__version__.partition('+')[0]}"]
            subprocess.run([*install, RELEASE, "scikit-learn", "xxhash"], check=True)

    def do(self, **job: Any) -> Mapping[str, Any]:
        """Run a job in a process of its own."""
        root = Path(__file__).resolve().parents[1]
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1",
                       "MALLOC_MMAP_THRESHOLD_": "1000000"}  # fmt: skip
        done = subprocess.run(
            [self.python, __file__, "--peer", json.dumps(job)], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"FusionBench failed on {job}:\n{done.stderr[-2000:]}")
        found: Mapping[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
        return found


def learned(suite: Suite, what: str, steps: int) -> tuple[float, Any]:
    """Return the CPU seconds of learning, and what was learned, with the loss and the rates that were published."""
    from graftwork.merge.subspace import learn_merge

    start = time.process_time()
    found = learn_merge(
        suite.base, list(suite.experts.values()), suite.tasks, parametrisation=what, steps=steps, batch=BATCH,
        loss="entropy", learning_rate=1e-3, coefficient_rate=1e-3,
    )  # fmt: skip
    return time.process_time() - start, found


def accuracy_of(suite: Suite, source: Any) -> float:
    """Return the mean accuracy on test inputs, in percent."""
    from graftwork.merge import evaluate

    found = evaluate({"merged": source}, suite.tasks)
    return 100 * sum(item.accuracy or 0.0 for item in found) / len(found)


def fisher_of(suite: Suite, seed: int) -> tuple[float, float]:
    """Return CPU seconds of measuring all models on 256 examples each and merging them, and the accuracy."""
    from measuring import coded

    from graftwork.merge.memory import merge_arrays
    from graftwork.merge.statistics.fisher import estimate_fisher
    from graftwork.merge.task import fit

    states = [load_file(path) for path in suite.experts.values()]
    start = time.process_time()
    fishers = [
        coded(estimate_fisher(task, fit(task, state), examples=min(EXAMPLES, count_of(task)), seed=seed,
                              estimator="signed").tensors)
        for task, state in zip(suite.tasks, states, strict=True)
    ]  # fmt: skip
    merged = merge_arrays("fisher", [coded(state) for state in states], statistics={"fisher": fishers})
    spent = time.process_time() - start
    return spent, accuracy_of(suite, {name: torch.from_numpy(values) for name, values in merged.items()})


def count_of(task: Any) -> int:
    return sum(len(inputs) for inputs, _ in task.batches())


class Bars:
    """What has to hold, and whether it does."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.hold = True

    def at_least(self, what: str, value: float, bar: float, text: str) -> None:
        self.hold &= value >= bar
        self.lines.append(f"{'holds' if value >= bar else 'FAILS':6s} {what}: {text}")

    def at_most(self, what: str, value: float, bar: float, text: str) -> None:
        self.hold &= value <= bar
        self.lines.append(f"{'holds' if value <= bar else 'FAILS':6s} {what}: {text}")


def compare_time(work: Path, names: Sequence[str], other: Peer, bars: Bars) -> None:
    """Print CPU milliseconds per step, and CPU seconds of Fisher merges."""
    for name in names:
        suite = load_suite(name, work)
        # The first run of each is not counted: libraries take their time once.
        runs = [{"method": what, "steps": steps} for what in LEARNED for steps in (2, *STEPS)]
        runs += [{"method": "fisher", "batch": batch} for batch in (32, 32, 1)]
        seconds = other.do(what="runs", suite=name, folder=str(work), runs=runs)["seconds"]
        for number, (what, title) in enumerate(LEARNED.items()):
            learned(suite, what, 2)
            low, high = (learned(suite, what, steps)[0] for steps in STEPS)
            own = (high - low) / (STEPS[1] - STEPS[0])
            low, high = seconds[3 * number + 1 : 3 * number + 3]
            their = (high - low) / (STEPS[1] - STEPS[0])
            text = f"{1000 * own:.1f} ms against {1000 * their:.1f} ms per step, {their / own:.1f} times fewer"
            print(f"{name:5s} {title:26s} {text}", flush=True)
            bars.at_least(f"time of {title}, {name}", their / own, 2, f"{text} (at least 2)")
        fisher_of(suite, 0)
        own = fisher_of(suite, 0)[0]
        for batch, their in ((32, seconds[-2]), (1, seconds[-1])):
            text = f"{own:.2f} s against {their:.2f} s, {their / own:.1f} times fewer"
            print(f"{name:5s} Fisher, its batches of {batch:2d}   {text}", flush=True)
            if batch == 1:
                bars.at_least(f"time of Fisher, {name}", their / own, 2, f"{text} (at least 2)")


def compare_memory(work: Path, width: int, other: Peer, bars: Bars) -> None:
    """Print the peaks over the process's base, in models."""
    from measuring import peak_of

    folder = work / "perceptrons"
    for size in (64, width):
        write_perceptrons(folder, size)
    most = {"fisher": 3.0, "mask": 11.0, "layer_wise": 5 + EXPERTS / 2, "mask+layer_wise": 11 + EXPERTS / 2}
    for what, bar in most.items():
        own, _ = peak_of("signed" if what == "fisher" else what, folder, width)
        found = other.do(what="memory", method=what, folder=str(folder), width=width)
        their = found["peak"] / (4 * LAYERS * width * width)
        text = f"{own:.1f} P against {their:.1f} P"
        print(f"memory, {LEARNED.get(what, 'Fisher'):26s} {text}", flush=True)
        bars.at_most(f"memory of {LEARNED.get(what, 'Fisher')}", own, bar, f"{text} (at most {bar:g})")


def compare_accuracy(work: Path, names: Sequence[str], other: Peer, bars: Bars) -> None:
    """Print accuracies after equal work."""
    from graftwork.merge import Settings, load_recipe, merge

    folder = work / "against_fusionbench"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        suite = load_suite(name, work)
        result = learned(suite, "mask", ACCURACY_STEPS)[1]
        result.save(folder / "mask.safetensors", force=True)
        models = [{"model": str(path)} for path in suite.experts.values()]
        recipe = {"merge_method": "concrete_task_arithmetic", "base_model": str(suite.base), "models": models,
                  "mask": str(folder / "mask.safetensors")}  # fmt: skip
        (folder / "mask.yml").write_text(json.dumps(recipe))
        merge(load_recipe(folder / "mask.yml"), folder / "ours.safetensors", settings=Settings(threads=1, force=True))
        outs = [folder / f"theirs-{what}.safetensors" for what in ("mask", "fisher")]
        runs = [{"method": "mask", "steps": ACCURACY_STEPS, "out": str(outs[0])},
                {"method": "fisher", "out": str(outs[1])}]  # fmt: skip
        other.do(what="runs", suite=name, folder=str(work), runs=runs)
        own, their = accuracy_of(suite, folder / "ours.safetensors"), accuracy_of(suite, outs[0])
        text = f"{own:.2f} % against {their:.2f} %"
        print(f"{name:5s} Concrete task arithmetic, {ACCURACY_STEPS} steps  {text}", flush=True)
        bars.at_most(f"accuracy of Concrete task arithmetic, {name}", abs(own - their), 1.5, f"{text} (within 1.5)")
        own = sum(fisher_of(suite, seed)[1] for seed in range(3)) / 3
        their = accuracy_of(suite, outs[1])
        least = -1.0 if name == "vit8" else -0.3
        text = f"{own:.2f} % against {their:.2f} %"
        print(f"{name:5s} Fisher  {text}", flush=True)
        bars.at_least(f"accuracy of Fisher, {name}", own - their, least, f"{text} (at least {least:+g})")


def main(arguments: Sequence[str]) -> int:
    """Compare, and say which bars hold."""
    if arguments[:1] == ["--peer"]:
        with open(os.devnull, "w") as nowhere:
            job = json.loads(arguments[1])
            # Its progress goes nowhere; a memory job prints its own line.
            with contextlib.nullcontext() if job["what"] == "memory" else contextlib.redirect_stdout(nowhere):
                found = peer(job)
        if found:
            print(json.dumps(found))
        return 0
    parser = argparse.ArgumentParser(description="Data-driven merging beside FusionBench.")
    parser.add_argument("work", type=Path, help="where environments, suites and results are kept")
    parser.add_argument("--suites", nargs="+", default=["mlp8", "vit8"], choices=["mlp4", "mlp8", "vit8"])
    parser.add_argument("--width", type=int, default=2048, help="of the perceptrons whose memory is looked at")
    parser.add_argument("--only", nargs="+", default=["time", "memory", "accuracy"])
    parser.add_argument("--python", type=Path, help="the Python of an environment that has FusionBench already")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    other, bars = Peer(given.work, given.python), Bars()
    if "time" in given.only:
        compare_time(given.work, given.suites, other, bars)
    if "accuracy" in given.only:
        compare_accuracy(given.work, given.suites, other, bars)
    if "memory" in given.only:
        compare_memory(given.work, given.width, other, bars)
    print()
    print("\n".join(bars.lines))
    return 0 if bars.hold else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
