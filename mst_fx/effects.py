"""What a node of a Dynamo graph does beside giving a value: what it changes in place, what its gradient is.

In place: told by what it calls. A registered op by its schema, torch's own functions by their names (``relu_``,
``inplace``, ``out``) and a short list of those whose names don't say it, a graph of its own by the nodes in it. Any
other Python function that Dynamo left in the graph (``allow_in_graph``) is run on fake values and watched.

Gradient: that of the ATen ops it is made of, which is what a chunk body differentiates. Functions that nobody looked
into may be made otherwise: by an autograd function, or with gradients off in part.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from mst_fx.graph import block_graph, called_name, fake, needs_grad, node_name, storages, tensors_in
from mst_fx.inductor import fake_mode_of, storage_of, symbolic_sizes

_OPERATORS = {
    "iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub",
    "itruediv", "ixor",
}  # fmt: skip
_METHODS = {"__setitem__", *(f"__{name}__" for name in _OPERATORS)}
_QUIET: dict[Any, tuple[str, tuple[str, ...]]] = {
    F.batch_norm: ("training", ("running_mean", "running_var")),
    F.instance_norm: ("use_input_stats", ("running_mean", "running_var")),
    F.embedding: ("max_norm", ("weight",)),
    F.embedding_bag: ("max_norm", ("weight",)),
}
"""Functions that change arguments without a name that says so: the argument that makes them, and what they change."""
_QUIET_BUILTINS = {"batch_norm", "instance_norm", "native_batch_norm", "fused_moving_avg_obs_fake_quant"}
"""The same of functions without a signature: any argument may change."""


def is_in_place(node: fx.Node) -> bool:
    """Whether a node may change a value that was there before it."""
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name in _METHODS
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return bool(_written_by_graphs(node))
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return any(_may_write(getattr(node.target, name)._schema, node.kwargs) for name in node.target.overloads())
    if "out" in node.kwargs or node.target is operator.setitem or _argument(node, "inplace"):
        return True
    if node.target in _QUIET:
        return bool(_argument(node, _QUIET[node.target][0])) and bool(_quiet(node))
    name = called_name(node)
    if getattr(node.target, "__module__", "") == "_operator":
        return name in _OPERATORS
    if (name.endswith("_") and not name.endswith("__")) or name in _QUIET_BUILTINS:
        return True
    return _is_foreign(node) and bool(_watched(node))


_RESHAPES = {"transpose_", "t_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_"}
_RESETS = {"resize_", "resize_as_", "set_", "as_strided_", "detach_"}


def reshapes_in_place(node: fx.Node) -> bool:
    """Whether a node changes what a value of this graph looks like, not what is in it.

    Dynamo ran it on the value's fake tensor: the node that made the value has the later shape in ``meta``.
    """
    target = node.args[0] if node.op in ("call_method", "call_function") and node.args else None
    given = not isinstance(target, fx.Node) or target.op in ("placeholder", "get_attr")
    return not given and node_name(node) in _RESHAPES | _RESETS


def mutated_storages(node: fx.Node) -> set[int]:
    """Return the storages an in-place node may change: an operator's first argument's, else all tensor arguments'."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return _written_by_graphs(node)
    if not is_in_place(node):
        return set()
    if _is_foreign(node):
        return _watched(node)
    operates = getattr(node.target, "__module__", "") == "_operator" or _writes_first(node)
    if operates and isinstance(node.args[0], fx.Node):
        return storages(node.args[0])
    written = _quiet(node) if node.target in _QUIET else node.all_input_nodes
    return set().union(*(storages(n) for n in written))  # pyright: ignore[reportArgumentType]


def _writes_first(node: fx.Node) -> bool:
    """Whether a node is a method that writes to its tensor alone, by the schemas of the op behind it."""
    packet = getattr(torch.ops.aten, str(node.target), None) if node.op == "call_method" else None
    if packet is None or str(node.target) in _RESETS:
        return False
    schemas = [getattr(packet, name)._schema.arguments for name in packet.overloads()]
    return not any(a.alias_info is not None and a.alias_info.is_write for given in schemas for a in given[1:])


