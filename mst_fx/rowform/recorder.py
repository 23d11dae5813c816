"""Decides, node by node, whether a computation keeps tokens apart, and writes down its row form.

One node of the Dynamo graph is run on its fake inputs under ``RowTracer``; every ATen op it
decomposes into is looked up in ``rules``. So one whitelist of ATen ops serves every spelling, and
autocast's casts, visible to the dispatcher, are part of what is recorded.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mst_fx.effects import differentiates_itself
from mst_fx.graph import OWN_BACKWARD
from mst_fx.inductor import symbolic_sizes
from mst_fx.rowform import random
from mst_fx.rowform.custom import row_function
from mst_fx.rowform.rows import MixesTokensError, Row, RowBuilder, Shared, aten, same_shape, same_size
from mst_fx.rowform.rules import find_rule


class RowTracer(TorchDispatchMode):
    """Runs ops on fake tensors and records the row form of those that touch tokens."""

    def __init__(self, builder: RowBuilder) -> None:
        super().__init__()
        self.b = builder
        self._fresh: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload) or func.namespace == "prim":
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return self._in_place(func, args, kwargs)
        out = func(*args, **kwargs)
        outs = _tensors(out)
        self._fresh.update(map(id, outs if func.is_view is False else ()))
        self._record(func, args, kwargs, outs)
        return out

    def _record(self, func: Any, args: Any, kwargs: Any, outs: list[torch.Tensor]) -> None:
        known = [self.b.lookup(t) for t in _tensors((args, kwargs))]
        if any(isinstance(v, Row) for v in known):
            rows = find_rule(func)(self.b, func, args, kwargs, outs)
            for out, row in zip(outs, rows, strict=False):
                self.b.bind(out, row)
        elif outs:
            self._record_shared(func, args, kwargs, outs)

    def _record_shared(self, func: Any, args: Any, kwargs: Any, outs: list[torch.Tensor]) -> None:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise MixesTokensError(f"draws random numbers ({func.overloadpacket})")
        args, kwargs = pytree.tree_map_only(torch.Tensor, self.b.shared, (tuple(args), kwargs))
        node = self.b.emit(func, *args, **kwargs)
        if len(outs) == 1:
            self.b.bind(outs[0], Shared(node))
            return
        for i, out in enumerate(outs):
            self.b.bind(out, Shared(self.b.emit(operator.getitem, node, i)))

    def _in_place(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Write an in-place op as its functional twin, and let every name of the value mean the result."""
        target = args[0]
        name, overload = func._schema.name.split("::")[1], func._overloadname
        twin = getattr(getattr(aten, name.removesuffix("_"), None), overload, None)
        names = self.b.names(target) if self._may_change(target) else None
        moves = torch.Tag.inplace_view in func.tags and any(t is not target for t in names or ())
        if names is None or twin is None or moves or not name.endswith("_"):
            raise MixesTokensError(f"changes a value in place that may be seen from elsewhere ({func.overloadpacket})")
        result = twin(*args, **kwargs)
        self._record(twin, args, kwargs, [result])
        new = self.b.lookup(result)
        if new is None:
            raise MixesTokensError(f"changes a value in place to something else ({func.overloadpacket})")
        if isinstance(new, Row | Shared) and result.dtype != target.dtype:
            new = replace(new, node=self.b.emit(aten._to_copy.default, new.node, dtype=target.dtype))
        out = func(*args, **kwargs)
        for known in (*names, out):
            self.b.bind(known, new)
        self._fresh.add(id(out))
        return out

    def _may_change(self, target: torch.Tensor) -> bool:
        """Whether a value was made within the same node: nobody else can see it."""
        return id(target) in self._fresh


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


