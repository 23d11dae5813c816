"""Slices along tokens of logits: computed for the tokens that are left, wherever the slice is taken."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import mst_fx
from tests.harness import DEVICE, EAGER, chunked
from tests.heads import ce
from tests.models import LanguageModel, SwiGLU, token_inputs
from tests.versions import require, traces_inference_mode

OPTIONS = {"mst.chunk_tokens": 8, **EAGER}
Loss = Callable[[LanguageModel, torch.Tensor, torch.Tensor], Any]


def cast_under_autocast(model: LanguageModel, ids: torch.Tensor, labels: torch.Tensor) -> Any:
    with torch.autocast(DEVICE, torch.bfloat16):
        logits = model.head(model.norm(model.embed(ids))).float()
        return ce(logits[..., :-1, :].contiguous(), labels[..., 1:])


def twice_under_autocast(model: LanguageModel, ids: torch.Tensor, labels: torch.Tensor) -> Any:
    with torch.autocast(DEVICE, torch.bfloat16):
        logits = model.head(model.norm(model.embed(ids))).float()
    return ce(logits[:, :-1][:, -9:], labels[:, 1:][:, -9:])


def metric_in_inference_mode(model: LanguageModel, ids: torch.Tensor, labels: torch.Tensor) -> Any:
    hidden, shifted = model.norm(model.embed(ids)), labels[:, 1:]
    with torch.inference_mode():
        found = model.head(hidden)[:, :-1].float()
        correct = (found.argmax(-1) == shifted).float().mean()
    return ce(model.head(hidden)[:, :-1], shifted), correct.clone()


def returned_in_the_middle(model: LanguageModel, ids: torch.Tensor, labels: torch.Tensor) -> Any:
    logits = model.head(model.norm(model.embed(ids)))[:, :-1]
    return ce(logits[:, -9:], labels[:, 1:][:, -9:]), logits


@pytest.mark.parametrize(
    "loss", [cast_under_autocast, twice_under_autocast, metric_in_inference_mode, returned_in_the_middle]
)
def test_slices_are_taken_before_the_head(loss: Loss) -> None:
    if loss is metric_in_inference_mode:
        require(traces_inference_mode())
    torch.manual_seed(12)
    model, inputs = LanguageModel(SwiGLU()), token_inputs()

    def run(**given: torch.Tensor) -> Any:
        return loss(model, **given)

    found = []
    for fn in (run, torch.compile(run, backend="mst", options=OPTIONS)):
        model.zero_grad(set_to_none=True)
        results = fn(**inputs)
        results = results if isinstance(results, tuple) else (results,)
        results[0].backward()
        found.append([*(r.detach() + 0 for r in results), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert chunked(mst_fx.reports()[-1], "loss") >= 1, str(mst_fx.reports()[-1])
    rough = "autocast" in loss.__name__
    torch.testing.assert_close(found[1], found[0], rtol=2e-2 if rough else 1e-4, atol=1e-3 if rough else 1e-6)
    if loss is returned_in_the_middle:
        assert "returned logits are lazy" in str(mst_fx.reports()[-1])
