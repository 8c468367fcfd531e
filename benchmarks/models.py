"""Made-up Llama checkpoints for measuring merges: bfloat16, sharded safetensors, the same bytes at every run.

    python benchmarks/models.py DIRECTORY --size 160m

writes DIRECTORY/160m/{base,ft1,ft2,ft3}. The base is N(0, 0.02), its norms 1 + N(0, 0.02); a fine-tune is the base plus
N(0, 5e-4), rounded to bfloat16. Tensors are made and written in chunks of all models at once, so that memory does not
grow with the size. Only numpy is needed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CHUNK = 1 << 20
BASE_SPREAD, DELTA_SPREAD = 0.02, 5e-4


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a Llama, and how many bytes a shard may have."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    shard_bytes: int


SIZES = {
    "1l": Shape(64, 128, 1, 2, 2, 100, 10**9),  # twelve small tensors: what a merge costs before it starts
    "20m": Shape(256, 688, 4, 4, 4, 32000, 10 * 10**6),
    "160m": Shape(768, 3072, 12, 12, 12, 32000, 100 * 10**6),  # 162.4 M parameters
    "1b": Shape(2048, 5632, 22, 32, 4, 32000, 500 * 10**6),  # 1,100.0 M parameters, the shape of TinyLlama
    "tiny": Shape(16, 32, 888, 2, 2, 100, 10**9),  # 7,995 tensors
}


def tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of all tensors."""
    keys = shape.hidden // shape.heads * shape.key_value_heads
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        found[prefix + "self_attn.q_proj.weight"] = (shape.hidden, shape.hidden)
        found[prefix + "self_attn.k_proj.weight"] = (keys, shape.hidden)
        found[prefix + "self_attn.v_proj.weight"] = (keys, shape.hidden)
        found[prefix + "self_attn.o_proj.weight"] = (shape.hidden, shape.hidden)
        found[prefix + "mlp.gate_proj.weight"] = (shape.intermediate, shape.hidden)
        found[prefix + "mlp.up_proj.weight"] = (shape.intermediate, shape.hidden)
        found[prefix + "mlp.down_proj.weight"] = (shape.hidden, shape.intermediate)
        found[prefix + "input_layernorm.weight"] = (shape.hidden,)
        found[prefix + "post_attention_layernorm.weight"] = (shape.hidden,)
    found["model.norm.weight"] = (shape.hidden,)
    found["lm_head.weight"] = (shape.vocabulary, shape.hidden)
    return found


def count_parameters(size: str) -> int:
    """Return the number of parameters of a size."""
    return sum(math.prod(shape) for shape in tensors(SIZES[size]).values())


def configuration(shape: Shape, dtype: str) -> dict[str, object]:
    """Return what goes into `config.json`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": shape.hidden // shape.heads,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.key_value_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": {"BF16": "bfloat16", "F32": "float32"}[dtype],
        "use_cache": True,
        "vocab_size": shape.vocabulary,
    }


def shards(shape: Shape, item_bytes: int) -> list[list[str]]:
    """Return the tensors' names, cut where a shard would grow beyond its size."""
    found: list[list[str]] = []
    filled = 0
    for name, dimensions in tensors(shape).items():
        size = math.prod(dimensions) * item_bytes
        if not found or filled + size > shape.shard_bytes:
            found.append([])
            filled = 0
        found[-1].append(name)
        filled += size
    return found


def header(names: list[str], shapes: dict[str, tuple[int, ...]], dtype: str) -> bytes:
    """Return the beginning of a safetensors file, padded so that the data starts at a multiple of 8 bytes."""
    item_bytes = {"BF16": 2, "F32": 4}[dtype]
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        end = offset + math.prod(shapes[name]) * item_bytes
        entries[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def to_words(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return float32 values as the words of `dtype`: bfloat16 to nearest even."""
    if dtype == "F32":
        return values
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def from_words(words: np.ndarray) -> np.ndarray:
    """Return bfloat16 words as float32 values."""
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)


def generate(directory: Path, size: str, *, models: int = 3, dtype: str = "BF16") -> list[Path]:
    """Write the base and its fine-tunes unless they are there, and return their folders, the base first.

    Args:
        directory: Where the folder of this size goes.
        size: A name in `SIZES`.
        models: The number of fine-tunes.
        dtype: `BF16` or `F32`.
    """
    shape = SIZES[size]
    shapes = tensors(shape)
    parts = shards(shape, {"BF16": 2, "F32": 4}[dtype])
    root = directory / (size if dtype == "BF16" else f"{size}-{dtype.lower()}")
    folders = [root / name for name in ("base", *(f"ft{i + 1}" for i in range(models)))]
    if all((folder / "config.json").exists() for folder in folders):
        return folders
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    numbers = {name: number for number, name in enumerate(shapes)}
    weight_map, total = {}, 0
    for part, names in enumerate(parts):
        file_name = f"model-{part + 1:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors"
        files = [(folder / file_name).open("wb") for folder in folders]
        for file in files:
            file.write(header(names, shapes, dtype))
        for name in names:
            weight_map[name] = file_name
            count = math.prod(shapes[name])
            total += count
            generators = [np.random.Generator(np.random.PCG64([model, numbers[name]])) for model in range(models + 1)]
            for start in range(0, count, CHUNK):
                length = min(CHUNK, count - start)
                base = generators[0].standard_normal(length, dtype=np.float32) * np.float32(BASE_SPREAD)
                if len(shapes[name]) == 1:
                    base += np.float32(1)
                words = to_words(base, dtype)
                files[0].write(words.tobytes())
                base = base if dtype == "F32" else from_words(words)
                for generator, file in zip(generators[1:], files[1:], strict=True):
                    delta = generator.standard_normal(length, dtype=np.float32) * np.float32(DELTA_SPREAD)
                    file.write(to_words(base + delta, dtype).tobytes())
        for file in files:
            file.close()
    for folder in folders:
        if len(parts) > 1:
            index = {"metadata": {"total_size": total * {"BF16": 2, "F32": 4}[dtype]}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        (folder / "config.json").write_text(
            json.dumps(configuration(shape, dtype), indent=2) + "\n"
        )  # last: it is whole
    return folders


def link(folder: Path, copy: Path) -> Path:
    """Make `copy` a checkpoint of hard links to the files of `folder`, and return it."""
    copy.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if not (copy / file.name).exists():
            os.link(file, copy / file.name)
    return copy


def main() -> None:
    """Write the checkpoints that the command line asks for."""
    parser = argparse.ArgumentParser(description="Write made-up Llama checkpoints: a base and its fine-tunes.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=SIZES, default="160m")
    parser.add_argument("--models", type=int, default=3, help="the number of fine-tunes")
    parser.add_argument("--dtype", choices=("BF16", "F32"), default="BF16")
    arguments = parser.parse_args()
    for folder in generate(arguments.directory, arguments.size, models=arguments.models, dtype=arguments.dtype):
        print(folder)
    print(f"{count_parameters(arguments.size) / 1e6:.1f} M parameters each")


if __name__ == "__main__":
    main()
