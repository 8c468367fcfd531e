"""Specs by tracing: they equal those by names, know the usual operations, and fix what they do not know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from graftwork.merge.alignment import derive
from graftwork.merge.alignment.apply import apply_permutation, random_permutation
from graftwork.merge.alignment.derive import derive_spec
from graftwork.merge.alignment.families import family_spec
from graftwork.merge.alignment.spec import plain, shapes_of
from graftwork.merge.checkpoint import Checkpoint
from graftwork.merge.errors import MismatchError, TaskError
from tests.merge.alignment.architectures import (
    NETWORKS,
    VGG,
    VGG16,
    DigitsLeNet,
    ResNet,
    heads_of,
    network,
    output,
    trained_like,
)

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "checkpoints" / "digits_lenet"


def uses(spec):
    """Return the groups as sets of places, whatever their names, each with those of the group that it is within."""
    places = {name: frozenset(spec.uses(name)) for name in spec.groups}
    return {(places[name], places.get(group.within), spec.groups[name].size) for name, group in spec.groups.items()}


def traced(module, inputs, seed=0):
    """Return the spec of a module, after checking that no order of it changes the output."""
    trained_like(module, seed)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    spec = derive_spec(module, inputs)
    assert not any(group.pinned for group in spec.groups.values()), "the check had to correct the tracing"
    expected = output(module, inputs)
    for attempt in range(3):
        permuted = apply_permutation(spec, random_permutation(spec, attempt), module.state_dict())
        assert (output(module, inputs, permuted) - expected).abs().max() <= 1e-11 * expected.abs().max()
    return spec


@pytest.mark.parametrize("name", NETWORKS)
def test_tracing_finds_what_the_names_say(name):
    module, inputs, config, _ = network(name)
    found, wanted = derive_spec(module, inputs), family_spec(shapes_of(module.state_dict()), config=config)
    assert uses(found) == uses(wanted)
    assert not any(group.pinned for group in found.groups.values())
    assert {tensor for tensor, axes in found.tensors.items() if not axes.counted} == {
        tensor for tensor, axes in wanted.tensors.items() if not axes.counted
    }


@pytest.mark.parametrize("name", ["resnet-bottleneck", "llama", "bert"])
def test_no_order_of_a_traced_group_changes_the_output(name):
    module, inputs, _, _ = network(name)
    spec = derive_spec(module, inputs, check=False)
    expected = output(module, inputs)

    @settings(deadline=None, max_examples=10)
    @given(seed=st.integers(0, 2**32))
    def holds(seed):
        permuted = apply_permutation(spec, random_permutation(spec, seed), module.state_dict())
        assert (output(module, inputs, permuted) - expected).abs().max() <= 1e-12 * expected.abs().max()

    holds()


@pytest.mark.parametrize(
    ("groups", "make"),
    [
        (15, lambda: VGG(VGG16, head=(512, 512))),
        (12, lambda: ResNet((16, 32, 64), (3, 3, 3))),
        (37, lambda: ResNet((64, 128, 256, 512), (3, 4, 6, 3), bottleneck=True, classes=1000)),
    ],
)
def test_large_networks_are_traced_without_values(groups, make):
    with torch.device("meta"):
        module, inputs = make(), torch.empty(2, 3, 32, 32)
    found = derive_spec(module, inputs, check=False)
    assert len(found.groups) == groups
    assert uses(found) == uses(family_spec(shapes_of(module.state_dict())))


@pytest.mark.skipif(not REAL.is_dir(), reason="the real checkpoints are not in ../shared/data/checkpoints")
def test_the_real_digits_networks_have_the_same_groups_either_way():
    with Checkpoint.open(REAL / "mnist_a.safetensors") as found:
        shapes = shapes_of(found.tensors)
    by_tracing = derive_spec(DigitsLeNet(), torch.randn(2, 3, 32, 32), names=shapes).verified(shapes)
    by_names = family_spec(shapes)
    assert uses(by_tracing) == uses(by_names)
    assert by_tracing.tensors == by_names.tensors


# ---------------------------------------------------------------------------------------------------------------------
# Attention in all the ways in which it is written


class Attention(nn.Module):
    def __init__(self, how, width=16, heads=4):
        super().__init__()
        self.how, self.heads = how, heads
        self.words, self.norm = nn.Embedding(20, width), nn.LayerNorm(width)
        self.fused, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.head = nn.Linear(width, 48), nn.Linear(24, width), nn.Linear(width, 7)

    def parts(self, x):
        batch, length, width = x.shape
        fused, size = self.fused(x), width // self.heads
        if self.how == "chunk":
            return [heads_of(part, self.heads) for part in fused.chunk(3, dim=-1)]
        if self.how == "split":
            return [heads_of(part, self.heads) for part in fused.split(width, dim=-1)]
        if self.how == "slices":
            return [heads_of(fused[..., k * width : (k + 1) * width], self.heads) for k in range(3)]
        if self.how == "stacked":
            return fused.reshape(batch, length, 3, self.heads, size).permute(2, 0, 3, 1, 4).unbind(0)
        return fused.view(batch, length, self.heads, 3, size).permute(3, 0, 2, 1, 4)

    def forward(self, tokens):
        x = self.words(tokens)
        q, k, v = self.parts(self.norm(x))
        if self.how == "split":
            weights = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
            y = torch.einsum("bhqk,bhkd->bqhd", weights, v).flatten(2)
        else:
            y = ((q @ k.transpose(-2, -1)) * 0.5).softmax(-1) @ v
            y = y.transpose(1, 2).reshape(x.shape)
        x = x + self.out(y)
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.head((x + self.down(functional.silu(gate) * up)).mean(1))


@pytest.mark.parametrize("how", ["chunk", "split", "slices", "stacked"])
def test_fused_layers_are_taken_apart(how):
    spec = traced(Attention(how), torch.randint(0, 20, (2, 6)))
    (query, key, value) = spec.tensors["fused.weight"].axes[0]
    heads, dims = query
    assert query == key
    assert value[0] == heads
    assert value[1] != dims
    assert (spec.groups[heads].size, spec.groups[dims].size) == (4, 4)
    assert spec.groups[dims].within == spec.groups[value[1]].within == heads
    assert spec.tensors["out.weight"].axes[1] == (value,)
    gate, up = spec.tensors["up.weight"].axes[0]
    assert gate == up == spec.tensors["down.weight"].axes[1][0]
    assert len(spec.groups) == 5


def test_queries_keys_and_values_that_alternate_by_head_share_an_order():
    spec = traced(Attention("interleaved"), torch.randint(0, 20, (2, 6)))
    ((heads, three, dims),) = spec.tensors["fused.weight"].axes[0]
    assert three == 3
    assert spec.groups[dims].within == heads
    assert spec.tensors["out.weight"].axes[1] == ((heads, dims),)


class SharedKeys(nn.Module):
    """Grouped-query attention by `enable_gqa`, with a gain that all heads share on queries if asked for."""

    def __init__(self, *, norm=False):
        super().__init__()
        self.words, self.q, self.k = nn.Embedding(20, 16), nn.Linear(16, 32), nn.Linear(16, 16)
        self.v, self.out = nn.Linear(16, 16), nn.Linear(32, 16)
        self.gain = nn.Parameter(torch.randn(8)) if norm else None

    def forward(self, tokens):
        x = self.words(tokens)
        q, k, v = heads_of(self.q(x), 4), heads_of(self.k(x), 2), heads_of(self.v(x), 2)
        if self.gain is not None:
            q = functional.rms_norm(q, (8,), self.gain)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2)) @ self.words.weight.T


def test_shared_keys_group_their_query_heads():
    spec = traced(SharedKeys(), torch.randint(0, 20, (2, 6)))
    ((shared, queries, dims),) = spec.tensors["q.weight"].axes[0]
    assert spec.tensors["k.weight"].axes[0] == ((shared, dims),)
    ((_, values),) = spec.tensors["v.weight"].axes[0]
    assert spec.tensors["out.weight"].axes[1] == ((shared, queries, values),)
    assert [spec.groups[name].size for name in (shared, queries, dims, values)] == [2, 2, 8, 8]
    assert {spec.groups[name].within for name in (queries, dims, values)} == {shared}


def test_a_gain_that_heads_share_gives_their_dimensions_one_order():
    spec = traced(SharedKeys(norm=True), torch.randint(0, 20, (2, 6)))
    ((_, _, dims),) = spec.tensors["q.weight"].axes[0]
    assert spec.groups[dims].within is None
    assert spec.tensors["gain"].axes == (plain(dims),)


class AcrossHeads(nn.Module):
    """Attention between heads instead of positions: dimensions are compared across heads, so they share an order."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x):
        q, k, v = (part(x).view(-1, 3, 4) for part in (self.q, self.k, self.v))
        return self.out(((q @ k.transpose(1, 2)).softmax(-1) @ v).flatten(1)).sum(1)


