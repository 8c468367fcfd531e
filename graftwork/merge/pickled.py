"""Checkpoints in pickles: the only module that touches them, and it runs no code that they carry.

`torch.load(weights_only=True, mmap=True)` reads tensors and plain containers only. Values stay in the mapped file until
they are read.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.merge.checkpoint import TORCH_WORDS, ReadRange, TensorEntry, listed, quoted
from graftwork.merge.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "net", "ema")
"""Keys under which training scripts put the state of the model."""

PREFIXES = ("module.", "_orig_mod.")
"""What wrappers of a module (data parallel, compiled) put before every name."""

EXPANSION_LIMIT = 64 * 1024 * 1024
"""Bytes that a tensor may take beyond its file: a few stored values can be expanded to any size."""


class PickleProblem(ValueError):  # noqa: N818 - not an error of its own: the caller adds the file's name
    """What is wrong with a pickle, and what to do; the caller knows the file."""


@dataclass
class Pickled:
    """The tensors of one pickle."""

    entries: dict[str, TensorEntry] = field(default_factory=dict)
    ranges: dict[str, ReadRange] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def load(path: Path, *, key: str | None = None) -> Pickled:
    """Return the tensors of a pickle.

    Args:
        path: The file.
        key: The part to use; without it the file itself or the one part that holds tensors.
    """
    import torch

    release = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if release < (2, 6):
        raise PickleProblem(
            f"torch {torch.__version__} can be made to run code by a pickle even when it loads data only; "
            "install torch 2.6 or newer, or convert to safetensors first"
        )
    result = Pickled()
    state = _choose(_load(path, result), key, result)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    _note_the_rest(state, tensors, result)
    tensors = _without_common_prefix(tensors, result)
    owners: dict[tuple[int, int, tuple[int, ...], tuple[int, ...], str], str] = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        entry = _entry(name, tensor, path)
        result.entries[name] = entry
        result.ranges[name] = _Range(name, tensor, path).read_into
        if entry.size:
            storage = tensor.untyped_storage().data_ptr()
            place = (storage, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride(), entry.dtype)
            owner = owners.setdefault(place, name)
            if owner != name:
                result.aliases[name] = owner
                result.notes.append(f"{quoted(name)} shares the values of {quoted(owner)}")
    return result


def _load(path: Path, result: Pickled) -> Any:
    """Return the unpickled object."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
            # The format before torch 1.6 cannot be mapped.
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            result.notes.append(f"{quoted(path.name)} has the old pickle format and was read into memory")
            return loaded
        except Exception as error:
            # Whatever a damaged or hostile pickle provokes in the reader, the user's answer is the same.
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise PickleProblem(
                f"torch cannot read it as data only ({quoted(lines[0], 160)[1:-1]}); save a plain state_dict, best as "
                "safetensors"
            ) from None


def _is_state(value: object) -> bool:
    import torch

    return isinstance(value, Mapping) and any(
        isinstance(key, str) and isinstance(item, torch.Tensor) for key, item in value.items()
    )


def _choose(loaded: Any, key: str | None, result: Pickled) -> Mapping[str, Any]:
    """Return the mapping that holds the model's tensors: one named part, one known part, or the whole."""
    if not isinstance(loaded, Mapping):
        raise PickleProblem(f"it holds a {type(loaded).__name__}, not a dictionary of tensors; save a state_dict")
    parts = [name for name, value in loaded.items() if isinstance(name, str) and _is_state(value)]
    if key is not None:
        if key not in parts:
            known = f"; choose one of {listed(parts)}" if parts else "; leave the key out"
            raise PickleProblem(f"it has no part {quoted(key)} with tensors{known}")
        chosen = key
    else:
        known_parts = [name for name in parts if name in WRAPPERS]
        if len(known_parts) > 1:
            raise PickleProblem(f"several of its parts hold tensors: {listed(known_parts)}; choose with FILE#key")
        if not known_parts:
            if _is_state(loaded):
                return loaded
            hint = f"parts that do: {listed(parts)}, choose with FILE#key" if parts else "save a state_dict"
            raise PickleProblem(f"it holds no tensors at its top level; {hint}")
        chosen = known_parts[0]
    result.notes.append(f"the part {quoted(chosen)} was opened")
    others = [str(name) for name in loaded if name != chosen]
    optimizer = [name for name in others if re.search(r"optim|sched|scaler", name, re.IGNORECASE)]
    if optimizer:
        result.notes.append(f"optimizer state ignored ({listed(optimizer)})")
    rest = [name for name in others if name not in optimizer]
    if rest:
        result.notes.append(f"{listed(rest)} ignored")
    state = loaded[chosen]
    assert isinstance(state, Mapping)
    return state


