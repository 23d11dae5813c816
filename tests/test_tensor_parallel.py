"""Tensor parallelism by DTensor: right, and what is left alone says why."""

from __future__ import annotations

import functools
import shutil
import tempfile
from typing import Any

import pytest
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.engines import (
    MST,
    chunked,
    count_collectives,
    llama,
    make_batches,
    of_case,
    own_gradients,
    results_of,
    small,
    true_gradients,
    worst,
)
from tests.harness import loss_of


def train(rank: int, world: int, *, by_plan: bool = False) -> dict[str, Any]:
    """Split the MLPs by hand, or all of a Llama by its own plan; one step without and with mst."""
    model = llama() if by_plan else small()
    batch = make_batches(model, 1)[0][0]
    truth = true_gradients(model, [[batch]])
    mesh = init_device_mesh("cpu", (world,))
    result: dict[str, Any] = {}
    for system in ("plain", "mst"):
        if by_plan:
            split = load_by_plan(model, rank, mesh)
        else:
            split = small()
            for block in split.body.blocks:
                plan = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
                parallelize_module(block, mesh, plan)
        if system == "mst":
            split.compile(**MST)
        step = functools.partial(lambda fn: loss_of(fn(**batch)).backward(), split)
        step()
        split.zero_grad()
        result[system] = {"collectives": count_collectives(step), "worst": worst(own_gradients(split), truth)}
    return result


def load_by_plan(model: Any, rank: int, mesh: Any) -> Any:
    """Save a model of Transformers' and load it as its plan splits it, which only loading does."""
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    if rank == 0:
        model.save_pretrained(folder[0])
    dist.broadcast_object_list(folder)
    split = transformers.AutoModelForCausalLM.from_pretrained(folder[0], tp_plan="auto", device_mesh=mesh).train()
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder[0])
    split.config.use_cache = False
    return split


CASES = {"by hand": train, "by plan": functools.partial(train, by_plan=True)}
results = results_of(__name__)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_right_and_reasons_given(results: list[dict[str, Any]], name: str) -> None:
    for result in of_case(results, name):
        assert result["mst"]["worst"] < 2e-6
        assert result["mst"]["collectives"] == result["plain"]["collectives"]
        skipped = [reason for _, status, reason in result["regions"] if status == "skipped"]
        assert len(skipped) == (4 if name == "by hand" else 5)
        assert all("a DTensor is a tensor subclass" in reason for reason in skipped)
        assert chunked(result, "loss") == (1 if name == "by hand" else 0)  # the plan splits the head
