"""Live bytes of a graph of many equal layers, from the same graph with few of them.

    timelines of 3 layers and of 4 -> what one layer more adds -> the timeline of all.

Tracing forward and backward costs as much as there are layers, and in a model of 80 nearly all of it is spent on
what is known. Where a layer more does not add the same everywhere, or layers differ, all of them are traced.

Terms:
    unit: the nodes of one layer, or of several that take turns (local and global attention).
    slot: a value a unit reads from outside, by the order of reading.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from mst_fx.diff import liveness
from mst_fx.diff.graph_diff import ordinals
from mst_fx.diff.liveness import Saved, Timeline
from mst_fx.diff.side_by_side import repeated_layers
from mst_fx.diff.steps import Moment
from mst_fx.pipeline import copy_graph
from mst_fx.printing import node_line, value_text

log = logging.getLogger(__name__)

FEW = {1: 3, 2: 2, 3: 2, 4: 2}
"""Layers per unit -> units of the smaller of the two traced graphs: a first, a last, and one that is neither."""
WORTHWHILE = 0.75
"""Layers in the two small graphs, as a share of all of them, up to which they are traced instead."""


@dataclass(frozen=True)
class Unit:
    """One of several equal sequences of nodes."""

    nodes: tuple[fx.Node, ...]
    layers: tuple[str, ...]
    """Paths of its layers, e.g. ``("model.layers.3",)``."""


def timeline(module: fx.GraphModule, chunked: bool, worthwhile: float = WORTHWHILE) -> Timeline:
    """Estimate the live bytes of forward and backward of a graph; see ``liveness.timeline``.

    Args:
        module: A Dynamo graph, as in ``GraphPair``; left as it is.
        chunked: Whether regions of it were chunked.
        worthwhile: Share of the layers up to which few are traced instead of all.
    """
    for repeats in repeated_layers(module.graph):
        for together, few in FEW.items():
            units = _units(repeats, together)
            if 2 * few + 1 > worthwhile * len(units) or len(units) < few + 2:
                break
            smaller, larger = (with_fewer(module, units, keep) for keep in (few, few + 1))
            if smaller is None or larger is None:
                continue
            lines = (timeline(m, chunked, worthwhile) for m in (smaller, larger))
            found = extend(*lines, few, [u.layers for u in units])
            if found is not None:
                return found
        log.debug("mst: %d layers like %s are traced one by one", len(repeats), repeats[0][1])
    return liveness.timeline(module, chunked)


def _units(repeats: Sequence[tuple[tuple[fx.Node, ...], tuple[str, ...]]], together: int) -> list[Unit]:
    """Take so many repeats as one unit; what is left at the end belongs to what follows."""
    starts = range(0, len(repeats) // together * together, together)
    joined = (list(zip(*repeats[i : i + together], strict=True)) for i in starts)
    return [Unit(tuple(itertools.chain(*nodes)), tuple(itertools.chain(*layers))) for nodes, layers in joined]


# -- fewer layers ------------------------------------------------------------------------------------


def with_fewer(module: fx.GraphModule, units: Sequence[Unit], keep: int) -> fx.GraphModule | None:
    """Return a copy of a graph with the first ``keep`` of its units, None if what is left would not fit together."""
    returned = _returned(units)
    if returned is None or not _joined_alike(module, units):
        return None
    copy = copy_graph(module)
    copies = {n.meta["mst_origin"]: n for n in copy.graph.nodes}
    dropped = {copies[n.name] for unit in units[keep:] for n in unit.nodes}
    stands_for = {
        copies[last.name]: copies[kept.name] for last, kept in zip(units[-1].nodes, units[keep - 1].nodes, strict=True)
    }
    every = {copies[unit.nodes[p].name] for unit in units[keep:] for p in returned}
    output = next(n for n in copy.graph.nodes if n.op == "output")
    output.args = (tuple(v for v in output.args[0] if v not in every), *output.args[1:])
    for last, kept in stands_for.items():
        last.replace_all_uses_with(kept, delete_user_cb=lambda user: user not in dropped)
    weights = {n for node in dropped for n in node.all_input_nodes if n.op in ("placeholder", "get_attr")}
    for node in [*reversed(copy.graph.nodes)]:
        if node in dropped or (node in weights and not node.users):
            copy.graph.erase_node(node)
    return copy


def _returned(units: Sequence[Unit]) -> set[int] | None:
    """Return the positions of the nodes that every unit returns from the graph; None where units differ in it.

    None too if a unit is read by another than the next one.
    """
    place = {n: i for i, unit in enumerate(units) for n in unit.nodes}
    found: list[set[int]] = []
    for i, unit in enumerate(units):
        found.append({p for p, n in enumerate(unit.nodes) if any(u.op == "output" for u in n.users)})
        readers = {u for n in unit.nodes for u in n.users if u.op != "output"}
        if i < len(units) - 1 and any(place.get(u) not in (i, i + 1) for u in readers):
            return None
    same = all(f == found[0] for f in found[:-1]) and found[0] <= found[-1]
    return found[0] if same else None


def _joined_alike(module: fx.GraphModule, units: Sequence[Unit]) -> bool:
    """Whether units are equal, and each reads weights of its own, what all read, or the same of the one before."""
    first, *others = (_form(module, u.nodes, _slots(u)) for u in units)
    if any(form != first for form in others):
        return False
    place = {n: (i, p) for i, unit in enumerate(units) for p, n in enumerate(unit.nodes)}
    for values in zip(*(_slots(u) for u in units), strict=True):
        is_shared = len(set(values)) == 1
        are_weights = all(v.op in ("placeholder", "get_attr") for v in values)
        links = {(i - place[v][0], place[v][1]) if v in place else None for i, v in enumerate(values[1:], 1)}
        is_chain = len(links) == 1 and None not in links and next(iter(links))[0] == 1  # pyright: ignore
        if not (is_shared or are_weights or is_chain):
            return False
    return True


def _slots(unit: Unit) -> list[fx.Node]:
    own = set(unit.nodes)
    return list(dict.fromkeys(i for n in unit.nodes for i in n.all_input_nodes if i not in own))


def _form(module: fx.GraphModule, nodes: Sequence[fx.Node], outside: Sequence[fx.Node] = ()) -> tuple[Any, ...]:
    """Return what is equal for equal units."""
    name_of = ordinals(list(nodes))
    inner = [getattr(module, str(n.target), None) for n in (*nodes, *outside) if n.op == "get_attr"]
    return (
        *(node_line(n, name_of) for n in nodes),
        *(value_text(n) for n in outside),
        *(_form(m, list(m.graph.nodes)) for m in inner if isinstance(m, fx.GraphModule)),
    )


# -- more layers -------------------------------------------------------------------------------------


def extend(smaller: Timeline, larger: Timeline, few: int, layers: Sequence[tuple[str, ...]]) -> Timeline | None:
    """Return the timeline of all units from those of few of them.

    Args:
        smaller: Of the first ``few`` units.
        larger: Of one more.
        few: How many the smaller one has.
        layers: The layers' paths of every unit.

    Returns:
        None where the larger one is not the smaller one with something put in, each part of what both have shifted
        by a number of bytes of its own.
    """
    extra = len(layers) - few - 1
    moments: list[Moment] = []
    for phase in ("forward", "backward"):
        short, long = ([m for m in t.moments if m.phase == phase] for t in (smaller, larger))
        parts = _parts(short, long)
        if parts is None:
            return None
        moments += _repeated(long, parts, extra, _Names(layers, phase == "backward"))
    peak = max(moments, key=lambda m: m.live_bytes, default=None)
    saved = _more_saved(smaller.saved, larger.saved, few, extra, _Names(layers, False))
    if saved is None:
        return None
    return Timeline(
        tuple(moments), saved, peak.live_bytes if peak else 0, peak, larger.largest_bytes, larger.largest
    )  # fmt: skip


def _more_saved(
    smaller: Sequence[Saved], larger: Sequence[Saved], few: int, extra: int, names: _Names
) -> tuple[Saved, ...] | None:
    """Return what all units keep; those put in are named after the last but one, which is like them."""
    before = Counter(s.kind for s in smaller)
    after = Counter(s.kind for s in larger)
    if before - after:
        return None
    found: list[Saved] = []
    for s in larger:
        found.append(replace(s, path=names.moved(s.path, extra if names.unit(s.path) == few else 0)))
    for kind, count in (after - before).items():
        alike = [s for s in larger if s.kind == kind]
        own = [s for s in alike if names.unit(s.path) == few - 1]
        if len(own) == count:
            found += [replace(s, path=names.moved(s.path, r + 1)) for r in range(extra) for s in own]
        else:
            found += alike[-count:] * extra
    return tuple(found)


@dataclass(frozen=True)
class Part:
    """Consecutive moments of the larger timeline: what both have, or what one unit more put in."""

    start: int
    stop: int
    is_new: bool
    grown: int
    """Bytes that a unit more adds; for a new part, those added before it."""


def _parts(short: Sequence[Moment], long: Sequence[Moment]) -> list[Part] | None:
    """Split ``long`` into what ``short`` has too and what was put in between."""
    parts: list[Part] = []
    at = shift = 0
    while at < len(short):
        stop = at + _length(short[at:], long[at + shift :])
        if stop == at:
            return None
        grown = long[at + shift].live_bytes - short[at].live_bytes
        parts.append(Part(at + shift, stop + shift, False, grown))
        missing = len(long) - len(short) - shift
        if stop == len(short) or not missing:
            at = stop
            continue
        # Something was put in here, or earlier where it looks the same: take the length that fits longest, and the
        # place in the middle of all that do, farthest from the first and the last layer's peculiarities.
        ahead = {n: _length(short[stop:], long[stop + shift + n :]) for n in range(1, missing + 1)}
        length = max(ahead, key=lambda n: ahead[n])
        if not ahead[length]:
            return None
        behind = short[at : stop + 1], long[at + shift + length : stop + shift + length + 1]
        place = stop - _length(*(side[::-1] for side in behind)) // 2
        if place == at:
            return None
        parts[-1] = replace(parts[-1], stop=place + shift)
        parts.append(Part(place + shift, place + shift + length, True, grown))
        at, shift = place, shift + length
    return parts if len(long) == len(short) + shift else None


def _length(short: Sequence[Moment], long: Sequence[Moment]) -> int:
    """Return how many moments are of the same kind and differ by the same bytes."""
    for i, (a, b) in enumerate(zip(short, long, strict=False)):
        if _kind(a) != _kind(b) or b.live_bytes - a.live_bytes != long[0].live_bytes - short[0].live_bytes:
            return i
    return min(len(short), len(long))


def _kind(moment: Moment) -> tuple[str, str]:
    """Return what is equal for equal steps of different layers: result and op, and where they come from.

    A source without a line is the module's path, in which a layer has its number.
    """
    found = re.search(r": (.* = [\w.]+)\(", moment.text)
    return found.group(1) if found else "", re.sub(r"\.\d+\b", ".#", moment.source)


def _repeated(long: Sequence[Moment], parts: Sequence[Part], extra: int, names: _Names) -> Iterator[Moment]:
    """Yield the moments of all units: new parts ``extra`` times more, everything moved by what they add."""
    for i, part in enumerate(parts):
        moments = long[part.start : part.stop]
        if not part.is_new:
            news = [p for p in parts[max(0, i - 1) : i + 2] if p.is_new]
            for at, m in enumerate(moments, part.start):
                near = min(news, key=lambda p: min(abs(at - p.start), abs(at - p.stop)), default=None)
                path = names.outside(m.path, [n.path for n in long[near.start : near.stop]], extra) if near else m.path
                yield replace(m, path=path, live_bytes=m.live_bytes + extra * part.grown)
            continue
        step = parts[i + 1].grown - part.grown
        for r in range(extra + 1):
            for m in moments:
                live = m.live_bytes + extra * part.grown + r * step
                yield replace(m, path=names.inside(m.path, r, extra), live_bytes=live)


class _Names:
    """Which layer a moment is in when there are more of them."""

    def __init__(self, layers: Sequence[tuple[str, ...]], descending: bool) -> None:
        self.layers, self.descending = layers, descending
        self._known = {path: (i, p) for i, paths in enumerate(layers) for p, path in enumerate(paths)}

    def inside(self, path: str, repeat: int, extra: int) -> str:
        """Rename what was put in, the ``repeat``-th time it is."""
        return self.moved(path, extra - repeat if self.descending else repeat)

    def outside(self, path: str, new: Sequence[str], extra: int) -> str:
        """Rename what is before or after something new, whose steps have the paths ``new`` (some have none)."""
        here = self.unit(path)
        there = next((unit for p in new if (unit := self.unit(p)) is not None), None)
        if here is None or there is None:
            return path
        is_behind = here >= there if self.descending else here > there
        return self.moved(path, extra if is_behind else 0)

    def _split(self, path: str) -> tuple[tuple[int, int] | None, list[str]]:
        names = path.split(".")
        for count in range(len(names), 0, -1):
            if (found := self._known.get(".".join(names[:count]))) is not None:
                return found, names[count:]
        return None, names

    def unit(self, path: str) -> int | None:
        """Return the number of the unit a module is in."""
        found, _ = self._split(path)
        return found[0] if found else None

    def moved(self, path: str, by: int) -> str:
        """Return the name of the same module so many units on."""
        found, rest = self._split(path)
        return path if found is None else ".".join([self.layers[found[0] + by][found[1]], *rest])
