"""Further layers, one per spelling that must be chunked (``TOKENWISE``) and one per near-miss (``NEAR_MISSES``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.models import Between, H, I

E = 4  # experts


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * 0.2)


class Layer(nn.Module):
    """``fn(self, x)`` with the given parts."""

    def __init__(self, fn: Callable[[Any, torch.Tensor], torch.Tensor], **parts: Any) -> None:
        super().__init__()
        self.fn = fn
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fn(self, x)


def layer(fn: Callable[[Any, torch.Tensor], torch.Tensor], **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: Layer(fn, **{name: make() for name, make in parts.items()})


def between(fn: Callable[[torch.Tensor], torch.Tensor], wide: int = I, narrow: int | None = None) -> Any:
    return lambda: Between(fn, wide, narrow)


def linear(a: int, b: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(a, b)


def weight(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: parameter(*shape)


UP_DOWN = {"u": linear(H, I), "d": linear(I, H)}


# -- functions with a backward of their own ----------------------------------------------------------


class Bloom(torch.autograd.Function):
    """Bloom's GELU: a formula and its derivative by hand."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return 0.5 * x * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        t = torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))
        return g * (0.5 * x * (1 - t * t) * (0.79788456 + 0.1070322243 * x * x) + 0.5 * (1 + t))


class StraightThrough(torch.autograd.Function):
    """Rounds; its gradient is that of something else."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.round(x * 4) / 4 + y

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        return g * (x.abs() < 1), None


class CentredGradient(torch.autograd.Function):
    """Token-wise forward, but the gradient is centred over the sequence."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return 2 * (g - g.mean(1, keepdim=True))


