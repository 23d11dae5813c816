"""DeepSpeed ZeRO: gradients are those of one process; under ZeRO-3, MLPs that are gathered whole are chunked."""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch

from tests.engines import (
    MST,
    OPTIONS,
    chunked,
    count_collectives,
    make_batches,
    of_case,
    results_of,
    small,
    true_gradients,
    worst,
)
from tests.harness import loss_of

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'mst_fx[deepspeed]'")


def train(
    rank: int, world: int, *, stage: int, how: str, own_linear: bool = False, made: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Take two steps; look at the second, whose collectives are counted.

    ``how``: "plain"; "engine" compiles the engine; "leaves" compiles the MLPs, which ZeRO-3 is told to gather whole.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils import safe_get_full_grad, set_z3_leaf_modules

    model = small()
    batches = make_batches(model, world, **(made or {}))
    truth = true_gradients(model, batches)
    names = [n for n, _ in model.named_parameters()]
    if stage == 3:
        set_z3_leaf_modules(model, [type(model.body.blocks[0])])
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "memory_efficient_linear": own_linear,
        },
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer, dist_init_required=False)
    if how == "engine":
        engine.compile(backend="mst", compile_kwargs={"options": OPTIONS})
    if how == "leaves":
        for block in model.body.blocks:
            block.forward = torch.compile(block.forward, **MST)
    found: dict[str, Any] = {}

    def step() -> None:
        for batch in batches[rank]:
            engine.backward(loss_of(engine(**batch)))
        grads = [safe_get_full_grad(p) for p in model.parameters()]
        found.update({n: g.view_as(truth[n]) for n, g in zip(names, grads, strict=True)})
        engine.step()

    collectives = [count_collectives(step) for _ in range(2)][1]
    return {"worst": worst(found, truth), "collectives": collectives}


pytestmark = pytest.mark.xdist_group("deepspeed")

CASES = {
    "zero-1": functools.partial(train, stage=1, how="engine"),
    "zero-2": functools.partial(train, stage=2, how="engine"),
    "zero-2, ignored": functools.partial(train, stage=2, how="engine", made={"ignored": 1, "count": 40}),
    "zero-3, plain": functools.partial(train, stage=3, how="plain"),
    "zero-3, leaves": functools.partial(train, stage=3, how="leaves"),
    "zero-3, engine": functools.partial(train, stage=3, how="engine"),
    "zero-3, leaves, lengths": functools.partial(train, stage=3, how="leaves", made={"lengths": (9, 23), "count": 40}),
    # Last: DeepSpeed puts it in the place of torch's for good.
    "zero-3, own linear": functools.partial(train, stage=3, how="leaves", own_linear=True),
}

UNEVEN = {"lengths": (9, 23, 16, 40), "ignored": 2, "count": 40}
FOUR = {
    "zero-2": functools.partial(train, stage=2, how="engine", made=UNEVEN),
    "zero-3, engine": functools.partial(train, stage=3, how="engine", made=UNEVEN),
}


results = results_of(__name__)
four_results = results_of(__name__, "FOUR", world=4, timeout=400)


def check(name: str, results: list[dict[str, Any]]) -> None:
    for result in of_case(results, name):
        assert result["worst"] < 2e-6, f"{name}: {result['worst']}"
        # ZeRO-3 gathers module by module: head and loss are in different graphs.
        wanted = {"zero-3, plain": (0, 0), "zero-3, own linear": (0, 0)}.get(
            name, (2, 0) if "zero-3" in name else (2, 1)
        )
        assert (chunked(result, "mlp"), chunked(result, "loss")) == wanted, result["text"]


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process(results: list[dict[str, Any]], name: str) -> None:
    check(name, results)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_processes(four_results: list[dict[str, Any]], name: str) -> None:
    check(name, four_results)


@pytest.mark.parametrize("name", ["zero-3, leaves", "zero-3, engine"])
def test_weights_are_gathered_once(results: list[dict[str, Any]], name: str) -> None:
    for ours, plain in zip(of_case(results, name), of_case(results, "zero-3, plain"), strict=True):
        assert ours["collectives"] == plain["collectives"]


def test_an_engine_compiled_under_zero_3_says_why_its_loss_is_not_chunked(results: list[dict[str, Any]]) -> None:
    assert "a graph break is between head and loss" in of_case(results, "zero-3, engine")[0]["text"]


def test_a_linear_with_its_own_backward_is_named(results: list[dict[str, Any]]) -> None:
    text = of_case(results, "zero-3, own linear")[0]["text"]
    assert "a torch.autograd.Function" in text
    assert "memory_efficient_linear" in text
