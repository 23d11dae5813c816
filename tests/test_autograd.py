"""What people do with gradients: accumulate, ask for some, hook, freeze, differentiate twice."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mst_fx
from tests.harness import DEVICE, EAGER, chunked
from tests.models import LanguageModel, SwiGLU, token_inputs
from tests.versions import require, sees_swapped_parameters, thaws_parameters

OPTIONS = {"mst.chunk_tokens": 8, **EAGER}


def compiled(model: Any, **kwargs: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="mst", **{"options": OPTIONS, **kwargs})


def both(
    model: nn.Module,
    run: Callable[[Callable[..., Any]], Any],
    function: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> None:
    """Run with the plain and with the compiled model, or function of it; results and gradients must agree."""
    found = []
    plain = model if function is None else function
    for fn in (plain, compiled(plain, **kwargs)):
        model.zero_grad(set_to_none=True)
        result = run(fn)
        found.append((result, {n: p.grad for n, p in model.named_parameters()}))
    assert mst_fx.reports()[-1].chunked, str(mst_fx.reports()[-1])
    torch.testing.assert_close(found[1], found[0])


def test_gradients_accumulate() -> None:
    torch.manual_seed(1)
    batches = [token_inputs(2, s) for s in (23, 23, 31)]

    def run(fn: Callable[..., Any]) -> Any:
        losses = []
        for i, batch in enumerate(batches):
            loss = fn(**batch) / (i + 1)
            loss.backward()
            losses.append(loss.detach())
        return losses

    both(LanguageModel(SwiGLU()), run)


def test_two_losses_before_one_backward() -> None:
    one, two = token_inputs(), token_inputs()

    def run(fn: Callable[..., Any]) -> Any:
        total = fn(**one) + 3 * fn(**two)
        total.backward()
        return total.detach()

    both(LanguageModel(SwiGLU()), run)


@pytest.mark.parametrize("setting", ["forward", "recompute"])
def test_retained_graph_is_walked_twice(setting: str) -> None:
    model, inputs = LanguageModel(SwiGLU()), token_inputs()

    def run(fn: Callable[..., Any]) -> Any:
        loss = fn(**inputs)
        loss.backward(retain_graph=True)
        first = {n: p.grad.clone() for n, p in model.named_parameters()}
        (2 * loss).backward()
        return first

    found = []
    options = {**OPTIONS, "mst.loss_gradient": setting}
    for fn in (model, torch.compile(model, backend="mst", options=options)):
        model.zero_grad(set_to_none=True)
        found.append((run(fn), {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(found[1], found[0])


class FromEmbeddings(LanguageModel):
    """The same model, from hidden states."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, -2), labels.reshape(-1))


def embedded() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, 23, 16, requires_grad=True), "labels": torch.randint(0, 61, (2, 23))}


def test_gradients_of_inputs_and_of_some_parameters() -> None:
    model, inputs = FromEmbeddings(SwiGLU()), embedded()

    def run(fn: Callable[..., Any]) -> Any:
        some = [inputs["x"], model.head.weight, model.blocks[0].up.weight]
        return torch.autograd.grad(fn(**inputs), some)

    both(model, run)


@pytest.mark.parametrize("frozen", ["embed", "head", "blocks", "blocks.0.up", "head,norm"])
def test_frozen_parts_get_none(frozen: str) -> None:
    model, inputs = LanguageModel(SwiGLU()), token_inputs()
    for name in frozen.split(","):
        model.get_submodule(name).requires_grad_(False)

    def run(fn: Callable[..., Any]) -> Any:
        loss = fn(**inputs)
        loss.backward()
        return loss.detach()

    both(model, run)


def test_everything_frozen_but_the_input() -> None:
    model, inputs = FromEmbeddings(SwiGLU()).requires_grad_(False), embedded()
    both(model, lambda fn: torch.autograd.grad(fn(**inputs), inputs["x"]))


