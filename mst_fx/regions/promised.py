"""Lifts a call of a module that its user declared token-wise: its body is the module itself, run on a chunk.

    y, logits = tokenwise_call(key, state, (x [B, S, H],), {})
 -> y, logits = mst_fx.map([x.flatten(0, 1)], [*state], body, C)

The body hands the module ``[1, C, H]`` where it was given ``[B, S, H]``, so literal sizes in its code are no
problem, and traces forward and backward from it: autograd functions of its own and ``no_grad`` inside count.
What can't be kept is refused: a value that changes in place, random numbers other than dropout's, outputs without
one row per token.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from mst_fx.body import Body, InputSpec, trace_backward, trace_forward
from mst_fx.effects import written_values
from mst_fx.graph import autocast_now, fake, fake_tensor, source_of, storages, walking
from mst_fx.inductor import is_plain_fake, storage_of
from mst_fx.promise import Promise, find_promise, tokenwise_call
from mst_fx.regions.lift import Input, Lifted, Lifter, Output
from mst_fx.regions.region import Region
from mst_fx.report import Mismatch
from mst_fx.rowform.random import SeededDropout
from mst_fx.rowform.rows import LiveIn, MixesTokensError, Row, numel, same_size

Autocast = Callable[[], AbstractContextManager[Any]]
ROWS = 64
"""Example number of tokens a body is traced with."""


@dataclass(frozen=True)
class Place:
    """Where an input of the body goes in the call."""

    position: int
    leading: int
    """Token dimensions it has there; 0 for one that is shared."""


@dataclass(frozen=True)
class ModuleRows:
    """A promised module as a function of rows: what a body calls in place of a graph."""

    promise: Promise
    state: dict[str, Place]
    call: tuple[Any, Any]
    """Arguments and keyword arguments, ``Place`` for each tensor."""
    outputs: tuple[tuple[int, int], ...]
    """Of each output: which of the module's it is, and how many token dimensions it has."""
    autocast: Autocast
    seeded: bool = False
    sequences: int = 1
    """How many sequences of equal length the tokens are cut into where there are several token dimensions."""
    code: str = ""
    """What a body with this function is known by: its traced graphs."""

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the module on rows; returns rows."""

        def put(place: Any) -> Any:
            if not isinstance(place, Place):
                return place
            x = inputs[place.position]
            if place.leading < 2:
                return x
            return x.reshape(*[1] * (place.leading - 2), self.sequences, x.shape[0] // self.sequences, *x.shape[1:])

        state, (args, kwargs) = pytree.tree_map(put, (self.state, self.call))
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # a weight cast in one trace is a value from nowhere in the next
        try:
            with self.autocast(), SeededDropout(inputs[-1] if self.seeded else None):
                found = self.promise.run(state, args, kwargs)
        finally:
            torch.set_autocast_cache_enabled(cached)
        found = found if isinstance(found, (tuple, list)) else (found,)
        return tuple(_rows(found[i], leading, inputs[0].shape[0], i) for i, leading in self.outputs)


def _rows(value: torch.Tensor, leading: int, tokens: Any, position: int) -> torch.Tensor:
    if value.ndim < leading or not same_size(numel(value.shape[:leading]), tokens):
        raise MixesTokensError(f"output {position} does not have one row per token")
    return value.reshape(tokens, *value.shape[leading:])


def find_calls(module: fx.GraphModule) -> list[tuple[fx.Node, Autocast]]:
    """Return the calls of promised modules in a graph, each with the autocast state it is made under."""
    with walking(module) as nodes:
        return [(n, autocast_now()) for n in nodes if n.op == "call_function" and n.target is tokenwise_call]


def region_of(module: fx.GraphModule, call: fx.Node) -> Region:
    """Return a call as a region: the call and the nodes that pick its outputs."""
    several = isinstance(fake(call), (tuple, list))
    picks = list(call.users) if several else [call]
    nodes = [call, *picks] if several else [call]
    return Region(module, 0, nodes=nodes, amplifiers=[call], terminals=picks, source=source_of(call))


def lift_call(region: Region, fake_mode: Any, autocast: Autocast) -> Lifted | Mismatch:
    """Lift a call of a promised module, or say why it can't be."""
    try:
        return _lift(region, fake_mode, autocast)
    except MixesTokensError as e:
        return Mismatch(f"declared token-wise, but {e}", region.source)


