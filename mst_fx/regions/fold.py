"""Folds what surrounds a region into it, where less is then kept or computed again.

    n = norm(x); y = x + mlp(n)    ->    the region reads x and gives y

Terms:
    entry: the one value of the tokens that is read in the place of the amplifiers' input.
    exit: the one value that is given back in the place of the terminal.

The backward of a norm needs what the norm was given. Inside the region that is computed again a chunk at a time:
behind a contraction nothing of ``T x H`` is kept for it, and a checkpointed block doesn't run the loop a third time
to have it back. In front of a loss whose gradients are formed in the forward, nothing is kept at all. A residual that
is the entry itself costs no input, and its sum is written once.

What is folded is only proposed here, by what reads what; the region is lifted with it, which proves that it is
token-wise, or without it. Not folded: what has other readers, draws random numbers, or reads another value of the
tokens than the entry.

NOTE [what a checkpointed block returns is saved] AOTAutograd saves the value between two checkpointed blocks by
forbidding its recomputation, which it can't forbid of a loop's result: then the backward would run every block
again from the first one on, its loop a third time. So what a block returns is no exit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from mst_fx.graph import (
    fake,
    fake_tensor,
    is_layout,
    node_name,
    tensors_in,
)
from mst_fx.inductor import is_plain_fake
from mst_fx.regions.producers import is_shared, may_join, ways_back
from mst_fx.rowform.rows import same_shape

MOST_NODES = 40
"""A norm in the longest spelling has about ten."""
_REDUCES = {"mean", "var", "std", "norm", "vector_norm", "sum", "amax", "var_mean", "std_mean", "normalize"}


@dataclass(frozen=True)
class Fold:
    """What surrounds a region and may join it."""

    nodes: tuple[fx.Node, ...] = ()
    entry: fx.Node | None = None
    kinds: tuple[bool, ...] = ()
    """Which dimensions of the entry are tokens."""
    exit: fx.Node | None = None


def folds(
    module: fx.GraphModule,
    members: list[fx.Node],
    tokens: fx.Node | None,
    kinds: tuple[bool, ...],
    terminal: fx.Node | None,
    outer: dict[fx.Node, fx.Node],
) -> Iterator[Fold]:
    """Propose folds of a region, the largest first; nothing where there is none.

    Args:
        module: The region's graph.
        members: Its nodes.
        tokens: The one value its amplifiers read, None if there are several.
        kinds: Which dimensions of that are tokens.
        terminal: The one value it gives back, None if there are several or it is no value of the tokens.
        outer: For a checkpointed block, its placeholders -> the caller's values.
    """
    look = _Surroundings(list(module.graph.nodes), set(members), outer)
    before, entry = look.in_front(tokens) if tokens is not None else ([], None)
    for front, source in [(before, entry), ([], None)] if before else [([], None)]:
        for behind in look.behind(terminal, source or tokens, front) if terminal is not None else []:
            yield Fold((*front, *behind), source, kinds, behind[-1])
        if front:
            yield Fold(tuple(front), source, kinds)


@dataclass
class _Surroundings:
    order: list[fx.Node]
    members: set[fx.Node]
    outer: dict[fx.Node, fx.Node]

    def in_front(self, tokens: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
        """Go back from the amplifiers' input past a norm to the single value of its shape with the fewest bytes."""
        best: tuple[list[fx.Node], fx.Node | None] = [], None
        least = _itemsize(tokens)
        for taken, ends in ways_back([tokens], self.members, self.outer, self._may_join, MOST_NODES):
            if len(ends) == 1 and any(map(_is_norm, taken)):
                (end,) = ends
                # Past the copy in fp32 that many norms make first: what it is made of is there anyway.
                copies = best[1] is None or all(map(is_layout, taken[len(best[0]) :]))
                fewer = _itemsize(end) < least or (_itemsize(end) == least and copies)
                if _is_plain(end) and _alike(end, tokens) and fewer:
                    best, least = (taken[::-1], end), _itemsize(end)
        return best

    def behind(self, terminal: fx.Node, entry: fx.Node | None, front: list[fx.Node]) -> list[list[fx.Node]]:
        """Go on from the terminal; return what may join, the longest first, each ending with the exit."""
        inside = {terminal, *front}
        taken: list[fx.Node] = []
        found: list[list[fx.Node]] = []
        for node in self.order[self.order.index(terminal) + 1 :]:
            reads = node.all_input_nodes
            if not any(n is terminal or n in taken for n in reads):
                continue
            known = all(n is terminal or n in taken or n is entry or is_shared(n, self.outer) for n in reads)
            if not (known and self._may_join(node) and len(taken) < MOST_NODES):
                break
            taken.append(node)
            inside.add(node)
            exits = [n for n in (terminal, *taken) if any(u not in inside for u in n.users)]
            worth = any(_is_norm(n) or entry in n.all_input_nodes for n in taken)
            fits = _alike(node, terminal) and _itemsize(node) <= _itemsize(terminal)
            if exits == [node] and worth and fits and not self._is_returned(node):
                found.append([*taken])
        return found[::-1]

    def _is_returned(self, node: fx.Node) -> bool:
        """Whether a checkpointed block returns it: see NOTE [what a checkpointed block returns is saved]."""
        return bool(self.outer) and any(u.op == "output" for u in node.users)

    def _may_join(self, node: fx.Node) -> bool:
        return may_join(node, self.outer) and _is_plain(node)


def _is_plain(node: fx.Node) -> bool:
    found = tensors_in(fake(node))
    return bool(found) and all(is_plain_fake(v) and v.is_floating_point() for v in found)


def _itemsize(node: fx.Node) -> int:
    value = fake_tensor(node)
    return 0 if value is None else value.dtype.itemsize


def _is_norm(node: fx.Node) -> bool:
    name = node_name(node)
    return name in _REDUCES or name.endswith("_norm")


def _alike(node: fx.Node, other: fx.Node) -> bool:
    a, b = fake_tensor(node), fake_tensor(other)
    return a is not None and b is not None and same_shape(a, b)
