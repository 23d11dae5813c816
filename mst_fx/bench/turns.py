"""Several systems in one process, one step each in turn: a drift of the machine hits all alike.

    python -m mst_fx.bench.turns llama --systems inductor,mst --set checkpointing=true --steps 6

For times; first steps share caches, and on a CPU a peak counts what the allocator kept of the system before.
Besides seconds by the clock each step's seconds of processor time are kept: with one thread
(``OMP_NUM_THREADS=1``) they hardly change when others use the machine.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

import mst_fx
from mst_fx.bench.cell import describe, parser, timed_step, told
from mst_fx.bench.systems import SYSTEMS, UnavailableError
from mst_fx.bench.works import WORKS, Work
from mst_fx.commands.models import DTYPES, parse_pairs
from mst_fx.measure import keep_freed_memory

Variants = Mapping[str, tuple[str, Mapping[str, Any]]]
"""Label -> system and its options."""


def by_turns(
    work: Work, variants: Variants, steps: int, device: str, *, peaks: bool = False,
    progress: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Run a first step of every variant, then ``steps`` rounds with one step of each.

    Args:
        work: What every variant does; it should hold no optimizer, whose steps would change the next one's work.
        variants: The systems by label.
        steps: Rounds.
        device: Where the work is.
        peaks: Measure the peak of a step over its start too, between first steps and rounds.
        progress: Called with a label and its row before the rounds.

    Returns:
        By label: ``first_s``, ``steps_s`` and ``cpu_s`` (seconds by the clock and of processor time),
        ``chunk_tokens`` of what ours chunked and, if asked for, ``peak_bytes``; or the ``reason`` it can't run.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(variants))
    rows: dict[str, dict[str, Any]] = {}
    functions: dict[str, Callable[..., Any]] = {}
    for label, (system, options) in variants.items():
        work.clear()
        row = rows[label] = {}
        try:
            fn = SYSTEMS[system](work, options)
            row["first_s"] = timed_step(work, fn, device)
            if peaks:
                work.clear()
                timed_step(work, fn, device)
                row["peak_bytes"] = work.peak(fn, device)
        except (UnavailableError, RuntimeError) as e:
            row["reason"] = told(e)
        else:
            chunked = mst_fx.reports()[-1].chunked if system.startswith("mst") and mst_fx.reports() else ()
            row |= {"chunk_tokens": [r.chunk_tokens for r in chunked], "steps_s": [], "cpu_s": []}
            functions[label] = fn
        if progress is not None:
            progress(label, row)
    if peaks:
        keep_freed_memory()
    for _ in range(steps):
        for label, fn in functions.items():
            work.clear()
            start = time.process_time()
            rows[label]["steps_s"].append(timed_step(work, fn, device))
            rows[label]["cpu_s"].append(time.process_time() - start)
    work.clear()
    return rows


def run(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the systems by turns and return one row for all."""
    found = parser()
    found.description = __doc__
    found.add_argument("--systems", default="inductor,mst")
    args = found.parse_args(argv)
    torch.manual_seed(0)
    shapes, options = parse_pairs(args.set), parse_pairs(args.option)
    work = WORKS[args.work](**shapes, dtype=DTYPES.get(args.dtype), device=args.device)
    rows = by_turns(work, {s: (s, options) for s in args.systems.split(",")}, args.steps, args.device)
    good = {s: r for s, r in rows.items() if "reason" not in r}
    times, processor = ({s: r[key] for s, r in good.items()} for key in ("steps_s", "cpu_s"))
    return {
        **describe(args.work, shapes, options, args.dtype, args.device),
        "reasons": {s: r["reason"] for s, r in rows.items() if "reason" in r},
        "steps_s": times, "cpu_s": processor, "ratios": ratios(times), "cpu_ratios": ratios(processor),
    }  # fmt: skip


def ratios(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the median over rounds of every system's time by the first system's in the same round."""
    first = next(iter(times.values()), [])
    return {s: median_ratio(t, first) for s, t in times.items()}


def median_ratio(times: list[float], base: list[float]) -> float:
    """Return the median over rounds of one system's time by another's in the same round."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run()) + "\n")
