"""What a recipe's tokenizer means for a merge: the output's tokens, views of embeddings and heads, files, token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from graftwork.merge.checkpoint import Checkpoint, TensorEntry, listed, parse_json, quoted
from graftwork.merge.errors import MismatchError
from graftwork.merge.layers import find_stacks, is_head_side
from graftwork.merge.modules import owner_of
from graftwork.merge.recipe import ModelReference, Recipe, Slice
from graftwork.merge.token_rows import RowPlan, RowRule, RowView, viewed
from graftwork.merge.tokens import (
    TOKENIZER_FILES,
    OutputVocabulary,
    Vocabulary,
    read_vocabulary,
    same_vocabulary,
    union_vocabulary,
    with_tokens,
)

_TAILS = (
    "embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared", "lm_head", "embed_out", "output",
    "decoder",
)  # fmt: skip
_NEVER = ("position", "token_type", "norm")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@dataclass(slots=True)
class TokenizerPlan:
    """What becomes of tokens.

    Args:
        vocabulary: The output's tokens.
        size: Rows of embeddings and heads.
        checkpoints: The inputs, with embeddings and heads in the output's order.
        files: Tokenizer files of the output, by name.
        ids: What becomes of token ids of the donor's configuration; empty if they stay.
        notes: What a user should know.
    """

    vocabulary: OutputVocabulary
    size: int
    checkpoints: list[Checkpoint]
    files: dict[str, bytes | Path]
    ids: dict[int, int | None] = field(default_factory=dict)
    fallback: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def edited(self, text: str, what: str) -> str:
        """Return `config.json` or `generation_config.json` with the vocabulary's size and the ids of its tokens."""
        config = parse_json(text)
        levels = [config, *(config[key] for key in ("text_config",) if isinstance(config.get(key), dict))]
        sized = [level for level in levels if "vocab_size" in level]
        for level in sized[-1:]:
            level["vocab_size"] = self.size
        for level in levels if self.ids else ():
            for key in _TOKEN_IDS:
                if key in level:
                    level[key] = self._mapped(level[key], key, what)
        return json.dumps(config, indent=2, ensure_ascii=False) + "\n"

    def _mapped(self, value: Any, key: str, what: str) -> Any:
        if isinstance(value, list):
            return [self._mapped(item, key, what) for item in value]
        if isinstance(value, bool) or not isinstance(value, int) or value not in self.ids:
            return value
        found = self.ids[value]
        if found is None:
            found = self.fallback.get(key, value)
            self.notes.append(f"{what}: the output's tokenizer lacks the donor's {key} {value}; it becomes {found}")
        return found


