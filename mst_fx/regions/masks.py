"""Proves what an attention mask is from how the graph computes it: all pairs, or a token and those before it.

Transformers compiles its masks into the graph: ``arange(S)[None, None, None, :] <= arange(S)[None, None, :, None]``
and the like. Every step of that is an affine function of the indices, so the mask can be told without computing it.

Terms:
    affine: an integer value ``const + sum(coefs[d] * index[d])`` of the indices along its dimensions.
    condition: the boolean value ``affine >= 0``.

The ops are a closed list; whatever else a mask is made from (an input, a parameter, a sort) proves nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from mst_fx.graph import fake_tensor, storages
from mst_fx.rowform.rows import concrete, is_one, same_size

_INTEGERS = (torch.int64, torch.int32)


class UnprovenError(Exception):
    """Nothing is known about a value; the message names the node."""


@dataclass(frozen=True)
class Affine:
    """An integer affine in its indices, or, as a ``condition``, whether that is at least 0."""

    coefs: tuple[int, ...]
    const: int
    condition: bool = False

    @property
    def constant(self) -> bool:
        """Whether the value is the same everywhere."""
        return not any(self.coefs)

    @property
    def truth(self) -> bool | None:
        """What a condition is everywhere, None where that depends on the indices."""
        return (self.const >= 0) if self.condition and self.constant else None


def _boolean(value: bool, ndim: int) -> Affine:
    return Affine((0,) * ndim, 0 if value else -1, condition=True)


class MaskReader:
    """Reads values of one graph as affine functions of their indices.

    Args:
        outer: For a checkpointed block, its placeholders -> the caller's values.
    """

    def __init__(self, outer: dict[fx.Node, fx.Node]) -> None:
        self.outer = outer
        self.read: dict[fx.Node, Affine] = {}

    def value(self, node: Any) -> Affine:
        """Return what a node computes.

        Raises:
            UnprovenError: If an op is not on the list, or its arguments are not as it needs them.
        """
        if isinstance(node, (bool, int)):
            return Affine((), int(node))
        if not isinstance(node, fx.Node):
            raise UnprovenError(str(node))
        while node in self.outer:
            node = self.outer[node]
        if node not in self.read:
            rule = _RULES.get((node.op, node.target))
            own = fake_tensor(node)
            if rule is None or own is None:
                raise UnprovenError(node.name)
            found = rule(self, *node.args, **node.kwargs)
            if len(found.coefs) != own.ndim:
                raise UnprovenError(node.name)
            # Along a dimension of size 1 the only index is 0.
            coefs = tuple(0 if is_one(s) else c for c, s in zip(found.coefs, own.shape, strict=True))
            self.read[node] = _settled(replace(found, coefs=coefs), own.shape)
        return self.read[node]

    def shape(self, node: Any) -> tuple[Any, ...]:
        """Return the shape of a node's value."""
        value = fake_tensor(node)
        return () if value is None else tuple(value.shape)


def _settled(value: Affine, shape: Iterable[Any]) -> Affine:
    """Make a condition that holds, or fails, for every index of known sizes a constant."""
    if not value.condition or value.constant:
        return value
    low = high = value.const
    for coef, size in zip(value.coefs, shape, strict=True):
        size = concrete(size)
        if coef and not isinstance(size, int):
            return value
        low, high = low + min(0, coef * (size - 1)), high + max(0, coef * (size - 1))
    return _boolean(low >= 0, len(value.coefs)) if low >= 0 or high < 0 else value


def read_mask(node: fx.Node, outer: dict[fx.Node, fx.Node], mutated: set[int]) -> str | None:
    """Say what a boolean mask ``[..., S, S]`` lets attend: "all", "causal", or None where nothing is proved.

    Args:
        node: The mask, True where a query may see a key.
        outer: For a checkpointed block, its placeholders -> the caller's values.
        mutated: Storages that change in place in a graph in which the mask is made or passed on.
    """
    own, reader = fake_tensor(node), MaskReader(outer)
    if own is None or own.dtype is not torch.bool or own.ndim < 2:
        return None
    try:
        found = reader.value(node)
    except (UnprovenError, TypeError, IndexError, ValueError):
        return None
    held = set().union(*(storages(n) for n in reader.read))
    if held & mutated:
        return None
    if found.truth:
        return "all"
    *others, rows, columns = found.coefs
    square = same_size(own.shape[-1], own.shape[-2])
    # row - column >= const with 0 <= const < 1: each query sees itself and all before it.
    causal = found.condition and not any(others) and rows > 0 and columns == -rows and 0 <= found.const < rows
    return "causal" if causal and square else None


