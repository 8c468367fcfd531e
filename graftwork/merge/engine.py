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
    Apply,
    ApplyMatrix,
    ApplyRows,
    Companion,
    Cut,
    Gram,
    Group,
    Measured,
    PerElement,
    RowTable,
    Select,
    Streams,
    Sums,
    nothing,
)

SPAN = 4 * BLOCK
"""Elements that a thread takes at a time."""

FUSE_ABOVE = 16_000_000
"""Elements in a plan above which kernels are compiled for the very dtypes of the inputs; below, decoding is a pass of
its own, which spares compilations. The results are the same."""

COMPILED_MODELS = 32
"""Models up to which formulas are compiled; beyond, that takes longer than evaluating them on torch's CPU tensors."""

_STRIP = 16_384
"""Elements decoded at a time where decoding is a pass of its own."""

_ROW_VALUES = 1 << 18
"""Values that a function over rows gets at a time, at least one slice."""

WINDOW_BITS = 19
"""A selection's histograms have up to 2^19 bins together."""

KEPT_BYTES = 16_000_000
"""Keys of a selection that may be kept while they are ranked."""

_SAMPLE = 131_072
"""Keys looked at to guess where a selection's cut lies; the guess only saves passes."""

_RUN = 4_096
"""Keys of the sample that lie side by side."""

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
        companions: What is read beside the models, by name: one tensor per model.
        measured: The files that companions come from, by name: one per model, or one for all.
        offset: Index of its first element among those of the group; set by the engine.
        strict: Whether a NaN would spoil statistics and so more than its own entry; set by the engine.
        notes: Remarks of the method, for the report.
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
    companions: Mapping[str, tuple[Input, ...]] = field(default_factory=dict)
    measured: Mapping[str, tuple[Measured, ...]] = field(default_factory=dict)
    offset: int = 0
    strict: bool = False
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


HOLD_BYTES = 16_000_000
"""A tensor whose inputs together are not larger is kept in memory between the passes of its method. What does not fit
the processor's cache is read again from the system's at about the same cost, and then memory does not grow with the
number of models."""

KEEP_COLUMNS_BYTES = 100_000_000
"""What a method has computed per element, by ranking for instance, is kept for its next pass up to this size."""


