"""The data of the simulations: domains, how they look, and how their examples are shared out among sites.

`digits` needs nothing but scikit-learn: its 1,797 images, enlarged to 16 × 16 pixels, under five transforms. With a
folder of data it is made of real digit sets; `office` (SURF features) and `amazon` (bags of words) need a folder.
Training images of different domains are different images; test images never train.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from graftwork.federated.errors import FederationError
from graftwork.federated.seeds import generator_of, seed_of, torch_seed
from graftwork.merge.checkpoint import listed, quoted
from graftwork.merge.errors import DependencyError, did_you_mean
from graftwork.merge.task import Task, load_federation

if TYPE_CHECKING:
    from torch import Tensor

    Values = np.ndarray[Any, np.dtype[Any]]

BUILT_IN = ("digits", "office", "amazon")

SUITES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "soft": ("clean", "rotate", "texture", "noiseblur", "scale"),
        "hard": ("clean", "rotate40", "invert", "noiseblur35", "scale60"),
        "mixed": ("clean", "rotate30", "invert", "blur"),
    }
)
"""Guises of the enlarged digits. `soft`: what is learned on some carries over to others; `hard`: hardly, which is for
methods that keep something of their own; `mixed`: GGEUR's."""

_FILES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "digits": {name: f"digits/{name}.npz" for name in ("mnist", "usps", "mnist_m", "svhn_gray", "char74k_fnt")},
        "office": {name: f"office_caltech10/{name}_surf800.npz" for name in ("amazon", "caltech", "dslr", "webcam")},
        "amazon": {name: f"amazon_reviews/{name}.npz" for name in ("books", "dvd", "electronics", "kitchen")},
    }
)


@dataclass(frozen=True)
class DataOptions:
    """What a built-in federation's data are like; the command line sets these with `--set data.name=value`.

    Args:
        suite: Which guises the enlarged digits have.
        domains: Names of domains separated by commas; by default all.
        examples: Training examples per site, as many of each class; 0 for all there are.
        test_share: Share of the digits that only judges.
        size: Pixels per side of real images.
        channels: 1 for grey, 3 for colour real images.
        features: `pixels`, or `half64`: 64 features of a network that has seen classes 0 to 4 only.
        network: Name of the network; by default `small` for images, `mlp` for features, `linear` for half64.
    """

    suite: str = "soft"
    domains: str = ""
    examples: int = 0
    test_share: float = 0.4
    size: int = 28
    channels: int = 3
    features: str = "pixels"
    network: str = ""

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> DataOptions:
        """Return options from texts; every problem at once."""
        values: dict[str, Any] = {}
        problems = []
        known: dict[str, Any] = {item.name: type(item.default) for item in dataclasses.fields(cls)}
        for key, text in given.items():
            name = key.replace("-", "_")
            if name not in known:
                hint = did_you_mean(name, known) or f"; there are {listed(known, 20)}"
                problems.append(f"there is no setting {quoted('data.' + key)}{hint}")
                continue
            try:
                values[name] = known[name](text)
            except ValueError:
                problems.append(f"data.{name} is {quoted(text)}, which is no {known[name].__name__}")
        options = cls(**values)
        if options.suite not in SUITES:
            hint = did_you_mean(options.suite, SUITES) or f"; there are {listed(SUITES)}"
            problems.append(f"data.suite: there is no suite {quoted(options.suite)}{hint}")
        if options.features not in ("pixels", "half64"):
            problems.append(f"data.features is {quoted(options.features)}, not pixels or half64")
        if not 0 < options.test_share < 1:
            problems.append(f"data.test_share is {options.test_share}, not between 0 and 1")
        if options.examples < 0 or options.channels not in (1, 3) or not 8 <= options.size <= 64:
            problems.append("data.examples has to be at least 0, data.channels 1 or 3, data.size from 8 to 64")
        if problems:
            raise FederationError(*(f"cannot use these settings: {problem}" for problem in problems))
        return options


