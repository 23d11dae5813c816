"""Chunk sizes and their bytes: pure arithmetic over shapes, standard library only.

Shapes alone decide, so every rank of a distributed job decides alike without a collective.

Terms, in bytes:
    wide: a row's wide values, gradients included; they exist for ``C`` rows at a time.
    narrow: a row's inputs and outputs of the region; they exist for all ``T`` rows whatever ``C`` is.
    accumulators: the weight-gradient sums; they exist whatever ``C`` is.

Two forces pull at the chunk size ``C``:

* bytes: a region takes ``accumulators + C * wide`` instead of ``T * wide``;
* time: every chunk adds into each ``K x N`` accumulator once, which moves ``8 * K * N`` bytes (fp32) for a product of
  ``2 * C * K * N`` FLOPs: a share ``t / C`` of that product's time, ``t = 4 * flops / bandwidth`` (50 to 100 tokens on
  a CPU in fp32, twice that where it multiplies bf16). ``least_tokens`` keeps that share small, and matrices large
  enough to be fast. On an H100, bf16 weights with sums in fp32 take ``t`` of 1100 to 1250 tokens (Llama-3-8B's MLP of
  65536 tokens in chunks of 4096 and 8192, its head of 8192 in chunks of 512 and 1024), with sums in bf16 about 600.
  That product is a third of a head's time and some quarter of an MLP's: chunks of 4096 cost a tenth at most.

``auto`` lets a chunk cost about as much as what exists anyway (on a GPU two thirds of it), for less would save little:

    target = size nearest to (accumulators + T * narrow) / wide
    C      = greatest size <= target, T / 2 (or least_tokens, if T is a little less than twice that), most_tokens,
             and such that accumulators + C * wide <= 3/4 T * wide and <= T * wide - MIN_SAVED_BYTES

and leaves the region alone where that is below ``least_tokens``. Sizes are powers of two; on a GPU also two thirds of
these, rounded up, which cut as many tokens evenly: on an H200 the products of Llama-3-8B's head took the same time in
six chunks of 1366 tokens as in four of 2048. Every bound grows with ``T``, so a longer sequence never gets smaller
chunks, and one that is longer than a chunked one is chunked. It is never more than three quarters of the bytes without
chunks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MIN_CHUNK_TOKENS = {
    "cpu": {"mlp": 1024, "loss": 256},
    "cpu, two bytes": {"mlp": 1024, "loss": 512},
    "gpu": {"mlp": 2048, "loss": 1024},
    "gpu, wider sums": {"mlp": 4096, "loss": 4096},
}
MAX_CHUNK_TOKENS = {"cpu": {"mlp": 16384, "loss": 16384}, "gpu": {"mlp": 16384, "loss": 4096}}
"""On a GPU a head's sums are cast in the end, which takes half as many bytes again: larger chunks would be the peak."""
ROW_WEIGHTS_TOKENS = {"cpu": 64, "gpu": 256}
"""Of a region in which every token has matrices of its own: reading these is all its time, in chunks of any size."""
MIN_SAVED_BYTES = 8 * 2**20
MOST_KEPT = 0.75
MOST_SHIFTED = 16
"""Two smallest chunks may be short of this share of one: labels are shifted by a token or a few (2047 of 2048)."""


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
    kind: str,
    tokens: int,
    wide_bytes: int,
    narrow_bytes: int,
    accumulator_bytes: int,
    chunk_tokens: int | str,
    device: str = "cpu",
    itemsize: int = 4,
    wider_sums: bool = False,
    row_weights: bool = False,
) -> ChunkPlan | str:
    """Plan a region of ``tokens`` rows, or say in one sentence why it is better left alone.

    Args:
        kind: "mlp" or "loss".
        tokens: Rows, T. For a symbolic T, its example value.
        wide_bytes: Bytes of wide values per row, gradients included where there are any.
        narrow_bytes: Bytes of the region's per-row inputs and outputs.
        accumulator_bytes: Bytes of the weight-gradient accumulators; 0 when nothing trains.
        chunk_tokens: The user's ``mst.chunk_tokens``.
        device: "cpu", or anything else for a GPU.
        itemsize: Bytes of a number of the region's input.
        wider_sums: Whether gradients are summed in a wider dtype than the weights'.
        row_weights: Whether every token has matrices of its own (experts' weights taken by a list).
    """
    before = tokens * wide_bytes
    if not isinstance(chunk_tokens, str):
        if tokens <= chunk_tokens:
            return f"too small: {tokens} tokens fit in one chunk of {chunk_tokens}"
        return _plan(tokens, chunk_tokens, wide_bytes, accumulator_bytes)
    least = least_tokens(kind, device, itemsize, wider_sums, row_weights)
    if tokens < 2 * least - least // MOST_SHIFTED:
        return f"too small: {tokens} tokens are less than two chunks of {least}"
    room = min(MOST_KEPT * before, before - MIN_SAVED_BYTES) - accumulator_bytes
    if room < least * wide_bytes:
        after = accumulator_bytes + least * wide_bytes
        least_saved = max(before - int(MOST_KEPT * before), MIN_SAVED_BYTES)
        return (
            f"not worthwhile: {format_bytes(before)} of wide values would become {format_bytes(after)}, "
            f"which saves less than {format_bytes(least_saved)}"
        )
    anyway = (accumulator_bytes + tokens * narrow_bytes) / max(wide_bytes, 1)
    target = anyway if device == "cpu" else anyway * 2 / 3
    most = min(max(tokens // 2, least), most_tokens(kind, device), int(room // max(wide_bytes, 1)))
    size = min(_sizes(device, least, most), key=lambda n: abs(math.log2(n / max(target, 1))))
    return _plan(tokens, size, wide_bytes, accumulator_bytes)


def _sizes(device: str, least: int, most: int) -> list[int]:
    sizes = [2**n for n in range(least.bit_length() - 1, most.bit_length() + 1)]
    if device != "cpu":
        sizes += [-(-2 * n // 3) for n in sizes]
    return sorted(n for n in sizes if least <= n <= most)


def most_tokens(kind: str, device: str) -> int:
    """Return the tokens of the largest chunk that ``auto`` makes."""
    return MAX_CHUNK_TOKENS["cpu" if device == "cpu" else "gpu"][kind]


def least_tokens(kind: str, device: str, itemsize: int, wider_sums: bool = False, row_weights: bool = False) -> int:
    """Return the tokens of the smallest chunk that ``auto`` makes, but for the last one."""
    if row_weights:
        return ROW_WEIGHTS_TOKENS["cpu" if device == "cpu" else "gpu"]
    if device != "cpu":
        return MIN_CHUNK_TOKENS["gpu, wider sums" if wider_sums else "gpu"][kind]
    return MIN_CHUNK_TOKENS["cpu" if itemsize > 2 else "cpu, two bytes"][kind]


def _plan(tokens: int, size: int, wide_bytes: int, accumulator_bytes: int) -> ChunkPlan:
    after = min(tokens, size) * wide_bytes + accumulator_bytes
    return ChunkPlan(size, -(-tokens // size), tokens * wide_bytes, after)


def format_bytes(count: int) -> str:
    """Render a byte count with a binary unit."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit in ("B", "KiB") else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")
