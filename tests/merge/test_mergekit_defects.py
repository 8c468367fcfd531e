"""Fifteen defects that were found in mergekit 0.1.5, and that a merge here does not have; numbered as in that study."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from graftwork.cli.application import app
from graftwork.merge import load_recipe, make_plan, merge
from graftwork.merge.checkpoint import Checkpoint, load_torch
from graftwork.merge.errors import DataError, GraftworkError, MismatchError, OutputError
from graftwork.merge.plan import Options
from graftwork.merge.verify import verify

WIDTH, ROWS = 8, 12
CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": WIDTH,
    "vocab_size": ROWS, "tie_word_embeddings": False, "torch_dtype": "float32", "rope_theta": 10000.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tensors(
    seed: int, *, biases: bool = False, head: bool = True, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Return a small Llama: relatives of each other for different seeds."""
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed + 1)

    def values(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=common) + 0.1 * torch.randn(shape, generator=own)).to(dtype)

    found = {"model.embed_tokens.weight": values(ROWS, WIDTH), "model.norm.weight": values(WIDTH)}
    for layer in range(2):
        for kind in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"):
            found[f"model.layers.{layer}.{kind}.weight"] = values(WIDTH, WIDTH)
            if biases:
                found[f"model.layers.{layer}.{kind}.bias"] = values(WIDTH)
    if head:
        found["lm_head.weight"] = values(ROWS, WIDTH)
    return found


def model(name: str, values: dict[str, torch.Tensor], **config: Any) -> str:
    Path(name).mkdir()
    save_file(values, f"{name}/model.safetensors", metadata={"format": "pt"})
    Path(name, "config.json").write_text(json.dumps({**CONFIG, **config}))
    return name


def recipe(method: str, *names: str, base: str | None = None, weight: float | None = 1.0, **parameters: Any) -> Path:
    entries = [{"model": name, **({} if weight is None else {"parameters": {"weight": weight}})} for name in names]
    content = {"merge_method": method, "models": entries, "parameters": parameters}
    Path("r.yml").write_text(json.dumps({**content, **({"base_model": base} if base else {})}))
    return Path("r.yml")


def output(path: str = "out") -> dict[str, torch.Tensor]:
    with Checkpoint.open(path) as checkpoint:
        return load_torch(checkpoint)


def config(path: str = "out") -> dict[str, Any]:
    found = json.loads(Path(path, "config.json").read_text())
    assert isinstance(found, dict)
    return found


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="graftwork")


def test_1_no_tensor_is_dropped_silently() -> None:
    for seed in range(2):
        model(f"m{seed}", tensors(seed, biases=True), attention_bias=True, mlp_bias=True)
    merge(recipe("linear", "m0", "m1"), "out")
    assert set(output()) == set(tensors(0, biases=True))
    assert config()["attention_bias"] is True