@dataclass(frozen=True)
class Partition:
    """How examples are shared out among sites.

    Args:
        kind: `domain`: one site per domain. `dirichlet`: sites share one domain, each class by its own draw from
            Dir(alpha). `quantity`: likewise, but all classes by one draw, so that sizes differ. `domain+dirichlet`,
            `domain+quantity`: sites belong to the domains in turn.
        sites: How many; ignored for `domain`.
        alpha: Concentration: the smaller, the more unequal.
        smallest: Draws are repeated until every site has so many examples.
    """

    kind: str = "domain"
    sites: int = 10
    alpha: float = 0.5
    smallest: int = 4

    @classmethod
    def parse(cls, text: str) -> Partition:
        """Return what `domain` or `dirichlet:alpha=0.1,sites=10` says."""
        kind, _, rest = text.partition(":")
        kinds = ("domain", "dirichlet", "quantity", "domain+dirichlet", "domain+quantity")
        doing = f"cannot partition by {quoted(text)}"
        if kind not in kinds:
            hint = did_you_mean(kind, kinds) or f"; there are {listed(kinds)}"
            raise FederationError(f"{doing}: there is no such partition{hint}")
        values: dict[str, Any] = {}
        for part in filter(None, rest.split(",")):
            key, equals, value = part.partition("=")
            if key not in ("sites", "alpha", "smallest") or not equals:
                raise FederationError(f"{doing}: write {kind}:alpha=0.5,sites=10,smallest=4")
            try:
                values[key] = float(value) if key == "alpha" else int(value)
            except ValueError:
                raise FederationError(f"{doing}: {key} is {quoted(value)}, which is no number") from None
        chosen = cls(kind, **values)
        if chosen.sites < 1 or not chosen.alpha > 0 or chosen.smallest < 0:
            raise FederationError(f"{doing}: sites has to be at least 1, alpha above 0, smallest at least 0")
        return chosen

    @property
    def by_domain(self) -> bool:
        """Whether each site sees one domain."""
        return self.kind.startswith("domain")


@dataclass(frozen=True, slots=True)
class Domain:
    """Examples of one domain as arrays: inputs (n, …) in float32 and labels (n,)."""

    x_train: Values
    y_train: Values
    x_test: Values
    y_test: Values


@dataclass(frozen=True)
class Federation:
    """Sites with their tasks, and what the server has.

    Args:
        name: Its name.
        sites: The sites' tasks by name.
        server: The server's task: with `unlabelled` and `test` of a target domain, or with a `test` alone; None if it
            has no data.
        record: What is written into the run's `config.json`: sizes and class counts per site.
        sites_are_judged: Whether each site has test data of its own kind, so that evaluating there tells something.
    """

    name: str
    sites: Mapping[str, Task]
    server: Task | None
    record: Mapping[str, Any] = field(default_factory=dict)
    sites_are_judged: bool = True


@dataclass(frozen=True)
class FederationSpec:
    """What a process needs to build the same federation again; plain values only.

    Args:
        name: `digits`, `office`, `amazon`, or `file.py:federation`.
        seed: The run's seed, by which examples are drawn and shared out.
        data: A folder of real data.
        target: The domain that has no site: its inputs are the server's.
        partition: As `Partition.parse` reads it.
        options: As `DataOptions.parse` reads them.
    """

    name: str
    seed: int = 0
    data: str | None = None
    target: str | None = None
    partition: str = "domain"
    options: Mapping[str, Any] = field(default_factory=dict)


_SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


def build(spec: FederationSpec) -> Federation:
    """Return the federation that a specification describes; built once per process.

    Raises:
        GraftworkError: There is no such federation, domain or file.
    """
    return _build(
        spec.name, spec.seed, spec.data, spec.target, spec.partition, json.dumps(dict(spec.options), sort_keys=True)
    )


@lru_cache(maxsize=8)
def _build(name: str, seed: int, data: str | None, target: str | None, partition: str, options: str) -> Federation:
    if ":" in name:
        found = _from_user(name, target, json.loads(options))
    elif name in BUILT_IN:
        found = _built_in(name, seed, data, target, Partition.parse(partition), DataOptions.parse(json.loads(options)))
    else:
        hint = did_you_mean(name, BUILT_IN) or f"; there are {listed(BUILT_IN)}, or file.py:federation"
        raise FederationError(f"there is no simulation {quoted(name)}{hint}")
    wrong = [site for site in found.sites if not _SITE_NAME.fullmatch(site)]
    if wrong:
        raise FederationError(
            f"cannot use the site name {quoted(wrong[0])}: names become file names; use letters, digits, '.', '_', '-'"
        )
    return found


