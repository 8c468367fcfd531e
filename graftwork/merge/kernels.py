"""Compiled loops: codecs over raw words, the fused pass made from a formula, and the reducers.

A kernel is generated for a formula, a number of models and the settings that are the same for every element, then
compiled by numba for the word types at hand, and cached on disk. Everything here releases the GIL.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from numba import njit, types
from numba.extending import intrinsic, overload, register_jitable

from graftwork.merge import vocabulary

BLOCK = 65_536
"""Elements per block of every reduction and digest; results are combined block by block in index order."""

STRIP = 512
"""Elements a reducing kernel evaluates into scratch memory at a time; small enough for the first-level cache."""


def _use_whole_vectors() -> None:
    """Let loops use 512-bit vectors where the processor has them.

    LLVM prefers 256 bits on some processors, for the sake of mixed code; ours are long loops and gain a third.
    """
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("avx512f") and not numba.config.CPU_FEATURES:
        numba.config.CPU_FEATURES = features.flatten() + ",-prefer-256-bit"


_use_whole_vectors()

# Loops over many arrays are vectorised only if the compiler may check more pairs of them for overlap than by default.
llvmlite.binding.set_option("graftwork", "-runtime-memory-check-threshold=256")


def cached(function: Any) -> Any:
    """Return the compiled function, kept on disk where that is possible; a damaged cache is as good as none."""
    try:
        compiled = njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written to
        return njit(nogil=True, error_model="numpy")(function)
    cache = compiled._cache
    load, save = _loader(cache), cache.save_overload

    def load_or_compile(signature: Any, context: Any) -> Any:
        try:
            return load(signature, context)
        except Exception:  # numba raises whatever unpickling does
            with contextlib.suppress(Exception):
                cache.flush()
            return None

    def save_if_possible(*arguments: Any) -> None:
        with contextlib.suppress(OSError):
            save(*arguments)

    cache.load_overload, cache.save_overload = load_or_compile, save_if_possible
    return compiled


def _loader(cache: Any) -> Callable[[Any, Any], Any]:
    """Return what loads machine code from a cache.

    `load_overload` first registers everything that numba could compile, which takes longer than a small merge and
    imports scipy.linalg. Machine code needs none of it but the runtime, and what has to be compiled after all registers
    it then. The shorter way is not public: where a release of numba lacks it, the longer one is taken.
    """
    try:
        from numba.core.runtime import rtsys

        load, initialize = cache._load_overload, rtsys.initialize
    except (ImportError, AttributeError):
        public: Callable[[Any, Any], Any] = cache.load_overload
        return public

    def load_machine_code(signature: Any, context: Any) -> Any:
        initialize(context)
        return load(signature, context)

    return load_machine_code


# ---------------------------------------------------------------- bit casts


def _bitcast(result: Any, argument: Any) -> Any:
    @intrinsic
    def cast(typing_context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(result))

        return result(argument), generate

    return cast


_float32_of_bits = _bitcast(types.float32, types.uint32)
_bits_of_float32 = _bitcast(types.uint32, types.float32)
_float64_of_bits = _bitcast(types.float64, types.uint64)
_bits_of_float64 = _bitcast(types.uint64, types.float64)


# ---------------------------------------------------------------- codecs


def _float8_table(exponent_bits: int, mantissa_bits: int, bias: int, *, infinities: bool) -> np.ndarray[Any, Any]:
    table = np.empty(256, np.float32)
    top = (1 << exponent_bits) - 1
    for word in range(256):
        sign = -1.0 if word & 128 else 1.0
        exponent = word >> mantissa_bits & top
        mantissa = word & ((1 << mantissa_bits) - 1)
        if infinities and exponent == top:
            value = np.nan if mantissa else np.inf
        elif not infinities and exponent == top and mantissa == (1 << mantissa_bits) - 1:
            value = np.nan
        elif exponent == 0:
            value = mantissa * 2.0 ** (1 - bias - mantissa_bits)
        else:
            value = (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)
        table[word] = sign * value
    return table


_E4M3 = _float8_table(4, 3, 7, infinities=False)
_E5M2 = _float8_table(5, 2, 15, infinities=True)


@njit
def _half_to_float32(word: Any) -> Any:
    bits = types.uint32(types.uint16(word))
    magnitude = (bits & types.uint32(0x7FFF)) << types.uint32(13)
    scaled = _float32_of_bits(magnitude) * np.float32(5.192296858534828e33)  # 2^112, the difference of the biases
    unusual = magnitude >= types.uint32(0x7C00 << 13)
    plain = types.uint32(0x7F800000) | magnitude if unusual else _bits_of_float32(scaled)
    return _float32_of_bits(plain | ((bits & types.uint32(0x8000)) << types.uint32(16)))


def load(word: Any) -> Any:
    """Return the value of a raw word (compiled code only); its type says which dtype it is, see `dtypes.RAW`."""
    raise NotImplementedError("only in compiled code")


@overload(load, strict=False)
def _load(word: Any) -> Any:
    if word == types.uint16:
        return lambda word: _float32_of_bits(types.uint32(word) << types.uint32(16))
    if word == types.int16:
        return lambda word: _half_to_float32(word)
    if word == types.uint8:
        return lambda word: _E4M3[word]
    if word == types.int8:
        return lambda word: _E5M2[types.uint8(word)]
    if word in (types.float32, types.float64):
        return lambda word: word
    return None


@njit
def _round_to_odd(value: float) -> Any:
    """Return a float32 from which a further rounding to fewer bits gives what one rounding of `value` would."""
    near = np.float32(value)
    rest = value - np.float64(near)
    bits = _bits_of_float32(near)
    if rest == rest and rest != 0 and near != 0 and (bits & types.uint32(1)) == 0 and abs(rest) < np.inf:
        bits = bits + types.uint32(1) if (rest > 0) == (near > 0) else bits - types.uint32(1)
    return _float32_of_bits(bits)


@njit
def _to_bfloat16(value: Any) -> Any:
    bits = _bits_of_float32(value)
    rounded = (bits + types.uint32(0x7FFF) + ((bits >> types.uint32(16)) & types.uint32(1))) >> types.uint32(16)
    return types.uint16(rounded) if value == value else types.uint16(0x7FC0)


@njit
def _to_small(value: Any, mantissa_bits: int, bias: int, largest: int, nan: int, sign_bit: int) -> Any:
    """Round to nearest even; beyond the largest number comes the next code, which is infinity (NaN for e4m3)."""
    bits = _bits_of_float32(value)
    sign = (bits >> types.uint32(31)) << types.uint32(sign_bit)
    bits = bits & types.uint32(0x7FFFFFFF)
    magnitude = _float32_of_bits(bits)
    shift = types.uint32(23 - mantissa_bits)
    unit = _float32_of_bits(types.uint32((127 + bias - 1 + mantissa_bits) << 23))
    tiny = types.uint32((magnitude * unit + np.float32(8388608.0)) - np.float32(8388608.0))
    rounded = (
        bits + (types.uint32(1) << (shift - types.uint32(1))) - types.uint32(1) + ((bits >> shift) & types.uint32(1))
    )
    normal = min((rounded >> shift) - types.uint32((127 - bias) << mantissa_bits), types.uint32(largest + 1))
    code = tiny if bits < types.uint32((127 - bias + 1) << 23) else types.uint32(normal)
    return sign | (code if magnitude == magnitude else types.uint32(nan))


def store(value: Any, like: Any) -> Any:
    """Return `value` rounded once to the raw word type of `like` (compiled code only)."""
    raise NotImplementedError("only in compiled code")


@overload(store, strict=False)
def _store(value: Any, like: Any) -> Any:
    narrow = (lambda value: _round_to_odd(value)) if value == types.float64 else (lambda value: value)
    narrow = njit(narrow)
    if like == types.uint16:
        return lambda value, like: _to_bfloat16(narrow(value))
    if like == types.int16:
        return lambda value, like: types.int16(types.uint16(_to_small(narrow(value), 10, 15, 0x7BFF, 0x7E00, 15)))
    if like == types.uint8:
        return lambda value, like: types.uint8(_to_small(narrow(value), 3, 7, 0x7E, 0x7F, 7))
    if like == types.int8:
        return lambda value, like: types.int8(types.uint8(_to_small(narrow(value), 2, 15, 0x7B, 0x7F, 7)))
    if like == types.float32:
        return lambda value, like: types.float32(value)
    if like == types.float64:
        return lambda value, like: types.float64(value)
    return None


def unusual(word: Any) -> Any:
    """Return whether a raw word is NaN or infinite (compiled code only)."""
    raise NotImplementedError("only in compiled code")


@overload(unusual, strict=False)
def _unusual(word: Any) -> Any:
    if word == types.uint16:
        return lambda word: (word & types.uint16(0x7F80)) == types.uint16(0x7F80)
    if word == types.int16:
        return lambda word: (types.uint16(word) & types.uint16(0x7C00)) == types.uint16(0x7C00)
    if word == types.uint8:
        return lambda word: (word & types.uint8(0x7F)) == types.uint8(0x7F)
    if word == types.int8:
        return lambda word: (types.uint8(word) & types.uint8(0x7C)) == types.uint8(0x7C)
    if word == types.float32:
        return lambda word: (_bits_of_float32(word) & types.uint32(0x7F800000)) == types.uint32(0x7F800000)
    if word == types.float64:
        exponent = 0x7FF0000000000000
        return lambda word: (_bits_of_float64(word) & types.uint64(exponent)) == types.uint64(exponent)
    return None


# ---------------------------------------------------------------- the vocabulary, compiled


@overload(vocabulary.zeros_like, strict=False)
def _zeros_like(value: Any) -> Any:
    kind = value
    return lambda value: kind(0)


@overload(vocabulary.where, strict=False)
def _where(condition: Any, value: Any, other: Any) -> Any:
    kind = value
    return lambda condition, value, other: value if condition else kind(other)


@overload(vocabulary.number, strict=False)
def _number(condition: Any, like: Any) -> Any:
    kind = like
    return lambda condition, like: kind(1) if condition else kind(0)


@overload(vocabulary.minimum, strict=False)
def _minimum(value: Any, bound: Any) -> Any:
    kind = value
    return lambda value, bound: kind(bound) if bound < value else value


@overload(vocabulary.maximum, strict=False)
def _maximum(value: Any, bound: Any) -> Any:
    kind = value
    return lambda value, bound: kind(bound) if bound > value else value


@overload(vocabulary.narrow, strict=False)
def _narrow(value: Any) -> Any:
    return lambda value: types.float32(value)


@overload(vocabulary.wide, strict=False)
def _wide(value: Any) -> Any:
    return lambda value: types.float64(value)


@overload(vocabulary.log, strict=False)
def _log(value: Any) -> Any:
    return lambda value: math.log(value)


@overload(vocabulary.exp, strict=False)
def _exp(value: Any) -> Any:
    return lambda value: math.exp(value)


@overload(vocabulary.tanh, strict=False)
def _tanh(value: Any) -> Any:
    return lambda value: math.tanh(value)


@overload(vocabulary.sigmoid, strict=False)
def _sigmoid(value: Any) -> Any:
    kind = value
    return lambda value: kind(1) / (kind(1) + math.exp(-value))


@overload(vocabulary.distance, strict=False)
def _distance(value: Any, base: Any, like: Any) -> Any:
    kind = like
    return lambda value, base, like: abs(kind(value) - kind(base))


@overload(vocabulary.row_value, strict=False)
def _row_value(table: Any, index: Any, columns: Any) -> Any:
    # A quotient of whole numbers below 2^52 does not round up to the next one, and this division is a vector's.
    return lambda table, index, columns: table[types.int64(types.float64(index) / types.float64(columns))]


# ---------------------------------------------------------------- reducers over a strip of evaluated values


LANES = 16
"""Partial sums of a block: element i goes to sum i % 16, whatever the processor's vectors are."""


