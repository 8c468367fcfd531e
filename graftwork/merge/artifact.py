"""Files that hold what was measured or learned: Fisher information, Gram matrices, masks, permutations, states.

They are safetensors like every checkpoint. Equal content gives equal bytes: no path, host or clock gets in. They are
written at once, beside their place, and renamed; merged models go through `graftwork.merge.writer`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from graftwork.merge import dtypes, lineage
from graftwork.merge.checkpoint import BLOCK, Checkpoint, content_digest, load_numpy, tensor_digest
from graftwork.merge.errors import CheckpointError, OutputError
from graftwork.merge.writer import OutputTensor, check_output, header_bytes

if TYPE_CHECKING:
    from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]

_NUMPY_CODES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "float32": "F32", "float64": "F64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Artifact:
    """What a file holds.

    Args:
        path: The file.
        kind: What it is: fisher, gram, mask, permutation, state …
        tensors: Its tensors by name; bf16 widened to float32.
        metadata: Its metadata without the prefix `graftwork.`.
        parents: Records of what it was made from: `name`, `digest`, and perhaps more.
        digest: Content digest of its tensors.
    """

    path: Path
    kind: str
    tensors: dict[str, Array]
    metadata: dict[str, str]
    parents: list[dict[str, Any]]
    digest: str

    @property
    def settings(self) -> dict[str, Any]:
        """The settings with which it was made."""
        found = json.loads(self.metadata.get("recipe") or "{}")
        return found if isinstance(found, dict) else {}


def parent_of(checkpoint: Checkpoint, name: str | None = None) -> dict[str, Any]:
    """Return the record by which an artifact names a checkpoint that it was made from; all its bytes are read."""
    record = lineage.parent_record(name or checkpoint.path.name, checkpoint.content_digest(), checkpoint.metadata)
    return {**record, "quick": checkpoint.quick_digest()}


def save_artifact(
    path: Path | str,
    tensors: Mapping[str, Array | Tensor],
    *,
    kind: str,
    method: str,
    settings: Mapping[str, Any],
    parents: Sequence[Mapping[str, Any]] = (),
    force: bool = False,
    inputs: Sequence[Path] = (),
    **more: str,
) -> str:
    """Write tensors into one safetensors file beside its place, rename it, and return its content digest.

    Args:
        path: The file; its name ends in `.safetensors`.
        tensors: Values by name; torch tensors keep bf16 and fp8. They are written in alphabetical order.
        kind: What it is; `load_artifact` checks it.
        method: What made it.
        settings: The settings with which it was made; anything that JSON holds.
        parents: Records of `parent_of`.
        force: Replace a file that exists.
        inputs: Files that it was made from, which must not be overwritten.
        more: Further metadata, without the prefix.

    Raises:
        OutputError: The place is taken or cannot be written.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise OutputError(f"cannot write {target}: the name of a {kind} file ends in .safetensors")
    check_output(target, force=force, inputs=inputs)
    raw = {name: _raw(tensors[name]) for name in sorted(tensors)}
    digest = digest_of(raw)
    outputs = [OutputTensor(name, code, shape, len(data)) for name, (code, shape, data) in raw.items()]
    recipe = json.dumps(dict(settings), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    metadata = lineage.metadata(kind, method=method, recipe=recipe, parents=parents, digest=digest, **more)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(header_bytes(outputs, metadata))
            for _, _, data in raw.values():
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        raise OutputError(
            f"cannot write {target}: {error.strerror or error}; check the path and its permissions"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return digest


def load_artifact(path: Path | str, *, kind: str | tuple[str, ...], what: str | None = None) -> Artifact:
    """Read a file that `save_artifact` has written.

    Args:
        path: The file.
        kind: What it has to be, or several that will do.
        what: What it is for, for error messages: "the Fisher information of model a".

    Raises:
        CheckpointError: It is not there, is damaged, or is something else.
    """
    kinds = (kind,) if isinstance(kind, str) else kind
    with Checkpoint.open(path, what=what or f"the {kinds[0]} file") as file:
        found = file.metadata.get(lineage.PREFIX + "kind", "")
        if found not in kinds:
            raise CheckpointError(
                f"cannot use {file.path} as {what or f'a {kinds[0]} file'}: "
                + (f"it is of the kind {found!r}" if found else "it is a checkpoint without graftwork's metadata")
                + f", not {' or '.join(repr(item) for item in kinds)}; give a file that graftwork made for this"
            )
        tensors = load_numpy(file)
        own = {
            key.removeprefix(lineage.PREFIX): value
            for key, value in file.metadata.items()
            if key.startswith(lineage.PREFIX)
        }
        return Artifact(file.path, found, tensors, own, lineage.own_parents(file.metadata), file.content_digest())


def tensors_digest(tensors: Mapping[str, Array | Tensor]) -> str:
    """Return the content digest that a file of these tensors has (`Checkpoint.content_digest`)."""
    return digest_of({name: _raw(value) for name, value in tensors.items()})


def digest_of(raw: Mapping[str, tuple[str, tuple[int, ...], memoryview]]) -> str:
    """Return the content digest of tensors given as (dtype code, shape, bytes)."""
    items = []
    for name, (code, shape, data) in raw.items():
        block = max(1, BLOCK * dtypes.BITS[code] // 8)
        digests = [xxhash.xxh3_128_digest(data[start : start + block]) for start in range(0, len(data), block)]
        items.append((name, code, shape, tensor_digest(digests or [b""])))
    return content_digest(items)


def _raw(value: Array | Tensor) -> tuple[str, tuple[int, ...], memoryview]:
    """Return dtype code, shape and bytes of a tensor."""
    if not isinstance(value, np.ndarray):
        import torch

        code = {name: code for code, name in dtypes.TORCH_NAMES.items()}.get(str(value.dtype).removeprefix("torch."))
        shape = tuple(value.shape)
        tensor = value.detach().cpu().contiguous()
        if code in {"BF16", "F8_E4M3", "F8_E5M2"}:
            words = tensor.reshape(-1).view(torch.uint8).numpy()
            return code, shape, words.data.cast("B")
        value = tensor.numpy()
    code = _NUMPY_CODES[value.dtype.name]
    little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    return code, value.shape, little.reshape(-1).view(np.uint8).data.cast("B")
