"""The page on algorithms names every setting, and has the presets' values."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from graftwork.federated.algorithms import create
from graftwork.federated.algorithms.base import Settings

PAGE = Path(__file__).parents[3] / "docs" / "algorithms.md"


def section(title: str) -> str:
    text = PAGE.read_text(encoding="utf-8")
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


@pytest.mark.skipif(not PAGE.exists(), reason="the pages are not here")
@pytest.mark.parametrize("name", ["fedka", "fraug", "ggeur"])
def test_every_setting_is_in_its_section_with_what_the_preset_changes(name: str) -> None:
    algorithm = create(name)
    text = section(algorithm.title)
    common = {item.name for item in dataclasses.fields(Settings)}
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    for item in dataclasses.fields(algorithm.settings_type):
        if item.name in common:
            continue
        found = [row for row in rows if f"`{item.name}`" in row[1] and len(row) >= 6]
        assert len(found) == 1, item.name
        names = re.findall(r"`(\w+)`", found[0][1])
        preset = algorithm.presets[f"{name}-paper"]
        if item.name in preset:
            values = found[0][3].replace(" (all)", "").split(",")
            assert values[names.index(item.name)].strip() == written(preset[item.name]), item.name
