"""The whitelist: for each ATen op, its row form, or the reason it has none.

A rule is ``rule(b, func, args, kwargs, outs) -> list[Row]``: ``b`` the ``RowBuilder``, ``args`` and
``kwargs`` as dispatched (at least one tensor in them is token-wise), ``outs`` the op's fake results;
it returns one ``Row`` per result. What is not in the table and not tagged pointwise mixes tokens as
far as we know. A wrong rule here is silent wrong training: every one has a near-miss test.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mst_fx.rows import (
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

Rule = Callable[..., list[Row]]
_getitem = operator.getitem
RULES: dict[Any, Rule] = {}
_POINTWISE_EXTRA = {
    aten._to_copy, aten.clone, aten.detach, aten.alias, aten.masked_fill, aten.zeros_like, aten.ones_like,
    aten.full_like, aten.where, aten.lift_fresh_copy, aten.rsub, aten._prelu_kernel,
}  # fmt: skip


def rule(*packets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for every overload of the given ops."""

    def register(fn: Rule) -> Rule:
        for packet in packets:
            RULES[packet] = fn
        return fn

    return register


def find_rule(func: Any) -> Rule:
    """Return the rule of an ATen op.

    Raises:
        MixesTokensError: If there is none.
    """
    tags = func.tags
    if "attention" in str(func):
        raise MixesTokensError("is attention: it mixes tokens")
    if torch.Tag.nondeterministic_seeded in tags:
        raise MixesTokensError(f"draws random numbers ({_name(func)})")
    found = RULES.get(func.overloadpacket)
    if found is None and (torch.Tag.pointwise in tags or func.overloadpacket in _POINTWISE_EXTRA):
        found = pointwise
    if found is None:
        raise MixesTokensError(f"{_name(func)} mixes tokens or is not known to keep them apart")
    return found


def _name(func: Any) -> str:
    return str(func.overloadpacket).replace(".", "::", 1)


