"""Autocast states and loss scaling."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mst_fx
from mst_fx.bench.cell import gradient_error
from mst_fx.bench.systems import SYSTEMS
from mst_fx.bench.works import WORKS
from mst_fx.inductor import cpu_multiplies
from tests.harness import DEVICE, EAGER, check_exact, chunked
from tests.models import LanguageModel, SwiGLU, token_inputs

OPTIONS = {"mst.chunk_tokens": 8, **EAGER}
AUTOCAST: dict[str, Callable[[], Any]] = {
    "off": contextlib.nullcontext,
    "bf16": lambda: torch.autocast(DEVICE, torch.bfloat16),
    "fp16": lambda: torch.autocast(DEVICE, torch.float16),
    "disabled": lambda: torch.autocast(DEVICE, enabled=False),
}


def dtypes_of(report: mst_fx.Report) -> str:
    return "\n".join(b.forward for b in report.bodies)


@pytest.mark.parametrize(
    "order", [("bf16", "off", "bf16"), ("fp16", "bf16", "fp16"), ("fp16", "disabled", "fp16")], ids=str
)
def test_another_autocast_state_is_another_graph(order: tuple[str, ...]) -> None:
    """What was compiled under one state is not used under another."""
    model, inputs = LanguageModel(SwiGLU()), token_inputs()
    fn = torch.compile(model, backend="mst", options=OPTIONS)
    for state in order:
        model.zero_grad(set_to_none=True)
        with AUTOCAST[state]():
            expected = model(**inputs)
        expected.backward()
        grads = [p.grad for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        with AUTOCAST[state]():
            loss = fn(**inputs)
        loss.backward()
        slack = {"off": 1e-6, "disabled": 1e-6}.get(state, 1e-2)
        torch.testing.assert_close(loss, expected, rtol=slack, atol=slack)
        torch.testing.assert_close([p.grad for p in model.parameters()], grads, rtol=slack, atol=slack)
    assert all(len(r.chunked) == 2 for r in mst_fx.reports())
    assert len(mst_fx.reports()) == 2


class Inside(LanguageModel):
    """Autocast entered in the forward, around the block, the head, or both; maybe off again around a part."""

    def __init__(self, block: str, head: str) -> None:
        super().__init__(SwiGLU())
        self.states = block, head

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        with AUTOCAST[self.states[0]]():
            x = x + self.blocks[0](x)
        with AUTOCAST[self.states[1]]():
            logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, -2), labels.reshape(-1))


@pytest.mark.parametrize("ambient", ["off", "bf16", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("inside", [("fp16", "off"), ("disabled", "bf16"), ("off", "disabled")], ids=str)
def test_autocast_inside_and_around(ambient: str, inside: tuple[str, str]) -> None:
    torch.manual_seed(2)
    model, inputs = Inside(*inside), token_inputs()
    found = []
    for fn in (model, torch.compile(model, backend="mst", options=OPTIONS)):
        model.zero_grad(set_to_none=True)
        with AUTOCAST[ambient]():
            loss = fn(**inputs)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert len(mst_fx.reports()[-1].chunked) == 2, str(mst_fx.reports()[-1])
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-3)
    if ambient == "off" and "bf16" not in inside and "fp16" not in inside:
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_region_under_a_disabled_part_is_full_precision() -> None:
    model, inputs = Inside("disabled", "disabled"), token_inputs()
    with torch.autocast(DEVICE, torch.bfloat16):
        torch.compile(model, backend="mst", options=OPTIONS)(**inputs)
    assert len(mst_fx.reports()[-1].chunked) == 2
    assert "bfloat16" not in dtypes_of(mst_fx.reports()[-1])


@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("size", [1.0, 3e-6])
def test_fp16_with_a_scaled_loss_underflows_no_more_than_the_plain_model(how: str, size: float) -> None:
    """Small gradients survive in fp16 because the loss is scaled; ours must see the scale as early as plain ones."""
    torch.manual_seed(4)
    model, inputs = LanguageModel(SwiGLU()), token_inputs()
    with torch.no_grad():
        model.norm.weight.mul_(size)
    truth = LanguageModel(SwiGLU()).double()
    truth.load_state_dict(model.state_dict())
    truth(**inputs).backward()
    if how == "weights":
        model.half()
    found = []
    for fn in (model, torch.compile(model, backend="mst", options=OPTIONS)):
        model.zero_grad(set_to_none=True)
        with AUTOCAST["fp16" if how == "autocast" else "off"]():
            loss = fn(**inputs)
        (loss.float() * 65536 / 16).backward()
        found.append([p.grad.double() / (65536 / 16) for p in model.parameters()])
    assert len(mst_fx.reports()[-1].chunked) == 2
    for plain, ours, p in zip(*found, truth.parameters(), strict=True):
        assert (ours - p.grad).norm() <= 1.1 * (plain - p.grad).norm() + 2e-3 * p.grad.norm()


def test_overflowing_steps_are_skipped_alike() -> None:
    torch.manual_seed(5)
    start, batches = LanguageModel(SwiGLU()).state_dict(), [token_inputs() for _ in range(6)]
    found = []
    for compile_it in (False, True):
        model = LanguageModel(SwiGLU())
        model.load_state_dict(start)
        fn = torch.compile(model, backend="mst", options=OPTIONS) if compile_it else model
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**24, growth_interval=2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scales = []
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(DEVICE, torch.float16):
                loss = fn(**batch)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        found.append((scales, model))
    assert found[0][0] == found[1][0]
    assert len(set(found[0][0])) > 1, "the scale never changed: nothing overflowed"
    for plain, ours in zip(found[0][1].parameters(), found[1][1].parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("accumulate", ["float32", "parameter"])
def test_sums_over_many_chunks_in_low_precision(accumulate: str) -> None:
    model, inputs = LanguageModel(SwiGLU()).bfloat16(), token_inputs(4, 64)
    options = {"mst.chunk_tokens": 4, "mst.accumulate": accumulate}
    ours = check_exact(model, inputs, options=options, slack=4e-3 if accumulate == "float32" else 3e-2)
    assert chunked(ours.report, "mlp") == 1


@pytest.mark.parametrize("accumulate", ["float32", "parameter"])
def test_gradients_of_a_mean_are_rounded_once(accumulate: str) -> None:
    """Formed in the forward and divided by a count that is no power of two only then, they were rounded twice."""
    work = WORKS["head"](tokens=1501, hidden=64, vocab=2000, dtype=torch.bfloat16, device="cpu")
    options = {"chunk_tokens": 256, "accumulate": accumulate, "loss_gradient": "forward", "compiler": "aot_eager"}
    ours = gradient_error(work, SYSTEMS["mst"](work, options))
    # No product of a CPU's bf16 instructions adds into fp32, so that each chunk's is rounded: by a third it was without
    # the split of the count that `ops` tells of. Where there are none, products are exact.
    rounded = DEVICE == "cpu" and cpu_multiplies(torch.bfloat16)
    assert ours <= (1.2 if rounded else 1.02) * gradient_error(work, work.module)
    assert "gradients formed in the forward" in mst_fx.reports()[-1].chunked[0].reason


def test_an_island_without_autocast_is_compiled_without_it() -> None:
    """Inductor traces a body once more, when the autocast around the function is on; what it made stays in use."""
    mlp = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 16))
    head, x, labels = nn.Linear(16, 96), torch.randn(46, 16), torch.randint(0, 96, (46,))
    weights = [*mlp.parameters(), *head.parameters()]

    def fn(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.cross_entropy(head(x + mlp(x)), labels)

    expected = fn(x)
    truth = [expected.detach(), *torch.autograd.grad(expected, weights)]
    compiled = torch.compile(fn, backend="mst", options={"mst.chunk_tokens": 16})
    for on in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = compiled(x)
        assert len(mst_fx.reports()[-1].chunked) == 2
        torch.testing.assert_close([loss.detach(), *torch.autograd.grad(loss, weights)], truth, rtol=1e-5, atol=1e-7)
