"""Consecutive checkpointed blocks recomputed together: the same numbers, less kept, and where they stay apart."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import mst_fx
from tests.harness import EAGER, check_exact, chunked, reasons, slow_but
from tests.models import hf, hf_inputs
from tests.sharing import H, Layer, Layers, mlp, tokens
from tests.versions import require, trains_experts

JOINED = {"mst.checkpoint_layers": 2, "mst.chunk_tokens": 8, **EAGER}
plain_checkpoint = functools.partial(checkpoint, use_reentrant=False)


def blocks(report: mst_fx.Report | None) -> list[str]:
    """Return the names of the checkpointed blocks of the graph that was compiled."""
    assert report is not None
    return [name for name, _ in report.graphs[0].after.named_children() if name.startswith("wrap_body")]


# -- joined ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but(["llama"], ["llama", "gemma2", "phi3", "qwen3_moe", "gpt2"]))
def test_models_are_exact(name: str) -> None:
    if name == "qwen3_moe":
        require(trains_experts())
    model = hf(name, **({} if name == "gpt2" else {"num_hidden_layers": 4}))
    model.gradient_checkpointing_enable()  # pyright: ignore
    ours = check_exact(model, hf_inputs(name), options=JOINED)
    assert len(blocks(ours.report)) == (1 if name == "gpt2" else 2)
    assert "checkpointed blocks are recomputed in" in reasons(ours.report)


@pytest.mark.parametrize(
    ("size", "share"), slow_but([(2, True), (3, False)], itertools.product([2, 3, 9], [True, False]))
)
def test_same_bits_as_apart(size: int, share: bool) -> None:
    """Five layers, so that one group is smaller than the others."""
    model, inputs, found = Layers(torch.sin, 5, plain_checkpoint), tokens(True), []
    for given in (1, size):
        torch._dynamo.reset()
        inputs["x"].grad = None
        model.zero_grad()
        options = {**JOINED, "mst.checkpoint_layers": given, "mst.share_layers": share}
        loss = torch.compile(model, backend="mst", fullgraph=True, options=options)(**inputs)
        loss.backward()
        found.append([loss.detach(), inputs["x"].grad, *(p.grad for p in model.parameters())])
    assert len(blocks(mst_fx.reports()[-1])) == -(-5 // size)
    assert chunked(mst_fx.reports()[-1], "mlp") == 5
    for apart, joined in zip(*found, strict=True):
        torch.testing.assert_close(apart, joined, rtol=0, atol=0)


def kept(layers: int, size: int) -> int:
    """Return how many values per token are kept for the backward of layers under checkpointing."""
    torch._dynamo.reset()
    model, saved = Layers(torch.sin, layers, plain_checkpoint), []
    options = {**JOINED, "mst.checkpoint_layers": size, "mst.share_layers": False}
    inputs = tokens(True)
    fn = torch.compile(model, backend="mst", options=options)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fn(**inputs)
    own = {p.data_ptr() for p in model.parameters()}
    wide = {t.data_ptr(): t for t in saved if t.data_ptr() not in own}.values()
    return sum(t.numel() for t in wide) // inputs["x"].shape[:2].numel()


def test_one_input_of_a_group_is_kept() -> None:
    assert kept(6, 1) - kept(6, 3) == 4 * H


class Collecting(Layers):
    """Returns what is between the layers, as models do under ``output_hidden_states``."""

    read = False

    def forward(self, x: torch.Tensor) -> Any:
        states = []
        for layer in self.layers:
            x = plain_checkpoint(layer, x)
            states.append(x)
        loss = x.cumsum(1).square().mean()
        return loss + sum(s.square().mean() for s in states) if self.read else (loss, states)


def test_what_is_between_may_be_returned() -> None:
    ours = check_exact(Collecting(torch.sin, 4), tokens(True), options=JOINED)
    assert len(blocks(ours.report)) == 2


class OwnSine(torch.autograd.Function):
    """Its forward and backward are graphs of their own in the graph of a block."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return dy * ctx.saved_tensors[0].cos()


def own_sine(x: torch.Tensor) -> torch.Tensor:
    return OwnSine.apply(x)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("count", [4, 5])
