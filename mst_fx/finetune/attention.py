"""Which attention a model trains with, and the sentence that says so."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mst_fx.commands.models import UsageError

CAUSAL = "sdpa_causal"


# NOTE [causal without a mask] Transformers lets SDPA be causal by a flag, which its flash kernel needs, only where it
# can look at the position ids. Under torch.compile it can't, and makes an S x S mask: sequences might be packed with
# positions that start anew. Ours never do (``data.py``: one run of positions per sequence, no padding), so the mask
# says nothing that the flag does not, except where a layer's window is narrower than the sequence.
def causal_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Return no mask where plain causal attention is meant, else what SDPA's own mask function returns."""
    window = kwargs.get("local_size")
    plain = (
        "allow_is_causal_skip" in kwargs
        and kwargs.get("attention_mask") is None
        and not kwargs.get("use_vmap")
        and kwargs.get("q_length") == kwargs.get("kv_length")
        and (window is None or window >= kwargs["kv_length"])
    )
    return None if plain else sdpa_mask(*args, **kwargs)


def choose_attention(
    config: Any, use_flash_attn: bool, exactly: str | None, device: torch.device, length: int, half: bool
) -> tuple[str | None, str]:
    """Return the name for ``from_pretrained(attn_implementation=...)``, and a sentence for the log.

    Args:
        config: The model's.
        use_flash_attn: flash-attn where it is there, else PyTorch's flash kernel.
        exactly: The user's own choice, which is taken or refused.
        device: Where it will run.
        length: Tokens per sequence.
        half: Whether attention is computed in bf16 or fp16.

    Raises:
        UsageError: If ``exactly`` asks for flash-attn and it is not there.
    """
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    missing = _flash_attn_missing(device, half)
    if exactly:
        if exactly.startswith("flash_attention") and missing:
            raise UsageError(
                f"--attn_implementation {exactly}: {missing}; leave it out, and --use_flash_attn True takes "
                "PyTorch's own flash kernel"
            )
        return exactly, f"attention: {exactly}, as asked for"
    if not use_flash_attn:
        return None, "attention: what Transformers takes for this model (--use_flash_attn False)"
    if getattr(model, "_supports_flash_attn", False) and not missing:
        return "flash_attention_2", "attention: flash-attn"
    why = missing or "flash-attn does not support this model"
    # Soft-capped attention scores (Gemma 2) are in neither SDPA nor a flash kernel of PyTorch; Transformers 5.17 says
    # that they are, and leaves the cap out.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if capped or not getattr(model, "_supports_sdpa", False):
        if getattr(model, "_supports_flex_attn", False) and device.type == "cuda":
            return "flex_attention", f"attention: PyTorch's FlexAttention ({why}; SDPA can't compute this model's)"
        return "eager" if capped else None, f"attention: the model's own code ({why}; SDPA can't compute this model's)"
    if not getattr(model, "_supports_attention_backend", False):
        return "sdpa", f"attention: PyTorch's SDPA ({why})"
    AttentionInterface.register(CAUSAL, sdpa_attention_forward)
    AttentionMaskInterface.register(CAUSAL, causal_mask)
    window = getattr(config.get_text_config(), "sliding_window", None)
    note = f", with an S x S mask in layers whose window is {window}" if window and window < length else ""
    return CAUSAL, f"attention: PyTorch's SDPA, causal without a mask, so its own flash kernel ({why}){note}"


def _flash_attn_missing(device: torch.device, half: bool) -> str:
    """Return why flash-attn can't be used; nothing if it can."""
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    if device.type != "cuda":
        return f"flash-attn does not run on {device.type}"
    return "" if half else "flash-attn needs --bf16 or --fp16"
