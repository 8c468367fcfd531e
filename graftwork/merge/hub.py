"""Repositories of the Hugging Face hub: finds them in its cache on this machine, and fetches what is missing.

The cache is read without any library. Fetching needs `huggingface_hub`, an extra, which is imported only when something
has to be fetched. Files are used where they lie in the cache; nothing is copied.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graftwork.merge.checkpoint import FOREIGN_SUFFIXES, PICKLE_SUFFIXES, listed, quoted, read_json_object
from graftwork.merge.errors import CheckpointError, RecipeError
from graftwork.merge.recipe import ModelReference, Recipe, Slice, TokenizerSetting

Tell = Callable[[str], None]

_SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken", "LICENSE*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_YES = frozenset({"1", "true", "yes", "on"})


@dataclass(frozen=True, slots=True)
class Hub:
    """How repositories are found.

    Args:
        cache: Root of the cache; None for where the hub's own library has it.
        offline: Use nothing but the cache; `HF_HUB_OFFLINE` says so too.
        allow_pickle: Accept a repository that has no safetensors.
        tell: Called with a line for people before something is fetched.
    """

    cache: Path | None = None
    offline: bool = False
    allow_pickle: bool = False
    tell: Tell = lambda line: None

    @property
    def root(self) -> Path:
        """Where the cache is: as given, else `HF_HUB_CACHE`, `$HF_HOME/hub` or `~/.cache/huggingface/hub`."""
        if self.cache is not None:
            return self.cache.expanduser()
        if os.environ.get("HF_HUB_CACHE"):
            return Path(os.environ["HF_HUB_CACHE"]).expanduser()
        user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        home = os.environ.get("HF_HOME") or os.path.join(user, "huggingface")
        return Path(home).expanduser() / "hub"

    @property
    def silence(self) -> str:
        """Why the network is not used; empty if it may be."""
        if self.offline:
            return "--offline is given"
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in _YES:
            return "HF_HUB_OFFLINE is set"
        return ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A commit of a repository, as files on this machine."""

    path: Path
    commit: str


def localised(recipe: Recipe, hub: Hub) -> Recipe:
    """Return a recipe in which every repository of the hub has a folder on this machine, fetched if need be.

    A recipe without repositories is returned as it is, and no network is touched. What is small is fetched of all
    repositories before the weights of the first, so that a wrong id is known before gigabytes are on their way.

    Raises:
        CheckpointError: A repository cannot be had; carries every problem.
        RecipeError: Two texts of one group turn out to be the same model.
    """
    wanted = dict(_wanted(recipe))
    if not wanted:
        return recipe
    problems: list[str] = []
    found: dict[tuple[str, str | None], Snapshot] = {}
    for weights in (False, True):
        for (repository, revision), (key, needs_weights) in wanted.items():
            if weights and not needs_weights:
                continue
            try:
                pinned = found[repository, revision].commit if weights else revision
                snapshot = _snapshot(hub, repository, pinned, weights=weights)
                if not weights and needs_weights:
                    _refuse_quantised(repository, snapshot)
                found[repository, revision] = snapshot
            except CheckpointError as error:
                problems.extend(f"{key}: {problem}" for problem in error.problems)
        if problems:
            raise CheckpointError(*problems)

    def local(reference: ModelReference) -> ModelReference:
        adapter = None if reference.adapter is None else local(reference.adapter)
        if reference.hub is None or reference.path is not None:
            return replace(reference, adapter=adapter)
        snapshot = found[reference.hub, reference.revision]
        return replace(reference, path=snapshot.path, commit=snapshot.commit, adapter=adapter)

    return _mapped(recipe, local)


def located(reference: ModelReference, hub: Hub, what: str) -> ModelReference:
    """Return one reference whose repositories, if it names any, have folders on this machine.

    Args:
        reference: The reference.
        hub: How repositories are found.
        what: What the model is called in messages.

    Raises:
        CheckpointError: A repository cannot be had.
    """
    adapter = None if reference.adapter is None else located(reference.adapter, hub, what)
    if reference.hub is None or reference.path is not None:
        return replace(reference, adapter=adapter)
    try:
        side = _snapshot(hub, reference.hub, reference.revision, weights=False)
        found = _snapshot(hub, reference.hub, side.commit, weights=True)
    except CheckpointError as error:
        raise CheckpointError(*(f"cannot open {what}: {problem}" for problem in error.problems)) from None
    return replace(reference, path=found.path, commit=found.commit, adapter=adapter)


