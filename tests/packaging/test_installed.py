"""What an installed graftwork consists of."""

import importlib.metadata
import os
from pathlib import Path

import pytest

import graftwork

FILES = {str(path) for path in importlib.metadata.files("graftwork") or ()}

wheel = pytest.mark.skipif(
    not any(name.startswith("graftwork/") for name in FILES), reason="graftwork is installed in editable form"
)


def test_version_is_the_distribution_s():
    assert importlib.metadata.version("graftwork") == graftwork.__version__


def test_the_command_is_an_entry_point():
    scripts = importlib.metadata.entry_points(group="console_scripts")
    assert [script.value for script in scripts if script.name == "graftwork"] == ["graftwork.cli:main"]


@wheel
def test_the_wheel_holds_the_package_and_nothing_else_at_top_level():
    tops = {name.split("/")[0] for name in FILES if not name.startswith(("..", "graftwork-"))}
    assert tops == {"graftwork"}


@wheel
def test_the_wheel_is_typed_and_licensed():
    assert "graftwork/py.typed" in FILES
    assert any(name.endswith("LICENSE") for name in FILES)


@wheel
def test_every_module_of_the_source_is_in_the_wheel():
    source = Path(__file__).parents[2] / "graftwork"
    if not source.is_dir():
        pytest.skip("there is no source tree beside the tests")
    modules = {f"graftwork/{path.relative_to(source)}" for path in source.rglob("*.py")}
    assert modules <= FILES


@pytest.mark.skipif("GRAFTWORK_TEST_INSTALLED" not in os.environ, reason="only where the wheel is tested on its own")
def test_the_installed_copy_is_the_one_under_test():
    assert "site-packages" in str(graftwork.__file__)


def test_runtime_dependencies_have_lower_bounds_only():
    requirements = importlib.metadata.requires("graftwork") or []
    assert not [
        line
        for line in requirements
        if "flwr" not in line and ("<" in line.split(";")[0] or "==" in line.split(";")[0])
    ]
