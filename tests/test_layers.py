"""Layers beyond the usual ones: exact for every gradient, chunked where proved token-wise, else left with a reason."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mst_fx
from tests.harness import EAGER, check_exact, chunked, reasons
from tests.layers import NEAR_MISSES, TOKENWISE, Bloom, Int4, Int8, Lora
from tests.models import Between, H, I, LanguageModel, SwiGLU, V, token_inputs
from tests.versions import traces_stored_apply


@pytest.mark.parametrize("name", TOKENWISE)
def test_chunked(name: str) -> None:
    ours = check_exact(LanguageModel(TOKENWISE[name]()), token_inputs())
    assert chunked(ours.report, "mlp") == 1, reasons(ours.report)
    assert chunked(ours.report, "loss") == 1


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left_alone(name: str) -> None:
    build, why = NEAR_MISSES[name]
    ours = check_exact(LanguageModel(build()), token_inputs())
    assert chunked(ours.report, "mlp") == 0, str(ours.report)
    assert re.search(why, reasons(ours.report)), reasons(ours.report)
    assert chunked(ours.report, "loss") == 1


@pytest.mark.parametrize("name", ["bloom", "inplace_chain", "qlora_int4", "dense_experts", "conv_kernel_1"])
def test_dynamic_length(name: str) -> None:
    ours = check_exact(LanguageModel(TOKENWISE[name]()), token_inputs(), dynamic=True)
    assert chunked(ours.report, "mlp") == 1, reasons(ours.report)


@pytest.mark.parametrize("name", ["inplace_chain", "qlora_int8", "lora_two_adapters", "weight_first"])
def test_autocast(name: str) -> None:
    ours = check_exact(LanguageModel(TOKENWISE[name]()), token_inputs(), autocast=True)
    assert chunked(ours.report, "mlp") == 1, reasons(ours.report)


def test_custom_function_under_autocast_is_left_alone() -> None:
    ours = check_exact(LanguageModel(Between(lambda x: Bloom.apply(x))), token_inputs(), autocast=True)
    assert "custom autograd function under autocast" in reasons(ours.report)


def test_a_stored_apply_is_chunked_or_noted() -> None:
    """Where Dynamo can't trace it, it leaves the whole model to eager: no graph has it, and a note says so."""
    ours = check_exact(LanguageModel(Between(Bloom.apply)), token_inputs())
    if traces_stored_apply():
        assert "Dynamo left code to eager" in reasons(ours.report), str(ours.report)
    else:
        assert chunked(ours.report, "mlp") == 1, str(ours.report)


class Checkpointed(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)


@pytest.mark.parametrize("name", ["qlora_int8", "inplace_chain", "weight_first"])
def test_checkpointed(name: str) -> None:
    ours = check_exact(LanguageModel(Checkpointed(TOKENWISE[name]())), token_inputs())
    assert chunked(ours.report, "mlp") == 1, reasons(ours.report)


def test_weights_shared_by_two_layers() -> None:
    block = SwiGLU()
    ours = check_exact(LanguageModel(block, block), token_inputs())
    assert chunked(ours.report, "mlp") == 2


# -- low-bit weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Int8, Int4])
def test_dequantised_weights_are_made_in_the_loop(make: Callable[[int, int], nn.Module]) -> None:
    """The op takes the codes: no dequantised weight is an input, so none is kept for the backward."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = Lora(make(H, I), H, I), Lora(make(I, H), I, H)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(F.gelu(self.up(x)))

    model = LanguageModel(Adapted())
    report = mst_fx.explain(model, {"mst.chunk_tokens": 8})(**token_inputs())
    assert chunked(report, "mlp") == 1
    (call,) = (n for n in report.graphs[0].after.graph.nodes if n.target is torch.ops.mst_fx.map.default)
    taken = [n.meta["example_value"] for n in call.args[1]]
    assert {t.dtype for t in taken if not t.is_floating_point()}
    assert not any(t.is_floating_point() and tuple(t.shape) in ((I, H), (H, I)) for t in taken)
    after = "".join(str(n.target) for n in report.graphs[0].after.graph.nodes)
    assert "long" not in after
    assert "stack" not in after


def test_low_bit_head() -> None:
    class Model(LanguageModel):
        def __init__(self) -> None:
            super().__init__(SwiGLU())
            self.head = Lora(Int8(H, V), H, V)

    ours = check_exact(Model(), token_inputs())
    assert (chunked(ours.report, "mlp"), chunked(ours.report, "loss")) == (1, 1)


def test_low_precision_scalar_is_summed_in_fp32() -> None:
    """A bf16 scalar's gradient is a sum over all chunks: rounded once, not once per chunk."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(H, I), nn.Linear(I, H)
            self.scale = nn.Parameter(torch.tensor([0.8]).bfloat16())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.up(x)
            return self.down(self.scale * y * y)

    check_exact(LanguageModel(Scaled()), token_inputs(), slack=3e-3)


