"""Consecutive checkpointed blocks become one, which is recomputed whole: what went from one to the next is not kept.

    x -> [layer] -> x1 -> [layer] -> x2 -> ...        kept: x, x1, x2, ...
    x -> [layer ------------> layer] -> x2 -> ...     kept: x, x2, ...

Checkpointing keeps the input of every layer, H values per token and layer, which is what is left once wide values are
chunked. In groups of ``n`` it keeps one of ``n``, and holds what ``n`` layers save while the backward of a group runs:
``L / n + k * n`` for ``L`` layers that save ``k`` values of H inside, least at ``n = sqrt(L / k)`` (Chen et al.,
"Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174). A Llama layer saves 4.5. Every layer but the last of
a group runs its MLP once more.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.effects import changed_storages
from mst_fx.graph import CHECKPOINT, block_graph, fake, needs_grad, source_of, storages


def join_blocks(module: fx.GraphModule, size: int) -> tuple[bool, str]:
    """Join up to ``size`` consecutive checkpointed blocks of a graph in place; returns if any were, and what to say."""
    calls = [n for n in module.graph.nodes if n.target is CHECKPOINT]
    groups: list[list[fx.Node]] = []
    reasons: list[str] = []
    changed = changed_storages(module.graph.nodes)
    for call in calls:
        open_group = groups[-1] if groups and len(groups[-1]) < size else None
        reason = _reason_against(open_group[-1], call, changed) if open_group else None
        reasons += [reason] if reason else []
        if open_group and not reason:
            open_group.append(call)
        else:
            groups.append([call])
    for group in groups:
        if len(group) > 1:
            _join(module, group)
    if len(groups) < len(calls):
        module.recompile()
        apart = f"; others stay apart: {reasons[0]}" if reasons else ""
        return True, f"{len(calls)} checkpointed blocks are recomputed in {len(groups)} groups of up to {size}{apart}"
    why = reasons[0] if reasons else ("there is one" if calls else "there is none")
    return False, f"mst.checkpoint_layers={size}: no checkpointed blocks are joined, {why}"


def _reason_against(first: fx.Node, second: fx.Node, changed: set[int]) -> str | None:
    """Return why two checkpointed blocks can't be one, None if they can; ``changed`` storages change in the graph."""
    between = itertools.takewhile(lambda n: n is not second, _after(first))
    other = next((n for n in between if n.op != "get_attr" and n not in first.users), None)
    if other is not None:
        return f"`{other.name}` is computed between {first.name} and {second.name} ({source_of(other)})"
    handed_on = [n for n in second.all_input_nodes if n in first.users]
    if not handed_on:
        return f"{second.name} takes nothing from {first.name}"
    if not any(map(needs_grad, handed_on)):
        return f"{first.name} is not recomputed: nothing that it hands on needs a gradient"
    # Saved for this reader, it would be recomputed instead, and all that it is made of held until then.
    readers = (u for n in first.users if needs_grad(n) for u in n.users)
    other = next((u for u in readers if u.target is not CHECKPOINT and u.op != "output"), None)
    if other is not None:
        return f"`{other.name}` reads what {first.name} hands on, too ({source_of(other)})"
    # Recomputed from what was changed since, it would be another value than the one saved.
    if any(storages(n) & changed for call in (first, second) for n in call.all_input_nodes):
        return f"{first.name} or {second.name} reads a value that changes in place"
    if first.kwargs != second.kwargs:
        return f"{first.name} and {second.name} are checkpointed with different arguments"
    if any(_block(call).meta for call in (first, second)):
        return f"{first.name} or {second.name} has a policy of what to recompute"
    given, results = [*first.args, *second.args], [*first.users, *second.users]
    if not all(isinstance(a, fx.Node) for a in given) or any(n.target is not operator.getitem for n in results):
        return f"{first.name} or {second.name} takes a constant, or gives one value"
    return None


def _after(node: fx.Node) -> Iterator[fx.Node]:
    while node.op != "output":
        node = node.next
        yield node


def _block(call: fx.Node) -> fx.GraphModule:
    return block_graph(call.args[0])  # pyright: ignore


def _join(module: fx.GraphModule, calls: Sequence[fx.Node]) -> None:
    """Replace blocks that follow each other by one that is called in the place of the last."""
    own = {g for call in calls for g in call.users}
    graph, root = fx.Graph(), torch.nn.Module()
    copies: dict[Any, Any] = {}
    for call in calls:
        for holder, value in zip(_holders(_block(call)), call.args[1:], strict=True):
            if value not in own and value not in copies:
                copies[value] = graph.placeholder(holder.target)
                copies[value].target = copies[value].name  # two blocks may call different values by one name
                copies[value].meta = {**holder.meta}
    outside = list(copies)
    for call in calls:
        results = _copy_into(graph, root, _block(call), [copies[v] for v in call.args[1:]])
        copies |= {g: results[g.args[1]] for g in call.users}  # pyright: ignore
    returned = [g for call in calls for g in call.users if any(u not in calls for u in g.users)]
    graph.output(tuple(copies[g] for g in returned))
    targets = [str(call.args[0].target) for call in calls]  # pyright: ignore
    target = f"{targets[0]}_to_{targets[-1]}"
    setattr(module, target, fx.GraphModule(root, graph))
    with module.graph.inserting_before(calls[-1].next):
        place = module.graph.get_attr(target)
        joined = module.graph.call_function(CHECKPOINT, (place, *outside), calls[0].kwargs)
        joined.meta = {**calls[0].meta, "example_value": tuple(fake(g) for g in returned)}
        for i, old in enumerate(returned):
            new = module.graph.call_function(operator.getitem, (joined, i))
            new.meta = {**old.meta}
            old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in calls)
    for node in reversed([n for call in calls for n in (call.args[0], call, *call.users)]):
        module.graph.erase_node(node)
    used = {n.target for n in module.graph.nodes if n.op == "get_attr"}
    for name in {*targets} - used:
        delattr(module, name)


def _holders(block: fx.GraphModule) -> list[fx.Node]:
    return [n for n in block.graph.nodes if n.op == "placeholder"]


def _copy_into(graph: fx.Graph, root: torch.nn.Module, block: fx.GraphModule, given: Sequence[Any]) -> Sequence[Any]:
    """Copy a block's nodes behind those that are there, with its constants; returns what it gives."""
    copies: dict[fx.Node, Any] = dict(zip(_holders(block), given, strict=True))
    results = graph.graph_copy(block.graph, copies)
    for node, copy in copies.items():
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(block)
            copy.target = next(n for n in _names(str(node.target)) if getattr(root, n, value) is value)
            setattr(root, copy.target, value)
    return results  # pyright: ignore[reportReturnType]


def _names(name: str) -> Iterator[str]:
    name = name.replace(".", "_")
    return itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
