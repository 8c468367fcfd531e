"""NaN and infinities: which tensor, which model, which element; what may pass, and what may not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from graftwork.merge.engine import Engine, Input, Step
from graftwork.merge.errors import DataError
from graftwork.merge.memory import MemoryCheckpoint, MemorySink, merge_arrays, program_of
from graftwork.merge.methods.registry import get, names
from tests.contract.table import ROWS, values_of, words_of

FIRST = {row.method: row for row in reversed(ROWS)}  # the first row of every method
BAD = (math.nan, math.inf, -math.inf)

WITHOUT_FILES = [name for name in names() if not (get(name).statistics or get(name).shared)]
"""Methods that read files beside the models have tests of their own."""


def run(row, inputs, dtype, *, allow=False, out=None, labels=None):
    """Merge tensors called `layer.weight`, the base last, with `allow_nonfinite`."""
    models = len(inputs) - (1 if row.base else 0)
    readers = [MemoryCheckpoint({"layer.weight": (dtype, words_of(values, dtype))}) for values in inputs]
    tensors = tuple(Input(number, reader.tensors["layer.weight"]) for number, reader in enumerate(readers))
    method = get(row.method)
    step = Step(
        name="layer.weight", dtype=out or dtype, shape=inputs[0].shape, models=tensors[:models],
        base=tensors[-1] if row.base else None, program=program_of(method, models, row.parameters), kind=method.kind,
        streams=tuple(range(models)), group="all" if "model" in row.parameters.values() else "",
    )  # fmt: skip
    sink = MemorySink([step])
    labels = labels or [f"site {number}" for number in range(len(inputs))]
    Engine(readers, sink, labels, allow_nonfinite=allow).run([step])
    return values_of(sink.words["layer.weight"], out or dtype)


def some(row, size, value=None, holder=0, place=0):
    generator = np.random.default_rng(31)
    base = generator.normal(size=size)
    inputs = [base + generator.normal(size=size) / 10 for _ in range(row.models)] + ([base] if row.base else [])
    if value is not None:
        inputs[holder][place] = value
    return inputs


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
@pytest.mark.parametrize("method", WITHOUT_FILES)
def test_a_value_that_is_not_finite_is_named(method, dtype):
    row = FIRST[method]
    for holder in {0, row.models - 1 + int(row.base)}:
        with pytest.raises(DataError) as caught:
            run(row, some(row, 700, math.nan, holder, 613), dtype)
        (line,) = caught.value.problems
        assert line.startswith(f'cannot merge "layer.weight": site {holder} has nan at flat index 613; ')


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64", "F8_E5M2"])
def test_infinities_count_in_every_dtype(dtype, value):
    with pytest.raises(DataError, match=rf"site 1 has {value} at flat index 3; use --allow-nonfinite"):
        run(FIRST["linear"], some(FIRST["linear"], 9, value, 1, 3), dtype)


@pytest.mark.parametrize("place", [0, 65_535, 65_536, 262_143, 262_144, 300_000])
def test_the_flat_index_counts_over_blocks_and_spans(place):
    for method in ("linear", "ties", "karcher"):
        row = FIRST[method]
        with pytest.raises(DataError, match=f"flat index {place};"):
            run(row, some(row, 300_001, math.nan, 2, place), "F32")


SCALED_BY_SUMS = ("dare_linear", "dare_ties")  # unless the recipe says `rescale: density`
ELEMENTWISE = [name for name in WITHOUT_FILES if get(name).kind == "elementwise" and name not in SCALED_BY_SUMS]
STRICT = [name for name in WITHOUT_FILES if name not in ELEMENTWISE]


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_elementwise_methods_may_pass_such_values_on(method):
    """Only the elements that hold them are touched."""
    row = FIRST[method]
    clean = run(row, some(row, 50), "F32")
    passed = run(row, some(row, 50, math.nan, 0, 7), "F32", allow=True)
    others = np.arange(50) != 7
    assert np.array_equal(passed[others], clean[others])
    if method in ("linear", "passthrough", "task_arithmetic"):
        assert math.isnan(passed[7])


@pytest.mark.parametrize("method", STRICT)
def test_other_methods_refuse_them_all_the_same(method):
    row = FIRST[method]
    with pytest.raises(DataError, match=r"flat index 7; this method needs finite values; leave the tensor out"):
        run(row, some(row, 50, math.inf, 0, 7), "F32", allow=True)


def test_a_result_that_does_not_fit_its_dtype_is_reported():
    inputs = [np.array([1.0, 60_000.0, 3.0])] * 2
    row = FIRST["linear"]
    models = [{"layer.weight": ("F32", values.astype(np.float32))} for values in inputs]
    double = {"weight": 1.0, "normalize": False}
    with pytest.raises(DataError) as caught:
        merge_arrays(row.method, models, dtype="F16", parameters=double)
    (line,) = caught.value.problems
    assert line.startswith('cannot write "layer.weight": the result at flat index 1 does not fit F16; use a wider')
    assert merge_arrays(row.method, models, dtype="F32", parameters=double)["layer.weight"][1] == 120_000


@pytest.mark.parametrize(("dtype", "largest"), [("F8_E4M3", 448.0), ("F8_E5M2", 57_344.0), ("F16", 65_504.0)])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_largest_number_still_fits_and_the_next_does_not(dtype, largest, threads):
    def merge(value):
        stored = [{"t": ("F32", np.full(70_000, value, np.float32))}]
        return merge_arrays("passthrough", stored, dtype=dtype, parameters={"scale": 1.0}, threads=threads)["t"]

    assert values_of(merge(largest), dtype)[0] == largest
    with pytest.raises(DataError, match=f"does not fit {dtype}"):
        merge(largest * 1.25)


def test_an_error_in_one_of_many_tensors_stops_all_threads():
    good = {f"t{number:03}": ("F32", np.ones(1000, np.float32)) for number in range(200)}
    bad = {**good, "t150": ("F32", np.full(1000, np.nan, np.float32))}
    with pytest.raises(DataError, match='cannot merge "t150": model 1 has nan at flat index 0'):
        merge_arrays("linear", [good, bad], parameters={"weight": 1.0}, threads=4)
