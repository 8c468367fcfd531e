"""Loads outputs of every kind in two generations of transformers and compares them with merges done in float64.

    python benchmarks/load_in_transformers.py [--work DIR] [--only WORD]

Makes one virtual environment per version (CPU torch first), builds small random models of several families in each,
merges them with the graftwork of the current environment, and loads every output in both versions. A line is clean if
no key is missing, unexpected or of another shape; if every tensor is the float64 merge rounded once to bfloat16 (in
float32 outputs, which are also computed in float32, within a unit of the largest operand's last place); and if the
logits are those of the float64 merge but for that rounding. Where an output has a tokenizer, it has to load and give
the ids. Takes some minutes, mostly to install.

The float64 merges share no code with graftwork: they are written out below, on plain tensors. A tokenizer that
transformers 5 has saved does not load in transformers 4, merged or not; there only the model is loaded.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSIONS = ("4.57.6", "5.23.0")
LAYERS = 4
KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")
WORDS = {"words/0": (80, ("<s>", "</s>")), "words/1": (88, ("<s>", "<|im_start|>", "<|im_end|>"))}
"""Ordinary and added tokens; the second model's words begin with the tenth of the first."""

Model = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# The cases: a recipe, and the same in float64


@dataclass(frozen=True)
class Case:
    """One output.

    Args:
        name: Kind and family.
        models: Folders of its inputs; `$0` in the recipe is the first.
        recipe: The recipe.
        merged: The merge on float64 tensors; the last argument has the inputs' folders and the output's.
        layers: Layers of the output, if it has others than its donor.
        settings: Settings of the merge.
        untied: The output's head is not its embedding, though its donor's is.
    """

    name: str
    models: tuple[str, ...]
    recipe: str
    merged: Callable[[list[Model], list[Path]], Model]
    layers: int | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    untied: bool = False


LINEAR = "{merge_method: linear, models: [{model: $0, parameters: {weight: 1}}, {model: $1, parameters: {weight: 2}}]"
HEAD_SIDE = ("norm", "ln_f", "lm_head", "layernorm", "cls", "classifier", "pooler")


def linear(models: list[Model], folders: list[Path]) -> Model:
    return {name: (models[0][name] + 2 * models[1][name]) / 3 for name in models[0]}


def task_arithmetic(models: list[Model], folders: list[Path]) -> Model:
    base, one, two = models
    return {name: base[name] + (one[name] - base[name]) + 0.5 * (two[name] - base[name]) for name in base}


def stacked(models: list[Model], folders: list[Path]) -> Model:
    """Layers 0 to 2 of the first model, then 1 to 3 of the second, whose head side the output has."""
    first, second = models
    made: Model = {}
    for name, tensor in first.items():
        parts = name.split(".")
        place = next((at for at, part in enumerate(parts) if part.isdigit()), None)
        if place is None:
            ends = any(part in HEAD_SIDE for part in parts)
            made[name] = second[name] if ends else tensor
            continue
        layer = int(parts[place])
        if layer <= 2:
            made[name] = tensor
        if layer >= 1:
            parts[place] = str(layer + 2)
            made[".".join(parts)] = second[name]
    return made


def untied(models: list[Model], folders: list[Path]) -> Model:
    lent = {**models[0], "lm_head.weight": models[0]["model.embed_tokens.weight"]}
    return linear([lent, models[1]], folders)


