"""Writes an output checkpoint: beside its place, in any order, resumable, and published by a rename.

Everything is written to `OUT.partial/`. The files have their final size from the start, so that a full disk shows
before any work; headers come last, so that nothing unfinished looks like a checkpoint. A journal lists finished tensors
with their digests. It guards against the death of the process, not of the machine: a resumed run hashes again what it
lists.

Only what such a journal marks as an unfinished merge is ever removed or renamed; whatever else has the same name stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import xxhash

from graftwork.merge import dtypes
from graftwork.merge.checkpoint import BLOCK, tensor_digest
from graftwork.merge.errors import OutputError
from graftwork.merge.folder import index_json, shard_names

USE_FALLOCATE = hasattr(os, "posix_fallocate")
USE_EXCHANGE = sys.platform == "linux"
USE_LOCKS = sys.platform != "win32"

JOURNAL = ".graftwork-journal.jsonl"

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the output: name, dtype code, shape and size in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: shard, and byte offset in the shard's data."""

    shard: int
    offset: int


def shards_of(tensors: Sequence[OutputTensor], largest: int) -> list[list[OutputTensor]]:
    """Return the tensors cut into shards of at most `largest` bytes; a larger tensor has a shard of its own."""
    shards: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.size > largest:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size
    return shards


def _by_part(tensors: Sequence[OutputTensor], parts: Collection[str]) -> dict[str, list[OutputTensor]]:
    """Return the tensors by the sub-folder in which they go; those of the output itself have none."""
    found: dict[str, list[OutputTensor]] = {}
    for tensor in tensors:
        part = tensor.name.partition("/")[0]
        found.setdefault(part if part in parts else "", []).append(tensor)
    return found or {"": []}