def test_dimensions_that_are_compared_across_heads_have_one_order():
    spec = traced(AcrossHeads(), torch.randn(2, 12))
    ((_, dims),) = spec.tensors["q.weight"].axes[0]
    assert spec.groups[dims].within is None


# ---------------------------------------------------------------------------------------------------------------------
# Convolutions and what surrounds them


class Convolutions(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        groups, second, third = {
            "depthwise": (8, 8, 8),
            "multiplied": (8, 16, 16),
            "grouped": (2, 8, 8),
            "joined": (1, 8, 16),
        }.get(how, (1, 8, 8))
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, second, 3, padding=1, groups=groups)
        self.norm = nn.GroupNorm(2, second) if how == "group norm" else nn.BatchNorm2d(second)
        if how == "transposed":
            self.conv2 = nn.ConvTranspose2d(8, 8, 2, stride=2)
        if how == "shuffled":
            self.conv2, self.shuffle = nn.Conv2d(8, 32, 3, padding=1), nn.PixelShuffle(2)
        self.conv3, self.slope = nn.Conv2d(third, 12, 3, padding=1), nn.PReLU(12)
        self.fc = nn.Linear(12 * 4, 10)

    def forward(self, x):
        a = torch.relu(self.conv1(x))
        b = self.shuffle(self.conv2(a)) if self.how == "shuffled" else self.conv2(a)
        b = functional.gelu(self.norm(b))
        if self.how == "joined":
            b = torch.cat((a, b), dim=1)
        c = self.slope(self.conv3(b))
        if self.how == "padded":
            c = c + functional.pad(a, (0, 0, 0, 0, 2, 2))
        return self.fc(functional.adaptive_avg_pool2d(c, 2).flatten(1))


