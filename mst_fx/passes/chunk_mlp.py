"""Chunk wide intermediates between projections.

    gate = linear(x, Wg); up = linear(x, Wu); y = linear(silu(gate) * up, Wd)
 -> y = mst_fx.map([x], [Wg, Wu, Wd], body, C)

The norm in front, and the norm and the residual behind, go with it: see ``fold``.

Memory: ``T * I`` values per wide intermediate become ``C * I``, and one fp32 accumulator per trained weight. A wide
value that is returned becomes an output of the region where that leaves most of the bytes to be saved.
Not handled: a wide value that is also read by something that mixes tokens.
"""

from __future__ import annotations

from mst_fx.context import Context, Graph
from mst_fx.regions.chunking import chunk_folded, chunk_region, skipped, wide_bytes
from mst_fx.regions.region import Region, find_regions
from mst_fx.report import Mismatch, RegionReport

LEAST_SAVED = 0.6
"""Least share of a region's wide bytes that must stay inside where some of them are returned."""


def chunk_mlp(graph: Graph, context: Context) -> list[RegionReport]:
    """Chunk every legal, worthwhile MLP of one graph."""
    regions = find_regions(graph.module, context.fake_mode, graph.outer)
    hidden = max((r.in_features for r in regions), default=0)
    reports = []
    for region in regions:
        # A low-rank product widens to no more than the hidden size: nothing wide is made, nothing to report.
        if region.kind == "mlp" and (region.legal or region.wide_features > hidden):
            reports.append(_chunk(region, context))
    return reports


def _chunk(region: Region, context: Context) -> RegionReport:
    problem = check_mlp(region)
    if problem is not None:
        return skipped(region, problem.reason)
    returned = list(dict.fromkeys(v for v, _ in region.leaving))
    wide, region.terminals = wide_bytes(region), region.terminals + [v for v in returned if v not in region.terminals]
    if wide_bytes(region) < LEAST_SAVED * wide:
        return skipped(region, f"not legal: the wide value `{returned[0].name}` is returned")
    note = f"; the wide value `{returned[0].name}` is returned whole" if returned else ""
    return chunk_folded(region, context, lambda lifted: chunk_region(lifted, "map", context, note), behind=True)


def check_mlp(region: Region) -> Mismatch | None:
    """Return why a region may not be chunked, None if it may."""
    if region.problems:
        return Mismatch(f"not legal: {region.problems[0].reason}", region.source)
    if not region.terminals:
        return Mismatch("not legal: the wide value is never narrowed again", region.source)
    return None
