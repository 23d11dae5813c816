"""The chunk sizes that ``auto`` picks against measured ones: time and peak of every power of two, by turns.

    python -m benchmarks.plan                 # measure every case, save the rows, print the table
    python -m benchmarks.plan mlp             # cases whose names begin so
    python -m benchmarks.plan --readme        # measure nothing: the table of saved rows, into benchmarks/README.md

The size chosen is asked of these sources whenever the table is made. A case is a process of its own with one thread.
In every round each chunk size and plain Inductor run one step; times are processor time, ratios are medians over
rounds. The peak of a step over its start is read before, in the same process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import mst_fx
from benchmarks.figures import replace_table
from benchmarks.measurements import RESULTS
from mst_fx.bench.cell import device_name, versions
from mst_fx.bench.questions import environment, too_much
from mst_fx.bench.turns import by_turns, median_ratio
from mst_fx.bench.works import WORKS, Work, check_sizes
from mst_fx.commands.models import DTYPES

HEAD, MLP = {"hidden": 256, "vocab": 16000}, {"hidden": 512, "intermediate": 1792}
CASES: dict[str, tuple[str, str, dict[str, int]]] = {
    "head, T 512": ("head", "float32", {"tokens": 512, **HEAD}),
    "head, T 4096": ("head", "float32", {"tokens": 4096, **HEAD}),
    "head, T 4096, bf16": ("head", "bfloat16", {"tokens": 4096, **HEAD}),
    "head, T 4096, V 32000, bf16": ("head", "bfloat16", {"tokens": 4096, "hidden": 512, "vocab": 32000}),
    "head, T 16384": ("head", "float32", {"tokens": 16384, **HEAD}),
    "mlp, T 1024": ("mlp", "float32", {"tokens": 1024, **MLP}),
    "mlp, T 8192": ("mlp", "float32", {"tokens": 8192, **MLP}),
    "mlp, T 8192, bf16": ("mlp", "bfloat16", {"tokens": 8192, **MLP}),
    "mlp, T 32768": ("mlp", "float32", {"tokens": 32768, **MLP}),
}
SMALLEST = 128
FILE = RESULTS / "plan.json"


def chosen_size(case: str) -> int | None:
    """Return the chunk size that ``auto`` picks, None for a region left alone; nothing is run."""
    work = made(case)
    (region,) = mst_fx.explain(work.module)(**work.inputs).regions
    return region.chunk_tokens if region.status == "chunked" else None


def made(case: str) -> Work:
    """Return the work of a case."""
    torch.manual_seed(0)
    name, dtype, shapes = CASES[case]
    return WORKS[name](**shapes, dtype=DTYPES[dtype], device="cpu")


def measure(case: str, rounds: int) -> dict[str, Any]:
    """Measure one case in this process."""
    name, dtype, shapes = CASES[case]
    work, chosen = made(case), chosen_size(case)
    sizes = {2**i for i in range(SMALLEST.bit_length() - 1, shapes["tokens"].bit_length() - 1)}
    variants: dict[str, tuple[str, dict[str, Any]]] = {"plain": ("inductor", {})}
    variants |= {str(c): ("mst", {"chunk_tokens": c}) for c in sorted(sizes | ({chosen} if chosen else set()))}
    found = by_turns(work, variants, rounds, "cpu", peaks=True)
    failed = {label: row["reason"] for label, row in found.items() if "reason" in row}
    if failed:
        raise SystemExit(f"{case}: {failed}")
    times, peaks = ({label: row[key] for label, row in found.items()} for key in ("cpu_s", "peak_bytes"))
    return {
        "case": case, "work": name, "dtype": dtype, "shapes": shapes, "chosen": chosen,
        "cpu_s": times, "peak_bytes": peaks, "device": device_name("cpu"), "versions": versions(),
    }  # fmt: skip


def apart(case: str, rounds: int) -> dict[str, Any]:
    """Measure one case in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.plan", "--case", case, "--rounds", str(rounds)]
    env = {**environment("cpu"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=True)
    return json.loads(done.stdout.splitlines()[-1])


HEADER = ("region", "chosen C", "time", "peak", "fastest C", "its time", "chosen by fastest")


def lines(rows: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the table; times and peaks are ratios to plain Inductor."""
    found = []
    for case, row in rows.items():
        time_of = {k: median_ratio(v, row["cpu_s"]["plain"]) for k, v in row["cpu_s"].items()}
        fastest = min((k for k in time_of if k != "plain"), key=lambda k: time_of[k])
        chosen = "plain" if row["chosen"] is None else str(row["chosen"])
        peak = row["peak_bytes"][chosen] / row["peak_bytes"]["plain"]
        best = median_ratio(row["cpu_s"][chosen], row["cpu_s"][fastest])
        found.append((case, "left alone" if chosen == "plain" else chosen, f"{time_of[chosen]:.2f}", f"{peak:.2f}",
                      fastest, f"{time_of[fastest]:.2f}", f"{best:.2f}"))  # fmt: skip
    return found


def main() -> None:
    """Measure what was asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"cases whose names begin so; of {'; '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        sys.stdout.write(json.dumps(measure(args.case, args.rounds)) + "\n")
        return
    rows = json.loads(FILE.read_text()) if FILE.exists() else {}
    if not args.readme:
        wanted = [c for c in CASES if not args.names or c.startswith(tuple(args.names))]
        for i, case in enumerate(wanted):
            why = too_much(CASES[case][0], check_sizes(CASES[case][0], CASES[case][2]), CASES[case][1])
            sys.stderr.write(f"{i + 1} of {len(wanted)}: {case}{f': not measured: {why}' if why else ''}\n")
            if why:
                continue
            rows[case] = apart(case, args.rounds)
            FILE.write_text(json.dumps({c: rows[c] for c in CASES if c in rows}, indent=1) + "\n")
    rows = {c: {**rows[c], "chosen": chosen_size(c)} for c in CASES if c in rows}
    if args.readme:
        replace_table("plan", [f"| {' | '.join(r)} |" for r in (HEADER, ("---",) * len(HEADER), *lines(rows))])
    table = Table(*HEADER)
    for line in lines(rows):
        table.add_row(*line)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
