"""How a model is named, and models without memory."""

import json
import pathlib
import resource
import time

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import mst_fx
from mst_fx.commands.models import ModelSpec, Subject, UsageError, build_model, parse_options, parse_pairs
from tests.models import LARGE, LanguageModel, SwiGLU, hf, token_inputs


def entry():
    return LanguageModel(SwiGLU()), token_inputs()


def explain(subject: Subject, **options) -> mst_fx.Report:
    return mst_fx.explain(subject.model, options)(*subject.args, **subject.kwargs)


def test_pairs_and_options() -> None:
    assert parse_pairs(["a=1", "b=x=y", "c=true", "d=False"]) == {"a": 1, "b": "x=y", "c": True, "d": False}
    given = ["chunk_tokens=512", "mst.logits=drop", "max_autotune=true"]
    assert parse_options(given) == {"mst.chunk_tokens": 512, "mst.logits": "drop", "max_autotune": True}


def test_folder_without_and_with_weights(tmp_path: pathlib.Path) -> None:
    model = hf("llama")
    model.config.save_pretrained(tmp_path)
    found = build_model(ModelSpec(hf=str(tmp_path), seq_len=16, batch=2, settings={"num_hidden_layers": 1}))
    assert len(found.model.model.layers) == 1
    assert found.kwargs["input_ids"].shape == (2, 16)
    model.save_pretrained(tmp_path)
    found = build_model(ModelSpec(hf=str(tmp_path), seq_len=16))
    assert torch.equal(found.model.lm_head.weight, model.lm_head.weight)
    assert found.model.training


def test_folder_without_a_usable_config(tmp_path: pathlib.Path) -> None:
    for text in (None, "{", json.dumps({"hidden_size": 8})):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(UsageError, match="no usable config"):
            build_model(ModelSpec(hf=str(tmp_path)))


def test_derived_config_values_follow_what_is_set() -> None:
    settings = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 32}
    found = build_model(ModelSpec(hf="llama", settings={**settings, "intermediate_size": 96}, fake=True))
    assert found.model.config.head_dim == 16


def test_dtype_of_an_entry() -> None:
    found = build_model(ModelSpec(entry="tests.test_models:entry", dtype="bfloat16"))
    assert found.model.head.weight.dtype is torch.bfloat16
    assert found.kwargs["ids"].dtype is torch.int64


def test_fake_entry_is_traced() -> None:
    found = build_model(ModelSpec(entry="tests.test_models:entry", fake=True))
    assert isinstance(found.model.head.weight, FakeTensor)
    assert len(explain(found, **{"mst.chunk_tokens": 8}).chunked) == 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fake_large_model_needs_no_memory(checkpointing: bool) -> None:
    build_model(ModelSpec(hf="llama", settings={"num_hidden_layers": 1, "vocab_size": 32}, fake=True))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spec = ModelSpec(
        hf="llama", settings={**LARGE, "num_hidden_layers": 4}, seq_len=65536, fake=True, checkpointing=checkpointing
    )
    report = explain(build_model(spec))
    assert len(report.chunked) == 5
    assert report.chunked[0].tokens == 65536
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024
    )  # one MLP weight: 229 MiB, 12 of them


@pytest.mark.slow
def test_fake_32_layers_in_time() -> None:
    began = time.perf_counter()
    report = explain(
        build_model(ModelSpec(hf="llama", settings={**LARGE, "num_hidden_layers": 32}, seq_len=65536, fake=True))
    )
    assert len(report.chunked) == 33
    assert time.perf_counter() - began < 60
