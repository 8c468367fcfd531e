"""Tests of `graftwork doctor`: what looks wrong is said, and what is well is left in peace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.cli.conftest import Command, Outcome

WIDTH, ROWS, LAYERS = 8, 20, 3
TOKENS = [f"t{number}" for number in range(ROWS)]


def weights(seed: int, *, share: float = 0.05, common_seed: int = 0) -> dict[str, np.ndarray]:
    """Return a small model: relatives for one common seed, strangers for different ones."""
    common, own = np.random.default_rng(common_seed), np.random.default_rng(100 + seed)

    def matrix(*shape: int) -> np.ndarray:
        return (common.normal(size=shape) + share * own.normal(size=shape)).astype(np.float32)

    layers = {
        f"model.layers.{layer}.{kind}.weight": matrix(WIDTH, WIDTH)
        for layer in range(LAYERS)
        for kind in ("self_attn.q_proj", "mlp.up_proj")
    }
    norms = {f"model.layers.{layer}.norm.weight": np.ones(WIDTH, np.float32) for layer in range(LAYERS)}
    embedding, head = matrix(ROWS, WIDTH), matrix(ROWS, WIDTH)
    return {"model.embed_tokens.weight": embedding, **layers, **norms, "lm_head.weight": head}


def write(folder: Path, tensors: dict[str, np.ndarray], *, tokens: list[str] = TOKENS, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": ROWS, "num_hidden_layers": LAYERS,
        "tie_word_embeddings": False, "attention_bias": False, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary}}))
    return folder


@pytest.fixture
def parents(command: Command, tmp_path: Path) -> Path:
    """Two relatives, in the folder where commands run."""
    write(tmp_path / "one", weights(1))
    write(tmp_path / "two", weights(2))
    return tmp_path


def merged(command: Command, *models: str, weight: float = 1.0, method: str = "linear", base: str = "") -> None:
    entries = ", ".join(f"{{model: {name}, parameters: {{weight: {weight}}}}}" for name in models)
    Path("r.yml").write_text(
        f"merge_method: {method}\nmodels: [{entries}]\n" + (f"base_model: {base}\n" if base else "")
    )
    outcome = command("merge", "r.yml", "out", "--quiet", "--force")
    assert outcome.code == 0, outcome


def change(path: Path, **tensors: np.ndarray) -> None:
    file = path / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})


def lines(outcome: Outcome, kind: str) -> list[str]:
    return [line for line in outcome.out.splitlines() if line.startswith(f"{kind}: ")]


AGAINST = ("--against", "one", "--against", "two")


def test_a_merge_of_relatives_is_well(command: Command, parents: Path) -> None:
    merged(command, "one", "two")
    outcome = command("doctor", "out", *AGAINST)
    assert outcome.code == 0, outcome
    assert lines(outcome, "wrong") == lines(outcome, "odd") == []
    assert "nothing wrong" in outcome.out
    assert "model.layers.2" in outcome.out
    record = json.loads(command("doctor", "out", *AGAINST, "--json").out)
    assert record["is_well"]
    assert record["lineage"] == ["one", "two"]
    assert [part["part"] for part in record["parts"]] == [
        "before the layers", "model.layers.0", "model.layers.1", "model.layers.2", "after the layers",
    ]  # fmt: skip


def test_norms_and_cosines_are_those_of_float64(command: Command, parents: Path) -> None:
    merged(command, "one", "two")
    record = json.loads(command("doctor", "out", *AGAINST, "--json").out)
    models = [load_file(parents / name / "model.safetensors") for name in ("out", "one", "two")]
    names = ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    flat = [np.concatenate([model[name].astype(np.float64).ravel() for name in names]) for model in models]
    norms = [np.linalg.norm(values) for values in flat]
    part = record["parts"][2]
    assert part["norm"] == pytest.approx(norms[0], rel=1e-12)
    assert part["parents"] == pytest.approx(norms[1:], rel=1e-12)
    assert part["cosines"] == pytest.approx([flat[0] @ flat[n] / norms[0] / norms[n] for n in (1, 2)], rel=1e-12)


def test_without_parents_their_names_are_told(command: Command, parents: Path) -> None:
    merged(command, "one", "two")
    outcome = command("doctor", "out")
    assert outcome.code == 0
    assert 'made from "one", "two"; give them with --against' in outcome.err


def test_strangers_that_cancel_each_other_are_recognised(command: Command, parents: Path) -> None:
    write(parents / "two", weights(2, common_seed=9))
    merged(command, "one", "two")
    outcome = command("doctor", "out", *AGAINST)
    assert outcome.code == 1
    (line,) = lines(outcome, "wrong")
    assert "unrelated directions (cosine" in line
    assert "graftwork match" in line


def test_task_vectors_that_pile_up_are_recognised(command: Command, parents: Path) -> None:
    write(parents / "two", weights(2, share=1.0))
    merged(command, "two", weight=9.0, method="task_arithmetic", base="one")
    (line,) = lines(command("doctor", "out", *AGAINST), "wrong")
    assert "smaller weights or lambda" in line


def test_a_model_against_strangers_points_elsewhere(command: Command, parents: Path) -> None:
    write(parents / "other", weights(3, common_seed=9))
    (line,) = lines(command("doctor", "one", "--against", "other"), "wrong")
    assert "point where no parent's do" in line


def test_a_tensor_of_zeros_is_wrong_where_no_parent_has_it(command: Command, parents: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change(parents / "two", **{name: np.zeros((WIDTH, WIDTH), np.float32)})
    alone = command("doctor", "two")
    assert alone.code == 0
    assert lines(alone, "odd") == [f'odd: "{name}" holds nothing but zeros']
    found = command("doctor", "two", "--against", "one")
    assert found.code == 1
    assert f'wrong: "{name}" is zero, and in none of the parents is it' in found.out


def test_lost_tensors_are_named(command: Command, parents: Path) -> None:
    change(parents / "two", **{"vision.weight": np.ones((2, 2), np.float32)})
    (line,) = lines(command("doctor", "one", "--against", "two"), "wrong")
    assert line == 'wrong: 1 tensors of two are not in the model: "vision.weight"'


def test_tokens_without_rows_are_named(command: Command, parents: Path) -> None:
    write(parents / "one", weights(1), tokens=[*TOKENS, "<x>", "<y>"])
    (line,) = lines(command("doctor", "one"), "wrong")
    assert line == 'wrong: 2 tokens of tokenizer.json have no row in the embedding (20 rows): "<x>", "<y>"'


def test_rows_without_tokens_are_told(command: Command, parents: Path) -> None:
    write(parents / "one", weights(1), tokens=TOKENS[:-3])
    outcome = command("doctor", "one")
    assert outcome.code == 0
    assert "3 rows of the embedding belong to no token" in outcome.err


def test_rows_of_zeros_and_far_rows_are_odd_unless_no_token_has_them(command: Command, parents: Path) -> None:
    embedding = weights(1)["model.embed_tokens.weight"]
    embedding[[2, 18]] = 0
    embedding[5] *= 1000
    change(parents / "one", **{"model.embed_tokens.weight": embedding})
    write(parents / "one", load_file(parents / "one" / "model.safetensors"), tokens=TOKENS[:-3])
    outcome = command("doctor", "one")
    assert outcome.code == 0
    assert lines(outcome, "odd") == [
        'odd: 1 of 20 rows of "model.embed_tokens.weight" are zero: 2 ("t2")',
        'odd: 1 of 20 rows of "model.embed_tokens.weight" are more than 20 times as large as the middle one: 5 ("t5")',
    ]


def test_token_ids_beyond_the_rows_are_wrong(command: Command, parents: Path) -> None:
    write(parents / "one", weights(1), eos_token_id=[1, 20])
    (parents / "one" / "generation_config.json").write_text('{"pad_token_id": 99}')
    assert lines(command("doctor", "one"), "wrong") == [
        "wrong: config.json says eos_token_id = 20, the embedding has 20 rows",
        "wrong: generation_config.json says pad_token_id = 99, the embedding has 20 rows",
    ]


def test_biases_and_the_configuration_have_to_agree(command: Command, parents: Path) -> None:
    write(parents / "one", weights(1), attention_bias=True)
    (line,) = lines(command("doctor", "one"), "wrong")
    assert "attention_bias = true, and no tensor is such a bias" in line
    bias = {"model.layers.0.self_attn.q_proj.bias": np.ones(WIDTH, np.float32)}
    write(parents / "one", {**weights(1), **bias})
    (line,) = lines(command("doctor", "one"), "wrong")
    assert "attention_bias = false, and there are 1 such biases" in line


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_hidden_layers": 4}, "num_hidden_layers = 4"),
        ({"vocab_size": 21}, "vocab_size = 21"),
        ({"tie_word_embeddings": True}, "ties the head to the embedding"),
    ],
)
def test_what_verify_finds_is_wrong_here_too(
    command: Command, parents: Path, config: dict[str, Any], said: str
) -> None:
    write(parents / "one", weights(1), **config)
    found = lines(command("doctor", "one"), "wrong")
    assert found
    assert said in found[0]


def test_values_that_are_not_finite_are_wrong_and_do_not_stop_the_rest(command: Command, parents: Path) -> None:
    broken = weights(1)["model.embed_tokens.weight"]
    broken[0, 0] = np.nan
    change(parents / "one", **{"model.embed_tokens.weight": broken})
    outcome = command("doctor", "one", "--against", "two", "--json")
    assert outcome.code == 1
    record = json.loads(outcome.out)
    assert len(record["problems"]) == 1
    assert "not finite" in record["problems"][0]
    assert record["parts"][1]["ratio"] is not None


def test_the_format_in_the_metadata_counts_only_where_transformers_will_read(command: Command, parents: Path) -> None:
    save_file(weights(1), parents / "one" / "model.safetensors", metadata={"by": "me"})
    (line,) = lines(command("doctor", "one"), "wrong")
    assert "which transformers refuses" in line
    (parents / "one" / "config.json").unlink()
    outcome = command("doctor", "one")
    assert outcome.code == 0
    assert "which transformers refuses" in outcome.err


def test_threads_change_nothing(command: Command, parents: Path) -> None:
    merged(command, "one", "two")
    assert command("doctor", "out", *AGAINST, "-j", 1).out == command("doctor", "out", *AGAINST, "-j", 7).out


def test_what_cannot_be_opened_is_one_line(command: Command, parents: Path) -> None:
    outcome = command("doctor", "none")
    assert outcome.code == 1
    assert len(outcome.errors) == 1
    outcome = command("doctor", "one", "--against", "none")
    assert outcome.code == 1
    assert len(outcome.errors) == 1
