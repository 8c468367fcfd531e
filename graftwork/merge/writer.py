"""Writes an output checkpoint: beside its place, in any order, resumable, and published by a rename.

Everything is written to `OUT.partial/`. The files have their final size from the start, so that a full disk shows
before any work; headers come last, so that nothing unfinished looks like a checkpoint. A journal lists finished tensors with
their digests. It guards against the death of the process, not of the machine: a resumed run hashes again what it lists.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
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

JOURNAL = "journal.jsonl"

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


def header_bytes(tensors: Sequence[OutputTensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors header with its length, padded so that data begins at a multiple of 64 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for tensor in tensors:
        entries[tensor.name] = {
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
    ) -> None:
        self.out = out
        self.single_file = out.suffix == ".safetensors"
        self.partial = out.with_name(out.name + ".partial")
        self.force = force
        self.shards = [list(tensors)] if self.single_file else shards_of(tensors, max_shard_bytes)
        self.names = [out.name] if self.single_file else shard_names(len(self.shards))
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self.places: dict[str, Place] = {}
        for number, shard in enumerate(self.shards):
            position = 0
            for tensor in shard:
                self.places[tensor.name] = Place(number, position)
                position += tensor.size
        self.headers = [len(header_bytes(shard, metadata)) for shard in self.shards]
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
        check_output(out, force=force)
        try:
            self._start(plan_digest, restart)
        except OSError as error:
            self.abandon()
            raise self._error(error) from None
        except OutputError:
            self._close()
            raise

    # ------------------------------------------------------------ opening

    def _start(self, plan_digest: str, restart: bool) -> None:
        fresh = not self.partial.exists()
        if fresh:
            self.partial.mkdir(parents=True)
        elif not (self.partial / JOURNAL).exists() and any(self.partial.iterdir()):
            raise OutputError(
                f"cannot write {self.out}: {self.partial} exists and is not an unfinished merge; move it away"
            )
        self._journal = (self.partial / JOURNAL).open("a+", encoding="utf-8", errors="replace")
        self._claim()
        lines = [] if fresh or restart else self._journal_lines()
        if lines and lines[0].get("plan") != plan_digest:
            raise OutputError(
                f"cannot write {self.out}: {self.partial} holds an unfinished merge of another recipe or other inputs; "
                "finish that one, or start anew with --restart"
            )
        if lines:
            # Shards of another size, or side files of a run that stopped while publishing, are not part of this output.
            self._clear({JOURNAL, *self.names})
            self._open_files(fresh=False)
            self._resume(lines[1:])
        else:
            self._clear({JOURNAL})
            self._journal.truncate(0)
            self._open_files(fresh=True)
            self._note({"plan": plan_digest})

    def _clear(self, kept: Collection[str]) -> None:
        for path in self.partial.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _claim(self) -> None:
        if not USE_LOCKS:
            return
        import fcntl

        assert self._journal is not None
        try:
            fcntl.flock(self._journal.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(f"cannot write {self.out}: another process is writing it at this moment") from None

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
            descriptor = os.open(self.partial / name, flags, 0o666)
            self._descriptors.append(descriptor)
            length = os.fstat(descriptor).st_size
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

    def _resume(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take over the tensors that the journal lists and whose bytes still have the digest they had."""
        done = set()
        for line in lines:
            try:
                name, digest = str(line["tensor"]), bytes.fromhex(line["digest"])
                inputs = {(int(model), str(tensor)): bytes.fromhex(value) for model, tensor, value in line["inputs"]}
            except (KeyError, TypeError, ValueError):
                continue
            if name in self.tensors and self._digest(name) == digest:
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
            for number, shard in enumerate(self.shards):
                header = header_bytes(shard, metadata)
                if len(header) != self.headers[number]:
                    raise RuntimeError("the header has changed its length")
                os.pwrite(self._descriptors[number], header, 0)
            if not self.single_file:
                self._write_files(files)
            for descriptor in self._descriptors:
                os.fsync(descriptor)
            self._close()
            # The journal goes last: a process that dies before leaves an unfinished output that can be resumed.
            if self.single_file:
                os.replace(self.partial / self.names[0], self.out)
                (self.partial / JOURNAL).unlink()
                self.partial.rmdir()
            else:
                _sync_folder(self.partial)
                self._swap()
                (self.out / JOURNAL).unlink()
            _sync_folder(self.out.parent)
        except OSError as error:
            raise self._error(error) from None

    def _write_files(self, files: Mapping[str, bytes | Path]) -> None:
        everything = dict(files)
        if len(self.shards) > 1:
            weight_map = {name: self.names[place.shard] for name, place in self.places.items()}
            total = sum(tensor.size for tensor in self.tensors.values())
            elements = sum(_elements(tensor.shape) for tensor in self.tensors.values())
            everything["model.safetensors.index.json"] = index_json(weight_map, total, elements).encode()
        for name, content in everything.items():
            path = self.partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, path)
            else:
                path.write_bytes(content)
            with path.open("rb") as handle:
                os.fsync(handle.fileno())

    def _swap(self) -> None:
        if not self.out.exists():
            os.rename(self.partial, self.out)
            return
        if USE_EXCHANGE and _exchange(self.partial, self.out):
            shutil.rmtree(self.partial)
            return
        aside = _aside(self.out)
        os.rename(self.out, aside)
        os.rename(self.partial, self.out)
        shutil.rmtree(aside)

    def close(self) -> None:
        """Close the files and leave the unfinished output to be resumed."""
        self._close()

    def abandon(self) -> None:
        """Remove the unfinished output."""
        self._close()
        if self.partial.exists():
            shutil.rmtree(self.partial, ignore_errors=True)

    def _close(self) -> None:
        for descriptor in self._descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._descriptors = []
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _error(self, error: OSError) -> OutputError:
        needed = sum(self.sizes)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return OutputError(
                f"cannot write {self.out}: it needs {needed:,} bytes and there is no room for them "
                f"({os.strerror(error.errno)}); free some space or choose another place"
            )
        return OutputError(f"cannot write {self.out}: {error.strerror or error}; check the path and its permissions")


def check_output(out: Path, *, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Check that an output can be put in its place, and put back one that an interrupted replacement left aside.

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
    aside = _aside(out)
    if aside.exists() and not out.exists():
        os.rename(aside, out)
    if (out / JOURNAL).exists():  # a process died between replacing an output and removing the old one
        for old in (aside, out.with_name(out.name + ".partial")):
            shutil.rmtree(old, ignore_errors=True)
        (out / JOURNAL).unlink()
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


def _exchange(left: Path, right: Path) -> bool:
    """Exchange two folders in one step; return False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here = -100  # AT_FDCWD
    exchange = 2  # RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(left), here, os.fsencode(right), exchange) == 0)


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
