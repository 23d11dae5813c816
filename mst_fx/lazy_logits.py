"""Stands in for logits whose loss was chunked: computes them when first touched.

HF models return ``loss`` and ``logits``; most training loops never read the second. ``LazyLogits`` has the
shape, dtype and device of the logits, holds the hidden states, and stays lazy through ``detach``, ``clone``,
``float`` and ``to``. Anything else computes the logits through the same head.

Danger:
    Touched after the head's weights or its input have changed it raises rather than show other logits.
    Gradients do not flow through it; asking for them raises. ``mst.logits="keep"`` keeps real logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class LogitsSpec:
    """How to build one lazy value from a graph's arguments and outputs."""

    slot: int
    """Position in the graph's outputs."""
    head: Callable[..., Any] | None
    """Row form of the head over ``(*rows, *shared)``; None drops the logits."""
    sources: tuple[tuple[str, int], ...] = ()
    """("arg" | "out", position) for every input of the head, chunked ones first."""
    num_chunked: int = 0
    seen_as: tuple[tuple[Any, ...], ...] = ()
    """For each input the shape it is expanded to (chunked) or viewed as (shared), sizes like those of ``shape``."""
    flattened: tuple[tuple[int, ...], ...] = ()
    """For each chunked input the order that brings its token dimensions to the front, then their number."""
    shape: tuple[Any, ...] = ()
    """Per dimension an int, or (source, dimension) to read it off at run time; dimension -1 is the number of tokens."""
    order: tuple[int, ...] = ()
    """Permutation from (tokens, features) to the logits' own dimensions."""
    dtype: torch.dtype = torch.float32
    requires_grad: bool = False
    memory: int = 0
    """Values of one graph that have the same number share memory."""
    layout: tuple[tuple[int, ...], int] | None = None
    """Strides and offset within that memory, None where they are symbolic."""
    whole: bool = False
    """Whether the value is all of that memory, laid out as its rows are computed."""


_F = TypeVar("_F", bound=Callable[..., Any])


def _opaque(fn: _F) -> _F:
    """Let Dynamo break the graph at a call, where another compiled function meets lazy logits, rather than trace it."""
    return torch.compiler.disable(fn)  # pyright: ignore


