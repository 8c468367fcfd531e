"""Damaged and hostile checkpoints: each opens and is read in bounds, or is refused in one line, soon and cheaply."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwork.merge import checkpoint as module
from graftwork.merge.checkpoint import Checkpoint
from graftwork.merge.errors import CheckpointError

ROUNDS = 40
SECONDS_EACH = 2.0
BYTES_EACH = 4_000_000
"""Memory for one attempt: the files are of a few kilobytes, whatever they claim."""

Header = dict[str, Any]


def healthy() -> tuple[Header, bytes]:
    """Return a header and data: several dtypes, a scalar, an empty tensor, metadata."""
    shapes = {
        "embed": ("F32", [10, 4], 160), "layers.0.w": ("BF16", [8, 8], 128), "layers.1.w": ("BF16", [8, 8], 128),
        "scale": ("F64", [], 8), "none": ("I64", [0, 5], 0), "mask": ("BOOL", [3], 3), "small": ("F4", [3, 2], 3),
    }  # fmt: skip
    header: Header = {"__metadata__": {"format": "pt", "graftwork.kind": "model"}}
    position = 0
    for name, (dtype, shape, size) in shapes.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    return header, bytes(index % 251 for index in range(position))


def pack(header: object, data: bytes, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    claimed = len(text) if length is None else length
    return (claimed % 2**64).to_bytes(8, "little") + text + data


def tensor_of(header: Header, chance: random.Random) -> Any:
    return header[chance.choice([name for name in header if name != "__metadata__"])]


# Each mutation takes a source of chance and returns the bytes of a damaged file.


def flipped_bytes(chance: random.Random) -> bytes:
    blob = bytearray(pack(*healthy()))
    end = 8 + int.from_bytes(blob[:8], "little")
    for _ in range(chance.randint(1, 4)):
        blob[chance.randrange(8, end)] ^= 1 << chance.randrange(8)
    return bytes(blob)


def random_bytes(chance: random.Random) -> bytes:
    return chance.randbytes(chance.randint(0, 300))


def truncated(chance: random.Random) -> bytes:
    blob = pack(*healthy())
    return blob[: chance.randrange(len(blob))]


def appended(chance: random.Random) -> bytes:
    return pack(*healthy()) + chance.randbytes(chance.randint(1, 100))


def lying_length(chance: random.Random) -> bytes:
    header, data = healthy()
    true = len(json.dumps(header))
    lies = [
        0,
        1,
        2,
        true - 1,
        true + 1,
        true + len(data),
        true + len(data) + 1,
        10**8,
        10**8 + 1,
        2**31,
        2**40,
        2**63,
        2**64 - 1,
    ]
    return pack(header, data, length=chance.choice([*lies, chance.randrange(2 * true)]))


def lying_offsets(chance: random.Random) -> bytes:
    header, data = healthy()
    tensor = tensor_of(header, chance)
    begin, end = tensor["data_offsets"]
    lies = [[begin + 1, end + 1], [begin, end - 1], [begin - 1, end], [end, begin], [-1, end], [0, 2**63],
            [2**64, 2**64], [begin, end, end], [], [begin], "ab", None, [0.0, 1.0], [True, False], ["0", "4"], {"0": 1},
            [len(data), len(data) + end - begin], [10**400, 10**400], [[0], [1]]]  # fmt: skip
    tensor["data_offsets"] = chance.choice(lies)
    return pack(header, data)


def absurd_shapes(chance: random.Random) -> bytes:
    header, data = healthy()
    absurd = [[2**63], [2**32, 2**32, 2**32], [2**64 - 1, 0], [-1], [-4, -10], [1.5], ["4"], None, 40, [True] * 40,
              [[4], [10]], [1] * 5000, [10**500], [0] * 2000, {}, [2**31] * 100, [40, 1e400]]  # fmt: skip
    tensor_of(header, chance)["shape"] = chance.choice(absurd)
    return pack(header, data)


def unknown_dtypes(chance: random.Random) -> bytes:
    header, data = healthy()
    unknown = ["F31", "", "f32", None, 32, ["F32"], {"F32": 1}, "F32\n", "Q4_0", "F16", "U8", "F6_E2M3", "\ud800"]
    tensor_of(header, chance)["dtype"] = chance.choice(unknown)
    return pack(header, data)


def odd_names(chance: random.Random) -> bytes:
    header, data = healthy()
    name = chance.choice(["", "a\nb", "\ud800", "\0", "../../etc", "x" * 50_000, "\u2028", "__metadata__"])
    items = list(header.items())
    place = chance.randrange(1, len(items))
    items[place] = (name, items[place][1])
    return pack(dict(items), data)


def duplicate_names(chance: random.Random) -> bytes:
    header, data = healthy()
    text = json.dumps(header)
    doubled = chance.choice(list(header))
    return pack(f"{{{json.dumps(doubled)}: {json.dumps(header[doubled])}, {text[1:]}".encode(), data)


def overlaps(chance: random.Random) -> bytes:
    header, data = healthy()
    first, second = chance.sample([name for name in header if name != "__metadata__"], 2)
    header[first]["data_offsets"] = header[second]["data_offsets"]
    if chance.random() < 0.5:
        header[first] = dict(header[second])
    return pack(header, data)


def removed_fields(chance: random.Random) -> bytes:
    header, data = healthy()
    tensor = tensor_of(header, chance)
    del tensor[chance.choice(list(tensor))]
    if chance.random() < 0.3:
        del header[chance.choice([name for name in header if name != "__metadata__"])]
    return pack(header, data)


def bad_metadata(chance: random.Random) -> bytes:
    header, data = healthy()
    header["__metadata__"] = chance.choice([[], "x", 3, {"a": 1}, {"a": None}, {"a": {"b": "c"}}, {"a": ["b"]}, True])
    return pack(header, data)


def other_json(chance: random.Random) -> bytes:
    texts = [
        b"[]", b"null", b"3", b'"x"', b"{}", b"{} ", b" {}", b"{}x", b"[" * 200_000, b'{"a":' * 50_000, b"\xff\xfe{}",
        b'{"a": ' + b"9" * 10_000 + b"}", b'{"a": NaN}', b'{"a": Infinity}', b"\xef\xbb\xbf{}",
        b"{" + b" " * 1000 + b"}", b'{"x": ' + b"[" * 70 + b"]" * 70 + b"}",
        b'{"x": {"dtype": "U8", "shape": [], "data_offsets": [0, 1e0]}}',
    ]  # fmt: skip
    return pack(chance.choice(texts), b"" if chance.random() < 0.7 else b"12345678")


FILES: list[Callable[[random.Random], bytes]] = [
    flipped_bytes, random_bytes, truncated, appended, lying_length, lying_offsets, absurd_shapes, unknown_dtypes,
    odd_names, duplicate_names, overlaps, removed_fields, bad_metadata, other_json,
]  # fmt: skip


def survives(path: Path) -> bool:
    """Return whether a checkpoint opens; whatever it is, hold it to this file's promise."""
    started = time.monotonic()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        with Checkpoint.open(path) as checkpoint:
            for name, entry in checkpoint.tensors.items():
                assert entry.start >= 8
                assert entry.start + entry.size <= entry.file.stat().st_size
                assert len(checkpoint.read(name)) == entry.size
            checkpoint.quick_digest()
        opened = True
    except CheckpointError as caught:
        message, cause = str(caught), caught.__cause__
        assert message.startswith(f'cannot open "{path}": ') or message.startswith(f'"{path}" is quantised'), message
        assert len(message.splitlines()) == 1
        assert len(message) < 2_000
        assert "; " in message
        assert cause is None
        opened = False
    assert time.monotonic() - started < SECONDS_EACH
    assert tracemalloc.get_traced_memory()[1] - before < BYTES_EACH
    return opened


