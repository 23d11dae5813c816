"""Typed access to FX: fake values, sources, walking with autocast in force."""

from __future__ import annotations

import builtins
import functools
import operator
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx

from mst_fx.inductor import storage_of, symbolic_sizes

_TORCH = os.path.join(os.path.dirname(torch.__file__), "")
_PROMISE = str(pathlib.Path(__file__).with_name("promise.py"))
CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
OWN_BACKWARD = torch.ops.higher_order.autograd_function_apply
ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast


def fake(node: fx.Node) -> Any:
    """Return the fake value Dynamo left on a node; a tensor, a number or a nest of these."""
    return node.meta.get("example_value")


def fake_tensor(node: Any) -> torch.Tensor | None:
    """Return the fake value if it is one tensor."""
    value = fake(node) if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return what a node gives: its one tensor, or those of several, as of ``torch.var_mean``."""
    return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, torch.Tensor)]


def ndim(node: fx.Node) -> int:
    """Return the number of dimensions of a node's value; 0 for what is no tensor."""
    value = fake_tensor(node)
    return 0 if value is None else value.ndim


def needs_grad(node: Any) -> bool:
    """Whether a node is a tensor that requires a gradient, or gives several of which one does."""
    return isinstance(node, fx.Node) and any(v.requires_grad for v in tensors_in(fake(node)))


def is_differentiable(dtype: torch.dtype) -> bool:
    """Whether values of a dtype can have a gradient."""
    return dtype.is_floating_point or dtype.is_complex


_NAMESPACES: dict[str, Any] = {
    "torch": torch, "torch.functional": torch.functional, "torch.nn.functional": torch.nn.functional,
    "torch._C._nn": torch._C._nn, "torch._C": torch._C, "torch.autograd": torch.autograd,
    "torch.autograd.grad_mode": torch.autograd.grad_mode, "_operator": operator, "builtins": builtins,
}  # fmt: skip


def block_graph(node: fx.Node) -> fx.GraphModule | None:
    """Return the graph that a node of another one holds, as the first argument of a checkpointed block's call does."""
    if node.op != "get_attr":
        return None
    path = str(node.target).split(".")
    found = functools.reduce(lambda owner, part: getattr(owner, part, None), path, node.graph.owning_module)
    return found if isinstance(found, fx.GraphModule) else None


def node_name(node: fx.Node) -> str:
    """Return the name of torch's or Python's own that a node calls: "sum" for ``x.sum()`` and ``torch.sum(x)`` alike.

    "" for all else: ``torch.masked.sum``, ``torch.ops.mine.sum`` and a user's ``sum`` are other functions.
    """
    return str(node.target) if node.op == "call_method" else _own_name(node.target)


@functools.cache
def _own_name(target: Any) -> str:
    name, module = getattr(target, "__name__", ""), getattr(target, "__module__", None)
    own = name and getattr(torch.Tensor if module is None else _NAMESPACES.get(module), name, None) is target
    return name if own else ""


def called_name(node: fx.Node) -> str:
    """Return the name of whatever a node calls: for people, and to be careful by; it proves nothing."""
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


def run_on_fakes(node: fx.Node, fake_mode: Any) -> Any:
    """Run one node on the fake values of its inputs; what replaces a value without gradient has none either."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), fake)
    with fake_mode, torch.enable_grad(), torch.inference_mode(False), symbolic_sizes(args, kwargs):
        value: Any = (
            getattr(args[0], str(node.target))(*args[1:], **kwargs)
            if node.op == "call_method"
            else node.target(*args, **kwargs)  # pyright: ignore
        )
        old = node.meta.get("mst_replaces")
        if isinstance(old, torch.Tensor) and not old.requires_grad and isinstance(value, torch.Tensor):
            value = value.detach()
    return value


def source_of(node: fx.Node) -> str:
    """Return ``file:line`` of the user's code that made the node, "<unknown>" without a record."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in', node.meta.get("stack_trace") or "")
    frames = [f for f in frames if not f[0].startswith(_TORCH) and f[0] != _PROMISE] or frames
    if frames:
        return f"{frames[-1][0]}:{frames[-1][1]}"
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    return f"<{modules[-1][0]}>" if modules else "<unknown>"


