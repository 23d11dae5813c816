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

from mst_fx.measure import MALLOC_ENV, prepare_compiler

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


def compare(name: str, rounds: int, extra: list[str], progress: Progress) -> None:
    """Alternate plain Inductor and mst on one work and save the rows."""
    shared, ours, _ = PAIRS[name]
    rows: dict[str, list[dict[str, Any]]] = {"inductor": [], "mst": []}
    task = progress.add_task(name, total=2 * rounds)
    for _ in range(rounds):
        for system in rows:
            options = ours if system == "mst" else []
            rows[system].append(cell([*shared, *extra, "--system", system, *options]))
            progress.advance(task)
    save(name, rows)


def slope(progress: Progress) -> None:
    """Measure the peak at S 2048 and 8192 under checkpointing."""
    task = progress.add_task("slope", total=4)
    rows: dict[str, list[dict[str, Any]]] = {"inductor": [], "mst": []}
    for length in (2048, 8192):
        for system in rows:
            options = CHUNK if system == "mst" else []
            arguments = ["llama", *CHECKPOINTING, "--set", f"seq_len={length}", "--steps", "1", "--system", system]
            rows[system].append(cell([*arguments, *options]))
            progress.advance(task)
    save("slope", rows)


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


def lengths() -> None:
    """Count recompilations over 20 sequence lengths after the first two."""
    save("lengths", {"recompilations": script(LENGTHS_SCRIPT)})


def caches() -> None:
    """Compile the same model in two processes that share a cache folder."""
    with tempfile.TemporaryDirectory() as folder:
        first = script(CACHE_SCRIPT, TORCHINDUCTOR_CACHE_DIR=folder)
        second = script(CACHE_SCRIPT, TORCHINDUCTOR_CACHE_DIR=folder)
    save("cache", {"first": first, "second": second})


def save(name: str, rows: dict[str, Any]) -> None:
    """Write a work's rows as JSON."""
    RESULTS.mkdir(exist_ok=True)
    _path(name).write_text(json.dumps(rows, indent=1) + "\n")


def _path(name: str) -> Path:
    return RESULTS / f"{name.replace(',', '').replace(' ', '-')}.json"


def load(name: str) -> dict[str, Any] | None:
    """Return a work's saved rows, None where it was not run."""
    return json.loads(_path(name).read_text()) if _path(name).exists() else None


# -- tables from saved rows --------------------------------------------------------------------------

Figure = tuple[str, str, str, float, float]
"""Work, what was measured (plain -> mst), figure, ratio or count, greatest asked for."""
UNITS = {
    "peak_bytes": ("peak over start", 2**20, "MiB"),
    "step_s": ("step time", 1, "s"),
    "first_s": ("first step", 1, "s"),
}


def figures() -> list[Figure]:
    """Return every figure whose rows are saved."""
    found: list[Figure] = []
    for name, (_, _, asked) in PAIRS.items():
        rows = load(name)
        if rows is None:
            continue
        for figure, limit in asked.items():
            plain, ours = (statistics.median(r[figure] for r in rows[s]) for s in ("inductor", "mst"))
            title, unit, symbol = UNITS[figure]
            sizes = ", ".join(f"{k} {v}" for k, v in rows["mst"][0]["shapes"].items() if k != "checkpointing")
            work = f"{name} ({sizes})" if sizes else name
            found.append((work, f"{plain / unit:.1f} -> {ours / unit:.1f} {symbol}", title, ours / plain, limit))
    for name, limit in (("interleaved-llama", 1.00), ("interleaved-llama-checkpointing", 1.03)):
        if row := load(name):
            plain, ours = (statistics.median(row["steps_s"][s]) for s in ("inductor", "mst"))
            work = f"{name.removeprefix('interleaved-').replace('-', ', ')}, step by step by turns"
            found.append((work, f"{plain:.1f} -> {ours:.1f} s", "step time", ours / plain, limit))
    if rows := load("slope"):
        plain, ours = (
            (r[1]["peak_bytes"] - r[0]["peak_bytes"]) / (8192 - 2048) for r in (rows["inductor"], rows["mst"])
        )
        work = "llama, checkpointing, S 2048 to 8192"
        found.append((work, f"{plain:.0f} -> {ours:.0f} B/token", "slope of the peak", ours / plain, 0.15))
    if rows := load("lengths"):
        found.append(("20 sequence lengths after the first two", "", "recompilations", rows["recompilations"], 0))
    if rows := load("cache"):
        misses = sum(v for stats in rows["second"][1:] for k, v in stats.items() if k.endswith(("_miss", "_bypass")))
        seconds = f"{rows['first'][0]:.0f} -> {rows['second'][0]:.0f} s"
        found.append(("second process, same model", seconds, "cache misses", misses, 0))
    return found


def write_readme() -> None:
    """Put the table of saved rows between the README's markers."""
    readme = Path(__file__).parent.parent / "README.md"
    text = readme.read_text()
    start, end = "<!-- figures -->", "<!-- end of figures -->"
    lines = ["| work | plain Inductor -> mst | figure | ratio | asked |", "| --- | --- | --- | --- | --- |"]
    for work, values, figure, ratio, limit in figures():
        met = f"at most {limit:g}" + ("" if ratio <= limit else ", **missed**")
        lines.append(f"| {work} | {values} | {figure} | {ratio:.2f} | {met} |")
    before, rest = text.split(start)
    readme.write_text(f"{before}{start}\n" + "\n".join(lines) + f"\n{end}{rest.split(end)[1]}")


def main() -> None:
    """Run what was asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "works", nargs="*", metavar="WORK", help="llama, mlp, head, slope, lengths, cache; all by default"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="smaller mlp and head, for CPUs without bf16 instructions")
    parser.add_argument(
        "--readme", action="store_true", help="run nothing; write the table of saved rows into README.md"
    )
    args = parser.parse_args()
    if args.readme:
        write_readme()
        return
    wanted = args.works or ["llama", "mlp", "head", "slope", "lengths", "cache"]
    prepare_compiler(dict(os.environ))
    with Progress(console=Console(stderr=True)) as progress:
        for name in PAIRS:
            if name.split(",")[0].split()[0] in wanted:
                extra = ["--steps", str(args.steps), *(SMALL.get(name, []) if args.small else [])]
                compare(name, args.rounds, extra, progress)
        if "llama" in wanted:
            for extra in ([], CHECKPOINTING):
                command = [sys.executable, "-W", "ignore", "-m", "benchmarks.interleaved", "llama", *extra, *CHUNK]
                subprocess.run(command, check=True, capture_output=True)
        if "slope" in wanted:
            slope(progress)
        if "lengths" in wanted:
            lengths()
        if "cache" in wanted:
            caches()
    table = Table("work", "plain Inductor -> mst", "figure", "ratio", "at most", "")
    for work, values, figure, ratio, limit in figures():
        table.add_row(work, values, figure, f"{ratio:.2f}", f"{limit:g}", "ok" if ratio <= limit else "MISSED")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