def pointwise(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> list[Row]:
    """Elementwise with broadcasting: line the operands' dimensions up from the right."""
    shape = outs[0].shape
    kinds = [False] * len(shape)
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    for tensor in tensors:
        found = b.row(tensor)
        lead = len(shape) - tensor.ndim
        for d, kind in enumerate(found.kinds if found else ()):
            if kind:
                kinds[d + lead] = True

    def operand(value: Any) -> Any:
        return b.aligned(value, shape, kinds) if isinstance(value, torch.Tensor) else value

    if func.overloadpacket in (aten._to_copy, aten.clone, aten.zeros_like, aten.ones_like, aten.full_like):
        kwargs = {k: v for k, v in kwargs.items() if k not in ("memory_format", "layout", "pin_memory")}
    node = b.emit(func, *map(operand, args), **{k: operand(v) for k, v in kwargs.items()})
    return [Row(tuple(kinds), node)]


# -- matrix products with a shared factor ------------------------------------------------------------


@rule(aten.mm)
def _mm(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    return [_product(b, args[0], args[1])]


def _product(b: RowBuilder, left: torch.Tensor, right: torch.Tensor, bias: Any = None) -> Row:
    x, y = b.row(left), b.row(right)
    if x is not None and y is not None:
        raise MixesTokensError("multiplies two values of the tokens with each other")
    if x is not None and x.kinds == (True, False):
        weight = b.shared(right)
        if bias is not None:
            return Row(x.kinds, b.emit(aten.addmm.default, bias, x.node, weight))
        return Row(x.kinds, b.emit(aten.mm.default, x.node, weight))
    if y is not None and y.kinds == (False, True):
        weight = b.emit(aten.permute.default, b.shared(left), [1, 0])
        return Row(y.kinds, b.emit(aten.mm.default, y.node, weight))
    raise MixesTokensError("sums over tokens in a matrix product")


@rule(aten.addmm)
def _addmm(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    bias, left, right = args
    if any(v != 1 for v in kwargs.values()):
        raise MixesTokensError("is an addmm with factors")
    fused = bias.ndim == 1 and b.row(bias) is None and b.row(left) is not None
    if fused:
        return [_product(b, left, right, b.shared(bias))]
    product = _product(b, left, right)
    added = b.aligned(bias, outs[0].shape, product.kinds)
    return [Row(product.kinds, b.emit(aten.add.Tensor, product.node, added))]


@rule(aten.bmm)
def _bmm(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    left, right = args
    x = b.row(left)
    if x is None or b.row(right) is not None:
        raise MixesTokensError("multiplies two values of the tokens with each other")
    if x.kinds[2] or not (x.kinds[1] or is_one(left.shape[1])):
        raise MixesTokensError("sums over tokens in a matrix product")
    if is_one(right.shape[0]) or (isinstance(right.stride(0), int) and right.stride(0) == 0):
        # One weight for the whole batch, whatever kind the batch dimension is.
        weight = b.emit(aten.select.int, b.shared(right), 0, 0)
        rows = b.reshaped(x, left.shape, [left.shape[2]])
        if not x.kinds[0] and not is_one(left.shape[0]):
            raise MixesTokensError("expands one weight over features")
        return [Row((True, True, False), b.emit(aten.mm.default, rows, weight))]
    if x.kinds != (False, True, False):
        raise MixesTokensError("multiplies every sequence by a matrix of its own")
    by_batch = b.emit(aten.permute.default, x.node, [1, 0, 2])
    product = b.emit(aten.bmm.default, by_batch, b.shared(right))
    return [Row(x.kinds, b.emit(aten.permute.default, product, [1, 0, 2]))]


@rule(aten.convolution)
def _convolution(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x, weight, bias, stride, padding, _, transposed, _, groups = args
    row = b.row(x)
    pointlike = all(is_one(s) for s in weight.shape[2:]) and all(s == 1 for s in stride) and not any(padding)
    if not pointlike or groups != 1 or transposed:
        raise MixesTokensError("is a convolution that reads neighbouring tokens")
    if row is None or row.kinds[1] or not all(row.kinds[2:]):
        raise MixesTokensError("is a convolution over features")
    matrix = b.emit(aten.permute.default, b.shared(weight, list(weight.shape[:2])), [1, 0])
    if bias is None:
        return [Row(row.kinds, b.emit(aten.mm.default, row.node, matrix))]
    return [Row(row.kinds, b.emit(aten.addmm.default, b.shared(bias), row.node, matrix))]


# -- layout ------------------------------------------------------------------------------------------


@rule(aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.squeeze, aten.unsqueeze)
def _view(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = _only_row(b, args[0])
    if len(args) > 1 and isinstance(args[1], torch.dtype):
        raise MixesTokensError("reinterprets the bytes of a value")
    new = outs[0].shape
    kinds = view_kinds(args[0].shape, x.kinds, new)
    return [Row(kinds, b.reshaped(x, args[0].shape, feature_shape(new, kinds)))]


@rule(aten.permute, aten.transpose, aten.t)
def _permute(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = _only_row(b, args[0])
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
    x = _only_row(b, args[0])
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
    x = _only_row(b, args[0])
    dim = (args[1] if len(args) > 1 else 0) % args[0].ndim
    if same_size(args[0].shape[dim], outs[0].shape[dim]) and (len(args) < 5 or args[4] == 1):
        return [x]
    return [Row(x.kinds, b.emit(func, x.node, x.feature_dim(dim), *args[2:]))]


@rule(aten.select)
def _select(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = _only_row(b, args[0])
    dim = args[1] % args[0].ndim
    kinds = _without(x.kinds, dim)
    if x.kinds[dim] and is_one(args[0].shape[dim]):
        return [Row(kinds, x.node)]
    return [Row(kinds, b.emit(func, x.node, x.feature_dim(dim), args[2]))]


@rule(aten.split, aten.split_with_sizes, aten.unbind, aten.chunk, aten.unsafe_split, aten.unsafe_chunk)
def _split(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = _only_row(b, args[0])
    at = 1 if func.overloadpacket is aten.unbind else 2
    dim = (args[at] if len(args) > at else kwargs.get("dim", 0)) % args[0].ndim
    rest = () if at == 1 else (args[1],)
    node = b.emit(func, x.node, *rest, x.feature_dim(dim))
    kinds = _without(x.kinds, dim) if at == 1 else x.kinds
    return [Row(kinds, b.emit(_getitem, node, i)) for i in range(len(outs))]


@rule(aten.cat)
def _cat(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    tensors = args[0]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % outs[0].ndim
    first = next(r for t in tensors if (r := b.row(t)))
    nodes = []
    for t in tensors:
        found = b.row(t)
        if found is None and not isinstance(b.lookup(t), Shared):
            found = b.chunked(t, first.kinds)
        if found is None or found.kinds != first.kinds:
            raise MixesTokensError("joins values whose tokens do not line up")
        nodes.append(found.node)
    return [Row(first.kinds, b.emit(aten.cat.default, nodes, first.feature_dim(dim)))]


@rule(aten.flip, aten.roll)
def _flip(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    raise MixesTokensError(f"{_name(func)} moves tokens")


@rule(aten.constant_pad_nd)
def _pad(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = _only_row(b, args[0])
    if any(x.kinds[-(len(args[1]) // 2) :]):
        raise MixesTokensError("pads along a token dimension")
    return [Row(x.kinds, b.emit(func, x.node, *args[1:], **kwargs))]


# -- along features ----------------------------------------------------------------------------------


def _without(kinds: tuple[bool, ...], *dims: int) -> tuple[bool, ...]:
    return tuple(k for d, k in enumerate(kinds) if d not in dims)


def _only_row(b: RowBuilder, tensor: Any) -> Row:
    row = b.row(tensor)
    if row is None:
        raise MixesTokensError("uses a value of the tokens as an index or a size")
    return row


@rule(
    aten.sum, aten.mean, aten.amax, aten.amin, aten.var, aten.std, aten.logsumexp, aten.prod, aten.any, aten.all,
    aten.max, aten.min, aten.argmax, aten.argmin, aten.var_mean, aten.std_mean, aten.median, aten.nansum,
    aten.linalg_vector_norm, aten.norm,
)  # fmt: skip
def _reduce(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = _only_row(b, args[0])
    if sum(isinstance(a, torch.Tensor) for a in args) > 1:
        if func.overloadpacket in (aten.max, aten.min):
            return pointwise(b, func, args, kwargs, outs)
        raise MixesTokensError(f"{_name(func)} works over all tokens")
    names = [a.name for a in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    dims = given.get("dim")
    if dims is None or dims == []:
        raise MixesTokensError(f"{_name(func)} works over all tokens")
    listed = [d % args[0].ndim for d in ([dims] if isinstance(dims, int) else dims)]
    if any(x.kinds[d] for d in listed):
        raise MixesTokensError(f"{_name(func)} works along the tokens")
    moved = [x.feature_dim(d) for d in listed]
    given["dim"] = moved[0] if isinstance(dims, int) else moved
    positional = [given.pop(n) for n in names[: len(args)]]
    node = b.emit(func, x.node, *positional[1:], **{k: v for k, v in given.items() if k != names[0]})
    kinds = x.kinds if given.get("keepdim", False) or _keepdim(names, args) else _without(x.kinds, *listed)
    if len(outs) == 1:
        return [Row(kinds, node)]
    return [Row(kinds, b.emit(_getitem, node, i)) for i in range(len(outs))]


def _keepdim(names: list[str], args: Sequence[Any]) -> bool:
    return "keepdim" in names[: len(args)] and bool(args[names.index("keepdim")])


@rule(
    aten._softmax, aten._log_softmax, aten.cumsum, aten.cumprod, aten.logcumsumexp, aten.sort, aten.topk, aten.glu,
    aten.kthvalue, aten.cummax, aten.cummin, aten.argsort,
)  # fmt: skip
def _along(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = _only_row(b, args[0])
    names = [a.name for a in func._schema.arguments]
    defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    given = defaults | dict(zip(names, args, strict=False)) | kwargs
    dim = given["dim"] % args[0].ndim
    if x.kinds[dim]:
        raise MixesTokensError(f"{_name(func)} works along the tokens")
    given["dim"] = x.feature_dim(dim)
    rest = func._schema.arguments[1:]
    positional = [given[a.name] for a in rest if not a.kwarg_only]
    node = b.emit(
        func, x.node, *positional, **{a.name: given[a.name] for a in rest if a.kwarg_only and a.name in given}
    )
    if len(outs) == 1:
        return [Row(x.kinds, node)]
    return [Row(x.kinds, b.emit(_getitem, node, i)) for i in range(len(outs))]


@rule(aten.native_layer_norm, aten._fused_rms_norm)
def _norm(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = _only_row(b, args[0])
    n = len(args[1])
    if any(x.kinds[-n:]):
        raise MixesTokensError(f"{_name(func)} works along the tokens")
    weights = [None if a is None else b.shared(a) if isinstance(a, torch.Tensor) else a for a in args[2:]]
    node = b.emit(func, x.node, list(args[1]), *weights)
    ones = x.kinds[:-n] + (False,) * n
    return [Row(x.kinds if i == 0 else ones, b.emit(_getitem, node, i)) for i in range(len(outs))]


@rule(aten.gather)
def _gather(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = _only_row(b, args[0])
    index = args[2]
    row = b.row(index)
    if row is None:
        if any(k and not same_size(index.shape[d], args[0].shape[d]) for d, k in enumerate(x.kinds)):
            raise MixesTokensError("gathers from some of the tokens only")
        row = b.chunked(index, x.kinds)
    if row.kinds != x.kinds:
        raise MixesTokensError("gathers along the tokens")
    return [Row(x.kinds, b.emit(func, x.node, x.feature_dim(args[1]), row.node))]


@rule(aten.nll_loss_forward)
def _nll_loss(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    logp, target, weight, reduction, ignore_index = args
    x = _only_row(b, logp)
    if x.kinds != (True, False) or reduction != 0:
        raise MixesTokensError("reduces the loss over all tokens")
    row = b.row(target) or b.chunked(target, (True,))
    shared = None if weight is None else b.shared(weight)
    node = b.emit(func, x.node, row.node, shared, reduction, ignore_index)
    return [Row((True,), b.emit(_getitem, node, 0))]  # the total weight is 0 without a reduction
