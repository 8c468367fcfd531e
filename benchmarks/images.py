"""Merging specialists for real images: eight tasks, one shared backbone, adapted on unlabelled training images.

    python benchmarks/images.py WORK --data ../shared/data [--backbones cnn vit] [--rows NAME …] [--seeds 0]
    python benchmarks/images.py WORK --add kana=kana.npz            # a ninth task, from a file of your own
    python benchmarks/images.py WORK --table --picture images.png   # only print and draw what there is

The tasks are MNIST, USPS, MNIST-M, SVHN in grey, digits of computer fonts, Fashion-MNIST, CIFAR-10 and scikit-learn's
digits, all as colour images of 16 × 16 pixels. A task is one entry of `TASKS`: a name, and where its images come from.
A file for `--add` is an .npz with `x_train`, `x_test`, uint8 (n, height, width) or (n, height, width, 3), and
`y_train`, `y_test`, the classes.

The backbone, a small convolutional network with BatchNorm or a small vision transformer, is pre-trained on three of the
tasks together. Heads are the mean features of each class and are then frozen, so that only backbones differ and are
merged. Specialists are fine-tuned on training images with labels; merges are measured and learned on training images
without them; everything is scored on test images. Nothing depends on which other tasks there are: an added task is
fine-tuned alone, and the rest is kept.

What is finished stays in WORK: `WORK/BACKBONE/` has the networks, and tasks that commands take as
`--task WORK/BACKBONE/tasks.py:TASK`; `WORK/multitask/` has the cells of the table, see `multitask.py`. An interrupted
run goes on where it stopped. One thread; seconds are processor seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from multitask import ROWS as EVERY_ROW
from multitask import Bar, Row, cells, fill, table
from safetensors.torch import load_file, save_file
from suites import AttentionBlock, Head, Split, Suite
from torch import Tensor, nn
from torch.nn import functional

from graftwork.merge.task import Task

Array = np.ndarray[Any, np.dtype[Any]]

SIZE = 16
"""Height and width of every image."""
PRETRAINED_ON = ("mnist", "fashion_mnist", "cifar10")
PRETRAINING_STEPS, STEPS = 2000, 500
BATCH = 64
_SCALE = 20.0
_ROWS = 256


# ---------------------------------------------------------------------------------------------------------------------
# Data


def bundled(name: str) -> Callable[[Path], Mapping[str, Array]]:
    """Return what reads a task from the folder of data."""
    return lambda folder: arrays(folder / f"{name}.npz")


def small_digits(folder: Path) -> Mapping[str, Array]:
    """Return scikit-learn's digits, the first 1,000 of a fixed order to be trained on."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    images, labels = np.round(digits.images * (255 / 16)).astype(np.uint8)[order], digits.target[order]
    return {"x_train": images[:1000], "y_train": labels[:1000], "x_test": images[1000:], "y_test": labels[1000:]}


TASKS: Mapping[str, Callable[[Path], Mapping[str, Array]]] = {
    "mnist": bundled("digits/mnist"),
    "usps": bundled("digits/usps"),
    "mnist_m": bundled("digits/mnist_m"),
    "svhn": bundled("digits/svhn_gray"),
    "fonts": bundled("digits/char74k_fnt"),
    "fashion_mnist": bundled("images/fashion_mnist"),
    "cifar10": bundled("images/cifar10"),
    "digits": small_digits,
}
"""Every task, and what gives its images from the folder of data."""


def arrays(path: Path) -> Mapping[str, Array]:
    """Return the arrays of a file of images."""
    try:
        with np.load(path) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise SystemExit(f"cannot read the images {path}: {error}") from None
    missing = sorted({"x_train", "y_train", "x_test", "y_test"} - set(found))
    if missing:
        raise SystemExit(f"cannot read the images {path}: it has no {', '.join(missing)}")
    return found


@cache
def splits(name: str, source: str) -> tuple[Split, Split]:
    """Return the training and the test split of a task: images (n, 3, 16, 16) in [-1, 1]."""
    found = TASKS[name](Path(source)) if name in TASKS else arrays(Path(source))
    train, test = (
        Split(_images(found[f"x_{part}"]), torch.from_numpy(found[f"y_{part}"].astype(np.int64)))
        for part in ("train", "test")
    )
    return train, test


