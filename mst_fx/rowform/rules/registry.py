"""The table of rules, how one is found, and what rules share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mst_fx.rowform.rows import MixesTokensError, Row, RowBuilder, aten

Rule = Callable[..., list[Row]]
RULES: dict[Any, Rule] = {}
UNTAGGED = {aten.leaky_relu}
"""Elementwise ops that torch 2.11 does not tag as such."""
_POINTWISE_EXTRA = UNTAGGED | {
    aten._to_copy, aten.clone, aten.detach, aten.alias, aten.masked_fill, aten.zeros_like, aten.ones_like,
    aten.full_like, aten.where, aten.lift_fresh_copy, aten.rsub, aten._prelu_kernel,
    aten.hardswish,
}  # fmt: skip


def rule(*packets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for every overload of the given ops."""

    def register(fn: Rule) -> Rule:
        for packet in packets:
            RULES[packet] = fn
        return fn

    return register


def find_rule(func: Any) -> Rule:
    """Return the rule of an ATen op.

    Raises:
        MixesTokensError: If there is none.
    """
    tags = func.tags
    if "attention" in str(func):
        raise MixesTokensError("is attention: it mixes tokens")
    if torch.Tag.nondeterministic_seeded in tags:
        raise MixesTokensError(f"draws random numbers ({op_name(func)})")
    found = RULES.get(func.overloadpacket)
    if found is None and is_pointwise(func):
        found = pointwise
    if found is None:
        raise MixesTokensError(f"{op_name(func)} mixes tokens or is not known to keep them apart")
    return found


def is_pointwise(func: Any) -> bool:
    """Whether an ATen op works element by element, with broadcasting."""
    return torch.Tag.pointwise in func.tags or func.overloadpacket in _POINTWISE_EXTRA


def op_name(func: Any) -> str:
    """Return an op's name for people, e.g. ``aten::mm``."""
    return str(func.overloadpacket).replace(".", "::", 1)


def pointwise(b: RowBuilder, func: Any, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> list[Row]:
    """Elementwise with broadcasting: line the operands' dimensions up from the right."""
    shape = outs[0].shape
    kinds = [False] * len(shape)
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    for tensor in tensors:
        found = b.row(tensor)
        lead = len(shape) - tensor.ndim
        for d, kind in enumerate(found.kinds if found else ()):
            if kind:
                kinds[d + lead] = True

    def operand(value: Any) -> Any:
        return b.aligned(value, shape, kinds) if isinstance(value, torch.Tensor) else value

    if func.overloadpacket in (aten._to_copy, aten.clone, aten.zeros_like, aten.ones_like, aten.full_like):
        kwargs = {k: v for k, v in kwargs.items() if k not in ("memory_format", "layout", "pin_memory")}
    node = b.emit(func, *map(operand, args), **{k: operand(v) for k, v in kwargs.items()})
    return [Row(tuple(kinds), node)]


def without(kinds: tuple[bool, ...], *dims: int) -> tuple[bool, ...]:
    """Return the kinds of a value that has lost some dimensions."""
    return tuple(k for d, k in enumerate(kinds) if d not in dims)


def only_row(b: RowBuilder, tensor: Any) -> Row:
    """Return the row form of an operand that must have one."""
    row = b.row(tensor)
    if row is None:
        raise MixesTokensError("uses a value of the tokens as an index or a size")
    return row
