"""Bytes that a loop over chunks needs beyond its results: one chunk's values, and its accumulators."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from mst_fx.body import Term
from mst_fx.diff.steps import build_program, flat, simulate, value_bytes
from mst_fx.graph import size_hint
from mst_fx.inductor import cpu_multiplies, partition, storage_of
from mst_fx.ops import BODIES, MAP, SUM, CompiledBody
from mst_fx.pipeline import copy_graph
from mst_fx.sums import PRODUCT_BLOCK_BYTES, sum_dtype, sum_itemsize

_LOOPS = {MAP, SUM, torch.ops.mst_fx.map_backward.default}


def loop_bytes(node: fx.Node) -> int:
    """Return the bytes a loop over chunks needs beyond its results; 0 for other nodes."""
    if node.target not in _LOOPS:
        return 0
    offset = 1 if node.target is torch.ops.mst_fx.map_backward.default else 0
    chunked, _, _, name, chunk_tokens = node.args[offset:]
    found = BODIES[str(name)]
    rows = min(int(chunk_tokens), size_hint(chunked[0].meta["val"].shape[0]))  # pyright: ignore
    if node.target is MAP:
        return _body_bytes(found.graph, rows)[0]
    return _gradient_bytes(found, node, rows)


def _gradient_bytes(found: CompiledBody, node: fx.Node, rows: int) -> int:
    """Return what ``ops._run_backward`` needs beyond its results: a chunk, accumulators, and casts of these."""
    plan = found.plan
    assert plan is not None
    peak, results = _body_bytes(plan.graph, rows)
    values = [value_bytes(v) for v in flat(node.meta["val"])]
    first = len(values) - len(plan.chunked) - len(plan.shared)
    row_bytes = sum(values[first : first + len(plan.chunked)])
    wide = max((_wide_bytes(found, p, t, results, rows) for p, terms in plan.shared.items() for t in terms), default=0)
    sums = {p: [_sum_bytes(found, p, t) for t in terms] for p, terms in plan.shared.items()}
    remaining = sum(map(sum, sums.values()))
    most = remaining + max(peak, sum(value_bytes(v, rows) for v in results) + wide)
    done = 0
    for position, terms in plan.shared.items():
        spec = found.shared[position]
        gradient = math.prod(spec.shape) * spec.dtype.itemsize
        copied = (
            len(terms) > 1
            or any(_sum_dtype(found, position, t) != spec.dtype for t in terms)
            or not all(_is_contiguous(t, spec.shape) for t in terms)
        )
        most = max(most, done + remaining + (gradient if copied else 0))
        remaining -= sum(sums[position])
        done += gradient
    return max(0, row_bytes + most - sum(values))


def _sum_dtype(found: CompiledBody, position: int, term: Term) -> torch.dtype:
    return sum_dtype(found.shared[position].dtype, found.accumulate, term.shape)


def _sum_bytes(found: CompiledBody, position: int, term: Term) -> int:
    spec = found.shared[position]
    return math.prod(term.shape) * sum_itemsize(spec.dtype, found.accumulate, term.shape, spec.device)


def _wide_bytes(found: CompiledBody, position: int, term: Term, results: list[Any], rows: int) -> int:
    """Return what adding one product to its accumulator needs, see NOTE [fp32 sums on a CPU]."""
    if len(term.outputs) == 1 or found.shared[position].device.type != "cpu":
        return 0
    factor, dtype = results[term.outputs[1]], _sum_dtype(found, position, term)
    if factor.dtype == dtype and _sum_bytes(found, position, term) == math.prod(term.shape) * dtype.itemsize:
        return 0
    wide = torch.promote_types(dtype, torch.float32)
    widened = 0 if cpu_multiplies(factor.dtype) else value_bytes(factor, rows) // factor.dtype.itemsize * wide.itemsize
    return widened + PRODUCT_BLOCK_BYTES


def _is_contiguous(term: Term, shape: Iterable[int]) -> bool:
    total = torch.empty(term.shape, device="meta")
    laid = total if term.layout is None else term.layout(total)
    same = storage_of(laid) == storage_of(total)
    return same and laid.reshape(tuple(shape)).is_contiguous()


def _body_bytes(graph: fx.GraphModule | None, rows: int) -> tuple[int, list[Any]]:
    """Return the live bytes of a body over one chunk at its peak, and its results' fake values."""
    if graph is None:
        return 0, []
    key = "mst_body_bytes", rows
    if key not in graph.meta:
        lowered, _ = partition(copy_graph(graph), True)
        program = build_program(lowered, "forward", {})
        for step in program.steps:
            values = flat(step.node.meta["val"])
            step.writes = {k: value_bytes(values[k.result], rows) for k in step.writes}
        output = next(n for n in graph.graph.nodes if n.op == "output")
        results = [n.meta["val"] for n in output.args[0]]  # pyright: ignore
        peak = max((m.live_bytes for m in simulate(program, {}, set(), set())), default=0)
        graph.meta[key] = peak, results
    return graph.meta[key]
