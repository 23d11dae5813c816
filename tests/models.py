"""One tiny model per spelling that must be chunked, and one per near-miss that must not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

B, S, H, V = 2, 23, 16, 61
I = 48  # noqa: E741


# -- Transformers ------------------------------------------------------------------------------------


def hf(name: str, **overrides: Any) -> nn.Module:
    """A tiny random model of a Transformers causal-LM type, in train mode without dropout."""
    import transformers as t

    small: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64, "use_cache": False,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    small |= {k: overrides.pop(k) for k in [*overrides] if k in small}
    build = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**small, **overrides)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**small, **overrides)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**small, head_dim=8, **overrides)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**small, **overrides)),
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(
            **small, head_dim=8, attn_implementation="eager", **overrides)),
        "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**small, head_dim=8, **overrides)),
        "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**small, **overrides)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=128, n_positions=64, use_cache=False, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, **overrides)),
        "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(
            **{k: v for k, v in small.items() if k != "num_key_value_heads"}, **overrides)),
        "gptj": lambda: t.GPTJForCausalLM(t.GPTJConfig(
            n_embd=32, n_layer=2, n_head=4, vocab_size=128, n_positions=64, rotary_dim=4, use_cache=False,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **overrides)),
        "falcon_mamba": lambda: t.FalconMambaForCausalLM(t.FalconMambaConfig(
            hidden_size=32, num_hidden_layers=2, vocab_size=128, state_size=4, use_cache=False, **overrides)),
        "mamba2": lambda: t.Mamba2ForCausalLM(t.Mamba2Config(
            hidden_size=32, num_hidden_layers=2, vocab_size=128, state_size=8, num_heads=8, head_dim=8, n_groups=1,
            chunk_size=8, use_cache=False, **overrides)),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**small, num_local_experts=4, num_experts_per_tok=2,
            **{"experts_implementation": "eager", **overrides})),
        "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**small, head_dim=8, moe_intermediate_size=48,
            num_experts=4, num_experts_per_tok=2, **overrides)),
        "gpt_oss": lambda: t.GptOssForCausalLM(t.GptOssConfig(**small, head_dim=8, num_local_experts=4,
            num_experts_per_tok=2, **overrides)),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(
            d_model=32, d_ff=96, d_kv=8, num_layers=2, num_heads=4, vocab_size=128, dropout_rate=0.0, use_cache=False,
            decoder_start_token_id=0, **overrides)),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(
            hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128,
            max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **overrides)),
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(
            hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=20,
            patch_size=4, num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **overrides)),
    }  # fmt: skip
    return build[name]().train()


def hf_inputs(name: str, batch: int = 2, length: int = 23, vocab: int = 128) -> dict[str, Any]:
    """Random inputs with one label in seven ignored."""
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 20, 20), "labels": torch.randint(0, 5, (batch,))}
    ids = torch.randint(3, vocab, (batch, length))
    labels = ids.clone()
    labels[:, ::7] = -100
    return {"input_ids": ids, "labels": labels}


LARGE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 65536,
}  # fmt: skip
"""Sizes of Llama 3 8B, for the config of ``mst_fx.commands.models``."""


# -- models of our own -------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """Embedding, residual blocks, head, loss."""

    def __init__(self, *blocks: nn.Module, vocab: int = V, hidden: int = H) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, -2), labels.reshape(-1))


def token_inputs(batch: int = B, length: int = S, vocab: int = V) -> dict[str, Any]:
    labels = torch.randint(0, vocab, (batch, length))
    labels[:, ::7] = -100
    return {"ids": torch.randint(0, vocab, (batch, length)), "labels": labels}


class SwiGLU(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(H, I, bias), nn.Linear(H, I, bias), nn.Linear(I, H, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Between(nn.Module):
    """Two projections with any function between them."""

    def __init__(self, fn: Callable[[torch.Tensor], torch.Tensor], wide: int = I, narrow: int | None = None) -> None:
        super().__init__()
        self.up, self.down, self.fn = nn.Linear(H, wide), nn.Linear(narrow or wide, H), fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.fn(self.up(x)))


class Attention(nn.Module):
    """Causal attention with wide heads, so that its projections look like an MLP's."""

    def __init__(self, heads: int = 4, size: int = 12) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv, self.out = nn.Linear(H, 3 * heads * size), nn.Linear(heads * size, H)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, s, -1))


