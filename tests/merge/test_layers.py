from __future__ import annotations

import pytest

from graftwork.merge.layers import Stack, find_stacks, is_head_side, layer_of, model_order


def _names(prefix: str, count: int, *suffixes: str) -> list[str]:
    return [f"{prefix}.{index}.{suffix}" for index in range(count) for suffix in suffixes]


@pytest.mark.parametrize(
    "prefix",
    ["model.layers", "transformer.h", "gpt_neox.layers", "backbone.layers", "bert.encoder.layer", "encoder.block"],
)
def test_numbered_layers_are_a_stack(prefix):
    names = ["embed.weight", *_names(prefix, 3, "attn.weight", "mlp.weight"), "norm.weight"]
    assert find_stacks(names) == {prefix: Stack(prefix, 3, True)}


def test_two_stacks_are_found_each_with_its_own_count():
    names = _names("encoder.block", 2, "w") + _names("decoder.block", 3, "w")
    assert [(s.prefix, s.count) for s in find_stacks(names).values()] == [("encoder.block", 2), ("decoder.block", 3)]


def test_a_gap_makes_no_stack():
    assert find_stacks(["classifier.1.weight", "merger.mlp.0.weight", "merger.mlp.2.weight"]) == {}


def test_a_single_layer_makes_no_stack():
    assert find_stacks(["layers.0.weight"]) == {}


def test_experts_inside_layers_are_no_stack():
    names = [f"model.layers.{layer}.experts.{expert}.w" for layer in range(2) for expert in range(4)]
    assert find_stacks(names) == {"model.layers": Stack("model.layers", 2, True)}


def test_layers_with_different_tensors_are_mixed():
    names = [*_names("encoder.block", 3, "layer.0.weight"), "encoder.block.0.bias"]
    assert not find_stacks(names)["encoder.block"].uniform


def test_numbers_that_are_not_plain_indices_make_no_stack():
    assert find_stacks(["a.00.w", "a.01.w", f"b.{'9' * 5000}.w", "b.0.w", "c.².w", "c.³.w"]) == {}


def test_order_of_names_does_not_matter():
    names = _names("h", 12, "a", "b")
    assert find_stacks(reversed(names)) == find_stacks(names)


def test_layer_of_gives_stack_index_and_rest():
    stacks = find_stacks(_names("model.layers", 12, "mlp.w"))
    assert layer_of("model.layers.11.mlp.w", stacks) == (stacks["model.layers"], 11, "mlp.w")
    assert layer_of("model.norm.weight", stacks) is None
    assert layer_of("other.layers.1.w", stacks) is None
    assert layer_of("model.layers.99.mlp.w", stacks) is None


@pytest.mark.parametrize("name", ["model.layers.3.mlp.experts.1.w", "0.weight", "blocks.1"])
def test_a_name_is_rebuilt_from_its_parts(name):
    names = [name] + [name.replace("3", str(i), 1) for i in range(4)] + ["0.weight", "1.weight", "blocks.0", "blocks.1"]
    stack, index, suffix = layer_of(name, find_stacks(names))
    assert stack.tensor(index, suffix) == name


@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", "model.norm.weight", "transformer.ln_f.bias", "bert.pooler.dense.weight", "classifier.bias",
     "embed_out.weight", "vit.layernorm.weight", "encoder.final_layer_norm.weight", "score.weight"],
)  # fmt: skip
def test_heads_and_final_norms_are_on_the_head_side(name):
    assert is_head_side(name)


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "transformer.wpe.weight", "bert.embeddings.LayerNorm.weight", "shared.weight",
     "embeddings.norm.weight", "model.rotary.inv_freq"],
)  # fmt: skip
def test_everything_else_is_on_the_input_side(name):
    assert not is_head_side(name)


def test_model_order_follows_the_data():
    names = ["lm_head.weight", "model.norm.weight", *_names("model.layers", 11, "w"), "model.embed_tokens.weight"]
    ordered = model_order(sorted(names), find_stacks(names))
    assert ordered[0] == "model.embed_tokens.weight"
    assert ordered[1:12] == _names("model.layers", 11, "w")
    assert set(ordered[12:]) == {"lm_head.weight", "model.norm.weight"}


def test_encoders_come_before_decoders():
    names = sorted(_names("decoder.block", 2, "w") + _names("encoder.block", 2, "w"))
    assert model_order(names, find_stacks(names))[0] == "encoder.block.0.w"
