"""Chunk logits and loss.

    logits = linear(h, W); loss = cross_entropy(logits.view(-1, V), labels)
 -> total, dh, dW = mst_fx.sum([h, labels], [W], body, C); loss = total / count

Terms:
    sum: the loss is a scalar sum over tokens; gradients of that sum are formed with it, and the division,
        loss scale and whatever else follows stay outside as ordinary nodes.
    map: the loss stays per token; its backward recomputes the logits.
    returned logits: logits that are outputs of the graph beside the loss; see ``lazy_logits``.

Memory: ``T * V`` logits, their fp32 copy and gradient become ``C * V``, and one accumulator of ``V * H``.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import torch
from torch import fx

from mst_fx.context import Context, Graph
from mst_fx.effects import change_after
from mst_fx.graph import fake_tensor, needs_grad, storages, stride_order
from mst_fx.inductor import storage_of
from mst_fx.lazy_logits import LogitsSpec
from mst_fx.regions.chunking import chunk_folded, chunk_region, planned_tokens, skipped
from mst_fx.regions.coefficients import sum_lifted
from mst_fx.regions.lift import Lifted, Lifter, Output, finish_lift
from mst_fx.regions.losses import ValueSum, read_total
from mst_fx.regions.region import Region, find_regions, region_key
from mst_fx.regions.rewrite import erase_dead, erase_region
from mst_fx.report import Mismatch, RegionReport
from mst_fx.rowform.rows import MixesTokensError, concrete, same_size

_LOGITS_NOTES = {
    "lazy": "; returned logits are lazy",
    "keep": "; returned logits are kept",
    "drop": "; returned logits are dropped",
}


_NO_LOSS = (
    "the logits (or what else is so wide) are returned and no loss is computed from them in this graph; if you train "
    "on them, compute "
    "the loss inside the compiled function, without a graph break between"
)


def chunk_loss(graph: Graph, context: Context) -> list[RegionReport]:
    """Chunk every legal, worthwhile loss of one graph."""
    regions = find_regions(graph.module, context.fake_mode, graph.outer)
    hidden = max((r.in_features for r in regions), default=0)
    losses = [r for r in regions if r.kind == "loss" and not _is_low_rank(r, hidden)]
    several = _of_several(losses)
    reports = {id(r): _chunk(r, graph, context, several) for r in losses if not _is_sliced(r)}
    for region in losses:
        if _is_sliced(region):
            loss = next((r for r in losses if not _is_sliced(r) and _is_slice_of(r, region)), None)
            deferred = None
            if loss is not None and reports[id(loss)].status == "chunked":
                deferred = _defer_whole(region, reports[id(loss)], graph, context)
            if loss is not None and deferred is not None:
                reports[id(loss)] = deferred
            else:
                reports[id(region)] = _chunk(region, graph, context, several)
    return [reports[id(r)] for r in losses if id(r) in reports]


def _is_sliced(region: Region) -> bool:
    """Whether a region is nothing but returned logits, a slice of which ``normalize`` computes apart."""
    returned = region.leaving and not region.terminals and not region.problems
    return bool(returned) and any("mst_sliced" in a.meta for a in region.amplifiers)


def _is_slice_of(region: Region, whole: Region) -> bool:
    return any(not a.meta.get("mst_slice_of", set()).isdisjoint(whole.amplifiers) for a in region.amplifiers)


def _defer_whole(region: Region, loss: RegionReport, graph: Graph, context: Context) -> RegionReport | None:
    """Put off returned logits of which a slice went into a chunked loss; return the loss's report with a note."""
    if graph.checkpointed:
        return None
    logits = _read_logits(region, graph, context)
    if isinstance(logits, Mismatch):
        return None
    if context.config.logits != "keep":
        for value, head in logits:
            _defer_logits(value, head, graph, context)
        erase_dead(graph.module.graph, region.nodes)
    return dataclasses.replace(loss, reason=loss.reason + _LOGITS_NOTES[context.config.logits])


def _is_low_rank(region: Region, hidden: int) -> bool:
    """Whether nothing wide is summed: a low-rank product widens to no more than the hidden size."""
    return region.wide_features <= hidden and all(isinstance(read_total(t), ValueSum) for t in region.terminals)


