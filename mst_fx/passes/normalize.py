"""Spell equal things one way: rows joined again are one value, slices along tokens go above the head.

    logits = linear(h, W); loss = f(logits[:, :-1])
 -> loss = f(linear(h[:, :-1], W))
    stack([logsumexp(logits[0], -1), logsumexp(logits[1], -1)])
 -> logsumexp(logits, -1)
    logits[arange(T), labels]
 -> gather(logits, 1, labels[:, None])[:, 0]

A slice of all rows is the rows of a slice: exact, and the sliced-off rows are never computed for the loss.
The unsliced logits stay where something else (a returned output) reads them.
Not handled: slices of logits that are token-wise computations of several tensors.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from mst_fx.context import Context, Graph
from mst_fx.effects import change_after
from mst_fx.graph import fake_tensor, grad_states, in_autocasts_of, needs_grad, node_name, run_on_fakes, storages
from mst_fx.regions.indexing import Writer, pick_labels, slice_features, token_index
from mst_fx.regions.joined import join_rows
from mst_fx.regions.projections import read_projection
from mst_fx.regions.region import AMPLIFICATION
from mst_fx.regions.strides import strides_matter
from mst_fx.report import RegionReport

_ELEMENTWISE = {"float", "to", "tanh", "mul", "truediv", "div", "contiguous", "bfloat16", "half"}


def normalize(graph: Graph, context: Context) -> list[RegionReport]:
    """Join rows, spell picks of labels, and hoist token slices that come from an amplifier by elementwise steps."""
    for node in list(graph.module.graph.nodes):
        join_rows(graph.module, node, context.fake_mode)
    for node in list(graph.module.graph.nodes):
        if spell_pick(node, context.fake_mode):
            continue
        found = find_token_slice(node)
        if found is None or _changes(found[0]) or _enters_inference(found[0]):
            continue
        if not strides_matter(node):
            hoist_slice(graph.module.graph, node, *found, context.fake_mode)
    return []


def spell_pick(node: fx.Node, fake_mode: Any) -> bool:
    """Replace a pick of one feature per token by a gather; returns whether it was one."""
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple) or fake_tensor(node.args[0]) is None:
        return False
    writer = Writer(node, fake_mode)
    new = pick_labels(writer, node.args[0], node.args[1])  # pyright: ignore
    if new is not None:
        new.meta["mst_replaces"] = new.meta["example_value"] = fake_tensor(node)
        node.replace_all_uses_with(new)
        node.graph.erase_node(node)
    return new is not None


def find_token_slice(node: fx.Node) -> tuple[list[fx.Node], Any] | None:
    """Return the nodes from the amplifier to the sliced value, and the index, if ``node`` slices tokens of one."""
    sliced = token_index(node)
    value = fake_tensor(sliced[0]) if sliced is not None else None
    if sliced is None or value is None or not _slices_tokens(sliced[1], value.ndim):
        return None
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    found: set[fx.Node] = set()
    stack = [sliced[0]]
    keeps_rank = not any(isinstance(i, int) for i in (sliced[1] if isinstance(sliced[1], tuple) else (sliced[1],)))
    amplifiers = set[fx.Node]()
    while stack:
        current = stack.pop()
        if current in found:
            continue
        found.add(current)
        if read_projection(current) is not None:
            amplifiers.add(current)
            continue
        ahead = current.all_input_nodes
        if node_name(current) not in _ELEMENTWISE or len(ahead) != 1:
            ahead = _written(current) if keeps_rank else []
        if not ahead:
            return None
        stack += ahead
    if len(amplifiers) != 1 or not _is_linear_amplifier(*amplifiers):
        return None
    return sorted(found, key=order.__getitem__, reverse=True), sliced[1]


def _is_linear_amplifier(node: fx.Node) -> bool:
    projection, out = read_projection(node), fake_tensor(node)
    assert projection is not None
    x = fake_tensor(projection.tokens)
    same = x is not None and out is not None and x.ndim == out.ndim and node.args[:1] == (projection.tokens,)
    bias = fake_tensor(node.kwargs.get("bias", node.args[2] if len(node.args) > 2 else None))
    if bias is not None and bias.ndim > 1:  # it may have tokens of its own
        return False
    return same and node.op == "call_function" and node_name(node) == "linear" and projection.growth > AMPLIFICATION


def _written(node: fx.Node) -> list[fx.Node]:
    """Return what a node writes features of, or with: values with the same tokens; none where it is not known."""
    value, name = fake_tensor(node), node_name(node)
    if value is None or not node.args or node.kwargs:
        return []
    if name == "full_like":
        return node.all_input_nodes
    if name == "masked_fill":
        given = fake_tensor(node.args[1])
        return [node.args[0]] if given is not None and given.ndim < 2 and not isinstance(node.args[2], fx.Node) else []  # pyright: ignore
    at = 1 if node.target is slice_features else 2 if name == "slice_scatter" else None
    return node.all_input_nodes if at is not None and node.args[at] == value.ndim - 1 else []


def _slices_tokens(index: Any, ndim: int) -> bool:
    """Whether an index only slices dimensions other than the last, or picks one of such, by constants."""
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(i is Ellipsis or isinstance(i, (slice, int)) for i in items) or items.count(Ellipsis) > 1:
        return False
    if any(isinstance(i, bool) for i in items):
        return False
    if any(isinstance(v, fx.Node) for i in items if isinstance(i, slice) for v in (i.start, i.stop, i.step)):
        return False
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (ndim - len(items) + 1)
    items += [slice(None)] * (ndim - len(items))
    return items[-1] == slice(None) and any(i not in (slice(None), slice(0, None)) for i in items)


def _changes(chain: list[fx.Node]) -> bool:
    """Whether a value of the chain changes in place once it is there: its slice is a view, a hoisted one is not."""
    return change_after(chain[-1], set().union(*(storages(n) for n in chain)))


def _enters_inference(chain: list[fx.Node]) -> bool:
    """Whether a slice of what the chain's amplifier reads would be a view, made in inference mode, of what is not."""
    states = grad_states(chain[-1].graph.owning_module)  # pyright: ignore[reportArgumentType]
    return states[chain[-1]].inference and not states[chain[-1].args[0]].inference  # pyright: ignore


