"""Checkpoint: a lazy view of one safetensors file, a model folder or a sharded index.

Opening reads headers and JSON files only, and believes nothing in them until it has been checked: a header is data from
a stranger. Values are read with `pread` into buffers of the caller. Nothing is memory-mapped, because a file that
shrinks under a memory map kills the process, where a short read gives an error line.

Pickled checkpoints are read by `graftwork.merge.pickled`, and only on request.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import xxhash

from graftwork.merge.dtypes import BITS
from graftwork.merge.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 65_536
"""Elements per block of a tensor's digest, and of every reduction."""

HEADER_LIMIT = 100_000_000
"""The longest header, in bytes, that the safetensors format allows."""

JSON_LIMIT = 64 * 1024 * 1024
"""The longest JSON side file, in bytes, that is read; the largest known index is far below."""

DEPTH_LIMIT = 64
"""How deeply JSON may be nested."""

EDGE = 4096
"""Bytes at each end of a tensor that the quick digest looks at."""

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
FOREIGN_SUFFIXES = MappingProxyType(
    {".gguf": "GGUF", ".onnx": "ONNX", ".h5": "HDF5", ".hdf5": "HDF5", ".keras": "Keras", ".msgpack": "msgpack",
     ".tflite": "TFLite", ".npz": "npz"}
)  # fmt: skip

USE_PREADV = hasattr(os, "preadv")
"""Whether positioned reads are used; without them each read seeks under a lock."""

_LARGEST = 2**63 - 1
_SHARD_NAME = re.compile(r"(?P<stem>.+)-\d{5,6}-of-(?P<count>\d{5,6})\.safetensors")

ReadRange = Callable[[int, memoryview], None]
"""Fills a buffer from a byte offset of one tensor that does not lie in a safetensors file."""


TASK_MASKS_NAME = "task_masks.safetensors"
"""What a merge writes beside a model so that the models of single tasks come back from it; no model itself."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies and what it looks like."""

    name: str
    dtype: str
    """The code of the safetensors format, such as `BF16`."""
    shape: tuple[int, ...]
    file: Path
    start: int
    """Absolute byte offset in the file (0 for a tensor of a pickle)."""
    size: int
    """Length in bytes."""

    @property
    def elements(self) -> int:
        """The number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Part:
    """A model in a sub-folder of another: a component of a pipeline, or a module with weights of its own.

    Args:
        stem: What its file of weights is called, without the suffix.
        config: Its `config.json`, or None.
    """

    stem: str
    config: Mapping[str, Any] | None


def quoted(text: object, limit: int = 200) -> str:
    """Return `text` in double quotes on one line, whatever it holds, shortened to `limit` characters."""
    plain = str(text)
    if len(plain) > limit:
        plain = f"{plain[: limit // 2]}…{plain[-limit // 2 :]}"
    return json.dumps(plain, ensure_ascii=not plain.isprintable())


def shown(value: object, limit: int = 60) -> str:
    """Return a JSON value as it may appear in a message: on one line and short."""
    if isinstance(value, str):
        return quoted(value, limit)
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, list | tuple):
        inner = ", ".join(shown(item, 20) for item in value[:8])
        return f"[{inner}{', …' if len(value) > 8 else ''}]"
    if isinstance(value, dict):
        return f"an object of {len(value)} keys"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def listed(names: Iterable[object], limit: int = 6) -> str:
    """Return quoted names separated by commas, the first `limit` of them and how many more there are."""
    every = list(names)
    text = ", ".join(quoted(name) for name in every[:limit])
    return text if len(every) <= limit else f"{text} and {len(every) - limit} more"


class _DuplicateKeyError(ValueError):
    """A JSON object has the same key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(f"the key {quoted(key)} appears twice")
            seen.add(key)
    return result


def parse_json(data: bytes | str, *, unique: bool = False) -> Any:
    """Return the JSON value in `data`; whatever is wrong with it is a ValueError with one line.

    Args:
        data: The text, in UTF-8 if it is bytes.
        unique: Refuse objects that have the same key twice.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        value = json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_unique if unique else None)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos})") from None
    except _DuplicateKeyError:
        raise
    except ValueError:
        # Python limits the digits of an integer; its message speaks of interpreter settings.
        raise ValueError("a number has too many digits") from None
    if _is_too_deep(value):
        raise ValueError("the JSON is nested too deeply")
    return value


def _is_too_deep(value: Any) -> bool:
    """Say whether JSON is nested deeper than any file of a model, so that no walk over it runs out of stack."""
    layer = [value]
    for _ in range(DEPTH_LIMIT):
        containers = [item for item in layer if isinstance(item, dict | list)]
        if not containers:
            return False
        layer = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
    return True


def read_json_object(path: Path, *, doing: str, unique: bool = False) -> dict[str, Any]:
    """Return the object in a JSON file, or raise a CheckpointError that starts with `doing`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{doing}: {quoted(path)} is not a regular file; replace it")
        size = path.stat().st_size
        if size > JSON_LIMIT:
            raise CheckpointError(
                f"{doing}: {quoted(path)} has {size} bytes, the limit for a JSON file is {JSON_LIMIT}; "
                "check that it is what its name says"
            )
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{doing}: {quoted(path)} {_reason(error)}") from None
    try:
        value = parse_json(data, unique=unique)
    except ValueError as error:
        raise CheckpointError(f"{doing}: {quoted(path)}: {error}; repair it or fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{doing}: {quoted(path)} holds {shown(value)}, not a JSON object; repair it or fetch it again"
        )
    return value


