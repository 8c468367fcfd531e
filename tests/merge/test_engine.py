"""One formula on two executors, and the same bits for every way of cutting the work into pieces."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from graftwork.merge.engine import COMPILED_MODELS
from graftwork.merge.kernels import kernel
from graftwork.merge.memory import merge_arrays, program_of
from graftwork.merge.methods.registry import get
from graftwork.merge.passes import (
    Apply,
    ApplyMatrix,
    ApplyRows,
    Cut,
    Gram,
    Group,
    PerElement,
    RowTable,
    Select,
    Streams,
)
from tests.contract.table import ROWS, values_of, words_of
from tests.reference import excess, random_words, reference, ulp

SHAPE = (300, 171)
GENERATOR = np.random.default_rng(23)
BASE = GENERATOR.normal(size=SHAPE).astype(np.float32)
COMMON = GENERATOR.normal(size=SHAPE) * 0.1
MODELS = [(BASE + COMMON + GENERATOR.normal(size=SHAPE) * size).astype(np.float32) for size in (0.2, 0.1, 0.3)]


# ---------------------------------------------------------------- formulas, evaluated by torch


class Eager:
    """Executes a method's passes with torch, on whole tensors, in the plainest way."""

    def __init__(self, method, models, base, parameters):
        self.models, self.base = models, base
        self.shape, self.count = models[0].shape, models[0].size
        self.group = Group(
            "tensor", self.shape, self.count, len(models), base is not None, False, tuple(range(len(models)))
        )
        self.last = self.run(program_of(get(method), len(models), parameters)(self.group))

    def run(self, program):
        if not hasattr(program, "send"):
            return program
        answer = None
        while True:
            try:
                request = program.send(answer)
            except StopIteration as finished:
                return finished.value
            answer = self.answer(request)

    def answer(self, request):
        if isinstance(request, RowTable):
            columns = self.shape[-1]
            models = np.stack(self.models).astype(np.float64).reshape(len(self.models), -1, columns)
            return np.asarray(request.function(models, self.base.astype(np.float64).reshape(-1, columns)))
        if isinstance(request, Select):
            scores = self.evaluate(request.scores, request.parameters, torch.float64, request.each)
            return tuple(
                tuple(self.cut(score.numpy(), rank, request.wide) for rank in ranks)
                for score, ranks in zip(scores, request.ranks, strict=True)
            )
        formula = request.vectors if isinstance(request, Gram) else request.terms
        terms = self.evaluate(formula, request.parameters, torch.float64, request.each)
        rows = np.stack([term.numpy().astype(np.longdouble) for term in terms])
        return np.asarray(rows @ rows.T if isinstance(request, Gram) else rows.sum(1), np.float64)

    @staticmethod
    def cut(score, rank, wide):
        if rank <= 0:
            return Cut(math.nan, -1, wide)
        last = np.argsort(-score, kind="stable")[rank - 1]
        return Cut(float(score[last]), int(last), wide)

    def output(self):
        request = self.last
        if isinstance(request, Apply):
            precision = getattr(torch, request.precision)
            value = self.evaluate(request.formula, request.parameters, precision, each=False)
            return value.to(torch.float32).numpy().reshape(self.shape)
        assert isinstance(request, ApplyRows | ApplyMatrix)
        base = None if self.base is None else self.base.astype(np.float64)
        stack = np.stack(self.models).astype(np.float64)
        return np.asarray(request.function(stack, base, 0, **request.parameters)).astype(np.float32)

    def evaluate(self, formula, parameters, dtype, each):
        """Return the formula's value, or its tuple of values, over the whole tensor.

        Thresholds change behind the index of a cut, so the elements before and after it are evaluated apart.
        """
        borders = sorted({0, self.count, *(cut.index + 1 for cut in cuts_of(parameters) if cut.index >= 0)})
        pieces = [self.piece(formula, parameters, dtype, each, start, stop) for start, stop in pairwise(borders)]
        if isinstance(pieces[0], tuple):
            return tuple(torch.cat(column) for column in zip(*pieces, strict=True))
        return torch.cat(pieces)

    def piece(self, formula, parameters, dtype, each, start, stop):
        def part(array):
            return torch.from_numpy(np.ascontiguousarray(array).reshape(-1)[start:stop].copy())

        models = tuple(part(model).to(dtype) for model in self.models)
        base = models[0] if self.base is None else part(self.base).to(dtype)
        index = torch.arange(start, stop)

        def one(value):
            """Numbers are rounded to the precision of the pass, unless they have a type of their own."""
            if isinstance(value, Cut):
                return value.threshold(start)
            if isinstance(value, np.ndarray):
                return torch.from_numpy(value)
            if isinstance(value, np.generic):
                return value if "like" in parameters else value.item()
            return float(np.float32(value)) if isinstance(value, float) and dtype == torch.float32 else value

        given = {}
        for name, value in parameters.items():
            if isinstance(value, Streams):
                words = [random_words(key, self.count).astype(np.int64) for key in value.keys]
                given[name] = tuple(part(column) for column in words)
            elif isinstance(value, PerElement):
                below = None if self.base is None else self.base
                made = np.stack(value.function(np.stack(self.models), below, 0, **value.parameters))
                made = made.astype(np.int64) if made.dtype.kind in "iu" else made
                given[name] = tuple(part(column) for column in made)
            else:
                given[name] = tuple(one(item) for item in value) if isinstance(value, tuple) else one(value)
        if not each:
            return formula(models, base, index, **given)
        found = ()
        for number, model in enumerate(models):
            own = {name: value[number] if isinstance(value, tuple) else value for name, value in given.items()}
            found += formula(model, models, base, index, **own)
        return found


