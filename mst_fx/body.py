"""Bodies: a region's forward and backward over one chunk, as FX graphs of ATen ops.

Terms:
    body: graph over ``(*chunked, *shared, [seed])``; chunked inputs are ``[C, ...]`` with symbolic ``C``.
    peeled product: the gradient of a shared weight is ``a.T @ b``, summed over the chunk's tokens. That
        last product is cut off; the body returns ``a`` and ``b`` and the loop adds into one accumulator.

The backward is traced from autograd once, when the graph is compiled: inside a registered op autograd is
off. It covers exactly the inputs that need gradients, so a frozen weight costs no product.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from mst_fx.inductor import fake_mode_of, no_autocast, symbolic_inputs, symbolic_sizes, tracing_in_mode_of
from mst_fx.rowform.rows import concrete
from mst_fx.simplify import simplify_loss_backward

aten = torch.ops.aten
_LAYOUT = {aten.permute.default, aten.t.default, aten.transpose.int, aten.view.default, aten._unsafe_view.default,
           aten.reshape.default, aten.squeeze.dim, aten.unsqueeze.default, aten._to_copy.default,
           aten.clone.default}  # fmt: skip


@dataclass(frozen=True)
class InputSpec:
    """What a body input looks like. ``shape`` leaves out the rows of a chunked input."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    stride: tuple[int, ...] | None = None
    needs_grad: bool = False


class RowFunction(Protocol):
    """A function of a body's inputs that returns its outputs; a graph in row form is one."""

    def __call__(self, *inputs: Any) -> Any:
        """Compute the outputs."""
        ...

    @property
    def code(self) -> str:
        """What distinguishes it from any other."""
        ...


@dataclass(frozen=True)
class Body:
    """A region lifted out: its row form, a graph as a rule, and what goes in."""

    graph: RowFunction
    chunked: tuple[InputSpec, ...]
    shared: tuple[InputSpec, ...]
    has_seed: bool
    tells_ignored: bool = False
    """Whether its last output tells the tokens that a loss leaves out; see ``regions/ignored.py``."""
    weight: int | None = None
    """The shared input, a number, that the first output of every row is multiplied by and that nothing else reads."""

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """Chunked inputs, then shared ones."""
        return self.chunked + self.shared

    @property
    def needs(self) -> tuple[int, ...]:
        """Positions of the inputs that need gradients."""
        return tuple(i for i, spec in enumerate(self.inputs) if spec.needs_grad)

    def digest(self, *settings: Any) -> str:
        """Hash the body's content: code, constants, inputs, what is compiled by whom and under which settings.

        A graph in torch's caches calls a body by this name and knows its results by their order, so another
        version of this package must not answer to it.
        """
        versions = [torch.__version__, own_sources()]
        inputs = [repr(self.chunked), repr(self.shared), repr(self.weight)]
        text = "\n".join([self.graph.code, *inputs, *versions, repr(settings)])
        return hashlib.sha256(text.encode()).hexdigest()[:24]


