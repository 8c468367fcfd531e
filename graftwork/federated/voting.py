"""Labels for inputs without labels, by a vote among the sites' models (FedKA's federated voting)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Ballot:
    """The outcome of a vote on n inputs.

    Args:
        labels: The class with the most votes, int64 (n,).
        agreement: Which fraction of the voters chose it, float64 (n,).
        accepted: Whether enough of them did, bool (n,).
    """

    labels: Tensor
    agreement: Tensor
    accepted: Tensor


def count_votes(probabilities: Tensor, threshold: float = 0.0) -> Ballot:
    """Return for each input the class that most voters find most probable (arXiv 2203.11635, section on voting).

    Of classes with equally many votes, that with the larger mean probability over all voters wins, then the smaller
    class index; the published code leaves ties to the addresses of objects in memory. Each voter's own ties go to the
    smaller index as well.

    Args:
        probabilities: Shape (voters, n, classes), voters in an order that does not depend on who answered first.
        threshold: The fraction of the voters present that must agree for an input to be accepted; 0 accepts all.
    """
    voters, _, classes = probabilities.shape
    counts = functional.one_hot(probabilities.argmax(2), classes).sum(0)
    most = counts.max(1, keepdim=True).values
    # In double precision the mean over a few voters does not lose a difference that the voters' own numbers have.
    mean = probabilities.double().mean(0).masked_fill(counts < most, -1.0)
    labels = mean.argmax(1)
    enough = math.ceil(threshold * voters - 1e-9)
    return Ballot(labels, most.squeeze(1).double() / voters, most.squeeze(1) >= enough)
