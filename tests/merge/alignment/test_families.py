"""Specs by names: they change no output, and what they do not know they refuse."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.merge.alignment.apply import apply_permutation, identity, random_permutation
from graftwork.merge.alignment.families import FAMILIES, RESIDUAL, adapter_spec, family_spec
from graftwork.merge.alignment.spec import plain, shapes_of
from graftwork.merge.checkpoint import Checkpoint
from graftwork.merge.errors import MismatchError, RecipeError
from tests.merge.alignment.architectures import (
    CONFIGS,
    GPT2,
    NETWORKS,
    VGG,
    VGG16,
    Chain,
    DigitsLeNet,
    Llama,
    ResNet,
    network,
    output,
    trained_like,
)

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "checkpoints"

_MADE = {}


def made(name):
    """Return (module, inputs, spec, number of groups, output), made once for all examples."""
    if name not in _MADE:
        module, inputs, config, groups = network(name)
        spec = family_spec(shapes_of(module.state_dict()), config=config)
        _MADE[name] = module, inputs, spec, groups, output(module, inputs)
    return _MADE[name]


def refusal(error, *arguments, **keywords):
    with pytest.raises(error) as caught:
        family_spec(*arguments, **keywords)
    assert all("\n" not in line for line in caught.value.problems)
    return str(caught.value)


@pytest.mark.parametrize("name", NETWORKS)
@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 2**32))
def test_no_order_of_any_group_changes_the_output(name, seed):
    module, inputs, spec, groups, expected = made(name)
    assert len(spec.groups) == groups
    state = module.state_dict()
    permuted = apply_permutation(spec, random_permutation(spec, seed), state)
    assert (output(module, inputs, permuted) - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
def test_each_group_moves_weights_and_each_of_its_uses_is_needed(name):
    module, inputs, spec, _, expected = made(name)
    state = module.state_dict()
    order = random_permutation(spec, 1)
    for group in spec.free_groups:
        alone = {group: order[group]}
        if (alone[group] == identity(spec)[group]).all():
            continue
        permuted = apply_permutation(spec, alone, state)
        changed = [use for use in spec.uses(group) if not torch.equal(permuted[use.tensor], state[use.tensor])]
        assert changed, group
        tensor = spec.tied.get(changed[0].tensor, changed[0].tensor)
        left = {name: permuted[name] if spec.tied.get(name, name) != tensor else state[name] for name in state}
        assert (output(module, inputs, left) - expected).abs().max() > 1e-6, (group, tensor)


@pytest.mark.parametrize("name", ["vgg", "resnet", "resnet-bottleneck"])
def test_running_statistics_move_but_are_not_counted(name):
    module, inputs, spec, _, expected = made(name)
    state = module.state_dict()
    statistics = [tensor for tensor in state if tensor.endswith(("running_mean", "running_var"))]
    assert statistics
    assert not any(spec.tensors[tensor].counted for tensor in statistics)
    permuted = apply_permutation(spec, random_permutation(spec, 3), state)
    left = {**permuted, **{tensor: state[tensor] for tensor in statistics}}
    assert (output(module, inputs, left) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_large_networks_have_all_of_their_groups():
    with torch.device("meta"):
        networks = {
            15: VGG(VGG16, head=(512, 512)),
            12: ResNet((16, 32, 64), (3, 3, 3)),
            37: ResNet((64, 128, 256, 512), (3, 4, 6, 3), bottleneck=True, classes=1000),
        }
    for groups, module in networks.items():
        assert len(family_spec(shapes_of(module.state_dict())).groups) == groups
    sizes = [group.size for group in family_spec(shapes_of(networks[37].state_dict())).groups.values()]
    assert {size: sizes.count(size) for size in sizes} == {64: 7, 128: 8, 256: 13, 512: 7, 1024: 1, 2048: 1}


@pytest.mark.parametrize(
    "names", [("fc0", "fc1", "fc2"), ("fc1", "fc2", "fc3"), ("linear1", "linear2", "linear3"), ("0", "2", "4")]
)
def test_mlps_may_have_any_of_the_usual_names(names):
    module = Chain(names, (5, 7, 6, 3))
    for prefix in ("", "module.", "net.body."):
        shapes = {prefix + name: shape for name, shape in shapes_of(module.state_dict()).items()}
        spec = family_spec(shapes)
        assert spec.source == "mlp"
        assert [group.size for group in spec.groups.values()] == [7, 6]
    layers = {f"layers.{name}": shape for name, shape in shapes_of(Chain(("0", "1"), (5, 7, 3)).state_dict()).items()}
    assert list(family_spec(layers).groups) == ["layers.0"]


def test_layers_are_taken_by_number_and_not_by_letters():
    module = trained_like(Chain([f"fc{number}" for number in range(12)], range(20, 7, -1)))
    spec = family_spec(shapes_of(module.state_dict()))
    assert [group.size for group in spec.groups.values()] == list(range(19, 8, -1))


def test_rotary_positions_fix_the_dimensions_of_queries_and_keys():
    spec = made("llama")[2]
    layer = "model.layers.0"
    heads, queries, values = f"{layer}.heads", f"{layer}.queries", f"{layer}.values"
    assert spec.tensors[f"{layer}.self_attn.q_proj.weight"].axes[0] == ((heads, queries, 4),)
    assert spec.tensors[f"{layer}.self_attn.k_proj.weight"].axes[0] == ((heads, 4),)
    assert spec.tensors[f"{layer}.self_attn.v_proj.weight"].axes[0] == ((heads, values),)
    assert spec.tensors[f"{layer}.self_attn.o_proj.weight"].axes[1] == ((heads, queries, values),)
    assert spec.groups[queries].within == spec.groups[values].within == heads
    assert "rotary" in spec.pinned[f"{layer}.self_attn.q_proj.weight", 0]
    assert f"{layer}.keys" not in spec.groups


def test_without_a_config_heads_keep_their_order():
    for name in ("gpt2", "llama", "bert", "vit", "torchvision-vit"):
        module, inputs, full, _, expected = made(name)
        spec = family_spec(shapes_of(module.state_dict()))
        assert len(spec.groups) < len(full.groups)
        assert not any(group.endswith(("heads", "values", "keys")) for group in spec.groups)
        assert any("config.json" in why for why in spec.pinned.values())
        permuted = apply_permutation(spec, random_permutation(spec, 1), module.state_dict())
        assert (output(module, inputs, permuted) - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_padded_shortcuts_fix_the_streams():
    spec = made("resnet-padded")[2]
    assert set(spec.groups) == {f"layer{stage}.{block}.conv1" for stage in (1, 2) for block in (0, 1)}
    assert "padded with zeros" in spec.pinned["conv1.weight", 0]


def test_a_head_that_is_the_embedding_again_goes_with_it():
    shapes = {f"transformer.{name}": shape for name, shape in shapes_of(GPT2().state_dict()).items()}
    spec = family_spec({**shapes, "lm_head.weight": (30, 16)}, config=CONFIGS["gpt2"])
    assert spec.tied == {"lm_head.weight": "transformer.wte.weight"}
    assert spec.tensors["lm_head.weight"].axes == (None, plain(RESIDUAL))
    own = family_spec({**shapes, "lm_head.weight": (30, 16)}, config={**CONFIGS["gpt2"], "tie_word_embeddings": False})
    assert own.tied == {}


def test_the_transform_before_a_decoder_of_its_own_has_an_order_of_its_own():
    shapes = shapes_of(network("bert")[0].state_dict())
    tied = family_spec(shapes, config=CONFIGS["bert"])
    transform = "cls.predictions.transform.dense.weight"
    assert tied.tensors[transform].axes == (plain(RESIDUAL), plain(RESIDUAL))
    free = family_spec(shapes, config={**CONFIGS["bert"], "tie_word_embeddings": False})
    assert free.tensors[transform].axes[0] != plain(RESIDUAL)
    assert len(free.groups) == len(tied.groups) + 1


@pytest.mark.parametrize(
    "names",
    [
        {"enc.0.net.0.weight": (4, 3, 7), "cls.weight": (2, 4)},
        {"weight": (3, 3)},
        {"model.layers.0.self_attn.q_proj.weight": (4, 4), "model.layers.0.mlp.experts.0.up_proj.weight": (4, 4)},
    ],
)
def test_unknown_names_ask_for_a_module_or_a_spec(names):
    text = refusal(MismatchError, names, what='"x.safetensors"')
    assert text.startswith('cannot tell which units of "x.safetensors" may be re-ordered: no known family has tensors')
    assert "--module file.py:make" in text
    assert "--spec FILE" in text


def test_an_unknown_family_is_told_from_a_wrong_one():
    shapes = shapes_of(Chain(("fc0", "fc1"), (3, 4, 2)).state_dict())
    assert refusal(RecipeError, shapes, family="resnett").endswith(
        f'known are {", ".join(FAMILIES)}; did you mean "resnet"?'
    )
    assert "has no tensor that is named as in the family resnet" in refusal(MismatchError, shapes, family="resnet")
    assert family_spec(shapes, family="mlp").source == "mlp"


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        (
            "mlp",
            {"fc1.weight": (8, 13)},
            '"fc1.weight" axis 1 has 13 entries, which does not go with the 12 units of "fc0"',
        ),
        ("mlp", {"fc1.bias": (9,)}, '"fc1.bias" axis 0 has 9 entries, but its group "fc1" has 8'),
        ("mlp", {"head.weight": (4, 4)}, 'the family has no such tensors: "head.weight"'),
        ("lenet", {"fc1.weight": (20, 129)}, '"fc1.weight" axis 1 has 129 entries, which does not go with the 8 units'),
        ("vgg", {"features.1.running_var": (5,)}, '"features.1.running_var" axis 0 has 5 entries'),
        ("resnet", {"layer1.0.conv1.weight": (6, 3, 3, 3)}, '"layer1.0.conv1.weight" axis 1 has 3 entries'),
        ("resnet", {"layer2.1.conv2.weight": (9, 8, 3, 3)}, '"layer2.1.conv2.weight" axis 0 has 9 entries'),
        ("resnet", {"bn1.weight": None}, "no norm bn1 follows the first convolution"),
        ("gpt2", {"h.1.mlp.c_proj.weight": (63, 16)}, '"h.1.mlp.c_proj.weight" axis 0 has 63 entries'),
        ("gpt2", {"h.0.crossattention.c_attn.weight": (4, 4)}, '"h.0.crossattention.c_attn.weight"'),
        (
            "llama",
            {"model.layers.1.mlp.up_proj.weight": None},
            'it lacks the tensor "model.layers.1.mlp.up_proj.weight"',
        ),
        ("vit", {"vit.layernorm.weight": (15,)}, '"vit.layernorm.weight" axis 0 has 15 entries'),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_with_its_axis(name, change, expected):
    module, _, config, _ = network(name)
    shapes = {**shapes_of(module.state_dict()), **change}
    text = refusal(MismatchError, {key: shape for key, shape in shapes.items() if shape is not None}, config=config)
    assert expected in text


def test_heads_that_do_not_go_with_the_width_are_refused():
    shapes = shapes_of(Llama().state_dict())
    text = refusal(MismatchError, shapes, config={"num_attention_heads": 3, "num_key_value_heads": 3})
    assert "3 heads and 3 key heads, which do not go with the 16 rows" in text


@pytest.mark.skipif(not REAL.is_dir(), reason="the real checkpoints are not in ../shared/data/checkpoints")
@pytest.mark.parametrize(
    ("name", "family", "groups"),
    [
        ("digits_lenet/mnist_a", "lenet", {"conv1": 20, "conv2": 50, "fc1": 500}),
        ("mnist_fl_cnn/fedavg_server", "lenet", {"conv1.0": 32, "conv2.0": 64, "fc1.0": 512}),
        ("cifar10_resnet/resnet20_aisafety", "resnet", 12),
        ("cifar10_resnet/resnet20_akamaster", "resnet", 9),
        ("cifar10_resnet/resnet32_akamaster", "resnet", 15),
    ],
)
def test_real_checkpoints_are_known_by_their_names(name, family, groups):
    with Checkpoint.open(REAL / f"{name}.safetensors") as found:
        spec = family_spec(shapes_of(found.tensors))
    assert spec.source == family
    sizes = {group: entry.size for group, entry in spec.groups.items()}
    assert (len(sizes) if isinstance(groups, int) else sizes) == groups


def test_the_digits_lenet_is_what_the_real_files_hold():
    spec = family_spec(shapes_of(DigitsLeNet().state_dict()))
    assert spec.tensors["fc1.weight"].axes == (plain("fc1"), (("conv2", 25),))


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


def adapters(shapes, rank=3):
    found = {}
    for name, shape in shapes.items():
        if re.search(r"(q|v|down)_proj\.weight$", name):
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            found[f"{layer}.lora_A.weight"] = torch.randn(rank, shape[1], dtype=torch.float64)
            found[f"{layer}.lora_B.weight"] = torch.randn(shape[0], rank, dtype=torch.float64)
    return found


def with_adapters(state, tensors):
    """Return the weights to which adapters are added."""
    result = dict(state)
    for name in tensors:
        if name.endswith("lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            weight = f"{layer.removeprefix('base_model.model.')}.weight"
            result[weight] = state[weight] + tensors[f"{layer}.lora_B.weight"] @ tensors[name]
    return result


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 2**32))
def test_an_adapter_is_re_ordered_with_its_base(seed):
    module, inputs, spec, _, _ = made("llama")
    state = module.state_dict()
    torch.manual_seed(0)
    tensors = adapters(shapes_of(state))
    own = adapter_spec(spec, shapes_of(tensors))
    assert {group.size for name, group in own.groups.items() if name.endswith(".rank")} == {3}
    order = random_permutation(spec, seed)
    ranks = {name: vector for name, vector in random_permutation(own, seed).items() if name.endswith(".rank")}
    moved = apply_permutation(own, {**{name: order[name] for name in own.groups if name in order}, **ranks}, tensors)
    expected = output(module, inputs, with_adapters(state, tensors))
    found = output(module, inputs, with_adapters(apply_permutation(spec, order, state), moved))
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_what_is_no_adapter_of_the_base_is_refused():
    spec = made("llama")[2]
    with pytest.raises(MismatchError) as caught:
        adapter_spec(spec, {"base_model.model.other.lora_A.weight": (3, 4), "x": (2, 2)})
    assert len(caught.value.problems) == 2
    assert '"base_model.model.other.lora_A.weight" is no LoRA matrix' in caught.value.problems[0]
