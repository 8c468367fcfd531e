"""FRAug: a model per site, trained on real embeddings and on synthetic ones that know of all sites.

Chen, Frikha, Krompass, Gu, Tresp, "FRAug: Tackling Federated Learning with Non-IID Features via Representation
Augmentation", ICCV 2023, arXiv 2205.14900.

Batch normalisation stays at the sites (FedBN), chosen by the layers' type. A generator, averaged like the model, makes
client-agnostic embeddings of a class; a residual network that never leaves its site (RTNet) turns them into steps away
from real embeddings and class prototypes. The head learns from both.

Where the published code and this file differ: synthetic embeddings are added to the loss instead of taking half of the
real ones' weight (`combine`; the latter cost one to four points); the residual network's last BatchNorm starts with a
weight of 0.1, so that first steps are small (`residual_start`); a prototype starts with the first mean seen, not with
zero, and classes never seen at a site are not sampled there; synthetic embeddings stay at or above zero where real ones
do (`clamp`); gradients are clipped; latents are normal as in the paper, not uniform; one generator for all from the
start; optimisers start afresh in every round. `fraug-paper` has the loss, the residuals and the rest as published.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftwork.federated.algorithms.base import (
    Algorithm,
    Client,
    Server,
    Settings,
    Update,
    prefixed,
    select,
    setting,
)
from graftwork.federated.discrepancy import mk_mmd
from graftwork.federated.embedding import embed, features_of, head_logits, linear_sizes, with_features
from graftwork.federated.errors import FederationError
from graftwork.federated.normalisation import batch_norm_names, has_batch_norm, recalibrate
from graftwork.federated.seeds import seed_of, torch_seed
from graftwork.federated.training import batches_of, loss_of, optimiser_of
from graftwork.merge.checkpoint import quoted
from graftwork.merge.evaluation import logits_of

GENERATOR, RESIDUAL, PROTOTYPES, SEEN = "generator", "residual", "prototypes", "seen"
"""Groups and names of tensors besides the model; all but the first never leave a site."""

Distance = Literal["mmd", "l2"]


@dataclass(frozen=True, kw_only=True)
class FRAugSettings(Settings):
    """Settings of FRAug; equation numbers as in the docs page."""

    momentum: float = setting(0.5, "Momentum of sgd, for all three networks.", minimum=0, maximum=1)
    clip: float = setting(5.0, "Largest norm of a gradient, for each network; 0: any.", minimum=0)
    generator_rate: float = setting(0.05, "Step size of the generator.", minimum=0)
    residual_rate: float = setting(0.05, "Step size of the residual network.", minimum=0)
    combine: Literal["sum", "convex"] = setting(
        "sum", "Loss of the classifier: real + λ · synthetic, or (1 − λ) · real + λ · synthetic as in eq. 5."
    )
    synthetic_weight: float = setting(0.5, "Largest weight λ of synthetic embeddings.", minimum=0)
    schedule: float = setting(
        0.0, "γ: λ is at most exp(γ · (round − rounds)); 0 keeps it constant. Published: 0.002 or 0.01.", minimum=0
    )
    warm_up: int = setting(0, "Rounds without synthetic embeddings, as FedBN.", minimum=0)
    generator_distance: Literal["mmd", "l2"] = setting(
        "mmd", "How far synthetic embeddings are from the site's own (eq. 6)."
    )
    generator_distance_weight: float = setting(1.0, "Weight of that distance, which is maximised.", minimum=0)
    residual_distance: Literal["mmd", "l2"] = setting("mmd", "How far residuals lead away from their base (eq. 7).")
    residual_distance_weight: float = setting(1.0, "Weight of that distance, which is minimised.", minimum=0)
    residual_objective: Literal["entropy", "nonsaturating"] = setting(
        "entropy", "What residuals aim at: uncertain predictions, or improbable labels."
    )
    residual_objective_weight: float = setting(1.0, "Weight of that aim.", minimum=0)
    residual_start: float = setting(0.1, "Weight with which the residual network's last BatchNorm starts.", minimum=0)
    prototype_momentum: float = setting(0.3, "Share of a batch's mean in a prototype (eq. 4).", minimum=0, maximum=1)
    first_prototype: Literal["mean", "zero"] = setting(
        "mean", "What a class's prototype starts from: the first mean seen, or zero."
    )
    unseen: Literal["skip", "zero"] = setting(
        "skip", "Classes that a site has never seen: not sampled, or sampled around a prototype of zeros."
    )
    clamp: bool = setting(True, "Keep synthetic embeddings at or above zero where real ones are (after a ReLU).")
    interpolate: bool = setting(False, "Draw synthetic embeddings towards their base early on, by exp(γ …).")
    latent: int = setting(0, "Length of the generator's latent; 0: half of the embedding's.", minimum=0)
    latent_distribution: Literal["normal", "uniform"] = setting("normal", "Of the generator's latent.")
    generator_norm: Literal["shared", "local"] = setting("shared", "Where the generator's BatchNorm lives.")
    use_residual: bool = setting(True, "Off: the generator's embeddings are used as they are.")
    use_batch: bool = setting(True, "Residuals on the batch's embeddings (eq. 2).")
    use_prototypes: bool = setting(True, "Residuals on prototypes (eq. 3).")
    train_generator: bool = setting(True, "Off: the generator stays as it starts.")


class Generator(nn.Module):
    """Makes client-agnostic embeddings of classes from noise (eq. 1).

    Args:
        size: Length d of an embedding.
        classes: How many classes.
        latent: Length of the noise.
    """

    def __init__(self, size: int, classes: int, latent: int) -> None:
        super().__init__()
        self.classes, self.latent = classes, latent
        self.layers = nn.Sequential(
            nn.Linear(latent + classes, size),
            nn.BatchNorm1d(size),
            nn.ReLU(),
            nn.Linear(size, size),
            nn.BatchNorm1d(size),
            nn.ReLU(),
        )

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        """Return embeddings (n, d) of noise (n, latent) and labels (n,)."""
        return cast(Tensor, self.layers(torch.cat([latent, functional.one_hot(labels, self.classes).float()], 1)))


class Residual(nn.Module):
    """Turns client-agnostic embeddings into residuals that suit one site (RTNet, eq. 2 and 3).

    Args:
        size: Length d of an embedding.
        classes: How many classes.
        hidden: Width between the two layers.
        start: First weight of the last BatchNorm, and so the size of first residuals.
    """

    def __init__(self, size: int, classes: int, hidden: int, start: float) -> None:
        super().__init__()
        self.classes = classes
        last = nn.BatchNorm1d(size)
        nn.init.constant_(last.weight, start)
        self.layers = nn.Sequential(
            nn.Linear(size + classes, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, size), last
        )

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return residuals (n, d) of client-agnostic embeddings (n, d) and labels (n,)."""
        return cast(Tensor, self.layers(torch.cat([embeddings, functional.one_hot(labels, self.classes).float()], 1)))


