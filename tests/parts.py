"""A head, an MLP and a few buffers: small functions of them are compared with eager, output by output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import mst_fx
from tests.harness import EAGER, chunked, error

T, H, I, V = 32, 6, 20, 24  # noqa: E741
SMALL = {"mst.chunk_tokens": 8, **EAGER}
LABELS = torch.arange(T) % V


class Parts(nn.Module):
    """A head, an MLP with a quantized projection, an accumulator; ``fn(self, x)`` is the model."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.head, self.up, self.down = (nn.Linear(*s, bias=False) for s in ((H, V), (H, I), (I, H)))
        self.q = nn.Buffer(torch.arange(I * H, dtype=torch.int8).view(I, H))
        self.scale, self.total, self.three = (nn.Buffer(torch.ones(s) / 8) for s in ((1,), (), (3,)))
        self.fn = fn

    def forward(self, x: torch.Tensor) -> Any:
        return self.fn(self, x)


def run(fn: Callable[..., Any], options: dict[str, Any] | None) -> dict[str, torch.Tensor]:
    """Return outputs, gradients and buffers of one step in fp64."""
    torch.manual_seed(0)
    model = Parts(fn)
    for p in [*model.parameters(), *model.buffers()]:
        p.data = p.data.double() if p.is_floating_point() else p.data
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    out = (torch.compile(model, backend="mst", options=options) if options else model)(x)
    outs = out if isinstance(out, tuple) else (out,)
    total = [o.square().sum() for o in outs if o.requires_grad and type(o) is torch.Tensor]
    if total:
        sum(total).backward()  # pyright: ignore
    grads = {n: p.grad for n, p in [("x", x), *model.named_parameters()] if p.grad is not None}
    return {**{f"output {i}": o.detach() + 0 for i, o in enumerate(outs)}, **grads, **dict(model.named_buffers())}


def by_name(*cases: tuple[Callable[..., Any], str]) -> dict[str, tuple[Callable[..., Any], str]]:
    """Return functions by their names, each with the kind of region that is chunked in it, "" for none."""
    return {fn.__name__: (fn, kind) for fn, kind in cases}


def same(fn: Callable[..., Any], kind: str = "") -> mst_fx.Report:
    plain, ours = run(fn, None), run(fn, SMALL)
    assert plain.keys() == ours.keys(), "something has a gradient that had none, or the reverse"
    for name, value in plain.items():
        assert error(ours[name], value.double()) < 1e-12, f"{name}: {error(ours[name], value.double()):.1e} off"
    report = mst_fx.report.join_reports(mst_fx.reports())
    assert not kind or chunked(report, kind), str(report)
    return report
