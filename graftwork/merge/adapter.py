"""A LoRA adapter over its base, as one checkpoint: effective weights are computed while they are read.

Nothing is merged on disk or in memory. A range of an adapted tensor is made from the base's values and the rows of the
two factors that it needs: W + s·B·A in float64, rounded once to float32 (float64 over a float64 base), so that the
adapter is not rounded to the base's dtype before a merge. The conventions are those of PEFT's adapter folders.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from graftwork.merge import dtypes
from graftwork.merge.checkpoint import (
    Checkpoint,
    CheckpointView,
    ReadRange,
    TensorEntry,
    listed,
    numpy_values,
    quoted,
    read_json_object,
    shown,
)
from graftwork.merge.errors import CheckpointError
from graftwork.merge.tokens import VOCABULARY_FILES

Array = np.ndarray[Any, np.dtype[Any]]

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<which>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<which>[AB])(?:\.(?P<adapter>[^.]+))?")
_BIAS = re.compile(r"(?P<module>.+)\.lora_B(?:\.(?P<adapter>[^.]+))?\.bias")
_SAVED = re.compile(r"(?P<module>.+?)(?:\.base_layer|\.modules_to_save(?:\.[^.]+)?)?\.(?P<part>weight|bias)")

_ALTERED = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva")
"""Initialisations after which the base is no longer what its file says."""

_REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA rescales every row by a learned magnitude, which is no sum of matrices",
    "layer_replication": "it repeats layers of the base",
    "trainable_token_indices": "it trains single rows of an embedding",
    "target_parameters": "it adapts parameters that are no module's weight",
    "use_qalora": "QALoRA pools the inputs",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "alora_invocation_tokens": "aLoRA acts only after certain tokens",
    "arrow_config": "Arrow chooses among adapters while it runs",
    "kasa_config": "KaSA alters the base",
    "velora_config": "VeLoRA alters the base",
    "monteclora_config": "MonteCLoRA samples its factors",
    "megatron_config": "it belongs to a base that Megatron has split",
}

_EMBEDDING_TAILS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_HEAD = "lm_head.weight"


@dataclass(slots=True)
class _Change:
    """What an adapter does to one tensor of the base."""

    left: str = ""
    right: str = ""
    kind: str = ""
    scale: float = 1.0
    replaced_by: str = ""
    key: str = ""


@dataclass(slots=True)
class _Adapter:
    """An adapter folder, read and checked."""

    folder: Path
    config: dict[str, Any]
    weights: Checkpoint
    rename: tuple[tuple[str, str], ...] = ()
    changes: dict[str, _Change] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"cannot use the adapter {quoted(self.folder)}: {problem}")


def open_adapted(
    base: Checkpoint,
    folder: Path,
    *,
    what: str = "",
    allow_pickle: bool = False,
    keep_tied: bool = False,
    rename: Sequence[tuple[str, str]] = (),
) -> Checkpoint:
    """Return a base with a LoRA adapter as one checkpoint, which closes both.

    Args:
        base: The model that the adapter was trained on.
        folder: The adapter's folder, with `adapter_config.json`.
        what: The recipe key that named it, for messages.
        allow_pickle: Read `adapter_model.bin`.
        keep_tied: Let a change of one of two tied tensors, head and embedding, be a change of both, as PEFT's
            `merge_and_unload` does; else they are separate from there on, as in the model that was trained.
        rename: Parts of the adapter's module names and what stands for them in the base, applied in this order.

    Raises:
        CheckpointError: The adapter cannot be read, is of a kind that is no sum of matrices, or does not fit the base.
    """
    if not folder.is_dir():
        raise CheckpointError(f"cannot use the adapter {what} {quoted(folder)}: it is no folder with {CONFIG}")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"cannot use the adapter {what} {quoted(folder)}: it has no {CONFIG}; give PEFT's folder")
    config = read_json_object(folder / CONFIG, doing=f"cannot use the adapter {quoted(folder)}")
    file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"cannot use the adapter {quoted(folder)}: it has no {_WEIGHTS[0]}; fetch it")
    weights = Checkpoint.open(file, allow_pickle=allow_pickle, what="the adapter")
    try:
        adapter = _Adapter(folder, config, weights, tuple(rename))
        _refuse(adapter)
        _read_keys(adapter, base)
        return _combined(adapter, base, keep_tied=keep_tied)
    except BaseException:
        weights.close()
        raise


def _refuse(adapter: _Adapter) -> None:
    """Refuse adapters whose effect is not the sum of the base and a product.

    Raises:
        CheckpointError: It is one of these; the message names the key.
    """
    kind = adapter.config.get("peft_type")
    if kind != "LORA":
        raise adapter.error(f"its peft_type is {shown(kind)}; only LORA adapters can be merged")
    for key, reason in _REFUSED.items():
        if adapter.config.get(key):
            raise adapter.error(f"it sets {key} ({shown(adapter.config[key])}): {reason}; merge it with PEFT first")
    start = str(adapter.config.get("init_lora_weights", "")).lower()
    if any(start.startswith(word) for word in _ALTERED):
        raise adapter.error(
            f"its init_lora_weights is {shown(start)}, which altered the base when training began; merge it with PEFT"
        )


def _read_keys(adapter: _Adapter, base: Checkpoint) -> None:
    """Find what each tensor of the adapter does to the base."""
    left_over = []
    for key in adapter.weights.tensors:
        plain = key.removeprefix(_PREFIX)
        if "lora_magnitude_vector" in plain:
            raise adapter.error(f"{quoted(key)} belongs to DoRA, which is no sum of matrices; merge it with PEFT first")
        if "token_adapter." in plain:
            raise adapter.error(f"{quoted(key)} trains single rows of an embedding; merge it with PEFT first")
        if match := _FACTOR.fullmatch(plain) or _EMBEDDING.fullmatch(plain):
            embedding = ".lora_embedding_" in plain
            tensor = _tensor_of(adapter, base, match["module"], "weight", key)
            change = adapter.changes.setdefault(tensor, _Change())
            change.kind, change.key = "embedding" if embedding else "matrix", key
            change.scale = _scale(adapter, match["module"])
            if match["which"] == "A":
                change.right = key
            else:
                change.left = key
        elif match := _BIAS.fullmatch(plain):
            tensor = _tensor_of(adapter, base, match["module"], "bias", key)
            change = adapter.changes.setdefault(tensor, _Change())
            change.kind, change.left, change.key = "bias", key, key
            change.scale = _scale(adapter, match["module"])
        elif (match := _SAVED.fullmatch(plain)) and ".lora_" not in plain:
            tensor = _tensor_of(adapter, base, match["module"], match["part"], key)
            adapter.changes.setdefault(tensor, _Change()).replaced_by = key
        else:
            left_over.append(key)
    if left_over:
        raise adapter.error(f"it is not known what {listed(left_over)} would do; merge it with PEFT first")
    for tensor, change in adapter.changes.items():
        if change.kind in {"matrix", "embedding"} and not (change.left and change.right):
            raise adapter.error(f"it has only one of the two factors of {quoted(tensor)} ({quoted(change.key)})")


def _tensor_of(adapter: _Adapter, base: Checkpoint, module: str, part: str, key: str) -> str:
    """Return the base's tensor that belongs to a module of the adapter."""
    for old, new in adapter.rename:
        module = module.replace(old, new)
    name = f"{module}.{part}"
    rest = name.partition(".")[2]
    for candidate in (name, rest, f"model.{name}"):
        if candidate in base.tensors:
            return candidate
    ends = [known for known in base.tensors if known.endswith(f".{name}")]
    if len(ends) == 1:
        return ends[0]
    if name.rpartition(".")[0].endswith("lm_head") and _lends_head(base):
        return _HEAD
    what = "several tensors of the base have that ending" if ends else "the base has no such tensor"
    raise adapter.error(
        f"{quoted(key)} belongs to {quoted(name)}, but {what}; adapters use the module names of the library that "
        "trained them: give the base that it was trained on, or say with --rename OLD=NEW what a part of a name is "
        "in the base"
    )


