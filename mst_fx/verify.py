"""The contract after every pass; a violation is a bug of ours and raises, naming the pass and the node.

* placeholders are untouched, the graph is well formed;
* every new node runs on fake values, and what replaces a value has its shape, dtype and device;
* outputs keep their number, shapes and dtypes, but for logits put off until they are read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mst_fx.graph import fake, run_on_fakes, walking
from mst_fx.rowform.rows import same_shape


class VerifyError(AssertionError):
    """A pass broke the graph. Please report it."""


def snapshot(module: fx.GraphModule) -> tuple[list[str], list[Any]]:
    """Return what a pass may not change: placeholder names and the outputs' fake values."""
    output = next(n for n in module.graph.nodes if n.op == "output")
    values = [fake(n) if isinstance(n, fx.Node) else n for n in output.args[0]]
    return [n.name for n in module.graph.nodes if n.op == "placeholder"], values


def verify(module: fx.GraphModule, before: tuple[list[str], list[Any]], pass_name: str, fake_mode: Any) -> None:
    """Check a graph after a pass and give its new nodes fake values.

    Raises:
        VerifyError: On any difference.
    """
    try:
        module.graph.lint()
    except RuntimeError as e:
        raise VerifyError(f"{pass_name}: {e}") from e
    with walking(module) as nodes:
        for node in nodes:
            if node.op in ("call_function", "call_method") and "mst_new" in node.meta:
                _run(node, pass_name, fake_mode)
    names, values = snapshot(module)
    if names != before[0]:
        raise VerifyError(f"{pass_name}: placeholders changed")
    for i, (old, new) in enumerate(zip(before[1], values, strict=False)):
        if new is not None and not _alike(old, new):
            raise VerifyError(f"{pass_name}: output {i} was {_show(old)} and is {_show(new)}")


def _run(node: fx.Node, pass_name: str, fake_mode: Any) -> None:
    try:
        value = run_on_fakes(node, fake_mode)
    except Exception as e:
        raise VerifyError(f"{pass_name}: node {node.name} ({node.target}) does not run: {e}") from e
    # Views of what a value has replaced have fake values on its memory: only on that are they seen to share it, so
    # one that a pass has given stays.
    known = node.meta.setdefault("example_value", value)
    del node.meta["mst_new"]
    for old in (known, node.meta.pop("mst_replaces", None)):
        if old is not None and not _alike(old, value):
            raise VerifyError(f"{pass_name}: node {node.name} is {_show(value)} in place of {_show(old)}")


def _alike(old: Any, new: Any) -> bool:
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return type(old) is type(new) or not isinstance(old, torch.Tensor)
    return same_shape(old, new) and old.dtype == new.dtype and old.device == new.device


def _show(value: Any) -> str:
    return f"{value.dtype}{tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
