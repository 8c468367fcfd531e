"""Checks what was written: digests, finite values, and that index, configuration and tensors agree."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import xxhash

from graftwork.merge import lineage
from graftwork.merge.checkpoint import (
    BLOCK,
    Checkpoint,
    TensorEntry,
    content_digest,
    quoted,
    read_json_object,
    tensor_digest,
)
from graftwork.merge.dtypes import BITS
from graftwork.merge.errors import CheckpointError
from graftwork.merge.folder import LAYER_KEYS
from graftwork.merge.layers import find_stacks

_EXPONENTS = MappingProxyType(
    {"F64": ("<u8", 0x7FF0000000000000), "F32": ("<u4", 0x7F800000), "C64": ("<u4", 0x7F800000),
     "BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F8_E5M2": ("u1", 0x7C), "F8_E4M3": ("u1", 0x7F)}
)  # fmt: skip
"""A value is NaN or infinite exactly if all of these bits are set."""

_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "lm_head", "embed_out")
_INDEX = "model.safetensors.index.json"
_FORMATS = ("pt", "tf", "flax", "mlx")


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found.

    Args:
        path: What was checked.
        tensors: Number of tensors.
        values: Number of values.
        digest: The content digest, computed now.
        expected: The one in the metadata, or None.
        problems: What is wrong, one line each.
        notes: What is not wrong but worth knowing.
    """

    path: str
    tensors: int
    values: int
    digest: str
    expected: str | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def record(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "path": self.path,
            "is_sound": self.is_sound,
            "tensors": self.tensors,
            "parameters": self.values,
            "digest": self.digest,
            "expected_digest": self.expected,
            "problems": list(self.problems),
            "notes": list(self.notes),
        }


def open_output(path: Path) -> Checkpoint:
    """Open what a merge wrote.

    Raises:
        CheckpointError: There is none, or it cannot be read; an unfinished merge is named.
    """
    partial = path.with_name(path.name + ".partial") if path.name not in {"", ".."} else path
    if not path.exists() and partial.exists():
        raise CheckpointError(
            f"cannot open {quoted(path)}: it does not exist, but {quoted(partial)} holds an unfinished merge; "
            "run that merge again to finish it"
        )
    return Checkpoint.open(path, allow_quantised=True)


def verify(checkpoint: Checkpoint, *, threads: int = 1, progress: Callable[[int], None] | None = None) -> Verification:
    """Read everything in a checkpoint and return what is wrong with it.

    Args:
        checkpoint: The checkpoint.
        threads: How many tensors are read at a time.
        progress: Called with the number of bytes read since the last call.
    """
    entries = list(checkpoint.tensors.values())
    count = progress or (lambda size: None)
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="verify") as pool:
        results = list(pool.map(lambda entry: _read_tensor(checkpoint, entry, count), entries))
    digest = content_digest(
        (entry.name, entry.dtype, entry.shape, found) for entry, (found, _, _) in zip(entries, results, strict=True)
    )
    expected = checkpoint.metadata.get(lineage.PREFIX + "digest")
    problems: list[str] = []
    notes = list(checkpoint.notes)
    if checkpoint.metadata.get(lineage.PREFIX + "parts") and not checkpoint.parts:
        expected = None
        notes.append("it is a part of a larger output, whose digest it holds; verify the whole")
    elif expected is None:
        notes.append("its metadata hold no digest, so only its form was checked")
    elif expected != digest:
        problems.append(f"the content has the digest {digest}, its metadata say {quoted(expected)}: it was changed")
    for entry, (_, unusual, first) in zip(entries, results, strict=True):
        if unusual:
            problems.append(
                f"{quoted(entry.name)} holds {unusual:,} of {entry.elements:,} values that are not finite, "
                f"the first at index {first}"
            )
    # Where there is no config.json, transformers is not what will read it.
    (problems if checkpoint.config is not None else notes).extend(_format_problems(checkpoint))
    if checkpoint.folder is not None:
        problems += _index_problems(checkpoint, checkpoint.folder)
    if checkpoint.config is not None:
        problems += _layer_problems(checkpoint)
        problems += _vocabulary_problems(checkpoint)
        digests = {entry.name: found for entry, (found, _, _) in zip(entries, results, strict=True)}
        problems += _head_problems(checkpoint, digests)
    values = sum(entry.elements for entry in entries)
    return Verification(str(checkpoint.path), len(entries), values, digest, expected, tuple(problems), tuple(notes))


