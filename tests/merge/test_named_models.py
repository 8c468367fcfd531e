"""Models by the text that names them, as every command takes them: paths, repositories in the cache, adapters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from graftwork.merge.checkpoint import Checkpoint, load_numpy
from graftwork.merge.errors import CheckpointError
from graftwork.merge.hub import Hub
from graftwork.merge.reference import local_path, open_model

SHA = "c0ffee" + 34 * "1"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with one model, one adapter, and a cache with two repositories."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    write(Path("model"), 1.0)
    for number, name in enumerate(("models--org--one", "models--two"), 2):
        write(Path("home/hub", name, "snapshots", SHA), float(number))
        (Path("home/hub", name) / "refs").mkdir()
        (Path("home/hub", name) / "refs" / "main").write_text(SHA)
    Path("adapter").mkdir()
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    Path("adapter/adapter_config.json").write_text(json.dumps(settings))
    factors = {"base_model.model.fc.lora_A.weight": (1, 2), "base_model.model.fc.lora_B.weight": (2, 1)}
    save_file({name: np.ones(s, np.float32) for name, s in factors.items()}, "adapter/adapter_model.safetensors")


def write(folder: Path, value: float) -> None:
    folder.mkdir(parents=True)
    save_file({"fc.weight": np.full((2, 2), value, np.float32)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("model", 1.0),
        ("model/model.safetensors", 1.0),
        ("org/one", 2.0),
        ("org/one@main", 2.0),
        (f"org/one@{SHA}", 2.0),
        ("two", 3.0),
        ("model+adapter", 2.0),
        ("org/one+adapter", 3.0),
    ],
)
def test_a_text_names_a_path_a_repository_or_a_model_with_an_adapter(text: str, value: float) -> None:
    with open_model(text) as checkpoint:
        assert load_numpy(checkpoint)["fc.weight"].tolist() == [[value, value]] * 2
    place = local_path(text)
    assert place.is_file() or (place / "model.safetensors").is_file()


def test_what_is_here_is_not_looked_for_elsewhere() -> None:
    write(Path("org/one"), 7.0)
    with open_model("org/one") as checkpoint:
        assert load_numpy(checkpoint)["fc.weight"][0, 0] == 7.0
    save_file({"fc.weight": np.zeros((2, 2), np.float32)}, "model+adapter.safetensors")
    with open_model("model+adapter.safetensors") as checkpoint:
        assert load_numpy(checkpoint)["fc.weight"][0, 0] == 0.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modle", 'A "modle"'),
        ("model/nothing", 'A "model/nothing"'),
        ("model.safetensors", 'A "model.safetensors"'),
        ("org/unknown", '"org/unknown" is no folder or file here, and it is not in the hub\'s cache'),
        ("model+adaptr", 'there is no "adaptr"'),
        ("model+adapter+adapter", "has more than one `[+]`"),
        ("adapter", "holds only a LoRA adapter"),
    ],
)
def test_what_is_nowhere_is_named(text: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        open_model(text, what="A")
    assert all("\n" not in line for line in caught.value.problems)


def test_a_misspelt_file_is_not_asked_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def never(*arguments: object, **more: object) -> None:
        raise AssertionError

    monkeypatch.setattr("graftwork.merge.hub._fetched", never)
    for text in ("modle", "modle.safetensors", "model/modle", "./modle", "/modle/x"):
        with pytest.raises(CheckpointError):
            open_model(text, hub=Hub())


def test_a_repository_of_the_cache_is_opened_like_its_folder() -> None:
    with open_model("org/one") as one, Checkpoint.open(Path("home/hub/models--org--one/snapshots", SHA)) as two:
        assert one.content_digest() == two.content_digest()
