"""What crosses the wire: the only place that knows Flower's records and their keys.

A message's content has

* `arrays`, an ArrayRecord: tensors by flat name, each in the format of `numpy.save`. Flower has no bfloat16 and no
  float8; these travel as the unsigned integers that hold their bits, and `graftwork["dtypes"]` says so.
* `config`, a ConfigRecord: the algorithm's own small values.
* `metrics`, a MetricRecord (replies): the client's numbers, with `num-examples`.
* `graftwork`, a ConfigRecord: what the runtime adds. In requests `round`, `rounds`, `question`; in replies `site`.

Message types are `train`, `evaluate`, and `query` for the roll call and for an algorithm's questions.

**Nothing that came over the network is believed.** How many tensors, names and numbers there are, and how many bytes,
is compared with what was asked for before anything is decoded; a tensor's dtype and shape are compared with the bytes
that are there before it is looked at, and its words are not copied. A reply that is not what it should be raises
`ValueError` and nothing else, so that its site has failed and the run goes on.
"""

from __future__ import annotations

import functools
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from graftwork.federated.algorithms.base import Form, Scalar
from graftwork.federated.errors import FederationError
from graftwork.merge import dtypes
from graftwork.merge.checkpoint import quoted

if TYPE_CHECKING:
    from torch import Tensor

    Values = np.ndarray[Any, np.dtype[Any]]
    Raw = tuple[str, Values]
    """The code of a dtype and the raw words of a tensor, as `merge_arrays` takes them."""

ARRAYS: Final = "arrays"
CONFIG: Final = "config"
METRICS: Final = "metrics"
OWN: Final = "graftwork"
EXAMPLES: Final = "num-examples"

ROLL_CALL: Final = "roll-call"
"""The question that every node answers with its site's name."""

MOST_TENSORS: Final = 100_000
LONGEST_NAME: Final = 1_000
"""Characters of a tensor's or a number's name, and of a site's."""
MOST_NUMBERS: Final = 1_000
"""Metrics, or small values, of one message."""
MOST_EXAMPLES: Final = 1e12
"""A client that says more stand behind its answer is not believed."""
LARGEST_OPEN: Final = 1 << 30
"""Bytes of an answer whose size was not known beforehand."""
LONGEST_REASON: Final = 300
"""Characters of what a client says went wrong."""
_UNREADABLE = (ValueError, TypeError, KeyError, EOFError, SyntaxError, OverflowError, RecursionError, MemoryError)
"""What a header that nobody's numpy has written can raise."""
_MOST_DIMENSIONS = 16
_HEADER = 4_096
"""Bytes in front of a tensor's values, at most."""

_CODES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "float32": "F32", "float64": "F64",
    "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "complex64": "C64",
}  # fmt: skip
"""torch's names → the codes of safetensors."""
_NAMES = {code: name for name, code in _CODES.items()}
_CARRIERS = {"BF16": "uint16", "F8_E4M3": "uint8", "F8_E5M2": "uint8"}
"""Numpy dtypes that carry what numpy lacks."""
_NUMPY_NAMES = frozenset(_CODES) - {"bfloat16", "float8_e4m3fn", "float8_e5m2"}
_WIDTHS = {name: np.dtype(_CARRIERS.get(code, name)).itemsize for name, code in _CODES.items()}
"""Bytes of a value, by torch's names."""


# ---------------------------------------------------------------------------------------------------------------------
# Tensors ↔ raw words


def raw_of(tensor: Tensor) -> Raw:
    """Return a tensor's dtype code and its raw words; they share memory with it where that is possible."""
    import torch

    code = _CODES.get(str(tensor.dtype).removeprefix("torch."))
    if code is None:
        raise FederationError(
            f"cannot send a tensor of {tensor.dtype}; convert it to a floating-point or integer dtype"
        )
    plain = tensor.detach().cpu().contiguous()
    if code in _CARRIERS:
        same_size = torch.int16 if plain.element_size() == 2 else torch.uint8
        return code, plain.view(same_size).numpy().view(dtypes.RAW[code])
    values = plain.numpy()
    return code, values.view(dtypes.RAW[code]) if code in dtypes.RAW else values


