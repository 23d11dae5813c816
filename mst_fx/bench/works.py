"""The reference works: a function of no arguments that runs one training step, and what it trains.

Shapes: ``B`` batch, ``S`` sequence, ``T = B*S`` tokens, ``H`` hidden, ``I`` intermediate, ``V`` vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mst_fx.commands.models import DTYPES, ModelSpec, UsageError, build_model
from mst_fx.commands.outputs import named_tensors, trained
from mst_fx.config import did_you_mean
from mst_fx.measure import peak_over_start


@dataclasses.dataclass
class Work:
    """One training step: ``step(fn)`` runs forward and backward with ``fn`` in place of ``module``."""

    name: str
    module: nn.Module
    inputs: dict[str, Any]
    loss: Callable[[Any], torch.Tensor]
    tokens: int
    grad_output: torch.Tensor | None = None
    optimizer: torch.optim.Optimizer | None = None
    args: tuple[Any, ...] = ()

    def step(self, fn: Callable[..., Any]) -> torch.Tensor:
        """Run forward and backward, and the optimizer if there is one; else gradients add to what is there."""
        out = self.loss(fn(*self.args, **self.inputs))
        out.backward(self.grad_output)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return out.detach()

    def peak(self, fn: Callable[..., Any], device: str) -> int:
        """Return the bytes that a step needs at its peak over its start; gradients are freed before and after."""
        self.clear()
        found, _ = peak_over_start(lambda: self.step(fn), device)
        self.clear()
        return found

    def clear(self) -> None:
        """Free the gradients."""
        self.module.zero_grad(set_to_none=True)
        for value in (*self.args, *self.inputs.values()):
            if isinstance(value, torch.Tensor):
                value.grad = None

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradients of the parameters."""
        return {n: p.grad for n, p in self.module.named_parameters() if p.grad is not None}

    def in_double(self) -> Work:
        """Return the same work in fp64."""
        inputs = {
            k: v.detach().double().requires_grad_(v.requires_grad) if v.is_floating_point() else v
            for k, v in self.inputs.items()
        }
        grad = None if self.grad_output is None else self.grad_output.double()
        return dataclasses.replace(self, module=copy.deepcopy(self.module).double(), inputs=inputs, grad_output=grad)


class Head(nn.Module):
    """Logits and cross-entropy, labels shifted by the caller."""

    def __init__(self, hidden: int, vocab: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab, hidden) / hidden**0.5)

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean loss; logits in the dtype of the weight, the loss in at least fp32."""
        logits = F.linear(hidden, self.weight)
        logits = logits.view(-1, logits.shape[-1])
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.view(-1))


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, intermediate, bias=False)
        self.up = nn.Linear(hidden, intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


def head(tokens: int = 4096, hidden: int = 512, vocab: int = 32000, batch: int = 1, **common: Any) -> Work:
    """Logits and loss of T tokens, one label in seven ignored."""
    x = torch.randn(batch, tokens // batch, hidden, dtype=common["dtype"], device=common["device"], requires_grad=True)
    labels = torch.randint(0, vocab, (batch, tokens // batch), device=common["device"])
    labels[:, ::7] = -100
    with torch.device(common["device"]):
        module = Head(hidden, vocab).to(common["dtype"])
    return Work("head", module, {"hidden": x, "labels": labels}, lambda o: o, tokens)


def mlp(tokens: int = 8192, hidden: int = 1024, intermediate: int = 3584, **common: Any) -> Work:
    """One SwiGLU block over T tokens."""
    x = torch.randn(1, tokens, hidden, dtype=common["dtype"], device=common["device"], requires_grad=True)
    grad = torch.randn_like(x, requires_grad=False)
    module = SwiGLU(hidden, intermediate).to(common["device"], common["dtype"])
    return Work("mlp", module, {"x": x}, lambda o: o, tokens, grad)


def llama(
    seq_len: int = 4096, layers: int = 4, hidden: int = 512, intermediate: int = 1792, vocab: int = 32000,
    heads: int = 8, kv_heads: int = 2, batch: int = 1, checkpointing: bool = False, adamw: bool = False, **common: Any,
) -> Work:  # fmt: skip
    """HF ``LlamaForCausalLM`` with random weights and tokens; ``adamw`` adds an optimizer's step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocab, max_position_embeddings=2**20, use_cache=False,
        torch_dtype=common["dtype"],
    )  # fmt: skip
    with torch.device(common["device"]):
        model = LlamaForCausalLM(config).to(common["dtype"]).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.randint(0, vocab, (batch, seq_len), device=common["device"])
    optimizer = _adamw(model, common["device"]) if adamw else None
    return Work("llama", model, {"input_ids": ids, "labels": ids}, lambda o: o.loss, batch * seq_len, None, optimizer)


