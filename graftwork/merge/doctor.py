"""Looks at a finished model and says in words what looks wrong with it.

`verify` finds what is certainly broken: bytes, index, configuration. Here are besides those the signs of a merge that
went wrong while every file is in order: layers that have lost their size, weights that no longer point where any parent
points, tokens without a row, rows of zeros, biases that the configuration promises and nobody has.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graftwork.merge import lineage
from graftwork.merge.checkpoint import BLOCK, Checkpoint, TensorEntry, listed, numpy_values, quoted, read_json_object
from graftwork.merge.dtypes import BITS, MERGEABLE
from graftwork.merge.errors import CheckpointError
from graftwork.merge.layers import find_stacks, is_head_side, layer_of, model_order
from graftwork.merge.tokenizer_plan import vocabulary_tensors
from graftwork.merge.tokens import Vocabulary, read_vocabulary
from graftwork.merge.verify import Verification, verify

LEAST_RATIO = 0.8
"""A layer whose norm is below this share of its smallest parent's has cancelled: the mean of two models in unrelated
directions has 0.71, that of n models 1/√n, while fine-tunes of one model lose next to nothing."""

MOST_RATIO = 1.25
"""A layer above this multiple of its largest parent's norm was scaled up; beyond `FAR_RATIO` it counts as wrong."""

FAR_RATIO = 2.0

UNRELATED = 0.5
"""Below this cosine between their weights, two models hardly come from one ancestor."""

_FAR_ROW = 20.0
_SHOWN = 4

_FLAGS = {
    "attention_bias": re.compile(r"(q_proj|k_proj|v_proj|o_proj|qkv|query_key_value|c_attn)\.bias$"),
    "mlp_bias": re.compile(r"(gate_proj|up_proj|down_proj|c_fc|fc1|fc2)\.bias$"),
}  # fmt: skip
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@dataclass(frozen=True, slots=True)
class Part:
    """The matrices of one layer, or of what is before or after the layers.

    Args:
        name: Its name.
        norm: Frobenius norm of its matrices.
        parents: The same for each parent, over the same tensors; None for one that lacks some of them.
        cosines: Cosine of the angle to each parent.
    """

    name: str
    norm: float
    parents: tuple[float | None, ...]
    cosines: tuple[float | None, ...]

    @property
    def ratio(self) -> float | None:
        """The norm by the nearer end of the range of the parents' norms: 1 if it is among them; None without any."""
        known = [value for value in self.parents if value]
        if not known:
            return None
        return self.norm / min(known) if self.norm < min(known) else max(self.norm / max(known), 1.0)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What looks wrong with a model.

    Args:
        verification: What is broken for certain.
        problems: All that is wrong, one line each, that included.
        oddities: What may be meant, but seldom is.
        notes: What is worth knowing.
        parts: Norms by layer.
        against: What the parents are called.
        lineage: The parents that the model's own metadata name.
    """

    verification: Verification
    problems: tuple[str, ...]
    oddities: tuple[str, ...]
    notes: tuple[str, ...]
    parts: tuple[Part, ...]
    against: tuple[str, ...]
    lineage: tuple[str, ...]

    @property
    def is_well(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def record(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "path": self.verification.path,
            "is_well": self.is_well,
            "tensors": self.verification.tensors,
            "parameters": self.verification.values,
            "digest": self.verification.digest,
            "lineage": list(self.lineage),
            "against": list(self.against),
            "problems": list(self.problems),
            "odd": list(self.oddities),
            "notes": list(self.notes),
            "parts": [
                {
                    "part": part.name, "norm": part.norm, "ratio": part.ratio, "parents": list(part.parents),
                    "cosines": list(part.cosines),
                }
                for part in self.parts
            ],
        }  # fmt: skip


def diagnose(
    checkpoint: Checkpoint,
    against: Mapping[str, Checkpoint] | None = None,
    *,
    threads: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Diagnosis:
    """Read a model, and perhaps what it was made from, and return what looks wrong.

    Args:
        checkpoint: The model.
        against: Models that it was made from, by name; norms are compared with theirs.
        threads: How many tensors are read at a time.
        progress: Called with the number of bytes read since the last call.
    """
    return _Doctor(checkpoint, dict(against or {}), threads, progress or (lambda size: None)).run()


def bytes_to_read(checkpoint: Checkpoint, against: Mapping[str, Checkpoint]) -> int:
    """Return how many bytes `diagnose` reads."""
    measured = [entry for entry in checkpoint.tensors.values() if entry.dtype in MERGEABLE]
    total = sum(entry.size for entry in checkpoint.tensors.values()) + sum(entry.size for entry in measured)
    for parent in against.values():
        total += sum(found.size for entry in measured if (found := _counterpart(parent, entry)) is not None)
    return total


def _counterpart(parent: Checkpoint, entry: TensorEntry) -> TensorEntry | None:
    """Return the tensor of a parent that stands for one of the model's: of the same name and shape."""
    found = parent.tensors.get(entry.name)
    return found if found is not None and found.shape == entry.shape and found.dtype in MERGEABLE else None