def _note_the_rest(state: Mapping[Any, Any], tensors: Mapping[str, Tensor], result: Pickled) -> None:
    odd = [name for name in tensors if not isinstance(name, str)]
    if odd:
        raise PickleProblem(f"it has a tensor under the key {quoted(odd[0])}, which is not a name; save a state_dict")
    rest = [str(name) for name in state if name not in tensors]
    optimizer = [name for name in rest if re.search(r"optim|sched|scaler", name, re.IGNORECASE)]
    if optimizer:
        result.notes.append(f"optimizer state ignored ({listed(optimizer)})")
    others = [name for name in rest if name not in optimizer]
    if others:
        result.notes.append(f"{listed(others)} ignored: not a tensor")


def _without_common_prefix(tensors: dict[str, Tensor], result: Pickled) -> dict[str, Tensor]:
    """Return the tensors without a wrapper's prefix that all of their names share."""
    stripped = ""
    while tensors:
        prefix = next((word for word in PREFIXES if all(name.startswith(word) for name in tensors)), None)
        if prefix is None or prefix in tensors:
            break
        stripped += prefix
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if stripped:
        result.notes.append(f"the common prefix {quoted(stripped)} was removed from all names")
    return tensors


def _entry(name: str, tensor: Tensor, path: Path) -> TensorEntry:
    import torch

    dtype = next((code for code, word in TORCH_WORDS.items() if getattr(torch, word, None) is tensor.dtype), None)
    if tensor.layout is not torch.strided or tensor.is_quantized or dtype is None:
        kind = tensor.layout if tensor.layout is not torch.strided else tensor.dtype
        raise PickleProblem(
            f"tensor {quoted(name)} is {kind}, which safetensors cannot hold; convert it to a dense tensor first"
        )
    try:
        name.encode()
    except UnicodeEncodeError:
        raise PickleProblem(f"tensor {quoted(name)} has a name that is not valid Unicode; rename it") from None
    size = tensor.numel() * tensor.element_size()
    if size > max(path.stat().st_size, EXPANSION_LIMIT):
        raise PickleProblem(
            f"tensor {quoted(name)} takes {size} bytes, more than its file ({path.stat().st_size}): a few values "
            "expanded; save it without expansion"
        )
    return TensorEntry(name, dtype, tuple(tensor.shape), path, 0, size)


class _Range:
    """Reads byte ranges of one tensor of a pickle."""

    def __init__(self, name: str, tensor: Tensor, path: Path) -> None:
        self._name = name
        self._path = path
        self._file_size = path.stat().st_size
        self._tensor = tensor
        self._bytes: memoryview | None = None
        self._lock = threading.Lock()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` on."""
        import torch

        # Touching mapped pages that a file no longer has kills the process; between this check and the copy it still
        # would, but a file that was cut before is an error line.
        if self._path.stat().st_size < self._file_size:
            raise CheckpointError(
                f"cannot read {quoted(self._name)} from {quoted(self._path)}: the file has shrunk to "
                f"{self._path.stat().st_size} of {self._file_size} bytes since it was opened; start again when nothing "
                "writes to it"
            )
        with self._lock:
            if self._bytes is None:
                # A view of the mapped file; only a tensor with gaps or strides is copied.
                flat = self._tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
                self._bytes = memoryview(flat.numpy().data)
        buffer[:] = self._bytes[offset : offset + len(buffer)]