def _lift(region: Region, fake_mode: Any, autocast: Autocast) -> Lifted:
    call = region.amplifiers[0]
    key, state, args, kwargs = call.args
    promise = find_promise(key)  # pyright: ignore
    hidden = next((n for n in pytree.tree_leaves((args, kwargs)) if fake_tensor(n) is not None), None)
    value = fake_tensor(hidden)
    if value is None or value.ndim < 2:
        raise MixesTokensError("its first tensor argument is not [*tokens, features]")
    lead = tuple(value.shape[:-1])
    outputs = [_output(t, lead, i) for i, t in enumerate(region.terminals) if t.users]
    lifter = Lifter(region, fake_mode)
    grad = any(v.requires_grad for o in outputs if (v := fake_tensor(o.node)) is not None)
    found: dict[fx.Node, tuple[Input, int]] = {}
    for node in dict.fromkeys(pytree.tree_leaves((args, kwargs))):
        if isinstance(node, fx.Node):
            found[node] = _input(lifter, node, lead, grad)
    for node in dict.fromkeys(state.values()):  # pyright: ignore
        found.setdefault(node, _shared(lifter, node, grad))  # pyright: ignore
    given = set().union(*map(storages, found))
    for i, output in enumerate(outputs):
        if storages(output.node) & given:
            raise MixesTokensError(f"output {i} is one of its inputs, or a view of one")
    ordered = sorted(found, key=lambda n: found[n][1] == 0)
    places = {n: Place(i, found[n][1]) for i, n in enumerate(ordered)}
    function = ModuleRows(
        promise,
        {name: places[n] for name, n in state.items()},  # pyright: ignore
        fx.map_arg((args, kwargs), lambda n: places[n]),  # pyright: ignore
        tuple((_position(o.node, call), sum(o.row.kinds)) for o in outputs),
        autocast,
    )
    chunked, shared = ([found[n][0] for n in ordered if (found[n][1] > 0) is rows] for rows in (True, False))
    body, region.row_bytes = _body(function, tuple(i.spec for i in chunked), tuple(i.spec for i in shared))
    tokens = numel(lead)
    inputs = {n: found[n][0] for n in ordered}
    return Lifted(region, body, chunked, shared, [], inputs, outputs, tokens, lifter)


def _position(node: fx.Node, call: fx.Node) -> int:
    return 0 if node is call else int(node.args[1])  # pyright: ignore


def _leading(shape: Any, lead: tuple[Any, ...]) -> int:
    """Return how many token dimensions a tensor begins with: all of them, 1 if flattened, or 0."""
    n = len(lead)
    if len(shape) >= n and all(map(same_size, shape[:n], lead)):
        return n
    return 1 if len(shape) and same_size(shape[0], numel(lead)) else 0


def _output(node: fx.Node, lead: tuple[Any, ...], position: int) -> Output:
    value = fake_tensor(node)
    leading = _leading(value.shape, lead) if value is not None else 0
    if value is None or not leading:
        what = f"has shape {list(value.shape)}" if value is not None else "is no tensor"
        raise MixesTokensError(f"output {position} {what}: no row per token of {list(lead)}")
    return Output(node, Row((True,) * leading + (False,) * (value.ndim - leading), node))


