"""What an output folder takes over from its donor, and how its JSON files are edited."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from graftwork.merge.errors import CheckpointError, RecipeError
from graftwork.merge.folder import (
    compare_configs,
    index_json,
    output_config,
    parse_size,
    shard_names,
    side_files,
    weights_order,
)

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 6, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "hidden_act": "silu", "model_type": "llama",
    "torch_dtype": "float32", "vocab_size": 57,
}  # fmt: skip


def touch(folder: Path, *names: str, text: str = "{}") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def copied(folder: Path, **options: bool) -> list[str]:
    return [path.as_posix() for path in side_files(folder, **options)]


# -- side files

TOKENIZER = [
    "added_tokens.json", "merges.txt", "qwen.tiktoken", "sentencepiece.bpe.model", "special_tokens_map.json",
    "spiece.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
]  # fmt: skip
OTHERS = [
    "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "additional_chat_templates/tool.jinja", "chat_template.jinja",
    "chat_template.json", "feature_extractor_config.json", "generation_config.json", "image_processor_config.json",
    "normalizer.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
]  # fmt: skip
NEVER = [
    "model.safetensors", "pytorch_model.bin", "a.pt", "a.pth", "a.ckpt", "tf_model.h5", "flax_model.msgpack", "a.gguf",
    "a.onnx", "model.safetensors.index.json", "optimizer.pt", "optimizer.json", "scheduler.json", "scaler.json",
    "rng_state.json", "trainer_state.json", "training_args.bin", "adapter_config.json", "consolidated.00.json",
    "params.json", "README.md", ".gitattributes", "checkpoint-5/tokenizer.json", "runs/LICENSE",
    "original/tokenizer.model", "onnx/tokenizer.json", "openvino/tokenizer.json", "config.json", "unknown.json",
    "modeling.py", "LICENSE.bin",
]  # fmt: skip


def test_known_files_are_copied_and_nothing_else(tmp_path: Path) -> None:
    touch(tmp_path, *TOKENIZER, *OTHERS, *NEVER)
    assert copied(tmp_path) == sorted([*TOKENIZER, *OTHERS])
    assert copied(tmp_path, copy_tokenizer=False) == sorted(OTHERS)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_custom_code_is_copied_if_a_config_names_it(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "modeling.py", "config.json", "tokenizer_config.json")
    assert "modeling.py" not in copied(tmp_path)
    touch(tmp_path, name, text='{"auto_map": {"AutoModel": "modeling.Model"}}')
    assert "modeling.py" in copied(tmp_path)


def test_the_modules_of_sentence_transformers_keep_their_settings(tmp_path: Path) -> None:
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../outside"}, {"path": 3}, "x"]
    touch(tmp_path, "modules.json", text=json.dumps(modules))
    touch(tmp_path, "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "3_Other/config.json")
    touch(tmp_path, "sentence_bert_config.json", "config_sentence_transformers.json")
    assert copied(tmp_path) == [
        "1_Pooling/config.json", "2_Dense/config.json", "config_sentence_transformers.json", "modules.json",
        "sentence_bert_config.json",
    ]  # fmt: skip


def test_links_are_followed_inside_the_folder_and_into_the_hub_cache_only(tmp_path: Path) -> None:
    model = tmp_path / "models--org--name"
    snapshot = model / "snapshots" / ("a" * 40)
    touch(model, "blobs/b1", "refs/main")
    touch(tmp_path, "secret.json", "models--org--other/blobs/b2")
    touch(snapshot, "vocab.json")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/b1")
    (snapshot / "merges.txt").symlink_to("vocab.json")
    (snapshot / "vocab.txt").symlink_to(tmp_path / "secret.json")
    (snapshot / "LICENSE").symlink_to("../../../models--org--other/blobs/b2")
    (snapshot / "NOTICE").symlink_to("../../refs/main")
    (snapshot / "tokenizer.model").symlink_to("nowhere")
    assert copied(snapshot) == ["merges.txt", "tokenizer.json", "vocab.json"]
    (tmp_path / "short").symlink_to(snapshot)
    assert copied(tmp_path / "short") == ["merges.txt", "tokenizer.json", "vocab.json"]


@pytest.mark.parametrize("text", ["", "[]", "nul", "[" * 10_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_malformed_side_files_are_one_line(tmp_path: Path, name: str, text: str) -> None:
    touch(tmp_path, name, text=text)
    with pytest.raises(CheckpointError) as caught:
        side_files(tmp_path)
    assert name in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(CheckpointError, match="check the path"):
        side_files(tmp_path / "none")


# -- config.json


def edited(config: object, **options: Any) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(output_config(json.dumps(config), **options))
    return result


def test_an_unedited_config_keeps_its_order_values_and_characters() -> None:
    text = json.dumps({"b": 1e-06, "a": "größe", "c": [1, {"z": None}], "big": 2**70}, indent=2, ensure_ascii=False)
    assert output_config(text) == text + "\n"
    assert output_config("\ufeff" + text) == text + "\n"
    assert output_config('{"a": "\\ud800"}').encode() == b'{\n  "a": "\\ud800"\n}\n'


def test_the_dtype_word_is_written_where_it_stands_or_added() -> None:
    assert edited({"torch_dtype": "float32", "x": 1}, dtype="BF16") == {"torch_dtype": "bfloat16", "x": 1}
    nested = {"dtype": "float32", "text_config": {"torch_dtype": "float32"}, "vision_config": {}}
    assert edited(nested, dtype="F16") == {
        "dtype": "float16", "text_config": {"torch_dtype": "float16"}, "vision_config": {}
    }  # fmt: skip
    assert edited({"x": 1}, dtype="F32") == {"x": 1, "torch_dtype": "float32"}
    assert edited({"x": 1}, dtype="float64") == {"x": 1, "torch_dtype": "float64"}


def test_tie_vocabulary_and_token_ids_are_set_where_they_stand() -> None:
    multimodal = {"text_config": {"vocab_size": 5, "eos_token_id": 1}, "bos_token_id": 0}
    ids = {"eos_token_id": 2, "pad_token_id": 3}
    assert edited(multimodal, tie_word_embeddings=False, vocab_size=7, token_ids=ids) == {
        "text_config": {"vocab_size": 7, "eos_token_id": 2, "tie_word_embeddings": False},
        "bos_token_id": 0, "tie_word_embeddings": False, "pad_token_id": 3,
    }  # fmt: skip
    assert edited({"vocab_size": 5}, vocab_size=7, tie_word_embeddings=True) == {
        "vocab_size": 7,
        "tie_word_embeddings": True,
    }


def test_the_old_path_goes_and_quantisation_only_when_it_is_undone() -> None:
    config = {"_name_or_path": "/home/x", "quantization_config": {"a": 1}, "text_config": {"_name_or_path": "y"}}
    assert edited(config) == {"quantization_config": {"a": 1}, "text_config": {}}
    assert edited(config, dequantised=True) == {"text_config": {}}


def test_rope_is_spelled_for_both_transformers() -> None:
    default = {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}
    assert edited(default) == default | {"rope_theta": 500000.0}
    scaled = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}}
    assert edited({"text_config": scaled})["text_config"] == scaled | {
        "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}
    }  # fmt: skip
    both = scaled | {"rope_theta": 1e4}
    assert edited(both) == both
    notes: list[str] = []
    by_type = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}}
    assert edited(by_type, notes=notes) == by_type
    assert "differ by layer type" in notes[0]


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{", "[" * 100_000, '{"a":' * 500 + "1" + "}" * 500, '{"a": ' + "1" * 9_000 + "}"]
)
def test_a_malformed_config_is_one_line(text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        output_config(text, dtype="F32")
    assert len(str(caught.value).splitlines()) == 1


ODD = [None, True, 0, -1, 2, 10**30, 1.5, float("nan"), float("inf"), "", "a\n", "default", "full_attention"]
KEYS = [
    "rope_parameters", "rope_scaling", "rope_theta", "text_config", "dtype", "layer_types", "n_layer", "vocab_size",
    "max_window_layers", "sliding_window_pattern", "attn_layer_period", "attn_layer_offset", "id2label", "type",
    "architectures", "global_attn_every_n_layers", "num_attention_heads", "hidden_size", "mlp_only_layers",
    "a\n_config", "first_k_dense_replace", "rms_norm_eps", "rope_type", "num_kv_shared_layers", "use_sliding_window",
    "odd\nkey",
]  # fmt: skip


def odd(chance: random.Random, depth: int = 0) -> Any:
    """Return any JSON value, of any type."""
    kind = chance.random()
    if depth < 3 and kind < 0.2:
        return [odd(chance, depth + 1) for _ in range(chance.randint(0, 3))]
    if depth < 3 and kind < 0.4:
        return {chance.choice(KEYS): odd(chance, depth + 1) for _ in range(chance.randint(0, 4))}
    return chance.choice(ODD)


@pytest.mark.parametrize("seed", range(20))
def test_odd_types_in_a_config_are_edited_or_refused_but_never_break(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(100):
        config = {key: odd(chance) for key in chance.sample(KEYS, 8)} | {"n_layer": 2}
        text = json.dumps(config)
        output_config(text, dtype="F32", tie_word_embeddings=True, vocab_size=3, token_ids={"eos_token_id": 1})
        lines: list[str] = []
        for options in ({"stack_count": 2}, {"layers_key": "n_layer"}):
            try:
                output_config(text, layer_sources=[(config, 1), (config, 0), ({}, 1)], notes=lines, **options)
            except CheckpointError as error:
                lines.append(str(error))
        errors, warnings = compare_configs([("a", config), ("b\n", LLAMA)], method_uses_base=True, base="a")
        for line in [*lines, *errors, *warnings]:
            assert len(line.splitlines()) == 1


# -- layers


def stack_of(*sources: tuple[dict[str, Any], int], **options: Any) -> dict[str, Any]:
    return edited(sources[0][0], layer_sources=sources, stack_count=6, **options)


def test_layer_lists_are_rebuilt_from_each_layers_own_source() -> None:
    one = LLAMA | {"layer_types": ["f", "s"] * 3, "mlp_only_layers": [0, 5], "eos_token_id": [1, 2, 3, 4, 5, 6]}
    two = LLAMA | {"layer_types": ["x"] * 6, "mlp_only_layers": [2]}
    sources = [*((one, index) for index in range(4)), *((two, index) for index in range(2, 6))]
    result = stack_of(*sources)
    assert result["num_hidden_layers"] == 8
    assert result["layer_types"] == ["f", "s", "f", "s", "x", "x", "x", "x"]
    assert result["mlp_only_layers"] == [0, 4]
    assert result["eos_token_id"] == [1, 2, 3, 4, 5, 6]
    assert list(result) == list(one)


def test_a_source_without_the_list_uses_the_donors() -> None:
    one = LLAMA | {"layer_types": list("abcdef")}
    assert stack_of((one, 0), (LLAMA, 5))["layer_types"] == ["a", "f"]
    with pytest.raises(CheckpointError, match="element 6 of a list of 6"):
        stack_of((one, 0), (LLAMA, 6))


def test_an_unchanged_stack_changes_nothing() -> None:
    config = LLAMA | {"max_window_layers": 3, "use_sliding_window": True}
    assert stack_of(*((config, index) for index in range(6))) == config


def test_the_layer_count_is_found_in_a_sub_configuration() -> None:
    config = {"text_config": LLAMA, "vision_config": {"depth": 4}}
    result = stack_of(*[(config, 0)] * 7)
    assert result["text_config"]["num_hidden_layers"] == 7
    assert result["vision_config"] == {"depth": 4}
    equal = {"text_config": LLAMA, "vision_config": {"depth": 6}}
    with pytest.raises(CheckpointError, match=r"text_config.num_hidden_layers, vision_config.depth; .*`modules:`"):
        stack_of(*[(equal, 0)] * 7)
    assert stack_of(*[(equal, 0)] * 7, section="vision_config")["vision_config"]["depth"] == 7
    assert (
        stack_of(*[(equal, 0)] * 7, layers_key="text_config.num_hidden_layers")["text_config"]["num_hidden_layers"] == 7
    )


def test_no_or_two_layer_counts_ask_for_the_key() -> None:
    with pytest.raises(CheckpointError, match=r"key that is 6, .*\(there is n_layer = 5\); name it with --layers-key"):
        stack_of(({"n_layer": 5}, 0))
    with pytest.raises(CheckpointError, match=r"several keys.*choose with --layers-key"):
        stack_of(({"num_layers": 6, "num_decoder_layers": 6}, 0))
    assert stack_of(({"num_layers": 6, "num_decoder_layers": 6}, 0), layers_key="num_layers")["num_layers"] == 1
    for key in ("nothing", "n.o"):
        with pytest.raises(CheckpointError, match="give the key that holds it"):
            stack_of((LLAMA, 0), layers_key=key)


def test_a_rule_by_position_is_kept_where_it_still_fits() -> None:
    config = LLAMA | {"sliding_window_pattern": 3}
    result = stack_of(*((config, index) for index in (0, 1, 2, 0, 1, 2, 3, 4, 5)))
    assert "layer_types" not in result
    config = LLAMA | {"max_window_layers": 3, "use_sliding_window": False}
    assert "layer_types" not in stack_of(*((config, index) for index in (0, 5, 0)))


@pytest.mark.parametrize(
    ("rule", "layers", "name", "expected"),
    [
        ({"sliding_window_pattern": 3}, (2, 3), "layer_types", ["full_attention", "sliding_attention"]),
        (
            {"max_window_layers": 3, "use_sliding_window": True},
            (2, 3),
            "layer_types",
            ["full_attention", "sliding_attention"],
        ),
        ({"full_attention_interval": 2}, (1, 2), "layer_types", ["full_attention", "linear_attention"]),
        ({"global_attn_every_n_layers": 2}, (0, 2), "layer_types", ["full_attention", "full_attention"]),
        ({"no_rope_layer_interval": 2}, (1, 2), "no_rope_layers", [0, 1]),
    ],
)
def test_a_rule_that_no_longer_fits_is_spelled_out_and_said(
    rule: dict[str, Any], layers: tuple[int, ...], name: str, expected: list[Any]
) -> None:
    notes: list[str] = []
    result = stack_of(*((LLAMA | rule, index) for index in layers), notes=notes)
    assert result[name] == expected
    assert next(iter(rule)) in notes[0]


@pytest.mark.parametrize(
    "rule",
    [{"first_k_dense_replace": 1}, {"decoder_sparse_step": 2}, {"num_kv_shared_layers": 2},
     {"attn_layer_period": 2, "attn_layer_offset": 1}],
)  # fmt: skip
def test_a_rule_that_no_list_can_say_is_refused_with_the_first_layer(rule: dict[str, int]) -> None:
    config = LLAMA | rule
    with pytest.raises(CheckpointError, match="output layer 1 would not be"):
        stack_of((config, 0), (config, 0), (config, 4))


# -- differences


def compared(*configs: dict[str, Any], **options: Any) -> tuple[list[str], list[str]]:
    named = list(zip("abcdef", configs, strict=False))
    return compare_configs(named, **({"method_uses_base": False, "base": None} | options))


def test_equal_configs_and_single_ones_say_nothing() -> None:
    assert compared(LLAMA, dict(LLAMA)) == ([], [])
    assert compared(LLAMA) == ([], [])
    assert compared() == ([], [])


def test_the_forms_of_transformers_4_and_5_compare_equal() -> None:
    four = LLAMA | {
        "rope_scaling": {"type": "llama3", "factor": 8.0}, "_name_or_path": "x", "transformers_version": "4.57.6",
        "pad_token_id": None,
    }  # fmt: skip
    five = {key: value for key, value in LLAMA.items() if key not in ("rope_theta", "torch_dtype")} | {
        "dtype": "bfloat16", "head_dim": 4, "layer_types": ["full_attention"] * 6, "transformers_version": "5.23.0",
        "rope_parameters": {"rope_theta": 10000, "rope_type": "llama3", "factor": 8.0},
    }  # fmt: skip
    assert compared(four, five) == ([], [])


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model_type", "qwen2", "error"), ("architectures", ["Qwen2ForCausalLM"], "error"),
        ("architectures", ["LlamaForSequenceClassification"], "warning"), ("hidden_act", "gelu", "error"),
        ("num_attention_heads", 8, "error"), ("num_key_value_heads", 4, "error"), ("head_dim", 8, "error"),
        ("rms_norm_eps", 1e-5, "warning"), ("rms_norm_eps", 2e-5, "error"), ("rope_theta", 500000.0, "error"),
        ("rope_theta", 10001.0, "warning"), ("rope_theta", None, "error"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}, "error"), ("partial_rotary_factor", 0.5, "error"),
        ("attention_multiplier", 2.0, "error"), ("num_experts_per_tok", 2, "error"), ("is_decoder", True, "error"),
        ("is_decoder", False, "silent"), ("max_position_embeddings", 4096, "warning"), ("sliding_window", 5, "warning"),
        ("layer_types", ["sliding_attention"] * 6, "warning"), ("attention_dropout", 0.1, "warning"),
        ("attention_dropout", 0.0, "silent"), ("tie_word_embeddings", True, "warning"), ("eos_token_id", 5, "warning"),
        ("vocab_size", 58, "silent"), ("intermediate_size", 16, "silent"), ("num_hidden_layers", 5, "silent"),
        ("use_cache", False, "silent"), ("torch_dtype", "float16", "silent"), ("initializer_range", 1, "silent"),
        ("temperature", 0.5, "silent"), ("something_new", 1, "warning"),
        ("quantization_config", {"quant_method": "x"}, "error"),
    ],
)  # fmt: skip
def test_each_difference_has_its_class(key: str, value: object, expected: str) -> None:
    errors, warnings = compared(LLAMA, LLAMA | {key: value})
    found = "error" if errors else "warning" if warnings else "silent"
    assert found == expected, (errors, warnings)
    for line in [*errors, *warnings]:
        assert len(line.splitlines()) == 1


def test_a_difference_is_one_line_with_every_value_and_the_outputs() -> None:
    errors, warnings = compared(LLAMA, LLAMA, LLAMA | {"rope_theta": 5e5}, base="c", method_uses_base=True)
    assert warnings == []
    assert errors == [
        'config key "rope_theta" differs: "a" and "b" have 10000.0, "c" has 500000.0; the output gets 500000.0 from '
        '"c" (the base); merge models that agree, or accept it with --allow-config rope_theta'
    ]
    errors, warnings = compared(LLAMA, LLAMA | {"rope_theta": 5e5}, allowed=["rope_theta"])
    assert errors == []
    assert warnings[0].endswith('the output gets 10000.0 from "a"')


def test_class_names_in_another_order_are_an_error() -> None:
    one, two = {"0": "cat", "1": "dog"}, {"0": "dog", "1": "cat"}
    assert len(compared({"id2label": one}, {"id2label": two})[0]) == 1
    assert len(compared({"id2label": one}, {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}})[1]) == 1


def test_sub_configurations_are_compared_under_dotted_names() -> None:
    errors, _ = compared({"text_config": LLAMA}, {"text_config": LLAMA | {"hidden_act": "gelu"}})
    assert '"text_config.hidden_act"' in errors[0]
    assert (
        compared({"text_config": LLAMA}, {"text_config": LLAMA | {"hidden_act": "gelu"}}, allowed=["hidden_act"])[0]
        == []
    )


# -- shards


def test_the_index_always_has_metadata() -> None:
    text = index_json({"b": "model-00001-of-00002.safetensors", "a": "x"}, 10, 5)
    assert json.loads(text) == {
        "metadata": {"total_size": 10, "total_parameters": 5},
        "weight_map": {"b": "model-00001-of-00002.safetensors", "a": "x"},
    }
    assert text.endswith("}\n")


def test_shards_are_numbered_from_one() -> None:
    assert shard_names(1) == shard_names(0) == ["model.safetensors"]
    assert shard_names(2) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("5B", 5 * 10**9), ("500M", 5 * 10**8), ("20K", 20_000), ("5GB", 5 * 10**9), ("20KB", 20_000), ("5GiB", 5 * 2**30),
     ("1.5B", 1_500_000_000), ("12345", 12345), (" 5 gb ", 5 * 10**9), ("0.1K", 100), ("2T", 2 * 10**12)],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "0", "-5GB", "5XB", "GB", "1.5", "1e9", "5 G B", "0.0001K", "٥GB", "9" * 100, "x\ny", "inf"]
)
def test_other_sizes_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_size(text)
    assert len(str(caught.value).splitlines()) == 1


def test_weights_are_written_as_data_flows() -> None:
    names = [
        "lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.weight", "model.layers.1.mlp.weight",
        "model.layers.10.mlp.weight", *(f"model.layers.{index}.mlp.weight" for index in range(2, 10)),
        "model.norm.weight",
    ]  # fmt: skip
    expected = [
        "model.embed_tokens.weight", *(f"model.layers.{index}.mlp.weight" for index in range(11)),
        "model.norm.weight", "lm_head.weight",
    ]  # fmt: skip
    assert weights_order(names) == weights_order(reversed(names)) == expected
    assert weights_order([]) == []