# -- rules: what an op makes of affine arguments ------------------------------------------------------


def _integer(value: Affine) -> Affine:
    if value.condition:
        raise UnprovenError("a condition is no number")
    return value


def _together(a: Affine, b: Affine) -> tuple[Affine, Affine]:
    n = max(len(a.coefs), len(b.coefs))
    first, second = (replace(v, coefs=(0,) * (n - len(v.coefs)) + v.coefs) for v in (a, b))
    return first, second


def _combine(r: MaskReader, x: Any, y: Any, sign: int) -> Affine:
    a, b = _together(_integer(r.value(x)), _integer(r.value(y)))
    return Affine(tuple(p + sign * q for p, q in zip(a.coefs, b.coefs, strict=True)), a.const + sign * b.const)


def _add(r: MaskReader, x: Any, y: Any) -> Affine:
    return _combine(r, x, y, 1)


def _sub(r: MaskReader, x: Any, y: Any) -> Affine:
    return _combine(r, x, y, -1)


def _at_least(flip: bool, strict: bool) -> Callable[..., Affine]:
    def rule(r: MaskReader, x: Any, y: Any) -> Affine:
        gap = _combine(r, y, x, -1) if flip else _combine(r, x, y, -1)
        return Affine(gap.coefs, gap.const - strict, condition=True)

    return rule


def _equal(wanted: bool) -> Callable[..., Affine]:
    def rule(r: MaskReader, x: Any, y: Any) -> Affine:
        gap = _combine(r, x, y, -1)
        if not gap.constant:
            raise UnprovenError("differs from place to place")
        return _boolean((gap.const == 0) is wanted, len(gap.coefs))

    return rule


def _junction(neutral: bool) -> Callable[..., Affine]:
    """And (``neutral`` True) or or (False): the neutral value leaves the other as it is, its opposite wins."""

    def rule(r: MaskReader, x: Any, y: Any) -> Affine:
        a, b = _together(_condition(r.value(x)), _condition(r.value(y)))
        if (not neutral) in (a.truth, b.truth):
            return _boolean(not neutral, len(a.coefs))
        if a.truth is neutral or a == b:
            return b
        if b.truth is neutral:
            return a
        raise UnprovenError("joins two conditions")

    return rule


def _condition(value: Affine) -> Affine:
    if not value.condition:
        raise UnprovenError("a number is no condition")
    return value


def _arange(r: MaskReader, end: Any, *, device: Any = None, dtype: Any = None) -> Affine:
    if dtype not in (None, *_INTEGERS) or isinstance(end, float):
        raise UnprovenError("no integers")
    return Affine((1,), 0)


def _filled(value: bool) -> Callable[..., Affine]:
    def rule(r: MaskReader, like: Any, size: Any, *, dtype: Any = None, device: Any = None) -> Affine:
        if dtype is not torch.bool or not isinstance(size, (tuple, list, torch.Size)):
            raise UnprovenError("no booleans")
        return _boolean(value, len(size))

    return rule


def _cast(r: MaskReader, x: Any, *targets: Any, device: Any = None, dtype: Any = None) -> Affine:
    value = r.value(x)
    dtypes = [t for t in (*targets, dtype) if isinstance(t, torch.dtype)]
    known = all(isinstance(t, (torch.dtype, torch.device, str)) for t in targets)
    if not known or any(d not in ((torch.bool,) if value.condition else _INTEGERS) for d in dtypes):
        raise UnprovenError("a cast")
    return value


def _unsqueeze(r: MaskReader, x: Any, dim: int) -> Affine:
    value = r.value(x)
    at = dim % (len(value.coefs) + 1)
    return replace(value, coefs=(*value.coefs[:at], 0, *value.coefs[at:]))


def _expand(r: MaskReader, x: Any, *sizes: Any) -> Affine:
    value = r.value(x)
    sizes = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    return replace(value, coefs=(0,) * (len(sizes) - len(value.coefs)) + value.coefs)