@dataclass(slots=True)
class _Measured:
    """Sums over one tensor, in float64: products of the model and its parents with each other."""

    products: np.ndarray[Any, np.dtype[np.float64]]
    present: tuple[bool, ...]
    rows: np.ndarray[Any, np.dtype[np.float64]] | None = None


@dataclass(slots=True)
class _Doctor:
    checkpoint: Checkpoint
    against: dict[str, Checkpoint]
    threads: int
    progress: Callable[[int], None]
    problems: list[str] = field(default_factory=list)
    oddities: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self) -> Diagnosis:
        verification = verify(self.checkpoint, threads=self.threads, progress=self.progress)
        self.problems += verification.problems
        self.notes += verification.notes
        entries = [entry for entry in self.checkpoint.tensors.values() if entry.dtype in MERGEABLE]
        self.vocabulary = self._vocabulary()
        by_token = vocabulary_tensors(self.checkpoint)
        with ThreadPoolExecutor(max(1, self.threads), thread_name_prefix="doctor") as pool:
            measured = list(pool.map(lambda entry: self._measure(entry, entry.name in by_token), entries))
        self.measured = dict(zip((entry.name for entry in entries), measured, strict=True))
        self._flags()
        self._token_ids()
        for name in by_token:
            self._rows(name)
        parts = self._parts()
        self._sizes(parts)
        self._tensors()
        self._missing()
        found = [str(parent.get("name", "?")) for parent in lineage.own_parents(self.checkpoint.metadata)]
        if found and not self.against:
            self.notes.append(f"made from {listed(found, _SHOWN)}; give them with --against to compare norms")
        return Diagnosis(
            verification, tuple(self.problems), tuple(self.oddities), tuple(self.notes), tuple(parts),
            tuple(self.against), tuple(found),
        )  # fmt: skip

    # ------------------------------------------------------------ reading

    vocabulary: Vocabulary | None = None
    measured: dict[str, _Measured] = field(default_factory=dict)

    def _measure(self, entry: TensorEntry, by_row: bool) -> _Measured:
        """Return the products of a tensor and its counterparts with each other, and the norms of its rows."""
        found = [(parent, _counterpart(parent, entry)) for parent in self.against.values()]
        readers = [(self.checkpoint, entry), *((parent, other) for parent, other in found if other is not None)]
        products = np.zeros((len(readers), len(readers)))
        width = entry.elements // entry.shape[0] if by_row and entry.shape and entry.shape[0] else 0
        rows: list[np.ndarray[Any, np.dtype[np.float64]]] = []
        # Whole rows where rows are looked at, so that none lies in two blocks.
        block = max(1, BLOCK // width) * width if width else BLOCK
        for start in range(0, entry.elements, block):
            count = min(block, entry.elements - start)
            values = np.stack([self._values(owner, item, start, count) for owner, item in readers])
            with np.errstate(all="ignore"):  # values that are not finite have been reported
                products += values @ values.T
            if width:
                rows.append(np.sqrt(np.square(values[0].reshape(-1, width)).sum(axis=1)))
        present = tuple(other is not None for _, other in found)
        return _Measured(products, present, np.concatenate(rows) if rows else None)

    def _values(
        self, owner: Checkpoint, entry: TensorEntry, start: int, count: int
    ) -> np.ndarray[Any, np.dtype[np.float64]]:
        width = BITS[entry.dtype] // 8
        buffer = bytearray(count * width)
        owner.read_into(entry, start * width, memoryview(buffer))
        self.progress(len(buffer))
        values = numpy_values(entry.dtype, buffer)
        assert values is not None
        return values.astype(np.float64)

    # ------------------------------------------------------------ configuration and tokens

    def _vocabulary(self) -> Vocabulary | None:
        if self.checkpoint.folder is None:
            return None
        try:
            return read_vocabulary(self.checkpoint.folder)
        except CheckpointError as error:
            self.problems += error.problems
            return None

    def _flags(self) -> None:
        """Compare what the configuration says of biases with the tensors."""
        config = self.checkpoint.config or {}
        text = config.get("text_config")
        for key, pattern in _FLAGS.items():
            flag = config.get(key, text.get(key) if isinstance(text, dict) else None)
            found = [name for name in self.checkpoint.tensors if pattern.search(name)]
            if flag is True and not found:
                self.problems.append(
                    f"config.json says {key} = true, and no tensor is such a bias: loaders make them up"
                )
            elif flag is False and found:
                self.problems.append(
                    f"config.json says {key} = false, and there are {len(found)} such biases ({quoted(found[0])} …): "
                    "loaders drop them"
                )

    def _token_ids(self) -> None:
        """Look for ids beyond the rows that there are."""
        folder, vocabulary = self.checkpoint.folder, self.vocabulary
        rows = [entry.shape[0] for entry in vocabulary_tensors(self.checkpoint).values()]
        if folder is None or not rows:
            return
        least = min(rows)
        if vocabulary is not None and vocabulary.size > least:
            lost = [token for token, number in vocabulary.ids.items() if number >= least]
            self.problems.append(
                f"{len(lost)} tokens of {vocabulary.source} have no row in the embedding ({least:,} rows): "
                f"{listed(lost, _SHOWN)}"
            )
        elif vocabulary is not None and vocabulary.size < least:
            self.notes.append(f"{least - vocabulary.size:,} rows of the embedding belong to no token")
        for name in ("config.json", "generation_config.json"):
            if not (folder / name).is_file():
                continue
            config = read_json_object(folder / name, doing=f"cannot look at {quoted(folder)}")
            text = config.get("text_config")
            for key in _TOKEN_IDS:
                value = config.get(key, text.get(key) if isinstance(text, dict) else None)
                for number in value if isinstance(value, list) else [value]:
                    if type(number) is int and number >= least:
                        self.problems.append(f"{name} says {key} = {number}, the embedding has {least:,} rows")
                    elif type(number) is int and vocabulary is not None and number not in vocabulary.ids.values():
                        self.oddities.append(f"{name} says {key} = {number}, which is no token of {vocabulary.source}")

    def _rows(self, name: str) -> None:
        """Look for rows of tokens that are zero, or far larger than the others."""
        norms = self.measured[name].rows if name in self.measured else None
        if norms is None or norms.size == 0 or not np.isfinite(norms).all() or not norms.any():
            return
        tokens = {number: token for token, number in self.vocabulary.ids.items()} if self.vocabulary else {}
        used = np.array([not tokens or number in tokens for number in range(norms.size)])
        zero = np.flatnonzero((norms == 0) & used)
        if zero.size:
            self.oddities.append(
                f"{zero.size:,} of {norms.size:,} rows of {quoted(name)} are zero: {self._tokens(zero, tokens)}"
            )
        typical = float(np.median(norms[norms > 0]))
        far = np.flatnonzero(norms > _FAR_ROW * typical)
        if far.size:
            self.oddities.append(
                f"{far.size:,} of {norms.size:,} rows of {quoted(name)} are more than {_FAR_ROW:g} times as large "
                f"as the middle one: {self._tokens(far, tokens)}"
            )

    @staticmethod
    def _tokens(numbers: np.ndarray[Any, np.dtype[np.intp]], tokens: Mapping[int, str]) -> str:
        shown = [
            f"{number} ({json.dumps(tokens[int(number)], ensure_ascii=False)})"
            if int(number) in tokens
            else f"{number}"
            for number in numbers[:_SHOWN]
        ]
        return ", ".join(shown) + (" …" if len(numbers) > _SHOWN else "")

    # ------------------------------------------------------------ sizes and directions

    def _groups(self) -> dict[str, list[str]]:
        """Return the matrices of every layer, and of what is before and after the layers, in the model's order."""
        stacks = find_stacks(self.checkpoint.tensors)
        groups: dict[str, list[str]] = {}
        for name in model_order(list(self.measured), stacks):
            if len(self.checkpoint.tensors[name].shape) < 2:
                continue
            layer = layer_of(name, stacks)
            if layer is None:
                key = "after the layers" if is_head_side(name) else "before the layers"
                key = key if stacks else name
            else:
                key = f"{layer[0].prefix}.{layer[1]}".lstrip(".")
            groups.setdefault(key, []).append(name)
        return groups

    def _parts(self) -> list[Part]:
        parts = []
        for key, names in self._groups().items():
            own, theirs, inner, alone = 0.0, [], [], 0.0
            totals = np.zeros((len(self.against), 3))
            complete = [True] * len(self.against)
            for name in names:
                found = self.measured[name]
                alone += float(found.products[0, 0])
                place = 0
                for number, is_present in enumerate(found.present):
                    if not is_present:
                        complete[number] = False
                        continue
                    place += 1
                    totals[number] += found.products[0, 0], found.products[place, place], found.products[0, place]
            for number, (mine, other, both) in enumerate(totals):
                # Over the tensors that both have: the whole part unless some shapes differ.
                whole = complete[number] and other > 0 and mine > 0
                theirs.append(math.sqrt(other) if whole else None)
                inner.append(float(both / math.sqrt(mine * other)) if whole else None)
            own = math.sqrt(alone) if math.isfinite(alone) else math.inf
            parts.append(Part(key, own, tuple(theirs), tuple(inner)))
        return parts

    def _sizes(self, parts: Sequence[Part]) -> None:
        """Judge the norms of layers by those of the parents."""
        ratios = [(part, part.ratio) for part in parts]
        small = [(part.name, ratio) for part, ratio in ratios if ratio is not None and ratio < LEAST_RATIO]
        if small:
            least = min(small, key=lambda item: item[1])
            self.problems.append(
                f"{_spoken(small)}: the norm is as small as {least[1]:.2f} of the smallest of the parents' "
                f"({least[0]}); {self._why_small()}"
            )
        for bound, end, place in (
            (FAR_RATIO, math.inf, self.problems), (MOST_RATIO, FAR_RATIO, self.oddities),
        ):  # fmt: skip
            large = [(part.name, ratio) for part, ratio in ratios if ratio is not None and bound < ratio <= end]
            if large:
                most = max(large, key=lambda item: item[1])
                place.append(
                    f"{_spoken(large)}: the norm is as large as {most[1]:.2f} times the largest of the parents' "
                    f"({most[0]}); task vectors add up: try smaller weights or lambda"
                )
        away = [
            (part.name, max(known)) for part in parts if part.name not in dict(small)
            and (known := [value for value in part.cosines if value is not None]) and max(known) < UNRELATED
        ]  # fmt: skip
        if away:
            self.problems.append(
                f"{_spoken(away)}: the weights point where no parent's do (largest cosine "
                f"{max(value for _, value in away):.2f}); are these its parents, in this layout?"
            )

    def _why_small(self) -> str:
        """Return the likely reason of lost norms: parents in unrelated directions cancel each other."""
        count = len(self.against)
        gram = np.zeros((count, count))
        for name, found in self.measured.items():
            if all(found.present) and len(self.checkpoint.tensors[name].shape) >= 2:
                gram += found.products[1:, 1:]
        norms = np.sqrt(np.diag(gram))
        if count < 2 or not np.isfinite(norms).all() or not norms.all():
            return "values were lost: look at weights, density and rescaling"
        cosine = gram / np.outer(norms, norms)
        least = float(cosine[~np.eye(count, dtype=bool)].min())
        if least < UNRELATED:
            return (
                f"the parents' weights point in unrelated directions (cosine {least:.2f}) and cancel each other: match "
                "their units first (graftwork match), then merge"
            )
        return f"the parents are relatives (cosine {least:.2f}), so weights or density are too small"

    def _tensors(self) -> None:
        """Name tensors that stand out for themselves."""
        stray: list[str] = []
        for name, found in self.measured.items():
            shape = self.checkpoint.tensors[name].shape
            own, theirs = found.products[0, 0], np.diag(found.products)[1:]
            if own == 0 and theirs.size and theirs.min() > 0:
                self.problems.append(f"{quoted(name)} is zero, and in none of the parents is it")
            elif own == 0 and len(shape) >= 2 and math.prod(shape):
                self.oddities.append(f"{quoted(name)} holds nothing but zeros")
            elif theirs.size and theirs.min() > 0 and math.isfinite(own):
                low, high = math.sqrt(own / theirs.min()), math.sqrt(own / theirs.max())
                if low < 1 / FAR_RATIO or high > FAR_RATIO:
                    stray.append(f"{quoted(name)} ({low if low < 1 else high:.2f})")
        if stray:
            more = f" and {len(stray) - _SHOWN} more" if len(stray) > _SHOWN else ""
            self.oddities.append(
                "the norm of these tensors is less than half or more than twice that of every parent: "
                f"{', '.join(stray[:_SHOWN])}{more}"
            )

    def _missing(self) -> None:
        """Compare the names of tensors with the parents'."""
        for label, parent in self.against.items():
            lost = [name for name in parent.tensors if name not in self.checkpoint.tensors]
            other = [
                name for name in self.measured if name not in parent.tensors
                or parent.tensors[name].shape != self.checkpoint.tensors[name].shape
            ]  # fmt: skip
            kept = [name for name in lost if not _is_layer(name, parent)]
            if kept:
                line = f"{len(kept)} tensors of {label} are not in the model: {listed(kept, _SHOWN)}"
                (self.problems if not all(_may_be_tied(name) for name in kept) else self.notes).append(line)
            if other:
                self.notes.append(
                    f"{len(other)} tensors have no counterpart of their name and shape in {label}: "
                    f"{listed(other, _SHOWN)}"
                )


def _is_layer(name: str, parent: Checkpoint) -> bool:
    """Return whether a tensor is in a layer, of which slices may leave whole ones out."""
    return layer_of(name, find_stacks(parent.tensors)) is not None


def _may_be_tied(name: str) -> bool:
    return name.split(".")[-2:-1] in (["lm_head"], ["embed_out"]) or name.endswith((".inv_freq", ".position_ids"))


def _spoken(items: Sequence[tuple[str, float]]) -> str:
    """Return the names of parts, shortened."""
    names = [name for name, _ in items]
    return ", ".join(names) if len(names) <= _SHOWN else f"{len(names)} parts, from {names[0]} to {names[-1]}"


def part_rows(diagnosis: Diagnosis) -> Iterator[list[str]]:
    """Yield the table of norms by layer, one row for each part: name, norm, ratio, cosine to each parent."""
    for part in diagnosis.parts:
        ratio = part.ratio
        yield [
            part.name, f"{part.norm:.5g}", *(["–" if ratio is None else f"{ratio:.3f}"] if diagnosis.against else []),
            *("–" if value is None else f"{value:.4f}" for value in part.cosines),
        ]  # fmt: skip
