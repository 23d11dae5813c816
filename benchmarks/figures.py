"""The figures of benchmarks/README.md: each a ratio of two systems, with the most that is asked of it.

    python -m benchmarks.figures                # measure everything, save the rows, print the table
    python -m benchmarks.figures llama head-    # one by its name, else all whose names begin so
    python -m benchmarks.figures --list
    python -m benchmarks.figures --table        # measure nothing: the table of saved rows
    python -m benchmarks.figures --readme       # the same, into benchmarks/README.md
    python -m benchmarks.figures --plots        # the picture of peak and time over length, from saved rows

Times are step times by turns in one process; ratios are medians over rounds. On a machine that others use give
``--clock cpu``: one thread, processor time. Peaks, errors and first steps are cells, each a process of its own.
Rows are saved under ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.measurements import LENGTHS_SHOWN, MEASUREMENTS, RESULTS, SERIES, Rows, load, save, too_slow_here
from mst_fx.bench.turns import median_ratio
from mst_fx.config import did_you_mean
from mst_fx.measure import prepare_compiler

# -- figures from saved rows -------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A ratio (or a count), what it is of, and the most that is asked, None for nothing."""

    work: str
    what: str
    against: str
    limit: float | None
    value: Callable[[], float]


def _time(name: str, system: str, base: str) -> Callable[[], float]:
    return lambda: _median_ratio(_rows(name), system, base)


def _median_ratio(rows: Rows, system: str, base: str) -> float:
    for asked in (system, base):
        if asked in rows.get("reasons", {}):
            raise _MissingError(f"{asked}: {rows['reasons'][asked]}")
    times = rows["cpu_s" if rows["clock"] == "cpu" else "steps_s"]
    return median_ratio(times[system], times[base])


def _cells(name: str, system: str, base: str, key: str) -> Callable[[], float]:
    return lambda: _value(name, system, key) / _value(name, base, key)


def _value(name: str, system: str, key: str) -> float:
    return statistics.median(r[key] for r in _rows(name)[system])


def _first(system: str, base: str) -> Callable[[], float]:
    """Seconds by the clock, of processes that ran one after the other: a shared machine is slower in some minutes."""

    def ratio() -> float:
        ours, theirs = ([r["first_s"] for r in _rows("llama-compile")[s]] for s in (system, base))
        return median_ratio(ours, theirs)

    return ratio


def _slope(base: str) -> Callable[[], float]:
    def grown(system: str, kept: str) -> float:
        return _value(f"llama-16k{kept}", system, "peak_bytes") - _value(f"llama-2k{kept}", system, "peak_bytes")

    return lambda: grown("mst", "-checkpointing") / grown("inductor", base)


def _overhead(which: int) -> Callable[[], float]:
    return lambda: _rows("overhead")["values"][0][which]


class _MissingError(Exception):
    """A figure's rows were not measured, or a system could not run; the message says which."""


def _rows(name: str) -> Rows:
    found = load(name)
    if found is None:
        raise _MissingError(f"not measured: {name}")
    for rows in found.values():
        for row in rows if isinstance(rows, list) else []:
            if isinstance(row, dict) and "reason" in row:
                raise _MissingError(f"{row['system']}: {row['reason']}")
    return found


