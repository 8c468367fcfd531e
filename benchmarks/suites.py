"""Three small suites of real tasks: one encoder, fine-tuned on four or eight tasks, trained in a minute on one core.

    python benchmarks/suites.py WORK [mlp4 mlp8 vit8]

writes `WORK/NAME/`: `base.safetensors`, `TASK.safetensors` for every task, `heads.safetensors`, and `tasks.py`, which
commands are given as `--task WORK/NAME/tasks.py:TASK`. What is there already is not made again. In Python:

    suite = load_suite("mlp4", Path("WORK"))
    suite.base, suite.experts, suite.tasks

The data come with scikit-learn: images of 8 × 8 pixels in [0, 1]. `rot90`, `mirror`, `blocks` and `noise` are the
handwritten digits, changed; `parity180` asks whether an upside-down digit is odd; `texture` tells patches of two
photographs apart; `breast` and `wine` are tables of measurements, laid out as images. The encoder is pre-trained on
the digits as they are; heads are made from its features and then frozen, so that only encoders differ and are merged.

`unlabelled` are the training inputs; `validation` is every fifth training example, on which parameters may be chosen;
`test` only judges.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from graftwork.merge.task import Task

TASKS = ("rot90", "mirror", "blocks", "noise", "parity180", "texture", "breast", "wine")
Array = np.ndarray[Any, np.dtype[Any]]

_BATCH = 256
_DIGITS_TRAINED = 1000
_TEXTURES = (1500, 2300)
_COSINE_SCALE = 20.0


# ---------------------------------------------------------------------------------------------------------------------
# Data


@dataclass(frozen=True, slots=True)
class Split:
    """Images (n, 8, 8) in [0, 1] and labels (n,)."""

    images: Tensor
    labels: Tensor


@cache
def data() -> Mapping[str, tuple[Split, Split]]:
    """Return the training and the test split of every task, and of `digits`, on which encoders are pre-trained.

    All random draws come from one generator, in the order in which the tasks are made here.
    """
    from sklearn.datasets import load_breast_cancer, load_digits, load_sample_images, load_wine

    generator = np.random.default_rng(0)
    digits = load_digits()
    images, labels = (digits.images / 16).astype(np.float32), digits.target
    order = generator.permutation(len(images))
    train, test = order[:_DIGITS_TRAINED], order[_DIGITS_TRAINED:]
    patches = _cut(images, 2)[:, generator.permutation(16)]
    noisy = 0.5 * images + 0.25 + generator.normal(0, 0.15, images.shape)
    changed: dict[str, tuple[Array, Array]] = {
        "digits": (images, labels),
        "rot90": (np.rot90(images, 1, axes=(1, 2)), labels),
        "mirror": (1 - images[:, :, ::-1], labels),
        "blocks": (patches.reshape(-1, 4, 4, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 8, 8), labels),
        "noise": (noisy.clip(0, 1), labels),
        "parity180": (np.rot90(images, 2, axes=(1, 2)), labels % 2),
    }
    found = {name: (_split(*pair, train), _split(*pair, test)) for name, pair in changed.items()}

    parts, classes = [], []
    for number, photograph in enumerate(load_sample_images().images):
        grey = (photograph.astype(np.float32) / 255).mean(-1)
        grid = _cut(grey[None, : grey.shape[0] // 8 * 8, : grey.shape[1] // 8 * 8], 8)[0]
        rows, columns = grey.shape[0] // 8, grey.shape[1] // 8
        parts.append(grid)
        classes.append(2 * number + np.repeat(np.arange(rows) >= rows // 2, columns))
    textures, places = np.concatenate(parts), np.concatenate(classes)
    order = generator.permutation(len(textures))
    first, last = _TEXTURES
    found["texture"] = (_split(textures, places, order[:first]), _split(textures, places, order[first:last]))

    for name, table, trained in (("breast", load_breast_cancer(), 300), ("wine", load_wine(), 90)):
        values = (table.data - table.data.min(0)) / (table.data.max(0) - table.data.min(0))
        width = values.shape[1]
        if name == "wine":
            values = np.tile(values, (1, math.ceil(64 / width)))[:, :64]
        else:
            values = np.pad(values, ((0, 0), (0, 64 - width)))
        order = generator.permutation(len(values))
        square = values.reshape(-1, 8, 8)
        found[name] = (_split(square, table.target, order[:trained]), _split(square, table.target, order[trained:]))
    return found


def _cut(images: Array, side: int) -> Array:
    """Return the square patches of images (n, height, width) as (n, patches, side, side), row by row."""
    count, height, width = images.shape
    grid = images.reshape(count, height // side, side, width // side, side).transpose(0, 1, 3, 2, 4)
    return grid.reshape(count, -1, side, side)


def _split(images: Array, labels: Array, rows: Array) -> Split:
    chosen = np.ascontiguousarray(images.astype(np.float32)[rows])
    return Split(torch.from_numpy(chosen), torch.from_numpy(labels[rows].astype(np.int64)))


# ---------------------------------------------------------------------------------------------------------------------
# Encoders


class Perceptron(nn.Module):
    """Images (n, 8, 8) to features (n, features) through two hidden layers."""

    def __init__(self, hidden: int, features: int) -> None:
        super().__init__()
        self.features = features
        self.fc1, self.fc2, self.fc3 = nn.Linear(64, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, features)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features."""
        hidden = functional.gelu(self.fc1(images.flatten(1)))
        result: Tensor = self.fc3(functional.gelu(self.fc2(hidden)))
        return result


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        count, length, width = tokens.shape

        def by_head(values: Tensor) -> Tensor:
            return values.view(count, length, self.heads, width // self.heads).transpose(1, 2)

        query, key, value = (by_head(layer(tokens)) for layer in (self.query, self.key, self.value))
        weights = (query @ key.transpose(-1, -2) / math.sqrt(width // self.heads)).softmax(-1)
        result: Tensor = self.output((weights @ value).transpose(1, 2).reshape(count, length, width))
        return result


class AttentionBlock(nn.Module):
    """Tokens (n, length, width) to tokens: attention, then two linear layers, each with what enters it added."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), _Attention(width, heads), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the tokens."""
        tokens = tokens + self.attention(self.norm1(tokens))
        result: Tensor = tokens + self.fc2(functional.gelu(self.fc1(self.norm2(tokens))))
        return result


class Transformer(nn.Module):
    """Images (n, 8, 8) to features (n, 48): patches of 2 × 2, a class token, three blocks."""

    features = 48

    def __init__(self) -> None:
        super().__init__()
        width = self.features
        self.patch = nn.Linear(4, width)
        self.token = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(torch.randn(17, width) * 0.02)
        self.blocks = nn.ModuleList(AttentionBlock(width, heads=4, hidden=96) for _ in range(3))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of the class token."""
        count = len(images)
        patches = images.reshape(count, 4, 2, 4, 2).transpose(2, 3).reshape(count, 16, 4)
        tokens = torch.cat([self.token.expand(count, 1, -1), self.patch(patches)], 1) + self.position
        for block in self.blocks:
            tokens = block(tokens)
        result: Tensor = self.norm(tokens[:, 0])
        return result


@dataclass(frozen=True, slots=True)
class Head:
    """A frozen classifier of features: linear, or with a scale the scaled cosine to each class's weight."""

    weight: Tensor
    bias: Tensor
    scale: float | None

    def __call__(self, features: Tensor) -> Tensor:
        """Return logits (n, classes)."""
        if self.scale is None:
            return functional.linear(features, self.weight, self.bias)
        cosine = functional.linear(functional.normalize(features, dim=-1), functional.normalize(self.weight, dim=-1))
        return self.scale * cosine + self.bias


# ---------------------------------------------------------------------------------------------------------------------
# Training


@dataclass(frozen=True, slots=True)
class _Design:
    encoder: Callable[[], nn.Module]
    tasks: tuple[str, ...]
    scale: float | None
    pretraining_steps: int
    steps: int
    learning_rate: float


DESIGNS: Mapping[str, _Design] = {
    "mlp4": _Design(partial(Perceptron, 256, 128), TASKS[:4], None, 1500, 600, 3e-4),
    "mlp8": _Design(partial(Perceptron, 512, 256), TASKS, _COSINE_SCALE, 3000, 800, 1e-4),
    "vit8": _Design(Transformer, TASKS, _COSINE_SCALE, 3000, 1000, 2e-4),
}


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images moved by a pixel, some inverted, with less contrast and some noise."""
    count = len(images)
    down, right = (torch.randint(-1, 2, (count, 1), generator=generator) for _ in range(2))
    places = torch.arange(8)
    rows, columns = (places - down) % 8, (places - right) % 8
    images = images[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    inverted = torch.rand(count, 1, 1, generator=generator) < 0.15
    contrast = 0.6 + 0.4 * torch.rand(count, 1, 1, generator=generator)
    noise = 0.08 * torch.randn(images.shape, generator=generator)
    return (torch.where(inverted, 1 - images, images) * contrast + noise).clamp(0, 1)


def _train(
    encoder: nn.Module,
    head: Callable[[Tensor], Tensor],
    split: Split,
    parameters: Sequence[nn.Parameter],
    generator: torch.Generator,
    *,
    steps: int,
    learning_rate: float,
    batch: int,
    augment: bool = False,
) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    encoder.train()
    for _ in range(steps):
        rows = torch.randint(0, len(split.images), (batch,), generator=generator)
        images = _augmented(split.images[rows], generator) if augment else split.images[rows]
        loss = functional.cross_entropy(head(encoder(images)), split.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _probe(features: Tensor, labels: Tensor) -> Head:
    """Return a linear classifier of the features."""
    linear = nn.Linear(features.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.Adam(linear.parameters(), lr=1e-2, weight_decay=1e-3)
    for _ in range(200):
        loss = functional.cross_entropy(linear(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Head(linear.weight.detach().clone(), linear.bias.detach().clone(), None)


def _prototypes(features: Tensor, labels: Tensor, scale: float) -> Head:
    """Return a cosine classifier with the first example of each class as its weight."""
    first = [int((labels == number).nonzero()[0, 0]) for number in range(int(labels.max()) + 1)]
    return Head(functional.normalize(features[first], dim=-1), torch.zeros(len(first)), scale)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}


def _make(name: str, folder: Path) -> None:
    """Train a suite and write its files into `folder`."""
    design, every = DESIGNS[name], data()
    torch.manual_seed(0)
    encoder = design.encoder()
    classifier = nn.Linear(int(encoder.features), 10)  # type: ignore[arg-type]
    pretraining = Head(classifier.weight, classifier.bias, design.scale)
    _train(
        encoder, pretraining, every["digits"][0], [*encoder.parameters(), *classifier.parameters()],
        torch.Generator().manual_seed(1), steps=design.pretraining_steps, learning_rate=1e-3, batch=64, augment=True,
    )  # fmt: skip
    base = _state(encoder)
    save_file(base, folder / "base.safetensors")
    heads: dict[str, Head] = {}
    for task in design.tasks:
        split = every[task][0]
        with torch.no_grad():
            features = encoder(split.images)
        heads[task] = (
            _probe(features, split.labels)
            if design.scale is None
            else _prototypes(features, split.labels, design.scale)
        )
    for number, task in enumerate(design.tasks):
        encoder.load_state_dict(base)
        _train(
            encoder, heads[task], every[task][0], list(encoder.parameters()),
            torch.Generator().manual_seed(100 + number), steps=design.steps, learning_rate=design.learning_rate,
            batch=32,
        )  # fmt: skip
        save_file(_state(encoder), folder / f"{task}.safetensors")
    save_file(
        {f"{task}.{part}": getattr(head, part) for task, head in heads.items() for part in ("weight", "bias")},
        folder / "heads.safetensors",
    )
    here = str(Path(__file__).resolve().parent)
    lines = [
        "import sys", "from pathlib import Path", f"sys.path.append({here!r})", "from suites import suite_task",
        *(f"{task} = suite_task({name!r}, {task!r}, Path(__file__).parent)" for task in design.tasks),
    ]  # fmt: skip
    (folder / "tasks.py").write_text("\n".join(lines) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Suites as they are used


@dataclass(frozen=True, slots=True)
class Suite:
    """A suite on disk.

    Args:
        name: What it is called.
        folder: Where its files are; `tasks.py` among them has the tasks.
        base: The pre-trained encoder.
        experts: The fine-tuned encoders by task.
        tasks: The tasks in the order of the experts.
        mixture: Inputs of all tasks, if the encoder has statistics that a merge should measure anew.
    """

    name: str
    folder: Path
    base: Path
    experts: Mapping[str, Path]
    tasks: tuple[Task, ...]
    mixture: Task | None = None


def load_suite(name: str, work: Path | str) -> Suite:
    """Return a suite from the folder `WORK/NAME`, where it is made first if it is not there yet."""
    folder = Path(work) / name
    if not (folder / "tasks.py").is_file():
        partial_folder = folder.with_name(f".{name}.{os.getpid()}")
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
        threads, random_state = torch.get_num_threads(), torch.get_rng_state()
        torch.set_num_threads(1)
        try:
            _make(name, partial_folder)
        finally:
            torch.set_num_threads(threads)
            torch.set_rng_state(random_state)
        os.rename(partial_folder, folder)
    tasks = DESIGNS[name].tasks
    return Suite(
        name,
        folder,
        folder / "base.safetensors",
        {task: folder / f"{task}.safetensors" for task in tasks},
        tuple(suite_task(name, task, folder) for task in tasks),
    )


def suite_task(suite: str, task: str, folder: Path) -> Task:
    """Return one task of a suite whose files are in `folder`."""
    saved = load_file(folder / "heads.safetensors")
    head = Head(saved[f"{task}.weight"], saved[f"{task}.bias"], DESIGNS[suite].scale)

    def logits(module: nn.Module, images: Tensor) -> Tensor:
        return head(module(images))

    return Task(
        task,
        model=DESIGNS[suite].encoder,
        batches=partial(_batches, task, 0, 1),
        validation=partial(_batches, task, 0, 5),
        test=partial(_batches, task, 1, 1),
        unlabelled=partial(_inputs, task),
        logits=logits,
    )


def _batches(task: str, part: int, every: int) -> Iterator[tuple[Tensor, Tensor]]:
    split = data()[task][part]
    images, labels = split.images[::every], split.labels[::every]
    yield from zip(images.split(_BATCH), labels.split(_BATCH), strict=True)


def _inputs(task: str) -> Iterator[tuple[Tensor, None]]:
    for images in data()[task][0].images.split(_BATCH):
        yield images, None


def main(arguments: Sequence[str]) -> None:
    """Make the suites that are asked for, and print how base and experts do."""
    from graftwork.merge.evaluation import evaluate

    parser = argparse.ArgumentParser(description="Make the suites of small tasks.")
    parser.add_argument("work", type=Path, help="where they are kept")
    parser.add_argument("names", nargs="*", help="mlp4, mlp8, vit8 [default: all]")
    given = parser.parse_args(arguments)
    for name in given.names or DESIGNS:
        suite = load_suite(name, given.work)
        base = [item.accuracy or 0.0 for item in evaluate([suite.base], suite.tasks)]
        own = [evaluate([suite.experts[task.name]], [task])[0].accuracy or 0.0 for task in suite.tasks]
        print(f"{name}: base {100 * np.mean(base):.2f} %, fine-tuned {100 * np.mean(own):.2f} %")


if __name__ == "__main__":
    main(sys.argv[1:])