@pytest.mark.parametrize(
    ("how", "entering", "groups"),
    [
        ("plain", (("conv2",),), 3),
        ("depthwise", (("conv1",),), 2),
        ("multiplied", (("conv1", "conv2"),), 3),
        ("grouped", None, 1),
        ("group norm", (("conv2", "conv2.1"),), 4),
        ("joined", (("conv1",), ("conv2",)), 3),
        ("padded", (("conv2",),), 1),
        ("transposed", None, 3),
        ("shuffled", None, 3),
    ],
)
def test_convolutions_and_norms_of_every_kind(how, entering, groups):
    spec = traced(Convolutions(how), torch.randn(2, 3, 6, 6))
    assert len(spec.groups) == groups
    if entering is not None:
        assert spec.tensors["conv3.weight"].axes[1] == entering
    if how == "padded":
        assert spec.tensors["fc.weight"].axes[1] is None
        assert spec.pinned["conv1.weight", 0] == "it is padded"
    else:
        assert spec.tensors["fc.weight"].axes[1] == (("conv3", 4),)
    if how == "grouped":
        assert spec.pinned["conv1.weight", 0] == "a grouped convolution"
    if how == "group norm":
        assert spec.groups["conv2.1"].within == "conv2"
    if how == "shuffled":
        assert spec.tensors["conv2.weight"].axes[0] == ((spec.tensors["conv3.weight"].axes[1][0][0], 4),)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.own, self.out = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        state = torch.zeros(x.shape[0], 8, dtype=x.dtype)
        for step in range(3):
            state = torch.tanh(self.into(x[:, step]) + self.own(state))
        return self.out(state)


def test_a_recurrent_weight_has_one_group_on_both_axes():
    spec = traced(Recurrent(), torch.randn(2, 3, 5))
    (group,) = spec.groups
    assert spec.tensors["own.weight"].axes == (plain(group), plain(group))


