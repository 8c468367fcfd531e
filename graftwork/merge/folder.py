"""Everything around the weights of a Hugging Face model folder: side files, `config.json`, the index of shards.

JSON is edited as JSON: named keys change, all others keep their value and their place. No transformers class is
involved, because writing a file back through one changes more than was asked for.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

from graftwork.merge.checkpoint import JSON_LIMIT, module_folders, parse_json, quoted, read_json_object, shown
from graftwork.merge.dtypes import TORCH_NAMES
from graftwork.merge.errors import CheckpointError, RecipeError
from graftwork.merge.layers import find_stacks, is_head_side, model_order

# ---------------------------------------------------------------------------------------------------------------------
# Side files

_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "*.tiktoken", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
_COPIED = (
    "generation_config.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*",
    "preprocessor_config.json", "processor_config.json", "image_processor*", "video_preprocessor_config.json",
    "feature_extractor*", "normalizer.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_SENTENCE_TRANSFORMERS = (
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "sentence_*_config.json",
)  # fmt: skip
_NEVER = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.index.json",
    "optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json", "adapter_*", "consolidated*",
    "params.json", "README.md", ".*", "config.json",
)  # fmt: skip
_PIPELINE_ROOT = ("model_index.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
_PIPELINE = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*")
_NOT_PIPELINE = ("*.index.json", "trainer_state.json", ".*")
_NEVER_FOLDERS = ("checkpoint-*", "runs", "original", "onnx", "openvino", ".*")


def side_files(folder: Path, *, copy_tokenizer: bool = True) -> list[Path]:
    """Return the files that an output takes over from the donor `folder`, relative to it and sorted.

    Only known names are copied, never weights or the traces of a training run. `config.json` is not among them: it is
    edited (`output_config`). Links that leave the folder are skipped, unless they lead into the blobs of the hub cache
    that the folder belongs to.
    """
    doing = f"cannot copy the side files of {quoted(folder)}"
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{doing}: {error.strerror or error}; check the path") from None
    if "model_index.json" in names:
        return _pipeline_files(folder, names, copy_tokenizer=copy_tokenizer)
    allowed = [*_COPIED, *(_TOKENIZER if copy_tokenizer else ())]
    if _has_custom_code(folder, names, doing):
        allowed.append("*.py")
    inner = [("additional_chat_templates", ("*",))]
    if "modules.json" in names:
        allowed += _SENTENCE_TRANSFORMERS
        tokenizer = _TOKENIZER if copy_tokenizer else ()
        inner += [
            (name, ("config.json", "sentence_*_config.json", *tokenizer))
            for name in module_folders(folder / "modules.json", doing=doing)
        ]
    found = [
        Path(name)
        for name in names
        if _matches(name, allowed) and not _matches(name, _NEVER) and _is_ours(folder, name)
    ]
    for sub_folder, patterns in inner:
        if sub_folder not in names or _matches(sub_folder, _NEVER_FOLDERS) or not (folder / sub_folder).is_dir():
            continue
        for name in sorted(os.listdir(folder / sub_folder)):
            # A module's own config.json is copied: only the one of the root is edited.
            refused = name != "config.json" and _matches(name, _NEVER)
            if _matches(name, patterns) and not refused and _is_ours(folder, f"{sub_folder}/{name}"):
                found.append(Path(sub_folder) / name)
    return sorted(set(found))


def _pipeline_files(folder: Path, names: Sequence[str], *, copy_tokenizer: bool) -> list[Path]:
    """Return the files of a diffusers pipeline that are no weights: its own, and those of its components."""
    found = [Path(name) for name in names if _matches(name, _PIPELINE_ROOT) and _is_ours(folder, name)]
    for sub_folder in names:
        is_tokenizer = sub_folder.startswith("tokenizer") and not copy_tokenizer
        if not (folder / sub_folder).is_dir() or _matches(sub_folder, _NEVER_FOLDERS) or is_tokenizer:
            continue
        for name in sorted(os.listdir(folder / sub_folder)):
            inside = f"{sub_folder}/{name}"
            if _matches(name, _PIPELINE) and not _matches(name, _NOT_PIPELINE) and _is_ours(folder, inside):
                found.append(Path(inside))
    return sorted(found)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _has_custom_code(folder: Path, names: Collection[str], doing: str) -> bool:
    """Say whether a configuration names Python code of its own (which is copied, never run)."""
    return any(
        "auto_map" in read_json_object(folder / name, doing=doing)
        for name in ("config.json", "tokenizer_config.json")
        if name in names
    )


def _is_ours(folder: Path, name: str) -> bool:
    """Say whether `name` is a regular file that lies in the folder, or in the hub cache that the folder is part of."""
    path = folder / name
    if not path.is_file():
        return False
    home, target = folder.resolve(), path.resolve()
    if target.is_relative_to(home):
        return True
    # models--ORG--NAME/snapshots/COMMIT/… links to models--ORG--NAME/blobs/…
    for place in (home, *home.parents):
        if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
            return target.is_relative_to(place.parent.parent / "blobs")
    return False


# ---------------------------------------------------------------------------------------------------------------------
# config.json of the output

LAYER_KEYS = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers",
    "num_decoder_layers", "depth",
)  # fmt: skip
"""Keys of `config.json` that hold the number of layers."""
_LAYER_INDEX_LISTS = (
    "mlp_only_layers", "moe_layers", "cross_attention_layers", "full_attn_idxs", "attn_layer_indices",
    "kv_source_layers",
)  # fmt: skip
_NOT_PER_LAYER = frozenset(
    {"architectures", "keys_to_ignore_at_inference", "suppress_tokens", "begin_suppress_tokens", "image_size",
     "bos_token_id", "eos_token_id", "pad_token_id", "image_mean", "image_std", "mrope_section", "input_size"}
)  # fmt: skip
"""Lists that may happen to be as long as the stack but say nothing about layers."""


def _every(value: int, index: int, count: int) -> bool:
    return (index + 1) % value == 0


class _Rule:
    """A key that decides by the position of a layer what kind of layer it is."""

    def __init__(
        self,
        key: str,
        marks: Callable[[int, int, int], bool],
        *,
        least: int = 1,
        kinds: tuple[str, str] | None = None,
        explicit: tuple[str, tuple[Any, Any]] | None = None,
    ) -> None:
        self.key = key
        self.marks = marks
        self.least = least
        self.explicit = ("layer_types", kinds) if kinds else explicit
        """The list that can say the same layer by layer, with its words for unmarked and marked layers."""


_RULES = (
    _Rule("max_window_layers", lambda value, i, n: i >= value, least=0, kinds=("full_attention", "sliding_attention")),
    _Rule("sliding_window_pattern", _every, kinds=("sliding_attention", "full_attention")),
    _Rule("full_attention_interval", _every, kinds=("linear_attention", "full_attention")),
    _Rule(
        "global_attn_every_n_layers", lambda value, i, n: i % value == 0, kinds=("sliding_attention", "full_attention")
    ),
    _Rule("no_rope_layer_interval", _every, explicit=("no_rope_layers", (1, 0))),
    _Rule("decoder_sparse_step", _every),
    _Rule("first_k_dense_replace", lambda value, i, n: i >= value, least=0),
    _Rule("num_kv_shared_layers", lambda value, i, n: i >= n - value, least=0),
)
_PERIODS = (("attn_layer_period", "attn_layer_offset"), ("expert_layer_period", "expert_layer_offset"))


def output_config(
    config_text: str,
    *,
    dtype: str | None = None,
    layer_sources: Sequence[tuple[Mapping[str, Any], int]] | None = None,
    stack_count: int | None = None,
    layers_key: str | None = None,
    section: str | None = None,
    vocab_size: int | None = None,
    tie_word_embeddings: bool | None = None,
    token_ids: Mapping[str, int | list[int]] | None = None,
    dequantised: bool = False,
    notes: list[str] | None = None,
) -> str:
    """Return the output's `config.json`, made from the text of the donor's.

    Args:
        config_text: The donor's file.
        dtype: The dtype of the output's weights, as safetensors code (`BF16`) or as torch's word.
        layer_sources: For every layer of the output, the configuration of its source and its index there.
        stack_count: How many layers the donor's stack has.
        layers_key: The key with the number of layers, if it cannot be found; dotted for a sub-configuration.
        section: The sub-configuration of the stack, such as `text_config`; found by itself if None.
        vocab_size: The rows of the output's embedding.
        tie_word_embeddings: Whether the output's head is its embedding.
        token_ids: Token ids that changed, such as `eos_token_id`.
        dequantised: The output's weights are no longer packed.
        notes: Gets a line for each edit that a user should know of.
    """
    notes = [] if notes is None else notes
    config = _parse_config(config_text)
    if layer_sources is not None:
        _edit_layers(config, layer_sources, stack_count, layers_key, section, notes)
    for place, level in _levels(config):
        level.pop("_name_or_path", None)
        if dequantised:
            level.pop("quantization_config", None)
        _spell_rope_twice(level, place, notes)
    if dtype is not None:
        _set_dtype(config, TORCH_NAMES.get(dtype, dtype))
    text_config = config.get("text_config")
    homes = [config, text_config] if isinstance(text_config, dict) else [config]
    if tie_word_embeddings is not None:
        for home in homes:
            home["tie_word_embeddings"] = tie_word_embeddings
    if vocab_size is not None:
        # Only where the key is: a root without it would show two sizes.
        for home in [home for home in homes if "vocab_size" in home] or [homes[-1]]:
            home["vocab_size"] = vocab_size
    for key, value in (token_ids or {}).items():
        for home in [home for home in homes if key in home] or [config]:
            home[key] = value
    return _dump(config)


def _parse_config(text: str) -> dict[str, Any]:
    doing = "cannot edit config.json"
    if len(text) > JSON_LIMIT:
        raise CheckpointError(f"{doing}: it has {len(text)} characters; check that it is what its name says")
    try:
        config = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{doing}: {error}; repair it or fetch it again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{doing}: it holds {shown(config)}, not a JSON object; repair it or fetch it again")
    return config


def _dump(value: Any) -> str:
    """Return JSON as model folders have it: indent 2, characters as they are, a newline at the end."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    return text + "\n"