def changed_storages(nodes: Iterable[fx.Node]) -> set[int]:
    """Return the storages that any of these nodes may change in place."""
    return set().union(*map(mutated_storages, nodes))


def change_after(node: fx.Node, held: set[int]) -> bool:
    """Whether one of these storages changes in place behind a node of the graph."""
    behind = node.next
    while behind.op != "root":
        if mutated_storages(behind) & held:
            return True
        behind = behind.next
    return False


def written_values(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return what a call of a registered op gives for the arguments that it changes, lists taken apart."""
    arguments = func._schema.arguments
    given = {**dict(zip((a.name for a in arguments), args, strict=False)), **kwargs}
    written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return pytree.tree_leaves([given.get(name) for name in written])


def _quiet(node: fx.Node) -> list[fx.Node]:
    given = (_argument(node, name) for name in _QUIET[node.target][1])
    return [v for v in given if isinstance(v, fx.Node)]


def _may_write(schema: Any, kwargs: Any) -> bool:
    """Whether a call that gives these keywords, by one overload of an op, changes an argument."""
    writes = (a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    return any(not a.kwarg_only or a.name in kwargs for a in writes)


def _argument(node: fx.Node, name: str) -> Any:
    """Return an argument of a call by name, wherever it was given; None without such a parameter."""
    if name in node.kwargs:
        return node.kwargs[name]
    parameters = _parameters(node.target)
    if name not in parameters:
        return None
    position = parameters.index(name)
    return node.args[position] if position < len(node.args) else None


@functools.cache
def _parameters(function: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def gradients_flow(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that a gradient may flow into: they need one, and it leads to an output."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        carries = needs_grad(node) and any(u in live for u in node.users)
        if carries or node.op == "output" or is_in_place(node) or fake(node) is None:
            live.add(node)
    return live


# -- random numbers -----------------------------------------------------------------------------------


_DRAWS = ("rand", "bernoulli", "multinomial", "dropout", "rrelu", "poisson", "binomial")


def draws(node: fx.Node) -> bool:
    """Whether a node draws random numbers: computed again, it would give others."""
    name = called_name(node)
    if name == "dropout" and 0 in (node.kwargs.get("p"), *node.args[1:2]):
        return False
    if name == "scaled_dot_product_attention":
        share: Any = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0)
        return not isinstance(share, (int, float)) or share != 0
    seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return seeded or name == "normal" or any(word in name for word in _DRAWS)


def communicates(node: fx.Node) -> bool:
    """Whether a node talks to other ranks, which must find it at the same place among its like, and as often.

    Whatever has to do with a tensor subclass counts: a DTensor's methods may.
    """
    target: Any = node.target
    named = getattr(target, "namespace", None) or getattr(target, "__module__", None) or ""
    packet = getattr(target, "_qualified_op_name", "")
    if any("c10d" in word or word.startswith("torch.distributed") for word in (str(named), str(packet))):
        return True
    values = (v for n in (node, *node.all_input_nodes) for v in tensors_in(fake(n)))
    return any(map(is_traceable_wrapper_subclass, values))


# -- nodes with graphs of their own --------------------------------------------------------------------


def _written_by_graphs(node: fx.Node) -> set[int]:
    """Return what a node changes by the graphs it calls, or by a kernel: all its tensors then, as which is not told."""
    changes = "mutation" in str(node.target) or "auto_functionalized" in str(node.target)
    if not (changes or any(map(_writes_an_input, filter(None, map(block_graph, node.all_input_nodes))))):
        return set()
    return set().union(*(storages(n) for n in node.all_input_nodes))


def _writes_an_input(module: fx.GraphModule) -> bool:
    writing = [n for n in module.graph.nodes if is_in_place(n)]
    if not writing:
        return False
    given = set().union(*(storages(n) for n in module.graph.nodes if n.op in ("placeholder", "get_attr")))
    return any(mutated_storages(n) & given for n in writing)


# -- functions nobody looked into ------------------------------------------------------------------------------


def _is_foreign(node: fx.Node) -> bool:
    """Whether a node calls a Python function that is neither torch's nor Python's own."""
    target = node.target
    if node.op != "call_function" or node_name(node) or isinstance(
        target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)
    ):  # fmt: skip
        return False
    module = str(getattr(target, "__module__", None) or "torch")  # torch's builtins have none
    # A module declared token-wise is looked into where it is traced.
    return module.split(".")[0] not in ("torch", "builtins", "math", "_operator", "mst_fx")


def _watched(node: fx.Node) -> set[int]:
    """Return the storages that such a function changes when it runs on fake values; any, where it can't."""
    values = [v for n in node.all_input_nodes for v in tensors_in(fake(n))]
    known = node.meta.get("mst_writes")
    if known is None or known[0] != [id(v) for v in values]:
        known = node.meta["mst_writes"] = ([id(v) for v in values], _watch(node, values))
    return known[1]


def _watch(node: fx.Node, values: list[torch.Tensor]) -> set[int]:
    mode = fake_mode_of(values)
    any_of_them = {storage_of(v) for v in values if v.layout is torch.strided}
    if mode is None:
        return any_of_them

    def view(n: fx.Node) -> Any:
        """Return a node's value, its tensors as others on the same storages: what is done to them is not its own."""
        return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, fake(n))

    try:
        args, kwargs = fx.map_arg((node.args, node.kwargs), view)
        with mode, torch.no_grad(), symbolic_sizes(args, kwargs), _Writes() as watch:
            node.target(*args, **kwargs)  # pyright: ignore
    except Exception:
        return any_of_them
    return watch.found & any_of_them


