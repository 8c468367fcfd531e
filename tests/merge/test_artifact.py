import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from graftwork.merge.artifact import load_artifact, parent_of, save_artifact, tensors_digest
from graftwork.merge.checkpoint import Checkpoint
from graftwork.merge.errors import CheckpointError, OutputError

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "empty": np.zeros((0, 4), np.int64),
    "scalar": np.array(3.0),
}


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "x.safetensors"
    digest = save_artifact(path, TENSORS, kind="fisher", method="exact", settings={"seed": 3}, examples="256")
    found = load_artifact(path, kind="fisher")
    assert found.digest == digest == tensors_digest(TENSORS)
    assert found.settings == {"seed": 3}
    assert found.metadata["examples"] == "256"
    assert np.array_equal(found.tensors["b"], TENSORS["b"])
    assert found.tensors["a"].tolist() == [1.5, -2.0]
    assert found.tensors["empty"].shape == (0, 4)
    assert found.tensors["scalar"].shape == ()
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert file.get_tensor("a").dtype == torch.bfloat16


def test_equal_content_gives_equal_bytes(tmp_path):
    for name in ("one", "two"):
        order = dict(TENSORS) if name == "one" else dict(reversed(TENSORS.items()))
        save_artifact(tmp_path / f"{name}.safetensors", order, kind="gram", method="m", settings={"b": 1, "a": 2})
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_parents_are_named_with_their_content(tmp_path):
    save_artifact(tmp_path / "p.safetensors", TENSORS, kind="model", method="m", settings={})
    with Checkpoint.open(tmp_path / "p.safetensors") as parent:
        record = parent_of(parent)
    save_artifact(tmp_path / "c.safetensors", {}, kind="fisher", method="m", settings={}, parents=[record])
    [found] = load_artifact(tmp_path / "c.safetensors", kind="fisher").parents
    assert found["name"] == "p.safetensors"
    assert found["digest"] == tensors_digest(TENSORS)


def test_another_kind_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_artifact(path, TENSORS, kind="fisher", method="m", settings={})
    with pytest.raises(CheckpointError, match="kind 'fisher', not 'gram'"):
        load_artifact(path, kind="gram")


def test_a_file_that_exists_stays(tmp_path):
    path = tmp_path / "x.safetensors"
    save_artifact(path, TENSORS, kind="fisher", method="m", settings={})
    before = path.read_bytes()
    with pytest.raises(OutputError, match="it exists"):
        save_artifact(path, {}, kind="fisher", method="m", settings={})
    assert path.read_bytes() == before
    save_artifact(path, {}, kind="fisher", method="m", settings={}, force=True)
    assert path.read_bytes() != before
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_a_file_name_without_the_ending_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"ends in \.safetensors"):
        save_artifact(tmp_path / "x.bin", {}, kind="fisher", method="m", settings=json.loads("{}"))
