"""Tests of the pictures: written whole or not at all, the same each time, and legible in size."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from PIL import Image

from graftwork.merge.errors import DependencyError, OutputError
from graftwork.merge.pictures import Line, Panel, bar_picture, depth_picture, line_picture

ROWS = {f"method {number}": {"clean": 0.9, "turned": 0.5 + number / 100} for number in range(30)}
CHANGES = {f"layers.{layer}.{kind}": 0.01 * (layer + 1) for layer in range(4) for kind in ("up.weight", "down.weight")}


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.verify()
        width, height = image.size
    return width, height


def test_a_picture_of_many_checkpoints_has_room_for_each_row(tmp_path: Path) -> None:
    few = size(bar_picture(dict(list(ROWS.items())[:3]), tmp_path / "few.png", title="Few"))
    many = size(bar_picture(ROWS, tmp_path / "many.png", title="Many", groups=dict.fromkeys(ROWS, "merged")))
    assert many[0] == few[0]
    assert many[1] - few[1] > 27 * 35


def test_equal_results_give_equal_files(tmp_path: Path) -> None:
    assert bar_picture(ROWS, tmp_path / "a.png", title="A").read_bytes() == (
        bar_picture(ROWS, tmp_path / "b.png", title="A").read_bytes()
    )


def test_a_picture_shows_its_values(tmp_path: Path) -> None:
    other = {**ROWS, "method 3": {"clean": 0.2, "turned": 0.1}}
    assert bar_picture(ROWS, tmp_path / "a.png", title="A").read_bytes() != (
        bar_picture(other, tmp_path / "b.png", title="A").read_bytes()
    )


def test_missing_and_not_finite_values_are_left_out(tmp_path: Path) -> None:
    rows = {"a": {"clean": 0.5, "turned": math.nan}, "b": {"clean": 0.7}, "c": {}}
    assert size(bar_picture(rows, tmp_path / "a.png", title="A"))


@pytest.mark.parametrize(
    "changes",
    [
        CHANGES,
        {**CHANGES, "embed.weight": 0.0, "head.weight": 0.5, "norm.bias": math.nan},
        {**CHANGES, "layers.0.norm.weight": 1e-6, "layers.1.norm.weight": 0.0, "layers.2.norm.weight": math.inf},
        {f"layers.{layer}.{kind}.weight": 0.1 for layer in range(40) for kind in "abcdefghij"},
        {"weight": 0.3},
        {"a.0.weight": 0.0},
        {},
    ],
)
def test_changes_of_any_kind_can_be_drawn(tmp_path: Path, changes: dict[str, float]) -> None:
    assert size(depth_picture(changes, tmp_path / "depth.png", title="Change", subtitle="of a"))


def test_a_picture_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(OutputError, match=r'cannot write picture ".*taken\.png"'):
        bar_picture(ROWS, tmp_path / "taken.png", title="A")
    assert [path.name for path in tmp_path.iterdir()] == ["taken.png"]


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match=r'pip install "graftwork\[demo\]"'):
        bar_picture(ROWS, tmp_path / "a.png", title="A")


PANEL = Panel([Line("naive", [(0, 0.1), (0.5, 3.0), (1, 0.2)]), Line("aligned", [(0, 0.1), (1, 0.2)])], "λ", "loss")


def test_panels_stand_side_by_side(tmp_path: Path) -> None:
    one = size(line_picture([PANEL], tmp_path / "one.png", title="One"))
    two = size(line_picture([PANEL, PANEL], tmp_path / "two.png", title="Two", subtitle="of them"))
    assert two[0] > 1.3 * one[0]
    assert one[1] <= two[1] < 1.2 * one[1]


def test_lines_of_one_run_are_drawn_behind_their_mean_and_infinite_values_are_not(tmp_path: Path) -> None:
    points = [(128.0, 0.5), (256.0, 0.01), (512.0, math.inf), (1024.0, math.nan)]
    plain = Panel([Line("a", points)], "width", "barrier", logarithmic="xy", ticks={128: "128", 512: "512"})
    runs = Panel([Line("a", points, single=[(128, 0.6), (256, math.nan)])], "width", "barrier", logarithmic="xy",
                 ticks=plain.ticks)  # fmt: skip
    drawn = [line_picture([panel], tmp_path / "a.png", title="A").read_bytes() for panel in (plain, runs, runs)]
    assert drawn[0] != drawn[1] == drawn[2]


def test_a_picture_without_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one line"):
        line_picture([Panel([], "x", "y", is_share=True, at_zero=True)], tmp_path / "a.png", title="A")
