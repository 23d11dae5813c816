"""The seam to Dynamo: what it says of its graphs beside the nodes."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._dynamo.utils import counters
from torch._guards import TracingContext


def keep_source(old: Any, new: Any) -> None:
    """Let a copy of a graph or of a placeholder know where in the user's program its inputs come from.

    AOTAutograd tells by that which inputs are parameters, whose memory stays where it is.
    """
    for name in ("_dynamo_source", "_param_name_to_source"):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))


def is_piece() -> bool:
    """Whether the graph being compiled is one of several DDP has cut the user's into."""
    context = TracingContext.try_get()
    return context is not None and context.fakify_first_call


def graph_break(module: fx.GraphModule) -> tuple[str, str] | None:
    """Return where in the user's code a graph break ended a Dynamo graph, and why; None where none did."""
    found = getattr(module, "compile_subgraph_reason", None)
    if found is None or not found.graph_break:
        return None
    frame = found.user_stack[-1] if found.user_stack else None
    return f"{frame.filename}:{frame.lineno}" if frame else "an unknown place", (
        str(found.reason).splitlines() or [""]
    )[0]


def breaks_so_far() -> dict[str, int]:
    """Return how often in this process Dynamo broke a graph or left a function to eager, by reason."""
    return dict(counters["graph_break"])


def refusals_so_far() -> dict[str, int]:
    """Return how often in this process Dynamo met what it can't trace, by reason, whatever became of it."""
    return dict(counters["unimplemented"])
