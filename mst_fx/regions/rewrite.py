"""Puts a chunked region in the place of its nodes in the outer graph.

    linear, silu, linear, mul, linear
 -> rows = x.flatten(0, 1); y = mst_fx.map([rows], [weights], body, C)[0].unflatten(0, (B, S))

Only ``replace`` changes what the graph computes, and nothing after its first change can fail; ``find_place`` may move
values that nothing but their inputs decides.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from mst_fx import ops
from mst_fx.effects import communicates, draws, is_in_place, mutated_storages
from mst_fx.graph import (
    fake,
    fake_tensor,
    grad_states,
    is_autocast_switch,
    is_differentiable,
    needs_grad,
    node_name,
    records_gradients,
    source_of,
    storages,
    stride_order,
    tensors_in,
)
from mst_fx.inductor import is_plain_fake
from mst_fx.regions.lift import Input, Lifted, Output
from mst_fx.regions.losses import LossCall, count, none_counts, read_by_count, sum_dtype, with_labels
from mst_fx.regions.region import module_stack, region_key
from mst_fx.regions.strides import laid_out, strides_matter
from mst_fx.report import Mismatch
from mst_fx.rowform.rows import same_size

OPS = {"map": ops.MAP, "sum": ops.SUM}


def find_place(lifted: Lifted) -> fx.Node | Mismatch:
    """Return the node to insert before: behind every live-in, before every reader of an output.

    The region must be convex, nothing it reads may change in place while it is pending, and gradients must
    be recorded at that place if the region trains.
    """
    region, sources = lifted.region, _sources(lifted)
    problem = _loses_identity(lifted) or _loses_strides(lifted)
    if problem:
        return Mismatch(problem, region.source)
    reader = _first_reader(lifted)
    late = _move_up_late(lifted, sources, reader)
    if late is not None:
        return Mismatch(
            f"not convex: it reads `{late.name}` ({source_of(late)}), which is computed after a result of it is read",
            region.source,
        )
    place = _where_gradients_are_recorded(lifted, sources, _behind_outputs(lifted, sources, reader))
    if place is None:
        return Mismatch("its result is first read where gradients are off", region.source)
    changing = _changing_while_pending(lifted, sources, place)
    if changing is not None:
        return Mismatch(f"a value of the region changes in place (`{changing.name}`)", region.source)
    return place


def _order(lifted: Lifted) -> dict[fx.Node, int]:
    return {n: i for i, n in enumerate(lifted.region.module.graph.nodes)}


def _loses_identity(lifted: Lifted) -> str | None:
    """Say which values would be two where they were one: memory that is shared, a draw that is made again outside."""
    members, outputs = set(lifted.region.nodes), [o.node for o in lifted.outputs]
    gone = members.union(lifted.dead)
    staying = [n for n in members.difference(outputs) if any(u not in gone for u in n.users)]
    shown: dict[int, fx.Node] = {}
    for node in [*outputs, *staying]:
        for storage in storages(node):
            if shown.setdefault(storage, node) is not node and not (shown[storage] in staying and node in staying):
                return f"`{shown[storage].name}` and `{node.name}` share memory, and both are read outside"
    again = set(staying)
    while staying:
        node = staying.pop()
        if draws(node):
            return f"`{node.name}` draws random numbers for a value that is read outside too"
        new = [n for n in node.all_input_nodes if n in members and n not in again]
        again.update(new)
        staying += new
    return None


def _loses_strides(lifted: Lifted) -> str | None:
    """Say which value has other strides than the dense one that would be given back, where that can be told."""
    for node in (o.node for o in lifted.outputs if not o.reduced):
        value = fake_tensor(node)
        if value is not None and stride_order(value) is None and strides_matter(node):
            return f"`{node.name}` shows a part of other memory, and what is laid out as it is changes in place"
    return None


def _first_reader(lifted: Lifted) -> fx.Node:
    """Return the first node that reads an output and stays."""
    gone = {*lifted.region.nodes, *lifted.dead}
    return min((u for o in lifted.outputs for u in o.node.users if u not in gone), key=_order(lifted).__getitem__)


def _move_up_late(lifted: Lifted, sources: set[fx.Node], reader: fx.Node) -> fx.Node | None:
    """Move live-ins behind ``reader`` in front of the region; return one of them where that can't be done."""
    order = _order(lifted)
    late = [n for n in sources if order[n] >= order[reader]]
    moved = not late or _move_up(lifted, late, order)
    return None if moved else late[0]


