"""Tiny models of every type in Transformers, made by shrinking what their configs have in common: names of sizes.

No model is known by name. An attribute whose name says that it is a width, a number of heads or layers, a
vocabulary, gets a small value in every config and in the configs nested in it; what is derived from these by the
constructor is derived again.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

VOCAB, LENGTHS = 128, (23, 32, 64)
MAX_PARAMETERS = 30_000_000
# The first pattern that matches an attribute's whole name decides; None leaves it as it is.
SIZES: tuple[tuple[str, Any], ...] = (
    (r".*(dropout|pdrop|drop_rate|layerdrop|jitter|drop_prob|dropout_rate|_dropout_prob|attn_drop).*", 0.0),
    (r"use_cache", False),
    (r".*_token_id", 2),
    (r".*_token_index|.*_index|seed|.*chunk_size_feed_forward", None),
    (r"(num_)?(local_|n_)?(routed_)?(moe_num_)?experts|num_local_experts|n_routed_experts|moe_num_experts", 4),
    (r"(num_)?experts_per_tok(en)?|num_experts_per_tok(en)?|moe_topk|moe_k|top_k|topk|moe_top_k", 2),
    (r"num_expert_group|n_group|topk_group|n_groups|o_groups|num_query_groups|moe_group", 1),
    (r"zero_expert_num", 2),
    (r"(moe|expert|shared|shared_expert|shared_experts|moe_shared_expert)_(ffn_hidden|intermediate)_size", 48),
    (r".*vocab_size(_per_layer_input)?|.*group_vocab|ngram_vocab_size_base", VOCAB),
    (
        r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size|inner_dim)|d_ff|dff|dim_ff|d_inner|n_inner|"
        r"intermediate_size_mlp|feed_forward_size",
        96,
    ),
    (r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim|rotary_dim|index_head_dim|dim_head|kv_channels", 8),
    (r"qk_head_dim", 16),
    (r"rope_dim|.*lora_rank|.*_rank|hidden_size_per_layer_input|.*prompt_mid_dim|ple_embed_dim", 16),
    (
        r"(swa_|linear_|attention_|mamba_|global_)?(key_|value_|kv_)?head_(dim|size)|d_head|mamba_d_head|"
        r"mamba_headdim|d_kv|attention_head_size|linear_(key|value)_head_dim",
        8,
    ),
    (r"(.*_)?num_(key_value|kv)_heads|num_kv_heads|.*n_kv_heads|num_global_key_value_heads", 2),
    (r"linear_num_(key|value)_heads|linear_num_heads|index_n_heads", 4),
    (r"mamba_n(um)?_heads|n_mamba_heads|mamba_num_heads", 8),
    (r"(.*_)?(num_)?(attention_heads|n_heads|num_heads)|n_head|heads|attention_heads", 4),
    (r"mamba_d_ssm", 64),
    (
        r".*(hidden_size|d_model|n_embd|embed_dim|embedding_size|embedding_dim|emb_dim|lru_width|"
        r"word_embed_proj_dim|hidden_size_global|adapter_input_size)|dim|dim_model",
        32,
    ),
    (r"hidden_sizes|embed_dims|depths", None),
    (
        r".*(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|num_blocks)|num_(en|"
        r"de)coder_layers",
        2,
    ),
    (r"first_k_dense_replace|num_nextn_predict_layers|num_kv_shared_layers|max_window_layers", 1),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length|"
        r"max_(source|target)_positions",
        128,
    ),
    (r"(ssm_)?state_size|mamba_d_state|time_step_rank|mamba_dt_rank", 8),
    (r"(mamba_)?chunk_size|block_size|attention_chunk_size", 8),
    (r"image_size", 32),
    (r"num_mel_bins", 16),
)  # fmt: skip


class NotBuiltError(Exception):
    """A model can't be made small from its config alone; the message says why."""


def small_value(name: str, value: Any) -> Any:
    """Return the small value of an attribute, or the one it has where the name says nothing."""
    for pattern, small in SIZES:
        if re.fullmatch(pattern, name):
            if small is None or isinstance(value, (dict, list, tuple, str)):
                return value
            if value is None and name not in ("head_dim", "num_key_value_heads"):
                return value
            # A rate stays a rate, and nothing grows.
            return min(value, small) if isinstance(value, (int, float)) and not isinstance(value, bool) else small
    return value


