"""What the installed torch and Transformers can do without this package, found by trying.

A probe returns "" where they can, else a sentence: what is missing. ``require(probe())`` skips a test with it.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
import transformers.integrations.moe
from torch import nn
from torch._dynamo.utils import counters

VERSIONS = f"torch {torch.__version__}, Transformers {transformers.__version__}"


def require(missing: str) -> None:
    """Skip the test where something is missing."""
    if missing:
        pytest.skip(missing)


def probe(what: str) -> Callable[[Callable[[], bool | None]], Callable[[], str]]:
    """Make a probe of a function that raises, or returns False, where something is missing; it runs once."""

    def decorate(fn: Callable[[], bool | None]) -> Callable[[], str]:
        @functools.cache
        def run() -> str:
            torch._dynamo.reset()
            try:
                with torch.random.fork_rng():
                    return "" if fn() is not False else f"{what} ({VERSIONS})"
            except Exception as e:
                return f"{what} ({VERSIONS}: {type(e).__name__})"
            finally:
                torch._dynamo.reset()

        return run

    return decorate


def plain(fn: Any, **kwargs: Any) -> Callable[..., Any]:
    """Compile without this package."""
    return torch.compile(fn, backend="aot_eager", **kwargs)


@probe("plain torch.compile can't train through Transformers' product by groups")
def trains_experts() -> None:
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(2, 4, 4, requires_grad=True)
    ends = torch.tensor([2, 6], dtype=torch.int32)
    fn = plain(lambda a, b: torch.ops.transformers.grouped_mm_fallback(a, b, ends).sum(), fullgraph=True)
    fn(x, weight).backward()


@probe("plain torch.compile gives a parameter no gradient that was frozen in the step before")
def thaws_parameters() -> bool:
    layer = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fn = plain(layer)
    for frozen in (True, False):
        layer[1].requires_grad_(not frozen)
        fn(torch.randn(3, 4)).sum().backward()
    return layer[1].weight.grad is not None


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return 2 * g


class _Stored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fn = _Twice.apply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fn(x)


@probe("Dynamo can't trace an autograd function whose `apply` a module has stored")
def traces_stored_apply() -> None:
    plain(_Stored(), fullgraph=True)(torch.randn(3, requires_grad=True))


@probe("Dynamo breaks the graph at Tensor.requires_grad_()")
def traces_requires_grad() -> None:
    with torch.no_grad():
        plain(lambda x: (2 * x).requires_grad_() + 1, fullgraph=True)(torch.randn(3))


@probe("Dynamo does not see parameters that were swapped for those of another dtype")
def sees_swapped_parameters() -> bool:
    table = nn.Embedding(4, 4)
    fn, ids, graphs = plain(table), torch.arange(4), counters["stats"]["unique_graphs"]
    fn(ids).sum().backward()
    table.zero_grad(set_to_none=True)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        table.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    fn(ids)
    return counters["stats"]["unique_graphs"] == graphs + 2


_INFERENCE = """
import torch
layer = torch.nn.Linear(4, 4)
def run(x):
    h = layer(x)
    with torch.inference_mode():
        y = layer(h).argmax(-1)
    return h.sum(), y
torch.compile(run, backend="aot_eager", fullgraph=True)(torch.randn(3, 4))[0].backward()
"""


@probe("plain torch.compile fails on inference_mode within a graph, and leaves torch unable to form gradients")
def traces_inference_mode() -> bool:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _INFERENCE], capture_output=True, timeout=300)
    return done.returncode == 0
