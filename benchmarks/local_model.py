"""A small causal LM with a tokenizer in a local folder, for where no hub is in reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mst_fx.commands.demo import standard_library_text

SIZE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
# What each family needs beyond the common sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": HEADS,
    "qwen2": HEADS,
    "mistral": {**HEADS, "sliding_window": 64},
    "gemma2": {**HEADS, "head_dim": 16, "sliding_window": 64},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
}


def make_tokenizer(text: str, vocab: int) -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level BPE of ``vocab`` tokens on a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(  # pyright: ignore
        vocab_size=vocab, special_tokens=list(SPECIAL.values()), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([text], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def make_model_folder(
    folder: Path, family: str = "llama", vocab: int = 512, positions: int = 512, seed: int = 0, **sizes: Any
) -> Path:
    """Save a model with random weights, and a tokenizer trained on the standard library's sources.

    Args:
        folder: Where to.
        family: A model type of Transformers, from ``FAMILIES``.
        vocab: Tokens of the tokenizer; the model has some more, for those that a family's tokenizer adds.
        positions: Longest sequence, where the model has such a bound.
        seed: Of the weights.
        **sizes: Config values that replace those of ``SIZE`` and ``FAMILIES``.
    """
    tokenizer = make_tokenizer(standard_library_text(200_000).decode(errors="replace"), vocab)
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(
        family,
        **{
            **SIZE, **FAMILIES[family], "vocab_size": vocab + 64, "max_position_embeddings": positions,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None,
            **sizes,
        },
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
