"""The whitelist: for each ATen op, its row form, or the reason it has none.

A rule is ``rule(b, func, args, kwargs, outs) -> list[Row]``: ``b`` the ``RowBuilder``, ``args`` and
``kwargs`` as dispatched (at least one tensor in them is token-wise), ``outs`` the op's fake results;
it returns one ``Row`` per result. What is not in the table and not tagged pointwise mixes tokens as
far as we know. A wrong rule here is silent wrong training: every one has a near-miss test.
"""

from mst_fx.rowform.rules import features, layout, products
from mst_fx.rowform.rules.registry import find_rule

__all__ = ["features", "find_rule", "layout", "products"]