# ---------------------------------------------------------------------------------------------------------------------
# The parts of the losses


def synthetic_share(round: int, rounds: int, largest: float, rate: float) -> float:
    """Return λ = min(largest, exp(rate · (t − rounds))) of round t, from 0 (eq. 5)."""
    return min(largest, math.exp(rate * (round - rounds)))


def mean_entropy(logits: Tensor) -> Tensor:
    """Return the mean entropy of the predictions, in nats."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def nonsaturating(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of log(1 − p) of the labels' probabilities p: the larger, the less probable labels are."""
    probable = logits.softmax(1).gather(1, labels[:, None])
    return torch.log((1 - probable).clamp_min(1e-12)).mean()


def distance(kind: Distance, first: Tensor, second: Tensor) -> Tensor:
    """Return MK-MMD of two sets of embeddings, or the mean squared difference of their numbers."""
    return mk_mmd(first, second) if kind == "mmd" else functional.mse_loss(first, second)


def update_prototypes(
    prototypes: Tensor, seen: Tensor, embeddings: Tensor, labels: Tensor, momentum: float, first: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Return prototypes (C, d) and which classes have been seen (C,), after one batch (eq. 4).

    A class in the batch moves by `momentum` towards its mean embedding there; one seen for the first time takes that
    mean, if `first` is "mean". A class that is not in the batch does not move.
    """
    hot = functional.one_hot(labels, len(prototypes)).to(embeddings.dtype)
    counts = hot.sum(0)
    present = counts > 0
    means = hot.T @ embeddings / counts.clamp_min(1)[:, None]
    step = torch.full_like(counts, momentum)
    if first == "mean":
        step = torch.where(seen, step, torch.ones_like(step))
    step = torch.where(present, step, torch.zeros_like(step))[:, None]
    return prototypes * (1 - step) + means * step, seen | present


def balanced_labels(classes: Tensor, count: int, first: int) -> Tensor:
    """Return `count` labels that go through the classes in turn, from place `first`."""
    return classes[(torch.arange(count, device=classes.device) + first) % len(classes)]


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm


class FRAug(Algorithm):
    """Personal models with local batch normalisation, augmented by synthetic embeddings."""

    name = "fraug"
    title = "FRAug"
    reference = "https://arxiv.org/abs/2205.14900"
    settings_type = FRAugSettings
    presets = {  # noqa: RUF012 (declared in the base class)
        "fraug-paper": {
            "combine": "convex",
            "schedule": 0.002,
            "residual_start": 1.0,
            "clamp": False,
            "clip": 0.0,
            "first_prototype": "zero",
            "unseen": "zero",
        }
    }
    is_personal = True
    has_private_state = True

    # --- server half

    def check(self, server: Server) -> list[str]:
        """Return what stands in the way of a run."""
        if not server.task.head:
            return ["fraug makes embeddings for the model's head, but the task names no head; give Task(head=…)"]
        linear_sizes(server.module(), server.task.head)
        return []

    def start(self, server: Server) -> None:
        """Add one generator for all to what is shared."""
        with torch_seed(server.seed("generator")):
            generator = self._generator(*linear_sizes(server.module(), _head(server.task.head)))
        local = self._local_generator_names(generator)
        state = {name: value for name, value in generator.state_dict().items() if name not in local}
        server.shared.update(prefixed(GENERATOR, state))

    def local_names(self, module: nn.Module, head: str | None = None) -> frozenset[str]:
        """Return the entries of batch normalisation layers."""
        return batch_norm_names(module)

    def _generator(self, size: int, classes: int) -> Generator:
        return Generator(size, classes, self.settings.latent or max(1, size // 2))

    def _local_generator_names(self, generator: nn.Module) -> frozenset[str]:
        return batch_norm_names(generator) if self.settings.generator_norm == "local" else frozenset()

    # --- client half

    def train(self, client: Client) -> Update:
        """Return the model and the generator after local steps; keep the rest."""
        return _Site(self, client).run()


def _head(name: str | None) -> str:
    if not name:
        raise FederationError("fraug makes embeddings for the model's head, but the task names no head")
    return name


class _Site:
    """One local update: in each step first the classifier learns, then the generator, then the residual network."""

    def __init__(self, algorithm: FRAug, client: Client) -> None:
        client.compute.need_wide_range("fraug")
        self.client, self.settings = client, cast(FRAugSettings, algorithm.settings)
        self.device = client.compute.device
        self.head = _head(client.task.head)
        self.of_head = head_logits(self.head)
        self.module = client.module()
        self.size, self.classes = linear_sizes(self.module, self.head)
        # A fixed seed per site: a site that lost its state starts from the same networks again.
        own = seed_of(client.base_seed, client.site, "residual")
        with torch_seed(own):
            self.generator = algorithm._generator(self.size, self.classes)
            self.residual = Residual(self.size, self.classes, max(1, self.size // 2), self.settings.residual_start)
        self.generator.to(self.device)
        self.residual.to(self.device)
        kept = select(client.private, GENERATOR)
        self.local_generator = algorithm._local_generator_names(self.generator)
        self.generator.load_state_dict({**kept, **select(client.received, GENERATOR)}, strict=False)
        if select(client.private, RESIDUAL):
            self.residual.load_state_dict(select(client.private, RESIDUAL))
        nothing = torch.zeros(self.classes, self.size, device=self.device)
        self.prototypes = client.private.get(PROTOTYPES, nothing).clone()
        self.seen = client.private.get(SEEN, torch.zeros(self.classes, dtype=torch.uint8)).bool().to(self.device)
        self.optimisers = (
            optimiser_of(self.module, self.settings),
            self._optimiser(self.generator, self.settings.generator_rate),
            self._optimiser(self.residual, self.settings.residual_rate),
        )
        self.random = torch.Generator().manual_seed(client.seed("synthetic"))
        self.sums: dict[str, float] = {}

    def _optimiser(self, module: nn.Module, rate: float) -> Any:
        return optimiser_of(module, dataclasses.replace(self.settings, learning_rate=rate))

    def run(self) -> Update:
        """Train, and return the update."""
        client = self.client
        steps = 0
        if len(client.examples) >= 2:
            self._wake()
            for index in batches_of(client):
                self._step(client.examples.take(index))
                steps += 1
        self.module.eval()
        metrics = {name: total / max(1, steps) for name, total in self.sums.items()}
        metrics["classes_seen"] = float(self.seen.sum())
        update = client.update(self.module, **metrics, steps=steps)
        generator = {name: value.detach().clone() for name, value in self.generator.state_dict().items()}
        sent = {
            f"{GENERATOR}/{name}": value
            for name, value in generator.items()
            if name not in self.local_generator and value.is_floating_point()
        }
        residual = {name: value.detach().clone() for name, value in self.residual.state_dict().items()}
        private = {
            **{name: value for name, value in (update.private or {}).items() if name.startswith("model/")},
            **prefixed(GENERATOR, {name: generator[name] for name in sorted(self.local_generator)}),
            **prefixed(RESIDUAL, residual),
            PROTOTYPES: self.prototypes,
            SEEN: self.seen.to(torch.uint8),
        }
        for name, value in private.items():
            if not bool(torch.isfinite(value).all()):
                raise FederationError(
                    f"the local update of site {quoted(client.site)} diverged: {quoted(name)} is not finite; "
                    "lower learning_rate, generator_rate or residual_rate, or set clip"
                )
        return dataclasses.replace(update, tensors={**update.tensors, **sent}, private=private)

    def _wake(self) -> None:
        """After missed rounds, measure batch normalisation and prototypes anew: the weights above them have moved."""
        client = self.client
        if client.round - max(client.private_round, 0) <= 1:
            return
        examples = client.examples
        if has_batch_norm(self.module):
            recalibrate(
                self.module, examples.inputs, forward=lambda module, batch: logits_of(client.task, module, batch)
            )
        if client.private_round > 0 and examples.labels is not None:
            everything = embed(client.task, self.module, examples.inputs, self.head)
            self.prototypes, self.seen = update_prototypes(
                self.prototypes, torch.zeros_like(self.seen), everything, examples.labels.to(self.device), 1.0
            )

    def _step(self, batch: Any) -> None:
        synthetic = self.client.round > self.settings.warm_up
        self._classifier_step(batch, synthetic)
        if not synthetic:
            return
        self.module.eval()
        with torch.no_grad():
            embeddings = features_of(self.client.task, self.module, batch.inputs, self.head)
        labels = self._labels(len(batch))
        if labels is None:
            return
        if self.settings.train_generator:
            self._generator_step(embeddings, labels)
        if self.settings.use_residual and (self.settings.use_batch or self.settings.use_prototypes):
            self._residual_step(embeddings, batch.labels, labels)

    def _classifier_step(self, batch: Any, synthetic: bool) -> None:
        """Eq. 5: the synthetic part has no gradient below the head, since its embeddings are constants."""
        settings, task = self.settings, self.client.task
        self.module.train()
        features, logits = with_features(task, self.module, batch.inputs, self.head)
        loss = loss_of(task, logits, batch.labels)
        self._add("loss", loss)
        real = features.detach()
        self.prototypes, self.seen = update_prototypes(
            self.prototypes, self.seen, real, batch.labels, settings.prototype_momentum, settings.first_prototype
        )
        if synthetic:
            losses = [
                loss_of(task, self.of_head(self.module, embeddings), labels)
                for embeddings, labels in self._synthetic(real, batch.labels)
            ]
            if losses:
                share = synthetic_share(
                    self.client.round - 1, self.client.rounds, settings.synthetic_weight, settings.schedule
                )
                mean = torch.stack(losses).mean()
                self._add("synthetic_loss", mean)
                loss = (1 - share if settings.combine == "convex" else 1) * loss + share * mean
        self._apply(self.module, self.optimisers[0], loss)

    @torch.no_grad()
    def _synthetic(self, real: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return client-specific embeddings around the batch's own and around prototypes, with their labels."""
        self.generator.eval()
        self.residual.eval()
        made = []
        if self.settings.use_prototypes and (balanced := self._labels(len(real))) is not None:
            made.append((self._around(self.prototypes[balanced], balanced, real), balanced))
        if self.settings.use_batch:
            made.append((self._around(real, labels, real), labels))
        return made

    def _around(self, base: Tensor, labels: Tensor, real: Tensor) -> Tensor:
        settings = self.settings
        agnostic = self.generator(self._latent(len(labels)), labels)
        made = base + self.residual(agnostic, labels) if settings.use_residual else agnostic
        made = self._clamped(made, real)
        if settings.interpolate:
            near = math.exp(settings.schedule * (self.client.round - 1 - self.client.rounds))
            made = near * made + (1 - near) * base
        return made

    def _clamped(self, made: Tensor, real: Tensor) -> Tensor:
        """Keep embeddings at or above zero if the real ones are."""
        return made.clamp_min(0) if self.settings.clamp and not bool((real < 0).any()) else made

    def _generator_step(self, embeddings: Tensor, labels: Tensor) -> None:
        """Eq. 6: embeddings that the head assigns to their class, but far from this site's own."""
        settings = self.settings
        self.generator.train()
        agnostic = self.generator(self._latent(len(labels)), labels)
        loss = loss_of(self.client.task, self.of_head(self.module, agnostic), labels)
        far = distance(
            settings.generator_distance,
            agnostic,
            embeddings if settings.generator_distance == "mmd" else self.prototypes[labels],
        )
        self._add("generator_loss", loss)
        self._add("generator_distance", far)
        self._apply(self.generator, self.optimisers[1], loss - settings.generator_distance_weight * far)

    def _residual_step(self, embeddings: Tensor, labels: Tensor, balanced: Tensor) -> None:
        """Eq. 7: residuals that make the head uncertain, but stay near their base."""
        settings = self.settings
        self.generator.eval()
        self.residual.train()
        losses = []
        for base, of_base, used in (
            (self.prototypes[balanced], balanced, settings.use_prototypes),
            (embeddings, labels, settings.use_batch),
        ):
            if not used:
                continue
            with torch.no_grad():
                agnostic = self.generator(self._latent(len(of_base)), of_base)
            made = self._clamped(base + self.residual(agnostic, of_base), embeddings)
            logits = self.of_head(self.module, made)
            aim = mean_entropy(logits) if settings.residual_objective == "entropy" else nonsaturating(logits, of_base)
            near = distance(settings.residual_distance, made, base)
            self._add("residual_aim", aim)
            self._add("residual_distance", near)
            losses.append(settings.residual_distance_weight * near - settings.residual_objective_weight * aim)
        self._apply(self.residual, self.optimisers[2], torch.stack(losses).mean())

    def _labels(self, count: int) -> Tensor | None:
        """Return balanced labels of the classes that may be sampled; None if there are none yet."""
        every = torch.arange(self.classes, device=self.device)
        classes = every if self.settings.unseen == "zero" else every[self.seen]
        if len(classes) == 0:
            return None
        first = int(torch.randint(len(classes), (1,), generator=self.random))
        return balanced_labels(classes, count, first)

    def _latent(self, count: int) -> Tensor:
        draw = torch.rand if self.settings.latent_distribution == "uniform" else torch.randn
        return draw(count, self.generator.latent, generator=self.random).to(self.device)

    def _apply(self, module: nn.Module, optimiser: Any, loss: Tensor) -> None:
        # Only this network's gradients are computed: those of the others would be waste, or leak into their next step.
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if self.settings.clip > 0:
            torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        optimiser.step()

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())
