"""What a checkpoint is taken for, what is read from it, and what is refused with which words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import xxhash

from graftwork.merge import checkpoint as module
from graftwork.merge.checkpoint import (
    BLOCK,
    Checkpoint,
    content_digest,
    load_numpy,
    load_torch,
    quoted,
    shown,
    tensor_digest,
)
from graftwork.merge.errors import CheckpointError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "checkpoints"


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, path, metadata)
    return path


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def shard(folder: Path, parts: dict[str, dict[str, torch.Tensor]], *, metadata: bool = True) -> Path:
    """Write shards and their index."""
    for name, tensors in parts.items():
        write(folder / name, tensors, {"format": "pt"})
    index: dict[str, object] = {"weight_map": {key: name for name, tensors in parts.items() for key in tensors}}
    if metadata:
        index["metadata"] = {"total_size": 0}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "b.weight": torch.randn(300, 70, generator=generator).to(torch.bfloat16),
        "a.weight": torch.randn(7, 5, generator=generator),
        "c.count": torch.tensor(7, dtype=torch.int64),
        "d.empty": torch.zeros(0, 3),
    }


def refusal(path: Path | str, *, what: str = "", allow_pickle: bool = False) -> str:
    """Return the message with which a path is refused; it is one line and begins the same everywhere."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path, what=what, allow_pickle=allow_pickle)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert ";" in message
    return message


# -- one file


