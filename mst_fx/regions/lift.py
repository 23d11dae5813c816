"""Lifts a region out of its graph: the body, what goes in, what comes out.

Steps:
    1. Every node of the region is recorded in row form, in order, under its own autocast state.
    2. What only depends on shared inputs and is more than a view (autocast's weight casts) moves in front
       of the loop: it would be computed once per chunk.
    3. Live-ins are traced back to nodes of the outer graph; outputs remember how to be given back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from mst_fx.body import Body, InputSpec
from mst_fx.effects import is_in_place
from mst_fx.graph import (
    fake,
    fake_tensor,
    grad_states,
    is_autocast_switch,
    is_differentiable,
    needs_grad,
    records_gradients,
    walking,
)
from mst_fx.regions.losses import Total, per_token, read_by_count, read_total
from mst_fx.regions.producers import Producers, dequantisation, narrower
from mst_fx.regions.projections import read_projection
from mst_fx.regions.region import Region, bind_results
from mst_fx.report import Mismatch
from mst_fx.rowform.recorder import run_node
from mst_fx.rowform.rows import (
    LiveIn,
    MixesTokensError,
    Row,
    RowBuilder,
    aten,
    concrete,
    feature_shape,
    numel,
    same_size,
)

_VIEWS = {aten.permute.default, aten.view.default, aten.reshape.default, aten.t.default, aten.select.int,
          aten.transpose.int, aten.unsqueeze.default, aten.expand.default, aten.slice.Tensor}  # fmt: skip
_CASTS = (aten._to_copy.default, aten.detach.default)


@dataclass(frozen=True)
class Output:
    """One value the region gives back: the node it replaces, and its place in row form."""

    node: fx.Node
    row: Row
    total: Total | None = None
    """How the rows become the node's value where it reduces over the tokens."""
    offsets: tuple[Any, ...] = ()
    """Scalars from outside that are added: nodes and numbers."""

    @property
    def reduced(self) -> bool:
        """Whether the node is a scalar: the sum of the rows, divided."""
        return self.total is not None and self.total.reduction != "none"


@dataclass(frozen=True)
class Input:
    """One input of the body: an outer value and how it becomes rows (or a shared tensor)."""

    node: fx.Node
    live_in: LiveIn
    spec: InputSpec

    @property
    def is_wide(self) -> bool:
        """Whether it is a whole value of the tokens, of more than a number each, that no gradient goes to."""
        whole = len(self.live_in.shape) == self.live_in.tensor.ndim
        whole = whole and all(map(same_size, self.live_in.shape, self.live_in.tensor.shape))
        return whole and not self.spec.needs_grad and any(s != 1 for s in self.spec.shape)


@dataclass
class Lifted:
    """A region in row form."""

    region: Region
    body: Body
    chunked: list[Input]
    shared: list[Input]
    hoisted: list[fx.Node]
    """Computations on shared inputs put in front of the loop; each is a shared input after ``shared``."""
    placeholders: dict[fx.Node, Input]
    """The placeholders that ``hoisted`` computes with."""
    outputs: list[Output]
    tokens: Any
    """T, an int or a SymInt."""
    lifter: Lifter
    dead: list[fx.Node] = field(default_factory=list)
    """Nodes behind the region that its outputs make superfluous."""
    built: list[fx.Node] = field(default_factory=list)
    """Nodes that were added to the graph for the region's inputs."""

    @property
    def trains(self) -> bool:
        """Whether any input of the body needs a gradient."""
        return any(spec.needs_grad for spec in self.body.inputs)


