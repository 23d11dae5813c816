"""Trainers of others: one line each, the numbers of the plain model, and their checkpoints as they know them."""

import copy
import importlib

import numpy as np
import pytest
import torch
import transformers

import mst_fx
from mst_fx.lazy_logits import LazyLogits
from tests.harness import EAGER, chunked, error
from tests.versions import traces_requires_grad

OPTIONS = {**EAGER, "mst.chunk_tokens": 16}
VOCAB, LENGTH = 128, 40


def need(package):
    """Skip with the reason where a package is absent, before it is imported at length."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def tiny():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, max_position_embeddings=128,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def rows(count=16):
    """Rows with ignored labels, a different number in each: what gradient accumulation must weigh by."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(count):
        ids = torch.randint(0, VOCAB, (LENGTH,), generator=generator)
        labels = ids.clone()
        labels[: 2 * i] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def accuracy(prediction):
    return {"accuracy": float((np.argmax(prediction.predictions, -1)[:, :-1] == prediction.label_ids[:, 1:]).mean())}


def arguments(folder, **more):
    return transformers.TrainingArguments(
        str(folder), **{
            "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "gradient_accumulation_steps": 3,
            "max_steps": 4, "use_cpu": True, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
            "disable_tqdm": True, "learning_rate": 1e-2, "gradient_checkpointing": True, **more,
        }
    )  # fmt: skip


def compile_if(compiled, model):
    if compiled:
        model.compile(backend="mst", options=OPTIONS)
    return model


