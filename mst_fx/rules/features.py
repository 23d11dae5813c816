"""Along features: reductions, softmax, norms, gather, losses."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from mst_fx.rows import MixesTokensError, Row, RowBuilder, aten, same_size
from mst_fx.rules.registry import only_row, op_name, pointwise, rule, without


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
    if len(outs) == 1:
        return [Row(x.kinds, node)]
    return [Row(x.kinds, b.emit(operator.getitem, node, i)) for i in range(len(outs))]


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


@rule(aten.gather)
def _gather(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = only_row(b, args[0])
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
    x = only_row(b, logp)
    if x.kinds != (True, False) or reduction != 0:
        raise MixesTokensError("reduces the loss over all tokens")
    row = b.row(target) or b.chunked(target, (True,))
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


@rule(aten.scatter)
def _scatter(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x = only_row(b, args[0])
    operands: list[Any] = []
    for value in args[2:]:
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            operands.append(b.shared(value) if isinstance(value, torch.Tensor) else value)
            continue
        if any(k and not same_size(value.shape[d], args[0].shape[d]) for d, k in enumerate(x.kinds)):
            raise MixesTokensError("scatters to some of the tokens only")
        row = b.row(value) or b.chunked(value, x.kinds)
        if row.kinds != x.kinds:
            raise MixesTokensError("scatters along the tokens")
        operands.append(row.node)
    return [Row(x.kinds, b.emit(func, x.node, x.feature_dim(args[1]), *operands, **kwargs))]
