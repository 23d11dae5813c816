"""Live bytes over forward and backward, estimated from the partitioned ATen graphs without running them.

Terms:
    buffer: memory a value takes; views share one. Parameters and other inputs of the graph take none.
    inlined: a pointwise value that only pointwise ops and reductions read is computed in their kernels and takes
        no memory; what it reads stays alive until they have run.
    step: a node that writes buffers.

What is modelled of the run: a pointwise step writes over an input of its size that dies there; values saved for
the backward die at their last use in it; gradients of outputs are held by autograd for the whole backward (zeros
where the caller's loss doesn't use an output); gradients of inputs live to the end; a loop over chunks adds one
chunk's values and its accumulators.

Not modelled: Inductor's own order of steps, workspaces of library kernels, what the caller keeps.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from mst_fx.body import Term
from mst_fx.chunking import size_hint
from mst_fx.graph import module_path, source_of
from mst_fx.inductor import cpu_multiplies, partition, storage_of
from mst_fx.ops import BODIES, MAP, PRODUCT_BLOCK_BYTES, SUM, CompiledBody
from mst_fx.pipeline import copy_graph
from mst_fx.printing import node_line, target_text, value_text

aten, prims = torch.ops.aten, torch.ops.prims


@dataclass(frozen=True)
class Moment:
    """One step of the timeline."""

    phase: str
    """"forward" or "backward"."""
    name: str
    """The step's node in the ATen graph."""
    text: str
    """That node as a line of text."""
    source: str
    """``file:line`` of the user's code."""
    path: str
    """Module that made the node, "" where none is known."""
    live_bytes: int
    """Bytes alive while the step runs, over what was alive when the forward began."""


@dataclass(frozen=True)
class Timeline:
    """Live bytes of one forward and backward, estimated from shapes."""

    moments: tuple[Moment, ...]
    saved_bytes: int
    """Bytes the forward keeps for the backward, inputs and parameters left out."""
    peak_bytes: int
    """Bytes over the start at the worst moment."""
    peak: Moment | None
    largest_bytes: int
    """Bytes of the largest value that takes memory."""
    largest: str
    """That value's dtype, shape and op, e.g. ``float32[4096, 32000] mm``."""


class _Key(NamedTuple):
    """A buffer: the phase, the node that writes it, and which of its results it is."""

    phase: str
    name: str
    result: int = 0


@dataclass
class _Step:
    node: fx.Node
    writes: dict[_Key, int]
    """Buffers written -> bytes."""
    reads: frozenset[_Key]
    in_place: bool
    """Whether it may write over what it reads."""
    transient: int = 0
    """Bytes it needs beyond its results while it runs."""


@dataclass
class _Program:
    """A graph as steps over buffers."""

    phase: str
    steps: list[_Step] = field(default_factory=list)
    refs: dict[fx.Node, frozenset[_Key]] = field(default_factory=dict)
    """Node -> the buffers one must read to have its value."""
    results: list[frozenset[_Key]] = field(default_factory=list)
    """Per output of the graph, its buffers."""


def timeline(module: fx.GraphModule, chunked: bool) -> Timeline:
    """Estimate the live bytes of forward and backward of a graph, compiled by Inductor.

    Args:
        module: A Dynamo graph, as in ``GraphPair``; left as it is.
        chunked: Whether regions of it were chunked; the partitioner's settings depend on it.

    Memory:
        None of the graph's: fake tensors only.
    """
    with module.meta.get("mst_ambient", torch.no_grad)():
        forward_graph, backward_graph = partition(copy_graph(module), chunked)
    forward = _program(forward_graph, "forward", {})
    sizes = _sizes(forward)
    if backward_graph is None:
        return _timeline([_simulate(forward, {}, set(), set())], [forward], 0)
    named = {n.name: n for n in forward_graph.graph.nodes}
    refs: dict[fx.Node, frozenset[_Key]] = {}
    tangents: dict[_Key, int] = {}
    for node in backward_graph.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in named:
            refs[node] = forward.refs[named[node.name]]
        elif isinstance(value := node.meta.get("val"), torch.Tensor):
            refs[node] = frozenset([key := _Key("backward", node.name)])
            tangents[key] = _bytes(value)
    saved = {key: sizes[key] for keys in refs.values() for key in keys if key in sizes}
    backward = _program(backward_graph, "backward", refs)
    held = sum(1 for n in backward_graph.graph.nodes if n.op == "placeholder" and n.name in named)
    returned = set().union(*forward.results[: max(0, len(forward.results) - held)])
    phases = [
        _simulate(forward, {}, set(), set()),
        _simulate(backward, {**saved, **tangents}, set(tangents), returned | set(tangents)),
    ]
    return _timeline(phases, [forward, backward], sum(saved.values()))


