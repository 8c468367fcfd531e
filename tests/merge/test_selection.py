"""The exact cut: equal to a full stable sort, place by place, whatever the values, sizes and threads are.

With zeros for the base and one model of weight 1, the result of `ties` is the model where its mask is 1: one sees it.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from graftwork.merge.memory import merge_arrays
from tests.contract.table import values_of, words_of
from tests.reference import top

SPAN = 262_144
DENSITIES = ("one", 0.2, 0.5, 0.999)


def share_of(density, size):
    return 1.0 / size if density == "one" else density


def expected_mask(values, density):
    """Return the mask of a stable sort of float32 magnitudes."""
    flat = np.abs(values.reshape(-1)).astype(np.float32)
    return top(flat, max(1, math.floor(density * flat.size)))[0]


def kept(values, dtype, density, **options):
    """Return which entries `ties` keeps, magnitudes moved off zero so that all can be seen."""
    output = merge_arrays(
        "ties",
        [{"tensor": (dtype, words_of(values, dtype))}],
        {"tensor": (dtype, words_of(np.zeros(values.shape), dtype))},
        parameters={"weight": 1.0, "density": density},
        **options,
    )["tensor"]
    return values_of(output, dtype) != 0


def make(kind, size):
    generator = np.random.default_rng(len(kind) + size)
    signs = np.where(generator.random(size) < 0.5, -1.0, 1.0)
    if kind == "normal":
        return generator.normal(size=size) + 1e-30
    if kind == "constant":
        return np.full(size, 0.75) * signs
    if kind == "grid":
        return signs * generator.integers(1, 12, size) / 16
    if kind == "mostly_equal":
        return signs * np.where(generator.random(size) < 0.02, generator.random(size) + 1, 0.5)
    if kind == "rising":
        return np.linspace(1e-6, 1, size)
    if kind == "falling":
        return np.linspace(1, 1e-6, size)
    if kind == "late":  # the sample's runs see almost only small numbers, the cut lies among the others
        values = generator.random(size) * 1e-3 + 1e-6
        runs = max(1, round(65_536 / 1024))
        seen = np.zeros(size, bool)
        for run in range(runs):
            first = run * size // runs
            seen[first : first + 1024] = True
        return np.where(seen, values, values + 100)
    if kind == "wide":
        return signs * 2.0 ** generator.uniform(-100, 100, size)
    raise ValueError(kind)


KINDS = ("normal", "constant", "grid", "mostly_equal", "rising", "falling", "late", "wide")


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 5, 3001, SPAN - 1, SPAN + 1])
def test_the_mask_is_that_of_a_stable_sort(kind, size, density):
    values = values_of(words_of(make(kind, size), "F32"), "F32")
    share = share_of(density, size)
    assert np.array_equal(kept(values, "F32", share), expected_mask(values, share))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_more_than_a_million_entries_need_no_more_luck(kind, threads):
    values = values_of(words_of(make(kind, 1_100_003), "F32"), "F32")
    for density in (1 / values.size, 0.5):
        found = kept(values, "F32", density, threads=threads)
        assert np.array_equal(found, expected_mask(values, density))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("kind", ["normal", "grid", "falling"])
@pytest.mark.parametrize("size", [5, SPAN, 5 * 65_536 + 77])
def test_sixteen_bit_inputs_have_many_equals(kind, size, dtype):
    values = values_of(words_of(make(kind, size) + 2.0**-14, dtype), dtype)
    assert np.unique(np.abs(values)).size < 65_536
    for density in (1 / size, 0.2, 0.5, 0.999):
        assert np.array_equal(kept(values, dtype, density, span=65_536), expected_mask(values, density))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_differences_are_ranked_and_not_values(dtype):
    """Differences of 16-bit numbers are no 16-bit numbers; their scores are rounded once to float32."""
    generator = np.random.default_rng(2)
    size = SPAN + 12_345
    base = values_of(words_of(generator.normal(size=size) * 0.02, dtype), dtype)
    model = values_of(words_of(base + generator.normal(size=size) * 5e-4, dtype), dtype)
    change = (model.astype(np.float32) - base.astype(np.float32)).astype(np.float64)
    output = merge_arrays(
        "ties", [{"tensor": (dtype, words_of(model, dtype))}], {"tensor": (dtype, words_of(base, dtype))},
        parameters={"weight": 1.0, "density": 0.5}, dtype="F32",
    )["tensor"]  # fmt: skip
    mask = expected_mask(change, 0.5)
    differs = model != base
    assert np.array_equal(output[differs] != base[differs].astype(np.float32), mask[differs])


@pytest.mark.parametrize("span", [65_536, 131_072, SPAN])
def test_mostly_zero_changes_keep_the_first_zeros(span):
    """With fewer changed entries than places, the rest go to the zeros of lowest index: all changes are kept."""
    generator = np.random.default_rng(4)
    values = np.where(generator.random(400_001) < 0.01, generator.normal(size=400_001), 0)
    values = values_of(words_of(values, "F32"), "F32")
    assert np.array_equal(kept(values, "F32", 0.2, span=span), values != 0)
    assert np.array_equal(kept(values, "F32", 0.005, span=span), expected_mask(values, 0.005))


@pytest.mark.parametrize("kind", ["normal", "grid", "late"])
@pytest.mark.parametrize("span", [65_536, SPAN])
def test_a_band_between_two_cuts_is_exact(kind, span):
    """breadcrumbs has two cuts per model, and each model its own pair."""
    size = 300_007
    stack = [values_of(words_of(np.roll(make(kind, size), 1000 * shift), "F32"), "F32") for shift in range(3)]
    density, gamma = (0.5, 0.2, 0.9), (0.1, 0.0, 0.05)
    for number in range(3):
        weight = tuple(float(number == other) for other in range(3))
        output = merge_arrays(
            "breadcrumbs", [{"t": ("F32", model.astype(np.float32))} for model in stack],
            {"t": ("F32", np.zeros(size, np.float32))}, span=span,
            parameters={"weight": weight, "density": density, "gamma": gamma},
        )["t"]  # fmt: skip
        flat = np.abs(stack[number]).astype(np.float32)
        count = math.floor(density[number] * size)
        dropped = min(math.floor(gamma[number] * size), size - count)
        mask = top(flat, dropped + count)[0] & ~top(flat, dropped)[0]
        assert np.array_equal(output != 0, mask)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["normal", "grid", "constant"])
def test_over_the_whole_model_tensors_follow_each_other_by_name(kind, threads):
    sizes = {"b.weight": 200_001, "a.bias": 17, "c": 300_002, "a.weight": 65_536}
    model = {name: make(kind, size).astype(np.float32) for name, size in sizes.items()}
    output = merge_arrays(
        "ties",
        [{name: ("F32", values) for name, values in model.items()}],
        {name: ("F32", np.zeros_like(values)) for name, values in model.items()},
        parameters={"weight": 1.0, "density": 0.3, "scope": "model"},
        threads=threads,
    )
    names = sorted(sizes)
    whole = np.concatenate([model[name] for name in names]).astype(np.float64)
    mask = expected_mask(whole, 0.3)
    assert np.array_equal(np.concatenate([output[name] for name in names]) != 0, mask)


@pytest.mark.parametrize("size", [4001, SPAN + 4001])
def test_float64_inputs_are_ranked_in_float64(size):
    """Scores that float32 could not tell apart."""
    values = 1 + np.random.default_rng(5).permutation(size) * 2.0**-50
    output = merge_arrays(
        "ties", [{"t": ("F64", values)}], {"t": ("F64", np.zeros(size))}, parameters={"weight": 1.0, "density": 0.5}
    )["t"]
    assert np.array_equal(output != 0, top(values, size // 2)[0])


@pytest.mark.parametrize("size", [4001, SPAN + 4001])
@pytest.mark.parametrize("kind", ["normal", "few", "equal"])
def test_sce_selects_by_variance_and_counts_what_varies(kind, size):
    generator = np.random.default_rng(6)
    models = [generator.normal(size=size) + 3 for _ in range(3)]
    if kind == "few":
        models = [generator.integers(1, 12, size) / 16 for _ in range(3)]
    if kind == "equal":  # a variance of exactly zero, for numbers that thirds do not represent
        models = [np.where(np.arange(size) % 3 == 0, models[0], model) for model in models]
    models = [values_of(words_of(model, "BF16"), "BF16") for model in models]
    output = merge_arrays(
        "sce", [{"t": ("BF16", words_of(model, "BF16"))} for model in models],
        {"t": ("BF16", words_of(np.zeros(size), "BF16"))}, parameters={"select_topk": 0.5}, dtype="F32",
    )["t"]  # fmt: skip
    mean = (models[0] + models[1] + models[2]) / 3
    variance = sum((model - mean) ** 2 for model in models) / 3
    score = variance.astype(np.float32)
    mask = top(score, math.floor(0.5 * np.count_nonzero(score)))[0]
    assert np.array_equal(output != 0, mask)


@pytest.mark.parametrize("size", [1, 5, 4001, SPAN + 4001])
def test_quartiles_of_arcee_fusion_are_exact(size):
    """One row per tensor: the score is |d| times one number, so its quartiles are those of |d|."""
    generator = np.random.default_rng(8)
    base = values_of(words_of(generator.normal(size=size), "F32"), "F32")
    model = values_of(words_of(base + generator.normal(size=size) ** 3 * 0.01, "F32"), "F32")
    stored = [{"t": ("F32", words_of(values, "F32"))} for values in (model, base)]
    output = merge_arrays("arcee_fusion", stored[:1], stored[1])
    change = np.abs(model - base)
    ordered = np.sort(change)
    first, median, third = (ordered[math.floor(share * (size - 1))] for share in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (third - first)
    clear = np.abs(change - threshold) > 2.0**-30 * threshold
    expected = np.where(change >= threshold, model, base)
    if size == 1:
        expected, clear = model, np.ones(1, bool)
    assert np.array_equal(output["t"][clear], expected[clear].astype(np.float32))