def _wanted(recipe: Recipe) -> Iterator[tuple[tuple[str, str | None], tuple[str, bool]]]:
    """Yield the repositories that are not found yet: where the recipe names one, and whether weights are needed."""
    named = [(reference, "tokenizer", False) for reference in _tokenizer_references(recipe.tokenizer)]
    named += [(recipe.donor, "base_model", True)]
    named += [(group.base, "base_model", True) for group in recipe.slices if group.base is not None]
    sources = [source for group in recipe.slices for source in group.sources]
    named += [(item.model, f"{item.key_path}{'.model' * (item.key_path != 'base_model')}", True) for item in sources]
    for reference, key, weights in named:
        for part in (reference, reference.adapter):
            if part is not None and part.hub is not None and part.path is None:
                yield (part.hub, part.revision), (key, weights)


def _tokenizer_references(setting: TokenizerSetting | None) -> list[ModelReference]:
    if setting is None:
        return []
    found = [setting.source, *(entry.get("source") for entry in setting.tokens.values())]
    found += [item.get("model") for item in found if isinstance(item, Mapping)]
    return [item for item in found if isinstance(item, ModelReference)]


def _mapped(recipe: Recipe, local: Callable[[ModelReference], ModelReference]) -> Recipe:
    """Return a recipe with every reference replaced."""

    def group(item: Slice) -> Slice:
        seen: dict[ModelReference, str] = {}
        sources = []
        for source in (replace(source, model=local(source.model)) for source in item.sources):
            if source.model in seen and source.key_path == "base_model":
                continue  # the base was added to the models because its text is another than theirs
            if source.model in seen:
                raise RecipeError(
                    f"{source.key_path}.model: is the same model as {seen[source.model]}: {quoted(source.model.text)} "
                    f"is commit {source.model.commit} too"
                )
            seen[source.model] = source.key_path
            sources.append(source)
        return replace(item, sources=tuple(sources), base=None if item.base is None else local(item.base))

    def token(value: Any) -> Any:
        if isinstance(value, ModelReference):
            return local(value)
        return {key: token(item) for key, item in value.items()} if isinstance(value, Mapping) else value

    setting = recipe.tokenizer
    if setting is not None:
        setting = replace(setting, source=token(setting.source), tokens=token(setting.tokens))
    return replace(
        recipe, slices=tuple(group(item) for item in recipe.slices),
        base=None if recipe.base is None else local(recipe.base), donor=local(recipe.donor),
        inputs=tuple(dict.fromkeys(local(reference) for reference in recipe.inputs)), tokenizer=setting,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# One repository


def _snapshot(hub: Hub, repository: str, revision: str | None, *, weights: bool) -> Snapshot:
    """Return a commit of a repository, complete as far as a merge needs it.

    Args:
        hub: How it is found.
        repository: Its id.
        revision: A branch, tag or commit; None for `main`.
        weights: Whether the weights are wanted, or only what is beside them.

    Raises:
        CheckpointError: It cannot be had.
    """
    whole = cached(hub.root, repository, revision) if revision and _COMMIT.fullmatch(revision) else None
    if whole is not None and not _missing(whole.path, hub.allow_pickle):
        return whole  # a commit does not change, so there is nothing to ask
    if hub.silence or not _library_is_there():
        return _from_cache(hub, repository, revision, weights=weights)
    return _fetched(hub, repository, revision, weights=weights)


def cached(root: Path, repository: str, revision: str | None = None) -> Snapshot | None:
    """Return what the hub's cache holds of a repository, complete or not; None if it holds nothing.

    Args:
        root: Root of the cache.
        repository: The id of the repository.
        revision: A branch, tag or commit; None for `main`.

    Raises:
        CheckpointError: The cache is damaged, or the revision could not be the name of one.
    """
    revision = revision or "main"
    if revision.startswith("/") or "\0" in revision or {"..", "."} & set(re.split(r"[/\\]", revision)):
        raise CheckpointError(f"cannot find {quoted(repository)}: {quoted(revision)} is no revision")
    folder = root / f"models--{repository.replace('/', '--')}"
    commit = revision
    if not _COMMIT.fullmatch(revision):
        reference = folder / "refs" / revision
        try:
            commit = reference.read_text("utf-8").strip() if reference.is_file() else ""
        except (OSError, ValueError):
            commit = "?"
        if not commit:
            return None
        if not _COMMIT.fullmatch(commit):
            raise CheckpointError(
                f"cannot find {quoted(repository)}: {quoted(reference)} holds no commit; delete it and fetch again"
            )
    snapshot = folder / "snapshots" / commit
    return Snapshot(Path(os.path.realpath(snapshot)), commit) if snapshot.is_dir() else None


def _refuse_quantised(repository: str, snapshot: Snapshot) -> None:
    """Refuse packed weights as early as the configuration tells, before they are fetched."""
    place = snapshot.path / "config.json"
    config = read_json_object(place, doing=f"cannot use {quoted(repository)}") if place.is_file() else {}
    entry = config.get("quantization_config")
    if entry:
        method = entry.get("quant_method") if isinstance(entry, dict) else None
        raise CheckpointError(
            f"{quoted(repository)} is quantised with {method or 'an unnamed method'} (quantization_config in "
            "config.json); merging packed values would be meaningless; use the unquantised model"
        )


def _missing(folder: Path, allow_pickle: bool) -> list[str]:
    """Return which weights a snapshot lacks: the shards that its index names, or any weights at all."""
    try:
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    except OSError:
        names = []
    for index in _INDEXES:
        if index in names and (index == _INDEXES[0] or allow_pickle):
            return [shard for shard in _shards(folder / index) if shard not in names]
    ends = (".safetensors", *PICKLE_SUFFIXES, *FOREIGN_SUFFIXES)  # what cannot be merged is refused when it is opened
    return [] if any(name.endswith(ends) for name in names) else ["*.safetensors"]


def _shards(index: Path) -> list[str]:
    mapping = read_json_object(index, doing="cannot use the hub's cache").get("weight_map")
    names = mapping.values() if isinstance(mapping, dict) else ()
    return sorted({name for name in names if isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*", name)})


def _from_cache(hub: Hub, repository: str, revision: str | None, *, weights: bool) -> Snapshot:
    """Return what the cache holds of a repository, or say why it is not enough."""
    found = cached(hub.root, repository, revision)
    named = quoted(f"{repository}@{revision}" if revision else repository)
    way_out = f", and {hub.silence}" if hub.silence else '; to fetch it, pip install "graftwork[hub]"'
    if found is None:
        raise CheckpointError(
            f"{named} is no folder or file here, and it is not in the hub's cache at {quoted(hub.root)}{way_out}"
        )
    missing = _missing(found.path, hub.allow_pickle) if weights else []
    if missing:
        raise CheckpointError(
            f"{named} is not whole in the hub's cache at {quoted(hub.root)}: it lacks {listed(missing)}{way_out}"
        )
    return found


def _library_is_there() -> bool:
    from importlib.util import find_spec

    return find_spec("huggingface_hub") is not None


def _fetched(hub: Hub, repository: str, revision: str | None, *, weights: bool) -> Snapshot:
    """Return a commit of a repository after fetching what is missing; with the network down, what the cache has."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    named = quoted(f"{repository}@{revision}" if revision else repository)

    def fetch(*patterns: str) -> Path:
        return Path(
            snapshot_download(repository, revision=revision, cache_dir=str(hub.root), allow_patterns=list(patterns))
        )

    try:
        if not weights:
            hub.tell(f"looking for {named} on the hub")
            folder = fetch(*_SIDE_FILES)
        else:
            before = cached(hub.root, repository, revision)
            index = None if before is None else before.path / _INDEXES[0]
            hub.tell(f"fetching the weights of {named} unless they are in {hub.root}")
            folder = fetch(*(_shards(index) if index is not None and index.is_file() else ("*.safetensors",)))
            if hub.allow_pickle and _missing(folder, allow_pickle=True):
                fetch("*.bin")
    except RevisionNotFoundError:
        raise CheckpointError(
            f"{named}: the repository has no such revision; check the branch, tag or commit"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{named} is no folder or file here, and on the hub there is no such repository, or you have no access: "
            "check the name, or set HF_TOKEN"
        ) from None
    except LocalEntryNotFoundError as error:
        try:
            return _from_cache(hub, repository, revision, weights=weights)
        except CheckpointError:
            raise CheckpointError(
                f"{named} is no folder or file here, and the hub cannot be reached ({_reason(error)}): "
                "check the network, or fetch the repository elsewhere and give its folder"
            ) from None
    except (HFValidationError, OSError) as error:
        raise CheckpointError(f"cannot fetch {named} from the hub: {_reason(error)}") from None
    missing = _missing(folder, hub.allow_pickle) if weights else []
    if missing:
        raise CheckpointError(f"{named} has no weights that can be read here: it lacks {listed(missing)} on the hub")
    return Snapshot(Path(os.path.realpath(folder)), folder.name)


def _reason(error: BaseException) -> str:
    """Return what the library says, on one line; of a chain of errors what is at its root."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
