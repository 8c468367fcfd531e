"""Concrete masks and learned coefficients: how task vectors are put together is learned on unlabelled inputs.

Task vectors are the replies minus the model that was sent. Tang et al. 2023, arXiv 2312.06173, and AdaMerging, Yang et
al. 2023, arXiv 2310.02575, with the loss that keeps the merged model near each site's (see `graftwork.merge.subspace`).
Two forms:

`where=server`
    The server has unlabelled inputs: it learns mask and coefficients there, with the sites' models as experts.
`where=clients`
    Nobody but the sites has inputs: each learns the logits of the common mask on its own, near the model that it has
    trained; the server takes their mean. Logits go on from round to round while the temperature falls to half of what
    it begins with. For `concrete_task_arithmetic` alone; experimental.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from graftwork.federated.aggregation import engine
from graftwork.federated.aggregation.choice import Aggregation
from graftwork.federated.aggregation.mean import mean, means, read_raw
from graftwork.federated.aggregation.operator import QUESTION, Operator, Round
from graftwork.federated.aggregation.options import Option
from graftwork.federated.algorithms.base import Client, Form, Outgoing, Reply, Server, Update, prefixed, select
from graftwork.federated.errors import FederationError
from graftwork.federated.messages import float_values, raw_of, tensor_of
from graftwork.merge import lineage
from graftwork.merge.checkpoint import Checkpoint, listed, quoted

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.federated.messages import Raw
    from graftwork.federated.runs import Experiment
    from graftwork.merge.subspace.learning import LearnedMerge, Parametrisation

MASK = QUESTION + "mask"
_PARAMETRISATIONS = {
    "concrete_task_arithmetic": "mask",
    "concrete_adamerging": "mask+layer_wise",
    "adamerging": "layer_wise",
}
_SERVER_STEPS, _CLIENT_STEPS = 300, 50
_LARGEST = 50.0
"""Logits beyond this are decided many times over; nobody sends them in good faith."""
_EXPERT, _COMBINED, _LOGIT, _KEPT = "expert", "combined", "logit", "mask"


class ConcreteOperator(Operator):
    """Learns in each round how to put the sites' task vectors together, and merges by what it has learned."""

    options: ClassVar[Mapping[str, Option]] = {
        "where": Option("auto", ("auto", "server", "clients")),
        "steps": Option(None, int, 1),
        "learning_rate": Option(3e-2, float),
        "coefficient_rate": Option(5e-3, float),
        "batch": Option(16, int, 2),
        "loss": Option("kl", ("kl", "im", "entropy")),
        "temperature": Option(0.5, float),
        "coefficient": Option(None, float),
        "examples": Option(None, int, 2),
    }

    def __init__(self, aggregation: Aggregation) -> None:
        super().__init__(aggregation)
        self._learned: LearnedMerge | None = None

    @classmethod
    def problems_of(cls, aggregation: Aggregation) -> list[str]:
        """Return what is wrong with how to learn, and what the engine has against the other parameters."""
        from graftwork.merge.errors import RecipeError
        from graftwork.merge.subspace.learning import Learning

        own, found = aggregation.values(cls.options), []
        try:
            Learning(**{key: own[key] for key in ("learning_rate", "coefficient_rate", "temperature")})
        except (RecipeError, TypeError) as error:
            found = list(error.problems) if isinstance(error, RecipeError) else []  # no numbers: said already
        return [*found, *engine.problems(aggregation.method, aggregation.without(cls.options).parameters)]

    def _is_local(self, server: Server) -> bool:
        """Return whether the sites learn."""
        where = self.aggregation.values(self.options)["where"]
        return bool(where == "clients" or (where == "auto" and not _has_inputs(server)))

    # --- server half

    def check(self, server: Server, experiment: Experiment) -> list[str]:
        """Return why nothing can be learned here."""
        found = super().check(server, experiment)
        method, own = self.aggregation.method, self.aggregation.values(self.options)
        if own["where"] == "server" and not _has_inputs(server):
            found.append("the server has no unlabelled inputs; name a --target, or leave out where=server")
        elif self._is_local(server):
            if method != "concrete_task_arithmetic":
                found.append(
                    "the server has no unlabelled inputs; name a --target, or use concrete_task_arithmetic, whose mask "
                    "the sites can learn"
                )
            elif own["loss"] != "kl":
                found.append(f"loss={own['loss']} would drive the common mask to each site's own classes; use loss=kl")
        apart = [
            name
            for name, value in server.initial.items()
            if value.is_floating_point() and f"model/{name}" not in server.shared
        ]
        if apart and not found:
            found.append(f"it needs the whole model, and {listed(apart, 3)} stay on the sites; use fedavg")
        return found

    def merge(self, round: Round) -> dict[str, Tensor]:
        """Learn, and return the merge that was learned; the mean where there is nothing to learn of."""
        self._learned = None
        assert round.base is not None
        names = [name for name in round.names if not round.averaged(name)]
        merged = means(round.named(), [name for name in round.names if round.averaged(name)], round.weights)
        base = {name.removeprefix("model/"): round.base[name] for name in names}
        replies = [{name.removeprefix("model/"): reply[name] for name in names} for reply in round.replies]
        moved = [number for number, reply in enumerate(replies) if _differs(reply, base)]
        weights = [round.weights[number] for number in moved]
        if len(moved) < 2:
            return merged | means(round.named(), names, round.weights)
        replies = [replies[number] for number in moved]
        sites = [round.sites[number] for number in moved]
        if self._is_local(round.server):
            shared, metadata = self._ask_sites(round.server, sites, replies, weights)
        else:
            shared, metadata = self._learn(round.server, sites, [round.replies[number] for number in moved])
        found = engine.merge(
            self.aggregation.method, self.aggregation.without(self.options).parameters, replies, base, weights,
            shared={"mask": shared}, metadata={"mask": metadata},
        )  # fmt: skip
        return merged | prefixed("model", found)

    def _learn(
        self, server: Server, sites: Sequence[str], replies: Sequence[Mapping[str, Raw]]
    ) -> tuple[dict[str, Raw], dict[str, str]]:
        """Learn on the server's inputs; return the content of the mask file and its metadata."""
        from graftwork.merge.subspace.learning import Learning, learn_merge

        own = self.aggregation.values(self.options)
        base = server.model_state()
        experts = [
            {**base, **{name: tensor_of(reply[f"model/{name}"]) for name in base if f"model/{name}" in reply}}
            for reply in replies
        ]
        count = len(server.inputs())
        coefficient = own["coefficient"]
        settings = Learning(
            parametrisation=cast("Parametrisation", _PARAMETRISATIONS[self.aggregation.method]),
            steps=own["steps"] or _SERVER_STEPS,
            batch=min(own["batch"], count),
            examples=None if own["examples"] is None else min(own["examples"], count),
            # All sites learn the same task, so that their sum would overshoot.
            coefficient=1 / len(replies) if coefficient is None else coefficient,
            seed=server.seed("concrete") % 2**31,
            **{key: own[key] for key in ("learning_rate", "coefficient_rate", "loss", "temperature")},
        )
        tasks = [dataclasses.replace(server.task, name=site) for site in sites]
        self._learned = learn_merge(base, experts, tasks, labels=["the global model", *sites], settings=settings)
        with tempfile.TemporaryDirectory(prefix="graftwork-mask-") as folder:
            path = Path(folder) / "mask.safetensors"
            self._learned.save(path)
            with Checkpoint.open(path) as file:
                content = {name: read_raw(file, name) for name in file.tensors}
                metadata = {
                    key.removeprefix(lineage.PREFIX): value
                    for key, value in file.metadata.items()
                    if key.startswith(lineage.PREFIX)
                }
        return content, metadata

    def _ask_sites(
        self, server: Server, sites: Sequence[str], replies: Sequence[Mapping[str, Raw]], weights: Sequence[float]
    ) -> tuple[dict[str, Raw], dict[str, str]]:
        """Let the sites learn the mask; return what its file would hold, and the metadata."""
        import torch

        own = self.aggregation.values(self.options)
        names = list(replies[0])
        total = sum(weights)
        coefficients = [weight / total if own["coefficient"] is None else own["coefficient"] for weight in weights]
        combined = _combined(replies, select(server.shared, "model"), coefficients)
        zeros = {name: torch.zeros(value.shape, dtype=torch.bfloat16) for name, value in combined.items()}
        logits = {name: value.bfloat16() for name, value in select(server.kept, _KEPT).items() if name in zeros}
        left = (server.rounds - server.round) / (server.rounds - 1) if server.rounds > 1 else 0.0
        temperature = own["temperature"] * 2**left
        answers = server.ask(
            MASK,
            Outgoing(
                {
                    **prefixed("model", select(server.shared, "model")),
                    **prefixed(_COMBINED, combined),
                    **prefixed(_LOGIT, {**zeros, **logits}),
                },
                {"temperature": temperature},
            ),
            expect={f"{_LOGIT}/{name}": Form.of(value) for name, value in zeros.items()},
            sites=sites,
        )
        known = [(reply, reply.examples) for reply in answers if reply.examples > 0]
        if not known:
            raise FederationError("cannot aggregate: no site has inputs from which a mask could be learned")
        held = [reply.tensors for reply, _ in known]
        learned = {
            name: mean((raw_of(each[f"{_LOGIT}/{name}"].float()) for each in held), [weight for _, weight in known])
            for name in names
        }
        server.kept.update(prefixed(_KEPT, learned))
        content = {f"{name}.logit": raw_of(value) for name, value in learned.items()}
        content["lambda"] = ("F32", np.array(coefficients, np.float32).reshape(-1, 1).view(np.float32))
        metadata = {
            "method": self.aggregation.method,
            "layers": json.dumps(names),
            "mask_kind": "expected",
            "temperature": json.dumps(temperature),
            "trimmed": "false",
        }
        return content, metadata

    def problem(self, tensors: Mapping[str, Raw]) -> str | None:
        """Refuse logits that no learning gives."""
        for name, raw in tensors.items():
            if name.startswith(f"{_LOGIT}/"):
                values = float_values(raw)
                if values.size and float(np.abs(values).max()) > _LARGEST:
                    return f"{quoted(name)} has logits beyond {_LARGEST:g}"
        return None

    def keep(self, server: Server, reply: Reply, model: Path) -> None:
        """Write what the server has learned, as `graftwork masks` would have written it."""
        path = model.parent.parent / "mask.safetensors"
        if self._learned is not None and not path.exists():
            self._learned.save(path)

    # --- client half

    def after_training(self, client: Client, update: Update) -> Update:
        """Remember the model that was trained, for the question about the mask."""
        if self.aggregation.values(self.options)["where"] == "server":
            return update
        private = update.private if update.private is not None else client.private
        trained = prefixed(_EXPERT, select(update.tensors, "model"))
        return dataclasses.replace(update, private={**private, **trained})

    def answer(self, client: Client) -> Update:
        """Return logits of the mask under which the merged model stays nearest to the one that was trained here."""
        if client.question != MASK:
            return super().answer(client)
        from graftwork.merge.subspace.learning import learn_merge

        own = self.aggregation.values(self.options)
        received = select(client.received, "model")
        trained = select(client.private, _EXPERT)
        if not trained:
            raise FederationError("the model that was trained in this round is gone, so no mask can be learned of it")
        base = {**client.initial, **received}
        combined, logits = select(client.received, _COMBINED), select(client.received, _LOGIT)
        count = len(client.examples)
        learned: Mapping[str, Any] = {}
        if count >= 1:
            learned = learn_merge(
                base,
                [{**base, **combined}],
                [client.task],
                labels=["the received model", "the combined model"],
                teachers=[{**base, **trained}],
                logits={name: value.float() for name, value in logits.items()},
                parametrisation="mask",
                steps=own["steps"] or _CLIENT_STEPS,
                learning_rate=own["learning_rate"],
                batch=min(own["batch"], count),
                coefficient=1.0,
                temperature=float(client.config["temperature"]),
                seed=client.seed("mask") % 2**31,
            ).logits
        return Update(
            {
                f"{_LOGIT}/{name}": (_tensor(learned[name]) if name in learned else value.float())
                .clamp(-_LARGEST, _LARGEST)
                .to(value.dtype)
                for name, value in logits.items()
            },
            float(count),
        )


def _tensor(array: Any) -> Tensor:
    import torch

    return torch.from_numpy(np.array(array, np.float32))


def _has_inputs(server: Server) -> bool:
    return server.has_data and server.task.unlabelled is not None


def _differs(reply: Mapping[str, Raw], base: Mapping[str, Raw]) -> bool:
    return any(not np.array_equal(raw[1], base[name][1]) for name, raw in reply.items())


def _combined(
    replies: Sequence[Mapping[str, Raw]], base: Mapping[str, Tensor], coefficients: Sequence[float]
) -> dict[str, Tensor]:
    """Return b + Σ λₖ (xₖ − b) in float32."""
    found = {}
    for name in replies[0]:
        start = base[name].double()
        change = sum(
            factor * (tensor_of(reply[name]).double() - start)
            for factor, reply in zip(coefficients, replies, strict=True)
        )
        found[name] = (start + change).float()
    return found
