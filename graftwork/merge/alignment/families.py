"""Specs of known families of networks, chosen by the names of their tensors.

Names decide, shapes only verify. What has other names is refused: a spec guessed from shapes would be wrong where two
widths happen to be equal, and a wrong spec silently changes what a model computes.

Names are those of torchvision and transformers; MLPs are `fcN`, `layers.N`, `linearN` or the plain `N` of a Sequential,
LeNets `convN` and `fcN`. Whatever precedes them (`module.`, `model.`) is kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from graftwork.merge.alignment.spec import (
    Axis,
    Group,
    PermutationSpec,
    Shapes,
    TensorAxes,
    concatenation,
    plain,
    product,
)
from graftwork.merge.checkpoint import listed, quoted
from graftwork.merge.errors import MismatchError, RecipeError, did_you_mean

RESIDUAL = "residual"
"""The group of a transformer's residual stream: one order for the whole network."""

_ROTARY = "rotary positions give every dimension of a query or key its own frequency"
_OPTION_A = "a shortcut without weights adds channels of two widths, padded with zeros"
_NO_HEADS = "the number of heads is not in the tensors; a config.json gives it"

Build = Callable[["_Builder"], None]


@dataclass(frozen=True, slots=True)
class Family:
    """A family of networks.

    Args:
        name: Its name.
        signature: A pattern that one tensor of such a network has, with the group `prefix`.
        build: Describes the tensors to a builder.
        refused: A pattern that none of its tensors has.
    """

    name: str
    signature: re.Pattern[str]
    build: Build
    refused: re.Pattern[str] | None = None


def family_spec(
    shapes: Shapes,
    *,
    family: str | None = None,
    config: Mapping[str, Any] | None = None,
    what: str = "the checkpoint",
) -> PermutationSpec:
    """Return the spec of a checkpoint of a known family.

    Args:
        shapes: The shape of every tensor.
        family: Its family; found by the names of the tensors if None.
        config: Its `config.json`, for the number of heads.
        what: What messages call the checkpoint.

    Raises:
        RecipeError: There is no such family.
        MismatchError: No family has such names, or a tensor does not fit; one line each.
    """
    doing = f"cannot tell which units of {what} may be re-ordered"
    if family is not None:
        if family not in FAMILIES:
            known = f"{', '.join(FAMILIES)}{did_you_mean(family, FAMILIES)}"
            raise RecipeError(f"cannot use the family {quoted(family)}: known are {known}")
        chosen = [FAMILIES[family]]
    else:
        chosen = [item for item in FAMILIES.values() if _prefix(item, shapes) is not None]
    if not chosen:
        raise MismatchError(
            f"{doing}: no known family has tensors such as {listed(sorted(shapes), 3)} (known: {', '.join(FAMILIES)}); "
            "give a module to trace with --module file.py:make, or a spec with --spec FILE"
        )
    prefix = _prefix(chosen[0], shapes)
    if prefix is None:
        raise MismatchError(
            f"{doing}: it has no tensor that is named as in the family {chosen[0].name}, such as "
            f"{listed(sorted(shapes), 3)}; leave --family out, or give --module or --spec"
        )
    builder = _Builder(chosen[0].name, prefix, shapes, config or {}, what)
    chosen[0].build(builder)
    return builder.finish()


def _prefix(family: Family, names: Mapping[str, Any]) -> str | None:
    if family.refused is not None and any(family.refused.search(name) for name in names):
        return None
    for name in names:
        found = family.signature.fullmatch(name)
        if found is not None:
            return found["prefix"]
    return None


