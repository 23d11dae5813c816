"""The passes, in order, over a graph and the checkpointed blocks in it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import fx

from mst_fx.checkpoints import join_blocks
from mst_fx.config import Config, NothingChunkedError
from mst_fx.context import Context, Graph
from mst_fx.dynamo import breaks_so_far, graph_break, keep_source
from mst_fx.effects import reshapes_in_place
from mst_fx.graph import (
    CHECKPOINT,
    OWN_BACKWARD,
    autocast_now,
    block_graph,
    called_name,
    fake,
    fake_tensor,
    source_of,
    walking,
)
from mst_fx.inductor import apart_from_autograd_settings, cpp_wrapper, fake_mode_of
from mst_fx.lazy_logits import LogitsSpec
from mst_fx.passes.causal_masks import causal_masks
from mst_fx.passes.chunk_experts import chunk_experts
from mst_fx.passes.chunk_loss import chunk_loss
from mst_fx.passes.chunk_mlp import chunk_mlp
from mst_fx.passes.chunk_tokenwise import chunk_tokenwise
from mst_fx.passes.functionalize import functionalize
from mst_fx.passes.localize_shards import localize_shards
from mst_fx.passes.normalize import normalize
from mst_fx.regions.losses import is_loss, read_loss
from mst_fx.regions.region import widens
from mst_fx.report import GraphPair, RegionReport, Report
from mst_fx.verify import snapshot, verify

log = logging.getLogger(__name__)

PASSES: tuple[tuple[str, Callable[[Graph, Context], list[RegionReport]]], ...] = (
    ("functionalize", functionalize),
    ("localize_shards", localize_shards),
    ("causal_masks", causal_masks),
    ("normalize", normalize),
    ("chunk_loss", chunk_loss),
    ("chunk_tokenwise", chunk_tokenwise),
    ("chunk_experts", chunk_experts),
    ("chunk_mlp", chunk_mlp),
)


def run_passes(
    module: fx.GraphModule, config: Config, only: Collection[tuple[str, str]] | None = None
) -> tuple[fx.GraphModule, Report, list[LogitsSpec]]:
    """Rewrite a copy of a Dynamo graph.

    Args:
        module: The graph.
        config: The options.
        only: The regions that may be rewritten, each as (``RegionReport.graph``, first of its ``nodes``); None for all.

    Returns:
        The rewritten graph (the given one where nothing was chunked), the report, and how to give back
        logits that were put off.

    Raises:
        NothingChunkedError: Under ``strict``, if the graph trains a loss and nothing was chunked.
        VerifyError: If a pass broke the graph.
    """
    started = time.perf_counter()
    context = Context(config, fake_mode_of([fake(n) for n in module.graph.nodes]))
    notes, left = _notes(module), left_to_eager()
    given = _with_blocks_joined(module, config.checkpoint_layers, notes) if config.checkpoint_layers > 1 else module
    rewritten = copy_graph(given)
    if context.fake_mode is None:
        notes.append("the graph has no inputs or outputs with shapes: nothing in it is looked at")
    elif cpp_wrapper(config.compiler, dict(config.inductor)):
        notes.append("nothing is chunked under Inductor's `cpp_wrapper`: it crashes on an op that gives a list of one")
    else:
        for graph in collect_graphs(rewritten):
            with graph.ambient(), apart_from_autograd_settings():
                if only is not None:
                    context.allowed = frozenset(key for name, key in only if name == graph.name)
                _run_on(graph, context)
    notes += context.notes
    broken = graph_break(module)
    chunked = any(r.status == "chunked" for r in context.reports)
    if broken is not None:
        where, why = broken
        reports = [_cut_short(r, where, why) for r in context.reports]
        notes += [_BROKEN.format(where, why)] if reports == context.reports else []
        left = [note for note in left if why not in note]
        context.reports = reports
    notes += [] if chunked else left
    changed = chunked or context.masks > 0 or given is not module
    if context.masks:
        several = "s" if context.masks > 1 else ""
        notes.append(
            f"{context.masks} attention{several}: the S x S mask is proved to be causal, or to mask nothing: not made"
        )
    before = copy_graph(given, KEPT)
    before.meta["mst_ambient"] = autocast_now()  # autocast around the compiled function is not in its graph
    after = copy_graph(rewritten, KEPT) if changed else before
    after.meta["mst_ambient"] = before.meta["mst_ambient"]
    report = Report(tuple(context.reports), tuple(notes), tuple(context.bodies.values()), (GraphPair(before, after),))
    log.info(
        "mst: %d of %d regions chunked in %.2f s",
        len(report.chunked),
        sum(not r.is_attention for r in report.regions),
        time.perf_counter() - started,
    )
    for r in report.regions:
        log.debug("mst: %s %s at %s %s: %s", r.status, r.kind, r.source, r.path, r.reason)
    if config.strict and not chunked and trains_loss(module):
        raise NothingChunkedError(f"mst.strict: nothing was chunked in a graph that trains a loss.\n{report}")
    return (rewritten if changed else module), report, context.logits


def _with_blocks_joined(module: fx.GraphModule, size: int, notes: list[str]) -> fx.GraphModule:
    """Return a copy with checkpointed blocks joined, which counts as the graph before; itself where there are none."""
    copy = copy_graph(module)
    joined, note = join_blocks(copy, size)
    notes.append(note)
    for graph in [m for m in copy.modules() if isinstance(m, fx.GraphModule)] if joined else []:
        for node in graph.graph.nodes:
            node.meta.pop("mst_origin", None)
    return copy if joined else module


_BROKEN = "a graph break ends a graph at {}: {}; what is left to eager there is not chunked"


def _cut_short(region: RegionReport, where: str, why: str) -> RegionReport:
    """Return the report of logits without a loss with the graph break behind them as a reason."""
    if region.kind != "loss" or "no loss is computed from them" not in region.reason:
        return region
    reason = region.reason.partition("; if you train on them")[0]
    return dataclasses.replace(
        region, reason=f"{reason}; a graph break ends the graph of these logits at {where}: {why}"
    )


def _run_on(graph: Graph, context: Context) -> None:
    for name, run in PASSES:
        if name not in context.config.disable:
            before, known = snapshot(graph.module), set(graph.module.graph.nodes)
            context.reports += [dataclasses.replace(r, graph=graph.name) for r in run(graph, context)]
            for node in graph.module.graph.nodes:
                if node not in known:
                    node.meta["mst_new"] = True
            verify(graph.module, before, name, context.fake_mode)
        if name == "functionalize" and not _shapes_are_known(graph, context):
            break
    graph.module.recompile()


def _shapes_are_known(graph: Graph, context: Context) -> bool:
    """Whether no value's shape changes in place any more; one that does is noted, and the graph is left alone."""
    node = next(filter(reshapes_in_place, graph.module.graph.nodes), None)
    if node is not None:
        what = f"`{called_name(node)}` changes what a value looks like in place ({source_of(node)})"
        context.notes.append(
            f"{what}: its graph is left alone. Spell it out of place (x = x.{str(node.target)[:-1]}(...))"
        )
    return node is None


