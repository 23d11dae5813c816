"""Takes the tail behind a region into it: its first output becomes the scalar that gradients flow from.

    ce = total 1 / count; z = total 2 / T; loss = ce + 1e-3 * z + aux
 -> w = 1 / count; rows = ce rows * w + z rows * 1e-3 / T; loss = mst_fx.sum(rows) + aux

The weights are computed in front of the scalar, from what is there anyway: counts, masks, factors. A mean alone
has one too: gradients that were rounded to bf16 before they are divided would be rounded twice. Where it is one number
for all tokens the loop is told (``Body.weight``): it has ways to round less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.effects import mutated_storages
from mst_fx.graph import fake_tensor, ndim, storages
from mst_fx.regions.ignored import with_ignored_tokens
from mst_fx.regions.lift import Lifted, Output, finish_lift
from mst_fx.regions.losses import LossCall, ValueSum, count, is_divided, none_counts, read_by_count, sum_dtype
from mst_fx.regions.region import region_key
from mst_fx.regions.rewrite import erase_dead, find_place, size_of, token_count
from mst_fx.regions.tail import Scalar, Step, Tail, Term, find_scalar
from mst_fx.report import Mismatch
from mst_fx.rowform.custom import has_own_gradient
from mst_fx.rowform.rows import MixesTokensError, Row, aten


def sum_lifted(lifted: Lifted, fake_mode: Any) -> Lifted | None:
    """Return the region with its tail: its first output is the scalar; None where there is no such scalar.

    There is none either where a gradient is of the user's own making: it may be another for a scaled loss.

    The region's nodes grow by those of the tail, and weights are computed in front of the scalar (``built``);
    nothing is left of either where it fails.
    """
    tail = Tail(lifted.lifter)
    tail.follow(lifted.outputs)
    scalar = find_scalar(tail, lifted.outputs)
    region = lifted.region
    if scalar is None or _changed(scalar, lifted.outputs, region.module.graph):
        return None
    if any(n in region.nodes for o in (*lifted.outputs, *tail.totals.values()) for n in read_by_count(o.total)):
        return None  # labels made of the logits: how many count is known when all are there
    known = {o.node: o for o in lifted.outputs} | tail.totals
    graph, nodes = region.module.graph, list(region.nodes)
    before = set(graph.nodes)
    region.nodes += scalar.rows
    dead, weight = scalar.dead, None
    try:
        main = tail.totals.get(scalar.node)
        if main is None or is_divided(main.total):
            dead = dead if scalar.node in region.nodes else (*dead, scalar.node)
            main, weight = _combine(tail, scalar, lifted, fake_mode)
        summed = finish_lift(lifted.lifter, [main, *(known.get(n) or Output(n, tail.rows[n]) for n in scalar.extras)])
    except MixesTokensError:
        summed = None
    built = [n for n in graph.nodes if n not in before]
    if summed is not None and not has_own_gradient(summed.body.graph.graph):  # pyright: ignore[reportAttributeAccessIssue]
        position = next((i for i, s in enumerate(summed.shared) if s.node is weight), None)
        body = dataclasses.replace(with_ignored_tokens(summed.body), weight=position)
        summed = dataclasses.replace(summed, body=body, dead=list(dead), built=built)
        if not isinstance(find_place(summed), Mismatch):
            return summed
    region.nodes[:] = nodes
    erase_dead(graph, built)
    return None


def _changed(scalar: Scalar, outputs: Sequence[Output], graph: fx.Graph) -> bool:
    """Whether what the scalar is made of changes in place before it is computed, but for sums it is made by.

    That are coefficients, terms from outside, and every value on the way from the outputs to the scalar.
    """
    order = {n: i for i, n in enumerate(graph.nodes)}
    others = [s.other for t in scalar.terms for s in t.steps] + [t.leaf for t in scalar.terms if not t.inside]
    read = [n for n in others if isinstance(n, fx.Node)]
    way = _between({o.node for o in outputs}, scalar.node, order)
    held, first = set().union(*map(storages, read)), min((order[n] for n in read), default=0)
    made = set().union(*map(storages, way))
    return any(
        changes & made or (changes & held and order[n] > first)
        for n in graph.nodes
        if order[n] < order[scalar.node] and n not in way and (changes := mutated_storages(n))
    )


def _between(starts: set[fx.Node], end: fx.Node, order: dict[fx.Node, int]) -> set[fx.Node]:
    """Return ``starts`` and what is computed from them that ``end`` is computed from."""
    ahead, stack = set[fx.Node](), [end]
    while stack:
        node = stack.pop()
        if node not in ahead:
            ahead.add(node)
            stack += node.all_input_nodes
    found = set(starts)
    for node in sorted(ahead, key=order.__getitem__):
        if found.intersection(node.all_input_nodes):
            found.add(node)
    return found


def _combine(tail: Tail, scalar: Scalar, lifted: Lifted, fake_mode: Any) -> tuple[Output, fx.Node | None]:
    """Record the weighted sum of all leaves per token; what comes from outside is added behind.

    Also return the weight of all where it is one number, made for this.
    """
    builder, graph = tail.lifter.builder, lifted.region.module.graph
    old = fake_tensor(scalar.node)
    assert old is not None
    wide = sum_dtype(old.dtype)
    writer = _Writer(graph, scalar.node, lifted, fake_mode, wide)
    combined: fx.Node | None = None
    offsets: list[Any] = []
    weights: list[Any] = []
    known = set(graph.nodes)
    for term in scalar.terms:
        if not term.inside:
            offsets.append(writer.forward(term))
            continue
        total = tail.totals.get(term.leaf)
        row = total.row if total is not None else tail.rows[term.leaf]
        weight = writer.weight(term)
        if total is not None:
            weight, offset = writer.divided(weight, total)
            offsets += offset
        node = builder.emit(aten._to_copy.default, row.node, dtype=wide)
        weights.append(weight)
        if isinstance(weight, fx.Node):
            value, leaf = fake_tensor(weight), fake_tensor(term.leaf)
            assert value is not None
            assert leaf is not None
            tail.lifter.outer[id(value)] = weight
            shape, kinds = ((lifted.tokens,), (True,)) if total is not None else (leaf.shape, row.kinds)
            weight = builder.aligned(value, shape, kinds)
        node = builder.emit(aten.mul.Tensor, node, weight)
        combined = node if combined is None else builder.emit(aten.add.Tensor, combined, node)
    assert combined is not None
    row = Row((True,), builder.emit(aten._to_copy.default, combined, dtype=wide))
    single = len(weights) == 1 and weights[0] not in known and ndim(weights[0]) == 0
    return Output(scalar.node, row, ValueSum(scalar.node, "sum"), tuple(offsets)), weights[0] if single else None


class _Writer:
    """Writes the weights of terms in front of the scalar, with their fake values."""

    def __init__(self, graph: fx.Graph, place: fx.Node, lifted: Lifted, fake_mode: Any, wide: torch.dtype) -> None:
        self.graph, self.place, self.lifted, self.fake_mode, self.wide = graph, place, lifted, fake_mode, wide
        self.known = set(graph.nodes)

    def weight(self, term: Term) -> Any:
        """Apply the transposes of the steps to 1."""
        weight: Any = 1.0
        for step in reversed(term.steps):
            if step.kind == "reduce":
                weight = self._divide(weight, self._number(step.mean)) if step.mean is not None else weight
                for d in sorted(() if step.kept else step.dims, reverse=True):
                    if isinstance(weight, fx.Node) and ndim(weight) >= -d:
                        weight = self._method("unsqueeze", weight, d)
            else:
                weight = self._step(weight, step)
        return weight

    def forward(self, term: Term) -> Any:
        """Apply the steps to a scalar from outside."""
        value = term.leaf
        for step in term.steps:
            value = value if step.kind == "reduce" else self._step(value, step)
        return value

    def divided(self, weight: Any, output: Output) -> tuple[Any, list[Any]]:
        """Divide by what the total divides by; also return what makes it NaN where nothing counts."""
        total = output.total
        assert total is not None
        with self.graph.inserting_before(self.place):
            by = count(self.graph, total, lambda: token_count(self.graph, self.lifted), self._number)
            none = None
            if by is not None and isinstance(total, LossCall) and not total.soft:
                none = none_counts(self.graph, total, by)
        self._fill()
        if by is None:
            return weight, []
        if none is None:
            return self._divide(weight, by), []
        weight = self._divide(weight, self._call(torch.add, by, none))
        return weight, [self._call(torch.where, none, float("nan"), 0.0)]

    def _step(self, value: Any, step: Step) -> Any:
        if step.kind == "divide":
            return self._divide(value, step.other)
        if step.kind == "negate":
            return self._call(torch.neg, value) if isinstance(value, fx.Node) else -value
        other = self._widened(step.other)
        if isinstance(other, fx.Node):
            other = self._as_tensor(other)
        if not isinstance(value, fx.Node) and not isinstance(other, fx.Node):
            return value * other
        return self._call(torch.mul, *((value, other) if isinstance(value, fx.Node) else (other, value)))

    def _widened(self, value: Any) -> Any:
        """Return a coefficient in the dtype of the sum: a count gives a loss in fp64 weights in fp32 otherwise."""
        known = fake_tensor(value)
        if known is None or torch.result_type(known, 1.0) == self.wide:
            return value
        return self._method("to", value, self.wide)

    def _divide(self, value: Any, by: Any) -> Any:
        by = self._widened(by)
        if isinstance(value, fx.Node):
            return self._call(torch.div, value, by)
        if isinstance(by, fx.Node):
            inverse = self._call(torch.reciprocal, self._as_tensor(by))
            return inverse if value == 1.0 else self._call(torch.mul, inverse, value)
        return value / by if by else value * float("inf")

    def _as_tensor(self, value: fx.Node) -> fx.Node:
        """Return a number of the graph (a size) as a tensor."""
        if fake_tensor(value) is not None:
            return value
        device = self.lifted.chunked[0].spec.device
        return self._call(torch.scalar_tensor, value, dtype=self.wide, device=device)

    def _number(self, value: Any) -> Any:
        if not isinstance(value, torch.SymInt):
            return value
        with self.graph.inserting_before(self.place):
            node = size_of(self.graph, value, self.lifted.region.nodes)
        self._fill()
        return node

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(self.place):
            node = self.graph.call_function(target, args, kwargs)
        self._fill()
        return node

    def _method(self, name: str, *args: Any) -> fx.Node:
        with self.graph.inserting_before(self.place):
            node = self.graph.call_method(name, args)
        self._fill()
        return node

    def _fill(self) -> None:
        """Give new nodes their fake values."""
        new: list[fx.Node] = []
        node = self.place.prev
        while node not in self.known:
            new.append(node)
            self.known.add(node)
            node = node.prev
        for node in reversed(new):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
            with self.fake_mode, torch.no_grad(), torch.inference_mode(False):
                function = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
                rest = args[1:] if node.op == "call_method" else args
                node.meta["example_value"] = function(*rest, **kwargs)  # pyright: ignore
            node.meta["mst_region"] = region_key(self.lifted.region)