def test_2_side_files_come_from_the_first_model_whatever_the_hash_seed() -> None:
    for seed, name in enumerate("abcde"):
        model(name, tensors(seed), note=name)
    path = recipe("linear", "c", "a", "e", "b", "d")
    code = "from graftwork.merge import load_recipe, make_plan; import json, sys; "
    code += f"print([json.loads(make_plan(load_recipe({str(path)!r}).recipes[0]).config)['note']])"
    for seed in ("1", "2", "3"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        found = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert found.stdout == "['c']\n"


@pytest.mark.parametrize("first", ["tied", "untied"])
def test_3_a_head_that_is_written_is_not_declared_tied(first: str) -> None:
    model("tied", tensors(0, head=False), tie_word_embeddings=True)
    model("untied", tensors(1))
    merge(recipe("linear", first, {"tied": "untied", "untied": "tied"}[first]), "out")
    assert config()["tie_word_embeddings"] is False
    embedding, head = tensors(0)["model.embed_tokens.weight"], tensors(1)["lm_head.weight"]
    torch.testing.assert_close(output()["lm_head.weight"], (embedding + head) / 2)


def test_4_nothing_stale_stays_in_a_folder_that_is_used_again() -> None:
    model("a", tensors(0))
    model("b", tensors(1))
    merge(recipe("linear", "a"), "out", settings=_sharded(300))
    assert Path("out/model.safetensors.index.json").exists()
    with pytest.raises(OutputError):
        merge(recipe("linear", "b"), "out")
    merge(recipe("linear", "b"), "out", force=True)
    assert [path.name for path in Path("out").glob("model*")] == ["model.safetensors"]
    torch.testing.assert_close(output(), tensors(1))


def _sharded(size: int) -> Any:
    from graftwork.merge.run import Settings

    return Settings(max_shard_bytes=size)


@pytest.mark.parametrize("method", ["arcee_fusion", "linear", "slerp", "ties"])
def test_5_the_output_s_dtype_is_that_of_the_inputs_and_the_configuration_says_so(method: str) -> None:
    for seed in range(2):
        model(f"m{seed}", tensors(seed, dtype=torch.bfloat16), torch_dtype="bfloat16")
    more: dict[str, Any] = {"slerp": {"t": 0.5}, "ties": {"density": 0.5}}.get(method, {})
    weight = 1.0 if method in {"linear", "ties"} else None
    merge(recipe(method, "m0", "m1", base=None if method == "linear" else "m0", weight=weight, **more), "out")
    assert {values.dtype for values in output().values()} == {torch.bfloat16}
    assert config()["torch_dtype"] == "bfloat16"


def test_5_of_mixed_inputs_the_configuration_names_the_dtype_that_is_written() -> None:
    model("a", tensors(0, dtype=torch.bfloat16), torch_dtype="bfloat16")
    model("b", tensors(1))
    merge(recipe("linear", "a", "b"), "out")
    assert {values.dtype for values in output().values()} == {torch.float32}
    assert config()["torch_dtype"] == "float32"


def test_6_a_flag_without_effect_says_so() -> None:
    model("a", tensors(0))
    found = command("merge", recipe("linear", "a"), "out", "--write-threads", "3", "--quiet")
    assert found.exit_code == 0
    assert found.stderr.startswith("--write-threads has no effect here: ")


@pytest.mark.parametrize("scale", [1e-5, 1.0])
def test_7_the_weights_of_sce_do_not_depend_on_the_size_of_changes(scale: float) -> None:
    base = torch.zeros(64, 64)
    model("base", {"x.weight": base})
    for number, size in enumerate((1.0, 2.0, 4.0)):
        model(f"m{number}", {"x.weight": base + scale * size})
    merge(recipe("sce", "m0", "m1", "m2", base="base", weight=None, select_topk=1.0), "out")
    expected = scale * (1 * 1 + 4 * 2 + 16 * 4) / 21
    torch.testing.assert_close(output()["x.weight"], torch.full((64, 64), expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_8_della_takes_tensors_of_any_shape(method: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {"column": (5, 1), "single": (1,), "scalar": (), "row": (1, 5)}
    for number, name in enumerate(("base", "m0", "m1")):
        model(name, {key: torch.full(shape, float(number)) for key, shape in shapes.items()})
    merge(recipe(method, "m0", "m1", base="base", density=0.5, epsilon=0.1), "out")
    assert {key: tuple(values.shape) for key, values in output().items()} == shapes
    assert all(torch.isfinite(values).all() for values in output().values())


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
def test_9_ordinary_training_checkpoints_merge(wrap: str | None) -> None:
    for number in range(2):
        network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
        state = {key: torch.full_like(value, number + 1) for key, value in network.state_dict().items()}
        torch.save({wrap: state, "epoch": 3} if wrap else state, f"m{number}.pt")
    merge(recipe("linear", "m0.pt", "m1.pt"), "out", options=Options(allow_pickle=True))
    out = output()
    assert out["1.num_batches_tracked"] == 1
    assert out["1.num_batches_tracked"].dtype == torch.int64
    assert {float(values.unique()) for key, values in out.items() if key != "1.num_batches_tracked"} == {1.5}


def test_10_embeddings_are_never_cut_by_position() -> None:
    model("a", tensors(0))
    larger = {**tensors(1), "model.embed_tokens.weight": torch.ones(ROWS + 4, WIDTH)}
    model("b", larger, vocab_size=ROWS + 4)
    found = command("merge", recipe("linear", "a", "b"), "out", "--unsafe-truncate-embeddings")
    assert found.exit_code == 2
    assert "tokenizer: {source: base}" in found.stderr
    with pytest.raises(MismatchError, match=rf"a has \[{ROWS}, {WIDTH}\], b has \[{ROWS + 4}, {WIDTH}\]"):
        merge("r.yml", "out")


@pytest.mark.parametrize(
    ("key", "value"), [("rope_theta", 500000.0), ("hidden_act", "gelu"), ("num_attention_heads", 4)]
)
def test_11_configurations_that_change_what_weights_mean_are_told_apart(key: str, value: Any) -> None:
    model("a", tensors(0), hidden_act="silu", num_attention_heads=2)
    model("b", tensors(1), **{"hidden_act": "silu", "num_attention_heads": 2, key: value})
    with pytest.raises(MismatchError, match=f'config key "{key}" differs'):
        make_plan(load_recipe(recipe("linear", "a", "b")).recipes[0])


def test_12_all_that_headers_tell_is_said_before_a_value_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model("a", tensors(0))
    model("b", {**tensors(1), "model.norm.weight": torch.ones(3), "lm_head.weight": torch.ones(3, 3)})

    def refuse(*arguments: object) -> None:
        raise AssertionError("a value was read")

    monkeypatch.setattr(Checkpoint, "read_into", refuse)
    with pytest.raises(MismatchError) as caught:
        merge(recipe("linear", "a", "b"), "out")
    assert len(caught.value.problems) == 2
    assert not Path("out").exists()


@pytest.mark.parametrize("method", ["linear", "multislerp", "karcher"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_13_values_that_are_not_finite_stop_a_merge(method: str, value: float) -> None:
    broken = tensors(1)
    broken["model.norm.weight"][3] = value
    model("a", tensors(0))
    model("b", broken)
    with pytest.raises(DataError, match=r"model\.norm\.weight"):
        merge(recipe(method, "a", "b", weight=None if method == "karcher" else 1.0), "out")
    assert not Path("out").exists()


def test_13_weights_that_sum_to_zero_are_refused() -> None:
    model("a", tensors(0))
    model("b", tensors(1))
    path = recipe("linear", "a", "b")
    path.write_text(path.read_text().replace("1.0", "-1.0", 1))
    with pytest.raises(GraftworkError, match="sum"):
        merge(path, "out")


def test_14_dare_is_unbiased_where_it_is_asked_to_divide_by_density() -> None:
    count = 2000
    model("base", {f"x{n}.weight": torch.zeros(8) for n in range(count)})
    model("m", {f"x{n}.weight": torch.arange(1.0, 9.0) for n in range(count)})
    merge(recipe("dare_linear", "m", base="base", density=0.5, rescale="density"), "out")
    mean = torch.stack(list(output().values())).double().mean(0) / torch.arange(1.0, 9.0).double()
    # Every factor is 0 or 2, so its mean over 2,000 draws has a standard deviation of 1/√2000.
    assert float((mean - 1).abs().max()) < 4 / np.sqrt(count)


def test_14_random_masks_depend_on_nothing_but_the_seed() -> None:
    for number, name in enumerate(("base", "m0", "m1")):
        model(name, tensors(number))
        model(f"{name}-few", {key: value for key, value in tensors(number).items() if "layers.1" in key})
    merge(recipe("dare_ties", "m0", "m1", base="base", density=0.5), "one", threads=1)
    merge(recipe("dare_ties", "m0", "m1", base="base", density=0.5), "three", threads=3)
    merge(recipe("dare_ties", "m0-few", "m1-few", base="base-few", density=0.5), "few")
    one, three, few = output("one"), output("three"), output("few")
    assert all(torch.equal(one[name], three[name]) for name in one)
    assert all(torch.equal(one[name], few[name]) for name in few)


def test_15_every_command_answers() -> None:
    names = [item.name or item.callback.__name__.replace("_", "-") for item in app.registered_commands if item.callback]
    assert len(names) > 10
    for name in names:
        found = command(name, "--help")
        assert found.exit_code == 0, name
        assert f"graftwork {name}" in found.stdout


def test_the_outputs_of_this_file_are_sound() -> None:
    model("a", tensors(0))
    model("b", tensors(1))
    merge(recipe("linear", "a", "b"), "out")
    with Checkpoint.open("out") as checkpoint:
        assert verify(checkpoint).problems == ()
    assert load_file("out/model.safetensors").keys() == tensors(0).keys()
