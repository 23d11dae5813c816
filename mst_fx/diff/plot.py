"""Live bytes over one step as an SVG that takes its colours and fonts from the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mst_fx.plan import format_bytes

BOX = (0.062, 0.1, 0.926, 0.84)
"""Left, bottom, width and height of the plotted area, as shares of the picture."""
SIZE = (11.0, 3.3)
POINTS = 600
"""Most points that are drawn of one timeline."""

# Colours that stand for the page's own, so that one picture suits a light and a dark page.
_COLOURS = {"#010203": "ink", "#010204": "muted", "#010205": "before", "#010206": "after", "#010207": "shade"}
_INK, _MUTED, _BEFORE, _AFTER, _SHADE = _COLOURS


class NoMatplotlibError(ImportError):
    """There is nothing to draw with."""


@dataclass(frozen=True)
class Point:
    """One moment, and where it is in the picture."""

    x: float
    """Share of the step that has passed."""
    moment: Any


def forward_share(moments: Sequence[Any]) -> float:
    """Return the share of the moments that are in the forward."""
    return sum(m.phase == "forward" for m in moments) / max(len(moments), 1)


def points(moments: Sequence[Any], split: float, most: int = POINTS) -> list[Point]:
    """Return where moments are in the step, the highest of each of ``most`` stretches.

    Args:
        moments: Of one timeline, forward first.
        split: Where the forward ends, 0 to 1; the same for timelines that are laid over each other.
        most: Bound on the number of points.
    """
    placed: list[Point] = []
    for start, width, phase in ((0.0, split, "forward"), (split, 1 - split, "backward")):
        here = [m for m in moments if m.phase == phase]
        placed += [Point(start + width * i / len(here), m) for i, m in enumerate(here)]
    if len(placed) <= most:
        return placed
    buckets = [placed[i * len(placed) // most : (i + 1) * len(placed) // most] for i in range(most)]
    return [max(b, key=lambda p: p.moment.live_bytes) for b in buckets]


def timeline_svg(before: Sequence[Point], after: Sequence[Point], split: float, name: str) -> str:
    """Draw two timelines over each other.

    Args:
        before: What plain Inductor would do.
        after: What the rewritten graph does.
        split: Where the forward ends, 0 to 1.
        name: Begins every id in the picture, so that several fit in one page.

    Raises:
        NoMatplotlibError: Without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as e:
        raise NoMatplotlibError("the picture needs matplotlib: pip install 'mst_fx[demo]'") from e
    peak = max((p.moment.live_bytes for p in (*before, *after)), default=1) or 1
    scale, unit = next((s, u) for s, u in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B")) if peak >= s)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9.5}):
        figure = Figure(figsize=SIZE)
        axes = figure.add_axes(BOX)
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        if split < 1:
            axes.axvspan(split, 1, color=_SHADE, linewidth=0)
        for x, text in ((0, "forward"), (split, "backward")):
            if x < 1 and (x or split):
                axes.text(x + 0.006, 1.165 * peak / scale, text, color=_MUTED, va="top")
        for found, colour in ((before, _BEFORE), (after, _AFTER)):
            _draw(axes, found, colour, scale)
        _mark_peaks(axes, before, after, scale)
        axes.set(xlim=(0, 1), ylim=(0, 1.2 * peak / scale), ylabel=f"live bytes, {unit}")
        axes.yaxis.label.set_color(_MUTED)
        axes.tick_params(colors=_MUTED, length=3)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 % of the step"])
        axes.get_xticklabels()[0].set_ha("left")
        axes.get_xticklabels()[-1].set_ha("right")
        axes.grid(axis="y", color=_SHADE, linewidth=1)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_MUTED)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return _for_page(out.getvalue(), name)


def _draw(axes: Any, found: Sequence[Point], colour: str, scale: int) -> None:
    if not found:
        return
    xs = [*(p.x for p in found), 1.0]
    ys = [p.moment.live_bytes / scale for p in (*found, found[-1])]
    axes.fill_between(xs, ys, step="post", color=colour, alpha=0.1, linewidth=0)
    axes.plot(xs, ys, drawstyle="steps-post", color=colour, linewidth=1.6)


def _mark_peaks(axes: Any, before: Sequence[Point], after: Sequence[Point], scale: int) -> None:
    peaks = [max(found, key=lambda p: p.moment.live_bytes, default=None) for found in (before, after)]
    top = max((p.moment.live_bytes for p in peaks if p), default=0)
    for peak, other, colour, sign in zip(peaks, peaks[::-1], (_BEFORE, _AFTER), (1, -1), strict=True):
        if peak is None:
            continue
        # Texts of peaks that are close to each other go apart.
        is_close = other is not None and abs(peak.moment.live_bytes - other.moment.live_bytes) < 0.1 * top
        is_close = is_close and other is not None and abs(peak.x - other.x) < 0.2
        height = peak.moment.live_bytes / scale
        axes.plot([peak.x], [height], "o", color=colour, markersize=5)
        is_right = peak.x > 0.8
        offset = (-7 if is_right else 7, sign * 9 if is_close else 5)
        axes.annotate(
            format_bytes(peak.moment.live_bytes), (peak.x, height), offset,
            textcoords="offset points", color=colour, weight="bold", ha="right" if is_right else "left",
            va="top" if is_close and sign < 0 else "bottom",
        )  # fmt: skip


def _for_page(svg: str, name: str) -> str:
    """Keep the element, make its ids its own, and let the page choose colours and size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    return re.sub(r"#0102\d\d", lambda m: f"var(--{_COLOURS[m.group()]})", svg)
