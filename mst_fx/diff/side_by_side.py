"""Both graphs side by side, as rows: nodes matched by descent, equal layers found; nothing here knows how it looks.

Terms:
    row: a node before and the node after it is; one of them None where it was removed or added.
    stretch: consecutive rows of one layer, of one checkpointed block, or of neither.
    block: stretches that are equal but for the layer they are of, e.g. 32 of them.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import fx

from mst_fx.diff.graph_diff import called_block, fold_paths, ordinals, subgraphs
from mst_fx.graph import module_path, source_of
from mst_fx.printing import node_line
from mst_fx.report import RegionReport, Report

LONGEST_PERIOD = 8
"""Layers that may differ among themselves and still be folded when the sequence of them repeats."""


@dataclass(frozen=True)
class Row:
    """One line of the two graphs beside each other."""

    before: fx.Node | None
    after: fx.Node | None
    region: RegionReport | None = None
    """The region that took it away or put it in."""
    kept: bool = False
    """Whether both sides are the same node; otherwise one was removed, and the other merely stands beside it."""

    @property
    def node(self) -> fx.Node:
        """The node that tells where the row comes from."""
        node = self.before or self.after
        assert node is not None
        return node

    @property
    def source(self) -> str:
        """``file:line`` of the user's code, "" where no record leads there."""
        source = source_of(self.node)
        if "<" in source and self.region:
            return self.region.source
        return "" if "<" in source else source

    @property
    def path(self) -> str:
        """Module the row comes from, "" where no module is known."""
        return module_path(self.node) or (self.region.path if self.region else "")


@dataclass(frozen=True)
class Stretch:
    """Consecutive rows."""

    rows: tuple[Row, ...]
    layer: str = ""
    """Path of the layer, e.g. ``model.layers.3``; "" outside layers."""
    graph: str = ""
    """Name of the checkpointed block's graph, "" for the outermost."""


@dataclass(frozen=True)
class Block:
    """Equal sequences of stretches; one sequence where nothing repeats."""

    repeats: tuple[tuple[Stretch, ...], ...]

    @property
    def places(self) -> str:
        """Where the repeats are, e.g. ``model.layers.{0-31}``."""
        return fold_paths([s.layer for stretches in self.repeats for s in stretches])

    @property
    def graphs(self) -> str:
        """The checkpointed blocks' graphs the repeats are, "" for the outermost graph."""
        names = [s.graph for stretches in self.repeats for s in stretches if s.graph]
        numbered = [re.sub(r"_(\d+)(?=\.|$)", r"_.\1", n) for n in names]
        return fold_paths(numbered).replace("_.", "_")


def aligned_blocks(report: Report, number: int) -> list[Block]:
    """Return one graph of a report before and after, checkpointed blocks' graphs where they are called.

    Args:
        report: From ``explain`` or ``reports``.
        number: Which of its graphs.
    """
    pair = report.graphs[number]
    before, after = subgraphs(pair.before), subgraphs(pair.after)

    def stretches(name: str) -> Iterator[Stretch]:
        regions = [r for r in report.chunked if r.number == number and r.graph == name and r.nodes]
        rows = aligned_rows(before[name].graph, after[name].graph, regions)
        found = _stretches(rows, name)
        layers = [s.layer for s in found if s.layer]
        if name and len(layers) < 2:
            found = [Stretch(tuple(rows), layers[0] if layers else _common_path(rows), name)]
        for stretch in found:
            start = 0
            for i, row in enumerate(stretch.rows, 1):
                child = called_block(row.node)
                if child:
                    yield replace(stretch, rows=stretch.rows[start:i])
                    yield from stretches(f"{name}.{child}" if name else child)
                    start = i
            if stretch.rows[start:]:
                yield replace(stretch, rows=stretch.rows[start:])

    return _blocks([*stretches("")])


def repeated_layers(graph: fx.Graph) -> Iterator[list[tuple[tuple[fx.Node, ...], tuple[str, ...]]]]:
    """Yield every sequence of equal layers of one graph: for each repeat, its nodes and the layers' paths."""
    for block in _blocks(_stretches([Row(n, n, kept=True) for n in graph.nodes], "")):
        if len(block.repeats) > 1:
            yield [
                (tuple(r.node for s in stretches for r in s.rows), tuple(s.layer for s in stretches if s.layer))
                for stretches in block.repeats
            ]


