"""Scalars spelled one way: per-token values, a sum over them, one division outside.

    cross_entropy(logits, labels, reduction="mean")
 -> sum(cross_entropy(logits, labels, reduction="none")) / number of tokens that count
    kl_div(logp, q, reduction="batchmean"), or kl_div(logp, q, reduction="none").sum() / batch
 -> sum(kl_div(logp, q, reduction="none").sum(-1)) / batch

Terms: ``classes`` V; labels equal to ``ignore_index`` count for nothing; with class weights each token
counts as its label's weight; with soft labels (probabilities) every token counts as one. A *total* is a node
that reduces over all tokens: a loss over classes, a loss per element with a reduction, ``sum`` or ``mean``.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx

from mst_fx.graph import fake_tensor, node_name
from mst_fx.inductor import symbolic_sizes
from mst_fx.rowform.recorder import recording, take_alike
from mst_fx.rowform.rows import MixesTokensError, Row, RowBuilder, aten, concrete, feature_shape, is_one

Reduction = Literal["none", "sum", "mean"]
_CLASSES = {f: inspect.signature(f) for f in (F.cross_entropy, F.nll_loss)}
_ELEMENTS = {
    f: inspect.signature(f)
    for f in (
        F.kl_div, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits, F.soft_margin_loss, F.poisson_nll_loss,
    )
}  # fmt: skip

_WEIGHTED = {F.mse_loss, F.l1_loss, F.huber_loss}
"""Losses whose mean divides by the sum of the weights they may be given."""


@dataclass(frozen=True)
class LossCall:
    """A call of ``F.cross_entropy`` or ``F.nll_loss``, its arguments by name."""

    function: Any
    logits: Any
    labels: Any
    weight: Any
    ignore_index: int
    label_smoothing: float
    reduction: Reduction

    @property
    def soft(self) -> bool:
        """Whether the labels are probabilities."""
        labels = self.labels.meta["example_value"] if isinstance(self.labels, fx.Node) else self.labels
        return labels.is_floating_point()


@dataclass(frozen=True)
class ValueSum:
    """A sum or mean over all elements: of a value, or of a loss per element."""

    node: fx.Node
    reduction: Literal["sum", "mean"]
    batch: Any = None
    """What a sum is divided by ("batchmean")."""


Total = LossCall | ValueSum


def is_loss(node: fx.Node) -> bool:
    """Whether ``node`` calls a loss over classes."""
    return node.op == "call_function" and node.target in _CLASSES


def read_total(node: fx.Node) -> Total | None:
    """Return how a node reduces over all tokens, or leaves a loss per token; None if it does neither."""
    if is_loss(node):
        return read_loss(node)
    if node.op == "call_function" and node.target in _ELEMENTS:
        bound = _ELEMENTS[node.target].bind(*node.args, **node.kwargs)
        reduction = _reduction(bound)
        if reduction == "none" or (
            reduction == "mean" and node.target in _WEIGHTED and bound.arguments.get("weight") is not None
        ):
            return None
        first = fake_tensor(node.args[0] if node.args else node.kwargs["input"])
        if reduction == "batchmean" and first is not None:
            return ValueSum(node, "sum", concrete(first.shape[0]))
        return ValueSum(node, reduction) if reduction in ("sum", "mean") else None  # pyright: ignore
    name = node_name(node)
    value, result = fake_tensor(node.args[0]) if node.args else None, fake_tensor(node)
    if name not in ("sum", "mean") or value is None or result is None or result.ndim or not value.ndim:
        return None
    if not node.kwargs.keys() <= {"dim", "axis", "keepdim", "keepdims", "dtype"}:
        return None
    return ValueSum(node, name)


def read_loss(node: fx.Node) -> LossCall:
    """Return the call's arguments by name; values are FX nodes or constants."""
    bound = _CLASSES[node.target].bind(*node.args, **node.kwargs)
    reduction: Any = _reduction(bound)
    given = bound.arguments
    return LossCall(
        node.target, given["input"], given["target"], given["weight"], given["ignore_index"],
        given.get("label_smoothing", 0.0), reduction,
    )  # fmt: skip


