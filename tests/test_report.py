"""What the backend says about itself."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mst_fx
from mst_fx.regions import chunking
from tests.harness import EAGER, reasons
from tests.models import LanguageModel, SwiGLU, V, hf, hf_inputs, token_inputs

OPTIONS = {"mst.chunk_tokens": 8, **EAGER}


def test_explain_describes_every_region() -> None:
    report = mst_fx.explain(LanguageModel(SwiGLU()), OPTIONS)(**token_inputs())
    assert [r.kind for r in report.chunked] == ["loss", "mlp"]
    mlp = report.chunked[1]
    assert mlp.source.split("/")[-1].startswith("models.py:")
    assert (mlp.tokens, mlp.chunk_tokens, mlp.num_chunks) == (46, 8, 6)
    assert mlp.bytes_after < mlp.bytes_before
    assert mst_fx.reports() == []


def test_explain_of_a_model_that_is_compiled_already() -> None:
    """In place or not, it is traced anew, and stays compiled."""
    model, inputs = LanguageModel(SwiGLU()), token_inputs()
    model.compile(backend="mst", options=OPTIONS)
    assert len(mst_fx.explain(model, OPTIONS)(**inputs).chunked) == 2
    assert len(mst_fx.explain(torch.compile(LanguageModel(SwiGLU()), backend="mst"), OPTIONS)(**inputs).chunked) == 2
    assert mst_fx.reports() == []
    model(**inputs)
    assert len(mst_fx.reports()) == 1
    empty = str(mst_fx.explain(lambda x: x.tolist())(torch.ones(2)))
    assert "Dynamo traced no graph" in empty
    assert "Dynamo left code to eager" in empty


def test_the_source_of_a_region_is_the_users_under_a_default_device() -> None:
    """With one set, every call passes through a function of torch's."""
    before = torch.get_default_device()
    torch.set_default_device("cpu")
    try:
        report = mst_fx.explain(LanguageModel(SwiGLU()), OPTIONS)(**token_inputs())
    finally:
        torch.set_default_device(before)
    assert [r.source.split("/")[-1].partition(":")[0] for r in report.chunked] == ["models.py", "models.py"]


def test_text_diff_dict_and_page(tmp_path: pathlib.Path) -> None:
    report = mst_fx.explain(LanguageModel(SwiGLU()), OPTIONS)(**token_inputs())
    diff = report.diff()
    assert re.search(r"(?m)^\+ map_default: .* = mst_fx\.map\(", diff)
    assert "- linear: float32[2, 23, 48] = linear(" in diff
    assert "= silu(" in diff.partition("forward of body")[2]
    data = json.loads(json.dumps(report.to_dict()))
    assert len(data["regions"]) == 2
    report.to_html(tmp_path / "r.html")
    assert "2 of 2 regions chunked" in (tmp_path / "r.html").read_text()


def test_reports_lists_compilations_in_order() -> None:
    torch.compile(LanguageModel(SwiGLU()), backend="mst", options=OPTIONS)(**token_inputs())
    torch.compile(lambda x: x + 1, backend="mst", options=EAGER)(torch.ones(2))
    first, second = mst_fx.reports()
    assert len(first.chunked) == 2
    assert second.regions == ()
    assert "no wide token-wise region" in str(second)


def test_loss_outside_the_compiled_function_is_named() -> None:
    model, inputs = hf("llama"), hf_inputs("llama")
    report = mst_fx.explain(model, OPTIONS)(input_ids=inputs["input_ids"])
    assert "compute the loss inside the compiled function" in reasons(report)


def test_graph_break_between_head_and_loss_is_named() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, V)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            logits = self.head(x)
            torch._dynamo.graph_break()
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    report = mst_fx.explain(Broken(), OPTIONS)(torch.randn(2, 23, 16), torch.randint(0, V, (2, 23)))
    assert report.num_graphs == 2
    assert "graph break" in reasons(report)
    first = Broken.forward.__code__.co_firstlineno
    (where,) = re.findall(r"a graph break ends the graph of these logits at (\S+):(\d+): (.*)", str(report))
    assert where[0].endswith("test_report.py")
    assert int(where[1]) == first + 2
    assert "graph_break" in where[2]
    assert "spell that line so that Dynamo can trace it" in str(report)
    assert "pass labels to the model" not in str(report)
    assert "Compile one function that holds both" in str(report)


