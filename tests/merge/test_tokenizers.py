"""Vocabularies that differ: unions, rows by token, padding, token ids, chat templates."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from graftwork.merge import load_recipe, make_plan, merge
from graftwork.merge.checkpoint import Checkpoint, load_numpy
from graftwork.merge.errors import MismatchError, RecipeError
from graftwork.merge.plan import Options
from graftwork.merge.tokens import read_vocabulary, same_vocabulary, union_vocabulary

WIDTH = 4
ONE = [f"t{number}" for number in range(20)]
TWO = ["t5", "t1", "Ġnew", "her", *[f"t{number}" for number in range(6, 14)], "t0"]


def model(
    folder: Path, seed: int, tokens: list[str], added: list[str], *, rows: int | None = None, **config: Any
) -> Path:
    """Write a model folder: ordinary tokens, then added ones, then (perhaps) rows without a token."""
    folder.mkdir()
    every = [*tokens, *added]
    rows = rows or len(every)
    random = np.random.default_rng(seed)
    tensors = {
        "model.embed_tokens.weight": random.standard_normal((rows, WIDTH)).astype(np.float32),
        "model.layers.0.mlp.weight": random.standard_normal((WIDTH, WIDTH)).astype(np.float32),
        "model.layers.1.mlp.weight": random.standard_normal((WIDTH, WIDTH)).astype(np.float32),
        "lm_head.weight": random.standard_normal((rows, WIDTH)).astype(np.float32),
    }
    save_file(tensors, folder / "model.safetensors")
    settings = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": rows,
        "bos_token_id": len(tokens),
    }
    (folder / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 2, **config}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [len(tokens), len(every) - 1]}))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    entries = [{"id": len(tokens) + at, "content": token, **flags} for at, token in enumerate(added)]
    whole = {
        "version": "1.0", "added_tokens": entries,
        "model": {"type": "BPE", "vocab": {token: number for number, token in enumerate(tokens)}, "merges": []},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    decoder = {str(entry["id"]): {"content": entry["content"], **flags} for entry in entries}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder, "bos_token": added[0]}))
    return folder


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model(Path("one"), 1, ONE, ["<s>", "</s>"])
    model(Path("two"), 2, TWO, ["<s>", "<tool>"])
    return tmp_path


def recipe(tokenizer: str, *, method: str = "linear", models: tuple[str, ...] = ("one", "two"), more: str = "") -> Path:
    entries = ", ".join(f"{{model: {name}, parameters: {{weight: 0.5}}}}" for name in models)
    Path("recipe.yml").write_text(f"merge_method: {method}\nmodels: [{entries}]\n{tokenizer}\n{more}\n")
    return Path("recipe.yml")


def values(path: str, name: str = "model.embed_tokens.weight") -> np.ndarray:
    with Checkpoint.open(path) as checkpoint:
        return load_numpy(checkpoint)[name].astype(np.float64)


UNION = [*ONE, "<s>", "</s>", "Ġnew", "her", "<tool>"]


def test_a_union_keeps_the_donors_ids_and_appends_the_others_tokens(models: Path) -> None:
    result = merge(recipe("tokenizer: {}"), "out")
    out = read_vocabulary(Path("out"))
    assert out is not None
    assert sorted(out.ids, key=lambda token: out.ids[token]) == UNION
    ids = [(vocabulary.ids if (vocabulary := read_vocabulary(Path(name))) else {}) for name in ("one", "two")]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        parts = [values(folder, name) for folder in ("one", "two")]
        found = values("out", name)
        assert found.shape == (len(UNION), WIDTH)
        for row, token in enumerate(UNION):
            own = [part[number[token]] for part, number in zip(parts, ids, strict=True) if token in number]
            # A model that lacks the token lends the other's row: the mean of both views is that row.
            assert np.abs(found[row] - np.mean(own, axis=0)).max() < 1e-7, token
    config = json.loads(Path("out/config.json").read_text())
    assert config["vocab_size"] == len(UNION)
    assert config["bos_token_id"] == len(ONE)
    decoder = json.loads(Path("out/tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert decoder[str(UNION.index("her"))]["content"] == "her"
    assert decoder[str(UNION.index("<tool>"))]["special"] is True
    assert any(
        "3 tokens more" in line and "1 begin" in line.replace("which 1 begin", "1 begin")
        for line in result.plan.warnings
    )


def test_only_added_tokens_on_request(models: Path) -> None:
    merge(recipe("tokenizer: {source: union, new_tokens: added}"), "out")
    out = read_vocabulary(Path("out"))
    assert out is not None
    assert out.size == len(ONE) + 3
    assert out.ids["<tool>"] == len(ONE) + 2


def test_the_bases_and_another_models_tokenizer(models: Path) -> None:
    merge(recipe("tokenizer_source: base"), "base")
    assert values("base").shape[0] == len(ONE) + 2
    assert Path("base/tokenizer.json").read_bytes() == Path("one/tokenizer.json").read_bytes()
    result = merge(recipe("tokenizer_source: two"), "other")
    assert values("other").shape[0] == len(TWO) + 2
    assert Path("other/tokenizer.json").read_bytes() == Path("two/tokenizer.json").read_bytes()
    config = json.loads(Path("other/config.json").read_text())
    assert config["bos_token_id"] == len(TWO)  # <s> has another id there
    generation = json.loads(Path("other/generation_config.json").read_text())
    assert generation["eos_token_id"][0] == len(TWO)
    assert any("eos_token_id" in note or "lacks the donor's" in note for note in result.plan.tokenizer.notes)


def test_padding_rows_are_the_mean_of_the_real_ones(models: Path) -> None:
    merge(recipe("tokenizer: {source: union, pad_to_multiple_of: 16}"), "out")
    found = values("out")
    assert found.shape[0] == 32
    assert np.abs(found[len(UNION) :] - found[: len(UNION)].mean(0)).max() < 1e-6
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == 32


def test_rows_of_single_tokens_as_the_recipe_says(models: Path) -> None:
    merge(
        recipe(
            "tokenizer:\n  source: union\n  tokens:\n"
            "    <tool>: {source: {kind: zero}}\n"
            "    her: {source: {kind: model_token, model: one, token: t3}}\n"
            "    t2: {source: {kind: model_token, model: two, token_id: 0}, force: true}\n"
            "    <new>: {source: {kind: model_token, model: two, token: t1}}"
        ),
        "out",
    )
    one, two, found = values("one"), values("two"), values("out")
    assert np.abs(found[UNION.index("<tool>")] - two[TWO.index("t0") + 2] / 2).max() < 1e-7  # one: zeros, two: its own
    assert np.abs(found[UNION.index("her")] - (one[3] + two[TWO.index("her")]) / 2).max() < 1e-7
    assert np.abs(found[2] - two[0]).max() < 1e-7
    assert np.abs(found[-1] - two[1]).max() < 1e-7
    vocabulary = read_vocabulary(Path("out"))
    assert vocabulary is not None
    assert vocabulary.ids["<new>"] == len(UNION)


def test_with_a_base_missing_rows_are_the_bases(models: Path) -> None:
    model(Path("three"), 3, ONE[:10], ["<s>"])
    Path("recipe.yml").write_text(
        "merge_method: task_arithmetic\nbase_model: one\ntokenizer: {source: base}\n"
        "models: [{model: two, parameters: {weight: 1}}, {model: three, parameters: {weight: 1}}]"
    )
    merge("recipe.yml", "out")
    one, two, three, found = values("one"), values("two"), values("three"), values("out")
    assert np.abs(found[15] - one[15]).max() < 1e-6  # neither has it: both task vectors are zero there
    wanted = one[13] + (two[TWO.index("t13")] - one[13])
    assert np.abs(found[13] - wanted).max() < 1e-6  # only two has it
    wanted = one[5] + (two[0] - one[5]) + (three[5] - one[5])
    assert np.abs(found[5] - wanted).max() < 1e-6


def test_rows_beyond_the_tokenizer_are_cut(models: Path) -> None:
    model(Path("padded"), 4, ONE, ["<s>", "</s>"], rows=32)
    merge(recipe("tokenizer: {source: base}", models=("padded", "two")), "out")
    assert values("out").shape[0] == len(ONE) + 2


def test_equal_runs_give_equal_bytes_whatever_the_threads(models: Path) -> None:
    recipe("tokenizer: {}")
    merge("recipe.yml", "a", threads=1)
    merge("recipe.yml", "b", threads=2)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()
    order = [union_vocabulary(v, [("two", w)]).tokens for v, w in [_both()] * 3]
    assert order[0] == order[1] == order[2]


def _both() -> Any:
    return read_vocabulary(Path("one")), read_vocabulary(Path("two"))


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ("tokenizer: {source: union, tokens: {her: {source: {kind: zeor}}}}", "must be zero or model_token"),
        ("tokenizer: {source: union, tokens: {her: {force: true}}}", "which row is meant"),
        ("tokenizer: {source: union, tokens: {her: {sorce: one}}}", 'did you mean "source"'),
        ("tokenizer: {pad_to_multiple_of: 0}", "at least 1"),
        ("tokenizer: {new_tokens: some}", "must be all or added"),
        ("tokenizer: {source: 3}", "must be base, union or a model"),
        ("tokenizer: {}\ntokenizer_source: base", "give only one of them"),
    ],
)
def test_wrong_settings_are_found_before_anything_is_read(models: Path, tokenizer: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe(tokenizer))


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ("tokenizer: {tokens: {her: {source: {kind: model_token, model: two, token: xyz}}}}", 'two has no token "xyz"'),
        ("tokenizer: {tokens: {her: {source: {kind: model_token, model: two, token_id: 99}}}}", "no token"),
        ("tokenizer: {tokens: {her: {source: three}}}", "three is not among the models"),
        ("tokenizer: {}\nchat_template: chatmll", 'did you mean "chatml"'),
        ("tokenizer: {}\nchat_template: auto", "no input has a chat template"),
    ],
)
def test_wrong_tokens_are_named(models: Path, tokenizer: str, message: str) -> None:
    model(Path("three"), 3, ONE[:10], ["<s>"])
    with pytest.raises(MismatchError, match=message):
        make_plan(load_recipe(recipe(tokenizer)).recipes[0])


def test_a_model_without_a_tokenizer_is_named(models: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("two", name).unlink()
    with pytest.raises(MismatchError, match="two has no tokenizer files"):
        make_plan(load_recipe(recipe("tokenizer: {}")).recipes[0])


def test_equally_large_vocabularies_with_other_tokens_are_a_warning(models: Path) -> None:
    model(Path("same"), 3, ONE, ["<s>", "</s>"])
    other = model(Path("other"), 4, [*ONE[:5], "new", "words", *ONE[7:]], ["<s>", "</s>"])
    assert not strange_tokens("", "one", "same")
    (line,) = strange_tokens("", "one", "same", "other")
    assert line.startswith('2 ids mean other tokens in other than in one (5 is "t5" and "new", 6 is "t6" and "words")')
    with pytest.raises(RecipeError, match="2 ids mean other tokens"):
        make_plan(load_recipe("recipe.yml").recipes[0], Options(strict=True))
    assert not strange_tokens("tokenizer: {}", "one", "other")
    assert not strange_tokens("tokenizer: {source: base}", "one", "other")
    (other / "tokenizer.json").write_text("{")  # no obstacle to a merge that leaves tokens alone
    (line,) = strange_tokens("", "same", "other")
    assert line.startswith("cannot compare the models' tokenizers")


def strange_tokens(tokenizer: str, *models: str) -> list[str]:
    """Return what the plan of a merge warns of that has to do with tokens of different meaning."""
    plan = make_plan(load_recipe(recipe(tokenizer, models=models)).recipes[0])
    plan.close()
    return [line for line in plan.warnings if "mean other tokens" in line or "cannot compare" in line]


def test_vocabularies_of_other_sizes_are_an_error_with_the_ways_out(models: Path) -> None:
    with pytest.raises(MismatchError) as caught:
        make_plan(load_recipe(recipe("")).recipes[0])
    *problems, hint = caught.value.problems
    assert len(problems) == 2
    assert "one has 22 rows, two has 15 rows" in hint
    for way in ("tokenizer: {source: union}", "tokenizer: {source: base}", "exclude"):
        assert way in hint


def test_chat_templates(models: Path) -> None:
    merge(recipe("tokenizer: {}\nchat_template: chatml"), "known")
    assert "<|im_start|>" in Path("known/chat_template.jinja").read_text()
    Path("two/chat_template.jinja").write_text("{{ messages }}")
    merge(recipe("tokenizer: {}\nchat_template: auto"), "auto")
    assert Path("auto/chat_template.jinja").read_text() == "{{ messages }}"
    config = json.loads(Path("one/tokenizer_config.json").read_text())
    Path("one/tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ old }}"}))
    merge(recipe("tokenizer: {}\nchat_template: '{{ mine }}'"), "own")
    assert json.loads(Path("own/tokenizer_config.json").read_text())["chat_template"] == "{{ mine }}"
    assert Path("own/generation_config.json").exists()


def test_other_tokenizer_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\nhello\n")
    found = read_vocabulary(tmp_path)
    assert found is not None
    assert dict(found.ids) == {"[PAD]": 0, "[UNK]": 1, "hello": 2}
    (tmp_path / "vocab.txt").unlink()
    (tmp_path / "spiece.model").write_bytes(sentencepiece([("<unk>", 2), ("▁a", 1), ("b", 1)]))
    found = read_vocabulary(tmp_path)
    assert found is not None
    assert dict(found.ids) == {"<unk>": 0, "▁a": 1, "b": 2}
    assert set(found.added) == {"<unk>"}
    assert same_vocabulary(found).files() == {"spiece.model": tmp_path / "spiece.model"}
    with pytest.raises(MismatchError, match="convert it once"):
        union_vocabulary(found, [("x", _vocabulary({"c": 0}, tmp_path))]).files()


def _vocabulary(ids: dict[str, int], folder: Path) -> Any:
    from graftwork.merge.tokens import Vocabulary

    return Vocabulary(folder, ids, {}, "spiece.model")


def sentencepiece(pieces: list[tuple[str, int]]) -> bytes:
    """Return a SentencePiece model of these pieces: text, score and kind of each."""
    data = b""
    for text, kind in pieces:
        word = text.encode()
        piece = b"\x0a" + bytes([len(word)]) + word + b"\x15\x00\x00\x80\xbf" + b"\x18" + bytes([kind])
        data += b"\x0a" + bytes([len(piece)]) + piece
    return data + b"\x12\x02\x08\x01"


def test_a_union_needs_no_library_of_tokenizers(models: Path) -> None:
    recipe("tokenizer: {}")
    script = (
        "import sys; from graftwork.merge import merge; merge('recipe.yml', 'out');"
        "print({'transformers', 'tokenizers', 'peft', 'huggingface_hub', 'sentencepiece'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
