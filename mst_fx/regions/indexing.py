"""What an index writes or picks, spelled with ops whose row form is known.

    x[..., 50:] = -1e4              -> x = slice_scatter(x, full_like(x[..., 50:], -1e4), -1, 50)
    x[mask] = 0                     -> x = masked_fill(x, mask, 0)
    x[:, :, ids] = 0                -> x = index_fill(x, 2, ids, 0)
    x[arange(T), labels]            -> gather(x, 1, labels[:, None])[:, 0]
    x[arange(T), labels] = v        -> x = scatter(x, 1, labels[:, None], v)
    x[places] = rows                -> x = index_put(x, (places,), rows)
    x.narrow(1, 0, n), x.chunk(2)   -> x[:, 0:n], x[0:b], x[b:]

Terms:
    labels' index: for every dimension but the last an ``arange`` of its size, laid along that dimension, and any
        integers for the last: one feature for each token.
Not handled: several lists of positions, masks beside other indices, None.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mst_fx.effects import changed_storages
from mst_fx.graph import fake, fake_tensor, grad_states, node_name, records_gradients, run_on_fakes, storages
from mst_fx.rowform.rows import concrete, is_one, same_size

Items = list[tuple[int, Any]]
_INTEGERS = (torch.int64, torch.int32)


class Writer:
    """Appends nodes with their fake values before a node of a graph."""

    def __init__(self, place: fx.Node, fake_mode: Any) -> None:
        self.place, self.fake_mode = place, fake_mode
        self.grad = records_gradients(grad_states(place.graph.owning_module)[place])  # pyright: ignore
        self.built: list[fx.Node] = []

    def call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """Append a call of a function."""
        return self.create("call_function", target, args, {})

    def method(self, name: str, *args: Any) -> fx.Node:
        """Append a call of a tensor's method."""
        return self.create("call_method", name, args, {})

    def create(self, op: str, target: Any, args: Any, kwargs: dict[str, Any], replaces: Any = None) -> fx.Node:
        """Append any node; its gradient is that of the value it ``replaces``, if that has none."""
        graph = self.place.graph
        with graph.inserting_before(self.place):
            node = graph.create_node(op, target, args, kwargs)
        self.built.append(node)
        node.meta["mst_replaces"] = replaces
        node.meta |= {k: v for k, v in self.place.meta.items() if k in ("stack_trace", "nn_module_stack")}
        value = run_on_fakes(node, self.fake_mode)
        if not self.grad and isinstance(value, torch.Tensor):
            value = node.meta["mst_replaces"] = value.detach()  # computed again, it has no gradient either
        node.meta["example_value"] = value
        return node

    def undo(self) -> None:
        """Erase what was appended."""
        for node in reversed(self.built):
            self.place.graph.erase_node(node)


def read_items(x: fx.Node, index: Any) -> Items | None:
    """Return (dimension, index) for every dimension that is not taken whole; None for what is not known."""
    value = fake_tensor(x)
    given = list(index) if isinstance(index, (tuple, list)) else [index]
    if value is None or any(i is None or isinstance(i, bool) for i in given) or given.count(Ellipsis) > 1:
        return None
    spans = [_span(i) for i in given]
    missing = value.ndim - sum(spans)
    if missing < 0:
        return None
    items: Items = []
    dim = 0
    for i, span in zip(given, spans, strict=True):
        if i is Ellipsis:
            dim += missing
            continue
        if not (isinstance(i, slice) and _is_whole(i, value.shape[dim])):
            items.append((dim, i))
        dim += span
    return items


def _span(item: Any) -> int:
    value = fake_tensor(item)
    return 0 if item is Ellipsis else value.ndim if value is not None and value.dtype == torch.bool else 1


def _is_whole(item: slice, size: Any) -> bool:
    whole = item.stop is None or (isinstance(item.stop, int) and same_size(item.stop, size))
    return item.start in (None, 0) and whole and item.step in (None, 1)


