"""Outputs of mergekit 0.1.5 in float64, kept in a file, against the reference: the formulas are the same.

The file and the program that made it are in `tests/golden`. Where this project differs from mergekit on purpose, the
inputs stay clear of it.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from tests.reference import reference

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "mergekit.safetensors"
DETERMINISTIC = {
    "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "karcher", "linear", "model_stock", "multislerp", "nearswap",
    "nuslerp", "passthrough", "ram", "ramplus_tl", "sce", "slerp", "task_arithmetic", "ties",
}  # fmt: skip

with safe_open(GOLDEN, framework="numpy") as file:
    METADATA = file.metadata()
    TENSORS = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
CASES = json.loads(METADATA["cases"])


def tolerance(method: str) -> float:
    """Return how far apart two float64 results may be, relative to the largest entry."""
    return 1e-7 if method == "ramplus_tl" else 1e-11  # its factor is a float32 number in mergekit


@pytest.mark.parametrize("shape", ["matrix", "vector"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["label"])
def test_the_reference_is_mergekit_in_float64(case, shape):
    base = TENSORS[f"input.{shape}.base"] if case["base"] else None
    models = [TENSORS[f"input.{shape}.{model}"] for model in range(case["models"])]
    expected = TENSORS[f"output.{case['label']}.{shape}"]
    value = reference(case["method"], base, models, **case["parameters"]).value
    assert value.shape == expected.shape
    assert np.max(np.abs(value - expected)) <= tolerance(case["method"]) * np.max(np.abs(expected))


def test_the_file_covers_every_deterministic_method_and_names_its_makers():
    assert {case["method"] for case in CASES} >= DETERMINISTIC
    assert json.loads(METADATA["versions"])["mergekit"] == "0.1.5"