def _behind_outputs(lifted: Lifted, sources: set[fx.Node], reader: fx.Node) -> fx.Node:
    """Return what is behind the last output, for what comes up to the reader may have nothing to do with the region."""
    order = _order(lifted)
    behind = max((o.node for o in lifted.outputs), key=order.__getitem__).next
    return behind if max(map(order.__getitem__, sources)) < order[behind] < order[reader] else reader


def _where_gradients_are_recorded(lifted: Lifted, sources: set[fx.Node], place: fx.Node) -> fx.Node | None:
    """Go back from ``place``, which may be in a no_grad block, to where the region's gradients were recorded."""
    states = grad_states(lifted.region.module)
    training = [n for n in lifted.region.nodes if needs_grad(n) and records_gradients(states[n])]
    while lifted.trains and (not training or states[place.prev] != states[training[-1]]):
        place = place.prev
        if place in sources or place.op in ("placeholder", "root"):
            return None
    return place


def _changing_while_pending(lifted: Lifted, sources: set[fx.Node], place: fx.Node) -> fx.Node | None:
    """Return a node that changes what the region reads or shows, between its first node and its last use."""
    order, members, dead = _order(lifted), set(lifted.region.nodes), set(lifted.dead)
    first, end = (which(order[n] for n in [*members, place]) for which in (min, max))
    given = {o.node for o in lifted.outputs if not any(u in members for u in o.node.users)}
    read, made = (set().union(*(storages(n) for n in nodes)) for nodes in (sources, members - given))
    for node, at in order.items():
        if at < first or node in members or node in dead:
            continue
        # What the backward recomputes from must stay as it is to the end.
        held = read if lifted.trains and at >= end else read | made if at < end else set()
        if mutated_storages(node) & held:
            return node
    return None


def _sources(lifted: Lifted) -> set[fx.Node]:
    """Return every node the inserted op and what surrounds it reads."""
    given = {o.node for o in lifted.outputs}
    reads = (n for o in lifted.outputs for n in (*read_by_count(o.total), *o.offsets) if isinstance(n, fx.Node))
    extra = [n for n in reads if n not in given]
    return {i.node for i in [*lifted.chunked, *lifted.placeholders.values()]}.union(extra)


def _move_up(lifted: Lifted, late: list[fx.Node], order: dict[fx.Node, int]) -> bool:
    """Move values that come late (labels shaped for a loss behind a metric, a low-rank weight) in front of the region.

    Only what is computed from what is there already, as it would be there: without other ranks, random numbers and
    autocast, outside of ``torch.func``, and where a gradient goes through it, in the same grad mode and by ops that
    change layouts or multiply.
    """
    graph, place = lifted.region.module.graph, lifted.region.nodes[0]
    members, states = {*lifted.region.nodes, *lifted.dead}, grad_states(lifted.region.module)
    moved: set[fx.Node] = set()
    switched = any(is_autocast_switch(n) for n in graph.nodes)
    stack = list(late)
    while stack:
        node = stack.pop()
        if order[node] < order[place] or node in moved:
            continue
        values = [v for v in pytree.tree_leaves(fake(node)) if isinstance(v, torch.Tensor)]
        given = [v for n in node.all_input_nodes for v in tensors_in(fake(n))]
        if node in members or not values or is_in_place(node) or draws(node):
            return False
        if not all(map(is_plain_fake, [*values, *given])):
            return False
        if communicates(node) or isinstance(node.target, torch._ops.HigherOrderOperator):
            return False
        trains = any(v.requires_grad for v in values) or any(needs_grad(n) for n in node.all_input_nodes)
        if any(is_differentiable(v.dtype) for v in values) and switched:
            return False
        if trains and (states[node] != states[place] or node_name(node) not in _LAYOUTS_AND_PRODUCTS):
            return False
        moved.add(node)
        stack += node.all_input_nodes
    last = max(order[n] for n in late)
    held = set().union(*(storages(n) for m in moved for n in [m, *m.all_input_nodes]))
    if any(mutated_storages(n) & held for n in graph.nodes if order[place] <= order[n] < last):
        return False
    for node in sorted(moved, key=order.__getitem__):
        place.prepend(node)
    return True


_LAYOUTS_AND_PRODUCTS = {
    "getattr", "t", "transpose", "permute", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand",
    "contiguous", "getitem", "chunk", "split", "cat", "stack", "flip", "roll", "to", "float", "bfloat16", "half",
    "type_as", "add", "sub", "mul", "div", "truediv", "neg", "tanh", "sigmoid", "exp", "matmul", "mm", "linear",
}  # fmt: skip


