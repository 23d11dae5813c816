"""Sums of weight gradients over chunks: what they are kept in, and how a chunk's part is added.

    mst.accumulate="float32":   in fp32 at the least, cast to the parameter's dtype once.
    mst.accumulate="parameter": in the parameter's dtype. Sums of up to SMALL_SUM_BYTES are kept in fp32 all the same.

A sum in bf16 is extended by eight bits on a CPU (``extended.py``). On a GPU a product adds into bf16 itself, with one
rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from mst_fx import extended
from mst_fx.extended import Adder, pieces
from mst_fx.inductor import cpu_multiplies

PRODUCT_BLOCK_BYTES = 8 * 2**20
"""A product that cannot be added while it is computed goes block by block; smaller ones multiply more slowly."""
SMALL_SUM_BYTES = 2**20


def sum_dtype(dtype: torch.dtype, accumulate: str, shape: Sequence[int]) -> torch.dtype:
    """Return the dtype in which the gradient of a weight is summed over chunks."""
    wide = torch.promote_types(dtype, torch.float32)
    return wide if accumulate == "float32" or math.prod(shape) * wide.itemsize <= SMALL_SUM_BYTES else dtype


def sum_itemsize(dtype: torch.dtype, accumulate: str, shape: Sequence[int], device: torch.device) -> int:
    """Return the bytes per number of such a sum."""
    return sum_dtype(dtype, accumulate, shape).itemsize + is_extended(dtype, accumulate, shape, device)


def is_extended(dtype: torch.dtype, accumulate: str, shape: Sequence[int], device: torch.device) -> bool:
    """Whether such a sum has eight bits more beside it."""
    return device.type == "cpu" and sum_dtype(dtype, accumulate, shape) is torch.bfloat16


class Sum:
    """A sum over chunks of parts of one shape.

    Args:
        dtype: The weight's.
        accumulate: ``mst.accumulate``.
        shape: Of every part.
        device: Where the parts are.
        adder: What adds to a sum in bf16 on a CPU.
    """

    def __init__(
        self, dtype: torch.dtype, accumulate: str, shape: Sequence[int], device: torch.device,
        adder: Adder = extended.add,
    ) -> None:  # fmt: skip
        self._given, self._dtype = dtype, sum_dtype(dtype, accumulate, shape)
        self._shape, self._device = tuple(shape), device
        self._is_extended = is_extended(dtype, accumulate, shape, device)
        self._total: torch.Tensor | None = None
        self._adder = adder
        self._rest: torch.Tensor | None = None
        """The eight bits more; None before anything was added to a first part."""

    def add(self, part: torch.Tensor) -> None:
        """Add a part."""
        if self._total is None:
            self._total = part.to(self._dtype, copy=True, memory_format=torch.contiguous_format)
        elif self._is_extended:
            self._add_extended(slice(None), part.contiguous())
        else:
            self._total.add_(part)

    def add_product(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add ``a @ b``."""
        first = self._total is None
        if a.dtype == self._dtype and (first or not self._is_extended):
            self._total = torch.mm(a, b) if self._total is None else self._total.addmm_(a, b)
            return
        if self._total is None:
            self._total = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        total = self._total
        if a.is_cuda and first:
            torch.mm(a, b, out_dtype=self._dtype, out=total)
        elif a.is_cuda:
            torch.addmm(total, a, b, out_dtype=self._dtype, out=total)
        elif self._is_extended:
            for rows, part in self._products(a, b):
                total[rows].copy_(part) if first else self._add_extended(rows, part)
        elif cpu_multiplies(a.dtype):
            for rows, part in self._products(a, b):
                _add_cast(total[rows], part, first)
        else:
            self._add_widened(total, a, b, first)

    def result(self, factor: torch.Tensor | None = None) -> torch.Tensor | None:
        """Return the sum, which nothing may be added to any more; None where there were no parts.

        Args:
            factor: A number it is multiplied by before it is rounded.
        """
        total, rest, self._total, self._rest = self._total, self._rest, None, None
        if total is None:
            return None
        if rest is not None:
            extended.finish(total, rest, factor)
        elif factor is not None and total.dtype == factor.dtype:
            narrow = total if total.is_cpu or total.dtype == self._given else torch.empty_like(total, dtype=self._given)
            torch.mul(total, factor, out=narrow)  # on a GPU multiplied and rounded in one go
            return narrow
        elif factor is not None:
            for (piece,) in pieces(total):
                piece.copy_(piece.to(factor.dtype) * factor)
        return total

    # NOTE [fp32 sums on a CPU] No CPU product of bf16 factors adds into fp32. Where the CPU multiplies bf16 fast, a
    # block of the product is rounded and added; where it does not, the factors are widened block by block and the
    # sum is exact.

    @staticmethod
    def _blocks(a: torch.Tensor, b: torch.Tensor) -> Iterator[slice]:
        step = max(1, PRODUCT_BLOCK_BYTES // (max(a.shape[1], b.shape[1]) * 4))
        for start in range(0, a.shape[0], step):
            yield slice(start, start + step)

    def _products(self, a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        wide = None if cpu_multiplies(a.dtype) else b.float()
        for rows in self._blocks(a, b):
            yield rows, torch.mm(a[rows], b) if wide is None else torch.mm(a[rows].float(), wide)

    def _add_widened(self, total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
        wide = b.to(total.dtype)
        for rows in self._blocks(a, b):
            if first:
                torch.mm(a[rows].to(total.dtype), wide, out=total[rows])
            else:
                total[rows].addmm_(a[rows].to(total.dtype), wide)

    def _add_extended(self, rows: slice, part: torch.Tensor) -> None:
        assert self._total is not None
        if self._rest is None:
            self._rest = torch.zeros(self._shape, dtype=torch.uint8, device=self._device)
        total = self._total[rows]
        self._adder(total.view(-1), self._rest[rows].view(-1), part.view(-1))


def _add_cast(total: torch.Tensor, part: torch.Tensor, first: bool) -> None:
    """Add (or copy) into a wider dtype piece by piece: an add of two dtypes casts all of the narrow one first."""
    for wide, narrow in pieces(total, part):
        wide.copy_(narrow) if first else wide.add_(narrow)