def _input(lifter: Lifter, node: fx.Node, lead: tuple[Any, ...], grad: bool) -> tuple[Input, int]:
    value = fake_tensor(node)
    if value is None:
        raise MixesTokensError(f"its argument `{node.name}` is a number that changes from call to call")
    if value.ndim == 0:
        return _shared(lifter, node, grad)
    leading = _leading(value.shape, lead)
    if not leading:
        raise MixesTokensError(
            f"its argument `{node.name}` has shape {list(value.shape)}: no row per token of {list(lead)}"
        )
    kinds = (True,) * leading + (False,) * (value.ndim - leading)
    return _live_in(lifter, node, LiveIn(value, kinds, tuple(value.shape)), grad), leading


def _shared(lifter: Lifter, node: fx.Node, grad: bool) -> tuple[Input, int]:
    value = fake_tensor(node)
    assert value is not None
    return _live_in(lifter, node, LiveIn(value, None, tuple(value.shape)), grad), 0


def _live_in(lifter: Lifter, node: fx.Node, live_in: LiveIn, grad: bool) -> Input:
    if not is_plain_fake(live_in.tensor):
        raise MixesTokensError(f"a {type(live_in.tensor).__name__} is a tensor subclass, which is not supported")
    lifter.outer[id(live_in.tensor)] = node
    return lifter.input_for(live_in, grad)


def _body(function: ModuleRows, chunked: tuple[InputSpec, ...], shared: tuple[InputSpec, ...]) -> tuple[Body, int]:
    """Trace the module once to know it is what it must be; returns the body and its wide bytes per token."""
    body = Body(function, chunked, shared, True)
    try:
        traced, _ = trace_forward(replace(body, graph=replace(function, seeded=True)), ROWS)
        _check(traced)
        seeded = any(n.op == "placeholder" and n.users for n in list(traced.graph.nodes)[len(body.inputs) :])
        body = replace(body, has_seed=seeded, graph=replace(function, seeded=seeded))
        code = [traced.code, *_constants(traced)]
        if backward := trace_backward(body, ROWS):
            code += [backward.graph.code, *_constants(backward.graph)]
    except MixesTokensError:
        raise
    except Exception as e:
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise MixesTokensError(f"it can't be traced over a chunk of tokens ({type(e).__name__}: {first})") from e
    body = replace(body, graph=replace(function, seeded=seeded, code="\n".join(code)))
    return body, _wide_bytes(traced)


def _check(traced: fx.GraphModule) -> None:
    given = {storage_of(n.meta["val"]) for n in traced.graph.nodes if n.op == "placeholder"}
    for node in traced.graph.nodes:
        graphs = isinstance(node.target, torch._ops.HigherOrderOperator) and "triton" not in str(node.target)
        if graphs:
            raise MixesTokensError(f"it calls graphs of its own ({node.target}), which are not looked into")
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise MixesTokensError(f"it draws random numbers ({node.target}), which would differ in the backward")
        changed = written_values(node.target, node.args, node.kwargs)
        if any(isinstance(v, fx.Node) and storage_of(v.meta["val"]) in given for v in changed):
            raise MixesTokensError(f"it changes an input, a parameter or a buffer in place ({node.target})")


def _constants(traced: fx.GraphModule) -> list[str]:
    """Describe the tensors a graph holds, which its code doesn't show."""
    found = []
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            value = getattr(traced, str(node.target))
            raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            found.append(f"{value.dtype} {[*value.shape]} {value.stride()} {hashlib.sha256(raw).hexdigest()}")
    return found


def _wide_bytes(traced: fx.GraphModule) -> int:
    """Return the bytes per token of what the module computes, its outputs left out and views counted once."""
    output = next(n for n in traced.graph.nodes if n.op == "output")
    ends = {storage_of(n.meta["val"]) for n in output.all_input_nodes}
    seen: dict[int, int] = {}
    for node in traced.graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.Tensor):
            continue
        sizes = [s if isinstance(s, int) else int(s.node.hint or ROWS) for s in value.shape]
        if any(not isinstance(s, int) for s in value.shape):
            seen[storage_of(value)] = math.prod(sizes) * value.dtype.itemsize // ROWS
    return sum(size for storage, size in seen.items() if storage not in ends)
