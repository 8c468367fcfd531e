"""Outputs of mergekit 0.1.5 in float64, kept in a file, against the engine on float64 inputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from graftwork.merge.errors import RecipeError
from graftwork.merge.memory import merge_arrays
from tests.contract.test_mergekit_golden import DEVIATIONS, ERROR

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "mergekit.safetensors"

with safe_open(GOLDEN, framework="numpy") as file:
    METADATA = file.metadata()
    TENSORS = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
CASES = json.loads(METADATA["cases"])
KEPT = json.loads(METADATA["deviations"])


def engine(case, base, models):
    stored = [{"tensor": ("F64", np.ascontiguousarray(model))} for model in models]
    below = None if base is None else {"tensor": ("F64", np.ascontiguousarray(base))}
    return merge_arrays(case["method"], stored, below, parameters=case["parameters"])["tensor"]


@pytest.mark.parametrize("shape", ["matrix", "vector"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["label"])
def test_the_engine_is_mergekit_in_float64(case, shape):
    base = TENSORS[f"input.{shape}.base"] if case["base"] else None
    models = [TENSORS[f"input.{shape}.{model}"] for model in range(case["models"])]
    expected = TENSORS[f"output.{case['label']}.{shape}"]
    output = engine(case, base, models)
    tolerance = 1e-7 if case["method"] == "ramplus_tl" else 1e-11  # its factor is a float32 number in mergekit
    assert output.shape == expected.shape
    assert np.max(np.abs(output - expected)) <= tolerance * np.max(np.abs(expected))


@pytest.mark.parametrize("case", KEPT, ids=lambda case: case["label"])
def test_where_it_differs_it_differs_as_documented(case):
    ours = DEVIATIONS[case["label"]][1]
    given = [TENSORS[f"deviation.{case['label']}.{i}"] for i in range(case["models"] + case["base"])]
    base, models = (given[0], given[1:]) if case["base"] else (None, given)
    if ours is ERROR:
        with pytest.raises(RecipeError, match="sum to zero"):
            engine(case, base, models)
        return
    output = engine(case, base, models)
    if ours is None:  # random: every entry is either dropped or kept and rescaled
        kept = output[output != 0]
        assert np.allclose(np.sum(output), np.sum(models[0]) if kept.size else 0)
    else:
        np.testing.assert_allclose(output, ours, rtol=1e-12, atol=1e-20)
