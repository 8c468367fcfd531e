"""Fisher information: closed forms, plain autograd, and what must not change it."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from graftwork.merge.artifact import load_artifact, save_artifact
from graftwork.merge.checkpoint import Checkpoint
from graftwork.merge.errors import DataError, GraftworkError, MismatchError, OutputError, TaskError
from graftwork.merge.statistics import fisher as fisher_module
from graftwork.merge.statistics.factors import cholesky_column, columns
from graftwork.merge.statistics.fisher import estimate_fisher, load_fisher, measure_fisher
from graftwork.merge.statistics.totals import Total
from graftwork.merge.task import Task


def task_of(module, inputs, labels=None, *, name="task", batch=16, **more):
    """Return a task whose model is this very module."""

    def batches():
        size = len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)
        for start in range(0, size, batch):
            part = slice(start, start + batch)
            cut = {key: value[part] for key, value in inputs.items()} if isinstance(inputs, dict) else inputs[part]
            yield cut, None if labels is None else labels[part]

    return Task(name, model=lambda: module, batches=batches, **more)


def by_autograd(module, inputs):
    """Return the Fisher diagonal by its definition: one backward pass per example, row and class."""
    module = module.eval()
    found = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in module.named_parameters()}
    for place in range(len(inputs)):
        logits = module(inputs[place : place + 1])
        for row in logits.movedim(1, -1).reshape(-1, logits.shape[1]):
            log = row.log_softmax(-1)
            for label in range(len(row)):
                gradient = torch.autograd.grad(
                    log[label], list(module.parameters()), retain_graph=True, allow_unused=True
                )
                for name, value in zip(found, gradient, strict=True):
                    if value is not None:
                        found[name] += float(log[label].detach().exp()) * value.double().square()
    return {name: value / len(inputs) for name, value in found.items()}


def assert_close(found, wanted, relative):
    assert set(found) == set(wanted)
    for name in wanted:
        scale = float(wanted[name].abs().max())
        error = float((found[name].double() - wanted[name].double()).abs().max())
        assert error <= relative * scale + 1e-300, f"{name}: {error} of {scale}"


# --- closed forms -----------------------------------------------------------------------------------------------------


def test_logistic_regression_has_the_closed_form():
    torch.manual_seed(0)
    module, x = nn.Linear(3, 4).double(), torch.randn(20, 3).double()
    found = estimate_fisher(task_of(module, x), module, estimator="exact").tensors
    with torch.no_grad():
        p = module(x).softmax(-1)
    wanted = torch.einsum("nc,nj->cj", p * (1 - p), x.square()) / len(x)
    assert torch.allclose(found["weight"], wanted, rtol=1e-10, atol=0)
    assert torch.allclose(found["bias"], (p * (1 - p)).mean(0), rtol=1e-10, atol=0)


def test_an_undecided_model_has_the_largest_information():
    module = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(module.weight)
    x = torch.tensor([[1.0, 2.0, 3.0]])
    exact = torch.tensor([[0.25, 1.0, 2.25]] * 2).double()
    found = estimate_fisher(task_of(module, x), module, estimator="exact").tensors["weight"]
    assert torch.allclose(found, exact)
    for estimator in ("signed", "signed_batch"):
        # Equal signs cancel, different ones give twice the value: the mean over seeds is what counts.
        draws = [
            estimate_fisher(task_of(module, x), module, estimator=estimator, seed=seed).tensors["weight"]
            for seed in range(60)
        ]
        assert {round(float(draw[0, 0]), 6) for draw in draws} == {0.0, 0.5}
        assert torch.allclose(torch.stack(draws).mean(0), exact, rtol=0.35)


def test_every_factor_reproduces_the_curvature_of_the_loss():
    torch.manual_seed(1)
    p = (torch.randn(5, 6).double() * 4).softmax(-1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    cholesky = torch.stack([cholesky_column(p, number) for number in range(5)], -1)
    assert torch.allclose(cholesky @ cholesky.mT, curvature, rtol=1e-10, atol=1e-14)
    published = (torch.eye(6).double() - p[:, :, None]) * p.sqrt()[:, None, :]
    assert torch.allclose(published @ published.mT, curvature, rtol=1e-10, atol=1e-14)
    # The mean over all 2⁶ vectors of signs is the factor's square.
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6))).double()
    signed = signs[:, None] * p.sqrt()
    vectors = signed - p * signed.sum(-1, keepdim=True)
    assert torch.allclose(torch.einsum("snc,snd->ncd", vectors, vectors) / 64, curvature, rtol=1e-10, atol=1e-14)


def test_a_certain_model_has_no_columns_that_are_not_numbers():
    p = torch.tensor([[1.0, 0.0, 0.0], [1 - 1e-14, 1e-14, 0.0], [0.5, 0.5, 0.0]]).double()
    for number in range(2):
        assert torch.isfinite(cholesky_column(p, number)).all()


def test_signs_depend_on_the_example_and_not_on_its_batch():
    logits = torch.randn(6, 2, 70)
    settings = {"outputs": "classes", "seed": 3, "task": "t"}
    (whole,) = columns("signed", logits, indices=range(10, 16), **settings)
    (part,) = columns("signed", logits[4:], indices=range(14, 16), **settings)
    assert torch.equal(whole[4:], part)
    (other,) = columns("signed", logits, indices=range(10, 16), **{**settings, "seed": 4})
    assert not torch.equal(whole, other)


@pytest.mark.parametrize("outputs", ["regression", "multi_label"])
def test_regression_and_sigmoids_have_their_closed_forms(outputs):
    torch.manual_seed(0)
    module, x = nn.Linear(3, 2).double(), torch.randn(9, 3).double()
    found = estimate_fisher(task_of(module, x), module, outputs=outputs)
    with torch.no_grad():
        p = module(x).sigmoid()
    curvature = p * (1 - p) if outputs == "multi_label" else torch.ones_like(p)
    wanted = torch.einsum("nc,nj->cj", curvature, x.square()) / 9
    assert found.estimator == "exact"
    assert torch.allclose(found.tensors["weight"], wanted, rtol=1e-10, atol=0)


@pytest.mark.parametrize(("estimator", "draws"), [("signed", 4000), ("signed_batch", 8000), ("sampled", 4000)])
def test_random_estimators_are_right_on_average(estimator, draws):
    torch.manual_seed(2)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    x = torch.randn(32, 4)
    exact = estimate_fisher(task_of(module, x), module, estimator="exact").tensors
    found = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in exact.items()}
    with torch.no_grad():
        logits = module(x)[:, None]
    parameters = dict(module.named_parameters())
    # The very vectors that the estimator draws are sent back by one linear map.
    jacobian = torch.func.vmap(
        torch.func.jacrev(lambda values, one: torch.func.functional_call(module, values, one[None])[0]), (None, 0)
    )({name: value.detach() for name, value in parameters.items()}, x)
    # Signs and labels depend on the position, so positions 32, 33 … are further draws for the same examples.
    settings = {"outputs": "classes", "task": "t", "seed": 0}
    drawn = next(columns(estimator, logits.repeat(draws, 1, 1), indices=range(32 * draws), **settings))
    vectors = drawn.reshape(draws, 32, 4)
    for name, value in jacobian.items():
        flat = value.flatten(2).detach()
        if estimator == "signed_batch":
            found[name] = torch.einsum("snc,ncp->sp", vectors, flat).square().mean(0) / 32
        else:
            found[name] = sum(
                (vectors[:, place] @ flat[place]).square().mean(0) for place in range(32)
            ) / 32  # fmt: skip
    errors = torch.cat([(found[name] / exact[name].flatten().float() - 1).abs() for name in exact])
    median, tail = (0.02, 0.06) if estimator == "signed_batch" else (0.01, 0.05)
    assert float(errors.median()) <= median
    assert float(errors.quantile(0.99)) <= tail * (1 if estimator != "sampled" else 2)


def test_estimators_send_back_the_vectors_they_draw():
    torch.manual_seed(2)
    module, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)), torch.randn(32, 4)
    drawn = {"outputs": "classes", "task": "task", "seed": 7}
    with torch.no_grad():
        logits = module(x)[:, None]
    labels = torch.arange(32) % 5
    for estimator in ("signed", "signed_batch", "sampled", "empirical"):
        found = estimate_fisher(task_of(module, x, labels), module, estimator=estimator, seed=7, micro_batch=32)
        (vector,) = columns(estimator, logits, indices=range(32), labels=labels, **drawn)
        wanted = {name: torch.zeros_like(value) for name, value in module.named_parameters()}
        groups = [slice(0, 32)] if estimator == "signed_batch" else [slice(i, i + 1) for i in range(32)]
        for group in groups:
            loss = (module(x[group]) * vector[group, 0]).sum()
            for name, value in zip(wanted, torch.autograd.grad(loss, list(module.parameters())), strict=True):
                wanted[name] += value.square() / 32
        assert_close(found.tensors, wanted, 1e-5)


# --- every engine against plain autograd ------------------------------------------------------------------------------


class Transformer(nn.Module):
    """Tokens, positions, a class token, shared blocks of attention, and a head that is the embedding."""

    def __init__(self, *, tied=True):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.position = nn.Embedding(6, 8)
        self.start = nn.Parameter(torch.randn(8))
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.norm, self.last = nn.LayerNorm(8), nn.RMSNorm(8)
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1]))
        x = torch.cat([self.start.expand(len(x), 1, -1), x], 1)
        for _ in range(2):
            y = self.norm(x)
            heads = functional.scaled_dot_product_attention(self.query(y), self.key(y), self.value(y))
            x = x + self.scale * self.out(heads)
        return self.head(self.last(x[:, :1])).squeeze(1)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.groups = nn.Conv2d(4, 4, 3, groups=2, padding="same", bias=False)
        self.depth = nn.Conv2d(4, 4, 3, groups=4, dilation=2, padding=2, padding_mode="circular")
        self.line = nn.Conv1d(4, 6, 3, padding=1, padding_mode="replicate")
        self.group_norm, self.instance_norm = nn.GroupNorm(2, 6), nn.InstanceNorm1d(6, affine=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = functional.relu_(self.norm(self.first(x)))
        x = functional.relu(self.depth(self.groups(x)))
        x = self.instance_norm(functional.gelu(self.group_norm(self.line(x.flatten(2)))))
        return self.head(x[..., 1:].mean(-1))


class Odd(nn.Module):
    """Parameters that no hook reaches: functional uses, a table that is indexed, attention of torch itself."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 4))
        self.embedding = nn.Embedding(5, 4, padding_idx=0)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.bag = nn.EmbeddingBag(5, 4, mode="mean")
        self.unused = nn.Linear(4, 4)
        self.power = nn.Parameter(torch.tensor(1.3))

    def forward(self, tokens):
        x = self.embedding(tokens) + self.table[tokens.flip(1)]
        x = self.attention(x, x, x, need_weights=False)[0].mean(1) + self.bag(tokens)
        return functional.linear(x * self.power, self.embedding.weight)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def network(kind):
    torch.manual_seed(3)
    tokens = torch.randint(0, 5, (6, 6))
    if kind == "mlp":
        return nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)), torch.randn(6, 5)
    if kind == "positions":
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), Mean()), torch.randn(6, 9, 5)
    if kind == "convolutions":
        module = Convolutions()
        nn.init.uniform_(module.norm.running_mean)
        nn.init.uniform_(module.norm.running_var, 0.5, 2)
        return module, torch.randn(6, 2, 6, 6)
    if kind == "tied":
        return Transformer(), tokens
    if kind == "untied":
        return Transformer(tied=False), tokens
    if kind == "encoder":
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), Mean()), torch.randn(6, 5, 4)
    return Odd(), tokens


