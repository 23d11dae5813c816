"""One cell: one system on one work, in a process of its own; prints one JSON row.

python -m mst_fx.bench.cell llama --system mst --set seq_len=4096 --option chunk_tokens=1024
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mst_fx.bench.systems import SYSTEMS, UnavailableError
from mst_fx.bench.works import WORKS, Work
from mst_fx.commands.models import DTYPES, UsageError, parse_pairs
from mst_fx.measure import keep_freed_memory

Row = dict[str, Any]
OUT_OF_MEMORY = "out of memory"
AS_MADE = "as made"
"""The dtype of a model of the user's that is to be left alone."""


def device_name(device: str) -> str:
    """Return what the device calls itself."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
        if name:
            return f"{name}, {torch.get_num_threads()} threads"
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of what is measured, where installed."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "mst_fx", "liger-kernel", "cut-cross-entropy", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def timed_step(work: Work, fn: Any, device: str) -> float:
    """Run one step and return its seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work.step(fn)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def gradient_error(work: Work, fn: Callable[..., Any]) -> float:
    """Return the relative error of all weight gradients together against fp64."""
    work.clear()
    work.step(fn)
    wide = work.in_double()
    wide.clear()
    wide.step(wide.module)
    truth = wide.gradients()
    off = sum((g.double() - truth[n]).square().sum() for n, g in work.gradients().items())
    return float((off / sum(g.square().sum() for g in truth.values())) ** 0.5)


def describe(work: str, shapes: Mapping[str, Any], options: Mapping[str, Any], dtype: str, device: str) -> Row:
    """Return what a row says about itself, measured or not."""
    return {
        "work": work, "shapes": shapes, "options": options, "dtype": dtype, "device": device_name(device),
        "versions": versions(),
    }  # fmt: skip


def told(error: Exception) -> str:
    """Return in one line why a system could not run."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    full = isinstance(error, torch.OutOfMemoryError) or OUT_OF_MEMORY in str(error).lower()
    return OUT_OF_MEMORY if full else lines[0]


def run(args: argparse.Namespace) -> Row:
    """Run the cell and return its row; a system that can't run is a row with a ``reason``."""
    torch.manual_seed(0)
    shapes, options = parse_pairs(args.set), parse_pairs(args.option)
    row = {"system": args.system, **describe(args.work, shapes, options, args.dtype, args.device)}
    try:
        work = WORKS[args.work](**shapes, dtype=DTYPES.get(args.dtype), device=args.device)
        fn = SYSTEMS[args.system](work, options)
        first = timed_step(work, fn, args.device)
        peak = {}
        if not args.no_peak:
            if args.steps:
                work.clear()
                work.step(fn)  # a second step may still take what later ones have
            peak["peak_bytes"] = work.peak(fn, args.device)
            keep_freed_memory()
        times = []
        for _ in range(args.steps):
            work.clear()
            times.append(timed_step(work, fn, args.device))
    except (UnavailableError, UsageError, torch.OutOfMemoryError) as e:
        return {**row, "reason": told(e)}
    step = statistics.median(times) if times else first
    row |= {"first_s": first, "step_s": step, "steps_s": times, **peak, "tokens_per_s": work.tokens / step,
            "compiles": torch._dynamo.utils.counters["stats"]["unique_graphs"]}  # fmt: skip
    if args.device == "cuda":
        row |= {
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    if args.error:
        row["gradient_error"] = gradient_error(work, fn)
    return row


def parser() -> argparse.ArgumentParser:
    """Return the arguments of a cell."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("work", choices=WORKS)
    found.add_argument("--system", choices=SYSTEMS, default="mst")
    found.add_argument("--dtype", choices=[*DTYPES, AS_MADE], default="float32")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--steps", type=int, default=3)
    found.add_argument("--set", action="append", default=[], metavar="SIZE=N")
    found.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    found.add_argument("--no-peak", action="store_true", help="times alone")
    found.add_argument("--error", action="store_true", help="compare the weight gradients with fp64 too")
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(parser().parse_args())) + "\n")
