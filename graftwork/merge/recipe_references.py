"""Finds the model that a recipe means by a text such as `./models/base` or `base+adapter`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from graftwork.merge.documents import LARGEST_FILE_BYTES
from graftwork.merge.problems import Problem, Report, join, nearest_key, show
from graftwork.merge.recipe import ModelReference

_LONGEST_NAME = 120
_LONGEST_PATH = 4096


class References:
    """Reads the references of one document.

    Args:
        names: The names of all documents of the file, whose outputs can be used as models.
        folder: The recipe's folder, for hints.
        report: Where problems go; what is wrong with a text is said once, however often it is written.
    """

    def __init__(self, names: frozenset[str], folder: Path | None, report: Report) -> None:
        self.names = names
        self.folder = folder
        self.report = report
        self.steps: dict[str, None] = {}
        self._known: dict[str, tuple[ModelReference | None, list[Problem]]] = {}

    def read(self, raw: object, path: str) -> ModelReference | None:
        """Return the model that a value names, or None if it names none."""
        text = self._text(raw, path)
        if text is None:
            return None
        if len(text) > _LONGEST_PATH:
            self.report.problem(path, f"{shown_reference(text)} is longer than a path can be")
            return None
        if text in self._known:
            reference, problems = self._known[text]
            for problem in problems:
                problem.more += 1
        else:
            before = len(self.report.problems)
            reference = self._resolve(text, path)
            self._known[text] = (reference, self.report.problems[before:])
        for part in (reference, reference.adapter if reference else None):
            if part is not None and part.step is not None:
                self.steps[part.step] = None
        return reference

    def _text(self, raw: object, path: str) -> str | None:
        if isinstance(raw, Mapping):
            return self._written_out(raw, path)
        if not isinstance(raw, str):
            hint = f'; put it in quotes: "{raw}"' if is_scalar(raw) else ""
            self.report.problem(path, f"must be the text that names a model, not {show(raw)}{hint}")
            return None
        if not raw.strip():
            self.report.problem(path, "is empty")
            return None
        return raw.strip()

    def _written_out(self, raw: Mapping[str, object], path: str) -> str | None:
        """Return `{model: {path, revision}, lora: …}` as text."""
        for key in raw:
            if key == "override_architecture":
                self.report.warn(join(path, key), "has no effect")
            elif key not in ("model", "lora"):
                near = nearest_key(key, ("model", "lora"))
                if near:
                    self.report.problem(join(path, key), f'is not a key here; did you mean "{near}"?')
                    return None
                self.report.warn(join(path, key), "is not a known key and has no effect")
        halves = []
        for key in ("model", "lora"):
            half = raw.get(key)
            here = join(path, key)
            if half is None and key == "lora":
                continue
            if isinstance(half, str):
                halves.append(half)
                continue
            if not isinstance(half, Mapping) or not isinstance(half.get("path"), str) or not half["path"]:
                self.report.problem(here, "must be a text, or a mapping with `path` and `revision`")
                return None
            revision = half.get("revision")
            if revision is not None and not isinstance(revision, str):
                self.report.problem(join(here, "revision"), f"must be text, not {show(revision)}; put it in quotes")
                return None
            halves.append(f"{half['path']}@{revision}" if revision else half["path"])
        return "+".join(halves)

    def _resolve(self, text: str, path: str) -> ModelReference | None:
        if text in self.names:
            return ModelReference(text, step=text)
        whole = os.path.expanduser(text)
        if os.path.exists(whole):
            return self._local(text, whole, path)
        halves = text.split("+")
        if len(halves) > 2:
            self.report.problem(
                path,
                f"{shown_reference(text)} has more than one `+`; a model takes one adapter: list `base+first` and "
                "`base+second` as two models",
            )
            return None
        parts = [self._half(half, text, path) for half in halves]
        if None in parts:
            return None
        model = parts[0]
        if model is None or len(parts) == 1:
            return model
        return replace(model, text=text, adapter=parts[1])

    def _half(self, half: str, text: str, path: str) -> ModelReference | None:
        """Return the model in one half of `model+adapter`."""
        half = half.strip()
        if half in self.names:
            return ModelReference(half, step=half)
        expanded = os.path.expanduser(half)
        if half and os.path.exists(expanded):
            return ModelReference(half, _real(expanded))
        name, at, revision = half.partition("@")
        if "@" in revision:
            self.report.problem(path, f"{shown_reference(text)} has more than one `@`; a model has one revision")
            return None
        if not name or (at and not revision):
            self.report.problem(
                path, f"{shown_reference(text)} lacks the text {'after' if name else 'before'} `{'@' if at else '+'}`"
            )
            return None
        expanded = os.path.expanduser(name)
        if at and os.path.exists(expanded):
            self.report.problem(path, f"{shown_reference(name)} is local; a revision is for repositories of the hub")
            return ModelReference(half, _real(expanded))
        if self._looks_like_a_path(name):
            self._missing(name, path)
            return ModelReference(half, _real(expanded) if "\0" not in expanded else None)
        if not re.fullmatch(r"[A-Za-z0-9_][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", name, re.ASCII):
            self.report.problem(path, f"{shown_reference(name)} is neither a folder or file nor the id of a repository")
            return ModelReference(half, hub=name, revision=revision or None)
        beside = self._beside(name)
        if beside:
            self.report.problem(path, f"there is no {shown_reference(name)} in the working directory{beside}")
        return ModelReference(half, hub=name, revision=revision or None)

    def _looks_like_a_path(self, name: str) -> bool:
        return "\\" in name or name[1:2] == ":" or name[0] in "/.~" or name.count("/") > 1

    def _missing(self, name: str, path: str) -> None:
        shown = shown_reference(name)
        last = name.rstrip("/").rpartition("/")[2]
        if last in self.names:
            self.report.problem(
                path, f"there is no {shown}; to use the output of another document write its name: {show(last)}"
            )
        elif "\\" in name or name[1:2] == ":":
            self.report.problem(path, f'{shown} is a Windows path; write it with "/", as this system names it')
        elif beside := self._beside(name):
            self.report.problem(path, f"there is no {shown}{beside}")
        else:
            parent = next((p for p in Path(os.path.expanduser(name)).parents if os.path.exists(p)), Path())
            nearest = "the working directory" if str(parent) == "." else shown_reference(str(parent))
            self.report.problem(path, f"there is no {shown}; the nearest folder that exists is {nearest}")

    def _beside(self, name: str) -> str:
        """Return a hint if a path exists relative to the recipe's folder, and an empty string otherwise."""
        if self.folder is None:
            return ""
        candidate = os.path.join(self.folder, name)
        if not os.path.exists(candidate):
            return ""
        return f"; paths are relative to the working directory, from which it is {shown_reference(candidate)}"

    def _local(self, text: str, whole: str, path: str) -> ModelReference:
        real = _real(whole)
        base = _adapter_base(str(real))
        if base is not None:
            self.report.problem(
                path,
                f"{shown_reference(text)} holds only a LoRA adapter over {show(base)}; write the base before it: "
                f"{show(f'BASE+{text}')}",
            )
        return ModelReference(text, real)


def _real(path: str) -> Path:
    """Return the path without links and dots."""
    real = os.path.realpath(path)
    # POSIX lets a path that begins with two slashes mean something else; here it never does.
    return Path("/" + real.lstrip("/"))


def is_scalar(value: object) -> bool:
    """Say whether a value is what YAML makes of an unquoted word that looks like a number."""
    return isinstance(value, bool | int | float)


def shown_reference(text: str) -> str:
    """Return a reference for a message."""
    return show(text, _LONGEST_NAME)


def _adapter_base(folder: str) -> str | None:
    """Return what a folder's adapter belongs to, if it holds an adapter and no weights of a model."""
    try:
        files = os.listdir(folder)
    except (OSError, ValueError):
        return None
    if "adapter_config.json" not in files:
        return None
    weights = (".safetensors", ".bin", ".safetensors.index.json", ".pt", ".pth")
    if any(file.endswith(weights) and not file.startswith("adapter_") for file in files):
        return None
    try:
        with open(os.path.join(folder, "adapter_config.json"), "rb") as file:
            base = json.loads(file.read(LARGEST_FILE_BYTES)).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        base = None
    return base if isinstance(base, str) and base else "an unnamed model"