class _Writes(TorchDispatchMode):
    """Notes the storages that ops change in place."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable:
            written = written_values(func, args, kwargs)
            self.found |= {storage_of(v) for v in written if isinstance(v, torch.Tensor)}
        return func(*args, **kwargs)


def differentiates_itself(node: fx.Node, fake_mode: Any) -> bool:
    """Whether a call's gradient is, or may be, another than that of the ATen ops it runs."""
    if node.op != "call_function" or node_name(node) or _is_aten(node.target):
        return False
    if not any(v.requires_grad for v in tensors_in(fake(node))):
        return False
    target: Any = node.target

    def leaf(n: fx.Node) -> Any:
        def copied(v: torch.Tensor) -> torch.Tensor:
            return v.detach().requires_grad_(v.requires_grad)

        return pytree.tree_map_only(torch.Tensor, copied, fake(n))

    args, kwargs = fx.map_arg((node.args, node.kwargs), leaf)
    try:
        with (
            fake_mode, torch.inference_mode(False), torch.enable_grad(), symbolic_sizes(args, kwargs),
            _GradModes() as watch,
        ):  # fmt: skip
            out = target(*args, **kwargs)
    except Exception:
        return True
    if watch.ops & {target, getattr(target, "overloadpacket", None)}:
        return False  # a registered op that is not made of others: a rule knows it, or none
    return watch.off or any(map(_has_own_function, tensors_in(out)))


def _is_aten(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace == "aten"
    return isinstance(target, torch._ops.OpOverloadPacket) and target._qualified_op_name.startswith("aten::")


class _GradModes(TorchDispatchMode):
    """Notes which ops ran, and whether one did with gradients off."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[Any] = set()
        self.off = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops |= {func, getattr(func, "overloadpacket", func)}
        self.off |= not torch.is_grad_enabled()
        return func(*args, **(kwargs or {}))


def _has_own_function(value: torch.Tensor) -> bool:
    """Whether an autograd function written in Python is among those a value came by."""
    stack, seen = [value.grad_fn], set[Any]()
    while stack:
        made = stack.pop()
        if made is not None and made not in seen:
            if isinstance(made, torch.autograd.function.BackwardCFunction):
                return True
            seen.add(made)
            stack += [f for f, _ in made.next_functions]
    return False
