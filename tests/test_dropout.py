"""Randomness inside a region: one mask for forward and backward, reproducible, of the right mean."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import mst_fx
from tests.harness import EAGER

OPTIONS = {"mst.chunk_tokens": 8, **EAGER}


class Dropped(nn.Module):
    """Linear up and down: the gradient tells which mask the backward saw."""

    def __init__(self, p: float = 0.5, in_place: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.p = nn.Linear(4, 64, bias=False), nn.Linear(64, 4, bias=False), p
        self.in_place = in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.dropout(self.up(x), self.p, self.training, self.in_place))


@pytest.mark.parametrize("in_place", [False, True])
def test_backward_sees_the_forwards_mask(in_place: bool) -> None:
    model = Dropped(in_place=in_place).double()
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


class Layers(nn.Module):
    """Residual MLPs with dropout between the projections and behind them; maybe checkpointed."""

    def __init__(self, layers: int = 2, reentrant: bool | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Dropped(0.5) for _ in range(layers))
        self.after, self.reentrant = nn.Dropout(0.25), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if self.reentrant is None:
                x = x + self.after(layer(x))
            else:
                x = x + self.after(checkpoint(layer, x, use_reentrant=self.reentrant))
        return x


def derivative_error(fn: Any, model: nn.Module, x: torch.Tensor) -> float:
    """Compare the gradients of one seeded run with finite differences of runs with the same seed."""

    def run(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(11)
        return fn(x)

    y = run(x)
    tangent = torch.randn_like(y)
    model.zero_grad(set_to_none=True)
    x.grad = None
    torch.manual_seed(12)  # what the backward may draw must not matter
    y.backward(tangent)
    worst = 0.0
    with torch.no_grad():
        for p in [x, *model.parameters()]:
            direction, start = torch.randn_like(p), p.clone()
            ends = []
            for sign in (1, -1):
                p.copy_(start + sign * 1e-6 * direction)
                # With gradients on, so that it is the same graph that runs.
                with torch.enable_grad():
                    ends.append((run(x).detach() * tangent).sum())
            p.copy_(start)
            slope = (ends[0] - ends[1]) / 2e-6
            worst = max(worst, abs((slope - (p.grad * direction).sum()).item()) / (1 + abs(slope.item())))
    return worst


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("reentrant", [None, False])
def test_several_layers_and_checkpointing(reentrant: bool | None, compiler: str) -> None:
    model = Layers(reentrant=reentrant).double()
    fn = torch.compile(model, backend="mst", options={**OPTIONS, "mst.compiler": compiler})
    x = torch.randn(2, 13, 4, dtype=torch.float64, requires_grad=True)
    assert derivative_error(fn, model, x) < 1e-6
    assert len(mst_fx.reports()[-1].chunked) == 2, str(mst_fx.reports()[-1])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("preserve", [True, False])
def test_eager_checkpoint_around_a_compiled_layer(reentrant: bool, preserve: bool) -> None:
    """The checkpoint restores the generators' states, from which the masks' seeds come."""
    layer = Dropped(0.5).double()
    inner = torch.compile(layer, backend="mst", options=OPTIONS)

    def fn(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(inner, x, use_reentrant=reentrant, preserve_rng_state=preserve)

    x = torch.randn(2, 13, 4, dtype=torch.float64, requires_grad=True)
    error = derivative_error(fn, layer, x)
    assert error < 1e-6 if preserve else error > 1e-3  # without, eager is as wrong: that is what the flag is for
    assert len(mst_fx.reports()[-1].chunked) == 1


def test_layers_steps_and_chunks_have_masks_of_their_own() -> None:
    """Ones in, identity projections: what comes out is the mask."""
    model = Layers(2)
    with torch.no_grad():
        for layer in model.layers:
            layer.up.weight.fill_(1 / 4)
            layer.down.weight.copy_(torch.eye(64)[:4])
    masks: list[torch.Tensor] = []
    fns = [torch.compile(layer, backend="mst", options=OPTIONS) for layer in model.layers]
    for _ in range(2):
        masks += [(fn(torch.ones(2, 32, 4)) != 0).flatten(0, 1) for fn in fns]
    chunks = [m[i : i + 8] for m in masks for i in range(0, 64, 8)]
    for i, one in enumerate(chunks):
        assert 0.1 < one.float().mean() < 0.9
        assert not any(torch.equal(one, two) for two in chunks[:i])


def test_mean_and_variance_of_the_mask() -> None:
    model = Dropped(0.3)
    with torch.no_grad():
        model.up.weight.fill_(1 / 4)
        model.down.weight.copy_(torch.eye(64)[:4])
    y = torch.compile(model, backend="mst", options={**OPTIONS, "mst.chunk_tokens": 1024})(torch.ones(1, 50_000, 4))
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert abs(y.mean().item() - 1) < 0.01
    assert abs(y.var().item() - 0.3 / 0.7) < 0.01
    rows = y[0] - y[0].mean(0)
    assert (rows.T @ rows / len(rows)).fill_diagonal_(0).abs().max() < 0.01  # features are independent
    assert (rows[1:] * rows[:-1]).mean().abs() < 0.01  # and so are tokens


class DroppedLogits(nn.Module):
    """Dropout on the logits: inside the loss's region."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.drop = nn.Linear(4, 32), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        labels = torch.arange(x.shape[0] * x.shape[1], device=x.device) % 32
        return F.cross_entropy(self.drop(self.head(x)).flatten(0, 1), labels)