def _from_user(name: str, target: str | None, options: Mapping[str, Any]) -> Federation:
    if options:
        raise FederationError(f"cannot set {listed('data.' + key for key in options)}: {quoted(name)} has its own data")
    loaded = load_federation(name)
    if not isinstance(loaded, Mapping):
        raise FederationError(
            f"cannot simulate {quoted(name)}: it is a function of a site, and the sites' names are not known; "
            "return a mapping {site: Task}"
        )
    sites = dict(sorted(loaded.items()))
    server = None
    if target is not None:
        if target not in sites:
            raise FederationError(f"there is no site {quoted(target)} to be the target{did_you_mean(target, sites)}")
        own = sites.pop(target)
        server = own if own.unlabelled is not None else dataclasses.replace(own, unlabelled=own.batches)
    if not sites:
        raise FederationError(f"cannot simulate {quoted(name)}: no site is left beside the target")
    return Federation(name, sites, server, {"sites": {site: {} for site in sites}})


# ---------------------------------------------------------------------------------------------------------------------
# Built-in federations


def _built_in(
    name: str, seed: int, data: str | None, target: str | None, partition: Partition, options: DataOptions
) -> Federation:
    domains = _domains(name, seed, data, partition, options)
    if target is not None and target not in domains:
        hint = did_you_mean(target, domains) or f"; there are {listed(domains)}"
        raise FederationError(f"there is no domain {quoted(target)} to be the target{hint}")
    if target is not None and not partition.by_domain:
        raise FederationError(f"cannot have a target with the partition {quoted(partition.kind)}: it uses one domain")
    some = next(iter(domains.values()))
    classes = int(max(domain.y_train.max() for domain in domains.values())) + 1
    shape = tuple(some.x_train.shape[1:])
    chosen = options.network or ("small" if len(shape) == 3 else "linear" if options.features == "half64" else "mlp")
    from graftwork.federated.models import network

    make = network(chosen, shape, classes)

    def task(
        label: str, train: tuple[Values, Values], test: tuple[Values, Values] | None, *, blind: bool = False
    ) -> Task:
        return Task(
            label,
            model=make,
            batches=_batches(*train, labelled=not blind),
            unlabelled=_batches(*train, labelled=False) if blind else None,
            test=None if test is None else _batches(*test),
            head="head",
        )

    sources = {name: domain for name, domain in domains.items() if name != target}
    shares = _shares(sources, seed, partition, options, same_images=data is None)
    sites: dict[str, Task] = {}
    record: dict[str, Any] = {}
    for site, (domain_name, index) in shares.items():
        domain = domains[domain_name]
        labels = domain.y_train[index]
        sites[site] = task(site, (domain.x_train[index], labels), (domain.x_test, domain.y_test))
        record[site] = {
            "domain": domain_name,
            "examples": len(index),
            "classes": np.bincount(labels, minlength=classes).tolist(),
        }
    server = None
    if target is not None:
        domain = domains[target]
        server = task(target, (domain.x_train, domain.y_train), (domain.x_test, domain.y_test), blind=True)
    elif partition.kind != "domain":
        used = [domains[name] for name in dict.fromkeys(item["domain"] for item in record.values())]
        inputs = np.concatenate([domain.x_test for domain in used])
        labels = np.concatenate([domain.y_test for domain in used])
        server = task("all", (inputs[:0], labels[:0]), (inputs, labels))
    return Federation(
        name,
        sites,
        server,
        {"network": chosen, "shape": list(shape), "classes": classes, "sites": record},
        sites_are_judged=partition.by_domain,
    )


