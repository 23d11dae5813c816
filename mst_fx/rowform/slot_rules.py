"""What ops do to slots: sort, take, multiply by expert, put back; ``slot_counts`` counts them.

A rule returns one form per result, None where it does not apply, or raises ``MixesTokensError``. Rules for rows
(``rules``) serve for all that keeps slots where they are.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

import mst_fx.rowform.slot_counts  # noqa: F401  registers its rules
from mst_fx.rowform.rows import MixesTokensError, Row, aten, concrete, feature_shape, numel, same_size
from mst_fx.rowform.rules.registry import op_name
from mst_fx.rowform.slots import RULES, Order, SlotBuilder, SlotRow, Special, Spread, bound, slot_rule


@slot_rule(aten.view, aten._unsafe_view, aten.reshape)
def _merge(b: SlotBuilder, func: Any, args: Any, kwargs: Any, outs: Any) -> list[Any] | None:
    """Tokens and choices as slots, ``[T, k, ...] -> [S, ...]``, and back."""
    form, old, new = b.form(args[0]), args[0].shape, outs[0].shape
    if isinstance(form, SlotRow):
        if form.order is not None or not form.kinds[0] or not len(new) or b.counts_slots(new[0]):
            return None
        for n in range(1, len(new)):
            if same_size(numel(new[:n]), b.tokens) and same_size(new[n], b.k):
                features = [concrete(s) for s in new[n:]]
                if not all(isinstance(s, int) for s in features):
                    return None
                kinds = (True,) * n + (False,) * len(features)
                return [Row(kinds, b.emit(aten.reshape.default, form.node, [-1, *features]))]
        return None
    if not isinstance(form, Row) or not len(new) or not b.counts_slots(new[0]):
        return None
    n = sum(form.kinds)
    if form.kinds[:n] != (True,) * n or n == len(old) or not same_size(old[n], b.k) or n + 1 > len(old):
        return None
    features = [concrete(s) for s in new[1:]]
    if list(features) != list(feature_shape(old[n + 1 :], form.kinds[n + 1 :])):
        return None
    return [as_slots(b, form, features)]


def as_slots(b: SlotBuilder, row: Row, features: list[Any]) -> SlotRow:
    """Return a value of tokens and choices as slots in the order of the tokens."""
    node = b.emit(aten.reshape.default, row.node, [-1, *features])
    return SlotRow((True,) + (False,) * len(features), node, None, node if not features else None)


@slot_rule(aten.sort)
def _sort(b: SlotBuilder, func: Any, args: Any, kwargs: Any, outs: Any) -> list[Any] | None:
    form = b.form(args[0])
    given = bound(func, args, kwargs)
    if isinstance(form, Special):
        if form.role != "perm" or given["descending"]:
            return None
        node = b.emit(aten.sort.default, form.node)
        return [Special("iota"), Special("inverse", b.emit(operator.getitem, node, 1), form.order)]
    if not isinstance(form, SlotRow) or args[0].ndim != 1 or form.order is not None:
        return None
    source = form.ids or form.node
    order = Order(source, not given["descending"])
    rest = {k: v for k, v in given.items() if k != "self" and v is not None}
    rest = {k: v for k, v in rest.items() if k in {a.name for a in func._schema.arguments}}
    positional = [rest.pop(a.name) for a in func._schema.arguments[1:] if not a.kwarg_only and a.name in rest]
    node = b.emit(func, form.node, *positional, **rest)
    values, perm = (b.emit(operator.getitem, node, i) for i in range(2))
    return [SlotRow((True,), values, order, source), Special("perm", perm, order)]


@slot_rule(aten.floor_divide, aten.div)
def _token(b: SlotBuilder, func: Any, args: Any, kwargs: Any, outs: Any) -> list[Any] | None:
    form = b.form(args[0])
    floor = func.overloadpacket is aten.floor_divide or kwargs.get("rounding_mode") in ("floor", "trunc")
    if not isinstance(form, Special) or form.role != "perm" or not floor or not isinstance(args[1], int):
        return None
    if args[1] != b.k:
        raise MixesTokensError(f"divides positions by {args[1]}, where each token has {b.k}")
    return [Special("token", b.emit(func, form.node, b.k, **kwargs), form.order)]


@slot_rule(aten.arange)
def _arange(b: SlotBuilder, func: Any, args: Any, kwargs: Any, outs: Any) -> list[Any] | None:
    given = bound(func, args, kwargs)
    whole = given.get("start", 0) == 0 and given.get("step", 1) == 1
    return [Special("iota")] if whole and b.counts_slots(given["end"]) else None


@slot_rule(aten.empty_like, aten.zeros_like)
def _scratch(b: SlotBuilder, func: Any, args: Any, kwargs: Any, outs: Any) -> list[Any] | None:
    form = b.form(args[0])
    return [Special("scratch", order=form.order)] if isinstance(form, Special) and form.role == "perm" else None


@slot_rule(aten.empty, aten.zeros, aten.new_empty, aten.new_zeros)
def _blank(b: SlotBuilder, func: Any, args: Any, kwargs: Any, outs: Any) -> list[Any] | None:
    """Room for all slots."""
    return [Special("scratch")] if outs[0].ndim and b.counts_slots(outs[0].shape[0]) else None


@slot_rule(aten.detach, aten.alias, aten.clone)
def _same(b: SlotBuilder, func: Any, args: Any, kwargs: Any, outs: Any) -> list[Any] | None:
    form = b.form(args[0])
    return [form] if isinstance(form, Special) else None


@slot_rule(aten.index_put, aten.scatter)
def _invert(b: SlotBuilder, func: Any, args: Any, kwargs: Any, outs: Any) -> list[Any] | None:
    """``inverse[perm] = arange(S)``."""
    given = bound(func, args, kwargs)
    if func.overloadpacket is aten.index_put:
        indices, values, plain = given["indices"], given["values"], not given["accumulate"]
        index = indices[0] if len(indices) == 1 else None
    else:
        index, values, plain = given["index"], given.get("src"), "reduce" not in given
    at, perm, iota = b.form(given["self"]), b.form(index), b.form(values)
    if not all(isinstance(f, Special) for f in (at, perm, iota)) or not plain:
        return None
    if (at.role, perm.role, iota.role) != ("scratch", "perm", "iota"):
        return None
    node = b.emit(aten.sort.default, perm.node)
    return [Special("inverse", b.emit(operator.getitem, node, 1), perm.order)]


@slot_rule(aten.index, aten.index_select, aten.embedding)
def _index(b: SlotBuilder, func: Any, args: Any, kwargs: Any, outs: Any) -> list[Any] | None:
    """Take rows: of tokens into slots, of slots into another order, of a shared table by a number per slot."""
    x = args[0]
    if func.overloadpacket is aten.index:
        index = args[1][0] if len(args[1]) == 1 else None
    elif func.overloadpacket is aten.index_select:
        index = args[2] if args[1] % x.ndim == 0 else None
    else:
        index = args[1]
        given = bound(func, args, kwargs)
        if given["padding_idx"] >= 0 or given["scale_grad_by_freq"] or given["sparse"]:
            raise MixesTokensError("looks rows up that get no gradient, or one that depends on how often they are read")
    at, form = b.form(index), b.form(x)
    if not isinstance(at, Special | SlotRow):
        return None
    if isinstance(at, SlotRow):
        assert isinstance(index, torch.Tensor)
        if isinstance(form, Row | Special) or at.kinds != (True,) or index.dtype not in (torch.int32, torch.int64):
            raise MixesTokensError("looks tokens up by a number that each of them computes")
        table = b.shared(x)
        node = b.emit(aten.index.Tensor, table, [at.node])
        return [SlotRow((True,) + (False,) * (outs[0].ndim - 1), node, at.order)]
    return [_taken(b, x, at)]


@slot_rule(aten.gather)
def _gather(b: SlotBuilder, func: Any, args: Any, kwargs: Any, outs: Any) -> list[Any] | None:
    """Take whole rows, ``gather(x, 0, perm[:, None].expand(-1, H))``."""
    x, at = args[0], b.form(args[2])
    if not isinstance(at, Spread):
        return None
    if args[1] % x.ndim or list(outs[0].shape[1:]) != list(x.shape[1:]):
        raise MixesTokensError("takes something else than whole rows")
    return [_taken(b, x, at.of)]


def _taken(b: SlotBuilder, x: torch.Tensor, at: Special) -> SlotRow:
    """Return the rows of ``x`` at positions: of tokens into slots, of slots into another order."""
    form, kinds = b.form(x), (True,) + (False,) * (x.ndim - 1)
    if isinstance(form, SlotRow) and form.kinds == kinds:
        node = b.emit(aten.index.Tensor, form.node, [at.node])
        if _in_order(b, at) and form.order is None:
            return SlotRow(kinds, node, at.order, form.ids)
        if at.role == "inverse" and form.order is at.order:
            return SlotRow(kinds, node, None, form.ids)
    tokens = _of_tokens(b, x) if at.role == "token" else None
    if tokens is not None:
        return SlotRow(kinds, b.emit(aten.index.Tensor, tokens.node, [at.node]), at.order)
    raise MixesTokensError("takes rows by another permutation than the one they stand in")


def _in_order(b: SlotBuilder, at: Special) -> bool:
    """Whether positions say for each sorted slot which one it is."""
    return at.role == "perm" or (at.role == "token" and b.k == 1)


def _of_tokens(b: SlotBuilder, x: torch.Tensor) -> Row | None:
    """Return ``x`` as rows of tokens, one token dimension in front; None if it is something else."""
    form, kinds = b.form(x), (True,) + (False,) * (x.ndim - 1)
    if not same_size(x.shape[0], b.tokens):
        return None
    if form is None:
        form = b.chunked(x, kinds)
    if isinstance(form, SlotRow) and b.k == 1 and form.order is None:
        form = Row(form.kinds, form.node)
    return form if isinstance(form, Row) and not isinstance(form, SlotRow) and form.kinds == kinds else None


@slot_rule(aten.index_add, aten.scatter_add, aten.index_put)
def _added_up(b: SlotBuilder, func: Any, args: Any, kwargs: Any, outs: Any) -> list[Any] | None:
    """Add sorted slots to their tokens, ``out.index_add(0, perm // k, rows)``, or put each in its place."""
    given = bound(func, args, kwargs)
    whole, adds = given["self"], given.get("accumulate", True)
    if func.overloadpacket is aten.index_put:
        index, rows = (given["indices"][0] if len(given["indices"]) == 1 else None), given["values"]
    else:
        index, rows = given["index"], given.get("src", given.get("source"))
        if given["dim"] % whole.ndim:
            return None
    at, slots = b.form(index), b.form(rows)
    at = at.of if isinstance(at, Spread) and func.overloadpacket is aten.scatter_add else at
    if not isinstance(at, Special) or not isinstance(slots, SlotRow) or slots.order is not at.order:
        return None
    assert isinstance(index, torch.Tensor)
    assert isinstance(rows, torch.Tensor)
    kinds = (True,) + (False,) * (whole.ndim - 1)
    whole_rows = index.shape == rows.shape or func.overloadpacket is not aten.scatter_add
    if slots.kinds != kinds or list(rows.shape[1:]) != list(whole.shape[1:]) or not whole_rows:
        raise MixesTokensError("puts something else than whole rows")
    if adds and (at.role == "token" or (at.role == "perm" and b.k == 1)):
        onto = _of_tokens(b, whole)
        if onto is None:
            raise MixesTokensError("adds slots up in something that has no row per token")
        alpha = {"alpha": given["alpha"]} if given.get("alpha", 1) != 1 else {}
        return [Row(kinds, b.emit(aten.index_add.default, onto.node, 0, at.node, slots.node, **alpha))]
    if not adds and _in_order(b, at) and b.counts_slots(whole.shape[0]):
        # Every place is written to, so it does not matter what was there, nor in which order.
        onto = b.form(whole) or _of_tokens(b, whole)
        if onto is not None and onto.node is None:  # room made for the purpose
            onto = slots.with_node(b.emit(aten.empty_like.default, slots.node))
        if isinstance(onto, Row) and onto.kinds == kinds:
            return [SlotRow(kinds, b.emit(aten.index_put.default, onto.node, [at.node], slots.node), None, slots.ids)]
    raise MixesTokensError("puts slots where they are not known to belong")


@slot_rule(aten.view, aten.reshape, aten.unsqueeze, aten.expand, aten.repeat)
def _spread(b: SlotBuilder, func: Any, args: Any, kwargs: Any, outs: Any) -> list[Any] | None:
    """Write positions out for every feature."""
    form, shape = b.form(args[0]), outs[0].shape
    of = form.of if isinstance(form, Spread) else form
    if not isinstance(of, Special) or of.role not in ("perm", "token", "inverse") or len(shape) < 2:
        return None
    features = [concrete(s) for s in shape[1:]]
    if not b.counts_slots(shape[0]) or not all(isinstance(s, int) for s in features):
        return None
    return [Spread(of)]


@slot_rule(aten.bmm)
def _per_slot(b: SlotBuilder, func: Any, args: Any, kwargs: Any, outs: Any) -> list[Any] | None:
    """Multiply every slot by a matrix of its own."""
    left, right = (b.form(a) for a in args)
    if not isinstance(left, SlotRow) or not isinstance(right, SlotRow):
        return None
    if left.order is not right.order or left.kinds != (True, False, False) or right.kinds != left.kinds:
        return None
    b.products += 1
    return [SlotRow(left.kinds, b.emit(func, left.node, right.node), left.order)]


def grouped_product(b: SlotBuilder, func: Any, args: Any, kwargs: Any, outs: Any) -> list[Any] | None:
    """Multiply sorted slots by the matrix of their expert: rows up to offset ``e`` by matrix ``e``."""
    given = bound(func, args, kwargs)
    x, weight, offs = (list(given.values())[i] for i in range(3))
    rows, ends = b.form(x), b.form(offs)
    if not isinstance(rows, SlotRow):
        return None
    if rows.kinds != (True, False) or weight.ndim != 3 or isinstance(b.form(weight), Row):
        raise MixesTokensError("is a product by groups of something else than rows by shared matrices")
    if not isinstance(ends, Special) or ends.role != "offsets":
        raise MixesTokensError("multiplies groups of rows that are not known to be the experts'")
    if rows.order is None or not rows.order.ascending or ends.source is not rows.order.source:
        raise MixesTokensError("multiplies groups of rows by offsets of other numbers than they are sorted by")
    if not same_size(weight.shape[0], offs.shape[0]) or any(v is not None for v in list(given.values())[3:]):
        raise MixesTokensError(f"is {op_name(func)} in a form that is not known")
    b.products += 1
    return [SlotRow(rows.kinds, b.emit(func, rows.node, b.shared(weight), ends.node), rows.order)]


_GROUPED = (("aten", "_grouped_mm"), ("transformers", "grouped_mm_fallback"))
"""Products by groups: torch's, and the one Transformers registers where torch's does not compile (fp32)."""


def multiplies_groups(node: fx.Node) -> bool:
    """Whether a node of a Dynamo graph is a grouped product."""
    return any(getattr(node.target, "__name__", "").split(".")[0] == name for _, name in _GROUPED)


def register_grouped() -> None:
    """Register the rule of those grouped products that exist in this process by now."""
    for namespace, name in _GROUPED:
        packet = getattr(getattr(torch.ops, namespace), name, None)
        if packet is not None and grouped_product not in RULES.get(packet, ()):
            slot_rule(packet)(grouped_product)