def tensor_of(raw: Raw) -> Tensor:
    """Return a tensor with a copy of raw words."""
    import torch

    code, words = raw
    if code in _CARRIERS:
        words = np.array(words.view(np.int16 if code == "BF16" else np.uint8))
        return torch.from_numpy(words).view(getattr(torch, _NAMES[code]))
    return torch.from_numpy(np.array(words.view(np.float16) if code == "F16" else words))


def form_of(raw: Raw) -> Form:
    """Return what raw words look like as a tensor."""
    return Form(_NAMES[raw[0]], tuple(raw[1].shape))


def float_values(raw: Raw) -> Values:
    """Return the values of a floating-point tensor in float32 or wider; float32 and float64 are not copied."""
    code, words = raw
    if code in ("F32", "F64"):
        return words
    if code == "F16":
        return words.view(np.float16).astype(np.float32)
    if code == "BF16":
        return (words.astype(np.uint32) << 16).view(np.float32)
    result: Values = tensor_of(raw).float().numpy()
    return result


def is_float(code: str) -> bool:
    """Return whether a dtype code stands for floating-point numbers that can be averaged."""
    return code in dtypes.MERGEABLE


# ---------------------------------------------------------------------------------------------------------------------
# Raw words ↔ Flower's arrays


@functools.lru_cache(maxsize=4096)
def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the header that `numpy.save` writes for an array in row-major order."""
    stream = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, description)
    return stream.getvalue()


def _array_of(raw: Raw) -> Array:
    code, words = raw
    carried = words.view(_CARRIERS.get(code, _NAMES[code]))
    shape = tuple(int(size) for size in carried.shape)
    name = carried.dtype.name
    data = b"".join((_header(name, shape), np.ascontiguousarray(carried).reshape(-1).view(np.uint8).data))
    return Array(name, shape, "numpy.ndarray", data)


def _raw_from(array: Array, code: str | None) -> Raw:
    """Return the words of an array without copying them.

    Raises:
        ValueError: It is not what it says.
    """
    if isinstance(array, LocalArray):
        return array.raw
    if array.stype != "numpy.ndarray":
        raise ValueError(f"is serialised as {readable(array.stype)}, not as numpy.ndarray")
    if array.dtype not in _NUMPY_NAMES:
        raise ValueError(f"has the unknown dtype {readable(array.dtype)}")
    shape, data, dtype = tuple(array.shape), array.data, np.dtype(array.dtype)
    if len(shape) > _MOST_DIMENSIONS or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"has the shape {readable(shape)}")
    count = math.prod(shape)
    header = _header(array.dtype, shape)
    start, is_fortran = len(header), False
    if not data.startswith(header):
        start, is_fortran = _other_header(data, dtype, shape)
    if len(data) - start != count * dtype.itemsize:
        raise ValueError(f"has {len(data) - start} bytes for {count} values of {dtype}")
    values = np.frombuffer(data, dtype, count=count, offset=start)
    if is_fortran:
        return _coded(np.ascontiguousarray(values.reshape(shape[::-1]).T), code)
    return _coded(values.reshape(shape), code)


def _other_header(data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[int, bool]:
    """Return where the values begin, and whether columns come first, after a header that numpy could have written."""
    stream = io.BytesIO(data[:_HEADER])
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    held_shape, is_fortran, held = read(stream, max_header_size=_HEADER)
    if held.byteorder == ">":
        raise ValueError("is big-endian")
    if held != dtype or tuple(held_shape) != shape:
        raise ValueError(f"says that it is {dtype} {shape}, and holds {held} {readable(held_shape)}")
    return stream.tell(), bool(is_fortran)


def readable(value: object) -> str:
    """Return what somebody else wrote, for a message: one line, printable, not long."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(each if each.isprintable() else " " for each in text[: 4 * LONGEST_REASON])
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1] + "…"


