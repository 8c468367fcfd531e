"""GGEUR: sites that lack classes or domains train a head on samples of the shape that all sites' embeddings have.

Ma, Dai, Huang, Chen, "Geometric Knowledge-Guided Localized Global Distribution Alignment for Federated Learning",
CVPR 2025, arXiv 2503.06457.

Before the rounds each site sends, per class, how many embeddings it has, their mean and their covariance
(`graftwork/federated/moments.py`); the server merges them exactly and sends back the geometry of each class. From then
on FedAvg, FedProx or SCAFFOLD (`base`) trains the head on real embeddings and samples around them (`geometry.py`). The
encoder below the head is frozen and never sent.

Where the published code and this file differ: classes that a site lacks are sampled too (`fill`; without it there is
nothing to gain under strong label skew); all sites count, not those with most samples; the global model really is
broadcast in every round; logits, not probabilities, enter the loss; the number of local steps is that of the base
algorithm, not ten times as many; classes with fewer than `min_count` embeddings are not reported; a class is found by
its number, not by part of a file's name; one decomposition per class, not one per anchor. `ggeur-paper` has the
sampling as published.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import torch
import xxhash
from torch import Tensor, nn

from graftwork.federated import moments as moments_of_classes
from graftwork.federated.algorithms.base import (
    Algorithm,
    Client,
    Form,
    Outgoing,
    Reply,
    Server,
    Settings,
    Update,
    prefixed,
    select,
    setting,
)
from graftwork.federated.embedding import embed, head_logits, linear_sizes, part
from graftwork.federated.errors import FederationError, QuorumError
from graftwork.federated.examples import Examples, endless_minibatches
from graftwork.federated.geometry import Augmented, Geometry, compose, geometry_of
from graftwork.federated.moments import Moments, class_moments, discriminant, from_tensors, merge_moments, to_tensors
from graftwork.federated.seeds import seed_of
from graftwork.federated.training import measure, test_examples
from graftwork.merge.checkpoint import quoted

if TYPE_CHECKING:
    from graftwork.merge.task import Task

GEOMETRY, MERGED, CANDIDATE, VERSION = "geometry", "merged", "candidate", "geometry_version"
"""Groups of tensors besides the model, and the name of the number that tells which geometry a site has."""

MOMENTS_QUESTION, COMPARE_QUESTION = "moments", "compare"


@dataclass(frozen=True, kw_only=True)
class GGEURSettings(Settings):
    """Settings of GGEUR and of its base algorithm's local update."""

    base: Literal["fedavg", "fedprox", "scaffold"] = setting("fedavg", "The algorithm that trains the head.")
    mu: float = setting(0.01, "Weight of FedProx's proximal term, with base=fedprox.", minimum=0)
    statistics: Literal["lowrank", "tri", "factor", "pooled", "noisy"] = setting(
        "lowrank",
        "What covariances are sent as: strongest directions, all of them, a factor, one for all classes, or "
        "that with noise for differential privacy.",
    )
    precision: Literal["float32", "float64"] = setting("float32", "Of the statistics on their way.")
    rank: int = setting(64, "Directions per class, in what is sent and in the geometry; 0: all.", minimum=0)
    min_count: int = setting(5, "Classes with fewer embeddings are not reported by a site.", minimum=1)
    clip_embeddings: float = setting(1.0, "Longest embedding with statistics=noisy.", minimum=0)
    noise_multiplier: float = setting(1.0, "Noise on each sum with statistics=noisy.", minimum=0)
    trace_limit: float = setting(
        0.0, "Scale down covariances of a site whose trace exceeds this times the median; 0: any.", minimum=0
    )
    mode: Literal["single", "multi"] = setting(
        "single", "One domain, or a domain per site: then samples are drawn around the other sites' means as well."
    )
    sigma: Literal["total", "within"] = setting("total", "Covariance with or without the spread of the sites' means.")
    eigen_power: float = setting(0.5, "Power of eigenvalues in samples: 0.5, or 1 as in eq. 5.", minimum=0)
    noise_scale: float = setting(1.0, "Multiplies the spread of samples.", minimum=0)
    fill: Literal["global", "none"] = setting("global", "Whether classes that a site lacks are sampled.")
    target_per_class: int = setting(200, "Real and synthetic embeddings per class and site.", minimum=0)
    per_prototype: int = setting(500, "Samples around each other site's mean of a class, in mode multi.", minimum=0)
    sampling: Literal["on_the_fly", "materialised"] = setting(
        "on_the_fly", "Fresh samples in every round, or one set for the whole run."
    )
    renormalise: Literal["auto", "on", "off"] = setting("auto", "Bring samples to length 1; auto: if embeddings are.")
    start: Literal["model", "lda", "auto"] = setting(
        "model", "First head: the model's own, the linear discriminant of the statistics, or whichever is better."
    )
    min_coverage: float = setting(0.5, "Share of the sites that must send statistics.", minimum=0, maximum=1)

    def problems(self) -> Iterable[str]:
        """Return what is wrong with the settings taken together."""
        if self.statistics == "noisy" and (self.clip_embeddings <= 0 or self.noise_multiplier <= 0):
            yield "statistics=noisy needs clip_embeddings and noise_multiplier above 0"
        if self.statistics == "noisy" and self.mode == "multi":
            yield "mode=multi sends each site's own means to the others, which statistics=noisy is meant to hide"


