"""Random models for the fuzz suite: a ``Program`` says in a few words what a model computes, ``Built`` runs it.

Terms:
    step: one computation on a wide value ``[B, S, I]``; all in ``STEPS`` keep tokens apart.
    trap: a computation of the same shape that mixes tokens; with one between the projections nothing may be chunked.
    reader: something else that reads the wide value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

H, V = 16, 61

Wide = Callable[[torch.Tensor, "Block"], torch.Tensor]


def _centered(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(-1, keepdim=True)


def _masked_fill(x: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(x < -1, 0.5)


def _in_place(x: torch.Tensor) -> torch.Tensor:
    y = x * 1.5
    y.mul_(0.5).add_(0.1)
    return y


def _written(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[..., :3] = 0.25
    return y


def _without_gradient(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return make()


def _folded(x: torch.Tensor) -> torch.Tensor:
    b, s, i = x.shape
    return F.gelu(x.view(b, s, 4, i // 4).transpose(1, 2)).transpose(1, 2).reshape(b, s, i)


def _flattened(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x.reshape(-1, x.shape[-1])).view_as(x)


def _swapped(x: torch.Tensor) -> torch.Tensor:
    return F.softplus(x.permute(2, 0, 1)).permute(1, 2, 0)


def _literal(x: torch.Tensor) -> torch.Tensor:
    b, s, i = (int(d) for d in x.shape)
    return F.silu(x.reshape(b * s, i)).view(b, s, i)


STEPS: dict[str, Wide] = {
    "gelu": lambda x, m: F.gelu(x),
    "tanh_gelu": lambda x, m: F.gelu(x, approximate="tanh"),
    "silu": lambda x, m: F.silu(x),
    "relu2": lambda x, m: F.relu(x).square(),
    "scalar": lambda x, m: x * m.scalar + 0.1,
    "vector": lambda x, m: x * m.vector,
    "bias": lambda x, m: x + m.vector.view(1, 1, -1),
    "layer_norm": lambda x, m: F.layer_norm(x, x.shape[-1:], m.vector),
    "rms": lambda x, m: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3),
    "softmax": lambda x, m: torch.softmax(x, -1) * 8,
    "log_softmax": lambda x, m: torch.log_softmax(x, dim=-1),
    "centered": lambda x, m: _centered(x),
    "glu_halves": lambda x, m: torch.cat(
        [F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], x[..., : x.shape[-1] // 2]], -1
    ),
    "split": lambda x, m: torch.cat([p * (k + 1) for k, p in enumerate(x.split(x.shape[-1] // 4, -1))], -1),
    "folded": lambda x, m: _folded(x),
    "flattened": lambda x, m: _flattened(x),
    "swapped": lambda x, m: _swapped(x),
    "literal": lambda x, m: _literal(x),
    "feature_cumsum": lambda x, m: x.cumsum(-1) / 8,
    "feature_sort": lambda x, m: x.sort(-1).values,
    "clamp": lambda x, m: x.clamp(-1, 2),
    "where": lambda x, m: torch.where(x > 0, x, x * m.scalar),
    "masked_fill": lambda x, m: _masked_fill(x),
    "in_place": lambda x, m: _in_place(x),
    "written": lambda x, m: _written(x),
    "token_mask": lambda x, m: x * m.mask.to(x.dtype),
    "token_scale": lambda x, m: x * m.narrow.sum(-1, keepdim=True),
    "gate": lambda x, m: x * torch.sigmoid(F.linear(m.narrow, m.up2)),
    "second": lambda x, m: x + F.linear(m.narrow, m.up2),
    "same_size": lambda x, m: F.linear(x, m.square),
    "detached": lambda x, m: x * x.detach().abs(),
    "no_grad": lambda x, m: x * _under_no_grad(x),
    "no_grad_max": lambda x, m: x * _without_gradient(lambda: x.max(-1, keepdim=True).values),
    "no_grad_split": lambda x, m: x * _without_gradient(lambda: torch.cat(x.chunk(2, -1)[::-1], -1)),
    "dtype_trip": lambda x, m: (x.double() * 1.25).to(x.dtype),
    "row_max": lambda x, m: x / x.abs().amax(-1, keepdim=True).clamp_min(1e-3),
    "topk": lambda x, m: x * (x >= x.topk(3, -1).values[..., -1:]),
}


def _under_no_grad(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.sigmoid(x)


def _pairs(x: torch.Tensor) -> torch.Tensor:
    """Two tokens side by side; their batch where the length is odd."""
    return x.reshape(-1, 2 * x.shape[-1]) if x.shape[1] % 2 == 0 else x.transpose(0, 1).reshape(x.shape[1], -1)


TRAPS: dict[str, Wide] = {
    "cumsum": lambda x, m: x.cumsum(1),
    "batch_cumsum": lambda x, m: x.cumsum(0),
    "softmax_tokens": lambda x, m: torch.softmax(x, 1),
    "roll": lambda x, m: x.roll(1, 1),
    "flip": lambda x, m: x.flip(1),
    "mean_tokens": lambda x, m: x - x.mean(1, keepdim=True),
    "mean_all": lambda x, m: x - x.mean(),
    "max_all": lambda x, m: x / x.detach().abs().max(),
    "first_token": lambda x, m: x + x[:, :1],
    "last_token": lambda x, m: x * torch.sigmoid(x[:, -1:]),
    "shift": lambda x, m: torch.cat([x[:, :1], x[:, :-1]], 1),
    "reorder": lambda x, m: x.transpose(0, 1).reshape(x.shape),
    "square_transpose": lambda x, m: x.transpose(1, 2).reshape(x.shape),
    "fold": lambda x, m: _pairs(x).softmax(-1).reshape(x.shape),
    "index": lambda x, m: x[:, torch.arange(x.shape[1] - 1, -1, -1)],
    "attend": lambda x, m: torch.softmax(x @ x.transpose(1, 2), -1) @ x,
    "sort_tokens": lambda x, m: x.sort(1).values,
    "topk_tokens": lambda x, m: x * (x >= x.topk(1, dim=1).values),
    "std_tokens": lambda x, m: x / (x.std(1, keepdim=True, correction=0) + 1),
    "position": lambda x, m: x * torch.arange(x.shape[1], dtype=x.dtype).view(1, -1, 1).cumsum(1) + x.cumsum(1),
    "matmul_tokens": lambda x, m: torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril() @ x,
}  # fmt: skip

UPS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]] = {
    "linear": lambda x, w, b: F.linear(x, w, b),
    "matmul": lambda x, w, b: x @ w.T if b is None else x @ w.T + b,
    "method": lambda x, w, b: x.matmul(w.t()) if b is None else x.matmul(w.t()).add(b),
    "addmm": lambda x, w, b: _addmm(x, w, b),
    "einsum": lambda x, w, b: torch.einsum("bsh,ih->bsi", x, w) + (0 if b is None else b),
    "conv": lambda x, w, b: F.conv1d(x.transpose(1, 2), w[..., None], b).transpose(1, 2),
}


def _addmm(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    bias = torch.zeros(w.shape[0], dtype=x.dtype) if b is None else b
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), w.T).view(*x.shape[:-1], w.shape[0])


Loss = Callable[[torch.Tensor, torch.Tensor, nn.Module], torch.Tensor]


def _cross_entropy(**options: Any) -> Loss:
    return lambda x, y, m: F.cross_entropy(x.flatten(0, -2), y.flatten(), **options)


def _log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits, -1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]


def _masked_mean(x: torch.Tensor, y: torch.Tensor, m: nn.Module) -> torch.Tensor:
    per_token = F.cross_entropy(x.flatten(0, -2), y.flatten(), reduction="none")
    mask = (y.flatten() != -100).to(x.dtype)
    return (per_token * mask).sum() / mask.sum().clamp_min(1)


def _sequence_loss(x: torch.Tensor, y: torch.Tensor, m: nn.Module) -> torch.Tensor:
    return -F.logsigmoid((_log_probs(x, y) * (y != -100)).sum(-1)).mean()


def _with_z(x: torch.Tensor, y: torch.Tensor, m: nn.Module) -> torch.Tensor:
    return _cross_entropy()(x, y, m) + 1e-2 * torch.logsumexp(x, -1).square().mean()


def _with_metrics(x: torch.Tensor, y: torch.Tensor, m: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        accuracy = (x.argmax(-1) == y).to(x.dtype).mean()
    return _cross_entropy()(x, y, m) + 0 * accuracy


def _distilled(x: torch.Tensor, y: torch.Tensor, m: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        teacher = torch.softmax(F.linear(m.last_hidden, m.embed) / 2, -1)
    return F.kl_div(torch.log_softmax(x / 2, -1).view(-1, V), teacher.view(-1, V), reduction="batchmean")


def _joined(x: torch.Tensor, y: torch.Tensor, m: nn.Module) -> torch.Tensor:
    loss = _cross_entropy()(x, y, m)
    loss += 0.1 * m.last_hidden.square().mean()
    return loss


LOSSES: dict[str, Loss] = {
    "distilled": _distilled,
    "joined": _joined,
    "mean": _cross_entropy(),
    "sum": _cross_entropy(reduction="sum"),
    "smoothing": _cross_entropy(label_smoothing=0.1),
    "per_token": lambda x, y, m: _cross_entropy(reduction="none")(x, y, m).square().sum(),
    "scaled": lambda x, y, m: _cross_entropy(reduction="sum")(x, y, m) * 65536 / 7,
    "float": lambda x, y, m: F.cross_entropy(x.double().view(-1, V), y.view(-1)).to(x.dtype),
    "shifted": lambda x, y, m: F.cross_entropy(x[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1), reduction="sum"),
    "padded": lambda x, y, m: _cross_entropy(reduction="sum")(x, F.pad(y, (0, 1), value=-100)[..., 1:].contiguous(), m),
    "class_first": lambda x, y, m: F.cross_entropy(x.transpose(1, 2), y),
    "capped": lambda x, y, m: F.cross_entropy((torch.tanh(x / 3) * 3).view(-1, V), y.view(-1)),
    "nll": lambda x, y, m: F.nll_loss(torch.log_softmax(x, -1).view(-1, V), y.view(-1)),
    "log_probs": lambda x, y, m: -(_log_probs(x, y) * (y != -100)).sum(),
    "masked": _masked_mean,
    "sequence": _sequence_loss,
    "z": _with_z,
    "metrics": _with_metrics,
    "entropy": lambda x, y, m: -(torch.softmax(x, -1) * torch.log_softmax(x, -1)).sum(-1).mean(),
    "two": lambda x, y, m: _cross_entropy()(x, y, m) + 0.5 * _cross_entropy(reduction="sum")(x * 0.5, y.flip(1), m),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One block: how it projects, what is between, who else reads the wide value."""

    up: str = "linear"
    down: str = "linear"
    steps: tuple[str, ...] = ("silu",)
    trap: str | None = None
    trap_at: int = 0
    bias: bool = False
    wide: int = 48
    adapter: bool = False
    """A low-rank update beside both projections, as LoRA adds."""
    reader: str | None = None
    """None, "penalty" (its mean square joins the loss), "metric" (without a gradient)."""
    frozen: tuple[str, ...] = ()
    checkpointed: bool = False


