"""A sum in bf16 with the next eight bits of fp32 beside it, on a CPU.

A sum in bf16 is rounded at every chunk, and what is rounded away grows with the number of chunks. No CPU product adds
into fp32 either, so that the next eight bits are kept in a second tensor: three bytes per number instead of four, the
error of fp32, and bf16 is the upper part as it lies in memory, so that nothing is cast in the end.

An addition is ten ops, each of which takes its time to go through a core's cache. Inductor makes one pass of them: a
third of the time on a CPU with AMX. It has vectors for int32 and bf16 but not for int16, and turns bits into numbers by
way of memory, so that the end, which is a few ops and comes once, is no faster so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from mst_fx.body import Body, InputSpec, trace_forward
from mst_fx.inductor import compile_body, cpu_multiplies, global_settings

PIECE = 2**17
"""Eager ops take as many numbers at a time as stay in a core's cache with their fp32 copy."""
COMPILED_ROWS = 2**20
"""Numbers in one call, by which Inductor decides about threads."""


Adder = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]
"""What adds a part to a sum, in place; all flat: ``upper [n]`` in bf16, ``lower [n]`` in uint8, ``part [n]``."""


def pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Cut contiguous tensors of the same number of elements into pieces."""
    yield from zip(*(t.view(-1).split(PIECE) for t in tensors), strict=True)


def add(upper: torch.Tensor, lower: torch.Tensor, part: torch.Tensor) -> None:
    """Add a part to a sum."""
    space = _two_pieces()
    for high, low, new in pieces(upper, lower, part):
        bits, other = _join_piece(high, low, space)
        bits.view(torch.float32).add_(other.view(torch.float32).copy_(new))
        bits.add_(0x80)  # to the nearest; a NaN that products make has zeros there, so that it does not overflow
        low.copy_(torch.bitwise_right_shift(bits, 8, out=other))  # the lowest eight bits of that
        high.copy_(bits.bitwise_and_(-0x10000).view(torch.float32))


def finish(upper: torch.Tensor, lower: torch.Tensor, factor: torch.Tensor | None) -> None:
    """Multiply a sum by a number, and round it to bf16, in ``upper``."""
    space = _two_pieces()
    for high, low in pieces(upper, lower):
        wide = _join_piece(high, low, space)[0].view(torch.float32)
        high.copy_(wide if factor is None else wide.mul_(factor))


def _two_pieces() -> torch.Tensor:
    """Return memory to work on a piece in: an allocation for every step would take longer than the step."""
    return torch.empty(2, PIECE, dtype=torch.int32)


def _join_piece(upper: torch.Tensor, lower: torch.Tensor, space: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bits of fp32 numbers whose first 24 are given, as int32, and as much memory besides."""
    bits, other = space[:, : upper.numel()].unbind()
    bits.view(torch.float32).copy_(upper)
    return bits.add_(other.copy_(lower), alpha=2**8), other


# -- the same in one pass ----------------------------------------------------------------------------


def _added(upper: torch.Tensor, lower: torch.Tensor, part: torch.Tensor) -> list[torch.Tensor]:
    """Add in place; as a body it has no outputs."""
    wide = (upper.float().view(torch.int32) + lower.to(torch.int32) * 2**8).view(torch.float32)
    bits = (wide + part.float()).view(torch.int32) + 0x80
    lower.copy_((bits >> 8 & 0xFF).to(torch.uint8))
    upper.copy_((bits & -0x10000).view(torch.float32))
    return []


_compiled: dict[str, Adder] = {}


def adder(compiler: str, options: Mapping[str, Any]) -> Adder:
    """Return what adds, compiled once per process and setting where Inductor compiles."""
    if compiler == "aot_eager":
        return add
    setting = repr((compiler, sorted(options.items()), global_settings()))
    if setting not in _compiled:
        _compiled[setting] = _compile(compiler, options)
    return _compiled[setting]


def forget() -> None:
    """Compile anew for the next region: a kernel may have failed in the background."""
    _compiled.clear()


def _compile(compiler: str, options: Mapping[str, Any]) -> Adder:
    product = torch.bfloat16 if cpu_multiplies(torch.bfloat16) else torch.float32
    inputs = (InputSpec((), dtype, torch.device("cpu"), ()) for dtype in (torch.bfloat16, torch.uint8, product))
    body = Body(fx.symbolic_trace(_added), tuple(inputs), (), has_seed=False)
    compiled = compile_body(*trace_forward(body, COMPILED_ROWS), compiler, dict(options))

    def add_fast(upper: torch.Tensor, lower: torch.Tensor, part: torch.Tensor) -> None:
        (compiled if part.dtype == product and part.numel() >= PIECE else add)(upper, lower, part)

    return add_fast