class GGEUR(Algorithm):
    """A base algorithm on embeddings augmented by the geometry of all sites' classes."""

    name = "ggeur"
    title = "GGEUR"
    reference = "https://arxiv.org/abs/2503.06457"
    settings_type = GGEURSettings
    presets = {  # noqa: RUF012 (declared in the base class)
        "ggeur-paper": {
            "statistics": "tri",
            "rank": 0,
            "min_count": 1,
            "eigen_power": 1.0,
            "fill": "none",
            "sampling": "materialised",
            "weights": "equal",
        }
    }
    has_private_state = True

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        self.inner = self._base()

    def _base(self) -> Algorithm:
        """Return the base algorithm with the settings that it shares with this one."""
        from graftwork.federated.algorithms import algorithm_class

        kind = algorithm_class(self.settings.base)
        wanted = {item.name for item in dataclasses.fields(kind.settings_type)}
        given = {name: value for name, value in self.settings.record().items() if name in wanted}
        return kind(kind.settings_type(**given))

    def data_defaults(self, federation: str, *, has_folder: bool) -> Mapping[str, str]:
        """Return features that need no trained encoder: those of a small network, or the data's own."""
        return {"features": "half64"} if federation == "digits" and not has_folder else {"network": "linear"}

    # --- server half

    def check(self, server: Server) -> list[str]:
        """Return what stands in the way of a run."""
        head = server.task.head
        if not head:
            return ["ggeur trains the head of a model on embeddings, but the task names no head; give Task(head=…)"]
        linear_sizes(server.module(), head)
        if self.settings.start != "model" and not isinstance(part(server.module(), head), nn.Linear):
            return [
                f"start={self.settings.start} computes a linear head, but {quoted(head)} is more than a linear layer; "
                "set start=model"
            ]
        return list(self.inner.check(dataclasses.replace(server, algorithm=self.inner)))

    def local_names(self, module: nn.Module, head: str | None = None) -> frozenset[str]:
        """Return all entries but the head's: the encoder is frozen, and is not sent."""
        return frozenset(name for name in module.state_dict() if not name.startswith(f"{head}."))

    def start(self, server: Server) -> None:
        """Start the base algorithm."""
        self.inner.start(self._inside(server))

    def before_rounds(self, server: Server) -> None:
        """Collect the statistics, merge them, and perhaps replace the head by their linear discriminant."""
        self.inner.before_rounds(self._inside(server))
        server.record[VERSION] = 0
        server.record["holders"] = []
        server.record["missing"] = list(server.sites)
        found = self._collect(server, server.sites, self.settings.min_coverage)
        if len(found) < self.settings.min_coverage * len(server.sites) or not found:
            reasons = server.record.get("rejected_statistics", {})
            raise QuorumError(
                f"cannot merge statistics: {len(found)} of {len(server.sites)} sites sent usable ones, "
                f"min_coverage asks for {self.settings.min_coverage:g}",
                *(f"site {quoted(site)}: {reason}" for site, reason in sorted(reasons.items())),
            )
        self._take_in(server, found)
        if self.settings.start != "model":
            self._start_from_discriminant(server)

    def outgoing(self, server: Server, site: str) -> Outgoing:
        """Return what the base algorithm sends, and the geometry to a site that does not have it yet."""
        plain = self.inner.outgoing(self._inside(server), site)
        version = server.record.get(VERSION, 0)
        if version == 0 or site in server.record["holders"]:
            return plain
        tensors = {name: value for name, value in server.kept.items() if name.startswith(f"{GEOMETRY}/")}
        if self.settings.mode == "multi":
            # The site has its own embeddings; it needs no samples around their mean.
            counts = tensors[f"{GEOMETRY}/prototype_counts"].clone()
            counts[server.sites.index(site)] = 0
            tensors[f"{GEOMETRY}/prototype_counts"] = counts
        return Outgoing({**plain.tensors, **tensors}, {**plain.config, VERSION: version})

    def aggregate(self, server: Server, replies: Sequence[Reply]) -> None:
        """Aggregate as the base algorithm does."""
        self.inner.aggregate(self._inside(server), replies)

    def after_round(self, server: Server, replies: Sequence[Reply]) -> Mapping[str, float]:
        """Note who has the geometry, and take in statistics of sites that were late for them."""
        metrics = dict(self.inner.after_round(self._inside(server), replies))
        if "missing" not in server.record:
            return metrics
        version = server.record[VERSION]
        has_it = {reply.site for reply in replies if int(reply.metrics.get(VERSION, 0)) == version}
        lost_it = {reply.site for reply in replies} - has_it
        server.record["holders"] = sorted((set(server.record["holders"]) | has_it) - lost_it)
        late = [reply.site for reply in replies if reply.site in server.record["missing"]]
        if late:
            found = self._collect(server, late, 0.0)
            # Without a first geometry (a quorum missed, and the run told to go on) as many are needed as for one.
            if found and (version > 0 or len(found) >= self.settings.min_coverage * len(server.sites)):
                self._take_in(server, found)
        return {**metrics, VERSION: float(server.record[VERSION])}

    def evaluate_server(self, server: Server) -> Mapping[str, float]:
        """Return loss and accuracy of the global model on the server's test data."""
        if not server.has_data or server.task.test is None:
            return {}
        loss, accuracy = _measured(server.task, server.module(), "test", test_examples(server.task))
        return {"loss": loss, "accuracy": accuracy}

    def _inside(self, server: Server) -> Server:
        """Return the server as the base algorithm sees it."""
        return dataclasses.replace(server, algorithm=self.inner)

    def _collect(self, server: Server, sites: Iterable[str], quorum: float) -> dict[str, Moments]:
        """Ask sites for their statistics; return the usable ones and note the others."""
        features, classes = linear_sizes(server.module(), _head(server.task))
        model = {name: value for name, value in server.shared.items() if name.startswith("model/")}
        forms = self._forms(classes, features)
        replies = server.ask(MOMENTS_QUESTION, Outgoing(model), expect=forms, sites=sites, quorum=quorum)
        found: dict[str, Moments] = {}
        rejected: dict[str, str] = dict(server.record.get("rejected_statistics", {}))
        for reply in replies:
            try:
                found[reply.site] = from_tensors(reply.tensors, self.settings.statistics, classes, features)
                rejected.pop(reply.site, None)
            except FederationError as error:
                rejected[reply.site] = str(error)
        if rejected:
            server.record["rejected_statistics"] = rejected
        return _limited(found, self.settings.trace_limit)

    def _forms(self, classes: int, features: int) -> dict[str, Form]:
        """Return what statistics look like in the chosen form."""
        kind, number = self.settings.statistics, self.settings.precision
        forms = {
            moments_of_classes.COUNTS: Form("float64", (classes,)),
            moments_of_classes.MEANS: Form(number, (classes, features)),
        }
        if kind == "factor":
            forms[moments_of_classes.ROWS] = Form(number, (-1, features))
            forms[moments_of_classes.ROW_COUNTS] = Form("int64", (classes,))
        elif kind == "lowrank":
            forms[moments_of_classes.ROWS] = Form(number, (classes, -1, features))
            forms[moments_of_classes.RESIDUALS] = Form(number, (classes,))
        else:
            groups = classes if kind == "tri" else 1
            forms[moments_of_classes.TRIANGLES] = Form(number, (groups, features * (features + 1) // 2))
        return forms

    def _take_in(self, server: Server, found: Mapping[str, Moments]) -> None:
        """Merge statistics with those that are there already, and make the next version of the geometry."""
        settings: GGEURSettings = self.settings
        merged = _restored(server.kept)
        parts = list(found.values())
        between = settings.sigma == "total"
        for begin in range(0, len(parts), MERGED_AT_ONCE):
            group = parts[begin : begin + MERGED_AT_ONCE]
            merged = merge_moments([*([merged] if merged is not None else []), *group], between=between)
        assert merged is not None
        counts, means = self._prototypes(server, found, merged)
        geometry = geometry_of(
            merged,
            rank=settings.rank,
            eigen_power=settings.eigen_power,
            noise_scale=settings.noise_scale,
            prototypes=means,
            prototype_counts=counts,
        )
        server.kept.update(prefixed(GEOMETRY, geometry.to_tensors()))
        server.record["missing"] = sorted(set(server.record["missing"]) - set(found))
        server.record[VERSION] += 1
        server.record["holders"] = []
        server.record["absent_classes"] = torch.nonzero(merged.counts <= 0).squeeze(1).tolist()
        # Merged statistics are kept as long as more may come, and for the head that is computed from them.
        for name in [name for name in server.kept if name.startswith(f"{MERGED}/")]:
            del server.kept[name]
        if server.record["missing"] or server.round == 0:
            server.kept.update(prefixed(MERGED, _stored(merged)))

    def _prototypes(
        self, server: Server, found: Mapping[str, Moments], merged: Moments
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return counts (D, C) and means (D, C, P) of every site's classes, if samples are drawn around them."""
        if self.settings.mode == "single":
            return None, None
        shape = (len(server.sites), *merged.means.shape)
        before = select(server.kept, GEOMETRY)
        means = before["prototypes"].double() if before else torch.zeros(shape, dtype=torch.float64)
        counts = before["prototype_counts"].clone() if before else torch.zeros(shape[:2], dtype=torch.float64)
        for site, moments in found.items():
            place = server.sites.index(site)
            means[place], counts[place] = moments.means, moments.counts
        return counts, means

    def _start_from_discriminant(self, server: Server) -> None:
        """Put the linear discriminant into the head; with start=auto only if the sites do better with it."""
        merged = _restored(server.kept)
        assert merged is not None
        head = _head(server.task)
        weight, bias = discriminant(merged)
        given = {f"model/{head}.weight": weight, f"model/{head}.bias": bias}
        head_state = {
            name: value.to(server.shared[name].dtype) for name, value in given.items() if name in server.shared
        }
        if self.settings.start == "auto":
            model = {name: value for name, value in server.shared.items() if name.startswith("model/")}
            replies = server.ask(
                COMPARE_QUESTION, Outgoing({**model, **prefixed(CANDIDATE, head_state)}), expect={}, quorum=0.0
            )
            gain = sum(
                reply.examples * (reply.metrics["accuracy_candidate"] - reply.metrics["accuracy_model"])
                for reply in replies
            )
            if gain <= 0:
                return
        server.shared.update(head_state)
        server.record["started_from_discriminant"] = True

    # --- client half

    def train(self, client: Client) -> Update:
        """Return the base algorithm's update on real and synthetic embeddings."""
        head = _head(client.task)
        real = _embedded(client.task, client.module(), "train", client.examples)
        private = {name: value for name, value in client.private.items() if not name.startswith(f"{GEOMETRY}/")}
        stored = _geometry_at(client)
        steps = self._steps(len(real))
        examples = real
        if stored and len(real):
            examples = self._augmented(client, real, stored, steps)
        inner = type(self.inner)(dataclasses.replace(self.inner.settings, local_steps=steps))
        task = dataclasses.replace(client.task, logits=head_logits(head))
        update = inner.train(dataclasses.replace(client, algorithm=inner, task=task, loaded=examples, private=private))
        version = float(stored["version"]) if stored else 0.0
        # The encoder is as it was; it need not be stored.
        kept = {
            name: value
            for name, value in (private if update.private is None else update.private).items()
            if not name.startswith("model/")
        }
        kept |= prefixed(GEOMETRY, stored)
        # What is as it was need not be written again.
        is_new = update.private is not None or any(name.startswith(f"{GEOMETRY}/") for name in client.received)
        return dataclasses.replace(
            update,
            examples=float(len(real)),
            metrics={**update.metrics, VERSION: version, "augmented_examples": float(len(examples))},
            private=kept if is_new and kept else None,
        )

    def answer(self, client: Client) -> Update:
        """Return the site's statistics, or how two heads do on its embeddings."""
        real = _embedded(client.task, client.module(), "train", client.examples)
        if client.question == MOMENTS_QUESTION:
            return self._statistics(client, real)
        if client.question == COMPARE_QUESTION:
            metrics = {}
            candidate = {**client.received, **select(client.received, CANDIDATE)}
            for name, received in (("accuracy_model", client.received), ("accuracy_candidate", candidate)):
                module = dataclasses.replace(client, received=received).module()
                metrics[name] = _judge(client.task, module, real)[1] if len(real) else 0.0
            return Update({}, float(len(real)), metrics)
        return super().answer(client)

    def evaluate(self, client: Client) -> Update:
        """Return loss and accuracy of the received head on the site's test embeddings."""
        examples = test_examples(client.task)
        if len(examples) == 0:
            return Update({}, 0.0)
        loss, accuracy = _measured(client.task, client.module(), "test", examples)
        return Update({}, float(len(examples)), {"loss": loss, "accuracy": accuracy})

    def _statistics(self, client: Client, real: Examples) -> Update:
        settings: GGEURSettings = self.settings
        features, classes = linear_sizes(client.module(), _head(client.task))
        moments = class_moments(
            real.inputs if len(real) else torch.zeros(0, features),
            real.labels if real.labels is not None and len(real) else torch.zeros(0, dtype=torch.int64),
            classes,
            form=settings.statistics,
            rank=settings.rank,
            min_count=settings.min_count,
            clip=settings.clip_embeddings,
            noise=settings.noise_multiplier,
        )
        tensors = to_tensors(moments, settings.statistics, getattr(torch, settings.precision))
        return Update(tensors, float(moments.counts.sum()))

    def _steps(self, count: int) -> int:
        """Return how many steps the base algorithm would take on the real embeddings."""
        settings = self.settings
        if settings.local_steps > 0 or count == 0:
            return cast(int, settings.local_steps)
        whole, rest = divmod(count, settings.batch_size)
        return cast(int, settings.local_epochs * (whole + (rest > 1 or whole == 0)))

    def _augmented(self, client: Client, real: Examples, stored: Mapping[str, Tensor], steps: int) -> Examples:
        """Return what the base algorithm is to learn from in this round."""
        settings: GGEURSettings = self.settings
        version = int(stored["version"])
        geometry = Geometry.from_tensors(stored)
        every = self._compose(client, real, geometry, version)
        unit = settings.renormalise == "on" or (settings.renormalise == "auto" and _have_length_one(real.inputs))
        if settings.sampling == "materialised":
            seed = seed_of(client.base_seed, client.site, "samples", version)
            return Examples(*every.draw_all(geometry, seed, unit=unit))
        endless = endless_minibatches(len(every), settings.batch_size, client.generator("members"))
        chosen = [torch.from_numpy(next(endless)) for _ in range(steps)]
        members = torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.int64)
        return Examples(*every.draw(members, geometry, client.seed("samples"), unit=unit))

    def _compose(self, client: Client, real: Examples, geometry: Geometry, version: int) -> Augmented:
        settings: GGEURSettings = self.settings
        assert real.labels is not None
        return compose(
            real.inputs,
            real.labels,
            geometry,
            torch.Generator().manual_seed(seed_of(client.base_seed, client.site, "anchors", version)),
            mode=settings.mode,
            target_per_class=settings.target_per_class,
            per_prototype=settings.per_prototype,
            fill=settings.fill,
        )


MERGED_AT_ONCE = 32
"""How many sites' statistics are held at the same time."""


def _head(task: Task) -> str:
    if not task.head:
        raise FederationError("ggeur trains the head of a model on embeddings, but the task names no head")
    return task.head


def _geometry_at(client: Client) -> dict[str, Tensor]:
    """Return the geometry that was received, or else the one that the site has kept; empty if there is none."""
    received = select(client.received, GEOMETRY)
    if received:
        stored = {**received, "version": torch.tensor(float(client.config[VERSION]))}
    else:
        stored = select(client.private, GEOMETRY)
    return {name: value.cpu() for name, value in stored.items()}


def _have_length_one(embeddings: Tensor) -> bool:
    return bool(((embeddings.norm(dim=1) - 1).abs() < 1e-3).all())


def _limited(found: dict[str, Moments], limit: float) -> dict[str, Moments]:
    """Scale covariances down whose trace exceeds `limit` times the median over the sites that have the class."""
    if limit <= 0 or len(found) < 3:
        return found
    traces = torch.stack([moments.covariances().diagonal(dim1=1, dim2=2).sum(1) for moments in found.values()])
    present = torch.stack([moments.weights() > 0 for moments in found.values()])
    most = limit * torch.where(present, traces, torch.nan).nanmedian(0).values
    scaled = {}
    for (site, moments), own in zip(found.items(), traces, strict=True):
        factor = torch.where(own > most, most / own.clamp_min(1e-300), torch.ones_like(own)).nan_to_num(1.0)
        scaled[site] = dataclasses.replace(
            moments,
            rows=tuple(value.sqrt() * rows for value, rows in zip(factor, moments.rows, strict=True)),
            residuals=factor * moments.residuals,
            dense=None if moments.dense is None else factor[:, None, None] * moments.dense,
        )
    return scaled


def _stored(moments: Moments) -> dict[str, Tensor]:
    """Return merged statistics as tensors, for the server alone."""
    tensors = {
        "counts": moments.counts,
        "means": moments.means,
        "rows": torch.cat(list(moments.rows)),
        "row_counts": torch.tensor([len(rows) for rows in moments.rows]),
        "residuals": moments.residuals,
    }
    return tensors if moments.dense is None else {**tensors, "dense": moments.dense}


def _restored(kept: Mapping[str, Tensor]) -> Moments | None:
    stored = select(kept, MERGED)
    if not stored:
        return None
    sizes = [int(size) for size in stored["row_counts"]]
    rows = tuple(torch.split(stored["rows"], sizes))
    return Moments(stored["counts"], stored["means"], rows, stored["residuals"], stored.get("dense"))


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings by the frozen encoder, once per process

_EMBEDDINGS: dict[tuple[int, str], tuple[Task, str, Examples]] = {}
"""(task, split) → the task itself, so that its address stays its own; digest of the encoder; embeddings."""

REMEMBERED = 1024


def _embedded(task: Task, module: nn.Module, split: str, examples: Examples) -> Examples:
    """Return the embeddings of examples by the part of the model below the head."""
    head = _head(task)
    digest = _encoder_digest(module, head)
    key = (id(task), split)
    known = _EMBEDDINGS.get(key)
    if known is not None and known[1] == digest and len(known[2]) == len(examples):
        return known[2]
    if len(examples) == 0:
        return Examples(torch.zeros(0, linear_sizes(module, head)[0]), torch.zeros(0, dtype=torch.int64))
    # Statistics and samples are small work: only the passes through the model are for another device.
    found = Examples(embed(task, module, examples.inputs, head).cpu(), examples.labels)
    if len(_EMBEDDINGS) >= REMEMBERED:
        _EMBEDDINGS.pop(next(iter(_EMBEDDINGS)))
    _EMBEDDINGS[key] = (task, digest, found)
    return found


def _encoder_digest(module: nn.Module, head: str) -> str:
    digest = xxhash.xxh3_128()
    for name, value in module.state_dict().items():
        if not name.startswith(f"{head}."):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _judge(task: Task, module: nn.Module, embeddings: Examples) -> tuple[float, float]:
    """Return loss and accuracy of the head on embeddings."""
    return measure(dataclasses.replace(task, logits=head_logits(_head(task))), module, embeddings)


def _measured(task: Task, module: nn.Module, split: str, examples: Examples) -> tuple[float, float]:
    return _judge(task, module, _embedded(task, module, split, examples))
