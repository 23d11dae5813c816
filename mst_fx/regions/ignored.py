"""Tokens that a loss leaves out: whatever gradient comes from behind, NaN too, they get none.

    where(mask, x, 0)   x.clamp(max=3), cross_entropy(x, labels, ignore_index=-100)     torch drops what comes back
    x * mask                                                                            NaN times 0 is NaN

A sum of nothing but such tokens is often divided by their number, 0, and its gradient multiplied by that in the end.
Gradients that were formed for the sum are 0 by then, as those of tokens with a weight of 0 are; only this tells them.

Terms:
    dropped: for every element of a value, whether what comes back to it ends before it reaches an input that needs a
        gradient. True and False stand for all elements.
Not handled: what one element of a softmax or another op over features drops.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mst_fx.body import Body
from mst_fx.rowform.rows import aten
from mst_fx.rowform.rules.registry import is_pointwise

Dropped = bool | fx.Node

_NO_GRADIENT = {aten.detach, aten.zeros_like, aten.ones_like, aten.full_like, aten.eq, aten.ne, aten.lt, aten.le,
                aten.gt, aten.ge, aten.logical_and, aten.logical_or, aten.logical_not, aten.isnan, aten.sign,
                aten.floor, aten.ceil, aten.round, aten.trunc, aten.argmax, aten.argmin}  # fmt: skip
_PICKS = {aten.select, aten.slice, aten.unsqueeze, aten.squeeze, aten.view, aten.reshape, aten.permute, aten.transpose,
          aten.expand, aten.gather}  # fmt: skip


def with_ignored_tokens(body: Body) -> Body:
    """Append an output, ``[C]`` bools: the tokens that no gradient of the first output comes back to.

    Returns the body as it is where there are none.
    """
    assert isinstance(body.graph, fx.GraphModule)
    graph = body.graph.graph
    output = next(n for n in graph.nodes if n.op == "output")
    with graph.inserting_before(output):
        found = _Reader(graph, body).dropped[output.args[0][0]]
    if isinstance(found, fx.Node):
        output.args = ((*output.args[0], found),)
    graph.eliminate_dead_code()
    body.graph.recompile()
    return dataclasses.replace(body, tells_ignored=isinstance(found, fx.Node))


class _Reader:
    """Reads a body's graph from its inputs on, and appends what computes ``dropped`` of every value."""

    def __init__(self, graph: fx.Graph, body: Body) -> None:
        self.call = graph.call_function
        needs = dict(zip(graph.find_nodes(op="placeholder"), (s.needs_grad for s in body.inputs), strict=False))
        self.dropped: dict[Any, Dropped] = {}
        for node in list(graph.nodes):
            if node.op == "placeholder":
                self.dropped[node] = not needs.get(node, False)
            elif node.op == "call_function":
                self.dropped[node] = self._read(node)

    def _read(self, node: fx.Node) -> Dropped:
        packet = getattr(node.target, "overloadpacket", node.target)
        if packet in _NO_GRADIENT or all(self.dropped[n] is True for n in node.all_input_nodes):
            return True
        rule = _RULES.get(packet)
        if rule is not None:
            return rule(self, node)
        if packet in _PICKS:
            of: Any = self.of(node.args[0])
            return of if isinstance(of, bool) else self.call(node.target, (of, *node.args[1:]), node.kwargs)  # pyright: ignore
        if isinstance(node.target, torch._ops.OpOverload) and is_pointwise(node.target):
            found = self.all(*node.args, *node.kwargs.values())
            return self.spread(found, node) if len(node.all_input_nodes) > 1 else found
        return False

    def of(self, value: Any) -> Dropped:
        """Return what is dropped of an argument; of a number there is no gradient."""
        return self.dropped[value] if isinstance(value, fx.Node) else True

    def all(self, *values: Any) -> Dropped:
        found: Dropped = True
        for value in values:
            found = self.both(found, self.of(value))
        return found

    def both(self, a: Dropped, b: Dropped) -> Dropped:
        if isinstance(a, bool) or isinstance(b, bool):
            return (b if a else False) if isinstance(a, bool) else (a if b else False)
        return self.call(aten.logical_and.default, (a, b))

    def either(self, a: Dropped, b: Dropped) -> Dropped:
        if isinstance(a, bool) or isinstance(b, bool):
            return (True if a else b) if isinstance(a, bool) else (True if b else a)
        return self.call(aten.logical_or.default, (a, b))

    def spread(self, dropped: Dropped, node: fx.Node) -> Dropped:
        """Give what was computed of operands, which may broadcast, the shape of their result."""
        return dropped if isinstance(dropped, bool) else self.call(aten.expand_as.default, (dropped, node))

    def compare(self, op: Any, a: Any, b: Any) -> fx.Node:
        return self.call(op.Tensor if isinstance(b, fx.Node) else op.Scalar, (a, b))