def adapted(models: list[Model], folders: list[Path]) -> Model:
    """The base with the adapter that stands beside it: W + 2·B·A, transposed for GPT-2."""
    (base,) = models
    factors = tensors_of(folders[0].parent / "adapter" / "adapter_model.safetensors")
    made = dict(base)
    for key, right in factors.items():
        if key.endswith(".lora_A.weight"):
            left = factors[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            own = base.get(name, base.get("model.embed_tokens.weight"))
            change = 2 * left @ right
            made[name] = own + (change if change.shape == own.shape and "c_fc" not in name else change.T)
    return made


def towers(models: list[Model], folders: list[Path]) -> Model:
    """One tower is the plain mean, the other weighs the second model three times; the rest is the first model's."""
    made = {}
    for name, tensor in models[0].items():
        if name.startswith(("text_model.encoder.", "encoder.")):
            made[name] = (tensor + models[1][name]) / 2
        elif name.startswith(("vision_model.", "visual_projection.", "decoder.", "lm_head.")):
            made[name] = (tensor + 3 * models[1][name]) / 4
        else:
            made[name] = tensor
    return made


def by_token(models: list[Model], folders: list[Path]) -> Model:
    """Rows of tokens by what the tokenizers say, in the order of the output's; padding is the mean of the real rows."""
    import torch
    from tokenizers import Tokenizer

    one, two, out = (
        Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True) for folder in folders
    )
    assert all(out[token] == number for token, number in one.items() if token in out)
    made = linear(
        [{name: tensor for name, tensor in model.items() if "embed" not in name and "lm_head" not in name}
         for model in models], folders,
    )  # fmt: skip
    size = json.loads((folders[-1] / "config.json").read_text())["vocab_size"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        a, b = (model[name] for model in models)
        views = [torch.zeros(size, a.shape[1], dtype=torch.float64) for _ in models]
        for token, row in out.items():
            own = [tensor[ids[token]] if token in ids else None for tensor, ids in ((a, one), (b, two))]
            for view, mine, other in zip(views, own, reversed(own), strict=True):
                view[row] = mine if mine is not None else other
        count = len(out)
        for view in views:
            view[count:] = view[:count].mean(0)
        made[name] = (views[0] + 2 * views[1]) / 3
    return made


def pairs(family: str) -> tuple[str, str]:
    return f"{family}/0", f"{family}/1"


SLICES = (
    "{merge_method: passthrough, slices: [{sources: [{model: $0, layer_range: [0, 3]}]}, "
    "{sources: [{model: $1, layer_range: [1, 4]}]}]}"
)
ARITHMETIC = (
    "{merge_method: task_arithmetic, base_model: $0, dtype: float32, models: [{model: $1, parameters: {weight: 1}}, "
    "{model: $2, parameters: {weight: 0.5}}]}"
)


def modules(first: str, second: str) -> str:
    one, two = (
        f"{{models: [{{model: $0, parameters: {{weight: 1}}}}, {{model: $1, parameters: {{weight: {weight}}}}}]}}"
        for weight in (1, 3)
    )
    return f"{{merge_method: linear, modules: {{{first}: {one}, {second}: {two}}}}}"


CASES = (
    *(Case(f"{family} plain", pairs(family), LINEAR + "}", linear)
      for family in ("llama", "tied", "gpt2", "bert", "vit", "qwen2", "clip", "t5")),
    *(Case(f"{family} sharded", pairs(family), LINEAR + "}", linear, settings=(("max_shard_bytes", 20_000),))
      for family in ("llama", "tied", "gpt2", "vit")),
    *(Case(f"{family} float32", (*pairs(family), f"{family}/2"), ARITHMETIC, task_arithmetic)
      for family in ("llama", "tied", "bert")),
    *(Case(f"{family} slices", pairs(family), SLICES, stacked, layers=6)
      for family in ("llama", "tied", "gpt2", "bert", "vit", "qwen2")),
    Case("tied with untied", ("tied/0", "free/0"), LINEAR + "}", untied, untied=True),
    *(Case(f"{family} adapter", (f"{family}/0",),
           "{merge_method: passthrough, models: [{model: $0+$adapter}]}", adapted, untied=family == "tied")
      for family in ("llama", "tied", "gpt2")),
    Case("clip modules", pairs("clip"),
         modules("text_model.encoder.layers", "vision_tower"), towers),
    Case("t5 modules", pairs("t5"), modules("encoder", "decoder"), towers),
    Case("words union", pairs("words"), LINEAR + ", tokenizer: {source: union}, chat_template: chatml}", by_token),
    Case("words padded", pairs("words"), LINEAR + ", tokenizer: {source: union, pad_to_multiple_of: 64}}", by_token),
    Case("words base", pairs("words"), LINEAR + ", tokenizer: {source: base}, chat_template: chatml}", by_token),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# In the environments: models are built, outputs are loaded


def build(folder: Path) -> None:
    """Write the families, three models each, with random weights in bfloat16."""
    import torch
    from safetensors.torch import save_file
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        CLIPConfig,
        CLIPModel,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
        ViTConfig,
        ViTForImageClassification,
    )  # fmt: skip

    small = {
        "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64,
        "initializer_range": 0.1,
    }  # fmt: skip
    text = {"vocab_size": 96, "num_key_value_heads": 2, **small}
    image = {"image_size": 32, "patch_size": 8}
    sizes = {name: ordinary + len(added) + 5 for name, (ordinary, added) in WORDS.items()}
    families: dict[str, Callable[[int], Any]] = {
        "llama": lambda n: LlamaForCausalLM(LlamaConfig(attention_bias=True, mlp_bias=True, **text)),
        "tied": lambda n: LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **text)),
        "free": lambda n: LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **text)),
        "gpt2": lambda n: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=LAYERS, n_head=4)),
        "bert": lambda n: BertForMaskedLM(BertConfig(vocab_size=96, **small)),
        "vit": lambda n: ViTForImageClassification(ViTConfig(**image, **small)),
        "qwen2": lambda n: Qwen2ForCausalLM(Qwen2Config(**text)),
        "clip": lambda n: CLIPModel(
            CLIPConfig(
                text_config={"vocab_size": 96, "eos_token_id": 95, **small}, vision_config={**image, **small},
                projection_dim=16,
            )
        ),
        "t5": lambda n: T5ForConditionalGeneration(
            T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_decoder_layers=2, num_heads=4)
        ),
        "words": lambda n: LlamaForCausalLM(LlamaConfig(**{**text, "vocab_size": sizes.get(f"words/{n}", 96)})),
    }  # fmt: skip
    for family, make in families.items():
        for seed in range(3):
            torch.manual_seed(1000 * list(families).index(family) + seed)
            module = make(seed)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter += 0.05 * torch.randn(parameter.shape)  # no bias is zero, no gain is one
            module.bfloat16().save_pretrained(folder / family / str(seed))
    for name in WORDS:
        write_tokenizer(folder / name)
    for family, shapes in {
        "llama": {"model.layers.1.mlp.up_proj": (64, 32), "model.layers.0.self_attn.q_proj": (32, 32)},
        "tied": {"lm_head": (96, 32), "model.layers.2.mlp.down_proj": (32, 64)},
        "gpt2": {"transformer.h.1.mlp.c_fc": (128, 32)},
    }.items():
        place = folder / family / "adapter"
        place.mkdir(exist_ok=True)
        factors = {}
        for module, (leaving, entering) in shapes.items():
            factors[f"base_model.model.{module}.lora_A.weight"] = 0.1 * torch.randn(4, entering)
            factors[f"base_model.model.{module}.lora_B.weight"] = 0.1 * torch.randn(leaving, 4)
        save_file(factors, place / "adapter_model.safetensors", {"format": "pt"})
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "fan_in_fan_out": family == "gpt2"}
        (place / "adapter_config.json").write_text(json.dumps(config))


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    count, added = WORDS[f"{folder.parent.name}/{folder.name}"]
    start = 10 * int(folder.name)
    words = ["[UNK]", *(f"w{start + number}" for number in range(count - 1))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    fast.add_special_tokens({"additional_special_tokens": list(added)})
    fast.save_pretrained(folder)


def tensors_of(path: Path) -> Model:
    """Return the tensors of a folder or file in float64."""
    from safetensors.torch import load_file

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {name: tensor.double() for file in files for name, tensor in load_file(file).items()}


def load(models: Path, outputs: Path, words: str) -> None:
    """Load every output and print a JSON line for each: what is wrong, and how far it is from the float64 merge."""
    import warnings

    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for case in CASES:
        if words not in case.name:
            continue
        found: dict[str, Any] = {"case": case.name}
        try:
            found |= compared(case, [models / name for name in case.models], outputs / folder_of(case))
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        print(json.dumps(found), flush=True)


def compared(case: Case, folders: Sequence[Path], output: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import save_file

    found: dict[str, Any] = {}
    reference = output.parent / "reference"
    shutil.rmtree(reference, ignore_errors=True)
    reference.mkdir()
    inputs = [tensors_of(folder) for folder in folders]
    expected = case.merged(inputs, [*folders, output])
    stored = tensors_of(output)
    found["names"] = sorted(expected.keys() ^ stored.keys())
    dtype = torch.float32 if "float32" in case.name else torch.bfloat16
    worst = 0.0
    for name in expected.keys() & stored.keys():
        size = expected[name].abs()
        if dtype == torch.float32:
            # Sums are formed in float32, too: where large values cancel, their last place counts.
            size = torch.stack([size, *(model[name].abs() for model in inputs)]).amax(0)
        unit = torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(size.clamp_min(1e-30))))
        worst = max(worst, float(((stored[name] - expected[name]).abs() / unit).max()))
    found["units"] = round(worst, 4)
    config = json.loads((folders[0] / "config.json").read_text())
    if case.layers is not None:
        key = "n_layer" if "n_layer" in config else "num_hidden_layers"
        config[key] = case.layers
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][:3] + config["layer_types"][1:]
    if case.untied:
        config["tie_word_embeddings"] = False
    if "vocab_size" in config and "words" in case.name:
        config["vocab_size"] = len(expected["lm_head.weight"])
    (reference / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in expected.items()}, reference / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    logits = []
    for place in (output, reference):
        model, info = model_of(place)
        if place == output:
            found |= {
                key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
            }
        logits.append(logits_of(model))
    scale = float(logits[1].std())
    found["logits"] = float((logits[0] - logits[1]).abs().max()) / scale
    if "words" in case.name:
        found |= tokenized(output)
    return found


