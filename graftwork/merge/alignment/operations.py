"""What single operations of a traced graph say about the axes of their arguments and results.

Each function takes the axes of an operation's arguments, makes those one that have to be, and returns the axes of the
result. `run_operation` fixes everything that an unknown operation touches.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graftwork.merge.alignment.factors import (
    KERNEL,
    FactorAxes,
    FactorAxis,
    concatenated,
    freeze,
    fresh,
    length_of,
    regrouped,
    sliced,
    taken_apart,
    unify,
    why_frozen,
)

if TYPE_CHECKING:
    from torch.fx import Node as GraphNode


class _UnknownError(Exception):
    """An operation, or a use of one, that the tracer does not know."""


@dataclass(slots=True)
class Graph:
    """What is known of the values of a graph while its operations are gone through."""

    values: dict[GraphNode, FactorAxes | tuple[FactorAxes, ...]] = field(default_factory=dict)
    """Axes of a value, or a tuple of them for an operation with several results."""
    seen: list[FactorAxes] = field(default_factory=list)
    """Axes of every value: an order inside each unit of another factor needs that factor in all of them."""
    sums: list[tuple[FactorAxis, list[FactorAxis]]] = field(default_factory=list)
    """Axes that were summed over, with those that the sum was made for each entry of."""

    def axes(self, argument: Any) -> FactorAxes:
        """Return the axes of an argument that is a tensor."""
        found = self.values.get(argument)
        if not isinstance(found, list):
            raise _UnknownError("an argument that is no tensor")
        return list(found)

    def sum_over(self, axis: FactorAxis, batch: Iterable[FactorAxis] = ()) -> None:
        """Note that an operation sums over an axis, once for each entry of the batch axes."""
        self.sums.append((axis, list(batch)))


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(int(length) for length in node.meta["val"].shape)


def _is_tensor(node: Any) -> bool:
    return hasattr(node, "meta") and hasattr(node.meta.get("val"), "shape")


def _name(node: GraphNode) -> str:
    """Return the name of an operation without its overload: `linear`, `add`."""
    return getattr(node.target, "__name__", str(node.target)).partition(".")[0].rstrip("_")


def _argument(node: GraphNode, name: str, default: Any = None) -> Any:
    """Return an argument by its name in the operation's schema, or the schema's default."""
    if name in node.kwargs:
        return node.kwargs[name]
    schema = getattr(node.target, "_schema", None)
    for position, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.name == name:
            if position < len(node.args):
                return node.args[position]
            return argument.default_value if argument.has_default_value() else default
    return default


def _dims(node: GraphNode, rank: int, name: str = "dim") -> list[int]:
    """Return the axes that an operation works along; all of them if it names none."""
    found = _argument(node, name)
    if found is None or (isinstance(found, Sequence) and not found):
        return list(range(rank))
    return [int(dim) % max(rank, 1) for dim in (found if isinstance(found, Sequence) else [found])]


def _broadcast(graph: Graph, arguments: Sequence[Any], length: int) -> FactorAxes:
    """Unify the axes of values that are combined entry by entry, and return those of the result."""
    result: FactorAxes = []
    for place in range(1, length + 1):
        met: list[FactorAxis] = []
        for argument in arguments:
            shape = _shape(argument)
            if place <= len(shape) and shape[-place] != 1:
                met.append(graph.axes(argument)[-place])
        for other in met[1:]:
            unify(met[0], other)
        result.append(met[0] if met else [])
    return result[::-1]


def _pointwise(graph: Graph, node: GraphNode) -> FactorAxes:
    tensors = [argument for argument in (*node.args, *node.kwargs.values()) if _is_tensor(argument)]
    return _broadcast(graph, tensors, len(_shape(node)))


def _same(graph: Graph, node: GraphNode) -> FactorAxes:
    return graph.axes(node.args[0])


def _constant(graph: Graph, node: GraphNode) -> FactorAxes:
    return [fresh(length, "a constant") for length in _shape(node)]


def _linear(graph: Graph, node: GraphNode) -> FactorAxes:
    x, weight = graph.axes(node.args[0]), graph.axes(node.args[1])
    bias = _argument(node, "bias")
    unify(x[-1], weight[1])
    graph.sum_over(weight[1])
    if bias is not None:
        unify(weight[0], graph.axes(bias)[0])
    return [*x[:-1], weight[0]]


def _space(node: GraphNode, kept: int) -> FactorAxes:
    return [fresh(length, "space") for length in _shape(node)[kept:]]


def _convolution(graph: Graph, node: GraphNode) -> FactorAxes:
    x, weight = graph.axes(node.args[0]), graph.axes(node.args[1])
    is_transposed = "transpose" in str(node.target)
    dimensions = len(weight) - 2
    if len(x) != dimensions + 2:
        raise _UnknownError("a convolution without a batch")
    groups = int(_argument(node, "groups", 1))
    into, out = (weight[0], weight[1]) if is_transposed else (weight[1], weight[0])
    shape = _shape(node.args[1])
    for axis in weight[2:]:
        freeze(axis, KERNEL)
    for axis in x[2:]:
        freeze(axis, "space")
    if groups == 1:
        unify(x[1], into)
        graph.sum_over(into)
    elif groups == shape[0] and is_transposed:
        raise _UnknownError("a grouped transposed convolution")
    elif shape[1] == 1 and groups == _shape(node.args[0])[1]:
        # Depthwise: each channel has its own kernels, one or a block of them.
        unify([*x[1], *fresh(shape[0] // groups)], out)
    else:
        for axis in (x[1], weight[0], weight[1]):
            freeze(axis, "a grouped convolution")
        out = fresh(_shape(node)[1], "a grouped convolution")
    bias = _argument(node, "bias")
    if bias is not None:
        unify(out, graph.axes(bias)[0])
    return [x[0], out, *_space(node, 2)]


def _batch_norm(graph: Graph, node: GraphNode) -> FactorAxes:
    x = graph.axes(node.args[0])
    for name in ("weight", "bias", "running_mean", "running_var"):
        argument = _argument(node, name)
        if argument is not None:
            unify(x[1], graph.axes(argument)[0])
    return x


def _layer_norm(graph: Graph, node: GraphNode) -> FactorAxes:
    x = graph.axes(node.args[0])
    for argument in (_argument(node, "weight"), _argument(node, "bias")):
        if argument is not None:
            gain = graph.axes(argument)
            for one, other in zip(x[-len(gain) :], gain, strict=True):
                unify(one, other)
    return x


def _group_norm(graph: Graph, node: GraphNode) -> FactorAxes:
    x, channels, groups = graph.axes(node.args[0]), _shape(node.args[0])[1], int(_argument(node, "num_groups", 1))
    unify(x[1], [*fresh(groups), *fresh(channels // groups)])
    for argument in (_argument(node, "weight"), _argument(node, "bias")):
        if argument is not None:
            unify(x[1], graph.axes(argument)[0])
    return x


def _embedding(graph: Graph, node: GraphNode) -> FactorAxes:
    table = graph.axes(node.args[0])
    freeze(table[0], "the entries of a table")
    return [*graph.axes(node.args[1]), table[1]]


def _index(graph: Graph, node: GraphNode) -> FactorAxes:
    """Entries of a table chosen by tensors of indices on its first axes."""
    x, indices = graph.axes(node.args[0]), list(_argument(node, "indices"))
    count = next((number for number, index in enumerate(indices) if index is None), len(indices))
    if any(index is not None for index in indices[count:]) or not count:
        raise _UnknownError("indices on inner axes")
    for axis in x[:count]:
        freeze(axis, "the entries of a table")
    kept = len(x) - count
    return [fresh(length, "a constant") for length in _shape(node)[: len(_shape(node)) - kept]] + x[count:]


def _matmul(graph: Graph, node: GraphNode) -> FactorAxes:
    left, right = (node.args[1], node.args[2]) if "addmm" in str(node.target) else (node.args[0], node.args[1])
    a, b = graph.axes(left), graph.axes(right)
    if len(a) == 1 or len(b) == 1:
        raise _UnknownError("a product with a vector")
    unify(a[-1], b[-2])
    batch = _batch_axes(a, b, _shape(left), _shape(right))
    graph.sum_over(a[-1], batch)
    result = [*batch, a[-2], b[-1]]
    if "addmm" in str(node.target):
        added, shape = graph.axes(node.args[0]), _shape(node.args[0])
        for place in range(1, len(shape) + 1):
            if shape[-place] != 1:
                unify(added[-place], result[-place])
    return result


def _batch_axes(a: FactorAxes, b: FactorAxes, shape_a: Sequence[int], shape_b: Sequence[int]) -> FactorAxes:
    batch: FactorAxes = []
    for place in range(3, max(len(a), len(b)) + 1):
        one = a[-place] if place <= len(a) and shape_a[-place] != 1 else None
        other = b[-place] if place <= len(b) and shape_b[-place] != 1 else None
        if one is not None and other is not None:
            unify(one, other)
        batch.append(one if one is not None else other if other is not None else [])
    return batch[::-1]


def _einsum(graph: Graph, node: GraphNode) -> FactorAxes:
    equation, operands = str(node.args[0]).replace(" ", ""), list(_argument(node, "tensors"))
    inputs, arrow, output = equation.partition("->")
    labels = inputs.split(",")
    if not arrow or "." in equation or any(len(set(text)) != len(text) for text in (*labels, output)):
        raise _UnknownError(f"the sum {equation}")
    known: dict[str, FactorAxis] = {}
    for text, operand in zip(labels, operands, strict=True):
        for label, axis, length in zip(text, graph.axes(operand), _shape(operand), strict=True):
            if length == 1:
                known.setdefault(label, [])
            elif known.get(label):
                unify(known[label], axis)
            else:
                known[label] = axis
    summed = [label for label in known if label not in output]
    for label in summed:
        users = [text for text in labels if label in text]
        batch = [other for other in known if all(other in text for text in users) and other != label]
        graph.sum_over(known[label], [known[other] for other in batch])
    return [known[label] for label in output]


def _attention(graph: Graph, node: GraphNode) -> FactorAxes:
    """Scaled dot-product attention: queries (…, heads, L, D), keys (…, heads, S, D), values (…, heads, S, E)."""
    q, k, v = (graph.axes(argument) for argument in node.args[:3])
    shape_q, shape_k = _shape(node.args[0]), _shape(node.args[1])
    if _argument(node, "enable_gqa", False) and shape_q[-3] != shape_k[-3]:
        # Each key head serves a block of query heads.
        unify(q[-3], [*k[-3], *fresh(shape_q[-3] // shape_k[-3])])
        unify(k[-3], v[-3])
        for one, other, third in zip(q[:-3], k[:-3], v[:-3], strict=True):
            unify(one, other)
            unify(other, third)
        batch = [*q[:-3], k[-3]]
    else:
        batch = _batch_axes(q, k, shape_q, shape_k)
        _batch_axes([*batch, [], []], v, [*(length_of(axis) for axis in batch), 1, 1], _shape(node.args[2]))
    unify(q[-1], k[-1])
    unify(k[-2], v[-2])
    graph.sum_over(q[-1], batch)
    graph.sum_over(k[-2], batch)
    if _argument(node, "is_causal", False):
        freeze(q[-2], "the order of a sequence")
        freeze(k[-2], "the order of a sequence")
    mask = _argument(node, "attn_mask")
    if mask is not None:
        scores = [*q[:-2], q[-2], k[-2]]
        axes, shape = graph.axes(mask), _shape(mask)
        for place in range(1, len(shape) + 1):
            if shape[-place] != 1:
                unify(axes[-place], scores[-place])
    return [*q[:-1], v[-1]]


def _view(graph: Graph, node: GraphNode) -> FactorAxes:
    x, shape = graph.axes(node.args[0]), _shape(node)
    before = _shape(node.args[0])
    # Axes that a view leaves alone at either end keep even what a regrouping would divide.
    start = 0
    while start < min(len(shape), len(before)) and shape[start] == before[start]:
        start += 1
    end = 0
    while end < min(len(shape), len(before)) - start and shape[-1 - end] == before[-1 - end]:
        end += 1
    tail = len(x) - end
    return x[:start] + regrouped(x[start:tail], shape[start : len(shape) - end]) + x[tail:]


def _squeeze(graph: Graph, node: GraphNode) -> FactorAxes:
    x, before = graph.axes(node.args[0]), _shape(node.args[0])
    dims = _argument(node, "dim", list(range(len(x))))
    chosen = {int(dim) % max(len(x), 1) for dim in (dims if isinstance(dims, Sequence) else [dims])}
    return [axis for number, axis in enumerate(x) if not (number in chosen and before[number] == 1)]


def _unsqueeze(graph: Graph, node: GraphNode) -> FactorAxes:
    x = graph.axes(node.args[0])
    x.insert(int(_argument(node, "dim")) % (len(x) + 1), [])
    return x


def _transpose(graph: Graph, node: GraphNode) -> FactorAxes:
    x = graph.axes(node.args[0])
    name = _name(node)
    if name == "permute":
        return [x[int(dim)] for dim in _argument(node, "dims")]
    if name in {"t", "numpy_T"}:
        return x[::-1]
    one, other = (-2, -1)
    if name not in {"mT", "adjoint"}:
        one, other = int(_argument(node, "dim0")), int(_argument(node, "dim1"))
    x[one], x[other] = x[other], x[one]
    return x


def _expand(graph: Graph, node: GraphNode) -> FactorAxes:
    x, before, shape = graph.axes(node.args[0]), _shape(node.args[0]), _shape(node)
    new = len(shape) - len(before)
    return [
        x[number - new] if number >= new and before[number - new] == length else fresh(length)
        for number, length in enumerate(shape)
    ]


def _repeat_interleave(graph: Graph, node: GraphNode) -> FactorAxes:
    x, repeats, dim = graph.axes(node.args[0]), _argument(node, "repeats"), _argument(node, "dim")
    if not isinstance(repeats, int) or dim is None:
        raise _UnknownError("a repetition of flat values")
    x[dim] = [*x[dim], *fresh(repeats)]
    return x


def _repeat(graph: Graph, node: GraphNode) -> FactorAxes:
    x, repeats = graph.axes(node.args[0]), [int(count) for count in _argument(node, "repeats")]
    x = [[] for _ in range(len(repeats) - len(x))] + x
    return [[*fresh(count), *axis] for count, axis in zip(repeats, x, strict=True)]


def _cat(graph: Graph, node: GraphNode) -> FactorAxes:
    values = [argument for argument in _argument(node, "tensors") if _shape(argument) != (0,)]
    axes = [graph.axes(value) for value in values]
    dim = int(_argument(node, "dim", 0)) % len(axes[0])
    result = list(axes[0])
    for other in axes[1:]:
        for number in range(len(result)):
            if number != dim:
                unify(result[number], other[number])
    result[dim] = concatenated([axis[dim] for axis in axes])
    return result


def _stack(graph: Graph, node: GraphNode) -> FactorAxes:
    axes = [graph.axes(value) for value in _argument(node, "tensors")]
    for other in axes[1:]:
        for one, two in zip(axes[0], other, strict=True):
            unify(one, two)
    result = list(axes[0])
    result.insert(int(_argument(node, "dim", 0)) % (len(result) + 1), fresh(len(axes), "a constant"))
    return result


def _slice(graph: Graph, node: GraphNode) -> FactorAxes:
    x, shape = graph.axes(node.args[0]), _shape(node.args[0])
    dim = int(_argument(node, "dim", 0)) % len(x)
    start, step = _argument(node, "start") or 0, _argument(node, "step", 1)
    length = _shape(node)[dim]
    if length == shape[dim]:
        return x
    start = min(max(start + shape[dim] if start < 0 else start, 0), shape[dim])
    if step == 1 and length:
        x[dim] = sliced(x[dim], start, start + length)
    else:
        freeze(x[dim], "single entries are taken out")
        x[dim] = fresh(length, why_frozen(x[dim]))
    return x


def _split_axes(graph: Graph, node: GraphNode) -> list[FactorAxes]:
    x = graph.axes(node.args[0])
    dim = int(_argument(node, "dim", 0)) % len(x)
    results, start = [], 0
    for value in node.meta["val"]:
        length = int(value.shape[dim])
        results.append([*x[:dim], sliced(x[dim], start, start + length), *x[dim + 1 :]])
        start += length
    return results


def _select(graph: Graph, node: GraphNode) -> FactorAxes:
    x = graph.axes(node.args[0])
    dim = int(_argument(node, "dim", 0)) % len(x)
    index = int(_argument(node, "index", 0))
    return taken_apart(x, dim, _shape(node.args[0])[dim])[index]


def _unbind(graph: Graph, node: GraphNode) -> list[FactorAxes]:
    x = graph.axes(node.args[0])
    dim = int(_argument(node, "dim", 0)) % len(x)
    return taken_apart(x, dim, _shape(node.args[0])[dim])


def _reduced(graph: Graph, node: GraphNode) -> FactorAxes:
    x = graph.axes(node.args[0])
    dims = _dims(node, len(x))
    kept = bool(_argument(node, "keepdim", False))
    return [[] if number in dims else axis for number, axis in enumerate(x) if kept or number not in dims]


def _chosen(graph: Graph, node: GraphNode) -> Any:
    """The place of the largest entry: it depends on the order of the axis."""
    x = graph.axes(node.args[0])
    for dim in _dims(node, len(x)):
        freeze(x[dim], "positions on it are looked up")
    result = _reduced(graph, node)
    return [result, result] if isinstance(node.meta["val"], tuple | list) else result


def _ordered(graph: Graph, node: GraphNode) -> FactorAxes:
    """Operations in which the order of some axes matters: sums along them, shifts, reversals."""
    x = graph.axes(node.args[0])
    for dim in _dims(node, len(x), "dims" if _name(node) in {"roll", "flip"} else "dim"):
        freeze(x[dim], "its order matters")
    return x


def _triangle(graph: Graph, node: GraphNode) -> FactorAxes:
    x = graph.axes(node.args[0])
    for axis in x[-2:]:
        freeze(axis, "its order matters")
    return x


def _resampled(graph: Graph, node: GraphNode) -> Any:
    """Pooling and interpolation over the last axes."""
    x = graph.axes(node.args[0])
    dimensions = next((int(digit) for digit in _name(node) if digit.isdigit()), len(x) - 2)
    kept = len(x) - dimensions
    for axis in x[kept:]:
        freeze(axis, "space")
    value = node.meta["val"]
    shape = tuple(value[0].shape if isinstance(value, tuple | list) else value.shape)
    result = x[:kept] + [fresh(int(length), "space") for length in shape[kept:]]
    return [result] * len(value) if isinstance(value, tuple | list) else result


def _padded(graph: Graph, node: GraphNode) -> FactorAxes:
    x, shape, before = graph.axes(node.args[0]), _shape(node), _shape(node.args[0])
    for number, (old, new) in enumerate(zip(before, shape, strict=True)):
        if old != new:
            freeze(x[number], "it is padded")
            x[number] = fresh(new, "it is padded")
    return x


def _shuffled(graph: Graph, node: GraphNode) -> FactorAxes:
    """Pixel shuffle: channels (C · r · r) become pixels."""
    x, before, shape = graph.axes(node.args[0]), _shape(node.args[0]), _shape(node)
    small, large = sorted((before[-3], shape[-3]))
    for axis in x[-2:]:
        freeze(axis, "space")
    pixels = fresh(large // small, "pixels that are made of channels")
    if before[-3] == large:
        channels = fresh(small)
        unify(x[-3], [*channels, *pixels])
    else:
        channels = [*x[-3], *pixels]
    return [*x[:-3], channels, *_space(node, len(shape) - 2)]


def _complex(graph: Graph, node: GraphNode) -> FactorAxes:
    x = graph.axes(node.args[0])
    if _name(node) == "view_as_real":
        return [*x, fresh(2, "a constant")]
    freeze(x[-1], "pairs make complex numbers")
    return x[:-1]


def _prelu(graph: Graph, node: GraphNode) -> FactorAxes:
    x = graph.axes(node.args[0])
    if math.prod(_shape(node.args[1])) > 1:
        unify(x[1], graph.axes(node.args[1])[0])
    return x


def _filled(graph: Graph, node: GraphNode) -> FactorAxes:
    """A value that is the same everywhere: any order of it will do."""
    return [fresh(length) for length in _shape(node)]


_Operation = Callable[["Graph", "GraphNode"], Any]

_OPERATIONS: dict[str, _Operation] = {
    name: operation
    for names, operation in (
        ("linear", _linear),
        ("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d", _convolution),
        ("batch_norm instance_norm", _batch_norm),
        ("layer_norm rms_norm", _layer_norm),
        ("group_norm", _group_norm),
        ("embedding", _embedding),
        ("index", _index),
        ("matmul bmm mm addmm", _matmul),
        ("einsum", _einsum),
        ("scaled_dot_product_attention", _attention),
        ("view reshape _unsafe_view flatten unflatten", _view),
        ("squeeze", _squeeze),
        ("unsqueeze", _unsqueeze),
        ("transpose permute t mT numpy_T adjoint swapaxes", _transpose),
        ("expand expand_as broadcast_to", _expand),
        ("repeat_interleave", _repeat_interleave),
        ("repeat", _repeat),
        ("cat concat", _cat),
        ("stack", _stack),
        ("slice narrow", _slice),
        ("split split_with_sizes chunk", _split_axes),
        ("select", _select),
        ("unbind", _unbind),
        ("mean sum amax amin logsumexp var std linalg_vector_norm norm prod any all", _reduced),
        ("max min argmax argmin", _chosen),
        ("cumsum cumprod roll flip", _ordered),
        ("tril triu", _triangle),
        ("max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices", _resampled),
        ("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d", _resampled),
        ("adaptive_max_pool2d upsample_linear1d upsample_bilinear2d upsample_bicubic2d", _resampled),
        ("upsample_nearest1d upsample_nearest2d upsample_nearest3d", _resampled),
        ("pad constant_pad_nd", _padded),
        ("pixel_shuffle pixel_unshuffle", _shuffled),
        ("view_as_complex view_as_real", _complex),
        ("prelu _prelu_kernel", _prelu),
        ("softmax log_softmax _softmax _log_softmax dropout feature_dropout alpha_dropout", _same),
        ("clone contiguous to _to_copy detach alias lift_fresh_copy type_as", _same),
        ("zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full", _filled),
        ("copy masked_fill where addcmul addcdiv lerp clamp", _pointwise),
    )
    for name in names.split()
}


def statistics_of(node: GraphNode) -> list[GraphNode]:
    """Return the arguments of an operation that are running statistics of a norm."""
    if _OPERATIONS.get(_name(node)) is not _batch_norm:
        return []
    found = [_argument(node, name) for name in ("running_mean", "running_var")]
    return [argument for argument in found if argument is not None]


def run_operation(graph: Graph, node: GraphNode) -> FactorAxes | tuple[FactorAxes, ...]:
    """Return the axes of an operation's result; what it does not know about is fixed."""
    import torch

    value = node.meta.get("val")
    several = isinstance(value, tuple | list)
    values: list[Any] = list(value) if several else [value]  # type: ignore[arg-type]
    try:
        if node.target is operator.getitem:
            return graph.values[node.args[0]][node.args[1]]  # type: ignore[index, return-value]
        operation = _OPERATIONS.get(_name(node))
        if operation is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            operation = _pointwise
        if operation is None and not node.all_input_nodes and _is_tensor(node):
            operation = _constant
        if operation is None:
            raise _UnknownError(_name(node))
        result = operation(graph, node)
        results = list(result) if several else [result]
        for found, wanted in zip(results, values, strict=True):
            if [length_of(axis) for axis in found] != [int(length) for length in wanted.shape]:
                raise _UnknownError("it gives another shape than was thought")
        return tuple(results) if several else results[0]
    except (_UnknownError, KeyError, IndexError, TypeError, ValueError, AttributeError):
        why = f"the operation {_name(node)}, whose effect on an order is not known"
        for argument in node.all_input_nodes:
            found = graph.values.get(argument, [])
            for axes in found if isinstance(found, tuple) else (found,):
                for axis in axes:
                    freeze(axis, why)
        fixed = [[fresh(int(length), why) for length in getattr(item, "shape", ())] for item in values]
        return tuple(fixed) if several else fixed[0]