def _scale(adapter: _Adapter, module: str) -> float:
    """Return α/r of a module, or α/√r with rank-stabilised scaling."""
    rank = _of_pattern(adapter, "rank_pattern", module, "r")
    alpha = _of_pattern(adapter, "alpha_pattern", module, "lora_alpha")
    return alpha / (math.sqrt(rank) if adapter.config.get("use_rslora") else rank)


def _rank(adapter: _Adapter, module: str) -> int:
    return int(_of_pattern(adapter, "rank_pattern", module, "r"))


def _of_pattern(adapter: _Adapter, patterns: str, module: str, default: str) -> float:
    found = adapter.config.get(patterns) or {}
    value = adapter.config.get(default, 8)
    if isinstance(found, dict):
        for pattern, own in found.items():
            try:
                if re.fullmatch(rf"(.*\.)?({pattern})", module):
                    value = own
                    break
            except re.error:
                raise adapter.error(
                    f"{patterns} has the key {quoted(pattern)}, which is no regular expression"
                ) from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise adapter.error(f"{default} of {quoted(module)} is {shown(value)}; it must be a positive number")
    return float(value)


def _lends_head(base: Checkpoint) -> TensorEntry | None:
    """Return the embedding that stands for the head, where a base ties them and stores no head."""
    config = base.config or {}
    text = config.get("text_config")
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None)
    found = [
        entry for name, entry in base.tensors.items() if f".{name}".endswith(tuple("." + t for t in _EMBEDDING_TAILS))
    ]
    heads = [name for name in base.tensors if f".{name}".endswith((".lm_head.weight", ".embed_out.weight"))]
    return found[0] if tied is True and not heads and len(found) == 1 else None


