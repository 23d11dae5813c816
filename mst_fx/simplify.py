"""One pass over the logits less in the backward of a loss.

    n = nll_loss_backward(g, lsm, y); d = _log_softmax_backward_data(n, lsm)      # n - exp(lsm) * sum(n)
 -> d = exp(lsm) * g - where(y == class, g, 0)

``n`` is ``-g`` at the label and 0 elsewhere, so its sum over the classes is ``-g``, exactly: nothing need be summed.
Inductor does not see that and makes the row of zeros, class by class, to add it up. Class numbers fit 32 bits, of
which a vector holds twice as many as of the labels' 64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def simplify_loss_backward(graph: fx.Graph) -> None:
    """Rewrite every such pair of an ATen graph whose nodes carry ``meta["val"]``."""
    for node in list(graph.nodes):
        pair = _find(node)
        if pair is None:
            continue
        gradient, labels, ignore_index = pair
        with graph.inserting_before(node):
            new = _rewrite(graph, node.args[1], gradient, labels, ignore_index)
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


def _rewrite(graph: fx.Graph, output: Any, gradient: fx.Node, labels: fx.Node, ignore_index: int) -> fx.Node:
    value = output.meta["val"]

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = graph.call_function(target, args, kwargs)
        with value.fake_mode:
            node.meta["val"] = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args), **kwargs)
        return node

    counted = call(aten.ne.Scalar, labels, ignore_index)
    scale = call(aten.unsqueeze.default, call(aten.where.ScalarOther, counted, gradient, 0.0), 1)
    label = call(aten._to_copy.default, call(aten.where.ScalarOther, counted, labels, 0), dtype=torch.int32)
    classes = call(aten.arange.default, value.shape[1], dtype=torch.int32, device=value.device)
    hit = call(aten.eq.Tensor, call(aten.unsqueeze.default, label, 1), classes)
    soft = call(aten.mul.Tensor, call(aten.exp.default, output), scale)
    return call(aten.sub.Tensor, soft, call(aten.where.ScalarOther, hit, scale, 0.0))