def train(model, folder, compiled=True, resume=None, **more):
    compile_if(compiled, model)
    trainer = transformers.Trainer(
        model, arguments(folder, **more), train_dataset=rows(), eval_dataset=rows(4), compute_metrics=accuracy
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def history(trainer, key="loss"):
    return [row[key] for row in trainer.state.log_history if key in row]


def same_weights(model, other, tolerance):
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name in theirs:
        assert error(ours[name], theirs[name].double()) <= tolerance, name


@pytest.mark.parametrize("bf16", [pytest.param(False, marks=pytest.mark.slow), True], ids=["fp32", "bf16"])
def test_trainer(tmp_path, bf16):
    """Accumulation with num_items_in_batch, checkpointing, clipping, evaluation with metrics on returned logits."""
    more = {"bf16": bf16, "eval_strategy": "steps", "eval_steps": 2}
    plain, ours = (train(tiny(), tmp_path, compiled, **more) for compiled in (False, True))
    report, *evaluation = mst_fx.reports()
    assert (chunked(report, "mlp"), chunked(report, "loss")) == (2, 1)
    # Transformers' hook for checkpointing asks for the embedding's gradient in evaluation too.
    assert len(evaluation) == (2 if traces_requires_grad() else 1), "one graph to train, one to evaluate"
    assert [sum(chunked(r, kind) for r in evaluation) for kind in ("mlp", "loss")] == [2, 1]
    slack = 2e-2 if bf16 else 1e-5
    for key in ("loss", "grad_norm", "eval_loss"):
        assert history(ours, key) == pytest.approx(history(plain, key), rel=slack), key
    assert history(ours, "eval_accuracy") == pytest.approx(history(plain, "eval_accuracy"), abs=slack)
    assert len(history(ours, "eval_accuracy")) == 2
    if not bf16:
        same_weights(ours.model, plain.model, 1e-4)


@pytest.mark.slow
def test_trainer_saves_and_resumes(tmp_path):
    whole = train(tiny(), tmp_path / "whole")
    train(tiny(), tmp_path / "broken", max_steps=4, save_strategy="steps", save_steps=2)
    torch._dynamo.reset()
    resumed = train(tiny(), tmp_path / "again", resume=str(tmp_path / "broken" / "checkpoint-2"))
    same_weights(resumed.model, whole.model, 0)
    assert history(resumed) == history(whole)
    resumed.save_model(str(tmp_path / "saved"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    same_weights(loaded, tiny().train(), float("inf"))
    same_weights(loaded, resumed.model, 0)


@pytest.mark.slow
def test_label_smoothing_takes_the_loss_out_of_the_model(tmp_path):
    plain, ours = (train(tiny(), tmp_path, compiled, label_smoothing_factor=0.1) for compiled in (False, True))
    assert (chunked(mst_fx.reports()[0], "mlp"), chunked(mst_fx.reports()[0], "loss")) == (2, 0)
    assert history(ours) == pytest.approx(history(plain), rel=1e-5)
    same_weights(ours.model, plain.model, 1e-4)


def test_trainers_own_switch_knows_a_fixed_list(tmp_path):
    """The README says so; when accelerate learns to take any backend, the README should say that."""
    need("accelerate")
    args = arguments(tmp_path, torch_compile_backend="mst")
    with pytest.raises(ValueError, match="MST"):
        transformers.Trainer(tiny(), args, train_dataset=rows())


def test_accelerate_loop():
    need("accelerate")
    import accelerate

    def run(compiled):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = compile_if(compiled, tiny())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loader = torch.utils.data.DataLoader(rows(8), batch_size=2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        losses = []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        return losses, accelerator.unwrap_model(model)

    (plain, theirs), (ours, model) = run(False), run(True)
    assert ours == pytest.approx(plain, rel=1e-5)
    same_weights(model, theirs, 1e-4)
    assert type(model) is transformers.LlamaForCausalLM
    assert chunked(mst_fx.reports()[0], "loss") == 1


def test_accelerate_keeps_logits_lazy():
    operations = pytest.importorskip("accelerate.utils.operations")
    batch = {k: v[None] for k, v in rows(1)[0].items()}
    model = tiny()
    expected = model(**batch).logits.detach()
    model.compile(backend="mst", options=OPTIONS)
    wide = operations.convert_to_fp32(model(**batch))
    assert isinstance(wide.logits, LazyLogits)
    assert wide.logits._deferred.value is None
    for found in (operations.gather(wide.logits), operations.pad_across_processes(wide.logits, dim=1)):
        torch.testing.assert_close(found.detach() + 0, expected)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [pytest.param(False, marks=pytest.mark.slow), True])
def test_trainer_predicts(tmp_path, bf16):
    """Metrics on a part of the logits; all of them as predictions, the last batch smaller than the others."""
    seen = []
    for compiled in (False, True):
        model, shapes = compile_if(compiled, tiny()), []
        trainer = transformers.Trainer(
            model, arguments(tmp_path, bf16=bf16, eval_do_concat_batches=True), eval_dataset=rows(5),
            compute_metrics=lambda p, shapes=shapes: shapes.append(p.predictions.shape) or {"sum": p.predictions.sum()},
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        )  # fmt: skip
        found = trainer.evaluate()
        assert shapes == [(5, LENGTH)]
        logits = transformers.Trainer(model, arguments(tmp_path, bf16=bf16)).predict(rows(5)).predictions
        seen.append((found["eval_sum"], found["eval_loss"], logits))
    assert seen[1][1] == pytest.approx(seen[0][1], abs=2e-2 if bf16 else 1e-5)
    np.testing.assert_allclose(seen[1][2], seen[0][2], atol=2e-2 if bf16 else 1e-5)
    if not bf16:
        assert seen[0][0] == seen[1][0]


def test_lightning(tmp_path):
    need("lightning")
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, compiled):
            super().__init__()
            self.model = compile_if(compiled, tiny())
            self.losses = []

        def training_step(self, batch, _):
            loss = self.model(**batch).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def run(compiled):
        module = Module(compiled)
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=1, accumulate_grad_batches=2, logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path / str(compiled),
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(rows(8), batch_size=2))
        trainer.save_checkpoint(tmp_path / f"{compiled}.ckpt")
        return module

    plain, ours = run(False), run(True)
    assert ours.losses == pytest.approx(plain.losses, rel=1e-5)
    same_weights(ours.model, plain.model, 1e-4)
    saved = [torch.load(tmp_path / f"{c}.ckpt", weights_only=False)["state_dict"] for c in (True, False)]
    assert list(saved[0]) == list(saved[1])
    assert chunked(mst_fx.reports()[0], "loss") == 1


# -- PEFT --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_peft_lora_trains_merges_and_saves(tmp_path, checkpointing):
    need("peft")
    import peft

    def run(compiled):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny(), peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        return train(model, tmp_path, compiled, gradient_checkpointing=checkpointing)

    plain, ours = run(False), run(True)
    # Checkpointing sets requires_grad on the output of the frozen embedding, at which Dynamo breaks: three graphs.
    report = mst_fx.report.join_reports(mst_fx.reports())
    assert (chunked(report, "mlp"), chunked(report, "loss")) == (2, 1)
    assert len(mst_fx.reports()) == (3 if checkpointing else 1)
    assert history(ours) == pytest.approx(history(plain), rel=1e-5)
    same_weights(ours.model, plain.model, 1e-4)
    ours.save_model(str(tmp_path / "adapter"))
    adapted = peft.PeftModel.from_pretrained(tiny(), tmp_path / "adapter")
    merged = ours.model.merge_and_unload()
    same_weights(adapted.merge_and_unload(), merged, 1e-6)
    merged.save_pretrained(tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert list(loaded.state_dict()) == list(tiny().state_dict())
    same_weights(loaded, merged, 0)
    assert max(error(p, q.double()) for p, q in zip(loaded.parameters(), tiny().parameters(), strict=True)) > 1e-3


# -- TRL ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    from benchmarks.local_model import make_tokenizer

    made = make_tokenizer("def f(x):\n    return x + 1\n" * 20, VOCAB + 128)
    made.pad_token = made.eos_token
    return made


def tiny_for(tokenizer):
    model = tiny()
    model.resize_token_embeddings(len(tokenizer))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_trl_sft(tmp_path, tokenizer, lora):
    """TRL's own head never forms the logits (``loss_type="nll"`` included); the MLPs are ours."""
    need("trl")
    import datasets
    import peft
    import trl

    texts = [f"def f(x):\n    return x + {i}\n" * 2 for i in range(12)]
    start = tiny_for(tokenizer)

    def run(compiled):
        model = compile_if(compiled, copy.deepcopy(start))
        torch.manual_seed(0)
        args = trl.SFTConfig(
            str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3, use_cpu=True,
            bf16=False, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, loss_type="nll",
            learning_rate=1e-2, max_length=128,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model, args=args, train_dataset=datasets.Dataset.from_dict({"text": texts}), processing_class=tokenizer,
            peft_config=peft.LoraConfig(target_modules="all-linear") if lora else None,
        )  # fmt: skip
        trainer.train()
        return trainer

    plain, ours = run(False), run(True)
    assert sum(chunked(r, "mlp") for r in mst_fx.reports()) >= 2
    assert history(ours) == pytest.approx(history(plain), rel=1e-4)
    same_weights(ours.model, plain.model, 1e-3)


@pytest.mark.slow
def test_trl_dpo(tmp_path, tokenizer):
    need("trl")
    import datasets
    import trl

    data = {
        "prompt": [f"def f{i}(x):\n" for i in range(6)],
        "chosen": [f"    return x + {i}\n" for i in range(6)],
        "rejected": [f"    return {i}\n" for i in range(6)],
    }
    start = tiny_for(tokenizer)

    def run(compiled):
        model, reference = (compile_if(compiled, copy.deepcopy(start)) for _ in range(2))
        torch.manual_seed(0)
        args = trl.DPOConfig(
            str(tmp_path), per_device_train_batch_size=2, max_steps=2, use_cpu=True, bf16=False, logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True, learning_rate=1e-3, max_length=64,
        )  # fmt: skip
        trainer = trl.DPOTrainer(
            model, ref_model=reference, args=args, train_dataset=datasets.Dataset.from_dict(data),
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        return trainer

    plain, ours = run(False), run(True)
    assert sum(chunked(r, "mlp") for r in mst_fx.reports()) >= 2
    assert history(ours) == pytest.approx(history(plain), rel=1e-4)
    same_weights(ours.model, plain.model, 1e-3)
