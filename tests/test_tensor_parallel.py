"""Tensor parallelism by DTensor: right, and what is left alone says why."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.engines import (
    MST,
    chunked,
    count_collectives,
    llama,
    make_batches,
    own_gradients,
    run_cases,
    small,
    true_gradients,
    worst,
)
from tests.harness import loss_of
from tests.ranks import run_ranks


def train(rank: int, world: int, *, folder: str | None = None) -> dict[str, Any]:
    """Split the MLPs by hand, or with a ``folder`` all of a Llama by its own plan; one step without and with mst."""
    model = small() if folder is None else llama()
    batch = make_batches(model, 1)[0][0]
    truth = true_gradients(model, [[batch]])
    mesh = init_device_mesh("cpu", (world,))
    result: dict[str, Any] = {}
    for system in ("plain", "mst"):
        if folder is None:
            split = small()
            for block in split.body.blocks:
                plan = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
                parallelize_module(block, mesh, plan)
        else:
            from transformers import AutoModelForCausalLM

            if rank == 0:
                model.save_pretrained(folder)
            dist.barrier()
            split = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", device_mesh=mesh).train()
            split.config.use_cache = False
        if system == "mst":
            split.compile(**MST)
        step = functools.partial(lambda fn: loss_of(fn(**batch)).backward(), split)
        step()
        split.zero_grad()
        result[system] = {"collectives": count_collectives(step), "worst": worst(own_gradients(split), truth)}
    return result


def run_all(rank: int, world: int, folder: str) -> dict[str, Any]:
    return run_cases({"by hand": train, "by plan": functools.partial(train, folder=folder)}, rank, world)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("tensor_parallel")
    return run_ranks(run_all, 2, folder, str(folder))


@pytest.mark.parametrize("name", ["by hand", "by plan"])
def test_gradients_are_right_and_reasons_given(results: list[dict[str, Any]], name: str) -> None:
    for result in (r[name] for r in results):
        assert "error" not in result, result["error"]
        assert result["mst"]["worst"] < 2e-6
        assert result["mst"]["collectives"] == result["plain"]["collectives"]
        skipped = [reason for _, status, reason in result["regions"] if status == "skipped"]
        assert len(skipped) == (4 if name == "by hand" else 5)
        assert all("a DTensor is a tensor subclass" in reason for reason in skipped)
        assert chunked(result, "loss") == (1 if name == "by hand" else 0)  # the plan splits the head
