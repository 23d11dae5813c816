"""Models of equal layers, run with layers shared and apart."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.harness import EAGER

LAYERS = 3
H, I = 16, 48  # noqa: E741
OPTIONS = {"mst.chunk_tokens": 8}
SAME_BITS = {"rtol": 0, "atol": 0}


class Layers(nn.Module):
    """Some layers, each an MLP with a residual and whatever ``extra`` does, under a loss."""

    def __init__(self, extra: Callable[[torch.Tensor], torch.Tensor], count: int = LAYERS, wrapped: Any = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(extra) for _ in range(count))
        self.wrapped = wrapped or (lambda layer, x: layer(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.wrapped(layer, x)
        return x.cumsum(1).square().mean()


class Layer(nn.Module):
    def __init__(self, extra: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.mix = nn.Linear(H, H)
        self.mlp = mlp()
        self.extra = extra
        self.scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.extra(self.mix(x).cumsum(1)) * self.scale
        return x + self.mlp(x)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(H, I), nn.GELU(), nn.Linear(I, H))


def tokens(requires_grad: bool = False) -> dict[str, Any]:
    return {"x": torch.randn(2, 23, H, requires_grad=requires_grad)}


def together_and_apart(
    model: nn.Module,
    inputs: dict[str, Any],
    within: dict[str, float] = SAME_BITS,
    fn: Callable[..., Any] | None = None,
    around: Callable[[], Any] = contextlib.nullcontext,
    **options: Any,
) -> None:
    """Compare loss and gradients with layers shared with those of layers compiled one by one.

    Args:
        model: Whose gradients are compared.
        inputs: What is called with.
        within: The tolerances.
        fn: What is compiled, the model itself if None; it gives the loss or an output with one.
        around: Makes the context it is called in.
        options: More options of the backend.
    """
    found = []
    for share in (True, False):
        torch._dynamo.reset()
        model.zero_grad()
        given = {**OPTIONS, **EAGER, **options, "mst.share_layers": share}
        compiled = torch.compile(fn or model, backend="mst", fullgraph=True, options=given)
        with around():
            out = compiled(**inputs)
        loss = out if isinstance(out, torch.Tensor) else out.loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for shared, alone in zip(*found, strict=True):
        torch.testing.assert_close(shared, alone, **within)
