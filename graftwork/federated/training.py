"""Local training and evaluation: what most algorithms share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from graftwork.federated.algorithms.base import Client, Server, Settings, Update
from graftwork.federated.compute import device_of
from graftwork.federated.examples import Examples, collect, endless_minibatches, minibatches
from graftwork.federated.normalisation import has_batch_norm, recalibrated
from graftwork.merge.evaluation import chosen_split, logits_of
from graftwork.merge.task import Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    Penalty = Callable[[nn.Module], Tensor]
    """What is added to the loss of each step."""
    Correct = Callable[[nn.Module], None]
    """Changes gradients before each step."""


def optimiser_of(module: nn.Module, settings: Settings) -> Any:
    """Return a fresh optimiser of the module's trainable parameters."""
    import torch

    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if settings.optimiser == "adam":
        return torch.optim.Adam(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, foreach=True)
    return torch.optim.SGD(
        parameters,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        foreach=True,
    )


def loss_of(task: Task, logits: Tensor, labels: Any) -> Tensor:
    """Return the task's mean loss over a batch; by default cross-entropy."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, labels) if task.loss is None else task.loss(logits, labels)


def batches_of(client: Client, purpose: str = "shuffle") -> Iterator[Any]:
    """Yield index arrays for one round's steps, as the settings say: epochs, or a number of steps."""
    settings, count = client.settings, len(client.examples)
    generator = client.generator(purpose)
    if settings.local_steps > 0:
        endless = endless_minibatches(count, settings.batch_size, generator)
        for _ in range(settings.local_steps):
            yield next(endless)
        return
    for _ in range(settings.local_epochs):
        yield from minibatches(count, settings.batch_size, generator)


def train_locally(
    client: Client,
    module: nn.Module,
    *,
    penalty: Penalty | None = None,
    correct: Correct | None = None,
    optimiser: Any = None,
) -> tuple[float, int]:
    """Train the module on the site's examples; return the mean loss (without the penalty) and the number of steps.

    Args:
        client: Whose examples, settings and seeds.
        module: Changed in place; ends in evaluation mode.
        penalty: Added to the loss of each step.
        correct: Called between the gradients and the step.
        optimiser: By default a fresh one, as the settings say.
    """
    import torch

    settings, examples, task = client.settings, client.examples, client.task
    module.train()
    if len(examples) == 0:
        module.eval()
        return 0.0, 0
    optimiser = optimiser if optimiser is not None else optimiser_of(module, settings)
    scaler = client.compute.scaler()
    total, seen, steps = 0.0, 0, 0
    for index in batches_of(client):
        batch = examples.take(index)
        loss = loss_of(task, logits_of(task, module, batch.inputs), batch.labels)
        total, seen, steps = total + float(loss.detach()) * len(index), seen + len(index), steps + 1
        if penalty is not None:
            loss = loss + penalty(module)
        optimiser.zero_grad()
        (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
        if scaler is not None:
            scaler.unscale_(optimiser)
        if settings.clip > 0:
            torch.nn.utils.clip_grad_norm_(module.parameters(), settings.clip)
        if correct is not None:
            correct(module)
        if scaler is None:
            optimiser.step()
        else:
            scaler.step(optimiser)
            scaler.update()
    module.eval()
    return total / max(1, seen), steps


def measure(task: Task, module: nn.Module, examples: Examples, *, batch_size: int = 1024) -> tuple[float, float]:
    """Return mean loss and accuracy of a module on labelled examples, in evaluation mode.

    Accuracy is NaN where labels are not classes.
    """
    import torch

    module.eval()
    examples = examples.on(device_of(module))
    loss, right, judged, count = 0.0, 0, 0, len(examples)
    with torch.no_grad():
        for start in range(0, count, batch_size):
            batch = examples.take(slice(start, start + batch_size))
            logits = logits_of(task, module, batch.inputs)
            labels = batch.labels
            assert labels is not None
            loss += float(loss_of(task, logits.double() if task.loss is None else logits, labels)) * len(batch)
            if not labels.is_floating_point() and logits.ndim == labels.ndim + 1:
                right += int((logits.argmax(1) == labels).sum())
                judged += labels.numel()
    return loss / max(1, count), right / judged if judged else float("nan")


_TEST_EXAMPLES: dict[int, tuple[Task, Examples]] = {}


def test_examples(task: Task) -> Examples:
    """Return a task's test examples (validation or training where it has none), collected once per process."""
    key = id(task)
    if key not in _TEST_EXAMPLES:
        if len(_TEST_EXAMPLES) >= 64:
            _TEST_EXAMPLES.pop(next(iter(_TEST_EXAMPLES)))
        _, batches = chosen_split(task)
        _TEST_EXAMPLES[key] = (task, collect(batches, f"cannot read the test data of {task.name}"))
    return _TEST_EXAMPLES[key][1]


def evaluate_client(client: Client, module: nn.Module) -> Update:
    """Return loss and accuracy of a module on the site's test data."""
    examples = test_examples(client.task)
    if len(examples) == 0:
        return Update({}, 0.0)
    loss, accuracy = measure(client.task, module, examples)
    return Update({}, float(len(examples)), {"loss": loss, "accuracy": accuracy})


def evaluate_server(server: Server) -> dict[str, float]:
    """Return loss and accuracy of the global model on the server's test data, as they are and with AdaBN."""
    if not server.has_data or server.task.test is None:
        return {}
    examples = test_examples(server.task)
    module = server.module()
    loss, accuracy = measure(server.task, module, examples)
    found = {"loss": loss, "accuracy": accuracy}
    if server.task.unlabelled is not None and has_batch_norm(module):
        with recalibrated(module, server.inputs()):
            found["loss_adapted"], found["accuracy_adapted"] = measure(server.task, module, examples)
    return found