def model_of(folder: Path) -> tuple[Any, dict[str, Any]]:
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    # CLIP of transformers 4 fills its masks in float32.
    dtype = torch.float32 if "CLIP" in kind.__name__ else torch.float64
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype=dtype)
    return model.eval(), info


def logits_of(model: Any) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 80, (2, 12), generator=generator)
    pixels = torch.randn(2, 3, 32, 32, generator=generator).to(model.dtype)
    name = type(model).__name__
    with torch.no_grad():
        if name.startswith("ViT"):
            return model(pixels).logits
        if name.startswith("CLIP"):
            ids[:, -1] = 95
            return model(input_ids=ids, pixel_values=pixels).logits_per_image
        if name.startswith("T5"):
            return model(input_ids=ids, decoder_input_ids=ids[:, :5]).logits
        return model(ids).logits


def tokenized(folder: Path) -> dict[str, Any]:
    """Return what is wrong with the tokenizer of an output: it must give the ids of its file, and the template."""
    import transformers

    saved = json.loads((folder / "tokenizer_config.json").read_text()).get("tokenizer_class")
    if not hasattr(transformers, str(saved)) and saved == "TokenizersBackend":
        return {"tokenizer": "of transformers 5"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    wrong = []
    whole = json.loads((folder / "tokenizer.json").read_text())
    ids = whole["model"]["vocab"] | {entry["content"]: entry["id"] for entry in whole["added_tokens"]}
    wrong += [token for token, number in ids.items() if tokenizer.convert_tokens_to_ids(token) != number]
    wrong += [token for token, number in ids.items() if tokenizer.encode(token) != [number]]
    if (folder / "chat_template.jinja").exists():
        text = tokenizer.apply_chat_template([{"role": "user", "content": "w12"}], tokenize=False)
        wrong += [] if text == "<|im_start|>user\nw12<|im_end|>\n" else [text]
    return {"tokenizer": wrong}


# ---------------------------------------------------------------------------------------------------------------------
# Here: outputs are merged, and the table is printed


def environment(folder: Path, version: str) -> Path:
    """Return the Python of a virtual environment that has this version of transformers, made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        for packages in (["torch==2.13.0", "numpy"], [f"transformers=={version}", "safetensors"]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def folder_of(case: Case) -> str:
    return case.name.replace(" ", "-")


def merge_all(models: Path, outputs: Path, words: str) -> None:
    from graftwork.merge import merge
    from graftwork.merge.run import Settings

    outputs.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        if words not in case.name:
            continue
        folders = [models / name for name in case.models]
        recipe = outputs / "recipe.yml"
        named = {f"${number}": folder for number, folder in enumerate(folders)}
        text = case.recipe
        for word, place in {**named, "$adapter": folders[0].parent / "adapter"}.items():
            text = text.replace(word, str(place))
        recipe.write_text(text)
        merge(recipe, outputs / folder_of(case), settings=Settings(force=True, **dict(case.settings)))


def clean(report: dict[str, Any]) -> bool:
    return (
        "error" not in report
        and not any(report[key] for key in ("names", *KEYS))
        and report["units"] <= (1 if "float32" in report["case"] else 0.501)
        and report["logits"] <= (1e-5 if "float32" in report["case"] else 0.1)
        and report.get("tokenizer", []) in ([], "of transformers 5")
    )


def main() -> int:
    """Print one line per case, version that saved the models, and version that loads; return 1 if one is not clean."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "graftwork-transformers")
    parser.add_argument("--only", default="", metavar="WORD", help="cases whose name has this in it")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--load", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        build(options.build)
        return 0
    if options.load:
        load(*options.load, options.only)
        return 0
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    pythons = {version: environment(work / f"environment-{version}", version) for version in VERSIONS}
    bad = 0
    print(f"{'case':18} {'saved by':9} {'loaded by':9}        units  logits")
    for saved, python in pythons.items():
        models, outputs = work / f"models-{saved}", work / "merged" / saved
        if not (models / "built").exists():
            shutil.rmtree(models, ignore_errors=True)
            subprocess.run([python, __file__, "--build", models], check=True, stderr=subprocess.DEVNULL)
            (models / "built").touch()
        merge_all(models, outputs, options.only)
        for loaded, other in pythons.items():
            command = [other, __file__, "--only", options.only, "--load", models, outputs]
            ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            for line in ended.stdout.splitlines():
                report = json.loads(line)
                fine = clean(report)
                bad += not fine
                figures = f"{report.get('units', float('nan')):6.3f}  {report.get('logits', float('nan')):.1e}"
                name = report.pop("case")
                print(f"{name:18} {saved:9} {loaded:9} {'clean' if fine else 'BAD  '} {figures}", end="")
                print("" if fine else f"  {report}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
