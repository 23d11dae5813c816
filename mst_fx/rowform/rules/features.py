"""Along features: reductions, softmax, norms, gather, losses."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from mst_fx.rowform.rows import MixesTokensError, Row, RowBuilder, Shared, aten, feature_shape, numel, same_size
from mst_fx.rowform.rules.registry import only_row, op_name, pointwise, rule, without


@rule(
    aten.sum, aten.mean, aten.amax, aten.amin, aten.var, aten.std, aten.logsumexp, aten.prod, aten.any, aten.all,
    aten.max, aten.min, aten.argmax, aten.argmin, aten.var_mean, aten.std_mean, aten.median, aten.nansum,
    aten.linalg_vector_norm, aten.norm,
)  # fmt: skip
def _reduce(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = only_row(b, args[0])
    if sum(isinstance(a, torch.Tensor) for a in args) > 1:
        if func.overloadpacket in (aten.max, aten.min):
            return pointwise(b, func, args, kwargs, outs)
        raise MixesTokensError(f"{op_name(func)} works over all tokens")
    names = [a.name for a in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    dims = given.get("dim")
    if dims is None or dims == []:
        raise MixesTokensError(f"{op_name(func)} works over all tokens")
    listed = [d % args[0].ndim for d in ([dims] if isinstance(dims, int) else dims)]
    if any(x.kinds[d] for d in listed):
        raise MixesTokensError(f"{op_name(func)} works along the tokens")
    moved = [x.feature_dim(d) for d in listed]
    given["dim"] = moved[0] if isinstance(dims, int) else moved
    positional = [given.pop(n) for n in names[: len(args)]]
    node = b.emit(func, x.node, *positional[1:], **{k: v for k, v in given.items() if k != names[0]})
    kinds = x.kinds if given.get("keepdim", False) or _keepdim(names, args) else without(x.kinds, *listed)
    if len(outs) == 1:
        return [Row(kinds, node)]
    return [Row(kinds, b.emit(operator.getitem, node, i)) for i in range(len(outs))]


def _keepdim(names: list[str], args: Sequence[Any]) -> bool:
    return "keepdim" in names[: len(args)] and bool(args[names.index("keepdim")])


@rule(
    aten._softmax, aten._log_softmax, aten.cumsum, aten.cumprod, aten.logcumsumexp, aten.sort, aten.topk, aten.glu,
    aten.kthvalue, aten.cummax, aten.cummin, aten.argsort,
)  # fmt: skip
def _along(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = only_row(b, args[0])
    names = [a.name for a in func._schema.arguments]
    defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    given = defaults | dict(zip(names, args, strict=False)) | kwargs
    dim = given["dim"] % args[0].ndim
    if x.kinds[dim]:
        raise MixesTokensError(f"{op_name(func)} works along the tokens")
    given["dim"] = x.feature_dim(dim)
    rest = func._schema.arguments[1:]
    positional = [given[a.name] for a in rest if not a.kwarg_only]
    node = b.emit(
        func, x.node, *positional, **{a.name: given[a.name] for a in rest if a.kwarg_only and a.name in given}
    )
    kinds = x.kinds if outs[0].ndim == args[0].ndim else without(x.kinds, dim)
    if len(outs) == 1:
        return [Row(kinds, node)]
    return [Row(kinds, b.emit(operator.getitem, node, i)) for i in range(len(outs))]


@rule(aten.native_layer_norm, aten._fused_rms_norm)
def _norm(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = only_row(b, args[0])
    n = len(args[1])
    if any(x.kinds[-n:]):
        raise MixesTokensError(f"{op_name(func)} works along the tokens")
    weights = [None if a is None else b.shared(a) if isinstance(a, torch.Tensor) else a for a in args[2:]]
    node = b.emit(func, x.node, list(args[1]), *weights)
    ones = x.kinds[:-n] + (False,) * n
    return [Row(x.kinds if i == 0 else ones, b.emit(operator.getitem, node, i)) for i in range(len(outs))]


@rule(aten.native_group_norm)
def _group_norm(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    """Groups of features of a value ``[T, features...]``: a layer norm over each, then scale and shift."""
    value, weight, bias, _, channels, _, groups, eps = args
    x = only_row(b, value)
    if any(x.kinds[1:]) or not x.kinds[0]:
        raise MixesTokensError(f"{op_name(func)} works along the tokens")
    features = feature_shape(value.shape, x.kinds)
    size = numel(features) // groups
    grouped = b.emit(aten.reshape.default, x.node, [-1, groups, size])
    normed = b.emit(operator.getitem, b.emit(aten.native_layer_norm.default, grouped, [size], None, None, eps), 0)
    node = b.emit(aten.reshape.default, normed, [-1, *features])
    shape = [channels] + [1] * (len(features) - 1)
    for op, parameter in ((aten.mul.Tensor, weight), (aten.add.Tensor, bias)):
        if parameter is not None:
            node = b.emit(op, node, b.shared(parameter, shape))
    if value.dtype != outs[0].dtype or any(p is not None and p.dtype != value.dtype for p in (weight, bias)):
        raise MixesTokensError(f"{op_name(func)} mixes dtypes")
    return [Row(x.kinds, node)]


@rule(aten.gather)
def _gather(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = only_row(b, args[0])
    index = _rows_like(b, args[2], args[0], x, "gathers")
    return [Row(x.kinds, b.emit(func, x.node, x.feature_dim(args[1]), index))]


@rule(aten.scatter, aten.scatter_add)
def _scatter(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = b.row(args[0])
    if isinstance(b.lookup(args[0]), Shared):
        raise MixesTokensError("makes a value that depends on the position of the token")
    if x is None:  # zeros, perhaps, made for the purpose: rows like those of what is scattered
        x = b.chunked(args[0], next(r for t in args[2:] if isinstance(t, torch.Tensor) and (r := b.row(t))).kinds)
    operands: list[Any] = []
    for value in args[2:]:
        if isinstance(value, torch.Tensor):
            operands.append(_rows_like(b, value, args[0], x, "scatters") if value.ndim else b.shared(value))
        else:
            operands.append(value)
    return [Row(x.kinds, b.emit(func, x.node, x.feature_dim(args[1]), *operands, **kwargs))]


def _rows_like(b: RowBuilder, index: torch.Tensor, value: torch.Tensor, x: Row, verb: str) -> Any:
    """Return the row form of an index into the features of ``value``, which must have its tokens."""
    if index.ndim != value.ndim or any(
        k and not same_size(index.shape[d], value.shape[d]) for d, k in enumerate(x.kinds)
    ):
        raise MixesTokensError(f"{verb} from some of the tokens only")
    if isinstance(b.lookup(index), Shared):
        raise MixesTokensError("makes a value that depends on the position of the token")
    row = b.row(index) or b.chunked(index, x.kinds)
    if row.kinds != x.kinds:
        raise MixesTokensError(f"{verb} along the tokens")
    return row.node


@rule(aten.nll_loss_forward)
def _nll_loss(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    logp, target, weight, reduction, ignore_index = args
    x = only_row(b, logp)
    if x.kinds != (True, False) or reduction != 0:
        raise MixesTokensError("reduces the loss over all tokens")
    row = b.row(target) or b.chunked(target, (True,))
    if row.kinds != (True,):
        raise MixesTokensError("takes a loss against labels that are not one for each token")
    shared = None if weight is None else b.shared(weight)
    node = b.emit(func, x.node, row.node, shared, reduction, ignore_index)
    return [Row((True,), b.emit(operator.getitem, node, 0))]  # the total weight is 0 without a reduction


@rule(
    aten.mse_loss, aten.smooth_l1_loss, aten.huber_loss, aten.soft_margin_loss, aten.binary_cross_entropy,
    aten.binary_cross_entropy_with_logits,
)  # fmt: skip
def _loss_per_element(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    names = [a.name for a in func._schema.arguments]
    defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    given = defaults | dict(zip(names, args, strict=False)) | kwargs
    if given["reduction"] != 0:
        raise MixesTokensError("reduces the loss over all tokens")
    return pointwise(b, func, args, kwargs, outs)
