"""What only a GPU can show: its products, kernels, random numbers and CUDA graphs; compiled by Inductor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import mst_fx
from mst_fx.bench.cell import gradient_error
from mst_fx.bench.systems import SYSTEMS
from mst_fx.bench.works import WORKS, SwiGLU
from mst_fx.measure import peak_over_start
from mst_fx.sums import Sum
from tests.harness import chunked, error, to_double

pytestmark = pytest.mark.gpu

SHAPES: dict[str, dict[str, Any]] = {
    "head": {"tokens": 3001, "hidden": 1024, "vocab": 16000},
    "mlp": {"tokens": 6001, "hidden": 1024, "intermediate": 3584},
    "llama": {"seq_len": 1501, "layers": 2, "hidden": 512, "intermediate": 1792, "vocab": 8000},
}


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    before = torch.get_default_device()
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_as_near_to_fp64_as_inductors(
    name: str, dtype: torch.dtype, record_property: Callable[[str, Any], None]
) -> None:
    work = WORKS[name](**SHAPES[name], dtype=dtype, device="cuda")
    if dtype is torch.float16:  # the gradients of a mean over thousands of tokens are too small for fp16
        loss = work.loss
        work.loss = lambda o: loss(o) * (1 if name == "mlp" else 4096)
    plain, ours, narrow = (
        gradient_error(work, SYSTEMS[system](work, {"chunk_tokens": 512} if system != "inductor" else {}))
        for system in ("inductor", "mst", "mst parameter")
    )
    assert sum(len(r.chunked) for r in mst_fx.reports()) == 2 * (3 if name == "llama" else 1)

    record_property("error of Inductor, ours, in the parameter's dtype", (plain, ours, narrow))
    assert ours <= 1.02 * plain + (1e-6 if dtype is torch.float32 else 0)
    assert narrow <= 2 * plain + (1e-6 if dtype is torch.float32 else 0)  # every chunk's sum is rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("accumulate", ["float32", "parameter"])
@pytest.mark.parametrize(("rows", "columns"), [(1536, 512), (1531, 517)])
def test_sums_of_products(dtype: torch.dtype, accumulate: str, rows: int, columns: int) -> None:
    total = Sum(dtype, accumulate, (rows, columns), torch.device("cuda"))
    truth = torch.zeros(rows, columns, dtype=torch.float64)
    for _ in range(16):
        a, b = torch.randn(300, rows).to(dtype), torch.randn(300, columns).to(dtype)
        total.add_product(a.t(), b)
        truth += a.double().t() @ b.double()
    found = total.result()
    assert found is not None
    wide = torch.promote_types(dtype, torch.float32)
    assert found.dtype == (wide if accumulate == "float32" else dtype)
    assert error(found, truth) <= {2: 1e-5 if accumulate == "float32" else 8e-3, 4: 1e-3, 8: 1e-12}[dtype.itemsize]


def test_sums_of_bf16_parts_are_those_of_fp32() -> None:
    """The gradient of a weight summed in fp32 is that of one product over all tokens, rounded once."""
    total, whole = Sum(torch.bfloat16, "float32", (2048, 1024), torch.device("cuda")), []
    for _ in range(32):
        a, b = torch.randn(512, 2048, dtype=torch.bfloat16), torch.randn(512, 1024, dtype=torch.bfloat16)
        total.add_product(a.t(), b)
        whole.append((a, b))
    a, b = (torch.cat(parts) for parts in zip(*whole, strict=True))
    found, truth = total.result(), a.double().t() @ b.double()
    assert found is not None
    assert error(found.bfloat16(), truth) <= 1.02 * error(a.t() @ b, truth)


class Model(nn.Module):
    """Embedding, two blocks with dropout inside and around, a head, a loss."""

    def __init__(self, dropout: float = 0.0, checkpointed: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(4000, 512)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Dropout(dropout), nn.Linear(2048, 512)) for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(512), nn.Linear(512, 4000, bias=False)
        self.checkpointed = checkpointed

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x))
        logits = self.head(self.norm(x)).flatten(0, 1)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.flatten())


def inputs(length: int = 1024) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 4000, (2, length))
    return {"ids": ids, "labels": ids}


def gradients(
    model: nn.Module, fn: Callable[..., Any], given: dict[str, Any], seed: int = 7
) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    loss = fn(**given)
    loss.backward()
    return {"loss": loss.detach().clone(), **{n: p.grad.clone() for n, p in model.named_parameters()}}


OPTIONS = {"mst.chunk_tokens": 256}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_dropout_draws_the_same_numbers_in_the_backward(checkpointed: bool) -> None:
    """With masks as drawn, the loss is differentiable: its change along the gradient is the gradient's."""
    model, given = Model(0.3, checkpointed).double(), inputs()
    fn = torch.compile(model, backend="mst", options=OPTIONS)
    found = gradients(model, fn, given)
    assert chunked(mst_fx.reports()[-1], "mlp") == 2, str(mst_fx.reports()[-1])
    again = gradients(model, fn, given)
    torch.testing.assert_close(again, found)
    assert not torch.equal(gradients(model, fn, given, seed=8)["loss"], found["loss"])
    for name in ("embed.weight", "blocks.0.0.weight", "blocks.1.3.weight"):
        parameter, along = model.get_parameter(name), found[name]
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(along, alpha=sign * 1e-4 / along.norm().item())
                torch.manual_seed(7)
                losses.append(fn(**given).item())
                parameter.add_(along, alpha=-sign * 1e-4 / along.norm().item())
        assert (losses[0] - losses[1]) / 2e-4 == pytest.approx(along.norm().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_loss_scaling(dtype: torch.dtype) -> None:
    model, given = Model(), inputs()
    wide, _ = to_double(model, {})
    truth = gradients(wide, wide, given)
    found = []
    for backend in ("inductor", "mst"):
        fn = torch.compile(model, backend=backend, options=OPTIONS if backend == "mst" else None)
        scaler = torch.amp.GradScaler("cuda", init_scale=4096.0)
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype):
            loss = fn(**given)
        scaler.scale(loss).backward()
        grads = {n: p.grad / 4096 for n, p in model.named_parameters()}
        found.append([(grads[n].double() - truth[n]).norm() / truth[n].norm() for n in grads])
    assert chunked(mst_fx.reports()[-1], "mlp") == 2
    for plain, ours in zip(*found, strict=True):
        assert ours <= 1.1 * plain + 1e-4


