"""The comparison with plain and fp64, and the search for the region at fault."""

import pytest
import torch
from torch import nn

import mst_fx
import mst_fx.ops as ops
from mst_fx.commands.check import SLACK, Check, IncomparableError, Row, _compare, check
from mst_fx.commands.models import uncompiled
from mst_fx.diff.graph_diff import in_graph_order
from mst_fx.recipe import enable_checkpointing
from mst_fx.regions import coefficients
from tests.models import Between, H, LanguageModel, SwiGLU, hf, hf_inputs, token_inputs

OPTIONS = {"mst.chunk_tokens": 8}


def run(model: nn.Module, inputs: dict, **kwargs) -> Check:
    return check(model, (), inputs, options=OPTIONS, **kwargs)


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_healthy_llama_passes(checkpointing: bool) -> None:
    model = hf("llama")
    if checkpointing:
        enable_checkpointing(model)
    found = run(model, hf_inputs("llama"))
    assert not found.failures, str(found)
    assert len(found.report.chunked) == 3
    names = {r.name for r in found.rows}
    assert {"grad lm_head.weight", "output.loss", "output.logits", "all gradients"} <= names
    assert "as near to fp64 as plain" in str(found)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_healthy_model_passes(dtype: torch.dtype) -> None:
    found = run(LanguageModel(SwiGLU(), Between(nn.GELU())).to(dtype), token_inputs())
    assert not found.failures, str(found)


def test_inputs_that_require_a_gradient_are_compared_without_a_loss() -> None:
    x = torch.randn(2, 23, H, requires_grad=True)
    found = check(SwiGLU(), (x,), options=OPTIONS)
    assert not found.failures
    assert "grad input[0]" in {r.name for r in found.rows}
    assert x.grad is None


def test_precision_is_that_of_what_is_computed() -> None:
    """Transformers casts to fp32 in the middle of a model in fp64; a bias in front of a norm has no gradient at all."""
    found = run(hf("llama", num_hidden_layers=1).double(), hf_inputs("llama"))
    assert not found.failures, str(found)
    assert found.slack == SLACK[torch.float32]
    normed = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16), nn.BatchNorm1d(16))
    found = check(normed, (torch.randn(300, 16),), options=OPTIONS)
    assert not found.failures, str(found)
    assert any(r.truth == 0 or abs(r.truth) < 1e-9 for r in found.rows if r.name == "grad 2.bias")


class Mixing(nn.Module):
    """Not token-wise, though it is promised to be."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, 4 * H), nn.Linear(4 * H, H)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        return self.down(torch.relu(y - y.mean((0, 1), keepdim=True)))


@pytest.mark.parametrize("how", ["in place", "wrapped", "a part"])
def test_models_that_are_compiled_already_are_compared_uncompiled(how: str) -> None:
    model = nn.Sequential(mst_fx.tokenwise(Mixing()), nn.Linear(H, 1))
    if how == "in place":
        model.compile(backend="mst", options=OPTIONS)
    elif how == "a part":
        model[0] = torch.compile(model[0], backend="mst", options=OPTIONS)  # pyright: ignore
    given = torch.compile(model, backend="mst", options=OPTIONS) if how == "wrapped" else model
    found = check(uncompiled(given), (torch.randn(2, 23, H),), options=OPTIONS)
    assert found.failures
    assert not any("_orig_mod" in r.name for r in found.rows)


def plant(monkeypatch: pytest.MonkeyPatch, wide: int) -> None:
    """Make the chunk gradient of bodies with a weight of ``wide`` rows a little wrong."""
    healthy = ops._take_chunk

    def planted(found, results, *rest):
        if any(s.shape[:1] == (wide,) for s in found.shared):
            results = [*results[:-1], results[-1] * 1.01]
        healthy(found, results, *rest)

    monkeypatch.setattr(ops, "_take_chunk", planted)


def test_planted_bug_is_found_and_its_region_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(SwiGLU(), Between(nn.GELU(), 80), Between(nn.ReLU(), 56))
    plant(monkeypatch, 80)
    found = run(model, token_inputs())
    assert found.failures
    assert found.culprit is not None
    assert found.culprit.path == "blocks.1"
    text = str(found)
    assert "FAIL" in text
    assert "first region whose rewrite moves a number: mlp blocks.1 (tests/models.py:" in text
    worst = next(r for r in found.failures if r.index)
    assert abs(worst.ours - worst.truth) > abs(worst.plain - worst.truth)
    assert found.to_dict()["culprit"]["path"] == "blocks.1"


@pytest.mark.slow
def test_planted_bug_in_a_checkpointed_block_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf("llama")
    enable_checkpointing(model)
    plant(monkeypatch, 96)
    found = run(model, hf_inputs("llama"))
    assert found.culprit is not None
    assert (found.culprit.path, found.culprit.graph) == ("model.layers.0.mlp", "wrap_body_0")


def test_tolerance_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, 80)
    assert not run(LanguageModel(Between(nn.GELU(), 80)), token_inputs(), tolerance=1.0).failures


class AllIgnored(LanguageModel):
    """Its loss is NaN, as torch's is without a label."""

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().forward(ids, torch.full_like(labels, -100))