PLAIN, PEAK, ERROR = "Inductor", "peak_bytes", "gradient_error"
EAGER = "eager checkpoint per chunk"
PARAM, BOTH, WARM = "mst parameter", ("mst", "inductor"), ("mst, warm", "inductor, warm")
DEEP, BY_TWOS, EACH = "llama, 32 layers", "mst+checkpoint by 2", "mst+checkpoint"
FIGURES = [
    Figure("head fp32", "time", PLAIN, 1.10, _time("head-fp32", "mst", "inductor")),
    Figure("head fp32, batch 2", "time", PLAIN, 1.10, _time("head-fp32-batch2", "mst", "inductor")),
    Figure("head bf16, parameter", "time", PLAIN, 1.10, _time("head-bf16", PARAM, "inductor")),
    Figure("head bf16, parameter, batch 2", "time", PLAIN, 1.10, _time("head-bf16-batch2", PARAM, "inductor")),
    Figure("head bf16, parameter", "peak", "AutoChunker", 1.00, _cells("head-peak", PARAM, "auto_chunker", PEAK)),
    Figure("head bf16, parameter", "time", "AutoChunker", 1.00, _time("head-bf16", PARAM, "auto_chunker")),
    Figure("head bf16", "time", PLAIN, 1.50, _time("head-bf16", "mst", "inductor")),
    Figure("head bf16", "peak", PLAIN, 0.65, _cells("head-peak", "mst", "inductor", PEAK)),
    Figure("head bf16", "error of gradients", PLAIN, 1.02, _cells("head-peak", "mst", "inductor", ERROR)),
    Figure("head bf16, parameter", "error of gradients", PLAIN, 1.02, _cells("head-peak", PARAM, "inductor", ERROR)),
    Figure("mlp bf16, parameter", "time", PLAIN, 1.30, _time("mlp-bf16", PARAM, "inductor")),
    Figure("mlp bf16, parameter", "peak", PLAIN, 0.45, _cells("mlp-peak", PARAM, "inductor", PEAK)),
    Figure("mlp bf16", "time", PLAIN, 1.50, _time("mlp-bf16", "mst", "inductor")),
    Figure("mlp bf16", "peak", PLAIN, 0.55, _cells("mlp-peak", "mst", "inductor", PEAK)),
    Figure("mlp fp32", "time", "Inductor + checkpoint", 1.02, _time("mlp-fp32", "mst", "inductor+checkpoint")),
    Figure("mlp bf16", "error of gradients", PLAIN, 1.12, _cells("mlp-peak", "mst", "inductor", ERROR)),
    Figure("mlp bf16, parameter", "peak", EAGER, 1.00, _cells("mlp-peak", PARAM, "chunk checkpoint", PEAK)),
    Figure("mlp bf16, parameter", "time", EAGER, 0.55, _time("mlp-bf16", PARAM, "chunk checkpoint")),
    Figure("llama", "peak", PLAIN, 0.20, _cells("llama-peak", "mst", "inductor", PEAK)),
    Figure("llama", "time", PLAIN, 0.95, _time("llama", "mst", "inductor")),
    Figure("llama, checkpointing", "peak", "the same", 0.22, _cells("llama-checkpointing-peak", *BOTH, PEAK)),
    Figure("llama, checkpointing", "time", "the same", 1.00, _time("llama-checkpointing", "mst", "inductor")),
    Figure("llama, checkpointing, 2K to 16K", "slope of the peak", "the same", 0.12, _slope("-checkpointing")),
    Figure("llama, checkpointing, 2K to 16K", "slope of the peak", PLAIN, 0.06, _slope("")),
    Figure(f"{DEEP} by twos", "peak", "mst + checkpoint", None, _cells("llama-deep-peak", BY_TWOS, EACH, PEAK)),
    Figure(f"{DEEP} by twos", "time", "mst + checkpoint", None, _time("llama-deep", BY_TWOS, EACH)),
    Figure("llama, S 256", "time", PLAIN, 1.02, _time("llama-256", "mst", "inductor")),
    Figure("llama, S 512", "time", PLAIN, 1.02, _time("llama-512", "mst", "inductor")),
    Figure("llama, 8 layers", "first step, cold", PLAIN, 0.60, _first("mst", "inductor")),
    Figure("llama, 8 layers", "first step, warm", PLAIN, 0.80, _first(*WARM)),
    Figure("20 sequence lengths after the first two", "recompilations", "", 0, lambda: _rows("lengths")["values"][0]),
    Figure("second process, same model", "cache misses", "", 0, lambda: _rows("caches")["values"][1]),
    Figure("a chunk, forward", "microseconds", "its body called alone", None, _overhead(0)),
    Figure("a chunk, backward", "microseconds", "its body called alone", None, _overhead(1)),
]  # fmt: skip


SUMMARY = {
    ("llama", "peak", PLAIN), ("llama", "time", PLAIN),
    ("llama, checkpointing", "peak", "the same"), ("llama, checkpointing", "time", "the same"),
    ("llama, checkpointing, 2K to 16K", "slope of the peak", PLAIN), ("llama, S 512", "time", PLAIN),
    ("head bf16", "time", PLAIN), ("head bf16", "peak", PLAIN), ("head bf16", "error of gradients", PLAIN),
    ("mlp bf16", "time", PLAIN), ("mlp bf16", "peak", PLAIN), ("mlp bf16", "error of gradients", PLAIN),
    ("llama, 8 layers", "first step, cold", PLAIN), ("llama, 8 layers", "first step, warm", PLAIN),
}  # fmt: skip
"""The rows that the README shows."""


def lines() -> list[tuple[str, str, str, str, str]]:
    """Return the table: work, what, against, ratio, the most that is asked."""
    found = []
    for f in FIGURES:
        try:
            ratio = f.value()
            met = _asked(f) + ("" if f.limit is None or round(ratio, 2) <= f.limit else ", **missed**")
            found.append((f.work, f.what, f.against, f"{ratio:.2f}", met))
        except _MissingError as e:
            found.append((f.work, f.what, f.against, str(e), _asked(f)))
    return found


def _asked(figure: Figure) -> str:
    return "" if figure.limit is None else f"at most {figure.limit:g}"