def cuts_of(parameters):
    for value in parameters.values():
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Cut):
                yield item


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_a_formula_means_the_same_compiled_and_on_tensors(row):
    models = MODELS[: row.models]
    base = BASE if row.base else None
    eager = Eager(row.method, models, base, row.parameters).output()
    compiled = merge_arrays(
        row.method,
        [{"tensor": ("F32", model)} for model in models],
        None if base is None else {"tensor": ("F32", base)},
        parameters=row.parameters,
    )["tensor"]
    different = compiled != eager
    assert np.count_nonzero(different) <= 1e-4 * compiled.size
    assert np.all(np.abs(compiled.astype(np.float64) - eager) <= ulp(eager, "F32"))


@pytest.mark.parametrize(
    ("method", "parameters"), [("linear", {"weight": 1.0}), ("ties", {"weight": 1.0, "density": 0.4})]
)
def test_many_models_are_merged_without_compiling_for_their_number(method, parameters):
    generator = np.random.default_rng(12)
    count = COMPILED_MODELS + 8
    models = generator.normal(size=(count, 40, 50)).astype(np.float32)
    base = generator.normal(size=(40, 50)).astype(np.float32)
    below = None if method == "linear" else base
    compiled = kernel.cache_info().misses
    found = merge_arrays(
        method, [{"t": ("F32", model)} for model in models], below if below is None else {"t": ("F32", below)},
        parameters=parameters,
    )["t"]  # fmt: skip
    assert kernel.cache_info().misses == compiled
    each = {name: (value,) * count for name, value in parameters.items()}
    wide = None if below is None else below.astype(np.float64)
    wanted = reference(method, wide, list(models.astype(np.float64)), **each)
    assert excess(wanted, found.astype(np.float64), "F32") <= 1


# ---------------------------------------------------------------- the same bits

CUTS = ((65_536, 1), (131_072, 2), (65_536, 8))


def bytes_of(row, dtype, inputs, **options):
    models = inputs[: row.models]
    base = {name: (dtype, words) for name, words in inputs[-1].items()}
    output = merge_arrays(
        row.method,
        [{name: (dtype, words) for name, words in model.items()} for model in models],
        base if row.base else None,
        parameters=row.parameters,
        **options,
    )
    return {name: words.tobytes() for name, words in output.items()}


def several_tensors(dtype):
    """Return words of three models and a base: a tensor of several spans, and small ones."""
    generator = np.random.default_rng(29)
    shapes = {"big": (5, 60_001), "small": (33, 7), "one": (1,), "image": (6, 5, 3, 3), "tall": (7_001, 2)}
    base = {name: generator.normal(size=shape) * 0.02 for name, shape in shapes.items()}
    models = [
        {name: values + generator.normal(size=values.shape) * 1e-3 for name, values in base.items()} for _ in range(3)
    ]
    return [{name: words_of(values, dtype) for name, values in tensors.items()} for tensors in (*models, base)]


BF16 = several_tensors("BF16")


@pytest.mark.parametrize("row", [row for row in ROWS if "published" not in row.label], ids=lambda row: row.label)
def test_neither_threads_nor_the_size_of_pieces_change_a_bit(row):
    expected = bytes_of(row, "BF16", BF16)
    for span, threads in CUTS:
        assert bytes_of(row, "BF16", BF16, span=span, threads=threads) == expected


FUSED = ("linear", "ties", "dare_linear", "della", "karcher")


@pytest.mark.parametrize("row", [row for row in ROWS if row.label in FUSED], ids=lambda row: row.label)
@pytest.mark.parametrize("dtype", ["BF16"])
def test_kernels_for_the_dtypes_at_hand_give_the_same_bits(row, dtype):
    expected = bytes_of(row, dtype, BF16)
    assert bytes_of(row, dtype, BF16, span=65_536, threads=2, fuse=True) == expected


def test_the_dtype_of_the_output_is_the_smallest_that_holds_every_input():
    values = np.array([0.5, 1.5])
    for first, second, wanted in (
        ("BF16", "BF16", "BF16"), ("BF16", "F16", "F32"), ("F16", "F32", "F32"), ("F32", "F64", "F64"),
        ("F8_E4M3", "F8_E5M2", "F16"), ("F8_E4M3", "BF16", "BF16"),
    ):  # fmt: skip
        stored = [{"t": (dtype, words_of(values, dtype))} for dtype in (first, second)]
        output = merge_arrays("linear", stored, parameters={"weight": 1.0})["t"]
        assert values_of(output, wanted).tolist() == [0.5, 1.5]