def _chunk(region: Region, graph: Graph, context: Context, several: set[int]) -> RegionReport:
    problem = check_loss(region, graph)
    if problem is not None:
        return skipped(region, problem.reason)
    return chunk_folded(region, context, lambda lifted: _attempt(lifted, graph, context, several), behind=False)


def _attempt(lifted: Lifted, graph: Graph, context: Context, several: set[int]) -> RegionReport:
    region = lifted.region
    if not lifted.trains and context.config.logits == "lazy" and any(needs_grad(v) for v, _ in region.leaving):
        return skipped(region, _NO_LOSS, lifted)
    logits = _read_logits(region, graph, context)
    if isinstance(logits, Mismatch):
        return skipped(region, logits.reason, lifted)
    nodes = list(region.nodes)
    lifted, op, note = _choose_op(lifted, graph, context, several)
    if logits:
        note += _LOGITS_NOTES[context.config.logits]
    report = chunk_region(lifted, op, context, note)
    if report.status != "chunked":
        region.nodes[:] = nodes
        erase_dead(graph.module.graph, lifted.built)
    elif context.config.logits != "keep":
        for value, head in logits:
            _defer_logits(value, head, graph, context)
        erase_region(lifted)
    return report


def check_loss(region: Region, graph: Graph) -> Mismatch | None:
    """Return why a loss may not be chunked, None if it may."""
    if not region.terminals and region.leaving:
        if region.problems:
            return Mismatch(f"not legal: {region.problems[0].reason}", region.source)
        return Mismatch(_NO_LOSS, region.source)
    if region.problems:
        return Mismatch(f"not legal: {region.problems[0].reason}", region.source)
    if region.leaving and graph.checkpointed:
        return Mismatch("not legal: the logits leave a checkpointed block", region.source)
    return None


# -- where gradients are formed ----------------------------------------------------------------------


def _choose_op(lifted: Lifted, graph: Graph, context: Context, several: set[int]) -> tuple[Lifted, str, str]:
    """Choose where gradients are formed: in the forward only for one scalar that is linear in per-token values.

    Args:
        lifted: The region.
        graph: Its graph.
        context: The pass's.
        several: From ``_of_several``.
    """
    setting = context.config.loss_gradient
    if not lifted.trains or setting == "recompute":
        return lifted, "map", ""
    # fp16 gradients of an unscaled sum could overflow or underflow where a scaled loss does not; a
    # checkpointed block would form the gradients twice.
    half = any(s.dtype == torch.float16 for s in lifted.body.inputs)
    if setting == "auto" and (half or graph.checkpointed or _keeps_more(lifted, several)):
        return lifted, "map", ""
    summed = sum_lifted(lifted, context.fake_mode)
    if summed is None:
        why = " (the loss is no single scalar sum, or has a gradient of your own)"
        return lifted, "map", "" if setting == "auto" else why
    return summed, "sum", ""


def _of_several(losses: list[Region]) -> set[int]:
    """Return the storages of weights that more than one loss reads which trains."""
    counts: Counter[int] = Counter()
    for region in losses:
        if region.legal and any(map(needs_grad, region.terminals)):
            counts.update(set().union(*(storages(p.weight) for p in region.projections.values())))
    return {storage for storage, count in counts.items() if count > 1}


def _keeps_more(lifted: Lifted, several: set[int]) -> bool:
    """Whether several losses would each keep a gradient of one weight, larger than their logits, to the backward."""
    logits = planned_tokens(lifted) * lifted.region.wide_features
    shared = any(storages(i.node) & several for i in [*lifted.shared, *lifted.placeholders.values()])
    return shared and any(s.needs_grad and math.prod(s.shape) > logits for s in lifted.body.shared)


# -- returned logits ---------------------------------------------------------------------------------