@pytest.mark.parametrize("options", [{"triton.cudagraphs": True}, {}], ids=["CUDA graphs", "none"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_steps_follow_the_plain_ones(options: dict[str, Any], dynamic: bool) -> None:
    """Several steps of AdamW over several lengths, with and without CUDA graphs around the loops."""
    found = []
    for backend in ("eager", "mst"):
        torch.manual_seed(3)
        model = Model()
        given = options | OPTIONS if backend == "mst" else None
        fn = torch.compile(model, backend=backend, options=given, dynamic=dynamic)
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
        for step in range(9):
            torch.manual_seed(10 + step)
            loss = fn(**inputs((1024, 1024, 1280)[step % 3]))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        found.append(losses)
    assert sum(len(r.chunked) for r in mst_fx.reports()) >= 3
    assert found[1] == pytest.approx(found[0], rel=2e-4)


@pytest.mark.parametrize(("name", "most"), [("head", 0.35), ("mlp", 0.6)])
def test_peak_is_below_inductors(name: str, most: float, record_property: Callable[[str, Any], None]) -> None:
    peaks = []
    for system in ("inductor", "mst"):
        work = WORKS[name](**{**SHAPES[name], "tokens": 16384}, dtype=torch.bfloat16, device="cuda")
        fn = SYSTEMS[system](work, {"chunk_tokens": 1024} if system == "mst" else {})
        work.step(fn)
        work.clear()
        peaks.append(peak_over_start(lambda work=work, fn=fn: work.step(fn), "cuda")[0])

    record_property("peak of Inductor, ours", peaks)
    assert peaks[1] <= most * peaks[0]


def test_memory_that_runs_out_in_a_chunk_is_torchs_error() -> None:
    """And the next step is right again."""
    block = SwiGLU(512, 2048).cuda()
    x = torch.randn(1, 4096, 512, requires_grad=True)
    fn = torch.compile(block, backend="mst", options=OPTIONS)
    fn(x).sum().backward()
    before, x.grad = x.grad, None
    torch.cuda.empty_cache()
    share = torch.cuda.memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            fn(x).sum().backward()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    x.grad = None
    fn(x).sum().backward()
    torch.testing.assert_close(x.grad, before)