def test_a_file_is_seen_without_its_values(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", some_tensors(), {"graftwork.kind": "model", "format": "pt"})
    with Checkpoint.open(path) as checkpoint:
        assert list(checkpoint.tensors) == ["a.weight", "b.weight", "c.count", "d.empty"]
        entry = checkpoint.tensors["b.weight"]
        assert (entry.dtype, entry.shape, entry.size, entry.elements) == ("BF16", (300, 70), 42_000, 21_000)
        assert entry.file == path
        assert checkpoint.tensors["c.count"].shape == ()
        assert checkpoint.metadata == {"graftwork.kind": "model", "format": "pt"}
        assert checkpoint.folder is None
        assert checkpoint.config is None
        assert checkpoint.notes == ()


def test_every_dtype_that_safetensors_writes_is_read_bit_for_bit(tmp_path: Path) -> None:
    dtypes = [torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64,
              torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
              torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz,
              torch.float8_e5m2fnuz]  # fmt: skip
    raw = bytes(range(256))
    tensors = {str(dtype): torch.frombuffer(bytearray(raw), dtype=dtype).clone() for dtype in dtypes[1:]}
    tensors["bool"] = torch.tensor([True, False])
    path = write(tmp_path / "x.safetensors", tensors)
    with Checkpoint.open(path) as checkpoint:
        read = load_torch(checkpoint)
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype
            assert bytes(read[name].view(torch.uint8).numpy()) == bytes(tensor.view(torch.uint8).numpy())


def test_scalars_and_empty_tensors_are_loaded_with_their_shapes(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", some_tensors())
    with Checkpoint.open(path) as checkpoint:
        for loaded in (load_torch(checkpoint), load_numpy(checkpoint)):
            assert {name: tuple(value.shape) for name, value in loaded.items()} == {
                "a.weight": (7, 5), "b.weight": (300, 70), "c.count": (), "d.empty": (0, 3)
            }  # fmt: skip
            assert int(loaded["c.count"]) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_numpy_gets_values_of_dtypes_that_it_lacks_widened_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.frombuffer(bytearray(range(256)), dtype=dtype).clone()
    path = write(tmp_path / "x.safetensors", {"x": tensor})
    with Checkpoint.open(path) as checkpoint:
        np.testing.assert_array_equal(load_numpy(checkpoint)["x"], tensor.to(torch.float32).numpy())


def test_numpy_refuses_a_dtype_that_it_cannot_widen(tmp_path: Path) -> None:
    header = {"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    with Checkpoint.open(write_raw(tmp_path / "x.safetensors", header, b"ab")) as checkpoint:
        assert checkpoint.read("x") == b"ab"
        for load in (load_numpy, load_torch):
            with pytest.raises(CheckpointError, match="no dtype for F4"):
                load(checkpoint)


@pytest.mark.parametrize("positioned", [True, False])
def test_any_range_of_a_tensor_is_read_from_many_threads(
    tmp_path: Path, positioned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "USE_PREADV", positioned)
    tensors = some_tensors()
    with Checkpoint.open(write(tmp_path / "x.safetensors", tensors)) as checkpoint:
        expected = bytes(tensors["b.weight"].view(torch.uint8).numpy())
        entry = checkpoint.tensors["b.weight"]
        wrong: list[int] = []

        def read(seed: int) -> None:
            random = np.random.default_rng(seed)
            for _ in range(100):
                start, end = sorted(random.integers(0, entry.size + 1, 2).tolist())
                buffer = bytearray(end - start)
                checkpoint.read_into(entry, start, memoryview(buffer))
                if buffer != expected[start:end]:
                    wrong.append(seed)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_values_are_read_into_arrays_of_any_kind(tmp_path: Path) -> None:
    tensors = some_tensors()
    with Checkpoint.open(write(tmp_path / "x.safetensors", tensors)) as checkpoint:
        array = np.empty((7, 5), np.float32)
        checkpoint.read_into(checkpoint.tensors["a.weight"], 0, memoryview(array))
        np.testing.assert_array_equal(array, tensors["a.weight"].numpy())
        checkpoint.read_into(checkpoint.tensors["d.empty"], 0, memoryview(np.empty((0, 3), np.float32)))


def test_a_range_outside_the_tensor_is_a_programming_error(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path / "x.safetensors", some_tensors()))
    entry = checkpoint.tensors["a.weight"]
    for offset, size in ((-1, 4), (0, 141), (140, 1)):
        with pytest.raises(ValueError, match="which has 140"):
            checkpoint.read_into(entry, offset, memoryview(bytearray(size)))
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(ValueError, match="closed"):
        checkpoint.read("a.weight")
    assert "a.weight" in checkpoint.tensors


def test_closing_gives_every_file_back(tmp_path: Path) -> None:
    tensors = some_tensors()
    folder = shard(tmp_path, {f"s{i}.safetensors": {name: tensors[name]} for i, name in enumerate(tensors)})
    before = len(os.listdir("/proc/self/fd"))
    with Checkpoint.open(folder):
        assert len(os.listdir("/proc/self/fd")) == before + 4
    assert len(os.listdir("/proc/self/fd")) == before
    (folder / "s3.safetensors").write_bytes(b"damaged file")
    refusal(folder)
    assert len(os.listdir("/proc/self/fd")) == before


def test_opening_and_reading_imports_no_torch(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", some_tensors())
    code = (
        "import sys; from graftwork.merge.checkpoint import Checkpoint, load_numpy\n"
        f"with Checkpoint.open({str(path)!r}) as c: load_numpy(c); c.quick_digest()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(module.__file__).parents[2])


# -- digests


def test_digests_do_not_depend_on_sharding(tmp_path: Path) -> None:
    tensors = some_tensors()
    names = list(tensors)
    one = write(tmp_path / "one" / "model.safetensors", tensors)
    parts = {"z.safetensors": {k: tensors[k] for k in names[:2]}, "y.safetensors": {k: tensors[k] for k in names[2:]}}
    many = shard(tmp_path / "many", parts)
    with Checkpoint.open(one) as left, Checkpoint.open(many) as right:
        assert left.quick_digest() == right.quick_digest()
        assert left.content_digest() == right.content_digest()
        assert left.quick_digest() != left.content_digest()


def test_the_quick_digest_sees_names_shapes_dtypes_and_both_ends(tmp_path: Path) -> None:
    values = torch.zeros(10_000)
    variants = {"plain": {"x": values}, "name": {"y": values}, "shape": {"x": values.view(100, 100)}}
    variants["dtype"] = {"x": torch.zeros(10_000, dtype=torch.int32)}
    for position in (0, 1023, 9_999 - 1023, 9_999):
        changed = values.clone()
        changed[position] = 1
        variants[f"value {position}"] = {"x": changed}
    digests = set()
    for name, tensors in variants.items():
        with Checkpoint.open(write(tmp_path / f"{name}.safetensors", tensors)) as checkpoint:
            digests.add(checkpoint.quick_digest())
    assert len(digests) == len(variants)


def test_the_content_digest_is_made_of_blocks_of_65536_elements(tmp_path: Path) -> None:
    tensor = torch.arange(BLOCK * 3 + 17, dtype=torch.float32)
    raw = tensor.numpy().tobytes()
    blocks = [xxhash.xxh3_128_digest(raw[start : start + 4 * BLOCK]) for start in range(0, len(raw), 4 * BLOCK)]
    digest = tensor_digest(blocks)
    assert digest == xxhash.xxh3_128_digest(b"".join(blocks))
    with Checkpoint.open(write(tmp_path / "x.safetensors", {"x": tensor})) as checkpoint:
        assert checkpoint.content_digest() == content_digest([("x", "F32", (len(tensor),), digest)])
    assert tensor_digest([]) == xxhash.xxh3_128_digest(b"")


def test_the_content_digest_does_not_depend_on_order_but_on_everything_else() -> None:
    a, b = ("a", "F32", (2, 3), b"1" * 16), ("b", "F32", (6,), b"2" * 16)
    assert content_digest([a, b]) == content_digest(iter([b, a]))
    others = [[a], [("a", "F32", (3, 2), b"1" * 16), b], [("a", "F16", (2, 3), b"1" * 16), b], []]
    assert len({content_digest(items) for items in [[a, b], *others]}) == 5


def test_eight_thousand_tensors_open_and_digest_in_seconds(tmp_path: Path) -> None:
    header, position = {}, 0
    for number in range(8_000):
        header[f"model.layers.{number}.weight"] = {
            "dtype": "BF16",
            "shape": [4, 8],
            "data_offsets": [position, position + 64],
        }
        position += 64
    path = write_raw(tmp_path / "x.safetensors", header, bytes(position))
    start = time.monotonic()
    with Checkpoint.open(path) as checkpoint:
        assert len(checkpoint.tensors) == 8_000
        checkpoint.quick_digest()
    assert time.monotonic() - start < 5


# -- folders


def test_a_folder_with_one_file_brings_its_config(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", some_tensors())
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.config == {"model_type": "llama"}
        assert checkpoint.folder == checkpoint.path == tmp_path
        assert len(checkpoint.tensors) == 4


@pytest.mark.parametrize("metadata", [True, False])
def test_an_index_is_read_with_and_without_metadata(tmp_path: Path, metadata: bool) -> None:
    tensors = some_tensors()
    parts = {f"model-0000{i}-of-00004.safetensors": {name: tensors[name]} for i, name in enumerate(tensors, 1)}
    shard(tmp_path, parts, metadata=metadata)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == sorted(tensors)
        assert checkpoint.metadata == {"format": "pt"}
        assert all(torch.equal(value, tensors[name]) for name, value in load_torch(checkpoint).items())
        assert checkpoint.notes == ()


def test_shards_and_tensors_that_the_index_does_not_name_are_noted(tmp_path: Path) -> None:
    folder = shard(tmp_path, {"a.safetensors": {"x": torch.ones(2), "y": torch.ones(2)}})
    write(folder / "stray.safetensors", {"z": torch.ones(1)})
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors"}}')
    with Checkpoint.open(folder) as checkpoint:
        assert list(checkpoint.tensors) == ["x", "y"]
        assert checkpoint.notes == (
            'shard "stray.safetensors" is not named by the index', 'the index does not name "y"; the headers count'
        )  # fmt: skip


def test_the_only_safetensors_file_of_a_folder_counts_whatever_its_name(tmp_path: Path) -> None:
    write(tmp_path / "diffusion_pytorch_model.safetensors", {"x": torch.ones(2)})
    write(tmp_path / "diffusion_pytorch_model.fp16.safetensors", {"x": torch.ones(2)})
    write(tmp_path / "adapter_model.safetensors", {"lora": torch.ones(2)})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["x"]
        assert len(checkpoint.notes) == 1
    with Checkpoint.open(tmp_path / "diffusion_pytorch_model.fp16.safetensors") as checkpoint:
        assert list(checkpoint.tensors) == ["x"]


def test_two_weight_sets_in_a_folder_are_refused(tmp_path: Path) -> None:
    shard(tmp_path, {"a.safetensors": {"x": torch.ones(2)}})
    write(tmp_path / "model.safetensors", {"x": torch.zeros(2)})
    message = refusal(tmp_path, what="models[1].model")
    assert message.startswith(f'cannot open models[1].model "{tmp_path}": ')
    assert "delete one or name the file" in message


def test_ambiguous_files_are_listed(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    write(tmp_path / "b.safetensors", {"x": torch.ones(2)})
    assert '"a.safetensors", "b.safetensors"; name the file' in refusal(tmp_path)


def test_shards_without_an_index_or_without_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "model-00001-of-00002.safetensors", {"x": torch.ones(2)})
    assert "one shard of 2" in refusal(tmp_path)
    write(tmp_path / "model-00002-of-00002.safetensors", {"y": torch.ones(2)})
    assert "2 shards but no model.safetensors.index.json" in refusal(tmp_path)
    with Checkpoint.open(tmp_path / "model-00001-of-00002.safetensors") as checkpoint:
        assert "opened alone" in checkpoint.notes[0]


def test_missing_shards_are_listed(tmp_path: Path) -> None:
    parts = {f"{i}.safetensors": {f"x{i}": torch.ones(1)} for i in range(12)}
    shard(tmp_path, parts)
    for i in range(1, 11):
        (tmp_path / f"{i}.safetensors").unlink()
    message = refusal(tmp_path)
    assert "missing" in message
    assert '"1.safetensors"' in message
    assert "and 4 more" in message


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"x": "../a.safetensors"}, "not the name of"),
        ({"x": "sub/a.safetensors"}, "not the name of"),
        ({"x": "sub\\a.safetensors"}, "not the name of"),
        ({"x": "/etc/passwd"}, "not the name of"),
        ({"x": "a\0.safetensors"}, "not the name of"),
        ({"x": "a.bin"}, "not the name of"),
        ({"x": 3}, "is in 3"),
        ({"x": ""}, "not the name of"),
        (["x"], '"weight_map", not an object'),
        (None, "null"),
        ({"x": "a.safetensors", "gone": "a.safetensors"}, '"gone" is in "a.safetensors", it is in no shard'),
        ({"x": "b.safetensors", "y": "b.safetensors"}, "names shards that are missing"),
    ],
)  # fmt: skip
def test_a_bad_index_is_refused(tmp_path: Path, weight_map: object, words: str) -> None:
    shard(tmp_path, {"a.safetensors": {"x": torch.ones(2)}})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert words in refusal(tmp_path)


def test_a_tensor_in_the_wrong_shard_or_in_two_is_refused(tmp_path: Path) -> None:
    shard(tmp_path, {"a.safetensors": {"x": torch.ones(2)}, "b.safetensors": {"y": torch.ones(2)}})
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert 'is in "b.safetensors", it is in "a.safetensors"' in refusal(tmp_path)
    write(tmp_path / "b.safetensors", {"x": torch.ones(2), "y": torch.ones(2)})
    assert 'is in both "a.safetensors" and "b.safetensors"' in refusal(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '"x"',
        "nul",
        '{"a": ' + "9" * 5000 + "}",
        "[" * 100_000,
        "\ud800",
        '{"a":' * 500 + "1" + "}" * 500,
    ],
)
def test_malformed_json_beside_the_weights_is_one_line(tmp_path: Path, text: str) -> None:
    write(tmp_path / "model.safetensors", {"x": torch.ones(2)})
    (tmp_path / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    assert "config.json" in refusal(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    assert "index.json" in refusal(tmp_path)


# -- other kinds


def test_nothing_there_is_said_with_the_path(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.safetensors", what="base_model")
    assert "no weights" in refusal(tmp_path)
    assert "zero byte" in refusal("a\0b")
    (tmp_path / "x.safetensors").symlink_to(tmp_path / "nowhere")
    assert "does not exist" in refusal(tmp_path)
    assert "known are .safetensors" in refusal(Path(__file__))
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "neither a file nor a folder" in refusal(tmp_path / "pipe.safetensors")


@pytest.mark.parametrize("suffix", ["gguf", "onnx", "h5", "msgpack"])
def test_other_formats_are_refused_as_a_file_and_in_a_folder(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(b"1234567890")
    assert "convert to safetensors first" in refusal(path)
    assert "convert to safetensors first" in refusal(tmp_path)


def test_a_pointer_of_git_lfs_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    assert "git lfs pull" in refusal(tmp_path)


def test_an_adapter_alone_is_refused_with_the_form_to_write(tmp_path: Path) -> None:
    write(tmp_path / "adapter_model.safetensors", {"lora": torch.ones(2)})
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    message = refusal(tmp_path)
    assert '"org/base"' in message
    assert f'write "org/base+{tmp_path}"' in message


def test_a_pipeline_is_its_components(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert "no component has weights" in refusal(tmp_path)
    write(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", {"x": torch.ones(2)})
    (tmp_path / "scheduler").mkdir()
    with Checkpoint.open(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["unet/x"]
        assert checkpoint.parts["unet"].stem == "diffusion_pytorch_model"
    with Checkpoint.open(tmp_path / "unet") as checkpoint:
        assert list(checkpoint.tensors) == ["x"]


def test_a_sentence_transformers_model_opens_with_its_modules(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]')
    write(tmp_path / "model.safetensors", {"x": torch.ones(2)})
    (tmp_path / "1_Pooling").mkdir()
    with Checkpoint.open(tmp_path) as checkpoint:
        assert "sentence-transformers" in checkpoint.notes[0]
    write(tmp_path / "2_Dense" / "model.safetensors", {"y": torch.ones(2)})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["2_Dense/y", "x"]
        assert list(checkpoint.parts) == ["2_Dense"]


@pytest.mark.parametrize(
    ("name", "dtype", "method"),
    [
        ("l.qweight", torch.int32, "GPTQ or AWQ"), ("l.qzeros", torch.int32, "GPTQ or AWQ"),
        ("l.g_idx", torch.int32, "GPTQ or AWQ"), ("l.SCB", torch.float32, "bitsandbytes"),
        ("l.weight.absmax", torch.float32, "bitsandbytes"), ("l.weight.quant_map", torch.float32, "bitsandbytes"),
        ("l.weight.quant_state.bitsandbytes__nf4", torch.uint8, "bitsandbytes"),
        ("l.weight_scale_inv", torch.float32, "fp8"), ("l.weight_scale", torch.float32, "fp8"),
        ("l.input_scale", torch.float32, "fp8"), ("l.down_proj_blocks", torch.uint8, "mxfp4"),
        ("l.down_proj_scales", torch.uint8, "mxfp4"), ("l.weight_packed", torch.int32, "compressed-tensors"),
    ],
)  # fmt: skip
def test_packed_weights_are_refused_by_each_of_their_signs(
    tmp_path: Path, name: str, dtype: torch.dtype, method: str
) -> None:
    path = write(tmp_path / "model.safetensors", {name: torch.ones(2).to(dtype), "norm": torch.ones(2)})
    message = refusal(path, what="input 2")
    assert message.startswith(f'input 2 ("{path}") is quantised with {method} (first tensor "{name}")')
    with Checkpoint.open(path, allow_quantised=True) as checkpoint:
        assert len(checkpoint.tensors) == 2


def test_a_config_that_says_quantised_is_believed_and_plain_fp8_is_not_quantised(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"l.weight": torch.ones(2).to(torch.float8_e4m3fn)})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.tensors["l.weight"].dtype == "F8_E4M3"
    (tmp_path / "config.json").write_text('{"text_config": {"quantization_config": {"quant_method": "awq"}}}')
    assert "quantised with awq (quantization_config in config.json)" in refusal(tmp_path)


# -- pickles


def test_a_pickle_is_refused_unless_allowed(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        assert "--allow-pickle" in refusal(path)
    with Checkpoint.open(tmp_path, allow_pickle=True) as checkpoint:
        assert checkpoint.read("x") == np.ones(2, np.float32).tobytes()


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "module", "net", "ema", ""])
def test_a_pickle_is_unwrapped_by_one_level_and_one_prefix(tmp_path: Path, wrapper: str) -> None:
    tensors = {f"_orig_mod.module.{name}": value for name, value in some_tensors().items()}
    extra = {"epoch": 3, "optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(3)}}}}
    path = tmp_path / "x.pt"
    torch.save({wrapper: tensors, **extra} if wrapper else {**tensors, **extra}, path)
    with Checkpoint.open(path, allow_pickle=True) as checkpoint:
        assert list(checkpoint.tensors) == sorted(some_tensors())
        assert checkpoint.tensors["b.weight"].dtype == "BF16"
        assert any("optimizer state ignored" in note for note in checkpoint.notes)
        assert any('prefix "_orig_mod.module."' in note for note in checkpoint.notes)
        pickled = checkpoint.quick_digest(), checkpoint.content_digest()
    with Checkpoint.open(write(tmp_path / "x.safetensors", some_tensors())) as checkpoint:
        assert (checkpoint.quick_digest(), checkpoint.content_digest()) == pickled


def test_several_parts_of_a_pickle_have_to_be_chosen_from(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"model": {"x": torch.ones(1)}, "ema": {"x": torch.zeros(1)}, "teacher": {"x": torch.ones(1)}}, path)
    assert '"model", "ema"; choose with FILE#key' in refusal(path, allow_pickle=True)
    with Checkpoint.open(f"{path}#ema", allow_pickle=True) as checkpoint:
        assert checkpoint.read("x") == bytes(4)
        assert checkpoint.path == path
    with Checkpoint.open(f"{path}#teacher", allow_pickle=True) as checkpoint:
        assert len(checkpoint.tensors) == 1
    assert 'no part "net" with tensors; choose one of "model"' in refusal(f"{path}#net", allow_pickle=True)


def test_aliases_strided_and_old_pickles_give_the_right_bytes(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.float32).view(3, 4)
    state = {"a": base, "b": base, "transposed": base.T, "row": base[1], "step": base[:, ::2]}
    for name, new in (("new.pt", True), ("old.pt", False)):
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=new)
        with Checkpoint.open(tmp_path / name, allow_pickle=True) as checkpoint:
            assert checkpoint.aliases == {"b": "a"}
            assert any("old pickle format" in note for note in checkpoint.notes) is not new
            for key, tensor in state.items():
                assert checkpoint.read(key) == tensor.contiguous().numpy().tobytes()
                part = bytearray(8)
                checkpoint.read_into(checkpoint.tensors[key], 4, memoryview(part))
                assert part == tensor.contiguous().numpy().tobytes()[4:12]


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"x": torch.ones(1), "trap": Trap()}, tmp_path / "x.pt")
    assert "cannot read it as data only" in refusal(tmp_path / "x.pt", allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04" + bytes(50), b"\x80\x02}q\x00."])
def test_a_damaged_pickle_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    refusal(tmp_path / "x.pt", allow_pickle=True)


def test_pickles_of_other_things_are_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save([torch.ones(1)], path)
    assert "holds a list" in refusal(path, allow_pickle=True)
    torch.save({"epoch": 1}, path)
    assert "no tensors at its top level" in refusal(path, allow_pickle=True)
    torch.save({"x": torch.ones(1, dtype=torch.complex128)}, path)
    assert "complex128" in refusal(path, allow_pickle=True)
    torch.save({"x": torch.zeros(1).expand(10**10)}, path)
    assert "expanded" in refusal(path, allow_pickle=True)


def test_an_indexed_pickle_folder_is_read(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "a.bin")
    torch.save({"y": torch.zeros(2)}, tmp_path / "b.bin")
    torch.save({"unrelated": 1}, tmp_path / "training_args.bin")
    index = {"weight_map": {"x": "a.bin", "y": "b.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert "--allow-pickle" in refusal(tmp_path)
    with Checkpoint.open(tmp_path, allow_pickle=True) as checkpoint:
        assert list(checkpoint.tensors) == ["x", "y"]


# -- messages and real files


def test_words_in_messages_stay_on_one_line_and_short() -> None:
    for text in ("a\nb", "a\u2028b", "x" * 10_000, "\ud800", 'say "x"'):
        assert len(quoted(text).splitlines()) == 1
        assert len(quoted(text)) < 220
    assert quoted("größe") == '"größe"'
    assert [shown(value) for value in (None, True, 1.5, [1, "a"], {"a": 1}, "x")] == [
        "null", "true", "1.5", '[1, "a"]', "an object of 1 keys", '"x"'
    ]  # fmt: skip
    assert shown(2**300) == "a number of 301 bits"
    assert len(shown([list(range(100))] * 100)) < 800


def test_real_checkpoints_open_and_agree_with_safetensors() -> None:
    if not REAL.is_dir():
        pytest.skip(f"the folder of real checkpoints, {REAL.name}, is not on this machine")
    files = sorted(REAL.rglob("*.safetensors"))
    assert files
    for file in files:
        with Checkpoint.open(file) as checkpoint:
            expected = safetensors.torch.load_file(file)
            loaded = load_torch(checkpoint)
            assert loaded.keys() == expected.keys()
            assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