def aligned_rows(before: fx.Graph, after: fx.Graph, regions: Iterable[RegionReport] = ()) -> list[Row]:
    """Return two graphs as rows, a region's removed nodes beside its added ones.

    A node that changed its place among those that stay is shown twice: where it was and where it is.

    Args:
        before: The graph as captured.
        after: The graph after the passes, or the same one.
        regions: The rewritten regions of the graph.
    """
    if after is before:
        return [Row(n, n, kept=True) for n in before.nodes]
    by_key = {r.nodes[0]: r for r in regions}
    members = {n: r for r in by_key.values() for n in r.nodes}
    place = {n.name: i for i, n in enumerate(before.nodes)}
    old, new = list(before.nodes), list(after.nodes)
    kept = [(place[n.meta["mst_origin"]], i) for i, n in enumerate(new) if n.meta.get("mst_origin") in place]
    rows: list[Row] = []
    left = right = 0
    for i, j in [*_increasing(kept), (len(old), len(new))]:
        gone = [Row(n, None, members.get(n.name)) for n in old[left:i]]
        come = [Row(None, n, by_key.get(n.meta.get("mst_region", ""))) for n in new[right:j]]
        rows += _side_by_side(gone, come)
        if i < len(old):
            rows.append(Row(old[i], new[j], kept=True))
        left, right = i + 1, j + 1
    return rows


def _increasing(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the longest subsequence whose first numbers increase."""
    tails: list[int] = []
    ends: list[int] = []
    previous: list[int] = []
    for i, (value, _) in enumerate(pairs):
        at = bisect.bisect_left(tails, value)
        previous.append(ends[at - 1] if at else -1)
        if at == len(tails):
            tails.append(value)
            ends.append(i)
        else:
            tails[at], ends[at] = value, i
    found: list[tuple[int, int]] = []
    at = ends[-1] if ends else -1
    while at >= 0:
        found.append(pairs[at])
        at = previous[at]
    return found[::-1]


def _side_by_side(gone: list[Row], come: list[Row]) -> list[Row]:
    """Put what one region removed beside what it added."""
    rows: list[Row] = []
    for key in dict.fromkeys(id(r.region) for r in [*gone, *come]):
        left = [r for r in gone if id(r.region) == key]
        right = [r for r in come if id(r.region) == key]
        for a, b in itertools.zip_longest(left, right):
            rows.append(Row(a.before if a else None, b.after if b else None, (a or b).region))
    return rows


def _stretches(rows: Sequence[Row], graph: str) -> list[Stretch]:
    """Split rows at the borders of layers; rows without a module belong to the layer around them."""
    layers = [_layer(r.path) if r.node.op not in ("placeholder", "output") else "" for r in rows]
    last: dict[str, int] = {name: i for i, name in enumerate(layers) if name}
    inside = ""
    for i, name in enumerate(layers):
        inside = name or (inside if last.get(inside, -1) > i else "")
        layers[i] = inside
    found: list[Stretch] = []
    at = 0
    for name, group in itertools.groupby(layers):
        count = len(list(group))
        found.append(Stretch(tuple(rows[at : at + count]), name, graph))
        at += count
    return _with_tails(found)


def _with_tails(stretches: list[Stretch]) -> list[Stretch]:
    """Cut what follows the last layer where it begins as what follows the layers before it."""
    found = stretches[:2]
    for s in stretches[2:]:
        model = found[-2]
        length = len(model.rows)
        head = Stretch(s.rows[:length], "", s.graph)
        if not s.layer and not model.layer and length < len(s.rows) and _shape(head) == _shape(model):
            found += [head, Stretch(s.rows[length:], "", s.graph)]
        else:
            found.append(s)
    return found


def _layer(path: str) -> str:
    match = re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", path)
    return match.group() if match else ""


def _common_path(rows: Sequence[Row]) -> str:
    paths = [r.path.split(".") for r in rows if r.path and r.node.op != "placeholder"]
    common = [names[0] for names in zip(*paths, strict=False) if len(set(names)) == 1]
    return ".".join(common)


def _blocks(stretches: list[Stretch]) -> list[Block]:
    """Fold what repeats; what does not, and stands together, is one block."""
    shapes = [_shape(s) for s in stretches]
    blocks: list[Block] = []
    single: list[Stretch] = []
    at = 0
    while at < len(stretches):
        period, count = _repetition(shapes[at:])
        here = stretches[at : at + period * count]
        at += period * count
        if count == 1:
            single += here
            continue
        if single:
            blocks.append(Block((tuple(single),)))
            single = []
        blocks.append(Block(tuple(tuple(here[i : i + period]) for i in range(0, len(here), period))))
    return [*blocks, Block((tuple(single),))] if single else blocks


def _repetition(shapes: Sequence[object]) -> tuple[int, int]:
    """Return the period and the number of repeats that cover most of the beginning."""
    best = (1, 1)
    for period in range(1, min(LONGEST_PERIOD, len(shapes) // 2) + 1):
        count = 1
        while shapes[count * period : (count + 1) * period] == shapes[:period]:
            count += 1
        if count > 1 and period * count > best[0] * best[1]:
            best = (period, count)
    return best


def _shape(stretch: Stretch) -> object:
    """Return what is equal for equal stretches, whatever their nodes are called."""
    sides = []
    for side in ("before", "after"):
        nodes = [getattr(r, side) for r in stretch.rows]
        name_of = ordinals([n for n in nodes if n is not None])
        sides.append(tuple(node_line(n, name_of) if n is not None else "" for n in nodes))
    return (bool(stretch.layer), bool(stretch.graph), *sides, tuple(r.source for r in stretch.rows))
