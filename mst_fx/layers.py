"""Equal layers of a rewritten graph become calls of one graph, which is traced, partitioned and lowered once.

    layer, layer, layer, ... -> invoke_subgraph(layer, inputs), invoke_subgraph(layer, inputs), ...

What ``torch.compiler.nested_compile_region`` asks a user to mark is found here by comparing layers node by node.
The graph computes the same in the same order; what compiling costs no longer grows with the number of layers.

Facts this file rests on (seen on 2.13):
    * One identifier is one graph: AOTAutograd takes the first call's forward and backward for every other call
      of that name, so that layers are equal only if their inputs are alike in dtype, strides and ``requires_grad``.
    * The graph may neither change nor return its inputs, and Inductor takes no symbolic sizes for it.
    * A backward is traced with the dispatch keys of its forward but the autocast dtype of where it is traced: with an
      autocast that a graph enters itself that is the default, to which products would be cast once more. So the graph
      is compiled with the dtype of its own for a default (``tracing_of_calls``), where nothing else asks for that.
    * CUDA graphs and the C++ wrapper do not see what is inside; ``inductor.shares_layers`` refuses both.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from mst_fx.effects import gradients_flow, is_in_place
from mst_fx.graph import (
    CHECKPOINT,
    autocast_dtypes,
    block_graph,
    default_autocast_dtypes,
    dtypes_now,
    fake,
    in_autocasts_of,
    is_autocast_switch,
    is_grad_switch,
    needs_grad,
    node_name,
    open_autocasts,
    run_on_fakes,
    source_of,
    storages,
)
from mst_fx.inductor import apart_from_autograd_settings, fake_mode_of, is_plain_fake, writes_not_looked_for

log = logging.getLogger(__name__)

FEWEST = 2
"""Equal layers from which on they share a graph."""
NAME = "mst_layer_{}"
INVOKE = torch.ops.higher_order.invoke_subgraph


@dataclass(frozen=True)
class Unit:
    """One layer, or several that take turns: consecutive nodes, what they read from outside, what is read outside."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @classmethod
    def of(cls, nodes: Sequence[fx.Node]) -> Unit:
        """Take nodes in the order of their graph; parameters and constants among them are inputs."""
        blocks = [n.args[0] for n in nodes if n.target is CHECKPOINT]
        own: dict[Any, None] = dict.fromkeys([*blocks, *(n for n in nodes if n.op not in _GIVEN)])
        inputs = dict.fromkeys(a for n in own for a in n.all_input_nodes if a not in own)
        return cls(tuple(own), tuple(inputs), tuple(n for n in own if any(u not in own for u in n.users)))

    def key(self, live: set[fx.Node]) -> tuple[Any, ...]:
        """What units that compute the same of alike inputs, and get gradients alike, have in common."""
        return _written(self.inputs, self.nodes, self.outputs), tuple(n in live for n in self.outputs)

    @property
    def place(self) -> str:
        """Where the first of its nodes comes from."""
        return source_of(self.nodes[0])

    def graph(self, root: fx.GraphModule, live: set[fx.Node]) -> fx.GraphModule:
        """Return the unit as a graph of its own: of its inputs, to a tuple of its outputs.

        An output that no gradient comes back to (a router that is only logged) is detached: for a tangent that is
        not there torch takes zeros, which would be gradients of what has none.
        """
        graph, made = fx.Graph(), {}
        for i, node in enumerate(self.inputs):
            made[node] = graph.placeholder(f"input_{i}")
            made[node].meta["example_value"] = fake(node)
        for node in self.nodes:
            made[node] = graph.node_copy(node, made.__getitem__)
        stops = {n for n in self.outputs if needs_grad(n) and n not in live}
        graph.output(tuple(graph.call_method("detach", (made[n],)) if n in stops else made[n] for n in self.outputs))
        return fx.GraphModule(root, graph)


_GIVEN = ("placeholder", "get_attr", "output")


@dataclass(frozen=True)
class _Slot:
    number: int


def _written(inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], outputs: Any) -> tuple[Any, ...]:
    """Write a computation down without the names of its values; functions in it are compared by identity."""
    slots = {n: _Slot(i) for i, n in enumerate((*inputs, *nodes))}

    def slotted(arguments: Any) -> str:
        return repr(fx.map_arg(arguments, slots.__getitem__))

    def described(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return repr(value)
        return tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad

    lines = [_block(n) or (n.op, n.target, slotted((n.args, n.kwargs))) for n in nodes]
    return tuple(described(fake(n)) for n in inputs), tuple(lines), slotted(tuple(outputs))


def _block(node: fx.Node) -> tuple[Any, ...] | None:
    """Write down the graph of a checkpointed block; None for any other node."""
    inner = block_graph(node)
    if inner is None:
        return None
    *nodes, output = inner.graph.nodes
    holders = [n for n in nodes if n.op == "placeholder"]
    results = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)  # a hook's: one node
    return _written(holders, [n for n in nodes if n.op != "placeholder"], results)