@functools.cache
def own_sources() -> str:
    """Return a hash of the sources of this package; of its version alone where they are not files."""
    found = hashlib.sha256(importlib.metadata.version("mst_fx").encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Term:
    """One summand of a shared input's gradient: which outputs of the body, and the layout put on the sum."""

    outputs: tuple[int, ...]
    """Two positions: ``a [K, C]`` and ``b [C, N]`` of a peeled product. One: a partial sum."""
    shape: tuple[int, ...]
    layout: fx.GraphModule | None


@dataclass(frozen=True)
class Backward:
    """Graph of ``(*chunked, *shared, [seed], *tangents)`` and how its outputs become gradients."""

    graph: fx.GraphModule
    chunked: dict[int, int]
    """Chunked input -> output that holds its rows' gradient. Inputs without a gradient are absent."""
    shared: dict[int, tuple[Term, ...]]
    """Shared input (counted from 0) -> the terms of its gradient."""
    differentiable: tuple[int, ...]
    """The body's outputs that a tangent comes to, in the tangents' order; empty for a sum, which takes none."""
    reaches: tuple[frozenset[int], ...] = ()
    """For each of those outputs the inputs, chunked ones first, that its gradient comes to."""
    example_inputs: Sequence[Any] = field(repr=False, default=())

    def positions(self, num_chunked: int) -> list[int]:
        """Return the inputs that have a gradient, chunked ones first, in the order in which gradients come."""
        return [*self.chunked, *(num_chunked + i for i in self.shared)]


def trace_forward(body: Body, rows: int) -> tuple[fx.GraphModule, list[Any]]:
    """Trace the forward for symbolic rows with example value ``rows``."""
    inputs = symbolic_inputs(body, rows)
    return _trace(lambda *xs: body.graph(*xs), inputs), inputs


def trace_backward(body: Body, rows: int) -> Backward | None:
    """Trace the gradients of the outputs with respect to the inputs that need them; None where there are none."""
    if not body.needs:
        return None
    inputs = symbolic_inputs(body, rows)
    with _made_fake(inputs):
        leaves, outs = _run_with_grad(body, inputs)
        differentiable = tuple(i for i, o in enumerate(outs) if o.requires_grad)
        reaches = tuple(_reached(body, leaves, outs[i]) for i in differentiable) if len(differentiable) > 1 else ()
    if not differentiable:
        return None
    # The loop hands rows over contiguous, however the forward lays its results out.
    tangents = [torch.empty_like(outs[i], memory_format=torch.contiguous_format) for i in differentiable]

    def gradients(*flat: Any) -> list[Any]:
        xs, ts = flat[: len(inputs)], flat[len(inputs) :]
        leaves, results = _run_with_grad(body, xs)
        return list(torch.autograd.grad([results[i] for i in differentiable], leaves, list(ts), allow_unused=True))

    graph = _trace(gradients, [*inputs, *tangents])
    found = _peel(body, graph, [*inputs, *tangents], leading=0, differentiable=differentiable)
    return dataclasses.replace(found, reaches=reaches or (frozenset(found.positions(len(body.chunked))),))


def _reached(body: Body, leaves: Sequence[torch.Tensor], out: torch.Tensor) -> frozenset[int]:
    """Return the inputs that a gradient of one output comes to."""
    gradients = torch.autograd.grad(out, leaves, torch.empty_like(out), retain_graph=True, allow_unused=True)
    return frozenset(i for i, g in zip(body.needs, gradients, strict=True) if g is not None)


def trace_sum(body: Body, rows: int) -> Backward:
    """Trace the sum of the first output in fp32, and that sum's gradients, in one graph.

    What it returns first is that sum and the outputs behind the first, which get no gradient.
    """
    inputs = symbolic_inputs(body, rows)
    extras: list[int] = []

    def total_and_gradients(*xs: Any) -> list[Any]:
        leaves, (loss, *others) = _run_with_grad(body, xs)
        extras.append(len(others))
        total = loss.sum(dtype=torch.promote_types(loss.dtype, torch.float32))
        # A loss of nothing but values under no_grad has none, though a view among them says it does.
        gradients = (
            torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else [None] * len(leaves)
        )
        return [total.detach(), *(o.detach() for o in others), *gradients]

    graph = _trace(total_and_gradients, inputs)
    return _peel(body, graph, inputs, leading=1 + extras[0], differentiable=())


def _run_with_grad(body: Body, xs: Sequence[Any]) -> tuple[list[Any], Any]:
    wanted = set(body.needs)
    with torch.enable_grad():
        xs = [x.detach().requires_grad_(i in wanted) if isinstance(x, torch.Tensor) else x for i, x in enumerate(xs)]
        return [xs[i] for i in body.needs], body.graph(*xs)


@contextmanager
def _made_fake(inputs: Sequence[Any]) -> Iterator[None]:
    """Run on fakes what makes tensors of its own: a real ``arange`` would fix the symbolic rows."""
    mode = fake_mode_of(inputs)
    assert mode is not None
    with mode, no_autocast(inputs), symbolic_sizes(inputs):
        yield


def _trace(fn: Callable[..., Any], inputs: Sequence[Any]) -> fx.GraphModule:
    with torch.inference_mode(False), no_autocast(inputs), tracing_in_mode_of(inputs):
        traced = make_fx(fn, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs)
    if isinstance(inputs[0].shape[0], torch.SymInt) and isinstance(concrete(inputs[0].shape[0]), int):
        raise ValueError("tracing has fixed the number of its rows, so it would be wrong for a shorter last chunk")
    for node in traced.graph.nodes:
        if node.op == "call_function" and node.target is aten.detach.default:
            node.replace_all_uses_with(node.args[0])
    simplify_loss_backward(traced.graph)
    traced.recompile()
    return traced


# -- peeling -----------------------------------------------------------------------------------------


def _peel(
    body: Body, graph: fx.GraphModule, inputs: Sequence[Any], leading: int, differentiable: tuple[int, ...]
) -> Backward:
    output = next(n for n in graph.graph.nodes if n.op == "output")
    results = list(output.args[0])
    kept: list[fx.Node] = results[:leading]
    chunked: dict[int, int] = {}
    shared: dict[int, tuple[Term, ...]] = {}

    def keep(node: fx.Node) -> int:
        if node not in kept:
            kept.append(node)
        return kept.index(node)

    for position, node in zip(body.needs, results[leading:], strict=True):
        if node is None:
            continue  # nothing leads from this input to the outputs: it gets no gradient, as in eager
        if position < len(body.chunked):
            chunked[position] = keep(node)
        else:
            terms = _terms(graph.graph, node, [])
            shared[position - len(body.chunked)] = tuple(
                Term(tuple(keep(n) for n in nodes), tuple(shape), layout) for nodes, shape, layout in terms
            )
    output.args = (tuple(kept),)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return Backward(graph, chunked, shared, differentiable, example_inputs=inputs)


def _terms(graph: fx.Graph, node: fx.Node, chain: list[fx.Node]) -> list[tuple[list[fx.Node], Any, Any]]:
    """Write a weight's gradient as a sum of terms: peeled products where possible, else partial sums."""
    outer = list(chain)
    while node.target in _LAYOUT and not _has_rows(node.args[0]):
        outer.append(node)
        node = node.args[0]  # pyright: ignore
    if node.target is aten.add.Tensor and len(node.args) == 2 and not node.kwargs:
        left, right = node.args
        if all(isinstance(n, fx.Node) and n.meta["val"].shape == node.meta["val"].shape for n in (left, right)):
            return _terms(graph, left, outer) + _terms(graph, right, outer)  # pyright: ignore
    if node.target is aten.mm.default:
        a, b = node.args
        if not isinstance(concrete(a.meta["val"].shape[1]), int):  # pyright: ignore
            return [([a, b], node.meta["val"].shape, _layout(outer, node))]  # pyright: ignore
    if node.target is aten.sum.dim_IntList and node.meta["val"].dtype in (torch.bfloat16, torch.float16):
        with graph.inserting_after(node):
            wide = graph.call_function(node.target, node.args, {**node.kwargs, "dtype": torch.float32})
        wide.meta["val"] = node.meta["val"].float()
        return [([wide], node.meta["val"].shape, _layout(outer, node))]
    # Layout and casts are put on the sum once: a cast on every chunk's part would round each.
    return [([node], node.meta["val"].shape, _layout(outer, node))]


def _has_rows(node: Any) -> bool:
    return any(not isinstance(concrete(s), int) for s in node.meta["val"].shape)


def _layout(outer: list[fx.Node], source: fx.Node) -> fx.GraphModule | None:
    """Return what is applied to the sum: the layout ops between the product and the gradient."""
    if not outer:
        return None
    graph = fx.Graph()
    value = graph.placeholder("total")
    for node in reversed(outer):
        value = graph.call_function(node.target, (value, *node.args[1:]), node.kwargs)  # pyright: ignore
    graph.output(value)
    return fx.GraphModule(torch.nn.Module(), graph)
