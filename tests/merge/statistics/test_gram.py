"""Gram matrices of layers' inputs: plain sums over rows, padding, groups under a memory budget, interruptions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from graftwork.merge.artifact import load_artifact
from graftwork.merge.checkpoint import Checkpoint
from graftwork.merge.errors import TaskError
from graftwork.merge.statistics import gram as gram_module
from graftwork.merge.statistics import measure_to_file
from graftwork.merge.statistics.gram import estimate_grams, measure_gram
from graftwork.merge.task import Task


class Conv1D(nn.Module):
    """As in transformers: a linear layer whose weight is (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.groups = nn.Conv2d(4, 6, 2, groups=2, bias=False)
        self.middle, self.head = Conv1D(5, 6), nn.Linear(5, 3)
        self.idle = nn.Linear(2, 2)

    def forward(self, x):
        x = functional.gelu(self.groups(functional.gelu(self.first(x)))).mean((2, 3))
        return self.head(functional.gelu(self.middle(x)))


IMAGES = torch.arange(40 * 72.0).reshape(40, 2, 6, 6).sin()


def images(module=None, **more):
    return Task("images", model=Network if module is None else lambda: module, batches=lambda: [(IMAGES, None)], **more)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Network()


def test_matrices_are_means_over_rows_of_what_enters_a_layer(module):
    found = estimate_grams(images(module), module)
    with torch.no_grad():
        middle = functional.gelu(module.groups(functional.gelu(module.first(IMAGES)))).mean((2, 3)).double()
        rows = torch.cat([middle, torch.ones(40, 1)], 1)
    assert np.allclose(found.tensors["middle.weight"], (rows.T @ rows / 40).numpy(), rtol=1e-5)
    assert found.layers["middle.weight"] == {
        "rows": 40, "columns": 7, "bias": True, "groups": 1, "transposed": True,
    }  # fmt: skip
    assert found.layers["first.weight"]["rows"] == 40 * 9
    assert found.skipped == {"idle.weight": "not called"}
    assert np.array_equal(found.tensors["first.weight"], found.tensors["first.weight"].T)


def test_convolutions_are_linear_layers_on_patches(module):
    found = estimate_grams(images(module), module)
    for name in ("first", "groups"):
        layer = getattr(module, name)
        x = IMAGES if name == "first" else functional.gelu(module.first(IMAGES))
        # What the layer gives for all of its inputs has a mean square that the matrix knows.
        with torch.no_grad():
            wanted = layer(x).double().square().mean((0, 2, 3))
            weight = layer.weight.double().flatten(1)
            if layer.bias is not None:
                weight = torch.cat([weight, layer.bias.double()[:, None]], 1)
        gram = torch.from_numpy(found.tensors[f"{name}.weight"])
        gram = gram if gram.ndim == 3 else gram[None]
        parts = weight.reshape(len(gram), -1, weight.shape[1])
        assert torch.allclose(torch.einsum("gor,grs,gos->go", parts, gram, parts).flatten(), wanted, rtol=1e-5)


def test_padding_is_left_out():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

        def forward(self, batch):
            return self.head(self.embedding(batch["tokens"])).transpose(1, 2)

    torch.manual_seed(0)
    module, tokens, mask = Tokens(), torch.randint(0, 7, (4, 5)), torch.ones(4, 5)
    mask[1, 2:] = 0
    inputs = {"tokens": tokens, "attention_mask": mask}
    task = Task("tokens", model=lambda: module, batches=lambda: [(inputs, None)])
    found = estimate_grams(task, module)
    rows = torch.cat([module.embedding(tokens)[mask.bool()], torch.ones(17, 1)], 1).detach().double()
    assert found.layers["head.weight"]["rows"] == 17
    assert np.allclose(found.tensors["head.weight"], (rows.T @ rows / 17).numpy(), rtol=1e-5)


def test_a_head_that_is_the_embedding_is_left_out():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.embedding(tokens).mean(1))

    task = Task("tied", model=Tied, batches=lambda: [(torch.zeros(3, 2, dtype=torch.long), None)])
    found = estimate_grams(task)
    assert found.tensors == {}
    assert found.skipped == {"head.weight": "tied"}


def test_batches_and_groups_of_layers_change_rounding_only(module):
    whole = estimate_grams(images(module), module)
    parts = estimate_grams(images(module), module, micro_batch=7, memory_bytes=1)
    assert whole.layers == parts.layers
    for name, values in whole.tensors.items():
        assert np.allclose(values, parts.tensors[name], rtol=0, atol=1e-6 * np.abs(values).max())


def test_inputs_that_are_not_finite_are_refused(module):
    with torch.no_grad():
        module.first.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(TaskError, match=r'what enters "groups.weight" is not finite in batch 0'):
        estimate_grams(images(module), module)


@pytest.mark.parametrize("memory", [1 << 30, 1])
@pytest.mark.parametrize("stop_at", [0, 3])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(module, tmp_path, monkeypatch, memory, stop_at):
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    settings = {"micro_batch": 8, "memory_bytes": memory, "state_seconds": 0.0}
    calls = []

    def failing(task_module, inputs):
        calls.append(1)
        # With one layer per pass, as in the second of its passes.
        if len(calls) == stop_at + 1 + (5 if memory == 1 else 0):
            raise SystemExit
        return task_module(inputs)

    with Checkpoint.open(tmp_path / "model.safetensors") as source:
        measure_gram(source, images(), tmp_path / "whole.safetensors", **settings)
        monkeypatch.setattr("graftwork.merge.statistics.gram.raise_user_failure", lambda error, doing: _raise(error))
        with pytest.raises(SystemExit):
            measure_gram(source, images(logits=failing), tmp_path / "part.safetensors", **settings)
        assert not (tmp_path / "part.safetensors").exists()
        calls[:] = [0] * 100
        measured = measure_to_file("gram", source, images(logits=failing), tmp_path / "part.safetensors", **settings)
    passes = 5 if memory == 1 else 1  # one for the layer that is never called
    assert len(calls) - 100 == 5 * passes - stop_at - (5 if memory == 1 else 0)
    assert (tmp_path / "part.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.safetensors", "part.safetensors", "whole.safetensors",
    ]  # fmt: skip
    found = load_artifact(tmp_path / "part.safetensors", kind="gram")
    assert found.digest == measured.digest
    assert set(found.tensors) == {"first.weight", "groups.weight", "middle.weight", "head.weight"}
    assert found.tensors["groups.weight"].shape == (2, 8, 8)
    assert found.parents[0]["name"] == "model.safetensors"


def _raise(error):
    raise error


def test_only_known_kinds_can_be_measured(tmp_path):
    with pytest.raises(TaskError, match='cannot measure "hessian"'):
        measure_to_file("hessian", None, images(), tmp_path / "x.safetensors")


def test_layers_are_grouped_by_what_their_sums_take(module):
    layers, _ = gram_module.layers_of(module)
    sizes = [layer.bytes for layer in layers]
    assert [len(group) for group in gram_module.grouped(layers, sum(sizes))] == [len(layers)]
    for group in gram_module.grouped(layers, max(sizes)):
        assert len(group) == 1 or sum(layer.bytes for layer in group) <= max(sizes)
