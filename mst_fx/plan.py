"""Chunk sizes and their bytes: pure arithmetic over shapes, standard library only.

Shapes alone decide, so every rank of a distributed job decides alike without a collective.
Two forces pull at the chunk size ``C``:

* bytes: a chunk's wide values take ``C * wide_bytes`` (forward values and their gradients);
* traffic: every chunk adds into the fp32 accumulators once, about ``8 * K * N`` bytes moved against
  ``2 * C * K * N`` FLOPs per weight, a relative cost of ``(8 / bandwidth) / (2 * C / flops)``.

The accumulators (``accumulator_bytes``) and the region's own inputs and outputs
(``T * narrow_bytes``) exist whatever ``C`` is. ``auto`` lets a chunk cost about as much as these do:

    C = power of two nearest to (accumulator_bytes + T * narrow_bytes) / wide_bytes, within limits

and leaves a region alone unless that is at least two chunks and saves a quarter of the bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MIN_CHUNK_TOKENS = {"mlp": 1024, "loss": 256}
MAX_CHUNK_TOKENS = 16384
MIN_SAVED_BYTES = 8 * 2**20


@dataclass(frozen=True)
class ChunkPlan:
    """How a region is cut: ``chunk_tokens`` rows per chunk, the last one shorter."""

    chunk_tokens: int
    num_chunks: int
    bytes_before: int
    bytes_after: int


def chunk_bounds(tokens: int, chunk_tokens: int) -> list[tuple[int, int]]:
    """Return the half-open row ranges of the chunks; none for ``tokens == 0``."""
    return [(start, min(start + chunk_tokens, tokens)) for start in range(0, tokens, chunk_tokens)]


def plan_chunks(
    kind: str, tokens: int, wide_bytes: int, narrow_bytes: int, accumulator_bytes: int, chunk_tokens: int | str
) -> ChunkPlan | str:
    """Plan a region of ``tokens`` rows, or say in one sentence why it is better left alone.

    Args:
        kind: "mlp" or "loss".
        tokens: Rows, T. For a symbolic T, its example value.
        wide_bytes: Bytes of wide values per row, gradients included where there are any.
        narrow_bytes: Bytes of the region's per-row inputs and outputs.
        accumulator_bytes: Bytes of the weight-gradient accumulators; 0 when nothing trains.
        chunk_tokens: The user's ``mst.chunk_tokens``.
    """
    before = tokens * wide_bytes
    if isinstance(chunk_tokens, str):
        size = _auto_chunk_tokens(kind, tokens, wide_bytes, narrow_bytes, accumulator_bytes)
    else:
        size = chunk_tokens
    plan = ChunkPlan(size, -(-tokens // size), before, min(tokens, size) * wide_bytes + accumulator_bytes)
    if plan.num_chunks < 2:
        return f"too small: {tokens} tokens fit in one chunk of {size}"
    if chunk_tokens == "auto" and plan.bytes_after > 0.75 * before:
        return f"not worthwhile: {format_bytes(before)} of wide values would become {format_bytes(plan.bytes_after)}"
    if chunk_tokens == "auto" and before - plan.bytes_after < MIN_SAVED_BYTES:
        return f"too small: chunking would save {format_bytes(before - plan.bytes_after)} only"
    return plan


def _auto_chunk_tokens(kind: str, tokens: int, wide_bytes: int, narrow_bytes: int, accumulator_bytes: int) -> int:
    fixed = accumulator_bytes + tokens * narrow_bytes
    size = 2 ** round(math.log2(max(fixed / max(wide_bytes, 1), 1)))
    return max(MIN_CHUNK_TOKENS[kind], min(size, MAX_CHUNK_TOKENS))


def format_bytes(count: int) -> str:
    """Render a byte count with a binary unit."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit in ("B", "KiB") else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")
