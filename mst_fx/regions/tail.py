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

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from mst_fx.effects import gradients_flow, is_in_place
from mst_fx.graph import fake_tensor, grad_states, ndim, needs_grad, node_name, records_gradients, storages, walking
from mst_fx.regions.lift import Lifter, Output
from mst_fx.regions.losses import read_total
from mst_fx.rowform.rows import Row, same_shape

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
            if step is not None and leaf is not None and all(leaf.kinds) and needs_grad(node):
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
            if forwards and by is not reads[0] and _keeps_shape(reads[0], result) and not needs_grad(by):
                self.linear[node] = tuple(t.then(Step(_SCALES[name], by)) for t in self.linear[reads[0]])  # pyright: ignore
        elif name in ("neg", "negative") and len(node.args) == 1:
            self.linear[node] = tuple(t.then(Step("negate")) for t in self.linear[reads[0]])
        elif name in _CASTS and reads == [first] and _keeps_shape(first, result) and _keeps_device(first, result):
            self.linear[node] = self.linear[reads[0]]
        elif reads == [first] and (step := self._reduction(node)) is not None:
            self.linear[node] = tuple(t.then(step) for t in self.linear[reads[0]])

    def _is_alone(self, node: fx.Node) -> bool:
        """Whether nothing but the in-place ``node`` reads what it changes, and gradients see the change."""
        if not records_gradients(grad_states(self.lifter.region.module)[node]):
            return False
        held = storages(node.args[0])  # pyright: ignore
        before = [n for n in self.lifter.region.module.graph.nodes if n is not node and storages(n) & held]
        if any(n.op in ("placeholder", "get_attr") for n in before):
            return False
        return all(len(n.users) == 1 for n in before if node not in n.all_input_nodes and not _follows(n, node))

    def _follow_sum(self, node: fx.Node, sign: int, result: torch.Tensor) -> None:
        terms: list[Term] = []
        for value, sign_here in zip(node.args, (1, sign), strict=True):
            own = self.linear.get(value) if isinstance(value, fx.Node) else None  # pyright: ignore
            if own is None and (result.ndim or (isinstance(value, fx.Node) and ndim(value))):
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
    return value is not None and same_shape(value, result)


def _follows(node: fx.Node, other: fx.Node) -> bool:
    return any(n is other or _follows(n, other) for n in node.all_input_nodes if storages(n) & storages(other))


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
    live = gradients_flow(tail.lifter.region.module.graph)
    leaves = {t.leaf for n, terms in tail.linear.items() if n in live for t in terms if t.inside}
    for node, terms in tail.linear.items():
        value = fake_tensor(node)
        if value is None or value.is_complex():
            continue  # of a complex scalar there is no gradient to multiply later
        if node in live and not value.ndim and {t.leaf for t in terms if t.inside} >= leaves:
            return _close(tail, node, terms, outputs, live)
    return None


def _keeps_device(node: Any, result: torch.Tensor) -> bool:
    value = fake_tensor(node)
    return value is not None and value.device == result.device


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
            if needs_grad(node) and user in live:
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
