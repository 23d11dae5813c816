"""Step times of plain Inductor and mst, step by step by turns in one process: a drift of the machine hits both.

    python -m benchmarks.interleaved llama --set checkpointing=true --option chunk_tokens=1024 [--steps 6]

For times only; memory and the first step need processes of their own (``benchmarks.figures``).
"""

from __future__ import annotations

import argparse
import statistics

import torch

from benchmarks.cell import compiled, timed_step
from benchmarks.figures import save
from benchmarks.works import WORKS
from mst_fx.models import parse_pairs


def main() -> None:
    """Parse the command line, run, print the ratio, save the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--set", action="append", default=[], metavar="SIZE=N")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    shapes, options = parse_pairs(args.set), parse_pairs(args.option)
    work = WORKS[args.work](**shapes, dtype=getattr(torch, args.dtype), device=args.device)
    functions = {system: compiled(work, system, options) for system in ("inductor", "mst")}
    times: dict[str, list[float]] = {system: [] for system in functions}
    for step in range(args.steps + 1):
        for system, fn in functions.items():
            work.clear()
            seconds, _ = timed_step(work, fn, args.device)
            if step:  # the first one compiles
                times[system].append(seconds)
    plain, ours = (statistics.median(times[s]) for s in functions)
    ratios = [b / a for a, b in zip(*times.values(), strict=True)]
    row = {"work": args.work, "shapes": shapes, "options": options, "dtype": args.dtype, "torch": torch.__version__,
           "steps_s": times, "ratio_of_medians": ours / plain, "median_ratio": statistics.median(ratios)}  # fmt: skip
    save("-".join(["interleaved", args.work, *(k for k, v in shapes.items() if v is True)]), row)
    print(f"step time {plain:.2f} -> {ours:.2f} s, ratio of medians {ours / plain:.2f}, "
          f"median of paired ratios {statistics.median(ratios):.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
