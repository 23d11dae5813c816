"""Lazy logits of values that are viewed, expanded, returned twice or changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import mst_fx
from tests.harness import chunked, error
from tests.parts import LABELS, SMALL, H, Parts, T, V
from tests.test_identity import compiled
from tests.test_lazy_logits import head_and_loss


def _one(*shape: int) -> torch.Tensor:
    return torch.linspace(0.5, 1.5, max(shape)).reshape(shape)


LOGITS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "temperature": lambda s, x: s.head(x) * s.scale.float().view(1, 1, 1),
    "bias": lambda s, x: s.head(x) + _one(1, 1, V),
    "sequences": lambda s, x: s.head(x) * _one(4, 1, 1),
    "positions": lambda s, x: s.head(x) / _one(1, 8, 1),
    "features": lambda s, x: (s.head(x) * s.scale.float().view(1, 1, 1))[..., :20],
    "convolution": lambda s, x: F.conv1d(x.mT, s.head.weight[..., None]).mT,
}


@pytest.mark.parametrize("read", [lambda z: z + 0, lambda z: z.softmax(-1)], ids=["whole", "softmax"])
@pytest.mark.parametrize("name", LOGITS)
def test_lazy_logits_of_values_that_were_viewed_and_expanded(name: str, read: Callable[..., Any]) -> None:
    def fn(s: Any, x: torch.Tensor) -> Any:
        logits = LOGITS[name](s, x.view(4, 8, H))
        return F.cross_entropy(logits.flatten(0, 1), LABELS % 20), read(logits)

    def lazy(s: Any, x: torch.Tensor) -> Any:
        logits = LOGITS[name](s, x.view(4, 8, H))
        return F.cross_entropy(logits.flatten(0, 1), LABELS % 20), logits

    x = torch.randn(T, H)
    torch.manual_seed(0)
    (_, returned), model = compiled(fn, x)
    truth = fn(model, x)[1].detach()
    torch.manual_seed(0)
    (_, kept), again = compiled(lazy, x)
    assert error((returned + 0).detach(), truth.double()) < 1e-6
    assert error(read(kept).detach(), fn(again, x)[1].detach().double()) < 1e-6
    assert chunked(mst_fx.reports()[-1], "loss")


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "view": lambda z: z.view(4, 8, V),
    "features": lambda z: z[:, :10],
    "transposed": lambda z: z.t(),
    "detached": lambda z: z.detach(),
}


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("name", VIEWS)
def test_returned_views_of_logits_share_memory(name: str, first: int) -> None:
    def fn(s: Any, x: torch.Tensor) -> Any:
        logits = s.head(x)
        return F.cross_entropy(logits, LABELS), logits, VIEWS[name](logits)

    x = torch.randn(T, H)
    with torch.no_grad():
        outs, model = compiled(fn, x)
        truth = fn(model, x)
        for _, *values in (outs, truth):
            values[first - 1].mul_(2)
    for ours, plain in zip(outs[1:], truth[1:], strict=True):
        assert error(ours + 0, plain.double()) < 1e-6
    assert chunked(mst_fx.reports()[-1], "loss")


def test_lazy_logits_of_hidden_states_that_changed_without_a_version() -> None:
    def fn(s: Any, x: torch.Tensor) -> Any:
        h = torch.tanh(x)
        logits = s.head(h)
        return F.cross_entropy(logits, LABELS), logits, h

    with torch.inference_mode():
        (_, logits, h), _ = compiled(fn, torch.randn(T, H))
        h.mul_(3)
        with pytest.raises(RuntimeError, match="hidden states"):
            logits + 0


def test_lazy_logits_of_weights_that_are_not_finite() -> None:
    def fn(s: Any, x: torch.Tensor) -> Any:
        logits = s.head(x)
        return F.cross_entropy(logits, LABELS), logits

    model = Parts(fn)
    with torch.no_grad():
        model.head.weight[3, 0] = float("nan")
    _, logits = torch.compile(model, backend="mst", options=SMALL)(torch.randn(T, H))
    assert (logits + 0).isnan()[:, 3].all()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.mul_(2),
        lambda x: x.detach().mul_(2),
        lambda x: x.__setitem__((..., slice(7)), -1e4),
        lambda x: torch.clamp(x, max=0.1, out=x),
        lambda x: x.data.zero_(),
        lambda x: x.float().add_(1),  # of fp32 this is the value itself
        lambda x: x.double().add_(1),  # and this is not
        lambda x: x.detach().cpu().numpy().fill(3),
        lambda x: x.copy_(torch.zeros(())),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_in_place_changes_are_seen_by_all_that_share_the_memory(change: Any, grad: bool) -> None:
    fn, compiled, x, labels = head_and_loss()
    with torch.set_grad_enabled(grad):
        expected, ours = fn(x, labels)[1], compiled(x, labels)[1]
    shared, wide = ours.detach(), ours.double()
    with torch.no_grad():
        before = expected.double()
        change(expected)
        change(ours)
        torch.testing.assert_close(ours + 0, expected)
        torch.testing.assert_close(shared + 0, expected)
        torch.testing.assert_close(wide + 0, before)
        torch.testing.assert_close(ours.argmax(-1), expected.argmax(-1))


def test_in_place_with_gradients_on() -> None:
    fn, compiled, x, labels = head_and_loss()
    expected, ours = fn(x, labels)[1], compiled(x, labels)[1]
    for logits in (expected, ours):
        logits /= 2
        logits[..., 3] = 0
    torch.testing.assert_close(ours.detach() + 0, expected.detach())
    with pytest.raises(RuntimeError, match=r'mst\.logits": "keep'):
        ours.sum().backward()


def test_two_casts_do_not_share_memory_and_one_tensor_has_one_address() -> None:
    _, compiled, x, labels = head_and_loss()
    logits = compiled(x, labels)[1].detach()
    one, two = logits.double(), logits.double()
    one.zero_()
    assert two.abs().sum() > 0
    assert logits.data_ptr() == logits.data_ptr() == logits.detach().data_ptr() != one.data_ptr()
