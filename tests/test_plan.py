import ast
import inspect
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mst_fx
from mst_fx import plan as plan_module
from mst_fx import sums
from mst_fx.bench.works import SwiGLU
from mst_fx.plan import MIN_SAVED_BYTES, ChunkPlan, chunk_bounds, least_tokens, most_tokens, plan_chunks

MLP = {"wide_bytes": 2**16, "narrow_bytes": 2**12, "accumulator_bytes": 2**24}


def test_bounds_cover_every_row_once() -> None:
    for tokens in (0, 1, 7, 8, 9, 64, 65):
        bounds = chunk_bounds(tokens, 8)
        assert [row for start, end in bounds for row in range(start, end)] == list(range(tokens))


def test_int_chunks_whatever_is_longer() -> None:
    assert plan_chunks("mlp", 9, 1, 1, 10**9, 8) == ChunkPlan(8, 2, 9, 8 + 10**9)
    assert "one chunk" in str(plan_chunks("mlp", 8, 1, 1, 0, 8))


def test_auto_leaves_small_and_unprofitable_regions_alone() -> None:
    assert isinstance(plan_chunks("mlp", 512, **MLP, chunk_tokens="auto"), str)
    assert "not worthwhile" in str(plan_chunks("mlp", 2048, 2**12, 2**8, 2**22, "auto"))


def test_a_shifted_sequence_is_chunked_as_a_whole_one() -> None:
    plans = [plan_chunks("mlp", tokens, **MLP, chunk_tokens="auto") for tokens in (2047, 2048)]
    assert [p.chunk_tokens for p in plans if isinstance(p, ChunkPlan)] == [1024, 1024]
    assert "less than two chunks" in str(plan_chunks("mlp", 1900, **MLP, chunk_tokens="auto"))


def test_matrices_for_every_token_are_cut_small() -> None:
    plan = plan_chunks("mlp", 1024, 2**20, 2**12, 2**22, "auto", row_weights=True)
    assert isinstance(plan, ChunkPlan)
    assert plan.chunk_tokens == 64


REGION = {
    "kind": st.sampled_from(["mlp", "loss"]),
    "wide_bytes": st.integers(1, 2**22),
    "narrow_bytes": st.integers(0, 2**18),
    "accumulator_bytes": st.integers(0, 2**34),
    "device": st.sampled_from(["cpu", "cuda"]),
    "itemsize": st.sampled_from([2, 4]),
    "wider_sums": st.booleans(),
}
TOKENS = st.integers(0, 2**22)


@given(tokens=TOKENS, **REGION)
def test_auto_never_plans_more_memory_than_before(tokens: int, **region: Any) -> None:
    plan = plan_chunks(tokens=tokens, chunk_tokens="auto", **region)
    if isinstance(plan, str):
        return
    assert plan.bytes_before == tokens * region["wide_bytes"]
    assert plan.bytes_after == plan.chunk_tokens * region["wide_bytes"] + region["accumulator_bytes"]
    assert plan.bytes_after <= 0.75 * plan.bytes_before
    assert plan.bytes_before - plan.bytes_after >= MIN_SAVED_BYTES
    assert plan.num_chunks >= 2
    assert plan.chunk_tokens.bit_count() == 1 or (region["device"] == "cuda" and plan.chunk_tokens * 3 % 2**11 <= 2)
    least = least_tokens(region["kind"], region["device"], region["itemsize"], region["wider_sums"])
    assert least <= plan.chunk_tokens <= most_tokens(region["kind"], region["device"])


@given(tokens=TOKENS, more=TOKENS, **REGION)
def test_auto_is_monotone(tokens: int, more: int, **region: Any) -> None:
    """A longer sequence is chunked where a shorter one is, in chunks no smaller."""
    short, long = (plan_chunks(tokens=t, chunk_tokens="auto", **region) for t in (tokens, tokens + more))
    if isinstance(short, ChunkPlan):
        assert isinstance(long, ChunkPlan)
        assert long.chunk_tokens >= short.chunk_tokens