def replace(lifted: Lifted, place: fx.Node, op: str, body: str, chunk_tokens: int) -> None:
    """Insert the op with its surroundings and hand its results to the readers of the region's outputs.

    Args:
        lifted: The region.
        place: From ``find_place``.
        op: "map" or "sum".
        body: Name of the registered body.
        chunk_tokens: C.
    """
    graph = lifted.region.module.graph
    known = set(graph.nodes)
    with graph.inserting_before(place):
        chunked, given_whole = _detached(graph, lifted, ops.BODIES[body])
        rows = [_as_rows(graph, i) for i in chunked]
        shared = [_as_shared(graph, i) for i in given_whole] + _hoist(graph, lifted)
        seed = None
        if lifted.body.has_seed:
            seed = graph.call_function(torch.randint, (2**62, ()), {"device": "cpu"})
        call = graph.call_function(OPS[op], (rows, shared, seed, body, chunk_tokens))
        given: dict[fx.Node, fx.Node] = {}
        # A mean may divide by the number of labels that the loop gives back.
        for i, output in sorted(enumerate(lifted.outputs), key=lambda pair: pair[1].reduced):
            value = graph.call_function(operator.getitem, (call, i))
            new = _give_back(graph, lifted, output, value, given, summed=op == "sum" and i == 0)
            given[output.node] = new
            new.meta.update({k: v for k, v in output.node.meta.items() if k == "stack_trace"})
            # Regions found before read the new value where they read the old one.
            new.meta["mst_replaces"] = new.meta["example_value"] = fake_tensor(output.node)
            members = set(lifted.region.nodes)
            output.node.replace_all_uses_with(new, delete_user_cb=lambda u, m=members: u not in m)
    stack = module_stack(lifted.region)
    for node in graph.nodes:
        if node not in known:
            node.meta["mst_region"] = region_key(lifted.region)
            if stack:
                node.meta["nn_module_stack"] = stack
    erase_region(lifted)


def _detached(graph: fx.Graph, lifted: Lifted, body: ops.CompiledBody) -> tuple[list[Input], list[Input]]:
    """Detach the inputs that the body has no gradient for: what they are made of gets none then, rather than zeros.

    Torch makes up zeros where a node with a backward of its own gets no gradient, and an optimizer moves what has some.
    """
    inputs = [*lifted.chunked, *lifted.shared]
    given = set(body.plan.positions(len(lifted.chunked))) if body.plan else set()
    for i in lifted.body.needs:
        if i < len(inputs) and i not in given:
            value = fake_tensor(inputs[i].node)
            assert value is not None
            node = graph.call_method("detach", (inputs[i].node,))
            node.meta["example_value"] = value.detach()
            inputs[i] = dataclasses.replace(inputs[i], node=node)
    return inputs[: len(lifted.chunked)], inputs[len(lifted.chunked) :]


def _as_rows(graph: fx.Graph, source: Input) -> fx.Node:
    """Permute tokens to the front, spread values that several tokens share, flatten tokens."""
    kinds, shape = source.live_in.kinds, source.live_in.shape
    assert kinds is not None
    value, own = source.node, source.live_in.tensor.shape
    expanded = [-1 if d >= len(shape) - len(own) and same_size(own[d - len(shape) + len(own)], s) else s
                for d, s in enumerate(shape)]  # fmt: skip
    if len(own) < len(shape) or any(s != -1 for s in expanded):
        sizes = [s if isinstance(s, int) else size_of(graph, s) for s in expanded]
        value = graph.call_method("expand", (value, *sizes))
    order = [d for d, k in enumerate(kinds) if k] + [d for d, k in enumerate(kinds) if not k]
    if order != sorted(order):
        value = graph.call_method("permute", (value, *order))
    if sum(kinds) > 1:
        value = graph.call_method("flatten", (value, 0, sum(kinds) - 1))
    return value


def size_of(graph: fx.Graph, size: Any, avoid: Sequence[fx.Node] = ()) -> fx.Node:
    """Return a node that computes a symbolic size, read off a value that has it, of ``avoid`` only if need be."""
    unwanted = set(avoid)
    for node in sorted(graph.nodes, key=unwanted.__contains__):
        value = fake_tensor(node)
        for d, s in enumerate(value.shape if value is not None else ()):
            if not isinstance(s, int) and same_size(s, size):
                return graph.call_method("size", (node, d))
    raise AssertionError(f"no value has the size {size}")


