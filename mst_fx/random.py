"""Randomness with explicit seeds, so that the backward sees the forward's mask.

The forward and the backward of a region are two graphs; nothing makes them draw in the same order. So a
mask is a function of a seed, which the outer graph draws once per step and keeps for the backward.
"""

from __future__ import annotations

import torch


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
