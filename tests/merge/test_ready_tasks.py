"""Ready-made tasks for Hugging Face folders: the numbers of transformers itself, in everything that takes a task."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graftwork.merge import evaluate, load_recipe, merge
from graftwork.merge.checkpoint import Checkpoint
from graftwork.merge.errors import DependencyError, TaskError
from graftwork.merge.evaluation import logits_of
from graftwork.merge.task import Task, fit, load_task

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TEXTS = [f"the {kind} film was {word}" for kind in ("first", "very long") for word in ("good", "bad", "fine", "awful")]
LABELS = ["negative" if text.endswith(("bad", "awful")) else "positive" for text in TEXTS]
SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
MERGED = ("tied", "gpt2", "bert", "resnet")
"""Families of which there are a base and two relatives."""
NAMES: dict[str, Any] = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models of each family, with a tokenizer of words, and data."""
    transformers = pytest.importorskip("transformers", reason="ready-made tasks need transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    root = tmp_path_factory.mktemp("transformers")
    words = ["[PAD]", "[UNK]", "[EOS]", *sorted({word for text in TEXTS for word in text.split()})]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )
    size = {"vocab_size": len(words)}
    families = {
        "llama": ("LlamaForCausalLM", "LlamaConfig", {**size, **SMALL, "num_key_value_heads": 1}),
        "tied": ("LlamaForCausalLM", "LlamaConfig", {**size, **SMALL, "tie_word_embeddings": True}),
        "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**size, "n_embd": 16, "n_layer": 2, "n_head": 2}),
        "bert": ("BertForSequenceClassification", "BertConfig", {**size, **SMALL, **NAMES}),
        "gpt2-classes": (
            "GPT2ForSequenceClassification", "GPT2Config", {**size, "n_embd": 16, "n_layer": 2, "n_head": 2, **NAMES},
        ),
        "vit": ("ViTForImageClassification", "ViTConfig", {**SMALL, "image_size": 8, "patch_size": 4, "num_labels": 3}),
        "resnet": (
            "ResNetForImageClassification", "ResNetConfig",
            {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic", "num_labels": 3},
        ),
    }  # fmt: skip
    for name, (kind, config, settings) in families.items():
        for seed in range(3 if name in MERGED else 1):
            torch.manual_seed(0)
            model = getattr(transformers, kind)(getattr(transformers, config)(**settings))
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.1 * seed * torch.randn_like(parameter)
            model.save_pretrained(root / f"{name}-{seed}")
            if "Image" not in kind:
                tokenizer.save_pretrained(root / f"{name}-{seed}")
    rows = [json.dumps({"text": text, "label": label}) for text, label in zip(TEXTS, LABELS, strict=True)]
    (root / "reviews.jsonl").write_text("\n".join(rows))
    (root / "notes.txt").write_text("\n\n".join(["good", *TEXTS]))
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", 24), ("test", 9)):
        arrays[f"x_{split}"] = generator.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        arrays[f"y_{split}"] = np.arange(count) % 3
    np.savez(root / "shapes.npz", **arrays)
    return root


def spec(folder: Path, kind: str, data: str, **more: object) -> str:
    return ",".join([f"hf:{kind}", f"data={folder / data}", *(f"{key}={value}" for key, value in more.items())])


def loaded(folder: Path, kind: str, data: str, model: str, **more: object) -> Task:
    return load_task(spec(folder, kind, data, **more), checkpoint=folder / model)


@pytest.mark.parametrize("model", ["llama-0", "tied-0", "gpt2-0"])
def test_the_loss_of_a_language_model_is_that_of_transformers(folder: Path, model: str) -> None:
    import transformers

    task = loaded(folder, "causal-language-model", "notes.txt", model, batch=3)
    [found] = evaluate([folder / model], [task])
    own = transformers.AutoModelForCausalLM.from_pretrained(folder / model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / model)
    total = count = correct = 0.0
    for text in TEXTS:  # the line with one word predicts nothing
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            output = own(ids, labels=ids)
        total += float(output.loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
        correct += int((output.logits[0, :-1].argmax(-1) == ids[0, 1:]).sum())
    assert found.examples == len(TEXTS)
    assert math.isclose(found.loss, total / count, rel_tol=1e-5)
    assert found.accuracy == pytest.approx(correct / count)
    assert task.head == "lm_head"


def test_padding_predicts_nothing(folder: Path) -> None:
    task = loaded(folder, "causal-language-model", "notes.txt", "llama-0")
    with Checkpoint.open(folder / "llama-0") as checkpoint:
        module = fit(task, checkpoint)
    [(inputs, labels)] = list(task.batches())
    logits = logits_of(task, module, inputs)
    assert logits.shape == (len(TEXTS), module.config.vocab_size, 6)
    padding = inputs["attention_mask"] == 0
    assert padding.any()
    assert not logits.transpose(1, 2)[padding].any()
    assert bool((labels[padding] == -100).all())


@pytest.mark.parametrize("model", ["bert-0", "gpt2-classes-0"])
def test_texts_are_classified_as_transformers_does(folder: Path, model: str) -> None:
    import transformers

    task = loaded(folder, "text-classification", "reviews.jsonl", model)
    [found] = evaluate([folder / model], [task])
    own = transformers.AutoModelForSequenceClassification.from_pretrained(folder / model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / model)
    losses = []
    for text, label in zip(TEXTS, LABELS, strict=True):
        with torch.no_grad():
            logits = own(torch.tensor([tokenizer(text)["input_ids"]])).logits
        losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor([NAMES["label2id"][label]]))))
    assert math.isclose(found.loss, sum(losses) / len(losses), rel_tol=1e-5)
    assert task.head == ("classifier" if model == "bert-0" else "score")


