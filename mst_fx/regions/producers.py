"""What a region reads but is computed from something smaller: it is computed in the loop and never kept in full.

    a frozen weight from its low-bit form:          w = (q.float() - zero) * scale;  y = x @ w
    a wide value of the tokens from narrower ones:  F.cross_entropy(logits, F.one_hot(y, V) * 0.9 + 0.1 / V)

Inductor would fuse either into what reads it; a loop it can't look into, so that all of it would be an input. Neither
has a gradient, and a value of the tokens no reader but the region: else it is there anyway. What is found here is only
proposed: the region is lifted with it, which proves that it is token-wise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from mst_fx.effects import change_after, communicates, draws, is_in_place
from mst_fx.graph import (
    fake,
    fake_tensor,
    is_autocast_switch,
    is_layout,
    is_parameter_like,
    layout_root,
    size_hint,
    storages,
    tensors_in,
)
from mst_fx.inductor import is_plain_fake
from mst_fx.regions.projections import read_projection
from mst_fx.rowform.rows import numel, same_size

MOST_NODES = 64
WORTH = 0.75
"""At most this share of a value's bytes may go in for it."""


@dataclass(frozen=True)
class Producers:
    """Nodes to be computed in the loop, and what they are computed from."""

    nodes: frozenset[fx.Node] = frozenset()
    leaves: Mapping[fx.Node, tuple[bool, ...]] = field(default_factory=dict)
    """Values of the tokens -> which of their dimensions are tokens."""


def may_join(node: fx.Node, outer: dict[fx.Node, fx.Node]) -> bool:
    """Whether a node may be computed in a loop that another region's nodes are in: no product, draw or side effect."""
    if node.op not in ("call_function", "call_method") or is_autocast_switch(node) or is_in_place(node):
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator | torch._ops.OpOverload) or communicates(node):
        return False
    values = tensors_in(fake(node))
    if not values or not all(map(is_plain_fake, values)):
        return False
    return read_projection(node, outer) is None and not draws(node)


def is_shared(node: fx.Node, outer: dict[fx.Node, fx.Node]) -> bool:
    """Whether a node is no value of the tokens for certain: a number, or made of parameters."""
    return not tensors_in(fake(node)) or is_parameter_like(node, outer)


def ways_back(
    starts: Collection[fx.Node],
    members: Collection[fx.Node],
    outer: dict[fx.Node, fx.Node],
    joins: Callable[[fx.Node], bool],
    most: int,
) -> Iterator[tuple[list[fx.Node], set[fx.Node]]]:
    """Go back from what a region reads, a node at a time, through what nothing but the region reads.

    Args:
        starts: Values that the region reads.
        members: The region's nodes.
        outer: For a checkpointed block, its placeholders -> the caller's values.
        joins: Whether a node may be taken into the region.
        most: How many may be.

    Yields:
        The nodes taken so far, the last first, and the values of the tokens that they are computed from.
    """
    taken: list[fx.Node] = []
    frontier, sources = set(starts), set[fx.Node]()
    for node in reversed(next(iter(starts)).graph.nodes):
        if node not in frontier:
            continue
        frontier.remove(node)
        only_here = all(u in members or u in taken for u in node.users)
        if not (only_here and len(taken) < most and joins(node)):
            sources.add(node)
            continue
        taken.append(node)
        frontier |= {n for n in node.all_input_nodes if not is_shared(n, outer)}
        yield [*taken], sources | frontier


def dequantisation(node: fx.Node, outer: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """Return the nodes that compute a frozen weight from something smaller; none for any other value."""
    value = fake_tensor(node)
    if value is None or value.requires_grad or not value.is_floating_point():
        return []
    if node.op in ("placeholder", "get_attr") or not is_parameter_like(node, outer):
        return []
    chain: list[fx.Node] = []
    roots: dict[int, int] = {}
    stack = [node]
    while stack and len(chain) < MOST_NODES:
        current = stack.pop()
        known = fake_tensor(current)
        if current in chain:
            continue
        if current.op in ("placeholder", "get_attr"):
            if known is None or known.requires_grad:
                return []
            roots[id(current)] = known.numel() * known.dtype.itemsize
            continue
        if is_in_place(current) or isinstance(current.target, torch._ops.HigherOrderOperator):
            return []
        if communicates(current):
            return []  # once per chunk would be more often than other ranks do
        chain.append(current)
        stack += current.all_input_nodes
    smaller = roots and not stack and sum(roots.values()) <= WORTH * value.numel() * value.dtype.itemsize
    return chain if smaller and not all(is_layout(n) for n in chain) and not _change(chain) else []


def _change(chain: list[fx.Node]) -> bool:
    """Whether anything the nodes compute or read changes later: read in the loop, it would be what it is by then."""
    if not chain:
        return False
    held = set().union(*(storages(n) for c in chain for n in (c, *c.all_input_nodes)))
    first = next(n for n in chain[0].graph.nodes if n in chain)
    return change_after(first, held)


def narrower(
    wide: Mapping[fx.Node, tuple[bool, ...]], members: set[fx.Node], outer: dict[fx.Node, fx.Node]
) -> Producers | None:
    """Go back from values of the tokens that a region reads to the fewest bytes they are computed from.

    Args:
        wide: The values, without gradients -> which of their dimensions are tokens.
        members: The region's nodes.
        outer: For a checkpointed block, its placeholders -> the caller's values.

    Returns:
        What takes part, or None where that would save little.
    """
    counts = {sum(kinds) if all(kinds[: sum(kinds)]) else 0 for kinds in wide.values()}
    if len(counts) != 1 or 0 in counts:
        return None  # tokens do not come first, or not in as many dimensions everywhere

    def joins(node: fx.Node) -> bool:
        # What is made of parameters under no_grad has no gradient here, and would get one in the loop.
        trains = any(v.requires_grad for n in (node, *node.all_input_nodes) for v in tensors_in(fake(n)))
        return not trains and may_join(node, outer)

    least, best = WORTH * sum(map(_bytes, wide)), None
    for taken, ends in ways_back(wide, members, outer, joins, MOST_NODES):
        if not ends & members and (held := sum(map(_bytes, ends))) < least:
            least, best = held, (taken, ends)
    if best is None or _change(best[0]):
        return None
    nodes, ends = best
    value = fake(next(iter(wide)))
    tokens = numel(value.shape[: counts.pop()])
    leaves = {n: kinds for n in ends if (kinds := wide.get(n) or _kinds(n, tokens))}
    return Producers(frozenset(nodes), leaves)


def _kinds(node: fx.Node, tokens: Any) -> tuple[bool, ...] | None:
    """Return which dimensions of a value are tokens: the first ones that make up their number; None without such."""
    value = fake_tensor(node)
    shape = () if value is None else value.shape
    for d in range(1, len(shape) + 1):
        if same_size(numel(shape[:d]), tokens):
            return (True,) * d + (False,) * (len(shape) - d)
    return None


def _bytes(node: fx.Node) -> int:
    """Return what a value takes that would not be there without the region: an input of the graph is there anyway."""
    value = fake_tensor(node)
    root = layout_root(node)
    given = root.op in ("placeholder", "get_attr") and storages(root) & storages(node)
    if value is None or given:
        return 0
    return size_hint(value.numel()) * value.dtype.itemsize
