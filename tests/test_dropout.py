"""Randomness inside a region: one mask for forward and backward, reproducible, of the right mean."""

import torch
import torch.nn.functional as F
from torch import nn

import mst_fx
from tests.harness import EAGER

OPTIONS = {"mst.chunk_tokens": 8, **EAGER}


class Dropped(nn.Module):
    """Linear up and down: the gradient tells which mask the backward saw."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.up, self.down, self.p = nn.Linear(4, 64, bias=False), nn.Linear(64, 4, bias=False), p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.dropout(self.up(x), self.p, self.training))


def test_backward_sees_the_forwards_mask() -> None:
    model = Dropped().double()
    fn = torch.compile(model, backend="mst", options=OPTIONS)
    x = torch.randn(2, 13, 4, dtype=torch.float64, requires_grad=True)
    y = fn(x)
    assert len(mst_fx.reports()[-1].chunked) == 1
    y.backward(tangent := torch.randn_like(y))
    # The map is linear in x for a fixed mask, so <y, t> = <x, dy/dx^T t>, and the same for each weight.
    inner = (y * tangent).sum()
    torch.testing.assert_close((x * x.grad).sum(), inner)
    torch.testing.assert_close((model.up.weight * model.up.weight.grad).sum(), inner)
    torch.testing.assert_close((model.down.weight * model.down.weight.grad).sum(), inner)


def test_seeded_runs_repeat_and_others_differ() -> None:
    fn = torch.compile(Dropped(), backend="mst", options=OPTIONS)
    x = torch.randn(1, 20, 4)
    first = fn(x)
    torch.manual_seed(7)
    one = fn(x)
    torch.manual_seed(7)
    two = fn(x)
    assert torch.equal(one, two)
    assert not torch.equal(first, one)
    assert not torch.equal(one, fn(x))


def test_mean_is_kept_and_chunks_differ() -> None:
    model = Dropped(0.25)
    fn = torch.compile(model, backend="mst", options=OPTIONS)
    x = torch.randn(1, 4).expand(4000, 4)[None]
    y = fn(x)
    plain = model.down(model.up(x))
    torch.testing.assert_close(y.mean(1), plain.mean(1), atol=0.05, rtol=0.05)
    assert y[0].unique(dim=0).shape[0] > 3900


def test_eval_and_zero_probability_draw_nothing() -> None:
    model = Dropped(0.5).eval()
    x = torch.randn(1, 20, 4)
    torch.testing.assert_close(torch.compile(model, backend="mst", options=OPTIONS)(x), model(x))


def test_transformer_encoder_with_dropout_trains() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 48, dropout=0.1, batch_first=True)
    fn = torch.compile(layer, backend="mst", options=OPTIONS)
    fn(torch.randn(2, 11, 16)).sum().backward()
    assert len(mst_fx.reports()[-1].chunked) == 1, str(mst_fx.reports()[-1])
    assert all(p.grad.isfinite().all() for p in layer.parameters())
