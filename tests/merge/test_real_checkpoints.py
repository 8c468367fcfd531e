"""Checkpoints that other people trained, merged through files and judged by the reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from graftwork.merge.checkpoint import Checkpoint, load_numpy
from graftwork.merge.errors import MismatchError
from graftwork.merge.plan import Options
from graftwork.merge.recipe import parse_recipe
from graftwork.merge.run import merge
from tests.contract.table import ROWS, is_per_model
from tests.reference import excess, reference_model

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "checkpoints"

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="the real checkpoints are not in ../shared/data/checkpoints")

SEISMIC = [f"seismic_streamingnet/seed{seed}_finetuned" for seed in range(3)]
PRETRAINED = "seismic_streamingnet/seed0_pretrain"


def read(name):
    with Checkpoint.open(REAL / f"{name}.safetensors") as found:
        return load_numpy(found)


def recipe(method, models, base=None, parameters=None):
    """Return a recipe, parameters per model written with their model."""
    parameters = dict(parameters or {})
    listed = []
    for number, name in enumerate(models):
        own = {
            key: value[number]
            for key, value in parameters.items()
            if is_per_model(method, key) and isinstance(value, tuple)
        }
        listed.append({"model": str(REAL / f"{name}.safetensors"), "parameters": own})
    shared = {key: value for key, value in parameters.items() if not isinstance(value, tuple)}
    content = {"merge_method": method, "models": listed, "parameters": shared}
    if base is not None:
        content["base_model"] = str(REAL / f"{base}.safetensors")
    return parse_recipe(json.dumps(content))


def merged(folder, *arguments, options=None):
    result = merge(recipe(*arguments), folder / "out.safetensors", threads=2, options=options)
    with Checkpoint.open(folder / "out.safetensors") as found:
        return load_numpy(found), result.plan.warnings


def floating(tensors):
    return {name: values for name, values in tensors.items() if values.dtype.kind == "f"}


def assert_near_the_reference(output, row_method, models, base, parameters):
    expected = reference_model(
        row_method,
        None if base is None else floating(base),
        [floating(model) for model in models],
        scores="float32",
        **parameters,
    )
    assert set(floating(output)) == set(expected)
    for name, wanted in expected.items():
        found = output[name].astype(np.float64)
        if "threshold" in wanted.details:
            threshold = wanted.details["threshold"]
            close = np.abs(wanted.details["score"] - threshold) <= 2.0**-30 * threshold
            found = np.where(close, wanted.value, found)
        assert found.shape == wanted.value.shape
        assert excess(wanted, found, "F32") <= 1, name


def test_the_average_of_two_servers_of_one_federation(tmp_path):
    names = ["mnist_fl_cnn/fedavg_server", "mnist_fl_cnn/feddyn_server"]
    output, warnings = merged(tmp_path, "linear", names, None, {"weight": 1.0})
    assert_near_the_reference(output, "linear", [read(name) for name in names], None, {"weight": [1.0, 1.0]})
    assert not any("relatives" in line for line in warnings)


@pytest.mark.parametrize("row", [row for row in ROWS if row.label == row.method], ids=lambda row: row.method)
def test_every_method_is_accurate_on_real_weights(tmp_path, row):
    names = SEISMIC[: row.models]
    base = PRETRAINED if row.base else None
    output, _ = merged(tmp_path, row.method, names, base, row.parameters)
    models = [read(name) for name in names]
    assert_near_the_reference(output, row.method, models, read(base) if base else None, row.parameters)
    for name, values in models[0].items():
        assert output[name].dtype == values.dtype
        if values.dtype.kind != "f":
            assert np.array_equal(output[name], (read(base) if base else models[0])[name])


def test_integer_buffers_are_the_bases_and_that_is_said_where_models_differ(tmp_path):
    base, tuned = read(PRETRAINED), read(SEISMIC[0])
    output, warnings = merged(tmp_path, "task_arithmetic", SEISMIC[:1], PRETRAINED, {"weight": 0.5})
    integers = {name for name, values in base.items() if values.dtype.kind == "i"}
    differ = {name for name in integers if not np.array_equal(base[name], tuned[name])}
    assert "perm" in base
    for name, values in base.items():
        if values.dtype.kind == "i":
            assert np.array_equal(output[name], values)
    assert {line.split('"')[1] for line in warnings if "not averaged" in line} == differ
    other, warnings = merged(tmp_path / "other", "linear", [SEISMIC[1], SEISMIC[2]], None, {"weight": 1.0})
    assert np.array_equal(other["perm"], read(SEISMIC[1])["perm"])
    if not np.array_equal(read(SEISMIC[1])["perm"], read(SEISMIC[2])["perm"]):
        assert any('"perm"' in line and "not averaged" in line for line in warnings)


def test_half_a_task_vector_goes_half_the_way(tmp_path):
    base, tuned = floating(read(PRETRAINED)), floating(read(SEISMIC[0]))
    output, _ = merged(tmp_path, "task_arithmetic", SEISMIC[:1], PRETRAINED, {"weight": 0.5})
    for name, values in base.items():
        middle = (values.astype(np.float64) + tuned[name]) / 2
        assert np.allclose(output[name], middle, rtol=1e-6, atol=1e-7)


def test_two_layouts_of_one_network_are_refused_with_a_way_out(tmp_path):
    names = ["cifar10_resnet/resnet20_akamaster", "cifar10_resnet/resnet20_aisafety"]
    with pytest.raises(MismatchError) as caught:
        merged(tmp_path, "linear", names, None, {"weight": 1.0})
    message = str(caught.value)
    assert "linear.weight" in message or "fc.weight" in message
    assert "layout" in message
    assert "graftwork inspect" in message
    assert not (tmp_path / "out.safetensors").exists()
    assert sum("layout" in line for line in caught.value.problems) == 1


def test_networks_of_different_depth_are_refused(tmp_path):
    names = ["cifar10_resnet/resnet20_akamaster", "cifar10_resnet/resnet32_akamaster"]
    with pytest.raises(MismatchError, match="resnet20_akamaster"):
        merged(tmp_path, "linear", names, None, {"weight": 1.0})


def test_networks_of_different_depth_can_share_what_they_have_in_common(tmp_path):
    names = ["cifar10_resnet/resnet20_akamaster", "cifar10_resnet/resnet32_akamaster"]
    small, large = (read(name) for name in names)
    output, warnings = merged(tmp_path, "linear", names, None, {"weight": 1.0}, options=Options(on_missing="skip"))
    assert set(output) == set(small) & set(large)
    left_out = {line.split('"')[1] for line in warnings if "left out" in line}
    assert left_out == set(small) ^ set(large)


@pytest.mark.parametrize(
    ("names", "aligned"),
    [
        (("digits_lenet/mnist_a", "digits_lenet/mnist_b"), False),
        (("digits_lenet/svhn_a", "digits_lenet/svhn_b"), False),
        (("mnist_fl_cnn/fedavg_server", "mnist_fl_cnn/feddyn_server"), True),
        ((PRETRAINED, SEISMIC[0]), True),
    ],
    ids=lambda value: "-".join(Path(name).name for name in value) if isinstance(value, tuple) else str(value),
)
def test_models_from_different_starts_are_told_from_relatives(tmp_path, names, aligned):
    _, warnings = merged(tmp_path, "linear", list(names), None, {"weight": 1.0})
    said = [line for line in warnings if "do not look like relatives" in line]
    assert len(said) == (0 if aligned else 1)
    if not aligned:
        assert "permutation alignment" in said[0]
