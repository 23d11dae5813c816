"""The registered ops and their loops: the only code that runs at every step.

    map:  token-wise body -> per-token outputs; its backward recomputes the body chunk by chunk.
    sum:  body -> per-token loss, summed, and other per-token values without a gradient; forms the gradients
          of that sum in the same pass over the chunks, so its backward only multiplies by the upstream scalar.

The loop is a loop at run time: compile time and graph size do not grow with the number of chunks, and
nothing can fuse the chunks together again. A body is named by the hash of its content, so that the name
in a cached graph finds the same body in another process; the backend registers bodies before any cache is
asked. Weight gradients are ordinary outputs, summed over chunks in one accumulator and cast once.

AOTAutograd switches off an autocast that was on when it compiled, not one that began later, as around a backward: the
loops do.

Memory: outputs, one chunk's values, and an accumulator per trained weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mst_fx.body import Backward, InputSpec, Term
from mst_fx.extended import Adder, add
from mst_fx.inductor import no_autocast
from mst_fx.plan import chunk_bounds
from mst_fx.sums import Sum

SEED_STEP = 7919
"""Added to the seed from one chunk to the next; any step but 0 would do."""
_TAGS = (torch.Tag.cudagraph_unsafe,)
"""A loop allocates per chunk and may draw masks: under ``mode="reduce-overhead"`` Inductor captures around it."""


@dataclass(frozen=True)
class CompiledBody:
    """A body ready to run. ``forward`` and ``backward`` are None where the graph never needs them."""

    chunked: tuple[InputSpec, ...]
    shared: tuple[InputSpec, ...]
    outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    """Per output, the shape of one row and the dtype."""
    forward: Callable[..., Any] | None
    backward: Callable[..., Any] | None
    plan: Backward | None
    accumulate: str
    tells_ignored: bool = False
    """Whether the last output tells tokens to which no gradient comes, however large it is behind the loss."""
    weight: int | None = None
    """The shared input that is split; see NOTE [a weight that rounds nothing]."""
    adder: Adder = add
    graph: fx.GraphModule | None = None
    """The forward as it was traced, for estimates; None in one that has none."""

    @property
    def differentiable(self) -> tuple[int, ...]:
        """Positions of the outputs through which gradients go, of a map."""
        return self.plan.differentiable if self.plan else ()


BODIES: dict[str, CompiledBody] = {}


# -- map ---------------------------------------------------------------------------------------------


@torch.library.custom_op("mst_fx::map", mutates_args=(), tags=_TAGS)
def map_op(
    chunked: Sequence[torch.Tensor],
    shared: Sequence[torch.Tensor],
    seed: torch.Tensor | None,
    body: str,
    chunk_tokens: int,
) -> list[torch.Tensor]:
    """Run a body over chunks of rows and return its outputs for all rows, ``[T, ...]`` each."""
    found = BODIES[body]
    assert found.forward is not None
    tokens, outs = chunked[0].shape[0], _empty(found.outputs, chunked[0])
    weights = _as_compiled(found.shared, shared)
    with no_autocast(chunked):
        for i, (start, end) in enumerate(chunk_bounds(tokens, chunk_tokens)):
            results = found.forward(*_rows(chunked, start, end), *weights, *_chunk_seed(seed, i))
            for out, result in zip(outs, results, strict=True):
                out[start:end].copy_(result)
            del results
    return outs


@map_op.register_fake
def _(chunked: Any, shared: Any, seed: Any, body: str, chunk_tokens: int) -> list[torch.Tensor]:
    return _empty(BODIES[body].outputs, chunked[0])


def _empty(metas: Sequence[tuple[tuple[int, ...], torch.dtype]], like: torch.Tensor) -> list[torch.Tensor]:
    return [like.new_empty((like.shape[0], *shape), dtype=dtype) for shape, dtype in metas]


@torch.library.custom_op("mst_fx::map_backward", mutates_args=(), tags=_TAGS)
def map_backward_op(
    tangents: Sequence[torch.Tensor],
    chunked: Sequence[torch.Tensor],
    shared: Sequence[torch.Tensor],
    seed: torch.Tensor | None,
    body: str,
    chunk_tokens: int,
) -> list[torch.Tensor]:
    """Recompute a body chunk by chunk and return the gradients of the inputs that need one, in order."""
    with no_autocast(chunked):
        return _run_backward(BODIES[body], chunked, shared, seed, tangents, chunk_tokens, None)


@map_backward_op.register_fake
def _(tangents: Any, chunked: Any, shared: Any, seed: Any, body: str, chunk_tokens: int) -> list[torch.Tensor]:
    return _fake_gradients(BODIES[body], chunked, shared)


def _map_setup(ctx: Any, inputs: Any, output: Any) -> None:
    chunked, shared, seed, body, chunk_tokens = inputs
    ctx.counts = len(chunked), len(shared)
    ctx.save_for_backward(*chunked, *shared, *([] if seed is None else [seed]))
    ctx.body, ctx.chunk_tokens = body, chunk_tokens
    ctx.set_materialize_grads(False)
    fixed = [o for i, o in enumerate(output) if i not in BODIES[body].differentiable]
    if fixed:
        ctx.mark_non_differentiable(*fixed)


def _map_backward(ctx: Any, grads: Any) -> Any:
    n, m = ctx.counts
    found = BODIES[ctx.body]
    assert found.plan is not None
    come = zip(found.differentiable, found.plan.reaches, strict=True)
    reached = frozenset().union(*(inputs for i, inputs in come if grads[i] is not None))
    if not reached:  # all is detached behind it; asked for what was saved, a checkpoint would recompute
        return [None] * n, [None] * m, None, None, None
    saved = ctx.saved_tensors
    chunked, shared, seed = list(saved[:n]), list(saved[n : n + m]), saved[n + m] if len(saved) > n + m else None
    tangents = []
    for i in found.differentiable:
        shape, dtype = found.outputs[i]
        tangents.append(
            chunked[0].new_zeros((chunked[0].shape[0], *shape), dtype=dtype) if grads[i] is None else grads[i]
        )
    results = torch.ops.mst_fx.map_backward(tangents, chunked, shared, seed, ctx.body, ctx.chunk_tokens)
    return *_spread(found, results, n, m, reached), None, None, None


torch.library.register_autograd("mst_fx::map", _map_backward, setup_context=_map_setup)


# -- sum ---------------------------------------------------------------------------------------------


@torch.library.custom_op("mst_fx::sum", mutates_args=(), tags=_TAGS)
def sum_op(
    chunked: Sequence[torch.Tensor],
    shared: Sequence[torch.Tensor],
    seed: torch.Tensor | None,
    body: str,
    chunk_tokens: int,
) -> list[torch.Tensor]:
    """Return the sum of a body's first output in fp32, its other outputs, then that sum's gradients."""
    found = BODIES[body]
    total: list[torch.Tensor] = []
    others = _empty(found.outputs[1:], chunked[0])
    with no_autocast(chunked):
        gradients = _run_backward(found, chunked, shared, seed, (), chunk_tokens, total, others)
    return [total[0] if total else _zero(chunked[0], found), *others, *gradients]


@sum_op.register_fake
def _(chunked: Any, shared: Any, seed: Any, body: str, chunk_tokens: int) -> list[torch.Tensor]:
    found = BODIES[body]
    others = _empty(found.outputs[1:], chunked[0])
    return [_zero(chunked[0], found), *others, *_fake_gradients(found, chunked, shared)]


def _zero(like: torch.Tensor, found: CompiledBody) -> torch.Tensor:
    dtype = torch.promote_types(found.outputs[0][1], torch.float32)
    return torch.zeros((), dtype=dtype, device=like.device)


def _sum_setup(ctx: Any, inputs: Any, output: Any) -> None:
    chunked, shared, _, body, _ = inputs
    ctx.counts, ctx.body = (len(chunked), len(shared)), body
    found = BODIES[body]
    empty = [output[len(found.outputs) - 1].all()] if found.tells_ignored else []
    ctx.save_for_backward(*empty, *output[len(found.outputs) :])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _sum_backward(ctx: Any, grads: Any) -> Any:
    n, m = ctx.counts
    upstream = grads[0]
    if upstream is None:
        return [None] * n, [None] * m, None, None, None
    found, gradients = BODIES[ctx.body], list(ctx.saved_tensors)
    if found.tells_ignored:  # of nothing but such tokens no gradient comes, though the loss be divided by a count of 0
        nothing = gradients.pop(0) & ~upstream.isfinite()
        upstream = torch.where(nothing, torch.zeros_like(upstream), upstream)
    scaled = [_times(g, upstream).to(g.dtype) for g in gradients]
    return *_spread(found, scaled, n, m), None, None, None


torch.library.register_autograd("mst_fx::sum", _sum_backward, setup_context=_sum_setup)

MAP, SUM = torch.ops.mst_fx.map.default, torch.ops.mst_fx.sum.default


# -- loops -------------------------------------------------------------------------------------------

# NOTE [a weight that rounds nothing] The gradient of cross entropy is nearly -1 at a token's label, and all else is
# small. Times 1 / count, that is no bf16 number: each is rounded, by as much as the sum over all tokens in the end. So
# the loop multiplies by the power of two in the weight alone, and sums, which are wider, by the rest before they are
# rounded.


def _split(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a power of two and what makes it the weight; 0 and what is not finite are left as they are."""
    rest = torch.frexp(weight).mantissa
    power = weight / rest
    good = power.isfinite() & (power != 0)
    return torch.where(good, power, weight), torch.where(good, rest, torch.ones_like(rest))


