"""Merge methods as aggregation operators.

Replies are merged in the order of the sites' names, so neither the order in which they came nor threads change the
result. Besides the `mean` there is any method of the engine of `graftwork.merge`, and there are three that stock
federations use against faulty clients: `median`, `trimmed_mean`, `krum`.

Only what is a weight goes through a method other than the mean: running statistics of batch normalisation (a variance
must not become negative) and groups besides `model/` are always averaged.
"""

from graftwork.federated.aggregation.choice import OWN_METHODS, Aggregation
from graftwork.federated.aggregation.robust import krum_order

__all__ = ["OWN_METHODS", "Aggregation", "krum_order"]