def vocabulary_tensors(checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    """Return the tensors with one row per token: embeddings, heads and their biases."""
    config = checkpoint.config or {}
    text = config.get("text_config")
    size = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    found = {}
    for name, entry in checkpoint.tensors.items():
        module, _, part = name.rpartition(".")
        named = module.rpartition(".")[2] in _TAILS or name.endswith("cls.predictions.bias")
        if not named or part not in {"weight", "bias"} or any(word in name for word in _NEVER) or not entry.shape:
            continue
        if isinstance(size, int) and entry.shape[0] < size:
            continue
        found[name] = entry
    return found


def plan_tokenizer(
    recipe: Recipe, references: Sequence[ModelReference], checkpoints: Sequence[Checkpoint], labels: Sequence[str]
) -> TokenizerPlan:
    """Return what a recipe's tokenizer setting means.

    Args:
        recipe: The recipe, with a tokenizer setting.
        references: Its inputs.
        checkpoints: The inputs, opened.
        labels: Their names.

    Raises:
        MismatchError: A model has no tokenizer, or a token or row is not there; carries every problem.
    """
    return _Tokens(recipe, references, checkpoints, labels).plan()


def differing_tokens(checkpoints: Sequence[Checkpoint], labels: Sequence[str]) -> list[str]:
    """Return a line for each model in which ids mean other tokens than in the first, from the tokenizers' files.

    Models without a tokenizer that can be read are left out, and so are ids that only one of two models has.
    """
    known: list[tuple[str, dict[str, bytes], Path]] = []
    for checkpoint, label in zip(checkpoints, labels, strict=True):
        folder = checkpoint.tokenizer_folder
        if folder is None:
            continue
        files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
        if known and files == known[0][1]:
            continue  # as nearly always, and large files are slow to parse
        known.append((label, files, folder))
    lines: list[str] = []
    if len(known) < 2:
        return lines
    found = [(label, read_vocabulary(folder)) for label, _, folder in known]
    readable = [(label, {n: token for token, n in own.ids.items()}) for label, own in found if own is not None]
    for label, tokens in readable[1:]:
        first, own = readable[0]
        other = [number for number in sorted(own.keys() & tokens.keys()) if own[number] != tokens[number]]
        if other:
            shown = ", ".join(f"{n} is {quoted(own[n])} and {quoted(tokens[n])}" for n in other[:3])
            more = ", …" if len(other) > 3 else ""
            lines.append(
                f"{len(other)} ids mean other tokens in {label} than in {first} ({shown}{more}), and embeddings are "
                "merged by id; write `tokenizer: {source: union}` to merge them by token"
            )
    return lines


class _Tokens:
    def __init__(
        self, recipe: Recipe, references: Sequence[ModelReference], checkpoints: Sequence[Checkpoint],
        labels: Sequence[str],
    ) -> None:  # fmt: skip
        assert recipe.tokenizer is not None
        self.recipe, self.setting = recipe, recipe.tokenizer
        self.references, self.checkpoints, self.labels = list(references), list(checkpoints), list(labels)
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.tensors = [vocabulary_tensors(checkpoint) for checkpoint in checkpoints]
        self.vocabularies: list[Vocabulary] = []

    def plan(self) -> TokenizerPlan:
        for checkpoint, tensors, label in zip(self.checkpoints, self.tensors, self.labels, strict=True):
            place = checkpoint.tokenizer_folder
            found = None if place is None else read_vocabulary(place)
            if found is None:
                self.problems.append(f"cannot merge tokenizers: {label} has no tokenizer files; leave `tokenizer` out")
                continue
            rows = min((entry.shape[0] for entry in tensors.values()), default=found.size)
            if found.size > rows:
                self.notes.append(
                    f"{label}: {found.size - rows} tokens of its tokenizer have no row in its embedding ({rows} rows)"
                )
            self.vocabularies.append(found.within(rows))
        if self.problems:
            raise MismatchError(*self.problems)
        output = with_tokens(self._output(), self.setting.tokens)
        pad = self.setting.pad_to_multiple_of or 1
        size = -(-output.size // pad) * pad
        if size % 2 and pad == 1:
            self.notes.append(f"the vocabulary has {size} rows; `pad_to_multiple_of: 64` makes matrices faster")
        views = self._views(output, size)
        if self.problems:
            raise MismatchError(*self.problems)
        files = output.files()
        donor = self.references.index(self.recipe.donor)
        ids = {} if output.donor.folder == self.checkpoints[donor].tokenizer_folder else self._ids(donor, output)
        other = next((c.config for c in self.checkpoints if c.tokenizer_folder == output.donor.folder), None)
        return TokenizerPlan(
            output,
            size,
            [
                viewed(checkpoint, own) if own else checkpoint
                for checkpoint, own in zip(self.checkpoints, views, strict=True)
            ],
            files,
            ids,
            {key: value for key, value in (other or {}).items() if key in _TOKEN_IDS},
            [*self.notes, *output.notes],
        )

    def _output(self) -> OutputVocabulary:
        source = self.setting.source
        donor = self.references.index(self.recipe.donor)
        if isinstance(source, ModelReference):
            if source in self.references:
                return same_vocabulary(self.vocabularies[self.references.index(source)])
            found = None if source.path is None else read_vocabulary(source.path)
            if found is None:
                raise MismatchError(f"tokenizer.source: {quoted(source.text)} has no tokenizer files")
            return same_vocabulary(found)
        if source == "base":
            return same_vocabulary(self.vocabularies[donor])
        others = [
            (self.labels[place], self.vocabularies[place]) for place in range(len(self.references)) if place != donor
        ]
        return union_vocabulary(
            self.vocabularies[donor], others, new_tokens="added" if self.setting.new_tokens == "added" else "all"
        )

    def _views(self, output: OutputVocabulary, size: int) -> list[dict[str, RowView]]:
        views: list[dict[str, RowView]] = [{} for _ in self.checkpoints]
        for name in dict.fromkeys(name for tensors in self.tensors for name in tensors):
            group = self._group(name)
            sources = () if group is None else group.sources
            models = [self.references.index(source.model) for source in sources]
            models = [place for place in dict.fromkeys(models) if name in self.tensors[place]]
            donor = self.references.index(self.recipe.donor)
            if not models and name in self.tensors[donor]:
                models = [donor]
            if not models:
                continue
            base = None if group is None else self._base_among(group, models)
            rows = np.full((len(models), output.size), -1, np.int64)
            for number, place in enumerate(models):
                ids = self.vocabularies[place].ids
                for row, token in enumerate(output.tokens):
                    if token is not None:
                        rows[number, row] = ids.get(token, -1)
            nowhere = [
                output.tokens[row] for row in np.flatnonzero((rows < 0).all(0)) if output.tokens[row] is not None
            ]
            rules = self._rules(output, models, name)
            missing = [token for token in nowhere if token not in self.setting.tokens]
            if missing:
                self.notes.append(
                    f'{len(missing)} tokens have no row in any model for "{name}" and get zeros: {listed(missing)}'
                )
            plan = RowPlan(rows, base, rules, size)
            read = [(self.checkpoints[place], self.tensors[place][name]) for place in models]
            for number, place in enumerate(models):
                views[place][name] = RowView(plan, number, read)
        return views

    def _group(self, name: str) -> Slice | None:
        """Return which slice a tensor of tokens is made of; None if it belongs to no module and is copied."""
        groups: Sequence[Slice] | None = self.recipe.slices
        if self.recipe.modules:
            stacks = find_stacks(
                dict.fromkeys(known for checkpoint in self.checkpoints for known in checkpoint.tensors)
            )
            owner = owner_of(name, self.recipe.modules, stacks)
            groups = None if owner is None else self.recipe.modules[owner]
        return None if groups is None else groups[-1] if is_head_side(name) else groups[0]

    def _base_among(self, group: Slice, models: Sequence[int]) -> int | None:
        base = group.base or self.recipe.base
        if base is None or base not in self.references:
            return None
        place = self.references.index(base)
        return models.index(place) if place in models else None

    def _rules(self, output: OutputVocabulary, models: Sequence[int], name: str) -> dict[int, RowRule]:
        """Return what the recipe says of single tokens, by output row."""
        numbers = {token: row for row, token in enumerate(output.tokens)}
        rules = {}
        for token, entry in self.setting.tokens.items():
            source, force = entry.get("source"), bool(entry.get("force"))
            if source is None:
                continue
            here = f"tokenizer.tokens.{token}"
            if isinstance(source, Mapping) and source["kind"] == "zero":
                rules[numbers[token]] = RowRule(None, force=force)
                continue
            reference = source["model"] if isinstance(source, Mapping) else source
            if reference not in self.references or self.references.index(reference) not in models:
                self.problems.append(f'{here}: {reference.text} is not among the models of "{name}"; name one of them')
                continue
            place = self.references.index(reference)
            wanted = source.get("token", source.get("token_id")) if isinstance(source, Mapping) else token
            rows = self.tensors[place][name].shape[0]
            row = wanted if isinstance(wanted, int) else self.vocabularies[place].ids.get(str(wanted), -1)
            if not 0 <= row < rows:
                self.problems.append(f"{here}: {self.labels[place]} has no token {quoted(wanted)}")
                continue
            rules[numbers[token]] = RowRule(models.index(place), row, force)
        return rules

    def _ids(self, donor: int, output: OutputVocabulary) -> dict[int, int | None]:
        numbers = {token: row for row, token in enumerate(output.tokens) if token is not None}
        return {number: numbers.get(token) for token, number in self.vocabularies[donor].ids.items()}
