"""Runs a function three ways (fp64 truth, plain, ours) and compares its loss and every gradient."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

import mst_fx

EAGER = {"mst.compiler": "aot_eager"}
DEVICE = torch.get_default_device().type
"""Of tensors that name none; see ``--device``."""


def slow_but(kept: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Return cases as parameters, slow but for those kept in ``make test``; a case of several values is a tuple."""
    kept = [*kept]

    def parameter(case: Any) -> Any:
        marks = () if case in kept else pytest.mark.slow
        return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks)

    return [parameter(case) for case in cases]


@dataclasses.dataclass
class Run:
    """What one training step gave."""

    loss: torch.Tensor
    grads: dict[str, torch.Tensor]
    report: mst_fx.Report | None = None
    output: Any = None


def loss_of(output: Any) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    return output["loss"] if isinstance(output, dict) or hasattr(output, "keys") else output[0]


def step(model: torch.nn.Module, inputs: dict[str, Any], compile_with: dict[str, Any] | None, autocast: bool) -> Run:
    """One forward and backward; gradients of every parameter and of every input that requires one."""
    inputs = {
        k: v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v
        for k, v in inputs.items()
    }
    model.zero_grad(set_to_none=True)
    before = len(mst_fx.reports())
    fn: Callable[..., Any] = model if compile_with is None else torch.compile(model, **compile_with)
    context = torch.autocast(DEVICE, torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        output = fn(**inputs)
    loss = loss_of(output)
    loss.backward()
    grads = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    grads |= {f"input {k}": v.grad for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.grad is not None}
    found = mst_fx.reports()[before:]
    report = mst_fx.report.join_reports(found) if found else None
    return Run(loss.detach(), grads, report, output)


def to_double(model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.nn.Module, dict[str, Any]]:
    wide = copy.deepcopy(model).double()
    experts = getattr(getattr(wide, "config", None), "_experts_implementation", None)
    if experts == "grouped_mm":  # torch has no product by groups in fp64
        wide.set_experts_implementation("eager")  # pyright: ignore
    return wide, {
        k: v.detach().double().requires_grad_(v.requires_grad)
        if isinstance(v, torch.Tensor) and v.is_floating_point()
        else v
        for k, v in inputs.items()
    }


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error in the 2-norm; absolute where the truth is nothing."""
    scale = truth.norm().item()
    return (value.double() - truth).norm().item() / (scale if scale > 1e-12 else 1.0)


def check_exact(
    model: torch.nn.Module,
    inputs: dict[str, Any],
    *,
    options: dict[str, Any] | None = None,
    autocast: bool = False,
    slack: float | None = None,
    compiler: str = "aot_eager",
    **compile_kwargs: Any,
) -> Run:
    """Assert that our loss and gradients are as near to fp64 as the plain model's; return our run.

    In fp32 every gradient alone is held to the plain model's error plus a constant. In low precision the
    errors are noise of one scale, not of one size: all gradients together are held to it, each alone to 1.5
    times.
    """
    low = autocast or any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    slack = slack if slack is not None else (4e-3 if low else 2e-6)
    wide_model, wide_inputs = to_double(model, inputs)
    truth = step(wide_model, wide_inputs, None, False)
    plain = step(model, inputs, None, autocast)
    options = {"mst.compiler": compiler, "mst.chunk_tokens": 8, **(options or {})}
    ours = step(model, inputs, {"backend": "mst", "options": options, **compile_kwargs}, autocast)
    assert ours.loss.dtype == plain.loss.dtype
    assert ours.grads.keys() == plain.grads.keys()
    assert error(ours.loss, truth.loss) <= error(plain.loss, truth.loss) + slack
    for name, wide in truth.grads.items():
        mine, theirs = error(ours.grads[name], wide), error(plain.grads[name], wide)
        assert mine <= theirs * (1.5 if low else 1.0) + slack, f"{name}: ours {mine:.2e}, plain {theirs:.2e} from fp64"
        assert ours.grads[name].dtype == plain.grads[name].dtype
    wide = torch.cat([g.flatten() for g in truth.grads.values()])
    mine, theirs = (error(torch.cat([r.grads[n].flatten() for n in truth.grads]), wide) for r in (ours, plain))
    assert mine <= theirs * 1.05 + slack / 4, f"all gradients: ours {mine:.2e}, plain {theirs:.2e} from fp64"
    return ours


def chunked(report: mst_fx.Report | None, kind: str) -> int:
    """Count chunked regions of a kind."""
    assert report is not None
    return sum(r.kind == kind for r in report.chunked)


def reasons(report: mst_fx.Report | None) -> str:
    """Join the reasons of all skipped regions and the notes."""
    assert report is not None
    return "\n".join([*(r.reason for r in report.regions if r.status == "skipped"), *report.notes])
