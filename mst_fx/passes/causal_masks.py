"""Say "causal" instead of making an S x S mask.

    m = arange(S)[None, :] <= arange(S)[:, None]; y = scaled_dot_product_attention(q, k, v, attn_mask=m)
 -> y = scaled_dot_product_attention(q, k, v, is_causal=True)

Terms: a mask is *proved* when ``masks.read_mask`` says what it is from how it is computed; no shape, name or value is
guessed from. A mask proved to let every query see every key is dropped.

Memory: ``S * S`` booleans, and what kernels without a flag for them make of it (fp32 on a CPU, the dtype of the
queries padded to 16 bytes on a GPU). Half of the attention's work goes too: the kernel skips what is masked.
What made the mask stays as dead code, which AOTAutograd drops: a checkpointed block still takes it as an argument.
Not handled: windows, padding, masks that are added.
"""

from __future__ import annotations

import torch
from torch import fx

from mst_fx.context import Context, Graph
from mst_fx.effects import changed_storages
from mst_fx.graph import fake_tensor
from mst_fx.regions.masks import read_mask
from mst_fx.report import RegionReport
from mst_fx.rowform.rows import same_size

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def causal_masks(graph: Graph, context: Context) -> list[RegionReport]:
    """Replace every proved mask of one graph; the report's notes say how many."""
    for node in list(graph.module.graph.nodes):
        mask = find_mask(node)
        if mask is None:
            continue
        kind = read_mask(mask, graph.outer, _mutated(graph, context))
        if kind is None or not _fits(node, mask):
            continue
        rewrite_mask(node, causal=kind == "causal")
        context.masks += 1
    return []


def find_mask(node: fx.Node) -> fx.Node | None:
    """Return the mask of an attention that has one and no other say in what is seen."""
    if node.op != "call_function" or node.target is not torch.nn.functional.scaled_dot_product_attention:
        return None
    given = {**dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}
    mask = given.get("attn_mask")
    return mask if isinstance(mask, fx.Node) and not given.get("is_causal", False) else None


def _fits(node: fx.Node, mask: fx.Node) -> bool:
    """Whether the mask has one row per query and one column per key, none of it spread."""
    query, key, own = fake_tensor(node.args[0]), fake_tensor(node.args[1]), fake_tensor(mask)
    if query is None or key is None or own is None or len(node.args) < 3:
        return False
    return same_size(own.shape[-2], query.shape[-2]) and same_size(own.shape[-1], key.shape[-2])


def rewrite_mask(node: fx.Node, causal: bool) -> None:
    """Take the mask away from an attention."""
    given = {**dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}
    del given["attn_mask"]
    given["is_causal"] = causal
    node.args = tuple(given.pop(n) for n in _NAMES[:3])
    node.kwargs = given


def _mutated(graph: Graph, context: Context) -> set[int]:
    """Return the storages that change in place in a graph and those around it; each graph is read once."""
    owners = {n.graph.owning_module for n in graph.outer.values() if n.graph.owning_module is not None}
    found: set[int] = set()
    for module in {graph.module, *owners}:
        if module not in context.mutated:
            context.mutated[module] = changed_storages(module.graph.nodes)
        found |= context.mutated[module]
    return found