class Forms(nn.Module):
    """Views, stacks, choices and reductions in one network."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(24, 10)
        self.scale = nn.Parameter(torch.randn(12))
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 2.0]))

    def forward(self, x):
        x = torch.relu(self.one(x)).unsqueeze(1).expand(-1, 3, -1) * self.mask[:, None]
        x = torch.stack((self.two(x), self.two(x).square()), dim=1)
        x = torch.where(x > 0, x, 0.1 * x) * self.scale
        x = torch.cat((x.amax(2), x.var(2)), dim=1)[:, 1:3]
        return self.three(x.flatten(1)).log_softmax(-1)


def test_views_stacks_and_reductions_are_followed():
    spec = traced(Forms(), torch.randn(4, 6))
    assert {name: group.size for name, group in spec.groups.items()} == {"one": 8, "two": 12}
    assert spec.tensors["three.weight"].axes[1] == ((2, "two"),)
    assert spec.tensors["scale"].axes == (plain("two"),)


# ---------------------------------------------------------------------------------------------------------------------
# What is not known, or wrong


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.four = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        x = torch.relu(self.two(torch.relu(self.one(x))))
        return self.four(torch.relu(self.three(x.sort(dim=-1).values)))


def test_unknown_operations_fix_what_they_touch_and_are_named():
    spec = traced(Unknown(), torch.randn(2, 6))
    assert set(spec.groups) == {"one", "three"}
    assert spec.pinned["two.weight", 0] == "the operation sort, whose effect on an order is not known"
    assert spec.pinned["three.weight", 1] == "the operation sort, whose effect on an order is not known"


class Buffered(nn.Module):
    def __init__(self, persistent=True):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)
        self.three, self.unused = nn.Linear(5, 2), nn.Linear(7, 7)
        self.register_buffer("scale", torch.rand(5), persistent=persistent)

    def forward(self, x):
        return self.three(torch.relu(self.two(torch.relu(self.norm(self.one(x))))) * self.scale)


def test_running_statistics_are_re_ordered_and_constants_are_not():
    """A constant is equal in all models: the mean of one in two orders would be neither."""
    inputs = torch.randn(2, 6)
    for persistent in (True, False):
        spec = derive_spec(Buffered(persistent), inputs)
        assert set(spec.groups) == {"one"}
        assert spec.tensors["norm.running_var"].axes == (plain("one"),)
        wanted = "is no statistic of a norm" if persistent else "is not in the checkpoint"
        assert spec.pinned["two.weight", 0] == f"the buffer scale {wanted}"
        assert ("scale" in spec.tensors) == persistent
        assert spec.tensors["unused.weight"].axes == (None, None)
        assert ("unused.weight", 0) not in spec.pinned


def test_statistics_that_the_checkpoint_lacks_fix_what_they_touch():
    module = Buffered()
    names = [name for name in module.state_dict() if not name.startswith("norm.running")]
    spec = derive_spec(module, torch.randn(2, 6), names=names)
    assert not spec.groups
    assert "norm.running_var" not in spec.tensors
    assert spec.pinned["one.weight", 0] == "the buffer norm.running_mean is not in the checkpoint"


def test_units_on_which_a_choice_depends_are_fixed():
    class Choice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = torch.relu(self.one(x))
            return self.three(torch.relu(self.two(x))) + x[:, 0:1] + x.argmax(-1, keepdim=True)

    spec = traced(Choice(), torch.randn(3, 6))
    assert set(spec.groups) == {"two"}


def test_the_check_pins_a_group_that_tracing_got_wrong(monkeypatch):
    """A fault is planted in the tracer: it takes a cumulative sum for an operation on single entries."""

    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(6, 7), nn.Linear(7, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.three(torch.relu(self.two(torch.relu(self.one(x)).cumsum(-1))))

    inputs = torch.randn(4, 6)
    assert set(derive_spec(Sums(), inputs).free_groups) == {"two"}
    from graftwork.merge.alignment import operations

    monkeypatch.setitem(operations._OPERATIONS, "cumsum", operations._same)
    spec = derive_spec(Sums(), inputs)
    assert spec.free_groups == ("two",)
    assert spec.groups["one"].pinned == "the module's output changes with its order"


def test_the_check_is_not_blind_to_fresh_norms(monkeypatch):
    """Gains of ones and biases of zeros would hide that they were not re-ordered."""
    from graftwork.merge.alignment import operations

    monkeypatch.setitem(operations._OPERATIONS, "batch_norm", operations._same)
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2))
    spec = derive_spec(module, torch.randn(2, 3, 6, 6))
    assert "0" not in spec.free_groups


def test_the_module_and_its_random_numbers_are_left_as_they_were():
    module = nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 2)).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    assert len(derive_spec(module, torch.zeros(3, 4)).groups) == 1  # equal inputs are replaced for the check
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_several_arguments_and_keywords_are_given_as_they_are_called():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.out = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, left, right):
            return {"logits": self.out(torch.tanh(self.one(left) + self.two(right)))}

    left, right = torch.randn(2, 4), torch.randn(2, 3)
    by_place, by_name = derive_spec(Two(), (left, right)), derive_spec(Two(), {"left": left, "right": right})
    assert by_place == by_name
    assert len(by_place.groups) == 1


def one_line(error, *arguments, **keywords):
    with pytest.raises(error) as caught:
        derive_spec(*arguments, **keywords)
    (problem,) = caught.value.problems
    assert "\n" not in problem
    return problem


def test_a_module_that_cannot_be_traced_is_one_line():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 4)

        def forward(self, x):
            return self.one(x) if float(x.sum()) > 0 else x

    problem = one_line(TaskError, Branch(), torch.randn(2, 4), what='the module of "f.py:make"')
    assert problem.startswith('cannot trace the module of "f.py:make": ')
    assert "--spec FILE" in problem


def test_inputs_of_another_shape_are_one_line():
    problem = one_line(TaskError, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(2, 5))
    assert problem.startswith("cannot trace the module: ")


def test_a_module_whose_output_is_random_is_one_line():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.two(functional.dropout(torch.relu(self.one(x)), 0.5, training=True))

    assert "another output each time" in one_line(TaskError, Noisy(), torch.randn(8, 4))


def test_orders_that_are_wrong_only_together_are_refused(monkeypatch):
    class Trial(derive._Trial):
        def change(self, spec, groups):
            return 1.0 if len(list(groups)) > 1 else 0.0

    monkeypatch.setattr(derive, "_Trial", Trial)
    module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    assert "change nothing one by one" in one_line(MismatchError, module, torch.randn(2, 4))