def _run_backward(
    found: CompiledBody,
    chunked: Any,
    shared: Any,
    seed: Any,
    tangents: Any,
    chunk_tokens: int,
    totals: list[Any] | None,
    others: Sequence[torch.Tensor] = (),
) -> list[torch.Tensor]:
    assert found.backward is not None
    assert found.plan is not None
    plan, tokens = found.plan, chunked[0].shape[0]
    rows = {i: torch.empty_like(chunked[i], memory_format=torch.contiguous_format) for i in plan.chunked}
    alone = tokens <= chunk_tokens  # each sum is one product, to which nothing is added
    accumulate = "parameter" if alone else found.accumulate
    sums = {
        id(t): Sum(found.shared[p].dtype, accumulate, t.shape, chunked[0].device, found.adder)
        for p, terms in plan.shared.items()
        for t in terms
    }
    weights, factor = _as_compiled(found.shared, shared), None
    if found.weight is not None and not alone:
        weights[found.weight], factor = _split(weights[found.weight])
    for i, (start, end) in enumerate(chunk_bounds(tokens, chunk_tokens)):
        inputs = [*_rows(chunked, start, end), *weights, *_chunk_seed(seed, i), *_rows(tangents, start, end)]
        _take_chunk(found, found.backward(*inputs), rows, sums, totals, others, slice(start, end), factor)
    if totals:
        totals[:] = [_times(torch.stack(totals).sum(), factor)]
    gradients = [rows[i] for i in plan.chunked]
    for position, terms in plan.shared.items():
        gradients.append(_finish(terms, sums, shared[position], factor))
    return gradients


