"""Matching by gradients: the order of units for which the mean of two models has the least loss.

The straight-through estimator of Ainsworth, Hayase, Srinivasa, "Git Re-Basin", ICLR 2023, section 3.3: weights S are
trained so that the permutation nearest to them, which `match_weights` finds from the one before, makes the mean of A
and the re-ordered B good; gradients pass from the re-ordered B to S as if they were the same.

Where we deviate: it starts from the weight matching of A and B rather than from the identity, a permutation is judged
on the same batches each time rather than on the batch at hand, and the start takes part, so that the result is never
judged worse than weight matching.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from graftwork.merge.alignment.apply import Permutation, permute_tensor
from graftwork.merge.alignment.assignment import Solver
from graftwork.merge.alignment.matching import Matching, MatchingProgress, match_weights, matching_of
from graftwork.merge.alignment.spec import PermutationSpec
from graftwork.merge.checkpoint import quoted
from graftwork.merge.errors import RecipeError, TaskError
from graftwork.merge.evaluation import logits_of, moved, own_random_state
from graftwork.merge.task import Task, fit, raise_user_failure

if TYPE_CHECKING:
    from torch import Tensor, nn

    from graftwork.merge.alignment.activations import Source


def match_straight_through(
    spec: PermutationSpec,
    a: Source,
    b: Source,
    task: Task,
    *,
    steps: int = 60,
    learning_rate: float = 1e-2,
    momentum: float = 0.9,
    judged_batches: int = 8,
    seed: int = 0,
    device: str = "cpu",
    solver: Solver = "auto",
    progress: Callable[[MatchingProgress], None] | None = None,
) -> Matching:
    """Return the order of B's units for which the mean of both models has the least loss on training data.

    Networks run in evaluation mode, but BatchNorm layers normalise with each batch, because the running statistics of
    a mean of two networks belong to nobody.

    Args:
        spec: Of both models; the names of its tensors are those of the task's model.
        a: The model that stays.
        b: The model whose units are re-ordered.
        task: The network, its training data with labels, and its loss.
        steps: Gradient steps, each on one batch; each needs a weight matching from the last order.
        learning_rate: Of gradient descent.
        momentum: Of gradient descent.
        judged_batches: On how many of the first training batches an order is judged.
        seed: Of the weight matchings.
        device: Where the networks run.
        solver: For assignments.
        progress: Called after each step; its `sweep` is the number of the step.

    Returns:
        As from `match_weights`; `sweeps` counts the steps, `solves` the groups solved in all of them.

    Raises:
        TaskError: The task fails, has no labels, or does not fit a checkpoint.
        MismatchError: A checkpoint does not fit the spec.
        DataError: A tensor holds NaN or infinity.
        RecipeError: A number is out of range.
    """
    if steps < 1 or judged_batches < 1:
        raise RecipeError(
            f"cannot match by the straight-through estimator: steps is {steps} and judged_batches {judged_batches}, "
            "not both 1 or more"
        )
    import torch

    began = time.perf_counter()
    start = match_weights(spec, a, b, seed=seed, device=device, solver=solver)
    search = _Search(spec, a, b, task, device)
    best, least = start.permutation, search.judge(start.permutation, judged_batches)
    order, solves = start.permutation, start.solves
    shadow = {name: search.a[name].clone().requires_grad_() for name in search.trained}
    descent = torch.optim.SGD(shadow.values(), lr=learning_rate, momentum=momentum)
    with own_random_state(device):
        torch.manual_seed(seed)
        for step, batch in enumerate(islice(search.endless_batches(), steps), start=1):
            descent.zero_grad(set_to_none=True)
            search.loss(search.midpoint(order, shadow), batch).backward()  # type: ignore[no-untyped-call]
            descent.step()
            held = {**search.a, **{name: values.detach() for name, values in shadow.items()}}
            if not all(bool(torch.isfinite(values).all()) for values in held.values()):
                break  # too large steps: what was found so far counts
            found = match_weights(spec, held, search.b, start=order, seed=seed, device=device, solver=solver)
            solves += found.solves
            if any((found.permutation[name] != order[name]).any() for name in order):
                order = found.permutation
                loss = search.judge(order, judged_batches)
                if loss < least:
                    best, least = order, loss
            if progress is not None:
                progress(MatchingProgress(0, step, solves))
    seconds = {"total": time.perf_counter() - began}
    return matching_of(spec, a, b, best, gains={}, sweeps=steps, solves=solves, seconds=seconds, device=device)


class _Search:
    """Both models' tensors and the network that runs with mixtures of them."""

    def __init__(self, spec: PermutationSpec, a: Source, b: Source, task: Task, device: str) -> None:
        from torch.nn.modules.batchnorm import _BatchNorm

        self.spec = spec
        self.task = task
        self.device = device
        self.doing = f"cannot match by the straight-through estimator on task {quoted(task.name)}"
        with own_random_state(device):
            modules = [fit(task, source).to(device).eval() for source in (a, b)]
        self.module = modules[0]
        for part in self.module.modules():
            if isinstance(part, _BatchNorm):
                part.train()
        self.a, self.b = ({name: values.detach() for name, values in m.state_dict().items()} for m in modules)
        self.trained = [name for name, _ in self.module.named_parameters() if name in spec.tensors]
        self.wrapped = _wrapped(task, self.module)

    def endless_batches(self) -> Iterator[tuple[Any, Any]]:
        while True:
            count = 0
            for count, batch in enumerate(self.task.batches(), start=1):
                yield self.checked(batch, count - 1)
            if not count:
                raise TaskError(f"{self.doing}: there are no batches of training data")

    def checked(self, batch: Any, number: int) -> tuple[Any, Any]:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TaskError(f"{self.doing}: batch {number} is {type(batch).__name__}, not a pair (inputs, labels)")
        if batch[1] is None:
            raise TaskError(f"{self.doing}: batch {number} has no labels; gradients need them")
        return moved(batch[0], self.device), moved(batch[1], self.device)

    def midpoint(self, order: Permutation, shadow: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the mean of A and the re-ordered B, with gradients to `shadow` through B."""
        mixed = {}
        for name, values in self.a.items():
            if not values.dtype.is_floating_point:
                mixed[name] = values.clone()
                continue
            other = permute_tensor(self.spec, order, name, self.b[name])
            if shadow is not None and name in shadow:
                other = other + (shadow[name] - shadow[name].detach())
            mixed[name] = 0.5 * values + 0.5 * other
        return mixed

    def loss(self, tensors: dict[str, Tensor], batch: tuple[Any, Any]) -> Tensor:
        """Return the mean loss of a mixture on one batch."""
        from torch.func import functional_call
        from torch.nn.functional import cross_entropy

        inputs, labels = batch
        try:
            logits = functional_call(
                self.wrapped,
                {f"module.{name}": values for name, values in tensors.items()},
                (inputs,),
                tie_weights=True,
            )
            result: Tensor = (cross_entropy if self.task.loss is None else self.task.loss)(logits, labels)
        except BaseException as error:
            raise_user_failure(error, self.doing)
        return result

    def judge(self, order: Permutation, count: int) -> float:
        """Return the mean loss of the midpoint over the first batches; infinite if it is not a number."""
        import torch

        with torch.no_grad(), own_random_state(self.device):
            torch.manual_seed(0)
            tensors = self.midpoint(order)
            losses = [
                float(self.loss(tensors, self.checked(batch, number)))
                for number, batch in enumerate(islice(self.task.batches(), count))
            ]
        if not losses:
            raise TaskError(f"{self.doing}: there are no batches of training data")
        mean = math.fsum(losses) / len(losses)
        return mean if math.isfinite(mean) else math.inf


def _wrapped(task: Task, module: nn.Module) -> nn.Module:
    """Return a module whose output are the task's logits, with the network under the name `module`."""
    from torch import nn

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, inputs: Any) -> Tensor:
            return logits_of(task, self.module, inputs)

    return Logits()