def _batches(inputs: Values, labels: Values, *, labelled: bool = True) -> Any:
    """Return a function that yields everything in batches of 512."""

    def batches() -> Iterator[tuple[Tensor, Tensor | None]]:
        import torch

        for start in range(0, len(inputs), 512):
            part = torch.from_numpy(np.array(inputs[start : start + 512], np.float32))
            yield part, torch.from_numpy(np.array(labels[start : start + 512], np.int64)) if labelled else None

    return batches


def _shares(
    domains: Mapping[str, Domain], seed: int, partition: Partition, options: DataOptions, *, same_images: bool
) -> dict[str, tuple[str, Values]]:
    """Return each site's domain and the numbers of its training examples.

    With `same_images` example i shows the same thing in every domain, and goes to one site only.
    """
    if partition.kind == "domain":
        return {
            name: (name, _subset(domain.y_train, options.examples, generator_of(seed, name, "subset")))
            for name, domain in domains.items()
        }
    label_skew = partition.kind.endswith("dirichlet")
    names = list(domains) if partition.by_domain else list(domains)[:1]
    if partition.sites < len(names):
        raise FederationError(
            f"cannot partition: {partition.sites} sites for {len(names)} domains leave one without any"
        )
    homes = [names[number % len(names)] for number in range(partition.sites)]
    width = max(2, len(str(partition.sites - 1)))
    titles = [f"{home if partition.by_domain else 'site'}-{number:0{width}}" for number, home in enumerate(homes)]
    found: dict[str, tuple[str, Values]] = {}
    if same_images:
        parts = _split(domains[names[0]].y_train, partition.sites, partition, label_skew, seed, "all")
        found = {title: (home, part) for title, home, part in zip(titles, homes, parts, strict=True)}
    else:
        for name in names:
            members = [title for title, home in zip(titles, homes, strict=True) if home == name]
            parts = _split(domains[name].y_train, len(members), partition, label_skew, seed, name)
            found |= {title: (name, part) for title, part in zip(members, parts, strict=True)}
    return dict(sorted(found.items()))


def _split(labels: Values, sites: int, partition: Partition, label_skew: bool, seed: int, name: str) -> list[Values]:
    """Return which examples each site gets; every example goes to one site."""
    for attempt in range(10_000):
        generator = generator_of(seed, name, "partition", attempt)
        parts: list[list[Values]] = [[] for _ in range(sites)]
        common = generator.dirichlet([partition.alpha] * sites)
        for label in np.unique(labels):
            index = generator.permutation(np.flatnonzero(labels == label))
            share = generator.dirichlet([partition.alpha] * sites) if label_skew else common
            cuts = (np.cumsum(share)[:-1] * len(index)).astype(int)
            for part, chosen in zip(parts, np.split(index, cuts), strict=True):
                part.append(chosen)
        joined = [np.sort(np.concatenate(part)) for part in parts]
        if min(len(part) for part in joined) >= partition.smallest:
            return joined
    raise FederationError(
        f"cannot partition {len(labels)} examples of {quoted(name)} over {sites} sites with alpha {partition.alpha}: "
        f"some site always has fewer than {partition.smallest}"
    )