class Lifter:
    """Records a region's nodes into one row-form graph."""

    def __init__(self, region: Region, fake_mode: Any, beside: Producers | None = None) -> None:
        self.region, self.fake_mode, self.beside = region, fake_mode, beside or Producers()
        self.builder = RowBuilder()
        self.absorbed: list[fx.Node] = []
        """Nodes in front of the region that the loop computes."""
        self.outer: dict[int, fx.Node] = {}
        self.rows: dict[fx.Node, Row] = {}
        self.states = grad_states(region.module)

    def record(self) -> None:
        """Record every node of the region.

        Raises:
            MixesTokensError: If a node is not token-wise after all.
        """
        members = set(self.region.nodes)
        projections = (read_projection(n, self.region.outer) for n in members)
        weights = {p.weight for p in projections if p is not None} - members
        absorbed = {n for w in weights for n in dequantisation(w, self.region.outer)} | self.beside.nodes
        self.absorbed = [n for n in self.region.module.graph.nodes if n in absorbed]
        entry = fake_tensor(self.region.fold.entry)
        if entry is not None:
            self.builder.bind(entry, self.builder.chunked(entry, self.region.fold.kinds))
        for leaf, kinds in self.beside.leaves.items():
            value = fake_tensor(leaf)
            if value is not None and self.builder.lookup(value) is None:
                self.builder.bind(value, self.builder.chunked(value, kinds))
                self.outer.setdefault(id(value), leaf)
        with walking(self.region.module) as nodes:
            for node in nodes:
                if node in absorbed:
                    self._absorb(node, absorbed)
                elif node in members:
                    self.record_node(node, members)

    def _absorb(self, node: fx.Node, absorbed: set[fx.Node]) -> None:
        self._note_inputs(node, absorbed)
        known = set(self.builder.graph.nodes)
        result, own = run_node(self.builder, node, self.fake_mode), fake(node)
        pairs = zip(own, result, strict=True) if isinstance(own, (list, tuple)) else [(own, result)]
        for value, out in pairs:
            found = self.builder.lookup(out)
            if found is not None:
                self.builder.bind(value, found)
        self.builder.in_loop |= {n for n in self.builder.graph.nodes if n not in known and n.op == "call_function"}

    def _note_inputs(self, node: fx.Node, members: set[fx.Node]) -> None:
        for n in node.all_input_nodes:
            value = fake_tensor(n)
            if n not in members and value is not None:
                self.outer.setdefault(id(value), n)

    def record_node(self, node: fx.Node, members: set[fx.Node]) -> Row | None:
        """Record one node; returns the row form of its (first) result."""
        self._note_inputs(node, members)
        total = read_total(node)
        if total is not None:
            row = per_token(self.builder, total, self.fake_mode)
            if stops_gradient(node, fake(node), self.states):
                row = Row(row.kinds, self.builder.emit(aten.detach.default, row.node))
            self.rows[node] = row
            return row
        if node in self.region.amplifiers:
            projection = self.region.projections[node]
            x = fake_tensor(projection.tokens)
            assert x is not None
            previous = self.builder.lookup(x)
            if projection.tokens in self.region.fold.nodes:
                if not isinstance(previous, Row) or previous.kinds != projection.kinds:
                    raise MixesTokensError("what is in front of it has other token dimensions")
            else:
                self.builder.bind(x, self.builder.chunked(x, projection.kinds))
            result = run_node(self.builder, node, self.fake_mode)
            self.builder.unbind(x, previous)
        else:
            result = run_node(self.builder, node, self.fake_mode)
        for i, (value, row) in enumerate(bind_results(self.builder, node, result)):
            if stops_gradient(node, value, self.states):
                row = row.with_node(self.builder.emit(aten.detach.default, row.node))
                self.builder.bind(value, row)
            if not i:
                self.rows[node] = row
        return self.rows.get(node)

    def row_of(self, node: fx.Node) -> Row:
        """Return the row form of a value of the region."""
        if node not in self.rows:
            raise MixesTokensError(f"gives back `{node.name}`, which has no row per token")
        return self.rows[node]

    def row_given_back(self, node: fx.Node) -> Row:
        """Return the row form of an output; detached where no gradient comes back, so that inputs get none by it."""
        row = self.rows[node]
        if needs_grad(node) and all(self._stops(node, u) for u in node.users if u not in self.region.nodes):
            return row.with_node(self.builder.emit(aten.detach.default, row.node))
        return row

    def _stops(self, node: fx.Node, reader: fx.Node, depth: int = 8) -> bool:
        """Whether no gradient comes back by a reader: it detaches, or so does all that reads what it makes."""
        value = fake_tensor(reader)
        if value is None or value is fake(node) or is_in_place(reader):
            return False
        if isinstance(reader.target, torch._ops.HigherOrderOperator):
            return False
        if not value.requires_grad or not records_gradients(self.states.get(reader)):
            return True
        return depth > 0 and all(self._stops(reader, u, depth - 1) for u in reader.users)

    def input_for(self, live_in: LiveIn, grad_enabled: bool) -> Input:
        """Trace a live-in back to the outer graph."""
        node = self.outer.get(id(live_in.tensor))
        if node is None:
            raise MixesTokensError("reads a value that has no place in the graph")
        t = live_in.tensor
        needs = grad_enabled and t.requires_grad
        if live_in.kinds is None:
            shape = tuple(live_in.shape)
            stride = (
                tuple(map(concrete, t.stride()))
                if shape == tuple(map(concrete, t.shape))
                else _contiguous_stride(shape)
            )
            if not all(isinstance(s, int) for s in stride) or 0 in stride:
                stride = _contiguous_stride(shape)
            return Input(node, live_in, InputSpec(shape, t.dtype, t.device, stride, needs))
        features = tuple(feature_shape(live_in.shape, live_in.kinds))
        if not all(isinstance(s, int) for s in features):
            raise MixesTokensError("reads rows whose size changes with the number of tokens")
        return Input(node, live_in, InputSpec(features, t.dtype, t.device, None, needs))