def _timeline(phases: list[list[Moment]], programs: list[_Program], saved: int) -> Timeline:
    moments = tuple(m for phase in phases for m in phase)
    peak = max(moments, key=lambda m: m.live_bytes, default=None)
    largest = max(((b, s.node) for p in programs for s in p.steps for b in s.writes.values()), default=None,
                  key=lambda pair: pair[0])  # fmt: skip
    text = f"{value_text(largest[1])} {target_text(largest[1])}".strip() if largest else ""
    return Timeline(moments, saved, peak.live_bytes if peak else 0, peak, largest[0] if largest else 0, text)


# -- graphs as steps over buffers --------------------------------------------------------------------

_POINTWISE = {
    aten._to_copy.default, aten.arange.start_step, aten.cat.default, aten.constant_pad_nd.default,
    aten.embedding.default, aten.empty.memory_format, aten.flip.default, aten.full.default, aten.full_like.default,
    aten.gather.default, aten.index.Tensor, aten.index_select.default, aten.repeat.default, aten.scalar_tensor.default,
    aten.select_scatter.default, aten.slice_scatter.default, prims.inductor_random.default,
    prims.inductor_seed.default, prims.inductor_seeds.default, prims.inductor_lookup_seed.default, prims.iota.default,
}  # fmt: skip
"""Ops without ``Tag.pointwise`` that Inductor lowers to an expression per element."""
_SCATTERS = {
    aten._unsafe_masked_index_put_accumulate.default, aten._unsafe_index_put.default, aten.index_put.default,
    aten.scatter.src, aten.scatter.value, aten.scatter_add.default,
}  # fmt: skip
"""Ops that Inductor runs in place on a buffer filled with their first argument."""
_READS, _READS_ON_REUSE = 8, 4
"""Inductor gives a pointwise value a buffer when it reads more buffers than this, or is used more than once."""


def _is_pointwise(node: fx.Node) -> bool:
    return node.target in _POINTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _is_kernel(node: fx.Node) -> bool:
    """Whether Inductor generates the code that runs the node, so that its inputs may be inlined into it."""
    return _is_pointwise(node) or node.target in _SCATTERS or _is_reduction(node)


def _is_reduction(node: fx.Node) -> bool:
    return torch.Tag.reduction in getattr(node.target, "tags", ())


def _is_view(node: fx.Node) -> bool:
    """Whether the node's value lies in its first argument's memory."""
    value, source = node.meta.get("val"), node.args[0] if node.args else None
    base = source.meta.get("val") if isinstance(source, fx.Node) else None
    if node.target is operator.getitem:
        # What the partitioner wraps to replay random numbers has no value of its own: its results stand for it.
        return isinstance(source, fx.Node) and "val" in source.meta
    if node.target in (aten._unsafe_view.default, aten.reshape.default):
        return True
    if not (isinstance(value, torch.Tensor) and isinstance(base, torch.Tensor)):
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is not None and any(r.alias_info and not r.alias_info.is_write for r in schema.returns):
        return True
    return storage_of(value) == storage_of(base)


def _program(module: fx.GraphModule, phase: str, refs: dict[fx.Node, frozenset[_Key]]) -> _Program:
    """Write a graph as steps. ``refs`` has the buffers of the placeholders that take memory."""
    program = _Program(phase, refs=dict(refs))
    realized = _realized(module)
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            program.refs.setdefault(node, frozenset())
        elif node.op == "output":
            program.results = [program.refs[r] if isinstance(r, fx.Node) else frozenset() for r in _flat(node.args[0])]
        else:
            _add(program, node, realized)
    return program