KINDS = ("mlp", "positions", "convolutions", "tied", "untied", "encoder", "odd")


@pytest.mark.parametrize("kind", KINDS)
def test_every_engine_agrees_with_plain_autograd(kind):
    for dtype, bar in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        module, x = network(kind)
        module = module.to(dtype)
        x = x.to(dtype) if x.is_floating_point() else x
        found = estimate_fisher(task_of(module, x), module, estimator="exact")
        wanted = by_autograd(module, x)
        largest = max(float(value.max()) for value in wanted.values())
        for name, value in wanted.items():
            # What is exactly zero in theory, such as a key's bias, is rounding noise in both.
            error = float((found.tensors[name].double() - value).abs().max())
            assert error <= bar * max(float(value.max()), 1e-3 * largest), name


def test_only_what_hooks_cannot_reach_is_left_to_slow_engines():
    for kind in ("mlp", "positions", "convolutions"):
        module, x = network(kind)
        assert estimate_fisher(task_of(module, x), module).engines == {}, kind
    for kind in ("tied", "untied"):
        module, x = network(kind)
        assert estimate_fisher(task_of(module, x), module).engines == {"expand": 2}, kind
    module, x = network("odd")
    found = estimate_fisher(task_of(module, x), module)
    assert found.engines["vmap"] >= 1
    assert set(found.unused) == {"unused.weight", "unused.bias"}
    assert not found.tensors["unused.weight"].any()


