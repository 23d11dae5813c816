"""Spell a linear over DTensors as one over the shards this rank has, so that a region of plain tensors is found.

    d = from_local(x, [Replicate]); y = linear(d, W).redistribute([Shard(-1)]).to_local()    # W: Shard(0)
 -> y = linear(d.to_local(grad_placements=[Partial]), W.to_local())
    d = from_local(h, [Shard(-1)]); z = linear(d, W)                                         # W: Shard(1)
 -> z = from_local(linear(h, W.to_local()), [Partial])

What moves between ranks stays where it was and is as much: the sum over ranks of ``z`` is the reduction that reads it,
that of the gradient of ``d`` is the backward of ``from_local``, which is told that a rank has its part alone.

Terms:
    by columns: tokens on every rank, a slice of the output's features from each.
    by rows: a slice of the features of tokens on each rank, one addend of the output from each.
Not handled: meshes of several dimensions, values that stay DTensors in between, results by columns that are gathered,
torch before 2.13 (whose graphs do not show placements).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx

from mst_fx.context import Context, Graph
from mst_fx.graph import fake, ndim, node_name, walking
from mst_fx.regions.indexing import Writer
from mst_fx.report import RegionReport


def localize_shards(graph: Graph, context: Context) -> list[RegionReport]:
    """Rewrite every such linear; the regions are found later."""
    if "torch.distributed.tensor" not in sys.modules:
        return []
    with walking(graph.module) as nodes:
        for node in nodes:
            linear = node.op == "call_function" and node_name(node) == "linear"
            if linear and not _by_columns(node, context.fake_mode):
                _by_rows(node, context.fake_mode)
    return []


def _by_columns(node: fx.Node, fake_mode: Any) -> bool:
    from torch.distributed.tensor import Partial, Replicate, Shard

    tokens, weight, bias = _operands(node)
    found = [_placement(n) for n in (tokens, weight, bias or weight, node)]
    if found != [Replicate(), Shard(0), Shard(0), Shard(ndim(node) - 1)]:
        return False
    readers = _only_local(node)
    if readers is None:
        return False
    writer = Writer(node, fake_mode)
    new = writer.call(
        node.target,  # pyright: ignore[reportArgumentType]
        writer.create("call_method", "to_local", (tokens,), {"grad_placements": (Partial(),)}),
        _local(writer, weight),
        None if bias is None else _local(writer, bias),
    )
    for reader in readers:
        if _is_call(reader, "to_local"):
            reader.replace_all_uses_with(new)
    for old in [*reversed(readers), node]:
        node.graph.erase_node(old)
    return True


def _by_rows(node: fx.Node, fake_mode: Any) -> bool:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    tokens, weight, bias = _operands(node)
    found = [_placement(n) for n in (tokens, weight, node)]
    if found != [Shard(ndim(node) - 1), Shard(1), Partial()] or (bias is not None and _placement(bias) != Replicate()):
        return False
    mesh = _mesh(node)
    if mesh is None:
        return False
    writer = Writer(node, fake_mode)
    part = writer.call(node.target, _given(tokens) or _local(writer, tokens), _local(writer, weight))  # pyright: ignore
    whole = writer.create(
        "call_function", DTensor.from_local, (part, mesh, (Partial(),)), {"run_check": False}, fake(node)
    )
    if bias is not None:  # which DTensor counts once over all ranks; cast as autocast would
        bias = writer.method("to", bias, fake(node).dtype)
        whole = writer.create("call_function", torch.add, (whole, bias), {}, fake(node))
    if _placement(whole) != Partial():
        writer.undo()
        return False
    node.replace_all_uses_with(whole)
    node.graph.erase_node(node)
    while isinstance(tokens, fx.Node) and not tokens.users and tokens is not part.args[0]:
        ahead = tokens.args[0]
        tokens.graph.erase_node(tokens)
        tokens = ahead
    return True


def _operands(node: fx.Node) -> tuple[Any, Any, Any]:
    names = ("input", "weight", "bias")
    return tuple(node.args[i] if i < len(node.args) else node.kwargs.get(n) for i, n in enumerate(names))  # pyright: ignore


def _placement(node: Any) -> Any:
    """Return where a DTensor on a mesh of one dimension is; None for any other value, and for strided shards."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    placements: Any = getattr(fake(node), "placements", ()) if isinstance(node, fx.Node) else ()
    known = len(placements) == 1 and type(placements[0]) in (Partial, Replicate, Shard)
    return placements[0] if known else None


def _mesh(node: fx.Node) -> Any:
    """Return the graph's value for the mesh a DTensor is on, None where there is none before it."""
    from torch.distributed.tensor import DTensor

    for other in node.graph.nodes:
        if other is node:
            break
        if other.target is DTensor.from_local and fake(other).device_mesh == fake(node).device_mesh:
            return other.args[1] if len(other.args) > 1 else other.kwargs.get("device_mesh")
    return None


def _only_local(node: fx.Node) -> list[fx.Node] | None:
    """Return the nodes behind a DTensor, in order, if all they do is to ask for what this rank has."""
    found: list[fx.Node] = []
    for user in node.users:
        moved = _is_call(user, "redistribute")
        behind = _only_local(user) if moved and _placement(user) == _placement(node) else []
        asks = _is_call(user, "to_local") and len(user.args) == 1 and not user.kwargs
        if behind is None or not (behind or asks):
            return None
        found += [user, *behind]
    return found


def _given(node: fx.Node) -> fx.Node | None:
    """Return the plain value that a DTensor was made of, placed as it is; None if it was made otherwise."""
    from torch.distributed.tensor import DTensor

    while _is_call(node, "redistribute") and _placement(node) == _placement(node.args[0]):
        node = node.args[0]  # pyright: ignore
    plain = node.target is DTensor.from_local and "grad_placements" not in node.kwargs
    return node.args[0] if plain and node.args else None  # pyright: ignore


def _is_call(node: fx.Node, method: str) -> bool:
    return node.op == "call_method" and node.target == method


def _local(writer: Writer, node: Any) -> fx.Node:
    return writer.method("to_local", node)
