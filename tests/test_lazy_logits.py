"""Returned logits: lazy, kept or dropped."""

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch

from mst_fx.lazy_logits import LazyLogits
from tests.harness import EAGER, check_exact, chunked
from tests.models import hf, hf_inputs

OPTIONS = {"mst.chunk_tokens": 8, **EAGER}


def outputs(**options: Any) -> tuple[torch.nn.Module, Any, torch.Tensor]:
    model, inputs = hf("llama"), hf_inputs("llama")
    expected = model(**inputs).logits.detach()
    return model, torch.compile(model, backend="mst", options={**OPTIONS, **options})(**inputs), expected


def test_looks_like_logits_and_computes_when_touched() -> None:
    _, out, expected = outputs()
    logits = out.logits
    assert isinstance(logits, LazyLogits)
    assert (logits.shape, logits.dtype, logits.device) == (expected.shape, expected.dtype, expected.device)
    assert logits._deferred.value is None
    torch.testing.assert_close(logits + 0, expected)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_stays_lazy_through_detach_float_to() -> None:
    _, out, expected = outputs()
    lazy = out.logits.detach().float().to(torch.float64).to("cpu")
    assert isinstance(lazy, LazyLogits)
    assert lazy.dtype == torch.float64
    assert lazy._deferred.value is None
    torch.testing.assert_close(lazy[:, -1], expected.double()[:, -1])


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x.detach().cpu().numpy(),
        lambda x: x.tolist(),
        lambda x: str(x),
        lambda x: pickle.loads(pickle.dumps(x)),
        lambda x: copy.deepcopy(x.detach()),
        lambda x: torch.save(x, io.BytesIO()),
        lambda x: torch.softmax(x, -1),
        lambda x: torch.cat([x, x]),
        lambda x: x[0, 0, 0].item(),
        lambda x: list(x),
        lambda x: x.data.sum(),
    ],
)
def test_any_use_works(use: Any) -> None:
    _, out, _ = outputs()
    use(out.logits)


def test_raises_after_the_weights_have_changed() -> None:
    model, out, _ = outputs()
    out.loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    with pytest.raises(RuntimeError, match=r"weights.*changed.*mst\.logits"):
        out.logits.sum()


def test_what_was_touched_before_the_step_stays() -> None:
    model, out, expected = outputs()
    first = out.logits.detach() + 0
    out.loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    torch.testing.assert_close(out.logits.detach() + 0, first)
    torch.testing.assert_close(first, expected)


def test_gradient_through_lazy_logits_is_a_clear_error() -> None:
    _, out, _ = outputs()
    assert out.logits.requires_grad
    with pytest.raises(RuntimeError, match=r'mst\.logits": "keep'):
        out.logits.sum().backward()


def test_freed_when_dropped() -> None:
    _, out, _ = outputs()
    hidden = weakref.ref(out.logits._deferred)
    out.loss.backward()
    del out
    gc.collect()
    assert hidden() is None


def test_keep_gives_real_logits_with_gradients() -> None:
    model, inputs = hf("llama"), hf_inputs("llama")
    grads = []
    for fn in (model, torch.compile(model, backend="mst", options={**OPTIONS, "mst.logits": "keep"})):
        model.zero_grad(set_to_none=True)
        out = fn(**inputs)
        assert type(out.logits) is torch.Tensor
        (out.loss + out.logits.square().mean()).backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain)


def test_keep_is_exact_and_chunked() -> None:
    ours = check_exact(hf("gemma2"), hf_inputs("gemma2"), options={"mst.logits": "keep"})
    assert chunked(ours.report, "loss") == 1


def test_drop_gives_none() -> None:
    _, out, _ = outputs(**{"mst.logits": "drop"})
    assert out.logits is None
    assert out.loss.requires_grad


def test_eval_with_labels_under_no_grad() -> None:
    model, inputs = hf("llama").eval(), hf_inputs("llama")
    with torch.no_grad():
        expected = model(**inputs)
        out = torch.compile(model, backend="mst", options=OPTIONS)(**inputs)
    torch.testing.assert_close(out.loss, expected.loss)
    assert not out.logits.requires_grad
    torch.testing.assert_close(out.logits + 0, expected.logits)


def test_softcapped_and_upcast_logits() -> None:
    model, inputs = hf("gemma2"), hf_inputs("gemma2")
    expected = model(**inputs).logits
    out = torch.compile(model, backend="mst", options=OPTIONS)(**inputs)
    assert isinstance(out.logits, LazyLogits)
    torch.testing.assert_close(out.logits.detach() + 0, expected.detach())


def test_autocast() -> None:
    model, inputs = hf("llama"), hf_inputs("llama")
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs).logits
        out = torch.compile(model, backend="mst", options=OPTIONS)(**inputs)
    assert out.logits.dtype == expected.dtype
    torch.testing.assert_close(out.logits.detach() + 0, expected.detach(), atol=2e-2, rtol=2e-2)
