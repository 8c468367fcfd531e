"""Outputs of mergekit 0.1.5 in float64, kept in a file, against the reference: the formulas are the same.

The file and the program that made it are in `tests/golden`. Where this project differs from mergekit on purpose, the
cases stay clear of it; `DEVIATIONS` shows both values for each such place.
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
KEPT = json.loads(METADATA["deviations"])
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


X, UNIT = np.array([1.0, 2.0, 3.0, 4.0]), np.eye(4)
ERROR = ValueError
DEVIATIONS = {
    # label: (what mergekit does, what this project does); an error stands for itself
    "slerp-zero": (np.sin(0.15 * np.pi) * X, 0.3 * X),
    "nuslerp-zero": (np.sin(0.15 * np.pi) * X, 0.3 * X),
    "multislerp-unchanged": (ERROR, X),
    "multislerp-cancelling": (np.full(4, np.nan), ERROR),
    "linear-cancelling": (np.full(4, -np.inf), ERROR),
    "karcher-small": (np.zeros(4), 1e-6 * (UNIT[0] + UNIT[1]) / np.sqrt(2)),
    # cos 45° gives t = 0.828; mergekit divides the inner product by at least 1e-6
    "model_stock-small": (
        (0.18 / 1.09) * 3e-4 * (UNIT[0] + UNIT[1] / 2),
        (np.sqrt(2) / (1 + np.sqrt(0.5))) * 3e-4 * (UNIT[0] + UNIT[1] / 2),
    ),
    "model_stock-beyond": (np.array([3.6872079640480724, -8.056696385580388]), np.zeros(2)),
    "della-one-entry": (RuntimeError, None),
    "della-column": (RuntimeError, None),
    "della-scalar": (IndexError, None),
    "sce-small": (7e-4 / 3 * UNIT[0], (1 + 8 + 64) / 21 * 1e-4 * UNIT[0]),
    "nearswap-small": (X + 0.5e-7, X + 1e-7),
    "ties-rescale-small": (np.array([0, 0, 3e-9, 4e-9]), np.array([0, 0, 3e-9, 4e-9]) * 10 / 7),
}


@pytest.mark.parametrize("case", KEPT, ids=lambda case: case["label"])
def test_deviations_are_as_documented(case):
    label = case["label"]
    theirs, ours = DEVIATIONS[label]
    count = case["models"]
    given = [TENSORS[f"deviation.{label}.{i}"] for i in range(count + case["base"])]
    if isinstance(theirs, type):
        assert case["error"] == theirs.__name__
    else:
        np.testing.assert_allclose(TENSORS[f"deviation.{label}.output"], theirs, rtol=1e-12)
    base, models = (given[0], given[1:]) if case["base"] else (None, given)
    if ours is ERROR:
        with pytest.raises(ERROR, match="cancel"):
            reference(case["method"], base, models, **case["parameters"])
        return
    value = reference(case["method"], base, models, **case["parameters"]).value
    if ours is None:  # random: every entry is either dropped or kept and rescaled
        kept = value[value != 0]
        assert np.allclose(np.sum(value), np.sum(models[0]) if kept.size else 0)
    else:
        np.testing.assert_allclose(value, ours, rtol=1e-12, atol=1e-20)


def test_the_file_covers_every_deterministic_method_and_names_its_makers():
    assert {case["method"] for case in CASES} >= DETERMINISTIC
    assert {case["label"] for case in KEPT} == set(DEVIATIONS)
    assert json.loads(METADATA["versions"])["mergekit"] == "0.1.5"
