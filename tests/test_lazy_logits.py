"""Returned logits: lazy, kept or dropped."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_outputs import CausalLMOutput

import mst_fx
from mst_fx.lazy_logits import LazyLogits
from tests.harness import DEVICE, EAGER, check_exact, chunked
from tests.models import hf, hf_inputs, token_inputs

OPTIONS = {"mst.chunk_tokens": 8, **EAGER}


class Bigram(torch.nn.Module):
    """The smallest model with the outputs of Transformers' causal LMs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lm_head = torch.nn.Embedding(61, 16), torch.nn.Linear(16, 61, bias=False)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> CausalLMOutput:
        logits = self.lm_head(self.embed(ids))
        return CausalLMOutput(loss=F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits=logits)


def outputs(**options: Any) -> tuple[Any, Any, torch.Tensor]:
    """A model, what it gives when it is compiled, and the logits that plain code gives."""
    model, inputs = Bigram(), token_inputs()
    expected = model(**inputs).logits.detach()
    return model, torch.compile(model, backend="mst", options={**OPTIONS, **options})(**inputs), expected


def head_and_loss(**options: Any) -> tuple[Callable[..., Any], Any, torch.Tensor, torch.Tensor]:
    """A function of hidden states, its compiled form, and its inputs."""
    head = torch.nn.Linear(16, 61)

    def fn(x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = head(x)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits

    compiled = torch.compile(fn, backend="mst", options={**OPTIONS, **options})
    return fn, compiled, torch.randn(2, 23, 16), torch.randint(0, 61, (2, 23))


def test_looks_like_logits_and_computes_when_touched() -> None:
    _, out, expected = outputs()
    logits = out.logits
    assert isinstance(logits, LazyLogits)
    assert (logits.shape, logits.dtype, logits.device) == (expected.shape, expected.dtype, expected.device)
    assert logits._deferred.value is None
    torch.testing.assert_close(logits + 0, expected)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_stays_lazy_through_detach_clone_float_to() -> None:
    _, out, expected = outputs()
    lazy = out.logits.detach().clone().float().to(torch.float64).to("cpu")
    assert lazy._base is None
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
        lambda x: repr(x.float()),
        lambda x: f"{x[0, 0, 0]:.3f}",
        lambda x: np.asarray(x.detach()),
        lambda x: np.array(x.detach().float().cpu()),
        lambda x: copy.copy(x),
        lambda x: [*x.unbind(0), len(x), x.mT],
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: torch.empty_like(x),
        lambda x: x.new_zeros(3),
        lambda x: torch.utils.data.default_collate([x.detach(), x.detach()]),
        lambda x: x == x.clone(),
        lambda x: bool((x == x).all()),
        lambda x: torch.utils.dlpack.from_dlpack(x.detach()),
        lambda x: x.untyped_storage().nbytes(),
        lambda x: hash(x) == hash(x) and x in [x],
        lambda x: torch.nn.functional.log_softmax(x.float(), -1).gather(-1, torch.zeros(2, 23, 1, dtype=torch.int64)),
    ],
)
def test_any_use_works(use: Any) -> None:
    _, compiled, x, labels = head_and_loss()
    use(compiled(x, labels)[1])


def test_raises_after_the_weights_have_changed() -> None:
    model, out, _ = outputs()
    out.loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    with pytest.raises(RuntimeError, match=r"weights.*changed.*mst\.logits"):
        out.logits.sum()
    assert "changed" in str(out.logits)


def test_a_clone_has_memory_of_its_own() -> None:
    _, out, expected = outputs()
    clone, read = out.logits.clone(), out.logits.detach().clone()
    assert clone._deferred.value is None
    assert clone.requires_grad
    read.zero_()
    out.logits.detach().zero_()
    torch.testing.assert_close(clone.detach() + 0, expected)
    assert torch.equal(read + 0, torch.zeros_like(expected))
    with pytest.raises(RuntimeError, match=r'mst\.logits": "keep'):
        clone.sum().backward()


