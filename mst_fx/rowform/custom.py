"""User-written ``torch.autograd.Function`` in row form: a forward and a backward graph of its own.

What a user writes as a backward need not be the derivative of the forward (straight-through estimators, clipped
gradients), so the body keeps both: it calls an autograd function made of their row forms.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import fx


def row_function(
    forward: fx.GraphModule, backward: fx.GraphModule, num_outputs: int, fixed: tuple[int, ...]
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Return a function of rows whose gradient is what the user wrote.

    Args:
        forward: Arguments -> (outputs..., saved values...).
        backward: (gradients of the outputs..., saved values...) -> gradients of the arguments or None.
        num_outputs: How many of the forward's results are outputs.
        fixed: Outputs without a gradient.
    """

    class RowFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            results = forward(*args)
            outputs = tuple(results[:num_outputs])
            ctx.save_for_backward(*results[num_outputs:])
            if fixed:
                ctx.mark_non_differentiable(*(outputs[i] for i in fixed))
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return tuple(backward(*grads, *ctx.saved_tensors))

    def call(*args: Any) -> tuple[torch.Tensor, ...]:
        return RowFunction.apply(*args)

    # A body is known by its code, and its code knows this by its name.
    text = "\n".join([forward.code, backward.code, repr((num_outputs, fixed))])
    call.__name__ = call.__qualname__ = f"custom_{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    call.own_gradient = True  # pyright: ignore[reportFunctionMemberAccess]
    return call


def has_own_gradient(graph: fx.Graph) -> bool:
    """Whether a row form calls a function or a registered op of the user's own.

    Its gradient need not be linear in the one that comes to it (clipped, rounded), so it must be that one.
    """
    ops = [n.target for n in graph.nodes if n.op == "call_function"]
    return any(
        op.namespace not in ("aten", "prims") if isinstance(op, torch._ops.OpOverload) else hasattr(op, "own_gradient")
        for op in ops
    )