def header_bytes(tensors: Sequence[OutputTensor], metadata: Mapping[str, str], part: str = "") -> bytes:
    """Return a safetensors header with its length, padded so that data begins at a multiple of 64 bytes.

    Args:
        tensors: The tensors of the file.
        metadata: Its metadata.
        part: The sub-folder in which it lies; it stands before the tensors' names, and not in the file.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for tensor in tensors:
        entries[tensor.name.removeprefix(f"{part}/") if part else tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.size],
        }
        position += tensor.size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class CheckpointWriter:
    """Lays out and writes one output.

    Args:
        out: The output: a folder, or a file whose name ends in `.safetensors`.
        tensors: Its tensors, in the order of the file.
        metadata: Header metadata; `finish` replaces it by one of the same length.
        plan_digest: Identifies the merge; an unfinished output of another one is not resumed.
        max_shard_bytes: Largest shard.
        force: Replace an output that exists.
        restart: Do not resume an unfinished output.
        stamps: Sizes and times of the input files; an unfinished output of the same plan but other files is resumed
            only as far as the inputs still have the digests that they had.
        input_digest: Returns the digest of a tensor of an input.
        parts: Stems of the files of models in sub-folders, by folder.

    Raises:
        OutputError: The output exists, lies in a place that cannot be written, or there is no room for it.
    """

    def __init__(
        self,
        out: Path,
        tensors: Sequence[OutputTensor],
        metadata: Mapping[str, str],
        *,
        plan_digest: str,
        max_shard_bytes: int = 5_000_000_000,
        force: bool = False,
        restart: bool = False,
        stamps: Sequence[Sequence[int]] = (),
        input_digest: Callable[[int, str], bytes] | None = None,
        parts: Mapping[str, str] | None = None,
    ) -> None:
        for tensor in tensors:
            if not _is_text(tensor.name):
                raise OutputError(f"cannot write {out}: the name of the tensor {tensor.name!a} is not valid Unicode")
        self.out = out
        self.single_file = out.suffix == ".safetensors"
        self.partial = out.with_name(out.name + ".partial")
        self.force = force
        if self.single_file and parts:
            raise OutputError(f"cannot write {out}: the model has parts in folders of their own; name a folder")
        self.shards: list[list[OutputTensor]] = []
        self.names: list[str] = []
        self.parts: list[str] = []
        """The sub-folder of each shard; empty for one in the output itself."""
        for part, own in _by_part(tensors, parts or {}).items():
            shards = [own] if self.single_file else shards_of(own, max_shard_bytes)
            found = [out.name] if self.single_file else shard_names(len(shards), (parts or {}).get(part, "model"))
            self.shards += shards
            self.names += [f"{part}/{name}" if part else name for name in found]
            self.parts += [part] * len(shards)
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self.places: dict[str, Place] = {}
        for number, shard in enumerate(self.shards):
            position = 0
            for tensor in shard:
                self.places[tensor.name] = Place(number, position)
                position += tensor.size
        self.headers = [
            len(header_bytes(shard, metadata, part)) for shard, part in zip(self.shards, self.parts, strict=True)
        ]
        self.sizes = [
            header + sum(tensor.size for tensor in shard)
            for header, shard in zip(self.headers, self.shards, strict=True)
        ]
        self.digests: dict[str, bytes] = {}
        self.input_digests: dict[tuple[int, str], bytes] = {}
        self.resumed: frozenset[str] = frozenset()
        self._descriptors: list[int] = []
        self._lock = threading.Lock()
        self._journal: IO[str] | None = None
        self._created = False
        self._claimed = False
        self._fresh = False
        self._full = False
        self.published = False
        check_output(out, force=force)
        try:
            self._start(plan_digest, restart, [list(stamp) for stamp in stamps], input_digest)
        except OSError as error:
            problem = self._error(error)
            if self.leave():
                raise OutputError(f"{problem}; what an earlier run finished stays in {self.partial}") from None
            raise problem from None
        except BaseException:
            self.leave()
            raise

    # ------------------------------------------------------------ opening

    def _start(
        self, plan: str, restart: bool, stamps: list[list[int]], input_digest: Callable[[int, str], bytes] | None
    ) -> None:
        if self._repair():
            check_output(self.out, force=self.force)
        self._make_partial(restart)
        self._journal = (self.partial / JOURNAL).open("a+", encoding="utf-8", errors="replace")
        self._claim(self._journal, self.partial)
        self._claimed = True
        lines = [] if restart else self._journal_lines()
        if lines and lines[0].get("plan") != plan:
            if any(path.suffix == ".safetensors" for path in self.partial.rglob("*")):
                raise OutputError(
                    f"cannot write {self.out}: {self.partial} holds an unfinished merge of another recipe or other "
                    "inputs; finish that one, or start anew with --restart"
                )
            lines = []  # a run that died when its output was in place
        if lines:
            # Shards of another size, or side files of a run that stopped while publishing, are not part of this output.
            self._clear({JOURNAL, *self.names})
            self._open_files(fresh=False)
            noted = [line.get("inputs") for line in lines if "tensor" not in line and "replaces" not in line]
            changed = any(item != stamps for item in noted)
            if changed:
                self._note({"inputs": stamps})
            self._resume(lines[1:], input_digest if changed else None)
        else:
            self._fresh = True
            self._clear({JOURNAL})
            self._journal.truncate(0)
            self._note({"plan": plan, "inputs": stamps})
            self._open_files(fresh=True)

    def _repair(self) -> bool:
        """Finish, or undo, what a process that died while it replaced an output has left; return whether it did."""
        aside = _aside(self.out)
        if _is_unfinished(self.out):
            with (self.out / JOURNAL).open("a+", encoding="utf-8") as journal:
                self._claim(journal, self.out)
                for old in (self.partial, aside):
                    if _is_replaced(old, by=self.out):
                        shutil.rmtree(old)
                (self.out / JOURNAL).unlink()
            return True
        if not os.path.lexists(self.out) and _is_unfinished(self.partial) and _is_replaced(aside, by=self.partial):
            with (self.partial / JOURNAL).open("a+", encoding="utf-8") as journal:
                self._claim(journal, self.partial)
                os.rename(aside, self.out)
            return True
        return False

    def _make_partial(self, restart: bool) -> None:
        """Make the folder, or make sure that the one that exists is an unfinished merge."""
        try:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self.partial.mkdir()
        except FileExistsError:
            pass
        else:
            self._created = True
            return
        names = set()
        if self.partial.is_dir() and not self.partial.is_symlink():
            names = {path.name for path in self.partial.iterdir()}
            # A process may die before it writes the first line.
            if not names or names == {JOURNAL} or _is_unfinished(self.partial):
                return
        if JOURNAL not in names:
            raise OutputError(
                f"cannot write {self.out}: {self.partial} exists and is not an unfinished merge; move it away"
            )
        if not restart:
            raise OutputError(
                f"cannot write {self.out}: the journal of the unfinished merge in {self.partial} is damaged; "
                "start anew with --restart"
            )

    def _clear(self, kept: Collection[str]) -> None:
        folders = {name.partition("/")[0] for name in kept if "/" in name}
        for path in self.partial.iterdir():
            is_folder = path.is_dir() and not path.is_symlink()
            for inner in path.iterdir() if is_folder and path.name in folders else ():
                if f"{path.name}/{inner.name}" not in kept:
                    shutil.rmtree(inner) if inner.is_dir() and not inner.is_symlink() else inner.unlink()
            if path.name not in kept and path.name not in folders:
                shutil.rmtree(path) if is_folder else path.unlink()

    def _claim(self, journal: IO[str], folder: Path) -> None:
        """Keep other processes away as long as the journal is open."""
        if not USE_LOCKS:
            return
        import fcntl

        try:
            fcntl.flock(journal.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The other process may have published, and let go, between our opening and our locking.
            mine = os.path.samestat(os.fstat(journal.fileno()), os.stat(folder / JOURNAL))
        except OSError:
            mine = False
        if not mine:
            raise OutputError(f"cannot write {self.out}: another process is writing it at this moment")

    def _journal_lines(self) -> list[dict[str, Any]]:
        """Return the journal's entries; a last line cut off by a crash is dropped."""
        assert self._journal is not None
        self._journal.seek(0)
        lines, end = [], 0
        for line in self._journal:
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not line.endswith("\n") or not isinstance(entry, dict):
                break
            lines.append(entry)
            end += len(line.encode())
        self._journal.truncate(end)  # so that the next entry does not continue the broken line
        return lines

    def _open_files(self, *, fresh: bool) -> None:
        for name, size in zip(self.names, self.sizes, strict=True):
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
            (self.partial / name).parent.mkdir(exist_ok=True)
            descriptor = os.open(self.partial / name, flags, 0o666)
            if os.fstat(descriptor).st_nlink > 1:  # it is an output already, by another name
                os.close(descriptor)
                os.unlink(self.partial / name)
                descriptor = os.open(self.partial / name, flags, 0o666)
            self._descriptors.append(descriptor)
            length = os.fstat(descriptor).st_size
            if length:
                os.pwrite(descriptor, bytes(8), 0)  # while work goes on, there is no header
            if not fresh and length == size:
                continue
            if length > size:  # left by a run with other shards
                os.ftruncate(descriptor, size)
            if USE_FALLOCATE:
                try:
                    if size:
                        os.posix_fallocate(descriptor, 0, size)
                    continue
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                        raise
            self._check_room(size)
            os.ftruncate(descriptor, size)

    def _check_room(self, size: int) -> None:
        """Compare with the free space where it cannot be reserved."""
        free = shutil.disk_usage(self.partial).free
        if free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _resume(self, lines: Iterable[Mapping[str, Any]], input_digest: Callable[[int, str], bytes] | None) -> None:
        """Take over the tensors that the journal lists and whose bytes still have the digest they had.

        With `input_digest`, the tensors that they were made from must have theirs, too.
        """
        done = set()
        found: dict[tuple[int, str], bytes] = {}

        def unchanged(inputs: Mapping[tuple[int, str], bytes]) -> bool:
            if input_digest is None:
                return True
            for key, digest in inputs.items():
                if key not in found:
                    found[key] = input_digest(*key)
                if found[key] != digest:
                    return False
            return True

        for line in lines:
            try:
                name, digest = str(line["tensor"]), bytes.fromhex(line["digest"])
                inputs = {(int(model), str(tensor)): bytes.fromhex(value) for model, tensor, value in line["inputs"]}
            except (KeyError, TypeError, ValueError):
                continue
            if name in self.tensors and unchanged(inputs) and self._digest(name) == digest:
                self.digests[name] = digest
                self.input_digests.update(inputs)
                done.add(name)
        self.resumed = frozenset(done)

    def _digest(self, name: str) -> bytes:
        tensor = self.tensors[name]
        block = max(1, BLOCK * dtypes.BITS[tensor.dtype] // 8)
        buffer = bytearray(min(block, tensor.size))
        blocks = []
        for offset in range(0, tensor.size, block):
            view = memoryview(buffer)[: min(block, tensor.size - offset)]
            self.read_back(name, offset, view)
            blocks.append(xxhash.xxh3_128_digest(view))
        return tensor_digest(blocks or [b""])

    # ------------------------------------------------------------ the engine's sink

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write `data` at byte `offset` of the tensor."""
        place = self.places[name]
        position = self.headers[place.shard] + place.offset + offset
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(self._descriptors[place.shard], data[done:], position + done)
        except OSError as error:
            raise self._error(error) from None

    def read_back(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with what was written."""
        place = self.places[name]
        position = self.headers[place.shard] + place.offset + offset
        done = 0
        while done < len(buffer):
            part = os.pread(self._descriptors[place.shard], len(buffer) - done, position + done)
            if not part:
                raise OutputError(f"cannot read back {self.partial}: it has become shorter")
            buffer[done : done + len(part)] = part
            done += len(part)

    def finish(self, name: str, digest: bytes, inputs: Mapping[tuple[int, str], bytes]) -> None:
        """Enter a complete tensor into the journal."""
        entry = {
            "tensor": name,
            "digest": digest.hex(),
            "inputs": [[model, tensor, value.hex()] for (model, tensor), value in inputs.items()],
        }
        with self._lock:
            self.digests[name] = digest
            self.input_digests.update(inputs)
            self._note(entry)

    def _note(self, entry: Mapping[str, Any]) -> None:
        assert self._journal is not None
        self._journal.write(json.dumps(entry) + "\n")
        self._journal.flush()

    # ------------------------------------------------------------ closing

    def publish(self, metadata: Mapping[str, str], files: Mapping[str, bytes | Path]) -> None:
        """Write headers and side files, make everything durable, and put the output in its place.

        Args:
            metadata: Header metadata, as long as that given at the start.
            files: Contents, or files to copy, by path relative to the output folder.
        """
        try:
            self._check_place()
            for number, shard in enumerate(self.shards):
                header = header_bytes(shard, metadata, self.parts[number])
                if len(header) != self.headers[number]:
                    raise RuntimeError("the header has changed its length")
                os.pwrite(self._descriptors[number], header, 0)
            if not self.single_file:
                self._write_files(files)
            for descriptor in self._descriptors:
                os.fsync(descriptor)
            self._close_files()
            if not USE_LOCKS:
                self._close()
            # The journal goes last: a process that dies before leaves an unfinished output that can be resumed.
            if self.single_file:
                self._put_file()
                (self.partial / JOURNAL).unlink()
                self.partial.rmdir()
            else:
                for part in filter(None, dict.fromkeys(self.parts)):
                    _sync_folder(self.partial / part)
                _sync_folder(self.partial)
                self._swap()
                (self.out / JOURNAL).unlink()
            self._close()
            _sync_folder(self.out.parent)
        except OSError as error:
            if self.published:
                raise OutputError(
                    f"{self.out} is written, but what it replaced cannot be removed completely: "
                    f"{error.filename or self.partial}: {error.strerror or error}; remove it"
                ) from None
            raise self._error(error) from None

    def _check_place(self) -> None:
        """Make sure that nothing has come into the output's place that may not be replaced."""
        if not self.force and os.path.lexists(self.out):
            raise self._appeared()
        check_output(self.out, force=self.force)

    def _appeared(self) -> OutputError:
        return OutputError(
            f"cannot write {self.out}: something has come into its place while the merge ran; move it away, or replace "
            "it with --force"
        )

    def _write_files(self, files: Mapping[str, bytes | Path]) -> None:
        everything = dict(files)
        for part in dict.fromkeys(self.parts):
            numbers = [number for number, own in enumerate(self.parts) if own == part]
            if len(numbers) == 1:
                continue
            inside = f"{part}/" if part else ""
            tensors = [tensor for number in numbers for tensor in self.shards[number]]
            names = {tensor.name: self.names[self.places[tensor.name].shard] for tensor in tensors}
            weight_map = {name.removeprefix(inside): file.removeprefix(inside) for name, file in names.items()}
            total = sum(tensor.size for tensor in tensors)
            elements = sum(_elements(tensor.shape) for tensor in tensors)
            stem = re.sub(r"-\d+-of-\d+\.safetensors$", "", self.names[numbers[0]])
            everything[f"{stem}.safetensors.index.json"] = index_json(weight_map, total, elements).encode()
        for name, content in everything.items():
            path = self.partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, path)
            else:
                path.write_bytes(content)
            with path.open("rb") as handle:
                os.fsync(handle.fileno())

    def _put_file(self) -> None:
        written = self.partial / self.names[0]
        if self.force:
            os.replace(written, self.out)
        else:
            self._put(written)
        self.published = True

    def _put(self, written: Path) -> None:
        try:
            _rename_new(written, self.out)
        except FileExistsError:
            raise self._appeared() from None

    def _swap(self) -> None:
        if not self.force or not self.out.exists():
            self._put(self.partial)
            self.published = True
            return
        self._note_replaced()
        if USE_EXCHANGE and _renameat2(self.partial, self.out, _EXCHANGE) == 0:
            self.published = True
            shutil.rmtree(self.partial)
            return
        aside = _aside(self.out)
        if os.path.lexists(aside):
            raise OutputError(f"cannot write {self.out}: {aside} is needed for a moment, and exists; move it away")
        os.rename(self.out, aside)
        os.rename(self.partial, self.out)
        self.published = True
        shutil.rmtree(aside)

    def _note_replaced(self) -> None:
        """Enter into the journal which folder is about to be replaced: a later run removes or restores no other."""
        status = os.stat(self.out)
        entry = {"replaces": [status.st_dev, status.st_ino]}
        if self._journal is not None:
            self._note(entry)
            return
        with (self.partial / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        """Close the files and leave the unfinished output to be resumed."""
        self._close()

    def leave(self) -> bool:
        """Close the files; return whether the unfinished output stays.

        It is removed if this run began it and has finished no tensor of it, or found no room for it.
        """
        if self.published:
            self._close()
            return False
        if self._fresh and (not self.digests or self._full):
            self.abandon()
            return False
        self._close()
        if self._created and not self._claimed:
            with contextlib.suppress(OSError):
                self.partial.rmdir()
        return self._claimed

    def abandon(self) -> None:
        """Remove the unfinished output."""
        self._close_files()
        if self._claimed and not self.published and self.partial.exists():
            shutil.rmtree(self.partial, ignore_errors=True)
        self._close()

    def _close(self) -> None:
        self._close_files()
        if self._journal is not None:
            with contextlib.suppress(OSError):
                self._journal.close()
            self._journal = None

    def _close_files(self) -> None:
        for descriptor in self._descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._descriptors = []

    def _error(self, error: OSError) -> OutputError:
        needed = sum(self.sizes)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            self._full = True
            return OutputError(
                f"cannot write {self.out}: it needs {needed:,} bytes and there is no room for them "
                f"({os.strerror(error.errno)}); free some space or choose another place"
            )
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return OutputError(
                f"cannot write {self.out}: its {len(self.names):,} files are all open at once, and that is more "
                "than the system allows; make fewer with --max-shard-size, or allow more with `ulimit -n`"
            )
        path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes | os.PathLike) else self.out
        if path not in (self.out, self.partial) and self.partial not in path.parents:
            return OutputError(f"cannot write {self.out}: {path}: {error.strerror or error}")
        return OutputError(f"cannot write {self.out}: {error.strerror or error}; check the path and its permissions")