class _Held:
    """The raw words of a step's inputs, read block by block when they are first asked for."""

    def __init__(self, step: Step, memory: Array) -> None:
        self.words: list[Array] = []
        position = 0
        for item in step.inputs:
            self.words.append(memory[position : position + item.entry.size].view(dtypes.RAW[item.entry.dtype]))
            position += -(-item.entry.size // 64) * 64
        blocks = -(-step.elements // BLOCK)
        self.digests: list[list[bytes]] = [[b""] * blocks for _ in step.inputs]

    @staticmethod
    def size(step: Step) -> int:
        """Return the bytes that holding a step takes."""
        return sum(-(-item.entry.size // 64) * 64 for item in step.inputs)


class Stopped(Exception):  # noqa: N818 - nothing has gone wrong
    """The run was asked to stop."""


class _Buffers(threading.local):
    """Memory that a thread uses again and again."""

    def __init__(self) -> None:
        self.arrays: dict[tuple[str, int], Array] = {}
        self.blocks: dict[tuple[int, Any], tuple[Array, memoryview]] = {}
        self.asked: tuple[int, ...] = ()
        self.columns: list[Array] = []

    def get(self, use: str, number: int, count: int, dtype: Any) -> Array:
        """Return an array of `count` entries; its contents are whatever was left there."""
        wanted = np.dtype(dtype)
        size = count * wanted.itemsize
        buffer = self.arrays.get((use, number))
        if buffer is None or buffer.size < size:
            buffer = np.empty(max(size, 4096), np.uint8)
            self.arrays[use, number] = buffer
        return buffer[:size].view(wanted)

    def words(self, number: int, count: int, dtype: Any) -> tuple[Array, memoryview]:
        """Return an array for raw words, and its bytes; those of a whole block are made once."""
        known = self.blocks.get((number, dtype)) if count == BLOCK else None
        if known is None:
            words = self.get("read", number, count, dtype)
            known = (words, words.view(np.uint8).data)
            if count == BLOCK:
                self.blocks[number, dtype] = known
        return known


@dataclass(slots=True)
class Bound:
    """A formula's parameters, sorted by how a kernel takes them."""

    specification: tuple[tuple[str, int, bool], ...]
    literals: tuple[tuple[str, Any], ...]
    values: tuple[Any, ...]
    elementwise: tuple[str, ...]
    makers: tuple[PerElement | Companion, ...]
    streams: str
    keys: tuple[Any, ...]
    borders: tuple[int, ...]

    def at(self, start: int) -> tuple[Any, ...]:
        """Return the values for elements from `start` on, up to the next border."""
        if not self.borders:
            return self.values
        return tuple(
            value.threshold(start)
            if isinstance(value, Cut)
            else tuple(cut.threshold(start) for cut in value)
            if isinstance(value, tuple) and isinstance(value[0], Cut)
            else value
            for value in self.values
        )


def bind(parameters: Mapping[str, Any], precision: str) -> Bound:
    """Return a formula's parameters sorted by how a kernel of this precision takes them."""
    number = np.float32 if precision == "float32" else np.float64
    specification: list[tuple[str, int, bool]] = []
    literals: list[tuple[str, Any]] = []
    values: list[Any] = []
    makers: dict[str, PerElement | Companion] = {}
    streams = ""
    keys: tuple[Any, ...] = ()
    borders: set[int] = set()

    def typed(value: Any) -> Any:
        if isinstance(value, np.generic | Cut):
            return value
        return np.int64(value) if isinstance(value, int) else number(value)

    for name, value in parameters.items():
        if isinstance(value, bool | str):
            literals.append((name, value))
        elif isinstance(value, PerElement | Companion):
            makers[name] = value
        elif isinstance(value, Streams):
            streams, keys = name, tuple(np.uint64(key) for key in value.keys)
        elif isinstance(value, np.ndarray):
            specification.append((name, 0, True))
            values.append(value)
        elif isinstance(value, tuple):
            whole = all(isinstance(item, int) for item in value)
            specification.append((name, len(value), not whole))
            items = tuple(
                typed(item) if whole or isinstance(item, np.generic | Cut) else number(item) for item in value
            )
            borders.update(item.index + 1 for item in items if isinstance(item, Cut))
            values.append(items)
        else:
            specification.append((name, 0, not isinstance(value, int)))
            values.append(typed(value))
            if isinstance(value, Cut):
                borders.add(value.index + 1)
    ordered = tuple(sorted(borders))
    # What is read comes after what is made, in the order in which pieces have them.
    makers = dict(sorted(makers.items(), key=lambda item: isinstance(item[1], Companion)))
    return Bound(
        tuple(specification),
        tuple(literals),
        tuple(values),
        tuple(makers),
        tuple(makers.values()),
        streams,
        keys,
        ordered,
    )


def parts(start: int, stop: int, borders: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) cut at the borders within it."""
    for border in borders:
        if start < border < stop:
            yield start, border
            start = border
    yield start, stop


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
        self.piece = BLOCK
        self._held: dict[int, _Held] = {}
        self._columns_kept: dict[tuple[int, ...], list[Array]] = {}
        self._memory: Array = np.empty(0, np.uint8)
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
            digests: list[bytes] = []
            for offset in range(0, item.entry.size, block):
                data = self.buffers.get("copy", 0, min(block, item.entry.size - offset), np.uint8).data
                self.readers[item.model].read_into(item.entry, offset, data)
                digests.append(xxhash.xxh3_128_digest(data))
                self.progress(len(data))
            return tensor_digest(digests or [b""])

        return {(item.model, item.entry.name): digest(number) for number, item in enumerate(inputs)}

    # ------------------------------------------------------------ one group of steps

    def _make(self, steps: list[Step], *, parallel: bool) -> None:
        """Run the programs of a group in lock-step, then make its outputs."""
        total = sum(step.elements for step in steps)
        wide = any(step.wide for step in steps)
        offset = 0
        for step in sorted(steps, key=lambda step: step.name):
            step.offset = offset
            offset += step.elements
        programs: list[tuple[Step, Any]] = []
        for step in steps:
            if step.program is None or step.elements == 0:
                nothing = [b""], [[b""] for _ in step.inputs]
                self._finish(step, self._copy(step, parallel) if step.elements else nothing)
                continue
            group = Group(
                step.name,
                step.shape,
                total,
                len(step.models),
                step.base is not None,
                wide,
                step.streams,
                frozenset(step.companions),
                step.measured,
                step.notes,
            )
            program = step.program(group)
            step.strict = hasattr(program, "send")
            programs.append((step, program))
        if len(programs) == 1 and programs[0][0].strict and programs[0][0].kind in {"selection", "rows"}:
            self._hold(programs[0][0], parallel)
        for step, last in self._drive(programs, parallel):
            if isinstance(last, Apply):
                self._finish(step, self._apply(step, last, parallel))
            elif isinstance(last, ApplyRows):
                self._finish(step, self._apply_rows(step, last, parallel))
            else:
                assert isinstance(last, ApplyMatrix)
                self._finish(step, self._apply_matrix(step, last))
            self._held.pop(id(step), None)
            for asked in list(self._columns_kept):  # a copy: other threads add their own
                if asked[0] == id(step):
                    self._columns_kept.pop(asked, None)
            self.buffers.asked = ()

    def _drive(self, programs: list[tuple[Step, Any]], parallel: bool) -> Iterator[tuple[Step, Any]]:
        """Advance programs together, executing the pass they ask for over all their tensors, until each returns one."""
        running: list[tuple[Step, Any, Any]] = []
        for step, program in programs:
            if hasattr(program, "send"):
                running.append((step, program, None))
            else:
                yield step, program
        while running:
            asked: dict[Any, list[tuple[Step, Any, Any]]] = {}
            for step, program, answer in running:
                try:
                    request = program.send(answer)
                except StopIteration as finished:
                    yield step, finished.value
                    continue
                asked.setdefault(type(request), []).append((step, program, request))
            running = []
            for together in asked.values():
                answer = self._execute([(step, request) for step, _, request in together], parallel)
                running.extend((step, program, answer) for step, program, _ in together)

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

    def _hold(self, step: Step, parallel: bool) -> None:
        """Keep the inputs of a step in memory between its passes, if they are small enough.

        It pays from three passes on.
        """
        size = _Held.size(step)
        if size > HOLD_BYTES:
            return
        if parallel:  # such steps are worked on one at a time, by all threads
            if self._memory.size < size:
                self._memory = np.empty(max(size, min(HOLD_BYTES, 2 * size)), np.uint8)
            self._held[id(step)] = _Held(step, self._memory)
        else:
            self._held[id(step)] = _Held(step, self.buffers.get("hold", 0, size, np.uint8))

    def _read(self, step: Step, start: int, stop: int, digests: list[list[bytes]] | None = None) -> list[Array]:
        """Return the raw words of elements [start, stop) of every input; they stay valid until the next call."""
        held = self._held.get(id(step))
        if held is None or start % BLOCK or (stop % BLOCK and stop != step.elements):
            return self._read_words(step, start, stop, digests)
        words = self._held_words(step, held, start, stop)
        if digests is not None:
            for number, known in enumerate(held.digests):
                digests[number].extend(known[start // BLOCK : -(-stop // BLOCK)])
        return words

    def _held_words(self, step: Step, held: _Held, start: int, stop: int) -> list[Array]:
        """Return elements [start, stop) of every input from memory, where they are read once."""
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            if not held.digests[-1][block]:
                first, last = block * BLOCK, min(step.elements, (block + 1) * BLOCK)
                own: list[list[bytes]] = [[] for _ in step.inputs]
                self._read_words(step, first, last, own, [words[first:last] for words in held.words])
                for number, digest in enumerate(own):
                    held.digests[number][block] = digest[0]
        return [words[start:stop] for words in held.words]

    def _read_words(
        self,
        step: Step,
        start: int,
        stop: int,
        digests: list[list[bytes]] | None = None,
        targets: list[Array] | None = None,
    ) -> list[Array]:
        arrays = []
        total = 0
        for number, item in enumerate(step.inputs):
            dtype = dtypes.RAW[item.entry.dtype]
            if targets:
                words, view = targets[number], targets[number].view(np.uint8).data
            else:
                words, view = self.buffers.words(number, stop - start, dtype)
            self.readers[item.model].read_into(item.entry, start * dtype.itemsize, view)
            if digests is not None:
                digests[number].extend(_block_digests(words))
            arrays.append(words)
            total += len(view)
        self.progress(total)
        return arrays

    def _refuse_input(self, step: Step, start: int, stop: int) -> None:
        """Name the first value that is not finite.

        Raises:
            DataError: Always, unless such values are allowed here.
        """
        tolerant = step.kind == "elementwise" and not step.strict
        if self.allow_nonfinite and tolerant:
            return
        for item in step.inputs:
            dtype = dtypes.RAW[item.entry.dtype]
            words = np.empty(stop - start, dtype)
            self.readers[item.model].read_into(item.entry, start * dtype.itemsize, words.view(np.uint8).data)
            values = _widen(words, np.float64)
            bad = np.flatnonzero(~np.isfinite(values))
            if bad.size:
                advice = (
                    "use --allow-nonfinite to pass such values on"
                    if tolerant
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
            digests: list[bytes] = []
            first, last = number * piece, min(size, (number + 1) * piece)
            data = self.buffers.get("copy", 0, last - first, np.uint8).data
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
            digests: list[bytes] = []
            for start, stop, slices in self._pieces(step, first, last, evaluate.makers, inputs):
                words = output[start - first : stop - first]
                flags = evaluate(slices, start, words)
                if flags & 1:
                    self._refuse_input(step, start, stop)
                elif flags:
                    self._refuse_output(step, words, start)
                digests.extend(_block_digests(words))
            data = output.view(np.uint8).data
            self.sink.write(step.name, first * raw.itemsize, data)
            self.progress(len(data))
            return digests, inputs

        return _join(self._map(apply, -(-elements // self.span), parallel), len(step.inputs))

    def _pieces(
        self,
        step: Step,
        first: int,
        last: int,
        makers: Sequence[PerElement | Companion] = (),
        digests: list[list[bytes]] | None = None,
    ) -> Iterator[tuple[int, int, tuple[list[Array], list[Array]]]]:
        """Yield (start, stop, (words of every input, per-element parameters)) over pieces of [first, last)."""
        read = [maker.name for maker in makers if isinstance(maker, Companion)]
        made = [maker for maker in makers if isinstance(maker, PerElement)]
        if not made:
            for start in range(first, last, self.piece):
                stop = min(last, start + self.piece)
                beside = self._companions(step, read, start, stop)
                yield start, stop, (self._read(step, start, stop, digests), beside)
            return
        unit = _slice_size(step.shape)
        low = first - first % unit
        high = min(step.elements, -(-last // unit) * unit)
        columns = self._columns(step, low, high, made)
        for start in range(first, last, self.piece):
            stop = min(last, start + self.piece)
            beside = self._companions(step, read, start, stop)
            words = self._read(step, start, stop, digests)
            yield start, stop, (words, [*(column[start - low : stop - low] for column in columns), *beside])

    def _companions(self, step: Step, names: Sequence[str], start: int, stop: int) -> list[Array]:
        """Return elements [start, stop) of what is read beside the models: an array per name and model."""
        columns: list[Array] = []
        known: dict[tuple[int, str], Array] = {}
        for name in names:
            for item in step.companions[name]:
                key = (item.model, item.entry.name)
                if key not in known:
                    target = self.buffers.get("companion", len(known), stop - start, np.float64)
                    known[key] = self._companion(step, item, start, stop, target)
                columns.append(known[key])
        return columns

    def _companion(self, step: Step, item: Input, start: int, stop: int, target: Array) -> Array:
        if item.entry.dtype == "U8":  # a mask of one bit per element; pieces begin at whole bytes
            packed = self.buffers.get("beside", 0, -(-stop // 8) - start // 8, np.uint8)
            self.readers[item.model].read_into(item.entry, start // 8, packed.data)
            self.progress(packed.nbytes)
            target[:] = np.unpackbits(packed, count=stop - start, bitorder="little")
            return target
        dtype = dtypes.RAW[item.entry.dtype]
        words = self.buffers.get("beside", 0, stop - start, dtype)
        self.readers[item.model].read_into(item.entry, start * dtype.itemsize, words.view(np.uint8).data)
        self.progress(words.nbytes)
        if _kernels().decode(words, target):
            bad = start + int(np.flatnonzero(~np.isfinite(target))[0])
            raise DataError(
                f'cannot merge "{step.name}": "{item.entry.name}" of {self.labels[item.model]} has '
                f"{target[bad - start]} at flat index {bad}; measure it again"
            )
        return target

    def _columns(self, step: Step, low: int, high: int, makers: Sequence[PerElement]) -> list[Array]:
        """Return the per-element parameters of elements [low, high), whole slices: an array per parameter and model.

        The last answer is kept: a slice that is longer than a span is asked for again and again. So are all answers
        for a step of moderate size, whose next pass will ask for them.
        """
        asked = (id(step), low, high, *map(id, makers))
        if self.buffers.asked == asked:
            return self.buffers.columns
        kept = self._columns_kept.get(asked)
        if kept is not None:
            return kept
        models, base = self._slices(step, low, high)
        self.buffers.columns = [
            np.ascontiguousarray(made).reshape(-1)
            for maker in makers
            for made in maker.function(models, base, low, **maker.parameters)
        ]
        self.buffers.asked = asked
        if sum(column.itemsize for column in self.buffers.columns) * step.elements <= KEEP_COLUMNS_BYTES:
            self._columns_kept[asked] = self.buffers.columns
        return self.buffers.columns

    def _evaluator(self, step: Step, formula: Any, parameters: Mapping[str, Any], precision: str) -> Any:
        bound = bind(parameters, precision)
        if len(step.models) > COMPILED_MODELS:
            from graftwork.merge.device import TensorEvaluator

            return TensorEvaluator(step, formula, bound, precision, "cpu")
        return _Evaluator(step, formula, bound, precision, self.buffers, fuse=self.fuse)

    def _slices(self, step: Step, low: int, high: int, *, reuse: bool = True) -> tuple[Array, Array | None]:
        """Return elements [low, high), whole slices along the first axis, as float arrays (models, slices, …).

        They stay valid until the next call, unless they get memory of their own without `reuse`.
        """
        shape = step.shape if len(step.shape) >= 2 else (1, step.elements)
        unit = math.prod(shape[1:])
        target = np.float64 if step.wide else np.float32
        count = len(step.inputs)
        values = (
            self.buffers.get("slices", 0, count * (high - low), target)
            if reuse
            else np.empty(count * (high - low), target)
        ).reshape(count, -1)
        held = self._held.get(id(step))
        words = None if held is None else self._held_words(step, held, low, high)
        for number, item in enumerate(step.inputs):
            if words is None:
                raw = self.buffers.get("words", 0, high - low, dtypes.RAW[item.entry.dtype])
                self.readers[item.model].read_into(item.entry, low * raw.itemsize, raw.view(np.uint8).data)
                self.progress(raw.nbytes)
            else:
                raw = words[number]
            if _kernels().decode(raw, values[number]):
                self._refuse_input(step, low, high)
        shaped = values.reshape(count, (high - low) // unit, *shape[1:])
        return shaped[: len(step.models)], shaped[-1] if step.base is not None else None

    def _row_spans(self, step: Step) -> list[tuple[int, int]]:
        """Return element ranges of as many whole slices as a function over rows gets at a time."""
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
        models, base = self._slices(step, 0, step.elements, reuse=False)
        shaped = models.astype(np.float64).reshape(-1, *step.shape)
        whole = None if base is None else base.astype(np.float64).reshape(step.shape)
        parameters = {
            name: self._whole_companion(step, value) if isinstance(value, Companion) else value
            for name, value in request.parameters.items()
        }
        values = request.function(shaped, whole, 0, **parameters)
        self._write_values(step, np.asarray(values, np.float64).reshape(-1), 0, dtypes.RAW[step.dtype])
        return self._rehash(step, parallel=False)

    def _whole_companion(self, step: Step, companion: Companion) -> list[Array]:
        whole = []
        for item in step.companions[companion.name]:
            values = np.empty(item.entry.elements, np.float64)
            whole.append(self._companion(step, item, 0, values.size, values).reshape(item.entry.shape))
        return whole

    def _write_values(self, step: Step, values: Array, start: int, raw: Any) -> None:
        words = np.empty(values.size, raw)
        if _kernels().encode(values, words):
            self._refuse_output(step, words, start)
        self.sink.write(step.name, start * raw.itemsize, words.view(np.uint8).data)
        self.progress(words.nbytes)

    def _rehash(self, step: Step, parallel: bool) -> tuple[list[bytes], list[list[bytes]]]:
        """Return the digests of a tensor that was not written block by block, from what was written."""
        raw = dtypes.RAW[step.dtype]
        reread = getattr(self.sink, "read_back")  # noqa: B009 - only sinks that can are given such steps

        def hash_span(number: int) -> tuple[list[bytes], list[list[bytes]]]:
            first, last = number * self.span, min(step.elements, (number + 1) * self.span)
            inputs: list[list[bytes]] = [[] for _ in step.inputs]
            digests: list[bytes] = []
            for start in range(first, last, BLOCK):
                stop = min(last, start + BLOCK)
                self._read(step, start, stop, inputs)
                words = self.buffers.get("write", 0, stop - start, raw)
                reread(step.name, start * raw.itemsize, words.view(np.uint8).data)
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
        try:
            totals = np.array([math.fsum(column) for column in np.stack(rows).T.tolist()])
        except (OverflowError, ValueError):
            totals = np.array([math.inf])
        if not np.isfinite(totals).all():
            raise DataError(
                f'cannot merge "{asked[0][0].name}": its values are so large that sums of their products overflow; '
                "leave it out with `exclude`, or use an element-wise method"
            )
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
        narrow = isinstance(request, Sums) and request.narrow and not step.wide
        evaluate = self._reducer(
            step, formula, request.parameters, reducer, terms, request.each, np.float32 if narrow else np.float64
        )

        def reduce(number: int) -> list[Array]:
            first, last = number * self.span, min(step.elements, (number + 1) * self.span)
            sums = []
            for start, stop, slices in self._pieces(step, first, last, evaluate.makers):
                lanes = np.zeros((width, _kernels().LANES))
                if evaluate(slices, start, lanes):
                    self._refuse_input(step, start, stop)
                sums.append(lanes.sum(1))
            return sums

        return [block for part in self._map(reduce, -(-step.elements // self.span), parallel) for block in part]

    def _reducer(
        self,
        step: Step,
        formula: Any,
        parameters: Mapping[str, Any],
        reducer: str,
        terms: int,
        each: bool,
        dtype: Any = np.float64,
    ) -> Any:
        if len(step.models) > COMPILED_MODELS:
            from graftwork.merge.device import TensorReducer

            return TensorReducer(step, formula, bind(parameters, "float64"), reducer, terms, each, dtype, "cpu")
        bound = bind(parameters, "float32" if reducer == "sums" and dtype == np.float32 else "float64")
        return _Reducer(step, formula, bound, reducer, terms, each, self.buffers, dtype, fuse=self.fuse)

    def _row_table(self, step: Step, request: RowTable, parallel: bool) -> Array:
        columns = step.shape[-1] if step.shape else 1
        unit = _slice_size(step.shape)
        spans = self._row_spans(step)

        def table(number: int) -> Array:
            low, high = spans[number]
            models, base = self._slices(step, low, high)
            assert base is not None
            rows = models.reshape(len(step.models), -1, columns)
            return np.asarray(request.function(rows, base.reshape(-1, columns)))

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
    """Finds exact cuts in windows of keys that a sample shows: one pass keeps the keys within, which are then ranked.

    Where a window holds too many keys, or the sample was misleading, histograms narrow it down. A score's key is its
    bits as an integer, which orders non-negative numbers.
    """

    def __init__(self, engine: Engine, asked: list[tuple[Step, Any]], parallel: bool) -> None:
        self.engine = engine
        self.asked = asked
        self.parallel = parallel
        self.request: Select = asked[0][1]
        self.terms = len(self.request.ranks)
        self.total = sum(step.elements for step, _ in asked)
        self.dtype = np.dtype(np.float64 if self.request.wide else np.float32)
        self.key_dtype = np.dtype(np.uint64 if self.request.wide else np.uint32)
        self.largest = int(np.array(np.inf, self.dtype).view(self.key_dtype))
        self.spans = [
            (number, first, min(step.elements, first + engine.span))
            for number, (step, _) in enumerate(asked)
            for first in range(0, step.elements, engine.span)
        ]

    def cuts(self) -> tuple[tuple[Cut, ...], ...]:
        """Return the cuts that were asked for."""
        if self.total <= self.engine.span:
            keys = self._collect([(number, first, last - first) for number, first, last in self.spans])
            return tuple(
                tuple(self._cut(*_rank(keys[row], rank)) if rank > 0 else nothing(self.request.wide) for rank in ranks)
                for row, ranks in enumerate(self.request.ranks)
            )
        wanted = [(row, rank) for row, ranks in enumerate(self.request.ranks) for rank in ranks if rank > 0]
        found = self._search(list(dict.fromkeys(wanted))) if wanted else {}
        return tuple(
            tuple(self._cut(*found[row, rank]) if rank > 0 else nothing(self.request.wide) for rank in ranks)
            for row, ranks in enumerate(self.request.ranks)
        )

    def _cut(self, key: int, index: int) -> Cut:
        return Cut(float(np.array(key, self.key_dtype).view(self.dtype)), index, self.request.wide)

    def _evaluator(self, number: int, reducer: str) -> Any:
        step, own = self.asked[number]
        return self.engine._reducer(step, own.scores, own.parameters, reducer, self.terms, own.each, self.dtype)

    def _collect(self, pieces: Sequence[tuple[int, int, int]]) -> Array:
        """Return the keys of pieces (step, first element, count) as an array (scores, count in all)."""
        keys = np.empty((self.terms, sum(count for _, _, count in pieces)), self.key_dtype)
        filled = 0
        evaluators = {number: self._evaluator(number, "collect") for number, _, _ in pieces}
        for number, first, count in pieces:
            step, evaluate = self.asked[number][0], evaluators[number]
            for start, stop, slices in self.engine._pieces(step, first, first + count, evaluate.makers):
                target = keys[:, filled : filled + stop - start]
                if evaluate(slices, start, (target, step.offset + start)):
                    self.engine._refuse_input(step, start, stop)
                filled += stop - start
        return keys

    def _sampled(self) -> Array:
        """Return the sorted keys of runs spread evenly over the tensors."""
        pieces = []
        for number, (step, _) in enumerate(self.asked):
            runs = max(1, round(_SAMPLE / _RUN * step.elements / self.total))
            runs = min(runs, max(1, step.elements // _RUN))
            for position in range(runs):
                first = position * step.elements // runs
                pieces.append((number, first, min(_RUN, step.elements - first)))
        keys = self._collect(pieces)
        keys.sort(axis=1)
        return keys

    def _search(self, wanted: list[tuple[int, int]]) -> dict[tuple[int, int], tuple[int, int]]:
        """Return, for each (score, rank), the key of that rank and the index of the last admitted element.

        Differences of 16-bit numbers have few distinct magnitudes, so the sample often shows which one it is; a guess
        is confirmed by one cheap pass. Otherwise the keys near the place are kept and ranked; where that fails,
        histograms narrow the window down to one key, which is then confirmed.
        """
        sample = self._sampled()
        size = sample.shape[1]
        windows: dict[tuple[int, int], tuple[int, int]] = {}  # first key, and the one behind the last
        guesses: dict[tuple[int, int], int] = {}
        found: dict[tuple[int, int], tuple[int, int]] = {}
        for row, rank in wanted:
            share = 1 - rank / self.total
            slack = 5 * math.sqrt(share * (1 - share) / size) + 2 / size
            low = int(sample[row, math.floor((share - slack) * size)]) if share > slack else 0
            place = math.ceil((share + slack) * size)
            high = int(sample[row, place]) + 1 if place < size else self.largest + 1
            windows[row, rank] = (low, high)
            guess = sample[row, min(size - 1, int(share * size))]
            equal = np.searchsorted(sample[row], guess, "right") - np.searchsorted(sample[row], guess)
            if equal > slack * size / 2:
                guesses[row, rank] = int(guess)
        share = sum(
            self._share(sample[row], *windows[row, rank]) for row, rank in windows if (row, rank) not in guesses
        )
        if share * self.total * self.key_dtype.itemsize <= KEPT_BYTES:
            found.update(self._gather(windows, guesses))
        while windows:
            if not guesses:
                guesses = self._narrow(windows)
            for place, (above, key, equal, seen) in self._compare(guesses).items():
                low, high = windows[place]
                needed = place[1] - above
                if needed <= 0:  # it lies higher
                    windows[place] = (max(low, key + 1), high) if high > key + 1 else (key + 1, self.largest + 1)
                elif needed > equal:  # it lies lower
                    windows[place] = (low, min(high, key)) if low < key else (0, key)
                else:
                    del windows[place]
                    found[place] = (key, self._last(place[0], key, needed, equal, seen))
            guesses = {}
        return found

    @staticmethod
    def _share(keys: Array, low: int, high: int) -> float:
        """Return the share of sorted keys that lies in a window."""
        first, last = np.searchsorted(keys, [low, high - 1])
        return float(last - first) / keys.size

    def _gather(
        self, windows: dict[tuple[int, int], tuple[int, int]], guesses: dict[tuple[int, int], int]
    ) -> dict[tuple[int, int], tuple[int, int]]:
        """Keep the keys in the windows of places without a guess; find, and take out, the places that lie there."""
        places = [place for place in windows if place not in guesses]
        if not places:
            return {}
        rows = np.array([row for row, _ in places])
        lows = np.array([windows[place][0] for place in places], self.key_dtype)
        widths = np.array([windows[place][1] - windows[place][0] for place in places], self.key_dtype)
        room = max(64, self.engine.span // 8)

        def keep(number: int) -> tuple[list[Array], Array, Array]:
            kept = self.engine.buffers.get("kept", 0, len(places) * room, self.key_dtype).reshape(len(places), room)
            counts, above = np.zeros((2, len(places)), np.int64)
            self._over_span(self.spans[number], "gather", (kept, counts, above, rows, lows, widths))
            return [kept[at, : min(room, count)].copy() for at, count in enumerate(counts)], counts, above

        parts = self.engine._map(keep, len(self.spans), self.parallel)
        found = {}
        for at, place in enumerate(places):
            seen = np.array([counts[at] for _, counts, _ in parts])
            needed = place[1] - sum(int(above[at]) for _, _, above in parts)
            low, high = windows[place]
            if needed <= 0:  # the sample was misleading: it lies higher
                windows[place] = (high, self.largest + 1)
            elif needed > int(seen.sum()):  # or lower
                windows[place] = (0, low)
            elif int(seen.max()) <= room:
                keys = np.concatenate([kept[at] for kept, _, _ in parts])
                key = int(np.partition(keys, keys.size - needed)[keys.size - needed])
                same = np.array([int((kept[at] == key).sum()) for kept, _, _ in parts])
                needed -= int((keys > key).sum())
                found[place] = (key, self._last(place[0], key, needed, int(same.sum()), same))
                del windows[place]
        return found

    def _last(self, row: int, key: int, needed: int, equal: int, seen: Array) -> int:
        """Return the index of the n-th element that has this key, given how many each span has."""
        if needed == equal:
            return self.total - 1
        counted = np.cumsum(seen)
        number = int(np.searchsorted(counted, needed))
        before = int(counted[number - 1]) if number else 0
        return self._find(self.spans[number], row, key, needed - before)

    def _compare(self, guesses: dict[tuple[int, int], int]) -> dict[tuple[int, int], tuple[int, int, int, Array]]:
        """Return, for each guess: keys above it, the guess, keys equal to it, and those by span."""
        rows = np.array([row for row, _ in guesses])
        targets = np.array(list(guesses.values()), self.key_dtype)

        def count(number: int) -> Array:
            counts = np.zeros((2, rows.size), np.int64)
            self._over_span(self.spans[number], "compare", (counts[0], counts[1], rows, targets))
            return counts

        counted = np.array(self.engine._map(count, len(self.spans), self.parallel))
        totals = counted.sum(0)
        return {
            place: (int(totals[0, column]), key, int(totals[1, column]), counted[:, 1, column])
            for column, (place, key) in enumerate(guesses.items())
        }

    def _narrow(self, windows: dict[tuple[int, int], tuple[int, int]]) -> dict[tuple[int, int], int]:
        """Narrow every window down to one key by histograms; return these keys."""
        keys: dict[tuple[int, int], int] = {}
        while len(keys) < len(windows):
            places = [place for place in windows if place not in keys]
            spans = [windows[place] for place in places]
            bits = max(8, WINDOW_BITS - (len(places) - 1).bit_length())
            shifts = [max(0, (high - low - 1).bit_length() - bits) for low, high in spans]
            above, counts = self._histogram([row for row, _ in places], spans, shifts)
            for position, place in enumerate(places):
                low, high = windows[place]
                rank = place[1] - int(above[position])
                from_top = np.cumsum(counts[position][::-1])
                if rank <= 0:  # the sample was misleading: it lies higher
                    windows[place] = (high, self.largest + 1)
                elif rank > int(from_top[-1]):  # or lower
                    windows[place] = (0, low)
                else:
                    bin_ = from_top.size - 1 - int(np.searchsorted(from_top, rank))
                    first = low + (bin_ << shifts[position])
                    windows[place] = (first, min(high, first + (1 << shifts[position])))
                    if not shifts[position]:
                        keys[place] = first
        return keys

    def _find(self, span: tuple[int, int, int], row: int, key: int, needed: int) -> int:
        """Return the index of the n-th element of a span that has this key."""
        found = np.full(1, -1, np.int64)
        counts = np.zeros(1, np.int64)
        state = (counts, found, np.array([row]), np.array([key], self.key_dtype), np.array([needed]))
        self._over_span(span, "find", state)
        return int(found[0])

    def _histogram(self, rows: list[int], windows: list[tuple[int, int]], shifts: list[int]) -> tuple[Array, Array]:
        """Return how many keys lie above each window, and the counts of its bins."""
        lows = np.array([low for low, _ in windows], self.key_dtype)
        widths = np.array([high - low for low, high in windows], self.key_dtype)
        bins = max((high - low - 1 >> shift) + 1 for (low, high), shift in zip(windows, shifts, strict=True))
        above = np.zeros(len(rows), np.int64)
        total = np.zeros((len(rows), bins), np.int64)
        lock = threading.Lock()
        queue = iter(self.spans)

        def work(number: int) -> None:
            own_above, own = np.zeros_like(above), np.zeros(total.shape, np.uint32)
            state = (own, own_above, np.array(rows), lows, widths, np.array(shifts, self.key_dtype))
            while True:
                with lock:
                    span = next(queue, None)
                if span is None:
                    break
                self.engine._check_stop()
                self._over_span(span, "histogram", state)
            with lock:
                np.add(total, own, out=total)
                np.add(above, own_above, out=above)

        self.engine._map(work, self.engine.threads if self.parallel else 1, self.parallel)
        return above, total

    def _over_span(self, span: tuple[int, int, int], reducer: str, state: Any) -> None:
        number, first, last = span
        step = self.asked[number][0]
        evaluate = self._evaluator(number, reducer)
        for start, stop, slices in self.engine._pieces(step, first, last, evaluate.makers):
            if evaluate(slices, start, state):
                self.engine._refuse_input(step, start, stop)


def _rank(keys: Array, rank: int) -> tuple[int, int]:
    """Return the key of this rank from the top, and the index of the last admitted element that has it."""
    size = keys.size
    key = int(np.partition(keys, size - rank)[size - rank])
    needed = rank - int((keys > key).sum())
    return key, int(np.flatnonzero(keys == key)[needed - 1])


class _Evaluator:
    """Calls the kernel of a formula that writes the output, decoding and encoding around it where it is not fused."""

    def __init__(
        self, step: Step, formula: Any, bound: Bound, precision: str, buffers: _Buffers, *, fuse: bool
    ) -> None:
        self.makers = bound.makers
        self.bound = bound
        self.buffers = buffers
        self.precision = np.dtype(precision)
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
            streams=bound.streams,
        )

    def __call__(self, slices: tuple[list[Array], list[Array]], start: int, words: Array) -> int:
        """Write the output words of the elements from `start` on; return the kernel's flags."""
        inputs, columns = slices
        first = start + self.offset
        if self.fused:
            return self._run([*inputs, *columns], first, words)
        flags = 0
        kernels = _kernels()
        result = self.buffers.get("result", 0, _STRIP, self.precision)
        for low in range(0, words.size, _STRIP):
            high = min(words.size, low + _STRIP)
            decoded = []
            for number, item in enumerate(inputs):
                values = self.buffers.get("decoded", number, high - low, self.precision)
                flags |= kernels.decode(item[low:high], values)
                decoded.append(values)
            part = result[: high - low]
            self._run([*decoded, *(column[low:high] for column in columns)], first + low, part)
            flags |= kernels.encode(part, words[low:high])
        return flags

    def _run(self, arrays: list[Array], start: int, output: Array) -> int:
        extra = _extra(self.bound, self.buffers)
        if not self.bound.borders:
            return int(self.kernel(*arrays, start, *self.bound.values, *extra, output))
        flags = 0
        for low, high in parts(start, start + output.size, self.bound.borders):
            pieces = [array[low - start : high - start] for array in arrays]
            flags |= self.kernel(*pieces, low, *self.bound.at(low), *extra, output[low - start : high - start])
        return flags


class _Reducer:
    """Calls the kernel of a formula whose values are reduced."""

    def __init__(
        self,
        step: Step,
        formula: Any,
        bound: Bound,
        reducer: str,
        terms: int,
        each: bool,
        buffers: _Buffers,
        dtype: Any,
        *,
        fuse: bool,
    ) -> None:
        self.makers = bound.makers
        self.bound = bound
        self.buffers = buffers
        self.offset = step.offset
        self.terms = terms
        self.scratch = np.dtype(dtype)
        self.sums = reducer in {"sums", "gram"}
        narrow = reducer == "sums" and self.scratch == np.float32
        self.keys = np.dtype(np.uint32 if self.scratch == np.float32 else np.uint64)
        words = {item.entry.dtype for item in step.inputs}
        self.fused = (fuse and len(words) == 1) or words <= {"F32"} or words <= {"F64"}
        self.wide = np.float64 if step.wide else np.float32
        self.kernel = _kernels().kernel(
            formula,
            len(step.models),
            step.base is not None,
            "float32" if narrow else "float64",
            bound.specification,
            bound.literals,
            "narrow sums" if narrow else reducer,
            terms,
            each,
            bound.elementwise,
            bound.streams,
        )

    def __call__(self, slices: tuple[list[Array], list[Array]], start: int, state: Any) -> int:
        """Reduce the elements from `start` on into `state`; return 1 if an input is not finite."""
        inputs, columns = slices
        first = start + self.offset
        if self.fused:
            return self._run([*inputs, *columns], first, state)
        flags = 0
        size = inputs[0].size
        for low in range(0, size, _STRIP):
            high = min(size, low + _STRIP)
            decoded = []
            for number, item in enumerate(inputs):
                values = self.buffers.get("decoded", number, high - low, self.wide)
                flags |= _kernels().decode(item[low:high], values)
                decoded.append(values)
            flags |= self._run([*decoded, *(column[low:high] for column in columns)], first + low, state)
        return flags

    def _run(self, arrays: list[Array], start: int, state: Any) -> int:
        strip = self.buffers.get("strip", 0, self.terms * _kernels().STRIP, self.scratch).reshape(self.terms, -1)
        keys = strip if self.sums else strip.view(self.keys)
        extra = _extra(self.bound, self.buffers)
        flags = 0
        for low, high in parts(start, start + arrays[0].size, self.bound.borders):
            pieces = [array[low - start : high - start] for array in arrays] if self.bound.borders else arrays
            flags |= self.kernel(*pieces, low, *self.bound.at(low), *extra, strip, keys, state)
        return flags


def _extra(bound: Bound, buffers: _Buffers) -> tuple[Any, ...]:
    """Return what a kernel with random words needs besides: the keys, and room for a strip of words."""
    if not bound.streams:
        return ()
    count = len(bound.keys)
    return bound.keys, buffers.get("draws", 0, count * (_kernels().STRIP // 2), np.uint64).reshape(count, -1)


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
    if words.size <= BLOCK:
        yield xxhash.xxh3_128_digest(words.view(np.uint8).data)
        return
    for start in range(0, words.size, BLOCK):
        yield xxhash.xxh3_128_digest(words[start : start + BLOCK].view(np.uint8).data)


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
