"""FedKA: labelled sources at the sites, an unlabelled target domain on the server, and a model that is to work there.

Sun, Chong, Ochiai, "Feature Distribution Matching for Federated Domain Generalization", ACML 2022, arXiv 2203.11635.

**Client half**: local training; with the weights `disentangler` and `discrepancy` above 0 also a domain discriminator
behind a gradient that is turned round, and MK-MMD between the site's features and the target's, both times α(p).
**Server half**: after the mean, the sites' models vote on labels for the target's inputs, and the mean is fine-tuned on
the labels that enough of them agree on.

Where the published notebook and this file differ, the notebook's way is a setting or a mistake: the fine-tuned model
is what the sites get next (`broadcast_finetuned`; there it never reaches them); voters use batch statistics of the
target and no dropout; ties do not depend on memory addresses; the discrepancy has the weight that is written, not 1/8
of its last batch; optimisers start afresh in every round, since weights are replaced under them; sets of different
sizes can be compared; clients start from one model. By default a vote counts only if three quarters of the voters
agree and a quarter of the rounds is over, and both alignment terms are off: `benchmarks/federated.py` shows why.
`fedka-paper` has them as published.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from graftwork.federated.adversary import Disentangler, domain_loss, ramp
from graftwork.federated.algorithms.base import (
    Algorithm,
    Client,
    Outgoing,
    Reply,
    Server,
    Settings,
    Update,
    prefixed,
    select,
    setting,
)
from graftwork.federated.discrepancy import mk_mmd
from graftwork.federated.embedding import embed, features_of, linear_sizes, with_features
from graftwork.federated.examples import Examples, minibatches
from graftwork.federated.normalisation import has_batch_norm, recalibrate, recalibrated
from graftwork.federated.seeds import torch_seed
from graftwork.federated.training import (
    batches_of,
    evaluate_server,
    loss_of,
    measure,
    optimiser_of,
    test_examples,
    train_locally,
)
from graftwork.federated.voting import Ballot, count_votes
from graftwork.merge.evaluation import logits_of

if TYPE_CHECKING:
    from torch import Tensor, nn

BANK, TARGET, DISENTANGLER, FINETUNED = "bank", "target", "disentangler", "finetuned"
"""Names and groups of tensors besides the model."""


@dataclass(frozen=True, kw_only=True)
class FedKASettings(Settings):
    """Settings of FedKA; α is 2 / (1 + exp(−ramp_slope · p)) − 1 of the share p of the run that is over."""

    optimiser: Literal["sgd", "adam"] = setting("adam", "Local optimiser, and the server's.")
    learning_rate: float = setting(0.002, "Step size of the local optimiser.", minimum=0)
    voting: bool = setting(True, "Whether the sites' models vote on labels for the target, to fine-tune on.")
    vote_threshold: float = setting(
        0.75, "Share of the voters present that must agree; 0 accepts every label.", minimum=0, maximum=1
    )
    vote_start: float = setting(0.25, "Share of the rounds before the first vote.", minimum=0, maximum=1)
    vote_samples: int = setting(0, "How many target inputs are voted on in a round; 0: all.", minimum=0)
    vote_statistics: Literal["target", "running"] = setting(
        "target", "BatchNorm statistics of the voters: measured on the target's inputs, or as they came."
    )
    fine_tuning_epochs: int = setting(1, "Passes over the voted labels in a round.", minimum=1)
    fine_tuning_rate: float = setting(0.0, "Step size of fine-tuning; 0: that of the sites.", minimum=0)
    broadcast_finetuned: bool = setting(True, "Whether sites go on from the fine-tuned model, not from the mean.")
    recalibrate: bool = setting(True, "Whether the final model gets BatchNorm statistics of the target's inputs.")
    group_effect: bool = setting(True, "Measure the Group Effect where the server has labelled test data.")
    disentangler: float = setting(0.0, "Weight of the domain discriminator behind the reversed gradient.", minimum=0)
    discrepancy: float = setting(0.0, "Weight of MK-MMD between source and target features.", minimum=0)
    discrepancy_pass: Literal["joint", "separate"] = setting(
        "joint", "MK-MMD in the steps that learn labels, or in a pass of its own after them, as published."
    )
    workspace: Literal["server", "bank", "images"] = setting(
        "server",
        "What sites get to see of the target: nothing but the model, its features, or the inputs themselves.",
    )
    ramp_slope: float = setting(5.0, "How fast α grows.", minimum=0)
    feature: str = setting(
        "", "Part of the model whose input is aligned; empty: its `neck` if it has one, else the task's head."
    )
    disentangler_width: int = setting(64, "Hidden units of the discriminator.", minimum=1)

    @property
    def aligns(self) -> bool:
        """Whether sites need features of the target."""
        return self.disentangler > 0 or self.discrepancy > 0

    def problems(self) -> Iterable[str]:
        """Return what is wrong with the settings taken together."""
        if self.aligns and self.workspace == "server":
            yield (
                "disentangler and discrepancy compare features with the target's, but with workspace=server nothing of "
                "the target reaches a site; set workspace=bank (its features) or workspace=images (its inputs)"
            )


class FedKA(Algorithm):
    """Federated domain adaptation towards an unlabelled domain on the server, by votes and perhaps by alignment."""

    name = "fedka"
    title = "FedKA"
    reference = "https://arxiv.org/abs/2203.11635"
    settings_type = FedKASettings
    presets = {  # noqa: RUF012 (declared in the base class)
        # Measured with the target's inputs at the sites; with features only ("bank") it loses about two points.
        "fedka-paper": {
            "disentangler": 1.0,
            "discrepancy": 1.0,
            "discrepancy_pass": "separate",
            "workspace": "images",
            "vote_threshold": 0.0,
            "vote_start": 0.0,
            "weights": "equal",
        }
    }
    needs_server_data = True

    # --- server half

    def check(self, server: Server) -> list[str]:
        """Return what stands in the way of a run."""
        problems = list(super().check(server))
        if problems or not self.settings.aligns:
            return problems
        module = server.module()
        name = self._feature(module, server.task.head)
        if not name:
            return ["fedka aligns the input of the model's head, but the task names no head; set feature=NAME"]
        linear_sizes(module, name)
        if self.settings.workspace == "images" and not isinstance(server.inputs(), torch.Tensor):
            return ["fedka can send the target's inputs to the sites only as one tensor; set workspace=bank"]
        return problems

    def start(self, server: Server) -> None:
        """Add the discriminator to what is shared, and what sites see of the target to what they are sent."""
        if self.settings.disentangler > 0:
            module = server.module()
            width, _ = linear_sizes(module, self._feature(module, server.task.head))
            with torch_seed(server.seed("disentangler")):
                disentangler = Disentangler(width, self.settings.disentangler_width)
            server.shared.update(prefixed(DISENTANGLER, disentangler.state_dict()))
        self._fill_workspace(server)

    def outgoing(self, server: Server, site: str) -> Outgoing:
        """Return the model, and what the site sees of the target."""
        return Outgoing(
            {**server.shared, **{name: server.kept[name] for name in (BANK, TARGET) if name in server.kept}}
        )

    def after_round(self, server: Server, replies: Sequence[Reply]) -> Mapping[str, float]:
        """Let the sites' models vote, fine-tune the mean on their labels, and measure the Group Effect."""
        settings: FedKASettings = self.settings
        votes_now = settings.voting and server.progress >= settings.vote_start - 1e-9
        measures = settings.group_effect and server.task.test is not None
        metrics: dict[str, float] = {}
        if votes_now or measures:
            inputs = server.inputs()
            chosen = self._voted_on(server, len(Examples(inputs, None)))
            votes, judged = [], []
            for reply in replies:
                if reply.examples <= 0:
                    continue  # it hands back the model that it was sent
                module = server.module(reply.tensors)
                if measures:
                    judged.append(_accuracies(server, module, inputs))
                if votes_now:
                    votes.append(self._probabilities(server, module, inputs, chosen))
            if measures and judged:
                metrics |= group_effect(_accuracies(server, server.module(), inputs), judged)
            if votes_now:
                metrics |= self._learn_from(server, votes, Examples(inputs, None).take(chosen).inputs)
        self._fill_workspace(server)
        return metrics

    def evaluate_server(self, server: Server) -> Mapping[str, float]:
        """Return loss and accuracy on the target's test data of the fine-tuned model, also if sites do not get it."""
        tuned = select(server.kept, FINETUNED)
        if not tuned:
            return evaluate_server(server)
        return evaluate_server(dataclasses.replace(server, shared={**server.shared, **prefixed("model", tuned)}))

    def finish(self, server: Server) -> None:
        """Make the final model the fine-tuned one, with BatchNorm statistics of the target."""
        for name, value in select(server.kept, FINETUNED).items():
            server.shared[f"model/{name}"] = value
            del server.kept[f"{FINETUNED}/{name}"]
        if self.settings.recalibrate:
            module = server.module()
            if has_batch_norm(module):
                recalibrate(module, server.inputs(), forward=_forward(server))
                server.put_module(module)

    def _feature(self, module: nn.Module, head: str | None) -> str:
        """Return the part of a model whose input is the feature; empty if there is none."""
        if self.settings.feature:
            return str(self.settings.feature)
        return "neck" if any(name == "neck" for name, _ in module.named_children()) else head or ""

    def _fill_workspace(self, server: Server) -> None:
        if not self.settings.aligns:
            return
        inputs = server.inputs()
        if self.settings.workspace == "images":
            server.kept.setdefault(TARGET, inputs)
            return
        module = server.module()
        name = self._feature(module, server.task.head)
        with recalibrated(module, inputs, forward=_forward(server)):
            server.kept[BANK] = embed(server.task, module, inputs, name)

    def _voted_on(self, server: Server, count: int) -> Tensor:
        limit = self.settings.vote_samples
        if limit == 0 or limit >= count:
            return torch.arange(count)
        return torch.from_numpy(server.generator("voted on").permutation(count)[:limit])

    def _probabilities(self, server: Server, module: nn.Module, inputs: Any, chosen: Tensor) -> Tensor:
        if self.settings.vote_statistics == "target":
            recalibrate(module, inputs, forward=_forward(server))
        module.eval()
        examples = Examples(inputs, None)
        with torch.no_grad():
            parts = [logits_of(server.task, module, examples.take(part).inputs) for part in torch.split(chosen, 1024)]
        return torch.cat(parts).double().softmax(1)

    def _learn_from(self, server: Server, votes: Sequence[Tensor], inputs: Any) -> dict[str, float]:
        """Fine-tune the shared model on what the voters agree on; return numbers for the record."""
        metrics = {"voters": float(len(votes))}
        if len(votes) < 2:
            return metrics  # one voter agrees with itself
        ballot = count_votes(torch.stack(list(votes)), self.settings.vote_threshold)
        metrics["vote_coverage"] = float(ballot.accepted.double().mean())
        metrics["vote_agreement"] = float(ballot.agreement.mean())
        accepted = torch.nonzero(ballot.accepted).squeeze(1)
        if len(accepted) < 2:
            return metrics
        module = server.module()
        metrics["fine_tuning_loss"] = self._fine_tune(server, module, inputs, ballot, accepted)
        if self.settings.broadcast_finetuned:
            server.put_module(module)
        else:
            floating = {name for name, value in select(server.shared, "model").items() if value.is_floating_point()}
            state = module.state_dict()
            server.kept.update(prefixed(FINETUNED, {name: state[name].detach().clone() for name in sorted(floating)}))
        return metrics

    def _fine_tune(self, server: Server, module: nn.Module, inputs: Any, ballot: Ballot, accepted: Tensor) -> float:
        """Train the module on voted labels with loss α · cross-entropy; return the mean loss without α."""
        settings: FedKASettings = self.settings
        rate = settings.fine_tuning_rate or settings.learning_rate
        optimiser = optimiser_of(module, dataclasses.replace(settings, learning_rate=rate))
        strength = ramp(server.progress, settings.ramp_slope)
        examples = Examples(inputs, ballot.labels).take(accepted)
        generator, total, seen = server.generator("fine-tuning"), 0.0, 0
        with torch_seed(server.seed("fine-tuning")):
            module.train()
            for _ in range(settings.fine_tuning_epochs):
                for index in minibatches(len(examples), settings.batch_size, generator):
                    batch = examples.take(index)
                    loss = loss_of(server.task, logits_of(server.task, module, batch.inputs), batch.labels)
                    optimiser.zero_grad()
                    (strength * loss).backward()  # type: ignore[no-untyped-call]
                    if settings.clip > 0:
                        torch.nn.utils.clip_grad_norm_(module.parameters(), settings.clip)
                    optimiser.step()
                    total, seen = total + float(loss.detach()) * len(index), seen + len(index)
        module.eval()
        return total / max(seen, 1)

    # --- client half

    def train(self, client: Client) -> Update:
        """Return the model trained on the site's labels, and perhaps towards the target's features."""
        module = client.module()
        settings: FedKASettings = self.settings
        if not settings.aligns or len(client.examples) < 2:
            loss, steps = train_locally(client, module)
            update = client.update(module, loss=loss, steps=steps)
            return dataclasses.replace(update, tensors={**_unchanged(client), **update.tensors})
        return _Alignment(self, client, module).run()


