"""What people read: diffs and tables as golden files. ``EXPECTTEST_ACCEPT=1`` writes them anew."""

import os
import pathlib
import re
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mst_fx
from mst_fx import cli
from mst_fx.diff.graph_diff import fold_paths, hunks
from mst_fx.diff.render import short_source
from tests.harness import slow_but
from tests.models import LARGE, NEAR_MISSES, LanguageModel, NanoBlock, SwiGLU, hf, hf_inputs, token_inputs

GOLDEN = pathlib.Path(__file__).parent / "golden"
OPTIONS = {"mst.chunk_tokens": 8}


def check_golden(name: str, text: str) -> None:
    """Compare with a golden file; body names and line numbers of libraries may change."""
    text = re.sub(r"\bbody([ =])[0-9a-f]{8}", r"body\1BODY", text)
    text = re.sub(r"(transformers/\S+\.py|torch/\S+\.py):\d+", r"\1:N", text)
    text = re.sub(r"(tests/\S+\.py):\d+", r"\1:N", text)
    text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(text)
    same = text == path.read_text()
    if not same and torch.__version__ < "2.13":
        pytest.skip("golden files are of torch 2.13; an older one saves other values, so estimates differ by a KiB")
    assert text == path.read_text(), f"{path} differs; EXPECTTEST_ACCEPT=1 accepts"


def explain(model: nn.Module, inputs: dict) -> mst_fx.Report:
    torch.manual_seed(0)
    return mst_fx.explain(model, OPTIONS)(**inputs)


@pytest.mark.parametrize("name", slow_but(["llama"], ["llama", "gemma2", "gpt2"]))
def test_transformers_model(name: str) -> None:
    check_golden(name, explain(hf(name), hf_inputs(name)).diff())


@pytest.mark.slow
def test_32_layers_with_fake_tensors(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    page = tmp_path / "page.html"
    sizes = [f"--set={k}={v}" for k, v in {**LARGE, "num_hidden_layers": 32}.items()]
    began = time.perf_counter()
    given = ["--hf=llama", "--fake", "--dtype=bfloat16", "--seq-len=65536", f"--html={page}", *sizes]
    assert cli.main(["diff", *given]) == 0
    assert time.perf_counter() - began < 60
    assert page.stat().st_size < 5_000_000
    check_golden("llama-32-layers", capsys.readouterr().out)


def test_checkpointed_layers_are_folded_too() -> None:
    model = hf("llama")
    model.gradient_checkpointing_enable()
    plain, nested = explain(hf("llama"), hf_inputs("llama")), explain(model, hf_inputs("llama"))
    assert {h.places: len(h.regions) for h in hunks(nested)} == {h.places: len(h.regions) for h in hunks(plain)}
    assert [r.graph for r in nested.chunked] == ["wrap_body_0", "wrap_body_1", ""]


def test_nanogpt_with_backward() -> None:
    model = LanguageModel(NanoBlock(), NanoBlock())
    check_golden("nanogpt", explain(model, token_inputs()).diff(backward=True))


def test_nothing_to_chunk() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    check_golden("nothing", mst_fx.explain(model, OPTIONS)(torch.randn(32, 8)).diff())


@pytest.mark.slow
def test_loss_outside_the_compiled_function() -> None:
    inputs = {"input_ids": hf_inputs("llama")["input_ids"]}
    check_golden("loss-outside", explain(hf("llama"), inputs).diff())


def test_near_misses() -> None:
    texts = []
    for name, (build, _) in NEAR_MISSES.items():
        report = explain(LanguageModel(build()), token_inputs())
        reasons = [short_source(f"{r.source}: {r.reason}") for r in report.regions if r.kind == "mlp"]
        texts += [f"{name}:", *(f"    {line}" for line in dict.fromkeys(reasons))]
    check_golden("near-misses", "\n".join(texts))


def test_an_untouched_region_makes_no_noise() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = SwiGLU(), nn.Sequential(nn.Linear(16, 16), nn.Tanh())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(torch.sin(x)))

    (hunk,) = hunks(mst_fx.explain(Two(), OPTIONS)(torch.randn(2, 23, 16)))
    text = "\n".join(line.text for line in (*hunk.removed, *hunk.added))
    assert "tanh" not in text
    assert "sin" not in re.findall(r"^(\w+):", text, re.M)
    assert [r.path for r in hunk.regions] == ["first"]


def test_two_graphs_are_both_shown() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.head = SwiGLU(), nn.Linear(16, 61)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            x = self.mlp(x)
            torch._dynamo.graph_break()
            return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())

    report = mst_fx.explain(Broken(), OPTIONS)(torch.randn(2, 23, 16), torch.randint(0, 61, (2, 23)))
    assert [(h.regions[0].kind, h.regions[0].number) for h in hunks(report)] == [("mlp", 0), ("loss", 1)]


def test_paths_are_folded() -> None:
    assert fold_paths(["a.0.m", "a.1.m", "a.3.m", "head", ""]) == "a.{0-1,3}.m, head"
    assert fold_paths(["a.7.m"]) == "a.7.m"
    assert fold_paths(["3"]) == "3"


def test_what_is_spelled_out_of_place_is_no_change() -> None:
    class Masked(LanguageModel):
        def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            scale = torch.ones(16)
            scale[3:7] = 0.5
            scale.mul_(2.0)
            x = self.embed(ids) * scale
            for block in self.blocks:
                x = x + block(x)
            return F.cross_entropy(self.head(x).flatten(0, -2), labels.flatten())

    report = mst_fx.explain(Masked(SwiGLU()), OPTIONS)(**token_inputs())
    assert len(report.chunked) == 2
    assert all(hunk.regions for hunk in hunks(report))