class _Head:
    """The head and what it computes the logits from; alive while some lazy logits are not computed yet."""

    def __init__(self, spec: LogitsSpec, inputs: Sequence[torch.Tensor]) -> None:
        self.spec, self.given = spec, list(inputs)
        shapes = [tuple(map(self._size, shape)) for shape in spec.seen_as]
        views = [torch.Tensor.expand] * spec.num_chunked + [torch.Tensor.reshape] * (len(inputs) - spec.num_chunked)
        self.inputs = [view(t, shape) for view, t, shape in zip(views, inputs, shapes, strict=True)]
        self.versions = [_version(t) for t in inputs]
        # Some optimizers and shardings write through `.data`, which no version counts, nor one in inference mode.
        self.samples = [_sample(t) for t in self.given]
        self.shape = tuple(map(self._size, spec.shape))

    def _size(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        source, dim = size
        if dim >= 0:
            return self.given[source].shape[dim]
        order = self.spec.flattened[source]
        return math.prod(self.inputs[source].shape[d] for d in order[: order[-1]])

    @property
    def freed(self) -> bool:
        """Whether weights are gone: FSDP frees what it gathered."""
        return any(map(_is_freed, self.given))

    @property
    def changed(self) -> bool:
        """Whether weights or hidden states are others than in the forward, or gone."""
        if self.freed or [_version(t) for t in self.given] != self.versions:
            return True
        return not all(map(_are_same, map(_sample, self.given), self.samples))

    def compute(self) -> torch.Tensor:
        """Compute the logits.

        Raises:
            RuntimeError: If weights or hidden states have changed since the forward, or are gone.
        """
        if self.freed:
            raise RuntimeError(
                "these logits were not computed in the forward (their loss was chunked), and the gathered weights they "
                "need have been freed since, as FSDP does after the backward, and after the forward where the model is "
                "wrapped with reshard_after_forward=True. Read them before, or compile with "
                'options={"mst.logits": "keep"}.'
            )
        if self.changed:
            raise RuntimeError(
                "these logits were not computed in the forward (their loss was chunked), and the model's weights, or "
                "the hidden states, have changed since, so they can't be computed any more. Read them before the "
                "optimizer step, or "
                'compile with options={"mst.logits": "keep"}.'
            )
        assert self.spec.head is not None
        with torch.no_grad(), torch.autocast(self.inputs[0].device.type, enabled=False):
            rows = [
                t.permute(order[:-1]).flatten(0, order[-1] - 1) if order[-1] else t.unsqueeze(0)
                for t, order in zip(self.inputs, self.spec.flattened, strict=False)
            ]
            out = self.spec.head(*rows, *self.inputs[self.spec.num_chunked :])[0]
            sizes = [self.shape[d] for d in self.spec.order]
            back = [self.spec.order.index(d) for d in range(len(sizes))]
            return out.reshape(sizes).permute(back)


class _Deferred:
    """One value, computed once, for all the lazy tensors that would share memory if they were real."""

    def __init__(
        self, head: _Head, casts: tuple[torch.dtype, ...], cast_from: _Deferred | None = None,
        view_of: _Deferred | None = None,
    ) -> None:  # fmt: skip
        self.head: _Head | None = head
        self.casts, self.cast_from, self.view_of = casts, cast_from, view_of
        self.value: torch.Tensor | None = None
        self.version = 0

    def compute(self) -> torch.Tensor:
        """Return the value, the same tensor every time."""
        if self.value is None:
            self.value = self._fresh()
            self.version = _version(self.value)
            self.head = self.cast_from = self.view_of = None
        return self.value

    def _fresh(self) -> torch.Tensor:
        assert self.head is not None
        if self.view_of is not None and self.head.spec.layout is not None:
            return self.view_of.compute().as_strided(self.head.shape, *self.head.spec.layout)
        source = self.cast_from
        if self.head.changed and source is not None:
            # What was cast may have been read in time, and is the same unless it was changed in place since.
            if source.value is not None and _version(source.value) == source.version:
                return source.value.to(self.casts[-1], copy=True)
            if source.value is None and source.cast_from is not None:
                return source._fresh().to(self.casts[-1])
        value = self.head.compute()
        for dtype in self.casts:
            value = value.to(dtype)
        return value


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _is_freed(tensor: torch.Tensor) -> bool:
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def _are_same(new: torch.Tensor, old: torch.Tensor) -> bool:
    return bool(((new == old) | (new != new) & (old != old)).all())


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Copy some of a tensor's elements, at most 32 along each dimension."""
    with torch.no_grad():
        return tensor[tuple(slice(None, None, -(-s // 32) or 1) for s in tensor.shape)].clone()


_KEEP = 'Compile with options={"mst.logits": "keep"} to use the returned logits in a loss of your own.'


def _refuse(*_: Any) -> Any:
    raise RuntimeError(f"gradients do not flow through logits whose loss was chunked. {_KEEP}")


def _refuse_gradient(*grads: Any) -> Any:
    """Refuse a gradient; none at all may come by (DDP's sink returns one slot per output)."""
    if any(g is not None for g in grads):
        _refuse()


class _NoGradient(torch.autograd.Function):
    """Identity that refuses a gradient with a sentence."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(value)
        ctx.set_materialize_grads(False)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _refuse_gradient(*grads)
        return None, None


class LazyLogits(torch.Tensor):
    """A tensor that is computed when it is first used. See the module's docstring."""

    _deferred: _Deferred
    _real: torch.Tensor | None

    @staticmethod
    @_opaque
    def __new__(cls, deferred: _Deferred, shape: Sequence[int], device: torch.device, grad: bool) -> LazyLogits:
        """Make a tensor of the deferred shape that owns no storage."""
        self = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=deferred.casts[-1], device=device, requires_grad=grad
        )
        self._deferred, self._real = deferred, None
        if grad:
            # What goes around __torch_function__ would take the wrapper for a leaf and leave a gradient on it.
            with torch._C.DisableTorchFunctionSubclass():
                self.register_hook(_refuse_gradient)
        return self

    def materialize(self) -> torch.Tensor:
        """Return the logits as an ordinary tensor, the same one every time."""
        if self._real is not None:
            return self._real
        real = self._deferred.compute().detach()
        if self.requires_grad:
            with torch.enable_grad():
                real: torch.Tensor = _NoGradient.apply(real, torch.empty((), requires_grad=True))  # pyright: ignore
        self._real = real
        return real

    @classmethod
    @_opaque
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        lazy = args[0] if args and isinstance(args[0], LazyLogits) and args[0]._real is None else None
        if lazy is not None:
            if func in _ATTRIBUTES:
                return super().__torch_function__(func, types, args, kwargs)
            if func in (torch.Tensor.detach, torch.detach):
                return LazyLogits(lazy._deferred, lazy.shape, lazy.device, False)
            if func is torch.Tensor.__repr__:
                try:  # to be looked at, an output need not have values any more
                    return repr(lazy.materialize())
                except RuntimeError as e:
                    return f"<logits {[*lazy.shape]} {lazy.dtype}: {e}>"
            dtype = _cast(func, lazy, args, kwargs)
            if dtype is not None and (cast := _recast(lazy, dtype)) is not None:
                return cast
            # DDP clones every output, to learn from the copy when the backward begins.
            alone = len(args) == 1 and not kwargs
            if func in (torch.Tensor.clone, torch.clone) and alone and (copy := _copy(lazy, lazy.dtype)) is not None:
                return copy
        if func is torch.Tensor.register_hook and _is_of_torch(args[1] if len(args) > 1 else kwargs.get("hook")):
            return super().__torch_function__(func, types, args, kwargs)
        if func in _ON_THE_GRAPH:
            _check_off_the_graph(args, kwargs)
        args, kwargs = pytree.tree_map_only(LazyLogits, LazyLogits.materialize, (tuple(args), kwargs))
        return func(*args, **kwargs)

    @classmethod
    @_opaque
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default and args[0]._real is None:
            return LazyLogits(args[0]._deferred, args[0].shape, args[0].device, False)
        args, kwargs = pytree.tree_map_only(LazyLogits, LazyLogits.materialize, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


def _recast(lazy: LazyLogits, dtype: torch.dtype) -> LazyLogits | None:
    return lazy if dtype == lazy.dtype else _copy(lazy, dtype)


def _copy(lazy: LazyLogits, dtype: torch.dtype) -> LazyLogits | None:
    """Return lazy logits with memory of their own to be."""
    grad, old = lazy.requires_grad and torch.is_grad_enabled(), lazy._deferred
    if old.head is None or (old.view_of is not None and old.view_of.value is not None):
        return None  # another view of these logits was read already
    return LazyLogits(_Deferred(old.head, (*old.casts, dtype), old), lazy.shape, lazy.device, grad)


def _is_of_torch(hook: Any) -> bool:
    """Whether a hook is torch's own: FSDP2 hooks every output to learn when the backward begins; the loss tells it."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


def _check_off_the_graph(args: Any, kwargs: Any) -> None:
    """Refuse to watch a gradient that will never come: the loss was not computed from these logits."""
    if any(isinstance(t, LazyLogits) and t.requires_grad for t in pytree.tree_leaves((args, kwargs))):
        _refuse()


_ON_THE_GRAPH = {torch.Tensor.register_hook, torch.Tensor.retain_grad, torch.autograd.grad, torch.autograd.backward}
_CASTS = {
    torch.Tensor.float: torch.float32,
    torch.Tensor.half: torch.float16,
    torch.Tensor.bfloat16: torch.bfloat16,
    torch.Tensor.double: torch.float64,
}
_PROPERTIES = (
    "shape", "dtype", "device", "requires_grad", "grad_fn", "is_leaf", "ndim", "layout", "grad", "is_cpu", "is_cuda",
    "is_sparse", "is_quantized", "is_meta", "is_nested", "is_mkldnn", "itemsize", "nbytes", "_base",
)  # fmt: skip
_ATTRIBUTES = {getattr(torch.Tensor, name).__get__ for name in _PROPERTIES} | {
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point, torch.Tensor.__len__,
    torch.is_floating_point, torch.Tensor.nelement, torch.Tensor.is_complex, torch.is_complex, torch.Tensor.get_device,
    torch.numel,
}  # fmt: skip


def _cast(func: Any, lazy: LazyLogits, args: Any, kwargs: Any) -> torch.dtype | None:
    """Return the dtype a call casts to if that is all it does."""
    if func in _CASTS:
        return _CASTS[func] if not kwargs else None
    if func is not torch.Tensor.to:
        return None
    rest = [*args[1:], *(v for k, v in kwargs.items() if k in ("dtype", "device", "other"))]
    if any(k not in ("dtype", "device", "non_blocking") for k in kwargs) or not rest:
        return None
    if sum(isinstance(v, bool) for v in rest) > 1:
        return None  # the second asks for a copy
    dtype = lazy.dtype
    for value in rest:
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (str, torch.device)) and torch.device(value) == lazy.device:
            continue
        elif not isinstance(value, bool):
            return None
    return dtype


def build_outputs(outputs: Sequence[Any], args: Sequence[Any], specs: Sequence[LogitsSpec], count: int) -> list[Any]:
    """Replace the slots of the specs in a graph's first ``count`` outputs by lazy logits (or None)."""
    results = list(outputs[:count])
    wholes: dict[int, _Deferred] = {}
    for spec in sorted(specs, key=lambda s: not s.whole):
        if spec.head is None:
            results[spec.slot] = None
            continue
        inputs = [(args if kind == "arg" else outputs)[i].detach() for kind, i in spec.sources]
        grad = spec.requires_grad and torch.is_grad_enabled()
        head = _Head(spec, inputs)
        deferred = _Deferred(head, (spec.dtype,), view_of=wholes.get(spec.memory) if spec.layout else None)
        if spec.whole:
            wholes.setdefault(spec.memory, deferred)
        results[spec.slot] = LazyLogits(deferred, head.shape, inputs[0].device, grad)
    return results
