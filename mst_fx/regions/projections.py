"""Projections: what is multiplied by a matrix, spelling by spelling, and which of its dimensions are tokens.

Terms:
    contracted: dimensions summed over. All others of the tokens' value that the weight lacks are token dimensions;
        one that both have (experts in a batched product) is a feature of the token.
    growth: how many times more features come out than go in.
"""

from __future__ import annotations

import math
from string import ascii_lowercase, ascii_uppercase
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from mst_fx.graph import fake_tensor, is_parameter_like, node_name
from mst_fx.rowform.rows import concrete, is_one, same_shape


class Projection(NamedTuple):
    """One product of a value of the tokens with a weight."""

    tokens: fx.Node
    weight: Any
    kinds: tuple[bool, ...]
    """For each dimension of ``tokens``, whether it is a token dimension."""
    contracted: tuple[int, ...]
    """Dimensions of ``tokens`` that are summed over."""
    growth: float


_LINEAR = {torch._C._nn.linear, F.linear}
_PRODUCTS = {torch.matmul, torch.mm, torch.bmm}
_ADDED = {torch.addmm, torch.baddbmm}
_CONVOLUTIONS = {torch.conv1d: 3, torch.conv2d: 4, F.conv1d: 3, F.conv2d: 4}


def read_projection(node: fx.Node, outer: dict[fx.Node, fx.Node] | None = None) -> Projection | None:
    """Return what a node projects, None if it is no projection.

    Args:
        node: Any node.
        outer: For a checkpointed block, its placeholders -> the caller's values.
    """
    if node.op == "call_method":
        name = str(node.target)
        if name in ("matmul", "mm", "bmm", "__matmul__"):
            return _product(node.args[0], _given(node, 1, "other", "mat2", "tensor2"), outer)
        if name not in ("addmm", "baddbmm"):
            return None
        return _product(_given(node, 1, "mat1", "batch1"), _given(node, 2, "mat2", "batch2"), outer)
    if node.op != "call_function":
        return None
    if node.target in _LINEAR:
        return _linear(_given(node, 0, "input"), _given(node, 1, "weight"))
    if node.target in _PRODUCTS or node_name(node) == "matmul":
        return _product(_given(node, 0, "input"), _given(node, 1, "other", "mat2"), outer)
    if node.target in _ADDED:
        return _product(_given(node, 1, "mat1", "batch1"), _given(node, 2, "mat2", "batch2"), outer)
    if node.target is torch.einsum:
        operands = node.args[1] if len(node.args) == 2 else node.args[1:]
        pair = operands if isinstance(operands, (list, tuple)) and len(operands) == 2 else None
        return _einsum(node.args[0], *pair, outer) if pair else None
    if node.target is torch.tensordot:
        left, right, dims = node.args[0], _given(node, 1, "b"), _given(node, 2, "dims")
        return _einsum(_tensordot_equation(left, right, 2 if dims is None else dims), left, right, outer)
    if node.target in _CONVOLUTIONS:
        return _convolution(_given(node, 0, "input"), _given(node, 1, "weight"), _CONVOLUTIONS[node.target])
    return None


def _given(node: fx.Node, position: int, *names: str) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[n] for n in names if n in node.kwargs), None)


def _linear(x: Any, weight: Any) -> Projection | None:
    tokens, matrix = fake_tensor(x), fake_tensor(weight)
    if tokens is None or matrix is None or tokens.ndim < 2 or matrix.ndim != 2:
        return None
    return _projection(x, weight, {tokens.ndim - 1}, {tokens.ndim - 1}, matrix.shape[0], matrix.shape[1])


def _product(left: Any, right: Any, outer: Any) -> Projection | None:
    a, b = fake_tensor(left), fake_tensor(right)
    if a is None or b is None or a.ndim < 2 or b.ndim < 2:
        return None
    if _is_first_weight(left, right, outer):
        x, weight, tokens, matrix, at = right, left, b, a, b.ndim - 2
        new, old = matrix.shape[-2], matrix.shape[-1]
    else:
        x, weight, tokens, matrix, at = left, right, a, b, a.ndim - 1
        new, old = matrix.shape[-1], matrix.shape[-2]
    if tokens.ndim < matrix.ndim:
        return None
    features = {at}
    if matrix.ndim == 3 and not is_one(matrix.shape[0]) and concrete(matrix.stride(0)) != 0:
        features.add(tokens.ndim - 3)  # a weight for each of several experts
    return _projection(x, weight, features, {at}, new, old)


def _is_first_weight(left: Any, right: Any, outer: Any) -> bool:
    return not is_parameter_like(right, outer) and is_parameter_like(left, outer)


def _convolution(x: Any, weight: Any, ndim: int) -> Projection | None:
    tokens, kernel = fake_tensor(x), fake_tensor(weight)
    if tokens is None or kernel is None or tokens.ndim != ndim or not all(is_one(s) for s in kernel.shape[2:]):
        return None
    return _projection(x, weight, {1}, {1}, kernel.shape[0], kernel.shape[1])


def _tensordot_equation(left: Any, right: Any, dims: Any) -> str | None:
    """Return what ``torch.tensordot`` sums as an equation of ``torch.einsum``, None where ``dims`` are a tensor."""
    a, b = fake_tensor(left), fake_tensor(right)
    if a is None or b is None or isinstance(dims, fx.Node):
        return None
    pairs = ([d - dims for d in range(dims)], range(dims)) if isinstance(dims, int) else dims
    first, second = list(ascii_lowercase[: a.ndim]), list(ascii_uppercase[: b.ndim])
    for i, j in zip(*pairs, strict=True):
        second[j] = first[i]
    output = [d for d in first if d not in second] + [d for d in second if d not in first]
    return f"{''.join(first)},{''.join(second)}->{''.join(output)}"


