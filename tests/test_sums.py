"""Sums of weight gradients over chunks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mst_fx import extended, sums
from mst_fx.sums import Sum, sum_dtype, sum_itemsize

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks and pieces, and no sum small enough for fp32."""
    monkeypatch.setattr(sums, "PRODUCT_BLOCK_BYTES", 4 * 24 * 5)
    monkeypatch.setattr(extended, "PIECE", 7)
    monkeypatch.setattr(sums, "SMALL_SUM_BYTES", 0)


def added(kind: str, chunks: int, dtype: torch.dtype, accumulate: str, scale: float = 1.0) -> tuple[float, float]:
    """Return the errors of our sum and of the unchunked product, rounded once, against fp64."""
    generator = torch.Generator().manual_seed(chunks)
    a = (torch.randn(17, 8 * chunks, generator=generator, dtype=torch.float64) + 0.5).mul(scale).to(dtype)
    b = torch.randn(8 * chunks, 24, generator=generator, dtype=torch.float64).to(dtype)
    truth = a.double() @ b.double()
    total = Sum(dtype, accumulate, truth.shape, CPU)
    for x, y in zip(a.split(8, 1), b.split(8), strict=True):
        total.add_product(x, y) if kind == "products" else total.add((x.double() @ y.double()).to(dtype))
    found = total.result()
    assert found is not None
    assert found.dtype == sum_dtype(dtype, accumulate, truth.shape)
    return ((v.double() - truth).norm() / truth.norm() for v in (found.to(dtype), truth.to(dtype)))  # type: ignore[return-value]


@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize("kind", ["products", "parts"])
@pytest.mark.parametrize("chunks", [1, 2, 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("accumulate", ["float32", "parameter"])
def test_a_sum_is_as_near_as_one_rounding(
    accumulate: str, dtype: torch.dtype, chunks: int, kind: str, multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if accumulate == "parameter" and dtype is torch.float16 and chunks > 2:
        pytest.skip("fp16 is summed in fp16: rounded at every chunk")
    monkeypatch.setattr(sums, "cpu_multiplies", lambda dtype: multiplies or dtype.itemsize > 2)
    ours, once = added(kind, chunks, dtype, accumulate)
    assert ours <= 1.5 * once + 32 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def test_a_sum_in_bf16_alone_would_be_worse() -> None:
    """What the eight bits are for: the same sum rounded to bf16 at every chunk."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.rand(1000, generator=generator).bfloat16() for _ in range(300)]
    truth = sum(p.double() for p in parts)
    total, plain = Sum(torch.bfloat16, "parameter", (1000,), CPU), torch.zeros(1000, dtype=torch.bfloat16)
    for part in parts:
        total.add(part)
        plain.add_(part)
    found = total.result()
    assert found is not None
    ours, theirs, once = ((v.double() - truth).norm() for v in (found, plain, truth.bfloat16()))  # type: ignore[union-attr]
    assert ours <= 1.01 * once
    assert theirs > 5 * once


@given(st.lists(st.floats(width=32), min_size=1, max_size=6))
def test_numbers_that_are_none(values: list[float]) -> None:
    """Infinities, NaN, the largest and the smallest numbers end as they would in fp32."""
    parts = [torch.tensor([v]).bfloat16() for v in values]
    total, wide = Sum(torch.bfloat16, "parameter", (1,), CPU), torch.zeros(1)
    for part in parts:
        total.add(part)
        wide += part
    found, expected = total.result(), wide.bfloat16()
    assert found is not None
    scale = sum(p.abs().float() for p in parts)
    if scale.isfinite() and float(scale) < 3e38:  # type: ignore[union-attr]
        assert (found.float() - expected.float()).abs() <= 2**-8 * expected.abs() + 2**-14 * scale + 1e-37
    elif not scale.isfinite():  # type: ignore[union-attr]
        assert torch.equal(found.isnan(), expected.isnan())
        assert found.isfinite() == expected.isfinite()


def test_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (1024, 1024)
    assert sum_dtype(torch.bfloat16, "float32", shape) is torch.float32
    assert sum_dtype(torch.float64, "float32", shape) is torch.float64
    assert [sum_itemsize(d, "parameter", shape, CPU) for d in DTYPES] == [8, 4, 3, 2]
    assert sum_itemsize(torch.bfloat16, "parameter", shape, torch.device("cuda")) == 2
    monkeypatch.undo()
    assert sum_itemsize(torch.bfloat16, "parameter", (1024,), CPU) == 4  # a norm's weight
    assert Sum(torch.bfloat16, "parameter", shape, CPU).result() is None
