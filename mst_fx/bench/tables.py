"""Tables and plots made from saved rows; nothing here measures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mst_fx.bench.questions import Question, Row

HEADERS = {
    "head": ("system", "step s", "by inductor", "peak MiB", "by inductor", "first step s"),
    "model": ("system", "checkpointing", "tokens/s", "peak GB", "step s", "first step s"),
    "length": ("system", "S", "peak MiB", "bytes/token", "step s"),
    "compile": ("system", "first step s, cold", "by inductor", "warm", "by inductor"),
}
HEADERS["mlp"] = HEADERS["head"]


def merged(rows: Sequence[Row]) -> list[Row]:
    """Join the rounds of equal cells: medians of times and peaks, and how many."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(repr((row["system"], row["shapes"], row.get("caches"))), []).append(row)
    found = []
    for same in groups.values():
        good = [r for r in same if "reason" not in r]
        row = dict((good or same)[0])
        for name in ("first_s", "step_s", "peak_bytes", "allocated_bytes", "tokens_per_s"):
            values = [r[name] for r in good if name in r]
            if values:
                row[name] = statistics.median(values)
        found.append({**row, "rounds": len(good)})
    return found


def table(question: Question, rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return a header and lines of text; what could not run is a line with its reason."""
    lines = {"model": _model, "length": _length, "compile": _compile}.get(question.name, _block)(merged(rows))
    return HEADERS[question.name], lines


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    rows = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    return "\n".join([*rows, *(f"| {' | '.join(line)} |" for line in lines)])


def summary(question: Question, rows: Sequence[Row]) -> str:
    """Say on what and how the rows were measured."""
    good = next((r for r in rows if "reason" not in r), None)
    if good is None:
        return "nothing could be measured"
    own = {**good["shapes"], **good["shapes"].get("settings", {})}
    hidden = {"adamw", "checkpointing", "settings", *(["seq_len"] if question.name == "length" else [])}
    shapes = ", ".join(f"{k} {v}" for k, v in own.items() if k not in hidden)
    versions = good["versions"]
    named = ", ".join(f"{k} {v}" for k, v in versions.items() if k in ("torch", "transformers", "mst_fx"))
    count = merged(rows)[0]["rounds"]
    return f"{question.name}, {good['dtype']}, {good['device']}; {shapes or 'default shapes'}; {named}; rounds {count}"


def _ratio(row: Row, base: Row | None, name: str) -> str:
    return "" if base is None or not base.get(name) else f"{row[name] / base[name]:.2f}"


def _base(rows: Sequence[Row], **wanted: Any) -> Row | None:
    alike = (r for r in rows if r["system"] == "inductor" and "reason" not in r)
    return next((r for r in alike if all(r.get(k) == v for k, v in wanted.items())), None)


def _block(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    base, lines = _base(rows), []
    for r in rows:
        if "reason" in r:
            lines.append((r["system"], r["reason"], "", "", "", ""))
            continue
        step, peak = _ratio(r, base, "step_s"), _ratio(r, base, "peak_bytes")
        lines.append(
            (r["system"], f"{r['step_s']:.3f}", step, f"{r['peak_bytes'] / 2**20:.0f}", peak, f"{r['first_s']:.1f}")
        )
    return lines


def _model(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    lines = []
    for r in rows:
        kept = "yes" if r["shapes"].get("checkpointing") else "no"
        if "reason" in r:
            lines.append((r["system"], kept, r["reason"], "", "", ""))
            continue
        peak = r.get("allocated_bytes", r["peak_bytes"]) / 1e9
        step, first = f"{r['step_s']:.2f}", f"{r['first_s']:.1f}"
        lines.append((r["system"], kept, f"{r['tokens_per_s']:.0f}", f"{peak:.3g}", step, first))
    return lines


def _length(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for system in dict.fromkeys(r["system"] for r in rows):
        before: Row | None = None
        for r in sorted((r for r in rows if r["system"] == system), key=lambda r: r["shapes"]["seq_len"]):
            length = r["shapes"]["seq_len"]
            if "reason" in r:
                lines.append((system, str(length), r["reason"], "", ""))
                continue
            slope = ""
            if before is not None:
                grown = r["peak_bytes"] - before["peak_bytes"]
                slope = f"{grown / (length - before['shapes']['seq_len']):.0f}"
            lines.append((system, str(length), f"{r['peak_bytes'] / 2**20:.0f}", slope, f"{r['step_s']:.2f}"))
            before = r
    return lines


def _compile(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    lines = []
    for system in dict.fromkeys(r["system"] for r in rows):
        cells: list[str] = [system]
        for caches in ("cold", "warm"):
            r = next(r for r in rows if r["system"] == system and r["caches"] == caches)
            if "reason" in r:
                cells += [r["reason"], ""]
            else:
                cells += [f"{r['first_s']:.1f}", _ratio(r, _base(rows, caches=caches), "first_s")]
        lines.append(tuple(cells))
    return lines


def plot(question: Question, rows: Sequence[Row], path: Path) -> None:
    """Draw the rows as a PNG: bars of time and peak (of first steps for ``compile``), or the peak against S.

    Raises:
        ImportError: Without matplotlib (``pip install 'mst_fx[demo]'``).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [r for r in merged(rows) if "reason" not in r]
    if question.name == "length":
        figure, axes = pyplot.subplots(figsize=(6, 4))
        for system in dict.fromkeys(r["system"] for r in good):
            own = sorted((r for r in good if r["system"] == system), key=lambda r: r["shapes"]["seq_len"])
            axes.plot(
                [r["shapes"]["seq_len"] for r in own], [r["peak_bytes"] / 2**30 for r in own], marker="o", label=system
            )
        axes.set_xlabel("sequence length S")
        axes.set_ylabel("peak over start, GiB")
        axes.legend()
    else:
        bars = [("step_s", 1, "step, s"), ("peak_bytes", 2**20, "peak over start, MiB")]
        bars = {"compile": [("first_s", 1, "first step, s")]}.get(question.name, bars)
        size = (5 * len(bars), 0.45 * len(good) + 1.2)
        figure, axes = pyplot.subplots(1, len(bars), figsize=size, sharey=True, squeeze=False)
        labels = [r["system"] + _suffix(question, r) for r in good]
        colours = [
            "tab:orange" if r["system"].startswith("mst") and "wrapper" not in r["system"] else "tab:blue" for r in good
        ]
        for panel, (name, unit, label) in zip(axes[0], bars, strict=True):
            panel.barh(labels, [r[name] / unit for r in good], color=colours)
            panel.set_xlabel(label)
        axes[0, 0].invert_yaxis()
    figure.suptitle(summary(question, rows), fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _suffix(question: Question, row: Row) -> str:
    if question.name == "compile":
        return f", {row['caches']}"
    return ", checkpointing" if row["shapes"].get("checkpointing") else ""
