"""``mst-fx bench`` of a model of the user's own."""

import argparse
import re
from typing import Any

import pytest
import torch

import mst_fx
from mst_fx.bench.command import add_arguments, read_question
from mst_fx.bench.questions import Question, plan
from mst_fx.bench.systems import SYSTEMS
from mst_fx.bench.works import WORKS
from mst_fx.commands.models import UsageError

TINY_QWEN = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 96, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 128}  # fmt: skip


def two_outputs() -> Any:
    """A model of the user's: no scalar among its outputs, inputs as a tuple."""
    module = torch.nn.Linear(8, 32)
    return module, (torch.randn(3, 5, 8, requires_grad=True),)


def nothing_trained() -> Any:
    return torch.nn.Linear(8, 32).requires_grad_(False), (torch.randn(3, 8),)


def test_a_model_of_the_users_own_is_a_work() -> None:
    work = WORKS["own"](hf="qwen3", settings=TINY_QWEN, seq_len=24, dtype=torch.float32, device="cpu")
    assert work.tokens == 24
    fn = SYSTEMS["mst"](work, {"chunk_tokens": 8, "compiler": "aot_eager"})
    loss = work.step(fn)
    mine = {n: g.clone() for n, g in work.gradients().items()}
    work.clear()
    torch.testing.assert_close(work.step(work.module), loss)
    assert mine.keys() == work.gradients().keys()
    assert all(torch.allclose(mine[n], g, atol=1e-6) for n, g in work.gradients().items())
    assert mst_fx.reports()[-1].chunked
    work = WORKS["own"](entry="tests.test_bench_own:two_outputs", dtype=None, device="cpu")
    assert work.tokens == 15
    work.step(work.module)
    assert work.args[0].grad is not None
    work.clear()
    assert work.args[0].grad is None
    work = WORKS["own"](entry="tests.test_bench_own:nothing_trained", dtype=None, device="cpu")
    with pytest.raises(UsageError, match="nothing in the model's output needs a gradient"):
        work.step(work.module)


def own(question: str, *args: str) -> Question:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read_question(parser.parse_args([question, "--device", "cpu", *args]))


def test_cells_of_a_model_of_the_users_own() -> None:
    tiny = [a for k, v in TINY_QWEN.items() for a in ("--set", f"{k}={v}")]
    cells = plan(own("model", "--hf", "qwen3", "--seq-len", "64", *tiny, "--systems", "inductor,mst"))
    assert [(c.system, c.shapes.get("checkpointing")) for c in cells] == [
        ("inductor", None), ("mst", None), ("inductor", True), ("mst", True)
    ]  # fmt: skip
    assert cells[0].shapes["settings"] == TINY_QWEN
    cells = plan(own("length", "--hf", "qwen3", "--lengths", "64,128", *tiny))
    assert [c.shapes["seq_len"] for c in cells] == [64] * 4 + [128] * 4
    cells = plan(own("compile", "--entry", "tests.test_bench_own:two_outputs"))
    assert [(c.system, c.shapes) for c in cells[::2]] == [
        (s, {"entry": "tests.test_bench_own:two_outputs"}) for s in ("inductor", "mst")
    ]
    with pytest.raises(UsageError, match=r"12 billion parameters .* too much for a CPU"):
        plan(own("model", "--hf", "mistral", "--set", "hidden_size=6144"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("head --hf qwen3", "--hf goes with model, length and compile"),
        ("length --entry a:b", "--entry goes with model and compile"),
        ("model --entry a:b --set x=1", "--set goes with --hf"),
        ("model --seq-len 64", "--seq-len goes with --hf"),
        ("model --hf qwen3 --batch 0", "--batch 0: at least 1"),
        ("model --hf qwen33", "unknown model type 'qwen33'. Did you mean 'qwen3'"),
        ("model --hf qwen3 --set hidden=8", "no config value 'hidden'"),
    ],
)
def test_mistakes_about_a_model_of_the_users_own(given: str, told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        plan(own(*given.split()))