@pytest.fixture
def traced() -> Any:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def test_the_unharmed_file_opens(tmp_path: Path, traced: None) -> None:
    (tmp_path / "x.safetensors").write_bytes(pack(*healthy()))
    assert survives(tmp_path / "x.safetensors")


@pytest.mark.parametrize("mutation", FILES, ids=lambda mutation: mutation.__name__)
def test_a_damaged_file_is_refused_or_read_in_bounds(
    tmp_path: Path, traced: None, mutation: Callable[[random.Random], bytes]
) -> None:
    path = tmp_path / "x.safetensors"
    descriptors = len(os.listdir("/proc/self/fd"))
    opened = 0
    for seed in range(ROUNDS):
        path.write_bytes(mutation(random.Random(f"{mutation.__name__} {seed}")))
        opened += survives(path)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    if mutation in {random_bytes, truncated, appended, duplicate_names, bad_metadata}:
        assert opened == 0


def damaged_folder(folder: Path, chance: random.Random) -> None:
    """Write a sharded model and damage its index, its shards or its config."""
    header, data = healthy()
    names = [name for name in header if name != "__metadata__"]
    mapping: dict[Any, Any] = {}
    for number, part in enumerate((names[:3], names[3:])):
        shard: Header = {}
        content = b""
        for name in part:
            begin, end = header[name]["data_offsets"]
            shard[name] = header[name] | {"data_offsets": [len(content), len(content) + end - begin]}
            content += data[begin:end]
            mapping[name] = f"model-0000{number + 1}-of-00002.safetensors"
        (folder / mapping[part[0]]).write_bytes(pack(shard, content))
    index: Any = {"metadata": {"total_size": len(data)}, "weight_map": mapping}
    name = chance.choice(names)
    text: str | None = None
    match chance.randrange(12):
        case 0:
            mapping[name] = chance.choice(
                [
                    "../x.safetensors",
                    "/etc/passwd",
                    "..",
                    ".",
                    "",
                    "a/b.safetensors",
                    "a\\b.safetensors",
                    "\0.safetensors",
                ]
            )
        case 1:
            mapping[name] = chance.choice([None, 3, [], {}, True, 1e400])
        case 2:
            (folder / mapping[name]).unlink()
        case 3:
            index = chance.choice([[], None, 3, {}, {"weight_map": []}, {"weight_map": None}, {"weight_map": {}}])
        case 4:
            text = json.dumps(index)
            text = text[: chance.randrange(len(text))]
        case 5:
            text = chance.choice(
                ["[" * 100_000, '{"weight_map":' * 900 + "{}" + "}" * 900, '{"weight_map": ' + "1" * 9000 + "}"]
            )
        case 6:
            mapping[name] = next(shard for shard in mapping.values() if shard != mapping[name])
        case 7:
            mapping[chance.choice(["extra", "a\nb", "\ud800"])] = mapping[name]
        case 8:
            shard_path = folder / mapping[name]
            shard_path.write_bytes(shard_path.read_bytes()[: chance.randrange(shard_path.stat().st_size)])
        case 9:
            (folder / "config.json").write_text(
                chance.choice(["[]", "", "{", '{"quantization_config": {"a": 1}}', "1" * 9000])
            )
        case 10:
            text = json.dumps(index).replace('"weight_map": {', f'"weight_map": {{"{name}": "x.safetensors", ')
        case 11:
            (folder / mapping[name]).unlink()
            (folder / mapping[name]).mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index) if text is None else text)