@pytest.mark.parametrize("model", ["vit-0", "resnet-0"])
def test_images_come_from_arrays_and_from_folders(folder: Path, tmp_path: Path, model: str) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="images are read by Pillow")
    task = loaded(folder, "image-classification", "shapes.npz", model)
    [found] = evaluate([folder / model], [task])
    assert (found.split, found.examples, task.name) == ("test", 9, "shapes")
    with np.load(folder / "shapes.npz") as arrays:
        for split in ("train", "test"):
            for number, (pixels, label) in enumerate(zip(arrays[f"x_{split}"], arrays[f"y_{split}"], strict=True)):
                place = tmp_path / "shapes" / split / f"class {label}"
                place.mkdir(parents=True, exist_ok=True)
                pillow.fromarray(pixels).save(place / f"{number:03}.png")
    [again] = evaluate([folder / model], [loaded(tmp_path, "image-classification", "shapes", str(folder / model))])
    assert math.isclose(again.loss, found.loss, rel_tol=1e-6)
    assert again.accuracy == found.accuracy


def test_images_are_prepared_as_the_folder_says(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="transformers prepares images with Pillow")
    (tmp_path / "config.json").write_bytes((folder / "vit-0" / "config.json").read_bytes())
    settings = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 8, "width": 8},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.25, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.25],
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    plain, told = (
        next(iter(loaded(folder, "image-classification", "shapes.npz", str(place)).batches()))[0]
        for place in (folder / "vit-0", tmp_path)
    )
    mean, deviation = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    assert torch.allclose(told, ((plain + 1) / 2 - mean) / deviation, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "data", "family"),
    [
        ("causal-language-model", "notes.txt", "tied"),
        ("causal-language-model", "notes.txt", "gpt2"),
        ("text-classification", "reviews.jsonl", "bert"),
        ("image-classification", "shapes.npz", "resnet"),
    ],
)
def test_recipes_measure_and_learn_on_them(folder: Path, tmp_path: Path, kind: str, data: str, family: str) -> None:
    entries = [
        {"model": str(folder / f"{family}-{seed}"), "task": spec(folder, kind, data, name=f"part{seed}", batch=4)}
        for seed in (1, 2)
    ]
    ways: dict[str, dict[str, Any]] = {
        "fisher": {"measure": {"examples": 8}},
        "regmean": {"measure": {"examples": 8}},
        "adamerging": {"base_model": str(folder / f"{family}-0"), "learn": {"steps": 2, "batch": 4}},
    }
    losses = {}
    for method, more in ways.items():
        (tmp_path / f"{method}.yml").write_text(json.dumps({"merge_method": method, "models": entries, **more}))
        merge(load_recipe(tmp_path / f"{method}.yml"), tmp_path / method)
        task = loaded(folder, kind, data, str(tmp_path / method))
        [found] = evaluate([tmp_path / method], [task])
        losses[method] = found.loss
    assert all(math.isfinite(loss) for loss in losses.values())
    assert losses["fisher"] != losses["regmean"]