def module_folders(modules: Path, *, doing: str) -> list[str]:
    """Return the sub-folders that a sentence-transformers `modules.json` names."""
    try:
        if modules.stat().st_size > JSON_LIMIT:
            raise ValueError("it is too long")
        value = parse_json(modules.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{doing}: {quoted(modules)}: {error}; repair it or fetch it again") from None
    if not isinstance(value, list):
        raise CheckpointError(f"{doing}: {quoted(modules)} holds {shown(value)}, not a list of modules; fetch it again")
    paths = [module.get("path") for module in value if isinstance(module, dict)]
    return sorted({path for path in paths if isinstance(path, str) and re.fullmatch(r"[^/\\\0.][^/\\\0]*", path)})


def _reason(error: OSError) -> str:
    """Return what an operating-system error means, and what to do."""
    if isinstance(error, FileNotFoundError):
        return "does not exist; check the path (or a link that points nowhere)"
    if isinstance(error, PermissionError):
        return "may not be read; check its permissions"
    if error.errno == errno.EMFILE:
        return "cannot be opened, too many files are open; raise the limit (ulimit -n)"
    return f"cannot be read ({error.strerror or error}); check the disk and the path"


# ---------------------------------------------------------------------------------------------------------------------
# Headers


@dataclass(frozen=True, slots=True)
class _Header:
    entries: tuple[TensorEntry, ...]
    metadata: dict[str, str]


class _HeaderError(ValueError):
    """What is wrong with a header, and what to do; the caller knows the file."""


def _read_exactly(descriptor: int, size: int, position: int) -> bytes:
    """Return up to `size` bytes from `position`; fewer only if the file ends."""
    parts: list[bytes] = []
    while size > 0:
        if USE_PREADV:
            part = os.pread(descriptor, size, position)
        else:
            os.lseek(descriptor, position, os.SEEK_SET)
            part = os.read(descriptor, size)
        if not part:
            break
        parts.append(part)
        size -= len(part)
        position += len(part)
    return b"".join(parts)


def _parse_header(descriptor: int, path: Path) -> _Header:
    """Return the checked header of a safetensors file: its tensors tile the data exactly."""
    again = "fetch or write the file again"
    file_size = os.fstat(descriptor).st_size
    if file_size < 8:
        raise _HeaderError(f"the file has {file_size} bytes, a safetensors file has at least 10; {again}")
    prefix = _read_exactly(descriptor, 64, 0)
    length = int.from_bytes(prefix[:8], "little")
    if not 2 <= length <= min(HEADER_LIMIT, file_size - 8):
        if prefix.startswith(b"version https://git"):
            raise _HeaderError('the file is a Git LFS pointer, not the weights; run "git lfs pull" in that folder')
        if prefix.startswith((b"PK\x03\x04", b"\x80\x02")):
            raise _HeaderError("the file is a pickle or zip, not safetensors; rename it to .pt and allow pickles")
        if prefix.startswith(b"GGUF"):
            raise _HeaderError("the file is GGUF; convert to safetensors first")
        raise _HeaderError(
            f"its header claims {length} bytes, possible are 2 to {min(HEADER_LIMIT, file_size - 8)}; {again}"
        )
    data = _read_exactly(descriptor, length, 8)
    if len(data) != length:
        raise _HeaderError(f"its header ends after {len(data)} of {length} bytes; {again}")
    try:
        header = parse_json(data, unique=True)
    except ValueError as error:
        raise _HeaderError(f"its header is damaged: {error}; {again}") from None
    if not isinstance(header, dict):
        raise _HeaderError(f"its header is {shown(header)}, not a JSON object; {again}")
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict):
        raise _HeaderError(f'its "__metadata__" is {shown(metadata)}, not an object; {again}')
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise _HeaderError(f"metadata key {quoted(key)} has {shown(value)}, not a string; {again}")
    data_start = 8 + length
    entries = [_parse_entry(name, value, path, data_start) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.size))
    position, before = data_start, ""
    for entry in entries:
        if entry.start != position:
            kind = "overlap" if entry.start < position else "leave a gap"
            neighbour = (
                f"{quoted(before)} and {quoted(entry.name)}" if before else f"{quoted(entry.name)} and the header"
            )
            raise _HeaderError(
                f"{neighbour} {kind}: one ends at byte {position - data_start} of the data, "
                f"the next begins at {entry.start - data_start}; {again}"
            )
        position, before = entry.start + entry.size, entry.name
    if position != file_size:
        raise _HeaderError(
            f"its tensors take {position - data_start} bytes, the file holds {file_size - data_start} "
            f"({'truncated?' if file_size < position else 'something was appended?'}); {again}"
        )
    return _Header(tuple(entries), metadata)


