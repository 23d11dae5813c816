"""Randomness with explicit seeds, so that the backward sees the forward's mask.

The forward and the backward of a region are two graphs; nothing makes them draw in the same order. So a
mask is a function of a seed, which the outer graph draws once per step and keeps for the backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


@torch.library.custom_op("mst_fx::keep_mask", mutates_args=())
def keep_mask(like: torch.Tensor, seed: torch.Tensor, site: int, p: float) -> torch.Tensor:
    """Return a bool mask of ``like``'s shape, each element True with probability ``1 - p``.

    Args:
        like: Gives shape and device.
        seed: int64 scalar on the CPU.
        site: Which random op of the body this is; each has a stream of its own.
        p: Probability of dropping.
    """
    generator = torch.Generator(device=like.device)
    generator.manual_seed((int(seed) * 1_000_003 + site) % 2**63)
    return torch.rand(like.shape, generator=generator, device=like.device) >= p


@keep_mask.register_fake
def _(like: torch.Tensor, seed: torch.Tensor, site: int, p: float) -> torch.Tensor:
    return like.new_empty(like.shape, dtype=torch.bool)


KEEP_MASK = torch.ops.mst_fx.keep_mask.default


class SeededDropout(TorchFunctionMode):
    """Makes the mask of every dropout a function of a seed; without a seed dropout does nothing."""

    def __init__(self, seed: torch.Tensor | None) -> None:
        super().__init__()
        self.seed, self.sites = seed, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.dropout, torch.dropout):
            return self._dropout(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _dropout(self, x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if self.seed is None or not training or p == 0.0:
            return x
        mask = KEEP_MASK(x, self.seed, self.sites, float(p))
        self.sites += 1
        scaled = mask.to(x.dtype) * (0.0 if p == 1.0 else 1.0 / (1.0 - p))
        return x.mul_(scaled) if inplace else x * scaled