def write_readme() -> None:
    """Put the table between its markers, and the rows of most interest without what was asked into the README."""
    found = lines()
    _write("figures", ("work", "what", "against", "ratio", "asked"), found)
    _write("figures-summary", ("work", "what", "against", "ratio"), [x[:4] for x in found if x[:3] in SUMMARY])


def _write(name: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    replace_table(name, [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)])


def draw_lengths(path: Path) -> list[int]:
    """Draw peak memory and step time over sequence length from saved rows; return the lengths that have rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    peaks = {n: rows for n in LENGTHS_SHOWN if (rows := load(f"length-{n}")) is not None}
    times = {n: rows for n in LENGTHS_SHOWN if (rows := load(f"length-{n}-time")) is not None}
    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = pyplot.figure(figsize=(10 if times else 7, 3.4))
        grid = figure.add_gridspec(1, 2 if times else 1, width_ratios=(1.5, 1)[: 2 if times else 1])
        left, right = figure.add_subplot(grid[0]), figure.add_subplot(grid[1]) if times else None
        series = {s: [(n, _peak(rows[s]) / 2**20) for n, rows in peaks.items()] for s in SERIES}
        height, below = max(y for own in series.values() for _, y in own), -1.0
        for system in sorted(SERIES, key=lambda s: series[s][-1][1]):  # labels from the lowest, none upon another
            label, colour, line = SERIES[system]
            style: dict[str, Any] = {
                "color": colour,
                "linestyle": line,
                "marker": "o",
                "markersize": 4,
                "linewidth": 1.8,
            }
            left.plot(*zip(*series[system], strict=True), **style)
            end, value = series[system][-1]
            below = max(value, below + 0.07 * height)
            left.annotate(f"{label}, {value:.0f} MiB", (end, below), (7, 0), textcoords="offset points", color=colour,
                          va="center", annotation_clip=False)  # fmt: skip
            ratios = [(n, _median_ratio(rows, system, "inductor")) for n, rows in times.items()]
            if right is not None:
                right.plot(*zip(*ratios, strict=True), **style)
        left.set(ylabel="peak of a step over its start, MiB", ylim=(0, 1.08 * height), xlim=(0, max(peaks) * 1.02))
        left.set_xticks(list(peaks), [f"{n // 1024}K" for n in peaks])
        if right is not None:
            right.set(ylabel="step time by plain Inductor's", ylim=(0, None), xscale="log")
            right.set_xticks(list(times), [f"{n // 1024}K" for n in times])
            right.minorticks_off()
        for axes in figure.axes:
            axes.set_xlabel("sequence length")
            axes.grid(axis="y", color="0.9")
            axes.set_axisbelow(True)
        figure.tight_layout(w_pad=3)
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
    return list(peaks)


def _peak(rows: list[Rows]) -> float:
    return statistics.median(r["peak_bytes"] for r in rows)


def replace_table(name: str, table: list[str]) -> None:
    """Put a table between its markers, which are in the README or in that of this folder."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    here = Path(__file__).parent
    readme = next(p for p in (here.parent / "README.md", here / "README.md") if start in p.read_text())
    before, rest = readme.read_text().split(start)
    readme.write_text(f"{before}{start}\n" + "\n".join(table) + f"\n{end}{rest.split(end)[1]}")


def _wanted(names: list[str]) -> list[str]:
    """Return the measurements named, or whose names begin so; all of them for none."""
    exact = [n for n in names if n in MEASUREMENTS]
    begun = tuple(n for n in names if n not in MEASUREMENTS) if names else ("",)
    lost = [b for b in begun if not any(n.startswith(b) for n in MEASUREMENTS)]
    if lost:
        raise SystemExit(f"no measurement is named {lost[0]!r}.{did_you_mean(lost[0], MEASUREMENTS)} See --list.")
    return [n for n in MEASUREMENTS if n in exact or n.startswith(begun)]


def main() -> None:
    """Measure what was asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a name, or what names begin with; all by default")
    parser.add_argument("--steps", type=int, default=5, help="rounds of turns")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--plots", action="store_true")
    args = parser.parse_args()
    if args.list:
        Console().print("\n".join(MEASUREMENTS))
        return
    if args.readme:
        write_readme()
        return
    if args.plots:
        Console().print(f"length.png: S {', '.join(map(str, draw_lengths(RESULTS / 'length.png')))}")
        return
    if not args.table:
        wanted = _wanted(args.names)
        prepare_compiler(dict(os.environ))
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=len(wanted))
            for name in wanted:
                progress.update(task, description=name)
                why = too_slow_here(name)
                if why is None:
                    save(name, MEASUREMENTS[name].run(args.steps, args.clock))
                else:  # rows of another machine stay as they are
                    progress.console.print(f"{name}: not measured: {why}")
                progress.advance(task)
    table = Table("work", "what", "against", "ratio", "asked")
    for line in lines():
        table.add_row(*line)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