def _implied_output(inputs: str) -> str:
    """Return the output of an equation without one: broadcast dimensions, then what is named once, by name."""
    letters = inputs.replace("...", "").replace(",", "")
    return ("..." if "..." in inputs else "") + "".join(sorted(d for d in letters if letters.count(d) == 1))


def _einsum(equation: Any, left: Any, right: Any, outer: Any) -> Projection | None:
    if not isinstance(equation, str):
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    output = output if arrow else _implied_output(inputs)
    terms = inputs.split(",")
    pairs = [(left, terms[0]), (right, terms[1])]
    (x, letters), (weight, own) = reversed(pairs) if _is_first_weight(left, right, outer) else pairs
    tokens, matrix = fake_tensor(x), fake_tensor(weight)
    if tokens is None or matrix is None or "..." in own or len(own) != matrix.ndim:
        return None
    dims = list(letters.replace("...", "." * (tokens.ndim - len(letters) + 3)))
    sizes = dict(zip(own, matrix.shape, strict=True))
    if len(dims) != tokens.ndim or any(d != "." and d not in own and d not in output for d in dims):
        return None
    features = {i for i, d in enumerate(dims) if d in sizes}
    contracted = {i for i in features if dims[i] not in output}
    new = math.prod(s for letter, s in sizes.items() if letter not in dims)
    old = math.prod(sizes[dims[i]] for i in contracted)
    return _projection(x, weight, features, contracted, new, old)


def _projection(
    x: fx.Node, weight: Any, features: set[int], contracted: set[int], new: Any, old: Any
) -> Projection | None:
    value = fake_tensor(x)
    assert value is not None
    new, old = concrete(new), concrete(old)
    if not contracted or not isinstance(new, int) or not isinstance(old, int) or old == 0:
        return None
    kinds = tuple(d not in features for d in range(value.ndim))
    return Projection(x, weight, kinds, tuple(sorted(contracted)), new / old) if any(kinds) else None


def contracts_over_tokens(projection: Projection, outer: dict[fx.Node, fx.Node] | None = None) -> bool:
    """Whether what is summed over was no feature before a transpose (token mixing as in MLP-Mixer).

    Features are the last dimensions of a value, where nothing has moved them, and the second of a convolution's or a
    group norm's; the trace ends at the first op that is neither a transpose nor a copy.
    """
    node: Any = projection.tokens
    value = fake_tensor(node)
    assert value is not None
    contracted = set(projection.contracted)
    shared = {d for d, kind in enumerate(projection.kinds) if not kind}
    while True:
        while outer and node in outer:
            node = outer[node]
        if not isinstance(node, fx.Node) or node.op not in ("call_method", "call_function") or not node.args:
            break
        name = node_name(node)
        source = fake_tensor(node.args[0])
        if source is None:
            break
        order = _order(name, node, source.ndim)
        if order is None:
            break
        contracted, shared = {order[d] for d in contracted}, {order[d] for d in shared}
        node, value = node.args[0], source
    others = set(range(value.ndim)) - shared
    if contracted == {1} and (_is_channels_first(node) or _is_image_given(projection, node)):
        return False
    return any(c < o for c in contracted for o in others)


def _is_image_given(projection: Projection, root: Any) -> bool:
    """Whether a convolution reads what the model was given: its second dimension are features, or it was no image."""
    kernel = fake_tensor(projection.weight)
    return root.op == "placeholder" and kernel is not None and kernel.ndim > 2 and projection.contracted == (1,)


def _is_channels_first(node: Any) -> bool:
    """Whether a value is of an op with features second, its places folded into one, or elementwise of such a one."""
    ahead, seen = [node], set()
    while ahead:
        node = ahead.pop()
        if not isinstance(node, fx.Node) or node.op not in ("call_method", "call_function") or node in seen:
            continue
        seen.add(node)
        if node.target in _CHANNELS_FIRST:
            return True
        if node_name(node) == "flatten" and node.args[1:] in ((2,), (2, -1)):
            ahead.append(node.args[0])
        value = fake_tensor(node)
        if node_name(node) in _POINTWISE and value is not None:
            inputs = ((n, fake_tensor(n)) for n in node.all_input_nodes)
            ahead += [n for n, v in inputs if v is not None and same_shape(v, value)]
    return False


_CHANNELS_FIRST = {
    torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d,
    F.group_norm, F.instance_norm, F.batch_norm, torch.group_norm, torch.instance_norm, torch.batch_norm,
}  # fmt: skip
_POINTWISE = {
    "gelu", "relu", "silu", "tanh", "sigmoid", "dropout", "contiguous", "float", "to",
    "add", "iadd", "sub", "isub", "mul", "imul", "div", "truediv",
}  # fmt: skip


def _order(name: str, node: fx.Node, n: int) -> list[int] | None:
    """Return where each dimension of a node's result was in its input; None for what is no transpose or copy."""
    order, args = list(range(n)), node.args
    if name in ("transpose", "swapaxes", "swapdims") and len(args) == 3:
        i, j = args[1] % n, args[2] % n  # pyright: ignore
        order[i], order[j] = order[j], order[i]
        return order
    if name == "permute":
        listed: Any = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
        return [d % n for d in listed] if len(listed) == n else None
    if name == "t" or (name == "getattr" and args[1] in ("T", "mT", "H", "mH")):
        if name == "getattr" and args[1] in ("T", "H"):
            return order[::-1]
        return [*order[:-2], n - 1, n - 2] if n > 1 else order
    return order if name in ("contiguous", "to", "float", "clone", "dropout") else None