def _realized(module: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes whose value must lie in memory for one of their users."""
    found: set[fx.Node] = set()
    for node in reversed(module.graph.nodes):
        for user in node.users:
            if user.op == "output" or (user in found if _is_view(user) else not _is_kernel(user)):
                found.add(node)
    return found


def _add(program: _Program, node: fx.Node, realized: set[fx.Node]) -> None:
    reads = frozenset().union(*(program.refs[n] for n in node.all_input_nodes))
    if node.target is operator.getitem and _is_view(node):
        keys = program.refs[node.args[0]]  # pyright: ignore
        program.refs[node] = frozenset(k for k in keys if k.result == node.args[1] or len(keys) == 1)
        return
    if _is_view(node):
        program.refs[node] = program.refs[node.args[0]]  # pyright: ignore
        return
    if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
        program.refs[node] = program.refs[node.args[0]] if isinstance(node.args[0], fx.Node) else reads
        program.steps.append(_Step(node, {}, reads, False))
        return
    tensors = [(i, v) for i, v in enumerate(_flat(node.meta.get("val"))) if isinstance(v, torch.Tensor)]
    uses = sum(len(u.users) if _is_view(u) else 1 for u in node.users)
    crowded = len(reads) > _READS or (uses > 1 and len(reads) > _READS_ON_REUSE)
    if not tensors or (_is_pointwise(node) and node not in realized and not crowded):
        program.refs[node] = reads
        return
    writes = {_Key(program.phase, node.name, i): _bytes(v) for i, v in tensors}
    program.refs[node] = frozenset(writes)
    program.steps.append(_Step(node, writes, reads, _is_pointwise(node), _loop_bytes(node)))


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _sizes(program: _Program) -> dict[_Key, int]:
    return {key: count for step in program.steps for key, count in step.writes.items()}


# -- what is alive when ------------------------------------------------------------------------------


def _simulate(program: _Program, start: dict[_Key, int], held: set[_Key], kept_whole: set[_Key]) -> list[Moment]:
    """Return the live bytes at each step.

    Args:
        program: The steps.
        start: Buffers alive before the first step -> bytes.
        held: Buffers that stay alive to the end.
        kept_whole: Buffers that no step may write over.
    """
    last = {key: i for i, step in enumerate(program.steps) for key in (*step.writes, *step.reads)}
    for key in held.union(*program.results):
        last[key] = len(program.steps)
    alive = {key: count for key, count in start.items() if key in last}
    moments = []
    for i, step in enumerate(program.steps):
        dying = {key: alive[key] for key in step.reads if last[key] == i and key in alive}
        for count in step.writes.values():
            taken = next((k for k, c in dying.items() if c == count and k not in kept_whole), None)
            if step.in_place and taken is not None:
                del alive[taken], dying[taken]
        alive.update(step.writes)
        node = step.node
        moments.append(
            Moment(
                program.phase, node.name, node_line(node), source_of(node), _path(node),
                sum(alive.values()) + step.transient,
            )
        )  # fmt: skip
        for key in (*step.writes, *step.reads):
            if last[key] == i:
                alive.pop(key, None)
    return moments


def _path(node: fx.Node) -> str:
    """Return the module of a node; one of the backward has that of its forward."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    probe = fx.Graph().placeholder("probe")
    probe.meta["nn_module_stack"] = stack
    return module_path(probe)


def _bytes(value: torch.Tensor, rows: int | None = None) -> int:
    """Return a value's bytes; symbolic sizes take their example value, or ``rows`` for the size they stand for."""
    return math.prod(_size(s, rows) for s in value.shape) * value.dtype.itemsize


def _size(size: Any, rows: int | None) -> int:
    if isinstance(size, int) or rows is None:
        return size_hint(size)
    expression = size.node.expr
    return int(expression.xreplace(dict.fromkeys(expression.free_symbols, rows)))


# -- loops over chunks -------------------------------------------------------------------------------


_LOOPS = {MAP, SUM, torch.ops.mst_fx.map_backward.default}


def _loop_bytes(node: fx.Node) -> int:
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
    values = [_bytes(v) for v in _flat(node.meta["val"])]
    first = len(values) - len(plan.chunked) - len(plan.shared)
    row_bytes = sum(values[first : first + len(plan.chunked)])
    wide = max((_wide_bytes(found, p, t, results, rows) for p, terms in plan.shared.items() for t in terms), default=0)
    sums = {p: [math.prod(t.shape) * _sum_dtype(found, p).itemsize for t in ts] for p, ts in plan.shared.items()}
    remaining = sum(map(sum, sums.values()))
    most = remaining + max(peak, sum(_bytes(v, rows) for v in results) + wide)
    done = 0
    for position, terms in plan.shared.items():
        spec = found.shared[position]
        gradient = math.prod(spec.shape) * spec.dtype.itemsize
        copied = (
            len(terms) > 1
            or _sum_dtype(found, position) != spec.dtype
            or not all(_is_contiguous(t, spec.shape) for t in terms)
        )
        most = max(most, done + remaining + (gradient if copied else 0))
        remaining -= sum(sums[position])
        done += gradient
    return max(0, row_bytes + most - sum(values))


def _sum_dtype(found: CompiledBody, position: int) -> torch.dtype:
    dtype = found.shared[position].dtype
    return torch.promote_types(dtype, torch.float32) if found.accumulate == "float32" else dtype


def _wide_bytes(found: CompiledBody, position: int, term: Term, results: list[Any], rows: int) -> int:
    """Return what adding one product to its accumulator needs, see NOTE [fp32 sums on a CPU]."""
    if len(term.outputs) == 1 or found.shared[position].device.type != "cpu":
        return 0
    factor, dtype = results[term.outputs[1]], _sum_dtype(found, position)
    if factor.dtype == dtype:
        return 0
    widened = 0 if cpu_multiplies(factor.dtype) else _bytes(factor, rows) // factor.dtype.itemsize * dtype.itemsize
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
        program = _program(lowered, "forward", {})
        for step in program.steps:
            values = _flat(step.node.meta["val"])
            step.writes = {k: _bytes(values[k.result], rows) for k in step.writes}
        output = next(n for n in graph.graph.nodes if n.op == "output")
        results = [n.meta["val"] for n in output.args[0]]  # pyright: ignore
        peak = max((m.live_bytes for m in _simulate(program, {}, set(), set())), default=0)
        graph.meta[key] = peak, results
    return graph.meta[key]
