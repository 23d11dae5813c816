"""Reports as text for people: the table of ``explain`` and the diff."""

from __future__ import annotations

import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mst_fx.diff.graph_diff import Hunk, Line, fold_paths, hunks
from mst_fx.plan import format_bytes
from mst_fx.printing import SHORT
from mst_fx.report import RegionReport, Report

RED, GREEN, BOLD, DIM, PLAIN = "\033[31m", "\033[32m", "\033[1m", "\033[2m", "\033[0m"


def headline(report: Report) -> str:
    """Return the first line of everything: how much was chunked."""
    graphs = "1 graph" if report.num_graphs == 1 else f"{report.num_graphs} graphs"
    attention = sum(r.is_attention for r in report.regions)
    rest = f"; attention ({attention} projection{'s' if attention > 1 else ''}) is left alone" if attention else ""
    return f"mst: {len(report.chunked)} of {len(report.regions) - attention} regions chunked in {graphs}{rest}"


def explain_text(report: Report) -> str:
    """Return the headline, a table of every region considered (equal ones folded), and what can be done."""
    lines = [headline(report)]
    groups = list(folded_regions(report.regions))
    if not report.num_graphs:
        lines.append("  Dynamo traced no graph, so there is nothing to compile, with any backend")
    elif all(g[0].is_attention for g in groups):
        lines.append("  no wide token-wise region found; compiled as without mst")
    if groups:
        lines += _table(groups)
    lines += [f"  note: {short_source(n)}" for n in report.notes]
    if advice := advice_lines(report):
        lines += ["what you can do:", *(f"  - {a}" for a in advice)]
    return "\n".join(lines)


WHERE = 2
"""The column that is wrapped."""