def small_config(kind: type, **chosen: Any) -> Any:
    """Return a small config of a class; ``chosen`` sizes go before the table's, where the config has them."""
    default = kind()
    subs = getattr(kind, "sub_configs", None) or {}
    values = {}
    for name in inspect.signature(kind.__init__).parameters:
        try:
            value = getattr(default, name, None)
        except Exception:  # sizes that differ from layer to layer
            continue
        if name in subs and hasattr(value, "to_dict"):
            values[name] = small_config(type(value), **chosen)
        elif name in chosen and value is not None:
            values[name] = chosen[name]
        elif (small := small_value(name, value)) is not value and small != value:
            values[name] = small
    layers = next((values[n] for n in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if n in values), 2)
    reason = ""
    for variant in _variants(default, values, layers):
        try:
            return kind(**variant)
        except Exception as e:
            reason = first_line(e)
    raise NotBuiltError(f"config: {reason}")


def _variants(default: Any, values: dict[str, Any], layers: int) -> Iterator[dict[str, Any]]:
    """Yield arguments for the constructor: lists per layer left to it, then cut to the number of layers."""
    lists = {
        n: v for n, v in default.to_dict().items() if isinstance(v, list) and len(v) > layers and "ratios" not in n
    }
    yield values | dict.fromkeys(n for n in lists if re.search(r"layer|block_type|sparsity", n))
    yield values | {n: _both_kinds(v, layers) for n, v in lists.items()}
    yield values


def _both_kinds(items: list[Any], count: int) -> list[Any]:
    """Return ``count`` items with as many kinds among them as there are places: the first and the next other one."""
    kinds = list(dict.fromkeys(map(str, items)))
    first = [next(i for i in items if str(i) == k) for k in kinds][:count]
    return first + items[: count - len(first)]


CHOICES: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},  # latent attention has as many as heads
    {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1},
    {"num_heads": 8, "head_dim": 8},  # heads that make up an expanded width
    {"pad_token_id": None},
)


def small_model(model_type: str, auto: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Return a tiny random model in train mode without dropout, and inputs that it runs on and has a loss for.

    Raises:
        NotBuiltError: If there is no way, with the reason.
    """
    reason = ""
    for choice in CHOICES:
        try:
            model = _build(model_type, auto, choice)
        except NotBuiltError as e:
            reason = reason or str(e)
            continue
        for length in LENGTHS:
            try:
                inputs = small_inputs(model, length)
                if model(**inputs)["loss"].requires_grad:
                    return model, inputs
                raise NotBuiltError("its loss needs no gradient")
            except Exception as e:
                reason = reason or f"run: {first_line(e)}"
    raise NotBuiltError(reason)


def _build(model_type: str, auto: Any, choice: dict[str, Any]) -> nn.Module:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config = small_config(CONFIG_MAPPING[model_type], **choice)
    except NotBuiltError:
        raise
    except Exception as e:
        raise NotBuiltError(f"config: {first_line(e)}") from e
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and hasattr(part, "is_decoder"):
            part.is_decoder = True
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in auto.from_config(config).parameters())
    except Exception:
        count = 0  # not every model can be made on meta
    if count > MAX_PARAMETERS:
        raise NotBuiltError(f"model: {count / 1e6:.0f} M parameters after shrinking")
    try:
        model = auto.from_config(config, dtype=torch.float32)
    except Exception as e:
        raise NotBuiltError(f"model: {first_line(e)}") from e
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d)):
            module.p = 0.0
    return model.train()


def small_inputs(model: nn.Module, length: int, batch: int = 2) -> dict[str, Any]:
    """Return token ids and labels, one label in seven ignored."""
    names = inspect.signature(model.forward).parameters
    vocab = min(VOCAB, model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(3, vocab, (batch, length))
    labels = ids.clone()
    labels[:, ::7] = -100
    inputs: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if "use_cache" in names:
        inputs["use_cache"] = False
    return inputs


def first_line(error: BaseException) -> str:
    """Return an error as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:160]}"
