"""Losses spelled one way: per-token values, a sum over them, one division outside.

    cross_entropy(logits, labels, reduction="mean")
 -> sum(cross_entropy(logits, labels, reduction="none")) / number of tokens that count

Terms: ``classes`` V; labels equal to ``ignore_index`` count for nothing; with class weights each token
counts as its label's weight; with soft labels (probabilities) every token counts as one.
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx

from mst_fx.inductor import symbolic_sizes
from mst_fx.recorder import recording
from mst_fx.rows import MixesTokensError, Row, RowBuilder, concrete, is_one

Reduction = Literal["none", "sum", "mean"]
_SIGNATURES = {F.cross_entropy: inspect.signature(F.cross_entropy), F.nll_loss: inspect.signature(F.nll_loss)}


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


def is_loss(node: fx.Node) -> bool:
    """Whether ``node`` calls a loss over classes."""
    return node.op == "call_function" and node.target in _SIGNATURES


def read_loss(node: fx.Node) -> LossCall:
    """Return the call's arguments by name; values are FX nodes or constants."""
    bound = _SIGNATURES[node.target].bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    reduction = given["reduction"]
    if given["size_average"] is not None or given["reduce"] is not None:
        reduction = torch.nn._reduction.legacy_get_string(given["size_average"], given["reduce"], emit_warning=False)
    return LossCall(
        node.target, given["input"], given["target"], given["weight"], given["ignore_index"],
        given.get("label_smoothing", 0.0), reduction,
    )  # fmt: skip


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
    b.bind(row_labels, Row((True, False) if call.soft else (True,), outer.node))
    weight = None if call.weight is None else call.weight.meta["example_value"]
    options: dict[str, Any] = {"weight": weight, "ignore_index": call.ignore_index, "reduction": "none"}
    if call.function is F.cross_entropy:
        options["label_smoothing"] = call.label_smoothing
    with fake_mode, recording(b), symbolic_sizes():
        value = call.function(rows, row_labels, **options)
    result = b.row(value)
    assert result is not None
    return Row((True,) * (logits.ndim - 1), result.node)


def count_tokens(graph: fx.Graph, call: LossCall) -> fx.Node:
    """Append nodes that compute what ``reduction="mean"`` divides the sum by."""
    labels = call.labels
    if call.soft:
        classes = call.logits.meta["example_value"].shape[1]
        rows = graph.call_function(operator.floordiv, (graph.call_method("numel", (labels,)), classes))
        return graph.call_method("new_tensor", (labels, rows))
    counted = graph.call_function(torch.ne, (labels, call.ignore_index))
    if call.weight is None:
        return graph.call_method("sum", (counted,))
    safe = graph.call_method("masked_fill", (labels, graph.call_function(torch.logical_not, (counted,)), 0))
    weights = graph.call_function(operator.getitem, (call.weight, safe))
    return graph.call_method("sum", (graph.call_function(torch.mul, (weights, counted)),))
