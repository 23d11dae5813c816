"""Strides: a stand-in that is laid out otherwise than what it stands for turns copies of it into views, or back.

``reshape``, ``contiguous`` and the like give a view where strides allow it. Whether that can be told depends on who
changes what in place, and on what leaves the graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from mst_fx.effects import change_after
from mst_fx.graph import is_layout, node_name, storages, stride_order

_MAY_COPY = {"flatten", "ravel", "expand_as", "view_as", "unsqueeze", "squeeze", "movedim", "swapaxes", "unflatten",
             "detach", "unfold", "as_strided", "expand", "chunk", "split", "unbind", "select", "narrow", "getitem",
             "double", "type", "type_as", "cpu", "cuda", "moveaxis", "diagonal", "atleast_1d", "atleast_2d", "getattr",
             "reshape_as", "swapdims", "adjoint", "H", "broadcast_to", "tensor_split", "hsplit", "vsplit"}  # fmt: skip


def like_strides(value: torch.Tensor, old: torch.Tensor) -> list[int] | None:
    """Return the order in which dimensions must be made contiguous for ``value`` to be laid out as ``old``.

    None where nothing is to be done: it is, or ``old`` is not dense and nothing can.
    """
    wanted = stride_order(old)
    return None if wanted is None or stride_order(value) == wanted else wanted


def laid_out(call: Callable[..., fx.Node], node: fx.Node, wanted: list[int], ndim: int) -> fx.Node:
    """Append the copy of a value whose dimensions, in the order ``wanted``, are contiguous.

    Args:
        call: Appends a call of a method, given its name and arguments.
        node: The value.
        wanted: From ``like_strides``.
        ndim: Dimensions of the value.
    """
    order = wanted + [d for d in range(ndim) if d not in wanted]
    if order == sorted(order):
        return call("contiguous", node)
    copied = call("contiguous", call("permute", node, *order))
    return call("permute", copied, *(order.index(d) for d in range(ndim)))


def strides_matter(*names: fx.Node) -> bool:
    """Whether it can be told that a stand-in for a value has other strides; ``names`` are the value, the last one last.

    That is where what shows the value, or copies its layout, changes in place later, reads strides, or leaves the
    graph as two values.
    """
    shown, stack = set(names), list(names)
    while stack:
        for user in stack.pop().users:
            if user not in shown and (is_layout(user) or node_name(user) in _MAY_COPY):
                shown.add(user)
                stack.append(user)
    if any(node_name(n) == "as_strided" for n in shown):
        return True
    returned = {n for n in shown if any(u.op == "output" for u in n.users)}
    held: set[int] = set().union(*map(storages, shown))
    return len(returned) > 1 or change_after(names[-1], held)
