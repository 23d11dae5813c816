"""The reference works: a function of no arguments that runs one training step, and what it trains.

Shapes: ``B`` batch, ``S`` sequence, ``T = B*S`` tokens, ``H`` hidden, ``I`` intermediate, ``V`` vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass
class Work:
    """One training step: ``step(fn)`` runs forward and backward with ``fn`` in place of ``module``."""

    module: nn.Module
    inputs: dict[str, torch.Tensor]
    loss: Callable[[Any], torch.Tensor]
    grad_output: torch.Tensor | None = None

    def step(self, fn: Callable[..., Any]) -> torch.Tensor:
        """Run forward and backward; gradients add to what is there."""
        out = self.loss(fn(**self.inputs))
        out.backward(self.grad_output)
        return out.detach()

    def clear(self) -> None:
        """Free the gradients."""
        self.module.zero_grad(set_to_none=True)
        for value in self.inputs.values():
            value.grad = None


class Head(nn.Module):
    """Logits and cross-entropy, labels shifted by the caller."""

    def __init__(self, hidden: int, vocab: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab, hidden) / hidden**0.5)

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden, self.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), labels.view(-1))


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, intermediate, bias=False)
        self.up = nn.Linear(hidden, intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def head(tokens: int = 4096, hidden: int = 512, vocab: int = 32000, batch: int = 1, **common: Any) -> Work:
    """Logits and loss of T tokens, one label in seven ignored."""
    x = torch.randn(batch, tokens // batch, hidden, dtype=common["dtype"], device=common["device"], requires_grad=True)
    labels = torch.randint(0, vocab, (batch, tokens // batch), device=common["device"])
    labels[:, ::7] = -100
    return Work(Head(hidden, vocab).to(common["device"], common["dtype"]), {"hidden": x, "labels": labels}, lambda o: o)


def mlp(tokens: int = 8192, hidden: int = 1024, intermediate: int = 3584, **common: Any) -> Work:
    """One SwiGLU block over T tokens."""
    x = torch.randn(1, tokens, hidden, dtype=common["dtype"], device=common["device"], requires_grad=True)
    grad = torch.randn_like(x, requires_grad=False)
    return Work(SwiGLU(hidden, intermediate).to(common["device"], common["dtype"]), {"x": x}, lambda o: o, grad)


def llama(
    seq_len: int = 4096, layers: int = 4, hidden: int = 512, intermediate: int = 1792, vocab: int = 32000,
    heads: int = 8, kv_heads: int = 2, checkpointing: bool = False, **common: Any,
) -> Work:  # fmt: skip
    """HF ``LlamaForCausalLM`` with random weights and tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocab, max_position_embeddings=2**17, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(common["device"], common["dtype"]).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.randint(0, vocab, (1, seq_len), device=common["device"])
    return Work(model, {"input_ids": ids, "labels": ids}, lambda o: o.loss)


WORKS: dict[str, Callable[..., Work]] = {"head": head, "mlp": mlp, "llama": llama}