def module_path(node: fx.Node) -> str:
    """Return the path of the module that made a node, e.g. ``model.layers.0.mlp``; "" without a record."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return ""
    # Trainer wraps the forward for autocast: the model is the first of that function's arguments then.
    path = re.sub(r"^L\['(args'\]\[\d+|\w+')\]\.?", "", str(stack[-1][0]))
    path = re.sub(r"\.?__dict__\['_modules'\]", "", path)  # reached through a wrapper's __getattr__
    path = re.sub(r"\['?(\w+)'?\]", r".\1", path.replace("_modules.", "").replace("._modules", ""))
    return path.replace("_orig_mod.", "").strip(".")


@contextmanager
def walking(module: fx.GraphModule) -> Iterator[Iterator[fx.Node]]:
    """Iterate over the nodes in order, each under the autocast state its place in the graph has."""
    with ExitStack() as stack:
        opened: dict[fx.Node, Any] = {}

        def nodes() -> Iterator[fx.Node]:
            for node in module.graph.nodes:
                if node.target is ENTER_AUTOCAST:
                    opened[node] = ENTER_AUTOCAST(*node.args)
                    stack.callback(_leave, opened, node)
                elif node.target is EXIT_AUTOCAST:
                    _leave(opened, node.args[0])
                else:
                    yield node

        yield nodes()


def is_autocast_switch(node: fx.Node) -> bool:
    """Whether a node enters or leaves an autocast state."""
    return node.target is ENTER_AUTOCAST or node.target is EXIT_AUTOCAST


def open_autocasts(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that entered the autocast states in force at a node of the same graph, outermost first."""
    opened: list[fx.Node] = []
    for other in node.graph.nodes:
        if other is node:
            break
        if other.target is ENTER_AUTOCAST:
            opened.append(other)
        elif other.target is EXIT_AUTOCAST:
            opened.remove(other.args[0])
    return opened


@contextmanager
def in_autocasts_of(node: fx.Node) -> Iterator[None]:
    """Run what is inside under the autocasts that its graph has entered at a node."""
    with ExitStack() as stack:
        for n in open_autocasts(node):
            stack.callback(EXIT_AUTOCAST, ENTER_AUTOCAST(*n.args))
        yield


def autocast_dtypes(node: fx.Node) -> dict[str, torch.dtype]:
    """Return device type -> dtype of the autocasts in force at a node, around the compiled function or in its graph."""
    with in_autocasts_of(node):
        return dtypes_now()


def dtypes_now() -> dict[str, torch.dtype]:
    """Return device type -> dtype of the autocasts in force."""
    return {kind: torch.get_autocast_dtype(kind) for kind in _kinds() if torch.is_autocast_enabled(kind)}


