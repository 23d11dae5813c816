"""``mst-fx finetune``: the reference's command as printed, its data, its answers to mistakes."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
import transformers

import mst_fx
from benchmarks.local_model import FAMILIES
from mst_fx.cli import main
from mst_fx.commands.models import UsageError
from mst_fx.finetune import data, train
from mst_fx.finetune.attention import choose_attention
from mst_fx.finetune.data import find_source, pack, tokenized
from tests.finetuning import FAST, command, history
from tests.harness import chunked, error


def test_the_reference_command_as_printed(models, tmp_path, text, capfd):
    assert main(command(models("llama"), tmp_path, text)) == 0
    out = tmp_path / "out"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    before = transformers.AutoModelForCausalLM.from_pretrained(models("llama"))
    assert list(loaded.state_dict()) == list(before.state_dict())
    assert loaded.dtype == torch.bfloat16
    assert any(error(p, q.double()) > 1e-6 for p, q in zip(loaded.parameters(), before.parameters(), strict=True))
    assert transformers.AutoTokenizer.from_pretrained(out)("x")["input_ids"]
    assert (out / "loss.png").stat().st_size > 5000
    assert (out / "checkpoint-2").is_dir()
    lines = [row for row in history(tmp_path) if "loss" in row]
    assert len(lines) == 2
    assert all(row["tokens_per_second"] > 0 and 0.05 < row["peak_memory_gib"] < 64 for row in lines)
    said = capfd.readouterr().err
    assert "flash-attn is not installed" in said or "attention: flash-attn" in said
    assert "mst: 3 of 3 regions chunked" in said
    report = mst_fx.reports()[0]
    assert (chunked(report, "mlp"), chunked(report, "loss")) == (2, 1)


def test_rates_are_of_trained_tokens_and_of_training_alone(models, tmp_path, monkeypatch):
    """A batch larger than the data is as large as the data; saving within a line's steps is no training."""
    clock, trained = [0.0], []

    def takes(name, seconds):
        original = getattr(transformers.Trainer, name)

        def run(*args, **kwargs):
            clock[0] += seconds
            trained.extend(given["input_ids"].numel() for given in args if isinstance(given, dict))
            return original(*args, **kwargs)

        monkeypatch.setattr(transformers.Trainer, name, run)

    takes("training_step", 0.25)
    takes("save_model", 8)
    monkeypatch.setattr(train, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    few = tmp_path / "few.txt"
    few.write_text("A sentence that is said again. " * 40)
    more = ["--per_device_train_batch_size", "64", "--save_steps", "1", "--logging_steps", "2", "--backend", "eager"]
    argv = command(models("llama"), tmp_path, few, *more, "--bf16", "False", steps=4)
    assert main([word for word in argv if word not in FAST]) == 0
    assert len(trained) == 4
    assert clock[0] >= 4 * 8
    rates = [row["tokens_per_second"] for row in history(tmp_path) if "loss" in row]
    assert rates == [sum(trained) / 4 / 0.25] * 2


@pytest.mark.slow
def test_low_rank_training(models, tmp_path, text, capfd):
    peft = pytest.importorskip("peft")
    argv = command(models("llama"), tmp_path, text, "--low_rank_training", "True", "--bf16", "False")
    assert main([*argv, "--learning_rate", "1e-2", "--warmup_steps", "0"]) == 0
    assert "LoRA:" in capfd.readouterr().err
    base = transformers.AutoModelForCausalLM.from_pretrained(models("llama"))
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    merged = adapted.merge_and_unload()
    assert list(merged.state_dict()) == list(base.state_dict())
    assert error(merged.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight.double()) > 1e-4
    assert error(merged.lm_head.weight, base.lm_head.weight.double()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"llama"}))
def test_families(models, tmp_path, text, family):
    length = ["--model_max_length", "64"] if family == "falcon_mamba" else []  # its scan is unrolled on a CPU
    assert main(command(models(family), tmp_path, text, *length)) == 0
    assert chunked(mst_fx.reports()[0], "loss") == 1
    assert chunked(mst_fx.reports()[0], "mlp") == (0 if family == "falcon_mamba" else 2)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.slow
def test_evaluation_on_held_out_sequences(models, tmp_path, text):
    argv = command(models("llama"), tmp_path, text, "--evaluation_strategy", "steps", "--eval_steps", "1")
    assert main(argv) == 0
    assert len([row for row in history(tmp_path) if "eval_loss" in row]) == 2