def check_output(out: Path, *, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Check that an output can be put in its place; nothing is changed.

    Raises:
        OutputError: It exists, is not what `force` may replace, or is or lies within an input.
    """
    resolved = out.resolve()
    for path in inputs:
        source = path.resolve()
        if resolved == source or source in resolved.parents or resolved in source.parents:
            relation = "is" if resolved == source else "lies within" if source in resolved.parents else "contains"
            raise OutputError(f"cannot write {out}: it {relation} the input {path}; choose another place")
    if out.name in {"", ".."}:
        raise OutputError(f"cannot write {out}: a merge makes a folder of its own; give it a name")
    if not os.path.lexists(out):
        parent = next(folder for folder in (resolved.parent, *resolved.parents) if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise OutputError(f"cannot write {out}: {parent} is not a folder that can be written to")
        return
    if not force:
        raise OutputError(f"cannot write {out}: it exists; choose another place, or replace it with --force")
    if out.suffix == ".safetensors":
        if out.is_dir():
            raise OutputError(f"cannot write {out}: it is a folder; choose another name for the file")
        return
    if not out.is_dir() or out.is_symlink():
        raise OutputError(f"cannot write {out}: it is not a folder; choose another place")
    names = {path.name for path in out.iterdir()}
    if names and not any(name.endswith(".safetensors") or name == "config.json" for name in names):
        raise OutputError(
            f"cannot write {out}: it is a folder that holds no model, and will not be replaced; choose another place"
        )


def _aside(out: Path) -> Path:
    return out.with_name(out.name + ".replaced")


def _elements(shape: Iterable[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_unfinished(folder: Path) -> bool:
    """Return whether a folder holds the journal of a merge."""
    if folder.is_symlink():
        return False
    try:
        with (folder / JOURNAL).open("rb") as journal:
            first = json.loads(journal.readline())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and re.fullmatch("[0-9a-f]{32}", str(first.get("plan"))) is not None


def _is_replaced(folder: Path, *, by: Path) -> bool:
    """Return whether a folder is what the unfinished output `by` was about to replace, according to its journal."""
    try:
        status = os.stat(folder, follow_symlinks=False)
        lines = (by / JOURNAL).read_bytes().splitlines()
    except OSError:
        return False
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and "replaces" in entry:
            return bool(entry["replaces"] == [status.st_dev, status.st_ino])
    return False


_HERE = -100  # AT_FDCWD
_NO_REPLACE = 1  # RENAME_NOREPLACE
_EXCHANGE = 2  # RENAME_EXCHANGE


def _renameat2(source: Path, target: Path, flags: int) -> int:
    """Rename in one step as the flags say; return 0, or the number of the error, also where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return errno.ENOSYS
    sys.audit("os.rename", str(source), str(target), -1, -1)
    if rename(_HERE, os.fsencode(source), _HERE, os.fsencode(target), flags) == 0:
        return 0
    return ctypes.get_errno()


def _rename_new(source: Path, target: Path) -> None:
    """Rename a file or folder to a name that is not taken.

    Raises:
        FileExistsError: It is.
    """
    if USE_EXCHANGE:
        code = _renameat2(source, target, _NO_REPLACE)
        if code == 0:
            return
        if code == errno.EEXIST:
            raise FileExistsError(code, os.strerror(code), str(target))
    if source.is_file():
        try:
            os.link(source, target)
        except FileExistsError:
            raise
        except OSError:  # some file systems have no links
            pass
        else:
            os.unlink(source)
            return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
