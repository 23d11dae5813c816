"""Row form: what a token-wise computation is when every token dimension is folded into one.

Terms:
    token dimension: a dimension along which the rows of a value are independent of each other.
    row: the features that belong to one token. A value ``[B, S, I]`` with token dimensions 0 and 1 is,
        in row form, ``[C, I]`` for any number ``C`` of rows.
    shared: a value without token dimensions (a weight, a bias, a constant), the same for all rows.

Invariant: the token dimensions of every value, flattened in order, index the same tokens in the same
order. A value's features keep their order. So a transpose may move token dimensions among features,
and costs nothing in row form, but may not reorder tokens.

``RowBuilder`` writes the row form of a computation as an FX graph of ATen ops; ``rules`` says, op by op,
what that form is, or raises ``MixesTokensError`` where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from mst_fx.inductor import storage_of

aten = torch.ops.aten


class MixesTokensError(Exception):
    """The computation has no row form: it mixes tokens, or is not known to keep them apart."""


TWO_OF_TOKENS = "multiplies two values of the tokens with each other"
ATTENTION = f"{TWO_OF_TOKENS} (attention)"
"""What a report knows attention by."""


@dataclass(frozen=True)
class Row:
    """A token-wise value: which dimensions are tokens, and its row form ``[C, *features]``."""

    kinds: tuple[bool, ...]
    """For each dimension of the original value, whether it is a token dimension."""
    node: fx.Node

    def feature_dim(self, dim: int) -> int:
        """Return where the original feature dimension ``dim`` is in the row form."""
        dim %= len(self.kinds)
        if self.kinds[dim]:
            raise MixesTokensError("works along a token dimension")
        return 1 + sum(not k for k in self.kinds[:dim])

    def with_node(self, node: fx.Node) -> Row:
        """Return the same rows with other contents."""
        return Row(self.kinds, node)


@dataclass(frozen=True)
class Shared:
    """A value without token dimensions."""

    node: fx.Node


class LiveIn(NamedTuple):
    """A value the row form takes from outside. Equal live-ins share one placeholder."""

    tensor: torch.Tensor
    kinds: tuple[bool, ...] | None
    """Token dimensions of a chunked live-in, None for a shared one."""
    shape: tuple[Any, ...]
    """Chunked: the shape to expand to before flattening. Shared: the shape to view as."""


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for certain, without adding a guard."""
    return bool(statically_known_true(a == b))


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two shapes are equal for certain, without adding a guard."""
    return a.ndim == b.ndim and all(map(same_size, a.shape, b.shape))


def concrete(size: Any) -> Any:
    """Return a size as an int where it is known to be one, e.g. a symbol that a weight's shape has settled."""
    if isinstance(size, torch.SymInt):
        known = size.node.maybe_as_int()
        return size if known is None else known
    return size


def is_one(size: Any) -> bool:
    """Whether a size is the constant 1 (a symbolic size never is: Dynamo specializes 0 and 1)."""
    size = concrete(size)
    return isinstance(size, int) and size == 1


def feature_shape(shape: Sequence[Any], kinds: Sequence[bool]) -> list[Any]:
    """Return the sizes of the feature dimensions."""
    return [concrete(s) for s, k in zip(shape, kinds, strict=True) if not k]


def numel(sizes: Sequence[Any]) -> Any:
    """Return the product of sizes, symbolic where they are."""
    return math.prod(sizes)


