"""Loads merged model folders in two generations of transformers and reports what they miss or do not expect.

    python benchmarks/load_in_transformers.py [--work DIR]

Makes one virtual environment per version (CPU torch first), builds small random models of several families there,
merges them with the graftwork of the current environment, and loads the outputs. Takes some minutes, mostly to install.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

VERSIONS = ("4.57.6", "5.23.0")

BUILD = """
import sys, torch
from pathlib import Path
from transformers import (BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM,
                          ViTConfig, ViTForImageClassification)
small = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
families = {
    "llama": (LlamaForCausalLM,
              LlamaConfig(vocab_size=96, num_key_value_heads=2, attention_bias=True, mlp_bias=True, **small)),
    "tied": (LlamaForCausalLM, LlamaConfig(vocab_size=96, tie_word_embeddings=True, **small)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4)),
    "bert": (BertForMaskedLM, BertConfig(vocab_size=96, **small)),
    "vit": (ViTForImageClassification, ViTConfig(image_size=32, patch_size=8, **small)),
}
for name, (kind, config) in families.items():
    for seed in range(3):
        torch.manual_seed(seed)
        kind(config).bfloat16().save_pretrained(Path(sys.argv[1]) / name / str(seed))
"""

LOAD = """
import json, sys, torch, transformers
from transformers import AutoConfig
path = sys.argv[1]
config = AutoConfig.from_pretrained(path)
kind = getattr(transformers, config.architectures[0])
model, info = kind.from_pretrained(path, output_loading_info=True)
inputs = torch.zeros(1, 3, 32, 32) if "ViT" in config.architectures[0] else torch.arange(8)[None]
with torch.no_grad():
    finite = bool(model.eval().float()(inputs).logits.isfinite().all())
print(json.dumps({key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
                 | {"finite": finite}))
"""

PAIR = "models: [{{model: {m}/0, parameters: {{weight: 1}}}}, {{model: {m}/1, parameters: {{weight: 2}}}}]"
RECIPES = {
    "plain": "{{merge_method: linear, " + PAIR + "}}",
    "sharded": "{{merge_method: linear, " + PAIR + "}}",
    "ties": "{{merge_method: ties, base_model: {m}/0, dtype: float32, parameters: {{weight: 1, density: 0.5}}, "
    "models: [{{model: {m}/1}}, {{model: {m}/2}}]}}",
    "slices": "{{merge_method: passthrough, slices: [{{sources: [{{model: {m}/0, layer_range: [0, 2]}}]}}, "
    "{{sources: [{{model: {m}/1, layer_range: [1, 3]}}]}}]}}",
}


def environment(folder: Path, version: str) -> Path:
    """Return the Python of a virtual environment that has this version of transformers, made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        for packages in (["torch==2.13.0", "numpy"], [f"transformers=={version}", "safetensors"]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def main() -> int:
    """Print one line per version, family and recipe; return 1 if a line is not clean."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "graftwork-transformers")
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    (work / "build.py").write_text(BUILD)
    (work / "load.py").write_text(LOAD)
    bad = 0
    for version in VERSIONS:
        python = environment(work / f"environment-{version}", version)
        models = work / f"models-{version}"
        subprocess.run([python, work / "build.py", models], check=True, stderr=subprocess.DEVNULL)
        for family in sorted(path.name for path in models.iterdir()):
            for kind, text in RECIPES.items():
                out = work / "merged" / version / f"{family}-{kind}"
                recipe = work / "recipe.yml"
                recipe.write_text(text.format(m=models / family))
                more = ["--max-shard-size", "20KB"] if kind == "sharded" else []
                command = [sys.executable, "-m", "graftwork.cli", "merge", recipe, out, "--force", "--quiet", *more]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                loaded = subprocess.run([python, work / "load.py", out], capture_output=True, text=True, check=False)
                try:
                    report = json.loads(loaded.stdout.splitlines()[-1])
                except (IndexError, ValueError):
                    report = {"error": loaded.stderr.strip().splitlines()[-1:]}
                clean = report.get("finite") is True and not any(
                    value for value in report.values() if value is not True
                )
                bad += not clean
                print(f"transformers {version}  {family:6s} {kind:8s} {'clean' if clean else report}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
