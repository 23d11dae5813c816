"""Finds mixtures of experts: from the ids of each token's experts to the weighted sum of what they say.

    entry: the ids, ``[*tokens, k]`` flattened to ``[S]``, that rows are sorted by or that a table of weights is
        indexed by.
    member: a node of which it is known what it is in row form (``slots``).
    terminal: a member that is one row per token again, no wider than the tokens that came in.

One walk per entry. What the walk cannot follow stays outside; that is no harm before the first product by experts
(counts for a statistic, the router's logits), and the end of the region after it.
"""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from mst_fx.effects import changed_storages, is_in_place, mutated_storages
from mst_fx.graph import (
    called_name,
    fake,
    fake_tensor,
    grad_states,
    module_path,
    node_name,
    source_of,
    storages,
    walking,
)
from mst_fx.inductor import is_plain_fake
from mst_fx.regions.lift import Lifted, Lifter, Output, finish_lift, stops_gradient
from mst_fx.regions.region import Region
from mst_fx.report import Mismatch
from mst_fx.rowform.recorder import run_node
from mst_fx.rowform.rows import MixesTokensError, Row, aten, concrete, feature_shape, numel, same_shape, same_size
from mst_fx.rowform.slot_rules import as_slots, multiplies_groups, register_grouped
from mst_fx.rowform.slots import SlotBuilder, SlotRow, SlotTracer

_LAYOUT = {"view", "reshape", "flatten", "contiguous", "to", "float", "long", "int", "type_as", "expand", "unsqueeze",
           "repeat_interleave", "clone", "half", "bfloat16", "detach"}  # fmt: skip

_NUMBERED = {*_LAYOUT, "clamp", "clip", "clamp_min", "clamp_max"}
"""What an expert's numbers may go through before matrices are taken by them."""
_FLATTENS = {"view", "reshape", "flatten"}
_ROOM = {"zeros", "empty", "new_zeros", "new_empty"}


def find_experts(module: fx.GraphModule, fake_mode: Any) -> list[Experts]:
    """Return every mixture of experts of a graph whose experts are multiplied by sorting or by gathered weights."""
    register_grouped()
    _join_views(module)
    walks = [Experts(module, fake_mode, entry) for entry in module.graph.nodes if _is_entry(entry)]
    found = [walk for walk in walks if walk.run()]
    seen = {n for walk in found for n in [*walk.members, *walk.failures]}
    places = {module_path(walk.region.amplifiers[0]) for walk in found}
    for node in module.graph.nodes:
        why = _lost(node)
        if why and node not in seen and module_path(node) not in places:
            # No ids lead here: say so, once per module.
            lost = Experts(module, fake_mode, node)
            lost.wide.add(node)
            lost.region.amplifiers.append(node)
            lost.failures[node] = why
            ids = fake_tensor(_numbers_taken(node))
            lost.region.rows = None if ids is None else ids.numel()
            found.append(lost)
            places.add(module_path(node))
    return found


def _join_views(module: fx.GraphModule) -> None:
    """Let the first of several equal flat views of the same ids serve for all, so that one walk meets all readers."""
    first: dict[fx.Node, fx.Node] = {}
    changed = changed_storages(module.graph.nodes)
    for node in list(module.graph.nodes):
        value = fake_tensor(node)
        if value is None or value.ndim != 1 or value.dtype not in (torch.int32, torch.int64):
            continue
        if node_name(node) not in _FLATTENS or len(node.all_input_nodes) != 1 or storages(node) & changed:
            continue
        before = first.setdefault(node.all_input_nodes[0], node)
        shown = fake_tensor(before)
        alike = shown is not None and shown.dtype == value.dtype and same_shape(shown, value)
        if before is not node and alike:
            node.replace_all_uses_with(before)
            module.graph.erase_node(node)