def _read_logits(region: Region, graph: Graph, context: Context) -> list[tuple[fx.Node, Any]] | Mismatch:
    """Lift the head alone for every logits value that is returned."""
    heads = []
    for value in dict.fromkeys(v for v, _ in region.leaving):
        try:
            lifter = Lifter(region, context.fake_mode)
            lifter.record()
            head = finish_lift(lifter, [Output(value, lifter.rows[value])], hoist=False)
            if head.body.has_seed:
                raise MixesTokensError("they are random")
            if context.config.logits == "lazy" and _changes_later(head):
                return Mismatch(
                    "not supported: what the returned logits are made of changes in place before they are read",
                    region.source,
                )
            known = fake_tensor(value)
            shapes = [i.live_in.shape for i in [*head.chunked, *head.shared]]
            if known is None or any(_size_source(s, head) is None for shape in (known.shape, *shapes) for s in shape):
                return Mismatch(
                    "not supported: the returned logits have a size that can't be told later", region.source
                )
            heads.append((value, head))
        except (MixesTokensError, KeyError) as e:
            return Mismatch(f"not supported: the returned logits can't be computed apart ({e})", region.source)
    return heads


def _changes_later(head: Lifted) -> bool:
    """Whether something that the logits are computed from changes in place in this graph once they are there."""
    sources = [*head.chunked, *head.shared]
    return change_after(head.region.amplifiers[0], set().union(*(storages(source.node) for source in sources)))


def _defer_logits(value: fx.Node, head: Lifted, graph: Graph, context: Context) -> None:
    """Take logits out of the graph's outputs, and put in what computing them later needs."""
    module = graph.module
    output = next(n for n in module.graph.nodes if n.op == "output")
    slots = [i for i, n in enumerate(output.args[0]) if n is value]
    results: list[Any] = list(output.args[0])
    fake = fake_tensor(value)
    assert fake is not None
    if context.config.logits == "drop":
        context.logits += [LogitsSpec(i, None) for i in slots]
    else:
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        sources = []
        for source in [*head.chunked, *head.shared]:
            if source.node in placeholders:
                sources.append(("arg", placeholders.index(source.node)))
                continue
            with module.graph.inserting_before(output):
                results.append(module.graph.call_method("detach", (source.node,)))
            results[-1].meta["mst_region"] = region_key(head.region)
            sources.append(("out", len(results) - 1))
        kinds = head.outputs[0].row.kinds
        order = [d for d, k in enumerate(kinds) if k] + [d for d, k in enumerate(kinds) if not k]
        spec = LogitsSpec(
            slots[0], head.body.graph, tuple(sources), len(head.chunked),
            tuple(tuple(_size_source(s, head) for s in i.live_in.shape) for i in [*head.chunked, *head.shared]),
            tuple(_flattening(i) for i in head.chunked),
            tuple(_size_source(s, head) for s in fake.shape), tuple(order), fake.dtype, fake.requires_grad,
            storage_of(fake), *_layout(fake, order),
        )  # fmt: skip
        context.logits += [dataclasses.replace(spec, slot=i) for i in slots]
    for i in slots:
        results[i] = None
    output.args = (tuple(results),)


def _layout(fake: torch.Tensor, order: list[int]) -> tuple[tuple[tuple[int, ...], int] | None, bool]:
    """Return where a value lies in its memory, and whether it is all of it in the order in which it is computed."""
    strides, offset = tuple(map(concrete, fake.stride())), concrete(fake.storage_offset())
    if not all(isinstance(n, int) for n in (*strides, offset)):
        return None, False
    dense, size = stride_order(fake), fake.numel() * fake.dtype.itemsize
    whole = dense is not None and [d for d in order if d in dense] == dense
    return (strides, offset), whole and concrete(fake.untyped_storage().nbytes()) == concrete(size)


def _flattening(source: Any) -> tuple[int, ...]:
    kinds = source.live_in.kinds
    return (*(d for d, k in enumerate(kinds) if k), *(d for d, k in enumerate(kinds) if not k), sum(kinds))


def _size_source(size: Any, head: Lifted) -> Any:
    if isinstance(size, int):
        return size
    for i, source in enumerate(head.chunked):
        for d, s in enumerate(source.live_in.tensor.shape):
            if same_size(s, size):
                return (i, d)
    return (0, -1) if same_size(size, head.tokens) else None