class ScaledBy(torch.autograd.Function):
    """Takes a parameter, whose gradient is a sum over tokens."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, scale = ctx.saved_tensors
        return g * scale, (g * x).sum((0, 1))


# -- low-bit weights, adapters -----------------------------------------------------------------------


class Int8(nn.Module):
    """A frozen weight as int8 with a scale per row, dequantised in the forward."""

    def __init__(self, a: int, b: int, trained: bool = False) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randint(-127, 128, (b, a), dtype=torch.int8))
        self.scale = nn.Parameter(torch.rand(b, 1) * 0.004, requires_grad=trained)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.codes.to(x.dtype) * self.scale)


class Int4(nn.Module):
    """A frozen weight as packed 4-bit codes into a table, with a scale per block (NF4)."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.shape = b, a
        self.register_buffer("packed", torch.randint(0, 256, (a * b // 2,), dtype=torch.uint8))
        self.register_buffer("table", torch.randn(16) * 0.2)
        self.register_buffer("absmax", torch.rand(a * b // 16, 1) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes = torch.stack([self.packed >> 4, self.packed & 15], -1).flatten()
        return F.linear(x, (self.table[codes.long()].view(-1, 16) * self.absmax).view(self.shape))


class Lora(nn.Module):
    """Adapters beside a layer that stays as it is; ``dora`` gives the sum a learned size per row."""

    def __init__(self, base: nn.Module, a: int, b: int, count: int = 1, dora: bool = False) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.ModuleList(nn.Linear(a, 4, bias=False) for _ in range(count))
        self.up = nn.ModuleList(nn.Linear(4, b, bias=False) for _ in range(count))
        self.magnitude = parameter(b) if dora else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        for down, up in zip(self.down, self.up, strict=True):
            y = y + 2 * up(down(x))
        if self.magnitude is not None:
            update = sum(up.weight @ down.weight for down, up in zip(self.down, self.up, strict=True))
            norm = (self.base.weight + 2 * update).norm(dim=1).detach()
            y = y + (self.magnitude / norm - 1) * y
        return y


def adapted(make: Callable[[int, int], nn.Module]) -> Callable[[], nn.Module]:
    """A SwiGLU of adapted layers."""
    parts = {name: (lambda a=a, b=b: make(a, b)) for name, (a, b) in {"g": (H, I), "u": (H, I), "d": (I, H)}.items()}
    return layer(lambda s, x: s.d(F.silu(s.g(x)) * s.u(x)), **parts)


# -- experts without routing of tokens ---------------------------------------------------------------


def dense_experts(s: Any, x: torch.Tensor) -> torch.Tensor:
    """Every expert on every token: gpt-oss in training."""
    t = x.reshape(-1, H)
    gate, up = (torch.bmm(t.unsqueeze(0).expand(E, -1, -1), s.u) + s.b[:, None]).chunk(2, -1)
    y = torch.bmm((up.clamp(-7, 7) + 1) * gate * torch.sigmoid(1.702 * gate), s.d)
    return (y * torch.softmax(s.r(t), -1).t()[..., None]).sum(0).view_as(x)


def repeated_experts(s: Any, x: torch.Tensor) -> torch.Tensor:
    """Tokens repeated for every expert and scaled by its score: Llama 4."""
    t = x.reshape(-1, H)
    scores = torch.sigmoid(s.r(t)).transpose(0, 1).reshape(-1, 1)
    gate, up = torch.bmm((t.repeat(E, 1) * scores).view(E, -1, H), s.u).chunk(2, -1)
    return torch.bmm(up * F.silu(gate), s.d).sum(0).view_as(x)


def viewed_experts(s: Any, x: torch.Tensor) -> torch.Tensor:
    """The experts' results viewed as one list of rows, which needs the layout that ``bmm`` gives them: Llama 4."""
    t = x.reshape(-1, H)
    gate, up = torch.bmm(t.repeat(E, 1).view(E, -1, H), s.u).chunk(2, -1)
    return torch.bmm(up * F.silu(gate), s.d).view(-1, H).reshape(E, -1, H).sum(0).view_as(x)


EXPERTS = {"u": weight(E, H, 2 * I), "d": weight(E, I, H), "b": weight(E, 2 * I), "r": linear(H, E)}


def mix_ffn(s: Any, x: torch.Tensor) -> torch.Tensor:
    """A 3 x 3 convolution between the projections, on tokens as an image."""
    image = s.u(x).transpose(1, 2).unsqueeze(2)
    return s.d(F.gelu(s.c(image).flatten(2).transpose(1, 2)))


def mamba(s: Any, x: torch.Tensor) -> torch.Tensor:
    y, z = s.i(x).chunk(2, -1)
    y = F.silu(s.c(y.mT)[..., : x.shape[1]].mT)
    return s.o(y * F.silu(z))


def convnext(s: Any, x: torch.Tensor) -> torch.Tensor:
    image = s.c(x.transpose(1, 2).unsqueeze(2)).permute(0, 2, 3, 1)
    return (s.d(F.gelu(s.u(s.n(image)))) * s.g).squeeze(1)


class Decoder(nn.Module):
    """``nn.TransformerDecoderLayer`` on a learned memory."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(H, 4, I, dropout=0.0, batch_first=True, **kwargs)
        self.memory = parameter(1, 7, H)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, self.memory.expand(x.shape[0], -1, -1))


def top_features(x: torch.Tensor) -> torch.Tensor:
    best = x.topk(8, -1)
    return torch.zeros_like(x).scatter(-1, best.indices, F.gelu(best.values))


def top_tokens(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x).scatter(1, torch.arange(3).view(1, 3, 1).expand(x.shape[0], 3, x.shape[2]), x[:, :3])


TOKENWISE: dict[str, Callable[[], nn.Module]] = {
    "bloom": between(lambda x: Bloom.apply(x)),
    "straight_through": layer(lambda s, x: s.d(StraightThrough.apply(s.u(x), s.v(x))), v=linear(H, I), **UP_DOWN),
    "group_norm": layer(
        lambda s, x: s.d(s.n(s.u(x).flatten(0, 1)).view(*x.shape[:2], I)), n=lambda: nn.GroupNorm(4, I), **UP_DOWN
    ),
    "flip_roll": between(lambda x: F.gelu(x).flip(-1).roll(3, -1)),
    "stack": between(lambda x: torch.stack([F.silu(x[..., ::2]), x[..., 1::2]], -1).flatten(-2)),
    "scatter": between(top_features),
    "index": between(lambda x: F.gelu(x)[..., torch.arange(I - 1, -1, -1)].index_select(-1, torch.arange(I))),
    "repeat": between(lambda x: F.gelu(x[..., : I // 2]).repeat(1, 1, 2)),
    "hardswish": between(F.hardswish),
    "relu_": between(torch.relu_),
    "inplace_flag": between(lambda x: F.silu(x, inplace=True)),
    "inplace_module": lambda: Between(nn.ReLU(inplace=True)),
    "inplace_chain": layer(lambda s, x: s.d(F.silu(s.u(x)).mul_(s.v(x)).add_(1.0)), v=linear(H, I), **UP_DOWN),
    "inplace_border": layer(lambda s, x: s.d(F.gelu(s.u(x))).add_(x).mul_(0.5), **UP_DOWN),
    "assigned": layer(lambda s, x: s.d(F.gelu(first_zeroed(s.u(x)))), **UP_DOWN),
    "masked_fill_": between(lambda x: F.gelu(x).masked_fill_(x > 1, 0.0)),
    "learned_scalars": layer(
        lambda s, x: s.d(torch.tanh(s.a * s.u(x)) * s.g + s.u(x).abs().add(0.1).pow(F.softplus(s.a))),
        a=weight(1), g=weight(I), **UP_DOWN,
    ),
    "three_projections": layer(
        lambda s, x: s.d(F.silu(s.u(x)) * s.v(x) * torch.sigmoid(s.w(x))), v=linear(H, I), w=linear(H, I), **UP_DOWN
    ),
    "wide_between": layer(lambda s, x: s.d(F.silu(s.m(F.gelu(s.u(x))))), m=linear(I, I), **UP_DOWN),
    "transposed_weight": layer(lambda s, x: F.linear(F.gelu(F.linear(x, s.w)), s.w.t()), w=weight(I, H)),
    "einsum_heads": layer(
        lambda s, x: torch.einsum("bsni,nih->bsh", F.gelu(torch.einsum("bsh,hni->bsni", x, s.u)), s.d),
        u=weight(H, 4, I // 4), d=weight(4, I // 4, H),
    ),
    "einsum_weight_first": layer(
        lambda s, x: torch.einsum("hi,...i->...h", s.d, F.gelu(torch.einsum("ih,...h->...i", s.u, x))),
        u=weight(I, H), d=weight(H, I),
    ),
    "einsum_implied": layer(
        lambda s, x: torch.einsum("bis,ih->bsh", F.gelu(torch.einsum("bsh,hi", x, s.u)), s.d),
        u=weight(H, I), d=weight(I, H),
    ),
    "tensordot": layer(
        lambda s, x: torch.tensordot(F.gelu(torch.tensordot(x, s.u, 1)), s.d, ([-1], [1])),
        u=weight(H, I), d=weight(H, I),
    ),
    "tensordot_weight_first": layer(
        lambda s, x: torch.tensordot(s.d, F.gelu(torch.tensordot(s.u, x, ([1], [2]))), ([0], [0])).permute(1, 2, 0),
        u=weight(I, H), d=weight(I, H),
    ),
    "weight_first": layer(lambda s, x: (s.d @ F.gelu(s.u @ x.mT)).mT, u=weight(I, H), d=weight(H, I)),
    "baddbmm": layer(
        lambda s, x: torch.baddbmm(
            s.c, F.gelu(torch.baddbmm(s.b, x, s.u.expand(x.shape[0], -1, -1))), s.d.expand(x.shape[0], -1, -1)
        ),
        u=weight(1, H, I), d=weight(1, I, H), b=weight(1, 1, I), c=weight(1, 1, H),
    ),
    "baddbmm_by_name": layer(
        lambda s, x: s.d(
            F.gelu(s.b.baddbmm(batch1=x, batch2=s.u.expand(x.shape[0], -1, -1), beta=1, alpha=1))
        ),
        u=weight(1, H, I), b=weight(1, 1, I), d=linear(I, H),
    ),
    "conv_kernel_1": layer(
        lambda s, x: s.d(F.gelu(s.u(x.permute(0, 2, 1)))).permute(0, 2, 1),
        u=lambda: nn.Conv1d(H, I, 1), d=lambda: nn.Conv1d(I, H, 1),
    ),
    "convnext": layer(
        convnext, c=lambda: nn.Conv2d(H, H, 3, padding=1, groups=H), n=lambda: nn.LayerNorm(H), g=weight(H), **UP_DOWN
    ),
    "dense_experts": layer(dense_experts, **EXPERTS),
    "viewed_experts": layer(viewed_experts, u=weight(E, H, 2 * I), d=weight(E, I, H)),
    "repeated_experts": layer(repeated_experts, **{k: v for k, v in EXPERTS.items() if k != "b"}),
    "decoder": Decoder,
    "lora_two_adapters": adapted(lambda a, b: Lora(nn.Linear(a, b), a, b, count=2)),
    "dora": adapted(lambda a, b: Lora(nn.Linear(a, b), a, b, dora=True)),
    "qlora_int8": adapted(lambda a, b: Lora(Int8(a, b), a, b)),
    "qlora_int4": adapted(lambda a, b: Lora(Int4(a, b), a, b)),
    "trained_scale": adapted(lambda a, b: Int8(a, b, trained=True)),
}  # fmt: skip

NEAR_MISSES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "centred_gradient": (between(lambda x: CentredGradient.apply(x)), "custom autograd function|mean"),
    "gradient_of_a_parameter": (layer(lambda s, x: s.d(ScaledBy.apply(s.u(x), s.g)), g=weight(I), **UP_DOWN), "custom"),
    "group_norm_over_tokens": (
        layer(lambda s, x: s.d(s.n(s.u(x).mT).mT), n=lambda: nn.GroupNorm(4, I), **UP_DOWN), "group_norm"
    ),
    "roll_everything": (between(lambda x: x.roll(1)), "roll"),
    "stack_of_other_tokens": (between(lambda x: torch.stack([x, x.flip(1)], -1).mean(-1)), "flip"),
    "scatter_tokens": (between(top_tokens), "token"),
    "index_tokens": (between(lambda x: F.gelu(x)[:, torch.arange(x.shape[1] - 1, -1, -1)]), "token"),
    "index_select_tokens": (between(lambda x: x.index_select(1, torch.arange(x.shape[1]).flip(0))), "token"),
    "repeat_tokens": (between(lambda x: x.repeat(1, 2, 1)[:, ::2]), "repeats tokens"),
    "seen_through_a_view": (layer(lambda s, x: seen_twice(s, s.u(x)), **UP_DOWN), "in place"),
    "changed_under_no_grad": (layer(lambda s, x: s.d(F.gelu(halved(s.u(x)))), **UP_DOWN), "in place"),
    "assigned_to_tokens": (layer(lambda s, x: s.d(F.gelu(first_token_zeroed(s.u(x)))), **UP_DOWN), "along a token"),
    "einsum_over_tokens": (
        layer(lambda s, x: torch.einsum("bth,st->bsh", F.gelu(torch.einsum("bsh,ts->bth", x, s.u)), s.d),
              u=weight(69, 23), d=weight(23, 69)), "mixes tokens"
    ),
    "tensordot_over_tokens": (
        layer(lambda s, x: torch.tensordot(F.gelu(torch.tensordot(x, s.u, ([1], [0]))), s.d, ([2], [0])).mT,
              u=weight(23, 69), d=weight(69, 23)), "mixes tokens"
    ),
    "weight_first_over_tokens": (
        layer(lambda s, x: s.d @ F.gelu(s.u @ x), u=weight(69, 23), d=weight(23, 69)), "mixes tokens"
    ),
    "conv_over_channels_of_tokens": (
        layer(lambda s, x: s.d(F.gelu(s.u(x))), u=lambda: nn.Conv1d(23, 69, 1), d=lambda: nn.Conv1d(69, 23, 1)),
        "mixes tokens",
    ),
    "mix_ffn": (layer(mix_ffn, c=lambda: nn.Conv2d(I, I, 3, padding=1, groups=I), **UP_DOWN), "convolution"),
    "mamba": (
        layer(mamba, i=linear(H, 4 * H), c=lambda: nn.Conv1d(2 * H, 2 * H, 4, groups=2 * H, padding=3),
              o=linear(2 * H, H)), "convolution"
    ),
    "weight_of_all_tokens": (
        layer(lambda s, x: s.d(F.gelu(F.linear(x, s.u.weight * x.mean()))), **UP_DOWN), "multiplies|all tokens"
    ),
}  # fmt: skip


def halved(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        x.mul_(0.5)
    return x


def first_token_zeroed(x: torch.Tensor) -> torch.Tensor:
    x[:, 0] = 0
    return x


def first_zeroed(x: torch.Tensor) -> torch.Tensor:
    x[..., 0] = 0.0
    return x


def seen_twice(s: Any, x: torch.Tensor) -> torch.Tensor:
    early = x.view(*x.shape, 1)
    y = s.d(torch.relu_(x))
    return y + early[..., :H, 0]  # sees the change
