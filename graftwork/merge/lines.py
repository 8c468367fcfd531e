"""LiNeS: a factor on the merged task vector that grows evenly from the first layer to the last.

    factor = alpha + beta · l/(L - 1)  for layer l of L;  alpha outside the layers;  alpha + beta for an only layer

It multiplies what a method's `lambda` (or `scale`) is, so it goes with every method that has one. `alpha: auto` is

    alpha = (‖Σ dᵢ‖₁ / ‖τ‖₁) / K,  τ the task vector that the method makes of K models

over the whole model, which brings the first layers back to the mean of the task vectors in size: 1/K where τ is the
plain sum, else measured by merging once without writing.

Source: https://arxiv.org/abs/2410.17146, section 4. There layers are found by a number within the name; here they are
those of the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from graftwork.merge import dtypes
from graftwork.merge.methods.registry import Method, get

if TYPE_CHECKING:
    from graftwork.merge.engine import Sink, Step
    from graftwork.merge.plan import Plan


class Runs(Protocol):
    """What carries out steps."""

    def run(self, steps: list[Step]) -> None:
        """Make the tensors of all steps."""


def scaling(method: Method) -> str | None:
    """Return the parameter that is a factor on the method's merged task vector, or None if it has none."""
    if method.base != "required":
        return None
    return next((name for name in ("lambda", "scale") if name in method.parameters), None)


def needs_measuring(plan: Plan) -> bool:
    """Return whether a plan's alpha is only known once the merged task vector has been measured."""
    return plan.recipe.lines is not None and plan.alpha is None


def apply(plan: Plan, alpha: float | None = None) -> None:
    """Put the factors of a recipe into its plan, unless alpha is not known yet.

    Args:
        plan: The plan, which is changed.
        alpha: What was measured.
    """
    settings = plan.recipe.lines
    if settings is not None and alpha is None and not any(plan.positions.values()):
        plan.warnings.append(
            "lines: no layers are numbered 0, 1, 2 … in the tensors' names, so alpha is the factor of all and beta has "
            "no effect; give `lambda` or `scale` by filters instead"
        )
    alpha = _alpha(plan) if alpha is None else alpha
    if settings is None or alpha is None:
        return
    name = scaling(plan.method)
    assert name is not None
    plan.alpha = alpha
    keyword = plan.method.parameters[name].keyword
    beta = settings["beta"]
    beta = 1.0 - alpha if beta is None else beta
    for step in _merged(plan):
        bound = step.program
        assert isinstance(bound, partial)
        factor = alpha + beta * plan.positions[step.name]
        step.program = partial(bound.func, **{**bound.keywords, keyword: bound.keywords[keyword] * factor})


def _alpha(plan: Plan) -> float | None:
    """Return alpha as far as it can be known without reading a tensor."""
    if plan.recipe.lines is None:
        return None
    given = plan.recipe.lines["alpha"]
    if given is not None:
        return given
    bindings = [step.program.keywords for step in _merged(plan) if isinstance(step.program, partial)]
    plain = {"normalize": False, "lambda_": 1.0}
    if plan.method.name == "task_arithmetic" and all(
        all(found[key] == value for key, value in plain.items()) and set(found["weight"]) == {1.0} for found in bindings
    ):
        return 1.0 / _models(plan)
    return None


def measure(plan: Plan, engine: Callable[[Sink], Runs]) -> float:
    """Return alpha for a plan whose factors are not in it yet: the inputs are read as often as two merges do."""
    summed = partial(get("task_arithmetic").program, lambda_=1.0, normalize=False)
    total = _norm(
        plan, engine, lambda step: {"program": partial(summed, weight=(1.0,) * len(step.models)), "group": ""}
    )
    merged = _norm(plan, engine, lambda step: {})
    return (total / merged if merged > 0 else 1.0) / _models(plan)


def _norm(plan: Plan, engine: Callable[[Sink], Runs], changed: Callable[[Step], Mapping[str, Any]]) -> float:
    """Return the L1 norm of what steps add to the base."""
    steps = [replace(step, dtype="F64", notes=[], **changed(step)) for step in _merged(plan)]
    sink = _Norm(plan, steps)
    engine(sink).run(steps)
    return math.fsum(sink.sums.values())


def _merged(plan: Plan) -> list[Step]:
    return [step for step in plan.merged if step.base is not None]


def _models(plan: Plan) -> int:
    return max((len(step.models) for step in _merged(plan)), default=1)


class _Norm:
    """Takes float64 results and keeps the sums of their absolute differences from the base."""

    def __init__(self, plan: Plan, steps: list[Step]) -> None:
        self.readers = plan.checkpoints
        self.bases = {step.name: step.base for step in steps}
        self.sums: dict[tuple[str, int], float] = {}

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Add up what differs from the base in elements from byte `offset` on."""
        from graftwork.merge import kernels

        values = np.frombuffer(data, np.float64)
        base = self.bases[name]
        assert base is not None
        words = np.empty(values.size, dtypes.RAW[base.entry.dtype])
        self.readers[base.model].read_into(base.entry, offset // 8 * words.itemsize, words.view(np.uint8).data)
        decoded = np.empty(values.size)
        kernels.decode(words, decoded)
        self.sums[name, offset] = float(np.abs(values - decoded).sum())

    def read_back(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`: what was written is gone, and nobody looks at its digest."""
        buffer[:] = bytes(len(buffer))

    def finish(self, name: str, digest: bytes, inputs: Mapping[tuple[int, str], bytes]) -> None:
        """Nothing remains to be done."""
