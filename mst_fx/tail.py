"""What follows a region's per-token values: one scalar that is linear in them, if that can be proved.

    per_token = cross_entropy(logits, labels, reduction="none"); z = logits.logsumexp(-1) ** 2
    loss = ((per_token * mask).sum(1) / mask.sum(1)).mean() + 1e-3 * z.mean()
 -> loss = sum over tokens of (per_token * mask * w + z * 1e-3 / T),  w = 1 / (B * mask.sum(1))

Terms:
    row value: a value behind the region that is still token-wise; it joins the body.
    leaf: a row value, or a node that reduces over all tokens, from which on everything is linear.
    step: one linear operation behind a leaf; its coefficients do not depend on the region.
    weights: what a leaf's rows are multiplied by: the transposes of the steps, applied to 1.
    scalar: the first node that everything that needs a gradient leads to.

The weights must not need a gradient themselves and must come from outside the region; a value with another
differentiable reader than the scalar refuses. Readers that need no gradient (metrics, logged parts of the
loss) get their values beside the sum.
Not handled: views of partly reduced values, sums of stacked scalars; their gradients are recomputed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx
from torch.utils import _pytree as pytree

from mst_fx.graph import fake, fake_tensor, is_in_place, mutated_storages, node_name, storages, walking
from mst_fx.lift import Lifted, Lifter, Output, finish_lift
from mst_fx.losses import LossCall, ValueSum, count, read_total, sum_dtype
from mst_fx.region import region_key
from mst_fx.report import Mismatch
from mst_fx.rewrite import erase_dead, find_place, size_of, token_count
from mst_fx.rows import MixesTokensError, Row, aten, same_size

_SCALES = {"mul": "scale", "imul": "scale", "mul_": "scale", "multiply": "scale", "truediv": "divide", "div": "divide",
           "itruediv": "divide", "div_": "divide", "divide": "divide", "true_divide": "divide"}  # fmt: skip
_SUMS = {"add": 1, "iadd": 1, "add_": 1, "sub": -1, "isub": -1, "sub_": -1, "subtract": -1}
_CASTS = {"float", "double", "to", "type_as", "clone", "contiguous"}


@dataclass(frozen=True)
class Step:
    """One linear operation on the way from a leaf to the scalar."""

    kind: Literal["scale", "divide", "negate", "reduce"]
    other: Any = None
    """The factor or divisor: a node or a number."""
    dims: tuple[int, ...] = ()
    """Reduced dimensions, counted from the last one of the value before: negative."""
    kept: bool = False
    mean: Any = None
    """For a mean, the number of values."""


@dataclass(frozen=True)
class Term:
    """One summand: a leaf of the region or a scalar from outside, and what is done to it."""

    leaf: Any
    inside: bool
    steps: tuple[Step, ...] = ()

    def then(self, *steps: Step) -> Term:
        """Return the term with more steps."""
        return Term(self.leaf, self.inside, (*self.steps, *steps))


@dataclass
class Tail:
    """What was found behind a region's outputs."""

    lifter: Lifter
    rows: dict[fx.Node, Row] = field(default_factory=dict)
    totals: dict[fx.Node, Output] = field(default_factory=dict)
    """Leaves that reduce over all tokens."""
    linear: dict[fx.Node, tuple[Term, ...]] = field(default_factory=dict)

    def follow(self, outputs: Sequence[Output]) -> None:
        """Walk forward from a region's outputs, as far as values are token-wise or linear in such."""
        members = set(self.lifter.region.nodes)
        tainted = {*members}
        for output in outputs:
            if output.reduced:
                self.totals[output.node] = output
                self.linear[output.node] = (Term(output.node, True),)
            else:
                self._add_row(output.node, output.row, output.total is not None)
        with walking(self.lifter.region.module) as nodes:
            for node in nodes:
                reads = [n for n in node.all_input_nodes if n in tainted]
                if node in members or not reads:
                    continue
                tainted.add(node)
                if node.op == "output":
                    continue
                if all(n in self.rows for n in reads):
                    self._follow_rows(node, members)
                elif all(n in self.linear for n in reads):
                    self._follow_linear(node, reads)

    def _add_row(self, node: fx.Node, row: Row, bind: bool) -> None:
        self.rows[node] = row
        value = fake_tensor(node)
        if bind and value is not None:
            self.lifter.builder.bind(value, row)

    def _follow_rows(self, node: fx.Node, members: set[fx.Node]) -> None:
        if is_in_place(node):
            return
        total = read_total(node)
        try:
            row = self.lifter.record_node(node, members | set(self.rows))
        except Exception:  # what can't be recorded is a reader outside, or one step of a sum
            row = None
        if row is not None and (total is None or total.reduction == "none"):
            self._add_row(node, row, total is not None)
        elif row is not None:
            self.totals[node] = Output(node, row, total)
            self.linear[node] = (Term(node, True),)
        else:
            leaf = self.rows.get(node.args[0]) if node.args else None  # pyright: ignore
            step = self._reduction(node)
            if step is not None and leaf is not None and all(leaf.kinds) and _needs_grad(node):
                self.linear[node] = (Term(node.args[0], True, (step,)),)

    def _follow_linear(self, node: fx.Node, reads: list[fx.Node]) -> None:
        if is_in_place(node) and not self._is_alone(node):
            return  # the value before is read as well
        name, result = node_name(node), fake_tensor(node)
        if result is None or not result.requires_grad:
            return
        first = node.args[0]
        if name in _SUMS and len(node.args) == 2 and not node.kwargs:
            self._follow_sum(node, _SUMS[name], result)
        elif name in _SCALES and len(node.args) == 2 and not node.kwargs and len(reads) == 1:
            by = node.args[1] if first is reads[0] else first
            forwards = first is reads[0] or _SCALES[name] == "scale"
            if forwards and by is not reads[0] and _keeps_shape(reads[0], result) and not _needs_grad(by):
                self.linear[node] = tuple(t.then(Step(_SCALES[name], by)) for t in self.linear[reads[0]])  # pyright: ignore
        elif name in ("neg", "negative") and len(node.args) == 1:
            self.linear[node] = tuple(t.then(Step("negate")) for t in self.linear[reads[0]])
        elif name in _CASTS and reads == [first] and _keeps_shape(first, result):
            self.linear[node] = self.linear[reads[0]]
        elif reads == [first] and (step := self._reduction(node)) is not None:
            self.linear[node] = tuple(t.then(step) for t in self.linear[reads[0]])

    def _is_alone(self, node: fx.Node) -> bool:
        """Whether nothing but the in-place ``node`` reads what it changes."""
        held = storages(node.args[0])  # pyright: ignore
        before = [n for n in self.lifter.region.module.graph.nodes if n is not node and storages(n) & held]
        return all(len(n.users) == 1 for n in before if node not in n.all_input_nodes and not _follows(n, node))

    def _follow_sum(self, node: fx.Node, sign: int, result: torch.Tensor) -> None:
        terms: list[Term] = []
        for value, sign_here in zip(node.args, (1, sign), strict=True):
            own = self.linear.get(value) if isinstance(value, fx.Node) else None  # pyright: ignore
            if own is None and (result.ndim or (isinstance(value, fx.Node) and _ndim(value))):
                return
            if own is not None and not _keeps_shape(value, result):  # pyright: ignore
                return
            own = own if own is not None else (Term(value, False),)
            terms += own if sign_here == 1 else [t.then(Step("negate")) for t in own]
        self.linear[node] = tuple(terms)

    def _reduction(self, node: fx.Node) -> Step | None:
        """Read a sum or mean along some dimensions."""
        name = node_name(node)
        value, result = fake_tensor(node.args[0]) if node.args else None, fake_tensor(node)
        names = ("dim", "keepdim")
        given = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
        if name not in ("sum", "mean") or value is None or result is None or set(given) - {*names, "dtype"}:
            return None
        if not value.is_floating_point():
            return None
        dims: Any = given.get("dim")
        dims = range(value.ndim) if dims is None or dims in ((), []) else [dims] if isinstance(dims, int) else dims
        if not all(isinstance(d, int) for d in dims):
            return None
        negative = tuple(sorted(d % value.ndim - value.ndim for d in dims)) if value.ndim else ()
        sizes = [value.shape[d] for d in negative]
        if name == "mean" and not all(isinstance(s, int) for s in sizes) and len(sizes) > 1:
            return None
        number = 1
        for size in sizes:
            number = size if number == 1 else number * size
        return Step("reduce", None, negative, bool(given.get("keepdim", False)), number if name == "mean" else None)


