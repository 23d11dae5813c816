"""Spell in-place ops out of place where nobody can tell.

    y = linear(x, W); relu_(y); z = f(y)
 -> y = linear(x, W); r = relu(y); z = f(r)

Allowed where the changed value was made in this graph, nothing that shares its memory is read later, and both nodes
record gradients alike. Only elementwise ops, dropout, scatter and fill, and ``x[...] = y`` as ``indexing`` spells it;
and what changes a value's shape in place (``squeeze_``), which becomes a view.
Not handled: values that are seen through views, inputs, parameters.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from mst_fx.context import Context, Graph
from mst_fx.effects import is_in_place, reshapes_in_place
from mst_fx.graph import (
    fake,
    fake_tensor,
    grad_states,
    needs_grad,
    node_name,
    run_on_fakes,
    storages,
    stride_order,
    walking,
)
from mst_fx.regions.indexing import Writer, write_item
from mst_fx.regions.strides import laid_out, like_strides, strides_matter
from mst_fx.report import RegionReport
from mst_fx.rowform.rules.registry import UNTAGGED

_OPERATORS = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, operator.ipow: operator.pow,
}  # fmt: skip
_SCATTERS = {"scatter", "scatter_add", "index_add", "index_put", "index_fill"}


def functionalize(graph: Graph, context: Context) -> list[RegionReport]:
    """Replace every in-place op whose target is private."""
    with walking(graph.module) as nodes:
        for node in nodes:
            if reshapes_in_place(node):
                replace_reshape(graph.module, node, context.fake_mode)
            elif is_in_place(node):
                replace_in_place(graph.module, node, context.fake_mode)
    return []


def replace_in_place(module: fx.GraphModule, node: fx.Node, fake_mode: Any) -> bool:
    """Replace one in-place op by its twin if that changes nothing else; returns whether it did."""
    target = node.args[0] if node.args else None
    if not isinstance(target, fx.Node) or not is_private(module, target, node):
        return False
    old, writer = fake_tensor(target), Writer(node, fake_mode)
    order = {n: i for i, n in enumerate(module.graph.nodes)}
    try:
        new = _write(node, target, writer)
    except Exception:
        new = None
    value = fake_tensor(new)
    # In place the dtype stays; a promoted or autocast twin would give another.
    if new is None or old is None or value is None or value.dtype != old.dtype or value.shape != old.shape:
        writer.undo()
        return False
    wanted = like_strides(value, old)
    if wanted is not None:
        new = laid_out(writer.method, new, wanted, old.ndim)
    elif stride_order(old) is None and strides_matter(target, node):
        writer.undo()
        return False
    # Views made later have fake values on the old storage: only on that one are they seen to share memory with it.
    with fake_mode, torch.no_grad():
        new.meta["example_value"] = old.detach().requires_grad_(value.requires_grad)
    _take_over(module, node, target, new, writer, order)
    return True


def _take_over(
    module: fx.GraphModule, node: fx.Node, target: fx.Node, new: fx.Node, writer: Writer, order: dict[fx.Node, int]
) -> None:
    """Have ``new`` read where ``node`` was, and where its target was after it."""
    # It is the same step of the user's code spelled otherwise, so it keeps its origin: no change for who reads a diff.
    for built in writer.built:
        built.meta |= {k: v for k, v in node.meta.items() if k == "mst_origin"}
    target.replace_all_uses_with(new, delete_user_cb=lambda u: order.get(u, -1) > order[node])
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)


def replace_reshape(module: fx.GraphModule, node: fx.Node, fake_mode: Any) -> bool:
    """Replace ``x.transpose_(0, 1)`` by a view that is read from there on; returns whether that could be done.

    Another view of ``x`` does not change with it, so nobody can tell. The fake value of ``x``, which Dynamo has
    reshaped as well, is made anew.
    """
    target: Any = node.args[0]
    writer = Writer(node, fake_mode)
    order = {n: i for i, n in enumerate(module.graph.nodes)}
    try:
        if node.op != "call_method" or is_in_place(target) or isinstance(fake(target.args[0]), (tuple, list)):
            return False
        shown, made = fake_tensor(target), run_on_fakes(target, fake_mode)
        same = [n for n in order if order[n] < order[node] and fake(n) is shown]
        if shown is None or same != [target]:
            return False
        with fake_mode, torch.no_grad():
            whole = shown.detach().as_strided(made.shape, made.stride(), made.storage_offset())
            target.meta["example_value"] = whole.requires_grad_(made.requires_grad and writer.grad)
        new = writer.create("call_method", str(node.target)[:-1], node.args, node.kwargs)
    except Exception:
        writer.undo()
        return False
    _take_over(module, node, target, new, writer, order)
    return True


def _write(node: fx.Node, target: fx.Node, writer: Writer) -> fx.Node | None:
    """Append what an in-place op leaves in its target, None where that is not known."""
    if node.target in (operator.setitem, "__setitem__") and len(node.args) == 3:
        return write_item(writer, target, node.args[1], node.args[2])
    name = str(node.target) if node.op == "call_method" else ""
    if name in ("fill_", "zero_") and not needs_grad(target):
        filling = 0 if name == "zero_" else node.args[1]
        return None if isinstance(filling, fx.Node) else writer.call(torch.full_like, target, filling)
    twin = find_twin(node)
    return None if twin is None else writer.create(*twin, replaces=fake_tensor(node))


def find_twin(node: fx.Node) -> tuple[str, Any, tuple[Any, ...], dict[str, Any]] | None:
    """Return the same call out of place as (op, target, args, kwargs), None where there is none."""
    name = node_name(node)
    base, function = name.rstrip("_"), node.target
    if not name or "out" in node.kwargs:
        return None
    if node.op == "call_method":
        return ("call_method", base, node.args, node.kwargs) if _is_elementwise(base) or base in _SCATTERS else None
    if function in _OPERATORS:
        return ("call_function", _OPERATORS[function], node.args, node.kwargs)
    if name.endswith("_"):
        twin = getattr(F, base, None) or getattr(torch, base, None)
        return ("call_function", twin, node.args, node.kwargs) if twin and _is_elementwise(base) else None
    if not (_is_elementwise(name) or function is F.dropout):
        return None
    return _without_inplace(function, node)


def _without_inplace(function: Callable[..., Any], node: fx.Node) -> Any:
    try:
        bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return None
    if "inplace" not in bound.arguments:
        return None
    bound.arguments["inplace"] = False
    return ("call_function", function, bound.args, bound.kwargs)


def _is_elementwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    tags = [getattr(packet, o).tags for o in packet.overloads()] if packet is not None else []
    elementwise = packet in UNTAGGED or any(torch.Tag.pointwise in t for t in tags)
    return elementwise and not any(torch.Tag.nondeterministic_seeded in t for t in tags)


def is_private(module: fx.GraphModule, target: fx.Node, node: fx.Node) -> bool:
    """Whether nothing but ``target`` shows the memory that ``node`` changes, as far as later readers go."""
    held = storages(target)
    if not held:
        return False
    order = {n: i for i, n in enumerate(module.graph.nodes)}
    aliases = [n for n in module.graph.nodes if n is target or (n is not node and storages(n) & held)]
    for alias in aliases:
        if alias.op in ("placeholder", "get_attr") or any(map(_is_opaque, [alias, *alias.users])):
            return False
        early = alias is not target and order[alias] < order[node]
        if early and any(order[u] > order[node] for u in alias.users):
            return False
    states = grad_states(module)
    return states[target] == states[node]


def _is_opaque(node: fx.Node) -> bool:
    """Whether a node calls a graph of its own: what its results share memory with is not known."""
    source = node.args[0] if node.target is operator.getitem else node
    return isinstance(getattr(source, "target", None), torch._ops.HigherOrderOperator)