class Printing(nn.Module):
    """Breaks the graph between two regions."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.head = SwiGLU(), nn.Linear(16, V)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = x + self.mlp(x)
        torch._dynamo.graph_break()
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def test_a_graph_break_between_chunked_regions_is_noted() -> None:
    report = mst_fx.explain(Printing(), OPTIONS)(torch.randn(2, 23, 16), torch.randint(0, V, (2, 23)))
    assert len(report.chunked) == 2
    (note,) = report.notes
    line = Printing.forward.__code__.co_firstlineno + 2
    assert f"test_report.py:{line}: Call to `torch._dynamo.graph_break()`" in note


def test_what_another_function_was_left_to_eager_for_is_not_noted() -> None:
    torch.compile(lambda x: torch._dynamo.graph_break() or x + 1, backend="eager")(torch.ones(2))
    report = mst_fx.explain(nn.Linear(4, 4))(torch.ones(2, 4))
    assert "graph_break" not in str(report)


def test_a_function_that_dynamo_does_not_trace_is_noted() -> None:
    report = mst_fx.explain(nn.LSTM(4, 4))(torch.ones(2, 3, 4))
    assert report.num_graphs == 0
    assert "LSTM" in str(report.notes)


@pytest.mark.slow
def test_nothing_is_chunked_under_the_cpp_wrapper() -> None:
    model, inputs = SwiGLU(), torch.randn(2, 23, 16)
    fn = torch.compile(model, backend="mst", options={"mst.chunk_tokens": 8, "cpp_wrapper": True})
    torch.testing.assert_close(fn(inputs), model(inputs))
    (report,) = mst_fx.reports()
    assert not report.chunked
    assert "cpp_wrapper" in str(report)


@pytest.mark.parametrize("dynamic", [False, True])
def test_attention_written_by_hand_is_named_so(dynamic: bool) -> None:
    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(16, 48) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (f(x).view(*x.shape[:2], 4, 12).transpose(1, 2) for f in (self.q, self.k, self.v))
            return ((q @ k.transpose(-1, -2) / 3).softmax(-1) @ v).square().mean()

    torch.compile(ByHand(), backend="mst", options=OPTIONS, dynamic=dynamic)(torch.randn(2, 24, 16))
    regions = mst_fx.reports()[-1].regions
    assert regions
    assert all(r.is_attention for r in regions), str(mst_fx.reports()[-1])


def test_a_product_of_two_inputs_is_no_attention() -> None:
    class Contrastive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            logits = F.normalize(self.a(x), dim=-1) @ F.normalize(self.b(y), dim=-1).t()
            return F.cross_entropy(logits, torch.arange(64))

    report = mst_fx.explain(Contrastive(), OPTIONS)(torch.randn(64, 8), torch.randn(64, 8))
    (region,) = report.regions
    assert not region.is_attention
    assert "multiplies two values of the tokens with each other" in region.reason
    assert region.bytes_before >= 64 * 64 * 4


def test_advice_on_logits_that_are_kept() -> None:
    model = hf("llama")
    report = mst_fx.explain(model, {**OPTIONS, "mst.logits": "keep"})(**hf_inputs("llama"))
    assert "returned logits are kept" in str(report)
    assert "mst.logits='lazy' (the default) does not hold the returned logits" in str(report)


def test_advice_on_weights_of_a_tensor_subclass() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = SwiGLU()
    for name in ("gate", "up", "down"):
        linear = getattr(model, name)
        linear.weight = nn.Parameter(TwoTensor(linear.weight.detach(), linear.weight.detach().clone()))
    report = mst_fx.explain(model, OPTIONS)(torch.randn(2, 23, 16))
    assert not report.chunked
    assert "subclass" in reasons(report)
    assert "chunking needs plain weights where the layer runs" in str(report)


def test_wide_activation_that_is_returned_is_named() -> None:
    class Returned(SwiGLU):
        def forward(self, x: torch.Tensor):
            gate, up = self.gate(x), self.up(x)
            return self.down(F.silu(gate) * up), gate, up

    report = mst_fx.explain(Returned(), OPTIONS)(torch.randn(2, 23, 16))
    assert not report.chunked
    assert "is returned" in reasons(report)


class PerToken(LanguageModel):
    """The whole sum is attempted, with the norm in front of the head and then without."""

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.norm(self.embed(ids))).flatten(0, 1)
        loss = F.cross_entropy(logits, labels.flatten(), reduction="none")
        return (loss.view(labels.shape).sum(1) * 2).mean()


@pytest.mark.parametrize("kind", [LanguageModel, PerToken])
def test_body_that_does_not_compile_is_left_as_it_was(monkeypatch, kind: type[LanguageModel]) -> None:
    def fail(*_):
        raise RuntimeError("no compiler today")

    monkeypatch.setattr(chunking, "compile_body", fail)
    monkeypatch.setattr(chunking, "BODIES", {})
    monkeypatch.setattr(chunking, "_warned", set())
    model, inputs = kind(SwiGLU()), token_inputs()
    expected = model(**inputs)
    with pytest.warns(UserWarning, match="leaves the region at .* as it was: .*no compiler today"):
        loss = torch.compile(model, backend="mst", options=OPTIONS)(**inputs)
    torch.testing.assert_close(loss, expected)
    assert "does not compile" in reasons(mst_fx.reports()[-1])


def test_in_place_residual_and_in_place_activation() -> None:
    class InPlace(nn.Module):
        def __init__(self, where: str) -> None:
            super().__init__()
            self.mlp, self.where = SwiGLU(), where

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.where == "result":
                y = self.mlp(x)
                y += x
                return y
            wide = self.mlp.gate(x)
            return self.mlp.down(F.relu(wide, inplace=True))

    for where in ("result", "activation"):
        model, x = InPlace(where), torch.randn(2, 23, 16, requires_grad=True)
        torch.testing.assert_close(torch.compile(model, backend="mst", options=OPTIONS)(x), model(x))


def test_input_changed_in_place_before_the_region_reads_it_all() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = SwiGLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 1
            gate = F.silu(self.mlp.gate(x))
            x[...] = x * 2
            return self.mlp.down(gate * self.mlp.up(x))

    model, x = Between(), torch.randn(2, 23, 16)
    with torch.no_grad():  # with gradients torch itself refuses
        torch.testing.assert_close(torch.compile(model, backend="mst", options=OPTIONS)(x), model(x))
    assert "in place" in reasons(mst_fx.reports()[-1])


def test_logs_trace_and_debug_folder(tmp_path: pathlib.Path) -> None:
    script = """