def _keeps_shape(node: Any, result: torch.Tensor) -> bool:
    value = fake_tensor(node)
    return value is not None and value.ndim == result.ndim and all(map(same_size, value.shape, result.shape))


def _follows(node: fx.Node, other: fx.Node) -> bool:
    return any(n is other or _follows(n, other) for n in node.all_input_nodes if storages(n) & storages(other))


def _ndim(node: fx.Node) -> int:
    value = fake_tensor(node)
    return 0 if value is None else value.ndim


def _needs_grad(value: Any) -> bool:
    found = fake_tensor(value)
    return found is not None and found.requires_grad


# -- the scalar --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scalar:
    """The scalar that a region's gradients flow from, and what else is read."""

    node: fx.Node
    terms: tuple[Term, ...]
    extras: tuple[fx.Node, ...]
    """Row values and totals that have readers without a gradient."""
    rows: tuple[fx.Node, ...]
    """Row values and totals behind the region that join it."""
    dead: tuple[fx.Node, ...]
    """What only leads to the scalar."""


def find_scalar(tail: Tail, outputs: Sequence[Output]) -> Scalar | None:
    """Return the first scalar that all gradients of a region flow from, None without one."""
    live = _live(tail.lifter.region.module.graph)
    leaves = {t.leaf for n, terms in tail.linear.items() if n in live for t in terms if t.inside}
    for node, terms in tail.linear.items():
        if node in live and not _ndim(node) and {t.leaf for t in terms if t.inside} >= leaves:
            return _close(tail, node, terms, outputs, live)
    return None


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that a gradient may flow into: they need one, and it leads to an output."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        values = [v for v in pytree.tree_leaves(fake(node)) if isinstance(v, torch.Tensor)]
        carries = any(v.requires_grad for v in values) and any(u in live for u in node.users)
        if carries or node.op == "output" or is_in_place(node) or fake(node) is None:
            live.add(node)
    return live


