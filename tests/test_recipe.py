import subprocess
import sys

import pytest
import torch
import transformers

import mst_fx
from mst_fx.config import OptionError
from mst_fx.recipe import has_checkpointing
from tests.harness import EAGER, chunked, error, step
from tests.models import SwiGLU

OPTIONS = {**EAGER, "mst.chunk_tokens": 8}


def tiny():
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def is_checkpointing(model):
    return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_one_line_of_the_reference(tmp_path):
    model = tiny()
    keys, kind = list(model.state_dict()), type(model)
    ids = torch.randint(0, 64, (1, 24))
    plain = step(model, {"input_ids": ids, "labels": ids}, None, False)
    assert mst_fx.minisequence(model, options=OPTIONS) is model
    assert list(model.state_dict()) == keys
    assert type(model) is kind
    assert is_checkpointing(model)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert error(loss.detach(), plain.loss.double()) < 1e-6
    for name, p in model.named_parameters():
        assert error(p.grad, plain.grads[name].double()) < 1e-5, name
    (report,) = mst_fx.reports()
    assert (chunked(report, "mlp"), chunked(report, "loss")) == (2, 1)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert list(again.state_dict()) == keys


def test_checkpointing_can_be_left_off():
    assert not is_checkpointing(mst_fx.minisequence(tiny(), checkpointing=False, options=OPTIONS))


def test_mistakes_are_told_before_the_first_call():
    with pytest.raises(OptionError, match=r"mst\.no_such"):
        mst_fx.minisequence(tiny(), options={"mst.no_such": 1})
    with pytest.raises(TypeError, match="got function"):
        mst_fx.minisequence(lambda x: x)  # pyright: ignore
    with pytest.raises(ValueError, match="no gradient checkpointing to turn on"):
        mst_fx.minisequence(SwiGLU(), checkpointing=True)


def test_modules_without_checkpointing():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))

        def forward(self, x):
            return self.mlp(x)

    model = Model()
    assert not has_checkpointing(model)
    assert mst_fx.minisequence(model, options=OPTIONS) is model
    model(torch.randn(32, 8)).sum().backward()
    assert chunked(mst_fx.reports()[-1], "mlp") == 1
    with pytest.raises(ValueError, match="compiles nothing of a bare Sequential in place"):
        mst_fx.minisequence(model.mlp)


def test_the_package_imports_nothing_heavy():
    script = "import sys, mst_fx; assert not {'torch._dynamo', 'transformers', 'mst_fx.recipe'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
