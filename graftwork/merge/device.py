"""The same passes on a GPU (or any torch device): formulas run on tensors instead of being compiled.

Reading, writing, digests and scheduling are the CPU engine's. Results may differ from the CPU's by one unit in the last
place in rare entries, because sums over a tensor are formed in another order; selections and random masks are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from graftwork.merge.engine import Array, Bound, Engine, Reader, Sink, Step, bind, parts
from graftwork.merge.errors import DependencyError
from graftwork.merge.passes import Companion, PerElement

if TYPE_CHECKING:
    from torch import Tensor

DEVICE_SPAN = 4_194_304
"""Elements that are sent to the device at a time."""


def chosen_device(name: str) -> str:
    """Return the torch device for `cpu`, `cuda`, `cuda:N` or `auto` (a GPU if there is one).

    Raises:
        DependencyError: There is no such device.
    """
    if name == "cpu":
        return name
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        number = name.partition(":")[2] or "0"
        if not number.isdigit() or int(number) >= count:
            raise DependencyError(
                f'cannot use the device "{name}": torch {torch.__version__} finds {count} GPUs; use `cpu` or `auto`'
            )
    return name


class DeviceEngine(Engine):
    """Executes steps on a torch device; takes what `Engine` takes, and the device's name."""

    def __init__(
        self,
        readers: Sequence[Reader],
        sink: Sink,
        labels: Sequence[str],
        *,
        device: str,
        threads: int = 1,
        allow_nonfinite: bool = False,
        progress: Callable[[int], None] | None = None,
        span: int = DEVICE_SPAN,
    ) -> None:
        super().__init__(
            readers, sink, labels, threads=threads, allow_nonfinite=allow_nonfinite, progress=progress, span=span
        )
        self.device = device
        self.piece = span

    def _evaluator(self, step: Step, formula: Any, parameters: Mapping[str, Any], precision: str) -> Any:
        return TensorEvaluator(step, formula, bind(parameters, precision), precision, self.device)

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
        return TensorReducer(step, formula, bind(parameters, "float64"), reducer, terms, each, dtype, self.device)


class _OnDevice:
    """What evaluating a formula on tensors needs, whatever becomes of the values."""

    def __init__(self, step: Step, formula: Any, bound: Bound, precision: str, device: str) -> None:
        import torch

        self.formula = formula
        self.bound = bound
        self.makers: tuple[PerElement | Companion, ...] = bound.makers
        self.models = len(step.models)
        self.offset = step.offset
        self.codes = [item.entry.dtype for item in step.inputs]
        self.device = torch.device(device)
        self.precision = getattr(torch, precision)

    def load(self, words: Sequence[Array]) -> tuple[list[Tensor], bool]:
        """Return the inputs' values on the device, and whether one is not finite."""
        values = [
            decoded(item, code, self.device).to(self.precision) for item, code in zip(words, self.codes, strict=True)
        ]
        bad = any(not bool(value.isfinite().all()) for value in values)
        return values, bad

    def arguments(self, start: int, count: int, columns: Sequence[Array]) -> dict[str, Any]:
        """Return the formula's parameters for elements from `start` on."""
        import torch

        arguments: dict[str, Any] = dict(self.bound.literals)
        for (name, _, _), value in zip(self.bound.specification, self.bound.at(start), strict=True):
            if isinstance(value, np.ndarray):
                arguments[name] = torch.from_numpy(value).to(self.device)
            elif isinstance(value, tuple):
                arguments[name] = tuple(_scalar(item) for item in value)
            else:
                arguments[name] = _scalar(value)
        for number, name in enumerate(self.bound.elementwise):
            mine = columns[number * self.models : (number + 1) * self.models]
            arguments[name] = tuple(_column(column).to(self.device) for column in mine)
        if self.bound.streams:
            arguments[self.bound.streams] = tuple(draws(int(key), start, count, self.device) for key in self.bound.keys)
        return arguments

    def index(self, start: int, count: int) -> Tensor:
        """Return the flat indices of elements from `start` on."""
        import torch

        return torch.arange(start, start + count, device=self.device)


