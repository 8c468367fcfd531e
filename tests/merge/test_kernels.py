"""Codecs over every word and over hard values, the random words, and the cache of compiled kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from graftwork.merge import dtypes, kernels
from tests.reference import random_words, rounded, stream_key

EIGHT_AND_SIXTEEN = ("F8_E4M3", "F8_E5M2", "BF16", "F16")
WIDE = {"float32": np.float32, "float64": np.float64}


def every_word(dtype):
    raw = dtypes.RAW[dtype]
    return np.arange(1 << 8 * raw.itemsize, dtype=np.uint32).astype(f"u{raw.itemsize}").view(raw)


def by_torch(words, dtype):
    """Return what torch takes raw words for, as float32."""
    same_size = np.int16 if words.dtype.itemsize == 2 else np.uint8
    tensor = torch.from_numpy(words.view(same_size).copy()).view(getattr(torch, dtypes.TORCH_NAMES[dtype]))
    return tensor.to(torch.float32).numpy()


def decoded(words, dtype=np.float32):
    values = np.empty(words.size, dtype)
    return values, kernels.decode(words, values)


def encoded(values, dtype):
    words = np.empty(values.size, dtypes.RAW[dtype])
    return words, kernels.encode(values, words)


def assert_same_numbers(left, right):
    """Equal with the sign of zeros, and NaN where the other is NaN."""
    with np.errstate(invalid="ignore"):  # widening a signalling NaN
        left, right = np.asarray(left).astype(np.float64), np.asarray(right).astype(np.float64)
    assert np.array_equal(np.isnan(left), np.isnan(right))
    known = ~np.isnan(left)
    assert np.array_equal(left[known], right[known])
    assert np.array_equal(np.signbit(left[known]), np.signbit(right[known]))


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("dtype", EIGHT_AND_SIXTEEN)
def test_every_word_is_read_as_torch_reads_it(dtype, wide):
    words = every_word(dtype)
    values, _ = decoded(words, WIDE[wide])
    assert values.dtype == WIDE[wide]
    assert_same_numbers(values, by_torch(words, dtype))


@pytest.mark.parametrize("dtype", EIGHT_AND_SIXTEEN)
def test_words_that_are_not_finite_are_noticed_one_by_one(dtype):
    words = every_word(dtype)
    finite = np.isfinite(by_torch(words, dtype))
    assert 0 < np.count_nonzero(~finite) < words.size
    assert decoded(words[finite])[1] == 0
    odd = words[~finite]
    for word in odd if odd.size < 300 else odd[:: odd.size // 150]:
        assert decoded(np.array([words[finite][0], word]))[1] == 1


@pytest.mark.parametrize("dtype", ["F32", "F64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_wide_values_that_are_not_finite_are_noticed(dtype, value):
    words = np.zeros(9, dtypes.RAW[dtype])
    assert decoded(words, words.dtype)[1] == 0
    words[7] = value
    assert decoded(words, words.dtype)[1] == 1


# ---------------------------------------------------------------- writing


def hard_values(dtype, kind):
    """Return values of every magnitude, all ties between neighbours of `dtype`, and what lies just beside them."""
    generator = np.random.default_rng(7)
    neighbours = np.zeros(0)
    if dtype in EIGHT_AND_SIXTEEN:
        values = by_torch(every_word(dtype), dtype)
        neighbours = np.unique(values[np.isfinite(values)]).astype(np.float64)
    ties = (neighbours[:-1] + neighbours[1:]) / 2
    largest = float(np.finfo(kind).max)
    with np.errstate(over="ignore"):
        beside = [np.nextafter(ties.astype(kind), kind(np.inf)), np.nextafter(ties.astype(kind), kind(-np.inf))]
        spread = (generator.normal(size=20_000) * 2.0 ** generator.integers(-160, 128, size=20_000)).astype(kind)
        usual = (generator.normal(size=20_000) * 10.0 ** generator.integers(-9, 5, size=20_000)).astype(kind)
    edges = np.array([0.0, -0.0, largest, -largest, np.finfo(kind).tiny, np.finfo(kind).smallest_subnormal], kind)
    top = neighbours[-1:] * (1 + 2.0 ** -np.arange(1.0, 20)) if neighbours.size else np.zeros(0)
    found = [neighbours, ties, *beside, spread, usual, edges, top, -top]
    values = np.concatenate([np.asarray(part, np.float64) for part in found])
    with np.errstate(over="ignore"):
        values = values.astype(kind)
    return values[np.isfinite(values)]


@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "BF16", "F16", "F32"])
def test_values_are_rounded_once_to_nearest_even(dtype, wide):
    values = hard_values(dtype, WIDE[wide])
    words, flags = encoded(values, dtype)
    expected = rounded(values.astype(np.float64), dtype)
    assert_same_numbers(decoded(words)[0], expected)
    assert flags == (2 if not np.isfinite(expected).all() else 0)


def test_a_float64_just_above_a_tie_is_rounded_up():
    """By way of float32 it would be a tie, and go down: this is where two roundings differ from one."""
    above = np.array([1 + 2.0**-8 + 2.0**-40, -(1 + 2.0**-8 + 2.0**-40)])
    assert decoded(encoded(above, "BF16")[0])[0].tolist() == [1 + 2.0**-7, -(1 + 2.0**-7)]
    above = np.array([1 + 2.0**-11 + 2.0**-45, 2.0**-25 + 2.0**-60])
    assert decoded(encoded(above, "F16")[0])[0].tolist() == [1 + 2.0**-10, 2.0**-24]
    above = np.array([1 + 2.0**-4 + 2.0**-40])
    assert decoded(encoded(above, "F8_E4M3")[0])[0].tolist() == [1 + 2.0**-3]
    assert decoded(encoded(above / 2 + 2.0**-4, "F8_E5M2")[0])[0].tolist() == [0.625]


@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("dtype", [*EIGHT_AND_SIXTEEN, "F32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_written_as_such_and_reported(dtype, wide, value):
    words, flags = encoded(np.array([1.0, value], WIDE[wide]), dtype)
    back = decoded(words)[0]
    assert flags == 2
    assert back[0] == 1
    assert_same_numbers(back[1:], rounded([np.nan if dtype == "F8_E4M3" else value], dtype))


@pytest.mark.parametrize("dtype", EIGHT_AND_SIXTEEN)
@pytest.mark.parametrize("wide", WIDE)
def test_reading_and_writing_gives_every_number_back(dtype, wide):
    words = every_word(dtype)
    words = words[np.isfinite(by_torch(words, dtype))]
    again, flags = encoded(decoded(words, WIDE[wide])[0], dtype)
    assert flags == 0
    assert again.tobytes() == words.tobytes()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3", "F8_E5M2"])
def test_float32_is_written_as_torch_writes_it(dtype):
    values = hard_values(dtype, np.float32)
    if dtype == "F8_E4M3":  # beyond the largest number, versions of torch differ
        values = values[np.abs(values) <= 448]
    words, _ = encoded(values, dtype)
    theirs = torch.from_numpy(values).to(getattr(torch, dtypes.TORCH_NAMES[dtype])).to(torch.float32).numpy()
    assert_same_numbers(decoded(words)[0], theirs)


# ---------------------------------------------------------------- random words


@pytest.mark.parametrize(("seed", "name", "stream"), [(0, "a", 0), (42, "layer.0.weight", 3), (2**64 - 1, "", 0)])
def test_random_words_are_those_of_the_specification(seed, name, stream):
    key = stream_key(seed, name, stream)
    pairs = np.empty(501, np.uint64)
    kernels.fill_draws(np.uint64(key), 0, pairs)
    assert np.array_equal(pairs.view(np.uint32), random_words(key, 1002).astype(np.uint32))


@pytest.mark.parametrize(
    ("seed", "name", "stream", "element", "word"),
    [
        (0, "model.embed_tokens.weight", 0, 0, 0x854F99CE),
        (0, "model.embed_tokens.weight", 0, 1, 0xAEAA9152),
        (0, "model.embed_tokens.weight", 1, 0, 0x2F9F172A),
        (42, "layer.0.weight", 3, 7, 0x960C6291),
        (42, "layer.0.weight", 3, 8_589_934_597, 0xBD6CE044),
        (2**64 - 1, "", 0, 123_456_789, 0x94EBF091),
    ],
)
def test_random_words_can_be_had_from_any_place(seed, name, stream, element, word):
    for start in (element - element % 2, max(0, element - element % 2 - 64)):
        pairs = np.empty(64, np.uint64)
        kernels.fill_draws(np.uint64(stream_key(seed, name, stream)), start, pairs)
        assert int(pairs.view(np.uint32)[element - start]) == word


# ---------------------------------------------------------------- the cache

MERGE = """
import sys
import numpy as np
from graftwork.merge.memory import merge_arrays
models = [{"a": ("F32", np.arange(4, dtype=np.float32))}, {"a": ("F32", np.ones(4, np.float32))}]
print(merge_arrays("linear", models, parameters={"weight": 1.0})["a"].tolist())
"""


def merge_with_cache(folder: Path) -> str:
    environment = {**os.environ, "GRAFTWORK_CACHE": str(folder)}
    done = subprocess.run([sys.executable, "-c", MERGE], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def test_kernels_are_compiled_once_per_machine_and_no_cache_is_needed(tmp_path):
    expected = "[0.5, 1.0, 1.5, 2.0]\n"
    assert merge_with_cache(tmp_path / "cache") == expected
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert any(path.suffix == ".nbc" for path in made)
    assert merge_with_cache(tmp_path / "cache") == expected
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()} == made
    (tmp_path / "file").write_text("")
    assert merge_with_cache(tmp_path / "file") == expected
