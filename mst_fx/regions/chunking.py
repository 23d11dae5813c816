"""What the chunking passes share: from a legal region to a planned, compiled, rewritten one."""

from __future__ import annotations

import itertools
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mst_fx.body import Body, trace_backward, trace_forward, trace_sum
from mst_fx.context import Context
from mst_fx.extended import add, adder
from mst_fx.graph import fake, fake_tensor, module_path, size_hint, tensors_in
from mst_fx.inductor import compile_body, global_settings, storage_of
from mst_fx.ops import BODIES, CompiledBody
from mst_fx.plan import ChunkPlan, plan_chunks
from mst_fx.printing import body_code
from mst_fx.regions.fold import Fold, folds
from mst_fx.regions.lift import Lifted, Output, lift
from mst_fx.regions.projections import read_projection
from mst_fx.regions.region import Region, region_key
from mst_fx.regions.rewrite import find_place, replace
from mst_fx.report import BodyCode, Mismatch, RegionReport
from mst_fx.sums import is_extended, sum_itemsize

log = logging.getLogger(__name__)


SYMBOLIC_TOKENS = 2**14
"""One graph serves every length of a symbolic T, so it is planned for a long one; short ones are one chunk."""


class BodyError(Exception):
    """A body could not be traced or compiled; the region stays as it was."""


def plan_region(lifted: Lifted, context: Context) -> ChunkPlan | Mismatch:
    """Decide on chunk sizes from shapes."""
    region = lifted.region
    trains, device = lifted.trains, lifted.body.chunked[0].device.type
    wide = planned_bytes(region, lifted, device, trains)
    narrow = sum(_row_bytes(s.shape, s.dtype) for s in lifted.body.chunked) + sum(
        _row_bytes((), _dtype(o.node)) * max(1, _features(o)) for o in lifted.outputs
    )
    trained = [s for s in lifted.body.shared if s.needs_grad]
    accumulate = context.config.accumulate
    accumulators = sum(math.prod(s.shape) * sum_itemsize(s.dtype, accumulate, s.shape, s.device) for s in trained)
    if region.partial_sums:
        accumulators += sum(_row_bytes(s.shape, s.dtype) for s in trained)
    plan = plan_chunks(
        kind=region.kind,
        tokens=planned_tokens(lifted),
        wide_bytes=wide,
        narrow_bytes=narrow,
        accumulator_bytes=accumulators if trains else 0,
        chunk_tokens=context.config.chunk_tokens,
        device=device,
        itemsize=min((s.dtype.itemsize for s in lifted.body.chunked if s.dtype.is_floating_point), default=4),
        row_weights=region.row_weights,
        wider_sums=any(sum_itemsize(s.dtype, accumulate, s.shape, s.device) > s.dtype.itemsize for s in trained),
    )
    return plan if isinstance(plan, ChunkPlan) else Mismatch(plan, region.source)


def planned_tokens(lifted: Lifted) -> int:
    """Return the number of tokens that a region is planned for; a guess where it is symbolic."""
    return lifted.tokens if isinstance(lifted.tokens, int) else max(size_hint(lifted.tokens), SYMBOLIC_TOKENS)


def planned_bytes(region: Region, lifted: Lifted | None, device: str, trains: bool) -> int:
    """Return the bytes per token that are wide at a time, gradients included where there are any.

    On a GPU Inductor casts, sums and writes over logits within a kernel, so that what matmuls write counts alone; of
    an MLP's four values and their gradients six exist at a time (both measured on an H100, in bf16).
    """
    if device == "cpu":
        return wide_bytes(region, lifted) * (2 if trains else 1)
    if region.kind != "loss":
        wide = wide_bytes(region, lifted)
        return wide * 3 // 2 if trains else wide
    known = [v for v in map(fake_tensor, region.amplifiers) if v is not None]
    wide = sum(size_hint(v.shape[-1]) * v.dtype.itemsize for v in known) + region.row_bytes
    return wide * (2 if trains else 1)


