"""Finds the repeated layers of a model from its tensor names, without a list of architectures.

A *stack* is a prefix under which layers are numbered 0 … n−1, such as `model.layers` or `transformer.h`. Only the first
number in a name counts: the experts inside a layer are not a stack of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_HEAD_SEGMENTS = frozenset(
    {"lm_head", "embed_out", "output", "score", "classifier", "cls", "qa_outputs", "pooler", "norm", "ln_f",
     "layernorm", "final_layer_norm", "final_layernorm", "norm_f"}
)  # fmt: skip
_LONGEST_NUMBER = 9


@dataclass(frozen=True)
class Stack:
    """Layers that are numbered without gaps under one prefix.

    Args:
        prefix: What stands before the number, without the dot; empty if names begin with the number.
        count: How many layers there are.
        uniform: True if every layer has the same tensors.
    """

    prefix: str
    count: int
    uniform: bool

    def tensor(self, index: int, suffix: str) -> str:
        """Return the name of the tensor `suffix` in layer `index`."""
        return ".".join(part for part in (self.prefix, str(index), suffix) if part)


def find_stacks(names: Iterable[str]) -> dict[str, Stack]:
    """Return the stacks among the tensor `names`, by prefix, in order of first appearance."""
    suffixes: dict[str, dict[int, set[str]]] = {}
    broken: set[str] = set()
    for name in names:
        found = _split(name)
        if found is None:
            continue
        prefix, number, suffix = found
        if len(number) > _LONGEST_NUMBER or str(int(number)) != number:
            broken.add(prefix)  # "007" could not be written back from its index
            continue
        suffixes.setdefault(prefix, {}).setdefault(int(number), set()).add(suffix)
    stacks = {}
    for prefix, layers in suffixes.items():
        if prefix in broken or len(layers) < 2 or max(layers) != len(layers) - 1:
            continue
        uniform = all(layer == layers[0] for layer in layers.values())
        stacks[prefix] = Stack(prefix, len(layers), uniform)
    return stacks


def layer_of(name: str, stacks: Mapping[str, Stack]) -> tuple[Stack, int, str] | None:
    """Return the stack, the layer's index and the rest of the name, or None for a tensor outside all stacks."""
    found = _split(name)
    if found is None or found[0] not in stacks:
        return None
    stack = stacks[found[0]]
    index = int(found[1]) if len(found[1]) <= _LONGEST_NUMBER else stack.count
    return (stack, index, found[2]) if index < stack.count else None


def is_head_side(name: str) -> bool:
    """Say whether a tensor outside the layers comes after them (final norm, head, pooler) and not before them."""
    segments = name.lower().split(".")
    return not any("embed" in segment and segment != "embed_out" for segment in segments) and any(
        segment in _HEAD_SEGMENTS for segment in segments
    )


def model_order(names: Iterable[str], stacks: Mapping[str, Stack]) -> list[str]:
    """Return `names` as data flows: the input side, the layers by number, the head side.

    Stacks follow each other with encoders (of text or images) before decoders; names of equal rank keep their order.
    """
    places = {prefix: (_is_decoder_side(prefix), place) for place, prefix in enumerate(stacks)}

    def rank(name: str) -> tuple[int, bool, int, int]:
        layer = layer_of(name, stacks)
        if layer is None:
            return (2 if is_head_side(name) else 0, False, 0, 0)
        stack, index, _ = layer
        return (1, *places[stack.prefix], index)

    return sorted(names, key=rank)


def _split(name: str) -> tuple[str, str, str] | None:
    """Return what stands before, at and after the first segment of `name` that is a number."""
    segments = name.split(".")
    for place, segment in enumerate(segments):
        if segment.isascii() and segment.isdigit():
            return ".".join(segments[:place]), segment, ".".join(segments[place + 1 :])
    return None


def _is_decoder_side(prefix: str) -> bool:
    segments = prefix.lower().split(".")
    return not any(segment == "encoder" or segment.startswith("vis") for segment in segments)