def _coded(values: Values, code: str | None) -> Raw:
    if code is not None:
        if _CARRIERS.get(code) != values.dtype.name:
            raise ValueError(f"is {values.dtype}, which does not carry {code}")
        return code, values.view(dtypes.RAW[code])
    found = _CODES.get(values.dtype.name)
    if found is None:
        raise ValueError(f"has the dtype {values.dtype}")
    return found, values.view(dtypes.RAW[found]) if found in dtypes.RAW else values


class LocalArray(Array):
    """An array that stays in this process: it refers to a tensor's words, and makes bytes of them only when asked.

    Pickled it becomes a plain Array, so what comes from elsewhere never is one.
    """

    raw: Raw
    size: int
    """Bytes that it would have."""

    @classmethod
    def of(cls, raw: Raw) -> LocalArray:
        """Return an array that shares memory with raw words."""
        code, words = raw
        name = _CARRIERS.get(code, _NAMES[code])
        # Flower's own constructor checks and copies more than there is to a few words.
        self = cls.__new__(cls)
        size = len(_header(name, words.shape)) + words.nbytes
        self.__dict__.update(dtype=name, shape=words.shape, stype="numpy.ndarray", raw=raw, size=size)
        return self

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """Its bytes, as they would cross the wire."""
        return _array_of(self.raw).data

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tensors as Flower sends them.

    Args:
        record: The arrays.
        dtypes: JSON of the dtypes that numpy lacks, by name.
        size: Bytes of the arrays.
    """

    record: ArrayRecord
    dtypes: str
    size: int


class Encoder:
    """Turns tensors into Flower's arrays, each tensor object once: what goes to all sites is serialised once.

    Args:
        is_local: Whether they stay in this process, so that nothing is serialised.
    """

    def __init__(self, *, is_local: bool = False) -> None:
        self._make: Callable[[Raw], Array] = LocalArray.of if is_local else _array_of
        self._done: dict[int, tuple[Tensor, Array]] = {}
        self._records: dict[tuple[Any, ...], tuple[Mapping[str, Tensor], Encoded]] = {}

    def record(self, tensors: Mapping[str, Tensor]) -> Encoded:
        """Return the tensors encoded; the same tensors under the same names are the same record."""
        key = (tuple(tensors), *map(id, tensors.values()))
        held = self._records.get(key)
        if held is not None:
            return held[1]
        record = ArrayRecord()  # filled one by one: given all at once, it would copy them
        odd: dict[str, str] = {}
        for name in sorted(tensors):
            tensor = tensors[name]
            known = self._done.get(id(tensor))
            if known is None:
                known = (tensor, self._make(raw_of(tensor)))
                self._done[id(tensor)] = known
            record[name] = known[1]
            code = _CODES[str(tensor.dtype).removeprefix("torch.")]
            if code in _CARRIERS:
                odd[name] = code
        encoded = Encoded(record, json.dumps(odd), size_of(record))
        self._records[key] = (dict(tensors), encoded)  # who holds them keeps their identities from being used again
        return encoded


def decode_arrays(record: ArrayRecord, odd: Mapping[str, str]) -> dict[str, Raw]:
    """Return raw words by name.

    Raises:
        ValueError: An array is not what it says; the message names it.
    """
    found: dict[str, Raw] = {}
    for name, array in record.items():
        try:
            found[name] = _raw_from(array, odd.get(name))
        except (
            ValueError,
            TypeError,
            KeyError,
            EOFError,
            SyntaxError,
            OverflowError,
            RecursionError,
            MemoryError,
        ) as e:
            raise ValueError(f"tensor {quoted(readable(name))} {readable(str(e))}") from None
    return found


def _check_sizes(record: ArrayRecord, forms: Mapping[str, Form] | None) -> None:
    """Compare how many tensors and bytes there are with what was asked for; nothing is decoded yet."""
    count = len(record)
    if forms is None and count > MOST_TENSORS:
        raise ValueError(f"its answer has {count} tensors; {MOST_TENSORS} are the most")
    if forms is not None and count > len(forms):
        unknown = next(name for name in record if name not in forms)
        raise ValueError(f"its answer has {quoted(readable(unknown))}, which nobody asked for")
    longest = max((len(name) for name in record), default=0)
    if longest > LONGEST_NAME:
        raise ValueError(f"its answer has a name of {longest} characters")
    room = largest_size(forms)
    size = size_of(record)
    if size > room:
        raise ValueError(f"its answer has {size} bytes; {room} are the most")


def largest_size(forms: Mapping[str, Form] | None) -> int:
    """Return the most bytes of an answer of given forms, with the headers of its tensors."""
    if forms is None or any(size < 0 for form in forms.values() for size in form.shape):
        return LARGEST_OPEN
    return sum(bytes_of(form) + _HEADER for form in forms.values())


def bytes_of(form: Form) -> int:
    """Return the bytes of a tensor's values; dimensions of any size count as none."""
    return math.prod(max(0, size) for size in form.shape) * _WIDTHS.get(form.dtype, 8)


