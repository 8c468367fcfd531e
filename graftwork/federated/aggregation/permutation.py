"""Permutation matching: before replies are merged, each one's units are brought into the order of a reference.

Networks that were trained from different starts, or that have drifted apart, may have learned the same units in another
order; their mean is then worse than any of them. Ainsworth, Hayase, Srinivasa, "Git Re-Basin", ICLR 2023.

Which units may be re-ordered is read off the task's module by tracing it (only the shapes of its inputs are used), or
comes from a file. Once re-ordered, replies are merged by any other method (`then`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from graftwork.federated.aggregation.choice import Aggregation
from graftwork.federated.aggregation.operator import Operator, Round, operator_of
from graftwork.federated.aggregation.options import Option
from graftwork.federated.algorithms.base import Client, Form, Reply, Server, Update, select
from graftwork.federated.errors import FederationError
from graftwork.federated.messages import tensor_of
from graftwork.federated.seeds import torch_seed
from graftwork.merge.checkpoint import listed, quoted
from graftwork.merge.errors import GraftworkError

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.federated.messages import Raw
    from graftwork.federated.runs import Experiment
    from graftwork.merge.alignment.apply import Permutation
    from graftwork.merge.alignment.spec import PermutationSpec

_INNER = ("regmean", "permutation", "concrete", "concrete_task_arithmetic", "concrete_adamerging", "adamerging")
"""Methods whose own tensors do not follow a re-ordering of the model's units entry by entry."""
_LEFT = "which would not follow the new order of units; use fedavg, fedprox or --one-shot"
_ROWS = 4


class PermutationOperator(Operator):
    """Matches every reply's units to those of a reference, and merges what comes of it.

    The reference is the first of the sites that answered (`to=first`), the model that they were sent (`to=base`), or an
    order that is found for all replies together (`to=universe`).
    """

    options: ClassVar[Mapping[str, Option]] = {
        "to": Option("first", ("first", "base", "universe")),
        "then": Option("mean", str),
        "spec": Option(None, str),
    }
    passes = 8

    def __init__(self, aggregation: Aggregation) -> None:
        super().__init__(aggregation)
        own = aggregation.values(self.options)
        self.inner = operator_of(Aggregation(own["then"], aggregation.without(self.options).parameters))
        self.groups = self.inner.groups
        self._spec: PermutationSpec | None = None
        self._ratio: float | None = None

    @classmethod
    def problems_of(cls, aggregation: Aggregation) -> list[str]:
        """Return what is wrong with the method that follows; whatever is no option is a parameter of it."""
        then = aggregation.values(cls.options)["then"]
        if then in _INNER:
            return [f"{quoted(then)} cannot come after a re-ordering; use another method"]
        try:
            Aggregation(then, aggregation.without(cls.options).parameters).check()
        except FederationError as error:
            return [f"then={then}: {problem.partition(': ')[2] or problem}" for problem in error.problems]
        return []

    @property
    def needs_common_start(self) -> bool:
        """Whether the reference, or the method that follows, looks at what the sites were sent."""
        return self.aggregation.values(self.options)["to"] == "base" or self.inner.needs_common_start

    # --- server half

    def check(self, server: Server, experiment: Experiment) -> list[str]:
        """Return why units cannot be matched here."""
        found = super().check(server, experiment)
        algorithm = server.algorithm
        other = sorted({name.partition("/")[0] for name in server.shared} - {"model"})
        if algorithm.has_private_state or other:
            kept = (
                "keeps private tensors" if algorithm.has_private_state else f"sends {listed(other)} besides the model"
            )
            found.append(
                f"{algorithm.name} {kept}, which would not follow the new order of units; use fedavg, fedprox or "
                "--one-shot"
            )
        if found:
            return found
        try:
            spec = self.spec(server)
        except GraftworkError as error:
            if self.aggregation.values(self.options)["spec"] is not None:
                return list(error.problems[:1])
            return [
                f"it is not known which units may be re-ordered ({problem}); name a file with --spec"
                for problem in error.problems[:1]
            ]
        if not spec.free_groups:
            return ["the model has no units that may be re-ordered; use another method"]
        fixed = [
            name
            for name, tensor in spec.tensors.items()
            if set(tensor.groups) & set(spec.free_groups) and f"model/{name}" not in server.shared
        ]
        if fixed:
            return [f"{listed(fixed, 3)} would have to be re-ordered, but do not travel; leave out --exchange"]
        return []

    def spec(self, server: Server) -> PermutationSpec:
        """Return which units may be re-ordered: from the file, or by tracing the task's module."""
        if self._spec is None:
            self._spec = _spec_of(server, self.aggregation.values(self.options)["spec"])
        return self._spec

    def expected(self, server: Server, sent: Mapping[str, Tensor]) -> dict[str, Form]:
        """Return what the inner method needs."""
        other = sorted({name.partition("/")[0] for name in server.shared} - {"model"})
        if other:
            raise FederationError(
                f'cannot aggregate by "permutation": {server.algorithm.name} sends {listed(other)} besides the model, '
                f"{_LEFT}"
            )
        return self.inner.expected(server, sent)

    def problem(self, tensors: Mapping[str, Raw]) -> str | None:
        """Return what the inner method finds wrong."""
        return self.inner.problem(tensors)

    def merge(self, round: Round) -> dict[str, Tensor]:
        """Return what the inner method makes of re-ordered replies."""
        spec = self.spec(round.server)
        orders = self._orders(spec, round)
        replies = [_reordered(spec, order, reply) for order, reply in zip(orders, round.replies, strict=True)]
        return self.inner.merge(dataclasses.replace(round, replies=replies))

    def _orders(self, spec: PermutationSpec, round: Round) -> Sequence[Permutation]:
        from graftwork.merge.alignment.apply import identity
        from graftwork.merge.alignment.many import match_universe
        from graftwork.merge.alignment.matching import match_weights

        names = [name for name in spec.tensors if f"model/{name}" in round.replies[0]]
        models = [{name: tensor_of(reply[f"model/{name}"]) for name in names} for reply in round.replies]
        frozen = select(round.server.shared, "model")
        for model in models:  # what the spec has and nobody sends, integers and the like
            model |= {name: frozen[name] for name in spec.tensors if name not in model and name in frozen}
        to = self.aggregation.values(self.options)["to"]
        if len(models) > 1 and to == "universe":
            found = match_universe(spec, models)
            self._ratio = found.spread_after / found.spread_before if found.spread_before else 1.0
            return found.permutations
        if to == "base":
            reference, rest, orders = {name: frozen[name] for name in models[0]}, models, []
        else:
            reference, rest, orders = models[0], models[1:], [identity(spec)]
        matched = [match_weights(spec, reference, model) for model in rest]
        ratios = [each.distance_ratio for each in matched]
        self._ratio = sum(ratios) / len(ratios) if ratios else None
        return [*orders, *(each.permutation for each in matched)]

    def after_aggregate(self, server: Server, replies: Sequence[Reply]) -> dict[str, float]:
        """Return how much nearer the replies have come, by re-ordering, to the reference."""
        found = {} if self._ratio is None else {"distance_ratio": self._ratio}
        return {**found, **super().after_aggregate(server, replies)}

    def keep(self, server: Server, reply: Reply, model: Path) -> None:
        """Write what the inner method needs."""
        self.inner.keep(server, reply, model)

    # --- client half

    def after_training(self, client: Client, update: Update) -> Update:
        """Return the update with what the inner method needs."""
        return self.inner.after_training(client, update)