def _combined(adapter: _Adapter, base: Checkpoint, *, keep_tied: bool) -> Checkpoint:
    """Return the checkpoint of effective weights."""
    computed: dict[str, tuple[TensorEntry, ReadRange]] = {}
    lent = _lends_head(base)
    config = base.config
    notes = []
    rows = lent.shape[0] if lent is not None else 0
    if lent is not None and keep_tied and _HEAD in adapter.changes:
        if lent.name in adapter.changes:
            raise adapter.error(f"it changes {quoted(lent.name)} and {quoted(_HEAD)}, which the base ties; --keep-tied")
        adapter.changes[lent.name] = adapter.changes.pop(_HEAD)
    whole = adapter.changes[lent.name].replaced_by if lent is not None and lent.name in adapter.changes else ""
    # An embedding with more rows was made before training, and its head with it.
    resized = bool(whole) and adapter.weights.tensors[whole].shape[:1] != (rows,)
    if lent is not None and not keep_tied and not resized and {_HEAD, lent.name} & adapter.changes.keys():
        computed[_HEAD] = replace(lent, name=_HEAD), partial(base.read_into, lent)
        config = {**(config or {}), "tie_word_embeddings": False}
        which = "head" if _HEAD in adapter.changes else "embedding"
        notes.append(
            f"the adapter {quoted(adapter.folder.name)} changes only the {which}, which the base ties: head and "
            "embedding are separate tensors from here on (--keep-tied changes both, as PEFT does)"
        )
    stored: dict[str, str] = {}
    for name, change in sorted(adapter.changes.items()):
        own = base.tensors.get(name)
        entry, read = computed[name] if own is None else (own, partial(base.read_into, own))
        stored[name] = entry.dtype
        if change.replaced_by:
            saved = adapter.weights.tensors[change.replaced_by]
            if saved.shape[1:] != entry.shape[1:] or (saved.shape[:1] != entry.shape[:1] and len(saved.shape) < 2):
                raise adapter.error(
                    f"{quoted(change.replaced_by)} has the shape {list(saved.shape)}, {quoted(name)} of the base "
                    f"{list(entry.shape)}"
                )
            if saved.shape[:1] != entry.shape[:1] and config is not None and "vocab_size" in config:
                config = {**config, "vocab_size": saved.shape[0]}
            entry, read = replace(saved, name=name), partial(adapter.weights.read_into, saved)
        if change.left:
            entry, read = _adapted(adapter, change, name, entry, read)
        computed[name] = entry, read
    wanted = str(adapter.config.get("base_model_name_or_path") or "").rstrip("/").rpartition("/")[2]
    folder = base.path.name
    if wanted and folder and wanted != folder:
        notes.append(
            f"the adapter {quoted(adapter.folder.name)} says that its base is {quoted(wanted)}, not {quoted(folder)}"
        )
    has_tokenizer = any((adapter.folder / name).is_file() for name in VOCABULARY_FILES)
    return CheckpointView(
        base, computed, stored=stored, config=config, notes=notes, closes=[adapter.weights],
        tokenizer_folder=adapter.folder if has_tokenizer else None,
    )  # fmt: skip