class TensorEvaluator(_OnDevice):
    """Writes the output words of a formula."""

    def __init__(self, step: Step, formula: Any, bound: Bound, precision: str, device: str) -> None:
        super().__init__(step, formula, bound, precision, device)
        self.code = step.dtype

    def __call__(self, slices: tuple[list[Array], list[Array]], start: int, words: Array) -> int:
        """Write the output words of the elements from `start` on; return the flags of a kernel."""
        inputs, columns = slices
        flags = 0
        first = start + self.offset
        for low, high in parts(first, first + words.size, self.bound.borders):
            here = slice(low - first, high - first)
            values, bad = self.load([item[here] for item in inputs])
            arguments = self.arguments(low, high - low, [column[here] for column in columns])
            result = self.formula(tuple(values[: self.models]), values[-1 if len(values) > self.models else 0],
                                  self.index(low, high - low), **arguments)  # fmt: skip
            encoded_words, wrong = encoded(result, self.code)
            words[here] = encoded_words.view(words.dtype)
            flags |= (1 if bad else 0) | (2 if wrong else 0)
        return flags


class TensorReducer(_OnDevice):
    """Reduces the values of a formula."""

    def __init__(
        self, step: Step, formula: Any, bound: Bound, reducer: str, terms: int, each: bool, dtype: Any, device: str
    ) -> None:
        super().__init__(step, formula, bound, "float64", device)
        self.reducer = reducer
        self.each = each
        self.keys = np.dtype(np.uint32 if np.dtype(dtype) == np.float32 else np.uint64)
        self.per_model = {name for name, length, _ in bound.specification if length} | set(bound.elementwise)
        self.per_model |= {bound.streams} if bound.streams else set()

    def __call__(self, slices: tuple[list[Array], list[Array]], start: int, state: Any) -> int:
        """Reduce the elements from `start` on into `state`; return 1 if an input is not finite."""
        inputs, columns = slices
        flags = 0
        first = start + self.offset
        for low, high in parts(first, first + inputs[0].size, self.bound.borders):
            here = slice(low - first, high - first)
            values, bad = self.load([item[here] for item in inputs])
            terms = self._terms(values, low, high - low, [column[here] for column in columns])
            self._reduce(terms, low, state)
            flags |= 1 if bad else 0
        return flags

    def _terms(self, values: list[Tensor], start: int, count: int, columns: Sequence[Array]) -> list[Tensor]:
        arguments = self.arguments(start, count, columns)
        index = self.index(start, count)
        models, base = tuple(values[: self.models]), values[-1 if len(values) > self.models else 0]
        if not self.each:
            return list(self.formula(models, base, index, **arguments))
        terms: list[Tensor] = []
        for number, model in enumerate(models):
            own = {name: value[number] if name in self.per_model else value for name, value in arguments.items()}
            terms.extend(self.formula(model, models, base, index, **own))
        return terms

    def _reduce(self, terms: list[Tensor], start: int, state: Any) -> None:
        import torch

        if self.reducer == "sums":
            state[:, 0] += [_sum(term.double()) for term in terms]
            return
        if self.reducer == "gram":
            rows = torch.stack([term.double() for term in terms])
            product = (rows @ rows.T).cpu().numpy()
            state[:, 0] += product[np.triu_indices(len(terms))]
            return
        keys = [term.cpu().numpy().view(self.keys) for term in terms]
        if self.reducer == "collect":
            target, origin = state
            for row, key in enumerate(keys):
                target[row, start - origin : start - origin + key.size] = key
        elif self.reducer == "gather":
            kept, counts, above, rows, lows, widths = state
            for window, row in enumerate(rows):
                key = keys[row]
                high = np.uint64(lows[window]) + np.uint64(widths[window])
                above[window] += int((key.astype(np.uint64) >= high).sum())
                inside = key[key - lows[window] < widths[window]]
                room = kept[window, min(counts[window], kept.shape[1]) :]
                room[: inside.size] = inside[: room.size]
                counts[window] += inside.size
        elif self.reducer == "histogram":
            counts, above, rows, lows, widths, shifts = state
            for window, row in enumerate(rows):
                key = keys[row]
                above[window] += int(
                    (key.astype(np.uint64) >= np.uint64(lows[window]) + np.uint64(widths[window])).sum()
                )
                distance = key - lows[window]
                inside = distance[distance < widths[window]] >> shifts[window]
                counts[window] += np.bincount(inside.astype(np.int64), minlength=counts.shape[1])
        elif self.reducer == "compare":
            above, equal, rows, targets = state
            for window, row in enumerate(rows):
                above[window] += int((keys[row] > targets[window]).sum())
                equal[window] += int((keys[row] == targets[window]).sum())
        else:
            counts, found, rows, targets, wanted = state
            for window, row in enumerate(rows):
                hits = np.flatnonzero(keys[row] == targets[window])
                needed = int(wanted[window] - counts[window])
                if 0 < needed <= hits.size:
                    found[window] = start + int(hits[needed - 1])
                counts[window] += hits.size


