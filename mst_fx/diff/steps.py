"""A partitioned ATen graph as steps over buffers, and how many bytes are alive at each of them.

Terms:
    buffer: memory a value takes; views share one. Parameters and other inputs of the graph take none.
    inlined: a pointwise value that only pointwise ops and reductions read is computed in their kernels and takes
        no memory; what it reads stays alive until they have run.
    step: a node that writes buffers.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from mst_fx.graph import module_path, size_hint, source_of
from mst_fx.inductor import storage_of
from mst_fx.printing import node_line

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


class Key(NamedTuple):
    """A buffer: the phase, the node that writes it, and which of its results it is."""

    phase: str
    name: str
    result: int = 0


@dataclass
class Step:
    """A node that writes buffers."""

    node: fx.Node
    writes: dict[Key, int]
    """Buffers written -> bytes."""
    reads: frozenset[Key]
    in_place: bool
    """Whether it may write over what it reads."""
    transient: int = 0
    """Bytes it needs beyond its results while it runs."""


@dataclass
class Program:
    """A graph as steps over buffers."""

    phase: str
    steps: list[Step] = field(default_factory=list)
    refs: dict[fx.Node, frozenset[Key]] = field(default_factory=dict)
    """Node -> the buffers one must read to have its value."""
    results: list[frozenset[Key]] = field(default_factory=list)
    """Per output of the graph, its buffers."""


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


def build_program(module: fx.GraphModule, phase: str, refs: dict[fx.Node, frozenset[Key]]) -> Program:
    """Write a graph as steps. ``refs`` has the buffers of the placeholders that take memory."""
    program = Program(phase, refs=dict(refs))
    realized = _realized(module)
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            program.refs.setdefault(node, frozenset())
        elif node.op == "output":
            program.results = [program.refs[r] if isinstance(r, fx.Node) else frozenset() for r in flat(node.args[0])]
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


def _add(program: Program, node: fx.Node, realized: set[fx.Node]) -> None:
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
        program.steps.append(Step(node, {}, reads, False))
        return
    tensors = [(i, v) for i, v in enumerate(flat(node.meta.get("val"))) if isinstance(v, torch.Tensor)]
    uses = sum(len(u.users) if _is_view(u) else 1 for u in node.users)
    crowded = len(reads) > _READS or (uses > 1 and len(reads) > _READS_ON_REUSE)
    if not tensors or (_is_pointwise(node) and node not in realized and not crowded):
        program.refs[node] = reads
        return
    writes = {Key(program.phase, node.name, i): value_bytes(v) for i, v in tensors}
    program.refs[node] = frozenset(writes)
    program.steps.append(Step(node, writes, reads, _is_pointwise(node)))


def flat(value: Any) -> list[Any]:
    """Return the values of a node with one or several."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


# -- what is alive when ------------------------------------------------------------------------------


def simulate(program: Program, start: dict[Key, int], held: set[Key], kept_whole: set[Key]) -> list[Moment]:
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
                program.phase, node.name, node_line(node), source_of(node), path_of(node),
                sum(alive.values()) + step.transient,
            )
        )  # fmt: skip
        for key in (*step.writes, *step.reads):
            if last[key] == i:
                alive.pop(key, None)
    return moments


def path_of(node: fx.Node) -> str:
    """Return the module of a node; one of the backward has that of its forward."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    probe = fx.Graph().placeholder("probe")
    probe.meta["nn_module_stack"] = stack
    return module_path(probe)


def value_bytes(value: torch.Tensor, rows: int | None = None) -> int:
    """Return a value's bytes; symbolic sizes take their example value, or ``rows`` for the size they stand for."""
    return math.prod(_size(s, rows) for s in value.shape) * value.dtype.itemsize


def _size(size: Any, rows: int | None) -> int:
    if isinstance(size, int) or rows is None:
        return size_hint(size)
    expression = size.node.expr
    return int(expression.xreplace(dict.fromkeys(expression.free_symbols, rows)))