def token_count(graph: fx.Graph, lifted: Lifted) -> Any:
    """Return the number of tokens, or a node that computes it."""
    if isinstance(lifted.tokens, int):
        return lifted.tokens
    return graph.call_method("size", (_as_rows(graph, lifted.chunked[0]), 0))


def _as_shared(graph: fx.Graph, source: Input) -> fx.Node:
    if tuple(source.live_in.shape) == tuple(source.live_in.tensor.shape):
        return source.node
    return graph.call_method("reshape", (source.node, tuple(source.live_in.shape)))


def _hoist(graph: fx.Graph, lifted: Lifted) -> list[fx.Node]:
    env: dict[fx.Node, fx.Node] = {}

    def place(node: fx.Node) -> fx.Node:
        if node not in env:
            if node in lifted.placeholders:
                env[node] = _as_shared(graph, lifted.placeholders[node])
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), place)
                env[node] = graph.call_function(node.target, args, kwargs)  # pyright: ignore
        return env[node]

    return [place(n) for n in lifted.hoisted]


def _give_back(
    graph: fx.Graph, lifted: Lifted, output: Output, value: fx.Node, given: Mapping[fx.Node, fx.Node], summed: bool
) -> fx.Node:
    """Turn rows into the shape the readers expect, or per-token values into the scalar they sum up to."""
    old = fake_tensor(output.node)
    assert old is not None
    if not output.reduced:
        return _unflatten(graph, lifted, output, value, old)
    assert output.total is not None
    wide, reduced = sum_dtype(old.dtype), with_labels(output.total, given)
    total = value if summed else graph.call_method("sum", (value,), {"dtype": wide})
    divisor = count(graph, reduced, lambda: token_count(graph, lifted), lambda s: size_of(graph, s))
    if divisor is not None:
        if isinstance(reduced, LossCall) and not reduced.soft:
            total = _divided(graph, total, divisor, none_counts(graph, reduced, divisor))
        else:
            total = graph.call_function(torch.div, (total, divisor))
    for offset in output.offsets:
        total = graph.call_function(torch.add, (total, offset))
    return total if old.dtype == wide and not output.offsets else graph.call_method("to", (total, old.dtype))


def _divided(graph: fx.Graph, total: fx.Node, count: fx.Node, none: fx.Node) -> fx.Node:
    """Divide by what counts; NaN without a gradient where nothing does."""
    quotient = graph.call_function(torch.div, (total, graph.call_function(torch.add, (count, none))))
    return graph.call_function(torch.where, (none, float("nan"), quotient))


def _unflatten(graph: fx.Graph, lifted: Lifted, output: Output, value: fx.Node, old: torch.Tensor) -> fx.Node:
    kinds, shape = output.row.kinds, old.shape
    tokens = [d for d, k in enumerate(kinds) if k]
    if len(tokens) > 1:
        unknown = [d for d in tokens if not isinstance(shape[d], int)]
        sizes = [shape[d] if isinstance(shape[d], int) else size_of(graph, shape[d]) for d in tokens]
        if len(unknown) == 1 and all(shape[d] != 0 for d in tokens if d not in unknown):
            sizes = [-1 if d in unknown else shape[d] for d in tokens]
        value = graph.call_method("unflatten", (value, 0, tuple(sizes)))
    elif not tokens:
        value = graph.call_method("squeeze", (value, 0))
    order = tokens + [d for d, k in enumerate(kinds) if not k]
    if order != sorted(order):
        value = graph.call_method("permute", (value, *(order.index(d) for d in range(len(order)))))
    wanted = stride_order(old)
    if wanted is not None and [d for d in order if d in wanted] != wanted:
        value = laid_out(lambda name, *args: graph.call_method(name, args), value, wanted, len(order))
    return value


def erase_region(lifted: Lifted) -> None:
    """Erase what nothing reads any more of a region, behind it and of what its loop computes that it was given."""
    graph = lifted.region.module.graph
    erase_dead(graph, [*lifted.region.nodes, *lifted.dead])
    erase_dead(graph, lifted.lifter.absorbed)


def erase_dead(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Erase those of a region's nodes that nothing reads any more.

    Not ``eliminate_dead_code``: in a Dynamo graph that drops in-place calls whose result is unused.
    """
    for node in reversed(nodes):
        if not node.users and node.graph is graph and not node._erased:
            graph.erase_node(node)