@dataclasses.dataclass(frozen=True)
class Program:
    """A model and its inputs. ``repr`` of one is all that is needed to build it again."""

    blocks: tuple[BlockSpec, ...] = (BlockSpec(),)
    loss: str = "mean"
    batch: int = 2
    length: int = 23
    shared_blocks: bool = False
    tied: bool = False
    returns_logits: bool = False
    ignored: int = 7
    input_grad: bool = True
    frozen_head: bool = False
    seed: int = 0


class Block(nn.Module):
    """``x + down(steps(up(x)))``."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.spec = spec
        wide = spec.wide
        self.up = nn.Parameter(torch.randn(wide, H) / math.sqrt(H))
        self.up2 = nn.Parameter(torch.randn(wide, H) / math.sqrt(H))
        self.down = nn.Parameter(torch.randn(H, wide) / math.sqrt(wide))
        self.square = nn.Parameter(torch.randn(wide, wide) / math.sqrt(wide))
        self.up_bias = nn.Parameter(torch.randn(wide) * 0.1) if spec.bias else None
        self.down_bias = nn.Parameter(torch.randn(H) * 0.1) if spec.bias else None
        self.vector, self.scalar = nn.Parameter(torch.rand(wide) + 0.5), nn.Parameter(torch.tensor(0.7))
        if spec.adapter:
            self.up_a, self.up_b = nn.Parameter(torch.randn(3, H) / 4), nn.Parameter(torch.randn(wide, 3) / 4)
            self.down_a, self.down_b = nn.Parameter(torch.randn(3, wide) / 4), nn.Parameter(torch.randn(H, 3) / 4)
        for name in spec.frozen:
            getattr(self, name).requires_grad_(False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.spec.checkpointed:
            return checkpoint(self.run, x, mask, use_reentrant=False)  # type: ignore[return-value]
        return self.run(x, mask)

    def run(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        spec = self.spec
        self.narrow, self.mask = x, mask
        wide = UPS[spec.up](x, self.up, self.up_bias)
        if spec.adapter:
            wide = wide + F.linear(F.linear(x, self.up_a), self.up_b) * 0.5
        functions = [STEPS[s] for s in spec.steps]
        if spec.trap is not None:
            functions.insert(min(spec.trap_at, len(functions)), TRAPS[spec.trap])
        for function in functions:
            wide = function(wide, self)
        extra = x.new_zeros(())
        if spec.reader == "penalty":
            extra = 1e-2 * wide.square().mean()
        elif spec.reader == "metric":
            extra = 0 * wide.detach().abs().mean()
        out = x + UPS[spec.down](wide, self.down, self.down_bias)
        if spec.adapter:
            out = out + F.linear(F.linear(wide, self.down_a), self.down_b) * 0.5
        del self.narrow, self.mask
        return out, extra


class Built(nn.Module):
    """The model of a program: embedding of given hidden states, blocks, head, loss."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        torch.manual_seed(program.seed)
        self.program = program
        first = Block(program.blocks[0])
        self.blocks = nn.ModuleList([first])
        for spec in program.blocks[1:]:
            self.blocks.append(first if program.shared_blocks else Block(spec))
        self.embed = nn.Parameter(torch.randn(V, H))
        self.head = self.embed if program.tied else nn.Parameter(torch.randn(V, H) / math.sqrt(H))
        if program.frozen_head and not program.tied:
            self.head.requires_grad_(False)

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor) -> Any:
        x = hidden + F.embedding(ids, self.embed)
        mask = (ids % 3 != 0)[..., None]
        total = x.new_zeros(())
        for block in self.blocks:
            x, extra = block(x, mask)
            total = total + extra
        self.last_hidden = F.layer_norm(x, (H,))
        logits = F.linear(self.last_hidden, self.head)
        loss = LOSSES[self.program.loss](logits, labels, self) + total
        del self.last_hidden
        return (loss, logits) if self.program.returns_logits else loss


def inputs_of(program: Program) -> dict[str, torch.Tensor]:
    """Random inputs of a program in fp64, one label in ``ignored`` ignored (0: none)."""
    generator = torch.Generator().manual_seed(program.seed + 1)
    shape = (program.batch, program.length)
    labels = torch.randint(0, V, shape, generator=generator)
    if program.ignored:
        labels[:, :: program.ignored] = -100
    hidden = torch.randn(*shape, H, generator=generator, dtype=torch.float64)
    return {
        "hidden": hidden.requires_grad_(program.input_grad),
        "ids": torch.randint(0, V, shape, generator=generator),
        "labels": labels,
    }
