"""The command line: the flags of LongLoRA's and MsT's ``fine-tune.py``, and what ours has beyond them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments

from mst_fx.commands.models import UsageError, first_line
from mst_fx.config import did_you_mean

# Flags that Transformers renamed or dropped, under which published commands still have them.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",  # which takes a share of all steps too
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    "torch_dtype": "dtype",
}
BACKENDS = ("mst", "inductor", "eager")


@dataclass
class ModelArguments:
    """Which model, on which text, compiled how."""

    model_name_or_path: str = field(metadata={"help": "a local folder, or a name on the hub"})
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "a local text, JSONL (.jsonl, .json) or Parquet file, or a name on the hub; without it, the "
            "sources of the Python standard library, for a trial"
        },
    )
    text_column: str = field(default="text", metadata={"help": "which column holds the text"})
    cache_dir: str | None = field(default=None, metadata={"help": "for downloads and for packed data"})
    model_max_length: int = field(default=8192 * 4, metadata={"help": "tokens per sequence; text is packed into these"})
    validation_share: float = field(
        default=0.05, metadata={"help": "share of the sequences held out, if --eval_strategy asks for evaluation"}
    )
    dtype: str = field(
        default="auto", metadata={"help": "of the weights; auto: bfloat16 with --bf16, as the reference, else float32"}
    )
    use_flash_attn: bool = field(
        default=True, metadata={"help": "flash-attn where it is installed, else PyTorch's own flash kernel"}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "exactly this one of Transformers' (flash_attention_2, sdpa, eager, ...)"}
    )
    low_rank_training: bool = field(default=False, metadata={"help": "train adapters (LoRA, by PEFT), not the weights"})
    lora_r: int = field(default=8, metadata={"help": "rank of the adapters"})
    lora_alpha: int = field(default=16, metadata={"help": "their scale, divided by the rank"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "which modules get adapters, as in PEFT's LoraConfig"}
    )
    backend: str = field(
        default="mst", metadata={"help": " | ".join(BACKENDS) + ": what compiles the model, to compare"}
    )
    option: list[str] = field(
        default_factory=list, metadata={"help": "NAME=VALUE ...: options of the backend, e.g. chunk_tokens=1024"}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "start anew even if --output_dir holds a checkpoint to go on from"}
    )


class _Parser(HfArgumentParser):
    """Answers a mistake with one line, not with the list of all flags."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(argv: Sequence[str]) -> tuple[ModelArguments, TrainingArguments]:
    """Read the command line.

    Raises:
        UsageError: On unknown flags and bad values.
    """
    parser = _Parser([ModelArguments, TrainingArguments], prog="mst-fx finetune", allow_abbrev=False)
    known = {f.name for c in (ModelArguments, TrainingArguments) for f in dataclasses.fields(c)}
    argv = _with_defaults([_current(a, known) for a in argv], known)
    if not any(_name(a) == "output_dir" for a in argv) and not {"-h", "--help"} & set(argv):
        raise UsageError("--output_dir is needed: checkpoints, the trained model and the plot go there")
    try:
        model, training, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except (ValueError, ImportError) as e:
        raise UsageError(first_line(e)) from e
    if rest:
        flag = next((a for a in rest if a.startswith("-")), rest[0])
        raise UsageError(f"unknown argument {flag!r}.{did_you_mean(_name(flag), known)}")
    adapters = [a for a in argv if _name(a).startswith("lora_")]
    if adapters and not model.low_rank_training:
        raise UsageError(f"--{_name(adapters[0])} is for adapters, which need --low_rank_training True")
    if model.lora_r < 1:
        raise UsageError(f"--lora_r {model.lora_r}: the rank of adapters is at least 1")
    if not 0 < model.validation_share < 1:
        raise UsageError(f"--validation_share {model.validation_share}: a share of the sequences, between 0 and 1")
    if model.backend not in BACKENDS:
        raise UsageError(f"--backend {model.backend!r} is not one of {', '.join(BACKENDS)}")
    if training.torch_compile:
        raise UsageError("--torch_compile is not for this command: --backend says what compiles the model")
    if training.fsdp and training.parallel_mode.value != "distributed":
        raise UsageError("--fsdp needs several processes: torchrun --nproc_per_node N -m mst_fx.finetune ...")
    if training.label_smoothing_factor:
        raise UsageError(
            "--label_smoothing_factor makes Trainer compute the loss outside the model, from logits in full: not here"
        )
    return model, training


def _name(argument: str) -> str:
    return argument.partition("=")[0].lstrip("-").replace("-", "_")


def _current(argument: str, known: set[str]) -> str:
    """Return a flag by the name that this version of Transformers has for it."""
    if not argument.startswith("--"):
        return argument
    name = _name(argument)
    renamed = RENAMED.get(name)
    if renamed is None or renamed not in known or (name in known and name not in _ALIASES):
        return argument
    return "--" + renamed + argument[2 + len(name) :]


_ALIASES = {"gradient_checkpointing", "gradient_checkpointing_kwargs"}
"""Old names that are still known, and warn."""


def _with_defaults(argv: list[str], known: set[str]) -> list[str]:
    """Turn gradient checkpointing on, and CPUs where there is nothing else, unless the command line speaks of it."""
    given = {_name(a).removeprefix("no_") for a in argv if a.startswith("--")}
    checkpointing = {"activation_checkpointing", "gradient_checkpointing"} & known
    more = [] if given & checkpointing else [f"--{min(checkpointing)}", "True"]
    # Trainer refuses bf16 on a machine without an accelerator unless it is told so.
    if "use_cpu" not in given and not torch.accelerator.is_available():
        more += ["--use_cpu", "True"]
    return [*argv, *more]
