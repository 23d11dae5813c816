"""Transforms of ``torch.func``, and gradients taken, inside the compiled function."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import mst_fx
from tests.test_autograd import compiled, embedded


def loss_of(weights: dict[str, torch.Tensor], x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    y = F.linear(F.gelu(F.linear(x, weights["up"])), weights["down"])
    return F.cross_entropy(F.linear(x + y, weights["head"]).flatten(0, 1), labels.flatten())


def weights() -> dict[str, torch.Tensor]:
    return {k: torch.randn(*s) * 0.3 for k, s in {"up": (48, 16), "down": (16, 48), "head": (61, 16)}.items()}


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vjp])
def test_function_transforms_inside_the_compiled_function(transform: Any) -> None:
    inputs, w = embedded(), weights()
    x, labels = inputs["x"].detach(), inputs["labels"]

    def run(w: Any) -> Any:
        if transform is torch.func.vjp:
            value, back = torch.func.vjp(lambda v: loss_of(v, x, labels), w)
            return value, back(torch.ones_like(value))
        return transform(loss_of)(w, x, labels)

    torch.testing.assert_close(compiled(run)(w), run(w))


def test_vmap_inside_the_compiled_function() -> None:
    w = weights()
    x, labels = torch.randn(3, 2, 23, 16), torch.randint(0, 61, (3, 2, 23))

    def run(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(lambda a, b: loss_of(w, a, b))(x, labels)

    torch.testing.assert_close(compiled(run)(x, labels), run(x, labels))
    assert "torch.func" in str(mst_fx.reports()[-1])


def test_per_sample_gradients() -> None:
    w = weights()
    x, labels = torch.randn(3, 1, 23, 16), torch.randint(0, 61, (3, 1, 23))

    def run(w: Any, x: torch.Tensor, labels: torch.Tensor) -> Any:
        return torch.func.vmap(torch.func.grad(loss_of), (None, 0, 0))(w, x, labels)

    torch.testing.assert_close(compiled(run)(w, x, labels), run(w, x, labels))


def test_forward_mode_inside_the_compiled_function() -> None:
    inputs, w = embedded(), weights()
    x, labels = inputs["x"].detach(), inputs["labels"]

    def run(x: torch.Tensor, t: torch.Tensor) -> Any:
        return torch.func.jvp(lambda v: loss_of(w, v, labels), (x,), (t,))

    t = torch.randn_like(x)
    torch.testing.assert_close(compiled(run)(x, t), run(x, t))


def test_gradient_taken_inside_the_compiled_function() -> None:
    """``torch.autograd.grad`` in the function: Dynamo traces it or breaks the graph; the numbers hold either way."""
    inputs, w = embedded(), {k: v.requires_grad_() for k, v in weights().items()}
    x, labels = inputs["x"].detach(), inputs["labels"]

    def run(x: torch.Tensor) -> Any:
        loss = loss_of(w, x, labels)
        return (loss.detach(), *torch.autograd.grad(loss, list(w.values())))

    torch.testing.assert_close(compiled(run)(x), run(x))
