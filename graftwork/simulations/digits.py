"""Handwritten digits in four guises, and small networks that learn them: the tasks of `graftwork demo`.

The 1,797 images of 8 × 8 pixels come with scikit-learn; nothing is downloaded. `clean` shows them as they are;
`turned`, `negative` and `scrambled` show the same images changed. Each of the four is a function that returns a `Task`:

    graftwork evaluate demo/linear --task graftwork.simulations.digits:turned

1,000 images are for training, 297 for choosing parameters, 500 only judge. An image is in the same split in all guises.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from graftwork.merge.errors import DependencyError
from graftwork.merge.task import Task

SPLITS = MappingProxyType({"train": slice(0, 1000), "validation": slice(1000, 1297), "test": slice(1297, 1797)})
"""Which images, after a fixed shuffle, each split has."""

_SHUFFLE_SEED = 0
_BATCH_SIZE = 250
_PATCH_ORDER = (9, 2, 14, 4, 7, 13, 0, 10, 5, 15, 3, 8, 12, 1, 11, 6)
"""Where each of the sixteen 2 × 2 patches of a scrambled image comes from."""


# ---------------------------------------------------------------------------------------------------------------------
# Images


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Return all images (1797, 8, 8) in [0, 1] and their labels (1797,), shuffled once for all."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DependencyError(
            'the digits come with scikit-learn, which is missing; install it with pip install "graftwork[demo]"'
        ) from None
    bundle = load_digits()
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(len(bundle.images))
    images = torch.from_numpy(np.asarray(bundle.images, dtype=np.float32)[order] / 16)
    return images, torch.from_numpy(np.asarray(bundle.target, dtype=np.int64)[order])


def scramble(images: Tensor) -> Tensor:
    """Return the images (n, 8, 8) with their sixteen 2 × 2 patches rearranged, the same way in all."""
    patches = images.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 2, 2)[:, list(_PATCH_ORDER)]
    return patches.reshape(-1, 4, 4, 2, 2).transpose(2, 3).reshape(-1, 8, 8)


GUISES: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "clean": lambda images: images,
        "turned": lambda images: images.rot90(1, (1, 2)),
        "negative": lambda images: 1 - images,
        "scrambled": scramble,
    }
)
"""How each task shows an image."""


def split(guise: str, part: str) -> tuple[Tensor, Tensor]:
    """Return the images and labels of one split in one guise."""
    images, labels = digits()
    return GUISES[guise](images[SPLITS[part]]).contiguous(), labels[SPLITS[part]]


def _batches(guise: str, part: str) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = split(guise, part)
    yield from zip(torch.split(images, _BATCH_SIZE), torch.split(labels, _BATCH_SIZE), strict=True)


# ---------------------------------------------------------------------------------------------------------------------
# The network


class Layer(nn.Module):
    """A residual layer: normalise, widen, narrow, add."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, width) from (n, width)."""
        result: Tensor = x + self.down(functional.gelu(self.up(self.norm(x))))
        return result


class Network(nn.Module):
    """Four residual layers between an embedding of the pixels and a head; 0.27 million parameters.

    Tensors are named as in larger models (`layers.0.up.weight`), so that recipes with values per layer apply.
    """

    def __init__(self, width: int = 128, hidden: int = 256, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(64, width)
        self.layers = nn.ModuleList(Layer(width, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (n, 10) of images (n, 8, 8)."""
        x = self.embed(images.flatten(1))
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


def task(guise: str) -> Task:
    """Return the task of naming the digits in one guise."""
    return Task(
        name=guise,
        model=Network,
        batches=partial(_batches, guise, "train"),
        validation=partial(_batches, guise, "validation"),
        test=partial(_batches, guise, "test"),
        head="head",
    )


def clean() -> Task:
    """Return the task on the digits as they are."""
    return task("clean")


def turned() -> Task:
    """Return the task on digits turned by a quarter, anticlockwise."""
    return task("turned")


def negative() -> Task:
    """Return the task on dark digits on bright paper."""
    return task("negative")


def scrambled() -> Task:
    """Return the task on digits whose patches are rearranged."""
    return task("scrambled")


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train_base(seed: int = 0, *, steps: int = 600, glimpses: int = 20) -> Network:
    """Return a network that knows clean digits well and each other guise from a glimpse.

    It sees all clean training images and the first `glimpses` of each other guise, shifted, faded and noisy: like a
    foundation model, it has met everything, and mastered little of it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network()
    # A glimpse counts eight times, or it would be drowned by the clean images.
    parts = [split("clean", "train")]
    for guise in [guise for guise in GUISES if guise != "clean"]:
        images, labels = split(guise, "train")
        parts.append((images[:glimpses].repeat(8, 1, 1), labels[:glimpses].repeat(8)))
    images, labels = (torch.cat(arrays) for arrays in zip(*parts, strict=True))
    _train(network, images, labels, steps=steps, learning_rate=2e-3, seed=seed + 1, change=_shifted_and_noisy)
    return network


def train_specialist(base: Network, guise: str, seed: int = 0, *, steps: int = 150) -> Network:
    """Return a copy of `base` that was fine-tuned on one guise alone, and forgets some of the rest."""
    network = Network()
    network.load_state_dict(base.state_dict())
    images, labels = split(guise, "train")
    _train(network, images, labels, steps=steps, learning_rate=3e-4, seed=seed + 2 + list(GUISES).index(guise))
    return network


def _train(
    network: Network,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    change: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    with one_thread():
        network.train()
        for _ in range(steps):
            chosen = torch.randint(len(images), (64,), generator=generator)
            batch = images[chosen] if change is None else change(images[chosen], generator)
            # Without smoothing, weights keep growing once every image is learned, and merge worse.
            loss = functional.cross_entropy(network(batch), labels[chosen], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        network.eval()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread: matrices this small only lose by a second, and one adds in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _shifted_and_noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images rolled by up to one pixel each way, faded by up to 40 %, with some noise."""
    count = len(images)
    down, right = (torch.randint(-1, 2, (count, 1), generator=generator) for _ in range(2))
    rows = (torch.arange(8) - down) % 8
    columns = (torch.arange(8) - right) % 8
    rolled = images[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    contrast = 0.6 + 0.4 * torch.rand(count, 1, 1, generator=generator)
    return (rolled * contrast + 0.08 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