def _times(value: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """Multiply in the wider dtype: as a number the factor would be rounded to the value's first."""
    return value if factor is None else value.to(torch.promote_types(value.dtype, factor.dtype)) * factor


def _take_chunk(
    found: CompiledBody, results: Any, rows: Any, sums: dict[int, Sum], totals: Any, others: Any, chunk: slice,
    factor: torch.Tensor | None,
) -> None:  # fmt: skip
    """Put one chunk's results where they belong. A function, so that its wide values die before the next chunk."""
    plan = found.plan
    assert plan is not None
    if totals is not None:
        totals.append(results[0])
    for i, other in enumerate(others, start=1):
        other[chunk].copy_(results[i])
    for position, output in plan.chunked.items():
        rows[position][chunk].copy_(_times(results[output], factor))
    for terms in plan.shared.values():
        for term in terms:
            total, values = sums[id(term)], [results[o] for o in term.outputs]
            total.add_product(*values) if len(values) == 2 else total.add(*values)


def _finish(
    terms: tuple[Term, ...], sums: dict[int, Sum], like: torch.Tensor, factor: torch.Tensor | None
) -> torch.Tensor:
    gradient = None
    for term in terms:
        total = sums.pop(id(term)).result(factor)
        if total is None:
            continue
        laid = total if term.layout is None else term.layout(total)
        laid = laid.to(like.dtype).reshape(like.shape)
        gradient = laid if gradient is None else gradient + laid
    return torch.zeros_like(like) if gradient is None else gradient.contiguous()


def _fake_gradients(found: CompiledBody, chunked: Any, shared: Any) -> list[torch.Tensor]:
    assert found.plan is not None
    gradients = [chunked[i].new_empty(chunked[i].shape) for i in found.plan.chunked]
    return gradients + [shared[i].new_empty(shared[i].shape) for i in found.plan.shared]


def _spread(
    found: CompiledBody, results: Any, n: int, m: int, reached: frozenset[int] | None = None
) -> tuple[list[Any], list[Any]]:
    """Put gradients where their inputs are; an input that none of the outputs' gradients comes to has none."""
    assert found.plan is not None
    gradients: list[Any] = [None] * (n + m)
    for i, value in zip(found.plan.positions(n), results, strict=True):
        gradients[i] = value if reached is None or i in reached else None
    return gradients[:n], gradients[n:]


def _rows(tensors: Sequence[torch.Tensor], start: int, end: int) -> list[torch.Tensor]:
    return [t[start:end].contiguous() for t in tensors]


def _as_compiled(specs: Sequence[InputSpec], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Give shared inputs the strides the body was compiled for; they nearly always have them."""
    out = []
    for spec, tensor in zip(specs, tensors, strict=True):
        if spec.stride is not None and tensor.stride() != spec.stride:
            copied = torch.empty_strided(spec.shape, spec.stride, dtype=tensor.dtype, device=tensor.device)
            tensor = copied.copy_(tensor)
        out.append(tensor)
    return out


def _chunk_seed(seed: torch.Tensor | None, chunk: int) -> list[torch.Tensor]:
    return [] if seed is None else [seed + chunk * SEED_STEP]
