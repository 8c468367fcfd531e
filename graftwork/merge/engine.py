"""Runs a plan's steps: read, compute, write, in cache-sized pieces, on CPU threads or on a GPU.

A step is one output tensor. Its method's program asks for passes over the data (`graftwork.merge.passes`); a pass cuts
the tensors into spans of whole blocks, which threads take one by one. Whatever has to be combined over a tensor is
combined block by block in index order, so results depend neither on the number of threads nor on the size of a span.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import xxhash

from graftwork.merge import dtypes
from graftwork.merge.checkpoint import BLOCK, TensorEntry, tensor_digest
from graftwork.merge.errors import DataError
from graftwork.merge.passes import (
    NOTHING,
    Apply,
    ApplyMatrix,
    ApplyRows,
    Cut,
    Gram,
    Group,
    PerElement,
    RowTable,
    Select,
    Sums,
)

SPAN = 4 * BLOCK
"""Elements that a thread takes at a time."""

FUSE_ABOVE = 16_000_000
"""Elements in a plan above which kernels are compiled for the very dtypes of the inputs; below, decoding is a pass of
its own, which spares compilations. The results are the same."""

_STRIP = 16_384
"""Elements decoded at a time where decoding is a pass of its own."""

_ROW_VALUES = 1 << 20
"""Values that a function over rows gets at a time, at least one slice."""

_WINDOW_BITS = 17
"""A selection's histogram has 2^17 bins."""

_SAMPLE = 65_536
"""Keys drawn to guess where a selection's cut lies; the guess only saves a pass."""

Array = np.ndarray[Any, Any]