def _subset(labels: Values, examples: int, generator: np.random.Generator) -> Values:
    """Return the numbers of `examples` examples, as many of each class as there are."""
    if examples <= 0 or examples >= len(labels):
        return np.arange(len(labels))
    classes = np.unique(labels)
    per_class = max(1, examples // len(classes))
    chosen = [generator.permutation(np.flatnonzero(labels == label))[:per_class] for label in classes]
    return np.sort(np.concatenate(chosen))


def _domains(name: str, seed: int, data: str | None, partition: Partition, options: DataOptions) -> dict[str, Domain]:
    if data is None and name != "digits":
        raise FederationError(f"the simulation {quoted(name)} needs a folder of data; give it with --data")
    wanted = tuple(filter(None, options.domains.split(",")))
    every = tuple(_FILES[name]) if data is not None else SUITES[options.suite]
    unknown = [domain for domain in wanted if domain not in every]
    if unknown:
        hint = did_you_mean(unknown[0], every) or f"; there are {listed(every)}"
        raise FederationError(f"data.domains: there is no domain {quoted(unknown[0])}{hint}")
    names = tuple(domain for domain in every if not wanted or domain in wanted)
    if data is not None:
        return {domain: _real_domain(name, Path(data), domain, seed, options) for domain in names}
    return _transformed(seed, names if partition.by_domain else names[:1], options, apart=partition.kind == "domain")


# --- enlarged digits -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _enlarged() -> tuple[Values, Values]:
    """Return scikit-learn's digits (1797, 16, 16) in [0, 1] and their labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DependencyError(
            'the digits come with scikit-learn, which is missing; install it with pip install "graftwork[demo]"'
        ) from None
    from scipy import ndimage

    bundle = load_digits()
    images = np.stack([ndimage.zoom(image / 16.0, 2, order=1) for image in bundle.images]).clip(0, 1)
    return images, bundle.target.astype(np.int64)


def _transformed(seed: int, names: Sequence[str], options: DataOptions, *, apart: bool) -> dict[str, Domain]:
    """Return the digits in the guises of the domains.

    Args:
        seed: By which they are drawn.
        names: The domains.
        options: Their size and features.
        apart: Whether each domain has training images of its own; otherwise each has all of them, and whoever shares
            them out takes care that no image is in two sites.
    """
    images, labels = _enlarged()
    order = generator_of(seed, "digits", "split").permutation(len(labels))
    tests = round(len(labels) * options.test_share)
    test, train = order[:tests], order[tests:]
    found = {}
    shares = np.array_split(train, len(names)) if apart else [train] * len(names)
    for name, share in zip(names, shares, strict=True):
        generator = generator_of(seed, "digits", name)
        x_train = np.stack([_guise(images[i], name, generator) for i in share])
        x_test = np.stack([_guise(images[i], name, generator) for i in test])
        found[name] = Domain(_images(x_train), labels[share], _images(x_test), labels[test])
    if options.features == "half64":
        return _half64(found, seed)
    return found


def _images(values: Values) -> Values:
    return np.ascontiguousarray(values[:, None], np.float32)


def _guise(image: Values, name: str, generator: np.random.Generator) -> Values:
    """Return one image (16, 16) as a domain shows it."""
    from scipy import ndimage

    def turned(angle: float, spread: float) -> Values:
        angle += generator.uniform(-spread, spread) if spread else 0
        result: Values = ndimage.rotate(image, angle, reshape=False, order=1, cval=0.0)
        return result

    def blurred(noise: float, sigma: float = 1.0) -> Values:
        result: Values = ndimage.gaussian_filter(image, sigma)
        return result + generator.normal(0, noise, image.shape) if noise else result

    def shrunk(factor: float, jitter: int, contrast: float, light: float) -> Values:
        small = ndimage.zoom(image, factor, order=1)
        room = image.shape[0] - small.shape[0]
        corner = np.clip(room // 2 + generator.integers(-jitter, jitter + 1, size=2), 0, room)
        canvas = np.zeros_like(image)
        canvas[corner[0] : corner[0] + small.shape[0], corner[1] : corner[1] + small.shape[1]] = small
        return contrast * canvas + light

    match name:
        case "clean":
            return image
        case "invert":
            return 1 - image
        case "rotate":
            return turned(25, 5)
        case "rotate30":
            return turned(30, 0)
        case "rotate40":
            return turned(40, 5)
        case "blur":
            return blurred(0, 1.8)  # 0.9 pixels of the original, which is half as large
        case "noiseblur":
            return blurred(0.25)
        case "noiseblur35":
            return blurred(0.35)
        case "scale":
            return shrunk(0.8, 1, 0.6, 0.25)
        case "scale60":
            return shrunk(0.6, 3, 0.45, 0.35)
        case "texture":
            field_ = ndimage.gaussian_filter(generator.normal(size=image.shape), 2.0)
            field_ = (field_ - field_.min()) / (np.ptp(field_) + 1e-9)
            result: Values = np.abs(image - 0.7 * field_)
            return result
    raise FederationError(f"there is no guise {quoted(name)}")


def _half64(domains: Mapping[str, Domain], seed: int) -> dict[str, Domain]:
    """Return the domains as 64 features of a network that has learned classes 0 to 4 of their training images.

    It stands for a pre-trained encoder that has not seen everything. All features are divided by one number, their
    standard deviation.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    images = np.concatenate([domain.x_train for domain in domains.values()])
    labels = np.concatenate([domain.y_train for domain in domains.values()])
    known = labels < 5
    inputs, targets = torch.from_numpy(images[known]), torch.from_numpy(labels[known])
    with torch_seed(seed_of(seed, "half64")):
        encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(512, 64), nn.ReLU(),
        )  # fmt: skip
        head = nn.Linear(64, 5)
        optimiser = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=1e-3, foreach=True)
        for _ in range(30):
            for index in torch.randperm(len(targets)).split(64):  # type: ignore[no-untyped-call]
                loss = functional.cross_entropy(head(encoder(inputs[index])), targets[index])
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
        with torch.no_grad():
            scale = float(encoder(torch.from_numpy(images)).std()) + 1e-6

            def features(values: Values) -> Values:
                result: Values = (encoder(torch.from_numpy(values)) / scale).numpy()
                return result

            return {
                name: Domain(features(domain.x_train), domain.y_train, features(domain.x_test), domain.y_test)
                for name, domain in domains.items()
            }


