"""What a trace knows about the axes of values: factors that are found to be one, split, and joined.

An axis is a list of factors, outermost first; its length is their product. A factor may turn out to be one with another
(union-find), a product of others, or a concatenation of axes. Whatever cannot be related keeps its order, with the
reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

INPUT, OUTPUT, KERNEL, UNUSED = "the module's input", "the module's output", "a kernel", "it takes no part"
EXPECTED = frozenset({INPUT, OUTPUT, KERNEL, UNUSED, "the entries of a table", "a constant", "space"})
"""Reasons that nobody wonders about."""


class Factor:
    """A part of an axis: `size` units, perhaps found to be the same as, or made up of, other factors."""

    __slots__ = ("copies", "frozen", "is_inner", "is_touched", "joined", "parts", "size", "split", "whole")

    def __init__(self, size: int, frozen: str = "") -> None:
        self.size = size
        self.frozen = frozen
        """Why it keeps its order; empty if it is free."""
        self.joined: Factor | None = None
        """The factor that it is one with."""
        self.split: list[Factor] | None = None
        """The factors whose product it is, outermost first."""
        self.parts: list[FactorAxis] | None = None
        """The axes whose concatenation it is."""
        self.copies: list[Factor] | None = None
        """What it is in each of several values that were stacked in one and have been taken apart again."""
        self.whole: Factor | None = None
        """The factor that was split, if this is the outer part of it."""
        self.is_inner = False
        """Whether it is the inner part of a factor that was split."""
        self.is_touched = False
        """Whether it was ever found to be the same as another."""


FactorAxis = list[Factor]
FactorAxes = list[FactorAxis]


def fresh(size: int, frozen: str = "") -> FactorAxis:
    """Return an axis of one new factor; one of length 1 has none."""
    return [] if size == 1 else [Factor(size, frozen)]


def leaves(axis: Iterable[Factor]) -> Iterator[Factor]:
    """Yield the factors that an axis consists of by now, among them such that have copies."""
    for factor in axis:
        while factor.joined is not None:
            factor = factor.joined
        if factor.split is not None:
            yield from leaves(factor.split)
        elif factor.size > 1:
            yield factor


def resolve(axis: Iterable[Factor]) -> FactorAxis:
    """Return an axis as the factors that it consists of by now."""
    found: FactorAxis = []
    for factor in leaves(axis):
        if factor.copies is None:
            found.append(factor)
            continue
        # Something else than a choice looks at the stack: what was taken apart is one after all.
        copies, factor.copies = factor.copies, None
        for other in copies[1:]:
            unify([copies[0]], [other])
        factor.joined = copies[0]
        found += resolve(copies[:1])
    return found


def length_of(axis: Iterable[Factor]) -> int:
    """Return how long an axis is."""
    return math.prod(factor.size for factor in axis)


def freeze(axis: Iterable[Factor], why: str) -> None:
    """Make an axis keep its order, everything in it included."""
    for factor in resolve(axis):
        factor.frozen = factor.frozen or why
        for part in factor.parts or ():
            freeze(part, why)


def is_frozen(axis: Iterable[Factor]) -> bool:
    """Say whether all of an axis keeps its order."""
    return all(factor.frozen for factor in resolve(axis))


def why_frozen(axis: Iterable[Factor]) -> str:
    """Return why an axis is fixed, in preference a reason that a reader may wonder about."""
    reasons = [factor.frozen for factor in resolve(axis) if factor.frozen]
    return next((reason for reason in reasons if reason not in EXPECTED), reasons[0] if reasons else "")


def split_factor(factor: Factor, outer: int) -> list[Factor]:
    """Split a plain factor in two, and return both."""
    factor.split = [Factor(outer, factor.frozen), Factor(factor.size // outer, factor.frozen)]
    factor.split[0].whole = factor
    factor.split[1].is_inner = True
    return factor.split


def unify(one: Iterable[Factor], other: Iterable[Factor]) -> None:
    """Make two axes one; where their factors do not fit each other, both are fixed."""
    a, b = resolve(one), resolve(other)
    if length_of(a) != length_of(b):
        freeze(a + b, "axes of different lengths meet")
        return
    if a and (all(factor.frozen for factor in a) or all(factor.frozen for factor in b)):
        why = why_frozen(a if all(factor.frozen for factor in a) else b)
        freeze(a + b, why)
        return
    while a and b:
        x, y = a[0], b[0]
        if x is y:
            del a[0], b[0]
        elif x.size == y.size:
            _join(x, y)
            del a[0], b[0]
        else:
            larger, smaller, rest = (x, y, a) if x.size > y.size else (y, x, b)
            if larger.parts is not None or larger.size % smaller.size:
                freeze(a + b, "axes that are divided differently meet")
                return
            rest[:1] = split_factor(larger, smaller.size)


def _join(x: Factor, y: Factor) -> None:
    x.is_touched = y.is_touched = True
    if x.frozen or y.frozen:
        why = x.frozen or y.frozen
        freeze([x], why)
        freeze([y], why)
    if x.parts is None:
        x.joined = y
    elif y.parts is None:
        y.joined = x
    else:
        _align(x, y)
        for part, other in zip(x.parts, y.parts, strict=True):
            unify(part, other)
        y.joined = x


def _align(x: Factor, y: Factor) -> None:
    """Cut two concatenations at the same places."""
    for factor, other in ((x, y), (y, x)):
        position = 0
        for part in list(other.parts or ()):
            position += length_of(part)
            if position < other.size and not _cut(factor, position):
                freeze([x, y], "concatenations that are divided differently meet")
                # Frozen parts need no structure in common.
                x.parts, y.parts = [fresh(x.size, x.frozen)], [fresh(x.size, x.frozen)]
                return


def _cut(factor: Factor, position: int) -> bool:
    """Make a concatenation have a boundary at a position; return whether it could be made."""
    assert factor.parts is not None
    start = 0
    for number, part in enumerate(factor.parts):
        length = length_of(part)
        if start == position:
            return True
        if start < position < start + length:
            resolved = resolve(part)
            if len(resolved) != 1:
                return False
            inner = resolved[0]
            if inner.parts is None:
                first, second = position - start, length - (position - start)
                inner.parts = [fresh(first, inner.frozen), fresh(second, inner.frozen)]
            elif not _cut(inner, position - start):
                return False
            factor.parts[number : number + 1] = inner.parts
            return True
        start += length
    return position == factor.size


def sliced(axis: FactorAxis, start: int, end: int) -> FactorAxis:
    """Return a contiguous piece of an axis."""
    factors = resolve(axis)
    if is_frozen(factors):
        return fresh(end - start, why_frozen(factors) or "a constant")
    if len(factors) > 1:
        outer, inner = factors[0], factors[1:]
        block = length_of(inner)
        if start % block or end % block:
            freeze(factors, "a piece is cut out of an axis across its blocks")
            return fresh(end - start, why_frozen(factors))
        freeze([outer], "single blocks are taken out")
        return inner if end - start == block else [Factor((end - start) // block, outer.frozen), *inner]
    factor = factors[0]
    if factor.parts is None:
        factor.parts = [[Factor(factor.size)]]
    if not (_cut(factor, start) and _cut(factor, end)):
        freeze(factors, "a piece is cut out of an axis across its blocks")
        return fresh(end - start, why_frozen(factors))
    pieces, position = [], 0
    for part in factor.parts:
        if start <= position < end:
            pieces.append(part)
        position += length_of(part)
    return concatenated(pieces)


def concatenated(pieces: Sequence[FactorAxis]) -> FactorAxis:
    """Return axes laid end to end as one axis."""
    if len(pieces) == 1:
        return pieces[0]
    size = sum(length_of(piece) for piece in pieces)
    if all(is_frozen(piece) for piece in pieces):
        return fresh(size, next((why for piece in pieces if (why := why_frozen(piece))), "a constant"))
    whole = Factor(size)
    whole.parts = list(pieces)
    return [whole]


def regrouped(axes: Sequence[FactorAxis], sizes: Sequence[int]) -> FactorAxes:
    """Return axes in the shape that a view gives them: the same factors in the same order, grouped anew."""
    flat: FactorAxis = []
    for factor in (factor for axis in axes for factor in resolve(axis)):
        if flat and flat[-1].frozen and factor.frozen:
            # Fixed factors may be divided in any way, so neighbours count as one.
            flat[-1] = Factor(flat[-1].size * factor.size, why_frozen([flat[-1], factor]))
        else:
            flat.append(factor)
    result: FactorAxes = []
    for size in sizes:
        taken: FactorAxis = []
        while length_of(taken) < size:
            need = size // length_of(taken)
            factor = flat[0]
            if need % factor.size == 0:
                taken.append(flat.pop(0))
            elif factor.size % need == 0 and factor.parts is None:
                outer, flat[0] = split_factor(factor, need)
                taken.append(outer)
            else:
                freeze([*flat, *taken], "a view divides an axis across its units")
                why = why_frozen([*flat, *taken])
                return result + [fresh(length, why) for length in sizes[len(result) :]]
        result.append(taken)
    return result


def taken_apart(x: FactorAxes, dim: int, count: int) -> list[FactorAxes]:
    """Return the axes of each entry on an axis.

    Where one layer gives several values that a view has stacked (queries, keys and values), each has an order of its
    own from here on; otherwise the entries keep their order and share that of the other axes.
    """
    rest = [list(leaves(axis)) for number, axis in enumerate(x) if number != dim]
    stack = list(leaves(x[dim]))
    if len(stack) == 1:
        copy_apart(stack[0], count)
    if any(factor.copies is not None and len(factor.copies) == count for axis in rest for factor in axis):
        return [
            [[factor.copies[entry] if factor.copies is not None else factor for factor in axis] for axis in rest]
            for entry in range(count)
        ]
    freeze(x[dim], "single entries are taken out")
    return [list(rest) for _ in range(count)]


def copy_apart(stack: Factor, count: int) -> None:
    """Make a product (stack, rest) a concatenation of copies of the rest, if nothing has used it as a product yet."""
    whole = stack.whole
    if whole is None or whole.is_inner or stack.frozen or stack.is_touched or stack.parts or stack.copies:
        return
    inner = list(leaves([whole]))[1:]
    if any(factor.frozen or factor.is_touched or factor.parts or factor.copies for factor in inner):
        return
    for factor in inner:
        factor.copies = [Factor(factor.size) for _ in range(count)]
    whole.split = None
    whole.parts = [[factor.copies[entry] for factor in inner if factor.copies] for entry in range(count)]
    stack.frozen = "single entries are taken out"


def all_factors(axis: FactorAxis) -> Iterator[Factor]:
    """Yield the plain factors of an axis, those inside concatenations and copies, too."""
    for factor in leaves(axis):
        if factor.copies is not None:
            yield from all_factors(factor.copies)
        elif factor.parts is not None:
            for part in factor.parts:
                yield from all_factors(part)
        else:
            yield factor
