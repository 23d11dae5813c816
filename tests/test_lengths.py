"""Lengths that change: at most one recompilation, whatever is marked, and every tail."""

from typing import Any

import pytest
import torch
from torch import nn

import mst_fx
from tests.harness import EAGER, chunked
from tests.models import LanguageModel, SwiGLU, token_inputs

OPTIONS = {"mst.chunk_tokens": 8, **EAGER}
slow = pytest.mark.slow
SHAPES = [(2, 23), (2, 40), (3, 23), (5, 7), (2, 9), (4, 2), (7, 31), (2, 33), (3, 8), (2, 3)]


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def same_as_plain(fn: Any, model: nn.Module, inputs: dict[str, Any]) -> None:
    """Assert that loss and every gradient are the plain model's."""
    grads = []
    for run in (model, fn):
        model.zero_grad(set_to_none=True)
        loss = run(**inputs)
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, equal_nan=True)


@pytest.mark.parametrize("dynamic", [None, True])
def test_batch_and_length_change_with_at_most_one_recompilation(dynamic: bool | None) -> None:
    model = LanguageModel(SwiGLU())
    fn = torch.compile(model, backend="mst", dynamic=dynamic, options=OPTIONS)
    torch._dynamo.utils.counters.clear()
    for shape in SHAPES:
        same_as_plain(fn, model, token_inputs(*shape))
    # Dynamo makes dynamic what it has seen change: the length first, then the batch.
    assert graphs() <= (1 if dynamic else 3)
    assert chunked(mst_fx.reports()[-1], "mlp") == chunked(mst_fx.reports()[-1], "loss") == 1


@pytest.mark.parametrize("dims", [pytest.param((0,), marks=slow), (1,), (0, 1)], ids=str)
def test_marked_dimensions_never_recompile(dims: tuple[int, ...]) -> None:
    model = LanguageModel(SwiGLU())
    fn = torch.compile(model, backend="mst", options=OPTIONS)
    torch._dynamo.utils.counters.clear()
    for batch, length in SHAPES:
        inputs = token_inputs(batch if 0 in dims else 2, length if 1 in dims else 23)
        for value in inputs.values():
            for dim in dims:
                torch._dynamo.mark_dynamic(value, dim)
        same_as_plain(fn, model, inputs)
    assert graphs() == 1
    assert len(mst_fx.reports()[-1].chunked) == 2


@pytest.mark.parametrize("dynamic", [pytest.param(None, marks=slow), True])
@pytest.mark.parametrize(
    "shapes", [[(1, 1), (1, 17), (1, 1)], [(2, 0), (2, 17), (2, 0)], [(2, 23), (1, 1), (2, 0)]], ids=str
)
def test_one_token_and_none(shapes: list[tuple[int, int]], dynamic: bool | None) -> None:
    model = LanguageModel(SwiGLU())
    fn = torch.compile(model, backend="mst", dynamic=dynamic, options=OPTIONS)
    for shape in shapes:
        same_as_plain(fn, model, token_inputs(*shape))


def test_all_labels_ignored() -> None:
    model = LanguageModel(SwiGLU())
    fn = torch.compile(model, backend="mst", dynamic=True, options=OPTIONS)
    inputs = token_inputs()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    same_as_plain(fn, model, inputs)


@pytest.mark.parametrize("tokens", [15, 16, *(pytest.param(n, marks=slow) for n in (17, 47, 48, 61))])
def test_lengths_that_equal_other_sizes(tokens: int) -> None:
    model = LanguageModel(SwiGLU())
    fn = torch.compile(model, backend="mst", dynamic=True, options={**OPTIONS, "mst.chunk_tokens": 16})
    same_as_plain(fn, model, token_inputs(1, tokens))
    same_as_plain(fn, model, token_inputs(tokens, 3))


@pytest.mark.slow
def test_inductor_tails_and_lengths() -> None:
    model = LanguageModel(SwiGLU())
    fn = torch.compile(model, backend="mst", dynamic=True, options={"mst.chunk_tokens": 8})
    torch._dynamo.utils.counters.clear()
    for shape in SHAPES:
        same_as_plain(fn, model, token_inputs(*shape))
    assert graphs() == 1
    for shape in ((1, 1), (2, 0), (1, 17)):
        same_as_plain(fn, model, token_inputs(*shape))
