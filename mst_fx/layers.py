"""Equal layers of a rewritten graph become calls of one graph, which is traced, partitioned and lowered once.

    layer, layer, layer, ... -> invoke_subgraph(layer, inputs), invoke_subgraph(layer, inputs), ...

What ``torch.compiler.nested_compile_region`` asks a user to mark is found here by comparing layers node by node.
The graph computes the same in the same order; what compiling costs no longer grows with the number of layers.

Facts this file rests on (seen on 2.13):
    * One identifier is one graph: AOTAutograd takes the first call's forward and backward for every other call
      of that name, so that layers are equal only if their inputs are alike in dtype, strides and ``requires_grad``.
    * The graph may neither change nor return its inputs, and Inductor takes no symbolic sizes for it.
    * CUDA graphs and the C++ wrapper do not see what is inside; ``inductor.shares_layers`` refuses both.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from mst_fx.graph import fake, is_autocast_switch, is_in_place, run_on_fakes, storages
from mst_fx.inductor import fake_mode_of, is_plain_fake
from mst_fx.side_by_side import repeated_layers

log = logging.getLogger(__name__)

FEWEST = 2
"""Equal layers from which on they share a graph."""
NAME = "mst_layer_{}"


@dataclass(frozen=True)
class Unit:
    """One layer, or several that take turns: consecutive nodes, what they read from outside, what is read outside."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @classmethod
    def of(cls, nodes: Sequence[fx.Node]) -> Unit:
        """Take nodes in the order of their graph; placeholders and attributes among them are inputs."""
        own = dict.fromkeys(n for n in nodes if n.op not in ("placeholder", "get_attr", "output"))
        inputs = dict.fromkeys(a for n in own for a in n.all_input_nodes if a not in own)
        return cls(tuple(own), tuple(inputs), tuple(n for n in own if any(u not in own for u in n.users)))

    @functools.cached_property
    def key(self) -> tuple[Any, ...]:
        """What units that compute the same of alike inputs have in common."""
        slots = {n: _Slot(i) for i, n in enumerate((*self.inputs, *self.nodes))}

        def written(node: fx.Node) -> tuple[Any, ...]:
            return node.op, node.target, repr(fx.map_arg((node.args, node.kwargs), slots.__getitem__))

        return (
            tuple(map(written, self.nodes)),
            tuple(_described(fake(n)) for n in self.inputs),
            tuple(slots[n].number for n in self.outputs),
        )

    def graph(self, root: fx.GraphModule) -> fx.GraphModule:
        """Return the unit as a graph of its own: of its inputs, to a tuple of its outputs."""
        graph, made = fx.Graph(), {}
        for i, node in enumerate(self.inputs):
            made[node] = graph.placeholder(f"input_{i}")
            made[node].meta["example_value"] = fake(node)
        for node in self.nodes:
            made[node] = graph.node_copy(node, made.__getitem__)
        graph.output(tuple(made[n] for n in self.outputs))
        return fx.GraphModule(root, graph)


@dataclass(frozen=True)
class _Slot:
    number: int


def share_layers(module: fx.GraphModule) -> int:
    """Replace equal layers by calls of one graph, in place; return how many were replaced.

    Args:
        module: A rewritten Dynamo graph with fake values in ``meta["example_value"]``.
    """
    count = 0
    for repeats in [*repeated_layers(module.graph)]:
        units = [Unit.of(nodes) for nodes, _ in repeats]
        reason = _reason_against(module, units)
        if reason:
            log.debug("mst: %d layers like %s are compiled one by one: %s", len(units), repeats[0][1], reason)
            continue
        groups: dict[Any, list[Unit]] = {}
        for unit in units:
            groups.setdefault(unit.key, []).append(unit)
        for alike in groups.values():
            if len(alike) >= FEWEST:
                name = NAME.format(sum(1 for n, _ in module.named_children() if n.startswith(NAME.format(""))))
                setattr(module, name, alike[0].graph(module))
                for unit in alike:
                    _call(module.graph, name, unit)
                count += len(alike)
    if count:
        module.graph.lint()
        module.recompile()
        log.debug("mst: %d layers are compiled as calls of one graph per kind", count)
    return count


def _call(graph: fx.Graph, name: str, unit: Unit) -> None:
    unit = Unit.of(unit.nodes)  # what the layer before gives has become a result of its call
    with graph.inserting_after(unit.nodes[-1]):
        place = graph.get_attr(name)
    with graph.inserting_after(place):
        call = place = graph.call_function(torch.ops.higher_order.invoke_subgraph, (place, name, *unit.inputs))
    call.meta = {k: unit.nodes[0].meta[k] for k in ("stack_trace", "nn_module_stack") if k in unit.nodes[0].meta}
    call.meta["example_value"] = tuple(fake(n) for n in unit.outputs)
    for i, node in enumerate(unit.outputs):
        with graph.inserting_after(place):
            place = graph.call_function(operator.getitem, (call, i))
        place.meta = {**node.meta}
        node.replace_all_uses_with(place, delete_user_cb=lambda user: user not in unit.nodes)
    for node in reversed(unit.nodes):
        graph.erase_node(node)


def _described(value: torch.Tensor) -> tuple[Any, ...]:
    return tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad


# -- what must not be shared ---------------------------------------------------------------------------


def _reason_against(module: fx.GraphModule, units: Sequence[Unit]) -> str | None:
    """Return why units may not become calls of one graph, None if they may."""
    place = {n: i for i, n in enumerate(module.graph.nodes)}
    if any(getattr(n.target, "__name__", "") in ("grad", "backward") for n in place):
        return "the graph computes gradients itself"
    among = [*place][place[units[0].nodes[0]] : place[units[-1].nodes[-1]]]
    if any(is_autocast_switch(n) or getattr(n.target, "__name__", "") in _SWITCHES for n in among):
        return "a mode is switched among them"
    for unit in units:
        values = [fake(n) for n in (*unit.inputs, *unit.outputs)]
        if not all(is_plain_fake(v) and v.layout is torch.strided for v in values):
            return "not all that goes in and comes out is a plain tensor"
        if not all(isinstance(n, int) for v in values for n in (*v.shape, *v.stride())):
            return "sizes are symbolic"
        if any(is_in_place(n) or isinstance(n.target, torch._ops.HigherOrderOperator) for n in unit.nodes):
            return "a value is changed in place, or a node has a graph of its own"
        inside, outside = [storages(n) for n in unit.outputs], set[int]().union(*map(storages, unit.inputs))
        if not unit.outputs or len(set[int]().union(*inside)) < len(inside) or any(s & outside for s in inside):
            return "what comes out shares memory with something else"
        readers = (u for n in unit.outputs for u in n.users if u not in unit.nodes)
        if any(place[u] < place[unit.nodes[-1]] for u in readers):
            return "a value is read before the last of its layer is computed"
    return _draws_or_writes(units[0])


_SWITCHES = {"_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode"}


def _draws_or_writes(unit: Unit) -> str | None:
    """Run a unit on its fake inputs and say what in it must not be shared."""
    with _Watch() as watch:
        for node in unit.nodes:
            run_on_fakes(node, fake_mode_of([fake(n) for n in unit.inputs]))
    return watch.found


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