def _close(
    tail: Tail, scalar: fx.Node, terms: tuple[Term, ...], outputs: Sequence[Output], live: set[fx.Node]
) -> Scalar | None:
    """Check that every reader between the outputs and the scalar leads to it or needs no gradient."""
    members = set(tail.lifter.region.nodes)
    needed = {scalar}
    stack = [scalar]
    while stack:
        for n in stack.pop().all_input_nodes:
            if (n in tail.rows or n in tail.linear) and n not in needed:
                needed.add(n)
                stack.append(n)
    inside = {n for n in needed if n in tail.rows or n in tail.totals}
    extras: set[fx.Node] = set()
    kept: list[fx.Node] = []
    for node in {*needed, *(o.node for o in outputs)} - {scalar}:
        for user in node.users:
            if user in needed or user in members:
                continue
            if _needs_grad(node) and user in live:
                return None
            if node in needed and node not in inside:
                kept.append(node)
            else:
                extras.add(node)
    dead = needed - inside
    while kept:
        node = kept.pop()
        dead.discard(node)
        extras.update(n for n in node.all_input_nodes if n in inside)
        kept += [n for n in node.all_input_nodes if n in dead]
    order = {n: i for i, n in enumerate(tail.lifter.region.module.graph.nodes)}
    ordered = [tuple(sorted(found, key=order.__getitem__)) for found in (extras, inside - members, dead - {scalar})]
    return Scalar(scalar, terms, *ordered)


# -- the region with its tail ------------------------------------------------------------------------


def sum_lifted(lifted: Lifted, fake_mode: Any) -> Lifted | None:
    """Return the region with its tail: its first output is the scalar; None where there is no such scalar.

    The region's nodes grow by those of the tail, and weights are computed in front of the scalar (``built``);
    nothing is left of either where it fails.
    """
    tail = Tail(lifted.lifter)
    tail.follow(lifted.outputs)
    scalar = find_scalar(tail, lifted.outputs)
    region = lifted.region
    if scalar is None or _changed(scalar, region.module.graph):
        return None
    known = {o.node: o for o in lifted.outputs} | tail.totals
    graph, nodes = region.module.graph, list(region.nodes)
    before = set(graph.nodes)
    region.nodes += scalar.rows
    dead = scalar.dead
    try:
        main = tail.totals.get(scalar.node)
        if main is None:
            main, dead = _combine(tail, scalar, lifted, fake_mode), (*dead, scalar.node)
        summed = finish_lift(lifted.lifter, [main, *(known.get(n) or Output(n, tail.rows[n]) for n in scalar.extras)])
    except MixesTokensError:
        summed = None
    built = [n for n in graph.nodes if n not in before]
    if summed is not None:
        summed = dataclasses.replace(summed, dead=list(dead), built=built)
        if not isinstance(find_place(summed), Mismatch):
            return summed
    region.nodes[:] = nodes
    erase_dead(graph, built)
    return None