class RowBuilder:
    """Builds the row-form graph; knows which tensors have a row form so far.

    Tensors are known by identity. ``resolve`` says whether an unknown tensor may enter from outside.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.live_ins: dict[tuple[int, Any, Any], tuple[LiveIn, fx.Node]] = {}
        self._env: dict[int, Row | Shared] = {}
        self._kept: list[torch.Tensor] = []  # ids stay unique while the tensors live
        self._last_placeholder: fx.Node | None = None
        self.seed: fx.Node | None = None
        self.seeds = 0
        self.in_loop: set[fx.Node] = set()
        """Computations on shared values that belong into the loop all the same."""

    # -- values ---------------------------------------------------------------------------------

    def bind(self, tensor: torch.Tensor, value: Row | Shared) -> None:
        """Record the row form of ``tensor``."""
        self._env[id(tensor)] = value
        self._kept.append(tensor)

    def unbind(self, tensor: torch.Tensor, previous: Row | Shared | None) -> None:
        """Forget the row form of ``tensor``, or restore the one before."""
        if previous is None:
            self._env.pop(id(tensor), None)
        else:
            self._env[id(tensor)] = previous

    def lookup(self, tensor: Any) -> Row | Shared | None:
        """Return the row form of ``tensor`` if it is known."""
        return self._env.get(id(tensor))

    def names(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """Return the known tensors that are the same memory, None if some see a part of it or come from outside."""
        storage = storage_of(tensor)
        outside = {storage_of(live.tensor) for live, _ in self.live_ins.values()}
        found = [t for t in self._kept if self.lookup(t) is not None and storage_of(t) == storage]
        same = all(
            isinstance(self.lookup(t), type(self.lookup(tensor)))
            and t.dtype == tensor.dtype
            and t.storage_offset() == tensor.storage_offset()
            and list(t.shape) == list(tensor.shape)
            and t.stride() == tensor.stride()
            for t in found
        )
        return found if same and storage not in outside else None

    def row(self, tensor: Any) -> Row | None:
        """Return the row form of ``tensor`` if it is token-wise."""
        value = self.lookup(tensor)
        return value if isinstance(value, Row) else None

    def emit(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Append one op to the row-form graph."""
        if any(
            isinstance(v, torch.SymInt | torch.SymFloat | torch.SymBool) for v in pytree.tree_leaves((args, kwargs))
        ):
            raise MixesTokensError("computes with the number of tokens")
        return self.graph.call_function(target, args, kwargs)

    # -- live-ins -------------------------------------------------------------------------------

    def placeholder(self, name: str) -> fx.Node:
        """Append a placeholder behind those that exist."""
        anchor = self._last_placeholder
        where = self.graph.inserting_after(anchor) if anchor else self.graph.inserting_before(self._first())
        with where:
            self._last_placeholder = self.graph.placeholder(name)
        return self._last_placeholder

    def seed_node(self) -> fx.Node:
        """Return the placeholder of the seed that the random ops of the body share."""
        if self.seed is None:
            self.seed = self.placeholder("seed")
        return self.seed

    def _first(self) -> fx.Node:
        return next(iter(self.graph.nodes), self.graph._root)

    def chunked(self, tensor: torch.Tensor, kinds: tuple[bool, ...], shape: Sequence[Any] | None = None) -> Row:
        """Take ``tensor`` from outside as rows, expanded to ``shape`` first where tokens share a value."""
        full = tuple(map(concrete, tensor.shape if shape is None else shape))
        key = (id(tensor), kinds, str(full))  # symbolic sizes have no hash
        if key not in self.live_ins:
            node = self.placeholder(f"chunk_{len(self.live_ins)}")
            self.live_ins[key] = (LiveIn(tensor, kinds, full), node)
            self._kept.append(tensor)
        return Row(kinds, self.live_ins[key][1])

    def shared(self, tensor: torch.Tensor, shape: Sequence[Any] | None = None) -> fx.Node:
        """Take ``tensor`` whole, viewed as ``shape``; values made on the way are used where they are."""
        value = self.lookup(tensor)
        if isinstance(value, Row):
            raise MixesTokensError("uses a value of all tokens as if it were a weight")
        viewed = shape is not None and list(shape) != list(tensor.shape)
        if isinstance(value, Shared):
            return self.emit(aten.view.default, value.node, list(shape or ())) if viewed else value.node
        full = tuple(map(concrete, tensor.shape if shape is None else shape))
        key = (id(tensor), None, str(full))
        if key not in self.live_ins:
            if not all(isinstance(s, int) for s in full):
                raise MixesTokensError("uses a value whose size changes with the number of tokens as if shared")
            node = self.placeholder(f"shared_{len(self.live_ins)}")
            self.live_ins[key] = (LiveIn(tensor, None, full), node)
            self._kept.append(tensor)
        return self.live_ins[key][1]

    # -- operands -------------------------------------------------------------------------------

    def aligned(self, tensor: torch.Tensor, shape: Sequence[Any], kinds: Sequence[bool]) -> fx.Node:
        """Return ``tensor`` so that it broadcasts, in row form, against a value of ``shape`` and ``kinds``.

        Rows must carry every token dimension. A tensor from outside whose size matches a token
        dimension becomes a chunked live-in; one that is 1 along all of them is shared.
        """
        lead = len(shape) - tensor.ndim
        spans = [(d, d + lead, tensor.shape[d]) for d in range(tensor.ndim)]
        tokens = [d for d, k in enumerate(kinds) if k and not is_one(shape[d])]
        value = self.lookup(tensor)
        own = [size for _, out, size in spans if not kinds[out]]
        if isinstance(value, Row):
            for d, out, size in spans:
                if not is_one(size) and value.kinds[d] != kinds[out]:
                    raise MixesTokensError("lines up a token dimension with a feature dimension")
            covered = {out for d, out, size in spans if value.kinds[d] and not is_one(size)}
            if covered != set(tokens):
                raise MixesTokensError("broadcasts a value over tokens")
            full = [1] * (sum(not k for k in kinds) - len(own)) + own
            return self.reshaped(value, tensor.shape, full)
        matches = [out for _, out, size in spans if out in tokens and not is_one(size)]
        if not matches:
            if any(kinds[out] for _, out, _ in spans):
                return self.shared(tensor, own or [1])  # a tensor without dimensions counts less in type promotion
            return self.shared(tensor)
        if isinstance(value, Shared):
            raise MixesTokensError("makes a value that depends on the position of the token")
        if any(not same_size(tensor.shape[out - lead], shape[out]) for out in matches):
            raise MixesTokensError("lines up dimensions of different sizes")
        full_shape = [shape[d] if kinds[d] else tensor.shape[d - lead] if d >= lead else 1 for d in range(len(shape))]
        if matches != tokens and not same_size(numel(feature_shape(full_shape, kinds)), 1):
            raise MixesTokensError("broadcasts a wide value over tokens")
        return self.chunked(tensor, tuple(kinds), full_shape).node

    def reshaped(self, value: Row, shape: Sequence[Any], features: Sequence[Any]) -> fx.Node:
        """Return the row form of ``value`` viewed as ``[C, *features]``."""
        if list(feature_shape(shape, value.kinds)) == list(features):
            return value.node
        if not all(isinstance(s, int) for s in features):
            raise MixesTokensError("has features whose size changes with the number of tokens")
        return self.emit(aten.reshape.default, value.node, [-1, *features])


