"""Estimates of live bytes: small cases counted by hand, and a measured one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mst_fx
from mst_fx.measure import MALLOC_ENV
from tests.harness import DEVICE, EAGER
from tests.models import LanguageModel, SwiGLU, token_inputs

T, H = 64, 32
ROW = 4 * H
OPTIONS = {"mst.chunk_tokens": 8, **EAGER}


class Chain(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(H, H, bias=False), nn.Linear(H, H, bias=False)
        self.checkpointed = checkpointed

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return self.two((self.one(x) * 2).sin().exp())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        assert out is not None
        return out


def test_pointwise_chain_is_inlined() -> None:
    ((plain, after),) = mst_fx.explain(Chain(), EAGER)(torch.randn(T, H)).timelines()
    assert after is plain
    forward = [m for m in plain.moments if m.phase == "forward"]
    assert [m.name for m in forward] == ["mm", "exp", "mm_1"]
    # Saved: the product, and what goes into the second one; `* 2` and `sin` take no memory.
    assert [m.live_bytes for m in forward] == [T * ROW, 2 * T * ROW, 3 * T * ROW]
    assert plain.saved_bytes == 2 * T * ROW
    assert [(k.text, k.path, k.bytes) for k in plain.saved] == [
        (f"float32[{T}, {H}] mm", "one", T * ROW),
        (f"float32[{T}, {H}] exp", "", T * ROW),
    ]
    # The output's gradient, the two saved values and the second weight's gradient; then the gradient of exp joins.
    backward = [m for m in plain.moments if m.phase == "backward"]
    assert backward[0].live_bytes == 3 * T * ROW + H * ROW
    assert plain.peak is not None
    assert plain.peak.live_bytes == plain.peak_bytes == 4 * T * ROW + H * ROW
    assert backward[-1].live_bytes >= 2 * H * ROW
    assert forward[0].source.split("/")[-1].startswith("test_liveness.py:")
    assert forward[0].path == "one"
    assert (plain.largest_bytes, plain.largest) == (T * ROW, f"float32[{T}, {H}] mm")


def test_checkpoint_saves_nothing() -> None:
    ((plain, _),) = mst_fx.explain(Chain(True), EAGER)(torch.randn(T, H)).timelines()
    assert plain.saved_bytes == 0
    assert [m.name for m in plain.moments if m.phase == "backward"][:2] == ["mm", "exp"]


def test_no_grad_has_no_backward() -> None:
    with torch.no_grad():
        report = mst_fx.explain(Chain(), EAGER)(torch.randn(T, H))
    ((plain, _),) = report.timelines()
    assert {m.phase for m in plain.moments} == {"forward"}
    # exp writes over the product, which dies there.
    assert [m.live_bytes for m in plain.moments] == [T * ROW, T * ROW, 2 * T * ROW]
    assert plain.saved_bytes == 0


def test_autocast_around_the_function() -> None:
    with torch.autocast(DEVICE, torch.bfloat16):
        report = mst_fx.explain(Chain(), EAGER)(torch.randn(T, H))
    assert "bfloat16" in " ".join(m.text for m in report.timelines()[0][0].moments)


def test_chunking_lowers_the_peak_and_is_computed_once() -> None:
    report = mst_fx.explain(LanguageModel(SwiGLU()), OPTIONS)(**token_inputs())
    ((before, after),) = report.timelines()
    assert after.peak_bytes < before.peak_bytes
    assert after.saved_bytes < before.saved_bytes
    assert any("mst_fx.map_backward" in m.text for m in after.moments)
    assert report.timelines() is report.timelines()


MEASURE = """
import json, sys, torch, mst_fx
from mst_fx.bench.works import llama
from mst_fx.measure import peak_over_start
options = {"mst.chunk_tokens": 512}
checkpointing = sys.argv[1] == "True"
work = llama(seq_len=2048, layers=2, vocab=16000, checkpointing=checkpointing, dtype=torch.float32, device="cpu")
before, after = mst_fx.explain(work.module, options)(**work.inputs).timelines()[0]
fn = torch.compile(work.module, **({"backend": "mst", "options": options} if sys.argv[2] == "True" else {}))
for _ in range(2):
    work.step(fn)
    work.clear()
estimate = after if sys.argv[2] == "True" else before
print(json.dumps([estimate.peak_bytes, peak_over_start(lambda: work.step(fn), "cpu")[0]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_estimate_is_near_the_measured_peak(checkpointing: bool, chunked: bool) -> None:
    pytest.importorskip("transformers")
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(checkpointing), str(chunked)]
    run = subprocess.run(command, env={**os.environ, **MALLOC_ENV}, capture_output=True, text=True, check=True)
    estimate, measured = json.loads(run.stdout.splitlines()[-1])
    assert abs(estimate - measured) <= 0.15 * measured
