"""Opens a checkpoint by the text that names it: a path, a repository of the hub, or a model with an adapter."""

from __future__ import annotations

import os
import re
from pathlib import Path

from graftwork.merge.adapter import open_adapted
from graftwork.merge.checkpoint import FOREIGN_SUFFIXES, PICKLE_SUFFIXES, Checkpoint, quoted
from graftwork.merge.errors import CheckpointError
from graftwork.merge.hub import Hub, cached, located
from graftwork.merge.problems import Report
from graftwork.merge.recipe import ModelReference
from graftwork.merge.recipe_references import References

_FILE_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES, *FOREIGN_SUFFIXES)
_REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)


def open_model(
    text: str | Path,
    *,
    what: str = "",
    allow_pickle: bool = False,
    allow_quantised: bool = False,
    hub: Hub | None = None,
) -> Checkpoint:
    """Return the checkpoint that a text names, as recipes name models: `path`, `ORG/NAME@revision`, `base+adapter`.

    What exists on this machine is never looked for on the hub, and neither is what cannot be a repository's id: a file
    name, a path below a folder that exists, or a name without `/` that the hub's cache does not have.

    Args:
        text: The text.
        what: What the checkpoint is called in messages.
        allow_pickle: Read `.pt` and `.bin` files.
        allow_quantised: Open packed weights, too.
        hub: How repositories are found.

    Raises:
        CheckpointError: There is no such checkpoint, or it cannot be read.
    """
    found = resolve_model(str(text), what=what, hub=hub or Hub(allow_pickle=allow_pickle))
    path = found.path
    if path is None or (found.hub is None and found.adapter is None):
        path = Path(text)  # as it was written, which is how messages and labels show it
    checkpoint = Checkpoint.open(path, allow_pickle=allow_pickle, allow_quantised=allow_quantised, what=what)
    if found.adapter is None or found.adapter.path is None:
        return checkpoint
    try:
        return open_adapted(checkpoint, found.adapter.path, what=what, allow_pickle=allow_pickle)
    except BaseException:
        checkpoint.close()
        raise


def local_path(text: str | Path, *, hub: Hub | None = None) -> Path:
    """Return where on this machine the model lies that a text names; of a model with an adapter, the model."""
    return resolve_model(str(text), hub=hub).path or Path(text)


def resolve_model(text: str, *, what: str = "", hub: Hub | None = None) -> ModelReference:
    """Return what a text names, with folders on this machine; repositories are fetched if need be.

    Args:
        text: The text.
        what: What the checkpoint is called in messages.
        hub: How repositories are found.

    Raises:
        CheckpointError: It names nothing, or a repository that cannot be had.
    """
    chosen = hub or Hub()
    name = what or "the model"
    halves = [text] if os.path.exists(text) else text.split("+")
    nowhere = [half for half in halves if not os.path.exists(half) and not _may_be_a_repository(half, chosen)]
    if nowhere and len(halves) == 1:
        return ModelReference(text)
    if nowhere:
        raise CheckpointError(f"cannot open {name} {quoted(text)}: there is no {quoted(nowhere[0])}; check the path")
    report = Report()
    found = References(frozenset(), None, report).read(text, name)
    if report.problems or found is None:
        raise CheckpointError(*(f"cannot open {problem}" for problem in report.problems))
    return located(found, chosen, name)


def _may_be_a_repository(text: str, hub: Hub) -> bool:
    """Say whether a text can be the id of a repository rather than a misspelt path."""
    name, _, revision = text.strip().partition("@")
    if name.endswith(_FILE_SUFFIXES) or not _REPOSITORY.fullmatch(name):
        return False
    if "/" in name:
        return not os.path.exists(name.partition("/")[0])
    return cached(hub.root, name, revision or None) is not None
