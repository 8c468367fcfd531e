"""What measuring costs and what it is worth.

    python benchmarks/measuring.py cost [64 16]        # a transformer of 22 million parameters, seconds per example
    python benchmarks/measuring.py memory WORK [2048]  # perceptrons of 25 million parameters, peak over the base
    python benchmarks/measuring.py accuracy WORK [mlp4 mlp8 vit8]   # merges of the suites, test accuracy
    python benchmarks/measuring.py estimators WORK [mlp4 …]         # Fisher merges by estimator

One thread; processor seconds. The floor is a plain forward and backward pass of the same examples, in one batch of the
same size. Run each alone: a busy machine disturbs even processor seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from peaks import EXPERTS, LAYERS, perceptron, print_peak, write_perceptrons
from torch import Tensor, nn
from torch.nn import functional

from graftwork.merge.evaluation import evaluate
from graftwork.merge.memory import merge_arrays
from graftwork.merge.statistics.fisher import estimate_fisher, texts
from graftwork.merge.statistics.gram import estimate_grams
from graftwork.merge.task import Task, fit


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        n, steps, width = x.shape

        def split(values: Tensor) -> Tensor:
            return values.view(n, steps, self.heads, -1).transpose(1, 2)

        mixed = functional.scaled_dot_product_attention(split(self.query(x)), split(self.key(x)), split(self.value(x)))
        x = self.attention_norm(x + self.out(mixed.transpose(1, 2).reshape(n, steps, width)))
        return self.norm(x + self.down(functional.gelu(self.up(x))))


class Encoder(nn.Module):
    """The shape of MiniLM-L6 (22.6 million parameters), random weights, ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(30522, 384), nn.Embedding(512, 384)
        self.norm = nn.LayerNorm(384)
        self.blocks = nn.ModuleList(Block(384, 12, 1536) for _ in range(6))
        self.head = nn.Linear(384, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1])[None]))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def cost(lengths: list[int], examples: int = 96, repeats: int = 3) -> None:
    torch.manual_seed(0)
    module = Encoder()
    for length in lengths:
        tokens = torch.randint(0, 30522, (examples, length))
        task = Task("tokens", model=lambda: module, batches=lambda tokens=tokens: [(tokens, None)])

        def floor(size: int, tokens: Tensor = tokens) -> None:
            module.requires_grad_(True)
            for start in range(0, examples, size):
                part = tokens[start : start + size]
                functional.cross_entropy(module(part), torch.zeros(len(part), dtype=torch.long)).backward()
                module.zero_grad(set_to_none=True)

        def measured(estimator: str, size: int | None, task: Task = task) -> float:
            marks: list[float] = []
            # From the first example to the last: the plan is made once, whatever the number of examples.
            estimate_fisher(
                task, module, examples=examples, estimator=estimator, micro_batch=size,
                progress=lambda done, total: marks.append(time.process_time()),
            )  # fmt: skip
            return marks[-1] - marks[0]

        best = {
            "floor, batches of 16": min(seconds(lambda: floor(16)) for _ in range(repeats)),
            "floor, batches of 8": min(seconds(lambda: floor(8)) for _ in range(repeats)),
            "signed, per example": min(measured("signed", 16) for _ in range(repeats)),
            "signed_batch of 8": min(measured("signed_batch", 8) for _ in range(repeats)),
        }
        whole = seconds(lambda task=task: estimate_fisher(task, module, examples=examples, estimator="signed"))
        print(f"{length} tokens, {examples} examples, {sum(p.numel() for p in module.parameters()):,} parameters")
        for name, value in best.items():
            below = best["floor, batches of 8" if "batch of 8" in name else "floor, batches of 16"]
            print(f"  {name:24s} {1000 * value / examples:8.2f} ms per example  {value / below:5.2f} floors")
        print(f"  {'signed, with its plan':24s} {1000 * whole / examples:8.2f} ms per example", flush=True)


MEMORY = ("signed", "signed_batch", "gram", "mask", "layer_wise", "mask+layer_wise")
"""What is measured or learned."""


def print_own_peak(what: str, folder: Path, width: int) -> None:
    """Print the peak of measuring one model, or of learning to merge all of them for one step."""
    from graftwork.merge.checkpoint import Checkpoint
    from graftwork.merge.statistics import measure_to_file
    from graftwork.merge.subspace import learn_merge

    def run(width: int) -> None:
        rows = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
        tasks = [Task(f"t{number}", lambda: perceptron(width), lambda: [(rows, None)]) for number in range(EXPERTS)]
        base, *experts = write_perceptrons(folder, width)
        if what in ("signed", "signed_batch", "gram"):
            kind = "gram" if what == "gram" else "fisher"
            more = {} if what == "gram" else {"estimator": what}
            with Checkpoint.open(experts[0]) as source:
                measure_to_file(kind, source, tasks[0], folder / f"{what}.safetensors", examples=64, micro_batch=16,
                                force=True, **more)  # fmt: skip
        else:
            learn_merge(base, experts, tasks, parametrisation=what, steps=1, loss="entropy")

    print_peak(run, width)


