"""Every way to do a work that is measured: eager, compiled, checkpointed, the peers', ours.

A system is a function ``(work, options) -> fn`` where ``fn`` takes the work's inputs as keywords. One that
can't run here raises ``UnavailableError`` with the reason, which becomes its row.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mst_fx.bench.works import Work

Function = Callable[..., Any]
System = Callable[[Work, Mapping[str, Any]], Function]


class UnavailableError(Exception):
    """A system can't do this work on this machine; the message says why."""


def eager(work: Work, options: Mapping[str, Any]) -> Function:
    """The module as it is."""
    return work.module


def inductor(work: Work, options: Mapping[str, Any]) -> Function:
    """``torch.compile``."""
    return torch.compile(work.module)


def inductor_checkpoint(work: Work, options: Mapping[str, Any]) -> Function:
    """``torch.compile`` with the block under torch's checkpointing, or the model under its own."""
    if work.name == "mlp":
        return torch.compile(lambda x: checkpoint(work.module, x, use_reentrant=False))
    return torch.compile(_checkpointed(work))


def auto_chunker(work: Work, options: Mapping[str, Any]) -> Function:
    """Inductor's AutoChunker with 8 chunks, its threshold lowered so that it fires."""
    if work.name == "mlp":
        raise UnavailableError("AutoChunker starts at a matmul whose output is 8 times its input: never an MLP")
    settings = {"auto_chunker.enable": True, "auto_chunker.num_chunk": 8, "auto_chunker.amplify_ratio_threshold": 1}
    return torch.compile(work.module, options=settings, dynamic=False)


def torch_linear_ce(work: Work, options: Mapping[str, Any]) -> Function:
    """``F.linear_cross_entropy`` with its chunked implementation (torch 2.13 and newer)."""
    _only(work, "head")
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise UnavailableError(f"torch {torch.__version__} has no F.linear_cross_entropy; 2.13 has")
    settings = torch.nn.LinearCrossEntropyOptions()
    weight = work.module.weight

    def run(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.linear_cross_entropy(hidden.flatten(0, 1), weight, labels.flatten(), options=settings)

    return run


def liger(work: Work, options: Mapping[str, Any]) -> Function:
    """Liger's fused linear cross-entropy, its tiled MLP, or its patches of a model."""
    if work.name == "mlp":  # in plain PyTorch, but the package imports Triton
        tiled = _optional("liger_kernel.ops.tiled_mlp", "liger-kernel").apply_tiled_mlp
        return lambda x: tiled(lambda module, rows: module(rows), work.module, x)
    _needs_cuda(work, "Liger's kernels are Triton's")
    if work.name == "head":
        loss = _optional("liger_kernel.transformers", "liger-kernel").LigerFusedLinearCrossEntropyLoss()
        return lambda hidden, labels: loss(work.module.weight, hidden.flatten(0, 1), labels.flatten())
    patch = _optional("liger_kernel.transformers", "liger-kernel").apply_liger_kernel_to_llama
    patch(model=work.module)
    return work.module


def cut_cross_entropy(work: Work, options: Mapping[str, Any]) -> Function:
    """Apple's cut-cross-entropy: its kernel on a GPU, its ``torch_compile`` implementation on a CPU."""
    _only(work, "head")
    found = _optional("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    implementation = "cce" if _device(work) == "cuda" else "torch_compile"
    return lambda hidden, labels: found(hidden, work.module.weight, labels, impl=implementation)


def chunk_checkpoint(work: Work, options: Mapping[str, Any]) -> Function:
    """Per-chunk eager checkpointing of the MLP, which is what ALST, Axolotl and Unsloth do; C as ours or 1024."""
    _only(work, "mlp")
    size = options.get("chunk_tokens", 1024)
    rows = size if isinstance(size, int) else 1024

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([checkpoint(work.module, part, use_reentrant=False) for part in x.split(rows, 1)], 1)

    return run


def mst_wrapper(work: Work, options: Mapping[str, Any]) -> Function:
    """What the MsT wrapper does: 64 chunks of the head, recomputed; chunks of 4096 tokens of the MLP, kept."""
    if work.name == "mlp":
        return lambda x: torch.cat([work.module(part) for part in x.split(4096, 1)], 1)
    _only(work, "head")

    def part_loss(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, work.module.weight).float(), labels, reduction="sum")

    def run(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows, wanted = hidden.flatten(0, 1), labels.flatten()
        size = -(-rows.shape[0] // 64)
        parts = zip(rows.split(size), wanted.split(size), strict=True)
        total = sum(checkpoint(part_loss, h, y, use_reentrant=False) for h, y in parts)
        return total / (wanted != -100).sum()

    return run


def mst(work: Work, options: Mapping[str, Any]) -> Function:
    """``torch.compile(backend="mst")``."""
    return torch.compile(work.module, backend="mst", options={f"mst.{k}": v for k, v in options.items()})


def mst_parameter(work: Work, options: Mapping[str, Any]) -> Function:
    """The same with weight gradients summed in the dtype of the weight, as the peers do."""
    return mst(work, {**options, "accumulate": "parameter"})


def mst_checkpoint(work: Work, options: Mapping[str, Any]) -> Function:
    """The model under its gradient checkpointing, and ours."""
    return torch.compile(_checkpointed(work), backend="mst", options={f"mst.{k}": v for k, v in options.items()})


def mst_checkpoint_by_2(work: Work, options: Mapping[str, Any]) -> Function:
    """The same with layers recomputed by twos."""
    return mst_checkpoint(work, {**options, "checkpoint_layers": 2})


SYSTEMS: dict[str, System] = {
    "eager": eager,
    "inductor": inductor,
    "inductor+checkpoint": inductor_checkpoint,
    "auto_chunker": auto_chunker,
    "F.linear_cross_entropy": torch_linear_ce,
    "liger": liger,
    "cut-cross-entropy": cut_cross_entropy,
    "chunk checkpoint": chunk_checkpoint,
    "mst wrapper": mst_wrapper,
    "mst": mst,
    "mst parameter": mst_parameter,
    "mst+checkpoint": mst_checkpoint,
    "mst+checkpoint by 2": mst_checkpoint_by_2,
}


def _only(work: Work, name: str) -> None:
    if work.name != name:
        raise UnavailableError(f"does the {name} alone")


def _checkpointed(work: Work) -> torch.nn.Module:
    """Return the model with its gradient checkpointing on; the weights are the same tensors."""
    if not hasattr(work.module, "gradient_checkpointing_enable"):
        raise UnavailableError(f"{work.name} has no layers to checkpoint")
    model = copy.deepcopy(work.module, {id(p): p for p in work.module.parameters()})
    model.gradient_checkpointing_enable()
    return model


def _device(work: Work) -> str:
    return next(iter(work.module.parameters())).device.type


def _needs_cuda(work: Work, why: str) -> None:
    if _device(work) != "cuda":
        raise UnavailableError(f"needs a GPU: {why}")


def _optional(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UnavailableError(f"not installed (pip install {package}): {e}") from e
