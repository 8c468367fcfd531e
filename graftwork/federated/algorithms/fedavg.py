"""FedAvg: local training, then the mean of the models.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas, AISTATS 2017, arXiv 1602.05629, algorithm 1.
"""

from __future__ import annotations

from graftwork.federated.algorithms.base import Algorithm, Client, Update
from graftwork.federated.training import train_locally


class FedAvg(Algorithm):
    """Each client trains the model it was sent; the server takes the mean, weighted by the number of examples.

    There is no private state. Running statistics of batch normalisation are averaged like weights; integer buffers are
    sent, but never averaged.
    """

    name = "fedavg"
    title = "FedAvg"
    reference = "https://arxiv.org/abs/1602.05629"

    def train(self, client: Client) -> Update:
        """Return the locally trained model."""
        module = client.module()
        loss, steps = train_locally(client, module)
        return client.update(module, loss=loss, steps=steps)
