"""A user's promise that a module is token-wise, kept as one node through Dynamo.

    y = moe(x)   ->   y = tokenwise_call(key, {"gate.weight": w, ...}, (x,), {})

``tokenwise(module)`` puts a ``Promise`` in the module's ``forward``. In eager it runs the module. Where Dynamo
traces it becomes one call to which parameters and buffers are handed as inputs; every other backend traces
through that call, this one makes a region of it.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, UnsupportedOperatorException
from torch.utils import _pytree as pytree

M = TypeVar("M", bound=nn.Module)

_KEYS = itertools.count()
_PROMISES: weakref.WeakValueDictionary[str, Promise] = weakref.WeakValueDictionary()


def tokenwise(module: M) -> M:
    """Declare that row *t* of a module's outputs depends on row *t* of its inputs alone.

    ``torch.compile(..., backend="mst")`` then runs the module a chunk of tokens at a time, whatever it does inside;
    eager mode and other backends do what they did. The module is changed in place (its ``forward``, not its type,
    parameters or state dict) and returned; a second call changes nothing, ``del module.forward`` takes it back.

    The first tensor argument is ``[*tokens, features]``. Every other tensor argument and every output begins with
    the same token dimensions, or with all of them flattened to one (router logits ``[T, E]``); arguments without
    dimensions are shared.

    Danger:
        Nothing but ``mst.verify_tokenwise`` checks the promise. A module that mixes tokens (a capacity per expert, a
        statistic of the batch, attention) gives other numbers when it is chunked.

    Args:
        module: The module; ``forward`` must trace without reading values (no loop over ``nonzero``) and keep nothing
            in attributes.

    Raises:
        TypeError: If it is no ``nn.Module``.
        ValueError: If a tensor in it is neither parameter nor buffer, or a module of it has two names.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"mst_fx.tokenwise takes an nn.Module, got {type(module).__name__}")
    if isinstance(module.__dict__.get("forward"), Promise):
        return module
    names: dict[nn.Module, str] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        if names.setdefault(child, path) != path:
            raise ValueError(
                f"mst_fx.tokenwise: `{names[child]}` and `{path}` are one module, of which torch.func.functional_call "
                "would leave the wrong weights behind. Keep it under one name."
            )
        for name, value in vars(child).items():
            if isinstance(value, torch.Tensor):
                where = f"{path}.{name}".lstrip(".")
                raise ValueError(
                    f"mst_fx.tokenwise: `{where}` is a tensor that is neither parameter nor buffer, so that a compiled "
                    f"graph would not see it change. Use register_buffer({name!r}, ..., persistent=False)."
                )
    module.forward = Promise(module)  # pyright: ignore
    return module


class Promise:
    """The ``forward`` of a module declared token-wise. Copies and pickles with its module."""

    def __init__(self, module: nn.Module) -> None:
        self.__setstate__({"module": module, "original": module.__dict__.get("forward")})

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "original": self.original}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.module: nn.Module = state["module"]
        self.original: Callable[..., Any] | None = state["original"]
        self.key = f"promise {next(_KEYS)}"  # of a number Dynamo would make a symbol
        _PROMISES[self.key] = self

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.forward)

    @property
    def forward(self) -> Callable[..., Any]:
        """The module's own forward."""
        return self.original or functools.partial(type(self.module).forward, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, as one node where Dynamo traces."""
        if torch.compiler.is_dynamo_compiling():
            state = {}
            for name, tensor in self.module.named_parameters():
                state[name] = tensor
            for name, tensor in self.module.named_buffers():
                state[name] = tensor
            # Dynamo doesn't look into the call, so it would go on after a change of `training` or of a number such as
            # a Dropout's p. What it reads outside the call it guards on.
            guarded = {}
            names = () if _READS_DICTS else _names_of_numbers(self.key)
            for i, (_, child) in enumerate(self.module.named_modules()):
                values = child.__dict__.values() if _READS_DICTS else [getattr(child, name, None) for name in names[i]]
                for value in values:
                    if value is None or isinstance(value, (bool, int, float, str)):
                        guarded[value] = 0  # a key of a dict is a constant, never a symbolic float
            return tokenwise_call(self.key, state, args, kwargs)
        return self.forward(*args, **kwargs)

    def run(self, state: dict[str, torch.Tensor], args: Any, kwargs: Any) -> Any:
        """Run the module with other parameters and buffers; its hooks are left to who called it."""
        given = {f"module.{name}": tensor for name, tensor in state.items()}
        return torch.func.functional_call(_Inside(self), given, args, kwargs)

    def trace(self, state: dict[str, torch.Tensor], args: Any, kwargs: Any) -> Any:
        """Run it on fake tensors.

        Raises:
            ValueError: If that leaves something in an attribute: a compiled call would not, or not that.
        """
        before = [(part, {**vars(part)}) for part in self.module.modules()]
        kept: list[str] = []
        try:
            result = self.run(state, args, kwargs)
        finally:
            for part, known in before:
                kept += [k for k, v in vars(part).items() if not _is_same(known.get(k, self), v)]
                vars(part).clear()
                vars(part).update(known)
        if kept:
            raise ValueError(f"its forward keeps something in `{kept[0]}`")
        return result

    def __str__(self) -> str:
        return type(self.module).__name__


_READS_DICTS = torch.__version__ >= (2, 13)  # pyright: ignore[reportOperatorIssue]
"""Whether Dynamo traces what goes over a module's ``__dict__``, and sees when something is put into it."""


@torch.compiler.assume_constant_result
def _names_of_numbers(key: str) -> tuple[tuple[str, ...], ...]:
    """Return what the parts of a promised module call their numbers, by part; asked while Dynamo traces."""
    kinds = bool | int | float | str | None
    parts = (part for _, part in find_promise(key).module.named_modules())
    return tuple(tuple(name for name, value in vars(part).items() if isinstance(value, kinds)) for part in parts)


def _is_same(old: Any, new: Any) -> bool:
    return old is new or (isinstance(new, bool | int | float | str) and type(old) is type(new) and old == new)


class _Inside(nn.Module):
    """Calls the promised module's own forward; ``functional_call`` wants a module to call."""

    def __init__(self, promise: Promise) -> None:
        super().__init__()
        self.module, self.run = promise.module, promise.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


def find_promise(key: str) -> Promise:
    """Return a promise that is still alive.

    Raises:
        RuntimeError: If its module is gone.
    """
    promise = _PROMISES.get(key)
    if promise is None:
        raise RuntimeError("the module declared token-wise no longer exists")
    return promise


@torch.compiler.allow_in_graph
def tokenwise_call(key: str, state: dict[str, torch.Tensor], args: Any, kwargs: Any) -> Any:
    """Run a promised module on tensors handed in: what Dynamo leaves as one node."""
    promise = find_promise(key)
    is_fake = any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves((state, args, kwargs)))
    try:
        return (promise.trace if is_fake else promise.run)(state, args, kwargs)
    except Exception as e:
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        warnings.warn(
            f"mst_fx.tokenwise: `{promise}` can't be traced as one call, so the graph breaks at it and it is not "
            f"chunked ({type(e).__name__}: {first})",
            stacklevel=2,
        )
        if not is_fake:
            raise
        # Of the errors met while it traces Dynamo breaks the graph at some only; this is one of them.
        raise UnsupportedOperatorException(str(promise)) from e