def sha256_sums(path: Path, progress: Callable[[int], None] | None = None) -> dict[str, str]:
    """Return the SHA-256 of a file, or of every file in a folder by its path in the folder."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    sums: dict[str, str] = {}
    buffer = bytearray(1 << 20)
    for file in files:
        state = hashlib.sha256()
        with file.open("rb", buffering=0) as handle:
            while size := handle.readinto(buffer):
                state.update(memoryview(buffer)[:size])
                if progress is not None:
                    progress(size)
        sums[file.name if file == path else file.relative_to(path).as_posix()] = state.hexdigest()
    return sums


def sha256_bytes(path: Path) -> int:
    """Return how many bytes `sha256_sums` reads."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _read_tensor(checkpoint: Checkpoint, entry: TensorEntry, progress: Callable[[int], None]) -> tuple[bytes, int, int]:
    """Return a tensor's digest, how many of its values are not finite, and the index of the first of them."""
    width = max(1, BLOCK * BITS[entry.dtype] // 8)
    buffer = bytearray(min(width, entry.size))
    digests: list[bytes] = []
    unusual, first = 0, -1
    word, mask = _EXPONENTS.get(entry.dtype, ("u1", 0))
    for number, start in enumerate(range(0, entry.size, width)):
        part = memoryview(buffer)[: min(width, entry.size - start)]
        checkpoint.read_into(entry, start, part)
        digests.append(xxhash.xxh3_128_digest(part))
        if mask:
            words = np.frombuffer(part, word)
            found = (words & words.dtype.type(mask)) == mask
            if entry.dtype == "C64":
                found = found.reshape(-1, 2).any(axis=1)
            if found.any():
                unusual += int(np.count_nonzero(found))
                if first < 0:
                    first = number * BLOCK + int(np.argmax(found))
        progress(len(part))
    return tensor_digest(digests or [b""]), unusual, first


def _format_problems(checkpoint: Checkpoint) -> Iterator[str]:
    """Find headers whose metadata lack the format, which makes some versions of transformers stop."""
    for file in sorted({entry.file for entry in checkpoint.tensors.values()}):
        if file.suffix != ".safetensors":
            continue
        with Checkpoint.open(file, allow_quantised=True) as shard:
            if shard.metadata and shard.metadata.get("format") not in _FORMATS:
                yield (
                    f'{quoted(file.name)} has metadata without "format" (one of {", ".join(_FORMATS)}), which '
                    "transformers refuses"
                )


def _index_problems(checkpoint: Checkpoint, folder: Path) -> Iterator[str]:
    """Compare the index with the headers; a tensor in another shard than it says could not even be opened."""
    if not (folder / _INDEX).exists():
        return
    index = read_json_object(folder / _INDEX, doing=f"cannot check {quoted(folder)}")
    unnamed = sorted(checkpoint.tensors.keys() - dict(index.get("weight_map") or {}).keys())
    for name in unnamed:
        yield f"{quoted(_INDEX)} does not name {quoted(name)}, which is in {quoted(checkpoint.tensors[name].file.name)}"
    metadata = index.get("metadata")
    if not isinstance(metadata, dict):
        yield f'{quoted(_INDEX)} has no "metadata", without which transformers stops'
        return
    total = sum(entry.size for entry in checkpoint.tensors.values())
    stated = metadata.get("total_size")
    if stated is not None and stated != total:
        yield f"{quoted(_INDEX)} says that the tensors have {stated} bytes, they have {total}"


def _levels(checkpoint: Checkpoint) -> list[tuple[str, Mapping[str, Any]]]:
    config = checkpoint.config or {}
    inner = [(f"{key}.", value) for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)]
    return [("", config), *inner]


def _layer_problems(checkpoint: Checkpoint) -> Iterator[str]:
    stacks = find_stacks(checkpoint.tensors)
    if not stacks:
        return
    counts = {stack.count for stack in stacks.values()}
    for place, level in _levels(checkpoint):
        for key in LAYER_KEYS:
            value = level.get(key)
            # Layers that only predict further tokens are stored behind the others and counted apart.
            more = level.get("num_nextn_predict_layers")
            allowed = {value, value + more} if type(value) is int and type(more) is int else {value}
            if type(value) is int and value >= 2 and not allowed & counts:
                found = ", ".join(f"{stack.count} under {quoted(stack.prefix)}" for stack in stacks.values())
                yield f"config.json says {place}{key} = {value}, the numbers of layers among the tensors are: {found}"


def _vocabulary_problems(checkpoint: Checkpoint) -> Iterator[str]:
    text = dict(_levels(checkpoint)).get("text_config.", {})
    rows = (checkpoint.config or {}).get("vocab_size", text.get("vocab_size"))
    if type(rows) is not int:
        return
    for name, entry in checkpoint.tensors.items():
        is_vocabulary = name.endswith(".weight") and _last_module(name) in _EMBEDDINGS
        if is_vocabulary and entry.shape and entry.shape[0] != rows:
            yield f"{quoted(name)} has {entry.shape[0]:,} rows, config.json says vocab_size = {rows:,}"


def _head_problems(checkpoint: Checkpoint, digests: Mapping[str, bytes]) -> Iterator[str]:
    """Find heads that loaders would drop, or would make up."""
    config = checkpoint.config or {}
    text = dict(_levels(checkpoint)).get("text_config.", {})
    is_tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    heads = [name for name in checkpoint.tensors if _last_module(name) in {"lm_head", "embed_out"}]
    embeddings = [name for name in checkpoint.tensors if _last_module(name) in _EMBEDDINGS and name not in heads]
    if is_tied is True and len(embeddings) == 1:
        for name in heads:
            if name.endswith(".weight") and digests[name] != digests[embeddings[0]]:
                yield (
                    f"config.json ties the head to the embedding, but {quoted(name)} differs from "
                    f"{quoted(embeddings[0])}: some loaders drop it"
                )
    architectures = config.get("architectures")
    is_language_model = isinstance(architectures, list) and any(
        str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in architectures
    )
    if is_tied is False and is_language_model and embeddings and not heads and not _has_other_head(checkpoint):
        yield "config.json does not tie the head to the embedding, and there is no head: loaders would make one up"


def _has_other_head(checkpoint: Checkpoint) -> bool:
    return any(name.startswith(("output.", "head.", "score.", "classifier.", "cls.")) for name in checkpoint.tensors)


def _last_module(name: str) -> str:
    """Return the module whose parameter a tensor is: `a.wte.weight` → `wte`."""
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else ""