KEPT = ("example_value", "stack_trace", "nn_module_stack", "mst_origin", "mst_region")
"""What a report keeps of a node's metadata: nothing that holds real tensors."""


def copy_graph(module: fx.GraphModule, kept: Collection[str] | None = None) -> fx.GraphModule:
    """Copy a graph and the graphs of its checkpointed blocks; parameters and fake values are shared.

    Args:
        module: The graph. Nodes of the copy carry the name of theirs in ``meta["mst_origin"]``.
        kept: The metadata to keep instead, names left alone.
    """
    graph = fx.Graph()
    output = graph.graph_copy(module.graph, mapping := {})
    mapping[next(n for n in module.graph.nodes if n.op == "output")] = graph.output(output)
    for old, new in mapping.items():
        if kept is None:
            new.meta = {**old.meta, "mst_origin": old.name}
            new.meta.pop("grapharg", None)  # Dynamo drops its own: it refers to the input, which then can't be swapped
            keep_source(old, new)
        else:
            new.meta = {k: old.meta[k] for k in kept if k in old.meta}
    result = fx.GraphModule(module, graph)
    result.meta = {**module.meta}
    if kept is None:
        keep_source(module, result)
    for name, child in list(result.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(result, name, copy_graph(child, kept))
    return result


def collect_graphs(module: fx.GraphModule) -> list[Graph]:
    """Return the graph and, however deep, those of its checkpointed blocks, innermost first."""
    found: list[Graph] = []
    _collect(module, "", {}, contextlib.nullcontext, False, found)
    return found


def _collect(
    module: fx.GraphModule, name: str, outer: dict[Any, Any], ambient: Any, checkpointed: bool, found: list[Graph]
) -> None:
    with ambient(), walking(module) as nodes:
        for node in nodes:
            if node.op == "call_function" and node.target is CHECKPOINT:
                target = str(node.args[0].target)  # pyright: ignore
                inner = getattr(module, target)
                holders = [n for n in inner.graph.nodes if n.op == "placeholder"]
                for holder, value in zip(holders, node.args[1:], strict=False):
                    if "example_value" not in holder.meta and isinstance(value, fx.Node):
                        holder.meta["example_value"] = fake(value)
                passed = {h: v for h, v in zip(holders, node.args[1:], strict=False) if isinstance(v, fx.Node)}
                inner_name = f"{name}.{target}" if name else target
                _collect(inner, inner_name, {**outer, **passed}, autocast_now(), True, found)
    found.append(Graph(module, name, outer, ambient, checkpointed))


def trains_loss(module: fx.GraphModule) -> bool:
    """Whether the graph returns a scalar that requires a gradient."""
    output = next(n for n in module.graph.nodes if n.op == "output")
    values = [fake_tensor(n) for n in output.args[0] if isinstance(n, fx.Node)]
    return any(v is not None and v.ndim == 0 and v.requires_grad for v in values)


def _notes(module: fx.GraphModule) -> list[str]:
    """Say where a loss sits in another graph than its logits, and which graphs within this one nobody may look into."""
    notes = []
    for node in module.graph.nodes:
        inner = _unread_graph(node)
        if inner is None or not any(widens(n) for n in inner.graph.nodes):
            pass
        elif node.target is OWN_BACKWARD:
            notes.append(
                f"a projection to something wider is computed by a torch.autograd.Function ({source_of(node)}), whose "
                "backward is its own: left alone. DeepSpeed ZeRO-3 makes every linear one unless its configuration has "
                "zero_optimization: {memory_efficient_linear: false}."
            )
        else:
            notes.append(
                f"`{node.target.name()}` runs a graph of its own ({source_of(node)}), which is left as it is: nothing "
                "in it is chunked. Without the marking around that code its regions are found."
            )
        if is_loss(node):
            logits = read_loss(node).logits
            root = logits
            while isinstance(root, fx.Node) and root.op != "placeholder" and len(root.all_input_nodes) == 1:
                root = root.all_input_nodes[0]
            if isinstance(root, fx.Node) and root.op == "placeholder":
                notes.append(
                    f"a loss in this graph reads logits (`{root.name}`) made in another one: a graph break is between "
                    "head and loss. Compile one function that holds both (TORCH_LOGS=graph_breaks shows the break)."
                )
    return list(dict.fromkeys(notes))


_LEFT = "Dynamo left code to eager, and nothing in it is chunked: {} (TORCH_LOGS=graph_breaks shows where)"
_breaks_told: dict[str, int] = {}


def left_to_eager() -> list[str]:
    """Say what Dynamo gave up since this was last asked: a function without a graph has none to be noted on."""
    found = breaks_so_far()
    new = [reason for reason, times in found.items() if times > _breaks_told.get(reason, 0)]
    _breaks_told.clear()
    _breaks_told.update(found)
    return left_notes(new)


def left_notes(reasons: Iterable[str]) -> list[str]:
    """Return a note for each reason Dynamo gives, of which it keeps the first line."""
    return list(dict.fromkeys(_LEFT.format((reason.splitlines() or [""])[0]) for reason in reasons))


def _unread_graph(node: fx.Node) -> fx.GraphModule | None:
    """Return the (forward) graph of a higher-order op, but for checkpointed blocks: those are rewritten too."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator) or node.target is CHECKPOINT:
        return None
    return next(filter(None, (block_graph(a) for a in node.args if isinstance(a, fx.Node))), None)
