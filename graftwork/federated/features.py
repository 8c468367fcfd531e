"""Where the sites' examples lie in a model's feature space: what a run's report shows of alignment.

Of every site and of the target, as many test inputs as `EXAMPLES` are embedded (the input of the task's head) with the
model that the run began with and with the one that it ended with, each with the site's private entries. All embeddings
of a model are drawn on their two directions of largest variance. Beside the picture stands a number: how often the
nearest other example comes from the same site. It is 1 where sites lie apart, and about 1 over the number of sites
where nobody could tell them apart.

This needs the data of all sites, so it is done for runs on one machine only.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftwork.federated.embedding import embed
from graftwork.federated.examples import Examples, collect
from graftwork.federated.seeds import torch_seed
from graftwork.merge.errors import GraftworkError

if TYPE_CHECKING:
    from collections.abc import Callable

    from graftwork.federated.domains import Federation
    from graftwork.merge.task import Task

EXAMPLES = 60
"""Examples of each site that are drawn."""
SITES = 7
"""Sites that are drawn, besides the target: as many as there are colours."""
_LOOKED_AT = 1000


def feature_map(
    federation: Federation,
    start: Mapping[str, Tensor],
    end: Callable[[str], Mapping[str, Tensor]],
    *,
    target: str | None = None,
) -> dict[str, Any] | None:
    """Return points of all sites before and after a run, for JSON; None where there is nothing to compare.

    Args:
        federation: Whose examples; their tasks have to name a head.
        start: The whole model that the run began with, by plain name.
        end: Returns the whole model of a site, or of the target under its name, at the end.
        target: What the server's domain is called; None if it has none.

    Returns:
        `names` of the sites, `is_target` for each, `site` and `label` (−1: unknown) of each point, and for `start` and
        `end` the `points` (x, y), scaled to a largest coordinate of 1, and `told_apart`. `problem` if it failed.
    """
    tasks: dict[str, Task] = dict(itertools.islice(federation.sites.items(), SITES))
    has_target = target is not None and federation.server is not None and federation.server.unlabelled is not None
    if has_target and federation.server is not None and target is not None:
        tasks[target] = federation.server
    if len(tasks) < 2 or any(task.head is None for task in tasks.values()):
        return None
    try:
        examples = {name: _some(task) for name, task in tasks.items()}
        labels = [label for held in examples.values() for label in _labels(held)]
        found: dict[str, Any] = {
            "names": list(tasks),
            "is_target": [has_target and name == target for name in tasks],
            "site": [number for number, held in enumerate(examples.values()) for _ in range(len(held))],
            "label": labels,
        }
        sites = torch.tensor(found["site"])
        for moment in ("start", "end"):
            parts = []
            for name, task in tasks.items():
                with torch_seed(0):
                    module = task.model()
                module.load_state_dict(dict(start if moment == "start" else end(name)))
                assert task.head is not None
                parts.append(embed(task, module, examples[name].inputs, task.head).double())
            embeddings = torch.cat(parts)
            found[moment] = {
                "points": [[round(float(value), 3) for value in row] for row in flattened(embeddings)],
                "told_apart": round(told_apart(embeddings, sites), 4),
            }
    except (GraftworkError, RuntimeError, ValueError, TypeError) as error:
        return {"problem": " ".join(str(error).split())}
    return found


def flattened(points: Tensor) -> Tensor:
    """Return points (n, d) on their two directions of largest variance (n, 2), the largest coordinate being 1."""
    centred = points - points.mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    best = vectors[:, -2:].flip(1) * values[-2:].flip(0).clamp_min(0).sqrt()
    # A direction has no sign of its own: its largest coordinate is made positive.
    largest = best.gather(0, best.abs().argmax(0, keepdim=True))
    best = best * torch.where(largest < 0, -1.0, 1.0)
    scaled: Tensor = best / best.abs().max().clamp_min(1e-12)
    return scaled


def told_apart(points: Tensor, groups: Tensor) -> float:
    """Return how often the nearest other point (n, d) is of the same group (n,), which are all about as large."""
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(torch.inf)
    return float((groups[distances.argmin(1)] == groups).double().mean())


def _some(task: Task) -> Examples:
    """Return a few examples, spread over the first of them: neighbours are often of one class."""
    source = task.test or task.validation or task.batches
    seen = 0

    def first() -> Any:
        nonlocal seen
        for inputs, labels in source():
            yield inputs, labels
            seen += len(labels if labels is not None else inputs)
            if seen >= _LOOKED_AT:
                return

    held = collect(first, "cannot read examples for the picture of features")
    count = min(EXAMPLES, len(held))
    return held.take(torch.arange(count) * len(held) // max(1, count))


def _labels(examples: Examples) -> list[int]:
    labels = examples.labels
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
        return [-1] * len(examples)
    return [int(label) for label in labels]
