"""Write `peft.safetensors`: small models, LoRA adapters as PEFT saves them, and what PEFT's own merge makes of them.

    python tests/golden/make_peft_golden.py tests/golden/peft.safetensors

Run it with a Python that has peft 0.21.2 and transformers. Tensors are called `CASE.base.NAME`, `CASE.adapter.KEY` and
`CASE.merged.NAME`; the metadata holds each case's `adapter_config.json` and the versions.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D


class Network(nn.Module):
    """One layer of every kind that adapters change."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.q_proj = nn.Linear(8, 12)
        self.v_proj = nn.Linear(12, 8, bias=False)
        self.c_fc = Conv1D(20, 8)
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 13)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.v_proj(self.q_proj(self.embed(tokens)))))


CASES: dict[str, dict[str, object]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "stabilised": {"target_modules": ["q_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5},
    },
    "transposed": {"target_modules": ["c_fc"], "fan_in_fan_out": True},
    "embedding": {"target_modules": ["embed", "q_proj"]},
    "convolution": {"target_modules": ["conv"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["head", "norm"]},
    "bias-of-adapted": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "all-biases": {"target_modules": ["q_proj"], "bias": "all"},
    "trained-bias": {"target_modules": ["q_proj"], "lora_bias": True},
}  # fmt: skip


def main(out: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    configs: dict[str, str] = {}
    for number, (label, settings) in enumerate(CASES.items()):
        torch.manual_seed(number)
        network = Network()
        for name, value in network.state_dict().items():
            tensors[f"{label}.base.{name}"] = value.clone()
        model = get_peft_model(network, LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:  # as if it had been trained
                    parameter.add_(0.1 * torch.randn(parameter.shape))
                    if "lora_" in name:
                        parameter.mul_(0.3)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            configs[label] = json.dumps(json.loads((Path(folder) / "adapter_config.json").read_text()), sort_keys=True)
            for name, value in load_file(Path(folder) / "adapter_model.safetensors").items():
                tensors[f"{label}.adapter.{name}"] = value
        for name, value in model.merge_and_unload().state_dict().items():
            tensors[f"{label}.merged.{name}"] = value.detach().clone()
    versions = {name: importlib.metadata.version(name) for name in ("peft", "transformers", "torch")}
    metadata = {"configs": json.dumps(configs), "versions": json.dumps(versions)}
    save_file({name: value.contiguous() for name, value in tensors.items()}, out, metadata)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
