"""The tokens of models, read from their tokenizer files, and the vocabulary of an output.

No tokenizer library is used: which token has which id is all that a merge needs to know, and files that are edited as
JSON load wherever the originals did. New tokens are appended as added tokens; merges and scores stay the donor's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from graftwork.merge.checkpoint import listed, parse_json, quoted, shown
from graftwork.merge.errors import CheckpointError, MismatchError

NewTokens = Literal["all", "added"]

_SPACE_MARKS = ("Ġ", "▁")
_PIECE_KINDS = {1, 4, 5, 6}
"""SentencePiece: normal, user-defined, unused, byte; 2 and 3 are unknown and control, which count as added."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
"""Each of these says alone which token has which id."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of one model.

    Args:
        folder: Where its tokenizer is.
        ids: Id of every token.
        added: Flags of added tokens, by content; the others are ordinary.
        source: The file that was read.
    """

    folder: Path
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    source: str

    @property
    def size(self) -> int:
        """One more than the largest id; there may be holes."""
        return max(self.ids.values(), default=-1) + 1

    def within(self, rows: int) -> Vocabulary:
        """Return the tokens that an embedding of so many rows has."""
        if self.size <= rows:
            return self
        ids = {token: number for token, number in self.ids.items() if number < rows}
        return Vocabulary(self.folder, ids, {t: f for t, f in self.added.items() if t in ids}, self.source)


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """Return the tokens of the tokenizer in a folder, or None if there is none.

    Raises:
        CheckpointError: A tokenizer file is damaged.
    """
    added: dict[str, Mapping[str, Any]] = {}
    ids: dict[str, int] = {}
    source = ""
    if (folder / "tokenizer.json").is_file():
        source = "tokenizer.json"
        whole = _object(folder / source)
        model = whole.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, dict):
            ids.update(vocabulary)
        elif isinstance(vocabulary, list):
            ids.update((str(piece[0]), number) for number, piece in enumerate(vocabulary))
        else:
            raise CheckpointError(f"cannot read {quoted(folder / source)}: model.vocab is {shown(vocabulary)}")
        for entry in whole.get("added_tokens") or ():
            ids[entry["content"]] = entry["id"]
            added[entry["content"]] = entry
    elif (folder / "vocab.json").is_file():
        source = "vocab.json"
        ids.update(_object(folder / source))
    elif (folder / "vocab.txt").is_file():
        source = "vocab.txt"
        lines = (folder / source).read_text(encoding="utf-8").split("\n")
        ids.update((token, number) for number, token in enumerate(lines) if token)
    else:
        source = next((name for name in ("tokenizer.model", "spiece.model") if (folder / name).is_file()), "")
        if not source:
            return None
        for number, (piece, kind) in enumerate(_pieces((folder / source).read_bytes(), folder / source)):
            ids[piece] = number
            if kind not in _PIECE_KINDS:
                added[piece] = {"content": piece, "special": True}
    for content, flags, number in _more_added(folder):
        if content not in ids:
            ids[content] = number
            added[content] = flags
    bad = [
        token for token, number in ids.items() if isinstance(number, bool) or not isinstance(number, int) or number < 0
    ]
    if bad:
        raise CheckpointError(f"cannot read {quoted(folder / source)}: the ids of {listed(bad)} are no whole numbers")
    return Vocabulary(folder, ids, added, source)


def _more_added(folder: Path) -> Iterable[tuple[str, Mapping[str, Any], int]]:
    """Yield added tokens that stand beside the tokenizer: content, flags, id."""
    if (folder / "tokenizer_config.json").is_file():
        decoder = _object(folder / "tokenizer_config.json").get("added_tokens_decoder")
        for number, flags in decoder.items() if isinstance(decoder, dict) else ():
            if isinstance(flags, dict) and str(number).isdigit() and isinstance(flags.get("content"), str):
                yield flags["content"], flags, int(number)
    if (folder / "added_tokens.json").is_file():
        for content, number in _object(folder / "added_tokens.json").items():
            yield content, {"content": content, "special": False}, number