def lift(region: Region, fake_mode: Any) -> Lifted | Mismatch:
    """Lift a region, with what it reads that is better computed in the loop, or say why it can't be."""
    lifted = _lift(region, fake_mode)
    if isinstance(lifted, Mismatch):
        return lifted
    fed = {p.tokens for p in region.projections.values()} | {region.fold.entry}
    wide = {i.node: i.live_in.kinds or () for i in lifted.chunked if i.is_wide and i.node not in fed}
    beside = narrower(wide, set(region.nodes), region.outer) if wide else None
    again = _lift(region, fake_mode, beside) if beside is not None else None
    return again if isinstance(again, Lifted) else lifted


def _lift(region: Region, fake_mode: Any, beside: Producers | None = None) -> Lifted | Mismatch:
    lifter = Lifter(region, fake_mode, beside)
    try:
        lifter.record()
        ends = [(t, read_total(t)) for t in region.given_back()]
        outputs = [Output(t, lifter.row_given_back(t), total) for t, total in ends]
        # What a mean divides by is counted behind the loop where the labels are made of the logits.
        inside = {n for _, total in ends for n in read_by_count(total) if n in region.nodes}
        outputs += [Output(n, lifter.row_of(n)) for n in inside.difference(t for t, _ in ends)]
        return finish_lift(lifter, outputs)
    except MixesTokensError as e:
        return Mismatch(f"not supported: {e}", region.source)


def finish_lift(lifter: Lifter, outputs: list[Output], hoist: bool = True) -> Lifted:
    """Close the row-form graph with the given outputs.

    Raises:
        MixesTokensError: If inputs don't agree on the number of tokens, or a live-in can't be had.
    """
    region, builder = lifter.region, lifter.builder
    grad = any(needs_grad(o.node) for o in outputs)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(builder.graph, copied)
    assert result is None
    graph.output(tuple(copied[o.row.node] for o in outputs))
    fx.GraphModule(torch.nn.Module(), graph)
    graph.eliminate_dead_code()
    alive = set(graph.nodes)
    used = [(live, n) for live, n in builder.live_ins.values() if copied[n] in alive and copied[n].users]
    inputs = {node: lifter.input_for(live, grad) for live, node in used}
    ordered = list(inputs)
    chunked_nodes = [n for n in ordered if inputs[n].live_in.kinds is not None]
    counts = [_tokens(inputs[n].live_in) for n in chunked_nodes]
    if not counts or any(not same_size(c, counts[0]) for c in counts):
        raise MixesTokensError("joins values of different numbers of tokens")
    shared_nodes = [n for n in ordered if inputs[n].live_in.kinds is None]
    by_copy = {copied[n]: inputs[n] for n in ordered}
    in_loop = {copied[n] for n in builder.in_loop}
    if any(is_autocast_switch(n) for n in region.module.graph.nodes):  # in front of the loop, another may be in force
        in_loop |= {n for n in graph.nodes if n.op == "call_function" and n.target not in (*_VIEWS, *_CASTS)}
    hoisted = _hoistable(graph, [copied[n] for n in shared_nodes], in_loop) if hoist else []
    behind = _needed(graph, set(hoisted))
    direct = [n for n in shared_nodes if copied[n] in behind]
    seed = copied.get(builder.seed) if builder.seed is not None else None
    body_graph = _body_graph(graph, [copied[n] for n in chunked_nodes + direct] + hoisted, seed)
    module = fx.GraphModule(torch.nn.Module(), body_graph)
    module.graph.lint()
    specs = [inputs[n].spec for n in direct] + [_run_shared(n, by_copy) for n in hoisted]
    has_seed = any(n.op == "placeholder" and n.name == "seed" for n in body_graph.nodes)
    chunked = [inputs[n] for n in chunked_nodes]
    body = Body(module, tuple(i.spec for i in chunked), tuple(specs), has_seed)
    return Lifted(region, body, chunked, [inputs[n] for n in direct], hoisted, by_copy, outputs, counts[0], lifter)


