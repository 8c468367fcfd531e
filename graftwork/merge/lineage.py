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

LARGEST = 1_000_000
"""Characters that the lineage may have; older generations are left out of a larger one."""

EMPTY_DIGEST = "0" * 32
"""Stands in for a digest that is not known yet; real ones are as long."""


def text_digest(text: str) -> str:
    """Return the xxh3-128 digest of a text, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(text.encode(errors="replace"))


def parent_record(name: str, digest: str, metadata: Mapping[str, str], **origin: str) -> dict[str, Any]:
    """Return what an artifact says of one of its parents: name, content digest, and the parent's own lineage.

    Args:
        name: What it is called.
        digest: Its content digest.
        metadata: Its own metadata.
        origin: Where it comes from, such as `repository` and `commit`.
    """
    record: dict[str, Any] = {"name": name, "digest": digest, **origin}
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


def _parents_json(parents: Sequence[Mapping[str, Any]]) -> str:
    """Return the records as JSON, with as many generations as fit into `LARGEST`.

    Families grow with every generation, and each artifact repeats what all its parents know.
    """
    depth, left = 0, LARGEST
    generation: list[dict[str, Any]] = [dict(parent) for parent in parents]
    while generation and depth <= DEPTH:
        for record in generation:
            # With an empty list of parents and a comma: never less than what it takes.
            left -= len(_json(_pruned(record, 0))) + len(',"parents":[],')
            if left < 2:
                return _json([_pruned(dict(parent), max(depth - 1, 0)) for parent in parents])
        generation = [parent for record in generation for parent in _own(record)]
        depth += 1
    return _json([_pruned(dict(parent), DEPTH) for parent in parents])


def _own(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    parents = record.get("parents")
    return [parent for parent in parents if isinstance(parent, dict)] if isinstance(parents, list) else []


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


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
        "parents": _parents_json(parents),
        "digest": digest,
        **more,
    }
    # What other programs wrote may hold half of a surrogate pair, which no file can.
    values = {key: value.encode(errors="replace").decode() for key, value in sorted(entries.items())}
    return {"format": "pt", **{PREFIX + key: value for key, value in values.items()}}


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
