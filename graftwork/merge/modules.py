"""Which tensors belong to a module that a recipe names, for models with several towers."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from graftwork.merge.layers import Stack, layer_of

DEFAULT = "default"
_BY_WORD = {
    "text_decoder": ("language_model",),
    "vision_tower": ("vision", "visual"),
    "vision_model": ("vision", "visual"),
}
_BY_SEGMENT = ("encoder", "decoder", "shared")
_PROJECTOR = "multi_modal_projector"
_WITH_HEAD = ("text_decoder", "decoder")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.")
_BRIDGE = re.compile("projector|merger")

NAMES = (DEFAULT, *_BY_WORD, _PROJECTOR, *_BY_SEGMENT)
"""Names of modules besides those of stacks of layers."""


def owner_of(name: str, modules: Collection[str], stacks: Mapping[str, Stack]) -> str | None:
    """Return which of `modules` a tensor belongs to: one that names its stack of layers, else the first that fits.

    Args:
        name: The tensor's name.
        modules: Names of modules: `default`, the prefix of a stack, or one of `NAMES`.
        stacks: The stacks of layers of the model.
    """
    named = [module for module in modules if module in stacks and name.startswith(f"{module}.")]
    return next((module for module in (*named, *modules) if _owns(module, name, stacks)), None)


def _owns(module: str, name: str, stacks: Mapping[str, Stack]) -> bool:
    if module == DEFAULT:
        return True
    if module in stacks:
        return name.startswith(f"{module}.")
    is_head = _HEAD.search(name) is not None
    if module in _WITH_HEAD and is_head:
        return True
    is_bridge = _BRIDGE.search(name) is not None and layer_of(name, stacks) is None
    if module == _PROJECTOR:
        return is_bridge
    segments = name.split(".")
    if module in _BY_WORD:
        return not is_bridge and not is_head and any(w in part for part in segments for w in _BY_WORD[module])
    return module in _BY_SEGMENT and module in segments[:2]


def layers_key(module: str, config: Mapping[str, Any]) -> str | None:
    """Return the key of `config.json` with the number of a module's layers, where its name tells; else None."""
    if module.partition(".")[0] in ("encoder", "decoder") or ".encoder" in module or ".decoder" in module:
        side = "decoder" if "decoder" in module else "encoder"
        known = {
            "encoder": ("encoder_layers", "num_encoder_layers", "num_layers"),
            "decoder": ("decoder_layers", "num_decoder_layers"),
        }
        return next((key for key in known[side] if type(config.get(key)) is int), None)
    return None


def section(module: str, config: Mapping[str, Any]) -> str | None:
    """Return the sub-configuration of a module, such as `text_config`, where its name tells; else None."""
    word = "text_config" if module == "text_decoder" or "language" in module or "text" in module else None
    word = "vision_config" if word is None and "vis" in module else word
    return word if word is not None and isinstance(config.get(word), Mapping) else None
