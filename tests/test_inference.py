"""Without gradients: eval, no_grad, inference_mode, generation."""

import contextlib
from typing import Any

import pytest
import torch

import mst_fx
from tests.harness import EAGER, chunked, slow_but
from tests.models import LanguageModel, SwiGLU, hf, hf_inputs, token_inputs

OPTIONS = {"mst.chunk_tokens": 8, **EAGER}
MODES: dict[str, Any] = {
    "grad": contextlib.nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode,
}  # fmt: skip


@pytest.mark.parametrize("order", [("inference", "grad", "no_grad", "inference", "grad")], ids=str)
def test_grad_modes_by_turns(order: tuple[str, ...]) -> None:
    model, inputs = LanguageModel(SwiGLU()), token_inputs()
    expected = model(**inputs)
    expected.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    fn = torch.compile(model, backend="mst", options=OPTIONS)
    for mode in order:
        with MODES[mode]():
            loss = fn(**inputs)
        torch.testing.assert_close(loss.detach().clone(), expected.detach())
        assert loss.requires_grad == (mode == "grad")
        if mode == "grad":
            model.zero_grad(set_to_none=True)
            loss.backward()
            torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, grads)
        assert len(mst_fx.reports()[-1].chunked) == 2


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
def test_logits_in_evaluation(mode: str) -> None:
    model, inputs = hf("llama").eval(), hf_inputs("llama")
    fn = torch.compile(model, backend="mst", options=OPTIONS)
    with MODES[mode]():
        expected, out = model(**inputs), fn(**inputs)
        torch.testing.assert_close(out.loss, expected.loss)
        torch.testing.assert_close(out.logits + 0, expected.logits)
        torch.testing.assert_close(out.logits.argmax(-1), expected.logits.argmax(-1))
        del inputs["labels"]
        torch.testing.assert_close(fn(**inputs).logits + 0, model(**inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize("cache", slow_but(["dynamic"], ["dynamic", "static"]))
def test_generation(cache: str) -> None:
    model = hf("llama").eval()
    model.config.use_cache = True
    prompts = [torch.randint(3, 128, (2, n)) for n in (19, 30, 1)]
    settings = {"max_new_tokens": 5, "do_sample": False}
    settings |= {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    expected = [model.generate(p, **settings) for p in prompts]
    model.forward = torch.compile(model.forward, backend="mst", options=OPTIONS)
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert torch.equal(model.generate(prompt, **settings), tokens)
    assert any(chunked(r, "mlp") == 2 for r in mst_fx.reports()), [str(r) for r in mst_fx.reports()]


def test_decode_steps_are_left_alone() -> None:
    model = hf("llama").eval()
    with torch.no_grad():
        past = model(torch.randint(3, 128, (1, 19)), use_cache=True).past_key_values
        fn = torch.compile(model, backend="mst", options=OPTIONS)
        fn(torch.randint(3, 128, (1, 1)), past_key_values=past, use_cache=True)
    assert not any(r.chunked for r in mst_fx.reports())
    assert "one chunk" in str(mst_fx.reports()[-1])
