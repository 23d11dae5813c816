"""Slots: row form of a mixture of experts, whose tokens are sorted by expert and put back.

Each token goes to ``k`` experts, so there are ``S = T * k`` slots, ``(token, choice)``. Experts that multiply
groups of rows want the slots of one expert side by side:

    ids [S] -> sort -> (sorted ids, perm) -> hidden[perm // k] -> grouped product with offsets -> ... -> [inverse perm]
            -> view [T, k, H] -> sum over k

No part of it keeps tokens apart: where a row stands depends on all tokens. The whole does, because

* what a row *is* depends on its slot alone, as long as every op takes rows of one order and works row by row;
* a grouped product takes row ``i`` to the expert in whose group ``i`` lies. If the offsets are the cumulative counts of
  the very ids the rows are sorted by, that is the expert of the slot, wherever the row stands;
* the inverse of the permutation puts every slot back in its place.

So each value gets one of these forms, and the same ops on a chunk's own slots give its own tokens' results:

    SlotRow: one row per slot, in the order of the tokens or in a sorted ``Order``. Its row form is ``[C * k, ...]``.
        Added up into their tokens, by ``index_add`` at ``perm // k``, they are rows of tokens.
    Special: a permutation, its inverse, ``perm // k``, counts per expert, offsets; each knows of which ids or order.

A ``Special`` may only go where it is known what it does there. All else has no row form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx
from torch.utils import _pytree as pytree

from mst_fx.rowform.recorder import RowTracer
from mst_fx.rowform.rows import MixesTokensError, Row, RowBuilder, aten, numel, same_size

EXACT_FOR_IDS = {torch.int32, torch.int64, torch.float32, torch.float64}
"""Dtypes that hold any expert's number."""
_SAME_NUMBERS = {aten._to_copy, aten.clone, aten.detach, aten.alias, aten.view, aten.reshape, aten.unsqueeze}


@dataclass(frozen=True, eq=False)
class Order:
    """An order of slots: they are sorted by ``source``, one number per slot."""

    source: fx.Node
    ascending: bool


@dataclass(frozen=True)
class SlotRow(Row):
    """One row per slot. ``kinds`` says which dimension the slots are."""

    order: Order | None = None
    """None: the order of the tokens, a token's choices side by side."""
    ids: fx.Node | None = None
    """The numbers these are (in whatever order), where nothing else was done to them."""
    one_hot: fx.Node | None = None
    """The numbers of which these, ``[S, experts]``, say which each is."""

    def with_node(self, node: fx.Node) -> SlotRow:
        """Return the same rows with other contents."""
        return SlotRow(self.kinds, node, self.order)


Role = Literal["perm", "inverse", "token", "counts", "offsets", "iota", "scratch", "holds"]


@dataclass(frozen=True)
class Special:
    """An integer tensor about all slots."""

    role: Role
    node: fx.Node | None = None
    order: Order | None = None
    source: fx.Node | None = None
    """Counts and offsets: the ids that were counted."""


@dataclass(frozen=True)
class Spread:
    """Positions written out for every feature, ``[S] -> [S, F]``, as ``gather`` and ``scatter_add`` take them."""

    of: Special


SlotRule = Callable[[Any, Any, Any, Any, Any], "list[Any] | None"]
RULES: dict[Any, list[SlotRule]] = {}


def slot_rule(*packets: Any) -> Callable[[SlotRule], SlotRule]:
    """Register a rule for ops on slots; a rule returns one form per result, or None where it does not apply."""

    def register(fn: SlotRule) -> SlotRule:
        for packet in packets:
            RULES.setdefault(packet, []).append(fn)
        return fn

    return register


class SlotTracer(RowTracer):
    """Records ops on slots; what touches none is recorded as rows."""

    def __init__(self, builder: SlotBuilder) -> None:
        super().__init__(builder)
        self.b: SlotBuilder = builder

    def _record(self, func: Any, args: Any, kwargs: Any, outs: list[torch.Tensor]) -> None:
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        known = [self.b.form(t) for t in tensors]
        special = any(isinstance(v, Special | Spread) for v in known)
        slots = [v for v in known if isinstance(v, SlotRow)]
        for rule in RULES.get(func.overloadpacket, ()):
            found = rule(self.b, func, args, kwargs, outs)
            if found is not None:
                for out, form in zip(outs, found, strict=True):
                    self.b.bind(out, form)
                return
        if special:
            raise MixesTokensError(f"uses positions of sorted tokens in a way not known to keep them apart ({func})")
        if not slots:
            super()._record(func, args, kwargs, outs)
            return
        if len({id(v.order) for v in slots}) > 1 or any(isinstance(v, Row) and v not in slots for v in known):
            raise MixesTokensError("joins values whose tokens stand in different orders")
        before = set(self.b.live_ins)
        super()._record(func, args, kwargs, outs)
        strange = [k for k, (live, _) in self.b.live_ins.items() if k not in before and live.kinds is not None]
        if strange:
            for key in strange:
                del self.b.live_ins[key]  # or it would be an old acquaintance the next time
            raise MixesTokensError("reads a value of every slot that comes from somewhere else")
        keeps = func.overloadpacket in _SAME_NUMBERS and func is not aten.view.dtype  # which reads the bits anew
        for out in outs:
            row = self.b.row(out)
            if row is not None and sum(row.kinds) != 1:
                raise MixesTokensError("views slots as something else")
            if row is not None:
                same = keeps and out.dtype in EXACT_FOR_IDS
                ids = slots[0].ids if same and numel(out.shape[1:]) == 1 else None
                one_hot = slots[0].one_hot if same and list(out.shape) == list(tensors[0].shape) else None
                self.b.bind(out, SlotRow(row.kinds, row.node, slots[0].order, ids, one_hot))

    def _may_change(self, target: torch.Tensor) -> bool:
        """Whether a value is of the slots, which the whole mixture is searched for readers of, or made in the node."""
        return isinstance(self.b.form(target), SlotRow | Special | Spread) or super()._may_change(target)

    def _in_place(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Write an in-place op as its functional twin; slots stay slots."""
        form = self.b.form(args[0])
        out = super()._in_place(func, args, kwargs)
        new = self.b.form(out)
        if isinstance(form, SlotRow | Special) and type(new) is not type(form) and not isinstance(new, Special):
            raise MixesTokensError(f"changes a value in place to something else ({func.overloadpacket})")
        return out


class SlotBuilder(RowBuilder):
    """Builds the row form of one mixture of ``experts`` over ``tokens`` tokens, ``k`` slots each."""

    def __init__(self, tokens: Any, k: int) -> None:
        super().__init__()
        self.tokens, self.k = tokens, k
        self.products = 0
        """Products by expert so far."""

    def form(self, tensor: Any) -> Any:
        """Return the form of ``tensor``, None if it comes from outside."""
        return self._env.get(id(tensor))

    def counts_slots(self, size: Any) -> bool:
        """Whether a size is the number of slots."""
        return same_size(size, self.tokens * self.k)

    def shared(self, tensor: torch.Tensor, shape: Any = None) -> fx.Node:
        """Take ``tensor`` whole; positions of sorted tokens are no such value."""
        if isinstance(self.form(tensor), Special | Spread):
            raise MixesTokensError("uses positions of sorted tokens as if they were a weight")
        return super().shared(tensor, shape)


def bound(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call by name, defaults included."""
    schema = func._schema.arguments
    given = dict(zip((a.name for a in schema), args, strict=False)) | kwargs
    return {a.name: given.get(a.name, a.default_value) for a in schema if a.name in given or a.has_default_value()}