class _Builder:
    """Collects groups and axes; tensors that a checkpoint lacks (biases, heads) are passed over."""

    def __init__(self, family: str, prefix: str, shapes: Shapes, config: Mapping[str, Any], what: str) -> None:
        self.family = family
        self.prefix = prefix
        self.shapes = shapes
        self.config = config
        self.what = what
        self.groups: dict[str, Group] = {}
        self.tensors: dict[str, TensorAxes] = {}
        self.pinned: dict[tuple[str, int], str] = {}
        self.tied: dict[str, str] = {}

    # ------------------------------------------------------------ reading

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor, None if there is no such tensor."""
        found = self.shapes.get(self.prefix + name)
        return None if found is None else tuple(found)

    def length(self, name: str, axis: int) -> int:
        """Return the length of an axis of a tensor that has to be there."""
        shape = self.shape(name)
        if shape is None:
            raise self.error(
                f"it lacks the tensor {quoted(self.prefix + name)}{did_you_mean(self.prefix + name, self.shapes)}"
            )
        if axis >= len(shape):
            raise self.error(
                f"{quoted(self.prefix + name)} has {len(shape)} axes {list(shape)}, not {axis + 1} or more"
            )
        return shape[axis]

    def numbers(self, pattern: str) -> list[int]:
        """Return the sorted numbers N for which tensors `PREFIX pattern` exist, where pattern has one group."""
        expression = re.compile(re.escape(self.prefix) + pattern)
        found = {int(match[1]) for name in self.shapes if (match := expression.match(name))}
        return sorted(found)

    def error(self, problem: str) -> MismatchError:
        return MismatchError(
            f"cannot align {self.what} as a network of the family {self.family}: {problem}; "
            "if it is another architecture, give --module or --spec"
        )

    def require(self, *names: str) -> None:
        """Refuse a checkpoint that lacks one of these tensors, without which it is another network."""
        for name in names:
            self.length(name, 0)

    # ------------------------------------------------------------ writing

    def group(self, name: str, size: int, *, within: str | None = None) -> str:
        """Add a group, and return its name."""
        self.groups[name] = Group(size, within)
        return name

    def put(self, name: str, *axes: Axis, counted: bool = True) -> None:
        """Set the axes of a tensor, if it is there; axes that are left out are fixed."""
        shape = self.shape(name)
        if shape is not None:
            self.tensors[self.prefix + name] = TensorAxes(axes + (None,) * (len(shape) - len(axes)), counted)

    def pin(self, name: str, axis: int, why: str) -> None:
        if self.shape(name) is not None:
            self.pinned[self.prefix + name, axis] = why

    def linear(self, name: str, into: Axis, out: Axis) -> None:
        """A linear or convolution layer: weight (out, in, …), bias (out)."""
        self.put(f"{name}.weight", out, into)
        self.put(f"{name}.bias", out)

    def transposed(self, name: str, into: Axis, out: Axis) -> None:
        """A layer of GPT-2: weight (in, out), bias (out)."""
        self.put(f"{name}.weight", into, out)
        self.put(f"{name}.bias", out)

    def norm(self, name: str, axis: Axis) -> None:
        """A norm over units: gain and bias, and the running statistics of batch norm, which are not counted."""
        for part in ("weight", "bias", "gamma", "beta"):
            self.put(f"{name}.{part}", axis)
        for part in ("running_mean", "running_var"):
            self.put(f"{name}.{part}", axis, counted=False)
        self.put(f"{name}.num_batches_tracked", counted=False)

    def finish(self) -> PermutationSpec:
        """Return the spec, checked against every tensor.

        Raises:
            MismatchError: A tensor has another shape, or a name that the family does not know.
        """
        unknown = [name for name, shape in self.shapes.items() if name not in self.tensors and math.prod(shape) > 1]
        if unknown:
            raise self.error(f"the family has no such tensors: {listed(unknown, 4)}")
        for name in self.shapes:  # numbers and empty tensors
            self.tensors.setdefault(name, TensorAxes((None,) * len(self.shapes[name]), counted=False))
        used = {group for tensor in self.tensors.values() for group in tensor.groups}
        groups = {name: group for name, group in self.groups.items() if name in used}
        spec = PermutationSpec(groups, self.tensors, self.pinned, self.tied, self.family)
        return spec.verified(self.shapes, what=self.what)


# ---------------------------------------------------------------------------------------------------------------------
# Chains of layers


def _chain(builder: _Builder, layers: Sequence[str], into: Axis, width: int, *, last: bool) -> tuple[Axis, int]:
    """Describe layers that feed each other; return the axis that leaves the last one, and its length.

    Args:
        builder: Gets the tensors.
        layers: Names of linear and convolution layers and of norms, in order.
        into: The axis that enters the first; None is the network's input.
        width: Its number of units; 0 for the network's input.
        last: Whether the last linear layer is the network's output, which is fixed.
    """
    weights = [name for name in layers if len(builder.shape(f"{name}.weight") or ()) >= 2]
    group: str | None = into[0][0] if into is not None and isinstance(into[0][0], str) else None
    for name in layers:
        shape = builder.shape(f"{name}.weight") or ()
        if len(shape) == 1:
            builder.norm(name, plain(group))
            continue
        entering = builder.length(f"{name}.weight", 1)
        axis = plain(group)
        if group is not None and entering != width:
            # Channels that are flattened with their pixels; torch puts a channel's pixels side by side.
            if len(shape) != 2 or entering % width:
                raise builder.error(
                    f"{quoted(f'{builder.prefix}{name}.weight')} axis 1 has {entering} entries, "
                    f"which does not go with the {width} units of {quoted(group)} before it"
                )
            axis = product(group, entering // width)
        is_output = last and name == weights[-1]
        width = builder.length(f"{name}.weight", 0)
        out = None if is_output else plain(builder.group(builder.prefix + name, width))
        group = None if is_output else builder.prefix + name
        builder.linear(name, axis, out)
    return plain(group), width


def _mlp(builder: _Builder) -> None:
    stem = next(stem for stem in _MLP_STEMS if builder.numbers(rf"{stem}(\d+)\.weight$"))
    plain_stem = stem.replace("\\", "")
    names = [f"{plain_stem}{number}" for number in builder.numbers(rf"{stem}(\d+)\.weight$")]
    for name in names:
        shape = builder.shape(f"{name}.weight") or ()
        if len(shape) > 2:
            raise builder.error(
                f"{quoted(f'{builder.prefix}{name}.weight')} has the shape {list(shape)}, which no linear layer has"
            )
    _chain(builder, names, None, 0, last=True)


_MLP_STEMS = ("fc", r"layers\.", "linear", "")


def _lenet(builder: _Builder) -> None:
    """LeNets: `convN`, perhaps `bnN`, `fcN` and perhaps a last `fc`; each may be wrapped as `.0`."""

    def wrapped(name: str) -> str:
        return name if builder.shape(f"{name}.weight") else f"{name}.0"

    layers = []
    for number in builder.numbers(r"conv(\d+)(?:\.0)?\.weight$"):
        layers.append(wrapped(f"conv{number}"))
        if builder.shape(f"bn{number}.weight"):
            layers.append(f"bn{number}")
    layers += [wrapped(f"fc{number}") for number in builder.numbers(r"fc(\d+)(?:\.0)?\.weight$")]
    if builder.shape("fc.weight"):
        layers.append("fc")
    _chain(builder, layers, None, 0, last=True)


def _vgg(builder: _Builder) -> None:
    """VGG and AlexNet: convolutions `features.N`, their batch norms among them, then `classifier.N`."""
    features = [f"features.{number}" for number in builder.numbers(r"features\.(\d+)\.weight$")]
    head = [f"classifier.{number}" for number in builder.numbers(r"classifier\.(\d+)\.weight$")]
    if not head:
        head = [name for name in ("classifier", "fc", "linear") if builder.shape(f"{name}.weight")]
    _chain(builder, features + head, None, 0, last=True)


# ---------------------------------------------------------------------------------------------------------------------
# Residual networks


def _resnet(builder: _Builder) -> None:
    """Residual networks with batch norm after each convolution: basic blocks and bottlenecks, of CIFAR and ImageNet.

    A stage's stream is one group. Where a shortcut has no weights but widths differ (option A), the streams keep their
    order: channels of one stage are added to particular channels of the next.
    """
    stages = builder.numbers(r"layer(\d+)\.0\.conv1\.weight$")
    prefix = builder.prefix
    stem = builder.length("conv1.weight", 0)
    if builder.shape("bn1.weight") is None:
        raise builder.error(
            "no norm bn1 follows the first convolution, as in networks that normalise before they convolve"
        )
    streams: dict[int, int] = {0: stem}
    blocks: list[tuple[int, str, str, str | None]] = []  # stage, block, its last convolution, its shortcut
    padded, shared = False, {0: 0}
    for stage in stages:
        previous = max(streams)
        for number in builder.numbers(rf"layer{stage}\.(\d+)\.conv1\.weight$"):
            block = f"layer{stage}.{number}"
            last = "conv3" if builder.shape(f"{block}.conv3.weight") else "conv2"
            width = builder.length(f"{block}.{last}.weight", 0)
            shortcut = next(
                (f"{block}.{name}" for name in ("downsample", "shortcut") if builder.shape(f"{block}.{name}.0.weight")),
                None,
            )
            if stage not in streams:
                streams[stage] = width
                # Without weights on the shortcut, the stage adds to the stream before it.
                shared[stage] = stage if shortcut is not None else shared[previous]
                padded = padded or (shortcut is None and width != streams[previous])
            elif width != streams[stage]:
                raise builder.error(
                    f"{quoted(f'{prefix}{block}.{last}.weight')} axis 0 has {width} entries, "
                    f"the blocks before it in this stage have {streams[stage]}"
                )
            blocks.append((stage, block, last, shortcut))
    names = {stage: f"{prefix}layer{root}" if root else f"{prefix}conv1" for stage, root in shared.items()}
    axes: dict[int, Axis] = {}
    for stage, width in streams.items():
        axes[stage] = None if padded else plain(builder.group(names[stage], width))
    builder.linear("conv1", None, axes[0])
    builder.norm("bn1", axes[0])
    current, before = axes[0], "conv1"
    for stage, block, last, shortcut in blocks:
        entering = current
        for position, layer in enumerate(("conv1", "conv2", "conv3")):
            if builder.shape(f"{block}.{layer}.weight") is None:
                continue
            width = builder.length(f"{block}.{layer}.weight", 0)
            out = axes[stage] if layer == last else plain(builder.group(f"{prefix}{block}.{layer}", width))
            if builder.length(f"{block}.{layer}.weight", 1) != _units(builder, entering, before):
                raise builder.error(
                    f"{quoted(f'{prefix}{block}.{layer}.weight')} axis 1 has "
                    f"{builder.length(f'{block}.{layer}.weight', 1)} entries, what enters it has "
                    f"{_units(builder, entering, before)}: a grouped convolution?"
                )
            builder.linear(f"{block}.{layer}", entering, out)
            builder.norm(f"{block}.bn{position + 1}", out)
            if padded and layer == last:
                builder.pin(f"{block}.{layer}.weight", 0, _OPTION_A)
            entering, before = out, f"{block}.{layer}"
        if shortcut is not None:
            builder.linear(f"{shortcut}.0", current, axes[stage])
            builder.norm(f"{shortcut}.1", axes[stage])
        current = axes[stage]
    for head in ("fc", "linear"):
        shape = builder.shape(f"{head}.weight")
        if shape is not None:
            width = streams[max(streams)]
            per = shape[1] // width if len(shape) == 2 else 1
            into = None if current is None else product(names[max(streams)], per) if per > 1 else current
            builder.linear(head, into, None)
    if padded:
        builder.pin("conv1.weight", 0, _OPTION_A)


def _units(builder: _Builder, axis: Axis, before: str) -> int:
    """Return how many units leave the layer `before`, whose output axis is `axis`."""
    if axis is not None and isinstance(axis[0][0], str):
        return builder.groups[axis[0][0]].size
    return builder.length(f"{before}.weight", 0)


# ---------------------------------------------------------------------------------------------------------------------
# Transformers


def _heads(builder: _Builder, *keys: str) -> int | None:
    """Return the number of heads that `config.json` gives under one of these keys."""
    levels = [builder.config]
    levels += [
        value for key in ("text_config", "vision_config") if isinstance(value := builder.config.get(key), Mapping)
    ]
    for level in levels:
        for key in keys:
            value = level.get(key)
            if type(value) is int and value > 0:
                return value
    return None


@dataclass(frozen=True, slots=True)
class _Attention:
    """The axes of an attention: rows of query, key and value, and the columns of the output."""

    query: Axis
    key: Axis
    value: Axis
    output: Axis


def _attention(
    builder: _Builder, layer: str, width: int, heads: int | None, *, key_heads: int | None = None, rotary: bool = False
) -> _Attention:
    """Add the groups of one attention.

    Heads are re-ordered with everything in them; groups of query heads that share a key and value with these, and
    inside each such group its query heads. The dimensions of queries and keys inside a head have one order, those of
    values another; under rotary positions queries and keys have none.

    Args:
        builder: Gets the groups.
        layer: The name that they begin with.
        width: Length of the query's rows.
        heads: Number of query heads; None if it is not known, which fixes everything.
        key_heads: Number of key heads; as many as query heads by default.
        rotary: Whether positions rotate queries and keys.
    """
    if heads is None:
        return _Attention(None, None, None, None)
    shared = key_heads or heads
    if heads % shared or width % heads:
        raise builder.error(
            f"config.json has {heads} heads and {shared} key heads, which do not go with the {width} rows of {layer}"
        )
    size = width // heads
    name = builder.group(f"{layer}.heads", shared)
    repeated: tuple[int | str, ...] = ()
    if heads > shared:
        repeated = (builder.group(f"{layer}.queries", heads // shared, within=name),)
    inner: int | str = size if rotary else builder.group(f"{layer}.keys", size, within=name)
    values = builder.group(f"{layer}.values", size, within=name)
    return _Attention(
        product(name, *repeated, inner), product(name, inner), product(name, values), product(name, *repeated, values)
    )


def _gpt2(builder: _Builder) -> None:
    width = builder.length("wte.weight", 1)
    residual = plain(builder.group(RESIDUAL, width))
    builder.put("wte.weight", None, residual)
    builder.put("wpe.weight", None, residual)
    heads = _heads(builder, "n_head", "num_attention_heads")
    for number in builder.numbers(r"h\.(\d+)\."):
        layer = f"h.{number}"
        parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        builder.require(*(f"{layer}.{name}.weight" for name in parts))
        for norm in ("ln_1", "ln_2"):
            builder.norm(f"{layer}.{norm}", residual)
        attention = _attention(builder, f"{builder.prefix}{layer}", width, heads)
        fused = None if heads is None else concatenation(attention.query, attention.key, attention.value)
        builder.transposed(f"{layer}.attn.c_attn", residual, fused)
        builder.transposed(f"{layer}.attn.c_proj", attention.output, residual)
        if heads is None:
            builder.pin(f"{layer}.attn.c_attn.weight", 1, _NO_HEADS)
        for mask in ("bias", "masked_bias"):
            builder.put(f"{layer}.attn.{mask}", counted=False)
        hidden = plain(builder.group(f"{builder.prefix}{layer}.mlp", builder.length(f"{layer}.mlp.c_fc.weight", 1)))
        builder.transposed(f"{layer}.mlp.c_fc", residual, hidden)
        builder.transposed(f"{layer}.mlp.c_proj", hidden, residual)
    builder.norm("ln_f", residual)
    _head(builder, "transformer.", "wte.weight", residual, tied=True)
    for name in ("score.weight", "classifier.weight"):
        _outside(builder, "transformer.", name, None, residual)


def _outside(builder: _Builder, inner: str, name: str, *axes: Axis) -> str | None:
    """Set the axes of a tensor that lies beside the inner model; return its full name if it is there."""
    full = builder.prefix.removesuffix(inner) + name
    if full not in builder.shapes:
        return None
    rest = (None,) * (len(builder.shapes[full]) - len(axes))
    builder.tensors[full] = TensorAxes(tuple(axes) + rest)
    return full


def _head(builder: _Builder, inner: str, embedding: str, residual: Axis, *, tied: bool) -> None:
    """Describe the head of a language model, which may be its embedding a second time."""
    full = _outside(builder, inner, "lm_head.weight", None, residual)
    _outside(builder, inner, "lm_head.bias", None)
    if full is not None and builder.config.get("tie_word_embeddings", tied):
        builder.tied[full] = builder.prefix + embedding


def _llama(builder: _Builder) -> None:
    """Llama, Mistral, Qwen and what has their names: gated feed-forward, rotary positions, shared keys and values."""
    residual = plain(builder.group(RESIDUAL, builder.length("embed_tokens.weight", 1)))
    builder.put("embed_tokens.weight", None, residual)
    heads = _heads(builder, "num_attention_heads")
    key_heads = _heads(builder, "num_key_value_heads")
    for number in builder.numbers(r"layers\.(\d+)\."):
        layer = f"layers.{number}"
        builder.require(*(f"{layer}.self_attn.{name}_proj.weight" for name in "qkvo"))
        builder.require(*(f"{layer}.mlp.{name}_proj.weight" for name in ("up", "down")))
        for norm in _LLAMA_NORMS:
            builder.norm(f"{layer}.{norm}", residual)
        width = builder.length(f"{layer}.self_attn.q_proj.weight", 0)
        attention = _attention(builder, f"{builder.prefix}{layer}", width, heads, key_heads=key_heads, rotary=True)
        for name, axis in (("q", attention.query), ("k", attention.key), ("v", attention.value)):
            builder.linear(f"{layer}.self_attn.{name}_proj", residual, axis)
            if name != "v" or heads is None:
                builder.pin(f"{layer}.self_attn.{name}_proj.weight", 0, _NO_HEADS if heads is None else _ROTARY)
        builder.linear(f"{layer}.self_attn.o_proj", attention.output, residual)
        for name in ("self_attn.q_norm.weight", "self_attn.k_norm.weight", "self_attn.rotary_emb.inv_freq"):
            builder.put(f"{layer}.{name}", counted=not name.endswith("inv_freq"))
        hidden = plain(builder.group(f"{builder.prefix}{layer}.mlp", builder.length(f"{layer}.mlp.up_proj.weight", 0)))
        builder.linear(f"{layer}.mlp.gate_proj", residual, hidden)
        builder.linear(f"{layer}.mlp.up_proj", residual, hidden)
        builder.linear(f"{layer}.mlp.down_proj", hidden, residual)
    builder.norm("norm", residual)
    builder.put("rotary_emb.inv_freq", counted=False)
    _head(builder, "model.", "embed_tokens.weight", residual, tied=False)
    _outside(builder, "model.", "score.weight", None, residual)


_LLAMA_NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
)  # fmt: skip


def _bert(builder: _Builder) -> None:
    """BERT and RoBERTa with the heads that transformers gives them; the pooler is a group of its own."""
    width = builder.length("embeddings.word_embeddings.weight", 1)
    residual = plain(builder.group(RESIDUAL, width))
    for name in ("word", "position", "token_type"):
        builder.put(f"embeddings.{name}_embeddings.weight", None, residual)
    for name in ("position_ids", "token_type_ids"):
        builder.put(f"embeddings.{name}", counted=False)
    builder.norm("embeddings.LayerNorm", residual)
    _encoder(builder, width, residual, "attention.self", ("attention.output.LayerNorm", "output.LayerNorm"))
    pooled = _pooler(builder)
    for inner in ("bert.", "roberta."):
        if builder.prefix.endswith(inner):
            _bert_heads(builder, inner, residual, pooled)


def _pooler(builder: _Builder) -> Axis:
    """Describe the pooler, if there is one, and return the axis that leaves it; None without one."""
    if builder.shape("pooler.dense.weight") is None:
        return None
    pooled = plain(builder.group(f"{builder.prefix}pooler", builder.length("pooler.dense.weight", 0)))
    builder.linear("pooler.dense", plain(RESIDUAL), pooled)
    return pooled


def _bert_heads(builder: _Builder, inner: str, residual: Axis, pooled: Axis) -> None:
    outer = builder.prefix.removesuffix(inner)
    architectures = builder.config.get("architectures")
    by_token = isinstance(architectures, list) and any("TokenClassification" in str(name) for name in architectures)
    entering = residual if pooled is None or by_token else pooled
    _outside(builder, inner, "classifier.weight", None, entering)
    _outside(builder, inner, "classifier.bias", None)
    _outside(builder, inner, "cls.seq_relationship.weight", None, pooled)
    _outside(builder, inner, "cls.seq_relationship.bias", None)
    _outside(builder, inner, "qa_outputs.weight", None, residual)
    _outside(builder, inner, "qa_outputs.bias", None)
    if f"{outer}classifier.dense.weight" in builder.shapes:  # RoBERTa's
        size = builder.shapes[f"{outer}classifier.dense.weight"][0]
        hidden = plain(builder.group(f"{outer}classifier.dense", size))
        _outside(builder, inner, "classifier.dense.weight", hidden, residual)
        _outside(builder, inner, "classifier.dense.bias", hidden)
        _outside(builder, inner, "classifier.out_proj.weight", None, hidden)
        _outside(builder, inner, "classifier.out_proj.bias", None)
    for transform, norm, decoder in (
        ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.decoder"),
        ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"),
    ):
        if f"{outer}{transform}.weight" not in builder.shapes:
            continue
        # The decoder is the embedding again unless config.json says otherwise, so its columns go with the stream.
        out = residual
        if builder.config.get("tie_word_embeddings", True) is False:
            out = plain(builder.group(f"{outer}{transform}", builder.shapes[f"{outer}{transform}.weight"][0]))
        _outside(builder, inner, f"{transform}.weight", out, residual)
        _outside(builder, inner, f"{transform}.bias", out)
        for part in ("weight", "bias", "gamma", "beta"):
            _outside(builder, inner, f"{norm}.{part}", out)
        full = _outside(builder, inner, f"{decoder}.weight", None, out)
        if full is not None and out is residual:
            builder.tied[full] = f"{builder.prefix}embeddings.word_embeddings.weight"
        for bias in (f"{decoder}.bias", f"{decoder.rpartition('.')[0]}.bias"):
            _outside(builder, inner, bias, None)


def _encoder(builder: _Builder, width: int, residual: Axis, attention: str, norms: Sequence[str]) -> None:
    """Describe the layers of BERT and ViT as transformers writes them."""
    heads = _heads(builder, "num_attention_heads")
    for number in builder.numbers(r"encoder\.layer\.(\d+)\."):
        layer = f"encoder.layer.{number}"
        builder.require(*(f"{layer}.{attention}.{name}.weight" for name in ("query", "key", "value")))
        builder.require(*(f"{layer}.{name}.dense.weight" for name in ("attention.output", "intermediate", "output")))
        for norm in norms:
            builder.norm(f"{layer}.{norm}", residual)
        axes = _attention(builder, f"{builder.prefix}{layer}", width, heads)
        for name, axis in (("query", axes.query), ("key", axes.key), ("value", axes.value)):
            builder.linear(f"{layer}.{attention}.{name}", residual, axis)
            if heads is None:
                builder.pin(f"{layer}.{attention}.{name}.weight", 0, _NO_HEADS)
        builder.linear(f"{layer}.attention.output.dense", axes.output, residual)
        size = builder.length(f"{layer}.intermediate.dense.weight", 0)
        hidden = plain(builder.group(f"{builder.prefix}{layer}.mlp", size))
        builder.linear(f"{layer}.intermediate.dense", residual, hidden)
        builder.linear(f"{layer}.output.dense", hidden, residual)


def _vit(builder: _Builder) -> None:
    """ViT as transformers writes it."""
    width = builder.length("embeddings.patch_embeddings.projection.weight", 0)
    residual = plain(builder.group(RESIDUAL, width))
    for name in ("cls_token", "mask_token", "position_embeddings"):
        builder.put(f"embeddings.{name}", None, None, residual)
    builder.linear("embeddings.patch_embeddings.projection", None, residual)
    _encoder(builder, width, residual, "attention.attention", ("layernorm_before", "layernorm_after"))
    builder.norm("layernorm", residual)
    _pooler(builder)
    _outside(builder, "vit.", "classifier.weight", None, residual)
    _outside(builder, "vit.", "classifier.bias", None)


def _torchvision_vit(builder: _Builder) -> None:
    """ViT as torchvision writes it; its state dict does not tell the number of heads, `heads` in a config does."""
    width = builder.length("conv_proj.weight", 0)
    residual = plain(builder.group(RESIDUAL, width))
    builder.put("class_token", None, None, residual)
    builder.put("encoder.pos_embedding", None, None, residual)
    builder.linear("conv_proj", None, residual)
    heads = _heads(builder, "num_attention_heads", "num_heads", "heads")
    for number in builder.numbers(r"encoder\.layers\.encoder_layer_(\d+)\."):
        layer = f"encoder.layers.encoder_layer_{number}"
        for norm in ("ln_1", "ln_2"):
            builder.norm(f"{layer}.{norm}", residual)
        axes = _attention(builder, f"{builder.prefix}{layer}", width, heads)
        fused = None if heads is None else concatenation(axes.query, axes.key, axes.value)
        builder.put(f"{layer}.self_attention.in_proj_weight", fused, residual)
        builder.put(f"{layer}.self_attention.in_proj_bias", fused)
        if heads is None:
            builder.pin(f"{layer}.self_attention.in_proj_weight", 0, _NO_HEADS)
        builder.linear(f"{layer}.self_attention.out_proj", axes.output, residual)
        first, second = (
            ("mlp.0", "mlp.3") if builder.shape(f"{layer}.mlp.0.weight") else ("mlp.linear_1", "mlp.linear_2")
        )
        hidden = plain(builder.group(f"{builder.prefix}{layer}.mlp", builder.length(f"{layer}.{first}.weight", 0)))
        builder.linear(f"{layer}.{first}", residual, hidden)
        builder.linear(f"{layer}.{second}", hidden, residual)
    builder.norm("encoder.ln", residual)
    builder.linear("heads.head", residual, None)


# ---------------------------------------------------------------------------------------------------------------------
# The table

_NO_CONVOLUTION = re.compile(r"(^|\.)(conv|features|attn|attention|embed|norm\d*|ln)", re.ASCII)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.name: family
        for family in (
            Family("gpt2", re.compile(r"(?P<prefix>.*?)h\.0\.attn\.c_attn\.weight"), _gpt2),
            Family("llama", re.compile(r"(?P<prefix>.*?)layers\.0\.self_attn\.q_proj\.weight"), _llama,
                   re.compile(r"layers\.\d+\.mlp\.(experts|fc1)\b|encoder\.layers\.")),
            Family("bert", re.compile(r"(?P<prefix>.*?)encoder\.layer\.0\.attention\.self\.query\.weight"), _bert),
            Family("vit", re.compile(r"(?P<prefix>.*?)encoder\.layer\.0\.attention\.attention\.query\.weight"), _vit),
            Family("torchvision-vit",
                   re.compile(r"(?P<prefix>.*?)encoder\.layers\.encoder_layer_0\.self_attention\.in_proj_weight"),
                   _torchvision_vit),
            Family("resnet", re.compile(r"(?P<prefix>(?:\w+\.)*?)layer1\.0\.bn1\.weight"), _resnet,
                   re.compile(r"layer\d+\.\d+\.(conv4|fc|se)\b")),
            Family("vgg", re.compile(r"(?P<prefix>(?:\w+\.)*?)features\.0\.weight"), _vgg),
            Family("lenet", re.compile(r"(?P<prefix>(?:\w+\.)*?)conv1(?:\.0)?\.weight"), _lenet,
                   re.compile(r"(^|\.)layer\d+\.")),
            Family("mlp", re.compile(r"(?P<prefix>(?:[a-z_]\w*\.)*?)(?:fc|layers\.|linear|)\d+\.weight"), _mlp,
                   _NO_CONVOLUTION),
        )
    }
)  # fmt: skip
"""Known families, in the order in which they are tried."""


# ---------------------------------------------------------------------------------------------------------------------
# Adapters

_ADAPTER = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<part>[AB])(?:\.\w+)?\.weight")


def adapter_spec(base: PermutationSpec, shapes: Shapes, *, what: str = "the adapter") -> PermutationSpec:
    """Return the spec of a LoRA adapter of a model whose spec is known.

    B·A is added to the base's weight, so axis 1 of `lora_A` goes with axis 1 of the weight and axis 0 of `lora_B` with
    its axis 0. The rank axis is a group of its own in each layer.

    Args:
        base: Of the base model.
        shapes: Of the adapter's tensors, with the names that peft gives them.
        what: What messages call the adapter.

    Raises:
        MismatchError: A tensor is no adapter of a layer that the base's spec has, or has another shape.
    """
    groups = dict(base.groups)
    tensors: dict[str, TensorAxes] = {}
    problems = []
    for name, shape in shapes.items():
        found = _ADAPTER.fullmatch(name)
        target = base.tensors.get(f"{found['layer']}.weight") if found else None
        if found is None or target is None or len(target.axes) != 2:
            problems.append(
                f"cannot align {what}: {quoted(name)} is no LoRA matrix of a linear layer of the base; "
                "give the adapter's own base model"
            )
            continue
        rank = f"{found['layer']}.rank"
        groups[rank] = Group(shape[0] if found["part"] == "A" else shape[-1])
        axes = (plain(rank), target.axes[1]) if found["part"] == "A" else (target.axes[0], plain(rank))
        tensors[name] = TensorAxes(axes)
    if problems:
        raise MismatchError(*problems)
    used = {group for tensor in tensors.values() for group in tensor.groups}
    spec = PermutationSpec(
        {name: group for name, group in groups.items() if name in used}, tensors, source=f"{base.source}, LoRA"
    )
    return spec.verified(shapes, what=what)