def _table(groups: Sequence[list[RegionReport]]) -> Iterator[str]:
    rows = [("status", "kind", "where", "tokens", "chunks", "wide bytes"), *(region_cells(g) for g in groups)]
    places = [textwrap.wrap(row[WHERE], 60, break_long_words=False, break_on_hyphens=False) or [""] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    widths[WHERE] = max(len(line) for place in places for line in place)
    details = ["", *(region_detail(g) for g in groups)]
    for row, place, detail in zip(rows, places, details, strict=True):
        cells = [place[0] if i == WHERE else c for i, c in enumerate(row)]
        yield "  " + "  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip()
        indent = " " * (2 + sum(w + 2 for w in widths[:WHERE]))
        yield from (indent + line for line in place[1:])
        if detail:
            yield f"      {detail}"


def advice_lines(report: Report) -> list[str]:
    """Return what a user can do about the skipped regions, and about logits that are kept, each once."""
    return list(dict.fromkeys(a for r in report.regions if (a := advise(r.reason))))


def advise(reason: str) -> str:
    """Return what a user can do about a skipped region, "" where there is nothing to do."""
    return next((advice for pattern, advice in ADVICE if re.search(pattern, reason)), "")


ADVICE = (
    (
        r"a graph break ends",
        "spell that line so that Dynamo can trace it (tokens left out of a loss by ignore_index=-100 or a weight of 0, "
        "not by logits[mask]; no .item() or print between head and loss); TORCH_LOGS=graph_breaks says more",
    ),
    (
        r"^too small.* less than two|^not worthwhile",
        "small regions are left alone by mst.chunk_tokens='auto'; an int chunks them too",
    ),
    (
        r"works over all tokens",
        "a metric of all tokens can be taken of each first (x.amax(-1).max(), not x.max()); what changes each token by "
        "all of them, a scale, needs them whole",
    ),
    (
        r"compute the loss inside",
        "if these are logits: pass labels to the model, or compile a function that returns the loss",
    ),
    (
        r"returned logits are kept",
        "mst.logits='lazy' (the default) does not hold the returned logits until they are read",
    ),
    (r"logits leave a checkpointed block", "keep the head outside the checkpointed block"),
    (r"the returned logits", "mst.logits='drop' leaves the logits out"),
    (r"^not convex", "a value that depends on all tokens comes back to each of them: that needs them whole"),
    (r"is returned", "return the value computed once more outside, or not at all, for its region to be chunked"),
    (r"in place", "write the operation out of place (x = x + y) for its region to be chunked"),
    (r"subclass|DTensor", "chunking needs plain weights where the layer runs: FSDP2 compiled per block has them"),
    (r"does not compile", "see why with TORCH_LOGS='+mst_fx'"),
    (r"gradients are off", "use the result inside the block that records gradients"),
)


def memory(report: Report) -> tuple[Sequence[tuple[Any, Any]], str]:
    """Return the timelines before and after per graph, or why there are none."""
    try:
        return report.timelines(), "" if report.graphs else "nothing was compiled"
    except Exception as e:  # the rest of what is shown is worth having
        return (), f"the analysis of live bytes failed: {type(e).__name__}: {e}"


def _memory_lines(report: Report) -> list[str]:
    timelines, why_none = memory(report)
    lines = [f"  note: {why_none}"] if why_none else []
    for number, (before, after) in enumerate(timelines):
        graph = f"graph {number}: " if len(timelines) > 1 else ""
        largest, peak, saved = (
            [format_bytes(getattr(t, f"{name}_bytes")) for t in (before, after)]
            for name in ("largest", "peak", "saved")
        )
        lines += [
            f"{graph}largest value {largest[0]} {before.largest} -> {largest[1]} {after.largest}",
            f"{graph}estimated peak over the start of a step {peak[0]} -> {peak[1]}, "
            f"kept for the backward {saved[0]} -> {saved[1]}",
        ]
    return lines


SAVED_COLUMNS = ("per token", "in all", "value", "where")


def saved_text(report: Report) -> str:
    """Return a table per graph of what is still kept between forward and backward, the largest first."""
    timelines, why_none = memory(report)
    lines = [f"  note: {why_none}"] if why_none else []
    for number, (before, after) in enumerate(timelines):
        graph = f" in graph {number}" if len(timelines) > 1 else ""
        tokens = graph_tokens(report, number)
        before_each, after_each = (_each(t.saved_bytes, tokens) for t in (before, after))
        whole = f"{format_bytes(before.saved_bytes)} -> {format_bytes(after.saved_bytes)}"
        each = f", per token ({tokens} tokens) {before_each} -> {after_each}" if tokens else ""
        lines.append(f"kept for the backward{graph}: {whole}{each}")
        if rows := saved_rows(after, tokens):
            rows = [SAVED_COLUMNS, *rows]
            widths = [max(len(r[i]) for r in rows) for i in range(3)]
            lines += ["  " + "  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[3]]) for r in rows]
    return "\n".join(lines)


def saved_rows(timeline: Any, tokens: int) -> list[tuple[str, str, str, str]]:
    """Return bytes per token, bytes in all, value, and place of what is kept, equal values of equal layers together."""
    groups: dict[tuple[str, str, int], list[Any]] = {}
    for s in timeline.saved:
        groups.setdefault(s.kind, []).append(s)
    rows = []
    for group in sorted(groups.values(), key=lambda g: -sum(s.bytes for s in g)):
        first, total = group[0], sum(s.bytes for s in group)
        source = f"({short_source(first.source)})" if first.source else ""
        where = " ".join(filter(None, [fold_paths([s.path for s in group]), source]))
        times = f" x{len(group)}" if len(group) > 1 else ""
        rows.append((_each(total, tokens), format_bytes(total), first.text + times, where))
    return rows


def graph_tokens(report: Report, number: int) -> int:
    """Return the tokens of most regions in a graph, 0 where there are none or their number is symbolic."""
    counts = Counter(r.tokens for r in report.regions if r.number == number and isinstance(r.tokens, int))
    return counts.most_common(1)[0][0] if counts else 0


def _each(count: int, tokens: int) -> str:
    return format_bytes(round(count / tokens)) if tokens else "-"


def text_diff(report: Report, backward: bool = False, colour: bool = False, estimate: bool = True) -> str:
    """Return what the passes changed.

    Args:
        report: From ``explain`` or ``reports``.
        backward: Print the backward of every body too.
        colour: Use terminal colours.
        estimate: Say what memory a step takes before and after, for which the graphs are traced once more.
    """
    red, green, bold, dim, plain = (RED, GREEN, BOLD, DIM, PLAIN) if colour else ("",) * 5
    head, _, table = explain_text(report).partition("\n")
    lines = [f"{bold}{head}{plain}", *(_memory_lines(report) if estimate else []), table]
    shown: set[str] = set()
    for hunk in hunks(report):
        lines += ["", f"{bold}{_title(hunk)}{plain}"]
        lines += [f"{red}- {t}{plain}" for t in _aligned(hunk.removed)]
        lines += [f"{green}+ {t}{plain}" for t in _aligned(hunk.added)]
        if hunk.body is None:
            continue
        if hunk.body.name in shown:
            lines.append(f"  {dim}body {hunk.body.name[:SHORT]}: above{plain}")
            continue
        shown.add(hunk.body.name)
        for part, code in (("forward", hunk.body.forward), ("backward", hunk.body.backward if backward else "")):
            if code:
                lines.append(f"  {dim}{part} of body {hunk.body.name[:SHORT]}, for each chunk of C tokens:{plain}")
                lines += [f"    {line}" for line in code.splitlines()]
    return "\n".join(lines)


def _title(hunk: Hunk) -> str:
    if not hunk.regions:
        return "@@ moved"
    first, count = hunk.regions[0], len(hunk.regions)
    where = ", ".join(filter(None, [hunk.places, short_source(first.source)]))
    times = f" x{count}" if count > 1 else ""
    return f"@@ {first.kind}{times}  {where}  {plan_text(first)}"


def plan_text(region: RegionReport) -> str:
    """Return a region's chunks and its wide bytes before and after."""
    return (
        f"{region.tokens} tokens in {region.num_chunks} chunks of {region.chunk_tokens}, "
        f"{format_bytes(region.bytes_before)} -> {format_bytes(region.bytes_after)}"
    )


def _aligned(lines: Iterable[Line]) -> list[str]:
    """Put the source beside the first of the lines that come from it."""
    lines = list(lines)
    width = min(max((len(line.text) for line in lines), default=0), 96)
    texts, last = [], ""
    for line in lines:
        source = short_source(line.source)
        beside = source if source != last and "<" not in source else ""
        texts.append(f"{line.text:<{width}}  {beside}".rstrip())
        last = source
    return texts


def folded_regions(regions: Iterable[RegionReport]) -> Iterable[list[RegionReport]]:
    """Return the regions, equal ones together; last of all attention, all of it together."""
    groups: dict[object, list[RegionReport]] = {}
    for r in sorted(regions, key=lambda r: r.is_attention):
        reason = re.sub(r"`(\w+?)(_\d+)?`", r"`\1`", r.reason)
        sizes = format_bytes(r.bytes_before), format_bytes(r.bytes_after)
        key = (r.kind, r.source, str(r.tokens), r.chunk_tokens, *sizes, r.status, reason)
        groups.setdefault("attention" if r.is_attention else key, []).append(r)
    return groups.values()


def region_cells(group: list[RegionReport]) -> tuple[str, ...]:
    """Return status, kind, place, tokens, chunks and wide bytes of equal regions."""
    r = group[0]
    kind = "attention" if r.is_attention else r.kind
    wide = max(x.bytes_before for x in group)
    return (
        r.status,
        f"{kind} x{len(group)}" if len(group) > 1 else kind,
        fold_paths([x.path for x in group]) or short_source(r.source),
        ", ".join(dict.fromkeys(str(x.tokens) for x in group)),
        f"{r.num_chunks} of {r.chunk_tokens}" if r.num_chunks else "-",
        format_bytes(wide) + (f" -> {format_bytes(r.bytes_after)}" if r.num_chunks else ""),
    )


def region_detail(group: list[RegionReport]) -> str:
    """Return where equal regions are in the user's code, and the reason for what became of them."""
    r = group[0]
    sources = dict.fromkeys(short_source(x.source) for x in group)
    more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    source = f"{next(iter(sources))}{more}" if r.path or more else ""
    return "; ".join(filter(None, [source, short_source(r.reason)]))


def short_source(text: str) -> str:
    """Return a ``file:line``, or a sentence that holds one, without what every path on the machine begins with."""
    text = re.sub(r"/\S*/(?:site|dist)-packages/", "", text)
    return text.replace(os.getcwd() + os.sep, "")
