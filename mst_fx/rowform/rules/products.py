"""Matrix products with a shared factor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.rowform.rows import ATTENTION, TWO_OF_TOKENS, MixesTokensError, Row, RowBuilder, aten, is_one
from mst_fx.rowform.rules.registry import rule


@rule(aten.mm)
def _mm(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    return [_product(b, args[0], args[1])]


def _product(b: RowBuilder, left: torch.Tensor, right: torch.Tensor, bias: Any = None) -> Row:
    x, y = b.row(left), b.row(right)
    if x is not None and y is not None:
        raise MixesTokensError(TWO_OF_TOKENS)
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
    x, y = b.row(left), b.row(right)
    if (x is None) == (y is None):
        raise MixesTokensError(ATTENTION)
    if x is not None:
        return [_batched_product(b, x, left.shape, right, b.shared(right))]
    assert y is not None
    # The weight comes first: the product of the transposes, transposed.
    first, second, third = y.kinds
    size, rows, columns = right.shape
    flipped = b.emit(aten.permute.default, b.shared(left), [0, 2, 1])
    product = _batched_product(b, Row((first, third, second), y.node), (size, columns, rows), left, flipped)
    first, third, second = product.kinds
    return [Row((first, second, third), product.node)]


def _batched_product(b: RowBuilder, x: Row, shape: Sequence[Any], matrix: torch.Tensor, weight: fx.Node) -> Row:
    """Return the row form of ``x [B, tokens, K]`` times ``weight [B, K, N]``, of which ``matrix`` tells the layout."""
    if x.kinds[2] or not (x.kinds[1] or is_one(shape[1])):
        raise MixesTokensError("sums over tokens in a matrix product")
    if is_one(matrix.shape[0]) or (isinstance(matrix.stride(0), int) and matrix.stride(0) == 0):
        # One weight for the whole batch, whatever kind the batch dimension is.
        if not x.kinds[0] and not is_one(shape[0]):
            raise MixesTokensError("expands one weight over features")
        rows = b.reshaped(x, shape, [shape[2]])
        return Row((True, True, False), b.emit(aten.mm.default, rows, b.emit(aten.select.int, weight, 0, 0)))
    if x.kinds != (False, True, False):
        raise MixesTokensError("multiplies every sequence by a matrix of its own")
    by_batch = b.emit(aten.permute.default, x.node, [1, 0, 2])
    product = b.emit(aten.bmm.default, by_batch, weight)
    return Row(x.kinds, b.emit(aten.permute.default, product, [1, 0, 2]))


@rule(aten.baddbmm)
def _baddbmm(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    bias, left, right = args
    if any(v != 1 for v in kwargs.values()):
        raise MixesTokensError("is a baddbmm with factors")
    (product,) = _bmm(b, func, [left, right], {}, outs)
    added = b.aligned(bias, outs[0].shape, product.kinds)
    return [Row(product.kinds, b.emit(aten.add.Tensor, product.node, added))]


@rule(aten.convolution)
def _convolution(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: Any, outs: Any) -> list[Row]:
    x, weight, bias, stride, padding, _, transposed, _, groups = args
    row = b.row(x)
    pointlike = all(is_one(s) for s in weight.shape[2:]) and all(s == 1 for s in stride) and not any(padding)
    if not pointlike or groups != 1 or transposed:
        raise MixesTokensError("is a convolution that reads neighbouring tokens")
    if row is None or row.kinds != (True, False, *[True] * (x.ndim - 2)):
        raise MixesTokensError("is a convolution over features")
    matrix = b.emit(aten.permute.default, b.shared(weight, list(weight.shape[:2])), [1, 0])
    if bias is None:
        return [Row(row.kinds, b.emit(aten.mm.default, row.node, matrix))]
    return [Row(row.kinds, b.emit(aten.addmm.default, b.shared(bias), row.node, matrix))]