def wide_bytes(region: Region, lifted: Lifted | None = None) -> int:
    """Return the bytes per token of the region's wide values, views counted once."""
    seen: dict[int, int] = {}
    tokens = _rows(region, lifted)
    given = {(storage_of(v), str(v.shape)) for t in region.terminals for v in tensors_in(fake(t))}
    for node in region.nodes:
        for value in tensors_in(fake(node)) if node not in region.fold.nodes else ():
            numel, storage = size_hint(value.numel()), storage_of(value)
            if (storage, str(value.shape)) not in given:
                seen[storage] = max(1, numel // max(1, tokens)) * value.dtype.itemsize
    return sum(seen.values()) + region.row_bytes


def _rows(region: Region, lifted: Lifted | None) -> int:
    """Return how many tokens a region has, as far as is known; 0 if it is not."""
    first = fake_tensor(region.amplifiers[0])
    tokens = size_hint(lifted.tokens) if lifted is not None else 0
    if not tokens and first is not None:
        tokens = size_hint(first.numel()) // max(1, size_hint(first.shape[-1]))
    return tokens


def _row_bytes(shape: Any, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _dtype(node: fx.Node) -> torch.dtype:
    value = fake_tensor(node)
    return torch.float32 if value is None else value.dtype


def _features(output: Output) -> int:
    value = fake_tensor(output.node)
    if value is None or len(output.row.kinds) != value.ndim:
        return 1
    return math.prod(size_hint(s) for s, k in zip(value.shape, output.row.kinds, strict=True) if not k)


def compile_region(body: Body, op: str, plan: ChunkPlan, context: Context) -> str:
    """Trace and compile what the op needs, register it, and return the body's name.

    Raises:
        BodyError: If tracing or compiling fails, or a gradient can't be formed.
    """
    config = context.config
    rows = plan.chunk_tokens
    settings = (config.accumulate, config.compiler, config.inductor, global_settings(), _size_class(body, rows))
    name = body.digest(op, body.needs, *settings)
    if name in BODIES:
        context.bodies[name] = _CODE[name]
        return name
    options = dict(config.inductor)
    try:
        traced, inputs = trace_forward(body, rows)
        outputs = _output_metas(traced)
        forward = compiled = None
        if op == "sum":
            backward = trace_sum(body, rows)
        else:
            forward = compile_body(traced, inputs, config.compiler, options)
            backward = trace_backward(body, rows)
        if backward is not None:
            compiled = compile_body(backward.graph, backward.example_inputs, config.compiler, options)
        trained = [s for s in body.shared if s.needs_grad and backward is not None]
        extends = any(is_extended(s.dtype, config.accumulate, s.shape, s.device) for s in trained)
        adds = adder(config.compiler, options) if extends else add
    except Exception as e:
        raise BodyError(
            f"its body does not compile ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})"
        ) from e
    weight = body.weight if op == "sum" and _rounds_less(body, config.accumulate) else None
    BODIES[name] = CompiledBody(
        body.chunked, body.shared, outputs, forward, compiled, backward, config.accumulate, body.tells_ignored,
        weight, adds, traced,
    )  # fmt: skip
    _CODE[name] = context.bodies[name] = BodyCode(
        name, body_code(traced), body_code(backward.graph) if backward else ""
    )
    return name


def _rounds_less(body: Body, accumulate: str) -> bool:
    """Whether splitting the weight of a sum rounds its gradients less; see NOTE [a weight that rounds nothing]."""
    trained = [s for s in body.shared if s.needs_grad]
    wide = all(sum_itemsize(s.dtype, accumulate, s.shape, s.device) > 2 for s in trained)
    return wide and any(s.dtype == torch.bfloat16 for s in trained)


_CODE: dict[str, BodyCode] = {}


def _size_class(body: Body, rows: int) -> int:
    """Return the order of ``rows``, and ``rows`` itself where a chunk's values come near 2**31 elements.

    Inductor sums more than 4096 rows in a way of its own and counts elements in 32 bits where those of the chunk it is
    shown can be; a body that was compiled for short chunks must not serve long ones.
    """
    widest = max((s for spec in body.inputs for s in spec.shape if isinstance(s, int)), default=1)
    return rows if rows * widest >= 2**30 else rows.bit_length()


def _output_metas(traced: fx.GraphModule) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    output = next(n for n in traced.graph.nodes if n.op == "output")
    metas = [n.meta["val"] for n in output.args[0]]
    return tuple((tuple(int(s) for s in m.shape[1:]), m.dtype) for m in metas)


def chunk_folded(
    region: Region, context: Context, attempt: Callable[[Lifted], RegionReport], behind: bool
) -> RegionReport:
    """Lift a region with what surrounds it and attempt to chunk it so, or else alone.

    Args:
        region: A legal region.
        context: The pass's.
        attempt: Chunks what was lifted; leaves the graph as it is where it does not.
        behind: Whether what is behind the region may be taken in too.
    """
    # Read again: what a projection was found to read may have been replaced with another region's result.
    found = [p for a in region.amplifiers if (p := read_projection(a, region.outer)) and p.tokens not in region.nodes]
    tokens, kinds = {p.tokens for p in found}, {p.kinds for p in found}
    ends = region.given_back() if behind and not region.leaving else []
    if len(tokens) == len(kinds) == 1:
        end = ends[0] if len(ends) == 1 else None
        for fold in folds(region.module, region.nodes, *tokens, *kinds, end, region.outer):
            region.take(fold)
            lifted = lift(region, context.fake_mode)
            if isinstance(lifted, Lifted):
                report = attempt(lifted)
                if report.status == "chunked":
                    return report
                break
        region.take(Fold())
    lifted = lift(region, context.fake_mode)
    return attempt(lifted) if isinstance(lifted, Lifted) else skipped(region, lifted.reason)


def chunk_region(lifted: Lifted, op: str, context: Context, note: str = "") -> RegionReport:
    """Plan, compile and rewrite one lifted region, or report why it stays."""
    region = lifted.region
    if context.allowed is not None and region_key(region) not in context.allowed:
        return skipped(region, "not among the chosen regions", lifted)
    plan = plan_region(lifted, context)
    if isinstance(plan, Mismatch):
        return skipped(region, plan.reason, lifted)
    place = find_place(lifted)
    if isinstance(place, Mismatch):
        return skipped(region, place.reason, lifted)
    try:
        name = compile_region(lifted.body, op, plan, context)
    except BodyError as e:
        _warn_once(f"mst leaves the region at {region.source} as it was: {e}")
        log.debug("body failed", exc_info=True)
        return skipped(region, f"not supported: {e}", lifted)
    replace(lifted, place, op, name, plan.chunk_tokens)
    how = {"sum": "gradients formed in the forward", "map": "recomputed in the backward"}[op]
    if not isinstance(lifted.tokens, int):
        note += f"; chunks and bytes as with {planned_tokens(lifted)} tokens"
    return RegionReport(
        region.kind, region.source, _tokens(lifted), plan.chunk_tokens, plan.num_chunks, plan.bytes_before,
        plan.bytes_after, "chunked", (how if lifted.trains else "forward only") + note, **_where(region), body=name,
    )  # fmt: skip


def skipped(region: Region, reason: str, lifted: Lifted | None = None) -> RegionReport:
    """Report a region left as it was."""
    value = fake_tensor(region.amplifiers[0])
    tokens: Any = "?"
    if lifted is not None:
        tokens = _tokens(lifted)
    elif value is not None:
        count = math.prod(value.shape[:-1]) if region.rows is None else region.rows
        tokens = count if isinstance(count, int) else str(count)
    trains = any(v.requires_grad for n in region.nodes for v in tensors_in(fake(n)))
    wide = _rows(region, lifted) * planned_bytes(region, lifted, "cpu" if value is None else value.device.type, trains)
    if not wide and value is not None:  # its first product could not be followed, so no row of it is known
        wide = size_hint(value.numel()) * value.dtype.itemsize * (2 if trains else 1)
    return RegionReport(region.kind, region.source, tokens, None, None, wide, wide, "skipped", reason, **_where(region))


def _where(region: Region) -> dict[str, Any]:
    """Return where a region is: its module, and the names its nodes have in the graph before."""
    names = [n.meta["mst_origin"] for n in region.nodes if "mst_origin" in n.meta]
    first = region_key(region)
    paths = [p.split(".") for p in map(module_path, region.ends) if p]
    shared = [parts[0] for parts in itertools.takewhile(lambda p: len(set(p)) == 1, zip(*paths, strict=False))]
    return {"path": ".".join(shared), "nodes": (first, *(n for n in names if n != first))}


def _tokens(lifted: Lifted) -> int | str:
    return lifted.tokens if isinstance(lifted.tokens, int) else str(lifted.tokens)


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=2)