def test_frozen_and_thawed_between_steps() -> None:
    require(thaws_parameters())
    model, inputs = LanguageModel(SwiGLU()), token_inputs()

    def run(fn: Callable[..., Any]) -> Any:
        seen = []
        for name in ("head", "blocks", None, "blocks.0.up"):
            model.requires_grad_(True)
            if name:
                model.get_submodule(name).requires_grad_(False)
            model.zero_grad(set_to_none=True)
            fn(**inputs).backward()
            seen.append({n: p.grad for n, p in model.named_parameters()})
        return seen

    both(model, run)


def test_input_that_needs_a_gradient_only_sometimes() -> None:
    model, inputs = FromEmbeddings(SwiGLU()).requires_grad_(False), embedded()
    model.head.requires_grad_(True)

    def run(fn: Callable[..., Any]) -> Any:
        seen = []
        for needs in (False, True, False):
            x = inputs["x"].detach().requires_grad_(needs)
            fn(x, inputs["labels"]).backward()
            seen.append(x.grad)
        return seen

    both(model, run)


def test_hooks_see_and_change_each_gradient_once() -> None:
    model, inputs = FromEmbeddings(SwiGLU()), embedded()
    seen: list[list[str]] = []

    def run(fn: Callable[..., Any]) -> Any:
        calls: list[str] = []
        handles = [inputs["x"].register_hook(lambda g: calls.append("input") or g * 2)]
        for name, p in model.named_parameters():
            if p.requires_grad and not name.startswith("embed"):
                handles.append(p.register_hook(lambda g, n=name: calls.append(n) or g * 3))
                handles.append(p.register_post_accumulate_grad_hook(lambda p, n=name: calls.append(f"after {n}")))
        inputs["x"].grad = None
        loss = fn(**inputs)
        loss.backward()
        for handle in handles:
            handle.remove()
        seen.append(sorted(calls))
        return inputs["x"].grad

    both(model, run)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 1 + 2 * sum(not n.startswith("embed") for n, _ in model.named_parameters())


def test_optimizer_in_the_hooks() -> None:
    """The optimizer steps as soon as a gradient is there, and drops it."""
    torch.manual_seed(3)
    inputs, found = token_inputs(), []
    start = LanguageModel(SwiGLU()).state_dict()
    for compile_it in (False, True):
        model = LanguageModel(SwiGLU())
        model.load_state_dict(start)
        fn = compiled(model) if compile_it else model

        def step(p: torch.Tensor) -> None:
            with torch.no_grad():
                p.sub_(p.grad, alpha=0.1)
            p.grad = None

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        losses = []
        for _ in range(3):
            loss = fn(**inputs)
            loss.backward()
            losses.append(loss.detach())
        found.append((losses, dict(model.named_parameters())))
    torch.testing.assert_close(found[1], found[0])


def test_tied_weights() -> None:
    class Tied(LanguageModel):
        def __init__(self) -> None:
            super().__init__(SwiGLU(), SwiGLU())
            self.head.weight = self.embed.weight
            self.blocks[1].up.weight = self.blocks[0].gate.weight

    inputs = token_inputs()
    both(Tied(), lambda fn: fn(**inputs).backward())


@pytest.mark.parametrize("scale", [2.0**40, 2.0**-40])
def test_scaled_loss(scale: float) -> None:
    model, inputs = LanguageModel(SwiGLU()), token_inputs()
    grads = []
    for fn in (model, compiled(model)):
        model.zero_grad(set_to_none=True)
        (fn(**inputs) * scale).backward()
        grads.append([p.grad / scale for p in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0])


def test_double_backward_is_refused() -> None:
    model, inputs = FromEmbeddings(SwiGLU()), embedded()
    (grad,) = torch.autograd.grad(compiled(model)(**inputs), inputs["x"], create_graph=True)
    penalty = grad.square().sum()
    with pytest.raises(RuntimeError, match="double backward"):
        penalty.backward()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode() -> None:
    model, inputs = LanguageModel(SwiGLU()), token_inputs()
    with torch.autograd.detect_anomaly():
        both(model, lambda fn: fn(**inputs).backward())
    assert len(mst_fx.reports()[-1].chunked) == 2


