"""One cell: one system on one work, in a process of its own; prints one JSON row.

python -m benchmarks.cell llama --system mst --set seq_len=4096 --option chunk_tokens=1024
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from typing import Any

import torch

from benchmarks.works import WORKS, Work
from mst_fx.measure import peak_over_start
from mst_fx.models import parse_pairs


def compiled(work: Work, system: str, options: dict[str, Any]) -> Any:
    """Return the work's module as the system runs it."""
    if system == "eager":
        return work.module
    if system == "inductor":
        return torch.compile(work.module)
    return torch.compile(work.module, backend="mst", options={f"mst.{k}": v for k, v in options.items()})


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed_step(work: Work, fn: Any, device: str) -> tuple[float, float]:
    """Run one step; returns seconds and the loss."""
    synchronize(device)
    start = time.perf_counter()
    loss = work.step(fn)
    synchronize(device)
    return time.perf_counter() - start, float(loss.sum())


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the cell and return its row."""
    torch.manual_seed(0)
    shapes, options = parse_pairs(args.set), parse_pairs(args.option)
    common = {"dtype": getattr(torch, args.dtype), "device": args.device}
    work = WORKS[args.work](**shapes, **common)
    fn = compiled(work, args.system, options)
    first, _ = timed_step(work, fn, args.device)
    times = []
    for _ in range(args.steps):
        work.clear()
        times.append(timed_step(work, fn, args.device)[0])
    work.clear()
    peak, _ = peak_over_start(lambda: work.step(fn), args.device)
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers", "mst_fx")}
    return {
        "work": args.work, "system": args.system, "shapes": shapes, "options": options, "dtype": args.dtype,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine(),
        "first_s": first, "step_s": statistics.median(times), "steps_s": times, "peak_bytes": peak,
        "compiles": torch._dynamo.utils.counters["stats"]["unique_graphs"], "versions": versions,
    }  # fmt: skip


def main() -> None:
    """Parse the command line, run, print the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--system", choices=["eager", "inductor", "mst"], default="mst")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="SIZE=N")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    print(json.dumps(run(parser.parse_args())))


if __name__ == "__main__":
    main()
