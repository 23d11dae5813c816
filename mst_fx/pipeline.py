"""The passes, in order, over a graph and the checkpointed blocks in it."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mst_fx.chunking import Context, Graph
from mst_fx.config import Config, NothingChunkedError
from mst_fx.graph import CHECKPOINT, fake, fake_tensor, walking
from mst_fx.inductor import fake_mode_of
from mst_fx.lazy_logits import LogitsSpec
from mst_fx.losses import is_loss, read_loss
from mst_fx.passes.chunk_loss import chunk_loss
from mst_fx.passes.chunk_mlp import chunk_mlp
from mst_fx.passes.normalize import normalize
from mst_fx.report import RegionReport, Report
from mst_fx.verify import snapshot, verify

log = logging.getLogger(__name__)

PASSES: tuple[tuple[str, Callable[[Graph, Context], list[RegionReport]]], ...] = (
    ("normalize", normalize),
    ("chunk_loss", chunk_loss),
    ("chunk_mlp", chunk_mlp),
)


def run_passes(module: fx.GraphModule, config: Config) -> tuple[fx.GraphModule, Report, list[LogitsSpec]]:
    """Rewrite a copy of a Dynamo graph.

    Returns:
        The rewritten graph (the given one where nothing was chunked), the report, and how to give back
        logits that were put off.

    Raises:
        NothingChunkedError: Under ``strict``, if the graph trains a loss and nothing was chunked.
        VerifyError: If a pass broke the graph.
    """
    started = time.perf_counter()
    context = Context(config, fake_mode_of([fake(n) for n in module.graph.nodes]))
    before = readable(module)
    rewritten = copy_graph(module)
    notes = _notes(module)
    if context.fake_mode is None:
        notes.append("the graph carries no shapes")
    else:
        for graph in collect_graphs(rewritten):
            with graph.ambient():
                _run_on(graph, context)
    chunked = any(r.status == "chunked" for r in context.reports)
    report = Report(
        tuple(context.reports), tuple(notes), before, readable(rewritten) if chunked else before,
        tuple(context.bodies.items()),
    )  # fmt: skip
    log.info(
        "mst: %d of %d regions chunked in %.2f s",
        len(report.chunked),
        len(report.regions),
        time.perf_counter() - started,
    )
    for region in report.regions:
        log.debug("mst: %s", region)
    if config.strict and not chunked and trains_loss(module):
        raise NothingChunkedError(f"mst.strict: nothing was chunked in a graph that trains a loss.\n{report}")
    return (rewritten if chunked else module), report, context.logits


def _run_on(graph: Graph, context: Context) -> None:
    for name, run in PASSES:
        if name in context.config.disable:
            continue
        before, known = snapshot(graph.module), set(graph.module.graph.nodes)
        context.reports += run(graph, context)
        for node in graph.module.graph.nodes:
            if node not in known:
                node.meta["mst_new"] = True
        verify(graph.module, before, name, context.fake_mode)


def copy_graph(module: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph and the graphs of its checkpointed blocks; parameters and fake values are shared."""
    graph = fx.Graph()
    output = graph.graph_copy(module.graph, mapping := {})
    graph.output(output)
    for old, new in mapping.items():
        new.meta = copy.copy(old.meta)
    new_output = next(n for n in graph.nodes if n.op == "output")
    new_output.meta = copy.copy(next(n for n in module.graph.nodes if n.op == "output").meta)
    result = fx.GraphModule(module, graph)
    result.meta = copy.copy(module.meta)
    for name, child in list(result.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(result, name, copy_graph(child))
    return result


def collect_graphs(module: fx.GraphModule) -> list[Graph]:
    """Return the graph and, however deep, those of its checkpointed blocks, innermost first."""
    found: list[Graph] = []
    _collect(module, {}, contextlib.nullcontext, False, found)
    return found


def _collect(
    module: fx.GraphModule, outer: dict[Any, Any], ambient: Any, checkpointed: bool, found: list[Graph]
) -> None:
    with ambient(), walking(module) as nodes:
        for node in nodes:
            if node.op == "call_function" and node.target is CHECKPOINT:
                inner = getattr(module, str(node.args[0].target))  # pyright: ignore
                holders = [n for n in inner.graph.nodes if n.op == "placeholder"]
                for holder, value in zip(holders, node.args[1:], strict=False):
                    if "example_value" not in holder.meta and isinstance(value, fx.Node):
                        holder.meta["example_value"] = fake(value)
                passed = {h: v for h, v in zip(holders, node.args[1:], strict=False) if isinstance(v, fx.Node)}
                _collect(inner, {**outer, **passed}, _autocast_now(), True, found)
    found.append(Graph(module, outer, ambient, checkpointed))


def _autocast_now() -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Return a factory of contexts that restore the autocast state of this moment."""
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    states = [(k, torch.get_autocast_dtype(k), torch.is_autocast_enabled(k)) for k in kinds]

    @contextlib.contextmanager
    def restored() -> Any:
        with contextlib.ExitStack() as stack:
            for kind, dtype, enabled in states:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            yield

    return restored


def trains_loss(module: fx.GraphModule) -> bool:
    """Whether the graph returns a scalar that requires a gradient."""
    output = next(n for n in module.graph.nodes if n.op == "output")
    values = [fake_tensor(n) for n in output.args[0] if isinstance(n, fx.Node)]
    return any(v is not None and v.ndim == 0 and v.requires_grad for v in values)


def _notes(module: fx.GraphModule) -> list[str]:
    """Say where a loss sits in another graph than its logits."""
    notes = []
    for node in module.graph.nodes:
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
    return notes


def readable(module: fx.GraphModule) -> str:
    """Return a graph as text: one line per node with dtype and shape, checkpointed blocks below."""
    lines = []
    for node in module.graph.nodes:
        value = fake(node)
        kind = (
            f": {str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if isinstance(value, torch.Tensor) else ""
        )
        if node.op == "placeholder":
            lines.append(f"{node.name}{kind} = placeholder")
        elif node.op == "output":
            lines.append(f"return {node.args[0]}")
        elif node.op != "get_attr":
            target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            args = ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
            lines.append(f"{node.name}{kind} = {target}({args})")
    for name, child in module.named_children():
        if isinstance(child, fx.GraphModule):
            lines += [f"{name}:", *("  " + line for line in readable(child).splitlines())]
    return "\n".join(lines)
