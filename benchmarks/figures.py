"""Reproduce the figures of the README: ratios to plain Inductor, side by side.

    python -m benchmarks.figures [llama mlp head slope lengths cache] [--rounds 2] [--tokens-scale 1]

Every cell is a process of its own with cold caches; the systems alternate. Rows are saved under
``benchmarks/results``. Times in absolute terms mean nothing on a shared CPU: read the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mst_fx.measure import MALLOC_ENV

RESULTS = Path(__file__).parent / "results"
CHUNK = ["--option", "chunk_tokens=1024"]
CHECKPOINTING = ["--set", "checkpointing=true"]
# name -> (arguments of both cells, further ones of mst, figure -> greatest ratio asked for)
PAIRS: dict[str, tuple[list[str], list[str], dict[str, float]]] = {
    "llama": (["llama"], CHUNK, {"peak_bytes": 0.22, "step_s": 1.00, "first_s": 0.75}),
    "llama, checkpointing": (["llama", *CHECKPOINTING], CHUNK, {"peak_bytes": 0.26, "step_s": 1.03}),
    "mlp bf16": (["mlp", "--dtype", "bfloat16"], [], {"step_s": 1.60, "peak_bytes": 0.65}),
    "head bf16": (["head", "--dtype", "bfloat16"], [], {"step_s": 1.60, "peak_bytes": 0.70}),
}
SMALL = {
    "mlp bf16": ["--set", "hidden=256", "--set", "intermediate=896"],
    "head bf16": ["--set", "hidden=128", "--set", "vocab=8000"],
}


def cell(arguments: list[str], **env: str) -> dict[str, Any]:
    """Run one cell in a process of its own and return its row."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, **MALLOC_ENV, "TORCHINDUCTOR_CACHE_DIR": cache, **env}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.cell", *arguments],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"cell {arguments} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, rounds: int, extra: list[str], progress: Progress) -> list[tuple[str, str, float, float]]:
    """Alternate plain Inductor and mst; returns rows of (work, figure, ratio, greatest asked for)."""
    shared, ours, asked = PAIRS[name]
    rows: dict[str, list[dict[str, Any]]] = {"inductor": [], "mst": []}
    task = progress.add_task(name, total=2 * rounds)
    for _ in range(rounds):
        for system in rows:
            options = ours if system == "mst" else []
            rows[system].append(cell([*shared, *extra, "--system", system, *options]))
            progress.advance(task)
    save(name, rows)
    out = []
    for figure, limit in asked.items():
        plain, mine = (statistics.median(r[figure] for r in rows[s]) for s in ("inductor", "mst"))
        out.append((name, figure, mine / plain, limit))
    return out


def slope(progress: Progress) -> list[tuple[str, str, float, float]]:
    """Growth of the peak from S 2048 to 8192 under checkpointing, in bytes per token."""
    task = progress.add_task("slope", total=4)
    slopes, rows = {}, {}
    for system in ("inductor", "mst"):
        peaks = []
        for length in (2048, 8192):
            options = CHUNK if system == "mst" else []
            row = cell(
                ["llama", *CHECKPOINTING, "--set", f"seq_len={length}", "--steps", "1", "--system", system, *options]
            )
            rows[f"{system} {length}"] = [row]
            peaks.append(row["peak_bytes"])
            progress.advance(task)
        slopes[system] = (peaks[1] - peaks[0]) / (8192 - 2048)
    save("slope", rows)
    return [
        (
            f"llama 2K-8K, {slopes['inductor']:.0f} -> {slopes['mst']:.0f} B/token",
            "slope",
            slopes["mst"] / slopes["inductor"],
            0.15,
        )
    ]


LENGTHS_SCRIPT = """
import json, torch
from benchmarks.works import llama
from torch._dynamo.utils import counters
work = llama(layers=1, hidden=64, intermediate=224, vocab=1000, seq_len=512, dtype=torch.float32, device="cpu")
fn = torch.compile(work.module, backend="mst", options={"mst.chunk_tokens": 128})
counts = []
for i in range(22):
    ids = torch.randint(0, 1000, (1, 400 + 37 * i))
    fn(input_ids=ids, labels=ids).loss.backward()
    counts.append(counters["stats"]["unique_graphs"])
print(json.dumps(counts[-1] - counts[1]))
"""

CACHE_SCRIPT = """
import json, time, torch
from benchmarks.works import llama
from torch._dynamo.utils import counters
torch.manual_seed(0)
work = llama(layers=1, hidden=64, intermediate=224, vocab=1000, seq_len=512, dtype=torch.float32, device="cpu")
fn = torch.compile(work.module, backend="mst", options={"mst.chunk_tokens": 128})
start = time.perf_counter()
work.step(fn)
print(json.dumps([time.perf_counter() - start, dict(counters["aot_autograd"]), dict(counters["inductor"])]))
"""


def script(text: str, **env: str) -> Any:
    """Run a script in a process of its own and return what it prints last."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", text], capture_output=True, text=True,
                          env={**os.environ, **env}, check=True)  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def caches() -> tuple[str, str, float, float]:
    """Misses of the outer graph's and the bodies' caches in a second process."""
    with tempfile.TemporaryDirectory() as folder:
        first = script(CACHE_SCRIPT, TORCHINDUCTOR_CACHE_DIR=folder)
        second = script(CACHE_SCRIPT, TORCHINDUCTOR_CACHE_DIR=folder)
    save("cache", {"first": [first], "second": [second]})
    misses = sum(v for stats in second[1:] for k, v in stats.items() if k.endswith(("_miss", "_bypass")))
    hits = second[1].get("autograd_cache_hit", 0)
    return (f"second process: {hits} graphs hit, {first[0]:.0f} s -> {second[0]:.0f} s", "cache misses", misses, 0)


def save(name: str, rows: dict[str, Any]) -> None:
    """Write a work's rows as JSON."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name.replace(',', '').replace(' ', '-')}.json").write_text(json.dumps(rows, indent=1))


def main() -> None:
    """Run what was asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "works", nargs="*", metavar="WORK", help="llama, mlp, head, slope, lengths, cache; all by default"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="smaller mlp and head, for CPUs without bf16 instructions")
    args = parser.parse_args()
    wanted = args.works or ["llama", "mlp", "head", "slope", "lengths", "cache"]
    found: list[tuple[str, str, float, float]] = []
    with Progress(console=Console(stderr=True)) as progress:
        for name in PAIRS:
            if name.split(",")[0].split()[0] in wanted:
                extra = ["--steps", str(args.steps), *(SMALL.get(name, []) if args.small else [])]
                found += compare(name, args.rounds, extra, progress)
        if "slope" in wanted:
            found += slope(progress)
        if "lengths" in wanted:
            found.append(("20 lengths after the first two", "recompilations", script(LENGTHS_SCRIPT), 0))
        if "cache" in wanted:
            found.append(caches())
    table = Table("work", "figure", "mst / inductor", "at most", "")
    for work, figure, ratio, limit in found:
        table.add_row(work, figure, f"{ratio:.2f}", f"{limit:.2f}", "ok" if ratio <= limit else "MISSED")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
