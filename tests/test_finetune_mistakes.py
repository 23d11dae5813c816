"""``mst-fx finetune`` answers mistakes in one line, before a model is loaded."""

import shutil

import datasets
import pytest
import torch
import transformers
from transformers.utils import is_liger_kernel_available

from mst_fx.cli import main
from mst_fx.commands.models import UsageError
from tests.finetuning import command


def mistakes(models, tmp_path):
    model, empty, blank, short = models("llama"), tmp_path / "empty.txt", tmp_path / "blank.jsonl", tmp_path / "s.txt"
    empty.touch()
    blank.write_text("\n\n")
    short.write_text("x = 1\n")
    (tmp_path / "rows.jsonl").write_text('{"content": "x = 1"}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\nno json\n')
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "x"}\n{"text": "\xe9t\xe9"}\n')
    (tmp_path / "table.csv").write_text("text,label\nx,1\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test.jsonl").write_text('{"text": "x"}\n')
    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "old" / "out" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "old" / "out" / "checkpoint-1" / "trainer_state.json").write_text('{"global_step": 1}')
    (tmp_path / "old" / "out" / "checkpoint-1" / "config.json").write_text('{"hidden_size": 7}')
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00" * 400)
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("x = 1\ny = 2\n")
    shutil.copytree(model, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    return {
        "there is no such file": ["--dataset", str(tmp_path / "absent.txt")],
        "no such file": ["--dataset", "some/where/absent.jsonl"],
        "the file is empty": ["--dataset", str(empty)],
        "file is empty": ["--dataset", str(blank)],
        "fewer than one sequence": ["--dataset", str(short)],
        "Did you mean 'content'": ["--dataset", str(tmp_path / "rows.jsonl"), "--text_column", "contents"],
        "line 2 is not JSON": ["--dataset", str(tmp_path / "bad.jsonl")],
        "latin.jsonl: not in UTF-8": ["--dataset", str(tmp_path / "latin.jsonl")],
        "tables of text are not read": ["--dataset", str(tmp_path / "table.csv")],
        "has no split named train, but test": ["--dataset", str(tmp_path / "tests")],
        "saved by `save_to_disk`": ["--dataset", str(tmp_path / "saved")],
        "is of another model (hidden_size 7": ["--output_dir", str(tmp_path / "old" / "out")],
        "is of a training of all weights": [
            "--output_dir",
            str(tmp_path / "old" / "out"),
            "--low_rank_training",
            "True",
        ],
        "liger-kernel is not installed": ["--use_liger_kernel", "True"],
        "bytes.txt: not in UTF-8": ["--dataset", str(tmp_path / "bytes.txt")],
        "beyond the model's 128 positions": ["--model_max_length", "4096"],
        "the folder has no weights": ["--model_name_or_path", str(bare)],
        "there is no such folder": ["--model_name_or_path", str(tmp_path / "absent")],
        "no config.json": ["--model_name_or_path", str(tmp_path)],
        "no usable tokenizer": ["--model_name_or_path", str(tmp_path / "mute")],
        "flash_attention_2: flash-attn": ["--attn_implementation", "flash_attention_2"],
        "Did you mean 'learning_rate'": ["--lerning_rate", "1"],
        "--backend 'foo' is not one of": ["--backend", "foo"],
        "mst.chunk_tokens=0 is not valid": ["--option", "chunk_tokens=0"],
        "does not go with --backend eager": ["--backend", "eager"],
        "is not one of auto": ["--dtype", "float99"],
        "there is no checkpoint": ["--resume_from_checkpoint", str(tmp_path / "absent")],
        "--fsdp needs several processes": ["--fsdp", "full_shard"],
        "expected one argument": ["--learning_rate"],
        "need --low_rank_training True": ["--lora_alpha", "32"],
        "the rank of adapters is at least 1": ["--low_rank_training", "True", "--lora_r", "0"],
        "between 0 and 1": ["--validation_share", "2"],
        "every line would be a document": ["--dataset", str(tmp_path / "texts")],
        "--learning_rate -1.0: at least 0": ["--learning_rate", "-1"],
        "--per_device_train_batch_size 0: at least 1": ["--per_device_train_batch_size", "0"],
        "that is no training": ["--max_steps", "-1", "--num_train_epochs", "0"],
        "--optim adamw_bnb_8bit: ImportError": ["--optim", "adamw_bnb_8bit"],
        "--report_to wandb: RuntimeError": ["--report_to", "wandb"],
        "--cache_dir": ["--cache_dir", str(short / "cache")],
        "can't be written to": ["--output_dir", str(short / "out")],
    }


def test_mistakes_get_one_line_before_anything_is_loaded(models, tmp_path, text, capfd, monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    cases = mistakes(models, tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loaded)
    if torch.cuda.is_available():
        del cases["flash_attention_2: flash-attn"]
    if is_liger_kernel_available():
        del cases["liger-kernel is not installed"]
    for message, flags in cases.items():
        argv = command(models("llama"), tmp_path, text)
        assert main([*argv, *flags]) == 2, message
        said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("mst-fx finetune: ")]
        assert message in said[-1], (message, said)
        assert "Traceback" not in "".join(said)


def test_old_names_of_flags():
    from mst_fx.finetune.arguments import parse

    argv = ["--model_name_or_path", "m", "--output_dir", "o", "--evaluation_strategy=no", "--per_gpu_train_batch_size"]
    model, training = parse([*argv, "3", "--warmup_ratio", "0.1", "--no_cuda", "True"])
    assert (training.per_device_train_batch_size, training.warmup_steps, training.use_cpu) == (3, 0.1, True)
    assert training.gradient_checkpointing
    assert model.model_max_length == 32768
    _, training = parse([*argv, "3", "--gradient_checkpointing", "False"])
    assert not training.gradient_checkpointing
    with pytest.raises(UsageError, match="--output_dir is needed"):
        parse(["--model_name_or_path", "m"])
    with pytest.raises(UsageError, match="--model_name_or_path"):
        parse(["--output_dir", "o"])