def _unchanged(client: Client) -> dict[str, Tensor]:
    """Return the discriminator as it came, for a site that cannot train it."""
    group = prefixed(DISENTANGLER, select(client.received, DISENTANGLER))
    return {name: value for name, value in group.items() if value.is_floating_point()}


class _Alignment:
    """One local update with a discriminator or MK-MMD."""

    def __init__(self, algorithm: FedKA, client: Client, module: nn.Module) -> None:
        client.compute.need_wide_range("fedka with disentangler or discrepancy")
        self.client, self.module, self.settings = client, module, algorithm.settings
        self.name = algorithm._feature(module, client.task.head)
        self.disentangler: Disentangler | None = None
        self.bank, self.target = self._target()
        self.sums = {"loss": 0.0, "domain_loss": 0.0, "domain_accuracy": 0.0, "discrepancy": 0.0}
        trained: nn.Module = module
        if self.settings.disentangler > 0:
            width, _ = linear_sizes(module, self.name)
            self.disentangler = Disentangler(width, self.settings.disentangler_width).to(client.compute.device)
            self.disentangler.load_state_dict(select(client.received, DISENTANGLER))
            trained = torch.nn.ModuleList([module, self.disentangler])
        self.trained = trained
        self.optimiser = optimiser_of(trained, self.settings)
        self.batches = list(batches_of(client))
        self.picks = client.generator("target")

    def _target(self) -> tuple[Tensor, Tensor | None]:
        """Return features of the target by the received model, and the target's inputs if they are here."""
        received = self.client.received
        if BANK in received:
            return received[BANK], None
        inputs = received[TARGET]
        task = self.client.task
        with recalibrated(self.module, inputs, forward=lambda module, batch: logits_of(task, module, batch)) as module:
            return embed(task, module, inputs, self.name), inputs

    def run(self) -> Update:
        """Train, and return the update."""
        settings, client = self.settings, self.client
        self.trained.train()
        separate = settings.discrepancy > 0 and settings.discrepancy_pass == "separate"
        for number, index in enumerate(self.batches):
            self._step(number, index, learns=True, matches=settings.discrepancy > 0 and not separate)
        if separate:
            for number, index in enumerate(batches_of(client, "shuffle for discrepancy")):
                self._step(number, index, learns=False, matches=True)
        self.trained.eval()
        steps = len(self.batches)
        metrics = {name: total / max(1, steps) for name, total in self.sums.items()}
        update = client.update(self.module, **metrics, steps=steps)
        if self.disentangler is None:
            return update
        state = {name: value.detach().clone() for name, value in self.disentangler.state_dict().items()}
        own = {name: value for name, value in prefixed(DISENTANGLER, state).items() if value.is_floating_point()}
        return dataclasses.replace(update, tensors={**own, **update.tensors})

    def _step(self, number: int, index: Any, *, learns: bool, matches: bool) -> None:
        settings, task = self.settings, self.client.task
        # Eq. 4: p counts batches over the whole run.
        each = max(1, len(self.batches))
        progress = (min(number, each - 1) + (self.client.round - 1) * each) / (self.client.rounds * each)
        strength = ramp(progress, settings.ramp_slope)
        batch = self.client.examples.take(index)
        picked = torch.from_numpy(
            self.picks.choice(len(self.bank), size=min(len(index), len(self.bank)), replace=False)
        )
        if learns:
            features, logits = with_features(task, self.module, batch.inputs, self.name)
            loss = loss_of(task, logits, batch.labels)
            self.sums["loss"] += float(loss.detach())
        else:
            features = features_of(task, self.module, batch.inputs, self.name)
            loss = torch.zeros(())
        if learns and self.disentangler is not None:
            target = (
                self.bank[picked]
                if self.target is None
                else features_of(task, self.module, self.target[picked], self.name)
            )
            domain, recognised = domain_loss(self.disentangler, features, target, strength * settings.disentangler)
            loss = loss + domain
            self.sums["domain_loss"] += float(domain.detach())
            self.sums["domain_accuracy"] += float(recognised)
        if matches:
            discrepancy = mk_mmd(features, self.bank[picked])
            loss = loss + strength * settings.discrepancy * discrepancy
            self.sums["discrepancy"] += float(discrepancy.detach())
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if settings.clip > 0:
            torch.nn.utils.clip_grad_norm_(self.trained.parameters(), settings.clip)
        self.optimiser.step()