@contextmanager
def default_autocast_dtypes(dtypes: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Have an autocast that is entered without a dtype cast to these, by device type."""
    before = {kind: torch.get_autocast_dtype(kind) for kind in dtypes}
    try:
        for kind, dtype in dtypes.items():
            torch.set_autocast_dtype(kind, dtype)
        yield
    finally:
        for kind, dtype in before.items():
            torch.set_autocast_dtype(kind, dtype)


def _kinds() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _leave(opened: dict[Any, Any], node: Any) -> None:
    mode = opened.pop(node, None)
    if mode is not None:
        EXIT_AUTOCAST(mode)


def autocast_now() -> Callable[[], AbstractContextManager[Any]]:
    """Return a factory of contexts that restore the autocast state of this moment."""
    states = [(k, torch.get_autocast_dtype(k), torch.is_autocast_enabled(k)) for k in _kinds()]

    @contextmanager
    def restored() -> Any:
        with ExitStack() as stack:
            for kind, dtype, enabled in states:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            yield

    return restored


@contextmanager
def autocast_off() -> Iterator[None]:
    """Run what is inside without autocast, on whatever device."""
    with ExitStack() as stack:
        for kind in _kinds():
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def is_grad_switch(node: fx.Node) -> bool:
    """Whether a node switches the grad mode or the inference mode."""
    return node_name(node) in (_SET_GRAD, *_INFERENCE)


_SET_GRAD, _INFERENCE = "_set_grad_enabled", ("_enter_inference_mode", "_exit_inference_mode")


class GradState(NamedTuple):
    """The modes at a node of a graph, as far as its own switches tell."""

    enabled: bool = True
    inference: bool = False


def grad_states(module: fx.GraphModule) -> dict[fx.Node, GradState]:
    """Return for every node which grad-mode switches are in force there; equal states are equal modes."""
    states: dict[fx.Node, GradState] = {}
    state, outer = GradState(), list[GradState]()
    for node in module.graph.nodes:
        name = node_name(node)
        if name == _SET_GRAD:
            state = state._replace(enabled=node.args[0] is not False)
        elif name == _INFERENCE[0]:
            outer.append(state)
            inference = node.args[:1] != (False,)
            # `inference_mode(False)` switches gradients on as well, under `no_grad` too
            state = GradState(not inference, inference)
        elif name == _INFERENCE[1] and outer:
            state = outer.pop()
        states[node] = state
    return states


def records_gradients(state: GradState | None) -> bool:
    """Whether gradients are recorded in a state of ``grad_states``; where none is known they are."""
    return state in (None, GradState())


def storages(node: fx.Node) -> set[int]:
    """Return the identities of the storages behind a node's fake value."""
    found = []
    fx.map_arg((node,), lambda n: found.append(fake(n)))
    return {storage_of(t) for v in found for t in tensors_in(v) if t.layout is torch.strided}


def stride_order(value: torch.Tensor) -> list[int] | None:
    """Return the dimensions of a dense value from the largest stride to the smallest, those of size 1 left out.

    None if its elements overlap, or have others between them.
    """
    sizes, strides = ([size_hint(n) for n in numbers] for numbers in (value.shape, value.stride()))
    order = sorted((d for d, size in enumerate(sizes) if size != 1), key=lambda d: -strides[d])
    step = 1
    for d in reversed(order):
        if strides[d] != step:
            return None
        step *= sizes[d]
    return order


def size_hint(size: Any) -> int:
    """Return the example value of a symbolic size, without a guard."""
    hint = size.node.hint if isinstance(size, torch.SymInt) else size
    return int(hint) if hint is not None else 2**14


def is_parameter_like(node: Any, outer: dict[fx.Node, fx.Node] | None = None) -> bool:
    """Whether a value comes from parameters and buffers alone, whatever is computed of them."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        while outer and current in outer:
            current = outer[current]
        if current in seen:
            continue
        seen.add(current)
        if current.op == "placeholder":
            value = fake_tensor(current)
            named = re.search(r"parameters_|buffers_", str(current.target))
            if value is not None and not isinstance(value, torch.nn.Parameter) and not named:
                return False
        stack += current.all_input_nodes
    return True


_LAYOUT_METHODS = {
    "t",
    "T",
    "transpose",
    "permute",
    "contiguous",
    "to",
    "float",
    "bfloat16",
    "half",
    "view",
    "reshape",
    "mT",
}


def layout_root(node: Any) -> Any:
    """Follow views, transposes and casts back to the value they show."""
    while isinstance(node, fx.Node) and is_layout(node):
        node = node.args[0]
    return node


def is_layout(node: fx.Node) -> bool:
    """Whether a node is a view, a transpose or a cast of its first argument."""
    if node.op not in ("call_method", "call_function") or not node.args:
        return False
    name = node_name(node)
    return name in _LAYOUT_METHODS or (name == "getattr" and node.args[1] in ("T", "mT"))