def hoist_slice(graph: fx.Graph, node: fx.Node, chain: list[fx.Node], index: Any, fake_mode: Any) -> None:
    """Compute the chain a second time, on the sliced input of its amplifier, in place of the slice.

    A slice of that slice finds it there in turn.

    Each copy stands beside what it copies, under the same autocast and grad mode and before whatever
    changes the input later.
    """
    x = chain[-1].args[0]
    assert isinstance(x, fx.Node)
    with graph.inserting_before(chain[-1]):
        new = graph.call_function(operator.getitem, (x, index))
    new.meta["example_value"] = run_on_fakes(new, fake_mode)
    env, sources = {x: new}, {chain[-1], *chain[-1].meta.get("mst_slice_of", ())}
    for old in reversed(chain):
        with graph.inserting_after(old):
            new = env[old] = graph.node_copy(old, lambda n: env.get(n, n))
        new.meta = {k: v for k, v in old.meta.items() if k == "stack_trace"}
        with in_autocasts_of(old):
            new.meta["example_value"] = run_on_fakes(new, fake_mode)
    states, pieces = grad_states(graph.owning_module), node.args[0]  # pyright: ignore[reportArgumentType]
    if needs_grad(chain[0]) and any(states[n] != states[chain[0]] for n in (node, pieces)):  # taken under no_grad
        with graph.inserting_after(new):
            new = graph.call_method("detach", (new,))
        new.meta = {k: v for k, v in node.meta.items() if k == "stack_trace"}
    env[chain[-1]].meta["mst_slice_of"] = sources
    chain[-1].meta["mst_sliced"] = True
    new.meta["mst_replaces"] = new.meta["example_value"] = fake_tensor(node)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    for old in [pieces, *chain] if pieces is not chain[0] else chain:
        if not old.users:
            graph.erase_node(old)
