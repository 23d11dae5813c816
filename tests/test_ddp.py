"""DistributedDataParallel: the graph is cut by bucket, and regions stay whole."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from mst_fx.backend import mst
from tests.engines import (
    MST,
    OPTIONS,
    chunked,
    is_unread,
    llama,
    make_batches,
    of_case,
    own_gradients,
    results_of,
    small,
    true_gradients,
    worst,
)
from tests.harness import error, loss_of


class Unused(nn.Module):
    """A model with a parameter that no loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small()
        self.never = nn.Linear(3, 3)

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


def train(
    rank: int,
    world: int,
    *,
    build: Any = small,
    inside: bool = False,
    whole: bool = False,
    steps: int = 1,
    checkpointing: bool = False,
    compile_with: dict[str, Any] = MST,
    made: dict[str, Any] | None = None,
    **ddp: Any,
) -> dict[str, Any]:
    """Take some steps, the last of which is looked at, with every gradient a bucket of its own."""
    model = build()
    if checkpointing:
        model.gradient_checkpointing_enable()
    batches = make_batches(model, world, **(made or {}))
    plain = copy.deepcopy(model)
    truth = true_gradients(model, batches)
    fired: collections.Counter[str] = collections.Counter()
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: fired.update([name]))
    counters.clear()
    if inside:
        model.compile(**compile_with)
    first = 2**20 if whole else 1
    with mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", first):
        wrapped = DistributedDataParallel(model, bucket_cap_mb=first / 2**20, **ddp)
        fn = wrapped if inside else torch.compile(wrapped, **compile_with)
        for _ in range(steps):
            model.zero_grad()
            for batch in batches[rank]:
                with contextlib.nullcontext() if batch is batches[rank][-1] else wrapped.no_sync():
                    out = fn(**batch)
                    fired.clear()
                    loss_of(out).backward()
    result = {
        "worst": worst(own_gradients(model), truth),
        "graphs": counters["aot_autograd"]["total"],
        "fired": set(fired.values()),
    }
    if hasattr(model, "config"):
        result["unread"] = is_unread(out)
        expected = plain(input_ids=batch["input_ids"]).logits
        result["logits"] = error(out.logits.float() + 0, expected.double())
    return result


pytestmark = pytest.mark.xdist_group("ddp")

CASES = {
    "llama": functools.partial(train, build=llama),
    "inside": functools.partial(train, inside=True),
    "one bucket": functools.partial(train, whole=True),
    "static graph": functools.partial(train, static_graph=True, gradient_as_bucket_view=True, steps=3),
    # Its sink clones every output, lazy logits too: in the first step of a static graph, in all where it searches.
    "static graph, one bucket": functools.partial(train, build=llama, whole=True, static_graph=True),
    "static graph, one bucket, second step": functools.partial(
        train, build=llama, whole=True, static_graph=True, steps=2
    ),
    "searched, one bucket": functools.partial(train, build=llama, whole=True, find_unused_parameters=True),
    "unused parameter": functools.partial(train, build=Unused, find_unused_parameters=True, steps=2),
    "accumulation": functools.partial(train, made={"micro": 3}),
    "lengths": functools.partial(train, made={"lengths": (9, 23), "count": 40}),
    "ignored": functools.partial(train, made={"ignored": 1}),
    "ignored, summed": functools.partial(train, made={"ignored": 1, "count": 40}),
    "behind a function": functools.partial(
        train, compile_with={"backend": lambda gm, inputs: mst(gm, inputs, options=OPTIONS)}
    ),
    "another backend": functools.partial(train, compile_with={"backend": "aot_eager"}),
}
INDUCTOR = {"backend": "mst", "options": {"mst.chunk_tokens": 8}}
SLOW = {
    "llama, checkpointing": functools.partial(train, build=llama, checkpointing=True),
    "inductor": functools.partial(train, build=llama, compile_with=INDUCTOR, steps=2),
}
FOUR = {"four processes": functools.partial(train, made={"lengths": (9, 23, 16, 40), "ignored": 2, "count": 40})}


results = results_of(__name__)
slow_results = results_of(__name__, "SLOW", timeout=580)
four_results = results_of(__name__, "FOUR", world=4)


def check(name: str, results: list[dict[str, Any]]) -> None:
    for result in of_case(results, name):
        assert result["worst"] < 2e-6, f"{name}: {result['worst']}"
        assert result.get("logits", 0) < 1e-6
        assert result.get("unread", True), "returned logits were computed"
        assert result["fired"] == {1}, "a gradient hook did not fire once"
        cut = result["graphs"]
        assert cut == 1 if "one bucket" in name else cut > 3, f"{cut} graphs"
        if name not in ("behind a function", "another backend"):
            assert (chunked(result, "mlp"), chunked(result, "loss")) == (2, 1), result["text"]


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process(results: list[dict[str, Any]], name: str) -> None:
    check(name, results)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_checkpointing_and_inductor(slow_results: list[dict[str, Any]], name: str) -> None:
    check(name, slow_results)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_processes(four_results: list[dict[str, Any]], name: str) -> None:
    check(name, four_results)


def test_pieces_say_so(results: list[dict[str, Any]]) -> None:
    result = results[0]["behind a function"]
    assert "DDP's gradient buckets cut this graph before the backend saw it" in result["text"]