def _lane_sums(products: bool) -> Any:
    """Return an intrinsic that adds entries (or products of two arrays' entries) to 16 partial sums.

    Written as vector instructions because compilers do not reorder floating-point sums on their own, and so that the
    order is this one on every processor: entry i goes to sum i % 16. Only whole groups of 16 entries are added.
    """

    @intrinsic
    def add(typing_context: Any, left: Any, right: Any, count: Any, lane: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            from llvmlite import ir
            from numba.core import cgutils

            vector = ir.VectorType(ir.DoubleType(), LANES // 2)

            def data(number: int) -> Any:
                array = context.make_array(signature.args[number])(context, builder, arguments[number])
                return array.data

            def half(pointer: Any, position: Any, number: int) -> Any:
                offset = builder.add(position, ir.Constant(position.type, number * LANES // 2))
                return builder.bitcast(builder.gep(pointer, [offset]), vector.as_pointer())

            zero = ir.Constant(arguments[2].type, 0)
            sums = [cgutils.alloca_once(builder, vector) for _ in range(2)]
            for number, total in enumerate(sums):
                builder.store(builder.load(half(data(3), zero, number), align=8), total)
            step = ir.Constant(arguments[2].type, LANES)
            whole = builder.sub(arguments[2], builder.srem(arguments[2], step))
            with cgutils.for_range_slice(builder, zero, whole, step) as (position, _):
                for number, total in enumerate(sums):
                    value = builder.load(half(data(0), position, number), align=8)
                    if products:
                        value = builder.fmul(value, builder.load(half(data(1), position, number), align=8))
                    builder.store(builder.fadd(builder.load(total), value), total)
            for number, total in enumerate(sums):
                builder.store(builder.load(total), half(data(3), zero, number), align=8)
            return context.get_dummy_value()

        return types.void(left, right, count, lane), generate

    return add


def _add_narrow_entries() -> Any:
    """Return an intrinsic that adds float32 entries to 16 float64 sums, entry i to sum i % 16.

    Eight entries of a sum at a time are first added to each other as a tree in float32, which rounds each of them three
    times at most: a relative error of 2^-22 at worst for terms of one sign. Only whole groups of 128 entries are added.
    """
    together = 8

    @intrinsic
    def add(typing_context: Any, values: Any, count: Any, lane: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            from llvmlite import ir
            from numba.core import cgutils

            narrow, wide = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.DoubleType(), LANES)
            data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
            sums = context.make_array(signature.args[2])(context, builder, arguments[2]).data
            place = builder.bitcast(sums, wide.as_pointer())
            total = cgutils.alloca_once(builder, wide)
            builder.store(builder.load(place, align=8), total)
            zero = ir.Constant(arguments[1].type, 0)
            step = ir.Constant(arguments[1].type, LANES * together)
            whole = builder.sub(arguments[1], builder.srem(arguments[1], step))
            with cgutils.for_range_slice(builder, zero, whole, step) as (position, _):
                tree = []
                for number in range(together):
                    offset = builder.add(position, ir.Constant(position.type, number * LANES))
                    pointer = builder.bitcast(builder.gep(data, [offset]), narrow.as_pointer())
                    tree.append(builder.load(pointer, align=4))
                while len(tree) > 1:
                    tree = [builder.fadd(tree[at], tree[at + 1]) for at in range(0, len(tree), 2)]
                builder.store(builder.fadd(builder.load(total), builder.fpext(tree[0], wide)), total)
            builder.store(builder.load(total), place, align=8)
            return context.get_dummy_value()

        return types.void(values, count, lane), generate

    return add


_add_entries = _lane_sums(products=False)
_add_narrow = _add_narrow_entries()
_add_products = _lane_sums(products=True)


@njit(nogil=True, error_model="numpy")
def _total(values: Any, count: int, lane: Any) -> None:
    _add_entries(values, values, count, lane)
    for position in range(count - count % LANES, count):
        lane[position % LANES] += values[position]


@njit(nogil=True, error_model="numpy")
def _dot(left: Any, right: Any, count: int, lane: Any) -> None:
    _add_products(left, right, count, lane)
    for position in range(count - count % LANES, count):
        lane[position % LANES] += left[position] * right[position]


@njit(nogil=True, error_model="numpy")
def _reduce_sums(strip: Any, count: int, start: int, sums: Any) -> None:
    """Add each row of `strip` to the lanes `sums[row]`."""
    for row in range(strip.shape[0]):
        _total(strip[row], count, sums[row])


@njit(nogil=True, error_model="numpy")
def _reduce_narrow_sums(strip: Any, count: int, start: int, sums: Any) -> None:
    """Add each row of `strip`, which is float32, to the float64 lanes `sums[row]`."""
    for row in range(strip.shape[0]):
        values = strip[row]
        lane = sums[row]
        _add_narrow(values, count, lane)
        for position in range(count - count % (8 * LANES), count):
            lane[position % LANES] += types.float64(values[position])


@njit(nogil=True, error_model="numpy")
def _reduce_gram(strip: Any, count: int, start: int, sums: Any) -> None:
    """Add the inner products of the rows (upper triangle, row by row) to the lanes `sums[pair]`."""
    pair = 0
    for row in range(strip.shape[0]):
        for column in range(row, strip.shape[0]):
            _dot(strip[row], strip[column], count, sums[pair])
            pair += 1


@njit(nogil=True, error_model="numpy")
def _reduce_histogram(strip: Any, count: int, start: int, state: Any) -> None:
    """Count keys in each window: `state` = (counts, above, key row, lowest key, bins, shift), one entry per window."""
    counts, above, rows, lows, widths, shifts = state
    for window in range(rows.size):
        keys = strip[rows[window]]
        low = lows[window]
        width = widths[window]
        shift = shifts[window]
        table = counts[window]
        high = low + width
        larger = 0
        for position in range(count):
            larger += keys[position] >= high
        above[window] += larger
        for position in range(count):
            distance = keys[position] - low  # unsigned: a smaller key is a huge distance
            if distance < width:
                table[distance >> shift] += 1


@njit(nogil=True, error_model="numpy")
def _reduce_gather(strip: Any, count: int, start: int, state: Any) -> None:
    """Keep the keys in each window: `state` = (kept, counts, above, key row, lowest key, width), one per window.

    Counts go on where there is no more room.
    """
    kept, counts, above, rows, lows, widths = state
    for window in range(rows.size):
        keys = strip[rows[window]]
        low = lows[window]
        width = widths[window]
        target = kept[window]
        high = low + width
        larger = 0
        for position in range(count):
            larger += keys[position] >= high
        above[window] += larger
        place = counts[window]
        for position in range(count):
            if keys[position] - low < width:  # unsigned: a smaller key is a huge distance
                if place < target.size:
                    target[place] = keys[position]
                place += 1
        counts[window] = place


@njit(nogil=True, error_model="numpy")
def _reduce_compare(strip: Any, count: int, start: int, state: Any) -> None:
    """Count keys above and equal to each window's key: `state` = (above, equal, key row, key)."""
    above, equal, rows, targets = state
    for window in range(rows.size):
        keys = strip[rows[window]]
        target = targets[window]
        larger = 0
        same = 0
        for position in range(count):
            larger += keys[position] > target
            same += keys[position] == target
        above[window] += larger
        equal[window] += same


@njit(nogil=True, error_model="numpy")
def _reduce_find(strip: Any, count: int, start: int, state: Any) -> None:
    """Find the index of the n-th key equal to a target: `state` = (counts so far, found, key row, key, n)."""
    counts, found, rows, targets, wanted = state
    for window in range(rows.size):
        keys = strip[rows[window]]
        for position in range(count):
            if keys[position] == targets[window]:
                counts[window] += 1
                if counts[window] == wanted[window]:
                    found[window] = start + position


@njit(nogil=True, error_model="numpy")
def _reduce_collect(strip: Any, count: int, start: int, state: Any) -> None:
    """Copy the keys: `state` = (target, index of the target's first element)."""
    target, origin = state
    for row in range(strip.shape[0]):
        for position in range(count):
            target[row, start - origin + position] = strip[row, position]


@njit(nogil=True, error_model="numpy")
def fill_draws(key: int, start: int, words: Any) -> None:
    """Fill `words` with the 32-bit draws of elements from `start` (even) on.

    Each SplitMix64 output `mix(key + (index // 2 + 1) * gamma)` serves two elements, the low half the even one. There
    is no state, so a draw is the same for any chunking, thread count and device.
    """
    gamma = types.uint64(0x9E3779B97F4A7C15)
    state = types.uint64(key) + ((types.uint64(start) >> types.uint64(1)) + types.uint64(1)) * gamma
    for pair in range(words.size):
        word = state
        state = state + gamma
        word = (word ^ (word >> types.uint64(30))) * types.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> types.uint64(27))) * types.uint64(0x94D049BB133111EB)
        words[pair] = word ^ (word >> types.uint64(31))


REDUCERS: dict[str, Any] = {
    "collect": _reduce_collect,
    "sums": _reduce_sums,
    "narrow sums": _reduce_narrow_sums,
    "gram": _reduce_gram,
    "gather": _reduce_gather,
    "histogram": _reduce_histogram,
    "compare": _reduce_compare,
    "find": _reduce_find,
}


# ---------------------------------------------------------------- conversions


@cached
def decode(words: Any, values: Any) -> int:
    """Widen raw words into float32 or float64; return 1 if one of them is not finite, else 0."""
    bad = False
    for position in range(values.size):
        word = words[position]
        values[position] = load(word)
        bad |= unusual(word)
    return 1 if bad else 0


@cached
def encode(values: Any, words: Any) -> int:
    """Round float32 or float64 values once into raw words; return 2 if one of these is not finite, else 0."""
    bad = False
    for position in range(words.size):
        word = store(values[position], words[position])
        words[position] = word
        bad |= unusual(word)
    return 2 if bad else 0


@cached
def add_product(values: Any, left: Any, right: Any, start: int, columns: int) -> None:
    """Add elements from `start` on of the flattened product left (rows, r) · right (r, columns) to float64 values.

    Terms are added in the order of r, so an entry does not depend on the range that is asked for.
    """
    stop = start + values.size
    for row in range(start // columns, (stop + columns - 1) // columns):
        low = max(start, row * columns)
        high = min(stop, (row + 1) * columns)
        for term in range(right.shape[0]):
            factor = types.float64(left[row, term])
            for position in range(low, high):
                values[position - start] += factor * right[term, position - row * columns]


# ---------------------------------------------------------------- kernels made from a formula

_OWN_NAMES = frozenset(
    {"bad", "b", "count", "draws", "first", "formula", "i", "keys", "output", "reduce", "size", "start", "state",
     "strip", "value", "word", "wrong"}
)  # fmt: skip
"""Names that a kernel gives its own values."""

_KERNEL = """
def kernel({arguments}, start, {parameters}{sink}):
    bad = False
    wrong = False
    size = {first}.size
    {setup}
    for first in range(0, size, STRIP):
        count = min(STRIP, size - first)
        {slices}
{loops}
        {finish}
    return (1 if bad else 0) + (2 if wrong else 0)
"""

_LOOP = """        for i in range(count):
            value = {call}
            {keep}
            bad |= {unusual}
"""


@functools.cache
def _stamp() -> str:
    """Return a digest of everything that compiled kernels depend on besides the formula itself."""
    digest = hashlib.sha256(f"{numba.__version__} {np.__version__} {sys.version}".encode())
    for module in (Path(__file__), Path(vocabulary.__file__)):
        digest.update(module.read_bytes())
    return digest.hexdigest()[:16]


_JITABLE: set[Any] = set()


def _helpers(function: Any) -> list[Any]:
    """Return a formula with the plain functions that it calls, having let compiled code call these."""
    found = [function]
    for name in function.__code__.co_names:
        helper = function.__globals__.get(name)
        if not inspect.isfunction(helper) or helper.__module__ == vocabulary.__name__:
            continue
        if helper not in _JITABLE:
            _JITABLE.add(helper)
            register_jitable(helper)
        found.extend(_helpers(helper))
    return found


def _sources(functions: list[Any]) -> bytes:
    """Return a digest of the files in which functions stand."""
    digest = hashlib.sha256()
    for path in sorted({function.__code__.co_filename for function in functions}):
        with contextlib.suppress(OSError):
            digest.update(Path(path).read_bytes())
    return digest.digest()


def cache_folder() -> Path:
    """Return the folder that holds generated kernels, `$GRAFTWORK_CACHE` or the user's cache folder."""
    root = os.environ.get("GRAFTWORK_CACHE")
    if root is None:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "graftwork")
    return Path(root) / "kernels" / _stamp()


def _module(source: str, key: str) -> ModuleType:
    """Import generated source as a module from the cache, so that numba can cache what it compiles beside it."""
    name = f"graftwork_kernel_{key}"
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.py"
        if not path.exists() or path.read_text() != source:
            with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as handle:
                handle.write(source)
            os.replace(handle.name, path)
    except OSError:  # an unwritable home: compile without a cache
        module = ModuleType(name)
        sys.modules[name] = module
        exec(compile(source, name, "exec"), module.__dict__)
        return module
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # what numba has cached refers to its module by name
    specification.loader.exec_module(module)
    return module


def positional(function: Any) -> Any:
    """Return the function with its keyword-only arguments made positional, which numba needs."""
    code = function.__code__
    plain = code.replace(co_argcount=code.co_argcount + code.co_kwonlyargcount, co_kwonlyargcount=0)
    return FunctionType(plain, function.__globals__, function.__name__, function.__defaults__, function.__closure__)


@functools.lru_cache(maxsize=512)
def kernel(
    formula: Callable[..., Any],
    models: int,
    has_base: bool,
    precision: str,
    parameters: tuple[tuple[str, int, bool], ...],
    literals: tuple[tuple[str, Any], ...],
    reducer: str = "",
    terms: int = 1,
    each: bool = False,
    elementwise: tuple[str, ...] = (),
    streams: str = "",
) -> Any:
    """Return the compiled pass of a formula.

    Args:
        formula: `formula(models, base, index, **parameters)`; returns a value, or a tuple of `terms` values.
        models: Number of models; `models` is a tuple of so many values.
        has_base: Whether there is a base; otherwise `base` is the first model.
        precision: "float32" or "float64": the type in which it is evaluated.
        parameters: Name, length (0 for a scalar) and whether it is a floating-point number of each run-time parameter.
        literals: Settings that are the same for every element and are compiled in.
        reducer: A key of `REDUCERS`; empty for a pass that writes the value.
        terms: Number of values in all, for a reducer.
        streams: Name of the parameter that holds random words, if there is one.
        elementwise: Names of per-model parameters that have a value per element.
        each: Whether the formula is called once per model and returns a tuple, the tuples being strung together.

    Returns:
        `kernel(x0, …, [base], [columns…], start, parameters…, [keys, draws], output)`, `start` being even where there
        are random words; or `(…, strip, keys, state)` with a reducer, `keys` being
        the strip or its bits as integers; it returns 1 if an
        input word is not finite, plus 2 if an output word is not.
    """
    named = {name for name, _, _ in parameters} | {name for name, _ in literals} | {*elementwise, streams}
    if named & _OWN_NAMES:
        raise ValueError(f"formula parameters must not be called {sorted(named & _OWN_NAMES)}: kernels use these names")
    helpers = _helpers(formula)
    arguments = [f"x{number}" for number in range(models)] + (["b"] if has_base else [])
    columns = {name: [f"{name}_{number}" for number in range(models)] for name in elementwise}
    draws = [f"{streams}_{number}" for number in range(models)] if streams else []
    everything = arguments + [column for name in columns for column in columns[name]]
    cast = "float32" if precision == "float32" else "float64"
    loaded = [f"{cast}(load({argument}_[i]))" for argument in arguments]
    base = loaded[-1] if has_base else loaded[0]
    values = f"({', '.join(loaded[:models])},), {base}"
    entries = {name: [f"{column}_[i]" for column in columns[name]] for name in columns}
    if streams:
        entries[streams] = [f"{draw}_[i]" for draw in draws]
    lengths = {name: length for name, length, _ in parameters}
    whole = {name: name for name in lengths} | {name: f"({', '.join(entry)},)" for name, entry in entries.items()}
    whole |= {name: repr(value) for name, value in literals}
    code = formula.__code__
    order = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    passed = "".join(f", {whole[name]}" for name in order)

    def own(number: int) -> str:
        """Return the arguments of a formula that is called for one model."""
        parts = []
        for name in order:
            if name in entries:
                parts.append(entries[name][number])
            else:
                parts.append(f"{whole[name]}[{number}]" if lengths.get(name) else whole[name])
        return "".join(f", {part}" for part in parts)

    index = "start + first + i"
    unusual = [f"unusual({argument}_[i])" for argument in arguments]
    calls = [f"formula({values}, {index}{passed})"]
    if each:
        calls = [f"formula({loaded[number]}, {values}, {index}{own(number)})" for number in range(models)]
    width = terms // len(calls)
    loops = []
    for number, call in enumerate(calls):
        keep = "word = store(value, output_[i]); output_[i] = word; wrong |= unusual(word)"
        if reducer:
            keep = "; ".join(f"row{number * width + term}[i] = value[{term}]" for term in range(width))
        checked = [unusual[number], *unusual[models:]] if each else unusual
        loops.append(_LOOP.format(call=call, keep=keep, unusual=" | ".join(checked)))
    sliced = everything if reducer else [*everything, "output"]
    slices = [f"{argument}_ = {argument}[first : first + count]" for argument in sliced]
    setup = [f"row{term} = strip[{term}]" for term in range(terms)] if reducer else []
    for number, draw in enumerate(draws):
        setup += [f"{draw}_pairs = draws[{number}]", f"{draw}_ = {draw}_pairs.view(uint32)"]
        slices.append(f"fill_draws({streams}[{number}], start + first, {draw}_pairs[: (count + 1) // 2])")
    taken = [name for name, _, _ in parameters] + ([streams, "draws"] if streams else [])
    body = _KERNEL.format(
        arguments=", ".join(everything),
        first=arguments[0],
        parameters="".join(f"{name}, " for name in taken),
        sink="strip, keys, state" if reducer else "output",
        setup="; ".join(setup) or "pass",
        slices="; ".join(slices),
        loops="".join(loops).rstrip("\n"),
        finish="reduce(keys, count, start + first, state)" if reducer else "pass",
    )
    head = (
        "from numba import njit, float32, float64, uint32\n"
        "from graftwork.merge.kernels import REDUCERS, cached, fill_draws, load, positional, store, unusual\n"
        f"from {formula.__module__} import {formula.__qualname__} as plain\n"
        'formula = njit(positional(plain), error_model="numpy")\n'
        f"STRIP = {STRIP}\n" + (f'reduce = REDUCERS["{reducer}"]\n' if reducer else "")
    )
    tail = "\nkernel = cached(kernel)\n"
    key = hashlib.sha256(_stamp().encode() + _sources(helpers) + head.encode() + body.encode()).hexdigest()[:24]
    module = _module(head + body + tail, key)
    return module.kernel
