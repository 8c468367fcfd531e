"""Match the weights of the same pairs of models with graftwork, with rebasin, and with Git Re-Basin's loop in torch.

    python benchmarks/matching.py --work DIRECTORY
    python benchmarks/matching.py --work DIRECTORY --cases resnet50 --tools own rebasin floor
    python benchmarks/matching.py --work DIRECTORY --cases width-256 width-512 --tools own lapx scipy

Times are processor seconds of one thread (`time.process_time`), in a fresh process for each figure, of the matching
alone: making and tracing models is not counted. graftwork has solved a small pair before, so that it is compiled, and
its figure is the least of three runs; the others run once.

Tools: `own`, `lapx` and `scipy` are graftwork with these solvers. `rebasin` is rebasin 0.0.47, in a virtual environment
below DIRECTORY that sees the packages of this one. `torch` is the loop of Ainsworth et al., "Git Re-Basin",
algorithm 1, as the reference implementation has it (identity start, all groups in each sweep, absolute tolerance),
written in torch. `floor` is what graftwork's own matrix products and assignments cost when they are done again on
contiguous buffers.

Models have random weights; gains, biases and statistics of norms are spread as after training. A pair is independent,
or, as `NAME-copy`, the second one is a re-ordered copy of the first, which has to be found bit for bit. The ratio is
the distance of all counted tensors after matching to that before. rebasin leaves tensors of some groups out and the
statistics of BatchNorm as they are, so its result may compute something else than the model that it was given;
`function error` is how much, relative to the largest output.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import site
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
TOOLS = ("own", "lapx", "scipy", "torch", "rebasin", "floor")
WIDTHS = (256, 512, 1024, 2048, 4096)
CASES = (
    "resnet50", "resnet50-copy", "vgg16", "vgg16-copy", "gpt2", "gpt2-copy", *(f"width-{width}" for width in WIDTHS),
)  # fmt: skip
PEERS = ("rebasin==0.0.47", "torchview==0.2.7", "graphviz")


# ---------------------------------------------------------------------------------------------------------------------
# Models


def mlp(width: int) -> Any:
    from torch import nn

    sizes = (784, width, width, width, 10)
    layers: list[nn.Module] = []
    for entering, leaving in itertools.pairwise(sizes):
        layers += [nn.Linear(entering, leaving), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def vgg16() -> Any:
    from torch import nn

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers: list[nn.Module] = []
            entering = 3
            for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
                if width:
                    layers += [nn.Conv2d(entering, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                    entering = width
                else:
                    layers.append(nn.MaxPool2d(2))
            self.features = nn.Sequential(*layers)
            self.flatten = nn.Flatten()
            self.classifier = nn.Sequential(
                nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
            )

        def forward(self, inputs: Any) -> Any:
            return self.classifier(self.flatten(self.features(inputs)))

    return Network()


def resnet50() -> Any:
    from torch import nn

    class Bottleneck(nn.Module):
        def __init__(self, entering: int, width: int, stride: int) -> None:
            super().__init__()
            leaving = 4 * width
            self.conv1, self.bn1 = nn.Conv2d(entering, width, 1, bias=False), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
            self.conv3, self.bn3 = nn.Conv2d(width, leaving, 1, bias=False), nn.BatchNorm2d(leaving)
            self.relu = nn.ReLU()
            self.downsample = nn.Sequential()
            if stride != 1 or entering != leaving:
                shortcut = nn.Conv2d(entering, leaving, 1, stride, bias=False)
                self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(leaving))

        def forward(self, inputs: Any) -> Any:
            values = self.relu(self.bn1(self.conv1(inputs)))
            values = self.relu(self.bn2(self.conv2(values)))
            return self.relu(self.bn3(self.conv3(values)) + self.downsample(inputs))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
            self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
            entering = 64
            for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
                parts = []
                for block in range(blocks):
                    parts.append(Bottleneck(entering, width, 2 if block == 0 and stage > 1 else 1))
                    entering = 4 * width
                setattr(self, f"layer{stage}", nn.Sequential(*parts))
            self.pool, self.flatten, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000)

        def forward(self, inputs: Any) -> Any:
            values = self.maxpool(self.relu(self.bn1(self.conv1(inputs))))
            values = self.layer4(self.layer3(self.layer2(self.layer1(values))))
            return self.fc(self.flatten(self.pool(values)))

    return Network()


def spread_norms(module: Any, seed: int) -> Any:
    """Give norms gains, biases and statistics as after training; a fresh model has constants there."""
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.weight.data = 1 + 0.25 * torch.randn(part.weight.shape, generator=generator)
            part.bias.data = 0.2 * torch.randn(part.bias.shape, generator=generator)
            part.running_mean = 0.5 * torch.randn(part.running_mean.shape, generator=generator)
            part.running_var = torch.rand(part.running_var.shape, generator=generator) + 0.5
    return module


def network(case: str, seed: int) -> Any:
    import torch

    torch.manual_seed(seed)
    name = case.removesuffix("-copy")
    made = {"resnet50": resnet50, "vgg16": vgg16}.get(name)
    module = mlp(int(name.split("-")[1])) if made is None else made()
    return spread_norms(module, seed + 7).eval()


def inputs_of(case: str) -> Any:
    import torch

    if case.startswith("width"):
        return torch.randn(2, 784)
    return torch.randn(2, 3, 64 if case.startswith("resnet") else 32, 64 if case.startswith("resnet") else 32)


def gpt2(seed: int) -> dict[str, Any]:
    """The tensors of GPT-2 small, in the layout of transformers."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    width, hidden = 768, 3072
    tensors = {
        "wte.weight": 0.02 * torch.randn(50257, width, generator=generator),
        "wpe.weight": 0.01 * torch.randn(1024, width, generator=generator),
    }
    norms = ["ln_f"]
    for layer in range(12):
        norms += [f"h.{layer}.ln_1", f"h.{layer}.ln_2"]
        for name, entering, leaving in (
            ("attn.c_attn", width, 3 * width), ("attn.c_proj", width, width),
            ("mlp.c_fc", width, hidden), ("mlp.c_proj", hidden, width),
        ):  # fmt: skip
            tensors[f"h.{layer}.{name}.weight"] = torch.randn(entering, leaving, generator=generator) / entering**0.5
            tensors[f"h.{layer}.{name}.bias"] = 0.02 * torch.randn(leaving, generator=generator)
    for name in norms:
        tensors[f"{name}.weight"] = 1 + 0.25 * torch.randn(width, generator=generator)
        tensors[f"{name}.bias"] = 0.2 * torch.randn(width, generator=generator)
    return tensors