# -- going on after a kill ---------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_resumed_is_as_unbroken(models, tmp_path, text):
    """SIGKILL in mid-run; the next start with the same command goes on, to the same losses and weights."""
    flags = ["--bf16", "False", "--save_steps", "2", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-2"]
    flags += ["--warmup_steps", "0"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(command(models("llama"), whole, text, *flags, steps=12)) == 0

    argv = command(models("llama"), broken, text, *flags, steps=12)
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, "-m", "mst_fx.cli", *argv], env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 400
    while not (broken / "out" / "checkpoint-4" / "trainer_state.json").exists():
        assert process.poll() is None, "ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "out" / "trainer_state.json").exists(), "it was killed in mid-run"
    assert main(argv) == 0
    losses = [[(r["step"], r["loss"]) for r in history(f) if "loss" in r] for f in (whole, broken)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12
    ours, theirs = (transformers.AutoModelForCausalLM.from_pretrained(f / "out").state_dict() for f in (broken, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_cut_short_is_passed_over(tmp_path):
    from mst_fx.finetune.train import _checkpoint

    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True)
    assert _checkpoint(args) is None
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"global_st'), (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state:
            (folder / "trainer_state.json").write_text(state)
    assert _checkpoint(args) == str(tmp_path / "checkpoint-10")


def test_a_finished_training_is_not_gone_on_with(models, tmp_path, text, capfd):
    checkpoint = tmp_path / "out" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 2, "epoch": 1.0}')
    (tmp_path / "out" / "model.safetensors").write_text("trained")
    assert main(command(models("llama"), tmp_path, text)) == 0
    assert "is the end of this training: nothing to do" in capfd.readouterr().err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["checkpoint-2", "model.safetensors"]


@pytest.mark.slow
def test_started_anew_nothing_is_left_of_the_training_before(models, tmp_path, text):
    old = tmp_path / "out" / "checkpoint-4"
    old.mkdir(parents=True)
    (old / "trainer_state.json").write_text('{"global_step": 4, "epoch": 1.0}')
    more = ["--save_steps", "1", "--overwrite_output_dir", "True"]
    assert main(command(models("llama"), tmp_path, text, *more, steps=1)) == 0
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.slow
def test_adapters_for_modules_that_are_not_there(models, tmp_path, text, capfd):
    more = ["--low_rank_training", "True", "--lora_target_modules", "q_proj", "nope"]
    assert main(command(models("llama"), tmp_path, text, *more, steps=1)) == 2
    assert "the model has no 'nope'" in capfd.readouterr().err


@pytest.mark.slow
def test_the_model_of_a_training_killed_at_its_end_is_saved(models, tmp_path, text, capfd):
    argv, out = [*command(models("llama"), tmp_path, text), "--save_steps", "1"], tmp_path / "out"
    assert main(argv) == 0
    whole = (out / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "loss.png"):
        (out / name).unlink()
    assert main(argv) == 0
    assert "of which no model was saved: done now" in capfd.readouterr().err
    assert (out / "model.safetensors").read_bytes() == whole
    assert (out / "loss.png").exists()


# -- launchers ---------------------------------------------------------------------------------------


TORCHRUN = "torch.distributed.run --nproc_per_node 2"
ACCELERATE = (
    "accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
)
WHOLE = "stage3_gather_16bit_weights_on_model_save"
LEAVES = {"memory_efficient_linear": False, "leaf_module": {"name_suffixes": ["mlp"]}, WHOLE: True}
LAUNCHES = {
    "torchrun": (TORCHRUN, [], "3 of 3 regions chunked"),
    "accelerate": (ACCELERATE, [], "3 of 3 regions chunked"),
    "fsdp": (TORCHRUN, ["--fsdp", "full_shard"], "--fsdp does nothing here"),  # accelerate shards on no CPU
    "zero-2": (TORCHRUN, {"stage": 2}, "3 of 3 regions chunked"),
    "zero-3": (TORCHRUN, {"stage": 3, **LEAVES}, "mst-fx finetune: model:"),  # what is chunked there is left open
}


@pytest.mark.slow
@pytest.mark.parametrize("launch", LAUNCHES)
def test_launchers(models, tmp_path, text, launch):
    launcher, more, said = LAUNCHES[launch]
    if launch.startswith("zero"):
        pytest.importorskip("deepspeed")
        names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        config = {**dict.fromkeys(names, "auto"), "bf16": {"enabled": "auto"}, "zero_optimization": more}
        (tmp_path / "zero.json").write_text(json.dumps({**config, "zero_allow_untested_optimizer": True}))
        more = ["--deepspeed", str(tmp_path / "zero.json")]
    argv = [sys.executable, "-m", *launcher.split(), "-m", "mst_fx.finetune"]
    argv += [*command(models("llama"), tmp_path, text)[1:], *more]
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert said in done.stderr, done.stderr[-3000:]
    assert done.stderr.count("sequences of 128 tokens") == 1, "one process speaks for all"
    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = transformers.AutoModelForCausalLM.from_pretrained(models("llama"))
    assert any(error(p, q.double()) > 1e-6 for p, q in zip(trained.parameters(), before.parameters(), strict=True))


# -- data --------------------------------------------------------------------------------------------


def test_packing_leaves_out_the_tail_alone(models, tmp_path, monkeypatch):
    tokenizer = transformers.AutoTokenizer.from_pretrained(models("llama"))
    monkeypatch.setattr(data, "PIECE", 500)
    monkeypatch.setattr(data, "BATCH", 3)
    source = pathlib.Path(json.__file__).read_text()
    (tmp_path / "a.txt").write_text(source)
    rows = [{"body": source[i : i + 400], "n": i} for i in range(0, 4000, 400)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    end = [tokenizer.eos_token_id]
    pieces = list(data._joined((tmp_path / "a.txt").open()))
    assert "".join(pieces) == source
    assert len(pieces) > 3
    whole = [t for p in pieces for t in tokenizer(p)["input_ids"]] + end
    documents = [t for row in rows for t in [*tokenizer(row["body"])["input_ids"], *end]]
    for name, tokens in (("a.txt", whole), ("a.jsonl", documents), ("a.parquet", documents)):
        packed = pack(find_source(str(tmp_path / name), "body"), tokenizer, 64, str(tmp_path / "cache"), "s")
        assert all(len(row["input_ids"]) == 64 for row in packed)
        assert [t for row in packed for t in row["input_ids"]] == tokens[: len(tokens) // 64 * 64], name


def test_packed_data_is_made_again_when_the_file_changes(models, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(models("llama"))
    path = tmp_path / "a.txt"
    seen = []
    for content in ("abc " * 200, "xyz " * 200, "xyz " * 200):
        if not seen or content[0] != "x" or len(seen) == 1:
            path.write_text(content)
        packed = pack(find_source(str(path), "text"), tokenizer, 16, str(tmp_path / "cache"), "s")
        seen.append((packed[0]["input_ids"], packed.cache_files[0]["filename"]))
    assert seen[0] != seen[1]
    assert seen[1] == seen[2]


def test_a_tokenizer_that_begins_texts_begins_each_document_once(models):
    class Begins:
        eos_token_id = 9

        def __call__(self, texts, add_special_tokens=True, verbose=True):
            if isinstance(texts, str):
                return {"input_ids": [1, *map(ord, texts)] if add_special_tokens else [*map(ord, texts)]}
            return {"input_ids": [[*map(ord, t)] for t in texts]}

    documents = iter([iter(["a", "b"]), iter([]), iter(["c"])])
    found = [t for ids in tokenized(documents, Begins()) for t in ids]
    assert found == [1, ord("a"), ord("b"), 9, 1, ord("c"), 9]


# -- attention ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_causal_attention_without_a_mask_is_the_same(models, family):
    """Of Mistral's window of 64 the mask says more than the flag does."""
    config = transformers.AutoConfig.from_pretrained(models(family))
    name, sentence = choose_attention(config, True, None, torch.device("cpu"), 128, False)
    assert ("S x S" in sentence) == (family == "mistral")
    ids = torch.randint(0, 300, (2, 128))
    masks, results = [], []
    for attention in (name, "eager"):
        model = transformers.AutoModelForCausalLM.from_pretrained(models(family), attn_implementation=attention)
        model.config.use_cache = False
        model.train()
        graphs = []

        def record(gm, _, graphs=graphs):
            graphs.append(gm)
            return gm

        loss = torch.compile(model, backend=record)(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), model.model.layers[0].self_attn.q_proj.weight.grad))
        (graph,) = graphs
        calls = [n for n in graph.graph.nodes if n.target is torch.nn.functional.scaled_dot_product_attention]
        masks.append([n.kwargs.get("attn_mask") for n in calls])
    assert len(masks[0]) == 2
    assert all((mask is None) == (family == "llama") for mask in masks[0])
    assert error(results[0][0], results[1][0].double()) < 1e-6
    assert error(results[0][1], results[1][1].double()) < 1e-5


def test_flash_attn_is_taken_where_it_can_run(models, monkeypatch):
    configs = {f: transformers.AutoConfig.from_pretrained(models(f)) for f in ("llama", "gemma2", "falcon_mamba")}
    gpu, cpu = torch.device("cuda"), torch.device("cpu")

    def chosen(family, device, half=True, asked=True):
        return choose_attention(configs[family], asked, None, device, 128, half)[0]

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert (chosen("llama", gpu), chosen("gemma2", gpu), chosen("gemma2", cpu)) == (
        "sdpa_causal", "flex_attention", "eager"
    )  # fmt: skip
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert [chosen(f, gpu) for f in configs] == ["flash_attention_2", "flash_attention_2", None]
    assert (chosen("llama", gpu, half=False), chosen("llama", cpu)) == ("sdpa_causal", "sdpa_causal")
    assert chosen("llama", gpu, asked=False) is None
    with pytest.raises(UsageError, match="needs --bf16"):
        choose_attention(configs["llama"], True, "flash_attention_2", gpu, 128, False)