import torch
from tests.models import LanguageModel, SwiGLU, token_inputs
options = {"mst.chunk_tokens": 8, "mst.compiler": "aot_eager"}
torch.compile(LanguageModel(SwiGLU()), backend="mst", options=options)(**token_inputs())
"""
    env = {**os.environ, "TORCH_LOGS": "+mst_fx", "TORCH_TRACE": str(tmp_path / "trace"),
           "TORCH_COMPILE_DEBUG": "1", "TORCH_COMPILE_DEBUG_DIR": str(tmp_path)}  # fmt: skip
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=env, capture_output=True, text=True,
                          check=True)  # fmt: skip
    assert len(re.findall(r"(?m)^I.*mst: 2 of 2 regions chunked in", done.stderr)) == 1
    assert len(re.findall(r"(?m)^V.*mst: chunked (?:loss|mlp) at .*models.py:", done.stderr)) == 2
    (trace,) = (tmp_path / "trace").glob("*.log")
    text = trace.read_text()
    assert '"name": "mst_report"' in text
    assert '"name": "mst_diff"' in text
    assert "forward of body" in text
    (diff,) = tmp_path.glob("torch_compile_debug/*/mst_fx/diff_1.txt")
    assert "backward of body" in diff.read_text()


def test_the_public_face_is_listed() -> None:
    assert {"explain", "reports", "minisequence", "tokenwise"} <= set(dir(mst_fx))