def view_kinds(old: Sequence[Any], kinds: Sequence[bool], new: Sequence[Any]) -> tuple[bool, ...]:
    """Return which dimensions of ``new`` are tokens when a value of shape ``old`` is viewed as it.

    Both shapes are cut into the smallest groups with equal products. A group must be of one kind;
    dimensions of size 1 go with any.
    """
    result: list[bool] = []
    i = j = 0
    while i < len(old) or j < len(new):
        start_old, start_new = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while not same_size(left := numel(old[start_old:i]), right := numel(new[start_new:j])):
            if i < len(old) and (j >= len(new) or _is_smaller(left, right)):
                i += 1
            elif j < len(new):
                j += 1
            else:
                raise MixesTokensError("views tokens and features as one")
        found = {kinds[d] for d in range(start_old, i) if not is_one(old[d])}
        if len(found) > 1:
            raise MixesTokensError("views tokens and features as one dimension")
        kind = found.pop() if found else any(kinds[start_old:i])
        result += [kind] * (j - start_new)
    return tuple(result)


def _is_smaller(left: Any, right: Any) -> bool:
    if statically_known_true(left < right) or statically_known_true(right < left):
        return bool(statically_known_true(left < right))
    return _symbols(left) < _symbols(right)  # a symbolic size against a number: the number grows


def _symbols(size: Any) -> int:
    return len(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else 0
