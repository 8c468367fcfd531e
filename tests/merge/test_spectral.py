"""Iso-C, Iso-CTS and TSV-M: closed forms, matrices without rank, what is no matrix, and values that cannot be used."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save_file

from graftwork.merge import load_recipe, make_plan, merge
from graftwork.merge.engine import Engine, Input, Step
from graftwork.merge.errors import DataError
from graftwork.merge.memory import MemoryCheckpoint, MemorySink, merge_arrays, program_of
from graftwork.merge.methods import registry, spectral
from tests.contract.table import merged, words_of

METHODS = ("iso_c", "iso_cts", "tsv_m")
GENERATOR = np.random.default_rng(7)
BASE = GENERATOR.normal(size=(12, 20))
CHANGES = GENERATOR.normal(size=(3, 12, 20)) * 0.1


def change(method, changes, **parameters):
    return merged(method, np.zeros(changes[0].shape), list(changes), parameters)


def orthonormal(rows, columns, seed=1):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0]


def test_iso_c_has_a_flat_spectrum_and_the_nuclear_norm_of_the_sum():
    spectrum = np.linalg.svd(change("iso_c", CHANGES), compute_uv=False)
    assert np.ptp(spectrum) < 1e-14 * spectrum[0] * 12
    assert np.isclose(spectrum.sum(), np.linalg.norm(CHANGES.sum(0), "nuc"), rtol=1e-13)


def test_iso_cts_with_everything_in_common_is_iso_c():
    np.testing.assert_array_equal(change("iso_cts", CHANGES, common_fraction=1.0), change("iso_c", CHANGES))


def test_iso_cts_has_a_flat_spectrum():
    spectrum = np.linalg.svd(change("iso_cts", CHANGES, common_fraction=0.5), compute_uv=False)
    assert np.ptp(spectrum) < 1e-13 * spectrum[0]


def test_iso_cts_with_more_shares_than_singular_values_keeps_its_common_space():
    changes = GENERATOR.normal(size=(8, 12, 20))  # eight tasks, no common space: twelve values are one for each
    assert np.isfinite(change("iso_cts", changes, common_fraction=0.0)).all()
    many = GENERATOR.normal(size=(13, 12, 20))  # not even one for each
    np.testing.assert_array_equal(change("iso_cts", many, common_fraction=0.0), change("iso_c", many))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_tsv_m_adds_task_vectors_that_do_not_interfere(rank):
    left, right = orthonormal(12, 12, 2), orthonormal(20, 12, 3)
    values = GENERATOR.uniform(1, 2, size=(3, rank))
    changes = [
        left[:, 4 * task : 4 * task + rank] * values[task] @ right[:, 4 * task : 4 * task + rank].T for task in range(3)
    ]
    np.testing.assert_allclose(change("tsv_m", changes), sum(changes), atol=1e-13)


def test_tsv_m_of_more_tasks_than_singular_values_keeps_the_first_of_each():
    changes = GENERATOR.normal(size=(4, 3, 5))
    found = change("tsv_m", changes)
    assert np.linalg.norm(found) > 0.1
    assert np.linalg.matrix_rank(found) == 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 200), (200, 3)])
def test_matrices_of_any_shape_merge(method, shape):
    generator = np.random.default_rng(5)
    found = change(method, generator.normal(size=(3, *shape)))
    assert found.shape == shape
    assert np.isfinite(found).all()
    assert found.any()


@pytest.mark.parametrize("method", METHODS)
def test_changes_that_cancel_give_the_base(method):
    parameters = {"common_fraction": 1.0} if method == "iso_cts" else {}
    found = change(method, [CHANGES[0], -CHANGES[0]], **parameters)
    if method == "tsv_m":  # its singular vectors are taken before anything is added
        assert np.isfinite(found).all()
    else:
        assert not found.any()


@pytest.mark.parametrize("method", METHODS)
def test_models_without_a_change_leave_the_base_bit_for_bit(method):
    np.testing.assert_array_equal(merged(method, BASE, [BASE] * 3, {}), BASE)


@pytest.mark.parametrize("method", ["iso_c", "tsv_m"])
def test_null_directions_depend_on_no_routine(method, monkeypatch):
    """Where a matrix lacks rank, which null vectors a routine returns is arbitrary: they must not show."""
    changes = [GENERATOR.normal(size=(12, 2)) @ GENERATOR.normal(size=(2, 20)) for _ in range(2)]
    expected = change(method, changes)
    usual = np.linalg.svd

    def turned(matrix, full_matrices):
        left, values, right = usual(matrix, full_matrices=full_matrices)
        null = values <= 1e-13 * values[0]
        turn = orthonormal(null.sum(), null.sum(), 11)
        left[:, null] = left[:, null] @ turn
        return left, values, right

    monkeypatch.setattr(spectral.np.linalg, "svd", turned)
    np.testing.assert_allclose(change(method, changes), expected, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_routine_that_does_not_converge_has_a_second(method, monkeypatch):
    expected = change(method, CHANGES)

    def fails(*arguments, **options):
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(spectral.np.linalg, "svd", fails)
    np.testing.assert_allclose(change(method, CHANGES), expected, atol=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_matrix_gets_the_mean_change(method):
    for shape in ((), (7,), (4, 3, 2, 2)):
        changes = GENERATOR.normal(size=(3, *shape))
        np.testing.assert_allclose(change(method, changes, scale=2.0), 2 * changes.mean(0), atol=1e-14)
    np.testing.assert_allclose(change(method, CHANGES, decompose=False), CHANGES.mean(0), atol=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_convolutions_are_matrices_of_output_channels_on_request(method):
    kernels = GENERATOR.normal(size=(3, 6, 4, 3, 3))
    found = change(method, kernels, matrix_reshape=True)
    np.testing.assert_allclose(found.reshape(6, 36), change(method, kernels.reshape(3, 6, 36)), atol=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_values_that_are_not_finite_are_named(method):
    for shape in ((4, 4), (16,)):
        broken = np.zeros(shape)
        broken.reshape(-1)[5] = np.nan
        with pytest.raises(DataError, match=r'cannot merge "tensor": model 1 has nan at flat index 5'):
            merged(method, np.zeros(shape), [np.ones(shape), broken], {})


@pytest.mark.parametrize("method", METHODS)
def test_values_whose_sums_overflow_are_named(method):
    with pytest.raises(DataError, match=r'cannot merge "tensor": .* overflow'):
        merged(method, np.zeros((3, 3)), [np.full((3, 3), 1e308)] * 2, {})


def test_a_sum_without_rank_is_remarked_on():
    step = step_of("iso_c", [np.outer(np.arange(1.0, 5), np.ones(6)), np.zeros((4, 6))])
    assert "rank 1 of 4" in step.notes[0]
    assert not step_of("iso_c", CHANGES[:2]).notes
    assert not step_of("tsv_m", [np.outer(np.arange(1.0, 5), np.ones(6)), np.zeros((4, 6))]).notes


def step_of(method, changes):
    stored = [{"tensor": ("F64", words_of(item, "F64"))} for item in (*changes, np.zeros(changes[0].shape))]
    readers = [MemoryCheckpoint(item) for item in stored]
    inputs = tuple(Input(number, reader.tensors["tensor"]) for number, reader in enumerate(readers))
    chosen = registry.get(method)
    program = program_of(chosen, len(changes), {})
    step = Step("tensor", "F64", changes[0].shape, inputs[:-1], inputs[-1], program, chosen.kind)
    Engine(readers, MemorySink([step]), ["a", "b", "base"]).run([step])
    return step


@pytest.mark.parametrize("method", METHODS)
def test_threads_and_the_other_executor_give_the_same_bits(method):
    names = [f"layer.{number}" for number in range(6)]
    base = {name: ("BF16", words_of(BASE, "BF16")) for name in names}
    models = [
        {name: ("BF16", words_of(BASE + item * (n + 1), "BF16")) for n, name in enumerate(names)} for item in CHANGES
    ]
    one = merge_arrays(method, models, base)
    for options in ({"threads": 4}, {"device": "torch:cpu"}, {"span": 65536}):
        other = merge_arrays(method, models, base, **options)
        assert all(np.array_equal(one[name], other[name]) for name in names)


@pytest.mark.parametrize("method", METHODS)
def test_the_estimate_of_memory_holds(method, tmp_path):
    names = ("base", "a", "b", "c", "d")
    for number, name in enumerate(names):
        values = np.random.default_rng(number).normal(size=(300, 260)).astype(np.float32)
        save_file({"weight": values}, tmp_path / f"{name}.safetensors")
    recipe = tmp_path / "recipe.yml"
    models = "".join(f"  - model: {tmp_path / name}.safetensors\n" for name in names[1:])
    recipe.write_text(f"merge_method: {method}\nbase_model: {tmp_path / 'base'}.safetensors\nmodels:\n{models}")
    plan = make_plan(load_recipe(recipe).recipes[0])
    estimate = plan.peak_memory(1)
    plan.close()
    merge(recipe, tmp_path / "warm", threads=1)
    tracemalloc.start()
    try:
        merge(recipe, tmp_path / "out", threads=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0.4 * estimate < peak < 1.2 * estimate
