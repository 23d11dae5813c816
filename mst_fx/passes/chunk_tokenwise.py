"""Chunk modules that their user declared token-wise.

    y = tokenwise_call(key, {"w": w}, (x,), {})
 -> y = mst_fx.map([x], [w], body, C)

Memory: all that the module keeps for its backward becomes that of one chunk, and one accumulator per weight.
"""

from __future__ import annotations

from mst_fx.context import Context, Graph
from mst_fx.regions.chunking import chunk_region, skipped
from mst_fx.regions.promise_check import check_promise
from mst_fx.regions.promised import find_calls, lift_call, region_of
from mst_fx.report import Mismatch, RegionReport


def chunk_tokenwise(graph: Graph, context: Context) -> list[RegionReport]:
    """Chunk every worthwhile call of a promised module.

    Raises:
        PromiseError: Under ``verify_tokenwise``, if a promise is false.
    """
    reports = []
    for call, autocast in find_calls(graph.module):
        region = region_of(graph.module, call)
        lifted = lift_call(region, context.fake_mode, autocast)
        if isinstance(lifted, Mismatch):
            reports.append(skipped(region, lifted.reason))
            continue
        if context.config.verify_tokenwise:
            check_promise(lifted.body)
        reports.append(chunk_region(lifted, "map", context))
    return reports