@pytest.mark.parametrize("alone", [False, True])
def test_a_clone_of_logits_read_in_time_stays(alone: bool) -> None:
    model, out, expected = outputs()
    clone = out.logits.detach().clone()
    assert clone._deferred.value is None
    if not alone:
        out.logits.detach().sum()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    if alone:
        with pytest.raises(RuntimeError, match=r"weights.*changed"):
            clone.sum()
    else:
        clone.add_(1)
        torch.testing.assert_close(clone + 0, expected + 1)
        torch.testing.assert_close(out.logits.detach() + 0, expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda w: w.data.mul_(1.01), "changed"), (lambda w: w.untyped_storage().resize_(0), "freed")],
)
def test_raises_after_a_change_that_no_version_counts(change: Any, said: str) -> None:
    """Sharded optimizers write through ``.data``; FSDP frees the weights it has gathered."""
    model, out, _ = outputs()
    version = model.lm_head.weight._version
    change(model.lm_head.weight)
    assert model.lm_head.weight._version == version
    with pytest.raises(RuntimeError, match=rf"weights.*{said}.*mst\.logits"):
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
    model, inputs = hf("llama", num_hidden_layers=1), hf_inputs("llama")
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
    ours = check_exact(hf("gemma2", num_hidden_layers=1), hf_inputs("gemma2"), options={"mst.logits": "keep"})
    assert chunked(ours.report, "loss") == 1


def test_random_logits_are_not_put_off() -> None:
    """Drawn again when they are read they would be others than those of the loss."""
    head = torch.nn.Linear(16, 61)

    def fn(x: torch.Tensor, labels: torch.Tensor):
        logits = F.dropout(head(x), 0.5)
        return F.cross_entropy(logits, labels), logits

    x, labels = torch.randn(24, 16), torch.randint(0, 61, (24,))
    loss, logits = torch.compile(fn, backend="mst", options={"mst.chunk_tokens": 8, **EAGER})(x, labels)
    torch.testing.assert_close(F.cross_entropy(logits, labels), loss)
    assert "they are random" in str(mst_fx.reports()[-1])


def test_drop_gives_none() -> None:
    _, out, _ = outputs(**{"mst.logits": "drop"})
    assert out.logits is None
    assert out.loss.requires_grad


def test_eval_with_labels_under_no_grad() -> None:
    model, inputs = hf("llama", num_hidden_layers=1).eval(), hf_inputs("llama")
    with torch.no_grad():
        expected = model(**inputs)
        out = torch.compile(model, backend="mst", options=OPTIONS)(**inputs)
    torch.testing.assert_close(out.loss, expected.loss)
    assert not out.logits.requires_grad
    torch.testing.assert_close(out.logits + 0, expected.logits)


def test_softcapped_and_upcast_logits() -> None:
    model, inputs = hf("gemma2", num_hidden_layers=1), hf_inputs("gemma2")
    expected = model(**inputs).logits
    out = torch.compile(model, backend="mst", options=OPTIONS)(**inputs)
    assert isinstance(out.logits, LazyLogits)
    torch.testing.assert_close(out.logits.detach() + 0, expected.detach())


def test_autocast() -> None:
    model, inputs = hf("llama", num_hidden_layers=1), hf_inputs("llama")
    with torch.autocast(DEVICE, torch.bfloat16):
        expected = model(**inputs).logits
        out = torch.compile(model, backend="mst", options=OPTIONS)(**inputs)
    assert out.logits.dtype == expected.dtype
    torch.testing.assert_close(out.logits.detach() + 0, expected.detach(), atol=2e-2, rtol=2e-2)


def test_a_cast_taken_before_the_step_and_read_after_it() -> None:
    """What was read stays readable, in every dtype; what was not raises."""
    model, out, expected = outputs()
    wide, logits = out.logits.detach().double(), out.logits.detach()
    torch.testing.assert_close(logits + 0, expected)
    out.loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    torch.testing.assert_close(wide + 0, expected.double())
    torch.testing.assert_close(logits.half() + 0, expected.half())