@apart_from_autograd_settings()
def share_layers(module: fx.GraphModule) -> int:
    """Replace equal layers by calls of one graph, in place; return how many were replaced.

    Args:
        module: A rewritten Dynamo graph with fake values in ``meta["example_value"]``.
    """
    count, live = 0, gradients_flow(module.graph)
    for units in [*_repeats([n for n in module.graph.nodes if n.op not in _GIVEN])]:
        reason = _reason_against(module, units) or _reason_around(module, units[0].nodes[0])
        if reason:
            log.debug("mst: %d layers are compiled one by one, the first at %s: %s", len(units), units[0].place, reason)
            continue
        groups: dict[Any, list[Unit]] = {}
        for unit in units:
            groups.setdefault(unit.key(live), []).append(unit)
        for alike in groups.values():
            if len(alike) >= FEWEST:
                name = NAME.format(sum(n.startswith(NAME.format("")) for n, _ in module.named_children()))
                # Taken anew: what goes in may come out of layers that are calls by now.
                setattr(module, name, Unit.of(alike[0].nodes).graph(module, live))
                for unit in alike:
                    _call(module.graph, name, unit)
                count += len(alike)
                log.debug("mst: %d layers are calls of one graph, the first at %s", len(alike), alike[0].place)
    if count:
        module.graph.lint()
        module.recompile()
    return count


@contextlib.contextmanager
def tracing_of_calls(module: fx.GraphModule) -> Iterator[None]:
    """Return the settings under which torch is to trace a graph that calls shared layers.

    The dtypes of the autocasts that the calls are under are the defaults. And where every graph called is of a layer
    shared here, none writes to what goes in, so that torch need not look.
    """
    graphs = [m.graph for m in module.modules() if isinstance(m, fx.GraphModule)]
    calls = [n for g in graphs for n in g.find_nodes(op="call_function", target=INVOKE)]
    ours = [n for n in calls if _is_ours(n)]
    dtypes = {kind: dtype for n in ours for kind, dtype in autocast_dtypes(n).items()}
    looked_for = writes_not_looked_for() if len(ours) == len(calls) else contextlib.nullcontext()
    with looked_for, default_autocast_dtypes(dtypes):
        yield


def _is_ours(call: fx.Node) -> bool:
    return str(call.args[1]).startswith(NAME.format(""))


# -- what repeats --------------------------------------------------------------------------------------