def _where(r: _Reader, node: fx.Node) -> Dropped:
    condition, a, b = node.args
    otherwise = r.call(aten.logical_not.default, (condition,))
    return r.spread(r.both(r.either(otherwise, r.of(a)), r.either(condition, r.of(b))), node)  # pyright: ignore


def _masked_fill(r: _Reader, node: fx.Node) -> Dropped:
    x, mask, value = node.args
    return r.spread(r.either(mask, r.of(x)), node) if r.of(value) is True else False  # pyright: ignore


def _clamp(r: _Reader, node: fx.Node) -> Dropped:
    x, low, high = (*node.args, *(node.kwargs.get(k) for k in ("min", "max")), None)[:3]
    return _between(r, node, x, low, high)


def _between(r: _Reader, node: fx.Node, x: Any, low: Any, high: Any) -> Dropped:
    if r.all(low, high) is not True:
        return False
    passes: Dropped = True
    for op, bound in ((aten.ge, low), (aten.le, high)):
        if bound is not None:
            passes = r.both(passes, r.compare(op, x, bound))
    dropped = r.call(aten.logical_not.default, (passes,)) if isinstance(passes, fx.Node) else False
    return r.spread(r.either(dropped, r.of(x)), node)


def _relu(r: _Reader, node: fx.Node) -> Dropped:
    return r.either(r.compare(aten.le, node.args[0], 0), r.of(node.args[0]))


def _extremum(wins: Any, r: _Reader, node: fx.Node) -> Dropped:
    a, b = node.args
    lost = [r.either(r.compare(wins, other, one), r.of(one)) for one, other in ((a, b), (b, a))]
    return r.spread(r.both(*lost), node)


def _reduced(r: _Reader, node: fx.Node) -> Dropped:
    x, *dims = node.args
    of = r.of(x)
    kept = dims[1] if len(dims) > 1 else node.kwargs.get("keepdim", False)
    return of if isinstance(of, bool) else r.call(aten.all.dims, (of, dims[0], kept))


def _nll(r: _Reader, node: fx.Node) -> Dropped:
    _, labels, _, reduction, ignore_index = node.args
    return r.compare(aten.eq, labels, ignore_index) if reduction == 0 else False


def _elements(r: _Reader, node: fx.Node) -> Dropped:
    a, b, *rest = node.args
    unreduced = 0 in (node.kwargs.get("reduction"), *rest[:1])
    return r.spread(r.both(r.of(a), r.of(b)), node) if unreduced else False


_RULES: dict[Any, Callable[[_Reader, fx.Node], Dropped]] = {
    aten.where: _where,
    aten.masked_fill: _masked_fill,
    aten.clamp: _clamp,
    aten.clamp_min: lambda r, n: _between(r, n, n.args[0], n.args[1], None),
    aten.clamp_max: lambda r, n: _between(r, n, n.args[0], None, n.args[1]),
    aten.relu: _relu,
    aten.minimum: lambda r, n: _extremum(aten.lt, r, n),
    aten.maximum: lambda r, n: _extremum(aten.gt, r, n),
    aten.sum: _reduced,
    aten.mean: _reduced,
    aten.nll_loss_forward: _nll,
    **dict.fromkeys((aten.mse_loss, aten.smooth_l1_loss, aten.huber_loss), _elements),
    # The loss's second result is a weight without a gradient; of other ops one result may go on where another ends.
    operator.getitem: lambda r, n: r.of(n.args[0]) if _is_loss(n.args[0]) else r.of(n.args[0]) is True,
}


def _is_loss(node: Any) -> bool:
    return getattr(node.target, "overloadpacket", None) is aten.nll_loss_forward
