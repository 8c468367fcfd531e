"""Tests of which part may import which, read from the source: a layer that is broken once is broken for good."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import graftwork

ROOT = Path(graftwork.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

FORBIDDEN = {
    "merge": ("graftwork.federated", "graftwork.cli", "graftwork.simulations", "typer", "rich", "flwr", "click"),
    "federated": ("graftwork.cli", "typer", "rich", "click"),
    "simulations": ("graftwork.cli", "typer", "rich", "click"),
}
"""What no file of a package may import, at its top or inside a function."""


BUILT_ON_TORCH = ("graftwork.merge.subspace", "graftwork.merge.statistics.engines", "graftwork.merge.alignment.scores")
"""Parts of the engine that run networks: they import torch at their top, and nothing else imports them at its own."""


def imports(path: Path, *, top_only: bool = False) -> Iterator[str]:
    """Yield the full names of the modules, and of the names taken from modules, that a file imports."""
    package = ["graftwork", *path.relative_to(ROOT).parent.parts]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in _at_top(tree.body) if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{name.name}" for name in node.names)


def _at_top(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield what runs when a module is imported."""
    for node in body:
        if isinstance(node, ast.If):
            if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
                yield from _at_top([*node.body, *node.orelse])
        elif isinstance(node, ast.Try | ast.With):
            yield from _at_top(node.body)
        else:
            yield node


def _is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _module(path: Path) -> str:
    return ".".join(["graftwork", *path.relative_to(ROOT).with_suffix("").parts])


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_no_file_imports_from_a_layer_above(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        for package in FORBIDDEN.get(layer, ()):
            assert not _is_within(name, package), f"{_name(path)} imports {name}"
        if layer != "cli":
            assert not _is_within(name, "graftwork.cli"), f"{_name(path)} imports {name}"


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "cli"], ids=_name)
def test_commands_import_only_light_modules_at_their_top(path: Path) -> None:
    light = ("graftwork.cli", "graftwork.merge.errors", "graftwork.__version__", "typer")
    for name in imports(path, top_only=True):
        assert (
            name.split(".")[0] in sys.stdlib_module_names
            or name == "graftwork"
            or any(_is_within(name, module) for module in light)
        ), f"{_name(path)} imports {name} at its top"


@pytest.mark.parametrize("path", [path for path in FILES if path.relative_to(ROOT).parts[0] == "merge"], ids=_name)
def test_the_engine_imports_what_is_optional_only_where_it_is_used(path: Path) -> None:
    optional = {"matplotlib", "sklearn", "transformers", "huggingface_hub", "torch"}
    within = [package for package in BUILT_ON_TORCH if _is_within(_module(path), package)]
    for name in imports(path, top_only=True):
        assert name.split(".")[0] not in optional - ({"torch"} if within else set()), (
            f"{_name(path)} imports {name} at its top"
        )
        for package in BUILT_ON_TORCH:
            assert package in within or not _is_within(name, package), f"{_name(path)} imports {name} at its top"


def test_the_layers_hold_files() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} >= {"merge", "cli", "simulations"}
