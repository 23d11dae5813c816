"""Spell equal things one way: hoist slices along tokens above the head.

    logits = linear(h, W); loss = f(logits[:, :-1])
 -> loss = f(linear(h[:, :-1], W))

A slice of all rows is the rows of a slice: exact, and the sliced-off rows are never computed for the loss.
The unsliced logits stay where something else (a returned output) reads them.
Not handled: slices of logits that are token-wise computations of several tensors.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from mst_fx.chunking import Context, Graph
from mst_fx.graph import fake_tensor, mutated_storages, node_name, storages
from mst_fx.projections import read_projection
from mst_fx.region import AMPLIFICATION
from mst_fx.report import RegionReport

_ELEMENTWISE = {"float", "to", "tanh", "mul", "truediv", "div", "contiguous", "bfloat16", "half"}


def normalize(graph: Graph, context: Context) -> list[RegionReport]:
    """Hoist every token slice whose value comes from an amplifier by elementwise steps."""
    del context
    for node in list(graph.module.graph.nodes):
        chain = find_token_slice(node)
        if chain is not None and not _changes_between(graph.module, chain, node):
            hoist_slice(graph.module.graph, node, chain)
    return []


def find_token_slice(node: fx.Node) -> list[fx.Node] | None:
    """Return the nodes from the amplifier to the sliced value if ``node`` slices tokens of one."""
    if node.op != "call_function" or node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return None
    value = fake_tensor(node.args[0])
    if value is None or not _slices_tokens(node.args[1], value.ndim):
        return None
    chain = [node.args[0]]
    while True:
        projection = read_projection(chain[-1])
        if projection is not None:
            x, out = fake_tensor(projection.tokens), fake_tensor(chain[-1])
            assert x is not None
            assert out is not None
            wide = x.ndim == out.ndim and chain[-1].op == "call_function" and chain[-1].args[0] is projection.tokens
            is_linear = getattr(chain[-1].target, "__name__", "") == "linear"
            ok = wide and is_linear and projection.growth > AMPLIFICATION
            return chain if ok else None
        name = node_name(chain[-1])
        if name not in _ELEMENTWISE or len(chain[-1].all_input_nodes) != 1:
            return None
        chain.append(chain[-1].all_input_nodes[0])


def _slices_tokens(index: Any, ndim: int) -> bool:
    """Whether an index only slices dimensions other than the last, by constants."""
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(i is Ellipsis or isinstance(i, slice) for i in items) or items.count(Ellipsis) > 1:
        return False
    if any(isinstance(v, fx.Node) for i in items if isinstance(i, slice) for v in (i.start, i.stop, i.step)):
        return False
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (ndim - len(items) + 1)
    items += [slice(None)] * (ndim - len(items))
    return items[-1] == slice(None) and any(i not in (slice(None), slice(0, None)) for i in items)


def _changes_between(module: fx.GraphModule, chain: list[fx.Node], node: fx.Node) -> bool:
    """Whether a value of the chain changes in place before the slice reads it."""
    order = {n: i for i, n in enumerate(module.graph.nodes)}
    held = set().union(*(storages(n) for n in chain))
    between = (n for n in module.graph.nodes if order[chain[-1]] < order[n] < order[node])
    return any(mutated_storages(n) & held for n in between)


def hoist_slice(graph: fx.Graph, node: fx.Node, chain: list[fx.Node]) -> None:
    """Compute the chain a second time, on the sliced input of its amplifier, in place of the slice.

    Each copy stands beside what it copies, under the same autocast and grad mode and before whatever
    changes the input later.
    """
    x = chain[-1].args[0]
    assert isinstance(x, fx.Node)
    with graph.inserting_before(chain[-1]):
        new = graph.call_function(operator.getitem, (x, node.args[1]))
    env = {x: new}
    for old in reversed(chain):
        with graph.inserting_after(old):
            new = env[old] = graph.node_copy(old, lambda n: env.get(n, n))
        new.meta = {k: v for k, v in old.meta.items() if k == "stack_trace"}
    env[chain[-1]].meta["mst_slice_of"] = chain[-1]
    chain[-1].meta["mst_sliced"] = True
    new.meta["mst_replaces"] = fake_tensor(node)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    for old in chain:
        if not old.users:
            graph.erase_node(old)
