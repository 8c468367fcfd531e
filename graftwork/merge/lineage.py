"""What is written into the metadata of every artifact: what it is, and what it was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from graftwork import __version__

PREFIX = "graftwork."

DEPTH = 8
"""Generations of parents that are kept."""

EMPTY_DIGEST = "0" * 32
"""Stands in for a digest that is not known yet; real ones are as long."""


def text_digest(text: str) -> str:
    """Return the xxh3-128 digest of a text, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def parent_record(name: str, digest: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what an artifact says of one of its parents: name, content digest, and the parent's own lineage."""
    record: dict[str, Any] = {"name": name, "digest": digest}
    method = metadata.get(PREFIX + "method")
    if method:
        record["method"] = method
    parents = own_parents(metadata)
    if parents:
        record["parents"] = [_pruned(parent, DEPTH - 2) for parent in parents]
    return record


def own_parents(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the parents that an artifact's metadata names; empty if it names none or cannot be read."""
    try:
        parents = json.loads(metadata.get(PREFIX + "parents", "[]"))
    except (ValueError, RecursionError):
        return []
    return [parent for parent in parents if isinstance(parent, dict)] if isinstance(parents, list) else []


def _pruned(record: dict[str, Any], depth: int) -> dict[str, Any]:
    parents = record.get("parents")
    kept = {key: value for key, value in record.items() if key != "parents"}
    if depth > 0 and isinstance(parents, list):
        kept["parents"] = [_pruned(parent, depth - 1) for parent in parents if isinstance(parent, dict)]
    return kept


def metadata(
    kind: str, *, method: str, recipe: str, parents: Sequence[Mapping[str, Any]], digest: str, **more: str
) -> dict[str, str]:
    """Return header metadata of an artifact, with `format: pt`, which some versions of transformers insist on.

    Args:
        kind: What it is: model, fisher, gram, mask, permutation …
        method: The method that made it.
        recipe: The recipe as canonical JSON.
        parents: Records of `parent_record`.
        digest: Content digest of the artifact's own tensors.
        more: Further entries, by name without the prefix.
    """
    entries = {
        "kind": kind,
        "version": __version__,
        "method": method,
        "recipe": recipe,
        "recipe_digest": text_digest(recipe),
        "parents": json.dumps(parents, separators=(",", ":"), ensure_ascii=False),
        "digest": digest,
        **more,
    }
    return {"format": "pt", **{PREFIX + key: value for key, value in sorted(entries.items())}}


def tree(metadata: Mapping[str, str], name: str) -> list[str]:
    """Return the family tree of an artifact as lines of text."""
    method = metadata.get(PREFIX + "method", "")
    lines = [name + (f"  ({method})" if method else "")]
    _branch(own_parents(metadata), "", lines)
    return lines


def _branch(parents: Sequence[Mapping[str, Any]], indent: str, lines: list[str]) -> None:
    for number, parent in enumerate(parents):
        last = number == len(parents) - 1
        method = f"  ({parent['method']})" if parent.get("method") else ""
        digest = str(parent.get("digest", ""))[:12]
        lines.append(f"{indent}{'└─ ' if last else '├─ '}{parent.get('name', '?')}{method}  {digest}")
        own = parent.get("parents")
        if isinstance(own, list):
            _branch([item for item in own if isinstance(item, dict)], indent + ("   " if last else "│  "), lines)