@contextmanager
def recording(builder: RowBuilder, tracer: type[RowTracer] | None = None) -> Iterator[None]:
    """Record the row form of what runs inside; fake tensors only.

    Autocast's cache of cast weights is off: a weight cast once and found again is a value from nowhere.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.inference_mode(False), torch.no_grad(), (tracer or RowTracer)(builder):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


# -- nodes of the Dynamo graph -----------------------------------------------------------------------


def run_node(builder: RowBuilder, node: fx.Node, fake_mode: Any, tracer: type[RowTracer] | None = None) -> Any:
    """Record the row form of one Dynamo node whose inputs' fake values are in ``meta``.

    Returns:
        The fake result; its tensors have row forms in ``builder`` where they are token-wise.

    Raises:
        MixesTokensError: If the node is not token-wise.
    """
    if node.target is OWN_BACKWARD:
        return _run_custom(builder, node, fake_mode)
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        raise MixesTokensError("is a kernel or a graph of its own, which is not looked into")
    if differentiates_itself(node, fake_mode):
        raise MixesTokensError("switches gradients off, or has a gradient of its own, where Dynamo does not look")
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
    special = _SPECIAL.get(node.target)
    if node.target in _READS_TARGET_FIRST:
        take_alike(builder, [*args, *kwargs.values()])
    with fake_mode, recording(builder, tracer), symbolic_sizes(args, kwargs):
        if special is not None:
            return special(builder, *args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]


_READS_TARGET_FIRST = {F.kl_div, F.poisson_nll_loss}


def take_alike(builder: RowBuilder, values: Iterable[Any]) -> None:
    """Take what has the very shape of a value of the tokens as one too: a target that a loss first computes with alone.

    Otherwise tensors from outside become rows where they meet one.
    """
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    for known, row in [(v, r) for v in tensors if (r := builder.row(v)) is not None]:
        for value in tensors:
            if builder.lookup(value) is None and same_shape(value, known):
                builder.bind(value, builder.chunked(value, row.kinds))


def _dropout(builder: RowBuilder, x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    row = builder.row(x)
    if not training or p == 0.0 or row is None:
        return F.dropout(x, p, training)
    site, builder.seeds = builder.seeds, builder.seeds + 1
    if inplace:
        raise MixesTokensError("changes a value in place (dropout)")
    out = x.clone()
    seed = builder.seed_node()
    mask = builder.emit(random.KEEP_MASK, row.node, seed, site, float(p))
    scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
    kept = builder.emit(aten.mul.Tensor, row.node, mask)
    builder.bind(out, row.with_node(builder.emit(aten.mul.Tensor, kept, scale)))
    return out


def _take_along_dim(builder: RowBuilder, x: torch.Tensor, indices: torch.Tensor, dim: int | None = None) -> Any:
    """Record it as the gather it is where nothing is broadcast."""
    sizes = zip(x.shape, indices.shape, strict=False)
    if (
        dim is None
        or x.ndim != indices.ndim
        or not all(same_size(a, b) for d, (a, b) in enumerate(sizes) if d != dim % x.ndim)
    ):
        return torch.take_along_dim(x, indices, dim)
    return torch.gather(x, dim, indices)


def _one_hot(builder: RowBuilder, x: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
    """Record it without the look at all tokens that their classes are in range, which only symbolic sizes bring."""
    if num_classes < 1:
        return F.one_hot(x, num_classes)
    return x.unsqueeze(-1).eq(torch.arange(num_classes, dtype=x.dtype, device=x.device)).to(torch.int64)


_SPECIAL: dict[Any, Callable[..., Any]] = {
    F.one_hot: _one_hot,
    F.dropout: _dropout, torch.dropout: _dropout, torch.take_along_dim: _take_along_dim,
    "take_along_dim": _take_along_dim,
}  # fmt: skip


# -- autograd functions of the user's own ------------------------------------------------------------


def _run_custom(builder: RowBuilder, node: fx.Node, fake_mode: Any) -> Any:
    """Record the forward and the backward graph of a custom autograd function, each in row form of its own."""
    module = node.graph.owning_module
    graphs = [getattr(module, str(n.target), None) if isinstance(n, fx.Node) else n for n in node.args[:2]]
    values = [n.meta["example_value"] if isinstance(n, fx.Node) else n for n in node.args[2:]]
    rows = [builder.row(v) for v in values if isinstance(v, torch.Tensor)]
    known = [r for r in rows if r is not None]
    if not all(isinstance(g, fx.GraphModule) for g in graphs) or len(known) != len(rows):
        raise MixesTokensError("calls a custom autograd function on more than values of the tokens")
    if node.kwargs.get("dirty_idx"):
        raise MixesTokensError("calls a custom autograd function that changes its argument in place")
    if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        raise MixesTokensError("calls a custom autograd function under autocast")
    forward = _GraphRecorder(fake_mode)
    results = forward.run(graphs[0], values, [r.kinds for r in known])
    outs, saved = (tuple(v) if isinstance(v, (list, tuple)) else (v,) for v in results)
    kept = [v for v in (*outs, *saved) if isinstance(v, torch.Tensor)]
    kinds = [forward.kinds(v) for v in kept]
    backward = _GraphRecorder(fake_mode)
    with fake_mode:
        tangents = [torch.empty_like(o) for o in outs]
    gradients = backward.run(graphs[1], [*tangents, *saved], kinds)
    gradients = gradients if isinstance(gradients, (list, tuple)) else (gradients,)
    wanted = [g for g, v in zip(gradients, values, strict=True) if isinstance(v, torch.Tensor)]
    for row, gradient in zip(known, wanted, strict=True):
        if gradient is not None and backward.kinds(gradient) != row.kinds:
            raise MixesTokensError("calls a custom autograd function whose gradient mixes tokens")
    fixed = tuple(node.kwargs.get("non_differentiable_idx") or ())
    function = row_function(forward.finish(kept), backward.finish(wanted), len(outs), fixed)
    call = builder.emit(function, *(r.node for r in known))
    for i, (out, kind) in enumerate(zip(outs, kinds, strict=False)):
        builder.bind(out, Row(kind, builder.emit(operator.getitem, call, i)))
    return outs


class _GraphRecorder:
    """Records a whole graph whose inputs are token-wise, or sizes, and which reads nothing else."""

    def __init__(self, fake_mode: Any) -> None:
        self.builder, self.fake_mode = RowBuilder(), fake_mode

    def run(self, module: Any, values: list[Any], kinds: list[tuple[bool, ...]]) -> Any:
        tensors = (v for v in values if isinstance(v, torch.Tensor))
        for i, (value, kind) in enumerate(zip(tensors, kinds, strict=True)):
            self.builder.bind(value, Row(kind, self.builder.placeholder(f"row_{i}")))
        with self.fake_mode, recording(self.builder), symbolic_sizes(values):
            interpreter = fx.Interpreter(module)
            interpreter.extra_traceback = False  # the reason is for people: it needs no graph in it
            results = interpreter.run(*values)
        if self.builder.live_ins or self.builder.seed is not None:
            raise MixesTokensError("calls a custom autograd function that reads more than its arguments")
        return results

    def kinds(self, value: Any) -> tuple[bool, ...]:
        row = self.builder.row(value)
        if row is None:
            raise MixesTokensError("calls a custom autograd function with a result that is not one row per token")
        return row.kinds

    def finish(self, results: Any) -> fx.GraphModule:
        rows = [None if r is None else self.builder.row(r) for r in results]
        self.builder.graph.output(tuple(None if r is None else r.node for r in rows))
        module = fx.GraphModule(torch.nn.Module(), self.builder.graph)
        module.graph.eliminate_dead_code()
        module.recompile()
        return module