def _odd_dtypes(own: ConfigRecord) -> dict[str, str]:
    """Return the dtypes that numpy lacks, by name of the tensor."""
    text = own.get("dtypes", "{}")
    if not isinstance(text, str) or len(text) > MOST_TENSORS * 100:
        raise ValueError("its list of dtypes is no text, or too long")
    try:
        odd = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("its list of dtypes cannot be read") from None
    if not isinstance(odd, dict) or not all(isinstance(code, str) for code in odd.values()):
        raise ValueError("its list of dtypes cannot be read")
    return odd


# ---------------------------------------------------------------------------------------------------------------------
# Requests and replies


@dataclass(frozen=True, slots=True)
class Request:
    """What a client is asked.

    Args:
        kind: `train`, `evaluate` or `query`.
        round: Number of the round; 0 before the rounds.
        rounds: How many there will be.
        question: What a query asks.
        tensors: What is sent, by flat name.
        config: The algorithm's small values.
        is_local: Whether it comes from this process.
    """

    kind: str
    round: int
    rounds: int
    question: str = ""
    tensors: Mapping[str, Raw] = field(default_factory=dict)
    config: Mapping[str, Scalar] = field(default_factory=dict)
    is_local: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What a reply holds, decoded but not yet judged.

    Args:
        site: Who says to have sent it.
        examples: How many examples are said to stand behind it.
        tensors: Raw words by flat name.
        metrics: Numbers.
        is_local: Whether all tensors come from our own worker in this process, which has seen that they are finite.
    """

    site: str
    examples: float
    tensors: Mapping[str, Raw]
    metrics: Mapping[str, float]
    is_local: bool = False


def request_content(
    request: Request, config: Mapping[str, Scalar], encoder: Encoder, tensors: Mapping[str, Tensor]
) -> tuple[RecordDict, int]:
    """Return a request's content and the number of bytes of its tensors."""
    encoded = encoder.record(tensors)
    own: dict[str, Any] = {
        "round": request.round,
        "rounds": request.rounds,
        "question": request.question,
        "dtypes": encoded.dtypes,
    }
    content = RecordDict({ARRAYS: encoded.record, CONFIG: ConfigRecord({**config}), OWN: ConfigRecord(own)})
    return content, encoded.size


