"""Model, Trainer, log and plot of ``mst-fx finetune``."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainerState, TrainingArguments

import mst_fx
from mst_fx.commands.models import DTYPES, UsageError, first_line, parse_options
from mst_fx.finetune.arguments import ModelArguments, parse
from mst_fx.finetune.attention import choose_attention
from mst_fx.finetune.checks import check_checkpoint, check_training, is_saved, load_config, load_tokenizer, make_folder
from mst_fx.finetune.data import collate, find_source, pack, tokenizer_stamp
from mst_fx.measure import highest_memory
from mst_fx.recipe import has_checkpointing, minisequence
from mst_fx.report import join_reports

GIB = 2**30


def run_finetune(argv: Sequence[str]) -> int:
    """Fine-tune, save the model and the plot under ``--output_dir``; returns the exit status.

    Raises:
        UsageError: On a mistake in the command line; no step was made by then.
    """
    args, training = parse(argv)
    options = _backend_options(args)
    config = load_config(args)
    dtype = _dtype(args, training)
    half = training.bf16 or training.fp16 or dtype in (torch.bfloat16, torch.float16)
    attention, sentence = choose_attention(
        config, args.use_flash_attn, args.attn_implementation, training.device, args.model_max_length, half
    )
    if args.low_rank_training:
        _need_peft()
    tokenizer = load_tokenizer(args, config)
    source = find_source(args.dataset, args.text_column, args.cache_dir)
    checkpoint = None if args.overwrite_output_dir else _checkpoint(training)
    check_training(training)
    if checkpoint is not None:
        check_checkpoint(checkpoint, args, config)
    finished = checkpoint is not None and _is_finished(training, checkpoint)
    if finished and is_saved(training.output_dir or "."):
        say(f"{checkpoint} is the end of this training: nothing to do (--overwrite_output_dir True starts anew)")
        return 0
    make_folder("output_dir", training.output_dir or ".")
    if args.cache_dir:
        make_folder("cache_dir", args.cache_dir)
    say(f"dataset: {source}")
    with training.main_process_first(desc="packing"):
        stamp = f"{mst_fx.__version__} {tokenizer_stamp(tokenizer.name_or_path)}"
        data = pack(source, tokenizer, args.model_max_length, args.cache_dir, stamp)
    train, held_out = _split(data, args, training)
    say(f"{len(train):,} sequences of {args.model_max_length:,} tokens to train on")

    model = _load_model(args, config, dtype, attention)
    say(sentence)
    if training.gradient_checkpointing and not has_checkpointing(model):
        say("this model has no gradient checkpointing")
        training.gradient_checkpointing = False
        if hasattr(training, "activation_checkpointing"):
            training.activation_checkpointing = False
    compile_model(model, args.backend, options, training.gradient_checkpointing)
    trainer = Finetuner(
        model=model, args=training, train_dataset=train, eval_dataset=held_out, data_collator=collate,
        processing_class=tokenizer, callbacks=[_SayWhatWasChunked(args.backend)],
    )  # fmt: skip
    if training.fsdp and not trainer.is_fsdp_enabled:
        say("--fsdp does nothing here: accelerate shards on accelerators alone, so each process has the whole model")
    if checkpoint and finished:
        say(f"{checkpoint} is the end of this training, of which no model was saved: done now")
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
    else:
        if checkpoint:
            say(f"going on from {checkpoint} (--overwrite_output_dir True starts anew)")
        elif args.overwrite_output_dir and trainer.is_world_process_zero():
            for _, old in _checkpoints(training):  # or the next run would go on from one of them
                shutil.rmtree(old)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except KeyboardInterrupt:
            _say_how_to_go_on(args, training)
            raise
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        plot = Path(training.output_dir or ".") / "loss.png"
        plot_losses({args.backend: trainer.state.log_history}, plot)
        say(f"model: {training.output_dir}, plot: {plot}")
    return 0


def say(message: str) -> None:
    """Print a line, once for all processes."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"mst-fx finetune: {message}", file=sys.stderr, flush=True)


# -- model -------------------------------------------------------------------------------------------


def compile_model(model: torch.nn.Module, backend: str, options: dict[str, Any], checkpointing: bool) -> None:
    """Compile in place, so that Trainer and PEFT see the model they know."""
    if backend == "mst":
        minisequence(model, checkpointing=checkpointing, options=options)
    elif backend == "inductor":
        model.compile(backend="inductor", options=options or None)


def _backend_options(args: ModelArguments) -> dict[str, Any]:
    options = parse_options(args.option)
    ours = [name for name in options if name.startswith("mst.")]
    if (args.backend != "mst" and ours) or (args.backend == "eager" and options):
        raise UsageError(f"--option {(ours or list(options))[0]} does not go with --backend {args.backend}")
    return options


