"""One pass over the logits less in the backward of a loss.

    n = nll_loss_backward(g, lsm, y); d = _log_softmax_backward_data(n, lsm)      # n - exp(lsm) * sum(n)
 -> d = exp(lsm) * g - where(y == class, g, 0)

``n`` is ``-g`` at the label and 0 elsewhere, so its sum over the classes is ``-g``, exactly: nothing need be summed.
Inductor does not see that and makes the row of zeros, class by class, to add it up. Class numbers fit 32 bits, of
which a vector holds twice as many as of the labels' 64.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
PICKED_APART = {"cpu"}
"""Devices where one kernel does all that a row needs, so that NOTE [pick in a pass that is there] brings nothing."""


def simplify_loss_backward(graph: fx.Graph) -> None:
    """Rewrite every such pair of an ATen graph whose nodes carry ``meta["val"]``."""
    for node in list(graph.nodes):
        pair = _find(node)
        if pair is None:
            continue
        gradient, labels, ignore_index = pair
        output: Any = node.args[1]
        loss = _loss_of(graph, output, labels, ignore_index)
        with graph.inserting_before(loss or node):
            counted, hit = _hits(graph, output, labels, ignore_index)
            picked = None
            if loss is not None:
                picked, output = _pick(graph, loss, output, counted, hit)
                _assert_in_range(graph, labels, counted, hit)
        with graph.inserting_before(node):
            scale = _call(graph, aten.where.ScalarOther, counted, gradient, 0.0)
            if picked is not None:
                scale = _call(graph, aten.where.self, _call(graph, aten.lt.Scalar, picked, 0.0), scale, scale)
            scale = _call(graph, aten.unsqueeze.default, scale, 1)
            soft = _call(graph, aten.mul.Tensor, _call(graph, aten.exp.default, output), scale)
            new = _call(graph, aten.sub.Tensor, soft, _call(graph, aten.where.ScalarOther, hit, scale, 0.0))
        new.meta.update({**node.meta, "val": new.meta["val"]})
        node.replace_all_uses_with(new)
    graph.eliminate_dead_code()


def _find(node: fx.Node) -> tuple[fx.Node, fx.Node, int] | None:
    if node.target is not aten._log_softmax_backward_data.default:
        return None
    inner, output, dim, dtype = node.args
    if not isinstance(inner, fx.Node) or inner.target is not aten.nll_loss_backward.default or len(inner.users) != 1:
        return None
    gradient, logits, labels, weight, reduction, ignore_index, _ = inner.args
    value = node.meta["val"]
    plain = weight is None and reduction == 0 and logits is output and isinstance(value.shape[-1], int)
    if not plain or value.ndim != 2 or dim not in (1, -1) or value.dtype != dtype:
        return None
    return gradient, labels, ignore_index  # pyright: ignore


def _loss_of(graph: fx.Graph, output: fx.Node, labels: fx.Node, ignore_index: int) -> fx.Node | None:
    """Return the loss per token whose gradient this is, where anything reads it and it is better picked there."""
    value = output.meta["val"]
    if value.device.type in PICKED_APART or output.target is not aten._log_softmax.default or output.args[2]:
        return None
    wanted = (output, labels, None, 0, ignore_index)
    for node in graph.nodes:
        if node.target is aten.nll_loss_forward.default and node.args == wanted and node.users:
            return node
    return None


def _call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    node = graph.call_function(target, args, kwargs)
    mode = next(a.meta["val"].fake_mode for a in args if isinstance(a, fx.Node))
    with mode:
        node.meta["val"] = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args), **kwargs)
    return node


def _hits(graph: fx.Graph, output: fx.Node, labels: fx.Node, ignore_index: int) -> tuple[fx.Node, fx.Node]:
    """Append which tokens count, ``[C]``, and where a class is the label, ``[C, V]``."""
    value = output.meta["val"]
    counted = _call(graph, aten.ne.Scalar, labels, ignore_index)
    label = _call(graph, aten.where.ScalarOther, counted, labels, 0)
    label = _call(graph, aten.unsqueeze.default, _call(graph, aten._to_copy.default, label, dtype=torch.int32), 1)
    form = {"dtype": torch.int32, "device": value.device}
    classes = graph.call_function(aten.arange.default, (value.shape[1],), form)
    with value.fake_mode:
        classes.meta["val"] = torch.arange(value.shape[1], **form)
    return counted, _call(graph, aten.eq.Tensor, label, classes)


def _pick(graph: fx.Graph, loss: fx.Node, output: fx.Node, counted: fx.Node, hit: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Form the loss of a token of sums over its logits; return the picked logits, ``[C]``, and the log-softmax.

    NOTE [pick in a pass that is there] Reading one class of each row takes a kernel of its own on a GPU, which runs
    behind the one that forms gradients, so that these can't be written over the logits: a second tensor of their
    size. As a sum over the row the logit is found while the row is read. Inductor writes over what nothing else reads
    any more, as far as dependencies tell; that nobody reads the logits later is told by a condition that changes
    nothing.
    """
    logits: Any = output.args[0]
    most = _call(graph, aten.amax.default, logits, [1], True)
    shifted = _call(graph, aten.sub.Tensor, logits, most)
    total = _call(graph, aten.sum.dim_IntList, _call(graph, aten.exp.default, shifted), [1], True)
    total = _call(graph, aten.log.default, total)
    own = _call(graph, aten.sum.dim_IntList, _call(graph, aten.where.ScalarOther, hit, logits, 0.0), [1])
    flat = [_call(graph, aten.squeeze.dim, v, 1) for v in (most, total)]
    value = _call(graph, aten.sub.Tensor, _call(graph, aten.sub.Tensor, own, flat[0]), flat[1])
    value = _call(graph, aten.where.ScalarOther, counted, _call(graph, aten.neg.default, value), 0.0)
    for user in list(loss.users):
        if user.target is operator.getitem and user.args[1] == 0:
            user.replace_all_uses_with(value)
    return own, _call(graph, aten.sub.Tensor, shifted, total)


def _assert_in_range(graph: fx.Graph, labels: fx.Node, counted: fx.Node, hit: fx.Node) -> None:
    """Append that every label that counts is a class: picked by its number, another one would be an error too."""
    low, high = _call(graph, aten.ge.Scalar, labels, 0), _call(graph, aten.lt.Scalar, labels, hit.meta["val"].shape[1])
    good = _call(graph, aten.logical_and.default, low, high)
    good = _call(graph, aten.logical_or.default, good, _call(graph, aten.logical_not.default, counted))
    everywhere = _call(graph, aten.all.default, good)
    graph.call_function(aten._assert_async.msg, (everywhere, "a label is no class: index out of range"))