def write_item(writer: Writer, x: fx.Node, index: Any, value: Any) -> fx.Node | None:
    """Append what ``x[index] = value`` leaves in ``x``; None where that is not known."""
    items = read_items(x, index)
    if not items:
        return None
    if all(isinstance(i, (int, slice)) and not _has_nodes(i) for _, i in items):
        return _write_slices(writer, x, items, value)
    number = not isinstance(value, fx.Node) or (fake_tensor(value) is not None and fake_tensor(value).ndim == 0)  # pyright: ignore
    labels = _labels(writer, x, items)
    if labels is not None:
        if isinstance(value, fx.Node):
            if not number and list(fake(value).shape) != list(fake(labels).shape[:-1]):
                return None
            like = writer.create("call_function", torch.zeros_like, (labels,), {"dtype": fake(x).dtype})
            value = _shaped_like(writer, value if number else writer.call(torch.unsqueeze, value, -1), like)
        return writer.call(torch.scatter, x, fake(x).ndim - 1, labels, value)
    picked = fake_tensor(items[0][1])
    if len(items) > 1 or picked is None:
        return None
    dim, chosen = items[0]
    if not number:
        rows = dim == 0 and picked.ndim == 1 and picked.dtype == torch.int64 and fake(value).dtype == fake(x).dtype
        return writer.call(torch.index_put, x, (chosen,), value) if rows else None
    if picked.dtype == torch.bool:
        for _ in range(fake(x).ndim - dim - picked.ndim):
            chosen = writer.call(torch.unsqueeze, chosen, -1)
        return writer.call(torch.masked_fill, x, chosen, value)
    if picked.ndim != 1 or picked.dtype not in (torch.int32, torch.int64):
        return None
    if picked.dtype == torch.int32:
        chosen = writer.method("long", chosen)
    return writer.call(torch.index_fill, x, dim, chosen, value)


def _has_nodes(item: Any) -> bool:
    return isinstance(item, slice) and any(isinstance(v, fx.Node) for v in (item.start, item.stop, item.step))


def _write_slices(writer: Writer, x: fx.Node, items: Items, value: Any) -> fx.Node:
    if not items:
        if isinstance(value, fx.Node):
            return _shaped_like(writer, value, x)
        return writer.call(torch.full_like, x, value)
    (dim, item), rest = items[0], items[1:]
    if isinstance(item, slice):
        part = writer.call(slice_features, x, dim, item.start, item.stop, item.step)
        inner = _write_slices(writer, part, rest, value)
        return writer.call(torch.slice_scatter, x, inner, dim, item.start, item.stop, item.step or 1)
    part = writer.call(torch.select, x, dim, item)
    inner = _write_slices(writer, part, [(d - 1, i) for d, i in rest], value)
    return writer.call(torch.select_scatter, x, inner, dim, item)


def slice_features(x: torch.Tensor, dim: int, start: int | None, stop: int | None, step: int | None) -> torch.Tensor:
    """Return a slice along one dimension."""
    return x[(slice(None),) * dim + (slice(start, stop, step),)]


def _shaped_like(writer: Writer, value: fx.Node, like: fx.Node) -> fx.Node:
    """Append ``value`` in the dtype of ``like``, spread to its shape, in which it has the same tokens."""
    if fake(value).dtype != fake(like).dtype:
        value = writer.call(torch.Tensor.type_as, value, like)
    if fake(value).shape == fake(like).shape:
        return value
    everywhere = writer.create("call_function", torch.ones_like, (like,), {"dtype": torch.bool})
    return writer.call(torch.where, everywhere, value, like)


# -- some of the tokens ------------------------------------------------------------------------------


