"""Step times of several systems in one process, one step each in turn: a drift of the machine hits all alike.

    python -m mst_fx.bench.turns llama --systems inductor,mst --set checkpointing=true --steps 6

For times only; memory and the first step need processes of their own. Besides seconds by the clock each step's
seconds of processor time are kept: with one thread (``OMP_NUM_THREADS=1``) they hardly change when others use the
machine.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch

from mst_fx.bench.cell import describe, parser, timed_step
from mst_fx.bench.systems import SYSTEMS, UnavailableError
from mst_fx.bench.works import WORKS
from mst_fx.models import DTYPES, parse_pairs


def run(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the systems by turns and return one row for all."""
    found = parser()
    found.description = __doc__
    found.add_argument("--systems", default="inductor,mst")
    args = found.parse_args(argv)
    torch.manual_seed(0)
    shapes, options = parse_pairs(args.set), parse_pairs(args.option)
    work = WORKS[args.work](**shapes, dtype=DTYPES[args.dtype], device=args.device)
    row = {**describe(args, shapes, options), "reasons": {}}
    functions: dict[str, Any] = {}
    for system in args.systems.split(","):
        try:
            functions[system] = SYSTEMS[system](work, options)
        except UnavailableError as e:
            row["reasons"][system] = str(e)
    times: dict[str, list[float]] = {system: [] for system in functions}
    processor: dict[str, list[float]] = {system: [] for system in functions}
    for step in range(args.steps + 1):
        for system, fn in functions.items():
            work.clear()
            start = time.process_time()
            seconds = timed_step(work, fn, args.device)
            if step:  # the first one compiles
                times[system].append(seconds)
                processor[system].append(time.process_time() - start)
    row |= {"steps_s": times, "cpu_s": processor, "ratios": _ratios(times), "cpu_ratios": _ratios(processor)}
    del row["system"]
    return row


def _ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Return the median over rounds of every system's time by the first system's in the same round."""
    first = next(iter(times.values()))
    return {s: statistics.median(b / a for a, b in zip(first, t, strict=True)) for s, t in times.items()}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run()) + "\n")