def _levels(config: dict[str, Any], place: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Return a configuration and all of its sub-configurations, each with its dotted place."""
    levels = [(place, config)]
    for key, value in config.items():
        if _is_section(key, value):
            levels += _levels(value, f"{place}{key}.")
    return levels


def _is_section(key: str, value: object) -> bool:
    """Say whether a key holds a sub-configuration, such as `text_config`."""
    return isinstance(value, dict) and key != "quantization_config" and re.fullmatch(r"\w+_config", key) is not None


def _set_dtype(config: dict[str, Any], word: str) -> None:
    found = False
    for _, level in _levels(config):
        for key in ("dtype", "torch_dtype"):
            if key in level:
                level[key] = word
                found = True
    if not found:
        config["torch_dtype"] = word


def _is_flat(value: object) -> bool:
    return isinstance(value, dict) and not any(isinstance(item, dict) for item in value.values())


def _spell_rope_twice(level: dict[str, Any], place: str, notes: list[str]) -> None:
    """Add the rope keys of transformers 4 to a configuration that has only those of transformers 5.

    Without them the older version silently uses its default base frequency.
    """
    parameters = level.get("rope_parameters")
    if not isinstance(parameters, dict) or not parameters:
        return
    if not _is_flat(parameters):
        if "rope_theta" not in level:
            notes.append(
                f"config.json: {place}rope_parameters differ by layer type, which transformers 4 does not read; "
                "load the output with transformers 5"
            )
        return
    if level.get("rope_theta") is not None or level.get("rope_scaling") is not None:
        return
    if isinstance(parameters.get("rope_theta"), int | float):
        level["rope_theta"] = parameters["rope_theta"]
    if parameters.get("rope_type", "default") != "default":
        level["rope_scaling"] = {key: value for key, value in parameters.items() if key != "rope_theta"}
    if "partial_rotary_factor" in parameters and "partial_rotary_factor" not in level:
        notes.append(
            f"config.json: {place}partial_rotary_factor stands in rope_parameters only; transformers 4 does not see it"
        )


# -- layers


def _edit_layers(
    config: dict[str, Any],
    layer_sources: Sequence[tuple[Mapping[str, Any], int]],
    stack_count: int | None,
    layers_key: str | None,
    section: str | None,
    notes: list[str],
) -> None:
    """Rewrite the number of layers and everything that says something layer by layer."""
    place, key, old = _layers_key(config, stack_count, layers_key, section)
    level = dict(_levels(config))[place]
    sources = [(_level_of(source, place), index) for source, index in layer_sources]
    new = len(sources)
    if [index for _, index in sources] == list(range(old)) and all(source == level for source, _ in sources):
        return
    donor = copy.deepcopy(level)
    level[key] = new
    for name, value in donor.items():
        if name in _LAYER_INDEX_LISTS and isinstance(value, list):
            level[name] = [
                j
                for j, (source, index) in enumerate(sources)
                if isinstance(kept := source.get(name, value), list) and index in kept
            ]
        elif isinstance(value, list) and len(value) == old and name not in _NOT_PER_LAYER:
            level[name] = [_element(source, name, index, value, j) for j, (source, index) in enumerate(sources)]
    _check_rules(level, donor, place, key, old, sources, notes)


def _element(source: Mapping[str, Any], name: str, index: int, fallback: list[Any], layer: int) -> Any:
    """Return what a per-layer list says of a layer, in the configuration where the layer comes from."""
    values = source.get(name)
    if not isinstance(values, list):
        values = fallback
    if not 0 <= index < len(values):
        raise CheckpointError(
            f"cannot edit config.json: {quoted(name)} of output layer {layer} would be element {index} of a list of "
            f"{len(values)}; correct the list in the source's config.json"
        )
    return values[index]


def _level_of(source: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    level: Any = source
    for name in place.split(".")[:-1]:
        level = level.get(name) if isinstance(level, Mapping) else None
    # A text-only relative of a multimodal donor has its keys at the root.
    return level if isinstance(level, Mapping) else source


def _layers_key(
    config: dict[str, Any], stack_count: int | None, layers_key: str | None, section: str | None
) -> tuple[str, str, int]:
    """Return the place of the stack's configuration, the key with its number of layers, and that number."""
    doing = "cannot edit the number of layers in config.json"
    levels = dict(_levels(config))
    if layers_key is not None:
        place, dot, key = layers_key.rpartition(".")
        place += dot
        value = levels.get(place, {}).get(key)
        if type(value) is not int:
            raise CheckpointError(
                f"{doing}: {quoted(layers_key)} is {shown(value)}, not a number of layers; give the key that holds it"
            )
        if stack_count is not None and value != stack_count:
            raise CheckpointError(
                f"{doing}: {quoted(layers_key)} is {shown(value)}, the weights have {stack_count} layers; "
                "merge whole models instead"
            )
        return place, key, value
    if section is not None:
        levels = {place: level for place, level in levels.items() if place == f"{section}."}
    found = [
        (place, key, level[key])
        for place, level in levels.items()
        for key in LAYER_KEYS
        if type(level.get(key)) is int and (stack_count is None or level[key] == stack_count)
    ]
    at_root = [match for match in found if match[0] == ""]
    found = at_root or found
    if len(found) == 1:
        return found[0]
    layers = "" if stack_count is None else f" that is {stack_count}, as in the weights"
    if not found:
        present = [
            f"{place}{key} = {shown(level[key])}"
            for place, level in levels.items()
            for key in LAYER_KEYS
            if key in level
        ]
        seen = f" (there is {', '.join(present)})" if present else ""
        raise CheckpointError(f"{doing}: no known key{layers}{seen}; name it with --layers-key")
    keys = ", ".join(f"{place}{key}" for place, key, _ in found)
    raise CheckpointError(
        f"{doing}: several keys{layers}: {keys}; choose with --layers-key, or name the part that is sliced "
        "with `modules:`"
    )


def _check_rules(
    level: dict[str, Any],
    donor: Mapping[str, Any],
    place: str,
    key: str,
    old: int,
    sources: Sequence[tuple[Mapping[str, Any], int]],
    notes: list[str],
) -> None:
    """Make sure that rules by position say of every output layer what they say of its source."""
    new = len(sources)

    def count_of(source: Mapping[str, Any]) -> int:
        count = source.get(key)
        return count if type(count) is int else old

    for rule in _RULES:
        value = donor.get(rule.key)
        if type(value) is not int or value < rule.least:
            continue
        if rule.explicit and isinstance(donor.get(rule.explicit[0]), list):
            continue  # the list counts, and it has been rebuilt
        if rule.key == "max_window_layers" and not donor.get("use_sliding_window"):
            continue
        wanted = []
        for source, index in sources:
            theirs = source.get(rule.key, value)
            if type(theirs) is not int or theirs < rule.least:
                theirs = value
            wanted.append(rule.marks(theirs, index, count_of(source)))
        got = [rule.marks(value, j, new) for j in range(new)]
        if wanted == got:
            continue
        first = next(j for j in range(new) if wanted[j] != got[j])
        if rule.explicit is None:
            raise CheckpointError(
                f"cannot edit config.json: by {place}{rule.key} = {value} output layer {first} would not be the kind "
                f"of layer that its source layer {sources[first][1]} is; choose layers whose positions agree"
            )
        name, words = rule.explicit
        level[name] = [words[marked] for marked in wanted]
        notes.append(
            f"config.json: {place}{name} was written, because {rule.key} = {value} no longer fits from layer {first} on"
        )
    for period_key, offset_key in _PERIODS:
        period, offset = donor.get(period_key), donor.get(offset_key, 0)
        if type(period) is not int or type(offset) is not int or period <= 0:
            continue
        if isinstance(donor.get("layers_block_type"), list) and period_key == "attn_layer_period":
            continue
        for j, (_, index) in enumerate(sources):
            if (index % period == offset) != (j % period == offset):
                raise CheckpointError(
                    f"cannot edit config.json: by {place}{period_key} = {period} output layer {j} would not be the "
                    f"kind of layer that its source layer {index} is; choose layers whose positions agree"
                )


# ---------------------------------------------------------------------------------------------------------------------
# Differences between input configurations

_ALIASES = MappingProxyType(
    {"n_head": "num_attention_heads", "num_heads": "num_attention_heads", "n_embd": "hidden_size",
     "d_model": "hidden_size", "activation_function": "hidden_act", "hidden_activation": "hidden_act",
     "dtype": "torch_dtype", "layer_norm_epsilon": "layer_norm_eps", "norm_epsilon": "layer_norm_eps",
     "layernorm_epsilon": "layer_norm_eps", "norm_eps": "layer_norm_eps"}
)  # fmt: skip
_ERRORS = frozenset(
    {"model_type", "architectures", "hidden_act", "num_attention_heads", "num_key_value_heads", "head_dim",
     "rope_type", "partial_rotary_factor", "rotary_pct", "rotary_dim", "attention_multiplier", "logit_scale",
     "logits_scaling", "logits_scale", "embedding_multiplier", "residual_multiplier", "scale_emb", "scale_depth",
     "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "num_experts_per_tok",
     "is_decoder", "quantization_config"}
)  # fmt: skip
_FROM_HEADERS = frozenset(
    {"hidden_size", "intermediate_size", "n_inner", "ffn_dim", "vocab_size", "attention_bias", "mlp_bias", "bias",
     "qkv_bias", "use_bias", *LAYER_KEYS}
)  # fmt: skip
"""What shapes and names of tensors show anyway; it is reported there and not twice."""
_SILENT = frozenset(
    {"_name_or_path", "transformers_version", "use_cache", "torch_dtype", "initializer_range", "label2id",
     "gradient_checkpointing", "max_length", "min_length", "max_new_tokens", "do_sample", "num_beams", "temperature",
     "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "early_stopping",
     "num_return_sequences", "output_scores", "return_dict_in_generate", "diversity_penalty", "num_beam_groups",
     "bad_words_ids", "output_attentions", "output_hidden_states", "return_dict", "torchscript", "use_bfloat16",
     "chunk_size_feed_forward", "finetuning_task", "task_specific_params", "problem_type", "auto_map"}
)  # fmt: skip
_DEFAULT_FALSE = frozenset({"is_decoder", "is_encoder_decoder", "add_cross_attention"})
_EPS_RATIO = 10
_THETA_RATIO = 1.001
_ABSENT = object()
_HEAD_CLASS = re.compile(r"(For[A-Z]\w*|LMHeadModel|DoubleHeadsModel|EncoderModel|PreTrainedModel|Model)$")


def compare_configs(
    configs: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    method_uses_base: bool,
    base: str | None,
    allowed: Collection[str] = (),
) -> tuple[list[str], list[str]]:
    """Return (errors, warnings) about keys in which the inputs' configurations differ, one line per key.

    A difference is an error where the weights would still fit together but the numbers would mean something else.

    Args:
        configs: The name of each input and its `config.json`, in the order of the recipe.
        method_uses_base: The method merges differences to the base.
        base: The name of the base model; it gives the output its configuration. Without it the first input does.
        allowed: Keys whose errors are lowered to warnings (`--allow-config`).
    """
    errors: list[str] = []
    warnings: list[str] = []
    if len(configs) < 2:
        return errors, warnings
    labels = [label for label, _ in configs]
    donor = labels.index(base) if base in labels else 0
    tables = [_normalised(config) for _, config in configs]
    keys = list(dict.fromkeys(key for table in (tables[donor], *tables) for key in table))
    for key in keys:
        values = [table.get(key, _ABSENT) for table in tables]
        if all(_same(value, values[0]) for value in values):
            continue
        verdict = _classify(key, values)
        if verdict == "silent":
            continue
        name = key.rpartition(".")[2]
        line = (
            f"config key {quoted(key)} differs: {_per_model(labels, values)}; the output gets {_value(values[donor])}"
        )
        line += f" from {quoted(labels[donor])}"
        if verdict == "error" and not {key, name} & set(allowed):
            role = " (the base)" if method_uses_base and labels[donor] == base else ""
            flag = key if key.isprintable() else quoted(key)
            errors.append(f"{line}{role}; merge models that agree, or accept it with --allow-config {flag}")
        else:
            warnings.append(line)
    return errors, warnings


def _per_model(labels: Sequence[str], values: Sequence[Any]) -> str:
    """Return `"a" and "b" have 1, "c" has 2`."""
    groups: list[tuple[Any, list[str]]] = []
    for label, value in zip(labels, values, strict=True):
        group = next((names for other, names in groups if _same(other, value)), None)
        if group is None:
            groups.append((value, [label]))
        else:
            group.append(label)
    return ", ".join(
        f"{' and '.join(quoted(name, 80) for name in names)} {'have' if len(names) > 1 else 'has'} {_value(value)}"
        for value, names in groups
    )


def _value(value: Any) -> str:
    if value is _ABSENT:
        return "no value"
    if isinstance(value, dict | list):
        text = json.dumps(value)
        return text if len(text) <= 120 else f"{text[:100]}…"
    return shown(value)


def _same(left: Any, right: Any) -> bool:
    if left is _ABSENT or right is _ABSENT:
        return left is right
    return bool(left == right) and (type(left) is type(right) or _number(left) is not None)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _classify(key: str, values: Sequence[Any]) -> str:
    """Return `error`, `warning` or `silent` for a key whose values differ."""
    name = key.rpartition(".")[2]
    if name in _SILENT or name in _FROM_HEADERS or name.startswith("_"):
        return "silent"
    if name == "architectures":
        stems = {_stem(value) for value in values}
        return "warning" if len(stems) == 1 and None not in stems else "error"
    if name == "rope_theta":
        return "error" if _ratio(values) > _THETA_RATIO else "warning"
    if name in {"rms_norm_eps", "layer_norm_eps"}:
        present = [value for value in values if value is not _ABSENT]
        # A hair above ten, because 1e-5 / 1e-6 is.
        return "error" if _ratio(present) > _EPS_RATIO * 1.000001 else "warning"
    if name == "id2label":
        return "error" if _labels_are_permuted(values) else "warning"
    if name.endswith(("_dropout", "_pdrop", "_drop")) and all(value is _ABSENT or value == 0 for value in values):
        return "silent"
    return "error" if name in _ERRORS else "warning"


def _stem(architectures: Any) -> str | None:
    """Return the model's name without its head (`LlamaForCausalLM` → `Llama`), or None if it cannot be told."""
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        return None
    return _HEAD_CLASS.sub("", architectures[0])


def _ratio(values: Sequence[Any]) -> float:
    """Return the largest value by the smallest; infinite if one of them is no positive number."""
    numbers = [_number(value) for value in values]
    positive = [number for number in numbers if number is not None and 0 < number < math.inf]
    return max(positive) / min(positive) if positive and len(positive) == len(numbers) else math.inf


def _labels_are_permuted(values: Sequence[Any]) -> bool:
    """Say whether two models give the same class names to different outputs."""
    tables = [value for value in values if isinstance(value, dict)]
    for left in tables:
        for right in tables:
            places = {str(label): str(index) for index, label in left.items()}
            if any(str(label) in places and places[str(label)] != str(index) for index, label in right.items()):
                return True
    return False


def _normalised(config: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Return a configuration under one spelling, flat: sub-configurations get dotted keys."""
    table: dict[str, Any] = {}
    for key, value in config.items():
        if value is None:
            continue  # null is how transformers writes an absent value
        if _is_section(key, value):
            table |= _normalised(value, f"{place}{key}.")
        elif not (key in _DEFAULT_FALSE and value is False):
            table[place + _ALIASES.get(key, key)] = value
    kinds = table.get(f"{place}layer_types")
    if isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds):
        del table[f"{place}layer_types"]  # transformers 5 spells out what 4 left unsaid
    _normalise_rope(table, place)
    heads, hidden = table.get(f"{place}num_attention_heads"), table.get(f"{place}hidden_size")
    if type(heads) is int and heads > 0:
        table.setdefault(f"{place}num_key_value_heads", heads)
        if type(hidden) is int:
            table.setdefault(f"{place}head_dim", hidden // heads)
    return table


def _normalise_rope(table: dict[str, Any], place: str) -> None:
    """Bring the rope keys of transformers 4 and 5 to one form: theta, type, partial factor, the rest."""
    parameters = table.pop(f"{place}rope_parameters", None)
    scaling = table.pop(f"{place}rope_scaling", None)
    if parameters is not None and not _is_flat(parameters):
        table[f"{place}rope_parameters"] = parameters  # by layer type, or malformed: compared as it stands
        parameters = None
    known: dict[str, Any] = {}
    for part in (parameters, scaling):
        if isinstance(part, dict):
            known |= {("rope_type" if key == "type" else key): item for key, item in part.items() if item is not None}
    if scaling is not None and not isinstance(scaling, dict):
        table[f"{place}rope_scaling"] = scaling
    for key in ("rope_theta", "partial_rotary_factor"):
        value = known.pop(key, None)
        if value is not None:
            table.setdefault(place + key, value)
    kind = known.pop("rope_type", "default")
    if kind != "default":
        table[f"{place}rope_type"] = kind
    if known:
        table[f"{place}rope_scaling"] = known


# ---------------------------------------------------------------------------------------------------------------------
# Shards


def index_json(weight_map: Mapping[str, str], total_size: int, total_parameters: int) -> str:
    """Return the text of `model.safetensors.index.json`; `metadata` is always there, loaders fail without it."""
    metadata = {"total_size": total_size, "total_parameters": total_parameters}
    return _dump({"metadata": metadata, "weight_map": dict(weight_map)})


def shard_names(count: int, stem: str = "model") -> list[str]:
    """Return the file names of an output in `count` files."""
    if count <= 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


_UNITS = MappingProxyType(
    {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "b": 10**9, "kb": 10**3, "mb": 10**6, "gb": 10**9,
     "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
)  # fmt: skip


def parse_size(text: str) -> int:
    """Return a number of bytes from `5B` (5·10⁹, as mergekit has it), `500M`, `20KB`, `5GiB`, `1.5B` or plain bytes."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    unit = _UNITS.get(match[2].lower()) if match else None
    size = Decimal(match[1]) * unit if match and unit else Decimal(0)
    if size < 1 or (match and match[2] == "" and "." in match[1]):
        raise RecipeError(
            f"cannot read {quoted(text, 60)} as a size: it is not a number of bytes above zero with a known unit; "
            "write 5GB, 500M, 20KB, 5GiB or plain bytes"
        )
    return int(size)


def weights_order(names: Iterable[str]) -> list[str]:
    """Return names in the order in which they are written: embeddings, layers by number, the rest, the head."""
    # The final norm comes before the head, though its name sorts after `lm_head`.
    ordered = sorted(
        names, key=lambda name: (is_head_side(name) and re.search("norm|ln_f", name.lower()) is None, name)
    )
    return model_order(ordered, find_stacks(ordered))
