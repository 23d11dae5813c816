"""What can't work is said in one line, before a tensor is on a device."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import is_liger_kernel_available

from mst_fx.commands.models import UsageError, first_line
from mst_fx.finetune.arguments import ModelArguments

_WEIGHTS = ("*.safetensors", "*.bin")


def load_config(args: ModelArguments) -> Any:
    """Read the model's config and hold the command line against it.

    Raises:
        UsageError: If there is no such model, it has no weights, or its positions do not reach.
    """
    name = args.model_name_or_path
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(f"--model_name_or_path {name}: the folder has no config.json")
        if not is_saved(name):
            raise UsageError(f"--model_name_or_path {name}: the folder has no weights ({' or '.join(_WEIGHTS)})")
    elif looks_like_path(name):
        raise UsageError(f"--model_name_or_path {name}: there is no such folder")
    try:
        config = AutoConfig.from_pretrained(name, cache_dir=args.cache_dir)
    except (OSError, ValueError) as e:
        where = "the folder's config can't be read" if folder.is_dir() else "neither a folder here nor on the hub"
        raise UsageError(f"--model_name_or_path {name}: {where} ({first_line(e)})") from e
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    length = args.model_max_length
    if length < 2:
        raise UsageError(f"--model_max_length {length}: a sequence needs at least 2 tokens")
    if positions and length > positions:
        raise UsageError(
            f"--model_max_length {length} is beyond the model's {positions} positions (max_position_embeddings); "
            f"take at most {positions}, or a model whose config stretches them (rope scaling)"
        )
    return config


def load_tokenizer(args: ModelArguments, config: Any) -> Any:
    """Load the tokenizer that belongs to the model.

    Raises:
        UsageError: If there is none, or it has tokens that the model does not have.
    """
    name = args.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, cache_dir=args.cache_dir)
    except (OSError, ValueError, ImportError) as e:
        raise UsageError(f"--model_name_or_path {name}: no usable tokenizer ({first_line(e)})") from e
    vocab = config.get_text_config().vocab_size
    if len(tokenizer) > vocab:
        raise UsageError(f"{name}: the tokenizer has {len(tokenizer)} tokens, the model only {vocab}")
    return tokenizer


def check_checkpoint(checkpoint: str, args: ModelArguments, config: Any) -> None:
    """Refuse to go on from a checkpoint of another kind of training, or of another model.

    Raises:
        UsageError: If it is one.
    """
    anew = "--overwrite_output_dir True starts anew, another --output_dir keeps both"
    adapters = Path(checkpoint, "adapter_config.json").is_file()
    if adapters != args.low_rank_training:
        kind = "adapters (--low_rank_training True)" if adapters else "all weights"
        raise UsageError(f"{checkpoint} is of a training of {kind}; {anew}")
    try:
        saved = json.loads(Path(checkpoint, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # adapters have none
        return
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        ours = getattr(config, name, None)
        if name in saved and ours is not None and saved[name] != ours:
            raise UsageError(f"{checkpoint} is of another model ({name} {saved[name]}, not {ours}); {anew}")


def is_saved(folder: str) -> bool:
    """Whether a folder holds the weights of a model, or of adapters."""
    found = (p for pattern in _WEIGHTS for p in Path(folder).glob(pattern) if p.name != "training_args.bin")
    return any(p.stat().st_size for p in found)


def check_training(training: TrainingArguments) -> None:
    """Refuse what Trainer would stumble over once the data is packed and the model loaded.

    Raises:
        UsageError: If a number makes no sense, or an optimizer or a tracker is not installed.
    """
    for name, least in (("per_device_train_batch_size", 1), ("gradient_accumulation_steps", 1), ("learning_rate", 0)):
        value = getattr(training, name)
        if value < least:
            raise UsageError(f"--{name} {value}: at least {least}")
    if training.max_steps <= 0 and training.num_train_epochs <= 0:
        raise UsageError(f"--num_train_epochs {training.num_train_epochs}: that is no training")
    try:
        Trainer.get_optimizer_cls_and_kwargs(training)
    except (ImportError, ValueError) as e:
        raise UsageError(f"--optim {getattr(training.optim, 'value', training.optim)}: {first_line(e)}") from e
    if training.use_liger_kernel and not is_liger_kernel_available():
        raise UsageError("--use_liger_kernel: liger-kernel is not installed, and not needed here: mst does its work")
    try:
        for tracker in get_reporting_integration_callbacks(training.report_to):
            tracker()
    except Exception as e:
        raise UsageError(f"--report_to {' '.join(training.report_to)}: {first_line(e)}") from e


def make_folder(flag: str, name: str) -> None:
    """Make a folder that a flag names, and see that it can be written to.

    Raises:
        UsageError: If it can't.
    """
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UsageError(f"--{flag} {name}: can't be written to ({e.strerror or e})") from e


def looks_like_path(name: str) -> bool:
    """Return whether a name can only be meant as a path: the hub's are ``name`` or ``owner/name``."""
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or (os.sep == "\\" and "\\" in name)
