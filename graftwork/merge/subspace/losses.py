"""What is minimised on unlabelled inputs: a function of the merged model's predictions and of the experts'.

To add one, write the function and put it into `LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""`loss(logits, expert)`: both (rows, classes, …), the second log-probabilities; returns the mean over a batch."""


def kl(logits: Tensor, expert: Tensor) -> Tensor:
    """Return how far the predictions are from the expert's: mean KL(p_expert ‖ p), up to a constant.

    It is computed as a cross-entropy, which has the same gradient.
    """
    return -(expert.exp() * logits.log_softmax(1)).sum(1).mean()


def entropy(logits: Tensor, expert: Tensor) -> Tensor:
    """Return the mean entropy of the predictions, as published for AdaMerging and Concrete masks.

    It can be minimised by predicting one class for everything; kept for reproduction.
    """
    log = logits.log_softmax(1)
    return -(log.exp() * log).sum(1).mean()


def im(logits: Tensor, expert: Tensor) -> Tensor:
    """Return mean H(p) - H(mean p): be sure of each input, but not of the same class for all.

    Batches have to hold classes in about equal shares.
    """
    log = logits.log_softmax(1)
    probabilities = log.exp()
    mean = probabilities.transpose(0, 1).flatten(1).mean(1)
    return -(probabilities * log).sum(1).mean() + (mean * (mean + 1e-8).log()).sum()


LOSSES: Mapping[str, Loss] = MappingProxyType({"kl": kl, "im": im, "entropy": entropy})