class NanoBlock(nn.Module):
    """A nanoGPT block: pre-norm attention, pre-norm GELU MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(H), Attention(4, 4), nn.LayerNorm(H)
        self.mlp = Between(nn.GELU(), 4 * H)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Parallel(nn.Module):
    """GPT-J style: attention and MLP read the same normed input."""

    def __init__(self) -> None:
        super().__init__()
        self.ln, self.attn, self.mlp = nn.LayerNorm(H), Attention(4, 4), Between(nn.GELU("tanh"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.ln(x)
        return self.attn(y) + self.mlp(y)


class Feedforward(nn.TransformerEncoder):
    """``nn.TransformerEncoder`` as a block."""

    def __init__(self, **kwargs: Any) -> None:
        layer = nn.TransformerEncoderLayer(H, 4, I, dropout=0.0, batch_first=True, **kwargs)
        super().__init__(layer, 2, enable_nested_tensor=False)


def gelu_new(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def rms_inside(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype)


def four_dims(x: torch.Tensor) -> torch.Tensor:
    b, s, i = x.shape
    return (F.silu(x.view(b, s, 4, i // 4)) * 2).reshape(b, s, i)


def channels_first(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x.transpose(1, 2)).transpose(1, 2)


TOKENWISE: dict[str, Callable[[], nn.Module]] = {
    "swiglu": SwiGLU,
    "swiglu_bias": lambda: SwiGLU(bias=True),
    "relu2": lambda: Between(lambda x: F.relu(x).square()),
    "gelu_new": lambda: Between(gelu_new),
    "gelu_tanh": lambda: Between(nn.GELU("tanh")),
    "fused_gate_up": lambda: Between(lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], 2 * I, I),
    "sliced_gate_up": lambda: Between(lambda x: F.silu(x[..., :I]) * x[..., I:], 2 * I, I),
    "glu": lambda: Between(nn.GLU(-1), 2 * I, I),
    "norm_inside": lambda: Between(rms_inside),
    "layer_norm_inside": lambda: Between(nn.LayerNorm(I)),
    "softmax_features": lambda: Between(nn.Softmax(-1)),
    "four_dims": lambda: Between(four_dims),
    "channels_first": lambda: Between(channels_first),
    "prelu": lambda: Between(nn.PReLU()),
    "nano": NanoBlock,
    "parallel": Parallel,
    "encoder": Feedforward,
    "encoder_pre_norm": lambda: Feedforward(norm_first=True, activation="gelu"),
}


class CausalConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(I, I, 3, groups=I)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


class BatchNormTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(I)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.flatten(0, 1)).view_as(x)


class TokenMixing(nn.Module):
    """MLP-Mixer: the projections themselves run over the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(S, 3 * S), nn.Linear(3 * S, S)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)


class Gated(nn.Module):
    """Scales by one number for the whole tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.abs().max()


@torch.compiler.nested_compile_region
def graph_within(x: torch.Tensor) -> torch.Tensor:
    """Any work in a graph of its own, as a Triton kernel's is."""
    return F.gelu(x)


NEAR_MISSES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "causal_conv": (lambda: Between(CausalConv()), "convolution|pads"),
    "cumsum": (lambda: Between(lambda x: x.cumsum(1)), "cumsum"),
    "softmax_sequence": (lambda: Between(nn.Softmax(1)), "softmax"),
    "mean_sequence": (lambda: Between(lambda x: x - x.mean(1, keepdim=True)), "mean"),
    "batch_norm": (lambda: Between(BatchNormTokens()), "batch_norm"),
    "mixer": (TokenMixing, "mixes tokens"),
    "attention": (lambda: Attention(4, 12), "attention|tokens|scaled_dot"),
    "per_tensor_scale": (lambda: Between(Gated()), "max"),
    "roll": (lambda: Between(lambda x: x.roll(1, 1)), "roll"),
    "flip": (lambda: Between(lambda x: x.flip(1)), "flip"),
    "sort_tokens": (lambda: Between(lambda x: x.sort(1).values), "sort"),
    "shift": (lambda: Between(lambda x: torch.cat([x[:, :1], x[:, :-1]], 1)), "token"),
    "reorder": (lambda: Between(lambda x: x.transpose(0, 1).reshape(x.shape)), "reorders"),
    "fold_tokens": (
        lambda: Between(lambda x: F.gelu(x.reshape(x.shape[0], -1, 2 * S).cumsum(-1)).reshape(x.shape)),
        "token",
    ),
    "topk_tokens": (lambda: Between(lambda x: x * (x >= x.topk(3, dim=1).values[:, -1:])), "topk"),
    "graph_within": (lambda: Between(lambda x: graph_within(graph_within(x))), "not looked into"),
    "matrix_per_sequence": (lambda: Between(lambda x: torch.softmax(x @ x.transpose(1, 2), -1) @ x), "multiplies"),
}
