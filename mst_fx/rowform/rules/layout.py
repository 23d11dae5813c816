"""Layout: views, transposes, slices, splits, joins."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from mst_fx.rowform.rows import (
    MixesTokensError,
    Row,
    RowBuilder,
    Shared,
    aten,
    feature_shape,
    is_one,
    same_size,
    view_kinds,
)
from mst_fx.rowform.rules.registry import only_row, op_name, rule, without


@rule(aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.squeeze, aten.unsqueeze)
def _view(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = only_row(b, args[0])
    if len(args) > 1 and isinstance(args[1], torch.dtype):
        raise MixesTokensError("reinterprets the bytes of a value")
    new = outs[0].shape
    kinds = view_kinds(args[0].shape, x.kinds, new)
    return [Row(kinds, b.reshaped(x, args[0].shape, feature_shape(new, kinds)))]


@rule(aten.permute, aten.transpose, aten.t)
def _permute(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = only_row(b, args[0])
    n = len(x.kinds)
    if func.overloadpacket is aten.permute:
        order = [d % n for d in args[1]]
    else:
        order = list(range(n))
        i, j = (args[1] % n, args[2] % n) if func.overloadpacket is aten.transpose else (0, n - 1)
        order[i], order[j] = order[j], order[i]
    tokens = [d for d in order if x.kinds[d] and not is_one(args[0].shape[d])]
    if tokens != sorted(tokens):
        raise MixesTokensError("reorders tokens")
    features = [d for d in order if not x.kinds[d]]
    kinds = tuple(x.kinds[d] for d in order)
    if features == sorted(features):
        return [Row(kinds, x.node)]
    return [Row(kinds, b.emit(aten.permute.default, x.node, [0, *(x.feature_dim(d) for d in features)]))]


@rule(aten.expand)
def _expand(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = only_row(b, args[0])
    lead = outs[0].ndim - args[0].ndim
    kinds = (False,) * lead + x.kinds
    for d, size in enumerate(args[0].shape):
        if x.kinds[d] and not same_size(size, outs[0].shape[d + lead]):
            raise MixesTokensError("repeats tokens")
    features = feature_shape(outs[0].shape, kinds)
    if not all(isinstance(s, int) for s in features):
        raise MixesTokensError("repeats tokens")
    own = feature_shape(args[0].shape, x.kinds)
    rows = b.emit(aten.reshape.default, x.node, [-1, *[1] * lead, *own]) if lead else x.node
    return [Row(kinds, b.emit(aten.expand.default, rows, [-1, *features]))]


@rule(aten.slice)
def _slice(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = only_row(b, args[0])
    dim = (args[1] if len(args) > 1 else 0) % args[0].ndim
    if same_size(args[0].shape[dim], outs[0].shape[dim]) and (len(args) < 5 or args[4] == 1):
        return [x]
    return [Row(x.kinds, b.emit(func, x.node, x.feature_dim(dim), *args[2:]))]


@rule(aten.slice_scatter, aten.select_scatter)
def _write_slice(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    """A part of the features is replaced: by rows of its own, or by something that all tokens share."""
    x = only_row(b, args[0])
    names = [a.name for a in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    dim = given.pop("dim", 0) % args[0].ndim
    at = x.feature_dim(dim)
    if func.overloadpacket is aten.select_scatter:
        shape, kinds = args[0].select(dim, 0).shape, without(x.kinds, dim)
    else:
        size = len(
            range(*slice(given.get("start"), given.get("end"), given.get("step", 1)).indices(args[0].shape[dim]))
        )
        shape, kinds = [size if d == dim else s for d, s in enumerate(args[0].shape)], x.kinds
    part = b.row(args[1])
    if part is None or part.kinds != kinds or list(args[1].shape) != list(shape):
        raise MixesTokensError("writes a value into the features that has no row per token")
    rest = {k: v for k, v in given.items() if k not in names[:2]}
    return [Row(x.kinds, b.emit(func, x.node, part.node, at, **rest))]


@rule(aten.index_fill)
def _index_fill(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = only_row(b, args[0])
    value = b.shared(args[3]) if isinstance(args[3], torch.Tensor) else args[3]
    return [Row(x.kinds, b.emit(func, x.node, x.feature_dim(args[1] % args[0].ndim), b.shared(args[2]), value))]


@rule(aten.select)
def _select(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = only_row(b, args[0])
    dim = args[1] % args[0].ndim
    kinds = without(x.kinds, dim)
    if x.kinds[dim] and is_one(args[0].shape[dim]):
        return [Row(kinds, x.node)]
    return [Row(kinds, b.emit(func, x.node, x.feature_dim(dim), args[2]))]


@rule(aten.split, aten.split_with_sizes, aten.unbind, aten.chunk, aten.unsafe_split, aten.unsafe_chunk)
def _split(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = only_row(b, args[0])
    at = 1 if func.overloadpacket is aten.unbind else 2
    dim = (args[at] if len(args) > at else kwargs.get("dim", 0)) % args[0].ndim
    rest = () if at == 1 else (args[1],)
    node = b.emit(func, x.node, *rest, x.feature_dim(dim))
    kinds = without(x.kinds, dim) if at == 1 else x.kinds
    return [Row(kinds, b.emit(operator.getitem, node, i)) for i in range(len(outs))]


@rule(aten.cat)
def _cat(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    # Whatever it is joined to, a tensor of shape [0] adds nothing,
    tensors = [t for t in args[0] if t.ndim == outs[0].ndim or list(t.shape) != [0]]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % outs[0].ndim
    kinds, nodes = _lined_up(b, tensors)
    node = b.emit(aten.cat.default, nodes, Row(kinds, nodes[0]).feature_dim(dim))
    if len(tensors) < len(args[0]) and any(t.dtype != outs[0].dtype for t in tensors):  # but to the dtype
        node = b.emit(aten._to_copy.default, node, dtype=outs[0].dtype)
    return [Row(kinds, node)]


@rule(aten.stack)
def _stack(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    tensors = args[0]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % outs[0].ndim
    kinds, nodes = _lined_up(b, tensors)
    new = (*kinds[:dim], False, *kinds[dim:])
    return [Row(new, b.emit(aten.stack.default, nodes, 1 + sum(not k for k in kinds[:dim])))]


def _lined_up(b: RowBuilder, tensors: Sequence[torch.Tensor]) -> tuple[tuple[bool, ...], list[Any]]:
    """Return the kinds that values to be joined share, and their row forms."""
    first = next(r for t in tensors if (r := b.row(t)))
    nodes = []
    for t in tensors:
        found = b.row(t)
        if found is None and not isinstance(b.lookup(t), Shared):
            found = b.chunked(t, first.kinds)
        if found is None or found.kinds != first.kinds:
            raise MixesTokensError("joins values whose tokens do not line up")
        nodes.append(found.node)
    return first.kinds, nodes


@rule(aten.flip, aten.roll)
def _flip(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = only_row(b, args[0])
    at = 1 if func.overloadpacket is aten.flip else 2
    dims = args[at] if len(args) > at else kwargs.get("dims", [])
    if not dims or any(x.kinds[d % args[0].ndim] for d in dims):
        raise MixesTokensError(f"{op_name(func)} moves tokens")
    return [Row(x.kinds, b.emit(func, x.node, *args[1:at], [x.feature_dim(d) for d in dims]))]


@rule(aten.repeat)
def _repeat(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = only_row(b, args[0])
    times = list(args[1])
    lead = len(times) - args[0].ndim
    kinds = (False,) * lead + x.kinds
    if any(k and not is_one(n) for k, n in zip(kinds, times, strict=True)):
        raise MixesTokensError("repeats tokens")
    own = feature_shape(args[0].shape, x.kinds)
    rows = b.emit(aten.reshape.default, x.node, [-1, *[1] * lead, *own]) if lead else x.node
    return [Row(kinds, b.emit(func, rows, [1, *(n for n, k in zip(times, kinds, strict=True) if not k)]))]


@rule(aten.index_select)
def _index_select(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = only_row(b, args[0])
    return [Row(x.kinds, b.emit(func, x.node, x.feature_dim(args[1]), b.shared(args[2])))]


@rule(aten.index)
def _index(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    """One list of positions, the same for all tokens, along one feature dimension."""
    x = only_row(b, args[0])
    given = [d for d, i in enumerate(args[1]) if i is not None]
    if len(given) != 1 or args[1][given[0]].ndim != 1 or args[1][given[0]].dtype == torch.bool:
        raise MixesTokensError("picks values by several indices at once, or by a mask")
    at = x.feature_dim(given[0])
    index = b.shared(args[1][given[0]])
    return [Row(x.kinds, b.emit(func, x.node, [None] * at + [index]))]


@rule(aten.constant_pad_nd)
def _pad(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = only_row(b, args[0])
    if any(x.kinds[-(len(args[1]) // 2) :]):
        raise MixesTokensError("pads along a token dimension")
    return [Row(x.kinds, b.emit(func, x.node, *args[1:], **kwargs))]