def own(
    hf: str | None = None, entry: str | None = None, settings: Mapping[str, Any] | None = None,
    seq_len: int | None = None, batch: int | None = None, checkpointing: bool = False, adamw: bool = False,
    **common: Any,
) -> Work:  # fmt: skip
    """A model of the user's, as ``ModelSpec`` names it; ``dtype`` None leaves it as it is made.

    Raises:
        UsageError: If it can't be made, or is no ``torch.nn.Module``.
    """
    dtype = _dtype_name(common["dtype"])
    spec = ModelSpec(entry, hf, dict(settings or {}), batch, seq_len, dtype, common["device"], checkpointing)
    subject = build_model(spec)
    model = subject.model
    if not isinstance(model, nn.Module):
        raise UsageError(f"--entry {entry}: a torch.nn.Module is measured, its parameters are what is trained")
    optimizer = _adamw(model, common["device"]) if adamw else None
    tokens = _tokens([*subject.args, *subject.kwargs.values()])
    return Work("own", model, subject.kwargs, _total, tokens, None, optimizer, subject.args)


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    return next((name for name, d in DTYPES.items() if d is dtype), None)


def _tokens(inputs: Sequence[Any]) -> int:
    """Return the rows of the first input that has any: its elements, without the features of a floating one."""
    first = next((v for v in inputs if isinstance(v, torch.Tensor) and v.ndim), None)
    if first is None:
        return 1
    return first.numel() // first.shape[-1] if first.is_floating_point() and first.shape[-1] else first.numel()


def _total(output: Any) -> torch.Tensor:
    """Return what an output is trained by as one scalar; what is no scalar goes in with its mean."""
    found = trained(named_tensors(output, "output")).values()
    if not found:
        raise UsageError("nothing in the model's output needs a gradient")
    return torch.stack([v.mean().float() for v in found]).sum()


def _adamw(model: nn.Module, device: str) -> torch.optim.Optimizer:
    """Return AdamW, fused on a GPU: the default's temporaries are as large as all weights and hide every other peak."""
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")


WORKS: dict[str, Callable[..., Work]] = {"head": head, "mlp": mlp, "llama": llama, "own": own}

LLAMA3_8B = {"hidden": 4096, "intermediate": 14336, "vocab": 128256, "layers": 32, "heads": 32, "kv_heads": 8}
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "llama3-8b": {
        "head": {"tokens": 8192, "hidden": 4096, "vocab": 128256},
        "mlp": {"tokens": 65536, "hidden": 4096, "intermediate": 14336},
        "llama": {**LLAMA3_8B, "seq_len": 8192},
    }
}
"""Shapes of a model by the name ``--model`` gives it, per work."""


def sizes_of(work: str) -> dict[str, int | bool]:
    """Return the sizes that a work takes, with their defaults."""
    found = inspect.signature(WORKS[work]).parameters.values()
    return {p.name: p.default for p in found if p.kind is not inspect.Parameter.VAR_KEYWORD}


def check_sizes(work: str, given: Mapping[str, Any]) -> dict[str, int | bool]:
    """Return a work's sizes, defaults filled in.

    Raises:
        UsageError: If one is not known, is no positive number, or does not go with another.
    """
    known = sizes_of(work)
    for name, value in given.items():
        if name not in known:
            raise UsageError(f"{work} has no size {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}")
        if isinstance(known[name], bool) and not isinstance(value, bool):
            raise UsageError(f"--set {name}={value}: true or false")
        if not isinstance(known[name], bool) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UsageError(f"--set {name}={value}: a number of at least 1")
    sizes = {**known, **given}
    for whole, part in (("tokens", "batch"), ("hidden", "heads"), ("heads", "kv_heads")):
        if {whole, part} <= sizes.keys() and sizes[whole] % sizes[part]:
            raise UsageError(f"{whole} {sizes[whole]} can't be divided by {part} {sizes[part]}")
    return sizes


def flops_of_own(sizes: Mapping[str, Any], dtype: torch.dtype) -> tuple[int, int]:
    """Return the same of a model of Transformers, from fake tensors.

    Raises:
        UsageError: If the model can't be made.
    """
    spec = ModelSpec(None, sizes["hf"], dict(sizes.get("settings", {})), dtype=_dtype_name(dtype), fake=True)
    model = build_model(spec).model
    assert isinstance(model, nn.Module)
    parameters = sum(p.numel() for p in model.parameters())
    return parameters, 6 * parameters * sizes.get("batch", 1) * sizes["seq_len"]


def flops_of(work: str, sizes: Mapping[str, int | bool]) -> tuple[int, int]:
    """Return the parameters of a work and about the FLOPs of one step, attention left out."""
    hidden = sizes["hidden"]
    if work == "head":
        parameters = sizes["vocab"] * hidden
    elif work == "mlp":
        parameters = 3 * hidden * sizes["intermediate"]
    else:
        attention = 2 * hidden * hidden * (sizes["heads"] + sizes["kv_heads"]) // sizes["heads"]
        parameters = 2 * sizes["vocab"] * hidden + sizes["layers"] * (3 * hidden * sizes["intermediate"] + attention)
    tokens = sizes["tokens"] if "tokens" in sizes else sizes["batch"] * sizes["seq_len"]
    return parameters, 6 * parameters * tokens
