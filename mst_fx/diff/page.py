"""A report as one self-contained page: regions, live bytes, both graphs side by side, a search box."""

from __future__ import annotations

import importlib.resources
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jinja2
from markupsafe import Markup
from torch import fx

from mst_fx.diff.graph_diff import fold_paths, short_name
from mst_fx.diff.plot import BOX, NoMatplotlibError, Point, forward_share, points, timeline_svg
from mst_fx.diff.render import (
    SAVED_COLUMNS,
    advice_lines,
    folded_regions,
    graph_tokens,
    headline,
    memory,
    plan_text,
    region_cells,
    region_detail,
    saved_rows,
    short_source,
)
from mst_fx.diff.side_by_side import Block, Row, Stretch, aligned_blocks
from mst_fx.plan import format_bytes
from mst_fx.printing import SHORT, node_line
from mst_fx.report import RegionReport, Report

COLUMNS = ("status", "kind", "where", "tokens", "chunks", "wide bytes")
MOST_SAVED = 20
"""Rows of values kept for the backward that are shown."""


def write_page(report: Report, path: str | pathlib.Path) -> None:
    """Write a report as a page.

    Args:
        report: From ``explain`` or ``reports``.
        path: An HTML file; one that is there is replaced.

    Raises:
        OSError: If the file can't be written; before anything else is done.
    """
    check_writable(path)
    pathlib.Path(path).write_text(page_text(report), encoding="utf-8")


def check_writable(path: str | pathlib.Path) -> None:
    """Raise if a page can't be written to a path; leave nothing behind.

    Raises:
        OSError: Of the kind that fits, naming the path.
    """
    path = pathlib.Path(path)
    try:
        is_new = not path.exists()
        with path.open("ab"):
            pass
        if is_new:
            path.unlink()
    except OSError as e:
        raise OSError(e.errno, f"the page can't be written: {e.strerror}", str(path)) from e


def page_text(report: Report) -> str:
    """Return a report as a page."""
    data = _Data(report)
    folder = importlib.resources.files(__package__) / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text("utf-8")),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    timelines, why_none = memory(report)
    figures = [_figure(data, number, *pair, graph_tokens(report, number)) for number, pair in enumerate(timelines)]
    text = environment.get_template("report.html.j2").render(
        headline=headline(report),
        columns=COLUMNS,
        saved_columns=SAVED_COLUMNS,
        groups=[_group(data, g) for g in folded_regions(report.regions)],
        notes=[short_source(n) for n in report.notes],
        advice=advice_lines(report),
        figures=figures,
        why_none=why_none,
        data={**data.encode(), "timelines": [f["data"] for f in figures]},
        style=Markup((folder / "report.css").read_text("utf-8")),
        script=Markup((folder / "report.js").read_text("utf-8")),
    )
    # A name may hold half a surrogate pair, which UTF-8 has no place for.
    return text.encode("utf-8", errors="replace").decode("utf-8")