def token_index(node: fx.Node) -> tuple[fx.Node, Any] | None:
    """Return (x, index) where a node is ``x[index]``, however it is spelled; None for what is no slice."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or node.kwargs:
        return None
    name, value = node_name(node), fake_tensor(source)
    if name == "narrow" and value is not None and all(isinstance(a, int) for a in node.args[1:]):
        dim, start, length = node.args[1:]
        start = start + concrete(value.shape[dim]) if start < 0 else start  # pyright: ignore
        if not isinstance(start, int):
            return None
        return source, _along(dim % value.ndim, start, start + length)  # pyright: ignore
    if node.target is not operator.getitem:
        return None
    pieces = fake(source)
    if value is not None:
        return source, node.args[1]
    if node_name(source) not in ("split", "chunk", "tensor_split") or not source.args:
        return None
    taken, at = source.args[0], node.args[1]
    whole = fake_tensor(taken)
    if (
        whole is None
        or not isinstance(taken, fx.Node)
        or not isinstance(at, int)
        or len(source.args) + len(source.kwargs) > 3
    ):
        return None
    dim: Any = source.kwargs.get("dim", source.args[2] if len(source.args) > 2 else 0)
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + piece.shape[dim])
    at %= len(pieces)
    if not all(isinstance(e, int) for e in ends):
        return None
    return taken, _along(dim % whole.ndim, ends[at], ends[at + 1])


def _along(dim: int, start: int, stop: int) -> tuple[slice, ...]:
    return (*[slice(None)] * dim, slice(start, stop))


# -- one feature for each token ----------------------------------------------------------------------


def pick_labels(writer: Writer, x: fx.Node, index: Any) -> fx.Node | None:
    """Append what ``x[index]`` picks if ``index`` is a labels' index; else None."""
    labels = _labels(writer, x, read_items(x, index) or [])
    if labels is None:
        return None
    dim = fake(x).ndim - 1
    return writer.call(torch.squeeze, writer.call(torch.gather, x, dim, labels), dim)


def _labels(writer: Writer, x: fx.Node, items: Items) -> fx.Node | None:
    """Return a labels' index as one of ``gather``, which takes no negative ones; None for another index."""
    value = fake(x)
    if [d for d, _ in items] != list(range(value.ndim)) or value.ndim < 2:
        return None
    places, labels = items[:-1], items[-1][1]
    given = fake_tensor(labels)
    lead, features = value.shape[:-1], concrete(value.shape[-1])
    if given is None or not isinstance(features, int) or given.dtype not in _INTEGERS or given.ndim != len(lead):
        return None
    if not all(map(same_size, given.shape, lead)):
        return None
    if not all(_is_arange(i, d, len(lead), lead[d]) for d, i in places):
        return None
    wrapped = writer.call(
        torch.where, writer.call(torch.lt, labels, 0), writer.call(torch.add, labels, features), labels
    )
    return writer.call(torch.unsqueeze, writer.call(torch.Tensor.long, wrapped), -1)


def _is_arange(node: Any, dim: int, ndim: int, size: Any) -> bool:
    """Whether a value counts 0, 1, ... along ``dim`` of ``ndim`` dimensions it broadcasts to, and is 1 along others."""
    value = fake_tensor(node)
    if value is None or value.ndim > ndim or value.dtype not in _INTEGERS:
        return False
    if changed_storages(node.graph.nodes) & storages(node):
        return False
    own = dim - (ndim - value.ndim)
    if (
        own < 0
        or any(not is_one(s) for d, s in enumerate(value.shape) if d != own)
        or not same_size(value.shape[own], size)
    ):
        return False
    while isinstance(node, fx.Node) and (_adds_dimensions(node) or node_name(node) in ("to", "long", "unsqueeze")):
        node = node.args[0]
        between = fake_tensor(node)
        if between is None or between.dtype not in _INTEGERS:
            return False  # counts do not fit into every dtype
    if not isinstance(node, fx.Node) or node.target is not torch.arange:
        return False
    given: tuple[Any, ...] = node.args if len(node.args) != 1 else (0, *node.args)
    bounds: dict[str, Any] = dict(zip(("start", "end", "step"), given, strict=False)) | node.kwargs
    made = fake_tensor(node)
    whole = made is not None and made.ndim == 1 and not made.is_floating_point()
    return whole and (bounds.get("start", 0), bounds.get("step", 1)) == (0, 1)


def _adds_dimensions(node: fx.Node) -> bool:
    index = node.args[1] if node_name(node) == "getitem" else ()
    items = index if isinstance(index, tuple) else (index,)
    return bool(items) and all(i is None or i is Ellipsis or i == slice(None) for i in items)
