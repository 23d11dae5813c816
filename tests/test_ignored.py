"""Sums of nothing but tokens that are left out, divided by their number: loss and gradients are those of eager.

What torch drops on the way back (an ignored label, the other side of a ``where``) is 0 also where NaN comes back;
what it multiplies by 0 is NaN then.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import mst_fx
from tests.harness import chunked
from tests.parts import SMALL, H, Parts, T, V, by_name

IGNORED = torch.full((T,), -100)
MASK = IGNORED != -100


def losses(s: Any, x: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(s.head(x), IGNORED, reduction="none")


def picked(s: Any, x: torch.Tensor) -> torch.Tensor:
    return s.head(x).log_softmax(-1).gather(-1, IGNORED.clamp(min=0)[:, None])[:, 0]


def masked_mean(s: Any, x: torch.Tensor) -> torch.Tensor:
    return (losses(s, x) * MASK).sum() / MASK.sum()


def guarded(s: Any, x: torch.Tensor) -> torch.Tensor:
    return masked_mean(s, x).nan_to_num() + 0.01 * x.square().mean()


def where(s: Any, x: torch.Tensor) -> torch.Tensor:
    return -torch.where(MASK, picked(s, x), 0.0).sum() / MASK.sum()


def where_of_two(s: Any, x: torch.Tensor) -> torch.Tensor:
    own = picked(s, x)
    return torch.where(MASK, own, own.detach()).sum() / MASK.sum()


def where_of_two_with_gradients(s: Any, x: torch.Tensor) -> torch.Tensor:
    own = picked(s, x)
    return torch.where(MASK, own, 2 * own).sum() / MASK.sum()


def filled(s: Any, x: torch.Tensor) -> torch.Tensor:
    return picked(s, x).masked_fill(~MASK, 0.0).sum() / MASK.sum()


def focal(s: Any, x: torch.Tensor) -> torch.Tensor:
    own = losses(s, x)
    return ((1 - torch.exp(-own)) ** 2 * own).sum() / MASK.sum()


def clipped_ratio(s: Any, x: torch.Tensor) -> torch.Tensor:
    own = picked(s, x)
    ratio = torch.exp(own - own.detach() + 1)
    return (ratio.clamp(0.8, 1.2) * x.detach()[:, 0]).sum() / MASK.sum()


def ppo(s: Any, x: torch.Tensor) -> torch.Tensor:
    own = picked(s, x)
    ratio = torch.exp(own - own.detach() + 1)
    return torch.minimum(ratio.clamp(0.8, 1.2), ratio).sum() / MASK.sum()


def ppo_unclipped(s: Any, x: torch.Tensor) -> torch.Tensor:
    own = picked(s, x)
    ratio = torch.exp(own - own.detach() - 1)
    return torch.minimum(ratio.clamp(0.8, 1.2), ratio).sum() / MASK.sum()


def hinge(s: Any, x: torch.Tensor) -> torch.Tensor:
    return F.relu(picked(s, x)).sum() / MASK.sum()


def entropy_where(s: Any, x: torch.Tensor) -> torch.Tensor:
    p = s.head(x).log_softmax(-1)
    return torch.where(MASK[:, None], p * p.exp(), 0.0).sum(-1).sum() / MASK.sum()


def squares(s: Any, x: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(torch.where(MASK[:, None], s.head(x), 0.0), torch.ones(T, V), reduction="sum") / MASK.sum()


def masked_entropy(s: Any, x: torch.Tensor) -> torch.Tensor:
    p = s.head(x).log_softmax(-1)
    return ((p * p.exp()).sum(-1) * MASK).sum() / MASK.sum()


def some_counted(s: Any, x: torch.Tensor) -> torch.Tensor:
    some = torch.arange(T) < 5
    return torch.where(some, picked(s, x), 0.0).sum() / MASK.sum()


def smoothed(s: Any, x: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(s.head(x), IGNORED, reduction="sum", label_smoothing=0.1) / MASK.sum()


ZERO = by_name(*((fn, "loss") for fn in (masked_mean, guarded, where, where_of_two, filled, focal, clipped_ratio, ppo,
                                         hinge, entropy_where, squares, smoothed)))  # fmt: skip
INFINITE = by_name(*((fn, "loss") for fn in (where_of_two_with_gradients, ppo_unclipped, masked_entropy, some_counted)))


@pytest.mark.parametrize("name", [*ZERO, *INFINITE])
def test_gradients_are_those_of_eager(name: str) -> None:
    fn, _ = {**ZERO, **INFINITE}[name]
    found = []
    for options in (None, {**SMALL, "mst.loss_gradient": "forward"}):
        torch.manual_seed(0)
        model, x = Parts(fn), torch.randn(T, H, requires_grad=True)
        loss = (torch.compile(model, backend="mst", options=options) if options else model)(x)
        loss.backward()
        found.append([loss.detach(), model.head.weight.grad, x.grad])
    (report,) = mst_fx.reports()
    assert chunked(report, "loss")
    assert "formed in the forward" in str(report)
    if name == "some_counted":  # rows of tokens left out are 0 in eager; the weight's gradient is NaN all the same
        found = [f[:2] for f in found]
    assert bool(found[0][1].isfinite().all()) == (name in ZERO)
    for plain, ours in zip(*found, strict=True):
        if name in INFINITE:  # infinity here and NaN there are alike
            plain, ours = plain.isfinite(), ours.isfinite()
        torch.testing.assert_close(ours, plain, equal_nan=True)


def test_tokens_are_told_only_where_some_can_be_left_out() -> None:
    from mst_fx.ops import BODIES

    before = set(BODIES)
    model = Parts(lambda s, x: (s.head(x).logsumexp(-1) ** 2).mean())
    torch.compile(model, backend="mst", options=SMALL)(torch.randn(T, H, requires_grad=True)).backward()
    (name,) = BODIES.keys() - before
    assert not BODIES[name].tells_ignored
