"""The main job: real models train exactly, with their MLPs and losses chunked."""

import itertools
import re

import pytest
import torch
from torch import nn

from tests.harness import check_exact, chunked, reasons, slow_but
from tests.models import NEAR_MISSES, TOKENWISE, LanguageModel, hf, hf_inputs, token_inputs

# name -> (MLP regions chunked at least, losses chunked)
HF = {
    "llama": (2, 1), "qwen2": (2, 1), "qwen3": (2, 1), "mistral": (2, 1), "gemma2": (2, 1), "gemma3": (2, 1),
    "phi3": (2, 1), "gpt2": (2, 1), "gpt_neox": (2, 1), "gptj": (2, 1), "falcon_mamba": (0, 1), "mamba2": (0, 1),
    "mixtral": (0, 1), "t5": (4, 1), "bert": (2, 1), "vit": (2, 0),
}  # fmt: skip


SLOW = {"falcon_mamba", "gemma3", "phi3", "gptj", "gpt_neox", "qwen2", "qwen3", "mistral", "vit"}
KEPT = [(name, 1 + i % 2) for i, name in enumerate(HF) if name not in SLOW]
"""What ``make test`` runs of these, with one batch size or the other."""


@pytest.mark.parametrize(("name", "batch"), slow_but(KEPT, itertools.product(HF, [1, 2])))
def test_transformers_model_trains_exactly(name: str, batch: int) -> None:
    ours = check_exact(hf(name), hf_inputs(name, batch))
    assert chunked(ours.report, "mlp") == HF[name][0], str(ours.report)
    assert chunked(ours.report, "loss") == HF[name][1], str(ours.report)


CHECKPOINTED = ["llama", "gemma2", "gpt2", "phi3", "bert", "t5", "mixtral", "falcon_mamba"]


@pytest.mark.parametrize("name", slow_but(["llama", "mixtral"], CHECKPOINTED))
def test_gradient_checkpointing(name: str) -> None:
    model = hf(name)
    model.gradient_checkpointing_enable()
    ours = check_exact(model, hf_inputs(name))
    # T5's graph breaks at every checkpoint; its encoder layers share one graph.
    assert chunked(ours.report, "mlp") == (3 if name == "t5" else HF[name][0]), str(ours.report)
    assert chunked(ours.report, "loss") == HF[name][1], str(ours.report)


LOW = ["llama", "gemma2", "gpt2", "gpt_neox", "bert", "t5"]
LOW_KEPT = [("llama", "bf16"), ("gemma2", "autocast"), ("gpt2", "autocast")]


@pytest.mark.parametrize(("name", "how"), slow_but(LOW_KEPT, itertools.product(LOW, ["bf16", "autocast"])))
def test_low_precision(name: str, how: str) -> None:
    model = hf(name)
    ours = check_exact(model.bfloat16() if how == "bf16" else model, hf_inputs(name), autocast=how == "autocast")
    assert chunked(ours.report, "mlp") == HF[name][0], str(ours.report)
    assert chunked(ours.report, "loss") == HF[name][1], str(ours.report)


def test_tied_embeddings() -> None:
    ours = check_exact(hf("llama", tie_word_embeddings=True), hf_inputs("llama"))
    assert chunked(ours.report, "loss") == 1


@pytest.mark.parametrize("name", TOKENWISE)
def test_spelling_is_chunked(name: str) -> None:
    model = LanguageModel(TOKENWISE[name]())
    ours = check_exact(model, token_inputs())
    assert chunked(ours.report, "mlp") == (2 if name.startswith("encoder") else 1), str(ours.report)
    assert chunked(ours.report, "loss") == 1


@pytest.mark.parametrize("name", NEAR_MISSES)
@pytest.mark.parametrize("batch", [1, 2])
def test_near_miss_is_left_alone(name: str, batch: int) -> None:
    build, why = NEAR_MISSES[name]
    if name == "reorder" and batch == 1:
        pytest.skip("a batch of one has nothing to reorder")
    ours = check_exact(LanguageModel(build()), token_inputs(batch))
    assert chunked(ours.report, "mlp") == 0, str(ours.report)
    assert re.search(why, reasons(ours.report)), reasons(ours.report)
    assert chunked(ours.report, "loss") == 1


def test_function_with_hidden_states_logits_and_loss() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(61, 16) * 0.1)

        def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            logits = torch.tanh(hidden) @ self.w.T
            return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    hidden = torch.randn(2, 23, 16, requires_grad=True)
    ours = check_exact(Step(), {"hidden": hidden, "labels": torch.randint(0, 61, (2, 23))})
    assert chunked(ours.report, "loss") == 1