def _adapted(
    adapter: _Adapter, change: _Change, name: str, entry: TensorEntry, read: ReadRange
) -> tuple[TensorEntry, ReadRange]:
    """Return the effective tensor of one change: what it looks like, and how it is read."""
    if entry.dtype not in dtypes.MERGEABLE:
        raise adapter.error(f"{quoted(name)} of the base is {entry.dtype}, to which nothing can be added")
    left = _values(adapter, change.left)
    if change.kind == "bias":
        right, left = np.ones((1, 1)), left.reshape(-1, 1)
    else:
        right = _values(adapter, change.right)
        module = change.key.removeprefix(_PREFIX).partition(".lora_")[0]
        if right.shape[0] != _rank(adapter, module) or left.shape[1] != right.shape[0]:
            raise adapter.error(
                f"the factors of {quoted(name)} have the shapes {list(left.shape)} and {list(right.shape)}, which do "
                f"not go with the rank {_rank(adapter, module)}"
            )
        left, right = left.reshape(left.shape[0], -1), right.reshape(right.shape[0], -1)
        product = (left.shape[0], right.shape[1])
        flat = (entry.shape[0], math.prod(entry.shape[1:])) if entry.shape else (1, 1)
        transposed = change.kind == "embedding" or bool(adapter.config.get("fan_in_fan_out"))
        fits = flat == (product[::-1] if transposed else product)
        if not fits and change.kind == "matrix" and flat == (product if transposed else product[::-1]):
            transposed = not transposed  # PEFT puts the flag right by itself
        if transposed:
            left, right = np.ascontiguousarray(right.T), np.ascontiguousarray(left.T)
            product = product[::-1]
        if product != flat:
            raise adapter.error(
                f"{quoted(change.key)} makes a change of the shape {list(product)}, but {quoted(name)} of the base is "
                f"{list(entry.shape)}"
            )
    elements = entry.elements
    dtype = "F64" if entry.dtype == "F64" else "F32"
    file = adapter.weights.tensors[change.left].file
    made = TensorEntry(name, dtype, entry.shape, file, 0, elements * (8 if dtype == "F64" else 4))
    columns = elements // left.shape[0] if left.shape[0] else 1
    return made, _Sum(read, entry.dtype, dtype, left * change.scale, right, columns)


def _values(adapter: _Adapter, key: str) -> Array:
    entry = adapter.weights.tensors[key]
    values = numpy_values(entry.dtype, adapter.weights.read(key))
    if values is None or entry.dtype not in dtypes.MERGEABLE:
        raise adapter.error(f"{quoted(key)} is {entry.dtype}, which is no floating-point dtype")
    wide = values.reshape(entry.shape).astype(np.float64)
    if not np.isfinite(wide).all():
        raise adapter.error(f"{quoted(key)} holds NaN or infinities")
    return wide


class _Sum:
    """Reads base + left · right, row by row; a row is the same whatever the range that is asked for."""

    def __init__(self, read: ReadRange, stored: str, made: str, left: Array, right: Array, columns: int) -> None:
        self.read, self.stored, self.columns = read, dtypes.RAW[stored], columns
        self.made = np.dtype(np.float64 if made == "F64" else np.float32)
        # Kept in float32 where that is exact, which is nearly always: half the memory.
        self.left, self.right = (_narrowest(factor) for factor in (left, right))

    def __call__(self, offset: int, buffer: memoryview) -> None:
        from graftwork.merge import kernels

        width = self.made.itemsize
        first = offset // width
        last = -(-(offset + buffer.nbytes) // width)
        words = np.empty(last - first, self.stored)
        self.read(first * self.stored.itemsize, words.view(np.uint8).data)
        values = np.empty(last - first, np.float64)
        kernels.decode(words, values)
        kernels.add_product(values, self.left, self.right, first, self.columns)
        made = values.astype(self.made)
        start = offset - first * width
        buffer[:] = made.view(np.uint8).data[start : start + buffer.nbytes]


def _narrowest(values: Array) -> Array:
    narrow = values.astype(np.float32)
    return np.ascontiguousarray(narrow if np.array_equal(narrow.astype(np.float64), values) else values)
