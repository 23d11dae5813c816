"""What a pass is given: the graph to work on, and what it works with and adds to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from mst_fx.config import Config
from mst_fx.lazy_logits import LogitsSpec
from mst_fx.report import BodyCode, RegionReport


@dataclass
class Graph:
    """One graph to work on: the outermost one or that of a checkpointed block."""

    module: fx.GraphModule
    name: str
    """Path of a checkpointed block's graph, "" for the outermost."""
    outer: dict[fx.Node, fx.Node]
    """For a checkpointed block, placeholders -> the caller's values."""
    ambient: Callable[[], contextlib.AbstractContextManager[Any]]
    """The autocast state the graph runs under."""
    checkpointed: bool


@dataclass
class Context:
    """What a pass works with and adds to."""

    config: Config
    fake_mode: Any
    reports: list[RegionReport] = field(default_factory=list)
    bodies: dict[str, BodyCode] = field(default_factory=dict)
    logits: list[LogitsSpec] = field(default_factory=list)
    mutated: dict[fx.GraphModule, set[int]] = field(default_factory=dict)
    """Per graph, the storages that change in place in it."""
    notes: list[str] = field(default_factory=list)
    """What is to be said of a graph as a whole."""
    masks: int = 0
    """How many attentions were relieved of their mask."""
    allowed: frozenset[str] | None = None
    """Keys of the regions of the graph at hand that may be rewritten; None for all."""
