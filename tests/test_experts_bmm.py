"""Mixtures of experts that take a matrix per token and expert."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mst_fx
from tests.harness import EAGER, check_exact, chunked

H, I, E, K = 16, 48, 4, 2  # noqa: E741
OPTIONS = {"mst.chunk_tokens": 16, **EAGER}


class Taken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E)
        self.up, self.down = nn.Parameter(torch.randn(E, H, I)), nn.Parameter(torch.randn(E, I, H))


class ByEinsum(Taken):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(K, -1)
        y = F.silu(torch.einsum("td,tkdi->tki", x, self.up[ids]))
        return torch.einsum("tki,tkid,tk->td", y, self.down[ids], weights).square().mean()


class ByBmm(Taken):
    """As Transformers 5.17 has it, which bounds the experts' numbers."""

    def __init__(self, clamped: bool) -> None:
        super().__init__()
        self.clamped = clamped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(K, -1)
        ids, share = chosen.reshape(-1), weights.reshape(-1)
        ids = ids.clamp(0, E - 1) if self.clamped else ids
        rows = x.repeat_interleave(K, dim=0).unsqueeze(1)
        y = torch.bmm(F.silu(torch.bmm(rows, self.up[ids])), self.down[ids]).squeeze(1) * share.unsqueeze(-1)
        return y.view(-1, K, H).sum(dim=1).square().mean()


@pytest.mark.parametrize("clamped", [False, True])
def test_products_of_a_list(clamped: bool) -> None:
    torch.manual_seed(0)
    ours = check_exact(ByBmm(clamped), {"x": torch.randn(46, H, requires_grad=True)}, options=OPTIONS)
    assert chunked(ours.report, "mlp") == 1, str(ours.report)


def test_matrices_taken_per_token_and_expert_are_told() -> None:
    """As gpt-fast has them: the widest values there are, in a spelling that is not followed."""
    fn = torch.compile(ByEinsum(), backend="mst", options=OPTIONS)
    fn(torch.randn(46, H)).backward()
    (region,) = mst_fx.reports()[-1].regions
    assert (region.status, region.tokens) == ("skipped", 46 * K)
    assert "a matrix per token and expert" in region.reason