@given(tokens=TOKENS, fewer=st.floats(0, 1), **REGION)
def test_accumulators_count_against_chunking(tokens: int, fewer: float, **region: Any) -> None:
    """What is chunked with large accumulators is chunked with small ones, in at most the bytes."""
    large = plan_chunks(tokens=tokens, chunk_tokens="auto", **region)
    region["accumulator_bytes"] = int(fewer * region["accumulator_bytes"])
    small = plan_chunks(tokens=tokens, chunk_tokens="auto", **region)
    if isinstance(large, ChunkPlan):
        assert isinstance(small, ChunkPlan)
        assert small.bytes_after <= large.bytes_before * 0.75


@pytest.mark.parametrize(("accumulate", "frozen", "itemsize"), [
    ("float32", False, 4), ("parameter", False, 3), ("float32", True, 0),
])  # fmt: skip
def test_a_region_counts_the_accumulators_it_needs(
    accumulate: str, frozen: bool, itemsize: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "SMALL_SUM_BYTES", 0)
    module = SwiGLU(16, 64).bfloat16().requires_grad_(not frozen)
    x = torch.randn(1, 32, 16, dtype=torch.bfloat16, requires_grad=True)
    report = mst_fx.explain(module, {"mst.chunk_tokens": 8, "mst.accumulate": accumulate})(x)
    (region,) = report.regions
    assert region.status == "chunked"
    assert region.bytes_after == region.bytes_before * 8 // 32 + itemsize * 3 * 16 * 64


def test_shapes_alone_decide() -> None:
    """Every rank plans alike: no clock, device, environment or free memory can be asked with what is imported."""
    tree = ast.parse(inspect.getsource(plan_module))
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported == {"__future__", "dataclasses", "math"}


@given(tokens=st.integers(1, 2**16), size=st.integers(1, 2**16), **REGION)
def test_an_int_is_obeyed(tokens: int, size: int, **region: Any) -> None:
    plan = plan_chunks(tokens=tokens, chunk_tokens=size, **region)
    if tokens <= size:
        assert isinstance(plan, str)
    else:
        assert isinstance(plan, ChunkPlan)
        assert (plan.chunk_tokens, plan.num_chunks) == (size, len(chunk_bounds(tokens, size)))


def test_known_shapes() -> None:
    """Llama-3-8B's head and MLP on a GPU, in bf16; the reference works on a CPU. Short sequences stay whole."""
    gib = 2**30

    def head(tokens: int, itemsize: int) -> Any:
        sums = itemsize * 128256 * 4096
        return plan_chunks("loss", tokens, 2 * 2 * 128256, 16384, sums, "auto", "cuda", 2, itemsize > 2)

    def mlp(tokens: int) -> Any:
        return plan_chunks("mlp", tokens, 2 * 6 * 14336, 16384, 4 * 3 * 4096 * 14336, "auto", "cuda", 2, True)

    assert "not worthwhile" in head(8192, 4)  # the peak of both is two weights and a half
    assert [head(n, 4).chunk_tokens for n in (16384, 65536)] == [4096, 4096]
    assert [head(n, 2).chunk_tokens for n in (8192, 16384)] == [1366, 2048]  # six even chunks: 1.5 GB at their peak
    assert head(65536, 4).bytes_after < 4 * gib
    assert "not worthwhile" in mlp(8192)
    assert [mlp(n).chunk_tokens for n in (16384, 65536)] == [4096, 8192]
    for tokens in (256, 512):
        assert isinstance(plan_chunks("loss", tokens, 2 * 4 * 32000, 4096, 4 * 32000 * 512, "auto"), str)
        assert isinstance(plan_chunks("mlp", tokens, 2 * 16 * 1792, 4096, 4 * 3 * 512 * 1792, "auto"), str)
