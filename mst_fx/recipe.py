"""The recipe of Mini-Sequence Transformer in one line: gradient checkpointing, then the backend."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from mst_fx.config import Config

Model = TypeVar("Model", bound=torch.nn.Module)


def minisequence(model: Model, *, checkpointing: bool | None = None, **compile_kwargs: Any) -> Model:
    """Turn gradient checkpointing on where the model has it, compile it in place with ``mst``, and return it.

    It stays the same object: its type, its parameters and the keys of its state dict do not change, and
    ``save_pretrained``, ``Trainer`` and PEFT see the model they know. Nothing is compiled before its first call.

    Args:
        model: Any module. Models of Transformers, with adapters of PEFT or without, have checkpointing to turn on.
        checkpointing: Whether to; None does where there is something to turn on.
        **compile_kwargs: For ``torch.compile``: ``options`` (``mst.*`` and Inductor's), ``mode``, ``dynamic``,
            ``fullgraph``.

    Raises:
        TypeError: If it is no ``nn.Module``.
        ValueError: If an option is not known or has a bad value, if checkpointing is asked for and the model has none,
            or if the module is one of torch's own containers, of which torch compiles nothing in place.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"mst_fx.minisequence takes an nn.Module, got {type(model).__name__}; a function is compiled by "
            'torch.compile(function, backend="mst")'
        )
    Config.parse(compile_kwargs.get("options"))
    if checkpointing and not has_checkpointing(model):
        raise ValueError(
            f"{type(model).__name__} has no gradient checkpointing to turn on (supports_gradient_checkpointing of "
            "Transformers); put torch.utils.checkpoint into it, or leave checkpointing=True out"
        )
    if type(model).__module__.startswith("torch.nn."):
        raise ValueError(
            f"torch compiles nothing of a bare {type(model).__name__} in place; use "
            'torch.compile(model, backend="mst"), or put it into a module of your own'
        )
    if checkpointing is not False and has_checkpointing(model):
        enable_checkpointing(model)
    model.compile(backend="mst", **compile_kwargs)
    return model


def has_checkpointing(model: torch.nn.Module) -> bool:
    """Return whether a model offers gradient checkpointing the way models of Transformers do."""
    return bool(getattr(model, "supports_gradient_checkpointing", False))


def enable_checkpointing(model: Any) -> None:
    """Turn gradient checkpointing on, by the name that this version of Transformers has for it.

    Raises:
        ValueError: If the model does not support it.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
