"""Tries a promise on random data: is what the module gives for a token the same whoever stands beside it?

Two sequences of random tokens go through the module at once; then the same tokens in chunks that cut across the
sequences, and in another order. Outputs, gradients of the tokens and gradients of parameters must agree. Real
weights, float64 where the module runs in it, dropout off, integer inputs 0 or 1. Passing is evidence, no proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._dynamo.exc import ShortenTraceback

from mst_fx.body import Body, InputSpec
from mst_fx.config import OptionError
from mst_fx.graph import autocast_off, is_differentiable
from mst_fx.inductor import is_plain_fake, without_modes
from mst_fx.regions.promised import ModuleRows

TOKENS, CUT = 48, 20
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}


class PromiseError(ShortenTraceback, ValueError):
    """A module declared token-wise is not; raised under ``mst.verify_tokenwise``."""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


def check_promise(body: Body) -> None:
    """Run a promised module on random tokens whole, in chunks and in another order.

    Raises:
        PromiseError: If results differ.
        OptionError: If the module has no real weights to run with.
    """
    function = body.graph
    assert isinstance(function, ModuleRows)
    state = {**dict(function.promise.module.named_parameters()), **dict(function.promise.module.named_buffers())}
    if any(is_plain_fake(t) or t.is_meta for t in state.values()):
        raise OptionError("mst.verify_tokenwise needs real weights; this model has none.")
    given = {place.position: state[name] for name, place in function.state.items()}
    quiet = replace(function, seeded=False, autocast=autocast_off)
    with without_modes(), torch.inference_mode(False), torch.enable_grad(), autocast_off():
        generator = torch.Generator().manual_seed(0)
        inputs = [
            _random(spec, TOKENS if i < len(body.chunked) else None, generator) if i not in given else given[i].detach()
            for i, spec in enumerate(body.inputs)
        ]
        wide = [x.to(_wide(x.dtype), copy=True) for x in inputs]
        try:
            _compare(quiet, body, wide, torch.float64)
        except PromiseError:
            raise
        except Exception:  # the module asks for a dtype of its own
            narrow = next((x.dtype for x in inputs if x.is_floating_point()), torch.float32)
            _compare(quiet, body, [x.clone() for x in inputs], narrow)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float64) if is_differentiable(dtype) else dtype


def _real(value: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(value) if value.is_complex() else value


def _random(spec: InputSpec, tokens: int | None, generator: torch.Generator) -> torch.Tensor:
    if tokens is None:
        return torch.ones(spec.shape, dtype=spec.dtype, device=spec.device)
    shape = (tokens, *spec.shape)
    if is_differentiable(spec.dtype):
        wide = torch.promote_types(spec.dtype, torch.float32)
        return torch.randn(shape, generator=generator, dtype=wide).to(spec.device, spec.dtype)
    return torch.randint(0, 2, shape, generator=generator).to(spec.device, spec.dtype)


def _compare(function: ModuleRows, body: Body, inputs: list[torch.Tensor], dtype: torch.dtype) -> None:
    rows, shared = inputs[: len(body.chunked)], inputs[len(body.chunked) :]
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))
    back = order.argsort()
    whole = _run(replace(function, sequences=2), body, rows, shared, slice(None))
    first, second = (_run(function, body, rows, shared, cut) for cut in (slice(0, CUT), slice(CUT, None)))
    moved = _run(function, body, rows, shared, order)
    n = len(whole) - sum(s.needs_grad for s in body.shared)
    joined = [torch.cat(pair) for pair in zip(first[:n], second[:n], strict=True)]
    joined += [a + b for a, b in zip(first[n:], second[n:], strict=True)]
    _agree(function, body, whole, joined, n, f"in chunks of {CUT} and {TOKENS - CUT}", dtype)
    _agree(function, body, whole, [m[back] for m in moved[:n]] + moved[n:], n, "in another order", dtype)


def _run(function: ModuleRows, body: Body, rows: Any, shared: Any, which: Any) -> list[torch.Tensor]:
    """Return outputs and gradients of chunked inputs (rows each), then gradients of shared ones."""
    xs = [x[which].clone() for x in rows] + [x.clone() for x in shared]
    leaves = [x.requires_grad_() for x, spec in zip(xs, body.inputs, strict=True) if spec.needs_grad]
    outs = [_real(o) for o in function(*xs)]
    total = sum((o * _weights(o, which)).sum() for o in outs if o.requires_grad)
    found: Sequence[Any] = [None] * len(leaves)
    if isinstance(total, torch.Tensor):
        found = torch.autograd.grad(total, leaves, allow_unused=True)
    grads = [_real(torch.zeros_like(x) if g is None else g) for x, g in zip(leaves, found, strict=True)]
    return [o.detach() for o in outs] + grads


def _weights(out: torch.Tensor, which: Any) -> torch.Tensor:
    """Return the upstream gradient of an output's rows: random, the same for a token wherever it stands."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn((TOKENS, *out.shape[1:]), generator=generator)[which].to(out)


def _agree(
    function: ModuleRows, body: Body, whole: list[Any], other: list[Any], rows: int, how: str, dtype: torch.dtype
) -> None:
    names = [f"output {i}" for i, _ in function.outputs]
    names += [f"the gradient of input {i}" for i, s in enumerate(body.chunked) if s.needs_grad]
    by_position = {place.position: name for name, place in function.state.items()}
    names += [f"the gradient of `{by_position.get(i, i)}`" for i in body.needs if i >= len(body.chunked)]
    tolerance = _TOLERANCE.get(dtype, 5e-2)
    for i, (name, a, b) in enumerate(zip(names, whole, other, strict=True)):
        if i >= rows:
            a, b = a[None], b[None]
        a, b = a.double().flatten(1), b.double().flatten(1)
        error = (a - b).norm(dim=1) / a.norm(dim=1).square().mean().sqrt().clamp(min=1e-12)
        error = torch.where(error.isnan() & a.isnan().any(1) & b.isnan().any(1), 0.0, error)
        worst = int(error.nan_to_num(torch.inf).argmax())
        if not error[worst] <= tolerance:
            where = f" of token {worst}" if i < rows else ""
            raise PromiseError(
                f"mst_fx.tokenwise: `{function.promise}` is not token-wise: with {TOKENS} random tokens, {name}{where} "
                f"differs by {error[worst]:.1e} of its size when they are computed {how}. It must depend on that token "
                "alone: do not declare this module, or declare the parts of it that are token-wise."
            )
