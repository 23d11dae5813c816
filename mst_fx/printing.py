"""One line per node: how graphs and bodies are shown to people.

silu: float32[1, 4096, 1792] = silu(linear)
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

SHORT = 8
"""Characters of a body's name that are shown."""


def node_line(node: fx.Node, name_of: Callable[[fx.Node], str] = lambda n: n.name) -> str:
    """Return a node as ``name: dtype[shape] = target(args)``; placeholders and constants name themselves only."""
    if node.op == "output":
        return f"return {_show(node.args[0], name_of)}"
    kind = value_text(node)
    if node.op in ("placeholder", "get_attr"):
        return f"{name_of(node)}: {kind} = {node.op}" if kind else f"{name_of(node)} = {node.op}"
    args = [*_positional(node, name_of), *(f"{k}={_show(v, name_of)}" for k, v in node.kwargs.items())]
    return f"{name_of(node)}{': ' + kind if kind else ''} = {target_text(node)}({', '.join(args)})"


def target_text(node: fx.Node) -> str:
    """Return what a node calls, in few words."""
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        namespace = f"{node.target.namespace}." if node.target.namespace == "mst_fx" else ""
        return namespace + node.target._opname
    return getattr(node.target, "__name__", str(node.target))


def _positional(node: fx.Node, name_of: Callable[[fx.Node], str]) -> list[str]:
    """Return the positional arguments; those of our own ops that are no tensors by name, absent ones left out."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "mst_fx":
        return [_show(a, name_of) for a in node.args]
    named = zip((a.name for a in node.target._schema.arguments), node.args, strict=False)
    plain = (fx.Node, list, tuple)
    return [
        _show(a, name_of) if isinstance(a, plain) else f"{name}={_show(a, name_of)}"
        for name, a in named
        if a is not None
    ]


def value_text(node: fx.Node) -> str:
    """Return dtype and shape of a node's fake tensor or tensors, "" without one."""
    return type_text(node.meta.get("example_value", node.meta.get("val")))


def type_text(value: Any) -> str:
    """Return dtype and shape of a tensor or tensors, "" for anything else."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
        inner = ", ".join(type_text(v) or "-" for v in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return ""


def inline(
    nodes: Sequence[fx.Node], name_of: Callable[[fx.Node], str]
) -> tuple[list[fx.Node], Callable[[fx.Node], str]]:
    """Leave out nodes that read better where they are used: ``w.T`` for a transpose, ``x[0]`` of several results.

    Returns:
        The nodes that are left, and the names of all.
    """
    own = set(nodes)

    def suffix(node: fx.Node) -> str:
        source = node.args[0] if node in own and node.args else None
        if not isinstance(source, fx.Node):
            return ""
        if node.target is torch.ops.aten.t.default:
            return ".T"
        several = value_text(source).startswith("(")
        return f"[{node.args[1]}]" if node.target is operator.getitem and several and source in own else ""

    def named(node: fx.Node) -> str:
        if node.target is torch.ops.aten.sym_size.int:
            return str(node.meta["val"])
        last = suffix(node)
        return f"{named(node.args[0])}{last}".removesuffix(".T.T") if last else name_of(node)  # pyright: ignore

    hidden = (torch.ops.aten.sym_size.int,)
    return [n for n in nodes if n.target not in hidden and not suffix(n)], named


def parameter_name(name: str) -> str:
    """Return a placeholder's name as a path: ``l_self_modules_mlp_parameters_weight_`` -> ``mlp.weight``."""
    short = re.sub(r"^[lL]_(self_|fn_|args_\d+_|kwargs_)?", "", name)
    short = re.sub(r"(^|_)dict_modules_", r"\1modules_", short)  # reached through a wrapper's __getattr__
    short = re.sub(r"_?modules_|_parameters_|_buffers_", ".", "_" + short if short.startswith("modules_") else short)
    return short.strip("._") or name


def readable(module: fx.GraphModule) -> str:
    """Return a graph as text, graphs of checkpointed blocks below it."""
    lines = [node_line(n) for n in module.graph.nodes if n.op != "get_attr"]
    for name, child in module.named_children():
        if isinstance(child, fx.GraphModule):
            lines += [f"{name}:", *("  " + line for line in readable(child).splitlines())]
    return "\n".join(lines)


def body_code(module: fx.GraphModule) -> str:
    """Return a chunk body as a function over ``C`` tokens.

    Inputs are named by what they are: ``x`` has a chunk's rows, ``w`` is shared by all chunks, ``dy`` is the
    gradient of an output's rows.
    """
    names: dict[fx.Node, str] = {}
    symbols: set[str] = set()
    counts = {"x": 0, "w": 0, "dy": 0}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            symbolic = {str(s) for s in getattr(node.meta.get("val"), "shape", ()) if not str(s).isdigit()}
            kind = ("dy" if counts["w"] else "x") if symbolic else "w"
            names[node] = f"{kind}{counts[kind]}"
            counts[kind] += 1
            symbols |= symbolic

    def name_of(node: fx.Node) -> str:
        return names.get(node, node.name)

    lines = [f"def body({', '.join(f'{name}: {value_text(n)}' for n, name in names.items())}):"]
    shown, name = inline([n for n in module.graph.nodes if n.op not in ("placeholder", "get_attr")], name_of)
    lines += ["    " + node_line(n, name) for n in shown]
    text = "\n".join(lines)
    for symbol in symbols:
        text = re.sub(rf"\b{re.escape(symbol)}\b", "C", text)
    return text


def _show(value: Any, name_of: Callable[[fx.Node], str]) -> str:
    if isinstance(value, fx.Node):
        return name_of(value)
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_show(v, name_of) for v in value)
        if isinstance(value, list):
            return f"[{inner}]"
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, slice):
        return f"slice({_show(value.start, name_of)}, {_show(value.stop, name_of)}, {_show(value.step, name_of)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_show(v, name_of)}" for k, v in value.items()) + "}"
    if isinstance(value, str):
        return value[:SHORT] if re.fullmatch(r"[0-9a-f]{24}", value) else repr(value)
    return str(value)