def read_request(message: Message) -> Request:
    """Return what a message asks.

    Raises:
        FederationError: It is none of ours.
    """
    content = message.content
    own = content.get(OWN)
    arrays, config = content.get(ARRAYS, ArrayRecord()), content.get(CONFIG, ConfigRecord())
    if not isinstance(own, ConfigRecord) or not isinstance(arrays, ArrayRecord) or not isinstance(config, ConfigRecord):
        raise FederationError("cannot read a message: it was not sent by graftwork's server")
    if len(arrays) > MOST_TENSORS or len(config) > MOST_NUMBERS:
        raise FederationError(f"cannot read a message: it has {len(arrays)} tensors and {len(config)} small values")
    try:
        tensors = decode_arrays(arrays, _odd_dtypes(own))
        number, rounds = _whole(own, "round"), _whole(own, "rounds")
    except ValueError as error:
        raise FederationError(f"cannot read a message: {error}") from None
    return Request(
        kind=message.metadata.message_type.partition(".")[0],
        round=number,
        rounds=rounds,
        question=str(own.get("question", "")),
        tensors=tensors,
        config={key: value for key, value in config.items() if isinstance(value, bool | int | float | str)},
        is_local=any(isinstance(array, LocalArray) for array in arrays.values()),
    )


def _whole(record: ConfigRecord, key: str) -> int:
    value = record.get(key, 0)
    if not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise ValueError(f"its {key} is {readable(value)}")
    return value


def reply_content(
    site: str,
    tensors: Mapping[str, Tensor],
    examples: float,
    metrics: Mapping[str, float],
    *,
    is_local: bool = False,
) -> RecordDict:
    """Return the content of a reply; what stays in this process shares memory with the tensors."""
    encoded = Encoder(is_local=is_local).record(tensors)
    numbers: dict[str, Any] = {EXAMPLES: float(examples), **{key: float(value) for key, value in metrics.items()}}
    own: dict[str, Any] = {"site": site, "dtypes": encoded.dtypes}
    return RecordDict({ARRAYS: encoded.record, METRICS: MetricRecord(numbers), OWN: ConfigRecord(own)})


def read_answer(message: Message, forms: Mapping[str, Form] | None = None) -> Answer:
    """Return what a reply holds.

    Args:
        message: The reply.
        forms: What was asked for; None for anything.

    Raises:
        ValueError: It cannot be read; the message says what is wrong.
    """
    try:
        return _answer(message, forms)
    except ValueError:
        raise
    except Exception as error:  # whatever it holds, it must not end the run
        raise ValueError(f"its reply cannot be read: {readable(f'{type(error).__name__}: {error}')}") from None


def _answer(message: Message, forms: Mapping[str, Form] | None) -> Answer:
    if not message.has_content():
        raise ValueError("its reply is empty")
    content = message.content
    own, arrays, metrics = content.get(OWN), content.get(ARRAYS), content.get(METRICS)
    if (
        not isinstance(own, ConfigRecord)
        or not isinstance(arrays, ArrayRecord)
        or not isinstance(metrics, MetricRecord)
    ):
        missing = [key for key in (OWN, ARRAYS, METRICS) if key not in content]
        raise ValueError(f"its reply has no {', '.join(missing) or 'record of the right kind'}")
    if len(metrics) > MOST_NUMBERS or any(len(key) > LONGEST_NAME for key in metrics):
        raise ValueError(f"its reply has {len(metrics)} numbers, or names of more than {LONGEST_NAME} characters")
    numbers = {key: _float(key, value) for key, value in metrics.items() if isinstance(value, int | float)}
    if EXAMPLES not in numbers:
        raise ValueError("its reply does not say how many examples stand behind it")
    site = own.get("site", "")
    if not isinstance(site, str) or len(site) > LONGEST_NAME:
        raise ValueError("its reply does not say which site it comes from")
    _check_sizes(arrays, forms)
    tensors = decode_arrays(arrays, _odd_dtypes(own))
    examples = numbers.pop(EXAMPLES)
    is_local = all(isinstance(array, LocalArray) for array in arrays.values())
    return Answer(site, examples, tensors, numbers, is_local)


def _float(key: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"its number {quoted(readable(key))} is too large") from None


def size_of(record: ArrayRecord) -> int:
    """Return the bytes of a record's arrays."""
    return sum(array.size if isinstance(array, LocalArray) else len(array.data) for array in record.values())
