"""What a model returned: its floating tensors by path, and which of them it is trained by."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

Values = dict[str, torch.Tensor]


def named_tensors(value: Any, name: str) -> Values:
    """Return the floating tensors in a nest of containers by path, e.g. ``output.loss``."""

    def step(key: Any) -> str:
        at = getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))
        return f".{at}" if isinstance(at, str) else f"[{at}]"

    leaves = pytree.tree_flatten_with_path(value)[0]
    tensors = ((path, v) for path, v in leaves if isinstance(v, torch.Tensor) and v.is_floating_point())
    return {name + "".join(map(step, path)): v for path, v in tensors}


def trained(outputs: Values) -> Values:
    """Return what gradients start from: ``output.loss``, else the scalars, else every output that needs gradients."""
    found = {n: v for n, v in outputs.items() if v.requires_grad}
    loss = {n: v for n, v in found.items() if n == "output.loss"}
    return loss or {n: v for n, v in found.items() if not v.ndim} or found