class _Data:
    """What the page's script reads: graphs, regions and bodies, every text once."""

    def __init__(self, report: Report) -> None:
        self._texts: dict[str, int] = {}
        self._regions: list[dict[str, Any]] = []
        self._region_index: dict[int, int] = {}
        self._bodies = report.bodies
        bodies = {b.name: i for i, b in enumerate(report.bodies)}
        for region in report.chunked:
            self._region_index[id(region)] = len(self._regions)
            self._regions.append(_region(region, bodies.get(region.body, -1)))
        self._graphs = [self._graph(report, number) for number in range(report.num_graphs)]

    def text(self, text: str) -> int:
        """Return the number of a text."""
        return self._texts.setdefault(text, len(self._texts))

    def region(self, region: RegionReport | None) -> int:
        """Return the number of a chunked region, -1 for any other."""
        return self._region_index.get(id(region), -1)

    def encode(self) -> dict[str, Any]:
        """Return everything as plain data."""
        bodies = [{"name": b.name[:SHORT], "forward": b.forward, "backward": b.backward} for b in self._bodies]
        return {"texts": list(self._texts), "regions": self._regions, "bodies": bodies, "graphs": self._graphs}

    def _graph(self, report: Report, number: int) -> dict[str, Any]:
        pair = report.graphs[number]
        blocks = [self._block(b) for b in aligned_blocks(report, number)]
        return {"same": pair.before is pair.after, "blocks": blocks}

    def _block(self, block: Block) -> dict[str, Any]:
        items = [
            {"title": _title(stretches), "rows": [self._row(r, s) for s in stretches for r in s.rows]}
            for stretches in block.repeats
        ]
        title = ""
        if len(items) > 1:
            title = " ".join(filter(None, [block.places, f"({block.graphs})" if block.graphs else ""]))
        return {"title": title or items[0]["title"], "items": items}

    def _row(self, row: Row, stretch: Stretch) -> list[int]:
        """Return texts before and after (-1: none), source, module, region, and whether both are the same node."""
        before, after = (self.text(_line(n, stretch)) if n else -1 for n in (row.before, row.after))
        source, path = self.text(short_source(row.source)), self.text(row.path)
        return [before, after, source, path, self.region(row.region), int(row.kept)]


def _line(node: fx.Node, stretch: Stretch) -> str:
    prefix = f"{stretch.layer}." if stretch.layer else ""
    return node_line(node, lambda n: short_name(n).removeprefix(prefix))


def _title(stretches: Iterable[Stretch]) -> str:
    """Name the layers and the checkpointed blocks some stretches are of."""
    stretches = list(stretches)
    layers = fold_paths([s.layer for s in stretches])
    graphs = ", ".join(dict.fromkeys(s.graph for s in stretches if s.graph))
    return " ".join(filter(None, [layers, f"({graphs})" if graphs and layers else graphs]))


def _region(region: RegionReport, body: int) -> dict[str, Any]:
    return {
        "title": " ".join(filter(None, [region.kind, region.path])),
        "plan": plan_text(region),
        "reason": short_source(region.reason),
        "source": short_source(region.source),
        "body": body,
    }


def _group(data: _Data, group: list[RegionReport]) -> dict[str, Any]:
    return {
        "cells": list(zip(COLUMNS, region_cells(group), strict=True)),
        "reason": region_detail(group),
        "status": group[0].status,
        "region": data.region(group[0]),
    }


def _figure(data: _Data, number: int, before: Any, after: Any, tokens: int) -> dict[str, Any]:
    split = forward_share(before.moments)
    series = [points(t.moments, split) for t in (before, after)]
    why_none, svg = "", ""
    try:
        svg = timeline_svg(series[0], series[1], split, f"timeline{number}")
    except NoMatplotlibError as e:
        why_none = str(e)
    figures = [
        (label, format_bytes(a), format_bytes(b), detail)
        for label, a, b, detail in (
            ("peak", before.peak_bytes, after.peak_bytes, _at(after)),
            ("saved for the backward", before.saved_bytes, after.saved_bytes, ""),
            ("largest value", before.largest_bytes, after.largest_bytes, after.largest),
        )
    ]
    saved = saved_rows(after, tokens)
    return {
        "svg": Markup(svg),
        "why_none": why_none,
        "figures": figures,
        "saved": saved[:MOST_SAVED],
        "more_saved": len(saved) - MOST_SAVED,
        "data": {"box": BOX, "before": _encode(data, series[0]), "after": _encode(data, series[1])},
    }


def _at(timeline: Any) -> str:
    return f"{timeline.peak.phase}, {timeline.peak.name}" if timeline.peak else ""


def _encode(data: _Data, found: Sequence[Point]) -> list[list[Any]]:
    """Return per point: place, bytes as number and text, phase, node, source, module."""
    return [
        [
            round(p.x, 5), m.live_bytes, format_bytes(m.live_bytes), m.phase,
            data.text(m.text or m.name), data.text(short_source(m.source or "")), data.text(m.path or ""),
        ]
        for p in found
        for m in [p.moment]
    ]  # fmt: skip