def stops_gradient(node: fx.Node, value: Any, states: Mapping[fx.Node, Any]) -> bool:
    """Whether one of a node's values was made under no_grad (a teacher beside a student): detached in the body too.

    A view made there says that it requires a gradient, and is a leaf all the same: grad mode tells, ``states``
    being those of the graph.
    """
    if not isinstance(value, torch.Tensor) or not is_differentiable(value.dtype):
        return False
    if any(value is fake(n) for n in node.all_input_nodes):
        return False  # a cast to the dtype it has gives back the very value, with its gradient
    off = not value.requires_grad or not records_gradients(states.get(node))
    return off and any(needs_grad(n) for n in node.all_input_nodes)


def _tokens(live_in: LiveIn) -> Any:
    assert live_in.kinds is not None
    return numel([s for s, k in zip(live_in.shape, live_in.kinds, strict=True) if k])


def _contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def _hoistable(graph: fx.Graph, shared: list[fx.Node], in_loop: set[fx.Node]) -> list[fx.Node]:
    """Return the computations on shared inputs alone that are more than views, the last of each chain."""
    pure: set[fx.Node] = set(shared)
    for node in graph.nodes:
        if node.op == "call_function" and node.all_input_nodes and pure.issuperset(node.all_input_nodes):
            if node not in in_loop:
                pure.add(node)

    def reaches_rows(node: fx.Node) -> bool:
        return any(u not in pure or (u.target in _VIEWS and reaches_rows(u)) for u in node.users)

    heavy = [n for n in graph.nodes if n in pure and n not in shared and n.target not in _VIEWS]
    return [n for n in heavy if reaches_rows(n)]


def _body_graph(graph: fx.Graph, inputs: list[fx.Node], seed: fx.Node | None) -> fx.Graph:
    """Copy the part of the row-form graph behind ``inputs``, which become the placeholders."""
    body = fx.Graph()
    env = {n: body.placeholder(f"in_{i}") for i, n in enumerate(inputs)}
    needed = _needed(graph, set(inputs))
    if seed is not None and seed in needed:
        env[seed] = body.placeholder("seed")
    for node in graph.nodes:
        if node.op == "call_function" and node in needed and node not in env:
            env[node] = body.node_copy(node, lambda n: env[n])
        elif node.op == "output":
            body.output(fx.map_arg(node.args[0], lambda n: env[n]))
    return body


def _needed(graph: fx.Graph, stop: set[fx.Node]) -> set[fx.Node]:
    needed: set[fx.Node] = set()
    stack = [n for n in graph.nodes if n.op == "output"]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += [] if node in stop else node.all_input_nodes
    return needed


def _run_shared(node: fx.Node, inputs: dict[fx.Node, Input]) -> InputSpec:
    """Run a hoisted computation on meta tensors to learn what its result looks like."""
    used: list[InputSpec] = []

    def run(n: fx.Node) -> Any:
        if n in inputs:
            spec = inputs[n].spec
            used.append(spec)
            return torch.empty_strided(spec.shape, spec.stride or (), dtype=spec.dtype, device="meta")
        args, kwargs = fx.map_arg((n.args, n.kwargs), run)
        return n.target(*args, **{k: v for k, v in kwargs.items() if k != "device"})  # pyright: ignore

    value = run(node)
    needs = is_differentiable(value.dtype) and any(spec.needs_grad for spec in used)
    return InputSpec(tuple(value.shape), value.dtype, used[0].device, tuple(value.stride()), needs)
