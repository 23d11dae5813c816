"""What losses in ``tests.losses`` are made of: heads on given hidden states, their inputs, common terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

B, S, H, V = 2, 23, 16, 61
Tensor = torch.Tensor
Loss = Callable[[Any, Tensor, Tensor], Any]


class Heads(nn.Module):
    """Heads on given hidden states; ``loss`` is one of the functions below."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.norm, self.proj, self.value = nn.LayerNorm(H), nn.Linear(H, H), nn.Linear(H, 1)
        self.head, self.head2 = nn.Linear(H, V, bias=False), nn.Linear(H, V, bias=False)
        self.teacher = nn.Linear(H, V, bias=False).requires_grad_(False)
        self.log_var = nn.Parameter(torch.zeros(2))
        self.loss = loss
        self.register_buffer("mask", (torch.rand(B, S) > 0.3).float())
        self.register_buffer("weights", torch.rand(V) + 0.5)
        self.register_buffer("advantages", torch.randn(B))
        self.register_buffer("old_logp", torch.randn(B, S) - 4)

    def forward(self, hidden: Tensor, labels: Tensor) -> Any:
        return self.loss(self, hidden, labels)


def head_inputs() -> dict[str, Any]:
    labels = torch.randint(0, V, (B, S))
    labels[:, ::7] = -100
    return {"hidden": torch.randn(B, S, H, requires_grad=True), "labels": labels}


def ce(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), **options)


def per_token(logits: Tensor, labels: Tensor) -> Tensor:
    return ce(logits, labels, reduction="none").view(labels.shape)


def logp(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.gather(logits.log_softmax(-1), -1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def teacher_logp(s: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return F.log_softmax(s.teacher(x), -1)


def mean_of(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()