# -- wide values that leave --------------------------------------------------------------------------


class Penalised(nn.Module):
    """A language model whose activation goes into the loss or out."""

    def __init__(self, end: Callable[[torch.Tensor, torch.Tensor], Any], gated: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, H), nn.Linear(H, V)
        self.gate, self.up, self.down = nn.Linear(H, I), nn.Linear(H, I), nn.Linear(I, H)
        self.end, self.gated = end, gated

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> Any:
        x = self.embed(ids)
        act = F.silu(self.gate(x)) * self.up(x) if self.gated else F.relu(self.up(x))
        loss = F.cross_entropy(self.head(x + self.down(act)).flatten(0, 1), labels.flatten())
        return self.end(loss, act)


PENALTIES = {
    "mean": lambda loss, a: loss + 0.1 * a.abs().mean(),
    "sum": lambda loss, a: loss + 0.001 * a.pow(2).sum(),
    "per_token": lambda loss, a: loss + 0.1 * a.abs().sum(-1).mean(),
    "metric": lambda loss, a: (loss, (a.detach() > 0).float().mean()),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalised_activation(name: str) -> None:
    ours = check_exact(Penalised(PENALTIES[name]), token_inputs())
    assert (chunked(ours.report, "mlp"), chunked(ours.report, "loss")) == (1, 1), reasons(ours.report)


def test_penalty_over_the_sequence_is_left_alone() -> None:
    ours = check_exact(Penalised(lambda loss, a: loss + a.mean(1).abs().sum()), token_inputs())
    assert chunked(ours.report, "mlp") == 0
    assert "mean" in reasons(ours.report)


@pytest.mark.parametrize("detach", [False, True])
def test_returned_activation_is_an_output_of_the_region(detach: bool) -> None:
    model, inputs = Penalised(lambda loss, act: (loss, act.detach() if detach else act), gated=True), token_inputs()
    ours = check_exact(model, inputs)
    assert chunked(ours.report, "mlp") == 1, reasons(ours.report)
    torch.testing.assert_close(ours.output[1], model(**inputs)[1])


def test_gradient_through_a_returned_activation() -> None:
    model, inputs = Penalised(lambda loss, act: (loss, act), gated=True), token_inputs()
    grads = []
    for fn in (model, torch.compile(model, backend="mst", options={"mst.chunk_tokens": 8, **EAGER})):
        model.zero_grad()
        loss, act = fn(**inputs)
        (loss + act.pow(2).mean()).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_returned_activation_of_a_plain_mlp_is_left_alone() -> None:
    ours = check_exact(Penalised(lambda loss, act: (loss, act)), token_inputs())
    assert chunked(ours.report, "mlp") == 0
    assert "returned" in reasons(ours.report)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bloom", "qlora_int4", "dense_experts", "weight_first", "group_norm", "scatter"])
def test_inductor(name: str) -> None:
    ours = check_exact(LanguageModel(TOKENWISE[name]()), token_inputs(), compiler="inductor")
    assert chunked(ours.report, "mlp") == 1, reasons(ours.report)


# -- Transformers ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"lora_dropout": 0.0}, {"use_rslora": True}, {"bias": "all"}, {"target_modules": "all-linear"},
        {"modules_to_save": ["lm_head"]}, {"head": True}, {"second": True},
    ],
    ids=str,
)  # fmt: skip
def test_peft(settings: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    from tests.models import hf, hf_inputs

    settings = dict(settings)
    names = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"] + ["lm_head"] * settings.pop("head", False)
    second = settings.pop("second", False)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **{"target_modules": names, **settings})
    model = peft.get_peft_model(hf("llama"), config)
    if second:
        model.add_adapter("other", peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=names))
        model.base_model.set_adapter(["default", "other"])
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    ours = check_exact(model.train(), hf_inputs("llama"))
    assert (chunked(ours.report, "mlp"), chunked(ours.report, "loss")) == (2, 1), reasons(ours.report)