def _dtype(args: ModelArguments, training: TrainingArguments) -> torch.dtype:
    if args.dtype == "auto":
        return torch.bfloat16 if training.bf16 else torch.float32
    if args.dtype not in DTYPES:
        raise UsageError(f"--dtype {args.dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[args.dtype]


def _need_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError as e:
        raise UsageError("--low_rank_training needs PEFT: pip install 'mst_fx[finetune]'") from e


def _load_model(args: ModelArguments, config: Any, dtype: torch.dtype, attention: str | None) -> torch.nn.Module:
    try:
        model = AutoModelForCausalLM.from_pretrained(
            args.model_name_or_path, config=config, dtype=dtype, cache_dir=args.cache_dir, attn_implementation=attention
        )
    except (OSError, ValueError, ImportError) as e:
        raise UsageError(f"--model_name_or_path {args.model_name_or_path}: can't be loaded ({first_line(e)})") from e
    if not args.low_rank_training:
        return model
    from peft import LoraConfig, get_peft_model

    targets = args.lora_target_modules
    lora = LoraConfig(
        r=args.lora_r, lora_alpha=args.lora_alpha, target_modules=targets[0] if len(targets) == 1 else targets,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    try:
        model = get_peft_model(model, lora)
    except ValueError as e:
        raise UsageError(f"--lora_target_modules {' '.join(targets)}: {first_line(e)}") from e
    adapted = model.targeted_module_names
    missing = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in adapted)]
    if len(targets) > 1 and missing:
        raise UsageError(f"--lora_target_modules {' '.join(targets)}: the model has no {missing[0]!r}")
    trained, total = model.get_nb_trainable_parameters()
    say(f"LoRA: {trained:,} of {total:,} parameters are trained")
    return model


def _split(data: Any, args: ModelArguments, training: TrainingArguments) -> tuple[Any, Any]:
    """Hold out the last sequences where evaluation is asked for."""
    if str(getattr(training.eval_strategy, "value", training.eval_strategy)) == "no":
        return data, None
    count = max(1, round(len(data) * args.validation_share))
    if count >= len(data):
        raise UsageError(
            f"--eval_strategy: {len(data)} sequences are too few to hold out a share of {args.validation_share}"
        )
    return data.select(range(len(data) - count)), data.select(range(len(data) - count, len(data)))


def _checkpoint(training: TrainingArguments) -> str | None:
    """Return the last whole checkpoint to go on from; one that was being written when the run died is passed over."""
    if training.resume_from_checkpoint:
        if not Path(training.resume_from_checkpoint, "trainer_state.json").is_file():
            raise UsageError(f"--resume_from_checkpoint {training.resume_from_checkpoint}: there is no checkpoint")
        return training.resume_from_checkpoint
    found = _checkpoints(training)
    return str(max(found)[1]) if found else None


def _checkpoints(training: TrainingArguments) -> list[tuple[int, Path]]:
    """Return the whole checkpoints of the output folder, each with its step."""
    found: list[tuple[int, Path]] = []
    for path in Path(training.output_dir or ".").glob("checkpoint-*"):
        try:  # Trainer writes this file last.
            found.append((json.loads((path / "trainer_state.json").read_text())["global_step"], path))
        except (OSError, ValueError, KeyError):
            continue
    return found


def _say_how_to_go_on(args: ModelArguments, training: TrainingArguments) -> None:
    found = _checkpoints(training)
    same = "the same command without --overwrite_output_dir" if args.overwrite_output_dir else "the same command"
    say(f"{same} goes on from {max(found)[1]}" if found else "no checkpoint was saved: nothing to go on from")


def _is_finished(training: TrainingArguments, checkpoint: str) -> bool:
    """Whether a checkpoint holds as many steps as are asked for, or as many epochs."""
    state = json.loads(Path(checkpoint, "trainer_state.json").read_text())
    if training.max_steps > 0:
        return state["global_step"] >= training.max_steps
    return (state.get("epoch") or 0) >= training.num_train_epochs


# -- log ---------------------------------------------------------------------------------------------


class Finetuner(Trainer):
    """Trainer whose log has tokens per second, of training alone, and peak memory."""

    _began: float | None = None
    """When the first step since the last line began; what else takes time is put behind it."""
    _tokens = 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add both to a line that has a loss."""
        if "loss" in logs and self._began is not None:
            logs["tokens_per_second"] = self._tokens / (time.perf_counter() - self._began)
            logs["peak_memory_gib"] = highest_memory(self.args.device.type) / GIB
            self._began, self._tokens = None, 0
        super().log(logs, start_time)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Count the step's tokens, those of the other ranks as many as here."""
        if self._began is None:
            self._began = time.perf_counter()
        self._tokens += inputs["input_ids"].numel() * self.args.world_size
        return super().training_step(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate while the clock stands."""
        with self._untimed():
            return super().evaluate(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save while the clock stands."""
        with self._untimed():
            super().save_model(*args, **kwargs)

    @contextlib.contextmanager
    def _untimed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self._began is not None:
            self._began += time.perf_counter() - began


class _SayWhatWasChunked(TrainerCallback):
    def __init__(self, backend: str) -> None:
        self.waiting = backend == "mst"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.waiting and state.is_world_process_zero:
            say(str(join_reports(mst_fx.reports())) if mst_fx.reports() else "mst compiled nothing")
        self.waiting = False


def plot_losses(histories: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the loss of one or several runs over the steps; ``histories`` are ``log_history`` of Trainer, by name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for index, (name, history) in enumerate(histories.items()):
        style = ("-", "--", ":")[index % 3]
        for key, label in (("loss", name), ("eval_loss", f"{name}, held out")):
            points = [(row["step"], row[key]) for row in history if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), style if key == "loss" else "o", label=label, linewidth=3 - index)
    axes.set(xlabel="step", ylabel="loss")
    if axes.lines:
        axes.legend()
    else:
        axes.set_title("no loss was logged: there were fewer steps than --logging_steps")
    figure.savefig(path, dpi=120)
    plt.close(figure)