def _reduction(bound: inspect.BoundArguments) -> str:
    bound.apply_defaults()
    given = bound.arguments
    if given.get("size_average") is not None or given.get("reduce") is not None:
        return torch.nn._reduction.legacy_get_string(given["size_average"], given["reduce"], emit_warning=False)
    return given["reduction"]


# -- per token ---------------------------------------------------------------------------------------


def per_token(b: RowBuilder, total: Total, fake_mode: Any) -> Row:
    """Record the row form of what a total sums over the tokens.

    Raises:
        MixesTokensError: If it is not token-wise.
    """
    return per_token_loss(b, total, fake_mode) if isinstance(total, LossCall) else _per_token_sum(b, total, fake_mode)


def per_token_loss(b: RowBuilder, call: LossCall, fake_mode: Any) -> Row:
    """Record the row form of the loss without its reduction.

    Raises:
        MixesTokensError: If the classes are not a feature dimension of a token-wise value.
    """
    logits, labels = call.logits.meta["example_value"], call.labels.meta["example_value"]
    row = b.row(logits)
    if row is None:
        raise MixesTokensError("takes a loss of values that are no logits of the tokens")
    if logits.ndim < 2:
        raise MixesTokensError("takes the loss of one token")
    expected = tuple(d != 1 for d in range(logits.ndim))
    if any(k != e for k, e, s in zip(row.kinds, expected, logits.shape, strict=True) if not is_one(s)):
        raise MixesTokensError("takes a loss over classes that are not the features of a token")
    classes = concrete(logits.shape[1])
    with fake_mode, torch.inference_mode(False), torch.no_grad():
        count = logits.numel() // classes
        rows = torch.empty((count, classes), dtype=logits.dtype, device=logits.device)
        shape = (count, classes) if call.soft else (count,)
        row_labels = torch.empty(shape, dtype=labels.dtype, device=labels.device)
    b.bind(rows, Row((True, False), b.reshaped(row, logits.shape, [classes])))
    kinds = expected if call.soft else (True,) * labels.ndim
    outer = b.row(labels) or b.chunked(labels, kinds)
    if any(k != e for k, e, s in zip(outer.kinds, kinds, labels.shape, strict=True) if not is_one(s)):
        raise MixesTokensError("takes a loss against labels whose tokens lie along another dimension")
    own = b.reshaped(outer, labels.shape, [classes] if call.soft else [])
    b.bind(row_labels, Row((True, False) if call.soft else (True,), own))
    weight = None if call.weight is None else call.weight.meta["example_value"]
    options: dict[str, Any] = {"weight": weight, "ignore_index": call.ignore_index, "reduction": "none"}
    if call.function is F.cross_entropy:
        options["label_smoothing"] = call.label_smoothing
    with fake_mode, recording(b), symbolic_sizes(rows, row_labels):
        value = _soft_loss(call, rows, row_labels, weight) if call.soft else call.function(rows, row_labels, **options)
    result = b.row(value)
    assert result is not None
    return Row((True,) * (logits.ndim - 1), result.node)