def test_blocks_with_graphs_of_their_own(count: int) -> None:
    """Of five layers the last stays alone."""
    ours = check_exact(Layers(own_sine, count, plain_checkpoint), tokens(True), options=JOINED)
    assert len(blocks(ours.report)) == -(-count // 2)


class TwoValues(nn.Module):
    """Hands two values on, the second untouched by some layers, and reads constants of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(torch.sin) for _ in range(4))
        self.register_buffer("scale", torch.rand(H))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        def run(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return layer(x) * self.scale + y * torch.tensor([0.5, 2.0]).sum(), y + 1

        for layer in self.layers:
            x, y = plain_checkpoint(run, layer, x, y)
        return (x.cumsum(1) * y).mean()


def test_several_values_go_from_block_to_block() -> None:
    ours = check_exact(
        TwoValues(), {"x": tokens()["x"], "y": torch.randn(2, 23, H, requires_grad=True)}, options=JOINED
    )
    assert len(blocks(ours.report)) == 2


def test_dropout_draws_the_same_in_forward_and_recomputation() -> None:
    """The gradient of a sum over dropped values is their mask: recomputed with another it would not be."""

    class Dropped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + nn.functional.dropout(x.sin(), 0.5) ** 2

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(mlp(), Dropped()) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + plain_checkpoint(layer, x)
            return x.square().sum()

    model, x = Model().double(), tokens()["x"].double()
    options = {**JOINED, "mst.compiler": "inductor"}
    fn = torch.compile(model, backend="mst", options=options)

    def loss(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return fn(x)

    given = x.clone().requires_grad_()
    loss(given).backward()
    direction, step = torch.randn_like(x), 1e-6
    with torch.no_grad():
        slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    assert given.grad is not None
    torch.testing.assert_close((given.grad * direction).sum(), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor(dynamic: bool) -> None:
    model = hf("llama", num_hidden_layers=4)
    model.gradient_checkpointing_enable()  # pyright: ignore
    ours = check_exact(model, hf_inputs("llama"), options=JOINED, compiler="inductor", dynamic=dynamic)
    assert len(blocks(ours.report)) == 2


# -- apart -------------------------------------------------------------------------------------------


def between(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return plain_checkpoint(layer, x) + 1


def with_policy(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE

    return checkpoint(
        layer, x, use_reentrant=False, context_fn=functools.partial(create_selective_checkpoint_contexts, policy)
    )


@pytest.mark.parametrize(
    ("wrapped", "count", "why"),
    [
        (between, 4, "is computed between"),
        (with_policy, 4, "has a policy of what to recompute"),
        (plain_checkpoint, 1, "there is one"),
        (None, 4, "there is none"),
    ],
)
def test_left_apart_with_a_reason(wrapped: Callable[..., Any] | None, count: int, why: str) -> None:
    ours = check_exact(Layers(torch.sin, count, wrapped), tokens(True), options=JOINED)
    assert "no checkpointed blocks are joined" in reasons(ours.report)
    assert why in reasons(ours.report)
    assert chunked(ours.report, "mlp") == count


def test_frozen_layers_are_not_recomputed() -> None:
    model = Layers(torch.sin, 5, plain_checkpoint)
    model.layers[:3].requires_grad_(False)
    ours = check_exact(model, tokens(), options=JOINED)
    assert blocks(ours.report) == ["wrap_body_0", "wrap_body_1", "wrap_body_2", "wrap_body_3_to_wrap_body_4"]
    assert "5 checkpointed blocks are recomputed in 4 groups" in reasons(ours.report)
    assert "others stay apart: tag_activation_checkpoint is not recomputed" in reasons(ours.report)


def test_what_is_read_between_stays_saved() -> None:
    """Joined, every group would be recomputed at the start of the backward, and held."""
    model = Collecting(torch.sin, 4)
    model.read = True
    ours = check_exact(model, tokens(True), options=JOINED)
    assert len(blocks(ours.report)) == 4
    assert "reads what tag_activation_checkpoint hands on, too" in reasons(ours.report)


class Centred(nn.Module):
    """Hands on a value made with a running mean, which it then changes: recomputed it would be another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(torch.sin) for _ in range(4))
        self.register_buffer("mean", torch.rand(H))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def run(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
            y = layer(x)
            z = y - self.mean.clone()
            with torch.no_grad():
                self.mean.lerp_(y.detach().mean((0, 1)), 0.5)
            return z

        for layer in self.layers:
            x = plain_checkpoint(run, layer, x)
        return x.cumsum(1).square().mean()


def test_what_changes_in_place_keeps_blocks_apart() -> None:
    """Compared with blocks apart: a buffer changed in a checkpointed block changes twice in eager."""
    found = []
    for size in (1, 2):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, inputs = Centred(), tokens(True)
        options = {**JOINED, "mst.checkpoint_layers": size}
        torch.compile(model, backend="mst", options=options)(**inputs).backward()
        found.append([inputs["x"].grad, model.mean, *(p.grad for p in model.parameters())])
    assert "reads a value that changes in place" in reasons(mst_fx.reports()[-1])
    for apart, joined in zip(*found, strict=True):
        torch.testing.assert_close(apart, joined, rtol=0, atol=0)


class TwoTowers(Layers):
    """Blocks that follow each other and take nothing from each other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(plain_checkpoint(layer, x).cumsum(1).square().mean() for layer in self.layers)  # pyright: ignore


def test_blocks_side_by_side_stay_apart() -> None:
    ours = check_exact(TwoTowers(torch.sin, 3), tokens(True), options=JOINED)
    assert "no checkpointed blocks are joined" in reasons(ours.report)


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2", None])
def test_bad_values_are_refused(value: Any) -> None:
    model = torch.compile(Layers(torch.sin), backend="mst", options={"mst.checkpoint_layers": value})
    with pytest.raises(ValueError, match=r"mst\.checkpoint_layers.*at least 1"):
        model(**tokens())
