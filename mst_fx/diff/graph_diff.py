"""Before and after: what the passes took away and what they put in, equal changes folded into one.

Nodes are matched by descent, not by name: every node of the graph after knows which node of the graph before it
is, so what was left alone makes no noise, however names shifted.

Terms:
    change: what happened to one region: lines removed, lines added, the body that replaces them.
    hunk: equal changes, e.g. of 32 layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx

from mst_fx.graph import CHECKPOINT, source_of
from mst_fx.printing import inline, node_line, parameter_name
from mst_fx.report import BodyCode, GraphPair, RegionReport, Report


@dataclass(frozen=True)
class Line:
    """One node as text, and the ``file:line`` it comes from."""

    text: str
    source: str = ""


@dataclass(frozen=True)
class Hunk:
    """Equal changes."""

    regions: tuple[RegionReport, ...]
    """Empty for nodes moved by a pass without a region of their own."""
    removed: tuple[Line, ...]
    added: tuple[Line, ...]
    body: BodyCode | None

    @property
    def places(self) -> str:
        """Where the changes are, e.g. ``model.layers.{0-31}.mlp``."""
        return fold_paths([r.path for r in self.regions])


def hunks(report: Report) -> list[Hunk]:
    """Return the distinct changes of a report, in the order of its regions; what passes merely moved comes last."""
    found: dict[object, list[Hunk]] = {}
    for number, pair in enumerate(report.graphs):
        for key, hunk in _changes(report, number, pair):
            found.setdefault(key, []).append(hunk)
    folded = [
        Hunk(tuple(r for h in same for r in h.regions), same[0].removed, same[0].added, same[0].body)
        for same in found.values()
    ]
    order = {id(r): i for i, r in enumerate(report.regions)}
    return sorted(folded, key=lambda h: order[id(h.regions[0])] if h.regions else len(order))


def _changes(report: Report, number: int, pair: GraphPair) -> Iterator[tuple[object, Hunk]]:
    if pair.after is pair.before:
        return
    bodies = {b.name: b for b in report.bodies}
    after = subgraphs(pair.after)
    for name, before in subgraphs(pair.before).items():
        regions = {r.nodes[0]: r for r in report.chunked if r.number == number and r.graph == name and r.nodes}
        members = {n: key for key, r in regions.items() for n in r.nodes}
        kept = {n.meta["mst_origin"] for n in after[name].graph.nodes if "mst_origin" in n.meta}
        removed: dict[str, list[fx.Node]] = {}
        for node in before.graph.nodes:
            if node.name not in kept and node.op not in ("placeholder", "output", "get_attr"):
                removed.setdefault(members.get(node.name, ""), []).append(node)
        added: dict[str, list[fx.Node]] = {}
        for node in after[name].graph.nodes:
            if "mst_origin" not in node.meta:
                added.setdefault(node.meta.get("mst_region", ""), []).append(node)
        for key in dict.fromkeys([*removed, *added]):
            region = regions.get(key)
            gone, new = removed.get(key, []), added.get(key, [])
            hunk = Hunk(
                (region,) if region else (), _lines(gone, region), _lines(new, region),
                bodies.get(region.body) if region else None,
            )  # fmt: skip
            name_of = ordinals([*gone, *new])
            shape = tuple(node_line(n, name_of) for n in [*gone, *new])
            plan = (region.kind, region.source, region.tokens, region.chunk_tokens, region.reason) if region else ()
            yield (shape, plan, region.body if region else name), hunk


def subgraphs(module: fx.GraphModule, name: str = "") -> dict[str, fx.GraphModule]:
    """Return a graph and those of its checkpointed blocks by path, the outermost under ""."""
    found = {name: module}
    for child, inner in module.named_children():
        if isinstance(inner, fx.GraphModule):
            found |= subgraphs(inner, f"{name}.{child}" if name else child)
    return found


def _nodes_in_order(module: fx.GraphModule, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield (graph, node) by name as they run: a checkpointed block's nodes where the block is called."""
    inner = dict(module.named_children())
    for node in module.graph.nodes:
        yield name, node.name
        child = called_block(node)
        if child in inner:
            yield from _nodes_in_order(inner[child], f"{name}.{child}" if name else child)  # pyright: ignore


def in_graph_order(report: Report) -> list[RegionReport]:
    """Return the chunked regions in the order in which the model runs them."""
    places = {
        (number, *place): i
        for number, pair in enumerate(report.graphs)
        for i, place in enumerate(_nodes_in_order(pair.before))
    }
    return sorted(report.chunked, key=lambda r: (r.number, places.get((r.number, r.graph, *r.nodes[:1]), len(places))))


def called_block(node: fx.Node) -> str:
    """Return the name of the checkpointed block's graph that a node calls, "" for any other node."""
    return str(node.args[0].target) if node.target is CHECKPOINT else ""  # pyright: ignore


def fold_paths(paths: list[str]) -> str:
    """Fold paths that differ in one number: ``layers.0.mlp, layers.1.mlp`` -> ``layers.{0-1}.mlp``."""
    named = [p for p in dict.fromkeys(paths) if p]
    groups: dict[tuple[str, str], list[int]] = {}
    for path in named:
        match = re.search(r"(?:(?<=\.)|^)\d+(?=\.|$)", path)
        if match:
            groups.setdefault((path[: match.start()], path[match.end() :]), []).append(int(match.group()))
        else:
            groups[path, ""] = []
    return ", ".join(f"{a}{_ranges(numbers)}{b}" for (a, b), numbers in groups.items())


def _ranges(numbers: list[int]) -> str:
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"


def _lines(nodes: list[fx.Node], region: RegionReport | None) -> tuple[Line, ...]:
    shown, name_of = inline(nodes, lambda n: short_name(n, region))
    return tuple(Line(node_line(n, name_of), source_of(n)) for n in shown)


def short_name(node: fx.Node, region: RegionReport | None = None) -> str:
    """Return a node's name; parameters by their path, relative to the region's module."""
    if node.op not in ("placeholder", "get_attr"):
        return node.name
    name = parameter_name(str(node.target))
    return name.removeprefix(f"{region.path}.") if region and region.path else name


def ordinals(nodes: list[fx.Node]) -> Callable[[fx.Node], str]:
    """Name nodes by their place in the change and what is outside by its place among what is read."""
    names = {n: f"%{i}" for i, n in enumerate(nodes)}
    outside: dict[fx.Node, str] = {}
    return lambda n: names.get(n) or outside.setdefault(n, f"in{len(outside)}")
