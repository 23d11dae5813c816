"""What the backend did to a graph and why: frozen records, readable by people and machines."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import fx

    from mst_fx.diff.liveness import Timeline


@dataclass(frozen=True)
class Mismatch:
    """Why something was left as it was; falsy, so ``if not match`` reads well."""

    reason: str
    source: str = ""

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True)
class RegionReport:
    """One region considered. Bytes are estimates from shapes."""

    kind: Literal["mlp", "loss"]
    source: str
    """``file:line`` of the user's code."""
    tokens: int | str
    """T, or an expression such as "s0" where it is symbolic."""
    chunk_tokens: int | None
    num_chunks: int | None
    bytes_before: int
    bytes_after: int
    status: Literal["chunked", "skipped"]
    reason: str
    number: int = 0
    """Which of the report's graphs it is in."""
    graph: str = ""
    """Name of the checkpointed block's graph the region is in, "" for the outermost."""
    path: str = ""
    """Module that holds it, e.g. ``model.layers.0.mlp``; "" where no module is known."""
    nodes: tuple[str, ...] = ()
    """Its nodes in the graph before, first amplifier first."""
    body: str = ""
    """Name of the chunk body that replaces it."""

    @property
    def is_attention(self) -> bool:
        """Whether it is no MLP but projections into attention, which never are chunked."""
        found = re.search(r"is attention: it mixes tokens|\(attention\)", self.reason)
        return self.status == "skipped" and found is not None


@dataclass(frozen=True, eq=False)
class GraphPair:
    """One graph before and after the passes; the same one where nothing was chunked.

    Nodes of ``after`` carry in ``meta``: ``mst_origin``, the name of the node of ``before`` they are, absent on
    new ones; ``mst_region``, on new ones, the first name in ``RegionReport.nodes`` of the region they stand for.
    Graphs of checkpointed blocks are submodules of both. Fake values are in ``meta["example_value"]``.
    """

    before: fx.GraphModule
    after: fx.GraphModule


@dataclass(frozen=True)
class BodyCode:
    """A chunk body as readable code. ``backward`` is "" where nothing trains."""

    name: str
    forward: str
    backward: str


@dataclass(frozen=True)
class Report:
    """The record of one compilation, or of several graphs joined by ``explain``."""

    regions: tuple[RegionReport, ...] = ()
    notes: tuple[str, ...] = ()
    """What a user should know about the graph as a whole, e.g. that the loss is in another one."""
    bodies: tuple[BodyCode, ...] = ()
    """Every chunk body of the graphs, once."""
    graphs: tuple[GraphPair, ...] = ()
    """What was compiled, graph by graph."""

    @property
    def num_graphs(self) -> int:
        """How many graphs were compiled."""
        return len(self.graphs)

    @property
    def chunked(self) -> tuple[RegionReport, ...]:
        """The regions that were rewritten."""
        return tuple(r for r in self.regions if r.status == "chunked")

    def __str__(self) -> str:
        from mst_fx.diff.render import explain_text

        return explain_text(self)

    def timelines(self) -> tuple[tuple[Timeline, Timeline], ...]:
        """Return the estimated live bytes of every graph before and after; computed once.

        Where nothing was chunked in a graph, both are one object.
        """
        if self not in _TIMELINES:
            from mst_fx.diff.repeats import timeline

            found = []
            for pair in self.graphs:
                before = timeline(pair.before, False)
                found.append((before, before if pair.after is pair.before else timeline(pair.after, True)))
            _TIMELINES[self] = tuple(found)
        return _TIMELINES[self]

    def diff(self, backward: bool = False, colour: bool = False, estimate: bool = True) -> str:
        """Return the text diff of the graphs before and after, chunk bodies under what they replace.

        Args:
            backward: Print the backward of every body too.
            colour: Use terminal colours.
            estimate: Say what memory a step takes before and after, for which the graphs are traced once more.
        """
        from mst_fx.diff.render import text_diff

        return text_diff(self, backward, colour, estimate)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data that ``json`` can write."""
        return {
            "regions": [dataclasses.asdict(r) for r in self.regions],
            "notes": list(self.notes),
            "num_graphs": self.num_graphs,
        }

    def to_html(self, path: str | pathlib.Path) -> None:
        """Write the report as one self-contained page: regions, live bytes, both graphs side by side.

        Args:
            path: An HTML file; one that is there is replaced.

        Raises:
            OSError: If the file can't be written; before anything else is done.
        """
        from mst_fx.diff.page import write_page

        write_page(self, path)


_TIMELINES: weakref.WeakKeyDictionary[Report, tuple[tuple[Timeline, Timeline], ...]] = weakref.WeakKeyDictionary()


def join_reports(reports: list[Report]) -> Report:
    """Join the reports of several graphs of one function into one."""
    offsets = [sum(rep.num_graphs for rep in reports[:i]) for i in range(len(reports))]
    return Report(
        regions=tuple(
            dataclasses.replace(r, number=r.number + offset)
            for rep, offset in zip(reports, offsets, strict=True)
            for r in rep.regions
        ),
        notes=tuple(dict.fromkeys(n for rep in reports for n in rep.notes)),
        bodies=tuple({b.name: b for rep in reports for b in rep.bodies}.values()),
        graphs=tuple(g for rep in reports for g in rep.graphs),
    )
