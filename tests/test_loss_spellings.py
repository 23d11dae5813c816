"""Losses as people spell them: chunked, exact for every gradient, gradients in the forward where that is proved."""

from typing import Any

import pytest
import torch

from tests.harness import EAGER, check_exact, chunked
from tests.heads import Heads, head_inputs
from tests.losses import LOSSES


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_chunked_and_exact(name: str) -> None:
    loss, count, where = LOSSES[name]
    ours = check_exact(Heads(loss), head_inputs())
    assert chunked(ours.report, "loss") == count, str(ours.report)
    assert chunked(ours.report, "loss") == len(ours.report.regions), str(ours.report)
    assert f"in the {where}" in str(ours.report), str(ours.report)


RECOMPUTED = [n for n in LOSSES if LOSSES[n][2] == "forward"][::3]


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputed_it_is_exact_too(name: str) -> None:
    loss, count, _ = LOSSES[name]
    ours = check_exact(Heads(loss), head_inputs(), options={"mst.loss_gradient": "recompute"})
    assert chunked(ours.report, "loss") == count, str(ours.report)


SYMBOLIC = ["mean_per_sequence", "mean_of_means", "kl_batchmean", "distilled", "z_loss", "penalised_logits", "grpo",
            "soft_targets", "wide_sum", "accuracy"]  # fmt: skip


@pytest.mark.parametrize("name", SYMBOLIC)
def test_exact_with_symbolic_sizes(name: str) -> None:
    loss, count, _ = LOSSES[name]
    ours = check_exact(Heads(loss), head_inputs(), dynamic=True)
    assert chunked(ours.report, "loss") == count, str(ours.report)


METRICS = ["z_loss", "accuracy", "accuracy_of_five", "entropy_logged", "grpo", "accuracy_and_slice"]


@pytest.mark.parametrize("name", METRICS)
def test_metrics_beside_the_loss_are_what_they_were(name: str) -> None:
    model, inputs = Heads(LOSSES[name][0]), head_inputs()
    plain = model(**inputs)
    ours = torch.compile(model, backend="mst", options={"mst.chunk_tokens": 8, **EAGER})(**inputs)
    assert ours.keys() == plain.keys()
    for key, value in plain.items():
        assert ours[key].requires_grad == value.requires_grad
        torch.testing.assert_close(ours[key] + 0, value + 0)


@pytest.mark.parametrize("name", ["z_loss", "penalised_logits", "distilled"])
def test_nothing_counts(name: str) -> None:
    model, inputs = Heads(LOSSES[name][0]), head_inputs()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)

    def run(fn: Any) -> list[Any]:
        model.zero_grad(set_to_none=True)
        output = fn(**inputs)
        loss = output["loss"] if isinstance(output, dict) else output
        loss.backward()
        return [loss.detach(), model.head.weight.grad]

    plain = run(model)
    ours = run(torch.compile(model, backend="mst", options={"mst.chunk_tokens": 8, **EAGER}))
    for a, b in zip(plain, ours, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