def _sum(values: Tensor) -> float:
    """Return the sum; on a CPU by numpy, whose order does not hang on a number of threads."""
    return float(values.numpy().sum() if values.device.type == "cpu" else values.sum())


def _scalar(value: Any) -> Any:
    """Return a plain number for tensors to combine with; a threshold keeps its type, which `distance` looks at."""
    return value if isinstance(value, np.float32 | np.float64) else int(value)


def _column(column: Array) -> Tensor:
    import torch

    return torch.from_numpy(column.astype(np.int64) if column.dtype == np.uint32 else np.ascontiguousarray(column))


def decoded(words: Array, code: str, device: Any) -> Tensor:
    """Return raw words as values on a device."""
    import torch

    plain = {"BF16": (np.int16, torch.bfloat16), "F16": (np.int16, torch.float16), "F32": (np.float32, torch.float32),
             "F64": (np.float64, torch.float64), "F8_E4M3": (np.uint8, torch.float8_e4m3fn),
             "F8_E5M2": (np.uint8, torch.float8_e5m2)}  # fmt: skip
    raw, dtype = plain[code]
    tensor = torch.from_numpy(words.view(raw).copy()).to(device).view(dtype)
    return tensor.float() if tensor.dtype not in (torch.float32, torch.float64) else tensor


def encoded(values: Tensor, code: str) -> tuple[Array, bool]:
    """Return values rounded once to raw words, and whether one of them is not finite."""
    import torch

    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
             "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # fmt: skip
    if values.dtype == torch.float64 and code not in {"F32", "F64"}:
        values = _round_to_odd(values)
    result = values.to(kinds[code])
    wrong = not bool(result.float().isfinite().all()) if code != "F64" else not bool(result.isfinite().all())
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[result.element_size()]
    words: Array = result.view(bits).cpu().numpy()
    return words, wrong


def _round_to_odd(values: Tensor) -> Tensor:
    """Return float32 values from which a further rounding gives what one rounding of the float64 values would."""
    import torch

    near = values.float()
    rest = values - near.double()
    bits = near.view(torch.int32)
    step = torch.where((rest > 0) == (near > 0), 1, -1).to(torch.int32)
    inexact = (rest != 0) & rest.isfinite() & (near != 0) & ((bits & 1) == 0)
    return torch.where(inexact, bits + step, bits).view(torch.float32)


def draws(key: int, start: int, count: int, device: Any) -> Tensor:
    """Return the 32-bit random words of elements from `start` on, as int64."""
    import torch

    index = torch.arange(start, start + count, device=device)
    word = (index >> 1) + 1
    word = word * _signed(0x9E3779B97F4A7C15) + _signed(key)
    word = (word ^ _shifted(word, 30)) * _signed(0xBF58476D1CE4E5B9)
    word = (word ^ _shifted(word, 27)) * _signed(0x94D049BB133111EB)
    word = word ^ _shifted(word, 31)
    return torch.where((index & 1) == 1, _shifted(word, 32), word & 0xFFFFFFFF)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def _shifted(word: Tensor, count: int) -> Tensor:
    """Return a logical shift to the right."""
    return (word >> count) & ((1 << (64 - count)) - 1)
