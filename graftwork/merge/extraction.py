"""Finds the LoRA adapter that turns a base into a fine-tuned model, as nearly as its rank allows.

Per matrix, with Δ = W - W_base in float64, the truncated singular value decomposition Δ ≈ U S Vᵀ gives B = U √S and
A = √S Vᵀ, stored in float32; the error is the tail of the singular values (Eckart and Young), and is reported.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from graftwork.merge import dtypes
from graftwork.merge.adapter import CONFIG
from graftwork.merge.artifact import parent_of, save_artifact
from graftwork.merge.checkpoint import Checkpoint, listed, numpy_values, quoted
from graftwork.merge.errors import DataError, MismatchError, OutputError, RecipeError
from graftwork.merge.writer import check_output

Array = np.ndarray[Any, np.dtype[np.float64]]

WEIGHTS = "adapter_model.safetensors"
_EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "tok_embeddings", "position_embeddings")
_HEADS = ("lm_head", "embed_out", "score", "classifier")
_TRANSPOSED = {"gpt2": ("c_attn", "c_proj", "c_fc"), "openai-gpt": ("c_attn", "c_proj", "c_fc")}
_TASKS = {
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExtractionSettings:
    """How an adapter is extracted.

    Args:
        rank: Largest rank of a matrix.
        energy: Keep the least rank that has this share of Σσ², up to `rank`; None for always `rank`.
        error: Keep the least rank whose relative error ‖Δ - BA‖/‖Δ‖ is not larger, up to `rank`.
        epsilon: Leave out singular values that are not larger than this.
        embeddings: Decompose embeddings, too, instead of storing those that changed whole.
        include: Regular expressions; modules in whose name one is found are decomposed; empty for all.
        exclude: Regular expressions of modules that are left as the base has them.
        whole: Names, or last parts of names, of modules that are stored whole.
        skip: Leave out tensors that can be neither decomposed nor stored, instead of stopping.
    """

    rank: int = 128
    energy: float | None = None
    error: float | None = None
    epsilon: float = 0.0
    embeddings: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    skip: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant."""
        problems = []
        if self.rank < 1:
            problems.append(f"rank: is {self.rank}, has to be at least 1")
        for name in ("energy", "error"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                problems.append(f"{name}: is {value:g}, has to be above 0 and at most 1")
        if self.energy is not None and self.error is not None:
            problems.append("energy and error are two ways to say one thing; give one")
        if not 0 <= self.epsilon < math.inf:
            problems.append(f"epsilon: is {self.epsilon:g}, has to be a number that is not negative")
        for pattern in (*self.include, *self.exclude):
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(f"{quoted(pattern)} is no regular expression: {error}")
        if problems:
            raise RecipeError(problems)


@dataclass(frozen=True, slots=True)
class Extracted:
    """What became of one module.

    Args:
        module: Its name.
        rank: Rank of the two factors; 0 for one that is stored whole.
        energy: Share of Σσ² that the rank keeps.
        error: ‖Δ - BA‖/‖Δ‖ in the Frobenius norm.
    """

    module: str
    rank: int
    energy: float
    error: float


@dataclass(slots=True)
class Extraction:
    """What was extracted.

    Args:
        out: The adapter's folder.
        modules: What became of each module that changed.
        left_out: Tensors that changed and are not in the adapter.
        unchanged: How many tensors are equal in both models.
        size: Bytes of the adapter's tensors.
    """

    out: Path
    modules: list[Extracted] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    unchanged: int = 0
    size: int = 0


def extract_adapter(
    model: Checkpoint,
    base: Checkpoint,
    out: Path,
    settings: ExtractionSettings | None = None,
    *,
    base_name: str | None = None,
    force: bool = False,
    progress: Callable[[int], None] = lambda count: None,
) -> Extraction:
    """Write the adapter that turns `base` into `model` in PEFT's form, and return what it holds.

    Matrices become two factors; norms, heads, embeddings and biases that changed are stored whole; what did not change
    is not stored. The folder is written beside its place and renamed.

    Args:
        model: The fine-tuned model.
        base: What it was fine-tuned from.
        out: The adapter's folder.
        settings: Ranks, and what is decomposed.
        base_name: What `base_model_name_or_path` says; the base's path by default.
        force: Replace a folder that exists.
        progress: Called with the bytes of each pair of tensors that is done.

    Raises:
        MismatchError: The models do not have the same tensors.
        DataError: A tensor holds NaN or infinities.
        OutputError: The folder cannot be written.
    """
    chosen = settings or ExtractionSettings()
    check_output(out, force=force, inputs=[model.path, base.path])
    _check_alike(model, base, skip=chosen.skip)
    work = _Work(model, base, chosen, Extraction(out))
    for name in model.tensors:
        if name in base.tensors and model.tensors[name].shape == base.tensors[name].shape:
            work.add(name)
            progress(model.tensors[name].size + base.tensors[name].size)
    work.add_whole()
    if not work.tensors:
        raise MismatchError(f"cannot extract an adapter: {quoted(model.path)} and {quoted(base.path)} are equal")
    work.result.size = sum(values.nbytes for values in work.tensors.values())
    _write(out, work, base_name or str(base.path), force=force)
    return work.result


def _check_alike(model: Checkpoint, base: Checkpoint, *, skip: bool) -> None:
    problems = []
    missing = sorted(base.tensors.keys() - model.tensors.keys())
    extra = sorted(model.tensors.keys() - base.tensors.keys())
    shapes = [
        name for name in model.tensors.keys() & base.tensors.keys()
        if model.tensors[name].shape != base.tensors[name].shape
    ]  # fmt: skip
    for names, what in ((missing, "the model lacks"), (extra, "the base lacks"), (sorted(shapes), "shapes differ:")):
        if names:
            problems.append(
                f"cannot extract an adapter: {what} {listed(names)}; leave them out with --skip-undecomposable"
            )
    if problems and not skip:
        raise MismatchError(*problems)


class _Work:
    """Collects the adapter's tensors."""

    def __init__(self, model: Checkpoint, base: Checkpoint, settings: ExtractionSettings, result: Extraction) -> None:
        self.model, self.base, self.settings, self.result = model, base, settings, result
        self.tensors: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}
        self.ranks: dict[str, int] = {}
        self.whole: dict[str, None] = {}
        self.biases: list[str] = []
        self.transposed = False
        config = model.config or base.config or {}
        self.transposing = _TRANSPOSED.get(str(config.get("model_type")), ())

    def add(self, name: str) -> None:
        """Take one tensor into account."""
        entry = self.model.tensors[name]
        if entry.dtype not in dtypes.MERGEABLE or self.base.tensors[name].dtype not in dtypes.MERGEABLE:
            if self.model.read(name) != self.base.read(name):
                self.result.left_out.append(name)
            else:
                self.result.unchanged += 1
            return
        module, _, part = name.rpartition(".")
        if any(re.search(pattern, module) for pattern in self.settings.exclude):
            return
        delta = self._values(self.model, name) - self._values(self.base, name)
        if not delta.any():
            self.result.unchanged += 1
            return
        leaf = module.rpartition(".")[2]
        is_embedding = leaf in _EMBEDDINGS
        asked = module in self.settings.whole or leaf in self.settings.whole
        include = self.settings.include
        included = not include or any(re.search(pattern, module) for pattern in include)
        plain = part == "weight" and delta.ndim >= 2 and leaf not in _HEADS and not asked and included
        if plain and (not is_embedding or self.settings.embeddings):
            self._decompose(module, leaf, delta, is_embedding)
        elif part == "bias" and f"{module}.weight" in self.model.tensors and leaf not in _HEADS and delta.ndim == 1:
            self.biases.append(module)
        elif part in {"weight", "bias"}:
            self.whole[module] = None
        else:
            self.result.left_out.append(name)

    def add_whole(self) -> None:
        """Take what is stored as it is: modules that are not decomposed, and biases of those that are."""
        for module in self.biases:
            weight = self.model.tensors[f"{module}.weight"]
            if module in self.whole or len(weight.shape) >= 2:
                continue
            self.whole[module] = None  # a norm whose bias changed
        for module in self.whole:
            for part in ("weight", "bias"):
                if f"{module}.{part}" in self.model.tensors:
                    self._store(module, part)
            self.result.modules.append(Extracted(module, 0, 1.0, 0.0))
        for module in self.biases:
            if module not in self.whole:
                self._store(module, "bias")

    def _store(self, module: str, part: str) -> None:
        inside = ".base_layer" if module in self.ranks else ""  # where PEFT keeps the rest of an adapted layer
        values = self._values(self.model, f"{module}.{part}")
        self.tensors[f"base_model.model.{module}{inside}.{part}"] = values.astype(np.float32)

    def _decompose(self, module: str, leaf: str, delta: Array, is_embedding: bool) -> None:
        import torch

        is_transposed = leaf in self.transposing
        flat = delta.reshape(delta.shape[0], -1)
        matrix = np.ascontiguousarray(flat.T) if is_transposed or is_embedding else flat
        left, sizes, right = (item.numpy() for item in torch.linalg.svd(torch.from_numpy(matrix), full_matrices=False))
        squares = sizes**2
        total = float(squares.sum())
        rank = self._rank(sizes, squares, total)
        root = np.sqrt(sizes[:rank])
        b, a = left[:, :rank] * root, root[:, None] * right[:rank]
        shape = delta.shape
        if is_embedding:
            names = ("lora_embedding_A", "lora_embedding_B")
        else:
            names = ("lora_A.weight", "lora_B.weight")
            if delta.ndim > 2:
                a, b = a.reshape(rank, *shape[1:]), b.reshape(shape[0], rank, *(1,) * (delta.ndim - 2))
        for key, values in zip(names, (a, b), strict=True):
            self.tensors[f"base_model.model.{module}.{key}"] = np.ascontiguousarray(values, np.float32)
        self.ranks[module] = rank
        self.transposed = self.transposed or is_transposed
        tail = float(squares[rank:].sum())
        self.result.modules.append(Extracted(module, rank, 1 - tail / total, math.sqrt(tail / total)))

    def _rank(self, sizes: Array, squares: Array, total: float) -> int:
        """Return how many singular values are kept, at least one."""
        most = min(self.settings.rank, int((sizes > self.settings.epsilon).sum()))
        tails = np.concatenate([np.cumsum(squares[::-1])[::-1][1:], [0.0]])  # of 1, 2, … kept values
        if self.settings.energy is not None:
            most = min(most, 1 + int(np.argmax(tails <= (1 - self.settings.energy) * total)))
        if self.settings.error is not None:
            most = min(most, 1 + int(np.argmax(np.sqrt(tails) <= self.settings.error * math.sqrt(total))))
        return max(1, most)

    def _values(self, checkpoint: Checkpoint, name: str) -> Array:
        entry = checkpoint.tensors[name]
        values = numpy_values(entry.dtype, checkpoint.read(name))
        assert values is not None
        wide = values.astype(np.float64).reshape(entry.shape)
        if not np.isfinite(wide).all():
            raise DataError(
                f"cannot extract an adapter: {quoted(name)} of {quoted(checkpoint.path)} holds NaN or infinities"
            )
        return wide

    def config(self, base_name: str) -> dict[str, Any]:
        """Return what `adapter_config.json` holds."""
        common = Counter(self.ranks.values()).most_common(1)[0][0] if self.ranks else 8
        other = {module: rank for module, rank in sorted(self.ranks.items()) if rank != common}
        architectures = (self.model.config or self.base.config or {}).get("architectures") or [""]
        task = next((word for end, word in _TASKS.items() if str(architectures[0]).endswith(end)), None)
        return {
            "alpha_pattern": other,
            "base_model_name_or_path": base_name,
            "bias": "all" if any(module not in self.whole for module in self.biases) else "none",
            "fan_in_fan_out": self.transposed,
            "inference_mode": True,
            "lora_alpha": common,
            "lora_dropout": 0.0,
            "modules_to_save": list(self.whole) or None,
            "peft_type": "LORA",
            "r": common,
            "rank_pattern": other,
            "target_modules": sorted(self.ranks),
            "task_type": task,
            "use_rslora": False,
        }


def _write(out: Path, work: _Work, base_name: str, *, force: bool) -> None:
    """Write the adapter's folder beside its place and rename it."""
    partial, aside = (out.with_name(f".{out.name}.{os.getpid()}.{end}") for end in ("partial", "replaced"))
    settings = {"rank": work.settings.rank, "energy": work.settings.energy, "error": work.settings.error}
    try:
        partial.mkdir(parents=True)
        (partial / CONFIG).write_text(json.dumps(work.config(base_name), indent=2) + "\n", encoding="utf-8")
        save_artifact(
            partial / WEIGHTS, dict(work.tensors), kind="adapter", method="extract_lora", settings=settings,
            parents=[parent_of(work.model), parent_of(work.base)],
        )  # fmt: skip
        if force and out.exists():
            os.rename(out, aside)  # not lost if what follows fails
        os.rename(partial, out)
    except OSError as error:
        raise OutputError(
            f"cannot write {out}: {error.strerror or error}; check the path and its permissions"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if aside.exists() and not out.exists():
            os.rename(aside, out)
        shutil.rmtree(aside, ignore_errors=True)
