"""The reference's command line, at a size for tests."""

import json
import shlex

# As the reference prints it; the paths stand for the user's own.
REFERENCE = """
    --model_name_or_path meta-llama/Meta-Llama-3.1-8B
    --bf16 True
    --output_dir path_to_saving_checkpoints
    --cache_dir path_to_cache
    --model_max_length 32768
    --use_flash_attn True
    --low_rank_training False
    --num_train_epochs 1
    --per_device_train_batch_size 1
    --per_device_eval_batch_size 1
    --gradient_accumulation_steps 8
    --evaluation_strategy "no"
    --save_strategy "steps"
    --save_steps 1000
    --save_total_limit 2
    --learning_rate 2e-5
    --weight_decay 0.0
    --warmup_steps 20
    --lr_scheduler_type "constant_with_warmup"
    --logging_steps 1
    --low_rank_training False
    --max_steps 1000
"""
FAST = ["--option", "compiler=aot_eager", "chunk_tokens=32"]


def command(model, folder, dataset, *more, steps=2):
    """Return the reference's command line with local paths, at a length that the small model has."""
    local = {
        "meta-llama/Meta-Llama-3.1-8B": str(model), "path_to_saving_checkpoints": str(folder / "out"),
        "path_to_cache": str(folder / "cache"), "32768": "128", "1000": str(steps),
    }  # fmt: skip
    argv = [local.get(word, word) for word in shlex.split(REFERENCE)]
    argv += ["--dataset", str(dataset)] if dataset else []
    return ["finetune", *argv, *FAST, "--disable_tqdm", "True", *more]


def history(folder):
    return json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