def _reordered(spec: PermutationSpec, order: Permutation, reply: Mapping[str, Raw]) -> dict[str, Raw]:
    """Return a reply in another order of units; the tensors of all its groups have the model's shapes."""
    from graftwork.merge.alignment.apply import permute_tensor

    return {
        name: (code, permute_tensor(spec, order, name.partition("/")[2], words))
        for name, (code, words) in reply.items()
    }


def _spec_of(server: Server, file: str | None) -> PermutationSpec:
    from graftwork.merge.alignment.derive import derive_spec
    from graftwork.merge.alignment.families import family_spec
    from graftwork.merge.alignment.spec import PermutationSpec
    from graftwork.merge.errors import CheckpointError, MismatchError, TaskError

    state = server.model_state()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    if file is not None:
        path = Path(file)
        try:
            text = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {quoted(path)}: {error.strerror or error}") from None
        return PermutationSpec.from_json(text, shapes=shapes, what=quoted(path)).verified(shapes, what="the model")
    try:
        spec = derive_spec(server.module(), _example(server), names=shapes, what="the task's model")
    except (TaskError, MismatchError) as problem:
        try:
            return family_spec(shapes, what="the task's model")
        except MismatchError:
            raise problem from None
    return spec.verified(shapes, what="the model")


def _example(server: Server) -> Any:
    """Return made-up inputs of the form of the task's own."""
    import torch

    from graftwork.merge.errors import TaskError

    task = server.task
    for batches in filter(None, (task.unlabelled, task.test, task.validation, task.batches)):
        for batch in batches():
            inputs = batch[0] if isinstance(batch, tuple | list) and len(batch) == 2 else batch
            parts = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
            if not all(isinstance(part, torch.Tensor) and part.ndim and len(part) for part in parts):
                continue
            with torch_seed(0):
                made = [_like(part[:_ROWS]) for part in parts]
            return dict(zip(inputs, made, strict=True)) if isinstance(inputs, Mapping) else made[0]
    raise TaskError(f"task {quoted(task.name)} has no inputs that are tensors")


def _like(values: Tensor) -> Tensor:
    import torch

    return torch.randn(values.shape).to(values.dtype) if values.is_floating_point() else torch.zeros_like(values)
