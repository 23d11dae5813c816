"""Chunk mixtures of experts.

    ids [T, k] -> sort, index, grouped product, silu * mul, grouped product, inverse index, sum over k -> y [T, H]
 -> y = mst_fx.map([x, ids, weights], [gate_up, down], body, C)

Memory: k rows of several I per token become those of a chunk, and one accumulator per trained weight.
Not handled: experts that are looped over, rows dropped by a capacity, offsets or orders made of anything but the ids.
"""

from __future__ import annotations

from mst_fx.context import Context, Graph
from mst_fx.regions.chunking import chunk_region, skipped
from mst_fx.regions.experts import find_experts
from mst_fx.report import Mismatch, RegionReport


def chunk_experts(graph: Graph, context: Context) -> list[RegionReport]:
    """Chunk every legal, worthwhile mixture of experts of one graph."""
    reports = []
    for experts in find_experts(graph.module, context.fake_mode):
        lifted = experts.lift()
        if isinstance(lifted, Mismatch):
            reports.append(skipped(experts.region, lifted.reason))
        else:
            reports.append(chunk_region(lifted, "map", context))
    return reports
