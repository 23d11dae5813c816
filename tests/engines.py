"""What the tests of distributed engines share: models, a batch per rank, the truth, and how far from it one is."""

from __future__ import annotations

import collections
import copy
import functools
import importlib
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mst_fx
from mst_fx.lazy_logits import LazyLogits
from tests.harness import error, loss_of
from tests.models import H, SwiGLU, V, hf, hf_inputs, token_inputs
from tests.ranks import run_ranks

OPTIONS = {"mst.compiler": "aot_eager", "mst.chunk_tokens": 8}
MST: dict[str, Any] = {"backend": "mst", "options": OPTIONS}

Case = Callable[[int, int], dict[str, Any]]
Batches = list[list[dict[str, Any]]]
"""Micro-batches of every rank, known to all: ``batches[rank][micro]``."""


class Body(nn.Module):
    """Embedding and residual MLPs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, H)
        self.blocks = nn.ModuleList([SwiGLU(), SwiGLU(bias=True)])
        self.norm = nn.LayerNorm(H)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)


class Small(nn.Module):
    """Two MLPs and a head; with a ``count``, the loss is a sum over tokens divided by it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Body(), nn.Linear(H, V, bias=False)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, count: torch.Tensor | None = None) -> torch.Tensor:
        logits = self.head(self.body(ids)).flatten(0, -2)
        if count is None:
            return F.cross_entropy(logits, labels.reshape(-1))
        return F.cross_entropy(logits, labels.reshape(-1), reduction="sum") / count


def small() -> nn.Module:
    """The same small model on every rank."""
    torch.manual_seed(0)
    return Small()


def llama(**overrides: Any) -> nn.Module:
    """The same small Llama on every rank."""
    torch.manual_seed(0)
    return hf("llama", **overrides)


def make_batches(
    model: nn.Module,
    world: int,
    micro: int = 1,
    lengths: tuple[int, ...] = (),
    ignored: int | None = None,
    count: int | None = None,
) -> Batches:
    """Batches for a model; those of rank ``ignored`` have no label that counts."""
    torch.manual_seed(1)
    make = functools.partial(hf_inputs, "llama") if hasattr(model, "config") else token_inputs
    found = [[make(2, lengths[r] if lengths else 23) for _ in range(micro)] for r in range(world)]
    for batch in found[ignored] if ignored is not None else []:
        batch["labels"] = torch.full_like(batch["labels"], -100)
    for batch in [b for own in found for b in own] if count is not None else []:
        batch["count"] = torch.tensor(count)
    return found


def true_gradients(model: nn.Module, batches: Batches) -> dict[str, torch.Tensor]:
    """The gradients of the mean over ranks of each rank's summed losses, in fp64, in one process."""
    wide = copy.deepcopy(model).double()
    losses = [loss_of(wide(**batch)) for own in batches for batch in own]
    torch.stack([loss for loss in losses if not loss.isnan()]).sum().div(len(batches)).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in wide.named_parameters()}


def worst(grads: Mapping[str, torch.Tensor | None], truth: Mapping[str, torch.Tensor]) -> float:
    """The largest relative error of any gradient; one that is missing counts as zeros."""
    zeros = {n: torch.zeros_like(t) for n, t in truth.items()}
    return max(error(zeros[n] if (g := grads.get(n)) is None else g, t) for n, t in truth.items())


def own_gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """What is in ``.grad``, put together where it lies apart, under the names of the model as it was built."""
    found = {}
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if p.grad is not None and hasattr(p.grad, "full_tensor") else p.grad
        found[name.replace("_orig_mod.", "").removeprefix("module.")] = grad
    return found


def count_collectives(run: Callable[[], Any]) -> dict[str, int]:
    """Run a step and count the collectives this rank took part in, by kind."""
    with torch.profiler.profile() as profile:
        run()
    names = collections.Counter(e.name.removeprefix("c10d::") for e in profile.events() if e.name.startswith("c10d::"))
    found: collections.Counter[str] = collections.Counter()
    for name, number in names.items():
        kind = next((k for k in ("gather", "reduce_scatter", "allreduce", "broadcast") if k in name), name)
        found[kind] += number
    return dict(found)


def is_unread(output: Any) -> bool:
    """Whether a model's output has logits that nobody has computed."""
    logits = getattr(output, "logits", None)
    return isinstance(logits, LazyLogits) and logits._deferred.value is None


def run_cases(rank: int, world: int, module: str, cases: str) -> dict[str, Any]:
    """Run the cases a module has under a name, one after another in this rank; one that raises is its traceback."""
    results: dict[str, Any] = {}
    for name, case in getattr(importlib.import_module(module), cases).items():
        torch._dynamo.reset()
        before = len(mst_fx.reports())
        try:
            results[name] = case(rank, world)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
            break  # the ranks may be apart now
        found = mst_fx.reports()[before:]
        results[name] |= {
            "regions": [(r.kind, r.status, r.reason) for report in found for r in report.regions],
            "text": "\n".join(map(str, found)),
        }
    return results


def results_of(module: str, cases: str = "CASES", world: int = 2, timeout: float = 240) -> Any:
    """Return a fixture: all cases that a test module has under a name, run in ``world`` ranks that start once."""

    @pytest.fixture(scope="module")
    def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp(cases.lower())
        return run_ranks(run_cases, world, folder, module, cases, timeout=timeout)

    return results


def of_case(results: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Return what every rank found in a case, which must have run to its end."""
    for result in results:
        assert name in result, f"not run: {[r['error'] for r in result.values() if 'error' in r]}"
        assert "error" not in result[name], result[name]["error"]
    return [result[name] for result in results]


def chunked(result: dict[str, Any], kind: str) -> int:
    """Count chunked regions of a kind in a case's result."""
    return sum(k == kind and status == "chunked" for k, status, _ in result["regions"])