class Clipped(torch.autograd.Function):
    """A gradient that is not linear in the one that comes to it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.clamp(-1e-3, 1e-3)


@torch.library.custom_op("mst_tests::clipped", mutates_args=(), tags=(torch.Tag.pointwise,))
def clipped_op(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@clipped_op.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


clipped_op.register_autograd(lambda ctx, grad: grad.clamp(-1e-3, 1e-3))


@pytest.mark.parametrize("where", ["logits", "losses", "hidden states", "logits by an op"])
@pytest.mark.parametrize("forming", ["auto", "forward"])
def test_gradients_of_the_users_own_see_the_scale_of_the_loss(where: str, forming: str) -> None:
    torch.manual_seed(8)
    model, inputs = LanguageModel(SwiGLU()).double(), token_inputs()

    def loss_of(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = model.norm(model.embed(ids))
        logits = model.head(Clipped.apply(hidden) if where == "hidden states" else hidden).flatten(0, 1)
        own = {"logits": Clipped.apply, "logits by an op": clipped_op}
        logits = own[where](logits) if where in own else logits
        losses = F.cross_entropy(logits, labels.flatten(), reduction="none")
        return (Clipped.apply(losses) if where == "losses" else losses).mean()

    options = {**OPTIONS, "mst.loss_gradient": forming}
    for scale in (1.0, 0.25, 1024.0):
        found = []
        for fn in (loss_of, compiled(loss_of, options=options)):
            model.zero_grad(set_to_none=True)
            (fn(**inputs) * scale).backward()
            found.append([p.grad for p in (model.head.weight, model.embed.weight)])
        assert chunked(mst_fx.reports()[-1], "loss") == 1
        torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad])
def test_inference_mode_that_is_switched_off_records_gradients(outer: Callable[..., Any]) -> None:
    """``with torch.inference_mode(not self.training)``; under ``no_grad`` it switches gradients on, too."""
    torch.manual_seed(9)
    model, inputs = LanguageModel(SwiGLU()).double(), token_inputs()

    def loss_of(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with outer():
            hidden = model.norm(model.embed(ids))
            with torch.inference_mode(not model.training):
                logits = model.head(hidden).flatten(0, 1)
                return F.cross_entropy(logits, labels.flatten())

    both(model, lambda fn: fn(**inputs).backward(), loss_of)
    assert chunked(mst_fx.reports()[-1], "loss") == 1
    assert model.head.weight.grad is not None


def test_autocast_that_begins_after_the_forward_is_not_the_loops() -> None:
    torch.manual_seed(10)
    model, inputs = LanguageModel(SwiGLU()), token_inputs()
    found = []
    for outer in (False, True):
        model.zero_grad(set_to_none=True)
        fn = compiled(model)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=outer):
            with torch.autocast(DEVICE, enabled=False):
                loss = fn(**inputs)
            loss.backward()
        assert len(mst_fx.reports()[-1].chunked) == 2
        found.append({n: p.grad for n, p in model.named_parameters() if not n.startswith("norm")})
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-3)


def test_compiled_parameters_can_be_swapped() -> None:
    """A weak reference to one would forbid what ``.to()`` and ``load_state_dict`` do with tensor subclasses."""
    require(sees_swapped_parameters())
    model = LanguageModel(SwiGLU())
    fn = compiled(model)
    fn(**token_inputs()).backward()
    model.zero_grad(set_to_none=True)
    assert len(mst_fx.reports()[-1].chunked) == 2
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert fn(**token_inputs()).dtype == torch.float64


def test_a_parameter_that_only_changes_gets_no_gradient() -> None:
    torch.manual_seed(11)
    model = LanguageModel(SwiGLU())

    def loss_of(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            model.norm.weight.mul_(0.5)
        return F.cross_entropy(model.head(model.embed(ids)).flatten(0, 1), labels.flatten())

    compiled(loss_of)(**token_inputs()).backward()
    assert chunked(mst_fx.reports()[-1], "loss") == 1
    assert model.norm.weight.grad is None