def _soft_loss(call: LossCall, logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Return the cross-entropy with probabilities, per row; that of torch 2.11 fixes the number of rows."""
    if call.label_smoothing:
        labels = labels * (1 - call.label_smoothing) + call.label_smoothing / logits.shape[1]
    terms = F.log_softmax(logits, 1) * labels
    return -(terms if weight is None else terms * weight).sum(1)


def _per_token_sum(b: RowBuilder, total: ValueSum, fake_mode: Any) -> Row:
    """Record the sum over a token's features, or their mean for a mean, in the dtype that tokens are summed in."""
    value = _elements(b, total.node, fake_mode)
    row = b.row(value)
    if row is None:
        raise MixesTokensError("sums a value that has no row per token")
    features = feature_shape(value.shape, row.kinds)
    if not all(isinstance(s, int) for s in features):
        raise MixesTokensError("sums features whose number changes with the number of tokens")
    result = fake_tensor(total.node)
    assert result is not None
    dtype = sum_dtype(result.dtype)
    if features:
        reduce = aten.mean.dim if total.reduction == "mean" else aten.sum.dim_IntList
        return Row((True,), b.emit(reduce, row.node, [*range(1, 1 + len(features))], False, dtype=dtype))
    return Row((True,), row.node if value.dtype == dtype else b.emit(aten._to_copy.default, row.node, dtype=dtype))


def _elements(b: RowBuilder, node: fx.Node, fake_mode: Any) -> torch.Tensor:
    if node.target not in _ELEMENTS:
        return node.args[0].meta["example_value"]  # pyright: ignore
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
    given = _ELEMENTS[node.target].bind(*args, **kwargs).arguments  # pyright: ignore
    for name in ("size_average", "reduce"):
        given.pop(name, None)
    take_alike(b, given.values())
    with fake_mode, recording(b), symbolic_sizes(given):
        return node.target(**{**given, "reduction": "none"})  # pyright: ignore[reportCallIssue]


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of a dtype are summed over tokens: fp32 at least, integers as they are."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


# -- what a sum is divided by ------------------------------------------------------------------------


def is_divided(total: Total | None) -> bool:
    """Whether the sum over tokens is divided by something."""
    by_batch = isinstance(total, ValueSum) and total.batch is not None
    return total is not None and (total.reduction == "mean" or by_batch)


def read_by_count(total: Total | None) -> list[fx.Node]:
    """Return the nodes that ``count`` reads."""
    if not isinstance(total, LossCall) or not is_divided(total) or total.soft:
        return []
    return [n for n in (total.labels, total.weight) if isinstance(n, fx.Node)]


def with_labels(total: Total, given: Mapping[fx.Node, fx.Node]) -> Total:
    """Return the total with labels that a region gave back in the place of those it computed from its logits."""
    return replace(total, labels=given.get(total.labels, total.labels)) if isinstance(total, LossCall) else total


def count(graph: fx.Graph, total: Total, tokens: Callable[[], Any], size: Callable[[Any], Any]) -> Any:
    """Append nodes that compute what the sum over tokens is divided by; None for nothing.

    Args:
        graph: Where nodes are appended.
        total: What is summed.
        tokens: Returns the number of tokens, or a node that computes it.
        size: Returns a node that computes a symbolic size.
    """
    if not is_divided(total):
        return None
    if isinstance(total, LossCall):
        return count_tokens(graph, total, tokens)
    if total.batch is None:
        return tokens()
    return total.batch if isinstance(total.batch, int) else size(total.batch)


def count_tokens(graph: fx.Graph, call: LossCall, tokens: Callable[[], Any]) -> Any:
    """Append nodes that compute what ``reduction="mean"`` divides the sum by."""
    labels = call.labels
    if call.soft:
        return tokens()
    counted = graph.call_function(torch.ne, (labels, call.ignore_index))
    if call.weight is None:
        return graph.call_method("sum", (counted,))
    safe = graph.call_method("masked_fill", (labels, graph.call_function(torch.logical_not, (counted,)), 0))
    weights = graph.call_function(operator.getitem, (call.weight, safe))
    return graph.call_method("sum", (graph.call_function(torch.mul, (weights, counted)),))


def none_counts(graph: fx.Graph, call: LossCall, divisor: fx.Node) -> fx.Node:
    """Append nodes that say whether every label is ignored: then the loss is NaN and its gradients are 0, as in torch.

    Where labels count and the sum of their weights is 0, torch's gradients are NaN too.
    """
    if call.weight is None:
        return graph.call_function(torch.eq, (divisor, 0))
    counted = graph.call_function(torch.ne, (call.labels, call.ignore_index))
    return graph.call_function(torch.logical_not, (graph.call_method("any", (counted,)),))