@pytest.mark.parametrize(
    "use",
    [
        lambda x, loss: x.register_hook(print),
        lambda x, loss: x.retain_grad(),
        lambda x, loss: torch.autograd.grad(loss, x),
        lambda x, loss: loss.backward(inputs=[x]),
    ],
)
def test_watching_a_gradient_that_never_comes_is_refused(use: Any) -> None:
    _, compiled, x, labels = head_and_loss()
    loss, logits = compiled(x.requires_grad_(), labels)
    with pytest.raises(RuntimeError, match=r'mst\.logits": "keep'):
        use(logits, loss)


def test_gradients_of_what_is_computed_from_detached_logits() -> None:
    fn, compiled, x, labels = head_and_loss()
    grads = []
    for run in (fn, compiled):
        logits = run(x, labels)[1].detach()
        logits.requires_grad_()
        logits.square().sum().backward()
        assert logits.requires_grad
        grads.append(logits.grad)
    torch.testing.assert_close(grads[1], grads[0])


def test_inside_another_compiled_function_and_behind_a_graph_break() -> None:
    fn, compiled, x, labels = head_and_loss()
    expected = fn(x, labels)[1]
    logits = compiled(x, labels)[1].detach()
    read = torch.compile(lambda t: (t.float() * 2).sum(-1), backend="aot_eager")
    torch.testing.assert_close(read(logits), (expected.detach() * 2).sum(-1))
    torch._dynamo.reset()

    def step(x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, logits = fn(x, labels)
        torch._dynamo.graph_break()
        return loss + 0 * logits.detach().float().mean(), logits.argmax(-1)

    loss, best = torch.compile(step, backend="mst", options=OPTIONS)(x, labels)
    assert torch.equal(best, expected.argmax(-1))
    torch.testing.assert_close(loss, fn(x, labels)[0])


def test_only_the_loss_is_held_and_the_hidden_states_go() -> None:
    """Without gradients the lazy logits alone hold the hidden states."""
    model, inputs = hf("llama", num_hidden_layers=1).eval(), hf_inputs("llama")
    with torch.no_grad():
        out = torch.compile(model, backend="mst", options=OPTIONS)(**inputs)
    hidden = [weakref.ref(t) for t in out.logits._deferred.head.inputs]
    loss = out.loss
    del out
    gc.collect()
    assert all(t() is None for t in hidden)
    assert loss.isfinite()


def test_reading_lets_the_hidden_states_go() -> None:
    _, compiled, x, labels = head_and_loss()
    logits = compiled(x, labels)[1]
    head = weakref.ref(logits._deferred.head)
    logits.argmax(-1)
    gc.collect()
    assert head() is None


def test_loaded_logits_are_ordinary() -> None:
    _, out, expected = outputs()
    buffer = io.BytesIO()
    torch.save(out.logits, buffer)
    buffer.seek(0)
    for found in (torch.load(buffer), pickle.loads(pickle.dumps(out.logits)), copy.deepcopy(out.logits.detach())):
        assert type(found) is torch.Tensor
        torch.testing.assert_close(found, expected)


def test_places_in_the_output() -> None:
    _, out, expected = outputs()
    assert torch.is_tensor(out.logits)
    assert isinstance(out[1], LazyLogits)
    assert isinstance(out.to_tuple()[1], LazyLogits)
    leaves, spec = torch.utils._pytree.tree_flatten(dict(out))
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert isinstance(again["logits"], LazyLogits)
    assert again["logits"]._deferred.value is None
    torch.testing.assert_close(again["logits"].detach() + 0, expected)


def test_gathering(tmp_path: Any) -> None:
    import torch.distributed as dist

    _, compiled, x, labels = head_and_loss()
    with torch.no_grad():
        logits = compiled(x, labels)[1]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = [torch.empty(2, 23, 61)]
        dist.all_gather(found, logits)
        torch.testing.assert_close(found[0], logits + 0)
    finally:
        dist.destroy_process_group()