def _diff(r: MaskReader, x: Any, n: int = 1, dim: int = -1, prepend: Any = None) -> Affine:
    value = _integer(r.value(x))
    at = dim % len(value.coefs)
    step = value.coefs[at]
    rest = (*value.coefs[:at], 0, *value.coefs[at + 1 :])
    if n != 1 or any(rest):
        raise UnprovenError("several steps")
    if prepend is not None:
        before = _integer(r.value(prepend))
        if not before.constant or not is_one(r.shape(prepend)[at]) or before.const != value.const - step:
            raise UnprovenError("another first step")
    return Affine(rest, step)


def _cumsum(r: MaskReader, x: Any, dim: int) -> Affine:
    value = r.value(x)
    nothing = value.truth is False or (value.constant and not value.condition and value.const == 0)
    if not nothing:
        raise UnprovenError("a running sum")
    return Affine(value.coefs, 0)


def _getitem(r: MaskReader, x: Any, index: Any) -> Affine:
    value, items = r.value(x), list(index) if isinstance(index, tuple) else [index]
    if items and all(isinstance(i, fx.Node) for i in items):
        return _gathered(r, value, items)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (len(value.coefs) - len([i for i in items if i is not None]) + 1)
    coefs, left = [], list(value.coefs)
    for item in items:
        if item is None:
            coefs.append(0)
        elif isinstance(item, slice) and item.start in (None, 0) and item.step in (None, 1):
            coefs.append(left.pop(0))
        else:
            raise UnprovenError("an index")
    return replace(value, coefs=(*coefs, *left))


def _gathered(r: MaskReader, value: Affine, items: list[Any]) -> Affine:
    """Read ``x[i, j]`` for affine ``i`` and ``j`` that are nowhere negative, which would count from the end."""
    if len(items) != len(value.coefs):
        raise UnprovenError("indexes some dimensions only")
    indices = [_integer(r.value(i)) for i in items]
    if any(min((*i.coefs, i.const)) < 0 for i in indices):
        raise UnprovenError("may count from the end")
    total = Affine((0,) * max(len(i.coefs) for i in indices), value.const, value.condition)
    for coef, index in zip(value.coefs, indices, strict=True):
        index, total = _together(index, total)
        coefs = tuple(t + coef * c for t, c in zip(total.coefs, index.coefs, strict=True))
        total = Affine(coefs, total.const + coef * index.const, value.condition)
    return total


def _same(r: MaskReader, x: Any) -> Affine:
    return r.value(x)


_SPELLINGS: list[tuple[Callable[..., Affine], tuple[Any, ...]]] = [
    (_add, (operator.add, torch.add, "add", "__add__")),
    (_sub, (operator.sub, torch.sub, "sub", "__sub__")),
    (_at_least(flip=False, strict=False), (operator.ge, torch.ge, "ge", "__ge__")),
    (_at_least(flip=False, strict=True), (operator.gt, torch.gt, "gt", "__gt__")),
    (_at_least(flip=True, strict=False), (operator.le, torch.le, "le", "__le__")),
    (_at_least(flip=True, strict=True), (operator.lt, torch.lt, "lt", "__lt__")),
    (_equal(True), (operator.eq, torch.eq, "eq", "__eq__")),
    (_equal(False), (operator.ne, torch.ne, "ne", "__ne__")),
    (_junction(True), (operator.and_, torch.bitwise_and, torch.logical_and, "logical_and", "bitwise_and", "__and__")),
    (_junction(False), (operator.or_, torch.bitwise_or, torch.logical_or, "logical_or", "bitwise_or", "__or__")),
    (_arange, (torch.arange,)),
    (_filled(True), ("new_ones",)),
    (_filled(False), ("new_zeros",)),
    (_cast, ("to",)),
    (_unsqueeze, (torch.unsqueeze, "unsqueeze")),
    (_expand, ("expand",)),
    (_diff, (torch.diff, "diff")),
    (_cumsum, (torch.cumsum, "cumsum")),
    (_getitem, (operator.getitem,)),
    (_same, ("contiguous", "clone", torch.clone)),
]
_RULES = {
    ("call_method" if isinstance(target, str) else "call_function", target): rule
    for rule, targets in _SPELLINGS
    for target in targets
}
