"""Complex values between the projections, as in LRU, S4D and rotary gates: they have gradients too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mst_fx
from tests.harness import chunked, error
from tests.parts import LABELS, SMALL, H, I, T, by_name, same


def eigenvalues(s: Any) -> torch.Tensor:
    """Return a complex vector [I] made of real parameters."""
    return torch.exp(-torch.exp(s.up.weight[:, 0]) + 1j * torch.exp(s.up.weight[:, 1]))


def complex_vector(s: Any, x: torch.Tensor) -> torch.Tensor:
    return s.down((s.up(x) * eigenvalues(s)).abs())


def complex_gate_of_a_token(s: Any, x: torch.Tensor) -> torch.Tensor:
    gate = torch.polar(x.norm(dim=-1, keepdim=True), x.sum(-1, keepdim=True))
    return s.down((s.up(x) * gate).abs())


def complex_rows(s: Any, x: torch.Tensor) -> torch.Tensor:
    gate = F.linear(x, s.down.weight.t()).to(torch.complex128).cumsum(0) * 1j
    return s.down((s.up(x) * gate + s.up(x)).abs())


def complex_loss(s: Any, x: torch.Tensor) -> torch.Tensor:
    return ((s.head(x) * torch.exp(1j * s.head.weight[:, 0])).abs() - 1).square().mean()


def complex_sum(s: Any, x: torch.Tensor) -> torch.Tensor:
    return (s.head(x) * torch.exp(1j * s.head.weight[:, 0])).sum().abs()


def made_without_gradients(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.up(x)
    with torch.no_grad():
        z = h * 1j
    return s.down(z.abs() * h)


def logits_without_gradients(s: Any, x: torch.Tensor) -> torch.Tensor:
    logits = s.head(x)
    with torch.no_grad():
        z = torch.exp(1j * logits)
    return F.cross_entropy(logits * z.angle(), LABELS)


CASES = by_name((complex_vector, "mlp"), (complex_gate_of_a_token, "mlp"), (complex_rows, "mlp"),
                (complex_loss, "loss"), (complex_sum, ""), (made_without_gradients, "mlp"),
                (logits_without_gradients, "loss"))  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str) -> None:
    same(*CASES[name])


class Rotated(nn.Module):
    """A token-wise module with a complex parameter."""

    def __init__(self, mixes: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, I), nn.Linear(I, H)
        self.turn = nn.Parameter(torch.randn(I, dtype=torch.complex64))
        self.mixes = mixes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x) * self.turn
        return self.down((h * h.flip(-2) if self.mixes else h).abs())


@pytest.mark.parametrize("verify", [False, True])
def test_promised_module(verify: bool) -> None:
    options = {**SMALL, "mst.verify_tokenwise": verify}
    torch.manual_seed(0)
    module, x = Rotated().double(), torch.randn(T, H, dtype=torch.float64)
    module.turn.data = module.turn.data.to(torch.complex128)
    grads = []
    for run in (module, torch.compile(mst_fx.tokenwise(module), backend="mst", options=options)):
        run(x).square().sum().backward()
        grads.append(torch.view_as_real(module.turn.grad))
        module.zero_grad()
    assert chunked(mst_fx.reports()[-1], "mlp")
    assert error(grads[1], grads[0]) < 1e-12


def test_promise_is_tried_with_complex_parameters() -> None:
    options = {**SMALL, "mst.verify_tokenwise": True}
    with pytest.raises(Exception, match="is not token-wise"):
        torch.compile(mst_fx.tokenwise(Rotated(mixes=True)), backend="mst", options=options)(torch.randn(T, H))


def test_complex_projections_are_listed_with_the_reason() -> None:
    torch.manual_seed(0)
    up, down = (torch.randn(*s, dtype=torch.complex128, requires_grad=True) for s in ((H, I), (I, H)))

    def run(x: torch.Tensor) -> torch.Tensor:
        return (F.relu((x @ up).abs()) * (x @ up) @ down).abs().sum()

    x = torch.randn(T, H, dtype=torch.complex128)
    losses = [fn(x) for fn in (run, torch.compile(run, backend="mst", options=SMALL))]
    truth, grads = (torch.autograd.grad(loss, [up, down]) for loss in losses)
    regions = mst_fx.reports()[-1].regions
    assert [r.status for r in regions] == ["skipped"] * 2
    assert all("multiplies complex numbers" in r.reason for r in regions)
    torch.testing.assert_close(grads, truth)
