"""Tensor parallelism by DTensor: MLPs are chunked on each rank's shards; what is left alone says why."""

from __future__ import annotations

import functools
import shutil
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from mst_fx.config import PASS_NAMES
from tests.engines import (
    OPTIONS,
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
from tests.models import Between

PLAIN = {**OPTIONS, "mst.disable": PASS_NAMES}
HAND = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
# Between the layers a rank has some of the tokens: gathered before an MLP, reduced and scattered after it.
SEQUENCE = {
    "gate": ColwiseParallel(input_layouts=Shard(1)),
    "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Shard(1)),
}
GATHERED = {"gate": ColwiseParallel(output_layouts=Replicate()), "up": ColwiseParallel(output_layouts=Replicate())}
STAYING = {
    "gate": ColwiseParallel(use_local_output=False),
    "up": ColwiseParallel(use_local_output=False),
    "down": RowwiseParallel(),
}


def wide() -> nn.Module:
    """MLPs of which a fourth is still wider than the hidden states."""
    torch.manual_seed(0)
    model = small()
    model.body.blocks = nn.ModuleList([Between(F.silu, 96), Between(F.gelu, 96)])  # pyright: ignore
    return model


class Spread(nn.Module):
    """A block between whose neighbours a rank has its share of the sequence."""

    def __init__(self, block: nn.Module, mesh: Any) -> None:
        super().__init__()
        self.block, self.mesh = block, mesh

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = DTensor.from_local(x, self.mesh, [Replicate()]).redistribute(placements=[Shard(1)]).to_local()
        out = DTensor.from_local(self.block(own), self.mesh, [Shard(1)])
        return out.redistribute(placements=[Replicate()]).to_local()


def train(
    rank: int, world: int, *, plan: dict[str, Any] | None = None, build: Any = small, half: bool = False
) -> dict[str, Any]:
    """Split the MLPs as ``plan`` says, or all of a Llama by its own plan; one step without the passes and with them."""
    model = build() if plan else llama()
    batch = make_batches(model, 1)[0][0]
    if plan is SEQUENCE:
        batch = {k: v[:, :16] for k, v in batch.items()}  # shares are equal
    truth = true_gradients(model, [[batch]])
    mesh = init_device_mesh("cpu", (world,))
    result: dict[str, Any] = {}
    for system in ("plain", "mst"):
        split: Any = build() if plan else load_by_plan(model, rank, mesh)
        for i, block in enumerate(split.body.blocks if plan else []):
            parallelize_module(block, mesh, plan)
            if plan is SEQUENCE:
                split.body.blocks[i] = Spread(block, mesh)
        split.compile(backend="mst", options=OPTIONS if system == "mst" else PLAIN)

        def step(fn: Any = split) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = loss_of(fn(**batch))
            loss.backward()

        step()
        split.zero_grad()
        collectives = count_collectives(step)
        grads = {n.replace(".block.", "."): g for n, g in own_gradients(split).items()}
        result[system] = {"collectives": collectives, "worst": worst(grads, truth)}
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


pytestmark = pytest.mark.xdist_group("tensor_parallel")

CASES = {
    "by hand": functools.partial(train, plan=HAND),
    "by hand, bf16": functools.partial(train, plan=HAND, half=True),
    "by sequence": functools.partial(train, plan=SEQUENCE),
    "by plan": train,
    "gathered": functools.partial(train, plan=GATHERED),
    "staying": functools.partial(train, plan=STAYING),
}
FOUR = {
    "four processes": functools.partial(train, plan={"up": ColwiseParallel(), "down": RowwiseParallel()}, build=wide)
}
results = results_of(__name__)
four_results = results_of(__name__, "FOUR", world=4)


# Older versions hide placements in closures: all is left alone there.
SHOWN = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def check(name: str, results: list[dict[str, Any]]) -> None:
    for result in of_case(results, name):
        ours, plain = result["mst"], result["plain"]
        assert ours["worst"] <= plain["worst"] * (1.5 if "bf16" in name else 1) + (4e-3 if "bf16" in name else 2e-6)
        assert ours["collectives"] == plain["collectives"]
        assert sum(plain["collectives"].values()) > 0
        done = 0 if name in ("gathered", "staying") or not SHOWN else 2
        assert chunked(result, "mlp") == done, result["text"]
        skipped = [reason for _, status, reason in result["regions"] if status == "skipped"]
        assert len(skipped) == (0 if done else 4) + ("by plan" in name), result["text"]
        assert all("DTensor" in reason for reason in skipped)
        assert chunked(result, "loss") == (0 if "by plan" in name else 1)  # the plan splits the head


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_collectives(results: list[dict[str, Any]], name: str) -> None:
    check(name, results)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_processes(four_results: list[dict[str, Any]], name: str) -> None:
    check(name, four_results)