@pytest.mark.parametrize("setting", ["forward", "recompute"])
def test_dropout_before_the_loss(setting: str) -> None:
    model = DroppedLogits().double()
    fn = torch.compile(model, backend="mst", options={**OPTIONS, "mst.loss_gradient": setting})
    x = torch.randn(2, 13, 4, dtype=torch.float64, requires_grad=True)
    assert derivative_error(fn, model, x) < 1e-6
    assert [r.kind for r in mst_fx.reports()[-1].chunked] == ["loss"], str(mst_fx.reports()[-1])


RANDOM: dict[str, Any] = {
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, True),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, 0.5, True),
    "dropout1d": lambda x: F.dropout1d(x, 0.5, True),
    "dropout2d": lambda x: F.dropout2d(x[None], 0.5, True)[0],
    "native_dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "rand_like": lambda x: x * (torch.rand_like(x) > 0.5),
    "bernoulli": lambda x: x * torch.bernoulli(torch.sigmoid(x)),
    "noise": lambda x: x + torch.randn_like(x),
    "in_place": lambda x: x * torch.empty_like(x).bernoulli_(0.5),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "gumbel": lambda x: F.gumbel_softmax(x, dim=-1),
}


@pytest.mark.parametrize("name", RANDOM)
def test_other_randomness_is_refused_with_a_reason(name: str) -> None:
    model = Dropped().double()
    model.forward = lambda x: model.down(RANDOM[name](model.up(x)))
    fn = torch.compile(model, backend="mst", options=OPTIONS)
    x = torch.randn(2, 13, 4, dtype=torch.float64, requires_grad=True)
    fn(x).sum().backward()
    report = mst_fx.reports()[-1]
    assert not report.chunked, str(report)
    assert report.regions, name
    assert re.search("random|in place|not known|changes", report.regions[0].reason), report.regions[0].reason


def test_masks_drawn_outside_are_rows_like_any_other_input() -> None:
    model = Dropped().double()
    model.forward = lambda x: model.down(model.up(x) * (torch.rand(x.shape[0], x.shape[1], 64, dtype=x.dtype) > 0.5))
    fn = torch.compile(model, backend="mst", options=OPTIONS)
    x = torch.randn(2, 13, 4, dtype=torch.float64, requires_grad=True)
    assert derivative_error(fn, model, x) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dropout_keeps_the_dtype(dtype: torch.dtype) -> None:
    model = Dropped().to(dtype)
    y = torch.compile(model, backend="mst", options=OPTIONS)(torch.randn(2, 13, 4, dtype=dtype))
    assert y.dtype == dtype
    y.sum().backward()
    assert model.up.weight.grad.dtype == dtype


def test_training_and_evaluation_by_turns() -> None:
    model = Dropped()
    fn = torch.compile(model, backend="mst", options=OPTIONS)
    x = torch.randn(2, 13, 4)
    for training in (True, False, True, False):
        model.train(training)
        same = torch.allclose(fn(x), model.down(model.up(x)), atol=1e-6)
        assert same == (not training)
