"""What is only read detached gets no gradient: None as in eager, not zeros, by which an optimizer would move it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import mst_fx
from tests.harness import EAGER, chunked
from tests.models import H, V

I = 64  # noqa: E741
OPTIONS = {"mst.chunk_tokens": 16, **EAGER}


class Block(nn.Module):
    def __init__(self, out: int = H) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, I), nn.Linear(I, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(F.gelu(self.up(x)))
        return x + y if y.shape == x.shape else y


class Both(nn.Module):
    """What a promised module may give: one result that is trained, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.value = Block(), Block(1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.block(x), self.value(x)


class Model(nn.Module):
    def __init__(self, loss: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.embed, self.head, self.probe = nn.Embedding(V, H), nn.Linear(H, V), nn.Linear(H, V)
        self.student, self.teacher = (nn.Sequential(*(Block() for _ in range(3))) for _ in range(2))
        self.value, self.both = Block(1), mst_fx.tokenwise(Both())
        self.loss = loss

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.loss(self, self.embed(ids), ids)


def picked(s: Any, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return s.head(x).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)


def teacher(s: Any, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    target = s.probe(s.teacher(x)).detach()
    found = F.log_softmax(s.head(s.student(x)), -1)
    return F.kl_div(found.view(-1, V), F.softmax(target, -1).view(-1, V), reduction="batchmean")


def checkpointed_teacher(s: Any, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    target = s.probe(checkpoint(s.teacher, x, use_reentrant=False)).detach()
    return F.cross_entropy(s.head(s.student(x)).view(-1, V), F.softmax(target, -1).view(-1, V))


def probe_of_the_body(s: Any, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(s.probe(s.student(x).detach()).view(-1, V), ids.view(-1))


def baseline(s: Any, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    found = picked(s, s.student(x), ids)
    return -(found * (s.value(x).squeeze(-1) - found).detach()).mean()


def one_result_of_two(s: Any, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    y, value = s.both(x)
    found = picked(s, y, ids)
    return -(found * (value.squeeze(-1) - found).detach()).mean()


def frozen_head_weight(s: Any, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(s.student(x), s.teacher[0].up.weight.detach()).view(-1, I), ids.view(-1) % I)


CASES = (teacher, checkpointed_teacher, probe_of_the_body, baseline, one_result_of_two, frozen_head_weight)


@pytest.mark.parametrize("share_layers", [True, False])
@pytest.mark.parametrize("loss", CASES, ids=lambda fn: fn.__name__)
def test_what_is_read_detached_has_no_gradient(loss: Callable[..., torch.Tensor], share_layers: bool) -> None:
    torch.manual_seed(0)
    plain, ids = Model(loss).double(), torch.randint(0, V, (2, 40))
    ours = copy.deepcopy(plain)
    losses = []
    for model, fn in (
        (plain, plain),
        (ours, torch.compile(ours, backend="mst", options={**OPTIONS, "mst.share_layers": share_layers})),
    ):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            losses.append(fn(ids))
            losses[-1].backward()
            optimizer.step()
    report = mst_fx.reports()[-1]
    assert chunked(report, "loss") == 1, str(report)
    assert chunked(report, "mlp") >= 1, str(report)
    missing = [[n for n, p in m.named_parameters() if p.grad is None] for m in (plain, ours)]
    assert missing[0]
    assert missing[1] == missing[0]
    torch.testing.assert_close(losses[2:], losses[:2], rtol=1e-9, atol=0)


def test_a_first_call_within_a_checkpoint_saves_what_its_second_does() -> None:
    """What is looked at of equal layers while compiling must not reach the hooks by which a checkpoint counts."""
    torch.manual_seed(0)
    stages = [nn.Sequential(Block(), Block()) for _ in range(2)]
    x = torch.randn(2, 40, H, requires_grad=True)
    grads = []
    for fns in (stages, [torch.compile(s, backend="mst", options=OPTIONS) for s in stages]):
        y = x
        for fn in fns:
            y = checkpoint(fn, y, use_reentrant=False)
        y.square().mean().backward()
        grads.append([p.grad for s in stages for p in s.parameters()])
        for s in stages:
            s.zero_grad(set_to_none=True)
    assert chunked(mst_fx.reports()[-1], "mlp") == 2
    torch.testing.assert_close(grads[1], grads[0])
