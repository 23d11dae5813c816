"""Live bytes of many equal layers from few of them: the same, moment by moment, as from all."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import mst_fx
from mst_fx.commands.models import ModelSpec, build_model
from mst_fx.diff import liveness, repeats
from tests.models import Between, LanguageModel, SwiGLU, token_inputs

OPTIONS = {"mst.chunk_tokens": 8}
ALWAYS = 1.0
"""Even where nothing is gained."""


def graphs(model: nn.Module, inputs: dict[str, Any]) -> list[tuple[Any, bool]]:
    (pair,) = mst_fx.explain(model, OPTIONS)(**inputs).graphs
    return [(pair.before, False), (pair.after, True)]


def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the sizes of the graphs that are traced."""
    sizes: list[int] = []
    full = liveness.timeline
    monkeypatch.setattr(liveness, "timeline", lambda g, c: sizes.append(len(g.graph.nodes)) or full(g, c))
    return sizes


def assert_same(model: nn.Module, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for module, chunked in graphs(model, inputs):
        expected = liveness.timeline(module, chunked)
        with monkeypatch.context() as patch:
            sizes = traced(patch)
            found = repeats.timeline(module, chunked, ALWAYS)
        assert max(sizes) < len(module.graph.nodes)  # not all layers were traced
        assert [m.live_bytes for m in found.moments] == [m.live_bytes for m in expected.moments]
        assert [m.phase for m in found.moments] == [m.phase for m in expected.moments]
        assert (found.saved_bytes, found.peak_bytes) == (expected.saved_bytes, expected.peak_bytes)
        assert Counter(found.saved) == Counter(expected.saved)
        assert (found.largest_bytes, found.largest) == (expected.largest_bytes, expected.largest)
        layers = [[m.path for m in t.moments if "mlp" in m.path or "gate" in m.path] for t in (found, expected)]
        assert layers[0] == layers[1]


@pytest.mark.slow
def test_few_layers_tell_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same(LanguageModel(*(SwiGLU() for _ in range(7))), token_inputs(), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings", "checkpointing"),
    [("llama", {}, False), ("llama", {}, True), ("gemma2", {"head_dim": 8}, False), ("qwen3", {"head_dim": 8}, False)],
)
def test_layers_of_transformers(
    kind: str, settings: dict[str, Any], checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {
        "num_hidden_layers": 11, "hidden_size": 32, "intermediate_size": 96, "vocab_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    spec = ModelSpec(hf=kind, settings={**sizes, **settings}, seq_len=64, checkpointing=checkpointing)
    subject = build_model(spec)
    assert_same(subject.model, subject.kwargs, monkeypatch)


class FirstToLast(LanguageModel):
    """Every layer's result is read again at the end."""

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        states = []
        for block in self.blocks:
            x = x + block(x)
            states.append(x)
        logits = self.head(self.norm(sum(states)))
        return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.reshape(-1))


@pytest.mark.parametrize(
    "model",
    [
        LanguageModel(*(Between(nn.GELU(), 80 if i == 4 else 48) for i in range(7))),
        FirstToLast(*(SwiGLU() for _ in range(7))),
    ],
    ids=["one differs", "read again at the end"],
)
def test_layers_that_are_not_alike_are_all_traced(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    (module, _), _ = graphs(model, token_inputs())
    expected = liveness.timeline(module, False)
    sizes = traced(monkeypatch)
    found = repeats.timeline(module, False, ALWAYS)
    assert sizes[-1] == len(module.graph.nodes)
    assert [m.live_bytes for m in found.moments] == [m.live_bytes for m in expected.moments]


def test_all_layers_are_traced_where_few_would_cost_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    (module, _), _ = graphs(LanguageModel(*(SwiGLU() for _ in range(7))), token_inputs())
    sizes = traced(monkeypatch)
    repeats.timeline(module, False)
    assert sizes == [len(module.graph.nodes)]
