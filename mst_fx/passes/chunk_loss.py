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
from typing import Any

import torch
from torch import fx

from mst_fx.chunking import Context, Graph, chunk_region, skipped
from mst_fx.graph import fake_tensor
from mst_fx.lazy_logits import LogitsSpec
from mst_fx.lift import Lifted, Lifter, Output, finish_lift, lift
from mst_fx.region import Region, find_regions, region_key
from mst_fx.report import Mismatch, RegionReport
from mst_fx.rewrite import erase_dead
from mst_fx.rows import MixesTokensError, same_size

_LOGITS_NOTES = {
    "lazy": "; returned logits are lazy",
    "keep": "; returned logits are kept",
    "drop": "; returned logits are dropped",
}


def chunk_loss(graph: Graph, context: Context) -> list[RegionReport]:
    """Chunk every legal, worthwhile loss of one graph."""
    regions = [r for r in find_regions(graph.module, context.fake_mode, graph.outer) if r.kind == "loss"]
    return [_chunk(region, graph, context) for region in regions]


def _chunk(region: Region, graph: Graph, context: Context) -> RegionReport:
    problem = check_loss(region, graph)
    if problem is not None:
        return skipped(region, problem.reason)
    lifted = lift(region, context.fake_mode)
    if isinstance(lifted, Mismatch):
        return skipped(region, lifted.reason)
    logits = _read_logits(region, lifted, graph, context)
    if isinstance(logits, Mismatch):
        return skipped(region, logits.reason, lifted)
    lifted, reductions = _reduced(lifted)
    op, note = _choose_op(lifted, reductions, graph, context)
    if logits:
        note += _LOGITS_NOTES[context.config.logits]
    report = chunk_region(lifted, op, reductions, context, note)
    if report.status == "chunked" and context.config.logits != "keep":
        for value, head in logits:
            _defer_logits(value, head, graph, context)
        erase_dead(graph.module.graph, region.nodes)
    return report


def check_loss(region: Region, graph: Graph) -> Mismatch | None:
    """Return why a loss may not be chunked, None if it may."""
    if not region.terminals and region.leaving:
        if region.problems:
            return Mismatch(f"not legal: {region.problems[0].reason}", region.source)
        return Mismatch(
            "the logits are returned and no loss is computed from them in this graph; if you train on them, compute "
            "the loss inside the compiled function, without a graph break between",
            region.source,
        )
    if region.problems:
        return Mismatch(f"not legal: {region.problems[0].reason}", region.source)
    if region.leaving and graph.checkpointed:
        return Mismatch("not legal: the logits leave a checkpointed block", region.source)
    return None


# -- reductions --------------------------------------------------------------------------------------


def _reduced(lifted: Lifted) -> tuple[Lifted, dict[Output, str]]:
    """Say how each output becomes the loss; follow a single per-token value to its sum if there is one."""
    if len(lifted.outputs) != 1:
        return lifted, {o: o.loss.reduction for o in lifted.outputs if o.loss is not None}
    output = lifted.outputs[0]
    if output.loss is not None and output.loss.reduction != "none":
        return lifted, {output: output.loss.reduction}
    followed = _follow_to_sum(lifted, output)
    return followed if followed is not None else (lifted, {})


def _follow_to_sum(lifted: Lifted, output: Output) -> tuple[Lifted, dict[Output, str]] | None:
    """Take elementwise work on per-token losses (masks, weights) into the region if a full sum follows."""
    lifter, node, row = lifted.lifter, output.node, output.row
    taken: list[fx.Node] = []
    while len(node.users) == 1:
        user = next(iter(node.users))
        reduction = _full_reduction(user)
        if reduction is not None:
            value = fake_tensor(node)
            if value is None or value.ndim != sum(row.kinds):
                return None
            final = Output(user, row, None)
            lifted.region.nodes += [n for n in [*taken, user] if n not in lifted.region.nodes]
            try:
                return finish_lift(lifter, [final]), {final: reduction}
            except MixesTokensError:
                lifted.region.nodes = [n for n in lifted.region.nodes if n not in taken and n is not user]
                return None
        if user.op == "output":
            return None
        try:
            if output.loss is not None:
                value = fake_tensor(node)
                assert value is not None
                lifter.builder.bind(value, row)
            found = lifter.record_node(user, set(lifted.region.nodes) | set(taken))
        except Exception:
            return None
        if found is None:
            return None
        taken.append(user)
        node, row = user, found
    return None


def _full_reduction(node: fx.Node) -> str | None:
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name not in ("sum", "mean") or len(node.args) != 1 or set(node.kwargs) - {"dtype"}:
        return None
    value = fake_tensor(node)
    if value is None or value.ndim:
        return None
    return "sum" if name == "sum" else "average"


def _choose_op(lifted: Lifted, reductions: dict[Output, str], graph: Graph, context: Context) -> tuple[str, str]:
    """Choose where gradients are formed: in the forward only for one scalar sum."""
    setting = context.config.loss_gradient
    summed = len(lifted.outputs) == 1 and reductions.get(lifted.outputs[0], "none") != "none"
    if not lifted.trains or setting == "recompute":
        return "map", ""
    if not summed:
        return "map", "" if setting == "auto" else " (the loss is no single scalar sum)"
    # fp16 gradients of an unscaled sum could overflow or underflow where a scaled loss does not; a
    # checkpointed block would form the gradients twice.
    half = any(s.dtype == torch.float16 for s in lifted.body.inputs)
    if setting == "auto" and (half or graph.checkpointed):
        return "map", ""
    return "sum", ""


# -- returned logits ---------------------------------------------------------------------------------


def _read_logits(
    region: Region, lifted: Lifted, graph: Graph, context: Context
) -> list[tuple[fx.Node, Any]] | Mismatch:
    """Lift the head alone for every logits value that is returned."""
    heads = []
    for value in dict.fromkeys(v for v, _ in region.leaving):
        try:
            lifter = Lifter(region, context.fake_mode)
            lifter.record()
            head = finish_lift(lifter, [Output(value, lifter.rows[value])], hoist=False)
            known = fake_tensor(value)
            if known is None or any(_size_source(s, head) is None for s in known.shape):
                return Mismatch(
                    "not supported: the returned logits have a size that can't be told later", region.source
                )
            heads.append((value, head))
        except (MixesTokensError, KeyError) as e:
            return Mismatch(f"not supported: the returned logits can't be computed apart ({e})", region.source)
    return heads


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
            slots[0], head.body.graph, tuple(sources), len(head.chunked), tuple(_flattening(i) for i in head.chunked),
            tuple(_size_source(s, head) for s in fake.shape), tuple(order), fake.dtype, fake.requires_grad,
        )  # fmt: skip
        context.logits += [dataclasses.replace(spec, slot=i) for i in slots]
    for i in slots:
        results[i] = None
    output.args = (tuple(results),)


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