def _repeats(nodes: Sequence[fx.Node]) -> Iterator[list[Unit]]:
    """Yield every sequence of repeats with a chunked region in it, the longest of a stretch of nodes first.

    A sequence may be divided at any node; it is where the fewest values go from one repeat to the next.
    """
    ours = [*itertools.accumulate(map(_is_chunked, nodes), initial=0)]
    runs = [(start, period, n) for start, period, n in _runs(_shapes(nodes)) if ours[start + period] > ours[start]]
    if not runs:
        return
    start, period, length = max(runs, key=lambda run: run[2] // run[1] * run[1])

    def divided(shift: int) -> list[Unit]:
        starts = range(start + shift, start + length - period + 1, period)
        return [Unit.of(nodes[i : i + period]) for i in starts]

    def cost(units: Sequence[Unit]) -> tuple[int, int, int]:
        lists = sum(not isinstance(fake(n), torch.Tensor) for u in units for n in (*u.inputs, *u.outputs))
        return lists, max(len(unit.outputs) for unit in units), -len(units)

    ways = [units for shift in range(period) if len(units := divided(shift)) >= FEWEST]
    yield min(ways, key=cost)
    yield from _repeats(nodes[:start])
    yield from _repeats(nodes[start + length :])


def _runs(shapes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield where a sequence is a repeated one: start, period, and how many items from the start on are in it."""
    seen: dict[int, int] = {}
    periods = set()
    for i, shape in enumerate(shapes):
        periods.add(i - seen.get(shape, i))
        seen[shape] = i
    for period in sorted(periods - {0}):
        start = 0
        for same, group in itertools.groupby(a == b for a, b in zip(shapes, shapes[period:], strict=False)):
            length = sum(1 for _ in group)
            if same and length + period >= FEWEST * period:
                yield start, period, length + period
            start += length


def _shapes(nodes: Sequence[fx.Node]) -> list[int]:
    """Number nodes by what they call with what constants, whatever values they read."""
    numbers: dict[Any, int] = {}
    found = []
    for node in nodes:
        arguments = repr(fx.map_arg((node.args, node.kwargs), lambda n: _block(n) or "value"))
        found.append(numbers.setdefault((node.op, node.target, arguments), len(numbers)))
    return found


def _is_chunked(node: fx.Node) -> bool:
    inner = block_graph(node.args[0]) if node.target is CHECKPOINT else None  # pyright: ignore[reportArgumentType]
    ours = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "mst_fx"
    return ours or (inner is not None and any(map(_is_chunked, inner.graph.nodes)))


def _call(graph: fx.Graph, name: str, unit: Unit) -> None:
    unit = Unit.of(unit.nodes)  # what the layer before gives has become a result of its call
    with graph.inserting_after(unit.nodes[-1]):
        place = graph.get_attr(name)
    with graph.inserting_after(place):
        call = place = graph.call_function(INVOKE, (place, name, *unit.inputs))
    call.meta = {k: unit.nodes[0].meta[k] for k in ("stack_trace", "nn_module_stack") if k in unit.nodes[0].meta}
    call.meta["example_value"] = tuple(fake(n) for n in unit.outputs)
    for i, node in enumerate(unit.outputs):
        with graph.inserting_after(place):
            place = graph.call_function(operator.getitem, (call, i))
        place.meta = {**node.meta}
        node.replace_all_uses_with(place, delete_user_cb=lambda user: user not in unit.nodes)
    for node in reversed(unit.nodes):
        graph.erase_node(node)


# -- what must not be shared ---------------------------------------------------------------------------


def _reason_against(module: fx.GraphModule, units: Sequence[Unit]) -> str | None:
    """Return why units may not become calls of one graph, None if they may."""
    place = {n: i for i, n in enumerate(module.graph.nodes)}
    if any(node_name(n) in ("grad", "backward") for n in place):
        return "the graph computes gradients itself"
    among = [*place][min(place[n] for n in units[0].nodes) : place[units[-1].nodes[-1]]]
    if any(map(_switches, among)):
        return "a mode is switched among them"
    for unit in units:
        values = [fake(n) for n in (*unit.inputs, *unit.outputs)]
        if not all(is_plain_fake(v) and v.layout is torch.strided for v in values):
            return "not all that goes in and comes out is a plain tensor"
        if not all(isinstance(n, int) for v in values for n in (*v.shape, *v.stride())):
            return "sizes are symbolic"
        inside, outside = [storages(n) for n in unit.outputs], set[int]().union(*map(storages, unit.inputs))
        if not unit.outputs or len(set[int]().union(*inside)) < len(inside) or any(s & outside for s in inside):
            return "what comes out shares memory with something else"
        readers = (u for n in unit.outputs for u in n.users if u not in unit.nodes)
        if any(place[u] < place[unit.nodes[-1]] for u in readers):
            return "a value is read before the last of its layer is computed"
    mode = fake_mode_of([fake(n) for n in units[0].inputs])
    with in_autocasts_of(units[0].nodes[0]):
        return _reason_within(units[0].nodes, mode)


def _reason_around(module: fx.GraphModule, place: fx.Node) -> str | None:
    """Return what keeps layers from being shared under the autocasts in force at a place of the graph.

    One around the compiled function is lost to a shared layer that the graph calls under one of its own. And what
    else there is may not change with the default that layers under one need.
    """
    if dtypes_now() and open_autocasts(place):
        return "they are within an autocast of the graph, and that within another"
    nodes = [n for m in module.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes]
    for kind, dtype in autocast_dtypes(place).items():
        if dtype == torch.get_autocast_dtype(kind):
            continue
        entered = [n.args for n in nodes if is_autocast_switch(n) and n.args[0] == kind]
        if any(enabled and given != dtype for _, given, enabled, *_ in entered):
            return "another autocast is not to the same dtype"
        if any(isinstance(n.target, torch._ops.HigherOrderOperator) and not _has_no_default(n) for n in nodes):
            return "they are within an autocast, and the graph holds others that may be"
    return None


def _has_no_default(node: fx.Node) -> bool:
    return node.target is CHECKPOINT or (node.target is INVOKE and _is_ours(node))


def _switches(node: fx.Node) -> bool:
    return is_autocast_switch(node) or is_grad_switch(node)


def _reason_within(nodes: Sequence[fx.Node], mode: Any) -> str | None:
    """Run nodes on their fake inputs and return what in them keeps a graph of theirs from being shared."""
    for node in nodes:
        inner = block_graph(node)
        if inner is not None:
            if "_checkpoint_context_fn" in inner.meta:
                return f"{node.name} has a policy of what to recompute"
            found = _reason_within([n for n in inner.graph.nodes if n.op not in ("placeholder", "output")], mode)
            if found:
                return found
        elif isinstance(fake(node), (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return f"{node.name} is a symbolic number"
        elif is_in_place(node) or _switches(node):
            return f"{node.name} changes a value or a mode"
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            if node.target is not CHECKPOINT:
                return f"{node.name} has a graph of its own"
        elif node.op != "get_attr" and not any(u.target is CHECKPOINT for u in node.all_input_nodes):
            try:
                with _Watch() as watch:
                    run_on_fakes(node, mode)
            except Exception as e:
                return f"{node.name} can't be run on fake values: {e}"
            if watch.found:
                return watch.found
    return None


class _Watch(TorchDispatchMode):
    """Notes an ATen op that draws random numbers or changes a value."""

    def __init__(self) -> None:
        super().__init__()
        self.found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload):
            parameters = func._schema.arguments
            given = {p.name: p.default_value for p in parameters if p.has_default_value()}
            given |= {**dict(zip((p.name for p in parameters), args, strict=False)), **kwargs}
            if torch.Tag.nondeterministic_seeded in func.tags and given.get("dropout_p") != 0:
                self.found = f"{func} draws random numbers"
            elif func._schema.is_mutable or "running_mean" in given:
                self.found = f"{func} may change a value in place"
        return func(*args, **kwargs)