class Routed(nn.Module):
    """Sends each example to one of two experts: no two batches are treated alike."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

    def forward(self, x):
        out = torch.zeros(len(x), 3, dtype=x.dtype)
        for number, expert in enumerate(self.experts):
            chosen = (x[:, 0] > 0) == bool(number)
            if chosen.any():
                out = out.index_add(0, chosen.nonzero()[:, 0], expert(x[chosen]))
        return out


@pytest.mark.parametrize("first", [1.0, -1.0])
def test_a_model_that_routes_examples_is_measured_right(first):
    torch.manual_seed(0)
    module, x = Routed().double(), torch.randn(12, 3).double()
    x[:9, 0] = first
    found = estimate_fisher(task_of(module, x), module, estimator="exact", micro_batch=5).tensors
    assert_close(found, by_autograd(module, x), 1e-10)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, batch):
        tokens = batch["tokens"] if isinstance(batch, dict) else batch
        return self.head(self.embedding(tokens)).transpose(1, 2)


def test_rows_of_a_sequence_are_summed_and_padding_is_not():
    torch.manual_seed(0)
    module = Tagger().double()
    tokens, mask = torch.randint(0, 7, (4, 5)), torch.ones(4, 5).int()
    mask[1, 3:] = 0
    padded = {"tokens": tokens, "attention_mask": mask}
    found = estimate_fisher(task_of(module, padded), module, estimator="exact")
    wanted = {name: torch.zeros_like(value) for name, value in module.named_parameters()}
    for place in range(4):
        for name, value in by_autograd(module, tokens[place : place + 1, : int(mask[place].sum())]).items():
            wanted[name] += value / 4
    assert_close(found.tensors, wanted, 1e-10)
    assert found.rows == 18
    assert found.columns == 10


# --- what must not change anything ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "convolutions", "tied", "odd"])
def test_micro_batch_memory_and_threads_change_rounding_only(kind):
    # Torch's own convolutions in float32 round differently for each size of the batch, and norms amplify it.
    for dtype, bar in ((torch.float64, 1e-12), (torch.float32, 1e-4 if kind == "convolutions" else 1e-6)):
        results = []
        for micro_batch, memory, threads in ((6, 1 << 28, 1), (1, 1 << 28, 2), (4, 1, 1)):
            module, x = network(kind)
            module = module.to(dtype)
            x = x.to(dtype) if x.is_floating_point() else x
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                found = estimate_fisher(
                    task_of(module, x), module, estimator="signed", micro_batch=micro_batch, memory_bytes=memory
                )
            finally:
                torch.set_num_threads(before)
            results.append({name: value for name, value in found.tensors.items() if not name.endswith("key.bias")})
        for other in results[1:]:
            assert_close(other, results[0], bar)


def test_how_the_task_cuts_its_data_does_not_matter():
    module, x = network("mlp")
    one = estimate_fisher(task_of(module, x, batch=6), module, examples=4).tensors
    two = estimate_fisher(task_of(module, x, batch=1), module, examples=4).tensors
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_draw_is_random_and_seeded():
    module, x = nn.Linear(1, 2).double(), torch.arange(1000.0)[:, None].double() ** 0.5
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    means = [
        float(estimate_fisher(task_of(module, x), module, examples=200, seed=seed).tensors["weight"][0, 0]) * 4
        for seed in (0, 0, 1)
    ]
    assert means[0] == means[1] != means[2]
    assert all(400 < mean < 600 for mean in means)  # the first 200 have a mean of 99.5


def test_the_module_comes_back_as_it_was():
    module, x = network("mlp")
    module.train()
    module[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    estimate_fisher(task_of(module, x), module)
    assert module.training
    assert [value.requires_grad for value in module.parameters()] == [False, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(value.grad is None for value in module.parameters())


def test_half_precision_models_are_squared_in_single():
    module, x = network("mlp")
    single = estimate_fisher(task_of(module, x), module, estimator="exact").tensors
    module, x = network("mlp")
    half = estimate_fisher(task_of(module.bfloat16(), x.bfloat16()), module, estimator="exact").tensors
    assert_close(half, single, 0.2)
    assert all(value.dtype in (torch.float32, torch.float64) for value in half.values())


@pytest.mark.parametrize("rows", [slice(3, 1500), torch.arange(0, 2000, 3)])
def test_large_sums_lose_next_to_nothing(rows):
    generator = torch.Generator().manual_seed(0)
    total, exact = Total((2000, 600), torch.float32), torch.zeros(2000, 600, dtype=torch.float64)
    assert total.rest is not None
    for _ in range(40):
        values = torch.rand(len(exact[rows]), 600, generator=generator) * 10 ** (
            -6 * torch.rand(1, generator=generator)
        )
        exact[rows] += values.double()
        total.add(rows, values.clone())
    assert torch.allclose(total.mean(1).double(), exact, rtol=1.2e-7, atol=0)  # plain float32: 6e-7


def test_an_embedding_of_many_rows_is_summed_where_it_is_used():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(5000, 300), Mean(), nn.Linear(300, 3))
    tokens = torch.randint(0, 5000, (12, 4))
    tokens[:, 3] = tokens[:, 0]
    signed, of_batches = (
        estimate_fisher(task_of(module, tokens), module, estimator=name, micro_batch=1).tensors
        for name in ("signed", "signed_batch")
    )
    assert_close(of_batches, signed, 1e-5)
    assert int(signed["0.weight"].any(1).sum()) == len(tokens.unique())


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    module, _ = network("convolutions")
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path / "model.safetensors") as opened:
        yield opened


def image_task(**more):
    images = torch.arange(40 * 72.0).reshape(40, 2, 6, 6).sin()
    return Task("images", model=Convolutions, batches=lambda: [(images, None)], **more)


def test_a_file_says_what_was_measured(checkpoint, tmp_path):
    measure_fisher(checkpoint, image_task(), tmp_path / "f.safetensors", examples=30, seed=2)
    found = load_fisher(tmp_path / "f.safetensors", checkpoint)
    parameters = dict(Convolutions().named_parameters())
    assert {name: value.shape for name, value in found.tensors.items()} == {
        name: tuple(value.shape) for name, value in parameters.items()
    }
    assert all(value.dtype == np.float32 for value in found.tensors.values())
    assert found.metadata["task"] == "images"
    assert found.metadata["examples"] == "30"
    assert found.metadata["seed"] == "2"
    assert found.metadata["estimator"] == "exact"
    assert found.metadata["columns"] == "2"
    assert found.parents[0]["digest"] == checkpoint.content_digest()
    assert json.loads(found.metadata["skipped"])["norm.num_batches_tracked"] == "buffer"
    everything = np.concatenate([value.reshape(-1) for value in found.tensors.values()]).astype(np.float64)
    assert math.isclose(float(found.metadata["rms"]), math.sqrt(np.mean(everything**2)), rel_tol=1e-9)


def test_the_same_call_writes_the_same_bytes(checkpoint, tmp_path):
    for name in ("one", "two"):
        measure_fisher(checkpoint, image_task(), tmp_path / f"{name}.safetensors", estimator="signed")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert not list(tmp_path.glob("*partial*"))


def test_values_may_be_stored_in_bfloat16(checkpoint, tmp_path):
    for name, dtype in (("wide", "float32"), ("narrow", "bfloat16")):
        measure_fisher(checkpoint, image_task(), tmp_path / f"{name}.safetensors", dtype=dtype)
    wide, narrow = (load_fisher(tmp_path / f"{name}.safetensors") for name in ("wide", "narrow"))
    for name, values in wide.tensors.items():
        assert np.allclose(narrow.tensors[name], values, rtol=2**-8, atol=0)


@pytest.mark.parametrize("estimator", ["signed", "signed_batch"])
@pytest.mark.parametrize("stop_at", [1, 5, 9])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(checkpoint, tmp_path, monkeypatch, estimator, stop_at):
    settings = {"estimator": estimator, "micro_batch": 4, "state_seconds": 0.0}
    measure_fisher(checkpoint, image_task(), tmp_path / "whole.safetensors", **settings)
    original = fisher_module._Run._add
    seen = []

    def failing(self, number, batch, totals):
        if number == stop_at and not seen:
            raise SystemExit  # as if the process had gone
        original(self, number, batch, totals)

    monkeypatch.setattr(fisher_module._Run, "_add", failing)
    with pytest.raises(SystemExit):
        measure_fisher(checkpoint, image_task(), tmp_path / "part.safetensors", **settings)
    assert not (tmp_path / "part.safetensors").exists()
    assert (tmp_path / "part.partial.safetensors").exists()

    def counting(self, number, batch, totals):
        seen.append(number)
        original(self, number, batch, totals)

    monkeypatch.setattr(fisher_module._Run, "_add", counting)
    measure_fisher(checkpoint, image_task(), tmp_path / "part.safetensors", **settings)
    assert seen == list(range(stop_at, 10))
    assert (tmp_path / "part.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not (tmp_path / "part.partial.safetensors").exists()

    # What was left by a run with other settings is not taken up.
    seen.clear()
    monkeypatch.setattr(fisher_module._Run, "_add", failing)
    with pytest.raises(SystemExit):
        measure_fisher(checkpoint, image_task(), tmp_path / "other.safetensors", **settings)
    monkeypatch.setattr(fisher_module._Run, "_add", counting)
    measure_fisher(checkpoint, image_task(), tmp_path / "other.safetensors", **{**settings, "seed": 1})
    assert seen == list(range(10))


# --- what is wrong is said in one line --------------------------------------------------------------------------------


class Stubborn(nn.Linear):
    def train(self, mode=True):
        return super().train(True)


def constant(shape):
    class Constant(nn.Linear):
        def forward(self, x):
            return super().forward(x).sum() * torch.ones(shape)

    return Constant(3, 3)


WRONG = {
    "no examples": (nn.Linear(3, 2), torch.zeros(0, 3), {}, "has no examples"),
    "too few": (nn.Linear(3, 2), None, {"examples": 9}, 'task "task": it has 8 examples, 9 are asked for'),
    "none": (nn.Linear(3, 2), None, {"examples": 0}, "0 examples are asked for"),
    "training": (nn.Sequential(Stubborn(3, 2)), None, {}, 'submodule "0" is still in training mode'),
    "batch norm": (
        nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)), None, {},
        '"1" normalises by its batch',
    ),
    "not finite": (nn.Linear(3, 2), torch.full((8, 3), math.inf), {}, "logits of batch 0 are not finite"),
    "one class": (nn.Linear(3, 1), None, {}, r"\(2, 1\).*--outputs regression"),
    "no classes": (constant((2,)), None, {}, r"shape \(2,\), not \(examples, classes\)"),
    "no axis": (constant((5, 2)), None, {}, r"shape \(5, 2\) for 2 examples"),
    "no labels": (nn.Linear(3, 2), None, {"estimator": "empirical"}, "gives no labels.*use the estimator signed"),
    "fails": (nn.Linear(4, 2), None, {}, "batch 0: .*RuntimeError"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_measured_is_explained(case):
    module, inputs, settings, message = WRONG[case]
    task = task_of(module, torch.ones(8, 3) if inputs is None else inputs)
    with pytest.raises(TaskError, match=message) as caught:
        estimate_fisher(task, module, **settings)
    assert "\n" not in str(caught.value)


def test_logits_that_turn_bad_later_name_the_examples():
    x = torch.ones(40, 3)
    x[17] = math.nan
    module = nn.Linear(3, 2)
    with pytest.raises(TaskError, match="for examples 17;"):
        estimate_fisher(task_of(module, x), module)


def test_a_checkpoint_that_does_not_fit_is_refused(checkpoint, tmp_path):
    task = Task("other", model=lambda: nn.Linear(3, 2), batches=lambda: [(torch.ones(4, 3), None)])
    with pytest.raises(TaskError, match="not in the model"):
        measure_fisher(checkpoint, task, tmp_path / "f.safetensors")
    assert not (tmp_path / "f.safetensors").exists()


def test_a_file_of_another_checkpoint_is_refused_with_both_digests(checkpoint, tmp_path):
    measure_fisher(checkpoint, image_task(), tmp_path / "f.safetensors")
    save_file({k: v + 1 for k, v in Convolutions().state_dict().items()}, tmp_path / "other.safetensors")
    with Checkpoint.open(tmp_path / "other.safetensors") as other:
        with pytest.raises(MismatchError) as caught:
            load_fisher(tmp_path / "f.safetensors", other)
        assert other.content_digest() in str(caught.value)
        assert checkpoint.content_digest() in str(caught.value)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_values_that_no_information_has_are_refused(checkpoint, tmp_path, value):
    path = tmp_path / "f.safetensors"
    measure_fisher(checkpoint, image_task(), path)
    tensors = load_artifact(path, kind="fisher").tensors
    tensors["head.weight"] = tensors["head.weight"].copy()
    tensors["head.weight"][1, 2] = value
    save_artifact(path, tensors, kind="fisher", method="m", settings={}, force=True)
    with pytest.raises(DataError, match=r'"head.weight" has .* at flat index 8'):
        load_fisher(path)


def test_an_output_that_exists_stays(checkpoint, tmp_path):
    (tmp_path / "f.safetensors").write_text("mine")
    with pytest.raises(OutputError, match="--force"):
        measure_fisher(checkpoint, image_task(), tmp_path / "f.safetensors")
    with pytest.raises(GraftworkError, match="is the input"):
        measure_fisher(checkpoint, image_task(), checkpoint.path, force=True)
    assert (tmp_path / "f.safetensors").read_text() == "mine"