def _changed(scalar: Scalar, graph: fx.Graph) -> bool:
    """Whether a coefficient changes in place before the scalar is computed."""
    others = [s.other for t in scalar.terms for s in t.steps if isinstance(s.other, fx.Node)]
    held = set().union(*map(storages, others))
    order = {n: i for i, n in enumerate(graph.nodes)}
    first = min((order[n] for n in others), default=0)
    return any(mutated_storages(n) & held for n in graph.nodes if first < order[n] < order[scalar.node])


def _combine(tail: Tail, scalar: Scalar, lifted: Lifted, fake_mode: Any) -> Output:
    """Record the weighted sum of all leaves per token; what comes from outside is added behind."""
    builder, graph = tail.lifter.builder, lifted.region.module.graph
    writer = _Writer(graph, scalar.node, lifted, fake_mode)
    old = fake_tensor(scalar.node)
    assert old is not None
    wide = sum_dtype(old.dtype)
    combined: fx.Node | None = None
    offsets: list[Any] = []
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
    return Output(scalar.node, row, ValueSum(scalar.node, "sum"), tuple(offsets))


class _Writer:
    """Writes the weights of terms in front of the scalar, with their fake values."""

    def __init__(self, graph: fx.Graph, place: fx.Node, lifted: Lifted, fake_mode: Any) -> None:
        self.graph, self.place, self.lifted, self.fake_mode = graph, place, lifted, fake_mode

    def weight(self, term: Term) -> Any:
        """Apply the transposes of the steps to 1."""
        weight: Any = 1.0
        for step in reversed(term.steps):
            if step.kind == "reduce":
                weight = self._divide(weight, self._number(step.mean)) if step.mean is not None else weight
                for d in sorted(() if step.kept else step.dims, reverse=True):
                    if isinstance(weight, fx.Node) and _ndim(weight) >= -d:
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
        self._fill()
        if by is None:
            return weight, []
        if not isinstance(total, LossCall) or total.soft:
            return self._divide(weight, by), []
        none = self._call(torch.eq, by, 0)
        weight = self._divide(weight, self._call(torch.add, by, none))
        return weight, [self._call(torch.where, none, float("nan"), 0.0)]

    def _step(self, value: Any, step: Step) -> Any:
        if step.kind == "divide":
            return self._divide(value, step.other)
        if step.kind == "negate":
            return self._call(torch.neg, value) if isinstance(value, fx.Node) else -value
        if not isinstance(value, fx.Node) and not isinstance(step.other, fx.Node):
            return value * step.other
        return self._call(torch.mul, *((value, step.other) if isinstance(value, fx.Node) else (step.other, value)))

    def _divide(self, value: Any, by: Any) -> Any:
        if isinstance(value, fx.Node):
            return self._call(torch.div, value, by)
        if isinstance(by, fx.Node):
            return self._call(torch.mul, self._call(torch.reciprocal, self._as_tensor(by)), value)
        return value / by if by else value * float("inf")

    def _as_tensor(self, value: fx.Node) -> fx.Node:
        """Return a number of the graph (a size) as a tensor."""
        if fake_tensor(value) is not None:
            return value
        device = self.lifted.chunked[0].spec.device
        return self._call(torch.scalar_tensor, value, dtype=torch.float32, device=device)

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
        while node.op != "root" and "example_value" not in node.meta and "mst_region" not in node.meta:
            new.append(node)
            node = node.prev
        for node in reversed(new):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
            with self.fake_mode, torch.no_grad(), torch.inference_mode(False):
                function = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
                rest = args[1:] if node.op == "call_method" else args
                node.meta["example_value"] = function(*rest, **kwargs)  # pyright: ignore
            node.meta["mst_region"] = region_key(self.lifted.region)