def test_plain_nan_must_be_ours_too(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(AllIgnored(SwiGLU()), token_inputs())
    assert not found.failures, str(found)
    loss = next(r for r in found.rows if r.name == "output")
    assert loss.plain != loss.plain
    divided = coefficients._Writer.divided
    monkeypatch.setattr(coefficients._Writer, "divided", lambda *given: (divided(*given)[0], []))
    found = run(AllIgnored(SwiGLU()), token_inputs())
    assert [r.name for r in found.failures] == ["output"]
    assert "is not NaN or infinite as plain rightly is" in str(found)


def test_numbers_lost() -> None:
    nan, inf = float("nan"), float("inf")
    truth, plain = torch.tensor([1.0, 2.0, inf, nan]).double(), torch.tensor([1.0, nan, inf, nan])
    good = compare(truth, plain, torch.tensor([1.0, 5.0, inf, nan]))
    assert not good.failed  # plain has no number at 1: ours may have any
    for wrong, index in (([nan, 2, inf, nan], 0), ([1, 2, -inf, nan], 2), ([1, 2, 3, nan], 2), ([1, 2, inf, 0], 3)):
        row = compare(truth, plain, torch.tensor(wrong))
        assert row.failed
        assert row.index == (index,)


def compare(truth: torch.Tensor, plain: torch.Tensor, ours: torch.Tensor) -> Row:
    (row,) = _compare({"x": truth}, {"x": plain}, {"x": ours}, 1e-6, 1.0)
    return row


def test_regions_are_tried_in_the_order_they_run() -> None:
    """The loss is rewritten first but runs last."""
    model = hf("llama")
    enable_checkpointing(model)
    found = run(model, hf_inputs("llama"))
    assert [r.path for r in in_graph_order(found.report)] == ["model.layers.0.mlp", "model.layers.1.mlp", "lm_head"]


def test_random_numbers_are_refused() -> None:
    with pytest.raises(IncomparableError, match="draws random numbers"):
        run(LanguageModel(Between(nn.Dropout(0.5))), token_inputs())


def test_a_function_around_a_module_is_refused() -> None:
    model = LanguageModel(SwiGLU())
    with pytest.raises(IncomparableError, match=r"Give the nn\.Module itself"):
        check(lambda ids, labels: model(ids, labels), (), token_inputs(), options=OPTIONS)


def test_casts_to_fp32_inside_the_model_are_fp64_in_the_truth() -> None:
    class Widened(LanguageModel):
        def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids).float()
            x = x + self.blocks[0](x.to(torch.float32)) * torch.ones(())
            logits = self.head(self.norm(x).to(dtype=torch.float32))
            return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    found = run(Widened(SwiGLU()), token_inputs())
    assert not found.failures, str(found)
    assert next(r.plain_error for r in found.rows if r.name == "grad head.weight") > 0
    assert torch.get_default_dtype() is torch.float32


def test_a_model_that_cannot_run_in_fp64_is_refused() -> None:
    class Picky(SwiGLU):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.dtype is not torch.float32:
                raise TypeError("fp32 only")
            return super().forward(x)

    with pytest.raises(IncomparableError, match=r"does not run in fp64 .TypeError: fp32 only"):
        check(Picky(), (torch.randn(2, 23, H),), options=OPTIONS)


def test_progress_is_told() -> None:
    told: list[str] = []
    run(LanguageModel(SwiGLU()), token_inputs(), progress=told.append)
    assert told == ["running it plain", "running it in fp64", "running it rewritten"]