def _lost(node: fx.Node) -> str:
    """Return what to say of an expert's product, or of weights taken for one, that no walk came by; "" for others."""
    if multiplies_groups(node):
        return "multiplies groups of rows that no sort of the experts' numbers could be followed to"
    ids, taken = fake_tensor(_numbers_taken(node)), fake_tensor(node)
    if ids is None or taken is None or ids.is_floating_point() or ids.dtype is torch.bool:
        return ""
    table = fake_tensor(node.args[0])
    assert table is not None
    if taken.numel() > table.numel() and any(node_name(u) in _PRODUCTS for u in node.users):
        return "takes a matrix per token and expert; that is followed where all experts are one list, by `bmm`"
    return ""


_PRODUCTS = {"einsum", "matmul", "bmm", "baddbmm"}


def _is_entry(node: fx.Node) -> bool:
    value = fake_tensor(node)
    if value is None or value.ndim != 1 or value.is_floating_point() or value.dtype is torch.bool:
        return False
    return any(node_name(u) in ("sort", "argsort") or _numbers_taken(u) is node for u in node.users)


def _numbers_taken(node: fx.Node) -> Any:
    """Return the numbers by which a node takes matrices out of a table of them, None for any other node."""
    table = fake_tensor(node.args[0]) if node.target is operator.getitem else None
    return node.args[1] if table is not None and table.ndim == 3 else None


