"""What a checkpoint is, read from its headers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graftwork.merge import lineage
from graftwork.merge.checkpoint import PICKLE_SUFFIXES, Checkpoint, TensorEntry
from graftwork.merge.layers import Stack, find_stacks


@dataclass(frozen=True, slots=True)
class Amount:
    """How many tensors, values and bytes."""

    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Description:
    """What a checkpoint is.

    Args:
        path: What was opened.
        kind: What graftwork's metadata says it is, such as `model` or `fisher`; `model` where there is none.
        form: How it is stored, in words.
        total: Everything together.
        dtypes: By dtype, the largest first.
        files: By name of the file.
        stacks: Sequences of layers: prefix of their names, number of layers, whether all layers hold the same tensors.
        architecture: What `config.json` says of the model.
        metadata: The header's own metadata.
        method: The method that made it.
        recipe: The recipe that made it.
        recipe_digest: The recipe's digest.
        digest: The content digest in the metadata, which nobody has compared with the content.
        tree: The family tree, one line per ancestor; empty without lineage.
        notes: What opening it remarked.
    """

    path: str
    kind: str
    form: str
    total: Amount
    dtypes: Mapping[str, Amount]
    files: Mapping[str, Amount]
    stacks: tuple[Stack, ...]
    architecture: Mapping[str, Any]
    metadata: Mapping[str, str]
    method: str | None
    recipe: Any
    recipe_digest: str | None
    digest: str | None
    tree: tuple[str, ...]
    notes: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "path": self.path,
            "kind": self.kind,
            "form": self.form,
            **asdict(self.total),
            "dtypes": {name: asdict(amount) for name, amount in self.dtypes.items()},
            "files": {name: asdict(amount) for name, amount in self.files.items()},
            "stacks": [
                {"prefix": stack.prefix, "layers": stack.count, "is_uniform": stack.uniform} for stack in self.stacks
            ],
            "architecture": dict(self.architecture),
            "metadata": dict(self.metadata),
            "method": self.method,
            "recipe": self.recipe,
            "recipe_digest": self.recipe_digest,
            "digest": self.digest,
            "lineage": lineage.own_parents(self.metadata),
            "notes": list(self.notes),
        }


def describe(checkpoint: Checkpoint) -> Description:
    """Return what an open checkpoint is."""
    entries = list(checkpoint.tensors.values())
    metadata = checkpoint.metadata
    dtypes = _amounts(entries, lambda entry: entry.dtype)
    return Description(
        path=str(checkpoint.path),
        kind=metadata.get(lineage.PREFIX + "kind", "model"),
        form=_form(checkpoint, entries),
        total=_amount(entries),
        dtypes=dict(sorted(dtypes.items(), key=lambda item: (-item[1].bytes, item[0]))),
        files=dict(sorted(_amounts(entries, lambda entry: entry.file.name).items())),
        stacks=tuple(find_stacks(checkpoint.tensors).values()),
        architecture=_architecture(checkpoint.config or {}),
        metadata=dict(metadata),
        method=metadata.get(lineage.PREFIX + "method"),
        recipe=_json(metadata.get(lineage.PREFIX + "recipe")),
        recipe_digest=metadata.get(lineage.PREFIX + "recipe_digest"),
        digest=metadata.get(lineage.PREFIX + "digest"),
        tree=tuple(lineage.tree(metadata, _name(checkpoint.path))) if lineage.own_parents(metadata) else (),
        notes=checkpoint.notes,
    )


def _name(path: Path) -> str:
    return path.name or str(path)


def _amount(entries: list[TensorEntry]) -> Amount:
    return Amount(len(entries), sum(entry.elements for entry in entries), sum(entry.size for entry in entries))


def _amounts(entries: list[TensorEntry], key: Any) -> dict[str, Amount]:
    groups: dict[str, list[TensorEntry]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return {name: _amount(group) for name, group in groups.items()}


def _form(checkpoint: Checkpoint, entries: list[TensorEntry]) -> str:
    files = {entry.file for entry in entries}
    is_pickle = any(file.suffix.lower() in PICKLE_SUFFIXES for file in files)
    what = "pickle" if is_pickle else "safetensors"
    if checkpoint.folder is None:
        return f"{what} file"
    return f"folder, {what}" + (f" in {len(files)} shards" if len(files) > 1 else "")


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    known = ("model_type", "architectures", "dtype", "torch_dtype", "vocab_size", "tie_word_embeddings")
    return {key: config[key] for key in known if key in config}


def _json(text: str | None) -> Any:
    """Return the value in a JSON text; the text itself if it is none."""
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
