"""Reads YAML (or JSON, which is nearly a part of it) into plain values, and says where it is wrong.

The parser's events are turned into values here and not by a loader, because a loader lets the last of two equal keys
win, recurses as deep as the file says, and expands aliases without a limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.constructor import SafeConstructor
from yaml.nodes import ScalarNode
from yaml.resolver import Resolver

from graftwork.merge.errors import RecipeError
from graftwork.merge.problems import join, printable, show

LARGEST_FILE_BYTES = 4 * 2**20
_MOST_VALUES = 100_000
_MOST_DOCUMENTS = 1_000
_DEEPEST = 32

_UNREADABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_HEADING = re.compile(r"^#{1,6} +\S", re.MULTILINE)
_METHOD = re.compile(r"^merge_method *:", re.MULTILINE)
_FENCE = re.compile(r"^```ya?ml\s*$", re.MULTILINE | re.IGNORECASE)
_PLAIN_TAGS = frozenset(f"tag:yaml.org,2002:{word}" for word in ("str", "int", "float", "bool", "null", "map", "seq"))
_MERGE_TAG = "tag:yaml.org,2002:merge"
_ALSO_NESTED = frozenset({"parameters", "base_model", "models", "slices"})
_LOADER: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader

_IN_OUR_WORDS = (
    ("unknown escape character", 'a backslash inside double quotes is an escape; write the path with "/"'),
    ("mapping values are not allowed", "a `:` where no key can stand; is this line indented like its neighbours?"),
    ("did not find expected key", "this line is not indented like the keys around it"),
    ("expected <block end>", "this line is not indented like the keys around it"),
    ("did not find expected '-'", "this line is not indented like the list items around it"),
    ("could not find expected ':'", "a key without `:`"),
    ("unexpected end of stream", "a quote or a bracket is opened and never closed"),
    ("undefined alias", "an alias (*name) without its anchor (&name)"),
    ("found undefined", "an alias (*name) or a tag that is not defined"),
)


@dataclass
class Document:
    """One document of a recipe file.

    Args:
        value: Mappings, lists and scalars.
        problems: What is wrong with it, as (key path, text).
    """

    value: object
    problems: list[tuple[str, str]] = field(default_factory=list)


class _MergeKey:
    """The key `<<`, which copies another mapping's entries."""


@dataclass(eq=False)
class _Container:
    """A mapping or list that is being read."""

    value: dict[str, object] | list[object]
    path: str
    anchor: str | None
    size: int = 1
    key: str | type[_MergeKey] | None = None
    lines: dict[str, int] = field(default_factory=dict)
    merged: list[object] = field(default_factory=list)


def read_documents(text: str, source: str, root_keys: frozenset[str]) -> list[Document]:
    """Return the documents in `text`, without the empty ones.

    Args:
        text: YAML or JSON.
        source: What to call the text in messages, normally its file name.
        root_keys: Keys of the root level, for a hint when one of them is indented wrongly.

    Raises:
        RecipeError: The text is not YAML.
    """
    source = printable(source)
    if len(text) > LARGEST_FILE_BYTES:
        raise RecipeError(f"{source}: has more than {LARGEST_FILE_BYTES // 2**20} MiB; this is no recipe")
    unreadable = _UNREADABLE.search(text)
    if unreadable:
        line = text.count("\n", 0, unreadable.start()) + 1
        raise RecipeError(f"{source}, line {line}: holds the character U+{ord(unreadable[0]):04X}; this is no text")
    _refuse_markdown(text, source)
    body = text.removeprefix("\ufeff")
    if body.lstrip()[:1] in ("{", "["):
        body = body.replace("\t", " ")  # JSON may be indented with tabs, YAML may not; inside a JSON string none can be
    try:
        documents = list(_Reader(source).documents(body))
    except yaml.MarkedYAMLError as error:
        raise RecipeError(_syntax_error(error, body, source, root_keys)) from None
    except (yaml.YAMLError, UnicodeError, ValueError):
        raise RecipeError(f"{source}: cannot be read as YAML") from None
    if len(documents) > _MOST_DOCUMENTS:
        raise RecipeError(f"{source}: holds {len(documents)} documents, more than {_MOST_DOCUMENTS:,}")
    return [document for document in documents if document.value is not None or document.problems]