def pair(case: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return the spec and both models' tensors."""
    from graftwork.merge.alignment.apply import apply_permutation, random_permutation
    from graftwork.merge.alignment.families import family_spec
    from graftwork.merge.alignment.spec import shapes_of

    def tensors(seed: int) -> dict[str, Any]:
        return gpt2(seed) if case.startswith("gpt2") else dict(network(case, seed).state_dict())

    a = tensors(100)
    spec = family_spec(shapes_of(a), config={"n_head": 12})
    if case.startswith("gpt2"):
        spec = spec.pin({"residual": "the benchmark matches feed-forward layers and heads"})
    b = apply_permutation(spec, random_permutation(spec, 500), a) if case.endswith("-copy") else tensors(900)
    return spec, a, b


# ---------------------------------------------------------------------------------------------------------------------
# Tools, each in a process of its own


def with_graftwork(case: str, solver: Any) -> dict[str, Any]:
    from graftwork.merge.alignment.matching import match_weights

    warm_up()
    spec, a, b = pair(case)
    seconds, found = [], None
    for _ in range(3 if solver == "own" and not case.startswith("gpt2") else 1):
        began = time.process_time()
        found = match_weights(spec, a, b, solver=solver)
        seconds.append(time.process_time() - began)
    assert found is not None
    return {
        "seconds": min(seconds),
        "sweeps": found.sweeps,
        "solves": found.solves,
        "objective": found.objective_after,
        **judged(spec, a, b, found.permutation),
    }


def warm_up() -> None:
    """Have everything compiled, and torch's threads started."""
    import torch

    from graftwork.merge.alignment.families import family_spec
    from graftwork.merge.alignment.matching import match_weights
    from graftwork.merge.alignment.spec import shapes_of

    small = [dict(mlp(64).state_dict()) for _ in range(2)]
    match_weights(family_spec(shapes_of(small[0])), *small, solver="own")
    torch.randn(512, 512) @ torch.randn(512, 512)


def judged(spec: Any, a: Mapping[str, Any], b: Mapping[str, Any], permutation: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    from graftwork.merge.alignment.apply import apply_permutation

    aligned = apply_permutation(spec, permutation, b)
    exact = all(torch.equal(a[name], aligned[name]) for name in a)
    return {"ratio": distance(spec, a, aligned) / distance(spec, a, b), "exact": exact}


def distance(spec: Any, a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    counted = [name for name, tensor in spec.tensors.items() if tensor.counted]
    return float(sum(float((a[name].double() - b[name].double()).square().sum()) for name in counted) ** 0.5)


def with_torch(case: str) -> dict[str, Any]:
    """Git Re-Basin's loop for plain axes."""
    import torch
    from scipy.optimize import linear_sum_assignment

    spec, a, b = pair(case)
    axes = {
        name: [None if axis is None else axis[0][0] for axis in tensor.axes]
        for name, tensor in spec.tensors.items() if tensor.counted
    }  # fmt: skip
    torch.manual_seed(0)
    began = time.process_time()
    orders = {name: torch.arange(spec.groups[name].size) for name in spec.free_groups}
    uses = {
        group: [(name, axis) for name, forms in axes.items() for axis, form in enumerate(forms) if form == group]
        for group in orders
    }
    sweeps = 0
    progress = True
    while progress and sweeps < 100:
        progress = False
        sweeps += 1
        for number in torch.randperm(len(orders)).tolist():
            group = list(orders)[number]
            size = len(orders[group])
            score = torch.zeros(size, size)
            for name, axis in uses[group]:
                right = b[name]
                for other, form in enumerate(axes[name]):
                    if other != axis and form is not None:
                        right = torch.index_select(right, other, orders[form])
                left = torch.moveaxis(a[name], axis, 0).reshape(size, -1)
                score += left @ torch.moveaxis(right, axis, 0).reshape(size, -1).T
            columns = linear_sum_assignment(score.numpy(), maximize=True)[1]
            before = torch.einsum("ij,ij->i", score, torch.eye(size)[orders[group]]).sum()
            after = torch.einsum("ij,ij->i", score, torch.eye(size)[torch.from_numpy(columns)]).sum()
            progress = progress or bool(after > before + 1e-12)
            orders[group] = torch.from_numpy(columns)
    seconds = time.process_time() - began
    found = {name: order.numpy() for name, order in orders.items()}
    return {"seconds": seconds, "sweeps": sweeps, **judged(spec, a, b, found)}


def with_rebasin(case: str) -> dict[str, Any]:
    import torch
    from rebasin import PermutationCoordinateDescent

    spec, a, b = pair(case)
    modules = [network(case, 100), network(case, 1)]
    for module, tensors in zip(modules, (a, b), strict=True):
        module.load_state_dict(tensors)
    inputs = inputs_of(case)
    torch.manual_seed(0)
    descent = PermutationCoordinateDescent(modules[0], modules[1], inputs)
    with torch.no_grad():
        before = modules[1](inputs)
    began = time.process_time()
    descent.rebasin()
    seconds = time.process_time() - began
    with torch.no_grad():
        after = modules[1](inputs)
    aligned = {name: value.detach() for name, value in modules[1].state_dict().items()}
    return {
        "seconds": seconds,
        "ratio": distance(spec, a, aligned) / distance(spec, a, b),
        "exact": all(torch.equal(a[name], aligned[name]) for name in a),
        "function error": float((after - before).abs().max() / before.abs().max()),
    }


def floor(case: str) -> dict[str, Any]:
    """Do graftwork's products and assignments again, and nothing else."""
    import torch

    from graftwork.merge.alignment import matching
    from graftwork.merge.alignment.scores import Workbench

    warm_up()
    spec, a, b = pair(case)
    products: list[tuple[int, int]] = []
    problems: list[tuple[Any, Any, Any]] = []
    add, solve = Workbench._add_product, matching.solve_assignment

    def noting_add(bench: Any, matrix: Any, left: Any, right: Any) -> None:
        products.append((left.numel() // matrix.units, matrix.units))
        add(bench, matrix, left, right)

    def noting_solve(score: Any, *, current: Any = None, duals: Any = None, solver: Any = "auto") -> Any:
        problems.append((score.copy(), current, duals))
        return solve(score, current=current, duals=duals, solver=solver)

    Workbench._add_product, matching.solve_assignment = noting_add, noting_solve  # type: ignore[method-assign]
    try:
        matching.match_weights(spec, a, b, solver="own")
    finally:
        Workbench._add_product, matching.solve_assignment = add, solve  # type: ignore[method-assign]
    torch.set_num_threads(1)
    buffers = {
        (rows, units): (torch.randn(rows, units), torch.randn(rows, units), torch.zeros(units, units))
        for rows, units in dict.fromkeys(products)
    }
    least, own = [], []
    for _ in range(3):
        # In turn, so that both meet the same load of the machine.
        began = time.process_time()
        matching.match_weights(spec, a, b, solver="own")
        own.append(time.process_time() - began)
        began = time.process_time()
        for shape in products:
            left, right, total = buffers[shape]
            total.addmm_(left.T, right)
        middle = time.process_time()
        for score, current, duals in problems:
            solve(score, current=current, duals=duals, solver="own")
        least.append((middle - began, time.process_time() - middle))
    products_seconds, assignment_seconds = (min(part) for part in zip(*least, strict=True))
    seconds = products_seconds + assignment_seconds
    return {
        "seconds": seconds,
        "products": products_seconds,
        "assignments": assignment_seconds,
        "own": min(own),
        "own to floor": min(own) / seconds,
    }


def child(case: str, tool: str) -> dict[str, Any]:
    """Return one figure, measured in this process."""
    import torch

    torch.set_num_threads(1)
    others: dict[str, Callable[[str], dict[str, Any]]] = {
        "torch": with_torch, "rebasin": with_rebasin, "floor": floor,
    }  # fmt: skip
    return others[tool](case) if tool in others else with_graftwork(case, tool)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def peer_python(work: Path) -> Path:
    """Return the interpreter of an environment with rebasin, which sees the packages of this one; make it if needed."""
    folder = work / "peers"
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *PEERS, "tqdm"], check=True)
        packages = next((folder / "lib").glob("python*")) / "site-packages"
        # An editable install is known by its own .pth file only, so the project's root is listed, too.
        seen = [*site.getsitepackages(), str(Path(__file__).resolve().parents[1])]
        (packages / "these.pth").write_text("\n".join(seen) + "\n")
        (folder / "ready").touch()
    return python


def does_not_apply(case: str, tool: str) -> bool:
    """Whether there is nothing to compare: the others have no heads, and rebasin changes what transformers compute."""
    if case.startswith("gpt2"):
        return tool in ("torch", "rebasin")
    # With scipy the largest takes minutes; its share is clear from the smaller ones.
    return case == "width-4096" and tool in ("torch", "rebasin", "scipy")


def measure(work: Path, case: str, tool: str) -> dict[str, Any]:
    python = peer_python(work) if tool == "rebasin" else Path(sys.executable)
    command = [str(python), __file__, "--child", case, tool]
    environment = {**os.environ, **dict.fromkeys(THREADS, "1"), "PYTHONWARNINGS": "ignore"}
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        return {"failed": ended.returncode}
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder for the environment and the figures")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--child", nargs=2, metavar=("CASE", "TOOL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(*options.child)))
        return
    if options.work is None:
        parser.error("--work is needed")
    options.work.mkdir(parents=True, exist_ok=True)
    kept = options.work / "matching.json"
    figures = json.loads(kept.read_text()) if kept.is_file() else {}
    print(f"{'case':14} {'tool':8} {'CPU s':>9} {'ratio':>8} {'exact':>6}  more")
    for case in options.cases:
        for tool in options.tools:
            if does_not_apply(case, tool):
                continue
            found = measure(options.work, case, tool)
            figures.setdefault(case, {})[tool] = found
            kept.write_text(json.dumps(figures, indent=1, sort_keys=True))
            more = {name: value for name, value in found.items() if name not in ("seconds", "ratio", "exact")}
            text = ", ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in more.items())
            print(
                f"{case:14} {tool:8} {found.get('seconds', float('nan')):9.3f} {found.get('ratio', float('nan')):8.4f} "
                f"{found.get('exact', '')!s:>6}  {text}",
                flush=True,
            )


if __name__ == "__main__":
    main()