def _parse_entry(name: str, value: Any, path: Path, data_start: int) -> TensorEntry:
    """Return one checked tensor of a header."""

    def wrong(problem: str) -> _HeaderError:
        return _HeaderError(f"tensor {quoted(name)} {problem}; fetch or write the file again")

    try:
        name.encode()
    except UnicodeEncodeError:
        raise wrong("has a name that is not valid Unicode") from None
    if not isinstance(value, dict) or not value.keys() >= {"dtype", "shape", "data_offsets"}:
        found = sorted(value) if isinstance(value, dict) else value
        raise wrong(f"has the fields {shown(found)}, not dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise wrong(f"has the unknown dtype {shown(dtype)} (known: {', '.join(BITS)})")
    if not isinstance(shape, list) or any(type(size) is not int or size < 0 for size in shape):
        raise wrong(f"has the shape {shown(shape)}, not a list of sizes")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or any(type(offset) is not int or not 0 <= offset <= _LARGEST for offset in offsets)
        or offsets[0] > offsets[1]
    ):
        raise wrong(f"has the data_offsets {shown(offsets)}, not [begin, end]")
    elements = 1
    for size in shape:
        elements *= size
        # Checked at every step: a later zero does not excuse an absurd size, and the product stays small.
        if elements * BITS[dtype] > _LARGEST or size > _LARGEST:
            raise wrong(f"has the shape {shown(shape)}, more than any file can hold")
    bits = elements * BITS[dtype]
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise wrong(
            f"has {offsets[1] - offsets[0]} bytes, but dtype {dtype} and shape {shown(shape)} need {bits / 8:.15g}"
        )
    return TensorEntry(name, dtype, tuple(shape), path, data_start + offsets[0], bits // 8)


# ---------------------------------------------------------------------------------------------------------------------
# Digests


def tensor_digest(block_digests: Iterable[bytes]) -> bytes:
    """Return the digest of a tensor from the xxh3-128 digests of its consecutive blocks of `BLOCK` elements."""
    return xxhash.xxh3_128_digest(b"".join(block_digests))


def content_digest(items: Iterable[tuple[str, str, tuple[int, ...], bytes]]) -> str:
    """Return one hexadecimal digest over (name, dtype, shape, tensor digest), whatever their order and sharding."""
    state = xxhash.xxh3_128()
    for name, dtype, shape, digest in sorted(items):
        # JSON delimits itself, so no two different lists of tensors feed the same bytes.
        state.update(json.dumps([name, dtype, list(shape)]).encode() + digest)
    return state.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# The view


class Checkpoint:
    """A lazy view of a checkpoint: names, shapes, dtypes and metadata at once, values on request.

    Reading is safe from several threads; closing is not while another thread reads.
    """

    path: Path
    """What was opened: a file or a folder."""
    folder: Path | None
    """The model folder, for its side files; None for a single file."""
    tensors: Mapping[str, TensorEntry]
    """Every tensor, sorted by name."""
    metadata: Mapping[str, str]
    """Header metadata of all shards."""
    config: Mapping[str, Any] | None
    """The parsed `config.json` of a folder."""
    notes: tuple[str, ...]
    """What a user may want to know, one line each."""
    aliases: Mapping[str, str]
    """Tensors of a pickle that share the storage of another: name → the other's name."""
    stored: Mapping[str, str]
    """Dtypes in the files of tensors that are given wider than they are stored, because they are computed."""
    parts: Mapping[str, Part]
    """Models in sub-folders, by folder; the names of their tensors begin with the folder and a slash."""

    def __init__(
        self,
        path: Path,
        *,
        folder: Path | None = None,
        entries: Iterable[TensorEntry] = (),
        descriptors: Mapping[Path, int] | None = None,
        ranges: Mapping[str, ReadRange] | None = None,
        metadata: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
        aliases: Mapping[str, str] | None = None,
        stored: Mapping[str, str] | None = None,
        parts: Mapping[str, Part] | None = None,
    ) -> None:
        """Use `Checkpoint.open`."""
        self.path = path
        self.folder = folder
        self.tokenizer_folder = folder
        """Where the files of the tokenizer are: in the folder, unless an adapter has its own."""
        self.tensors = MappingProxyType({entry.name: entry for entry in sorted(entries, key=lambda e: e.name)})
        self.metadata = MappingProxyType(dict(metadata or {}))
        self.config = None if config is None else MappingProxyType(dict(config))
        self.notes = tuple(notes)
        self.aliases = MappingProxyType(dict(aliases or {}))
        self.stored = MappingProxyType(dict(stored or {}))
        self.parts = MappingProxyType(dict(parts or {}))
        self._descriptors = dict(descriptors or {})
        self._ranges = dict(ranges or {})
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    def open(
        cls, path: Path | str, *, allow_pickle: bool = False, what: str = "", allow_quantised: bool = False
    ) -> Checkpoint:
        """Open a file or folder and check all of its headers.

        Args:
            path: A `.safetensors` file, a model folder, or (if allowed) a pickle, `FILE#key` for a part of it.
            allow_pickle: Read `.pt .pth .bin .ckpt` too, as data only: no code in them is run.
            what: The recipe key that named it, for messages.
            allow_quantised: Open packed weights too, to be looked at rather than merged.
        """
        return _Opening(Path(path), allow_pickle, what, allow_quantised).run()

    def read_into(self, entry: TensorEntry, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a tensor from byte `offset` on."""
        size = buffer.nbytes
        if offset < 0 or offset + size > entry.size:
            raise ValueError(f"bytes {offset} to {offset + size} of {quoted(entry.name)}, which has {entry.size}")
        if self._closed:
            raise ValueError(f"the checkpoint {quoted(self.path)} is closed")
        if size == 0:
            return
        view = buffer if buffer.format == "B" and buffer.ndim == 1 else buffer.cast("B")
        if entry.name in self._ranges:
            try:
                self._ranges[entry.name](offset, view)
            except OSError as error:
                raise CheckpointError(
                    f"cannot read {quoted(entry.name)}: {quoted(entry.file)} {_reason(error)}"
                ) from None
            return
        descriptor = self._descriptors[entry.file]
        position, done = entry.start + offset, 0
        try:
            if USE_PREADV:
                done = os.preadv(descriptor, (view,), position)  # nearly always everything
            while done < size:
                if USE_PREADV:
                    count = os.preadv(descriptor, [view[done:]], position + done)
                else:
                    with self._lock:
                        os.lseek(descriptor, position + done, os.SEEK_SET)
                        part = os.read(descriptor, size - done)
                    count = len(part)
                    view[done : done + count] = part
                if count == 0:
                    raise CheckpointError(
                        f"cannot read {quoted(entry.name)} from {quoted(entry.file)}: the file ends at byte "
                        f"{os.fstat(descriptor).st_size}, the tensor at {entry.start + entry.size}; it has changed "
                        "since it was opened: start again when nothing writes to it"
                    )
                done += count
        except OSError as error:
            raise CheckpointError(f"cannot read {quoted(entry.name)}: {quoted(entry.file)} {_reason(error)}") from None

    def read(self, name: str) -> bytearray:
        """Return all bytes of one tensor."""
        entry = self.tensors[name]
        buffer = bytearray(entry.size)
        self.read_into(entry, 0, memoryview(buffer))
        return buffer

    def quick_digest(self) -> str:
        """Return a digest over names, dtypes, shapes and both ends of every tensor, whatever the sharding.

        It tells a wrong input before a run; it does not see a change in the middle of a tensor.
        """
        scratch = bytearray(2 * EDGE)
        view = memoryview(scratch)
        items = []
        for entry in sorted(self.tensors.values(), key=lambda entry: (str(entry.file), entry.start)):
            size = min(entry.size, 2 * EDGE)
            if size < 2 * EDGE:
                self.read_into(entry, 0, view[:size])
            else:
                self.read_into(entry, 0, view[:EDGE])
                self.read_into(entry, entry.size - EDGE, view[EDGE:])
            items.append((entry.name, entry.dtype, entry.shape, xxhash.xxh3_128_digest(view[:size])))
        return content_digest(items)

    def content_digest(self) -> str:
        """Return the digest over everything, which reads everything, block by block."""
        items = []
        view = memoryview(bytearray(64 * BLOCK))
        for entry in self.tensors.values():
            block = BLOCK * BITS[entry.dtype] // 8
            step = len(view) // block * block
            blocks = []
            for start in range(0, entry.size, step):
                part = view[: min(step, entry.size - start)]
                self.read_into(entry, start, part)
                blocks += [xxhash.xxh3_128_digest(part[at : at + block]) for at in range(0, len(part), block)]
            items.append((entry.name, entry.dtype, entry.shape, tensor_digest(blocks)))
        return content_digest(items)

    def close(self) -> None:
        """Close the files; the headers stay."""
        self._closed = True
        descriptors, self._descriptors = self._descriptors, {}
        self._ranges = {}
        for descriptor in descriptors.values():
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self.tensors)} tensors)"


class CheckpointView(Checkpoint):
    """A checkpoint of which some tensors are computed while they are read.

    Args:
        original: The checkpoint; all other tensors, its files and its metadata are taken from it.
        computed: What such tensors look like and how they are read, by name; names may be new.
        stored: Dtypes of these in the original's files, where they are read wider.
        config: The configuration, if it is another one.
        notes: What a user may want to know besides the original's notes.
        closes: Further checkpoints that are closed with it; the original always is.
        tokenizer_folder: Where the files of the tokenizer are, if not where the original has them.
    """

    def __init__(
        self,
        original: Checkpoint,
        computed: Mapping[str, tuple[TensorEntry, ReadRange]],
        *,
        stored: Mapping[str, str],
        config: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
        closes: Sequence[Checkpoint] = (),
        tokenizer_folder: Path | None = None,
    ) -> None:
        every: dict[str, tuple[TensorEntry, ReadRange]] = {
            **{name: (entry, partial(original.read_into, entry)) for name, entry in original.tensors.items()},
            **computed,
        }
        super().__init__(
            original.path, folder=original.folder, entries=[entry for entry, _ in every.values()],
            ranges={name: read for name, (_, read) in every.items()}, metadata=original.metadata,
            config=original.config if config is None else config, notes=[*original.notes, *notes],
            aliases=original.aliases, stored={**stored, **original.stored}, parts=original.parts,
        )  # fmt: skip
        self.tokenizer_folder = tokenizer_folder or original.tokenizer_folder
        self._originals = (original, *closes)

    def close(self) -> None:
        """Close everything that it reads from."""
        super().close()
        for part in self._originals:
            part.close()


# ---------------------------------------------------------------------------------------------------------------------
# Opening


class _Opening:
    """One attempt to open a path: collects shards, notes and descriptors, and closes them if it fails."""

    def __init__(self, path: Path, allow_pickle: bool, what: str, allow_quantised: bool) -> None:
        self.path = path
        self.key: str | None = None
        self.allow_pickle = allow_pickle
        self.what = what
        self.allow_quantised = allow_quantised
        self.subject = f"{what} {quoted(path)}".strip()
        self.notes: list[str] = []
        self.entries: dict[str, TensorEntry] = {}
        self.descriptors: dict[Path, int] = {}
        self.ranges: dict[str, ReadRange] = {}
        self.metadata: dict[str, str] = {}
        self.aliases: dict[str, str] = {}
        self.config: dict[str, Any] | None = None
        self.folder: Path | None = None
        self.parts: dict[str, Part] = {}

    def run(self) -> Checkpoint:
        try:
            self.find()
            if not self.allow_quantised:
                self.refuse_quantised()
        except BaseException:
            for descriptor in self.descriptors.values():
                os.close(descriptor)
            raise
        return Checkpoint(
            self.path,
            folder=self.folder,
            entries=self.entries.values(),
            descriptors=self.descriptors,
            ranges=self.ranges,
            metadata=self.metadata,
            config=self.config,
            notes=self.notes,
            aliases=self.aliases,
            parts=self.parts,
        )

    def error(self, problem: str) -> CheckpointError:
        """Return the error `cannot open SUBJECT: PROBLEM`; the problem ends with what to do."""
        return CheckpointError(f"cannot open {self.subject}: {problem}")

    def find(self) -> None:
        """Decide what the path is, and read its headers."""
        try:
            mode = self.stat_with_key()
        except OSError as error:
            raise self.error(f"it {_reason(error)}") from None
        except ValueError:
            raise self.error("the path holds a zero byte; check it") from None
        if stat.S_ISDIR(mode):
            if self.key is not None:
                raise self.error(f"it is a folder, #{self.key} chooses a part of a pickle; name the file")
            self.open_folder()
        elif not stat.S_ISREG(mode):
            raise self.error("it is neither a file nor a folder; name a .safetensors file or a model folder")
        else:
            self.open_file()

    def stat_with_key(self) -> int:
        """Return the mode of the path; `FILE#key` is taken apart if no file has the whole name."""
        try:
            return os.stat(self.path).st_mode
        except FileNotFoundError:
            file, sign, key = str(self.path).rpartition("#")
            if not sign or not file or not os.path.exists(file):
                raise
            self.path, self.key = Path(file), key
            return os.stat(self.path).st_mode

    # -- one file

    def open_file(self) -> None:
        suffix = self.path.suffix.lower()
        if suffix in FOREIGN_SUFFIXES:
            raise self.error(f"it is a {FOREIGN_SUFFIXES[suffix]} file; convert to safetensors first")
        if suffix in PICKLE_SUFFIXES:
            self.add_pickles([self.path])
            return
        if suffix != ".safetensors":
            raise self.error(
                f"its suffix is {quoted(self.path.suffix)}, known are .safetensors and, with --allow-pickle, "
                f"{' '.join(PICKLE_SUFFIXES)}; rename or convert it"
            )
        if self.key is not None:
            raise self.error(f"#{self.key} chooses a part of a pickle, this is a safetensors file; leave it out")
        shard = _SHARD_NAME.fullmatch(self.path.name)
        if shard and int(shard["count"]) > 1:
            self.notes.append(f"{quoted(self.path.name)} is one of {int(shard['count'])} shards and was opened alone")
        self.add_entries(self.read_header(self.path), self.path.name)

    def read_header(self, path: Path) -> _Header:
        """Open one safetensors file, keep its descriptor, and return its header."""
        where = "" if path == self.path else f"{quoted(path.name)}: "
        try:
            # Asked before opening: a named pipe would block.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise self.error(f"{where}it is not a regular file; replace it")
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
            self.descriptors[path] = descriptor
            return _parse_header(descriptor, path)
        except _HeaderError as error:
            raise self.error(f"{where}{error}") from None
        except OSError as error:
            raise self.error(f"{where}it {_reason(error)}") from None

    def add_entries(self, header: _Header, shard: str) -> None:
        self.entries.update((entry.name, entry) for entry in header.entries)
        for key, value in header.metadata.items():
            if self.metadata.setdefault(key, value) != value:
                self.notes.append(f"metadata key {quoted(key)} differs in shard {quoted(shard)}; the first counts")

    def add_pickles(self, files: Sequence[Path]) -> None:
        if not self.allow_pickle:
            raise self.error(
                f"{quoted(files[0].name)} is a pickle, which can run code when it is loaded; "
                "use a safetensors version, or pass --allow-pickle to read it as data only"
            )
        from graftwork.merge import pickled

        for file in files:
            try:
                part = pickled.load(file, key=self.key)
            except pickled.PickleProblem as problem:
                where = "" if file == self.path else f"{quoted(file.name)}: "
                raise self.error(f"{where}{problem}") from None
            double = self.entries.keys() & part.entries.keys()
            if double:
                raise self.error(f"{listed(sorted(double))} is in two of its files; delete one of them")
            self.entries |= part.entries
            self.ranges |= part.ranges
            self.aliases |= part.aliases
            self.notes += part.notes

    # -- a folder

    def open_folder(self) -> None:
        folder = self.folder = self.path
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            raise self.error(f"it {_reason(error)}") from None
        present = set(names)
        if "model_index.json" in present:
            self.open_pipeline(names)
            return
        if "config.json" in present:
            self.config = read_json_object(folder / "config.json", doing=f"cannot open {self.subject}")
        if "modules.json" in present:
            inner = module_folders(folder / "modules.json", doing=f"cannot open {self.subject}")
            inner = [name for name in inner if self.has_weights(folder / name)]
            self.notes.append("sentence-transformers model: its pooling comes from the donor")
            if inner and not self.has_weights(folder):
                self.open_parts(inner)
                return
            self.open_weights(names)
            self.open_parts(inner)
            return
        self.open_weights(names)

    def open_pipeline(self, names: Sequence[str]) -> None:
        """Open every component of a diffusers pipeline that has weights."""
        assert self.folder is not None
        index = read_json_object(self.folder / "model_index.json", doing=f"cannot open {self.subject}")
        found = [name for name in names if not name.startswith(".") and self.has_weights(self.folder / name)]
        found = [name for name in found if name in index] or found
        if not found:
            raise self.error("it is a diffusers pipeline, and no component has weights here; fetch them")
        beside = [name for name in names if name.endswith((".safetensors", *PICKLE_SUFFIXES))]
        if beside:
            self.notes.append(f"diffusers pipeline: {listed(beside)} beside its components was not opened")
        self.open_parts(found)

    def open_parts(self, names: Sequence[str]) -> None:
        """Open models in sub-folders; the names of their tensors get the folder before them."""
        assert self.folder is not None
        for name in names:
            part = _Opening(self.folder / name, self.allow_pickle, self.what, self.allow_quantised)
            try:
                part.find()
                if not self.allow_quantised:
                    part.refuse_quantised()
            finally:
                self.descriptors |= part.descriptors
            entries = [replace(entry, name=f"{name}/{entry.name}") for entry in part.entries.values()]
            self.entries |= {entry.name: entry for entry in entries}
            self.ranges |= {f"{name}/{key}": value for key, value in part.ranges.items()}
            self.aliases |= {f"{name}/{key}": f"{name}/{value}" for key, value in part.aliases.items()}
            self.metadata = {**part.metadata, **self.metadata}
            self.notes += [f"{name}: {note}" for note in part.notes]
            diffusers = any(entry.file.name.startswith("diffusion_pytorch_model") for entry in entries)
            self.parts[name] = Part("diffusion_pytorch_model" if diffusers else "model", part.config)

    def open_weights(self, names: Sequence[str]) -> None:
        """Open the files of weights that lie in the folder itself."""
        folder = self.folder
        assert folder is not None
        present = set(names)
        tensors = [name for name in names if name.endswith(".safetensors") and not name.startswith((".", "adapter_"))]
        tensors = [name for name in tensors if name != TASK_MASKS_NAME]
        indexes = [name for name in names if name.endswith(".safetensors.index.json") and not name.startswith(".")]
        if len(indexes) > 1:
            # A variant's index (model.fp16.safetensors.index.json) does not count beside the plain one.
            plain = [name for name in indexes if _plain_name(name, present) == name]
            if len(plain) != 1:
                raise self.error(f"it has several indexes: {listed(indexes)}; delete all but one")
            indexes = plain
        if indexes:
            single = indexes[0].removesuffix(".index.json")
            single = single if single in present else "model.safetensors"
            if single in present:
                raise self.error(
                    f"it has both {quoted(single)} and {quoted(indexes[0])}, and loaders differ on which counts; "
                    "delete one or name the file"
                )
            self.open_index(indexes[0], tensors)
            return
        candidates = [name for name in tensors if _plain_name(name, present) == name]
        if "model.safetensors" in candidates:
            chosen = ["model.safetensors"]
        else:
            chosen = candidates
        if len(chosen) == 1:
            self.open_only_file(chosen[0], tensors)
        elif chosen:
            shards = [name for name in chosen if _SHARD_NAME.fullmatch(name)]
            if len(shards) == len(chosen):
                raise self.error(
                    f"it has {len(shards)} shards but no model.safetensors.index.json; fetch the index too"
                )
            raise self.error(f"it has several safetensors files: {listed(chosen)}; name the file")
        elif "pytorch_model.bin.index.json" in present:
            self.open_index("pytorch_model.bin.index.json", [name for name in names if name.endswith(".bin")])
        elif "pytorch_model.bin" in present:
            self.add_pickles([folder / "pytorch_model.bin"])
        else:
            raise self.no_weights(names)

    def open_only_file(self, name: str, tensors: Sequence[str]) -> None:
        assert self.folder is not None
        shard = _SHARD_NAME.fullmatch(name)
        if shard and int(shard["count"]) > 1:
            raise self.error(
                f"it has only {quoted(name)}, one shard of {int(shard['count'])}; fetch the others and the index"
            )
        others = [other for other in tensors if other != name]
        if others:
            self.notes.append(f"{quoted(name)} was opened; {listed(others)} beside it was not")
        self.add_entries(self.read_header(self.folder / name), name)

    def open_index(self, index_name: str, files: Sequence[str]) -> None:
        """Open every shard that an index names; index and headers have to agree."""
        assert self.folder is not None
        suffix = ".bin" if index_name.endswith(".bin.index.json") else ".safetensors"
        index = read_json_object(self.folder / index_name, doing=f"cannot open {self.subject}", unique=True)
        mapping = index.get("weight_map")
        inside = quoted(index_name)
        if not isinstance(mapping, dict):
            raise self.error(f'{inside} has {shown(mapping)} as "weight_map", not an object; fetch it again')
        for name, file in mapping.items():
            if not isinstance(file, str) or not file or re.search(r"[/\\\0]|\.\.", file) or not file.endswith(suffix):
                raise self.error(
                    f"{inside} says that {quoted(name)} is in {shown(file)}, which is not the name of a {suffix} file "
                    "in the folder; fetch the index again"
                )
        shards = sorted(set(mapping.values()))
        missing = [shard for shard in shards if not (self.folder / shard).exists()]
        if missing:
            raise self.error(f"{inside} names shards that are missing: {listed(missing)}; fetch them")
        ignored = [file for file in files if file not in mapping.values()]
        self.notes += [f"shard {quoted(file)} is not named by the index" for file in ignored]
        if suffix == ".bin":
            self.add_pickles([self.folder / shard for shard in shards])
            self.check_index(inside, mapping, {name: entry.file.name for name, entry in self.entries.items()})
            return
        located: dict[str, str] = {}
        for shard in shards:
            header = self.read_header(self.folder / shard)
            for entry in header.entries:
                if entry.name in located:
                    raise self.error(
                        f"{quoted(entry.name)} is in both {quoted(located[entry.name])} and {quoted(shard)}; "
                        "fetch the shards again"
                    )
                located[entry.name] = shard
            self.add_entries(header, shard)
        self.check_index(inside, mapping, located)

    def check_index(self, inside: str, mapping: Mapping[str, str], located: Mapping[str, str]) -> None:
        for name, shard in mapping.items():
            if located.get(name) != shard:
                found = f"in {quoted(located[name])}" if name in located else "in no shard"
                raise self.error(
                    f"{inside} says that {quoted(name)} is in {quoted(shard)}, it is {found}; "
                    "fetch the index and the shards again"
                )
        unnamed = sorted(located.keys() - mapping.keys())
        if unnamed:
            self.notes.append(f"the index does not name {listed(unnamed)}; the headers count")

    @staticmethod
    def has_weights(folder: Path) -> bool:
        try:
            return any(name.endswith((".safetensors", *PICKLE_SUFFIXES)) for name in os.listdir(folder))
        except OSError:
            return False

    def no_weights(self, names: Sequence[str]) -> CheckpointError:
        """Return the error for a folder without weights, by what it has instead."""
        assert self.folder is not None
        if "adapter_config.json" in names:
            config = read_json_object(self.folder / "adapter_config.json", doing=f"cannot open {self.subject}")
            base = config.get("base_model_name_or_path")
            model = base if isinstance(base, str) and base else "BASE"
            return self.error(
                f"it is an adapter of the base model {shown(base)} and holds no model; "
                f"write {quoted(f'{model}+{self.path}')}"
            )
        foreign = [name for name in names if Path(name).suffix.lower() in FOREIGN_SUFFIXES]
        if foreign:
            kind = FOREIGN_SUFFIXES[Path(foreign[0]).suffix.lower()]
            return self.error(f"it holds only {kind} weights ({listed(foreign)}); convert to safetensors first")
        pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES) and name != "training_args.bin"]
        if pickles:
            return self.error(f"it holds no safetensors but {listed(pickles)}; name the file and pass --allow-pickle")
        inner = [name for name in names if self.has_weights(self.folder / name)]
        if inner:
            return self.error(f"it holds no weights, but its sub-folders do; name one of {listed(inner)}")
        return self.error("it holds no weights (no *.safetensors); check the path or fetch the weights")

    # -- quantised weights

    def refuse_quantised(self) -> None:
        """Refuse packed weights: an average of codes is not the code of an average."""
        first = next((name for name in sorted(self.entries) if self.packed_with(name)), None)
        method = "" if first is None else self.packed_with(first)
        for level in _levels(self.config or {}):
            quantisation = level.get("quantization_config")
            if quantisation:
                named = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
                method = named if isinstance(named, str) else method or "an unnamed method"
                break
        if not method:
            return
        who = f"{self.what} ({quoted(self.path)})" if self.what else quoted(self.path)
        where = f"first tensor {quoted(first)}" if first is not None else "quantization_config in config.json"
        raise CheckpointError(
            f"{who} is quantised with {quoted(method)[1:-1]} ({where}); merging packed values would be meaningless; "
            "use the unquantised model"
        )

    def packed_with(self, name: str) -> str:
        """Return the quantisation method of which a tensor is a sign, or an empty string."""
        stem, _, leaf = name.rpartition(".")
        if leaf in _PACKED:
            return _PACKED[leaf]
        if ".quant_state." in name:
            return "bitsandbytes"
        if leaf in {"weight_scale", "weight_scale_inv", "input_scale"}:
            # A scale beside weights that are stored in full is an ordinary parameter.
            weight = self.entries.get(f"{stem}.weight" if stem else "weight")
            return "" if weight is not None and BITS[weight.dtype] >= 16 else "fp8"
        if leaf.endswith(("_blocks", "_scales")) and self.entries[name].dtype == "U8":
            return "mxfp4"
        return ""


_PACKED = MappingProxyType(
    {"qweight": "GPTQ or AWQ", "qzeros": "GPTQ or AWQ", "g_idx": "GPTQ or AWQ", "SCB": "bitsandbytes",
     "absmax": "bitsandbytes", "quant_map": "bitsandbytes", "weight_packed": "compressed-tensors"}
)  # fmt: skip


def _levels(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a configuration and its direct sub-configurations."""
    return [config, *(value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))]


def _plain_name(name: str, present: set[str]) -> str:
    """Return the name without a variant (`model.fp16.safetensors` → `model.safetensors`) if that file is there."""
    variant = re.fullmatch(r"(.+)\.[A-Za-z0-9_-]+(\.safetensors(?:\.index\.json)?)", name)
    plain = "" if variant is None else variant[1] + variant[2]
    return plain if plain in present else name


# ---------------------------------------------------------------------------------------------------------------------
# Whole checkpoints in memory, for small ones and for tests

_NUMPY = MappingProxyType(
    {"BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
     "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8"}
)  # fmt: skip
TORCH_WORDS = MappingProxyType(
    {"BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
     "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
     "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
     "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"}
)  # fmt: skip


def _e4m3_values() -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the 256 values of float8_e4m3fn."""
    codes = np.arange(256)
    exponent, fraction = (codes >> 3) & 15, codes & 7
    size = np.where(exponent > 0, (8 + fraction) * 2.0 ** (exponent - 10.0), fraction * 2.0**-9)
    size[(codes & 127) == 127] = np.nan
    return np.where(codes < 128, size, -size).astype(np.float32)


def load_numpy(checkpoint: Checkpoint) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """Return every tensor as an array; bf16 and fp8, which numpy lacks, are widened to float32 (exactly)."""
    arrays: dict[str, np.ndarray[Any, np.dtype[Any]]] = {}
    for name, entry in checkpoint.tensors.items():
        values = numpy_values(entry.dtype, checkpoint.read(name))
        if values is None:
            raise CheckpointError(
                f"cannot load {quoted(name)} from {quoted(checkpoint.path)}: numpy has no dtype for {entry.dtype}; "
                "read its bytes instead"
            )
        arrays[name] = values.reshape(entry.shape)
    return arrays


def numpy_values(dtype: str, data: bytes | bytearray | memoryview) -> np.ndarray[Any, np.dtype[Any]] | None:
    """Return bytes as values, bf16 and fp8 widened to float32; None if numpy cannot hold the dtype."""
    if dtype in _NUMPY:
        return np.frombuffer(data, _NUMPY[dtype])
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E5M2":
        return (np.frombuffer(data, "u1").astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    if dtype == "F8_E4M3":
        values: np.ndarray[Any, np.dtype[Any]] = _e4m3_values()[np.frombuffer(data, "u1")]
        return values
    return None


def load_torch(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return every tensor as a torch tensor of its own dtype."""
    import torch

    tensors: dict[str, Tensor] = {}
    for name, entry in checkpoint.tensors.items():
        dtype = getattr(torch, TORCH_WORDS.get(entry.dtype, ""), None)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(
                f"cannot load {quoted(name)} from {quoted(checkpoint.path)}: this torch has no dtype for "
                f"{entry.dtype}; read its bytes instead"
            )
        if entry.size == 0:
            tensors[name] = torch.empty(entry.shape, dtype=dtype)
        else:
            tensors[name] = torch.frombuffer(checkpoint.read(name), dtype=dtype).reshape(entry.shape)
    return tensors