class Reader(Protocol):
    """Where the bytes of an input come from."""

    def read_into(self, entry: TensorEntry, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of the tensor on."""


class Sink(Protocol):
    """Where the bytes of the output go."""

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write `data` at byte `offset` of the tensor."""

    def finish(self, name: str, digest: bytes, inputs: Mapping[tuple[int, str], bytes]) -> None:
        """Take note that the tensor is complete, with its digest and those of the inputs it was made from."""


@dataclass(frozen=True, slots=True)
class Input:
    """One tensor of one input: the position of its checkpoint among the plan's inputs, and where it lies."""

    model: int
    entry: TensorEntry


@dataclass(slots=True)
class Step:
    """How one output tensor is made.

    Args:
        name: Its name.
        dtype: Its dtype, as safetensors writes it.
        shape: Its shape.
        models: The tensors that are merged, in recipe order, the base not among them.
        base: The base's tensor, or None.
        program: The method's program with its parameters bound, or None to copy `models[0]` byte for byte.
        kind: The method's kind.
        streams: Position of each model among the non-base models of the recipe.
        group: Steps of the same group share their statistics (`scope: model`); empty for none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    models: tuple[Input, ...]
    base: Input | None = None
    program: Callable[[Group], Any] | None = None
    kind: str = "elementwise"
    streams: tuple[int, ...] = ()
    group: str = ""
    offset: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """All tensors that are read: the models', then the base's."""
        return self.models if self.base is None else (*self.models, self.base)

    @property
    def wide(self) -> bool:
        """Whether an input is float64."""
        return any(item.entry.dtype == "F64" for item in self.inputs)


class Stopped(Exception):
    """The run was asked to stop."""


class _Buffers(threading.local):
    """Memory that a thread uses again and again."""

    def __init__(self) -> None:
        self.arrays: dict[tuple[str, int], Array] = {}

    def get(self, use: str, number: int, count: int, dtype: Any) -> Array:
        """Return an array of `count` entries; its contents are whatever was left there."""
        wanted = np.dtype(dtype)
        size = count * wanted.itemsize
        buffer = self.arrays.get((use, number))
        if buffer is None or buffer.size < size:
            buffer = np.empty(max(size, 4096), np.uint8)
            self.arrays[use, number] = buffer
        return buffer[:size].view(wanted)


@dataclass(slots=True)
class _Bound:
    """A formula's parameters, sorted by how a kernel takes them."""

    specification: tuple[tuple[str, int, bool], ...]
    literals: tuple[tuple[str, Any], ...]
    values: tuple[Any, ...]
    elementwise: tuple[str, ...]
    makers: tuple[PerElement, ...]


def _bind(parameters: Mapping[str, Any], precision: str) -> _Bound:
    number = np.float32 if precision == "float32" else np.float64
    specification: list[tuple[str, int, bool]] = []
    literals: list[tuple[str, Any]] = []
    values: list[Any] = []
    makers: dict[str, PerElement] = {}
    for name, value in parameters.items():
        if isinstance(value, bool | str):
            literals.append((name, value))
        elif isinstance(value, PerElement):
            makers[name] = value
        elif isinstance(value, tuple):
            floating = not all(isinstance(item, int) for item in value)
            specification.append((name, len(value), floating))
            values.append(tuple(number(item) if floating else np.int64(item) for item in value))
        elif isinstance(value, np.ndarray):
            specification.append((name, 0, True))
            values.append(value)
        else:
            floating = not isinstance(value, int)
            specification.append((name, 0, floating))
            values.append(number(value) if floating else np.int64(value))
    return _Bound(tuple(specification), tuple(literals), tuple(values), tuple(makers), tuple(makers.values()))


class Engine:
    """Executes steps on CPU threads.

    Args:
        readers: One per input of the plan.
        sink: Where the output goes.
        labels: Name of each input for messages.
        threads: Number of threads.
        fuse: Whether kernels are compiled for the inputs' own dtypes.
        allow_nonfinite: Whether element-wise methods pass NaN and infinities on.
        progress: Called with the number of bytes read and written since the last call.
        span: Elements that a thread takes at a time, a multiple of 65,536.
    """

    def __init__(
        self,
        readers: Sequence[Reader],
        sink: Sink,
        labels: Sequence[str],
        *,
        threads: int = 1,
        fuse: bool = False,
        allow_nonfinite: bool = False,
        progress: Callable[[int], None] | None = None,
        span: int = SPAN,
    ) -> None:
        self.readers = readers
        self.sink = sink
        self.labels = labels
        self.threads = max(1, threads)
        self.fuse = fuse
        self.allow_nonfinite = allow_nonfinite
        self.progress = progress or (lambda count: None)
        self.span = span
        self.buffers = _Buffers()
        self.stopping = threading.Event()
        self._pool: ThreadPoolExecutor | None = None

    # ------------------------------------------------------------ scheduling

    def run(self, steps: Iterable[Step]) -> None:
        """Make the tensors of all steps.

        Raises:
            DataError: An input holds NaN or infinities, or a result does not fit the output dtype.
            CheckpointError: An input cannot be read any more.
        """
        groups: dict[str, list[Step]] = {}
        single: list[Step] = []
        for step in steps:
            if step.group:
                groups.setdefault(step.group, []).append(step)
            else:
                single.append(step)
        if self.threads == 1:
            for step in single:
                self._check_stop()
                self._make([step], parallel=False)
            for members in groups.values():
                self._make(members, parallel=False)
            return
        with ThreadPoolExecutor(self.threads, thread_name_prefix="graftwork") as pool:
            self._pool = pool
            pending: set[Future[None]] = set()
            try:
                for batch in _batches(single, self.span):
                    self._check_stop()
                    if len(batch) == 1 and batch[0].elements > self.span:
                        self._make(batch, parallel=True)
                        continue
                    pending.add(pool.submit(self._make_each, batch))
                    if len(pending) > 2 * self.threads:
                        done, pending = wait(pending, return_when="FIRST_COMPLETED")
                        for future in done:
                            future.result()
                done, pending = wait(pending, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                for members in groups.values():
                    self._make(members, parallel=True)
            except BaseException:
                self.stopping.set()
                raise
            finally:
                wait(pending)
                self._pool = None

    def stop(self) -> None:
        """Ask the run to stop after the spans at hand; it then raises `Stopped`."""
        self.stopping.set()

    def _check_stop(self) -> None:
        if self.stopping.is_set():
            raise Stopped

    def _make_each(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self._check_stop()
            self._make([step], parallel=False)

    def _map(self, function: Callable[[int], Any], count: int, parallel: bool) -> list[Any]:
        """Return `[function(0), function(1), …]`, computed by all threads."""

        def guarded(number: int) -> Any:
            self._check_stop()
            return function(number)

        if not parallel or self._pool is None or count == 1:
            return [guarded(number) for number in range(count)]
        futures = [self._pool.submit(guarded, number) for number in range(count)]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            wait(futures)
            raise

    def digest_only(self, inputs: Sequence[Input]) -> dict[tuple[int, str], bytes]:
        """Return the digests of tensors that no step reads."""

        def digest(number: int) -> bytes:
            item = inputs[number]
            block = max(1, BLOCK * dtypes.BITS[item.entry.dtype] // 8)
            digests = []
            for offset in range(0, item.entry.size, block):
                data = memoryview(self.buffers.get("copy", 0, min(block, item.entry.size - offset), np.uint8))
                self.readers[item.model].read_into(item.entry, offset, data)
                digests.append(xxhash.xxh3_128_digest(data))
                self.progress(len(data))
            return tensor_digest(digests or [b""])

        return {
            (item.model, item.entry.name): digest(number) for number, item in enumerate(inputs)
        }

    # ------------------------------------------------------------ one group of steps

    def _make(self, steps: list[Step], *, parallel: bool) -> None:
        """Run the programs of a group in lock-step, then make its outputs."""
        total = sum(step.elements for step in steps)
        offset = 0
        for step in sorted(steps, key=lambda step: step.name):
            step.offset = offset
            offset += step.elements
        programs: list[tuple[Step, Any]] = []
        for step in steps:
            if step.program is None or step.elements == 0:
                self._finish(step, self._copy(step, parallel) if step.elements else ([b""], [[b""]]))
                continue
            group = Group(
                step.name, step.shape, total, len(step.models), step.base is not None, step.wide, step.streams, step.notes
            )
            programs.append((step, step.program(group)))
        for step, last in self._drive(programs, parallel):
            if isinstance(last, Apply):
                self._finish(step, self._apply(step, last, parallel))
            elif isinstance(last, ApplyRows):
                self._finish(step, self._apply_rows(step, last, parallel))
            else:
                assert isinstance(last, ApplyMatrix)
                self._finish(step, self._apply_matrix(step, last))

    def _drive(self, programs: list[tuple[Step, Any]], parallel: bool) -> Iterator[tuple[Step, Any]]:
        """Advance programs together, executing the pass they ask for over all their tensors, until each returns one."""
        running = [(step, program) for step, program in programs if hasattr(program, "send")]
        for step, program in programs:
            if not hasattr(program, "send"):
                yield step, program
        answer: Any = None
        while running:
            asked: list[tuple[Step, Any, Any]] = []
            for step, program in running:
                try:
                    asked.append((step, program, program.send(answer)))
                except StopIteration as finished:
                    yield step, finished.value
            if not asked:
                return
            answer = self._execute([(step, request) for step, _, request in asked], parallel)
            running = [(step, program) for step, program, _ in asked]

    def _execute(self, asked: list[tuple[Step, Any]], parallel: bool) -> Any:
        request = asked[0][1]
        if isinstance(request, Select):
            return self._select(asked, parallel)
        if isinstance(request, RowTable):
            return self._row_table(asked[0][0], request, parallel)
        assert isinstance(request, Gram | Sums)
        return self._sum(asked, parallel)

    def _finish(self, step: Step, digests: tuple[list[bytes], list[list[bytes]]]) -> None:
        output, inputs = digests
        named = {
            (item.model, item.entry.name): tensor_digest(blocks)
            for item, blocks in zip(step.inputs, inputs, strict=True)
        }
        self.sink.finish(step.name, tensor_digest(output), named)

    # ------------------------------------------------------------ reading

    def _read(self, step: Step, start: int, stop: int, digests: list[list[bytes]] | None = None) -> list[Array]:
        """Return the raw words of elements [start, stop) of every input, in buffers of this thread."""
        arrays = []
        for number, item in enumerate(step.inputs):
            dtype = dtypes.RAW[item.entry.dtype]
            words = self.buffers.get("read", number, stop - start, dtype)
            view = memoryview(words.view(np.uint8))
            self.readers[item.model].read_into(item.entry, start * dtype.itemsize, view)
            if digests is not None:
                digests[number].append(xxhash.xxh3_128_digest(view))
            arrays.append(words)
            self.progress(len(view))
        return arrays

    def _refuse_input(self, step: Step, start: int, stop: int) -> None:
        """Name the first value that is not finite.

        Raises:
            DataError: Always, unless such values are allowed here.
        """
        if self.allow_nonfinite and step.kind == "elementwise":
            return
        for item in step.inputs:
            dtype = dtypes.RAW[item.entry.dtype]
            words = np.empty(stop - start, dtype)
            self.readers[item.model].read_into(item.entry, start * dtype.itemsize, memoryview(words.view(np.uint8)))
            values = _widen(words, np.float64)
            bad = np.flatnonzero(~np.isfinite(values))
            if bad.size:
                advice = (
                    "use --allow-nonfinite to pass such values on"
                    if step.kind == "elementwise"
                    else "this method needs finite values; leave the tensor out with `exclude`"
                )
                raise DataError(
                    f'cannot merge "{item.entry.name}": {self.labels[item.model]} has {values[bad[0]]} at flat index '
                    f"{start + int(bad[0])}; {advice}"
                )

    def _refuse_output(self, step: Step, words: Array, start: int) -> None:
        values = _widen(words, np.float64)
        bad = np.flatnonzero(~np.isfinite(values))
        if self.allow_nonfinite or not bad.size:
            return
        raise DataError(
            f'cannot write "{step.name}": the result at flat index {start + int(bad[0])} does not fit {step.dtype}; '
            "use a wider `out_dtype` such as float32, or --allow-nonfinite to write infinity"
        )

    # ------------------------------------------------------------ making outputs

    def _copy(self, step: Step, parallel: bool) -> tuple[list[bytes], list[list[bytes]]]:
        item = step.models[0]
        size = item.entry.size
        block = max(1, BLOCK * dtypes.BITS[item.entry.dtype] // 8)
        piece = self.span // BLOCK * block

        def copy(number: int) -> list[bytes]:
            digests = []
            first, last = number * piece, min(size, (number + 1) * piece)
            data = memoryview(self.buffers.get("copy", 0, last - first, np.uint8))
            self.readers[item.model].read_into(item.entry, first, data)
            for position in range(0, len(data), block):
                digests.append(xxhash.xxh3_128_digest(data[position : position + block]))
            self.sink.write(step.name, first, data)
            self.progress(2 * len(data))
            return digests

        blocks = [digest for part in self._map(copy, -(-size // piece), parallel) for digest in part]
        return blocks, [blocks for _ in step.inputs]

    def _apply(self, step: Step, request: Apply, parallel: bool) -> tuple[list[bytes], list[list[bytes]]]:
        raw = dtypes.RAW[step.dtype]
        precision = request.precision
        if step.wide or step.dtype == "F64" or len(step.models) > 6:
            precision = "float64"
        evaluate = self._evaluator(step, request.formula, request.parameters, precision)
        elements = step.elements

        def apply(number: int) -> tuple[list[bytes], list[list[bytes]]]:
            first, last = number * self.span, min(elements, (number + 1) * self.span)
            output = self.buffers.get("write", 0, last - first, raw)
            inputs: list[list[bytes]] = [[] for _ in step.inputs]
            digests = []
            for start, stop, slices in self._pieces(step, first, last, evaluate.makers, inputs):
                words = output[start - first : stop - first]
                flags = evaluate(slices, start, words)
                if flags & 1:
                    self._refuse_input(step, start, stop)
                elif flags:
                    self._refuse_output(step, words, start)
                digests.extend(_block_digests(words))
            data = memoryview(output.view(np.uint8))
            self.sink.write(step.name, first * raw.itemsize, data)
            self.progress(len(data))
            return digests, inputs

        return _join(self._map(apply, -(-elements // self.span), parallel), len(step.inputs))

    def _pieces(
        self,
        step: Step,
        first: int,
        last: int,
        makers: Sequence[PerElement] = (),
        digests: list[list[bytes]] | None = None,
    ) -> Iterator[tuple[int, int, tuple[list[Array], list[Array]]]]:
        """Yield (start, stop, (words of every input, per-element parameters)) over blocks of [first, last)."""
        if not makers:
            for start in range(first, last, BLOCK):
                stop = min(last, start + BLOCK)
                yield start, stop, (self._read(step, start, stop, digests), [])
            return
        unit = _slice_size(step.shape)
        low = first - first % unit
        high = min(step.elements, -(-last // unit) * unit)
        columns = self._columns(step, low, high, makers)
        for start in range(first, last, BLOCK):
            stop = min(last, start + BLOCK)
            words = self._read(step, start, stop, digests)
            yield start, stop, (words, [column[start - low : stop - low] for column in columns])

    def _columns(self, step: Step, low: int, high: int, makers: Sequence[PerElement]) -> list[Array]:
        """Return the per-element parameters of elements [low, high), whole slices: one array per parameter and model."""
        models, base = self._slices(step, low, high)
        return [
            np.ascontiguousarray(made).reshape(-1)
            for maker in makers
            for made in maker.function(models, base, **maker.parameters)
        ]

    def _evaluator(self, step: Step, formula: Any, parameters: Mapping[str, Any], precision: str) -> _Evaluator:
        bound = _bind(parameters, precision)
        return _Evaluator(step, formula, bound, precision, self.buffers, fuse=self.fuse)

    def _slices(self, step: Step, low: int, high: int) -> tuple[Array, Array | None]:
        """Return elements [low, high), whole slices along the first axis, as float arrays (models, slices, …)."""
        shape = step.shape if len(step.shape) >= 2 else (1, step.elements)
        unit = math.prod(shape[1:])
        target = np.float64 if step.wide else np.float32
        values = []
        for item in step.inputs:
            dtype = dtypes.RAW[item.entry.dtype]
            words = np.empty(high - low, dtype)
            self.readers[item.model].read_into(item.entry, low * dtype.itemsize, memoryview(words.view(np.uint8)))
            self.progress(words.nbytes)
            wide = _widen(words, target)
            if not np.isfinite(wide).all():
                self._refuse_input(step, low, high)
            values.append(wide.reshape((high - low) // unit, *shape[1:]))
        models = np.stack(values[: len(step.models)])
        return models, values[-1] if step.base is not None else None

    def _row_spans(self, step: Step) -> list[tuple[int, int]]:
        """Return element ranges of whole slices whose borders are also borders of blocks where possible."""
        unit = _slice_size(step.shape)
        count = step.elements // unit
        several = max(1, _ROW_VALUES // (unit * max(1, len(step.inputs))))
        return [(low * unit, min(count, low + several) * unit) for low in range(0, count, several)]

    def _apply_rows(self, step: Step, request: ApplyRows, parallel: bool) -> tuple[list[bytes], list[list[bytes]]]:
        spans = self._row_spans(step)
        raw = dtypes.RAW[step.dtype]

        def apply(number: int) -> None:
            low, high = spans[number]
            models, base = self._slices(step, low, high)
            whole = base if base is None else base.astype(np.float64)
            if len(step.shape) < 2:
                whole = whole if whole is None else whole.reshape(step.shape)
                models = models.reshape(-1, *step.shape)
            values = request.function(models.astype(np.float64), whole, low, **request.parameters)
            self._write_values(step, np.asarray(values, np.float64).reshape(-1), low, raw)

        self._map(apply, len(spans), parallel)
        return self._rehash(step, parallel)

    def _apply_matrix(self, step: Step, request: ApplyMatrix) -> tuple[list[bytes], list[list[bytes]]]:
        models, base = self._slices(step, 0, step.elements)
        shaped = models.astype(np.float64).reshape(-1, *step.shape)
        whole = None if base is None else base.astype(np.float64).reshape(step.shape)
        values = request.function(shaped, whole, 0, **request.parameters)
        self._write_values(step, np.asarray(values, np.float64).reshape(-1), 0, dtypes.RAW[step.dtype])
        return self._rehash(step, parallel=False)

    def _write_values(self, step: Step, values: Array, start: int, raw: Any) -> None:
        words = np.empty(values.size, raw)
        if _kernels().encode(values, words):
            self._refuse_output(step, words, start)
        self.sink.write(step.name, start * raw.itemsize, memoryview(words.view(np.uint8)))
        self.progress(words.nbytes)

    def _rehash(self, step: Step, parallel: bool) -> tuple[list[bytes], list[list[bytes]]]:
        """Return the digests of a tensor that was not written block by block, from what was written."""
        raw = dtypes.RAW[step.dtype]
        reread = getattr(self.sink, "read_back")  # noqa: B009 - only sinks that can are given such steps

        def hash_span(number: int) -> tuple[list[bytes], list[list[bytes]]]:
            first, last = number * self.span, min(step.elements, (number + 1) * self.span)
            inputs: list[list[bytes]] = [[] for _ in step.inputs]
            digests = []
            for start in range(first, last, BLOCK):
                stop = min(last, start + BLOCK)
                self._read(step, start, stop, inputs)
                words = self.buffers.get("write", 0, stop - start, raw)
                reread(step.name, start * raw.itemsize, memoryview(words.view(np.uint8)))
                digests.extend(_block_digests(words))
            return digests, inputs

        return _join(self._map(hash_span, -(-step.elements // self.span), parallel), len(step.inputs))

    # ------------------------------------------------------------ sums

    def _sum(self, asked: list[tuple[Step, Any]], parallel: bool) -> Array:
        request = asked[0][1]
        is_gram = isinstance(request, Gram)
        count = request.count
        width = count * (count + 1) // 2 if is_gram else count
        rows: list[Array] = []
        for step, own in sorted(asked, key=lambda pair: pair[0].name):
            rows.extend(self._reduce_blocks(step, own, "gram" if is_gram else "sums", count, width, parallel))
        totals = np.array([math.fsum(column) for column in np.stack(rows).T.tolist()])
        if not is_gram:
            return totals
        gram = np.empty((count, count))
        gram[np.triu_indices(count)] = totals
        gram.T[np.triu_indices(count)] = totals
        return gram

    def _reduce_blocks(
        self, step: Step, request: Any, reducer: str, terms: int, width: int, parallel: bool
    ) -> list[Array]:
        """Return the float64 sums of every block of a tensor."""
        formula = request.vectors if reducer == "gram" else request.terms
        evaluate = self._reducer(step, formula, request.parameters, reducer, terms, request.each)

        def reduce(number: int) -> list[Array]:
            first, last = number * self.span, min(step.elements, (number + 1) * self.span)
            sums = []
            for start, stop, slices in self._pieces(step, first, last, evaluate.makers):
                lanes = np.zeros((width, 32))
                if evaluate(slices, start, lanes):
                    self._refuse_input(step, start, stop)
                sums.append(lanes.sum(1))
            return sums

        return [block for part in self._map(reduce, -(-step.elements // self.span), parallel) for block in part]

    def _reducer(
        self, step: Step, formula: Any, parameters: Mapping[str, Any], reducer: str, terms: int, each: bool
    ) -> _Reducer:
        return _Reducer(step, formula, _bind(parameters, "float64"), reducer, terms, each, self.buffers, fuse=self.fuse)

    def _row_table(self, step: Step, request: RowTable, parallel: bool) -> Array:
        columns = step.shape[-1] if step.shape else 1
        unit = _slice_size(step.shape)
        spans = self._row_spans(step)

        def table(number: int) -> Array:
            low, high = spans[number]
            models, base = self._slices(step, low, high)
            assert base is not None
            wide = models.astype(np.float64).reshape(len(step.models), -1, columns)
            return np.asarray(request.function(wide, base.astype(np.float64).reshape(-1, columns)))

        assert unit % columns == 0
        return np.concatenate(self._map(table, len(spans), parallel))

    # ------------------------------------------------------------ selection

    def _select(self, asked: list[tuple[Step, Any]], parallel: bool) -> tuple[tuple[Cut, ...], ...]:
        asked = sorted(asked, key=lambda pair: pair[0].name)
        request: Select = asked[0][1]
        for step, own in asked[1:]:
            if own.ranks != request.ranks:
                raise DataError(
                    f'cannot select over the whole model: "{step.name}" asks for other shares than '
                    f'"{asked[0][0].name}"; with `scope: model` the density must be the same for every tensor'
                )
        return _Selection(self, asked, parallel).cuts()


class _Selection:
    """Finds exact cuts by histograms of ever narrower windows of keys; the first window is guessed from a sample."""

    def __init__(self, engine: Engine, asked: list[tuple[Step, Any]], parallel: bool) -> None:
        self.engine = engine
        self.asked = asked
        self.parallel = parallel
        self.request: Select = asked[0][1]
        self.terms = len(self.request.ranks)
        self.total = sum(step.elements for step, _ in asked)
        self.key_bits = 63 if any(step.wide for step, _ in asked) or self._is_wide() else 31
        self.spans = [
            (number, first, min(step.elements, first + engine.span))
            for number, (step, _) in enumerate(asked)
            for first in range(0, step.elements, engine.span)
        ]

    def _is_wide(self) -> bool:
        return "table" in self.request.parameters

    def cuts(self) -> tuple[tuple[Cut, ...], ...]:
        """Return the cuts that were asked for."""
        if self.total <= self.engine.span:
            keys = self._collect([(number, first, last - first) for number, first, last in self.spans])
            return tuple(
                tuple(_cut_of(keys[row], rank) for rank in ranks) for row, ranks in enumerate(self.request.ranks)
            )
        wanted = [(row, rank) for row, ranks in enumerate(self.request.ranks) for rank in ranks if rank > 0]
        found = self._search(wanted) if wanted else {}
        return tuple(
            tuple(found[row, rank] if rank > 0 else NOTHING for rank in ranks)
            for row, ranks in enumerate(self.request.ranks)
        )

    def _evaluator(self, number: int, reducer: str) -> _Reducer:
        step, own = self.asked[number]
        return self.engine._reducer(step, own.keys, own.parameters, reducer, self.terms, own.each)

    def _collect(self, pieces: Sequence[tuple[int, int, int]]) -> Array:
        """Return the keys of pieces (step, first element, count) as an array (scores, count in all)."""
        keys = np.empty((self.terms, sum(count for _, _, count in pieces)), np.int64)
        filled = 0
        for number, first, count in pieces:
            step = self.asked[number][0]
            evaluate = self._evaluator(number, "collect")
            for start, stop, slices in self.engine._pieces(step, first, first + count, evaluate.makers):
                target = keys[:, filled : filled + stop - start]
                if evaluate(slices, start, (target, step.offset + start)):
                    self.engine._refuse_input(step, start, stop)
                filled += stop - start
        return keys

    def _sampled(self) -> Array:
        """Return the keys of runs spread evenly over the tensors."""
        run = 1024
        pieces = []
        for number, (step, _) in enumerate(self.asked):
            runs = min(max(1, round(_SAMPLE / run * step.elements / self.total)), max(1, step.elements // run))
            for position in range(runs):
                first = position * step.elements // runs
                pieces.append((number, first, min(run, step.elements - first)))
        return self._collect(pieces)

    def _search(self, wanted: list[tuple[int, int]]) -> dict[tuple[int, int], Cut]:
        sample = np.sort(self._sampled(), axis=1)
        size = sample.shape[1]
        windows: list[tuple[int, int]] = []  # inclusive ranges of keys
        for row, rank in wanted:
            share = 1 - rank / self.total
            slack = 6 * math.sqrt(share * (1 - share) / size) + 2 / size
            low = int(sample[row, max(0, math.floor((share - slack) * size))]) if share > slack else 0
            high = int(sample[row, min(size - 1, math.ceil((share + slack) * size))])
            if share + slack >= 1:
                high = (1 << self.key_bits) - 1
            windows.append((low, high))
        keys: dict[tuple[int, int], tuple[int, int, int]] = {}
        active = list(range(len(wanted)))
        while active:
            lows = [windows[number][0] for number in active]
            shifts = [max(0, (windows[number][1] - windows[number][0]).bit_length() - _WINDOW_BITS) for number in active]
            counts = self._histogram([wanted[number][0] for number in active], lows, shifts)
            remaining = []
            for position, number in enumerate(active):
                row, rank = wanted[number]
                table = counts[position]
                descending = np.cumsum(table[::-1])
                place = int(np.searchsorted(descending, rank))  # first bin from the top that reaches the rank
                bin_ = len(table) - 1 - place
                if bin_ in (0, len(table) - 1):  # the guess missed
                    windows[number] = (0, lows[position] - 1) if bin_ == 0 else (
                        lows[position] + ((len(table) - 2) << shifts[position]), (1 << self.key_bits) - 1
                    )  # fmt: skip
                    remaining.append(number)
                    continue
                low = lows[position] + ((bin_ - 1) << shifts[position])
                if shifts[position]:
                    windows[number] = (low, low + (1 << shifts[position]) - 1)
                    remaining.append(number)
                else:
                    above = int(descending[place]) - int(table[bin_])
                    keys[row, rank] = (low, rank - above, int(table[bin_]))
            active = remaining
        return self._settle(keys)

    def _settle(self, keys: dict[tuple[int, int], tuple[int, int, int]]) -> dict[tuple[int, int], Cut]:
        """Return the cuts, having found the last admitted element among equals."""
        cuts = {}
        open_: list[tuple[tuple[int, int], int, int]] = []
        for place, (key, needed, equal) in keys.items():
            if needed == equal:
                cuts[place] = Cut(key, self.total - 1)
            else:
                open_.append((place, key, needed))
        seen = dict.fromkeys((place for place, _, _ in open_), 0)
        position = 0
        stride = max(1, 4 * self.engine.threads)
        while open_:
            batch = self.spans[position : position + stride]
            assert batch, "an element among equals was counted but not found"
            rows = [place[0] for place, _, _ in open_]
            targets = [key for _, key, _ in open_]
            counted = self._over(batch, "equals", lambda: np.zeros(len(open_), np.int64), rows, targets)
            still = []
            for column, (place, key, needed) in enumerate(open_):
                for span, counts in zip(batch, counted, strict=True):
                    if seen[place] + counts[column] >= needed:
                        index = self._find(span, place[0], key, needed - seen[place])
                        cuts[place] = Cut(key, index)
                        break
                    seen[place] += int(counts[column])
                else:
                    still.append((place, key, needed))
            open_ = still
            position += stride
        return cuts

    def _find(self, span: tuple[int, int, int], row: int, key: int, needed: int) -> int:
        found = np.full(1, -1, np.int64)
        counts = np.zeros(1, np.int64)
        state = (counts, found, np.array([row]), np.array([key]), np.array([needed]))
        self._over_span(span, "find", state)
        return int(found[0])

    def _histogram(self, rows: list[int], lows: list[int], shifts: list[int]) -> Array:
        total = np.zeros((len(rows), (1 << _WINDOW_BITS) + 2), np.int64)
        lock = threading.Lock()
        engine = self.engine
        queue = iter(self.spans)

        def work(number: int) -> None:
            counts = np.zeros_like(total)
            state = (counts, np.array(rows), np.array(lows), np.array(shifts))
            while True:
                with lock:
                    span = next(queue, None)
                if span is None:
                    break
                engine._check_stop()
                self._over_span(span, "histogram", state)
            with lock:
                total.__iadd__(counts)

        engine._map(work, engine.threads if self.parallel else 1, self.parallel)
        return total

    def _over(
        self,
        spans: Sequence[tuple[int, int, int]],
        reducer: str,
        make: Callable[[], Array],
        rows: list[int],
        targets: list[int],
    ) -> list[Array]:
        def work(number: int) -> Array:
            counts = make()
            self._over_span(spans[number], reducer, (counts, np.array(rows), np.array(targets)))
            return counts

        return self.engine._map(work, len(spans), self.parallel)

    def _over_span(self, span: tuple[int, int, int], reducer: str, state: Any) -> None:
        number, first, last = span
        step = self.asked[number][0]
        evaluate = self._evaluator(number, reducer)
        for start, stop, slices in self.engine._pieces(step, first, last, evaluate.makers):
            if evaluate(slices, start, state):
                self.engine._refuse_input(step, start, stop)


def _cut_of(keys: Array, rank: int) -> Cut:
    if rank <= 0:
        return NOTHING
    size = keys.size
    key = int(np.partition(keys, size - rank)[size - rank])
    needed = rank - int((keys > key).sum())
    return Cut(key, int(np.flatnonzero(keys == key)[needed - 1]))


class _Evaluator:
    """Calls the kernel of a formula that writes the output, decoding and encoding around it where it is not fused."""

    def __init__(self, step: Step, formula: Any, bound: _Bound, precision: str, buffers: _Buffers, *, fuse: bool) -> None:
        self.makers = bound.makers
        self.buffers = buffers
        self.precision = np.dtype(precision)
        self.values = bound.values
        self.offset = step.offset
        words = {item.entry.dtype for item in step.inputs} | {step.dtype}
        self.fused = (fuse and len(words) == 1) or words <= {"F64" if precision == "float64" else "F32"}
        self.kernel = _kernels().kernel(
            formula,
            len(step.models),
            step.base is not None,
            precision,
            bound.specification,
            bound.literals,
            elementwise=bound.elementwise,
        )

    def __call__(self, slices: tuple[list[Array], list[Array]], start: int, words: Array) -> int:
        inputs, columns = slices
        if self.fused:
            return int(self.kernel(*inputs, *columns, start + self.offset, *self.values, words))
        flags = 0
        kernels = _kernels()
        result = self.buffers.get("result", 0, _STRIP, self.precision)
        for first in range(0, words.size, _STRIP):
            last = min(words.size, first + _STRIP)
            decoded = []
            for number, item in enumerate(inputs):
                values = self.buffers.get("decoded", number, last - first, self.precision)
                flags |= kernels.decode(item[first:last], values)
                decoded.append(values)
            pieces = [column[first:last] for column in columns]
            part = result[: last - first]
            self.kernel(*decoded, *pieces, start + first + self.offset, *self.values, part)
            flags |= kernels.encode(part, words[first:last])
        return flags


class _Reducer:
    """Calls the kernel of a formula whose values are reduced."""

    def __init__(
        self, step: Step, formula: Any, bound: _Bound, reducer: str, terms: int, each: bool, buffers: _Buffers, *, fuse: bool
    ) -> None:
        self.makers = bound.makers
        self.buffers = buffers
        self.values = bound.values
        self.offset = step.offset
        self.terms = terms
        self.scratch = np.float64 if reducer in {"sums", "gram"} else np.int64
        words = {item.entry.dtype for item in step.inputs}
        self.fused = (fuse and len(words) == 1) or words <= {"F32"} or words <= {"F64"}
        self.wide = np.float64 if step.wide else np.float32
        self.kernel = _kernels().kernel(
            formula,
            len(step.models),
            step.base is not None,
            "float64",
            bound.specification,
            bound.literals,
            reducer,
            terms,
            each,
            bound.elementwise,
        )

    def __call__(self, slices: tuple[list[Array], list[Array]], start: int, state: Any) -> int:
        inputs, columns = slices
        kernels = _kernels()
        strip = self.buffers.get("strip", 0, self.terms * kernels.STRIP, self.scratch).reshape(self.terms, -1)
        if self.fused:
            return int(self.kernel(*inputs, *columns, start + self.offset, *self.values, strip, state))
        flags = 0
        size = inputs[0].size
        for first in range(0, size, _STRIP):
            last = min(size, first + _STRIP)
            decoded = []
            for number, item in enumerate(inputs):
                values = self.buffers.get("decoded", number, last - first, self.wide)
                flags |= kernels.decode(item[first:last], values)
                decoded.append(values)
            pieces = [column[first:last] for column in columns]
            flags |= self.kernel(*decoded, *pieces, start + first + self.offset, *self.values, strip, state)
        return flags


def _kernels() -> Any:
    """Return the kernels module, imported late: a plan that only copies needs no numba."""
    from graftwork.merge import kernels

    return kernels


def _widen(words: Array, target: Any) -> Array:
    values = np.empty(words.size, target)
    _kernels().decode(words, values)
    return values


def _slice_size(shape: tuple[int, ...]) -> int:
    """Return the elements of one slice along the first axis; all of them for fewer than two axes."""
    return math.prod(shape[1:]) if len(shape) >= 2 else math.prod(shape)


def _block_digests(words: Array) -> Iterator[bytes]:
    for start in range(0, words.size, BLOCK):
        yield xxhash.xxh3_128_digest(memoryview(words[start : start + BLOCK].view(np.uint8)))


def _join(parts: list[tuple[list[bytes], list[list[bytes]]]], inputs: int) -> tuple[list[bytes], list[list[bytes]]]:
    output = [digest for digests, _ in parts for digest in digests]
    return output, [[digest for _, lists in parts for digest in lists[number]] for number in range(inputs)]


def _batches(steps: Sequence[Step], span: int) -> Iterator[list[Step]]:
    """Yield large steps alone and small ones in handfuls, in order."""
    batch: list[Step] = []
    elements = 0
    for step in steps:
        if step.elements > span:
            yield [step]
            continue
        batch.append(step)
        elements += step.elements
        if elements > 2 * span or len(batch) >= 64:
            yield batch
            batch, elements = [], 0
    if batch:
        yield batch