def group_effect(of_mean: tuple[float, float], of_sites: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return the Group Effect: accuracy of the mean on the target, less the mean accuracy of the sites' models.

    Below zero, aggregation did harm. Read it beside the accuracies themselves: it grows as well when the sites' models
    get worse.

    Args:
        of_mean: Accuracy of the mean of the models, before fine-tuning: with its own BatchNorm statistics, and with
            those of the target.
        of_sites: Likewise of each site's model.
    """
    own, adapted = (math.fsum(pair[i] for pair in of_sites) / len(of_sites) for i in (0, 1))
    return {
        "accuracy_of_mean": of_mean[0],
        "accuracy_of_mean_adapted": of_mean[1],
        "accuracy_of_sites": own,
        "accuracy_of_sites_adapted": adapted,
        "group_effect": of_mean[0] - own,
        "group_effect_adapted": of_mean[1] - adapted,
    }


def _accuracies(server: Server, module: nn.Module, inputs: Any) -> tuple[float, float]:
    """Return the accuracy on the target's test data with own BatchNorm statistics, and with those of `inputs`."""
    examples = test_examples(server.task)
    own = measure(server.task, module, examples)[1]
    if not has_batch_norm(module):
        return own, own
    with recalibrated(module, inputs, forward=_forward(server)):
        return own, measure(server.task, module, examples)[1]


def _forward(server: Server) -> Any:
    return lambda module, batch: logits_of(server.task, module, batch)