def _images(pixels: Array) -> Tensor:
    images = torch.from_numpy(pixels).float() / 255
    images = images[:, None].expand(-1, 3, -1, -1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    if images.shape[-1] != SIZE:
        is_larger = images.shape[-1] > SIZE
        images = functional.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=is_larger, align_corners=False)
    return (2 * images - 1).contiguous()


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images moved by up to two pixels, some inverted, with less contrast, a tint and some noise."""
    count = len(images)
    down, right = (torch.randint(-2, 3, (count, 1), generator=generator) for _ in range(2))
    places = torch.arange(SIZE)
    rows, columns = (places - down).clamp(0, SIZE - 1), (places - right).clamp(0, SIZE - 1)
    which = torch.arange(count)[:, None, None]
    images = images.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    sign = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.3, -1.0, 1.0)
    contrast = 0.4 + 0.6 * torch.rand(count, 1, 1, 1, generator=generator)
    tint = 0.4 * torch.rand(count, 3, 1, 1, generator=generator) - 0.2
    noise = 0.1 * torch.randn(images.shape, generator=generator)
    return images * sign * contrast + tint + noise


# ---------------------------------------------------------------------------------------------------------------------
# Backbones


class Convolutions(nn.Module):
    """Images to 128 features: three convolutions with BatchNorm."""

    features = 128

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=False) for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.last = nn.Linear(4 * self.features, self.features)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            images = functional.max_pool2d(functional.relu(norm(convolution(images))), 2)
        result: Tensor = self.last(images.flatten(1))
        return result


class VisionTransformer(nn.Module):
    """Images to 48 features: patches of 4 × 4, three blocks, the mean over patches."""

    features = 48

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, self.features, 4, 4)
        self.position = nn.Parameter(torch.randn((SIZE // 4) ** 2, self.features) * 0.02)
        self.blocks = nn.ModuleList(AttentionBlock(self.features, heads=4, hidden=96) for _ in range(3))
        self.norm = nn.LayerNorm(self.features)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features."""
        tokens = self.patch(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            tokens = block(tokens)
        result: Tensor = self.norm(tokens).mean(1)
        return result


@dataclass(frozen=True, slots=True)
class Backbone:
    """How a backbone is made and trained."""

    network: Callable[[], nn.Module]
    pretraining_rate: float
    rate: float


BACKBONES: Mapping[str, Backbone] = {
    "cnn": Backbone(Convolutions, 2e-3, 5e-4),
    "vit": Backbone(VisionTransformer, 1e-3, 5e-4),
}


def _train(
    network: nn.Module,
    batches: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    head: Callable[[Tensor], Tensor],
    parameters: Sequence[nn.Parameter],
    seed: int,
    steps: int,
    rate: float,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    network.train()
    for _ in range(steps):
        images, labels = batches(generator)
        loss = functional.cross_entropy(head(network(images)), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    network.eval()


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a file as a whole or not at all."""
    partial_file = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, partial_file)
    os.replace(partial_file, path)


def _pretrain(backbone: Backbone, data: Path) -> nn.Module:
    """Return a backbone that tells all classes of the tasks in `PRETRAINED_ON` apart."""
    torch.manual_seed(0)
    network = backbone.network()
    parts = [splits(name, str(data))[0] for name in PRETRAINED_ON]
    images, labels, classes = [], [], 0
    for part in parts:
        images.append(part.images)
        labels.append(part.labels + classes)
        classes += int(part.labels.max()) + 1
    classifier = nn.Linear(int(network.features), classes)  # type: ignore[arg-type]

    def batches(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = [torch.randint(0, len(part), (BATCH // len(images) + 1,), generator=generator) for part in images]
        pixels = torch.cat([part[rows] for part, rows in zip(images, chosen, strict=True)])
        return _augmented(pixels, generator), torch.cat([part[rows] for part, rows in zip(labels, chosen, strict=True)])

    _train(
        network, batches, Head(classifier.weight, classifier.bias, _SCALE),
        [*network.parameters(), *classifier.parameters()], 1, PRETRAINING_STEPS, backbone.pretraining_rate,
    )  # fmt: skip
    return network


def _prototypes(network: nn.Module, split: Split) -> Tensor:
    """Return the mean direction of the features of each class (classes, features)."""
    network.eval()
    with torch.no_grad():
        features = torch.cat([functional.normalize(network(images), dim=-1) for images in split.images.split(_ROWS)])
    return torch.stack([features[split.labels == number].mean(0) for number in range(int(split.labels.max()) + 1)])


def _specialise(network: nn.Module, head: Head, split: Split, seed: int, rate: float) -> None:
    def batches(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(0, len(split.images), (BATCH,), generator=generator)
        return split.images[rows], split.labels[rows]

    _train(network, batches, head, list(network.parameters()), seed, STEPS, rate)


# ---------------------------------------------------------------------------------------------------------------------
# Suites


def load_images(name: str, work: Path, data: Path, added: Mapping[str, Path] | None = None) -> Suite:
    """Return the suite of a backbone; networks that are not in `WORK/NAME` yet are trained.

    Args:
        name: `cnn` or `vit`.
        work: Where networks are kept.
        data: The folder of data.
        added: Further tasks, and the files of their images.
    """
    added = added or {}
    backbone, folder = BACKBONES[name], work / name
    folder.mkdir(parents=True, exist_ok=True)
    sources = {task: str(data.resolve()) for task in TASKS} | {
        task: str(path.resolve()) for task, path in added.items()
    }
    base = folder / "base.safetensors"
    network = backbone.network()
    if not base.exists():
        began = time.process_time()
        _write(_pretrain(backbone, data).state_dict(), base)
        print(f"{name}: pre-trained, {time.process_time() - began:.0f} CPU s", file=sys.stderr)
    for task, source in sources.items():
        expert, head = folder / f"{task}.safetensors", folder / f"{task}.head.safetensors"
        if expert.exists() and head.exists():
            continue
        began = time.process_time()
        split = splits(task, source)[0]
        network.load_state_dict(load_file(base))
        weight = _prototypes(network, split)
        _write({"weight": weight}, head)
        # Seeded by the task's name, so that a task's specialist does not depend on the other tasks.
        _specialise(network, _head(weight), split, int.from_bytes(task.encode()[:7], "little"), backbone.rate)
        _write(network.state_dict(), expert)
        print(f"{name}: specialist for {task}, {time.process_time() - began:.0f} CPU s", file=sys.stderr)
    here = str(Path(__file__).resolve().parent)
    lines = [
        "import sys", "from pathlib import Path", f"sys.path.append({here!r})",
        "from images import image_task, mixture",
        *(f"{task} = image_task({name!r}, {task!r}, Path(__file__).parent, {source!r})"
          for task, source in sources.items()),
        f"every_task = mixture({name!r}, {sources!r})",
    ]  # fmt: skip
    (folder / "tasks.py").write_text("\n".join(lines) + "\n")
    return Suite(
        "+".join([name, *added]),
        folder,
        base,
        {task: folder / f"{task}.safetensors" for task in sources},
        tuple(image_task(name, task, folder, source) for task, source in sources.items()),
        mixture(name, sources) if name == "cnn" else None,
    )


def _head(weight: Tensor) -> Head:
    return Head(weight, torch.zeros(len(weight)), _SCALE)


def image_task(name: str, task: str, folder: Path, source: str) -> Task:
    """Return a task whose head is in `folder`."""
    head = _head(load_file(folder / f"{task}.head.safetensors")["weight"])

    def logits(module: nn.Module, images: Tensor) -> Tensor:
        return head(module(images))

    return Task(
        task,
        model=BACKBONES[name].network,
        batches=partial(_labelled, task, source, 0),
        test=partial(_labelled, task, source, 1),
        unlabelled=partial(_inputs, {task: source}, None),
        logits=logits,
    )


def mixture(name: str, sources: Mapping[str, str]) -> Task:
    """Return the first training images of all tasks: what statistics of a merged network are measured on."""
    inputs = partial(_inputs, sources, _ROWS)
    return Task("every_task", model=BACKBONES[name].network, batches=inputs, unlabelled=inputs)


def _labelled(task: str, source: str, part: int) -> Iterator[tuple[Tensor, Tensor]]:
    split = splits(task, source)[part]
    yield from zip(split.images.split(_ROWS), split.labels.split(_ROWS), strict=True)


def _inputs(sources: Mapping[str, str], most: int | None) -> Iterator[tuple[Tensor, None]]:
    for task, source in sources.items():
        for images in splits(task, source)[0].images[:most].split(_ROWS):
            yield images, None


# ---------------------------------------------------------------------------------------------------------------------
# The table

ROWS: Mapping[str, Row] = {
    name: EVERY_ROW[name]
    for name in (
        "base", "average", "task_arithmetic", "ties", "tsv_m", "iso_c", "fisher", "regmean", "task_wise", "layer_wise",
        "mask", "bilevel", "mask+layer_wise", "fine-tuned",
    )
}  # fmt: skip

BARS = (
    Bar("mask + layer-wise over every average", "mask+layer_wise", ("average", "task_arithmetic", "ties"), 5),
    Bar("mask + layer-wise over what needs no learning", "mask+layer_wise", ("tsv_m", "iso_c", "fisher", "regmean"), 0),
    Bar("mask + layer-wise against coefficients alone", "mask+layer_wise", ("layer_wise",), -0.5),
    Bar("mask + layer-wise against fine-tuned", "mask+layer_wise", ("fine-tuned",), -10),
)


def draw(work: Path, suites: Sequence[str], seeds: Sequence[int], rows: Mapping[str, Row], path: Path) -> None:
    """Draw the accuracy of every row and task, for the first seed there is."""
    from PIL import Image

    from graftwork.merge.pictures import bar_picture

    shown, groups = {}, {}
    for suite in suites:
        for name, row in rows.items():
            found = cells(work, suite, name, seeds)
            if found:
                label = f"{row.title} · {suite}" if len(suites) > 1 else row.title
                shown[label], groups[label] = found[0]["accuracy"], suite
    bar_picture(
        shown, path, title=f"One network for {len(next(iter(shown.values())))} kinds of images",
        subtitle="Accuracy on test images; learned on training images without labels",
        groups=groups if len(suites) > 1 else None,
    )  # fmt: skip
    with Image.open(path) as drawn:
        small = drawn.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def main(arguments: Sequence[str]) -> int:
    """Compute what is missing, print the table and the bars."""
    parser = argparse.ArgumentParser(description="Merge methods on eight tasks of real images.")
    parser.add_argument("work", type=Path, help="where networks and results are kept")
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument(
        "--add", action="append", default=[], metavar="NAME=FILE.npz", help="a further task; repeatable"
    )
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), choices=list(BACKBONES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--table", action="store_true", help="only print what was computed before")
    parser.add_argument("--picture", type=Path, help="draw it into this PNG")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    added: dict[str, Path] = {}
    for entry in given.add:
        name, is_pair, file = entry.partition("=")
        if not is_pair or not name.isidentifier() or name in TASKS:
            parser.error(f"--add {entry}: write NAME=FILE.npz, with a name that no other task has")
        if not Path(file).is_file():
            parser.error(f"--add {entry}: there is no file {file}")
        added[name] = Path(file)
    names = {"+".join([backbone, *added]): backbone for backbone in given.backbones}
    rows = {name: ROWS[name] for name in given.rows}
    skipped = []
    if not given.table:
        if not given.data.is_dir():
            parser.error(f"--data: there is no folder {given.data}")
        loaders = {
            name: partial(load_images, backbone, given.work, given.data, added) for name, backbone in names.items()
        }
        skipped = fill(given.work, loaders, rows, given.seeds)
    lines, bars, hold = table(given.work, list(names), given.seeds, rows, BARS)
    print("\n".join([*lines, "", *bars, *(f"skipped  {line}" for line in skipped)]))
    if given.picture is not None:
        draw(given.work, list(names), given.seeds, rows, given.picture)
        print(f"picture  {given.picture}")
    return 0 if hold else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