class Experts:
    """One mixture of experts, as far as the walk from its entry could follow it."""

    def __init__(self, module: fx.GraphModule, fake_mode: Any, entry: fx.Node) -> None:
        self.module, self.fake_mode, self.entry = module, fake_mode, entry
        self.members: set[fx.Node] = set()
        self.wide: set[fx.Node] = set()
        """Members behind the first product by experts."""
        self.terminals: list[fx.Node] = []
        self.failures: dict[fx.Node, str] = {}
        """What stayed outside though it reads a member, and why."""
        self.outer: dict[int, fx.Node] = {}
        self.order = {n: i for i, n in enumerate(module.graph.nodes)}
        self.states = grad_states(module)
        self.changed = changed_storages(module.graph.nodes)
        self.region = Region(module, 0, source=source_of(entry), partial_sums=True)
        self.builder: Any = None

    # -- the walk -------------------------------------------------------------------------------

    def run(self) -> bool:
        """Walk; returns whether there is a product by experts."""
        with walking(self.module) as nodes:
            for node in nodes:
                if node is self.entry:
                    if not self._begin():
                        return False
                elif self.builder is not None and node not in self.members:
                    self._visit(node)
        self.wide |= {n for n in self.failures if multiplies_groups(n)}
        self.region.amplifiers += [n for n in self.wide if n in self.failures and not self.region.amplifiers]
        return bool(self.wide)

    def _begin(self) -> bool:
        """Find the ``[*tokens, k]`` that the entry flattens."""
        chain, node = [], self.entry
        while fake(node) is not None and node_name(node) in _NUMBERED and len(node.all_input_nodes) == 1:
            chain.append(node)
            node = node.all_input_nodes[0]
            value = fake_tensor(node)
            if value is None:
                return False
            if value.ndim > 1:
                k = concrete(value.shape[-1])
                if not isinstance(k, int):
                    return False
                self.builder = SlotBuilder(numel(value.shape[:-1]), k)
                return self._replay(node, chain)
        value = fake_tensor(self.entry)
        assert value is not None
        self.builder = SlotBuilder(value.shape[0], 1)
        return self._replay(self.entry, [])

    def _enter(self, node: fx.Node) -> bool:
        """Take in a value from outside that has the tokens' rows, or is a view of one that has."""
        chain: list[fx.Node] = []
        while True:
            value = fake_tensor(node)
            if value is None:
                return False
            if self._leading(value) and (chain or self.builder.k == 1):
                return self._replay(node, chain)
            if node_name(node) not in _LAYOUT or len(node.all_input_nodes) != 1 or node in self.members:
                return False
            chain.append(node)
            node = node.all_input_nodes[0]

    def _leading(self, value: torch.Tensor) -> int:
        """Return how many dimensions of a value from outside are tokens; 0 if they can't be told."""
        lengths = range(1, value.ndim + (self.builder.k == 1))
        return next((n for n in lengths if same_size(numel(value.shape[:n]), self.builder.tokens)), 0)

    def _replay(self, source: fx.Node, chain: list[fx.Node]) -> bool:
        value = fake_tensor(source)
        assert value is not None
        if self.builder.form(value) is None:
            n = self._leading(value)
            kinds = (True,) * n + (False,) * (value.ndim - n)
            self.builder.bind(value, self.builder.chunked(value, kinds))
            self.outer[id(value)] = source
        end = source
        for end in reversed(chain):
            if end not in self.members and not self._record(end):
                return False
        return self._as_slots(end)

    def _as_slots(self, node: fx.Node) -> bool:
        """With one expert per token, rows of tokens are slots."""
        value = fake_tensor(node)
        form = self.builder.form(value)
        if isinstance(form, Row) and not isinstance(form, SlotRow) and self.builder.k == 1 and sum(form.kinds) == 1:
            assert value is not None
            self.builder.bind(value, as_slots(self.builder, form, feature_shape(value.shape, form.kinds)))
        return isinstance(self.builder.form(value), SlotRow)

    def _visit(self, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        known = [n for n in inputs if n in self.members]
        if not known:
            if self._is_made(node):
                self._record(node)
            return
        if node.op == "output" or all(n in self.terminals for n in known):
            return
        for n in inputs:
            value = fake_tensor(n)
            if n in self.members or value is None:
                continue
            if value.ndim and self.builder.form(value) is None and self.builder.counts_slots(value.shape[0]):
                self._enter(n)
            elif self.builder.form(value) is None:
                self.outer.setdefault(id(value), n)
        self._record(node)

    def _is_made(self, node: fx.Node) -> bool:
        """Whether a node that reads nothing makes numbers or room that a mixture may be put together from."""
        value, name = fake_tensor(node), node_name(node)
        if value is None or not value.ndim or name not in ("arange", *_ROOM):
            return False
        if storages(node) & self.changed:
            return False
        if self.builder.counts_slots(value.shape[0]):  # with one slot per token, room is a value with a row for each
            return name == "arange" or self.builder.k > 1
        return name == "arange" or (value.ndim == 1 and not same_size(value.shape[0], self.builder.tokens))

    def _record(self, node: fx.Node) -> bool:
        """Record one node; returns whether that could be done."""
        products = self.builder.products
        try:
            for n in node.all_input_nodes:
                value = fake_tensor(n)
                if value is not None and not is_plain_fake(value):
                    raise MixesTokensError(f"reads a {type(value).__name__}, a tensor subclass: not supported")
                if value is not None and n not in self.members:
                    self.outer.setdefault(id(value), n)
            result = run_node(self.builder, node, self.fake_mode, SlotTracer)
            self._bind(node, result)
        except MixesTokensError as e:
            self.failures[node] = str(e)
            return False
        except Exception as e:  # a node that can't be run alone on fakes is a node we do not know
            self.failures[node] = (
                f"could not be analysed ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})"
            )
            return False
        self.members.add(node)
        if self.builder.products > products:
            self.region.amplifiers.append(node)
            self.wide.add(node)
            self.region.row_weights |= node_name(node) == "bmm"
        if any(n in self.wide for n in node.all_input_nodes):
            self.wide.add(node)
            value = fake_tensor(node)
            form = self.builder.form(value)
            if value is not None and isinstance(form, Row) and self._is_end(form, value):
                self.terminals.append(node)
        return True

    def _is_end(self, form: Row, value: torch.Tensor) -> bool:
        """Whether a value is one row per token again, no wider than what came in."""
        if math.prod(feature_shape(value.shape, form.kinds)) > self._width():
            return False
        if isinstance(form, SlotRow):  # one slot per token, in the tokens' order
            if self.builder.k > 1 or form.order is not None or not form.kinds[0]:
                return False
            self.builder.bind(value, Row(form.kinds, form.node))
        return True

    def _width(self) -> int:
        """Return the features of the widest rows that came in."""
        rows = [live for live, _ in self.builder.live_ins.values() if live.kinds is not None]
        return max(math.prod(feature_shape(live.shape, live.kinds)) for live in rows)

    def _bind(self, node: fx.Node, result: Any) -> None:
        outs = list(result) if isinstance(result, (list, tuple)) else [result]
        own = fake(node)
        values = list(own) if isinstance(own, (list, tuple)) else [own]
        for value, out in zip(values, outs, strict=False):
            form = self.builder.form(out)
            if isinstance(form, Row) and stops_gradient(node, value, self.states):
                form = replace(form, node=self.builder.emit(aten.detach.default, form.node))
            if isinstance(value, torch.Tensor) and form is not None:
                self.builder.bind(value, form)

    # -- the region -----------------------------------------------------------------------------

    def lift(self) -> Lifted | Mismatch:
        """Return the mixture as a region in row form, or say why it can't be."""
        self._trim()
        problem = self._problem()
        if problem is not None:
            return problem
        lifter = Lifter(self.region, self.fake_mode)
        lifter.builder, lifter.outer = self.builder, self.outer
        outputs = [Output(t, self.builder.form(fake_tensor(t))) for t in self.region.terminals]
        try:
            return finish_lift(lifter, outputs)
        except MixesTokensError as e:
            return Mismatch(f"not supported: {e}", self.region.source)

    def _trim(self) -> None:
        """Keep the members that the terminals need, what changes them in place included."""
        needed = {t for t in self.terminals if t.users}
        for node in sorted(self.members, key=self.order.__getitem__, reverse=True):
            writes = is_in_place(node) and mutated_storages(node) & set().union(*map(storages, needed))
            if node not in needed and not writes and not any(u in needed for u in node.users):
                continue
            needed.add(node)
            needed |= {n for n in node.all_input_nodes if n in self.members}
        region = self.region
        region.nodes = sorted(needed or self.wide, key=self.order.__getitem__)
        region.amplifiers = [n for n in region.amplifiers if n in region.nodes] or region.amplifiers
        region.terminals = [t for t in self.terminals if any(u not in needed for u in t.users)]
        region.source = source_of(region.amplifiers[0])

    def _cause(self, node: fx.Node) -> fx.Node:
        """Return the first node before this one that could not be followed."""
        seen, stack = {node}, [node]
        while stack:
            new = [n for n in stack.pop().all_input_nodes if n not in seen and n not in self.members]
            seen.update(new)
            stack += new
        return min((n for n in seen if n in self.failures), key=self.order.__getitem__)

    def _problem(self) -> Mismatch | None:
        """Say what forbids chunking: a value that can't be followed, or one that is needed outside."""
        region, nodes = self.region, set(self.region.nodes)
        blame = {
            n: w for n, w in self.failures.items() if n in self.wide or any(i in self.wide for i in n.all_input_nodes)
        }
        if blame:
            node = min(blame, key=self.order.__getitem__)
            cause = self._cause(node)
            because = "" if cause is node else f"; `{called_name(cause)}` ({source_of(cause)}) {self.failures[cause]}"
            return Mismatch(
                f"not legal: `{called_name(node)}` {blame[node]} ({source_of(node)}){because}", source_of(node)
            )
        if not region.terminals:
            return Mismatch("not legal: what the experts say is never summed up to one row per token", region.source)
        changed = changed_storages(nodes)
        for node in sorted(nodes - set(region.terminals), key=self.order.__getitem__):
            reader = next((u for u in node.users if u not in nodes), None)
            if reader is None:
                continue
            if node in self.wide and reader in self.wide and reader not in nodes and not reader.users:
                continue
            if node in self.wide:
                return Mismatch(
                    f"not legal: `{node.name}`, a value of the experts' slots, is read by `{called_name(reader)}` "
                    f"({source_of(reader)})", region.source
                )  # fmt: skip
            if storages(node) & changed:
                return Mismatch(f"not legal: `{node.name}` changes in place and is read outside", region.source)
        return None