def peak_of(what: str, folder: Path, width: int) -> tuple[float, float]:
    """Return the peak over the process's base, in units of the model, and the processor seconds, in a new process."""
    arguments = [sys.executable, __file__, "peak", what, str(folder), str(width)]
    # Freed tensors of large models go back to the system; small ones too here, so that warm runs leave nothing.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(arguments, env=environment, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return found["peak"] / (4 * LAYERS * width * width), found["seconds"]


def memory(folder: Path, width: int) -> None:
    """Print what measuring and learning take, for models of 6 layers of this width."""
    write_perceptrons(folder, width)
    size = 4 * LAYERS * width * width
    print(f"P = {size / 1e6:.0f} MB, {size / 4e6:.0f} million parameters, {EXPERTS} models")
    for what in MEMORY:
        peak, spent = peak_of(what, folder, width)
        print(f"{what:16s} {peak:6.2f} P over the base, {spent:.1f} CPU s", flush=True)


def coded(tensors: Mapping[str, Tensor] | Mapping[str, np.ndarray]) -> dict[str, tuple[str, np.ndarray]]:
    return {name: ("F32", np.ascontiguousarray(np.asarray(values), np.float32)) for name, values in tensors.items()}


class Merges:
    """Merges of one suite in memory."""

    def __init__(self, name: str, work: Path) -> None:
        from safetensors.torch import load_file
        from suites import load_suite

        suite = load_suite(name, work)
        self.tasks = list(suite.tasks.values()) if isinstance(suite.tasks, Mapping) else list(suite.tasks)
        experts = list(suite.experts.values()) if isinstance(suite.experts, Mapping) else list(suite.experts)
        self.models = [load_file(path) if isinstance(path, str | Path) else path for path in experts]

    def fisher(self, seed: int = 0, estimator: str = "auto") -> list[dict[str, tuple[str, np.ndarray]]]:
        return [
            coded(estimate_fisher(task, fit(task, model), seed=seed, estimator=estimator).tensors)
            for task, model in zip(self.tasks, self.models, strict=True)
        ]

    def accuracy(self, method: str, **more: object) -> float:
        merged = merge_arrays(method, [coded(model) for model in self.models], **more)
        state = {name: torch.from_numpy(values) for name, values in merged.items()}
        found = evaluate({"merged": state}, self.tasks, split="test")
        return 100 * sum(item.accuracy for item in found) / len(found)


def accuracy(names: list[str], work: Path) -> None:
    for name in names:
        merges = Merges(name, work)
        rows: dict[str, list[float]] = {}
        spent: dict[str, float] = {}
        rows["average"] = [merges.accuracy("linear", parameters={"weight": 1.0})]
        for seed in range(3):
            start = time.process_time()
            fishers = merges.fisher(seed)
            spent["fisher"] = time.process_time() - start
            start = time.process_time()
            grams = [
                estimate_grams(task, fit(task, model), seed=seed)
                for task, model in zip(merges.tasks, merges.models, strict=True)
            ]
            spent["regmean"] = time.process_time() - start
            rows.setdefault("fisher", []).append(merges.accuracy("fisher", statistics={"fisher": fishers}))
            for scope in ("tensor", "none"):
                found = merges.accuracy("fisher", statistics={"fisher": fishers}, parameters={"scope": scope})
                rows.setdefault(f"fisher, scope {scope}", []).append(found)
            metadata = {"gram": texts({"layers": grams[0].layers})}
            for alpha in (1.0, 0.95):
                found = merges.accuracy(
                    "regmean", statistics={"gram": [coded(gram.tensors) for gram in grams]}, metadata=metadata,
                    parameters={"alpha": alpha},
                )  # fmt: skip
                rows.setdefault(f"regmean, alpha {alpha}", []).append(found)
        for label, values in rows.items():
            cost_ = spent.get(label.split(",")[0])
            seconds_ = f"{cost_:7.2f} s to measure all" if cost_ is not None else ""
            print(f"{name}  {label:22s} {np.mean(values):6.2f} ± {np.std(values):4.2f}  {seconds_}", flush=True)


def estimators(names: list[str], work: Path) -> None:
    for name in names:
        merges = Merges(name, work)
        for estimator in ("exact", "signed", "signed_batch", "sampled", "empirical"):
            start = time.process_time()
            values = [
                merges.accuracy("fisher", statistics={"fisher": merges.fisher(seed, estimator)}) for seed in range(3)
            ]
            spent = (time.process_time() - start) / 3
            print(f"{name}  {estimator:14s} {np.mean(values):6.2f} ± {np.std(values):4.2f}  {spent:6.2f} s", flush=True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "memory", "peak", "accuracy", "estimators"))
    parser.add_argument("rest", nargs="*")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if chosen.what == "cost":
        cost([int(length) for length in chosen.rest] or [64, 16])
        return
    if not chosen.rest:
        parser.error(f"{chosen.what}: WORK is missing, the folder for what is made")
    if chosen.what == "memory":
        work, *width = chosen.rest
        memory(Path(work), int(width[0]) if width else 2048)
    elif chosen.what == "peak":
        what, work, width = chosen.rest
        print_own_peak(what, Path(work), int(width))
    else:
        work, *names = chosen.rest
        {"accuracy": accuracy, "estimators": estimators}[chosen.what](names or ["mlp4", "mlp8", "vit8"], Path(work))


if __name__ == "__main__":
    main(sys.argv[1:])