class _Reader:
    """Turns parser events into documents."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.count = 0
        self.resolver: Any = Resolver()
        self.constructor = SafeConstructor()
        self.anchors: dict[str, tuple[object, int]] = {}
        self.open: list[_Container] = []

    def documents(self, text: str) -> Iterator[Document]:
        document = Document(None)
        for event in yaml.parse(text, Loader=_LOADER):
            if isinstance(event, yaml.DocumentStartEvent):
                document = Document(None)
                self.anchors, self.open = {}, []
            elif isinstance(event, yaml.DocumentEndEvent):
                yield document
            elif isinstance(event, yaml.ScalarEvent):
                self._scalar(event, document)
            elif isinstance(event, yaml.AliasEvent):
                self._alias(event, document)
            elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
                self._start(event, document)
            elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
                self._end(document)

    def _expand(self, values: int, event: yaml.Event) -> None:
        self.count += values
        if self.count > _MOST_VALUES:
            line = _line(event)
            raise RecipeError(f"{self.source}, line {line}: expands to more than {_MOST_VALUES:,} values")

    def _path(self, document: Document) -> str:
        """Return the key path of the value that comes next."""
        if not self.open:
            return ""
        parent = self.open[-1]
        if isinstance(parent.value, list):
            return f"{parent.path}[{len(parent.value)}]"
        return join(parent.path, parent.key if isinstance(parent.key, str) else "<<")

    def _scalar(self, event: yaml.ScalarEvent, document: Document) -> None:
        self._expand(1, event)
        tag = event.tag
        if tag is None or tag == "!":
            tag = self.resolver.resolve(ScalarNode, event.value, event.implicit)
        elif tag not in _PLAIN_TAGS:
            document.problems.append((self._path(document), f"has the tag {show(tag)}, which is not allowed"))
            tag = "tag:yaml.org,2002:str"
        parent = self.open[-1] if self.open else None
        if parent is not None and isinstance(parent.value, dict) and parent.key is None:
            if tag == _MERGE_TAG:
                parent.key = _MergeKey
                return
            self._key(parent, event.value, event, document)
            return
        self._add(self._construct(tag, event.value), 1, event.anchor, document)

    def _key(self, parent: _Container, key: str, event: yaml.Event, document: Document) -> None:
        line = _line(event)
        if key in parent.lines:
            path = join(parent.path, key)
            document.problems.append((path, f"is written twice, in lines {parent.lines[key]} and {line}"))
        else:
            parent.lines[key] = line
        parent.key = key

    def _construct(self, tag: str, text: str) -> object:
        try:
            if tag.endswith(":int"):
                number = self.constructor.construct_yaml_int(ScalarNode(tag, text))
                return number if abs(number) < 2**63 else text
            if tag.endswith(":float"):
                return float(self.constructor.construct_yaml_float(ScalarNode(tag, text)))
            if tag.endswith(":bool"):
                return bool(self.constructor.construct_yaml_bool(ScalarNode(tag, text)))
        except (ValueError, IndexError, KeyError, OverflowError):
            return text
        if tag.endswith(":null"):
            return None
        # Dates, `=` and the like mean nothing in a recipe: the text is what was meant.
        return text

    def _alias(self, event: yaml.AliasEvent, document: Document) -> None:
        line = _line(event)
        if event.anchor not in self.anchors:
            raise RecipeError(
                f"{self.source}, line {line}: the alias *{show(event.anchor)[1:-1]} has no anchor before it"
            )
        value, size = self.anchors[event.anchor]
        self._expand(size, event)
        parent = self.open[-1] if self.open else None
        if parent is not None and isinstance(parent.value, dict) and parent.key is None:
            if not isinstance(value, str):
                raise RecipeError(f"{self.source}, line {line}: a key must be a word")
            self._key(parent, value, event, document)
            return
        self._add(value, size, None, document)

    def _start(self, event: yaml.MappingStartEvent | yaml.SequenceStartEvent, document: Document) -> None:
        self._expand(1, event)
        line = _line(event)
        if len(self.open) >= _DEEPEST:
            raise RecipeError(f"{self.source}, line {line}: is nested deeper than {_DEEPEST} levels")
        if self.open and isinstance(self.open[-1].value, dict) and self.open[-1].key is None:
            raise RecipeError(f"{self.source}, line {line}: a key must be a word, not a list or a mapping")
        if event.tag is not None and event.tag != "!" and event.tag not in _PLAIN_TAGS:
            document.problems.append((self._path(document), f"has the tag {show(event.tag)}, which is not allowed"))
        path = self._path(document)
        value: dict[str, object] | list[object] = {} if isinstance(event, yaml.MappingStartEvent) else []
        self.open.append(_Container(value, path, event.anchor))

    def _end(self, document: Document) -> None:
        container = self.open.pop()
        if isinstance(container.value, dict):
            for mapping in container.merged:
                entries = [mapping] if isinstance(mapping, dict) else mapping
                if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                    document.problems.append((container.path, "`<<` needs a mapping"))
                    continue
                for entry in entries:
                    for key, value in entry.items():
                        container.value.setdefault(key, value)
        self._add(container.value, container.size, container.anchor, document)

    def _add(self, value: object, size: int, anchor: str | None, document: Document) -> None:
        if anchor is not None:
            self.anchors[anchor] = (value, size)
        if not self.open:
            document.value = value
            return
        parent = self.open[-1]
        parent.size += size
        if isinstance(parent.value, list):
            parent.value.append(value)
        elif isinstance(parent.key, str):
            parent.value.setdefault(parent.key, value)
            parent.key = None
        else:
            parent.merged.append(value)
            parent.key = None


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 0


def _refuse_markdown(text: str, source: str) -> None:
    """Recognise a model card, whose recipe stands in a block of its own."""
    body = text.removeprefix("\ufeff")
    if body.startswith("---"):
        lines = body.splitlines()
        ends = [place for place, line in enumerate(lines[1:], start=1) if line.rstrip() == "---"]
        if not ends:
            return
        front = "\n".join(lines[1 : ends[0]])
        rest = "\n".join(lines[ends[0] + 1 :])
        # A `#` begins a heading in Markdown and a comment in YAML, so it alone proves nothing beside a merge_method.
        if _METHOD.search(front) or not ("\n```" in rest or (_HEADING.search(rest) and not _METHOD.search(rest))):
            return
    elif not body.startswith("```") and not _FENCE.search(body):
        return
    fence = next(
        (match for match in _FENCE.finditer(body) if "merge_method" in body[match.end() :].partition("```")[0]),
        _FENCE.search(body),
    )
    if fence is None:
        raise RecipeError(f"{source}: this is a README without a YAML block; give the recipe's own file")
    line = body.count("\n", 0, fence.end()) + 2
    raise RecipeError(f"{source}: this is a README; its YAML block starts at line {line}; copy the block to a file")


def _syntax_error(error: yaml.MarkedYAMLError, text: str, source: str, root_keys: frozenset[str]) -> str:
    """Return one line that says where the text stops being YAML, and what to do."""
    mark = error.problem_mark or error.context_mark
    problem = error.problem or error.context or "not YAML"
    said = next((ours for theirs, ours in _IN_OUR_WORDS if theirs in problem), printable(problem))
    if mark is None:
        return f"{source}: {said}"
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    letter = line[mark.column] if mark.column < len(line) else ""
    if "cannot start any token" in problem:
        said = (
            "a tab; YAML is indented with blanks"
            if letter == "\t"
            else f"a value that starts with {letter} must be quoted"
        )
    hint = _indentation_hint(lines, mark.line, root_keys)
    return f"{source}, line {mark.line + 1}, column {mark.column + 1}: {hint or said}"


def _indentation_hint(lines: list[str], place: int, root_keys: frozenset[str]) -> str:
    key_line = re.compile(r"^( *)([A-Za-z_]+) *:(\s|$)")
    first: int | None = None
    for line in lines:
        found = key_line.match(line)
        if found and found[2] in root_keys:
            first = len(found[1])
            break
    found = key_line.match(lines[place]) if place < len(lines) else None
    if first is None or found is None or found[2] not in root_keys or len(found[1]) == first:
        return ""
    if found[2] in _ALSO_NESTED and len(found[1]) > 1:
        return ""  # it may belong to an entry, and then it should stand elsewhere
    return f"`{found[2]}` is indented by {len(found[1])}, should be {first}"