WRONG = [
    ("text-classification", "reviews.jsonl", "bert-0", {"text": "txt"}, 'reviews.jsonl:1: it has no field "txt"; did'),
    ("causal-language-model", "notes.txt", "vit-0", {}, "it has no tokenizer"),
    ("text-classification", "review.jsonl", "bert-0", {}, 'there is no such file; did you mean "reviews.jsonl"?'),
    ("text-classification", "notes.txt", "bert-0", {}, "its name ends in none of .jsonl"),
    ("text-classification", "odd.jsonl", "bert-0", {}, "odd.jsonl:1: the class is 'positve', which the model does not"),
    ("text-classification", "many.jsonl", "bert-0", {}, "the class is 7, the model has 2"),
    ("text-classification", "broken.jsonl", "bert-0", {}, "broken.jsonl:1: Expecting"),
    ("causal-language-model", "short.txt", "llama-0", {}, "none of its texts has two tokens"),
    ("causal-language-model", "empty.txt", "llama-0", {}, "it is empty"),
    ("causal-language-model", "notes.txt", "llama-0", {"length": "long"}, 'length is "long", not a whole number'),
    ("causal-language-model", "notes.txt", "llama-0", {"lenght": 3}, 'no argument "lenght"; did you mean "length"?'),
    ("image-classification", "classes", "vit-0", {}, "there are 2 folders, the model has 3 classes"),
    ("image-classification", "other.npz", "vit-0", {}, "it has no x_train and no y_train; it has"),
    ("image-clasification", "shapes.npz", "vit-0", {}, 'did you mean "image-classification"?'),
    ("image-classification", "shapes.npz", "nowhere", {}, "it has no config.json"),
]


@pytest.mark.parametrize(("kind", "data", "model", "more", "message"), WRONG)
def test_what_is_wrong_is_said_in_one_line(
    folder: Path, kind: str, data: str, model: str, more: dict[str, object], message: str
) -> None:
    (folder / "short.txt").write_text("good\n")
    (folder / "empty.txt").write_text("\n")
    (folder / "odd.jsonl").write_text('{"text": "good", "label": "positve"}\n')
    (folder / "many.jsonl").write_text('{"text": "good", "label": 7}\n')
    (folder / "broken.jsonl").write_text('{"text": "good"\n')
    for name in ("one", "two"):
        (folder / "classes" / name).mkdir(parents=True, exist_ok=True)
    np.savez(folder / "other.npz", images=np.zeros(3))
    with pytest.raises(TaskError) as caught:
        loaded(folder, kind, data, model, **more)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_folder_of_the_model_can_be_named(folder: Path) -> None:
    named = spec(folder, "text-classification", "reviews.jsonl", checkpoint=folder / "bert-0", name="mine")
    assert load_task(named).name == "mine"
    with pytest.raises(TaskError, match=r"it needs arguments \(checkpoint\)"):
        load_task(spec(folder, "text-classification", "reviews.jsonl"))


def test_without_transformers_the_command_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftwork.merge import ready_tasks

    ready_tasks._transformers.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DependencyError, match=r'pip install "graftwork\[transformers\]"'):
        load_task("hf:image-classification,data=a.npz", checkpoint=tmp_path)
    ready_tasks._transformers.cache_clear()
