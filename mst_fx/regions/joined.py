"""Rows taken apart in a loop and put together again: one value.

    stack([f(x[0], y[0]), f(x[1], y[1]), ...])
 -> f(x, y)

Terms:
    root: a value that is taken apart along its first dimension, whole and in order.
    step: what is done to each row alike: elementwise ops, and ops along one dimension.

TRL takes log-probabilities so. Not handled: several dimensions at once, random numbers, rows left out.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from mst_fx.effects import is_in_place, mutated_storages
from mst_fx.graph import fake_tensor, grad_states, is_autocast_switch, node_name, storages
from mst_fx.regions.indexing import Writer
from mst_fx.regions.strides import laid_out, like_strides
from mst_fx.rowform.rows import same_size

_ELEMENTWISE = {"float", "double", "long", "to", "contiguous", "neg", "exp", "log", "tanh", "sigmoid", "clamp", "mul",
                "truediv", "div", "add", "sub", "where"}  # fmt: skip
_ALONG = {"logsumexp", "log_softmax", "softmax", "gather", "squeeze", "unsqueeze", "sum", "mean"}
"""Ops along a dimension, which is given."""


def join_rows(module: fx.GraphModule, node: fx.Node, fake_mode: Any) -> bool:
    """Replace a stack of rows by what they were rows of; returns whether it was one."""
    rows = node.args[0] if node_name(node) == "stack" and node.args else None
    at = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(rows, (list, tuple)) or at != 0 or len(rows) < 2 or "out" in node.kwargs:
        return False
    if not all(isinstance(r, fx.Node) for r in rows):
        return False
    joiner = _Joiner(module, node, fake_mode, len(rows))
    try:
        new = None if joiner.changes(tuple(rows)) else joiner.join(tuple(rows))
    except Exception:  # what can't be run on whole values is no row of one
        new = None
    value, old = fake_tensor(new), fake_tensor(node)
    if (
        new is None
        or new in joiner.roots
        or value is None
        or old is None
        or value.shape != old.shape
        or value.dtype != old.dtype
    ):
        joiner.writer.undo()
        return False
    wanted = like_strides(value, old)
    if wanted is not None:
        new = laid_out(joiner.writer.method, new, wanted, old.ndim)
    new.meta["mst_replaces"] = new.meta["example_value"] = old
    node.replace_all_uses_with(new)
    for dead in [node, *sorted(joiner.seen, key=joiner.order.__getitem__, reverse=True)]:
        if not dead.users:
            module.graph.erase_node(dead)
    return True


class _Joiner:
    def __init__(self, module: fx.GraphModule, place: fx.Node, fake_mode: Any, count: int) -> None:
        self.writer, self.count = Writer(place, fake_mode), count
        self.order = {n: i for i, n in enumerate(module.graph.nodes)}
        self.states = grad_states(module)
        self.place, self.module = place, module
        self.seen: set[fx.Node] = set()
        self.roots: set[fx.Node] = set()
        self.done: dict[tuple[fx.Node, ...], fx.Node] = {}

    def join(self, rows: tuple[fx.Node, ...]) -> fx.Node | None:
        """Return one node that holds all rows, None where they are not made alike."""
        if rows in self.done:
            return self.done[rows]
        whole = self._root(rows)
        if whole is None:
            whole = self._step(rows)
        if whole is not None:
            self.seen |= set(rows)
            self.done[rows] = whole
        return whole

    def _root(self, rows: tuple[fx.Node, ...]) -> fx.Node | None:
        first = rows[0]
        if any(r.target is not operator.getitem or r.args[0] is not first.args[0] for r in rows):
            return None
        source: Any = first.args[0]
        unbound = node_name(source) == "unbind" and len(source.args) + len(source.kwargs) == 1
        if any(self.states[n] != self.states[self.place] for n in (*rows, *([source] if unbound else ()))):
            return None
        if unbound:
            self.seen.add(source)
            source = source.args[0]
        value = fake_tensor(source)
        picked = [r.args[1][0] if isinstance(r.args[1], tuple) and len(r.args[1]) == 1 else r.args[1] for r in rows]
        whole = value is not None and same_size(value.shape[0], self.count)
        if not whole or any(isinstance(i, bool) or i != n for n, i in enumerate(picked)) or self._changes(source):
            return None
        self.roots.add(source)
        return source

    def changes(self, rows: tuple[fx.Node, ...]) -> bool:
        """Whether a row, or what it is made of, changes in place: its node is not what is joined then."""
        held: set[int] = set()
        stack, seen = list(rows), set[fx.Node]()
        while stack:
            node = stack.pop()
            if node not in seen and node.op in ("call_function", "call_method"):
                seen.add(node)
                held |= storages(node)
                stack += node.all_input_nodes if node_name(node) in _ELEMENTWISE | _ALONG else []
        return any(mutated_storages(n) & held for n in self.module.graph.nodes)

    def _changes(self, source: fx.Node) -> bool:
        """Whether the value changes in place, or autocast or grad mode does, before the rows are joined."""
        held, start = storages(source), self.order[source]
        if self.states[source] != self.states[self.place] and fake_tensor(source).requires_grad:  # pyright: ignore
            return True
        between = [n for n in self.module.graph.nodes if start < self.order.get(n, -1) < self.order[self.place]]
        return any(mutated_storages(n) & held or is_autocast_switch(n) for n in between)

    def _step(self, rows: tuple[fx.Node, ...]) -> fx.Node | None:
        first, name = rows[0], node_name(rows[0])
        if name not in _ELEMENTWISE | _ALONG or any(is_in_place(r) or r.op != first.op for r in rows):
            return None
        if any(r.target != first.target or self.states[r] != self.states[self.place] for r in rows):
            return None
        dim = _dim(first)
        if name in _ALONG and dim is None:
            return None
        leaves = [pytree.tree_flatten((r.args, r.kwargs)) for r in rows]
        if any(spec != leaves[0][1] for _, spec in leaves):
            return None
        joined: list[Any] = []
        for alike in zip(*(own for own, _ in leaves), strict=True):
            tensors = [isinstance(v, fx.Node) and fake_tensor(v) is not None for v in alike]
            if all(tensors) and not all(v is alike[0] and not fake_tensor(v).ndim for v in alike):  # pyright: ignore
                whole = self.join(tuple(alike))
                if whole is None or fake_tensor(alike[0]).ndim != fake_tensor(first).ndim - _dropped(name, first):  # pyright: ignore
                    return None
                joined.append(whole)
            elif any(tensors) or any(type(v) is not type(alike[0]) or v != alike[0] for v in alike):
                if not all(v is alike[0] for v in alike):
                    return None
                joined.append(alike[0])
            else:
                joined.append(alike[0])
        args, kwargs = pytree.tree_unflatten(joined, leaves[0][1])
        if name in _ALONG:  # counted from the last, a dimension is where it was
            args, kwargs = ((args[0], dim, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "dim": dim})
        return self.writer.create(first.op, first.target, args, kwargs)


def _dropped(name: str, node: fx.Node) -> int:
    """Return how many dimensions more or fewer than its operands, which all have as many, a row's result has."""
    first = fake_tensor(node.all_input_nodes[0])
    own = fake_tensor(node)
    return own.ndim - first.ndim if name in _ALONG and own is not None and first is not None else 0


def _dim(node: fx.Node) -> int | None:
    """Return the dimension an op works along, counted from the last; None if it is not one that is given."""
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    value = fake_tensor(node.args[0]) if node.args else None
    if not isinstance(dim, int) or isinstance(dim, bool) or value is None or not value.ndim:
        return None  # a row without dimensions has none to count from: what is joined would be worked along
    return dim if dim < 0 else dim - value.ndim - (node_name(node) == "unsqueeze")