@pytest.mark.parametrize("seed", range(100))
def test_a_damaged_folder_is_refused_or_read_in_bounds(tmp_path: Path, traced: None, seed: int) -> None:
    damaged_folder(tmp_path, random.Random(seed))
    survives(tmp_path)


@pytest.mark.parametrize("positioned", [True, False])
def test_a_file_that_is_cut_after_opening_is_an_error_line(
    tmp_path: Path, positioned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "USE_PREADV", positioned)
    header, data = healthy()
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack(header, data))
    with Checkpoint.open(path) as checkpoint:
        os.truncate(path, path.stat().st_size - 20)
        assert checkpoint.read("embed") == data[:160]
        with pytest.raises(CheckpointError, match="it has changed since it was opened") as caught:
            checkpoint.read("layers.1.w")
        message = str(caught.value)
        assert '"layers.1.w"' in message
        assert f'"{path}"' in message
        assert len(message.splitlines()) == 1
        with pytest.raises(CheckpointError, match="has changed"):
            checkpoint.quick_digest()


def test_a_damaged_pickle_is_refused_or_read_in_bounds(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    state = {
        "a": torch.arange(100.0),
        "b": torch.ones(3, 4, dtype=torch.bfloat16),
        "c": torch.arange(12.0).view(3, 4).T,
    }
    torch.save({"state_dict": state, "epoch": 1}, path)
    healthy_bytes = path.read_bytes()
    for seed in range(100):
        chance = random.Random(seed)
        blob = bytearray(healthy_bytes)
        if seed % 5 == 0:
            del blob[chance.randrange(len(blob)) :]
        for _ in range(min(len(blob), chance.randint(1, 6))):
            blob[chance.randrange(len(blob))] = chance.randrange(256)
        path.write_bytes(blob)
        try:
            with Checkpoint.open(path, allow_pickle=True) as checkpoint:
                assert all(len(checkpoint.read(name)) == entry.size for name, entry in checkpoint.tensors.items())
        except CheckpointError as caught:
            message = str(caught)
        else:
            continue
        assert len(message.splitlines()) == 1


def test_a_pickle_that_is_cut_after_opening_is_an_error_line(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"x": torch.ones(100_000)}, path)
    with Checkpoint.open(path, allow_pickle=True) as checkpoint:
        os.truncate(path, 1000)
        with pytest.raises(CheckpointError, match="has shrunk to 1000 of"):
            checkpoint.read("x")
        path.unlink()
        with pytest.raises(CheckpointError, match="does not exist"):
            checkpoint.read("x")


def test_a_header_that_claims_terabytes_is_refused_in_little_memory(tmp_path: Path) -> None:
    header, data = healthy()
    claims = {
        "shape": pack({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, data),
        "length": pack(header, data, length=99_000_000),
        "nesting": pack(b"[" * 5_000_000, b""),
    }
    for name, blob in claims.items():
        (tmp_path / f"{name}.safetensors").write_bytes(blob)
    # A sparse file really is as long as its header claims, so only validation stands between it and an allocation.
    with open(tmp_path / "sparse.safetensors", "wb") as file:
        file.write((99_999_999).to_bytes(8, "little"))
        file.truncate(2**40)
    code = (
        "import sys, resource; from pathlib import Path\n"
        "from graftwork.merge.checkpoint import Checkpoint, CheckpointError\n"
        "with open('/proc/self/statm') as file: mapped = int(file.read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (mapped + 400_000_000,) * 2)\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    try: Checkpoint.open(path)\n"
        "    except CheckpointError as error: print(error)\n"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=Path(module.__file__).parents[2],
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 4
    assert time.monotonic() - started < 10
