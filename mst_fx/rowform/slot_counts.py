"""How many slots each expert has: counts of the experts' numbers, and the offsets at which their groups end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from mst_fx.rowform.rows import MixesTokensError, Row, Shared, aten
from mst_fx.rowform.slots import EXACT_FOR_IDS, SlotBuilder, SlotRow, Special, bound, slot_rule


@slot_rule(aten.histc)
def _histc(b: SlotBuilder, func: Any, args: Any, kwargs: Any, outs: Any) -> list[Any] | None:
    form, given = b.form(args[0]), bound(func, args, kwargs)
    bins = given["bins"]
    if not isinstance(form, SlotRow) or form.ids is None:
        return None
    if bins < 2 or given["min"] != 0 or given["max"] not in (bins - 1, bins):  # either counts each number apart
        raise MixesTokensError("counts something else than the experts' numbers")
    return [Special("counts", b.emit(func, form.node, bins, 0, given["max"]), None, form.ids)]


@slot_rule(aten.eq)
def _one_hot(b: SlotBuilder, func: Any, args: Any, kwargs: Any, outs: Any) -> list[Any] | None:
    """``ids[:, None] == arange(E)``, as ``one_hot`` has it."""
    form = b.form(args[0])
    if not isinstance(form, SlotRow) or form.ids is None or form.kinds != (True, False) or _counted(b, args[1]) is None:
        return None
    return [SlotRow(form.kinds, b.emit(func, form.node, b.shared(args[1])), form.order, one_hot=form.ids)]


@slot_rule(aten.sum)
def _summed(b: SlotBuilder, func: Any, args: Any, kwargs: Any, outs: Any) -> list[Any] | None:
    form, given = b.form(args[0]), bound(func, args, kwargs)
    if not isinstance(form, SlotRow) or form.one_hot is None or given.get("dim") != [0] or given["keepdim"]:
        return None
    if outs[0].dtype not in EXACT_FOR_IDS:
        return None
    return [Special("counts", b.emit(func, form.node, [0], dtype=outs[0].dtype), None, form.one_hot)]


@slot_rule(aten.scatter_add, aten.index_add)
def _counted_up(b: SlotBuilder, func: Any, args: Any, kwargs: Any, outs: Any) -> list[Any] | None:
    """``zeros(E).scatter_add(0, ids, ones)``."""
    onto, at, ones = (b.form(a) for a in (args[0], *args[2:4]))
    if not isinstance(at, SlotRow) or at.ids is None or not isinstance(onto, Shared) or not isinstance(ones, SlotRow):
        return None
    made = _made_by(ones) is aten.ones_like.default and _made_by(onto) is aten.zeros.default
    if not made or args[0].ndim != 1 or kwargs or outs[0].dtype not in EXACT_FOR_IDS:
        return None
    return [Special("counts", b.emit(func, onto.node, 0, at.node, ones.node), None, at.ids)]


@slot_rule(aten.searchsorted)
def _searched(b: SlotBuilder, func: Any, args: Any, kwargs: Any, outs: Any) -> list[Any] | None:
    """Offsets as the places behind the last slot of every expert."""
    form, experts = b.form(args[0]), _counted(b, args[1])
    right = kwargs.get("right", False) or kwargs.get("side") == "right"
    if not isinstance(form, SlotRow) or form.order is None or not form.order.ascending or experts is None or not right:
        return None
    if form.ids is not form.order.source or kwargs.get("sorter") is not None:
        return None
    return [Special("offsets", b.emit(func, form.node, experts, **kwargs), None, form.ids)]


def _counted(b: SlotBuilder, x: Any) -> fx.Node | None:
    """Return the node of ``x`` if it counts 0, 1, 2, ..., as experts are numbered."""
    form = b.form(x)
    if not isinstance(form, Shared) or _made_by(form) is not aten.arange.default or x.dtype not in EXACT_FOR_IDS:
        return None
    return form.node


def _made_by(form: Row | Shared) -> Any:
    """Return the op that made a value."""
    node: Any = form.node
    while node.target is aten.detach.default:
        node = node.args[0]
    return node.target


@slot_rule(aten.all)
def _all(b: SlotBuilder, func: Any, args: Any, kwargs: Any, outs: Any) -> list[Any] | None:
    """What ``one_hot`` asserts of all numbers it asserts of a chunk's."""
    form = b.form(args[0])
    return [Special("holds", b.emit(func, form.node))] if isinstance(form, SlotRow) and len(args) == 1 else None


@slot_rule(aten._assert_async)
def _assert(b: SlotBuilder, func: Any, args: Any, kwargs: Any, outs: Any) -> list[Any] | None:
    form = b.form(args[0])
    if not isinstance(form, Special) or form.role != "holds":
        return None
    b.emit(func, form.node, *args[1:])
    return []


@slot_rule(aten.cumsum)
def _offsets(b: SlotBuilder, func: Any, args: Any, kwargs: Any, outs: Any) -> list[Any] | None:
    form = b.form(args[0])
    if not isinstance(form, Special) or form.role != "counts":
        return None
    return [Special("offsets", b.emit(func, form.node, *args[1:], **kwargs), None, form.source)]


@slot_rule(aten._to_copy)
def _cast_counts(b: SlotBuilder, func: Any, args: Any, kwargs: Any, outs: Any) -> list[Any] | None:
    form = b.form(args[0])
    counts = isinstance(form, Special) and form.role in ("counts", "offsets")
    if not counts or outs[0].dtype not in EXACT_FOR_IDS:
        return None
    return [replace(form, node=b.emit(func, form.node, dtype=outs[0].dtype))]