def _object(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {quoted(path)}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"cannot read {quoted(path)}: {error}; repair it or fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"cannot read {quoted(path)}: it holds {shown(value)}, not a JSON object")
    return value


def _pieces(data: bytes, path: Path) -> Iterable[tuple[str, int]]:
    """Yield text and kind of the pieces of a SentencePiece model: field 1 of the message, repeated."""

    def fields(part: bytes) -> Iterable[tuple[int, Any]]:
        place = 0
        while place < len(part):
            key, place = _varint(part, place)
            wire = key & 7
            if wire == 0:
                value: Any
                value, place = _varint(part, place)
            elif wire == 2:
                size, place = _varint(part, place)
                value, place = part[place : place + size], place + size
            elif wire in {1, 5}:
                size = 8 if wire == 1 else 4
                value, place = part[place : place + size], place + size
            else:
                raise ValueError
            yield key >> 3, value

    try:
        for number, value in fields(data):
            if number == 1:
                inner = dict(fields(value))
                yield inner[1].decode("utf-8"), inner.get(3, 1)
    except (ValueError, KeyError, IndexError, AttributeError, UnicodeDecodeError):
        raise CheckpointError(f"cannot read {quoted(path)}: it is no SentencePiece model; fetch it again") from None


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place


# ---------------------------------------------------------------------------------------------------------------------
# The output's vocabulary


@dataclass(frozen=True, slots=True)
class OutputVocabulary:
    """The tokens of an output.

    Args:
        donor: The tokenizer whose files are edited.
        tokens: Token of every id; None for a hole.
        new: Added tokens that the donor lacks: content and flags, in the order of their ids.
        notes: What a user should know.
    """

    donor: Vocabulary
    tokens: tuple[str | None, ...]
    new: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def size(self) -> int:
        """Number of rows that the tokens need."""
        return len(self.tokens)

    def files(self) -> dict[str, bytes | Path]:
        """Return the tokenizer files of the output by name: the donor's, with new tokens appended.

        Raises:
            MismatchError: The donor's tokenizer cannot be extended.
        """
        files: dict[str, bytes | Path] = {
            name: self.donor.folder / name for name in TOKENIZER_FILES if (self.donor.folder / name).is_file()
        }
        if not self.new:
            return files
        if "tokenizer.json" not in files:
            raise MismatchError(
                f"cannot add {len(self.new)} tokens to {quoted(self.donor.folder / self.donor.source)}: it can be read "
                "but not extended; convert it once with AutoTokenizer.from_pretrained(X).save_pretrained(X)"
            )
        whole = _object(self.donor.folder / "tokenizer.json")
        first = self.size - len(self.new)
        entries = [
            {
                **_FLAGS,
                **{key: value for key, value in flags.items() if key in _FLAGS},
                "id": first + at,
                "content": token,
            }
            for at, (token, flags) in enumerate(self.new)
        ]
        order = ("id", "content", *_FLAGS)
        whole["added_tokens"] = [
            *(whole.get("added_tokens") or []),
            *({key: entry[key] for key in order} for entry in entries),
        ]
        files["tokenizer.json"] = _dumped(whole)
        if "tokenizer_config.json" in files:
            config = _object(self.donor.folder / "tokenizer_config.json")
            decoder = config.get("added_tokens_decoder")
            if isinstance(decoder, dict):
                for entry in entries:
                    decoder[str(entry["id"])] = {"content": entry["content"], **{key: entry[key] for key in _FLAGS}}
                files["tokenizer_config.json"] = _dumped(config)
        return files


_FLAGS: dict[str, Any] = {
    "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False,
}  # fmt: skip


def _dumped(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def same_vocabulary(vocabulary: Vocabulary) -> OutputVocabulary:
    """Return the output vocabulary that is one model's."""
    tokens: list[str | None] = [None] * vocabulary.size
    for token, number in vocabulary.ids.items():
        tokens[number] = token
    return OutputVocabulary(vocabulary, tuple(tokens))


def union_vocabulary(
    donor: Vocabulary, others: Sequence[tuple[str, Vocabulary]], *, new_tokens: NewTokens = "all"
) -> OutputVocabulary:
    """Return the union of vocabularies: the donor's ids stay, new tokens follow in the order of the models.

    First come the others' ordinary tokens by id (unless `new_tokens` is `added`), model by model, then all added ones.

    Args:
        donor: Whose tokenizer the output has.
        others: Names and vocabularies of the other models, in recipe order.
        new_tokens: Which tokens are taken over.
    """
    tokens = list(same_vocabulary(donor).tokens)
    known = set(donor.ids)
    new: list[tuple[str, Mapping[str, Any]]] = []
    notes = []
    ordinary = unreachable = 0

    def take(token: str, flags: Mapping[str, Any]) -> None:
        known.add(token)
        tokens.append(token)
        new.append((token, flags))

    for _, vocabulary in others if new_tokens == "all" else ():
        for token, _number in sorted(vocabulary.ids.items(), key=lambda item: item[1]):
            if token not in known and token not in vocabulary.added:
                take(token, {})
                ordinary += 1
                unreachable += token.startswith(_SPACE_MARKS)
    flags_of = dict(donor.added)
    for name, vocabulary in others:
        for token in sorted(vocabulary.added, key=lambda item: vocabulary.ids[item]):
            flags = vocabulary.added[token]
            if token not in known:
                take(token, flags)
            elif token in flags_of and bool(flags_of[token].get("special")) != bool(flags.get("special")):
                notes.append(f"the token {quoted(token)} is special in one model and not in {name}; the first counts")
            flags_of.setdefault(token, flags)
    if new:
        notes.append(
            f"the output's tokenizer has {len(new)} tokens more than {donor.folder.name}'s: {ordinary} ordinary ones, "
            f"of which {unreachable} begin with a space mark and can never be produced, and {len(new) - ordinary} "
            "added ones" + ("; `tokenizer: {new_tokens: added}` takes only these" if ordinary else "")
        )
    return OutputVocabulary(donor, tuple(tokens), tuple(new), tuple(dict.fromkeys(notes)))


def with_tokens(vocabulary: OutputVocabulary, tokens: Iterable[str]) -> OutputVocabulary:
    """Return the vocabulary with further ordinary added tokens, those that are not there yet."""
    missing = [token for token in dict.fromkeys(tokens) if token not in set(vocabulary.tokens)]
    return OutputVocabulary(
        vocabulary.donor,
        (*vocabulary.tokens, *missing),
        (*vocabulary.new, *((token, {}) for token in missing)),
        vocabulary.notes,
    )
