"""What the backend did to a graph and why: frozen records, readable by people and machines."""

from __future__ import annotations

import dataclasses
import html
import json
import pathlib
from dataclasses import dataclass
from typing import Any, Literal


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


@dataclass(frozen=True)
class Report:
    """The record of one compilation, or of several graphs joined by ``explain``."""

    regions: tuple[RegionReport, ...] = ()
    notes: tuple[str, ...] = ()
    """What a user should know about the graph as a whole, e.g. that the loss is in another one."""
    before: str = ""
    after: str = ""
    bodies: tuple[tuple[str, str], ...] = ()
    """(name, readable code) of every chunk body of the graph."""
    num_graphs: int = 1

    @property
    def chunked(self) -> tuple[RegionReport, ...]:
        """The regions that were rewritten."""
        return tuple(r for r in self.regions if r.status == "chunked")

    def __str__(self) -> str:
        graphs = "1 graph" if self.num_graphs == 1 else f"{self.num_graphs} graphs"
        head = f"mst: {len(self.chunked)} of {len(self.regions)} regions chunked in {graphs}"
        lines = [head] + [_line(r) for r in self.regions]
        if not self.regions:
            lines.append("  no wide token-wise region found; compiled as plain Inductor would")
        return "\n".join(lines + [f"  note: {n}" for n in self.notes])

    def diff(self) -> str:
        """Return the text diff of the graph before and after, chunk bodies below it."""
        from mst_fx.graph_diff import text_diff

        return text_diff(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data that ``json`` can write."""
        return {
            "regions": [dataclasses.asdict(r) for r in self.regions],
            "notes": list(self.notes),
            "num_graphs": self.num_graphs,
        }

    def to_html(self, path: str | pathlib.Path) -> None:
        """Write the report as one self-contained page."""
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in dataclasses.asdict(r).values()) + "</tr>"
            for r in self.regions
        )
        head = "".join(f"<th>{f.name}</th>" for f in dataclasses.fields(RegionReport))
        data = json.dumps(self.to_dict()).replace("</", "<\\/")
        page = (
            "<!doctype html><meta charset=utf-8><title>mst report</title>"
            "<style>body{font:14px system-ui;margin:2em}td,th{padding:.3em .8em;border-bottom:1px solid #ddd;"
            "text-align:left}pre{overflow:auto}</style>"
            f"<h1>mst report</h1><pre>{html.escape(str(self))}</pre><table><tr>{head}</tr>{rows}</table>"
            f"<h2>Diff</h2><pre>{html.escape(self.diff())}</pre>"
            f"<script type=application/json id=report>{data}</script>"
        )
        pathlib.Path(path).write_text(page, encoding="utf-8")


def join_reports(reports: list[Report]) -> Report:
    """Join the reports of several graphs of one function into one."""
    return Report(
        regions=tuple(r for rep in reports for r in rep.regions),
        notes=tuple(n for rep in reports for n in rep.notes),
        before="\n".join(rep.before for rep in reports),
        after="\n".join(rep.after for rep in reports),
        bodies=tuple(dict(b for rep in reports for b in rep.bodies).items()),
        num_graphs=sum(rep.num_graphs for rep in reports),
    )


def format_bytes(count: int) -> str:
    """Render a byte count with a binary unit."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit in ("B", "KiB") else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def _line(r: RegionReport) -> str:
    where = f"  {r.status:<8}{r.kind:<5}{r.source}"
    if r.status == "skipped":
        return f"{where}: {r.reason}"
    plan = f"{r.tokens} tokens in {r.num_chunks} chunks of {r.chunk_tokens}"
    return f"{where}: {plan}, {format_bytes(r.bytes_before)} -> {format_bytes(r.bytes_after)} ({r.reason})"