# --- real domains ----------------------------------------------------------------------------------------------------


def _real_domain(name: str, root: Path, domain: str, seed: int, options: DataOptions) -> Domain:
    path = root / _FILES[name][domain]
    if not path.is_file():
        raise FederationError(f"cannot read the domain {quoted(domain)}: there is no file {quoted(path)}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            values = {key: archive[key] for key in archive.files}
    except (OSError, ValueError) as error:
        raise FederationError(f"cannot read the domain {quoted(domain)}: {quoted(path)}: {error}") from None
    if name == "digits":
        train, test = (_resized(values[f"x_{part}"], options.size, options.channels) for part in ("train", "test"))
        return Domain(train, values["y_train"].astype(np.int64), test, values["y_test"].astype(np.int64))
    if name == "amazon":
        train, test = (_log_counts(values, part) for part in ("train", "test"))
        return Domain(train, values["y_train"].astype(np.int64), test, values["y_test"].astype(np.int64))
    # The customary preprocessing of SURF histograms: rows add up to one, then columns have mean 0 and variance 1.
    rows = values["x"].astype(np.float64)
    rows /= rows.sum(1, keepdims=True)
    spread = rows.std(0)
    features = ((rows - rows.mean(0)) / np.where(spread > 0, spread, 1)).astype(np.float32)
    labels = values["y"].astype(np.int64)
    order = generator_of(seed, domain, "split").permutation(len(labels))
    tests = round(len(labels) * options.test_share)
    test_index, train_index = order[:tests], order[tests:]
    return Domain(features[train_index], labels[train_index], features[test_index], labels[test_index])


def _resized(images: Values, size: int, channels: int) -> Values:
    """Return images (n, height, width) or (n, height, width, 3) of bytes as (n, channels, size, size) in [0, 1]."""
    import torch
    from torch.nn import functional

    pixels = torch.from_numpy(images).float() / 255
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    if channels == 1 and pixels.shape[1] == 3:
        pixels = (pixels * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    if channels == 3 and pixels.shape[1] == 1:
        pixels = pixels.expand(-1, 3, -1, -1)
    if pixels.shape[-1] != size:
        pixels = functional.interpolate(
            pixels, size=(size, size), mode="bilinear", antialias=pixels.shape[-1] > size, align_corners=False
        )
    result: Values = pixels.contiguous().numpy()
    return result


def _log_counts(values: Mapping[str, Values], part: str) -> Values:
    """Return log(1 + count) of a bag of words (n, terms), each row of norm 1."""
    from scipy.sparse import csr_matrix

    counts = csr_matrix(
        (values[f"x_{part}_data"].astype(np.float32), values[f"x_{part}_indices"], values[f"x_{part}_indptr"]),
        shape=tuple(values[f"x_{part}_shape"]),
    )
    rows = np.log1p(counts.toarray())
    result: Values = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
    return result.astype(np.float32)
